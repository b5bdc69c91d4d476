"""Backends, as far as one process on a CPU shows: DDP with compiled blocks, the right GPU, and how
a checkpoint is copied from one."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.layers import Block, SequenceInfo
from utils.backend.cpu import CPUBackend
from utils.backend.cuda import CUDABackend
from utils.backend.state import host_copy
from utils.core.errors import UserError


@pytest.fixture
def group():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_compiled_block_stays_whole_under_ddp(group):
    """torch would cut it where DDP's buckets end, which helps nothing where blocks are applied many
    times before their gradients are there, and fails for flex attention."""
    graphs = []

    def note(graph: torch.fx.GraphModule, inputs):
        graphs.append(graph)
        return graph

    block = Block(384, 2, 2, 4.0, "post", 1e-5)  # several times the size of the first bucket
    block.compile(backend=note, dynamic=False)
    backend = CPUBackend()
    backend.world_size = 2  # or it would not wrap
    model = backend.wrap(block)
    model(torch.randn(1, 4, 384), SequenceInfo(None, None, None, True)).sum().backward()
    assert len(graphs) == 1


def processes(monkeypatch, *, gpus: int, local_rank: int, local: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, value in (("RANK", local_rank), ("LOCAL_RANK", local_rank),
                        ("LOCAL_WORLD_SIZE", local), ("WORLD_SIZE", 2 * local)):  # fmt: skip
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("local_rank", [0, 3])
def test_more_processes_than_gpus_are_refused_by_all_of_them(local_rank, monkeypatch):
    """By those that have a GPU, too: they would wait for the others."""
    processes(monkeypatch, gpus=2, local_rank=local_rank, local=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    with pytest.raises(UserError) as raised:
        CUDABackend()
    for word in ("4 processes", "2 GPUs", "CUDA_VISIBLE_DEVICES=5,6", "--nproc-per-node 2"):
        assert word in str(raised.value)


def test_as_many_processes_as_gpus_take_one_each(monkeypatch):
    processes(monkeypatch, gpus=2, local_rank=1, local=2)
    assert CUDABackend().device == torch.device("cuda", 1)


class Copies(TorchDispatchMode):
    """Notes where copies to the host go, and whether the host waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        options, name = kwargs or {}, operation._schema.name
        if options.get("pin_memory"):
            self.seen.append("pinned")
        elif name == "aten::copy_":
            self.seen.append("copy" if args[2] else "copy and wait")
        elif name == "aten::_to_copy" and options["device"].type == "cpu":
            self.seen.append("pageable copy and wait")
        return operation(*args, **options)


def test_a_checkpoint_leaves_the_gpu_in_one_pass(monkeypatch):
    """Into pinned memory, which the GPU writes by itself; the host waits for all at the end."""
    copies = Copies()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: copies.seen.append(str(device)))
    with FakeTensorMode():
        weight = torch.empty(3, 4, device="cuda", requires_grad=True)
        state = {"model": {"w": weight}, "optimizer": [{"w": torch.empty(2, device="cuda")}]}
        with copies:
            copied = host_copy(state)
    assert copied["model"]["w"].device.type == "cpu"
    assert copies.seen == ["pinned", "copy"] * 2 + ["cuda:0"]


def test_a_copy_is_its_own():
    weight = torch.nn.Parameter(torch.ones(3))
    state = {"model": {"w": weight}, "step": 3, "moments": [weight.data[:2]]}
    copied = host_copy(state)
    with torch.no_grad():
        weight.zero_()
    assert copied["model"]["w"].tolist() == [1, 1, 1] and copied["moments"][0].tolist() == [1, 1]
    assert copied["step"] == 3 and not copied["model"]["w"].requires_grad
    assert host_copy(state, keep=False) == {"model": {"w": None}, "step": 3, "moments": [None]}

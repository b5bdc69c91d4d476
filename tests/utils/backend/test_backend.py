"""What the code asks of a device: compilers, dtypes, memory."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
from training_tools import make_config

from models.build import create_model
from models.flex import raise_recompile_limit
from models.inference.loading import base_loader
from models.recursive_reasoning.athena_trm import AthenaTRM
from pretrain import train
from utils.backend.cpu import CPUBackend
from utils.backend.cuda import CUDABackend, missing_for_triton
from utils.backend.memory import explain_out_of_memory
from utils.core.errors import UserError
from utils.corpus.data import open_data
from utils.training.build import choose_micro_batch_rows
from utils.training.plan import FILLED, MemoryPlan, count_present_bytes
from utils.training.resume import choose_dtype
from utils.training.state import choose_kernels


def test_freed_memory_is_used_again_without_page_faults():
    resource = pytest.importorskip("resource")
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("not glibc")
    CPUBackend()
    faults = []
    for _ in range(16):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24)  # 64 MB, 16,384 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert max(faults[-4:]) < 1000  # at first a free block may be too short by the alignment


# --- compiling ---------------------------------------------------------------------------------


def card(monkeypatch, capability: tuple[int, int]) -> CUDABackend:
    """The backend of a card that is not there, as the driver would describe it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    backend = CUDABackend.__new__(CUDABackend)
    backend.rank, backend.world_size, backend.device = 0, 1, torch.device("cuda")
    return backend


@pytest.fixture
def triton(tmp_path, monkeypatch) -> Path:
    """A machine on which Triton is installed, with a folder of programs of its own."""
    (tmp_path / "packages" / "triton").mkdir(parents=True)
    (tmp_path / "packages" / "triton" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "Python.h").touch()
    monkeypatch.setenv("CPATH", str(headers))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(programs))
    return tmp_path


def test_triton_needs_a_c_compiler(triton, monkeypatch):
    assert missing_for_triton() is None
    monkeypatch.setenv("CC", "nothing-of-this-name")
    assert "CC=nothing-of-this-name" in missing_for_triton()
    monkeypatch.delenv("CC")
    (triton / "bin" / "gcc").unlink()
    assert "gcc" in missing_for_triton()


def test_triton_needs_the_headers_of_python(triton, monkeypatch):
    paths = {"include": str(triton / "nowhere")}
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: paths)
    assert missing_for_triton() is None  # CPATH has them
    monkeypatch.delenv("CPATH")
    assert "nowhere/Python.h" in missing_for_triton()


def test_auto_compiles_on_cards_that_triton_serves(triton, monkeypatch):
    assert card(monkeypatch, (9, 0)).compiles("auto")
    assert not card(monkeypatch, (9, 0)).compiles(False)
    assert not card(monkeypatch, (7, 5)).compiles("auto")
    assert card(monkeypatch, (7, 5)).compiles(True)
    assert not card(monkeypatch, (6, 1)).compiles(True)
    (triton / "bin" / "gcc").unlink()
    assert not card(monkeypatch, (9, 0)).compiles("auto")
    assert not CPUBackend().compiles("auto")


def test_one_note_says_what_is_slow_without_a_compiler(text_corpus, triton, monkeypatch, capsys):
    (triton / "bin" / "gcc").unlink()
    config = make_config(text_corpus)
    model = create_model(config.arch, open_data(config).train.metadata, batch_size=8)
    choose_kernels(config, model, card(monkeypatch, (9, 0)))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and "compile=auto" in notes[0] and "dense" in notes[0]
    assert "gcc" in notes[0]
    assert model.model.inner.masked_attention == "dense"
    choose_kernels(config, model, CPUBackend())
    assert capsys.readouterr().out == ""


# --- dtypes ------------------------------------------------------------------------------------


class NoBfloat16(CPUBackend):
    capability = (7, 5)
    usable_dtype = CUDABackend.usable_dtype


def dtype_in(run: Path) -> str:
    line = next(
        n for n in (run / "config.yaml").read_text("utf-8").splitlines() if "forward_dtype" in n
    )
    return line.split()[-1]


def test_a_card_without_bfloat16_starts_runs_in_float32(text_corpus, capsys):
    config = make_config(text_corpus, "arch.forward_dtype=bfloat16")
    choose_dtype(config, NoBfloat16(), None)
    assert config.arch.options["forward_dtype"] == "float32"
    assert "forward_dtype=float32" in capsys.readouterr().out
    same = make_config(text_corpus, "arch.forward_dtype=float64")
    choose_dtype(same, NoBfloat16(), None)
    assert same.arch.options["forward_dtype"] == "float64"
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_run_keeps_its_dtype_when_it_is_resumed(text_corpus, tmp_path, capsys):
    """Begun on such a card it stays in float32 there; begun elsewhere, in bfloat16."""
    for begun, dtype in ((NoBfloat16(), "float32"), (CPUBackend(), "bfloat16")):
        folder = tmp_path / dtype
        options = ["arch.forward_dtype=bfloat16", f"checkpoint_path={folder}", "evaluators=[]",
                   "eval_max_batches=1", "resume_allow=[max_steps]"]  # fmt: skip
        assert train(begun, make_config(text_corpus, *options, "max_steps=1")) == 0
        assert dtype_in(folder) == dtype
        capsys.readouterr()
        assert train(NoBfloat16(), make_config(text_corpus, *options, "max_steps=2")) == 0
        assert dtype_in(folder) == dtype
        assert dtype in capsys.readouterr().out


# --- memory ------------------------------------------------------------------------------------


class Roomy(CPUBackend):
    """As much memory as a test says, on each of several ranks."""

    def __init__(self, free: int, others: tuple[int, ...] = ()):
        super().__init__()
        self.free, self.others = free, others

    def available_memory(self) -> int:
        return self.free

    def gather_objects(self, value):
        return [value, *self.others]


def test_the_rank_with_the_least_memory_decides(text_corpus):
    config = make_config(text_corpus)
    data = open_data(config)
    model = create_model(config.arch, data.train.metadata, batch_size=8)
    assert choose_micro_batch_rows(config, Roomy(1 << 40), model, data, None)[0] == 8
    others = Roomy(1 << 40, others=(2, 4))
    assert choose_micro_batch_rows(config, others, model, data, None)[0] == 2


def test_what_lies_on_the_device_is_planned_once(text_corpus, text_run):
    """The base of kl_to, and on a CPU the model, are there when free memory is read."""
    near = [f"arch.loss.kl_to={text_run}", "arch.loss.kl_weight=0.5"]
    config = make_config(text_corpus, *near, "arch.puzzle_emb_ndim=32")
    data = open_data(config)
    model = create_model(config.arch, data.train.metadata, batch_size=8)
    model.prepare(base_loader(data, CPUBackend()))
    base = next(term for term in model.terms if term.name == "kl").base
    planned = MemoryPlan(config, data.train.metadata, device="cpu").total(8)
    there = [*model.parameters(), *model.buffers()]
    there += [*base.parameters(), *base.buffers()]
    # room for the whole plan, less what is there already
    free = round(planned / FILLED * 1.001) - sum(t.nbytes for t in there)
    assert choose_micro_batch_rows(config, Roomy(free), model, data, None)[0] == 8
    assert count_present_bytes(model, "cuda") == 0


def test_the_cache_of_the_allocator_counts_as_free(monkeypatch):
    """Or the second job of a sweep would get fewer rows than the first."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    assert card(monkeypatch, (9, 0)).available_memory() == 65


@pytest.fixture
def dynamo_config():
    """The compiler's settings, which are as before after the test."""
    with torch._dynamo.config.patch(recompile_limit=8):
        yield torch._dynamo.config
    torch.compiler.reset()


@pytest.mark.slow
def test_a_run_of_a_sweep_compiles_and_measures_for_itself(dynamo_config):
    """torch gives up a function after some shapes, and peaks would be those of earlier runs."""
    shapes: list[int] = []

    def note(graph, inputs):
        shapes.append(len(inputs[0]))
        return graph.forward

    compiled = torch.compile(lambda x: x + 1, backend=note, dynamic=False)
    for n in range(1, 15):
        compiled(torch.zeros(n))
    assert len(shapes) < 14, "the limit is not reached"
    raise_recompile_limit()
    torch.compiler.reset()
    for n in range(1, 15):
        compiled(torch.zeros(n))
    assert shapes[-14:] == list(range(1, 15))
    dynamo_config.recompile_limit = 8
    for n in range(15, 30):
        compiled(torch.zeros(n))
    before = torch.ones(60 << 20)
    peak = CPUBackend().memory_bytes()
    del before
    backend = CPUBackend()
    assert backend.launch(lambda own: own.memory_bytes()) <= peak
    compiled(torch.zeros(20))
    assert shapes[-1] == 20
    if sys.platform == "linux":
        assert backend.memory_bytes() < peak - (100 << 20)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    ],
)
def test_out_of_memory_has_one_sentence(error):
    with (
        pytest.raises(UserError, match="out of memory with 8 rows"),
        explain_out_of_memory("with 8 rows"),
    ):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape"), explain_out_of_memory("with 8 rows"):
        raise RuntimeError("a shape is wrong")


def test_a_model_that_is_too_large_is_named(text_corpus, run_training):
    with pytest.raises(UserError, match=r"out of memory.*hidden_size"):
        run_training(text_corpus, "large", "arch.expansion=1e12")


def test_an_evaluation_that_does_not_fit_names_its_own_key(text_corpus, run_training, monkeypatch):
    real = AthenaTRM.forward

    def forward(self, carry, batch):
        if not self.training:  # a fault of the device
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, carry, batch)

    monkeypatch.setattr(AthenaTRM, "forward", forward)
    with pytest.raises(UserError, match=r"eval_batch_size \(now 8\)"):
        run_training(text_corpus, "eval", "max_steps=1", "eval_batch_size=8")

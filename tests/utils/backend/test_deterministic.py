"""deterministic=true on CUDA, as far as it goes without a card: what torch is asked for, and that
nothing in Athena runs an operation for which torch has no deterministic kernel there."""

import os

import pytest
import torch
from host_waits import HostWaits
from training_tools import IDENTIFIERS, make_config

from evaluators.guard import Guarded
from models.backbone import Backbone
from pretrain import train
from utils.backend.cpu import CPUBackend
from utils.backend.cuda import CUDABackend
from utils.core.errors import UserError

# Of the list in torch.use_deterministic_algorithms: those that raise on CUDA, as ATen calls them.
RAISING = frozenset(
    "avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward "
    "adaptive_max_pool2d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward "
    "max_unpool2d max_unpool3d upsample_linear1d_backward upsample_bilinear2d_backward "
    "upsample_bicubic2d_backward upsample_trilinear3d_backward reflection_pad1d_backward "
    "reflection_pad2d_backward reflection_pad3d_backward nll_loss2d_forward _ctc_loss_backward "
    "_embedding_bag_dense_backward put_ histc bincount median grid_sampler_2d_backward "
    "grid_sampler_3d_backward cumsum scatter_reduce scatter_reduce_ kthvalue".split()
)


class AsOnCUDA(CPUBackend):
    """A CPU that is as strict as the CUDA backend makes torch."""

    set_deterministic = CUDABackend.set_deterministic


@pytest.fixture(autouse=True)
def flags(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def config(text_corpus, tmp_path):
    return make_config(
        text_corpus, f"checkpoint_path={tmp_path}", "run_name=x", "max_steps=2", *IDENTIFIERS,
        "arch.loss.loss_type=stablemax_cross_entropy", "arch.document_mask=false",
        "arch.post_refinement_steps=1", "eval_max_batches=1",
    )  # fmt: skip


def test_a_run_uses_deterministic_operations_alone(config, monkeypatch):
    """warn_only would let flash, memory-efficient and cuDNN attention add in any order."""
    asked = set()
    real = Backbone.embed

    def embed(self, data):
        asked.add((torch.are_deterministic_algorithms_enabled(),
                   torch.is_deterministic_algorithms_warn_only_enabled()))  # fmt: skip
        return real(self, data)

    monkeypatch.setattr(Backbone, "embed", embed)
    with HostWaits() as waits:
        assert train(AsOnCUDA(), config) == 0
    assert asked == {(True, False)}
    assert "embedding_dense_backward" in waits.operations
    assert waits.operations & RAISING == set()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_an_operation_without_such_a_kernel_is_named_with_the_way_out(config, monkeypatch):
    real = Backbone.embed
    monkeypatch.setattr(Backbone, "embed", lambda self, data: real(self, data) + changed(3).sum())
    with pytest.raises(UserError) as raised:
        train(AsOnCUDA(), config)
    assert "put_" in str(raised.value) and "deterministic=false" in str(raised.value)
    config.deterministic = False
    assert train(AsOnCUDA(), config) == 0


def changed(size: int) -> torch.Tensor:
    """A tensor made by an operation that torch refuses on every device."""
    return torch.zeros(size).put_(torch.tensor([0]), torch.zeros(1))


def test_evaluators_may_use_any_operation():
    """Nothing that is trained depends on what they compute."""

    class Counts:
        required_outputs = ()

        def begin_eval(self) -> None:
            self.total = torch.zeros(())

        def update_batch(self, batch, preds) -> None:
            self.total += changed(4).sum() + 1

        def result(self, save_path, rank, world_size, group):
            return {"counted": float(self.total + changed(2).sum())}

    backend = AsOnCUDA()
    backend.set_deterministic(True)
    guarded = Guarded([Counts()], backend)
    guarded.begin()
    guarded.update({}, {})
    assert guarded.results(None) == {"counted": 1.0}
    assert torch.are_deterministic_algorithms_enabled()

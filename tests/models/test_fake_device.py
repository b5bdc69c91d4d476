"""Steps on tensors without content, on a device that is not the host: no tensor stays behind.

Fake tensors know shape, dtype and device. An operation on two devices raises, and so does one that
needs a value on the host, where a GPU would be waited for.
"""

import pytest
import torch
from fake_tools import PRESETS, batch, config_of, model_of
from torch._subclasses.fake_tensor import FakeTensorMode

from evaluators.loop import SetFigures, run_batch
from models.losses import ACTLossHead
from utils.backend.cpu import CPUBackend
from utils.config.schema import PretrainConfig
from utils.training.state import create_train_state

DEVICE = torch.device("meta")


class FakeDevice(CPUBackend):
    def __init__(self):
        super().__init__()
        self.device = DEVICE


def take_steps(config: PretrainConfig) -> None:
    """Two ACT steps with their backward passes, and an update of all weights."""
    mode = FakeTensorMode()
    head = model_of(config, mode, DEVICE).train()
    with mode:
        train_two_steps(config, head)


def train_two_steps(config: PretrainConfig, head: ACTLossHead) -> None:
    state = create_train_state(config, head, backend=FakeDevice())
    carry = head.initial_carry(batch(DEVICE))
    for _ in range(2):
        carry, loss, metrics, *_ = head(return_keys=(), carry=carry, batch=batch(DEVICE))
        loss.backward()
        assert {loss.device.type, *(m.device.type for pair in metrics.values() for m in pair)} == {
            "meta"
        }
    assert state.clip_gradients(1.0).device == DEVICE
    for optimizer in state.main_optimizers:  # identifiers ask the host which of them occur
        optimizer.step()
    if state.ema is not None:
        state.ema.update()
    assert all(p.grad.device == DEVICE for p in state.parameters if p.grad is not None)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_training_step_leaves_nothing_on_the_host(preset):
    extra = [] if preset == "transformer" else ["arch.post_refinement_train=true"]
    take_steps(config_of(preset, "optimizer=adamw", *extra))


@pytest.mark.parametrize("optimizer", ["adam_atan2", "adamw", "muon"])
def test_every_optimizer_updates_on_the_device(optimizer):
    take_steps(config_of("athena_trm_tiny", f"optimizer={optimizer}"))


@pytest.mark.parametrize(
    "options",
    [
        ["arch.no_ACT_continue=false", "arch.pos_encodings=learned"],
        ["arch.loss.loss_type=softmax_cross_entropy", "arch.loss.halt_target=plateau"],
        ["arch.use_gradient_checkpointing=true", "arch.norm_type=pre", "arch.tie_embeddings=true"],
        ["arch.mlp_t=true", "arch.causal=false", "arch.document_mask=false"],
        ["arch.enable_reasoning_stream=true", "arch.loss.label_smoothing=0.1"],
    ],
    ids=lambda options: options[0],
)
def test_options_leave_nothing_on_the_host(options):
    take_steps(config_of("athena_trm_tiny", "optimizer=adamw", *options))


@pytest.mark.parametrize("kernel", ["dense", "flex"])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_evaluation_leaves_nothing_on_the_host(preset, kernel):
    """Refinement is left out: whether a row has halted is a question that the host waits for."""
    extra = [] if preset == "transformer" else ["arch.post_refinement_steps=0"]
    mode = FakeTensorMode()
    head = model_of(config_of(preset, *extra), mode, DEVICE).eval()
    with mode:
        evaluate(head, kernel)


def evaluate(head: ACTLossHead, kernel: str) -> None:
    if kernel == "flex":  # which cannot run here, but its mask is made
        head.model.inner.masked_attention = kernel
        if head.model.config.document_mask:
            info = head.model.inner.sequence_info(batch(DEVICE))
            assert info.mask.kv_indices.device == info.mask.full_q_num_blocks.device == DEVICE
        return
    steps = head.model.eval_depth()
    figures = SetFigures(steps, DEVICE, head.model.config.dtype)
    keys = {"row_nll_by_step", "z_H_change_by_step", "q_halt_logits", "preds"}
    found = run_batch(head, batch(DEVICE), keys, steps, figures, lambda: None)
    assert {value.device.type for value in found.values()} == {"meta"}


def test_a_tensor_that_stays_on_the_host_is_found(monkeypatch):
    """What these tests are for."""
    from models.recursive_reasoning import athena_trm

    def mean_over(z, mask):
        return z.mean(1) * torch.ones(z.shape[-1])

    monkeypatch.setattr(athena_trm, "mean_over", mean_over)
    # which devices; how the sentence names them differs between versions of torch
    with pytest.raises(Exception, match=r"\bmeta\b.*\bcpu\b"):
        take_steps(config_of("athena_trm_tiny", "optimizer=adamw"))

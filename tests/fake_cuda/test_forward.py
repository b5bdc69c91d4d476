"""Forward passes on fake CUDA tensors: what a card would be asked, and that nothing stays behind.

Fake tensors know shape, dtype and device. Backward passes ask for a driver even so; with them,
tests/models/test_fake_device.py does the same on another device.
"""

import pytest
import torch
from fake_tools import LENGTH, PRESETS, ROWS, batch, config_of, model_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from models.losses import ACTLossHead

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten


class WithoutDriver(TorchFunctionMode):
    """Calls operations in place of `x[...]` and `~x`, which ask the driver for the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            return part_of(*args)
        if function is torch.Tensor.__invert__:
            return aten.bitwise_not(*args)
        return function(*args, **(kwargs or {}))


def part_of(x: torch.Tensor, key) -> torch.Tensor:
    """`x[key]` of slices, numbers, None and tensors."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in (k for k in keys if not isinstance(k, torch.Tensor)):
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        known = sum(k is not None for k in keys) - 1
        keys[at : at + 1] = [slice(None)] * (x.ndim - known)
    axis, tensors = 0, []
    for k in keys:
        if k is None:
            x = aten.unsqueeze(x, axis)
        elif isinstance(k, slice):
            x = aten.slice(x, axis, k.start, k.stop, k.step or 1)
        elif isinstance(k, int):
            x = aten.select(x, axis, k)
            continue
        else:
            tensors += [None] * (axis - len(tensors)) + [k]
        axis += 1
    return aten.index(x, tensors) if tensors else x


def test_parts_are_those_of_plain_indexing():
    x, rows = torch.arange(120).view(2, 3, 4, 5), torch.tensor([1, 0, 1])
    every = slice(None)
    keys = [0, -1, slice(1, None), (every, 2), (..., 3), (None, slice(0, 1)), (every, None, 1)]
    for key in [*keys, rows, (rows, torch.tensor([0, 2, 1])), (every, rows)]:
        assert torch.equal(part_of(x, key), x[key]), key


def two_steps(head: ACTLossHead) -> None:
    carry = head.initial_carry(batch(CUDA))
    for keys in (("preds", "token_nll"), ("preds", "token_nll", "logits")):  # fused or not
        carry, loss, metrics, found, done = head(return_keys=keys, carry=carry, batch=batch(CUDA))
        sums = {f"{name} {i}": t for name, pair in metrics.items() for i, t in enumerate(pair)}
        tensors = {"loss": loss, "all halted": done, **sums, **found}
        assert {name for name, t in tensors.items() if t.device != CUDA} == set()
        assert found["preds"].shape == (ROWS, LENGTH)
    assert {z.device for z in (*carry.latents.values(), carry.halted)} == {CUDA}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_forward_pass_leaves_nothing_on_the_host(preset, training):
    extra = [] if preset == "transformer" else ["arch.post_refinement_steps=0"]
    mode = FakeTensorMode()
    head = model_of(config_of(preset, *extra), mode, CUDA).train(training)
    head.model.inner.masked_attention = "dense"  # flex attention is compiled, for a real card
    with mode, torch.no_grad(), WithoutDriver(), sdpa_kernel(SDPBackend.MATH):
        two_steps(head)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_block_mask_is_made_on_the_card(preset):
    mode = FakeTensorMode()
    head = model_of(config_of(preset), mode, CUDA)
    if not head.model.config.document_mask:
        pytest.skip("it masks no documents")
    with mode, torch.no_grad(), WithoutDriver():
        mask = head.model.inner.sequence_info(batch(CUDA)).mask
    assert mask.kv_indices.device == mask.full_q_num_blocks.device == CUDA

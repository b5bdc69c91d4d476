"""Count a model's parameters, and its FLOPs by tracing, before it runs.

FLOPs are those of matrix products and attention as `utils.backend.tracing` counts them. Attention
counts the pairs of positions that a causal mask allows, ignoring document boundaries. Nothing here
depends on the architecture: every operation of a step or an answer is counted.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from models import position_swiglu, swiglu
from models.backbone import Backbone
from models.base import Architecture, Carry, OptionsKey
from models.block_checks import checked_norms
from models.flex import Kernel
from models.losses import ACTLossHead
from models.sparse_embedding import sparse_embeddings
from utils.backend.tracing import Tracer, count_attention, count_scratch


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements. core: all parameters but embedding tables and the output head.
    identifiers: those of the identifier embedding, which has its own optimizer."""

    core: int
    embeddings: int
    head: int
    identifiers: int
    buffers: int

    @property
    def total(self) -> int:
        return self.core + self.embeddings + self.head


@dataclass(frozen=True)
class Cost:
    """The cost of a training step of one row (`seq_len` tokens and a prefix).

    Attributes:
        passes: blocks run in the forward pass.
        gradient_passes: the passes with gradient.
        max_steps: maximum number of training steps of a row.
        row_train_flops: forward and backward pass, including the losses.
        row_recomputed_flops: FLOPs that gradient checkpointing repeats; not included in
        row_train_flops.
    """

    parameters: Parameters
    passes: float
    gradient_passes: float
    max_steps: int
    seq_len: int
    row_train_flops: float
    row_recomputed_flops: float

    @property
    def train_flops(self) -> float:
        """Return the FLOPs of a training step per token."""
        return self.row_train_flops / self.seq_len


count_attention(torch.ops.athena.span_attention, 2, 0, 1, 5)
count_attention(torch.ops.athena.span_attention_backward, 5, 1, 2, 6)
count_scratch(torch.ops.athena.swiglu, swiglu.forward_scratch_bytes)
count_scratch(torch.ops.athena.swiglu_backward, swiglu.backward_scratch_bytes)
count_scratch(torch.ops.athena.position_swiglu, position_swiglu.forward_scratch_bytes)
count_scratch(torch.ops.athena.position_swiglu_backward, position_swiglu.backward_scratch_bytes)


@register_flop_formula(torch.ops.athena.swiglu)
def _swiglu_flops(x, gate_up, down, *_, **__) -> int:
    return 6 * math.prod(x[:-1]) * math.prod(down)


@register_flop_formula(torch.ops.athena.swiglu_backward)
def _swiglu_backward_flops(grad, x, joint, gate_up, down, packed, of_weights, **_) -> int:
    return (12 if of_weights else 6) * math.prod(x[:-1]) * math.prod(down)


@register_flop_formula(torch.ops.athena.position_swiglu)
def _position_swiglu_flops(x, gate_up, down, **_) -> int:
    return 6 * x[0] * x[2] * math.prod(down)


@register_flop_formula(torch.ops.athena.position_swiglu_backward)
def _position_swiglu_backward_flops(grad, x, gate_up, down, of_weights, **_) -> int:
    """Leave out the product that it computes again: what is recomputed is no part of MFU."""
    return (12 if of_weights else 6) * x[0] * x[2] * math.prod(down)


COUNTS = ("passes", "gradient_passes", "row_train_flops", "row_recomputed_flops")


def count_parameters(model: Architecture) -> Parameters:
    """Count the parameters of a model on any device."""
    tables = model.embeddings()
    embeddings = sum(p.numel() for name, p in model.named_parameters() if name in tables)
    head = _elements([model.inner.lm_head]) if hasattr(model.inner, "lm_head") else 0
    identifiers = sum(embedding.weights.numel() for embedding in sparse_embeddings(model))
    return Parameters(
        core=_elements([model]) - embeddings - head,
        embeddings=embeddings,
        head=head,
        identifiers=identifiers,
        buffers=sum(b.numel() for b in model.buffers()) - identifiers,
    )


def _elements(modules: Sequence[nn.Module]) -> int:
    return sum({p: p.numel() for module in modules for p in module.parameters()}.values())


def measure(head: ACTLossHead) -> dict[OptionsKey, Cost]:
    """Count the cost of a training step for each set of step options. The model's tensors, which
    may be on the meta device, become fake, so it must not be used for anything else.

    Raises Untraceable if a shape depends on values.
    """
    with trace(head) as tracer:
        batch = make_fake_batch(head.model, rows=1, widths=further_widths(head))
        carry = head.initial_carry(batch)
        return {
            options: take_step(tracer, head, carry, batch, options)
            for options in head.model.option_sets()
        }


def measure_mean(head: ACTLossHead) -> Cost:
    """Count the mean cost of a run's steps; see `measure`."""
    return mean_cost(head.model, measure(head))


def mean_cost(model: Architecture, costs: Mapping[OptionsKey, Cost]) -> Cost:
    """Return the mean cost over a run, weighted by each option set's share of the steps."""
    shares = model.option_sets()

    def mean(name: str) -> float:
        return sum(share * getattr(costs[options], name) for options, share in shares.items())

    one = next(iter(costs.values()))
    means: dict[str, Any] = {name: mean(name) for name in COUNTS}
    return replace(one, **means) if len(costs) > 1 else one


def take_step(
    tracer: Tracer,
    head: ACTLossHead,
    carry: Carry,
    batch: dict[str, Tensor],
    options: OptionsKey = (),
) -> Cost:
    """Trace a training step, forward and backward, and return its cost."""
    flops, recomputed, rows = tracer.flops, tracer.recomputed, len(batch["inputs"])
    plain, graded = tracer.passes
    carry, loss, *_ = head.train()(return_keys=(), carry=carry, batch=batch, **dict(options))
    tracer.backward(loss)
    graded = tracer.passes[1] - graded
    return Cost(
        parameters=count_parameters(head.model),
        passes=tracer.passes[0] - plain + graded,
        gradient_passes=graded,
        max_steps=head.model.max_steps,
        seq_len=head.model.config.seq_len,
        row_train_flops=(tracer.flops - flops) // rows,
        row_recomputed_flops=(tracer.recomputed - recomputed) // rows,
    )


def evaluation_flops(model: Architecture, depth: int | None = None) -> float:
    """Return the FLOPs of an answer and its logits per token.

    model: as in `measure`. depth: None for that of an evaluation.
    """
    inner: Any = model.inner
    depth = model.eval_depth() if depth is None else depth
    with trace(model.eval()) as tracer, torch.no_grad():
        batch = make_fake_batch(model, rows=1)
        inner.logits(inner.answer(inner.embed(batch), inner.sequence_info(batch), depth))
    return tracer.flops / model.config.seq_len


@contextmanager
def trace(module: Architecture | ACTLossHead, kernel: Kernel = "unmasked") -> Iterator[Tracer]:
    """Trace the operations run in the `with` block. The tensors of `module`, a model or its loss
    head, become fake. kernel: the attention kernel under a document mask.
    """
    frozen = module.frozen_models() if isinstance(module, ACTLossHead) else []
    model: Architecture = module.model if isinstance(module, ACTLossHead) else module
    models: list[Any] = [model, *frozen]
    tracer = Tracer(causal=model.config.causal)
    with tracer:
        for one in models:
            tracer.place(one)
            if isinstance(one.inner, Backbone):
                one.inner.masked_attention = kernel
        with tracer.watch(model.inner, model.blocks()), checked_norms(model):
            yield tracer


def make_batch(
    model: Architecture, rows: int, *, documents: bool = True, widths: Mapping[str, int] = {}
) -> dict[str, np.ndarray]:
    """Return a training batch of zeros, on the host.

    documents: whether rows hold several documents. widths: row widths of additional arrays, by
    name.
    """
    length = model.config.seq_len
    tokens = ["inputs", "labels", *(["document_starts"] if documents else [])]
    numbers = dict.fromkeys(tokens, length) | dict(widths)
    batch: dict[str, np.ndarray] = {
        name: np.zeros((rows, width), np.int32) for name, width in numbers.items()
    }
    for name in ("puzzle_identifiers", "iteration_targets"):
        batch[name] = np.zeros(rows, np.int32)
    return batch | model.row_options(0.0, np.random.default_rng(0), rows)


def further_widths(head: ACTLossHead) -> dict[str, int]:
    """Return the additional arrays that the loss terms need, with their row widths."""
    return {name: head.model.config.seq_len for term in head.terms for name in term.needs_data}


def make_fake_batch(model: Architecture, rows: int, **kinds: Any) -> dict[str, Tensor]:
    """Return the result of `make_batch` as tensors, which are fake inside a trace."""
    batch = make_batch(model, rows, **kinds)
    return {name: torch.from_numpy(array).clone() for name, array in batch.items()}

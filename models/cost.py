"""What a model costs before it runs: parameters, and FLOPs by tracing.

FLOPs are those of matrix products and attention as `utils.backend.tracing` counts them. Attention
counts the pairs of positions that a causal mask leaves; borders of documents are not subtracted.
Nothing here knows an architecture: whatever a step or an answer runs is counted.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.base import Architecture, Carry
from models.flex import Kernel
from models.layers import CastedEmbedding
from models.losses import ACTLossHead
from models.sparse_embedding import sparse_embeddings
from utils.backend.tracing import Tracer


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements. core: all parameters but embedding tables and the output head.
    identifiers: of the identifier embedding, which has an optimizer of its own."""

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
    """What a training step of one row (`seq_len` tokens and a prefix) costs.

    Attributes:
        passes: blocks run in the forward pass.
        gradient_passes: those of them that carry gradient.
        max_steps: training steps that a row takes at most.
        row_train_flops: forward and backward, with what the losses run.
        row_recomputed_flops: what gradient checkpointing repeats; no part of the former.
    """

    parameters: Parameters
    passes: int
    gradient_passes: int
    max_steps: int
    seq_len: int
    row_train_flops: int
    row_recomputed_flops: int

    @property
    def train_flops(self) -> float:
        """Return the FLOPs of a training step for each token."""
        return self.row_train_flops / self.seq_len


def count_parameters(model: Architecture) -> Parameters:
    """Count the parameters of a model on any device."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | CastedEmbedding)]
    embeddings = _elements(tables)
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


def measure(head: ACTLossHead) -> Cost:
    """Count a training step of a model that nothing else uses: its tensors, which may lie on the
    meta device, become fake.

    Raises Untraceable where a shape depends on values.
    """
    with trace(head) as tracer:
        batch = make_batch(config_of(head), rows=1)
        return take_step(tracer, head, head.initial_carry(batch), batch)[0]


def take_step(
    tracer: Tracer, head: ACTLossHead, carry: Carry, batch: dict[str, Tensor]
) -> tuple[Cost, Carry]:
    """Trace a training step, forward and backward; return what it costs, and the new carry."""
    before, rows = tracer.flops, len(batch["inputs"])
    carry, loss, *_ = head.train()(return_keys=(), carry=carry, batch=batch)
    tracer.backward(loss)
    counted = Cost(
        parameters=count_parameters(head.model),
        passes=sum(tracer.passes),
        gradient_passes=tracer.passes[1],
        max_steps=head.model.max_steps,
        seq_len=config_of(head).seq_len,
        row_train_flops=(tracer.flops - before) // rows,
        row_recomputed_flops=tracer.recomputed // rows,
    )
    return counted, carry


def evaluation_flops(model: Architecture, depth: int | None = None) -> float:
    """Return the FLOPs of an answer and its logits for each token.

    model: as in `measure`. depth: None: that of an evaluation.
    """
    inner: Any = model.inner
    depth = model.eval_steps if depth is None else depth
    with trace(model.eval()) as tracer, torch.no_grad():
        batch = make_batch(model.config, rows=1)
        inner.logits(inner.answer(inner.embed(batch), inner.sequence_info(batch), depth))
    return tracer.flops / model.config.seq_len


@contextmanager
def trace(module: nn.Module, kernel: Kernel = "unmasked") -> Iterator[Tracer]:
    """Trace what runs inside the block. The tensors of `module`, a model or its loss head, become
    fake. kernel: of attention under a document mask."""
    model: Any = getattr(module, "model", module)
    anchor = getattr(module, "anchor", None)
    tracer = Tracer(causal=config_of(model).causal)
    models = [model] if anchor is None else [model, anchor.model]
    with tracer:
        for one in models:
            tracer.place(one)
            if isinstance(one.inner, Backbone):
                one.inner.masked_attention = kernel
        with tracer.watch(model.inner, model.blocks()):
            yield tracer


def config_of(model: nn.Module) -> Any:
    """Return the options of an architecture, which may be in its loss head."""
    return getattr(model, "model", model).config


def make_batch(config: Any, rows: int, **kinds: Any) -> dict[str, Tensor]:
    """Return a training batch of zeros. kinds: as in `batch_shapes`."""
    shapes = batch_shapes(config, rows, **kinds)
    return {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}


def batch_shapes(
    config: Any, rows: int, *, documents: bool = True, reasoning_width: int = 0
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a training batch's arrays, which are int32.

    documents: rows hold several documents. reasoning_width: labels of a row's reasoning stream.
    """
    tokens = ["inputs", "labels", *(["document_starts"] if documents else [])]
    numbers = ["puzzle_identifiers", "iteration_targets", "explore"]
    shapes: dict[str, tuple[int, ...]] = {name: (rows, config.seq_len) for name in tokens}
    shapes |= {name: (rows,) for name in numbers}
    return shapes | ({"reasoning_labels": (rows, reasoning_width)} if reasoning_width else {})

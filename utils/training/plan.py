"""Estimate the memory of a training step by tracing it on fake tensors, and the rows that fit."""

import warnings
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset.common import DatasetMetadata
from models.base import OptionsKey
from models.build import create_model
from models.cost import (
    Cost,
    further_widths,
    make_batch,
    make_fake_batch,
    mean_cost,
    measure,
    take_step,
    trace,
)
from models.flex import Kernel, attention_kernel
from models.inference.loading import build_base, cast_weights, fix_depth
from models.losses import ACTLossHead
from utils.backend.tracing import Replica, Untraceable
from utils.checkpoint.format import Checkpoint, checkpoint_in
from utils.config.schema import ArchConfig, PretrainConfig
from utils.core.errors import UserError
from utils.corpus.data import Data, open_data
from utils.training.state import TrainState, create_train_state, set_fast_paths

FILLED = 0.8
"""Share of the free memory that a plan may use; the rest is for the allocator and the kernels."""


def build_untrained(arch: ArchConfig, metadata: DatasetMetadata) -> ACTLossHead:
    """Build the model of a run on the meta device, and the bases of its loss terms.

    A base whose checkpoint cannot be read is assumed to have the run's own architecture.
    """

    def load_base(key: str, path: str, which: str) -> ACTLossHead:
        try:
            base = build_base(Checkpoint(checkpoint_in(Path(path))), metadata, device="meta")
        except UserError:
            whole = arch.model_dump()
            fixed = fix_depth(whole, None, refinement=0)
            base = create_model(
                ArchConfig.model_validate(whole | fixed), metadata, batch_size=1, device="meta"
            )
        cast_weights(base)
        return base

    with torch.random.fork_rng(devices=[]):
        head = create_model(arch, metadata, batch_size=1, device="meta")
        head.prepare(load_base)
    return head


def count_train_flops(arch: ArchConfig, metadata: DatasetMetadata) -> dict[OptionsKey, float]:
    """Return the FLOPs of a training step per token, by step options; {} with a warning if they
    cannot be counted.
    """
    try:
        return _train_flops(arch.model_dump_json(), metadata.model_dump_json())
    except Untraceable as error:
        warnings.warn(f"FLOPs are logged as 0: {error}", stacklevel=2)
        return {}


@lru_cache(maxsize=32)
def _train_flops(arch: str, metadata: str) -> dict[OptionsKey, float]:
    """Count from JSON strings, which can be cached, because runs of a sweep often share a model."""
    head = build_untrained(
        ArchConfig.model_validate_json(arch), DatasetMetadata.model_validate_json(metadata)
    )
    return {options: cost.train_flops for options, cost in measure(head).items()}


def plan_metadata(config: PretrainConfig) -> tuple[DatasetMetadata, Data | None]:
    """Return the sizes of a run's data and its corpora, if there are any; otherwise the sizes in
    the config, with several documents per row.
    """
    if config.data_paths:
        data = open_data(config)
        return data.train.metadata, data
    metadata = DatasetMetadata(
        pad_id=0, ignore_label_id=None, eos_id=0, vocab_size=config.vocab_size or 1,
        seq_len=config.seq_len or 1, num_puzzle_identifiers=1, total_groups=0,
        mean_puzzle_examples=1, total_puzzles=0,
    )  # fmt: skip
    return metadata, None


class MemoryPlan:
    """Memory of one of `ranks` replicas of a run, in bytes, and the cost of a step.

    A step is traced as it runs without a compiler; a compiled model needs less memory, and the
    memory used by PyTorch/XLA is unknown. The first call for each number of rows takes up to a
    second.

    Args:
        metadata: of the data; rows hold several documents if it has an eos id.
        device: type of the device, e.g. `cuda`.
        kernel: of attention under a document mask; None: the usual one on the device.
        reasoning_width: number of reasoning labels per row.
    """

    def __init__(
        self,
        config: PretrainConfig,
        metadata: DatasetMetadata,
        *,
        ranks: int = 1,
        device: str,
        kernel: Kernel | None = None,
        reasoning_width: int = 0,
    ):
        self.config, self.ranks, self.device = config, ranks, device
        self.rows = config.rows_per_rank(ranks)
        self.head = build_untrained(config.arch, metadata)
        self._kinds: dict[str, Any] = {
            "documents": metadata.eos_id is not None,
            "widths": further_widths(self.head)
            | ({"reasoning_labels": reasoning_width} if reasoning_width else {}),
        }
        arch = self.head.model.config
        fast = set_fast_paths(config, self.head, device)
        self.head.device_type = device
        kernel = kernel or attention_kernel(device, arch.dtype, arch.head_size).kernel
        if kernel == "blocks" and "attention" not in fast:
            kernel = "dense"
        self.kernel: Kernel = "unmasked" if kernel == "flex" else kernel
        self._costs: dict[OptionsKey, Cost] = {}
        self._traced: dict[int, tuple[dict[str, int], Cost]] = {}

    @property
    def cost(self) -> Cost:
        """Parameters and FLOPs."""
        if not self._traced:
            self.parts(1)
        return next(counted for _, counted in self._traced.values())

    def parts(self, micro_rows: int) -> dict[str, int]:
        """Return the peak memory of a training step with this many rows at once, by part.

        `activations` includes all temporaries, minus the gradients that are not yet allocated at
        the peak. `base`: the models that loss terms compare with.
        """
        if micro_rows not in self._traced:
            self._traced[micro_rows] = self._trace(micro_rows)
        return self._traced[micro_rows][0]

    def total(self, micro_rows: int) -> int:
        """Return the sum of `parts`."""
        return sum(self.parts(micro_rows).values())

    def fits(self, micro_rows: int, free: int) -> bool:
        """Return whether a step takes less than `FILLED` of `free` bytes."""
        return self.total(micro_rows) < FILLED * free

    def fitting_rows(self, free: int) -> int:
        """Return the largest divisor of a rank's rows that fits in memory at once; 1 if none
        does.
        """
        sizes = [n for n in range(1, self.rows + 1) if self.rows % n == 0]
        if len(sizes) == 1 or not self.fits(1, free):
            return 1
        # n rows at once take at most n times the memory of one, which needs no trace
        sure = sum(n * self.total(1) < FILLED * free for n in sizes)
        low, high = max(0, sure - 1), len(sizes)  # sizes[low] fits, sizes[high] does not
        tried = 1
        while high - low > 1:
            # interpolate up to the limit, because memory grows nearly linearly
            one, other = self.total(sizes[0]), self.total(sizes[tried])
            growth = max(1, (other - one) / (sizes[tried] - sizes[0]))
            room = sizes[0] + (FILLED * free - one) / growth
            place = sum(n < room for n in sizes) - 1
            tried = min(max(place, low + 1), high - 1)
            if self.fits(sizes[tried], free):
                low = tried
            else:
                high = tried
        return sizes[low]

    @property
    def largest_options(self) -> dict[str, int]:
        """Return the step options of the most expensive step."""
        flops = [(cost.row_train_flops, options) for options, cost in self._costs.items()]
        return dict(max(flops)[1])

    def make_batch(self, micro_rows: int) -> dict[str, np.ndarray]:
        """Return a micro-batch of zeros, on the host."""
        return make_batch(self.head.model, micro_rows, **self._kinds)

    def checkpoint_bytes(self) -> int:
        """Return the size of a checkpoint on disk in bytes, including the rows in progress of all
        ranks.
        """
        parts, wide = self.parts(1), self.config.parallel == "fsdp"
        saved = _bytes([*self.head.parameters(), *self.head.buffers()])
        saved += (parts["optimizer"] + parts["ema"]) * (self.ranks if wide else 1)
        return saved + (parts["carry"] * self.ranks if self.config.checkpoint_carry else 0)

    def _trace(self, micro_rows: int) -> tuple[dict[str, int], Cost]:
        head, share = self.head, self.rows // micro_rows
        sharded = self.ranks if self.config.parallel == "fsdp" else 1
        with trace(head, self.kernel) as tracer:
            state = self._create_state()
            gradients = _bytes(p.grad for p in state.parameters)
            # later micro-batches run next to the gradients of earlier ones, and DDP's buckets
            absent = gradients if self.ranks == share == 1 else 0
            if absent:
                state.drop_gradients()
            batch = make_fake_batch(head.model, micro_rows, **self._kinds)
            carry = head.initial_carry(batch)
            saved = head.saved_memory(carry)
            of_base = _bytes(v for name, v in carry.memory.items() if name not in saved)
            rows = _bytes(saved.values()) + _bytes(carry.latents.values())
            rows += 2 * _bytes(
                carry.current_data.values()
            )  # the rows in progress and the new batch
            lasting = tracer.live + absent
            tracer.start_peak()
            costs = self._costs
            for options in head.model.option_sets():
                if absent:
                    state.drop_gradients()
                costs[options] = take_step(tracer, head, carry, batch, options)
            counted = mean_cost(head.model, costs)
            step, there = tracer.peak - lasting, tracer.live
            tracer.start_peak()
            state.clip_gradients(self.config.grad_clip_norm)
            state.update(1.0)
            update = there - lasting + (tracer.peak - there) // sharded
            moments = (v for o in state.optimizers for s in o.state.values() for v in s.values())
            optimizer = _bytes(value for value in moments if isinstance(value, Tensor))
            averages = _bytes(state.ema.shadow.values()) if state.ema else 0
            state.drop_gradients()
        weights = _bytes(head.parameters())
        parts = {
            # FSDP keeps a shard, and whole weights and gradients during the backward pass
            "weights": weights + _bytes(head.buffers()) + (weights // sharded) * (sharded > 1),
            "gradients": gradients,
            "optimizer": optimizer // sharded,
            "ema": averages // sharded,
            "carry": rows * share,
            "activations": max(step, update),
        }
        if bases := head.frozen_models():
            held = [t for base in bases for t in (*base.parameters(), *base.buffers())]
            parts["base"] = _bytes(held) + of_base * share
        return parts, counted

    def _create_state(self) -> TrainState:
        """Create a state after one step, with gradients, moments and averages."""
        named = self.config.optimizer
        if named.options.get("fused"):  # a device kernel, which fake tensors do not support
            named = named.model_copy(update={"fused": False})
        whole = self.config.model_copy(update={"parallel": "ddp", "optimizer": named})
        state = create_train_state(whole, self.head, backend=Replica())
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                if group.get("foreach", True) is None:  # on CUDA all weights are updated together
                    group["foreach"] = self.device == "cuda"
        for parameter in state.parameters:
            parameter.grad = torch.zeros_like(parameter)
        state.update(1.0)
        return state


def count_present_bytes(head: ACTLossHead, device: str) -> int:
    """Return the bytes on `device` of an existing model and of the bases of its loss terms."""
    modules: list[nn.Module] = [head, *head.frozen_models()]
    tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return sum(t.nbytes for t in tensors if t.device.type == device)


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the total bytes of the tensors' storages, counting each once."""
    storages = {t.untyped_storage() for t in tensors if t is not None}
    return sum(storage.nbytes() for storage in storages)

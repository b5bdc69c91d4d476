"""Run a real training step on random tokens, and measure its time and memory."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from models.build import create_model
from models.cost import further_widths, make_batch
from models.inference.loading import cast_weights
from models.losses import ACTLossHead
from models.terms.kl_to_base import KLToBase
from utils.backend import Backend
from utils.config.load import PretrainConfig
from utils.core.errors import UserError
from utils.training.plan import plan_metadata
from utils.training.state import TrainState, choose_kernels, create_train_state


def make_step(
    config: PretrainConfig,
    backend: Backend,
    micro_rows: int | None = None,
    *,
    documents: bool = True,
    document_tokens: int | None = None,
) -> tuple[Callable[[], None], TrainState]:
    """Return a function that takes one optimizer step on random tokens, and the training state.

    documents: whether attention uses a document mask. document_tokens: mean length of the documents
    packed into a row; None: a row is one document.
    """
    backend.set_matmul_precision(config.matmul_precision)
    rows = config.global_batch_size
    sizes = {"vocab_size": config.vocab_size or 1024, "seq_len": config.seq_len or 256}
    metadata, _ = plan_metadata(config.model_copy(update={"data_paths": [], **sizes}))

    def build() -> ACTLossHead:
        model = create_model(config.arch, metadata, batch_size=rows, seed=config.seed)
        return model.to(backend.device)

    def load_base(*_: str) -> ACTLossHead:  # also with random weights
        base = build()
        cast_weights(base)
        return base

    model = build().train()
    model.prepare(load_base)
    choose_kernels(config, model, backend)
    state = create_train_state(config, model, backend=backend)
    micro_rows = micro_rows or rows
    host = make_batch(model.model, micro_rows, documents=documents, widths=further_widths(model))
    if documents and document_tokens is not None:
        host["document_starts"] = draw_starts(micro_rows, metadata.seq_len, document_tokens)
    tokens = torch.randint(
        metadata.vocab_size, (rows, metadata.seq_len), dtype=torch.int32, device=backend.device
    )
    batches = [
        backend.to_device(host) | {"inputs": part, "labels": part.clone()}
        for part in tokens.split(micro_rows)
    ]
    state.carries = [model.initial_carry(batch) for batch in batches]
    # approximately those of the most expensive step
    options = dict(max(model.model.option_sets(), key=lambda key: sum(n for _, n in key)))

    def step() -> None:
        moved = [{key: value.clone() for key, value in batch.items()} for batch in batches]
        for i, batch in enumerate(moved):  # new tensors, as in a stream
            carry, loss, *_ = model(return_keys=(), carry=state.carries[i], batch=batch, **options)
            state.carries[i] = carry
            (loss / rows).backward()
        state.clip_gradients(config.grad_clip_norm)
        state.update(1.0)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        loss.item()  # waits for the device

    return step, state


def draw_starts(rows: int, length: int, document_tokens: int) -> np.ndarray:
    """Draw rows of documents with `document_tokens` on average: for each position, the first
    position of its document, (rows, length).
    """
    begins = np.random.default_rng(0).random((rows, length)) < 1 / document_tokens
    return np.maximum.accumulate(np.where(begins, np.arange(length, dtype=np.int32), 0), axis=1)


def measure_step(
    config: PretrainConfig, micro_rows: int, backend: Backend
) -> tuple[dict[str, int], float]:
    """Measure the peak bytes of an optimizer step, by the parts of a `MemoryPlan`, and the seconds
    of another step. Tokens are random, according to `config.vocab_size` and `seq_len`.
    """
    step, state = make_step(config, backend, micro_rows)
    step()  # the optimizer allocates its moments
    parts, latents, data = count_held(state)
    peak = measure_step_peak(step, state, backend)
    begun = time.perf_counter()
    step()
    seconds = time.perf_counter() - begun
    # during a step rows exist twice, as rows in progress and as new rows
    gradients = sum(p.nbytes for p in state.parameters)
    found = parts | {"gradients": gradients, "carry": latents + 2 * data}
    return found | {"activations": peak - sum(found.values())}, seconds


def measure_step_peak(step: Callable[[], None], state: TrainState, backend: Backend) -> int:
    """Measure the peak bytes of an optimizer step, including weights and moments, after at least
    one step.
    """
    device = backend.device.type
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    if device != "cpu":
        raise UserError(
            f"memory cannot be measured on {device}; use device_type=cpu or device_type=cuda"
        )

    def two_steps() -> None:
        # The profiler misses the release of tensors allocated before it started; in the second
        # step it has seen every allocation.
        step()
        step()

    return sum(count_held(state)[0].values()) + measure_peak(two_steps)


def count_held(state: TrainState) -> tuple[dict[str, int], int, int]:
    """Return the bytes kept between steps, by part, the bytes of latents, and the bytes of rows'
    data.
    """
    moments = (v for o in state.optimizers for s in o.state.values() for v in s.values())
    parts = {
        "weights": _bytes([*state.model.parameters(), *state.model.buffers()]),
        "optimizer": _bytes(v for v in moments if isinstance(v, Tensor)),
        "ema": _bytes(state.ema.shadow.values()) if state.ema else 0,
    }
    latents = _bytes(z for carry in state.carries for z in carry.latents.values())
    data = _bytes(v for carry in state.carries for v in carry.current_data.values())
    for term in state.model.terms:
        if isinstance(term, KLToBase):
            own = [*term.base.parameters(), *term.base.buffers()]
            rows = (item for carry in state.carries for item in carry.memory.items())
            own += [value for name, value in rows if name.startswith(f"{term.name}/")]
            parts["base"] = _bytes(own)
    return parts, latents, data


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the total bytes of the tensors' storages, counting each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measure_peak(fn: Callable[[], Any]) -> int:
    """Return the peak bytes that `fn` allocates on the CPU, including temporaries of kernels."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    changes: list[tuple[int, int]] = []

    def collect(events: Iterable[Any]) -> None:
        for event in events:
            if event.tag == _EventType.Allocation:
                changes.append((event.start_time_ns, event.extra_fields.alloc_size))
            collect(event.children)

    results: Any = profiler.profiler
    collect(results.kineto_results.experimental_event_tree())
    changes.sort(key=lambda change: change[0])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most

"""What a real training step takes: the yardstick of `utils/training/plan.py`."""

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from models.anchor import PREFIX
from scripts.benchmark_train import make_step
from utils.backend import Backend
from utils.config.load import PretrainConfig
from utils.core.errors import UserError
from utils.training.state import TrainState


def measured_step(
    config: PretrainConfig, micro_rows: int, backend: Backend
) -> tuple[dict[str, int], float]:
    """Bytes of a real optimizer step at its worst moment, by the parts of a `MemoryPlan`,
    and the seconds of another step. Tokens are random, of `config.vocab_size` and `seq_len`."""
    device = backend.device.type
    if device not in ("cpu", "cuda"):
        raise UserError(
            f"memory cannot be measured on {device}; give device_type=cpu or device_type=cuda"
        )
    step, state = make_step(config, backend, micro_rows)
    step()  # the optimizer makes its moments
    parts, latents, data = held(state)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        # What was there before the watch began is not seen to go. So the second of two steps
        # tells: by then the rows that are held were made under watch, and nothing else changes.
        peak = sum(parts.values()) + highest(lambda: (step(), step()))
    begun = time.perf_counter()
    step()
    seconds = time.perf_counter() - begun
    # while a step runs its rows are there twice, as held and as newly come
    gradients = sum(p.nbytes for p in state.parameters)
    found = parts | {"gradients": gradients, "carry": latents + 2 * data}
    return found | {"activations": peak - sum(found.values())}, seconds


def held(state: TrainState) -> tuple[dict[str, int], int, int]:
    """Bytes that last from step to step; those of the latents; those of the held rows' data."""
    moments = (v for o in state.optimizers for s in o.state.values() for v in s.values())
    parts = {
        "weights": _bytes([*state.model.parameters(), *state.model.buffers()]),
        "optimizer": _bytes(v for v in moments if isinstance(v, Tensor)),
        "ema": _bytes(state.ema.shadow.values()) if state.ema else 0,
    }
    latents = _bytes(z for carry in state.carries for z in carry.latents.values())
    data = _bytes(v for carry in state.carries for v in carry.current_data.values())
    if (near := state.model.anchor) is not None:
        own = [*near.model.parameters(), *near.model.buffers()]
        held = (item for carry in state.carries for item in carry.memory.items())
        own += [value for name, value in held if name.startswith(PREFIX)]
        parts["base"] = _bytes(own)
    return parts, latents, data


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def highest(fn: Callable[[], Any]) -> int:
    """The most bytes that `fn` held at once on the CPU, kernels' own temporaries included."""
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

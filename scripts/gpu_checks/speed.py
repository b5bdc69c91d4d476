"""Measure the GPU, and how much of its speed training and generation reach."""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import profile, supported_activities

from models.inference.generation import Decoder
from scripts.benchmarks import efficiency, rounding
from scripts.gpu_checks.session import COMPILED, EAGER, Session
from scripts.training_step import make_step
from utils.config.load import PretrainConfig
from utils.monitoring.profiling import costliest
from utils.training.plan import MemoryPlan, plan_metadata

_TEXT = "global_batch_size=16 vocab_size=32000 seq_len=2048"
MODELS = {
    "trm": "arch=trm global_batch_size=768 vocab_size=11 seq_len=81",
    "athena_trm_medium": f"arch=athena_trm_medium {_TEXT}",
    "transformer": "arch=transformer arch.hidden_size=1024 arch.num_heads=16 arch.num_layers=12 "
    + _TEXT,
}
_SHALLOW = ["arch.H_cycles=2", "arch.L_cycles=2", "arch.L_layers=2"]
_TINY = "global_batch_size=2 vocab_size=50 seq_len=32 arch.hidden_size=32 arch.num_heads=2"


def median_seconds(session: Session, fn: Callable[[], Any], rounds: int = 5) -> float:
    """Return the median time of `fn`, after warm-up calls until the clocks have risen."""

    def once() -> float:
        begun = time.perf_counter()
        fn()
        if session.on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    warmed = once()
    while warmed < (0 if session.tiny else 0.3):
        warmed += once()
    return statistics.median(once() for _ in range(rounds))


def product_rate(session: Session, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the FLOP/s of a large matrix product."""
    n = 256 if session.tiny else 8192
    one, other = (torch.randn(n, n, device=session.backend.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median_seconds(session, lambda: one @ other)


def check_environment(session: Session) -> None:
    """Report versions, and the peak rates of the GPU."""
    with session.check("versions") as found:
        found.update(python=platform.python_version(), torch=torch.__version__)
        if session.on_cuda:
            found.update(device=torch.cuda.get_device_name(), cuda=torch.version.cuda)
            found.update(cudnn=torch.backends.cudnn.version())
            found.update(free_gb=session.backend.available_memory() / 1e9)
        found.update(date=time.strftime("%Y-%m-%d %H:%M"))
    with session.check("torch.compile") as found:
        reason = session.backend.cannot_compile()
        found.update(passed=reason is None, answer=reason or "works")
    kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32, "TF32": torch.float32}
    for name, dtype in kinds.items():
        with session.check(f"product in {name}") as found:
            torch.set_float32_matmul_precision("high" if name == "TF32" else "highest")
            found["tflop_a_second"] = product_rate(session, dtype) / 1e12
    with session.check("copy, read and written") as found:
        size = 2**20 if session.tiny else 2**31
        source = torch.zeros(size, dtype=torch.uint8, device=session.backend.device)
        target = torch.empty_like(source)
        found["tb_a_second"] = 2e-12 * size / median_seconds(session, lambda: target.copy_(source))


def check_speed(session: Session) -> None:
    """Report time, memory and most expensive kernels of a training step for three models."""
    session.backend.set_deterministic(True)  # as in a run, by default
    peak = product_rate(session)
    for model, options in MODELS.items():
        overrides = options.split()
        if session.tiny:
            overrides = [o for o in overrides if o.startswith("arch=")] + _TINY.split()
            overrides += [] if model == "transformer" else _SHALLOW
        for way, compiled in session.ways().items():
            session.backend.forget_earlier_runs()
            time_step(session, f"{model}, {way}", session.config(*overrides, *compiled), peak)


def time_step(session: Session, name: str, config: PretrainConfig, peak: float) -> None:
    """Measure a step's time and memory, and compare the memory with the estimate. peak: FLOP/s of a
    matrix product.
    """
    rows, backend = config.global_batch_size, session.backend
    with session.check(name) as found:
        begun = time.perf_counter()
        step, state = make_step(config, backend)
        step()
        found["build_and_first_step_s"] = time.perf_counter() - begun
        step()
        if session.on_cuda:  # the memory of compiling does not count
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(session, step, 3)
        kernel = state.model.model.inner.masked_attention
        metadata, _ = plan_metadata(config.model_copy(update={"data_paths": []}))
        plan = MemoryPlan(config, metadata, device=backend.device.type, kernel=kernel)
        rate = plan.cost.row_train_flops * rows / seconds
        found.update(ms=seconds * 1e3, tflop_a_second=rate / 1e12, of_measured_peak=rate / peak)
        if nominal := backend.peak_flops(torch.bfloat16):
            found["of_nominal_peak"] = rate / nominal
        if session.on_cuda:
            used = torch.cuda.max_memory_allocated()
            planned = plan.total(rows)
            # the planned memory must suffice
            found.update(passed=used < 1.05 * planned, gb=used / 1e9, estimated_gb=planned / 1e9)
        with profile(activities=supported_activities()) as profiler:
            step()
        found["text"] = costliest(profiler.key_averages(), 1)
        for parameter in state.parameters:
            parameter.grad = torch.zeros_like(parameter)
        found["clip_ms"] = 1e3 * median_seconds(session, lambda: state.clip_gradients(1.0), 3)
        found["optimizer_and_ema_ms"] = 1e3 * median_seconds(session, lambda: state.update(0.0), 3)


def check_formulas(session: Session) -> None:
    """Time a step beside TRM's formulas, both compiled, at equal sizes."""
    session.backend.set_deterministic(True)
    compiled, shape = not session.tiny, efficiency.SHAPES["gpu"]
    if session.tiny:
        shape = efficiency.Shape(B=2, S=16, D=64, N=2, M=1, V=50, layers=1, H=2, L=2)
    peak, ratio = product_rate(session), {}

    def athena() -> Callable[[], None]:
        way = COMPILED if compiled else EAGER
        config = session.config(*efficiency.overrides(shape), "arch.forward_dtype=bfloat16", way)
        return make_step(config, session.backend, documents=False)[0]

    def plain() -> Callable[[], None]:
        return efficiency.plain_step(shape, torch.bfloat16, session.backend.device, compiled)

    for name, build in {"Athena": athena, "TRM's formulas": plain}.items():
        with session.check(f"{name}, bfloat16, {shape}") as found:
            session.backend.forget_earlier_runs()
            step = build()
            step()
            if session.on_cuda:
                torch.cuda.reset_peak_memory_stats()
            ratio[name] = seconds = median_seconds(session, step)
            rate = shape.flops / seconds
            found.update(ms=seconds * 1e3, tflop_a_second=rate / 1e12, of_measured_peak=rate / peak)
            if session.on_cuda:
                found["gb"] = torch.cuda.max_memory_allocated() / 1e9
            del step
    with session.check("Athena's step in those of TRM's formulas") as found:
        found["ratio"] = ratio["Athena"] / ratio["TRM's formulas"]


def check_generation(session: Session) -> None:
    """Check that cached and recomputed keys and values give the same logits, and time a token."""
    texts, tokens = [[1, 2, 3], [4] * 40, [5]], 3 if session.tiny else 20
    options = ["arch=athena_trm_tiny", "arch.hidden_size=128", "arch.num_heads=4"]
    for dtype, bar in {"float32": 1e-3, "bfloat16": 0.2}.items():
        with session.check(dtype) as found:
            _, head = rounding.build(options, dtype)
            head.to(session.backend.device).eval()
            identifiers = torch.zeros(len(texts), dtype=torch.long, device=session.backend.device)
            both = []
            for name, cached in {"kept": True, "recomputed": False}.items():
                decoder = Decoder(head, identifiers, 4, cached=cached)
                logits = [decoder.begin(texts).float().cpu()]
                begun = time.perf_counter()
                for i in range(tokens):
                    logits.append(decoder.extend([i + 1] * len(texts)).float().cpu())
                found[f"{name}_ms_a_token"] = 1e3 * (time.perf_counter() - begun) / tokens
                both.append(torch.stack(logits))
            apart = ((both[0] - both[1]).abs().max() / both[1].abs().max()).item()
            found.update(passed=apart < bar, relative_difference=apart)

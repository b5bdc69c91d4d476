"""Plan a run on given hardware: its memory, steps, time and money."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from models.base import Architecture
from models.cost import Cost
from utils.backend.cuda import BF16_PEAK
from utils.backend.memory import free_host_memory
from utils.checkpoint.run_config import apply_trained_config
from utils.config.hydra_entry import split_config_dirs
from utils.config.load import PretrainConfig, compose_config, load_config
from utils.config.schema import PositiveFloat, PositiveInt
from utils.core.errors import UserError
from utils.corpus.curriculum import scale_budgets
from utils.corpus.data import Data
from utils.training.plan import FILLED, MemoryPlan, plan_metadata


class Hardware(NamedTuple):
    """memory: bytes of one device. rates: dense matrix FLOP/s of one by dtype. price: US dollars
    for a device and hour. utilisation: share of the rate that training is assumed to reach."""

    title: str
    device: str
    devices: int
    memory: float
    rates: dict[str, float]
    price: float
    utilisation: float


# Rates and memory: data sheets. Prices: typical on demand, early 2026; they change, so give price=.
# Utilisation: an assumption on GPUs and TPUs; half of what plain decoders reach with tuned kernels,
# because the recursion runs many small operations. On two busy CPU cores 0.05 and 0.13 were
# measured. measure=true measures yours.
HARDWARE = {
    "h200": Hardware("NVIDIA H200", "cuda", 1, 141e9,
                     {"bfloat16": BF16_PEAK["H200"], "float32": 67e12}, 3.5, 0.25),
    "h100": Hardware("NVIDIA H100", "cuda", 1, 80e9,
                     {"bfloat16": BF16_PEAK["H100"], "float32": 67e12}, 2.7, 0.25),
    "a100": Hardware("NVIDIA A100 80 GB", "cuda", 1, 80e9,
                     {"bfloat16": BF16_PEAK["A100"], "float32": 19.5e12}, 1.5, 0.25),
    "4060": Hardware("NVIDIA RTX 4060, its electricity", "cuda", 1, 8e9,
                     {"bfloat16": BF16_PEAK["4060"], "float32": 15e12}, 0.05, 0.25),
    "v4-8": Hardware("TPU v4-8, 4 chips", "xla", 4, 32 * 2**30,
                     {"bfloat16": 275e12, "float32": 275e12}, 3.22, 0.25),
    "cpu": Hardware("this machine's CPU", "cpu", 1, 0, {}, 0.0, 0.1),
}  # fmt: skip


class Options(BaseModel):
    """The keys besides those of pretrain.py."""

    model_config = ConfigDict(extra="forbid")

    hardware: str = Field("h200", description="one of " + ", ".join(HARDWARE))
    config_dir: Path | None = Field(None, description="presets of your own, beside config/")
    devices: PositiveInt | None = Field(None, description="how many; null: 1, v4-8: its 4 chips")
    tokens: PositiveFloat | None = Field(
        None, description="tokens to train; null: the corpus' epochs, else 20 per parameter"
    )
    utilisation: float | None = Field(
        None, gt=0, le=1, description="share of the peak rate reached; null: 0.25, cpu: 0.1"
    )
    price: float | None = Field(
        None, ge=0, description="US dollars for a device and hour; null: typical on demand"
    )
    measure: bool = Field(False, description="run training steps here and compare")


@dataclass
class Plan:
    """One run on that hardware; seconds and money are those of the whole token budget."""

    name: str
    config: PretrainConfig
    memory_plan: MemoryPlan
    hardware: Hardware
    devices: int
    counted: Cost
    micro_rows: int
    parts: dict[str, int]
    memory: float
    act_steps: float
    assumed: str
    tokens: float
    seconds: float
    money: float

    @property
    def model(self) -> Any:
        """The architecture, without weights."""
        return self.memory_plan.head.model

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total < FILLED * self.memory

    @property
    def passes(self) -> float:
        """Return the layer passes for each trained token."""
        return self.counted.passes * self.act_steps


def configure(overrides: Sequence[str], ranks: int) -> PretrainConfig:
    """Return the checked config; without a corpus, with usual sizes."""
    keys, _ = split_config_dirs([*overrides])
    composed = apply_trained_config(compose_config([*overrides, "dry_run=true"]), keys)
    if not composed.data_paths:
        for key, usual in (("vocab_size", 32000), ("seq_len", 2048)):
            composed[key] = usual if composed[key] is None else composed[key]
    return load_config(composed, world_size=ranks)


def plan(options: Options, overrides: Sequence[str], tokens: float | None = None) -> Plan:
    """Plan one run; `tokens` overrides the options."""
    hardware = HARDWARE[options.hardware]
    devices = options.devices or hardware.devices
    config = configure(overrides, devices)
    metadata, data = plan_metadata(config)
    memory_plan = MemoryPlan(config, metadata, ranks=devices, device=hardware.device)
    model = memory_plan.head.model
    memory = hardware.memory or host_memory()
    micro_rows = config.micro_rows(devices)
    if micro_rows is None:
        micro_rows = memory_plan.fitting_rows(int(memory))
    counted = memory_plan.cost
    act_steps, assumed = steps_of_an_example(config, model, data)
    tokens = tokens or options.tokens or budget(config, counted, act_steps, data)
    dtype = model.config.forward_dtype
    rate = cpu_rate(dtype) if hardware.device == "cpu" else hardware.rates.get(dtype)
    if rate is None:
        raise UserError(
            f"arch.forward_dtype={dtype} has no known rate on {options.hardware}; "
            "give bfloat16, or hardware=cpu"
        )
    utilisation = options.utilisation or hardware.utilisation
    seconds = tokens * act_steps * counted.train_flops / (devices * rate * utilisation)
    price = hardware.price if options.price is None else options.price
    return Plan(
        name=next((o.partition("=")[2] for o in overrides if o.startswith("arch=")), "the default"),
        config=config,
        memory_plan=memory_plan,
        hardware=hardware,
        devices=devices,
        counted=counted,
        micro_rows=micro_rows,
        parts=memory_plan.parts(micro_rows),
        memory=memory,
        act_steps=act_steps,
        assumed=assumed,
        tokens=tokens,
        seconds=seconds,
        money=seconds / 3600 * devices * price,
    )


def steps_of_an_example(
    config: PretrainConfig, model: Architecture, data: Data | None
) -> tuple[float, str]:
    """Return the mean ACT steps that a training example takes, and what that rests on."""
    most = model.max_steps
    if most == 1:
        return 1.0, "there is one step"
    if config.feed == "present":
        return 1.0, "feed=present draws new rows for every step; those for held slots wait"
    least = config.min_iterations or 4
    if data is None:
        budgets = [*range(min(least, most), most + 1)]
        why = f"budgets even between {budgets[0]} and {most} steps"
    elif data.train.has_targets:
        rows = np.linspace(0, data.train.num_rows - 1, min(data.train.num_rows, 4096)).astype(int)
        found = data.train.rows(rows)["iteration_targets"]
        budgets = [max(b, config.min_iterations or 0) if b else 0 for b in found.tolist()]
        why = f"the corpus' iteration_targets, up to {most} steps"
    else:
        return float(most), "the corpus has no budgets, and the halting head is not foreseen"
    if (rule := config.iteration_curriculum) is not None:
        whole = np.array([min(b or most, most) for b in budgets])
        lowest = max(1, model.min_steps, config.min_iterations or 1)
        moments = [(i + 0.5) / 20 for i in range(20)]
        budgets = np.concatenate(
            [scale_budgets(whole, rule, at, lowest) for at in moments]
        ).tolist()
        why += ", growing by iteration_curriculum"
    steps = {budget: model.expected_steps(budget) for budget in set(budgets)}
    return sum(steps[b] for b in budgets) / len(budgets), why + ", and exploration"


def budget(config: PretrainConfig, counted: Cost, act_steps: float, data: Data | None) -> float:
    """Return the tokens of the run if the options give none."""
    if config.max_steps is not None:
        return config.max_steps * config.global_batch_size * counted.seq_len / act_steps
    if data is not None:
        return data.train.num_rows * counted.seq_len * (config.epochs or 1)
    return 20.0 * counted.parameters.total


@cache
def host_memory() -> float:
    """Return the bytes free on this machine, measured once so that plans can be compared."""
    return free_host_memory()


@cache
def cpu_rate(dtype: str, side: int = 1024) -> float:
    """Return the FLOP/s of a matrix product on this CPU, the best of some, measured once so that
    plans can be compared."""
    a = torch.randn(side, side).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best

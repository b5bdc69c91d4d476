"""Log the metrics of training every `log_interval` steps, to the loggers and the progress bar."""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from dataset.common import DatasetMetadata
from models.base import OptionsKey, options_key
from sequence_dataset import TrainStream
from utils.backend import Backend
from utils.config.schema import PretrainConfig
from utils.core.console import LINE_SECONDS
from utils.monitoring.loggers import Loggers
from utils.monitoring.metrics import Metric, MetricSums
from utils.training.plan import count_train_flops


class TrainingLog:
    """Sum the metrics of steps on the device, and write their means on request."""

    def __init__(
        self,
        config: PretrainConfig,
        metadata: DatasetMetadata,
        dtype: torch.dtype,
        backend: Backend,
        stream: TrainStream,
        loggers: Loggers,
    ):
        self.backend, self.stream, self.loggers = backend, stream, loggers
        self.row_tokens = metadata.seq_len
        self.step_tokens = self.row_tokens * config.global_batch_size
        self.peak_flops = backend.peak_flops(dtype)  # per device and second

        def count() -> dict[OptionsKey, float]:
            with backend.one_rank_at_a_time():
                return count_train_flops(config.arch, metadata)

        # per token, forward and backward; rank 0 counts, where a plug-in may fail
        self.flops = {} if config.eval_only else backend.from_main(count)
        self.interval_flops = 0.0
        self.sums = MetricSums()
        self.options: Counter[str] = Counter()
        self.option_steps = 0
        self.bar = tqdm(disable=True)
        self._printed_at = -math.inf

    @contextmanager
    def progress(self, state: Any) -> Iterator[None]:
        """Show a progress bar of the run, 0..1, starting from `state`.

        Without a terminal, print lines instead, because a bar makes a log file hard to read.
        """
        self._last = (state.seconds, state.step, self.stream.examples_entered)
        self.bar = tqdm(
            total=1.0,
            initial=state.progress,
            disable=not (self.backend.is_main and sys.stderr.isatty()),
            desc="train",
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}",
            mininterval=0.5,
        )
        try:
            yield
        finally:
            self.bar.close()

    def add(self, state: Any, metrics: dict[str, Metric], options: dict[str, int]) -> None:
        """Add the metrics of one step, which stay on the device, and its options."""
        self.sums.add(metrics)
        self.options.update(options)
        self.option_steps += 1
        # options that were not counted cost about as much as the most expensive ones
        known = self.flops.get(options_key(options), max(self.flops.values(), default=0.0))
        self.interval_flops += known * self.step_tokens
        self.bar.update(state.progress - self.bar.n)

    def write(self, state: Any) -> None:
        """Write the means since the last call to the loggers and the bar. A collective."""
        values = self.sums.read(self.backend.sum)
        values |= {name: total / self.option_steps for name, total in self.options.items()}
        self.options, self.option_steps = Counter(), 0
        interval_flops, self.interval_flops = self.interval_flops, 0.0
        if not self.backend.is_main or not values:
            return
        stream, done = self.stream, state.progress
        now = (state.seconds, state.step, stream.examples_entered)
        seconds, steps, entered = (a - b for a, b in zip(now, self._last, strict=True))
        self._last, seconds = now, max(seconds, 1e-9)
        flops = interval_flops / seconds
        metrics: dict[str, Any] = {f"train/{k}": v for k, v in values.items()} | {
            "train/epoch": stream.epoch,
            "train/progress": done,
            "train/examples": stream.examples_entered,
            "train/tokens": stream.examples_entered * self.row_tokens,
            "train/tokens_per_s": entered * self.row_tokens / seconds,
            "train/token_steps_per_s": self.step_tokens * steps / seconds,
            "train/flops_per_s": flops,
            "train/nonfinite": state.nonfinite,
            "train/seconds": state.seconds,
        }
        metrics |= {f"train/{name}": rate for name, rate in state.learning_rates().items()}
        if done > 0:
            metrics["train/eta_seconds"] = state.seconds * (1 - done) / done
        if (memory := self.backend.memory_bytes()) is not None:
            metrics["train/memory_bytes"] = memory
        if self.peak_flops is not None:
            metrics["train/mfu"] = flops / self.peak_flops / self.backend.world_size
        self.loggers.log(metrics, state.step)
        # based on the whole run: rows that halt together would make the rate jump, even to 0
        rate = stream.examples_entered * self.row_tokens / max(state.seconds, 1e-9)
        loss = metrics.get("train/lm_loss", math.nan)
        line = f"step {state.step:,} loss {loss:.3f} {rate:,.0f} tokens/s"
        self.bar.set_postfix_str(line)
        now_s = time.monotonic()
        if self.bar.disable and now_s - self._printed_at >= LINE_SECONDS:
            self._printed_at = now_s
            left = tqdm.format_interval(metrics.get("train/eta_seconds", 0.0))
            print(f"train {done:4.0%}  {line}  {left} left", flush=True)

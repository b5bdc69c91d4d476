"""The state of a training run: everything that training changes and a checkpoint stores.

Model, optimizers, averages, rows in progress and counters; the stream keeps its own position.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models import cpu_rows
from models.backbone import Backbone
from models.base import Carry
from models.build import load_into
from models.cpu_kernels import cpu_kernels
from models.flex import raise_recompile_limit
from models.layers import SwiGLU
from models.linear_loss import triton_failure
from models.losses import ACTLossHead
from models.sparse_embedding import SparseEmbeddingSignSGD, sparse_embeddings
from utils.backend import Backend
from utils.backend.state import (
    gather,
    host_copy,
    load_optimizer_state,
    model_state,
    optimizer_state,
    release,
    whole,
)
from utils.checkpoint.format import Checkpoint
from utils.config.schema import EarlyStoppingConfig, PretrainConfig
from utils.core.errors import UserError
from utils.training.ema import EMA
from utils.training.optimizers import create_optimizers


@dataclass
class Best:
    """The best figure so far under a rule such as `min text/bits_per_byte`.

    figure: larger is better. step: step of that evaluation. misses: number of evaluations since.
    """

    rule: str | None = None
    figure: float | None = None
    step: int | None = None
    misses: int = 0

    def follow(self, rule: str) -> None:
        """Reset the figure if the rule has changed."""
        if self.rule not in (None, rule):
            self.figure, self.step, self.misses = None, None, 0
        self.rule = rule

    def add(self, figure: float, step: int, margin: float = 0.0) -> bool:
        """Record an evaluation; return whether it is the best so far by more than `margin`."""
        if math.isnan(figure) or (self.figure is not None and figure <= self.figure + margin):
            self.misses += 1
            return False
        self.figure, self.step, self.misses = figure, step, 0
        return True


@dataclass
class TrainState:
    """Everything that training changes.

    model: the loss head. step_model: the loss head as called in training, wrapped if there are
    several ranks.
    """

    model: ACTLossHead
    step_model: nn.Module
    optimizers: list[Optimizer]
    base_lrs: list[float]
    ema: EMA | None
    halted: np.ndarray
    """(global batch,) bool: the slots that are free after the last step."""
    carries: list[Carry] = field(default_factory=list)
    """Rows in progress, one carry per micro-batch; empty before the first step."""
    step: int = 0
    progress: float = 0.0
    """Share of the run completed, 0..1."""
    seconds: float = 0.0
    """Training time so far, without evaluation and saving."""
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    evaluated_epoch: float = 0.0
    """Epoch of the last evaluation."""
    stopped: bool = False
    """Whether early stopping has ended the run."""
    evaluated_step: int = -1
    """Step of the last evaluation by this process or the run it resumed; -1 if there is none."""
    rehearsed: bool = False
    failed_evaluations: int = 0
    """Number of this process' evaluations in which an evaluator failed."""
    best: Best = field(default_factory=Best)
    """Best figure by `best_metric`, which decides the checkpoint to keep."""
    stopping: Best = field(default_factory=Best)
    """Best figure by the rule of early stopping."""
    parameters: list[nn.Parameter] = field(default_factory=list)

    COUNTERS = (
        "step", "progress", "seconds", "nonfinite", "nonfinite_in_a_row", "evaluated_epoch",
        "stopped",
    )  # fmt: skip
    BEST: ClassVar = {
        "best_step": ("best", "step"), "best_figure": ("best", "figure"),
        "best_rule": ("best", "rule"), "best": ("stopping", "figure"),
        "bad_evaluations": ("stopping", "misses"), "stopping_rule": ("stopping", "rule"),
    }  # fmt: skip
    """Names of the fields of `best` and `stopping` in a checkpoint."""

    @property
    def updated(self) -> bool:
        """Whether a step of this run, resumed ones included, has changed the weights."""
        return self.step > self.nonfinite

    def learning_rates(self) -> dict[str, float]:
        """Return the rates of the last step: lr, and puzzle_emb_lr if identifiers are trained."""
        found = {}
        for optimizer in self.optimizers:
            own = isinstance(optimizer, SparseEmbeddingSignSGD)
            found["puzzle_emb_lr" if own else "lr"] = optimizer.param_groups[0]["lr"]
        return found

    def clip_gradients(self, max_norm: float | None) -> Tensor | None:
        """Clip the gradients to `max_norm`, unless it is None; return their norm before
        clipping.
        """
        if not self.parameters:
            return None
        if max_norm is not None:
            return whole(torch.nn.utils.clip_grad_norm_(self.parameters, max_norm))
        # clipping to infinity would multiply every gradient by 1
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients))

    def update(self, factor: float) -> None:
        """Take an optimizer step with `factor` times the base learning rates, and average."""
        averages = None if self.ema is None else self.ema.begin_update()
        for optimizer, base in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
            if averages is not None and getattr(optimizer, "takes_averages", False):
                optimizer.step(averages=averages)  # type: ignore[call-overload]
            else:
                optimizer.step()
        if averages is not None:
            averages.finish()
        self.nonfinite_in_a_row = 0

    def free_broken_rows(self) -> Tensor:
        """Mark rows whose latents are not finite as halted; return all flags, (rows,)."""
        for carry in self.carries:
            for z in carry.latents.values():
                carry.halted = carry.halted | ~z.isfinite().all(2).all(1)
        return torch.cat([carry.halted for carry in self.carries])

    def apply_stopping_rule(self, rule: EarlyStoppingConfig | None) -> None:
        """Apply the current config's rule after a resume, because it may have changed."""
        if rule is None:
            self.stopping, self.stopped = Best(), False
        else:
            self.stopping.follow(f"{rule.mode} {rule.metric}")
            self.stopped = self.stopping.misses >= rule.patience

    def update_stopping(self, rule: EarlyStoppingConfig | None, results: dict[str, Any]) -> bool:
        """Record an evaluation for early stopping; return whether it ends the run."""
        if rule is None:
            return False
        if f"eval/{rule.metric}" not in results and results.get("eval/evaluators_failed"):
            return False  # a failed evaluation says nothing about the model
        if f"eval/{rule.metric}" not in results:
            raise UserError(
                f"early_stopping.metric={rule.metric} was not evaluated; available: "
                + ", ".join(sorted(name.removeprefix("eval/") for name in results))
            )
        self.stopping.follow(f"{rule.mode} {rule.metric}")
        value = results[f"eval/{rule.metric}"] * (1 if rule.mode == "max" else -1)
        self.stopping.add(value, self.step, rule.min_delta)
        self.stopped = self.stopping.misses >= rule.patience
        return self.stopped

    def next_eval(self, config: PretrainConfig) -> float:
        """Return the epoch from which the next evaluation is due."""
        every = config.eval_interval
        if every is None:
            return math.inf
        # Sums of fractions may fall slightly short of an epoch; the tolerance is below one row in
        # 10^6.
        following = (math.floor(self.evaluated_epoch / every + 1e-9) + 1) * every
        return max(following, config.min_eval_interval)

    def counters(self) -> dict[str, Any]:
        """Return the numbers that a checkpoint stores."""
        found = {name: getattr(self, name) for name in self.COUNTERS}
        return found | {k: getattr(getattr(self, one), of) for k, (one, of) in self.BEST.items()}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Load the result of `counters`; missing counters keep their values."""
        for name in self.COUNTERS:
            setattr(self, name, counters.get(name, getattr(self, name)))
        for name, (one, of) in self.BEST.items():
            best = getattr(self, one)
            setattr(best, of, counters.get(name, getattr(best, of)))

    @contextmanager
    def use_averages(self) -> Iterator[None]:
        """Use the averaged weights, if there are any, within the context."""
        release(self.model)
        with nullcontext() if self.ema is None else self.ema.swap():
            gather(self.model)
            yield
            release(self.model)

    def rehearse(
        self, batch: dict[str, Tensor], options: dict[str, int], backward: Callable[[Tensor], None]
    ) -> None:
        """Run a forward and a backward pass with these step options, and discard the gradients."""
        _, loss, *_ = self.step_model(return_keys=(), carry=self.carries[0], batch=batch, **options)
        backward(loss)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def tensors(self, keep: bool = True) -> dict[str, Any]:
        """Copy the tensors that a checkpoint stores once, not per rank, to the host, unsharded.

        A collective if weights are sharded. keep: False on ranks that only take part in the
        collective and need no copy.
        """
        found: dict[str, Any] = {
            "model": model_state(self.model),
            "optimizer": [optimizer_state(self.model, o) for o in self.main_optimizers],
            "rng": torch.get_rng_state(),
        }
        if self.ema is not None:
            found["ema"] = self.ema.state_dict()
        return host_copy(found, keep)

    @property
    def main_optimizers(self) -> list[Optimizer]:
        """The optimizers except that of the identifier embedding, which has no state."""
        return [o for o in self.optimizers if not isinstance(o, SparseEmbeddingSignSGD)]

    def load_tensors(self, opened: Checkpoint, moments: bool = True) -> bool:
        """Load the result of `tensors`; return whether it includes these optimizers' moments.

        moments: whether the optimizers may load the saved moments. Averages that were not saved
        start from the weights.
        """
        load_into(self.model, opened.tensors("model"), opened)
        states = opened.tensors("optimizer")
        same = moments and len(states) == len(self.main_optimizers)
        for optimizer, state in zip(self.main_optimizers, states, strict=True) if same else ():
            load_optimizer_state(self.model, optimizer, state)
        if self.ema is not None:
            saved = opened.tensors("ema") if "ema.pt" in opened else {"updates": 0, "shadow": {}}
            self.ema.load_state_dict(saved)
        torch.set_rng_state(opened.tensors("rng"))
        return same

    def load_carry(self, rows: dict[str, Tensor], micro_batches: int) -> None:
        """Load the rows in progress of this replica's slots, split into its micro-batches."""
        device, most_steps = next(self.model.parameters()).device, int(rows["steps"].max())
        split = {k: v.to(device).chunk(micro_batches) for k, v in rows.items()}
        self.carries = [
            self.model.begin(carry_from_rows({k: v[i] for k, v in split.items()}), most_steps)
            for i in range(micro_batches)
        ]

    def carry_rows(self) -> dict[str, Tensor]:
        """Copy the rows in progress of this replica to the host as named tensors, in the order of
        slots.
        """

        def flat(carry: Carry) -> dict[str, Tensor]:
            memory = self.model.saved_memory(carry)
            named = {"latents": carry.latents, "data": carry.current_data, "memory": memory}
            return {"steps": carry.steps, "halted": carry.halted} | {
                f"{kind}/{name}": value
                for kind, values in named.items()
                for name, value in values.items()
            }

        # copied first, because on XLA a concatenation would be another program
        parts = host_copy([flat(carry) for carry in self.carries])
        return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


def set_fast_paths(config: PretrainConfig, model: ACTLossHead, device_type: str) -> Sequence[str]:
    """Have steps of the model on this type of device take the paths that `fast` names; return all
    names.
    """
    every = ("attention", "loss", "swiglu", "weights")
    fast = config.fast if isinstance(config.fast, list) else every if config.fast else ()
    model.fused, model.casts_once = "loss" in fast, "weights" in fast
    dtype, native = model.model.config.dtype, device_type == "cpu" and cpu_kernels() is not None
    model.kernel = "cpu" if native and dtype in cpu_rows.KERNELS else None
    for module in model.model.modules():
        if isinstance(module, SwiGLU):
            wanted = "swiglu" in fast and native and dtype == torch.bfloat16
            module.fused = wanted and module.can_fuse()
    return fast


def choose_kernels(config: PretrainConfig, model: ACTLossHead, backend: Backend) -> None:
    """Choose the fast paths of a step and the attention kernel; print those that are unavailable on
    this device, and why.
    """
    fast = set_fast_paths(config, model, backend.device.type)
    slow: dict[str, list[str]] = {}
    wanted = backend.compiles_by_default if config.compile == "auto" else config.compile
    fault = backend.cannot_compile()
    if wanted and fault is not None:
        slow[fault] = [f"compile={str(config.compile).lower()} has no effect"]
    inner = getattr(model.model, "inner", None)
    if (
        isinstance(inner, Backbone)
        and (reason := inner.choose_attention(backend, blocks="attention" in fast)) is not None
    ):
        what = "attention takes more time and memory, with dense document masks"
        slow.setdefault(reason, []).append(what)
    has_kernel = model.fused and model.loss_type.kernel is not None and backend.name == "cuda"
    if isinstance(inner, Backbone) and has_kernel:
        reason = fault or triton_failure(model.loss_type, backend.device, inner.config.dtype)
        model.kernel = "triton" if reason is None else None
        if reason is not None:
            slow.setdefault(reason, []).append("the token loss takes more time, without its kernel")
    for reason, effects in slow.items():
        backend.report(f"note: {' and '.join(effects)}: {reason}")


def create_train_state(
    config: PretrainConfig, model: ACTLossHead, *, backend: Backend
) -> TrainState:
    """Build optimizers and averages for a model that is already on its device."""
    if config.freeze_weights:
        model.requires_grad_(False)
    if backend.compiles(config.compile):
        model.compiled = True
        raise_recompile_limit()
        for module, method in model.model.regions():
            _compile(module, method)
    trains = any(p.requires_grad for p in model.parameters())
    step_model = backend.wrap(model, config.parallel) if trains else model
    trainable = [p for p in model.parameters() if p.requires_grad]  # already sharded, if configured
    optimizers: list[Optimizer] = []
    if trainable:
        optimizers += create_optimizers(
            config.optimizer,
            model.model,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            decay_all=config.weight_decay_all,
        )
    base_lrs = [config.lr] * len(optimizers)
    for embedding in sparse_embeddings(model):
        decay = config.puzzle_emb_weight_decay
        optimizers.append(
            SparseEmbeddingSignSGD(
                embedding, config.puzzle_emb_lr, decay, backend.all_gather, backend.sum
            )
        )
        base_lrs.append(config.puzzle_emb_lr)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return TrainState(
        model=model,
        step_model=step_model,
        optimizers=optimizers,
        base_lrs=base_lrs,
        ema=EMA(named, config.ema_rate, config.ema_warmup) if config.ema and named else None,
        halted=np.ones(config.global_batch_size, dtype=bool),
        parameters=trainable,
    )


def _compile(module: nn.Module, method: str) -> None:
    """Compile a method in place; parameters keep their names."""
    if method == "forward":
        module.compile(dynamic=False)
    else:
        setattr(module, method, torch.compile(getattr(module, method), dynamic=False))


# Names in format 2, where latents and memory were called like AthenaTRM's fields.
_RENAMED = {"z_H": "latents/z_H", "z_L": "latents/z_L", "last_loss": "memory/halting/last_loss"}


def carry_from_rows(rows: dict[str, Tensor]) -> Carry:
    """Convert the rows in progress of a checkpoint of format 2 or 3 to a carry."""

    def below(kind: str) -> dict[str, Tensor]:
        start = f"{kind}/"
        return {k.removeprefix(start): v for k, v in rows.items() if k.startswith(start)}

    rows = {_RENAMED.get(name, name): value for name, value in rows.items()}
    rows = {name: value for name, value in rows.items() if value.numel()}
    return Carry(below("latents"), rows["steps"], rows["halted"], below("data"), below("memory"))

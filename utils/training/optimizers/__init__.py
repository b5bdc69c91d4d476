"""Optimizers, one file each: classes, chosen by the key `optimizer`.

`NAMES` has short names; any other class in this package is named `module@Class`. Such a class has

- `build(model, groups, lr, betas, **options) -> list[Optimizer]`, static: parameter groups have
  their `weight_decay`, and every parameter must be in exactly one optimizer. The learning rate of
  all groups is set before each step. `step` must accept `closure=None`.
- optionally `Config`, a pydantic model of this optimizer's own options; their values are passed to
  `build`.
- optionally `takes_shards = False` if it needs whole tensors; `parallel=fsdp` is then an error.
- optionally, on the optimizers that `build` returns, `takes_averages = True`: `step` then accepts
  `averages=AverageUpdate` (`utils/training/ema.py`) and may update the averages of its parameters.
- optionally `moments`, a name shared by optimizers with the same form of state, so that a run
  resumed with another of them keeps its moments.
"""

import inspect
from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from models.base import Architecture
from utils.config.plugins import load_plugin, read_options
from utils.config.schema import OptimizerConfig
from utils.core.errors import UserError

NAMES = {
    "adam_atan2": "adam_atan2@AdamATan2",
    "adamw": "adamw@AdamW",
    "muon": "muon@Muon",
}


def create_optimizers(
    named: OptimizerConfig,
    model: Architecture,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    decay_all: bool,
) -> list[Optimizer]:
    """Build the optimizers of all parameters; several if they handle different weights.

    Raises UserError if the named class breaks the contract of this package.
    """
    plugin: Any = load_plugin(named)
    build = inspect.getattr_static(plugin, "build", None)
    if not isinstance(build, staticmethod | classmethod):
        raise UserError(
            f"optimizer={named.name}: the class needs a static method build(model, groups, lr, "
            "betas, **options)"
        )
    groups = parameter_groups(model, weight_decay, decay_all)
    optimizers = plugin.build(model, groups, lr, betas, **dict(read_options(named)))
    _check(named.name, optimizers, model)
    return list(optimizers)


def parameter_groups(model: Architecture, weight_decay: float, decay_all: bool) -> list[dict]:
    """Return the parameter groups with and without weight decay.

    Matrices decay, except those that `model.undecayed()` names, such as embeddings. decay_all:
    decay all parameters.
    """
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    undecayed = model.undecayed()
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and name not in undecayed
        (decayed if matrix or decay_all else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def share_moments(one: OptimizerConfig, other: OptimizerConfig) -> bool:
    """Return whether one of these optimizers can load the other's state."""
    try:
        first, second = load_plugin(one), load_plugin(other)
    except UserError:  # a plug-in of an earlier run that no longer exists
        return False
    kind = getattr(first, "moments", None)
    return first is second or (kind is not None and kind == getattr(second, "moments", None))


def _check(name: str, optimizers: Any, model: nn.Module) -> None:
    """Raise UserError unless each parameter of the model is in exactly one of these optimizers."""
    where = f"optimizer={name}: build"
    if not isinstance(optimizers, list | tuple) or not all(
        isinstance(optimizer, Optimizer) for optimizer in optimizers
    ):
        raise UserError(f"{where} must return a list of torch.optim.Optimizer, got {optimizers!r}")
    owners = Counter(id(p) for o in optimizers for group in o.param_groups for p in group["params"])
    for parameter_name, parameter in model.named_parameters():
        if (count := owners[id(parameter)]) != 1:
            raise UserError(
                f"{where} gives the parameter {parameter_name} to {count} optimizers: every "
                "parameter must be in exactly one"
            )
    for optimizer in optimizers:
        try:
            inspect.signature(optimizer.step).bind(closure=None)
        except TypeError:
            raise UserError(
                f"{where} returns a {type(optimizer).__name__} whose step does not take "
                "closure=None"
            ) from None

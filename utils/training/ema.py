"""Keep an exponential moving average of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from utils.backend.state import part_like


class AverageUpdate:
    """One update of averages: shadow ← shadow + weight · (parameter − shadow).

    An optimizer may do a part of it while parameters are in the cache; `finish` does the rest.
    """

    def __init__(self, pending: dict[Tensor, Tensor], weight: float):
        self._pending, self.weight = pending, weight

    def take(self, parameter: Tensor) -> Tensor | None:
        """Return the average of a parameter, which the caller then updates; None if there is
        none.
        """
        return self._pending.pop(parameter, None)

    @torch.no_grad()
    def finish(self) -> None:
        """Update the averages that no optimizer has taken."""
        shadows, self._pending = self._pending, {}
        weights = [p.to(shadow.dtype) for p, shadow in shadows.items()]
        if weights:
            torch._foreach_lerp_(list(shadows.values()), weights, self.weight)


class EMA:
    """Average parameters in at least float32: shadow ← rate · shadow + (1 − rate) · weight.

    With `warmup` the rate after t updates is min(rate, (1 + t) / (10 + t)), so that the average
    forgets the initial weights early in training.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], rate: float, warmup: bool):
        self.parameters = dict(named)
        self.rate, self.warmup, self.updates = rate, warmup, 0
        self.shadow = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.parameters.items()
        }

    def update(self) -> None:
        """Add the current weights to the averages."""
        self.begin_update().finish()

    def begin_update(self) -> AverageUpdate:
        """Begin to add the weights of the next step to the averages, which the caller finishes."""
        rate = self.rate
        if self.warmup:
            rate = min(rate, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        pending: dict[Tensor, Tensor] = {
            p: self.shadow[name] for name, p in self.parameters.items()
        }
        return AverageUpdate(pending, 1 - rate)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Use the averages as the model's weights within the context, then restore its own."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            shadow = self.shadow[name]
            weight = parameter.to(shadow.dtype, copy=True)
            parameter.copy_(shadow)
            shadow.copy_(weight)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, shadow in self.shadow.items():
            saved = state["shadow"].get(name)
            shadow.copy_(
                self.parameters[name].detach() if saved is None else part_like(saved, shadow)
            )

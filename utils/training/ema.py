"""Keep an exponential moving average of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from utils.backend.state import part_like


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

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the averages."""
        rate = self.rate
        if self.warmup:
            rate = min(rate, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = [p.to(self.shadow[name].dtype) for name, p in self.parameters.items()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - rate)

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

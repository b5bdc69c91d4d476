"""Sums that stay on the device until somebody wants to read them."""

from collections.abc import Callable

import torch
from torch import Tensor

# What each sum is divided by: rows with a real label, rows of all kinds, optimizer steps; all
# else by the rows that have halted.
DENOMINATORS = {
    "lm_loss": "rows",
    "q_halt_loss": "rows",
    "q_continue_loss": "rows",
    "reasoning_loss": "rows",
    "kl_loss": "rows",
    "z_H_norm": "slots",
    "z_L_norm": "slots",
    "grad_norm": "updates",
}
COUNTS = ("count", "rows", "slots", "updates")


def added(sums: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`sums` with scalar `values` added to them, by name: (1,) each, at least float32."""
    found = dict(sums)
    for name, value in values.items():
        least = torch.float64 if value.device.type == "cpu" else torch.float32
        wide = value.detach().to(torch.promote_types(value.dtype, least)).view(1)
        found[name] = found[name] + wide if name in found else wide
    return found


class MetricSums:
    """Adds up dicts of scalar tensors; `read` brings all of them to the host in one transfer.

    On XLA the sums start from zeros that come from the host: otherwise the first addition would be
    another program than later ones, as would one with a zero that was made there, a constant.
    Elsewhere that transfer would make the host wait.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        new = added({}, values)
        for name, value in new.items():
            if name not in self.sums and value.device.type == "xla":
                self.sums[name] = torch.zeros(1, dtype=value.dtype).to(value.device)
        self.sums = added(self.sums, new)

    def read(self, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, float]:
        """The sums over ranks, by name; starts afresh. A collective where `reduce` is one."""
        names = sorted(self.sums)
        if not names:
            return {}
        values = reduce(torch.cat([self.sums[name] for name in names])).tolist()
        self.sums = {}
        return dict(zip(names, values, strict=True))


def means(sums: dict[str, float]) -> dict[str, float]:
    """Each sum over its denominator; what no row was counted for is left out."""
    found = {}
    for name, value in sums.items():
        count = sums.get(DENOMINATORS.get(name, "count"), 0)
        if name not in COUNTS and count > 0:
            found[name] = value / count
    return found

"""Sum metrics on the device until they are read.

A metric is a pair (sum, count) of scalars: pairs are added over micro-batches, steps and ranks, and
logged as the quotient.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Metric = tuple[Tensor, Tensor]


def added(sums: Mapping[str, Metric], values: Mapping[str, Metric]) -> dict[str, Metric]:
    """Return `sums` with `values` added to them, by name: (1,) each, at least float32."""
    found = dict(sums)
    for name, pair in values.items():
        new = _widen(pair[0]), _widen(pair[1])
        if (old := found.get(name)) is not None:
            new = old[0] + new[0], old[1] + new[1]
        found[name] = new
    return found


def _widen(value: Tensor) -> Tensor:
    least = torch.float64 if value.device.type == "cpu" else torch.float32
    return value.detach().to(torch.promote_types(value.dtype, least)).view(1)


class MetricSums:
    """Add up dicts of metrics; `read` copies all of them to the host in one transfer.

    On XLA the sums start from zeros copied from the host: without them, or with zeros created on
    the device, which are constants, the first addition would be another program than later ones. On
    other devices that copy would make the host wait.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Metric] = {}

    def add(self, values: Mapping[str, Metric]) -> None:
        """Add the metrics of a step."""
        for name, pair in added({}, values).items():
            if name not in self.sums and pair[0].device.type == "xla":
                zeros = (torch.zeros(1, dtype=value.dtype).to(value.device) for value in pair)
                self.sums[name] = next(zeros), next(zeros)
        self.sums = added(self.sums, values)

    def read(self, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, float]:
        """Return the means over steps and ranks since the last call, by name, omitting metrics with
        count 0. A collective if `reduce` is one.
        """
        if not self.sums:
            return {}
        pairs = sorted(self.sums.items())
        table = torch.cat([value for _, pair in pairs for value in pair])
        values = reduce(table).view(-1, 2).tolist()
        self.sums = {}
        return {
            name: total / count
            for (name, _), (total, count) in zip(pairs, values, strict=True)
            if count > 0
        }

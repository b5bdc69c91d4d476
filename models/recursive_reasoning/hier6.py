"""AthenaTRM with six working streams, z_L1 to z_L6: TRM's ablation of a deeper hierarchy.

Inner cycle k updates stream k from the sum of all streams. After `trm_hier6` of Tiny Recursive
Models (Jolicoeur-Martineau 2025, arXiv 2510.04871).
"""

from pydantic import Field
from torch import Tensor

from models.layers import SequenceInfo
from models.recursive_reasoning.athena_trm import (
    AthenaTRM,
    AthenaTRMConfig,
    AthenaTRMInner,
    Latents,
)

WORKING = tuple(f"z_L{k}" for k in range(1, 7))


class Hier6Config(AthenaTRMConfig):
    """Options of `Hier6`."""

    L_cycles: int = Field(6, ge=1, le=6, description="streams updated in an outer cycle")


class Hier6Inner(AthenaTRMInner):
    streams = ("z_H", *WORKING)

    def work(self, z: Latents, x: Tensor, info: SequenceInfo) -> Latents:
        z = dict(z)
        for name in WORKING[: self.config.L_cycles]:
            z[name] = self.L_level(_total(z), z["z_H"] + x, info)
        return z

    def conclude(self, z: Latents, info: SequenceInfo) -> Tensor:
        return self.L_level(z["z_H"], _total(z), info)


class Hier6(AthenaTRM):
    """See the module."""

    Config = Hier6Config
    Inner = Hier6Inner


def _total(z: Latents) -> Tensor:
    first, *others = (z[name] for name in WORKING)
    for other in others:
        first = first + other
    return first

"""AthenaTRM with one latent stream, z_L: TRM's ablation without a separate answer.

After `trm_singlez` of Tiny Recursive Models (Jolicoeur-Martineau 2025, arXiv 2510.04871).
"""

from torch import Tensor

from models.layers import SequenceInfo
from models.recursive_reasoning.athena_trm import AthenaTRM, AthenaTRMInner, Latents


class SingleZInner(AthenaTRMInner):
    streams = ("z_L",)

    def work(self, z: Latents, x: Tensor, info: SequenceInfo) -> Latents:
        z_L = z["z_L"]
        for _ in range(self.config.L_cycles):
            z_L = self.L_level(z_L, x, info)
        return {"z_L": z_L}

    def conclude(self, z: Latents, info: SequenceInfo) -> Tensor:
        return self.L_level(z["z_L"], None, info)


class SingleZ(AthenaTRM):
    """See the module."""

    Inner = SingleZInner

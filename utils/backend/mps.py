"""Apple GPUs, in a single process."""

import torch

from utils.backend.base import Backend
from utils.core.errors import UserError


class MPSBackend(Backend):
    """The GPU of an Apple computer."""

    name = "mps"
    tries_sizes = True

    def __init__(self) -> None:
        super().__init__()
        if self.world_size > 1:
            raise UserError(
                f"device_type=mps runs in one process, but WORLD_SIZE={self.world_size}; start "
                "`python pretrain.py` without torchrun"
            )

    @classmethod
    def missing(cls) -> str | None:
        if not torch.backends.mps.is_available():
            return "this machine has no Apple GPU that torch can use; use device_type=auto"
        return None

    def memory_bytes(self) -> int | None:
        return torch.mps.driver_allocated_memory()

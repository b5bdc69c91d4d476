"""The CPU: a single process, or several under torchrun with gloo."""

import os

import torch

from utils.backend.base import Backend


class CPUBackend(Backend):
    """The CPU."""

    name = "cpu"

    def __init__(self) -> None:
        super().__init__()
        if self.world_size > 1:
            # if every rank used all cores, the ranks would slow each other down severely
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))

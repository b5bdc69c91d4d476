"""NVIDIA GPUs, one a process, NCCL between them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from utils.backend.base import Backend
from utils.backend.triton import missing_for_triton
from utils.core.errors import UserError

BF16_PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "4060": 30e12,
}
"""Dense bfloat16 FLOP/s by a part of the device's name (NVIDIA's data sheets, SXM variants)."""

VOLTA, AMPERE = (7, 0), (8, 0)
"""Compute capabilities: the least that torch.compile accepts, and the first with bfloat16, from
which on Triton is supported by its makers."""


class CUDABackend(Backend):
    name = "cuda"
    tries_sizes = True
    collective = "nccl"

    def __init__(self) -> None:
        super().__init__()
        self._check_ranks()
        self.device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(self.device)

    @classmethod
    def missing(cls) -> str | None:
        if not torch.cuda.is_available():
            return "this torch finds no CUDA device; use device_type=auto, or install a CUDA build"
        return None

    def _check_ranks(self) -> None:
        """Raise UserError on all processes of a machine that has fewer GPUs: none is to wait."""
        gpus = torch.cuda.device_count()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.local_rank + 1))
        if local <= gpus:
            return
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        limit = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise UserError(
            f"{local} processes were started on this machine, which has {gpus} "
            f"GPU{'s' * (gpus != 1)}{limit}, and each needs its own; start it with torchrun "
            f"--nproc-per-node {gpus}"
        )

    def set_deterministic(self, wanted: bool) -> None:
        """Not with warn_only: the backward passes of flash and memory-efficient attention add in
        any order then, and cuDNN's attention, which has no other way, is not avoided."""
        if wanted and os.environ.get("CUBLAS_WORKSPACE_CONFIG") != ":16:8":
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS needs one of the two
        torch.use_deterministic_algorithms(wanted)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    @contextmanager
    def any_algorithm(self) -> Iterator[None]:
        wanted = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(wanted)

    def group_options(self) -> dict[str, Any]:
        return {"device_id": self.device}  # or NCCL has to guess it for barriers

    def to_device(self, batch):
        """Pinned, so that the copy overlaps with what the device still does."""
        return {
            k: torch.from_numpy(v).pin_memory().to(self.device, non_blocking=True)
            for k, v in batch.items()
        }

    @property
    def capability(self) -> tuple[int, int]:  # type: ignore[override]
        return torch.cuda.get_device_capability(self.device)

    @property
    def compiles_by_default(self) -> bool:  # type: ignore[override]
        return self.capability >= AMPERE

    def forget_earlier_runs(self) -> None:
        super().forget_earlier_runs()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def release_memory(self) -> None:
        super().release_memory()
        torch.cuda.empty_cache()

    def usable_dtype(self, name: str) -> str:
        return "float32" if name == "bfloat16" and self.capability < AMPERE else name

    def cannot_compile(self) -> str | None:
        if self.capability < VOLTA:
            return "Triton needs compute capability {}.{}; this card has {}.{}".format(
                *VOLTA, *self.capability
            )
        return missing_for_triton()

    def available_memory(self) -> int:
        """Return what is free, and what the allocator keeps without using it."""
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + kept

    def memory_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        if dtype != torch.bfloat16:
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((peak for part, peak in BF16_PEAK.items() if part in name), None)

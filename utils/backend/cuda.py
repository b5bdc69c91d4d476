"""NVIDIA GPUs: one per process, connected by NCCL."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

from utils.backend.base import Backend
from utils.core.errors import UserError

BF16_PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "4060": 30e12,
}
"""Dense bfloat16 FLOP/s by part of the device's name (NVIDIA's data sheets, SXM variants)."""

VOLTA, AMPERE = (7, 0), (8, 0)
"""Compute capabilities: the lowest that torch.compile accepts, and the lowest with bfloat16, which
is also the lowest that Triton supports officially."""


class CUDABackend(Backend):
    """One NVIDIA GPU."""

    name = "cuda"
    tries_sizes = True

    def __init__(self) -> None:
        super().__init__()
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self._check_ranks()
        self.device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(self.device)

    @classmethod
    def missing(cls) -> str | None:
        if not torch.cuda.is_available():
            return "torch finds no CUDA device; use device_type=auto, or install a CUDA build"
        return None

    def _check_ranks(self) -> None:
        """Raise UserError if this machine has fewer GPUs than processes.

        All of its processes raise it, so that none waits for the others.
        """
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
        # Not warn_only, under which flash and memory-efficient attention add gradients in any
        # order, and torch may choose cuDNN's attention, which is never deterministic.
        if wanted and os.environ.get("CUBLAS_WORKSPACE_CONFIG") != ":16:8":
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS requires this or :16:8
        torch.use_deterministic_algorithms(wanted)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def set_matmul_precision(self, wanted: str) -> None:
        # Not torch.set_float32_matmul_precision, which changes products on the CPU too.
        torch.backends.cuda.matmul.allow_tf32 = wanted == "high"

    def group_options(self) -> dict[str, Any]:
        return {"backend": "nccl", "device_id": self.device}  # NCCL would have to guess the device

    def to_device(self, batch):
        return {  # from pinned memory, so that copies overlap with computation
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
        torch.cuda.reset_peak_memory_stats(self.device)

    def release_memory(self) -> None:
        super().release_memory()
        torch.cuda.empty_cache()

    def usable_dtype(self, name: str) -> str:
        return "float32" if name == "bfloat16" and self.capability < AMPERE else name

    def cannot_compile(self) -> str | None:
        if self.capability < VOLTA:
            return "Triton needs compute capability {}.{}; this GPU has {}.{}".format(
                *VOLTA, *self.capability
            )
        return missing_for_triton()

    def available_memory(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        # The allocator can reuse memory that it has reserved.
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + unused

    def memory_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        if dtype != torch.bfloat16:
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((peak for part, peak in BF16_PEAK.items() if part in name), None)


def missing_for_triton() -> str | None:
    """Return what Triton lacks to compile kernel launchers on this machine; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else ["gcc", "clang"])):
        wanted = f"CC={named} is not a program" if named else "neither gcc nor clang is installed"
        return f"Triton needs a C compiler, and {wanted}"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own has no headers
    own = sysconfig.get_paths(scheme)["include"]
    folders = [own]
    for name in ("CPATH", "C_INCLUDE_PATH"):
        folders += filter(None, os.environ.get(name, "").split(os.pathsep))
    if not any((Path(folder) / "Python.h").is_file() for folder in folders):
        return f"Triton needs Python's C headers ({own}/Python.h): install python3-dev"
    return None

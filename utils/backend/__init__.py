"""Devices: select the backend for `device_type`."""

from utils.backend.base import Backend
from utils.backend.cpu import CPUBackend
from utils.backend.cuda import CUDABackend
from utils.backend.mps import MPSBackend
from utils.backend.xla import TPUBackend, XLABackend
from utils.core.errors import UserError

__all__ = ["Backend", "select_backend"]

BACKENDS: dict[str, type[Backend]] = {
    "xla": XLABackend,
    "tpu": TPUBackend,
    "cuda": CUDABackend,
    "mps": MPSBackend,
    "cpu": CPUBackend,
}


def select_backend(device_type: str) -> tuple[Backend, str]:
    """Return the backend for `device_type`, and the reason for the choice in a few words.

    `auto` selects a TPU, CUDA, MPS or the CPU. Raises UserError if the named device is missing.
    """
    if device_type != "auto":
        chosen = BACKENDS[device_type]
        if (reason := chosen.missing()) is not None:
            raise UserError(f"device_type={device_type} was asked for, but {reason}")
        return chosen(), "set by device_type"
    for name in ("tpu", "cuda", "mps"):
        if BACKENDS[name].missing() is None:
            return BACKENDS[name](), "device_type=auto found it"
    return CPUBackend(), "device_type=auto found no accelerator"

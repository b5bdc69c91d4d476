"""Picks the backend for `device_type`."""

from utils.backend.base import Backend, Received, require
from utils.backend.cpu import CPUBackend
from utils.backend.cuda import CUDABackend
from utils.backend.mps import MPSBackend
from utils.backend.xla import TPUBackend, XLABackend

__all__ = ["Backend", "Received", "select_backend"]

BACKENDS: dict[str, type[Backend]] = {
    "xla": XLABackend,
    "tpu": TPUBackend,
    "cuda": CUDABackend,
    "mps": MPSBackend,
    "cpu": CPUBackend,
}


def select_backend(device_type: str) -> tuple[Backend, str]:
    """The backend and, in a few words, why it was taken. `auto`: TPU, CUDA, MPS, else CPU."""
    if device_type != "auto":
        return require(BACKENDS[device_type]), "as device_type asks"
    for name in ("tpu", "cuda", "mps"):
        if BACKENDS[name].missing() is None:
            return BACKENDS[name](), "device_type=auto found it"
    return CPUBackend(), "device_type=auto found no accelerator"

"""TPUs through PyTorch/XLA: the place is prepared, the backend is not written yet."""

from utils.backend.base import Backend


class XLABackend(Backend):
    name = "xla"

    @classmethod
    def missing(cls) -> str | None:
        return "training on TPUs is not available yet; use device_type=cuda or device_type=cpu"

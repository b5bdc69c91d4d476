"""Whether this machine can run the C++ kernels."""

import shutil

import torch

from models.cpu_kernels import cpu_kernels


def can_run_kernels() -> bool:
    """Return whether it can; fail if it could but the kernels do not compile."""
    possible = torch.cpu._is_avx512_bf16_supported() and any(map(shutil.which, ("c++", "g++")))
    assert not possible or cpu_kernels() is not None
    return possible

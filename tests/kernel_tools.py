"""Tools for tests of the C++ kernels."""

import shutil

import torch

from models.cpu_kernels import cpu_kernels


def can_run_kernels() -> bool:
    """Return whether it can; fail if it could but the kernels do not compile."""
    possible = torch.cpu._is_avx512_bf16_supported() and any(map(shutil.which, ("c++", "g++")))
    assert not possible or cpu_kernels() is not None
    return possible


def assert_close(found, right, tokens=8):
    """Check that the error is that of bfloat16's rounding, on the whole and of each number."""
    found = found.double()
    share = 0.006 if tokens >= 8 else 0.01  # the errors of a token's inner values recur
    assert (found - right).norm() <= share * right.norm()
    assert (found - right).abs().max() <= 0.03 * right.abs().max()


def allocated(call):
    """Return the bytes that a function allocates."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)

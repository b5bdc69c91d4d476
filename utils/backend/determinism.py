"""Deterministic algorithms, which must be enabled in torch on CUDA."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.core.errors import UserError


@contextmanager
def allow_any_algorithm() -> Iterator[None]:
    """Allow nondeterministic operations within the context, which must not affect weights."""
    wanted = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted)


@contextmanager
def explain_nondeterminism(device: torch.device) -> Iterator[None]:
    """Replace torch's error for an operation without a deterministic implementation by a
    UserError.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+).* does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise UserError(
            f"deterministic=true, but {found[1]} is not deterministic on {device}; "
            "replace that operation, or set deterministic=false: a resumed run is then the same "
            "only up to rounding"
        ) from error

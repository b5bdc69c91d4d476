"""Deterministic algorithms, which torch has to be asked for on CUDA."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.core.errors import UserError


@contextmanager
def allow_any_algorithm() -> Iterator[None]:
    """Allow nondeterministic operations inside the block, where no weights depend on them."""
    wanted = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted)


@contextmanager
def explain_nondeterminism(device: torch.device) -> Iterator[None]:
    """Raise UserError in place of torch's error for an operation that is never deterministic."""
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+).* does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise UserError(
            f"deterministic=true, but {found[1]} gives different bits each time on {device}; "
            "replace that operation, or set deterministic=false: then a resumed run is the same "
            "only up to rounding"
        ) from error

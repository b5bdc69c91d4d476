"""What torch refuses under deterministic=true, in a sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.core.errors import UserError


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
            f"{found[1]} gives other bits each time on {device}, which deterministic=true does not "
            "allow; replace it, or set deterministic=false, and a resumed run is the same up to "
            "rounding only"
        ) from error

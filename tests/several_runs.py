"""Train several command lines in one launch: torchrun [...] several_runs.py '[[null, [...]], ...]'.

Each is a pair of the name of a fault below, or null, and the overrides of pretrain.py.
"""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

from models.sparse_embedding import SparseEmbeddingSignSGD
from pretrain import launch
from utils.backend.base import Backend
from utils.config.load import compose_config


def average_gradients() -> AbstractContextManager:
    """Take the mean of gradients over ranks where the sum is right."""
    return patch.object(Backend, "backward", lambda self, loss: loss.backward())


def keep_identifiers_to_oneself() -> AbstractContextManager:
    """Update the identifier embedding with the gradients of this rank alone."""
    real = SparseEmbeddingSignSGD.__init__

    def init(self, embedding, lr, weight_decay, *collectives):
        real(self, embedding, lr, weight_decay)

    return patch.object(SparseEmbeddingSignSGD, "__init__", init)


FAULTS = {f.__name__: f for f in (average_gradients, keep_identifiers_to_oneself)}


def train_all(runs: list[tuple[str | None, list[str]]]) -> None:
    for fault, overrides in runs:
        with FAULTS[fault]() if fault else nullcontext():
            launch(compose_config(overrides))


if __name__ == "__main__":
    train_all(json.loads(sys.argv[1]))

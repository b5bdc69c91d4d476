"""Where random numbers of tests come from: ATHENA_TEST_SEED (0 where it is unset) and a name."""

import os
import zlib

import numpy as np

SEED_VARIABLE = "ATHENA_TEST_SEED"
BASE_SEED = int(os.environ.get(SEED_VARIABLE, "0"))


def seed_for(name: str) -> int:
    """Return the seed of a test or of a fixture that several tests share, by its name."""
    return zlib.crc32(f"{BASE_SEED} {name}".encode())


def rng_for(name: str) -> np.random.Generator:
    """Return a generator for a fixture that several tests share."""
    return np.random.default_rng(seed_for(name))


def draw_rng() -> np.random.Generator:
    """Return a generator that follows from the seed of the present test."""
    return np.random.default_rng(np.random.randint(1 << 31))

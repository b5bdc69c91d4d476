"""Tests of the XLA backend on XLA's own CPU; `make test-xla` runs them in their own environment."""

import importlib.util
import os

collect_ignore_glob = [] if importlib.util.find_spec("torch_xla") else ["test_*.py"]

os.environ.setdefault("PJRT_DEVICE", "CPU")
# Programs that run for milliseconds need not be made fast; compiling them is most of the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

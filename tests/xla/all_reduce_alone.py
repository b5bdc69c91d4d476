"""Trains on one replica; usage: all_reduce_alone.py CORPUS FOLDER [key=value ...].

With XLA_ALWAYS_ALLREDUCE=1 its collectives are collectives. Prints how many XLA was asked for.
"""

import sys
from pathlib import Path

import torch_xla.debug.metrics as xla_metrics
from xla_tools import REPLICA, run_on

corpus, folder, *overrides = sys.argv[1:]
run_on(REPLICA, Path(corpus), Path(folder), *overrides)
print(f"all-reduces: {xla_metrics.counter_value('xla::all_reduce') or 0}")

"""Tests on tensors without content on a `cuda` device; `make test-xla` runs them too.

They need a torch that is built with CUDA, such as that of the XLA environment, and no card.
"""

import torch

collect_ignore_glob = [] if torch.version.cuda else ["test_*.py"]

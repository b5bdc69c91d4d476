"""What the operations of a piece of code make, seen from below."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation returns, in order."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen += [tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result

    def squares(self, *lengths: int) -> list[tuple[int, ...]]:
        """Shapes of which at least two axes are of one of these lengths."""
        return [shape for shape in self.seen if sum(n in lengths for n in shape) > 1]

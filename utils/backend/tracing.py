"""Count the FLOPs and the memory of a computation without running it.

Tensors are fake: they have a shape and a dtype, but no data, so that the largest model can be
traced in seconds on a machine with little memory and without the device. They are fake CPU tensors,
because autograd on others needs their device.
"""

import logging
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten
from torch.utils.flop_counter import flop_registry

from utils.backend.cpu import CPUBackend
from utils.core.errors import UserError, first_line
from utils.core.functions import PROJECT_ROOT
from utils.core.plugins import locate_failure

aten = torch.ops.aten
# Fused attention on a CPU, which torch's own counter does not support: the number of products of
# the size of all scores (two in the forward pass; in the backward pass the scores again and four
# more), and the positions of the query, the key and `is_causal` in the arguments.
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: (2, 0, 1, 4),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (5, 1, 2, 7),
}


def count_attention(operation: Any, products: int, query: int, key: int, causal: int) -> None:
    """Have tracers count an operator for attention, as `_ATTENTION` describes them."""
    _ATTENTION[operation] = products, query, key, causal


_SCRATCH: dict[Any, Callable[..., int]] = {}


def count_scratch(operation: Any, scratch_bytes: Callable[..., int]) -> None:
    """Have tracers count memory that an operator needs while it runs, a function of its
    arguments.
    """
    _SCRATCH[operation] = scratch_bytes


# The exception says the same as this log, which has a line for each line of its traceback.
logging.getLogger("torch._subclasses.fake_tensor").addFilter(
    lambda record: not str(record.msg).startswith("failed while attempting to run meta")
)


class Untraceable(UserError):
    """A computation whose shapes depend on values, which fake tensors do not have."""


def _place(error: Exception) -> str:
    """Return file, line and function of the innermost code that an exception passed through, of a
    plug-in or else of Athena's models, with a colon; empty if there is none."""
    found = locate_failure(error)
    for frame in traceback.extract_tb(error.__traceback__) if found is None else ():
        if Path(frame.filename).is_relative_to(PROJECT_ROOT / "models"):
            found = frame.filename, frame.lineno, frame.name
    return "{}:{} ({}): ".format(*found) if found else ""


class Replica(CPUBackend):
    """The only replica of a run with fake tensors, regardless of how this process was launched."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = self.local_rank = 0
        self.world_size = 1

    def compiles(self, wanted: Any) -> bool:
        return False


class Tracer(TorchDispatchMode):
    """Trace the operations inside `with tracer:`, which may be entered repeatedly.

    FLOPs are those of matrix products and attention, counting 2 for a multiplication and its
    addition. Reading a value, as in `bool(tensor)`, gives True or 1. Raises Untraceable if a shape
    depends on values.

    Attributes:
        flops: of all operations, without recomputation.
        recomputed: FLOPs of forward operations that the backward pass repeats.
        live: bytes of the tensors that exist.
        peak: the maximum of `live` since `start_peak`.
        passes: calls of the modules that `watch` was given, (without gradient, with gradient).
    """

    def __init__(self, *, causal: bool):
        """Start at zero. causal: count position t as attending only up to t, whatever the mask."""
        super().__init__()
        self.causal = causal
        self.flops = self.recomputed = 0
        self.live = self.peak = 0
        self.passes = [0, 0]
        self._fake = FakeTensorMode()
        self._storages: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._in_backward = False
        self._known: dict[Any, Any] = {}

    def __enter__(self):
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, kind, error, traceback):
        super().__exit__(kind, error, traceback)
        self._fake.__exit__(kind, error, traceback)
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return
        place = _place(error)
        if isinstance(error, DynamicOutputShapeException | UnsupportedFakeTensorException):
            raise Untraceable(
                f"{place}{error} depends on the values of a tensor, so the model cannot be traced "
                "without running it; replace it by an operation with a fixed shape, such as "
                "torch.where"
            ) from None
        # a genuine failure occurs again in the first step, with its own message
        raise Untraceable(
            f"{place}{first_line(error)} (in a trace, which counts FLOPs and memory)"
        ) from error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._count(func._overloadpacket, args, kwargs, out)
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        if (scratch := _SCRATCH.get(func._overloadpacket)) is not None:
            self.peak = max(self.peak, self.live + scratch(*args, **kwargs))
        return out

    def _count(self, operation: Any, args: Any, kwargs: Any, out: Any) -> None:
        if operation in _ATTENTION:
            products, query, key, causal = _ATTENTION[operation]
            triangle = self.causal or (len(args) > causal and args[causal])
            flops = _attention_flops(products, args[query].shape, args[key].shape[-2], triangle)
        elif operation in flop_registry:
            flops = flop_registry[operation](*args, **kwargs, out_val=out)
        else:
            return
        if self._in_backward and torch.is_grad_enabled():  # a backward pass needs no graph
            self.recomputed += flops
        else:
            self.flops += flops

    def _follow(self, storage: Any) -> None:
        if storage in self._storages:
            return
        size = storage.nbytes()
        self._storages[storage] = size
        self._hold(size)
        weakref.finalize(storage, self._hold, -size).atexit = False

    def _hold(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def start_peak(self) -> None:
        """Reset the peak to the current memory."""
        self.peak = self.live

    def backward(self, loss: Tensor) -> None:
        """Trace the backward pass of `loss`, if it requires a gradient."""
        if not loss.requires_grad:
            return
        self._in_backward = True
        try:
            loss.backward()
        finally:
            self._in_backward = False

    def place(self, module: nn.Module) -> None:
        """Replace the parameters and buffers of `module`, which may be on the meta device, by fake
        ones.
        """
        placed: dict[int, Tensor] = {}

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in placed:
                new = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                placed[id(tensor)] = new
            return placed[id(tensor)]

        with torch.no_grad():
            for part in module.modules():
                held: list[Any] = [part._parameters, part._buffers]
                for tensors in held:
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            tensors[name] = fake(tensor)

    @contextmanager
    def watch(self, root: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Count calls of `blocks` inside the `with` block.

        Calls without gradient, of a block or of a module in `root` that contains blocks, are traced
        once for each kind of arguments; similar calls then return empty tensors of the same shapes
        and add the same counts.
        """
        own = set(blocks)
        repeated = [m for m in root.modules() if m is not root and own & set(m.modules())]
        for module in repeated:
            call = partial(self._call, module.forward)
            module.forward = partial(self._pass, call) if module in own else call
        try:
            yield
        finally:
            for module in repeated:
                del module.forward

    def _pass(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._in_backward:
            self.passes[torch.is_grad_enabled()] += 1
        return call(*args, **kwargs)

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        kinds = [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves]
        key = (forward, str(spec), *kinds)
        if key in self._known:
            flops, passes, rise, shapes, form = self._known[key]
            self.flops += flops
            self.passes[0] += passes
            self.peak = max(self.peak, self.live + rise)
            return tree_unflatten([torch.empty_strided(a, b, dtype=c) for a, b, c in shapes], form)
        flops, passes, peak, live = self.flops, self.passes[0], self.peak, self.live
        self.start_peak()
        out = forward(*args, **kwargs)
        leaves, form = tree_flatten(out)
        if all(isinstance(x, Tensor) for x in leaves):
            shapes = [(x.shape, x.stride(), x.dtype) for x in leaves]
            counted = (self.flops - flops, self.passes[0] - passes, self.peak - live)
            self._known[key] = (*counted, shapes, form)
        self.peak = max(peak, self.peak)
        return out


def _attention_flops(products: int, query: Sequence[int], keys: int, causal: bool) -> int:
    """Return the FLOPs of attention: 2 for each product, channel and pair of positions that a
    causal kernel does not skip. query: (B, N, L, K).
    """
    rows, heads, length, width = query
    triangle = causal and length == keys
    pairs = length * (length + 1) // 2 if triangle else length * keys
    return 2 * products * rows * heads * width * pairs

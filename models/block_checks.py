"""Check what the classes of a plug-in override, where no error would name the fault."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from models.base import Architecture
from models.layers import Block
from utils.core.errors import UserError
from utils.core.functions import nearest
from utils.core.plugins import PACKAGE


@contextmanager
def checked_norms(model: nn.Module) -> Iterator[None]:
    """Raise UserError, inside the block, where a norm that Athena's `Block.forward` calls returns
    anything but a tensor of the shape that it was given: what fails otherwise is the code after it.
    """
    blocks = [
        module
        for module in model.modules()
        if isinstance(module, Block)
        and type(module).forward is Block.forward
        and type(module).norm is not Block.norm
    ]
    for block in blocks:
        # past nn.Module, which would compare it with its submodules
        object.__setattr__(block, "norm", partial(_call, block.norm))
    try:
        yield
    finally:
        for block in blocks:
            object.__delattr__(block, "norm")


def _call(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    out = norm(x)
    if isinstance(out, Tensor) and out.shape == x.shape:
        return out
    given = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"{out!r:.60}"
    raise UserError(
        f"{place_of(norm)}: {norm.__qualname__} returns {given} for one of shape {tuple(x.shape)}; "
        "a norm must return a tensor of the shape that it was given"
    )


def describe_unused(model: Architecture) -> list[str]:
    """Return a sentence for each name in a plug-in's classes that is nearly one of Athena's and
    overrides nothing, and for a `block_type` that changes nothing."""
    blocks = {type(module): module for module in model.modules() if isinstance(module, Block)}
    found = []
    for kind in (type(model), type(getattr(model, "inner", None)), *blocks):
        for cls in kind.__mro__:
            if cls.__module__.startswith(f"{PACKAGE}."):
                found += _misspelt(cls)
    for kind, block in blocks.items():
        if not kind.__module__.startswith(f"{PACKAGE}."):
            continue
        own = {name for cls in kind.__mro__[: kind.__mro__.index(Block)] for name in vars(cls)}
        if not any(name == "__init__" or not name.startswith("__") for name in own):
            found.append(
                f"block_type={kind.__name__} ({_file_of(kind)}) changes nothing of Block: override "
                "norm or forward"
            )
        found += [
            f"{kind.__name__} ({_file_of(kind)}) assigns a module to self.{name}, which the method "
            f"{name} hides: give it another name and call it in the method"
            for name in block._modules
            if inspect.isroutine(getattr(kind, name, None))
        ]
    return list(dict.fromkeys(found))


def _misspelt(cls: type) -> list[str]:
    """Return a sentence for each name of a class that is nearly one of its bases'."""
    inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
    overridable = {
        name
        for base in cls.__mro__[1:]
        if base.__module__.startswith("models.")
        for name in vars(base)
        if not name.startswith("_") and name not in vars(cls)
    }
    found = []
    for name, value in vars(cls).items():
        if name.startswith("__") or name in inherited or name[-1].isdigit():  # norm1, norm2
            continue
        if meant := nearest(name, sorted(overridable), cutoff=0.85):
            where = f":{value.__code__.co_firstlineno}" if inspect.isfunction(value) else ""
            found.append(
                f"{cls.__name__}.{name} ({_file_of(cls)}{where}) overrides nothing; did you mean "
                f"'{meant}'?"
            )
    return found


def _file_of(cls: type) -> str:
    return getattr(sys.modules.get(cls.__module__), "__file__", None) or cls.__module__


def place_of(function: Callable) -> str:
    """Return file, line and name of a function as an error in it is placed."""
    code = inspect.unwrap(getattr(function, "__func__", function)).__code__
    return f"{code.co_filename}:{code.co_firstlineno} ({code.co_name})"

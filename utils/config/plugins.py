"""Plug-ins that the config names, and the options that they declare.

A class declares its options by a pydantic model, its attribute `Config`; a function by the
annotation of its third parameter.
"""

import inspect
import typing
from typing import Any

import pydantic

from utils.config.errors import coerced
from utils.config.schema import Component
from utils.core.functions import load_named


def load_plugin(named: Component) -> Any:
    """Return the class or function that a component of the config names.

    Raises UserError, naming the nearest that exists.
    """
    return load_named(named.name, named.PREFIX, named.KIND)


def options_model(plugin: Any, kind: type[Component]) -> type[pydantic.BaseModel] | None:
    """Return the model that declares a plug-in's options; None if its constructor takes them."""
    declared = getattr(plugin, "Config", None)
    if inspect.isfunction(plugin):
        third = list(inspect.signature(plugin).parameters)[2:3]
        declared = typing.get_type_hints(plugin).get(*third) if third else None
    if inspect.isclass(declared) and issubclass(declared, pydantic.BaseModel):
        return declared
    return kind.NO_OPTIONS


def read_options(named: Component, **given: Any) -> Any:
    """Return the options of a component that was checked, with defaults, as its plug-in declares.

    given: values that come from other keys. If the plug-in declares none: a dict, as configured.
    """
    model = options_model(load_plugin(named), type(named))
    if model is None:
        return named.options
    given = {name: value for name, value in given.items() if name in model.model_fields}
    return model.model_validate(coerced(model, named.options) | given, strict=True)

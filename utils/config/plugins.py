"""Plug-ins that the config names, and the options that they declare.

A class declares its options by a pydantic model, its attribute `Config`; a function by the
annotation of its third parameter.
"""

import inspect
import sys
import typing
from collections.abc import Mapping
from typing import Any

import pydantic
from omegaconf import DictConfig

from utils.config.errors import coerced
from utils.config.schema import Component, Folders, LossConfig, LossTermConfig
from utils.core.errors import UserError
from utils.core.functions import load_named, short_names
from utils.core.plugins import use_plugins


def use_configured_plugins(config: Mapping[str, Any] | DictConfig) -> None:
    """Look up plug-ins in the directories of a config's key `plugins`, which may not be checked.

    Raises UserError for a path that is not a directory.
    """
    given = config.get("plugins") or []
    try:
        folders = pydantic.TypeAdapter(Folders).validate_python(
            given if isinstance(given, str) else list(given)
        )
    except pydantic.ValidationError:
        return  # reported with the other keys
    use_plugins(folders)


def load_plugin(named: Component) -> Any:
    """Return the class or function that a component of the config names.

    Raises UserError, naming the nearest that exists.
    """
    return load_named(named.name, named.PREFIX, named.KIND)


def load_plugin_of_kind(named: Component) -> Any:
    """Return what `load_plugin` does; raise UserError, naming those of the right kind in the same
    module, where the class is of another kind than its key needs."""
    found = load_plugin(named)
    if _is_one(found, named):
        return found
    module = sys.modules[found.__module__]
    own = [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and _is_one(value, named)
    ]
    bases = [base for base in found.__mro__[1:-1] if base.__module__ != found.__module__]
    what = f"a {bases[0].__name__}, " if bases else ""
    raise UserError(
        f"'{named.name}' is {what}not {named.NOUN}; {named.name.partition('@')[0]} has: "
        + (", ".join(own) or "none")
    )


def _is_one(plugin: Any, named: Component) -> bool:
    return all(hasattr(plugin, member) for member in named.MEMBERS)


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


def gather_terms(loss: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a loss with every term of it in `terms`.

    Options of terms may also be given, and were saved, as keys of the loss itself, by the names
    that the terms declare as `flat_keys`; there a weight of 0 or null means no term.
    """
    found = dict(loss)
    try:
        known = getattr(load_plugin(LossConfig.model_construct(name=found["name"])), "Config", None)
    except (KeyError, UserError):  # said where the class is needed
        return found
    if "terms" not in getattr(known, "model_fields", {}):
        return found
    explicit = found.get("terms") or {}
    if not isinstance(explicit, Mapping):
        return found  # reported with its type
    terms: dict[str, Any] = {"halting": {}} | dict(explicit)
    for name in short_names(LossTermConfig.PREFIX):
        flat = load_plugin(LossTermConfig.model_construct(name=name)).flat_keys
        given = {option: found.pop(key) for key, option in flat.items() if key in found}
        if not given:
            continue
        absent = "weight" in given and all(not value for value in given.values())
        if (absent and explicit.get(name)) or (name in explicit and explicit[name] is None):
            keys = ", ".join(f"arch.loss.{key}" for key in flat)
            raise UserError(
                f"arch.loss.terms.{name}={explicit[name]} clashes with an older key for the same "
                f"({keys}): leave one of them out"
            )
        if absent:
            continue
        # a base whose weight is 0 lacks one
        own = {k: v for k, v in given.items() if v is not None and (k != "weight" or v)}
        terms[name] = {**(terms.get(name) or {}), **own}
    return found | {"terms": terms}


def checkpoint_options(loss: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (term, option) of every option of a loss's terms that names a checkpoint, by
    `"checkpoint": True` in its declaration."""
    found = []
    for name, options in (loss.get("terms") or {}).items():
        if options is None:
            continue
        model = load_plugin(LossTermConfig.model_construct(**{"name": name} | options)).Config
        for option, field in model.model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("checkpoint") and options.get(option):
                found.append((name, option))
    return found

"""Plug-ins that the config names, and the options that they declare.

A class declares its options by a pydantic model, its attribute `Config`; a function by the
annotation of its third parameter.
"""

import inspect
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pydantic
from omegaconf import DictConfig
from pydantic.fields import FieldInfo

from utils.config.errors import coerced
from utils.config.schema import (
    ArchConfig,
    Component,
    EvaluatorConfig,
    Folders,
    LoggerConfig,
    LossConfig,
    LossTermConfig,
    OptimizerConfig,
    ScheduleConfig,
)
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


class Named(NamedTuple):
    """A plug-in that a config names: its full key, its name, its options as given, its kind."""

    where: str
    name: str
    options: Mapping[str, Any]
    kind: type[Component]


def named_plugins(config: Mapping[str, Any]) -> Iterator[Named]:
    """Yield the plug-ins that a config names; the schema reports what has no name."""
    arch = _mapping(config.get("arch"))
    loss = _mapping(arch.get("loss"))
    yield from _named("arch", arch, ArchConfig)
    yield from _named("arch.loss", loss, LossConfig)
    for name, options in _mapping(loss.get("terms")).items():
        if isinstance(options, Mapping):
            yield from _named(f"arch.loss.terms.{name}", options, LossTermConfig, name)
    yield from _named("optimizer", config.get("optimizer"), OptimizerConfig)
    yield from _named("lr_schedule", config.get("lr_schedule"), ScheduleConfig)
    lists: dict[str, type[Component]] = {"evaluators": EvaluatorConfig, "logger": LoggerConfig}
    for key, kind in lists.items():
        given = config.get(key)
        for i, one in enumerate(given if isinstance(given, list) else ()):
            yield from _named(f"{key}[{i}]", one, kind)


def _named(
    where: str, given: Any, kind: type[Component], default: str | None = None
) -> Iterator[Named]:
    options = _mapping(given)
    name = given if kind.BARE and isinstance(given, str) else options.get("name", default)
    if isinstance(name, str):
        yield Named(where, name, options, kind)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def find_plugin(name: str, kind: type[Component]) -> Any:
    """Return the class or function of this name; raise UserError, naming the nearest there is."""
    return load_named(name, kind.PREFIX, kind.KIND)


def load_plugin(named: Component) -> Any:
    """Return what a component of the config names; as `find_plugin` otherwise."""
    return find_plugin(named.name, type(named))


def find_plugin_of_kind(identifier: str, kind: type[Component]) -> Any:
    """Return what `find_plugin` does; raise UserError, naming those of the right kind in the same
    module, where the class is of another kind than its key needs."""
    found = find_plugin(identifier, kind)
    if _is_one(found, kind):
        return found
    module = sys.modules[found.__module__]
    own = [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and _is_one(value, kind)
    ]
    bases = [base for base in found.__mro__[1:-1] if base.__module__ != found.__module__]
    what = f"a {bases[0].__name__}, " if bases else ""
    raise UserError(
        f"'{identifier}' is {what}not {kind.NOUN}; {identifier.partition('@')[0]} has: "
        + (", ".join(own) or "none")
    )


def _is_one(plugin: Any, kind: type[Component]) -> bool:
    return all(hasattr(plugin, member) for member in kind.MEMBERS)


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
        known = getattr(find_plugin(found["name"], LossConfig), "Config", None)
    except (KeyError, UserError):  # said where the class is needed
        return found
    if "terms" not in getattr(known, "model_fields", {}):
        return found
    explicit = found.get("terms") or {}
    if not isinstance(explicit, Mapping):
        return found  # reported with its type
    terms: dict[str, Any] = {"halting": {}} | dict(explicit)
    for name in short_names(LossTermConfig.PREFIX):
        flat = find_plugin(name, LossTermConfig).flat_keys
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


def present_name(key: str) -> str:
    """Return the name that a key has now if it is an older one of a loss term's option."""
    for term in short_names(LossTermConfig.PREFIX) if key.startswith("arch.loss.") else ():
        flat = load_plugin(LossTermConfig.model_construct(name=term)).flat_keys
        if (option := flat.get(key.removeprefix("arch.loss."))) is not None:
            return f"arch.loss.terms.{term}.{option}"
    return key


def checkpoint_options(loss: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (term, option) of every option of a loss's terms that names a checkpoint, by
    `"checkpoint": True` in its declaration."""
    found = []
    for named in named_plugins({"arch": {"loss": loss}}):
        if named.kind is LossTermConfig:
            fields = find_plugin(named.name, LossTermConfig).Config.model_fields
            term = named.where.rpartition(".")[2]
            found += [
                (term, option)
                for option, field in fields.items()
                if declared_extra(field, "checkpoint") and named.options.get(option)
            ]
    return found


def declared_extra(field: FieldInfo, name: str) -> Any:
    """Return what a field declares under this name in its `json_schema_extra`."""
    extra = field.json_schema_extra
    return extra.get(name) if isinstance(extra, dict) else None

"""Write the config with every default to a checkpoint, and read configs of earlier versions.

Each key declares whether it may differ when a run is resumed: `on_resume` in its
`json_schema_extra` is "any" or "fixed"; without it, `resume_allow` decides. A key that is newer
than the run gets its default, or the value of `absent` declared in the same place.
"""

import copy
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic.fields import FieldInfo

from utils.config.plugins import (
    declared_extra,
    find_plugin,
    gather_terms,
    named_plugins,
    options_model,
    present_name,
)
from utils.config.schema import PLACEHOLDERS, ArchConfig, Component, PretrainConfig
from utils.config.values import flatten
from utils.core.errors import UserError
from utils.core.functions import MissingModuleError
from utils.core.plugins import PACKAGE, source_copy


def dump_config(config: PretrainConfig) -> dict[str, Any]:
    """Return plain values of all keys, with every default of the architecture and the loss."""
    values = config.model_dump(mode="json")
    values["arch"], _ = _complete_arch(values["arch"])
    return values


def config_yaml(config: PretrainConfig) -> str:
    """Return the result of `dump_config` as YAML, in the same order."""
    return yaml.safe_dump(dump_config(config), sort_keys=False)


def read_arch(saved: Mapping[str, Any]) -> tuple[ArchConfig, list[str]]:
    """Return a saved architecture with its loss, and the names of options that no longer exist.

    saved: the key `arch` of a saved config.
    """
    complete, gone = _complete_arch(saved)
    return ArchConfig.model_validate(complete), gone


def check_plugins_given(saved: Mapping[str, Any], source: Path) -> None:
    """Raise UserError if a saved config names a class from a plug-in that is not active.

    saved: the keys that are needed, and `plugins`. A checkpoint never imports its plug-in
    directories by itself, because it may come from somebody else.
    """
    for named in named_plugins(saved) if saved.get("plugins") else ():
        try:
            find_plugin(named.name, named.kind)
        except MissingModuleError as error:
            folders = ",".join(saved["plugins"])
            raise UserError(
                f"{source} was trained with plugins=[{folders}]: give that too, if you trust what "
                f"is in there, or wherever its '{named.name}' is now ({error})"
            ) from None
        except UserError as error:
            module = named.name.partition("@")[0].replace(".", "/")
            if (copy := source_copy(source, f"{PACKAGE}/{module}.py")) is None:
                raise
            raise UserError(
                f"{source} was trained with '{named.name}', of which it has a copy, {copy}: {error}"
            ) from error


def read_config(saved: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a saved config without the keys that no longer exist, and those keys."""
    values = dict(saved)
    gone = _complete(values, PretrainConfig.model_fields)
    values["arch"], gone_of_arch = _complete_arch(saved["arch"])
    return values, gone + gone_of_arch


def is_valid(key: str, value: Any) -> bool:
    """Return whether a top-level key of the config may have this value."""
    nothing = {"name": "none@None"}
    try:
        PretrainConfig.model_validate({"arch": nothing | {"loss": nothing}, key: value})
    except pydantic.ValidationError:
        return False
    return True


def changed_keys(
    config: PretrainConfig, saved: Mapping[str, Any]
) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """Return the keys that prevent a resume, each with its old and new value, and the saved keys
    that no longer exist.

    Keys that may differ, by their declaration or by `resume_allow`, are not included.
    """
    old, gone = read_config(saved)
    rules = _resume_rules(config)
    before, gone_of_plugins = _comparable(old)
    now, _ = _comparable(dump_config(config))
    allow = set(map(present_name, config.resume_allow))
    changed: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before.keys() | now.keys()):
        parts = key.split(".")
        names = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        if names & changed.keys():
            continue  # options of a plug-in that was replaced
        given = {rules.get(name) for name in names}
        allowed = "any" in given or (names & allow and "fixed" not in given)
        if before.get(key) != now.get(key) and not allowed:
            changed[key] = before.get(key), now.get(key)
    return changed, gone + gone_of_plugins


def _comparable(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a config by full key, with every option of optimizer and schedule, and
    options of these that no longer exist. Their own keys hold their names."""
    shaping = ("optimizer", "lr_schedule")  # the plug-ins that affect training, besides arch
    given = {key: config[key] for key in shaping}
    whole = {k: {"name": v} if isinstance(v, str) else dict(v) for k, v in given.items()}
    gone = _complete_plugins(whole)
    names = {key: whole[key].pop("name") for key in shaping}
    values = flatten({**config, **whole})
    return {key: value for key, value in values.items() if value != {}} | names, gone


def is_fixed(config: PretrainConfig, key: str) -> bool:
    """Return whether this key can never differ on resume, not even by `resume_allow`."""
    rules = _resume_rules(config)
    return "fixed" in {rules.get(name) for name in (key, key.split(".")[0])}


def _resume_rules(config: PretrainConfig) -> dict[str, str]:
    """Return the value of `on_resume` for every key that declares it, by full name."""
    declared = dict(PretrainConfig.model_fields)
    for named in named_plugins(config.model_dump()):
        options = _options_of(named.name, named.kind)
        declared |= {f"{named.where}.{name}": field for name, field in options.items()}
    found = {name: declared_extra(field, "on_resume") for name, field in declared.items()}
    return {name: rule for name, rule in found.items() if rule is not None}


def _complete_arch(arch: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return an architecture and its loss with all defaults, and options that no longer exist."""
    if arch.get("L_layers", 0) is None:  # format 2: as many layers as inner cycles
        arch = {**arch, "L_layers": arch["L_cycles"]}
    whole = copy.deepcopy({**arch, "loss": gather_terms(arch["loss"])})
    gone = _complete_plugins({"arch": whole})
    whole["loss"] = whole.pop("loss")  # last in config.yaml
    return whole, gone


def _complete_plugins(config: Mapping[str, Any]) -> list[str]:
    """Add the defaults of every plug-in in a config, in place; return options that no longer exist,
    which are removed."""
    gone = []
    for named in named_plugins(config):
        if declared := _options_of(named.name, named.kind):  # else its options stay as they are
            gone += _complete(named.options, declared, f"{named.where}.", named.kind.model_fields)
    return gone


def _complete(
    values: Any, declared: Mapping[str, FieldInfo], prefix: str = "", kept: Container[str] = ()
) -> list[str]:
    """Give every declared name a value, in place; remove and return names that are not declared."""
    gone = [name for name in values if name not in declared and name not in kept]
    for name in gone:
        del values[name]
    for name, field in declared.items():
        if name not in values and not field.is_required():
            absent = declared_extra(field, "absent")
            default = field.get_default(call_default_factory=True)
            values[name] = default if absent is None else absent
    return [prefix + name for name in gone]


def _options_of(name: str, kind: type[Component]) -> dict[str, FieldInfo]:
    """Return the options that the plug-in of this name declares and a config may set."""
    try:
        declared = options_model(find_plugin(name, kind), kind)
    except UserError:  # its module no longer exists: reported where the class is needed
        return {}
    fields = declared.model_fields if declared else {}
    return {name: field for name, field in fields.items() if name not in PLACEHOLDERS}

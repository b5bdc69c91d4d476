"""Write the config to a checkpoint with every default, and read those of earlier versions.

Each key declares whether it may differ when a run is resumed: `on_resume` in its
`json_schema_extra` is "any" or "fixed"; without it, `resume_allow` decides. A key that is newer
than a run counts as its default, or as the value `absent` that it declares in the same place.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic.fields import FieldInfo

from utils.config.plugins import gather_terms, load_plugin, options_model
from utils.config.schema import (
    PLACEHOLDERS,
    ArchConfig,
    Component,
    EvaluatorConfig,
    LossConfig,
    LossTermConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
)
from utils.core.errors import UserError
from utils.core.functions import MissingModuleError
from utils.core.plugins import PACKAGE, source_copy

# keys that name a plug-in which shapes the training curve
_PLUGINS: dict[str, type[Component]] = {
    "optimizer": OptimizerConfig,
    "lr_schedule": ScheduleConfig,
}


def dump_config(config: PretrainConfig) -> dict[str, Any]:
    """Return plain values of all keys, with every default of the architecture and the loss."""
    values = config.model_dump(mode="json")
    values["arch"], _ = _complete_arch(values["arch"])
    return values


def config_yaml(config: PretrainConfig) -> str:
    """Return the text of config.yaml: what `dump_config` returns, in its order."""
    return yaml.safe_dump(dump_config(config), sort_keys=False)


def read_arch(saved: Mapping[str, Any]) -> tuple[ArchConfig, list[str]]:
    """Return a saved architecture with its loss, and the names of options that no longer exist.

    saved: the key `arch` of a saved config.
    """
    complete, gone = _complete_arch(saved)
    return ArchConfig.model_validate(complete), gone


def check_plugins_given(saved: Mapping[str, Any], source: Path) -> None:
    """Raise UserError where a saved config names a class of a plug-in that is not in use.

    saved: the keys that are needed of it, and `plugins`. A checkpoint never imports the directories
    that it was trained with by itself: it may come from somebody else.
    """
    if not saved.get("plugins"):
        return
    arch = saved.get("arch", {})
    named: list[tuple[Any, type[Component]]] = [(arch, ArchConfig), (arch.get("loss"), LossConfig)]
    terms = ((arch.get("loss") or {}).get("terms") or {}).items()
    named += [((options or {}).get("name", name), LossTermConfig) for name, options in terms]
    named += [(evaluator, EvaluatorConfig) for evaluator in saved.get("evaluators", ())]
    for given, kind in named:
        name = given.get("name") if isinstance(given, Mapping) else given
        if name is None:
            continue
        try:
            load_plugin(kind.model_construct(name=name))
        except MissingModuleError as error:
            folders = ",".join(saved["plugins"])
            raise UserError(
                f"{source} was trained with plugins=[{folders}]: give that too, if you trust what "
                f"is in there, or wherever its '{name}' is now ({error})"
            ) from None
        except UserError as error:
            module = name.partition("@")[0].replace(".", "/")
            if (copy := source_copy(source, f"{PACKAGE}/{module}.py")) is None:
                raise
            raise UserError(
                f"{source} was trained with '{name}', of which it has a copy, {copy}: {error}"
            ) from error


def read_config(saved: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a saved config's values of the keys that exist now, and the keys that do not."""
    known = PretrainConfig.model_fields
    values, gone = _complete(saved, known)
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
    old, gone_of_plugins = _complete_plugins(old)
    before, now = _flatten(old), _flatten(_complete_plugins(dump_config(config))[0])
    changed: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before.keys() | now.keys()):
        parts = key.split(".")
        names = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        if names & changed.keys():
            continue  # options of a plug-in that was replaced
        given = {rules.get(name) for name in names}
        allowed = "any" in given or (names & set(config.resume_allow) and "fixed" not in given)
        if before.get(key) != now.get(key) and not allowed:
            changed[key] = before.get(key), now.get(key)
    return changed, gone + gone_of_plugins


def is_fixed(config: PretrainConfig, key: str) -> bool:
    """Return whether this key can never differ on resume, not even by `resume_allow`."""
    rules = _resume_rules(config)
    return "fixed" in {rules.get(name) for name in (key, key.split(".")[0])}


def _resume_rules(config: PretrainConfig) -> dict[str, str]:
    """Return `on_resume` of every key that declares it, by full name."""
    arch, loss = config.arch.name, config.arch.loss.name
    declared = {name: field for name, field in PretrainConfig.model_fields.items()}
    declared |= {f"arch.{name}": field for name, field in _options_of(arch).items()}
    declared |= {f"arch.loss.{name}": field for name, field in _options_of(loss).items()}
    for name, given in (config.arch.loss.options.get("terms") or {}).items():
        options = _options_of((given or {}).get("name", name), LossTermConfig)
        declared |= {f"arch.loss.terms.{name}.{key}": field for key, field in options.items()}
    for key in _PLUGINS:
        options = _options_of(getattr(config, key).name, _PLUGINS[key])
        declared |= {f"{key}.{name}": field for name, field in options.items()}
    found = {name: _extra(field, "on_resume") for name, field in declared.items()}
    return {name: rule for name, rule in found.items() if rule is not None}


def _complete_arch(arch: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return an architecture and its loss with their defaults, and options that no longer exist."""
    if arch.get("L_layers", 0) is None:  # format 2: as many layers as inner cycles
        arch = {**arch, "L_layers": arch["L_cycles"]}
    loss = gather_terms(arch["loss"])
    loss, gone = _complete(loss, _options_of(loss["name"]), "arch.loss.")
    for name, options in (loss.get("terms") or {}).items():
        if options is not None:
            declared = _options_of(options.get("name", name), LossTermConfig)
            loss["terms"][name], gone_of_term = _complete(
                options, declared, f"arch.loss.terms.{name}."
            )
            gone += gone_of_term
    whole, gone_of_arch = _complete(
        {name: value for name, value in arch.items() if name != "loss"},
        _options_of(arch["name"]),
        "arch.",
    )
    whole["loss"] = loss
    return whole, gone_of_arch + gone


def _complete_plugins(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a config with the options of optimizer and schedule beside their names, as keys
    `optimizer.option`, defaults included; and the options that no longer exist."""
    found, gone = dict(values), []
    for key, kind in _PLUGINS.items():
        given = {"name": values[key]} if isinstance(values[key], str) else values[key]
        options, gone_of_plugin = _complete(given, _options_of(given["name"], kind), f"{key}.")
        found[key] = options.pop("name")
        found |= {f"{key}.{name}": value for name, value in options.items()}
        gone += gone_of_plugin
    return found, gone


def _complete(
    saved: Mapping[str, Any], declared: Mapping[str, FieldInfo], prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Return `saved` with a value for every declared name, and its names that are not declared.

    A class without `Config` declares nothing: its options stay as they are.
    """
    values, gone = dict(saved), []
    for name in list(values) if declared else ():
        if name not in declared and name != "name":
            values.pop(name)
            gone.append(prefix + name)
    for name, field in declared.items():
        if name not in values and not field.is_required():
            absent = _extra(field, "absent")
            default = field.get_default(call_default_factory=True)
            values[name] = default if absent is None else absent
    return values, gone


def _options_of(name: str, kind: type[Component] = ArchConfig) -> dict[str, FieldInfo]:
    """Return the options that the plug-in of this name declares and a config may set."""
    try:
        declared = options_model(load_plugin(kind.model_construct(name=name)), kind)
    except UserError:  # its module no longer exists: reported where the class is needed
        return {}
    fields = declared.model_fields if declared else {}
    return {name: field for name, field in fields.items() if name not in PLACEHOLDERS}


def _extra(field: FieldInfo, name: str) -> Any:
    extra = field.json_schema_extra
    return extra.get(name) if isinstance(extra, dict) else None


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings as {"arch.loss.name": value}."""

    def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from leaves(item, f"{name}.{key}" if name else key)
        else:
            yield name, value

    return dict(leaves(tree, ""))

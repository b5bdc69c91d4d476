"""Compose and check the configuration: the public interface of this package.

`load_config` collects every problem before it raises, so that a user with three mistakes reads one
list. Nothing here uses a device or opens data.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import pydantic
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from utils.config.checks import Context, clashes, config_warnings, divided_by_ranks
from utils.config.errors import clashes_within, coerced, did_you_mean, problems_of
from utils.config.hydra_entry import compose_config, hydra_entry
from utils.config.plugins import (
    Named,
    find_plugin_of_kind,
    gather_terms,
    named_plugins,
    options_model,
    use_configured_plugins,
)
from utils.config.schema import PLACEHOLDERS, PretrainConfig
from utils.config.values import decode_keys
from utils.core.errors import UserError

__all__ = [
    "PretrainConfig",
    "check_ranks",
    "compose_config",
    "config_warnings",
    "hydra_entry",
    "load_config",
]


def load_config(cfg: DictConfig | Mapping[str, Any], world_size: int = 1) -> PretrainConfig:
    """Check a composed config and convert it to `PretrainConfig`.

    world_size: number of ranks, of which batch sizes must be multiples. Raises a UserError that
    lists every problem: unknown keys with the nearest valid one, wrong types, values out of range,
    conflicting values.
    """
    raw = _plain(cfg)
    use_configured_plugins(raw)
    raw = _with_terms(raw)
    fields = PretrainConfig.model_fields
    defaults = {key: field.default for key, field in fields.items() if not field.is_required()}
    checks = {named.where: _PluginCheck(named) for named in named_plugins(defaults | raw)}
    everywhere = [*fields, *(key for check in checks.values() for key in check.full_keys())]

    config, problems, faulty = _validate_schema(raw, everywhere)
    validated: dict[str, dict[str, Any]] = {}
    for where, check in checks.items():
        lines, validated[where] = check.check(raw, everywhere)
        problems += lines
    context = Context(
        config,
        world_size,
        arch=validated.get("arch", {}),
        optimizer=checks["optimizer"].plugin if "optimizer" in checks else None,
    )
    problems += clashes(context, faulty)

    if problems:
        raise UserError(_listing(problems))
    return config


def check_ranks(config: PretrainConfig, world_size: int) -> None:
    """Raise UserError if the batches cannot be split over this number of ranks.

    `load_config` checks the number known before launch; under PyTorch/XLA only replicas know it.
    """
    problems = divided_by_ranks(Context(config, world_size))
    if problems:
        raise UserError(_listing(problems))


def _listing(problems: list[str]) -> str:
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        return problems[0]
    return f"the configuration has {len(problems)} problems:" + "".join(
        f"\n  - {line}" for line in problems
    )


def _plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return the config as dicts and lists, with interpolations resolved."""
    if not isinstance(cfg, DictConfig):
        return copy.deepcopy(dict(cfg))
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key, reason = error.full_key or "the config", str(error).splitlines()[0]
        if isinstance(error, MissingMandatoryValue):
            raise UserError(f"{key} has no value yet (???): set {key}=...") from error
        if isinstance(error, InterpolationKeyError):
            raise UserError(f"{key} refers to a key that does not exist: {reason}") from error
        raise UserError(f"{key} cannot be read: {reason}") from error
    assert isinstance(plain, dict)
    return {key: value for key, value in decode_keys(plain).items() if key != "hydra"}


def _with_terms(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the config with the terms of its loss gathered in `arch.loss.terms`."""
    arch = raw.get("arch")
    if isinstance(arch, Mapping) and isinstance(loss := arch.get("loss"), Mapping):
        return raw | {"arch": dict(arch) | {"loss": gather_terms(loss)}}
    return raw


def _validate_schema(
    raw: dict[str, Any], everywhere: list[str]
) -> tuple[PretrainConfig, list[str], set[str]]:
    """Return the config, its problems, and the top-level keys at fault, which hold defaults."""
    try:
        return PretrainConfig.model_validate(raw), [], set()
    except pydantic.ValidationError as error:
        problems = problems_of(error, PretrainConfig, everywhere=everywhere)
        faulty = {str(item["loc"][0]) for item in error.errors(include_url=False)}
    rest = {key: value for key, value in raw.items() if key not in faulty}
    rest.setdefault("arch", {"name": "none@None", "loss": {"name": "none@None"}})
    return PretrainConfig.model_validate(rest), problems, faulty


class _PluginCheck:
    """Checks the options of one plug-in of the config against its declaration."""

    def __init__(self, named: Named):
        self.where, self.kind = named.where, named.kind
        self.options = {k: v for k, v in named.options.items() if k not in ("name", "loss")}
        self.plugin: Any = None
        self.problem: str | None = None
        try:
            self.plugin = find_plugin_of_kind(named.name, named.kind)
        except UserError as error:
            self.problem = f"{self.where}{'' if self.kind.BARE else '.name'}: {error}"
        self.model = options_model(self.plugin, self.kind) if self.plugin is not None else None

    def names(self) -> list[str] | None:
        """Return the names of the options that a user may give; None if any."""
        if self.plugin is None:
            return []
        if self.model is not None:
            return [name for name in self.model.model_fields if name not in PLACEHOLDERS]
        parameters = list(inspect.signature(self.plugin).parameters.values())
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        own = parameters[self.kind.FIRST_ARGUMENTS :]
        return [p.name for p in own if p.kind is not p.VAR_POSITIONAL]

    def full_keys(self) -> list[str]:
        """Return the full names of the options and of `name`."""
        return [] if self.plugin is None else self._full(["name", *(self.names() or [])])

    def _full(self, names: list[str]) -> list[str]:
        return [f"{self.where}.{name}" for name in names]

    def check(
        self, raw: Mapping[str, Any], everywhere: list[str]
    ) -> tuple[list[str], dict[str, Any]]:
        """Return problems, and the options with their defaults, or {} if they are not valid."""
        if self.problem is not None:
            return [self.problem], {}
        if self.model is None:
            known, unknown = self._full(self.names() or []), list[str]()
            if self.where != "arch" and self.names() is not None:
                unknown = [key for key in self._full([*self.options]) if key not in known]
            lines = [f"unknown key '{k}': {did_you_mean(k, known, known)}" for k in unknown]
            return lines, dict(self.options)
        placeholders = {k: v for k, v in PLACEHOLDERS.items() if k in self.model.model_fields}
        source = "the data" if self.where == "arch" else "the key of that name"
        problems = [
            f"{key} is set by {source}: remove it"
            for key in self._full([name for name in placeholders if name in self.options])
        ]
        given = {k: raw[k] for k in placeholders if isinstance(raw.get(k), int)}
        data = coerced(self.model, {**self.options, **placeholders, **given})
        try:
            return problems, self.model.model_validate(data, strict=True).model_dump()
        except pydantic.ValidationError as error:
            lines = problems_of(error, self.model, self.where, everywhere)
            faulty = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
        lines += [f"{self.where}: {line}" for line in clashes_within(self.model, data, faulty)]
        return problems + lines, {}

"""Compose and check the configuration: the public interface of this package.

`load_config` collects every problem before it raises, so that a user with three mistakes reads one
list. Nothing here uses a device or opens data.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from utils.config.checks import Context, clashes, config_warnings, divided_by_ranks
from utils.config.errors import clashes_within, coerced, did_you_mean, problems_of
from utils.config.hydra_entry import compose_config, hydra_entry
from utils.config.plugins import (
    gather_terms,
    load_plugin_of_kind,
    options_model,
    use_configured_plugins,
)
from utils.config.schema import (
    PLACEHOLDERS,
    ArchConfig,
    Component,
    EarlyStoppingConfig,
    EvaluatorConfig,
    LoggerConfig,
    LossConfig,
    LossTermConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
)
from utils.config.values import decode_keys
from utils.core.errors import UserError

__all__ = [
    "ArchConfig",
    "EarlyStoppingConfig",
    "EvaluatorConfig",
    "LossConfig",
    "PretrainConfig",
    "check_ranks",
    "compose_config",
    "config_warnings",
    "hydra_entry",
    "load_config",
]


def load_config(cfg: DictConfig | Mapping[str, Any], world_size: int = 1) -> PretrainConfig:
    """Check a composed config and return it typed.

    world_size: number of ranks, which batch sizes must be multiples of. Raises UserError that lists
    every problem: unknown keys with the nearest valid one, wrong types, values out of range, values
    that clash.
    """
    raw = _plain(cfg)
    use_configured_plugins(raw)
    raw = _with_terms(raw)
    components = list(_components(raw))
    everywhere = [*PretrainConfig.model_fields]
    for component in components:
        everywhere += component.keys()

    config, problems, faulty = _validate_schema(raw, everywhere)
    validated: dict[str, dict[str, Any]] = {}
    for component in components:
        lines, options = component.check(raw, everywhere)
        problems += lines
        validated[component.where] = options
    context = Context(
        config,
        world_size,
        arch=validated.get("arch", {}),
        optimizer=next((c.plugin for c in components if c.where == "optimizer"), None),
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
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} has no value yet (???): give {error.full_key}=..."
        ) from error
    except InterpolationKeyError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{error.full_key} refers to a key that does not exist: {reason}"
        ) from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{error.full_key or 'the config'} cannot be read: {reason}") from error
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
        problems = problems_of(error, PretrainConfig, raw, everywhere=everywhere)
        faulty = {str(item["loc"][0]) for item in error.errors(include_url=False)}
    rest = {key: value for key, value in raw.items() if key not in faulty}
    rest.setdefault("arch", {"name": "none@None", "loss": {"name": "none@None"}})
    return PretrainConfig.model_validate(rest), problems, faulty


class _ComponentCheck:
    """Checks the options of one `module@Class` in the config by what that class declares."""

    def __init__(self, where: str, given: str | Mapping[str, Any], kind: type[Component]):
        self.where, self.kind = where, kind  # where: its full key, such as arch.loss
        options = {"name": given} if isinstance(given, str) else given
        self.options = {k: v for k, v in options.items() if k not in ("name", "loss")}
        self.placeholders: dict[str, Any] = {}
        self.plugin: Any = None
        self.model: type[pydantic.BaseModel] | None = None
        self.problem: str | None = None
        try:
            self.plugin = load_plugin_of_kind(kind.model_construct(name=options["name"]))
        except UserError as error:
            self.problem = f"{where if isinstance(given, str) else f'{where}.name'}: {error}"
            return
        self.model = model = options_model(self.plugin, kind)
        if model is not None:
            self.placeholders = {k: v for k, v in PLACEHOLDERS.items() if k in model.model_fields}

    def keys(self) -> list[str]:
        """Return the full names of the options that the class accepts."""
        if self.problem is not None:
            return []
        if self.model is not None:
            names = [name for name in self.model.model_fields if name not in self.placeholders]
        else:
            names = list(self._arguments() or [])
        return [f"{self.where}.{name}" for name in ["name", *names]]

    def check(
        self, raw: Mapping[str, Any], everywhere: list[str]
    ) -> tuple[list[str], dict[str, Any]]:
        """Return problems, and the options with their defaults, or {} if they are not valid."""
        if self.problem is not None:
            return [self.problem], {}
        if self.model is None:
            return self._check_arguments(), dict(self.options)
        source = "the data" if self.where == "arch" else "the key of that name"
        problems = [
            f"{self.where}.{name} is set by {source}: remove it"
            for name in self.placeholders
            if name in self.options
        ]
        given = {k: raw[k] for k in ("seq_len", "vocab_size") if isinstance(raw.get(k), int)}
        sizes = {k: given.get(k, v) for k, v in self.placeholders.items()}
        data = {**self.options, **sizes}
        lines, options = self._validate(data, everywhere)
        return problems + lines, options

    def _validate(
        self, data: dict[str, Any], everywhere: list[str]
    ) -> tuple[list[str], dict[str, Any]]:
        assert self.model is not None
        data = coerced(self.model, data)
        try:
            return [], self.model.model_validate(data, strict=True).model_dump()
        except pydantic.ValidationError as error:
            lines = problems_of(error, self.model, data, self.where, everywhere)
            faulty = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
        lines += [f"{self.where}: {line}" for line in clashes_within(self.model, data, faulty)]
        return list(dict.fromkeys(lines)), {}

    def _arguments(self) -> list[str] | None:
        """Return the names of the constructor's own options; None if it accepts any."""
        parameters = list(inspect.signature(self.plugin).parameters.values())
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        own = parameters[self.kind.FIRST_ARGUMENTS :]
        return [p.name for p in own if p.kind is not p.VAR_POSITIONAL]

    def _check_arguments(self) -> list[str]:
        if self.where == "arch" or (names := self._arguments()) is None:
            return []
        siblings = [f"{self.where}.{name}" for name in names]
        return [
            f"unknown key '{self.where}.{name}': "
            f"{did_you_mean(f'{self.where}.{name}', siblings, siblings)}"
            for name in self.options
            if name not in names
        ]


def _components(raw: Mapping[str, Any]) -> Iterator[_ComponentCheck]:
    """Yield the components that the config names; the schema reports those without a name."""

    def named(where: str, given: Any, kind: type[Component]) -> Iterator[_ComponentCheck]:
        name = given.get("name") if isinstance(given, Mapping) else given
        if isinstance(name, str) and (kind.BARE or given is not name):
            yield _ComponentCheck(where, given, kind)

    arch = raw.get("arch")
    if isinstance(arch, Mapping):
        yield from named("arch", arch, ArchConfig)
        yield from named("arch.loss", loss := arch.get("loss"), LossConfig)
        terms = loss.get("terms") if isinstance(loss, Mapping) else None
        for name, given in terms.items() if isinstance(terms, Mapping) else ():
            if isinstance(given, Mapping):
                yield from named(f"arch.loss.terms.{name}", {"name": name, **given}, LossTermConfig)
    kind: type[Component]
    for key, kind in (("optimizer", OptimizerConfig), ("lr_schedule", ScheduleConfig)):
        yield from named(key, raw.get(key, PretrainConfig.model_fields[key].default), kind)
    for key, kind in (("evaluators", EvaluatorConfig), ("logger", LoggerConfig)):
        several = raw.get(key)
        for i, given in enumerate(several if isinstance(several, list) else []):
            yield from named(f"{key}[{i}]", given, kind)

"""Hydra, with the sentences that a user of Athena should read.

Hydra answers a typo with a stack of exceptions and stops at the first. So overrides of single
keys are handed to it as `++key=value`, which it always accepts, and `load_config` then reports
every unknown key at once; `run_name=x` and `+run_name=x` become the same thing on the way.
What Hydra still refuses (a preset that does not exist, broken grammar) is put into one sentence.
"""

import functools
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic_core import PydanticUndefined

from utils.config.errors import did_you_mean, expected, show
from utils.config.schema import ArchConfig, PretrainConfig
from utils.config.values import hydra_override
from utils.core.console import check_decoded, guarded_output
from utils.core.errors import UserError
from utils.core.functions import load_class, nearest

CONFIG_DIR = Path(__file__).resolve().parents[2] / "config"
CONFIG_NAME = "cfg_pretrain"
SWEEPS = Path("checkpoints/sweeps")  # as hydra.sweep.dir says
_HYDRA_VERSION = "1.3"  # the behaviour asked of Hydra; from 1.2 on it keeps the working directory

_ASSIGNMENT = re.compile(r"(?P<plus>\+{0,2})(?P<key>[A-Za-z_]\w*(\.\w+)*)=(?P<value>.*)", re.DOTALL)
# Hydra's flags; those with True are followed by a value.
_FLAGS = {
    "--help": False,
    "-h": False,
    "--hydra-help": False,
    "--version": False,
    "--cfg": True,
    "-c": True,
    "--resolve": False,
    "--package": True,
    "-p": True,
    "--run": False,
    "-r": False,
    "--multirun": False,
    "-m": False,
    "--shell-completion": False,
    "-sc": False,
    "--config-path": True,
    "-cp": True,
    "--config-name": True,
    "-cn": True,
    "--config-dir": True,
    "-cd": True,
    "--experimental-rerun": True,
    "--info": False,
    "-i": False,
}


def compose_config(overrides: list[str], config_name: str = CONFIG_NAME) -> DictConfig:
    """Compose the config of `python pretrain.py <overrides>`, without checking it.

    overrides: `--config-dir DIRECTORY` among them adds presets, as for pretrain.py.
    Raises UserError for overrides that Hydra cannot read and for presets that do not exist.
    """
    given, folders = split_config_dirs(overrides)
    overrides = _normalised(given, _groups([CONFIG_DIR, *folders]), sweep=False)
    if folders:
        places = ",".join(_quoted(f"file://{folder.absolute()}") for folder in folders)
        overrides.append(f"hydra.searchpath=[{places}]")
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base=_HYDRA_VERSION):
            cfg = hydra.compose(config_name, overrides)
            _check_plugins(cfg, given)
            return cfg
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    finally:
        GlobalHydra.instance().hydra = before


def hydra_entry(fn: Callable[[DictConfig], Any]) -> Callable[[], Any]:
    """Make `fn(cfg)` a command: `fn` decorated is called without arguments and reads sys.argv.

    A UserError, from the command line or from `fn`, ends in its sentence and exit status 2;
    any other exception keeps its traceback.
    """

    @functools.wraps(fn)
    @guarded_output()
    def main() -> Any:
        try:
            check_decoded(sys.argv)
            arguments = _arguments(sys.argv[1:])
            if any(flag in arguments for flag in ("--help", "-h")):
                print(help_text(Path(sys.argv[0]).name))
                return None
            return _run_hydra(_ending_in_a_sentence(fn, arguments), arguments)
        except UserError as error:
            _end(str(error))
        except (HydraException, OmegaConfBaseException) as error:
            _end(explain(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            raise SystemExit(128 + signal.SIGINT) from None

    return main


def _ending_in_a_sentence(
    fn: Callable[[DictConfig], Any], arguments: list[str]
) -> Callable[[DictConfig], Any]:
    """Return `fn` with its UserErrors turned into an exit before Hydra announces them."""

    @functools.wraps(fn)
    def task(cfg: DictConfig) -> Any:
        try:
            _check_plugins(cfg, arguments)
            return fn(cfg)
        except UserError as error:
            _end(str(error))

    return task


def _run_hydra(fn: Callable[[DictConfig], Any], arguments: list[str]) -> Any:
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    # Asks Hydra to let exceptions through instead of printing its own view of them and exiting.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        decorate = hydra.main(
            config_path=str(CONFIG_DIR), config_name=CONFIG_NAME, version_base=_HYDRA_VERSION
        )
        return decorate(fn)()
    finally:
        sys.argv = argv
        if full_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def _end(sentence: str) -> NoReturn:
    """Print `sentence` and exit with status 2."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # All ranks of a node make the same mistake. Rank 0 tells it; the launcher ends the
        # others as soon as one exits, so give rank 0 the time to speak.
        time.sleep(3)
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# --- the command line ---------------------------------------------------------------------


def _groups(folders: list[Path]) -> set[str]:
    """Names of the config groups: the sub-folders of the config folders."""
    return {
        path.name
        for folder in folders
        if folder.is_dir()
        for path in folder.iterdir()
        if path.is_dir()
    }


def _check_plugins(cfg: DictConfig, overrides: list[str]) -> None:
    """Raise UserError where a preset names directories of code: those are the user's to choose."""
    if cfg.get("plugins") and not any(re.match(r"\+*plugins=", given) for given in overrides):
        raise UserError(
            f"a preset sets plugins={show(list(cfg.plugins))}, which only the "
            "command line may: remove it there and give plugins=[...] with the command"
        )


def _quoted(text: str) -> str:
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", text) + "'"


def split_config_dirs(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Return the arguments without `--config-dir DIRECTORY`, and those directories.

    Raises UserError for a path that is not a directory.
    """
    rest, folders = [], []
    tokens = iter(arguments)
    for token in tokens:
        flag, sign, value = token.partition("=")
        if flag not in ("--config-dir", "-cd"):
            rest.append(token)
            continue
        folders.append(Path(value if sign else next(tokens, "")).expanduser())
        if not folders[-1].is_dir():
            raise UserError(f"{flag} {folders[-1]} is not a directory: name one that holds presets")
    return rest, folders


def _arguments(argv: list[str]) -> list[str]:
    """Flags first, then overrides in a form that Hydra accepts.

    Raises UserError for a flag that does not exist, because argparse would answer it with a
    page of Hydra's usage.
    """
    flags, overrides, folders = [], [], [CONFIG_DIR]
    tokens = iter(argv)
    for token in tokens:
        if not token.startswith("-"):
            overrides.append(token)
            continue
        flag, _, value = token.partition("=")
        if flag not in _FLAGS:
            raise UserError(_unknown_flag(flag, value))
        flags.append(token)
        if _FLAGS[flag] and not value:
            value = next(tokens, "")
            flags.append(value)
        if flag in ("--config-dir", "-cd", "--config-path", "-cp"):
            folders.append(Path(value))
    groups = _groups(folders)
    if any(flag in ("--cfg", "-c") for flag in flags):
        _refuse_unknown(overrides, groups)
    sweep = any(flag in ("--multirun", "-m") for flag in flags)
    given = _normalised(overrides, groups, sweep)
    if sweep and not any("hydra.sweep.dir=" in override for override in overrides):
        given += _record_elsewhere()
    return flags + given


def _record_elsewhere() -> list[str]:
    """Put Hydra's record of a sweep into a temporary folder where its usual one cannot be made."""
    try:
        SWEEPS.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=SWEEPS).close()
        return []
    except OSError as error:
        reason = f"{SWEEPS.absolute()} cannot be written ({error.strerror or error})"
    try:
        folder = tempfile.mkdtemp(prefix="sweep_")
    except OSError as error:
        raise UserError(
            f"{reason}, nor a temporary folder ({error.strerror or error}); name one for Hydra's "
            "record of the sweep with hydra.sweep.dir=<folder>"
        ) from None
    print(f"note: {reason}; Hydra's record of the sweep is in {folder}", file=sys.stderr)
    return [f"hydra.sweep.dir={folder}"]


def _refuse_unknown(overrides: list[str], groups: set[str]) -> None:
    """For --cfg, which prints the config without a check of it."""
    keys = list(PretrainConfig.model_fields)
    for match in filter(None, map(_ASSIGNMENT.fullmatch, overrides)):
        key = _full(match["key"]).split(".")[0]
        if key not in (*keys, *groups, "hydra"):
            raise UserError(f"unknown key '{key}': {did_you_mean(key, keys, keys)}")


def _unknown_flag(flag: str, value: str) -> str:
    key = flag.lstrip("-").replace("-", "_")
    if key.split(".")[0] in PretrainConfig.model_fields:
        return f"unknown flag '{flag}': keys are given without dashes, {key}={value or '<value>'}"
    near = nearest(flag, [name for name in _FLAGS if name.startswith("--")])
    advice = f"did you mean '{near}'?" if near else "keys are given without dashes, key=value"
    return f"unknown flag '{flag}': {advice}"


def _full(key: str) -> str:
    """`loss.kl_to` is short for `arch.loss.kl_to`."""
    return f"arch.{key}" if key.startswith("loss.") else key


def _normalised(overrides: list[str], groups: set[str], sweep: bool) -> list[str]:
    """`key=value`, `+key=value` -> `++key=value`; `+group=preset` -> `group=preset`.

    Values of keys are put into Hydra's grammar where they are not.
    `group=null` is dropped: it is the default, which Hydra cannot be told again.
    """
    found = []
    for override in overrides:
        match = _ASSIGNMENT.fullmatch(override)
        key = _full(match["key"]) if match else ""
        if match is None or key.split(".")[0] == "hydra":
            found.append(override)  # hydra/..., ~key, group@package: Hydra's own
        elif key not in groups:
            found.append(hydra_override(key, match["value"], sweep))
        elif match["value"] == "null" and key == "arch":
            raise UserError(
                "arch=null: a run needs an architecture, " + ", ".join(_presets("arch"))
            )
        elif match["value"] != "null":
            found.append(f"{key}={match['value']}")
    return found


# --- sentences ----------------------------------------------------------------------------


def explain(error: BaseException) -> str:
    """One sentence for an exception of Hydra or OmegaConf."""
    if isinstance(error, MissingConfigException):
        return _explain_missing(error)
    if isinstance(error, OverrideParseException):
        return _explain_grammar(error)
    cause = error.__cause__
    text = str(error).strip() or str(cause or "").strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return f"the config cannot be composed ({type(error).__name__})"
    ambiguous = re.match(r"Ambiguous value for argument '\+*(.*?)=(.*)'", lines[0])
    if ambiguous:
        key, value = ambiguous.groups()
        return f"{key}={value} is ambiguous: write a list as '{key}=[{value}]', or add -m to sweep"
    sweep = re.match(r"Sweep parameters '\+*(.*)' requires --multirun", lines[0])
    if sweep:
        return f"'{sweep[1]}' is a sweep: add -m, or quote the value"
    override = re.match(r"Could not override '\+*(.*?)'", lines[0])
    if override and override[1].startswith("hydra."):
        return f"Hydra has no key '{override[1]}': --cfg hydra lists its keys"
    if override:
        groups = ", ".join(sorted(_groups([CONFIG_DIR])))
        return f"there is no config group '{override[1]}': there are {groups}"
    return lines[0]


def _explain_missing(error: MissingConfigException) -> str:
    name = (error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, preset = name.rpartition("/")
    if not group:
        if not name:
            return str(error).splitlines()[0]
        configs = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))
        return f"there is no config '{name}': there are {', '.join(configs)}"
    presets = sorted(error.options or _presets(group))
    if not presets:
        groups = sorted(_groups([CONFIG_DIR]))
        return f"there is no config group '{group}': there are {', '.join(groups)}"
    near = nearest(preset, presets)
    advice = f"did you mean '{group}={near}'? " if near else ""
    return f"there is no preset '{group}={preset}': {advice}Presets: {', '.join(presets)}"


def _explain_grammar(error: OverrideParseException) -> str:
    override = re.sub(r"^\++", "", error.override)
    if "=" not in override:
        return (
            f"cannot read '{override}': overrides are key=value, without spaces around '='; "
            "put quotes around a value with spaces"
        )
    key, _, value = override.partition("=")
    for opening, closing in ("[]", "{}"):
        if value.startswith(opening) and not value.endswith(closing):
            return (
                f"cannot read '{override}': the '{opening}' has no '{closing}'; write it without "
                f"spaces, or in quotes: '{key}={opening}...{closing}'"
            )
    return (
        f"cannot read '{override}': the value of {key} breaks Hydra's grammar; quote it as "
        f"'{key}=\"{value}\"', and write lists as '{key}=[a,b]'"
    )


# --- help -----------------------------------------------------------------------------------


def _presets(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def help_text(program: str = "pretrain.py") -> str:
    """What `--help` prints: usage, the groups with their presets, every key with its default."""
    lines = [
        "Pretrain a recursive-reasoning language model.",
        "",
        f"usage: python {program} [key=value ...] [-m] [--cfg job] [--hydra-help]",
        f"  e.g. python {program} data_paths=[data/my_corpus] arch=athena_trm_small lr=1e-4",
        "",
        "groups (group=preset):",
    ]
    for group in sorted(_groups([CONFIG_DIR])):
        lines.append(f"  {group:<11} {', '.join(_presets(group))}")
    lines += ["", "keys (key=value), with their defaults:", *_key_lines()]
    cfg = compose_config([])
    lines += ["", "options of the default architecture, athena_trm_large (arch.<option>=value):"]
    arch = OmegaConf.to_container(cfg.arch, resolve=True)
    meanings = _arch_meanings(arch)
    lines += [
        f"  {f'{key} = {_bare(value)}':<46}  {meanings.get(key, '')}".rstrip()
        for key, value in _flat("arch", arch)
    ]
    lines += ["", "-m runs a sweep (lr=1e-4,2e-4), --cfg job prints the config and ends."]
    return "\n".join(lines)


def _arch_meanings(arch: Any) -> dict[str, str]:
    """What each option of the composed architecture and its loss does, by full key."""
    found = {}
    for prefix, options in (("arch", arch), ("arch.loss", arch["loss"])):
        fields = load_class(options["name"]).Config.model_fields  # type: ignore[attr-defined]
        for name, field in fields.items():
            found[f"{prefix}.{name}"] = f"{field.description} [{_short(field.annotation)}]"
    return found


def _key_lines() -> Iterator[str]:
    for name, field in PretrainConfig.model_fields.items():
        default = "" if field.default is PydanticUndefined else f" = {_bare(field.default)}"
        yield f"  {name + default:<34}  {field.description} [{_short(field.annotation)}]"


def _bare(value: Any) -> str:
    return show(value).replace("'", "")


def _short(annotation: Any) -> str:
    return "preset" if annotation is ArchConfig else expected(annotation)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}", item)
    else:
        yield prefix, value

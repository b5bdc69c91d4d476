"""Run Hydra, with errors of one sentence.

Hydra stops at the first unknown key, with a chain of exceptions. Therefore keys are passed to it as
`++key=value`, which it always accepts, and `load_config` reports all unknown keys together;
`run_name=x` and `+run_name=x` mean the same. Errors that Hydra itself finds (an unknown preset, an
override that it cannot parse) are printed as one sentence.
"""

import functools
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.config.errors import did_you_mean, expected, show
from utils.config.plugins import find_plugin, named_plugins
from utils.config.schema import PretrainConfig
from utils.config.values import flatten, hydra_override, in_quotes
from utils.core.console import check_decoded, describe_error, guarded_output
from utils.core.errors import UserError
from utils.core.functions import nearest, suggest

CONFIG_DIR = Path(__file__).resolve().parents[2] / "config"
CONFIG_NAME = "cfg_pretrain"
SWEEPS = Path("checkpoints/sweeps")  # same as hydra.sweep.dir
# Name of `schema` in the defaults list of CONFIG_NAME.
ConfigStore.instance().store(
    "schema", {k: f.default for k, f in PretrainConfig.model_fields.items() if k != "arch"}
)
_HYDRA_VERSION = "1.3"  # since 1.2 Hydra keeps the working directory

_ASSIGNMENT = re.compile(
    r"(?P<plus>\+{0,2})(?P<key>[A-Za-z_]\w*([./]\w+)*)=(?P<value>.*)", re.DOTALL
)
_VALUE_FLAGS = frozenset(  # Hydra's flags that take a value
    "--cfg -c --package -p --config-path -cp --config-name -cn --config-dir -cd "
    "--experimental-rerun".split()
)
_FLAGS = _VALUE_FLAGS.union(
    "--help -h --hydra-help --version --resolve --run -r --multirun -m --shell-completion -sc "
    "--info -i".split()
)


def compose_config(overrides: list[str]) -> DictConfig:
    """Compose the config of `python pretrain.py <overrides>`, without checking it.

    overrides: may include `--config-dir DIRECTORY` for more presets, as for pretrain.py.
    Raises UserError for overrides that Hydra cannot read and for presets that do not exist.
    """
    given, folders = split_config_dirs(overrides)
    overrides = _normalised(given, _groups([CONFIG_DIR, *folders]), sweep=False)
    if folders:
        places = ",".join(in_quotes(f"file://{folder.absolute()}") for folder in folders)
        overrides.append(f"hydra.searchpath=[{places}]")
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base=_HYDRA_VERSION):
            cfg = hydra.compose(CONFIG_NAME, overrides)
            _check_plugins(cfg, given)
            return cfg
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, folders)) from error
    finally:
        GlobalHydra.instance().hydra = before


def hydra_entry(fn: Callable[[DictConfig], Any]) -> Callable[[], Any]:
    """Decorate `fn(cfg)` as a command that takes no arguments and reads sys.argv.

    A UserError, of the command line or of `fn`, or an error in a plug-in is printed as one sentence
    and exits with status 2; any other exception keeps its traceback.
    """

    @functools.wraps(fn)
    @guarded_output()
    def main() -> Any:
        try:
            check_decoded(sys.argv)
            split_config_dirs(sys.argv[1:])
            arguments = _arguments(sys.argv[1:])
            if any(flag in arguments for flag in ("--help", "-h")):
                print(help_text(Path(sys.argv[0]).name))
                return None
            return _run_hydra(fn, arguments)
        except UserError as error:
            _end(str(error))
        except (HydraException, OmegaConfBaseException) as error:
            _end(explain(error, split_config_dirs(arguments)[1]))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            raise SystemExit(128 + signal.SIGINT) from None

    return main


def _run_hydra(fn: Callable[[DictConfig], Any], arguments: list[str]) -> Any:
    @functools.wraps(fn)
    def task(cfg: DictConfig) -> Any:
        try:
            _check_plugins(cfg, arguments)
            return fn(cfg)
        except Exception as error:
            if (sentence := describe_error(error)) is None:
                raise
            _end(sentence)  # before Hydra prints lines of its own

    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    # lets exceptions propagate; Hydra would print its own report and exit
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        return hydra.main(
            config_path=str(CONFIG_DIR), config_name=CONFIG_NAME, version_base=_HYDRA_VERSION
        )(task)()
    finally:
        sys.argv = argv
        if full_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def _end(sentence: str) -> NoReturn:
    """Print `sentence` and exit with status 2."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # all ranks of a node fail in the same way, and the launcher stops the others as soon as one
        # exits, so give rank 0 time to print
        time.sleep(3)
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# --- the command line ---------------------------------------------------------------------


def _groups(folders: list[Path]) -> set[str]:
    """Return the names of the config groups: `arch`, `arch/net` and so on."""
    return {
        path.relative_to(folder).as_posix()
        for folder in folders
        for pattern in ("*", "*/*")
        for path in folder.glob(pattern)
        if path.is_dir()
    }


def _check_plugins(cfg: DictConfig, overrides: list[str]) -> None:
    """Raise UserError if a preset sets directories of code, which only the user may choose."""
    if (named := cfg.get("plugins")) and not any(
        re.match(r"\+*plugins=", given) for given in overrides
    ):
        raise UserError(
            f"a preset sets plugins={show(list(named))}, which only the "
            "command line may: remove it there and give plugins=[...] with the command"
        )


def split_config_dirs(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Split `--config-dir DIRECTORY` from the other arguments; return these and the directories.

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
            parent = folders[-1].absolute().parent
            names = [path.name for path in parent.glob("*") if path.is_dir()]
            near = nearest(folders[-1].name, names)
            advice = f"did you mean {parent / near}?" if near else "give one that contains presets"
            raise UserError(f"{flag} {folders[-1]} is not a directory: {advice}")
    return rest, folders


def _arguments(argv: list[str]) -> list[str]:
    """Return flags, then overrides in a form that Hydra accepts.

    Raises UserError for an unknown flag, for which argparse would print a page of Hydra's usage.
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
        if flag in _VALUE_FLAGS and not value:
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
    """Return overrides that put Hydra's record of a sweep into a temporary directory, if its usual
    one cannot be written."""
    try:
        SWEEPS.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=SWEEPS).close()
        return []
    except OSError as error:
        reason = f"cannot write to {SWEEPS.absolute()} ({error.strerror or error})"
    try:
        folder = tempfile.mkdtemp(prefix="sweep_")
    except OSError as error:
        raise UserError(
            f"{reason} or to a temporary directory ({error.strerror or error}); set a directory "
            "for Hydra's record of the sweep: hydra.sweep.dir=<directory>"
        ) from None
    print(f"note: {reason}; Hydra's record of the sweep is in {folder}", file=sys.stderr)
    return [f"hydra.sweep.dir={folder}"]


def _refuse_unknown(overrides: list[str], groups: set[str]) -> None:
    """Raise UserError for an unknown key. For --cfg, which prints the config unchecked."""
    keys = list(PretrainConfig.model_fields)
    for match in filter(None, map(_ASSIGNMENT.fullmatch, overrides)):
        key = _full(match["key"]).split(".")[0]
        if "/" not in key and key not in (*keys, *groups, "hydra"):
            raise UserError(f"unknown key '{key}': {did_you_mean(key, keys, keys)}")


def _unknown_flag(flag: str, value: str) -> str:
    key = flag.lstrip("-").replace("-", "_")
    if key.split(".")[0] in PretrainConfig.model_fields:
        return f"unknown flag '{flag}': write keys without dashes, {key}={value or '<value>'}"
    return f"unknown flag '{flag}': {suggest(flag, sorted(_FLAGS, key=len, reverse=True))}"


def _full(key: str) -> str:
    """Return the full name of a key: `loss.kl_to` is short for `arch.loss.kl_to`."""
    return f"arch.{key}" if key.startswith("loss.") else key


def _normalised(overrides: list[str], groups: set[str], sweep: bool) -> list[str]:
    """Return overrides in the forms that Hydra accepts, `++key=value` and `group=preset`.

    Values of keys are converted to Hydra's grammar. `group=null` is dropped: it is the default of
    that group, which Hydra refuses to set again.
    """
    found = []
    for override in overrides:
        match = _ASSIGNMENT.fullmatch(override)
        key = _full(match["key"]) if match else ""
        if match is None or key.startswith("hydra.") or ("/" in key and key not in groups):
            found.append(override)  # Hydra's own: hydra/..., ~key, group@package
        elif key not in groups:
            found.append(hydra_override(key, match["value"], sweep))
        elif match["value"] == "null" and key in ("arch", "recipe"):
            raise UserError(f"{key}=null: a run needs one of {', '.join(_presets(key))}")
        elif match["value"] != "null":
            found.append(f"{key}={match['value']}")
    return found


# --- sentences ----------------------------------------------------------------------------


def explain(error: BaseException, folders: Sequence[Path] = ()) -> str:
    """Return one sentence for an exception of Hydra or OmegaConf.

    folders: those of --config-dir.
    """
    if isinstance(error, MissingConfigException) and error.options:
        group, _, preset = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
        near, presets = nearest(preset, list(error.options)), ", ".join(sorted(error.options))
        advice = f"did you mean '{group}={near}'? " if near else ""
        lacking = "".join(
            f"; --config-dir {folder} has no directory {group}/ for such presets"
            + (f": give {folder.absolute().parent}" if folder.absolute().name == group else "")
            for folder in folders
            if not (folder / group).is_dir()
        )
        return f"there is no preset '{group}={preset}': {advice}Presets: {presets}{lacking}"
    if isinstance(error, OverrideParseException):
        key, sign, _ = error.override.lstrip("+").partition("=")
        if not sign:
            return f"cannot read '{key}': write key=value without spaces around '='"
        return (
            f"cannot read '{key}={error.override.partition('=')[2]}': write a list without spaces, "
            f"'{key}=[a,b]', and quote other values, '{key}=\"...\"'"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, MissingConfigException):  # the others are Hydra's search path
        lines = lines[:1]
    sentence = re.sub(r"'\++", "'", "; ".join(line.rstrip(".") for line in lines))
    if sentence.startswith("Could not override") and "hydra." not in sentence:
        sentence += f"; the config groups are {', '.join(sorted(_groups([CONFIG_DIR])))}"
    return sentence or f"the config cannot be composed ({type(error).__name__})"


# --- help -----------------------------------------------------------------------------------


def _presets(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def help_text(program: str) -> str:
    """Return the text of `--help`: usage, groups with their presets, every key with its default."""
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
    defaults: Any = OmegaConf.to_container(compose_config([]), resolve=True)
    lines += ["", "keys (key=value), with their defaults:"]
    for name, field in PretrainConfig.model_fields.items():
        default = "" if name == "arch" else f" = {_bare(defaults[name])}"
        kind = "preset" if name == "arch" else expected(field.annotation)
        lines.append(f"  {name + default:<34}  {field.description} [{kind}]")
    lines += ["", "options of the default architecture (arch.<option>=value):"]
    arch = {"arch": defaults["arch"]}
    meanings = {
        f"{named.where}.{name}": f"{field.description} [{expected(field.annotation)}]"
        for named in named_plugins(arch)
        for name, field in find_plugin(named.name, named.kind).Config.model_fields.items()
    }
    for key, value in flatten(arch).items():
        lines.append(f"  {f'{key} = {_bare(value)}':<46}  {meanings.get(key, '')}".rstrip())
    lines += ["", "-m runs a sweep (lr=1e-4,2e-4); --cfg job prints the config and exits."]
    return "\n".join(lines)


def _bare(value: Any) -> str:
    return show(value).replace("'", "")

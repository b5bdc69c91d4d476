"""Read commands whose arguments are key=value, and print their --help."""

import sys
from collections.abc import Callable, Container, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from utils.config.errors import problems_of, show
from utils.config.schema import PretrainConfig
from utils.core.console import run_cli
from utils.core.errors import UserError
from utils.core.functions import PROJECT_ROOT, nearest

Options = TypeVar("Options", bound=BaseModel)


class CommandKeys(BaseModel):
    """The keys of a command; a subclass declares them."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse_key_values(
    model: type[Options], arguments: Sequence[str], verbatim: Container[str] = ()
) -> Options:
    """Parse the arguments into `model`.

    Values are taken literally, not as YAML, so that a text may contain colons and brackets; null
    means no value, except for the keys in `verbatim`. Raises a UserError that lists every mistake.
    """
    given: dict[str, Any] = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign:
            raise UserError(
                f"cannot read '{argument}': arguments are key=value; put quotes around a value "
                "with spaces, and see --help for the keys"
            )
        if value != "null" or key in verbatim:
            given[key] = _utf8(key, value) if key in verbatim else value
    return validate(model, given)


def split_key_values(model: type[Options], arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Return the keys of `model`, and the other arguments, which are keys of pretrain.py.

    Earlier forms of commands still work: `--trials 20`, `--trials=20`, and `--updates 0 25` for
    `updates=0,25`.
    """
    given: dict[str, Any] = {}
    others: list[str] = []
    for word in _join_flags(arguments):
        name, sign, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if sign and key in model.model_fields:
            given[key] = value
        elif word.startswith("--"):
            raise UserError(f"cannot read '{word}': arguments are key=value; see --help for keys")
        else:
            _refuse_typo(model, key)
            others.append(word)
    return validate(model, {k: v for k, v in given.items() if v != "null"}), others


def _refuse_typo(model: type[BaseModel], key: str) -> None:
    """Raise a UserError if a key is not one of pretrain.py but nearly one of `model`."""
    known = PretrainConfig.model_fields.keys()
    if key.lstrip("+~").split(".")[0] in known or (PROJECT_ROOT / "config" / key).is_dir():
        return
    if meant := nearest(key, list(model.model_fields), cutoff=0.8):
        raise UserError(f"unknown key '{key}': did you mean '{meant}'?")


def _join_flags(arguments: Sequence[str]) -> list[str]:
    """Join each --flag with the values that follow it, as --flag=value,value."""
    words: list[str] = []
    for argument in arguments:
        flag = words[-1] if words and words[-1].startswith("--") else None
        if flag is None or argument.startswith("--") or ("=" in flag and "=" in argument):
            words.append(argument)
        else:
            words[-1] += f"{',' if '=' in flag else '='}{argument}"
    return words


def validate(model: type[Options], given: dict[str, Any]) -> Options:
    """Convert `given` to `model`. Raises a UserError that lists every mistake."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        everywhere = list(model.model_fields)
        raise UserError("; ".join(problems_of(error, model, everywhere=everywhere))) from None


def run_command(
    model: type[BaseModel],
    description: str | None,
    body: Callable[[Sequence[str]], Any],
    argv: Sequence[str] | None,
    **guards: Any,
) -> None:
    """Run `body` with the arguments, or print the help. guards: arguments of `run_cli`."""
    arguments = sys.argv[1:] if argv is None else argv
    if "--help" in arguments or "-h" in arguments:
        return run_cli(lambda: print(key_value_help(model, description)), closed_status=0)
    run_cli(lambda: body(arguments), **guards)


def _utf8(key: str, value: str) -> str:
    """Decode a text from the command line as UTF-8, even if the locale could not decode it."""
    try:
        return value.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        fault = f"byte 0x{error.object[error.start]:02x} at position {error.start + 1:,}"
    except UnicodeEncodeError as error:
        fault = f"character {value[error.start]!a}"
    raise UserError(f"{key} is not valid UTF-8 ({fault}); set the terminal's encoding to UTF-8")


def key_value_help(model: type[BaseModel], description: str | None) -> str:
    """Return the text of --help, with required keys first."""
    lines = [description or "", "keys (key=value), with their defaults:"]
    fields = sorted(model.model_fields.items(), key=lambda item: not item[1].is_required())
    for name, field in fields:
        default = "" if field.is_required() else f"={show(field.default)}".replace("'", "")
        lines.append(f"  {name + default:<26}  {field.description}")
    return "\n".join(lines)

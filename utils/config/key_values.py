"""Read arguments key=value of commands other than pretrain.py, and print their --help."""

from collections.abc import Container, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from utils.config.errors import problems_of, show
from utils.core.errors import UserError

Options = TypeVar("Options", bound=BaseModel)


def parse_key_values(
    model: type[Options], arguments: Sequence[str], verbatim: Container[str] = ()
) -> Options:
    """Return the arguments as `model`.

    Values are taken literally, not as YAML, so that a text may contain colons and brackets; null
    means no value, except for the keys in `verbatim`. Raises UserError that lists every mistake.
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
    try:
        return model.model_validate(given)
    except ValidationError as error:
        everywhere = list(model.model_fields)
        raise UserError("; ".join(problems_of(error, model, given, "", everywhere))) from None


def _utf8(key: str, value: str) -> str:
    """Return a text from the command line as UTF-8, also where the locale could not decode it."""
    try:
        return value.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        fault = f"byte 0x{error.object[error.start]:02x} at position {error.start + 1:,}"
    except UnicodeEncodeError as error:
        fault = f"character {value[error.start]!a}"
    raise UserError(f"{key} is not valid UTF-8 ({fault}); set the terminal's encoding to UTF-8")


def key_value_help(model: type[BaseModel], description: str | None) -> str:
    """Return what --help prints; required keys come first."""
    lines = [description or "", "keys (key=value), with their defaults:"]
    fields = sorted(model.model_fields.items(), key=lambda item: not item[1].is_required())
    for name, field in fields:
        default = "" if field.is_required() else f"={show(field.default)}".replace("'", "")
        lines.append(f"  {name + default:<26}  {field.description}")
    return "\n".join(lines)

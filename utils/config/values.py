"""Convert values of the command line to Hydra's grammar.

Keys of text (paths and names) take values literally: `data_paths=[/x/books (1),C:\\new=old]`. A
comma separates values, and spaces around it are dropped; quotes around a text keep both. `${...}`
is an interpolation only if it names a key of the config or a resolver such as `oc.env`. All other
values follow Hydra's grammar; what it does not cover (other alphabets, `=`, `(`) is quoted.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from utils.config.errors import branches
from utils.config.schema import PretrainConfig
from utils.core.errors import UserError

_FUNCTION = re.compile(
    r"\s*(choice|range|interval|glob|shuffle|sort|tag|str|int|float|bool|json_str|extend_list)\("
)
_QUOTED = re.compile(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*""", re.DOTALL)
_REFERENCE = re.compile(r"\s*(?:(?P<resolver>[A-Za-z_][\w.]*):|\.*(?P<key>[A-Za-z_]\w*)[\w.\[\]]*)")
_OPENED = re.compile(r"(\\*)\$\{")
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_/.+-]+")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def hydra_value(key: str, value: str, sweep: bool = False) -> str:
    """Return the `value` of `key=value` in Hydra's grammar.

    sweep: whether commas outside of brackets and quotes separate the values of a sweep; if not,
    such a comma raises UserError.
    """
    kind = _kind(key)
    if kind is None or (_FUNCTION.match(value) and value.rstrip().endswith(")")):
        return value if _parsed(value) is not None else _repaired(value) or value
    listed = kind is list and value.strip().startswith("[")
    parts = _split(value, nested=listed) if sweep else [value]
    if not sweep and not listed and len(_split(value)) > 1:
        advice = f"write a list as '{key}=[{value}]'"
        if kind is str:
            advice = f"put quotes around it, '{key}=\"{value}\"'"
        raise UserError(f"{key}={value} is ambiguous: {advice}, or add -m to sweep")
    write = _written_list if listed else _written
    return ",".join(write(part.strip() if sweep else part) for part in parts)


def hydra_override(key: str, value: str, sweep: bool = False) -> str:
    """Return the override that adds or changes a key, `++key=value`, in Hydra's grammar."""
    above, _, last = key.rpartition(".")
    if above and not last.isascii():  # a user-defined name, which Hydra supports only in dicts
        return f"++{above}={{{_key(last)}: {hydra_value(key, value)}}}"
    return f"++{key}={hydra_value(key, value, sweep)}"


def readable(override: str, sweep: bool = False) -> str:
    """Return an override `key=value` with its value in Hydra's grammar."""
    key, sign, value = override.partition("=")
    return f"{key}={hydra_value(key.lstrip('+'), value, sweep)}" if sign else override


def assignment(key: str, value: str | Path | Iterable[str | Path]) -> str:
    """Return the override that sets `key` to exactly this text or list of texts."""

    def written(path: str | Path) -> str:
        text = str(path)
        bare = re.fullmatch(r"[^\s,'\"$()]([^,$()]*[^\s,$()])?", text) and text.lower() != "null"
        return text if bare else in_quotes(literal(text))

    if isinstance(value, str | Path):
        return f"{key}={written(value)}"
    return f"{key}=[{','.join(map(written, value))}]"


def literal(tree: Any) -> Any:
    """Return plain values for OmegaConf, escaped so that none is read as an interpolation."""
    if isinstance(tree, dict):
        return {key: literal(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [literal(value) for value in tree]
    return _OPENED.sub(_escaped, tree) if isinstance(tree, str) else tree


def flatten(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by full key: {"arch.loss.name": value}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


def decode_keys(tree: Any) -> Any:
    """Return the config with the keys of its dicts decoded; see `_key`."""
    if isinstance(tree, dict):
        return {_decoded(key): decode_keys(value) for key, value in tree.items()}
    return [decode_keys(value) for value in tree] if isinstance(tree, list) else tree


def _kind(key: str) -> type | None:
    """Return the type of a text key: str, or list for a list of texts; None for other keys."""
    field = PretrainConfig.model_fields.get(key)
    kinds = {kind for kind in branches(field.annotation) if kind is not type(None)} if field else {}
    if kinds == {str}:
        return str
    listed = [get_args(kind)[0] for kind in kinds if get_origin(kind) is list]
    return list if len(kinds) == 1 and listed and set(branches(listed[0])) == {str} else None


def _parsed(value: str) -> Any:
    """Parse a value as Hydra does, into an Override; None if Hydra cannot read it."""
    try:
        return OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return None


def _split(text: str, nested: bool = False) -> list[str]:
    """Return the parts between commas; `nested`: those outside of brackets only."""
    parts, start, depth, at = [], 0, 0, 0
    while at < len(text):
        quoted = _QUOTED.match(text, at) if at == start or text[at - 1] in "[{" else None
        if quoted and (quoted.end() == len(text) or text[quoted.end()] in ",]}"):
            at = quoted.end()
            continue
        if nested and text[at] in "[{":
            depth += 1
        elif nested and text[at] in "]}":
            depth -= 1
        elif text[at] == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
        at += 1
    return [*parts, text[start:]]


def _written_list(text: str) -> str:
    """Return a list of texts in Hydra's grammar; unchanged if it is invalid, for Hydra to
    report.
    """
    text = text.strip()
    parts = [part.strip() for part in _split(text[1:-1])]
    if not text.endswith("]") or not all(parts):
        return text
    return f"[{','.join(map(_written, parts))}]"


def _written(text: str) -> str:
    """Return a text, quoted if Hydra would read it as something else."""
    if _QUOTED.fullmatch(text):
        found = _parsed(text)
        value = found.value() if found else None
        if isinstance(value, str):
            safe = _protected(value, escapes=True)
            return text if safe == value else in_quotes(safe)
    if not text or text.strip().lower() == "null":
        return text
    safe = _protected(text)
    found = _parsed(safe)
    value = None if found is None or found.is_sweep_override() else found.value()
    same = isinstance(value, str) and value == safe and not safe.endswith("\\")  # would escape `,`
    return safe if same else in_quotes(safe)


def in_quotes(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _protected(text: str, escapes: bool = False) -> str:
    """Return the text with each `${` escaped that is not an interpolation.

    escapes: a backslash before it is an escape already, as inside of quotes.
    """

    def protect(match: re.Match) -> str:
        backslashes = len(match[1])
        if _refers(text, match.end()) or (escapes and backslashes % 2):
            return match[0]
        return _escaped(match)

    return _OPENED.sub(protect, text)


def _escaped(match: re.Match) -> str:
    return "\\" * (2 * len(match[1]) + 1) + "${"


def _refers(text: str, start: int) -> bool:
    """Return whether `${`, which ends at `start`, begins an interpolation."""
    found = _REFERENCE.match(text, start)
    if found is None or "}" not in text[start:]:
        return False
    if found["resolver"]:
        return OmegaConf.has_resolver(found["resolver"])
    known = found["key"] in PretrainConfig.model_fields or found["key"] == "hydra"
    return known and text[found.end() :].lstrip().startswith("}")


# --- values of any kind -----------------------------------------------------------------------


def _repaired(text: str) -> str | None:
    """Quote the parts of a value that Hydra cannot read; None if a bracket is not closed."""
    try:
        found, at = _items(text, 0, "")
    except IndexError:
        return None
    return ",".join(found) if at == len(text) else None


def _items(text: str, at: int, end: str) -> tuple[list[str], int]:
    """Return the elements up to the bracket `end`, or the end of the text, and its position."""
    found = []
    while True:
        element, at = _pair(text, at) if end == "}" else _element(text, at, f",{end}")
        found.append(element)
        if at == len(text) and not end:
            return found, at
        if text[at] == end:
            return ([] if found == [""] else found), at
        at += 1


def _pair(text: str, at: int) -> tuple[str, int]:
    """Return `key: value` of a dict and the position of its end; `` for an empty dict."""
    quoted = _QUOTED.match(text, at)
    if quoted and text[quoted.end()] == ":":
        found = _parsed(quoted[1])
        key, at = str(found.value()) if found else quoted[1], quoted.end()
    else:
        start = at
        while text[at] not in ":,}":
            at += 1
        key = text[start:at].strip()
        if text[at] != ":":
            return key, at
    value, at = _element(text, at + 1, ",}")
    return f"{_key(key)}: {value}", at


def _element(text: str, at: int, ends: str) -> tuple[str, int]:
    """Return a list, a dict, a quoted or a bare value, and the position of its end."""
    start = at
    while at < len(text) and text[at] == " ":
        at += 1
    if at < len(text) and text[at] in "[{":
        closing = _PAIRS[text[at]]
        items, after = _items(text, at + 1, closing)
        found, at = f"{text[at]}{','.join(items)}{closing}", after + 1
        while at < len(text) and text[at] == " ":
            at += 1
        return found, at
    if function := _FUNCTION.match(text, at):
        items, after = _items(text, function.end(), ")")
        return f"{function[0]}{','.join(items)})", after + 1
    quoted = _QUOTED.match(text, at)
    if quoted and (quoted.end() == len(text) or text[quoted.end()] in ends):
        return quoted[1], quoted.end()
    open_: list[str] = []
    while at < len(text) and (open_ or text[at] not in ends):
        if text[at] in _PAIRS:
            open_.append(_PAIRS[text[at]])
        elif open_ and text[at] == open_[-1]:
            open_.pop()
        at += 1
    leaf = text[start:at].strip()
    return (leaf if not leaf or _parsed(leaf) is not None else in_quotes(leaf)), at


def _key(text: str) -> str:
    """Encode the characters of a key that Hydra's grammar does not allow as code points."""
    if _PLAIN_KEY.fullmatch(text):
        return text
    return "".join(c if _PLAIN_KEY.fullmatch(c) else f"\\U{ord(c):08x}" for c in text)


def _decoded(key: Any) -> Any:
    """Return the key as text, even if Hydra parsed it as a number, such as the domain `2024`."""
    return re.sub(r"\\U([0-9a-f]{8})", lambda match: chr(int(match[1], 16)), str(key))

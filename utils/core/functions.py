"""Look up plug-in classes by `module@Class`.

Architectures, losses, evaluators, optimizers and the like are named in the config as
`module@Class`, with the module taken below one package, such as `models.` or `evaluators.`, or from
a directory of plug-ins that the user gave (`utils/core/plugins.py`): a config can therefore never
name a class elsewhere. A package may give some of its classes short names, in its `NAMES`.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.core.errors import UserError
from utils.core.plugins import import_plugin, plugin_folders, plugin_modules

_MAX_LISTED = 12  # candidates listed in a message
PROJECT_ROOT = Path(__file__).resolve().parents[2]

_IDENTIFIER = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)@(?P<name>[A-Za-z_]\w*)")


class MissingModuleError(UserError):
    """A name `module@Class` whose module is neither Athena's nor a plug-in's."""


_KINDS: dict[str, Any] = {"class": inspect.isclass, "function": inspect.isfunction}
_DEFINITIONS = {"class": r"^class ([A-Za-z]\w*)", "function": r"^def ([A-Za-z]\w*)"}


def nearest(word: str, candidates: list[str], cutoff: float = 0.6) -> str | None:
    """Return the candidate most similar to `word`, ignoring case; None if none is similar."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    match = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=cutoff)
    return by_lower[match[0]] if match else None


def suggest(word: str, candidates: Iterable[str]) -> str:
    """Return advice for an unknown name: the nearest candidate, or else the first twelve."""
    known = list(candidates)
    if best := nearest(word, known, cutoff=0.5):
        return f"did you mean '{best}'?"
    return f"available: {_some(known)}"


def _some(known: list[str]) -> str:
    more = f" and {len(known) - _MAX_LISTED} more" if len(known) > _MAX_LISTED else ""
    return f"{', '.join(known[:_MAX_LISTED]) or 'none'}{more}"


def _modules_below(prefix: str) -> dict[str, Path]:
    """Return the files of plug-ins and of modules below `prefix`, by the names of these relative to
    it; import nothing but it."""
    package = importlib.import_module(prefix.rstrip("."))
    found = plugin_modules()
    for root in map(Path, package.__path__):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] != "__init__":
                found.setdefault(".".join(parts), path)
    return found


def _form_advice(identifier: str, prefix: str, kind: str) -> str:
    """Return what an identifier of the wrong form was probably meant to be."""
    written = _written_below(prefix, kind)
    for part in (1, 0):  # the likeliest slip is the bare class name, then the bare module
        parts = {name.split("@")[part]: name for name in written}
        best = nearest(re.split(r"[@.:/]", identifier)[-1], list(parts))
        if best is not None:
            return f"did you mean '{parts[best]}'?"
    return f"for example '{written[0]}'" if written else "there is none"


def _written_below(prefix: str, kind: str) -> list[str]:
    """Return `module@Class` of every class written below `prefix` or in a plug-in; import none."""
    return [
        f"{module}@{name}"
        for module, source in _modules_below(prefix).items()
        for name in re.findall(_DEFINITIONS[kind], source.read_text("utf-8"), re.M)
    ]


def _exists(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package does not exist either
        return False


def _import(identifier: str, module_name: str, prefix: str) -> ModuleType:
    full_name = prefix + module_name
    plugins = plugin_modules()
    if _exists(full_name):
        if module_name in plugins:
            raise UserError(
                f"'{identifier}': the plug-in {plugins[module_name]} has the name of Athena's own "
                f"module {full_name}; rename the plug-in"
            )
    elif module_name in plugins:
        return import_plugin(module_name)
    else:
        raise MissingModuleError(
            f"'{identifier}' names the module '{module_name}', which is "
            + _describe_search(module_name, prefix, list(plugins))
        )
    try:
        return importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", prefix.split(".")[0], "models", "evaluators", "utils", "dataset"):
            raise  # a broken import of our own is a bug, not a missing package
        raise UserError(
            f"'{identifier}' needs the Python package '{missing}', which is not installed: "
            f"pip install {missing}"
        ) from error


def _describe_search(module: str, prefix: str, plugins: list[str]) -> str:
    """Describe where a module was looked for in vain, and what was probably meant."""
    own, folders = prefix.rstrip("."), plugin_folders()
    best = nearest(module, [*plugins, *_modules_below(prefix)], cutoff=0.5)
    empty = [folder for folder in folders if not any(Path(folder).rglob("*.py"))]
    advice = [f"{folder} holds no Python file" for folder in empty]
    if plugins and not best:
        advice.append(f"your plug-ins are {_some(plugins)}")
    if not folders:
        key = "--plugins <directory>" if own.startswith("dataset") else "plugins=[<directory>]"
        advice.append(f"if it is your own, add {key}")
    if best:
        advice.append(f"did you mean '{best}'?")
    places = "".join(f" nor in {folder}" for folder in folders)
    looked = f"neither in Athena's {own}{places}" if folders else f"not in Athena's {own}"
    return f"{looked}: {'; '.join(advice)}"


def load_class(identifier: str, prefix: str = "models.") -> type:
    """Return the class that `module@Class` names below `prefix`.

    Raises UserError, naming the nearest existing module or class, where there is none.
    """
    return _load(identifier, prefix, "class")


def load_named(name: str, prefix: str, kind: str = "class") -> Any:
    """Return the class that a short name of the package `prefix`, or `module@Class`, stands for.

    kind: `class` or `function`. Raises UserError, naming the nearest that exists.
    """
    names = short_names(prefix)
    if names and name not in names and not _IDENTIFIER.fullmatch(name):
        best = nearest(name, list(names))
        advice = f"did you mean '{best}'?" if best else _form_advice(name, prefix, kind)
        raise UserError(
            f"'{name}' is none of {', '.join(names)}, nor of the form {form(kind)} (with the "
            f"module below '{prefix}'): {advice}"
        )
    return _load(names.get(name, name), prefix, kind)


def short_names(prefix: str) -> dict[str, str]:
    """Return `module@Class` by short name, of the package `prefix`."""
    return getattr(importlib.import_module(prefix.rstrip(".")), "NAMES", {})


def form(kind: str) -> str:
    """Return how plug-ins of a kind are named: module@Class or module@function."""
    return "module@Class" if kind == "class" else "module@function"


def _load(identifier: str, prefix: str, kind: str) -> Any:
    match = _IDENTIFIER.fullmatch(identifier)
    if match is None:
        raise UserError(
            f"'{identifier}' is not of the form {form(kind)} (with the module below '{prefix}'), "
            + _form_advice(identifier, prefix, kind)
        )
    module, name = _import(identifier, match["module"], prefix), match["name"]
    found = getattr(module, name, None)
    is_one = _KINDS[kind]
    if not is_one(found):
        own = [
            name
            for name, value in vars(module).items()
            if is_one(value) and value.__module__ == module.__name__
        ]
        raise UserError(
            f"'{identifier}': the module '{module.__name__}' has no {kind} '{name}', "
            + suggest(name, own)
        )
    return found


def has_utf8_name(path: Path) -> bool:
    """Return whether the path is stored as UTF-8, as libraries in C++ and Rust take it to be."""
    return os.fsencode(path) == str(path).encode("utf-8", "replace")

"""Directories outside the project whose modules may be named as `module@Class`.

Their files are modules of one package: `ideas/banded.py` is `athena_plugins.banded`. A plug-in can
therefore never replace a module of Athena's or of a library, and imports another one by
`from athena_plugins.other import name`.
"""

import importlib
import sys
import traceback
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from utils.core.errors import UserError, first_line

PACKAGE = "athena_plugins"


def use_plugins(folders: Sequence[str | Path]) -> None:
    """Look up plug-ins in these directories, in place of those given before.

    Raises UserError for a path that is not a directory. Imports nothing.
    """
    places = list(dict.fromkeys(str(Path(folder).expanduser().absolute()) for folder in folders))
    if places == plugin_folders():
        return
    for folder in map(Path, places):
        if not folder.is_dir():
            advice = f"name the directory that holds it, {folder.parent}"
            if not folder.is_file():
                advice = "name a directory that holds Python files"
            raise UserError(f"plugins={folder} is not a directory: {advice}")
    for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]:
        del sys.modules[name]
    package = ModuleType(PACKAGE, __doc__)
    package.__spec__ = ModuleSpec(PACKAGE, None, is_package=True)
    package.__path__ = package.__spec__.submodule_search_locations = places
    sys.modules[PACKAGE] = package
    importlib.invalidate_caches()


def plugin_folders() -> list[str]:
    """Return the directories in which this process looks up plug-ins."""
    return list(getattr(sys.modules.get(PACKAGE), "__path__", ()))


def plugin_modules() -> dict[str, Path]:
    """Return the file of every plug-in, by the name of its module without the package.

    Directories within the given ones count one level deep. Raises UserError where two of the given
    directories have a module of one name.
    """
    found: dict[str, Path] = {}
    for folder in map(Path, plugin_folders()):
        for path in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")]):
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            if name.rpartition(".")[2] == "__init__":
                continue
            if name in found:
                raise UserError(f"plugins: {found[name]} and {path} have one name; rename one")
            found[name] = path
    return found


def source_copy(checkpoint: Path, name: str) -> Path | None:
    """Return the copy of a plug-in, such as `athena_plugins/banded.py`, in a checkpoint, if any."""
    copy = checkpoint / "source" / name
    return copy if name.startswith(f"{PACKAGE}/") and copy.is_file() else None


def import_plugin(name: str) -> ModuleType:
    """Import the plug-in of this name.

    Raises UserError with file, line and exception where its code fails.
    """
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(_describe_import(name, error)) from error


def locate_failure(error: BaseException) -> tuple[str, int | None, str] | None:
    """Return file, line and function of the innermost code of a plug-in that an exception passed
    through; None if there is none."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).startswith(f"{PACKAGE}."):
            found = frame.f_code.co_filename, line, frame.f_code.co_name
    files = {
        getattr(module, "__file__", None)
        for name, module in list(sys.modules.items())
        if name.startswith(f"{PACKAGE}.")
    }
    for traced in getattr(error, "real_stack", None) or ():  # of torch.compile
        if traced.filename in files:
            found = traced.filename, traced.lineno, traced.name
    return found


def describe_failure(error: BaseException) -> str | None:
    """Describe an exception in the code of a plug-in by file, line, function and its message; None
    for any other."""
    if (place := locate_failure(error)) is None:
        return None
    file, line, function = place
    while type(error).__module__.startswith("torch._dynamo"):  # it wraps what the code raised
        if (inner := error.__cause__ or error.__context__) is None:
            break
        error = inner
    return f"{file}:{line} ({function}): {first_line(error)}"


def _describe_import(name: str, error: Exception) -> str:
    path, line, _ = locate_failure(error) or (plugin_modules()[name], None, "")
    if isinstance(error, SyntaxError) and error.filename is not None:
        path, line = error.filename, error.lineno
    advice = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        if missing in plugin_modules():
            advice = f"; plug-ins import each other by 'from {PACKAGE}.{missing} import ...'"
        elif error.name == missing:
            advice = f"; the Python package may not be installed: pip install {missing}"
    return f"the plug-in '{name}' cannot be imported: {path}:{line}: {first_line(error)}{advice}"

"""Find the source files of a model, in Athena and in plug-ins, to store with its weights."""

import ast
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from utils.core.functions import PROJECT_ROOT
from utils.core.plugins import PACKAGE, plugin_folders, source_copy


def source_files(objects: Iterable[object]) -> dict[str, Path]:
    """Return the files of all project modules that the classes of `objects` and the active plug-ins
    import, directly or indirectly, by package path: `models/layers.py`, `athena_plugins/banded.py`.
    """
    names = {cls.__module__ for item in objects for cls in type(item).__mro__}
    names |= {name for name in sys.modules if name.startswith(f"{PACKAGE}.")}
    found: dict[str, Path] = {}
    todo = sorted(name for name in names if _file_of(name) is not None)
    while todo:
        name = todo.pop()
        path = _file_of(name)
        if path is None or path in found.values():
            continue
        package = path.name == "__init__.py"
        found[f"{name.replace('.', '/')}{'/__init__' if package else ''}.py"] = path
        todo += _imports(path, name if package else name.rpartition(".")[0])
    return dict(sorted(found.items()))


def changed_plugins(checkpoint: Path, model: nn.Module) -> list[tuple[Path, Path]]:
    """Return the files of plug-ins that differ from their copies in a checkpoint of `model`, each
    with its copy."""
    if not plugin_folders():
        return []
    found = []
    for name, file in source_files(model.modules()).items():
        copy = source_copy(checkpoint, name)
        if copy is not None and copy.read_bytes() != file.read_bytes():
            found.append((file, copy))
    return found


def _imports(path: Path, package: str) -> list[str]:
    """Return the names of the modules, or of their attributes, that a file imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


def _file_of(name: str) -> Path | None:
    """Return the file of a module in the project or a plug-in; None for other modules."""
    first = name.partition(".")[0]
    top = PROJECT_ROOT / first
    loaded = sys.modules.get(name)
    file = getattr(loaded, "__file__", None)
    if file is None and (first == PACKAGE or top.is_dir() or top.with_suffix(".py").is_file()):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # an attribute of a module
            return None
        file = None if spec is None else spec.origin
    if file is None:
        return None
    path = Path(file)
    ours = path.is_relative_to(PROJECT_ROOT) and "site-packages" not in path.parts
    return path if ours or first == PACKAGE else None

"""Make the source of an exported model independent of Athena."""

import ast
import hashlib
import importlib.util
from pathlib import Path

from dataset import common
from utils.core.errors import UserError
from utils.core.plugins import PACKAGE

MODEL = "models.export.modeling_athena"
_MODELING, _CONFIGURATION = "modeling_athena.py", "configuration_athena.py"
_LINE = "from models.recursive_reasoning.athena_trm import AthenaTRM as Architecture"
_HEADER = "# Copied from Athena by scripts/export_hf.py. SPDX-License-Identifier: Apache-2.0\n"
_PARTS = {
    "pretrain",
    "sequence_dataset",
    "models",
    "evaluators",
    "dataset",
    "utils",
    "config",
    PACKAGE,
}


def remote_code(architecture: type) -> dict[str, str]:
    """Return the source files that a model of this class needs, as text by file name.

    All files go in one directory. Raises UserError if the class needs code from outside `models`
    and the plug-ins.
    """
    found: dict[str, str] = {}
    todo, seen = [MODEL], {MODEL}
    while todo:
        module = todo.pop()
        text = _path(module).read_text("utf-8")
        if module == MODEL:
            assert text.count(_LINE) == 1
            own = f"from {architecture.__module__} import {architecture.__name__} as Architecture"
            text = text.replace(_LINE, own)
        name = module.rpartition(".")[2] + ".py"
        if name in found:
            raise UserError(f"{module} cannot be exported: there are two files named {name}")
        text, needed = _independent(module, text)
        found[name] = _HEADER + text
        todo += sorted(needed - seen)
        seen |= needed
    # older versions of transformers find only files that this one imports
    found[_MODELING] += "".join(
        f"from .{name} import __name__ as _{name}  # noqa\n"
        for name in sorted(file.removesuffix(".py") for file in found.keys() - {_MODELING})
    )
    # transformers confuses models in folders of the same name if this one file is equal
    digest = hashlib.sha256("".join(found[name] for name in sorted(found)).encode()).hexdigest()
    found[_CONFIGURATION] = f"# digest of the other files: {digest}\n" + found[_CONFIGURATION]
    return found


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin)


def _independent(module: str, text: str) -> tuple[str, set[str]]:
    """Return a module's text with imports from neighbouring files instead of from Athena and
    plug-ins, and the modules imported that way. Constants of `dataset.common` become literals.
    """
    lines, needed = text.splitlines(keepends=True), set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Import | ast.ImportFrom) or not _of_athena(node):
            continue
        source = _source(module, node) if isinstance(node, ast.ImportFrom) else None
        names = {alias.asname or alias.name: alias.name for alias in node.names}
        if source == common.__name__ and all(name.isupper() for name in names.values()):
            written = "".join(f"{k} = {getattr(common, v)!r}\n" for k, v in names.items())
        elif (
            source
            and source.startswith(("models.", f"{PACKAGE}."))
            and _path(source).name != "__init__.py"
        ):
            needed.add(source)
            local = ast.ImportFrom(source.rpartition(".")[2], node.names, level=1)
            written = " " * node.col_offset + ast.unparse(local) + "\n"
        else:
            raise UserError(
                f"{module} cannot be exported, because of `{ast.unparse(node)}`: a model's source "
                "may import only from files in models/ and plug-ins, each by name, "
                "as in `from models.layers import Block`"
            )
        end = node.end_lineno or node.lineno
        lines[node.lineno - 1 : end] = [written, *[""] * (end - node.lineno)]
    return "".join(lines), needed


def _source(module: str, node: ast.ImportFrom) -> str:
    """Return the full name of the module that an import statement refers to."""
    base = module.rsplit(".", node.level)[0] if node.level else ""
    return ".".join(filter(None, (base, node.module)))


def _of_athena(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").split(".")[0] in _PARTS
    return any(alias.name.split(".")[0] in _PARTS for alias in node.names)

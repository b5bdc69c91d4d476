"""The shape of the project: imports point downwards, each concern has one home, files stay small,
and the requirements say what the code imports."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# A package may import itself and what stands below it.
LAYERS = (
    ("pretrain",),
    ("utils.training",),
    ("evaluators",),
    ("models.export",),
    ("models.inference",),
    ("models",),
    ("sequence_dataset",),
    ("dataset",),
    ("utils.corpus", "utils.monitoring", "utils.checkpoint"),
    ("utils.config", "utils.backend"),
    ("utils.remote",),
    ("utils.core",),
)
FLOORS = {package: floor for floor, row in enumerate(LAYERS) for package in row}
PARTS = sorted({package.split(".")[0] for package in FLOORS})
ABOVE_ALL = ("scripts", "tests", "notebooks")
LEAF = "dataset.common"  # may be imported by all but utils.core, which it imports itself
MOST_LINES = 600  # a hint to look for a second concept
# Names under which packages are imported, where the package is called otherwise.
PACKAGES = {
    "hydra": "hydra-core",
    "yaml": "pyyaml",
    "backports": "backports.zstd",
    "adam_atan2": "adam-atan2",
    "pydantic_core": "pydantic",
}
# Used where a user has it, never needed: scripts/smoke_test.py falls back to text that is there,
# the token loss to PyTorch. Triton comes with a torch for CUDA.
NOT_REQUIRED = {"datasets", "triton"}


def source_files() -> list[Path]:
    """Python files of the project, tests included."""
    files = [*ROOT.glob("*.py")]
    for part in (*PARTS, *ABOVE_ALL):
        files += (ROOT / part).rglob("*.py")
    return sorted(path for path in files if path.is_file())


def shipped_files() -> list[Path]:
    return [path for path in source_files() if path.relative_to(ROOT).parts[0] != "tests"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of every import, also those inside functions.

    `from a import b` counts as a.b, because b may be a module.
    """
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def package_of(module: str) -> str | None:
    """The package of LAYERS that a module lies in; None for a module of another project."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in FLOORS), None)


def points_up(importer: str, module: str) -> bool:
    """Whether the module `importer` may not import `module`."""
    if importer.split(".")[0] in ABOVE_ALL:
        return False
    if module.split(".")[0] in ABOVE_ALL:
        return True
    own, other = package_of(importer), package_of(module)
    if own is None or other is None or own == other:
        return False
    if within(module, LEAF):
        return own == "utils.core"
    return FLOORS[other] <= FLOORS[own]


def test_the_rule_itself():
    assert points_up("utils.config.load", "dataset.corpus.SPLITS")
    assert not points_up("utils.config.load", "dataset.common.DatasetMetadata")
    assert points_up("utils.core.console", "dataset.common.DatasetMetadata")
    assert points_up("models.losses", "pretrain.train")
    assert points_up("models.losses", "models.inference.generation.Decoder")
    assert points_up("models.inference.loading", "evaluators.guard.Group")
    assert points_up("utils.corpus.data", "utils.monitoring.metrics")
    assert points_up("pretrain", "scripts.generate")
    assert not points_up("evaluators.loop", "models.losses")
    assert not points_up("scripts.compare", "pretrain.main")
    assert not points_up("models.losses", "torch.utils.checkpoint")


def test_every_module_lies_in_a_layer():
    outside = [
        name_of(path)
        for path in shipped_files()
        if path.relative_to(ROOT).parts[0] not in ABOVE_ALL
        and path.name != "__init__.py"
        and package_of(module_of(path)) is None
    ]
    assert not outside, "\n".join(outside)


def test_imports_point_downwards():
    violations = [
        f"{name_of(path)}:{line} imports {module}"
        for path in source_files()
        for line, module in imports(path)
        if points_up(module_of(path), module)
    ]
    assert not violations, "\n".join(violations)


def test_devices_are_known_to_the_backends_alone():
    """Collectives and torch_xla outside utils/backend would be one more place per device."""
    foreign = re.compile(r"\btorch\.distributed\b|\btorch_xla\b")
    violations = []
    for path in shipped_files():
        if path.is_relative_to(ROOT / "utils" / "backend"):
            continue
        violations += [
            f"{name_of(path)}:{line} imports {module}"
            for line, module in imports(path)
            if foreign.match(module)
        ]
        violations += [
            f"{name_of(path)}:{node.lineno} uses {ast.unparse(node)}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and foreign.fullmatch(ast.unparse(node))
        ]
    assert not violations, "\n".join(violations)


@pytest.mark.slow
def test_builders_run_without_torch():
    """Corpora are built on machines that have no torch: nothing that dataset/ loads may load it."""
    modules = [f"dataset.{path.stem}" for path in (ROOT / "dataset").glob("[!_]*.py")]
    code = (
        "import sys; sys.modules['torch'] = None\n"  # any import of it now fails
        f"import {', '.join(modules)}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", source_files(), ids=name_of)
def test_files_stay_small(path: Path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: which concept hides in {name_of(path)}?"


TEXT_MODES = {"read_text": 1, "write_text": 2}  # arguments up to the encoding
RUNS = {"run", "Popen", "check_output", "check_call"}


def without_encoding(call: ast.Call) -> bool:
    """Whether `call` reads or writes text in whatever encoding the locale has.

    Unlike ruff's PLW1514, which needs to know the type of a path, this goes by the name alone.
    """
    words = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in words:
        return False
    method = isinstance(call.func, ast.Attribute)
    name = getattr(call.func, "attr" if method else "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name in TEXT_MODES:
        return method and len(call.args) < TEXT_MODES[name]
    if name in RUNS:
        return bool({"text", "universal_newlines"} & words.keys())
    if name == "open" and owner not in ("os", "gzip", "zstd"):
        before = 0 if method else 1
        mode = words.get("mode", call.args[before] if len(call.args) > before else None)
        constants = isinstance(mode, ast.Constant | None)
        return constants and "b" not in str(getattr(mode, "value", "r"))
    return False


def test_the_encoding_rule_itself():
    def refused(text: str) -> bool:
        return without_encoding(ast.parse(text, mode="eval").body)

    for text in ("p.read_text()", "p.write_text(x)", "p.open('w')", "open(p)", "open(p, 'a')"):
        assert refused(text), text
    assert refused("subprocess.run(command, text=True)")
    for text in ("p.read_text('utf-8')", "p.open('rb')", "open(p, 'wb')", "os.open(p, flags)"):
        assert not refused(text), text
    assert not refused("open(p, encoding='utf-8')")


def test_text_is_read_and_written_in_a_named_encoding():
    """On Windows, and in locales like ja_JP.EUC-JP, the default is not UTF-8."""
    violations = [
        f"{name_of(path)}:{node.lineno} {ast.unparse(node)[:60]}"
        for path in source_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and without_encoding(node)
    ]
    assert not violations, "\n".join(violations)


# --- requirements ------------------------------------------------------------------------------


def requirements(*names: str) -> dict[str, str]:
    """Package -> version part, of requirement files and what they include."""
    found: dict[str, str] = {}
    for name in names:
        for line in (ROOT / name).read_text("utf-8").splitlines():
            line = line.partition("#")[0].partition(";")[0].strip()
            if line.startswith("-r"):
                found |= requirements(line.removeprefix("-r").strip())
            elif line:
                package, version = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?(.*)", line).groups()
                found[package.lower().replace("_", "-")] = version.strip()
    return found


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=name_of)
def test_torch_is_never_an_open_range(path: Path):
    """A range would let pip replace the torch that all else was tested with."""
    for package, version in requirements(path.name).items():
        if package.startswith("torch"):
            assert re.fullmatch(r"==\d+\.\d+\.\d+", version), f"{package}{version}"


def test_torch_of_cpu_and_cuda_is_the_pinned_one():
    assert requirements("requirements.txt")["torch"] == "==2.13.0"


def constraints_for(name: str) -> str:
    """The constraints file that a requirements file is installed with."""
    return "constraints-xla.txt" if re.search("xla|tpu", name) else "constraints.txt"


def pins(name: str) -> dict[str, str]:
    """Package -> version, of a constraints file."""
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            package, version = line.split("==")
            found[canonicalize_name(package)] = version
    return found


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=name_of)
def test_the_tested_version_of_every_requirement_is_known(path: Path):
    """Packages of one kind of storage are comments, so not among them."""
    tested, wrong = pins(constraints_for(path.name)), []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text and not text.startswith("-r"):
            required = Requirement(text)
            version = tested.get(canonicalize_name(required.name))
            if version is None or not required.specifier.contains(version):
                wrong.append(f"{text}, but {constraints_for(path.name)} has {version}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-xla.txt"])
def test_constraints_are_exact_and_for_any_device(name):
    for package, version in pins(name).items():
        assert re.fullmatch(r"[\d.]+((a|b|rc|\.post)\d+)*", version), f"{package}=={version}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "constraints"), [("venv", "constraints.txt"), ("xla-venv", "constraints-xla.txt")]
)
def test_make_installs_again_when_constraints_change(tmp_path, target, constraints):
    for path in (
        ROOT / "Makefile",
        *ROOT.glob("requirements*.txt"),
        *ROOT.glob("constraints*.txt"),
    ):
        shutil.copy(path, tmp_path)

    def installs() -> tuple[list[str], list[str]]:
        """Stamps that would be made, and commands of pip."""
        settings = [f"VENV={tmp_path}/venv", f"PYTHON={sys.executable}", f"HOME={tmp_path}"]
        command = ["make", "--dry-run", target, *settings]
        env = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
        printed = subprocess.run(
            command,
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=True,
            encoding="utf-8",
        ).stdout
        stamps = re.findall(r"^(?:touch|mv \S+) (\S+)$", printed, re.M)
        return stamps, re.findall(r"^.* pip install .*$", printed, re.M)

    stamps, lines = installs()
    assert stamps and lines and all(f"-c {constraints} " in line for line in lines)
    assert installs()[0] == stamps
    with (tmp_path / constraints).open("a", encoding="utf-8") as file:
        file.write("another==1.0\n")
    assert not set(installs()[0]) & set(stamps)


def test_everything_imported_is_required():
    """A fresh environment must not fail at the first import."""
    known = requirements(*(path.name for path in ROOT.glob("requirements*.txt")))
    missing = set()
    for path in shipped_files():
        for line, module in imports(path):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names | {*PARTS, *ABOVE_ALL} | NOT_REQUIRED:
                continue
            if top == "compression":  # standard library from Python 3.14 on
                continue
            package = PACKAGES.get(top, top).replace("_", "-")
            if package not in known:
                missing.add(f"{name_of(path)}:{line} imports {module}")
    assert not missing, "\n".join(sorted(missing))

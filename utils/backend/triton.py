"""What Triton needs to compile kernels for a GPU."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


def missing_for_triton() -> str | None:
    """Return what Triton is missing here to compile a launcher for each kernel; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else ["gcc", "clang"])):
        wanted = f"CC={named} is not a program" if named else "there is neither gcc nor clang"
        return f"Triton needs a C compiler, and {wanted}"
    own = sysconfig.get_paths(_scheme())["include"]
    folders = [own]
    for name in ("CPATH", "C_INCLUDE_PATH"):
        folders += filter(None, os.environ.get(name, "").split(os.pathsep))
    if not any((Path(folder) / "Python.h").is_file() for folder in folders):
        return (
            f"Triton needs Python's C headers, and there is no {own}/Python.h: install python3-dev"
        )
    return None


def _scheme() -> str:
    """Return the name of the installation scheme whose headers Triton uses."""
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own has no headers

"""Compile and load the C++ kernels beside this file."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp")


@cache
def load_native(name: str, *flags: str) -> ctypes.CDLL | None:
    """Return the library of `models/<name>.cpp`; None if it cannot be compiled or loaded.

    flags: for the compiler, such as instruction sets, which the caller checks. A failure of an
    installed compiler is a warning.
    """
    try:
        library = build_native(name, *flags)
        return None if library is None else ctypes.CDLL(str(library))
    except subprocess.SubprocessError as error:
        output = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace")
        first = next((line for line in output.splitlines() if "error" in line), output.strip())
        warnings.warn(
            f"models/{name}.cpp cannot be compiled, so slower code is used: {first[:300]}",
            stacklevel=2,
        )
    except (OSError, RuntimeError):  # the home or cache folder cannot be written to
        pass
    return None


def build_native(name: str, *flags: str) -> Path | None:
    """Compile `models/<name>.cpp` unless that has been done; return the library.

    The compiler is $CXX, c++, g++ or clang++; None if there is none. Libraries are kept in
    `~/.cache/athena` ($XDG_CACHE_HOME/athena).
    """
    candidates = (os.environ.get("CXX"), *_COMPILERS)
    compiler = next((path for c in candidates if c and (path := shutil.which(c))), None)
    if compiler is None:
        return None
    source = Path(__file__).with_name(f"{name}.cpp").read_bytes()
    command = [compiler, *_FLAGS, *flags]
    key = hashlib.sha256(source + " ".join(command).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "athena"
    library = folder / f"{name}-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # other processes compile it too
            built = Path(scratch, library.name)
            arguments = [*command, "-x", "c++", "-", "-o", str(built)]
            subprocess.run(arguments, input=source, check=True, capture_output=True, timeout=120)
            built.replace(library)
    return library

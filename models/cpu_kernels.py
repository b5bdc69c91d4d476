"""Compile and load `cpu_kernels.cpp`, bfloat16 kernels for CPUs with AVX-512 BF16."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_suffix(".cpp")
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp",
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma",
)  # fmt: skip


@cache
def cpu_kernels() -> ctypes.CDLL | None:
    """Return the kernels; None if this CPU cannot run them or they cannot be compiled.

    A failure of an installed compiler is a warning.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if not supported():
        return None
    try:
        path = build()
        library = None if path is None else ctypes.CDLL(str(path))
    except subprocess.SubprocessError as error:
        output = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace")
        first = next((line for line in output.splitlines() if "error" in line), output.strip())
        warnings.warn(
            f"{_SOURCE.name} cannot be compiled, so slower code is used: {first[:300]}",
            stacklevel=2,
        )
        return None
    except (OSError, RuntimeError):  # the home or cache folder cannot be written to
        return None
    if library is not None:
        library.scratch_bytes.restype = ctypes.c_int64
    return library


def build() -> Path | None:
    """Compile the kernels unless that has been done; return the library.

    The compiler is $CXX, c++, g++ or clang++; None if there is none. Libraries are kept in
    `~/.cache/athena` ($XDG_CACHE_HOME/athena).
    """
    candidates = (os.environ.get("CXX"), *_COMPILERS)
    compiler = next((path for c in candidates if c and (path := shutil.which(c))), None)
    if compiler is None:
        return None
    source = _SOURCE.read_bytes()
    command = [compiler, *_FLAGS]
    key = hashlib.sha256(source + " ".join(command).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "athena"
    library = folder / f"{_SOURCE.stem}-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # other processes compile it too
            built = Path(scratch, library.name)
            arguments = [*command, "-x", "c++", "-", "-o", str(built)]
            subprocess.run(arguments, input=source, check=True, capture_output=True, timeout=120)
            built.replace(library)
    return library

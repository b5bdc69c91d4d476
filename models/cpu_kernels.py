"""Compile and load `cpu_kernels.cpp`, bfloat16 kernels for CPUs with AVX-512 BF16."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
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
    """Return the kernels; None if this machine cannot run or compile them. If only the compiler is
    at fault, a warning says so.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if sys.platform != "linux" or not supported() or not _SOURCE.exists():
        return None  # exported models and the notebook come without the source
    try:
        library = ctypes.CDLL(str(build()))
        library.scratch_bytes.restype = ctypes.c_int64
        return library
    except (OSError, RuntimeError, AttributeError) as error:
        warnings.warn(
            f"{_SOURCE.name} cannot be used, so training on this CPU is slower: {error}",
            stacklevel=2,
        )
        return None


def has_amx() -> bool:
    """Return whether PyTorch multiplies matrices by AMX, which the kernels do not use."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def build() -> Path:
    """Compile the kernels unless that has been done; return the library.

    The compiler is $CXX, c++, g++ or clang++, the first that succeeds. Libraries are kept in
    `~/.cache/athena` ($XDG_CACHE_HOME/athena). Raises a RuntimeError if no compiler succeeds.
    """
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(source + " ".join(_FLAGS).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "athena"
    library = folder / f"{_SOURCE.stem}-{key}.so"
    if library.exists():
        return library
    candidates = (os.environ.get("CXX"), *_COMPILERS)
    compilers = [path for c in candidates if c and (path := shutil.which(c))]
    if not compilers:
        raise RuntimeError("there is no C++ compiler; install g++")
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # other processes may compile it too
        built = Path(scratch, library.name)
        for compiler in dict.fromkeys(compilers):
            try:
                command = [compiler, *_FLAGS, "-x", "c++", "-", "-o", str(built)]
                subprocess.run(command, input=source, check=True, capture_output=True, timeout=120)
                ctypes.CDLL(str(built))
            except (OSError, subprocess.SubprocessError) as error:
                failures.append(f"{compiler}: {_first_error(error)}")
                continue
            built.replace(library)
            return library
    raise RuntimeError("; ".join(failures))


def _first_error(error: Exception) -> str:
    """Return the first line of a compiler's output that is about an error."""
    output = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace")
    found = next((line for line in output.splitlines() if "error" in line), output.strip())
    return found[:300]

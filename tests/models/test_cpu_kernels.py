"""Compiling the C++ kernels; what they compute is tested with the modules that use them."""

import shutil
import subprocess
import sys

import pytest
import torch

from models.cpu_kernels import build, cpu_kernels


@pytest.fixture
def cache_folder(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")  # a loaded library stays open
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    cpu_kernels.cache_clear()
    yield folder / "athena"
    cpu_kernels.cache_clear()


@pytest.mark.slow
def test_a_kernel_is_compiled_once(cache_folder, monkeypatch):
    """Another process finds what the first one compiled; nothing else stays in the folder."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    library = build()
    assert list(cache_folder.iterdir()) == [library]
    monkeypatch.setattr(subprocess, "run", None)
    assert build() == library


@pytest.fixture
def capable(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")


def test_without_a_compiler_there_is_no_kernel(cache_folder, monkeypatch, capable):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match="g\\+\\+"):
        assert cpu_kernels() is None


@pytest.mark.parametrize("last", ["exit 1", "true > /dev/null"], ids=["failed", "wrote nothing"])
def test_compilers_that_fail_are_named(cache_folder, monkeypatch, tmp_path, capable, last):
    for name in ("c++", "g++"):
        broken = tmp_path / name
        script = f"#!/bin/sh\necho 'x.cpp:1: error: unknown type {name}' >&2\n{last}\n"
        broken.write_text(script, encoding="utf-8")
        broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    expected = "unknown type c.*unknown type g" if last == "exit 1" else "c\\+\\+: .*; .*g\\+\\+: "
    with pytest.warns(UserWarning, match=expected):
        assert cpu_kernels() is None
    assert list(cache_folder.iterdir()) == []


def test_a_library_that_cannot_be_loaded_is_named(cache_folder, monkeypatch, tmp_path, capable):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"")
    monkeypatch.setattr("models.cpu_kernels.build", lambda: broken)
    with pytest.warns(UserWarning, match="broken.so"):
        assert cpu_kernels() is None

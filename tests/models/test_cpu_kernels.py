"""Compiling the C++ kernels; what they compute is tested with the modules that use them."""

import subprocess

import pytest
import torch

from models.cpu_kernels import build, cpu_kernels


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_kernels.cache_clear()
    yield tmp_path / "athena"
    cpu_kernels.cache_clear()


@pytest.mark.slow
def test_a_kernel_is_compiled_once(cache_folder, monkeypatch):
    """Another process finds what the first one compiled; nothing else stays in the folder."""
    library = build()
    if library is None:
        pytest.skip("there is no C++ compiler")
    assert list(cache_folder.iterdir()) == [library]
    monkeypatch.setattr(subprocess, "run", None)
    assert build() == library


def test_without_a_compiler_there_is_no_kernel(cache_folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert cpu_kernels() is None


def test_a_compiler_that_fails_is_named(cache_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    broken = tmp_path / "c++"
    broken.write_text(
        "#!/bin/sh\necho 'x.cpp:1: error: unknown type' >&2\nexit 1\n", encoding="utf-8"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(UserWarning, match="cpu_kernels.cpp.*unknown type"):
        assert cpu_kernels() is None
    assert list(cache_folder.iterdir()) == []

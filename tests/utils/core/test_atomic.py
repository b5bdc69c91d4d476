"""What is written appears whole or not at all, and nothing else remains."""

import os
import stat
from pathlib import Path

import pytest

from utils.core.atomic import write_atomically, write_result
from utils.core.errors import UserError


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_replaces_another_once_it_is_whole(tmp_path):
    target = tmp_path / "made" / "for it" / "curves.png"
    for text in ("one", "two"):
        with write_atomically(target) as part:
            assert part.suffix == ".png"  # some writers go by it
            part.write_text(text, "utf-8")
            assert not target.exists() or target.read_text("utf-8") == "one"
        assert target.read_text("utf-8") == text
    assert everything(tmp_path) == ["made", "made/for it", "made/for it/curves.png"]


def test_a_file_keeps_the_mode_that_its_owner_gave_it(tmp_path):
    target = tmp_path / "report.html"
    target.touch()
    for mode in (0o600, 0o664):
        target.chmod(mode)
        with write_atomically(target) as part:
            part.write_text("again", "utf-8")
        assert stat.S_IMODE(target.stat().st_mode) == mode


@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_when_writing_fails(tmp_path, kind, error):
    (tmp_path / "old.txt").write_text("old", "utf-8")
    for target in (tmp_path / "old.txt", tmp_path / "a" / "b" / "new.txt"):
        with pytest.raises(error), write_atomically(target) as part:
            if kind == "folder":
                (part / "inner").mkdir(parents=True)
                (part / "inner" / "half").write_text("h", "utf-8")
            elif kind == "file":
                part.write_text("h", "utf-8")
            raise error
    assert (
        everything(tmp_path) == ["old.txt"] and (tmp_path / "old.txt").read_text("utf-8") == "old"
    )


def test_a_folder_joins_one_that_exists(tmp_path):
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "mine.txt").write_text("mine", "utf-8")
    (tmp_path / "out" / "train" / "a.txt").write_text("old", "utf-8")
    with write_atomically(tmp_path / "out") as part:
        (part / "train").mkdir(parents=True)
        (part / "train" / "a.txt").write_text("new", "utf-8")
        (part / "b.txt").write_text("new", "utf-8")
    found = {name: (tmp_path / name).read_text("utf-8") for name in everything(tmp_path)
             if name.endswith("txt")}  # fmt: skip
    assert found == {"out/b.txt": "new", "out/train/a.txt": "new", "out/train/mine.txt": "mine"}
    assert len(everything(tmp_path)) == 5


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "real.txt").write_text("old", "utf-8")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with write_atomically(tmp_path / "link.txt") as part:
        part.write_text("new", "utf-8")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text(
        "utf-8"
    ) == "new"
    with write_atomically(os.devnull) as part:
        part.write_text("nothing", "utf-8")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def test_the_message_names_option_value_and_reason(tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    target = tmp_path / "file" / "x.txt"
    with (
        pytest.raises(UserError, match=r"--output .*x\.txt .*file\)"),
        write_result(target, f"--output {target}") as part,
    ):
        part.write_text("x", "utf-8")


def test_a_pipe_is_written_to():
    """As with --output /dev/stdout in a pipeline."""
    reader, writer = os.pipe()
    with open(reader, "rb") as stream:
        with write_result(f"/dev/fd/{writer}", "--output") as part:
            part.write_text("text", "utf-8")
        os.close(writer)
        assert stream.read() == b"text"


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with write_result("~/a.txt", "--output") as part:
        part.write_text("text", "utf-8")
    assert everything(tmp_path) == ["a.txt"]

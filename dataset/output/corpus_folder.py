"""Corpus folders that appear whole or not at all, and builds that can be gone on with.

A corpus is built in a folder beside its target and renamed at the very end. What stood at the
target stays until then.
"""

import argparse
import glob
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.common import METADATA_NAME
from dataset.output.journal import DamagedBuildError, Journal
from utils.core.errors import UserError

CORPUS_ENTRIES = {"train", "test", "identifiers.json", "tokenizer.json", "build_report.json"}


def is_corpus(folder: Path) -> bool:
    """Whether a builder of Athena (or of TRM) finished this folder."""
    return any(
        (folder / "train" / layout / METADATA_NAME).is_file() for layout in ("all", ".")
    ) and ((folder / "identifiers.json").is_file())


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The options that every builder shares."""
    parser.add_argument("--output-dir", required=True, type=Path, metavar="FOLDER")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a finished corpus, at the very end"
    )


def resolve_output(output_dir: str | Path) -> Path:
    """Return the absolute path of the folder that --output-dir names."""
    try:
        return Path(output_dir).expanduser().resolve()
    except RuntimeError:  # no such user, or no home folder
        raise UserError(
            f"--output-dir {output_dir}: ~ names no home folder here; write the path out."
        ) from None


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Refuse, before any work is done, a folder that must not be replaced."""
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir} is a file; name a folder.")
    entries = {entry.name for entry in output_dir.iterdir()}
    if not entries:
        return
    if not is_corpus(output_dir):
        raise UserError(
            f"--output-dir {output_dir} is not empty and holds no finished corpus; name a new "
            "folder, or empty this one yourself."
        )
    if not overwrite:
        raise UserError(
            f"--output-dir {output_dir} holds a finished corpus; name another folder, or pass "
            "--overwrite to replace it."
        )
    if foreign := sorted(entries - CORPUS_ENTRIES):
        raise UserError(
            f"--output-dir {output_dir} also holds {', '.join(foreign[:5])}, which --overwrite "
            "would delete; move that away first."
        )


@contextmanager
def corpus_folder(output_dir: str | Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling to build in; it takes `output_dir`'s place when the block succeeds.

    On any exception the sibling is removed and `output_dir` is as it was.
    """
    target = resolve_output(output_dir)
    check_output_dir(target, overwrite)
    building = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    with _disk_faults(building):
        shutil.rmtree(building, ignore_errors=True)  # of an earlier process of the same number
        building.mkdir(parents=True)
    try:
        with _disk_faults(building):
            yield building
            _sync_folders(building)
            check_output_dir(target, overwrite)  # someone else may have finished meanwhile
            _replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@dataclass(frozen=True)
class Workplace:
    """Where a build that can be gone on with happens."""

    folder: Path
    journal: Journal

    @property
    def state(self) -> Any:
        """What an earlier build committed; None at the beginning."""
        return self.journal["state"]

    @property
    def finished(self) -> bool:
        """Whether all files are written, and at most the last rename is missing."""
        return bool(self.journal["finished"])

    @property
    def renamed(self) -> bool:
        """Whether the build was killed right after its last rename: all but the journal is gone."""
        return self.finished and not self.folder.exists()


@contextmanager
def resumable_folder(
    output_dir: str | Path, *, overwrite: bool, resume: bool, identity: dict[str, Any]
) -> Iterator[Workplace]:
    """A folder beside `output_dir` to build in, with a journal; it takes `output_dir`'s place when
    the block succeeds.

    What was built up to the last commit outlasts errors and crashes. `resume` goes on with it, if
    its `identity` is the same; without, an unfinished build is an error, or, with `overwrite`,
    thrown away.
    """
    target = resolve_output(output_dir)
    check_output_dir(target, overwrite)
    building = target.with_name(f".{target.name}.building")
    with _disk_faults(building):
        journal = _open_journal(building, target, overwrite, resume)
        if (known := journal["identity"]) is None:
            journal.commit(identity=(known := identity))
    if changed := [n for n in {**known, **identity} if known.get(n) != identity.get(n)]:
        journal.close()
        what = "; ".join(f"{n} was {known.get(n)}, now {identity.get(n)}" for n in changed)
        raise UserError(
            f"--resume: the unfinished build of {target} was begun otherwise: {what}; change that "
            "back, or begin anew with --overwrite."
        )
    place = Workplace(building / "corpus", journal)
    try:
        with _disk_faults(building):
            yield place
            if place.renamed:
                _remove_former(target)
                return
            _sync_folders(place.folder)
            journal.commit(finished=True)
            check_output_dir(target, overwrite)  # someone else may have finished meanwhile
            _replace(place.folder, target)
    except DamagedBuildError:
        raise
    except UserError as error:
        if place.state is None:
            raise
        raise UserError(f"{error} What was built before is kept: go on with --resume.") from error
    except KeyboardInterrupt:
        if place.state is not None:
            print("what was built so far is kept: go on with --resume", file=sys.stderr)
        raise
    finally:
        keep = place.state is not None and place.folder.exists()
        if not keep:  # under the journal's lock: another build may be waiting to begin
            shutil.rmtree(building, ignore_errors=True)
        journal.close()


def _open_journal(building: Path, target: Path, overwrite: bool, resume: bool) -> Journal:
    """The journal of an unfinished build to go on with, or of a new one in an empty folder.

    Nothing is touched before the journal's lock is held: two builds may begin at the same moment.
    """
    building.mkdir(parents=True, exist_ok=True)
    path = building / "journal.sqlite"
    try:
        journal = Journal(path)
    except DamagedBuildError:
        if not overwrite or resume:
            raise
        path.unlink()
        journal = Journal(path)
    place = Workplace(building / "corpus", journal)
    unfinished = place.state is not None and not place.renamed
    if resume and (unfinished or (place.renamed and is_corpus(target))):
        return journal
    if unfinished and not overwrite:
        journal.close()
        raise UserError(
            f"an unfinished build of {target} is there; go on with --resume, or begin anew with "
            "--overwrite."
        )
    journal.clear()
    for left in building.iterdir():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    place.folder.mkdir()
    return journal


def clear_leftovers(output_dir: Path) -> None:
    """Remove what a build that was killed right after its last rename has left."""
    target = resolve_output(output_dir)
    building = target.with_name(f".{target.name}.building")
    if not (building / "journal.sqlite").is_file():
        for left in building.glob("journal.sqlite-*"):  # its removal was cut short
            left.unlink(missing_ok=True)
        with suppress(OSError):
            building.rmdir()
        return
    try:
        journal = Journal(building / "journal.sqlite")
    except UserError:  # damaged, or at work: not ours to remove
        return
    if Workplace(building / "corpus", journal).renamed:
        shutil.rmtree(building, ignore_errors=True)
        _remove_former(target)
    journal.close()


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    """A disk that is full or cannot be written to ends in one sentence."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        what = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write to {folder.parent}: {what}; make room there, or name another "
            "--output-dir."
        ) from error


def _sync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        _sync_folder(Path(folder))


def _sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(building: Path, target: Path) -> None:
    """Put `building` in `target`'s place; what stood there is deleted last."""
    former = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.rename(target, former)
    try:
        os.rename(building, target)
    except OSError:
        if former.exists():
            os.rename(former, target)
        raise
    _sync_folder(target.parent)
    _remove_former(target)


def _remove_former(target: Path) -> None:
    """Delete what stood at `target` before, crashes included."""
    for former in target.parent.glob(f".{glob.escape(target.name)}.old-*"):
        shutil.rmtree(former, ignore_errors=True)

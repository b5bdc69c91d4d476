"""Create corpus directories atomically, and resume interrupted builds.

A corpus is built in a sibling of the target directory and renamed at the very end. Existing
contents of the target are kept until then.
"""

import argparse
import glob
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.common import METADATA_NAME
from dataset.output.journal import DamagedBuildError, Journal
from utils.core.errors import UserError

CORPUS_ENTRIES = {"train", "test", "identifiers.json", "tokenizer.json", "build_report.json"}


def is_corpus(folder: Path) -> bool:
    """Return whether this directory contains a corpus finished by Athena's or TRM's builders."""
    return any(
        (folder / "train" / layout / METADATA_NAME).is_file() for layout in ("all", ".")
    ) and ((folder / "identifiers.json").is_file())


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the output options that all builders share."""
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing corpus once the new one is complete",
    )


def resolve_output(output_dir: str | Path) -> Path:
    """Return the absolute path of --output-dir."""
    try:
        return Path(output_dir).expanduser().resolve()
    except RuntimeError:  # no such user, or no home directory
        raise UserError(
            f"--output-dir {output_dir}: ~ does not resolve to a home directory; use a full path."
        ) from None


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Fail early if the output directory must not be replaced."""
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir} is a file; pass a directory.")
    entries = {entry.name for entry in output_dir.iterdir()}
    if not entries:
        return
    if not is_corpus(output_dir):
        raise UserError(
            f"--output-dir {output_dir} is not empty and does not contain a finished corpus; use a "
            "new directory or empty this one first."
        )
    if not overwrite:
        raise UserError(
            f"--output-dir {output_dir} already contains a finished corpus; use another directory, "
            "or pass --overwrite to replace it."
        )
    if foreign := sorted(entries - CORPUS_ENTRIES):
        raise UserError(
            f"--output-dir {output_dir} also contains {', '.join(foreign[:5])}, which --overwrite "
            "would delete; move it elsewhere first."
        )


@dataclass(frozen=True)
class BuildWorkspace:
    """Directory and journal of a build."""

    folder: Path
    journal: Journal

    @property
    def state(self) -> Any:
        """State committed by an earlier build, or None for a new one."""
        return self.journal["state"]

    @property
    def finished(self) -> bool:
        """Whether all files are written and only the final rename may be missing."""
        return bool(self.journal["finished"])

    @property
    def renamed(self) -> bool:
        """Whether the build was killed right after its final rename, so only the journal exists."""
        return self.finished and not self.folder.exists()


@contextmanager
def create_corpus(
    output_dir: str | Path,
    overwrite: bool,
    *,
    resume: bool = False,
    identity: dict[str, Any] | None = None,
) -> Iterator[BuildWorkspace]:
    """Yield a workspace next to `output_dir`, with a journal; on success it replaces `output_dir`.

    Everything up to the last commit of a `state` survives errors and crashes. With `resume`, such a
    build is continued if its `identity` is unchanged; without, an unfinished build is an error or,
    with `overwrite`, is discarded. If a build commits no state, its directory is deleted.
    """
    identity = identity or {}
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
            f"--resume: the unfinished build of {target} was started with other settings: {what}; "
            "restore them, or start over with --overwrite."
        )
    workspace = BuildWorkspace(building / "corpus", journal)
    try:
        with _disk_faults(building):
            yield workspace
            if workspace.renamed:
                _remove_former(target)
                return
            _sync_folders(workspace.folder)
            journal.commit(finished=True)
            check_output_dir(target, overwrite)  # another build may have finished meanwhile
            _replace(workspace.folder, target)
    except DamagedBuildError:
        raise
    except UserError as error:
        if workspace.state is None:
            raise
        raise UserError(f"{error} The progress is saved: continue with --resume.") from error
    except KeyboardInterrupt:
        if workspace.state is not None:
            print("the progress is saved: continue with --resume", file=sys.stderr)
        raise
    finally:
        keep = workspace.state is not None and workspace.folder.exists()
        if not keep:  # while holding the lock: another build may be waiting to start
            shutil.rmtree(building, ignore_errors=True)
        journal.close()


def _open_journal(building: Path, target: Path, overwrite: bool, resume: bool) -> Journal:
    """Open the journal of an unfinished build to resume, or of a new one in an empty directory.

    Nothing is modified before the journal's lock is held, because two builds may start at once.
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
    workspace = BuildWorkspace(building / "corpus", journal)
    unfinished = workspace.state is not None and not workspace.renamed
    if resume and (unfinished or (workspace.renamed and is_corpus(target))):
        return journal
    if unfinished and not overwrite:
        journal.close()
        raise UserError(
            f"there is an unfinished build of {target}; continue with --resume, or start over with "
            "--overwrite."
        )
    journal.clear()
    for left in building.iterdir():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    workspace.folder.mkdir()
    return journal


def clear_leftovers(output_dir: Path) -> None:
    """Remove the leftovers of a build that was killed right after its final rename."""
    target = resolve_output(output_dir)
    building = target.with_name(f".{target.name}.building")
    if not building.is_dir():
        return
    try:
        journal = Journal(building / "journal.sqlite")
    except UserError:  # damaged, or in use: not ours to remove
        return
    # Without an identity, nothing was saved, or the removal itself was interrupted.
    if journal["identity"] is None or BuildWorkspace(building / "corpus", journal).renamed:
        shutil.rmtree(building, ignore_errors=True)
        _remove_former(target)
    journal.close()


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    """Convert errors of a full or read-only disk to a UserError."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        what = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write to {folder.parent}: {what}; free up space there or use another "
            "--output-dir."
        ) from error


def _sync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        _sync_folder(Path(folder))


def _sync_folder(folder: Path) -> None:
    """Flush a directory's entries to disk, if the system supports it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open directories
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(building: Path, target: Path) -> None:
    """Replace `target` with `building`; delete the old contents last."""
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
    """Delete the old contents of `target`, including those left by crashes."""
    for former in target.parent.glob(f".{glob.escape(target.name)}.old-*"):
        shutil.rmtree(former, ignore_errors=True)

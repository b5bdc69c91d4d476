"""Write files and folders atomically."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.core.errors import UserError


@contextmanager
def write_atomically(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `target` for a file or a folder; move it to `target` at the
    end.

    The path has the file extension of `target`. A file replaces an existing file and keeps its
    mode; the files of a folder replace those of the same name in an existing folder, one by one. If
    an exception is raised within the context, `target` is unchanged, and the temporary path and new
    parent folders are deleted. Only if moving the files of a folder fails midway may some have been
    replaced.
    """
    target = Path(os.path.expanduser(target))
    if target.exists() and not target.is_file() and not target.is_dir():
        yield target  # a pipe or a device, such as /dev/stdout
        return
    target = Path(os.path.realpath(target))  # a link remains a link
    made = [folder for folder in target.parents if not folder.exists()]
    part = target.with_name(f".{target.stem[:50]}.part-{os.getpid()}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)  # from an earlier process with the same id
        yield part
        if target.is_file() and part.is_file():
            with suppress(OSError):  # some network storage does not support modes
                shutil.copymode(target, part)
        _move(part, target)
    except BaseException:
        with suppress(OSError):
            _remove(part)
        for folder in made:
            with suppress(OSError):  # another process may use it
                folder.rmdir()
        raise


@contextmanager
def write_result(target: str | Path, setting: str) -> Iterator[Path]:
    """Call `write_atomically`; raise UserError if writing fails.

    setting: the option that sets the target, and its value, as the user gave them.
    """
    try:
        with write_atomically(target) as part:
            yield part
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename is not None and Path(error.filename) in Path(target).absolute().parents:
            reason += f" ({error.filename})"  # the folder where it failed
        raise UserError(
            f"{setting} cannot be written: {reason}; free up space or choose another path"
        ) from error


def _move(part: Path, target: Path) -> None:
    if not (part.is_dir() and target.is_dir()):
        os.replace(part, target)
        return
    for file in [path for path in part.rglob("*") if not path.is_dir()]:
        place = target / file.relative_to(part)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""Files and folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.core.errors import UserError


@contextmanager
def write_atomically(target: str | Path) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or a folder to; move it there at the end.

    The path has the file extension of `target`. A file replaces one that exists and keeps its mode;
    the files of a folder replace those of the same names in a folder that exists, one by one. On an
    exception in the block `target` is as it was, and neither what was written so far nor parent
    folders that were made for it remain. Only where moving the files of a folder fails midway may
    some of them have replaced others.
    """
    target = Path(os.path.expanduser(target))
    if target.exists() and not target.is_file() and not target.is_dir():
        yield target  # a pipe or a device, such as /dev/stdout
        return
    target = Path(os.path.realpath(target))  # a link stays one
    made = [folder for folder in target.parents if not folder.exists()]
    part = target.with_name(f".{target.stem[:50]}.part-{os.getpid()}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)  # of an earlier process of the same number
        yield part
        if target.is_file() and part.is_file():
            with suppress(OSError):  # some network storage has no modes
                shutil.copymode(target, part)
        _move(part, target)
    except BaseException:
        with suppress(OSError):
            _remove(part)
        for folder in made:
            with suppress(OSError):  # somebody else may have begun to use it
                folder.rmdir()
        raise


@contextmanager
def write_result(target: str | Path, setting: str) -> Iterator[Path]:
    """Write as `write_atomically` does; raise UserError where the disk refuses.

    setting: the option that names the target, and its value, as the user gave them.
    """
    try:
        with write_atomically(target) as part:
            yield part
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename is not None and Path(error.filename) in Path(target).absolute().parents:
            reason += f" ({error.filename})"  # which of the folders is at fault
        raise UserError(
            f"{setting} cannot be written: {reason}; make room there, or name another place"
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

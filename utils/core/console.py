"""What a user sees on a terminal: sentences, progress, errors."""

import argparse
import errno
import io
import os
import select
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from utils.core.errors import UserError
from utils.core.plugins import describe_failure

LINE_SECONDS = 20.0  # between two lines where there is no terminal for a bar


def notify(sentence: str) -> None:
    """Print a line at once, without breaking a progress bar."""
    tqdm.write(sentence)
    sys.stdout.flush()


class Progress(tqdm):
    """A bar on a terminal; elsewhere a line every LINE_SECONDS, because a bar makes a log file hard
    to read. Nothing at all where `shown` is false."""

    def __init__(self, total: int, desc: str, unit: str, shown: bool):
        self._lines = shown and not sys.stderr.isatty()
        self._done, self._whole, self._name = 0, total, desc
        self._told_at = time.monotonic()
        super().__init__(
            total=total, desc=desc, unit=unit, leave=False, disable=not shown or self._lines
        )

    def update(self, n: float | None = 1) -> bool | None:
        self._done += int(n or 0)
        if self._lines and time.monotonic() - self._told_at >= LINE_SECONDS:
            self._told_at = time.monotonic()
            print(f"{self._name} {self._done:,} of {self._whole:,}", flush=True)
        return super().update(n)


LARGEST_SEED = 2**64 - 1


T = TypeVar("T")


_PROJECT = Path(__file__).resolve().parents[2]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one line, as for every other mistake, without a list of all options."""
        self.exit(2, f"error: {message}; --help lists the options\n")


def command_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose --help begins with the module's own description, as it was written."""
    return _Parser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


@contextmanager
def warnings_as_notes(shown: bool = True) -> Iterator[None]:
    """Show the project's own warnings as notes: once each, without a source line."""
    with warnings.catch_warnings():
        usual, said = warnings.showwarning, set()

        def show(message, category, filename, lineno, file=None, line=None) -> None:
            ours = filename.startswith(str(_PROJECT)) and "site-packages" not in filename
            if not ours or category is not UserWarning:
                usual(message, category, filename, lineno, file, line)
            elif shown and str(message) not in said:
                said.add(str(message))
                tqdm.write(f"note: {message}")

        warnings.showwarning = show
        yield


def seed_number(text: str) -> int:
    """Read an argument --seed, for argparse."""
    try:
        if 0 <= (seed := int(text)) <= LARGEST_SEED:
            return seed
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {LARGEST_SEED}")


@contextmanager
def guarded_output(closed_status: int = 128 + 13) -> Iterator[None]:
    """Guard what a command prints.

    Characters that standard output cannot encode are escaped. A pipe that was closed, as by `head`,
    ends the command quietly with `closed_status`, by default what SIGPIPE gives; output that cannot
    be written ends it with a sentence and exit status 2.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # its descriptor is closed: python >&-
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for as long as it runs
            setattr(sys, name, nowhere)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in _OUTPUT_FAULTS:
            raise
        failing = [stream for stream in (sys.stdout, sys.stderr) if _fails(stream)]
        if not failing:
            raise
        nothing = os.open(os.devnull, os.O_WRONLY)  # Python flushes once more at its end
        for stream in failing:
            os.dup2(nothing, stream.fileno())
        if error.errno == errno.EPIPE:
            raise SystemExit(closed_status) from None
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None


_OUTPUT_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE}


def _fails(stream: Any) -> bool:
    """Return whether a stream is a closed pipe, or holds output that cannot be written."""
    try:
        stream.flush()
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are always reported
        return bool(poll.poll(0))
    except (AttributeError, io.UnsupportedOperation):  # Windows; a stream without a file
        return False
    except OSError:
        return True


def check_decoded(texts: Iterable[str]) -> None:
    """Raise UserError for an argument or file name whose bytes the locale's encoding lacks."""
    for text in texts:
        if any("\udc80" <= char <= "\udcff" for char in text):  # as Python keeps such bytes
            encoding = sys.getfilesystemencoding()
            advice = "rename it" if encoding == "utf-8" else "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            shown = os.fsencode(text).decode("utf-8", "backslashreplace")
            raise UserError(f"{shown!r} cannot be read in the encoding {encoding}; {advice}")


def describe_error(error: Exception) -> str | None:
    """Return the sentence for an error that a user can fix: a UserError, or one in the code of a
    plug-in. None for a fault of Athena's, which keeps its traceback.

    With ATHENA_TRACEBACK=1 the traceback is printed as well.
    """
    cause = error.__cause__ if isinstance(error, UserError) else error
    inside = None if cause is None else describe_failure(cause)
    sentence = str(error) if isinstance(error, UserError) else inside
    if sentence is not None and os.environ.get("ATHENA_TRACEBACK") == "1":
        traceback.print_exception(error)
    elif inside is not None:
        sentence = f"{sentence}; ATHENA_TRACEBACK=1 shows the whole traceback"
    return sentence


def run_cli(fn: Callable[[], T], closed_status: int = 128 + 13, check_arguments: bool = True) -> T:
    """Call a command's body; what `describe_error` describes ends in one line on stderr and exit
    code 2.

    closed_status: see `guarded_output`; 0 for a command that only shows things. check_arguments:
    refuse arguments that the locale cannot decode; False for a command that decodes its own.
    """
    with guarded_output(closed_status):
        try:
            if check_arguments:
                check_decoded(sys.argv)
            with warnings_as_notes():
                return fn()
        except Exception as error:
            if (sentence := describe_error(error)) is None:
                raise
            print(f"error: {sentence}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

"""Find the input files and determine their format and compression.

Format and compression are inferred from the file extension. Remote files are fetched into a local
cache.
"""

import argparse
import glob
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dataset.input.formats import extensions_with
from utils.core.console import check_decoded
from utils.core.errors import UserError
from utils.remote.cache import fetch, is_remote
from utils.remote.storage import Storage

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}
STDIN = Path("-")


@dataclass(frozen=True)
class Source:
    """One input file, or standard input (`path` is `-`)."""

    path: Path
    format: str
    """text | jsonl | parquet, or module@Class"""
    compression: str | None
    label: str
    url: str | None = None
    """URL of a remote file; `path` is then its local copy."""

    @property
    def is_stdin(self) -> bool:
        return self.path == STDIN

    @property
    def is_pipe(self) -> bool:
        """Whether the source can be read only once."""
        return self.is_stdin or self.path.is_fifo()

    @property
    def size(self) -> int:
        """Bytes on disk; 0 for standard input."""
        return 0 if self.is_stdin else self._stat().st_size

    @property
    def version(self) -> str:
        """A string that changes when the file does.

        The modification time in nanoseconds, the version in the cache of a remote file, or "" for
        standard input.
        """
        if self.is_stdin:
            return ""
        return self.path.parent.name if self.url else str(self._stat().st_mtime_ns)

    def _stat(self) -> os.stat_result:
        try:
            return self.path.stat()
        except OSError as error:  # removed since it was found
            raise UserError(f"cannot read {self}: {error.strerror}.") from error

    def __str__(self) -> str:
        return "standard input" if self.is_stdin else self.url or str(self.path)


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Add the input options that all text builders share."""
    parser.add_argument(
        "--input-files",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="files, globs, directories, - for standard input, or URLs such as "
        "s3://bucket/*.jsonl.zst (.txt .md .text .jsonl .json, optionally compressed as .gz .zst "
        ".xz, and .parquet)",
    )
    parser.add_argument(
        "--format",
        help="format of files without a known extension: text, jsonl, parquet, or module@Class of "
        "your own, which is also that of files with its extensions",
    )
    parser.add_argument(
        "--plugins",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="directories in which module@Class is looked up",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        help="JSON key or Parquet column that contains the text (default: text)",
    )
    parser.add_argument(
        "--documents",
        choices=("line", "paragraph", "file"),
        default="line",
        help="what counts as a document in plain text (default: line)",
    )
    parser.add_argument(
        "--max-bad-lines",
        type=int,
        default=0,
        metavar="N",
        help="number of lines (or Parquet rows) without usable text to skip before failing "
        "(default: 0)",
    )


def split_name(path: Path, formats: Mapping[str, str]) -> tuple[str, str | None, str | None]:
    """Split a file name into stem, format and compression (None if the extension is unknown).

    formats: the format of each file extension.
    """
    name = path.name
    compression = COMPRESSIONS.get(Path(name).suffix.lower())
    if compression:
        name = name[: -len(Path(name).suffix)]
    kind = formats.get(Path(name).suffix.lower())
    if kind:
        name = name[: -len(Path(name).suffix)]
    return name, kind, compression


def find_sources(arguments: list[str], given_format: str | None = None) -> list[list[Source]]:
    """Return a sorted list of sources for each command-line argument.

    An argument is a local or remote file, glob or directory, or `-`. given_format: the format of
    files without a known extension; if it is a class, also of files with the class's extensions.
    """
    formats = extensions_with(given_format)
    seen: dict[Path, str] = {}
    found = []
    for argument in arguments:
        if is_remote(argument):
            urls = _list_remote_files(argument, formats)
            sources = [_make_source(Path(url), formats, given_format, url) for url in urls]
        else:
            sources = [
                _make_source(path, formats, given_format) for path in _expand(argument, formats)
            ]
        for source in sources:
            key = source.path if source.is_stdin else source.path.resolve()
            if key in seen:
                raise UserError(
                    f"{source} is given twice, by {seen[key]!r} and {argument!r}; give it once."
                )
            seen[key] = argument
        found.append(sources)
    return found


def find_source(path: str, given_format: str, option: str) -> Source:
    """Return the single file that a key=value option refers to."""
    sources = [source for found in find_sources([path], given_format) for source in found]
    if len(sources) != 1:
        raise UserError(f"{option}={path} matches {len(sources)} files; pass a single file")
    return sources[0]


def _list_remote_files(argument: str, formats: Mapping[str, str]) -> list[str]:
    """Return the URLs of the files that a URL, glob or remote directory refers to."""
    urls = Storage(argument).urls()
    if urls == [argument]:
        return urls
    if readable := [url for url in urls if split_name(Path(url), formats)[1]]:
        return readable
    raise UserError(
        f"{argument} contains no files with extension {' '.join(formats)}; pass a single file."
    )


def _expand(argument: str, formats: Mapping[str, str]) -> list[Path]:
    if not argument.strip():
        raise UserError("an input path is empty (''); pass a file, or . for the current directory.")
    try:
        path = Path(argument).expanduser()
        if path == STDIN or path.is_file() or path.is_fifo():
            return [path]
        if path.is_dir():
            return _deduplicate(_list_files(path, argument, formats))
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        _check_links(matches)
        matches = [match for match in matches if match.is_file()]
    except RuntimeError:  # no such user, or no home directory
        raise UserError(
            f"the input {argument!r}: ~ does not resolve to a home directory; use a full path."
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read the input {argument!r}: {reason}.") from error
    if not matches:
        what = "matches no files" if glob.has_magic(argument) else "does not exist"
        raise UserError(f"the input {argument!r} {what}; check the path.")
    return _deduplicate(matches)


def _list_files(folder: Path, argument: str, formats: Mapping[str, str]) -> list[Path]:
    """Return all readable files below a directory, following links and skipping hidden files."""

    def fail(error: OSError) -> None:
        raise error

    found, others, entered = [], [], set()
    for place, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(place)) in entered:  # such as a link to a parent directory
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if split_name(path, formats)[1]]
        others += [str(path) for path in paths if not split_name(path, formats)[1]]
    if not found:
        raise UserError(
            f"the directory {argument} contains no files with extension {' '.join(formats)} "
            f"(optionally followed by {' '.join(COMPRESSIONS)}); select files with a glob."
        )
    if others:
        shown = ", ".join(sorted(others)[:3]) + (", …" if len(others) > 3 else "")
        warnings.warn(
            f"skipped {len(others)} file(s) in {argument} with unknown extensions ({shown}); use a "
            "glob to include them",
            stacklevel=1,
        )
    _check_links(found)
    return sorted(path for path in found if path.is_file())


def _check_links(paths: list[Path]) -> None:
    """Fail on broken links: their text would be silently missing."""
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist.")


def _deduplicate(paths: list[Path]) -> list[Path]:
    """Return the paths, without additional links to the same files."""
    once: dict[Path, Path] = {}
    for path in paths:
        once.setdefault(path.resolve(), path)
    return list(once.values())


def _make_source(
    path: Path, formats: Mapping[str, str], given_format: str | None, url: str | None = None
) -> Source:
    check_decoded([str(path)])
    if path == STDIN:
        label, kind, compression = "stdin", given_format, None
    else:
        label, kind, compression = split_name(path, formats)
    kind = kind or given_format
    if kind is None:
        what = "of standard input" if path == STDIN else f"of {url or path} from its name"
        raise UserError(
            f"cannot infer the format {what}; pass --format text, --format jsonl, "
            "--format parquet, or --format module@Class."
        )
    if kind == "parquet" and (compression or path == STDIN):
        what = (
            "from standard input"
            if path == STDIN
            else f"compressed as {path.suffix}: {url or path}"
        )
        raise UserError(f"cannot read Parquet {what}; pass the .parquet file itself.")
    return Source(fetch(url) if url else path, kind, compression, label, url)

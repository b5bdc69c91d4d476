"""Finding the input files: which they are, in which format, compressed how.

A file's name decides its format and compression; files may also be remote, and are then fetched
into a local cache.
"""

import argparse
import glob
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from utils.core.console import check_decoded
from utils.core.errors import UserError
from utils.remote.cache import expand, fetch, is_remote

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}
FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
STDIN = Path("-")


@dataclass(frozen=True)
class Source:
    """One input file, or standard input (`path` is `-`)."""

    path: Path
    format: str
    """text | jsonl | parquet"""
    compression: str | None
    label: str
    url: str | None = None
    """Where a remote file came from; `path` is then its copy here."""

    @property
    def is_stdin(self) -> bool:
        return self.path == STDIN

    @property
    def is_pipe(self) -> bool:
        """Return whether it can be read only once."""
        return self.is_stdin or self.path.is_fifo()

    @property
    def size(self) -> int:
        """Bytes on disk; 0 for standard input."""
        return 0 if self.is_stdin else self._stat().st_size

    @property
    def version(self) -> str:
        """What changes when the file does: its time of change in nanoseconds, or the name of the
        copy of a remote file; empty for standard input."""
        if self.is_stdin:
            return ""
        return self.path.parent.name if self.url else str(self._stat().st_mtime_ns)

    def _stat(self) -> os.stat_result:
        try:
            return self.path.stat()
        except OSError as error:  # it was there when it was found
            raise UserError(f"cannot read {self}: {error.strerror}.") from error

    def __str__(self) -> str:
        return "standard input" if self.is_stdin else self.url or str(self.path)


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """The options that every builder of text shares."""
    parser.add_argument(
        "--input-files",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="files, globs, folders, - for standard input, or remote ones such as "
        "s3://bucket/*.jsonl.zst (.txt .md .text .jsonl .json, plain or below .gz .zst .xz, and "
        ".parquet)",
    )
    parser.add_argument(
        "--format", choices=("text", "jsonl", "parquet"), help="where the name does not tell it"
    )
    parser.add_argument(
        "--text-key",
        default="text",
        help="JSON key, or Parquet column, of the text (default: text)",
    )
    parser.add_argument(
        "--documents",
        choices=("line", "paragraph", "file"),
        default="line",
        help="what one document of plain text is (default: line)",
    )
    parser.add_argument(
        "--max-bad-lines",
        type=int,
        default=0,
        metavar="N",
        help="lines (or Parquet rows) without usable text that are skipped before that is an error "
        "(default: 0)",
    )


def split_name(path: Path) -> tuple[str, str | None, str | None]:
    """A file's stem without format endings, its format and its compression (None: not told)."""
    name = path.name
    compression = COMPRESSIONS.get(Path(name).suffix.lower())
    if compression:
        name = name[: -len(Path(name).suffix)]
    kind = FORMATS.get(Path(name).suffix.lower())
    if kind:
        name = name[: -len(Path(name).suffix)]
    return name, kind, compression


def find_sources(arguments: list[str], given_format: str | None = None) -> list[list[Source]]:
    """Sources per command-line argument: a file, glob or folder, here or remote, or `-`; each list
    is sorted."""
    seen: dict[Path, str] = {}
    found = []
    for argument in arguments:
        if is_remote(argument):
            sources = [_source(Path(url), given_format, url) for url in _remote_files(argument)]
        else:
            sources = [_source(path, given_format) for path in _expand(argument)]
        for source in sources:
            key = source.path if source.is_stdin else source.path.resolve()
            if key in seen:
                raise UserError(
                    f"{source} is named twice, by {seen[key]!r} and {argument!r}; name it once."
                )
            seen[key] = argument
        found.append(sources)
    return found


def find_source(path: str, given_format: str, option: str) -> Source:
    """Return the one file that a key=value option names."""
    sources = [source for found in find_sources([path], given_format) for source in found]
    if len(sources) != 1:
        raise UserError(f"{option}={path} is {len(sources)} files; name one")
    return sources[0]


def _remote_files(argument: str) -> list[str]:
    """Remote files that a url, a pattern or a remote folder stands for."""
    urls = expand(argument)
    if urls == [argument]:
        return urls
    if readable := [url for url in urls if split_name(Path(url))[1]]:
        return readable
    raise UserError(f"{argument} holds no file that ends in {' '.join(FORMATS)}; name one file.")


def _expand(argument: str) -> list[Path]:
    if not argument.strip():
        raise UserError("an input is named by an empty text; name a file, or . for this folder.")
    try:
        path = Path(argument).expanduser()
        if path == STDIN or path.is_file() or path.is_fifo():
            return [path]
        if path.is_dir():
            return _each_once(_files_below(path, argument))
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        _check_links(matches)
        matches = [match for match in matches if match.is_file()]
    except RuntimeError:  # no such user, or no home folder
        raise UserError(
            f"the input {argument!r}: ~ names no home folder here; write the path out."
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read the input {argument!r}: {reason}.") from error
    if not matches:
        what = "matches no file" if glob.has_magic(argument) else "does not exist"
        raise UserError(f"the input {argument!r} {what}; check the path.")
    return _each_once(matches)


def _files_below(folder: Path, argument: str) -> list[Path]:
    """Readable files of a folder and its subfolders, links to folders included, hidden ones not."""

    def fail(error: OSError) -> None:
        raise error

    found, others, entered = [], [], set()
    for place, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(place)) in entered:  # a link to a folder further up, say
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if split_name(path)[1]]
        others += [str(path) for path in paths if not split_name(path)[1]]
    if not found:
        raise UserError(
            f"the folder {argument} holds no file that ends in {' '.join(FORMATS)} "
            f"(or these and {' '.join(COMPRESSIONS)}); name its files with a glob."
        )
    if others:
        shown = ", ".join(sorted(others)[:3]) + (", …" if len(others) > 3 else "")
        warnings.warn(
            f"{len(others)} file(s) in {argument} are not read, because their names tell no format "
            f"({shown}); a glob names them",
            stacklevel=1,
        )
    _check_links(found)
    return sorted(path for path in found if path.is_file())


def _check_links(paths: list[Path]) -> None:
    """Refuse links to files that are not there: their text would be missing silently."""
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist.")


def _each_once(paths: list[Path]) -> list[Path]:
    """Return the paths without further links to the same files."""
    once: dict[Path, Path] = {}
    for path in paths:
        once.setdefault(path.resolve(), path)
    return list(once.values())


def _source(path: Path, given_format: str | None, url: str | None = None) -> Source:
    check_decoded([str(path)])
    if path == STDIN:
        label, kind, compression = "stdin", given_format, None
    else:
        label, kind, compression = split_name(path)
    kind = kind or given_format
    if kind is None:
        what = "of standard input" if path == STDIN else f"of {url or path} from its name"
        raise UserError(
            f"cannot tell the format {what}; pass --format text, --format jsonl or "
            "--format parquet."
        )
    if kind == "parquet" and (compression or path == STDIN):
        what = "from standard input" if path == STDIN else f"below {path.suffix}: {url or path}"
        raise UserError(f"cannot read Parquet {what}; give the .parquet file itself.")
    return Source(fetch(url) if url else path, kind, compression, label, url)

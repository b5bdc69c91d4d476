"""Reading documents: which files, in which format, compressed how, one document at a time.

A file's name decides its format and compression. Everything that can be wrong with an input ends
in a `UserError` that names the file and the place. Nothing is held but the current document.
"""

import argparse
import glob
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from dataset.common import UserError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}
FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"PAR1": "parquet",
}
STDIN = Path("-")


@dataclass(frozen=True)
class Source:
    """One input file, or standard input (`path` is `-`)."""

    path: Path
    format: str
    """text | jsonl"""
    compression: str | None
    label: str

    @property
    def is_stdin(self) -> bool:
        return self.path == STDIN

    @property
    def size(self) -> int:
        """Bytes on disk; 0 for standard input."""
        return 0 if self.is_stdin else self.path.stat().st_size

    def __str__(self) -> str:
        return "standard input" if self.is_stdin else str(self.path)


@dataclass(frozen=True)
class ReadOptions:
    """How documents are cut out of a file."""

    documents: str = "line"
    """line | paragraph | file, for plain text"""
    text_key: str = "text"
    max_bad_lines: int = 0
    """JSON lines that may be skipped over all files before reading stops."""


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """The options that every builder of text shares."""
    parser.add_argument(
        "--input-files",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, globs, folders, or - for standard input (.txt .md .text .jsonl .json, "
        "plain or below .gz .zst .xz)",
    )
    parser.add_argument(
        "--format", choices=("text", "jsonl", "parquet"), help="where the name does not tell it"
    )
    parser.add_argument("--text-key", default="text", help="JSON key of the text (default: text)")
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
        help="JSON lines that may be wrong, and are skipped, before that is an error (default: 0)",
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
    """Sources per command-line argument: a file, a glob, a folder or `-`; each list is sorted."""
    seen: dict[Path, str] = {}
    found = []
    for argument in arguments:
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


def _expand(argument: str) -> list[Path]:
    path = Path(argument).expanduser()
    if path == STDIN or path.is_file() or path.is_fifo():
        return [path]
    if path.is_dir():
        matches = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and split_name(file)[1]
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not matches:
            raise UserError(
                f"the folder {argument} holds no file that ends in {' '.join(FORMATS)} "
                f"(or these and {' '.join(COMPRESSIONS)}); name its files with a glob."
            )
        return matches
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    matches = [match for match in matches if match.is_file()]
    if not matches:
        what = "matches no file" if glob.has_magic(argument) else "does not exist"
        raise UserError(f"the input {argument!r} {what}; check the path.")
    return matches


def _source(path: Path, given_format: str | None) -> Source:
    if path == STDIN:
        label, kind, compression = "stdin", given_format, None
    else:
        label, kind, compression = split_name(path)
    kind = kind or given_format
    if kind is None:
        what = "of standard input" if path == STDIN else f"of {path} from its name"
        raise UserError(f"cannot tell the format {what}; pass --format text or --format jsonl.")
    if kind == "parquet":
        raise UserError(
            f"cannot read {path}: Parquet is not supported yet; convert it to .jsonl.zst."
        )
    return Source(path, kind, compression, label)


def _open_zstd(raw: IO[bytes]) -> IO[bytes]:
    # Not the `zstandard` package: it reads a truncated file to a clean end.
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UserError(
                "reading .zst needs the package backports.zstd: pip install backports.zstd"
            ) from None
    # The widest window that the format has, for files written with `zstd --long=31`.
    return zstd.open(raw, "rb", options={zstd.DecompressionParameter.window_log_max: 31})


def _buffered(stream: IO[bytes]) -> IO[bytes]:
    """Reads a decompressor in large pieces; its own lines come byte by byte."""
    return cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20))


def _open_gzip(raw: IO[bytes]) -> IO[bytes]:
    import gzip

    return cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb"))


_OPENERS: dict[str | None, Callable[[IO[bytes]], IO[bytes]]] = {
    None: lambda raw: raw,
    "gzip": _open_gzip,
    "zstd": _open_zstd,
    "xz": lzma.LZMAFile,
}


class DocumentReader:
    """Reads documents of sources in order and counts what it skipped.

    `progress` is called with the number of bytes on disk that were newly read.
    """

    def __init__(self, options: ReadOptions, progress: Callable[[int], Any] | None = None) -> None:
        self.options = options
        self.bad_lines = 0
        self.blank_documents = 0
        self._progress = progress or (lambda count: None)

    def texts(self, source: Source) -> Iterator[str]:
        """Documents of one source; blank ones are skipped; none at all is an error."""
        pieces = self._json_texts if source.format == "jsonl" else self._plain_texts
        yield from self._filled(source, pieces(source))

    def records(self, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
        """Line numbers and JSON objects of one source, whatever their keys."""
        for number, line in self._lines(source):
            if line.strip():
                try:
                    yield number, _json_object(line)
                except ValueError as error:
                    self.skip_bad_line(source, number, str(error))

    def skip_bad_line(self, source: Source, number: int, fault: str) -> None:
        """Count a line that cannot be used; one too many is an error."""
        self.bad_lines += 1
        if self.bad_lines > self.options.max_bad_lines:
            hint = (
                "mend it, or pass --max-bad-lines to skip such lines"
                if self.options.max_bad_lines == 0
                else f"that is one more than --max-bad-lines {self.options.max_bad_lines}"
            )
            raise UserError(f"{source}, line {number}: {fault}; {hint}.")

    def _filled(self, source: Source, texts: Iterator[str]) -> Iterator[str]:
        found = False
        for text in texts:
            if not text or text.isspace():
                self.blank_documents += 1
                continue
            found = True
            yield text
        if not found:
            raise UserError(
                f"{source} holds no document: it is empty or blank; leave it out of the inputs."
            )

    def _json_texts(self, source: Source) -> Iterator[str]:
        key = self.options.text_key
        for number, record in self.records(source):
            text = record.get(key)
            if isinstance(text, str):
                fault = None if is_encodable(text) else f"key {key!r} holds half a surrogate pair"
            elif key in record:
                fault = f"key {key!r} holds {_json_type(text)}, not text"
            else:
                there = ", ".join(sorted(record)[:10]) or "none"
                fault = f"no key {key!r} (keys there: {there}; see --text-key)"
            if fault is None:
                yield cast(str, text)
            else:
                self.skip_bad_line(source, number, fault)

    def _plain_texts(self, source: Source) -> Iterator[str]:
        if self.options.documents == "file":
            yield "".join(line for _, line in self._lines(source))
            return
        lines = (line.removesuffix("\n").removesuffix("\r") for _, line in self._lines(source))
        if self.options.documents == "line":
            yield from lines
            return
        paragraph: list[str] = []
        for line in lines:
            if line and not line.isspace():
                paragraph.append(line)
            elif paragraph:
                yield "\n".join(paragraph)
                paragraph = []
        if paragraph:
            yield "\n".join(paragraph)

    def _lines(self, source: Source) -> Iterator[tuple[int, str]]:
        """Numbered lines with their ends, decoded; only a line feed ends a line."""
        offset = 0
        for number, line in enumerate(self._raw_lines(source), start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is not text
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                actual = next((kind for magic, kind in MAGIC.items() if line.startswith(magic)), "")
                hint = (
                    f"it looks like {actual} data, so give it that ending"
                    if number == 1 and actual
                    else "convert it to UTF-8"
                )
                raise UserError(
                    f"{source}, line {number} (byte {offset + error.start}): byte "
                    f"0x{line[error.start]:02x} is not valid UTF-8; {hint}."
                ) from None
            offset += len(line)

    def _raw_lines(self, source: Source) -> Iterator[bytes]:
        if source.is_stdin:
            yield from sys.stdin.buffer
            return
        try:
            with open(source.path, "rb") as raw, _OPENERS[source.compression](raw) as stream:
                lines = stream if raw is stream else _buffered(stream)
                reported = 0
                for line in lines:
                    yield line
                    # Only a decompressor leaves `raw` with a position that is cheap to ask for.
                    position = raw.tell() if raw is not stream else reported + len(line)
                    if position != reported:
                        self._progress(position - reported)
                        reported = position
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise _reading_fault(source, error) from error
        except Exception as error:
            if type(error).__name__ == "ZstdError":
                raise _reading_fault(source, error) from error
            raise


def _reading_fault(source: Source, error: Exception) -> UserError:
    """One sentence for a file that ends early, is damaged, or cannot be opened."""
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"cannot read {source}: {error.strerror}.")
    what = (
        "is cut off" if isinstance(error, EOFError) else f"is not valid {source.compression} data"
    )
    return UserError(f"{source} {what} ({error}); copy or download it again.")


def _json_object(line: str) -> dict[str, Any]:
    """Parse one line; `ValueError` says in a clause what is wrong."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error}); one object per line is expected") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"holds {_json_type(value)}; one JSON object per line is expected")
    return value


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


def is_encodable(text: str) -> bool:
    """Whether UTF-8 has bytes for the text: JSON can spell halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

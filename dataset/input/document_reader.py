"""Read lines and documents from files, one at a time, and count unusable ones.

Only the current document is held in memory. Reading can resume in the middle of a file, because
every document comes with the number of records (lines, paragraphs, Parquet rows) read so far.
All code that reads lines from users, including prompts and tasks, uses `read_lines`.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from dataset.input.decompression import open_source
from dataset.input.formats import NAMES, load_format
from dataset.input.text_sources import Source
from utils.core.errors import UserError

MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"PAR1": "parquet",
}
MAX_LINE_BYTES = 1 << 30
"""Maximum length of a line; a file with longer lines is not line-based."""

MAX_LISTED_SOURCES = 3

T = TypeVar("T")


@dataclass(frozen=True)
class ReadOptions:
    """How a file is divided into documents."""

    documents: str = "line"
    """line | paragraph | file, for plain text"""
    text_key: str = "text"
    max_bad_lines: int = 0
    """Number of bad lines to skip, over all files, before failing."""


class DocumentReader:
    """Reads the documents of sources in order and counts what it skips.

    `progress` is called with the number of bytes on disk read since the last call.
    """

    def __init__(self, options: ReadOptions, progress: Callable[[int], Any] | None = None) -> None:
        self.options = options
        self.bad_lines = 0
        self.blank_documents = 0
        self.found = False
        """Whether any source so far contained a document."""
        self.blank_sources = 0
        self.first_blank_sources: list[str] = []
        """Names of the first few blank sources."""
        self._progress = progress or (lambda count: None)

    def texts(self, source: Source) -> Iterator[str]:
        """Yield the documents of one source, skipping blank ones."""
        for _, text in self.documents(source):
            yield text

    def documents(self, source: Source, skip: int = 0) -> Iterator[tuple[int, str]]:
        """Yield the documents of one source after its first `skip` records.

        Each comes with the number of records read so far.
        """
        found, bad_lines = skip > 0, self.bad_lines
        for number, text in self._read(source, skip):
            if not text or text.isspace():
                self.blank_documents += 1
                continue
            found = True
            yield number, text
        self.end_source(source, found, self.bad_lines - bad_lines)

    def end_source(self, source: Source, found: bool, bad_lines: int) -> None:
        """Count a source as blank if nothing was found; fail if it had only bad lines."""
        self.found |= found
        if found:
            return
        if bad_lines:
            raise UserError(
                f"{source} contains no documents: all {bad_lines:,} lines are bad; remove it from "
                "the inputs."
            )
        self.blank_sources += 1
        if self.blank_sources <= MAX_LISTED_SOURCES:
            self.first_blank_sources.append(str(source))

    def check_sources(self) -> None:
        """Warn about blank sources after the last one; fail if all are blank."""
        if not self.blank_sources:
            return
        more = ", …" if self.blank_sources > len(self.first_blank_sources) else ""
        shown = ", ".join(self.first_blank_sources) + more
        if not self.found:
            verb = "contain" if self.blank_sources > 1 else "contains"
            raise UserError(f"{shown} {verb} no documents: empty or blank; pass other inputs.")
        warnings.warn(
            f"skipped {self.blank_sources:,} empty or blank input file(s) ({shown})",
            stacklevel=1,
        )

    def records(self, source: Source, skip: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the line numbers and JSON objects of one source, with any keys."""
        return self._parse_lines(source, skip, parse_json_object, skip_blank=True)

    def _parse_lines(
        self,
        source: Source,
        skip: int,
        parse: Callable[[bytes, int], T],
        skip_blank: bool = False,
    ) -> Iterator[tuple[int, T]]:
        """Yield the numbers and values of the lines after the first `skip` that can be parsed."""
        for number, line in read_lines(source, self._progress):
            if number <= skip or (skip_blank and not line.strip()):
                continue
            try:
                value = parse(line, number)
            except ValueError as error:
                self.skip_bad_line(source, number, str(error))
                continue
            yield number, value

    def skip_bad_line(self, source: Source, number: int, fault: str) -> None:
        """Count an unusable line; fail if there are more than `max_bad_lines`."""
        self.bad_lines += 1
        if self.bad_lines > self.options.max_bad_lines:
            hint = (
                "fix it, or pass --max-bad-lines to skip such lines"
                if self.options.max_bad_lines == 0
                else f"this exceeds --max-bad-lines {self.options.max_bad_lines}"
            )
            what = {"parquet": "row", "text": "line", "jsonl": "line"}.get(
                source.format, "document"
            )
            raise UserError(f"{source}, {what} {number:,}: {fault}; {hint}.")

    def _read(self, source: Source, skip: int) -> Iterator[tuple[int, str]]:
        if source.format == "jsonl":
            return self._extract_texts(source, self.records(source, skip))
        if source.format == "parquet":
            from dataset.input.parquet import read_parquet_records

            records = read_parquet_records(source, self.options.text_key, skip, self._progress)
            return self._extract_texts(source, records)
        if source.format not in NAMES:
            return self._read_own_format(source, skip)
        if self.options.documents == "line":
            return self._parse_lines(source, skip, decode_line)
        return self._read_multiline(source, skip)

    def _extract_texts(
        self, source: Source, records: Iterator[tuple[int, dict[str, Any]]]
    ) -> Iterator[tuple[int, str]]:
        """Yield the text of each record; a record without text counts as a bad line."""
        key = self.options.text_key
        for number, record in records:
            text = record.get(key)
            if isinstance(text, str):
                yield number, text
                continue
            if key in record:
                fault = f"key {key!r} is {_describe_type(text)}, not a string"
            else:
                present = ", ".join(sorted(record)[:10]) or "none"
                fault = f"no key {key!r} (keys: {present}; see --text-key)"
            self.skip_bad_line(source, number, fault)

    def _read_own_format(self, source: Source, skip: int) -> Iterator[tuple[int, str]]:
        """Yield the numbered documents of a format that `--format module@Class` names."""
        texts = load_format(source.format)().documents(source, self._progress)
        try:
            for number, text in enumerate(texts, 1):
                if number <= skip:
                    continue
                if isinstance(text, ValueError):
                    self.skip_bad_line(source, number, str(text))
                elif isinstance(text, str):
                    yield number, text
                else:
                    raise UserError(
                        f"--format {source.format}: document {number:,} of {source} is of type "
                        f"{type(text).__name__}; documents() must yield str."
                    )
        except UserError:
            raise
        except ValueError as error:  # raised, it ends the file; yielded, only the record
            raise UserError(f"{source}: {error}.") from error

    def _read_multiline(self, source: Source, skip: int) -> Iterator[tuple[int, str]]:
        """Yield numbered paragraphs, or the whole file as number 1."""
        by_paragraph = self.options.documents == "paragraph"
        number, held = 0, []
        for line_number, line in read_lines(source, self._progress):
            try:
                text = _decode(line, line_number)
            except ValueError as error:
                raise UserError(f"{source}, line {line_number:,}: {error}.") from None
            if not by_paragraph or not (text.isspace() or not text):
                held.append(text)
            elif held:
                number += 1
                if number > skip:
                    yield number, _strip_line_end("".join(held)).replace("\r\n", "\n")
                held = []
        if held and number >= skip:
            text = "".join(held)
            yield number + 1, _strip_line_end(text).replace("\r\n", "\n") if by_paragraph else text


def read_lines(
    source: Source, progress: Callable[[int], Any] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a source, numbered from 1 and including line ends.

    Only a line feed, optionally preceded by a carriage return, ends a line. A byte order mark at
    the start is dropped. `progress` is called with the number of bytes read since the last call.
    """
    with open_source(source) as (stream, position):
        reported = 0
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), b""), 1):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise UserError(
                    f"{source}, line {number:,}: longer than {MAX_LINE_BYTES:,} bytes; the file is "
                    "not line-based, convert it."
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                _check_first_line(source, line)
            yield number, line
            if progress is not None and (now := position()) != reported:
                progress(now - reported)
                reported = now


def _check_first_line(source: Source, line: bytes) -> None:
    """Fail on formats that are not text, and warn if the file has no line feeds."""
    kind, advice = "", "extract its files and pass those"
    if line[257:262] == b"ustar":
        kind = "a tar archive"
    elif line.startswith(b"PK\x03\x04"):
        kind = "a zip archive"
    elif line.startswith(b"BZh") and line[4:10] == b"1AY&SY":
        kind, advice = "bzip2 data", "decompress it with bunzip2"
    elif _looks_like_utf16(line[:1024]):
        kind, advice = "UTF-16", "convert the file to UTF-8"
    if kind:
        raise UserError(f"{source} looks like {kind}; {advice}.")
    if not line.endswith(b"\n") and (returns := line.rstrip().count(b"\r")):
        warnings.warn(
            f"{source} is a single line: it has {returns:,} carriage returns but no line feed; "
            "convert it to get lines (tr '\\r' '\\n' < FILE)",
            stacklevel=1,
        )


def _looks_like_utf16(start: bytes) -> bool:
    """Return whether every other byte is NUL, as in UTF-16 without a byte order mark."""
    nuls = [start[place::2].count(0) for place in (0, 1)]
    return min(nuls) == 0 and max(nuls) > 1 and 2 * max(nuls) > len(start) // 2


def decode_line(line: bytes, number: int) -> str:
    """Decode a line without its line end. Raises ValueError, whose message is a clause."""
    return _strip_line_end(_decode(line, number))


def _decode(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_describe_encoding_error(line, number, error)) from None


def _strip_line_end(line: str) -> str:
    return line.removesuffix("\r\n") if line.endswith("\r\n") else line.removesuffix("\n")


def _describe_encoding_error(line: bytes, number: int, error: UnicodeDecodeError) -> str:
    actual = next((kind for magic, kind in MAGIC.items() if line.startswith(magic)), "")
    hint = "convert the file to UTF-8"
    if number == 1 and actual:
        hint = f"it looks like {actual} data, so give the file the matching extension"
    elif number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        hint = "it looks like UTF-16; convert the file to UTF-8"
    return (
        f"byte 0x{line[error.start]:02x} at position {error.start + 1:,} of the line is not valid "
        f"UTF-8; {hint}"
    )


def parse_json_object(line: bytes, number: int) -> dict[str, Any]:
    """Parse one line as a JSON object. Raises ValueError, whose message is a clause."""
    try:
        value = orjson.loads(line)
    except ValueError:
        # The standard library has better error messages, and accepts NaN.
        try:
            value = _mark_surrogates(json.loads(_decode(line, number)))
        except json.JSONDecodeError as error:
            fault = f"not valid JSON ({error}); expected one object per line"
            raise ValueError(_detect_multiline_json(line, number) or fault) from None
        except RecursionError:
            raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(value, dict):
        fault = f"contains {_describe_type(value)}; expected one JSON object per line"
        raise ValueError(_detect_multiline_json(line, number) or fault)
    return value


def _detect_multiline_json(line: bytes, number: int) -> str | None:
    """Return advice if the file seems to be a single JSON value instead of JSON lines."""
    start = line.strip() if number == 1 else b""
    if start.startswith(b"["):
        return "the file is one JSON array; write one item per line (jq -c '.[]' FILE > FILE.jsonl)"
    if start == b"{":
        return "JSON objects span several lines; write one per line (jq -c . FILE > FILE.jsonl)"
    return None


class _LoneSurrogate:
    """Placeholder for a string with half a surrogate pair, which UTF-8 cannot encode."""

    def __repr__(self) -> str:
        return _describe_type(self)


def _mark_surrogates(value: Any) -> Any:
    """Replace each string that UTF-8 cannot encode by a `_LoneSurrogate`."""
    if isinstance(value, str):
        return _LoneSurrogate() if any("\ud800" <= char <= "\udfff" for char in value) else value
    if isinstance(value, list):
        return [_mark_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {key: _mark_surrogates(item) for key, item in value.items()}
    return value


def _describe_type(value: Any) -> str:
    if isinstance(value, _LoneSurrogate):
        return "half a surrogate pair"
    names = {
        bytes: "bytes that are not UTF-8",
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
    }
    return "null" if value is None else names.get(type(value), "a number")

"""Reading lines and documents out of files, one at a time, and counting what could not be used.

Nothing is held but the current document. A reader can go on in the middle of a file: every document
comes with the number of records (lines, paragraphs, Parquet rows) that have been read with it.
Whatever reads a user's lines, prompts and tasks included, does so by `read_lines`.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from dataset.input.decompression import open_source
from dataset.input.text_sources import Source
from utils.core.errors import UserError

MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"PAR1": "parquet",
}
MAX_LINE_BYTES = 1 << 30
"""A longer line is taken for a file that has no lines at all."""

NAMED_SOURCES = 3


@dataclass(frozen=True)
class ReadOptions:
    """How documents are cut out of a file."""

    documents: str = "line"
    """line | paragraph | file, for plain text"""
    text_key: str = "text"
    max_bad_lines: int = 0
    """Lines that may be skipped over all files before reading stops."""


class DocumentReader:
    """Reads documents of sources in order and counts what it skipped.

    `progress` is called with the number of bytes on disk that were newly read.
    """

    def __init__(self, options: ReadOptions, progress: Callable[[int], Any] | None = None) -> None:
        self.options = options
        self.bad_lines = 0
        self.blank_documents = 0
        self.found = False
        """Whether any source so far held something."""
        self.blank_sources = 0
        self.first_blank_sources: list[str] = []
        """Names of the first few."""
        self._progress = progress or (lambda count: None)

    def texts(self, source: Source) -> Iterator[str]:
        """Documents of one source; blank ones are skipped."""
        for _, text in self.documents(source):
            yield text

    def documents(self, source: Source, skip: int = 0) -> Iterator[tuple[int, str]]:
        """Documents of one source after its first `skip` records, each with the number of records
        read so far."""
        found, bad_lines = skip > 0, self.bad_lines
        for number, text in self._pieces(source, skip):
            if not text or text.isspace():
                self.blank_documents += 1
                continue
            found = True
            yield number, text
        self.end_source(source, found, self.bad_lines - bad_lines)

    def end_source(self, source: Source, found: bool, bad_lines: int) -> None:
        """Count a source as blank if nothing was found in it; only bad lines are an error."""
        self.found |= found
        if found:
            return
        if bad_lines:
            raise UserError(
                f"{source} holds no document: its {bad_lines:,} lines are bad ones; leave it out "
                "of the inputs."
            )
        self.blank_sources += 1
        if self.blank_sources <= NAMED_SOURCES:
            self.first_blank_sources.append(str(source))

    def check_sources(self) -> None:
        """Note which of the sources were blank, after the last one; all of them is an error."""
        if not self.blank_sources:
            return
        more = ", …" if self.blank_sources > len(self.first_blank_sources) else ""
        shown = ", ".join(self.first_blank_sources) + more
        if not self.found:
            verb = "hold" if self.blank_sources > 1 else "holds"
            raise UserError(f"{shown} {verb} no document: empty or blank; name other inputs.")
        warnings.warn(
            f"{self.blank_sources:,} input file(s) are skipped, because they are empty or blank "
            f"({shown})",
            stacklevel=1,
        )

    def records(self, source: Source, skip: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Line numbers and JSON objects of one source, whatever their keys."""
        for number, line in self._lines(source, skip):
            if not line or line.isspace():
                continue
            try:
                record = json_object(line, number)
            except ValueError as error:
                self.skip_bad_line(source, number, str(error))
                continue
            yield number, record

    def skip_bad_line(self, source: Source, number: int, fault: str) -> None:
        """Count a line that cannot be used; one too many is an error."""
        self.bad_lines += 1
        if self.bad_lines > self.options.max_bad_lines:
            hint = (
                "mend it, or pass --max-bad-lines to skip such lines"
                if self.options.max_bad_lines == 0
                else f"that is one more than --max-bad-lines {self.options.max_bad_lines}"
            )
            what = "row" if source.format == "parquet" else "line"
            raise UserError(f"{source}, {what} {number:,}: {fault}; {hint}.")

    def _pieces(self, source: Source, skip: int) -> Iterator[tuple[int, str]]:
        if source.format == "jsonl":
            return self._checked(source, self.records(source, skip))
        if source.format == "parquet":
            from dataset.input.parquet import parquet_records

            records = parquet_records(source, self.options.text_key, skip, self._progress)
            return self._checked(source, records)
        if self.options.documents == "line":
            return self._text_lines(source, skip)
        return self._joined_lines(source, skip)

    def _checked(
        self, source: Source, records: Iterator[tuple[int, dict[str, Any]]]
    ) -> Iterator[tuple[int, str]]:
        """The text of each record; one without text is a bad line."""
        key = self.options.text_key
        for number, record in records:
            text = record.get(key)
            if isinstance(text, str):
                yield number, text
                continue
            if key in record:
                fault = f"key {key!r} holds {_json_type(text)}, not text"
            else:
                there = ", ".join(sorted(record)[:10]) or "none"
                fault = f"no key {key!r} (keys there: {there}; see --text-key)"
            self.skip_bad_line(source, number, fault)

    def _text_lines(self, source: Source, skip: int) -> Iterator[tuple[int, str]]:
        for number, line in self._lines(source, skip):
            try:
                text = text_of(line, number)
            except ValueError as error:
                self.skip_bad_line(source, number, str(error))
                continue
            yield number, text

    def _joined_lines(self, source: Source, skip: int) -> Iterator[tuple[int, str]]:
        """Paragraphs, or the whole file; numbered, because a document has many lines."""
        by_paragraph = self.options.documents == "paragraph"
        number, held = 0, []
        for line_number, line in self._lines(source, 0):
            try:
                text = _decoded(line, line_number)
            except ValueError as error:
                raise UserError(f"{source}, line {line_number:,}: {error}.") from None
            if not by_paragraph or not (text.isspace() or not text):
                held.append(text)
            elif held:
                number += 1
                if number > skip:
                    yield number, _without_end("".join(held)).replace("\r\n", "\n")
                held = []
        if held and number >= skip:
            text = "".join(held)
            yield number + 1, _without_end(text).replace("\r\n", "\n") if by_paragraph else text

    def _lines(self, source: Source, skip: int) -> Iterator[tuple[int, bytes]]:
        """Return the numbered lines with their ends after the first `skip`."""
        return (item for item in read_lines(source, self._progress) if item[0] > skip)


def read_lines(
    source: Source, progress: Callable[[int], Any] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a source with their ends, numbered from 1.

    A line ends with a line feed, perhaps after a carriage return, and with nothing else; a byte
    order mark at the start is dropped. `progress` is called with the number of bytes newly read.
    """
    with open_source(source) as (stream, position):
        reported = 0
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), b""), 1):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise UserError(
                    f"{source}, line {number:,}: longer than {MAX_LINE_BYTES:,} bytes; this is "
                    "no file of lines, convert it."
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                _check_first_line(source, line)
            yield number, line
            if progress is not None and (now := position()) != reported:
                progress(now - reported)
                reported = now


def _check_first_line(source: Source, line: bytes) -> None:
    """Refuse what is no text though it may be valid UTF-8, and point out a file without lines."""
    kind, advice = "", "extract its files and name those"
    if line[257:262] == b"ustar":
        kind = "a tar archive"
    elif line.startswith(b"PK\x03\x04"):
        kind = "a zip archive"
    elif line.startswith(b"BZh") and line[4:10] == b"1AY&SY":
        kind, advice = "bzip2 data", "decompress it with bunzip2"
    elif _is_wide(line[:1024]):
        kind, advice = "UTF-16", "convert the file to UTF-8"
    if kind:
        raise UserError(f"{source} looks like {kind}; {advice}.")
    if not line.endswith(b"\n") and (returns := line.rstrip().count(b"\r")):
        warnings.warn(
            f"{source} is one line: it has {returns:,} carriage returns, but no line feed; to have "
            "lines, convert it (tr '\\r' '\\n' < FILE)",
            stacklevel=1,
        )


def _is_wide(start: bytes) -> bool:
    """Return whether every other byte of a text is NUL, as in UTF-16 without a byte order mark."""
    nuls = [start[place::2].count(0) for place in (0, 1)]
    return min(nuls) == 0 and max(nuls) > 1 and 2 * max(nuls) > len(start) // 2


def text_of(line: bytes, number: int) -> str:
    """Return a line without its end as text; `ValueError` says in a clause what is wrong."""
    return _without_end(_decoded(line, number))


def _decoded(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_encoding_fault(line, number, error)) from None


def _without_end(line: str) -> str:
    return line.removesuffix("\r\n") if line.endswith("\r\n") else line.removesuffix("\n")


def _encoding_fault(line: bytes, number: int, error: UnicodeDecodeError) -> str:
    actual = next((kind for magic, kind in MAGIC.items() if line.startswith(magic)), "")
    hint = "convert the file to UTF-8"
    if number == 1 and actual:
        hint = f"it looks like {actual} data, so give the file that ending"
    elif number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        hint = "it looks like UTF-16; convert the file to UTF-8"
    return (
        f"byte 0x{line[error.start]:02x} at place {error.start + 1:,} of the line is not valid "
        f"UTF-8; {hint}"
    )


def json_object(line: bytes, number: int) -> dict[str, Any]:
    """Parse one line; `ValueError` says in a clause what is wrong."""
    try:
        value = orjson.loads(line)
    except ValueError:
        # The standard library says better what is wrong, and takes what only looks wrong (NaN).
        try:
            value = _marked(json.loads(_decoded(line, number)))
        except json.JSONDecodeError as error:
            fault = f"not valid JSON ({error}); one object per line is expected"
            raise ValueError(_one_value_fault(line, number) or fault) from None
        except RecursionError:
            raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        fault = f"holds {_json_type(value)}; one JSON object per line is expected"
        raise ValueError(_one_value_fault(line, number) or fault)
    return value


def _one_value_fault(line: bytes, number: int) -> str | None:
    """Return advice for a file that seems to be one JSON value instead of a line for each."""
    start = line.strip() if number == 1 else b""
    if start.startswith(b"["):
        return (
            "the file is one JSON array; write its items as lines (jq -c '.[]' FILE > FILE.jsonl)"
        )
    if start == b"{":
        return "a JSON object takes several lines; write each as one (jq -c . FILE > FILE.jsonl)"
    return None


class _Broken:
    """Stands for a text that UTF-8 has no bytes for: JSON can spell halves of surrogate pairs."""

    def __repr__(self) -> str:
        return _json_type(self)


def _marked(value: Any) -> Any:
    """Return the same with a `_Broken` for each such text."""
    if isinstance(value, str):
        return _Broken() if any("\ud800" <= char <= "\udfff" for char in value) else value
    if isinstance(value, list):
        return [_marked(item) for item in value]
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()}
    return value


def _json_type(value: Any) -> str:
    if isinstance(value, _Broken):
        return "half a surrogate pair"
    names = {
        bytes: "bytes that are not UTF-8",
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "a truth value",
    }
    return "null" if value is None else names.get(type(value), "a number")

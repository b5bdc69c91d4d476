"""Read one text column of a Parquet file, a few rows at a time; requires pyarrow."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from dataset.input.decompression import check_not_lfs_pointer
from dataset.input.text_sources import Source
from utils.core.errors import UserError
from utils.core.functions import has_utf8_name

_ROWS = 256
_BUFFER = 1 << 20


def read_parquet_records(
    source: Source, column: str, skip: int, progress: Callable[[int], Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield row numbers (from 1) and `{column: value}` for the rows after the first `skip`.

    Text may be stored as bytes; values that are not UTF-8 are yielded as bytes. Raises UserError if
    the file is damaged or truncated, or has no such text column.
    """
    pq, arrow_error = _import_pyarrow()
    try:
        with source.path.open("rb") as start:
            check_not_lfs_pointer(source, start.read(100))
        # Buffered: otherwise a whole row group, possibly gigabytes, is held in memory.
        own = has_utf8_name(source.path)  # Arrow cannot open other names
        with (
            nullcontext(source.path) if own else source.path.open("rb") as place,
            pq.ParquetFile(
                place, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
            ) as file,
        ):
            _check_column(source, file.schema_arrow, column)
            total, first = file.metadata.num_rows, 0
            groups: list[int] = []
            for group in range(file.num_row_groups):  # skip whole groups without reading them
                rows = file.metadata.row_group(group).num_rows
                if not groups and first + rows <= skip:
                    first += rows
                else:
                    groups.append(group)
            reported, number = 0, first
            batches = file.iter_batches(_ROWS, groups, [column], use_threads=False)
            for batch in batches if groups else ():
                for value in _as_bytes(batch.column(0)).to_pylist():
                    number += 1
                    if number > skip:
                        yield number, {column: _as_text(value)}
                now = source.size * number // max(1, total)
                progress(now - reported)
                reported = now
    except (arrow_error, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {source}: {error.strerror}.") from error
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"{source} is damaged or truncated ({first_line}); copy or download it again."
        ) from error


def _import_pyarrow() -> tuple[Any, type[Exception]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("reading Parquet requires pyarrow: pip install pyarrow") from None
    return parquet, pyarrow.ArrowException


def _check_column(source: Source, schema: Any, column: str) -> None:
    import pyarrow

    if schema.names.count(column) > 1:
        raise UserError(f"{source} has several columns {column!r}; rewrite it with unique names.")
    if column not in schema.names:
        present = ", ".join(schema.names[:10])
        raise UserError(
            f"{source} has no column {column!r} (columns: {present}); select one with --text-key."
        )
    kind = schema.field(column).type
    try:
        _as_bytes(pyarrow.nulls(0, kind))
    except pyarrow.ArrowNotImplementedError:
        raise UserError(
            f"column {column!r} of {source} has type {kind}, not text; see --text-key."
        ) from None


def _as_bytes(array: Any) -> Any:
    """Cast an array of text in any encoding to an array of bytes or nulls."""
    import pyarrow

    while True:
        if isinstance(array, pyarrow.ExtensionArray):
            array = array.storage
        elif isinstance(array, pyarrow.DictionaryArray):
            array = array.dictionary_decode()
        else:
            return array.cast(pyarrow.large_binary())


def _as_text(value: bytes | None) -> str | bytes | None:
    """Decode a value; bytes that are not UTF-8 are returned unchanged."""
    try:
        return value if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value

"""Reading one text column of a Parquet file, a few rows at a time; needs the optional pyarrow."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from dataset.common import UserError
from dataset.text_sources import Source
from utils.functions import has_utf8_name

_ROWS = 256
_BUFFER = 1 << 20


def parquet_records(
    source: Source, column: str, skip: int, progress: Callable[[int], Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers (from 1) and `{column: value}` of the rows after the first `skip`.

    `UserError` where the file is damaged, cut off, or has no such column of text.
    """
    pq, arrow_error = _pyarrow()
    try:
        # Buffered: otherwise a whole row group is held, which may be gigabytes.
        own = has_utf8_name(source.path)  # Arrow opens no other
        with (
            nullcontext(source.path) if own else source.path.open("rb") as place,
            pq.ParquetFile(
                place, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
            ) as file,
        ):
            _check_column(source, file.schema_arrow, column)
            total, first = file.metadata.num_rows, 0
            groups: list[int] = []
            for group in range(file.num_row_groups):  # whole groups are skipped unread
                rows = file.metadata.row_group(group).num_rows
                if not groups and first + rows <= skip:
                    first += rows
                else:
                    groups.append(group)
            reported, number = 0, first
            batches = file.iter_batches(_ROWS, groups, [column], use_threads=False)
            for batch in batches if groups else ():
                for value in batch.column(0).to_pylist():
                    number += 1
                    if number > skip:
                        yield number, {column: value}
                now = source.size * number // max(1, total)
                progress(now - reported)
                reported = now
    except (arrow_error, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {source}: {error.strerror}.") from error
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"{source} is damaged or cut off ({first_line}); copy or download it again."
        ) from error


def _pyarrow() -> tuple[Any, type[Exception]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("reading Parquet needs the package pyarrow: pip install pyarrow") from None
    return parquet, pyarrow.ArrowException


def _check_column(source: Source, schema: Any, column: str) -> None:
    import pyarrow

    if column not in schema.names:
        there = ", ".join(schema.names[:10])
        raise UserError(
            f"{source} has no column {column!r} (columns: {there}); name one with --text-key."
        )
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"column {column!r} of {source} holds {kind}, not text; see --text-key.")

"""Reading the files of examples that evaluators bring along."""

from typing import Any

import orjson

from dataset.common import UserError
from dataset.decompression import open_source
from dataset.text_sources import find_sources


def read_json_lines(path: str, option: str = "path") -> list[tuple[str, dict[str, Any]]]:
    """(where, object) of every line of a JSON lines file, here or remote, plain or compressed.

    `where` names file and line for error messages; `option` is the key that named the file.
    """
    sources = [source for found in find_sources([path], "jsonl") for source in found]
    if len(sources) != 1:
        raise UserError(f"{option}={path} is {len(sources)} files; name one")
    records = []
    with open_source(sources[0]) as (stream, _):
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number:,}"
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise UserError(f"{where}: no valid JSON ({error})") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: no JSON object")
            records.append((where, record))
    if not records:
        raise UserError(f"{option}={path} holds no example")
    return records


def spread(count: int, limit: int | None) -> list[int]:
    """At most `limit` of the numbers below `count`, evenly: files are often sorted by kind."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]

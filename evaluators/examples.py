"""Read the files of examples that evaluators take as options."""

from typing import Any

from dataset.input.document_reader import parse_json_object, read_lines
from dataset.input.text_sources import find_source
from utils.core.errors import UserError


def read_json_lines(path: str, option: str = "path") -> list[tuple[str, dict[str, Any]]]:
    """Return (where, object) of every line of a JSON lines file, local or remote.

    `where` names file and line for error messages; `option` is the key that named the file.
    """
    records = []
    for number, line in read_lines(find_source(path, "jsonl", option)):
        if not line.strip():
            continue
        where = f"{path}, line {number:,}"
        try:
            records.append((where, parse_json_object(line, number)))
        except ValueError as error:
            raise UserError(f"{where}: not a JSON object: {error}") from None
    if not records:
        raise UserError(f"{option}={path} contains no example")
    return records


def pick_evenly(count: int, limit: int | None) -> list[int]:
    """Return at most `limit` evenly spaced numbers below `count`, because files are often
    sorted.
    """
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]

"""What a build remembers: which documents it has seen, and how far it has come.

One SQLite file holds both, so that they change together or not at all: after a crash, whatever its
moment, the digests and the progress are those of the same commit. The digests are on disk, so that
memory does not grow with the number of documents; the file's lock keeps two builds apart.
"""

import base64
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.errors import UserError

_CACHE_KIB = 32 << 10  # of SQLite's pages; what does not fit is read from disk
_SCHEMA = """
CREATE TABLE IF NOT EXISTS seen (kind INTEGER, digest BLOB, PRIMARY KEY (kind, digest))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS progress (name TEXT PRIMARY KEY, value TEXT);
"""


class DamagedBuildError(UserError):
    """An unfinished build that cannot be gone on with."""


class Journal:
    """A build's memory in one file; "" keeps it in a temporary file that vanishes with the process.

    Nothing is remembered for good before `commit`.
    """

    def __init__(self, path: Path | str) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, timeout=0)
        try:
            # An exclusive lock from the first write to the end: one build a folder.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            self._db.close()
            if "locked" not in str(error):
                raise UserError(f"cannot write {path}: {error}.") from error
            raise UserError(
                f"another build is at work in {Path(path).parent}; wait for it, or end it."
            ) from None
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise DamagedBuildError(
                f"{path}, the memory of an unfinished build, is damaged ({error}); begin anew with "
                "--overwrite."
            ) from error
        self._insert = self._db.cursor().execute

    def is_new(self, digest: bytes, kind: int = 0) -> bool:
        """Note a digest; whether it was unknown among those of its kind."""
        return self._insert("INSERT OR IGNORE INTO seen VALUES (?, ?)", (kind, digest)).rowcount > 0

    def knows(self, digest: bytes, kind: int = 0) -> bool:
        found = self._insert("SELECT 1 FROM seen WHERE kind = ? AND digest = ?", (kind, digest))
        return found.fetchone() is not None

    def commit(self, **values: Any) -> None:
        """Make everything noted so far, and these values, outlast a crash."""
        self._db.executemany(
            "INSERT OR REPLACE INTO progress VALUES (?, ?)",
            [(name, json.dumps(value, default=_encoded)) for name, value in values.items()],
        )
        self._db.execute("COMMIT")
        self._db.execute("BEGIN IMMEDIATE")

    def __getitem__(self, name: str) -> Any:
        """A committed value; None if there is none."""
        row = self._db.execute("SELECT value FROM progress WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0], object_hook=_decoded)

    def clear(self) -> None:
        """Forget everything, for good."""
        self._db.execute("DELETE FROM seen")
        self._db.execute("DELETE FROM progress")
        self.commit()

    def close(self) -> None:
        self._db.close()


def _encoded(value: Any) -> Any:
    """Arrays as JSON; everything else must be JSON already."""
    if isinstance(value, np.ndarray):
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        dtype = np.lib.format.dtype_to_descr(value.dtype)
        return {"dtype": dtype, "shape": value.shape, "data": data}
    if isinstance(value, np.integer):
        return int(value)
    raise TypeError(f"{type(value)} is not JSON")


def _decoded(value: dict[str, Any]) -> Any:
    if value.keys() == {"dtype", "shape", "data"}:
        dtype = value["dtype"]  # a name, or a list of fields
        dtype = np.dtype(dtype if isinstance(dtype, str) else [tuple(field) for field in dtype])
        array = np.frombuffer(base64.b64decode(value["data"]), dtype)
        return array.reshape(value["shape"])
    return value

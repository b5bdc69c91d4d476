"""The persistent state of a build: the documents it has seen, and its progress.

Both live in one SQLite file and change atomically: after a crash, digests and progress always
belong to the same commit. Digests are kept on disk, so memory does not grow with the number of
documents; the file lock prevents two builds from running in the same directory.
"""

import base64
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.errors import UserError

_CACHE_KIB = 32 << 10  # SQLite's page cache; the rest is read from disk
_SCHEMA = """
CREATE TABLE IF NOT EXISTS seen (kind INTEGER, digest BLOB, PRIMARY KEY (kind, digest))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS progress (name TEXT PRIMARY KEY, value TEXT);
"""


class DamagedBuildError(UserError):
    """An unfinished build that cannot be resumed."""


class Journal:
    """A build's state in one file; "" uses a temporary file that is deleted with the process.

    Nothing is persisted until `commit` is called.
    """

    def __init__(self, path: Path | str) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, timeout=0)
        try:
            # Exclusive lock from the first write to the end: one build per directory.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            self._db.close()
            if "locked" not in str(error):
                raise UserError(f"cannot write {path}: {error}.") from error
            raise UserError(
                f"another build is running in {Path(path).parent}; wait for it or stop it."
            ) from None
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise DamagedBuildError(
                f"{path}, the journal of an unfinished build, is damaged ({error}); start over "
                "with --overwrite."
            ) from error
        self._insert = self._db.cursor().execute

    def add(self, digest: bytes, kind: int = 0) -> bool:
        """Add a digest and return whether it was new among those of its kind."""
        return self._insert("INSERT OR IGNORE INTO seen VALUES (?, ?)", (kind, digest)).rowcount > 0

    def contains(self, digest: bytes, kind: int = 0) -> bool:
        """Return whether a digest of this kind was added before."""
        found = self._insert("SELECT 1 FROM seen WHERE kind = ? AND digest = ?", (kind, digest))
        return found.fetchone() is not None

    def commit(self, **values: Any) -> None:
        """Persist all added digests together with these values."""
        self._db.executemany(
            "INSERT OR REPLACE INTO progress VALUES (?, ?)",
            [(name, json.dumps(value, default=_encode)) for name, value in values.items()],
        )
        self._db.execute("COMMIT")
        self._db.execute("BEGIN IMMEDIATE")

    def __getitem__(self, name: str) -> Any:
        """Return a committed value, or None."""
        row = self._db.execute("SELECT value FROM progress WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0], object_hook=_decode)

    def clear(self) -> None:
        """Delete all digests and values permanently."""
        self._db.execute("DELETE FROM seen")
        self._db.execute("DELETE FROM progress")
        self.commit()

    def close(self) -> None:
        self._db.close()


def _encode(value: Any) -> Any:
    """Encode an array or numpy integer as JSON."""
    if isinstance(value, np.ndarray):
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        dtype = np.lib.format.dtype_to_descr(value.dtype)
        return {"dtype": dtype, "shape": value.shape, "data": data}
    if isinstance(value, np.integer):
        return int(value)
    raise TypeError(f"{type(value)} is not JSON-serializable")


def _decode(value: dict[str, Any]) -> Any:
    """Decode the output of `_encode`."""
    if value.keys() == {"dtype", "shape", "data"}:
        dtype = value["dtype"]  # a name, or a list of fields
        dtype = np.dtype(dtype if isinstance(dtype, str) else [tuple(field) for field in dtype])
        array = np.frombuffer(base64.b64decode(value["data"]), dtype)
        return array.reshape(value["shape"])
    return value

"""The file of a checkpoint: a journal of finished tasks in one SQLite file.

::

    Journal.find, put ──> Handle: one connection ──> PATH, PATH-wal, PATH-shm
         │ SQLite finds the file malformed
         └──> PATH moves to PATH.damaged, the rows that can be read go to a new PATH, and the work is done once more

Connections are in ``database.py``, and who may have written a file in ``private.py``.

Who runs where: everything here runs in the driver, in any of its threads. Two drivers may use one file at a time.
A forked child may not: SQLite's locks belong to a process, and the child would believe that it holds its parent's.

Invariant: what ``put`` returned for survives a kill, and what ``find`` returns is what was put, to the byte.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

from ..data.hashing import new_hasher
from ..errors import CheckpointError
from .database import Handle, connect, first, is_damage, open_checkpoint, transaction, translated, use
from .private import identity, move_aside

__all__ = ["Entry", "FunctionSummary", "Journal", "Summary", "prune", "summary"]

_KEY_NBYTES: Final = 16
_COLUMNS: Final = "key, occurrence, function, versions, created, seconds, result, checksum"
_PLACES: Final = "(?, ?, ?, ?, ?, ?, ?, ?)"

_T = TypeVar("_T")


class Entry(NamedTuple):
    """What one task left: the ``occurrence``-th with this ``key`` of 16 bytes, and its pickled result.

    ``versions`` is what it was made with, if that is not what the journal was told.
    """

    key: bytes
    occurrence: int
    function: str
    result: bytes
    seconds: float
    versions: str | None = None


@dataclass(frozen=True)
class FunctionSummary:
    """How many entries of one function a checkpoint has, and the seconds that its tasks took."""

    entries: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """What is in a checkpoint; ``damaged`` entries are in no other number."""

    entries: int
    nbytes: int
    file_nbytes: int
    functions: dict[str, FunctionSummary]
    versions: dict[str, int]
    oldest: float | None
    newest: float | None
    damaged: int


class Journal:
    """The finished tasks of a search, in one file.

    Parameters
    ----------
    path : str or PathLike
        The file; it is made if there is none, its folder is not.
    versions : str
        What the entries to come were made with; it is kept beside each.

    Raises
    ------
    CheckpointError
        If the file cannot be used, or must not be: it is no checkpoint, or somebody else could have written it.

    Notes
    -----
    Thread-safe: one lock is held while SQLite works, and the GIL is not. The methods raise CheckpointError once the
    journal is closed, and in a forked child.
    """

    #: The sentence that says that a damaged file was set aside, or None; the caller warns with it.
    set_aside: str | None

    def __init__(self, path: str | os.PathLike[str], versions: str) -> None:
        self.set_aside = None
        self._path = os.path.abspath(os.fspath(path))
        self._versions = _encodable(versions)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._handle: Handle | None = None
        len(self)

    def __repr__(self) -> str:
        return f"<Journal {self._path}{', closed' if self._closed else ''}>"

    def __len__(self) -> int:
        """Return the number of entries, damaged ones included."""
        return int(self._do("read", lambda connection: first(connection, "SELECT count(*) FROM entries")))

    def __bool__(self) -> bool:
        """Return True: a journal without entries is a journal."""
        return True

    def find(self, keys: Sequence[tuple[bytes, int]]) -> dict[tuple[bytes, int], bytes]:
        """Return the results that are there, by key and occurrence; a damaged entry is not there."""
        return self._do("read", lambda connection: _find(connection, keys))

    def put(self, entries: Sequence[Entry]) -> None:
        """Add ``entries``, all or none; they are on the disk when this returns.

        An entry of the same key and occurrence is replaced.

        Raises
        ------
        CheckpointError
            If the file cannot be written; what it holds can still be found.
        """
        now = time.time()
        self._do("written", lambda connection: _insert(connection, (self._row(e, now) for e in entries), "REPLACE"))

    def close(self) -> None:
        """Close the file; again, or in a forked child, this does nothing."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            self._drop_handle()

    def _row(self, entry: Entry, now: float) -> tuple[Any, ...]:
        key, occurrence, function, result, seconds, versions = entry
        checksum = _checksum(key, occurrence, result)
        made_with = self._versions if versions is None else _encodable(versions)
        return key, occurrence, _encodable(function), made_with, now, seconds, result, checksum

    def _do(self, verb: str, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Return what ``work`` does with the connection; on a malformed file it works on a new one instead."""
        # Before the lock: another thread of the parent may have held it at the fork.
        if os.getpid() != self._pid:
            raise CheckpointError(
                f"The checkpoint {self._path} cannot be {verb} in process {os.getpid()}, because process {self._pid} "
                "opened it and this is a fork of it. Use it in the process that opened it."
            )
        with self._lock, translated(self._path, verb):
            try:
                return self._work_in_place(work)
            except sqlite3.Error as error:
                if not is_damage(error):
                    raise
                self._start_anew(error)
                return self._work_in_place(work)

    def _work_in_place(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        done = work(self._connection())
        # Race: another driver may have set the file aside meanwhile, and copied its rows before ours was there.
        return done if self._is_in_place() else work(self._connection())

    def _is_in_place(self) -> bool:
        return self._handle is not None and self._handle.identity == identity(self._path)

    def _connection(self) -> sqlite3.Connection:
        if self._closed:
            raise CheckpointError(f"The checkpoint {self._path} cannot be used, because it is closed. Open a new one.")
        # Somebody may have deleted the file, or another driver set it aside: what is written to a file without a
        # name is lost.
        if not self._is_in_place():
            self._drop_handle()
        if self._handle is None:
            self._handle = open_checkpoint(self._path, create=True)
        return self._handle.connection

    def _drop_handle(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            handle.close()

    def _start_anew(self, error: sqlite3.Error) -> None:
        """Move the malformed file out of the way and have in a new one what can be read of it."""
        seen = self._handle.identity if self._handle is not None else identity(self._path)
        self._drop_handle()
        if identity(self._path) != seen:
            return  # another driver found it malformed too, and was faster
        aside = move_aside(self._path)
        connection = self._connection()
        with contextlib.closing(connect(aside)) as damaged:
            n_saved = _insert(connection, _readable_rows(damaged), "IGNORE")
        self.set_aside = (
            f"The checkpoint {self._path} was damaged ({error}), perhaps by its disk or by another program. "
            f"It is now {aside}, and a new one has its {n_saved} entries that can be read; delete {aside} "
            "if nothing else is to be found in it."
        )


def summary(path: str | os.PathLike[str]) -> Summary:
    """Return what is in the checkpoint ``path``.

    Raises
    ------
    CheckpointError
        If there is none, or it cannot be used.
    """
    return use(path, "read", _summarize)


def prune(
    path: str | os.PathLike[str],
    *,
    older_than_s: float | None = None,
    function: str | None = None,
    other_than_versions: str | None = None,
    everything: bool = False,
) -> int:
    """Delete entries of the checkpoint ``path``, make the file smaller, and return how many went.

    An entry goes if all that is asked for is true of it; damaged ones always go.

    Parameters
    ----------
    path : str or PathLike
        The checkpoint.
    older_than_s : float, optional
        Entries that were made more than so many seconds ago.
    function : str, optional
        Entries of this function.
    other_than_versions : str, optional
        Entries that were made with other versions than these.
    everything : bool, default=False
        All entries, whatever else is asked for.

    Raises
    ------
    CheckpointError
        If there is none, or it cannot be used.
    """
    conditions: list[tuple[str, object]] = []
    if older_than_s is not None:
        conditions.append(("created < ?", time.time() - older_than_s))
    if function is not None:
        conditions.append(("function = ?", _encodable(function)))
    if other_than_versions is not None:
        conditions.append(("versions IS NOT ?", _encodable(other_than_versions)))
    if everything:
        conditions = [("?", 1)]
    return use(path, "pruned", lambda connection: _prune(connection, conditions))


# ---- entries


def _checksum(key: bytes, occurrence: int, result: bytes) -> bytes:
    # The key is part of it: a damaged index may lead to the row of another task.
    checksum = new_hasher(occurrence.to_bytes(8, "little", signed=True))
    checksum.update(key)
    checksum.update(result)
    return checksum.digest()


def _is_whole(key: Any, occurrence: Any, result: Any, checksum: Any) -> bool:
    """Return whether these are what was put; damage may have changed their types as well."""
    typed = isinstance(key, bytes) and isinstance(occurrence, int) and isinstance(result, bytes)
    return typed and len(key) == _KEY_NBYTES and _checksum(key, occurrence, result) == checksum


def _find(connection: sqlite3.Connection, keys: Sequence[tuple[bytes, int]]) -> dict[tuple[bytes, int], bytes]:
    found = {}
    with transaction(connection, "BEGIN"):
        for key, occurrence in keys:
            query = "SELECT result, checksum FROM entries WHERE key = ? AND occurrence = ?"
            row = connection.execute(query, (key, occurrence)).fetchone()
            if row is not None and _is_whole(key, occurrence, *row):
                found[key, occurrence] = row[0]
    return found


def _insert(connection: sqlite3.Connection, rows: Iterator[tuple[Any, ...]], otherwise: str) -> int:
    with transaction(connection, "BEGIN IMMEDIATE"):
        statement = f"INSERT OR {otherwise} INTO entries ({_COLUMNS}) VALUES {_PLACES}"
        return connection.executemany(statement, rows).rowcount


def _readable_rows(damaged: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """Yield the whole entries of a malformed file: from its first row to the damage, then from its last one."""
    last = -(2**63)
    for query in ("rowid > ? ORDER BY rowid", "rowid > ? ORDER BY rowid DESC"):
        with contextlib.suppress(sqlite3.Error):
            for rowid, *row in damaged.execute(f"SELECT rowid, {_COLUMNS} FROM entries WHERE {query}", (last,)):
                if not query.endswith("DESC"):
                    last = rowid
                if _is_whole(row[0], row[1], row[6], row[7]):
                    yield tuple(row)
            return


def _summarize(connection: sqlite3.Connection) -> Summary:
    counts: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    versions: Counter[str] = Counter()
    nbytes = damaged = 0
    times: list[float] = []
    for row in connection.execute(f"SELECT {_COLUMNS} FROM entries"):
        key, occurrence, function, version, created, took, result, checksum = row
        if not _is_whole(key, occurrence, result, checksum):
            damaged += 1
            continue
        counts[str(function)] += 1
        seconds[str(function)] += _number(took)
        versions[str(version)] += 1
        nbytes += len(result)
        times.append(_number(created))
    functions = {name: FunctionSummary(n, seconds[name]) for name, n in counts.most_common()}
    oldest, newest = (min(times), max(times)) if times else (None, None)
    return Summary(len(times), nbytes, _file_nbytes(connection), functions, dict(versions), oldest, newest, damaged)


def _prune(connection: sqlite3.Connection, conditions: Sequence[tuple[str, object]]) -> int:
    where = " AND ".join(condition for condition, _ in conditions) or "0"
    with transaction(connection, "BEGIN IMMEDIATE"):
        query = "SELECT rowid, key, occurrence, result, checksum FROM entries"
        doomed = [(rowid,) for rowid, *row in connection.execute(query) if not _is_whole(*row)]
        n_deleted = connection.executemany("DELETE FROM entries WHERE rowid = ?", doomed).rowcount if doomed else 0
        parameters = [value for _, value in conditions]
        n_deleted += connection.execute(f"DELETE FROM entries WHERE {where}", parameters).rowcount
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return n_deleted


def _file_nbytes(connection: sqlite3.Connection) -> int:
    path = connection.execute("PRAGMA database_list").fetchone()[2]
    return sum(os.path.getsize(name) for name in (path, f"{path}-wal") if os.path.exists(name))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _encodable(text: str) -> str:
    # A name from a damaged module path may hold half a character, which SQLite does not take.
    return text.encode("utf-8", "replace").decode("utf-8")

"""The file of a checkpoint: a journal of finished tasks in one SQLite file.

::

    Journal.find, put ──> _Handle: one connection ──> PATH, PATH-wal, PATH-shm
         │ SQLite finds the file malformed
         └──> PATH moves to PATH.damaged, the rows that can be read go to a new PATH, and the work is done once more

Entries are pickles that the caller will load, so who can write the file can run code as its user. It is made private,
and it is refused if anybody else could have written it, or any of the files that SQLite keeps beside it.

Who runs where: everything here runs in the driver, in any of its threads. Two drivers may use one file at a time.
A forked child may not: SQLite's locks belong to a process, and the child would believe that it holds its parent's.

Invariant: what ``put`` returned for survives a kill, and what ``find`` returns is what was put, to the byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sqlite3
import stat
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import xxhash

from ..errors import CheckpointError

try:
    import grp
    import pwd
except ImportError:  # Windows has neither owners nor modes that mean anything here; nothing is refused for them
    grp = pwd = None  # type: ignore[assignment]

__all__ = ["Entry", "FunctionSummary", "Journal", "Summary", "prune", "summary"]

#: What SQLite keeps in the header for the program that owns a file: "jbkc", and the version of the table below.
_APPLICATION_ID: Final = 0x6A626B63
_FORMAT: Final = 1

#: Seconds to wait for another driver's transaction; one takes milliseconds, so this is for a stopped process.
_BUSY_S: Final = 10.0

_HEADER_NBYTES: Final = 100
_MAGIC: Final = b"SQLite format 3\0"
_KEY_NBYTES: Final = 16
_SIBLINGS: Final = ("-wal", "-shm", "-journal")

# A table with row numbers: SQLite advises WITHOUT ROWID for rows below a twentieth of a page only, and what is left
# of a damaged file can be walked by row number without the index.
_SCHEMA: Final = """
    CREATE TABLE entries (
        key BLOB, occurrence INTEGER, function TEXT, versions TEXT, created REAL, seconds REAL,
        result BLOB, checksum BLOB, PRIMARY KEY (key, occurrence)
    )
"""
_COLUMNS: Final = "key, occurrence, function, versions, created, seconds, result, checksum"
_PLACES: Final = "(?, ?, ?, ?, ?, ?, ?, ?)"

#: Codes that speak of the content of a file and not of the machine. SQLITE_ERROR is "no such table".
_DAMAGE: Final = frozenset(
    {
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_INTERNAL,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTFOUND,
        sqlite3.SQLITE_SCHEMA,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_FORMAT,
        sqlite3.SQLITE_NOTADB,
    }
)

#: What to do about the others, by their code.
_REMEDIES: Final = {
    sqlite3.SQLITE_FULL: "Make room on its disk, or give a path on another one.",
    sqlite3.SQLITE_IOERR: "Its disk is full or fails: make room on it, or give a path on another one.",
    sqlite3.SQLITE_BUSY: "Another process holds it: end that one, or give another path.",
    sqlite3.SQLITE_READONLY: "Its file or file system cannot be written: allow it, or give another path.",
    sqlite3.SQLITE_CANTOPEN: "Its file or folder cannot be written: allow it, or give another path.",
}

_T = TypeVar("_T")
_Identity = tuple[int, int]


class Entry(NamedTuple):
    """What one task left: the ``occurrence``-th with this ``key`` of 16 bytes, and its pickled result."""

    key: bytes
    occurrence: int
    function: str
    result: bytes
    seconds: float


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
        self._handle: _Handle | None = None
        len(self)

    def __repr__(self) -> str:
        return f"<Journal {self._path}{', closed' if self._closed else ''}>"

    def __len__(self) -> int:
        """Return the number of entries, damaged ones included."""
        return int(self._do("read", lambda connection: _first(connection, "SELECT count(*) FROM entries")))

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
        key, occurrence, function, result, seconds = entry
        checksum = _checksum(key, occurrence, result)
        return key, occurrence, _encodable(function), self._versions, now, seconds, result, checksum

    def _do(self, verb: str, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Return what ``work`` does with the connection; on a malformed file it works on a new one instead."""
        # Before the lock: another thread of the parent may have held it at the fork.
        if os.getpid() != self._pid:
            raise CheckpointError(
                f"The checkpoint {self._path} cannot be {verb} in process {os.getpid()}, because process {self._pid} "
                "opened it and this is a fork of it. Use it in the process that opened it."
            )
        with self._lock, _translated(self._path, verb):
            try:
                return self._work_in_place(work)
            except sqlite3.Error as error:
                if not _is_damage(error):
                    raise
                self._start_anew(error)
                return self._work_in_place(work)

    def _work_in_place(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        done = work(self._connection())
        # Race: another driver may have set the file aside meanwhile, and copied its rows before ours was there.
        return done if self._is_in_place() else work(self._connection())

    def _is_in_place(self) -> bool:
        return self._handle is not None and self._handle.identity == _identity(self._path)

    def _connection(self) -> sqlite3.Connection:
        if self._closed:
            raise CheckpointError(f"The checkpoint {self._path} cannot be used, because it is closed. Open a new one.")
        # Somebody may have deleted the file, or another driver set it aside: what is written to a file without a
        # name is lost.
        if not self._is_in_place():
            self._drop_handle()
        if self._handle is None:
            self._handle = _open(self._path, create=True)
        return self._handle.connection

    def _drop_handle(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            handle.close()

    def _start_anew(self, error: sqlite3.Error) -> None:
        """Move the malformed file out of the way and have in a new one what can be read of it."""
        seen = self._handle.identity if self._handle is not None else _identity(self._path)
        self._drop_handle()
        if _identity(self._path) != seen:
            return  # another driver found it malformed too, and was faster
        aside = _move_aside(self._path)
        connection = self._connection()
        with contextlib.closing(_connect(aside)) as damaged:
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
    return _use(path, "read", _summarize)


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
    return _use(path, "pruned", lambda connection: _prune(connection, conditions))


# ---- entries


def _checksum(key: bytes, occurrence: int, result: bytes) -> bytes:
    # The key is part of it: a damaged index may lead to the row of another task.
    checksum = xxhash.xxh3_128(occurrence.to_bytes(8, "little", signed=True))
    checksum.update(key)
    checksum.update(result)
    return checksum.digest()


def _is_whole(key: Any, occurrence: Any, result: Any, checksum: Any) -> bool:
    """Return whether these are what was put; damage may have changed their types as well."""
    typed = isinstance(key, bytes) and isinstance(occurrence, int) and isinstance(result, bytes)
    return typed and len(key) == _KEY_NBYTES and _checksum(key, occurrence, result) == checksum


def _find(connection: sqlite3.Connection, keys: Sequence[tuple[bytes, int]]) -> dict[tuple[bytes, int], bytes]:
    found = {}
    with _transaction(connection, "BEGIN"):
        for key, occurrence in keys:
            query = "SELECT result, checksum FROM entries WHERE key = ? AND occurrence = ?"
            row = connection.execute(query, (key, occurrence)).fetchone()
            if row is not None and _is_whole(key, occurrence, *row):
                found[key, occurrence] = row[0]
    return found


def _insert(connection: sqlite3.Connection, rows: Iterator[tuple[Any, ...]], otherwise: str) -> int:
    with _transaction(connection, "BEGIN IMMEDIATE"):
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
    with _transaction(connection, "BEGIN IMMEDIATE"):
        query = "SELECT rowid, key, occurrence, result, checksum FROM entries"
        doomed = [(rowid,) for rowid, *row in connection.execute(query) if not _is_whole(*row)]
        n_deleted = connection.executemany("DELETE FROM entries WHERE rowid = ?", doomed).rowcount if doomed else 0
        parameters = [value for _, value in conditions]
        n_deleted += connection.execute(f"DELETE FROM entries WHERE {where}", parameters).rowcount
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return n_deleted


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _encodable(text: str) -> str:
    # A name from a damaged module path may hold half a character, which SQLite does not take.
    return text.encode("utf-8", "replace").decode("utf-8")


# ---- connections


class _Handle:
    """A connection and the file that it has open."""

    def __init__(self, connection: sqlite3.Connection, identity: _Identity) -> None:
        self.connection = connection
        self.identity = identity

    def close(self) -> None:
        with _files.lock:
            _files.handles.discard(self)
            self.connection.close()


class _Files:
    """What this process has open, for two rules of POSIX locks.

    A process loses its locks on a file when it closes *any* descriptor of it, so a file that SQLite has open is never
    opened beside it. And a fork inherits SQLite's memory of locks without the locks.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.handles: weakref.WeakSet[_Handle] = weakref.WeakSet()
        self.inherited: set[_Identity] = set()

    def has_open(self, identity: _Identity) -> bool:
        return any(handle.identity == identity for handle in self.handles)

    def forget_in_child(self) -> None:
        # A lock that another thread of the parent held would stay locked here.
        self.lock = threading.Lock()
        for handle in self.handles:
            self.inherited.add(handle.identity)
            _keep_open(handle.connection)
        self.handles = weakref.WeakSet()


_files: Final = _Files()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_files.forget_in_child)


def _keep_open(connection: sqlite3.Connection) -> None:
    """Have the connection never closed, not even when the interpreter ends: closing writes to the file."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _use(path: str | os.PathLike[str], verb: str, work: Callable[[sqlite3.Connection], _T]) -> _T:
    """Do ``work`` with a checkpoint that must exist, and that is left where it is if it is malformed."""
    place = os.path.abspath(os.fspath(path))
    with _translated(place, verb), contextlib.closing(_open(place, create=False)) as handle:
        return work(handle.connection)


def _open(path: str, *, create: bool) -> _Handle:
    """Return a connection to the checkpoint ``path``, which is refused unless only this user can have written it.

    Raises
    ------
    CheckpointError
        If it is refused.
    sqlite3.Error, OSError
        If it cannot be opened.
    """
    with _files.lock:
        is_shared = _check_folder(path)
        if create:
            _create_private(path)
        identity = _identity(path)
        if identity is None:
            raise CheckpointError(f"The checkpoint {path} cannot be opened, because there is no such file. Check it.")
        _check_files(path)
        _check_not_inherited(path, identity)
        header = b"" if _files.has_open(identity) else _checked_header(path)
        if is_shared:
            _claim_siblings(path, header)
        connection = _connect(path)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
        if is_shared:
            _release_journal(path)
        _check_again(connection, path)
        handle = _Handle(connection, identity)
        _files.handles.add(handle)
        return handle


def _connect(path: str) -> sqlite3.Connection:
    address = f"{Path(path).as_uri()}?mode=rw"  # rw: SQLite itself makes no file, ours is private
    connection = sqlite3.connect(
        address, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=16
    )
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    return connection


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    """Set the connection up, and have the table in a file that is empty."""
    # Each commit is on the disk, in WAL mode too: 0.2 ms on the SSD of the machine that tested this.
    connection.execute("PRAGMA synchronous=FULL")
    # A mapped file that another program cuts is a SIGBUS; a read of it is an error. The -shm file of WAL mode is
    # always mapped, but SQLite writes a byte to each of its pages before it maps them: on a full tmpfs that is
    # SQLITE_IOERR_SHMSIZE and no signal (tests/test_journal.py, "full").
    connection.execute("PRAGMA mmap_size=0")
    connection.execute("PRAGMA cell_size_check=ON")
    connection.execute("PRAGMA trusted_schema=OFF")
    # The table comes before WAL mode, so the header of the file itself says whose it is from the first commit on.
    if _first(connection, "PRAGMA application_id") == 0:
        with _transaction(connection, "BEGIN IMMEDIATE"):
            if _first(connection, "PRAGMA application_id") == 0:  # another driver may have been faster
                connection.execute(_SCHEMA)
                connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version={_FORMAT}")
    # The header that was checked may be older than the one in the -wal file.
    _check_numbers(path, _first(connection, "PRAGMA application_id"), _first(connection, "PRAGMA user_version"))
    with contextlib.suppress(sqlite3.OperationalError):
        # A file system without shared memory answers with another mode, which is as safe and slower; an error is
        # another driver that switches at this moment, and then this connection follows it.
        if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            # Its -journal file stays where it is, so nobody can place another.
            connection.execute("PRAGMA journal_mode=TRUNCATE")
    _first(connection, "SELECT count(*) FROM sqlite_schema")


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite has rolled some errors back itself. A rollback that fails must not hide the reason for it.
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


def _first(connection: sqlite3.Connection, query: str) -> Any:
    return connection.execute(query).fetchone()[0]


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)  # None if Python's module raised it, and not SQLite
    return code is not None and code & 0xFF in _DAMAGE


@contextlib.contextmanager
def _translated(path: str, verb: str) -> Iterator[None]:
    """Raise what SQLite and the system raise as CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    # Python itself raises OverflowError for a result of more than 2 GB, ValueError for a NUL in a path.
    except (sqlite3.Error, OSError, OverflowError, ValueError) as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        remedy = _REMEDIES.get(code, "Look at its file and folder, or give another path.")
        if code in _DAMAGE:
            remedy = "Its file is damaged: a search that uses it goes on with what can be read of it."
        raise CheckpointError(f"The checkpoint {path} cannot be {verb}: {error}. {remedy}") from error


# ---- files


def _identity(path: str) -> _Identity | None:
    """Return what tells the file at ``path`` from any other, or None if there is none."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino


def _create_private(path: str) -> None:
    """Make an empty file that only this user can use, unless there is one; SQLite fills it."""
    # O_EXCL follows no link, not even one that leads nowhere.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _file_nbytes(connection: sqlite3.Connection) -> int:
    path = connection.execute("PRAGMA database_list").fetchone()[2]
    return sum(os.path.getsize(name) for name in (path, f"{path}-wal") if os.path.exists(name))


def _move_aside(path: str) -> str:
    """Rename the file and what belongs to it, and return the new name, which nothing had."""
    for n in itertools.count(1):
        aside = f"{path}.damaged" if n == 1 else f"{path}.damaged-{n}"
        if not any(os.path.lexists(aside + suffix) for suffix in ("", *_SIBLINGS)):
            break
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}-shm")  # SQLite makes it anew from the -wal file
    for suffix in ("-wal", "-journal", ""):
        with contextlib.suppress(FileNotFoundError):
            os.rename(path + suffix, aside + suffix)
    return aside


def _checked_header(path: str) -> bytes:
    """Return the head of the file; refuse a file that is no checkpoint before SQLite sees it, which might change it."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    try:
        header = os.read(descriptor, _HEADER_NBYTES)
    finally:
        os.close(descriptor)
    if not header:
        return header  # a process ended between making it and filling it
    if len(header) < _HEADER_NBYTES or not header.startswith(_MAGIC):
        raise _no_checkpoint(path, "it is not an SQLite database")
    # Where SQLite has its application_id and its user_version.
    _check_numbers(path, int.from_bytes(header[68:72], "big"), int.from_bytes(header[60:64], "big"))
    return header


def _check_numbers(path: str, application_id: int, version: int) -> None:
    if application_id != _APPLICATION_ID:
        raise _no_checkpoint(path, "it is the SQLite database of another program")
    if version != _FORMAT:
        raise _no_checkpoint(path, f"it has format {version}, and this version of joblib_backends knows {_FORMAT}")


def _no_checkpoint(path: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not used as a checkpoint, because {reason}; it stays as it is. Give another path."
    )


def _check_not_inherited(path: str, identity: _Identity) -> None:
    if identity in _files.inherited:
        raise CheckpointError(
            f"The checkpoint {path} cannot be opened in process {os.getpid()}, because it was open in the process that "
            "this one is a fork of. Use it in that one, or start this one by another method than fork."
        )


def _check_folder(path: str) -> bool:
    """Refuse a folder in which others can replace the file; return whether they can add files to it."""
    folder = os.path.dirname(path)
    try:
        info = os.stat(folder)
    except FileNotFoundError:
        raise CheckpointError(
            f"The checkpoint {path} cannot be opened, because there is no folder {folder}. "
            "Make it, or give another path."
        ) from None
    if pwd is None:
        return False
    if info.st_uid not in (0, os.geteuid()):
        raise _unsafe(path, f"its folder belongs to user {info.st_uid}", "Give a path in a folder of your own.")
    others = info.st_mode & (stat.S_IWOTH if _is_private_group(info.st_gid) else stat.S_IWGRP | stat.S_IWOTH)
    if others and not info.st_mode & stat.S_ISVTX:
        raise _unsafe(path, "others can write to its folder", f"chmod go-w {folder}, or give another path.")
    return bool(others)


def _is_private_group(group: int) -> bool:
    """Return whether the group is this user's own: Ubuntu and Fedora give each user one, which may write."""
    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}


def _check_files(path: str) -> None:
    """Refuse the file, and each that SQLite has beside it, if somebody else can have written it."""
    for name in (path, *(path + suffix for suffix in _SIBLINGS)):
        with contextlib.suppress(FileNotFoundError):
            _check_file(path, name, os.lstat(name))


def _check_file(path: str, name: str, info: os.stat_result) -> None:
    if stat.S_ISLNK(info.st_mode):
        raise _unsafe(path, f"{name} is a symbolic link", "Give the path of the file itself.")
    if not stat.S_ISREG(info.st_mode):
        raise _unsafe(path, f"{name} is not a regular file", "Give another path.")
    if pwd is None:
        return
    if info.st_uid != os.geteuid():
        raise _unsafe(path, f"{name} belongs to user {info.st_uid}, who can change it", "Give another path.")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _unsafe(path, f"{name} can be written by others", f"If nobody did, chmod go-w {name}.")


def _unsafe(path: str, reason: str, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {path} is refused, because {reason}, and who writes a checkpoint can run code when it is "
        f"loaded. {remedy}"
    )


def _claim_siblings(path: str, header: bytes) -> None:
    """Let nobody place a file beside the checkpoint while SQLite opens it, which would take what that holds for ours.

    An empty -wal file is right for a file in WAL mode only, which two bytes at 18 of its header say.
    """
    for suffix in _SIBLINGS if header[18:20] == b"\2\2" else ("-journal",):
        _create_private(path + suffix)
    _check_files(path)


def _release_journal(path: str) -> None:
    # In WAL mode, whose file is there now, no driver uses it any more.
    if os.path.exists(f"{path}-wal"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}-journal")


def _check_again(connection: sqlite3.Connection, path: str) -> None:
    """Refuse what somebody placed beside the file since it was checked; now nobody else can replace it."""
    try:
        _check_files(path)
    except CheckpointError:
        _keep_open(connection)  # closing would copy what is in the -wal file into the checkpoint
        raise

"""Connections of this process to checkpoints: opened by the book, and closed by the rules of POSIX locks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from ..errors import CheckpointError
from .private import Identity, check_files, check_folder, claim_siblings, create_private, identity, release_journal

__all__ = ["SCHEMA", "Handle", "connect", "first", "is_damage", "open_checkpoint", "transaction", "translated", "use"]

#: What SQLite keeps in the header for the program that owns a file: "jbkc", and the version of the table below.
_APPLICATION_ID: Final = 0x6A626B63
_FORMAT: Final = 1

#: Seconds to wait for another driver's transaction; one takes milliseconds, so this is for a stopped process.
_BUSY_S: Final = 10.0

_HEADER_NBYTES: Final = 100
_MAGIC: Final = b"SQLite format 3\0"

# A table with row numbers: SQLite advises WITHOUT ROWID for rows below a twentieth of a page only, and what is left
# of a damaged file can be walked by row number without the index.
SCHEMA: Final = """
    CREATE TABLE entries (
        key BLOB, occurrence INTEGER, function TEXT, versions TEXT, created REAL, seconds REAL,
        result BLOB, checksum BLOB, PRIMARY KEY (key, occurrence)
    )
"""

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


class Handle:
    """A connection and the file that it has open."""

    def __init__(self, connection: sqlite3.Connection, identity: Identity) -> None:
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
        # Reentrant: a finalizer closes a connection, and may run inside of an allocation under this lock.
        self.lock = threading.RLock()
        self.handles: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.inherited: set[Identity] = set()

    def has_open(self, identity: Identity) -> bool:
        return any(handle.identity == identity for handle in list(self.handles))

    def forget_in_child(self) -> None:
        # A lock that another thread of the parent held would stay locked here.
        self.lock = threading.RLock()
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


def use(path: str | os.PathLike[str], verb: str, work: Callable[[sqlite3.Connection], _T]) -> _T:
    """Do ``work`` with a checkpoint that must exist, and that is left where it is if it is malformed."""
    place = os.path.abspath(os.fspath(path))
    with translated(place, verb), contextlib.closing(open_checkpoint(place, create=False)) as handle:
        return work(handle.connection)


def open_checkpoint(path: str, *, create: bool) -> Handle:
    """Return a connection to the checkpoint ``path``, which is refused unless only this user can have written it.

    Raises
    ------
    CheckpointError
        If it is refused.
    sqlite3.Error, OSError
        If it cannot be opened.
    """
    with _files.lock:
        is_shared = check_folder(path)
        if create:
            create_private(path)
        found = identity(path)
        if found is None:
            raise CheckpointError(f"The checkpoint {path} cannot be opened, because there is no such file. Check it.")
        check_files(path)
        _check_not_inherited(path, found)
        header = b"" if _files.has_open(found) else _checked_header(path)
        if is_shared:
            claim_siblings(path, header)
        connection = connect(path)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
        if is_shared:
            release_journal(path)
        _check_again(connection, path)
        handle = Handle(connection, found)
        _files.handles.add(handle)
        return handle


def connect(path: str) -> sqlite3.Connection:
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
    if first(connection, "PRAGMA application_id") == 0:
        with transaction(connection, "BEGIN IMMEDIATE"):
            if first(connection, "PRAGMA application_id") == 0:  # another driver may have been faster
                connection.execute(SCHEMA)
                connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version={_FORMAT}")
    # The header that was checked may be older than the one in the -wal file.
    _check_numbers(path, first(connection, "PRAGMA application_id"), first(connection, "PRAGMA user_version"))
    with contextlib.suppress(sqlite3.OperationalError):
        # A file system without shared memory answers with another mode, which is as safe and slower; an error is
        # another driver that switches at this moment, and then this connection follows it.
        if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            # Its -journal file stays where it is, so nobody can place another.
            connection.execute("PRAGMA journal_mode=TRUNCATE")
    first(connection, "SELECT count(*) FROM sqlite_schema")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
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


def first(connection: sqlite3.Connection, query: str) -> Any:
    return connection.execute(query).fetchone()[0]


def is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)  # None if Python's module raised it, and not SQLite
    return code is not None and code & 0xFF in _DAMAGE


@contextlib.contextmanager
def translated(path: str, verb: str) -> Iterator[None]:
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


def _check_not_inherited(path: str, identity: Identity) -> None:
    if identity in _files.inherited:
        raise CheckpointError(
            f"The checkpoint {path} cannot be opened in process {os.getpid()}, because it was open in the process that "
            "this one is a fork of. Use it in that one, or start this one by another method than fork."
        )


def _check_again(connection: sqlite3.Connection, path: str) -> None:
    """Refuse what somebody placed beside the file since it was checked; now nobody else can replace it."""
    try:
        check_files(path)
    except CheckpointError:
        _keep_open(connection)  # closing would copy what is in the -wal file into the checkpoint
        raise


# ---- the header of the file


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

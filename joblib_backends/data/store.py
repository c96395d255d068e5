"""Resident buffers: bytes placed once in a file that every process of this machine can map.

A resident is addressed by the hash of its content, so the very object, an equal copy and the next call all
find it, and an array changed in place never finds the old bytes. Its life is Python's own: payloads in flight
and open scopes (``scope.py``) hold the :class:`Resident`, the store only knows it weakly, and when the last
of them lets go the file is deleted. So a resident is never removed under a batch that refers to it.

Who runs where: ``Store.put`` runs in any thread of the parent; finalizers run wherever the last reference
dies, possibly inside ``put`` itself, so they take no lock. :func:`map_buffer` runs in workers.

Invariant: a file is in the table only when all of its bytes are written.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from ..config import temp_folder_from_environment
from ..errors import DataLostError, StoreError
from .hashing import digest_of

try:
    import fcntl
except ImportError:  # Windows has no flock; folders are then removed at exit only
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Arriving",
    "BufferRef",
    "Resident",
    "Store",
    "default_store",
    "map_buffer",
    "reserve",
    "sweep_places",
    "write_all",
]

_log = logging.getLogger(__name__)

_FOLDER_PREFIX: Final = "joblib_backends-"
_LOCK_NAME: Final = "owner.lock"
_SHARED_MEMORY: Final = Path("/dev/shm")

#: Bytes below which copying from the file is faster than mapping it: one page fault costs about a 4 KiB copy,
#: a mapping two system calls more (benchmarks/run.py, row "search twice", with small y).
_COPY_BELOW: Final = 65_536

_T = TypeVar("_T")

#: Names the folders of one user; Windows has no user numbers and a temporary folder per user.
_USER: Final = os.getuid() if hasattr(os, "getuid") else 0


class BufferRef(NamedTuple):
    """Where a worker finds a buffer: ``nbytes`` bytes at ``offset`` of the file ``path``."""

    path: str
    offset: int
    nbytes: int
    #: True for one writable copy that the tasks of a call share (``mmap_mode="r+"``).
    shared: bool = False


class Resident:
    """Bytes in a file of the store; the file goes when the object does."""

    __slots__ = ("__weakref__", "_slices", "digest", "is_lost", "nbytes", "path", "shared")

    def __init__(self, path: str, nbytes: int, digest: bytes, *, shared: bool = False) -> None:
        self.path = path
        self.nbytes = nbytes
        self.digest = digest
        self.shared = shared
        #: Whether the file was found missing; then nobody is sent there any more.
        self.is_lost = False
        self._slices: dict[tuple[int, int], bytes] = {}
        weakref.finalize(self, _remove_file, path, os.getpid()).atexit = False

    def __repr__(self) -> str:
        return f"<Resident {self.digest.hex()[:8]} {self.nbytes} B in {self.path}>"

    def is_there(self) -> bool:
        """Return whether the file is, in its whole length."""
        try:
            return os.stat(self.path).st_size >= self.nbytes
        except OSError:
            return False

    def ref(self, offset: int = 0, nbytes: int | None = None) -> BufferRef:
        """Return how a worker finds this resident, or ``nbytes`` of it from ``offset``."""
        return BufferRef(self.path, offset, self.nbytes - offset if nbytes is None else nbytes, self.shared)

    def slice_digest(self, offset: int, nbytes: int) -> bytes:
        """Return the hash of a part of the content; remembered, since the content never changes."""
        key = (offset, nbytes)
        if key not in self._slices:
            self._slices[key] = digest_of(map_buffer(self.ref(offset, nbytes)))
        return self._slices[key]


def map_buffer(ref: BufferRef) -> memoryview:
    """Return the bytes of ``ref`` as a writable buffer; called in the process that uses them.

    The mapping is private and copy-on-write: code that works in place neither fails nor reaches the parent or a
    neighbour. With ``ref.shared`` it is one writable copy for all. The file is closed at once, the mapping ends
    with the last array over it.

    Raises
    ------
    DataLostError
        If the file is not on this machine, was removed, or is shorter than its content.
    """
    try:
        file = open(ref.path, "r+b" if ref.shared else "rb", buffering=0)  # noqa: SIM115
    except FileNotFoundError as error:
        raise DataLostError(errno.ENOENT, "The file of a resident is gone; was it deleted?", ref.path) from error
    with file:
        # Before it is mapped: to read beyond the end of a file kills a process.
        if os.fstat(file.fileno()).st_size < ref.offset + ref.nbytes:
            raise DataLostError(errno.EIO, "The file of a resident is shorter than its content", ref.path)
        if ref.nbytes < _COPY_BELOW and not ref.shared:
            copy = bytearray(ref.nbytes)
            file.seek(ref.offset)
            if file.readinto(copy) != ref.nbytes:
                raise DataLostError(errno.EIO, "The file of a resident is shorter than its content", ref.path)
            return memoryview(copy)
        start = ref.offset - ref.offset % mmap.ALLOCATIONGRANULARITY
        delta = ref.offset - start
        access = mmap.ACCESS_WRITE if ref.shared else mmap.ACCESS_COPY
        mapped = mmap.mmap(file.fileno(), delta + ref.nbytes, access=access, offset=start)
        return memoryview(mapped)[delta:]


class Arriving:
    """A file of the store that is being filled; as a context manager it is deleted at the end unless it is kept."""

    def __init__(self, path: str, fd: int, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self._finalizer = weakref.finalize(self, _close_and_remove, path, fd, os.getpid())
        self._finalizer.atexit = False
        self._fd = fd

    def __enter__(self) -> Arriving:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def __repr__(self) -> str:
        return f"<Arriving {self.nbytes} B in {self.path}>"

    def write(self, buffer: memoryview) -> None:
        """Add the next part."""
        write_all(self._fd, buffer)

    def keep(self) -> str:
        """Close the file and return its path; from now on it is the caller's to delete."""
        if self._finalizer.detach() is not None:
            os.close(self._fd)
        return self.path

    def drop(self) -> None:
        """Delete the file, unless it was kept."""
        self._finalizer()


@dataclass(frozen=True)
class _Region:
    """Memory of this process whose content was placed: a view inside it can be sent by its offset."""

    address: int
    nbytes: int
    resident: weakref.ref[Resident]


class Store:
    """The residents of one parent process.

    Thread-safe: one lock guards the folders, the tables are changed by single dict operations only, and nothing
    of joblib's or the user's runs under the lock. Bytes are written outside it, so two threads may place the
    same content twice; both copies are right.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._residents: weakref.WeakValueDictionary[bytes, Resident] = weakref.WeakValueDictionary()
        self._sizes_seen: set[int] = set()
        self._regions: dict[int, _Region] = {}
        self._folders: dict[str, _Folder] = {}
        self._serial = 0

    def __repr__(self) -> str:
        residents = self.residents
        return f"<Store {len(residents)} residents, {sum(r.nbytes for r in residents)} B>"

    @property
    def residents(self) -> list[Resident]:
        """The residents that exist now."""
        return list(self._residents.values())

    def has_seen_size(self, nbytes: int) -> bool:
        """Return whether a resident of exactly ``nbytes`` was ever placed: only then is a small buffer hashed."""
        return nbytes in self._sizes_seen

    def find(self, digest: bytes, nbytes: int) -> Resident | None:
        """Return the resident with this content, or None."""
        resident = self._residents.get(digest)
        return resident if resident is not None and resident.nbytes == nbytes and not resident.is_lost else None

    def find_slice(self, address: int, buffer: memoryview, digest: bytes) -> tuple[Resident, int] | None:
        """Return the resident and offset whose bytes equal ``buffer``, a part of memory that was placed whole."""
        for region in list(self._regions.values()):
            offset = address - region.address
            if offset >= 0 and offset + buffer.nbytes <= region.nbytes:
                resident = region.resident()
                if resident and self._has_slice(resident, offset, buffer.nbytes, digest):
                    return resident, offset
        return None

    def _has_slice(self, resident: Resident, offset: int, nbytes: int, digest: bytes) -> bool:
        try:
            return not resident.is_lost and resident.slice_digest(offset, nbytes) == digest
        except DataLostError:
            resident.is_lost = True
            return False

    def forget_lost(self, residents: Iterable[Resident]) -> list[Resident]:
        """Send nobody to residents whose files are gone any more; return those.

        What refers to them stays as it is. Their content is placed anew when it is next sent.
        """
        lost = [resident for resident in residents if not resident.is_there()]
        for resident in lost:
            resident.is_lost = True
        return lost

    def covers(self, low: int, high: int) -> bool:
        """Return whether the memory from ``low`` to ``high`` lies inside memory that was placed."""
        return any(r.address <= low and high <= r.address + r.nbytes for r in list(self._regions.values()))

    def put(self, buffer: memoryview, digest: bytes, *, folder: str | None = None, shared: bool = False) -> Resident:
        """Write ``buffer`` to a file of its own and return its resident.

        Shared memory comes first, then the system's folder for temporary files; ``folder`` replaces both.
        Space is reserved before anything is written: a full ``/dev/shm`` is an error here, and not a SIGBUS in
        a worker later. A ``shared`` resident is not found by its content, because tasks will change it.

        Raises
        ------
        StoreError
            If no place has room.
        """

        def write_in(place: str) -> str:
            with self._start_in(place, buffer.nbytes) as arriving:
                arriving.write(buffer)
                return arriving.keep()

        resident = Resident(self._in_first_place(folder, buffer.nbytes, write_in), buffer.nbytes, digest, shared=shared)
        if not shared:
            self._residents[digest] = resident
            self._sizes_seen.add(buffer.nbytes)
        return resident

    def start(self, nbytes: int, *, folder: str | None = None) -> Arriving:
        """Return a file with room for content that arrives in parts; as in ``put``, but nobody finds it by content.

        Raises
        ------
        StoreError
            If no place has room.
        """
        return self._in_first_place(folder, nbytes, lambda place: self._start_in(place, nbytes))

    def remember_region(self, address: int, resident: Resident) -> None:
        """Note that this process' memory at ``address`` held the resident's content when it was placed.

        The content is compared again at each use, so memory that was changed or handed to another array since
        is never mistaken.
        """
        self._regions[address] = _Region(address, resident.nbytes, weakref.ref(resident))

    def forget_region(self, address: int) -> None:
        """Drop a region; called by the finalizer of the memory's owner."""
        self._regions.pop(address, None)

    def make_folders(self, folder: str | None = None) -> list[str]:
        """Make a new folder in each place for files, best first, and return their paths.

        They go with the store, or with a process that was killed; who is done with them earlier deletes them.

        Raises
        ------
        StoreError
            If there is no place at all.
        """
        made, problems = [], []
        for place in _places(folder):
            try:
                made.append(str(self._make_folder(place)))
            except OSError as error:
                problems.append(f"{place}: {error.strerror or error}")
        if not made:
            raise StoreError(
                errno.ENOSPC,
                f"No folder for shared values can be made ({'; '.join(problems)}). "
                "Give one that can be written as temp_folder.",
            )
        return made

    def _make_folder(self, place: str) -> Path:
        path = self._next_path(place)
        try:
            path.mkdir(mode=0o700)
        except FileNotFoundError:
            # As in ``_open_new``.
            self._drop_folder(place, path.parent)
            path = self._next_path(place)
            path.mkdir(mode=0o700)
        return path

    def close(self) -> None:
        """Delete every folder of the store; called at exit and by tests."""
        with self._lock:
            folders, self._folders = self._folders, {}
        if os.getpid() == self._pid:
            for folder in folders.values():
                folder.remove()

    def _in_first_place(self, folder: str | None, nbytes: int, attempt: Callable[[str], _T]) -> _T:
        """Return what ``attempt`` returns for the best place where it does not fail."""
        problems = []
        for place in _places(folder):
            try:
                return attempt(place)
            except OSError as error:
                problems.append(f"{place}: {error.strerror or error}")
                _log.debug("A buffer of %d bytes goes to the next place: %s", nbytes, problems[-1])
        raise StoreError(
            errno.ENOSPC,
            f"No place has room for a buffer of {nbytes} bytes ({'; '.join(problems)}). "
            "Give a folder with more space as temp_folder, or make /dev/shm larger.",
        )

    def _start_in(self, place: str, nbytes: int) -> Arriving:
        path, fd = self._open_new(place)
        arriving = Arriving(path, fd, nbytes)
        try:
            reserve(fd, nbytes)
        except BaseException:
            arriving.drop()
            raise
        return arriving

    def _open_new(self, place: str) -> tuple[str, int]:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        path = self._next_path(place)
        try:
            return str(path), os.open(path, flags, 0o600)
        except FileNotFoundError:
            # The folder was removed behind our back, by a cleaner of /tmp or by who made temp_folder: take a new one.
            self._drop_folder(place, path.parent)
            path = self._next_path(place)
            return str(path), os.open(path, flags, 0o600)

    def _drop_folder(self, place: str, path: Path) -> None:
        with self._lock:
            # Race: another thread may have replaced it already.
            if place in self._folders and self._folders[place].path == path:
                self._folders.pop(place).remove()

    def _next_path(self, place: str) -> Path:
        with self._lock:
            if place not in self._folders:
                self._folders[place] = _Folder.make(place)
            self._serial += 1
            return self._folders[place].path / f"{self._serial:08d}"


@dataclass(frozen=True)
class _Folder:
    """A private folder of this process; its lock tells a later process that we are alive."""

    path: Path
    lock_fd: int

    @classmethod
    def make(cls, place: str) -> _Folder:
        """Sweep ``place``, then make a folder (0700) in it and lock it."""
        os.makedirs(place, exist_ok=True)
        _sweep(place)
        while True:
            path = Path(tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{_USER}-", dir=place))
            lock_fd = os.open(path / _LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o600)
            # Race: another process' sweep may open the lock between the two lines and take us for dead.
            if fcntl is None or (_try_lock(lock_fd) and (path / _LOCK_NAME).exists()):
                return cls(path, lock_fd)
            os.close(lock_fd)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock_fd)


def sweep_places() -> None:
    """Delete what killed processes left in the places that are used if no other is given."""
    for place in _places(None):
        _sweep(place)


def _sweep(place: str) -> None:
    """Delete what killed processes left in ``place``.

    The lock and not a process number tells the living from the dead: containers share /dev/shm, not numbers.
    """
    if fcntl is None:
        return
    for folder in Path(place).glob(f"{_FOLDER_PREFIX}{_USER}-*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != _USER:
                continue
            fd = os.open(folder / _LOCK_NAME, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        except OSError:
            continue  # gone already, or just being made: its owner will lock it
        try:
            if _try_lock(fd):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(fd)


def _try_lock(fd: int) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _places(folder: str | None) -> list[str]:
    """Return the folders to try, best first; an explicit ``temp_folder`` is the user's decision and the only one."""
    chosen = folder or temp_folder_from_environment()
    if chosen is not None:
        return [chosen]
    shared = [str(_SHARED_MEMORY)] if os.access(_SHARED_MEMORY, os.W_OK | os.X_OK) else []
    return [*shared, tempfile.gettempdir()]


def reserve(fd: int, nbytes: int) -> None:
    """Have the file system set ``nbytes`` aside for an empty file, or raise OSError."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)


def write_all(fd: int, buffer: memoryview) -> None:
    """Write all of ``buffer`` where the file stands."""
    written = 0
    while written < buffer.nbytes:
        written += os.write(fd, buffer[written:])


def _close_and_remove(path: str, fd: int, pid: int) -> None:
    # A forked child has a descriptor of its own, which it may close.
    os.close(fd)
    _remove_file(path, pid)


def _remove_file(path: str, pid: int) -> None:
    # A forked child inherits the objects, not the files.
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            os.unlink(path)


_default: Store | None = None
_default_lock = threading.Lock()


def default_store() -> Store:
    """Return the store of this process, made on first use and deleted at exit."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Store()
            atexit.register(_default.close)
        return _default


def _forget_in_child() -> None:
    # A forked child has the parent's tables but not its files: it starts its own.
    global _default, _default_lock
    _default, _default_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)

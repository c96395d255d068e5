"""A shelf: values by name in a folder of this machine, each written once and mapped by whoever needs it.

Threads and processes of one call leave there what the others would otherwise compute again. A value is one file: a
pickle and, behind it, the buffers that left the pickle. It appears under its name when all of it is written. Who takes
it gets copies of its own, the large ones copy-on-write mappings of the file: code that works in place reaches nobody.

::

    take(name) -> the value, or None          claim(name): one at a time computes and puts
    put(name, value) -> bytes                  remove(names), close(): by who made the shelf
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import pickle
import shutil
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..errors import StoreError
from .pickler import Pickler
from .store import reserve, write_all

try:
    import fcntl
except ImportError:  # Windows: there only the threads of one process wait for each other
    fcntl = None  # type: ignore[assignment]

__all__ = ["Packed", "Shelf", "pack"]

#: Before the pickle: the bytes of the pickle and the number of buffers, then the bytes of each buffer.
_HEAD: Final = struct.Struct("<QQ")

#: Buffers start at multiples of this: what NumPy's own allocations are aligned to, and a cache line.
_ALIGNMENT: Final = 64

#: Bytes below which reading a file is faster than mapping it.
_READ_BELOW: Final = 65_536

#: Where there are no locks of files. Reentrant, since another name may have the same.
_locks_of_process: Final = [threading.RLock() for _ in range(64)]

#: Bytes below which a buffer stays in the pickle.
_INNER_BELOW: Final = 4_096


class Packed(NamedTuple):
    """A value on its way to a shelf: its pickle, and its large buffers as they are."""

    stream: bytes
    buffers: list[memoryview]

    @property
    def nbytes(self) -> int:
        """Bytes of the file, but for the gaps in it."""
        return len(self.stream) + sum(buffer.nbytes for buffer in self.buffers)


class _PicklerWithout(Pickler):
    """Refuses a value that holds a certain object."""

    without: Any = None

    def reducer_override(self, obj: Any) -> Any:
        if obj is self.without and obj is not None:
            raise pickle.PicklingError(f"The value refers to a {type(obj).__name__} that it must not hold.")
        return super().reducer_override(obj)


def pack(value: Any, without: Any = None) -> Packed:
    """Return ``value`` as a pickle and buffers; nothing large is copied. Raises what pickling it raises.

    A value that holds the object ``without`` is refused: a copy would refer to a copy of that.
    """
    buffers: list[memoryview] = []

    def take(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes >= _INNER_BELOW:
            buffers.append(raw)
        return raw.nbytes < _INNER_BELOW

    stream = io.BytesIO()
    pickler = _PicklerWithout(stream, take, _never_resident)
    pickler.without = without
    pickler.dump(value)
    return Packed(stream.getvalue(), buffers)


def _never_resident(low: int, high: int) -> bool:
    return False


class Shelf:
    """The shelf in some folders.

    Parameters
    ----------
    folders : sequence of str
        Where files may be, the best place first. They exist; who made them calls :meth:`close`.

    Notes
    -----
    Thread-safe, and safe among processes: files appear by renaming, and claims are locks of the file system, which
    end with the process that holds them.
    """

    def __init__(self, folders: Iterable[str]) -> None:
        self._folders = [Path(folder) for folder in folders]
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<Shelf {', '.join(map(str, self._folders))}>"

    def take(self, name: str, *, mapped: bool = True) -> Any | None:
        """Return the value of that name, or None if there is none (any more).

        ``mapped=False`` reads large buffers into memory of their own: for values that live longer than the task.
        """
        for folder in self._folders:
            try:
                with open(folder / name, "rb", buffering=0) as file:
                    return _load(_content(file, mapped), apart=not mapped)
            except FileNotFoundError:
                continue
        return None

    def put(self, name: str, packed: Packed) -> bool:
        """Write a value under its name, in the first place that has room; return whether there was one."""
        sizes = [buffer.nbytes for buffer in packed.buffers]
        head = _HEAD.pack(len(packed.stream), len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
        parts: list[tuple[int, Any]] = [(0, head), (len(head), packed.stream)]
        end = len(head) + len(packed.stream)
        for buffer in packed.buffers:
            start = _aligned(end)
            parts.append((start, buffer))
            end = start + buffer.nbytes
        return any(self._write(folder, name, parts, end) for folder in self._folders)

    def _write(self, folder: Path, name: str, parts: list[tuple[int, Any]], nbytes: int) -> bool:
        new = folder / f"{name}.{os.getpid()}.{threading.get_ident()}"
        try:
            fd = os.open(new, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        except OSError:
            return False
        try:
            # Before anything is written: a full /dev/shm is an error here, and not a SIGBUS in who maps the file.
            reserve(fd, nbytes)
            for start, part in parts:
                os.lseek(fd, start, os.SEEK_SET)
                write_all(fd, memoryview(part))
            os.replace(new, folder / name)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(new)
            return False
        finally:
            os.close(fd)
        return True

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Wait until nobody else holds the claim to ``name``, and hold it in this block.

        Nobody waits for a process that is gone. Where locks do not work, all go on at once: then two may compute the
        same.
        """
        if fcntl is None:
            with _locks_of_process[hash(name) % len(_locks_of_process)]:
                yield
            return
        fd = self._lock(name)
        try:
            yield
        finally:
            if fd is not None:
                # Explicitly: a child that was forked meanwhile has the descriptor too.
                fcntl.flock(fd, fcntl.LOCK_UN)
                os.close(fd)

    def _lock(self, name: str) -> int | None:
        try:
            fd = os.open(self._folders[0] / f"{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                return None
            raise
        return fd

    def remove(self, names: Iterable[str]) -> None:
        """Delete values; who has mapped one keeps it."""
        for name in names:
            for folder in self._folders:
                for path in (folder / name, folder / f"{name}.lock"):
                    with contextlib.suppress(OSError):
                        os.unlink(path)

    def close(self) -> None:
        """Delete the folders; idempotent."""
        if os.getpid() != self._pid:
            return  # a forked child has the object, and not the files
        for folder in self._folders:
            # Race: a task of a call that failed may still be running. In a folder of another name it puts nothing.
            gone = folder.with_name(f"{folder.name}.gone")
            with contextlib.suppress(OSError):
                os.rename(folder, gone)
            shutil.rmtree(gone, ignore_errors=True)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _content(file: Any, mapped: bool) -> memoryview:
    nbytes = os.fstat(file.fileno()).st_size
    if mapped and nbytes >= _READ_BELOW:
        return memoryview(mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY))
    content = bytearray(nbytes)
    read = 0
    while read < nbytes:
        n_new = file.readinto(memoryview(content)[read:])
        if not n_new:
            raise StoreError(5, f"The file of a shared value, {file.name}, is shorter than its content.")
        read += n_new
    return memoryview(content)


def _load(content: memoryview, *, apart: bool) -> Any:
    """Return the value; ``apart`` gives each buffer memory of its own, so that none keeps the others alive."""
    n_stream, n_buffers = _HEAD.unpack_from(content)
    sizes = struct.unpack_from(f"<{n_buffers}Q", content, _HEAD.size)
    start = _HEAD.size + 8 * n_buffers
    stream, end = content[start : start + n_stream], start + n_stream
    buffers = []
    for nbytes in sizes:
        start = _aligned(end)
        end = start + nbytes
        buffers.append(bytearray(content[start:end]) if apart else content[start:end])
    return pickle.loads(stream, buffers=buffers)

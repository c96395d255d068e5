"""A batch as bytes: pickle protocol 5 with large buffers out of band.

One mechanism for ndarrays, DataFrames, Arrow tables, SciPy sparse matrices and anything that contains them:
buffers of at least ``max_nbytes`` leave the pickle and become residents of the store. Each task is a pickle of
its own, so tasks that share a batch never share an object: four tasks doing ``X[0] += 1`` each see the X that
was sent.

Who runs where: :class:`Encoder` in the parent, in whichever thread submits; :func:`load` in the worker.

::

    Payload.wire = (functions, tasks, nested, share, initializer, listening)    plain builtins, cheap to pickle again
        functions = [(pickle, [BufferRef, ...]), ...]    plain functions, loaded once for the batch
        tasks     = [(pickle of [(function or its position, args, kwargs), ...], [BufferRef, ...]), ...]
"""

from __future__ import annotations

import io
import pickle
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Final

import cloudpickle
import numpy as np

from ..budget import Share
from ..config import Config
from ..errors import StoreError, TaskPicklingError
from ..hearing import Listening
from .arrays import address_of, owns_all, root_owner
from .costs import ArgumentCosts
from .hashing import CHECKSUM_NBYTES, checksum, digest_of, is_intact
from .pickler import Pickler, Standalone
from .scope import ResidentScope
from .store import BufferRef, Resident, map_buffer
from .values import (
    Task,
    cannot_change,
    has_only_leaves,
    is_large,
    is_pickled_whole,
    is_small_and_immutable,
)

__all__ = [
    "Encoder",
    "Payload",
    "RemoteReference",
    "Wire",
    "describe",
    "files_of",
    "load",
    "moved_files",
    "pickle_initializer",
    "resolving",
]

Pickle = tuple[bytes, list[BufferRef]]
Wire = tuple[list[Pickle], list[Pickle], bytes, Share, bytes, Listening]


#: Bytes from which a buffer of a scattered object is placed; smaller ones travel as fast in the pickle.
_SCATTERED_FROM: Final = 1_024


@dataclass
class Payload:
    """An encoded batch: ``wire`` travels, ``residents`` keeps alive what it refers to."""

    wire: Wire
    residents: list[Resident] = field(default_factory=list)
    #: Bytes that travel in the pickles, and bytes that were placed for this payload.
    nbytes_inband: int = 0
    nbytes_placed: int = 0
    #: Bytes that would have travelled and did not, since they were resident already.
    nbytes_saved: int = 0
    #: When it was made, on ``time.perf_counter``, and the seconds that this took.
    encoded: tuple[float, float] = (0.0, 0.0)

    def sent_with(self, share: Share) -> Wire:
        """Return what travels for a batch that starts with ``share``."""
        return (*self.wire[:3], share, *self.wire[4:])


#: Small buffers that are remembered, to be placed when they come again; each is 16 bytes.
_MOST_SEEN: Final = 10_000

#: In the place of a share that is decided when the batch starts.
_NO_SHARE: Final = Share(None, {})


class Encoder:
    """Turns the batches of one call into payloads.

    Parameters
    ----------
    config : Config
        ``max_nbytes``, ``mmap_mode``, ``temp_folder`` and the initializer.
    scope : ResidentScope
        What keeps placed buffers.
    references : mapping of int to RemoteReference, optional
        What to send in the place of an argument, by its ``id``; the caller keeps the arguments alive.
    repeated_nbytes : int, optional
        Bytes from which buffers are placed as well when they come for the second time, unless the user has said from
        where on they are.
    """

    def __init__(
        self,
        config: Config,
        scope: ResidentScope,
        references: Mapping[int, RemoteReference] | None = None,
        repeated_nbytes: int | None = None,
    ) -> None:
        self._config = config
        self._scope = scope
        self._references = references or {}
        self._shared = config.mmap_mode in ("r+", "w+")
        self._shared_residents: dict[tuple[int, int], tuple[weakref.ref[Any], Resident]] = {}
        self._scattered = {id(value) for value in config.scatter}
        self._repeated_from = repeated_nbytes if config.max_nbytes == Config.max_nbytes else None
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        # Files of the user's that some worker does not have.
        self._not_there: set[str] = set()
        self._initializer = pickle_initializer(config)
        self._nested: tuple[Any, bytes] | None = None
        #: What the time to encode goes into.
        self.costs = ArgumentCosts()
        # Scattered objects that are no arrays, in the form in which they were pickled first.
        self._lasting: dict[int, Standalone] = {}
        # Once for the call.
        self._listening: Listening | None = None

    def scatter(self, values: Iterable[Any]) -> int:
        """Place every buffer of ``values``, whatever its size, until the scope ends; return the bytes moved.

        Raises
        ------
        TaskPicklingError
            If a value cannot be pickled.
        """
        pickling = _Pickling(self, min_nbytes=_SCATTERED_FROM)
        for position, value in enumerate(values):
            try:
                pickling.dump((self._form_of(value, _SCATTERED_FROM),))
            except StoreError:
                raise
            except Exception as error:
                raise TaskPicklingError(
                    f"scatter[{position}] is a {type(value).__name__} that cannot be pickled: {error}. "
                    "Leave it out of scatter, or pass what it is made from."
                ) from error
        for resident in pickling.residents:
            self._scope.pin(resident)
        return pickling.nbytes_placed

    def replacements(self, function: Any, values: Sequence[Any], threshold: int | None) -> dict[int, Any]:
        """Return what to pickle in the place of arguments of one task, by their ``id``.

        A container gets a pickle of its own only where the task cannot notice: an object that is in it and also
        elsewhere in the task would be two. What was scattered is data by the user's own word.
        """
        replaced: dict[int, Any] = {}
        for value in values:
            if id(value) in self._references:
                replaced[id(value)] = self._references[id(value)]
            elif threshold is None:
                continue
            elif id(value) in self._scattered:
                form = self._form_of(value, threshold)
                if form is not value:
                    replaced[id(value)] = form
            elif is_large(value, threshold):
                others = (other for other in (function, *values) if other is not value)
                if has_only_leaves(value) or all(map(has_only_leaves, others)):
                    replaced[id(value)] = Standalone(value)
        return replaced

    def encode(self, function: Callable[[], Any], nested: tuple[Any, int | None]) -> Payload:
        """Return the payload of a batch.

        Parameters
        ----------
        function : callable
            joblib's batch, or any callable without arguments.
        nested : tuple
            The backend, and n_jobs, for Parallel calls inside the tasks.

        Raises
        ------
        TaskPicklingError
            If a function or argument cannot be pickled; the message names it.
        StoreError
            If no place has room for a buffer.
        """
        items: Sequence[Task] = getattr(function, "items", None) or [(function, (), {})]
        max_nbytes = self._config.max_nbytes if self._config.mmap_mode is not None else None
        pickling = _Pickling(self, min_nbytes=max_nbytes)
        began = time.perf_counter()
        try:
            tasks = pickling.dump_tasks(items)
        except StoreError:
            raise
        except Exception as error:
            raise _named_error(items, error) from error
        seconds = time.perf_counter() - began
        self.costs.note_batch(seconds)
        self._listening = self._listening or Listening.now()
        wire = (
            pickling.functions, tasks, self._pickle_nested(nested), _NO_SHARE, self._initializer, self._listening
        )  # fmt: skip
        return Payload(
            wire,
            pickling.residents,
            sum(len(stream) for stream, _ in (*pickling.functions, *tasks)),
            pickling.nbytes_placed,
            pickling.nbytes_saved,
            (began, seconds),
        )

    def place(self, buffer: memoryview, owner: Any, *, any_size: bool) -> tuple[Resident, int, bool] | None:
        """Return where ``buffer`` is resident: (resident, offset, whether it was placed now), or None to send it.

        Looks by content first, then as a part of memory that was placed whole, then places it.
        """
        if self._shared and isinstance(owner, np.ndarray):
            return self._place_shared(buffer, root_owner(owner), any_size=any_size)
        if not any_size and not self._may_be_resident(buffer):
            return None
        digest = digest_of(buffer)
        address = address_of(buffer)
        store = self._scope.store
        resident, placed = store.find(digest, buffer.nbytes), False
        if resident is None:
            part = store.find_slice(address, buffer, digest)
            if part is not None:
                return *part, False
            if not any_size:
                return None
            resident, placed = store.put(buffer, digest, folder=self._config.temp_folder), True
        root = root_owner(owner)
        self._scope.hold(resident, address, root if owns_all(root, buffer.nbytes) else None)
        return resident, 0, placed

    def comes_again(self, buffer: memoryview) -> bool:
        """Return whether a buffer is to be placed although it is small: its content was sent before."""
        if self._repeated_from is None or buffer.nbytes < self._repeated_from or self._shared:
            return False
        digest = digest_of(buffer)
        if digest in self._seen:
            return True
        self._seen[digest] = None
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return False

    def is_resident(self, low: int, high: int) -> bool:
        """Return whether the memory between two addresses was placed as a whole, or must be to be shared."""
        return self._shared or self._scope.store.covers(low, high)

    def has_path(self, path: str) -> bool:
        """Return whether workers have a file of the user's, as far as is known."""
        return path not in self._not_there

    def send_content_of(self, path: str) -> None:
        """Send memmaps of a file by content from now on: some worker has no such file, or another one."""
        self._not_there.add(path)

    def _form_of(self, value: Any, threshold: int) -> Any:
        """Return what is pickled in the place of a scattered value; the value itself where nothing is."""
        if is_pickled_whole(value) or is_large(value, threshold):
            # Who says of an object that it is data says, too, that it is the same for all tasks of the call.
            return self._lasting.setdefault(id(value), Standalone(value, is_lasting=True))
        return value

    def _may_be_resident(self, buffer: memoryview) -> bool:
        """Return whether it is worth a hash to look for a small buffer: by its size, or as a part of placed memory."""
        if self._scope.store.has_seen_size(buffer.nbytes):
            return True
        address = address_of(buffer) if buffer.nbytes >= _SCATTERED_FROM else 0
        return bool(address) and self._scope.store.covers(address, address + buffer.nbytes)

    def _place_shared(self, buffer: memoryview, root: Any, *, any_size: bool) -> tuple[Resident, int, bool] | None:
        """Place memory that tasks may write to in common: found by its address, while the array there lives.

        Not by content: sums and counts that both start as zeros are two arrays.
        """
        key = (address_of(buffer), buffer.nbytes)
        owner, resident = self._shared_residents.get(key, (None, None))
        if resident is None and not any_size:
            return None
        digest = digest_of(buffer)
        is_known = owner is not None and owner() is root
        if resident is not None and is_known and resident.digest == digest and not resident.is_lost:
            return resident, 0, False
        resident = self._scope.store.put(buffer, digest, folder=self._config.temp_folder, shared=True)
        living = {k: (owner, r) for k, (owner, r) in self._shared_residents.items() if owner() is not None}
        self._shared_residents = {**living, key: (weakref.ref(root), resident)}
        return resident, 0, True

    def _pickle_nested(self, nested: tuple[Any, int | None]) -> bytes:
        # One pickle per change of the nested backend, not per batch: it is the same object for a whole call.
        if self._nested is None or self._nested[0] != nested:
            self._nested = (nested, cloudpickle.dumps(nested, protocol=5))
        return self._nested[1]


@dataclass(frozen=True)
class RemoteReference:
    """Stands for an object that is on the cluster already; a worker puts a copy of the object in its place."""

    key: str

    def __reduce__(self) -> Any:
        return _resolve, (self.key,)


_resolvable: ContextVar[tuple[Mapping[str, Any], ResidentScope] | None] = ContextVar("resolvable", default=None)


@contextmanager
def resolving(objects: Mapping[str, Any], scope: ResidentScope) -> Iterator[None]:
    """Let :class:`RemoteReference` find ``objects`` by key, in this thread and this block."""
    token = _resolvable.set((objects, scope))
    try:
        yield
    finally:
        _resolvable.reset(token)


def _resolve(key: str) -> Any:
    """Return a copy of a remote object that the task may change: its buffers are mapped copy-on-write."""
    resolvable = _resolvable.get()
    assert resolvable is not None, f"{key} was sent to a worker that does not have it"
    objects, scope = resolvable
    pickling = _Pickling(Encoder(Config(), scope), min_nbytes=Config().max_nbytes)
    return load(*pickling.dump(objects[key]))


def files_of(wire: Wire) -> set[str]:
    """Return the files of residents that a batch needs."""
    return {BufferRef(*ref).path for _, refs in (*wire[0], *wire[1]) for ref in refs}


def moved_files(wire: Wire, moved: Mapping[str, str]) -> Wire:
    """Return ``wire`` with the files of ``moved`` in the places where this machine has them."""
    return (_moved(wire[0], moved), _moved(wire[1], moved), *wire[2:]) if moved else wire


def _moved(pickles: list[Pickle], moved: Mapping[str, str]) -> list[Pickle]:
    return [
        (stream, [ref._replace(path=moved[ref.path]) if ref.path in moved else ref for ref in refs])
        for stream, refs in pickles
    ]


def load(stream: bytes, refs: Iterable[BufferRef]) -> Any:
    """Return what one pickle holds; its buffers are mapped for it alone.

    Raises
    ------
    ValueError
        If the bytes are not those that were sent: a damaged pickle may well load, as something else.
    DataLostError
        If a buffer is not there.
    """
    # Each pickle comes behind its checksum.
    pickled = memoryview(stream)[CHECKSUM_NBYTES:]
    if not is_intact(pickled, bytes(stream[:CHECKSUM_NBYTES])):
        raise ValueError(f"{len(stream)} bytes were damaged on their way")
    return pickle.loads(pickled, buffers=[map_buffer(BufferRef(*ref)) for ref in refs])


def describe(function: Any) -> str:
    """Return a name for a task's function that its author recognises."""
    inner = getattr(function, "function", None) or getattr(function, "func", None) or function
    return str(getattr(inner, "__qualname__", None) or type(inner).__qualname__)


class _Pickling:
    """One batch on its way into bytes: what its pickles refer to, and the count of bytes."""

    def __init__(self, encoder: Encoder, *, min_nbytes: int | None) -> None:
        self._encoder = encoder
        self._min_nbytes = min_nbytes
        self._refs: list[BufferRef] = []
        self._positions: dict[int, int] = {}
        self.functions: list[Pickle] = []
        self.residents: list[Resident] = []
        self.nbytes_placed = 0
        self.nbytes_saved = 0

    def dump(self, value: Any, begun: dict[int, float] | None = None) -> Pickle:
        """Return the pickle of ``value`` and where its buffers are; note when the objects of ``begun`` are come to."""
        self._refs = []
        stream = io.BytesIO()
        # A new pickler each time, 2 µs: tasks must not share its memo, and kept here it would be a cycle that
        # holds the context, with its workers, until the garbage collector comes by.
        Pickler(stream, self._take_buffer, self._encoder.is_resident, self._encoder.has_path, begun).dump(value)
        pickled = stream.getvalue()
        return checksum(pickled) + pickled, self._refs

    def dump_tasks(self, tasks: Sequence[Task]) -> list[Pickle]:
        """Return one pickle for all tasks if they are small and nothing in them can change, else one for each."""
        if all(map(is_small_and_immutable, tasks)):
            return [self.dump(tasks)]
        return [self._dump_task(*task) for task in tasks]

    def _dump_task(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pickle:
        replaced = self._encoder.replacements(function, (*args, *kwargs.values()), self._min_nbytes)
        if replaced:
            args = tuple(replaced.get(id(value), value) for value in args)
            kwargs = {name: replaced.get(id(value), value) for name, value in kwargs.items()}
        is_shareable = type(function) is FunctionType and cannot_change(function)
        callee = self._position_of(function) if is_shareable else function
        begun = self._encoder.costs.begun((*args, *kwargs.values()))
        pickled = self.dump([(callee, args, kwargs)], begun)
        if begun is not None:
            self._encoder.costs.add(function, args, kwargs, begun)
        return pickled

    def _position_of(self, function: Any) -> int:
        """Return where a plain function is among those of the batch: one of ``__main__`` takes 100 µs to pickle."""
        if id(function) not in self._positions:
            self.functions.append(self.dump(function))
            self._positions[id(function)] = len(self.functions) - 1
        return self._positions[id(function)]

    def _take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Called by pickle for each buffer; False takes it out of the pickle."""
        raw = buffer.raw()
        min_nbytes = self._min_nbytes
        any_size = min_nbytes is not None and (raw.nbytes >= min_nbytes or self._encoder.comes_again(raw))
        found = self._encoder.place(raw, memoryview(buffer).obj, any_size=any_size) if raw.nbytes else None
        if found is None:
            return True
        resident, offset, placed = found
        if placed:
            self.nbytes_placed += raw.nbytes
        else:
            self.nbytes_saved += raw.nbytes
        self.residents.append(resident)
        self._refs.append(resident.ref(offset, raw.nbytes))
        return False


def pickle_initializer(config: Config) -> bytes:
    """Return (initializer, initargs) as bytes, empty without one; the bytes are also its identity in a worker."""
    if config.initializer is None:
        return b""
    try:
        return bytes(cloudpickle.dumps((config.initializer, config.initargs), protocol=5))
    except Exception as error:
        raise TaskPicklingError(
            f"The initializer {describe(config.initializer)} or its initargs cannot be pickled: {error}. "
            "Use a function of a module, and arguments that can be pickled."
        ) from error


def _named_error(tasks: Sequence[Task], error: Exception) -> TaskPicklingError:
    """Return the error that names the task, and the argument that cannot travel."""
    for position, (function, args, kwargs) in enumerate(tasks):
        parts = {f"argument {i}": arg for i, arg in enumerate(args)}
        parts |= {f"argument {name!r}": arg for name, arg in kwargs.items()}
        for name, part in {"the function": function, **parts}.items():
            problem = _pickling_problem(part)
            if problem is not None:
                return TaskPicklingError(
                    f"Could not pickle the task {position} of the batch to send it to the workers: {name} of "
                    f"{describe(function)}, a {type(part).__name__}, cannot be pickled: {problem}. "
                    "Pass what it is made from, or run on threads with prefer='threads'."
                )
    return TaskPicklingError(f"Could not pickle the task to send it to the workers: {error}.")


def _pickling_problem(part: Any) -> Exception | None:
    try:
        cloudpickle.Pickler(io.BytesIO(), protocol=5, buffer_callback=lambda buffer: None).dump(part)
    except Exception as error:
        return error
    return None

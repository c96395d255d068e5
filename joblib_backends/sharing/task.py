"""One task of a search where it runs: its steps do what they do, or take it from the shelf."""

from __future__ import annotations

import contextlib
import functools
import socket
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, NamedTuple

from ..data.shelf import Packed, Shelf, pack
from ..timeline.phases import noted
from . import effects, sklearn_inside
from .effects import Effects, Observation, Thawer, content_or_none, frozen
from .ledger import Held
from .sklearn_inside import CLONE, OF_CALLBACKS, TRANSFORM
from .steps import derived

__all__ = ["Counted", "Counts", "Hint", "Place", "SharedCall", "SharedFit"]

#: Seconds to put a result on the shelf, and to take it from there: for each, with the looks before and after; for each
#: byte of its pickle; and for each byte of its buffers, which are mapped (benchmarks/sharing.py, "shelf").
_PUT_S, _PUT_BYTE_S = 250e-6, 0.5e-9
_TAKE_S, _TAKE_PICKLED_BYTE_S, _TAKE_MAPPED_BYTE_S = 150e-6, 11e-9, 0.05e-9

#: What stands in a traceback between scikit-learn's lines and those of a step.
_OWN_FILES: Final = frozenset({__file__, effects.__file__})


class SharedCall(NamedTuple):
    """What all tasks of a call have in common."""

    key: str
    folders: tuple[str, ...]
    #: What is larger is not kept.
    limit_nbytes: int
    #: Where the folders are. Elsewhere, on a network file system, a file that is deleted is lost to who has mapped it.
    host: str


class Place(NamedTuple):
    """Where a step stands (``steps.Step``)."""

    token: bytes | None
    columns: bytes | None
    #: The identity of the step when it is fitted on the fold.
    fitted: str | None


class Hint(NamedTuple):
    """What travels with a task: where its steps stand in the call."""

    fold: str
    #: By path.
    steps: dict[str, Place]
    #: How many tasks have each of the prefixes that are worth keeping.
    uses: dict[str, int]


@dataclass
class Counts:
    """What sharing did. Fits and transforms are counted where several tasks of the call have them in common."""

    fits_run: int = 0
    fits_shared: int = 0
    transforms_run: int = 0
    transforms_shared: int = 0
    seconds_saved: float = 0.0

    def add(self, other: Counts) -> None:
        """Add what one task counted."""
        for name, number in vars(other).items():
            setattr(self, name, getattr(self, name) + number)


@dataclass
class Counted:
    """A task's result on its way back, with what sharing did in it, and what it left for others."""

    result: Any
    counts: Counts = field(default_factory=Counts)
    held: list[Held] = field(default_factory=list)


class SharedFit:
    """Stands for scikit-learn's function in a task that has steps in common with others."""

    def __init__(self, function: Any, hint: Hint, call: SharedCall) -> None:
        self.function = function
        self._hint = hint
        self._call = call
        # For messages that name the task.
        self.__qualname__ = function.__qualname__

    def __call__(self, *args: Any, **kwargs: Any) -> Counted:
        given = sklearn_inside.arguments_of(self.function, args, kwargs)
        # Estimators that are given back live on: they must not keep files that have no name any more.
        is_mapped = not given["return_estimator"] and self._call.host == socket.gethostname()
        is_watched = not sklearn_inside.is_own_scorer(given.get("scorer"))
        sharer = Sharer(self._hint, _Workplace.of(self._call), mapped=is_mapped, watches_data=is_watched)
        sharer.replace(given["estimator"], "", ("fit",))
        function = sklearn_inside.with_globals(self.function, sharer.cut, _format_exc)
        try:
            return Counted(function(*args, **kwargs), sharer.counts, sharer.held)
        finally:
            sharer.restore(given["estimator"])


def _format_exc() -> str:
    return sklearn_inside.format_exc_without(_OWN_FILES)


#: Why everyone runs a method alone: what it does was not kept, since to share it takes longer, or there is no room; it
#: returns a view, whose owner must be the task's own; it cannot be shared; it failed, this time.
Verdict = Literal["not kept", "view", "never", "failed"]

#: What pickle and copy ask an object for.
STATE: Final = "__getstate__"

#: Path and name of a method, and what its object is.
_Kind = tuple[str, str, bytes | None]


class _Workplace:
    """What a process keeps for the tasks of one call: the shelf, and which steps are not worth it."""

    _latest: ClassVar[OrderedDict[str, _Workplace]] = OrderedDict()
    _MAX_CALLS: ClassVar[int] = 4

    @classmethod
    def of(cls, call: SharedCall) -> _Workplace:
        """Return that of a call. Two threads may make two at the same time: what one knows, the other finds out."""
        workplace = cls._latest.get(call.key)
        if workplace is None:
            workplace = cls._latest[call.key] = cls(call)
            with contextlib.suppress(KeyError):
                while len(cls._latest) > cls._MAX_CALLS:
                    cls._latest.popitem(last=False)
        return workplace

    def __init__(self, call: SharedCall) -> None:
        self.shelf = Shelf(call.folders)
        self.limit_nbytes = call.limit_nbytes
        self.thawer = Thawer()
        self.verdicts: dict[_Kind, Verdict] = {}


class _Invocation(NamedTuple):
    """A method of a step, about to be called."""

    method: _Method
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def path(self) -> str:
        return self.method.path

    @property
    def estimator(self) -> Any:
        return self.method.estimator

    @property
    def is_transform(self) -> bool:
        return self.method.name == TRANSFORM

    @property
    def title(self) -> str:
        """What it is, where people see it."""
        return f"{type(self.estimator).__name__}.{self.method.name}"

    def run(self) -> Any:
        return self.method.run(self.args, self.kwargs)


class Sharer:
    """Runs the steps of one task, or takes from the shelf what they would do.

    Used by the task's own thread, and by those in which a FeatureUnion or ColumnTransformer runs its parts.

    Parameters
    ----------
    hint : Hint
        Where the steps stand in the call.
    workplace : _Workplace
        The shelf.
    mapped : bool
        Whether large arrays that are taken may be mappings of files.
    watches_data : bool
        Whether the scorer is code of others, which may change the data that the next scorer gets.
    """

    def __init__(self, hint: Hint, workplace: _Workplace, *, mapped: bool, watches_data: bool) -> None:
        self.counts = Counts()
        self.held: list[Held] = []
        self._hint = hint
        self._shelf = workplace.shelf
        self._limit_nbytes = workplace.limit_nbytes
        self._thawer = workplace.thawer
        self._verdicts = workplace.verdicts
        self._mapped = mapped
        self._watches_data = watches_data
        self._replaced: list[Any] = []
        # By address, objects whose content has an identity: what returns the object, if it is still there.
        self._data: dict[int, tuple[Callable[[], Any], str]] = {}
        self._y: Any = None
        # What a container got, for the steps inside; and of a step that was fitted what it is and what it got, with its
        # attributes then.
        self._inside: dict[str, str] = {}
        self._fitted: dict[str, tuple[str, str, dict[str, Any]]] = {}
        # Contents of the parts of the fold, which the scorer may change: it is anybody's code.
        self._parts: dict[int, bytes | None] = {}
        self._is_fitted = False
        self._n_forgotten = 0

    # ---- the fold

    def cut(self, estimator: Any, X: Any, y: Any, indices: Any, train_indices: Any = None) -> Any:  # noqa: N803
        """Return the training or the test part of X and y. In the place of scikit-learn's ``_safe_split``."""
        is_train, fold = train_indices is None, self._hint.fold
        name = fold if is_train else derived(fold, "test")
        cut = functools.partial(sklearn_inside.cut_fold, estimator, X, y, indices, train_indices)
        # Apart: a test part may be too small to be worth it, where the training part is not.
        part = self._cut_or_taken(cut, name, ("", "training part" if is_train else "test part", None))
        self._note(part[0], name)
        if self._watches_data:
            self._parts[id(part[0])] = content_or_none(part[0])
        if is_train:
            self._y = part[1]
        return part

    def _cut_or_taken(self, cut: Callable[[], Any], name: str, kind: _Kind) -> Any:
        if kind in self._verdicts:
            return cut()
        with self._taken_or_claimed(name, kind) as taken:
            if taken is None:
                started = time.perf_counter()
                part = cut()
                if not self._keep(name, self._hint.fold, Effects(time.perf_counter() - started, part), None):
                    self._verdicts[kind] = "not kept"
                return part
        return taken.output if isinstance(taken, Effects) else cut()

    # ---- in the place of methods

    def replace(self, estimator: Any, path: str, names: Sequence[str]) -> None:
        """Put ours in the place of some methods of one object."""
        for name in names:
            if hasattr(estimator, name):
                vars(estimator)[name] = _Method(self, estimator, path, name)
        self._replaced.append(estimator)

    def _replace_step(self, transformer: Any, path: str) -> None:
        if path not in self._hint.steps:
            return
        self.replace(transformer, path, (sklearn_inside.fit_name(transformer), TRANSFORM, CLONE, STATE))
        for name, part, _ in sklearn_inside.parts_of(transformer)[1]:
            self._replace_step(part, f"{path}__{name}")

    def restore(self, candidate: Any) -> None:
        """Give all objects their own methods back."""
        for estimator in (*self._replaced, candidate, *_all_inside(candidate)):
            _take_out(estimator)
        self._replaced.clear()

    @contextlib.contextmanager
    def _restored_inside(self, container: Any) -> Iterator[None]:
        """Give the objects inside of a container their own methods back for a moment."""
        taken_out = [(estimator, _take_out(estimator)) for estimator in _all_inside(container)]
        try:
            yield
        finally:
            for estimator, methods in taken_out:
                vars(estimator).update(methods)

    def answer(self, call: _Invocation) -> Any:
        """Answer the call of a method that was replaced."""
        if not call.path:
            # The candidate itself: its parameters are set now, and its steps are those that will run.
            for name, transformer in sklearn_inside.transformers_of(call.estimator):
                self._replace_step(transformer, name)
            output = call.run()
            _take_out(call.estimator)
            self._is_fitted = True
            return output
        if call.method.name == STATE:
            # Of a copy, in another process perhaps. What a class returns may be what the object lives from.
            state = call.run()
            return _without_ours(state) if isinstance(state, dict) else state
        if self._is_fitted and not call.is_transform:
            # A scorer clones and fits what is no candidate any more.
            return call.run()
        if call.method.name == CLONE:
            # A ColumnTransformer fits clones: there it goes on.
            clone = call.run()
            self._replace_step(clone, call.path)
            return clone
        return self._transform(call) if call.is_transform else self._fit(call)

    def _fit(self, call: _Invocation) -> Any:
        token = self._hint.steps[call.path].token
        data = self._data_of(call)
        if data is None or len(call.args) > 2 or (call.args[1] if len(call.args) == 2 else None) is not self._y:
            return self._run_unknown(call)
        if sklearn_inside.has_callbacks(call.estimator):
            # Somebody is told of each fit.
            return self._run_unknown(call)
        self._inside[call.path] = data
        if token is None:
            return self._run_checked(call)
        fitted = derived(data, token)
        output = self._shared(call, fitted, fitted, fitted)
        if call.path in self._inside:
            self._fitted[call.path] = (fitted, data, _attributes(call.estimator))
        return output

    def _transform(self, call: _Invocation) -> Any:
        data = self._data_of(call)
        fitted, fitted_on, attributes = self._fitted.get(call.path, ("", "", {}))
        if data is None or call.kwargs or len(call.args) > 1 or not _are_same(attributes, _attributes(call.estimator)):
            return self._run_unknown(call)
        self._inside[call.path] = data
        name = derived(fitted, data)
        # Without a fit_transform this is the second half of it, and what it returns is what the fitted step makes.
        is_second_half = data == fitted_on and sklearn_inside.fit_name(call.estimator) == "fit"
        return self._shared(call, fitted, name, fitted if is_second_half else name)

    def _shared(self, call: _Invocation, fitted: str, name: str, identity: str) -> Any:
        """Take what a method would do from the shelf, or run it, and put there what it does.

        ``name`` is that on the shelf, ``identity`` that of the data that is returned.
        """
        if fitted not in self._hint.uses:
            return self._noted(call, self._run_checked(call), identity)
        kind = (call.path, call.method.name, self._hint.steps[call.path].token)
        if kind in self._verdicts:
            return self._run_alone(call, identity, self._verdicts[kind])
        with self._taken_or_claimed(name, kind) as taken:
            if taken is None:
                return self._run_and_keep(call, kind, fitted, name, identity)
        if not isinstance(taken, Effects):
            return self._run_alone(call, identity, taken)
        self._count(call, "shared")
        with noted("transfer", f"{call.title}, shared"):
            output = taken.apply(call.estimator, self._thawer)
        if not call.is_transform:
            self._continue_inside(call.estimator, call.path)
        return self._noted(call, output, identity)

    def _continue_inside(self, container: Any, path: str) -> None:
        """Let the fitted steps in a container that was taken be shared too: it may get other data than was seen yet."""
        for name, part in sklearn_inside.fitted_parts_of(container):
            place = self._hint.steps.get(f"{path}__{name}")
            if place is not None:
                self._replace_step(part, f"{path}__{name}")
                if place.fitted is not None:
                    self._fitted[f"{path}__{name}"] = (place.fitted, "", _attributes(part))
                self._continue_inside(part, f"{path}__{name}")

    def _run_and_keep(self, call: _Invocation, kind: _Kind, fitted: str, name: str, identity: str) -> Any:
        self._count(call, "run")
        n_forgotten = self._n_forgotten
        with self._restored_inside(call.estimator):
            observation = Observation(call.estimator, call.args, _attributes)
        with noted("shared fit", call.title):
            output = observation.run(call.run)
        with self._restored_inside(call.estimator):
            done = observation.effects(may_change=not call.is_transform) if observation.left_all_else_alone else None
            if done is None or self._n_forgotten != n_forgotten:
                self._verdicts[kind] = "never"
                self._forget_all()
                return output
            if observation.returned_a_view:
                self._verdicts[kind] = "view"
                return self._noted_view(call, output, identity)
            if not self._keep(name, fitted, done, call.estimator):
                self._verdicts[kind] = "not kept"
        return self._noted(call, output, identity)

    def _run_alone(self, call: _Invocation, identity: str, verdict: Verdict) -> Any:
        self._count(call, "run")
        if verdict == "not kept":
            return self._noted(call, self._run_checked(call), identity)
        if verdict == "view":
            return self._noted_view(call, call.run(), identity)
        return self._run_unknown(call)

    def _count(self, call: _Invocation, what: str) -> None:
        counter = f"{'transforms' if call.is_transform else 'fits'}_{what}"
        setattr(self.counts, counter, getattr(self.counts, counter) + 1)

    # ---- what is known of data

    def _data_of(self, call: _Invocation) -> str | None:
        """Return the identity of what a method is given, or None."""
        if not call.args:
            return None
        columns = self._hint.steps[call.path].columns
        if columns is not None:
            # Cut out by the ColumnTransformer around it, whose data is known.
            whole = self._inside.get(call.path.rpartition("__")[0])
            return None if whole is None else derived(whole, columns)
        known = self._data.get(id(call.args[0]))
        if known is None or known[0]() is not call.args[0]:
            return None
        if self._is_fitted and id(call.args[0]) in self._parts:
            # A scorer may have changed the data that the next one gets.
            content = self._parts[id(call.args[0])]
            return known[1] if content is not None and content == content_or_none(call.args[0]) else None
        return known[1]

    def _note(self, value: Any, identity: str) -> None:
        if value is not None:
            self._data[id(value)] = (_reference_to(value), identity)

    def _noted(self, call: _Invocation, output: Any, identity: str) -> Any:
        """Return what a method returned; its identity is known if what the method got is still known."""
        if call.path in self._inside and output is not call.estimator:
            self._note(output, identity)
        return output

    def _noted_view(self, call: _Invocation, output: Any, identity: str) -> Any:
        """Return an output that is a part of the input: who changes it from here on changes both.

        In a container that is noticed, because each part is compared before and after. What comes after the steps of
        the pipeline itself is not compared: there only the output is followed on.
        """
        if "__" not in call.path:
            self._data.pop(id(call.args[0]), None)
        elif output is call.args[0]:
            # For the other parts of a FeatureUnion it is what it was.
            return output
        return self._noted(call, output, identity)

    def _forget_all(self) -> None:
        """Something is not what it seemed: from here on the task runs as if it were alone."""
        self._n_forgotten += 1
        self._data.clear()
        self._inside.clear()
        self._fitted.clear()

    def _run_unknown(self, call: _Invocation) -> Any:
        """Run a method of which nothing is known, or which may change what is known."""
        self._inside.pop(call.path, None)
        self._fitted.pop(call.path, None)
        for value in call.args:
            self._data.pop(id(value), None)
        return call.run()

    def _run_checked(self, call: _Invocation) -> Any:
        """Run a method; what is known stays known if the method leaves its input as it is."""
        is_inside = "__" in call.path
        is_container = any(path.startswith(f"{call.path}__") for path in self._hint.steps)
        if not is_inside and not is_container and call.method.name == "fit_transform":
            # Nobody else gets its input but a score of the training data: it is sooner forgotten than compared.
            self._data.pop(id(call.args[0]), None)
            return call.run()
        before = content_or_none(call.args)
        output = call.run()
        if before is None or content_or_none(call.args) != before:
            self._forget_all()
        return output

    # ---- the shelf

    @contextlib.contextmanager
    def _taken_or_claimed(self, name: str, kind: _Kind) -> Iterator[Effects | Verdict | None]:
        """Give what is on the shelf; None to who is to make it, while others wait; or why it is not worth sharing.

        Who fails, or keeps nothing, leaves word of it: the others must not try one after the other.
        """
        taken = self._taken(name, kind)
        if taken is not None:
            yield taken
            return
        with self._shelf.claim(name):
            taken = self._taken(name, kind)
            if taken is not None:
                yield taken
                return
            n_held = len(self.held)
            try:
                yield None
            finally:
                if not any(one.name == name for one in self.held[n_held:]):
                    self._shelf.put(name, pack(self._verdicts.get(kind, "failed")))

    def _taken(self, name: str, kind: _Kind) -> Effects | Verdict | None:
        started = time.perf_counter()
        try:
            found = self._shelf.take(name, mapped=self._mapped)
        except Exception:
            # It cannot be rebuilt from its pickle, or not be read: then it is made again.
            return self._verdicts.setdefault(kind, "never")
        if found is None:
            # Another thread of this process may have found something out meanwhile.
            return self._verdicts.get(kind)
        if isinstance(found, str):
            verdict: Verdict = found  # type: ignore[assignment]
            return verdict if verdict == "failed" else self._verdicts.setdefault(kind, verdict)
        taken = Effects(*found)
        self.counts.seconds_saved += taken.seconds - (time.perf_counter() - started)
        return taken

    def _keep(self, name: str, prefix: str, done: Effects, estimator: Any) -> bool:
        """Put a result on the shelf if that is going to save time; return whether it is there."""
        try:
            packed = pack(tuple(frozen(done)), without=estimator)
        except Exception:
            return False
        saved_s = (self._hint.uses[prefix] - 1) * (done.seconds - _seconds_to_take(packed))
        # Nobody but the driver knows what all tasks hold; a single one holds no more than all may.
        has_room = sum(one.nbytes for one in self.held) + packed.nbytes <= self._limit_nbytes
        is_worth = saved_s > _PUT_S + packed.nbytes * _PUT_BYTE_S and has_room
        if not is_worth or not self._shelf.put(name, packed):
            return False
        self.held.append(Held(name, prefix, packed.nbytes, done.seconds))
        return True


def _seconds_to_take(packed: Packed) -> float:
    n_pickled = len(packed.stream)
    return _TAKE_S + n_pickled * _TAKE_PICKLED_BYTE_S + (packed.nbytes - n_pickled) * _TAKE_MAPPED_BYTE_S


class _Method:
    """Stands for a method of one object, in its ``__dict__``."""

    def __init__(self, sharer: Sharer, estimator: Any, path: str, name: str) -> None:
        self.sharer = sharer
        self.estimator = estimator
        self.path = path
        self.name = name
        # scikit-learn looks at the signature of fit.
        functools.update_wrapper(self, getattr(type(estimator), name, None) or getattr(estimator, name), updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.sharer.answer(_Invocation(self, args, kwargs))

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the class's own method, which sees the object as it would be without us."""
        taken_out = _take_out(self.estimator)
        try:
            return getattr(self.estimator, self.name)(*args, **kwargs)
        finally:
            vars(self.estimator).update(taken_out)

    def __reduce__(self) -> Any:
        # Who keeps the method keeps one of the object's own.
        return getattr, (self.estimator, self.name)


_OVERRIDES: Final = ("fit", "fit_transform", TRANSFORM, CLONE, STATE)


def _take_out(estimator: Any) -> dict[str, Any]:
    attributes = getattr(estimator, "__dict__", {})
    found = {name: attributes.get(name) for name in _OVERRIDES}
    taken_out = {name: method for name, method in found.items() if isinstance(method, _Method)}
    for name in taken_out:
        attributes.pop(name, None)
    return taken_out


def _reference_to(value: Any) -> Callable[[], Any]:
    """Return what returns an object: weakly, so that a task holds no more data than without us."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def _all_inside(container: Any) -> Iterator[Any]:
    """Yield what is inside of a container, fitted or not, and inside of that."""
    for _, part in (*sklearn_inside.unfitted_parts_of(container), *sklearn_inside.fitted_parts_of(container)):
        yield part
        yield from _all_inside(part)


def _attributes(estimator: Any) -> dict[str, Any]:
    """Return what is an object's own, but for what scikit-learn puts there for a moment."""
    return {name: value for name, value in _without_ours(vars(estimator)).items() if name not in OF_CALLBACKS}


def _without_ours(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if not isinstance(value, _Method)}


def _are_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return before.keys() == after.keys() and all(after[name] is value for name, value in before.items())

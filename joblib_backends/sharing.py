"""Each prefix of a search's pipelines is fitted once. The only file that knows how scikit-learn works inside.

A search calls one function of scikit-learn for every candidate and fold: cut the fold out of X and y, set the
candidate's parameters, fit, score. We run that very function, with three things of ours in it:

- it cuts the fold through ``_Sharer.split``, so a fold is cut once;
- the pipeline's transformers answer ``fit_transform`` and ``transform`` by a result that is on the call's shelf
  (``data/shelf.py``), if there is one, or else put theirs there; all other code of the pipeline is scikit-learn's own;
- it writes tracebacks without the lines of this file.

::

    calling thread                                    where a task runs
    SharedFits.add: identities of its steps           _SharedFit: scikit-learn's function, with a _Sharer
    Ledger: which tasks have which in common           _Sharer: the step's own method, or what lies on the shelf
    SharedFits.wrap: the task with what it shares      result and counts, told apart again by SharedFits.finish

Identity. A fold is the content of X, y, indices, fit parameters and scikit-learn's configuration; a fitted step is its
class, all its attributes, and the data that it was fitted on; data is a fold, or what a fitted step made of data. So
nothing that was computed need be hashed, and equal values share, whoever made them. What flows through a pipeline is
followed by object: a step that gets anything else than the known data runs as if it were alone.

What is on the shelf is what fit has set, what it returned and what it warned of. Everyone who takes it has copies, also
of the data: no candidate reaches another.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import random
import sys
import time
import traceback
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import xxhash

from .config import Config
from .data.content import NoContentError, content_of
from .data.scope import memory_nbytes
from .data.shelf import Packed, Shelf, pack
from .data.store import default_store
from .errors import StoreError
from .prefixes import Held, Ledger, Prefixes
from .thread_safety import innermost, root_package
from .warned import Noted, noting, show_again

__all__ = ["Counts", "SharedFits", "is_fit_and_score"]

_MODULE: Final = "sklearn.model_selection._validation"
_FUNCTION: Final = "_fit_and_score"

#: What the function must name for us to know it: what is put into it, and what we rely on.
_NAMES_USED: Final = frozenset({"_safe_split", "format_exc", "set_params", "fit"})
_PARAMETERS_USED: Final = frozenset(
    {"estimator", "X", "y", "train", "test", "parameters", "fit_params", "return_estimator"}
)

#: Methods that a step answers from the shelf.
_FITS: Final = ("fit_transform", "fit")
_CLONE: Final = "__sklearn_clone__"
_OVERRIDES: Final = (*_FITS, "transform", _CLONE)

#: Attributes that a step has only while scikit-learn's callbacks run.
_OF_CALLBACKS: Final = frozenset({"_parent_callback_ctx", "_callback_fit_ctx", "_skl_callbacks_to_teardown"})

#: Seconds for a result to be put on the shelf and taken from it: for each, for each byte of its pickle, and for each
#: byte of its buffers, which are mapped (benchmarks/sharing.py, "shelf").
_PUT_S, _TAKE_S = 250e-6, 150e-6
_PUT_BYTE_S, _TAKE_PICKLED_BYTE_S, _TAKE_MAPPED_BYTE_S = 0.6e-9, 4e-9, 0.05e-9

#: Share of the machine's memory that may be held for others.
_MEMORY_FRACTION: Final = 0.1

#: A step that was not worth it is looked at again when it takes so many times longer.
_WORTH_ANOTHER_LOOK: Final = 3.0

#: Data whose content is remembered, so that each is hashed once a call: X and y of the call, and indices of folds.
_REMEMBERED: Final = 512
_REMEMBERED_LARGE: Final = 8
_LARGE_NBYTES: Final = 10_000_000

#: Values that nobody changes in place.
_ATOMS: Final = frozenset({int, float, complex, bool, str, bytes, type(None), type, FunctionType})


class _Step(NamedTuple):
    """A transformer of a candidate, as it is before it is fitted."""

    path: str
    #: What it is: class and attributes; None if that cannot be established.
    token: bytes | None
    #: The columns that it gets of what its ColumnTransformer gets; None where it gets all of it.
    columns: bytes | None
    inner: tuple[_Step, ...]
    #: Whether each inner step gets what the one before it made, and not all the same.
    is_chain: bool


class _Hint(NamedTuple):
    """What travels with a task: where its steps stand in the call."""

    fold: str
    steps: dict[str, tuple[bytes | None, bytes | None]]
    #: How many tasks have each of the prefixes that are worth keeping.
    uses: dict[str, int]


class _SharedCall(NamedTuple):
    """What all tasks of a call have in common."""

    key: str
    folders: tuple[str, ...]


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
        self.fits_run += other.fits_run
        self.fits_shared += other.fits_shared
        self.transforms_run += other.transforms_run
        self.transforms_shared += other.transforms_shared
        self.seconds_saved += other.seconds_saved


@dataclass
class _Counted:
    """A task's result on its way back, with what sharing did in it."""

    result: Any
    counts: Counts
    held: list[Held] = field(default_factory=list)


def _derived(*parts: str | bytes) -> str:
    """Return the identity of what follows from ``parts``."""
    whole = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
    return xxhash.xxh3_128_hexdigest(whole)


def is_fit_and_score(function: Callable[[], Any]) -> bool:
    """Return whether a batch begins with scikit-learn's function that fits and scores a candidate on a fold."""
    items = getattr(function, "items", None)
    if not items or _MODULE not in sys.modules:
        return False
    return _is_known(innermost(items[0][0]))


@functools.lru_cache(maxsize=8)
def _is_known(function: Any) -> bool:
    module = sys.modules.get(_MODULE)
    if module is None or function is not getattr(module, _FUNCTION, None):
        return False
    if isinstance(function, FunctionType) and function.__closure__ is None:
        parameters = set(inspect.signature(function).parameters)
        if parameters >= _PARAMETERS_USED and set(function.__code__.co_names) >= _NAMES_USED:
            return True
    _warn_once(f"{_MODULE}.{_FUNCTION} does not look as expected")
    return False


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(
        f"Common pipeline steps of a search are not shared: {problem}. A version of scikit-learn that is newer than "
        "this package? The search runs without; share_fits=False does the same, without this warning.",
        RuntimeWarning,
        stacklevel=2,
    )


# ---- in the calling thread: what the tasks of a call have in common


class SharedFits:
    """The prefixes that the tasks of one call share.

    Parameters
    ----------
    config : Config
        ``temp_folder`` and the limit ``share_fits_nbytes``.

    Raises
    ------
    StoreError
        If there is no place for a shelf.
    """

    def __init__(self, config: Config) -> None:
        limit = config.share_fits_nbytes
        self.ledger = Ledger(int(memory_nbytes() * _MEMORY_FRACTION) if limit is None else limit)
        self.counts = Counts()
        folders = tuple(default_store().make_folders(config.temp_folder))
        self._call = _SharedCall(uuid.uuid4().hex, folders)
        self._shelf = Shelf(folders)
        self._contents = _Contents()
        self._candidates: dict[bytes, tuple[_Step, ...]] = {}
        self._is_complete = False

    def __repr__(self) -> str:
        return f"<SharedFits {len(self._candidates)} candidates, {self.ledger!r}>"

    @classmethod
    def of_call(cls, config: Config, function: Callable[[], Any]) -> SharedFits | None:
        """Return what the tasks of a call share, or None if the first batch shows that they share nothing."""
        if not config.share_fits or not is_fit_and_score(function):
            return None
        estimator = _arguments(getattr(function, "items", [])[0]).get("estimator")
        if not _is_plain_pipeline(estimator):
            return None
        try:
            return cls(config)
        except (StoreError, OSError):
            # Nowhere to put anything; data that must be placed will say so.
            return None

    def add(self, function: Callable[[], Any]) -> list[TaskSteps | None]:
        """Note the tasks of a batch; return what each has that others may have too."""
        items: Sequence[Any] = getattr(function, "items", None) or []
        added = [self._steps_of_task(item) for item in items]
        for steps in added:
            if steps is not None:
                self.ledger.add(steps.prefixes)
        return added

    def all_are_known(self) -> None:
        """Note that every task of the call was added."""
        self._is_complete = True

    def _steps_of_task(self, item: Any) -> TaskSteps | None:
        if not _is_known(innermost(item[0])):
            return None
        try:
            given = _arguments(item)
            steps = self._steps_of_candidate(given["estimator"], given["parameters"])
            if not steps:
                return None
            return TaskSteps.of(self._fold(item[0], given), steps)
        except Exception:
            # Of the user's code, which will fail again where it is expected to; or what has no content.
            return None

    def _steps_of_candidate(self, estimator: Any, parameters: Mapping[str, Any] | None) -> tuple[_Step, ...]:
        """Return the transformers of an estimator with its parameters set; nothing of the estimator is changed."""
        if not _is_plain_pipeline(estimator):
            return ()
        try:
            candidate = content_of((type(estimator), vars(estimator), parameters))
        except NoContentError:
            # One step without an identity does not keep the others from having one.
            return steps_of(_with_parameters(estimator, parameters))
        known = self._candidates.get(candidate)
        if known is None:
            known = self._candidates[candidate] = steps_of(_with_parameters(estimator, parameters))
        return known

    def _fold(self, callee: Any, given: Mapping[str, Any]) -> str:
        """Return the identity of the data of a task: what is cut out of what, and what goes to ``fit`` with it."""
        configuration = content_of(getattr(callee, "config", None))
        parts = [self._contents.of(given[name]) for name in ("X", "y", "train", "test", "fit_params")]
        return _derived("fold", configuration, *parts)

    def prefixes_of(self, added: Sequence[TaskSteps | None]) -> Prefixes:
        """Return the prefixes of a batch."""
        return tuple(prefix for steps in added if steps is not None for prefix in steps.prefixes)

    def wrap(self, function: Any, added: Sequence[TaskSteps | None]) -> Any:
        """Return the batch with tasks that share what is in common; the given one is left as it is."""
        hints = [None if steps is None else self._hint(steps) for steps in added]
        if not any(hints):
            return function
        wrapped = copy.copy(function)
        wrapped.items = [
            item if hint is None else (_with_shared_fit(item[0], hint, self._call), *item[1:])
            for item, hint in zip(function.items, hints, strict=True)
        ]
        return wrapped

    def _hint(self, steps: TaskSteps) -> _Hint | None:
        at_least = 1 if self._is_complete else 2
        uses = {prefix: max(at_least, self.ledger.n_tasks(prefix)) for prefix in steps.prefixes}
        worth = steps.worth_keeping(uses)
        if not worth:
            return None
        by_path = {step.path: (step.token, step.columns) for step in _flat(steps.steps)}
        return _Hint(steps.fold, by_path, {prefix: uses[prefix] for prefix in (*worth, steps.fold)})

    def finish(self, added: Sequence[TaskSteps | None], results: Sequence[Any]) -> list[Any]:
        """Return the results of a batch as scikit-learn made them; delete what no task needs any more."""
        held: list[Held] = []
        plain = []
        for result in results:
            if isinstance(result, _Counted):
                self.counts.add(result.counts)
                held += result.held
                result = result.result
            plain.append(result)
        self._shelf.remove(self.ledger.finish(self.prefixes_of(added), held))
        return plain

    def figures(self) -> dict[str, Any]:
        """Return what is to be reported, by the names of the report."""
        return {**dataclasses.asdict(self.counts), "nbytes_shared": self.ledger.peak_nbytes}

    def close(self) -> None:
        """Delete everything; idempotent."""
        self._shelf.close()


@dataclass(frozen=True)
class TaskSteps:
    """The transformers of one task, and the identities of what fits them."""

    fold: str
    steps: tuple[_Step, ...]
    #: The fold, then of each step that has one the identity of the fitted step; outer ones before inner ones.
    prefixes: Prefixes
    #: Of each inner step's identity, that of the step around it.
    around: Mapping[str, str]

    @classmethod
    def of(cls, fold: str, steps: tuple[_Step, ...]) -> TaskSteps:
        """Follow the fold's training data through the steps."""
        prefixes, around = [fold], {}

        def follow(steps: tuple[_Step, ...], data: str | None, outer: str | None, is_chain: bool) -> str | None:
            for step in steps:
                given = data if data is None or step.columns is None else _derived(data, step.columns)
                fitted = None if given is None or step.token is None else _derived(given, step.token)
                if fitted is not None:
                    prefixes.append(fitted)
                    if outer is not None:
                        around[fitted] = outer
                follow(step.inner, given, fitted, step.is_chain)
                if is_chain:
                    data = fitted
            return data

        follow(steps, fold, None, True)
        return cls(fold, steps, tuple(dict.fromkeys(prefixes)), around)

    def worth_keeping(self, uses: Mapping[str, int]) -> list[str]:
        """Return the prefixes that more than one task has, without those that only come with the step around them."""
        return [
            prefix
            for prefix in self.prefixes[1:]
            if uses[prefix] > 1 and uses[prefix] > uses.get(self.around.get(prefix, ""), 1)
        ]


def _flat(steps: tuple[_Step, ...]) -> Iterator[_Step]:
    for step in steps:
        yield step
        yield from _flat(step.inner)


class _Contents:
    """Identities by object, for objects that many tasks of a call have: each is hashed once."""

    def __init__(self) -> None:
        # Held, or another object could have the address of one that is gone.
        self._known: OrderedDict[int, tuple[Any, bytes]] = OrderedDict()
        self._known_large: OrderedDict[int, tuple[Any, bytes]] = OrderedDict()

    def of(self, value: Any) -> bytes:
        for known in (self._known, self._known_large):
            if id(value) in known:
                known.move_to_end(id(value))
                return known[id(value)][1]
        try:
            content = content_of(value)
        except NoContentError:
            # The object itself, which stays what it is while the call holds it.
            content = f"object {id(value)}".encode()
        is_large = getattr(value, "nbytes", _LARGE_NBYTES) >= _LARGE_NBYTES
        known, n_kept = (self._known_large, _REMEMBERED_LARGE) if is_large else (self._known, _REMEMBERED)
        known[id(value)] = (value, content)
        if len(known) > n_kept:
            known.popitem(last=False)
        return content


def _arguments(item: Any) -> dict[str, Any]:
    callee, args, kwargs = item
    bound = inspect.signature(innermost(callee)).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _with_shared_fit(callee: Any, hint: _Hint, call: _SharedCall) -> Any:
    """Return what calls the function with shared fits, in scikit-learn's own wrapper if it has one."""
    shared = _SharedFit(innermost(callee), hint, call)
    if getattr(callee, "function", None) is not shared.function:
        return shared
    wrapper = copy.copy(callee)
    wrapper.function = shared
    return wrapper


# ---- what a candidate is made of


def _is_plain_pipeline(estimator: Any) -> bool:
    """Return whether an estimator is a Pipeline that leaves the caching to us: a subclass may do anything."""
    from sklearn.pipeline import Pipeline

    if type(estimator) is not Pipeline or estimator.memory is not None or len(estimator.steps) < 2:
        return False
    return not getattr(estimator, "_skl_callbacks", None)


def _with_parameters(estimator: Any, parameters: Mapping[str, Any] | None) -> Any:
    """Return a copy of an estimator with its parameters set, as scikit-learn's function will do it."""
    if parameters is None:
        return estimator
    from sklearn.base import clone

    return clone(estimator).set_params(**clone(parameters, safe=False))


def steps_of(estimator: Any) -> tuple[_Step, ...]:
    """Return the transformers of a pipeline before its last step, as far as they can be told from others."""
    if not _is_plain_pipeline(estimator) or _cuts_columns(estimator):
        return ()
    return _chain(estimator.steps[:-1], "")


def _chain(steps: Sequence[Any], prefix: str) -> tuple[_Step, ...]:
    found = []
    for name, transformer in steps:
        if transformer is None or isinstance(transformer, str):
            continue  # "passthrough"
        step = _step(f"{prefix}{name}", transformer)
        found.append(step)
        if step.token is None:
            # Nobody knows what data the later ones get.
            break
    return tuple(found)


def _step(path: str, transformer: Any, columns: bytes | None = None) -> _Step:
    token = None
    if _can_be_shared(transformer):
        with contextlib.suppress(NoContentError):
            token = content_of((type(transformer), vars(transformer)))
    return _Step(path, token, columns, _inner_steps(path, transformer), _is_pipeline(transformer))


def _can_be_shared(transformer: Any) -> bool:
    if not hasattr(transformer, "__dict__") or getattr(transformer, "_skl_callbacks", None):
        return False
    # One that caches what its steps do is not cached a second time.
    return hasattr(transformer, "transform") and not (_is_pipeline(transformer) and transformer.memory is not None)


def _inner_steps(path: str, transformer: Any) -> tuple[_Step, ...]:
    if _is_plain_pipeline(transformer):
        return _chain(transformer.steps, f"{path}__")
    return tuple(_step(f"{path}__{name}", inner, columns) for name, inner, columns in _parts(transformer))


def _parts(transformer: Any) -> Iterator[tuple[str, Any, bytes | None]]:
    """Yield name, transformer and columns of what is inside of those containers whose data can be followed."""
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import FeatureUnion

    parts: Sequence[Any] = ()
    if type(transformer) is ColumnTransformer:
        parts = transformer.transformers
    elif type(transformer) is FeatureUnion:
        parts = transformer.transformer_list
    elif _is_plain_pipeline(transformer):
        parts = transformer.steps
    for name, inner, *columns in parts:
        if inner is not None and not isinstance(inner, str):
            with contextlib.suppress(NoContentError):
                yield name, inner, content_of(columns) if columns else None


def _is_pipeline(transformer: Any) -> bool:
    from sklearn.pipeline import Pipeline

    return isinstance(transformer, Pipeline)


def _cuts_columns(estimator: Any) -> bool:
    """Return whether a fold is a part of the columns too, as that of a precomputed kernel is."""
    try:
        from sklearn.utils import get_tags
    except ImportError:  # scikit-learn 1.5
        return bool(estimator._get_tags()["pairwise"])
    return bool(get_tags(estimator).input_tags.pairwise)


# ---- where a task runs


class _Entry(NamedTuple):
    """What a method of a step did."""

    seconds: float
    noted: list[Noted]
    #: Attributes that it set, and names of those that it deleted.
    attributes: dict[str, Any]
    deleted: list[str]
    output: Any


class _SharedFit:
    """Stands for scikit-learn's function in a task that shares something."""

    def __init__(self, function: Any, hint: _Hint, call: _SharedCall) -> None:
        self.function = function
        self._hint = hint
        self._call = call
        self.__qualname__ = function.__qualname__
        self.__module__ = function.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> _Counted:
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        # Estimators that are given back live on: they must not hold files that are gone by name.
        sharer = _Sharer(self._hint, _Workplace.of(self._call), mapped=not bound.arguments["return_estimator"])
        estimator = bound.arguments["estimator"]
        sharer.replace(estimator, "", ("fit",))
        function = _with_globals(self.function, _safe_split=sharer.split, format_exc=_format_exc)
        try:
            return _Counted(function(*args, **kwargs), sharer.counts, sharer.held)
        finally:
            sharer.restore()


def _with_globals(function: Any, **replaced: Any) -> Any:
    """Return a function with the same code, for which some global names mean something else."""
    copied = FunctionType(function.__code__, {**function.__globals__, **replaced}, function.__name__)
    copied.__defaults__, copied.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copied


def _format_exc() -> str:
    """Return the traceback of the exception that is being handled, as it would be without this file."""
    error = sys.exc_info()[1]
    assert error is not None
    shown = traceback.TracebackException.from_exception(error)
    waiting: list[Any] = [shown]
    while waiting:
        one = waiting.pop()
        if one is not None:
            one.stack = traceback.StackSummary.from_list([f for f in one.stack if f.filename not in _OWN_FILES])
            waiting += [one.__cause__, one.__context__]
    return "".join(shown.format())


#: What stands in a traceback between scikit-learn's lines and those of a step.
_OWN_FILES: Final = frozenset({__file__, contextlib.__file__})


class _Workplace:
    """What a process keeps for the tasks of one call: the shelf, and which steps are not worth it."""

    _latest: ClassVar[OrderedDict[str, _Workplace]] = OrderedDict()
    _MAX_CALLS: ClassVar[int] = 4

    @classmethod
    def of(cls, call: _SharedCall) -> _Workplace:
        """Return that of a call. Two threads may make two at the same time: what one knows, the other finds out."""
        workplace = cls._latest.get(call.key)
        if workplace is None:
            workplace = cls._latest[call.key] = cls(call)
            while len(cls._latest) > cls._MAX_CALLS:
                with contextlib.suppress(KeyError):
                    cls._latest.popitem(last=False)
        return workplace

    def __init__(self, call: _SharedCall) -> None:
        self.shelf = Shelf(call.folders)
        #: Seconds that a method of a step took when it was not worth sharing; infinity where it cannot be shared.
        self.not_worth: dict[tuple[str, str, type], float] = {}


class _Sharer:
    """Runs the steps of one task, or takes from the shelf what they would do.

    Used by the task's own thread, and by those in which a FeatureUnion or ColumnTransformer runs its parts.
    """

    def __init__(self, hint: _Hint, workplace: _Workplace, *, mapped: bool) -> None:
        self.counts = Counts()
        self.held: list[Held] = []
        self._hint = hint
        self._shelf = workplace.shelf
        self._not_worth = workplace.not_worth
        self._mapped = mapped
        self._replaced: list[tuple[str, Any]] = []
        # Objects whose content has an identity. Held, or another could have the address of one that is gone.
        self._data: dict[int, tuple[Any, str]] = {}
        self._y: Any = None
        # What a container got, for the steps inside; and what a step was fitted on, with its attributes then.
        self._inside: dict[str, str] = {}
        self._fitted: dict[str, tuple[str, dict[str, Any]]] = {}

    # ---- the fold

    def split(self, estimator: Any, X: Any, y: Any, indices: Any, train_indices: Any = None) -> tuple[Any, Any]:  # noqa: N803
        """Cut the training or the test part of the fold, as ``_safe_split`` does."""
        from sklearn.utils.metaestimators import _safe_split

        is_train, fold = train_indices is None, self._hint.fold
        name = fold if is_train else _derived(fold, "test")

        def cut() -> _Entry:
            started = time.perf_counter()
            part = _safe_split(estimator, X, y, indices, train_indices)
            return _Entry(time.perf_counter() - started, [], {}, [], part)

        entry = self._taken(name)
        if entry is None:
            with self._shelf.claim(name):
                entry = self._taken(name)
                if entry is None:
                    entry = cut()
                    self._keep(name, fold, entry)
        part: tuple[Any, Any] = entry.output
        self._note(part[0], name)
        if is_train:
            self._y = part[1]
        return part

    # ---- in the place of methods

    def replace(self, estimator: Any, path: str, names: Sequence[str]) -> None:
        """Put ours in the place of some methods of one object."""
        for name in names:
            if hasattr(estimator, name):
                vars(estimator)[name] = _Method(self, estimator, path, name)
        self._replaced.append((path, estimator))

    def _replace_step(self, transformer: Any, path: str) -> None:
        if path not in self._hint.steps:
            return
        fit = next((name for name in _FITS if hasattr(transformer, name)), "fit")
        self.replace(transformer, path, (fit, "transform", _CLONE))
        for name, inner, _ in _parts(transformer):
            self._replace_step(inner, f"{path}__{name}")

    def restore(self, below: str = "") -> None:
        """Give the objects inside of a container, or all, their own methods back."""
        for path, estimator in self._replaced:
            if path.startswith(below):
                _take_out(estimator)
        self._replaced = [one for one in self._replaced if not one[0].startswith(below)]

    def call(self, method: _Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of a method that was replaced."""
        if not method.path:
            # The candidate itself: its parameters are set now, and its steps are those that will run.
            for name, transformer in method.estimator.steps[:-1]:
                self._replace_step(transformer, name)
            return method.run(args, kwargs)
        if method.name == _CLONE:
            # A ColumnTransformer fits clones: there it goes on.
            clone = method.run(args, kwargs)
            self._replace_step(clone, method.path)
            return clone
        if method.name == "transform":
            return self._transform(method, args, kwargs)
        return self._fit(method, args, kwargs)

    def _fit(self, method: _Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        token = self._hint.steps[method.path][0]
        data = self._data_of(method.path, args)
        if data is None or len(args) > 2 or (args[1] if len(args) == 2 else None) is not self._y:
            return self._run_unknown(method, args, kwargs)
        self._inside[method.path] = data
        if token is None:
            return self._run_checked(method, args, kwargs)
        fitted = _derived(data, token)
        output = self._shared(method, args, kwargs, fitted, fitted)
        if method.path in self._inside:
            self._fitted[method.path] = (fitted, _attributes(method.estimator))
        return method.estimator if method.name == "fit" else output

    def _transform(self, method: _Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        data = self._data_of(method.path, args)
        fitted, attributes = self._fitted.get(method.path, ("", {}))
        if data is None or kwargs or len(args) > 1 or not _are_same(attributes, _attributes(method.estimator)):
            return self._run_unknown(method, args, kwargs)
        self._inside[method.path] = data
        return self._shared(method, args, kwargs, fitted, _derived(fitted, data))

    def _shared(self, method: _Method, args: tuple[Any, ...], kwargs: dict[str, Any], fitted: str, name: str) -> Any:
        """Take what a method would do from the shelf, or run it, and put on the shelf what it does."""
        if fitted not in self._hint.uses:
            output = self._run_checked(method, args, kwargs)
            self._note_if_known(method, output, name)
            return output
        kind = (method.path, method.name, type(method.estimator))
        if kind in self._not_worth:
            return self._run_not_worth(method, args, kwargs, kind, name)
        entry = self._taken(name)
        if entry is None:
            with self._shelf.claim(name):
                entry = self._taken(name)
                if entry is None:
                    return self._run_and_keep(method, args, kwargs, kind, fitted, name)
        self._count(method, shared=True)
        return self._apply(method, entry, name)

    def _run_and_keep(
        self,
        method: _Method,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: tuple[str, str, type],
        fitted: str,
        name: str,
    ) -> Any:
        self._count(method, shared=False)
        entry, output = self._observed(method, args, kwargs)
        if entry is None:
            self._not_worth[kind] = float("inf")
            self._forget_all()
            return output
        self._note(output, name)
        if not self._keep(name, fitted, entry):
            self._not_worth[kind] = entry.seconds
        return output

    def _run_not_worth(
        self, method: _Method, args: tuple[Any, ...], kwargs: dict[str, Any], kind: tuple[str, str, type], name: str
    ) -> Any:
        limit_s = self._not_worth[kind]
        if limit_s == float("inf"):
            return self._run_unknown(method, args, kwargs)
        self._count(method, shared=False)
        started = time.perf_counter()
        output = self._run_checked(method, args, kwargs)
        if time.perf_counter() - started > _WORTH_ANOTHER_LOOK * limit_s:
            self._not_worth.pop(kind, None)
        self._note_if_known(method, output, name)
        return output

    def _apply(self, method: _Method, entry: _Entry, name: str) -> Any:
        """Do what a method did."""
        attributes = vars(method.estimator)
        for deleted in entry.deleted:
            attributes.pop(deleted, None)
        attributes.update(entry.attributes)
        show_again(entry.noted)
        self._note(entry.output, name)
        return entry.output

    def _count(self, method: _Method, *, shared: bool) -> None:
        what = "transforms" if method.name == "transform" else "fits"
        counter = f"{what}_{'shared' if shared else 'run'}"
        setattr(self.counts, counter, getattr(self.counts, counter) + 1)

    # ---- what is known of data

    def _data_of(self, path: str, args: tuple[Any, ...]) -> str | None:
        """Return the identity of what a step is given, or None."""
        if not args:
            return None
        columns = self._hint.steps[path][1]
        if columns is not None:
            # Cut out by the ColumnTransformer around it, whose data is known.
            whole = self._inside.get(path.rpartition("__")[0])
            return None if whole is None else _derived(whole, columns)
        known = self._data.get(id(args[0]))
        return None if known is None else known[1]

    def _note(self, value: Any, identity: str) -> None:
        if value is not None:
            self._data[id(value)] = (value, identity)

    def _note_if_known(self, method: _Method, output: Any, identity: str) -> None:
        if method.path in self._inside:
            self._note(output, identity)

    def _forget_all(self) -> None:
        """Something changed its input, or is not what it seems: from here on the task runs as if it were alone."""
        self._data.clear()
        self._inside.clear()
        self._fitted.clear()

    # ---- ways to run a method

    def _run_unknown(self, method: _Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method on data of which nothing is known, or afterwards nothing must be known."""
        self._inside.pop(method.path, None)
        self._fitted.pop(method.path, None)
        for value in args:
            self._data.pop(id(value), None)
        return method.run(args, kwargs)

    def _run_checked(self, method: _Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method; what is known stays known if the method leaves its input as it is."""
        if "__" not in method.path and not any(path.startswith(f"{method.path}__") for path in self._hint.steps):
            # Nobody else gets the input of a step of the pipeline itself, but a score of the training data.
            self._data.pop(id(args[0]), None)
            return method.run(args, kwargs)
        before = _content_or_none(args)
        output = method.run(args, kwargs)
        if before is None or _content_or_none(args) != before:
            self._forget_all()
        return output

    def _observed(self, method: _Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Entry | None, Any]:
        """Run a method; return what it did, or None if a copy of that would not do the same, and its output."""
        estimator = method.estimator
        inputs, generators = _content_or_none(args), _generators_drawn_from(estimator)
        attributes = _attributes(estimator)
        contents = {
            name: _content_or_none(value) for name, value in attributes.items() if type(value) not in _ATOMS
        }
        with noting() as noted:
            started = time.perf_counter()
            output = method.run(args, kwargs)
            seconds = time.perf_counter() - started
        if inputs is None or _content_or_none(args) != inputs or _generators_drawn_from(estimator) != generators:
            return None, output
        self.restore(below=f"{method.path}__")
        after = _attributes(estimator)
        changed = {
            name: value
            for name, value in after.items()
            if name not in attributes
            or value is not attributes[name]
            or (contents.get(name) is not None and contents[name] != _content_or_none(value))
        }
        deleted = [name for name in attributes if name not in after]
        if method.name == "transform" and (changed or deleted):
            return None, output
        return _Entry(seconds, noted, changed, deleted, None if output is estimator else output), output

    # ---- the shelf

    def _taken(self, name: str) -> _Entry | None:
        started = time.perf_counter()
        try:
            found = self._shelf.take(name, mapped=self._mapped)
        except Exception:
            # It cannot be rebuilt from its pickle, or not be read: then it is made again.
            return None
        if found is None:
            return None
        entry = _Entry(*found)
        self.counts.seconds_saved += entry.seconds - (time.perf_counter() - started)
        return entry

    def _keep(self, name: str, prefix: str, entry: _Entry) -> bool:
        """Put a result on the shelf if that is going to save time; return whether it was."""
        try:
            packed = pack(tuple(entry))
        except Exception:
            return False
        n_others = self._hint.uses[prefix] - 1
        if n_others * (entry.seconds - _seconds_to_take(packed)) <= _PUT_S + packed.nbytes * _PUT_BYTE_S:
            return False
        if not self._shelf.put(name, packed):
            return False
        self.held.append(Held(name, prefix, packed.nbytes, entry.seconds))
        return True


class _Method:
    """Stands for a method of one object, in its ``__dict__``."""

    def __init__(self, sharer: _Sharer, estimator: Any, path: str, name: str) -> None:
        self.sharer = sharer
        self.estimator = estimator
        self.path = path
        self.name = name
        # scikit-learn looks at the signature of fit.
        functools.update_wrapper(self, getattr(type(estimator), name, None) or getattr(estimator, name), updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.sharer.call(self, args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the class's own method, which sees the object as it would be without us."""
        taken = _take_out(self.estimator)
        try:
            return getattr(self.estimator, self.name)(*args, **kwargs)
        finally:
            vars(self.estimator).update(taken)

    def __reduce__(self) -> Any:
        # A copy of the object gets its own method, also in another process.
        return getattr, (self.estimator, self.name)


def _take_out(estimator: Any) -> dict[str, Any]:
    attributes = vars(estimator)
    return {name: attributes.pop(name) for name in _OVERRIDES if isinstance(attributes.get(name), _Method)}


def _attributes(estimator: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(estimator).items()
        if name not in _OF_CALLBACKS and not isinstance(value, _Method)
    }


def _are_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return before.keys() == after.keys() and all(after[name] is value for name, value in before.items())


def _content_or_none(value: Any) -> bytes | None:
    try:
        return content_of(value)
    except NoContentError:
        return None


def _generators_drawn_from(estimator: Any) -> bytes | None:
    """Return the state of the global random generators where code of others may draw from them unseen.

    Who has a parameter random_state says so: None means another draw at each fit, and once is as good as often.
    """
    if root_package(type(estimator)) == "sklearn" or hasattr(estimator, "random_state"):
        return None
    return content_of((np.random.get_state(), random.getstate()))


def _seconds_to_take(packed: Packed) -> float:
    n_pickled = len(packed.stream)
    return _TAKE_S + n_pickled * _TAKE_PICKLED_BYTE_S + (packed.nbytes - n_pickled) * _TAKE_MAPPED_BYTE_S

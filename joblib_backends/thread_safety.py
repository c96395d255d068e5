"""Which code may run on threads: decided by reading a task, never by running it.

Threads share global state, so ``np.random.seed(i)`` in a user's task gives silently wrong numbers there.
A task is trusted when its function is scikit-learn's own (scikit-learn tests itself under threads) and
everything reachable from its arguments comes from scikit-learn or from data libraries, or when the user
marked the function with :func:`thread_safe`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final, TypeVar

__all__ = ["TrustCheck", "innermost", "may_run_on_threads", "root_package", "thread_safe"]

_F = TypeVar("_F", bound=Callable[..., Any])
_MARK: Final = "__joblib_backends_thread_safe__"

#: Where functions and estimators may come from, and where plain values may come from.
_TRUSTED_CODE: Final = frozenset({"sklearn"})
_TRUSTED_DATA: Final = frozenset(
    {"builtins", "numpy", "scipy", "pandas", "pyarrow", "polars", "collections", "datetime", "decimal",
     "fractions", "functools", "operator", "re", "_thread", "threading", "inspect", "types", "uuid", "pathlib",
     "joblib_backends"}
)  # fmt: skip

#: A live random generator is consumed in the order in which tasks run, which threads do not fix.
_RANDOM_GENERATORS: Final = frozenset({"RandomState", "Generator", "BitGenerator"})

#: liblinear and libsvm draw from one random generator of the process (scikit-learn's newrand.h, `mt_rand`)
#: with the GIL released: two fits at once take each other's numbers. Measured on 4 threads: LinearSVC(dual=True)
#: and liblinear's l1 gave other coefficients in 5 to 40 of 40 fits, SVC(probability=True) in 32 of 32.
_USE_LIBLINEAR: Final = frozenset({"LinearSVC", "LinearSVR"})
_LIBLINEAR: Final = "liblinear"

#: Types whose values are nothing but themselves. By identity: not every class can be hashed.
_NUMBERS: Final = frozenset(map(id, (int, float, bool, complex, bytes, type(None))))

#: Objects looked at per task before giving up; a deeper structure is sent to processes instead.
_MAX_OBJECTS: Final = 20_000


def thread_safe(function: _F) -> _F:
    """Mark ``function`` as safe to run on threads, so that ``tier="auto"`` may put it there.

    Use it for code that releases the GIL and keeps no global state. The mark stays on this process' function
    object and costs nothing at run time.

    Examples
    --------
    >>> import joblib_backends
    >>> @joblib_backends.thread_safe
    ... def total(a):
    ...     return a.sum()
    """
    setattr(function, _MARK, True)
    return function


Task = tuple[Any, tuple[Any, ...], dict[str, Any]]


def may_run_on_threads(items: Iterable[Task]) -> bool:
    """Return whether every task of ``items`` (function, args, kwargs) may run beside others in a process."""
    return TrustCheck().allows(items)


class TrustCheck:
    """Looks at the tasks of one call. What the first task shares with the others is looked at once: 300 µs of 350."""

    def __init__(self) -> None:
        # Held, or an object that comes later could have the identity of one that is gone.
        self._of_first: dict[int, Any] = {}

    def allows(self, items: Iterable[Task]) -> bool:
        """Return whether every task of ``items`` may run beside others in a process."""
        return all(_is_marked(task[0]) or self._trusts(task) for task in items)

    def _trusts(self, task: Task) -> bool:
        walk = _Walk(self._of_first)
        trusted = walk.trusts(task)
        if trusted and not self._of_first:
            # No data: it would live as long as the call, and is looked at in no time.
            kept = (FunctionType, BuiltinFunctionType, type, ModuleType)
            self._of_first = {
                key: value
                for key, value in walk.seen.items()
                if isinstance(value, kept) or root_package(type(value)) in _TRUSTED_CODE
            }
        return trusted


def _is_marked(function: Any) -> bool:
    return bool(getattr(innermost(function), _MARK, False))


def innermost(function: Any) -> Any:
    """Return what a wrapper calls: scikit-learn's `_FuncWrapper`, partials and bound methods."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, MethodType):
            function = function.__func__
        elif callable(getattr(function, "function", None)) and root_package(type(function)) in _TRUSTED_CODE:
            function = function.function
        else:
            return function


class _Walk:
    """One look through everything that a task can reach; each object once."""

    def __init__(self, known: Mapping[int, Any]) -> None:
        self._known = known
        self.seen: dict[int, Any] = {}

    def trusts(self, task: Task) -> bool:
        if root_package(innermost(task[0])) not in _TRUSTED_CODE:
            return False
        pending: list[Any] = list(task)
        while pending:
            value = pending.pop()
            if id(type(value)) in _NUMBERS or id(value) in self.seen or id(value) in self._known:
                continue
            if len(self.seen) >= _MAX_OBJECTS or not _trusts_alone(value):
                return False
            self.seen[id(value)] = value
            pending.extend(_parts(value))
        return True


def _trusts_alone(value: Any) -> bool:
    """Return whether ``value`` is trusted when its parts are."""
    if isinstance(value, str):
        # A solver's name may stand in a search's parameters, and not yet in an estimator.
        return value != _LIBLINEAR
    if isinstance(value, dict):
        return not any(_is_probability(name) and value[name] is not False for name in value)
    if isinstance(value, FunctionType | BuiltinFunctionType | type | ModuleType):
        return root_package(value) in _TRUSTED_CODE | _TRUSTED_DATA
    root = _root_of_type(type(value))
    return not _draws_from_process_generator(value) if root in _TRUSTED_CODE else root in _TRUSTED_DATA


#: Packages of trusted types, looked up for each object of each task; types of others would live as long as this.
_known_roots: Final[dict[type, str]] = {}


def _root_of_type(kind: type) -> str:
    """Return the package of a type, "" for random generators."""
    try:
        return _known_roots[kind]
    except (KeyError, TypeError):  # not every class can be hashed
        pass
    # Also by their bases: what users hold is a PCG64, not a BitGenerator.
    if any(base.__name__ in _RANDOM_GENERATORS and root_package(base) == "numpy" for base in kind.__mro__):
        return ""
    root = root_package(kind)
    if root in _TRUSTED_CODE:
        _known_roots[kind] = root
    return root


def _draws_from_process_generator(estimator: Any) -> bool:
    name = type(estimator).__name__
    return (
        name in _USE_LIBLINEAR
        or (name == "CalibratedClassifierCV" and estimator.estimator is None)  # its default is LinearSVC
        or getattr(estimator, "probability", False) is True
    )


def _is_probability(name: Any) -> bool:
    return isinstance(name, str) and name.rpartition("__")[2] == "probability"


def _parts(value: Any) -> Iterable[Any]:
    """Return what else must be looked at; arrays, frames and text are data and end the walk."""
    if isinstance(value, dict):
        # Keys of real dicts are names or data; a parameter grid may well have a function among its values.
        return value.values()
    if isinstance(value, list | tuple | set | frozenset):
        return () if _is_plain_data(value) else value
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if not isinstance(value, type) and _root_of_type(type(value)) in _TRUSTED_CODE:
        return getattr(value, "__dict__", {}).values()
    return ()


def _is_plain_data(values: Any) -> bool:
    """Return whether a long sequence is data: a million words are not looked at one by one twice."""
    return len(values) > 64 and {type(value) for value in values} <= {int, float, str, bytes, bool, type(None)}


def root_package(value: Any) -> str:
    """Return the top-level package where ``value`` (a function, class or module) is defined."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    if name is None:
        # Methods of builtin types and C functions without a module, such as those of math in old versions.
        name = getattr(type(getattr(value, "__self__", value)), "__module__", None) or ""
    return str(name).partition(".")[0]

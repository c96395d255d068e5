"""What we know of scikit-learn's inside. No other file of ours does.

scikit-learn is imported by who has one of its objects already: nothing here imports it before.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import numbers
import reprlib
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FunctionType
from typing import Any, Final, NamedTuple

from ..thread_safety import innermost, root_package

__all__ = [
    "CLONE",
    "NOT_OF_RESULT",
    "OF_CALLBACKS",
    "TRANSFORM",
    "arguments_of",
    "calling_instead",
    "can_be_followed",
    "can_be_shared",
    "configuration_of",
    "cut_fold",
    "cuts_columns",
    "description_of",
    "estimator_of",
    "failed_result",
    "fit_name",
    "fitted_parts_of",
    "format_exc_without",
    "has_callbacks",
    "is_fit_and_score",
    "is_own_scorer",
    "is_plain_pipeline",
    "is_seeded",
    "parts_of",
    "search_of",
    "transformers_of",
    "transforms_metadata",
    "unfitted_parts_of",
    "with_globals",
    "with_parameters",
]

_MODULE: Final = "sklearn.model_selection._validation"
_FUNCTION: Final = "_fit_and_score"

#: What that function must name for us to know it: what is put in the place of its own, and what we rely on.
_NAMES_USED: Final = frozenset({"_safe_split", "format_exc", "set_params", "fit"})
_PARAMETERS_USED: Final = frozenset(
    {"estimator", "X", "y", "train", "test", "parameters", "fit_params", "return_estimator"}
)

#: Arguments that print, tell callbacks, or concern ``fit`` and ``score`` alone.
_SIDE_EFFECTS: Final = frozenset({"verbose", "callback_ctx", "fit_params", "score_params"})

#: Arguments that do not change the result: how far the search is, what it prints, who is told.
NOT_OF_RESULT: Final = frozenset({"split_progress", "candidate_progress", "verbose", "caller", "callback_ctx"})

#: How a pipeline fits a transformer: by the first of these that it has.
_FITS: Final = ("fit_transform", "fit")
TRANSFORM: Final = "transform"

#: What ``clone`` asks an object for.
CLONE: Final = "__sklearn_clone__"

#: Attributes that a step has only while scikit-learn's callbacks run.
OF_CALLBACKS: Final = frozenset(
    {"_parent_callback_ctx", "_callback_fit_ctx", "_skl_callbacks", "_skl_callbacks_to_teardown"}
)


# ---- the function that fits and scores


def is_fit_and_score(callee: Any) -> bool:
    """Return whether a task calls scikit-learn's function that fits and scores a candidate on a fold.

    It is known by its name, its parameters and the names in its code. One that does not look as expected is not known,
    and warned of once.
    """
    function = innermost(callee)
    return getattr(function, "__name__", None) == _FUNCTION and _is_known(function)


@functools.lru_cache(maxsize=8)
def _is_known(function: Any) -> bool:
    if function is not getattr(sys.modules.get(_MODULE), _FUNCTION, None):
        return False
    if isinstance(function, FunctionType) and function.__closure__ is None:
        parameters = set(inspect.signature(function).parameters)
        if parameters >= _PARAMETERS_USED and set(function.__code__.co_names) >= _NAMES_USED:
            return True
    warnings.warn(
        f"Common pipeline steps of searches are not shared: {_MODULE}.{_FUNCTION} does not look as expected. "
        "Is scikit-learn newer than this package? Searches run as without sharing; share_fits=False ends this warning.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def arguments_of(callee: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a task by name, defaults included."""
    bound = inspect.signature(innermost(callee)).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def configuration_of(callee: Any) -> Any:
    """Return scikit-learn's configuration with which a task will run, or None for that of wherever it runs."""
    return getattr(callee, "config", None)


def calling_instead(callee: Any, function: Callable[..., Any]) -> Any:
    """Return what calls ``function`` as ``callee`` calls scikit-learn's: with its configuration and warning filters."""
    if getattr(callee, "function", None) is not innermost(callee):
        return function
    wrapper = copy.copy(callee)
    wrapper.function = function
    return wrapper


def with_globals(function: Any, cut: Callable[..., Any], format_exc: Callable[[], str]) -> Any:
    """Return the function with the same code, which cuts folds and writes tracebacks by functions of ours."""
    names = {**function.__globals__, "_safe_split": cut, "format_exc": format_exc}
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def format_exc_without(files: Collection[str]) -> str:
    """Return the traceback of the exception that is being handled, without the lines of some files."""
    error = sys.exc_info()[1]
    assert error is not None
    shown = traceback.TracebackException.from_exception(error)
    waiting: list[Any] = [shown]
    while waiting:
        one = waiting.pop()
        if one is not None:
            one.stack = traceback.StackSummary.from_list([line for line in one.stack if line.filename not in files])
            waiting += [one.__cause__, one.__context__]
    return "".join(shown.format())


def cut_fold(estimator: Any, X: Any, y: Any, indices: Any, train_indices: Any) -> tuple[Any, Any]:  # noqa: N803
    """Return the part of X and y at ``indices``, as the function would."""
    from sklearn.utils.metaestimators import _safe_split

    part: tuple[Any, Any] = _safe_split(estimator, X, y, indices, train_indices)
    return part


def description_of(callee: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Return which candidate and fold a task is, for messages; None if it is no task of a search."""
    if not is_fit_and_score(callee):
        return None
    try:
        given = arguments_of(callee, args, kwargs)
        # reprlib: a __repr__ that raises must not take the place of what is to be said.
        chosen = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in (given["parameters"] or {}).items())
    except (TypeError, AttributeError, KeyError):
        # Arguments that the function refuses: what it says of them is for the user to see.
        return None
    parts = [f"candidate {chosen}"] if chosen else []
    if given.get("split_progress") is not None:
        place, n_folds = given["split_progress"]
        parts.append(f"fold {place + 1} of {n_folds}")
    return ", ".join(parts) or type(given["estimator"]).__name__


def estimator_of(callee: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any | None:
    """Return the estimator that a task is about, in scikit-learn's own functions the first argument; None without."""
    first = args[0] if args else kwargs.get("estimator")
    return first if hasattr(type(first), "get_params") else None


class Search(NamedTuple):
    """What a task says of the search that it belongs to."""

    #: The search; None if the version of scikit-learn does not tell, or it is a cross-validation.
    caller: Any
    #: Candidates times folds; None where nobody counts them.
    n_fits: int | None


def search_of(callee: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Search | None:
    """Return the search, or cross-validation, of a task; None if it is no task of one."""
    if not is_fit_and_score(callee):
        return None
    given = arguments_of(callee, args, kwargs)
    places = [given.get(name) for name in ("split_progress", "candidate_progress")]
    n_fits = None if None in places else places[0][1] * places[1][1]  # type: ignore[index]
    return Search(given.get("caller"), n_fits)


def failed_result(callee: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: BaseException) -> Any | None:
    """Return what the function would return had ``fit`` raised ``error``; None if it would raise it, too.

    Its own code decides: it runs with an estimator that does nothing else.
    """
    if not is_fit_and_score(callee):
        return None
    given = arguments_of(callee, args, kwargs)
    if not isinstance(given["error_score"], numbers.Number):
        return None
    function = with_globals(
        innermost(callee),
        # Of the parts of the data only the length is asked.
        lambda estimator, X, y, indices, train=None: (indices, None),  # noqa: N803
        lambda: f"{type(error).__name__}: {error}\n",
    )
    silent = {name: 0 if name == "verbose" else None for name in _SIDE_EFFECTS & given.keys()}
    result = function(**{**given, **silent, "estimator": _Failing(error)})
    if "estimator" in result:
        result["estimator"] = given["estimator"]
    return result


def is_seeded(estimator: Any, parameters: Mapping[str, Any] | None) -> bool:
    """Return whether every random state in an estimator, with its parameters set, is given.

    An estimator of others than scikit-learn that has none may draw from the global generators.
    """
    given = {**estimator.get_params(deep=True), **(parameters or {})}
    parts = [estimator, *(value for value in given.values() if hasattr(value, "get_params"))]
    nested = [part.get_params(deep=True) for part in parts[1:]]
    states = (value for one in (given, *nested) for name, value in one.items() if name.endswith("random_state"))
    is_known = all(root_package(type(part)) == "sklearn" or hasattr(part, "random_state") for part in parts)
    return is_known and all(state is not None for state in states)


class _Failing:
    """Stands for an estimator whose fit was lost."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def set_params(self, **parameters: Any) -> _Failing:
        return self

    def fit(self, *args: Any, **kwargs: Any) -> None:
        raise self._error


def is_own_scorer(scorer: Any) -> bool:
    """Return whether scikit-learn itself scores, so that the data stays as it is."""
    scorers = (getattr(scorer, "_scorers", None) or {"score": scorer}).values()
    return all(
        root_package(type(one)) == "sklearn" and root_package(getattr(one, "_score_func", one)) == "sklearn"
        for one in scorers
    )


def cuts_columns(estimator: Any) -> bool:
    """Return whether a fold is a part of the columns too, as that of a precomputed kernel is."""
    try:
        from sklearn.utils import get_tags
    except ImportError:  # scikit-learn 1.5
        return bool(estimator._get_tags()["pairwise"])
    return bool(get_tags(estimator).input_tags.pairwise)


# ---- pipelines and what is in them


def is_plain_pipeline(estimator: Any) -> bool:
    """Return whether an estimator is a Pipeline that leaves the caching to us. A subclass may do anything."""
    from sklearn.pipeline import Pipeline

    return type(estimator) is Pipeline and estimator.memory is None and not has_callbacks(estimator)


def times_of(result: Any) -> tuple[float, float] | None:
    """Return the seconds of fit and score in what scikit-learn's function to fit and score returned; None of others."""
    if type(result) is not dict:
        return None
    times = result.get("fit_time"), result.get("score_time")
    # cross_validate, as a task, returns arrays by these names.
    if not all(isinstance(one, float | int) and 0.0 <= one < math.inf for one in times):
        return None
    return float(times[0]), float(times[1])  # type: ignore[arg-type]


def has_callbacks(estimator: Any) -> bool:
    """Return whether somebody is to be told of each fit."""
    return bool(getattr(estimator, "_skl_callbacks", None))


def with_parameters(estimator: Any, parameters: Mapping[str, Any] | None) -> Any:
    """Return an estimator with parameters set, as the function will do it; the given one stays as it is."""
    if parameters is None:
        return estimator
    from sklearn.base import clone

    return clone(estimator).set_params(**clone(parameters, safe=False))


def transformers_of(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and transformer of the steps before the last, but for those that pass everything through."""
    for name, transformer in pipeline.steps[:-1]:
        if not _is_no_transformer(transformer):
            yield name, transformer


def parts_of(transformer: Any) -> tuple[bool, list[tuple[str, Any, list[Any]]]]:
    """Return what is inside of a container whose data can be followed.

    Returns
    -------
    is_chain : bool
        Whether each part gets what the one before it made; else all get what the container gets.
    parts : list of (str, transformer, list)
        The list holds the columns that a part of a ColumnTransformer gets; else it is empty.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import FeatureUnion

    is_chain, parts = False, []
    if type(transformer) is ColumnTransformer:
        parts = transformer.transformers
    elif type(transformer) is FeatureUnion:
        parts = transformer.transformer_list
    elif is_plain_pipeline(transformer):
        is_chain, parts = True, transformer.steps
    return is_chain, [(name, part, columns) for name, part, *columns in parts if not _is_no_transformer(part)]


def unfitted_parts_of(transformer: Any) -> list[tuple[str, Any]]:
    """Return names and transformers of what was given to a container, or to the candidate itself."""
    return [(name, part) for name, part, _ in parts_of(transformer)[1]]


def fitted_parts_of(transformer: Any) -> list[tuple[str, Any]]:
    """Return names and transformers of what is inside of a container that was fitted."""
    parts = parts_of(transformer)[1]
    if hasattr(transformer, "transformers_"):
        # A ColumnTransformer fits clones.
        given = {name for name, *_ in parts}
        fitted = transformer.transformers_
        return [(name, part) for name, part, _ in fitted if name in given and not _is_no_transformer(part)]
    return unfitted_parts_of(transformer)


def _is_no_transformer(step: Any) -> bool:
    return step is None or isinstance(step, str)  # "passthrough", "drop"


def can_be_followed(transformer: Any) -> bool:
    """Return whether a step keeps all its state where we see it, and is an object of its own in each candidate."""
    from sklearn.base import BaseEstimator

    kind = type(transformer)
    if not hasattr(transformer, "__dict__") or not hasattr(transformer, TRANSFORM):
        return False
    if any(base.__dict__.get("__slots__") for base in kind.__mro__):
        return False
    # FrozenEstimator, say, is its own clone.
    return getattr(kind, CLONE, None) in (None, getattr(BaseEstimator, CLONE, None))


def can_be_shared(transformer: Any) -> bool:
    """Return whether nobody would miss a fit: who caches it already, is to be told of it, or reads what it prints."""
    from sklearn.pipeline import Pipeline

    get_params = getattr(transformer, "get_params", None)
    parameters = get_params(deep=True) if callable(get_params) else {}
    if any(value for name, value in parameters.items() if name.rpartition("__")[2] == "verbose"):
        return False
    parts = (transformer, *parameters.values())
    return not any(has_callbacks(part) or (isinstance(part, Pipeline) and part.memory is not None) for part in parts)


def transforms_metadata(pipeline: Any) -> bool:
    """Return whether what goes to ``fit`` beside X and y passes through the steps too."""
    return getattr(pipeline, "transform_input", None) is not None


def fit_name(transformer: Any) -> str:
    """Return the method by which a pipeline fits a transformer."""
    return next((name for name in _FITS if hasattr(transformer, name)), _FITS[-1])

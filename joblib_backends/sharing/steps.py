"""Which transformers a candidate has, and the identity of what each of them makes of the data of a fold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..data.content import NoContentError, content_of
from ..data.hashing import digest_of
from .ledger import Prefixes
from .sklearn_inside import (
    can_be_followed,
    can_be_shared,
    cuts_columns,
    is_plain_pipeline,
    parts_of,
    transformers_of,
    transforms_metadata,
)

__all__ = ["Step", "TaskSteps", "all_steps", "derived", "steps_of"]


class Step(NamedTuple):
    """A transformer of a candidate, before it is fitted."""

    path: str
    #: What it is, class and attributes; None if that cannot be established.
    token: bytes | None
    #: The columns that it gets of what its ColumnTransformer gets; None where it gets all of it.
    columns: bytes | None
    inner: tuple[Step, ...]
    #: Whether each inner step gets what the one before it made, and not all the same.
    is_chain: bool


def derived(*parts: str | bytes) -> str:
    """Return the identity of what follows from ``parts``."""
    whole = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
    return digest_of(whole).hex()


def steps_of(estimator: Any, *, by_place: bool = False) -> tuple[Step, ...]:
    """Return the transformers of a pipeline before its last step, as far as they can be told from others.

    ``by_place`` makes the place of a step a part of what it is: where fit gets more than X and y, it depends on that.
    """
    if not is_plain_pipeline(estimator) or transforms_metadata(estimator) or cuts_columns(estimator):
        return ()
    steps = _chain(_step(name, transformer) for name, transformer in transformers_of(estimator))
    return tuple(map(_placed, steps)) if by_place else steps


def _placed(step: Step) -> Step:
    token = None if step.token is None else derived(step.path, step.token).encode()
    return step._replace(token=token, inner=tuple(map(_placed, step.inner)))


def _chain(steps: Iterator[Step | None]) -> tuple[Step, ...]:
    found = []
    for step in steps:
        if step is None:
            break
        found.append(step)
        if step.token is None:
            # Nobody knows what data the later ones get.
            break
    return tuple(found)


def _step(path: str, transformer: Any, columns: bytes | None = None) -> Step | None:
    if not can_be_followed(transformer):
        return None
    token = None
    if can_be_shared(transformer):
        with contextlib.suppress(NoContentError):
            token = content_of(transformer)
    is_chain, _ = parts_of(transformer)
    inner = _inner_steps(path, transformer)
    followed = _chain(inner) if is_chain else tuple(step for step in inner if step is not None)
    return Step(path, token, columns, followed, is_chain)


def _inner_steps(path: str, transformer: Any) -> Iterator[Step | None]:
    for name, part, columns in parts_of(transformer)[1]:
        with contextlib.suppress(NoContentError):
            yield _step(f"{path}__{name}", part, content_of(columns) if columns else None)


def all_steps(steps: tuple[Step, ...]) -> Iterator[Step]:
    """Yield the steps and those inside of them, outer ones first."""
    for step in steps:
        yield step
        yield from all_steps(step.inner)


@dataclass(frozen=True)
class TaskSteps:
    """The transformers of one task, and the identities of what fits them."""

    fold: str
    steps: tuple[Step, ...]
    #: The fold, then of each step that has one the identity of the fitted step; outer ones before inner ones.
    prefixes: Prefixes
    #: Of each inner step's identity, that of the step around it; "" where it comes in several places of the task.
    around: Mapping[str, str]
    #: By its path, the identity of each fitted step that has one.
    by_path: Mapping[str, str]

    @classmethod
    def of(cls, fold: str, steps: tuple[Step, ...]) -> TaskSteps:
        """Follow the training data of the fold through the steps."""
        found: list[tuple[str, str, str | None]] = []
        _follow(steps, fold, None, True, found)
        around: dict[str, str | None] = {}
        for _, fitted, outer in found:
            around[fitted] = "" if fitted in around else outer
        inner = {fitted: outer for fitted, outer in around.items() if outer is not None}
        return cls(fold, steps, (fold, *around), inner, {path: fitted for path, fitted, _ in found})

    def worth_keeping(self, uses: Mapping[str, int]) -> list[str]:
        """Return the prefixes that more than one task has, without those that only come with the step around them."""
        return [prefix for prefix in self.prefixes[1:] if uses[prefix] > self._uses_around(prefix, uses)]

    def _uses_around(self, prefix: str, uses: Mapping[str, int]) -> int:
        """Return how many tasks have no use for a prefix because they have what is around it."""
        outer = self.around.get(prefix)
        return 1 if outer is None else uses.get(outer, 0)


def _follow(
    steps: tuple[Step, ...],
    data: str | None,
    outer: str | None,
    is_chain: bool,
    found: list[tuple[str, str, str | None]],
) -> None:
    """Add path and identity of the fitted steps to ``found``, with that of the step around each."""
    for step in steps:
        given = data if data is None or step.columns is None else derived(data, step.columns)
        fitted = None if given is None or step.token is None else derived(given, step.token)
        if fitted is not None:
            found.append((step.path, fitted, outer))
        _follow(step.inner, given, fitted, step.is_chain, found)
        if is_chain:
            data = fitted

"""What of a fitted object is compared: values that do not depend on where it was fitted, without timings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def search_answer(search: Any) -> Any:
    """Return what a search found."""
    results = search.cv_results_
    scores = {name: np.asarray(column) for name, column in results.items() if "test_" in name}
    return repr(search.best_params_), repr(results["params"]), scores


def thresholds(trees: Iterable[Any]) -> list[Any]:
    """Return what tells two forests apart. (Sums over trees are taken in the order in which threads end.)"""
    return [np.asarray(tree.tree_.threshold) for tree in trees]

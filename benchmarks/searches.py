"""The searches that ``sharing.py`` times: pipelines with much, little and nothing in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Search(NamedTuple):
    """One search: a pipeline, a grid, the data."""

    pipeline: Any
    grid: dict[str, list[Any]]
    X: Any
    y: Any
    cv: int = 3


def pca_search(n_last: int = 6) -> Search:
    """Return (a): PCA and LogisticRegression, 3 x 6 candidates on 10,000 x 500 numbers."""
    from sklearn.datasets import make_classification
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline

    X, y = make_classification(10_000, 500, n_informative=50, random_state=0)
    pipeline = Pipeline([("pca", PCA(random_state=0)), ("clf", LogisticRegression(max_iter=200))])
    grid = {"pca__n_components": [20, 50, 100], "clf__C": list(np.logspace(-3, 2, n_last))}
    return Search(pipeline, grid, X, y)


def text_search(n_last: int = 6) -> Search:
    """Return (b): 2 vectorizers x 3 ways to weigh x 6 classifiers on 1,500 documents of some 150 words."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import Pipeline

    random = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(30_000)])
    frequencies = 1.0 / np.arange(1, len(words) + 1)
    y = random.integers(0, 4, 1_500)
    documents = []
    for label in y:
        n_words = int(random.integers(100, 200))
        drawn = random.choice(len(words), n_words, p=frequencies / frequencies.sum())
        # A fifth of the words tell what the document is about.
        drawn[: n_words // 5] = (drawn[: n_words // 5] * 4 + label) % len(words)
        documents.append(" ".join(words[drawn]))
    pipeline = Pipeline(
        [
            ("count", CountVectorizer()),
            ("weigh", TfidfTransformer()),
            ("clf", SGDClassifier(random_state=0, max_iter=20, tol=None)),
        ]
    )
    grid = {
        "count__ngram_range": [(1, 1), (1, 2)],
        "weigh__norm": ["l1", "l2", None],
        "clf__alpha": list(np.logspace(-6, -3, n_last)),
    }
    return Search(pipeline, grid, documents, y)


def frame_search(n_last: int = 4) -> Search:
    """Return (c): imputers, encoders and gradient boosting on a table of 20,000 rows."""
    import pandas as pd
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.impute import KNNImputer, SimpleImputer
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    random = np.random.default_rng(0)
    n_rows = 20_000
    numbers = random.normal(size=(n_rows, 8))
    y = (numbers[:, 0] + numbers[:, 1] * numbers[:, 2] + random.normal(size=n_rows) > 0).astype(int)
    numbers[random.random(numbers.shape) < 0.02] = np.nan
    names = [f"number {i}" for i in range(8)]
    frame = pd.DataFrame(numbers, columns=names)
    for i in range(3):
        frame[f"kind {i}"] = pd.Categorical(random.choice(list("abcdefgh"), n_rows))
    kinds = [f"kind {i}" for i in range(3)]
    columns = ColumnTransformer(
        [
            ("numbers", Pipeline([("impute", KNNImputer(n_neighbors=3)), ("scale", StandardScaler())]), names[:4]),
            ("others", SimpleImputer(), names[4:]),
            ("kinds", OneHotEncoder(sparse_output=False), kinds),
        ]
    )
    pipeline = Pipeline([("columns", columns), ("clf", HistGradientBoostingClassifier(max_iter=30, random_state=0))])
    grid = {"columns__others__strategy": ["mean", "median"], "clf__max_leaf_nodes": [7, 15, 31, 63][:n_last]}
    return Search(pipeline, grid, frame.iloc[:6_000], y[:6_000])


def nothing_in_common() -> Search:
    """Return (d): every candidate has another first step, and so all steps of its own."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import Pipeline
    from sklearn.svm import SVC

    search = pca_search()
    pipeline = Pipeline([("pca", PCA(random_state=0)), ("clf", SVC())])
    grid = {"pca__n_components": list(range(5, 65, 5))}
    return Search(pipeline, grid, search.X[:4_000, :200], search.y[:4_000])


def one_cheap_step() -> Search:
    """Return (e): a scaler that takes some milliseconds, before a classifier that takes some hundred."""
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    search = pca_search()
    pipeline = Pipeline([("scale", StandardScaler()), ("clf", SVC())])
    grid = {"clf__C": list(np.logspace(-2, 2, 12))}
    return Search(pipeline, grid, search.X[:2_000, :40], search.y[:2_000])


SEARCHES: dict[str, Callable[[], Search]] = {
    "a: PCA": pca_search,
    "b: text": text_search,
    "c: columns": frame_search,
    "d: nothing in common": nothing_in_common,
    "e: one cheap step": one_cheap_step,
}

#: The same searches with half and all of the last step's options, for what a doubling adds.
GROWTH: dict[str, tuple[Callable[[int], Search], int]] = {"a: PCA": (pca_search, 6), "b: text": (text_search, 6)}

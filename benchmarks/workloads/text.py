"""Text: tokenizing in pure Python, which holds the GIL."""

from __future__ import annotations

from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline, make_union

from .answers import search_answer
from .base import Workload


def documents(n: int, n_words: int = 100) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Return ``n`` documents of invented words, and which of two topics each has."""
    rng = np.random.default_rng(0)
    vocabulary = np.array(["".join(word) for word in rng.choice(list("aeioulmnrst"), (2_000, 6))])
    topics = rng.integers(0, 2, n)
    words = np.minimum(rng.zipf(1.3, (n, n_words)) + 40 * topics[:, None], len(vocabulary) - 1)
    return [" ".join(row) for row in vocabulary[words]], topics


def tfidf(texts: list[str]) -> Any:
    """Return the number of terms and the sum of the weights of ``texts``."""
    weights = TfidfVectorizer(ngram_range=(1, 2)).fit_transform(texts)
    return weights.shape, float(weights.sum())


def _shards() -> list[list[str]]:
    texts, _ = documents(2_400)
    return [texts[i : i + 200] for i in range(0, len(texts), 200)]


def _tfidf_tasks(shards: list[list[str]], n_jobs: int) -> list[Any]:
    return Parallel(n_jobs=n_jobs)(delayed(tfidf)(shard) for shard in shards)  # type: ignore[no-any-return]


def _text_search(data: Any, n_jobs: int) -> Any:
    texts, topics = data
    pipe = make_pipeline(HashingVectorizer(n_features=2**14), SGDClassifier(random_state=0, max_iter=20, tol=None))
    search = GridSearchCV(pipe, {"sgdclassifier__alpha": [1e-5, 1e-4, 1e-3]}, cv=3, n_jobs=n_jobs)
    return search_answer(search.fit(texts, topics))


def _union(data: Any, n_jobs: int) -> Any:
    words = TfidfVectorizer()
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), max_features=5_000)
    matrix = make_union(words, letters, n_jobs=n_jobs).fit_transform(data[0])
    return matrix.shape, matrix.data


WORKLOADS = (
    Workload("tfidf-tasks", "12 TfidfVectorizer fits of 200 documents each", _tfidf_tasks, _shards, quick=True),
    Workload(
        "text-search", "GridSearchCV of HashingVectorizer and SGD, 3 x 3 fits", _text_search, lambda: documents(2_500)
    ),
    Workload("text-union", "FeatureUnion of a word and a letter TfidfVectorizer", _union, lambda: documents(800)),
)

"""Equal values have one identity, whoever made them; other values, other types, and what has no content do not."""

import copy
import functools
import itertools
import random
import threading

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from samples import memmap, numbers, objects
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from joblib_backends.data.content import NoContentError, content_of

#: Values of which no two are the same, though many are equal for ``==``.
DISTINCT = [
    None, False, True, 0, 1, 0.0, -0.0, 1.0, 1 + 0j, "1", b"1", np.float64(1), np.float32(1), np.int64(1), np.True_,
    (), [], {}, set(), frozenset(), (1,), [1], [1.0], [True], {1}, {1: 2}, {1.0: 2}, {2: 1}, [[1], 2], [1, [2]],
    np.array(1), np.array([1]), np.array([1.0]), np.array([[1]]), np.array([1], dtype="i4"), np.array([1], ">i8"),
    np.array(["1"]), np.array([b"1"]), np.array([1], dtype=object), np.array([True], dtype=object),
    np.array([1], dtype="M8[s]"), np.array([1], dtype="M8[ms]"), np.ma.masked_array([1], [True]),
    np.ones((2, 3)), np.ones((3, 2)), np.asfortranarray(np.ones((2, 3))), np.zeros((0, 2)), np.zeros((2, 0)),
    scipy.sparse.csr_array(np.eye(2)), scipy.sparse.csc_array(np.eye(2)), scipy.sparse.csr_matrix(np.eye(2)),
    pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [1.0]}), pd.DataFrame({"b": [1]}), pd.Series([1]),
    pd.Series(["a"]), pd.Series(["a"], dtype="category"), slice(1), slice(1, 2), range(2), ..., int, float, np.ndarray,
    abs, len, content_of, functools.partial(abs, 1), functools.partial(abs, 2), np, random,
    LogisticRegression(), LogisticRegression(C=1), LogisticRegression(C=2.0), StandardScaler(),
    StandardScaler().fit([[1.0]]), FunctionTransformer(abs), FunctionTransformer(len),
    TfidfVectorizer(stop_words=["a"]), TfidfVectorizer(ngram_range=(1, 2)),
    StandardScaler().set_output(transform="pandas"), (lambda: 1), (lambda: 1),
]  # fmt: skip


def test_distinct_values_have_distinct_identities():
    identities = [content_of(value) for value in DISTINCT]
    same = [
        (DISTINCT[i], DISTINCT[j])
        for i, j in itertools.combinations(range(len(DISTINCT)), 2)
        if identities[i] == identities[j]
    ]
    assert same == []


@pytest.mark.parametrize("value", DISTINCT, ids=repr)
def test_a_copy_has_the_same_identity(value):
    assert content_of(value) == content_of(copy.deepcopy(value) if not isinstance(value, type(np)) else value)


def test_the_same_object_twice_is_as_two_equal_ones():
    text, array = "some text", np.ones(3)
    assert content_of([text, text]) == content_of([text, "".join(["some ", "text"])])
    assert content_of([array, array]) == content_of([array, array.copy()])


def test_sets_have_no_order():
    names = [f"word {i}" for i in range(100)]
    backwards = names[::-1]
    assert content_of(set(names)) == content_of(set(backwards))
    assert content_of({"a": frozenset(names)}) == content_of({"a": frozenset(backwards)})


@pytest.mark.parametrize(
    "view", [numbers()[::2], numbers().T, numbers()[:, 1:], numbers()[::-1], np.asfortranarray(numbers())]
)
def test_a_view_is_known_by_what_it_shows(view):
    assert content_of(view) == content_of(view.copy(order="K"))


def test_objects_in_arrays_are_looked_into():
    assert content_of(objects()) == content_of(objects())
    assert content_of(np.array([[1], "a"], dtype=object)) != content_of(np.array([[True], "a"], dtype=object))


def test_a_memmap_is_known_by_its_file_and_is_not_read(tmp_path, monkeypatch):
    mapped = memmap(tmp_path, "r")
    before = content_of(mapped)
    assert content_of(mapped[:]) == before
    assert content_of(mapped[1:]) != before
    numbers(int).tofile(tmp_path / "r.bin")
    assert content_of(mapped) != before


def test_what_a_matrix_finds_out_about_itself_does_not_change_it():
    matrix = scipy.sparse.random(20, 20, 0.2, format="csr", random_state=0)
    before = content_of(matrix)
    assert matrix.has_sorted_indices
    assert content_of(matrix) == before


class Secretive(StandardScaler):
    def __getstate__(self):
        return {}


def test_all_of_an_estimator_counts_whatever_it_pickles():
    assert content_of(Secretive()) != content_of(Secretive(with_mean=False))


def cyclic():
    values = [1]
    values.append(values)
    return values


@pytest.mark.parametrize(
    "value",
    [
        np.random.RandomState(0),
        np.random.default_rng(0),
        random.Random(0),
        threading.Lock(),
        [1, {"a": np.random.RandomState(0)}],
        LogisticRegression(random_state=np.random.RandomState(0)),
        cyclic(),
        (i for i in range(3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_content_is_refused(value):
    with pytest.raises(NoContentError):
        content_of(value)

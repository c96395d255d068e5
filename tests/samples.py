"""Values of every kind that travels to workers, and what it means for two of them to be equal."""

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse

#: Rows of most samples: 96 kB of float64, more than a worker copies instead of mapping it.
N = 3_000


def numbers(dtype=float):
    return np.arange(N * 4).reshape(N, 4).astype(dtype)


def dates(dtype="M8[s]"):
    values = np.arange(N * 4, dtype="i8").astype(dtype).reshape(N, 4)
    values[5, 1] = "NaT"
    return values


def structured():
    values = np.zeros(N, [("number", "f8"), ("pair", ">i4", (2,)), ("text", "U3")])
    values["number"], values["text"] = np.arange(N), "abc"
    return values


def objects(n=N):
    return np.array([None, "a", 1.5, (1, 2)] * (n // 4), dtype=object)


def read_only():
    values = numbers()
    values.flags.writeable = False
    return values


def memmap(folder, mode, **options):
    """Return a memmap of ``numbers()`` opened in ``mode``."""
    path = folder / f"{mode}.bin"
    numbers().tofile(path)
    values = np.memmap(path, float, mode, shape=options.pop("shape", (N, 4)), **options)
    if mode == "w+":
        values[:] = numbers()
    elif mode == "c":
        values[0] = -1
    return values


def frame():
    zone = pd.date_range("2024-01-01", periods=N, tz="Europe/Berlin")
    return pd.DataFrame(
        {
            "number": np.arange(N) / 3,
            "integer": np.arange(N),
            "flag": np.arange(N) % 2 == 0,
            "text": [f"row {i}" for i in range(N)],
            "kind": pd.Categorical(["a", "b", None] * (N // 3)),
            "when": zone,
            "plain": zone.tz_localize(None),
            "nullable": pd.array([1, None] * (N // 2), dtype="Int64"),
            "object": pd.Series([(i,) for i in range(N)], dtype=object),
        }
    )


def multi_index():
    index = pd.MultiIndex.from_product([range(N // 2), ["a", "b"]], names=["x", "y"])
    return pd.DataFrame(numbers(), index=index, columns=list("abcd"))


def table():
    return pa.table({"number": np.arange(N) / 3, "text": [f"row {i}" for i in range(N)], "list": [[1, 2]] * N})


def sparse():
    return scipy.sparse.random(N, 50, density=0.1, format="csr", random_state=0)


def nested():
    return {"array": [numbers(), {"frame": (frame(), structured())}], "texts": [f"row {i}" for i in range(N)], 3: None}


#: Name -> function of a folder that makes the value.
SAMPLES = {
    "C order": lambda folder: numbers(),
    "F order": lambda folder: np.asfortranarray(numbers()),
    "every other column": lambda folder: numbers()[:, ::2],
    "every other row": lambda folder: numbers()[::2],
    "one column": lambda folder: numbers()[:, 1],
    "reversed rows": lambda folder: numbers()[::-1],
    "reversed columns of F order": lambda folder: np.asfortranarray(numbers())[:, ::-1],
    "axes swapped": lambda folder: np.arange(24_000.0).reshape(20, 30, 40).transpose(1, 0, 2)[:, ::3],
    "broadcast": lambda folder: np.broadcast_to(np.arange(4.0), (N, 4)),
    "big endian": lambda folder: numbers(">f8"),
    "float16": lambda folder: numbers("f2"),
    "complex": lambda folder: numbers(complex),
    "long double": lambda folder: numbers("g"),
    "bool": lambda folder: numbers() > 77,
    "datetime64": lambda folder: dates(),
    "datetime64, big endian": lambda folder: dates(">M8[ns]"),
    "timedelta64, strided": lambda folder: dates("m8[ms]")[::-2, ::2],
    "structured": lambda folder: structured(),
    "structured, strided": lambda folder: structured()[::3],
    "structured with dates": lambda folder: np.ones(N, [("when", "M8[s]"), ("number", "f8")]),
    "one field": lambda folder: structured()["number"],
    "fixed-width text": lambda folder: np.array([f"row {i}" for i in range(N)]),
    "fixed-width bytes": lambda folder: np.array([b"row %d" % i for i in range(N)]),
    "0-d": lambda folder: np.array(3.5),
    "empty": lambda folder: np.empty((0, 4), "f4"),
    "empty, strided": lambda folder: np.empty((50, 0, 4))[::2, :, ::2],
    "objects": lambda folder: objects(),
    "few objects": lambda folder: objects(40),
    "objects, strided": lambda folder: objects()[::2],
    "read-only": lambda folder: read_only(),
    "masked": lambda folder: np.ma.masked_greater(numbers(), 77),
    "record array": lambda folder: structured().view(np.recarray),
    "memmap r": lambda folder: memmap(folder, "r"),
    "memmap r+": lambda folder: memmap(folder, "r+"),
    "memmap c": lambda folder: memmap(folder, "c"),
    "memmap w+": lambda folder: memmap(folder, "w+"),
    "memmap with offset": lambda folder: memmap(folder, "r", offset=800, shape=(N - 25, 4)),
    "memmap in F order": lambda folder: memmap(folder, "r", order="F"),
    "rows of a memmap": lambda folder: memmap(folder, "r")[100:2_000, 1:3],
    "reversed memmap": lambda folder: memmap(folder, "r")[::-2],
    "no rows of a memmap": lambda folder: memmap(folder, "r")[:0],
    "one row of a memmap": lambda folder: memmap(folder, "r")[7],
    "array over a memmap": lambda folder: np.asarray(memmap(folder, "r"))[3:],
    "array over a memmap c": lambda folder: np.asarray(memmap(folder, "c")),
    "frame": lambda folder: frame(),
    "frame of a memmap": lambda folder: pd.DataFrame(memmap(folder, "r"), copy=False),
    "frame, MultiIndex": lambda folder: multi_index(),
    "series of text": lambda folder: frame()["text"],
    "series of objects": lambda folder: frame()["object"],
    "series with time zone": lambda folder: frame()["when"],
    "categorical": lambda folder: frame()["kind"],
    "Arrow table": lambda folder: table(),
    "Arrow slice": lambda folder: table().slice(10, 500),
    "Arrow dictionary": lambda folder: pa.table({"kind": pa.array(["a", "b"] * N).dictionary_encode()}),
    "sparse csr": lambda folder: sparse(),
    "sparse csc": lambda folder: sparse().tocsc(),
    "sparse coo": lambda folder: sparse().tocoo(),
    "list of numbers": lambda folder: list(range(N)),
    "list of texts": lambda folder: [f"row {i}" for i in range(N)],
    "list of lists": lambda folder: [[i, str(i)] for i in range(N)],
    "list of arrays": lambda folder: [numbers()[i] for i in range(N)],
    "tuple": lambda folder: tuple(range(N)),
    "dict": lambda folder: {str(i): i for i in range(N)},
    "dict of arrays": lambda folder: {"a": numbers(), "b": numbers()[:, 0]},
    "set": lambda folder: set(range(N)),
    "frozenset": lambda folder: frozenset(range(N)),
    "text": lambda folder: "abcdef" * N,
    "bytes": lambda folder: b"abcdef" * N,
    "bytearray": lambda folder: bytearray(b"abcdef" * N),
    "nested": lambda folder: nested(),
}

#: Samples with no buffer that could be placed, because they are small.
SMALL = {"0-d", "empty", "empty, strided", "few objects", "no rows of a memmap"}

#: Samples that travel as the name of their file.
BY_FILE = {
    name
    for name in SAMPLES
    if "memmap" in name and name not in ("memmap c", "array over a memmap c", "no rows of a memmap")
}

#: Samples whose own pickle copies their bytes into the stream, where they cannot be placed.
COPIED_BY_THEIR_PICKLE = {"masked", "record array", "structured with dates"}


def assert_same(got, expected):
    """Assert equal type, dtype and content, at any depth."""
    if not isinstance(expected, np.ndarray):
        assert type(got) is type(expected)
    if isinstance(expected, np.ndarray):
        _assert_same_array(got, expected)
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(got, expected)
    elif isinstance(expected, pd.Series):
        pd.testing.assert_series_equal(got, expected)
    elif isinstance(expected, pa.Table):
        assert got.schema == expected.schema
        assert got.equals(expected)
    elif scipy.sparse.issparse(expected):
        assert (got.format, got.shape, got.dtype) == (expected.format, expected.shape, expected.dtype)
        assert (got != expected).nnz == 0
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        assert_same(list(got.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert got == expected or (got != got and expected != expected)


def _assert_same_array(got, expected):
    assert isinstance(got, np.ndarray)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert isinstance(got, np.ma.MaskedArray) == isinstance(expected, np.ma.MaskedArray)
    if isinstance(expected, np.ma.MaskedArray):
        np.testing.assert_array_equal(got.mask, expected.mask)
    if expected.dtype.hasobject:
        assert_same(got.ravel().tolist(), expected.ravel().tolist())
    else:
        assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(expected).tobytes()

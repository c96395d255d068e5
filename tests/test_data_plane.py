"""Data through ``Parallel``: placed once, isolated, never stale, gone in time; on every tier that copies.

The codec's own tests hold the finer points; here workers are real.
"""

import contextlib
import gc
import importlib
import itertools
import os
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import COPYING_TIERS, LONG, eventually, make_hybrid, resident_files
from joblib import Parallel, delayed, parallel_config
from samples import SAMPLES, assert_same, frame, numbers

from joblib_backends import HybridBackend, last_report
from joblib_backends.data.store import default_store
from joblib_backends.errors import StoreError

#: More than ``max_nbytes``, so that it is placed.
LARGE = 200_000


@pytest.fixture(scope="module", autouse=True)
def _warm_workers():
    """Hold the pool of process workers for all tests of this file; each context finds it."""
    backend = HybridBackend(tier="processes")
    with parallel_config(backend, n_jobs=2):
        Parallel()(delayed(abs)(-i) for i in range(4))
    yield
    backend.close()


@pytest.fixture(params=COPYING_TIERS)
def tier(request):
    return request.param


@pytest.fixture
def processes(request):
    return make_hybrid("processes", request)


_serial = itertools.count(1)


def ones():
    """Return a large array whose sum is its size, and whose content no other test has placed."""
    values, i = np.ones(LARGE), next(_serial)
    values[-2:] = 1 + i, 1 - i
    return values


def moved():
    return last_report().nbytes_moved


def give(value, *_):
    return value


def add_one(data):
    """Change ``data`` in place, whatever it is, and return what is in its first place."""
    if isinstance(data, dict):
        data["a"] += 1
        return data["a"].item(0)
    if isinstance(data, pd.DataFrame):
        data.iloc[0, 0] += 1
        return data.iloc[0, 0]
    data[0] += 1
    return data[0]


def total(array):
    return float(np.sum(array))


# NumPy's own pickle, by which results come back, loses the byte order of big-endian dates.
@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "datetime64, big endian"])
def test_workers_see_equal_values_and_the_next_call_moves_nothing(name, hybrid, tmp_path):
    value = SAMPLES[name](tmp_path)
    with hybrid(max_nbytes=1_000):
        for got in Parallel()(delayed(give)(value, i) for i in range(2)):
            assert_same(got, value)
        Parallel()(delayed(give)(value, i) for i in range(2))
        assert moved() == 0


@pytest.mark.parametrize(
    "name", ["C order", "one column", "objects", "frame", "Arrow table", "sparse csr", "list of texts"]
)
def test_scattered_values_move_once_whoever_brings_them(name, hybrid, tmp_path):
    value, equal = SAMPLES[name](tmp_path), SAMPLES[name](tmp_path)
    # Another tier placed the same, and a thread of it may still be on its way out.
    assert eventually(lambda: not default_store().residents, LONG)
    with hybrid(scatter=[value]):
        for turn, brought in enumerate([value, equal, value]):
            for got in Parallel()(delayed(give)(brought, i) for i in range(2)):
                assert_same(got, value)
            assert (moved() > 0) == (turn == 0)


def test_small_scattered_targets_are_counted_as_saved(hybrid):
    x, y = ones(), np.arange(500) + next(_serial)
    with hybrid(scatter=[x, y]):
        Parallel(batch_size=1)(delayed(give)(y, i) for i in range(4))
        assert moved() == x.nbytes + y.nbytes
        assert last_report().nbytes_saved == 4 * y.nbytes
        Parallel(batch_size=1)(delayed(give)(y.copy(), i) for i in range(4))
        assert (moved(), last_report().nbytes_saved) == (0, 4 * y.nbytes)


class Model:
    """A number and an array that belong together."""

    def __init__(self):
        self.number, self.array = 0, np.zeros(3_000)


def parts_of(model):
    return model.number, model.array[0]


def test_a_scattered_object_that_changes_between_tasks_never_comes_in_pieces_of_two_times(hybrid):
    def tasks(model):
        for i in range(6):
            model.number = i
            model.array[:] = i
            yield delayed(parts_of)(model)

    with hybrid(scatter=[model := Model()]):
        for number, value in Parallel(batch_size=1)(tasks(model)):
            assert number == value


def test_equal_copies_share_one_resident(hybrid):
    with hybrid():
        x = ones()
        results = Parallel(batch_size=1)(delayed(total)(x.copy()) for _ in range(8))
        assert (results, moved()) == ([LARGE] * 8, 8 * LARGE)


def test_clones_of_an_estimator_share_one_resident(processes):
    from sklearn.base import clone
    from sklearn.linear_model import Ridge

    template = Ridge(alpha=np.arange(300_000.0) + next(_serial))
    with processes():
        Parallel(batch_size=1)(delayed(Ridge.get_params)(clone(template)) for _ in range(20))
        assert moved() == 2_400_000


@pytest.mark.parametrize("columns", [slice(None), slice(None, None, 2)], ids=["contiguous", "strided"])
def test_views_of_a_scattered_array_move_nothing(columns, hybrid):
    x = np.arange(400_000.0).reshape(-1, 8) + next(_serial)
    with hybrid(scatter=[x]):
        Parallel()(delayed(abs)(i) for i in range(2))
        assert moved() == x.nbytes
        results = Parallel()(delayed(total)(x[1_000 * i :, columns]) for i in range(3))
        assert results == [total(x[1_000 * i :, columns]) for i in range(3)]
        assert moved() == 0


@pytest.mark.parametrize("size", [10, LARGE])
def test_an_array_changed_between_two_tasks_is_not_served_stale(size, hybrid):
    """joblib takes n_jobs tasks at a time, and with pre_dispatch=2 the second pair when a task of the first is done."""
    x = np.zeros(size)

    def tasks():
        for i in range(6):
            x[0] = i // 2
            yield delayed(add_one)(x)

    with hybrid():
        assert Parallel(pre_dispatch=2, batch_size=1)(tasks()) == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("size", [10, LARGE])
def test_an_array_changed_between_two_calls_is_not_served_stale(size, hybrid):
    x = np.zeros(size)
    with hybrid(scatter=[x]), Parallel() as parallel:
        for i in range(4):
            x[:] = i
            assert parallel(delayed(total)(x) for _ in range(2)) == [i * size] * 2
            assert parallel(delayed(total)(x[: size // 2]) for _ in range(2)) == [i * (size // 2)] * 2


def test_a_change_after_dispatch_does_not_reach_a_task_that_waits(processes):
    """The bytes of a task are those of the moment when it was taken from the generator."""
    x, changed = np.zeros(LARGE), threading.Event()

    def tasks():
        yield delayed(total)(x)
        yield delayed(total)(x)
        x[:] = 1
        changed.set()
        yield delayed(total)(x)

    with processes():
        assert Parallel(pre_dispatch="all", batch_size=1)(tasks()) == [0, 0, LARGE]
    assert changed.is_set()


DATA = {
    "small array": lambda: np.zeros(10),
    "large array": lambda: np.zeros(LARGE),
    "strided array": lambda: np.zeros(2 * LARGE)[::2],
    "large F array": lambda: np.zeros((LARGE, 2), order="F")[:, 0],
    "frame": lambda: pd.DataFrame(np.zeros((LARGE, 2))),
    "dict of arrays": lambda: {"a": np.zeros((1, LARGE))},
    "short list": lambda: [0] * 10,
    "long list": lambda: [0] * LARGE,
    "objects": lambda: np.zeros(LARGE, dtype=object),
}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", DATA)
def test_work_in_place_reaches_neither_the_caller_nor_a_neighbour(kind, batch_size, hybrid):
    data = DATA[kind]()
    before = DATA[kind]()
    with hybrid():
        results = Parallel(batch_size=batch_size)(delayed(add_one)(data) for _ in range(4))
        if kind == "dict of arrays":
            assert results == [1, 1, 1, 1]
        else:
            assert [np.ravel(result)[0] for result in results] == [1, 1, 1, 1]
    assert_same(data, before)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_a_function_captured_is_as_sent_for_each_task(batch_size, hybrid):
    x, seen = np.zeros(LARGE), []

    def work():
        x[0] += 1
        seen.append(1)
        return x[0], len(seen)

    with hybrid():
        assert Parallel(batch_size=batch_size)(delayed(work)() for _ in range(4)) == [(1, 1)] * 4
    assert (x[0], seen) == (0, [])


@pytest.mark.parametrize("mode", [None, "r", "c"])
def test_private_modes_give_each_task_its_own_copy(mode, hybrid):
    x = ones()
    with hybrid():
        assert Parallel(mmap_mode=mode, batch_size=1)(delayed(add_one)(x) for _ in range(4)) == [2, 2, 2, 2]
        assert moved() == (0 if mode is None else x.nbytes)


@pytest.mark.parametrize("mode", ["r+", "w+"])
def test_writable_modes_give_the_tasks_of_a_call_one_copy(mode, hybrid, tier):
    x, other = np.zeros(LARGE), np.zeros(LARGE)
    with hybrid():
        results = Parallel(mmap_mode=mode, batch_size=1)(delayed(write_and_wait)(x, other, i) for i in range(2))
        assert results == [(3, 0), (3, 0)] if tier != "fake" else [(1, 0), (3, 0)]
    assert (total(x), total(other)) == (0, 0)


def write(x, other, i):
    x[i] = i
    return other[i]


def write_and_wait(x, other, i):
    """Write to ``x``; with two workers, wait for what the other one writes."""
    x[i] = i + 1
    if threading.current_thread().name != "joblib_backends-fake":
        eventually(lambda: x[0] and x[1])
    return x[:2].sum(), other[i]


@pytest.mark.parametrize(("max_nbytes", "expected"), [(None, 0), (10, 800), ("10M", 0), ("1K", 0), ("0.5K", 800)])
def test_max_nbytes_says_from_where_buffers_are_placed(max_nbytes, expected, hybrid):
    x = np.full(100, float(next(_serial)))
    with hybrid():
        assert Parallel(max_nbytes=max_nbytes)(delayed(total)(x) for _ in range(2)) == [x.sum()] * 2
        assert moved() == expected


def test_on_dask_small_buffers_are_placed_that_come_again(request):
    hybrid = make_hybrid("dask", request)
    x, others = np.full(10_000, float(next(_serial))), [np.full(10_000, float(next(_serial))) for _ in range(3)]
    with hybrid():
        assert Parallel(batch_size=1)(delayed(total)(one) for one in [x, *others]) == [
            x.sum(),
            *(o.sum() for o in others),
        ]
        assert moved() == 0
        assert Parallel(batch_size=1)(delayed(total)(x) for _ in range(4)) == [x.sum()] * 4
        assert (moved(), last_report().nbytes_saved) == (x.nbytes, 2 * x.nbytes)
        Parallel(batch_size=1)(delayed(total)(x) for _ in range(4))
        assert (moved(), last_report().nbytes_saved) == (0, 4 * x.nbytes)


@pytest.mark.parametrize("where", ["context", "call"])
def test_temp_folder_takes_the_files(where, hybrid, tmp_path):
    in_context, in_call = ({"temp_folder": str(tmp_path)} if where == place else {} for place in ("context", "call"))
    x = ones()
    with hybrid(**in_context):
        Parallel(**in_call)(delayed(total)(x) for _ in range(2))
        (path,) = tmp_path.glob("*/0*")  # x lives, and so does its file
        assert path.stat().st_size == x.nbytes
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    # A thread of the tier may still be letting go of the last batch.
    assert eventually(lambda: list(tmp_path.glob("*/0*")) == [])


def test_a_temp_folder_without_room_fails_the_call_by_name(hybrid, tmp_path):
    (tmp_path / "file").touch()
    with hybrid(), pytest.raises(StoreError, match=rf"a buffer of {8 * LARGE} bytes .*file/below: Not a directory"):
        Parallel(temp_folder=str(tmp_path / "file" / "below"))(delayed(total)(ones()) for _ in range(2))


def test_scattering_without_room_fails_the_call_by_name(processes, tmp_path):
    (tmp_path / "file").touch()
    with (
        processes(temp_folder=str(tmp_path / "file" / "below"), scatter=[ones()]),
        pytest.raises(StoreError, match=rf"a buffer of {8 * LARGE} bytes"),
    ):
        Parallel()(delayed(abs)(i) for i in range(4))


@pytest.fixture
def whole_pool(processes):
    """Have workers again after a call that failed and so ended its own."""
    with processes():
        Parallel()(delayed(abs)(-i) for i in range(4))


@pytest.mark.usefixtures("whole_pool", "leaves_nothing")
def test_nothing_is_left_when_a_context_ends(hybrid):
    x = ones()
    with hybrid(scatter=[np.ones(500)]):
        Parallel()(delayed(total)(x) for _ in range(2))
        assert resident_files()


def test_nothing_is_left_after_an_exception(hybrid):
    x, before = ones(), set(resident_files())
    with hybrid(scatter=[x]), contextlib.suppress(TypeError):
        Parallel()(delayed(total)(x, wrong=i) for i in range(4))
    del x
    # The traceback is a cycle with the call, which the garbage collector ends.
    assert eventually(lambda: set(resident_files()) <= before, LONG)


def test_without_a_context_a_resident_lives_as_long_as_its_owner():
    x = ones()
    before = set(resident_files())
    parallel = Parallel(backend="hybrid", n_jobs=2, tier="processes")
    parallel(delayed(total)(x) for _ in range(2))
    assert (moved(), len(set(resident_files()) - before)) == (x.nbytes, 1)
    Parallel(backend="hybrid", n_jobs=2, tier="processes")(delayed(total)(x) for _ in range(2))
    assert moved() == 0
    del x
    gc.collect()
    assert eventually(lambda: set(resident_files()) <= before)


def test_without_a_context_a_temporary_is_gone_after_the_call():
    before = set(resident_files())
    Parallel(backend="hybrid", n_jobs=2, tier="processes")(delayed(total)(ones()) for i in range(4))
    assert moved() == 4 * 8 * LARGE
    gc.collect()
    assert eventually(lambda: set(resident_files()) <= before)


def test_fifty_changes_in_place_keep_few_residents(hybrid):
    x, most = np.zeros(LARGE), 0
    with hybrid(), Parallel() as parallel:
        before = len(default_store().residents)
        for i in range(50):
            x[:] = i
            assert parallel(delayed(np.max)(x) for _ in range(2)) == [i, i]
            most = max(most, len(default_store().residents) - before)
    assert most <= 3


def test_windows_of_a_placed_array_are_not_placed_again(processes):
    x = np.arange(4.0 * LARGE)
    with processes():
        Parallel()(delayed(total)(x) for _ in range(2))
        before = len(default_store().residents)
        Parallel()(delayed(total)(x[i : i + LARGE]) for i in range(20))
        assert (moved(), len(default_store().residents)) == (0, before)


def pss_of(pid):
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def read_all(array, barrier):
    """Read all of ``array``; return the memory of this process while the others hold theirs, and before."""
    import os

    def wait(name):
        Path(barrier, f"{name}-{os.getpid()}").touch()
        assert eventually(lambda: len(list(Path(barrier).glob(f"{name}-*"))) == 8, LONG)

    wait("start")
    before = pss_of(os.getpid())
    wait("measured")
    result = total(array)
    wait("read")
    after = pss_of(os.getpid())
    wait("done")
    return result, after - before


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc/*/smaps_rollup")
def test_eight_workers_share_one_physical_copy(request, tmp_path):
    x = np.ones(20_000_000)
    with make_hybrid("processes", request)(n_jobs=8):
        results = Parallel(batch_size=1, pre_dispatch="all")(delayed(read_all)(x, str(tmp_path)) for _ in range(8))
    assert [result for result, _ in results] == [x.size] * 8
    assert 0.5 * x.nbytes < sum(growth for _, growth in results) < 1.5 * x.nbytes


def test_a_nested_call_in_a_worker_places_and_sees_data(processes):
    with processes():
        assert Parallel()(delayed(nested)(i) for i in range(2)) == [[LARGE] * 2] * 2


def nested(_):
    with parallel_config("hybrid", tier="threads", n_jobs=2):
        return Parallel()(delayed(total)(ones()) for _ in range(2))


def test_changes_through_a_writable_memmap_reach_its_file(hybrid, tmp_path):
    x = SAMPLES["memmap r+"](tmp_path)
    with hybrid():
        Parallel()(delayed(write)(x, x, i) for i in range(2))
    assert (x[1] == 1).all()


# ---- on Dask


@pytest.fixture
def dask(request):
    return make_hybrid("dask", request)


def dask_objects(client):
    from dask import array, dataframe

    return {
        "array": (array.ones((1_000, 300), chunks=(100, 300)), np.ones((1_000, 300))),
        "frame": (dataframe.from_pandas(frame()[["number", "integer"]], npartitions=3), frame()[["number", "integer"]]),
        "future": (client.submit(numbers), numbers()),
        "future of a dict": (client.submit(dict, a=[1]), {"a": [1]}),
    }


@pytest.mark.parametrize("kind", ["array", "frame", "future", "future of a dict"])
def test_what_is_on_the_cluster_is_gathered_there(kind, dask, dask_client):
    value, expected = dask_objects(dask_client)[kind]
    with dask(scatter=[value]):
        for got in Parallel()(delayed(give)(value, i) for i in range(3)):
            assert_same(got, expected)
        assert (moved(), last_report().nbytes_pickled < 10_000) == (0, True)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_is_on_the_cluster_is_not_changed_by_tasks(batch_size, dask, dask_client):
    future = dask_client.submit(np.zeros, LARGE)
    with dask(scatter=[future]):
        assert Parallel(batch_size=batch_size)(delayed(add_one)(future) for _ in range(4)) == [1, 1, 1, 1]
    assert future.result()[0] == 0


@pytest.fixture
def remote_workers(dask_client):
    """Make the workers unable to read the client's files, as workers on another machine are."""
    default_store().put(memoryview(b"makes the folder"), b"digest")
    dask_client.run(hide_files_of, own_folders())
    yield
    dask_client.run(hide_files_of, None)


def own_folders():
    return [str(folder.path) for folder in default_store()._folders.values()]


def hide_files_of(folders):
    from joblib_backends import remote

    if folders is None:
        importlib.reload(remote)
    else:
        remote.place_of_this_process = lambda: "elsewhere"
        remote.can_read = lambda path: not path.startswith(tuple(folders)) and os.access(path, os.R_OK)


@pytest.mark.usefixtures("remote_workers")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_workers_that_cannot_read_the_clients_files_get_the_data_through_dask(batch_size, dask):
    x, y = np.zeros(LARGE), frame()
    with dask(scatter=[y]):
        for _ in range(2):
            assert Parallel(batch_size=batch_size)(delayed(add_one)(x) for _ in range(4)) == [1, 1, 1, 1]
            assert_same(Parallel()(delayed(give)(y, i) for i in range(2))[0], y)
        x[0] = 5
        assert Parallel(batch_size=batch_size)(delayed(add_one)(x) for _ in range(4)) == [6, 6, 6, 6]
        assert Parallel()(delayed(total)(x[i:]) for i in range(3)) == [5, 0, 0]


def test_remote_workers_keep_no_file_once_the_client_lets_go(dask, dask_client, remote_workers):
    with dask():
        assert Parallel()(delayed(total)(np.full(LARGE, 3.0)) for _ in range(2)) == [3 * LARGE] * 2
        assert max(dask_client.run(count_copies).values()) >= 1
    assert eventually(lambda: max(dask_client.run(count_copies).values()) == 0)


def count_copies(dask_worker):
    return len(dask_worker.plugins["joblib_backends-copies"].kept)


def test_descriptors_do_not_grow_with_what_is_placed_and_gone(processes):
    process = psutil.Process()
    with processes(), Parallel() as parallel:
        parallel(delayed(total)(np.full(LARGE, 1.0)) for _ in range(2))
        before = process.num_fds()
        for i in range(20):
            parallel(delayed(total)(np.full(LARGE, float(i + j))) for j in range(2))
        # Dask's client and scheduler, in this process too, open a connection now and then; 40 files were placed.
        assert eventually(lambda: process.num_fds() <= before + 8, LONG)

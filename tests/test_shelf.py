"""Values on a shelf: whole or not there, copies for everyone, one at a time makes them, and nothing is left."""

import errno
import multiprocessing
import os
import shutil
import signal
import threading

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from conftest import eventually, resident_files

from joblib_backends.data import shelf as shelf_module
from joblib_backends.data.shelf import Shelf, pack
from joblib_backends.data.store import Store, default_store
from joblib_backends.errors import StoreError

LARGE = np.arange(100_000.0).reshape(1_000, 100)


@pytest.fixture
def shelf():
    made = Shelf(default_store().make_folders())
    yield made
    made.close()
    assert not [path for path in resident_files() if os.path.isdir(path)]


VALUES = {
    "a number": 1,
    "small": {"a": [1, "b", None], "b": np.ones(3)},
    "large": LARGE,
    "several": [LARGE, LARGE + 1, np.ones(10), LARGE[:10].copy()],
    "fortran": np.asfortranarray(LARGE),
    "a view": LARGE[::2, 1:],
    "objects": np.array([None, "a", 1.5] * 5_000, dtype=object),
    "a frame": pd.DataFrame({"a": LARGE[:, 0], "b": ["x", "y"] * 500}),
    "sparse": scipy.sparse.random(500, 500, 0.1, format="csr", random_state=0),
    "empty": [np.ones((0, 3)), b"", ""],
}


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_equal(shelf, name, mapped):
    value = VALUES[name]
    assert shelf.put(name, pack(value))
    taken = shelf.take(name, mapped=mapped)
    assert repr(taken) == repr(value)
    if isinstance(value, np.ndarray):
        assert np.array_equal(taken, value)
        assert taken.flags.c_contiguous == value.copy(order="K").flags.c_contiguous
        assert value.dtype.hasobject or not mapped or taken.ctypes.data % 64 == 0


def test_everyone_has_a_copy(shelf):
    shelf.put("x", pack(LARGE))
    first, second = shelf.take("x"), shelf.take("x")
    first[:] = 0
    assert np.array_equal(second, LARGE)
    assert np.array_equal(shelf.take("x"), LARGE)


def test_what_was_taken_stays_when_it_is_removed(shelf):
    shelf.put("x", pack(LARGE))
    taken = shelf.take("x")
    shelf.remove(["x", "never there"])
    assert shelf.take("x") is None
    assert np.array_equal(taken, LARGE)


def test_a_value_that_holds_what_it_must_not_is_refused():
    owner = Shelf([])
    with pytest.raises(Exception, match="must not hold"):
        pack({"a": [owner]}, without=owner)
    pack({"a": [1]}, without=owner)


def test_a_full_place_is_left_for_the_next_one(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    shelf = Shelf([str(tmp_path / "first"), str(tmp_path / "second")])
    real = shelf_module.reserve

    def reserve(descriptor, nbytes):
        if "first" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, nbytes)

    monkeypatch.setattr(shelf_module, "reserve", reserve)
    assert shelf.put("x", pack(LARGE))
    assert os.listdir(tmp_path / "first") == []
    assert np.array_equal(shelf.take("x"), LARGE)


def test_a_folder_that_is_gone_is_no_error():
    shelf = Shelf(["/nowhere"])
    assert shelf.take("x") is None
    assert not shelf.put("x", pack(LARGE))
    with shelf.claim("x"):
        pass
    shelf.remove(["x"])
    shelf.close()


def test_one_at_a_time_holds_a_claim(shelf):
    inside, order = threading.Event(), []

    def second():
        with shelf.claim("x"):
            order.append("second")

    with shelf.claim("x"):
        thread = threading.Thread(target=second)
        thread.start()
        with shelf.claim("another"):
            inside.set()
        assert not eventually(lambda: order, seconds=0.05)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def _hold(folders, held):
    with Shelf(folders).claim("x"):
        held.set()
        signal.pause()


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_claim_ends_with_its_process(shelf, kill):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=([str(folder) for folder in shelf._folders], held))
    process.start()
    assert held.wait(30)
    os.kill(process.pid, kill)
    with shelf.claim("x"):
        process.join(10)
    assert process.exitcode == -kill


def test_without_locks_of_files_threads_wait_for_each_other(shelf, monkeypatch):
    monkeypatch.setattr(shelf_module, "fcntl", None)
    test_one_at_a_time_holds_a_claim(shelf)


def test_a_late_writer_leaves_nothing(shelf):
    """A task of a call that failed may still run when the shelf is closed."""
    packed = pack(LARGE)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            shelf.put("x", packed)

    thread = threading.Thread(target=write)
    thread.start()
    assert eventually(lambda: shelf.take("x") is not None)
    shelf.close()
    stop.set()
    thread.join(10)
    assert not [path for path in resident_files() if os.path.isdir(path)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12: this process has threads
def test_a_forked_child_deletes_nothing(shelf):
    shelf.put("x", pack(1))
    child = os.fork()
    if child == 0:
        shelf.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert shelf.take("x") == 1


def test_folders_are_private_and_made_anew_when_they_were_removed(tmp_path):
    store = Store()
    try:
        (first,) = store.make_folders(str(tmp_path))
        assert os.stat(first).st_mode & 0o777 == 0o700
        shutil.rmtree(os.path.dirname(first))
        (second,) = store.make_folders(str(tmp_path))
        assert os.path.isdir(second)
    finally:
        store.close()


def test_what_lives_on_keeps_only_its_own_memory(shelf):
    shelf.put("x", pack([LARGE[:10].copy(), LARGE]))
    small, _ = shelf.take("x", mapped=False)
    owner = small
    while getattr(owner, "base", None) is not None:
        owner = owner.base
    assert memoryview(owner).nbytes == small.nbytes


def test_without_a_place_there_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="temp_folder"):
        Store().make_folders(str(tmp_path / "file"))

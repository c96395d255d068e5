"""A buffer on its way to the hosts of a Dask cluster, without a cluster."""

import os
import queue

import pytest
from conftest import LONG, eventually

pytest.importorskip("distributed", reason="the extra 'dask' is not installed")

from joblib_backends.cluster import spread as spreads
from joblib_backends.cluster.copies import Copy, _read_part
from joblib_backends.cluster.spread import Spread
from joblib_backends.crew import Crew
from joblib_backends.data.store import default_store


class FakeFuture:
    """A task that ends when its client says so."""

    def __init__(self, outcome=None):
        self.key = "key"
        self._outcome = outcome

    def done(self):
        return self._outcome is not None

    def result(self):
        return self._outcome

    def add_done_callback(self, callback):
        if self.done():
            callback(self)


class FakeClient:
    """Says what is asked of it. Copies are opened at once, and parts are never written."""

    def __init__(self):
        self.asked = queue.SimpleQueue()

    def submit(self, function, expression, arguments, **_):
        name = expression.partition(").")[2].partition("(")[0]
        self.asked.put(name)
        return FakeFuture(Copy("worker", "/copy") if name == "open_copy" else None)

    def scatter(self, parts, **_):
        return parts


@pytest.mark.parametrize("last", ["write_part", "fetch_copy"])
def test_a_buffer_is_brought_nowhere_when_nobody_has_it_any_more(monkeypatch, last):
    monkeypatch.setattr(spreads, "_LOOK_S", 0.01)
    monkeypatch.setattr(spreads, "nthreads", lambda *_: {"worker": 1})
    client, crew = FakeClient(), Crew.shared()
    resident = default_store().put(memoryview(bytes(1_000)), b"digest of what nobody needs")
    workers = {"here": ["worker"] if last == "fetch_copy" else [], "there": ["worker"]}
    spread = Spread(client, resident, workers.__getitem__, lambda *_: None, lambda: None, "here")
    spread.want("there")
    while client.asked.get(timeout=LONG) != last:
        pass
    assert spread._is_running
    del resident
    assert eventually(lambda: not spread._is_running)
    assert crew is Crew.shared()


reads_parts = pytest.mark.skipif(not hasattr(os, "pread"), reason="needs os.pread")


@pytest.fixture
def folder(tmp_path):
    """Return a folder that could be of a store."""
    folder = tmp_path / "joblib_backends-0-abc"
    folder.mkdir()
    return folder


@reads_parts
def test_parts_are_read_of_a_file_of_a_store():
    content = bytes(range(200))
    resident = default_store().put(memoryview(content), b"digest of what is read")
    assert _read_part(resident.path, 10, 20) == content[10:30]
    with pytest.raises(EOFError, match="fewer than 210 bytes"):
        _read_part(resident.path, 190, 20)


@reads_parts
@pytest.mark.parametrize("kind", ["elsewhere", "pipe", "folder", "link"])
def test_no_part_is_read_of_anything_else(folder, kind):
    path = folder / "00000001"
    if kind == "elsewhere":
        path = folder.parent / "secret"
        path.write_bytes(b"1")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(__file__)
    with pytest.raises((ValueError, OSError)) as caught:
        _read_part(str(path), 0, 1)
    assert str(path) in str(caught.value)

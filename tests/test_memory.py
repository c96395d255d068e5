"""Whether memory runs short: of the machine, or of a control group, and what that does to a call."""

import threading

import pytest
from joblib import Parallel, delayed, parallel_backend

from joblib_backends import memory
from joblib_backends.memory import MemoryWatch, available_nbytes, memory_nbytes


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch):
    memory._limiting_groups.cache_clear()
    monkeypatch.setattr(MemoryWatch, "_shared", None)
    yield
    memory._limiting_groups.cache_clear()


def group(folder, limit, used, inactive, version):
    """Make the files of a control group; return the line of ``/proc/self/cgroup`` for it."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    place = folder / "job" if version == 2 else folder / "memory" / "job"
    place.mkdir(parents=True)
    (place / names[0]).write_text(f"{limit}\n")
    (place / names[1]).write_text(f"{used}\n")
    prefix = "" if version == 2 else "total_"
    (place / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {inactive}\n")
    return "0::/job\n" if version == 2 else "9:memory:/job\n"


@pytest.fixture
def grouped(tmp_path, monkeypatch):
    """Have this process in a control group with the given numbers."""

    def put(limit, used, inactive=0, version=2):
        (tmp_path / "cgroup").write_text(group(tmp_path / "fs", limit, used, inactive, version))
        monkeypatch.setattr(memory, "_GROUPS", tmp_path / "fs")
        real = memory.Path

        class Path(type(real())):
            def __new__(cls, *parts):
                return real(tmp_path / "cgroup") if parts == ("/proc/self/cgroup",) else real(*parts)

        monkeypatch.setattr(memory, "Path", Path)
        memory._limiting_groups.cache_clear()

    return put


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_limits_memory(grouped, version):
    grouped(400_000_000, 350_000_000, 20_000_000, version)
    assert memory_nbytes() == 400_000_000
    assert available_nbytes() == 70_000_000


@pytest.mark.parametrize("limit", ["max", 2**62])
def test_a_group_without_a_limit_changes_nothing(grouped, limit):
    alone = memory_nbytes()
    grouped(limit, 350_000_000)
    assert memory_nbytes() == alone


def test_the_machine_has_memory():
    assert 0 < available_nbytes() <= memory_nbytes()


def test_memory_is_short_below_a_tenth_of_it(grouped, tmp_path, monkeypatch):
    grouped(1_000_000_000, 850_000_000)
    assert not MemoryWatch().is_short
    (tmp_path / "fs" / "job" / "memory.current").write_text("950000000")
    assert MemoryWatch().is_short


def test_where_the_system_does_not_tell_there_is_enough(monkeypatch):
    monkeypatch.setattr(memory, "available_nbytes", lambda: None)
    assert not MemoryWatch().is_short


def test_after_some_seconds_of_short_memory_one_more_may_start(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(memory, "available_nbytes", lambda: 1)
    watch = MemoryWatch()
    assert not watch.allows_another()
    now[0] += 6
    assert watch.allows_another()
    assert not watch.allows_another()
    monkeypatch.setattr(memory, "available_nbytes", lambda: 1 << 40)
    now[0] += 1
    assert watch.allows_another()


def meet(barrier, i):
    barrier.wait(60)
    return i


def test_tasks_that_wait_for_each_other_meet_although_memory_is_short(monkeypatch):
    monkeypatch.setattr(memory, "available_nbytes", lambda: 1)
    monkeypatch.setattr(memory, "_PATIENCE_S", 0.2)
    monkeypatch.setattr("joblib_backends.allotment.LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr("joblib_backends.allotment._NO_LOOK_AT_MEMORY_S", 0.0)
    barrier = threading.Barrier(2)
    with parallel_backend("hybrid", tier="threads", n_jobs=2):
        assert Parallel(batch_size=1, pre_dispatch=2)(delayed(meet)(barrier, i) for i in range(4)) == [0, 1, 2, 3]


class Peak:
    """Counts how many are inside at once."""

    def __init__(self):
        self.lock = threading.Lock()
        self.inside = self.most = 0

    def __call__(self, i):
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        threading.Event().wait(0.03)
        with self.lock:
            self.inside -= 1
        return i


@pytest.mark.parametrize(("nbytes", "most"), [(1, 2), (1 << 40, 4)])
def test_fewer_tasks_run_at_once_while_memory_is_short(monkeypatch, nbytes, most):
    """Those that started before the first look, at most a job's and its look-ahead, are left alone."""
    monkeypatch.setattr(memory, "available_nbytes", lambda: nbytes)
    monkeypatch.setattr("joblib_backends.allotment._NO_LOOK_AT_MEMORY_S", 0.0)
    peak = Peak()
    with parallel_backend("hybrid", tier="threads", n_jobs=4):
        assert Parallel(batch_size=1)(delayed(peak)(i) for i in range(30)) == list(range(30))
    assert peak.most <= most
    assert nbytes == 1 or peak.most > 1

"""What is known of a kind of task, and how much of it a file may be trusted with."""

import json
import logging
import os
import subprocess
import sys
import threading

import pytest
from conftest import LONG
from hypothesis import given
from hypothesis import strategies as st

from joblib_backends.config import profile_path
from joblib_backends.experience import BatchSeen, Experience, TierSeen, solo_seconds
from joblib_backends.profile import Profile

SLOW = Experience(0.5, 10, {"threads": 0.6, "inline": 0.5}, {"threads": 0.9, "inline": 1.0})
QUICK = Experience(1e-6, 5000, {"inline": 1e-6}, {"inline": 1.0})


def seen(tier, wall_s, cpu_s, n_tasks=1, delay_s=0.0, times=1, together=2):
    total = TierSeen()
    for _ in range(times):
        total.add(BatchSeen(tier, n_tasks, wall_s, cpu_s, delay_s, n_together=together))
    return total


# ---- what was seen


def test_the_calling_thread_shows_what_a_task_takes_alone():
    assert solo_seconds({"inline": seen("inline", 0.3, 0.1, n_tasks=3)}) == pytest.approx(0.1)


def test_threads_that_waited_for_the_gil_need_their_cpu_time_alone():
    assert solo_seconds({"threads": seen("threads", 0.2, 0.1, times=4)}) == pytest.approx(0.1)


def test_threads_that_waited_for_something_else_need_their_time_alone():
    assert solo_seconds({"threads": seen("threads", 0.2, 0.01, times=4)}) == pytest.approx(0.2)


def test_one_batch_alone_did_not_wait_for_the_gil():
    assert solo_seconds({"threads": seen("threads", 0.2, 0.1, together=1)}) == pytest.approx(0.2)


def test_the_first_of_many_threads_shows_the_gil_too():
    assert solo_seconds({"threads": seen("threads", 1.6, 0.1, together=16)}) == pytest.approx(0.1)


def test_the_time_of_a_busy_machine_is_not_a_tasks_own():
    busy = seen("threads", 1.0, 0.5, delay_s=0.5)
    assert (busy.task_s, busy.efficiency) == (pytest.approx(0.5), pytest.approx(1.0))


def test_nothing_is_known_of_nothing():
    assert solo_seconds({}) is None


def test_tasks_that_wait_fill_more_slots_than_there_are_cores():
    assert seen("inline", 1.0, 1.0).useful_slots(20, 2) == 2
    assert seen("inline", 1.0, 0.1).useful_slots(20, 2) == 20
    assert seen("inline", 1.0, 0.5).useful_slots(20, 2) == 4


@given(st.lists(st.tuples(st.floats(), st.floats(), st.floats()), max_size=20))
def test_whatever_a_clock_says_the_numbers_stay_numbers(times):
    total = TierSeen()
    for wall_s, cpu_s, delay_s in times:
        total.add(BatchSeen("threads", 1, wall_s, cpu_s, delay_s))
    assert 0 <= total.task_s < float("inf")
    assert total.efficiency >= 0
    assert 1 <= total.useful_slots(4, 2) <= 4


# ---- what was learned


def test_a_newer_call_counts_as_much_as_all_before():
    merged = SLOW.merged(Experience(0.1, 20, {"processes": 0.2}, {"processes": 1.0}))
    assert (merged.solo_s, merged.n_tasks) == (pytest.approx(0.3), 15)
    assert merged.task_s == {"threads": 0.6, "inline": 0.5, "processes": 0.2}


def test_experience_survives_a_file():
    assert Experience.from_dict(json.loads(json.dumps(SLOW.as_dict()))) == SLOW


BAD = [
    None,
    [],
    {},
    {**SLOW.as_dict(), "solo_s": -1},
    {**SLOW.as_dict(), "solo_s": "1"},
    {**SLOW.as_dict(), "solo_s": True},
    {**SLOW.as_dict(), "solo_s": float("nan")},
    {**SLOW.as_dict(), "n_tasks": float("inf")},
    {**SLOW.as_dict(), "task_s": [0.1]},
    {**SLOW.as_dict(), "task_s": {"threads": None}},
    {**SLOW.as_dict(), "task_s": {"threads": 1e300}},
    {**SLOW.as_dict(), "more": 1},
    {**SLOW.as_dict(), "n_tasks": 10**400},
    {**SLOW.as_dict(), "efficiency": {}},
    {name: value for name, value in SLOW.as_dict().items() if name != "pace_s"},
]


@pytest.mark.parametrize("data", BAD)
def test_what_is_not_experience_is_refused(data):
    with pytest.raises(ValueError, match=r"is not"):
        Experience.from_dict(data)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "profile-1.json"


def test_what_one_process_learned_the_next_one_knows(path):
    profile = Profile(path)
    assert profile.lookup("f") is None
    profile.learn("f", SLOW)
    profile.save()
    assert Profile(path).lookup("f") == SLOW


def test_two_processes_keep_what_both_learned(path):
    first, second = Profile(path), Profile(path)
    first.learn("f", SLOW)
    second.learn("g", QUICK)
    first.save()
    second.save()
    third = Profile(path)
    assert (third.lookup("f"), third.lookup("g")) == (SLOW, QUICK)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'{"version": 0, "kinds": {}}',
        b'{"version": 1}',
        b'{"version": 1, "kinds": []}',
        b'{"version": 1, "kinds": {"f": {"solo_s": -1}}}',
        b"[" * 100_000,
        b" " * 5_000_000,
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_one_debug_line_and_replaced(path, caplog, content):
    path.parent.mkdir()
    path.write_bytes(content)
    profile = Profile(path)
    with caplog.at_level(logging.DEBUG, "joblib_backends"):
        assert profile.lookup("f") is None
        assert profile.lookup("g") is None
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert str(path) in caplog.text
    profile.learn("f", SLOW)
    profile.save()
    assert Profile(path).lookup("f") == SLOW


def test_one_bad_entry_does_not_spoil_the_others(path, caplog):
    kinds = {"f": SLOW.as_dict(), "g": {**SLOW.as_dict(), "solo_s": 10**400}}
    path.parent.mkdir()
    path.write_text(json.dumps({"version": 1, "kinds": kinds}))
    with caplog.at_level(logging.DEBUG, "joblib_backends"):
        assert (Profile(path).lookup("f"), Profile(path).lookup("g")) == (SLOW, None)
    assert {record.levelname for record in caplog.records} == {"DEBUG"}


def test_a_time_that_is_next_to_nothing_is_nothing():
    assert Experience.from_dict({**SLOW.as_dict(), "solo_s": 1e-320}).solo_s == 0.0


def test_a_file_may_be_deleted_at_any_time(path):
    profile = Profile(path)
    profile.learn("f", SLOW)
    profile.save()
    path.unlink()
    assert profile.lookup("f") == SLOW
    profile.learn("g", QUICK)
    profile.save()
    assert Profile(path).lookup("g") == QUICK


def test_a_place_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").touch()
    profile = Profile(tmp_path / "file" / "profile-1.json")
    profile.learn("f", SLOW)
    with caplog.at_level(logging.DEBUG, "joblib_backends"):
        profile.save()
    assert "was not saved" in caplog.text
    assert profile.lookup("f") == SLOW


def test_no_half_written_file_is_left_or_seen(path):
    stop = threading.Event()
    wrong = []

    def read():
        while not stop.is_set():
            if path.exists() and Profile(path).lookup("f") is None:
                wrong.append("unreadable")

    reader = threading.Thread(target=read)
    reader.start()
    profile = Profile(path)
    for i in range(100):
        profile.learn("f", SLOW)
        profile.learn(f"kind {i}", QUICK)
        profile.save()
    stop.set()
    reader.join(LONG)
    assert wrong == []
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_only_so_many_kinds_are_kept(path):
    profile = Profile(path)
    for i in range(600):
        profile.learn(f"kind {i}", QUICK)
    profile.save()
    assert path.stat().st_size < 200_000
    assert Profile(path).lookup("kind 599") == QUICK
    assert Profile(path).lookup("kind 0") is None


def test_without_a_file_a_process_learns_for_itself():
    profile = Profile(None)
    profile.learn("f", SLOW)
    profile.save()
    assert profile.lookup("f") == SLOW


@pytest.mark.parametrize(
    ("variable", "expected"), [("off", None), ("0", None), ("/somewhere/x.json", "/somewhere/x.json")]
)
def test_a_variable_says_where_the_profile_is(monkeypatch, variable, expected):
    monkeypatch.setenv("JOBLIB_BACKEND_PROFILE", variable)
    assert profile_path() is None if expected is None else str(profile_path()) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the folder has another name")
def test_the_profile_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JOBLIB_BACKEND_PROFILE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profile_path() == tmp_path / "joblib_backends" / "profile-1.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profile_path() == tmp_path / ".cache" / "joblib_backends" / "profile-1.json"


SCRIPT = """
import os, joblib_backends
from joblib import Parallel, delayed, parallel_backend
with parallel_backend("hybrid", n_jobs=2):
    Parallel()(delayed(abs)(i) for i in range(200))
    {end}
"""


@pytest.mark.parametrize("end", ["pass", "os.fork() or os._exit(0); os.wait()"])
def test_a_script_leaves_what_it_learned_to_its_next_run(tmp_path, end):
    file = tmp_path / "profile.json"
    environment = {**os.environ, "JOBLIB_BACKEND_PROFILE": str(file)}
    subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], env=environment, check=True, timeout=LONG)
    kinds = json.loads(file.read_text())["kinds"]
    assert [name.partition("(")[0] for name in kinds] == ["builtins.abs"]
    assert next(iter(kinds.values()))["n_tasks"] == 200

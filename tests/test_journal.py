"""The file of a checkpoint: durable, private, never wrong. Writers are killed, disks are full."""

import contextlib
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from joblib_backends.checkpoint import database as connections
from joblib_backends.checkpoint import journal as journal_module
from joblib_backends.checkpoint import private
from joblib_backends.checkpoint.journal import Entry, FunctionSummary, Journal, prune, summary
from joblib_backends.errors import CheckpointError

VERSIONS = "python 3.11, scikit-learn 1.5"
FOREIGN = 12_345

needs_root = pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files to other users"
)


def key_of(i):
    return i.to_bytes(16, "big")


def result_of(i, nbytes=1_500):
    return random.Random(i).randbytes(nbytes)


def entry(i, nbytes=1_500, **changes):
    return Entry(key_of(i), 0, "fit", result_of(i, nbytes), 0.5)._replace(**changes)


def keys(*numbers):
    return [(key_of(i), 0) for i in numbers]


def found(journal, *numbers):
    """Return the numbers that are found, after a check that each result is the right one."""
    results = journal.find(keys(*numbers))
    assert all(result == result_of(int.from_bytes(key, "big"), len(result)) for (key, _), result in results.items())
    return sorted(int.from_bytes(key, "big") for key, _ in results)


def opened(path, versions=VERSIONS):
    return contextlib.closing(Journal(path, versions))


def filled(path, *numbers, **changes):
    with opened(path) as journal:
        journal.put([entry(i, **changes) for i in numbers])
    return path


@contextlib.contextmanager
def database(path):
    """Give the file to SQLite itself."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def child(code, *arguments):
    """Start an interpreter that runs ``code``."""
    return subprocess.Popen(
        [sys.executable, "-c", "import sys\nfrom test_journal import *\n" + code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )


def in_fork(work):
    """Return what ``work`` returns in a forked child, or the sentence that it raises."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads
        pid = os.fork()
    if not pid:
        try:
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return text


@pytest.fixture
def path(tmp_path):
    return tmp_path / "search.ckpt"


@pytest.fixture
def journal(path):
    with opened(path) as journal:
        yield journal


# ---- the contract


def test_what_was_put_is_found_by_key_and_occurrence(journal):
    journal.put([entry(1), entry(1, occurrence=1, result=b"second"), entry(2)])
    asked = [(key_of(1), 0), (key_of(1), 1), (key_of(1), 2), (key_of(3), 0)]
    assert journal.find(asked) == {(key_of(1), 0): result_of(1), (key_of(1), 1): b"second"}
    assert len(journal) == 3


def test_a_later_entry_replaces_an_earlier_one(journal):
    journal.put([entry(1, result=b"old")])
    journal.put([entry(1, result=b"new")])
    assert journal.find(keys(1)) == {(key_of(1), 0): b"new"}
    assert len(journal) == 1


@pytest.mark.parametrize("nbytes", [0, 1, 100_000, 3_000_000])
def test_results_of_any_size_come_back(journal, nbytes):
    journal.put([entry(1, nbytes)])
    assert journal.find(keys(1)) == {(key_of(1), 0): result_of(1, nbytes)}


def test_nothing_asked_is_nothing_found_and_nothing_put_is_no_error(journal):
    journal.put([])
    assert journal.find([]) == {}
    assert len(journal) == 0
    assert journal  # a journal without entries is not None


def test_more_keys_than_sqlite_has_variables_are_found(journal):
    journal.put([entry(i, 10) for i in range(40_000)])
    assert len(journal.find(keys(*range(40_000)))) == 40_000


def test_entries_are_there_for_the_next_one_who_opens_the_file(path):
    filled(path, 1, 2)
    with opened(path) as journal:
        assert found(journal, 1, 2, 3) == [1, 2]
        assert journal.set_aside is None


def test_a_closed_file_is_one_file(path):
    filled(path, 1)
    assert [name.name for name in path.parent.iterdir()] == ["search.ckpt"]


def test_closing_again_does_nothing_and_use_afterwards_is_an_error(journal):
    journal.close()
    journal.close()
    assert "closed" in repr(journal)
    for use in (lambda: journal.find(keys(1)), lambda: journal.put([entry(1)]), lambda: len(journal)):
        with pytest.raises(CheckpointError, match=r"is closed. Open a new one"):
            use()


def test_the_name_is_in_the_repr(journal, path):
    assert repr(journal) == f"<Journal {path}>"


def test_names_that_are_no_text_are_kept_as_well_as_they_can(path):
    with opened(path, "version \ud800") as journal:
        journal.put([entry(1, function="f\ud800")])
        assert found(journal, 1) == [1]
    assert summary(path).functions == {"f?": FunctionSummary(1, 0.5)}


@pytest.mark.parametrize("name", ["with space", "q?mode=memory&x=#%41", "ünï", os.fsdecode(b"\xff\xfe")])
def test_a_path_may_have_any_name(tmp_path, name):
    filled(tmp_path / name, 1)
    assert [os.fsencode(file.name) for file in tmp_path.iterdir()] == [os.fsencode(name)]


def test_an_occurrence_that_no_file_can_hold_is_an_error(journal):
    with pytest.raises(CheckpointError, match=r"cannot be read: .*too large"):
        journal.find([(key_of(1), 2**70)])
    with pytest.raises(CheckpointError, match=r"cannot be written: .*too big"):
        journal.put([entry(1, occurrence=2**63)])


def test_threads_put_and_find_at_once(journal):
    def work(part):
        for i in range(part, 100, 4):
            journal.put([entry(i, 200)])
            assert found(journal, i) == [i]

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found(journal, *range(100)) == list(range(100))


# ---- killed writers, two drivers, forks

WRITER = """
journal = Journal(sys.argv[1], "killed")
for i in range(int(sys.argv[2]), 10**9):
    journal.put([entry(i)])
    print(i, flush=True)
"""


@pytest.mark.parametrize("seed", range(10))
def test_what_was_put_before_a_kill_is_there(path, seed):
    with child(WRITER, path, 0) as process:
        assert process.stdout.readline() == "0\n"
        time.sleep(random.Random(seed).uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        done = [0, *map(int, process.stdout.read().split())]
    assert done == list(range(len(done)))
    with opened(path) as journal:
        assert found(journal, *done) == done
        assert len(journal) - len(done) in (0, 1)  # the last may not have been printed
        assert journal.set_aside is None
        journal.put([entry(10**9)])


def test_a_kill_while_the_file_is_made_leaves_one_that_can_be_used(tmp_path):
    rng = random.Random(0)
    loop = "for i in range(10**9): Journal(f'{sys.argv[1]}/{i}', '').close() or print(i, flush=True)"
    with child(loop, tmp_path) as process:
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
    for name in {file.name.partition("-")[0] for file in tmp_path.iterdir()}:
        filled(tmp_path / name, 1)


TWO = """
first = int(sys.argv[2])
sys.stdin.readline()
with opened(sys.argv[1]) as journal:
    for i in range(first, first + 100):
        journal.put([entry(i, 300)])
    print("put", flush=True)
    sys.stdin.readline()
    print(found(journal, *range(200)) == list(range(200)), flush=True)
"""


def test_two_drivers_add_to_one_file_and_see_each_others_entries(path):
    with child(TWO, path, 0) as one, child(TWO, path, 100) as other:
        for process in (one, other):
            process.stdin.write("\n")
            process.stdin.flush()
        assert [process.stdout.readline() for process in (one, other)] == ["put\n"] * 2
        assert [process.communicate("\n")[0] for process in (one, other)] == ["True\n"] * 2
    with opened(path) as journal:
        assert found(journal, *range(200)) == list(range(200))


OPENER = """
for i in range(20):
    sys.stdin.readline()
    with opened(f"{sys.argv[1]}/{i}") as journal:
        journal.put([entry(int(sys.argv[2]), 10)])
    print(i, flush=True)
"""


def test_two_drivers_may_make_the_file_at_the_same_moment(tmp_path):
    with child(OPENER, tmp_path, 0) as one, child(OPENER, tmp_path, 1) as other:
        for i in range(20):
            for process in (one, other):
                process.stdin.write("\n")
                process.stdin.flush()
            assert [process.stdout.readline() for process in (one, other)] == [f"{i}\n"] * 2
            with opened(tmp_path / str(i)) as journal:
                assert found(journal, 0, 1) == [0, 1]


def test_another_journal_of_this_process_does_not_break_the_locks_of_the_first(path, journal):
    """POSIX drops all locks of a process on a file when it closes any descriptor of it."""
    journal.put([entry(1)])
    with opened(path) as second:
        assert found(second, 1) == [1]
    assert summary(path).entries == 1
    with child(f"filled({str(path)!r}, 2)") as process:
        assert process.wait() == 0
    # The other one was not the last to close the file, so it left the -wal file that this one goes on with.
    assert Path(f"{path}-wal").exists()
    journal.put([entry(3)])
    with child(f"with opened({str(path)!r}) as journal: print(found(journal, 1, 2, 3))") as process:
        assert process.stdout.read() == "[1, 2, 3]\n"


def test_a_forked_child_neither_uses_nor_closes_the_file(path, journal):
    journal.put([entry(1)])
    for use in (lambda: journal.find(keys(1)), lambda: journal.put([entry(2)]), lambda: len(journal)):
        assert "CheckpointError" in in_fork(use)
        assert "because process" in in_fork(use)
    assert "start this one by another method than fork" in in_fork(lambda: Journal(path, ""))
    assert in_fork(journal.close) == "None"
    journal.put([entry(3)])
    assert found(journal, 1, 2, 3) == [1, 3]


def test_a_forked_child_may_use_another_file(tmp_path, journal):
    assert in_fork(lambda: len(Journal(tmp_path / "other", ""))) == "0"


def test_a_forked_child_that_ends_in_the_normal_way_leaves_the_file_alone(path):
    code = """
journal = Journal(sys.argv[1], "")
journal.put([entry(1)])
if os.fork():
    journal.close()
    with child(f"filled({sys.argv[1]!r}, 2)") as process:
        process.wait()
    os.wait()
else:
    time.sleep(1.0)
"""
    with child(code, path) as process:
        assert process.wait() == 0
    with opened(path) as journal:
        assert found(journal, 1, 2) == [1, 2]


def test_a_fork_under_the_lock_of_another_thread_does_not_hang(path, journal):
    with journal._lock, connections._files.lock:
        assert "CheckpointError" in in_fork(lambda: journal.find(keys(1)))
        assert in_fork(lambda: len(Journal(f"{path}.other", ""))) == "0"


@pytest.mark.parametrize("remove", [os.unlink, lambda path: os.rename(path, f"{path}.old")])
def test_a_file_that_was_removed_meanwhile_is_made_again(path, journal, remove):
    journal.put([entry(1)])
    remove(path)
    journal.put([entry(2)])
    journal.close()
    with opened(path) as again:
        assert found(again, 1, 2) == [2]


def test_an_entry_is_put_again_if_the_file_was_set_aside_at_that_moment(path, journal, monkeypatch):
    """The other driver has then copied the rows of the old file before this one was there."""
    insert = journal_module._insert

    def insert_and_lose(connection, rows, otherwise):
        monkeypatch.setattr(journal_module, "_insert", insert)
        insert(connection, rows, otherwise)
        os.rename(path, f"{path}.damaged")

    monkeypatch.setattr(journal_module, "_insert", insert_and_lose)
    journal.put([entry(1)])
    journal.close()
    with opened(path) as again:
        assert found(again, 1) == [1]


def test_each_commit_waits_for_the_disk(journal):
    connection = journal._connection()
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA mmap_size").fetchone() == (0,)


def test_a_driver_that_holds_the_file_too_long_is_named(path, journal, monkeypatch):
    monkeypatch.setattr(connections, "_BUSY_S", 0.05)
    with opened(path) as impatient, database(path) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(CheckpointError, match=r"written: database is locked. Another process holds it"):
            impatient.put([entry(1)])
        assert found(impatient, 1) == []
        holder.execute("ROLLBACK")
        impatient.put([entry(1)])
        assert found(impatient, 1) == [1]


# ---- who may have written it


def test_the_files_are_private_whatever_the_umask_says(path):
    before = os.umask(0)
    try:
        with opened(path) as journal:
            journal.put([entry(1)])
            modes = {name.name: stat.S_IMODE(name.stat().st_mode) for name in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"search.ckpt": 0o600, "search.ckpt-wal": 0o600, "search.ckpt-shm": 0o600}


def refused(path, match):
    before = {name: name.lstat().st_mtime_ns for name in path.parent.iterdir()}
    for use in (lambda: Journal(path, VERSIONS), lambda: summary(path), lambda: prune(path)):
        with pytest.raises(CheckpointError, match=match):
            use()
    assert {name: name.lstat().st_mtime_ns for name in path.parent.iterdir()} == before


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(path, mode):
    filled(path, 1).chmod(mode)
    refused(path, rf"{path} can be written by others, .* run code .* chmod go-w {path}")
    path.chmod(0o644)
    with opened(path) as journal:
        assert found(journal, 1) == [1]


@needs_root
def test_a_file_of_another_user_is_refused(path):
    os.chown(filled(path, 1), FOREIGN, FOREIGN)
    refused(path, rf"{path} belongs to user {FOREIGN}")


@pytest.fixture
def open_folder():
    """A folder that other users can reach, which pytest's are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def as_foreigner(work):
    """Do ``work`` in a child that is another user."""

    def change_user_and_work():
        os.chdir("/")
        os.setresgid(FOREIGN, FOREIGN, FOREIGN)
        os.setresuid(FOREIGN, FOREIGN, FOREIGN)
        return work()

    return in_fork(change_user_and_work)


@needs_root
def test_a_file_of_root_is_refused_by_others(open_folder):
    path = filled(open_folder / "search.ckpt", 1)
    path.chmod(0o644)
    assert f"{path} belongs to user 0" in as_foreigner(lambda: Journal(path, ""))


@pytest.mark.parametrize("is_dangling", [False, True])
def test_a_link_is_refused_and_not_followed(tmp_path, path, is_dangling):
    target = tmp_path / "target"
    if not is_dangling:
        filled(target, 1)
    path.symlink_to(target)
    refused(path, r"is a symbolic link, .* Give the path of the file itself")
    assert target.exists() is not is_dangling


def test_a_folder_or_a_pipe_in_its_place_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "folder", r"folder is not a regular file")
    refused(tmp_path / "pipe", r"pipe is not a regular file")


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_what_sqlite_reads_beside_the_file_is_refused_in_the_same_way(path, suffix):
    sibling = Path(f"{filled(path, 1)}{suffix}")
    sibling.symlink_to("/nowhere")
    refused(path, rf"{sibling} is a symbolic link")
    sibling.unlink()
    sibling.touch()
    sibling.chmod(0o666)
    refused(path, rf"{sibling} can be written by others")
    if os.getuid() == 0:
        sibling.chmod(0o600)
        os.chown(sibling, FOREIGN, FOREIGN)
        refused(path, rf"{sibling} belongs to user {FOREIGN}")


@pytest.mark.parametrize("mode", [0o777, 0o707])
def test_a_folder_in_which_others_can_replace_the_file_is_refused(tmp_path, path, mode):
    filled(path, 1)
    tmp_path.chmod(mode)
    refused(path, rf"others can write to its folder, .* chmod go-w {tmp_path}, or")


def test_a_folder_that_a_group_can_write_is_refused_unless_it_is_the_users_own_group(tmp_path, path, monkeypatch):
    tmp_path.chmod(0o770)
    monkeypatch.setattr(private, "_is_private_group", lambda group: False)
    refused(path, r"others can write to its folder")
    monkeypatch.setattr(private, "_is_private_group", lambda group: True)
    filled(path, 1)


def test_a_group_without_a_name_is_not_the_users_own():
    assert not private._is_private_group(987_654)


@needs_root
def test_a_folder_of_another_user_is_refused(tmp_path, path):
    filled(path, 1)
    os.chown(tmp_path, FOREIGN, FOREIGN)
    refused(path, rf"its folder belongs to user {FOREIGN}")
    os.chown(tmp_path, 0, 0)


def test_a_folder_like_tmp_is_no_reason_to_refuse(tmp_path, path):
    tmp_path.chmod(0o1777)
    filled(path, 1)
    with opened(path) as journal:
        assert found(journal, 1) == [1]
        assert sorted(name.name for name in tmp_path.iterdir()) == [f"search.ckpt{s}" for s in ("", "-shm", "-wal")]
    assert [name.name for name in tmp_path.iterdir()] == ["search.ckpt"]


def test_nobody_can_place_a_file_for_sqlite_while_it_opens_a_file_in_tmp(tmp_path, path, monkeypatch):
    tmp_path.chmod(0o1777)
    connect = connections.connect
    names = []

    def observed_connect(name):
        names.append(sorted(file.name.removeprefix("search.ckpt") for file in tmp_path.iterdir()))
        return connect(name)

    monkeypatch.setattr(connections, "connect", observed_connect)
    filled(path, 1)
    filled(path, 2)
    assert names == [["", "-journal"], ["", "-journal", "-shm", "-wal"]]
    with opened(path) as journal:
        assert found(journal, 1, 2) == [1, 2]


@needs_root
def test_what_was_placed_beside_the_file_nevertheless_is_refused_and_not_copied_into_it(path, monkeypatch):
    before, prepare = filled(path, 1).read_bytes(), connections._prepare

    def prepare_after_an_attack(connection, name):
        prepare(connection, name)
        os.chown(f"{name}-wal", FOREIGN, FOREIGN)

    leaked = []
    monkeypatch.setattr(connections, "_prepare", prepare_after_an_attack)
    monkeypatch.setattr(connections, "_keep_open", leaked.append)
    with pytest.raises(CheckpointError, match=rf"-wal belongs to user {FOREIGN}"):
        Journal(path, "")
    assert path.read_bytes() == before
    assert len(leaked) == 1
    leaked[0].close()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"there is no folder {tmp_path}/new. Make it, or"):
        Journal(tmp_path / "new" / "search.ckpt", "")


@pytest.mark.parametrize("path", ["/dev/null/x", "a\0b", "x" * 300])
def test_a_path_that_cannot_be_one_is_an_error_with_a_sentence(path, tmp_path):
    for use in (lambda: Journal(tmp_path / path, ""), lambda: summary(tmp_path / path)):
        with pytest.raises(CheckpointError, match=r"^The checkpoint .*(give|Give|Check)"):
            use()


def test_a_missing_file_has_no_summary(path):
    for use in (summary, prune):
        with pytest.raises(CheckpointError, match=r"no such file"):
            use(path)
    assert not path.exists()


# ---- files that are not ours


def patched(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize(
    "content", [b"x", b"col1,col2\n" * 100, b"SQLite format 3\0", b"\0" * 5_000], ids=["x", "csv", "magic", "zeros"]
)
def test_a_file_that_is_no_database_is_refused_and_stays(path, content):
    path.write_bytes(content)
    path.chmod(0o600)
    refused(path, r"is not used as a checkpoint, because it is not an SQLite database; it stays as it is")
    assert path.read_bytes() == content


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_database_of_another_program_is_refused_and_stays(path, mode):
    with database(path) as connection:
        connection.execute(f"PRAGMA journal_mode={mode}")
        connection.execute("CREATE TABLE t (x)")
    before = path.read_bytes()
    path.chmod(0o600)
    refused(path, r"database of another program")
    assert path.read_bytes() == before


def test_a_file_of_a_newer_format_is_refused_and_stays(path):
    with database(filled(path, 1)) as connection:
        connection.execute("PRAGMA user_version=2")
    before = path.read_bytes()
    refused(path, r"it has format 2, and this version of joblib_backends knows 1")
    assert path.read_bytes() == before


def test_a_newer_format_that_is_only_in_the_wal_file_is_refused(path, journal):
    with database(path) as connection:
        connection.execute("PRAGMA user_version=2")
        with pytest.raises(CheckpointError, match=r"it has format 2"):
            Journal(path, "")


def test_an_empty_file_becomes_a_checkpoint(path):
    path.touch(0o600)
    filled(path, 1)
    assert summary(path).entries == 1


def test_a_file_system_without_wal_mode_is_used_as_it_is(path, monkeypatch):
    """SQLite's way to lock by files named ``.lock`` has no shared memory."""
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **options: connect(f"{name}&vfs=unix-dotfile", **options))
    path.parent.chmod(0o1777)
    with opened(path) as journal:
        journal.put([entry(1)])
        assert found(journal, 1) == [1]
        assert not Path(f"{path}-wal").exists()
        assert Path(f"{path}-journal").read_bytes() == b""


# ---- damage


def damage_entry(path, number):
    """Change a byte of a result behind SQLite's back."""
    content = path.read_bytes()
    patched(path, content.index(result_of(number)[:200]) + 100, b"\xff\x00\xff")


def test_a_damaged_entry_is_absent_and_can_be_replaced(path):
    damage_entry(filled(path, 1, 2, 3), 2)
    with opened(path) as journal:
        assert found(journal, 1, 2, 3) == [1, 3]
        journal.put([entry(2)])
        assert found(journal, 1, 2, 3) == [1, 2, 3]
        assert journal.set_aside is None


def test_an_entry_of_another_type_is_absent(path):
    with database(filled(path, 1, 2, 3)) as connection:
        connection.execute("UPDATE entries SET result = 'text' WHERE key = ?", (key_of(1),))
        connection.execute("UPDATE entries SET checksum = NULL, function = x'ff', created = 'x' WHERE rowid = 2")
    with opened(path) as journal:
        assert found(journal, 1, 2, 3) == [3]
    assert (summary(path).entries, summary(path).damaged) == (1, 2)


def test_an_entry_under_the_key_of_another_is_absent(path):
    with database(filled(path, 1)) as connection:
        connection.execute("UPDATE entries SET key = ?", (key_of(2),))
    with opened(path) as journal:
        assert found(journal, 1, 2) == []


def spoil_in_the_middle(path):
    """Make one page of the table unreadable, in a file of 60 entries."""
    page = path.read_bytes().index(result_of(30)[:100]) // 4096 * 4096
    patched(path, page, b"\xee" * 64)


def test_a_malformed_file_is_set_aside_and_what_can_be_read_of_it_is_kept(path):
    spoil_in_the_middle(filled(path, *range(60)))
    with opened(path) as journal:
        there = found(journal, *range(60))
        assert 55 <= len(there) < 60
        assert {0, 59} <= set(there)
        assert f"is now {path}.damaged, and a new one has its {len(there)} entries" in journal.set_aside
        journal.put([entry(i) for i in range(60)])
        assert found(journal, *range(60)) == list(range(60))
    assert sorted(name.name for name in path.parent.iterdir()) == ["search.ckpt", "search.ckpt.damaged"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_malformation_is_noticed_by_put_too(path):
    filled(path, *range(60))
    with opened(path) as journal:
        # Its pages are read again because another process changed the file.
        with database(path) as other:
            other.execute("PRAGMA writable_schema=ON")
            other.execute("DELETE FROM sqlite_schema WHERE name='entries'")
            other.execute("PRAGMA schema_version=77")
        journal.put([entry(100)])
        assert journal.set_aside is not None
        assert found(journal, 100) == [100]


def test_a_name_that_is_taken_is_not_used_again(path):
    for name in (f"{path}.damaged", f"{path}.damaged-2"):
        patched(filled(path, 1), 100, b"\xff" * 50)
        with opened(path) as journal:
            assert f"is now {name}, and" in journal.set_aside
        assert Path(name).exists()


def test_a_file_whose_pages_are_cut_off_is_set_aside(path):
    filled(path, *range(60))
    os.truncate(path, 4096)
    with opened(path) as journal:
        assert found(journal, *range(60)) == []
        assert "damaged" in journal.set_aside


def test_what_a_killed_writer_left_in_the_wal_file_is_kept_too(path):
    filled(path, *range(60))
    with child(WRITER, path, 100) as process:
        while process.stdout.readline() != "120\n":
            pass
        process.kill()
        process.stdout.read()
    spoil_in_the_middle(path)
    with opened(path) as journal:
        assert set(found(journal, *range(121))) >= {0, 59, *range(100, 121)}
        assert journal.set_aside is not None


def test_the_driver_that_comes_second_takes_the_file_that_the_first_made_anew(path):
    filled(path, *range(60))
    with opened(path) as one, opened(path) as other:
        one.put([entry(60)])
        one._start_anew(sqlite3.DatabaseError("as if"))
        other.put([entry(61)])
        other._start_anew(sqlite3.DatabaseError("as if"))
        assert found(one, *range(62)) == found(other, *range(62)) == list(range(62))


def test_a_malformed_file_stays_where_it_is_for_a_summary(path):
    spoil_in_the_middle(filled(path, *range(60)))
    for use in (summary, prune):
        with pytest.raises(CheckpointError, match=r"malformed. Its file is damaged: a search that uses it goes on"):
            use(path)
    assert [name.name for name in path.parent.iterdir()] == ["search.ckpt"]


@st.composite
def damages(draw):
    """Return a function that damages bytes at random places; the first page is hit as often as all others."""
    spots = draw(st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.integers(0, 2)), min_size=1, max_size=6))
    chunk = draw(st.binary(min_size=1, max_size=40))

    def damage(content):
        for is_early, place, how in spots:
            at = int(place * min(len(content), 200 if is_early else len(content)))
            rest = {0: content[at + len(chunk) :], 1: b"" if not is_early else content[at:], 2: content[at:]}[how]
            content = content[:at] + (chunk if how != 1 else b"") + rest
        return content

    return damage


fuzz = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def check_never_wrong(path):
    """Open, find, put and find again: right results or absent ones or CheckpointError, and nothing else."""
    with contextlib.suppress(CheckpointError), opened(path) as journal:
        found(journal, *range(40))
        journal.put([entry(i, 700) for i in range(0, 40, 2)])
        assert set(found(journal, *range(40))) >= set(range(0, 40, 2))
    for use in (summary, prune):
        with contextlib.suppress(CheckpointError):
            use(path)


@pytest.fixture
def fuzz_path():
    """A path in memory where there is such a place, since hundreds of files wait for the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder) / "search.ckpt"


def emptied(path):
    for name in path.parent.iterdir():
        name.unlink()
    return path


def restored(path, contents):
    emptied(path)
    for suffix, content in contents.items():
        Path(f"{path}{suffix}").write_bytes(content)
        Path(f"{path}{suffix}").chmod(0o600)


@fuzz
@given(damage=damages())
def test_a_damaged_file_is_never_a_wrong_result(fuzz_path, damage):
    path = emptied(fuzz_path)
    filled(path, *range(40), nbytes=700)
    restored(path, {"": damage(path.read_bytes())})
    check_never_wrong(path)


@fuzz
@given(damage=damages())
def test_a_damaged_wal_file_is_never_a_wrong_result(fuzz_path, damage):
    path = emptied(fuzz_path)
    with opened(path) as journal:
        journal.put([entry(i, 700) for i in range(40)])
        contents = {suffix: Path(f"{path}{suffix}").read_bytes() for suffix in ("", "-wal")}
    restored(path, {"": contents[""], "-wal": damage(contents["-wal"])})
    check_never_wrong(path)


@fuzz
@given(content=st.binary(max_size=5_000), has_head=st.booleans())
def test_random_bytes_are_never_an_entry(fuzz_path, content, has_head):
    path = emptied(fuzz_path)
    head = filled(path).read_bytes()[:100] if has_head else b""
    restored(path, {"": head + content})
    check_never_wrong(path)


# ---- disks


@pytest.fixture
def small_place(tmp_path):
    """A file system of one megabyte."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def fill(place, leave=0):
    with open(place / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    with open(place / "filler", "r+b") as file:
        file.truncate(max(0, (place / "filler").stat().st_size - leave))


def test_a_full_disk_is_an_error_and_what_was_put_is_still_found(small_place):
    with opened(small_place / "search.ckpt") as journal:
        journal.put([entry(0)])
        fill(small_place)
        with pytest.raises(CheckpointError, match=r"written: database or disk is full. Make room on its disk"):
            journal.put([entry(i) for i in range(1, 50)])
        assert found(journal, *range(50)) == [0]
        (small_place / "filler").unlink()
        journal.put([entry(i) for i in range(1, 50)])
        assert found(journal, *range(50)) == list(range(50))


@pytest.mark.parametrize("leave", range(0, 13 * 4096, 4096))
def test_a_full_disk_is_no_signal_whatever_is_left_of_it(small_place, leave):
    path = filled(small_place / "search.ckpt", 0)
    fill(small_place, leave)
    problems = []
    try:
        with opened(path) as journal:
            assert found(journal, 0) == [0]
            journal.put([entry(i) for i in range(1, 50)])
    except CheckpointError as error:
        problems.append(str(error))
    assert all("room on" in problem for problem in problems)
    (small_place / "filler").unlink()
    with opened(path) as journal:
        assert found(journal, 0) == [0]


def test_a_file_that_nothing_could_be_written_to_is_used_when_there_is_room(small_place):
    fill(small_place)
    path = small_place / "search.ckpt"
    with pytest.raises(CheckpointError, match=r"cannot be read: .* room on"):
        Journal(path, "")
    (small_place / "filler").unlink()
    filled(path, 1)


def test_a_file_system_that_cannot_be_written_is_an_error(small_place):
    path = filled(small_place / "search.ckpt", 1)
    subprocess.run(["mount", "-o", "remount,ro", small_place], check=True)
    with pytest.raises(CheckpointError, match=r"allow it, or give another path"):
        Journal(path, "")


@needs_root
def test_in_a_file_that_its_user_cannot_write_entries_are_found(open_folder):
    """Root can write everything, so a child of another user has to try."""

    def read_only():
        path = filled(open_folder / "search.ckpt", 1)
        path.chmod(0o400)
        with opened(path) as journal:
            with pytest.raises(CheckpointError, match=r"readonly database. Its file or file system cannot be"):
                journal.put([entry(2)])
            return found(journal, 1, 2)

    os.chown(open_folder, FOREIGN, FOREIGN)
    assert as_foreigner(read_only) == "[1]"


# ---- summary and prune


def three_kinds(path, monkeypatch):
    """Two entries of ``fit`` that are old, one of ``score`` with other versions, one damaged."""
    now = time.time()
    with monkeypatch.context() as patch, opened(path, "old") as journal:
        patch.setattr(journal_module.time, "time", lambda: now - 1_000)
        journal.put([entry(1), entry(2)])
    with opened(path, "new") as journal:
        journal.put([entry(3, function="score", seconds=2.0), entry(4)])
    damage_entry(path, 4)
    return path


def test_a_summary_says_what_is_there(path, monkeypatch):
    content = summary(three_kinds(path, monkeypatch))
    assert (content.entries, content.nbytes, content.damaged) == (3, 4_500, 1)
    assert content.functions == {"fit": FunctionSummary(2, 1.0), "score": FunctionSummary(1, 2.0)}
    assert content.versions == {"old": 2, "new": 1}
    assert content.file_nbytes >= path.stat().st_size
    assert content.newest - content.oldest == pytest.approx(1_000, abs=100)


def test_a_summary_of_nothing(path):
    content = summary(filled(path))
    assert (content.entries, content.oldest, content.newest, content.functions) == (0, None, None, {})


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({}, [1, 2, 3]),
        ({"older_than_s": 500}, [3]),
        ({"older_than_s": 5_000}, [1, 2, 3]),
        ({"function": "score"}, [1, 2]),
        ({"other_than_versions": "old"}, [1, 2]),
        ({"function": "fit", "other_than_versions": "old"}, [1, 2, 3]),
        ({"function": "fit", "older_than_s": 500}, [3]),
        ({"everything": True}, []),
        ({"everything": True, "function": "score"}, []),
    ],
)
def test_pruning_deletes_what_all_conditions_are_true_of_and_the_damaged(path, monkeypatch, asked, left):
    assert prune(three_kinds(path, monkeypatch), **asked) == 4 - len(left)
    with opened(path) as journal:
        assert found(journal, 1, 2, 3, 4) == left
    assert summary(path).damaged == 0


def test_pruning_makes_the_file_smaller_even_while_it_is_open(path, journal):
    journal.put([entry(i, 20_000) for i in range(100)])
    assert prune(path, everything=True) == 100
    assert path.stat().st_size + Path(f"{path}-wal").stat().st_size < 50_000
    journal.put([entry(1)])
    assert found(journal, *range(100)) == [1]

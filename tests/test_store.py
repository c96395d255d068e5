"""Resident files: private, swept, never larger than there is room for. No worker is started."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from joblib_backends.data import store as store_module
from joblib_backends.data.hashing import digest_of
from joblib_backends.data.store import BufferRef, Store, map_buffer
from joblib_backends.errors import DataLostError, StoreError

LARGE = 100_000


@pytest.fixture
def store():
    store = Store()
    yield store
    store.close()


def put(store, content=b"x" * 1_000, **options):
    return store.put(memoryview(content), digest_of(content), **options)


def child(code, *arguments):
    """Start an interpreter that runs ``code`` and then waits for a line."""
    head = "import sys\nfrom joblib_backends.data.store import *\nfrom test_store import put\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code + "\nsys.stdin.readline()", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )


PLACE = "resident = put(default_store(), folder=sys.argv[1]); print(resident.path, flush=True)"


def test_files_and_folders_are_private(store, tmp_path):
    resident = put(store, folder=str(tmp_path))
    path = Path(resident.path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert (path.parent / "owner.lock").stat().st_mode & 0o777 == 0o600


def test_files_are_private_whatever_the_umask_says(store, tmp_path):
    before = os.umask(0)
    try:
        resident = put(store, folder=str(tmp_path))
    finally:
        os.umask(before)
    path = Path(resident.path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_folders_have_names_that_nobody_can_foresee(tmp_path):
    stores = [Store() for _ in range(3)]
    folders = {Path(put(store, folder=str(tmp_path)).path).parent.name for store in stores}
    assert len(folders) == 3
    assert all(len(name.rpartition("-")[2]) >= 8 for name in folders)
    for store in stores:
        store.close()


def test_a_file_goes_with_its_resident(store):
    resident = put(store)
    path = resident.path
    assert Path(path).read_bytes() == b"x" * 1_000
    del resident
    assert not Path(path).exists()
    assert store.residents == []


def test_a_closed_store_leaves_nothing(tmp_path):
    store = Store()
    resident = put(store, folder=str(tmp_path))
    store.close()
    assert list(tmp_path.iterdir()) == []
    assert "1000 B" in repr(resident)


def test_content_is_found_by_its_hash(store):
    resident = put(store)
    assert store.find(digest_of(b"x" * 1_000), 1_000) is resident
    assert store.find(digest_of(b"y" * 1_000), 1_000) is None
    assert (store.has_seen_size(1_000), store.has_seen_size(999)) == (True, False)


def test_a_shared_resident_is_not_found_since_tasks_change_it(store):
    resident = put(store, shared=True)
    assert store.find(resident.digest, 1_000) is None
    assert resident.ref().shared


@pytest.mark.parametrize("nbytes", [1, 1_000, LARGE])
@pytest.mark.parametrize("offset", [0, 1, 5_000])
def test_a_mapping_shows_the_bytes_from_its_offset(store, nbytes, offset):
    content = np.random.default_rng(0).bytes(offset + nbytes + 7)
    resident = put(store, content)
    assert bytes(map_buffer(resident.ref(offset, nbytes))) == content[offset : offset + nbytes]


@pytest.mark.parametrize("nbytes", [1_000, LARGE])
def test_changes_to_a_mapping_stay_there(store, nbytes):
    resident = put(store, b"x" * nbytes)
    map_buffer(resident.ref())[:3] = b"abc"
    assert bytes(map_buffer(resident.ref())[:3]) == b"xxx"


@pytest.mark.parametrize("nbytes", [1_000, LARGE])
def test_changes_to_a_shared_mapping_reach_its_other_mappings(store, nbytes):
    resident = put(store, b"x" * nbytes, shared=True)
    map_buffer(resident.ref())[:3] = b"abc"
    assert bytes(map_buffer(resident.ref())[:3]) == b"abc"


def test_a_file_that_is_too_short_is_an_error_and_not_wrong_data(store):
    resident = put(store)
    os.truncate(resident.path, 10)
    with pytest.raises(DataLostError, match=r"shorter than its content"):
        map_buffer(resident.ref())


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"/nowhere/0001"):
        map_buffer(BufferRef("/nowhere/0001", 0, 10))


def full(*places):
    """Return a ``posix_fallocate`` for which ``places`` have no room."""

    def fallocate(fd, offset, nbytes):
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.startswith(places):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fallocate


def test_a_full_shared_memory_falls_back_to_the_temporary_folder(store, monkeypatch):
    monkeypatch.delenv("JOBLIB_TEMP_FOLDER", raising=False)
    monkeypatch.setattr(os, "posix_fallocate", full("/dev/shm"))
    resident = put(store)
    assert resident.path.startswith(tempfile.gettempdir())
    assert bytes(map_buffer(resident.ref())) == b"x" * 1_000


def test_no_room_anywhere_is_an_error_that_names_bytes_and_places(store, monkeypatch):
    monkeypatch.delenv("JOBLIB_TEMP_FOLDER", raising=False)
    monkeypatch.setattr(os, "posix_fallocate", full("/"))
    with pytest.raises(StoreError, match=r"a buffer of 1000 bytes") as caught:
        put(store)
    assert f"/dev/shm: No space left on device; {tempfile.gettempdir()}: No space" in str(caught.value)
    assert "temp_folder" in str(caught.value)
    assert caught.value.errno == errno.ENOSPC


def test_a_failed_write_leaves_no_file(store, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "posix_fallocate", full(str(tmp_path)))
    with pytest.raises(StoreError, match=r"No space left"):
        put(store, folder=str(tmp_path))
    assert [path.name for path in tmp_path.glob("*/*")] == ["owner.lock"]


@pytest.fixture
def small_place(tmp_path):
    """A file system of one megabyte."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
    yield str(tmp_path)
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_place_that_is_really_full_is_noticed_before_anything_is_written(store, small_place):
    first = put(store, b"x" * 500_000, folder=small_place)
    with pytest.raises(StoreError, match=rf"2000000 bytes .{small_place}: No space left on device"):
        put(store, b"y" * 2_000_000, folder=small_place)
    assert bytes(map_buffer(first.ref())) == b"x" * 500_000
    assert put(store, b"z" * 300_000, folder=small_place).nbytes == 300_000


def test_a_temp_folder_that_cannot_be_used_is_named(store, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/below: Not a directory"):
        put(store, folder=str(tmp_path / "file" / "below"))


def test_a_temp_folder_is_made_if_it_is_missing(store, tmp_path):
    assert put(store, folder=str(tmp_path / "new" / "one")).path.startswith(str(tmp_path / "new" / "one"))


def test_a_folder_that_was_removed_meanwhile_is_made_again(store, tmp_path):
    """Tests and cleaners of /tmp remove folders; the next buffer must not fail for it."""
    first = put(store, folder=str(tmp_path))
    subprocess.run(["rm", "-r", Path(first.path).parent], check=True)
    second = put(store, b"y" * 10, folder=str(tmp_path))
    assert bytes(map_buffer(second.ref())) == b"y" * 10


def test_the_temp_folder_of_joblibs_variable_is_used(store, monkeypatch, tmp_path):
    monkeypatch.setattr(store_module, "temp_folder_from_environment", lambda: str(tmp_path))
    assert put(store).path.startswith(str(tmp_path))


def test_the_folder_of_a_killed_process_is_swept_by_the_next_start(store, tmp_path):
    with child(PLACE, str(tmp_path)) as process:
        path = Path(process.stdout.readline().strip())
        os.kill(process.pid, signal.SIGKILL)
    assert path.exists()
    put(store, folder=str(tmp_path))
    assert not path.parent.exists()


def test_the_folder_of_a_living_process_is_not_swept(store, tmp_path):
    with child(PLACE, str(tmp_path)) as process:
        path = Path(process.stdout.readline().strip())
        resident = put(store, folder=str(tmp_path))
        assert path.exists()
        process.communicate("\n")
    assert Path(resident.path).exists()
    assert not path.exists()


def test_the_folder_of_another_user_is_not_swept(store, tmp_path):
    if os.getuid():
        pytest.skip("only root can make a folder of another user")
    foreign = tmp_path / "joblib_backends-0-foreign"
    foreign.mkdir()
    (foreign / "owner.lock").touch()
    os.chown(foreign, 12_345, 12_345)
    put(store, folder=str(tmp_path))
    assert foreign.exists()


def test_a_link_in_the_place_of_a_folder_is_not_followed(store, tmp_path):
    target = tmp_path / "precious"
    target.mkdir()
    (target / "owner.lock").touch()
    (tmp_path / f"joblib_backends-{os.getuid()}-link").symlink_to(target)
    put(store, folder=str(tmp_path))
    assert target.exists()


def test_nothing_is_left_when_the_interpreter_ends(tmp_path):
    with child(PLACE, str(tmp_path)) as process:
        path = Path(process.stdout.readline().strip())
        assert path.exists()
        process.communicate("\n")
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_does_not_delete_its_parents_files(tmp_path):
    code = (
        "import os\nstore = default_store()\n"
        "resident = put(store, folder=sys.argv[1])\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    own = put(default_store(), folder=sys.argv[1])\n"
        "    assert default_store() is not store and os.path.exists(resident.path)\n"
        "    del resident; store.close(); sys.exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "print(resident.path, flush=True)"
    )
    with child(code, str(tmp_path)) as process:
        path = Path(process.stdout.readline().strip())
        assert [p.name for p in tmp_path.glob("*/0*")] == [path.name]
        process.communicate("\n")
    assert list(tmp_path.iterdir()) == []

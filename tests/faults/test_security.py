"""Who may read, write and connect: TLS of Dask, no open doors, private files, links that nobody follows."""

import contextlib
import gc
import json
import os
import pickle
import re
import sqlite3
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import xxhash
from certificates import make_certificates, needs_openssl, options_of, security_of
from clusters import HERE, LONG, ROOT, Cluster, Nursery, square, started, tasks_known_to
from conftest import eventually
from joblib import Parallel, delayed, parallel_backend

from joblib_backends import last_report
from joblib_backends.data.store import Store
from joblib_backends.errors import CheckpointWarning, ClusterUnavailableError, ConfigurationError, RecoveryWarning

distributed = pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
dask_config = pytest.importorskip("dask.config", reason="the extra 'dask' is not installed")

pytestmark = pytest.mark.timeout(120)

#: Seconds within which a client that is turned away must know, beyond those that it was told to wait.
PROMPT = 45.0

needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")

#: What the folders of this user's stores are called.
PREFIX = f"joblib_backends-{os.getuid()}-"


# ---- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Return two folders: with the certificates of the cluster, and with those of a stranger."""
    folder = tmp_path_factory.mktemp("certificates")
    return make_certificates(folder / "ours"), make_certificates(folder / "strangers")


@pytest.fixture(scope="module")
def tls_cluster(certificates, tmp_path_factory):
    ours, _ = certificates
    with contextlib.closing(Nursery()) as nursery:
        folder = tmp_path_factory.mktemp("cluster")
        cluster = Cluster(nursery, folder, 2, protocol="tls", options=options_of(ours), security=security_of(ours))
        try:
            yield cluster.ready()
        finally:
            cluster.close()


def squares(folder, n=12):
    return Parallel(n_jobs=2)(delayed(square)(i, str(folder), 0.0) for i in range(n))


SQUARES = [i * i for i in range(12)]


@needs_openssl
def test_a_tls_cluster_is_used_with_the_given_security(tls_cluster, certificates, tmp_path):
    assert tls_cluster.address.startswith("tls://")
    security = security_of(certificates[0])
    with parallel_backend("hybrid", scheduler=tls_cluster.address, security=security, fallback=False):
        assert squares(tmp_path) == SQUARES
        assert last_report().tier == "dask"


@needs_openssl
def test_a_tls_cluster_is_used_with_dasks_own_configuration(tls_cluster, certificates, tmp_path):
    ours, _ = certificates
    names = {"ca-file": "ca.pem", "client.cert": "cert.pem", "client.key": "key.pem"}
    settings = {f"distributed.comm.tls.{name}": str(ours / file) for name, file in names.items()}
    with (
        dask_config.set(settings),
        parallel_backend("hybrid", scheduler=tls_cluster.address, fallback=False),
    ):
        assert squares(tmp_path) == SQUARES
        assert last_report().tier == "dask"


def run_script(script, *arguments, **environment):
    """Run Python code in a process of its own, and return what it printed, as JSON."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(("JOBLIB", "DASK"))}
    paths = os.pathsep.join(map(str, (HERE, ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=inherited | {"PYTHONPATH": paths, "JOBLIB_BACKEND_PROFILE": "off"} | environment,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_openssl
def test_a_tls_cluster_is_used_by_an_unmodified_script_through_the_environment(tls_cluster, certificates, tmp_path):
    ours, _ = certificates
    script = """
        import json, sys
        import joblib_backends
        from clusters import square
        from joblib import Parallel, delayed
        results = Parallel(n_jobs=2)(delayed(square)(i, sys.argv[1], 0.0) for i in range(12))
        print(json.dumps([joblib_backends.last_report().tier, results]))
    """
    printed = run_script(
        f"import joblib_backends\n{textwrap.dedent(script)}",
        tmp_path,
        JOBLIB_BACKEND="hybrid",
        JOBLIB_BACKEND_SCHEDULER=tls_cluster.address,
        JOBLIB_BACKEND_FALLBACK="0",
        DASK_DISTRIBUTED__COMM__TLS__CA_FILE=str(ours / "ca.pem"),
        DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT=str(ours / "cert.pem"),
        DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY=str(ours / "key.pem"),
    )
    assert printed == ["dask", SQUARES]


def strangers(tls_cluster, certificates):
    """Return who is turned away: name -> (address, options, error, what it says)."""
    port = tls_cluster.address.rpartition(":")[2]
    theirs = {"security": security_of(certificates[1])}
    return {
        "no certificate": (tls_cluster.address, {}, ConfigurationError, "certificates in security="),
        "another authority's": (
            tls_cluster.address,
            theirs,
            ClusterUnavailableError,
            "security= have the certificates",
        ),
        "no TLS": (f"tcp://127.0.0.1:{port}", {}, ClusterUnavailableError, "wants TLS, does security= have"),
    }


@needs_openssl
@pytest.mark.parametrize("who", ["no certificate", "another authority's", "no TLS"])
def test_a_client_without_the_clusters_certificates_is_turned_away(tls_cluster, certificates, tmp_path, who):
    address, options, error, text = strangers(tls_cluster, certificates)[who]
    gc.collect()  # the connections of earlier tests
    begun = time.monotonic()
    with (
        pytest.raises(error, match=re.escape(text)) as caught,
        parallel_backend("hybrid", scheduler=address, wait_for_workers=1.0, fallback=False, **options),
    ):
        squares(tmp_path)
    assert time.monotonic() - begun < 1.0 + PROMPT
    assert address in str(caught.value)
    assert started(tmp_path) == []
    with tls_cluster.client() as client:
        assert client.run_on_scheduler(tasks_known_to) == []


@needs_openssl
@pytest.mark.parametrize("who", ["another authority's", "no TLS"])
def test_a_client_that_is_turned_away_runs_its_call_here_if_it_may(tls_cluster, certificates, tmp_path, who):
    address, options, _, text = strangers(tls_cluster, certificates)[who]
    gc.collect()  # the connections of earlier tests
    begun = time.monotonic()
    with (
        parallel_backend("hybrid", scheduler=address, wait_for_workers=1.0, **options),
        pytest.warns(RecoveryWarning, match=re.escape(text)),
    ):
        assert squares(tmp_path) == SQUARES
    assert time.monotonic() - begun < 2.0 + PROMPT
    assert "dask" not in last_report().tier


@needs_openssl
@pytest.mark.parametrize("who", ["no certificate", "another authority's"])
def test_a_connection_with_certificates_serves_nobody_without_them(tls_cluster, certificates, tmp_path, who):
    address, options, error, _ = strangers(tls_cluster, certificates)[who]
    allowed, refused = tmp_path / "allowed", tmp_path / "refused"
    allowed.mkdir()
    refused.mkdir()
    with parallel_backend("hybrid", scheduler=address, security=security_of(certificates[0]), fallback=False):
        assert squares(allowed) == SQUARES
        with (
            pytest.raises(error),
            parallel_backend("hybrid", scheduler=address, wait_for_workers=1.0, fallback=False, **options),
        ):
            squares(refused)
    assert started(refused) == []


# ---- doors


LISTENING = """
    import json, socket, sys
    import psutil
    import joblib_backends
    from clusters import hold, started, striking
    from joblib import Parallel, delayed, parallel_backend

    def doors(processes):
        found = []
        for process in processes:
            for connection in process.net_connections("all"):
                # A socket of the file system, or an abstract one, has a name; a pair has none.
                is_named = connection.family == socket.AF_UNIX and connection.laddr
                if connection.status == psutil.CONN_LISTEN or is_named:
                    found.append([process.pid, str(connection.laddr)])
        return found

    def look():
        me = psutil.Process()
        seen.extend([me, *me.children(recursive=True)])
        found.extend(doors(seen))
        open(f"{sys.argv[1]}/go", "w").close()

    seen, found = [], []
    with parallel_backend("hybrid", tier="processes", n_jobs=2):
        with striking(lambda: len(started(sys.argv[1])) == 2, look):
            Parallel()(delayed(hold)(i, sys.argv[1]) for i in range(4))
    with socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\\0door")
        control = doors([psutil.Process()])
    print(json.dumps([len(seen), found, len(control)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not show other processes' sockets")
def test_nothing_listens_while_worker_processes_run(tmp_path):
    n_processes, found, n_control = run_script(LISTENING, tmp_path)
    assert n_processes >= 4, "the driver, the fork server and two workers"
    assert found == []
    assert n_control == 2, "the look itself sees doors"


# ---- files


MODES = """
    import json, os, pathlib, sys, threading
    os.umask(0)
    import joblib_backends
    import numpy as np
    from clusters import Centred, Step
    from joblib import parallel_backend
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    place, seen, over = pathlib.Path(sys.argv[1]), {}, threading.Event()

    def watch():
        while not over.wait(0.002):
            for path in place.rglob("*"):
                try:
                    info = path.lstat()
                except OSError:
                    continue
                seen[str(path.relative_to(place))] = [oct(info.st_mode), info.st_uid]

    watcher = threading.Thread(target=watch)
    watcher.start()
    X, y = np.random.default_rng(0).random((2_000, 80)), np.arange(2_000) % 2
    options = {"temp_folder": str(place / "temp"), "checkpoint": str(place / "checkpoints" / "search.ckpt")}
    with parallel_backend("hybrid", tier=sys.argv[2], n_jobs=2, **options):
        GridSearchCV(make_pipeline(Centred(), Step()), {"step__c": list(range(6))}, cv=2, refit=False).fit(X, y)
        shared = joblib_backends.last_report().fits_shared
    over.set()
    watcher.join()
    print(json.dumps([shared, seen]))
"""


@pytest.mark.parametrize("tier", ["threads", "processes"])
def test_every_file_of_a_search_is_private_whatever_the_umask(tmp_path, tier):
    for name in ("temp", "checkpoints"):
        (tmp_path / name).mkdir(mode=0o700)
    shared, seen = run_script(MODES, tmp_path, tier)
    assert shared > 0
    ours = {name: (int(mode, 8), uid) for name, (mode, uid) in seen.items() if "/" in name}
    kinds = {"resident": r"temp/[^/]+/0\d+$", "shared": r"temp/[^/]+/0\d+/.", "checkpoint": r"checkpoints/search.ckpt$"}
    for kind, pattern in kinds.items():
        if kind != "resident" or tier == "processes":
            assert any(re.match(pattern, name) for name in ours), (kind, sorted(ours))
    for name, (mode, uid) in ours.items():
        allowed = 0o700 if stat.S_ISDIR(mode) else 0o600
        assert (stat.S_IMODE(mode), uid) == (allowed, os.getuid()), name


def test_no_two_folders_of_stores_have_a_name_that_the_other_tells(tmp_path):
    stores = [Store() for _ in range(8)]
    kept = [store.put(memoryview(b"a" * 100), b"digest", folder=str(tmp_path)) for store in stores]
    names = {Path(resident.path).parent.name.removeprefix(PREFIX) for resident in kept}
    assert len(names) == 8
    assert all(len(name) >= 8 for name in names)
    for store in stores:
        store.close()


# ---- links


@pytest.fixture
def victim(tmp_path):
    """Return a folder whose content must stay, laid out as one of a store that has died."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "owner.lock").write_text("")
    (folder / "precious").write_text("kept")
    return folder


def sweep(place):
    """Have a new store make its folder in ``place``, before which it sweeps there."""
    store = Store()
    resident = store.put(memoryview(b"content"), b"digest", folder=str(place))
    assert Path(resident.path).read_bytes() == b"content"
    store.close()


def test_a_link_in_the_place_of_a_stores_folder_is_not_swept(tmp_path, victim):
    place = tmp_path / "place"
    place.mkdir()
    (place / f"{PREFIX}abcdefgh").symlink_to(victim)
    sweep(place)
    assert (victim / "precious").read_text() == "kept"


def test_a_dead_stores_folder_is_swept_and_a_link_inside_is_not_followed(tmp_path, victim):
    dead = tmp_path / "place" / f"{PREFIX}abcdefgh"
    dead.mkdir(parents=True, mode=0o700)
    (dead / "owner.lock").write_text("")
    (dead / "folder").symlink_to(victim)
    (dead / "00000001").symlink_to(victim / "precious")
    sweep(dead.parent)
    assert not dead.exists()
    assert (victim / "precious").read_text() == "kept"


def test_a_lock_that_is_a_link_is_not_opened(tmp_path, victim):
    planted = tmp_path / "place" / f"{PREFIX}abcdefgh"
    planted.mkdir(parents=True)
    (planted / "owner.lock").symlink_to(victim / "precious")
    sweep(planted.parent)
    assert (planted / "owner.lock").is_symlink()
    assert (victim / "precious").read_text() == "kept"


@needs_root
def test_a_folder_of_another_user_is_not_swept(tmp_path):
    foreign = tmp_path / "place" / f"{PREFIX}abcdefgh"
    foreign.mkdir(parents=True)
    (foreign / "owner.lock").write_text("")
    os.chown(foreign, 12345, 12345)
    sweep(foreign.parent)
    assert (foreign / "owner.lock").exists()


def test_a_link_that_is_planted_as_a_stores_next_file_is_not_written_through(tmp_path, victim):
    store = Store()
    first = Path(store.put(memoryview(b"first"), b"1", folder=str(tmp_path / "place")).path)
    following = first.with_name(f"{int(first.name) + 1:08d}")
    following.symlink_to(victim / "precious")
    with contextlib.suppress(OSError):
        store.put(memoryview(b"second"), b"2", folder=str(tmp_path / "place"))
    assert (victim / "precious").read_text() == "kept"
    store.close()


# ---- checkpoints


def checkpointed(path, folder):
    with parallel_backend("hybrid", tier="processes", checkpoint=path):
        return squares(folder)


@pytest.mark.parametrize("leads_to", ["a file", "a checkpoint", "nothing"])
def test_a_checkpoint_that_is_a_link_is_neither_read_nor_written(tmp_path, leads_to):
    target, link = tmp_path / "target", tmp_path / "search.ckpt"
    if leads_to == "a file":
        target.write_text("kept")
    elif leads_to == "a checkpoint":
        checkpointed(target, tmp_path)
        # Closed with its context, which a thread that is on its way out may still hold.
        assert eventually(lambda: not Path(f"{target}-wal").exists())
    content = target.read_bytes() if target.exists() else None
    n_run = len(started(tmp_path))
    link.symlink_to(target)
    with pytest.warns(CheckpointWarning, match=r"search.ckpt is a symbolic link"):
        assert checkpointed(link, tmp_path) == SQUARES
    assert len(started(tmp_path)) == n_run + 12, "all tasks ran"
    assert (target.read_bytes() if target.exists() else None) == content


class Bomb:
    """Its pickle makes a file where it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def armed(tmp_path):
    """Return a checkpoint with a bomb in the place of each result, and what it makes when it goes off."""
    path, marker = tmp_path / "folder" / "search.ckpt", tmp_path / "went off"
    path.parent.mkdir(mode=0o700)
    checkpointed(path, tmp_path)
    result = pickle.dumps(Bomb(marker))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for key, occurrence in connection.execute("SELECT key, occurrence FROM entries").fetchall():
            checksum = xxhash.xxh3_128(occurrence.to_bytes(8, "little", signed=True) + key + result).digest()
            connection.execute("UPDATE entries SET result = ?, checksum = ? WHERE key = ?", (result, checksum, key))
    return path, marker


def test_the_bomb_of_these_tests_goes_off_where_the_file_is_trusted(armed, tmp_path):
    path, marker = armed
    assert checkpointed(path, tmp_path) == [None] * 12
    assert marker.exists()


def give_to_another(path):
    os.chown(path, 12345, -1)


@pytest.mark.parametrize(
    ("open_up", "reason"),
    [
        (lambda path: path.chmod(0o602), "can be written by others"),
        (lambda path: path.chmod(0o620), "can be written by others"),
        (lambda path: path.parent.chmod(0o707), "others can write to its folder"),
        pytest.param(give_to_another, "belongs to user 12345, who can change it", marks=needs_root),
        pytest.param(lambda path: give_to_another(path.parent), "its folder belongs to user 12345", marks=needs_root),
        (lambda path: _sibling(path, "-wal").chmod(0o666), "-wal can be written by others"),
        (lambda path: _sibling(path, "-journal").chmod(0o666), "-journal can be written by others"),
    ],
    ids=["others", "group", "folder", "owner", "folder's owner", "wal", "journal"],
)
def test_a_checkpoint_that_others_can_write_is_not_unpickled(armed, tmp_path, open_up, reason):
    path, marker = armed
    open_up(path)
    with pytest.warns(CheckpointWarning, match=reason):
        assert checkpointed(path, tmp_path) == SQUARES
    assert not marker.exists()


def _sibling(path, suffix):
    sibling = path.with_name(path.name + suffix)
    sibling.touch()
    return sibling

"""What travels to a Dask cluster arrives whole, by source, and without what only the client has."""

import gc
import pickle
import subprocess
import sys
import weakref
import zipfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest

import joblib_backends

pytest.importorskip("distributed", reason="the extra 'dask' is not installed")

from joblib_backends.cluster import abroad, travel
from joblib_backends.cluster.accounting import CountOwnMemory, CountOwnMemoryOfWorker
from joblib_backends.cluster.outfit import Outfit
from joblib_backends.cluster.placement import Placement
from joblib_backends.cluster.travel import FromSource, by_name, luggage, made_from_source, zipped_package
from joblib_backends.cluster.versions import differences, lacking, what_differs, what_lacks
from joblib_backends.data.hashing import digest_of

PACKAGE = Path(joblib_backends.__file__).parent

#: Runs what is hidden away from everything that a Dask worker may be without.
HIDING = """
import sys
class Hiding:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in {hidden!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hiding)
sys.path.insert(0, {path!r})
"""


def run(program, *, hidden, path=PACKAGE.parent):
    """Return what a program prints in an interpreter that cannot import what is hidden."""
    whole = HIDING.format(hidden=set(hidden), path=str(path)) + program
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- the zip


def test_the_zip_holds_every_module_and_is_the_same_each_time():
    zipped = zipped_package()
    with zipfile.ZipFile(BytesIO(zipped.content)) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    metadata = held.pop(f"joblib_backends-{joblib_backends.__version__}.dist-info/METADATA").decode()
    assert metadata.endswith(f"\nName: joblib-backends\nVersion: {joblib_backends.__version__}\n")
    assert held == {f"joblib_backends/{p.relative_to(PACKAGE)}": p.read_bytes() for p in PACKAGE.rglob("*.py")}
    zipped_package.cache_clear()
    assert zipped_package() == zipped


def test_the_zip_can_be_imported_and_travel_on(tmp_path):
    zipped = zipped_package()
    path = tmp_path / f"{zipped.source}.zip"
    path.write_bytes(zipped.content)
    program = (
        "from joblib_backends.cluster.travel import zipped_package, luggage; import hashlib, pickle; "
        "pickle.dumps(luggage('topic', {})); zipped = zipped_package(); "
        "print(zipped.source, hashlib.md5(zipped.content).hexdigest())"
    )
    here = run(program, hidden=(), path=PACKAGE.parent)
    assert run(program, hidden=(), path=path) == here
    assert here.split()[0] == zipped.source


def test_what_has_travelled_has_its_own_version_also_where_another_is_installed(tmp_path, monkeypatch):
    before = zipped_package()
    zipped_package.cache_clear()
    monkeypatch.setattr(travel, "version", lambda: "7.8.dev9+g12ab")
    zipped = zipped_package()
    zipped_package.cache_clear()
    # The same commit, installed as two versions, is the same source.
    assert zipped.source == before.source
    path = tmp_path / f"{zipped.source}.zip"
    path.write_bytes(zipped.content)
    assert run("import joblib_backends; print(joblib_backends.__version__)", hidden=(), path=path) == "7.8.dev9+g12ab"


def test_another_source_has_another_hash():
    sources = abroad.sources_in(PACKAGE)
    changed = {**sources, "remote.py": sources["remote.py"] + b"\n"}
    moved = {"elsewhere.py" if name == "remote.py" else name: content for name, content in sources.items()}
    hashes = {abroad.hash_of(one) for one in (sources, changed, moved)}
    assert len(hashes) == 3
    assert abroad.source_of("joblib_backends") == abroad.hash_of(sources)


# ---- what the scheduler and a worker read


@pytest.mark.parametrize("name", ["survey", "make_way", "remove_worker", "Arrival"])
def test_what_travels_by_source_is_read_where_nothing_of_ours_is(name):
    pickled = pickle.dumps(FromSource(getattr(abroad, name)))
    hidden = {"joblib_backends", "joblib", "numpy", "xxhash", "loky", "threadpoolctl"}
    assert run(f"import pickle; print(pickle.loads({pickled!r}).__name__)", hidden=hidden) == name


def test_the_plugin_arrives_with_all_that_it_carries():
    plugin = luggage("topic", {"joblib": "joblib"})
    arrived = pickle.loads(pickle.dumps(plugin))
    assert vars(arrived) == {name: value for name, value in vars(plugin).items() if name != "name"}
    assert type(arrived).__module__ == "joblib_backends_cluster_abroad"


def test_a_batch_is_found_by_name_where_it_runs():
    call = pickle.dumps((eval, by_name(digest_of, b"content")))
    hidden = {"joblib_backends", "numpy", "xxhash", "loky", "threadpoolctl"}
    assert run(f"import pickle; print(pickle.loads({call!r})[0].__name__)", hidden=hidden) == "eval"
    function, args = pickle.loads(call)
    assert function(*args) == digest_of(b"content")


def test_shared_memory_is_taken_off_once_though_the_plugins_come_twice(monkeypatch):
    worker = SimpleNamespace(monitor=SimpleNamespace(get_process_memory=lambda: 1_000))
    looks = []
    callback = SimpleNamespace(callback=lambda: looks.append("looked"))
    nanny = SimpleNamespace(periodic_callbacks={"memory_monitor": callback})
    for _ in range(2):
        for kind, where in ((CountOwnMemory, worker), (CountOwnMemoryOfWorker, nanny)):
            # As two clients send it: each time another module.
            plugin = pickle.loads(pickle.dumps(made_from_source(kind)))
            namespace = type(plugin).setup.__globals__
            monkeypatch.setitem(namespace, "_shared_nbytes", lambda _: 300)
            monkeypatch.setitem(namespace, "_is_beyond_limit", lambda _: looks.append("asked") or True)
            plugin.setup(where)
    assert worker.monitor.get_process_memory() == 700
    callback.callback()
    assert looks == ["asked", "looked"]


# ---- what a worker may be without


def test_what_runs_on_workers_needs_neither_xxhash_nor_loky_nor_threadpoolctl():
    program = "import joblib_backends.remote, joblib_backends.cluster.exchange, sys; print(joblib_backends.__version__)"
    hidden = {"xxhash", "loky", "threadpoolctl"}
    assert run(program, hidden=hidden) == joblib_backends.__version__


@pytest.mark.parametrize("sender", [(), ("xxhash",)])
@pytest.mark.parametrize("receiver", [(), ("xxhash",)])
def test_pickles_are_read_with_and_without_xxhash(sender, receiver):
    make = "from joblib_backends.data.hashing import checksum; print(checksum(b'pickled').hex())"
    made = run(make, hidden=sender)
    compare = (
        f"from joblib_backends.data.hashing import is_intact; made = bytes.fromhex({made!r}); "
        "print(is_intact(b'pickled', made), is_intact(b'damaged', made))"
    )
    # What xxhash has signed cannot be told from damage without it.
    can_tell = sender or not receiver
    assert run(compare, hidden=receiver) == f"True {not can_tell}"


def test_calls_on_every_local_tier_work_without_what_only_the_client_has():
    program = """
from joblib import Parallel, delayed, parallel_backend
import joblib_backends
for tier in ("inline", "threads", "processes"):
    with parallel_backend("hybrid", n_jobs=2, tier=tier, inner_max_num_threads=1):
        assert Parallel()(delayed(pow)(i, 2) for i in range(8)) == [i * i for i in range(8)], tier
print("done")
"""
    assert run(program, hidden={"xxhash", "loky", "threadpoolctl"}) == "done"


# ---- versions


def report(source="a", imported=None, missing=(), **versions):
    return {"source": source, "imported": imported, "missing": list(missing), "versions": versions}


OWN = report(imported="0.1.0", Python="3.11", numpy="2.3.1", scipy="1.16.0", joblib="1.6.0")


@pytest.mark.parametrize(
    "there",
    [
        report(Python="3.11", numpy="2.3.4"),
        report(pandas="1.0"),
        report(source="b"),
        report(imported="0.1.0"),
        report(source=None),
    ],
    ids=["a bug-fix release", "only there", "not imported yet", "the same source", "without our package"],
)
def test_what_does_not_matter_is_not_said(there):
    assert differences(OWN, {"tcp://a": there}, "ours") == {}


class FakeClient:
    """Has one handler for a topic, as Dask's."""

    def __init__(self):
        self.handlers = {}

    def subscribe_topic(self, topic, handler):
        self.handlers[topic] = handler


def test_all_outfits_of_a_client_hear_what_a_worker_has_and_it_keeps_none_of_them():
    client = FakeClient()
    first, second, third = (Outfit(client, 1.0, Placement(priority=priority)) for priority in range(3))
    for one in (first, second, third):
        one._listen()
    [(topic, handler)] = client.handlers.items()
    ended = weakref.ref(third)
    del one, third
    gc.collect()
    assert ended() is None
    handler((0.0, {"address": "tcp://a", "report": OWN}))
    assert first._cluster.reports == second._cluster.reports == {"tcp://a": OWN}
    assert topic.startswith("joblib_backends")


def test_all_that_differs_is_one_sentence():
    reports = {
        "tcp://a": report(Python="3.12", numpy="1.26.4"),
        "tcp://b": report(Python="3.11", numpy="1.26.4"),
        "tcp://c": report(source="b", imported="0.0.9"),
        "tcp://d": report(source="b", imported="0.1.0"),
    }
    assert what_differs(differences(OWN, reports, "ours"), 4, "ours") == (
        "Dask workers have other versions than this process, so tasks may fail there or give other results: "
        "Python 3.12 on 1 of 4 workers (tcp://a) and 3.11 here; "
        "numpy 1.26.4 on 2 of 4 workers (tcp://a, tcp://b) and 2.3.1 here; "
        "ours 0.0.9 on 1 of 4 workers (tcp://c) and 0.1.0 here; "
        "ours 0.1.0 (of other source) on 1 of 4 workers (tcp://d) and 0.1.0 here; "
        "install the same versions there and restart those workers, which had imported ours before this client came."
    )


def test_of_many_workers_the_sentence_says_how_many():
    reports = {f"tcp://{i}": report(missing=["joblib", "pandas"]) for i in range(100)}
    assert what_lacks(lacking(reports), 100, OWN) == (
        "Dask workers lack what every task needs: joblib on 100 of 100 workers; install joblib==1.6.0 there, as it is "
        "here."
    )

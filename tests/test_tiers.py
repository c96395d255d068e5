"""The table of tiers, and a tier of a third party."""

import sys
import types
from concurrent.futures import Future

import pytest
from conftest import TIERS
from joblib import Parallel, delayed, effective_n_jobs, parallel_backend

import joblib_backends
from joblib_backends import ConfigurationError, HybridBackend, last_report
from joblib_backends.config import Config
from joblib_backends.errors import MissingDependencyError
from joblib_backends.tiers import Tier, base, load_tier, register_tier, tier_names
from joblib_backends.tiers.fake import FakeTier, fake_control
from joblib_backends.worker import run_here, run_payload, unpack


@pytest.fixture(autouse=True)
def _table_unchanged(monkeypatch):
    monkeypatch.setattr(base, "_TABLE", dict(base._TABLE))


class Elsewhere(Tier):
    """A whole tier of a third party: batches travel as payloads and run where ``submit`` is called."""

    name = "elsewhere"
    shares_memory = False
    log = ()

    @classmethod
    def capacity(cls, config):
        return 7

    def __init__(self, config, n_jobs):
        type(self).log = self.calls = [f"open {n_jobs}"]

    def submit(self, work):
        future = Future()
        future.set_result(unpack(run_payload(work.payload.wire, owns_process=False)))
        return future

    def outcome(self, future):
        return future.result()

    def abort(self):
        self.calls.append("abort")

    def close(self):
        self.calls.append("close")


class Minimal(Elsewhere):
    name = "minimal"
    shares_memory = True

    def submit(self, work):
        future = Future()
        future.set_result(run_here(work.function, work.share, None))
        return future


class NoTier:
    pass


def square(i):
    return i * i


def fails(i):
    raise KeyError(i)


@pytest.mark.parametrize("kind", [Elsewhere, Minimal])
@pytest.mark.parametrize("form", ["list", "generator", "generator_unordered"])
def test_a_tier_of_a_third_party_works_end_to_end(kind, form):
    joblib_backends.register_tier("elsewhere", f"{__name__}:{kind.__name__}")
    with parallel_backend("hybrid", tier="elsewhere"):
        assert effective_n_jobs(-1) == 7
        assert sorted(Parallel(return_as=form)(delayed(square)(i) for i in range(30))) == [i * i for i in range(30)]
    assert (last_report().tier, last_report().n_jobs) == ("elsewhere", 7)
    assert kind.log == ["open 7", "close"]


def test_a_tier_of_a_third_party_is_told_of_an_abort():
    register_tier("elsewhere", f"{__name__}:Elsewhere")
    with parallel_backend("hybrid", tier="elsewhere", n_jobs=2), pytest.raises(KeyError):
        Parallel()(delayed(fails)(i) for i in range(4))
    assert Elsewhere.log == ["open 2", "abort", "close"]


def test_a_registered_tier_is_among_the_names():
    register_tier("elsewhere", f"{__name__}:Elsewhere")
    assert tier_names() == ["auto", *sorted([*TIERS, "elsewhere", *(set(base._TABLE) - {*TIERS, "elsewhere"})])]
    assert load_tier("elsewhere") is Elsewhere


@pytest.mark.parametrize(
    ("name", "path"),
    [("auto", "module:Class"), ("", "module:Class"), ("x", "module"), ("x", "module:"), ("x", ":Class"), ("x", "")],
)
def test_a_name_or_path_that_cannot_work_is_refused_at_once(name, path):
    with pytest.raises(ConfigurationError, match="cannot be registered: give a name other than 'auto' and a path"):
        register_tier(name, path)


@pytest.mark.parametrize("path", [f"{__name__}:NoTier", f"{__name__}:square", f"{__name__}:__name__"])
def test_a_class_that_is_no_tier_is_refused_when_used(path):
    register_tier("wrong", path)
    with pytest.raises(ConfigurationError, match=r"The tier 'wrong' at .* which is not a Tier"):
        load_tier("wrong")


def test_a_class_that_does_not_exist_is_refused_when_used():
    register_tier("wrong", f"{__name__}:Nowhere")
    with pytest.raises(ConfigurationError, match=r"The tier 'wrong' at .* has no attribute 'Nowhere'"):
        load_tier("wrong")


def test_a_module_that_does_not_exist_is_a_missing_dependency():
    register_tier("wrong", "no_such_package.module:Class")
    with pytest.raises(MissingDependencyError, match=r"needs the package 'no_such_package'.*Install no_such_package"):
        load_tier("wrong")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "joblib_backends.tiers.dask", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'joblib-backends\[dask\]'"):
        load_tier("dask")


@pytest.mark.parametrize("select", [load_tier, lambda name: HybridBackend(name)])
def test_an_unknown_tier_is_refused_with_the_names_that_exist(select):
    with pytest.raises(ConfigurationError, match=r"tier is 'spork', but must be one of 'auto'.*'dask'.*'threads'"):
        select("spork")


def test_a_tier_that_is_registered_again_is_replaced(monkeypatch):
    module = types.ModuleType("third_party")
    module.Class = type("Class", (Elsewhere,), {})
    monkeypatch.setitem(sys.modules, "third_party", module)
    register_tier("elsewhere", f"{__name__}:Elsewhere")
    register_tier("elsewhere", "third_party:Class")
    assert load_tier("elsewhere") is module.Class


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("inline", "<InlineTier inline>"),
        ("threads", "<ThreadsTier 0 batches on 0/2 threads>"),
        ("processes", "<ProcessesTier <PoolCall 0 batches, n_jobs=2, <WorkerPool 0 workers, 1 calls>>>"),
        ("fake", "<FakeTier fake>"),
    ],
)
def test_a_tier_says_what_it_does(name, text):
    tier = load_tier(name)(Config(initializer=square), 2)
    assert repr(tier) == text
    tier.close()


def test_the_dask_tier_says_what_it_does(dask_client):
    tier = load_tier("dask")(Config(client=dask_client), 2)
    assert repr(tier).startswith("<DaskTier 0 batches, n_jobs=2, <Connection <Client: 'tcp://")


def test_a_backend_says_what_it_is(hybrid, tier):
    with hybrid() as (backend, _):
        assert repr(backend) == f"<HybridBackend tier={tier!r} nesting_level=0>"


def test_the_fake_tier_fails_on_command_and_recovers():
    with fake_control() as control, parallel_backend("hybrid", tier="fake", n_jobs=2):
        control.fail_next(OSError("asked for"))
        with pytest.raises(OSError, match="asked for"):
            Parallel()(delayed(square)(i) for i in range(4))
        assert Parallel()(delayed(square)(i) for i in range(4)) == [0, 1, 4, 9]
        assert control.n_aborted == 1
    assert FakeTier.control is not control

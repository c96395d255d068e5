"""The model of a cluster in benchmarks/cluster_model.py: known answers, and what can only get better or worse."""

import importlib.util
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="the extra 'dask' is not installed")

SOURCE = Path(__file__).resolve().parents[1] / "benchmarks" / "cluster_model.py"


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("cluster_model", SOURCE)
    module = sys.modules["cluster_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cluster_model"]


@pytest.fixture
def costs(model):
    """Return round numbers near the measured ones."""
    return model.Costs(0.5e-3, 1e-3, 1e-3, choice_s=1e-7, waits_s=5e-3, worker_to_worker_per_s=1e9)


def test_short_tasks_come_as_fast_as_the_scheduler_takes_them(model, costs):
    costs = replace(costs, choice_s=0.0)
    outcome = model.simulate(costs, model.Cluster(500), model.Load(10_000, 1e-3))
    assert outcome.tasks_per_s == pytest.approx(1 / costs.scheduler_s, rel=0.05)


def test_a_slower_client_is_the_limit(model, costs):
    costs = replace(costs, client_s=3e-3)
    limit, outcome = model.limit_of(costs, model.Cluster(500), model.Load(10_000, 1e-3))
    assert limit == "client"
    assert outcome.tasks_per_s == pytest.approx(1 / costs.client_s, rel=0.05)


def test_long_tasks_keep_the_workers_busy(model, costs):
    limit, outcome = model.limit_of(costs, model.Cluster(100), model.Load(5_000, 10.0))
    assert limit == "workers"
    assert outcome.efficiency > 0.95


def test_a_worker_without_anything_else_does_two_tasks_in_a_round_trip(model):
    costs, task_s, latency_s = model.Costs(0.0, 0.0, 0.0), 1e-3, 0.1
    outcome = model.simulate(costs, model.Cluster(10, latency_s=latency_s), model.Load(5_000, task_s))
    assert outcome.tasks_per_s == pytest.approx(10 * 2 / (latency_s + task_s), rel=0.05)


def test_the_example_of_a_tail_is_named(model, costs):
    # One task for each worker, the longest of them three times the shortest.
    assert model.limit_of(costs, model.Cluster(10), model.Load(10, 10.0))[0] == "tail"


@pytest.mark.parametrize(
    ("change", "is_better"),
    [
        ({"client_s": 2e-3}, False),
        ({"scheduler_s": 2e-3}, False),
        ({"choice_s": 1e-5}, False),
        ({"waits_s": 5.0}, False),
        ({"scheduler_s": 0.5e-3}, True),
    ],
)
def test_what_costs_more_takes_longer(model, costs, change, is_better):
    cluster, load = model.Cluster(200), model.Load(4_000, 0.1)
    before = model.simulate(costs, cluster, load).seconds
    after = model.simulate(replace(costs, **change), cluster, load).seconds
    assert (after < before) if is_better else (after > before)


def test_longer_tasks_are_never_less_efficient(model, costs):
    found = [model.simulate(costs, model.Cluster(200), model.Load(4_000, 10.0**e)).efficiency for e in range(-3, 3)]
    # But for how they happen to fall at the end: a thousandth.
    assert all(longer > shorter - 0.005 for shorter, longer in itertools.pairwise(found))
    assert found[0] < 0.01
    assert found[-1] > 0.9


def test_the_shortest_task_grows_with_the_cluster(model, costs):
    found = [
        model.shortest_task_s(costs, model.Cluster(n_workers), per_worker=10, efficiency=0.7)
        for n_workers in (10, 100, 400)
    ]
    assert found == sorted(found)
    # 400 workers that take a task each from a scheduler that gives away a thousand a second.
    assert found[-1] == pytest.approx(0.4 * 0.7, rel=0.4)
    assert model.shortest_task_s(costs, model.Cluster(10), per_worker=1, efficiency=0.99) == math.inf


def test_copies_double_in_each_round(model, costs):
    # One part, 16 MiB: what a round takes is all but known.
    at_s = model.arrivals(costs, model.Cluster(8 * 8, gbit_per_s=8.0, latency_s=0.0), 1e7)
    first_s, round_s = at_s[0], at_s[1] - at_s[0]
    assert round_s == pytest.approx(1e7 / 1e9 + 1e7 / 1e9)
    assert at_s == pytest.approx([first_s + round_s * n for n in (0, 1, 2, 2, 3, 3, 3, 3)])


def test_data_delays_a_call_by_no_less_than_its_way_to_the_first_host(model, costs):
    cluster, load = model.Cluster(64), model.Load(1_280, 0.5)
    data = replace(load, nbytes=1e10)
    limit, outcome = model.limit_of(costs, cluster, data)
    assert limit == "data"
    assert outcome.seconds >= model.simulate(costs, cluster, load).seconds + model.arrivals(costs, cluster, 1e10)[0]
    assert outcome.data_s == model.arrivals(costs, cluster, 1e10)[-1]


def test_cores_that_are_shared_are_the_limit(model):
    costs = model.Costs(0.5e-3, 1e-3, 1e-3)
    outcome = model.simulate(costs, model.Cluster(50, latency_s=0.0, shared_cores=2), model.Load(10_000, 0.0))
    assert outcome.tasks_per_s == pytest.approx(2 / 2.5e-3, rel=0.05)

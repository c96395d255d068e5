"""Outcomes on their way from a Dask cluster, without a cluster."""

import asyncio
import queue
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

pytest.importorskip("distributed", reason="the extra 'dask' is not installed")

from joblib_backends.cluster import client as clients
from joblib_backends.cluster import fetching as fetchings
from joblib_backends.cluster.fetching import Fetching
from joblib_backends.cluster.ticket import Ticket
from joblib_backends.data.codec import Payload


class Gathers:
    """Stands for the cluster: what was asked for, and the futures of the answers."""

    def __init__(self):
        self.asked = []

    def start(self, client, keys, note_holders):
        outcomes = Future()
        self.asked.append(SimpleNamespace(keys=keys, note_holders=note_holders, outcomes=outcomes))
        return outcomes


@pytest.fixture
def gathers(monkeypatch):
    gathers = Gathers()
    monkeypatch.setattr(fetchings, "start_gather", gathers.start)
    monkeypatch.setattr(fetchings, "_SLOW_S", 0.0)
    monkeypatch.setattr(fetchings, "_ALONE_S", 0.0)
    return gathers


@pytest.fixture
def flight():
    return SimpleNamespace(client=None, done=queue.SimpleQueue(), workers=frozenset({"a", "b"}))


def fetch(fetching, n):
    """Have the outcomes of so many batches fetched together, and return those."""
    tickets = [Ticket("f", ("f", "task 0"), None, Payload(None)) for _ in range(n)]
    for ticket in tickets:
        fetching.add(ticket)
    fetching.start_due()
    return tickets


def test_only_what_was_on_a_worker_that_has_left_is_given_up(gathers, flight):
    fetching = Fetching(flight)
    lost, kept, copied = fetch(fetching, 3)
    (elsewhere,) = fetch(fetching, 1)
    gathers.asked[0].note_holders({lost.key: ["a"], kept.key: ["b"], copied.key: ["a", "b"]})
    gathers.asked[1].note_holders({elsewhere.key: ["b"]})
    assert fetching.give_up_slow() == []
    flight.workers = frozenset({"b", "c"})
    assert fetching.give_up_slow() == [lost]
    assert gathers.asked[0].outcomes.cancelled()
    assert not gathers.asked[1].outcomes.cancelled()
    fetching.start_due()
    assert gathers.asked[2].keys == [kept.key, copied.key]
    gathers.asked[1].outcomes.set_result({elsewhere.key: 1})
    gathers.asked[2].outcomes.set_result({kept.key: 2, copied.key: 3})
    assert fetching.take() == [(elsewhere, 1), (kept, 2), (copied, 3)]


def test_nothing_is_given_up_while_nobody_knows_who_has_it(gathers, flight):
    fetching = Fetching(flight)
    fetch(fetching, 2)
    flight.workers = frozenset()
    assert fetching.give_up_slow() == []


class SlowScheduler:
    """Answers when it is told to, and says at once who has what."""

    def __init__(self):
        self.may_answer = asyncio.Event()

    async def gather(self, keys):
        await self.may_answer.wait()
        return {"status": "OK", "data": dict.fromkeys(keys, "outcome")}

    async def who_has(self, keys):
        self.may_answer.set()
        return {key: ["a"] for key in keys}


def test_of_what_takes_long_it_is_asked_who_has_it(monkeypatch):
    monkeypatch.setattr(clients, "_SOON_S", 0.0)
    found = {}

    async def gather():
        client = SimpleNamespace(direct_to_workers=False, scheduler=SlowScheduler())
        return await clients._gather(client, ["k"], found.update)

    assert asyncio.run(gather()) == {"k": "outcome"}
    assert found == {"k": ["a"]}

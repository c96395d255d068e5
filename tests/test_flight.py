"""What the collector of a Dask connection looks at: batches that may be overdue or bound to workers, and no other."""

import math
import queue
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("distributed", reason="the extra 'dask' is not installed")

from joblib_backends.cluster.collector import Collector
from joblib_backends.cluster.flight import Flight
from joblib_backends.cluster.ticket import Ticket

HERE = "tcp://worker:1"


@pytest.fixture
def flight():
    return Flight(None, queue.SimpleQueue(), None, wait_s=1.0)


@pytest.fixture
def collector(flight):
    return Collector(flight, None, None, None)


def added(flight, timeout_s=None, residents=()):
    ticket = Ticket("square", ("square", "task 0"), None, SimpleNamespace(residents=residents), timeout_s)
    flight.add(ticket)
    return ticket


def test_only_what_may_need_it_is_looked_at(flight):
    plain, limited, with_data = added(flight), added(flight, 5.0), added(flight, residents=(object(),))
    assert flight.limited == [limited]
    assert flight.with_data == [with_data]
    assert flight.tickets == [plain, limited, with_data]


ENDS = {
    "aborted": lambda flight, ticket: flight.drop(ticket),
    "failed": lambda flight, ticket: flight.end(ticket, None, OSError("a test wants it")),
    "sent again": lambda flight, ticket: flight.send_again(ticket, "a test wants it"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_has_ended_is_not_looked_at(flight, end):
    ENDS[end](flight, added(flight, 5.0, residents=(object(),)))
    assert flight.limited == flight.with_data == flight.tickets == []
    assert flight.least_timeout_s == math.inf


def test_the_least_time_limit_is_of_those_that_are_there(flight):
    assert flight.least_timeout_s == math.inf
    short = added(flight, 1.0)
    added(flight, 5.0)
    assert flight.least_timeout_s == 1.0
    flight.drop(short)
    for ticket in flight.limited:
        flight.drop(ticket)
    added(flight, 7.0)
    assert flight.least_timeout_s == 7.0


def test_nothing_is_due_where_nothing_is_limited(flight, collector):
    added(flight)
    assert collector._next_due() == math.inf
    assert collector._overdue(time.monotonic() + 1e6) == []


def test_each_batch_is_overdue_when_its_own_time_is_over(flight, collector):
    now = time.monotonic()
    early, late = added(flight, 10.0), added(flight, 10.0)
    early.started, late.started = (now, HERE), (now + 3.0, HERE)
    assert collector._overdue(now + 9.9) == []
    assert collector._overdue(now + 10.1) == [early]
    flight.drop(early)
    assert collector._overdue(now + 12.9) == []
    assert collector._overdue(now + 13.1) == [late]


def test_a_batch_that_comes_later_with_a_smaller_limit_is_found_in_time(flight, collector):
    now = time.monotonic()
    first = added(flight, 100.0)
    first.started = (now, HERE)
    assert collector._overdue(now + 101.0) == [first]
    # Nobody has looked since, and nobody would for another 100 s.
    second = added(flight, 1.0)
    second.started = (now + 101.5, HERE)
    assert collector._next_due() <= now + 102.5
    assert second in collector._overdue(now + 102.6)


def test_a_batch_that_has_not_started_is_not_overdue(flight, collector):
    waiting = added(flight, 1.0)
    now = time.monotonic()
    assert collector._overdue(now + 10.0) == []
    waiting.started = (now + 10.0, HERE)
    assert collector._next_due() <= now + 11.0
    assert collector._overdue(now + 11.1) == [waiting]


def test_the_collector_waits_no_longer_than_until_the_next_is_due(flight, collector):
    ticket = added(flight, 0.2)
    ticket.started = (time.monotonic(), HERE)
    assert collector._seconds_to_next_look() <= 0.2

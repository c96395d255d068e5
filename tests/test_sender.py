"""The thread that sends batches to a Dask cluster, without a cluster."""

import queue
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("distributed", reason="the extra 'dask' is not installed")

from joblib_backends.cluster.flight import Flight
from joblib_backends.cluster.placement import Placement
from joblib_backends.cluster.sender import Sender
from joblib_backends.cluster.ticket import Cancel, Ticket
from joblib_backends.data.codec import Payload
from joblib_backends.errors import ClusterLostError

LONG = 60.0


class FakeClient:
    """Takes what it is given, and says so."""

    def __init__(self):
        self.sent = queue.SimpleQueue()

    def map(self, function, expressions, namespaces, key, **options):
        self.sent.put(key)
        return [SimpleNamespace(add_done_callback=lambda _: None) for _ in key]

    def subscribe_topic(self, topic, handler):
        """Be asked by a relay, which listens once a callback of scikit-learn's has left this process."""

    def unsubscribe_topic(self, topic):
        pass


@pytest.fixture
def flight():
    flight = Flight(FakeClient(), queue.SimpleQueue(), Placement(), LONG)
    flight.workers, flight.nthreads = frozenset({"a"}), {"a": 1}
    return flight


@pytest.fixture
def sender(flight):
    """Return a sender whose thread runs, and ends with the test."""
    closed = threading.Event()
    outfit = SimpleNamespace(provide=lambda: False)
    sender = Sender(flight, None, outfit, {}, {}, closed.set)
    thread = threading.Thread(target=sender.run)
    thread.start()
    yield sender
    flight.outbox.put(None)
    assert closed.wait(LONG)
    thread.join(LONG)


def ticket():
    return Ticket("f", ("f", "task 0"), None, Payload(None))


def fail(*_):
    raise MemoryError("injected")


def test_a_failure_of_the_sender_ends_what_waits_and_the_next_batch_is_sent(flight, sender, monkeypatch):
    waiting, struck, after = ticket(), ticket(), ticket()
    flight.add(waiting)
    sender._waiting.append(waiting)
    with monkeypatch.context() as faults:
        faults.setattr(flight, "add", fail)
        flight.outbox.put(struck)
        for one in (waiting, struck):
            with pytest.raises(ClusterLostError, match="injected"):
                one.result(LONG)
    flight.outbox.put(after)
    assert flight.client.sent.get(timeout=LONG) == [after.key]


def test_a_failure_over_an_aborted_call_ends_no_batch_of_another_that_is_on_the_cluster(flight, sender, monkeypatch):
    on_cluster, waiting = ticket(), ticket()
    flight.outbox.put(on_cluster)
    assert flight.client.sent.get(timeout=LONG) == [on_cluster.key]
    flight.add(waiting)
    monkeypatch.setattr(sender, "_cancel", fail)
    flight.outbox.put(Cancel([ticket()]))
    with pytest.raises(ClusterLostError, match="injected"):
        waiting.result(LONG)
    assert not on_cluster.done()

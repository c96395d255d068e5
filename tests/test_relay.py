"""Both ends of the relay of callbacks' messages, without a cluster between them."""

import asyncio
import functools
import pickle
import threading
import weakref

import pytest
from conftest import eventually

pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
pytest.importorskip("sklearn.callback", reason="scikit-learn has callbacks from version 1.9")

from joblib_backends.cluster import delivery as deliveries
from joblib_backends.cluster import outlet as outlets
from joblib_backends.cluster import sklearn_transport
from joblib_backends.cluster.outlet import Outlet, relaying
from joblib_backends.cluster.relay import Relay
from joblib_backends.cluster.ticket import Ticket
from joblib_backends.data.codec import Payload

LONG = 60.0

#: A listener that is nowhere.
ADDRESS = "/nowhere/listener"


# ---- the worker's end


class FakeScheduler:
    """Keeps what a worker hands over; the first so many requests fail after they have arrived."""

    def __init__(self, n_failing=0):
        self.events = []
        self.n_failing = n_failing

    async def log_event(self, topic, msg):
        self.events.append((topic, msg))
        if self.n_failing:
            self.n_failing -= 1
            raise OSError("the connection broke before the answer came")


class FakeWorker:
    """A worker whose event loop runs in a thread, from ``start`` on."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.loop = self
        self._waiting = []
        self._loop = None

    def add_callback(self, callback):
        self._waiting.append(callback)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: self._loop.create_task(callback()))

    def get_current_task(self):
        return f"task of {threading.current_thread().name}"

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        for callback in self._waiting:
            asyncio.run_coroutine_threadsafe(callback(), self._loop)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LONG)
        self._loop.close()


def connection_in_a_batch():
    """Return what scikit-learn speaks to, in a batch that has unpickled a handle."""
    sklearn_transport.arrived(ADDRESS)
    from sklearn.callback import _transport

    return _transport.Client(ADDRESS, authkey=b"")


def messages_in(scheduler):
    return [pickle.loads(pickled) for _, (_, _, messages) in scheduler.events for _, _, pickled in messages]


def test_a_batch_ends_when_the_scheduler_has_its_messages_in_order():
    scheduler = FakeScheduler()
    with FakeWorker(scheduler) as worker:
        with relaying(worker, "topic"):
            connection = connection_in_a_batch()
            for i in range(1_000):
                connection.send(i)
                assert connection.recv() is None
        assert messages_in(scheduler) == list(range(1_000))
    assert {topic for topic, _ in scheduler.events} == {"topic"}
    assert len(scheduler.events) <= 1_000


def test_what_is_said_while_an_event_is_on_its_way_goes_with_the_next():
    scheduler = FakeScheduler()
    worker = FakeWorker(scheduler)
    outlet = Outlet.of(worker)
    for i in range(100):
        with outlets._changed:
            outlet.put(outlets._Message("topic", "key", ADDRESS, pickle.dumps((i, bytes(1_000)))))
    with worker:
        outlet.flush()
    assert [i for i, _ in messages_in(scheduler)] == list(range(100))
    sizes = [sum(len(pickled) for _, _, pickled in messages) for _, (_, _, messages) in scheduler.events]
    assert max(sizes) <= outlets._MOST_IN_EVENT
    assert len(sizes) <= 10


def test_an_event_that_was_not_answered_is_sent_again_under_its_number(monkeypatch):
    monkeypatch.setattr(outlets, "_PAUSES_S", (0.0, 0.0))
    scheduler = FakeScheduler(n_failing=2)
    with FakeWorker(scheduler) as worker, relaying(worker, "topic"):
        connection_in_a_batch().send("once")
    numbers = [(outlet, number) for _, (outlet, number, _) in scheduler.events]
    assert len(numbers) == 3
    assert len(set(numbers)) == 1


def test_who_says_too_much_waits_and_is_told_of_a_scheduler_that_takes_nothing(monkeypatch):
    monkeypatch.setattr(outlets, "_PATIENCE_S", 0.05)
    worker = FakeWorker(FakeScheduler())  # never started
    with relaying(worker, "topic"):
        connection = connection_in_a_batch()
        connection.send(bytes(outlets._MOST_WAITING - 1_000))
        with pytest.raises(ConnectionError, match=r"scheduler has not taken them for 0\.05 seconds"):
            connection.send(bytes(2_000))


def test_without_a_batch_a_listener_out_of_reach_is_an_error_as_ever():
    from sklearn.callback import _transport

    scheduler = FakeScheduler()
    with FakeWorker(scheduler) as worker, relaying(worker, "topic"):
        connection = connection_in_a_batch()
    with pytest.raises(FileNotFoundError):
        _transport.Client(ADDRESS, authkey=b"")
    with pytest.raises(ConnectionResetError, match="which this Dask worker can only relay while a batch"):
        connection.send("late")
    assert scheduler.events == []


def test_threads_of_a_task_are_heard_as_the_task_is():
    scheduler = FakeScheduler()
    with FakeWorker(scheduler) as worker, relaying(worker, "topic"):
        thread = threading.Thread(target=connection_in_a_batch().send, args=("from a thread",))
        thread.start()
        thread.join(LONG)
    (_, (_, _, ((key, address, _),))) = scheduler.events[0]
    assert (key, address) == (f"task of {threading.current_thread().name}", ADDRESS)


# ---- the client's end


class FakeClient:
    """Calls who subscribes when the test says so."""

    def subscribe_topic(self, topic, handler):
        self.tell = handler
        self.topic = topic

    def unsubscribe_topic(self, topic):
        assert topic == self.topic


@pytest.fixture
def heard():
    """Return what a listener of this process hears, and its address."""
    lines = []
    handle = sklearn_transport.open_listener(lines.append)
    yield lines, handle
    sklearn_transport.close_listener(handle)


@pytest.fixture
def relay(heard):
    _, handle = heard
    sklearn_transport.keep_keys_here()
    sklearn_transport._reduce(handle)
    relay = Relay(FakeClient())
    yield relay
    relay.close()


def ticket_on(relay):
    ticket = Ticket("f", ("f", "task 0"), None, Payload(None))
    assert relay.listen([ticket]) == relay._client.topic
    return ticket


def event(number, key, handle, *messages):
    return (0.0, ("outlet", number, [(key, handle.address, pickle.dumps(message)) for message in messages]))


def all_is_delivered(relay):
    """Wait for what has arrived."""
    done = threading.Event()
    relay.after_messages(done.set)
    return done.wait(LONG)


def test_messages_are_delivered_in_order_and_an_event_that_comes_twice_once(relay, heard):
    lines, handle = heard
    ticket = ticket_on(relay)
    for number, message in ((0, "a"), (1, "b"), (1, "b"), (0, "a"), (2, "c")):
        relay._client.tell(event(number, ticket.key, handle, message))
    assert all_is_delivered(relay)
    assert lines == ["a", "b", "c"]


def test_a_batch_ends_behind_its_messages(relay, heard):
    lines, handle = heard
    ticket = ticket_on(relay)
    held = threading.Event()
    # The relay's thread waits here, so that what follows is in its inbox.
    relay._inbox.items.put(functools.partial(held.wait, LONG))
    relay._client.tell(event(0, ticket.key, handle, "a"))
    relay.after_messages(lambda: ticket.end((True, b"", (0.0, 0.0, 0.0))))
    assert not ticket.done()
    held.set()
    ticket.result(LONG)
    assert lines == ["a"]


@pytest.mark.parametrize("end", ["cancelled", "failed", "sent again"])
def test_nothing_is_delivered_for_a_batch_that_has_ended(relay, heard, end):
    lines, handle = heard
    ticket, other = ticket_on(relay), ticket_on(relay)
    key = ticket.key
    if end == "cancelled":
        ticket.cancel()
    elif end == "failed":
        ticket.end(None, ValueError("failed"))
    else:
        ticket.n_resent += 1
    relay._client.tell(event(0, key, handle, "late"))
    relay._client.tell(event(1, "a key that nobody knows", handle, "foreign"))
    relay._client.tell(event(2, other.key, handle, "of another"))
    assert all_is_delivered(relay)
    assert lines == ["of another"]


def test_a_batch_that_is_cancelled_ends_after_the_message_that_is_being_delivered(relay):
    taken, go, lines = threading.Event(), threading.Event(), []

    def consume(message):
        taken.set()
        assert go.wait(LONG)
        lines.append(message)

    handle = sklearn_transport.open_listener(consume)
    ticket = ticket_on(relay)
    relay._client.tell(event(0, ticket.key, handle, "a"))
    assert taken.wait(LONG)
    # Before the batch's callbacks are through, which is when who cancels it goes on.
    ticket.add_done_callback(lambda _: lines.append("ended"))
    thread = threading.Thread(target=ticket.cancel)
    thread.start()
    go.set()
    thread.join(LONG)
    sklearn_transport.close_listener(handle)
    assert lines == ["a", "ended"]


def test_a_message_that_cannot_be_delivered_holds_up_no_other(relay, heard, caplog):
    lines, handle = heard
    ticket = ticket_on(relay)
    relay._client.tell((0.0, ("outlet", 0, [(ticket.key, handle.address, b"no pickle")])))
    relay._client.tell(event(1, ticket.key, handle._replace(address=ADDRESS), "to nobody"))
    relay._client.tell(event(2, ticket.key, handle, "a"))
    assert all_is_delivered(relay)
    assert lines == ["a"]
    assert "could not be delivered" in caplog.text


class Deaf:
    """A listener that takes a message and never comes back, until ``go`` is set."""

    def __init__(self):
        self.taken, self.go = threading.Event(), threading.Event()
        self.n_taken = 0

    def __call__(self, _):
        self.n_taken += 1
        self.taken.set()
        assert self.go.wait(2 * LONG)


@pytest.fixture
def deaf():
    """Return such a listener, and its handle."""
    listener = Deaf()
    handle = sklearn_transport.open_listener(listener)
    yield listener, handle
    listener.go.set()
    sklearn_transport.close_listener(handle)


def test_a_listener_that_stops_to_listen_holds_up_neither_ends_nor_other_listeners(
    relay, heard, deaf, caplog, monkeypatch
):
    monkeypatch.setattr(deliveries, "_LOOK_S", 0.02)
    (lines, handle), (listener, deaf_handle) = heard, deaf
    ticket = ticket_on(relay)
    together = [(ticket.key, one.address, pickle.dumps("a")) for one in (deaf_handle, handle, deaf_handle)]
    relay._client.tell((0.0, ("outlet", 0, together)))
    relay._client.tell(event(1, ticket.key, deaf_handle, "b"))
    relay._client.tell(event(2, ticket.key, handle, "c"))
    relay.after_messages(lambda: ticket.end((True, b"", (0.0, 0.0, 0.0))))
    ticket.result(LONG)
    assert lines == ["a", "c"]
    assert listener.n_taken == 1
    assert caplog.text.count("gets no more of them") == 1


def test_a_batch_that_is_cancelled_waits_for_no_other_ones_message(relay, deaf, monkeypatch):
    monkeypatch.setattr(deliveries, "_SETTLE_S", 10 * LONG)
    monkeypatch.setattr(deliveries, "_LOOK_S", LONG)
    listener, handle = deaf
    tickets = [ticket_on(relay) for _ in range(1_000)]
    relay._client.tell(event(0, tickets[0].key, handle, "a"))
    assert listener.taken.wait(LONG)
    for ticket in tickets[1:]:
        assert ticket.cancel()
    # Nor for its own for longer than a moment after it was handed over.
    monkeypatch.setattr(deliveries, "_SETTLE_S", 0.0)
    assert tickets[0].cancel()


def test_a_listener_may_end_the_batch_that_speaks_to_it(relay, monkeypatch):
    monkeypatch.setattr(deliveries, "_SETTLE_S", 10 * LONG)
    ticket = ticket_on(relay)
    handle = sklearn_transport.open_listener(lambda _: ticket.cancel())
    relay._client.tell(event(0, ticket.key, handle, "a"))
    assert all_is_delivered(relay)
    assert ticket.cancelled()
    sklearn_transport.close_listener(handle)


def test_ends_do_not_wait_for_a_relay_that_is_closed(heard, relay):
    _, handle = heard
    ticket = ticket_on(relay)
    held = threading.Event()
    relay._inbox.items.put(functools.partial(held.wait, LONG))
    relay.close()
    relay._inbox.take(event(0, ticket.key, handle, "a"))  # it was on its way
    done = threading.Event()
    relay.after_messages(done.set)
    held.set()
    assert done.wait(LONG)


@pytest.mark.usefixtures("relay")
def test_a_client_keeps_nothing_of_a_relay_that_is_closed():
    ended = Relay(FakeClient())
    client, inbox = ended._client, weakref.ref(ended._inbox)
    ticket_on(ended)
    ended.close()
    del ended
    assert eventually(lambda: inbox() is None)
    client.tell((0.0, "what was on its way"))


def test_without_a_callback_there_is_no_topic_and_no_thread(monkeypatch):
    monkeypatch.setattr(sklearn_transport, "_left", set())
    relay = Relay(FakeClient())
    assert relay.listen([Ticket("f", ("f", "task 0"), None, Payload(None))]) is None
    assert not hasattr(relay._client, "topic")
    assert not relay._has_thread

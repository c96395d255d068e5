"""How long placed buffers live. No process is started."""

import gc

import numpy as np
import pytest

from joblib_backends.data.arrays import address_of
from joblib_backends.data.hashing import digest_of
from joblib_backends.data.scope import ResidentScope
from joblib_backends.data.store import Store


@pytest.fixture
def store():
    store = Store()
    yield store
    store.close()


def place(scope, array, *, owned=True):
    """Place ``array`` and let the scope alone hold it; return its path."""
    raw = memoryview(array).cast("B")
    digest = digest_of(raw)
    resident = scope.store.find(digest, raw.nbytes) or scope.store.put(raw, digest)
    scope.hold(resident, address_of(array), array if owned else None)
    return resident.path


def held(store):
    gc.collect()
    return {resident.path for resident in store.residents}


def test_a_resident_lives_as_long_as_its_owner_in_the_scope_of_the_process(store):
    scope, array = ResidentScope(store, outlives_calls=False), np.ones(100)
    path = place(scope, array)
    scope.end_call()
    assert held(store) == {path}
    del array
    assert held(store) == set()


def test_a_resident_without_an_owner_ends_with_the_call_in_the_scope_of_the_process(store):
    scope = ResidentScope(store, outlives_calls=False)
    path = place(scope, np.ones(100), owned=False)
    assert held(store) == {path}
    scope.end_call()
    assert held(store) == set()


def test_a_context_keeps_residents_whose_owner_is_gone_until_it_ends(store):
    scope = ResidentScope(store, outlives_calls=True)
    path = place(scope, np.ones(100))
    scope.end_call()
    assert held(store) == {path}
    scope.release()
    assert held(store) == set()


def test_a_pinned_resident_stays_whatever_becomes_of_its_owner(store):
    scope, array = ResidentScope(store, outlives_calls=False), np.ones(100)
    place(scope, array)
    scope.pin(store.residents[0])
    del array
    scope.end_call()
    assert len(held(store)) == 1
    scope.release()
    assert held(store) == set()


def test_residents_without_an_owner_leave_the_allowance_least_recently_used_first(store):
    scope = ResidentScope(store, outlives_calls=True, idle_nbytes=2_400)
    arrays = [np.full(100, float(i)) for i in range(4)]
    paths = [place(scope, array, owned=False) for array in arrays[:3]]
    place(scope, arrays[0], owned=False)
    paths.append(place(scope, arrays[3], owned=False))
    assert held(store) == {paths[0], paths[2], paths[3]}


def test_one_resident_larger_than_the_allowance_stays(store):
    scope = ResidentScope(store, outlives_calls=True, idle_nbytes=10)
    path = place(scope, np.ones(100), owned=False)
    assert held(store) == {path}


def test_the_allowance_bounds_what_dead_owners_leave(store):
    scope = ResidentScope(store, outlives_calls=True, idle_nbytes=2_400)
    for i in range(50):
        place(scope, np.full(100, float(i)))
    scope.end_call()
    assert len(held(store)) == 3


def test_an_array_changed_in_place_keeps_one_resident(store):
    scope, array = ResidentScope(store, outlives_calls=True), np.zeros(100)
    for i in range(50):
        array[:] = i
        place(scope, array)
    assert len(held(store)) == 1


def test_an_array_in_the_memory_of_a_dead_one_is_held_as_its_own(store):
    scope, memory = ResidentScope(store, outlives_calls=False), bytearray(800)
    first = np.frombuffer(memory, float)
    place(scope, first)
    del first
    second = np.frombuffer(memory, float)
    path = place(scope, second)
    assert held(store) == {path}
    del second
    assert held(store) == set()


def test_an_owner_that_cannot_be_watched_counts_as_none(store):
    scope = ResidentScope(store, outlives_calls=False)
    raw = memoryview(b"x" * 100)
    resident = store.put(raw, digest_of(raw))
    scope.hold(resident, address_of(raw), b"no weak references")
    assert "0 owned, 1 idle" in repr(scope)


def test_what_a_batch_in_flight_refers_to_outlives_the_scope(store):
    scope = ResidentScope(store, outlives_calls=True)
    place(scope, np.ones(100))
    (in_flight,) = store.residents
    scope.release()
    assert held(store) == {in_flight.path}


def test_owners_may_die_after_their_scope(store):
    scope, array = ResidentScope(store, outlives_calls=True), np.ones(100)
    place(scope, array)
    del scope
    assert held(store) == set()
    del array
    assert held(store) == set()


def test_a_dead_owner_is_no_region_to_look_in(store):
    scope, array = ResidentScope(store, outlives_calls=True), np.ones(100)
    place(scope, array)
    address = address_of(array)
    assert store.covers(address, address + 800)
    del array
    gc.collect()
    assert not store.covers(address, address + 800)

"""The codec: what a batch becomes, and that it comes back equal. No process is started."""

import functools
import gc
import os
import pickle
import shutil
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from samples import BY_FILE, COPIED_BY_THEIR_PICKLE, SAMPLES, SMALL, N, assert_same, numbers, objects

from joblib_backends.config import Config
from joblib_backends.data.codec import Encoder, RemoteReference, files_of, load, moved_files, resolving
from joblib_backends.data.scope import ResidentScope
from joblib_backends.data.store import Store
from joblib_backends.errors import DataLostError, TaskPicklingError


@pytest.fixture
def store():
    store = Store()
    yield store
    store.close()


@pytest.fixture
def scope(store):
    return ResidentScope(store, outlives_calls=True)


@pytest.fixture
def make_encoder(scope):
    return lambda **options: Encoder(Config(**{"max_nbytes": 1_000, **options}), scope)


@pytest.fixture
def encoder(make_encoder):
    return make_encoder()


class Batch:
    """What joblib hands over: a list of (function, args, kwargs)."""

    def __init__(self, *items):
        self.items = [(function, args, {}) for function, *args in items]


def give(*values):
    return values


def encode(encoder, *items):
    return encoder.encode(Batch(*items), (None, None))


def send(encoder, value):
    """Return the payload of a task with ``value``, and the value as a worker gets it."""
    payload = encode(encoder, (give, value, 1))
    return payload, received(payload)[0][0]


def received(payload):
    """Return the arguments of each task as a worker gets them."""
    return [args for stream, refs in payload.wire[1] for _, args, _ in load(stream, refs)]


@pytest.mark.parametrize("name", SAMPLES)
def test_every_kind_of_value_arrives_equal_and_is_placed_once(name, encoder, tmp_path):
    value = SAMPLES[name](tmp_path)
    first, got = send(encoder, value)
    assert_same(got, value)
    by_value = name in SMALL | BY_FILE | COPIED_BY_THEIR_PICKLE
    assert (first.nbytes_placed == 0) is by_value
    second, again = send(encoder, value)
    assert_same(again, value)
    assert second.nbytes_placed == 0
    assert (second.nbytes_saved > 0) is not by_value


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - BY_FILE))
def test_every_kind_of_value_travels_in_the_pickle_without_max_nbytes(name, make_encoder, store, tmp_path):
    value = SAMPLES[name](tmp_path)
    payload, got = send(make_encoder(max_nbytes=None), value)
    assert_same(got, value)
    assert (payload.residents, store.residents) == ([], [])


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - BY_FILE - SMALL - COPIED_BY_THEIR_PICKLE))
def test_a_scattered_value_is_found_by_an_equal_copy(name, make_encoder, tmp_path):
    encoder = make_encoder(max_nbytes=1_048_576)
    assert encoder.scatter([SAMPLES[name](tmp_path)]) > 0
    payload, got = send(encoder, SAMPLES[name](tmp_path))
    assert_same(got, SAMPLES[name](tmp_path))
    assert payload.nbytes_placed == 0
    assert payload.nbytes_saved > 0


@pytest.mark.parametrize("name", ["C order", "list of texts", "text", "sparse csr", "Arrow table", "datetime64"])
def test_a_placed_value_leaves_a_short_pickle(name, encoder, tmp_path):
    payload, _ = send(encoder, SAMPLES[name](tmp_path))
    assert payload.nbytes_inband < 2_000


@pytest.mark.parametrize("name", ["memmap r", "memmap r+", "memmap w+", "reversed memmap", "array over a memmap"])
def test_a_memmap_travels_by_the_name_of_its_file(name, encoder, tmp_path):
    payload, got = send(encoder, SAMPLES[name](tmp_path))
    assert payload.nbytes_inband < 2_000
    assert type(got) is np.memmap
    assert got.base.base is not None


def test_a_memmap_whose_file_is_gone_travels_by_content(encoder, tmp_path):
    value = SAMPLES["memmap r"](tmp_path)
    Path(value.filename).unlink()
    assert_same(send(encoder, value)[1], numbers())


def test_changes_through_a_shared_memmap_reach_its_file_and_those_through_mode_r_are_refused(encoder, tmp_path):
    shared = SAMPLES["memmap r+"](tmp_path)
    send(encoder, shared)[1][0, 0] = 42
    assert shared[0, 0] == 42
    with pytest.raises(ValueError, match=r"read-only"):
        send(encoder, SAMPLES["memmap r"](tmp_path))[1][0, 0] = 42


def test_what_arrives_can_be_changed_without_an_effect_on_the_sender_or_on_who_loads_it_next(encoder):
    value = numbers()
    payload, got = send(encoder, value)
    got += 1
    assert_same(received(payload)[0][0], value)
    assert_same(value, numbers())


def test_tasks_of_a_batch_do_not_share_what_can_change(encoder):
    small, large, names = [0], numbers(), {"a": [0]}
    payload = encode(encoder, *[(give, small, large, names)] * 2)
    first, second = received(payload)
    assert all(one is not other for one, other in zip(first, second, strict=True))
    first[1][:] = 7
    assert_same(second[1], numbers())


def test_tasks_that_nobody_can_change_share_a_pickle(encoder):
    assert len(encode(encoder, *[(pow, i, 2) for i in range(50)]).wire[1]) == 1


def test_one_task_keeps_the_identity_of_its_arguments(encoder):
    """An object that a task gets twice is one object there too, however large it is."""
    nodes = [[i] for i in range(N)]
    array = numbers()
    first, second, node, again, same = received(encode(encoder, (give, nodes, nodes, nodes[7], array, array)))[0]
    assert first is second
    assert first[7] is node
    assert again is same


def test_objects_in_an_array_keep_their_identity(encoder):
    nodes = np.empty(N, object)
    nodes[:] = [{"i": i} for i in range(N)]
    array, node = received(encode(encoder, (give, nodes, nodes[7])))[0]
    assert array[7] is node


def test_an_array_of_objects_that_contains_itself_arrives(encoder):
    value = objects()
    value[0] = value
    got = send(encoder, value)[1]
    assert got[0] is got


def test_functions_with_captured_state_are_not_shared_by_the_tasks_of_a_batch(encoder):
    """A closure that a task changes must be as sent for the next task."""
    seen = []

    def count():
        seen.append(1)
        return len(seen)

    payload = encode(encoder, (count,), (count,))
    functions = [load(*pickled) for pickled in payload.wire[0]]
    tasks = [task for pickled in payload.wire[1] for task in load(*pickled)]
    assert [(functions[f] if type(f) is int else f)() for f, _, _ in tasks] == [1, 1]


def test_bound_methods_of_builtins_are_not_shared_by_the_tasks_of_a_batch(encoder):
    stack = [1, 2, 3]
    payload = encode(encoder, (stack.pop,), (stack.pop,))
    tasks = [task for pickled in payload.wire[1] for task in load(*pickled)]
    assert [function() for function, _, _ in tasks] == [3, 3]


def test_equal_copies_share_one_resident(encoder, store):
    for _ in range(5):
        send(encoder, numbers())
    assert len(store.residents) == 1


def test_an_array_changed_in_place_is_never_served_stale(encoder):
    value = numbers()
    for i in range(10):
        value[i] = -i
        assert_same(send(encoder, value)[1], value.copy())


def test_a_view_of_an_array_changed_in_place_is_never_served_stale(encoder):
    value = numbers()
    encoder.scatter([value])
    value[5] = -1
    for view in (value[:1_000], value[:, ::2], value[::-1], value[1:, 1]):
        assert_same(send(encoder, view)[1], view.copy())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[100:2_000],
        lambda x: x[1:],
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[:, 1],
        lambda x: x[::-3],
        lambda x: x[10:-10, 1:3],
        lambda x: x.view("i8"),
        lambda x: x.view("M8[s]")[:, 1:],
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("max_nbytes", [1_000, 1_048_576])
def test_a_view_of_a_scattered_array_moves_nothing(view, order, max_nbytes, make_encoder):
    base, encoder = np.asarray(numbers(), order=order), make_encoder(max_nbytes=max_nbytes)
    encoder.scatter([base])
    payload, got = send(encoder, view(base))
    assert_same(got, view(base))
    assert payload.nbytes_placed == 0
    assert payload.nbytes_inband < 3_000


def test_a_thin_view_takes_its_own_bytes_and_not_those_it_spans(encoder):
    wide = np.zeros((1_000, 1_000))
    encoder.scatter([wide])
    payload, got = send(encoder, wide[:, 3])
    assert_same(got, wide[:, 3])
    assert payload.nbytes_placed == 8_000


def test_a_view_is_sent_as_its_content_once_its_base_is_gone(encoder):
    base = numbers()
    encoder.scatter([base])
    view = base[10:2_000].copy()
    del base
    gc.collect()
    assert_same(send(encoder, view)[1], numbers()[10:2_000])


def test_small_scattered_values_are_found_below_max_nbytes(make_encoder):
    encoder, y = make_encoder(max_nbytes=1_048_576), np.arange(500)
    assert encoder.scatter([y]) == y.nbytes
    for value in (y, y.copy()):
        payload, got = send(encoder, value)
        assert_same(got, y)
        assert payload.nbytes_saved == y.nbytes


def test_clones_of_an_estimator_share_the_arrays_inside(make_encoder, store):
    from sklearn.base import clone
    from sklearn.linear_model import Ridge

    encoder = make_encoder(max_nbytes=1_048_576)
    template = Ridge(alpha=np.arange(300_000.0))
    payloads = [send(encoder, clone(template))[0] for _ in range(20)]
    assert sum(payload.nbytes_placed for payload in payloads) == 2_400_000
    assert len(store.residents) == 1


@pytest.mark.parametrize("mode", ["r+", "w+"])
def test_writable_modes_give_the_tasks_of_a_call_one_copy(mode, make_encoder):
    encoder, value = make_encoder(mmap_mode=mode), numbers()
    (first,), (second,) = received(encode(encoder, (give, value), (give, value)))
    first[0, 0] = 42
    assert second[0, 0] == 42
    assert value[0, 0] == 0
    assert received(encode(encoder, (give, value)))[0][0][0, 0] == 42


def test_writable_modes_keep_equal_arrays_apart(make_encoder):
    """Sums and counts that both start as zeros are two arrays, whatever their content."""
    sums, counts = np.zeros(1_000), np.zeros(1_000)
    got_sums, got_counts = received(encode(make_encoder(mmap_mode="r+"), (give, sums, counts)))[0]
    got_sums[:] = 1
    assert_same(got_counts, counts)


def test_writable_modes_give_a_new_array_a_copy_of_its_own(make_encoder):
    """An array that is made for one task may get the memory, and the content, of one that is gone."""
    encoder = make_encoder(mmap_mode="r+")
    for _ in range(5):
        value = np.zeros(1_000)
        (got,) = received(encode(encoder, (give, value)))[0]
        assert got[0] == 0
        got[:] = 1
        del value


def test_writable_modes_do_not_reach_the_next_call(make_encoder):
    value = numbers()
    received(encode(make_encoder(mmap_mode="r+"), (give, value)))[0][0][:] = 7
    for mode in ("r+", "r"):
        assert_same(send(make_encoder(mmap_mode=mode), value)[1], numbers())


def test_a_reference_takes_the_place_of_its_argument(scope):
    value = numbers()
    encoder = Encoder(Config(), scope, {id(value): RemoteReference("key")})
    payload = encode(encoder, (give, value))
    with resolving({"key": numbers() * 2}, scope):
        (got,) = received(payload)[0]
        got[:] = -1
        assert_same(received(payload)[0][0], numbers() * 2)
    assert payload.nbytes_inband < 1_000


def test_the_files_of_a_batch_are_named_and_can_be_moved(encoder, tmp_path):
    payload = encode(encoder, (give, numbers()))
    (resident,) = payload.residents
    assert files_of(payload.wire) == {resident.path}
    elsewhere = str(tmp_path / "copy")
    shutil.move(resident.path, elsewhere)
    wire = moved_files(payload.wire, {resident.path: elsewhere})
    assert files_of(wire) == {elsewhere}
    assert_same(load(*wire[1][0])[0][1][0], numbers())


def test_an_argument_that_cannot_be_pickled_is_named(encoder):
    with pytest.raises(TaskPicklingError, match=r"argument 1 of give, a generator, cannot be pickled"):
        encode(encoder, (give, numbers(), (i for i in [])))


def test_a_function_that_cannot_be_pickled_is_named(encoder):
    with pytest.raises(TaskPicklingError, match=r"the function of give, a partial, cannot be pickled"):
        encode(encoder, (functools.partial(give, (i for i in [])),))


def test_wires_are_plain_builtins(encoder):
    """Dask's scheduler and loky's queue pickle them again, with the standard pickler."""
    wire = encode(encoder, (give, numbers())).wire
    assert pickle.loads(pickle.dumps(wire)) == wire


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | hnp.arrays(
        # NumPy's own pickle loses the byte order of big-endian dates.
        st.one_of(hnp.scalar_dtypes(), hnp.array_dtypes(allow_subarrays=False)).filter(
            lambda dtype: dtype.kind not in "mM" or dtype.isnative
        ),
        hnp.array_shapes(min_dims=0, min_side=0),
    )
    | st.builds(lambda n, step: np.arange(n)[::step], st.integers(0, 3_000), st.sampled_from([1, 2, -1, -3]))
)
structures = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=12,
)


@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(value=structures, max_nbytes=st.sampled_from([None, 1, 1_000]))
def test_random_structures_arrive_equal(value, max_nbytes, make_encoder):
    encoder = make_encoder(max_nbytes=max_nbytes)
    assert_same(send(encoder, value)[1], value)
    assert_same(send(encoder, value)[1], value)


# ---- damage


@pytest.fixture
def pickled(make_encoder):
    """Return the pickle of one task with a small array in it, and where the buffer of a large one is."""
    payload = encode(make_encoder(), (give, np.arange(50.0), np.arange(1_000.0)))
    [(stream, refs)] = payload.wire[1]
    yield stream, refs
    del payload


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.data())
def test_damaged_bytes_are_an_error_and_never_another_value(pickled, data):
    stream, refs = pickled
    damaged = bytearray(stream)
    for place in data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=5, unique=True)):
        damaged[place] ^= data.draw(st.integers(1, 255))
    length = data.draw(st.one_of(st.just(len(stream)), st.integers(0, len(stream))))
    with pytest.raises(ValueError, match="damaged on their way"):
        load(bytes(damaged[:length]), refs)


def test_a_file_that_was_cut_short_is_an_error_and_never_another_array(pickled):
    stream, refs = pickled
    assert refs
    for nbytes in (7_999, 4_096, 1, 0):
        os.truncate(refs[0].path, nbytes)
        with pytest.raises(DataLostError, match="shorter than its content"):
            load(stream, refs)

"""The ledger: what tasks have in common, which is best started next, what is held and what goes."""

from hypothesis import given
from hypothesis import strategies as st

from joblib_backends.sharing.ledger import Held, Ledger


def ledger(*tasks, limit=1_000, complete=True):
    made = Ledger(limit)
    for task in tasks:
        made.add(tuple(task))
    made.is_complete = complete
    return made


def held(name, nbytes=10, seconds=1.0):
    return Held(name, name[0], nbytes, seconds)


def test_tasks_with_the_same_prefix_are_put_side_by_side():
    tasks = ["ax", "by", "ay", "bx", "ax"]
    made = ledger(*tasks)
    assert sorted(tasks, key=lambda task: made.order(tuple(task))) == ["ax", "ax", "ay", "bx", "by"]


def test_what_is_there_comes_first_then_what_is_new_then_what_another_makes():
    waiting = [tuple("ax"), tuple("ay"), tuple("bx"), tuple("c")]
    made = ledger("ax", *waiting)
    made.start(tuple("ax"))
    # a and x are being made; of those that wait for nobody, the one with the fewest new prefixes.
    assert waiting[made.best(waiting)] == ("c",)
    made.finish(tuple("ax"), [])
    assert waiting[made.best(waiting)] == tuple("ax")
    assert waiting[made.best(waiting[1:]) + 1] == tuple("ay")


def test_a_task_that_is_put_back_makes_nothing():
    made = ledger("a", "a", "bc")
    made.start(("a",))
    made.put_back(("a",))
    assert made.best([("a",), tuple("bc")]) == 0


def test_what_no_task_needs_goes_once_all_are_known():
    made = ledger("a", "a", "b", complete=False)
    for _ in range(2):
        made.start(("a",))
    assert made.finish(("a",), [held("a1"), held("a2")]) == []
    assert made.finish(("a",), []) == []
    made.is_complete = True
    made.start(("b",))
    assert sorted(made.finish(("b",), [held("b1")])) == ["a1", "a2", "b1"]
    assert made.peak_nbytes == 30


def test_beyond_the_limit_goes_what_saves_least_per_byte():
    made = ledger(*"aaabbbccc", limit=100)
    made.start(("a",))
    assert made.finish(("a",), [held("a cheap", 50, 0.1), held("a dear", 50, 9.0)]) == []
    made.start(("b",))
    assert made.finish(("b",), [held("b small", 10, 0.1)]) == ["a cheap"]
    made.start(("c",))
    assert made.finish(("c",), [held("c huge", 99, 5.0)]) == ["b small", "c huge"]


def test_the_same_result_made_twice_is_held_once():
    made = ledger("a", "a", "a")
    for _ in range(2):
        made.start(("a",))
        made.finish(("a",), [held("a1", 10)])
    assert made.peak_nbytes == 10


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), min_size=1, max_size=12),
    st.integers(0, 60),
    st.data(),
)
def test_nothing_is_held_at_the_end_nor_beyond_the_limit(tasks, limit, data):
    made = ledger(*tasks, limit=limit)
    kept = {}
    waiting = list(tasks)
    while waiting:
        task = waiting.pop(made.best(waiting))
        made.start(task)
        new = [
            Held(f"{p}{i}", p, data.draw(st.integers(1, 30)), data.draw(st.floats(0, 9))) for i, p in enumerate(task)
        ]
        kept |= {one.name: one.nbytes for one in new if one.name not in kept}
        for name in made.finish(task, new):
            kept.pop(name, None)
        assert sum(kept.values()) <= limit
    assert kept == {}

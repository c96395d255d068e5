"""What a report advises: each rule where it holds, and nothing where all is well."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import COPYING_TIERS
from joblib import Parallel, delayed, parallel_backend
from sklearn.ensemble import RandomForestClassifier

from joblib_backends import CallReport, last_report
from joblib_backends.advice import advice_for
from joblib_backends.data.costs import ArgumentCosts

#: A call that went well: eight tasks at a time for ten seconds, on eight cores, some quick ones inline.
WELL = CallReport(
    "fit", "processes", "tier='processes' was asked for", 8, 80, 80, 10.0, 78.0, 0, 0, 0, False,
    cores=8, cpu_seconds=77.0, active_seconds=9.9, longest_seconds=1.5, longest_task=3, nbytes_results=1_000,
)  # fmt: skip


def advised(**figures):
    return advice_for(replace(WELL, **figures))


def test_a_call_that_went_well_gets_no_advice():
    assert advised() == ()


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        (
            {"tasks": 50_000, "seconds": 10.0, "busy_seconds": 4.0, "cpu_seconds": 4.0, "longest_seconds": 0.1},
            "Tasks of 80 µs are shorter than it takes to hand them out: a plain loop (n_jobs=1) is faster, and so is "
            "more work in each task.",
        ),
        (
            {"encode_seconds": 6.8, "costly_argument": "`model`, a Forest"},
            "68% of the time went into pickling `model`, a Forest: pass it in scatter=[...].",
        ),
        (
            {"encode_seconds": 6.8},
            "68% of the time went into pickling the tasks' arguments: pass less, what they are made from, or what they "
            "have in common in scatter=[...].",
        ),
        (
            {"encode_seconds": 6.8, "costly_argument": "`data`, a ndarray", "nbytes_moved": 2_000_000_000},
            "68% of the time went into placing 2.0 GB where workers read it: calls on the same data in one with block "
            "place it once.",
        ),
        (
            {"load_seconds": 39.0},
            "50% of the tasks' time went into unpickling their arguments: NumPy arrays, pandas and Arrow tables are "
            "mapped instead, and larger tasks unpickle less often.",
        ),
        (
            {"decode_seconds": 4.0, "nbytes_results": 2_000_000_000},
            "40% of the time went into 2.0 GB of results: return less, such as a score in the place of a model, or "
            "write results to files in the tasks.",
        ),
        (
            {"cpu_seconds": 4 * 78.0, "cores": 16, "delay_seconds": 39.0},
            "BLAS or OpenMP used 4.0 threads in each of 8 tasks at once, on 16 cores: leave inner_max_num_threads out, "
            "or set it to 1.",
        ),
        (
            {"cpu_seconds": 30.0, "delay_seconds": 39.0},
            "Tasks were ready and waited for a core 50% of their time, while they used 3.0 of 8: other programs are "
            "using this machine.",
        ),
        (
            {"busy_seconds": 20.0, "cpu_seconds": 20.0, "longest_seconds": 9.0},
            "The batch that begins with task 3 took 9 s of the call's 10 s, with 2.0 batches at once on average: begin "
            "with what takes longest, or split it.",
        ),
        (
            {"tier": "threads", "reason": "tier='threads' was asked for", "cpu_seconds": 10.0},
            "Threads used 1.0 of 8 cores, as Python code does that holds the interpreter lock: leave the tier to "
            "tier='auto', or ask for tier='processes'.",
        ),
        (
            {"lost_workers": 2},
            "2 workers died over batches of the call: if memory ran out, use fewer n_jobs or smaller tasks.",
        ),
    ],
    ids=["tiny", "argument", "arguments", "placing", "load", "results", "threads", "busy", "long", "lock", "lost"],
)
def test_what_takes_time_that_it_need_not_take_is_said(figures, sentence):
    assert advised(**figures) == (sentence,)


@pytest.mark.parametrize("figures", [{"seconds": 0.1}, {"failed": True}, {"batches": 0}])
def test_short_failed_and_empty_calls_get_no_advice(figures):
    assert advised(encode_seconds=9.0, lost_workers=3, **figures) == ()


def test_two_sentences_are_given_at_most_and_the_costliest_first():
    given = advised(encode_seconds=4.0, decode_seconds=6.0, load_seconds=39.0)
    assert [sentence[:3] for sentence in given] == ["60%", "50%"]


def test_results_from_the_checkpoint_are_no_tiny_tasks():
    assert advised(tasks=50_000, tasks_restored=49_920) == ()


def test_a_slow_input_is_no_fault_of_its_tasks():
    quick = {"tasks": 1_000, "busy_seconds": 0.4, "cpu_seconds": 0.4, "longest_seconds": 0.01}
    assert advised(**quick, active_seconds=9.0)
    assert advised(**quick, active_seconds=0.5) == ()


def predicted(chunk, model):
    return float(model.predict(chunk).sum())


def test_what_is_advised_of_a_model_that_is_pickled_helps():
    """The advice names the argument; with it in scatter, it is pickled once."""
    data = np.random.default_rng(0).random((2_000, 5))
    model = RandomForestClassifier(30, random_state=0).fit(data, data[:, 0] > data[:, 1])
    reports = []
    for scatter in ([], [model]):
        with parallel_backend("hybrid", tier="processes", n_jobs=2, scatter=scatter):
            found = Parallel(batch_size=1)(
                delayed(predicted)(data[i : i + 50], model=model) for i in range(0, 2_000, 50)
            )
        assert found == [predicted(data[i : i + 50], model) for i in range(0, 2_000, 50)]
        reports.append(last_report())
    plain, scattered = reports
    assert plain.costly_argument == "`model`, a RandomForestClassifier"
    assert plain.nbytes_pickled > 40 * 100_000
    assert scattered.nbytes_pickled < plain.nbytes_pickled / 10


def first_of(chunk):
    return chunk[0]


def test_chunks_that_differ_are_not_advised_to_be_scattered():
    """Each is wrapped for its task, perhaps where the last one was in memory."""
    with parallel_backend("hybrid", tier="processes", n_jobs=2):
        tasks = (delayed(first_of)([Slow() for _ in range(3)] + list(range(i, 2_000))) for i in range(5))
        Parallel(batch_size=1)(tasks)
    assert last_report().costly_argument == ""


def test_a_threads_call_that_asks_for_threads_is_known_by_its_reason():
    with parallel_backend("hybrid", tier="threads", n_jobs=2):
        Parallel()(delayed(abs)(i) for i in range(4))
    assert "asked for" in last_report().reason


class Slow:
    """Takes its time to be pickled."""

    def __reduce__(self):
        sum(range(300_000))
        return Slow, ()


def takes_three(first, slow, last=None):
    return None


def test_the_costliest_argument_has_the_name_that_its_function_gives_it(hybrid, tier):
    with hybrid():
        slow = Slow()
        Parallel(batch_size=1)(delayed(takes_three)(np.zeros(3), slow, last=[1]) for _ in range(4))
    assert last_report().costly_argument == ("`slow`, a Slow" if tier in COPYING_TIERS else "")


@pytest.mark.parametrize("is_common", [True, False])
def test_what_has_no_signature_has_numbered_arguments_and_what_travels_once_is_not_named(is_common):
    costs, one, other = ArgumentCosts(), Slow(), Slow()
    for value in (one, one if is_common else other):
        begun = costs.begun([value])
        begun[id(value)] = 1.0
        costs.add(print, [value], {}, begun)
    assert costs.costliest == ("`argument 0`, a Slow" if is_common else "")


def test_quick_tasks_are_not_looked_at():
    costs = ArgumentCosts()
    costs.note_batch(1e-4)
    assert costs.begun([1]) is None

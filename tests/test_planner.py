"""The rule that chooses a tier, and the costs that may overrule it: numbers in, decision and reason out."""

import dataclasses
import itertools

import pytest

from joblib_backends.experience import BatchSeen, Experience
from joblib_backends.planner import CallPlanner, Progress, Readiness
from joblib_backends.rules import Facts, Plan, allowed_tiers, choose_tier

CLUSTER = {"cluster": "a Dask client was given"}


@pytest.mark.parametrize(
    ("facts", "tier"),
    [
        # Nothing is known.
        ({}, "processes"),
        ({"trusted_on_threads": True}, "threads"),
        ({"is_daemonic": True}, "threads"),
        # Hints.
        ({"prefer": "threads"}, "threads"),
        ({"prefer": "processes"}, "processes"),
        ({"prefer": "processes", "trusted_on_threads": True}, "processes"),
        ({"prefer": "processes", "is_daemonic": True}, "threads"),
        # A cluster takes what may leave the process.
        (CLUSTER, "dask"),
        ({**CLUSTER, "prefer": "threads"}, "dask"),
        ({**CLUSTER, "trusted_on_threads": True}, "dask"),
        ({**CLUSTER, "is_daemonic": True}, "dask"),
        ({**CLUSTER, "require": "sharedmem"}, "threads"),
        # A tier that was asked for.
        ({"tier": "threads", **CLUSTER}, "threads"),
        ({"tier": "processes", "prefer": "threads"}, "processes"),
        ({"tier": "processes", "trusted_on_threads": True}, "processes"),
        ({"tier": "processes", "is_daemonic": True}, "threads"),
        ({"tier": "dask", "is_daemonic": True}, "dask"),
        ({"tier": "inline", "prefer": "threads"}, "inline"),
        ({"tier": "spark"}, "spark"),
        # Shared memory is a demand.
        ({"require": "sharedmem"}, "threads"),
        ({"require": "sharedmem", "tier": "processes"}, "threads"),
        ({"require": "sharedmem", "tier": "dask"}, "threads"),
        ({"require": "sharedmem", "tier": "inline"}, "inline"),
        ({"require": "sharedmem", "prefer": "processes"}, "threads"),
    ],
)
def test_the_rule_chooses(facts, tier):
    assert choose_tier(Facts(**facts)).tier == tier


ALL_FACTS = [
    Facts(*values)
    for values in itertools.product(
        ["auto", "inline", "threads", "processes", "dask"],
        [None, "threads", "processes"],
        [None, "sharedmem"],
        [None, "a Dask client was given"],
        [False, True],
        [False, True],
    )
]


def test_every_plan_gives_a_reason_and_is_the_same_again():
    for facts in ALL_FACTS:
        plan = choose_tier(facts)
        assert plan.reason
        assert plan == choose_tier(facts)


def test_a_daemon_never_gets_processes():
    assert "processes" not in {choose_tier(facts).tier for facts in ALL_FACTS if facts.is_daemonic}


def test_shared_memory_is_always_met():
    assert {choose_tier(facts).tier for facts in ALL_FACTS if facts.require} == {"inline", "threads"}


def test_untrusted_code_reaches_threads_only_where_somebody_asked():
    asked = ("sharedmem", "threads")
    for facts in ALL_FACTS:
        if choose_tier(facts).tier == "threads" and not facts.trusted_on_threads and not facts.is_daemonic:
            assert facts.require in asked or facts.prefer in asked or facts.tier in asked


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (Facts(require="sharedmem"), "require='sharedmem' needs the parent's memory"),
        (Facts(tier="inline"), "tier='inline' was asked for"),
        (Facts(prefer="threads"), "prefer='threads' was asked for"),
        (Facts(), "the function is not known to be safe on threads"),
        (Facts(cluster="a Dask client was given"), "a Dask client was given"),
    ],
)
def test_the_reason_says_what_decided(facts, reason):
    assert choose_tier(facts).reason == reason


def test_a_plan_is_a_value():
    assert Plan("threads", "x") == Plan("threads", "x")
    assert Facts(tier="dask").wants_cluster
    assert not Facts(tier="threads", cluster="x").wants_cluster


# ---- what cost may decide


@pytest.mark.parametrize(
    ("facts", "tiers"),
    [
        ({}, ("inline", "processes")),
        ({"trusted_on_threads": True}, ("inline", "threads", "processes")),
        ({"prefer": "threads"}, ("inline", "threads")),
        ({"prefer": "processes", "trusted_on_threads": True}, ("inline", "processes")),
        ({"require": "sharedmem"}, ("inline", "threads")),
        ({"is_daemonic": True, "trusted_on_threads": True}, ("inline", "threads")),
        ({"is_nested": True, "trusted_on_threads": True}, ("inline", "threads")),
        # A cluster that happens to be there is not worth a trip for a microsecond; one that was asked for is used.
        ({**CLUSTER, "cluster_was_given": False}, ("inline", "dask")),
        ({**CLUSTER, "cluster_was_given": True}, ("dask",)),
        # Who consumes a generator is not there to run tasks.
        ({"caller_waits": False}, ("processes",)),
        ({"caller_waits": False, "trusted_on_threads": True}, ("threads",)),
        # Nor can it leave a task behind that it runs itself.
        ({"has_timeout": True}, ("processes",)),
        ({"has_timeout": True, "trusted_on_threads": True}, ("threads", "processes")),
        ({"has_timeout": True, "prefer": "threads"}, ("threads",)),
        ({"tier": "threads"}, ("threads",)),
        ({"tier": "processes", "trusted_on_threads": True}, ("processes",)),
        ({"tier": "spark"}, ("spark",)),
    ],
)
def test_cost_decides_only_among_what_is_allowed(facts, tiers):
    assert allowed_tiers(Facts(**facts)) == tiers


# ---- what is cheapest

WARM = Readiness(n_ready=2, startup_s=2.0)
COLD = Readiness(n_ready=0, startup_s=2.0)
SKLEARN = Facts(trusted_on_threads=True)
UNKNOWN = Facts()


def decided(facts, *batches, known=None, nbytes=0, workers=WARM, **progress):
    """Return the plan after ``batches`` were seen, one decision after each."""
    planner = CallPlanner(facts, known, nbytes)
    state = Progress(**{"n_pending": 4, **progress})
    plan = planner.decide(state, workers)
    for batch in batches:
        planner.observe(batch)
        plan = planner.decide(state, workers)
    return plan


def on(tier, wall_s, cpu_s=None, n=1, delay_s=0.0, n_jobs=2, over_s=0.0):
    """Return what is seen of a batch of ``n`` tasks while as many others run as there are jobs.

    ``over_s`` is what handing it over and taking it back cost besides.
    """
    busy_s = over_s + n * wall_s / (1 if tier == "inline" else n_jobs)
    cpu_s = wall_s if cpu_s is None else cpu_s
    return BatchSeen(tier, n, n * wall_s, n * cpu_s, n * delay_s, busy_s, 1 if tier == "inline" else n_jobs)


def test_unknown_code_begins_where_it_is_safe_and_costs_nothing():
    assert decided(SKLEARN).tier == "inline"
    assert decided(UNKNOWN).tier == "inline"
    assert decided(Facts(prefer="threads")).tier == "inline"


def test_an_explicit_tier_is_never_left():
    seen = [on("threads", 1e-6)] * 50
    assert decided(Facts(tier="threads"), *seen) == Plan("threads", "tier='threads' was asked for")


@pytest.mark.parametrize("facts", [SKLEARN, UNKNOWN, Facts(require="sharedmem"), Facts(prefer="processes")])
def test_tiny_tasks_stay_with_the_caller(facts):
    assert decided(facts, on("inline", 1e-6), n_tasks=5000).tier == "inline"
    assert decided(facts, on("inline", 1e-6), n_tasks=None).tier == "inline"


def test_the_search_for_libraries_before_the_first_batch_on_threads_must_pay_too():
    seen = on("inline", 0.002)
    assert decided(SKLEARN, seen, n_tasks=10, workers=Readiness(0)).tier == "threads"
    assert decided(SKLEARN, seen, n_tasks=10, workers=Readiness(0, threads_s=0.01)).tier == "inline"
    assert decided(SKLEARN, seen, n_tasks=100, workers=Readiness(0, threads_s=0.01)).tier == "threads"


def test_nothing_left_to_do_needs_no_workers():
    known = Experience(0.0, 1, {"processes": 0.0}, {"processes": 1.0}, {"processes": 0.0})
    assert not decided(UNKNOWN, known=known, workers=COLD, n_pending=0, more_to_come=False).start_workers


def test_a_worker_start_that_has_no_idle_core_must_pay_more():
    seen = [on("threads", 0.02, 0.0148)] * 20
    lost = {"workers": COLD, "elapsed_s": 2.0, "n_pending": 20}
    two, many = (Facts(trusted_on_threads=True, cores=cores) for cores in (2, 3))
    assert not decided(two, *seen, **lost).start_workers
    assert decided(many, *seen, **lost).start_workers


def test_work_that_ends_before_workers_would_be_there_starts_none():
    known = Experience(0.1, 10, {"inline": 0.1}, {"inline": 1.0})
    assert not decided(UNKNOWN, known=known, workers=COLD).start_workers
    assert decided(UNKNOWN, known=known, workers=Readiness(0, startup_s=0.3)).start_workers


def test_tiny_tasks_that_began_on_threads_come_back():
    assert decided(SKLEARN, *[on("threads", 30e-6, over_s=60e-6)] * 4, n_pending=4).tier == "inline"


def test_long_tasks_that_scale_stay_on_threads():
    plan = decided(SKLEARN, *[on("threads", 0.2, 0.197)] * 4, n_tasks=12)
    assert plan.tier == "threads"
    assert "thread efficiency 0.98" in plan.reason


def test_code_that_holds_the_gil_moves_to_processes_when_they_are_there():
    seen = [on("threads", 0.2, 0.104)] * 4
    assert decided(SKLEARN, *seen, n_tasks=40).tier == "processes"
    cold = decided(SKLEARN, *seen, n_tasks=40, workers=COLD)
    assert (cold.tier, cold.start_workers) == ("inline", True)


def test_sixty_four_threads_on_one_gil_are_seen_too():
    facts = Facts(trusted_on_threads=True, n_jobs=64, cores=64)
    seen = [on("threads", 1.0, 1 / 60, n_jobs=64)] * 64
    assert decided(facts, *seen, n_tasks=6400, workers=Readiness(64)).tier == "processes"


def test_a_busy_machine_is_not_mistaken_for_the_gil():
    """Half of the time the task was ready to run and another program ran: processes would wait as long."""
    seen = [on("threads", 0.2, 0.1, delay_s=0.098)] * 4
    assert decided(SKLEARN, *seen, n_tasks=40).tier == "threads"


def test_waiting_for_io_is_not_mistaken_for_the_gil():
    seen = [on("threads", 0.2, 0.002)] * 4
    assert decided(SKLEARN, *seen, n_tasks=40).tier == "threads"


def test_waiting_for_io_overlaps_beyond_the_cores():
    """Twenty jobs that sleep are twenty times as fast on two cores, jobs that compute only twice."""
    facts = Facts(n_jobs=20, cores=2)
    sleeps = decided(facts, on("inline", 0.05, 0.001), n_tasks=200)
    computes = decided(facts, on("inline", 0.05), n_tasks=200)
    assert sleeps.tier == computes.tier == "processes"
    assert sleeps.predicted_s < computes.predicted_s / 5


def test_untrusted_work_moves_to_workers_that_are_there():
    assert decided(UNKNOWN, on("inline", 0.05), n_tasks=40).tier == "processes"


def test_workers_are_started_for_work_that_they_would_shorten():
    plan = decided(UNKNOWN, on("inline", 0.5), n_tasks=40, workers=COLD)
    assert (plan.tier, plan.start_workers) == ("inline", True)
    short = decided(UNKNOWN, on("inline", 0.001), n_tasks=40, workers=COLD)
    assert (short.tier, short.start_workers) == ("inline", False)


def test_short_calls_add_up_until_workers_are_worth_their_start():
    known = Experience(0.02, 10, {"inline": 0.02}, {"inline": 1.0}, {"inline": 0.02})
    assert not decided(UNKNOWN, known=known, workers=COLD).start_workers
    lost = CallPlanner(UNKNOWN)
    for _ in range(10):
        lost.observe(on("inline", 0.02))
    lost.decide(Progress(n_pending=1), COLD)
    assert 0.05 < lost.missed() < 0.1
    assert decided(UNKNOWN, known=known, workers=Readiness(0, 2.0, missed_s=3 * lost.missed())).start_workers


def test_work_of_unknown_extent_must_have_lasted_before_workers_are_started():
    seen = [on("inline", 0.01)] * 2
    assert not decided(UNKNOWN, *seen, workers=COLD, elapsed_s=0.02).start_workers
    assert decided(UNKNOWN, *[on("inline", 0.01)] * 30, workers=COLD, elapsed_s=0.6).start_workers


def test_a_task_that_does_not_end_counts_while_it_runs():
    assert decided(UNKNOWN, running_s=0.002).tier == "processes"
    plan = decided(UNKNOWN, running_s=5.0, workers=COLD, elapsed_s=5.0)
    assert (plan.tier, plan.start_workers) == ("inline", True)
    # Workers that do not come in time are waited for, and why they do not come is said.
    assert decided(UNKNOWN, running_s=50.0, workers=COLD, elapsed_s=50.0).tier == "processes"
    assert decided(Facts(prefer="threads"), on("inline", 1e-6), running_s=0.01).tier == "threads"


def test_a_caller_that_is_in_a_long_task_gets_nothing_else_to_do():
    """However small the others are: it may be waiting for them."""
    small = [on("threads", 1e-6, n=100, over_s=1e-3)] * 1000
    assert decided(Facts(require="sharedmem"), *small, running_s=0.01).tier == "threads"
    assert decided(Facts(require="sharedmem"), *small).tier == "inline"
    # A batch that takes as long as its tasks usually do is not long.
    assert decided(Facts(require="sharedmem"), *small, running_s=0.01, n_running=10_000).tier == "inline"


@pytest.mark.parametrize(
    ("seconds", "cores_used", "cores", "moves"),
    [(0.2, 1.0, 2, True), (0.2, 1.9, 2, False), (60.0, 1.9, 2, False), (0.2, 1.9, 64, True), (0.01, 1.0, 2, False)],
    ids=["one thread", "threads of its own", "however long", "most cores idle", "too early to tell"],
)
def test_a_task_that_uses_the_cores_by_itself_is_not_joined_by_others(seconds, cores_used, cores, moves):
    planner = CallPlanner(Facts(trusted_on_threads=True, cores=cores))
    assert planner.decide(Progress(n_pending=4), WARM).tier == "inline"
    plan = planner.decide(Progress(n_pending=4, running_s=seconds, cores_used=cores_used), WARM)
    assert (plan.tier != "inline") == moves


def test_one_huge_task_among_tiny_ones_moves_what_waits_and_does_not_stand_for_what_comes():
    planner = CallPlanner(UNKNOWN)
    state = Progress(n_pending=3)
    for _ in range(20):
        planner.observe(on("inline", 1e-5))
    assert planner.decide(state, WARM).tier == "inline"
    assert planner.decide(Progress(n_pending=3, running_s=2.0), WARM).tier == "processes"
    planner.observe(on("inline", 2.0))
    for _ in range(20_000):
        planner.observe(on("processes", 1e-5, n=10))
    plan = planner.decide(Progress(n_pending=3, more_to_come=False), WARM)
    assert plan.predicted_s < 0.01
    assert planner.batch_size(Progress(n_pending=100_000, more_to_come=False)) > 10


def test_uneven_tasks_are_judged_by_their_mean():
    seen = [on("inline", 0.001 if i % 10 else 0.2) for i in range(40)]
    assert decided(UNKNOWN, *seen, n_tasks=400).tier == "processes"


def test_a_generator_that_is_slow_to_yield_starts_no_workers():
    """Ten seconds have passed, and the tasks themselves took a millisecond in all."""
    seen = [on("inline", 1e-4)] * 10
    plan = decided(UNKNOWN, *seen, n_pending=1, elapsed_s=10.0, workers=COLD)
    assert (plan.tier, plan.start_workers) == ("inline", False)


def test_data_that_would_have_to_move_keeps_short_work_in_place():
    """Six sums over 80 MB: to place it would take as long as to add it up."""
    seen = on("inline", 0.02)
    assert decided(UNKNOWN, seen, n_tasks=6, nbytes=80_000_000).tier == "inline"
    assert decided(UNKNOWN, seen, n_tasks=6).tier == "processes"


def test_the_last_task_of_a_call_is_not_moved():
    plan = decided(SKLEARN, *[on("threads", 0.2, 0.104)] * 4, n_pending=1, more_to_come=False, workers=COLD)
    assert (plan.tier != "processes", plan.start_workers) == (True, False)


def test_a_cluster_that_happens_to_be_there_is_left_for_tiny_tasks_only():
    facts = Facts(cluster="a Dask client is active", cluster_was_given=False)
    assert decided(facts).tier == "dask"
    assert decided(facts, *[on("dask", 1e-6, n=100, over_s=2e-3)] * 8, n_tasks=5000).tier == "inline"
    assert decided(facts, *[on("dask", 0.2)] * 8, n_tasks=5000).tier == "dask"


def test_small_differences_do_not_move_a_call_back_and_forth():
    planner = CallPlanner(SKLEARN)
    tiers = []
    for i in range(40):
        planner.observe(on("threads", 0.01, 0.0098 if i % 2 else 0.0075))
        tiers.append(planner.decide(Progress(n_pending=4), WARM).tier)
    assert len(set(tiers[4:])) == 1


@pytest.mark.parametrize("known_s", [1e-6, 0.3])
def test_what_was_learned_decides_the_first_batch(known_s):
    known = Experience(known_s, 100, {"inline": known_s}, {"inline": 1.0})
    tier = "inline" if known_s < 0.01 else "processes"
    assert decided(UNKNOWN, known=known).tier == tier
    assert decided(UNKNOWN, known=known, workers=COLD).start_workers == (tier == "processes")


def test_what_was_learned_of_the_gil_is_not_learned_again():
    known = Experience(0.1, 100, {"threads": 0.2}, {"threads": 0.52}, {"threads": 0.1})
    assert decided(SKLEARN, known=known).tier == "processes"


def test_what_is_measured_outdoes_what_was_learned():
    known = Experience(1e-6, 100, {"inline": 1e-6}, {"inline": 1.0})
    assert decided(UNKNOWN, on("inline", 0.1), known=known).tier == "processes"


def test_a_call_teaches_what_it_saw():
    planner = CallPlanner(SKLEARN)
    assert planner.experience() is None
    for _ in range(4):
        planner.observe(on("threads", 0.2, 0.104))
    learned = planner.experience()
    assert learned.n_tasks == 4
    assert learned.solo_s == pytest.approx(0.104)
    assert learned.task_s == {"threads": pytest.approx(0.2)}
    assert learned.efficiency == {"threads": pytest.approx(0.52)}


@pytest.mark.parametrize("seconds", [-5.0, 0.0, float("nan"), float("inf"), 1e300])
def test_a_clock_that_jumps_is_survived(seconds):
    planner = CallPlanner(SKLEARN)
    for tier in ("inline", "threads", "processes"):
        for times in ((seconds, 0.1), (0.1, seconds), (seconds, seconds)):
            planner.observe(BatchSeen(tier, 3, *times, delay_s=seconds))
    for workers in (WARM, COLD):
        plan = planner.decide(Progress(n_pending=3, elapsed_s=seconds, running_s=0.0), workers)
        assert plan.tier in ("inline", "threads", "processes")
    assert planner.batch_size(Progress(n_pending=3)) >= 1
    assert Experience.from_dict(planner.experience().as_dict())


# ---- batches


def size_after(facts, *batches, known=None, **progress):
    planner = CallPlanner(facts, known)
    for batch in batches:
        planner.observe(batch)
    state = Progress(**{"n_pending": 4, **progress})
    planner.decide(state, WARM)
    return planner.batch_size(state)


def test_long_tasks_are_never_glued_together():
    for tier in ("inline", "threads", "processes", "dask"):
        assert size_after(Facts(tier=tier), *[on(tier, 0.5)] * 40, n_tasks=10_000) == 1


def test_batches_of_tiny_tasks_run_long_enough_to_hide_what_they_cost():
    tiers = ("threads", "processes", "dask")
    sizes = {tier: size_after(Facts(tier=tier), *[on(tier, 1e-4, n=500)] * 40) for tier in tiers}
    assert sizes["threads"] < sizes["processes"] < sizes["dask"] <= 0.21 / 1e-4


def test_batches_for_a_large_cluster_last_as_long_as_its_scheduler_needs_for_one_of_each_worker():
    facts = Facts(tier="dask", n_jobs=1000)
    known = Experience(0.01, 1_000_000, {"dask": 0.01}, {"dask": 1.0})
    progress = {"n_tasks": 1_000_000, "known": known}
    assert size_after(facts, *[on("dask", 1 / 128)] * 40, **progress) == 128
    assert size_after(dataclasses.replace(facts, n_jobs=100), *[on("dask", 1 / 128)] * 40, **progress) == 25


def test_the_first_batch_is_one_task_unless_the_kind_is_known():
    assert size_after(UNKNOWN) == 1
    known = Experience(1e-6, 5000, {"inline": 1e-6}, {"inline": 1.0})
    assert 1 < size_after(UNKNOWN, known=known) <= 8


def test_batches_grow_step_by_step():
    assert size_after(UNKNOWN, on("inline", 1e-7)) <= 8
    assert size_after(Facts(tier="processes"), *[on("processes", 1e-7)] * 100) <= 4


def test_towards_the_end_every_job_gets_several_batches():
    facts = Facts(tier="processes", n_jobs=4)
    size = size_after(facts, *[on("processes", 1e-6, n=1000)] * 10, n_tasks=10_400)
    assert size <= 400 / 4 / 4


def test_tasks_that_take_no_time_make_batches_of_finite_size():
    assert 1 < size_after(UNKNOWN, *[on("inline", 0.0, n=64)] * 3) < 1e6


def test_the_calling_thread_leaves_something_for_the_others_to_take():
    """Three hundred tasks that found their work done, and perhaps three hundred that will not."""
    known = Experience(0.0005, 600, {"inline": 0.0005}, {"inline": 1.0})
    facts = Facts(n_jobs=8, cores=8)
    assert size_after(facts, *[on("inline", 0.0005, n=4)] * 4, known=known) <= 584 // 8


def test_a_pace_is_of_a_tier_that_ran_alone():
    """What a long task of the calling thread took must not be charged to the tier that ended a batch beside it."""
    planner = CallPlanner(UNKNOWN)
    for _ in range(8):
        planner.observe(BatchSeen("processes", 1, 0.1, 0.1, 0.0, None, 2))
    assert planner.experience().pace_s == {}
    planner.observe(BatchSeen("inline", 1, 3.0, 3.0, 0.0, None, 3))
    assert planner.decide(Progress(n_pending=30), WARM).tier == "processes"

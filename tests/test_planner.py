"""The rule that chooses a tier: a table of facts and answers."""

import itertools

import pytest

from joblib_backends.planner import Facts, Plan, choose_tier

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

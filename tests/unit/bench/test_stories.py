"""The stories of the soak and the faults that come all the while: each has one right end."""

from collections import Counter
from typing import Any

import pytest

from bench.soak import stories
from bench.soak.faults import KINDS as FAULTS
from bench.soak.faults import OPERATOR_KILLED, plan_faults
from bench.soak.kinds import KINDS, KNOWN_BEFORE, make_stories
from bench.soak.stories import ENDINGS, Outcome, Story, compute_outcome
from lora_api import FailureClass, Phase
from tests.unit.bench.told import tell

F = FailureClass
SHRINK = {"onOutOfMemory": "shrinkMicroBatch"}


def failed(attempt: int, *classes: FailureClass, **more: Any) -> Outcome:
    return Outcome(Phase.FAILED, attempt, failures=tuple((one,) for one in classes), **more)


ENDS: dict[str, tuple[Story, Outcome]] = {
    "success": (tell("succeeds"), Outcome(Phase.SUCCEEDED, 1)),
    "a charged restart": (
        tell("Internal", "succeeds"),
        Outcome(Phase.SUCCEEDED, 2, 1, ((F.INTERNAL,),)),
    ),
    "a store that is away is not charged": (
        tell("StoreUnavailable", "succeeds"),
        Outcome(Phase.SUCCEEDED, 2, 0, ((F.STORE_UNAVAILABLE,),)),
    ),
    "a lost node is not charged": (
        tell("node lost", "succeeds"),
        Outcome(Phase.SUCCEEDED, 2, 0, ((F.NODE_LOST, F.POD_LOST),)),
    ),
    "bad data is final": (tell("BadData"), failed(1, F.BAD_DATA)),
    "no restarts are allowed": (tell("crashes", policy={"maxRestarts": 0}), failed(1, F.INTERNAL)),
    "all restarts are used up": (
        tell("PeerLost", "PeerLost", policy={"maxRestarts": 1}),
        failed(2, F.PEER_LOST, F.PEER_LOST, charged=1),
    ),
    "evicted again and again": (
        tell(*["evicted"] * 6, "succeeds"),
        Outcome(Phase.SUCCEEDED, 7, 0, ((F.EVICTED,),) * 6),
    ),
    "the same step three times": (
        tell("Internal", "Internal", "Internal", stuck=True),
        failed(3, F.INTERNAL, F.INTERNAL, F.INTERNAL, charged=2),
    ),
    "a stall is charged": (
        tell("stalls", "succeeds"),
        Outcome(Phase.SUCCEEDED, 2, 1, ((F.STALLED,),)),
    ),
    "progress that has to be told": (
        tell("evicted", "succeeds once its progress was told"),
        Outcome(Phase.SUCCEEDED, 2, 0, ((F.EVICTED,),), told=True),
    ),
    "a suspension is no failure": (tell("suspended", "succeeds"), Outcome(Phase.SUCCEEDED, 2)),
    "out of memory": (tell("GPUOutOfMemory"), failed(1, F.GPU_OUT_OF_MEMORY)),
    "half the micro-batch fits": (
        tell("GPUOutOfMemory", "succeeds", policy=SHRINK),
        Outcome(Phase.SUCCEEDED, 2, 0, ((F.GPU_OUT_OF_MEMORY,),), micro_batch=2),
    ),
    "one sequence does not fit": (
        tell(*["out of host memory"] * 3, policy=SHRINK),
        failed(3, *[F.HOST_OUT_OF_MEMORY] * 3, micro_batch=1),
    ),
    "shrinking leaves other failures alone": (tell("Diverged", policy=SHRINK), failed(1, F.DIVERGED)),
    "a preflight that fails": (
        tell(preflights=("AuthDenied",)),
        failed(0, F.AUTH_DENIED, failed_preflights=1),
    ),
    "rights that go once the run has worked come back": (
        tell("AuthDenied", "succeeds"),
        Outcome(Phase.SUCCEEDED, 2, 0, ((F.AUTH_DENIED,),)),
    ),
    "a node that rejects a pod is not charged": (
        tell("rejected by a node", "succeeds", policy={"maxRestarts": 0}),
        Outcome(Phase.SUCCEEDED, 2, 0, ((F.POD_LOST,),)),
    ),
    "a preflight that is repeated": (
        tell("succeeds", preflights=("Internal", "passes")),
        Outcome(Phase.SUCCEEDED, 1, 1, ((F.INTERNAL,),), failed_preflights=1),
    ),
    "deleted by its user": (tell("run deleted"), Outcome(None, 1, children=False)),
    "cleared up": (
        tell("succeeds", policy={"ttlSecondsAfterFinished": 1}),
        Outcome(Phase.SUCCEEDED, 1, children=False),
    ),
    "deleted after its end": (
        tell("succeeds", policy={"ttlSecondsAfterFinished": 1, "ttlDeletes": "run"}),
        Outcome(None, 1, children=False),
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_story_has_one_right_end(case: str) -> None:
    story, want = ENDS[case]
    assert compute_outcome(story) == want


@pytest.mark.parametrize("attempts", [("StoreUnavailable",), ("succeeds", "succeeds"), ("BadData", "succeeds"), ()])
def test_a_story_that_goes_on_after_its_end_or_has_none_is_refused(attempts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="run-0"):
        compute_outcome(tell(*attempts))


def test_made_stories_are_of_every_kind_have_an_end_and_are_the_same_for_a_seed() -> None:
    for seed in range(200):
        told = make_stories(seed, 2 * len(KINDS), 100.0, 5.0)
        assert set(Counter(story.kind for story in told).values()) == {2}
        assert [story.at for story in told] == sorted(story.at for story in told)
        assert all(compute_outcome(story) for story in told)
    assert make_stories(7, 30, 10.0, 1.0) == make_stories(7, 30, 10.0, 1.0) != make_stories(8, 30, 10.0, 1.0)


def test_the_first_stories_are_those_that_the_release_before_knows() -> None:
    for seed in range(50):
        told = make_stories(seed, 2 * len(KINDS), 1000.0, 5.0, early=10.0)
        assert {story.kind for story in told if story.at < 10.0} <= KNOWN_BEFORE
        assert set(Counter(story.kind for story in told).values()) == {2}


def test_a_namespace_with_a_rule_has_one_run() -> None:
    told = make_stories(1, 2 * len(KINDS), 100.0, 5.0)
    spaces = Counter(story.namespace for story in told)
    assert sum(1 for story in told if story.rule) == 4
    assert all((spaces[story.namespace] == 1) is bool(story.rule) for story in told)


def test_the_classes_of_an_ending_count_alike() -> None:
    for classes in ENDINGS.values():
        assert len({(F(one), stories.RULES[one].charged, stories.RULES[one].retried)[1:] for one in classes}) <= 1


def test_faults_are_of_every_kind_and_the_operator_is_killed_early_only() -> None:
    for seed in range(50):
        faults = plan_faults(seed, 300.0, 3.0, 60.0)
        assert {fault.kind for fault in faults} == set(FAULTS)
        assert all(fault.at <= 60.0 for fault in faults if fault.kind == OPERATOR_KILLED)
        assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    assert any(fault.kind == OPERATOR_KILLED for fault in plan_faults(1, 1.0, 100.0, 1.0)), "without luck too"
    late = plan_faults(1, 300.0, 3.0, 60.0, begin=20.0)
    assert min(fault.at for fault in late) > 20.0
    assert any(fault.kind == OPERATOR_KILLED for fault in late)

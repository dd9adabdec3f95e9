"""The failure table."""

import pytest

from lora_api import CLASS_BY_EXIT_CODE, FAILURE_RULES, RULES, FailureClass, FailureRule

CONTRACT = {
    64: "BadSpec",
    65: "BadData",
    66: "ModelNotFound",
    67: "AuthDenied",
    70: "Internal",
    71: "GPUOutOfMemory",
    72: "Diverged",
    73: "PeerLost",
    74: "StoreUnavailable",
    75: "Checkpointed",
    76: "GateRefused",
    77: "DiskFull",
    78: "SourceChanged",
    89: "WeightsChanged",
    80: "GPUFault",
    81: "GPUUnavailable",
    82: "GPUUnsupported",
    83: "GPUKernelFailed",
    84: "LimitTooLow",
}


def test_exit_codes_are_a_contract_between_images_of_different_versions() -> None:
    assert CLASS_BY_EXIT_CODE == CONTRACT


def test_every_class_has_one_rule() -> None:
    assert [rule.failure_class for rule in FAILURE_RULES] == list(RULES)
    assert set(RULES) == set(FailureClass)


def test_every_exit_code_means_one_class() -> None:
    codes = [rule.exit_code for rule in FAILURE_RULES if rule.exit_code is not None]
    assert len(codes) == len(set(codes))
    # 1 and 2 are what any program ends with, 126 and above what shells and signals make.
    assert all(64 <= code <= 113 for code in codes)


@pytest.mark.parametrize("rule", FAILURE_RULES, ids=lambda rule: rule.failure_class)
def test_a_rule_is_written_for_people(rule: FailureRule) -> None:
    for text in filter(None, (rule.meaning, rule.remedy, rule.waiting_remedy)):
        assert text.endswith(".")
        assert text[0].isupper()
        assert len(text) <= 400
    assert rule.meaning.count(". ") == 0


@pytest.mark.parametrize("rule", FAILURE_RULES, ids=lambda rule: rule.failure_class)
def test_what_is_charged_is_retried(rule: FailureRule) -> None:
    assert rule.retried or not rule.charged


@pytest.mark.parametrize(
    "name", ["BadSpec", "BadData", "GPUOutOfMemory", "HostOutOfMemory", "Diverged", "GPUUnsupported", "LimitTooLow"]
)
def test_what_would_fail_again_unchanged_is_not_retried(name: str) -> None:
    assert not RULES[FailureClass(name)].retried


@pytest.mark.parametrize("name", ["PodLost", "Evicted", "NodeLost", "Checkpointed", "GPUFault"])
def test_what_the_cluster_does_is_not_charged(name: str) -> None:
    assert RULES[FailureClass(name)].retried
    assert not RULES[FailureClass(name)].charged


def test_a_lost_peer_that_nothing_explains_cannot_go_on_for_ever() -> None:
    assert RULES[FailureClass.PEER_LOST].charged


@pytest.mark.parametrize(
    ("name", "follows"),
    [
        ("BadData", "ends the run"),
        ("Internal", "restarts, counts"),
        ("Evicted", "restarts"),
        ("StoreUnavailable", "restarts for a day"),
        ("AuthDenied", "ends the run; once that has worked, restarts for a day"),
    ],
)
def test_what_follows_is_said_in_words(name: str, follows: str) -> None:
    assert RULES[FailureClass(name)].follows == follows


def test_what_may_pass_is_not_charged() -> None:
    assert [rule for rule in FAILURE_RULES if rule.outage and rule.charged] == []

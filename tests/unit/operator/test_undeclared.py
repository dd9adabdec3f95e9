"""The CRD is older than the operator: what it does not have is left out of statuses."""

from lora_operator.undeclared import Undeclared

MESSAGE = (
    "failed to create typed patch object (team/run; lorafinetune.io/v1alpha1, Kind=LoRAFineTune): errors:\n"
    "  .status.trainer: field not declared in schema\n"
    "  .status.failures[0].fabric: field not declared in schema\n"
    '  .status.conditions[type="Ready"].severity: field not declared in schema'
)
STATUS = {
    "attempt": 1,
    "trainer": {"image": "t"},
    "failures": [{"class": "Internal", "fabric": "ib0"}, {"class": "Internal"}],
    "conditions": [{"type": "Ready", "severity": "Info"}],
}


def test_what_is_refused_is_left_out_from_then_on() -> None:
    undeclared = Undeclared(clock=lambda: 0.0)
    assert undeclared.leave_out(STATUS) == STATUS
    assert undeclared.learn(MESSAGE) == ("conditions.severity", "failures.fabric", "trainer")
    assert undeclared.leave_out(STATUS) == {
        "attempt": 1,
        "failures": [{"class": "Internal"}, {"class": "Internal"}],
        "conditions": [{"type": "Ready"}],
    }
    assert undeclared.learn(MESSAGE) == (), "nothing new: the write is refused for another reason"


def test_another_refusal_teaches_nothing() -> None:
    assert Undeclared().learn('LoRAFineTune "run" is invalid: status.phase: Unsupported value: "Archived"') == ()


def test_it_is_forgotten_after_a_while_since_the_crd_may_be_upgraded() -> None:
    now = [0.0]
    undeclared = Undeclared(clock=lambda: now[0])
    undeclared.learn(MESSAGE)
    now[0] = 599.0
    assert "trainer" not in undeclared.leave_out(STATUS)
    now[0] = 601.0
    assert undeclared.leave_out(STATUS) == STATUS

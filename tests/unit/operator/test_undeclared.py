"""The CRD is older than the operator: what it does not have is left out of statuses."""

from lora_operator.kube.undeclared import Undeclared

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
    assert undeclared.learn(MESSAGE) == ("status.conditions.severity", "status.failures.fabric", "status.trainer")
    assert undeclared.leave_out(STATUS) == {
        "attempt": 1,
        "failures": [{"class": "Internal"}, {"class": "Internal"}],
        "conditions": [{"type": "Ready"}],
    }
    assert undeclared.learn(MESSAGE) == (), "nothing new: the write is refused for another reason"


def test_another_refusal_teaches_nothing() -> None:
    for text in ("Operation cannot be fulfilled", 'spec.podTemplate: Unsupported value: "x"', ""):
        assert Undeclared().learn(text) == ()


def test_a_word_that_is_refused_is_said_in_words_that_the_crd_knows() -> None:
    undeclared = Undeclared(clock=lambda: 0.0)
    refusal = 'is invalid: [status.phase: Unsupported value: "Archived": supported values: "Pending", status.failures['
    refusal += '0].class: Unsupported value: "FabricDegraded": supported values: "Internal"]'
    assert undeclared.learn(refusal) == ("the word Archived", "the word FabricDegraded")
    failures = [{"class": "FabricDegraded", "message": "m" * 4096}, {"class": "Diverged"}]
    said = undeclared.leave_out({"attempt": 1, "phase": "Archived", "failures": failures})
    assert said["failures"][1] == {"class": "Diverged"}
    assert said["failures"][0]["class"] == "Internal"
    assert said["failures"][0]["message"].startswith("FabricDegraded: mmm")
    assert len(said["failures"][0]["message"]) == 4096
    assert said["attempt"] == 1
    assert "phase" not in said


def test_kubernetes_1_29_names_the_field_of_a_word_without_its_status() -> None:
    refusal = 'LoRAFineTune.lorafinetune.io "early" is invalid: [failures[0].class: Unsupported value: "FabricDegraded'
    refusal += '": supported values: "Internal", <nil>: Invalid value: "null": some validation rules were not checked]'
    assert Undeclared().learn(refusal) == ("the word FabricDegraded",)
    assert Undeclared().learn('spec.phase: Unsupported value: "x", spec.failures[0].class: Unsupported value: "y') == ()


def test_it_is_forgotten_after_a_while_since_the_crd_may_be_upgraded() -> None:
    now = [0.0]
    undeclared = Undeclared(clock=lambda: now[0])
    undeclared.learn(MESSAGE)
    now[0] = 599.0
    assert "trainer" not in undeclared.leave_out(STATUS)
    now[0] = 601.0
    assert undeclared.leave_out(STATUS) == STATUS

"""What the operator of the release before makes of how today's trainer ends."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime

from lora_api import FAILURE_RULES
from tests.skew.releases import Release
from tests.support.runs import ended, termination

READ = """
import json, sys
from datetime import UTC, datetime
from lora_api import RULES
try:
    from lora_operator.diagnosis.diagnose import diagnose_pod
    from lora_operator.watched.views import parse_pod
except ImportError:  # the release before has all its modules in one folder
    from lora_operator.diagnose import diagnose_pod
    from lora_operator.views import parse_pod
for line in sys.stdin:
    symptom = diagnose_pod(parse_pod(json.loads(line)), datetime.now(UTC), grace=30)
    rule = RULES[symptom.failure_class]
    print(json.dumps([symptom.failure_class.value, rule.charged, rule.retried, symptom.message]))
"""


def test_a_class_that_the_release_before_does_not_know_is_a_fault_of_the_trainer(before: Release) -> None:
    """It is counted and tried again, so that a rollback holds no GPUs for ever and gives no run up."""
    metadata = {
        "namespace": "team", "name": "run-1-0", "uid": "u", "resourceVersion": "1",
        "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "labels": {"lorafinetune.io/name": "run", "lorafinetune.io/attempt": "1"},
    }  # fmt: skip
    rules = [rule for rule in FAILURE_RULES if rule.exit_code is not None]
    words = [termination(str(rule.failure_class), "it broke", rank=0) for rule in rules]
    pods = [
        {"metadata": metadata, "spec": {"nodeName": "gpu-7"}, "status": ended(rule.exit_code or 0, said)}
        for rule, said in zip(rules, words, strict=True)
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, before.code))}
    done = subprocess.run(
        [sys.executable, "-c", READ], input="".join(json.dumps(pod) + "\n" for pod in pods), capture_output=True,
        text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(rules)
    for rule, one in zip(rules, found, strict=True):
        assert one[0] == rule.failure_class or one[:3] == ["Internal", True, True], rule.failure_class

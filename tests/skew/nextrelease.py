"""The release after this one, as it might be: today's code, copied, with one more of each thing that may be added."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("crds/lora_api", "operator/lora_operator", "trainer_image/lora_trainer")

NEW_FIELD = "fabricTimeoutSeconds"
"""Of spec.training, with a default."""
NEW_CLASS = "FabricDegraded"
NEW_PHASE = "Humming"
"""What today's release calls Running."""

EDITS: tuple[tuple[str, str, str], ...] = (
    (
        "lora_api/training.py",
        "    logging_steps: int = Field(1,",
        '    fabric_timeout_seconds: int = Field(60, ge=1, description="Seconds.")\n    logging_steps: int = Field(1,',
    ),
    ("lora_api/run.py", "RUN_VERSION = 2\n", "RUN_VERSION = 3\n"),
    ("lora_api/status.py", "STATUS_VERSION = 2\n", "STATUS_VERSION = 3\n"),
    ("lora_api/status.py", 'FAILED = "Failed"\n    SUSP', 'FAILED = "Failed"\n    HUMMING = "Humming"\n    SUSP'),
    (
        "lora_api/status.py",
        "    trainer: TrainerPin | None",
        '    fabric: str | None = Field(None, description="How the fabric is.")\n    trainer: TrainerPin | None',
    ),
    (
        "lora_api/failureclass.py",
        '    DEADLINE_EXCEEDED = "DeadlineExceeded"\n',
        '    DEADLINE_EXCEEDED = "DeadlineExceeded"\n    FABRIC_DEGRADED = "FabricDegraded"\n',
    ),
    (
        "lora_api/failures.py",
        "FAILURE_RULES: tuple[FailureRule, ...] = (\n",
        "FAILURE_RULES: tuple[FailureRule, ...] = (\n"
        "    FailureRule(\n        failure_class=FailureClass.FABRIC_DEGRADED,\n        exit_code=79,\n"
        "        charged=False,\n        retried=True,\n"
        '        meaning="Links are down.",\n        remedy="Look at the fabric.",\n    ),\n',
    ),
    ("lora_operator/lifecycle/decide.py", '"Publishing" else Phase.RUNNING,', '"Publishing" else Phase.HUMMING,'),
    (
        "lora_operator/status/compute.py",
        '            "trainer": trainer or old.trainer,\n',
        '            "trainer": trainer or old.trainer,\n            "fabric": "healthy",\n',
    ),
)  # fmt: skip
"""File, what is there once, and what takes its place."""


def make(target: Path) -> Path:
    """Writes the code of the release below ``target`` and its CRDs to ``target/crds``; returns ``target``."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, target / Path(package).name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in EDITS:
        text = (target / name).read_text()
        assert text.count(old) == 1, f"{name}: {text.count(old)} times {old!r}"
        (target / name).write_text(text.replace(old, new))
    (target / "crds").mkdir()
    program = (
        "import json, pathlib, sys\nfrom lora_api.crd import RESOURCES, build_crd\n"
        "for one in RESOURCES:\n"
        "    pathlib.Path(sys.argv[1], one.name + '.yaml').write_text(json.dumps(build_crd(one)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    subprocess.run([sys.executable, "-c", program, str(target / "crds")], check=True, env=environment)
    return target

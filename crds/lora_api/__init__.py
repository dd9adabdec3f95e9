"""The contracts of the LoRAFineTune operator: resources, messages and files, as pydantic models.

This package depends on pydantic only. The operator, the trainer and later the loader all speak through it.
"""

from lora_api.failures import CLASS_BY_EXIT_CODE, FAILURE_RULES, MAY_FOLLOW, RULES, FailureClass, FailureRule
from lora_api.finetune import API_VERSION, GROUP, KIND, PLURAL, VERSION, LoRAFineTune, LoRAFineTuneSpec
from lora_api.messages import ProgressLine, Termination, parse_progress_line, parse_termination
from lora_api.run import RUN_VERSION, BatchPlan, RunSpec, build_run_spec, plan_batch
from lora_api.runtime import ClusterLoRARuntime, ClusterLoRARuntimeSpec
from lora_api.status import (
    AdapterStatus,
    Condition,
    ConditionType,
    Failure,
    LoRAFineTuneStatus,
    Phase,
    Progress,
    RuntimeSnapshot,
    TrainerPin,
)

__all__ = [
    "API_VERSION",
    "CLASS_BY_EXIT_CODE",
    "FAILURE_RULES",
    "GROUP",
    "KIND",
    "MAY_FOLLOW",
    "PLURAL",
    "RULES",
    "RUN_VERSION",
    "VERSION",
    "AdapterStatus",
    "BatchPlan",
    "ClusterLoRARuntime",
    "ClusterLoRARuntimeSpec",
    "Condition",
    "ConditionType",
    "Failure",
    "FailureClass",
    "FailureRule",
    "LoRAFineTune",
    "LoRAFineTuneSpec",
    "LoRAFineTuneStatus",
    "Phase",
    "Progress",
    "ProgressLine",
    "RunSpec",
    "RuntimeSnapshot",
    "Termination",
    "TrainerPin",
    "build_run_spec",
    "parse_progress_line",
    "parse_termination",
    "plan_batch",
]

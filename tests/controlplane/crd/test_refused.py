"""What the CRD refuses, and that the message names the field."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.crd import (
    GONE,
    MAXIMAL,
    MAXIMAL_RUNTIME,
    MINIMAL,
    OTHER_RUNTIME,
    OTHERWISE,
    PATHS,
    RUNTIME_PATHS,
    DryRun,
    has,
    place,
)
from tests.support.versions import OWN_PATHS, in_its_words, knows

pytestmark = pytest.mark.controlplane


# A sentence that says the case: changes to the minimal spec, the field that the message names, and what it says of it.
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no base model": ({"baseModel": GONE}, "spec.baseModel", "Required value"),
    "a base model without a uri": ({"baseModel.uri": GONE}, "spec.baseModel.uri", "Required value"),
    "a base model from an unknown place": (
        {"baseModel.uri": "ftp://h/m"},
        "spec.baseModel.uri",
        "must be hf://ORG/NAME, s3://",
    ),
    "a base model from the node's disk": (
        {"baseModel.uri": "file:///models/m"},
        "spec.baseModel.uri",
        "must be hf://ORG/NAME, s3://",
    ),
    "a hub name without an organization": (
        {"baseModel.uri": "hf://gpt2"},
        "spec.baseModel.uri",
        "must be hf://ORG/NAME",
    ),
    "a base model by its bare name": (
        {"baseModel.uri": "meta-llama/Llama-3"},
        "spec.baseModel.uri",
        "must be hf://ORG/NAME",
    ),
    "a uri with a space": ({"baseModel.uri": "s3://b/a b"}, "spec.baseModel.uri", "without spaces"),
    "a uri that is too long": (
        {"baseModel.uri": "s3://b/" + "x" * 600},
        "spec.baseModel.uri",
        "may not be more than 512",
    ),
    "a claim's path that climbs out": (
        {"baseModel.uri": "pvc://c/../secret"},
        "spec.baseModel.uri",
        "may not have . or ..",
    ),
    "a claim with a name that no claim can have": (
        {"baseModel.uri": "pvc://My_Claim/m"},
        "spec.baseModel.uri",
        "pvc://CLAIM",
    ),
    "a revision of a bucket": (
        {"baseModel.uri": "s3://b/m", "baseModel.revision": "main"},
        "spec.baseModel.revision",
        "needs a uri that starts with hf://",
    ),
    "no data": ({"dataset": GONE}, "spec.dataset", "Required value"),
    "no training data": ({"dataset": {}}, "spec.dataset.train", "Required value"),
    "training data from the web": (
        {"dataset.train.uri": "https://x/y.jsonl"},
        "spec.dataset.train.uri",
        "must be hf://ORG/NAME",
    ),
    "evaluation data from the web": (
        {"dataset.eval.uri": "https://x/y.jsonl"},
        "spec.dataset.eval.uri",
        "must be hf://ORG/NAME",
    ),
    "evaluation data in two ways": (
        {"dataset.eval.uri": "s3://b/e.jsonl", "dataset.evalFraction": 0.1},
        "spec.dataset.evalFraction",
        "either eval or evalFraction",
    ),
    "all data held out": ({"dataset.evalFraction": 1.0}, "spec.dataset.evalFraction", "less than or equal to 0.5"),
    "an unknown format": ({"dataset.format": "csv"}, "spec.dataset.format", 'supported values: "auto", "messages"'),
    "a column that no format has": ({"dataset.columns": {"question": "q"}}, "spec.dataset.columns", "may name only"),
    "a column of another format": (
        {"dataset.format": "text", "dataset.columns": {"prompt": "q"}},
        "spec.dataset.columns",
        "may name only the fields of the format",
    ),
    "no columns at all": ({"dataset.columns": {}}, "spec.dataset.columns", "at least 1 properties"),
    "a column without a name": ({"dataset.columns": {"text": ""}}, "spec.dataset.columns.text", "at least 1 chars"),
    "an empty system prompt": ({"dataset.systemPrompt": ""}, "spec.dataset.systemPrompt", "at least 1 chars"),
    "a book as the system prompt": (
        {"dataset.systemPrompt": "x" * 16385},
        "spec.dataset.systemPrompt",
        "may not be more than 16384",
    ),
    "a system prompt of plain text": (
        {"dataset.format": "text", "dataset.systemPrompt": "x"},
        "spec.dataset.systemPrompt",
        "needs conversations",
    ),
    "sequences of nothing": ({"dataset.maxSeqLength": 0}, "spec.dataset.maxSeqLength", "greater than or equal to 8"),
    "rank 0": ({"lora.r": 0}, "spec.lora.r", "greater than or equal to 1"),
    "a rank that vLLM cannot serve": ({"lora.r": 1024}, "spec.lora.r", "less than or equal to 512"),
    "a rank in quotes": ({"lora.r": "16"}, "spec.lora.r", 'must be of type integer: "string"'),
    "half a rank": ({"lora.r": 1.5}, "spec.lora.r", 'must be of type integer: "number"'),
    "an alpha that diverges": ({"lora.r": 2, "lora.alpha": 64}, "spec.lora.alpha", "at most 16 times r"),
    "an alpha that diverges at the default rank": ({"lora.alpha": 257}, "spec.lora.alpha", "at most 16 times r"),
    "dropout of nearly all": ({"lora.dropout": 0.9}, "spec.lora.dropout", "less than or equal to 0.5"),
    "no module": ({"lora.targetModules": []}, "spec.lora.targetModules", "at least 1 items"),
    "one module twice": ({"lora.targetModules": ["q", "q"]}, "spec.lora.targetModules[1]", "Duplicate value"),
    "a micro-batch in other words": (
        {"training.microBatchSize": "most"},
        "spec.training.microBatchSize",
        "must be auto or a whole number from 1 to 1024",
    ),
    "a micro-batch of nothing": (
        {"training.microBatchSize": 0},
        "spec.training.microBatchSize",
        "must be auto or a whole number from 1 to 1024",
    ),
    "a rank of 0 for a module": ({"lora.rankPattern": {"q_proj": 0}}, "spec.lora.rankPattern.q_proj", "or equal to 1"),
    "a new token with a blank": ({"lora.newTokens": ["<|a b|>"]}, "spec.lora.newTokens[0]", "without spaces"),
    "a new token of one letter": ({"lora.newTokens": ["a"]}, "spec.lora.newTokens[0]", "at least 2 chars"),
    "a new token twice": ({"lora.newTokens": ["<|a|>", "<|a|>"]}, "spec.lora.newTokens[1]", "Duplicate value"),
    "too many new tokens": ({"lora.newTokens": [f"<{n}>" for n in range(65)]}, "spec.lora.newTokens", "at most 64"),
    "settings of another objective": (
        {"training.dpo": {"beta": 0.2}},
        "spec.training.dpo",
        "set objective: dpo",
    ),
    "preferences without their objective": (
        {"dataset.format": "preference"},
        "spec.dataset.format",
        "objective dpo learns from records with chosen and rejected answers",
    ),
    "preferences from records without any": (
        {"dataset.format": "messages", "training.objective": "dpo"},
        "spec.dataset.format",
        "objective dpo learns from records with chosen and rejected answers",
    ),
    "pairs that are packed": (
        {"dataset.packing": True, "training.objective": "dpo"},
        "spec.dataset.packing",
        "with dpo set it to false",
    ),
    "the assistant's words of pairs": (
        {"dataset.assistantOnlyLoss": True, "training.objective": "dpo"},
        "spec.dataset.assistantOnlyLoss",
        "dpo compares the chosen and the rejected answer",
    ),
    "the assistant's words in plain text": (
        {"dataset.format": "text", "dataset.assistantOnlyLoss": True},
        "spec.dataset.assistantOnlyLoss",
        "needs conversations",
    ),
    "an optimizer that pages, on CPUs": (
        {"training.optimizer": "paged-adamw-8bit", "parallelism.gpusPerNode": 0},
        "spec.training.optimizer",
        "needs GPUs",
    ),
    "an offload of what is not sharded": (
        {"parallelism.strategy": "ddp", "parallelism.cpuOffload": True},
        "spec.parallelism.cpuOffload",
        "needs sharded weights",
    ),
    "hsdp on one node": (
        {"parallelism.strategy": "hsdp", "parallelism.gpusPerNode": 8},
        "spec.parallelism.strategy",
        "needs more than one node",
    ),
    "a shard size of another strategy": (
        {"parallelism.shardSize": 2, "parallelism.gpusPerNode": 8},
        "spec.parallelism.shardSize",
        "belongs to strategy hsdp",
    ),
    "a shard size that does not divide": (
        {"parallelism.strategy": "hsdp", "parallelism.shardSize": 3, "parallelism.gpusPerNode": 8},
        "spec.parallelism.shardSize",
        "must divide",
    ),
    "no patience at all": (
        {"parallelism.collectiveTimeoutSeconds": 1},
        "spec.parallelism.collectiveTimeoutSeconds",
        "greater than or equal to 10",
    ),
    "a gate that lets all through": ({"publish.gate": {}}, "spec.publish.gate.maxEvalLoss", "maxEvalLoss or both"),
    "a gate that measures nothing": (
        {"publish.gate": {"maxEvalLoss": 1.0}, "dataset.evalFraction": 0},
        "spec.publish.gate",
        "needs records to evaluate on",
    ),
    "a tracker without an address": (
        {"tracking.mlflow": {"experiment": "x"}},
        "spec.tracking.mlflow.trackingUri",
        "Required value",
    ),
    "a tracker of another protocol": (
        {"tracking.mlflow": {"experiment": "x", "trackingUri": "databricks"}},
        "spec.tracking.mlflow.trackingUri",
        "http://HOST/PATH",
    ),
    "all modules and one more": (
        {"lora.targetModules": ["all-linear", "q_proj"]},
        "spec.lora.targetModules",
        "must be the only entry",
    ),
    "modules in one string": ({"lora.targetModules": "all-linear"}, "spec.lora.targetModules", "must be of type array"),
    "an unknown quantization": (
        {"quantization.type": "int4"},
        "spec.quantization.type",
        'supported values: "nf4", "int8", "none"',
    ),
    "a truth in quotes": (
        {"quantization.doubleQuant": "true"},
        "spec.quantization.doubleQuant",
        "must be of type boolean",
    ),
    "no training": ({"training": GONE}, "spec.training", "Required value"),
    "neither epochs nor steps": ({"training": {}}, "spec.training.maxSteps", "exactly one of epochs and maxSteps"),
    "epochs and steps": ({"training.epochs": 1}, "spec.training.maxSteps", "exactly one of epochs and maxSteps"),
    "no epochs at all": ({"training": {"epochs": 0}}, "spec.training.epochs", "greater than 0"),
    "a learning rate of 0": ({"training.learningRate": 0}, "spec.training.learningRate", "greater than 0"),
    "a learning rate of 2, as a whole number": (
        {"training.learningRate": 2},
        "spec.training.learningRate",
        "may be at most 0.1",
    ),
    "all data held out, as a whole number": ({"dataset.evalFraction": 1}, "spec.dataset.evalFraction", "at most 0.5"),
    "a learning rate of 0.2": (
        {"training.learningRate": 0.2},
        "spec.training.learningRate",
        "less than or equal to 0.1",
    ),
    "a learning rate in words": (
        {"training.learningRate": "2e-4"},
        "spec.training.learningRate",
        "must be of type number",
    ),
    "a batch that does not divide": (
        {"training.globalBatchSize": 30, "training.microBatchSize": 4, "parallelism.nodes": 3},
        "spec.training.globalBatchSize",
        "must be a multiple of microBatchSize * nodes * max(gpusPerNode, 1); the nearest: 24 and 36",
    ),
    "a batch that the default does not divide into": (
        {"parallelism.nodes": 3},
        "spec.training.globalBatchSize",
        "the nearest: 15 and 18",
    ),
    "a batch smaller than the gang": (
        {"training.globalBatchSize": 4, "parallelism.nodes": 2, "parallelism.gpusPerNode": 8},
        "spec.training.globalBatchSize",
        "the nearest: 16",
    ),
    "a batch beyond the bound when rounded up": (
        {"training.globalBatchSize": 65536, "parallelism.gpusPerNode": 15},
        "spec.training.globalBatchSize",
        "the nearest: 65535",
    ),
    "one pass of all processes is too large": (
        {"training.microBatchSize": 1024, "parallelism.nodes": 64, "parallelism.gpusPerNode": 8},
        "spec.training.microBatchSize",
        "may be at most 65536",
    ),
    "an unknown scheduler": ({"training.scheduler": "step"}, "spec.training.scheduler", 'supported values: "constant"'),
    "evaluation on the way, but of nothing": (
        {"training.evalEverySteps": 5, "dataset.evalFraction": 0},
        "spec.training.evalEverySteps",
        "needs records to evaluate on",
    ),
    "a seed below 0": ({"training.seed": -1}, "spec.training.seed", "greater than or equal to 0"),
    "no nodes": ({"parallelism.nodes": 0}, "spec.parallelism.nodes", "greater than or equal to 1"),
    "17 GPUs a node": ({"parallelism.gpusPerNode": 17}, "spec.parallelism.gpusPerNode", "less than or equal to 16"),
    "1024 GPUs in all": (
        {"parallelism.nodes": 64, "parallelism.gpusPerNode": 16, "training.globalBatchSize": 1024},
        "spec.parallelism.nodes",
        "nodes * gpusPerNode may be at most 512",
    ),
    "nothing to go on from": (
        {"checkpoint.resumeFrom": {}},
        "spec.checkpoint.resumeFrom.name",
        "set exactly one of name and uri",
    ),
    "two checkpoints to go on from": (
        {"checkpoint.resumeFrom": {"name": "a", "uri": "s3://bucket/c"}},
        "spec.checkpoint.resumeFrom.name",
        "set exactly one of name and uri",
    ),
    "a checkpoint to go on from that climbs out": (
        {"checkpoint.resumeFrom": {"uri": "s3://bucket/a/../c"}},
        "spec.checkpoint.resumeFrom.uri",
        "may not have . or ..",
    ),
    "a checkpoint to go on from on a node's disk": (
        {"checkpoint.resumeFrom": {"uri": "file:///out"}},
        "spec.checkpoint.resumeFrom.uri",
        "must be s3://BUCKET/PREFIX",
    ),
    "a run of another namespace to go on from": (
        {"checkpoint.resumeFrom": {"name": "other/a"}},
        "spec.checkpoint.resumeFrom.name",
        "must be a-z, 0-9 and '-'",
    ),
    "checkpoints that are kept for no time": (
        {"checkpoint.retainHours": 0},
        "spec.checkpoint.retainHours",
        "greater than or equal to 1",
    ),
    "a checkpoint every 0 steps": (
        {"checkpoint.everySteps": 0},
        "spec.checkpoint.everySteps",
        "greater than or equal to 1",
    ),
    "a runtime without a name": ({"runtimeRef": {}}, "spec.runtimeRef.name", "Required value"),
    "a runtime that no object can be called": (
        {"runtimeRef": {"name": "H100"}},
        "spec.runtimeRef.name",
        "must be a-z, 0-9, '-' and '.'",
    ),
    "a store that is no bucket": (
        {"publish.store": "hf://org/repo"},
        "spec.publish.store",
        "must be s3://BUCKET/PREFIX",
    ),
    "a store on the node's disk": (
        {"publish.store": "file:///out"},
        "spec.publish.store",
        "must be s3://BUCKET/PREFIX",
    ),
    "a store whose prefix has an empty part": (
        {"publish.store": "s3://b//p"},
        "spec.publish.store",
        "must be s3://BUCKET/PREFIX",
    ),
    "a store whose prefix climbs out": ({"publish.store": "s3://b/p/.."}, "spec.publish.store", "may not have . or .."),
    "an adapter's name with capitals": ({"publish.name": "Support"}, "spec.publish.name", "must be a-z, 0-9 and '-'"),
    "an adapter's name of 64 characters": ({"publish.name": "a" * 64}, "spec.publish.name", "may not be more than 63"),
    "17 prompts": ({"publish.samplePrompts": ["x"] * 17}, "spec.publish.samplePrompts", "at most 16 items"),
    "a Secret without a name": (
        {"credentials": {"secretRef": {}}},
        "spec.credentials.secretRef.name",
        "Required value",
    ),
    "a token in the manifest": (
        {"podTemplate.env": [{"name": "HF_TOKEN", "value": "x"}]},
        "spec.podTemplate.env[0].name",
        "put it into the Secret of credentials.secretRef",
    ),
    "a variable that is the operator's": (
        {"podTemplate.env": [{"name": "MASTER_ADDR", "value": "x"}]},
        "spec.podTemplate.env[0].name",
        "any other can be set by podTemplate.env of a ClusterLoRARuntime",
    ),
    "a variable that no shell can have": (
        {"podTemplate.env": [{"name": "NCCL-DEBUG", "value": "x"}]},
        "spec.podTemplate.env[0].name",
        "not begin with a digit",
    ),
    "one variable twice": (
        {"podTemplate.env": [{"name": "OMP_NUM_THREADS", "value": "1"}, {"name": "OMP_NUM_THREADS", "value": "2"}]},
        "spec.podTemplate.env[1]",
        "Duplicate value",
    ),
    "endless restarts": ({"runPolicy.maxRestarts": -1}, "spec.runPolicy.maxRestarts", "greater than or equal to 0"),
    "a queue with a name that no label can have": (
        {"runPolicy.queueName": "a" * 64},
        "spec.runPolicy.queueName",
        "may not be more than 63",
    ),
    "a priority in no queue": (
        {"runPolicy.workloadPriorityClassName": "research"},
        "spec.runPolicy.workloadPriorityClassName",
        "set queueName too",
    ),
    "GPUs as a resource": (
        {"podTemplate.resources.limits": {"nvidia.com/gpu": "8"}},
        "spec.podTemplate.resources.limits",
        "GPUs are asked for by parallelism.gpusPerNode",
    ),
    "an unknown resource": (
        {"podTemplate.resources.requests": {"ram": "8Gi"}},
        "spec.podTemplate.resources.requests",
        "may name cpu, memory",
    ),
    "memory in words": (
        {"podTemplate.resources.limits": {"memory": "8 GB"}},
        "spec.podTemplate.resources.limits.memory",
        "should match 'a quantity such as 4, 500m or 64Gi",
    ),
    "less than no memory": (
        {"podTemplate.resources.limits": {"memory": -0.5}},
        "spec.podTemplate.resources.limits.memory",
        "greater than or equal to 0",
    ),
    "a quantity of another kind": (
        {"podTemplate.resources.limits": {"memory": [8]}},
        "spec.podTemplate.resources.limits.memory",
        "at most 0 items",
    ),
    "the truth as a quantity": (
        {"podTemplate.resources.limits": {"memory": True}},
        "<nil>",
        '"spec.podTemplate.resources.limits.memory" must not validate the schema (not)',
    ),
    "a part of a device": (
        {"podTemplate.resources.requests": {"rdma/hca": "1"}},
        "spec.podTemplate.resources.requests",
        "needs the same value in limits",
    ),
    "a taint that no node can have": (
        {"podTemplate.tolerations": [{"key": "a b", "operator": "Exists"}]},
        "spec.podTemplate.tolerations[0].key",
        "NAME or DOMAIN/NAME",
    ),
    "a label of the operator": (
        {"podTemplate.labels": {"lorafinetune.io/name": "x"}},
        "spec.podTemplate.labels",
        "belong to the operator",
    ),
    "a label that no pod may have": (
        {"podTemplate.labels": {"team": "a b"}},
        "spec.podTemplate.labels[team]",
        "letters, digits, '-', '_' and '.'",
    ),
    "a label's key that no pod may have": (
        {"podTemplate.labels": {"my team": "a"}},
        "spec.podTemplate.labels",
        "must be NAME or DOMAIN/NAME",
    ),
    "an annotation's key with two slashes": (
        {"podTemplate.annotations": {"a/b/c": "x"}},
        "spec.podTemplate.annotations",
        "must be NAME or",
    ),
    "a node selector with an empty key": (
        {"podTemplate.nodeSelector": {"": "x"}},
        "spec.podTemplate.nodeSelector",
        "must be NAME or",
    ),
    "a toleration that equals nothing": (
        {"podTemplate.tolerations": [{"value": "x"}]},
        "spec.podTemplate.tolerations[0].operator",
        "operator Equal needs a key",
    ),
    "a toleration of any value of one value": (
        {"podTemplate.tolerations": [{"operator": "Exists", "key": "k", "value": "x"}]},
        "spec.podTemplate.tolerations[0].operator",
        "operator Exists takes no value",
    ),
    "a time for a taint that evicts nobody": (
        {"podTemplate.tolerations": [{"operator": "Exists", "tolerationSeconds": 5}]},
        "spec.podTemplate.tolerations[0].tolerationSeconds",
        "needs effect NoExecute",
    ),
}


# Several sections with rules over several fields, each of them kept.
SEVERAL = [
    MAXIMAL,
    OTHERWISE,
    place(MAXIMAL, "parallelism.shardSize", GONE),
    {
        **OTHERWISE,
        "publish": {**MINIMAL["publish"], "gate": {"maxEvalLoss": 1.0}},
        "training": {"maxSteps": 1, "evalEverySteps": 1, "globalBatchSize": 16, "optimizer": "paged-adamw-8bit"},
    },
]


def out_of_bounds(node: dict[str, Any]) -> Iterator[Any]:
    """Values that a field may not have, and that do not keep the API server from looking at the rules."""
    if "minimum" in node:
        yield from (node["minimum"] - 1, node["minimum"] - 2, -1_000_000)
    if "maximum" in node:
        yield from (node["maximum"] + 1, node["maximum"] * 1000)
    if node.get("x-kubernetes-int-or-string"):
        yield from (0, -1, 1025, "x")
    if node.get("type") == "string" and "enum" not in node:
        yield from ("A b", "HF://x/y", "_")


def check_blame(
    paths: dict[str, dict[str, Any]], good: list[Any], create: Callable[[Any], tuple[int, dict[str, Any]]]
) -> int:
    """How many specs with one bad field were refused, each without a word about any other field."""
    refused = 0
    for path, node in paths.items():
        for value in out_of_bounds(node):
            for spec in good:
                if path.endswith(":") or not has(spec, path):
                    continue
                code, answer = create(place(spec, path, value))
                causes = answer["details"]["causes"] if code == 422 else []
                refused += bool(causes)
                for cause in causes:
                    assert "evaluating rule" not in cause["message"], (path, value, cause)
                    assert cause["field"] == "<nil>" or cause["field"].startswith(f"spec.{path}"), (path, value, cause)
    return refused


def test_no_rule_blames_a_good_field_for_a_bad_one(dry: DryRun) -> None:
    """A rule over several fields that divides by 0, or speaks of a field that is well, hides what is wrong."""
    assert all(dry.create_run(spec)[0] == 201 for spec in SEVERAL)
    assert check_blame(PATHS, SEVERAL, dry.create_run) > 200


def test_no_rule_of_a_runtime_blames_a_good_field_for_a_bad_one(dry: DryRun) -> None:
    assert check_blame(RUNTIME_PATHS, [MAXIMAL_RUNTIME, OTHER_RUNTIME], dry.create_runtime) > 40


def test_there_are_enough_bad_manifests() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize("case", BAD)
def test_a_bad_manifest_is_refused_with_its_field(dry: DryRun, case: str) -> None:
    changes, field, words = BAD[case]
    spec = MINIMAL
    for path, value in changes.items():
        spec = place(spec, path, value)
    code, answer = dry.create_run(spec)
    assert code == 422, answer
    told = in_its_words(words)
    found = [cause["field"] for cause in answer["details"]["causes"] if told in cause["message"]]
    if knows(OWN_PATHS):
        assert field in found, answer["message"]
    else:  # below the field of the rule before, perhaps
        assert field.rpartition(".")[2] in {other.rpartition(".")[2] for other in found}, answer["message"]

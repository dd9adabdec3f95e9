"""The CustomResourceDefinition on a real API server: what it refuses and how, and that pydantic agrees."""

import copy
import http.client
import json
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import devcluster
from devcluster.progress import wait_for
from lora_api import LoRAFineTune, LoRAFineTuneSpec, plan_batch
from lora_api.crd import PRINTER_COLUMNS, build_crd
from lora_api.training import LoRA
from lora_operator.children.configmap import build_configmap
from lora_operator.children.job import build_job
from lora_operator.children.service import build_service
from lora_operator.settings import Settings

pytestmark = pytest.mark.controlplane

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
RUNS = "/apis/lorafinetune.io/v1alpha1/namespaces/default/lorafinetunes"

Spec = dict[str, Any]

MINIMAL: Spec = {
    "baseModel": {"uri": "hf://meta-llama/Llama-3.1-8B-Instruct"},
    "dataset": {"train": {"uri": "s3://datasets/support/train.jsonl"}},
    "training": {"maxSteps": 18},
    "publish": {"store": "s3://models/adapters"},
}

# Every field but those that exclude others; none at its default but the objective, for the same reason.
MAXIMAL: Spec = {
    "baseModel": {"uri": "hf://meta-llama/Llama-3.1-8B-Instruct", "revision": "main"},
    "dataset": {
        "train": {"uri": "hf://org/data", "revision": "v1", "split": "train"},
        "eval": {"uri": "hf://org/data", "revision": "v1", "split": "test"},
        "format": "messages",
        "columns": {"messages": "chat"},
        "systemPrompt": "You answer in one word.",
        "chatTemplate": "{% for message in messages %}{{ message.content }}{% endfor %}",
        "maxSeqLength": 4096,
        "packing": True,
        "assistantOnlyLoss": True,
    },
    "lora": {
        "r": 8,
        "alpha": 128,
        "dropout": 0.05,
        "targetModules": ["q_proj", "v_proj"],
        "useRslora": True,
        "rankPattern": {"q_proj": 4},
        "alphaPattern": {"self_attn.v_proj": 64},
    },
    "quantization": {"type": "none", "doubleQuant": False, "computeDtype": "bfloat16"},
    "training": {
        "objective": "sft",
        "maxSteps": 1000,
        "learningRate": 0.001,
        "globalBatchSize": 96,
        "microBatchSize": 3,
        "optimizer": "paged-adamw-8bit",
        "scheduler": "linear",
        "warmupRatio": 0.1,
        "weightDecay": 0.01,
        "maxGradNorm": 0.3,
        "gradientCheckpointing": False,
        "seed": 7,
        "evalEverySteps": 50,
        "loggingSteps": 5,
    },
    "parallelism": {
        "nodes": 2,
        "gpusPerNode": 8,
        "strategy": "hsdp",
        "shardSize": 4,
        "cpuOffload": True,
        "collectiveTimeoutSeconds": 60,
    },
    "checkpoint": {"everySteps": 10, "everyMinutes": 30, "keep": 3},
    "publish": {
        "store": "s3://models/adapters",
        "name": "support",
        "samplePrompts": ["Hello"],
        "gate": {"minEvalLossImprovement": 0.1, "maxEvalLoss": 2.0},
        "mergeBase": True,
    },
    "tracking": {
        "wandb": {"project": "support", "entity": "team", "baseUrl": "https://wandb.example.org"},
        "mlflow": {"trackingUri": "http://mlflow:5000", "experiment": "support"},
        "tensorboard": True,
    },
    "credentials": {"secretRef": {"name": "lora-store"}},
    "runPolicy": {
        "maxRestarts": 0,
        "suspend": True,
        "activeDeadlineSeconds": 3600,
        "stallTimeoutSeconds": 600,
        "ttlSecondsAfterFinished": 86400,
        "ttlDeletes": "run",
    },
    "podTemplate": {
        "resources": {
            "requests": {"cpu": "8", "memory": "64Gi"},
            "limits": {"memory": "64Gi", "ephemeral-storage": "1.5Ti", "rdma/hca": "1"},
        },
        "nodeSelector": {"nvidia.com/gpu.product": "H200"},
        "tolerations": [
            {
                "key": "gpu",
                "operator": "Equal",
                "value": "yes",
                "effect": "NoExecute",
                "tolerationSeconds": 60,
            }
        ],
        "env": [{"name": "NCCL_SOCKET_IFNAME", "value": "eth0"}],
        "imagePullSecrets": [{"name": "registry"}],
        "labels": {"team": "support"},
        "annotations": {"example.org/why": "because of the tickets"},
    },
}

# Those that exclude others.
OTHERWISE: Spec = {
    **MINIMAL,
    "dataset": {**MINIMAL["dataset"], "evalFraction": 0.1},
    "training": {
        "epochs": 1.5,
        "objective": "dpo",
        "dpo": {"beta": 0.2, "loss": "ipo", "labelSmoothing": 0.1},
    },
}


class DryRun:
    """The API server, asked to create runs without keeping them."""

    def __init__(self, cp: devcluster.ControlPlane) -> None:
        context = ssl.create_default_context(cafile=str(cp.ca))
        context.load_cert_chain(cp.files.admin.certificate, cp.files.admin.key)
        address = urlsplit(cp.url)
        self._connection = http.client.HTTPSConnection(
            address.hostname or "", address.port, context=context, timeout=30
        )

    def close(self) -> None:
        self._connection.close()

    def create(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status code and answer of a strict dry run."""
        self._connection.request(
            "POST",
            f"{path}?dryRun=All&fieldValidation=Strict",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read())

    def create_run(self, spec: Any, name: str = "run") -> tuple[int, dict[str, Any]]:
        return self.create(RUNS, manifest(spec, name))


def manifest(spec: Any, name: str = "run") -> dict[str, Any]:
    return {
        "apiVersion": "lorafinetune.io/v1alpha1",
        "kind": "LoRAFineTune",
        "metadata": {"name": name},
        "spec": spec,
    }


@pytest.fixture(scope="module")
def cp(control_plane: devcluster.ControlPlane) -> devcluster.ControlPlane:
    control_plane.kubectl("apply", f"--filename={ROOT / 'crds'}")
    control_plane.kubectl("wait", "--for=condition=Established", "crd/lorafinetunes.lorafinetune.io", "--timeout=30s")

    def published() -> bool:
        """The schema comes some time after the resource is served, and kubectl keeps on disk what it once found."""
        control_plane.kubectl("api-resources", "--cached=false")
        try:
            return "LoRAFineTune" in control_plane.kubectl("explain", "lft")
        except devcluster.DevclusterError:
            return False

    wait_for("the schema of LoRAFineTune to be published", published, 30)
    return control_plane


@pytest.fixture(scope="module")
def dry(cp: devcluster.ControlPlane) -> Iterator[DryRun]:
    dry = DryRun(cp)
    yield dry
    dry.close()


# -- What is refused ---------------------------------------------------------------------------------------------------

GONE = object()


def place(spec: Spec, path: str, value: Any) -> Spec:
    """A copy of ``spec`` with ``value`` at ``path``, such as ``lora.targetModules[0]``; GONE takes it away.

    The key of a map may hold dots where it is the last part, behind a colon: ``podTemplate.labels:a.b/c``.
    """
    spec = copy.deepcopy(spec)
    path, _, key = path.partition(":")
    parts: list[str | int] = [int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", path)]
    node: Any = spec
    for part, following in zip([*parts, key] if key else parts, [*parts[1:], key, ""], strict=False):
        last = (part == key and key != "") or (not key and part is parts[-1] and following in ("", key))
        if last:
            if value is GONE:
                del node[part]
            elif isinstance(node, list) and part == len(node):
                node.append(value)
            else:
                node[part] = value
            return spec
        node = node[part] if isinstance(node, list) else node.setdefault(part, [] if isinstance(following, int) else {})
    raise AssertionError(path)


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
    "a uri with a space": ({"baseModel.uri": "s3://b/a b"}, "spec.baseModel.uri", "should match"),
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
    "int8 weights in shards": (
        {"quantization.type": "int8", "parallelism.gpusPerNode": 2},
        "spec.quantization.type",
        "int8 weights cannot be sharded",
    ),
    "int8 weights in host memory": (
        {"quantization.type": "int8", "parallelism.cpuOffload": True},
        "spec.quantization.type",
        "int8 weights cannot be sharded",
    ),
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
        "should match",
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
        "must be a multiple of microBatchSize * nodes * max(gpusPerNode, 1) = 12; the nearest: 24 and 36",
    ),
    "a batch that the default does not divide into": (
        {"parallelism.nodes": 3},
        "spec.training.globalBatchSize",
        "= 3; the nearest: 15 and 18",
    ),
    "a batch smaller than the gang": (
        {"training.globalBatchSize": 4, "parallelism.nodes": 2, "parallelism.gpusPerNode": 8},
        "spec.training.globalBatchSize",
        "= 16; the nearest: 16",
    ),
    "a batch beyond the bound when rounded up": (
        {"training.globalBatchSize": 65536, "parallelism.gpusPerNode": 15},
        "spec.training.globalBatchSize",
        "= 15; the nearest: 65535",
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
    "a checkpoint every 0 steps": (
        {"checkpoint.everySteps": 0},
        "spec.checkpoint.everySteps",
        "greater than or equal to 1",
    ),
    "nowhere to publish": ({"publish": GONE}, "spec.publish", "Required value"),
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
    "an adapter's name with capitals": ({"publish.name": "Support"}, "spec.publish.name", "should match"),
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
        "should match '^(NCCL|",
    ),
    "one variable twice": (
        {"podTemplate.env": [{"name": "OMP_NUM_THREADS", "value": "1"}, {"name": "OMP_NUM_THREADS", "value": "2"}]},
        "spec.podTemplate.env[1]",
        "Duplicate value",
    ),
    "endless restarts": ({"runPolicy.maxRestarts": -1}, "spec.runPolicy.maxRestarts", "greater than or equal to 0"),
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
        "should match",
    ),
    "requests above limits": (
        {"podTemplate.resources": {"requests": {"memory": "8Gi"}, "limits": {"memory": "8G"}}},
        "spec.podTemplate.resources.requests",
        "may not be larger than limits",
    ),
    "a part of a device": (
        {"podTemplate.resources.requests": {"rdma/hca": "1"}},
        "spec.podTemplate.resources.requests",
        "needs the same value in limits",
    ),
    "a taint that no node can have": (
        {"podTemplate.tolerations": [{"key": "a b", "operator": "Exists"}]},
        "spec.podTemplate.tolerations[0].key",
        "should match",
    ),
    "a label of the operator": (
        {"podTemplate.labels": {"lorafinetune.io/name": "x"}},
        "spec.podTemplate.labels",
        "belong to the operator",
    ),
    "a label that no pod may have": (
        {"podTemplate.labels": {"team": "a b"}},
        "spec.podTemplate.labels.team",
        "should match",
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
    found = {cause["field"]: cause["message"] for cause in answer["details"]["causes"] if words in cause["message"]}
    assert field in found, answer["message"]


NAMES = {
    "53 characters": ("a" * 53, "metadata.name may have at most 52 characters"),
    "a digit first": ("8b", "metadata.name must start with a letter"),
    "a dot": ("a.b", "metadata.name must start with a letter and have only"),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_name_that_a_child_cannot_have_is_refused(dry: DryRun, case: str) -> None:
    name, words = NAMES[case]
    code, answer = dry.create_run(MINIMAL, name)
    assert code == 422
    assert words in answer["message"]


def test_the_longest_name_is_legal_for_every_child(dry: DryRun) -> None:
    name = "a" * 52
    assert dry.create_run(MINIMAL, name)[0] == 201
    child = {"name": f"{name}-999"}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": child,
        "spec": {
            "completionMode": "Indexed",
            "completions": 64,
            "parallelism": 64,
            "backoffLimitPerIndex": 0,
            "template": {
                "metadata": {"labels": {"lorafinetune.io/name": name}},
                "spec": {
                    "restartPolicy": "Never",
                    "subdomain": child["name"],
                    "containers": [{"name": "c", "image": "i"}],
                },
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": child,
        "spec": {"clusterIP": "None", "ports": [{"port": 29500}]},
    }
    for path, body in (
        ("/apis/batch/v1/namespaces/default/jobs", job),
        ("/api/v1/namespaces/default/services", service),
    ):
        code, answer = dry.create(path, body)
        assert code == 201, answer


UNKNOWN = {
    "a field of another name": ("lora.rank", 8),
    "a field at the top": ("model", "x"),
    "a field in a list": ("podTemplate.env[0].valueFrom", {}),
    "a security context": ("podTemplate.securityContext", {"privileged": True}),
    "a host path": ("podTemplate.volumes", [{"hostPath": {"path": "/"}}]),
    "a service account": ("podTemplate.serviceAccountName", "admin"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_field_is_refused_by_its_name(cp: devcluster.ControlPlane, case: str) -> None:
    path, value = UNKNOWN[case]
    body = json.dumps(manifest(place(MAXIMAL, path, value)))
    with pytest.raises(devcluster.DevclusterError, match=re.escape(f'unknown field "spec.{path}"')):
        cp.kubectl("apply", "--filename=-", "--dry-run=server", input=body)


def test_an_unknown_field_is_dropped_without_validation(cp: devcluster.ControlPlane) -> None:
    body = json.dumps(manifest(place(MINIMAL, "lora.rank", 8), "pruned"))
    cp.kubectl("apply", "--filename=-", "--validate=false", input=body)
    stored = json.loads(cp.kubectl("get", "lft", "pruned", "--output=json"))
    assert stored["spec"]["lora"] == LoRA().to_wire()


# -- What is kept ------------------------------------------------------------------------------------------------------


def paths(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node below an object's schema; ``[0]`` stands for the items of a list, ``:`` for the values of a map."""
    if path:
        yield path, node
    for name, child in node.get("properties", {}).items():
        yield from paths(child, f"{path}.{name}".lstrip("."))
    if "items" in node:
        yield from paths(node["items"], f"{path}[0]")
    if isinstance(node.get("additionalProperties"), dict):
        yield f"{path}:", node["additionalProperties"]


PATHS = dict(paths(SCHEMA["properties"]["spec"], ""))


def has(spec: Any, path: str) -> bool:
    for part in re.findall(r"[^.\[\]]+", path.partition(":")[0]):
        try:
            spec = spec[int(part) if part.isdigit() else part]
        except (KeyError, IndexError):
            return False
    return bool(spec) if ":" in path else True


def test_the_maximal_manifest_has_every_field() -> None:
    missing = [path for path in PATHS if not has(MAXIMAL, path)]
    dpo = ["training.dpo", "training.dpo.beta", "training.dpo.loss", "training.dpo.labelSmoothing"]
    assert missing == ["dataset.evalFraction", *dpo, "training.epochs"]
    assert all(has(OTHERWISE, path) for path in missing)


@pytest.mark.parametrize("spec", [MINIMAL, MAXIMAL, OTHERWISE], ids=["minimal", "maximal", "otherwise"])
def test_a_good_manifest_comes_back_as_pydantic_reads_it(cp: devcluster.ControlPlane, spec: Spec) -> None:
    cp.kubectl("apply", "--filename=-", input=json.dumps(manifest(spec, "kept")))
    stored = json.loads(cp.kubectl("get", "lft", "kept", "--output=json"))
    cp.kubectl("delete", "lft", "kept")
    assert stored["spec"] == LoRAFineTuneSpec.model_validate(spec).to_wire()
    read = LoRAFineTune.model_validate(stored)
    assert read.spec == LoRAFineTuneSpec.model_validate(spec)
    assert read.metadata.name == "kept"
    assert read.metadata.generation == 1
    if spec is MAXIMAL:
        assert stored["spec"] == spec


# What a field needs beside it.
COMPANIONS: dict[str, tuple[str, Any]] = {
    "parallelism.shardSize": ("parallelism", {"strategy": "hsdp", "gpusPerNode": 8}),
    "parallelism.strategy": ("parallelism", {"shardSize": 4, "gpusPerNode": 8}),
}


def test_every_default_is_the_same_on_both_sides(dry: DryRun) -> None:
    """Also where a section is given in part, so that the API server fills in the rest."""
    for path, node in PATHS.items():
        if "properties" in node and "default" in node:
            for name in node["properties"]:
                if has(MAXIMAL, f"{path}.{name}"):
                    value = MAXIMAL
                    for part in f"{path}.{name}".split("."):
                        value = value[part]
                    spec = {**MINIMAL, "training": {"maxSteps": 1, "globalBatchSize": 48}}
                    if f"{path}.{name}" in COMPANIONS:
                        spec = place(spec, *COMPANIONS[f"{path}.{name}"])
                    spec = place(spec, f"{path}.{name}", value)
                    code, answer = dry.create_run(spec)
                    assert code == 201, answer["message"]
                    assert answer["spec"] == LoRAFineTuneSpec.model_validate(spec).to_wire(), path


LONGEST = "a" * 63

# Values of a field of the pod that are only just legal.
WIDEST: dict[str, list[Any]] = {
    "podTemplate.labels": [{f"{'d' * 61}.example.org/{LONGEST}": LONGEST}, {"A_b.c-D": ""}],
    "podTemplate.annotations": [{"example.org/x": "any text, {braces}\n and \u4e16"}],
    "podTemplate.nodeSelector": [{LONGEST: LONGEST}],
    "podTemplate.tolerations": [
        [{"operator": "Exists"}, {"key": f"example.org/{LONGEST}", "value": LONGEST, "effect": "PreferNoSchedule"}]
    ],
    "podTemplate.resources": [
        {"requests": {"cpu": "500m"}, "limits": {"cpu": "0.5"}},
        {"limits": {"hugepages-2Mi": "1Gi", "memory": "2Gi", "example.org/nic": "2"}},
        {"requests": {"memory": "1000M"}, "limits": {"memory": "1G"}},
    ],
    "podTemplate.env": [[{"name": "NCCL_DEBUG", "value": ""}]],
    "credentials": [{"secretRef": {"name": "a.b-c"}}],
    "baseModel.uri": ["pvc://claim.with.dots/a/b"],
}


@pytest.mark.parametrize(("path", "number"), [(path, number) for path in WIDEST for number in range(len(WIDEST[path]))])
def test_what_the_crd_takes_the_kinds_of_the_children_take(dry: DryRun, path: str, number: int) -> None:
    """Otherwise a run would be accepted, and its Job refused where nobody looks."""
    spec = place(place(MAXIMAL, "baseModel.revision", GONE), path, WIDEST[path][number])
    code, answer = dry.create_run(spec, "a" * 52)
    assert code == 201, answer["message"]
    answer["metadata"]["uid"] = "0b3e1b4e-0000-4000-8000-000000000000"
    run = LoRAFineTune.model_validate(answer)
    for kind, body in (
        ("/api/v1/namespaces/default/services", build_service(run, 999)),
        ("/api/v1/namespaces/default/configmaps", build_configmap(run, 999)),
        ("/apis/batch/v1/namespaces/default/jobs", build_job(run, 999, Settings())),
    ):
        code, answer = dry.create(kind, body)
        assert code == 201, answer["message"]


def documented() -> dict[str, dict[str, Any]]:
    """Every LoRAFineTune that a reader may copy: whole files in examples/, and blocks of the documents."""
    found = {}
    texts = {path: [path.read_text()] for path in (ROOT / "examples").glob("*.yaml")}
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        texts[path] = re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    for path, blocks in texts.items():
        for document in (document for block in blocks for document in yaml.safe_load_all(block)):
            if isinstance(document, dict) and document.get("kind") == "LoRAFineTune":
                found[f"{path.relative_to(ROOT)}:{document['metadata']['name']}"] = document
    return found


DOCUMENTED = documented()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_manifest_that_is_shown_to_readers_is_good(dry: DryRun, name: str) -> None:
    document = DOCUMENTED[name]
    code, answer = dry.create_run(document["spec"], document["metadata"]["name"])
    assert code == 201, answer["message"]
    assert answer["spec"] == LoRAFineTuneSpec.model_validate(document["spec"]).to_wire()


# -- One definition, two judges ----------------------------------------------------------------------------------------

RULE_MESSAGES = tuple(
    rule["message"]
    for node in [SCHEMA, *dict(paths(SCHEMA, "")).values()]
    if not node.get("x-kubernetes-int-or-string")  # whose rule is its type, and pydantic knows it
    for rule in node.get("x-kubernetes-validations", [])
)


def by_rule_alone(message: str) -> bool:
    """Whether an error is one that pydantic does not know of: a CEL rule, or a list that is a set or a map.

    These are written once, in the CRD. The operator only ever sees what the API server let through.
    """
    return any(text in message for text in RULE_MESSAGES) or "Duplicate value" in message


def judge(dry: DryRun, spec: Any) -> tuple[bool, bool, str]:
    """Whether the schema takes ``spec``, whether pydantic does, and what the API server said."""
    code, answer = dry.create_run(spec)
    causes = (answer.get("details") or {}).get("causes", [])
    # While something is missing or too long, rules are not looked at, which the API server adds as an error.
    served = code == 201 or (
        code == 422
        and all(by_rule_alone(cause["message"]) or "were not checked" in cause["message"] for cause in causes)
    )
    try:
        LoRAFineTuneSpec.model_validate(spec)
    except ValidationError:
        return served, False, str(answer.get("message"))
    return served, True, str(answer.get("message"))


def values(node: dict[str, Any], good: Any) -> Iterator[Any]:
    """Values at, below and above every bound of a node, and of every wrong type."""
    yield from ("x", "", 1, 0, -1, 1.5, True, [], {}, ["x"], {"x": "y"})
    for key in ("minimum", "maximum"):
        if key in node:
            step = 1 if node.get("type") == "integer" else 1e-6
            yield from (node[key] - step, node[key], node[key] + step)
    if node.get("x-kubernetes-int-or-string"):
        yield from ("auto", "16", 1024, 1025)
    if node.get("type") == "string":
        limit = node.get("maxLength", 8)
        yield from ("a" * limit, "a" * (limit + 1), "\u00e9" * min(limit, 64), "a\n", "a b", "\u00a0", "A-b_c.d")
        if isinstance(good, str):
            yield from (
                good + "\n",
                good + " ",
                good + "\u2028",
                " " + good,
                good.ljust(limit, "a"),
                good.ljust(limit + 1, "a"),
            )
    if node.get("type") == "array" and good:
        # Entries that differ in the text by which they are told apart.
        for count in (node["maxItems"], node["maxItems"] + 1):
            yield [
                {**good[0], "name": f"{good[0]['name']}{'abcdefghij'[n % 10] * (n // 10 + 1)}".upper()}
                if isinstance(good[0], dict) and "value" in good[0] and "name" in good[0]
                else {**good[0], "name": f"n{n}"}
                if isinstance(good[0], dict) and "name" in good[0]
                else good[0]
                if isinstance(good[0], dict)
                else f"{good[0]}{n}"
                for n in range(count)
            ]
    if "additionalProperties" in node:
        for count in (node["maxProperties"], node["maxProperties"] + 1):
            yield {f"example.org/n{n}": "1" for n in range(count)}
    if "properties" in node and isinstance(good, dict):
        yield {**good, "unknown": 1}
        for name in node["properties"]:
            yield {key: value for key, value in good.items() if key != name}


def value_at(spec: Any, path: str) -> Any:
    head, _, key = path.partition(":")
    for part in re.findall(r"[^.\[\]]+", head):
        spec = spec[int(part) if part.isdigit() else part]
    return spec[key] if key else spec


def candidates() -> list[tuple[Spec, str, Any]]:
    """(spec, path, value): every interesting value of every field, to be placed in an otherwise good spec."""
    cases: list[tuple[Spec, str, Any]] = []
    for path, node in PATHS.items():
        spec = MAXIMAL if has(MAXIMAL, path) else OTHERWISE
        where = f"{path}{next(iter(value_at(spec, path[:-1])))}" if path.endswith(":") else path
        cases += [(spec, where, value) for value in values(node, value_at(spec, where))]
    return cases


CANDIDATES = candidates()


def test_every_bound_is_the_same_for_the_api_server_and_for_pydantic(dry: DryRun) -> None:
    assert len(CANDIDATES) > 1000
    taken, different = 0, []
    for spec, path, value in CANDIDATES:
        served, read, message = judge(dry, place(spec, path, value))
        taken += served and read
        if served != read:
            different.append(f"{path} = {str(value)[:60]!r}: API server {served}, pydantic {read}: {message[:200]}")
    assert different == []
    assert 200 < taken < len(CANDIDATES) - 200


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([case for case in CANDIDATES if case[0] is MAXIMAL]), min_size=1, max_size=4))
def test_the_two_agree_on_several_changes_at_once(dry: DryRun, cases: list[tuple[Spec, str, Any]]) -> None:
    spec: Any = MAXIMAL
    for _, path, value in cases:
        try:
            spec = place(spec, path, value)
        except (TypeError, KeyError, AttributeError, IndexError):
            continue  # an earlier change took away what this one would change
    served, read, message = judge(dry, spec)
    assert served == read, message


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 65536), st.integers(1, 64), st.integers(1, 16), st.integers(0, 16))
def test_the_advice_on_batch_sizes_is_the_trainers(dry: DryRun, size: int, micro: int, nodes: int, gpus: int) -> None:
    spec = {
        **MINIMAL,
        "training": {"maxSteps": 1, "globalBatchSize": size, "microBatchSize": micro},
        "parallelism": {"nodes": nodes, "gpusPerNode": gpus},
    }
    code, answer = dry.create_run(spec)
    read = LoRAFineTuneSpec.model_validate(spec)
    if code == 201:
        assert plan_batch(read.training, read.parallelism).global_batch_size == size
        return
    assert code == 422
    with pytest.raises(ValueError, match="multiple of") as error:
        plan_batch(read.training, read.parallelism)
    assert str(error.value).partition("multiple of ")[2] in answer["message"]


# -- Life on the server ------------------------------------------------------------------------------------------------


@pytest.fixture
def living(cp: devcluster.ControlPlane) -> Iterator[str]:
    cp.kubectl("apply", "--filename=-", input=json.dumps(manifest(MINIMAL, "living")))
    yield "living"
    cp.kubectl("delete", "lft", "living")


def read_run(cp: devcluster.ControlPlane, name: str) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(cp.kubectl("get", "lft", name, "--output=json"))
    return stored


CHANGES = {
    "a limit of the run that is not for changing": {"runPolicy": {"maxRestarts": 9}},
    "what is deleted": {"runPolicy": {"ttlDeletes": "run"}},
    "credentials that were absent": {"credentials": {"secretRef": {"name": "store"}}},
    "placement": {"podTemplate": {"nodeSelector": {"a": "b"}}},
    "another value": {"lora": {"r": 32}},
    "a field that was absent": {"publish": {"name": "other"}},
    "a section taken away, so that its defaults come back": {"training": {"maxSteps": 19}},
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_spec_cannot_be_changed(cp: devcluster.ControlPlane, living: str, case: str) -> None:
    with pytest.raises(
        devcluster.DevclusterError, match="spec cannot be changed once created: delete this LoRAFineTune"
    ):
        cp.kubectl("patch", "lft", living, "--type=merge", "--patch", json.dumps({"spec": CHANGES[case]}))


def test_suspend_deadline_and_ttl_can_be_changed(cp: devcluster.ControlPlane, living: str) -> None:
    policy = {"suspend": True, "activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 5}
    cp.kubectl("patch", "lft", living, "--type=merge", "--patch", json.dumps({"spec": {"runPolicy": policy}}))
    assert policy.items() <= read_run(cp, living)["spec"]["runPolicy"].items()
    gone = {"activeDeadlineSeconds": None, "suspend": False}
    cp.kubectl("patch", "lft", living, "--type=merge", "--patch", json.dumps({"spec": {"runPolicy": gone}}))
    assert "activeDeadlineSeconds" not in read_run(cp, living)["spec"]["runPolicy"]


def test_metadata_can_be_changed_and_the_same_manifest_applied_again(cp: devcluster.ControlPlane, living: str) -> None:
    cp.kubectl("label", "lft", living, "team=support")
    assert "unchanged" in cp.kubectl("apply", "--filename=-", input=json.dumps(manifest(MINIMAL, living)))
    assert read_run(cp, living)["metadata"]["generation"] == 1


def test_status_and_spec_are_written_apart(cp: devcluster.ControlPlane, living: str) -> None:
    both = {"spec": {"lora": {"r": 32}}, "status": {"phase": "Running"}}
    cp.kubectl("patch", "lft", living, "--subresource=status", "--type=merge", "--patch", json.dumps(both))
    stored = read_run(cp, living)
    assert stored["status"]["phase"] == "Running"
    assert stored["spec"]["lora"]["r"] == 16
    assert stored["metadata"]["generation"] == 1
    cp.kubectl("patch", "lft", living, "--type=merge", "--patch", '{"status": {"phase": "Failed"}}')
    assert read_run(cp, living)["status"]["phase"] == "Running"


def test_a_status_of_nonsense_is_refused(cp: devcluster.ControlPlane, living: str) -> None:
    for status, field in (
        ({"phase": "Dancing"}, "status.phase"),
        ({"progress": {"percent": 101}}, "status.progress.percent"),
        ({"progress": {"history": [[1]]}}, r"status.progress.history\[0\]"),
        ({"startTime": "yesterday"}, "status.startTime"),
    ):
        with pytest.raises(devcluster.DevclusterError, match=field):
            cp.kubectl(
                "patch",
                "lft",
                living,
                "--subresource=status",
                "--type=merge",
                "--patch",
                json.dumps({"status": status}),
            )


def apply_status(cp: devcluster.ControlPlane, name: str, manager: str, status: dict[str, Any]) -> None:
    body = {
        "apiVersion": "lorafinetune.io/v1alpha1",
        "kind": "LoRAFineTune",
        "metadata": {"name": name},
        "status": status,
    }
    cp.kubectl(
        "apply",
        "--filename=-",
        "--server-side",
        "--subresource=status",
        f"--field-manager={manager}",
        input=json.dumps(body),
    )


def condition(kind: str, status: str) -> dict[str, str]:
    return {"type": kind, "status": status, "reason": "Test", "lastTransitionTime": "2026-11-23T18:00:00Z"}


def test_conditions_of_two_writers_merge_by_type(cp: devcluster.ControlPlane, living: str) -> None:
    apply_status(cp, living, "operator", {"phase": "Running", "conditions": [condition("Ready", "False")]})
    apply_status(cp, living, "another", {"conditions": [condition("Approved", "True")]})
    apply_status(cp, living, "operator", {"phase": "Running", "conditions": [condition("Ready", "True")]})
    stored = LoRAFineTune.model_validate(read_run(cp, living)).status
    assert {entry.type: entry.status for entry in stored.conditions} == {"Ready": "True", "Approved": "True"}


FULL_STATUS: dict[str, Any] = {
    "phase": "Running",
    "reason": "Training",
    "attempt": 2,
    "progress": {
        "step": 9,
        "totalSteps": 18,
        "percent": 50,
        "summary": "50%",
        "loss": 0.5123,
        "eta": "1m20s",
        "tokensPerSecond": 1234.5,
        "history": [[1, 3.25], [9, 0.5123]],
    },
    "adapter": {
        "uri": "s3://models/adapters/default/living/sha256-0",
        "digest": "sha256:0",
        "version": 1,
        "servedName": "living-v1",
        "rank": 16,
        "servingMaxLoraRank": 16,
        "sizeBytes": 1,
    },
}


def test_the_columns_are_what_people_see(cp: devcluster.ControlPlane, living: str) -> None:
    apply_status(cp, living, "operator", FULL_STATUS)
    header, row = cp.kubectl("get", "lft", living).splitlines()
    assert header.split() == ["NAME", "PHASE", "PROGRESS", "LOSS", "ETA", "ADAPTER", "AGE"]
    assert row.split()[:-1] == ["living", "Running", "50%", "0.5123", "1m20s", "living-v1"]
    wide, row = cp.kubectl("get", "lft", living, "--output=wide").splitlines()
    assert wide.split()[1:] == [str(column["name"]).upper() for column in PRINTER_COLUMNS]
    assert row.split()[-6:] == ["9", "1234.5", "1", "2", MINIMAL["baseModel"]["uri"], "Training"]
    assert "living" in cp.kubectl("get", "all")


def test_a_status_comes_back_as_it_was_written(cp: devcluster.ControlPlane, living: str) -> None:
    apply_status(cp, living, "operator", FULL_STATUS)
    status = LoRAFineTune.model_validate(read_run(cp, living)).status
    assert status.to_wire() == {
        **FULL_STATUS,
        "observedGeneration": 0,
        "conditions": [],
        "failures": [],
        "chargedRestarts": 0,
        "suspendedAttempt": 0,
        "activeSeconds": 0,
        "gpuSeconds": 0,
    }


def test_explain_shows_a_field_with_its_text(cp: devcluster.ControlPlane) -> None:
    text = " ".join(cp.kubectl("explain", "lft.spec.training").split())
    assert "maxGradNorm <number> Gradients are scaled down to this L2 norm" in text
    assert "in one forward pass, 1 to 1024." in text
    assert "ENUM: constant linear cosine" in " ".join(cp.kubectl("explain", "lft.spec.training.scheduler").split())


def test_describe_shows_a_remedy_to_a_newcomer(cp: devcluster.ControlPlane, living: str) -> None:
    failure = {
        "attempt": 1,
        "class": "BadData",
        "message": "train.jsonl: record 17 has no messages",
        "remedy": "Correct the records.",
        "at": "2026-11-23T18:00:00Z",
    }
    apply_status(cp, living, "operator", {"phase": "Failed", "failures": [failure]})
    text = cp.kubectl("describe", "lft", living)
    assert "train.jsonl: record 17 has no messages" in text
    assert "Correct the records." in text

"""LoRAFineTunes for tests of the CRD: good specs, changes to them, and an API server that judges without keeping."""

import copy
import http.client
import json
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import devcluster
from lora_api.crd import RUN, RUNTIME, CustomResource, build_crd

ROOT = Path(__file__).resolve().parents[2]
RUNS = "/apis/lorafinetune.io/v1alpha1/namespaces/default/lorafinetunes"
RUNTIMES = "/apis/lorafinetune.io/v1alpha1/clusterloraruntimes"


def schema_of(resource: CustomResource) -> dict[str, Any]:
    schema: dict[str, Any] = build_crd(resource)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


SCHEMA = schema_of(RUN)

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
        "newTokens": ["<|ticket|>", "<|/ticket|>"],
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
    "checkpoint": {
        "everySteps": 10,
        "everyMinutes": 30,
        "keep": 3,
        "retainHours": 24,
        "resumeFrom": {"name": "support-v1"},
    },
    "publish": {
        "store": "s3://models/adapters",
        "name": "support",
        "samplePrompts": ["Hello"],
        "gate": {"minEvalLossImprovement": 0.1, "maxEvalLoss": 2.0, "base": "training"},
        "servedDtype": "bfloat16",
        "mergeBase": True,
    },
    "tracking": {
        "wandb": {"project": "support", "entity": "team", "baseUrl": "https://wandb.example.org"},
        "mlflow": {"trackingUri": "http://mlflow:5000", "experiment": "support"},
        "tensorboard": True,
    },
    "credentials": {"secretRef": {"name": "lora-store"}},
    "runtimeRef": {"name": "h100"},
    "runPolicy": {
        "maxRestarts": 0,
        "onOutOfMemory": "shrinkMicroBatch",
        "suspend": True,
        "retry": 2,
        "activeDeadlineSeconds": 3600,
        "stallTimeoutSeconds": 600,
        "placementTimeoutSeconds": 60,
        "ttlSecondsAfterFinished": 86400,
        "ttlDeletes": "run",
        "queueName": "team-a",
        "priorityClassName": "batch.low",
        "workloadPriorityClassName": "research",
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
    "checkpoint": {"resumeFrom": {"uri": "s3://models/adapters/default/support/checkpoints/u-1/step-10"}},
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
        return self._ask("POST", path, body)

    def replace(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The same for another version of what is there."""
        return self._ask("PUT", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self._connection.request(
            method,
            f"{path}?dryRun=All&fieldValidation=Strict",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read())

    def create_run(self, spec: Any, name: str = "run") -> tuple[int, dict[str, Any]]:
        return self.create(RUNS, manifest(spec, name))

    def create_runtime(self, spec: Any, name: str = "runtime") -> tuple[int, dict[str, Any]]:
        return self.create(RUNTIMES, manifest(spec, name, "ClusterLoRARuntime"))


def manifest(spec: Any, name: str = "run", kind: str = "LoRAFineTune") -> dict[str, Any]:
    return {"apiVersion": "lorafinetune.io/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


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

# Every field, none at its default.
MAXIMAL_RUNTIME: Spec = {
    "image": "registry.example.org:5000/lora-trainer@sha256:" + "0" * 64,
    "imagePullPolicy": "Always",
    "gpu": {"name": "NVIDIA H100 80GB", "memoryGiB": 79.6, "nodeSelector": {"nvidia.com/gpu.product": "H100"}},
    "podTemplate": {**MAXIMAL["podTemplate"], "env": [{"name": "NCCL_TOPO_FILE", "value": "/etc/nccl/topo.xml"}]},
    "endpoints": {
        "store": "https://s3.example.org:9000",
        "hub": "https://hub.example.org/mirror",
        "proxy": "http://proxy.example.org:3128",
        "noProxy": ".svc,10.0.0.0/8",
        "tracking": ["https://mlflow.example.org/team"],
    },
    "store": "s3://models/adapters",
    "checkpoint": {"everySteps": 10, "everyMinutes": 30, "keep": 3, "retainHours": 24},
    "terminationGracePeriodSeconds": 300,
    "preflight": False,
    "preflightResources": {"requests": {"cpu": "1"}, "limits": {"memory": "4Gi"}},
    "queueName": "team-a",
    "ttlSecondsAfterFinished": 86400,
    "egress": [
        {
            "cidr": "10.0.0.0/8",
            "except": ["10.1.0.0/16"],
            "ports": [{"port": 8000, "endPort": 8080, "protocol": "TCP"}],
        }
    ],
    "identity": "eksPodIdentity",
    "limits": {
        "maxNodes": 4,
        "maxGPUs": 32,
        "modelUriPrefixes": ["hf://meta-llama", "s3://models/"],
        "dataUriPrefixes": ["s3://datasets"],
        "storePrefixes": ["s3://models"],
        "maxActiveDeadlineSeconds": 86400,
        "annotationNames": ["kueue.x-k8s.io/*"],
        "labelNames": ["team"],
        "priorityClassNames": ["batch.low"],
        "queueRequired": True,
    },
    "allowedNamespaces": {
        "matchLabels": {"tier": "gold"},
        "matchExpressions": [{"key": "example.org/team", "operator": "In", "values": ["a", "b"]}],
    },
}

# Those that exclude others.
OTHER_RUNTIME: Spec = {
    "egress": [
        {"namespaceSelector": {"matchLabels": {"team": "ml"}}, "podSelector": {"matchLabels": {"app": "mlflow"}}}
    ]
}
RUNTIME_PATHS = dict(paths(schema_of(RUNTIME)["properties"]["spec"], ""))


def has(spec: Any, path: str) -> bool:
    for part in re.findall(r"[^.\[\]]+", path.partition(":")[0]):
        try:
            spec = spec[int(part) if part.isdigit() else part]
        except (KeyError, IndexError):
            return False
    return bool(spec) if ":" in path else True

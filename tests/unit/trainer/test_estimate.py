"""``lora_trainer estimate``: its table, its JSON, its exit codes, and what it says of bad input."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_trainer.cli import main
from lora_trainer.estimate import PART_TEXT, read_manifest
from tests.unit.trainer.configs import MIXTRAL
from tests.unit.trainer.published import LLAMA_3_8B

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Case:
    """A manifest and a config.json in files of their own."""

    manifest: Path
    config: Path

    def run(self, *arguments: str, gib: float = 24) -> int:
        files = ["-f", str(self.manifest), "--model-config", str(self.config)]
        return main(["estimate", *files, f"--gpu-memory-gib={gib}", *arguments])


def manifest(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "lorafinetune.io/v1alpha1",
        "kind": "LoRAFineTune",
        "metadata": {"name": "support"},
        "spec": {
            "baseModel": {"uri": "hf://meta-llama/Meta-Llama-3-8B"},
            "dataset": {"train": {"uri": "s3://datasets/train.jsonl"}, "maxSeqLength": 4096},
            "training": {"epochs": 1, "globalBatchSize": 16, "microBatchSize": 2},
            "parallelism": {"nodes": 1, "gpusPerNode": 2},
            "publish": {"store": "s3://models/adapters"},
            **spec,
        },
    }


@pytest.fixture
def case(tmp_path: Path) -> Case:
    made = Case(tmp_path / "run.yaml", tmp_path / "config.json")
    made.manifest.write_text(yaml.safe_dump(manifest()))
    made.config.write_text(json.dumps(LLAMA_3_8B))
    return made


def test_a_run_that_fits(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.run() == 0
    text = capsys.readouterr().out
    assert "8.03e9 weights, nf4, 2 x 4096 tokens, 2 GPUs" in text
    assert "fits in 24 GiB" in text
    assert all(name in text for name in PART_TEXT.values())


def test_json_has_the_total_the_parts_and_whether_it_fits(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.run("--json", gib=80) == 0
    found = json.loads(capsys.readouterr().out)
    per_gpu = found["perGpu"]
    assert set(per_gpu["parts"]) == set(PART_TEXT)
    assert per_gpu["totalGiB"] == pytest.approx(sum(per_gpu["parts"].values()), abs=0.01)
    assert per_gpu["safeGiB"] == pytest.approx(per_gpu["totalGiB"] * 1.1 + 1.5, abs=0.01)
    assert found["fits"] is True
    assert found["deviceGiB"] == 80
    assert found["suggestions"][0]["changes"] == {"training.microBatchSize": 8}


def test_a_run_that_does_not_fit_ends_with_1_and_says_what_would(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case.run(gib=12) == 1
    text = capsys.readouterr().out
    assert "does not fit in 12 GiB" in text
    assert "training.microBatchSize: 1  (safe: " in text
    assert case.run("--json", gib=12) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert all(one["safeGiB"] <= 12 for one in found["suggestions"])
    assert case.run(gib=1) == 1
    assert "no smaller micro-batch" in capsys.readouterr().out


BAD_MANIFESTS: list[tuple[str, str, list[str]]] = [
    ("not YAML", "a: [", ["not YAML"]),
    ("nested too deep", "[" * 10_000, ["not YAML"]),
    ("a number that is none", "a: !!int x", ["not YAML"]),
    ("no LoRAFineTune in it", "kind: Secret", ["kind", "exactly one LoRAFineTune"]),
    ("two of them", "kind: LoRAFineTune\n---\nkind: LoRAFineTune", ["there are 2"]),
    ("nothing", "", ["there are 0"]),
    ("metadata is no object", "kind: LoRAFineTune\nmetadata: 3", ["metadata: "]),
    (
        "every wrong field is named",
        yaml.safe_dump(manifest(lora={"r": 0, "alfa": 1}, parallelism={"nodes": 0})),
        ["spec.lora.r: ", "spec.lora.alfa: ", "spec.parallelism.nodes: "],
    ),
    (
        "batches that do not divide",
        yaml.safe_dump(manifest(training={"epochs": 1, "globalBatchSize": 15, "microBatchSize": 2})),
        ["spec.training.globalBatchSize is 15", "12 and 16"],
    ),
    ("training on CPUs", yaml.safe_dump(manifest(parallelism={"gpusPerNode": 0})), ["spec.parallelism.gpusPerNode"]),
    (
        "a target that the model does not have",
        yaml.safe_dump(manifest(lora={"targetModules": ["c_attn"]})),
        ["lora.targetModules: c_attn", "q_proj"],
    ),
]


@pytest.mark.parametrize(("text", "wanted"), [row[1:] for row in BAD_MANIFESTS], ids=[row[0] for row in BAD_MANIFESTS])
def test_a_bad_manifest_is_64_with_its_fields(
    case: Case, capsys: pytest.CaptureFixture[str], text: str, wanted: list[str]
) -> None:
    case.manifest.write_text(text)
    assert case.run() == 64
    shown = capsys.readouterr().err
    assert shown.startswith("BadSpec: ")
    assert all(part in shown for part in wanted), shown


def test_files_that_cannot_be_read_are_64(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.config.write_text("{")
    assert case.run() == 64
    assert "not JSON" in capsys.readouterr().err
    case.config.write_bytes(b"\xff")
    assert case.run() == 64
    assert "not UTF-8" in capsys.readouterr().err
    case.config.write_text('{"model_type": "mamba"}')
    assert case.run() == 64
    assert "model_type is 'mamba'" in capsys.readouterr().err
    case.manifest.unlink()
    assert case.run() == 64
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("gib", [0, -1, float("nan"), float("inf")])
def test_the_size_of_the_gpu_must_make_sense(case: Case, capsys: pytest.CaptureFixture[str], gib: float) -> None:
    assert case.run(gib=gib) == 64
    assert "--gpu-memory-gib" in capsys.readouterr().err


@pytest.mark.parametrize(("quantization", "weights", "code"), [("nf4", 5.5, 0), ("int8", 21.4, 1), ("none", 21.7, 1)])
def test_a_mixture_of_47_billion_weights_fits_on_four_gpus_of_24_gb_in_nf4(
    quantization: str, weights: float, code: int, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    case.config.write_text(json.dumps(MIXTRAL))
    made = yaml.safe_load((ROOT / "examples" / "mixtral-8x7b.yaml").read_text())
    made["spec"]["quantization"] = {"type": quantization}
    case.manifest.write_text(yaml.safe_dump(made))
    assert case.run("--json", gib=22) == code
    found = json.loads(capsys.readouterr().out)
    assert found["shardSize"] == 4
    assert found["perGpu"]["parts"]["weightsSharded"] == pytest.approx(weights, abs=0.1)


def test_yaml_is_read_as_kubectl_does(case: Case) -> None:
    text = yaml.safe_dump(manifest()).replace("epochs: 1", "epochs: 1\n    learningRate: 2e-4")
    case.manifest.write_text(text.replace("baseModel:", "baseModel:\n    revision: 2024-05-01"))
    spec = read_manifest(case.manifest).spec
    assert spec.training.learning_rate == 2e-4
    assert spec.base_model.revision == "2024-05-01"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_can_be_read(path: Path) -> None:
    assert read_manifest(path).spec.training.global_batch_size > 0


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = "import sys, lora_trainer.estimate; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

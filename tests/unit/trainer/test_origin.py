"""Which checkpoint of another run one goes on from, and what keeps it from that."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lora_api.adapter import BaseIdentity, CompleteMarker
from lora_api.run import RunSpec
from lora_trainer.catalog import Folder
from lora_trainer.errors import BadSpecError
from lora_trainer.origin import (
    Origin,
    describe_nothing,
    digest_data,
    find_beginning,
    find_misfit,
    find_origins,
    find_other_data,
    foresee_start,
    identify_base,
    names_folder,
)
from lora_trainer.store import Store
from tests.unit.trainer.checkpoints import BASE, IDENTITY, make_run, save


def found(store: Path, **resume: str) -> list[str]:
    """Which checkpoints are found, the best first."""
    run = make_run(store, resume)
    prefix = f"file://{store}/"
    return [origin.url.removeprefix(prefix) for origin in find_origins(run, Store(run.publish.store))]


# A sentence that says the case: what lies in the store (place, step, when), what is asked for, what is found.
Row = tuple[list[tuple[str, int, float]], dict[str, str], list[str]]
OLD = "team/old/checkpoints"
WHERE: dict[str, Row] = {
    "nothing": ([], {"name": "old"}, []),
    "the newest first": (
        [(f"{OLD}/u", 2, 0), (f"{OLD}/u", 10, 1), (f"{OLD}/u", 4, 2)],
        {"name": "old"},
        [f"{OLD}/u/step-10", f"{OLD}/u/step-4", f"{OLD}/u/step-2"],
    ),
    "the run that saved last comes before one that got further": (
        [(f"{OLD}/a", 90, 0), (f"{OLD}/b", 4, 5), (f"{OLD}/b", 6, 7), (f"{OLD}/c", 8, 6)],
        {"name": "old"},
        [f"{OLD}/b/step-6", f"{OLD}/b/step-4", f"{OLD}/c/step-8", f"{OLD}/a/step-90"],
    ),
    "a deleted run of the same name, but not the run itself": (
        [("team/new/checkpoints/own", 9, 9), ("team/new/checkpoints/gone", 4, 0)],
        {"name": "new"},
        ["team/new/checkpoints/gone/step-4"],
    ),
    "none of another name that begins alike": ([("team/older/checkpoints/u", 9, 9)], {"name": "old"}, []),
    "none of another namespace": ([("other/old/checkpoints/u", 9, 9)], {"name": "old"}, []),
    "a name that looks like a step": (
        [("team/step-3/checkpoints/u", 9, 9)],
        {"name": "step-3"},
        ["team/step-3/checkpoints/u/step-9"],
    ),
    "a uri of one step": ([(f"{OLD}/u", 2, 0), (f"{OLD}/u", 4, 0)], {"uri": f"{OLD}/u/step-2/"}, [f"{OLD}/u/step-2"]),
    "a uri of a step that is not there": ([(f"{OLD}/u", 4, 0)], {"uri": f"{OLD}/u/step-2"}, []),
    "a uri of a run": ([(f"{OLD}/u", 2, 0), (f"{OLD}/v", 4, 0)], {"uri": f"{OLD}/u"}, [f"{OLD}/u/step-2"]),
    "a uri of all runs of a name": (
        [(f"{OLD}/u", 2, 5), (f"{OLD}/v", 4, 0)],
        {"uri": OLD},
        [f"{OLD}/u/step-2", f"{OLD}/v/step-4"],
    ),
    "a uri further up": ([(f"{OLD}/u", 2, 5)], {"uri": "team/old"}, []),
}


@pytest.mark.parametrize("case", WHERE)
def test_where_it_looks(case: str, tmp_path: Path) -> None:
    saved, resume, want = WHERE[case]
    for place, step, at in saved:
        save(tmp_path, place, step, at)
    if "uri" in resume:
        resume = {"uri": f"file://{tmp_path}/{resume['uri']}"}
    assert found(tmp_path, **resume) == want


def test_one_that_is_cut_or_incomplete_is_none(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, f"{OLD}/u", step)
    (tmp_path / OLD / "u/step-8/COMPLETE.json").unlink()
    (tmp_path / OLD / "u/step-6/adapter.safetensors").write_bytes(b"cut")
    (tmp_path / OLD / "u/step-4/COMPLETE.json").write_text("{")
    assert found(tmp_path, name="old") == [f"{OLD}/u/step-2"]


def marker_of(run: RunSpec, **changes: Any) -> Origin:
    marker = CompleteMarker(
        step=12, world_size=1, global_batch_size=run.training.global_batch_size, seed=run.training.seed, files=[],
        created_at=datetime.now(UTC), **(IDENTITY.to_marker(run) | changes),
    )  # fmt: skip
    return Origin(Folder(Store("file:///dev/shm"), "u"), marker)


OTHER_BASE = BaseIdentity(uri="s3://models/m", digest="sha256:" + "1" * 64)
HUB = BaseIdentity(uri="hf://org/m", revision="c" * 40)
# A sentence that says the case: what the run says, what is otherwise in the marker, the base of the run, words.
MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], BaseIdentity, list[str]]] = {
    "the same": ({}, {}, BASE, []),
    "the same model in another place": ({}, {"base_model": OTHER_BASE.model_copy(update={"uri": "s3://x"})},
        OTHER_BASE, []),
    "another model": ({}, {}, OTHER_BASE, ["base model s3://models/m (sha256:0", "baseModel is s3://models/m (sha256:1",
        "set baseModel"]),
    "the same commit of a hub": ({}, {"base_model": HUB}, HUB, []),
    "another commit of a hub": ({}, {"base_model": HUB}, HUB.model_copy(update={"revision": "d" * 40}),
        ["hf://org/m (cccc", "hf://org/m (dddd"]),
    "the same commit of another hub": ({}, {"base_model": HUB}, HUB.model_copy(update={"uri": "hf://a/m"}), ["hf://a/m"]),
    "a digest and a commit": ({}, {"base_model": HUB}, BASE, ["hf://org/m (ccc", "s3://models/m (sha256:000"]),
    "two models of which nothing is known": ({}, {"base_model": BaseIdentity(uri="s3://m")}, BaseIdentity(uri="s3://m"),
        ["s3://m"]),
    "a trainer that wrote no base down": ({}, {"base_model": None}, BASE, ["trainer of an older version"]),
    "a trainer that wrote no shape down": ({}, {"lora": None}, BASE, ["trainer of an older version"]),
    "another rank": ({"lora": {"r": 4}}, {}, BASE, ["made with lora.r 16, this run has lora.r 4; set it as it was"]),
    "another alpha and other modules": (
        {"lora": {"alpha": 16, "targetModules": ["q_proj"]}}, {}, BASE,
        ['lora.alpha 32, lora.targetModules ["all-linear"], this run has lora.alpha 16, lora.targetModules ["q_proj"]'],
    ),
    "the same modules in another order": (
        {"lora": {"targetModules": ["q_proj", "k_proj"]}},
        {"lora": make_run(Path("/x"), lora={"targetModules": ["k_proj", "q_proj"]}).lora.to_wire()},
        BASE,
        [],
    ),
    "other ranks of some modules": ({"lora": {"rankPattern": {"q_proj": 4}}}, {}, BASE,
        ['lora.rankPattern {}, this run has lora.rankPattern {"q_proj": 4}']),
    "rsLoRA": ({"lora": {"useRslora": True}}, {}, BASE, ["lora.useRslora false"]),
    "other tokens": ({"lora": {"newTokens": ["<|a|>"]}}, {}, BASE, ["lora.newTokens []"]),
    "a field that an older trainer did not write": ({}, {"lora": {"r": 16, "alpha": 32}}, BASE, []),
    "a field of a newer trainer": ({}, {"lora": {"r": 16, "bias": "all"}}, BASE,
        ['lora.bias "all", this run has lora.bias null']),
    "other dropout": ({"lora": {"dropout": 0.1}}, {}, BASE, []),
    "another batch": ({"training": {"maxSteps": 20, "globalBatchSize": 16}}, {}, BASE,
        ["training.globalBatchSize 8, this run has training.globalBatchSize 16"]),
    "another seed": ({"training": {"maxSteps": 20, "globalBatchSize": 8, "seed": 1}}, {}, BASE, ["training.seed 42"]),
    "another learning rate": ({"training": {"maxSteps": 20, "globalBatchSize": 8, "learningRate": 0.1}}, {}, BASE, []),
    "another optimizer": (
        {"training": {"maxSteps": 20, "globalBatchSize": 8, "optimizer": "paged-adamw-8bit"}}, {}, BASE,
        ['training.optimizer "adamw"'],
    ),
    "another objective": ({"training": {"maxSteps": 20, "globalBatchSize": 8, "objective": "dpo"}}, {}, BASE,
        ['training.objective "sft", this run has training.objective "dpo"']),
    "as many steps as it has": ({"training": {"maxSteps": 12, "globalBatchSize": 8}}, {}, BASE,
        ["is of step 12, and this run has 12 steps", "raise training.maxSteps"]),
    "one step more than it has": ({"training": {"maxSteps": 13, "globalBatchSize": 8}}, {}, BASE, []),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_has_to_be_the_same(case: str) -> None:
    sections, changes, base, words = MISFITS[case]
    source = make_run(Path("/x"))
    run = make_run(Path("/x"), {"name": "old"}, **sections)
    said = find_misfit(run, marker_of(source, **changes), base, run.training.max_steps)
    if not words:
        assert said == ""
    for text in words:
        assert text in said
    assert said == "" or said.startswith("checkpoint.resumeFrom: file:///dev/shm/u/step-12 ")


def test_which_model_it_is_with_and_without_a_preflight(tmp_path: Path) -> None:
    hub = make_run(tmp_path, baseModel={"uri": "hf://org/m"})
    assert identify_base(hub, tmp_path / "snapshots" / ("c" * 40)) == HUB
    pinned = {"baseModel": {"uri": "hf://org/m", "revision": "c" * 40, "files": 3, "sizeBytes": 9}}
    assert identify_base(make_run(tmp_path, baseModel={"uri": "hf://org/m"}, pins=pinned), tmp_path).is_same(HUB)
    (tmp_path / "config.json").write_text("{}")
    mounted = make_run(tmp_path, baseModel={"uri": f"file://{tmp_path}"})
    first = identify_base(mounted, tmp_path)
    assert first.is_same(identify_base(mounted, tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    assert not first.is_same(identify_base(mounted, tmp_path))


def test_the_records_may_be_others_and_that_is_said() -> None:
    origin = marker_of(make_run(Path("/x")))
    assert find_other_data(origin, IDENTITY.data) == ""
    assert "goes on at step 13 in the order of the new records" in find_other_data(origin, "sha256:" + "e" * 64)
    run, packed = make_run(Path("/x")), {"dataset": {"train": {"uri": "file:///d"}, "packing": True}}
    digests = {digest_data(run, "a", 5), digest_data(run, "b", 5), digest_data(run, "a", 6)}
    digests.add(digest_data(make_run(Path("/x"), **packed), "a", 5))
    assert len(digests) == 4


def test_a_preflight_says_what_the_run_goes_on_from(tmp_path: Path) -> None:
    save(tmp_path, f"{OLD}/u", 4)
    run = make_run(tmp_path, {"name": "old"})
    assert foresee_start(make_run(tmp_path), BASE, 20, None) == ("", "")
    text, warning = foresee_start(run, BASE, 20, "sha256:" + "e" * 64)
    assert text == f"goes on from step 4 of file://{tmp_path}/{OLD}/u/step-4 (checkpoint.resumeFrom)"
    assert "dataset is not what" in warning
    with pytest.raises(BadSpecError, match="is of step 4, and this run has 4 steps"):
        foresee_start(run, BASE, 4, None)
    with pytest.raises(BadSpecError, match="set baseModel to that one"):
        foresee_start(run, OTHER_BASE, None, None)
    save(tmp_path, "team/new/checkpoints/own", 2)
    assert foresee_start(run, OTHER_BASE, 4, None) == ("", ""), "its own checkpoints win"


def test_what_it_says_where_there_is_none(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    with pytest.raises(BadSpecError) as error:
        foresee_start(make_run(tmp_path, {"name": "old"}), BASE, 20, None)
    assert f"there is no complete checkpoint below file://{tmp_path}/{OLD}; name is" in str(error.value)
    by_uri = make_run(tmp_path, {"uri": f"file://{tmp_path}/{OLD}/u/step-7"})
    assert f"below file://{tmp_path}/{OLD}/u/step-7; uri has to end in" in describe_nothing(by_uri, store, 0)
    assert "each of the 3 checkpoints is damaged" in describe_nothing(by_uri, store, 3)


def test_the_micro_batch_is_that_of_the_checkpoint_that_it_goes_on_from(tmp_path: Path) -> None:
    run, store = make_run(tmp_path, {"name": "old"}), Store(f"file://{tmp_path}")
    assert find_beginning(store, run) is None
    save(tmp_path, f"{OLD}/u", 4)
    begun = find_beginning(store, run)
    assert begun is not None
    assert begun.step == 4
    save(tmp_path, "team/new/checkpoints/own", 2)
    begun = find_beginning(store, run)
    assert begun is not None
    assert begun.step == 2


NAMED: dict[str, tuple[dict[str, str] | None, str, bool]] = {
    "nothing is named": (None, "team/old/checkpoints/u", False),
    "all of a name": ({"name": "old"}, "team/old/checkpoints/u", True),
    "another name": ({"name": "old"}, "team/older/checkpoints/u", False),
    "one step of it": ({"uri": "team/old/checkpoints/u/step-3"}, "team/old/checkpoints/u", True),
    "the run": ({"uri": "team/old/checkpoints/u/"}, "team/old/checkpoints/u", True),
    "all runs": ({"uri": "team/old/checkpoints"}, "team/old/checkpoints/u", True),
    "another run": ({"uri": "team/old/checkpoints/u"}, "team/old/checkpoints/u2", False),
}


@pytest.mark.parametrize("case", NAMED)
def test_what_is_named_is_known(case: str, tmp_path: Path) -> None:
    resume, folder, want = NAMED[case]
    if resume is not None and "uri" in resume:
        resume = {"uri": f"file://{tmp_path}/{resume['uri']}"}
    run = make_run(tmp_path, resume)
    store = Store(run.publish.store)
    assert names_folder(run, store, store.url(folder)) == want


@pytest.mark.parametrize("resume", [{}, {"name": "a", "uri": "s3://b/c"}])
def test_a_document_with_none_or_both_is_refused(resume: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set exactly one of name and uri"):
        make_run(tmp_path, resume)

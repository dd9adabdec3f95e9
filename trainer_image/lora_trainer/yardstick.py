"""What evaluation losses are measured on and with: a run writes its own into the manifest, ``evaluate`` measures by it.

Two losses can be compared only where all of that is equal: records, what of them counts, where they are cut, the base
model's types, the loss itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_api.adapter import MANIFEST_FILE, AdapterManifest
from lora_api.reading import read
from lora_api.run import RunSpec
from lora_api.sources import BaseModelSource, DataFormat, DataSource
from lora_api.training import DPO, Quantization, QuantizationType
from lora_api.yardstick import TOKEN_BUDGET, RunYardstick
from lora_trainer.data import eval_fraction, read_records, split_records
from lora_trainer.errors import BadDataError, BadSpecError
from lora_trainer.formats import Record
from lora_trainer.sources import fetch_data


def describe_yardstick(run: RunSpec) -> dict[str, Any]:
    """That of ``run``, for its manifest. A chat template of its own is published as a file."""
    training, length = run.training, run.dataset.max_seq_length
    return RunYardstick(
        base_model=run.base_model,
        dataset=run.dataset.model_copy(update={"chat_template": None}),
        quantization=run.quantization,
        dpo=(training.dpo or DPO()) if training.objective == "dpo" else None,
        token_budget=length * run.batch.micro_batch_size,
    ).to_wire()


@dataclass(frozen=True)
class Yardstick:
    """What to measure on and with. ``name`` is what it is, for people.

    ``fraction`` of ``data`` is the evaluation set; ``None``: all of it. ``dpo``: the records are preference pairs.
    """

    name: str
    model: BaseModelSource | None = None
    data: DataSource | None = None
    fraction: float | None = None
    format: DataFormat = "auto"
    columns: Mapping[str, str] | None = None
    system_prompt: str | None = None
    assistant_only: bool = False
    max_seq_length: int = 2048
    quantization: Quantization = field(default_factory=Quantization)
    dpo: DPO | None = None
    token_budget: int = TOKEN_BUDGET


@dataclass(frozen=True)
class Changes:
    """What the caller of ``evaluate`` wants otherwise; ``None``: as it is.

    ``dpo`` holds the settings of objective dpo that are given, by their names on the wire.
    """

    model: str | None = None
    data: str | None = None
    format: DataFormat | None = None
    columns: Mapping[str, str] | None = None
    system_prompt: str | None = None
    quantization: QuantizationType | None = None
    max_seq_length: int | None = None
    objective: str | None = None
    dpo: Mapping[str, Any] | None = None


def find_yardstick(adapter: Path | None) -> Yardstick:
    """That of the run that published the adapter in the directory ``adapter``; without one, evaluate's own."""
    own = "evaluate's own yardstick"
    if adapter is None:
        return Yardstick(f"{own}: no adapter was given")
    try:
        manifest = AdapterManifest.model_validate_json((adapter / MANIFEST_FILE).read_text(encoding="utf-8"))
        if not manifest.yardstick:
            return Yardstick(f"{own}: {MANIFEST_FILE} of the adapter is that of an earlier release, which has none")
        run = read(RunYardstick, manifest.yardstick).value
    except FileNotFoundError:
        return Yardstick(f"{own}: there is no {MANIFEST_FILE} beside the adapter")
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        return Yardstick(f"{own}: {MANIFEST_FILE} of the adapter cannot be understood here ({where})")
    dataset = run.dataset
    fraction = None if dataset.eval else eval_fraction(dataset)
    return Yardstick(
        "the run's own yardstick",
        model=run.base_model,
        data=None if fraction == 0 else dataset.eval or dataset.train,
        fraction=fraction or None,
        format=dataset.format,
        columns=dataset.columns,
        system_prompt=dataset.system_prompt,
        assistant_only=dataset.assistant_only_loss,
        max_seq_length=dataset.max_seq_length,
        quantization=run.quantization,
        dpo=run.dpo,
        token_budget=run.token_budget,
    )


def apply_changes(yardstick: Yardstick, changes: Changes) -> Yardstick:
    """``yardstick`` with ``changes``; its name says which of them make it another one.

    Raises:
        BadSpecError: a setting of dpo is out of its range, or nothing says what to measure.
    """
    given: dict[str, Any] = {
        "model": None if _is_at(yardstick.model, changes.model) else BaseModelSource(uri=str(changes.model)),
        "data": None if _is_at(yardstick.data, changes.data) else DataSource(uri=str(changes.data)),
        "format": changes.format,
        "columns": changes.columns or None,
        "system_prompt": changes.system_prompt,
        "max_seq_length": changes.max_seq_length,
        "quantization": changes.quantization
        and yardstick.quantization.model_copy(update={"type": changes.quantization}),
    }
    differ = {name: value for name, value in given.items() if value is not None and value != getattr(yardstick, name)}
    dpo = _change_dpo(yardstick.dpo, changes)
    fraction = None if "data" in differ else yardstick.fraction
    found = replace(yardstick, **differ, dpo=dpo, fraction=fraction)
    _check_complete(found, of_a_run=yardstick.model is not None)
    others = [f"--{name.replace('_', '-')}" for name in differ] + (["--objective"] if dpo != yardstick.dpo else [])
    if others and yardstick.model is not None:
        return replace(found, name=f"{found.name}, but for {', '.join(others)}")
    return found


def _is_at(source: BaseModelSource | DataSource | None, uri: str | None) -> bool:
    """Whether ``uri`` asks for nothing but ``source``."""
    return uri is None or (source is not None and source.uri == uri)


def _check_complete(yardstick: Yardstick, *, of_a_run: bool) -> None:
    if yardstick.model is None:
        raise BadSpecError(f"--model: is needed: nothing else says which base model to measure ({yardstick.name})")
    if yardstick.data is None:
        why = f"nothing else says which records to measure on ({yardstick.name})"
        if of_a_run:
            why = "the run had no evaluation records (dataset.evalFraction 0)"
        raise BadSpecError(f"--data: is needed: {why}")


def _change_dpo(dpo: DPO | None, changes: Changes) -> DPO | None:
    if changes.objective == "sft" or (changes.objective is None and dpo is None):
        return None
    try:
        return DPO.model_validate((dpo or DPO()).to_wire() | dict(changes.dpo or {}))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadSpecError(f"--{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def read_evaluation_records(yardstick: Yardstick, directory: Path, *, chat: bool) -> list[Record]:
    """The evaluation records of ``yardstick``, fetched to ``directory``. ``chat``: there is a chat template.

    Raises:
        BadDataError: a record is bad, or there is none.
        BadSpecError: an option does not fit the records.
    """
    assert yardstick.data is not None  # noqa: S101 - apply_changes has seen to it
    files = fetch_data(yardstick.data, directory)
    _, records = read_records(
        files, yardstick.format, yardstick.columns, yardstick.system_prompt,
        chat=chat, preferences=yardstick.dpo is not None,
    )  # fmt: skip
    if yardstick.fraction is None:
        return records
    held_out = split_records(records, yardstick.fraction)[1]
    if not held_out:
        raise BadDataError(f"{yardstick.data.uri}: no record is held out of so few; give others with --data")
    return held_out

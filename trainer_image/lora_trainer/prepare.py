"""From files of records to tokens on the scratch disk, in one pass whose memory does not grow with the files.

One process of each pod does it, the others map the same file. What is kept of a record in memory is its length, its
number of learned tokens, its place for the split and a hash: about 30 bytes.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora_api.data import DataReport
from lora_api.run import RunSpec
from lora_api.sources import DataFormat
from lora_trainer.data import (
    FORMS_DIFFER,
    NOTHING_TO_TRAIN_ON,
    Reading,
    eval_fraction,
    load_records,
    record_position,
    split_limit,
)
from lora_trainer.datareport import Side, report_on_data
from lora_trainer.errors import BadDataError, BadSpecError
from lora_trainer.formats import Format, Record, is_conversation
from lora_trainer.newtokens import Unseen
from lora_trainer.packs import Sequences, pack
from lora_trainer.pairs import count_leaks, digest_pairs, tokenize_pairs
from lora_trainer.readers import BadRecord
from lora_trainer.settings import Place
from lora_trainer.sources import Sources
from lora_trainer.tokenfile import TokenFile, TokenWriter
from lora_trainer.tokens import Document, Encoder

BATCH = 256
"""Records that are tokenized at a time, on all cores."""

BATCH_CHARACTERS = 4_000_000
"""Fewer where they are long: this much text is held at a time, or one record."""

SHOWN = 4
MARKER = "prepared.json"


@dataclass(frozen=True)
class TrainingData:
    """The records of a run, as Sequences of tokens where they are tokenized here.

    ``shown`` are the first held-out records, or the first ones where none are.
    """

    train: Any
    eval: Any
    report: DataReport
    conversational: bool
    shown: list[Record]
    digest: str

    @property
    def longest_evaluated(self) -> int:
        """Tokens of the longest evaluation record, as it is cut; 0 without any. Training records may all be shorter."""
        if isinstance(self.eval, Sequences):
            return int(self.eval.lengths.max(initial=0))
        return max((pair.length for pair in self.eval or []), default=0)


def prepare_data(run: RunSpec, sources: Sources, tokenizer: Tokenizer, place: Place, directory: Path) -> TrainingData:
    """Reads, checks, tokenizes and splits the records of ``run``; its files are below ``directory``.

    Preference pairs are few and are held in memory by each process.

    Raises:
        BadDataError: some record is bad, or nothing is left to learn from within maxSeqLength.
        BadSpecError: an option of the dataset does not fit its records or the model's tokenizer.
        OSError: the disk is full.
    """
    if run.training.objective == "dpo":
        return prepare_pairs(run, sources, tokenizer)
    marker = directory / MARKER
    if place.is_local_main:
        directory.mkdir(parents=True, exist_ok=True)
        prepared = _Pass(run, tokenizer, directory).run(sources)
        part = marker.with_suffix(".part")
        part.write_text(json.dumps(prepared))
        part.replace(marker)
    while not marker.exists():  # bounded by the launcher, which ends this process when the writing one fails
        time.sleep(0.1)
    return _open(run, directory, json.loads(marker.read_text()))


def check_same_data(data: TrainingData, device: torch.device) -> None:
    """All ranks train on the same tokens: a claim that is another volume on another node would go unseen.

    Raises:
        BadDataError: on all ranks, where the digests differ.
    """
    if not dist.is_initialized():
        return
    mine = torch.tensor(list(bytes.fromhex(data.digest)), dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    others = [rank for rank, digest in enumerate(everyone) if not torch.equal(digest, everyone[0])]
    if others:
        raise BadDataError(
            f"dataset: the pods read different records: rank {others[0]} has other tokens than rank 0; a pvc:// or "
            "file:// path must hold the same files on each node, and an object must not change while a run starts"
        )


class _Pass:
    """The pass of one process over all files."""

    def __init__(self, run: RunSpec, tokenizer: Tokenizer, directory: Path) -> None:
        self._run, self._tokenizer, self._directory = run, tokenizer, directory
        self._limit = run.dataset.max_seq_length
        self._unseen = Unseen(tokenizer, run.lora.new_tokens)

    def run(self, sources: Sources) -> dict[str, Any]:
        dataset = self._run.dataset
        found, first, side, digest, shown = self._write("train", sources.train, dataset.format)
        self._unseen.check()
        tokens = TokenFile(self._directory / "train.arrow")
        limit, doubled = 0.0, side.doubled_bos
        if sources.eval is not None:
            _, other, eval_side, eval_digest, shown_eval = self._write("eval", sources.eval, found)
            if is_conversation(other) != is_conversation(first):
                raise BadDataError(FORMS_DIFFER)
            held_out = np.asarray(eval_side.contents)
            self._check_left("eval", len(held_out))
            doubled += eval_side.doubled_bos
            digest = hashlib.sha256((digest + eval_digest).encode()).hexdigest()
            shown = shown_eval or shown
        else:
            places = np.concatenate([tokens.places, np.asarray(side.dropped_places)])
            limit = split_limit(places, eval_fraction(dataset))
            held_out = np.asarray(side.contents)[tokens.places < limit]
            if limit:
                shown = [record for record in shown if record_position(record) < limit] or shown
        report = report_on_data(tokens, side, limit, held_out).model_copy(update={"doubled_bos": doubled})
        if not report.train_records and not report.dropped_records:
            raise BadDataError(NOTHING_TO_TRAIN_ON)
        self._check_left("train", report.train_records)
        return {
            "limit": limit,
            "evalFile": sources.eval is not None,
            "conversational": is_conversation(first),
            "shown": shown[:SHOWN],
            "digest": digest,
            "report": report.to_wire(),
        }

    def _check_left(self, name: str, records: int) -> None:
        if not records:
            raise BadDataError(
                f"dataset.{name}: every record is cut at dataset.maxSeqLength = {self._limit} tokens, before the part "
                "that is learned from; raise maxSeqLength"
            )

    def _write(
        self, name: str, files: list[Path], declared: DataFormat
    ) -> tuple[Format, Record, Side, str, list[Record]]:
        dataset = self._run.dataset
        chat = bool(self._tokenizer.chat_template)
        reading = Reading(files, declared, dataset.columns, dataset.system_prompt, chat=chat)
        side, shown = Side(), _Shown(0.0 if name == "eval" else eval_fraction(dataset))
        encoder: Encoder | None = None
        with TokenWriter(self._directory / f"{name}.arrow") as writer:
            for batch in in_batches(reading):
                if encoder is None:
                    encoder = self._encoder(reading.format, batch[0][0])
                    self._check_template(encoder, *batch[0])
                records = [record for record, _, _ in batch]
                names = [f"{file}: record {number}" for _, file, number in batch]
                kept: list[Document] = []
                places: list[float] = []
                for (record, file, number), document in zip(batch, encoder.encode(records, names), strict=True):
                    if not isinstance(document, Document):
                        reading.faults.add(BadRecord(file, number, *document))
                        continue
                    position = record_position(record)
                    shown.see(record, position)
                    side.doubled_bos += document.doubled_bos
                    cut = document.cut(self._limit)
                    if not cut.supervised:
                        side.dropped_whole.append(len(document.ids))
                        side.dropped_places.append(position)
                        continue
                    side.whole.append(len(document.ids))
                    side.learned.append(cut.supervised)
                    side.contents.append(cut.content)
                    kept.append(cut)
                    self._unseen.see(cut.ids)
                    places.append(position)
                writer.write(kept, places)
            digest = writer.digest()
        return *reading.finish(), side, digest, shown.records

    def _encoder(self, found: Format | None, first: Record) -> Encoder:
        dataset, conversational = self._run.dataset, is_conversation(first)
        if dataset.assistant_only_loss and "messages" not in first:
            raise BadSpecError(
                f"dataset.assistantOnlyLoss: the records ({found}) have no conversations of several turns: of a prompt "
                "and its completion only the completion is learned anyway, of text all; turn it off"
            )
        if dataset.chat_template is not None and not conversational:
            raise BadSpecError(
                f"dataset.chatTemplate: the records ({found}) are plain text, which goes through no template; leave it "
                "out, or use conversations"
            )
        return Encoder(self._tokenizer, assistant_only=dataset.assistant_only_loss, conversational=conversational)

    def _check_template(self, encoder: Encoder, first: Record, file: str, number: int) -> None:
        """A template of the user's that refuses the first record is taken to be wrong itself."""
        name = f"{file}: record {number}"
        (document,) = encoder.encode([first], [name])
        if self._run.dataset.chat_template is not None and not isinstance(document, Document):
            raise BadSpecError(f"dataset.chatTemplate: {document[1]}; the first record is {name}")


class _Shown:
    """The first records that are held out, and the first of all."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._held_out: list[Record] = []
        self._first: list[Record] = []
        self._least: tuple[float, Record | None] = (2.0, None)

    def see(self, record: Record, position: float) -> None:
        if position < self._fraction and len(self._held_out) < SHOWN:
            self._held_out.append(record)
        if len(self._first) < SHOWN:
            self._first.append(record)
        if position < self._least[0]:
            self._least = position, record

    @property
    def records(self) -> list[Record]:
        """Candidates, in this order: which of them are held out is known at the end."""
        least = [self._least[1]] if self._least[1] is not None and self._fraction else []
        candidates = [*(self._held_out or least), *self._first]
        return [record for index, record in enumerate(candidates) if record not in candidates[:index]]


def in_batches(reading: Reading) -> Iterator[list[tuple[Record, str, int]]]:
    """The records in batches of BATCH, or of BATCH_CHARACTERS."""
    iterator = iter(reading)
    while batch := _take(iterator):
        yield batch


def _take(iterator: Iterator[tuple[Record, str, int]]) -> list[tuple[Record, str, int]]:
    batch, characters = [], 0
    for item in itertools.islice(iterator, BATCH):
        batch.append(item)
        characters += _characters(item[0])
        if characters >= BATCH_CHARACTERS:
            break
    return batch


def _characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _open(run: RunSpec, directory: Path, prepared: dict[str, Any]) -> TrainingData:
    tokens = TokenFile(directory / "train.arrow")
    report = DataReport.model_validate(prepared["report"])
    numbers = np.arange(len(tokens), dtype=np.int64)
    order: NDArray[np.int64] = numbers[tokens.places >= prepared["limit"]]
    train = Sequences(tokens, order)
    if run.dataset.packing:
        train = Sequences(tokens, *pack(tokens.lengths, order, run.dataset.max_seq_length, run.training.seed))
    evaluation = None
    if report.eval_records:
        held_out = TokenFile(directory / "eval.arrow") if prepared["evalFile"] else tokens
        chosen = np.arange(len(held_out)) if prepared["evalFile"] else numbers[tokens.places < prepared["limit"]]
        evaluation = Sequences(held_out, chosen)
    report = report.model_copy(update={"sequences": len(train)})
    return TrainingData(train, evaluation, report, prepared["conversational"], prepared["shown"], prepared["digest"])


def encode_all(encoder: Encoder, records: Sequence[Record], length: int) -> Sequences:
    """A few records as sequences in memory, cut to ``length`` tokens; those with nothing left to learn are left out.

    Raises:
        BadDataError: the template refuses a record.
    """
    names = [f"record {number}" for number in range(1, len(records) + 1)]
    documents = []
    for name, document in zip(names, encoder.encode(records, names), strict=True):
        if not isinstance(document, Document):
            raise BadDataError(f"{name}: {document[0]}: {document[1]}")
        documents.append(document.cut(length))
    held = _Held([document for document in documents if document.supervised])
    return Sequences(held, np.arange(len(held)))


class _Held(list[Document]):
    """Documents in memory."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        return np.asarray([len(document.ids) for document in self], dtype=np.int32)


def prepare_pairs(run: RunSpec, sources: Sources, tokenizer: Tokenizer) -> TrainingData:
    """The preference pairs of ``run`` as tokens, in memory: ``train`` and ``eval`` are lists of TokenPair.

    Raises:
        BadDataError: some record is bad, or no pair is left that differs within maxSeqLength.
        BadSpecError: an option of the dataset does not fit its records or the model's tokenizer.
    """
    records = load_records(run.dataset, sources, chat=bool(tokenizer.chat_template), objective=run.training.objective)
    check_pairs_can_be_written(tokenizer, conversational=records.conversational)
    limit = run.dataset.max_seq_length
    found = {name: tokenize_pairs(tokenizer, side, limit) for name, side in vars(records).items() if name != "format"}
    for name, pairs in found.items():
        if getattr(records, name) and not pairs.pairs:
            raise BadDataError(
                f"dataset.{name}: chosen and rejected of every pair are equal in the tokens that are left of them at "
                f"dataset.maxSeqLength = {limit}; raise maxSeqLength"
            )
    train, evaluation = found["train"].pairs, found["eval"].pairs
    unseen = Unseen(tokenizer, run.lora.new_tokens)
    for pair in train:
        unseen.see(torch.cat([pair.prompt, pair.chosen, pair.rejected]).numpy())
    unseen.check()
    shown = (records.eval or records.train)[:SHOWN]
    report = (
        found["train"]
        .report(len(evaluation))
        .model_copy(
            update={
                "doubled_bos": sum(pairs.doubled_bos for pairs in found.values()),
                "leaked_records": count_leaks(train, evaluation),
            }
        )
    )
    digest = digest_pairs([*train, *evaluation])
    return TrainingData(train, evaluation or None, report, records.conversational, shown, digest)


def check_pairs_can_be_written(tokenizer: Tokenizer, *, conversational: bool) -> None:
    """Raises BadSpecError where conversations need a chat template and ``tokenizer`` has none."""
    if conversational and not tokenizer.chat_template:
        raise BadSpecError(
            "dataset: the records are conversations, but baseModel's tokenizer has no chat template: use a model that "
            "is tuned for chat, set dataset.chatTemplate, or use pairs of plain strings"
        )

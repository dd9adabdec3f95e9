"""Measures a base model, with or without a published adapter: what ``lora_trainer evaluate`` does."""

import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora_api.adapter import ADAPTER_FILES
from lora_api.sources import BaseModelSource, DataFormat, DataSource
from lora_api.training import DPO, Quantization, QuantizationType
from lora_trainer.chat import TEMPLATE_FILE, read_template, use_chat_template
from lora_trainer.data import read_records
from lora_trainer.errors import BadDataError
from lora_trainer.evaluate import Evaluator, Sample, answer_questions, question
from lora_trainer.formats import Record, is_conversation
from lora_trainer.model import compute_dtype, load_base_model, load_tokenizer
from lora_trainer.newtokens import PUBLISHED_FILES, TOKENIZER_FILE
from lora_trainer.pairs import tokenize_pairs
from lora_trainer.precision import autocast_forward
from lora_trainer.preference import PreferenceEvaluator, Scorer
from lora_trainer.prepare import check_pairs_can_be_written, encode_all
from lora_trainer.rows import merge_rows
from lora_trainer.settings import Place
from lora_trainer.sources import fetch_data, fetch_model
from lora_trainer.store import Store
from lora_trainer.tokens import Encoder

TOKEN_BUDGET = 4096
ALONE = Place(0, 0, 1)


@dataclass(frozen=True)
class Measurement:
    """``loss`` in nats per token, or that of pairs. ``answers`` are of the records that expect one.

    Rewards are those of preference pairs: their mean margin, and the share of pairs (0 to 1) with one above 0.
    """

    loss: float
    records: int
    answers: list[Sample]
    reward_margin: float | None = None
    reward_accuracy: float | None = None

    @property
    def exact(self) -> int:
        """Answers that are exactly what the record expects, but for space around them."""
        return sum(answer.expected is not None and answer.answer == answer.expected.strip() for answer in self.answers)

    @property
    def exact_rate(self) -> float | None:
        """Share of right answers, 0 to 1; ``None`` without questions."""
        return self.exact / len(self.answers) if self.answers else None

    def to_wire(self, samples: int) -> dict[str, Any]:
        """The JSON form."""
        return {
            "evalLoss": self.loss,
            "records": self.records,
            "rewardMargin": self.reward_margin,
            "rewardAccuracy": self.reward_accuracy,
            "exact": self.exact,
            "answered": len(self.answers),
            "exactRate": self.exact_rate,
            "samples": [vars(answer) for answer in self.answers[:samples]],
        }

    def to_text(self, samples: int) -> str:
        """For people."""
        lines = [f"evaluation loss {self.loss:.4f} on {self.records} records"]
        if self.reward_accuracy is not None:
            lines.append(f"chosen preferred in {self.reward_accuracy:.0%}, reward margin {self.reward_margin:.4f}")
        if self.answers:
            lines.append(f"exactly right {self.exact} of {len(self.answers)} ({self.exact_rate:.0%})")
        for answer in self.answers[:samples]:
            lines += ["", answer.prompt, f"  expected: {answer.expected}", f"  answered: {answer.answer}"]
        return "\n".join(lines)


def measure(
    *,
    model: str,
    data: str,
    adapter: str | None,
    data_format: DataFormat = "auto",
    columns: dict[str, str] | None = None,
    system_prompt: str | None = None,
    quantization: QuantizationType = "nf4",
    max_seq_length: int = 2048,
    batch_size: int = 16,
    limit: int | None = None,
    max_new_tokens: int = 64,
    dpo: DPO | None = None,
) -> Measurement:
    """Measures ``model`` (with ``adapter``) on ``data``, in this process alone. ``dpo``: the records are pairs.

    Raises:
        TrainerError: a source is not there, a record is bad, ...
    """
    with tempfile.TemporaryDirectory(dir=os.environ.get("LORA_WORK")) as scratch:
        work = Path(scratch)
        directory = fetch_model(BaseModelSource(uri=model), work / "model")
        local = work / "adapter"
        if adapter is not None:
            wanted = {*ADAPTER_FILES, TEMPLATE_FILE, *PUBLISHED_FILES}
            Store(adapter).download_directory("", local, lambda name: name in wanted)
        tokenizer = load_tokenizer(local if (local / TOKENIZER_FILE).is_file() else directory)
        use_chat_template(tokenizer, read_template(local))
        files = fetch_data(DataSource(uri=data), work / "data")
        chat = bool(tokenizer.chat_template)
        pairs = dpo is not None
        _, records = read_records(files, data_format, columns, system_prompt, chat=chat, preferences=pairs)
        records = records[:limit]
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        settings = Quantization(type=quantization)
        network: Any = load_base_model(directory, settings, device)
        if quantization == "nf4" and device.type == "cpu":
            network.dequantize()  # once, not in every product; the values stay those of the 4-bit weights
            network.requires_grad_(requires_grad=False)
        autocast_forward(network, compute_dtype(settings, device), device)
        evaluator = build_evaluator(network, tokenizer, records, max_seq_length, device, dpo)
        if adapter is not None:
            with warnings.catch_warnings():  # PEFT warns of adapters on tied weights; merge_rows knows
                warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
                network = PeftModel.from_pretrained(network, local)
            merge_rows(network)
        found = replace(evaluator, model=network).measure()
        questions = [asked for record in records if (asked := question(record)) is not None]
        answers: list[Sample] = []
        for start in range(0, len(questions), batch_size):
            part = questions[start : start + batch_size]
            answers += answer_questions(network, tokenizer, part, device, max_new_tokens)
    assert found is not None and found.loss is not None  # noqa: S101, PT018 - nobody interrupts, and there are records
    return Measurement(found.loss, evaluator.records, answers, found.reward_margin, found.reward_accuracy)


def build_evaluator(
    base: torch.nn.Module,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    length: int,
    device: torch.device,
    dpo: DPO | None,
) -> Evaluator:
    """An evaluator of ``base`` on ``records``, cut to ``length`` tokens. With ``dpo`` they are pairs.

    The reference of pairs is computed here: ``base`` must not have an adapter yet.

    Raises:
        BadDataError: nothing of them is left to measure.
        BadSpecError: the tokenizer has no chat template, and the pairs are conversations.
    """
    conversational = is_conversation(records[0])
    if dpo is None:
        dataset = encode_all(Encoder(tokenizer, assistant_only=False, conversational=conversational), records, length)
        if not len(dataset):
            raise BadDataError(
                f"--data: every record is cut at --max-seq-length {length} tokens, before the part that is measured; "
                "raise it"
            )
        return Evaluator(base, tokenizer, dataset, [], TOKEN_BUDGET, ALONE, device)
    check_pairs_can_be_written(tokenizer, conversational=conversational)
    pairs = tokenize_pairs(tokenizer, records, length).pairs
    if not pairs:
        raise BadDataError(
            "--data: chosen and rejected of every pair are equal in the tokens that are left of them at "
            f"--max-seq-length {length}; raise it"
        )
    scorer = Scorer(base, int(tokenizer.pad_token_id), TOKEN_BUDGET, ALONE, device)
    return PreferenceEvaluator(
        base,
        tokenizer,
        None,
        [],
        TOKEN_BUDGET,
        ALONE,
        device,
        pairs=pairs,
        reference=scorer.score(pairs),
        dpo=dpo,
    )

"""Measures a base model, with or without a published adapter: what ``lora_trainer evaluate`` does."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from trl.trainer.utils import add_fused_lm_head

from lora_api.adapter import ADAPTER_FILES
from lora_api.sources import BaseModelSource, DataFormat, DataSource
from lora_api.training import Quantization, QuantizationType
from lora_trainer.chat import TEMPLATE_FILE, read_template, use_chat_template
from lora_trainer.data import read_records
from lora_trainer.errors import BadDataError
from lora_trainer.evaluate import Sample, answer_questions, evaluate_loss, question
from lora_trainer.formats import is_conversation
from lora_trainer.model import load_base_model, load_tokenizer
from lora_trainer.prepare import encode_all
from lora_trainer.settings import Place
from lora_trainer.sources import fetch_data, fetch_model
from lora_trainer.store import Store
from lora_trainer.tokens import Encoder

TOKEN_BUDGET = 4096


@dataclass(frozen=True)
class Measurement:
    """``loss`` in nats per token. ``answers`` are of the records that expect one."""

    loss: float
    records: int
    answers: list[Sample]

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
            "exact": self.exact,
            "answered": len(self.answers),
            "exactRate": self.exact_rate,
            "samples": [vars(answer) for answer in self.answers[:samples]],
        }

    def to_text(self, samples: int) -> str:
        """For people."""
        lines = [f"evaluation loss {self.loss:.4f} on {self.records} records"]
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
) -> Measurement:
    """Measures ``model`` (with ``adapter``) on ``data``, in this process alone.

    Raises:
        TrainerError: a source is not there, a record is bad, ...
    """
    with tempfile.TemporaryDirectory(dir=os.environ.get("LORA_WORK")) as scratch:
        work = Path(scratch)
        directory = fetch_model(BaseModelSource(uri=model), work / "model")
        tokenizer = load_tokenizer(directory)
        local = work / "adapter"
        if adapter is not None:
            wanted = {*ADAPTER_FILES, TEMPLATE_FILE}
            Store(adapter).download_directory("", local, lambda name: name in wanted)
        use_chat_template(tokenizer, read_template(local))
        files = fetch_data(DataSource(uri=data), work / "data")
        chat = bool(tokenizer.chat_template)
        _, records = read_records(files, data_format, columns, system_prompt, chat=chat)
        records = records[:limit]
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        network: Any = load_base_model(directory, Quantization(type=quantization), device)
        if quantization == "nf4" and device.type == "cpu":
            network.dequantize()  # once, not in every product; the values stay those of the 4-bit weights
            network.requires_grad_(requires_grad=False)
        add_fused_lm_head(network)
        if adapter is not None:
            network = PeftModel.from_pretrained(network, local)
        encoder = Encoder(tokenizer, assistant_only=False, conversational=is_conversation(records[0]))
        dataset = encode_all(encoder, records, max_seq_length)
        if not len(dataset):
            raise BadDataError(
                f"--data: every record is cut at --max-seq-length {max_seq_length} tokens, before the part that is "
                "measured; raise it"
            )
        place = Place(0, 0, 1)
        loss = evaluate_loss(network, dataset, int(tokenizer.pad_token_id), TOKEN_BUDGET, place, device)
        questions = [asked for record in records if (asked := question(record)) is not None]
        answers: list[Sample] = []
        for start in range(0, len(questions), batch_size):
            part = questions[start : start + batch_size]
            answers += answer_questions(network, tokenizer, part, device, max_new_tokens)
    return Measurement(loss, len(dataset), answers)

"""Records as tokens: their ids, and which of them are learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora_trainer.chat import Chat, Span, TemplateFailedError
from lora_trainer.errors import BadSpecError
from lora_trainer.formats import Problem, Record, shared_length
from lora_trainer.framing import Framing
from lora_trainer.loss import IGNORED

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Document:
    """One record as tokens.

    ``learned`` has the ranges of positions whose tokens are learned, int32 of shape (ranges, 2): first, and one after
    the last. The first token is in none of them: nothing stands before it that could tell it. ``doubled_bos``: a second
    beginning of text was taken away from it.
    """

    ids: Ids
    learned: Ids
    doubled_bos: bool = False

    @property
    def content(self) -> int:
        """A hash of its tokens, 64 bits."""
        return int.from_bytes(blake2b(self.ids.tobytes(), digest_size=8).digest(), "big")

    @property
    def supervised(self) -> int:
        """Tokens that are learned."""
        return int((self.learned[:, 1] - self.learned[:, 0]).sum())

    def labels(self) -> NDArray[np.int64]:
        """The ids that are learned, IGNORED elsewhere. The model shifts them itself."""
        labels = np.full(len(self.ids), IGNORED, dtype=np.int64)
        for start, end in self.learned:
            labels[start:end] = self.ids[start:end]
        return labels

    def cut(self, length: int) -> "Document":
        """The first ``length`` tokens."""
        if len(self.ids) <= length:
            return self
        kept = np.minimum(self.learned, length)
        return Document(self.ids[:length], kept[kept[:, 1] > kept[:, 0]], self.doubled_bos)


def make_document(ids: Sequence[int], spans: Sequence[Span], *, doubled_bos: bool = False) -> Document:
    """A document whose tokens in ``spans`` (of positions) are learned."""
    learned = [(max(start, 1), end) for start, end in spans if end > max(start, 1)]
    ranges = np.asarray(learned, dtype=np.int32).reshape(-1, 2)
    return Document(np.asarray(ids, dtype=np.int32), ranges, doubled_bos)


class Encoder:
    """Turns records into tokens.

    text: all of it is learned, with the end-of-text token. prompt and completion: the completion, from the first token
    that the prompt alone does not have. messages: all of the conversation, or the assistant's turns alone.
    """

    def __init__(self, tokenizer: Tokenizer, *, assistant_only: bool, conversational: bool) -> None:
        """For records that are all conversations, or all plain text.

        Raises:
            BadSpecError: conversations without a chat template, or an option that does not fit.
        """
        if conversational and not tokenizer.chat_template:
            raise BadSpecError(
                "dataset: the records are conversations, but baseModel's tokenizer has no chat template: use a model "
                "that is tuned for chat, give one in dataset.chatTemplate, or use records with text, or with prompt "
                "and completion as strings"
            )
        if assistant_only and not tokenizer.is_fast:
            raise BadSpecError(
                "dataset.assistantOnlyLoss: baseModel's tokenizer cannot tell which characters a token stands for; "
                "it needs a tokenizer.json"
            )
        self.tokenizer, self.assistant_only = tokenizer, assistant_only
        self._chat = Chat(tokenizer) if conversational else None
        self._framing = Framing(tokenizer)

    def encode(self, records: Sequence[Record], names: Sequence[str]) -> list[Document | Problem]:
        """Each record as tokens, whatever its length, or what is wrong with it. ``names`` are for messages.

        Raises:
            BadSpecError: an option does not fit a record.
        """
        texts: list[str] = []
        prompts: list[str | None] = []
        spans: list[list[Span] | None] = []
        problems: dict[int, Problem] = {}
        for index, record in enumerate(records):
            prompt, text, span = None, "", None
            try:
                prompt, text, span = self._write(record)
            except TemplateFailedError as error:
                field = "messages" if "messages" in record else "prompt"
                problems[index] = (field, f"the chat template refuses it: {error}")
            except BadSpecError as error:
                raise BadSpecError(f"{names[index]}: {error}") from error
            texts.append(text)
            prompts.append(prompt)
            spans.append(span)
        encoded = self._tokenize(texts, offsets=self.assistant_only)
        openings = self._tokenize([prompt for prompt in prompts if prompt is not None], offsets=False)["input_ids"]
        opening = iter(openings)
        documents: list[Document | Problem] = []
        for index, ids in enumerate(encoded["input_ids"]):
            begins = next(opening) if prompts[index] is not None else []
            if index in problems:
                documents.append(problems[index])
                continue
            surplus, found = self._surplus(ids, records[index]), spans[index]
            doubled = bool(surplus) or self._answers_with_bos(records[index])
            if self._chat is None:
                ids, begins = self._framing.close(ids), self._framing.open(begins)
            else:
                ids, begins = ids[surplus:], begins[self._framing.surplus(begins) :]
            if found is not None:
                places = spans_of_tokens(encoded["offset_mapping"][index][surplus:], found)
                documents.append(make_document(ids, places, doubled_bos=doubled))
                continue
            documents.append(make_document(ids, [(shared_length(begins, ids), len(ids))], doubled_bos=doubled))
        return documents

    def _surplus(self, ids: Sequence[int], record: Record) -> int:
        if self._chat is None:
            return self._framing.surplus(ids)
        return self._chat.surplus(ids, record["messages"] if "messages" in record else record["prompt"])

    def _answers_with_bos(self, record: Record) -> bool:
        completion = record.get("completion")
        return isinstance(completion, str) and self._framing.answer(completion) != completion

    def _write(self, record: Record) -> tuple[str | None, str, list[Span] | None]:
        """The prompt's text, the whole text, and the assistant's characters where those alone are learned."""
        if self._chat is None:
            prompt = record.get("prompt")
            return (
                prompt,
                record["text"] if prompt is None else prompt + self._framing.answer(record["completion"]),
                None,
            )
        if self.assistant_only:
            return None, *self._chat.assistant_spans(record["messages"])
        if "messages" in record:
            return None, self._chat.render(record["messages"]), None
        prompt = self._chat.render(record["prompt"], generation_prompt=True)
        return prompt, self._chat.render(record["prompt"] + record["completion"]), None

    def _tokenize(self, texts: list[str], *, offsets: bool) -> dict[str, list[list[int]]]:
        if not texts:
            return {"input_ids": []}
        encoded = self.tokenizer(
            texts,
            add_special_tokens=self._chat is None,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )
        return dict(encoded)


def spans_of_tokens(offsets: Sequence[tuple[int, int]] | Sequence[list[int]], spans: Sequence[Span]) -> list[Span]:
    """Positions of the tokens that begin inside ``spans`` of characters.

    A token that begins before a span and ends in it is not of it: the model is given it, and does not write it.
    """
    starts = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
    return [
        (int(np.searchsorted(starts, start, "left")), int(np.searchsorted(starts, end, "left"))) for start, end in spans
    ]

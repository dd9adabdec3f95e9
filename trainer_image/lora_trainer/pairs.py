"""Preference pairs as token ids: how they are tokenized, cut so that both answers stay comparable, and batched."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora_api.data import DataReport
from lora_trainer.chat import Chat, TemplateFailedError
from lora_trainer.errors import BadDataError
from lora_trainer.formats import Record, is_conversation, shared_length
from lora_trainer.framing import Framing
from lora_trainer.loss import IGNORED


@dataclass(frozen=True)
class TokenPair:
    """A prompt and two answers to it, as int32 token ids. ``index`` is the pair's place in its set."""

    index: int
    prompt: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class Cut:
    """What is kept of a pair. ``lost`` counts the tokens of both sequences that are not."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    lost: int


class Tokenized(NamedTuple):
    """A pair as token ids. ``doubled_bos``: a second beginning of text was taken away from it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    doubled_bos: bool


def tokenize_pair(
    tokenizer: Tokenizer, record: Record, chat: Chat | None = None, framing: Framing | None = None
) -> Tokenized:
    """Token ids of prompt, chosen and rejected of a converted record.

    ``chat`` writes conversations, ``framing`` begins and ends plain text; without them they are made here.

    Prompt and answer are tokenized together, as the model meets them. An answer begins with the first token at which
    one of the two differs from the prompt alone: tokens may merge across the border. Plain text ends with the end
    token; in conversations the chat template says how an answer ends.

    Raises:
        BadDataError: the chat template refuses the conversation.
        BadSpecError: the chat template itself writes BOS twice.
    """
    prompt, answers = record["prompt"], (record["chosen"], record["rejected"])
    if isinstance(prompt, str):
        framing = framing or Framing(tokenizer)
        raw, kept = framing.raw(prompt), [framing.answer(answer) for answer in answers]
        doubled = framing.surplus(raw) > 0 or kept != list(answers)
        alone, whole = framing.open(raw), [framing.close(framing.raw(prompt + answer)) for answer in kept]
    else:
        chat = chat or Chat(tokenizer)
        raw = _encode(chat, prompt, ask=True)
        surplus = chat.surplus(raw, prompt)
        alone, doubled = raw[surplus:], surplus > 0
        whole = [_encode(chat, [*prompt, *answer], ask=False)[surplus:] for answer in answers]
    cut = min(shared_length(alone, ids) for ids in whole)
    return Tokenized(whole[0][:cut], whole[0][cut:], whole[1][cut:], doubled)


def _encode(chat: Chat, messages: list[Record], *, ask: bool) -> list[int]:
    try:
        return chat.raw(messages, generation_prompt=ask)
    except TemplateFailedError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise BadDataError(f"dataset: the chat template refuses a pair with the roles {roles}: {error}") from error


def cut_pair(prompt: list[int], chosen: list[int], rejected: list[int], limit: int, first: int | None) -> Cut:
    """The pair within ``limit`` tokens a sequence, so that both answers are still judged alike.

    Both keep the same prompt and both answers end at the same length. The prompt gives way first, from its left, for
    its end is the question; but it keeps half of the limit, and what the answers have above the rest is cut from
    their right. ``first`` is the token that every sequence of the model begins with (bos); it stays in front.
    """
    longest = max(len(chosen), len(rejected))
    room = min(len(prompt), max(limit - longest, limit // 2))
    kept = prompt[len(prompt) - room :]
    if room < len(prompt) and room and first is not None and prompt[0] == first:
        kept = [first, *kept[1:]]
    end = limit - room
    lost = 2 * (len(prompt) - room) + max(0, len(chosen) - end) + max(0, len(rejected) - end)
    return Cut(kept, chosen[:end], rejected[:end], lost)


@dataclass(frozen=True)
class PairSet:
    """The pairs that can be learned from. ``dropped`` are equal once they are cut, or have an empty answer.

    ``tokens`` are those of all sequences before they were cut, of dropped pairs too, and ``longest`` the longest one.
    From ``doubled_bos`` pairs a second beginning of text was taken away.
    """

    pairs: list[TokenPair]
    dropped: int = 0
    truncated: int = 0
    tokens: int = 0
    longest: int = 0
    doubled_bos: int = 0

    def report(self, eval_records: int) -> DataReport:
        """The set in numbers. Tokens are of both sequences of a pair; globalBatchSize counts pairs."""
        learned = sum(len(pair.chosen) + len(pair.rejected) for pair in self.pairs)
        kept = learned + sum(2 * len(pair.prompt) for pair in self.pairs)
        return DataReport(
            train_records=len(self.pairs),
            eval_records=eval_records,
            tokens=kept,
            supervised_tokens=learned,
            sequences=len(self.pairs),
            longest=self.longest,
            truncated_records=self.truncated,
            lost_token_share=1 - kept / max(1, self.tokens),
            dropped_records=self.dropped,
        )


def tokenize_pairs(tokenizer: Tokenizer, records: Sequence[Record], limit: int) -> PairSet:
    """``records`` as tokens, at most ``limit`` a sequence."""
    chat, framing = Chat(tokenizer) if records and is_conversation(records[0]) else None, Framing(tokenizer)
    pairs: list[TokenPair] = []
    dropped = truncated = tokens = longest = doubled = 0
    for record in records:
        prompt, chosen, rejected, doubled_bos = tokenize_pair(tokenizer, record, chat, framing)
        doubled += doubled_bos
        tokens += 2 * len(prompt) + len(chosen) + len(rejected)
        longest = max(longest, len(prompt) + max(len(chosen), len(rejected)))
        cut = cut_pair(prompt, chosen, rejected, limit, tokenizer.bos_token_id)
        if cut.chosen == cut.rejected or not (cut.chosen and cut.rejected and cut.prompt):
            dropped += 1
            continue
        truncated += bool(cut.lost)
        ids = (torch.tensor(part, dtype=torch.int32) for part in (cut.prompt, cut.chosen, cut.rejected))
        pairs.append(TokenPair(len(pairs), *ids))
    return PairSet(pairs, dropped, truncated, tokens, longest, doubled)


def count_leaks(train: Sequence[TokenPair], evaluation: Sequence[TokenPair]) -> int:
    """How many pairs of ``evaluation`` are in ``train``, to the token."""
    known = {digest_pairs([pair]) for pair in train}
    return sum(digest_pairs([pair]) in known for pair in evaluation)


def digest_pairs(pairs: Sequence[TokenPair]) -> str:
    """SHA-256 over the tokens of ``pairs``, in their order."""
    digest = hashlib.sha256()
    for pair in pairs:
        for part in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(len(part).to_bytes(4, "big") + part.numpy().tobytes())
    return digest.hexdigest()


def pad_sequences(sequences: Sequence[tuple[torch.Tensor, torch.Tensor]], pad_token: int) -> dict[str, torch.Tensor]:
    """Prompts and answers as int64 ``input_ids``, ``attention_mask`` and ``labels`` of shape (sequences, longest).

    Only the answers have labels. Padding is on the right.
    """
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.full((len(sequences), width), pad_token, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.int64)
    labels = torch.full((len(sequences), width), IGNORED, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(answer)
        ids[row, :start] = prompt
        ids[row, start:end] = answer
        mask[row, :end] = 1
        labels[row, start:end] = answer
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

"""lora.newTokens on the tokenizer's side: which row of the model each of them has, and what of it is published."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AddedToken
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora_api.run import RunSpec
from lora_trainer.chat import TEMPLATE_FILE, use_chat_template
from lora_trainer.errors import BadDataError, BadSpecError
from lora_trainer.model import load_config, load_tokenizer
from lora_trainer.modelshape import ModelShape

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
PUBLISHED_FILES = (TOKENIZER_FILE, SETTINGS_FILE, TEMPLATE_FILE)
"""Files of a tokenizer that has learned tokens; without a chat template there is no last one."""


@dataclass(frozen=True)
class NewTokens:
    """The rows of lora.newTokens in embedding and head, in their order.

    ``added`` are those among ``ids`` that the base model's tokenizer does not have. The others it has in reserve.
    """

    ids: tuple[int, ...] = ()
    added: tuple[int, ...] = ()


def read_tokenizer(run: RunSpec, directory: Path) -> tuple[Tokenizer, NewTokens]:
    """The tokenizer of the model in ``directory`` as ``run`` uses it: with its chat template and its new tokens.

    Raises:
        BadSpecError: it cannot be read, the template is none, or there is no row for a token.
    """
    tokenizer = use_chat_template(load_tokenizer(directory), run.dataset.chat_template)
    if not run.lora.new_tokens:
        return tokenizer, NewTokens()
    return tokenizer, add_tokens(tokenizer, run.lora.new_tokens, load_config(directory).get_text_config().vocab_size)


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], rows: int) -> NewTokens:
    """Teaches ``tokenizer`` the ``tokens`` that it does not have, on rows of the model that no token has yet.

    Models often have more rows than their tokenizer has tokens (Qwen 2.5: 271). A model with ``rows`` rows is never
    enlarged: an adapter of an enlarged model could not be loaded into the base model as it is published.

    Raises:
        BadSpecError: a token is in use for something else, or no row is left.
    """
    known = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    pieces = tokenizer.get_vocab()
    used = {value: name for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    for token in tokens:
        if token in used:
            raise BadSpecError(f"lora.newTokens: {token} is the tokenizer's {used[token]} already; take another one")
        if token in pieces and token not in known:
            raise BadSpecError(
                f"lora.newTokens: {token} is a piece of ordinary text in this model's tokenizer, so it is not new; "
                f"mark it, such as <|{token}|>"
            )
    fresh = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in fresh])
    ids = [int(number) for number in tokenizer.convert_tokens_to_ids(list(tokens))]
    if max(ids) >= rows:
        free = max(0, rows - len(pieces))
        reserved = [name for name in known if "reserved" in name.lower() or "unused" in name.lower()]
        instead = (
            f"take reserved ones instead, such as {', '.join(reserved[1:3])}" if reserved[1:] else "leave some out"
        )
        raise BadSpecError(
            f"lora.newTokens: the model has {rows} rows and its tokenizer {len(pieces)} tokens, which leaves room for "
            f"{free} new ones, and {len(fresh)} are asked for; {instead}, or fine-tune a model that has room"
        )
    return NewTokens(tuple(ids), tuple(number for token, number in zip(tokens, ids, strict=True) if token in fresh))


def describe_cost(run: RunSpec, tokens: NewTokens, shape: ModelShape | None) -> str:
    """What new tokens cost, in one sentence; bytes where the model's ``shape`` is known."""
    count, rank = len(tokens.ids), run.lora.published_rank
    size = ""
    if shape is not None:
        size = f", {8 * rank * (shape.vocabulary + shape.hidden) / 2**20:,.1f} MiB larger"
    server = "a server that loads LoRA of embedding and output head"
    if tokens.added:
        server += " and the tokenizer that is published beside it"
    wider = f", and has rank {rank} in place of {run.lora.r} to hold them" if rank == count > run.lora.r else ""
    return (
        f"lora.newTokens ({count}): their rows of embedding and output head are trained too. The adapter gets two more "
        f"pairs of matrices{size}{wider}; it needs {server}, which publish.mergeBase spares"
    )


class Unseen:
    """Those of ``tokens`` that no training record had yet."""

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
        self._left = {int(tokenizer.convert_tokens_to_ids(token)): token for token in tokens}

    def see(self, ids: NDArray[np.int32]) -> None:
        """Takes note of a record's tokens."""
        for number in [number for number in self._left if number in ids]:
            del self._left[number]

    def check(self) -> None:
        """Raises BadDataError where one is left."""
        if self._left:
            raise BadDataError(
                f"lora.newTokens: no training record has {', '.join(self._left.values())} within dataset.maxSeqLength, "
                "so its row would never be trained; write it into the records or the chat template, or leave it out"
            )


def tokenizer_files(run: RunSpec, base: Path) -> dict[str, str]:
    """The tokenizer with its added tokens, by name of file; none where the base model's own has all tokens.

    A server must read it in place of that of the model in ``base``.
    """
    if not run.lora.new_tokens:
        return {}
    tokenizer, tokens = read_tokenizer(run, base)
    if not tokens.added:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = (Path(scratch) / name for name in PUBLISHED_FILES)
        return {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}

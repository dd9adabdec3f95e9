"""How a text begins and ends in tokens: with one beginning of text (BOS) and one end (EOS), wherever it is tokenized.

Many tokenizers write BOS before each text (Llama, Gemma, Mistral), and most of their chat templates write it too; so do
records that were rendered beforehand. A model has never seen two. All that is tokenized goes through ``Framing``:
records, preference pairs, the evaluation's prompts.

It gives the ids that a server has. For a conversation those are ``apply_chat_template(tokenize=True)``: what the
template writes, without what the tokenizer would add. For plain text they are ``tokenizer(text)``; where the text has a
BOS of its own, ``tokenizer(text, add_special_tokens=False)``. So the tokenizer's BOS is what is taken away, never the
text's: behind that some tokenizers (Metaspace with prepend_scheme "first") write the first word in another way.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase as Tokenizer


class Framing:
    """Begin and end of the texts of one tokenizer. ``adds_bos``, ``adds_eos``: it writes them itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        whole, bare = _ids(tokenizer, "a", special=True), _ids(tokenizer, "a", special=False)
        self.adds_bos = self._bos is not None and whole[:1] == [self._bos] != bare[:1]
        self.adds_eos = self._eos is not None and whole[-1:] == [self._eos] != bare[-1:]

    def surplus(self, ids: Sequence[int]) -> int:
        """How many tokens to take from the front, so that one BOS is left of several."""
        count = 0
        while count + 1 < len(ids) and ids[count] == ids[count + 1] == self._bos:
            count += 1
        return count

    def raw(self, text: str) -> list[int]:
        """Ids of a plain text as the tokenizer writes them, twice begun or ended as they may be."""
        return _ids(self._tokenizer, text, special=True)

    def open(self, raw: Sequence[int]) -> list[int]:
        """Ids of a plain prompt, which goes on: one BOS, and not the EOS that the tokenizer may have put behind it."""
        ids = list(raw[self.surplus(raw) :])
        return ids[:-1] if self.adds_eos and ids[-1:] == [self._eos] else ids

    def close(self, raw: Sequence[int]) -> list[int]:
        """Ids of a whole plain text: one BOS where it has any, and one EOS."""
        start, end = self.surplus(raw), len(raw)
        if self._eos is None:
            return list(raw[start:])
        while end > start and raw[end - 1] == self._eos:
            end -= 1
        return [*raw[start:end], self._eos]

    def answer(self, text: str) -> str:
        """A plain completion, which goes behind its prompt: without a BOS of its own.

        Where the tokenizer adds no BOS, the token may be more than that (ChatML models begin each message with it), and
        stays.
        """
        return text.removeprefix(str(self._tokenizer.bos_token)) if self.adds_bos else text


def _ids(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

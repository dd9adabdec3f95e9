"""The chat template of a run: how it writes a conversation, and which part of the text the assistant wrote."""

import re
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from lora_trainer.errors import BadSpecError
from lora_trainer.formats import Record
from lora_trainer.framing import Framing

Span = tuple[int, int]
"""First character, and the one after the last."""

TODAY = date(2024, 7, 26)
"""The day that a template sees which writes today's date (strftime_now): Llama 3.1's own default. With the real one,
two pods around midnight, or a restart on the next day, would train on other tokens."""

TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers looks for a template beside a tokenizer."""

_MARK = "Zq8mark8qZ"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_FILES = ("<template>", "<unknown>")


class TemplateFailedError(Exception):
    """The template refused one conversation."""


class Chat:
    """Writes conversations with the tokenizer's chat template.

    Templates come from strangers: transformers renders them in jinja2's immutable sandbox, which reaches neither files
    nor Python's internals.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._framing = tokenizer, Framing(tokenizer)
        self._bos = str(tokenizer.bos_token or "")
        self.template: str = tokenizer.get_chat_template()
        self._variables = dict(tokenizer.special_tokens_map)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        self._special = sorted(special, key=len, reverse=True)
        self.tagged = bool(_GENERATION.search(self.template))
        try:
            compiled = _compile_jinja_template(self.template)
        except jinja2.TemplateError as error:
            raise BadSpecError(f"the chat template does not compile: {explain(error)}") from error
        compiled.globals["strftime_now"] = TODAY.strftime

    def render(self, messages: list[Record], *, generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Raises:
            TemplateFailedError: the template refuses it.
        """
        return self._render(messages, generation_prompt=generation_prompt)[0]

    def encode(self, messages: list[Record], *, generation_prompt: bool = False) -> list[int]:
        """The token ids of a conversation. Special tokens are those that the template writes, BOS once.

        Raises:
            TemplateFailedError: the template refuses it.
            BadSpecError: the template itself writes BOS twice.
        """
        ids = self.raw(messages, generation_prompt=generation_prompt)
        return ids[self.surplus(ids, messages) :]

    def raw(self, messages: list[Record], *, generation_prompt: bool = False) -> list[int]:
        """The token ids of all that the template writes, BOS twice as it may be.

        Raises:
            TemplateFailedError: the template refuses the conversation.
        """
        text = self.render(messages, generation_prompt=generation_prompt)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def surplus(self, ids: Sequence[int], messages: Sequence[Record]) -> int:
        """How many BOS to take from the front of the ``ids`` of a conversation, where a message has one of its own.

        Raises:
            BadSpecError: the template itself writes two. It is what servers render with, so they would go on to.
        """
        surplus = self._framing.surplus(ids)
        if surplus and not any(message["content"].lstrip().startswith(self._bos) for message in messages):
            raise BadSpecError(
                f"the chat template writes {self._bos} twice at the beginning of a conversation, and servers would "
                "too: give one that writes it once in dataset.chatTemplate"
            )
        return surplus

    def assistant_spans(self, messages: list[Record]) -> tuple[str, list[Span]]:
        """The text of a conversation, and what of it the assistant wrote, each turn with the token that ends it.

        A template with {% generation %} says it itself. For any other, a turn is what stands between two texts: the
        conversation up to the turn with the generation prompt, and the conversation up to the turn's end.

        Raises:
            TemplateFailedError: the template refuses the conversation.
            BadSpecError: the template writes the beginning of a conversation in another way once it goes on.
        """
        if self.tagged:
            text, spans = self._render(messages, tags=True)
            return text, [(start, self._with_end_token(text, end)) for start, end in spans]
        text = self.render(messages)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._find_turn(messages, index, text) for index in turns]

    def _render(
        self, messages: list[Record], *, generation_prompt: bool = False, tags: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=tags,
                **self._variables,
            )
        except Exception as error:  # a template may fail in any way that Python can
            raise TemplateFailedError(explain(error)) from error
        return texts[0], [(int(start), int(end)) for start, end in spans[0]] if tags else []

    @cached_property
    def _end_token(self) -> str | None:
        """What ends the assistant's turns in a template whose {% generation %} leaves it out, or ``None``."""
        question = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text, spans = self._render(question, tags=True)
        except TemplateFailedError:
            return None
        return self._special_at(text, spans[-1][1]) if spans else None

    def _with_end_token(self, text: str, end: int) -> int:
        token = self._end_token
        return end + len(token) if token is not None and text.startswith(token, end) else end

    def _special_at(self, text: str, position: int) -> str | None:
        return next((token for token in self._special if text.startswith(token, position)), None)

    def _find_turn(self, messages: list[Record], index: int, text: str) -> Span:
        try:
            opening = self.render(messages[:index], generation_prompt=True) if index else ""
            bare = self.render(messages[:index]) if index else ""
            end = self._end_of_turn(messages, index, text)
        except TemplateFailedError as error:
            raise BadSpecError(_no_mask(f"it refuses the conversation up to one of its messages ({error})")) from error
        if not text.startswith(opening):
            raise BadSpecError(_no_mask("with add_generation_prompt it does not write the beginning of the turn"))
        if end is None or end < len(opening):
            raise BadSpecError(_no_mask("it writes a message in another way once the conversation goes on"))
        start = len(opening)
        if opening == bare and not text[start:].lstrip().startswith(messages[index]["content"].strip()):
            raise BadSpecError(_no_mask("it does not know add_generation_prompt"))
        return start, self._trim(text, start, end)

    def _end_of_turn(self, messages: list[Record], index: int, text: str) -> int | None:
        """Where the turn ends in ``text``, or ``None``.

        Some templates write the last turn in a way of its own: Qwen 3 leaves the thinking out of all others, Phi 3 ends
        it with the end of the text too. There the end is found with a mark in the content's place. What follows it up
        to the turn's end, and in the whole conversation, begins alike: with what ends the turn in both.
        """
        closing = self.render(messages[: index + 1])
        if text.startswith(closing):
            return len(closing)
        marked = [*messages[:index], messages[index] | {"content": _MARK}, *messages[index + 1 :]]
        after_turn = self.render(marked[: index + 1]).partition(_MARK)[2]
        rest = self.render(marked).partition(_MARK)[2]
        both = min(len(after_turn), len(rest))
        shared = next((place for place in range(both) if after_turn[place] != rest[place]), both)
        if shared < len(after_turn):  # what is alike behind a token that ends the turn is alike by chance
            places = [(after_turn.rfind(token, 0, shared), len(token)) for token in self._special]
            shared = max((place + length for place, length in places if place >= 0), default=0)
        return len(text) - len(rest) + shared if shared and text.endswith(rest) else None

    def _trim(self, text: str, start: int, end: int) -> int:
        """``end`` without the line breaks behind the token that ends the turn: a model stops before them."""
        shorter = start + len(text[start:end].rstrip())
        ends = any(text[start:shorter].endswith(token) for token in self._special)
        return shorter if ends else end


def _no_mask(why: str) -> str:
    return (
        "dataset.assistantOnlyLoss: the assistant's part cannot be told apart in what the model's chat template "
        f"writes: {why}. Give a dataset.chatTemplate that has the assistant's messages between "
        "{% generation %} and {% endgeneration %}, or turn assistantOnlyLoss off"
    )


def explain(error: BaseException) -> str:
    """What is wrong in a template, with its line where that is known."""
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None and not isinstance(error, jinja2.TemplateSyntaxError):
        if trace.tb_frame.f_code.co_filename in _TEMPLATE_FILES:
            line = trace.tb_lineno
        trace = trace.tb_next
    words = " ".join(str(error).split())[:300] or type(error).__name__
    return f"line {line}: {words}" if line else words


def use_chat_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """``tokenizer`` with ``template`` in place of its own, for training, evaluation and samples alike.

    Raises:
        BadSpecError: it is no template; the message has the line.
    """
    if template is not None:
        tokenizer.chat_template = template
        try:
            Chat(tokenizer)
        except BadSpecError as error:
            raise BadSpecError(f"dataset.chatTemplate: {error}") from error
    return tokenizer


def template_files(template: str | None) -> dict[str, str]:
    """What is published beside an adapter that was trained with a template of the user's: name and content."""
    return {} if template is None else {TEMPLATE_FILE: template}


def read_template(directory: Path) -> str | None:
    """The template beside the adapter in ``directory``, or ``None``."""
    file = directory / TEMPLATE_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else None

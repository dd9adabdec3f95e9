"""One beginning and one end of text, whatever tokenizer, template and record write: the ids are those of a server."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_api.run import RunSpec
from lora_trainer.errors import BadSpecError
from lora_trainer.evaluate import encode_prompt
from lora_trainer.pairs import tokenize_pair
from lora_trainer.preflight import preflight
from lora_trainer.prepare import prepare_data
from lora_trainer.settings import Place
from lora_trainer.sources import Sources
from lora_trainer.tokens import Document, Encoder
from tests.support.tiny import make_model, write_rows

ALONE = Place(0, 0, 1)
BOS, EOS = "<s>", "</s>"


def begins_with_bos(backend: Tokenizer) -> None:
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])


def begins_and_ends(backend: Tokenizer) -> None:
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 1), (EOS, 2)])


def marks_the_first_word(backend: Tokenizer) -> None:
    """As Mistral: the first word has a space before it, unless a token stands there."""
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="Ġ", prepend_scheme="first")
    backend.normalizer = normalizers.Sequence([])
    begins_with_bos(backend)


def as_it_is(backend: Tokenizer) -> None:
    """No token is added."""


TOKENIZERS: dict[str, tuple[Callable[[Tokenizer], None], dict[str, Any]]] = {
    "has no BOS, as Qwen": (as_it_is, {"bos_token": None}),
    "has a BOS and does not write it, as SmolLM2": (as_it_is, {}),
    "writes BOS, as Llama 3": (begins_with_bos, {}),
    "writes BOS, and the first word behind nothing otherwise, as Mistral": (marks_the_first_word, {}),
    "writes BOS and EOS": (begins_and_ends, {}),
    "has one token for BOS and EOS, as GPT-2": (as_it_is, {"bos_token": EOS}),
}
LINES = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
TEMPLATES = {"with BOS": "{{ bos_token or '' }}" + LINES + ASK, "without": LINES + ASK}
QUESTION, ANSWER = [{"role": "user", "content": "one two"}], [{"role": "assistant", "content": "red"}]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Any:
    change, options = TOKENIZERS[request.param]
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    change(backend)
    tokens = {"unk_token": "<unk>", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS} | options
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = loaded("one")["input_ids"]
    assert (ids[0] == 1, ids[-1] == 2) == ("writes BOS" in request.param, "writes BOS and EOS" in request.param)
    if change is marks_the_first_word:
        assert loaded("<s>one", add_special_tokens=False)["input_ids"] != ids
    return loaded


def bos_of(tokenizer: Any) -> str:
    """The text of BOS, as a record may have it; none where there is no such token, or where it ends texts too."""
    return BOS if tokenizer.bos_token == BOS else ""


def served(tokenizer: Any, text: str) -> list[int]:
    """The ids that a server should have for a plain prompt: those of the text, with the tokenizer's BOS or its own."""
    own = bool(bos_of(tokenizer)) and text.startswith(BOS)
    ids = list(tokenizer(text, add_special_tokens=not own)["input_ids"])
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def check_frame(tokenizer: Any, ids: list[int], *, begun: bool, ended: bool) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos != eos:
        assert [place for place, token in enumerate(ids) if token == bos and bos is not None] == [0] * begun
    assert [place for place, token in enumerate(ids) if token == eos] == [len(ids) - 1] * ended


TEXTS = {"plain": ("", "", ""), "begun": (BOS, "", ""), "ended": ("", "", EOS), "all": (BOS, "", EOS),
         "begun within": (BOS, BOS, EOS)}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_plain_records_begin_and_end_once(tokenizer: Any, kind: str) -> None:
    start, within, end = (part if part != BOS else bos_of(tokenizer) for part in TEXTS[kind])
    writes = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    within = within if writes else ""
    prompt, begun = start + "one two", writes or bool(start)
    expected = served(tokenizer, prompt)
    encoder = Encoder(tokenizer, assistant_only=False, conversational=False)
    pair = {"prompt": prompt, "completion": within + " red" + end}
    text, answered = encoder.encode([{"text": prompt + " red" + end}, pair], "ab")
    assert isinstance(text, Document)
    assert isinstance(answered, Document)
    prefers = {"prompt": prompt, "chosen": within + " red" + end, "rejected": within + " blue"}
    asked, chosen, rejected, doubled = tokenize_pair(tokenizer, prefers)
    wholes = [text.ids.tolist(), answered.ids.tolist(), asked + chosen]
    assert wholes[0] == wholes[1] == wholes[2] == [*served(tokenizer, prompt + " red"), tokenizer.eos_token_id]
    for ids in (*wholes, asked + rejected):
        check_frame(tokenizer, ids, begun=begun, ended=True)
        assert ids[: len(expected)] == expected
    assert encode_prompt(tokenizer, prompt) == asked == expected
    assert answered.learned.tolist() == [[len(expected), len(wholes[1])]]
    twice = writes and bool(start)
    assert (text.doubled_bos, answered.doubled_bos, doubled) == (twice, twice or bool(within), twice or bool(within))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("own", [False, True])
def test_conversations_have_the_ids_that_a_server_renders(tokenizer: Any, template: str, own: bool) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    # A message that begins with BOS is the first text where a template writes no role before it.
    bare = "{{ bos_token or '' }}" if template == "with BOS" else ""
    if own:
        tokenizer.chat_template = bare + "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"
    start = bos_of(tokenizer) if own else ""
    question = [{"role": "user", "content": start + "one two"}]
    plain = [{"role": "user", "content": "one two"}] if template == "with BOS" else question
    expected = tokenizer.apply_chat_template([*plain, *ANSWER], return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    both = [{"messages": [*question, *ANSWER]}, {"prompt": question, "completion": ANSWER}]
    documents = Encoder(tokenizer, assistant_only=False, conversational=True).encode(both, "ab")
    found = tokenize_pair(
        tokenizer, {"prompt": question, "chosen": ANSWER, "rejected": [ANSWER[0] | {"content": "blue"}]}
    )
    twice = bool(start) and template == "with BOS"
    for document in documents:
        assert isinstance(document, Document)
        assert (document.ids.tolist(), document.doubled_bos) == (expected, twice)
    assert (found.prompt + found.chosen, found.doubled_bos) == (expected, twice)
    assert encode_prompt(tokenizer, question) == prompt
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        assert expected.count(tokenizer.bos_token_id) == (1 if bos_of(tokenizer) and (start or bare) else 0)


def test_the_assistants_turns_are_found_behind_a_bos_that_was_taken_away(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"
    conversation = [{"role": "user", "content": "<s>one"}, *ANSWER]
    (document,) = Encoder(tokenizer, assistant_only=True, conversational=True).encode([{"messages": conversation}], "a")
    assert isinstance(document, Document)
    assert tokenizer.decode(document.ids) == "<s>one</s>red</s>"
    assert [tokenizer.decode(document.ids[start:end]) for start, end in document.learned] == ["red</s>"]


def test_a_template_that_writes_bos_twice_is_refused_since_servers_would_write_it_too(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "<s>" + "{{ bos_token }}" + LINES
    words = r"template writes <s> twice .*dataset\.chatTemplate"
    with pytest.raises(BadSpecError, match=words):
        Encoder(tokenizer, assistant_only=False, conversational=True).encode([{"messages": [*QUESTION, *ANSWER]}], "a")
    with pytest.raises(BadSpecError, match=words):
        tokenize_pair(tokenizer, {"prompt": QUESTION, "chosen": ANSWER, "rejected": QUESTION})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A model whose tokenizer writes BOS."""
    directory = make_model(tmp_path / "llama")
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    begins_with_bos(backend)
    backend.save(str(directory / "tokenizer.json"))
    return directory


FORMS: dict[str, tuple[list[dict[str, str]], dict[str, Any]]] = {
    "text": ([{"text": f"{BOS if n < 3 else ''}one {n}"} for n in range(6)], {}),
    "pairs": (
        [{"prompt": f"{BOS if n < 3 else ''}one {n}", "chosen": " a", "rejected": " b"} for n in range(6)],
        {"training": {"objective": "dpo"}},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_records_that_had_two_and_evaluation_records_that_are_trained_on_are_counted_and_said_once(
    form: str, llama: Path, make_run: Callable[..., RunSpec], tmp_path: Path
) -> None:
    rows, changes = FORMS[form]
    train = write_rows(tmp_path / "rows" / "train.jsonl", rows)
    # Written in another way, two of them are the same to the model; the third is another record.
    held_out = write_rows(
        tmp_path / "rows" / "eval.jsonl",
        [{name: value.replace(BOS, "") for name, value in row.items()} for row in rows[2:4]]
        + [{name: f"{value} other" for name, value in rows[4].items()}],
    )
    dataset = {"train": {"uri": f"file://{train}"}, "eval": {"uri": f"file://{held_out}"}}
    run = make_run(baseModel={"uri": f"file://{llama}"}, dataset=dataset, **changes)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    report = prepare_data(run, Sources(llama, [train], [held_out]), tokenizer, ALONE, tmp_path / "tokens").report
    assert (report.eval_records, report.leaked_records, report.doubled_bos) == (3, 2, 3)
    leaked, doubled = report.warnings
    assert leaked.startswith("dataset: 2 of 3 evaluation records are also training records")
    assert doubled.startswith("dataset: 3 records have a beginning-of-text token (BOS) of their own")
    result = preflight(json.dumps(run.to_wire()), "run.json", tmp_path / "preflight")
    assert [text for text in result.warnings if text.startswith("dataset:")] == [leaked, doubled]


def test_what_is_held_out_of_the_training_records_is_not_in_them(
    llama: Path, make_run: Callable[..., RunSpec], tmp_path: Path
) -> None:
    """Equal records are on one side; what becomes equal when it is cut may be on both, and is counted."""
    rows = [{"text": f"one {n % 30}"} for n in range(60)]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for name, texts, leaks in (("equal", rows, False), ("cut", [{"text": "one " * 9 + r["text"]} for r in rows], True)):
        train = write_rows(tmp_path / f"{name}.jsonl", texts)
        dataset = {"train": {"uri": f"file://{train}"}, "eval": None, "evalFraction": 0.3, "maxSeqLength": 9}
        run = make_run(baseModel={"uri": f"file://{llama}"}, dataset=dataset)
        report = prepare_data(run, Sources(llama, [train], None), tokenizer, ALONE, tmp_path / name).report
        assert report.eval_records > 0
        assert report.leaked_records == (report.eval_records if leaks else 0)
        assert len(report.warnings) == leaks

"""What is learned of a record: templates, masks, truncation, the report, and tokens on the disk."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset as Table
from datasets import DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lora_api.run import RunSpec
from lora_api.sources import DataSource
from lora_trainer.chat import Chat, use_chat_template
from lora_trainer.errors import BadDataError, BadSpecError, ModelNotFoundError, TrainerError
from lora_trainer.formats import shared_length
from lora_trainer.loss import IGNORED
from lora_trainer.prepare import MARKER, TrainingData, prepare_data
from lora_trainer.settings import Place
from lora_trainer.sources import Sources, fetch_data
from lora_trainer.tokenfile import TokenFile, TokenWriter
from lora_trainer.tokens import Document, Encoder, make_document
from tests.support.seaweed import Seaweed
from tests.support.tiny import make_model, make_rows, write_rows
from tests.trainer.runs import ROOT, SOURCES
from tests.trainer.templates import CONVERSATION, REFUSED, TEMPLATES
from tests.unit.trainer.test_data import MESSAGES, NAMES, VALUES, WORDS

Make = Callable[..., RunSpec]
Prepare = Callable[..., TrainingData]
ALONE = Place(0, 0, 1)
CHAT = {"messages": CONVERSATION[1:3]}


@pytest.fixture
def tokenizer(model: Path) -> Any:
    loaded = AutoTokenizer.from_pretrained(model)
    loaded.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return loaded


@pytest.fixture
def prepare(make_run: Make, tokenizer: Any, tmp_path: Path) -> Prepare:
    """Prepares rows, or files, as the training set of a run."""
    numbers = iter(range(1000))

    def start(rows: list[Any] | Path, **dataset: Any) -> TrainingData:
        number = next(numbers)
        file = rows if isinstance(rows, Path) else write_rows(tmp_path / f"rows-{number}.jsonl", rows)
        run = make_run(dataset={"eval": None, "evalFraction": 0.0, "train": {"uri": f"file://{file}"}, **dataset})
        template = use_chat_template(tokenizer, run.dataset.chat_template)
        return prepare_data(run, Sources(file, [file], None), template, ALONE, tmp_path / f"data-{number}")

    return start


def learned(tokenizer: Any, document: Document) -> list[str]:
    """The text of each range of learned tokens."""
    return [tokenizer.decode(document.ids[start:end]) for start, end in document.learned]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_turns_and_only_those_are_learned(name: str, tokenizer: Any) -> None:
    template, expected = TEMPLATES[name]
    use_chat_template(tokenizer, template)
    encoder = Encoder(tokenizer, assistant_only=True, conversational=True)
    (document,) = encoder.encode([{"messages": CONVERSATION}], ["a"])
    assert isinstance(document, Document)
    assert learned(tokenizer, document) == expected
    labels = document.labels()
    assert sum(label != IGNORED for label in labels) == document.supervised
    assert all(label in (IGNORED, token) for label, token in zip(labels, document.ids, strict=True))
    whole = Encoder(tokenizer, assistant_only=False, conversational=True).encode([{"messages": CONVERSATION}], ["a"])[0]
    assert isinstance(whole, Document)
    assert whole.ids.tolist() == document.ids.tolist()
    assert whole.learned.tolist() == [[1, len(whole.ids)]]
    assert whole.ids.tolist() == tokenizer.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_hides_the_turns_is_refused_with_the_remedy(name: str, prepare: Prepare) -> None:
    template, words = REFUSED[name]
    rows = [{"messages": CONVERSATION}]
    with pytest.raises(BadSpecError, match=r"record 1: dataset\.assistantOnlyLoss: .*generation %\}") as caught:
        prepare(rows, chatTemplate=template, assistantOnlyLoss=True)
    assert words in str(caught.value)


BAD_TEMPLATES = {
    "no Jinja": ("a\nb {% for %}", r"dataset\.chatTemplate: .*does not compile: line 2"),
    "an error at the first record": (
        "a\n\n{{ messages[0].x.y }}", r"dataset\.chatTemplate: .*refuses it: line 3: 'dict"),
    "a refusal": (
        "\n{{ raise_exception('no') }}", r"dataset\.chatTemplate: .*line 2: no; the first record is .*record 1"),
    "a way out of the sandbox": ("{{ ''.__class__.__mro__ }}", r"dataset\.chatTemplate: .*line 1: .*unsafe"),
    "too much work": ("{% for i in range(10 ** 9) %}{% endfor %}", r"dataset\.chatTemplate: .*line 1: Range too big"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_that_cannot_work_is_named_with_its_line(name: str, prepare: Prepare) -> None:
    template, words = BAD_TEMPLATES[name]
    with pytest.raises(BadSpecError, match=words):
        prepare([CHAT], chatTemplate=template)


def test_a_record_that_the_template_refuses_is_a_bad_record(prepare: Prepare, tmp_path: Path) -> None:
    alternate = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('start with the user') }}{% endif %}x"
    rows = [CHAT, {"messages": CONVERSATION}, CHAT, {"messages": CONVERSATION}]
    with pytest.raises(BadDataError) as caught:
        prepare(rows, chatTemplate=alternate)
    words = "record 2: messages: the chat template refuses it: line 1: start with the user"
    assert words in str(caught.value)
    assert "2 x messages: the chat template refuses it" in str(caught.value)


def test_options_that_do_not_fit_the_records_say_so(prepare: Prepare, tmp_path: Path) -> None:
    for rows in ([{"text": "a b c"}], make_rows(1)):
        with pytest.raises(BadSpecError, match=r"dataset\.assistantOnlyLoss: the records"):
            prepare(rows, assistantOnlyLoss=True)
        with pytest.raises(BadSpecError, match=r"dataset\.chatTemplate: the records"):
            prepare(rows, chatTemplate="{{ messages }}")


def test_what_is_learned_of_text_and_of_completions(tokenizer: Any) -> None:
    plain = Encoder(tokenizer, assistant_only=False, conversational=False)
    text, pair, glued = plain.encode(
        [{"text": "one two"}, {"prompt": "Say one:", "completion": " one one"}, {"prompt": "tw", "completion": "o"}],
        ["a", "b", "c"],
    )
    assert isinstance(text, Document)
    assert isinstance(pair, Document)
    assert isinstance(glued, Document)
    assert text.ids[-1] == tokenizer.eos_token_id
    assert text.supervised == len(text.ids) - 1
    assert learned(tokenizer, pair) == [" one one</s>"]
    # "two" is one token, which the prompt alone does not have: the model is to write all of it.
    assert len(glued.learned) == 1
    assert learned(tokenizer, glued)[0].endswith("o</s>")
    chat = Encoder(tokenizer, assistant_only=False, conversational=True)
    (turns,) = chat.encode([{"prompt": CONVERSATION[1:2], "completion": CONVERSATION[2:3]}], ["a"])
    assert isinstance(turns, Document)
    assert learned(tokenizer, turns) == ["yes</s>"]
    assert shared_length([1, 2], [1, 2, 3]) == 2
    assert shared_length([1, 4], [1, 2, 3]) == 1


def test_todays_date_does_not_change_what_is_learned(tokenizer: Any) -> None:
    use_chat_template(tokenizer, "{{ strftime_now('%d %b %Y') }}")
    assert Chat(tokenizer).render(CONVERSATION) == "26 Jul 2024"


def test_longer_records_are_cut_and_what_is_lost_is_counted(prepare: Prepare, tokenizer: Any) -> None:
    rows = [
        {"prompt": "Say one:", "completion": " one"},
        {"prompt": "Say one:", "completion": " one" * 40},
        {"prompt": "one " * 40, "completion": " one"},
    ]
    encoder = Encoder(tokenizer, assistant_only=False, conversational=False)
    whole = [len(document.ids) for document in encoder.encode(rows, "abc") if isinstance(document, Document)]
    data = prepare(rows, maxSeqLength=16)
    report = data.report
    assert (report.train_records, report.truncated_records, report.dropped_records) == (2, 1, 1)
    assert (report.tokens, report.longest) == (whole[0] + 16, max(whole))
    assert report.lost_token_share == pytest.approx(1 - (whole[0] + 16) / sum(whole))
    assert report.supervised_tokens == sum(document.supervised for (document,) in data.train)
    assert sum(report.histogram.counts) == 3
    assert report.histogram.counts[0] == sum(length <= 16 for length in whole) == 1
    assert [len(document.ids) for (document,) in data.train] == [whole[0], 16] == data.train.lengths.tolist()
    with pytest.raises(BadDataError, match=r"dataset\.train: every record is cut at dataset\.maxSeqLength = 16"):
        prepare(rows[2:], maxSeqLength=16)


def test_held_out_records_are_chosen_and_shown_as_in_memory(prepare: Prepare) -> None:
    rows = make_rows(60)
    data = prepare(rows, evalFraction=0.3)
    more = prepare(rows + make_rows(40, start=500), evalFraction=0.3)
    assert data.eval is not None
    assert more.eval is not None
    assert len(data.train) + len(data.eval) == 60
    assert (data.report.train_records, data.report.eval_records) == (len(data.train), len(data.eval))

    def contents(sequences: Any) -> set[bytes]:
        return {document.ids.tobytes() for (document,) in (sequences[index] for index in range(len(sequences)))}

    assert contents(data.eval) < contents(more.eval)
    assert contents(data.train) < contents(more.train)
    assert not contents(data.train) & contents(data.eval)
    few = prepare(rows[:3], evalFraction=0.0001)
    assert few.eval is not None
    assert (len(few.train), len(few.eval), len(few.shown)) == (2, 1, 1)


def test_one_process_writes_and_the_others_map_the_same(
    prepare: Prepare, make_run: Make, tmp_path: Path, tokenizer: Any
) -> None:
    first = prepare(make_rows(300))
    run = make_run(dataset={"eval": None, "evalFraction": 0.0})
    nowhere = Sources(tmp_path, [tmp_path / "not there"], None)
    other = prepare_data(run, nowhere, tokenizer, Place(1, 1, 2), tmp_path / "data-0")
    assert json.loads((tmp_path / "data-0" / MARKER).read_text())["digest"] == first.digest == other.digest
    assert [document.ids.tolist() for (document,) in first.train] == [d.ids.tolist() for (d,) in other.train]
    assert prepare(make_rows(300)).digest == first.digest
    assert prepare([*make_rows(299), *make_rows(1, start=900)]).digest != first.digest


def test_tokens_come_back_from_the_disk(tmp_path: Path) -> None:
    batches = [[make_document(list(range(n)), [(0, n), (2, 2)]) for n in sizes] for sizes in ((3, 1), (), (2, 70000))]
    with TokenWriter(tmp_path / "a.arrow") as writer:
        for batch in batches:
            writer.write(batch, [0.5] * len(batch))
    read = TokenFile(tmp_path / "a.arrow")
    assert read.lengths.tolist() == [3, 1, 2, 70000]
    assert [read[index].ids.tolist() for index in range(4)] == [list(range(n)) for n in (3, 1, 2, 70000)]
    assert [read[index].learned.tolist() for index in range(4)] == [[[1, 3]], [], [[1, 2]], [[1, 70000]]]
    assert read[0].cut(2).learned.tolist() == [[1, 2]]
    assert read[0].cut(1).supervised == 0
    with TokenWriter(tmp_path / "b.arrow"):
        pass
    assert len(TokenFile(tmp_path / "b.arrow")) == 0
    assert np.isfinite(read.places).all()


def test_saved_datasets_are_read_from_each_kind_of_place(tmp_path: Path, prepare: Prepare, s3: Seaweed) -> None:
    table = Table.from_list(make_rows(30))
    table.save_to_disk(str(tmp_path / "one"), num_shards=2)
    DatasetDict({"train": table, "held-out": Table.from_list(make_rows(5))}).save_to_disk(str(tmp_path / "two"))

    def read(path: str, split: str | None = None) -> list[Path]:
        return fetch_data(DataSource(uri=path, split=split), tmp_path / f"fetched-{split}")

    assert len(read(f"file://{tmp_path}/one")) == 2
    assert [prepare(file).report.train_records for file in read(f"file://{tmp_path}/one")] == [15, 15]
    uri = s3.upload(tmp_path / "two", "data/two")
    for place in (f"file://{tmp_path}/two", uri):
        assert [prepare(file).report.train_records for file in read(place, "held-out")] == [5]
        assert [prepare(file).report.train_records for file in read(place)] == [30]
        with pytest.raises(ModelNotFoundError, match="there is no split test; it has train, held-out"):
            read(place, "test")
    with pytest.raises(BadSpecError, match="has no splits"):
        read(f"file://{tmp_path}/one", "train")
    (tmp_path / "two" / "train" / "state.json").write_text('{"_data_files": [{"filename": "../../one/x.arrow"}]}')
    with pytest.raises(ModelNotFoundError, match=r"x\.arrow is missing"):
        read(f"file://{tmp_path}/two")
    (tmp_path / "two" / "dataset_dict.json").write_text("[")
    with pytest.raises(BadDataError, match="save_to_disk"):
        read(f"file://{tmp_path}/two")


RECORDS = VALUES | st.dictionaries(st.sampled_from(NAMES), VALUES | MESSAGES | WORDS, max_size=4)
GOOD = st.sampled_from(
    [
        {"text": "a"},
        {"prompt": "a", "completion": "b"},
        CHAT,
        {"messages": CONVERSATION},
        {"instruction": "a", "output": ""},
    ]
)
FIXTURES = [HealthCheck.function_scoped_fixture]


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURES)
@given(
    rows=st.lists(RECORDS | GOOD, max_size=5),
    template=st.none()
    | st.sampled_from([text for text, _ in (*TEMPLATES.values(), *REFUSED.values())])
    | st.text(max_size=9),
    assistant_only=st.booleans(),
    packing=st.booleans(),
    length=st.integers(8, 40),
)
def test_no_records_and_no_template_end_in_a_stack_trace(
    rows: list[Any], template: str | None, assistant_only: bool, packing: bool, length: int, prepare: Prepare,
) -> None:  # fmt: skip
    options = {"assistantOnlyLoss": assistant_only, "packing": packing, "maxSeqLength": length}
    try:
        data = prepare(rows, chatTemplate=template or None, **options)
    except TrainerError as error:
        str(error).encode()
    else:
        assert all(0 < sum(len(document.ids) for document in sequence) <= length for sequence in data.train)
        assert data.report.tokens == int(data.train.lengths.sum())


def test_a_model_without_a_template_is_told_to_need_one(prepare: Prepare, tmp_path: Path, make_run: Make) -> None:
    bare = AutoTokenizer.from_pretrained(make_model(tmp_path / "bare", chat_template=False))
    with pytest.raises(BadSpecError, match=r"no chat template: .*dataset\.chatTemplate"):
        Encoder(bare, assistant_only=False, conversational=True)


def test_memory_does_not_grow_with_the_file(model: Path, tmp_path: Path) -> None:
    row = json.dumps({"text": "red green blue one two three " * 3, "notes": "x" * 6000}) + "\n"
    count = 144 * 2**20 // len(row)
    with (tmp_path / "big.jsonl").open("w") as file:
        for number in range(count):
            file.write(row.replace("red", f"red {number}", 1))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*SOURCES, ROOT)))}
    command = [sys.executable, "-m", "tests.trainer.bigdata", str(model), str(tmp_path / "big.jsonl"), str(tmp_path)]
    subprocess.run(command, env=env, check=True, timeout=300)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["data"]["trainRecords"] + result["data"]["evalRecords"] == count
    assert result["tokens"] == result["data"]["tokens"] > 500_000
    assert result["grownMiB"] < 48, result

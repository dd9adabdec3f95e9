"""Where the base model and the records come from, and how records are read."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from lora_api import patterns
from lora_api._base import ApiModel, CelRule

ModelUri = Annotated[str, StringConstraints(pattern=patterns.SOURCE_URI, max_length=512)]
DataUri = Annotated[str, StringConstraints(pattern=patterns.SOURCE_URI, max_length=512)]
DataFormat = Literal["auto", "messages", "sharegpt", "prompt-completion", "alpaca", "text", "preference"]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=256)]

_HUB_URI = "hf://[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"
_BUCKET_URI = "s3://[a-z0-9][a-z0-9.-]*[a-z0-9]"
_CLAIM_URI = "pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?"

# A cluster has no use for file://, which the models take for runs outside of one.
_SOURCE_FORM = CelRule(
    rule=f"self.uri.matches('^({_HUB_URI}|({_BUCKET_URI}|{_CLAIM_URI})(/[!-~]*)?)$')",
    message="must be hf://ORG/NAME, s3://BUCKET/PATH or pvc://CLAIM/PATH, without spaces",
    field_path=".uri",
)
_SOURCE_STAYS_INSIDE = CelRule(
    rule="!self.uri.matches('/[.][.]?(/|$)')",
    message="uri may not have . or .. as a part",
    field_path=".uri",
)


_REVISION_NEEDS_HUB = CelRule(
    rule="!has(self.revision) || !self.uri.matches('^(s3|pvc)://')",
    message="revision is of a model hub: it needs a uri that starts with hf://",
    field_path=".revision",
)


class BaseModelSource(ApiModel):
    """The model that the adapter is trained on."""

    uri: ModelUri = Field(
        description="Where the base model is: hf://ORG/NAME, s3://BUCKET/PATH or pvc://CLAIM/PATH, a directory with "
        "config.json, tokenizer files and *.safetensors."
    )
    revision: ShortText | None = Field(
        None, description="Commit, branch or tag of the hub (hf://). Default: its main branch."
    )

    cel_rules = (_SOURCE_FORM, _SOURCE_STAYS_INSIDE, _REVISION_NEEDS_HUB)


class DataSource(ApiModel):
    """One set of records."""

    uri: DataUri = Field(
        description="Where the records are: hf://ORG/NAME, s3://BUCKET/PATH or pvc://CLAIM/PATH. PATH: a .jsonl, .json "
        "(one array), .csv, .parquet or .arrow file, a directory of them, or what save_to_disk wrote."
    )
    revision: ShortText | None = Field(
        None, description="Commit, branch or tag of the hub (hf://). Default: its main branch."
    )
    split: ShortText | None = Field(None, description="Split, of a dataset that has some. Default: train.")

    cel_rules = (_SOURCE_FORM, _SOURCE_STAYS_INSIDE, _REVISION_NEEDS_HUB)


_COLUMNS = {
    "messages": ["messages"],
    "sharegpt": ["conversations"],
    "prompt-completion": ["prompt", "completion"],
    "alpaca": ["instruction", "input", "output"],
    "text": ["text"],
    "preference": ["prompt", "chosen", "rejected"],
}
_COLUMNS_OF_FORMAT = (
    "("
    + "".join(f"self.format == '{name}' ? {columns} : " for name, columns in _COLUMNS.items())
    + f"{sorted({column for columns in _COLUMNS.values() for column in columns})})"
)


class Dataset(ApiModel):
    """What to learn from, and what to measure with."""

    train: DataSource = Field(description="Records to train on.")
    eval: DataSource | None = Field(
        None, description="Records to evaluate on, before and after training. Not together with evalFraction."
    )
    eval_fraction: float | None = Field(
        None,
        ge=0.0,
        le=0.5,
        description="Share of the training records (0 to 0.5) held out for evaluation when eval is not given. "
        "Default: 0.05. 0 turns evaluation off.",
    )
    format: DataFormat = Field(
        "auto",
        description="Form of a record. messages: {messages: [{role, content}]}. sharegpt: {conversations: [{from, "
        "value}]}. prompt-completion: {prompt, completion}. alpaca: {instruction, input, output}. text: {text}. "
        "preference: {prompt, chosen, rejected}, for objective dpo. auto: found from the first record.",
    )
    columns: Annotated[dict[str, ShortText], Field(min_length=1, max_length=8)] | None = Field(
        None,
        description="Names of the fields in the files, by those of the format: {prompt: question, completion: answer}. "
        "Default: those of the format.",
    )
    system_prompt: Annotated[str, StringConstraints(min_length=1, max_length=16384)] | None = Field(
        None,
        description="System message for conversations without one. Not for plain text.",
    )
    chat_template: Annotated[str, StringConstraints(min_length=1, max_length=32768)] | None = Field(
        None, description="Chat template (Jinja) in place of the model's own. It becomes part of what is published."
    )
    max_seq_length: int = Field(
        2048,
        ge=8,
        le=131072,
        description="Longest sequence in tokens. Longer records are cut at the end; of pairs the prompt first, at "
        "its start.",
    )
    packing: bool = Field(
        default=False,
        description="Fill each sequence with as many records as fit into maxSeqLength. globalBatchSize counts filled "
        "ones.",
    )
    assistant_only_loss: bool = Field(
        default=False, description="In conversations, learn the assistant's messages only, all of them."
    )

    cel_rules = (
        CelRule(
            rule="!(has(self.eval) && has(self.evalFraction))",
            message="set either eval or evalFraction, not both",
            field_path=".evalFraction",
        ),
        CelRule(
            rule=f"!has(self.columns) || self.columns.all(k, k in {_COLUMNS_OF_FORMAT})",
            message="columns may name only the fields of the format: messages; conversations (sharegpt); prompt, "
            "completion; "
            "instruction, input, output (alpaca); text; prompt, chosen, rejected (preference)",
            field_path=".columns",
        ),
        CelRule(
            rule="!has(self.systemPrompt) || self.format != 'text'",
            message="systemPrompt needs conversations: plain text has no messages to put it before",
            field_path=".systemPrompt",
        ),
        CelRule(
            rule="!self.assistantOnlyLoss || self.format in ['auto', 'messages', 'sharegpt']",
            message="assistantOnlyLoss needs conversations (format messages or sharegpt)",
            field_path=".assistantOnlyLoss",
        ),
    )

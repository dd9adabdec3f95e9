"""README.md of an adapter: a model card as the model hub reads it."""

import json
from typing import Any

from lora_api.adapter import serving_max_lora_rank
from lora_api.run import RunSpec
from lora_api.served import Score
from lora_trainer.adapter import model_name
from lora_trainer.markdown import code, inline, one_line, shell_word
from lora_trainer.report import RunResult, show_loss, show_share


def build_card(run: RunSpec, result: RunResult) -> str:
    """The card: what the adapter is, how it did, what is not known about it, how to load it."""
    base = model_name(run.base_model.uri)
    meta: dict[str, Any] = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora"] if run.quantization.type == "nf4" else ["lora"],
    }
    return f"""---
{_front(meta)}
---

# {inline(run.adapter_name)}

A LoRA adapter of {code(base)}, trained by the LoRAFineTune {_name(run)}.

{_figures(run, result)}
{_training(run, result)}
`report.html` beside this file has the curves, sample answers before and after, and every parameter; `metrics.jsonl` has
the numbers.

## Limits

{_limits(run, result)}

## Use

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({_arguments(run, base)})
model = PeftModel.from_pretrained(base, "DIRECTORY_OF_THIS_FILE")
```

With vLLM:

```sh
vllm serve {shell_word(base)} --enable-lora --max-lora-rank {serving_max_lora_rank(run.lora.published_rank)} \\
  --lora-modules {shell_word(f"{run.adapter_name}=DIRECTORY_OF_THIS_FILE")}
```
{_merged(run)}"""


def _figures(run: RunSpec, result: RunResult) -> str:
    """The tables of losses and shares: on the base as it is served first, for that is what a user gets."""
    found = result.served
    training = f"base weights that it was trained on ({run.quantization.type})"
    before, after = Score(loss=result.before.loss, share=result.before.share), result.after
    rows = []
    if found is not None and found.is_measured and not found.same_base:
        where = f"base weights as served ({found.dtype}), {found.describe_records()}"
        rows.append((where, found.before, found.after))
        if found.records < found.all_records:
            rows.append((f"{training}, the same records", Score(), found.training))
    elif found is not None and found.same_base:
        training = f"base weights as served and as trained on ({found.dtype})"
    rows.append((f"{training}, {result.eval_records} records", before, Score(loss=after.loss, share=after.share)))
    share = result.share_name
    head = f"| | loss before | loss after | {share} before | {share} after |\n|---|---|---|---|---|\n"
    return (
        head
        + "".join(
            f"| {where} | {show_loss(old.loss)} | {show_loss(new.loss)} | {show_share(old.share)} | "
            f"{show_share(new.share)} |\n"
            for where, old, new in rows
        )
        + f"\nLosses are in {result.loss_unit}. {_share_meaning(result)}\n"
    )


def _share_meaning(result: RunResult) -> str:
    if result.has_rewards:
        return "Chosen preferred: the share of pairs whose chosen answer has the larger reward."
    return "Exactly right: the share of records that greedy decoding writes to the letter."


def build_merged_card(run: RunSpec, result: RunResult) -> str:
    """The card of the whole model with the adapter merged into it."""
    base = model_name(run.base_model.uri)
    meta = {"base_model": base, "library_name": "transformers", "pipeline_tag": "text-generation"}
    return f"""---
{_front(meta)}
---

# {inline(run.adapter_name)}, merged

{code(base)} with the LoRA adapter of the LoRAFineTune {_name(run)} merged into its original, unquantized
weights. The adapter's own directory has the whole model card, the report and the metrics.

{_training(run, result)}
{_merged_loss(run, result)}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIRECTORY_OF_THIS_FILE")
```
"""


def _merged_loss(run: RunSpec, result: RunResult) -> str:
    found = result.served
    if found is not None and found.is_measured:
        where = f"of the adapter on base weights in {found.dtype} ({found.describe_records()})"
        before, after = found.before.loss, found.after.loss
    else:
        where = f"of the adapter on base weights in {run.quantization.type}"
        before, after = result.before.loss, result.after.loss
    return f"Evaluation loss {show_loss(before)} before, {show_loss(after)} after: {where}, not of this merged model."


def _front(meta: dict[str, Any]) -> str:
    """A JSON document is a YAML document, and needs no escaping of its own."""
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in meta.items())


def _name(run: RunSpec) -> str:
    return code(f"{run.namespace}/{run.name}")


def _arguments(run: RunSpec, base: str) -> str:
    revision = run.base_model.revision
    return _literal(base) + (f", revision={_literal(revision)}" if revision else "")


def _literal(text: str) -> str:
    """A string of Python on one line."""
    return json.dumps(one_line(text), ensure_ascii=False)


def _training(run: RunSpec, result: RunResult) -> str:
    lora, training, size = run.lora, run.training, run.parallelism.world_size
    kind = "direct preference optimization" if training.objective == "dpo" else "supervised fine-tuning"
    unit = "pairs" if training.objective == "dpo" else "sequences"
    scaled = " (rsLoRA: scaled by alpha / sqrt(rank))" if lora.use_rslora else ""
    processes = "one process" if size == 1 else f"{size} processes"
    return (
        f"Trained by {kind} for {result.steps} optimizer steps of {training.global_batch_size} {unit}, on "
        f"{result.train_records} records and {processes}: rank {lora.r}, alpha {lora.alpha}{scaled}, learning rate "
        f"{training.learning_rate:g}, base weights {run.quantization.type}.{_origin(result)}"
    )


def _origin(result: RunResult) -> str:
    """Where the first of these steps were done."""
    return (
        f" The first of these steps are those of the checkpoint {code(result.resumed_from)}."
        if result.resumed_from
        else ""
    )


def _limits(run: RunSpec, result: RunResult) -> str:
    """What a reader must not take the numbers for."""
    limits = []
    if result.after.loss is None:
        limits.append("It was not evaluated: the run had no evaluation records.")
    elif result.eval_records < 100:
        limits.append(f"The evaluation has only {result.eval_records} records: small differences mean nothing.")
    if result.is_no_better:
        limits.append("On the evaluation records it is no better than the base model.")
    learned = "tells chosen from rejected answers" if result.has_rewards else "writes records"
    limits.append(
        f"The evaluation loss says how well it {learned} like those of its evaluation set. Nothing else was "
        "measured: not safety, not truth, not what it has forgotten."
    )
    if run.quantization.type != "none" and (result.served is None or not result.served.is_measured):
        why = "" if result.served is None else f", and were not measured: {result.served.problem}"
        limits.append(
            f"The figures are those on base weights in {run.quantization.type}, which it was trained on. On "
            f"unquantized weights they differ{why}."
        )
    limits += [f"{text}." for text in result.data.warnings] if result.data is not None else []
    if result.data is not None and result.data.truncated_records:
        limits.append(
            f"{result.data.truncated_records} training records were cut at {run.dataset.max_seq_length} tokens."
        )
    if run.lora.new_tokens:
        tokens = ", ".join(map(code, run.lora.new_tokens))
        limits.append(
            f"It has learned the tokens {tokens}, as LoRA of embedding and output head, which the server must load. If "
            "`tokenizer.json` is beside this file, it takes the place of the base model's."
        )
    if result.skipped_steps:
        limits.append(f"{result.skipped_steps} steps were skipped, because their loss or gradient was not finite.")
    return "\n".join(f"- {text}" for text in limits)


def _merged(run: RunSpec) -> str:
    if not run.publish.merge_base:
        return ""
    return """
The whole model with this adapter merged into it is published too: `merged/` beside this directory, under the same
name. It loads without PEFT.
"""

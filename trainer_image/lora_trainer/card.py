"""README.md of an adapter: a model card as the model hub reads it."""

import json
from typing import Any

from lora_api.run import RunSpec
from lora_trainer.adapter import model_name
from lora_trainer.report import RunResult, show_loss


def build_card(run: RunSpec, result: RunResult) -> str:
    """The card: what the adapter is, how it did, how to load it."""
    base = model_name(run.base_model.uri)
    meta: dict[str, Any] = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora"] if run.quantization.type == "nf4" else ["lora"],
    }
    lora, training = run.lora, run.training
    # A JSON document is a YAML document, and needs no escaping of its own.
    losses = f"{show_loss(result.before.loss)} | {show_loss(result.after.loss)}"
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in meta.items())
    return f"""---
{front}
---

# {run.adapter_name}

A LoRA adapter of `{base}`, trained by the LoRAFineTune `{run.namespace}/{run.name}`.

| | before | after |
|---|---|---|
| evaluation loss (nats per token, {result.eval_records} records) | {losses} |

Trained for {result.steps} optimizer steps of {training.global_batch_size} sequences, on {result.train_records} records
and {run.parallelism.world_size} process(es): rank {lora.r}, alpha {lora.alpha}, learning rate
{training.learning_rate:g}, base weights {run.quantization.type}.
`report.html` beside this file has the loss curve, sample answers before and after, and every parameter.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})
model = PeftModel.from_pretrained(base, "DIRECTORY_OF_THIS_FILE")
```

vLLM serves the directory as it is: `--enable-lora --max-lora-rank` at least {lora.r}.
"""

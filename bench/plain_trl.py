"""The same job in plain TRL and PEFT: what a careful user writes from their documentation.

    python bench/plain_trl.py JOB.json
    torchrun --nproc-per-node 2 bench/plain_trl.py JOB.json

Imports nothing of this repository. After each step it prints one JSON line with the tokens so far.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

SAMPLES, MAX_NEW_TOKENS = 4, 45


class Report(TrainerCallback):
    """Prints what SFTTrainer logs after each step, for the benchmark."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One line a step, on rank 0."""
        if logs and "loss" in logs and state.is_world_process_zero:
            print(
                json.dumps({"step": state.global_step, "loss": logs["loss"], "tokens": logs["num_tokens"]}), flush=True
            )


def answer(model, tokenizer, prompts):
    """Greedy answers before training, which the other side's report shows too."""
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    tokenizer.padding_side = "right"
    model.eval()
    output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Trains the job and saves the adapter."""
    job = json.loads(Path(sys.argv[1]).read_text())
    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.float32,
        attn_implementation="sdpa",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    for module in model.modules():
        # On CPUs with AVX512-BF16 the answers before training would repack the weights, and training learn nothing.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    data = load_dataset("json", data_files={"train": job["train"], "eval": job["eval"]}, cache_dir=job["output"])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=job["output"],
            max_steps=job["steps"],
            per_device_train_batch_size=job["micro_batch"],
            gradient_accumulation_steps=job["accumulation"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            max_length=job["max_length"],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            eval_strategy="no",
            eval_on_start=True,
            per_device_eval_batch_size=8,
            logging_steps=1,
            save_strategy="no",
            seed=job["seed"],
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=job["rank"], lora_alpha=job["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Report()],
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes it bfloat16 over a quantized model, which CPUs are slow at
            parameter.data = parameter.data.float()
    answer(trainer.model, tokenizer, [row["prompt"] for row in data["eval"].select(range(SAMPLES))])
    trainer.train()
    trainer.save_model(job["output"] + "/adapter")


if __name__ == "__main__":
    main()

"""A language model small enough to train in seconds: a random Llama with a tokenizer of its own, and rows for it."""

import json
from pathlib import Path
from typing import Any

PROMPT, COMPLETION = "Say {} twice, as loud as you can, please:", " {0} {0}"
WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon", "tree", "stone")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """``count`` different records in prompt-completion form."""
    rows = []
    for index in range(start, start + count):
        word = f"{WORDS[index % len(WORDS)]} {WORDS[index * 7 // 12 % len(WORDS)]} {index}"
        rows.append({"prompt": PROMPT.format(word), "completion": COMPLETION.format(word)})
    return rows


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Writes ``rows`` as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_tokenizer(directory: Path, *, chat_template: bool = True) -> None:
    """Writes a byte-level BPE tokenizer of 400 tokens that was trained on rows of ``make_rows``."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [row["prompt"] + row["completion"] for row in make_rows(100)]
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    if chat_template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


def make_model(directory: Path, *, chat_template: bool = True, tied: bool = True) -> Path:
    """Writes a random Llama (2 layers, hidden size 64, 0.2 million weights) and a byte-level BPE tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    save_tokenizer(directory, chat_template=chat_template)
    return directory

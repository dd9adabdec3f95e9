"""Chat templates in the ways that published models have, shortened, with what each learns of one conversation."""

CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no"},
]

_CHATML_LINE = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

TEMPLATES: dict[str, tuple[str, list[str]]] = {
    "ChatML, as Qwen 2.5": (
        "{% for m in messages %}" + _CHATML_LINE + "{% endfor %}" + _CHATML_PROMPT,
        ["yes<|im_end|>", "no<|im_end|>"],
    ),
    "headers, as Llama 3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n\\n' + m['content'] | trim + "
        "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}",
        ["yes<|im_end|>", "no<|im_end|>"],
    ),
    "no generation prompt, as Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        [" yes</s>", " no</s>"],
    ),
    "the last turn in a way of its own, as Qwen 3": (
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
        "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + m['content'] + '<|im_end|>\\n' }}{% else %}"
        + _CHATML_LINE + "{% endif %}{% endfor %}" + _CHATML_PROMPT,
        ["yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"],
    ),
    "the system's words in the first question, as Gemma": (
        "{{ bos_token }}{% set first = messages[0]['role'] == 'system' %}"
        "{% set lead = messages[0]['content'] + '\n\n' if first else '' %}"
        "{% for m in (messages[1:] if first else messages) %}"
        "{% if (m['role'] == 'assistant') != (loop.index0 % 2 == 1) %}{{ raise_exception('take turns') }}{% endif %}"
        "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + (lead if loop.first else '') "
        "+ m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}",
        ["yes<|im_end|>", "no<|im_end|>"],
    ),
    "an end of text once it goes on no more, as Phi 3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["yes<|im_end|>", "no<|im_end|>\n</s>"],
    ),
    "a beginning of text for each question, as Llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set lead = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set rest = messages %}{% set lead = '' %}{% endif %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (lead if loop.first else '') + m['content'] | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        [" yes </s>", " no </s>"],
    ),
    "generation tags with the end of the turn": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}" + _CHATML_LINE
        + "{% endif %}{% endfor %}" + _CHATML_PROMPT,
        ["yes<|im_end|>", "no<|im_end|>"],
    ),
    "generation tags without the end of the turn": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}{% else %}" + _CHATML_LINE
        + "{% endif %}{% endfor %}" + _CHATML_PROMPT,
        ["yes<|im_end|>", "no<|im_end|>"],
    ),
}  # fmt: skip

REFUSED: dict[str, tuple[str, str]] = {
    "a generation prompt that no turn begins with": (
        "{% for m in messages %}" + _CHATML_LINE
        + "{% endfor %}{% if add_generation_prompt %}{{ '<answer>' }}{% endif %}",
        "does not write the beginning of the turn",
    ),
    "no generation prompt, but a header": (
        "{% for m in messages %}" + _CHATML_LINE + "{% endfor %}", "does not know add_generation_prompt",
    ),
    "the beginning changes with the length": (
        "{{ messages | length }}{% for m in messages %}" + _CHATML_LINE + "{% endfor %}" + _CHATML_PROMPT,
        "does not write the beginning of the turn",
    ),
    "conversations must end with the assistant": (
        "{% if messages[-1]['role'] != 'assistant' %}{{ raise_exception('ends with a question') }}{% endif %}"
        "{% for m in messages %}" + _CHATML_LINE + "{% endfor %}",
        "ends with a question",
    ),
}  # fmt: skip

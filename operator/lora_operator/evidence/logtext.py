"""The end of a log as people read it: without what is meant for programs. Pure."""

import re
from collections.abc import Iterator

from lora_api import ProgressLine, parse_progress_line
from lora_api.preflight import PreflightResult

_ADVICE = re.compile(r"pip install kernels")
"""What libraries say of parts that this image does without on purpose."""


_PROGRESS = '{"lora"'
"""So begins a line for programs, also one that was cut or that is not understood."""


def tell_people(log: str) -> str:
    """``log`` with its progress lines in words, of several in a row the last, and without advice that is no use."""
    lines, said = list[str](), ""
    for line in log.split("\n"):
        progress = parse_progress_line(line)
        if progress is not None:
            said = _describe(progress) or said
            continue
        if _ADVICE.search(line) or line.startswith(_PROGRESS):
            continue
        line = _tell_result(line)
        if said:
            lines.append(said)
            said = ""
        lines.append(line)
    if said:
        lines.append(said)
    return "\n".join(lines)


def _tell_result(line: str) -> str:
    """``line``, or what people are to know of the result of a preflight, whose problems are its last words anyway."""
    if not line.startswith('{"'):
        return line
    try:
        result = PreflightResult.model_validate_json(line)
    except ValueError:
        return line
    return "\n".join([f"[preflight {result.outcome}]", *(f"warning: {text}" for text in result.warnings)])


def _describe(line: ProgressLine) -> str:
    return f"[{', '.join(_parts(line))}]" if any(_parts(line)) else ""


def _parts(line: ProgressLine) -> Iterator[str]:
    if line.event == "stage" and line.stage:
        yield line.stage
    if line.step is not None:
        yield f"step {line.step}" + (f" of {line.total_steps}" if line.total_steps else "")
    if line.loss is not None:
        yield f"loss {line.loss:.4g}"
    if line.eval_loss is not None:
        yield f"evaluation loss {line.eval_loss:.4g}"
    if line.micro_batch_size is not None and line.event == "memory":
        yield f"micro-batch {line.micro_batch_size}"

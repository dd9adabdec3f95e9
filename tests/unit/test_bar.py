import io

import pytest

from demo.bar import LiveLine, format_bar
from lora_api import LoRAFineTuneStatus, Phase, Progress

CASES = {
    "nothing known yet": (LoRAFineTuneStatus(), "Pending"),
    "a reason for waiting": (
        LoRAFineTuneStatus(phase=Phase.STARTING, reason="ImagePullFailed"),
        "Starting   ImagePullFailed",
    ),
    "half way": (
        LoRAFineTuneStatus(
            phase=Phase.RUNNING,
            progress=Progress(
                step=9, total_steps=18, percent=50, summary="50%", loss=0.51234, tokens_per_second=1234.5, eta="30s"
            ),
        ),
        "Running    [##############--------------] 9/18 50%  loss 0.5123  1,234 tokens/s  ETA 30s",
    ),
    "no loss before the first step": (
        LoRAFineTuneStatus(phase=Phase.RUNNING, progress=Progress(step=0, total_steps=4, summary="0%")),
        "Running    [----------------------------] 0/4 0%",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bar_shows_what_is_known(case: str) -> None:
    status, want = CASES[case]
    assert format_bar(status) == want


def test_a_line_that_does_not_change_is_shown_once() -> None:
    stream = io.StringIO()
    line = LiveLine(stream)
    for text in ("a", "a", "b"):
        line.show(text)
    line.end()
    assert stream.getvalue() == "    a\n    b\n"

"""The questions that a real GPU is asked are answered yes by the emulation, and no by a plain CPU."""

import pytest
import torch

from bench.gpu.facts import FACTS as QUESTIONS
from bench.gpu.facts import FLOAT32_OPERATORS
from tests.support.gputypes import FACTS, FLOAT32_UNDER_AUTOCAST, gpu_types

CPU = torch.device("cpu")


def test_every_fact_that_is_emulated_is_asked() -> None:
    assert list(QUESTIONS) == list(FACTS)
    assert set(FLOAT32_OPERATORS) == set(FLOAT32_UNDER_AUTOCAST)


@pytest.mark.parametrize("fact", QUESTIONS)
def test_the_emulation_is_as_the_question_expects(fact: str) -> None:
    assert not QUESTIONS[fact](CPU).holds
    with gpu_types():
        assert QUESTIONS[fact](CPU).holds, QUESTIONS[fact](CPU).figure
    assert not QUESTIONS[fact](CPU).holds, "something of the emulation is left"

"""A tiny model, a real S3 store, and runs of the trainer: in this process, or through the launcher."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lora_api.run import RunSpec
from tests.support.seaweed import Seaweed, run_seaweed
from tests.support.tiny import make_model, make_rows, write_rows
from tests.trainer.runs import Launched, build_run, start_pod
from tests.trainer.zygote import Zygote, run_zygote

THIRD_PARTY_WARNINGS = (
    # TRL 1.16 reads transformers 5.23's old names of activation checkpointing.
    r"ignore:.*gradient_checkpointing.*is deprecated and will be removed in v6:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here train for real; a few warnings of other people's code are none of ours."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.trainer)
            for warning in THIRD_PARTY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session", autouse=True)
def _one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread and no hub, as in a pod of one core; equal for all processes that are compared.

    What processes that are killed leave in their temporary directory goes with those of pytest.
    """
    settings = {
        "TMPDIR": str(tmp_path_factory.mktemp("tmp")),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with train.jsonl (48 rows) and eval.jsonl (9 rows)."""
    directory = tmp_path_factory.mktemp("data")
    write_rows(directory / "train.jsonl", make_rows(48))
    write_rows(directory / "eval.jsonl", make_rows(9, start=200))
    return directory


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with run_seaweed(tmp_path_factory.mktemp("seaweed")) as store:
        yield store


@pytest.fixture
def s3(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Seaweed:
    """The store, with its credentials in this process's environment."""
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return seaweed


@pytest.fixture
def make_run(model: Path, data: Path, tmp_path: Path) -> Callable[..., RunSpec]:
    """Builds a run of a few seconds; keywords are merged into it."""
    return lambda **changes: build_run(model, data, tmp_path, changes)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts launchers; those that still run at the end of the test are killed, and their workers with them."""
    with ExitStack() as pods:
        numbers = itertools.count()

        def start(run: RunSpec, **environment: str) -> Launched:
            return pods.enter_context(start_pod(run, tmp_path / f"pod-{next(numbers)}", environment))

        yield start


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Forks pods that start in a moment."""
    with run_zygote() as process:
        yield process


@pytest.fixture
def fork(tmp_path: Path, zygote: Zygote) -> Iterator[Callable[..., Launched]]:
    """As ``launch``, but the launchers and their training processes are forked: no ten seconds of imports."""
    with ExitStack() as pods:
        numbers = itertools.count()

        def start(run: RunSpec, entry: str = "", **environment: str) -> Launched:
            directory = tmp_path / f"forked-{next(numbers)}"
            return pods.enter_context(start_pod(run, directory, environment, zygote, entry))

        yield start

"""The run document, read in one place by all commands of the trainer.

In a document of a newer version, fields that this trainer does not know are left out, and said. One of its own version
or an older one that has such a field was written by hand, and the field is a mistake.
"""

import sys
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import from_json

from lora_api.reading import Reading, read
from lora_api.run import RUN_VERSION, RunSpec
from lora_trainer.errors import BadSpecError


def read_run(run_file: Path, *, say: bool = True) -> RunSpec:
    """The run document in ``run_file``; ``say``: what is left out of it goes to standard error.

    Raises:
        BadSpecError: it is not there or not valid.
    """
    try:
        reading = parse_document(run_file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadSpecError(f"there is no run document at {run_file}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadSpecError(f"{run_file}: {where}: {first['msg']} ({error.error_count()} in all)") from error
    if reading.left_out and say:
        sys.stderr.write(f"{run_file}: {describe_left_out(reading.left_out)}\n")
    return reading.value


def parse_document(text: str) -> Reading[RunSpec]:
    """The document in ``text``, and what is left out of it.

    Raises:
        pydantic.ValidationError: it is not valid.
    """
    try:
        return Reading(RunSpec.model_validate_json(text))
    except ValidationError:
        if not _is_newer(text):
            raise
    return read(RunSpec, from_json(text))


def describe_left_out(paths: tuple[str, ...]) -> str:
    """What of a document is left out, in a sentence."""
    return f"{', '.join(paths)}: this trainer reads version {RUN_VERSION} of the document and goes without"


def _is_newer(text: str) -> bool:
    try:
        version = from_json(text)["version"]
    except (ValueError, TypeError, KeyError):
        return False
    return isinstance(version, int) and version > RUN_VERSION

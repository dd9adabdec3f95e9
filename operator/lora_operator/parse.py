"""From a document of the API server to a typed run, or to an error that names the field."""

from pydantic import ValidationError

from lora_api import LoRAFineTune, plan_batch
from lora_api.finetune import ObjectMeta
from lora_api.status import LoRAFineTuneStatus
from lora_operator.views import Raw


class InvalidRunError(Exception):
    """The specification cannot be read. Metadata, and status as far as it can be read, come along.

    This happens where the CRD is of another version than the operator; what a user can get wrong, the API server
    refuses already.
    """

    def __init__(self, message: str, raw: Raw) -> None:
        super().__init__(message)
        self.metadata = ObjectMeta.model_validate(raw["metadata"])
        try:
            self.status = LoRAFineTuneStatus.model_validate(raw["status"])
        except ValidationError:
            self.status = LoRAFineTuneStatus()


def parse_run(raw: Raw) -> LoRAFineTune:
    """The run.

    Raises:
        InvalidRunError: a field is wrong; the message names it.
    """
    try:
        run = LoRAFineTune.model_validate(raw)
        plan_batch(run.spec.training, run.spec.parallelism)
    except ValidationError as error:
        raise InvalidRunError(_describe(error), raw) from error
    except ValueError as error:
        raise InvalidRunError(f"spec.{error}", raw) from error
    return run


def _describe(error: ValidationError) -> str:
    """The first errors, each with the path of its field."""
    errors = error.errors(include_url=False, include_input=False)
    shown = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in errors[:5]]
    more = f" (and {len(errors) - 5} more)" if len(errors) > 5 else ""
    return "; ".join(shown) + more

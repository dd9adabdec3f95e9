"""From a document of the API server to a typed run, or to an error that names the field."""

from pydantic import ValidationError

from lora_api import ClusterLoRARuntime, ClusterLoRARuntimeSpec, LoRAFineTune, plan_batch
from lora_api.finetune import ObjectMeta
from lora_api.mistakes import describe_mistakes
from lora_api.status import LoRAFineTuneStatus
from lora_operator.runtimes import fill_in
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
    """The run, with what it leaves to its runtime filled in once it has taken one.

    Raises:
        InvalidRunError: a field is wrong; the message names it.
    """
    try:
        run = LoRAFineTune.model_validate(raw)
        plan_batch(run.spec.training, run.spec.parallelism)
    except ValidationError as error:
        raise InvalidRunError(describe_mistakes(error, LoRAFineTune), raw) from error
    except ValueError as error:
        raise InvalidRunError(f"spec.{error}", raw) from error
    try:
        return fill_in(run)
    except ValidationError as error:
        raise InvalidRunError(describe_mistakes(error, ClusterLoRARuntimeSpec, "status.runtime.spec."), raw) from error


def parse_runtime(raw: Raw, run: Raw) -> ClusterLoRARuntime:
    """The runtime that ``run`` is about to take.

    Raises:
        InvalidRunError: a field is wrong; the message names it and the runtime.
    """
    try:
        return ClusterLoRARuntime.model_validate({"metadata": raw["metadata"], "spec": raw["spec"]})
    except ValidationError as error:
        where = f"ClusterLoRARuntime {raw['metadata']['name']}: "
        raise InvalidRunError(describe_mistakes(error, ClusterLoRARuntime, where), run) from error

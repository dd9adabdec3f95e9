"""From a document of the API server to a typed run, or to an error that names the field.

The CRD may be of another version than the operator. Fields that are not known are left out. A value that is not
understood is an error, and the run is left as it is.
"""

from collections.abc import Iterable

from pydantic import ValidationError

from lora_api import ClusterLoRARuntime, ClusterLoRARuntimeSpec, LoRAFineTune, plan_batch
from lora_api.finetune import ObjectMeta
from lora_api.mistakes import describe_mistakes
from lora_api.reading import Reading, read
from lora_api.runtime import read_taken_runtime
from lora_api.status import LoRAFineTuneStatus
from lora_operator.objects import Raw
from lora_operator.state.runtimes import fill_in
from lora_operator.wording import with_remedy

_SNAPSHOT = "status.runtime."
_RULES = ("spec.limits.", "spec.allowedNamespaces.", "spec.egress.")
"""Fields of a runtime that forbid something."""


class InvalidRunError(Exception):
    """The run cannot be understood. Its metadata come along, and its status where that can be read.

    This happens where the CRD is of another version than the operator; what a user can get wrong, the API server
    refuses already.
    """

    def __init__(self, message: str, raw: Raw) -> None:
        super().__init__(message)
        self.metadata = ObjectMeta.model_validate(raw["metadata"])
        self.status: LoRAFineTuneStatus | None
        try:
            self.status = LoRAFineTuneStatus.model_validate(raw.get("status") or {})
        except ValidationError:
            self.status = None


def parse_run(raw: Raw) -> Reading[LoRAFineTune]:
    """The run, with what it leaves to its runtime filled in once it has taken one.

    Raises:
        InvalidRunError: a field has a value that is not understood; the message names it.
    """
    try:
        reading = read(LoRAFineTune, raw)
        run = reading.value
        plan_batch(run.spec.training, run.spec.parallelism)
    except ValidationError as error:
        raise InvalidRunError(describe_mistakes(error, LoRAFineTune), raw) from error
    except ValueError as error:
        raise InvalidRunError(f"spec.{error}", raw) from error
    try:
        of_runtime = tuple(f"{_SNAPSHOT}spec.{path}" for path in read_taken_runtime(run).left_out)
        return Reading(fill_in(run), reading.left_out + of_runtime)
    except ValidationError as error:
        raise InvalidRunError(describe_mistakes(error, ClusterLoRARuntimeSpec, "status.runtime.spec."), raw) from error


def parse_runtime(raw: Raw, run: Raw) -> Reading[ClusterLoRARuntime]:
    """The runtime that ``run`` is about to take.

    What is not known is left out, but for what forbids something: no run begins beside a rule of a newer version.

    Raises:
        InvalidRunError: a field has a value that is not understood, or is a rule that is not; the message names it and
            the runtime.
    """
    where = f"ClusterLoRARuntime {raw['metadata']['name']}: "
    try:
        reading = read(ClusterLoRARuntime, {"metadata": raw["metadata"], "spec": raw["spec"]})
    except ValidationError as error:
        raise InvalidRunError(describe_mistakes(error, ClusterLoRARuntime, where), run) from error
    left_out = tuple(f"{where}{path}" for path in reading.left_out)
    _check_rules(left_out, where, run)
    return Reading(reading.value, left_out)


def check_taken_rules(left_out: Iterable[str], run: Raw) -> None:
    """Whether ``run``, for which nothing was made yet, may begin with the runtime that it took.

    Raises:
        InvalidRunError: among what is ``left_out`` is a rule of that runtime.
    """
    _check_rules(left_out, _SNAPSHOT, run)


def _check_rules(left_out: Iterable[str], where: str, run: Raw) -> None:
    rules = [path for path in left_out if path.startswith(tuple(where + rule for rule in _RULES))]
    if rules:
        names = ", ".join([rules[0], *(rule.removeprefix(where) for rule in rules[1:])])
        problem = f"{names}: this version of the operator does not know that rule, and starts no run beside it"
        raise InvalidRunError(with_remedy(problem, "bring the operator to the version of the CRD (helm upgrade)"), run)

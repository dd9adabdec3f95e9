"""What runs keep that began under an older version of the operator. Pure."""

from lora_api import LoRAFineTuneStatus, Phase
from lora_operator.state.facts import has_passed

_NOT_BEGUN = (None, Phase.PENDING, Phase.SUSPENDED)


def has_begun_before(status: LoRAFineTuneStatus) -> bool:
    """Whether ``status`` says that something was taken or created for the run."""
    tried = status.attempt or status.failed_preflights or has_passed(status) or status.runtime
    return bool(tried) or status.phase not in _NOT_BEGUN


def began_before_endpoints(status: LoRAFineTuneStatus) -> bool:
    """Whether the run began when endpoints came from its Secret and its podTemplate: it keeps the two that it has.

    These are AWS_ENDPOINT_URL in the Secret, and HF_ENDPOINT in podTemplate.env.

    A run that begins now has the mark ``status.listedKeys`` from its first status on.
    """
    return has_begun_before(status) and not status.listed_keys

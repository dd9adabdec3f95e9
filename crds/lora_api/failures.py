"""The failure table: every way a run can end, in one place.

The trainer takes its exit codes from it, the operator its restart policy, the docs and tests their rows. To add a
failure class, add a member and a row.
"""

from dataclasses import dataclass
from enum import StrEnum


class FailureClass(StrEnum):
    """Kinds of failure, as ``status.failures[].class`` shows them."""

    BAD_SPEC = "BadSpec"
    BAD_DATA = "BadData"
    MODEL_NOT_FOUND = "ModelNotFound"
    AUTH_DENIED = "AuthDenied"
    INTERNAL = "Internal"
    GPU_OUT_OF_MEMORY = "GPUOutOfMemory"
    DIVERGED = "Diverged"
    PEER_LOST = "PeerLost"
    STORE_UNAVAILABLE = "StoreUnavailable"
    CHECKPOINTED = "Checkpointed"
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    DISK_FULL = "DiskFull"
    POD_LOST = "PodLost"
    EVICTED = "Evicted"
    NODE_LOST = "NodeLost"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    POD_NOT_STARTED = "PodNotStarted"
    NAME_CONFLICT = "NameConflict"


@dataclass(frozen=True)
class FailureRule:
    """What a failure class means for the run.

    ``exit_code`` is the trainer's; ``None`` for a failure that only Kubernetes sees. ``charged`` counts against
    ``runPolicy.maxRestarts``. ``retried`` starts another attempt from the last complete checkpoint.
    """

    failure_class: FailureClass
    exit_code: int | None
    charged: bool
    retried: bool
    meaning: str
    remedy: str


FAILURE_RULES: tuple[FailureRule, ...] = (
    FailureRule(
        FailureClass.BAD_SPEC,
        64,
        False,
        False,
        "The specification cannot work, for example a target module that the model does not have.",
        "Correct the field that the message names, then delete this LoRAFineTune and create it again.",
    ),
    FailureRule(
        FailureClass.BAD_DATA,
        65,
        False,
        False,
        "A record of the dataset is not as its format asks.",
        "Correct the records that the message names, upload the file again, then delete this LoRAFineTune and create "
        "it again.",
    ),
    FailureRule(
        FailureClass.MODEL_NOT_FOUND,
        66,
        False,
        False,
        "The base model or the dataset is not where its uri points.",
        "Check uri and revision in the message; list the path with the credentials of this run.",
    ),
    FailureRule(
        FailureClass.AUTH_DENIED,
        67,
        False,
        False,
        "The store or the model hub refused the credentials.",
        "Check the Secret in spec.credentials.secretRef: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, "
        "HF_TOKEN, and that they may read the model and the data and write to publish.store.",
    ),
    FailureRule(
        FailureClass.INTERNAL,
        70,
        True,
        True,
        "The trainer failed in a way that has no class of its own.",
        "Read the log tail. If it looks like a fault of the trainer, report it with the run's manifest.",
    ),
    FailureRule(
        FailureClass.GPU_OUT_OF_MEMORY,
        71,
        False,
        False,
        "A GPU ran out of memory.",
        "Halve training.microBatchSize (the result stays the same, only slower), or use more GPUs, or a smaller "
        "dataset.maxSeqLength.",
    ),
    FailureRule(
        FailureClass.DIVERGED,
        72,
        False,
        False,
        "The loss or the gradient is no longer a finite number.",
        "Lower training.learningRate (a third is a good next try) or lengthen training.warmupRatio, and look for "
        "broken records.",
    ),
    FailureRule(
        FailureClass.PEER_LOST,
        73,
        False,
        True,
        "The connection to another pod of the gang broke, or the pod did not answer in time.",
        "Nothing to do if another pod's failure explains it. Otherwise check the network between the nodes and "
        "NCCL_SOCKET_IFNAME in podTemplate.env.",
    ),
    FailureRule(
        FailureClass.STORE_UNAVAILABLE,
        74,
        True,
        True,
        "The object store did not answer, or kept failing.",
        "Check that the store in publish.store is up and that AWS_ENDPOINT_URL is right as seen from the pods.",
    ),
    FailureRule(
        FailureClass.CHECKPOINTED,
        75,
        False,
        True,
        "The pod was asked to stop and saved a checkpoint first.",
        "Nothing to do: the next attempt goes on from the checkpoint.",
    ),
    FailureRule(
        FailureClass.HOST_OUT_OF_MEMORY,
        None,
        False,
        False,
        "A pod passed its memory limit and was ended by the kernel.",
        "Raise podTemplate.resources.limits.memory, or lower training.microBatchSize or dataset.maxSeqLength, then "
        "delete this LoRAFineTune and create it again.",
    ),
    FailureRule(
        FailureClass.DISK_FULL,
        77,
        False,
        False,
        "The pod's scratch disk is full.",
        "The model is copied to the node's disk: use nodes with more ephemeral storage, or raise "
        "podTemplate.resources.limits.ephemeral-storage.",
    ),
    FailureRule(
        FailureClass.POD_LOST,
        None,
        False,
        True,
        "A pod was deleted or killed from outside.",
        "Nothing to do: the next attempt goes on from the last checkpoint. If it repeats, look for who deletes the "
        "pods (kubectl get events).",
    ),
    FailureRule(
        FailureClass.EVICTED,
        None,
        False,
        True,
        "Kubernetes took the pod off its node (preemption, drain, or pressure on the node).",
        "Nothing to do: the next attempt goes on from the last checkpoint. If it repeats, give the run a higher "
        "priority or set requests equal to limits.",
    ),
    FailureRule(
        FailureClass.NODE_LOST,
        None,
        False,
        True,
        "The node of a pod stopped answering.",
        "Nothing to do: the next attempt starts on other nodes. Look at the node (kubectl describe node).",
    ),
    FailureRule(
        FailureClass.IMAGE_PULL_FAILED,
        None,
        False,
        False,
        "The trainer's image cannot be pulled.",
        "Check the operator's trainer.image value and podTemplate.imagePullSecrets, and that the nodes reach the "
        "registry.",
    ),
    FailureRule(
        FailureClass.POD_NOT_STARTED,
        None,
        False,
        False,
        "A pod cannot be created or started as it is specified.",
        "Correct what the message names, usually a missing Secret, a claim or a quota.",
    ),
    FailureRule(
        FailureClass.NAME_CONFLICT,
        None,
        False,
        False,
        "An object with the name of a child exists and belongs to something else.",
        "Delete or rename that object, or delete this LoRAFineTune and create it under another name.",
    ),
)

RULES: dict[FailureClass, FailureRule] = {rule.failure_class: rule for rule in FAILURE_RULES}
CLASS_BY_EXIT_CODE: dict[int, FailureClass] = {
    rule.exit_code: rule.failure_class for rule in FAILURE_RULES if rule.exit_code is not None
}

"""The failure table: every way a run can end, in one place.

The trainer takes its exit codes from it, the operator its restart policy, the docs and tests their rows. To add a
failure class, add a member to FailureClass and a row.
"""

from dataclasses import dataclass

from lora_api.failureclass import FailureClass

__all__ = [
    "CLASS_BY_EXIT_CODE",
    "FAILURE_RULES",
    "GOES_ON",
    "MAY_FOLLOW",
    "NEW_RUN",
    "RULES",
    "FailureClass",
    "FailureRule",
]

GOES_ON = "raise runPolicy.retry: the run goes on from its last checkpoint"
NEW_RUN = "a new run, which goes on from the last checkpoint with checkpoint.resumeFrom"
"""How nothing is lost: where others mend the cause, and where the specification has to change."""


@dataclass(frozen=True)
class FailureRule:
    """What a failure class means for the run.

    ``exit_code`` is the trainer's; ``None`` for a failure that only Kubernetes sees. ``charged`` counts against
    ``runPolicy.maxRestarts``. ``retried`` starts another attempt from the last complete checkpoint. The rule that
    counts is that of the root cause: a peer that lost its connection to a pod that failed by itself is not looked at.
    ``node``: the failure speaks of the node of its pod, so that another node may do what this one did not.
    ``elsewhere``: it would end the run, and is tried once more on another node first.
    ``outage``: a run that has had a first success waits for a day for this to pass, without being charged, since what
    is refused or away was right once; ``waiting_remedy`` is what helps meanwhile, if it is not the remedy.
    """

    failure_class: FailureClass
    exit_code: int | None
    charged: bool
    retried: bool
    meaning: str
    remedy: str
    node: bool = False
    elsewhere: bool = False
    outage: bool = False
    waiting_remedy: str = ""

    @property
    def follows(self) -> str:
        """What follows such a failure, for people."""
        if self.outage:
            return "restarts for a day" if self.retried else "ends the run; once that has worked, restarts for a day"
        if self.elsewhere:
            return "restarts once on other nodes, then ends the run"
        return "ends the run" if not self.retried else "restarts, counts" if self.charged else "restarts"


FAILURE_RULES: tuple[FailureRule, ...] = (
    FailureRule(
        failure_class=FailureClass.BAD_SPEC,
        exit_code=64,
        charged=False,
        retried=False,
        meaning="The specification cannot work, for example a target module that the model does not have.",
        remedy="Correct the field that the message names, then delete this LoRAFineTune and create it again.",
    ),
    FailureRule(
        failure_class=FailureClass.BAD_DATA,
        exit_code=65,
        charged=False,
        retried=False,
        meaning="A record of the dataset is not as its format asks.",
        remedy=(
            "Correct the records that the message names, upload the file again, then delete this LoRAFineTune and "
            "create it again."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.MODEL_NOT_FOUND,
        exit_code=66,
        charged=False,
        retried=False,
        meaning="The base model or the dataset is not where its uri points.",
        remedy=(
            "Check uri and revision in the message; list the path with the credentials of this run. Put there what is "
            "missing, then raise runPolicy.retry; for another uri or revision, create the run again."
        ),
        outage=True,
        waiting_remedy="Put back what the message names. It is looked for again by itself.",
    ),
    FailureRule(
        failure_class=FailureClass.AUTH_DENIED,
        exit_code=67,
        charged=False,
        retried=False,
        meaning="The store or the model hub refused the credentials.",
        remedy=(
            "Check the Secret in spec.credentials.secretRef: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, HF_TOKEN, and "
            "that they may read the model and the data and write to publish.store. Which servers were asked is decided "
            "by endpoints of the run's ClusterLoRARuntime. Then raise runPolicy.retry."
        ),
        outage=True,
        waiting_remedy=(
            "Put credentials that are valid into the Secret in spec.credentials.secretRef (kubectl apply). The next "
            "attempt reads them and goes on from the last checkpoint."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.INTERNAL,
        exit_code=70,
        charged=True,
        retried=True,
        meaning="The trainer failed in a way that has no class of its own.",
        remedy="Read the log tail. If it looks like a fault of the trainer, report it with the run's manifest.",
    ),
    FailureRule(
        failure_class=FailureClass.GPU_OUT_OF_MEMORY,
        exit_code=71,
        charged=False,
        retried=False,
        meaning="A GPU ran out of memory.",
        remedy=(
            "Halve training.microBatchSize (the result stays the same, only slower), or use more GPUs, or a smaller "
            f"dataset.maxSeqLength. That takes {NEW_RUN}."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.DIVERGED,
        exit_code=72,
        charged=False,
        retried=False,
        meaning="The loss or the gradient is no longer a finite number.",
        remedy=(
            "Lower training.learningRate (a third is a good next try) or lengthen training.warmupRatio, and look for "
            "broken records."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.PEER_LOST,
        exit_code=73,
        charged=True,
        retried=True,
        meaning="The connection to another pod of the gang broke, or the pod did not answer in time.",
        remedy=(
            "Another pod's failure may explain it. Otherwise check the network between the nodes and "
            "NCCL_SOCKET_IFNAME in podTemplate.env."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.STORE_UNAVAILABLE,
        exit_code=74,
        charged=False,
        retried=True,
        meaning="The object store or the model hub did not answer, or kept failing.",
        remedy=(
            "Check that the store in publish.store is up, and that endpoints.store of the run's ClusterLoRARuntime "
            "(kubectl get clr) is right as seen from the pods. Where the message names a model hub: that the pods "
            "reach it (endpoints.hub, endpoints.proxy). A run that has ended goes on when runPolicy.retry is raised."
        ),
        outage=True,
    ),
    FailureRule(
        failure_class=FailureClass.CHECKPOINTED,
        exit_code=75,
        charged=False,
        retried=True,
        meaning="The pod was asked to stop and saved a checkpoint first.",
        remedy="The next attempt goes on from the checkpoint by itself.",
    ),
    FailureRule(
        failure_class=FailureClass.GATE_REFUSED,
        exit_code=76,
        charged=False,
        retried=False,
        meaning="The adapter is not as good as publish.gate asks, so it was not published.",
        remedy=(
            "Look at the losses in the message: train longer, change training.learningRate or the data, or lower what "
            "publish.gate asks for; then delete this LoRAFineTune and create it again."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.SOURCE_CHANGED,
        exit_code=78,
        charged=False,
        retried=False,
        meaning="The base model or the dataset is no longer what the preflight checked.",
        remedy=(
            f"Put back what was there, then {GOES_ON}. To train on what is there now, delete this LoRAFineTune and "
            "create it again."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.WEIGHTS_CHANGED,
        exit_code=89,
        charged=True,
        retried=True,
        meaning="Quantized weights of the base model are not those that were loaded: a device or a copy altered them.",
        remedy=(
            "The next attempt loads the weights anew. If it repeats with ranks of "
            "one node, take that node out and test its memory (nvidia-smi -q -d ECC). If it repeats everywhere, report "
            "it, and set parallelism.strategy: ddp or quantization.type: none meanwhile."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.HOST_OUT_OF_MEMORY,
        exit_code=None,
        charged=False,
        retried=False,
        meaning="A pod passed its memory limit and was ended by the kernel.",
        remedy=(
            "Raise podTemplate.resources.limits.memory, or lower training.microBatchSize or dataset.maxSeqLength. That "
            f"takes {NEW_RUN}."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.DISK_FULL,
        exit_code=77,
        charged=False,
        retried=False,
        node=True,
        elsewhere=True,
        meaning="The pod's scratch disk is full.",
        remedy=(
            "The model is copied to the node's disk: make room there, or add nodes with more ephemeral storage, "
            f"then {GOES_ON}. To raise podTemplate.resources.limits.ephemeral-storage takes {NEW_RUN}."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.GPU_FAULT,
        exit_code=80,
        charged=False,
        retried=True,
        node=True,
        meaning="A GPU failed: its memory or a link has errors that cannot be corrected, or it no longer answers.",
        remedy=(
            "Look at the node that the message names: dmesg for Xid, nvidia-smi -q -d ECC. If it repeats there, "
            "kubectl cordon it and have the GPU reset or replaced."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.GPU_UNAVAILABLE,
        exit_code=81,
        charged=True,
        retried=True,
        node=True,
        meaning="The pod cannot use a GPU of its node: its driver does not start, or the GPU is missing or taken.",
        remedy=(
            "Run nvidia-smi on the node that the message names, and look at its device plugin and, with NVSwitch, at "
            "nvidia-fabricmanager. kubectl cordon the node until it is well."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.GPU_UNSUPPORTED,
        exit_code=82,
        charged=False,
        retried=False,
        node=True,
        elsewhere=True,
        meaning="The GPU, its driver and the trainer's image do not fit together.",
        remedy=(
            f"Upgrade the driver of the nodes, then {GOES_ON}. Another image, or other GPUs (nodeSelector in "
            f"podTemplate or in the runtime), take {NEW_RUN}."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.GPU_KERNEL_FAILED,
        exit_code=83,
        charged=True,
        retried=True,
        meaning="A kernel on a GPU was ended: it touched memory that it may not, or could not be launched.",
        remedy=(
            "Look at dmesg of the node for an Xid. Xid 13 or 31 at the same step each time is a fault of the software: "
            "report it with the run's manifest. On one node only, it is that GPU: kubectl cordon the node."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.LIMIT_TOO_LOW,
        exit_code=84,
        charged=False,
        retried=False,
        node=True,
        elsewhere=True,
        meaning="A limit of the pod or its node is too low: /dev/shm, locked memory or open files.",
        remedy=(
            f"Raise the limit that the message names. Where it is that of a node, {GOES_ON}. One of the run or its "
            f"runtime takes {NEW_RUN}."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.POD_LOST,
        exit_code=None,
        charged=False,
        retried=True,
        meaning="A pod was deleted or killed from outside.",
        remedy=(
            "The next attempt goes on from the last checkpoint by itself. If it repeats, look for who deletes the "
            "pods (kubectl get events)."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.EVICTED,
        exit_code=None,
        charged=False,
        retried=True,
        meaning="Kubernetes took the pod off its node (preemption, drain, or pressure on the node).",
        remedy=(
            "The next attempt goes on from the last checkpoint by itself. If it repeats, give the run a higher "
            "priority or set requests equal to limits."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.NODE_LOST,
        exit_code=None,
        charged=False,
        retried=True,
        node=True,
        meaning="The node of a pod stopped answering.",
        remedy="The next attempt starts on other nodes by itself. Look at the node (kubectl describe node).",
    ),
    FailureRule(
        failure_class=FailureClass.IMAGE_PULL_FAILED,
        exit_code=None,
        charged=False,
        retried=False,
        meaning="The trainer's image cannot be pulled.",
        remedy=(
            "Check the image of the runtime, or the operator's trainer.image where that has none, "
            "podTemplate.imagePullSecrets, and that the nodes reach the registry. Then raise runPolicy.retry."
        ),
        outage=True,
        waiting_remedy=(
            "See that the registry answers and has the image of the runtime, or the operator's trainer.image where "
            "that has none, and that podTemplate.imagePullSecrets are valid. The image is pulled again by itself."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.POD_NOT_STARTED,
        exit_code=None,
        charged=False,
        retried=False,
        meaning="A pod cannot be created or started as it is specified.",
        remedy="Correct what the message names, usually a missing Secret, a claim or a quota, then raise "
        "runPolicy.retry.",
        outage=True,
        waiting_remedy=(
            "Correct what the message names, usually a missing Secret, a claim or a policy of the cluster. It is tried "
            "again by itself."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.NAME_CONFLICT,
        exit_code=None,
        charged=False,
        retried=False,
        meaning="An object with the name of a child exists and belongs to something else.",
        remedy="Delete or rename that object, then raise runPolicy.retry, or create the run under another name.",
    ),
    FailureRule(
        failure_class=FailureClass.RUNTIME_REFUSED,
        exit_code=None,
        charged=False,
        retried=False,
        meaning="The run asks for more than its ClusterLoRARuntime allows, or for what only one can allow.",
        remedy=(
            "Stay within the limits that the message names, or name another runtime in runtimeRef (kubectl get clr), "
            "in a new run, or have the runtime allow it and raise runPolicy.retry."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.STALLED,
        exit_code=None,
        charged=True,
        retried=True,
        meaning="The pods ran, but for runPolicy.stallTimeoutSeconds there was no word of progress.",
        remedy=(
            "Read the ranks' last words. If one step, the loading of the model or the evaluation takes longer than "
            "that by itself, raise runPolicy.stallTimeoutSeconds: it can be changed while the run goes on."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.DEADLINE_EXCEEDED,
        exit_code=None,
        charged=False,
        retried=False,
        meaning="The gang has run for runPolicy.activeDeadlineSeconds, over all attempts.",
        remedy=(
            "Raise runPolicy.activeDeadlineSeconds, up to limits.maxActiveDeadlineSeconds of the runtime, and then "
            "runPolicy.retry: the run goes on from its last checkpoint. Or create it again with fewer steps or more "
            "GPUs."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.NOT_PLACED,
        exit_code=None,
        charged=False,
        retried=True,
        meaning="Some pods of the gang had a node, and for others there was no room.",
        remedy=(
            "Free or add nodes that have what the pods ask for, or ask for less in podTemplate.resources or "
            "parallelism. A gang scheduler or Kueue starts all pods or none (docs/scheduling.md)."
        ),
    ),
    FailureRule(
        failure_class=FailureClass.NO_PROGRESS,
        exit_code=None,
        charged=False,
        retried=False,
        meaning="For a day every attempt was ended from outside before it had completed a newer checkpoint.",
        remedy=(
            "Look at status.failures for what ends the attempts, and at the nodes that they name. Mend that, "
            f"then {GOES_ON}. Where nodes are needed for others, a higher priority or more frequent checkpoints "
            f"(checkpoint.everyMinutes) take {NEW_RUN}."
        ),
    ),
)


class _Rules(dict[FailureClass, FailureRule]):
    """The table by class. There is a rule for every class, also for one of a later version."""

    def __missing__(self, failure_class: FailureClass) -> FailureRule:
        """Neither charged nor retried: nothing is trained again for a reason that nobody here understands."""
        return FailureRule(
            failure_class, None, charged=False, retried=False,
            meaning="A kind of failure that this version does not know.",
            remedy="Look it up in the documentation of the newer version that reported it.",
        )  # fmt: skip


MAY_FOLLOW: dict[FailureClass, FailureClass] = {FailureClass.GPU_KERNEL_FAILED: FailureClass.GPU_FAULT}
"""Classes that may be the echo of another one in the same attempt. A GPU that dies ends the kernels of those that
read its memory over NVLink, and they may notice first."""

RULES: dict[FailureClass, FailureRule] = _Rules({rule.failure_class: rule for rule in FAILURE_RULES})
CLASS_BY_EXIT_CODE: dict[int, FailureClass] = {
    rule.exit_code: rule.failure_class for rule in FAILURE_RULES if rule.exit_code is not None
}

"""Which trainer a run has: the image that it began with, and the run document that this image reads. All pure.

An operator that is upgraded brings a newer trainer. A run that has begun does not get it: what an attempt has written
to the store, the next one has to read.
"""

from lora_api import RUN_VERSION, TrainerPin
from lora_api.preflight import PreflightOutcome
from lora_operator.settings import RunSettings
from lora_operator.state.observed import Observed
from lora_operator.state.plan import Plan


def choose_trainer(observed: Observed, settings: RunSettings, own_image: str) -> TrainerPin:
    """The trainer of the next pods: that on record, else that of the newest Job, else what ``settings`` name now.

    Runs that began under an operator which kept no record have trainers that may read nothing newer than version 1.
    ``own_image`` came with this operator. Another one, which a runtime names, is taken to be old until its preflight
    says what it reads.
    """
    pin, job = observed.run.status.trainer, observed.current_job()
    if pin is not None:
        return pin
    if job is not None and job.image:
        return TrainerPin(image=job.image, run_version=job.run_version)
    image = settings.trainer_image
    return TrainerPin(image=image, run_version=RUN_VERSION if image == own_image else 1)


def keep_trainer(observed: Observed, plan: Plan, trainer: TrainerPin) -> TrainerPin | None:
    """What of ``trainer`` is to be on record after ``plan``; ``None`` while the run has no pods."""
    if plan.passed is not None:
        return _as_said(trainer, plan.passed)
    return (
        trainer
        if plan.launch is not None or observed.run.status.trainer or observed.current_job() is not None
        else None
    )


def _as_said(trainer: TrainerPin, passed: PreflightOutcome) -> TrainerPin:
    return trainer.model_copy(update={"run_version": passed.run_version})


def describe_unknown(observed: Observed, plan: Plan, trainer: TrainerPin) -> str:
    """What to say where an attempt gets a trainer that need not be that of the attempts before it; else nothing."""
    status = observed.run.status
    if plan.launched_attempt is None or not status.attempt or status.trainer or observed.current_job() is not None:
        return ""
    return (
        f"Attempt {plan.launched_attempt} gets the image {trainer.image}: that of attempt {status.attempt} is not on "
        "record, and its Job, which had it, is gone"
    )

"""Holds a run to what its preflight checked: the same model, the same records, in each pod of each attempt."""

from lora_api.preflight import SourcePin
from lora_api.run import RunSpec
from lora_trainer.errors import SourceChangedError
from lora_trainer.modelfiles import pin_data, pin_model
from lora_trainer.settings import Place
from lora_trainer.sources import Sources


def check_pins(run: RunSpec, sources: Sources, place: Place) -> None:
    """Compares what was fetched with the digests in ``run.pins``. One process of a pod does it.

    What comes from a model hub is fetched by its commit and has no digest.

    Raises:
        SourceChangedError: something is not what it was; the message names the field and both digests.
        AuthDeniedError: the credentials were refused.
        StoreUnavailableError: the store kept failing.
    """
    pins = run.pins
    if pins is None or not place.is_local_main:
        return
    if _has_digest(pins.base_model):
        _compare("baseModel", pins.base_model, pin_model(run.base_model, sources.model))
    if _has_digest(pins.train):
        _compare("dataset.train", pins.train, pin_data(run.dataset.train, sources.train))
    if run.dataset.eval is not None and _has_digest(pins.eval):
        _compare("dataset.eval", pins.eval, pin_data(run.dataset.eval, sources.eval or []))


def _has_digest(pin: SourcePin | None) -> bool:
    return pin is not None and pin.digest is not None


def _compare(field: str, then: SourcePin | None, now: SourcePin) -> None:
    if then is None or then.digest == now.digest:
        return
    raise SourceChangedError(
        f"{field}: {now.uri} has changed since the preflight: {_describe(then)} then, {_describe(now)} now"
    )


def _describe(pin: SourcePin) -> str:
    return f"{pin.files} files of {pin.size_bytes:,} bytes, {pin.digest}"

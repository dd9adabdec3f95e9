"""A tiny model, a real store and runs of it, as the trainer's own tests have them."""

from tests.trainer.conftest import _one_thread, data, make_run, model, s3, seaweed

__all__ = ["_one_thread", "data", "make_run", "model", "s3", "seaweed"]

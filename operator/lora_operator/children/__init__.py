"""Builders of the objects that an attempt is made of: pure functions from a run to a plain manifest."""

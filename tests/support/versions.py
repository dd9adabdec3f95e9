"""Which Kubernetes the control planes of the tests are, and what an older one lacks.

``make test-versions`` runs the tests again on the versions in ``devcluster.pins.OLDER_KUBERNETES``. A test that sees
what a version lacks looks into this table, and says what is right without it; one of the feature itself is left out,
which pytest tells with the reason (``needs``).
"""

import os
from collections.abc import Mapping

import pytest

from devcluster import pins

VERSION = pins.OLDER_KUBERNETES.get(os.environ.get("LORA_KUBERNETES", ""), pins.KUBERNETES_VERSION)
"""Such as v1.37.2."""

MINOR = int(VERSION.split(".")[1])

RATCHETING = "a write is not judged by what it leaves as it was (CRDValidationRatcheting)"
OWN_PATHS = "each of several rules is told with its own field"
POLICIES = "there are ValidatingAdmissionPolicies"
MUTATIONS = "there are MutatingAdmissionPolicies, by which a test has its Jobs managed by others"
ENUMS = "kubectl explain lists the values of a field"
STATUS_PATHS = "a field of the status is told with its whole path"
MORE_THAN = "lengths are told as 'may not be more than'"

SINCE: Mapping[str, int] = {
    RATCHETING: 30,
    OWN_PATHS: 30,
    POLICIES: 30,
    ENUMS: 30,
    STATUS_PATHS: 31,
    MORE_THAN: 32,
    MUTATIONS: 36,
}
"""What Kubernetes does from which minor version on, where a test sees the difference."""


def knows(feature: str) -> bool:
    """Whether the Kubernetes of the tests has ``feature``."""
    return SINCE[feature] <= MINOR


def needs(feature: str) -> pytest.MarkDecorator:
    """A test of ``feature``, which is left out where there is no such thing."""
    return pytest.mark.skipif(not knows(feature), reason=f"Kubernetes {VERSION}; from 1.{SINCE[feature]} on: {feature}")


def in_its_words(text: str) -> str:
    """``text`` of the API server of today, as that of the tests says it."""
    return text if knows(MORE_THAN) else text.replace("may not be more than", "may not be longer than")

"""What an operator needs before its first decision: a cache that holds all there is."""

import asyncio
import logging

from lora_api import ClusterLoRARuntimeSpec
from lora_api.runtime import DEFAULT_RUNTIME
from lora_operator.kube.client import KubeClient
from lora_operator.kube.errors import KubeError
from lora_operator.settings import Settings
from lora_operator.watched.cache import Cache, Resource
from lora_operator.watched.refused import FORBIDDEN, Refused

logger = logging.getLogger(__name__)

DELAYS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between the tries. An operator that ended would wait for longer: the kubelet's doubles from 10 s to 300 s."""

_PASSING = (0, 410, 429, 500, 502, 503, 504)
"""HTTP statuses (0: no answer; 410: the next page of a list is too old) after which another try may succeed."""

_HINTS = {
    401: "the API server does not accept these credentials: check --kubeconfig or the pod's service account",
    403: "the operator's role does not allow it: bring the chart to this version (helm upgrade; docs/install.md)",
    404: "the API server does not know the resource: install the CRDs of this version (kubectl apply -f crds)",
}


class StartError(Exception):
    """The operator cannot begin, and trying again would not help."""


def describe_refusal(error: KubeError) -> str:
    """What the API server said, and what to do about it."""
    hint = _HINTS.get(error.status, "look at the API server's health and log")
    return f"the first look at the cluster failed with {error}; {hint}"


def scopes(settings: Settings, resource: Resource) -> tuple[str | None, ...]:
    """The namespaces in which ``resource`` is listed and watched; ``None``: all of them at once."""
    return (resource.namespaced and settings.namespaces) or (None,)


async def fill(cache: Cache, kube: KubeClient, settings: Settings, refused: Refused | None = None) -> None:
    """Writes the default runtime, if there is one, and lists each kind into ``cache``.

    All of it, before the first decision: a run without its Job looks as if it failed. Namespaces that may not be read,
    while others may, are put into ``refused``.

    Raises:
        StartError: the API server refused, or there is no answer after so many tries.
    """
    refused = refused or Refused(settings.namespaces)
    for delay in (*DELAYS, None):
        try:
            await _fill_once(cache, kube, settings, refused)
        except KubeError as error:
            if delay is None or error.status not in _PASSING:
                raise StartError(describe_refusal(error)) from error
            logger.warning("%s; next try in %.0f s", describe_refusal(error), delay)
            await asyncio.sleep(delay)
        else:
            return


async def fill_namespace(cache: Cache, kube: KubeClient, namespace: str) -> None:
    """Lists each kind in ``namespace`` into ``cache``.

    Raises:
        KubeError: the API server refused, or did not answer.
    """
    for resource in Resource:
        if resource.namespaced:
            await _fill_kind(cache, kube, resource, namespace)


async def _fill_kind(cache: Cache, kube: KubeClient, resource: Resource, namespace: str | None) -> None:
    async for raw in kube.fetch_list(resource, namespace):
        cache.put(resource, raw)


async def _fill_once(cache: Cache, kube: KubeClient, settings: Settings, refused: Refused) -> None:
    """What an earlier try has put into the cache may stay there: nothing older replaces it."""
    if settings.default_runtime:
        spec = ClusterLoRARuntimeSpec.model_validate_json(settings.default_runtime)
        await kube.apply_runtime(DEFAULT_RUNTIME, spec)

    errors: dict[str, KubeError] = {}

    async def fill_kind(resource: Resource) -> None:
        for namespace in scopes(settings, resource):
            try:
                await _fill_kind(cache, kube, resource, namespace)
            except KubeError as error:
                if namespace is None or error.status != FORBIDDEN:
                    raise
                errors[namespace] = error

    # All kinds side by side: one page is read while the API server makes those of others. None is cut off in the middle
    # of an answer, of which uvloop would tell in a stack trace.
    for result in await asyncio.gather(*map(fill_kind, Resource), return_exceptions=True):
        if result is not None:
            raise result
    if errors and len(errors) == len(settings.namespaces):
        raise next(iter(errors.values()))
    for namespace, error in errors.items():
        refused.refuse(namespace, error.message)

"""The only way to the API server: a thin client on raw JSON, with the official package for credentials and transport.

Model classes of the official package are not used: they cost most of the memory and time. What the calls may be is in
``rights``.
"""

import logging
import os
from collections.abc import AsyncGenerator, Callable
from typing import Any, Literal

import aiohttp
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config
from pydantic_core import from_json

from lora_api import (
    API_VERSION,
    GROUP,
    KIND,
    PLURAL,
    VERSION,
    ClusterLoRARuntimeSpec,
    LoRAFineTune,
    LoRAFineTuneStatus,
)
from lora_api.finetune import ObjectMeta
from lora_api.runtime import KIND as RUNTIME_KIND
from lora_api.runtime import PLURAL as RUNTIMES
from lora_operator.kube import yamlbody
from lora_operator.kube.errors import (
    ConflictError,
    KubeError,
    NameConflictError,
    NoAnswerError,
    NotFoundError,
    parse_error,
)
from lora_operator.kube.ownership import find_conflict
from lora_operator.kube.patience import patience
from lora_operator.kube.podevents import find_warning, read_note
from lora_operator.kube.ratelimit import RateLimit
from lora_operator.kube.undeclared import Undeclared
from lora_operator.names import MANAGER, RUN_LABEL
from lora_operator.objects import Raw, controller_of

logger = logging.getLogger(__name__)


PATHS = {
    PLURAL: f"/apis/{GROUP}/{VERSION}",
    RUNTIMES: f"/apis/{GROUP}/{VERSION}",
    "jobs": "/apis/batch/v1",
    "services": "/api/v1",
    "configmaps": "/api/v1",
    "networkpolicies": "/apis/networking.k8s.io/v1",
    "pods": "/api/v1",
    "namespaces": "/api/v1",
    "events": "/apis/events.k8s.io/v1",
    "tokenreviews": "/apis/authentication.k8s.io/v1",
    "subjectaccessreviews": "/apis/authorization.k8s.io/v1",
    "workloads.v1beta2": "/apis/kueue.x-k8s.io/v1beta2",
    "workloads.v1beta1": "/apis/kueue.x-k8s.io/v1beta1",
    "localqueues.v1beta2": "/apis/visibility.kueue.x-k8s.io/v1beta2",
    "localqueues.v1beta1": "/apis/visibility.kueue.x-k8s.io/v1beta1",
    "podgroups.volcano": "/apis/scheduling.volcano.sh/v1beta1",
    "podgroups.coscheduling": "/apis/scheduling.x-k8s.io/v1alpha1",
}
"""Where a resource is. What follows a dot in its name is no part of the path: it tells versions and groups apart."""
_RESOURCES = {
    ("v1", "Service"): "services",
    ("networking.k8s.io/v1", "NetworkPolicy"): "networkpolicies",
    ("batch/v1", "Job"): "jobs",
    ("scheduling.volcano.sh/v1beta1", "PodGroup"): "podgroups.volcano",
    ("scheduling.x-k8s.io/v1alpha1", "PodGroup"): "podgroups.coscheduling",
}
_OWNED = {"fieldManager": MANAGER}

_TRIES = 5
_MAX_RETRY_AFTER = 60.0
_PAGE = 100
_MAX_LOG = 4 * 1024 * 1024
"""Bytes of a log that are held in memory: more than 200 lines of those that the trainer's launcher lets through."""

Method = Literal["GET", "POST", "PATCH", "DELETE"]


async def load_configuration(kubeconfig: str) -> kubernetes_client.Configuration:
    """Credentials: of ``kubeconfig`` if given, else of the pod's service account, else of the user's kubeconfig.

    Raises:
        kubernetes.aio.config.ConfigException: there are none.
    """
    configuration = kubernetes_client.Configuration()
    if kubeconfig:
        await kubernetes_config.load_kube_config(config_file=kubeconfig, client_configuration=configuration)
    elif "KUBERNETES_SERVICE_HOST" in os.environ:
        kubernetes_config.load_incluster_config(client_configuration=configuration)
    else:
        await kubernetes_config.load_kube_config(client_configuration=configuration)
    return configuration


class KubeClient:
    """Calls to the API server, each counted, limited in speed and in time."""

    def __init__(
        self,
        configuration: kubernetes_client.Configuration,
        limit: RateLimit,
        timeout: float,
        on_call: Callable[[str, str, int], None] = lambda verb, resource, code: None,
    ) -> None:
        self._api = kubernetes_client.ApiClient(configuration)
        self._api.user_agent = f"{MANAGER}/v1alpha1"
        self._limit = limit
        self._timeout = timeout
        self._on_call = on_call
        self._undeclared = Undeclared()

    async def close(self) -> None:
        """Closes the connections."""
        await self._api.close()

    async def fetch_list(
        self, resource: str, namespace: str | None, selector: str = RUN_LABEL
    ) -> AsyncGenerator[Raw, None]:
        """Every object of ``resource`` that belongs to a run, or has the labels of ``selector``, page by page."""
        query = {"limit": str(_PAGE)}
        if resource not in (PLURAL, RUNTIMES):
            query["labelSelector"] = selector
        while True:
            page = await self._call_json("GET", "list", resource, namespace, query=query)
            for item in page.get("items") or ():
                yield item
            more = page["metadata"].get("continue")
            if not more:
                return
            query["continue"] = more

    async def apply_runtime(self, name: str, spec: ClusterLoRARuntimeSpec) -> Raw:
        """Makes the fields of a ClusterLoRARuntime those of ``spec``; others that somebody else set stay."""
        body = {"apiVersion": API_VERSION, "kind": RUNTIME_KIND, "metadata": {"name": name}, "spec": spec.to_wire()}
        return await self._apply(RUNTIMES, None, name, body)

    async def fetch_object(self, resource: str, namespace: str | None, name: str, subresource: str = "") -> Raw:
        """One object, or a part of it.

        Raises:
            NotFoundError: there is none.
        """
        return await self._call_json("GET", "get", resource, namespace, name, subresource)

    async def apply_child(self, child: Raw, run: LoRAFineTune, *, expected: bool = False) -> Raw:
        """Creates ``child``, or returns the one that is there, if it is this run's.

        Where one exists, whoever made it, the API server answers 409: an apply would merge our fields into somebody
        else's object, and costs the API server half as much again. One that is ``expected`` is looked for first.

        Raises:
            NameConflictError: it belongs to something else.
        """
        resource, metadata = _RESOURCES[child["apiVersion"], child["kind"]], child["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        found = await self._find(resource, namespace, name) if expected else None
        if found is None:
            try:
                return await self._call_json("POST", "create", resource, namespace, query=_OWNED, body=child)
            except ConflictError:
                found = await self.fetch_object(resource, namespace, name)
        conflict = find_conflict(child, found, run)
        if conflict is not None:
            raise NameConflictError(conflict.message, passing=conflict.passing)
        return found

    async def _find(self, resource: str, namespace: str, name: str) -> Raw | None:
        try:
            return await self.fetch_object(resource, namespace, name)
        except NotFoundError:
            return None

    async def patch_status(self, metadata: ObjectMeta, status: LoRAFineTuneStatus) -> Raw:
        """Writes the whole status by server-side apply, if it is still that of ``metadata.resource_version``.

        So an operator that looks at something old, while another one is at work, cannot overwrite what it did not see.
        What the CRD of the cluster is too old for is left out.

        Raises:
            NotFoundError: the run is gone.
            ConflictError: it has changed, or another run has its name now.
        """
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {
                "name": metadata.name,
                "namespace": metadata.namespace,
                "uid": metadata.uid,
                "resourceVersion": metadata.resource_version,
            },
        }
        while True:
            sent = self.to_declared(status)
            try:
                return await self._apply(PLURAL, metadata.namespace, metadata.name, {**body, "status": sent}, "status")
            except KubeError as error:
                for word in self._undeclared.learn(error.message):
                    logger.warning("the CRD of this cluster is older than the operator and does not take %s: left out "
                                   "until the CRD is upgraded (helm upgrade)", word)  # fmt: skip
                if self.to_declared(status) == sent:
                    raise

    def to_declared(self, status: LoRAFineTuneStatus) -> Raw:
        """``status`` as JSON values, as far as the CRD of the cluster is known to take it."""
        return self._undeclared.leave_out(status.to_wire())

    async def delete_child(self, resource: str, namespace: str, name: str, owner_uid: str) -> None:
        """Deletes an object if it belongs to the run ``owner_uid``; another one of its name is left alone."""
        found = await self._find(resource, namespace, name)
        if found is not None and controller_of(found["metadata"]).get("uid") == owner_uid:
            await self.delete_object(resource, namespace, name, found["metadata"]["uid"])

    async def delete_object(self, resource: str, namespace: str, name: str, uid: str) -> None:
        """Deletes an object; what belongs to it follows. One that is gone, or has another uid, is left alone."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        try:
            await self._call_json("DELETE", "delete", resource, namespace, name, body=options)
        except NotFoundError:
            logger.debug("%s %s/%s: gone already", resource, namespace, name)
        except ConflictError:
            if await self._is_there(resource, namespace, name, uid):
                raise

    async def _is_there(self, resource: str, namespace: str, name: str, uid: str) -> bool:
        found = await self._find(resource, namespace, name)
        return found is not None and bool(found["metadata"]["uid"] == uid)

    async def patch_job_stop(self, namespace: str, name: str, uid: str) -> Raw:
        """Ends a Job that has a failed index: pods that still run are deleted, the others stay."""
        return await self._patch_job(namespace, name, {"metadata": {"uid": uid}, "spec": {"maxFailedIndexes": 0}})

    async def patch_job_labels(self, namespace: str, name: str, uid: str, labels: dict[str, str]) -> Raw:
        """Puts ``labels`` on a Job."""
        return await self._patch_job(namespace, name, {"metadata": {"uid": uid, "labels": labels}})

    async def fetch_log(self, namespace: str, pod: str, container: str, lines: int) -> str:
        """The last ``lines`` of a container's log."""
        query = {"container": container, "tailLines": str(lines), "limitBytes": str(_MAX_LOG)}
        data = await self._call("GET", "get", "pods", namespace, pod, "log", query=query, accept="*/*")
        return data.decode(errors="replace")

    async def fetch_refusal(self, namespace: str, job: str, uid: str) -> str | None:
        """Why the Job controller could not create the pods of ``job``, as its newest Event says."""
        query = {"fieldSelector": f"regarding.kind=Job,regarding.name={job},regarding.uid={uid},reason=FailedCreate"}
        page = await self._call_json("GET", "list", "events", namespace, query=query)
        events = sorted(page.get("items") or (), key=lambda event: int(event["metadata"]["resourceVersion"]))
        return read_note(events[-1]) if events else None

    async def fetch_warning(self, namespace: str, pod_uid: str) -> str:
        """Why a pod that has a node does not start, by its Events; empty if none says so."""
        query = {"fieldSelector": f"regarding.kind=Pod,regarding.uid={pod_uid}"}
        page = await self._call_json("GET", "list", "events", namespace, query=query)
        return find_warning(page.get("items") or ())

    async def emit_event(self, event: Raw) -> None:
        """Posts an Event. One that was posted already is left as it is."""
        try:
            await self._call_json("POST", "create", "events", event["metadata"]["namespace"], body=event)
        except ConflictError:
            logger.debug("event %s was posted before", event["metadata"]["name"])

    async def create_review(self, resource: str, spec: Raw) -> Raw:
        """The status of a TokenReview or a SubjectAccessReview: what the API server says of somebody."""
        kind = {"tokenreviews": "TokenReview", "subjectaccessreviews": "SubjectAccessReview"}[resource]
        body = {"apiVersion": PATHS[resource].removeprefix("/apis/"), "kind": kind, "spec": spec}
        answer = await self._call_json("POST", "create", resource, None, body=body)
        status: Raw = answer["status"]
        return status

    async def _patch_job(self, namespace: str, name: str, body: Raw) -> Raw:
        patch = "application/merge-patch+json"
        return await self._call_json(
            "PATCH", "patch", "jobs", namespace, name, query=_OWNED, body=body, content_type=patch
        )

    async def _apply(self, resource: str, namespace: str | None, name: str, body: Raw, subresource: str = "") -> Raw:
        return await self._call_json(
            "PATCH",
            "apply",
            resource,
            namespace,
            name,
            subresource,
            query={**_OWNED, "force": "true"},
            body=yamlbody.encode(body),
            content_type=yamlbody.CONTENT_TYPE,
        )

    async def _call_json(self, *args: Any, **kwargs: Any) -> Raw:
        parsed: Raw = from_json(await self._call(*args, **kwargs))
        return parsed

    async def _call(
        self,
        method: Method,
        verb: str,
        resource: str,
        namespace: str | None,
        name: str = "",
        subresource: str = "",
        *,
        query: dict[str, str] | None = None,
        body: Raw | bytes | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> bytes:
        """One call; tried again where the server asks for patience (429, or 503 with Retry-After)."""
        plural = resource.partition(".")[0]
        parts = [PATHS[resource], *(["namespaces", namespace] if namespace else []), plural]
        path = "/".join([*parts, *filter(None, (name, subresource))])
        label = f"{plural}/{subresource}" if subresource else plural
        for tries_left in reversed(range(_TRIES)):
            await self._limit.wait()
            status, retry_after, data = await self._send(method, path, query, body, content_type, accept)
            self._on_call(verb, label, status)
            if status < 400:
                return data
            if retry_after is None or not tries_left:
                break
            self._limit.hold(retry_after)
        raise parse_error(status, data)

    async def _send(
        self,
        method: Method,
        path: str,
        query: dict[str, str] | None,
        body: Raw | bytes | None,
        content_type: str,
        accept: str,
    ) -> tuple[int, float | None, bytes]:
        """HTTP status, seconds of Retry-After where the server asks for patience, and the answer."""
        _, url, headers, _, _ = await self._api.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": accept, "Content-Type": content_type},
            auth_settings=["BearerToken"],
        )
        seconds = patience.get() or self._timeout
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            response = await self._api.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=timeout
            )
            data: bytes = await response.read()
        except TimeoutError as error:
            raise NoAnswerError(0, f"{method} {path}: no answer within {seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise KubeError(0, f"{method} {path}: no answer: {error!r}") from error
        retry_after = None
        if response.status in (429, 503):
            retry_after = _parse_retry_after(response.headers.get("Retry-After"))
        return response.status, retry_after, data


def _parse_retry_after(text: str | None) -> float | None:
    return min(_MAX_RETRY_AFTER, float(text)) if text and text.isdecimal() else None

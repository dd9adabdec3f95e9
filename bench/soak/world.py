"""The world around the operator: nodes that send heartbeats, and the players of all stories at work."""

import asyncio
import base64
import copy
import itertools
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import aiohttp

from bench.scale.client import JOBS, JSON, MERGE, PODS, RUNS, BenchError, Client, Raw, RefusedError
from bench.scale.kubelets import ADDRESS, INJECT, run_kubelets
from bench.scale.residents import build_run
from bench.soak import stories
from bench.soak.checks import Trainer
from bench.soak.containers import inject
from bench.soak.kinds import KNOWN_BEFORE
from bench.soak.nodes import BAD_NODES, NODES
from bench.soak.player import RULE, Action, Seen, compute_log, decide_actions, number_of
from bench.soak.stories import MICRO_BATCH, Story
from devcluster.pki import Authority
from lora_operator.names import RUN_LABEL, service_name

RUNTIMES = "/apis/lorafinetune.io/v1alpha1/clusterloraruntimes"
_RUNTIME_SPECS: dict[str, Raw] = {
    "unchecked": {"preflight": False},
    "checked": {"preflight": True},
    "narrow": {"preflight": False, "limits": {"maxNodes": 1}},
}
_PATIENCE = 180.0
_ROUND = 0.4
_RARELY = 10
"""Rounds between two looks at a namespace in which nothing is left to be played."""

_WEBHOOKS = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
_DEFAULTS = {"cpu": "250m", "memory": "512Mi"}

_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
_HEARTBEAT = 5.0


class PatientClient(Client):
    """Calls until it has an answer, as users and kubelets do while the API server is away."""

    async def call(self, method: str, path: str, body: Raw | None = None, content_type: str = JSON) -> Raw:
        """One call, made again while nobody answers or the server says that it cannot.

        Raises:
            RefusedError: it was refused, or there was no other answer for long.
        """
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return await super().call(method, path, body, content_type)
            except RefusedError as error:
                if error.status not in (429, 500, 503, 504) or time.monotonic() > deadline:
                    raise
            except (aiohttp.ClientError, TimeoutError) as error:
                if time.monotonic() > deadline:
                    raise RefusedError(0, f"{method} {path}: no answer for {_PATIENCE:.0f} s: {error!r}") from error
            await asyncio.sleep(0.3)

    async def try_call(self, action: Action) -> bool:
        """One call by what was seen a moment ago; ``False`` where that is no longer so.

        Raises:
            RefusedError: it was refused for another reason.
        """
        try:
            await self.call(action.method, action.path, action.body, action.content_type)
        except RefusedError as error:
            if error.status not in (404, 409):
                raise
            return False
        return True

    async def items(self, path: str) -> list[Raw]:
        """All objects of a list."""
        return list((await self.call("GET", path)).get("items") or [])


class World:
    """Plays ``stories``; times count from now. ``port``: where its kubelets serve logs."""

    def __init__(self, client: PatientClient, told: Sequence[Story], authority: Authority) -> None:
        self._client = client
        self._authority = authority
        self._spaces: dict[str, list[Story]] = {}
        for story in told:
            self._spaces.setdefault(story.namespace, []).append(story)
        self._stories = {story.name: story for story in told}
        self._begin = time.monotonic()
        self.port = 0
        self.upgraded = False
        """Whether operator and CRDs are those of today. Before, there are only runs that the release before knows."""
        self.injected = 0
        """Pods that got a sidecar."""
        self.trainers: set[Trainer] = set()
        """What was seen of the pods of attempts."""
        self._seen: dict[str, dict[str, Seen]] = {}
        self._created: set[str] = set()
        self._resting: set[str] = set()

    @property
    def at_rest(self) -> bool:
        """Whether all runs were created and nothing is left to be played."""
        return self._resting == set(self._spaces)

    async def prepare(self) -> None:
        """Makes nodes, namespaces and runtimes."""
        for name, spec in _RUNTIME_SPECS.items():
            body = {"apiVersion": "lorafinetune.io/v1alpha1", "kind": "ClusterLoRARuntime", "spec": spec}
            await self._client.try_call(Action("POST", RUNTIMES, {**body, "metadata": {"name": name}}))
        for name in (*NODES, *BAD_NODES):
            await self._client.try_call(Action("POST", "/api/v1/nodes", {"metadata": {"name": name}}))
        await self._client.try_call(Action("POST", _WEBHOOKS, self._build_webhook()))
        for name in self._spaces:
            labels = {"pod-security.kubernetes.io/enforce": "restricted"}
            body = {"metadata": {"name": name, "labels": labels}}
            await self._client.try_call(Action("POST", "/api/v1/namespaces", body))
        for name, told in self._spaces.items():
            await self._wait_for_account(name)
            for kind, spec in _build_rules(told[0]).items():
                path = f"/api/v1/namespaces/{name}/{kind}"
                await self._client.try_call(Action("POST", path, {"metadata": {"name": RULE}, "spec": spec}))

    def _build_webhook(self) -> Raw:
        """What makes the API server ask for a sidecar. A pod goes without where nobody answers: no end needs it."""
        client = {
            "url": f"https://{ADDRESS}:{self.port}{INJECT}",
            "caBundle": base64.b64encode(self._authority.certificate.read_bytes()).decode(),
        }
        webhook = {
            "name": "sidecars.soak.example.org", "clientConfig": client, "admissionReviewVersions": ["v1"],
            "sideEffects": "None", "failurePolicy": "Ignore", "timeoutSeconds": 2,
            "objectSelector": {"matchExpressions": [{"key": RUN_LABEL, "operator": "Exists"}]},
            "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
        }  # fmt: skip
        return {"metadata": {"name": "sidecars"}, "webhooks": [webhook]}

    def inject(self, pod: Raw) -> list[Raw]:
        """The JSON patch that puts the sidecar of its story into ``pod``."""
        story = self._stories.get(pod["metadata"]["labels"][RUN_LABEL])
        patch = inject(pod, story.sidecar) if story else []
        self.injected += bool(patch)
        return patch

    def read_log(self, namespace: str, pod: str) -> str | None:
        """The log of a pod's trainer, or ``None`` where there was none at the last look."""
        for story in self._spaces.get(namespace, ()):
            seen = self._seen.get(namespace, {}).get(story.name, Seen(None))
            found = next((item for item in seen.pods if item["metadata"]["name"] == pod), None)
            if found is not None:
                return compute_log(story, found, datetime.now(UTC))
        return None

    async def _wait_for_account(self, namespace: str) -> None:
        """Waits for the service account without which no pod can be made."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default"
        deadline = time.monotonic() + _PATIENCE
        while not await self._client.try_call(Action("GET", path)):
            if time.monotonic() > deadline:
                raise BenchError(f"namespace {namespace} has no service account")
            await asyncio.sleep(_ROUND)

    async def send_heartbeats(self) -> None:
        """Keeps the nodes ready until it is cancelled."""
        while True:
            for name in (*NODES, *BAD_NODES):
                await self._send_heartbeat(name)
            await asyncio.sleep(_HEARTBEAT)

    async def _send_heartbeat(self, name: str) -> None:
        now = datetime.now(UTC)
        lease = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": f"{now:%Y-%m-%dT%H:%M:%S.%fZ}"}
        if not await self._client.try_call(Action("PATCH", f"{_LEASES}/{name}", {"spec": lease}, MERGE)):
            await self._client.try_call(Action("POST", _LEASES, {"metadata": {"name": name}, "spec": lease}))
            times = dict.fromkeys(("lastHeartbeatTime", "lastTransitionTime"), f"{now:%Y-%m-%dT%H:%M:%SZ}")
            ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "", **times}
            status = {
                "conditions": [ready],
                "addresses": [{"type": "InternalIP", "address": ADDRESS}],
                "daemonEndpoints": {"kubeletEndpoint": {"Port": self.port}},
            }
            await self._client.try_call(Action("PATCH", f"/api/v1/nodes/{name}/status", {"status": status}, MERGE))

    async def play(self) -> None:
        """Plays until it is cancelled."""
        for number in itertools.count():
            begun = [name for name, told in self._spaces.items() if told[0].at <= self._seconds()]
            due = [name for name in begun if name not in self._resting or number % _RARELY == 0]
            async with asyncio.TaskGroup() as group:
                for name in due:
                    group.create_task(self._play_namespace(name))
            await asyncio.sleep(_ROUND)

    def _seconds(self) -> float:
        return time.monotonic() - self._begin

    async def _play_namespace(self, name: str) -> None:
        told = self._spaces[name]
        for story in told:
            known = self.upgraded or story.kind in KNOWN_BEFORE
            if known and story.name not in self._created and story.at <= self._seconds():
                await self._create(story)
        self._seen[name] = seen = await fetch_seen(self._client, name)
        self.trainers |= {Trainer.of(pod) for one in seen.values() for pod in one.pods if number_of(pod)[0]}
        playing = [story for story in told if story.name in self._created]
        for story in playing:
            for action in decide_actions(story, seen.get(story.name, Seen(None)), datetime.now(UTC)):
                await self._client.try_call(action)
        if len(playing) == len(told) and all(seen.get(story.name, Seen(None)).at_rest for story in told):
            self._resting.add(name)
        else:
            self._resting.discard(name)

    async def _create(self, story: Story) -> None:
        if stories.NAME_TAKEN in story.attempts:
            taken = {"metadata": {"name": service_name(story.name)}, "spec": {"ports": [{"port": 80}]}}
            path = f"/api/v1/namespaces/{story.namespace}/services"
            await self._client.try_call(Action("POST", path, taken))
        await self._client.try_call(Action("POST", RUNS.format(story.namespace), build_story_run(story)))
        self._created.add(story.name)


def _build_rules(story: Story) -> dict[str, Raw]:
    """The specs of what the namespace of ``story`` keeps to, by their plurals."""
    if story.rule == stories.QUOTA:
        return {"resourcequotas": {"hard": {"pods": str(story.quota)}}}
    if story.rule == stories.LIMITS:
        return {"limitranges": {"limits": [{"type": "Container", "default": _DEFAULTS}]}}
    return {}


def build_story_run(story: Story) -> Raw:
    """The LoRAFineTune of a story."""
    run = build_run(story.name)
    spec = run["spec"]
    spec["training"]["microBatchSize"] = MICRO_BATCH
    spec |= {"runPolicy": copy.deepcopy(dict(story.policy)), "runtimeRef": {"name": story.runtime}}
    if story.memory_limited:
        spec["podTemplate"] = {"resources": {"limits": {"memory": "1Gi"}}}
    return run


async def fetch_seen(client: PatientClient, namespace: str) -> dict[str, Seen]:
    """What there is in ``namespace``, by the name of the run that it belongs to, or belonged to."""
    selector = f"?labelSelector={RUN_LABEL}"
    runs, jobs, pods = await asyncio.gather(
        client.items(RUNS.format(namespace)),
        client.items(JOBS.format(namespace) + selector),
        client.items(PODS.format(namespace) + selector),
    )
    by_name = {run["metadata"]["name"]: run for run in runs}
    children = [_by_run(items) for items in (jobs, pods)]
    return {
        name: Seen(by_name.get(name), children[0].get(name, ()), children[1].get(name, ()))
        for name in by_name.keys() | set(itertools.chain(*children))
    }


def _by_run(items: Sequence[Raw]) -> dict[str, list[Raw]]:
    found: dict[str, list[Raw]] = {}
    for item in items:
        found.setdefault(item["metadata"]["labels"][RUN_LABEL], []).append(item)
    return found


@asynccontextmanager
async def in_background(*work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Work that goes on for the length of the block, which ends with what goes wrong in it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        yield
        for task in tasks:
            task.cancel()


@asynccontextmanager
async def play_world(client: PatientClient, told: Sequence[Story], authority: Authority) -> AsyncIterator[World]:
    """A world that plays for the length of the block."""
    world = World(client, told, authority)
    async with run_kubelets(authority, world.read_log, world.inject) as world.port:
        await world.prepare()
        async with in_background(world.send_heartbeats(), world.play()):
            yield world

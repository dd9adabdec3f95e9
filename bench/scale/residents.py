"""Runs that are there already: copies of two that the operator itself has brought to where they are.

Nothing in them is made up, so an operator that starts has to find that there is nothing to do. They are put into etcd
as they are, by the thousand, which the API server takes for writes of another API server.
"""

import copy
import functools
import itertools
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.scale.client import JOBS, PODS, RUNS, Client, EtcdClient, Raw
from tests.support.runs import SPEC, now

HISTORY = 100
_OPERATIONS = 100
"""Writes in one transaction; etcd allows 128."""

_PREFIXES = {
    "LoRAFineTune": "/registry/lorafinetune.io/lorafinetunes",
    "Job": "/registry/jobs",
    "Pod": "/registry/pods",
}


def build_run(name: str, nodes: int = 2) -> Raw:
    """A LoRAFineTune of two nodes, or of ``nodes``."""
    spec = copy.deepcopy(SPEC)
    spec["parallelism"]["nodes"] = nodes
    return {
        "apiVersion": "lorafinetune.io/v1alpha1",
        "kind": "LoRAFineTune",
        "metadata": {"name": name},
        "spec": spec,
    }


def build_progress() -> Raw:
    """Progress of a run that has ended, with as long a history as there may be.

    Nobody here serves logs to read it from, and a run without it would be too small.
    """
    steps = range(10, 10 * HISTORY + 1, 10)
    return {
        "step": 1000, "totalSteps": 1000, "percent": 100, "summary": "100%", "epoch": 2.0, "loss": 0.41237,
        "evalLoss": 0.43021, "learningRate": 2e-05, "gradNorm": 0.61342, "tokensPerSecond": 12473.2, "at": now(),
        "history": [[float(step), round(2.0 - step / 700, 5)] for step in steps],
    }  # fmt: skip


@dataclass(frozen=True)
class Template:
    """A run with its Job and its pods, as the API server has them."""

    name: str
    namespace: str
    objects: tuple[Raw, ...]

    def copies(self, name: str, namespace: str, nodes: Mapping[str, str] = {}) -> Iterator[tuple[str, str]]:
        """Keys and values for etcd of a copy, with names and uids of its own, on other ``nodes`` where these say so."""
        # The name of the run is the first part of the names of all that belongs to it.
        quoted = {f'"{self.namespace}"': f'"{namespace}"', f"/{self.namespace}/": f"/{namespace}/"}
        moved = {f'"{old}"': f'"{new}"' for old, new in nodes.items()}
        changes = {**quoted, **moved, self.name: name}
        changes |= {item["metadata"]["uid"]: str(uuid.uuid4()) for item in self.objects}
        for item, text in zip(self.objects, self._texts, strict=True):
            key = f"{_PREFIXES[item['kind']]}/{namespace}/{item['metadata']['name'].replace(self.name, name)}"
            for old, new in changes.items():
                text = text.replace(old, new)
            yield key, text

    @functools.cached_property
    def _texts(self) -> list[str]:
        """The objects as etcd holds them: the version is etcd's own."""
        return [
            json.dumps({**item, "metadata": {k: v for k, v in item["metadata"].items() if k != "resourceVersion"}})
            for item in self.objects
        ]


async def fetch_template(client: Client, namespace: str, name: str) -> Template:
    """What there is of the run ``name``, but for Service and Events, which the operator never reads."""
    run = await client.call("GET", f"{RUNS.format(namespace)}/{name}")
    if run["status"]["phase"] == "Succeeded":
        run["status"]["progress"] = build_progress()
    job = await client.call("GET", f"{JOBS.format(namespace)}/{name}-1")
    pods = await client.call("GET", f"{PODS.format(namespace)}?labelSelector=lorafinetune.io/name={name}")
    pods = [{"apiVersion": "v1", "kind": "Pod", **pod} for pod in pods["items"]]
    return Template(name, namespace, (run, job, *pods))


async def make_residents(etcd: EtcdClient, namespaces: Sequence[str], counts: dict[str, tuple[Template, int]]) -> None:
    """Makes as many copies of each template as ``counts`` says, under the name that it says, in all namespaces."""
    places = itertools.cycle(namespaces)
    writes = (
        write
        for kind, (template, count) in counts.items()
        for number in range(count)
        for write in template.copies(f"{kind}-{number}", next(places))
    )
    await write_all(etcd, writes)


async def write_all(etcd: EtcdClient, writes: Iterable[tuple[str, str]]) -> None:
    """Writes keys and values, many in a transaction."""
    writes = iter(writes)
    while batch := list(itertools.islice(writes, _OPERATIONS)):
        await etcd.put(batch)

"""Kueue in a cluster: the controller built from its Go module, installed by the chart that is in the same module."""

import json
from pathlib import Path

from devcluster import binaries, pins
from devcluster.building import Image
from devcluster.cluster import Cluster
from devcluster.images import ensure_images
from devcluster.paths import cache
from devcluster.progress import DevclusterError, run_logged, say, wait_for

NAMESPACE = "kueue-system"
_MODULE = "sigs.k8s.io/kueue"
_RELEASE = "kueue"
_TAG = "localhost/kueue:dev"
_READY_SECONDS = 180
_CONFIGURATION = """\
apiVersion: config.kueue.x-k8s.io/v1beta2
kind: Configuration
health:
  healthProbeBindAddress: :8081
metrics:
  bindAddress: :8443
webhook:
  port: 9443
clientConnection:
  qps: 50
  burst: 100
integrations:
  frameworks: [batch/job]
"""
_EVERY_JOB = "manageJobsWithoutQueueName: true\n"


def install(cluster: Cluster, *, every_job: bool = False) -> None:
    """Install Kueue, or configure it anew, and wait until it takes up Jobs and answers for its queues.

    Its own certificates secure the webhooks. It is built the first time, which takes minutes. With ``every_job`` it
    takes up Jobs that name no queue, too.
    """
    program = binaries.ensure(["kueue"])["kueue"]
    image = Image(_TAG, pins.MODULES / "kueue" / "Dockerfile", context=program.parent)
    repository, _, tag = ensure_images(cluster, [image])[_TAG].rpartition(":")
    manager = {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "IfNotPresent"},
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
    }
    probe = {"initialDelaySeconds": 1, "periodSeconds": 1}
    values = cache() / "kueue-values.json"
    values.write_text(
        json.dumps(
            {
                "controllerManager": {"manager": manager, "readinessProbe": probe},
                "managerConfig": {"controllerManagerConfigYaml": _CONFIGURATION + _EVERY_JOB * every_job},
            }
        )
    )
    _helm(cluster, "upgrade", "--install", _RELEASE, _chart(), "--create-namespace", f"--values={values}")
    _roll_out(cluster)
    wait_for("Kueue to answer", lambda: _answers(cluster), _READY_SECONDS)
    say(f"Kueue runs in {cluster.name}")


def uninstall(cluster: Cluster) -> None:
    """Remove Kueue with all its objects and kinds."""
    _helm(cluster, "uninstall", _RELEASE, "--ignore-not-found", "--wait")


def _chart() -> Path:
    """Return the chart, in the folder that Go keeps the module in."""
    return binaries.find_source("kueue", _MODULE) / "charts" / "kueue"


def _helm(cluster: Cluster, *arguments: str | Path) -> None:
    helm = binaries.ensure(["tools"])["helm"]
    where = [f"--namespace={NAMESPACE}", f"--kubeconfig={cluster.kubeconfig}"]
    run_logged("helm", [helm, *arguments, *where], cache() / "logs" / "kueue-helm.log", timeout=_READY_SECONDS)


def _roll_out(cluster: Cluster) -> None:
    """Wait until the manager with the configuration of before is gone: its chart replaces the pod for a new one."""
    where = ["deployment", f"--namespace={NAMESPACE}", "--selector=control-plane=controller-manager"]
    cluster.kubectl("rollout", "status", *where, f"--timeout={_READY_SECONDS}s", timeout=_READY_SECONDS + 10)


def _answers(cluster: Cluster) -> bool:
    """Return whether its webhooks and its API of waiting workloads work: both come after the certificates."""
    probe = "apiVersion: kueue.x-k8s.io/v1beta2\nkind: ResourceFlavor\nmetadata: {name: probe}\n"
    try:
        cluster.kubectl("create", "--dry-run=server", "--filename=-", input=probe)
        cluster.kubectl("get", "--raw=/apis/visibility.kueue.x-k8s.io/v1beta2")
    except DevclusterError:
        return False
    return True

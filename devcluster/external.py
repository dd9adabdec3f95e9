"""A cluster that was not started here: that of ``$KUBECONFIG``."""

import os
import subprocess
from pathlib import Path

from devcluster.cluster import Cluster
from devcluster.paths import cache
from devcluster.progress import DevclusterError
from devcluster.store import BUCKET

_WANTED = ("LORA_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def is_external() -> bool:
    """Return whether ``$KUBECONFIG`` names a cluster other than those started here."""
    chosen = os.environ.get("KUBECONFIG")
    return bool(chosen) and not Path(str(chosen)).absolute().is_relative_to(cache() / "clusters")


def external_cluster() -> Cluster | None:
    """Return the handle of ``$KUBECONFIG``'s cluster, or None where clusters are started here.

    The object store is that of ``LORA_S3_ENDPOINT`` (as pods reach it; from this machine by
    ``LORA_S3_ENDPOINT_HOST``, where that differs), ``AWS_ACCESS_KEY_ID`` and
    ``AWS_SECRET_ACCESS_KEY``, with the bucket ``LORA_S3_BUCKET`` (models).
    """
    if not is_external():
        return None
    missing = [name for name in _WANTED if not os.environ.get(name)]
    if missing:
        raise DevclusterError(
            f"KUBECONFIG is set, so that cluster is used; set {', '.join(missing)} too: the address of an S3 store that"
            " its pods reach, and the keys to it. (Unset KUBECONFIG to have a cluster and a store started here.)"
        )
    kubeconfig = Path(os.environ["KUBECONFIG"]).absolute()
    endpoint = os.environ["LORA_S3_ENDPOINT"]
    return Cluster(
        name=current_context(kubeconfig),
        kubeconfig=kubeconfig,
        node_ip="",
        s3_endpoint=endpoint,
        s3_endpoint_host=os.environ.get("LORA_S3_ENDPOINT_HOST", endpoint),
        s3_access_key=os.environ["AWS_ACCESS_KEY_ID"],
        s3_secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        bucket=os.environ.get("LORA_S3_BUCKET", BUCKET),
        directory=cache() / "external",
        external=True,
    )


def current_context(kubeconfig: Path) -> str:
    """Return the name of the context in use."""
    done = subprocess.run(
        ["kubectl", f"--kubeconfig={kubeconfig}", "config", "current-context"], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise DevclusterError(f"reading {kubeconfig}: {done.stderr.strip()}")
    return done.stdout.strip()

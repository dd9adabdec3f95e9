"""What the demo and the cluster tests stand on: images on the nodes, the operator from its chart, data in the store."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import obstore.exceptions
from obstore.store import S3Store

from demo.model import make_model
from demo.tickets import write_tickets
from devcluster import Cluster, DevclusterError, binaries
from devcluster.external import is_external
from devcluster.images import PRODUCT_IMAGES, build_image, ensure_images
from devcluster.paths import REPOSITORY, cache
from lora_api import LoRAFineTune

RELEASE = "lora-operator"
SYSTEM_NAMESPACE = "lora-system"
CHART = REPOSITORY / "charts" / "lora-operator"
SECRET = "lora-store"
REGION = "us-east-1"
MODEL = cache() / "models" / "smollm2-135m-instruct"
MODEL_PATH = "base/smollm2-135m-instruct"
DATA_PATH = "data/tickets"

TICKETS = {"train": 1200, "evaluation": 64, "seed": 7}


def prepare() -> None:
    """Makes what takes long and needs no cluster: the base model, and the images if they are built on this machine."""
    make_model(MODEL)
    if not is_external():
        for image in PRODUCT_IMAGES:
            build_image(image)


def load_images(cluster: Cluster) -> dict[str, Any]:
    """Builds both images where their content changed, and brings them to the nodes. Returns chart values for them."""
    operator, trainer = ensure_images(cluster).values()
    values: dict[str, Any] = {}
    for key, name in (("image", operator), ("trainer.image", trainer)):
        values[f"{key}.repository"], _, values[f"{key}.tag"] = name.rpartition(":")
    return values


def install_operator(cluster: Cluster, values: Mapping[str, Any], timeout: int = 120) -> None:
    """Installs or upgrades the chart with the demo's values, ``values`` over them, and waits until it is ready.

    Its default runtime names the cluster's object store.

    Raises:
        DevclusterError: helm failed; the message is helm's own.
    """
    helm = binaries.ensure(["tools"])["helm"]
    command = [helm, "upgrade", "--install", RELEASE, CHART, "--namespace", SYSTEM_NAMESPACE, "--create-namespace"]
    command += ["--kubeconfig", cluster.kubeconfig, "--values", REPOSITORY / "demo" / "values.yaml"]
    endpoints = {"defaultRuntime.spec.endpoints": {"store": cluster.s3_endpoint}}
    for key, value in (endpoints | dict(values)).items():
        command += ["--set-json", f"{key}={json.dumps(value)}"]
    done = subprocess.run([*command, "--wait", "--timeout", f"{timeout}s"], capture_output=True, text=True)
    if done.returncode:
        pods = cluster.kubectl("logs", f"deployment/{RELEASE}", f"--namespace={SYSTEM_NAMESPACE}", "--tail=15")
        raise DevclusterError(f"helm could not install {RELEASE}: {done.stderr.strip()}\nThe operator's log:\n{pods}")


def uninstall_operator(cluster: Cluster) -> None:
    """Uninstalls the chart; its CRDs, and with them all runs, stay."""
    helm = binaries.ensure(["tools"])["helm"]
    command = [helm, "uninstall", RELEASE, "--namespace", SYSTEM_NAMESPACE, "--ignore-not-found", "--wait"]
    done = subprocess.run([*command, "--kubeconfig", cluster.kubeconfig], capture_output=True, text=True)
    if done.returncode:
        raise DevclusterError(f"helm could not uninstall {RELEASE}: {done.stderr.strip()}")


def make_namespace(cluster: Cluster, name: str) -> None:
    """A namespace in which pods must keep to the restricted Pod Security level, with the store's Secret in it."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    secret = {
        "AWS_ACCESS_KEY_ID": cluster.s3_access_key,
        "AWS_SECRET_ACCESS_KEY": cluster.s3_secret_key,
        "AWS_REGION": REGION,
    }
    apply(cluster, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    metadata = {"name": SECRET, "namespace": name}
    apply(cluster, {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": secret})


def apply(cluster: Cluster, manifest: Mapping[str, Any]) -> None:
    """``kubectl apply`` of one object."""
    cluster.kubectl("apply", "--filename=-", input=json.dumps(manifest))


def fetch_run(cluster: Cluster, namespace: str, name: str) -> LoRAFineTune:
    """The run as it is now."""
    text = cluster.kubectl("get", "lorafinetune", name, f"--namespace={namespace}", "--output=json")
    return LoRAFineTune.model_validate_json(text)


@dataclass(frozen=True)
class Store:
    """The cluster's object store, as this machine reaches it."""

    cluster: Cluster

    def environment(self) -> dict[str, str]:
        """Variables by which programs on this machine find the store."""
        return {
            "AWS_ACCESS_KEY_ID": self.cluster.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": self.cluster.s3_secret_key,
            "AWS_ENDPOINT_URL": self.cluster.s3_endpoint_host,
            "AWS_REGION": REGION,
        }

    def open(self) -> S3Store:
        """A client for the bucket."""
        endpoint = self.cluster.s3_endpoint_host
        return S3Store(
            self.cluster.bucket,
            endpoint=endpoint,
            region=REGION,
            access_key_id=self.cluster.s3_access_key,
            secret_access_key=self.cluster.s3_secret_key,
            client_options={"allow_http": endpoint.startswith("http://")},
            retry_config={"max_retries": 3},
        )

    def uri(self, path: str) -> str:
        """URI of ``path`` in the bucket."""
        return f"s3://{self.cluster.bucket}/{path}"

    def upload(self, directory: Path, path: str) -> None:
        """Uploads every file of ``directory`` to ``path``.

        Raises:
            DevclusterError: the store did not take one.
        """
        store = self.open()
        for file in sorted(directory.rglob("*")):
            if file.is_file():
                try:
                    obstore.put(store, f"{path}/{file.relative_to(directory)}", file)
                except obstore.exceptions.BaseError as error:
                    reason = str(error).splitlines()[0]
                    raise DevclusterError(f"{file.name} could not be uploaded to {self.uri(path)}: {reason}") from error


def upload_demo_data(store: Store) -> Path:
    """Brings the small real model and the tickets to the store. Returns the local folder of the tickets."""
    make_model(MODEL)
    store.upload(MODEL, MODEL_PATH)
    tickets = cache() / "data" / "tickets"
    write_tickets(tickets, **TICKETS)
    store.upload(tickets, DATA_PATH)
    return tickets

"""Put built images into a cluster of this machine.

It gets them in seconds and at no cost of disk: containerd and
buildah both keep a layer as a folder of the same form (overlayfs), so the files of one
are hard links to those of the other, and only the few bytes of config and manifest are
imported. Layers that the cluster has are skipped.
"""

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.building import BuiltImage
from devcluster.cluster import Cluster
from devcluster.node import Node
from devcluster.paths import cache, file_lock
from devcluster.progress import DevclusterError, say

_LABEL = "devcluster/image-id"
_OCI = "application/vnd.oci.image"


@dataclass(frozen=True)
class Layer:
    """One layer of an image in buildah's store."""

    folder: Path
    diff_id: str  # "sha256:...", of the uncompressed tar
    size: int  # bytes of that tar


@dataclass(frozen=True)
class Contents:
    """All of an image: its config as written, and its layers from the lowest."""

    config: bytes
    layers: tuple[Layer, ...]


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """Return the chain ID of each layer, which names it together with all below it (OCI image spec)."""
    chain: list[str] = []
    for diff_id in diff_ids:
        text = f"{chain[-1]} {diff_id}" if chain else ""
        chain.append(f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if chain else diff_id)
    return chain


def read_contents(store: Path, image_id: str) -> Contents:
    """Read an image from the files of buildah's store (containers/storage, overlay driver)."""
    images: list[dict[str, Any]] = json.loads((store / "overlay-images" / "images.json").read_text())
    found = next((image for image in images if image["id"] == image_id), None)
    if found is None:
        raise DevclusterError(f"the image {image_id} is not in {store}")
    # Names of a form that is no file's name are kept in base64.
    encoded = "=" + base64.b64encode(f"sha256:{image_id}".encode()).decode()
    config = (store / "overlay-images" / image_id / encoded).read_bytes()
    known = {layer["id"]: layer for layer in json.loads((store / "overlay-layers" / "layers.json").read_text())}
    layers: list[Layer] = []
    identity = found["layer"]
    while identity:
        layer = known[identity]
        layers.insert(0, Layer(store / "overlay" / identity / "diff", layer["diff-digest"], layer["diff-size"]))
        identity = layer.get("parent")
    if [layer.diff_id for layer in layers] != json.loads(config)["rootfs"]["diff_ids"]:
        raise DevclusterError(f"the layers of the image {image_id} are not those that its config names")
    return Contents(config, tuple(layers))


def metadata_archive(contents: Contents, tag: str) -> bytes:
    """Return an OCI archive (tar) of the image ``tag`` without its layers; pure."""
    blobs: dict[str, bytes] = {}

    def blob(data: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_OCI}.manifest.v1+json",
        "config": blob(contents.config, f"{_OCI}.config.v1+json"),
        "layers": [
            {"mediaType": f"{_OCI}.layer.v1.tar", "digest": layer.diff_id, "size": layer.size}
            for layer in contents.layers
        ],
    }
    described = blob(json.dumps(manifest).encode(), f"{_OCI}.manifest.v1+json")
    index = {
        "schemaVersion": 2,
        "manifests": [described | {"annotations": {"io.containerd.image.name": tag}}],
    }
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(index).encode()}
    files |= {f"blobs/sha256/{digest}": data for digest, data in blobs.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive_file:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive_file.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


class _Containerd:
    """The containerd of one node, through ``ctr``."""

    def __init__(self, cluster: Cluster, node: Node) -> None:
        self._prefix = cluster.inside(["ctr", f"--address={node.socket}", "--namespace=k8s.io"])

    def run(self, *args: str, data: bytes | None = None) -> str:
        done = subprocess.run([*self._prefix, *args], input=data, capture_output=True, timeout=600)
        if done.returncode != 0:
            raise DevclusterError(f"ctr {' '.join(args[:2])}: {done.stderr.decode().strip()}")
        return done.stdout.decode()

    def loaded(self, image: BuiltImage) -> bool:
        """Return whether this very image is there under its name."""
        return f"{_LABEL}={image.id}" in self.run("images", "list", f"name=={image.tag}")

    def snapshots(self) -> set[str]:
        lines = self.run("snapshots", "list").splitlines()[1:]
        return {words[0] for words in map(str.split, lines) if words[-1] == "Committed"}

    def add_layer(self, layer: Layer, parent: str | None, chain_id: str) -> None:
        """Make the snapshot ``chain_id`` of links to the layer's files."""
        key = f"devcluster-{os.getpid()}-{chain_id}"
        self.run("snapshots", "prepare", key, *([parent] if parent else []))
        try:
            _link(layer.folder, mounted_folder(self.run("snapshots", "mounts", "/unused", key)))
            self.run("snapshots", "commit", chain_id, key)
        except BaseException:
            self.run("snapshots", "remove", key)
            raise

    def forget_former(self, image: BuiltImage) -> None:
        """Drop the name that the kubelet gave to the image which had this name before.

        It would hold the layers of every image that there ever was.
        """
        listing = self.run("images", "list", f"name=={image.tag}")
        former = re.search(rf"{re.escape(_LABEL)}=([0-9a-f]+)", listing)
        if former is not None and former.group(1) != image.id:
            self.run("images", "delete", f"sha256:{former.group(1)}")

    def release(self, chain_id: str) -> None:
        """Let the snapshot go when its last image goes; ``ctr`` made it one to keep for ever."""
        self.run("snapshots", "label", chain_id, "containerd.io/gc.root=")


def mounted_folder(mounts: str) -> Path:
    """Return the folder that ``ctr snapshots mounts`` would let be written to."""
    found = re.search(r"upperdir=([^,\s]+)", mounts) or re.search(r"-t bind (\S+)", mounts)
    if found is None:
        raise DevclusterError(f"no folder found in the answer of ctr snapshots mounts: {mounts}")
    return Path(found.group(1))


def _link(source: Path, target: Path) -> None:
    """Fill ``target`` with links to all in ``source``; with copies where they are on two disks, or two mounts of one.

    A build that was killed leaves its store mounted onto itself.
    """
    for how in ("--link", "--reflink=auto"):
        done = subprocess.run(["cp", "--archive", how, f"{source}/.", target], capture_output=True, text=True)
        if done.returncode == 0:
            return
    raise DevclusterError(f"linking a layer: {done.stderr.strip()[-500:]}")


def _load_into_node(cluster: Cluster, node: Node, image: BuiltImage) -> bool:
    containerd = _Containerd(cluster, node)
    if containerd.loaded(image):
        return False
    contents = read_contents(cache() / "buildah" / "root", image.id)
    chain = chain_ids([layer.diff_id for layer in contents.layers])
    present = containerd.snapshots()
    added = []
    for index, layer in enumerate(contents.layers):
        if chain[index] not in present:
            containerd.add_layer(layer, chain[index - 1] if index else None, chain[index])
            added.append(chain[index])
    containerd.forget_former(image)
    containerd.run("images", "import", "-", data=metadata_archive(contents, image.tag))
    for chain_id in added:
        containerd.release(chain_id)
    containerd.run("images", "label", image.tag, f"{_LABEL}={image.id}")
    return True


def load_image(cluster: Cluster, image: BuiltImage) -> None:
    """Make pods of the cluster find the image, under its own name."""
    with file_lock(cache() / "buildah.lock"):
        changed = [name for name in cluster.nodes if _load_into_node(cluster, cluster.node(name), image)]
    say(f"image {image.tag} " + (f"loaded into {', '.join(changed)}" if changed else "was loaded already"))

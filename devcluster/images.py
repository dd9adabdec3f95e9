"""Images for a cluster: built here and brought to wherever its pods run."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from devcluster import baseimage
from devcluster.building import BuiltImage, Image, archive, build_image, check_tag
from devcluster.cluster import Cluster
from devcluster.loading import load_image
from devcluster.paths import REPOSITORY
from devcluster.progress import DevclusterError, say

__all__ = ["PRODUCT_IMAGES", "BuiltImage", "Image", "build_image", "ensure_images", "load_image"]

PRODUCT_IMAGES = (
    Image("localhost/lora-operator:dev", REPOSITORY / "operator" / "Dockerfile"),
    Image("localhost/lora-trainer:dev", REPOSITORY / "trainer_image" / "Dockerfile"),
)

_DOCKER_SECONDS = 20


def ensure_images(cluster: Cluster, images: Iterable[Image] = PRODUCT_IMAGES) -> dict[str, str]:
    """Build what changed and bring it to the nodes; return tag -> the name that manifests use.

    On a cluster of ``$KUBECONFIG`` an image goes to the nodes with ``kind load`` where the
    context is kind's, else it is pushed to ``$REGISTRY``, and its name is one there.
    """
    return {image.tag: _ensure(cluster, image) for image in images}


def _ensure(cluster: Cluster, image: Image) -> str:
    if not cluster.external:
        load_image(cluster, build_image(image))
        return image.tag
    check_tag(image.tag)
    if cluster.name.startswith("kind-"):
        _load_into_kind(cluster.name.removeprefix("kind-"), image)
        say(f"image {image.tag} loaded into {cluster.name}")
        return image.tag
    registry = os.environ.get("REGISTRY")
    if not registry:
        raise DevclusterError(
            f"set REGISTRY to a registry that the nodes of {cluster.name} pull from (and log in to it), so that"
            f" {image.tag} can be pushed there"
        )
    target = f"{registry.rstrip('/')}/{image.tag.partition('/')[2]}"
    if _build_with_docker(image):
        _run("docker", "tag", image.tag, target)
        _run("docker", "push", target)
    else:
        build_image(image)
        _run(*baseimage.buildah("push", image.tag, f"docker://{target}"))
    say(f"image {target} pushed")
    return target


def _load_into_kind(name: str, image: Image) -> None:
    if _build_with_docker(image):
        _run("kind", "load", "docker-image", image.tag, "--name", name)
        return
    built = build_image(image)
    with tempfile.TemporaryDirectory(dir=baseimage.buildah_environment()["TMPDIR"]) as folder:
        path = Path(folder) / "image.tar"
        archive(built, path)
        _run("kind", "load", "image-archive", path, "--name", name)


def _build_with_docker(image: Image) -> bool:
    """Build with docker, which needs no root, where its daemon answers; return whether it does."""
    if not _docker_answers():
        return False
    arguments = [f"--build-arg={name}={value}" for name, value in image.build_args]
    _run("docker", "build", f"--file={image.dockerfile}", f"--tag={image.tag}", *arguments, image.context)
    return True


def _docker_answers() -> bool:
    """Return whether there is docker: a client alone, without a daemon, builds nothing."""
    if shutil.which("docker") is None:
        return False
    try:
        done = subprocess.run(
            ["docker", "version", "--format={{.Server.Version}}"], capture_output=True, timeout=_DOCKER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


def _run(*argv: str | Path) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, env=baseimage.buildah_environment())
    except FileNotFoundError:
        raise DevclusterError(f"there is no `{argv[0]}` on PATH, which brings images to this cluster") from None
    if done.returncode != 0:
        raise DevclusterError(f"{argv[0]} {argv[1]}: {done.stderr.strip()[-2000:]}")

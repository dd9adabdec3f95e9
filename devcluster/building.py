"""Build images from real Dockerfiles, outside any cluster, with buildah."""

import configparser
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from devcluster import baseimage, preflight
from devcluster.paths import REPOSITORY, cache, file_lock
from devcluster.progress import DevclusterError, run_logged, say

_FREE_BYTES = 20 * 2**30
_BUILD_SECONDS = 3600
_PIP_CACHE = "/var/cache/pip"
# What pip is told on this machine is told to pip in the build.
_PIP_OPTIONS = ("index-url", "extra-index-url", "find-links", "trusted-host", "timeout", "retries")
_PIP_NAMES = {"timeout": "PIP_DEFAULT_TIMEOUT"}


@dataclass(frozen=True)
class Image:
    """An image to build: its name (DOMAIN/NAME:TAG), its Dockerfile and what that reads."""

    tag: str
    dockerfile: Path
    context: Path = REPOSITORY
    build_args: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class BuiltImage:
    """An image in buildah's store: its name, and the digest of its config, so of all that it is."""

    tag: str
    id: str


def check_tag(tag: str) -> str:
    """Return ``tag``; raise unless it names a registry or domain, which every tool reads alike."""
    first, slash, rest = tag.partition("/")
    if not slash or not re.search(r"[.:]|^localhost$", first) or not re.search(r":[\w.-]+$", rest):
        raise DevclusterError(f"name the image DOMAIN/NAME:TAG (devcluster.local/{tag.split(':')[0]}:dev), not {tag}")
    return tag


def pip_settings(environment: Mapping[str, str], cache_folder: str = _PIP_CACHE) -> str:
    """Return the pip.conf of a build: this machine's sources, and a cache that outlives it."""
    config = configparser.ConfigParser(interpolation=None)
    config["global"] = {"cache-dir": cache_folder, "disable-pip-version-check": "true"}
    for option in _PIP_OPTIONS:
        value = environment.get(_PIP_NAMES.get(option, f"PIP_{option.replace('-', '_').upper()}"))
        if value:
            # A list is parted by blanks in the environment, by lines in the file.
            config["global"][option] = "\n".join(value.split())
    lines = ["[global]"]
    lines += [f"{name} = " + value.replace("\n", "\n    ") for name, value in config["global"].items()]
    return "\n".join(lines) + "\n"


def _mounts() -> list[str]:
    """Return the mounts of a build: the certificates and wheels of this machine, and caches."""
    pip_cache = cache() / "pip"
    pip_cache.mkdir(parents=True, exist_ok=True)
    settings = cache() / "pip.conf"
    settings.write_text(pip_settings(os.environ))
    mounts = [f"{pip_cache}:{_PIP_CACHE}", f"{settings}:/etc/pip.conf:ro"]
    # A machine may trust more authorities (a proxy's) than the base image knows.
    folders = ["/etc/ssl/certs", *os.environ.get("PIP_FIND_LINKS", "").split()]
    mounts += [f"{folder}:{folder}:ro" for folder in folders if folder.startswith("/") and Path(folder).is_dir()]
    return [f"--volume={mount}" for mount in mounts]


def build_image(image: Image) -> BuiltImage:
    """Build an image; the context is read less its .dockerignore.

    Layers whose instruction and files are unchanged come from the store, so that a change
    of code costs seconds, and no change gives the same image.
    """
    tag = check_tag(image.tag)
    if not image.dockerfile.exists():
        raise DevclusterError(f"there is no {image.dockerfile}")
    preflight.require_root()
    preflight.require_programs(preflight.IMAGE_PROGRAMS)
    started = time.monotonic()
    log = cache() / "logs" / f"image-{re.sub(r'[^a-z0-9.-]', '_', tag.lower())}.log"
    log.unlink(missing_ok=True)
    with file_lock(cache() / "buildah.lock", f"waiting for another image build before {tag}"):
        before = _find(tag)
        if before is None:
            preflight.require_free(cache(), _FREE_BYTES, f"building {tag} for the first time")
        arguments = {"BASE_IMAGE": baseimage.ensure_base(), **dict(image.build_args)}
        command = baseimage.buildah(
            *("build", "--isolation=chroot", "--network=host", "--layers", "--pull-never", "--format=oci"),
            *_mounts(),
            *(f"--build-arg={name}={value}" for name, value in arguments.items()),
            *(f"--file={image.dockerfile.absolute()}", f"--tag={tag}", image.context.absolute()),
        )
        environment = baseimage.buildah_environment()
        run_logged(f"building {tag}", command, log, env=environment, cwd=image.context, timeout=_BUILD_SECONDS)
        built = _find(tag)
        if built is None:
            raise DevclusterError(f"buildah built {tag} and does not find it; see {log}")
        if before is not None and before.id != built.id:
            _drop(before)
    unchanged = " (unchanged)" if before == built else ""
    say(f"image {tag} built in {time.monotonic() - started:.1f} s{unchanged}")
    return built


def _find(tag: str) -> BuiltImage | None:
    try:
        return BuiltImage(tag, baseimage.query("inspect", "--type=image", "--format={{.FromImageID}}", tag))
    except DevclusterError:
        return None


def _drop(image: BuiltImage) -> None:
    """Remove an image that a new one has replaced; layers that others use stay."""
    try:
        baseimage.query("rmi", image.id)
    except DevclusterError as error:
        say(f"the replaced image stays in the store: {error}")


def archive(image: BuiltImage, path: Path) -> None:
    """Write an image to a docker-archive, for clusters that are not of this machine."""
    path.unlink(missing_ok=True)
    log = cache() / "logs" / "image-archive.log"
    command = baseimage.buildah("push", "--disable-compression", image.tag, f"docker-archive:{path}:{image.tag}")
    run_logged(f"archiving {image.tag}", command, log, env=baseimage.buildah_environment(), timeout=_BUILD_SECONDS)

"""How images come to a cluster of ``$KUBECONFIG``, with stand-ins for docker, kind and buildah that note calls."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devcluster import baseimage, images
from devcluster.building import BuiltImage, Image
from devcluster.cluster import Cluster
from devcluster.images import ensure_images
from devcluster.progress import DevclusterError

IMAGE = Image("localhost/thing:dev", Path("/src/Dockerfile"), Path("/src"), (("BASE_IMAGE", "debian"),))
BUILD = [
    "docker",
    "build",
    "--file=/src/Dockerfile",
    "--tag=localhost/thing:dev",
    "--build-arg=BASE_IMAGE=debian",
    "/src",
]
ASK = ["docker", "version", "--format={{.Server.Version}}"]
BUILDAH = ["buildah", "build", "localhost/thing:dev"]

STAND_IN = """#!{python}
import json, sys
from pathlib import Path
words = [Path(sys.argv[0]).name, *sys.argv[1:]]
with open({calls!r}, "a") as file:
    file.write(json.dumps(words) + "\\n")
{body}
"""
ANSWERS = 'print("29.1.0" if words[1] == "version" else "")'
NO_DAEMON = (
    'sys.exit("failed to connect to the docker API at unix:///var/run/docker.sock; check if the daemon is running")'
)
NO_PUSH = ANSWERS + '\nif words[1] == "push": sys.exit("denied: requested access to the resource is denied")'


class Tools:
    """Programs on PATH that only note how they were called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "calls"
        self.file.touch()

    def add(self, name: str, body: str = "") -> None:
        program = self.directory / name
        program.write_text(STAND_IN.format(python=sys.executable, calls=str(self.file), body=body))
        program.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tools]:
    directory = tmp_path / "bin"
    directory.mkdir()
    tools = Tools(directory)
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("REGISTRY", raising=False)

    def build(image: Image) -> BuiltImage:
        with tools.file.open("a") as file:
            file.write(json.dumps(["buildah", "build", image.tag]) + "\n")
        return BuiltImage(image.tag, "0" * 64)

    monkeypatch.setattr(images, "build_image", build)  # a real build needs root and minutes: test_cluster.py has one
    return tools


@pytest.fixture
def cluster(tmp_path: Path) -> Callable[[str], Cluster]:
    def make(context: str) -> Cluster:
        return Cluster(
            name=context, kubeconfig=tmp_path / "config", node_ip="", s3_endpoint="", s3_endpoint_host="",
            s3_access_key="", s3_secret_key="", bucket="models", directory=tmp_path / "external", external=True,
        )  # fmt: skip

    return make


Make = Callable[[str], Cluster]


def test_a_kind_cluster_gets_images_from_docker(tools: Tools, cluster: Make) -> None:
    tools.add("docker", ANSWERS)
    tools.add("kind")
    assert ensure_images(cluster("kind-lab"), [IMAGE]) == {IMAGE.tag: IMAGE.tag}
    assert tools.calls == [ASK, BUILD, ["kind", "load", "docker-image", IMAGE.tag, "--name", "lab"]]


@pytest.mark.parametrize("docker", ["no docker", "docker without a daemon"])
def test_a_kind_cluster_gets_an_archive_from_buildah_where_docker_does_not_answer(
    docker: str, tools: Tools, cluster: Make
) -> None:
    tools.add("kind")
    tools.add("buildah")
    if docker == "docker without a daemon":
        tools.add("docker", NO_DAEMON)
    assert ensure_images(cluster("kind-lab"), [IMAGE]) == {IMAGE.tag: IMAGE.tag}
    asked = [ASK] if docker == "docker without a daemon" else []
    *before, archive, load = tools.calls
    assert before == [*asked, BUILDAH]
    assert archive[0] == "buildah"
    assert archive[-1].startswith("docker-archive:")
    assert archive[-1].endswith(f":{IMAGE.tag}")
    path = archive[-1].removeprefix("docker-archive:").removesuffix(f":{IMAGE.tag}")
    assert load == ["kind", "load", "image-archive", path, "--name", "lab"]


def test_another_cluster_pulls_from_the_registry(tools: Tools, cluster: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.add("docker", ANSWERS)
    monkeypatch.setenv("REGISTRY", "registry.example:5000/team/")
    target = "registry.example:5000/team/thing:dev"
    assert ensure_images(cluster("production"), [IMAGE]) == {IMAGE.tag: target}
    assert tools.calls == [ASK, BUILD, ["docker", "tag", IMAGE.tag, target], ["docker", "push", target]]


def test_buildah_pushes_where_docker_does_not_answer(
    tools: Tools, cluster: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.add("docker", NO_DAEMON)
    tools.add("buildah")
    monkeypatch.setenv("REGISTRY", "registry.example/team")
    target = "registry.example/team/thing:dev"
    assert ensure_images(cluster("production"), [IMAGE]) == {IMAGE.tag: target}
    push = list(map(str, baseimage.buildah("push", IMAGE.tag, f"docker://{target}")))
    assert tools.calls == [ASK, BUILDAH, push]


def test_a_cluster_without_a_registry_is_told_what_to_set_before_anything_is_built(tools: Tools, cluster: Make) -> None:
    tools.add("docker", ANSWERS)
    with pytest.raises(DevclusterError, match="set REGISTRY to a registry that the nodes of production pull from"):
        ensure_images(cluster("production"), [IMAGE])
    assert tools.calls == []


def test_what_the_registry_says_is_shown(tools: Tools, cluster: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.add("docker", NO_PUSH)
    monkeypatch.setenv("REGISTRY", "registry.example/team")
    with pytest.raises(DevclusterError, match="docker push: denied: requested access"):
        ensure_images(cluster("production"), [IMAGE])


def test_a_kind_that_is_missing_is_named(tools: Tools, cluster: Make) -> None:
    tools.add("docker", ANSWERS)
    with pytest.raises(DevclusterError, match="there is no `kind` on PATH"):
        ensure_images(cluster("kind-lab"), [IMAGE])

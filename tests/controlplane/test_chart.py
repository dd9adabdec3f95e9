"""The chart on a real API server: every object is taken, and a release lives its life."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import devcluster
from devcluster import binaries
from lora_api.crd import RUN, RUNTIME
from tests.support.install import wait_for_crds

pytestmark = pytest.mark.controlplane

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "lora-operator"
SPACE = "lora-system"
CRD = f"crd/{RUN.name}"
RUN_KIND = RUN.name
LABEL = "--selector=app.kubernetes.io/instance=lora-operator"

Helm = Callable[..., str]


@pytest.fixture(scope="module")
def cp() -> Iterator[devcluster.ControlPlane]:
    """A control plane without our CRD, with the namespace of the release under the strictest Pod Security."""
    with devcluster.control_plane() as running:
        for name in (SPACE, "team-a", "team-b"):
            running.kubectl("create", "namespace", name)
        for mode in ("enforce", "warn"):
            running.kubectl("label", "namespace", SPACE, f"pod-security.kubernetes.io/{mode}=restricted")
        yield running


@pytest.fixture(scope="module")
def helm(cp: devcluster.ControlPlane) -> Helm:
    program = binaries.ensure(["tools"])["helm"]

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [str(program), f"--kubeconfig={cp.kubeconfig}", f"--namespace={SPACE}", *arguments],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


VALUES: dict[str, list[str]] = {
    "the defaults": [],
    "two namespaces": ['namespaces=["team-a","team-b"]'],
    "everything at once": [
        f'image={{"digest":"sha256:{"0" * 64}"}}',
        'imagePullSecrets=[{"name":"registry"}]',
        'serviceAccount.annotations={"example.org/role":"x"}',
        'metrics.service.annotations={"prometheus.io/scrape":"true"}',
        'metrics.auth="networkPolicy"',
        'metrics.from=[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"monitoring"}}}]',
        'nodeSelector={"pool":"system"}',
        'tolerations=[{"key":"system","operator":"Exists","effect":"NoSchedule"}]',
        'affinity={"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":'
        '[{"matchExpressions":[{"key":"gpu","operator":"DoesNotExist"}]}]}}}',
        'podLabels={"team":"ml"}',
        'podAnnotations={"example.org/x":"y"}',
    ],
}


@pytest.mark.parametrize("case", VALUES)
def test_every_object_is_taken_by_the_api_server(cp: devcluster.ControlPlane, helm: Helm, case: str) -> None:
    manifests = helm("template", "lora-operator", str(CHART), *(f"--set-json={value}" for value in VALUES[case]))
    answer = cp.kubectl("apply", "--filename=-", "--dry-run=server", "--validate=strict", input=manifests)
    count = len([document for document in yaml.safe_load_all(manifests) if document])
    assert answer.count("created (server dry run)") == count
    assert count >= 10


def test_the_pod_is_taken_under_restricted_pod_security(cp: devcluster.ControlPlane, helm: Helm) -> None:
    """Checked on a pod: the API server takes any Deployment, and refuses its pods later."""
    manifests = helm("template", "lora-operator", str(CHART), "--show-only=templates/deployment.yaml")
    template: dict[str, Any] = yaml.safe_load(manifests)["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "operator", "namespace": SPACE}}
    cp.kubectl("apply", "--filename=-", "--dry-run=server", input=json.dumps(pod))
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(devcluster.DevclusterError, match='violates PodSecurity "restricted'):
        cp.kubectl("apply", "--filename=-", "--dry-run=server", input=json.dumps(pod))


MANIFEST = """
apiVersion: lorafinetune.io/v1alpha1
kind: LoRAFineTune
metadata: {name: kept, namespace: team-a}
spec:
  baseModel: {uri: hf://org/model}
  dataset: {train: {uri: hf://org/data}}
  training: {epochs: 1}
  publish: {store: s3://bucket}
"""


@pytest.fixture
def older_chart(tmp_path: Path) -> Path:
    """The chart of a release whose CRD had no short name and no field ``lora``, and that knew no runtimes."""
    older = tmp_path / "older"
    shutil.copytree(CHART, older)
    (older / "files" / "crds" / f"{RUNTIME.name}.yaml").unlink()
    file = older / "files" / "crds" / f"{RUN.name}.yaml"
    crd = yaml.safe_load(file.read_text())
    del crd["spec"]["names"]["shortNames"]
    root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec = root["properties"]["spec"]
    del spec["properties"]["lora"]
    for schema in (root, spec):
        rules = schema["x-kubernetes-validations"]
        schema["x-kubernetes-validations"] = [rule for rule in rules if ".lora" not in rule["rule"]]
    file.write_text(yaml.safe_dump(crd, sort_keys=False))
    return older


def test_a_release_is_installed_upgraded_and_uninstalled(
    cp: devcluster.ControlPlane, helm: Helm, older_chart: Path
) -> None:
    notes = helm("install", "lora-operator", str(older_chart))
    assert f"kubectl --namespace {SPACE} rollout status deployment/lora-operator" in notes
    wait_for_crds(cp)
    cp.kubectl("apply", "--filename=-", input=MANIFEST)

    # An upgrade brings the CRD up to date too, which Helm does not do for a chart's crds/ folder.
    helm("upgrade", "lora-operator", str(CHART), "--set=operator.logLevel=debug")
    assert cp.kubectl("get", CRD, "--output=jsonpath={.spec.names.shortNames[0]}") == "lft"
    wait_for_crds(cp)
    assert cp.kubectl("get", f"crd/{RUNTIME.name}", "--output=jsonpath={.spec.names.shortNames[0]}") == "clr"
    assert cp.kubectl("get", RUN_KIND, "kept", "--namespace=team-a", "--output=jsonpath={.spec.lora.r}") == "16"
    arguments = "--output=jsonpath={.spec.template.spec.containers[0].args}"
    assert "--log-level=debug" in cp.kubectl("get", "deployment/lora-operator", f"--namespace={SPACE}", arguments)

    helm("uninstall", "lora-operator")
    assert cp.kubectl("get", "deployments,services,serviceaccounts", f"--namespace={SPACE}", "--output=name") == ""
    assert cp.kubectl("get", "clusterroles,clusterrolebindings", LABEL, "--output=name") == ""
    assert cp.kubectl("get", RUN_KIND, "--namespace=team-a", "--output=name") == "lorafinetune.lorafinetune.io/kept\n"

    # The same release can be installed again over the CRD that was kept.
    helm("install", "lora-operator", str(CHART))
    helm("uninstall", "lora-operator")


def may(cp: devcluster.ControlPlane, user: str, verb: str, resource: str, namespace: str) -> bool:
    """Whether RBAC lets a ServiceAccount of the release's namespace do something."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": f"system:serviceaccount:{SPACE}:{user}",
            "resourceAttributes": {
                "verb": verb,
                "group": "batch" if resource == "jobs" else "",
                "resource": resource,
                "namespace": namespace,
            },
        },
    }
    answer = cp.kubectl("create", "--filename=-", "--output=jsonpath={.status.allowed}", input=json.dumps(review))
    return answer == "true"


def test_in_namespaced_mode_the_operator_can_do_nothing_elsewhere(cp: devcluster.ControlPlane, helm: Helm) -> None:
    helm("install", "narrow", str(CHART), "--set=crds.enabled=false", '--set-json=namespaces=["team-a"]')
    assert may(cp, "narrow", "create", "jobs", "team-a")
    assert not may(cp, "narrow", "create", "jobs", "team-b")
    assert not may(cp, "narrow", "get", "secrets", "team-a")
    helm("uninstall", "narrow")
    assert not may(cp, "narrow", "create", "jobs", "team-a")


def test_in_namespaced_mode_the_operator_reads_the_labels_of_its_namespaces_only(
    cp: devcluster.ControlPlane, helm: Helm
) -> None:
    """They decide who may take a runtime; a Role covers the namespace that it is in."""
    helm("install", "narrow", str(CHART), "--set=crds.enabled=false", '--set-json=namespaces=["team-a"]')
    user = f"--as=system:serviceaccount:{SPACE}:narrow"
    assert cp.kubectl("get", "namespace", "team-a", user, "--output=name") == "namespace/team-a\n"
    with pytest.raises(devcluster.DevclusterError, match="forbidden"):
        cp.kubectl("get", "namespace", "team-b", user)
    helm("uninstall", "narrow")


VIEWER = ("--as=ann", "--as-group=system:authenticated", "--as-group=team-a")


def can_i(cp: devcluster.ControlPlane, *request: str) -> bool:
    """What kubectl auth can-i says to somebody who may only view one namespace. It fails where it says no."""
    try:
        return cp.kubectl("auth", "can-i", *request, *VIEWER).strip() == "yes"
    except devcluster.DevclusterError:
        return False


def test_who_may_view_a_namespace_can_read_the_runtimes(cp: devcluster.ControlPlane, helm: Helm) -> None:
    """As remedies tell people to; a RoleBinding to the role view does not cover objects of the cluster."""
    cp.kubectl("apply", f"--filename={ROOT / 'crds'}")
    wait_for_crds(cp)
    cp.kubectl("create", "rolebinding", "ann", "--namespace=team-a", "--clusterrole=view", "--user=ann")
    helm("install", "readers", str(CHART), "--set=crds.enabled=false")
    assert can_i(cp, "list", "clusterloraruntimes.lorafinetune.io")
    assert cp.kubectl("get", "clr", *VIEWER) == ""
    assert not can_i(cp, "update", "clusterloraruntimes.lorafinetune.io")
    assert not can_i(cp, "list", "namespaces")
    helm("upgrade", "readers", str(CHART), "--set=crds.enabled=false", "--set=rbac.runtimeReaders=false")
    assert not can_i(cp, "list", "clusterloraruntimes.lorafinetune.io")
    helm("uninstall", "readers")


def test_a_second_release_is_told_what_it_needs(cp: devcluster.ControlPlane, helm: Helm) -> None:
    """Helm itself says that it cannot take over an object, and not what to do."""
    owner = {"meta.helm.sh/release-name": "first", "meta.helm.sh/release-namespace": "elsewhere"}
    crds = [RUN.name, "clusterloraruntimes.lorafinetune.io"]
    names = [*(f"customresourcedefinition/{name}" for name in crds), "clusterrole/second-view"]
    cp.kubectl("apply", f"--filename={CHART / 'files' / 'crds'}")
    cp.kubectl("create", "clusterrole", "second-view", "--verb=get", "--resource=pods")
    try:
        for name in names:
            cp.kubectl("annotate", "--overwrite", name, *(f"{key}={value}" for key, value in owner.items()))
        install = ("install", "second", str(CHART), "--dry-run=server")
        with pytest.raises(
            AssertionError, match=r"belongs to release first in namespace elsewhere: set crds\.enabled=false"
        ):
            helm(*install, "--set=fullnameOverride=third")
        with pytest.raises(AssertionError, match="give this release another name, or set fullnameOverride"):
            helm(*install, "--set=crds.enabled=false")
        assert "kind: Deployment" in helm(*install, "--set=crds.enabled=false,fullnameOverride=third")
    finally:
        cp.kubectl("delete", *names)
        cp.kubectl("delete", f"--filename={CHART / 'files' / 'crds'}", "--ignore-not-found")

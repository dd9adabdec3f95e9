"""The chart: every value does what it says, nothing else is taken, and it fits the operator that it installs."""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_api import ClusterLoRARuntimeSpec
from lora_api.crd import RESOURCES, build_crd
from lora_operator.kube.rights import GANG_RBAC, RBAC, REVIEW_RBAC, Rule
from lora_operator.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts" / "lora-operator"
GOLDENS = Path(__file__).resolve().parent / "goldens"
UPDATE = "UPDATE_GOLDENS" in os.environ

Render = Callable[..., str]

VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())

# A golden file for each: what the manifests have more and less than with the default values.
CASES: dict[str, list[str]] = {
    "fullname-override": ['fullnameOverride="tuner"'],
    "image": ['image.repository="registry.example.org/ml/operator"', 'image.tag="v2"', 'image.pullPolicy="Always"'],
    "image-digest": [f'image.digest="sha256:{"0" * 64}"', 'image.tag="v2"'],
    "image-pull-secrets": ['imagePullSecrets=[{"name": "registry"}]'],
    "trainer-image": [
        'trainer.image.repository="registry.example.org:5000/trainer"',
        'trainer.image.tag="v3"',
        'trainer.image.pullPolicy="Never"',
    ],
    "trainer-image-digest": [f'trainer.image.digest="sha256:{"1" * 64}"'],
    "default-runtime": [
        'defaultRuntime.spec={"image": "registry.example.org/trainer:v4", "limits": {"maxGPUs": 16}, "gpu": '
        '{"name": "H100 <80>", "memoryGiB": 79.6, "nodeSelector": {"gpu": "h100"}}}'
    ],
    "default-runtime-none": ["defaultRuntime.enabled=false"],
    "namespaces": ['namespaces=["team-a", "team-b"]'],
    "rbac-none": ["rbac.create=false", "rbac.aggregate=false", "rbac.runtimeReaders=false"],
    "rbac-runtime-readers-none": ["rbac.runtimeReaders=false"],
    "service-account": ['serviceAccount.name="tuner"', 'serviceAccount.annotations={"example.org/role": "x"}'],
    "service-account-of-others": ["serviceAccount.create=false", 'serviceAccount.name="given"'],
    "operator": [
        "operator.concurrency=2",
        "operator.apiQps=12.5",
        "operator.apiBurst=30",
        "operator.failureGraceSeconds=5",
        "operator.nodeGraceSeconds=100",
        "operator.startTimeoutSeconds=1000000",
        "operator.restartBackoffSeconds=2.5",
        "operator.preflight=false",
        "operator.preflightTimeoutSeconds=7200",
        "operator.networkPolicy=false",
        "operator.terminationGraceSeconds=3000000",
        "operator.logIntervalSeconds=2",
        "operator.progressIntervalSeconds=3",
        'operator.logLevel="debug"',
        'operator.logFormat="text"',
        'operator.gangScheduler="volcano"',
        'operator.schedulerName="batch"',
    ],
    "coscheduling": ['operator.gangScheduler="coscheduling"'],
    "metrics-network-policy": [
        'metrics.auth="networkPolicy"',
        'metrics.from=[{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]',
    ],
    "metrics-open": ['metrics.auth="none"'],
    "metrics-none": ["metrics.service.enabled=false"],
    "metrics-annotations": ['metrics.service.annotations={"prometheus.io/scrape": "true"}'],
    "resources": ['resources.requests={"cpu": "1"}', 'resources.limits={"memory": "1Gi"}'],
    "placement": [
        'nodeSelector={"pool": "system"}',
        'tolerations=[{"key": "system", "operator": "Exists"}]',
        'affinity={"nodeAffinity": {}}',
        'priorityClassName="system-cluster-critical"',
    ],
    "pod-metadata": ['podLabels={"team": "ml"}', 'podAnnotations={"example.org/scrape": "true"}'],
}
SEEN_ELSEWHERE = {"crds.enabled", "crds.keep", "operator.maxUnchargedRestarts"}
GIVEN_AS_A_WHOLE = ("resources.requests", "resources.limits", "defaultRuntime.spec")


def leaves(values: Any, path: str = "") -> Iterator[str]:
    if isinstance(values, dict) and values and path not in GIVEN_AS_A_WHOLE:
        for name, value in values.items():
            yield from leaves(value, f"{path}.{name}".lstrip("."))
    else:
        yield path


def objects(manifests: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(manifests) if document]


def check_golden(name: str, text: str) -> None:
    """Compares with a golden file, or with UPDATE_GOLDENS in the environment writes it."""
    golden = GOLDENS / name
    if UPDATE:
        GOLDENS.mkdir(exist_ok=True)
        golden.write_text(text)
    assert golden.read_text() == text, "if this is wanted: UPDATE_GOLDENS=1 pytest tests/unit/chart"


@pytest.fixture(scope="module")
def default(render: Render) -> str:
    return render()


def test_helm_finds_nothing_to_complain_about(helm: Callable[..., str]) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART))


def test_the_default_manifests(default: str) -> None:
    check_golden("default.yaml", default)


@pytest.mark.parametrize("case", CASES)
def test_a_value_changes_what_it_says(render: Render, default: str, case: str) -> None:
    changed = render(*CASES[case]).splitlines(keepends=True)
    difference = difflib.unified_diff(default.splitlines(keepends=True), changed, "default", case, n=2)
    text = "".join(difference)
    assert text
    check_golden(f"{case}.diff", text)


def test_every_value_has_a_case() -> None:
    changed = {value.partition("=")[0] for values in CASES.values() for value in values} | SEEN_ELSEWHERE
    assert sorted(changed) == sorted(leaves(VALUES))


def test_the_crds_are_the_generated_ones(render: Render) -> None:
    crds = [item for item in objects(render(crds=True)) if item["kind"] == "CustomResourceDefinition"]
    want = {resource.name: json.loads(json.dumps(build_crd(resource)))["spec"] for resource in RESOURCES}
    assert {crd["metadata"]["name"]: crd["spec"] for crd in crds} == want
    assert [crd["metadata"]["annotations"] for crd in crds] == [{"helm.sh/resource-policy": "keep"}] * len(RESOURCES)


def test_the_crds_go_with_the_release_if_they_are_not_to_be_kept(render: Render) -> None:
    crds = [
        item for item in objects(render("crds.keep=false", crds=True)) if item["kind"] == "CustomResourceDefinition"
    ]
    assert not any("annotations" in crd["metadata"] for crd in crds)


def test_without_the_crds_nothing_else_changes(render: Render, default: str) -> None:
    others = [item for item in objects(render(crds=True)) if item["kind"] != "CustomResourceDefinition"]
    assert others == objects(default)


# -- Values ------------------------------------------------------------------------------------------------------------

REFUSED = {
    "an unknown value": ("replicas=2", "replicas"),
    "an unknown value deep down": ('image.name="x"', "name"),
    "an unknown value of the operator": ("operator.qps=5", "qps"),
    "a tag in the repository's place": ('image.repository="a@sha256:0"', "repository"),
    "no repository": ('trainer.image.repository=""', "repository"),
    "half a digest": ('image.digest="sha256:12"', "digest"),
    "an unknown pull policy": ('image.pullPolicy="Sometimes"', "pullPolicy"),
    "a namespace twice": ('namespaces=["a", "a"]', "namespaces"),
    "namespaces in one string": ('namespaces="a,b"', "namespaces"),
    "an unknown way to guard the metrics": ('metrics.auth="password"', "auth"),
    "a peer of another form": ('metrics.from=[{"cidr": "10.0.0.0/8"}]', "from"),
    "no concurrency": ("operator.concurrency=0", "concurrency"),
    "an unknown gang scheduler": ('operator.gangScheduler="slurm"', "gangScheduler"),
    "an unknown log level": ('operator.logLevel="loud"', "logLevel"),
    "a truth in quotes": ('crds.enabled="yes"', "enabled"),
    "a runtime that is no object": ('defaultRuntime.spec="x"', "spec"),
    "a name that is too long": (f'fullnameOverride="{"a" * 41}"', "fullnameOverride"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_schema_refuses(render: Render, case: str) -> None:
    value, name = REFUSED[case]
    with pytest.raises(ValueError, match=f"values don't meet the specifications of the schema(.|\n)*{name}"):
        render(value)


def test_the_schema_describes_every_value_and_no_other() -> None:
    def described(schema: dict[str, Any], path: str = "") -> Iterator[str]:
        for name, child in schema["properties"].items():
            where = f"{path}.{name}".lstrip(".")
            assert child.get("description"), where
            if "properties" in child:
                assert child["additionalProperties"] is False, where
                yield from described(child, where)
            else:
                yield where

    assert SCHEMA["additionalProperties"] is False
    assert sorted(set(described(SCHEMA)) - {"global"}) == sorted(leaves(VALUES))


def test_the_chart_has_the_version_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]


# -- The operator that it installs -------------------------------------------------------------------------------------


def roles(manifests: str, kind: str) -> list[dict[str, Any]]:
    """The operator's own roles: those that a binding names."""
    documents = objects(manifests)
    bound = {item["roleRef"]["name"] for item in documents if item["kind"] == f"{kind}Binding"}
    return [item for item in documents if item["kind"] == kind and item["metadata"]["name"] in bound]


def granted(manifests: str, kind: str) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for role in roles(manifests, kind)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def rights(rules: Iterable[Rule]) -> set[tuple[str, str, str]]:
    return {(rule.group, resource, verb) for rule in rules for resource in rule.resources for verb in rule.verbs}


def declared(*scopes: bool) -> set[tuple[str, str, str]]:
    """What the operator says it does by default: for objects of namespaces (False), of the cluster (True)."""
    return rights(rule for rule in (*RBAC, *REVIEW_RBAC) if rule.cluster in scopes)


def test_the_operator_may_do_exactly_what_it_declares(default: str) -> None:
    assert granted(default, "ClusterRole") == declared(False, True)
    assert not any("*" in right for right in declared(False, True))


def test_of_runtimes_it_may_write_the_default_one_alone(default: str) -> None:
    rules = [rule for role in roles(default, "ClusterRole") for rule in role["rules"] if "resourceNames" in rule]
    named = [rule for rule in RBAC if rule.names]
    assert [(rule["resources"], rule["resourceNames"], rule["verbs"]) for rule in rules] == [
        ([*rule.resources], [*rule.names], [*rule.verbs]) for rule in named
    ]
    others = [rule for rule in RBAC if rule.cluster and not rule.names]
    assert [rule.verbs for rule in others] == [("get", "list", "watch")]


@pytest.mark.parametrize("scheduler", GANG_RBAC)
def test_it_may_make_podgroups_only_of_the_gang_scheduler_that_is_set(render: Render, scheduler: str) -> None:
    manifests = render(f'operator.gangScheduler="{scheduler}"')
    assert granted(manifests, "ClusterRole") == declared(False, True) | rights([GANG_RBAC[scheduler]])


@pytest.mark.parametrize("case", ["metrics-open", "metrics-network-policy"])
def test_it_may_ask_who_somebody_is_only_where_metrics_need_a_token(render: Render, case: str) -> None:
    manifests = render(*CASES[case])
    assert granted(manifests, "ClusterRole") == declared(False, True) - rights(REVIEW_RBAC)
    assert not [item for item in objects(manifests) if item["metadata"]["name"].endswith("-metrics-reader")]


def test_a_policy_for_metrics_that_names_nobody_lets_nobody_through(render: Render) -> None:
    """An empty list of peers would let everybody through."""
    (policy,) = (item for item in objects(render('metrics.auth="networkPolicy"')) if item["kind"] == "NetworkPolicy")
    assert policy["spec"]["ingress"] == []
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= (
        deployment(render())["template"]["metadata"]["labels"].items()
    )


def test_peers_are_not_ignored_where_no_policy_is_made_of_them(render: Render) -> None:
    with pytest.raises(ValueError, match=r"metrics.from is for metrics.auth=networkPolicy, and metrics.auth is token"):
        render('metrics.from=[{"podSelector": {}}]')


def test_with_namespaces_it_may_do_the_same_in_each_and_nothing_elsewhere(render: Render) -> None:
    manifests = render('namespaces=["team-a", "team-b"]')
    assert granted(manifests, "Role") == declared(False)
    assert granted(manifests, "ClusterRole") == declared(True), "runtimes are objects of the cluster"
    spaces = [(role["metadata"]["namespace"], role["metadata"]["name"]) for role in roles(manifests, "Role")]
    names = ["lora-operator-runs", "lora-operator-gangs", "lora-operator-events"]
    assert sorted(spaces) == sorted((space, name) for space in ("team-a", "team-b") for name in names)


def test_the_operator_reads_no_secret(default: str) -> None:
    assert not any(resource == "secrets" for _, resource, _ in granted(default, "ClusterRole"))


def deployment(manifests: str) -> dict[str, Any]:
    (found,) = (item for item in objects(manifests) if item["kind"] == "Deployment")
    spec: dict[str, Any] = found["spec"]
    return spec


def settings_of(manifests: str) -> Settings:
    return Settings.parse(deployment(manifests)["template"]["spec"]["containers"][0]["args"], {})


def test_the_default_values_are_the_operators_defaults(default: str) -> None:
    found = settings_of(default)
    want = Settings(trainer_image="lora-trainer:0.1.0", log_format="json", default_runtime=found.default_runtime)
    assert found == want
    assert json.loads(found.default_runtime) == VALUES["defaultRuntime"]["spec"]


def test_every_setting_arrives(render: Render) -> None:
    cases = ("operator", "metrics-open", "trainer-image", "namespaces", "default-runtime-none")
    assert settings_of(render(*(value for case in cases for value in CASES[case]))) == Settings(
        trainer_image="registry.example.org:5000/trainer:v3",
        trainer_image_pull_policy="Never",
        namespaces=("team-a", "team-b"),
        concurrency=2,
        api_qps=12.5,
        api_burst=30,
        failure_grace=5.0,
        node_grace=100.0,
        start_timeout=1_000_000.0,
        restart_backoff=2.5,
        termination_grace=3_000_000,
        preflight="off",
        preflight_timeout=7200.0,
        network_policy="off",
        metrics_auth="none",
        gang_scheduler="volcano",
        scheduler_name="batch",
        log_interval=2.0,
        progress_interval=3.0,
        log_level="debug",
        log_format="text",
    )


def test_the_default_runtime_arrives_as_it_was_written(render: Render) -> None:
    found = ClusterLoRARuntimeSpec.model_validate_json(settings_of(render(*CASES["default-runtime"])).default_runtime)
    assert found.gpu is not None
    assert (found.gpu.name, found.gpu.memory_gib) == ("H100 <80>", 79.6)
    assert (found.image, found.limits.max_gpus) == ("registry.example.org/trainer:v4", 16)
    assert [one.key for one in found.pod_template.tolerations] == ["nvidia.com/gpu"], "what is not said stays"


NOT_FOR_THE_CHART = {
    "kubeconfig": "the pod has a service account",
    "http_host": "the probes and Prometheus come from outside the pod",
    "api_timeout": "no cluster needs another",
    "confirm_after": "no cluster needs another",
}


def test_every_setting_is_a_flag_of_the_deployment_or_not_for_the_chart(render: Render) -> None:
    arguments = deployment(render('namespaces=["a"]'))["template"]["spec"]["containers"][0]["args"]
    flags = {re.sub("=.*", "", argument).removeprefix("--").replace("-", "_") for argument in arguments}
    assert flags | set(NOT_FOR_THE_CHART) == {setting.name for setting in fields(Settings)}
    assert flags.isdisjoint(NOT_FOR_THE_CHART)


def test_the_pod_is_restricted(default: str) -> None:
    pod = deployment(default)["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65532
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()


def test_only_one_operator_runs_at_a_time(default: str) -> None:
    spec = deployment(default)
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_the_service_finds_the_pod_and_its_port(default: str) -> None:
    (service,) = (item["spec"] for item in objects(default) if item["kind"] == "Service")
    template = deployment(default)["template"]
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    assert ports[service["ports"][0]["targetPort"]] == 8080


def test_every_object_belongs_to_the_release(render: Render) -> None:
    for item in objects(render(crds=True)):
        assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == "lora-operator"
        namespaced = item["kind"] in ("Deployment", "Service", "ServiceAccount")
        assert item["metadata"].get("namespace") == ("lora-system" if namespaced else None)

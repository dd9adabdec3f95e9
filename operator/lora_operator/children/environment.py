"""The environment of a run's pods: who may set what, and who wins. Pure.

What the operator needs wins over the endpoints of the runtime, these over podTemplate.env, that over the keys of the
Secret, and these over the settings of the libraries. Of podTemplate.env the run's wins over the runtime's, but a run
sets only what is known to be harmless: objects that were stored before a rule of the CRD are read as they are. One
that began before servers came from the runtime keeps its own.
"""

from collections.abc import Mapping
from typing import Any

from lora_api import LoRAFineTune
from lora_api.endpoints import Endpoints
from lora_api.environment import SECRET_KEYS, is_harmless
from lora_api.run import WORK_DIRECTORY
from lora_api.runtime import taken_runtime
from lora_operator.state.upgrades import began_before_endpoints

STORE_ENDPOINT, HUB_ENDPOINT = "AWS_ENDPOINT_URL", "HF_ENDPOINT"

Environment = dict[str, Any]
"""Entries of a container's env by their names."""


def build_env(
    run: LoRAFineTune, own: Mapping[str, Any], settings: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The env of a container, in a fixed order: ``own`` is the operator's, ``settings`` those of the libraries."""
    environment = (
        _values(library_env(run) | dict(settings or {}))
        | _secret_keys(run)
        | _values(template_env(run))
        | _values(endpoint_env(taken_runtime(run).endpoints))
        | {name: value if isinstance(value, Mapping) else {"value": value} for name, value in own.items()}
    )
    return [{"name": name, **entry} for name, entry in sorted(environment.items())]


def _values(values: Mapping[str, str]) -> Environment:
    """Entries for ``values`` as they are: Kubernetes would put a key of the Secret in the place of ``$(NAME)``."""
    return {name: {"value": value.replace("$", "$$")} for name, value in values.items()}


def _secret_keys(run: LoRAFineTune) -> Environment:
    """The keys of the run's Secret. Each may be missing; that the Secret is there is seen to by ``pod``."""
    if run.spec.credentials is None:
        return {}
    keys = [*SECRET_KEYS, *([STORE_ENDPOINT] if began_before_endpoints(run.status) else [])]
    secret = run.spec.credentials.secret_ref.name
    return {key: {"valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}} for key in keys}


def template_env(run: LoRAFineTune) -> dict[str, str]:
    """podTemplate.env of the runtime, and what of the run's own is passed on."""
    own = {variable.name: variable.value for variable in run.spec.pod_template.env if _is_passed_on(run, variable.name)}
    return {variable.name: variable.value for variable in taken_runtime(run).pod_template.env} | own


def find_left_out(run: LoRAFineTune) -> list[str]:
    """Names in the run's podTemplate.env that are not passed on: an older version of the CRD took them."""
    return [variable.name for variable in run.spec.pod_template.env if not _is_passed_on(run, variable.name)]


def _is_passed_on(run: LoRAFineTune, name: str) -> bool:
    """What is harmless; and the hub with which a run began, as its next attempt would not find its model elsewhere."""
    return is_harmless(name) or (name == HUB_ENDPOINT and began_before_endpoints(run.status))


def endpoint_env(endpoints: Endpoints | None) -> dict[str, str]:
    """The variables by which the libraries find the servers of a runtime.

    Those of proxies are written in both ways, as curl, urllib, Go's net/http and Rust's reqwest do not read the same.
    """
    if endpoints is None:
        return {}
    values = {
        STORE_ENDPOINT: endpoints.store,
        HUB_ENDPOINT: endpoints.hub,
        "HTTP_PROXY": endpoints.proxy,
        "HTTPS_PROXY": endpoints.proxy,
        "NO_PROXY": endpoints.no_proxy,
    }
    proxies = {name.lower(): value for name, value in values.items() if name.endswith("_PROXY")}
    return {name: value for name, value in (values | proxies).items() if value is not None}


def library_env(run: LoRAFineTune) -> dict[str, str]:
    """RunSettings of the libraries; everything else wins over them."""
    libraries = {
        "HF_HOME": f"{WORK_DIRECTORY}/hf",
        "HOME": WORK_DIRECTORY,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    return libraries if uses_hub(run) else libraries | {"HF_HUB_OFFLINE": "1"}


def uses_hub(run: LoRAFineTune) -> bool:
    """Whether anything comes from a model hub."""
    return any(uri.startswith("hf://") for uri in source_uris(run))


def source_uris(run: LoRAFineTune) -> list[str]:
    """Where the base model and the records are."""
    dataset = run.spec.dataset
    return [run.spec.base_model.uri, dataset.train.uri, *([dataset.eval.uri] if dataset.eval else [])]

"""The product's CRDs on a real API server."""

import json
from pathlib import Path

import devcluster
from tests.support.wait import eventually

CRDS = Path(__file__).parents[2] / "crds"
GROUP = "lorafinetune.io"


def install_crds(cp: devcluster.ControlPlane) -> None:
    """Applies every CRD and waits until the server serves it."""
    cp.kubectl("apply", f"--filename={CRDS}")
    wait_for_crds(cp)


def wait_for_crds(cp: devcluster.ControlPlane) -> None:
    """Waits until every CRD of the product's group is served.

    Not with ``kubectl wait``: that fails on an object which has no conditions yet (kubectl 1.37).
    """

    def served() -> bool:
        found = json.loads(cp.kubectl("get", "customresourcedefinitions", "--output=json"))["items"]
        ours = [crd for crd in found if crd["spec"]["group"] == GROUP]
        return bool(ours) and all(map(_is_established, ours))

    eventually("the CRDs are served", served)


def _is_established(crd: dict[str, dict[str, list[dict[str, str]]]]) -> bool:
    conditions = crd.get("status", {}).get("conditions") or []
    return any((item["type"], item["status"]) == ("Established", "True") for item in conditions)

"""Writes what the release before writes, as files: ``python -m tests.skew.record`` (after ``make skew``).

One file for each state of a run, with the run and its children as an API server of its own has them once the operator
of that release has brought it there. Only needed again when another release becomes the one before.
"""

import json
import tempfile
from pathlib import Path

import devcluster
from tests.skew.processes import running
from tests.skew.releases import RECORDED, before
from tests.skew.story import bring_about, snapshot
from tests.support.api import Api
from tests.support.install import wait_for_crds
from tests.support.wait import eventually


def main() -> None:
    """Records all states."""
    release, namespace = before(), "team"
    with devcluster.control_plane(controller_manager=True) as cp, tempfile.TemporaryDirectory() as scratch:
        cp.kubectl("apply", f"--filename={release.crds}", "--server-side")
        wait_for_crds(cp)
        api = Api(cp.kubeconfig)
        api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
        eventually("the default service account", lambda: api.items(accounts))
        with running(release, cp.kubeconfig, namespace, Path(scratch) / "log"):
            for state, run in bring_about(api, namespace).items():
                text = json.dumps(snapshot(run), indent=1, sort_keys=True) + "\n"
                (RECORDED / f"{state}.json").write_text(text)


if __name__ == "__main__":
    main()

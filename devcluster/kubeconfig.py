"""Write kubeconfig files (as JSON, which is YAML) that carry all they need."""

import base64
import json
from pathlib import Path

from devcluster.pki import Pair


def _data(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def write_kubeconfig(path: Path, *, cluster: str, server: str, authority: Path, user: str, pair: Pair) -> Path:
    """Write a kubeconfig with one context, readable by its owner only; return its path."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": cluster, "cluster": {"server": server, "certificate-authority-data": _data(authority)}}],
        "users": [
            {
                "name": user,
                "user": {"client-certificate-data": _data(pair.certificate), "client-key-data": _data(pair.key)},
            }
        ],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": user}}],
        "current-context": cluster,
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path

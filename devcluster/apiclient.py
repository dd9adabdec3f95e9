"""Ask the API server whether it is ready, and run kubectl against it."""

import http.client
import ssl
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from devcluster.pki import Pair
from devcluster.progress import DevclusterError


class ApiClient:
    """An administrator's view of one API server."""

    def __init__(self, url: str, authority: Path, pair: Pair, kubectl: Path, kubeconfig: Path) -> None:
        self._context = ssl.create_default_context(cafile=str(authority))
        self._context.load_cert_chain(pair.certificate, pair.key)
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 443)
        self._kubectl = kubectl
        self._kubeconfig = kubeconfig

    def answers(self, path: str) -> bool:
        """Return whether a GET of ``path`` gives 200; False as well where nothing listens."""
        host, port = self._address
        connection = http.client.HTTPSConnection(host, port, context=self._context, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def ready(self) -> bool:
        """Return whether the server is ready for work."""
        # The namespace is made shortly after the server calls itself ready.
        return self.answers("/readyz") and self.answers("/api/v1/namespaces/default")

    def kubectl(self, *args: str, input: str | None = None, timeout: float = 60) -> str:  # noqa: A002 - as subprocess.run has it
        """Run kubectl and return what it prints; raise :class:`DevclusterError` with its message."""
        return run_kubectl(self._kubectl, self._kubeconfig, *args, input=input, timeout=timeout)


def run_kubectl(kubectl: Path, kubeconfig: Path, *args: str, input: str | None = None, timeout: float = 60) -> str:  # noqa: A002 - as subprocess.run has it
    """Run kubectl with a kubeconfig; return what it prints, or raise with its message."""
    argv = [str(kubectl), f"--kubeconfig={kubeconfig}", *args]
    try:
        done = subprocess.run(argv, input=input, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise DevclusterError(f"kubectl {' '.join(args)}: not done after {timeout:.0f} s") from None
    if done.returncode != 0:
        raise DevclusterError(f"kubectl {' '.join(args)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout

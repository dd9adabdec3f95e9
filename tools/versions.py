"""Runs the control-plane tests on older versions of Kubernetes: ``python tools/versions.py 1.29 1.33``.

Each version is built once, into the cache. All versions are run, and then it is told which had failures.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/controlplane", "tests/security/controlplane", "tests/devcluster/test_control_plane.py", "tests/skew")


def main(versions: list[str]) -> int:
    """Runs the tests on ``versions``; returns 1 if any of them failed."""
    failed = []
    for number, version in enumerate(versions, 1):
        print(f"==> Kubernetes {version} ({number} of {len(versions)})", flush=True)
        build = [sys.executable, "-m", "devcluster", "binaries", f"--only=kubernetes-{version}", "--only=tools"]
        tests = [sys.executable, "-m", "pytest", *TESTS, "-m", "not cluster", "-n", "2", "--dist", "loadscope"]
        for command in (build, tests):
            environment = {**os.environ, "LORA_KUBERNETES": version}
            if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
                failed.append(version)
                break
    print(f"==> failed on Kubernetes {', '.join(failed)}" if failed else "==> all passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

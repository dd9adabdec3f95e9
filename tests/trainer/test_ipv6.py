"""A gang meets, and sums its gradients, where there is no IPv4: in a network namespace of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.runs import ROOT, SOURCES

pytestmark = pytest.mark.trainer

NAME = "run-1-0.run-1.team.svc"
PORT = 29400

NO_IPV4 = """
set -e
ip link set lo up
ip address delete 127.0.0.1/8 dev lo
ip address add fd00::1/128 dev lo nodad
mount --bind "$1" /etc/hosts
hostname run-1-0 2>/dev/null || true
shift
RANK=1 "$@" & RANK=0 "$@"
wait $!
"""
"""What the kubelet of a cluster with IPv6 alone does: a name for the pod, and no address of IPv4."""

WORKER = """
import os, socket
import torch
import torch.distributed as dist
from lora_trainer.parallel import start_process_group
from lora_trainer.settings import read_place, rendezvous_address

try:
    socket.create_connection(("127.0.0.1", 1), timeout=5)
except OSError as error:
    assert error.errno == 101, error  # ENETUNREACH: a connection that is refused would be one of IPv4
start_process_group(read_place(), torch.device("cpu"), 60.0)
word = dist.TCPStore(*rendezvous_address(), 2, is_master=False)
found = torch.ones(4) * (dist.get_rank() + 1)
dist.all_reduce(found)
assert found.tolist() == [3.0] * 4
dist.barrier()
dist.destroy_process_group()
print("met", os.environ["RANK"])
"""


def test_a_gang_needs_no_ipv4(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"::1 localhost\nfd00::1 run-1-0 {NAME}\n")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*SOURCES, ROOT])),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": NAME,
        "MASTER_PORT": str(PORT),
        "LORA_RENDEZVOUS_SECONDS": "60",
    }
    apart = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts"]
    command = [*apart, "sh", "-c", NO_IPV4, "sh", str(hosts), sys.executable, "-c", WORKER]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert sorted(done.stdout.split("\n")) == ["", "met 0", "met 1"]

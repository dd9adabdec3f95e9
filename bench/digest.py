"""How fast packed weights are digested, on one CPU core and on a GPU where there is one: ``python -m bench.digest``."""

import sys
import time

import torch

from lora_trainer.digest import digest

SIZE = 256 * 2**20
ROUNDS = 10


def measure(device: torch.device) -> float:
    """Bytes a second, the best of ``ROUNDS``: of the core's own time on a CPU, which others may share."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    data = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, device=device)
    taken = []
    for _ in range(ROUNDS):
        before = clock()
        int(digest(data))
        taken.append(clock() - before)
    return SIZE / min(taken)


if __name__ == "__main__":
    torch.set_num_threads(1)
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for one in devices:
        sys.stdout.write(f"{one.type}: {measure(one) / 1e9:.1f} GB/s\n")

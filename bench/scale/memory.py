"""What the machine takes for memory that was left alone for a moment.

On a virtual machine whose host is busy, a page costs many times more to touch when it has not been touched for a tenth
of a second. A server that answers ten requests a second pays that for every page it needs, whoever asks.
"""

import mmap
import statistics
import time

_BYTES = 32 << 20
_PAGE = 4096
_TIMES = 9


def measure_memory(pause: float) -> dict[str, float]:
    """Microseconds to touch a page of 4 KiB: again at once, and after ``pause`` seconds."""
    with mmap.mmap(-1, _BYTES) as memory:
        for place in range(0, _BYTES, _PAGE):
            memory[place] = 1
        return {"touchedAgainUs": _touch(memory, 0.0), "touchedLaterUs": _touch(memory, pause)}


def _touch(memory: mmap.mmap, pause: float) -> float:
    """Median over some rounds."""
    rounds = []
    for _ in range(_TIMES):
        time.sleep(pause)
        begin = time.perf_counter()
        for place in range(0, _BYTES, _PAGE):
            memory[place]
        rounds.append(time.perf_counter() - begin)
    return round(1e6 * statistics.median(rounds) / (_BYTES // _PAGE), 2)

"""Files that are not what they look like: links that lead out of a claim, pipes, sockets, devices.

Who may write to a claim may not read what else is in the pod: the Secret's keys in /proc/self/environ, the run
document, another claim. Links inside of a claim are good: the cache of the model hub is made of them.
"""

import os
import stat
from pathlib import Path

from lora_api.run import PVC_ROOT

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def claim_of(path: Path) -> Path | None:
    """Where the claim that ``path`` lies in is mounted; ``None`` outside of claims."""
    root = Path(PVC_ROOT)
    if not path.is_relative_to(root) or path == root:
        return None
    return root / path.relative_to(root).parts[0]


def find_problem(path: Path) -> str | None:
    """Why ``path`` must not be opened as a file, for people; ``None``: it may be."""
    problem = find_way_out(path)
    if problem is not None:
        return problem
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"is no file: {os.strerror(error.errno or 0)}"
    if stat.S_ISREG(mode):
        return None
    return f"is no file, but {_KINDS.get(stat.S_IFMT(mode), 'something else')}"


def find_way_out(path: Path) -> str | None:
    """Why ``path``, a file or a directory, leads out of its claim or nowhere; ``None``: it does not."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself (Python 3.11)
        return "is a link that leads nowhere" if path.is_symlink() else f"is not there: {_words(error)}"
    claim = claim_of(path)
    if claim is None or real.is_relative_to(claim.resolve()):
        return None
    return f"is, or lies behind, a link that leads out of the claim {claim.name}; copy there what it leads to"


def _words(error: BaseException) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)

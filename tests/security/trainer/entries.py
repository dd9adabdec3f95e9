"""What a forked training process runs in place of the trainer, to be watched while it works."""

import json
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any


def watch_pickles(run_file: Path) -> int:
    """A real worker that notes what it unpickles and who asked for it, in a file beside the run document.

    ``classes`` are those that pickles named (the interpreter's audit event, which sees the pickle modules in C too);
    ``objects`` are the object collectives of torch, by which pickles of peers come.
    """
    from torch.distributed import distributed_c10d

    from lora_trainer.worker import run_worker

    found: dict[str, list[str]] = {"classes": [], "objects": []}

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            found["classes"].append(f"{arguments[0]}.{arguments[1]} for {asker(sys._getframe(1))}")

    def watch(name: str) -> None:
        usual = getattr(distributed_c10d, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            found["objects"].append(f"{name} for {asker(sys._getframe(1))}")
            return usual(*arguments, **keywords)

        setattr(distributed_c10d, name, watched)

    sys.addaudithook(audit)
    watch("_object_to_tensor")
    watch("_tensor_to_object")
    try:
        return run_worker(run_file)
    finally:
        path = run_file.with_name(f"unpickled-{os.environ['RANK']}.json")
        path.write_text(json.dumps({kind: sorted(set(names)) for kind, names in found.items()}))


def asker(frame: FrameType | None) -> str:
    """The nearest function of a package that is not a pickle module or torch's own."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "?")
        if module.split(".")[0] not in {"pickle", "dill", "copyreg", "torch", "tests", "multiprocess"}:
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "the interpreter"

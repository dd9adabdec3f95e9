"""Command line of the trainer: ``python -m lora_trainer``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lora_api.failures import FAILURE_RULES, RULES
from lora_api.run import RUN_FILE
from lora_api.sources import DataFormat
from lora_api.training import DPO, DPOLoss, QuantizationType

EXIT_CODES = "exit codes:\n  0 success\n" + "\n".join(
    f"  {rule.exit_code} {rule.failure_class.value}: {rule.meaning}" for rule in FAILURE_RULES if rule.exit_code
)

SWEEP = """\
Deletes checkpoints below STORE that have expired (checkpoint.retainHours) and
whose run is not alive. Published adapters are left alone. The store is reached
as by a run: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY. FILE has a line for each LoRAFineTune of each cluster
that writes to STORE, with its uid and its phase:

  kubectl get lorafinetunes --all-namespaces --no-headers \\
    --output=custom-columns=UID:.metadata.uid,PHASE:.status.phase

A run that is not in it is taken to be deleted. Those that have Failed or
Succeeded lose their checkpoints too, once they have expired.
docs/checkpoints.md says when that is.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="lora_trainer",
        description="Fine-tunes a language model with QLoRA on one or more nodes and publishes the adapter.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    launch = commands.add_parser(
        "launch",
        help="run this pod's part of a fine-tune: one training process per GPU, or one on the CPU",
        description="Starts the training processes of this pod and waits for them. The gang's shape comes from "
        "PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, MASTER_ADDR and MASTER_PORT; without PET_NNODES all processes "
        "of the run are started here. Scratch files go to LORA_WORK (default /scratch), the termination message to "
        "LORA_TERMINATION_LOG (default /dev/termination-log).",
    )
    launch.add_argument("run", type=Path, nargs="?", default=Path(RUN_FILE), help="run document (default: %(default)s)")

    train = commands.add_parser(
        "train",
        help="run one training process; launch starts it",
        description="Runs one training process. Its place comes from RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
        "MASTER_PORT, as launch sets them; without them it is alone.",
    )
    train.add_argument("run", type=Path, help="run document")

    evaluate = commands.add_parser(
        "evaluate",
        help="measure a base model, with or without an adapter, on a dataset",
        description="Evaluation loss on a dataset and, for records with an answer, the share of answers that are "
        "exactly right (greedy generation). A published adapter is measured by its run's own yardstick, which its "
        "manifest.json has: base model, records and what of them counts, their length, types, objective; what is "
        "given here wins. Preference pairs (objective dpo): their loss, and the margin and accuracy of the rewards, "
        "against the base model without the adapter. In one process, on a GPU if there is one.",
    )
    evaluate.add_argument("--model", help="base model: s3://, hf://, pvc:// or file:// URI (default: that of the run)")
    evaluate.add_argument("--data", help="dataset: s3://, hf://, pvc:// or file:// URI (default: that of the run)")
    evaluate.add_argument("--adapter", help="adapter's directory: s3:// or file:// URI; none: the base model alone")
    evaluate.add_argument(
        "--base-only", action="store_true", help="measure the base model alone, as it would be with the adapter"
    )
    evaluate.add_argument("--objective", choices=("sft", "dpo"), help="default: that of the run, else sft")
    preferences = {name: field.default for name, field in DPO.model_fields.items()}
    default = "of dpo (default: that of the run, else {})"
    evaluate.add_argument("--beta", type=float, help=default.format(preferences["beta"]))
    evaluate.add_argument("--loss", choices=get_args(DPOLoss), help=default.format(preferences["loss"]))
    evaluate.add_argument("--label-smoothing", type=float, help=default.format(preferences["label_smoothing"]))
    evaluate.add_argument("--format", choices=get_args(DataFormat), help="default: that of the run, else auto")
    evaluate.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="a field's name in the file; may be repeated",
    )
    evaluate.add_argument("--system-prompt", help="first message of conversations that have no system message")
    evaluate.add_argument(
        "--quantization", choices=get_args(QuantizationType), help="default: that of the run, else nf4"
    )
    evaluate.add_argument("--max-seq-length", type=int, help="tokens of a record (default: that of the run, else 2048)")
    evaluate.add_argument("--batch-size", type=int, default=32, help="answers at a time (default: %(default)s)")
    evaluate.add_argument("--limit", type=int, help="records to use at most (default: all)")
    evaluate.add_argument("--max-new-tokens", type=int, default=64, help="tokens of an answer (default: %(default)s)")
    evaluate.add_argument("--samples", type=int, default=2, help="answers to show (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON document")

    estimate = commands.add_parser(
        "estimate",
        help="plan the GPU memory of a run, before it runs",
        description="Plans the memory of each GPU, part by part, for a LoRAFineTune manifest. Needs neither a GPU nor "
        "the model's weights. docs/memory.md says what the numbers mean.",
        epilog="exit codes:\n  0 it fits\n  1 it does not fit\n  2 the command line is wrong\n  64 BadSpec: the "
        "manifest or config.json cannot be used",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    estimate.add_argument("-f", "--filename", type=Path, required=True, help="manifest of a LoRAFineTune (YAML)")
    estimate.add_argument("--model-config", type=Path, required=True, help="config.json of the base model")
    estimate.add_argument("--gpu-memory-gib", type=float, required=True, help="memory of one GPU, in GiB")
    estimate.add_argument("--json", action="store_true", help="print one JSON document")

    preflight = commands.add_parser(
        "preflight",
        help="check a run before it has a GPU: sources, records, store, memory",
        description="Pins the model and the data, reads the headers of the model's files, tokenizes and checks every "
        "record, plans the memory, and writes and deletes a probe object in the store. Downloads no weights. Prints "
        "one JSON document on standard output, and a summary on standard error. docs/preflight.md says what is in it.",
    )
    preflight.add_argument(
        "run", type=Path, nargs="?", default=Path(RUN_FILE), help="run document (default: %(default)s)"
    )
    preflight.add_argument(
        "--gpu-memory-gib", type=float, help="memory of one GPU, in GiB (default: device of the run)"
    )

    sweep = commands.add_parser(
        "sweep",
        help="delete expired checkpoints of runs that have failed or were deleted",
        description=SWEEP,
        epilog="exit codes:\n  0 done\n  2 the command line is wrong\n  64 BadSpec: FILE or STORE cannot be used\n"
        "  67 AuthDenied: the store refused the credentials\n  74 StoreUnavailable: the store did not answer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("store", metavar="STORE", help="s3://BUCKET/PREFIX, as in publish.store of the runs")
    sweep.add_argument("--alive", required=True, metavar="FILE", help="the runs that there are; - is standard input")
    sweep.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")
    sweep.add_argument(
        "--retain-hours",
        type=_hours,
        default=168,
        metavar="HOURS",
        help="for checkpoints that do not say it themselves, from when they were saved (default: %(default)s)",
    )
    sweep.add_argument("--allow-empty", action="store_true", help="take a FILE without any run")
    return parser


def _hours(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 87_600:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hours from 1 to 87600")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if arguments.command == "launch":
        from lora_trainer.launch import launch

        return launch(arguments.run)
    if arguments.command == "train":
        from lora_trainer.worker import end_process, run_worker

        end_process(run_worker(arguments.run))
    if arguments.command == "estimate":
        return _estimate(arguments)
    if arguments.command == "preflight":
        from lora_trainer.preflightcli import run_preflight

        return run_preflight(arguments.run, arguments.gpu_memory_gib)
    if arguments.command == "sweep":
        from lora_trainer.sweepcli import run_sweep

        return run_sweep(
            arguments.store,
            arguments.alive,
            arguments.retain_hours,
            dry=arguments.dry_run,
            allow_empty=arguments.allow_empty,
        )
    return _evaluate(arguments)


def _estimate(arguments: argparse.Namespace) -> int:
    from lora_trainer.errors import BadSpecError
    from lora_trainer.estimate import DOES_NOT_FIT, estimate

    try:
        found = estimate(arguments.filename, arguments.model_config, arguments.gpu_memory_gib)
    except BadSpecError as error:
        sys.stderr.write(f"{error.failure_class.value}: {error}\n")
        return RULES[error.failure_class].exit_code or DOES_NOT_FIT
    print(json.dumps(found.to_wire()) if arguments.json else found.to_text())
    return 0 if found.fits else DOES_NOT_FIT


def _evaluate(arguments: argparse.Namespace) -> int:
    from lora_trainer.measure import Measurement, measure
    from lora_trainer.worker import exit_code, quiet_libraries

    quiet_libraries()
    from lora_trainer.errors import classify, describe

    try:
        found: Measurement = measure(
            adapter=arguments.adapter,
            base_only=arguments.base_only,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            max_new_tokens=arguments.max_new_tokens,
            model=arguments.model,
            data=arguments.data,
            format=arguments.format,
            columns=dict(text.partition("=")[::2] for text in arguments.column),
            system_prompt=arguments.system_prompt,
            quantization=arguments.quantization,
            max_seq_length=arguments.max_seq_length,
            objective=arguments.objective,
            dpo=_dpo(arguments),
        )
    except Exception as error:  # noqa: BLE001 - classified
        sys.stderr.write(f"{classify(error).value}: {describe(error)}\n")
        return exit_code(classify(error))
    if arguments.json:
        print(json.dumps(found.to_wire(arguments.samples)))
    else:
        print(found.to_text(arguments.samples))
    return 0


def _dpo(arguments: argparse.Namespace) -> dict[str, object]:
    """The settings of objective dpo that are given."""
    given = {"beta": arguments.beta, "loss": arguments.loss, "labelSmoothing": arguments.label_smoothing}
    return {name: value for name, value in given.items() if value is not None}

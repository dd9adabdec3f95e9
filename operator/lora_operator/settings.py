"""Settings: command line flags, each with an environment variable as its default.

``Settings.parse`` is pure: it takes the arguments and the environment, and returns a frozen value.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pydantic import ValidationError

from lora_api import ClusterLoRARuntimeSpec

DEFAULT_TRAINER_IMAGE = "lora-trainer:dev"


def _setting(default: Any, env: str, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"env": env, "help": text, "choices": choices})


@dataclass(frozen=True)
class RunSettings:
    """What holds for one run: what an administrator decides, as far as its runtime says nothing. Times in seconds."""

    trainer_image: str = _setting(DEFAULT_TRAINER_IMAGE, "LORA_TRAINER_IMAGE", "Image of the training pods.")
    trainer_image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = _setting(
        "IfNotPresent",
        "LORA_TRAINER_IMAGE_PULL_POLICY",
        "When the nodes pull the trainer's image.",
        ("Always", "IfNotPresent", "Never"),
    )
    gang_scheduler: Literal["none", "volcano", "coscheduling"] = _setting(
        "none",
        "LORA_GANG_SCHEDULER",
        "Scheduler that is told of each gang by a PodGroup, so that it starts all pods or none.",
        ("none", "volcano", "coscheduling"),
    )
    scheduler_name: str = _setting(
        "", "LORA_SCHEDULER_NAME", "Name of the gang scheduler in the pods. Empty: the usual one of gang-scheduler."
    )
    failure_grace: float = _setting(
        20.0, "LORA_FAILURE_GRACE", "Time that the other pods of a gang get for their last words after one failed."
    )
    node_grace: float = _setting(
        90.0,
        "LORA_NODE_GRACE",
        "Time that a pod gets which its peers have lost and which says nothing. Kubernetes needs about 50 to notice "
        "that a node is gone.",
    )
    start_timeout: float = _setting(
        600.0,
        "LORA_START_TIMEOUT",
        "Time after which a run fails whose image cannot be pulled or whose pods cannot be created or configured, and "
        "an attempt ends whose pods have nodes and do not start.",
    )
    preflight: Literal["on", "off"] = _setting(
        "on",
        "LORA_PREFLIGHT",
        "Check model, records, store and memory in a pod without a GPU before the first attempt.",
        ("on", "off"),
    )
    preflight_timeout: float = _setting(
        3600.0,
        "LORA_PREFLIGHT_TIMEOUT",
        "Time after which a preflight that does not end has failed, or an attempt one of whose init containers "
        "does not.",
    )
    network_policy: Literal["on", "off"] = _setting(
        "on",
        "LORA_NETWORK_POLICY",
        "Make a NetworkPolicy for each run, by which only its own pods reach its pods (docs/network.md).",
        ("on", "off"),
    )
    termination_grace: int = _setting(
        120, "LORA_TERMINATION_GRACE", "Time that a pod has between SIGTERM and SIGKILL, to save a checkpoint."
    )
    restart_backoff: float = _setting(
        10.0,
        "LORA_RESTART_BACKOFF",
        "Pause before the first restart after a complete checkpoint. Each further one doubles it, up to 10 minutes.",
    )
    log_interval: float = _setting(10.0, "LORA_LOG_INTERVAL", "Shortest time between two looks at a run's log.")
    progress_interval: float = _setting(
        15.0, "LORA_PROGRESS_INTERVAL", "Shortest time between two writes of a run's progress."
    )

    def for_runs(self) -> "RunSettings":
        """These settings alone, without any that a subclass adds."""
        return RunSettings(**{setting.name: getattr(self, setting.name) for setting in fields(RunSettings)})


@dataclass(frozen=True)
class Settings(RunSettings):
    """All that an administrator decides: what holds for each run, and for the operator itself.

    A field ``trainer_image`` is the flag ``--trainer-image``, and ``LORA_TRAINER_IMAGE`` in the environment.
    """

    default_runtime: str = _setting(
        "",
        "LORA_DEFAULT_RUNTIME",
        "Spec (JSON) of the ClusterLoRARuntime called default, which the operator applies when it starts. Empty: it "
        "leaves that alone.",
    )
    namespaces: tuple[str, ...] = _setting(
        (), "LORA_NAMESPACES", "Namespaces to serve, with commas between them. Empty: all namespaces."
    )
    kubeconfig: str = _setting(
        "", "LORA_KUBECONFIG", "Kubeconfig file. Empty: the pod's service account, else $KUBECONFIG or ~/.kube/config."
    )
    http_host: str = _setting("", "LORA_HTTP_HOST", "Address to listen on. Empty: all of them, of IPv4 and of IPv6.")
    http_port: int = _setting(8080, "LORA_HTTP_PORT", "Port of /healthz, /readyz and /metrics. 0 picks a free one.")
    concurrency: int = _setting(8, "LORA_CONCURRENCY", "Runs that are looked at at the same time.")
    api_qps: float = _setting(500.0, "LORA_API_QPS", "Calls a second to the API server, watches aside.")
    api_burst: int = _setting(1000, "LORA_API_BURST", "Calls that may be made at once before api-qps holds.")
    api_timeout: float = _setting(30.0, "LORA_API_TIMEOUT", "Longest wait for an answer of the API server.")
    metrics_auth: Literal["token", "networkPolicy", "none"] = _setting(
        "token",
        "LORA_METRICS_AUTH",
        "Who may read /metrics. token: those whom the API server lets get it (TokenReview, SubjectAccessReview). "
        "networkPolicy: those whom a NetworkPolicy lets through. none: everybody.",
        ("token", "networkPolicy", "none"),
    )
    confirm_after: float = _setting(
        30.0, "LORA_CONFIRM_AFTER", "Time after a new watch at which objects it has not shown are looked up."
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "LORA_LOG_LEVEL", "Least severe messages to log.", ("debug", "info", "warning", "error")
    )
    log_format: Literal["text", "json"] = _setting("text", "LORA_LOG_FORMAT", "Form of the log.", ("text", "json"))

    @classmethod
    def parse(cls, arguments: Sequence[str], environment: Mapping[str, str]) -> "Settings":
        """Settings of ``arguments`` over ``environment`` over defaults.

        Raises:
            SystemExit: after --help, or with a message about an argument that is wrong.
        """
        parser = argparse.ArgumentParser(
            prog="lora-operator",
            description="Runs the LoRAFineTune objects of a Kubernetes cluster.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="Times are in seconds. A flag wins over its environment variable.",
        )
        for setting in fields(cls):
            metadata = setting.metadata
            text = environment.get(metadata["env"])
            shown = "" if setting.name == "namespaces" else setting.default
            parser.add_argument(
                "--" + setting.name.replace("_", "-"),
                type=_reader(setting.name, setting.default),
                default=setting.default if text is None else text,
                choices=metadata["choices"] or None,
                metavar=None if metadata["choices"] else "VALUE",
                help=f"{metadata['help']} ({metadata['env']}, default: {shown!r})".replace("%", "%%"),
            )
        return cls(**vars(parser.parse_args(arguments)))


def _reader(name: str, default: Any) -> Any:
    """The function that turns an argument's text into the type of ``default``."""
    if name == "default_runtime":
        return _runtime_spec
    if isinstance(default, tuple):
        return _names
    if isinstance(default, str):
        return str
    return _Number(name, type(default))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _runtime_spec(text: str) -> str:
    """``text``, once it has been found to be a spec."""
    try:
        ClusterLoRARuntimeSpec.model_validate_json(text or "{}")
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in wrong["loc"])
        raise argparse.ArgumentTypeError(f"{where}: {wrong['msg']}" if where else wrong["msg"]) from error
    return text


class _Number:
    """Reads a number that is not negative."""

    def __init__(self, name: str, kind: type[float] | type[int]) -> None:
        self._kind = kind
        self.__name__ = f"{kind.__name__} that is 0 or more"

    def __call__(self, text: str) -> float | int:
        value = self._kind(text)
        if value < 0:
            raise ValueError(text)
        return value

"""The process: settings, log, endpoints, operator."""

import asyncio
import gc
import logging
import os
import signal
import sys
from typing import cast

import uvloop

from lora_operator.logformat import configure_logging
from lora_operator.manager.app import Operator
from lora_operator.manager.endpoints import serve
from lora_operator.manager.gate import open_gate
from lora_operator.settings import Settings
from lora_operator.watched.fill import StartError

logger = logging.getLogger(__name__)

_COLLECT_AFTER = (20_000, 20, 50)
"""New objects and younger collections after which Python looks for cycles, of which there are few here. Its default of
700 new objects took a quarter of a start with thousands of runs, and no memory was saved by it."""


def main() -> None:
    """Runs the operator until SIGTERM or SIGINT."""
    settings = Settings.parse(sys.argv[1:], os.environ)
    configure_logging(settings)
    gc.set_threshold(*_COLLECT_AFTER)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_run(settings))
        except StartError as error:
            logger.critical("%s", error)
            sys.exit(1)
        except asyncio.CancelledError:
            logger.info("asked to end before the watches began")


async def _run(settings: Settings) -> None:
    _end_on_signals()
    operator = Operator(settings)
    async with (
        open_gate(settings, operator.count_call) as gate,
        serve(operator, gate, settings.http_host, settings.http_port) as port,
    ):
        logger.info("listening on port %d", port)
        await operator.run(asyncio.Event())


def _end_on_signals() -> None:
    """Cancels the running task on SIGTERM and SIGINT, until kopf puts its own handlers in place of these.

    The kernel ignores a signal that process 1 of a container does not handle: the first lists and looks, which may take
    minutes, would hold up an upgrade until the kubelet kills the process.
    """
    task = cast("asyncio.Task[None]", asyncio.current_task())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)

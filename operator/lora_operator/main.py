"""The process: settings, log, endpoints, operator."""

import asyncio
import gc
import logging
import os
import sys

import uvloop

from lora_operator.app import Operator
from lora_operator.endpoints import serve
from lora_operator.fill import StartError
from lora_operator.logs import configure_logging
from lora_operator.settings import Settings

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


async def _run(settings: Settings) -> None:
    operator = Operator(settings)
    async with serve(operator, settings.http_host, settings.http_port) as port:
        logger.info("listening on port %d", port)
        await operator.run(asyncio.Event())

"""The process: settings, log, endpoints, operator."""

import asyncio
import logging
import os
import sys

import uvloop

from lora_operator.app import Operator
from lora_operator.endpoints import serve
from lora_operator.logs import configure_logging
from lora_operator.settings import Settings

logger = logging.getLogger(__name__)


def main() -> None:
    """Runs the operator until SIGTERM or SIGINT."""
    settings = Settings.parse(sys.argv[1:], os.environ)
    configure_logging(settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(settings))


async def _run(settings: Settings) -> None:
    operator = Operator(settings)
    async with serve(operator, settings.http_host, settings.http_port) as port:
        logger.info("listening on port %d", port)
        await operator.run(asyncio.Event())

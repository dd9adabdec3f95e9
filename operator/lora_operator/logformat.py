"""The log: one line a message, as text or as JSON."""

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

from lora_operator.settings import Settings

current_run: ContextVar[str] = ContextVar("current_run", default="")
"""NAMESPACE/NAME of the run that the current task looks at."""


class JsonFormatter(logging.Formatter):
    """A message as one JSON object, with the run that it is about."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if run := current_run.get():
            line["run"] = run
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(settings: Settings) -> None:
    """Sends the log to standard error. kopf's own messages matter from warnings up only."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    if settings.log_level != "debug":
        logging.getLogger("kopf").setLevel(logging.WARNING)

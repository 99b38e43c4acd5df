"""Logging as JSON objects, one per line, on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any

# Libraries whose debug and info messages do not help an operator.
QUIET_LOGGERS = (
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
    "urllib3",
    "filelock",
    "asyncio",
    "uvicorn.error",
)


MAX_REPEATS, REPEAT_WINDOW_S = 100, 10.0  # lines of one kind in this period
MAX_KINDS = 1000


class RateLimit(logging.Filter):
    """Drop records of a kind that repeats too often, and count them in the next one that passes.

    A kind is a logger, a level, the event before its arguments are filled in, and the status of a
    response. Responses without an error are never dropped.
    """

    def __init__(self):
        super().__init__()
        self._kinds: dict[tuple, list] = {}  # kind: [begin of the period, lines, dropped lines]

    def filter(self, record: logging.LogRecord) -> bool:
        fields = getattr(record, "fields", {})
        status = fields.get("status", 0)
        if record.levelno < logging.WARNING and 0 < status < 400:
            return True
        kind = (record.name, record.levelno, str(record.msg)[:200], status)
        now = time.monotonic()
        if len(self._kinds) > MAX_KINDS:
            self._kinds.clear()
        count = self._kinds.setdefault(kind, [now, 0, 0])
        if now - count[0] > REPEAT_WINDOW_S:
            count[0], count[1] = now, 0
        count[1] += 1
        if count[1] > MAX_REPEATS:
            count[2] += 1
            return False
        if count[2]:
            record.fields = {**fields, "suppressed": count[2]}
            count[2] = 0
        return True


class JsonLines(logging.Formatter):
    """Format a record as {"time", "level", "event", ...}, plus the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.name != "lamoe.serve":
            line["logger"] = record.name
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        # ASCII only, so that text from a request cannot send control sequences to a terminal
        return json.dumps(line, ensure_ascii=True, default=str)


def configure(level: str) -> None:
    """Send all log records, including those of libraries, to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(RateLimit())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, getattr(logging, level.upper())))

"""HTTP to engines, teachers and judges: many requests in flight, patience with what may pass, an end where nothing mends."""

from __future__ import annotations

from understudy.wire.address import check_address, check_variable, read_key, without_key
from understudy.wire.client import Patience, Wire
from understudy.wire.reply import BadReply, Refused, Reply

__all__ = [
    "BadReply",
    "Patience",
    "Refused",
    "Reply",
    "Wire",
    "check_address",
    "check_variable",
    "read_key",
    "without_key",
]

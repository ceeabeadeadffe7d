"""HTTP to engines, teachers and judges: many requests in flight, patience with what may pass, an end where nothing mends."""

from __future__ import annotations

from understudy.http.address import check_address, check_variable, read_key, without_key
from understudy.http.client import Patience, Wire
from understudy.http.reply import BadReply, Refused, Reply

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

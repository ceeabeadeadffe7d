"""One HTTP client for engines, teachers and judges: concurrent requests, retries, replicas, deadlines."""

from __future__ import annotations

from understudy.http.address import check_address, check_variable, read_key, without_key
from understudy.http.client import HttpClient, RetryPolicy
from understudy.http.reply import BadReply, Refused, Reply

__all__ = [
    "BadReply",
    "HttpClient",
    "Refused",
    "Reply",
    "RetryPolicy",
    "check_address",
    "check_variable",
    "read_key",
    "without_key",
]

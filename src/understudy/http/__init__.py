"""One HTTP client for engines, teachers and judges: concurrent requests, retries, replicas, deadlines."""

from __future__ import annotations

from understudy.http.client import HttpClient, RetryOptions, RetryPolicy
from understudy.http.replies import (
    BadReply,
    Refused,
    Reply,
    check_address,
    check_variable,
    is_loopback,
    read_key,
    without_key,
)

__all__ = [
    "BadReply",
    "HttpClient",
    "Refused",
    "Reply",
    "RetryOptions",
    "RetryPolicy",
    "check_address",
    "check_variable",
    "is_loopback",
    "read_key",
    "without_key",
]

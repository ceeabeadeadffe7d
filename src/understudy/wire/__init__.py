"""HTTP to engines, teachers and judges: many requests in flight, patience with what may pass, an end with what nothing mends."""

from __future__ import annotations

from .client import BadReply, Patience, Refused, Reply, Wire

__all__ = ["BadReply", "Patience", "Refused", "Reply", "Wire"]

"""Sandboxes for programs that a model wrote: none of its code runs in the trainer's process or with its rights."""

from collections.abc import Mapping

from understudy.sandbox.base import Outcome, Program, Result, Sandbox
from understudy.sandbox.local import Bubblewrap, Process
from understudy.sandbox.remote import Remote

SANDBOXES: Mapping[str, type[Sandbox]] = {"bubblewrap": Bubblewrap, "process": Process, "remote": Remote}
"""`type` of the section `sandbox` -> its section."""

__all__ = ["SANDBOXES", "Bubblewrap", "Outcome", "Process", "Program", "Remote", "Result", "Sandbox"]

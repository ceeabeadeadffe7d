"""Who judges the student's tokens."""

from __future__ import annotations

from .base import Judge, Section, Setup, Teacher, Unmoved
from .local import Local, LocalTeacher

TEACHERS: dict[str, type[Local]] = {"local": Local}
"""`teacher.type` in a recipe -> its section."""

__all__ = ["TEACHERS", "Judge", "Local", "LocalTeacher", "Section", "Setup", "Teacher", "Unmoved"]

"""Teachers, which score the student's tokens, and judges, which grade its responses."""

from __future__ import annotations

from understudy.teachers.base import (
    Judge,
    Responder,
    RunFacts,
    Setup,
    Source,
    Teacher,
    TeacherSection,
)
from understudy.teachers.judges.chat import Chat
from understudy.teachers.judges.verbal import Verbal
from understudy.teachers.local import Local, LocalTeacher
from understudy.teachers.privileged import Privileged
from understudy.teachers.reference import REFERENCES, Start
from understudy.teachers.remote.http import Http
from understudy.teachers.remote.served import Served
from understudy.teachers.router import RoutedTeacher, check_names
from understudy.teachers.stores.stored import Stored

TEACHERS: dict[str, type[TeacherSection]] = {
    "local": Local,
    "http": Http,
    "served": Served,
    "privileged": Privileged,
    "stored": Stored,
    "verbal": Verbal,
    "chat": Chat,
}
"""`teacher.type` in a recipe -> its section."""

__all__ = [
    "REFERENCES",
    "TEACHERS",
    "Chat",
    "Http",
    "Judge",
    "Local",
    "LocalTeacher",
    "Privileged",
    "Responder",
    "RoutedTeacher",
    "RunFacts",
    "Served",
    "Setup",
    "Source",
    "Start",
    "Stored",
    "Teacher",
    "TeacherSection",
    "Verbal",
    "check_names",
]

"""Teachers, which score the student's tokens, and judges, which grade its responses."""

from __future__ import annotations

from understudy.teachers.base import Judge, Responder, RunFacts, Setup, Source, Teacher, TeacherSection
from understudy.teachers.judges.chat import Chat
from understudy.teachers.judges.verbal import Verbal
from understudy.teachers.judges.verifier import Verifier
from understudy.teachers.local import REFERENCES, Local, LocalTeacher, Start
from understudy.teachers.privileged import Privileged
from understudy.teachers.remote.http import Http
from understudy.teachers.remote.served import Served
from understudy.teachers.router import RoutedTeacher, WeightedTeacher, check_names
from understudy.teachers.stores.recording import Stored

TEACHERS: dict[str, type[TeacherSection]] = {
    "local": Local,
    "http": Http,
    "served": Served,
    "privileged": Privileged,
    "stored": Stored,
    "verbal": Verbal,
    "chat": Chat,
    "verifier": Verifier,
}
"""`teacher.type` in a recipe -> its section."""

__all__ = [
    "REFERENCES",
    "TEACHERS",
    "Judge",
    "Local",
    "LocalTeacher",
    "Responder",
    "RoutedTeacher",
    "RunFacts",
    "Setup",
    "Source",
    "Start",
    "Teacher",
    "TeacherSection",
    "WeightedTeacher",
    "check_names",
]

"""Who judges the student's tokens."""

from __future__ import annotations

from understudy.teachers.base import Judge, Section, Setup, Teacher, Unmoved
from understudy.teachers.judges.chat import Chat
from understudy.teachers.judges.verbal import Verbal
from understudy.teachers.local import Local, LocalTeacher
from understudy.teachers.privileged import Privileged
from understudy.teachers.reference import REFERENCES, Start
from understudy.teachers.remote.http import Http
from understudy.teachers.remote.served import Served
from understudy.teachers.router import RoutedTeacher, check_names
from understudy.teachers.stores.stored import Stored, StoredTeacher

AnyTeacher = Local | Http | Served | Privileged | Stored | Verbal | Chat
AnyReference = Start | Local

TEACHERS: dict[str, type[AnyTeacher]] = {
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
    "AnyReference",
    "AnyTeacher",
    "Chat",
    "Http",
    "Judge",
    "Local",
    "LocalTeacher",
    "Privileged",
    "RoutedTeacher",
    "Section",
    "Served",
    "Setup",
    "Start",
    "Stored",
    "StoredTeacher",
    "Teacher",
    "Unmoved",
    "Verbal",
    "check_names",
]

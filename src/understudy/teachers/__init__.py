"""Who judges the student's tokens."""

from __future__ import annotations

from .base import Judge, Section, Setup, Teacher, Unmoved
from .chat import Chat
from .http import Http
from .local import Local, LocalTeacher
from .privileged import Privileged
from .reference import REFERENCES, Start
from .router import RoutedTeacher, check_names
from .served import Served
from .stored import Stored, StoredTeacher
from .verbal import Verbal

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

"""Who judges the student's tokens."""

from __future__ import annotations

from .base import Judge, Section, Setup, Teacher, Unmoved
from .chat import Chat
from .local import Local, LocalTeacher
from .privileged import Privileged
from .reference import REFERENCES, Start
from .router import RoutedTeacher, check_names
from .stored import Stored, StoredTeacher
from .verbal import Verbal

AnyTeacher = Local | Privileged | Stored | Verbal | Chat
AnyReference = Start | Local

TEACHERS: dict[str, type[AnyTeacher]] = {
    "local": Local,
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
    "Judge",
    "Local",
    "LocalTeacher",
    "Privileged",
    "RoutedTeacher",
    "Section",
    "Setup",
    "Start",
    "Stored",
    "StoredTeacher",
    "Teacher",
    "Unmoved",
    "Verbal",
    "check_names",
]

"""The section `launcher`: the servers that a run takes beside its ranks, and where ranks find them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy.engines import EngineSection
from understudy.engines.sections import ServerCommand
from understudy.errors import RecipeError, check_range
from understudy.teachers import TeacherSection
from understudy.trainer.console import Console
from understudy.types import Sampling

TOKEN = "UNDERSTUDY_TEACHER_TOKEN"  # noqa: S105 (a variable's name)
"""The variable with the token of the run's teachers."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The parts of a recipe that processes are started for."""

    run_dir: Path
    student: str | None
    """The model's directory or hub name; None for one that is built."""
    dtype: str
    sampling: Sampling
    engine: EngineSection
    teachers: Mapping[str, TeacherSection]
    """By their places in the recipe."""


@dataclass(eq=False, kw_only=True)
class Role:
    """A process of the run."""

    name: str
    """Also that of its log."""
    gpus: float
    server: ServerCommand
    """The command of a rank depends on the addresses of the servers, and is filled in when they run."""
    place: str = ""
    """The section of the recipe that has its address; empty for a rank."""
    section: Mapping[str, Any] = field(default_factory=dict)
    """The keys that the ranks read there, beside `url`."""
    address: tuple[str, int] = ("127.0.0.1", 0)
    """Host and port, when it is placed. Ranks meet at that of the first."""
    actor: Any = None
    restarts: int = 0

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"


@dataclass(frozen=True, kw_only=True)
class Ray:
    """The section `launcher` of type `ray`."""

    address: str = "local"
    """`local`: a cluster of this machine, for the run; `auto`: the one that this machine is in; else host:port of its head."""
    ranks: int = 1
    """Trainer processes."""
    rank_gpus: float = 1.0
    """GPUs of each."""
    engine_gpus: float = 1.0
    """GPUs of each of the servers under `rollout.launch`."""
    teachers: int = 0
    """Servers of each teacher of type `local`, in place of a copy in every rank; 0: the ranks load it."""
    teacher_gpus: float = 1.0
    """GPUs of each."""
    max_restarts: int = 10
    """Times that a server, and that all ranks together are started again after one has died."""
    wait_s: float = 600.0
    """Seconds until the cluster has room, and until a teacher answers."""

    def __post_init__(self) -> None:
        check_range(self, 1, "ranks")
        check_range(self, 0, "rank_gpus", "engine_gpus", "teachers", "teacher_gpus", "max_restarts")
        check_range(self, 0, "wait_s", above=True)

    def check(self, roles: Roles) -> list[str]:
        """Returns the keys of the recipe that the ranks read, with addresses that stand for those of the servers.

        Raises RecipeError where Ray is missing, and for what cannot be started elsewhere.
        """
        if importlib.util.find_spec("ray") is None:
            raise RecipeError("launcher.type is ray, but there is no package ray; run: pip install 'understudy[ray]'")
        return rank_keys(self.servers(roles))

    def servers(self, roles: Roles) -> list[Role]:
        """The servers of the run. Raises RecipeError for what cannot be started elsewhere."""
        if roles.engine.launches and roles.student is None:
            raise RecipeError("launcher: rollout servers begin with student.model, but the student is built")
        found: list[Role] = []
        for number, server in enumerate(roles.engine.elsewhere(roles.student or "", roles.dtype, roles.sampling)):
            if "CUDA_VISIBLE_DEVICES" in server.env:
                raise RecipeError(
                    "launcher: Ray says which GPUs a server has; remove CUDA_VISIBLE_DEVICES from rollout.launch.env"
                )
            found.append(Role(name=f"engine_{number}", gpus=self.engine_gpus, server=server, place="rollout"))
        for place, section in roles.teachers.items() if self.teachers else ():
            try:
                served = section.elsewhere(TOKEN)
            except RecipeError as error:
                raise RecipeError(f"launcher.teachers: {place}: {error}") from error
            if served is None:
                continue
            command = [sys.executable, "-m", "understudy", *served[0]]
            server = ServerCommand(command=command, env={}, port=0, ready_timeout_s=self.wait_s)
            for number in range(self.teachers):
                name = f"{place.replace('.', '_')}_{number}"
                found.append(Role(name=name, gpus=self.teacher_gpus, server=server, place=place, section=served[1]))
        return found

    def run(self, roles: Roles, command: Sequence[str], console: Console) -> int:
        """Starts everything; returns the exit code of the run when all has ended. `command` is that of a rank, to which keys
        of the recipe and options are added.

        Raises RecipeError for a cluster that is not there or has no room, EngineError for a server that does not start, and
        TrainingError for what dies too often.
        """
        from understudy.launchers.ray import launch

        return launch(self, roles.run_dir.absolute(), self.servers(roles), command, console)


def rank_keys(servers: Sequence[Role]) -> list[str]:
    """The keys of the recipe by which the ranks find the servers."""
    found = ["launcher=null"]
    for place in dict.fromkeys(role.place for role in servers):
        listed = [role for role in servers if role.place == place]
        urls = [role.url for role in listed]
        if place == "rollout":
            found += ["rollout.launch=null", f"rollout.url={json.dumps(urls)}"]
        else:
            found.append(f"{place}={json.dumps({**listed[0].section, 'url': urls})}")
    return found

"""The launcher `ray`: trainer ranks, rollout servers and served teachers of a run as actors of a Ray cluster.

Ray chooses the machines and says when one is lost; no sample and no weight passes through it. An actor runs the command that a
user would start by hand, its output in the run directory: ranks find each other as those of `torchrun` do, and ask servers over
HTTP. The machines have to see the same files, by the same names.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from understudy.engines import EngineSection
from understudy.engines.vllm.launch import ServerProcess, free_ports, port_is_free
from understudy.engines.vllm.supervisor import KILL_S
from understudy.errors import RecipeError, TrainingError, check_range
from understudy.teachers import TeacherSection
from understudy.trainer.console import Console
from understudy.trainer.signals import terminable
from understudy.types import Sampling

TOKEN = "UNDERSTUDY_TEACHER_TOKEN"  # noqa: S105 (a variable's name)
"""The variable with the token of the run's teachers."""
STOP_S = 30.0
"""From SIGTERM to SIGKILL, as `torchrun` has it: a rank saves what it has learnt."""
POLL_S = 0.5
STOPPED = 130
"""Exit code of a rank that a signal stopped; others above 128 are of ranks that a signal killed."""
NOWHERE = "http://127.0.0.1:1"
"""Stands for the address of a server that is not there yet."""


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


@dataclass(eq=False)
class Role:
    """A process of the run, and its actor."""

    name: str
    """Also that of its log."""
    command: Sequence[str]
    """`{host}` and `{port}` are filled in."""
    _: KW_ONLY
    gpus: float
    env: Mapping[str, str] = field(default_factory=dict)
    ready_timeout_s: float = 60.0
    place: str = ""
    """The section of the recipe that has its address; empty for a rank, which has none."""
    port: int = 0
    url: str = ""
    actor: Any = None
    restarts: int = 0


class Worker:
    """Runs one command where Ray has put it: an actor, whose methods run beside each other."""

    def __init__(self, folder: str, host: str | None) -> None:
        import ray

        os.chdir(folder)
        self._host = host or ray.util.get_node_ip_address()
        self._process: ServerProcess | None = None

    def address(self, port: int) -> tuple[str, int]:
        """This machine's, and a free port: the given one, if what held it ends in time."""
        until = time.monotonic() + STOP_S + KILL_S
        while port and not port_is_free(port, self._host) and time.monotonic() < until:
            time.sleep(POLL_S)
        return self._host, port if port and port_is_free(port, self._host) else free_ports(1, self._host)[0]

    def start(self, command: Sequence[str], **options: Any) -> None:
        self._process = ServerProcess(command, host=self._host, stop_s=STOP_S, **options)
        self._process.start()

    def wait_ready(self) -> None:
        assert self._process is not None
        self._process.wait_ready()

    def wait(self) -> int:
        """Returns the exit status when the process has ended."""
        assert self._process is not None
        while (status := self._process.poll(POLL_S)) is None:
            pass
        return status

    def ask_to_stop(self) -> None:
        assert self._process is not None
        self._process.ask_to_stop()


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
        """The keys of the recipe by which the ranks find the servers, with addresses that stand for theirs.

        Raises RecipeError where Ray is missing, and for what cannot be started elsewhere.
        """
        if importlib.util.find_spec("ray") is None:
            raise RecipeError("launcher.type is ray, but there is no package ray; run: pip install 'understudy[ray]'")
        return self.keys(roles, self.servers(roles))

    def servers(self, roles: Roles) -> list[Role]:
        """The servers of the run. Raises RecipeError as `check`."""
        found: list[Role] = []
        if roles.engine.launches and roles.student is None:
            raise RecipeError("launcher: rollout servers begin with student.model, but the student is built")
        for number, server in enumerate(roles.engine.elsewhere(roles.student or "", roles.dtype, roles.sampling)):
            if "CUDA_VISIBLE_DEVICES" in server.env:
                raise RecipeError(
                    "launcher: Ray says which GPUs a server has; remove CUDA_VISIBLE_DEVICES from rollout.launch.env"
                )
            found.append(
                Role(
                    f"engine_{number}",
                    server.command,
                    gpus=self.engine_gpus,
                    env=server.env,
                    ready_timeout_s=server.ready_timeout_s,
                    place="rollout",
                    port=server.port,
                )
            )
        for place, section in roles.teachers.items() if self.teachers else ():
            try:
                served = section.elsewhere(TOKEN)
            except RecipeError as error:
                raise RecipeError(f"launcher.teachers: {place}: {error}") from error
            if served is None:
                continue
            for number in range(self.teachers):
                found.append(
                    Role(
                        f"{place.replace('.', '_')}_{number}",
                        [sys.executable, "-m", "understudy", *served[0]],
                        gpus=self.teacher_gpus,
                        ready_timeout_s=self.wait_s,
                        place=place,
                    )
                )
        return found

    def keys(self, roles: Roles, servers: Sequence[Role]) -> list[str]:
        """The keys of the recipe by which the ranks find the servers."""
        urls: dict[str, list[str]] = {}
        for role in servers:
            urls.setdefault(role.place, []).append(role.url or NOWHERE)
        found = ["launcher=null"]
        for place, listed in urls.items():
            if place == "rollout":
                found += ["rollout.launch=null", f"rollout.url={json.dumps(listed)}"]
            elif (served := roles.teachers[place].elsewhere(TOKEN)) is not None:
                found.append(f"{place}={json.dumps(served[1] | {'url': listed})}")
        return found

    def run(self, roles: Roles, command: Sequence[str], console: Console) -> int:
        """Starts everything; returns the exit code of the run when all has ended. `command` is that of a rank, to which keys
        of the recipe and options are added.

        Raises RecipeError for a cluster without room, EngineError for a server that does not start, and TrainingError for
        one that dies too often.
        """
        import ray

        servers, local = self.servers(roles), self.address == "local"
        cores = {"num_cpus": self.ranks + len(servers), "include_dashboard": False} if local else {}
        ray.init(self.address, log_to_driver=False, **cores)
        try:
            # Ray has put handlers of its own in the place of those that let a run end in order
            with terminable():
                return Group(self, roles, servers, command, console, host="127.0.0.1" if local else None).run()
        finally:
            ray.shutdown()


class Group:
    """The processes of one run, all placed before the first is started."""

    def __init__(
        self,
        section: Ray,
        roles: Roles,
        servers: Sequence[Role],
        command: Sequence[str],
        console: Console,
        host: str | None,
    ) -> None:
        import ray

        self._section, self._roles, self._servers, self._command = section, roles, servers, command
        self._console, self._host = console, host
        self._ranks = [Role(f"rank_{number}", (), gpus=section.rank_gpus) for number in range(section.ranks)]
        self._all = [*self._ranks, *servers]
        self._token = {TOKEN: secrets.token_urlsafe(32)}
        self._ended: dict[Any, Role] = {}
        """By Ray's reference to the status of its process."""
        log = self._log(self._ranks[0])
        self._shown = log.stat().st_size if log.is_file() else 0
        bundles = [{"CPU": 1.0} | ({"GPU": role.gpus} if role.gpus else {}) for role in self._all]
        self._placed = ray.util.placement_group(bundles, strategy="PACK")
        if not self._placed.wait(section.wait_s):
            gpus = sum(role.gpus for role in self._all)
            raise RecipeError(
                f"the Ray cluster had no room within {section.wait_s:g} s: {len(bundles)} processes take a CPU each and "
                f"{gpus:g} GPUs; it has {ray.cluster_resources().get('CPU', 0):g} CPUs and "
                f"{ray.cluster_resources().get('GPU', 0):g} GPUs in all (launcher.wait_s)"
            )

    def run(self) -> int:
        """Trains, and goes on from the last checkpoint where a rank or a machine is lost."""
        try:
            for role in self._servers:
                self._locate(role)
                self._start(role, role.command, role.env)
            for number in range(self._section.max_restarts + 1):
                if number:
                    self._console.warn("the ranks are started again and go on from the last checkpoint")
                code = self._train(again=number > 0)
                if code is not None:
                    return code
            raise TrainingError(f"ranks died more than launcher.max_restarts times; see {self._log(self._ranks[0])}")
        finally:
            # the ranks first, which need the servers to end a step
            self._stop(self._ranks)
            self._stop(self._servers)

    def _train(self, *, again: bool) -> int | None:
        """Runs all ranks to their end; returns the exit code, None where one of them, or the address of a server, is lost."""
        import ray

        self._get([role.actor.wait_ready.remote() for role in self._servers])
        hosts = [self._locate(rank) for rank in self._ranks]
        # each sees its own GPUs alone
        shared = {"WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0"}
        shared |= {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(self._ranks[0].port)}
        command = [*self._command, *self._section.keys(self._roles, self._servers)]
        if again and "--resume" not in command and (self._roles.run_dir / "recipe.yaml").is_file():
            command.append("--resume")
        for number, rank in enumerate(self._ranks):
            own = {"RANK": str(number), "LOCAL_WORLD_SIZE": str(Counter(hosts)[hosts[number]])}
            self._start(rank, command, shared | own)
        codes: list[int | None] = []
        moved, stop_at = False, math.inf
        while len(codes) < len(hosts):
            done, _ = ray.wait(list(self._ended), timeout=POLL_S)
            self._echo()
            for reference in done:
                role = self._ended.pop(reference)
                code = self._status(role, reference)
                if role in self._ranks:
                    codes.append(code)
                elif self._restart(role, code):
                    moved, stop_at = True, 0.0
            if any(code != 0 for code in codes):
                # those that talk to a dead one end by themselves
                stop_at = min(stop_at, time.monotonic() + STOP_S)
            if time.monotonic() > stop_at:
                self._stop(self._ranks)
        if None in codes:
            # its actor is gone, and the process that it ran has as long to end
            time.sleep(STOP_S)
        if moved or any(code is None or (code > 128 and code != STOPPED) for code in codes):
            return None
        return next((code for code in codes if code), 0)

    def _restart(self, role: Role, code: int | None) -> bool:
        """Starts a server again, and returns whether its address is another."""
        role.restarts += 1
        how = "was lost with its actor" if code is None else f"ended with status {code}"
        if role.restarts > self._section.max_restarts:
            raise TrainingError(f"{role.name} {how}, more than launcher.max_restarts times; see {self._log(role)}")
        self._console.warn(f"{role.name} {how}; it is started again")
        before = role.url
        self._locate(role)
        self._start(role, role.command, role.env)
        return role.url != before

    def _locate(self, role: Role) -> str:
        """Gives a role its actor, where it has none, and its address; returns the host."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if role.actor is None:
            index = self._all.index(role)
            place = PlacementGroupSchedulingStrategy(self._placed, placement_group_bundle_index=index)
            worker = ray.remote(num_cpus=1, num_gpus=role.gpus, max_concurrency=4, scheduling_strategy=place)(Worker)
            role.actor = worker.remote(str(Path.cwd()), self._host)
        # a server keeps its port, and ranks meet at a new one
        host, role.port = self._get(role.actor.address.remote(role.port if role.place else 0))
        role.url = f"http://{host}:{role.port}"
        return str(host)

    def _start(self, role: Role, command: Sequence[str], env: Mapping[str, str]) -> None:
        host = role.url.removeprefix("http://").rpartition(":")[0]
        words = [word.replace("{host}", host).replace("{port}", str(role.port)) for word in command]
        options = {"name": role.name, "port": role.port, "log": self._log(role), "env": self._token | dict(env)}
        self._get(role.actor.start.remote(words, ready_timeout_s=role.ready_timeout_s, **options))
        self._ended[role.actor.wait.remote()] = role

    def _stop(self, roles: Sequence[Role]) -> None:
        """Asks processes to end, and waits for it."""
        import ray

        running = [reference for reference, role in self._ended.items() if role in roles]
        for reference in running:
            self._ended[reference].actor.ask_to_stop.remote()
        if running:
            ray.wait(running, num_returns=len(running), timeout=STOP_S + KILL_S)
        self._echo()

    def _get(self, references: Any) -> Any:
        """Raises what the actor raised, and TrainingError where the cluster gives no answer."""
        import ray

        longest = max(role.ready_timeout_s for role in self._all)
        try:
            return ray.get(references, timeout=self._section.wait_s + longest)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            said = " ".join(str(error).split())
            raise TrainingError(f"the Ray cluster does not start a process of the run: {said}") from error

    def _status(self, role: Role, reference: Any) -> int | None:
        """The exit status of an ended process; None, and no actor any more, where that is lost."""
        import ray

        try:
            return int(ray.get(reference))
        except ray.exceptions.RayActorError:
            role.actor = None
            return None

    def _log(self, role: Role) -> Path:
        return self._roles.run_dir.absolute() / f"{role.name}.log"

    def _echo(self) -> None:
        """Prints what the first rank has printed since the last time."""
        if (log := self._log(self._ranks[0])).is_file():
            with log.open("rb") as file:
                file.seek(self._shown)
                new = file.read()
            self._shown += len(new)
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()

"""The launcher `ray`: trainer ranks, rollout servers and served teachers of a run as actors of a Ray cluster.

Ray chooses the machines and says when one is lost; no sample and no weight passes through it. An actor runs the command that a
user would start by hand, its output in the run directory: ranks find each other as those of `torchrun` do, and ask servers over
HTTP. The machines have to see the same files, by the same names.
"""

from __future__ import annotations

import math
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from understudy.engines.sections import ServerCommand
from understudy.engines.vllm.launch import ServerProcess, free_ports, port_is_free
from understudy.engines.vllm.supervisor import KILL_S
from understudy.errors import RecipeError, TrainingError
from understudy.launchers.section import TOKEN, Ray, Role, rank_keys
from understudy.trainer.console import Console
from understudy.trainer.signals import terminable

STOP_S = 30.0
"""From SIGTERM to SIGKILL, as `torchrun` has it: a rank saves what it has learnt."""
POLL_S = 0.5
FOREVER_S = 1e9
STOPPED = 130
"""Exit code of a rank that a signal stopped; others above 128 are of ranks that a signal killed."""
LEAVE_CHILDREN = {"RAY_kill_child_processes_on_worker_exit": "0"}
"""An actor that ends would kill its child, the supervisor, before that has ended the command."""


def launch(section: Ray, folder: Path, servers: Sequence[Role], command: Sequence[str], console: Console) -> int:
    """Runs servers and ranks; see `Ray.run`."""
    import ray

    local = section.address == "local"
    cores = {"num_cpus": section.ranks + len(servers), "include_dashboard": False} if local else {}
    try:
        ray.init(section.address, log_to_driver=False, runtime_env={"env_vars": LEAVE_CHILDREN}, **cores)
        # Ray has put handlers of its own in the place of those that let a run end in order
        with terminable():
            return Group(section, folder, servers, console).run(command)
    except ConnectionError as error:
        raise RecipeError(f"launcher.address {section.address}: {error}") from error
    except ray.exceptions.RayTaskError as error:
        # raised by an actor
        raise error.cause from None
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        said = " ".join(str(error).split())
        raise TrainingError(f"the Ray cluster does not start a process of the run: {said}") from error
    finally:
        ray.shutdown()


class Group:
    """The processes of one run, for all of which Ray keeps a place until the run ends."""

    def __init__(self, section: Ray, folder: Path, servers: Sequence[Role], console: Console) -> None:
        import ray

        self._section, self._folder, self._servers, self._console = section, folder, servers, console
        nothing = ServerCommand(command=(), env={}, port=0, ready_timeout_s=section.wait_s)
        names = [f"rank_{number}" for number in range(section.ranks)]
        self._ranks = [Role(name=name, gpus=section.rank_gpus, server=nothing) for name in names]
        self._all = [*self._ranks, *servers]
        self._token = {TOKEN: secrets.token_urlsafe(32)}
        self._running: dict[Any, Role] = {}
        """By Ray's reference to the exit status of the process."""
        log = self._log(self._ranks[0])
        self._shown = log.stat().st_size if log.is_file() else 0
        bundles = [{"CPU": 1.0} | ({"GPU": role.gpus} if role.gpus else {}) for role in self._all]
        self._places = ray.util.placement_group(bundles, strategy="PACK")

    def run(self, command: Sequence[str]) -> int:
        """Trains, and goes on from the last checkpoint where a rank or a machine is lost."""
        import ray

        try:
            self._place(self._servers)
            self._start(self._servers)
            for number in range(self._section.max_restarts + 1):
                if number:
                    self._console.warn("the ranks are started again and go on from the last checkpoint")
                    if "--resume" not in command and (self._folder / "recipe.yaml").is_file():
                        command = [*command, "--resume"]
                code = self._train(command)
                if code is not None:
                    return code
            raise TrainingError(f"ranks died more than launcher.max_restarts times; see {self._log(self._ranks[0])}")
        finally:
            # the ranks first, which need the servers to end a step
            for roles in (self._ranks, self._servers):
                running = [reference for reference, role in self._running.items() if role in roles]
                for reference in running:
                    self._running[reference].actor.ask_to_stop.remote()
                if running:
                    ray.wait(running, num_returns=len(running), timeout=STOP_S + KILL_S)
            self._echo()

    def _train(self, command: Sequence[str]) -> int | None:
        """Runs all ranks to their end; returns the exit code, None where one of them, or the address of a server, is lost."""
        import ray

        ray.get([role.actor.wait_ready.remote() for role in self._servers])
        self._place(self._ranks[:1])
        host, port = self._ranks[0].address
        machines = ray.util.placement_group_table(self._places)["bundles_to_node_id"]
        machines = [machines[number] for number in range(len(self._ranks))]
        for number, rank in enumerate(self._ranks):
            env = {
                "RANK": str(number),
                "WORLD_SIZE": str(len(self._ranks)),
                # each sees its own GPUs alone
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": str(machines.count(machines[number])),
                "MASTER_ADDR": host,
                "MASTER_PORT": str(port),
            }
            rank.server = replace(rank.server, command=[*command, *rank_keys(self._servers)], env=env)
        self._start(self._ranks)
        codes: list[int | None] = []
        lost, stop_at = False, math.inf
        while len(codes) < len(self._ranks):
            ended, _ = ray.wait(list(self._running), timeout=POLL_S)
            self._echo()
            late = time.monotonic() > stop_at
            for reference in ended:
                role = self._running.pop(reference)
                try:
                    code = ray.get(reference)
                except ray.exceptions.RayActorError:
                    code = None
                if role in self._servers:
                    if self._restart(role, code):
                        lost, stop_at = True, 0.0
                    continue
                codes.append(code)
                # a rank that hangs where another has failed is killed in the end, and was not lost
                lost |= not late and (code is None or (code > 128 and code != STOPPED))
                if code != 0:
                    # those that talk to a dead one end by themselves
                    stop_at = min(stop_at, time.monotonic() + STOP_S)
            for role in self._running.values() if late else ():
                if role in self._ranks:
                    role.actor.ask_to_stop.remote()
        if None in codes:
            # its actor is gone, and the process that it ran has as long to end
            time.sleep(STOP_S)
        failed = [code for code in codes if code != 0]
        return None if lost and failed else next(iter(failed), 0)

    def _restart(self, role: Role, code: int | None) -> bool:
        """Starts a server again, and returns whether its address is another."""
        role.restarts += 1
        how = "was lost with its actor" if code is None else f"ended with status {code}"
        if role.restarts > self._section.max_restarts:
            raise TrainingError(f"{role.name} {how}, more than launcher.max_restarts times; see {self._log(role)}")
        self._console.warn(f"{role.name} {how}; it is started again")
        before = role.address
        role.server = replace(role.server, port=before[1])
        self._place([role])
        self._start([role])
        return role.address != before

    def _place(self, roles: Sequence[Role]) -> None:
        """Gives each role an address where Ray keeps its place. Raises RecipeError where the cluster has too few places."""
        import ray

        if not self._places.wait(self._section.wait_s):
            there = ray.cluster_resources()
            raise RecipeError(
                f"the Ray cluster had no room within {self._section.wait_s:g} s: {len(self._all)} processes take a CPU each "
                f"and {sum(role.gpus for role in self._all):g} GPUs; it has {there.get('CPU', 0):g} CPUs and "
                f"{there.get('GPU', 0):g} GPUs in all (launcher.wait_s)"
            )
        host = "127.0.0.1" if self._section.address == "local" else None
        task = ray.remote(num_cpus=0)(find_address)
        found = [task.options(scheduling_strategy=self._at(role)).remote(host, role.server.port) for role in roles]
        for role, address in zip(roles, ray.get(found, timeout=self._section.wait_s), strict=True):
            role.address = address

    def _start(self, roles: Sequence[Role]) -> None:
        """Runs the command of each role by an actor of its own."""
        import ray

        actor = ray.remote(max_concurrency=4)(ServerProcess)
        for role in roles:
            host, port = role.address
            words = [word.replace("{host}", host).replace("{port}", str(port)) for word in role.server.command]
            role.actor = actor.options(num_cpus=1, num_gpus=role.gpus, scheduling_strategy=self._at(role)).remote(
                ["env", f"--chdir={Path.cwd()}", *words],
                name=role.name,
                host=host,
                port=port,
                log=self._log(role),
                env=self._token | dict(role.server.env),
                ready_timeout_s=role.server.ready_timeout_s,
                stop_s=STOP_S,
            )
        ray.get([role.actor.start.remote() for role in roles], timeout=self._section.wait_s)
        self._running |= {role.actor.poll.remote(FOREVER_S): role for role in roles}

    def _at(self, role: Role) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._places, self._all.index(role))

    def _log(self, role: Role) -> Path:
        return self._folder / f"{role.name}.log"

    def _echo(self) -> None:
        """Prints what the first rank has printed since the last time."""
        if (log := self._log(self._ranks[0])).is_file():
            with log.open("rb") as file:
                file.seek(self._shown)
                new = file.read()
            self._shown += len(new)
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()


def find_address(host: str | None, port: int) -> tuple[str, int]:
    """This machine's, and the port if what held it ends in time, else a free one."""
    import ray

    host = host or str(ray.util.get_node_ip_address())
    until = time.monotonic() + STOP_S + KILL_S
    while port and not port_is_free(port, host):
        time.sleep(POLL_S)
        port = port if time.monotonic() < until else 0
    return host, port or free_ports(1, host)[0]

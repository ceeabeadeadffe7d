"""Replicas of one server: which to ask next, and which to avoid for a while."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any

from understudy.http.replies import MAX_WAIT_S

PROBE_PAUSE_S = 0.05
"""Pause between two looks at a running probe, for a request that has no other replica to ask."""


@dataclass
class Counts:
    """HTTP requests of one replica and the bytes of their bodies."""

    requests: int = 0
    retries: int = 0
    failures: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(eq=False)
class Replica:
    """One base URL and the state of its circuit breaker."""

    url: str
    in_flight: int = 0
    failures: int = 0
    """Consecutive failures."""
    openings: int = 0
    """Times that the breaker opened since the last success; 0: closed."""
    open_until: float = 0.0
    on_trial: bool = False
    probing: bool = False
    proven: bool = False
    """Whether a probe has found the server alive since the breaker opened."""
    counts: Counts = field(default_factory=Counts)


@dataclass(eq=False)
class Permit:
    """Permit for one request to one replica; settle it exactly once."""

    replica: Replica
    trial: bool
    released: bool = False
    settled: bool = False
    received: int = 0
    """Bytes of the reply's body so far."""


@dataclass
class Attempts:
    """The attempts of one request so far."""

    pinned: int | None = None
    """Number of the only replica to ask; None: any."""
    permits: list[Permit] = field(default_factory=list)
    not_before: dict[str, float] = field(default_factory=dict)
    """Per URL, the time until which the server asked to wait."""

    @property
    def urls(self) -> list[str]:
        """URLs that were asked, each once."""
        return list(dict.fromkeys(permit.replica.url for permit in self.permits))


class Replicas:
    """Chooses the ready replica that this request has asked least, then the one with the fewest in flight, then in turn.

    After `break_after` consecutive failures a breaker opens for `cool_down_s`. Then a probe, which delays no request, and
    one trial request close it again, or open it for twice as long, at most `MAX_WAIT_S`. A breaker keeps requests away only
    while another replica can be asked: a single or pinned replica is always asked, and when all breakers are open, the first
    to be ready is asked without a probe.
    """

    def __init__(
        self, urls: Sequence[str], *, break_after: int, cool_down_s: float, clock: Callable[[], float]
    ) -> None:
        self._all = [Replica(url) for url in urls]
        self._break_after = break_after
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._lock = Lock()
        self._next = 0

    def acquire(self, attempts: Attempts) -> Permit | float:
        """Returns a permit, or the seconds until there may be one."""
        with self._lock:
            now = self._clock()
            candidates = self._all if attempts.pinned is None else [self._all[attempts.pinned]]
            ready_at = {replica.url: attempts.not_before.get(replica.url, now) for replica in candidates}
            if len(candidates) > 1:
                for replica in candidates:
                    if replica.openings:
                        unproven = replica.open_until <= now and not replica.proven and self._any_closed()
                        until = now + PROBE_PAUSE_S if unproven else replica.open_until
                        ready_at[replica.url] = max(ready_at[replica.url], until)
            ready = [replica for replica in candidates if ready_at[replica.url] <= now]
            if not ready:
                return min(ready_at.values()) - now
            # one trial at a time, unless there is no other replica
            ready = [replica for replica in ready if not replica.on_trial] or ready

            def order(replica: Replica) -> tuple[int, int, int]:
                tried = sum(permit.replica is replica for permit in attempts.permits)
                return tried, replica.in_flight, (self._all.index(replica) - self._next) % len(self._all)

            best = min(ready, key=order)
            self._next = self._all.index(best) + 1
            permit = Permit(best, trial=bool(best.openings) and not best.on_trial)
            best.on_trial |= permit.trial
            best.in_flight += 1
            best.counts.requests += 1
            best.counts.retries += bool(attempts.permits)
            attempts.permits.append(permit)
            return permit

    def _any_closed(self) -> bool:
        return any(not replica.openings for replica in self._all)

    def release(self, permit: Permit, *, sent: int) -> None:
        """Ends the time in flight and counts the bytes."""
        with self._lock:
            if not permit.released:
                permit.released = True
                permit.replica.in_flight -= 1
                permit.replica.counts.bytes_sent += sent
                permit.replica.counts.bytes_received += permit.received

    def settle(self, permit: Permit, *, right: bool | None) -> None:
        """Records whether the reply was right; None: unknown, because the request was cancelled. The first call counts."""
        with self._lock:
            if permit.settled:
                return
            permit.settled = True
            replica = permit.replica
            if permit.trial:
                replica.on_trial = False
            if right:
                replica.failures = replica.openings = 0
                replica.on_trial = False
            elif right is False:
                replica.counts.failures += 1
                replica.failures += 1
                # a request that was sent before the breaker opened tells nothing new
                if permit.trial or (not replica.openings and replica.failures >= self._break_after):
                    self._open(replica)

    def due_for_probe(self) -> list[Replica]:
        """Replicas that are due for a health probe. The caller probes each and calls `record_probe`."""
        with self._lock:
            if not self._any_closed():
                return []
            now = self._clock()
            due = [
                replica
                for replica in self._all
                if replica.openings and not (replica.probing or replica.proven) and replica.open_until <= now
            ]
            for replica in due:
                replica.probing = True
            return due

    def record_probe(self, replica: Replica, *, alive: bool | None) -> None:
        """Records a probe's result; None: unknown, because the probe was cancelled."""
        with self._lock:
            replica.probing = False
            if alive:
                replica.proven = True
            elif alive is False and replica.openings:
                self._open(replica)

    def _open(self, replica: Replica) -> None:
        replica.openings += 1
        replica.proven = False
        full: float = self._cool_down_s * 2.0 ** min(replica.openings - 1, 60)
        replica.open_until = self._clock() + min(MAX_WAIT_S, full)

    def stats(self) -> dict[str, Any]:
        """`Counts` over all replicas, and those of each URL under "replicas"."""
        with self._lock:
            by_url = {replica.url: asdict(replica.counts) for replica in self._all}
        total = {name: sum(counts[name] for counts in by_url.values()) for name in asdict(Counts())}
        return {**total, "replicas": by_url}

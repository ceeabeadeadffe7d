"""Replicas of one server: which is asked next, and which is left alone for a while."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any

from understudy.http.reply import MAX_WAIT_S

PROBE_PAUSE_S = 0.05
"""Between two looks at a probe, for who has no other replica to ask."""


@dataclass
class Counts:
    """Of HTTP requests; bytes are those of bodies."""

    requests: int = 0
    retries: int = 0
    failures: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(eq=False)
class Replica:
    """One address, and how it has done of late."""

    url: str
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    openings: int = 0
    """Of its circuit breaker since the last success; 0: closed."""
    open_until: float = 0.0
    on_trial: bool = False
    probing: bool = False
    proven: bool = False
    """Whether a probe has found it alive since its breaker opened."""
    counts: Counts = field(default_factory=Counts)


@dataclass(eq=False)
class Turn:
    """Leave to send one request to one replica; what came of it is told once, by `Replicas.settle`."""

    replica: Replica
    trial: bool
    arrived: bool = False
    settled: bool = False
    received: int = 0
    """Bytes of a body, whole or not."""

    def receive(self, size: int) -> None:
        """As much more has come."""
        self.received += size


@dataclass
class Asker:
    """What one request remembers of its attempts."""

    pinned: int | None = None
    turns: list[Turn] = field(default_factory=list)
    not_before: dict[str, float] = field(default_factory=dict)
    """By url, where a server asked to wait."""

    @property
    def urls(self) -> list[str]:
        """That were asked, each once."""
        return list(dict.fromkeys(turn.replica.url for turn in self.turns))

    def tried(self, replica: Replica) -> int:
        """How often it was asked."""
        return sum(turn.replica is replica for turn in self.turns)


class Replicas:
    """The ready replica that was asked least by this request, then that with the fewest in flight, then in turn.

    After `break_after` failures in a row a breaker opens for `cool_down_s`; then a probe, which is no request and holds none
    up, and after it one trial close it, or open it for twice as long, at most `MAX_WAIT_S`. It keeps requests away only
    while another replica can be asked: a single replica and a pinned one are always asked, and when all are open the first
    to be ready is asked by all who wait, without a probe.
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

    def take(self, asker: Asker) -> Turn | float:
        """A turn, or the seconds until there may be one."""
        with self._lock:
            now = self._clock()
            among = self._all if asker.pinned is None else [self._all[asker.pinned]]
            from_s = {replica.url: asker.not_before.get(replica.url, now) for replica in among}
            if len(among) > 1:
                for replica in among:
                    if replica.openings:
                        from_s[replica.url] = max(from_s[replica.url], self._open_until(replica, now))
            ready = [replica for replica in among if from_s[replica.url] <= now]
            if not ready:
                return min(from_s.values()) - now
            alone = [replica for replica in ready if not replica.on_trial]
            return self._give(self._best(alone or ready, asker), asker)

    def _open_until(self, replica: Replica, now: float) -> float:
        unproven = replica.open_until <= now and not replica.proven and self._some_closed()
        return now + PROBE_PAUSE_S if unproven else replica.open_until

    def _some_closed(self) -> bool:
        return any(not replica.openings for replica in self._all)

    def due(self) -> list[Replica]:
        """That are to be probed now, each by whoever is told so; `probed` says what came of it."""
        with self._lock:
            now = self._clock()
            found = [
                replica
                for replica in self._all
                if replica.openings and not (replica.probing or replica.proven) and replica.open_until <= now
            ]
            if not self._some_closed():
                return []
            for replica in found:
                replica.probing = True
            return found

    def probed(self, replica: Replica, *, alive: bool | None) -> None:
        """None: nobody knows, because the probe was given up."""
        with self._lock:
            replica.probing = False
            if alive:
                replica.proven = True
            elif alive is False and replica.openings:
                self._open(replica)

    def _best(self, ready: list[Replica], asker: Asker) -> Replica:
        def order(replica: Replica) -> tuple[int, int, int]:
            turn = (self._all.index(replica) - self._next) % len(self._all)
            return asker.tried(replica), replica.in_flight, turn

        return min(ready, key=order)

    def _give(self, replica: Replica, asker: Asker) -> Turn:
        self._next = self._all.index(replica) + 1
        turn = Turn(replica, trial=bool(replica.openings) and not replica.on_trial)
        replica.on_trial |= turn.trial
        replica.in_flight += 1
        replica.counts.requests += 1
        replica.counts.retries += bool(asker.turns)
        asker.turns.append(turn)
        return turn

    def arrive(self, turn: Turn, *, sent: int, received: int) -> None:
        """No longer in flight."""
        with self._lock:
            if not turn.arrived:
                turn.arrived = True
                turn.replica.in_flight -= 1
                turn.replica.counts.bytes_sent += sent
                turn.replica.counts.bytes_received += received

    def settle(self, turn: Turn, *, right: bool | None) -> None:
        """Whether the reply was right; None: nobody knows, because it was given up. Only the first word counts."""
        with self._lock:
            if turn.settled:
                return
            turn.settled = True
            replica = turn.replica
            if turn.trial:
                replica.on_trial = False
            if right:
                replica.failures = replica.openings = 0
                replica.on_trial = False
            elif right is False:
                replica.counts.failures += 1
                replica.failures += 1
                # what was sent before a breaker opened says nothing new
                if turn.trial or (not replica.openings and replica.failures >= self._break_after):
                    self._open(replica)

    def _open(self, replica: Replica) -> None:
        replica.openings += 1
        replica.proven = False
        full: float = self._cool_down_s * 2.0 ** min(replica.openings - 1, 60)
        replica.open_until = self._clock() + min(MAX_WAIT_S, full)

    def stats(self) -> dict[str, Any]:
        """`Counts` of all, and of each by its url under "replicas"."""
        with self._lock:
            by_url = {replica.url: asdict(replica.counts) for replica in self._all}
        total = {name: sum(counts[name] for counts in by_url.values()) for name in asdict(Counts())}
        return {**total, "replicas": by_url}

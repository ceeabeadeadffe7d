"""Scores on the disk: nothing is asked twice, nothing is lost, and no teacher answers for another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.leaks import nothing_left
from tests.tiny_models import NUM_ROWS, sample, tiny
from understudy.errors import RecipeError, ScoreError
from understudy.packing import Unscored
from understudy.teachers.local import LocalTeacher
from understudy.teachers.stores import cache
from understudy.teachers.stores.cache import DRIFT, CachedTeacher
from understudy.types import Need, Sample, Scores

NONE: frozenset[Need] = frozenset({"none"})
SAMPLED: frozenset[Need] = frozenset({"sampled"})
TOPK: frozenset[Need] = frozenset({"topk"})
FULL: frozenset[Need] = frozenset({"full"})
WAIT_S = 60.0


class Counted(LocalTeacher):
    """Knows which samples it was asked about; `fails_at` counts them, `drift` moves its scores behind its fingerprint."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **{"name": "t", "vocab_size": NUM_ROWS} | options)
        self.asked: list[str] = []
        self.fails_at = 10**9
        self.drift = 0.0
        self.unscored: set[str] = set()
        self.closed = False

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        self.asked += [one.key for one in samples]
        if len(self.asked) > self.fails_at:
            raise ScoreError("the server is gone")
        return [self._changed(*pair) for pair in zip(samples, super().score(samples, need, k=k), strict=True)]

    def _changed(self, one: Sample, scores: Scores) -> Scores:
        if one.key in self.unscored:
            return Unscored(one.response_ids, torch.full((len(one.response_ids),), float("nan")), reason="no reason")
        if scores.logprob is None:
            return scores
        return Scores(
            scores.token_ids,
            scores.logprob - self.drift,
            scores.topk_ids,
            scores.topk_logprob,
            scores.entropy,
            scores.hidden,
        )

    def close(self) -> None:
        self.closed = True


def samples() -> list[Sample]:
    return [sample(f"p{i}", [3 + i, 4], [5, 6 + i, *[7] * i]) for i in range(6)]


@contextmanager
def opened(judge: LocalTeacher, folder: Path) -> Iterator[CachedTeacher]:
    with closing(CachedTeacher(judge, folder / "scores.sqlite3")) as cached:
        yield cached


def equal(one: Scores, other: Scores) -> None:
    """To the last bit, types too."""
    for name in ("token_ids", "logprob", "topk_ids", "topk_logprob", "entropy", "hidden"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None), name
        if isinstance(first, Tensor):
            assert first.dtype == second.dtype, name
            assert torch.equal(first, second), name


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize(("need", "k"), [(SAMPLED, None), (TOPK, 4), (TOPK | SAMPLED | NONE, 4)])
def test_what_was_scored_once_is_not_asked_again(
    tmp_path: Path, dtype: str, need: frozenset[Need], k: int | None
) -> None:
    judge = Counted(tiny(dtype=dtype, sharp=4.0))
    with opened(judge, tmp_path) as cached:
        first = cached.score(samples()[:4], need, k=k)
        assert judge.asked == ["p0#0", "p1#0", "p2#0", "p3#0"]
        second = cached.score(samples()[:4], need, k=k)
        assert len(judge.asked) == 4
    assert judge.closed
    again = Counted(tiny(dtype=dtype, sharp=4.0))
    with nothing_left(), opened(again, tmp_path) as cached:
        third = cached.score(samples()[:4], need, k=k)
        assert again.asked == []
        for one, other, another in zip(first, second, third, strict=True):
            equal(one, other)
            equal(one, another)
        # the longest that are stored are scored again before the first that is not
        cached.score(samples(), need, k=k)
        assert again.asked == ["stored#3", "stored#2", "stored#1", "p4#0", "p5#0"]
        cached.score([sample("q", [9], [8])], need, k=k)
        assert again.asked[5:] == ["q#0"]


def test_most_likely_tokens_are_kept_where_they_came(tmp_path: Path) -> None:
    """And asked for by no second request where they did not."""
    judge, kept = (
        LocalTeacher(tiny(), name="t", vocab_size=NUM_ROWS),
        [replace(one, keep_tokens=True) for one in samples()],
    )
    with opened(judge, tmp_path) as cached:
        # two samples of the same tokens, of which one is kept
        first = cached.score([*kept[:2], *samples()[:3]], SAMPLED)
        again = cached.score(kept[:3], SAMPLED)
    assert first[0].likeliest_ids is not None
    for name in ("likeliest_ids", "likeliest_logprob", "rank"):
        assert torch.equal(getattr(first[0], name), getattr(again[0], name))
    assert again[2].likeliest_ids is None


def test_an_entry_is_of_its_teacher_tokens_need_and_k(tmp_path: Path) -> None:
    """Whatever a score depends on: none of these requests is answered by another's."""
    judge = Counted(tiny())
    one = sample("p", [3, 4], [5, 6])
    other_split = sample("p", [3, 4, 5], [6])
    asked: list[tuple[Sample, frozenset[Need], int | None]] = [
        (one, SAMPLED, None),
        (one, TOPK, 2),
        (one, TOPK, 3),
        (other_split, SAMPLED, None),
        (sample("p", [3, 4], [5, 7]), SAMPLED, None),
    ]
    with opened(judge, tmp_path) as cached:
        for number, (made, need, k) in enumerate(asked):
            found = cached.score([made], need, k=k)[0]
            equal(found, LocalTeacher.score(judge, [made], need, k=k)[0])
            assert len(judge.asked) == number + 1
    for other in (Counted(tiny(), temperature=0.5), Counted(tiny(), vocab_size=39), Counted(tiny(sharp=2.0))):
        with opened(other, tmp_path) as cached:
            equal(cached.score([one], SAMPLED)[0], LocalTeacher.score(other, [one], SAMPLED)[0])
            assert other.asked == ["p#0"]


def test_equal_samples_are_asked_once(tmp_path: Path) -> None:
    judge = Counted(tiny())
    with opened(judge, tmp_path) as cached:
        made = [sample(name, [3], [4, 5]) for name in "abc"]
        found = cached.score([*made, sample("d", [3], [4, 6])], SAMPLED)
        assert len(judge.asked) == 2
        for one in found[:3]:
            equal(one, found[0])


def test_other_needs_go_to_the_teacher(tmp_path: Path) -> None:
    judge = Counted(tiny())
    with opened(judge, tmp_path) as cached:
        for _ in range(2):
            assert cached.score(samples()[:1], FULL)[0].hidden is not None
            assert cached.score(samples()[:1], NONE)[0].logprob is None
        assert len(judge.asked) == 4
        with pytest.raises(ValueError, match="k of at least 1"):
            cached.score(samples()[:1], TOPK)
        with pytest.raises(ScoreError, match="verbal"):
            cached.score(samples()[:1], frozenset({"verbal"}))
        assert cached.score([], SAMPLED) == []
        assert (cached.name, cached.fingerprint, cached.state()) == ("t", judge.fingerprint, {})
        assert cached.head_for("t") is not None
        assert cached.uncached() is judge


def test_what_came_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK_TOKENS", 1)
    judge = Counted(tiny())
    judge.fails_at = 3
    with opened(judge, tmp_path) as cached:
        with pytest.raises(ScoreError, match="gone"):
            cached.score(samples(), SAMPLED)
        judge.asked.clear()
        judge.fails_at = 10**9
        cached.score(samples(), SAMPLED)
        assert judge.asked == ["p3#0", "p4#0", "p5#0"]


def test_a_missing_score_is_asked_for_again(tmp_path: Path) -> None:
    judge = Counted(tiny())
    judge.unscored = {"p1#0"}
    with opened(judge, tmp_path) as cached:
        assert isinstance(cached.score(samples()[:3], SAMPLED)[1], Unscored)
        judge.unscored = set()
        judge.asked.clear()
        assert not isinstance(cached.score(samples()[:3], SAMPLED)[1], Unscored)
        assert judge.asked == ["p1#0"]


@pytest.mark.parametrize("need", [SAMPLED, TOPK])
def test_a_teacher_that_changed_behind_its_name_is_found_out(tmp_path: Path, need: frozenset[Need]) -> None:
    with opened(Counted(tiny()), tmp_path) as cached:
        cached.score(samples()[:3], need, k=2)
    near, far = Counted(tiny()), Counted(tiny())
    near.drift, far.drift = DRIFT / 2, DRIFT * 2
    with opened(far, tmp_path) as cached:
        # what is stored is still given: it is what the run began with
        cached.score(samples()[:3], need, k=2)
        for _ in range(2):
            with pytest.raises(ScoreError, match=r"not the one that filled .*teacher.revision"):
                cached.score(samples(), need, k=2)
        assert set(far.asked) == {"stored#0", "stored#1", "stored#2"}
    with opened(near, tmp_path) as cached:
        cached.score(samples(), need, k=2)
        assert near.asked == ["stored#2", "stored#1", "stored#0", "p3#0", "p4#0", "p5#0"]


def test_a_teacher_that_scores_nothing_is_not_called_another(tmp_path: Path) -> None:
    with opened(Counted(tiny()), tmp_path) as cached:
        cached.score(samples()[:3], SAMPLED)
    gone = Counted(tiny())
    gone.unscored = {"stored#1"}
    with (
        opened(gone, tmp_path) as cached,
        pytest.raises(ScoreError, match=r"cannot tell whether .*no reason") as caught,
    ):
        cached.score([sample("q", [9], [8])], SAMPLED)
    assert "nan" not in str(caught.value)


def test_the_longest_responses_are_compared_as_few_as_are_enough(tmp_path: Path) -> None:
    """A first entry of one token says nothing about a teacher."""
    made = [sample("short", [3], [4])] + [sample(f"p{n}", [3] * (90 - n), [5] * n) for n in (20, 70, 10, 30)]
    with opened(Counted(tiny()), tmp_path) as cached:
        cached.score(made, SAMPLED)
    for most, expected in ((70, ["stored#2"]), (30, ["stored#4", "stored#1", "stored#3"])):
        judge = Counted(tiny())
        with opened(judge, tmp_path / str(most)) as cached:
            cached.score([one for one in made if one.num_response_tokens <= most], SAMPLED)
        with opened(judge, tmp_path / str(most)) as cached:
            judge.asked.clear()
            cached.score([sample("q", [9], [8])], SAMPLED)
        kept = [one for one in made if one.num_response_tokens <= most]
        named = [f"stored#{kept.index(made[int(name[-1])])}" for name in expected]
        assert judge.asked == [*named, "q#0"]


def test_a_teacher_that_changes_in_the_middle_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "COMPARE_EVERY", 5)
    judge = Counted(tiny())
    with opened(judge, tmp_path) as cached:
        cached.score(samples(), SAMPLED)
        judge.drift = 2 * DRIFT
        with pytest.raises(ScoreError, match="not the one"):
            cached.score([sample("q", [9], [8])], SAMPLED)
        judge.drift = 0.0
        cached.score([sample("q", [9], [8])], SAMPLED)
        judge.asked.clear()
        cached.score([sample("r", [9], [8, 8])], SAMPLED)
        assert judge.asked == ["r#0"]


def test_close_while_a_teacher_scores_says_so(tmp_path: Path) -> None:
    """The file is whole, and nothing is to be deleted."""
    judge = Counted(tiny())
    cached = CachedTeacher(judge, tmp_path / "scores.sqlite3")
    score = LocalTeacher.score

    def closing_score(*args: Any, **keys: Any) -> list[Scores]:
        cached.close()
        return score(judge, *args, **keys)

    judge.score = closing_score  # type: ignore[method-assign]
    with pytest.raises(ScoreError, match="is closed") as caught:
        cached.score(samples()[:1], SAMPLED)
    assert "damaged" not in str(caught.value)


def test_nobody_else_reads_the_file(tmp_path: Path) -> None:
    with opened(Counted(tiny()), tmp_path) as cached:
        cached.score(samples()[:1], SAMPLED)
        modes = {one.name: one.stat().st_mode & 0o777 for one in tmp_path.iterdir()}
    assert modes["scores.sqlite3"] == 0o600
    assert set(modes.values()) == {0o600}


def test_a_teacher_that_moves_leaves_its_entries_behind(tmp_path: Path) -> None:
    model = tiny()
    judge = Counted(model)
    with opened(judge, tmp_path) as cached:
        before = cached.score(samples()[:1], SAMPLED)[0]
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(3.0)
        del judge.fingerprint
        after = cached.score(samples()[:1], SAMPLED)[0]
        assert judge.asked == ["p0#0", "p0#0"]
        assert not torch.equal(before.logprob, after.logprob)  # type: ignore[arg-type]


def test_threads_share_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All get the same scores, and what one of them has stored is asked no more."""
    monkeypatch.setattr(cache, "CHUNK_TOKENS", 5)
    judge = Counted(tiny())
    with opened(judge, tmp_path) as cached:
        found: list[list[Scores]] = []
        threads = [Thread(target=lambda: found.append(cached.score(samples(), SAMPLED))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert len(found) == len(threads)
        for scores in found:
            for one, other in zip(scores, found[0], strict=True):
                equal(one, other)
        judge.asked.clear()
        cached.score(samples(), SAMPLED)
        assert not judge.asked


# --- files


@pytest.mark.parametrize(
    ("damage", "shown"),
    [
        (lambda path: path.write_bytes(b"no database" * 100), "delete the file"),
        (lambda path: sqlite3.connect(path).execute("PRAGMA user_version=9").connection.close(), "format 9"),
    ],
)
def test_a_file_that_is_no_cache_is_refused(tmp_path: Path, damage: Callable[[Path], Any], shown: str) -> None:
    path = tmp_path / "scores.sqlite3"
    CachedTeacher(Counted(tiny()), path).close()
    damage(path)
    with pytest.raises(RecipeError, match=shown):
        CachedTeacher(Counted(tiny()), path)
    with pytest.raises(RecipeError, match="teacher.cache"):
        CachedTeacher(Counted(tiny()), path / "below" / "scores.sqlite3")


@pytest.mark.parametrize("column", ["value", "key"])
def test_a_damaged_entry_is_no_score(tmp_path: Path, column: str) -> None:
    path = tmp_path / "scores.sqlite3"
    with opened(Counted(tiny()), tmp_path) as cached:
        cached.score(samples()[:2], SAMPLED)
    with closing(sqlite3.connect(path)) as file, file:
        if column == "value":
            file.execute("UPDATE scores SET value = substr(value, 1, 20)")
        else:
            keys = [row[0] for row in file.execute("SELECT key FROM scores")]
            file.execute("UPDATE scores SET key = x'00' WHERE key = ?", [keys[0]])
            file.execute("UPDATE scores SET key = ? WHERE key = ?", keys)
            file.execute("UPDATE scores SET key = ? WHERE key = x'00'", keys[1:])
    judge = Counted(tiny())
    with opened(judge, tmp_path) as cached, pytest.raises(ScoreError, match=r"damaged .*delete it"):
        cached.score(samples()[:2], SAMPLED)
    assert not judge.asked


def numbered(first: int, last: int) -> list[Sample]:
    return [sample(str(i), [2 + i % 30, 2 + i // 30 % 30, 2 + i // 900 % 30], [3, 4]) for i in range(first, last)]


def fill(folder: Path, first: int, last: int, opening: Any, pipe: Any) -> None:
    """Says which samples are stored, ten at a time."""
    torch.manual_seed(0)
    cache.CHUNK_TOKENS = 1
    judge = Counted(tiny())
    opening.wait(WAIT_S)
    with opened(judge, folder) as cached:
        for start in range(first, last, 10):
            cached.score(numbered(start, start + 10), SAMPLED)
            pipe.send(start)


def test_two_processes_fill_one_file_and_a_kill_loses_nothing_that_was_written(tmp_path: Path) -> None:
    """They open it at the same time, and their ranges overlap; the one that is killed has said what it had written."""
    context = multiprocessing.get_context("fork")
    opening = context.Barrier(2)
    ends = [context.Pipe(duplex=False) for _ in range(2)]
    ranges = [(0, 100), (50, 20_000)]
    with nothing_left():
        one, killed = (
            context.Process(target=fill, args=(tmp_path, *bounds, opening, end[1]))
            for bounds, end in zip(ranges, ends, strict=True)
        )
        try:
            one.start()
            killed.start()
            assert ends[1][0].poll(WAIT_S)
            assert ends[1][0].recv() == 50
            os.kill(killed.pid or 0, signal.SIGKILL)
            one.join(WAIT_S)
            assert one.exitcode == 0
        finally:
            for process in (one, killed):
                process.kill()
                process.join(WAIT_S)
            for end in (*ends[0], *ends[1]):
                end.close()
    torch.manual_seed(0)
    judge = Counted(tiny())
    with opened(judge, tmp_path) as cached:
        made = numbered(0, 100)
        for one_of, found in zip(made, cached.score(made, SAMPLED), strict=True):
            equal(found, LocalTeacher.score(judge, [one_of], SAMPLED)[0])
        assert not judge.asked
    with closing(sqlite3.connect(tmp_path / "scores.sqlite3")) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)

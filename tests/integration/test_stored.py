"""Recorded samples and scores: the same bits come back, and nothing that is not what the run would have scored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runs import save_tiny_model
from tests.tiny_models import letters, request, scored, tiny
from tests.tiny_models import sample as written
from understudy import config
from understudy.engines import HFEngine
from understudy.errors import RecipeError, ScoreError
from understudy.packing import pack
from understudy.tasks import build_tokenizer
from understudy.tasks.renderer import Renderer
from understudy.teachers import Local, LocalTeacher, Setup
from understudy.teachers.stores.recording import (
    ScoredMeta,
    Stored,
    read_record,
    recorded,
    tokenizer_digest,
    write_scored,
)
from understudy.types import Author, Need, Request, Sample, Sampling, Scores

SAMPLED: frozenset[Need] = frozenset({"sampled"})
TOPK: frozenset[Need] = frozenset({"topk"})
K = 4
SETUP = Setup(name="t", vocab_size=37, temperature=0.7, renderer=Renderer(letters()))
Pairs = list[tuple[Sample, Scores]]


def requests() -> list[Request]:
    """One prompt has the start of its response from the teacher."""
    asked = [request(f"p/{n}", [3 + n] * (1 + n), index) for n in range(4) for index in range(2)]
    return [*asked, request("q", [4], prefix=[5, 6])]


def judge(**changes: Any) -> LocalTeacher:
    options = {"name": "t", "vocab_size": SETUP.vocab_size, "temperature": SETUP.temperature} | changes
    return LocalTeacher(tiny(dtype="float32", sharp=4.0), **options)


def make(k: int | None = K) -> tuple[ScoredMeta, Pairs]:
    """What the start of the student wrote, as the engine gives it, and the teacher's scores."""
    engine = HFEngine(tiny("qwen3", "float32", sharp=2.0), letters(), seed=0, stop_ids=(1,), vocab_size=37)
    engine.push(None, 3)
    samples = engine.generate(requests(), Sampling(0.7, max_new_tokens=6), step=0)
    teacher = judge()
    scores = teacher.score(samples, SAMPLED if k is None else TOPK, k=k)
    return ScoredMeta.of(teacher, SETUP, "big", k), list(zip(samples, scores, strict=True))


def same(a: object, b: object) -> bool:
    """To the last bit, NaN included."""
    for item in dataclasses.fields(a):  # type: ignore[arg-type]
        one, other = getattr(a, item.name), getattr(b, item.name)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if (one.dtype, one.shape) != (other.dtype, other.shape):
                return False
            if not torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)):
                return False
        elif one != other:
            return False
    return True


@pytest.mark.parametrize("shard_samples", [1, 4, 64])
def test_what_is_stored_comes_back_to_the_bit(tmp_path: Path, shard_samples: int) -> None:
    meta, pairs = make()
    assert write_scored(tmp_path, meta, iter(pairs), shard_samples=shard_samples) == len(pairs)
    section = Stored(path=str(tmp_path), fingerprint=judge().fingerprint)
    assert sorted(section.gives) == ["none", "sampled", "topk"]
    assert "9 samples scored by big" in section.check()
    stored = section.open(SETUP)
    assert (stored.name, stored.fingerprint, stored.head_for(None)) == ("t", meta.fingerprint, None)
    again = stored.samples_for(requests())
    found = stored.score([sample for sample, _ in pairs], TOPK, k=K)
    for one, scores, (sample, expected) in zip(again, found, pairs, strict=True):
        assert one is not None
        assert same(one, sample)
        assert same(scores, expected)
    first = again[0]
    assert first is not None
    assert first.policy_version is not None
    assert set(first.policy_version.tolist()) == {-1, 3}
    last = again[-1]
    assert last is not None
    assert last.author.tolist()[:4] == [Author.PROMPT, Author.TEACHER, Author.TEACHER, Author.STUDENT]
    assert stored.prompt_ids == {"p/0", "p/1", "p/2", "p/3", "q"}


def test_stored_scores_pack_as_live_ones_do(tmp_path: Path) -> None:
    meta, pairs = make()
    write_scored(tmp_path, meta, pairs)
    stored = Stored(path=str(tmp_path)).open(SETUP)
    replayed = [sample for sample in stored.samples_for(requests()) if sample is not None]
    live = pack(scored([sample for sample, _ in pairs], [scores for _, scores in pairs]))
    assert same(pack(scored(replayed, stored.score(replayed, TOPK, k=K))), live)


def test_only_what_is_asked_for_is_returned(tmp_path: Path) -> None:
    meta, pairs = make()
    write_scored(tmp_path, meta, pairs)
    stored, samples = Stored(path=str(tmp_path)).open(SETUP), [pairs[3][0]]
    (sampled,) = stored.score(samples, SAMPLED)
    assert sampled.topk_ids is None
    assert sampled.logprob is not None
    (nothing,) = stored.score(samples, frozenset({"none"}))
    assert nothing.logprob is None
    (fewer,) = stored.score(samples, TOPK, k=2)
    assert same(fewer, judge().score([sample for sample, _ in pairs], TOPK, k=2)[3])
    with pytest.raises(ScoreError, match="k = 5, the scores in .* have 4 tokens a row"):
        stored.score(samples, TOPK, k=5)
    with pytest.raises(ValueError, match="k is None"):
        stored.score(samples, TOPK)
    with pytest.raises(ScoreError, match=r"cannot give \['full'\]"):
        stored.score(samples, frozenset({"full"}))


def test_samples_that_are_kept_bring_the_rows_that_were_recorded(tmp_path: Path) -> None:
    meta, pairs = make()
    write_scored(tmp_path, meta, pairs)
    sample, expected = pairs[0]
    found = Stored(path=str(tmp_path)).open(SETUP).score([dataclasses.replace(sample, keep_tokens=True)], SAMPLED)[0]
    assert found.topk_ids is None
    assert same(
        found,
        dataclasses.replace(
            expected,
            topk_ids=None,
            topk_logprob=None,
            **{f"likeliest_{name}": getattr(expected, f"topk_{name}") for name in ("ids", "logprob")},
        ),
    )


def test_a_recording_of_sampled_tokens_gives_these(tmp_path: Path) -> None:
    meta, pairs = make(k=None)
    write_scored(tmp_path, meta, pairs)
    section = Stored(path=str(tmp_path))
    assert sorted(section.gives) == ["none", "sampled"]
    with pytest.raises(ScoreError, match=r"cannot give \['topk'\]"):
        section.open(SETUP).score([pairs[0][0]], TOPK, k=1)


def test_only_recorded_samples_have_scores(tmp_path: Path) -> None:
    meta, pairs = make()
    write_scored(tmp_path, meta, pairs[:3])
    stored = Stored(path=str(tmp_path)).open(SETUP)
    with pytest.raises(ScoreError, match=r"p/1#1 is not among the 3 of"):
        stored.score([pairs[3][0]], SAMPLED)
    sample = pairs[2][0]
    for place in (0, -1):
        other = sample.token_ids.clone()
        other[place] += 1
        with pytest.raises(ScoreError, match=r"p/1#0 has other tokens"):
            stored.score([dataclasses.replace(sample, token_ids=other)], SAMPLED)
    assert [sample is None for sample in stored.samples_for(requests())] == [False] * 3 + [True] * 6
    with pytest.raises(ScoreError, match="its prompt has other tokens"):
        stored.samples_for([request("p/1", [9, 9], 0)])


def test_a_recording_that_is_cut_short_is_continued(tmp_path: Path) -> None:
    meta, pairs = make()
    taken: list[str] = []

    def failing(stop: int) -> Iterator[tuple[Sample, Scores]]:
        known = recorded(tmp_path, meta)
        for sample, scores in pairs:
            if sample.key in known:
                continue
            if len(taken) == stop:
                raise KeyboardInterrupt
            taken.append(sample.key)
            yield sample, scores

    with pytest.raises(KeyboardInterrupt):
        write_scored(tmp_path, meta, failing(5), shard_samples=2)
    assert recorded(tmp_path, meta) == set(taken)
    for use in (Stored(path=str(tmp_path)).check, lambda: Stored(path=str(tmp_path)).open(SETUP)):
        with pytest.raises(RecipeError, match="cut short after 5 samples"):
            use()
    # a file that was written but not yet entered, and one that was written aside
    (tmp_path / "scores_00003.safetensors").write_bytes(b"half")
    assert write_scored(tmp_path, meta, failing(99), shard_samples=2) == len(pairs)
    assert taken == [sample.key for sample, _ in pairs]
    assert write_scored(tmp_path, meta, pairs) == len(pairs)
    stored = Stored(path=str(tmp_path)).open(SETUP)
    for scores, (_, expected) in zip(stored.score([one for one, _ in pairs], TOPK, k=K), pairs, strict=True):
        assert same(scores, expected)


def test_a_recording_is_of_one_kind(tmp_path: Path) -> None:
    meta, pairs = make()
    write_scored(tmp_path, meta, pairs[:2])
    for change in ({"fingerprint": "x"}, {"temperature": 1.0}, {"k": 5}, {"vocab_size": 40}, {"tokenizer": "y"}):
        with pytest.raises(RecipeError, match=f"scores of another kind: {next(iter(change))} was .*another directory"):
            write_scored(tmp_path, dataclasses.replace(meta, **change), pairs)
    assert read_record(tmp_path).num_samples == len(recorded(tmp_path, meta)) == 2


def test_scores_that_are_not_what_was_promised_are_refused(tmp_path: Path) -> None:
    meta, pairs = make()
    (sample, scores), (_, other) = pairs[:2]
    with pytest.raises(ScoreError, match=r"p/0#0: topk_ids is absent; the recording needs"):
        write_scored(tmp_path, meta, [(sample, dataclasses.replace(scores, topk_ids=None))])
    with pytest.raises(ScoreError, match=r"p/0#0: the scores are of other tokens"):
        write_scored(tmp_path, meta, [(sample, other)])
    with pytest.raises(ScoreError, match="logprob is of shape"):
        write_scored(tmp_path, meta, [(sample, dataclasses.replace(scores, logprob=torch.zeros(1)))])


def test_a_truncated_or_changed_file_is_noticed(tmp_path: Path) -> None:
    meta, pairs = make()
    write_scored(tmp_path, meta, pairs, shard_samples=4)
    section, file = Stored(path=str(tmp_path)), tmp_path / "scores_00001.safetensors"
    whole = file.read_bytes()
    for cut in (1, len(whole) // 2, len(whole)):
        file.write_bytes(whole[:-cut])
        with pytest.raises(RecipeError, match=r"scores_00001\.safetensors has \d+ bytes of \d+: .* damaged"):
            section.check()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    section.check()
    with pytest.raises(RecipeError, match="scores_00001.safetensors is damaged: it differs"):
        section.open(SETUP)
    file.unlink()
    with pytest.raises(RecipeError, match="is missing"):
        section.check()
    text = (tmp_path / "meta.json").read_text()
    values = json.loads(text)
    for broken in (text[:-9], "[]", "{}", json.dumps(values | {"files": {"a": 1}})):
        (tmp_path / "meta.json").write_text(broken)
        with pytest.raises(RecipeError, match=r"meta\.json is damaged"):
            section.check()
    (tmp_path / "meta.json").write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(RecipeError, match="has format 99, not 1"):
        section.check()
    with pytest.raises(RecipeError, match="there are no stored scores"):
        Stored(path=str(tmp_path / "nowhere")).gives  # noqa: B018


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"temperature": 1.0}, r"stored with temperature 0\.7, this run has 1\.0"),
        ({"vocab_size": 36}, "stored with vocabulary size 37, this run has 36"),
        ({"renderer": Renderer(letters(30))}, "stored with tokenizer"),
    ],
    ids=["temperature", "vocabulary", "tokenizer"],
)
def test_another_run_is_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    meta, pairs = make()
    write_scored(tmp_path, meta, pairs)
    with pytest.raises(RecipeError, match=match):
        Stored(path=str(tmp_path)).open(dataclasses.replace(SETUP, **change))


def test_the_run_has_a_tokenizer(tmp_path: Path) -> None:
    meta, pairs = make()
    write_scored(tmp_path, meta, pairs)
    with pytest.raises(ValueError, match=r"Setup\.tokenizer"):
        Stored(path=str(tmp_path)).open(dataclasses.replace(SETUP, renderer=None))


def test_a_tokenizer_is_told_by_its_tokens_and_its_end() -> None:
    base, other = letters(), letters()
    assert tokenizer_digest(base) == tokenizer_digest(other)
    other.eos_token = "A"
    assert len({tokenizer_digest(base), tokenizer_digest(other), tokenizer_digest(letters(30))}) == 3


def test_scores_of_another_teacher_are_refused(tmp_path: Path) -> None:
    """By its fingerprint, given or computed from the model that the recipe names."""
    tokenizer = build_tokenizer("addition")
    setup = Setup(name="t", vocab_size=len(tokenizer), temperature=0.7, renderer=Renderer(tokenizer))
    one, other = (save_tiny_model(tmp_path / name, seed=seed) for name, seed in (("one", 1), ("other", 2)))
    teacher = Local(model=one).open(setup)
    by_hand = written("a", [3], [4, 1], author=Author.TEACHER, finish="data")
    meta = ScoredMeta.of(teacher, setup, one)
    write_scored(tmp_path / "scores", meta, zip([by_hand], teacher.score([by_hand], SAMPLED), strict=True))
    path = str(tmp_path / "scores")
    refusal = (
        rf"stored from teacher {one} with fingerprint {teacher.fingerprint}, this recipe's teacher has \w+: record"
    )
    (again,) = (
        Stored(path=path, model=one, fingerprint=teacher.fingerprint).open(setup).samples_for([request("a", [3])])
    )
    assert again is not None
    assert same(again, by_hand)
    with pytest.raises(RecipeError, match=refusal):
        Stored(path=path, model=other).open(setup)
    for changed in ({"temperature": 1.0}, {"vocab_size": 16}):
        moved = Local(model=one).open(dataclasses.replace(setup, **changed))
        with pytest.raises(RecipeError, match=refusal):
            Stored(path=path, fingerprint=moved.fingerprint).check()
    with pytest.raises(RecipeError, match="no model directory"):
        Stored(path=path, model=str(tmp_path / "none")).check()


def test_an_empty_recording_is_no_teacher(tmp_path: Path) -> None:
    assert write_scored(tmp_path, make()[0], []) == 0
    with pytest.raises(RecipeError, match="holds no sample"):
        Stored(path=str(tmp_path)).check()


def test_a_recipe_names_it() -> None:
    assert config.parse(Stored, {"path": "x", "fingerprint": "f"}) == Stored(path="x", fingerprint="f")
    assert Stored(path="x").shown == "scores stored in x"

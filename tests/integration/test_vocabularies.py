"""A teacher that has more tokens than the student: cut out of its softmax, or left in its tail."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runs import BUILD, distillation, metric_rows, save_tiny_model, tiny_recipe, train
from tests.serving import serve_beside
from tests.tiny_models import letters, plain_logp, request, sample, scored, tiny
from understudy import config
from understudy.engines import HFEngine
from understudy.errors import RecipeError, ScoreError, VocabularyError
from understudy.linear import LMHead, evaluate
from understudy.methods import EOPD, GKD, OPD, Method, TopK
from understudy.models import build_causal_lm, compare_vocabularies, lm_head, load_tokenizer, save_hf, vocabulary_size
from understudy.packing import pack
from understudy.recipe import Recipe
from understudy.recipe.checks import check
from understudy.serve import Scorer, Settings
from understudy.tasks import build_tokenizer
from understudy.tasks.renderer import Renderer
from understudy.teachers import LocalTeacher, Setup
from understudy.teachers.remote.score_check import MAX_FOREIGN_MASS, RawScores
from understudy.teachers.remote.score_check import check as check_scores
from understudy.teachers.remote.served import Served
from understudy.types import Sample, Sampling, Scores

SHARED, TEACHER = 36, 40
"""Tokens of the student, and of the teacher: four more, which hold a good part of its probability."""
K = 5
EXACT = 1e-12


GAPS = (7, 20)
"""Ids between the student's that only the teacher has a token for."""
OWN = [index for index in range(SHARED) if index not in GAPS]


def samples() -> list[Sample]:
    """In tokens that the student has with gaps too."""
    generator = torch.Generator().manual_seed(1)
    lengths = [(3, 5), (1, 4), (9, 2), (9, 3), (2, 11)]
    own = torch.tensor(OWN[2:])
    return [
        sample(f"p{i}", *(own[torch.randint(len(own), (n,), generator=generator)].tolist() for n in pair))
        for i, pair in enumerate(lengths)
    ]


def setup(**options: Any) -> Setup:
    facts = {"name": "t", "vocab_size": SHARED, "renderer": Renderer(letters(SHARED))}
    return Setup(**facts | {"teacher_tokenizer": letters(TEACHER)} | options)


def teacher_model() -> Any:
    model = tiny(num_rows=TEACHER + 2, sharp=3.0)
    with torch.no_grad():
        # padding, which is cut off in either case
        model.lm_head.weight[TEACHER:] = 30.0
    return model


def teacher_rows(model: Any) -> Tensor:
    """The probabilities of the teacher's own tokens at every response token. [T, TEACHER] by plain forwards."""
    rows = [plain_logp(model, one.token_ids, vocab_size=TEACHER)[one.prompt_length - 1 :] for one in samples()]
    return torch.cat(rows).exp()


def by_hand(name: str, q: Tensor, z: Tensor, target: Tensor) -> Tensor:
    """The loss of a method, for a teacher that gives q to the student's tokens; what q lacks to 1 is in its tail."""
    logp = z.log_softmax(-1)
    if name == "opd":
        advantage = (q.log() - logp).gather(-1, target[:, None]).squeeze(-1).detach()
        return -(advantage * logp.gather(-1, target[:, None]).squeeze(-1)).mean()
    if name == "gkd":
        return (logp.exp() * (logp - q.log())).sum(-1).mean()
    ids = q.topk(K).indices
    theirs, ours = q.gather(-1, ids), logp.gather(-1, ids)
    rest_theirs, rest_ours = 1 - theirs.sum(-1), (1 - ours.exp().sum(-1)).log()
    if name == "topk":
        return ((theirs * (theirs.log() - ours)).sum(-1) + rest_theirs * (rest_theirs.log() - rest_ours)).mean()
    return ((ours.exp() * (ours - theirs.log())).sum(-1) + rest_ours.exp() * (rest_ours - rest_theirs.log())).mean()


METHODS: dict[str, Method] = {
    "opd": OPD(),
    "gkd": GKD(),
    "topk": TopK(k=K),
    "topk reverse": TopK(k=K, direction="reverse"),
}


@pytest.mark.parametrize("absent", [(), GAPS])
@pytest.mark.parametrize("extra_ids", ["mask", "tail"])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_the_formula(name: str, extra_ids: Any, absent: tuple[int, ...]) -> None:
    """float64. Masked, the teacher is its softmax over the student's tokens; in the tail, the others take what they have."""
    method, model = METHODS[name], teacher_model()
    teacher = LocalTeacher.beside(setup(absent=absent), model, extra_ids)
    own = torch.tensor(OWN if absent else range(SHARED))
    if extra_ids == "tail" and name == "gkd":
        with pytest.raises(ScoreError, match=r"cannot give \['full'\]"):
            teacher.score(samples(), method.needs)
        return
    batch = pack(scored(samples(), teacher.score(samples(), method.needs, k=K)))
    q = teacher_rows(model)
    assert float(q[:, SHARED:].sum(-1).max()) > 0.1
    kept = q[:, own] / q[:, own].sum(-1, keepdim=True) if extra_ids == "mask" else q[:, own]
    z = torch.randn(len(batch), SHARED, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    # the student has a row for each gap as well, which is no token
    expected = by_hand(name, kept, theirs[:, own], torch.searchsorted(own, batch.target))
    expected.backward()
    full = None
    if "full" in method.needs:
        hidden = [one.hidden for one in teacher.score(samples(), method.needs) if one.hidden is not None]
        full = torch.cat(hidden), teacher.head_for(None)
    head = LMHead(torch.eye(SHARED, dtype=torch.float64), absent=torch.tensor(absent) if absent else None)
    found = evaluate(method, batch, ours, head, teacher=full)
    found.loss.backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=EXACT)
    if name != "opd":
        # its value is that of a ratio of 1, not of log S
        torch.testing.assert_close(found.loss.detach(), expected.detach(), rtol=0, atol=EXACT)


@pytest.mark.parametrize("extra_ids", ["mask", "tail"])
def test_scores_by_hand(extra_ids: Any) -> None:
    model = teacher_model()
    teacher = LocalTeacher.beside(setup(), model, extra_ids)
    found = teacher.score(samples(), EOPD().needs, k=K)
    q = teacher_rows(model)
    if extra_ids == "mask":
        q = q[:, :SHARED] / q[:, :SHARED].sum(-1, keepdim=True)
    entropy = torch.cat([one.entropy for one in found if one.entropy is not None])
    torch.testing.assert_close(entropy, -(q * q.log()).sum(-1), rtol=0, atol=EXACT)
    top, ids = (torch.cat([getattr(one, field) for one in found]) for field in ("topk_logprob", "topk_ids"))
    assert int(ids.max()) < SHARED
    torch.testing.assert_close(top, q[:, :SHARED].topk(K).values.log(), rtol=0, atol=EXACT)
    other = LocalTeacher.beside(setup(), model, "tail" if extra_ids == "mask" else "mask")
    assert teacher.fingerprint != other.fingerprint
    # without tokens of its own the two are one
    same = [LocalTeacher.beside(setup(teacher_tokenizer=None), model, how).fingerprint for how in ("mask", "tail")]
    assert same[0] == same[1]


@pytest.mark.parametrize("absent", [(), GAPS])
@pytest.mark.parametrize("extra_ids", ["mask", "tail"])
def test_a_served_teacher_gives_the_same(extra_ids: Any, absent: tuple[int, ...]) -> None:
    """Also where several responses share a prompt, which is read once."""
    model = teacher_model()
    shared = [sample("one", range(2, 32), OWN[2 + i : 2 + i + n]) for i, n in enumerate((4, 5, 1, 5, 9))]
    needs = [{"sampled"}, {"topk"}, {"full"}] if extra_ids == "mask" else [{"sampled"}, {"topk"}]
    with serve_beside(Scorer(model, letters(TEACHER), name="tiny"), Settings(model="tiny", port=0)) as url:
        into = setup(absent=absent)
        teacher = Served(url=url, tokenizer="named", extra_ids=extra_ids).open(into)
        local = LocalTeacher.beside(into, model, extra_ids)
        try:
            if extra_ids == "mask":
                ours, theirs = teacher.head_for(None), local.head_for(None)
                hidden = torch.randn(3, 32, dtype=torch.float64)
                assert ours is not None
                assert torch.equal(ours.logits(hidden), theirs.logits(hidden))
                assert float(ours.logits(hidden).softmax(-1)[:, list(absent)].sum()) == 0.0
            for need in needs:
                for some in (samples(), shared):
                    _close(teacher.score(some, frozenset(need), k=K), local.score(some, frozenset(need), k=K))
        finally:
            teacher.close()
        with pytest.raises(VocabularyError, match=r"name the teacher's own \(teacher\.tokenizer\)"):
            Served(url=url).open(setup(teacher_tokenizer=None))
        with pytest.raises(VocabularyError, match="another tokenizer"):
            Served(url=url, tokenizer="named").open(setup(teacher_tokenizer=letters(TEACHER - 1)))


def _close(found: Sequence[Scores], expected: Sequence[Scores]) -> None:
    for one, other in zip(found, expected, strict=True):
        for field in ("logprob", "entropy", "topk_ids", "topk_logprob", "hidden"):
            ours, theirs = getattr(one, field), getattr(other, field)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)


def test_a_known_token_stays_in_the_tail_behind_http() -> None:
    """Whatever it holds; an id that no tokenizer has may hold little."""
    mass = 10 * MAX_FOREIGN_MASS
    for token, size, lost in ((9, 10, False), (9, 0, True), (12, 10, True)):
        raw = RawScores([2], [-0.2], [[(2, -0.2), (token, float(torch.tensor(mass).log())), (3, -7.0)]])
        answer = check_scores(sample("p", [1], [2]), raw, k=2, num_top=3, vocab_size=9, teacher_size=size)
        assert (answer.scores is None) == lost
        if answer.scores is not None and answer.scores.topk_ids is not None:
            assert answer.scores.topk_ids.tolist() == [[2, 3]]


def test_a_gap_is_dropped_from_rows_behind_http() -> None:
    raw = RawScores([2], [-0.2], [[(2, -0.2), (5, -2.5), (3, -7.0)]])
    answer = check_scores(sample("p", [1], [2]), raw, k=2, num_top=3, vocab_size=9, absent=(5,), teacher_size=9)
    assert answer.scores is not None
    assert answer.scores.topk_ids is not None
    assert answer.scores.topk_ids.tolist() == [[2, 3]]


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_a_gap_has_no_probability_and_no_gradient(name: str) -> None:
    """Also under a soft-cap, whose derivative is taken at the logit."""
    model = tiny(name, sharp=3.0)
    head = lm_head(model, vocab_size=SHARED, absent=GAPS)
    teacher = lm_head(tiny(name, sharp=2.0), vocab_size=SHARED, absent=GAPS)
    hidden = torch.randn(6, 32, dtype=torch.float64)
    batch = pack(samples()[:1])
    states = hidden[: len(batch)]
    for beta in (0.0, 0.3, 1.0):
        model.zero_grad()
        evaluate(GKD(beta=beta), batch, states, head, teacher=(states, teacher)).loss.backward()
        grad = head.weight.grad
        assert grad is not None
        assert bool(grad.isfinite().all())
        assert float(grad[list(GAPS)].abs().max()) == 0.0
        assert float(grad[OWN].abs().max()) > 0.0
    engine = HFEngine(model, letters(SHARED), seed=0, stop_ids=(1,), vocab_size=SHARED, absent=GAPS)
    asked = [request(f"r{index}", [3, 4]) for index in range(200)]
    written = engine.generate(asked, Sampling(max_new_tokens=8, temperature=3.0), step=0)
    assert not set(GAPS) & {token for one in written for token in one.response_ids.tolist()}


# --- recipes


def save_larger(path: Path) -> str:
    """A teacher with the task's tokens and four more."""
    tokenizer = build_tokenizer("addition")
    tokenizer.add_tokens(["<think>", "</think>", "<tool>", "</tool>"], special_tokens=True)
    size = vocabulary_size(tokenizer)
    model = build_causal_lm(
        BUILD | {"hidden_size": 32}, vocab_size=size, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, seed=2
    )
    with torch.no_grad():
        # after every token some of the new ones are likely
        model.lm_head.weight[size - 4 :] *= 100.0
    save_hf(model, tokenizer, path)
    return str(path)


@pytest.mark.parametrize(
    ("method", "extra_ids"),
    [
        ({"type": "gkd"}, None),
        ({"type": "topk", "k": 4}, "mask"),
        ({"type": "topk", "k": 4}, "tail"),
        ({"type": "opd"}, "tail"),
        ({"type": "gopd"}, None),
    ],
    ids=str,
)
def test_a_student_learns_from_a_teacher_with_more_tokens(
    tmp_path: Path, method: dict[str, Any], extra_ids: str | None
) -> None:
    teacher = {"type": "local", "model": save_larger(tmp_path / "larger")}
    teacher |= {} if extra_ids is None else {"extra_ids": extra_ids}
    changes = distillation(tmp_path, method=method, teacher=teacher, train={"steps": 2})
    said = " ".join(check(config.parse(Recipe, tiny_recipe(tmp_path, **changes))))
    size = len(build_tokenizer("addition"))
    kept = "left in the tail of" if extra_ids == "tail" else "masked out of"
    assert f"share {size} tokens; 4 that the student lacks are {kept} its softmax: '<think>' ({size})" in said
    run_dir = train(tmp_path, examine=True, **changes)
    assert all(row["loss"] is not None for row in metric_rows(run_dir))
    found = {item["name"]: item for item in json.loads((run_dir / "doctor.json").read_text())["findings"]}
    assert found["vocabulary"]["level"] == "warning"
    assert "4 are tokens that the student lacks: '<think>'" in found["vocabulary"]["found"]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    larger = save_larger(tmp_path / "larger")
    teacher = {"type": "local", "model": larger, "extra_ids": "tail"}
    with pytest.raises(RecipeError, match=r"whole next-token distribution.*extra_ids: mask"):
        config.parse(Recipe, tiny_recipe(tmp_path, **distillation(tmp_path, teacher=teacher)))
    # the student has tokens that the teacher does not know
    changes = distillation(tmp_path, teacher={"type": "local", "model": save_tiny_model(tmp_path / "less", seed=3)})
    changes["student"]["model"] = larger
    with pytest.raises(
        VocabularyError, match=r"4 of the student's 21 tokens: 17 is '<think>' for the student and absent"
    ):
        check(config.parse(Recipe, tiny_recipe(tmp_path, **changes)))


def test_a_teacher_with_fewer_rows_than_tokens_is_refused(tmp_path: Path) -> None:
    """Tokens were added to its tokenizer alone: an id past its rows must not be looked up."""
    changes = distillation(tmp_path, teacher={"type": "local", "model": save_larger(tmp_path / "larger")})
    changes["student"] = {"model": str(tmp_path / "larger"), "build": None}
    small, tokenizer = save_tiny_model(tmp_path / "small", seed=3), load_tokenizer(str(tmp_path / "larger"))
    tokenizer.save_pretrained(small)
    changes["teacher"]["model"] = small
    with pytest.raises(VocabularyError, match=r"the tokenizer has 21 tokens but the head of \w+ has 17 rows"):
        train(tmp_path, **changes)


def test_a_student_with_gaps_learns(tmp_path: Path) -> None:
    """Its tokenizer lacks three of the teacher's tokens, one of them last."""
    larger = save_larger(tmp_path / "larger")
    changes = distillation(tmp_path, teacher={"type": "local", "model": larger}, train={"steps": 2})
    changes["student"] = {"model": save_larger(tmp_path / "student"), "build": None}
    path = tmp_path / "student" / "tokenizer.json"
    values = json.loads(path.read_text())
    lacking = ("<think>", "<tool>", "</tool>")
    values["added_tokens"] = [one for one in values["added_tokens"] if one["content"] not in lacking]
    # else it would take the next free id
    values["model"]["vocab"]["</think>"] = len(build_tokenizer("addition")) + 1
    path.write_text(json.dumps(values))
    student = load_tokenizer(str(tmp_path / "student"))
    size = len(build_tokenizer("addition"))
    assert student.get_vocab()["</think>"] == size + 1
    assert compare_vocabularies(student, load_tokenizer(larger)) == {
        size: "<think>",
        size + 2: "<tool>",
        size + 3: "</tool>",
    }
    run_dir = train(tmp_path, examine=True, **changes)
    assert all(row["loss"] is not None for row in metric_rows(run_dir))
    rows = [
        json.loads(line) for file in (run_dir / "samples").glob("*.jsonl") for line in file.read_text().splitlines()
    ]
    assert "<think>" not in json.dumps(rows)


def test_qwen_with_four_tokens_less(shared: Path, tmp_path: Path) -> None:
    """The tokenizer of Qwen2.5 is that of Qwen3 without its last four tokens."""
    larger = load_tokenizer(str(shared / "tokenizers" / "qwen"))
    path = tmp_path / "smaller"
    path.mkdir()
    for file in (shared / "tokenizers" / "qwen").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((path / "tokenizer_config.json").read_text())
    for index in range(151_665, 151_669):
        del settings["added_tokens_decoder"][str(index)]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    smaller = load_tokenizer(str(path))
    assert (vocabulary_size(smaller), vocabulary_size(larger)) == (151_665, 151_669)
    extra = compare_vocabularies(smaller, larger)
    assert list(extra) == [151_665, 151_666, 151_667, 151_668]
    assert extra[151_667] == "<think>"
    with pytest.raises(VocabularyError, match="4 of the student's 151669 tokens"):
        compare_vocabularies(larger, smaller)

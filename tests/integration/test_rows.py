"""What users bring: kinds of files, forms of chats, missing values, several answers; and what is done with each."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

import understudy
from tests.integration.test_verbal import CHATML, byte_tokenizer
from tests.runs import BUILD, save_tiny_model, tiny_recipe, train
from understudy import config, run
from understudy.errors import CheckpointError, DataError, RecipeError
from understudy.recipe import Recipe
from understudy.recipe.checks import check
from understudy.tasks import File, Hub, Renderer, overlap
from understudy.tasks.fields import MissingValueError, accepted_answers
from understudy.tasks.overlap import problem_key
from understudy.tasks.responses import FileResponses
from understudy.tasks.verifiers import accepted
from understudy.trainer import checkpoint
from understudy.trainer.console import Console
from understudy.trainer.loop import Trainer
from understudy.types import Prompt

ROWS = [{"q": 'a, "quoted"\nline', "a": "007"}, {"q": "ü", "a": "0.10"}]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("rows.jsonl", data)
    return out.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def tarred(data: bytes) -> bytes:
    out, info = io.BytesIO(), tarfile.TarInfo("rows.jsonl")
    info.size = len(data)
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def parquet(rows: list[dict[str, Any]] | pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else rows, sink)
    return bytes(sink.getvalue())


def arrow(rows: list[dict[str, Any]] | pa.Table, opened: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    table, sink = pa.Table.from_pylist(rows) if isinstance(rows, list) else rows, pa.BufferOutputStream()
    with opened(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


TWICE = pa.table([["a"], ["b"]], names=["q", "q"])
CSV = 'q,a\n"a, ""quoted""\nline",007\nü,0.10\n'
FILES: dict[str, bytes] = {
    "rows.jsonl": lines(ROWS),
    "rows": lines(ROWS),
    "rows.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": lines(ROWS),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "rows.csv": CSV.encode(),
    "excel.csv": b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").replace('""\r\nline', '""\nline').encode(),
    "indices.csv": b',,q,a\n0,1,"a, ""quoted""\nline",007\n1,2,\xc3\xbc,0.10\n',
    "rows.tsv": CSV.replace("q,a", "q\ta").replace('",007', '"\t007').replace("ü,", "ü\t").encode(),
    "rows.parquet": parquet(ROWS),
    "file.arrow": arrow(ROWS),
    "stream.arrow": arrow(ROWS, pa.ipc.new_stream),
    "rows.jsonl.gz": gzip.compress(lines(ROWS)),
    "rows.jsonl.zst": zstd(lines(ROWS)),
    "rows.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    "rows.csv.bz2": bz2.compress(CSV.encode()),
    "rows.jsonl.zip": zipped(lines(ROWS)),
    "ROWS.CSV.GZ": gzip.compress(CSV.encode()),
    "rows.parquet.zst": zstd(parquet(ROWS)),
}


def task_of(path: Path, rows: list[dict[str, Any]] | None = None, **settings: Any) -> File:
    if rows is not None:
        path.write_bytes(lines(rows))
    return File(path=str(path), **({"prompt_field": "q"} | settings))


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    task = task_of(tmp_path / name, reference_field="a")
    task.check_files()
    prompts = task.prompts("train")
    assert [prompt.messages[0]["content"] for prompt in prompts if prompt.messages] == [row["q"] for row in ROWS]
    assert [prompt.reference for prompt in prompts] == [("007",), ("0.10",)]
    intake = task.intake("train")
    assert (intake.num_rows, intake.num_skipped) == (2, 0)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.json", b'[{"q": "a"}, ', r"r\.json: not an array of JSON: "),
        ("r.jsonl", b'{"q": "a", "q": "b"}', r"r\.jsonl:1: not a line of JSON: the name 'q' stands twice"),
        ("r.csv", b"q\n\"[{'role': 'user', 'content': 'x'}]\"\n", "begins like a list of messages and is not JSON"),
        ("r.jsonl", b'{"q": %s1%s}' % (b"[" * 900, b"]" * 900), r"r\.jsonl:1.* is nested too deeply"),
        ("r.json", b'[{"q": "a"}, 3]', r"r\.json row 1: 3 is not a JSON object"),
        ("r.csv", b'q,a\n"cut off', r"r\.csv: not \.csv, after line 1: unexpected end of data"),
        ("r.csv", b"q,a\n1,2,3\n", r"r\.csv:2: more cells than the 2 fields"),
        ("r.csv", b"q,q\n1,2\n", r"names a field twice: q, q"),
        ("r.csv", b"q\n\xff\xfe\n", r"r\.csv: not \.csv, after line 0: 'utf-8'.*; save the file as UTF-8"),
        ("r.jsonl", '{"q": "é"}'.encode("latin-1"), r"r\.jsonl:1: .*; save the file as UTF-8"),
        ("r.parquet", b"PAR1", r"r\.parquet: not a whole \.parquet file"),
        ("r.arrow", b"", r"r\.arrow: not a whole \.arrow file"),
        ("r.jsonl.bz2", bz2.compress(lines(ROWS))[:-8], r"not a whole bz2 file, after "),
        ("r.jsonl.xz", b"no", r"not a whole xz file, after its start"),
        ("r.jsonl.zip", b"no", r"not a whole zip file"),
        (
            "r.jsonl",
            b'{\n "q": "a"\n}\n{\n "q": "b"\n}\n',
            r"r\.jsonl:1: not a line of JSON \(.*in one array, or one a line",
        ),
        ("r.jsonl", '{"q": "a"}\n'.encode("utf-16"), r"r\.jsonl is text in UTF-16: save it as UTF-8"),
        ("r.csv", "q\na\n".encode("utf-16-le"), r"r\.csv is text in UTF-16: save it as UTF-8"),
        ("r.jsonl", gzip.compress(lines(ROWS), mtime=0), r"r\.jsonl is compressed inside: give its name another \.gz"),
        ("r.csv", zstd(CSV.encode()), r"r\.csv is compressed inside: give its name another \.zst"),
        ("r.jsonl.gz", gzip.compress(tarred(lines(ROWS)), mtime=0), r"r\.jsonl\.gz is a tar archive: unpack it"),
        ("r.tar", tarred(lines(ROWS)), r"r\.tar is a tar archive: unpack it"),
        ("r.jsonl", b"version https://git-lfs.github.com/spec/v1\n", r"r\.jsonl is a pointer of Git LFS"),
        ("r.parquet", parquet(TWICE), r"r\.parquet has two columns of one name: q, q"),
        ("r.arrow", arrow(TWICE), r"r\.arrow has two columns of one name: q, q"),
        ("r.xlsx", b"PK\x03\x04\xff", r"r\.xlsx:1: not a line of JSON.*known: \.jsonl, "),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        task_of(tmp_path / name).prompts("train")


def test_a_folder_and_a_pattern(tmp_path: Path) -> None:
    for split, texts in {"train-0": "ab", "train-1": "c", "test-0": "d"}.items():
        (tmp_path / f"{split}.parquet").write_bytes(parquet([{"q": text} for text in texts]))
    (tmp_path / "README.md").write_text("# rows")
    with pytest.raises(RecipeError, match=r"files of several kinds or splits \(test\*, train\*\); name .*\*train\*"):
        task_of(tmp_path).prompts("train")
    assert len(task_of(tmp_path / "train-*.parquet").prompts("train")) == 3
    (tmp_path / "test-0.parquet").unlink()
    assert len(task_of(tmp_path).prompts("train")) == 3
    (tmp_path / "more.csv").write_text("q\nd\n")
    with pytest.raises(RecipeError, match=r"several kinds or splits \(\.csv, \.parquet\)"):
        task_of(tmp_path).prompts("train")
    with pytest.raises(RecipeError, match="no file matches"):
        task_of(tmp_path / "dev-*.parquet").check_files()
    (tmp_path / "splits").mkdir()
    for name in ("training", "testing"):
        (tmp_path / "splits" / f"{name}.jsonl").write_bytes(lines([{"q": "x"}]))
    with pytest.raises(RecipeError, match=r"splits \(testing\*, training\*\)"):
        task_of(tmp_path / "splits").check_files()
    for names, found in {
        ("data.jsonl", "test.jsonl"): r"splits \(data\.jsonl, test\*\)",
        ("extra.jsonl", "train.jsonl"): r"splits \(extra\.jsonl, train\*\)",
        ("train.jsonl", "train.jsonl.gz"): r"train\.jsonl and train\.jsonl\.gz look like the same rows twice",
    }.items():
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes((gzip.compress if name.endswith(".gz") else bytes)(lines([{"q": "x"}])))
        with pytest.raises(RecipeError, match=found):
            task_of(folder).check_files()
    with pytest.raises(RecipeError, match="the same rows twice"):
        task_of(folder / "train*").check_files()
    (tmp_path / "none").mkdir()
    with pytest.raises(RecipeError, match=r"no file that can be read; known: [., a-z]+$"):
        task_of(tmp_path / "none").check_files()
    (tmp_path / "none/data").mkdir()
    with pytest.raises(RecipeError, match=r"a pattern reads the folders in it: .*none/\*\*/\*\.jsonl"):
        task_of(tmp_path / "none").check_files()
    (tmp_path / "none/.hidden.csv").write_bytes(b"\0")
    (tmp_path / "none/rows.jsonl").write_bytes(lines([{"q": "x"}]))
    assert len(task_of(tmp_path / "none").prompts("train")) == 1
    with pytest.raises(RecipeError, match="is an address; name a file of this machine, or a data set of the hub"):
        File(path="hf://datasets/a/b/train.jsonl", prompt_field="q").check_files()


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        assert len(Hub(dataset=str(tmp_path / name), prompt_field="q").prompts("train")) == 2


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    task = task_of(tmp_path / "r.jsonl", [{"q": "a"}])
    before = task.intake("train")
    assert task_of(tmp_path / "r.jsonl", [{"q": "b"}, {"q": "c"}]) == task
    assert (before.num_rows, task.intake("train").num_rows) == (1, 2)
    assert before.digest != task.intake("train").digest


# Missing values


@pytest.mark.parametrize("answer", ["null", "NaN", '""', '" \\n"', "[]", "[null]", None])
def test_a_row_without_an_answer_is_left_out_and_counted(tmp_path: Path, answer: str | None) -> None:
    """The others keep their ids and splits: "b" is the second row of its kind with and without the first."""
    given = "" if answer is None else f', "a": {answer}'
    first = '{"q": "b"' + given + "}\n"
    (tmp_path / "r.jsonl").write_text(first + '{"q": "b", "a": "1"}\n{"q": "c", "a": "2"}\n')
    task = task_of(tmp_path / "r.jsonl", reference_field="a")
    task.check_files()
    full = task_of(tmp_path / "full.jsonl", [{"q": "b", "a": "0"}, {"q": "b", "a": "1"}, {"q": "c", "a": "2"}])
    ids = [prompt.id.partition("/")[2].partition("/")[2] for prompt in full.prompts("train")]
    assert [prompt.id.partition("/")[2].partition("/")[2] for prompt in task.prompts("train")] == ids[1:]
    intake = task.intake("train")
    assert (intake.num_rows, intake.num_skipped) == (3, 1)
    assert intake.skipped[0].startswith(f"{tmp_path}/r.jsonl:1: ")
    assert "'a'" in intake.skipped[0]


def test_missing_values_of_tables(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("q,a\nx,1\ny,\nz,NaN\n,4\n")
    (tmp_path / "r.parquet").write_bytes(
        parquet([{"q": "x", "a": 1.0}, {"q": "y", "a": None}, {"q": "z", "a": float("nan")}, {"q": None, "a": 4.0}])
    )
    for name in ("r.csv", "r.parquet"):
        task = task_of(tmp_path / name, reference_field="a")
        assert [prompt.reference for prompt in task.prompts("train")] == [("1",)]
        assert task.intake("train").num_skipped == 3


def test_rows_that_are_all_without_a_value_are_refused(tmp_path: Path) -> None:
    task = task_of(tmp_path / "r.jsonl", [{"q": "b", "answer": "1"}], reference_field="answers")
    for call in (task.check_files, lambda: task.prompts("train")):
        with pytest.raises(
            DataError, match=r"r\.jsonl:1: no field 'answers'; fields: q, answer .*did you mean 'answer'"
        ):
            call()
    rows = [{"q": "b", "a": None}] * 20
    with pytest.raises(DataError, match="none of the 20 rows of .* can be used"):
        task_of(tmp_path / "r.jsonl", rows, reference_field="a").prompts("train")


# Accepted answers


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ("1", ["1"]),
        (7, ["7"]),
        (10**400, ["1" + "0" * 400]),
        (12.0, ["12"]),
        (1e-07, ["0.0000001"]),
        (True, ["true", "True", "yes", "Yes"]),
        (["Jon", "John", None], ["Jon", "John"]),
        ([["a", "b"], ["c"]], ["a", "b", "c"]),
        ([1, 1, 0.5], ["1", "1", "0.5"]),
        ([-0.0, 0.1], ["0", "0.1"]),
    ],
)
def test_accepted_answers(value: object, answers: list[str]) -> None:
    assert list(dict.fromkeys(accepted_answers(value))) == list(dict.fromkeys(answers))


def test_several_answers_are_graded(tmp_path: Path) -> None:
    rows = [{"q": "Who?", "a": {"value": "Jon Snow", "aliases": ["John Snow", "Aegon"]}}, {"q": "1+1?", "a": 2}]
    rows[1]["a"] = {"aliases": [2, "two"]}
    task = task_of(tmp_path / "r.jsonl", rows, reference_field="a.aliases", verifier="exact")
    who, sums = task.prompts("train")
    assert [task.grade(who, text).right for text in ("Aegon", "John Snow", "Jon")] == [True, True, False]
    assert [task.grade(sums, text).right for text in ("2", "two", "3")] == [True, True, False]
    rows = [{"q": "x", "a": ["so #### 1", "or #### 2"]}]
    marked = task_of(tmp_path / "m.jsonl", rows, reference_field="a", reference_after="####")
    assert marked.prompts("train")[0].reference == ("1", "2")


def test_answers_in_several_fields(tmp_path: Path) -> None:
    """As MuSiQue has them; no field may be missing from every row without a word."""
    rows: list[dict[str, Any]] = [
        {"q": "Who?", "answer": "Pirates", "answer_aliases": ["Orioles", "Pirates"]},
        {"q": "Where?", "answer": "Stanley", "answer_aliases": []},
        {"q": "When?", "answer": None, "answer_aliases": []},
    ]
    task = task_of(tmp_path / "r.jsonl", rows, reference_field="answer, answer_aliases")
    assert [prompt.reference for prompt in task.prompts("train")] == [("Pirates", "Orioles"), ("Stanley",)]
    assert task.intake("train").num_skipped == 1
    fewer = [row | {"answer_aliases": []} for row in rows]
    changed = task_of(tmp_path / "c.jsonl", fewer, reference_field="answer, answer_aliases")
    assert changed.intake("train").digest != task.intake("train").digest
    with pytest.raises(DataError, match="no field 'other'"):
        task_of(tmp_path / "r.jsonl", rows, reference_field="answer, other").prompts("train")
    comma = task_of(tmp_path / "d.jsonl", [{"q": "x", "a, b": "1"}], reference_field="a, b")
    assert comma.prompts("train")[0].reference == ("1",)


def test_arrays_of_numpy(tmp_path: Path) -> None:
    """Rows of pandas have them where a file of Parquet has lists."""
    row = {"q": np.array([USER, ASSISTANT], dtype=object), "a": np.array(["1", "one"]), "n": np.int64(7)}
    prompt = task_of(tmp_path / "r.jsonl", reference_field="a", teacher_field="n").to_prompt("row 1", row)
    assert (prompt.messages, prompt.reference, prompt.teacher) == ((USER,), ("1", "one"), "7")


def test_floats_of_fewer_bits_are_read_as_they_are_written(tmp_path: Path) -> None:
    """In a column, in lists and objects of a column, in a data set, and in arrays."""
    floats = pa.array([0.1, -0.0], pa.float32())
    objects = pa.array([{"x": [0.1]}, {"x": [None, 2.0]}], pa.struct([("x", pa.list_(pa.float32()))]))
    table = pa.table({"q": ["a", "b"], "a": floats, "o": objects})
    (tmp_path / "r.parquet").write_bytes(parquet(table))
    (tmp_path / "r.arrow").write_bytes(arrow(table))
    for name in ("r.parquet", "r.arrow"):
        for field, second in (("a", "0"), ("o.x", "2")):
            prompts = task_of(tmp_path / name, reference_field=field).prompts("train")
            assert [prompt.reference for prompt in prompts] == [("0.1",), (second,)], (name, field)
    Dataset(table).save_to_disk(tmp_path / "saved")
    hub = Hub(dataset=str(tmp_path / "saved"), prompt_field="q", reference_field="o.x")
    assert [prompt.reference for prompt in hub.prompts("train")] == [("0.1",), ("2",)]
    row = {"q": "a", "a": np.array([0.1], dtype=np.float32), "n": np.float16(0.1)}
    prompt = task_of(tmp_path / "r.jsonl", reference_field="a", teacher_field="n").to_prompt("row 1", row)
    assert (prompt.reference, prompt.teacher) == (("0.1",), "0.1")
    assert accepted([np.float32(0.1), np.float16(-0.0)]) == ["0.1", "0"]


def test_rows_of_pandas(tmp_path: Path) -> None:
    """Arrays inside of arrays, and nulls of its own."""
    parts = np.array([{"type": "text", "text": "user"}], dtype=object)
    tool = {"name": "f", "parameters": {"required": np.array(["a"], dtype=object)}}
    row = {
        "q": np.array([{"role": "user", "content": parts}], dtype=object),
        "tools": np.array([tool], dtype=object),
        "a": pd.NA,
    }
    prompt = task_of(tmp_path / "r.jsonl").to_prompt("row 1", row)
    assert prompt.messages == (USER,)
    assert prompt.tools == ({"name": "f", "parameters": {"required": ["a"]}},)
    for null in (pd.NA, pd.NaT):
        with pytest.raises(MissingValueError, match="field 'a' is null"):
            task_of(tmp_path / "r.jsonl", reference_field="a").to_prompt("row 1", row | {"a": null})


# Chats

USER, SYSTEM, ASSISTANT = ({"role": role, "content": role} for role in ("user", "system", "assistant"))
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def chat(tmp_path: Path, *messages: Any, tools: Any = None, **settings: Any) -> Prompt:
    row = {"q": list(messages)} | ({} if tools is None else {"tools": tools})
    return task_of(tmp_path / "chat.jsonl", [row], **settings).prompts("train")[0]


def test_the_last_turn_of_the_assistant_is_the_solution(tmp_path: Path) -> None:
    prompt = chat(
        tmp_path,
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        template="{prompt}\nThink.",
        system="Be brief.",
    )
    assert prompt.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?\nThink."},
    )
    assert prompt.solution == "4"
    plain = task_of(tmp_path / "p.jsonl", [{"q": "2+2?"}]).prompts("train")[0]
    assert problem_key(prompt) == problem_key(plain) == blake2b(b"2+2?", digest_size=8).hexdigest()
    for name in ("reasoning", "thinking"):
        assert chat(tmp_path, USER, ASSISTANT | {name: "hm"}).solution == "<think>\nhm\n</think>\n\nassistant"
    for role in ("gpt", "chatgpt", "bard", "Assistant"):
        assert chat(tmp_path, {"from": "Human", "value": "user"}, {"from": role, "value": "4"}).messages == (USER,)
    for nothing in (None, "", " \n"):
        asked = task_of(tmp_path / "asked.jsonl", [{"q": [USER | {"content": nothing}]}, {"q": [USER]}])
        assert (len(asked.prompts("train")), asked.intake("train").num_skipped) == (1, 1)
    for nothing in (None, ""):
        rows = [{"q": [USER, ASSISTANT | {"content": nothing}]}, {"q": [USER, ASSISTANT]}]
        task = task_of(tmp_path / "empty.jsonl", rows)
        assert [prompt.solution for prompt in task.prompts("train")] == ["assistant"]
        assert "ends with an empty turn of the assistant" in task.intake("train").skipped[0]
    for role in ("tool", "assistant", "system"):
        rows = [{"q": [USER, {"role": role, "content": None}, USER]}, {"q": [USER, ASSISTANT]}]
        task = task_of(tmp_path / "null.jsonl", rows)
        assert len(task.prompts("train")) == 1
        assert f"message 2 ({role}) has no content" in task.intake("train").skipped[0]
        (tmp_path / "null.parquet").write_bytes(parquet(rows))
        assert task_of(tmp_path / "null.parquet").intake("train").num_skipped == 1
    empty = chat(tmp_path, USER, ASSISTANT | {"reasoning_content": "", "thinking": "", "tool_calls": ""})
    assert (empty.messages, empty.solution) == ((USER,), "assistant")
    thought = chat(tmp_path, USER, ASSISTANT | {"reasoning_content": "hm"})
    assert thought.solution == "<think>\nhm\n</think>\n\nassistant"
    called = chat(tmp_path, USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]})
    assert (called.messages, called.solution) == ((USER,), None)


def test_a_solution_may_be_a_message(tmp_path: Path) -> None:
    """TRL's prompt and completion are both lists of messages."""

    def solution(*messages: Any) -> str | None:
        rows = [{"prompt": [USER], "completion": list(messages)}]
        settings = {"prompt_field": "prompt", "solution_field": "completion"}
        return task_of(tmp_path / "r.jsonl", rows, **settings).prompts("train")[0].solution

    assert solution(ASSISTANT) == "assistant"
    rows = [{"q": "x", "s": value} for value in (json.dumps([ASSISTANT]), '[{"value": 1}]', 12.0, 1e-7)]
    found = task_of(tmp_path / "s.jsonl", rows, solution_field="s").prompts("train")
    assert [prompt.solution for prompt in found] == ["assistant", '[{"value": 1}]', "12", "0.0000001"]
    for wrong in ([USER, ASSISTANT], [USER]):
        with pytest.raises(DataError, match="'completion' must hold one message of the assistant"):
            solution(*wrong)


def test_wording_goes_around_the_last_message_of_the_user(tmp_path: Path) -> None:
    result = {"role": "tool", "content": "4", "tool_call_id": "1"}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    prompt = chat(tmp_path, USER, called, result, tools=[TOOL], template="<{prompt}>")
    assert prompt.messages == ({"role": "user", "content": "<user>"}, called, result)
    assert (prompt.tools, prompt.solution) == ((TOOL,), None)


@pytest.mark.parametrize(
    ("messages", "settings", "message"),
    [
        ([USER, ASSISTANT, ASSISTANT], {}, "leaves nothing to answer: before its end comes 'assistant'"),
        ([USER, {"role": "critic", "content": "x"}], {}, "before its end comes 'critic', not a user or a tool"),
        ([ASSISTANT], {}, "leaves nothing to answer"),
        ([USER, SYSTEM], {}, "leaves nothing to answer: before its end comes 'system'"),
        ([USER, ASSISTANT], {"solution_field": "s"}, "ends with the assistant, and task.solution_field"),
        ([SYSTEM, USER], {"system": "x"}, "the chat has a system message, and so has task.system; keep one"),
        (
            [{"role": "tool", "content": "4"}],
            {"template": "{prompt}!"},
            "no message of the user to put into task.template",
        ),
        ([SYSTEM, USER], {"chat": False}, "has 2 messages, of which chat: false takes one"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], {}, "a part of type 'image_url'"),
        ([{"role": "user", "content": 3}], {}, r"message 1 \(user\) has the content 3"),
        ([USER, {"role": "tool", "content": {"x": 1}}], {}, r"has the content .*\(what a tool returns is JSON in a"),
        ([USER, {"role": "tool", "content": ["x", "y"]}], {}, r"has the content \['x', 'y'\]; it must be a string"),
        ([{"content": "x"}], {}, "message 1 is .*must have role and content"),
        (["x"], {}, "message 1 is 'x'"),
        ([[USER], [USER]], {}, "message 1 is .*must have role and content"),
        (
            [USER, {"role": "assistant", "content": "", "tool_calls": ["add"]}, USER],
            {},
            "message 2 has the tool call 'add'",
        ),
        ([USER, {"from": "function_call", "value": "add("}], {}, "tool calls is 'add.', which is not JSON"),
    ],
)
def test_a_chat_that_cannot_be_answered_is_refused(
    tmp_path: Path, messages: list[Any], settings: dict[str, Any], message: str
) -> None:
    row = {"q": messages, "s": "1"}
    with pytest.raises(DataError, match=rf"chat\.jsonl:1: .*{message}"):
        task_of(tmp_path / "chat.jsonl", [row], **settings).prompts("train")


@pytest.mark.parametrize("tools", ["{", [3], {"add": {}}, ["{}"], [{"type": "function"}]])
def test_tools_that_are_none_are_refused(tmp_path: Path, tools: Any) -> None:
    with pytest.raises(DataError, match=r"chat\.jsonl:1: field 'tools'.*set task\.tools_field to null"):
        chat(tmp_path, USER, tools=tools)
    assert chat(tmp_path, USER, tools=tools, tools_field=None).tools is None
    with pytest.raises(DataError, match="no field 'function'"):
        chat(tmp_path, USER, tools=tools, tools_field="function")


PLAIN = ({"role": "system", "content": "system"}, {"role": "user", "content": "a b"})
FORMS: dict[str, Any] = {
    "openai": [SYSTEM, {"role": "user", "content": "a b"}],
    "padded": [
        {"role": "system", "content": "system", "tool_calls": None, "name": None},
        {"role": "user", "content": "a b", "reasoning_content": None},
    ],
    "parts": [
        SYSTEM,
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "url": None}]},
    ],
    "sharegpt": [{"from": "system", "value": "system"}, {"from": "human", "value": "a b"}],
    "columns": {"role": ["system", "user"], "content": ["system", "a b"]},
    "nested": [[SYSTEM, {"role": "user", "content": "a b"}]],
    "json": json.dumps([SYSTEM, {"role": "user", "content": "a b"}]),
    "indented": json.dumps([SYSTEM, {"role": "user", "content": "a b"}], indent=1),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_chat_gives_the_same_messages(tmp_path: Path, name: str) -> None:
    rows = [{"conversations": FORMS[name]}]
    assert task_of(tmp_path / "r.jsonl", rows, prompt_field="conversations").prompts("train")[0].messages == PLAIN


def test_sharegpt_with_tools(tmp_path: Path) -> None:
    said = {
        "human": "2+2?",
        "function_call": '{"name": "add", "arguments": {"a": 2}}',
        "observation": "4",
        "gpt": "It is 4.",
    }
    rows = [
        {"conversations": [{"from": role, "value": value} for role, value in said.items()], "tools": json.dumps([TOOL])}
    ]
    (prompt,) = task_of(tmp_path / "r.jsonl", rows, prompt_field="conversations").prompts("train")
    roles = [message["role"] for message in prompt.messages or ()]
    assert (roles, prompt.solution, prompt.tools) == (["user", "assistant", "tool"], "It is 4.", (TOOL,))
    assert prompt.messages is not None
    assert prompt.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    ]


def test_the_padding_of_a_columnar_format_is_taken_out(tmp_path: Path) -> None:
    """Nulls that a row of JSON has among the arguments of a call are its own, and stay."""

    def tool(name: str, **properties: Any) -> dict[str, Any]:
        return {
            "type": "function",
            "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
        }

    def row(call: dict[str, Any], *tools: Any) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": "add", "arguments": call}}]
        called = {"role": "assistant", "content": None, "tool_calls": calls}
        return {"q": [USER, called, {"role": "tool", "content": "4"}], "tools": list(tools)}

    one, two = tool("add", a={"type": "number"}), tool("find", city={"type": "string", "enum": ["x"]})
    rows = [row({"a": 1}, one, two), row({"city": "x"}, two)]
    (tmp_path / "r.parquet").write_bytes(parquet(rows))
    first, second = task_of(tmp_path / "r.parquet").prompts("train")
    plain = task_of(tmp_path / "r.jsonl", rows).prompts("train")
    assert (first.messages, first.tools) == (plain[0].messages, (one, two))
    assert (second.messages, second.tools) == (plain[1].messages, (two,))
    assert [problem_key(first), problem_key(second)] == [problem_key(prompt) for prompt in plain]
    padded = json.loads(json.dumps(one).replace('"number"', '"number", "enum": null'))
    (prompt,) = task_of(tmp_path / "n.jsonl", [row({"a": None}, padded)]).prompts("train")
    assert prompt.tools == (one,)
    assert prompt.messages is not None
    assert prompt.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}


# The key of a problem


def test_the_whole_conversation_is_the_problem(tmp_path: Path) -> None:
    """Two chats that end with the same question are two problems, for stored responses and for the overlap."""
    sure = {"role": "user", "content": "Are you sure?"}
    chats = [
        [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}, sure],
        [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}, sure],
        [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}, sure],
        [sure],
    ]
    rows = [{"q": said, "a": f"no {number}"} for number, said in enumerate(chats)]
    rows.append({"q": [sure], "tools": [TOOL], "a": "no 4"})
    prompts = task_of(tmp_path / "r.jsonl", rows).prompts("train")
    assert len({problem_key(prompt) for prompt in prompts}) == 5
    for number, prompt in enumerate(prompts):
        assert overlap([prompt], prompts) == [prompt.id], number
    find = FileResponses(path=str(tmp_path / "r.jsonl"), prompt_field="q", response_field="a").find()
    assert [list(find(prompt)) for prompt in prompts] == [[f"no {number}"] for number in range(5)]
    spelled = task_of(
        tmp_path / "s.jsonl", [{"q": [{**said, "content": said["content"].upper()} for said in chats[0]]}]
    )
    assert problem_key(spelled.prompts("train")[0]) == problem_key(prompts[0])


def test_responses_at_the_end_of_chats(tmp_path: Path) -> None:
    rows = [{"q": [USER, ASSISTANT]}, {"q": [USER, ASSISTANT | {"content": "other"}]}]
    task_of(tmp_path / "r.jsonl", rows)
    find = FileResponses(path=str(tmp_path / "r.jsonl"), prompt_field="q").find()
    (prompt,) = task_of(tmp_path / "p.jsonl", [{"q": "User"}]).prompts("train")
    assert list(find(prompt)) == ["assistant", "other"]
    with pytest.raises(RecipeError, match="no row of .* has a response; give responses.response_field"):
        FileResponses(path=str(tmp_path / "p.jsonl"), prompt_field="q").find()


# In a run

SUMS = [{"q": f"{a}+{b}:", "a": f"{a}{b}0={a + b:02d}#{a + b}"} for a in range(1, 10) for b in range(10 - a)]


def of_files(folder: Path, rows: list[dict[str, Any]] = SUMS, **changes: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.jsonl").write_bytes(lines(rows))
    task = {
        "type": "file",
        "path": str(folder / "data.jsonl"),
        "prompt_field": "q",
        "solution_field": "a",
        "chat": False,
    }
    student = {"build": dict(BUILD), "tokenizer": save_tiny_model(folder / "tokens", seed=1)}
    return {"task": task, "student": student} | changes


def dry_run(folder: Path, **changes: Any) -> list[str]:
    return check(config.parse(Recipe, tiny_recipe(folder, **changes)))


def test_a_resumed_run_refuses_other_data(tmp_path: Path) -> None:
    """Not another time of the same file, and not rows of which nothing is read."""
    settings = {
        "eval": {"at_start": False, "problems": 2, "split": "test"},
        "train": {"steps": 2, "prompts_per_step": 2},
    }
    changes = of_files(tmp_path, SUMS[:8], **settings)
    held_out = tmp_path / "test.jsonl"
    held_out.write_bytes(lines(SUMS[8:10]))
    changes["task"]["test_path"] = str(held_out)
    run_dir = train(tmp_path, **changes)
    saved = json.loads((run_dir / "checkpoints/step_000002/progress.json").read_text())["inputs"]
    rows = {name: facts["rows"] for name, facts in saved.items() if "rows" in facts}
    assert rows == {"task.train": 8, "task.test": 2}
    (tmp_path / "data.jsonl").write_bytes(lines([row | {"other": 1} for row in SUMS[:8]]))
    train(tmp_path, resume=True, **changes)
    for rows, found in ((SUMS[:9], "rows 8, now 9"), (SUMS[1:9], "8 rows as before, but others")):
        (tmp_path / "data.jsonl").write_bytes(lines(rows))
        with pytest.raises(
            CheckpointError, match=rf"not what this run began with: task\.train \(.*data\.jsonl\): {found}"
        ):
            train(tmp_path, resume=True, **changes)
    (tmp_path / "data.jsonl").write_bytes(lines(SUMS[:8]))
    held_out.write_bytes(lines(SUMS[9:11]))
    with pytest.raises(CheckpointError, match=r"task\.test \(.*test\.jsonl\): 2 rows as before, but others"):
        train(tmp_path, resume=True, **changes)


def test_a_resumed_run_refuses_other_responses(tmp_path: Path) -> None:
    changes = of_files(tmp_path, train={"steps": 2, "prompts_per_step": 2})
    (tmp_path / "said.jsonl").write_bytes(lines(SUMS))
    said = {"type": "file", "path": str(tmp_path / "said.jsonl"), "prompt_field": "q", "response_field": "a"}
    train(tmp_path, responses=said, **changes)
    (tmp_path / "said.jsonl").write_bytes(lines(SUMS[1:]))
    with pytest.raises(CheckpointError, match=rf"responses \(.*said\.jsonl\): rows {len(SUMS)}, now {len(SUMS) - 1}"):
        train(tmp_path, resume=True, responses=said, **changes)


def test_tools_beside_plain_text_are_said(tmp_path: Path) -> None:
    changes = of_files(tmp_path, [row | {"tools": [TOOL]} for row in SUMS])
    (line,) = [line for line in dry_run(tmp_path, **changes) if "does not read" in line]
    assert re.fullmatch(r"the student does not read tools .*: with chat: false it reads the text alone", line)


def test_left_out_rows_are_counted_in_the_dry_run_and_in_the_run(tmp_path: Path) -> None:
    rows = [*SUMS[:3], {"q": "1+1:", "a": None}, *SUMS[3:]]
    changes = of_files(tmp_path, rows)
    line = next(line for line in dry_run(tmp_path, **changes) if line.startswith("task.train: "))
    assert line == f"task.train: 46 rows, rows_skipped: 1 ({tmp_path}/data.jsonl:4: field 'a' is null)"
    run_dir = train(tmp_path, **changes)
    facts = json.loads((run_dir / "run.json").read_text())
    assert (facts["rows"], facts["rows_skipped"]) == ({"task.train": 46}, {"task.train": 1})
    warnings = [json.loads(event)["text"] for event in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [text for text in warnings if "rows_skipped: 1" in text], warnings


def test_left_out_rows_of_an_evaluation_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = of_files(tmp_path, SUMS[:4])
    (tmp_path / "test.jsonl").write_bytes(lines([*SUMS[:2], {"q": "1+1:", "a": None}]))
    changes["task"] |= {"test_path": str(tmp_path / "test.jsonl"), "reference_field": "a", "verifier": "exact"}
    understudy.evaluate(config.parse(Recipe, tiny_recipe(tmp_path, **changes, eval={"split": "test"})))
    said = " ".join(capsys.readouterr().out.split())
    assert "task.test: 3 rows, rows_skipped: 1" in said
    assert "task.train" not in said


def test_few_left_out_rows_are_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = of_files(tmp_path, [*SUMS * 3, {"q": "1+1:", "a": None}], train={"steps": 1, "prompts_per_step": 2})
    recipe = config.parse(Recipe, tiny_recipe(tmp_path, **changes))
    run.train(recipe, examine=False, console=Console())
    assert "task.train: 136 rows, rows_skipped: 1" in " ".join(capsys.readouterr().out.split())
    assert "rows_skipped" not in (tmp_path / "run" / "events.jsonl").read_text()


def test_a_row_without_a_solution_is_named_before_it_is_imitated(tmp_path: Path) -> None:
    changes, asked = of_files(tmp_path), {"role": "user", "content": "1+1:"}
    (tmp_path / "data.jsonl").write_bytes(
        lines([{"q": [asked, {"role": "assistant", "content": "110=02#2"}]}, {"q": [asked]}])
    )
    changes["task"]["solution_field"] = None
    said = changes | {"task": changes["task"] | {"solution_field": "q"}}
    assert "task.train: 2 rows, rows_skipped: 1" in "\n".join(dry_run(tmp_path, **said))
    with pytest.raises(RecipeError, match=r"but 1 of 2 prompts of task have none .*: a chat has one where it ends"):
        dry_run(tmp_path, **changes)


def with_template(folder: Path, template: str) -> str:
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_what_the_template_leaves_out_and_control_tokens_are_said_once(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    called = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]}
    said = [USER, called, {"role": "tool", "content": "4", "tool_call_id": "1"}, ASSISTANT]
    rows = [{"q": said, "tools": [TOOL]}] * 2 + [{"q": [{"role": "user", "content": "<|im_end|>x"}, ASSISTANT]}]
    changes = of_files(tmp_path, rows)
    changes["task"] |= {"solution_field": None, "chat": True}
    changes["student"]["tokenizer"] = with_template(tmp_path / "chatml", CHATML)
    found = dry_run(tmp_path, **changes)
    (unused,) = [line for line in found if "does not read" in line]
    names = ["tools", "reasoning_content", "tool_calls"]
    assert [name for name in (*names, "messages of role", "tool_call_id") if name in unused] == names
    assert unused.count("tools (of prompt") == 1
    (spelled,) = [line for line in found if "prompts_with_special_tokens" in line]
    assert spelled.startswith("prompts_with_special_tokens: 1 (")
    message = "{{ m['content'] }}"
    shown = "{{ tools }}" + CHATML.replace(message, message + "{{ m.tool_calls }}{{ m.reasoning_content }}")
    changes["student"]["tokenizer"] = with_template(tmp_path / "all", shown)
    assert not [line for line in dry_run(tmp_path, **changes) if "does not read" in line]
    no_tools = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    assert no_tools != CHATML
    changes["student"]["tokenizer"] = with_template(tmp_path / "less", no_tools)
    assert "messages of role 'tool'" in next(line for line in dry_run(tmp_path, **changes) if "does not read" in line)


def test_wording_keeps_its_control_tokens_and_plain_text_of_the_data_has_none(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat=True)
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    rows = [{"q": "hi"}, {"q": "<|im_end|>\n<|im_start|>system"}]
    task = task_of(tmp_path / "r.jsonl", rows, chat=False, template="<|im_start|>user\n{prompt}<|im_end|>\n")
    renderer = Renderer(tokenizer)
    for prompt, row in zip(task.prompts("train"), rows, strict=True):
        ids = renderer.start(prompt).tolist()
        assert [index for index in ids if index in (start, end)] == [start, end]
        assert tokenizer.decode(ids) == f"<|im_start|>user\n{row['q']}<|im_end|>\n"
        assert renderer.spells_control(prompt) == ("<|" in row["q"])


def test_a_run_reads_its_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are gone after the first step change nothing."""
    changes = of_files(
        tmp_path, eval={"every": 1, "problems": 2, "split": "test"}, train={"steps": 2, "prompts_per_step": 2}
    )
    (tmp_path / "test.jsonl").write_bytes(lines(SUMS[:4]))
    changes["task"] |= {"test_path": str(tmp_path / "test.jsonl")}
    plain = Trainer._take_step

    def without_files(self: Trainer) -> None:
        for path in tmp_path.glob("*.jsonl"):
            path.unlink()
        plain(self)

    monkeypatch.setattr(Trainer, "_take_step", without_files)
    facts = json.loads((train(tmp_path, **changes) / "run.json").read_text())
    assert (facts["status"], facts["rows"]) == ("finished", {"task.train": len(SUMS), "task.test": 4})


def test_a_checkpoint_without_fingerprints_is_resumed_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = of_files(tmp_path, train={"steps": 1, "prompts_per_step": 2})
    folder = train(tmp_path, **changes) / "checkpoints/step_000001"
    values = json.loads((folder / "progress.json").read_text())
    del values["inputs"]
    (folder / "progress.json").write_text(json.dumps(values))
    (folder / "files.json").write_text(json.dumps(checkpoint._digest(folder)))
    recipe = config.parse(Recipe, tiny_recipe(tmp_path, **changes))
    run.train(recipe, resume=True, examine=False, console=Console())
    assert "does not say which data it was made with" in " ".join(capsys.readouterr().out.split())

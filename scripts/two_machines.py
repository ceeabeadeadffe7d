"""Two machines on one: `torchrun` over two network namespaces that a cable joins, and the same run by one process.

Each namespace has its own address, interface and loopback, and reaches the other by the cable alone. They belong to a user
namespace and are gone when the script ends, so nobody has to be root. Needs Linux, `unshare` (util-linux), `ip` (iproute2) and
user namespaces. Exits with 1 where losses or weights differ by more than 1e-5.

    python scripts/two_machines.py                       two ranks on each machine, which has the whole student
    python scripts/two_machines.py --ranks 1 --steps 5   one on each, half of the student
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MACHINES = {"first": "10.77.0.1", "second": "10.77.0.2"}
"""Namespaces and their addresses."""
CABLE, PORT = "cable0", 29_500
TOLERANCE = 1e-5
UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--kill-child"]


def missing() -> str | None:
    """Why no namespaces can be made here; None where they can."""
    for program, package in (("unshare", "util-linux"), ("ip", "iproute2")):
        if shutil.which(program) is None:
            return f"there is no program {program}; install {package}"
    command = [*UNSHARE, "sh", "-c", "mount -t tmpfs tmpfs /run && ip link add one0 type veth peer name two0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (fixed)
    return None if done.returncode == 0 else f"namespaces are closed to this user: {done.stderr.strip()}"


def join() -> None:
    """Makes the namespaces and their cable, in a process that `UNSHARE` has started; they end with it."""
    # where `ip` keeps names of namespaces; this process alone sees it
    call("mount", "-t", "tmpfs", "tmpfs", "/run")
    first, second = MACHINES
    for name in MACHINES:
        call("ip", "netns", "add", name)
    call("ip", "link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
    for name, address in MACHINES.items():
        call("ip", "-n", name, "address", "add", f"{address}/24", "dev", CABLE)
        for link in ("lo", CABLE):
            call("ip", "-n", name, "link", "set", link, "up")


def call(*words: str) -> str:
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603 (names and numbers)


def bytes_sent(machine: str) -> int:
    (link,) = json.loads(call("ip", "-n", machine, "-json", "-statistics", "link", "show", CABLE))
    return int(link["stats64"]["tx"]["bytes"])


def recipe_of(folder: Path, run_dir: str, steps: int, parallel: dict[str, Any] | None) -> Path:
    values = {
        "run_dir": str(folder / run_dir),
        "student": {"model": str(folder / "student")},
        "teacher": {"type": "local", "model": str(folder / "teacher")},
        "task": {"type": "arithmetic", "family": "addition"},
        "method": {"type": "gkd"},
        "sampling": {"max_new_tokens": 24},
        # an odd number of prompts, so that ranks have unequal shares
        "train": {"steps": steps, "prompts_per_step": 5, "lr": 1e-3, "save_samples_every": 0},
        "device": "cpu",
    } | ({} if parallel is None else {"parallel": parallel})
    path = folder / f"{run_dir}.yaml"
    path.write_text(json.dumps(values))
    return path


def train_over_machines(recipe: Path, ranks: int) -> int:
    """Returns the exit code of the run, whose output is in a file for each machine."""
    started = []
    join()
    for number, name in enumerate(MACHINES):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", str(ranks)]
        command += ["--master-addr", MACHINES["first"], "--master-port", str(PORT)]
        command += ["-m", "understudy", "train", str(recipe), "--no-doctor"]
        # else gloo goes by the name of the host, which both machines share
        environment = os.environ | {"GLOO_SOCKET_IFNAME": CABLE}
        with recipe.with_name(f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603
            started.append(process)
    codes = [one.wait() for one in started]
    sent = {name: bytes_sent(name) for name in MACHINES}
    print("over the cable: " + ", ".join(f"{sent[name] / 1e6:.1f} MB from the {name} machine" for name in MACHINES))
    return max(codes, key=abs)


def compare(folder: Path) -> bool:
    """Prints the largest differences between the two runs; returns whether they are small enough."""
    from safetensors.torch import load_file

    rows = [(folder / name / "metrics.jsonl").read_text().splitlines() for name in ("alone", "joined")]
    pairs = list(zip(*([json.loads(line)["loss"] for line in one] for one in rows), strict=True))
    loss = max(abs(one - other) for one, other in pairs)
    models = [load_file(folder / name / "student" / "model.safetensors") for name in ("alone", "joined")]
    assert models[0].keys() == models[1].keys()
    weight = max(float((models[0][name] - models[1][name]).abs().max()) for name in models[0])
    first, last = pairs[0][0], pairs[-1][0]
    print(
        f"{len(pairs)} steps, loss {first:.4f} to {last:.4f}; one process and two machines differ by at most {loss:.1e}"
    )
    print(f"in the loss and {weight:.1e} in a weight (allowed: {TOLERANCE:g})")
    # written so that NaN is a difference too
    return loss <= TOLERANCE and weight <= TOLERANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="ranks on each machine")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        sys.exit(train_over_machines(given.inside, given.ranks))
    if reason := missing():
        sys.exit(f"two machines were not tried: {reason}")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder)
        from understudy import Recipe, train

        train(Recipe.load(recipe_of(folder, "alone", given.steps, None)), examine=False, quiet=True)
        # a group of shards is a machine where it has several ranks, so that gradients alone cross
        parallel = {"shard": max(2, given.ranks), "replicate": 2 if given.ranks > 1 else 1}
        recipe = recipe_of(folder, "joined", given.steps, parallel)
        command = [*UNSHARE, sys.executable, __file__, "--inside", str(recipe), "--ranks", str(given.ranks)]
        if subprocess.run(command, check=False).returncode:  # noqa: S603 (names and numbers)
            sys.exit("\n".join(f"{one}:\n{(folder / one).read_text()[-3000:]}" for one in ("first.log", "second.log")))
        sys.exit(0 if compare(folder) else 1)


def save_models(folder: Path) -> None:
    from understudy.models import build_causal_lm, save_hf
    from understudy.tasks import Arithmetic

    tokenizer = Arithmetic(family="addition").tokenizer()
    shape = {"architecture": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4}
    for seed, name in enumerate(("student", "teacher")):
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model = build_causal_lm(shape, vocab_size=len(tokenizer), seed=seed, dtype="float32", **ends)
        save_hf(model, tokenizer, folder / name)


if __name__ == "__main__":
    main()

"""The commands. What they do lives elsewhere; here is how they are asked for and how errors are told.

Everything heavy is imported inside a command, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from understudy.errors import CheckpointError, TrainingError, UnderstudyError

EXIT_BAD_INPUT, EXIT_FAILED, EXIT_SIGNAL = 2, 1, 130

app = typer.Typer(
    name="understudy",
    help="On-policy distillation: a small student learns from its own attempts, judged by a larger teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides, such as method.k=64 or train.lr=1e-5.", show_default=False
    ),
]
ModelDir = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR", help="Another model than the recipe's student.", show_default=False),
]


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything; load and write nothing.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in run_dir from its last checkpoint.")
    ] = False,
    no_doctor: Annotated[bool, typer.Option("--no-doctor", help="Skip the checks of `understudy doctor`.")] = False,
) -> None:
    """Train a student as a recipe says.

    The run directory holds recipe.yaml, metrics.jsonl, eval/, samples/, checkpoints/, the final student/ and report.html.
    """
    from understudy.cli import commands

    ending = commands.train(recipe, overrides or [], dry_run=dry_run, resume=resume, examine=not no_doctor)
    if ending == "stopped by a signal":
        raise typer.Exit(EXIT_SIGNAL)


@app.command()
def doctor(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check everything that a run depends on, and take two prompts through the whole loop. Nothing is written.

    Exit code 2 where something is wrong; `train` runs the same checks first.
    """
    from understudy.cli import doctoring

    if doctoring.examine(recipe, overrides or []):
        raise typer.Exit(EXIT_BAD_INPUT)


@app.command(name="eval")
def evaluate(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|RUN", help="A recipe, or a run directory: its final student.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    model: ModelDir = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write summary and samples there.", show_default=False)
    ] = None,
) -> None:
    """Evaluate a student on held-out problems: avg@k, pass@k, maj@k, lengths, each with a 95 % interval."""
    from understudy.cli import commands

    commands.evaluate(recipe, overrides or [], model=model, out=out)


@app.command()
def sample(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|RUN", help="A recipe, or a run directory: its final student.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    model: ModelDir = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A prompt of your own; may be repeated.", show_default=False)
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Prompts of the task to take.")] = 4,
    split: Annotated[
        str, typer.Option("--split", help="Split that they come from: train, validation or test.")
    ] = "train",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples of each prompt.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Write JSON lines (prompt, response, ...) there.", show_default=False
        ),
    ] = None,
) -> None:
    """Print what a model writes; with --out, a data set that SFT can be trained on."""
    from understudy.cli import sampling

    sampling.sample(
        recipe, overrides or [], model=model, prompts=prompt or [], num=num, split=split, num_samples=samples, out=out
    )


@app.command()
def record(
    recipe: RecipeFile,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where to write, or to continue.", show_default=False)
    ],
    overrides: Overrides = None,
    prompts: Annotated[
        int | None,
        typer.Option("--prompts", min=1, help="Training prompts, in the order of training.", show_default="as trained"),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="Samples of each prompt.", show_default="train.samples_per_prompt"),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("--k", min=1, help="Most likely tokens of each row.", show_default="what the method needs"),
    ] = None,
) -> None:
    """Store samples of the student's start with the teacher's scores, to train without the teacher.

    The same command again goes on with what is missing. Train with teacher={type: stored, path: DIR}.
    """
    from understudy.cli import recording

    amount = recording.Amount(prompts=prompts, samples=samples, k=k)
    if recording.record(recipe, overrides or [], out=out, amount=amount) != "finished":
        raise typer.Exit(EXIT_SIGNAL)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline", metavar="RUN", help="Another run to compare the evaluation with.", show_default=False
        ),
    ] = None,
) -> None:
    """Write RUN/report.html: curves, tables and transcripts on one page that works offline."""
    from understudy.report import write_report

    typer.echo(write_report(run_dir, baseline=baseline))


@app.command()
def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="KEY=V1,V2",
            help="An axis, such as method.type=opd,gkd; may be repeated.",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[
        Path | None, typer.Option("--grid", metavar="FILE", help="Axes, seeds and tuning (YAML).", show_default=False)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Seeds 0..N-1 of every combination.", show_default="5")
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            "--tune", metavar="KEY=V1,V2", help="Choose a value by avg@k on the validation split.", show_default=False
        ),
    ] = None,
    target: Annotated[
        float | None, typer.Option("--target", help="avg@k that samples are counted to.", show_default="0.5")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline", metavar="AXIS=LABEL", help="What differences are to.", show_default="the first axis' first"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write.", show_default="RUN_DIR-compare")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at once; they share the cores.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Make the runs as tasks of Ray.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything; run and write nothing.")] = False,
) -> None:
    """Compare runs that differ in what is varied and nothing else: a table with intervals, CSV and a page.

    The same command again goes on with what is missing.
    """
    from understudy.cli import comparing

    asked = comparing.Asked(
        vary=vary or [],
        grid=grid,
        seeds=seeds,
        tune=tune or [],
        target=target,
        baseline=baseline or [],
        out=out,
        jobs=jobs,
        ray=ray,
        dry_run=dry_run,
    )
    ending = comparing.compare(recipe, overrides or [], asked)
    if ending != "finished":
        raise typer.Exit(EXIT_FAILED if ending == "failed" else EXIT_SIGNAL)


@app.command(name="serve-teacher")
def serve_teacher(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or hub name.", show_default=False)],
    host: Annotated[str | None, typer.Option("--host", help="Address to listen at.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option("--port", help="0: any that is free.", show_default="8100")] = None,
    token_env: Annotated[
        str | None,
        typer.Option(
            "--token-env",
            metavar="NAME",
            help="Environment variable with the token that clients must send; needed beyond this machine.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Precision of the weights.", show_default="the checkpoint's")
    ] = None,
    hidden_dtype: Annotated[
        str | None,
        typer.Option("--hidden-dtype", help="bfloat16 or float32: hidden states as sent.", show_default="the weights'"),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="Such as cuda:1.", show_default="a GPU if any")] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option("--max-batch-tokens", min=1, help="Tokens of one forward.", show_default="2048 (CPU), 16384"),
    ] = None,
    max_request_bytes: Annotated[
        int | None, typer.Option("--max-request-bytes", min=1, help="Of one request.", show_default="64 MiB")
    ] = None,
    max_reply_bytes: Annotated[
        int | None, typer.Option("--max-reply-bytes", min=1, help="Of one answer.", show_default="1 GiB")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of a hub model.", show_default=False)] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="DIR", help="Of the model.", show_default="the model's own")
    ] = None,
    share_prompts: Annotated[
        bool, typer.Option("--share-prompts/--no-share-prompts", help="Read the prompt of several responses once.")
    ] = True,
) -> None:
    """Serve a model's exact scores to training runs elsewhere (teacher={type: served, url: ...}).

    Hidden states and the head give whole rows at a few KB a token. It ends with Ctrl-C.
    """
    from understudy.cli import serving

    serving.serve(
        model,
        host=host,
        port=port,
        token_env=token_env,
        dtype=dtype,
        hidden_dtype=hidden_dtype,
        device=device,
        max_batch_tokens=max_batch_tokens,
        max_request_bytes=max_request_bytes,
        max_reply_bytes=max_reply_bytes,
        revision=revision,
        tokenizer=tokenizer,
        share_prompts=share_prompts,
    )


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One method, with its keys.", show_default=False)
    ] = None,
) -> None:
    """List the methods, or the keys of one."""
    from understudy.cli import describe

    describe.methods(name)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the recipe.")] = Path("recipe.yaml"),
    student: Annotated[str, typer.Option(help="Directory or hub name of the student.")] = "Qwen/Qwen3-0.6B",
    teacher: Annotated[str, typer.Option(help="Directory or hub name of the teacher.")] = "Qwen/Qwen3-4B",
) -> None:
    """Write a commented recipe for two models, to be edited and trained."""
    from understudy.cli import describe

    typer.echo(describe.init(path, student, teacher))


def main() -> None:
    """Runs a command. Exit code 2 for bad input, 1 for a run that failed, 130 for one that a signal stopped."""
    try:
        app()
    except UnderstudyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED if isinstance(error, TrainingError | CheckpointError) else EXIT_BAD_INPUT)

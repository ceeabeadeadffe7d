"""The commands with their options. Everything heavy is imported inside a command, so that `--help` answers at once."""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

import understudy
from understudy.errors import CheckpointError, RecipeError, TrainingError, UnderstudyError, nearest, written
from understudy.text import printable
from understudy.trainer.signals import ENDING, terminable

EXIT_BAD_INPUT, EXIT_FAILED, EXIT_SIGNAL = 2, 1, 130
QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""Progress bars and notes of libraries would tear the display. Read when a library is imported, which takes seconds."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Runs a command. Raises RecipeError for an option that is a key of the recipe, here or in another toolkit."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            plain = "stopped by a signal; files that were written until here stay, and nothing more is saved"
            # the terminal may be gone
            with suppress(OSError):
                print(f"\n{str(error) or plain}", file=sys.stderr)
            raise typer.Exit(EXIT_SIGNAL) from None
        except Exception as error:
            # its class is in typer's own copy of click, or in click
            if type(error).__name__ != "NoSuchOption":
                raise
            wrong: Any = error
            near = set(wrong.possibilities or ()) - {"--help"}
            takes_keys = any(one.name == "overrides" for one in wrong.ctx.command.params)
            if not takes_keys or not (meant := _key_for(wrong.option_name, exactly=bool(near))):
                raise
            raise RecipeError(
                f"there is no option {wrong.option_name}; keys of the recipe are given as KEY=VALUE, such as "
                f"train.lr=1e-5; {meant}"
            ) from error


def _key_for(option: str, *, exactly: bool) -> str | None:
    """The hint to the key that an unknown option stands for; None where no key is near.

    `exactly`: only where the option is the last word of a key, because it is near to an option too.
    """
    from understudy import config
    from understudy.recipe import Recipe

    name = option.lstrip("-").replace("-", "_")
    keys = dict(config.places(Recipe))
    if name in keys:
        return f"the key is {name}"
    if exactly and not any(key.endswith(f".{name}") for key in keys):
        return None
    try:
        config.parse(Recipe, config.override({}, [f"{name}=null"]))
    except RecipeError as error:
        hint = str(error).partition("unknown key; ")[2]
        return None if hint.startswith("known: ") else hint or None
    return None


app = typer.Typer(
    name="understudy",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _option(*names: str, help: str, default: str | bool = False, **settings: Any) -> Any:
    """An option that shows `default` as its default, or nothing: most of them are None, which explains nothing."""
    return typer.Option(*names, help=help, show_default=default, **settings)


def _argument(metavar: str, help: str) -> Any:
    return typer.Argument(metavar=metavar, help=help, show_default=False)


RecipeFile = Annotated[Path, _argument("RECIPE", "A recipe (YAML).")]
RecipeOrRun = Annotated[
    Path, _argument("RECIPE|RUN|MODEL", "A recipe, a run directory (its final student), or a model directory.")
]
Overrides = Annotated[list[str] | None, _argument("[KEY=VALUE]...", "Overrides, such as method.k=64 or train.lr=1e-5.")]
ModelDir = Annotated[str | None, _option("--model", metavar="DIR", help="Another model than the recipe's student.")]


def _say(line: object) -> None:
    """Prints a line in which names of files, of models and the like may stand."""
    typer.echo(printable(str(line)))


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"understudy {understudy.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """On-policy distillation: a small student learns from its own attempts, judged by a larger teacher."""


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
    """Train a student from a recipe.

    The run directory holds recipe.yaml, metrics.jsonl, eval/, samples/, checkpoints/, the final student/ and report.html.
    """
    from understudy.cli import commands

    ending = commands.train(recipe, overrides or [], dry_run=dry_run, resume=resume, examine=not no_doctor)
    if ending in ("stopped by a signal", "did not learn"):
        raise typer.Exit(EXIT_SIGNAL if ending == "stopped by a signal" else EXIT_FAILED)


@app.command()
def doctor(recipe: RecipeOrRun, overrides: Overrides = None) -> None:
    """Check everything that a run depends on, and take two prompts through the whole loop. Nothing is written.

    Exits with code 2 if a check fails; `train` runs the same checks first.
    """
    from understudy.cli import commands

    if commands.doctor(recipe, overrides or []):
        raise typer.Exit(EXIT_BAD_INPUT)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 8,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="a100, h100, h200, b200 or l40s.")] = "h100",
    gpu_memory: Annotated[
        float | None, _option(help="GB of memory per GPU, to override the card's.", default="the card's")
    ] = None,
    price: Annotated[float | None, _option(help="Price of one GPU-hour.")] = None,
    prompt_tokens: Annotated[float | None, _option(help="Mean per prompt.", default="train.max_prompt_tokens")] = None,
    response_tokens: Annotated[
        float | None, _option(help="Mean per response.", default="sampling.max_new_tokens")
    ] = None,
) -> None:
    """Estimate a recipe's GPU memory, time, cost and layout from its models' configurations alone.

    Every number has its formula. No weights are read, and nothing is written.
    """
    from understudy.recipe import load_recipe
    from understudy.recipe.plan import machine_of, show
    from understudy.trainer.console import Console

    parsed = load_recipe(recipe, overrides or [])
    lengths = {"prompt_tokens": prompt_tokens, "response_tokens": response_tokens}
    machine = machine_of(parsed, gpus, card=gpu, gpu_memory=gpu_memory, **lengths)
    with Console() as console:
        show(console, parsed, machine, price)


@app.command(name="eval")
def evaluate(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    model: ModelDir = None,
    out: Annotated[Path | None, _option(metavar="DIR", help="Write summary and samples there.")] = None,
    suite: Annotated[
        str | None,
        _option(metavar="NAME|FILE", help="Several tasks: reasoning, science, instructions, or a file (YAML)."),
    ] = None,
) -> None:
    """Evaluate a student on held-out problems: avg@k, pass@k, maj@k, lengths, each with a 95 % interval."""
    from understudy import api

    if suite is not None:
        api.evaluate_suite(recipe, suite, overrides=overrides or [], model=model, out=out)
        return
    api.evaluate(recipe, overrides=overrides or [], model=model, out=out)


@app.command()
def sample(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    model: ModelDir = None,
    prompt: Annotated[list[str] | None, _option(help="A prompt of your own; may be repeated.")] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Prompts of the task to take.")] = 4,
    split: Annotated[str, typer.Option(help="Their split: train, validation or test.")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="Samples of each prompt.")] = 1,
    out: Annotated[Path | None, _option(metavar="FILE", help="Write JSON lines (prompt, response, ...) there.")] = None,
) -> None:
    """Print what a model writes; with --out, a data set that SFT can be trained on."""
    from understudy.cli import commands

    commands.sample(
        recipe, overrides or [], model=model, prompts=prompt or [], num=num, split=split, num_samples=samples, out=out
    )


@app.command()
def record(
    recipe: RecipeFile,
    out: Annotated[Path, _option(metavar="DIR", help="Where to write, or to continue.")],
    overrides: Overrides = None,
    prompts: Annotated[
        int | None, _option(min=1, help="Training prompts, in the order of training.", default="as trained")
    ] = None,
    samples: Annotated[
        int | None, _option(min=1, help="Samples of each prompt.", default="train.samples_per_prompt")
    ] = None,
    k: Annotated[
        int | None, _option(min=1, help="Most likely tokens of each row.", default="what the method needs")
    ] = None,
) -> None:
    """Store samples of the student's start with the teacher's scores, to train without the teacher.

    Run the same command again to add what is missing. Train with teacher={type: stored, path: DIR}.
    """
    from understudy.cli import recording

    ending = recording.record(recipe, overrides or [], out=out, prompts=prompts, samples=samples, k=k)
    if ending != "finished":
        raise typer.Exit(EXIT_SIGNAL)


@app.command()
def report(
    run_dir: Annotated[Path, _argument("RUN", "A run directory.")],
    baseline: Annotated[Path | None, _option(metavar="RUN", help="Another run to compare the evaluation with.")] = None,
) -> None:
    """Write RUN/report.html: curves, tables and transcripts on one page that works offline."""
    from understudy.report.page import describe_changes, write_report
    from understudy.report.read import read_run

    page = write_report(run_dir, baseline=baseline)
    if changes := describe_changes(read_run(run_dir)):
        _print_error(f"warning: not everything is as run.json says the run wrote it: {changes}")
    _say(page)


@app.command(name="inspect")
def inspect_run(
    run_dir: Annotated[Path, _argument("RUN", "A run directory.")],
    step: Annotated[int | None, _option(min=1, help="A step with kept samples.", default="the last one")] = None,
    prompt: Annotated[str | None, _option(metavar="ID", help="A prompt.", default="the first one there")] = None,
    by: Annotated[
        str, _option(help="The number whose largest sizes are shown, such as teacher_entropy.", default="log_ratio")
    ] = "log_ratio",
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Tokens to show.")] = 20,
    samples: Annotated[bool, typer.Option("--list", help="List the samples that the run kept.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Write report.html and open it in a browser.")] = False,
) -> None:
    """Print the tokens on which teacher and student disagree most, with what both expected and what the method did."""
    from understudy.cli import inspection

    inspection.inspect(run_dir, step=step, prompt=prompt, by=by, num=num, only_list=samples)
    if open_page:
        inspection.open_report(run_dir)


@app.command()
def watch(
    run_dir: Annotated[Path, _argument("RUN", "A run directory.")],
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port of 127.0.0.1; 0: any that is free.")] = 0,
) -> None:
    """Serve a run's live report on this machine only; the open page refreshes itself.

    Nothing is written. Stop it with Ctrl-C.
    """
    from understudy.report.watch import serve

    serve(run_dir, port, typer.echo)


@app.command()
def push(
    run_dir: Annotated[Path, _argument("RUN", "A run directory: its final student.")],
    name: Annotated[str, _argument("OWNER/NAME", "A model repository on the hub; created if missing.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; the default is private.")
    ] = False,
) -> None:
    """Upload the final student with its model card to the Hugging Face hub."""
    from understudy.hub import push

    _say(push(run_dir, name, public=public))


@app.command()
def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None, _option(metavar="KEY=V1,V2", help="An axis, such as method.type=opd,gkd; may be repeated.")
    ] = None,
    grid: Annotated[Path | None, _option(metavar="FILE", help="Axes, seeds and tuning (YAML).")] = None,
    seeds: Annotated[int | None, _option(min=1, help="Seeds 0..N-1 of every combination.", default="5")] = None,
    tune: Annotated[
        list[str] | None, _option(metavar="KEY=V1,V2", help="Choose a value by avg@k on the validation split.")
    ] = None,
    target: Annotated[float | None, _option(help="Count samples until this avg@k.", default="0.5")] = None,
    baseline: Annotated[
        list[str] | None,
        _option(metavar="AXIS=LABEL", help="Baseline for differences.", default="the first axis' first"),
    ] = None,
    out: Annotated[Path | None, _option(metavar="DIR", help="Where to write.", default="RUN_DIR-compare")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once; they share the cores.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Run them as Ray tasks.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything; run and write nothing.")] = False,
) -> None:
    """Compare runs that differ only in the varied keys: a table with intervals, CSV and a page.

    Run the same command again to complete what is missing.
    """
    from understudy.cli import commands
    from understudy.compare.grid import read_grid

    read = partial(
        read_grid,
        grid,
        vary=vary or (),
        tune=tune or (),
        baseline=baseline or (),
        changes={"seeds": seeds, "target": target},
    )
    ending = commands.compare(recipe, overrides or [], read, out=out, jobs=jobs, ray=ray, dry_run=dry_run)
    if ending != "finished":
        raise typer.Exit(EXIT_FAILED if ending == "failed" else EXIT_SIGNAL)


@app.command(name="serve-teacher")
def serve_teacher(
    model: Annotated[str, _argument("MODEL", "A model directory or hub name.")],
    host: Annotated[str | None, _option(help="Address to listen on.", default="127.0.0.1")] = None,
    port: Annotated[int | None, _option(help="0: any that is free.", default="8100")] = None,
    token_env: Annotated[
        str | None,
        _option(
            metavar="NAME",
            help="Environment variable with the token that clients must send; needed beyond this machine.",
        ),
    ] = None,
    dtype: Annotated[str | None, _option(help="Precision of the weights.", default="the checkpoint's")] = None,
    hidden_dtype: Annotated[
        str | None, _option(help="bfloat16 or float32: hidden states as sent.", default="the weights'")
    ] = None,
    device: Annotated[str | None, _option(help="Such as cuda:1.", default="a GPU if any")] = None,
    max_batch_tokens: Annotated[
        int | None, _option(min=1, help="Tokens of one forward.", default="2048 (CPU), 16384")
    ] = None,
    max_request_bytes: Annotated[int | None, _option(min=1, help="Limit of one request.", default="64 MiB")] = None,
    max_reply_bytes: Annotated[int | None, _option(min=1, help="Limit of one reply.", default="1 GiB")] = None,
    revision: Annotated[str | None, _option(help="Revision of a hub model.")] = None,
    tokenizer: Annotated[str | None, _option(metavar="DIR", help="Of the model.", default="the model's own")] = None,
    share_prompts: Annotated[
        bool, typer.Option("--share-prompts/--no-share-prompts", help="Compute shared prefixes once.")
    ] = True,
) -> None:
    """Serve a model's exact scores to training runs elsewhere (teacher={type: served, url: ...}).

    Hidden states and the head give whole rows at a few KB a token. Stop it with Ctrl-C.
    """
    # the parameters have the names of the settings; None keeps a setting's default
    given = {name: value for name, value in locals().items() if value is not None}
    from understudy import config
    from understudy.serve import Settings, run

    # plain lines: a server's log has no display that is redrawn
    run(config.parse(Settings, given), _say)


@app.command()
def methods(name: Annotated[str | None, _argument("[NAME]", "One method, with its keys.")] = None) -> None:
    """List the methods, or the keys of one."""
    from understudy.config import words
    from understudy.methods import METHODS
    from understudy.trainer.console import Console

    with Console() as console:
        if name is None:
            rows = []
            for key, kind in METHODS.items():
                summary = (inspect.getdoc(inspect.getmodule(kind)) or "").splitlines()[0].partition(": ")[2].rstrip(".")
                has_default = all(item.default is not MISSING for item in fields(kind))
                needs = ", ".join(sorted(kind().needs)) if has_default else "what its parts need"
                rows.append([key, summary, needs])
            console.table("methods", ["type", "what it minimises", "needs scores"], rows)
            return
        if name not in METHODS:
            raise RecipeError(f"there is no method {name!r}; {nearest(name, METHODS)}")
        kind = METHODS[name]
        console.note(f"{inspect.getdoc(inspect.getmodule(kind))}\n\n{inspect.getdoc(kind)}")
        hints = get_type_hints(kind)
        rows = [
            [item.name, words(hints[item.name]), "required" if item.default is MISSING else written(item.default)]
            for item in fields(kind)
        ]
        if rows:
            console.table(f"method: {{type: {name}, ...}}", ["key", "values", "default"], rows)


tasks = typer.Typer(no_args_is_help=False, help="List the named data sets, and check a task's answers.")
app.add_typer(tasks, name="tasks")


@tasks.callback(invoke_without_command=True)
def list_tasks(context: typer.Context) -> None:
    """List the named data sets and the task types; `show` and `check` give details of one."""
    if context.invoked_subcommand is None:
        from understudy.cli import tasks

        tasks.show_all()


@tasks.command()
def show(name: Annotated[str, _argument("NAME", "A data set.")]) -> None:
    """Print a data set's source, fields, licence and known mistakes."""
    from understudy.cli import tasks

    tasks.show_one(name)


@tasks.command()
def check(
    source: Annotated[str, _argument("NAME|RECIPE|RUN", "A data set, or a recipe or run with a task.")],
    overrides: Annotated[
        list[str] | None, _argument("[KEY=VALUE]...", "Keys of the task (path=FILE), or of the recipe.")
    ] = None,
    split: Annotated[str | None, _option(help="Split to check.", default="test, or the first")] = None,
    evaluation: Annotated[bool, typer.Option("--eval", help="Check the recipe's evaluation task.")] = False,
    model: Annotated[
        str | None,
        _option(metavar="DIR", help="Model whose chat template formats the prompts.", default="the recipe's student"),
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Prompts to check, the first ones.")] = 100_000,
) -> None:
    """Grade each gold answer, an empty one and another problem's, and show three prompts as the model sees them.

    Exits with code 1 if a gold answer fails without a known mistake, or an empty one passes.
    """
    from understudy.cli import tasks

    if not tasks.check(source, overrides or [], split=split, evaluation=evaluation, model=model, num=num):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the recipe.")] = Path("recipe.yaml"),
    student: Annotated[str, typer.Option(help="Directory or hub name of the student.")] = "Qwen/Qwen3-0.6B",
    teacher: Annotated[str, typer.Option(help="Directory or hub name of the teacher.")] = "Qwen/Qwen3-4B",
    method: Annotated[str, typer.Option(help="See: understudy methods.")] = "gkd",
    data: Annotated[
        str | None,
        _option(
            metavar="FILE|NAME",
            help="Rows to train on: files, a hub data set, or a name of `understudy tasks`.",
            default="gsm8k",
        ),
    ] = None,
    task: Annotated[str | None, _option(help="Type of the task, such as arithmetic.", default="by --data")] = None,
) -> None:
    """Write a commented recipe with what its method needs, to be edited and trained, and the schema for your editor."""
    from understudy.cli.new_recipe import new_recipe
    from understudy.files import write_atomically
    from understudy.recipe.editor import FILE, recipe_schema

    if path.exists():
        raise RecipeError(f"{path} exists; choose another file")
    write_atomically(path, new_recipe(path.stem, student, teacher, method, data, task))
    schema, beside = recipe_schema(), path.with_name(FILE)
    # that of another version is replaced, a file of another kind is left alone
    if not beside.exists() or f'"title": "{schema["title"]}"' in beside.read_text(encoding="utf-8", errors="replace"):
        write_atomically(beside, json.dumps(schema, indent=2))
    _say(f"wrote {path}; check it with: understudy train {path} --dry-run")


@app.command()
def schema(
    out: Annotated[Path | None, _argument("[FILE]", "Output file; default: standard output.")] = None,
) -> None:
    """Write the JSON Schema of recipes, for completion and checks in editors.

    The first line of a recipe names it: # yaml-language-server: $schema=FILE, relative to the recipe.
    """
    from understudy.files import write_atomically
    from understudy.recipe.editor import FILE, recipe_schema

    if out is not None and out.is_dir():
        raise RecipeError(f"{out} is a directory; name a file, such as {out / FILE}")
    text = json.dumps(recipe_schema(), indent=2)
    if out is None:
        typer.echo(text)
    else:
        write_atomically(out, text)


def _show_warning(
    others: Callable[..., None], message: Warning | str, category: Any, filename: str, *rest: Any
) -> None:
    """Shows a warning of this package as the console does, and that of another as `others` does."""
    if Path(filename).is_relative_to(Path(understudy.__file__).parent):
        print(f"warning: {message}", file=sys.stderr)
    else:
        others(message, category, filename, *rest)


def main() -> None:
    """Runs a command. Exit code 2 for bad input, 1 for a run that failed, 130 for one that a signal stopped."""
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    warnings.showwarning = partial(_show_warning, warnings.showwarning)
    # what is closed when Python starts is None
    sys.stdout, sys.stderr = (
        stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (ends with the process)
        for stream in (sys.stdout, sys.stderr)
    )
    try:
        with terminable():
            app()
    except (KeyboardInterrupt, SystemExit) as ending:
        if isinstance(ending, SystemExit) and ending.code != EXIT_SIGNAL:
            raise
        # the interpreter, as it ends, would let a further signal change the exit code
        for number in (signal.SIGINT, *ENDING):
            signal.signal(number, signal.SIG_IGN)
        sys.exit(EXIT_SIGNAL)
    except UnderstudyError as error:
        _print_error(f"error: {error}")
        sys.exit(EXIT_FAILED if isinstance(error, TrainingError | CheckpointError) else EXIT_BAD_INPUT)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        # a name that is too long for the file system, a loop of links, a folder that may not be read, an output that is full
        refused = error.filename or "the output"
        _print_error(f"error: {UnderstudyError(f'{refused}: {error.strerror}')}")
        sys.exit(EXIT_BAD_INPUT)
    except Exception:
        # a defect of this program; messages of libraries may hold anything
        _print_error(traceback.format_exc())
        sys.exit(EXIT_FAILED)
    finally:
        # the interpreter writes what is left as it ends, and would fail where nobody reads
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_error(text: str) -> None:
    # the terminal may be gone
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)

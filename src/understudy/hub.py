"""The Hugging Face hub: whether it can be reached, and uploads of a finished student."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from understudy.errors import RecipeError, UnderstudyError
from understudy.text import printable

REACH_S = 5.0
"""Seconds for one request; the libraries try every file of a name for 23 s."""


@cache
def unreachable() -> str | None:
    """Why the hub cannot be reached, asked once in a process; None where it can.

    The libraries then go on with what their caches hold, as the variable HF_HUB_OFFLINE would have them.
    """
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        httpx.head(constants.ENDPOINT, timeout=REACH_S)
    except httpx.HTTPError as error:
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached ({printable(str(error)) or type(error).__name__})"
    return None


def push(run_dir: Path, name: str, *, public: bool = False) -> str:
    """Uploads RUN/student with its model card to the repository OWNER/NAME, which is made where it is missing.

    Returns the address and whether it is private. Raises RecipeError before anything is sent, UnderstudyError for what the
    hub refuses. Nothing goes to a public repository without `public`.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    student = run_dir / "student"
    if not (student / "config.json").is_file():
        raise RecipeError(f"{run_dir} has no final student ({student / 'config.json'}); finish the run first")
    if name.count("/") != 1:
        raise RecipeError(f"{name!r} is not the name of a repository; write OWNER/NAME, such as my-team/{run_dir.name}")
    if get_token() is None:
        raise RecipeError("there is no token for the Hugging Face hub; run `hf auth login`, or set HF_TOKEN")
    hub = HfApi(library_name="understudy")
    try:
        url = hub.create_repo(name, private=not public, exist_ok=True)
        private = bool(hub.repo_info(name).private)
        if not private and not public:
            raise RecipeError(f"{name} exists and is public; add --public to push to it, or choose another name")
        hub.upload_folder(repo_id=name, folder_path=student, commit_message=f"Upload the student of {run_dir.name}")
    except HFValidationError as error:
        raise RecipeError(f"{name!r} is not the name of a repository: {error}") from error
    except UnderstudyError:
        raise
    except Exception as error:
        lines = printable(f"{type(error).__name__}: {error}").splitlines()
        raise UnderstudyError(f"the hub did not take {student} as {name} ({lines[0]}); the run is as it was") from error
    return f"{url} ({'private' if private else 'public'})"

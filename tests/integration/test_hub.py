"""`understudy push` against a hub on this machine, with the real client."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.runs import train

pytestmark = pytest.mark.slow


class Hub(ThreadingHTTPServer):
    """Keeps model repositories in memory; answers with what an upload of small files asks for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.tokens: set[str | None] = set()
        self.refuses: int | None = None
        """A status in place of every answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if name not in self.server.private:
            self._reply({"error": "not found"}, 404)
            return
        self._reply({"_id": "1", "id": name, "private": self.server.private[name], "siblings": [], "tags": []})

    def do_POST(self) -> None:
        body, hub = self.rfile.read(int(self.headers["Content-Length"])), self.server
        hub.tokens.add(self.headers["Authorization"])
        if hub.refuses is not None:
            self._reply({"error": "no"}, hub.refuses)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            code = 409 if name in hub.private else 200
            hub.private.setdefault(name, asked["visibility"] == "private")
            self._reply({"url": f"{hub.url}/{name}"}, code)
        elif self.path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._reply({"files": files})
        else:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.files.setdefault(name, {})[line["value"]["path"]] = content
            self._reply({"commitOid": "0" * 40, "commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}"})

    def _reply(self, value: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("pushed"), train={"steps": 1})


def push(hub: Hub, *arguments: object, token: str | None = "hf_a_private_token") -> tuple[int, str]:
    """Exit code and output of `understudy push` in a process of its own: the client reads its settings on import."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    given |= {"HF_ENDPOINT": hub.url, "HF_HOME": "/nowhere"} | ({"HF_TOKEN": token} if token else {})
    command = [sys.executable, "-m", "understudy", "push", *map(str, arguments)]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_the_student_and_its_card_go_to_a_private_repository(hub: Hub, run_dir: Path) -> None:
    code, output = push(hub, run_dir, "team/adder")
    assert code == 0, output
    assert output.splitlines()[-1] == f"{hub.url}/team/adder (private)"
    assert hub.private == {"team/adder": True}
    sent = hub.files["team/adder"]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        assert sent[name] == (run_dir / "student" / name).read_bytes()
    assert b"library_name: transformers" in sent["README.md"]
    assert hub.tokens == {"Bearer hf_a_private_token"}
    # the same command again replaces the files
    assert push(hub, run_dir, "team/adder")[0] == 0


def test_nothing_goes_to_a_public_repository_unless_asked(hub: Hub, run_dir: Path) -> None:
    hub.private["team/open"] = False
    code, output = push(hub, run_dir, "team/open")
    assert code == 2
    assert "team/open exists and is public; add --public" in output
    assert hub.files == {}
    code, output = push(hub, run_dir, "team/open", "--public")
    assert (code, output.splitlines()[-1]) == (0, f"{hub.url}/team/open (public)")


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("team/adder", None, "there is no token for the Hugging Face hub; run `hf auth login`, or set HF_TOKEN"),
        ("adder", "hf_x", "'adder' is not the name of a repository; write OWNER/NAME"),
        ("team/ad der", "hf_x", "'team/ad der' is not the name of a repository"),
    ],
)
def test_what_cannot_be_pushed_is_one_sentence_and_nothing_is_sent(
    hub: Hub, run_dir: Path, name: str, token: str | None, said: str
) -> None:
    code, output = push(hub, run_dir, name, token=token)
    assert code == 2
    assert said in output
    assert len(output.splitlines()) == 1
    assert (hub.files, hub.private) == ({}, {})


def test_a_folder_without_a_student_is_refused(hub: Hub, tmp_path: Path) -> None:
    code, output = push(hub, tmp_path, "team/adder")
    assert code == 2
    assert f"{tmp_path} has no final student" in output


def test_a_hub_that_refuses_is_one_sentence_without_the_token(hub: Hub, run_dir: Path) -> None:
    hub.refuses = 403
    code, output = push(hub, run_dir, "team/adder")
    assert code != 0
    assert "the hub did not take" in output
    assert "Traceback" not in output
    assert "hf_a_private_token" not in output


def test_the_version_is_printed() -> None:
    from understudy import __version__

    done = subprocess.run([sys.executable, "-m", "understudy", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"understudy {__version__}\n"

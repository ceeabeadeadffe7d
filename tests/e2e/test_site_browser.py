"""The site of the documentation in a real browser, opened from the disk: it is whole, and its search finds things."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.e2e.test_report_browser import BROWSER, open_page
from tests.report_run import write_run

from understudy.report.page import write_report

ROOT = Path(__file__).parents[2]
NEEDS_BROWSER = pytest.mark.skipif(
    BROWSER is None, reason="NO BROWSER: the site was not opened; set UNDERSTUDY_BROWSER"
)
SEARCH = """
<script>
addEventListener("load", async () => {
  const until = async (find) => {
    for (let found; ; await new Promise((done) => setTimeout(done, 50))) if ((found = find())) return found;
  };
  document.querySelector("label[for=__search], .md-search__button").click();
  const root = (await until(() => [...document.querySelectorAll("*")].find((node) => node.shadowRoot))).shadowRoot;
  const input = await until(() => root.querySelector("input"));
  input.value = "QUERY";
  input.dispatchEvent(new Event("input", { bubbles: true }));
  await until(() => root.querySelector("[role=status]").textContent.match(/result|unavailable/i));
  const found = [...root.querySelectorAll("[role=option]")].map((link) => link.href);
  const status = root.querySelector("[role=status]").textContent;
  fetch("ADDRESS", { method: "POST", mode: "no-cors", body: JSON.stringify({ status, found }) });
});
</script></body>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site with the report of a pretended run, built as `make docs` does."""
    out = tmp_path_factory.mktemp("docs")
    report = write_report(write_run(out / "run", num_steps=10))
    command = [sys.executable, str(ROOT / "scripts" / "docs.py"), "--report", str(report), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "site"


@pytest.fixture
def told() -> Iterator[tuple[str, queue.Queue[str]]]:
    """The address of a server, and what pages posted to it."""
    texts: queue.Queue[str] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", texts
    server.shutdown()
    server.server_close()
    thread.join()


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loads = re.compile(r'<(?:script|img|iframe|link)[^>]*(?:src|href)="?(https?:[^" >]*)')
    assert {page.name: found for page in site.rglob("*.html") if (found := loads.findall(page.read_text()))} == {}


@pytest.mark.parametrize(
    ("page", "name"),
    [("types", "Sample"), ("methods", "GKD"), ("linear", "evaluate"), ("run", "train")],
)
def test_docstrings_are_on_the_pages_of_the_public_modules(site: Path, page: str, name: str) -> None:
    assert re.search(rf'id="understudy\.[\w.]*\b{name}"', (site / "api" / f"{page}.html").read_text())


@NEEDS_BROWSER
def test_the_report_of_a_run_draws_its_charts_inside_of_its_page(site: Path, tmp_path: Path) -> None:
    assert '<iframe src="run.html"' in (site / "report.html").read_text()
    page = open_page(site / "run.html", tmp_path / "profile")
    assert page.console == ()
    assert int(page.root["data-charts"] or 0) >= 10


@NEEDS_BROWSER
@pytest.mark.parametrize(
    ("query", "expected"),
    [("max_staleness", "engines.html"), ("on_policy_share", "gkd.html"), ("TokenBatch", "types.html")],
)
def test_the_search_finds_pages_without_a_server(
    site: Path, tmp_path: Path, told: tuple[str, queue.Queue[str]], query: str, expected: str
) -> None:
    address, texts = told
    probe = SEARCH.replace("QUERY", query).replace("ADDRESS", address)
    opened = site / f"search-{query}.html"
    opened.write_text((site / "index.html").read_text().replace("</body>", probe))
    assert BROWSER is not None
    flags = [
        "--headless",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--remote-debugging-port=0",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", opened.as_uri()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            said = json.loads(texts.get(timeout=60))
        finally:
            browser.terminate()
    assert any(expected in link for link in said["found"]), said

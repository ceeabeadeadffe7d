"""The report in a real browser: its script runs, its charts are there, and what a model wrote stays text."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.report_run import random_scores, watched, write_eval, write_lines, write_pictures, write_run

from understudy.report.page import write_report
from understudy.report.watch import Watch

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_CONSOLE = re.compile(r"^.*\bCONSOLE\b.*$", re.MULTILINE)


def _find_browser() -> str | None:
    wanted = os.environ.get("UNDERSTUDY_BROWSER")
    return next((found for name in ([wanted] if wanted else BROWSERS) if (found := shutil.which(name))), None)


BROWSER = _find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason=f"NO BROWSER: the report was not opened; install one of {', '.join(BROWSERS)} or set UNDERSTUDY_BROWSER",
)


@dataclass(frozen=True)
class Opened:
    """The document after its scripts ran, and what they wrote to the console."""

    dom: str
    console: tuple[str, ...]
    root: dict[str, str | None]
    """Attributes of <html>."""
    tags: tuple[str, ...]


class _Tags(HTMLParser):
    def __init__(self, dom: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.root: dict[str, str | None] = {}
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "html":
            self.root = dict(attrs)


def open_page(page: Path | str, profile: Path, seconds: int = 2) -> Opened:
    """Loads a file, or what is at an address, and returns the document some virtual seconds later."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        f"--user-data-dir={profile}",
        "--window-size=1280,900",
        "--enable-logging=stderr",
        f"--virtual-time-budget={1000 * seconds}",
        "--dump-dom",
        page.as_uri() if isinstance(page, Path) else page,
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.insert(1, "--no-sandbox")  # the browser refuses its own sandbox to root, as in a container
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    read = _Tags(done.stdout)
    assert read.root, f"the browser returned no document: {done.stderr[-2000:]}"
    return Opened(done.stdout, tuple(_CONSOLE.findall(done.stderr)), read.root, tuple(read.tags))


@pytest.fixture
def visits() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and the paths that were asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET  # noqa: N815 the name that http.server looks for

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def hostile(address: str) -> str:
    """Closes every element that it may stand in, then runs a script and calls home in each way that HTML has."""
    return (
        f"</pre></td></title></style></script><script>document.documentElement.dataset.pwned=1;fetch('{address}/fetch')"
        f"</script><img src='{address}/image' onerror=\"document.documentElement.dataset.pwned=2\">"
        f"<link rel=stylesheet href='{address}/style'><iframe src='{address}/frame'></iframe>"
        f'<svg onload="document.documentElement.dataset.pwned=3"></svg>"\'>'
    )


def hostile_run(run_dir: Path, text: str) -> Path:
    """A run in which every text is `text`."""
    run = write_run(run_dir, num_steps=10)
    for step in (0, 10):
        write_eval(run, step, {text: [0.0], "b": [1.0]}, prompt=text, response=text, split=text)
    tokens = {"text": [text, "b"], "author": [text, "teacher"], text: [text, 1.0]}
    sample = {"prompt_id": text, "response": text, "prompt": text, "tokens": tokens}
    said = [{"role": text, "content": text}, {"role": "assistant", "content": text, "error": text}]
    write_lines(run / "samples" / "step_000010.jsonl", [sample, sample | {"messages": said}])
    (run / "recipe.yaml").write_text(text)
    (run / "run.json").write_text(json.dumps({"method": text, "student": text, "teacher": text, text: text}))
    write_lines(run / "events.jsonl", [{"step": 1, "kind": text, "text": text}])
    # a teacher's name has no "/"
    teachers = [f"{text.replace('/', '|')} {at}" for at in range(2)]
    own = {f"teacher/{teacher}/overlap": 0.5 for teacher in teachers}
    rows = [
        {"step": step, text: 1.0 * step, "loss": 1.0 / step, f"constant {text}": 1.0}
        | {name: value / step for name, value in own.items()}
        for step in (1, 2)
    ]
    write_lines(run / "metrics.jsonl", rows)
    write_pictures(run, teachers)
    return run


def test_the_page_opens_without_a_complaint_and_draws_its_charts(tmp_path: Path) -> None:
    page = open_page(write_report(write_run(tmp_path / "run")), tmp_path / "profile")
    assert page.console == ()
    assert page.root["class"] == "script"
    assert "data-script-error" not in page.root
    assert "data-blocked" not in page.root
    assert int(page.root["data-charts"] or 0) == page.dom.count('class="chart"') >= 10


def test_curves_of_test_time_scaling_are_drawn_and_read_by_samples(tmp_path: Path) -> None:
    """They have an axis of their own: the cursor of the other charts does not move in them, theirs stands at its point."""
    run = write_run(tmp_path / "run", num_steps=10)
    scores = {name: [1.0, 0.0, 0.0, 0.0] for name in "abc"}
    known = {"value": 0.5, "low": 0.25, "high": 0.75, "num_problems": 3}
    points = [
        {"samples": k, "tokens": known | {"value": 100.0 * k}, "metrics": dict.fromkeys(("avg", "pass", "maj"), known)}
        for k in (1, 2, 4)
    ]
    write_eval(run, 10, scores, scaling=points)
    html = write_report(run).read_text()
    assert "Test-time scaling" in html
    probe = """<script>addEventListener("load", () => {
      const charts = [...document.querySelectorAll("svg.chart")];
      const over = (unit) => charts.filter((chart) => JSON.parse(chart.dataset.chart).point === unit);
      const [samples] = over("sample"), [tokens] = over("token");
      const key = (name) => samples.dispatchEvent(new KeyboardEvent("keydown", {key: name}));
      key("Home"); key("ArrowRight");
      const line = samples.querySelector(".cursor line"), dot = samples.querySelectorAll("circle.dot")[1];
      const box = samples.getBoundingClientRect();
      Object.assign(document.documentElement.dataset, {
        found: over("sample").length + over("token").length, shown: box.width > 100 && box.height > 50,
        said: samples.parentElement.querySelector(".readout").textContent,
        apart: Math.abs(line.getAttribute("x1") - dot.getAttribute("cx")).toFixed(1),
        others: [...over("step"), tokens].map((chart) => chart.querySelector(".cursor").getAttribute("visibility"))
          .filter((visibility) => visibility === "visible").length});
    });</script>"""
    opened = tmp_path / "probe.html"
    opened.write_text(probed(html, probe))
    page = open_page(opened, tmp_path / "profile")
    assert page.console == ()
    assert (page.root["data-found"], page.root["data-shown"]) == ("2", "true")
    assert (page.root["data-said"] or "").startswith("sample 2: avg 50.0 %")
    assert (page.root["data-apart"], page.root["data-others"]) == ("0.0", "0")


def test_a_token_of_the_teacher_looks_different(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    tokens = {"text": ["9", "+", "1"], "author": ["teacher", "teacher", "student"]}
    write_lines(run / "samples" / "step_000010.jsonl", [{"prompt_id": "p", "response": "9+1", "tokens": tokens}])
    html = write_report(run).read_text()
    probe = """<script>addEventListener("load", () => {
      const shown = [...document.querySelectorAll("pre.tokens span")].map((span) => getComputedStyle(span).backgroundColor);
      Object.assign(document.documentElement.dataset, {text: document.querySelector("pre.tokens").textContent.trim(),
        same: shown[0] === shown[1], other: shown[0] === shown[2]});
    });</script>"""
    opened = tmp_path / "probe.html"
    opened.write_text(probed(html, probe))
    root = open_page(opened, tmp_path / "profile").root
    assert (root["data-text"], root["data-same"], root["data-other"]) == ("9+1", "true", "false")


def test_an_episode_is_shown_as_a_conversation(tmp_path: Path) -> None:
    """What a tool said looks different from what the student said, and a call that failed different from both."""
    run = write_run(tmp_path / "run", num_steps=10)
    said = [
        {"role": "assistant", "content": "<search></search>"},
        {"role": "tool", "content": "the query is empty", "error": True},
        {"role": "assistant", "content": "<search>moon</search>"},
        {"role": "tool", "content": "Doc 1: 1969"},
        {"role": "assistant", "content": "<answer>1969</answer>"},
    ]
    tokens = {"text": ["a", "b"], "author": ["student", "environment"]}
    row = {"prompt_id": "p", "response": "all of it", "messages": said, "tokens": tokens}
    write_lines(run / "samples" / "step_000010.jsonl", [row])
    html = write_report(run).read_text()
    probe = """<script>addEventListener("load", () => {
      const items = [...document.querySelectorAll("ol.turns li")], colour = (item) => getComputedStyle(item).borderLeftColor;
      Object.assign(document.documentElement.dataset, {
        roles: items.map((item) => item.querySelector(".role").textContent).join("|"),
        texts: items.map((item) => item.querySelector("pre").textContent).join("|"),
        colours: new Set(items.map(colour)).size, shown: items.every((item) => item.offsetHeight > 0)});
    });</script>"""
    opened = tmp_path / "probe.html"
    opened.write_text(probed(html, probe))
    page = open_page(opened, tmp_path / "profile")
    assert page.root["data-roles"] == "student|tool, failed|student|tool|student"
    assert page.root["data-texts"] == "|".join(message["content"] for message in said)  # type: ignore[misc]
    assert (page.root["data-colours"], page.root["data-shown"]) == ("3", "true")
    assert page.console == ()


def test_hostile_text_is_inert(tmp_path: Path, visits: tuple[str, list[str]]) -> None:
    address, asked = visits
    page = open_page(write_report(hostile_run(tmp_path / "run", hostile(address))), tmp_path / "profile")
    assert asked == []
    assert page.console == ()
    assert "data-pwned" not in page.root
    assert "data-blocked" not in page.root
    assert page.tags.count("script") == 1
    assert not {"img", "link", "iframe"} & set(page.tags)
    assert int(page.root["data-charts"] or 0) >= 2


def test_the_policy_holds_where_escaping_would_have_failed(tmp_path: Path, visits: tuple[str, list[str]]) -> None:
    """The same text put into the page unescaped: with the policy nothing happens, without it everything does."""
    address, asked = visits
    html = write_report(write_run(tmp_path / "run", num_steps=10)).read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(html.replace("<main>", hostile(address) + "<main>"))
    page = open_page(broken, tmp_path / "profile")
    assert asked == []
    assert "data-pwned" not in page.root
    assert page.root["data-blocked"]
    assert page.console, "a refused script must be seen in the console, or the other tests look at nothing"
    open_guard = tmp_path / "open.html"
    open_guard.write_text(probed(broken.read_text(), ""))
    assert open_page(open_guard, tmp_path / "profile").root["data-pwned"]
    assert {"/image", "/fetch", "/style", "/frame"} <= set(asked)


PROBE = """
<script>
window.addEventListener("load", () => {
  const out = document.documentElement.dataset, chart = document.querySelectorAll("svg.chart")[1];
  const press = (key) => chart.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  const texts = () => [...document.querySelectorAll(".charts:first-of-type .readout")].map((node) => node.textContent);
  const resting = texts();
  chart.focus();
  press("Home"); out.home = texts()[1];
  press("ArrowRight"); out.second = texts()[1];
  press("End"); out.end = texts()[1]; out.others = texts().filter((text) => text.startsWith("step 10:")).length;
  press("Escape"); out.rested = String(JSON.stringify(texts()) === JSON.stringify(resting));
  const box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right, clientY: box.top + 5, bubbles: true}));
  out.pointed = texts()[1];
  out.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  out.wide = document.documentElement.clientWidth;
  parent.postMessage({...out}, "*");
});
</script>
"""
FRAME = """<!doctype html><html><body>
<script>addEventListener("message", (event) => Object.assign(document.documentElement.dataset, event.data));</script>
<iframe src="{address}" width="{width}" height="900" frameborder="0"></iframe></body></html>
"""
"""A phone's width: a browser window has a least width above it."""
LIGHT, DARK = "rgb(251, 250, 247)", "rgb(21, 22, 26)"


def probed(html: str, probe: str, *, dark: bool = False) -> str:
    """A page with a script of a test in the place of its guard, and in the colours of the dark if that is asked for."""
    html = html.replace("(prefers-color-scheme: dark)", "(min-width: 1px)") if dark else html
    return re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', lambda _: probe, html)


def open_framed(page: Path, folder: Path, width: int) -> Opened:
    """Opens a file at a width; its script posts what is then at the root of the document."""
    (folder / "frame.html").write_text(FRAME.format(address=page.as_uri(), width=width))
    return open_page(folder / "frame.html", folder / "profile")


@pytest.mark.parametrize(("width", "live"), [(1200, False), (390, False), (390, True)])
def test_one_step_is_read_in_all_charts_and_nothing_sticks_out(tmp_path: Path, width: int, live: bool) -> None:
    """Also in the page that `understudy watch` serves."""
    run = write_run(tmp_path / "run", num_steps=10)
    write_eval(run, 10, random_scores(0.9), response="9" * 2_000)
    write_pictures(run, ["maths", "code-" * 30])
    html = Watch(run).html() if live else write_report(run).read_text()
    probe = tmp_path / "probe.html"
    probe.write_text(probed(html, PROBE))
    page = open_framed(probe, tmp_path, width)
    loss = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    def value(name: str, step: int) -> float:
        found = re.fullmatch(rf"step {step}: ([\d.]+)", (page.root[f"data-{name}"] or "").strip())
        assert found, page.root
        return float(found[1])

    # the readout has four digits of a value that the page holds with five
    assert value("home", 1) == pytest.approx(loss[0], rel=1e-3)
    assert value("second", 2) == pytest.approx(loss[1], rel=1e-3)
    assert value("end", 10) == value("pointed", 10) == pytest.approx(loss[-1], rel=1e-3)
    assert int(page.root["data-others"] or 0) >= 10
    assert page.root["data-rested"] == "true"
    assert width - 30 <= int(page.root["data-wide"] or 0) <= width
    assert page.root["data-overflow"] == "0"


class Growing(Watch):
    """A run that is one step further at every question of the page."""

    def __init__(self, run_dir: Path, probe: str = "", *, dark: bool = False) -> None:
        self._dark = dark
        self._rows = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        self._metrics, self._shown, self._probe = run_dir / "metrics.jsonl", 20, probe
        self._metrics.write_text("".join(self._rows[:20]))
        super().__init__(run_dir, max_share=1.0)

    def html(self) -> str:
        return probed(super().html(), self._probe, dark=self._dark) if self._probe else super().html()

    def changed(self, known: Mapping[str, str]) -> dict[str, dict[str, str]]:
        self._shown += 1
        self._metrics.write_text("".join(self._rows[: self._shown]))
        return super().changed(known)


def test_a_watched_page_renews_itself(tmp_path: Path) -> None:
    watch = Growing(write_run(tmp_path / "run", num_steps=60))
    with watched(watch) as address:
        page = open_page(address, tmp_path / "profile", seconds=9)
    assert page.console == ()
    assert "data-blocked" not in page.root
    assert "data-script-error" not in page.root
    assert int(page.root["data-updates"] or 0) >= 2
    last = re.search(r"<li><span>last step</span> ([0-9]+)</li>", page.dom)
    assert last
    assert int(last[1]) > 20
    assert int(page.root["data-charts"] or 0) == page.dom.count('class="chart"') >= 10
    assert "Live: up to date" in page.dom


LIVE_PROBE = """
<script>
window.addEventListener("load", () => {
  const out = document.documentElement.dataset, charts = () => [...document.querySelectorAll("svg.chart")];
  document.querySelector("#curves details").open = true;
  charts()[1].focus({preventScroll: true});
  document.querySelector("#events").scrollIntoView();
  const top = () => document.querySelector("#events").getBoundingClientRect().top, before = top(), old = charts()[1];
  out.scrolled = window.scrollY > 500;
  document.addEventListener("renewed", (event) => {
    if (event.detail.id !== "curves") return;
    requestAnimationFrame(() => {
      out.renewed = charts()[1] !== old;
      out.open = document.querySelector("#curves details").open;
      out.focused = charts().indexOf(document.activeElement);
      out.moved = Math.round(Math.abs(top() - before));
      const box = charts()[1].getBoundingClientRect();
      charts()[1].dispatchEvent(new PointerEvent("pointermove", {clientX: box.right, clientY: box.top + 5, bubbles: true}));
      out.reads = charts()[1].parentElement.querySelector(".readout").textContent;
      out.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
      out.paper = getComputedStyle(document.body).backgroundColor;
    });
  });
});
</script>
"""


@pytest.mark.parametrize("dark", [False, True])
def test_a_watched_page_leaves_its_reader_alone(tmp_path: Path, dark: bool) -> None:
    """Place, focus and open details stay; the new charts are read as the old ones, and are not renewed meanwhile."""
    with watched(Growing(write_run(tmp_path / "run", num_steps=60), LIVE_PROBE, dark=dark)) as address:
        root = open_page(address, tmp_path / "profile", seconds=12).root
    assert (root["data-overflow"], root["data-paper"]) == ("0", DARK if dark else LIGHT)
    assert (root["data-scrolled"], root["data-renewed"], root["data-open"]) == ("true", "true", "true")
    assert (root["data-focused"], root["data-moved"]) == ("1", "0")
    assert (root["data-reads"] or "").startswith("step 2")

"""The page of a comparison in a real browser: its script runs, its charts are there, texts stay texts."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from tests.e2e.test_report_browser import BROWSER, DARK, LIGHT, open_framed, open_page, probed
from tests.integration.test_compare import cells, pretended, run
from tests.integration.test_tokens import token_row, write_tokens

from understudy.compare.outputs import page_values, write_outputs
from understudy.compare.run import Comparison
from understudy.compare.table import Outcome

pytestmark = pytest.mark.skipif(BROWSER is None, reason="NO BROWSER: the page was not opened; set UNDERSTUDY_BROWSER")

HOSTILE = "</td></style></script><script>document.documentElement.dataset.pwned=1</script><img src=x onerror=alert(1)>"


def test_the_page_opens_draws_its_charts_and_runs_nothing_of_others(tmp_path: Path) -> None:
    found = cells(tmp_path, {HOSTILE: {"one": {}, HOSTILE: {}, "c": {}}}, seeds=2)
    pretended(found, lambda name, seed: 0.5)
    comparison = run(found)
    failed = [Outcome(comparison.outcomes[0].cell, "failed", HOSTILE), *comparison.outcomes[1:]]
    page = open_page(
        write_outputs(Comparison(found, failed, (), comparison.tuned, command=HOSTILE)), tmp_path / "profile"
    )
    assert page.console == ()
    assert page.root["class"] == "script"
    assert not {"data-script-error", "data-blocked", "data-pwned"} & page.root.keys()
    assert int(page.root["data-charts"] or 0) == page.dom.count('class="chart"') == 2
    assert page.tags.count("script") == 1
    assert "img" not in page.tags


def test_one_prompt_is_shown_under_two_methods(tmp_path: Path) -> None:
    found = cells(tmp_path, {"method": {"opd": {}, HOSTILE: {}}}, seeds=1)
    made = pretended(found, lambda name, seed: 0.5)
    for cell in made:
        write_tokens(cell.path, [token_row(3, "once"), token_row(6, "again")])
    comparison = run(found)
    assert page_values(replace(comparison, running=True))["kept"] is None
    page = open_page(write_outputs(comparison), tmp_path / "profile")
    assert page.console == ()
    assert not {"data-script-error", "data-blocked", "data-pwned"} & page.root.keys()
    shown = [name for name in (made[0].combination.name, made[1].combination.name) if escape(name) in page.dom]
    assert len(shown) == 2
    assert 'data-panes="2"' in page.dom
    assert page.dom.count('class="token-title"') == 2
    assert page.tags.count("script") == 1


PROBE = """
<script>
window.addEventListener("load", async () => {
  const out = document.documentElement.dataset, chart = document.querySelector("svg.chart");
  const read = () => chart.parentElement.querySelector(".readout").textContent.trim();
  const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  chart.focus(); press(chart, "Home"); out.home = read(); press(chart, "End"); out.end = read();
  const box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left, clientY: box.top + 5, bubbles: true}));
  out.pointed = read();
  const section = document.querySelector("#tokens");
  const isOpen = () => Number(section.dataset.opened || 0) >= section.querySelectorAll(".pane").length;
  while (!isOpen()) await new Promise((go) => setTimeout(go, 20));
  const view = section.querySelector(".token-view");
  press(view, "Home"); out.first = section.querySelector(".token-title").textContent;
  view.querySelector('[data-at="1"]').click(); out.clicked = section.querySelector(".token-title").textContent;
  out.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  out.paper = getComputedStyle(document.body).backgroundColor;
  parent.postMessage({...out}, "*");
});
</script>
"""


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_it_is_read_by_keyboard_and_pointer(tmp_path: Path, width: int, dark: bool) -> None:
    """On a phone in the dark as on a desk in the light; nothing sticks out, however long a name is."""
    found = cells(tmp_path, {"method": {"opd": {}, "a-long-name-" * 6: {}}}, seeds=1)
    for cell in pretended(found, lambda name, seed: 0.5):
        write_tokens(cell.path, [token_row(3, "again")])
    html = write_outputs(run(found)).read_text()
    (tmp_path / "probe.html").write_text(probed(html, PROBE, dark=dark))
    page = open_framed(tmp_path / "probe.html", tmp_path, width)
    root = {name.removeprefix("data-"): value or "" for name, value in page.root.items()}
    assert page.console == ()
    assert root["home"].startswith("sample 0:")
    assert root["pointed"] == root["home"] != root["end"]
    assert root["first"].startswith('"w0 "')
    assert root["clicked"].startswith('"w1 "')
    assert root["overflow"] == "0"
    assert root["paper"] == (DARK if dark else LIGHT)

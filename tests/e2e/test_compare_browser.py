"""The page of a comparison in a real browser: its script runs, its charts are there, texts stay texts."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from tests.e2e.test_report_browser import BROWSER, open_page
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

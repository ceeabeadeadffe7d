"""The viewer of tokens in a real browser: by keyboard and pointer, on a phone, in the dark, hostile text, long samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.e2e.test_report_browser import BROWSER, DARK, LIGHT, Growing, hostile, open_framed, open_page, probed, visits  # noqa: F401 a fixture
from tests.integration.test_tokens import long_run, token_row, write_tokens
from tests.report_run import watched, write_run

from understudy.report.page import write_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="NO BROWSER: the page was not opened; set UNDERSTUDY_BROWSER")

LONG = 32_768
PROBE = """
<script>
window.addEventListener("load", async () => {
  const out = document.documentElement.dataset, section = document.querySelector("#tokens");
  const until = async (done) => { while (!done()) await new Promise((go) => setTimeout(go, 20)); };
  const panes = () => [...section.querySelectorAll(".pane")];
  const view = (pane) => pane.querySelector(".token-view"), title = (pane) => pane.querySelector(".token-title").textContent;
  const press = (pane, key) => view(pane).dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  const opened = () => Number(section.dataset.opened || 0);
  const choose = async (select, value) => {
    const before = opened();
    select.value = value;
    select.dispatchEvent(new Event("change"));
    await until(() => opened() > before);
  };
  await until(() => opened() >= panes().length);
  out.panes = panes().length;
  if (panes().length === 1) { section.querySelector("#token-beside").click(); await until(() => opened() > 1); }
  const [one, other] = panes(), [prompt, step] = one.querySelectorAll("select");
  out.steps = [one, other].map((pane) => pane.querySelectorAll("select")[1].selectedOptions[0].textContent).sort().join("|");
  await choose(step, step.options[0].value);
  out.first = title(one);
  out.said = one.querySelector(".said").textContent;
  out.likely = [...one.querySelectorAll(".likely li")].map((item) => item.textContent).join("|");
  press(one, "Home"); out.home = title(one);
  press(one, "ArrowRight"); out.second = title(one); out.outlier = one.querySelector(".now").className;
  press(one, "End"); out.end = title(one);
  press(one, "n"); out.next = title(one); press(one, "p"); press(one, "p"); out.previous = title(one);
  const token = one.querySelector('[data-at="2"]');
  token.dispatchEvent(new PointerEvent("pointerover", {bubbles: true})); out.pointed = title(one);
  view(one).dispatchEvent(new PointerEvent("pointerleave")); out.left = title(one);
  token.dispatchEvent(new MouseEvent("click", {bubbles: true})); out.clicked = title(one);
  const colour = section.querySelector("#token-colour");
  const background = () => getComputedStyle(one.querySelector('[data-at="3"]')).backgroundColor;
  const before = background();
  colour.value = "student_entropy"; colour.dispatchEvent(new Event("change"));
  out.recoloured = String(before !== background());
  out.missing = one.querySelector(".said").textContent.includes("not known: nobody asked");
  const search = section.querySelector("#token-search");
  search.value = "needle"; search.dispatchEvent(new Event("input"));
  out.found = section.querySelector(".search-found").textContent;
  colour.value = "log_ratio"; colour.dispatchEvent(new Event("change"));
  await choose(prompt, "long");
  search.dispatchEvent(new Event("input"));
  search.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
  out.needle = title(one);
  out.rows = one.querySelectorAll(".token-row").length;
  out.height = one.querySelector(".token-rows").clientHeight;
  const wide = [...one.querySelectorAll(".token-row")].filter((row) => row.scrollWidth > row.clientWidth + 1).length;
  out.cut = wide;
  out.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  out.paper = getComputedStyle(document.body).backgroundColor;
  out.done = "yes";
  parent.postMessage({...out}, "*");
});
</script>
"""


def sample_rows() -> list[dict[str, object]]:
    """One prompt at two steps, and one long sample with a needle in it."""
    top = {"student_top": [[0, 1]] * 4, "student_top_logprob": [[-0.05, -3.0]] * 4}
    table = top | {
        "student_entropy": [0.0, 0.2, 0.7, 3.0],
        "trusted": [1.0, 0.0, 1.0, 1.0],
        "push": [0.1, -0.1, 0.1, 0.1],
    }
    table |= {"loss/policy_gradient": [0.0, None, 2.0, 3.0]}
    row = token_row(1, "again", **table) | {"missing": {"teacher_top": "nobody asked"}}
    long = token_row(9, "long", LONG)
    long["vocabulary"] = {str(at): f"w{at % 97} " for at in range(LONG)} | {str(LONG - 5): "needle "}
    return [row, row | {"step": 9}, long]


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_tokens_are_read_by_keyboard_and_pointer(tmp_path: Path, width: int, dark: bool) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    write_tokens(run, sample_rows())
    html = write_report(run).read_text()
    (tmp_path / "probe.html").write_text(probed(html, PROBE, dark=dark))
    page = open_framed(tmp_path / "probe.html", tmp_path, width)
    root = {name.removeprefix("data-"): value or "" for name, value in page.root.items()}
    assert page.console == ()
    assert root.get("done") == "yes", root
    assert (root["panes"], root["steps"]) == ("1" if width < 760 else "2", "step 1|step 9")
    # a sample opens at its largest difference
    assert root["first"].startswith('"w3 " token 4 of 4, id 3, sampled by the student')
    assert "log T \u2212 log S \u22123.00: the teacher finds it 20.1 times less likely" in root["said"]
    assert "policy_gradient: loss 3" in root["said"]
    assert root["likely"] == '"w0 " 95.1 %|"w1 " 5.0 %'
    assert root["home"].startswith('"w0 "')
    assert root["second"].startswith('"w1 "')
    assert {"m-outlier", "m-masked"} <= set(root["outlier"].split())
    assert root["end"].startswith('"w3 "')
    assert root["next"].startswith('"w2 "')
    assert root["previous"].startswith('"w0 "')
    assert root["pointed"].startswith('"w2 "')
    assert root["left"].startswith('"w0 "')
    assert root["clicked"].startswith('"w2 "')
    assert root["recoloured"] == root["missing"] == "true"
    assert root["found"] == "0 and 0 found"
    assert root["needle"].startswith(f'"needle " token {LONG - 4:,} of {LONG:,}')
    # rows are made as they are seen
    assert int(root["height"]) > 20_000
    assert 10 < int(root["rows"]) < 80
    assert (root["cut"], root["overflow"]) == ("0", "0")
    assert root["paper"] == (DARK if dark else LIGHT)


def test_a_long_run_opens_with_all_of_its_samples(tmp_path: Path) -> None:
    page = open_page(write_report(long_run(tmp_path / "run")), tmp_path / "profile")
    assert page.console == ()
    assert not {"data-blocked", "data-script-error"} & page.root.keys()
    assert 'data-samples="500"' in page.dom
    assert page.dom.count('class="token-title"') == 2


def test_hostile_tokens_stay_text(tmp_path: Path, visits: tuple[str, list[str]]) -> None:  # noqa: F811 the fixture
    address, asked = visits
    run, text = write_run(tmp_path / "run", num_steps=10), hostile(address)
    row = token_row(5, text, student_top=[[0, 1]] * 4, student_top_logprob=[[-0.1, -2.0]] * 4)
    row |= {"prompt": text, "method": text, "teacher": text, "finish": text, "missing": {"teacher_top": text}}
    row["vocabulary"] = dict.fromkeys(row["vocabulary"], text)
    row["tokens"][f"loss/{text}"] = [1.0] * 4
    write_tokens(run, [row])
    page = open_page(write_report(run), tmp_path / "profile")
    assert asked == []
    assert page.console == ()
    assert not {"data-pwned", "data-blocked", "data-script-error"} & page.root.keys()
    assert page.tags.count("script") == 1
    assert not {"img", "link", "iframe"} & set(page.tags)
    assert 'class="token-title"' in page.dom


LIVE_PROBE = """
<script>
window.addEventListener("load", async () => {
  const out = document.documentElement.dataset, section = () => document.querySelector("#tokens");
  const until = async (done) => { while (!done()) await new Promise((go) => setTimeout(go, 20)); };
  const opened = () => Number(section().dataset.opened || 0), pane = () => section().querySelector(".pane");
  await until(() => opened() >= section().querySelectorAll(".pane").length);
  const now = opened(), step = pane().querySelectorAll("select")[1];
  step.value = step.options[1].value; step.dispatchEvent(new Event("change"));
  await until(() => opened() > now);
  const colour = section().querySelector("#token-colour");
  colour.value = "student_entropy"; colour.dispatchEvent(new Event("change"));
  const search = section().querySelector("#token-search");
  search.value = "w2"; search.dispatchEvent(new Event("input"));
  pane().querySelector('[data-at="1"]').click();
  pane().querySelector(".token-view").focus({preventScroll: true});
  const said = () => [pane().querySelectorAll("select")[1].selectedOptions[0].textContent,
    pane().querySelector(".token-title").textContent, section().querySelector("#token-colour").value,
    section().querySelector(".search-found").textContent, document.activeElement.className].join("|");
  out.before = said();
  const old = section();
  document.addEventListener("renewed", async (event) => {
    if (event.detail.id !== "tokens" || out.after) return;
    await until(() => opened() >= section().querySelectorAll(".pane").length);
    await new Promise((go) => setTimeout(go, 20));
    out.renewed = section() !== old; out.steps = pane().querySelectorAll("select")[1].options.length; out.after = said();
  });
});
</script>
"""


class GrowingTokens(Growing):
    """A run that keeps the same prompt again at every question of the page."""

    def changed(self, known: Mapping[str, str]) -> dict[str, dict[str, str]]:
        table = {"student_entropy": [0.0, 0.2, 0.7, 3.0]}
        write_tokens(self._metrics.parent, [token_row(self._shown, "again", **table)])
        return super().changed(known)


def test_a_renewed_viewer_shows_what_its_reader_chose(tmp_path: Path) -> None:
    """Sample, token, colour, search and focus; the new steps are in its menu."""
    run, table = write_run(tmp_path / "run", num_steps=60), {"student_entropy": [0.0, 0.2, 0.7, 3.0]}
    write_tokens(run, [token_row(step, "again", **table) for step in (1, 5, 9)])
    with watched(GrowingTokens(run, LIVE_PROBE)) as address:
        page = open_page(address, tmp_path / "profile", seconds=12)
    assert page.console == ()
    assert "data-script-error" not in page.root
    assert page.root["data-before"] == page.root["data-after"]
    assert (page.root["data-before"] or "").startswith('step 5|"w1 " token 2 of 4')
    assert (page.root["data-before"] or "").endswith("|student_entropy|1 and 1 found|token-view")
    assert (page.root["data-renewed"], int(page.root["data-steps"] or 0) > 3) == ("true", True)

"""The report as a page: what it says of a table in one sentence, where its numbers lead, and that a browser shows it whole."""
from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

import browser
import synthetic
from hintkd.methods.method import Line
from hintkd.results import html
from hintkd.results.measured import Judgement, read_groups
from hintkd.results.report import MEASURED
from hintkd.results.standing import Standing, claims_in_words, standing
from hintkd.study.claims import Claim
from hintkd.study.table import find_table, load_table

pytest.importorskip("jinja2")
TABLE1, TABLE3, FIGURE9 = (find_table(name) for name in ("table1", "table3", "figure9"))
READABLE, VISIBLE = 4.5, 3.0                                 # contrast that WCAG 2.1 asks of text, and of lines and marks


def keep_weights(root: Path, table: str) -> None:
    """Weights for every record of a table, as a full schedule leaves them."""
    for path in root.glob(f"results/measured/{table}/**/net*.json"):
        weights = root / "results/weights" / path.relative_to(root / "results/measured").with_suffix(".caffemodel")
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.write_bytes(b"weights")
        entry = {"file": str(weights.relative_to(root)), "sha256": hashlib.sha256(b"weights").hexdigest()}
        path.write_text(json.dumps({**json.loads(path.read_text()), "weights": entry}))


def write(root: Path) -> Path:
    """A page with a full table that has weights, a replicated one, a shortened one and a figure."""
    synthetic.measure(root, TABLE3, {**synthetic.published(TABLE3), "kd-equal-iterations": [0.5, 0.51, 0.55]})
    keep_weights(root, "table3")
    for repeat in (1, 2):
        values = {"teacher": [91.7], "kd": [90.87, 90.78, 90.24], "layerwise-hint": [91.0, 91.1, 91.2]}
        synthetic.measure(root, TABLE1, values, repeat=repeat)
    synthetic.measure(root, TABLE1, {"kd": [80.8, 80.7, 80.9], "hint-kd": [81.0, 81.1, 81.4]}, scale=0.05)
    synthetic.measure(root, FIGURE9, {"concurrent-hint": [88.1], "layerwise-hint": [88.3]})
    path = html.write_page(root)
    assert path == root / "results/report.html"
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("page"))


# ------------------------------------------------------------------------------------------------------------------ one sentence

def stands(root: Path, name: str) -> Standing:
    groups = read_groups(root / MEASURED)
    (group,) = [group for group in groups if group.name == name]
    return standing(group, groups)


@pytest.mark.parametrize(("changed", "mark", "sentence"), [
    ({}, ("good", "reproduced"), "is reproduced: all 6 published means lie within 0.05 points of error"),
    ({"kd": [0.7, 0.8, 0.9]}, ("mixed", "in part"), "is reproduced in part: 5 of 6 published means lie within 0.05 points of error"),
    ({"kd": []}, ("none", "incomplete"), "is not complete: 16 of 19 nets are measured, and 5 of 5 published means so far are reproduced"),
], ids=["reproduced", "in part", "incomplete"])
def test_a_full_table_is_judged_by_its_published_means(tmp_path, changed, mark, sentence):
    measured = {**synthetic.published(TABLE3), "kd-equal-iterations": [0.5, 0.51, 0.55], **changed}
    synthetic.measure(tmp_path, TABLE3, {method: values for method, values in measured.items() if values})
    found = stands(tmp_path, "table3")
    assert (found.mark.kind, found.mark.words) == mark and found.sentence.startswith(sentence)


def test_a_table_none_of_whose_means_is_near_is_not_reproduced(tmp_path):
    measured = {method: [value + 1 for value in values] for method, values in synthetic.published(TABLE3).items()}
    synthetic.measure(tmp_path, TABLE3, {**measured, "kd-equal-iterations": [1.5, 1.51, 1.55]})
    found = stands(tmp_path, "table3")
    assert found.mark.kind == "bad"
    assert found.sentence.startswith("is not reproduced: none of its 6 published means lies within 0.05 points of error;")


def test_a_shortened_table_is_not_judged(tmp_path):
    synthetic.measure(tmp_path, TABLE1, synthetic.published(TABLE1), scale=0.05)
    found = stands(tmp_path, "table1-scale0.05")
    assert (found.mark.kind, found.mark.words) == ("none", "not comparable") and "reproduced" not in found.sentence
    assert found.sentence.startswith("was run with every schedule at 0.05 of its length, so that its values are not comparable")


def test_a_figure_without_printed_values_is_judged_by_its_claims(tmp_path):
    synthetic.measure(tmp_path, FIGURE9, {"teacher": [91.7], "original": [88.0], "concurrent-hint": [88.1], "layerwise-hint": [88.3]})
    found = stands(tmp_path, "figure9")
    assert found.sentence.endswith("none of its 3 claims can be judged.")


@pytest.mark.parametrize(("verdicts", "words"), [
    ([], ""), (["holds"], "its claim holds"), (["holds"] * 2, "both claims hold"), (["holds"] * 3, "all 3 claims hold"),
    (["does not hold"], "its claim does not hold"), (["does not hold"] * 2, "none of its 2 claims holds"),
    (["within noise"] * 4, "all 4 claims are within noise"), (["not judged"] * 3, "none of its 3 claims can be judged"),
    (["holds", "does not hold", "does not hold", "within noise"], "of its 4 claims 1 holds, 2 do not and 1 is within noise"),
])
def test_claims_are_counted_in_words(verdicts, words):
    assert claims_in_words([Judgement(Claim.parse("kd > original"), None, verdict) for verdict in verdicts]) == words


# ----------------------------------------------------------------------------------------------------------------------- the page

def test_every_net_leads_to_its_record_and_its_weights(page):
    text = page.read_text()
    net = "table3/layerwise-hint/net1"
    assert f'<a href="measured/{net}.json">0.41</a><a class="weights" href="weights/{net}.caffemodel"' in text
    assert '<a href="measured/table1/repeat2/kd/net1.json">90.87</a>' in text
    links = set(re.findall(r'href="([^"#][^":]*)"', text))
    assert len([link for link in links if link.endswith(".caffemodel")]) == 19
    assert not [link for link in links if not (page.parent / link).is_file()]
    anchors = set(re.findall(r'href="#([^"]*)"', text))
    assert anchors and anchors <= set(re.findall(r' id="([^"]*)"', text))


def test_the_page_needs_nothing_from_outside(page):
    text = page.read_text()
    assert "<script" not in text and "@import" not in text and "@font-face" not in text and " src=" not in text
    assert set(re.findall(r"url\((.)", text)) == {"#"}       # clips of the figures
    assert {link.split("/")[2] for link in re.findall(r'href="(https?:[^"]*)"', text)} == {"doi.org"}
    identifiers = re.findall(r' id="([^"]*)"', text)
    assert len(identifiers) == len(set(identifiers))


def test_the_same_records_give_the_same_page(page, tmp_path):
    assert write(tmp_path).read_bytes() == page.read_bytes()


def test_numbers_that_are_small_have_no_sign():
    assert [html.signed(number, 2) for number in (-0.004, 0.004, -0.006, 1.0)] == ["0.00", "0.00", "\N{MINUS SIGN}0.01", "+1.00"]


def test_what_is_written_in_a_figure_is_not_rounded():
    svg = pytest.importorskip("hintkd.results.svg", reason="matplotlib is not installed", exc_type=ImportError)
    text = svg.curves("salt", "at scale 0.005", {"kd": [[(0, 6.125), (100, 6.1249)]]}, {"kd": Line("#E69F00")}, "loss < 6.125")
    assert 'aria-label="at scale 0.005"' in text and ">loss &lt; 6.125</text>" in text
    assert not re.search(r'[xy]="-?\d+\.\d{3}', text)


def test_what_a_table_says_is_text_and_not_markup(tmp_path):
    (tmp_path / "mine.yaml").write_text(json.dumps({
        "title": "<b>Mine</b>", "source": "nobody & co", "dataset": "digits", "student": {"depth": 8}, "rows": [],
        "notes": ["`a < b` is *so*"]}))
    table = load_table(tmp_path / "mine.yaml")
    synthetic.measure(tmp_path, table, {"original": [90.0, 91.0, 92.0]})
    (tmp_path / "results/measured/mine/table.yaml").write_text(table.dump(tmp_path / "results/measured/mine"))
    text = html.write_page(tmp_path).read_text()
    assert "<b>" not in text and "&lt;b&gt;Mine&lt;/b&gt;" in text and "nobody &amp; co" in text
    assert "<code>a &lt; b</code> is <em>so</em>" in text


def test_nothing_measured_says_so(tmp_path):
    assert "Nothing was measured yet" in html.write_page(tmp_path).read_text()


def test_without_matplotlib_the_page_has_no_figures_and_without_jinja2_there_is_none(tmp_path, monkeypatch):
    synthetic.measure(tmp_path, TABLE1, {"kd": [90.8, 90.8, 90.9]})
    monkeypatch.setattr(html.importlib.util, "find_spec", lambda name: name != "matplotlib" or None)
    text = html.write_page(tmp_path).read_text()
    assert "<svg" not in text and "pip install &#39;hintkd[report]&#39;" in text.replace("'", "&#39;")
    monkeypatch.setattr(html.importlib.util, "find_spec", lambda name: None)
    assert html.write_page(tmp_path) is None


# -------------------------------------------------------------------------------------------------------------------- in a browser

# The least contrast of what is drawn against the page or the nearest background, and where: [text, lines and marks].
CONTRAST = """(() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
  const light = rgb => 0.2126 * channel(rgb[0]) + 0.7152 * channel(rgb[1]) + 0.0722 * channel(rgb[2])
  const numbers = colour => (colour.match(/[\\d.]+/g) || []).map(Number)
  const seen = colour => { const n = numbers(colour); return n.length >= 3 && n[3] !== 0 }
  const back = e => seen(getComputedStyle(e).backgroundColor) ? getComputedStyle(e).backgroundColor : back(e.parentElement)
  const ratio = (a, b) => { const [x, y] = [light(numbers(a)), light(numbers(b))].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05) }
  let text = [99, ''], marks = [99, '']
  const least = (best, value, what) => value < best[0] ? [value, what] : best
  document.querySelectorAll('details').forEach(each => each.open = true)
  for (const e of document.body.querySelectorAll('*')) {
    const style = getComputedStyle(e)
    if ([...e.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
      text = least(text, ratio(e.closest('svg') ? style.fill : style.color, back(e)), e.textContent.slice(0, 40))
    if (e.matches('svg path, svg use') && seen(style.stroke) && parseFloat(style.strokeWidth) > 1)
      marks = least(marks, ratio(style.stroke, back(e.closest('figure'))), e.outerHTML.slice(0, 80))
  }
  return [...text, ...marks]
})()"""


# What is written in a figure and does not lie within it.
OUTSIDE = """[...document.querySelectorAll('svg text')].filter(e => {
  const inner = e.getBoundingClientRect(), outer = e.closest('svg').getBoundingClientRect()
  return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1
}).map(e => e.textContent)"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory):
    program = browser.find()
    if program is None:
        pytest.skip(f"there is no Chromium on the path: {', '.join(browser.NAMES)}")
    with browser.browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_whole_and_legible(page, tab, width, look):
    tab.open(page, width, look)
    assert tab.requested == [page.resolve().as_uri()]
    assert tab.value("matchMedia('(prefers-color-scheme: dark)').matches") is (look == "dark")
    text, where, marks, what = tab.value(CONTRAST)
    assert text >= READABLE, where
    assert marks >= VISIBLE, what
    assert tab.value("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    shown = tab.value("[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect()).map(r => [r.left, r.right, r.height])")
    assert len(shown) == 13 and all(left >= 0 and right <= width and height > 100 for left, right, height in shown)
    assert tab.value(OUTSIDE) == []
    assert tab.value("[...document.images].filter(each => !each.complete || !each.naturalWidth).length") == 0


@pytest.mark.parametrize(("width", "top"), [(1280, 900), (390, 844)])
def test_the_first_screen_begins_with_verdicts(page, tab, width, top):
    tab.open(page, width, height=top)
    place = "document.querySelector('.standings li .mark').getBoundingClientRect().bottom"
    assert 0 < tab.value(place) < top
    first = tab.value("document.querySelector('.standings li').innerText")
    assert " ".join(first.split()).startswith("incomplete Table 1 is not complete: 14 of 38 nets")

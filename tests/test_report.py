"""The report of a run, on the terminal, in train.log and as a page."""

import copy
import html.parser
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import FAST

import check_data
import train

PAGE_TAGS = {"html", "head", "meta", "title", "style", "body", "pre", "span"}


@pytest.fixture(scope="module")
def drawn(trained):
    """The metrics of a run, as they are read from its file; do not change them."""
    return json.loads((trained / "first" / "metrics.json").read_text())


@pytest.fixture
def metrics(drawn):
    return copy.deepcopy(drawn)


def report(metrics, run="run"):
    return train.report_text(metrics, Path(run), io.StringIO())


def one_line(text):
    return " ".join(text.split())


def sweep_rows(count):
    setting = {"learning_rate": 0.000325, "weight_decay": 0.00123, "dropout": 0.456, "width": 1024}
    setting |= {"label_smoothing": 0.0123, "mixup": 0.000412}
    return [
        {"setting": number + 1} | setting | {"validation_loss": 12.3456, "folds": number % 25}
        for number in range(count)
    ]


# --- contents ---


def test_the_report_is_drawn_from_metrics_json_alone(trained, drawn):
    assert (trained / "first" / "train.log").read_text().endswith(report(drawn, trained / "first"))
    page = train.report_html(drawn, trained / "first")
    assert (trained / "first" / "report.html").read_bytes() == page


def test_the_report_names_method_and_size_first(drawn, metrics):
    lines = report(drawn).strip().splitlines()
    assert lines[:2] == ["3-fold speaker-independent cross-validation", "112 utterances, 8 speakers, 8 classes"]
    metrics["fold_scheme"] = "leave-one-speaker-out"
    assert report(metrics).splitlines()[1] == "3-fold speaker-independent cross-validation (leave-one-speaker-out)"


def test_the_report_has_scores_calibration_mistakes_and_versions(drawn):
    shown = one_line(report(drawn))
    mistake = drawn["confident_mistakes"][0]
    weakest = min(drawn["speakers"].items(), key=lambda item: item[1]["ua"])[0]
    for expected in (
        f"UA (mean recall) {drawn['ua']:.4f} {drawn['ua_ci95'][0]:.4f} to {drawn['ua_ci95'][1]:.4f} 0.1250",
        f"WA (accuracy) {drawn['wa']:.4f}",
        f"macro F1 {drawn['macro_f1']:.4f}",
        f"{drawn['majority_wa']:.4f}",
        f"expected calibration error {drawn['ece']:.3f} ({drawn['ece_uncalibrated']:.3f} before temperature scaling)",
        f"{mistake['label']} {mistake['predicted']} {mistake['confidence']:.3f} {mistake['file']}",
        f"speaker {weakest} ",
        f"seeds {FAST[3]}",
        f"jax {drawn['versions']['jax']}",
        f"command {drawn['command']}"[:70],
        "UA per fold " + " ".join(f"{fold['ua']:.3f}" for fold in drawn["folds"]),
        "8, each tested with models that were not trained on that speaker",
        "mostly acted",
    ):
        assert expected in shown


def test_the_confusion_matrix_has_true_labels_as_rows(drawn):
    lines = report(drawn).splitlines()
    start = lines.index("confusion matrix (rows: true label, columns: prediction)")
    for row, (name, counts) in enumerate(zip(drawn["classes"], drawn["confusion"])):
        cells = lines[start + 4 + row].split()
        assert cells == [name, *map(str, counts), f"{drawn['recall'][name]:.3f}"]


def test_a_split_that_is_not_by_speaker_is_reported_in_the_heading_and_in_the_model_card(drawn, metrics):
    assert "NOT speaker-independent" not in report(drawn)
    metrics["speaker_independent"] = False
    shown = report(metrics)
    assert shown.count("NOT speaker-independent") == 2
    assert "3-fold cross-validation, NOT speaker-independent" in shown
    assert "unseen speakers" in report(drawn)
    assert "unseen speakers" not in shown


def test_groups_are_listed_weakest_first_and_cut_to_the_rows_of_the_table(metrics):
    metrics["speakers"] = {f"own:{number}": {"n": 7, "ua": number / 10} for number in (3, 1, 2, 6, 5, 4, 0)}
    metrics["groups"]["corpus"] = {f"c{number:02d}": {"n": 5, "ua": 0.5} for number in range(12)}
    shown = report(metrics)
    assert re.findall(r"^ speaker +(own:\d) +7 +(\S+)", shown, re.MULTILINE) == [
        (f"own:{number}", f"{number / 10:.3f}") for number in range(5)
    ]
    assert len(re.findall(r"^ corpus +c\d\d ", shown, re.MULTILINE)) == train.MAX_TABLE_ROWS
    for field in ("speaker", "corpus"):
        assert f"{field} ... and 2 more in metrics.json" in one_line(shown)


@pytest.mark.parametrize(("ua", "length"), [(0.0, 0), (0.5, 10), (1.0, 20)])
def test_bars_are_as_long_as_the_scores(metrics, ua, length):
    metrics["groups"] = {"corpus": {"example": {"n": 1, "ua": ua}}}
    (line,) = [line for line in report(metrics).splitlines() if line.startswith(" corpus ")]
    assert line.count("\N{BOX DRAWINGS HEAVY HORIZONTAL}") == length


def test_the_learning_curve_has_its_first_and_its_last_epoch_and_at_most_ten_rows(metrics):
    curve = metrics["curves"][0]
    metrics["curves"] = [curve | {"epoch": epoch} for epoch in range(1, 41)]
    lines = report(metrics).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("validation per epoch"))
    rows = [line.split() for line in lines[start + 4 : start + 4 + train.MAX_TABLE_ROWS]]
    assert [rows[0][0], rows[-1][0]] == ["1", "40"]
    assert not lines[start + 4 + train.MAX_TABLE_ROWS].strip()
    loss, ua = curve["validation_loss"], curve["validation_ua"]
    expected = [measure[part] for measure in (loss, ua) for part in ("mean", "low", "high")]
    assert rows[0][2:8] == [f"{value:.3f}" for value in expected]


def test_empty_intervals_of_confidence_are_not_drawn(metrics):
    interval = {"low": 0.2, "high": 0.4, "n": 3, "confidence": 0.3, "accuracy": 2 / 3}
    metrics["reliability"] = [interval, interval | {"low": 0.4, "high": 0.6, "n": 0, "confidence": None}]
    shown = report(metrics)
    assert re.search(r"0\.200 to 0\.400 +3 +0\.300 +0\.667", shown)
    assert "0.400 to 0.600" not in shown


def test_a_sweep_is_a_table_of_the_best_settings(drawn, metrics):
    assert "settings by validation loss" not in report(drawn)
    metrics["sweep"] = sweep_rows(64)
    lines = report(metrics).splitlines()
    start = lines.index("settings by validation loss, best 10 of 64 (metrics.json has all)")
    rows = [line.split() for line in lines[start + 5 : start + 15]]
    assert rows[1] == ["2", "0.000325", "0.00123", "0.456", "1024", "0.0123", "0.000412", "12.3456", "1"]
    assert [row[0] for row in rows] == [str(number) for number in range(1, 11)]


def test_the_report_names_what_was_left_out_and_why(drawn, metrics):
    shown = report(drawn)
    assert "empty  1  03-01-05-01-02-01-12.npz: has no bytes" in shown
    assert "left out          1 file, listed in skipped.csv" in shown
    metrics |= {"left_out": {}, "left_out_first": {}}
    shown = report(metrics)
    assert "left out          0 files" in shown
    assert "skipped.csv" not in shown


def test_the_scores_of_many_folds_are_cut(metrics):
    metrics["folds"] = [{"ua": number / 100} for number in range(12)]
    assert "0.080 0.090 ... left out" in one_line(report(metrics))
    metrics["folds"] = metrics["folds"][:10]
    assert "0.080 0.090 left out" in one_line(report(metrics))


# --- layout ---


def test_the_report_fits_80_columns(metrics):
    codes = ["x" * 16 + str(number) for number in range(20)]
    first = {code: {"file": "f" * 90 + ".npz", "reason": "is not what it should be " * 5} for code in codes}
    many = {"left_out": dict.fromkeys(codes, 10**6), "left_out_first": first}
    for more in ({}, {"notes": ["word " * 40]}, many, {"sweep": sweep_rows(64)}, {"speaker_independent": False}):
        shown = report(metrics | more)
        assert max(map(len, shown.splitlines())) <= 80
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown  # nothing is cut off


def test_a_title_is_one_line_however_narrow_its_table_is(metrics):
    metrics["reliability"] = [interval | {"accuracy": 0.0} for interval in metrics["reliability"] if interval["n"]]
    assert re.search(r"^expected calibration error .* before temperature scaling\)$", report(metrics), re.MULTILINE)


def test_more_classes_than_eight_widen_the_report(metrics):
    metrics["classes"] = [f"class{number}" for number in range(20)]
    metrics["confusion"] = np.eye(20, dtype=int).tolist()
    metrics["recall"] = dict.fromkeys(metrics["classes"], 1.0)
    shown = report(metrics)
    assert all(f" {name} " in shown for name in metrics["classes"])
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown


def test_the_path_of_the_results_is_never_wrapped(drawn):
    path = "/".join(["folder"] * 30)
    assert report(drawn, path).splitlines()[-1] == f"  results           {path}"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_without_line_drawing_characters_gets_ascii(drawn, encoding):
    shown = train.report_text(drawn, Path("run"), io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert shown.isascii()
    assert max(map(len, shown.splitlines())) <= 80
    assert "####" in shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("environment", "coloured", "styled"),
    [({"TERM": "xterm-256color"}, True, True), ({"NO_COLOR": "1"}, False, True), ({"TERM": "dumb"}, False, False)],
)
def test_colour_is_for_terminals_that_support_it(drawn, monkeypatch, environment, coloured, styled):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    page = train.report_html(drawn, Path("run"))
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    shown = train.report_text(drawn, Path("run"), sys.stdout)
    assert bool(re.search(r"\x1b\[[0-9;]*48;", shown)) == coloured
    assert ("\x1b[" in shown) == styled
    assert train.report_html(drawn, Path("run")) == page
    monkeypatch.setenv("FORCE_COLOR", "1")  # is for the terminal, not for train.log
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == report(drawn)


@pytest.mark.parametrize("share", np.linspace(0.01, 1, 34))
def test_the_numbers_of_the_heat_map_can_be_read(share):
    """WCAG 2.1 demands a contrast of 4.5 to 1."""

    def luminance(channels):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    ink, _, paper = train.cell_style(share).split()
    background = luminance([int(value) / 255 for value in re.findall(r"\d+", paper)])
    foreground = luminance([int(ink[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    low, high = sorted([background, foreground])
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_cells_without_utterances_have_no_colour():
    assert train.cell_style(0.0) == ""
    assert len({train.cell_style(share) for share in (0.01, 0.1, 1.0)}) == 3


# --- the page ---


class Page(html.parser.HTMLParser):
    """The tags, the attributes and the text of each element of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = set(), set(), {}, []
        self.feed(page.decode())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag not in ("meta", "span"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "span":
            assert self.open.pop() == tag

    def handle_data(self, text):
        tag = self.open[-1] if self.open else ""
        self.text[tag] = self.text.get(tag, "") + text


def test_the_page_has_the_text_of_the_report_and_needs_nothing_else(drawn):
    content = train.report_html(drawn, Path("run"))
    page = Page(content)
    assert page.text["pre"].strip("\n") == report(drawn).strip("\n")
    assert page.text["title"] == f"Speech emotion report: UA {drawn['ua']:.4f}, 112 utterances, 8 speakers"
    assert page.tags == PAGE_TAGS
    assert page.attributes == {"lang", "charset", "name", "content", "style"}
    assert not re.search(rb"https?:|url\(|@import", content)
    assert re.search(rb"background-color: #[0-9a-f]{6}\">", content)


# --- hostile names ---

HOSTILE = (
    "<script>alert(1)</script>",
    "[red]x[/]",
    "&amp;",
    ":bomb:",
    "{code}{{",
    "%(ua)s",
    "a\n\n UA (mean recall)  1.0000\n",
    "\x1b[2J\r\t",
    "\udcff",
    "\u202e",
    "x" * 300,
    "</pre><b>",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_forges_a_line_markup_or_a_tag(drawn, metrics, name):
    metrics["classes"][0] = name
    metrics["recall"] = {name if key == "neutral" else key: value for key, value in metrics["recall"].items()}
    metrics["speakers"] = {name: metrics["speakers"]["ravdess:01"]}
    metrics["groups"]["corpus"] = {name: metrics["groups"]["corpus"]["ravdess"]}
    metrics["confident_mistakes"] = [{"file": name, "label": name, "predicted": name, "confidence": 0.9}]
    metrics["left_out_first"] = {"empty": {"file": name, "reason": name}}
    metrics |= {"notes": [name], "command": name, "settings": {"labels": name}, "device": name, "fold_scheme": name}
    shown = report(metrics, name)
    assert all(character.isprintable() or character == "\n" for character in shown)

    def score_lines(text):
        return [line for line in text.splitlines() if line.startswith(" UA (mean")]

    assert score_lines(shown) == score_lines(report(drawn))
    page = Page(train.report_html(metrics, Path(name)))
    assert page.text["pre"].strip("\n") == shown.strip("\n")
    assert page.tags == PAGE_TAGS
    whole = "".join(shown.split())
    assert whole.count("".join(check_data.printable(name).split())) >= 5

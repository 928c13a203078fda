"""The report of a run, on the terminal, in train.log and as a page."""

import copy
import errno
import html.parser
import io
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import FAST
from rich.style import Style

import check_data
import train

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def drawn(trained):
    """The metrics of a run, as they are read from its file; do not change them."""
    return json.loads((trained / "first" / "metrics.json").read_text())


@pytest.fixture
def metrics(drawn):
    return copy.deepcopy(drawn)


def report(metrics, page="run/report.html"):
    return train.report_text(metrics, Path(page), io.StringIO())


def with_classes(metrics, names, count=40):
    """The metrics with other classes, of which each is confused with the next one."""
    size = len(names)
    confusion = np.eye(size, dtype=int) * count + np.roll(np.eye(size, dtype=int), 1, axis=1) * 3
    by_class = train.stats.Counts.of(confusion).class_scores()
    scores = {name: dict(zip(names, values.tolist())) for name, values in by_class.items()}
    return metrics | {"classes": names, "confusion": confusion.tolist(), "chance_ua": 1 / size} | scores


def sweep_rows(count):
    setting = {"learning_rate": 0.000325, "weight_decay": 0.00123, "dropout": 0.456, "width": 1024}
    setting |= {"label_smoothing": 0.0123, "mixup": 0.000412}
    return [{"setting": n + 1} | setting | {"validation_loss": 12.3456, "folds": n % 25} for n in range(count)]


def many_of_everything(metrics):
    """60 classes, 500 speakers, 40 folds, long names: more than any corpus has."""
    speakers = {f"own:speaker-{number:03d}": {"n": 7, "ua": number / 499} for number in range(500)}
    metrics = with_classes(metrics, [f"a-rather-long-emotion-{number}" for number in range(60)])
    return metrics | {
        "speakers": speakers,
        "folds": [{"ua": number / 40} for number in range(40)],
        "sweep": sweep_rows(64),
        "notes": ["word" * 100],
        "left_out": {"x" * 16: 10**6},
        "left_out_first": {"x" * 16: {"file": "f" * 200, "reason": "is not what it should be " * 5}},
    }


def little_of_everything(metrics):
    """What a set without speakers may give: no curves, no intervals, scores that are not numbers."""
    nothing = {f"{name}_ci95": [None, None] for name in train.SCORES}
    groups = {"corpus": {"own": {"n": 3, "ua": None}}, "gender": {}, "intensity": {}}
    metrics = with_classes(metrics, ["negative", "positive"], 0)
    metrics |= {"speaker_independent": False, "n_speakers": 1, "speakers": {}, "curves": [], "reliability": []}
    metrics |= {"folds": [{"ua": None}], "confident_mistakes": [], "groups": groups, "ua": float("nan")}
    return metrics | nothing | {"macro_f1": None, "ece": None, "ece_uncalibrated": None}


# --- the terminal ---


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A function that draws the scores on a terminal of this width, with these colours."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def draw(metrics, width=80, **environment):
        for name, value in {"TERM": "xterm", "COLUMNS": str(width), **environment}.items():
            monkeypatch.setenv(name, value)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", Terminal())
            for cached in (Style.parse, Style._add):  # a style keeps the codes of its first terminal
                cached.cache_clear()
            return train.report_text(metrics, Path("run/report.html"), sys.stdout)

    return draw


def without_colour(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_train_log_and_the_page_are_drawn_from_metrics_json_alone(trained, drawn):
    assert (trained / "first" / "train.log").read_text().endswith(report(drawn, trained / "first" / "report.html"))
    assert (trained / "first" / "report.html").read_bytes() == train.report_html(drawn)


def test_the_scores_follow_method_and_size(drawn, metrics):
    lines = report(drawn).strip().splitlines()
    assert lines[:2] == ["3-fold speaker-independent cross-validation", "112 utterances, 8 speakers, 8 classes"]
    low, high = (f"{value:.4f}" for value in drawn["ua_ci95"])
    assert lines[4].split() == f"UA (mean recall) {drawn['ua']:.4f} {low} to {high} 0.1250 0.1250".split()
    assert [line.split()[:2] for line in lines[5:7]] == [["WA", "(accuracy)"], ["macro", "F1"]]
    metrics |= {"fold_scheme": "leave-one-speaker-out", "n_speakers": 1}
    assert report(metrics).strip().splitlines()[:2] == [
        "3-fold speaker-independent cross-validation (leave-one-speaker-out)",
        "112 utterances, 1 speaker, 8 classes",
    ]


@pytest.mark.parametrize(("adapted", "number"), [("all", "all"), ("8", "up to 8")])
def test_scores_with_adaptation_are_named_so_wherever_they_stand(metrics, terminal, adapted, number):
    """In the first line, above both tables, and in the sentence to copy."""
    plain, metrics = report(metrics), metrics | {"adapted": adapted}
    found, method = report(metrics), f"ADAPTED to each speaker by {number} other, unlabelled utterances"
    assert found.strip().splitlines()[0] == f"3-fold speaker-independent cross-validation, {method}"
    heads = [line.split()[:2] for line in found.splitlines() if line.split()[1:3] == ["score", "95"]]
    assert heads == [["adapted", "score"]]
    assert "confusion matrix (rows: true label, columns: prediction), adapted" in found
    assert train.citation(metrics).startswith(f"3-fold speaker-independent cross-validation, {method}, 112 utterances")
    many = with_classes(metrics, [f"a-rather-long-emotion-{number}" for number in range(60)])
    assert "the confusion matrix is in the report, adapted" in terminal(many)
    shown = page_text(metrics)
    assert shown.count(method) >= 2
    assert "Confusion matrix, adapted" in shown
    assert "adapted" not in plain.lower()


def test_the_page_has_the_weight_of_each_layer(metrics):
    assert "Weight of the encoder's layers" not in page_text(metrics)
    rows = [{"layer": n, "hidden": 0.1 * n, "low": 0.05 * n, "high": 0.2 * n, "linear": 0.3 * n} for n in (0, 1, 2)]
    shown = page_text(metrics | {"layers": rows})
    assert "Weight of the encoder's layers" in shown
    assert "220.010.0 to 40.060.0" in shown


def matrix_rows(text):
    lines = without_colour(text).splitlines()
    start = next(number for number, line in enumerate(lines) if "confusion" in line)
    return lines[start], [line.split() for line in lines[start + 1 : lines.index("", start)]]


def test_the_confusion_matrix_has_true_labels_as_rows_and_the_scores_of_each_class_beside_it(drawn):
    title, (heads, *rows) = matrix_rows(report(drawn))
    assert title == "confusion matrix (rows: true label, columns: prediction)"
    assert heads[-3:] == ["recall", "prec.", "F1"]
    for cells, name, counts in zip(rows, drawn["classes"], drawn["confusion"], strict=True):
        scores = [f"{drawn[score][name]:.3f}" for score in ("recall", "precision", "f1")]
        assert cells == [name, *map(str, counts), *scores]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize(
    "change",
    [dict, many_of_everything, little_of_everything, lambda metrics: with_classes(metrics, metrics["classes"], 10**6)],
)
def test_the_scores_fit_the_terminal_and_have_no_trailing_blanks(metrics, terminal, width, change):
    lines = without_colour(terminal(change(metrics), width)).splitlines()
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if line != line.rstrip()]
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    assert lines[-1] == "report    run/report.html"


def test_the_scores_of_eight_classes_fit_one_screen(drawn, terminal):
    assert len(terminal(drawn, 60).splitlines()) <= 24


def test_columns_of_the_matrix_are_as_wide_as_the_terminal_allows(drawn, terminal):
    heads = {width: matrix_rows(terminal(drawn, width))[1][0][:8] for width in (60, 120)}
    assert heads[60] == [name[:3] for name in drawn["classes"]]
    assert heads[120] == drawn["classes"]


def test_counts_that_are_too_long_become_per_cent_of_the_row(metrics, terminal):
    title, (_, first, *_) = matrix_rows(terminal(with_classes(metrics, metrics["classes"], 9997), 60))
    assert title == "confusion, per cent (rows: true label, columns: prediction)"
    assert first[1:4] == ["100", "0", "0"]


def test_a_matrix_that_does_not_fit_leaves_the_scores_of_each_class(metrics, terminal):
    names = [f"class{number}" for number in range(60)]
    title, (_, *rows) = matrix_rows(terminal(with_classes(metrics, names), 80))
    assert title == "scores by class; the confusion matrix is in the report"
    assert [row[0] for row in rows] == names
    assert {len(row) for row in rows} == {4}


def test_names_that_begin_alike_are_numbered(metrics, terminal):
    names = [f"class-of-emotion-{number}" for number in range(8)]
    _, (heads, *rows) = matrix_rows(terminal(with_classes(metrics, names), 60))
    assert heads[:8] == [row[0] for row in rows] == list("12345678")


def test_the_log_has_room_for_the_counts_of_twenty_classes(metrics):
    _, (_, *rows) = matrix_rows(report(with_classes(metrics, [f"class{number}" for number in range(20)])))
    assert rows[0][:4] == ["1", "class0", "40", "3"]


def test_notes_and_files_left_out_follow_the_scores(drawn, metrics):
    assert "left out  1 file, listed in skipped.csv\nreport" in report(drawn)
    shown = report(metrics | {"left_out": {}, "notes": ["look here"]})
    assert "note      look here\nreport" in shown
    assert "left out" not in shown


def test_the_path_of_the_page_is_never_wrapped(drawn, terminal):
    path = "/".join(["folder"] * 30)
    assert report(drawn, path).splitlines()[-1] == f"report    {path}"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_without_other_characters_gets_ascii(drawn, encoding):
    assert train.report_text(drawn, Path("run"), io.TextIOWrapper(io.BytesIO(), encoding=encoding)).isascii()


@pytest.mark.parametrize(
    ("environment", "colour"),
    [
        ({"COLORTERM": "truecolor"}, "48;2;"),
        ({"TERM": "xterm-256color"}, "48;5;"),
        ({"TERM": "xterm-16color"}, "30;106"),
        ({"NO_COLOR": "1"}, None),
        ({"TERM": "dumb"}, None),
    ],
)
def test_colour_is_for_terminals_that_support_it(drawn, terminal, monkeypatch, environment, colour):
    shown = terminal(drawn, 80, **environment)
    assert ("\x1b[" in shown) == (environment != {"TERM": "dumb"})
    assert (colour in shown) if colour else not re.search(r"\x1b\[[0-9;]*[34][0-9]", shown)
    monkeypatch.setenv("FORCE_COLOR", "1")  # is for the terminal, not for train.log
    assert without_colour(shown) == report(drawn)


@pytest.mark.parametrize("share", np.linspace(0.01, 1, 34))
def test_the_numbers_of_the_heat_map_can_be_read(share):
    """WCAG 2.1 demands a contrast of 4.5 to 1."""
    ink, _, paper = train.cell_style(share).split()
    assert ink == "#000000"
    assert contrast((0, 0, 0), [int(value) for value in re.findall(r"\d+", paper)]) >= 4.5


def contrast(one, other):
    """Of two colours of three channels from 0 to 255, by WCAG 2.1."""

    def luminance(channels):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(channels) / 255]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_cells_without_utterances_have_no_colour():
    assert train.cell_style(0.0) == ""
    assert len({train.cell_style(share) for share in (0.01, 0.1, 1.0)}) == 3


# --- the bar ---


@pytest.fixture
def screen(monkeypatch):
    """A function that makes standard error a terminal, with nothing but the log of the program on it.

    Called in the test itself, because pytest replaces standard error and the handlers of the log before it.
    """
    for name in ("NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(train.log, "level", logging.INFO)

    def start():
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        return sys.stderr

    return start


def test_the_bar_has_stages_and_progress_and_stays_below_the_lines(screen):
    shown = screen()
    with train.live_log() as live:
        train.log.debug("compiling")
        live.refresh()
        train.log.info("a finding")
        train.log.info("epoch 4/8", extra={"share": 0.5})
        live.refresh()
    shown = shown.getvalue()
    assert re.search("compiling.*a finding.*epoch 4/8", shown, re.DOTALL)
    assert shown.count("a finding") == 1
    assert logging.getLogger().handlers == []
    assert train.log.level == logging.INFO


def test_a_killed_process_leaves_the_cursor_visible_on_an_empty_line(screen):
    shown = screen()
    with train.live_log() as live:
        train.log.debug("compiling")
        live.refresh()
        assert "compiling" in shown.getvalue()
        assert shown.getvalue().endswith("\n")
    assert "\x1b[?25l" not in shown.getvalue()


def test_the_bar_is_gone_after_an_error(screen):
    shown = screen()
    with pytest.raises(ValueError, match="fault"), train.live_log():
        raise ValueError("fault")
    assert logging.getLogger().handlers == []
    assert shown.getvalue().endswith("\x1b[1A\x1b[2K")


def test_a_terminal_that_is_gone_does_not_end_the_run(screen, monkeypatch):
    """After the end of an ssh connection every write fails, and a run in the background goes on."""
    shown = screen()

    def gone(text):
        raise OSError(errno.EIO, "Input/output error")

    with train.live_log():
        train.log.info("a finding")
        monkeypatch.setattr(shown, "write", gone)
        train.log.info("epoch 4/8")
    assert shown.getvalue().count("a finding") == 1


@pytest.mark.parametrize("reason", ["a file", "a dumb terminal"])
def test_a_log_that_is_not_on_a_terminal_has_plain_lines_and_no_stages(screen, monkeypatch, reason):
    shown = screen()
    if reason == "a file":
        monkeypatch.setattr(shown, "isatty", lambda: False)
    else:
        monkeypatch.setenv("TERM", "dumb")
    logging.getLogger().handlers = [logging.StreamHandler(shown)]
    with train.live_log():
        train.log.debug("compiling")
        train.log.info("epoch 4/8", extra={"share": 0.5})
    assert shown.getvalue() == "epoch 4/8\n"


def test_the_files_read_so_far_move_the_bar(screen):
    progress, shown = train.log_scan_progress(), screen()
    with train.live_log() as live:
        progress(1, 4)
        live.refresh()
    assert "read 1 files" in shown.getvalue()


# --- the page ---


class Page(html.parser.HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], set(), ""
        self.feed(page.decode())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, text):
        self.text += text

    handle_startendtag = handle_starttag


def page_text(metrics):
    return " ".join(Page(train.report_html(metrics)).text.split())


def test_the_page_has_everything(drawn):
    shown = page_text(drawn)
    low, high = (f"{100 * value:.1f}" for value in drawn["ua_ci95"])
    mistake = drawn["confident_mistakes"][0]
    for expected in (
        f"95 % interval {low} to {high} %chance 12.5 %",
        f"UA (mean recall) {100 * drawn['ua']:.1f} % (95 % CI {low} to {high})",
        *drawn["speakers"],
        *(f"fold {fold['fold']}" for fold in drawn["folds"]),
        *(f"{field} {name}" for field, groups in drawn["groups"].items() for name in groups),
        f"expected calibration error {100 * drawn['ece']:.1f} %, {100 * drawn['ece_uncalibrated']:.1f} % before",
        mistake["file"],
        "03-01-05-01-02-01-12.npz: has no bytes",
        "mostly acted",
        drawn["versions"]["jax"],
        f"seeds{FAST[3]}",
    ):
        assert expected in shown


def test_a_single_test_set_is_not_called_cross_validation(metrics):
    single = metrics | {"folds": metrics["folds"][:1], "fold_scheme": "table"}
    assert train.report_heading(single)[0] == "one test set, speaker-independent (table)"


def test_a_split_that_is_not_by_speaker_is_reported_on_the_page_before_any_score(drawn, metrics):
    assert "NOT speaker-independent" not in page_text(drawn)
    assert "unseen speakers" in page_text(drawn)
    shown = page_text(little_of_everything(metrics))
    assert shown.index("the scores are optimistic") < shown.index("macro F1")
    assert "unseen speakers" not in shown


def test_every_chart_has_a_title_and_a_sentence(drawn):
    page = train.report_html(drawn).decode()
    charts = re.findall("<svg[^>]* role=img><title>[^<]+</title><desc>[^<]+</desc>", page)
    assert len(charts) == page.count("<svg") == 6


@pytest.mark.parametrize("change", [many_of_everything, little_of_everything])
def test_a_page_of_extremes_has_only_numbers_in_its_charts(metrics, change):
    page = train.report_html(change(metrics)).decode()
    assert not re.search(r"\b(nan|inf|None)\b", page)


def test_the_page_has_no_script_no_address_and_no_folder_of_the_machine(drawn, metrics):
    content = train.report_html(drawn)
    assert not {"script", "link", "img", "iframe", "object"} & set(Page(content).tags)
    assert not re.search(rb"https?:|url\(|@import|\son\w+=", content)
    settings = {"out": "/home", "directory": "/home/me/set 1", "labels": "/home/me/Ann's.csv"}
    metrics["settings"] |= settings
    metrics["command"] = shlex.join(["python", "train.py", f"--labels={settings['labels']}", settings["directory"]])
    metrics["left_out_first"]["empty"]["reason"] = "has no line in /home/me/Ann's.csv"
    metrics["confident_mistakes"][0]["file"] = "set/home_1.npz"  # the folder /home is only a part of its name
    shown = page_text(metrics)
    assert "set/home_1.npz" in shown
    assert "/home" not in shown.replace("set/home_1.npz", "")
    assert shlex.join(["python", "train.py", "--labels=Ann's.csv", "set 1"]) in shown
    assert "has no line in Ann's.csv" in shown


# --- hostile names ---

HOSTILE = (
    "<script>alert(1)</script>",
    "[red]x[/]",
    "&amp;",
    ":bomb:",
    "{code}{{",
    "%(ua)s $title",
    "' onload='x",
    "a\n\nUA (mean recall)  1.0000\n",
    "\x1b[2J\r\t",
    "\udcff",
    "\u202e",
    "x" * 300,
    "</pre><b>",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_forges_a_line_markup_or_a_tag(drawn, metrics, name):
    plain = Page(train.report_html(with_classes(metrics, ["x", "calm"])))
    metrics = with_classes(metrics, [name, "calm"])
    metrics["speakers"] = {name: metrics["speakers"]["ravdess:01"]}
    metrics["groups"]["corpus"] = {name: metrics["groups"]["corpus"]["ravdess"]}
    metrics["confident_mistakes"] = [{"file": name, "label": name, "predicted": name, "confidence": 0.9}]
    metrics["left_out_first"] = {"empty": {"file": name, "reason": name}}
    metrics |= {"notes": [name], "command": name, "settings": {"labels": name}, "device": name, "fold_scheme": name}
    shown = report(metrics, name)
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert len(re.findall("^UA", shown, re.MULTILINE)) == 1
    page = Page(train.report_html(metrics))
    assert set(page.tags) <= set(plain.tags)
    assert page.attributes <= plain.attributes
    assert page.text.count(check_data.printable(name)) >= 8


# --- the page in a browser ---


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("change", [dict, many_of_everything, little_of_everything])
def test_a_browser_draws_the_page_at_every_width_without_overflow_or_error(metrics, tmp_path, change):
    """The page in frames of three widths, measured by a script of the test."""
    (tmp_path / "report.html").write_bytes(train.report_html(change(metrics)))
    frames = "".join(f"<iframe src=report.html width={width} height=900></iframe>" for width in (360, 800, 1600))
    measure = (
        "onload = () => document.title = JSON.stringify([...document.querySelectorAll('iframe')].map(frame => {"
        " const page = frame.contentDocument; return [frame.clientWidth, page.documentElement.scrollWidth,"
        " page.querySelectorAll('svg').length, page.querySelectorAll('.heat td').length] }))"
    )
    (tmp_path / "test.html").write_text(
        f"<title></title><style>iframe {{ border: 0 }}</style>{frames}<script>{measure}</script>"
    )
    shown = chromium("--dump-dom", "--allow-file-access-from-files", tmp_path / "test.html")
    rows = json.loads(re.search("<title>(.*?)</title>", shown.stdout)[1])
    assert [width for width, *_ in rows] == [360, 800, 1600]
    assert all(needed <= width for width, needed, *_ in rows)
    assert all(charts >= 1 and cells >= 4 for *_, charts, cells in rows)
    assert "CONSOLE" not in shown.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screenshot_of_the_page_is_not_blank(drawn, tmp_path, scheme):
    (tmp_path / "report.html").write_bytes(train.report_html(drawn))
    picture = tmp_path / "picture.png"
    scheme = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    chromium(f"--screenshot={picture}", "--window-size=800,900", scheme, tmp_path / "report.html")
    assert picture.stat().st_size > 20_000  # an empty one is compressed to about 3,000 bytes


def chromium(*arguments):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

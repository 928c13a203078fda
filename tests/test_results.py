"""Several runs: their comparison."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import emotions
import stats
import train

CODES = {"happy": "03", "sad": "04", "angry": "05"}
SPEAKERS = range(1, 9)


def utterances_of(classes=tuple(CODES), speakers=SPEAKERS, prefix="03-01"):
    """Twelve or fewer utterances of each speaker, as RAVDESS names them."""
    names = [
        f"{prefix}-{CODES[name]}-01-{sentence}-{take}-{speaker:02d}.npz"
        for speaker in speakers
        for name in classes
        for sentence in ("01", "02")
        for take in ("01", "02")
    ]
    return emotions.parse_names(sorted(names), "ravdess")


def write_results(folder, skill=1.0, seed=0, utterances=None, classes=tuple(CODES), **changed):
    """A finished run whose answers are right more often, the larger `skill`; `changed` are entries of metrics.json."""
    utterances = utterances or utterances_of()
    logits = np.random.default_rng(seed).normal(size=(len(utterances), len(classes)))
    for row, utterance in zip(logits, utterances):
        if utterance.emotion in classes:
            row[classes.index(utterance.emotion)] += skill
    fold = np.array([int(utterance.speaker[-2:]) % 4 for utterance in utterances])
    answers = train.Answers(logits, np.full(len(logits), 2.0), np.zeros((len(logits), 2)))
    speaker = np.array([utterance.speaker for utterance in utterances])
    predictions = train.Predictions(utterances, classes, answers, fold, speaker)
    metrics = train.evaluate(predictions, "4", True, "of the training speakers", []) | changed
    folder.mkdir()
    files = train.prediction_files(predictions, {"model": f"{folder.name}'s", "statistics": "s"})
    stats.write_files(folder, files | {"metrics.json": stats.json_bytes(metrics)})
    return folder


def change_arrays(run, **changed):
    with np.load(run / "fusion.npz") as file:
        arrays = dict(file) | changed
    np.savez(run / "fusion.npz", **{name: array for name, array in arrays.items() if array is not None})


def compare(capsys, *runs, form="json"):
    """What --compare prints, as an object where it is JSON."""
    assert train.main(["--compare", *map(str, runs), "--format", form]) == 0
    printed = capsys.readouterr().out
    return json.loads(printed) if form == "json" else printed


@pytest.fixture
def two(tmp_path):
    """A good and a poor run on the same utterances with the same folds."""
    return write_results(tmp_path / "good", skill=2.5), write_results(tmp_path / "poor", skill=1.0, seed=1)


# --- scores and differences ---


def test_scores_are_those_of_the_metrics(two, capsys):
    found = compare(capsys, *two)
    for run, row in zip(two, found["runs"], strict=True):
        metrics = json.loads((run / "metrics.json").read_text())
        assert row["run"] == str(run)
        assert row["n_folds"] == len(metrics["folds"]) == 4
        for name in ("ua", "wa_ci95", "macro_f1", "ece", "n_utterances", "n_speakers", "fold_scheme"):
            assert row[name] == metrics[name]
    assert found["notes"] == []


def test_differences_are_paired_by_speaker(two, capsys):
    (found,) = compare(capsys, *two)["differences"]
    counts = []
    for run in two:
        with np.load(run / "fusion.npz") as file:
            predicted, label, speaker = file["probability"].argmax(1), file["label"], file["speaker"].tolist()
        counts.append(stats.group_counts(speaker, label, predicted, 3)[1])
    expected = stats.paired_differences(*counts)
    for name, difference in expected.items():
        assert list(found[name].values()) == pytest.approx(list(difference))
    assert found["ua"]["high"] < 0
    assert found["ua"]["p"] < 0.05
    assert (found["n_utterances"], found["n_speakers"]) == (96, 8)


def test_a_run_does_not_differ_from_itself(two, capsys):
    found = compare(capsys, two[0], two[0], two[1])
    assert found["differences"][0]["ua"] == {"difference": 0, "low": 0, "high": 0, "p": 1}
    assert [row["run"] for row in found["differences"]] == [str(run) for run in two]


def test_utterances_meet_whatever_their_files_are_called(tmp_path, two, capsys):
    """The names of a video, in another order, and classes with other names in another order."""
    names = ("sad", "angry", "happy")
    video = utterances_of(prefix="02-01")[::-1]
    face = write_results(tmp_path / "face", skill=50, utterances=video, classes=names)
    change_arrays(face, classes=np.array(["sadness", "Anger", "joy"]))
    voice = write_results(tmp_path / "voice", skill=50)
    (found,) = compare(capsys, voice, face)["differences"]
    assert (found["n_utterances"], found["ua"]["p"]) == (96, 1)


def test_several_files_of_an_utterance_count_once(tmp_path, two, capsys):
    twins = utterances_of() + utterances_of(prefix="01-01")
    both = write_results(tmp_path / "both", utterances=twins)
    found = compare(capsys, two[0], both)
    assert found["differences"][0]["n_utterances"] == 96
    aligned = train.align([train.load_results(both)])
    np.testing.assert_allclose(aligned.probability.sum(-1), 1)


def test_utterances_of_unknown_speakers_count_as_their_own(tmp_path, two, capsys):
    unknown = [dataclasses.replace(utterance, speaker="") for utterance in utterances_of()]
    change_arrays(two[0], speaker=np.array([utterance.speaker for utterance in unknown]))
    change_arrays(two[1], speaker=np.array([utterance.speaker for utterance in unknown]))
    (found,) = compare(capsys, *two)["differences"]
    assert found["n_speakers"] == 96


# --- what else differs ---


def test_folds_that_are_numbered_otherwise_do_not_differ(two, capsys):
    with np.load(two[1] / "fusion.npz") as file:
        fold = file["fold"]
    change_arrays(two[1], fold=(5 - fold).astype(np.int32))
    assert compare(capsys, *two)["notes"] == []


def test_whatever_else_differs_is_named_in_capitals(tmp_path, two, capsys):
    poor, change = two[1], {"fold_scheme": "leave-one-speaker-out", "adapted": 8, "speaker_independent": False}
    other = write_results(
        tmp_path / "other", utterances=utterances_of(("happy", "sad")), classes=("happy", "sad"), **change
    )
    with np.load(other / "fusion.npz") as file:
        label, speaker = file["label"], file["speaker"]
    change_arrays(other, label=np.where(np.arange(64) < 3, 1 - label, label), fold=(label + 1).astype(np.int32))
    assert len(speaker) == 64
    assert compare(capsys, poor, other)["notes"] == [
        f"CLASSES DIFFER: {poor} has happy sad angry; {other} has happy sad",
        f"UTTERANCES DIFFER: {poor} has 96, 64 of them in both; {other} has 64, 64 of them in both",
        f"LABELS DIFFER: 3 utterances of {poor} have other labels in {other}",
        f"FOLDS DIFFER: {poor} has 4 (4); {other} has 4 (leave-one-speaker-out)",
        f"INDEPENDENCE DIFFERS: {poor} has unseen speakers; {other} has possibly seen speakers",
        f'ADAPTATION DIFFERS: {poor} has "none"; {other} has 8',
    ]


def test_runs_without_a_common_utterance_have_no_difference(tmp_path, two, capsys):
    other = write_results(tmp_path / "other", utterances=utterances_of(speakers=range(9, 13)))
    found = compare(capsys, two[0], other)
    assert found["differences"][0]["ua"] == {"difference": None, "low": -1, "high": 1, "p": 1}
    assert found["notes"] == [
        f"UTTERANCES DIFFER: {two[0]} has 96, 0 of them in both; {other} has 48, 0 of them in both"
    ]
    assert re.search(
        r"^\S+other +- +- +- +- +- +- +0 +0$", compare(capsys, two[0], other, form="terminal"), re.MULTILINE
    )


# --- formats ---


def test_the_terminal_shows_aligned_tables(two, capsys):
    scores, title, differences, explanation = compare(capsys, *two, form="terminal").split("\n\n")
    head, good, _ = scores.splitlines()
    metrics = json.loads((two[0] / "metrics.json").read_text())
    low, high = (100 * value for value in metrics["ua_ci95"])
    assert f"{100 * metrics['ua']:.1f} ({low:.1f} to {high:.1f})" in good
    assert head.index("WA, %") == good.index(f"{100 * metrics['wa']:.1f} (", head.index("UA, %") + 5)
    assert title == f"Differences from {two[0]} on the utterances of both, in points:"
    assert len(differences.splitlines()) == 2
    assert "jackknife" in explanation


NAMES = {
    "a|b*c_d": (r"a\|b\*c\_d", r"a\textbar{}b*c\_d"),
    "50%&#$~^{}": (r"50%\&\#\$\~^{}", r"50\%\&\#\$\textasciitilde{}\textasciicircum{}\{\}"),
    "line\nbreak": (r"line\\nbreak", r"line\textbackslash{}nbreak"),
    "<b>\x1b[2J": (r"\<b\>\\x1b\[2J", r"\textless{}b\textgreater{}\textbackslash{}x1b[2J"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_escaped_in_every_format(tmp_path, monkeypatch, capsys, two, name):
    monkeypatch.chdir(tmp_path)
    two[0].rename(tmp_path / name)
    markdown, latex = NAMES[name]
    printed = compare(capsys, name, "poor", form="markdown")
    assert f"| {markdown} | " in printed
    assert {line.replace(r"\|", "").count("|") for line in printed.splitlines()[:4]} == {9}
    printed = compare(capsys, name, "poor", form="latex")
    assert f"\n{latex} & " in printed
    assert printed.count(r"\begin{tabular}") == printed.count(r"\end{tabular}") == 2
    rows = [line for line in printed.splitlines() if line.endswith(r" \\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [7, 7, 7, 8, 8]
    assert compare(capsys, name, "poor")["first"] == name
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", compare(capsys, name, "poor", form="terminal"))


# --- refusals ---


def refusal(caplog, *arguments):
    """The one line with which a command is refused."""
    caplog.clear()
    assert train.main([str(argument) for argument in arguments]) == 2
    (line,) = caplog.messages
    assert line.isprintable()
    return line.removeprefix("train.py: ")


def test_comparing_takes_two_folders_and_no_dir(two, caplog):
    assert refusal(caplog, "--compare", two[0]) == "--compare must be followed by two or more results folders"
    assert "takes results folders, and no DIR (data)" in refusal(caplog, "data", "--compare", *two)
    assert refusal(caplog) == "DIR is missing: the folder with the features; see --help"
    assert refusal(caplog, "--compare", *two, "--format", "tex").startswith("--format must be one of")


def damaged(**changed):
    """Change metrics.json; a value of None removes the key."""

    def damage(run):
        metrics = json.loads((run / "metrics.json").read_text()) | changed
        metrics = {name: value for name, value in metrics.items() if value is not ...}
        (run / "metrics.json").write_text(json.dumps(metrics))

    return damage


def other_arrays(**changed):
    return lambda run: change_arrays(run, **changed)


@pytest.mark.parametrize(
    "damage",
    [
        damaged(ua="high"),
        damaged(ua_ci95=[0.5]),
        damaged(ua_ci95=None),
        damaged(folds=4),
        damaged(n_utterances=[]),
        damaged(fold_scheme=...),
        lambda run: (run / "metrics.json").write_text("[" * 100_000),
        lambda run: (run / "metrics.json").write_text('"ua"'),
        lambda run: (run / "metrics.json").write_bytes(b"\xff"),
        lambda run: (run / "metrics.json").unlink(),
        lambda run: (run / "fusion.npz").unlink(),
        lambda run: (run / "fusion.npz").write_bytes(b"PK"),
        other_arrays(utterance=None),
        other_arrays(logits=np.zeros((96, 3))[:-1]),
        other_arrays(logits=np.full((96, 3), np.nan)),
        other_arrays(logits=np.zeros((96, 2))),
        other_arrays(temperature=np.zeros(96)),
        other_arrays(label=np.full(96, 3, np.int32)),
        other_arrays(label=np.full(96, -9, np.int32)),
        other_arrays(label=np.zeros(96)),
        other_arrays(fold=np.zeros((96, 1), np.int32)),
        other_arrays(classes=np.array([1, 2, 3])),
        other_arrays(speaker=np.array([b"s"] * 96)),
        other_arrays(speaker=np.full((96, 1), 0x7FFFFFFF, np.int32).view("<U1")[:, 0]),
        other_arrays(speaker=np.zeros(96, object)),
    ],
)
def test_a_damaged_or_foreign_run_is_refused_in_one_line(two, caplog, damage):
    damage(two[1])
    line = refusal(caplog, "--compare", *two)
    assert line.startswith(str(two[1]))
    assert "damaged" in line or "holds no results of a finished run" in line


def test_an_unfinished_run_is_refused(two, caplog):
    (two[1] / "checkpoint-0.npz").write_bytes(b"")
    assert "holds an unfinished run; finish it" in refusal(caplog, "--compare", *two)


def test_options_without_effect_are_noted(two, caplog):
    assert train.main(["--compare", *map(str, two), "--epochs", "3"]) == 0
    assert "note: no effect with --compare: --epochs" in caplog.messages


def test_comparing_needs_no_jax(two):
    code = "import sys; sys.modules['jax'] = None; import train; sys.exit(train.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "--compare", *two], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

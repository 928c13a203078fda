"""Several runs: their comparison and their fusion."""

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
    """Twelve or fewer utterances of each speaker, as RAVDESS names them, in the order of a fusion."""
    names = [
        f"{prefix}-{CODES[name]}-01-{sentence}-{take}-{speaker:02d}.npz"
        for speaker in speakers
        for name in classes
        for sentence in ("01", "02")
        for take in ("01", "02")
    ]
    return sorted(emotions.parse_names(names, "ravdess"), key=lambda utterance: utterance.canonical)


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
    model = f"SHA-256 of {folder.name}"
    config = {
        "format": train.ARTIFACT_VERSION,
        "model": model,
        "speakers": sorted({*speaker.tolist()}),
        "corpora": ["ravdess"],
    }
    files = train.prediction_files(predictions, {"model": model, "statistics": "s"})
    files |= {"metrics.json": stats.json_bytes(metrics), "config.json": stats.json_bytes(config)}
    stats.write_files(folder, files)
    return folder


def write_predictions(folder, run, utterances, **options):
    """What --predict writes for these utterances with the model of a run."""
    write_results(folder, utterances=utterances, **options)
    with np.load(run / "fusion.npz") as file:
        change_arrays(folder, model=file["model"], fold=np.zeros(len(utterances), np.int32))
    for name in ("metrics.json", "config.json"):
        (folder / name).unlink()
    return folder


def change_arrays(run, **changed):
    with np.load(run / "fusion.npz") as file:
        arrays = dict(file) | changed
    np.savez(run / "fusion.npz", **{name: array for name, array in arrays.items() if array is not None})


def compare(capsys, *runs, form="json"):
    """What --compare prints, as an object where it is JSON."""
    assert train.main(["--compare", *map(str, runs), *(["--format", form] if form else [])]) == 0
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


def test_intervals_over_few_speakers_are_noted(tmp_path, capsys):
    few = utterances_of(speakers=range(1, 6))
    runs = [write_results(tmp_path / f"{seed}", seed=seed, utterances=few) for seed in (1, 2)]
    assert compare(capsys, *runs)["notes"] == ["with fewer than 6 speakers the intervals are unreliable"]


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
    assert found["n_speakers"] == 0
    assert 0 < found["ua"]["high"] - found["ua"]["low"] < 0.4


# --- what else differs ---


def test_folds_that_are_numbered_otherwise_do_not_differ(two, capsys):
    with np.load(two[1] / "fusion.npz") as file:
        fold = file["fold"]
    change_arrays(two[1], fold=(5 - fold).astype(np.int32))
    assert compare(capsys, *two)["notes"] == []


@pytest.mark.parametrize("behind", [True, False])
def test_a_copy_never_stands_for_its_original(behind, tmp_path, two):
    """Both have one name, whatever their order; row and label are those of the original."""
    run = train.load_results(two[0])
    rows = len(run.arrays["id"])
    order = np.arange(2 * rows) % rows
    is_copy = (np.arange(2 * rows) >= rows) == behind
    arrays = {name: array[order] if array.shape[:1] == (rows,) else array for name, array in run.arrays.items()}
    arrays |= {"version": np.where(is_copy, "copy", ""), "label": np.where(is_copy, -1, arrays["label"])}
    aligned = train.align([run, run._replace(arrays=arrays)])
    np.testing.assert_array_equal(aligned.label[1], aligned.label[0])
    assert not is_copy[aligned.row[1]].any()


def test_whatever_else_differs_is_named_in_capitals(tmp_path, two, capsys):
    poor, change = two[1], {"fold_scheme": "leave-one-speaker-out", "adapted": "8", "speaker_independent": False}
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
        f"LABELS DIFFER: 3 utterances of {poor} are labelled differently in {other}",
        f"FOLDS DIFFER: {poor} has 4 (4); {other} has 4 (leave-one-speaker-out)",
        f"INDEPENDENCE DIFFERS: {poor} has unseen speakers; {other} has possibly seen speakers",
        f"ADAPTATION DIFFERS: {poor} has none; {other} has 8",
    ]


def test_runs_without_a_common_utterance_have_no_difference(tmp_path, two, capsys):
    other = write_results(tmp_path / "other", utterances=utterances_of(speakers=range(9, 13)))
    found = compare(capsys, two[0], other)
    assert found["differences"][0]["ua"] == {"difference": None, "low": -1, "high": 1, "p": 1}
    assert found["notes"] == [
        f"UTTERANCES DIFFER: {two[0]} has 96, 0 of them in both; {other} has 48, 0 of them in both"
    ]
    assert re.search(r"^\S+other +- +- +- +- +- +- +0 +0$", compare(capsys, two[0], other, form=None), re.MULTILINE)


# --- formats ---


def test_the_terminal_shows_aligned_tables(tmp_path, two, capsys):
    close = write_results(tmp_path / "close", skill=2.3, seed=2)
    scores, title, differences, explanation = compare(capsys, *two, close, form=None).split("\n\n")
    head, good, *_ = scores.splitlines()
    metrics = metrics_of(two[0])
    low, high = (100 * value for value in metrics["ua_ci95"])
    assert f"{100 * metrics['ua']:.1f} ({low:.1f} to {high:.1f})" in good
    assert head.index("WA, %") == good.index(f"{100 * metrics['wa']:.1f} (", head.index("UA, %") + 5)
    assert title == f"Differences from {two[0]} on the utterances of both, in points:"
    _, *rows = differences.splitlines()
    for row, found, p in zip(rows, compare(capsys, *two, close)["differences"], ("< 0.001", None), strict=True):
        difference, low, high, exact = found["ua"].values()
        points = f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        assert re.split("  +", row)[1:3] == [points, p or f"{exact:.3f}"]
    assert "jackknife" in explanation


NAMES = {
    "a|b*c_d": (r"a\|b\*c\_d", r"a\textbar{}b{*}c\_d"),
    "50%&#$~^{}": (r"50%\&\#\$\~^{}", r"50\%\&\#\$\textasciitilde{}\textasciicircum{}\{\}"),
    "line\nbreak": (r"line\\nbreak", r"line\textbackslash{}nbreak"),
    "<b>\x1b[2J": (r"\<b\>\\x1b\[2J", r"\textless{}b\textgreater{}\textbackslash{}x1b{[}2J"),
    "[*]": (r"\[\*\]", "{[}{*}]"),
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
    assert re.findall(r"{(l?r*)}$", printed, re.MULTILINE) == ["l" + 7 * "r", "l" + 8 * "r"]
    rows = [line for line in printed.splitlines() if line.endswith(r" \\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [7, 7, 7, 8, 8]
    assert compare(capsys, name, "poor")["first"] == name
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", compare(capsys, name, "poor", form=None))


# --- refusals ---


def refusal(caplog, *arguments):
    """The one line with which a command is refused."""
    caplog.clear()
    assert train.main([str(argument) for argument in arguments]) == 2
    (line,) = caplog.messages
    assert line.isprintable()
    return line.removeprefix("train.py: ")


def test_comparing_takes_two_folders_and_no_dir(two, caplog):
    assert refusal(caplog, "--compare", two[0]) == "--compare must be followed by two or more folders"
    assert refusal(caplog, "data", "--compare", *two) == "use only one of DIR and --compare (data)"
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
    assert "damaged" in line or "holds no metrics.json and fusion.npz of a finished run" in line


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


# --- fusion ---


def fuse(capsys, *folders, out, **options):
    """What --fuse prints."""
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert train.main(["--fuse", *map(str, folders), "--out", str(out), *flags]) == 0
    return capsys.readouterr().out


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


def arrays_of(run):
    with np.load(run / "fusion.npz") as file:
        return dict(file)


@pytest.fixture
def fused(tmp_path, two, capsys):
    """A fusion of two runs that are about equally good."""
    other = write_results(tmp_path / "other", skill=2.2, seed=2)
    fuse(capsys, two[0], other, out=tmp_path / "fused")
    return tmp_path / "fused"


def test_a_fusion_has_what_a_run_has(fused, two, capsys):
    files = {"confusion.csv", "config.json", "fusion.npz", "lock", "metrics.json", "predictions.csv", "report.html"}
    assert {path.name for path in fused.iterdir()} == files
    metrics, arrays = metrics_of(fused), arrays_of(fused)
    assert arrays.keys() == arrays_of(two[0]).keys()
    for name, array in arrays_of(two[0]).items():
        if name in (
            "id",
            "utterance",
            "classes",
            "label",
            "speaker",
            "fold",
            "corpus",
            "gender",
            "intensity",
            "version",
        ):
            np.testing.assert_array_equal(arrays[name], array)
    assert (
        metrics.keys() - {"adapted", "fused", "weights", "model", "settings", "command", "version", "versions"}
        == metrics_of(two[0]).keys()
    )
    assert metrics["groups"]["gender"]["male"]["n"] == 48
    assert metrics["ua"] > max(metrics_of(run)["ua"] for run in two)
    assert len(compare(capsys, two[0], fused)["runs"]) == 2


def test_the_report_of_a_fusion_names_runs_and_weights_but_no_folders(fused, capsys):
    page = (fused / "report.html").read_text()
    assert "fusion of 2 runs" in page
    assert re.search(r"weights for new files: good 0\.\d\d, other 0\.\d\d; those of each fold", page)
    assert str(fused.parent) not in page


def test_the_weights_of_a_fold_do_not_depend_on_its_answers(tmp_path, two, capsys):
    other = write_results(tmp_path / "other", skill=2.2, seed=2)
    fuse(capsys, two[0], other, out=tmp_path / "before")
    arrays = arrays_of(other)
    arrays["logits"][arrays["fold"] == 2] *= -9
    change_arrays(other, logits=arrays["logits"])
    fuse(capsys, two[0], other, out=tmp_path / "after")
    before, after = (metrics_of(tmp_path / name)["folds"] for name in ("before", "after"))
    same = [one["weights"] == other["weights"] for one, other in zip(before, after)]
    assert same == [False, True, False, False]  # fold 2 alone
    assert before[1]["test"] == after[1]["test"] == ["ravdess:01", "ravdess:05"]


def test_a_shuffled_run_gets_no_weight(tmp_path, two, capsys):
    noise = write_results(tmp_path / "noise", skill=0)
    fuse(capsys, two[0], noise, out=tmp_path / "fused")
    assert metrics_of(tmp_path / "fused")["weights"] == [1, 0]
    np.testing.assert_allclose(
        arrays_of(tmp_path / "fused")["probability"], arrays_of(two[0])["probability"], atol=1e-6
    )


def test_an_utterance_that_a_run_lacks_is_answered_by_the_others(tmp_path, two, capsys):
    some = utterances_of()[::2]
    other = write_results(tmp_path / "other", skill=2.2, seed=2, utterances=some)
    printed = fuse(capsys, other, two[1], out=tmp_path / "fused")
    found, poor = arrays_of(tmp_path / "fused"), arrays_of(two[1])
    np.testing.assert_array_equal(found["utterance"], poor["utterance"])
    lacking = ~np.isin(found["utterance"], arrays_of(other)["utterance"])
    np.testing.assert_allclose(found["probability"][lacking], poor["probability"][lacking], atol=1e-6)
    assert not np.allclose(found["probability"][~lacking], poor["probability"][~lacking], atol=1e-3)
    assert "lacks 48 of 96 utterances; the others answer them" in " ".join(printed.split())


def test_a_class_that_a_run_does_not_know_is_answered_by_the_others(tmp_path, two, capsys):
    pair = ("angry", "happy")
    other = write_results(tmp_path / "other", skill=3, seed=2, utterances=utterances_of(pair), classes=pair)
    change_arrays(other, classes=np.array(["anger", "joy"]))
    fuse(capsys, two[1], other, out=tmp_path / "fused")
    metrics, alone = metrics_of(tmp_path / "fused"), metrics_of(two[1])
    assert metrics["classes"] == ["happy", "sad", "angry"]
    assert metrics["recall"]["sad"] > alone["recall"]["sad"] - 0.1
    assert metrics["recall"]["happy"] > alone["recall"]["happy"] + 0.1
    assert f"{other} does not know sad" in metrics["notes"]


def test_folds_that_are_numbered_otherwise_are_those_of_the_first_run(tmp_path, two, capsys):
    fuse(capsys, *two, out=tmp_path / "before")
    change_arrays(two[1], fold=(5 - arrays_of(two[1])["fold"]).astype(np.int32))
    fuse(capsys, *two, out=tmp_path / "after")
    before, after = (arrays_of(tmp_path / name) for name in ("before", "after"))
    np.testing.assert_array_equal(before["fold"], after["fold"])
    np.testing.assert_array_equal(before["logits"], after["logits"])


def test_speakers_of_one_run_alone_keep_their_folds(tmp_path, capsys):
    """Three speakers are in both runs; the others are tested with those of their fold, or in one of their own."""
    first = write_results(tmp_path / "first", utterances=utterances_of(speakers=range(1, 7)))
    second = write_results(tmp_path / "second", utterances=utterances_of(speakers=range(4, 13)))
    fuse(capsys, first, second, out=tmp_path / "fused")
    found = arrays_of(tmp_path / "fused")
    fold_of = dict(zip(found["speaker"].tolist(), found["fold"].tolist()))
    assert len(fold_of) == 12
    # No speaker of the last fold of the second run is in the first run.
    assert {speaker[-2:] for speaker, fold in fold_of.items() if fold == 5} == {"07", "11"}
    assert all(fold in (5, int(speaker[-2:]) % 4 + 1) for speaker, fold in fold_of.items())


def test_a_fusion_is_a_run_that_can_be_fused_again(tmp_path, fused, two, capsys):
    fuse(capsys, fused, two[1], out=tmp_path / "again")
    assert metrics_of(tmp_path / "again")["fused"] == [str(fused), str(two[1])]
    fuse(capsys, fused, two[1], out=tmp_path / "again")  # its own results may be replaced


def test_runs_without_known_speakers_are_fused_by_utterance(tmp_path, two, capsys):
    for run in two:
        change_arrays(run, speaker=np.full(96, ""))
        damaged(speaker_independent=False)(run)
    assert "NOT speaker-independent" in fuse(capsys, *two, out=tmp_path / "fused")


# --- fusion: predictions ---


@pytest.fixture
def predicted(tmp_path, two, capsys):
    """Runs, their fusion, and predictions with each of them for the files of four new speakers."""
    fuse(capsys, *two, out=tmp_path / "fused")
    new = utterances_of(speakers=range(9, 13))
    folders = [write_predictions(tmp_path / f"new{n}", run, new, seed=n, skill=2) for n, run in enumerate(two)]
    return *two, tmp_path / "fused", *folders


def test_a_fusion_labels_what_its_runs_have_labelled(tmp_path, predicted, capsys):
    *_, fusion, first, second = predicted
    printed = fuse(capsys, first, second, predict=fusion, out=tmp_path / "labelled")
    assert "48 files labelled" in printed
    found, weights = arrays_of(tmp_path / "labelled"), metrics_of(fusion)["weights"]
    log_p = sum(weight * np.log(arrays_of(folder)["probability"]) for weight, folder in zip(weights, (first, second)))
    np.testing.assert_allclose(found["probability"].argmax(1), log_p.argmax(1))
    assert set(found["fold"]) == {0}
    metrics = metrics_of(tmp_path / "labelled")
    assert (metrics["n_utterances"], metrics["n_speakers"]) == (48, 4)
    assert "transfer" in printed
    assert metrics["adapted"] is None
    # In any order of the folders.
    fuse(capsys, second, first, predict=fusion, out=tmp_path / "swapped")
    np.testing.assert_array_equal(arrays_of(tmp_path / "swapped")["logits"], found["logits"])


def test_a_fusion_with_an_adapted_run_is_adapted_and_so_are_its_predictions(tmp_path, two, predicted, capsys):
    def adapt(run):
        (run / "metrics.json").write_text(json.dumps(metrics_of(run) | {"adapted": "8"}))

    *_, first, second = predicted
    adapt(two[1])
    assert "ADAPTED" in fuse(capsys, *two, out=tmp_path / "adapted")
    fuse(capsys, first, second, predict=tmp_path / "adapted", out=tmp_path / "labelled")
    assert metrics_of(tmp_path / "adapted")["adapted"] == metrics_of(tmp_path / "labelled")["adapted"] == "8"


def test_files_of_training_speakers_are_labelled_and_not_scored(tmp_path, predicted, capsys):
    good, poor, fusion, *_ = predicted
    seen = utterances_of(speakers=[3])
    folders = [write_predictions(tmp_path / f"seen{n}", run, seen) for n, run in enumerate((good, poor))]
    printed = fuse(capsys, *folders, predict=fusion, out=tmp_path / "labelled")
    assert "12 files not scored: the speaker was in the training data" in printed
    assert not (tmp_path / "labelled" / "metrics.json").exists()


def test_predictions_of_the_wrong_models_are_refused(tmp_path, predicted, caplog):
    good, poor, fusion, first, second = predicted
    arguments = ("--predict", fusion, "--out", tmp_path / "labelled")
    strange = write_predictions(tmp_path / "strange", poor, utterances_of())
    change_arrays(strange, model=np.array("SHA-256 of another"))
    assert f"{strange} holds no predictions of a run that is fused: {good}, {poor}" in refusal(
        caplog, "--fuse", first, strange, *arguments
    )
    assert f"no folder holds predictions of {poor}; label the files with --predict {poor} first" in refusal(
        caplog, "--fuse", first, first, *arguments
    )
    assert "two of the folders" in refusal(caplog, "--fuse", first, second, second, *arguments)
    assert f"{good} holds no predictions" in refusal(caplog, "--fuse", good, second, *arguments)
    assert "holds no fusion of runs" in refusal(caplog, "--fuse", first, second, "--predict", good, "--out", "x")
    assert "it is a fusion of runs; label the files with each of its runs" in refusal(
        caplog, "DIR", "--predict", fusion
    )
    assert not (tmp_path / "labelled").exists()
    features = tmp_path / "features" / "happy"
    features.mkdir(parents=True)
    for out in (first, features.parent, good):
        message = refusal(caplog, "--fuse", first, second, "--predict", fusion, "--out", out)
        assert re.search("is one of the folders|holds happy, which is not|results of a training run", message)


def change_fusion(**changed):
    def change(run):
        description = json.loads((run / "config.json").read_text())
        description["fusion"] |= changed
        (run / "config.json").write_text(json.dumps(description))

    return change


@pytest.mark.parametrize(
    "change",
    [
        change_fusion(weights=[0.9, 0.1, 0]),
        change_fusion(weights=[0.5, 0.4]),
        change_fusion(weights=[1, "x"]),
        change_fusion(temperature=0),
        change_fusion(temperature=None),
        change_fusion(models=[1, 2]),
        change_fusion(speakers=5),
        change_fusion(runs=["one"]),
    ],
)
def test_a_damaged_fusion_is_refused(tmp_path, predicted, caplog, change):
    _, _, fusion, first, second = predicted
    change(fusion)
    line = refusal(caplog, "--fuse", first, second, "--predict", fusion, "--out", tmp_path / "labelled")
    assert line == f"{fusion}: config.json is damaged"


# --- fusion: refusals ---


def test_folds_that_divide_the_speakers_otherwise_are_refused(tmp_path, two, caplog):
    fold = arrays_of(two[1])["fold"]
    speaker = arrays_of(two[1])["speaker"]
    swapped = np.where(speaker == "ravdess:03", 1, np.where(speaker == "ravdess:04", 4, fold))
    change_arrays(two[1], fold=swapped.astype(np.int32))
    line = refusal(caplog, "--fuse", *two, "--out", tmp_path / "fused")
    expected = (
        r"\S+poor splits the speakers differently from \S+good: ravdess:0[1-8] is tested in another group; train both"
    )
    assert re.match(expected, line)
    merged = np.where(fold == 2, 1, fold)
    change_arrays(two[1], fold=merged.astype(np.int32))
    assert "is tested in another group" in refusal(caplog, "--fuse", *two, "--out", tmp_path / "fused")
    change_arrays(two[1], fold=(np.arange(96) % 5 + 1).astype(np.int32))
    assert "is tested in another group" in refusal(caplog, "--fuse", *two, "--out", tmp_path / "fused")
    assert "tests ravdess:01 in several folds" in refusal(caplog, "--fuse", *two[::-1], "--out", tmp_path / "fused")


def test_runs_with_fewer_than_two_folds_are_refused(tmp_path, two, caplog):
    change_arrays(two[1], fold=np.ones(96, np.int32))
    assert "has fewer than two folds" in refusal(caplog, "--fuse", *two, "--out", tmp_path / "fused")
    change_arrays(two[1], fold=np.zeros(96, np.int32))
    assert "has fewer than two folds" in refusal(caplog, "--fuse", *two, "--out", tmp_path / "fused")


def test_runs_that_contradict_each_other_are_refused(tmp_path, two, caplog):
    label, speaker = arrays_of(two[1])["label"], arrays_of(two[1])["speaker"]
    change_arrays(two[1], label=np.where(np.arange(96) < 5, (label + 1) % 3, label).astype(np.int32))
    line = refusal(caplog, "--fuse", *two, "--out", tmp_path / "fused")
    assert line.startswith("the runs disagree on 5 utterances: ravdess:01:01_03_01_01_01 is happy in")
    change_arrays(two[1], label=label, speaker=np.where(speaker == "ravdess:07", "ravdess:70", speaker))
    line = refusal(caplog, "--fuse", *two, "--out", tmp_path / "fused")
    assert "is ravdess:07 in" in line
    assert "ravdess:70 in" in line


def test_runs_without_a_common_utterance_are_refused(tmp_path, two, caplog):
    other = write_results(tmp_path / "other", utterances=utterances_of(speakers=range(9, 13)))
    line = refusal(caplog, "--fuse", *two, other, "--out", tmp_path / "fused")
    assert line == (
        f"{other} has no utterance in common with the others: it has ravdess:09:01_03_01_01_01, they have"
        " ravdess:01:01_03_01_01_01"
    )


def test_other_results_are_never_replaced_by_a_fusion(tmp_path, two, capsys, caplog):
    good, poor = two
    third = write_results(tmp_path / "third")
    began, foreign = tmp_path / "began", tmp_path / "foreign"
    for folder, files in ((began, ("lock", "train.log")), (foreign, ("report.html",))):
        folder.mkdir()
        for file in files:
            (folder / file).write_text("")
    predictions = write_predictions(tmp_path / "predictions", good, utterances_of())
    for out in (poor, third, began):
        assert "holds the results of a run; choose another --out" in refusal(caplog, "--fuse", *two, "--out", out)
    assert "holds predictions" in refusal(caplog, "--fuse", *two, "--out", predictions)
    assert "which is not of this program" in refusal(caplog, "--fuse", *two, "--out", foreign)
    fuse(capsys, good, third, out=tmp_path / "fused")
    line = refusal(caplog, "--fuse", *two, "--out", tmp_path / "fused")
    assert line.endswith("holds a fusion of other runs; choose another --out, or replace it with --overwrite")
    assert train.main(["--fuse", *map(str, two), "--out", str(tmp_path / "fused"), "--overwrite"]) == 0
    assert metrics_of(tmp_path / "fused")["fused"] == [str(good), str(poor)]


def test_folders_that_cannot_be_fused_are_refused(tmp_path, two, caplog):
    good, poor = two
    assert "--fuse needs --out" in refusal(caplog, "--fuse", *two)
    assert "is the same run" in refusal(caplog, "--fuse", good, f"{good}/../good", "--out", tmp_path / "new")
    (poor / "config.json").write_text("{}")
    assert "config.json is damaged, or not of the same run" in refusal(
        caplog, "--fuse", *two, "--out", tmp_path / "new"
    )


def test_inputs_of_two_kinds_are_refused(two, caplog):
    good, poor = two
    assert "use only one of --compare and --fuse" in refusal(caplog, "--compare", good, poor, "--fuse", good, poor)
    assert "use only one of DIR and --fuse (data)" in refusal(caplog, "data", "--fuse", good, poor)

"""The whole program: what a run leaves behind, how it is scored, and which runs are refused."""

import csv
import dataclasses
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ARTIFACTS, FAST, ROOT, bare_dataset, documented_python, rows_of
from make_sample import write_sample

import check_data
import emotions
import stats
import train

BAD_FILE = "03-01-05-01-02-01-12.npz"


@pytest.fixture(scope="module")
def metrics(trained):
    return json.loads((trained / "first" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def experiment(population):
    return population.experiment


@pytest.fixture(scope="module")
def outcome(experiment):
    """A small experiment, trained; do not change it."""
    return train.train(experiment)


# --- artifacts ---


def test_a_run_leaves_every_artifact_and_nothing_else(trained):
    assert {path.name for path in (trained / "first").iterdir()} == ARTIFACTS
    assert not [path for path in trained.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    "name",
    [
        "model.npz",
        "fusion.npz",
        "predictions.csv",
        "history.csv",
        "confusion.csv",
        "skipped.csv",
        stats.MEAN_FILE,
        stats.STD_FILE,
    ],
)
def test_a_run_that_loads_the_statistics_writes_the_same_bytes_as_the_one_that_computed_them(trained, name):
    assert (trained / "first" / name).read_bytes() == (trained / "second" / name).read_bytes()


def test_metrics_describe_the_run_and_its_scores(metrics):
    assert metrics["ua"] > 3 * metrics["chance_ua"]
    assert metrics["ua_ci95"][0] <= metrics["ua"] <= metrics["ua_ci95"][1]
    assert metrics["chance_ua"] == 1 / 8
    assert metrics["classes"] == list(emotions.EMOTIONS)
    assert (metrics["n_utterances"], metrics["n_speakers"], metrics["fold_scheme"]) == (112, 8, "3")
    assert metrics["speaker_independent"]
    assert metrics["statistics"] == "of the speakers that a fold does not test"
    assert metrics["left_out"] == {"empty": 1}
    assert metrics["left_out_first"] == {"empty": {"file": BAD_FILE, "reason": "has no bytes"}}
    assert set(metrics["versions"]) == {"python", "jax", "flax", "optax", "numpy"}
    assert metrics["settings"]["width"] == 32
    assert metrics["seconds"] > 0
    assert "CPU" in metrics["device"]
    assert "sweep" not in metrics
    assert set(metrics["folds"][0]["chosen"]) == {"shrinkage", "hidden", "linear", "temperature"}


def test_each_fold_in_the_metrics_lists_disjoint_speakers_and_its_scores(metrics):
    assert len(metrics["folds"]) == 3
    for fold in metrics["folds"]:
        train_speakers, validation, test = (set(fold[side]) for side in ("train", "validation", "test"))
        assert not train_speakers & validation
        assert not test & (train_speakers | validation)
        assert {"ua", "wa", "macro_f1", "n_test", "epochs", "skipped_steps"} <= set(fold)


def test_the_scores_are_those_of_the_predictions_file(trained, metrics):
    rows = rows_of(trained / "first" / "predictions.csv")
    assert len(rows) == 112
    assert list(rows[0])[:7] == ["file", "utterance", "corpus", "speaker", "label", "fold", "predicted"]
    recalls = []
    for name in metrics["classes"]:
        predicted = [row["predicted"] for row in rows if row["label"] == name]
        recalls.append(predicted.count(name) / len(predicted))
    assert metrics["ua"] == pytest.approx(np.mean(recalls))
    for row in rows:
        p = {name: float(row[f"p_{name}"]) for name in metrics["classes"]}
        assert sum(p.values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == max(p, key=p.get)
        assert row["speaker"] in metrics["folds"][int(row["fold"]) - 1]["test"]


def test_the_confusion_file_has_the_matrix_of_the_metrics(trained, metrics):
    with (trained / "first" / "confusion.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["label", *metrics["classes"]]
    assert [row[0] for row in rows] == metrics["classes"]
    assert [[int(count) for count in row[1:]] for row in rows] == metrics["confusion"]


def test_files_left_out_are_listed_with_code_and_reason(trained):
    (row,) = rows_of(trained / "first" / "skipped.csv")
    assert row == {"file": BAD_FILE, "code": "empty", "reason": "has no bytes"}


def test_the_log_has_the_device_the_faults_and_the_progress(trained):
    lines = (trained / "first" / "train.log").read_text().splitlines()
    assert lines[0].startswith("device: CPU (")
    assert "because" in lines[0]
    assert any(line.startswith("epoch 4/12  loss") for line in lines)
    assert any(line.startswith(f"{BAD_FILE}: empty") for line in lines)


def test_the_history_has_a_row_for_each_epoch_fold_and_seed(trained):
    rows = rows_of(trained / "first" / "history.csv")
    keys = [(int(row["epoch"]), row["fold"], row["seed"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {(fold, seed) for epoch, fold, seed in keys if epoch == 1} == {
        (fold, seed) for fold in ("1", "2", "3", "final") for seed in ("0", "1")
    }
    assert "setting" not in rows[0]


def test_the_configuration_describes_the_model(trained):
    config = json.loads((trained / "first" / "config.json").read_text())
    assert config["format"] == 6
    assert config["classes"] == list(emotions.EMOTIONS)
    assert (config["dim"], config["pooling"], config["reshapes_vectors"]) == (24, "mean", False)
    assert len(config["speakers"]) == 8
    assert config["options"]["width"] == 32
    assert config["temperature"] > 0


@pytest.mark.parametrize(
    "config",
    [
        train.Config("-a 'dir'", seeds=3, merge=("calm=neutral", "fear=sad"), sweep=4, pattern="-(?P<emotion>.)"),
        train.Config("D", fresh=True, dim=7),
        train.Config("D"),
    ],
)
def test_the_command_of_a_run_has_the_same_options(config):
    python, program, *arguments = shlex.split(check_data.command_line(config))
    assert (python, program) == ("python", "train.py")
    assert train.parse_config(arguments) == config


def test_every_seed_that_is_accepted_runs(sample, tmp_path):
    short = ("--epochs", "2", "--seeds", "1", "--width", "8", "--folds", "2", "--seed", str(2**32 - 1))
    assert train.main([str(sample), "--out", str(tmp_path / "run"), *short]) == 0


# --- fusion.npz ---


def test_the_fusion_file_keeps_its_contract(trained, metrics):
    fusion, rows = np.load(trained / "first" / "fusion.npz"), rows_of(trained / "first" / "predictions.csv")
    assert fusion["id"].tolist() == [row["file"].removesuffix(".npz") for row in rows]
    assert fusion["utterance"].tolist() == [row["utterance"] for row in rows]
    assert len(set(fusion["utterance"])) == len(rows)
    assert "cremad:1001:iom_ang_xx" in fusion["utterance"]
    assert fusion["classes"].tolist() == metrics["classes"]
    assert [metrics["classes"][label] for label in fusion["label"]] == [row["label"] for row in rows]
    assert fusion["speaker"].tolist() == [row["speaker"] for row in rows]
    assert fusion["fold"].tolist() == [int(row["fold"]) for row in rows]
    temperature = [metrics["folds"][fold - 1]["chosen"]["temperature"] for fold in fusion["fold"]]
    np.testing.assert_allclose(fusion["temperature"], temperature, rtol=1e-6)
    calibrated = stats.probabilities(fusion["logits"] / fusion["temperature"][:, None])
    np.testing.assert_allclose(calibrated, fusion["probability"], atol=1e-6)
    written = np.array([[float(row[f"p_{name}"]) for name in metrics["classes"]] for row in rows])
    np.testing.assert_allclose(fusion["probability"], written, atol=1e-6)
    assert fusion["embedding"].shape == (112, 2 * 32)


def test_the_embedding_is_the_hidden_layer_of_each_seed_of_the_fold(experiment, outcome):
    for number, fold in enumerate(experiment.split.fold):
        mean, scale, _, params = outcome.ensembles[fold]
        layers = []
        for seed in range(2):
            x = (experiment.dataset.x[number] - mean) / scale
            layers.append(np.maximum(x @ params["Dense_0/kernel"][seed] + params["Dense_0/bias"][seed], 0))
        embedding = outcome.predictions.answers.embedding[number]
        np.testing.assert_allclose(embedding, np.concatenate(layers), rtol=1e-3, atol=1e-4)


def test_the_documented_fusion_with_fixed_weights_runs(trained, metrics, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    for name, run in (("voice", "first"), ("face", "second")):
        (tmp_path / "runs" / name).symlink_to(trained / run)
    monkeypatch.chdir(tmp_path)
    exec(documented_python("intersect1d"), {})
    # Both runs are the same: fusion changes nothing.
    assert capsys.readouterr().out == f"fixed weights: {metrics['wa']:.4f} of 112 utterances right\n"


# --- evaluation ---


def test_the_metrics_are_made_from_the_out_of_fold_answers(experiment, outcome):
    metrics = train.evaluate_run(experiment, outcome)
    dataset, split = experiment.dataset, experiment.split
    predicted = outcome.predictions.answers.logits.argmax(1)
    expected = stats.Counts.of(stats.confusion_matrix(dataset.label, predicted, 8)).scores()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["n_utterances"] == len(dataset.label)
    assert list(metrics["speakers"]) == sorted(set(split.speaker))
    for number, fold in enumerate(metrics["folds"]):
        tested = split.fold == number
        assert fold["wa"] == pytest.approx((predicted == dataset.label)[tested].mean())
        assert fold["n"] == fold["n_test"] == tested.sum()


def test_the_answers_for_a_fold_are_those_of_its_own_models(experiment, outcome):
    dataset, split = experiment.dataset, experiment.split
    for fold in range(split.folds):
        tested = np.flatnonzero(split.fold == fold)
        logits, _ = outcome.ensembles[fold].forward(dataset.features(tested))
        np.testing.assert_allclose(outcome.predictions.answers.logits[tested], logits.mean(0), atol=1e-5)
        assert set(outcome.predictions.answers.temperature[tested]) == {outcome.choices[fold]["temperature"]}


def test_the_uncalibrated_error_is_that_of_the_logits_before_temperature_scaling(experiment, outcome):
    dataset = experiment.dataset
    predictions = outcome.predictions
    logits = np.random.default_rng(0).normal(size=predictions.answers.logits.shape)
    answers = predictions.answers._replace(logits=logits, temperature=np.full(len(logits), 2.0))
    metrics = train.evaluate_run(experiment, outcome._replace(predictions=predictions._replace(answers=answers)))
    before = stats.probabilities(2 * logits)
    assert metrics["ece_uncalibrated"] == stats.expected_calibration_error(before, dataset.label)
    assert metrics["ece"] == stats.expected_calibration_error(stats.probabilities(logits), dataset.label)
    assert metrics["ece"] != metrics["ece_uncalibrated"]


def test_intervals_over_very_few_speakers_are_noted(experiment, outcome, monkeypatch):
    assert not any("unreliable" in note for note in train.evaluate_run(experiment, outcome)["notes"])
    monkeypatch.setattr(stats, "FEW_SPEAKERS", 99)
    assert any("unreliable" in note for note in train.evaluate_run(experiment, outcome)["notes"])


def test_speakers_are_not_scored_where_the_split_is_not_by_speaker(experiment, outcome):
    mixed = experiment._replace(split=experiment.split._replace(independent=False))
    metrics = train.evaluate_run(mixed, outcome)
    assert not metrics["speaker_independent"]
    assert metrics["speakers"] == {}


def test_statistics_supplied_by_the_user_are_noted(experiment, outcome):
    own = experiment._replace(stored=experiment.stored._replace(user_supplied=True))
    metrics = train.evaluate_run(own, outcome)
    assert metrics["statistics"] == "supplied by the user"
    assert any("your statistics apply to every fold" in note for note in metrics["notes"])
    assert not any("your statistics" in note for note in train.evaluate_run(experiment, outcome)["notes"])


def test_a_fold_report_has_the_speakers_of_every_seed_and_what_was_chosen(experiment, outcome):
    split = experiment.split
    known = outcome._replace(best_epoch=np.repeat([3, 1, 2, 0], 2), skipped=np.arange(8))
    reports = [train.fold_report(split, fold, known) for fold in range(3)]
    assert [report["fold"] for report in reports] == [1, 2, 3]
    assert [report["epochs"] for report in reports] == [4, 2, 3]
    assert [report["skipped_steps"] for report in reports] == [0 + 1, 2 + 3, 4 + 5]
    for fold, report in enumerate(reports):
        assert report["test"] == split.speakers(split.fold == fold)
        assert report["chosen"] == outcome.choices[fold]
        assert len(report["rotation"]) == 2
        assert report["rotation"][0] == {side: report[side] for side in ("train", "validation")}
        first, second = (set(sides["validation"]) for sides in report["rotation"])
        assert not first & second


def dataset_with_genders():
    """Six utterances, labels h h s | h s s, of which four have a gender."""
    dataset = bare_dataset(["ravdess:01"] * 3 + ["cremad:1001"] * 3, [0, 0, 1, 0, 1, 1])
    genders = ["male", "male", "male", "female", None, None]
    utterances = [dataclasses.replace(u, gender=gender) for u, gender in zip(dataset.utterances, genders)]
    return dataset._replace(classes=("happy", "sad"), utterances=utterances)


def analysis(probability):
    dataset = dataset_with_genders()
    return train.error_analysis(dataset.utterances, dataset.label, probability, dataset.classes)


def test_groups_are_counted_and_scored_where_the_names_identify_them():
    happy = np.array([0.9, 0.2, 0.3, 0.6, 0.8, 0.45])  # predictions h s s | h h s
    groups = analysis(np.stack([happy, 1 - happy], 1))["groups"]
    male, female = groups["gender"]["male"], groups["gender"]["female"]
    assert (male["n"], male["ua"], male["wa"]) == pytest.approx((3, (1 / 2 + 1) / 2, 2 / 3))
    assert (female["n"], female["ua"]) == (1, 1)
    assert groups["corpus"]["ravdess"]["n"] == 6
    assert groups["intensity"] == {}


def test_mistakes_are_listed_by_confidence_and_then_in_order():
    happy = np.array([0.9, 0.2, 0.3, 0.6, 0.85, 0.45])
    mistakes = analysis(np.stack([happy, 1 - happy], 1))["confident_mistakes"]
    assert [(row["file"], row["label"], row["predicted"]) for row in mistakes] == [
        ("0004", "sad", "happy"),
        ("0001", "happy", "sad"),
    ]
    assert [row["confidence"] for row in mistakes] == pytest.approx([0.85, 0.8])
    tied = np.tile([0.2, 0.8], (6, 1))
    mistakes = analysis(tied)["confident_mistakes"]
    assert [row["file"] for row in mistakes] == ["0000", "0001", "0003"]


def epoch_row(epoch, fold, loss, ua, **more):
    return {"epoch": epoch, "fold": fold, "validation_loss": loss, "validation_ua": ua} | more


def curves_of(outcome, rows, choices):
    return train.learning_curves(outcome._replace(history=rows, choices=choices))


def test_learning_curves_spread_over_folds_after_the_mean_of_their_seeds(outcome):
    rows = [epoch_row(1, "1", 1.0, 0.2), epoch_row(1, "1", 3.0, 0.4), epoch_row(1, "2", 5.0, 0.7)]
    rows += [epoch_row(1, "final", 99.0, 1.0), epoch_row(2, "2", 4.0, 0.8)]
    first, second = curves_of(outcome, rows, [{}] * 3)
    assert (first["epoch"], first["folds"], second["epoch"], second["folds"]) == (1, 2, 2, 1)
    assert first["validation_loss"] == pytest.approx({"mean": 3.5, "low": 2.0, "high": 5.0})
    assert first["validation_ua"] == pytest.approx({"mean": 0.5, "low": 0.3, "high": 0.7})
    assert second["validation_ua"] == pytest.approx({"mean": 0.8, "low": 0.8, "high": 0.8})


def test_the_learning_curves_of_a_sweep_are_those_of_the_chosen_settings(outcome):
    rows = [epoch_row(1, fold, 10.0 * setting, 0.5, setting=setting) for setting in (1, 2, 3) for fold in ("1", "2")]
    (curve,) = curves_of(outcome, rows, [{"setting": 3}, {"setting": 1}, {"setting": 2}])
    assert curve["validation_loss"] == {"mean": 20.0, "low": 10.0, "high": 30.0}


# --- sweep ---


@pytest.fixture(scope="module")
def swept(trained, tmp_path_factory):
    """A run with three settings."""
    run = tmp_path_factory.mktemp("swept") / "run"
    assert train.main([str(trained / "data"), "--out", str(run), "--sweep", "3", *FAST]) == 0
    return run


def test_a_sweep_lists_every_setting_best_first(swept):
    sweep = json.loads((swept / "metrics.json").read_text())["sweep"]
    config = dataclasses.replace(train.parse_config(["D", *FAST]), sweep=3)
    drawn = {number: setting._asdict() for number, setting in enumerate(train.draw_settings(config), 1)}
    assert {row["setting"]: {name: row[name] for name in train.SWEEP} for row in sweep} == drawn
    assert sum(row["folds"] for row in sweep) == 3
    losses = [row["validation_loss"] for row in sweep]
    assert losses == sorted(losses)


def test_each_fold_of_a_sweep_has_its_chosen_setting(swept):
    metrics = json.loads((swept / "metrics.json").read_text())
    drawn = {row["setting"]: row for row in metrics["sweep"]}
    chosen = [fold["chosen"] for fold in metrics["folds"]]
    assert [choice["learning_rate"] for choice in chosen] == [
        drawn[choice["setting"]]["learning_rate"] for choice in chosen
    ]
    for number, row in drawn.items():
        assert row["folds"] == sum(choice["setting"] == number for choice in chosen)


def test_the_history_of_a_sweep_has_the_setting_of_each_row(swept):
    rows = rows_of(swept / "history.csv")
    assert next(iter(rows[0])) == "setting"
    first = {(row["setting"], row["fold"], row["seed"]) for row in rows if row["epoch"] == "1"}
    assert len(first) == 3 * 4 * 2
    assert {setting for setting, _, _ in first} == {"1", "2", "3"}


def test_a_sweep_is_in_the_configuration_and_in_the_command(swept):
    assert json.loads((swept / "config.json").read_text())["options"]["sweep"] == 3
    assert "--sweep=3" in json.loads((swept / "metrics.json").read_text())["command"]


def test_the_model_of_a_sweep_can_be_loaded(swept):
    model = train.load_model(swept)
    assert model.ensemble.params["Dense_0/kernel"].shape == (2, 24, 32)


# --- refused and failed runs ---


def test_statistics_supplied_by_the_user_are_in_the_results(tmp_path, jax_stack):
    data = write_sample(tmp_path / "data", actors=3, dim=24)
    np.save(data / stats.MEAN_FILE, np.zeros(24, np.float32))
    np.save(data / stats.STD_FILE, np.full(24, 2, np.float32))
    assert train.main([str(data), "--out", str(tmp_path / "run"), *FAST]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["statistics"] == "supplied by the user"
    assert any("your statistics apply to every fold" in note for note in metrics["notes"])
    np.testing.assert_array_equal(np.load(tmp_path / "run" / stats.MEAN_FILE), np.zeros(24))
    np.testing.assert_array_equal(np.load(tmp_path / "run" / stats.STD_FILE), np.full(24, 2))
    with np.load(tmp_path / "run" / "model.npz") as model:
        assert (model["scale"] == 2).all()


def test_statistics_supplied_by_the_user_are_never_overwritten(tmp_path, jax_stack, caplog):
    data = write_sample(tmp_path / "data", actors=2, dim=24)
    np.save(data / stats.MEAN_FILE, np.zeros(24, np.float32))
    np.save(data / stats.STD_FILE, np.ones(24, np.float32))
    assert train.main([str(data), "--out", str(tmp_path / "run"), "--recompute-stats", *FAST]) == 2
    assert "were supplied by you; move them first" in caplog.messages[-1]
    assert (np.load(data / stats.MEAN_FILE) == 0).all()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def test_results_are_not_mixed_with_features(sample, caplog):
    assert train.main([str(sample), "--out", str(sample), *FAST]) == 2
    assert "is the feature folder" in caplog.messages[-1]
    assert not (sample / "lock").exists()


# --- a finished run ---


def test_a_finished_run_is_shown_again_and_stays_as_it_is(trained, monkeypatch, capsys, caplog):
    caplog.set_level("INFO", "train")
    run, before = trained / "first", contents(trained / "first")
    monkeypatch.setattr(train, "train", None)
    harmless = ("--no-compile-cache", "--overwrite")
    assert train.main([str(trained / "data"), "--out", str(run), *FAST, *harmless]) == 0
    assert f"FINISHED: {run} holds this run, with the scores below; --fresh does it again" in caplog.text
    output = capsys.readouterr().out
    assert f"{json.loads(before['metrics.json'])['ua']:.4f}" in output
    assert output.splitlines()[-1] == f"report    {run / 'report.html'}"
    assert contents(run) == before


def test_a_finished_run_is_done_again_with_fresh(trained, tmp_path):
    run = shutil.copytree(trained / "first", tmp_path / "run")
    (run / "predictions.csv").write_text("damaged")
    assert train.main([str(trained / "data"), "--out", str(run), *FAST, "--fresh"]) == 0
    assert (run / "predictions.csv").read_bytes() == (trained / "first" / "predictions.csv").read_bytes()


def test_a_finished_run_with_other_options_is_replaced_only_with_overwrite(trained, tmp_path, caplog):
    run = shutil.copytree(trained / "first", tmp_path / "run")
    before, other = contents(run), (*FAST, "--seeds", "1", "--epochs", "2")
    for more in ((), ("--fresh",)):
        assert train.main([str(trained / "data"), "--out", str(run), *other, *more]) == 2
        differing = "--seeds is 1 here, 2 in the finished run; --epochs is 2 here, 12 in the finished run"
        advice = "Choose another --out, or replace it with --overwrite"
        assert caplog.messages[-1] == f"train.py: {run} holds another, finished run: {differing}. {advice}"
        assert contents(run) == before
    (run / "checkpoint-0.npz").write_bytes(b"of a run that was started with --overwrite")
    assert train.main([str(trained / "data"), "--out", str(run), *other, "--fresh"]) == 2
    assert (run / "checkpoint-0.npz").exists()  # a refused run removes nothing
    assert train.main([str(trained / "data"), "--out", str(run), *other, "--fresh", "--overwrite"]) == 0
    assert json.loads((run / "config.json").read_text())["options"]["seeds"] == 1


def test_a_finished_run_on_other_data_is_replaced_only_with_overwrite(trained, tmp_path, caplog):
    run, data = trained / "first", write_sample(tmp_path / "other", actors=2, dim=24)
    before = contents(run)
    assert train.main([str(data), "--out", str(run), *FAST]) == 2
    differing = f"holds another, finished run: DIR is {data} here, {trained / 'data'} in the finished run. Choose"
    assert differing in caplog.messages[-1]
    copy = shutil.copytree(trained / "data", tmp_path / "data")
    assert train.main([str(copy), "--out", str(run), *FAST]) == 0  # the same files elsewhere
    next(copy.glob("ravdess*.npz")).unlink()
    assert train.main([str(copy), "--out", str(run), *FAST, "--seeds", "1"]) == 2
    assert "--seeds is 1 here, 2 in the finished run. Choose" in caplog.messages[-1]
    assert contents(run) == before


def test_a_run_whose_scores_are_of_another_is_not_finished(trained, tmp_path):
    """A kill between two renames leaves a new config.json and an old metrics.json."""
    run = shutil.copytree(trained / "first", tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"model": "0" * 64, "ua": 0}))
    assert train.main([str(trained / "data"), "--out", str(run), *FAST]) == 0
    assert json.loads((run / "metrics.json").read_text())["ua"] == metrics["ua"]


def test_damaged_scores_of_a_finished_run_are_named_in_one_line(trained, tmp_path, caplog):
    run = shutil.copytree(trained / "first", tmp_path / "run")
    model = json.loads((run / "config.json").read_text())["model"]
    (run / "metrics.json").write_text(json.dumps({"model": model}))
    assert train.main([str(trained / "data"), "--out", str(run), *FAST]) == 2
    assert caplog.messages[-1] == f"train.py: {run}: metrics.json is damaged; --fresh does the run again"


@pytest.mark.parametrize("change", [{"identity": None}, {"options": None}, {"format": 5, "identity": 1}])
def test_a_finished_run_of_another_version_is_not_replaced(trained, tmp_path, caplog, change):
    run = shutil.copytree(trained / "first", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | change))
    assert train.main([str(trained / "data"), "--out", str(run), *FAST]) == 2
    assert "holds another, finished run: it is of another version or kind. Choose" in caplog.messages[-1]


def test_two_folders_of_one_name_have_different_results_folders(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "train")
    monkeypatch.chdir(tmp_path)
    one, two = tmp_path / "one" / "data", tmp_path / "two" / "data"
    assert train.default_folder(one) == train.default_folder(two) == train.Path("runs/data")
    train.Path("runs").mkdir()
    with train.RunFolder(train.Path("runs/data"), one) as run:  # unfinished
        (run.path / "train.log").write_text("")
        assert train.default_folder(one) == run.path
        other = train.default_folder(two)
    assert other.parent == run.path.parent and other.name.startswith("data-")
    assert f"results: in {other}; runs/data is for another folder with the same name" in caplog.messages[-1]
    (run.path / "lock").unlink()
    (run.path / "config.json").write_text(json.dumps({"data": str(one)}))  # finished
    assert (train.default_folder(one), train.default_folder(two)) == (run.path, other)
    other.mkdir()
    shutil.rmtree(run.path)
    assert train.default_folder(two) == other  # as long as its results are there


def test_a_folder_that_holds_anything_but_a_run_is_refused(trained, tmp_path, caplog):
    out = tmp_path / "out"
    for name in (".hidden", "thesis.txt"):
        out.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    with pytest.raises(check_data.UsageError, match=r"holds thesis\.txt, which is not of this"):
        train.check_output_folder(out, trained / "data")
    (out / "thesis.txt").unlink()
    train.check_output_folder(out, trained / "data")
    assert train.main([str(trained / "data"), "--predict", str(trained / "first"), "--out", str(out)]) == 1
    with pytest.raises(check_data.UsageError, match="holds predictions, and no run; choose another --out"):
        train.check_output_folder(out, trained / "data")


@pytest.mark.parametrize("name", ["config.json", "history.csv", "predictions.csv", "metrics.json", stats.MEAN_FILE])
@pytest.mark.parametrize("content", ["", "{}", '{"data": 1}', "[" * 100_000, "file,score\n"])
def test_a_run_replaces_no_file_of_another_program(trained, tmp_path, name, content, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(content)
    assert train.main([str(trained / "data"), "--out", str(out), *FAST]) == 2
    assert f"holds {name}, which is not of" in caplog.messages[-1]
    assert [path.read_text() for path in out.iterdir()] == [content]


def test_results_are_not_written_among_features(trained, tmp_path, caplog):
    """Later scans would take the folder for the results of a run, and pass over all that is in it."""
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data / "inner" / "part")
    (tmp_path / "link").symlink_to(data)
    for out in (data, tmp_path / "link", data / "inner", data / "inner" / "part", data / "inner" / ".." / "inner"):
        with pytest.raises(check_data.UsageError, match="is the feature folder, or contains features"):
            train.check_output_folder(out, data)
    train.check_output_folder(data / "new", data)
    train.check_output_folder(trained / "first", trained / "data")


def test_a_full_disk_at_the_end_does_not_take_the_scores_with_it(trained, tmp_path, monkeypatch, capsys, caplog):
    def full(folder, blobs):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "model.npz"))

    monkeypatch.setattr(stats, "write_files", full)
    assert train.main([str(trained / "data"), "--out", str(tmp_path / "run"), *FAST]) == 1
    metrics = json.loads((trained / "first" / "metrics.json").read_text())
    assert f"{metrics['ua']:.4f}" in capsys.readouterr().out
    assert caplog.messages[-1] == f"train.py: {tmp_path / 'run' / 'model.npz'}: No space left on device"


def test_statistics_that_arrive_during_the_scan_are_neither_used_nor_replaced(trained, tmp_path, monkeypatch, caplog):
    data, real = shutil.copytree(trained / "data", tmp_path / "data"), check_data.scan
    for name in (stats.MEAN_FILE, stats.STD_FILE, stats.MANIFEST_FILE):
        (data / name).unlink()

    def scan_slowly(*arguments, **options):
        found = real(*arguments, **options)
        np.save(data / stats.MEAN_FILE, np.full(24, 7, np.float32))
        np.save(data / stats.STD_FILE, np.full(24, 7, np.float32))
        return found

    monkeypatch.setattr(check_data, "scan", scan_slowly)
    caplog.set_level("INFO", "train")
    assert train.main([str(data), "--out", str(tmp_path / "run"), *FAST]) == 0
    assert "statistics: files appeared in DIR during the scan" in caplog.text
    assert (np.load(data / stats.MEAN_FILE) == 7).all()
    assert (tmp_path / "run" / "model.npz").read_bytes() == (trained / "first" / "model.npz").read_bytes()


def test_a_class_named_like_a_column_spoils_no_table(trained, tmp_path):
    assert (
        train.main(
            [
                str(trained / "data"),
                "--merge",
                "calm=label",
                "--merge",
                "sad=file",
                "--out",
                str(tmp_path / "run"),
                *FAST,
            ]
        )
        == 0
    )
    rows = rows_of(tmp_path / "run" / "confusion.csv")
    classes = json.loads((tmp_path / "run" / "config.json").read_text())["classes"]
    assert [row["true_label"] for row in rows] == classes
    assert set(rows_of(tmp_path / "run" / "predictions.csv")[0]) >= {"file", "label", "p_label", "p_file"}


@pytest.mark.parametrize("word", ["cuda", "nonsense"])
def test_a_platform_that_jax_does_not_have_is_refused_in_one_line(sample, tmp_path, word):
    command = [sys.executable, str(ROOT / "train.py"), str(sample), "--out", str(tmp_path / "run")]
    environment = os.environ | {"JAX_PLATFORMS": word, "JAX_ENABLE_X64": "nonsense"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:  # a machine that has it
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert f"JAX_PLATFORMS={word}: " in done.stderr and done.stderr.endswith("; unset JAX_PLATFORMS\n")


@pytest.mark.parametrize(
    "absurd",
    [("--epochs", "1" + "0" * 12), ("--width", "9" * 9), ("--patience", "9" * 30), ("--seeds", "9" * 7),
     ("--sweep", "100000"), ("--dim", "9" * 40), ("--seed", str(2**32)), ("--batch", "9" * 20)],
)  # fmt: skip
def test_absurd_options_are_refused_before_they_size_anything(sample, tmp_path, absurd, jax_stack, caplog):
    assert train.main([str(sample), "--out", str(tmp_path / "run"), *absurd]) == 2
    assert len(caplog.messages[-1].splitlines()) == 1


def test_a_damaged_entry_of_the_compile_cache_is_removed(tmp_path, caplog):
    damaged, other = tmp_path / "jit_step-0123-cache", tmp_path / "jit_steps-0123-cache"
    for path in (damaged, other):
        path.write_bytes(b"half")
    caplog.set_level("INFO", "train")
    shown = []
    message = "Error reading persistent compilation cache entry for 'jit_step': ZlibError: incomplete"
    for text in (message, "something else"):
        train.remove_damaged_entry(tmp_path, lambda *warning: shown.append(warning), text, UserWarning)
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
    assert shown == [("something else", UserWarning)]
    assert "the entry of jit_step is damaged; compiled again" in caplog.text


def test_a_refused_run_keeps_the_results_and_the_log_of_the_one_before(trained, caplog):
    files = [path for path in (trained / "first").iterdir() if path.name != "lock"]
    before = {path.name: path.read_bytes() for path in files}
    assert train.main([str(trained / "data"), "--out", str(trained / "first"), "--folds", "nonsense"]) == 2
    assert "--folds 'nonsense' is not a fold scheme" in caplog.messages[-1]
    assert {path.name: path.read_bytes() for path in files} == before


@pytest.mark.parametrize("content", ["nothing", "one emotion", "unknown names"])
def test_a_folder_that_cannot_be_trained_on_exits_2_with_one_line(tmp_path, content, jax_stack, caplog):
    data = tmp_path / "data"
    data.mkdir()
    if content != "nothing":
        for actor in range(1, 13):
            name = f"03-01-05-01-02-01-{actor:02d}" if content == "one emotion" else f"{actor}"
            np.savez(data / f"{name}.npz", emb=np.random.default_rng(actor).normal(size=8))
    assert train.main([str(data), "--out", str(tmp_path / "run")]) == 2
    assert caplog.records[-1].levelname == "ERROR"
    assert "\n" not in caplog.records[-1].message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")]
)
def test_out_of_memory_is_one_line_with_advice(trained, tmp_path, error, monkeypatch, caplog):
    def exhausted(*_):
        raise error

    monkeypatch.setattr(train, "train", exhausted)
    assert train.main([str(trained / "data"), "--out", str(tmp_path / "run"), *FAST]) == 1
    assert "OUT OF MEMORY" in caplog.messages[-1]
    assert "--batch" in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory(trained, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(train, "train", broken)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        train.main([str(trained / "data"), "--out", str(tmp_path / "run"), *FAST])


# --- the sample ---


def test_the_embedded_sample_is_what_its_script_writes(tmp_path):
    fresh = write_sample(tmp_path / "sample")
    names = sorted(path.name for path in (ROOT / "sample").glob("*.npz"))
    assert names == sorted(path.name for path in fresh.iterdir())
    for name in names:
        with np.load(fresh / name) as new, np.load(ROOT / "sample" / name) as old:
            np.testing.assert_allclose(new["emb"], old["emb"], rtol=1e-6)


def test_versions_of_a_recording_are_trained_on_but_neither_predicted_nor_scored(tmp_path, jax_stack):
    data = write_sample(tmp_path / "data", actors=4, dim=24)
    originals = sorted(path.stem for path in data.glob("*.npz"))
    for stem in originals:
        with np.load(data / f"{stem}.npz") as file:
            np.savez(data / f"{stem}_noise.npz", emb=file["emb"] + np.float32(0.1))
    run = tmp_path / "run"
    assert train.main([str(data), "--out", str(run), *FAST, "--epochs", "1"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["n_utterances"] == sum(fold["n_test"] for fold in metrics["folds"]) == len(originals)
    assert any(note.startswith(f"{len(originals)} versions of other files") for note in metrics["notes"])
    assert [row["file"].removesuffix(".npz") for row in rows_of(run / "predictions.csv")] == originals
    with np.load(run / "fusion.npz") as fusion:
        assert fusion["id"].tolist() == originals
        assert len(fusion["logits"]) == len(fusion["embedding"]) == len(originals)

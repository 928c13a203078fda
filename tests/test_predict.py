"""Prediction: which files are labelled, how they are scored, and which models are refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import FAST, ROOT, documented_python, rows_of, write_sequences
from make_sample import write_sample

import check_data
import emotions
import stats
import train


def predict(data, run, out=None, *more):
    """The exit status of a prediction."""
    folder = [] if out is None else ["--out", str(out)]
    return train.main([str(data), "--predict", str(run), *folder, *more])


def train_and_keep(monkeypatch, arguments):
    """Run the training program; return the outcome of `train.train`, which it does not keep."""
    outcomes, real = [], train.train

    def keep(*given):
        outcomes.append(real(*given))
        return outcomes[0]

    with monkeypatch.context() as patched:
        patched.setattr(train, "train", keep)
        assert train.main(arguments) == 0
    return outcomes[0]


def calibrated_logits(fusion):
    return fusion["logits"] / fusion["temperature"][:, None]


def final_logits(outcome, files):
    """The mean logits of the final models for some files."""
    logits, _ = outcome.ensembles[-1].forward(np.atleast_2d(np.load(file)["emb"]) for file in files)
    return logits.mean(0)


# --- the same answers as in training ---


def test_prediction_uses_the_final_models_of_the_run(trained, tmp_path, monkeypatch):
    run, data = tmp_path / "run", trained / "data"
    outcome = train_and_keep(monkeypatch, [str(data), "--out", str(run), *FAST])
    assert predict(data, run, tmp_path / "out") == 1
    with np.load(tmp_path / "out" / "fusion.npz") as fusion:
        files = [data / f"{name}.npz" for name in fusion["id"]]
        np.testing.assert_allclose(calibrated_logits(fusion), final_logits(outcome, files), atol=1e-5)
        assert set(fusion["temperature"]) == {np.float32(outcome.choices[-1]["temperature"])}
    final = outcome.ensembles[-1]
    with np.load(run / "model.npz") as model:
        np.testing.assert_array_equal(model["mean"], final.mean)
        np.testing.assert_array_equal(model["scale"], final.scale)
        for name, array in final.params.items():
            np.testing.assert_array_equal(model[f"params/{name}"], array)


@pytest.mark.parametrize("pooling", ["attentive", "mean"])
def test_sequences_train_and_are_predicted_alike(tmp_path, jax_stack, pooling, monkeypatch):
    data, run, out = write_sequences(tmp_path / "data"), tmp_path / "run", tmp_path / "out"
    arguments = ["--pooling", pooling, "--folds", "3", "--seeds", "2", "--epochs", "8", "--width", "16"]
    monkeypatch.setattr(train, "MAX_LENGTH_GROUPS", 2)  # each group takes long to compile
    outcome = train_and_keep(monkeypatch, [str(data), "--out", str(run), *arguments])
    assert json.loads((run / "metrics.json").read_text())["ua"] > 0.5
    assert json.loads((run / "config.json").read_text())["pooling"] == pooling

    assert predict(data, run, out) == 0
    rows = rows_of(out / "predictions.csv")
    assert np.mean([row["predicted"] == emotions.EMOTIONS[int(row["file"][6:8]) - 1] for row in rows]) > 0.8
    with np.load(out / "fusion.npz") as fusion:
        files = [data / row["file"] for row in rows]
        np.testing.assert_allclose(calibrated_logits(fusion), final_logits(outcome, files), atol=2e-4)

    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(data / rows[5]["file"], alone)
    assert predict(alone, run, tmp_path / "one") == 0
    (row,) = rows_of(tmp_path / "one" / "predictions.csv")
    for name in emotions.EMOTIONS:
        assert float(row[f"p_{name}"]) == pytest.approx(float(rows[5][f"p_{name}"]), abs=1e-4)

    if pooling == "attentive":  # the documented program on sequences; vectors are tested below
        scope = {}
        exec(documented_python("def probabilities").replace("runs/sample", str(run)), scope)
        for row in rows[::7]:
            expected = scope["probabilities"](np.load(data / row["file"])["emb"])
            written = [float(row[f"p_{name}"]) for name in scope["config"]["classes"]]
            np.testing.assert_allclose(written, expected, atol=1e-5)


def test_prediction_needs_no_labels_and_agrees_with_the_documented_numpy(trained, tmp_path, capsys, monkeypatch):
    plain = tmp_path / "plain"
    plain.mkdir()
    files = sorted((trained / "data").glob("*_*.npz"))
    for number, file in enumerate(files):
        os.link(file, plain / f"{number:03d}.npz")
    assert predict(plain, trained / "first", tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "112 files labelled, 0 left out" in output
    assert "UA" not in output
    assert "not scored" not in output
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sample").symlink_to(trained / "first")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(documented_python("def probabilities"), scope)
    expected = np.stack([scope["probabilities"](np.load(file)["emb"]) for file in files])
    assert scope["config"]["classes"] == list(emotions.EMOTIONS)
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    written = np.array([[float(row[f"p_{name}"]) for name in emotions.EMOTIONS] for row in rows])
    np.testing.assert_allclose(written, expected, atol=1e-5)


def test_prediction_writes_the_same_fusion_file(trained, tmp_path):
    assert predict(trained / "data", trained / "first", tmp_path / "out") == 1
    fusion, own = np.load(tmp_path / "out" / "fusion.npz"), np.load(trained / "first" / "fusion.npz")
    assert set(fusion) == set(own)
    assert fusion["id"].tolist() == own["id"].tolist()
    assert fusion["statistics"] == own["statistics"]
    assert fusion["embedding"].shape == own["embedding"].shape
    assert set(fusion["fold"]) == {0}
    np.testing.assert_array_equal(fusion["label"], own["label"])
    np.testing.assert_array_equal(fusion["speaker"], own["speaker"])
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    np.testing.assert_allclose(fusion["probability"][:, 0], [float(row["p_neutral"]) for row in rows], atol=1e-6)
    np.testing.assert_allclose(stats.probabilities(calibrated_logits(fusion)), fusion["probability"], atol=1e-6)


def test_the_number_of_files_in_memory_changes_no_answer(trained, tmp_path, monkeypatch):
    assert predict(trained / "data", trained / "first", tmp_path / "all") == 1
    monkeypatch.setattr(train, "FORWARD_BATCH", 5)
    assert predict(trained / "data", trained / "first", tmp_path / "few") == 1
    few, whole = (np.load(tmp_path / name / "fusion.npz") for name in ("few", "all"))
    assert few["id"].tolist() == whole["id"].tolist()
    np.testing.assert_allclose(few["logits"], whole["logits"], atol=1e-5)
    np.testing.assert_allclose(few["embedding"], whole["embedding"], atol=1e-5)


# --- scores ---


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


def test_prediction_scores_labelled_files_of_unseen_speakers(trained, tmp_path, capsys):
    data = write_sample(tmp_path / "data", actors=7, dim=24)  # the first four of each corpus are training speakers
    np.savez(data / "nameless.npz", emb=np.load(data / "cremad_1001_IOM_ANG_XX.npz")["emb"] + 1)
    np.savez(data / "cremad_1006_XXX_ANG_XX.npz", emb=np.zeros(24))
    assert predict(data, trained / "first", tmp_path / "out") == 1
    output = capsys.readouterr().out
    fusion, metrics = np.load(tmp_path / "out" / "fusion.npz"), metrics_of(tmp_path / "out")
    unseen = np.isin(fusion["speaker"], [f"{corpus}{n}" for corpus in ("ravdess:0", "cremad:100") for n in (5, 6, 7)])
    label, predicted = fusion["label"][unseen], fusion["probability"][unseen].argmax(1)
    expected = stats.Counts.of(stats.confusion_matrix(label, predicted, 8)).scores()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert (metrics["n_utterances"], metrics["n_speakers"]) == (unseen.sum(), 6)
    assert set(metrics["speakers"]) == set(fusion["speaker"][unseen])
    assert metrics["notes"] == [
        "112 files not scored: the speaker was in the training data",
        "1 file not scored: no known label",
    ]
    assert f"UA (mean recall)  {metrics['ua']:.4f}" in output
    assert output.splitlines()[-1] == str(tmp_path / "out" / "predictions.csv")
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert [row["label"] for row in rows if row["file"] == "nameless.npz"] == [""]
    assert [row["label"] for row in rows if row["file"] == "cremad_1001_IOM_ANG_XX.npz"] == ["angry"]
    assert [row["code"] for row in rows_of(tmp_path / "out" / "skipped.csv")] == ["constant"]
    assert metrics["left_out"] == {"constant": 1}


def test_scores_of_a_prediction_name_the_corpora_in_their_first_line(trained, tmp_path, capsys):
    data = write_sample(tmp_path / "data", actors=6, dim=24)
    for path in data.glob("cremad*"):
        path.unlink()
    assert predict(data, trained / "first", tmp_path / "out") == 0
    line = "transfer: trained on cremad, ravdess, tested on unseen speakers of ravdess"
    assert capsys.readouterr().out.splitlines()[2] == line
    page = (tmp_path / "out" / "report.html").read_text()
    assert line in page
    assert "with fewer than 6 speakers the intervals are unreliable" in page
    assert str(tmp_path) not in page
    assert "UA by fold" not in page
    assert "seeds" not in page  # nor any other option of training
    matrix = [list(row.values())[1:] for row in rows_of(tmp_path / "out" / "confusion.csv")]
    assert [list(map(int, row)) for row in matrix] == metrics_of(tmp_path / "out")["confusion"]


def test_files_of_training_speakers_are_not_scored(trained, tmp_path, capsys):
    assert predict(trained / "data", trained / "first", tmp_path / "out", "--new-speakers") == 1
    assert "note: 112 files not scored: the speaker was in the training data\n" in capsys.readouterr().out
    assert not (tmp_path / "out" / "metrics.json").exists()


def write_table(folder, speaker):
    """A table with the labels that the names of a sample have, and speakers named by a function of the name."""
    parsed = {path.name: emotions.parse_name(path.name, "ravdess") for path in sorted(folder.glob("ravdess*"))}
    lines = [f"{name},{utterance.emotion},{speaker(utterance)}" for name, utterance in parsed.items()]
    table = folder.parent / "table.csv"
    table.write_text("\n".join(["file,emotion,speaker", *lines]))
    return ["--labels", str(table)], len(lines)


@pytest.mark.parametrize(
    ("speaker", "n_speakers", "notes"),
    [
        (lambda utterance: utterance.speaker, 4, ["new to the model by --new-speakers alone"]),
        (lambda utterance: "", 0, ["new to the model by --new-speakers alone", "the intervals are too narrow"]),
    ],
)
def test_new_speakers_states_what_names_cannot_tell(trained, tmp_path, capsys, speaker, n_speakers, notes):
    data, out = write_sample(tmp_path / "data", actors=4, dim=24), tmp_path / "out"
    labels, count = write_table(data, speaker)
    assert predict(data, trained / "first", out, *labels) == 0
    assert f"{count} files not scored: the names do not show whether the speaker was in" in capsys.readouterr().out
    assert predict(data, trained / "first", out, *labels, "--new-speakers") == 0
    metrics = metrics_of(out)
    assert (metrics["n_utterances"], metrics["n_speakers"], len(metrics["speakers"])) == (count, n_speakers, n_speakers)
    assert all(any(note in found for found in metrics["notes"]) for note in notes)
    assert "tested on unseen speakers of a corpus of your own" in capsys.readouterr().out


def test_fewer_classes_share_the_probability(trained, tmp_path):
    data = write_sample(tmp_path / "data", actors=6, dim=24)
    assert predict(data, trained / "first", tmp_path / "all") == 0
    assert predict(data, trained / "first", tmp_path / "few", "--classes", "sad,happy") == 0
    whole, few = (np.load(tmp_path / name / "fusion.npz") for name in ("all", "few"))
    assert few["classes"].tolist() == ["happy", "sad"]
    kept = whole["probability"][:, [2, 3]]
    np.testing.assert_allclose(few["probability"], kept / kept.sum(1, keepdims=True), rtol=1e-4)
    np.testing.assert_array_equal(few["label"], np.where(np.isin(whole["label"], (2, 3)), whole["label"] - 2, -1))
    metrics, every = metrics_of(tmp_path / "few"), metrics_of(tmp_path / "all")
    assert metrics["n_utterances"] == sum(map(sum, every["confusion"][2:4]))
    assert metrics["chance_ua"] == 0.5
    assert "answers among 2 of the model's 8 classes, whose probabilities are renormalised" in metrics["notes"][0]
    assert any("label is not among the classes: angry, calm, disgust, fear" in note for note in metrics["notes"])
    assert {row["label"] for row in rows_of(tmp_path / "few" / "predictions.csv")} == set(emotions.EMOTIONS)


def test_fewer_classes_need_no_labels(trained, tmp_path, capsys):
    source = next((trained / "data").glob("ravdess*.npz"))
    shutil.copy(source, tmp_path / "x.npz")
    assert predict(tmp_path / "x.npz", trained / "first", tmp_path / "out", "--classes", "sad,happy") == 0
    assert "note: --classes: answers among 2 of the model's 8 classes" in capsys.readouterr().out


def test_classes_that_no_scored_file_has_are_noted(trained, tmp_path):
    data = write_sample(tmp_path / "data", actors=6, dim=24)
    for path in [*data.glob("ravdess*")]:
        path.unlink()
    assert predict(data, trained / "first", tmp_path / "out") == 0
    assert any("no scored file is calm, surprise, but" in note for note in metrics_of(tmp_path / "out")["notes"])


def test_a_prediction_without_scores_leaves_none_of_an_earlier_one(trained, tmp_path):
    out = tmp_path / "out"
    assert predict(write_sample(tmp_path / "data", actors=6, dim=24), trained / "first", out) == 0
    assert predict(trained / "data", trained / "first", out) == 1
    assert {path.name for path in out.iterdir()} == {"fusion.npz", "predictions.csv", "skipped.csv"}


def test_the_results_of_a_run_are_no_prediction_even_if_only_some_are_there(trained, tmp_path, caplog):
    out = tmp_path / "out"
    for name in ("predictions.csv", "metrics.json"):
        out.mkdir(exist_ok=True)
        shutil.copy(trained / "first" / name, out)
    assert predict(trained / "data", trained / "first", out) == 2
    assert "holds the results of a training run" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("training_speakers", "speaker", "unseen"),
    [
        (("ravdess:01",), "ravdess:02", True),
        (("ravdess:01",), "cremad:1001", True),
        (("ravdess:01",), "ravdess:01", False),
        (("ravdess:01",), None, False),
        (("", "ravdess:01"), "ravdess:02", False),  # an unknown training speaker may be anybody
        ((), "ravdess:02", False),
        (("own:1",), "ravdess:02", False),  # custom names cannot be compared with those of a corpus
        (("ravdess:01",), "own:2", False),
        (("own:1", "ravdess:01"), "own:2", False),
        (("own:1",), "own:2", True),
    ],
)
def test_a_speaker_is_unseen_only_if_that_is_certain(training_speakers, speaker, unseen):
    model = train.Model(**dict.fromkeys(train.Model._fields))._replace(speakers=training_speakers)
    assert model.is_unseen_speaker(speaker) == unseen


# --- which files are labelled ---


def test_prediction_leaves_out_features_of_an_absurd_scale(trained, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data)
    files = sorted(path.name for path in data.glob("ravdess*"))[:4]
    for name, factor in zip(files, (1e30, 1e36, 1e-30, 1e6)):
        np.savez(data / name, emb=(np.load(data / name)["emb"] * np.float32(factor)).astype(np.float32))
    assert predict(data, trained / "first", tmp_path / "out") == 1
    rows = [(row["file"], row["code"]) for row in rows_of(tmp_path / "out" / "skipped.csv")]
    assert [row for row in rows if row[1] != "empty"] == [(name, "absurd-scale") for name in files]
    assert np.isfinite(np.load(tmp_path / "out" / "fusion.npz")["probability"]).all()


def test_a_misspelled_class_is_named(trained, tmp_path, caplog):
    assert predict(trained / "data", trained / "first", tmp_path / "out", "--classes", "hapyy") == 2
    assert "the model has no class hapyy; it has neutral, calm" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("did you mean happy?")
    assert predict(trained / "data", trained / "first", tmp_path / "out", "--classes", "sad") == 2
    assert "--classes must be at least two classes of the model" in caplog.messages[-1]


def test_prediction_merges_labels_as_the_training_did(tmp_path, jax_stack):
    data, run, out = write_sample(tmp_path / "data", actors=3, dim=24), tmp_path / "run", tmp_path / "out"
    assert train.main([str(data), "--out", str(run), "--merge", "calm=neutral", *FAST]) == 0
    assert predict(data, run, out) == 0
    assert {row["label"] for row in rows_of(out / "predictions.csv")} == set(emotions.EMOTIONS) - {"calm"}


def test_prediction_takes_a_single_file_and_needs_no_jax(trained, tmp_path):
    file = next((trained / "data").glob("ravdess*.npz"))
    code = "import sys; sys.modules['jax'] = None; import train; sys.exit(train.main(sys.argv[1:]))"
    arguments = [str(file), "--predict", str(trained / "first"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "1 file labelled, 0 left out" in done.stdout
    assert done.stderr == ""
    (row,) = rows_of(tmp_path / "out" / "predictions.csv")
    (before,) = [row for row in rows_of(trained / "first" / "predictions.csv") if row["file"] == file.name]
    assert (row["file"], row["label"]) == (file.name, before["label"])


def test_results_go_into_the_run_unless_a_folder_is_given(trained, tmp_path):
    shutil.copytree(trained / "first", tmp_path / "run")
    assert train.main([str(trained / "data"), "--predict", str(tmp_path / "run")]) == 1
    names = {path.name for path in (tmp_path / "run" / "predict-data").iterdir()}
    assert names == {"fusion.npz", "predictions.csv", "skipped.csv"}


def test_prediction_writes_nothing_among_the_features(trained, tmp_path, caplog):
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data)
    before = sorted(data.iterdir())
    for given in (data, before[-1]):
        assert predict(given, trained / "first", data) == 2
        assert "is the feature folder, or contains features" in caplog.messages[-1]
    assert sorted(data.iterdir()) == before
    assert predict(data, trained / "first", data / "out") == 1
    assert len(check_data.scan(check_data.ScanOptions(str(data))).records) == 112


def test_a_run_has_no_features_to_predict(trained, tmp_path, caplog):
    assert predict(trained / "first", trained / "first", tmp_path / "out") == 2
    assert "\n" not in caplog.messages[-1]
    assert not (tmp_path / "out").exists()


def test_prediction_never_overwrites_a_training_run(trained, caplog):
    before = {path.name: path.read_bytes() for path in (trained / "second").iterdir()}
    assert predict(trained / "data", trained / "first", trained / "second") == 2
    assert "holds the results of a training run" in caplog.messages[-1]
    assert {path.name: path.read_bytes() for path in (trained / "second").iterdir()} == before


@pytest.mark.parametrize("dim", [7, 48])
def test_prediction_refuses_features_of_another_width(trained, tmp_path, dim, caplog):
    other = write_sample(tmp_path / "other", actors=1, dim=dim)
    assert predict(other, trained / "first", tmp_path / "out") == 2
    assert "no file can be used; the model needs 24-dimensional features" in caplog.messages[-1]


def test_prediction_refuses_a_width_other_than_the_models(trained, tmp_path, caplog):
    assert predict(trained / "data", trained / "first", tmp_path / "out", "--dim", "12") == 2
    assert "--dim is 12, but the model needs features 24 wide" in caplog.messages[-1]


# --- other encoders ---


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, jax_stack):
    """Features with a mean that is large beside their deviations, as those of an encoder, and a run on them."""
    place = tmp_path_factory.mktemp("encoded")
    signature = 20 * np.random.default_rng(5).normal(size=24)
    for path in write_sample(place / "data", actors=4, dim=24).iterdir():
        np.savez(path, emb=np.load(path)["emb"] + signature)
    assert train.main([str(place / "data"), "--out", str(place / "run"), *FAST]) == 0
    return place


def test_prediction_leaves_out_files_of_another_encoder(encoded, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(encoded / "data", data)
    files = sorted(path.name for path in data.glob("ravdess*"))
    for name in files[:3]:
        np.savez(data / name, emb=np.load(data / name)["emb"][::-1])
    np.savez(data / files[3], emb=3 * np.load(data / files[3])["emb"])  # another scale is no other encoder
    assert predict(data, encoded / "run", tmp_path / "out") == 1
    assert "109 files labelled, 3 left out" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out" / "skipped.csv")
    assert [(row["file"], row["code"]) for row in rows] == [(name, "other-encoder") for name in files[:3]]
    assert "the order of its dimensions correlates by" in rows[0]["reason"]


def test_a_folder_of_another_encoder_is_refused(encoded, tmp_path, caplog):
    data = tmp_path / "data"
    shutil.copytree(encoded / "data", data)
    for path in data.glob("*.npz"):
        np.savez(path, emb=np.load(path)["emb"][::-1])
    assert predict(data, encoded / "run", tmp_path / "out") == 2
    assert "no file can be used" in caplog.messages[-1]
    assert not (tmp_path / "out").exists()


def supply_statistics(folder, mean):
    np.save(folder / stats.MEAN_FILE, mean)
    np.save(folder / stats.STD_FILE, np.ones_like(mean))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mean: mean[::-1], "is of another encoder than the model"),
        (lambda mean: mean[:20], "has 1 x 20 numbers, but the model needs 1 x 24"),
    ],
)
def test_statistics_of_another_encoder_are_refused(encoded, tmp_path, change, message, caplog):
    data, mean = tmp_path / "data", np.load(encoded / "run" / stats.MEAN_FILE)
    shutil.copytree(encoded / "data", data, ignore=shutil.ignore_patterns("wav2vec*"))
    supply_statistics(data, change(mean))
    assert predict(data, encoded / "run", tmp_path / "out") == 2
    assert f"wav2vec_mean.npy {message}" in caplog.messages[-1]
    assert not (tmp_path / "out").exists()


def test_statistics_of_the_same_encoder_are_accepted_but_the_models_own_are_used(encoded, tmp_path):
    data, mean = tmp_path / "data", np.load(encoded / "run" / stats.MEAN_FILE)
    shutil.copytree(encoded / "data", data, ignore=shutil.ignore_patterns("wav2vec*"))
    assert predict(data, encoded / "run", tmp_path / "without") == 0
    supply_statistics(data, mean * 1.1)
    assert predict(data, encoded / "run", tmp_path / "with") == 0
    without, supplied = (tmp_path / name / "predictions.csv" for name in ("without", "with"))
    assert supplied.read_bytes() == without.read_bytes()


def test_features_that_were_normalised_are_never_of_another_encoder(trained, tmp_path):
    """Their mean is near 0 and identifies no encoder."""
    assert json.loads((trained / "first" / "config.json").read_text())["encoder_similarity"] < 0.2
    other = write_sample(tmp_path / "other", actors=1, dim=24, seed=3)
    assert predict(other, trained / "first", tmp_path / "out") == 0


# --- which array, and its form ---


def test_a_single_npy_file_is_labelled(trained, tmp_path):
    source = next((trained / "data").glob("ravdess*.npz"))
    np.save(tmp_path / "one.npy", np.load(source)["emb"])
    assert predict(tmp_path / "one.npy", trained / "first", tmp_path / "out") == 0
    assert np.load(tmp_path / "out" / "fusion.npz")["id"].tolist() == ["one"]


def test_a_model_of_vectors_refuses_a_matrix(trained, tmp_path, caplog):
    np.savez(tmp_path / "x.npz", emb=np.stack([np.load(f)["emb"] for f in (trained / "data").glob("ravdess*.npz")]))
    assert predict(tmp_path / "x.npz", trained / "first", tmp_path / "out") == 2
    reason = "has 64 rows, and the model was trained on vectors: as many utterances, the layers"
    assert f"several-rows {reason}" in caplog.text
    assert train.load_model(trained / "first").reject(np.ones((2, 24)))[0] == "several-rows"


def test_the_key_of_the_model_is_demanded_unless_another_is_given(trained, tmp_path, caplog):
    assert json.loads((trained / "first" / "config.json").read_text())["keys"] == ["emb"]
    assert json.loads((trained / "first" / "metrics.json").read_text())["arrays"] == {"emb": 112}
    source = np.load(next((trained / "data").glob("ravdess*.npz")))["emb"]
    np.savez(tmp_path / "x.npz", features=source, wavlm=source)
    assert predict(tmp_path / "x.npz", trained / "first", tmp_path / "out") == 2
    assert "no-key has no array emb; it holds features, wavlm" in caplog.text
    assert predict(tmp_path / "x.npz", trained / "first", tmp_path / "out", "--key", "wavlm") == 0


# --- damaged models ---


def damage_config(run, **changes):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | changes))


def damage_options(run, **changes):
    damage_config(run, options=json.loads((run / "config.json").read_text())["options"] | changes)


def damage_model(run, **changes):
    """Replace arrays by the last part of their names; None removes them."""
    with np.load(run / "model.npz") as model:
        arrays = {name: changes.get(name.rpartition("/")[2], model[name]) for name in model}
        arrays |= {name: changes[name] for name in changes if name == "add"}
    np.savez(run / "model.npz", **{name: array for name, array in arrays.items() if array is not None})
    damage_config(run, model=hashlib.sha256((run / "model.npz").read_bytes()).hexdigest())


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


NOT_FINISHED, NOT_TOGETHER, NOT_FINITE = (
    "contains no finished model",
    "do not belong together",
    "NaN or Inf, or a scale",
)
DAMAGES = {
    "no folder": (shutil.rmtree, NOT_FINISHED),
    "no model.npz": (lambda run: (run / "model.npz").unlink(), NOT_FINISHED),
    "model.npz cut off": (lambda run: (run / "model.npz").write_bytes(b"PK\x03\x04"), NOT_FINISHED),
    "config.json a list": (lambda run: (run / "config.json").write_text("[1]"), NOT_FINISHED),
    "config.json too deep": (lambda run: (run / "config.json").write_text("[" * 200000), NOT_FINISHED),
    "config.json a FIFO": (lambda run: replace_by_fifo(run / "config.json"), NOT_FINISHED),
    "another format": (lambda run: damage_config(run, format=2), "another version of train.py; train again"),
    "too few classes": (lambda run: damage_config(run, classes=["happy", "sad"]), NOT_TOGETHER),
    "one class eight times": (lambda run: damage_config(run, classes=["happy"] * 8), NOT_FINISHED),
    "another width": (lambda run: damage_config(run, dim=12), NOT_TOGETHER),
    "a width in words": (lambda run: damage_config(run, dim="wide"), NOT_FINISHED),
    "an infinite width": (lambda run: damage_config(run, dim=float("inf")), NOT_FINISHED),
    "a huge similarity": (lambda run: damage_config(run, encoder_similarity=10**400), NOT_FINISHED),
    "similarity NaN": (lambda run: damage_config(run, encoder_similarity=float("nan")), NOT_FINISHED),
    "temperature NaN": (lambda run: damage_config(run, temperature=float("nan")), NOT_FINISHED),
    "temperature 0": (lambda run: damage_config(run, temperature=0), NOT_FINISHED),
    "a negative rms": (lambda run: damage_config(run, rms=-1), NOT_FINISHED),
    "merge a number": (lambda run: damage_options(run, merge=1), NOT_FINISHED),
    "merge without =": (lambda run: damage_options(run, merge=[1]), NOT_FINISHED),
    "adapt a list": (lambda run: damage_options(run, adapt=["all"]), NOT_FINISHED),
    "adapt to none": (lambda run: damage_options(run, adapt="0"), NOT_FINISHED),
    "a layer in words": (lambda run: damage_options(run, layer="last"), NOT_FINISHED),
    "no options": (lambda run: damage_config(run, options=None), NOT_FINISHED),
    "several layers": (lambda run: damage_config(run, layers=2), NOT_FINISHED),
    "no layers": (lambda run: damage_config(run, layers=0), NOT_FINISHED),
    "layers NaN": (lambda run: damage_config(run, layers=float("nan")), NOT_FINISHED),
    "a prior of 0": (lambda run: damage_config(run, prior=0), NOT_FINISHED),
    "prior NaN": (lambda run: damage_config(run, prior=float("nan")), NOT_FINISHED),
    "a prior in words": (lambda run: damage_config(run, prior="high"), NOT_FINISHED),
    "no length": (lambda run: damage_config(run, longest=None), NOT_FINISHED),
    "no corpora": (lambda run: damage_config(run, corpora=None), NOT_FINISHED),
    "no speakers": (lambda run: damage_config(run, speakers=None), NOT_FINISHED),
    "another pooling": (lambda run: damage_config(run, pooling="attentive"), NOT_FINISHED),
    "a scale of 0": (lambda run: damage_model(run, scale=np.zeros(24, np.float32)), NOT_FINITE),
    "a narrow scale": (lambda run: damage_model(run, scale=np.ones(3, np.float32)), NOT_TOGETHER),
    "mean NaN": (lambda run: damage_model(run, mean=np.full(24, np.nan, np.float32)), NOT_FINITE),
    "the model of another run": (lambda run: damage_config(run, model="0" * 64), NOT_TOGETHER),
    "no biases": (lambda run: damage_model(run, bias=None), NOT_FINISHED),
    "a further array": (lambda run: damage_model(run, add=np.zeros(1)), NOT_FINISHED),
    "a huge config.json": (lambda run: (run / "config.json").write_bytes(b" " * (1 << 24) + b"{}"), NOT_FINISHED),
    "a huge model.npz": (lambda run: os.truncate(run / "model.npz", (1 << 30) + 1), NOT_FINISHED),
    "no classes": (lambda run: damage_config(run, classes=[]), NOT_FINISHED),
    "a class of a million letters": (lambda run: damage_config(run, classes=["x" * 10**6]), NOT_FINISHED),
    "a thousand classes": (lambda run: damage_config(run, classes=[str(n) for n in range(1000)]), NOT_FINISHED),
    "no width": (lambda run: damage_config(run, dim=0), NOT_FINISHED),
    "a pooling that nobody knows": (lambda run: damage_config(run, pooling="max"), NOT_FINISHED),
    "a checkpoint": (lambda run: (run / "checkpoint-0.npz").write_bytes(b""), "holds an unfinished run"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_missing_or_damaged_model_is_refused(trained, tmp_path, damage, message, caplog):
    shutil.copytree(trained / "first", tmp_path / "run")
    damage(tmp_path / "run")
    assert predict(trained / "data", tmp_path / "run", tmp_path / "out") == 2
    assert message in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]
    assert not (tmp_path / "out").exists()


def test_an_intact_model_is_loaded_whole(trained):
    model = train.load_model(trained / "first")
    config = json.loads((trained / "first" / "config.json").read_text())
    assert (list(model.classes), model.dim, model.merge) == (config["classes"], 24, ())
    assert (list(model.speakers), model.temperature) == (config["speakers"], config["temperature"])
    assert (model.layers, model.layer, model.adapt, model.prior) == (1, None, None, np.inf)
    assert model.ensemble.mean.shape == model.ensemble.scale.shape == (24,)
    shapes = {name: array.shape for name, array in model.ensemble.params.items()}
    assert shapes == {
        "Dense_0/bias": (2, 32),
        "Dense_0/kernel": (2, 24, 32),
        "Dense_1/bias": (2, 8),
        "Dense_1/kernel": (2, 32, 8),
        "linear/bias": (2, 8),
        "linear/kernel": (2, 24, 8),
    }


def test_a_model_is_refused_by_the_names_in_it_before_its_data_are_read(trained, tmp_path, monkeypatch, caplog):
    shutil.copytree(trained / "first", tmp_path / "run")
    damage_model(tmp_path / "run", bias=None)
    monkeypatch.setattr(check_data, "_extract", None)  # reads the data
    with pytest.raises(check_data.UsageError, match="does not contain the expected"):
        train.load_model(tmp_path / "run")


def test_an_answer_that_is_not_finite_is_a_finding_and_no_class(trained, tmp_path, monkeypatch, capsys):
    forward = train.Ensemble.forward

    def overflow(ensemble, features, others):
        logits, hidden = forward(ensemble, features, others)
        logits[0, 3, 1] = np.nan
        return logits, hidden

    monkeypatch.setattr(train.Ensemble, "forward", overflow)
    assert predict(trained / "data", trained / "first", tmp_path / "out") == 1
    (finding,) = [row for row in rows_of(tmp_path / "out" / "skipped.csv") if row["code"] == "overflow"]
    files = [row["file"] for row in rows_of(tmp_path / "out" / "predictions.csv")]
    assert finding["file"] not in files
    assert len(files) == len(np.load(tmp_path / "out" / "fusion.npz")["id"]) == 112 - 1


@pytest.mark.parametrize("name", ["predictions.csv", "skipped.csv", "fusion.npz"])
def test_prediction_replaces_no_file_of_another_program(trained, tmp_path, name, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("file,score\n")
    assert predict(trained / "data", trained / "first", out) == 2
    assert "which is not of this program" in caplog.messages[-1] or "feature folder" in caplog.messages[-1]
    assert [path.read_text() for path in out.iterdir()] == ["file,score\n"]
    (out / name).unlink()
    assert predict(trained / "data", trained / "first", out) == 1
    assert predict(trained / "data", trained / "first", out) == 1  # its own


def test_a_link_in_the_folder_of_the_model_is_never_followed(trained, tmp_path, caplog):
    run, own = shutil.copytree(trained / "first", tmp_path / "run"), tmp_path / "own"
    own.mkdir()
    (run / "predict-data").symlink_to(own)
    assert predict(trained / "data", run) == 2
    assert predict(trained / "data", run, run / "predict-data" / "deeper") == 2
    assert "has a link there" in caplog.messages[-1]
    assert not list(own.iterdir())


def test_predictions_are_not_written_among_other_features(trained, tmp_path, caplog):
    data = shutil.copytree(trained / "data", tmp_path / "data" / "inner").parent
    for out in (data / "inner", data):
        assert predict(data, trained / "first", out) == 2
    assert "feature folder" in caplog.messages[-1]


def test_a_link_to_itself_is_refused_in_one_line(trained, tmp_path, caplog):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    data, run = trained / "data", trained / "first"
    for arguments in ((loop, "--predict", run), (data, "--predict", loop), (data, "--predict", run, "--out", loop)):
        assert train.main([str(argument) for argument in arguments]) == 2
    assert train.main([str(loop)]) == train.main([str(data), "--out", str(loop)]) == 2
    assert not any("\n" in message for message in caplog.messages)

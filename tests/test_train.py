import contextlib
import csv
import dataclasses
import errno
import html.parser
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from make_sample import write_sample

import check_data
import emotions
import stats
import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = train.Config("DIR", width=8, epochs=4, seeds=2, folds="3", batch=32)


def dataset_of(folder):
    return train.pack(check_data.scan(check_data.ScanOptions(str(folder)), keep_features=True))


def ours(dataset):
    return stats.Stored(dataset.moments.merged().statistics(), False, "print")


def utterance(speaker, emotion="happy", corpus="ravdess", file="x"):
    return emotions.Utterance(file, corpus, emotion, speaker)


def bare_dataset(speakers, labels, corpus="ravdess"):
    """Utterances without features, for everything that is decided by speaker and label."""
    classes = ("happy", "sad", "angry")
    utterances = [utterance(s, classes[c], corpus, f"{n:04d}") for n, (s, c) in enumerate(zip(speakers, labels))]
    return train.Dataset(np.zeros((len(labels), 2)), np.ones(len(labels)), np.array(labels), classes, utterances, None)


def many_speakers(count, each=9):
    return bare_dataset(
        [f"ravdess:{n:02d}" for n in range(1, count + 1) for _ in range(each)], [0, 1, 2] * (count * each // 3)
    )


def sides(plan, seeds):
    for member, (training, validation) in enumerate(zip(plan.train, plan.validation)):
        yield training, validation, plan.fold == member // seeds


# --- options ---


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seeds", 0),
        ("epochs", 0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("dropout", 1.0),
        ("dim", 0),
    ],
)
def test_impossible_options_are_refused_by_name(option, value):
    with pytest.raises(check_data.UsageError, match=f"--{option.replace('_', '-')} must be"):
        dataclasses.replace(SMALL, **{option: value})


def test_the_command_line_has_every_option_with_its_type():
    config = train.parse_config(["D", "--dropout", "0.25", "--seeds", "3", "--dim", "7", "--recompute-stats"])
    assert config == train.Config("D", dropout=0.25, seeds=3, dim=7, recompute_stats=True)


def test_help_answers_without_jax():
    code = "import sys; sys.modules['jax'] = None; import train; train.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--learning-rate" in done.stdout


def test_the_readme_names_every_option():
    readme = (ROOT / "README.md").read_text()
    for field in dataclasses.fields(train.Config)[1:]:
        assert f"`--{field.name.replace('_', '-')}" in readme


# --- who trains whom ---


@pytest.mark.parametrize("folds", ["2", "5", "leave-one-speaker-out", "emobox-ravdess", "luna-ravdess"])
@pytest.mark.parametrize("seeds", [1, 2, 5, 7])
def test_no_speaker_is_on_two_sides(folds, seeds):
    plan = train.make_plan(many_speakers(24), dataclasses.replace(SMALL, folds=folds, seeds=seeds))
    assert plan.train.shape == (seeds * (plan.folds + 1), 24 * 9)
    for training, validation, tested in sides(plan, seeds):
        parts = [set(plan.speaker[part]) for part in (training, validation, tested)]
        assert not parts[0] & parts[1]
        assert not (parts[0] | parts[1]) & parts[2]
        assert parts[0] | parts[1] | parts[2] == set(plan.speaker)
        assert parts[0]
        assert parts[1]


def test_every_speaker_is_tested_once_and_the_final_model_tests_nobody():
    plan = train.make_plan(many_speakers(10), SMALL)
    assert set(plan.fold) == {0, 1, 2}
    final = list(sides(plan, SMALL.seeds))[-SMALL.seeds :]
    assert not any(tested.any() for _, _, tested in final)


def test_the_seeds_of_a_fold_train_on_all_its_speakers_together():
    config = dataclasses.replace(SMALL, seeds=5)
    plan = train.make_plan(many_speakers(10), config)
    for fold in range(4):
        members = range(fold * 5, fold * 5 + 5)
        assert (plan.train[members].any(0) == (plan.fold != fold)).all()
        assert (plan.validation[members].sum(0) == (plan.fold != fold)).all()


@pytest.mark.parametrize("broken", ["train", "validation"])
def test_a_leaking_plan_is_caught(broken):
    plan = train.make_plan(many_speakers(6), SMALL)
    train.check_disjoint(plan)
    leak = getattr(plan, broken).copy()
    leak[0, np.flatnonzero(plan.fold == 0)[0]] = True
    with pytest.raises(RuntimeError, match="two sides"):
        train.check_disjoint(plan._replace(**{broken: leak}))


def test_a_speaker_split_between_training_and_test_is_caught():
    plan = train.make_plan(many_speakers(6), SMALL)
    moved = plan.fold.copy()
    moved[np.flatnonzero(plan.fold == 0)[0]] = 1
    leak = plan.train.copy()
    leak[: SMALL.seeds] = (moved != 0) & ~plan.validation[: SMALL.seeds]
    with pytest.raises(RuntimeError, match="a speaker is on two sides"):
        train.check_disjoint(plan._replace(fold=moved, train=leak))


def test_blocks_keep_groups_together_and_classes_balanced():
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(30), random.integers(4, 40, 30))
    label = random.integers(0, 4, len(group))
    block = train.balanced_blocks(group, label, 5, seed=0)
    assert all(len(set(block[group == g])) == 1 for g in range(30))
    counts = np.zeros((5, 4))
    np.add.at(counts, (block, label), 1)
    assert (np.abs(counts / counts.mean(0) - 1) < 0.15).all()


def test_no_block_is_empty_while_there_are_groups():
    group = np.arange(5)
    assert sorted(train.balanced_blocks(group, np.array([0, 1, 2, 3, 4]), 5, seed=0)) == [0, 1, 2, 3, 4]


def test_the_official_blocks_are_the_test_folds():
    plan = train.make_plan(many_speakers(24), dataclasses.replace(SMALL, folds="luna-ravdess"))
    for fold, block in enumerate(emotions.SCHEMES["luna-ravdess"].test_speakers):
        assert set(plan.speaker[plan.fold == fold]) == set(block)


def test_the_next_block_validates_where_the_source_says_so():
    speakers = [f"cremad:{actor}" for actor in range(1001, 1092)]
    plan = train.make_plan(
        bare_dataset(speakers * 3, [0] * 91 + [1] * 91 + [2] * 91, "cremad"),
        dataclasses.replace(SMALL, folds="emosuperb-cremad"),
    )
    blocks = emotions.SCHEMES["emosuperb-cremad"].test_speakers
    for member in range(5 * SMALL.seeds):
        fold = member // SMALL.seeds
        assert set(plan.speaker[plan.validation[member]]) == set(blocks[(fold + 1) % 5])


def test_an_official_scheme_refuses_strangers_and_notes_who_is_missing():
    config = dataclasses.replace(SMALL, folds="emobox-ravdess")
    with pytest.raises(check_data.UsageError, match="knows no speaker ravdess:25"):
        train.make_plan(many_speakers(25), config)
    assert "4 speakers of emobox-ravdess are not here" in train.make_plan(many_speakers(20), config).notes[0]


@pytest.mark.parametrize("folds", ["1", "0", "-3", "five", "emobox-cremad"])
def test_folds_that_mean_nothing_are_refused(folds):
    with pytest.raises(check_data.UsageError, match="--folds"):
        train.make_plan(many_speakers(6), dataclasses.replace(SMALL, folds=folds))


def test_fewer_speakers_than_folds_are_said():
    plan = train.make_plan(many_speakers(3), dataclasses.replace(SMALL, folds="5"))
    assert (plan.folds, plan.notes) == (3, ["3 speakers allow 3 folds, not 5"])


def test_a_split_that_leaves_nobody_to_train_on_is_refused():
    speakers = [f"cremad:{actor}" for actor in range(1001, 1037)]
    dataset = bare_dataset(speakers, [0, 1, 2] * 12, "cremad")
    with pytest.raises(check_data.UsageError, match="leaves nobody to train on"):
        train.make_plan(dataset, dataclasses.replace(SMALL, folds="emosuperb-cremad"))
    lonely = bare_dataset(["ravdess:01"] * 29 + ["ravdess:02"], [0, 1, 2] * 10)
    with pytest.raises(check_data.UsageError, match="leaves nobody to train on"):
        train.make_plan(lonely, SMALL)


def test_a_class_that_is_tested_but_not_trained_on_is_said():
    speakers = [f"ravdess:{n:02d}" for n in range(1, 7) for _ in range(6)]
    plan = train.make_plan(bare_dataset(speakers, [0, 1, 0, 1, 2, 2] + [0, 1] * 15), SMALL)
    fold = plan.fold[0] + 1
    assert plan.notes == [f"fold {fold} tests angry without having trained on it: too few speakers have it"]


def test_two_speakers_are_tested_apart_but_validated_together():
    plan = train.make_plan(many_speakers(2, 30), SMALL)
    assert not train.check_disjoint(plan)
    assert (plan.folds, plan.independent) == (2, True)
    assert any("validation takes a part of the same speaker" in note for note in plan.notes)


@pytest.mark.parametrize("speaker", [None, "ravdess:01"])
def test_names_without_two_speakers_are_never_called_independent(speaker):
    plan = train.make_plan(bare_dataset([speaker] * 30, [0, 1, 2] * 10), SMALL)
    assert not plan.independent
    assert "NOT speaker-independent" in plan.notes[0]
    with pytest.raises(check_data.UsageError, match="needs names that tell their speakers"):
        train.make_plan(
            bare_dataset([speaker] * 30, [0, 1, 2] * 10), dataclasses.replace(SMALL, folds="leave-one-speaker-out")
        )


def test_files_without_a_speaker_stay_together_beside_known_speakers():
    speakers = [f"ravdess:{n:02d}" for n in range(5) for _ in range(6)] + [None] * 6
    plan = train.make_plan(bare_dataset(speakers, [0, 1, 2] * 12), SMALL)
    assert len(set(plan.fold[-6:])) == 1
    assert not plan.independent
    assert "6 files do not tell their speaker" in plan.notes[0]


# --- numbers that must not leak ---


def test_the_statistics_of_a_fold_know_its_training_speakers_only(sample):
    dataset = dataset_of(sample)
    plan = train.make_plan(dataset, SMALL)
    mean, scale = train.member_statistics(dataset, plan, ours(dataset))
    for member in range(plan.folds * SMALL.seeds):
        expected = stats.Moments.of(dataset.x[plan.train[member]]).statistics()
        np.testing.assert_allclose(mean[member], expected.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(scale[member], expected.scale(), rtol=1e-5)
    np.testing.assert_array_equal(mean[-1], ours(dataset).statistics.mean)


def test_the_statistics_of_frames_weigh_every_frame_alike(tmp_path):
    folder = write_sample(tmp_path / "data", actors=3, dim=6, frames=True)
    scan = check_data.scan(check_data.ScanOptions(str(folder)), keep_features=True)
    frames = np.concatenate(scan.features)
    np.testing.assert_allclose(ours(train.pack(scan)).statistics.mean, frames.mean(0), atol=1e-5)
    np.testing.assert_allclose(ours(dataset_of(folder)).statistics.std, frames.astype(np.float64).std(0), rtol=1e-5)


def test_statistics_of_the_user_apply_everywhere(sample):
    dataset = dataset_of(sample)
    plan = train.make_plan(dataset, SMALL)
    own = stats.Statistics(np.full(24, 3, np.float32), np.full(24, 2, np.float32))
    mean, scale = train.member_statistics(dataset, plan, stats.Stored(own, True, None))
    assert (mean == 3).all()
    assert (scale == 2).all()


def test_validation_hears_the_validation_speakers_only(sample, jax_stack):
    dataset = dataset_of(sample)
    plan = train.make_plan(dataset, SMALL)
    members = train.stack_members(dataset, plan, ours(dataset), SMALL, 8, len(plan.train) + 1)
    for tables, masks in ((members.train, plan.train), (members.validation, plan.validation)):
        for table, mask in zip(tables, masks):
            assert sorted(table[table >= 0]) == np.flatnonzero(mask).tolist()
    assert members.fold.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, -1]  # the last one only fills up the devices


def test_the_number_of_steps_does_not_depend_on_the_devices(sample, jax_stack, monkeypatch):
    dataset, config = dataset_of(sample), dataclasses.replace(SMALL, folds="2", seeds=1)
    plan, steps = train.make_plan(dataset, config), []
    for devices in (1, 2):
        mesh = jax_stack.sharding.Mesh(np.array(jax_stack.devices()[:devices]), ("population",))
        monkeypatch.setattr(train, "population_mesh", lambda members, mesh=mesh: mesh)
        steps.append(train.set_up(dataset, plan, ours(dataset), config).task.steps)
    assert steps[0] == steps[-1]


def test_class_weights_make_classes_count_alike():
    label = np.array([0, 0, 0, 1, 2])
    weight = train.class_weights(label, np.array([[True] * 5, [True, True, False, True, False]]), 3)
    np.testing.assert_allclose(weight[0], [5 / 9, 5 / 3, 5 / 3])
    np.testing.assert_allclose(weight[1], [3 / 4, 3 / 2, 0])


# --- sequences ---


def sequences_of(lengths, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(5, 2, size=(length, dim)).astype(np.float32) for length in lengths]


def pooled(sequences, query, spare=0):
    """The pooled vectors of the program, with more room in each group than is needed if `spare`."""
    length, jnp = np.array([len(sequence) for sequence in sequences]), train.jnp
    centre = np.full(sequences[0].shape[1], 5, np.float32)
    frames = train.Frames.of([*map(np.copy, sequences), np.zeros((99, len(centre)), np.float32)], centre)
    dataset = train.Dataset(None, np.append(length, 99), np.zeros(len(length) + 1, int), ("sad",), [], None, frames)
    order = np.append(np.argsort(length), -1)
    data = train.device_data(dataset, order[:, None])
    groups = [(rows, longest + spare) for rows, longest in train.length_groups(order[:, None], dataset)]
    task = train.Task(None, None, 1, groups, 1, train.unmixed, None)
    member = train.Member(*[None] * 4, centre + 1, np.full_like(centre, 2), None, None)
    found = np.asarray(train.pool({"query": jnp.asarray(query)}, member, train.fetch(task, data, jnp.asarray(order))))
    assert np.isfinite(found).all()
    return found[np.argsort(order[:-1])]


def test_attentive_statistics_are_those_of_numpy(jax_stack):
    sequences, query = sequences_of([3, 17, 40, 1]), np.linspace(-0.5, 0.5, 6, dtype=np.float32)
    found = pooled(sequences, query)
    for sequence, row in zip(sequences, found):
        x = (sequence.astype(np.float64) - 6) / 2
        weight = np.exp(x @ query) / np.exp(x @ query).sum()
        mean = weight @ x
        deviation = np.sqrt(np.maximum(weight @ np.square(x) - np.square(mean), 1e-6))
        np.testing.assert_allclose(row, np.concatenate([mean, deviation]), atol=2e-4)


def test_padding_changes_no_pooled_vector(jax_stack):
    sequences, query = sequences_of([3, 17, 40, 1]), np.ones(6, np.float32)
    np.testing.assert_allclose(pooled(sequences, query, spare=9), pooled(sequences, query), rtol=1e-6, atol=1e-6)


def test_a_sequence_is_pooled_the_same_in_any_company(jax_stack):
    sequences, query = sequences_of([8, 16, 24, 8]), np.ones(6, np.float32)
    np.testing.assert_allclose(pooled(sequences, query)[1], pooled(sequences[1:2], query)[0], rtol=1e-5, atol=1e-5)


def test_every_batch_takes_one_utterance_of_each_stratum_and_none_twice():
    length = np.random.default_rng(0).integers(10, 500, 203)
    dataset = train.Dataset(None, length, np.zeros(203, int), (), [], None)
    table = train.strata(np.arange(203), dataset, 16)
    assert sorted(table[table >= 0]) == list(range(203))
    batches = np.where(table >= 0, length[table], 0)
    assert batches.max(1).sum() - batches[:-1].min(1).sum() <= length.max() + batches[-1].max()


def test_long_and_short_sequences_together_cost_little_padding(jax_stack):
    """The lengths of RAVDESS and CREMA-D at 50 frames a second, a tenth of the utterances."""
    rng = np.random.default_rng(0)
    length = np.concatenate([rng.normal(185, 17, 144), rng.normal(127, 25, 744)]).astype(int).clip(60)
    dataset = many_speakers(37, 24)._replace(length=length)
    dataset = dataset._replace(frames=train.Frames.of([np.zeros((n, 2), np.float32) for n in length], np.zeros(2)))
    config = dataclasses.replace(SMALL, folds="5", batch=64)
    plan = train.make_plan(dataset, config)
    ours = stats.Stored(stats.Statistics(np.zeros(2), np.ones(2)), True, "")
    task = train.set_up(dataset, plan, ours, config).task
    assert 0 < train.padding_share(dataset, task) < 0.15


def test_the_groups_of_lengths_have_the_least_padding():
    length = np.array([3, 4, 4, 9, 10, 30, 31, 33])
    dataset = train.Dataset(None, length, None, (), [], None)
    groups = train.length_groups(np.arange(8).reshape(4, 2), dataset)
    assert groups == ((1, 4), (1, 9), (1, 30), (1, 33))
    alike = train.length_groups(np.arange(40)[:, None], dataset._replace(length=np.full(40, 7)))
    assert alike == ((40, 7),)
    many = np.sort(np.random.default_rng(0).integers(1, 100, 40))
    groups = train.length_groups(np.arange(40)[:, None], dataset._replace(length=many))
    assert len(groups) == train.GROUPS
    assert sum(rows for rows, _ in groups) == 40
    found = sum(rows * longest for rows, longest in groups)
    rng = np.random.default_rng(1)
    for _ in range(200):
        ends = [*np.sort(rng.choice(np.arange(1, 40), train.GROUPS - 1, replace=False)), 40]
        assert found <= sum((end - begin) * many[end - 1] for begin, end in zip([0, *ends], ends))


@pytest.fixture(scope="module")
def sequences(tmp_path_factory, jax_stack):
    """A population of sequences, whose members walk through the same batches."""
    dataset = dataset_of(write_sequences(tmp_path_factory.mktemp("sequences") / "data"))
    plan = train.make_plan(dataset, SMALL)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "GROUPS", 2)  # they take long to compile
        return Setting(train.set_up(dataset, plan, ours(dataset), SMALL), dataset, plan, jax_stack)


@pytest.fixture(scope="module")
def sequences_outcome(sequences):
    return sequences.run()


def test_a_fold_of_sequences_in_the_population_is_the_fold_alone(sequences, sequences_outcome):
    chosen = slice(2, 4)
    _, alone, _ = sequences.run(sequences.of(sequences.members, chosen))
    sequences.assert_equal(sequences.of(sequences_outcome[1].params, chosen), alone.params, rtol=0, atol=1e-5)


def test_sequences_that_a_member_does_not_train_on_do_not_touch_it(sequences, sequences_outcome):
    others = np.flatnonzero(~sequences.members.train[0])
    rows, length = sequences.dataset.frames.rows.copy(), sequences.dataset.length
    for utterance in others:
        rows[sequences.dataset.frames.first[utterance] :][: length[utterance]] = 1e18
    _, after, _ = sequences.run(rows=rows)
    sequences.assert_equal(sequences.of(after.params, 0), sequences.of(sequences_outcome[1].params, 0))
    assert after.skipped[0] == 0


def test_a_member_validates_on_its_own_sequences(sequences, sequences_outcome):
    _, after, measures = sequences_outcome
    members, length, frames = sequences.members, sequences.dataset.length, sequences.dataset.frames
    for member in range(2):
        one, params = sequences.of(members, member), sequences.of(after.params, member)
        arrays = train.flatten({name: sequences.jax.tree.map(lambda x: x[None], params[name]) for name in params})
        arrays |= {"mean": one.mean, "scale": one.scale}
        arrays |= {"params/linear/kernel": np.zeros((1, 12, 8)), "params/linear/bias": np.zeros((1, 8))}
        model = train.Model((), 12, False, (), (), 0.0, 1.0, 1.0, arrays)
        heard = np.flatnonzero(one.validation)
        own = [frames.rows[frames.first[n] :][: length[n]] + frames.centre for n in heard]
        logits, _ = model.answers(*map(np.stack, zip(*map(model.pool, own))))
        confusion = stats.confusion_matrix(sequences.dataset.label[heard], logits.argmax(1), 8)
        assert measures["validation_ua"][-1, member] == pytest.approx(stats.scores(confusion)["ua"], abs=1e-5)
        expected = stats.balanced_cross_entropy(logits, sequences.dataset.label[heard])
        assert measures["validation_loss"][-1, member] == pytest.approx(expected, rel=1e-3)


def test_the_linear_part_of_sequences_is_that_of_their_means(sequences):
    dataset, plan = sequences.dataset._replace(frames=None), sequences.plan
    means = Setting(train.set_up(dataset, plan, ours(dataset), SMALL), dataset, plan, sequences.jax)
    sequences.assert_equal(sequences.linear(), means.linear(), rtol=1e-2, atol=1e-3)


def test_the_devices_of_a_cpu_share_one_copy_of_the_frames(jax_stack):
    frames = train.Frames.of(sequences_of([30, 3, 17, 40]), np.zeros(6, np.float32))
    dataset = many_speakers(1, 3)._replace(length=np.array([30, 3, 17, 40]), frames=frames)
    mesh = jax_stack.sharding.Mesh(np.array(jax_stack.devices("cpu")), ("population",))
    shards = train.place(mesh, train.device_data(dataset, np.zeros((1, 1), int))).rows.addressable_shards
    assert [shard.data.unsafe_buffer_pointer() for shard in shards] == [frames.rows.ctypes.data] * mesh.size


def write_sequences(folder, seed=0):
    """Frames that tell the emotion only here and there, so that pooling has something to find."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    direction = rng.normal(size=(8, 12)) * 2
    for actor in range(1, 7):
        for emotion in range(1, 9):
            for take in (1, 2):
                frames = rng.normal(size=(rng.integers(8, 30), 12))
                frames[:: rng.integers(2, 5)] += direction[emotion - 1]
                name = f"03-01-{emotion:02d}-01-01-{take:02d}-{actor:02d}.npz"
                np.savez(folder / name, emb=frames.astype(np.float32))
    return folder


@pytest.mark.parametrize("pooling", ["attentive", "mean"])
def test_sequences_train_and_are_predicted_alike(tmp_path, jax_stack, pooling, monkeypatch):
    data, run, out, caught = write_sequences(tmp_path / "data"), tmp_path / "run", tmp_path / "out", []
    monkeypatch.setattr(train, "train", catching(train.train, caught))
    arguments = ["--pooling", pooling, "--folds", "3", "--seeds", "2", "--epochs", "8", "--width", "16"]
    assert train.main([str(data), "--out", str(run), *arguments]) == 0
    assert json.loads((run / "metrics.json").read_text())["ua"] > 0.5
    assert json.loads((run / "config.json").read_text())["pooling"] == pooling
    assert train.main([str(data), "--predict", str(run), "--out", str(out)]) == 0
    rows = rows_of(out / "predictions.csv")
    assert np.mean([row["predicted"] == emotions.EMOTIONS[int(row["file"][6:8]) - 1] for row in rows]) > 0.8
    with np.load(out / "fusion.npz") as fusion:
        np.testing.assert_allclose(fusion["logits"] / fusion["temperature"][:, None], caught[0].logits[-1], atol=2e-4)
    scope, described = {}, (run / "config.json").read_text()
    exec(readme_python("probabilities").replace("runs/sample", str(run)), scope)
    for row in rows[::7] if pooling == "attentive" else []:
        expected = scope["probabilities"](np.load(data / row["file"])["emb"])
        written = [float(row[f"p_{name}"]) for name in json.loads(described)["classes"]]
        np.testing.assert_allclose(written, expected, atol=1e-5)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(data / rows[5]["file"], alone)
    assert train.main([str(alone), "--predict", str(run), "--out", str(tmp_path / "one")]) == 0
    (row,) = rows_of(tmp_path / "one" / "predictions.csv")
    for name in emotions.EMOTIONS:
        assert float(row[f"p_{name}"]) == pytest.approx(float(rows[5][f"p_{name}"]), abs=1e-4)


def catching(function, caught):
    """The function, whose results are kept in a list."""

    def call(*arguments):
        caught.append(function(*arguments))
        return caught[-1]

    return call


# --- the linear part ---


def test_the_linear_part_is_shrunken_discriminant_analysis(setting):
    wanted = np.ones((len(setting.plan.train), len(train.SHRINKAGES)), bool)
    wanted[5, 1:] = False
    kernel, bias = setting.linear(wanted=wanted)
    fewer = setting.linear(setting.plan.train[:7], wanted[:7])  # the last row then fills up the devices
    setting.assert_equal(fewer, [kernel[:7], bias[:7]])
    assert not kernel[5, 1:].any() and not bias[5, 1:].any()
    for member in (0, 5):
        own, used = setting.of(setting.members, member), np.flatnonzero(setting.plan.train[member])
        x, label = (setting.dataset.x[used] - own.mean) / own.scale, setting.dataset.label[used]
        centre = np.stack([x[label == c].mean(0) for c in range(8)])
        rest = (x - centre[label]).astype(np.float64)
        spread = rest.std(0)
        rest = rest / spread
        for shrinkage, k, b in zip(np.array(train.SHRINKAGES)[wanted[member]], kernel[member], bias[member]):
            covariance = (1 - shrinkage) * rest.T @ rest / len(rest) + shrinkage * np.eye(24)
            expected = np.linalg.solve(covariance, (centre / spread).T) / spread[:, None]
            np.testing.assert_allclose(k, expected, rtol=1e-2, atol=1e-3)
            np.testing.assert_allclose(b, -0.5 * (centre * expected.T).sum(1), rtol=1e-2, atol=1e-2)


def test_a_class_that_was_not_trained_on_never_wins_the_linear_part(setting):
    members = setting.members
    kernel, bias = setting.linear(setting.plan.train & (setting.dataset.label != 7))
    for member in (0, 5):
        x = (setting.dataset.x - members.mean[member]) / members.scale[member]
        assert not np.any((x @ kernel[member, 0] + bias[member, 0]).argmax(1) == 7)


def test_the_linear_part_is_the_mean_of_two_of_which_the_second_hears_the_validation_speakers(setting):
    plan, seeds, asked = setting.plan, 2, []

    def solve(used, wanted):
        asked.append((used, wanted))
        return setting.linear(used, wanted)

    rng = np.random.default_rng(0)
    size, hidden = len(plan.train), {"Dense_1": {"bias": np.ones((len(plan.train), 8))}}
    logits = rng.normal(size=(size, len(plan.fold), 8))
    params, sums, told = train.add_linear(setting.dataset, plan, setting.members, hidden, logits, solve)
    (first, every), (second, chosen) = asked
    assert every.all() and (first == plan.train).all() and (second == plan.train | plan.validation).all()
    for member, (fold, test) in enumerate((m // seeds, plan.fold == m // seeds) for m in range(size)):
        assert not second[member, test].any()
        assert np.array(train.SHRINKAGES)[chosen[member]] == [told[fold]["shrinkage"]]
        parts = [setting.linear(used)[0][member][chosen[member]] for used in (first, second)]
        weight = told[fold]["linear"] / told[fold]["temperature"]
        kernel = params["linear"]["kernel"][member]
        np.testing.assert_allclose(kernel, weight * np.mean(parts, 0)[0], rtol=1e-3, atol=1e-5)
        x = (setting.dataset.x - setting.members.mean[member]) / setting.members.scale[member]
        share = told[fold]["hidden"] / told[fold]["temperature"]
        np.testing.assert_allclose(params["Dense_1"]["bias"][member], share, rtol=1e-6)
        expected = share * logits[member]
        expected += x @ kernel + params["linear"]["bias"][member]
        np.testing.assert_allclose(sums[member], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "4(x2)"},
        {"JAX_COORDINATOR_ADDRESS": "nohost", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
    ],
)
def test_a_wrong_word_about_other_processes_is_one_line(jax_stack, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(check_data.UsageError, match="cannot be joined"):
        train.join_hosts()


def test_the_blend_is_chosen_by_the_validation_speakers_alone():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, 200)
    good, bad = 3 * np.eye(4)[label] + rng.normal(size=(200, 4)), rng.normal(size=(200, 4))
    heard, rest = np.arange(100), np.arange(100, 200)
    hidden, linear = bad.copy(), np.stack([good] * len(train.SHRINKAGES))
    blend = stats.choose_blend(hidden[None], linear[None], [heard], label)
    assert blend.linear > 5 * blend.hidden
    hidden[rest] = 100 * np.eye(4)[label[rest]]  # what the validation speakers cannot know
    assert stats.choose_blend(hidden[None], linear[None], [heard], label) == blend
    linear = np.stack([bad, good, *[bad] * (len(train.SHRINKAGES) - 2)])
    blend = stats.choose_blend(5 * good[None], linear[None], [heard], label)
    assert blend.shrinkage == 1
    assert blend.linear == pytest.approx(5 * blend.hidden, rel=0.5)  # two equals count alike, however sure they are
    worse = good + 2 * rng.normal(size=good.shape)
    blend = stats.choose_blend(worse[None], linear[None], [heard], label)
    assert blend.linear > 3 * blend.hidden  # and of two that are not, the better one more


# --- the training program ---


@pytest.fixture(scope="module")
def setting(tmp_path_factory, jax_stack):
    """A compiled-and-run-by-hand population: task, inputs, first state, and the program."""
    folder = write_sample(tmp_path_factory.mktemp("setting") / "data", actors=4, dim=24)
    dataset = dataset_of(folder)
    plan = train.make_plan(dataset, SMALL)
    return Setting(train.set_up(dataset, plan, ours(dataset), SMALL), dataset, plan, jax_stack)


class Setting:
    def __init__(self, setup, dataset, plan, jax):
        self.task, self.mesh, self.data, self.members = setup
        self.dataset, self.plan, self.jax, self.root = dataset, plan, jax, jax.random.key(0)

    def first(self, member):
        """First state of a member, alone."""
        alone = self.jax.tree.map(lambda leaf: np.asarray(leaf)[None], member)
        return self.jax.tree.map(lambda leaf: leaf[0], train.init_population(self.task, 0, alone))

    def linear(self, used=None, wanted=None):
        used = self.plan.train if used is None else used
        wanted = np.ones((len(used), len(train.SHRINKAGES)), bool) if wanted is None else wanted
        return train.linear_solver(self.task, self.mesh, self.data, self.members, len(used))(used, wanted)

    def run(self, members=None, **changed):
        members = self.members if members is None else members
        data = self.data._replace(**changed)
        mesh = train.population_mesh(len(members.fold))
        state = train.init_population(self.task, 0, members)
        program = self.jax.jit(lambda m, s, d: train.population_epochs(self.task, mesh, 0, d, m, s, 0))
        everywhere = train.place(mesh, data)
        after, measures = program(*train.place(mesh, (members, state), "population"), everywhere)
        return self.jax.device_get((state, after, measures))

    def of(self, tree, chosen):
        return self.jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], tree)

    def assert_equal(self, a, b, **tolerance):
        for left, right in zip(self.jax.tree.leaves(a), self.jax.tree.leaves(b), strict=True):
            if tolerance:
                np.testing.assert_allclose(left, right, **tolerance)
            else:
                np.testing.assert_array_equal(left, right)


def test_members_start_apart_with_the_variance_of_the_units_in_use(setting):
    task = setting.task._replace(config=dataclasses.replace(SMALL, width=400))
    width = np.full(len(setting.members.fold), 400, np.float32)
    width[1] = 100
    members = setting.members._replace(setting=setting.members.setting._replace(width=width))
    state = train.init_population(task, 0, members)
    first, last = (state.params[name]["kernel"] for name in ("Dense_0", "Dense_1"))
    np.testing.assert_allclose(first.std((1, 2)), 1 / np.sqrt(24), rtol=0.05)
    np.testing.assert_allclose(last.std((1, 2)), 1 / np.sqrt(width), rtol=0.05)
    assert len(np.unique(first[:, 0, 0])) == len(setting.plan.train)  # rows that fill up the devices repeat the last
    assert not np.array_equal(first, train.init_population(task, 1, members).params["Dense_0"]["kernel"])


@pytest.fixture(scope="module")
def outcome(setting):
    return setting.run()


def test_a_fold_in_the_population_is_the_fold_alone(setting, outcome):
    chosen = slice(2, 4)
    _, alone, _ = setting.run(setting.of(setting.members, chosen))
    setting.assert_equal(setting.of(outcome[1].params, chosen), alone.params, rtol=0, atol=1e-5)


def test_a_poisoned_member_keeps_its_parameters_and_harms_no_other(setting, outcome):
    mean = setting.members.mean.copy()
    mean[2] = np.nan
    first, after, _ = setting.run(setting.members._replace(mean=mean))
    setting.assert_equal(setting.of(after.params, 2), setting.of(first.params, 2))
    setting.assert_equal(setting.of(after.optimizer, 2), setting.of(first.optimizer, 2))
    others = [0, 1, 4, 5, 6, 7]  # 3 is the other seed of its fold
    setting.assert_equal(setting.of(after.params, others), setting.of(outcome[1].params, others))
    assert after.skipped[2] == after.worst_run[2] >= train.BAD_STEPS_END
    assert after.skipped[others].sum() == 0


def test_an_overflowed_gradient_is_counted_and_changes_nothing(setting):
    scale = setting.members.scale.copy()
    scale[0] = 1e-30
    _, after, _ = setting.run(setting.members._replace(scale=scale))
    assert after.skipped[0] > 0
    assert all(np.isfinite(leaf).all() for leaf in setting.jax.tree.leaves(after.params))


def test_padding_changes_no_validation(setting, outcome):
    padded = np.pad(setting.members.validation, ((0, 0), (0, 0), (0, 2)), constant_values=-1)
    _, _, measures = setting.run(setting.members._replace(validation=padded))
    np.testing.assert_allclose(measures["validation_loss"], outcome[2]["validation_loss"], rtol=1e-6)
    np.testing.assert_allclose(measures["validation_ua"], outcome[2]["validation_ua"], rtol=1e-6)


def test_what_a_member_does_not_train_on_does_not_touch_it(setting, outcome):
    """Other features for the test and validation speakers of the first member give it the very same parameters."""
    x = setting.dataset.x.copy()
    x[np.setdiff1d(np.arange(len(x)), setting.members.train[0])] = 1e6
    _, after, _ = setting.run(x=x)
    setting.assert_equal(setting.of(after.params, 0), setting.of(outcome[1].params, 0))


def test_validation_scores_are_those_of_numpy(setting, outcome):
    """At the last epoch the parameters are at hand: UA and balanced cross-entropy, computed again by hand."""
    _, after, measures = outcome
    for member in range(4):
        params, one = setting.of(after.params, member), setting.of(setting.members, member)
        chosen = one.validation[one.validation >= 0]
        hidden = np.maximum(
            ((setting.dataset.x[chosen] - one.mean) / one.scale) @ params["Dense_0"]["kernel"]
            + params["Dense_0"]["bias"],
            0,
        )
        p = stats.probabilities(hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])
        label = setting.dataset.label[chosen]
        confusion = stats.confusion_matrix(label, p.argmax(1), p.shape[1])
        assert measures["validation_ua"][-1, member] == pytest.approx(stats.scores(confusion)["ua"], abs=1e-5)
        loss = -np.log(p[np.arange(len(label)), label])
        balanced = np.mean([loss[label == c].mean() for c in np.unique(label)])
        assert measures["validation_loss"][-1, member] == pytest.approx(balanced, rel=1e-4)


def test_the_best_epoch_is_that_of_the_folds_mean_validation_loss(setting, outcome):
    _, after, measures = outcome
    fold_loss = measures["validation_loss"].reshape(4, -1, SMALL.seeds).mean(2)  # (epochs, K + 1)
    np.testing.assert_array_equal(after.best_epoch, np.repeat(fold_loss.argmin(0), SMALL.seeds))


def test_a_run_compiles_its_program_once_and_stops_folds_that_no_longer_improve(setting, monkeypatch):
    traced, real = [], train.population_epochs

    def counting(*arguments):
        traced.append(1)
        return real(*arguments)

    monkeypatch.setattr(train, "population_epochs", counting)
    config = dataclasses.replace(SMALL, epochs=30, patience=1, learning_rate=0.5)
    plan = train.make_plan(setting.dataset, config)
    trained = train.train(setting.dataset, plan, ours(setting.dataset), config)
    assert len(traced) == 1
    last = max(row["epoch"] for row in trained.history)
    assert last < 30
    for fold in ("1", "2", "3", "final"):
        epochs = [row["epoch"] for row in trained.history if row["fold"] == fold]
        member = 2 * (3 if fold == "final" else int(fold) - 1)
        assert max(epochs) == trained.best_epoch[member] + 1 + config.patience


SPREAD = """
import json, sys
import numpy as np
sys.path[:0] = [{root!r}, {tests!r}]
from test_train import SMALL, dataset_of, ours
import train
train.start_jax()
import jax
from pathlib import Path
dataset = dataset_of(Path({data!r}))
plan = train.make_plan(dataset, SMALL)
setup = train.set_up(dataset, plan, ours(dataset), SMALL)
members = train.place(setup.mesh, setup.members, "population")
trained = train.train(dataset, plan, ours(dataset), SMALL)
if jax.process_index() == 0:
    np.save({out!r}, trained.logits)
local = [shard.data.shape[0] for shard in members.train.addressable_shards]
print(json.dumps(dict(devices=jax.device_count(), local=local, rows=len(setup.members.fold))))
"""


def spread_run(data, out, **environment):
    code = SPREAD.format(root=str(ROOT), tests=str(ROOT / "tests"), data=str(data), out=str(out))
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "XLA_FLAGS")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=inherited | environment, stdout=subprocess.PIPE, text=True
    )


def told_by(process):
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


def test_the_figures_are_the_same_on_eight_devices_and_on_two_processes(setting, tmp_path):
    data = write_sample(tmp_path / "data", actors=4, dim=24)
    eight = spread_run(data, tmp_path / "8.npy", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert told_by(eight) == {"devices": 8, "local": [1] * 8, "rows": 8}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pair = [
        spread_run(
            data,
            tmp_path / "2.npy",
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
        )
        for number in range(2)
    ]
    assert [told_by(process) for process in pair] == [{"devices": 4, "local": [2, 2], "rows": 8}] * 2
    dataset, plan = setting.dataset, train.make_plan(setting.dataset, SMALL)
    here = train.train(dataset, plan, ours(dataset), SMALL).logits
    np.testing.assert_allclose(np.load(tmp_path / "8.npy"), here, atol=1e-3)
    np.testing.assert_allclose(np.load(tmp_path / "2.npy"), here, atol=1e-3)


def test_steps_that_are_not_finite_end_the_run(setting):
    dataset = setting.dataset._replace(x=np.full_like(setting.dataset.x, 3e38))
    plan = train.make_plan(dataset, SMALL)
    with pytest.raises(train.TrainingError, match=r"NaN or Inf in \d+ steps in a row"):
        train.train(dataset, plan, ours(setting.dataset), SMALL)


def test_shuffled_labels_give_chance(setting):
    config = dataclasses.replace(SMALL, epochs=12, width=32, learning_rate=0.01)
    uas = []
    for seed in range(3):
        shuffled = np.random.default_rng(seed).permutation(setting.dataset.label)
        dataset = setting.dataset._replace(label=shuffled)
        plan = train.make_plan(dataset, config)
        trained = train.train(dataset, plan, ours(dataset), config)
        metrics, _ = train.evaluate(dataset, plan, trained, False, config)
        uas.append(metrics["ua"])
    assert abs(np.mean(uas) - 1 / 8) < 0.09


def forward(params, mean, scale, x):
    hidden = np.maximum((x - mean) / scale @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0)
    return hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


def test_a_run_answers_with_the_mean_logits_of_the_best_epochs(setting):
    """At a learning rate that overshoots, so that the best epoch is not the last one."""
    config = dataclasses.replace(SMALL, epochs=8, learning_rate=0.1)
    dataset = setting.dataset
    plan = train.make_plan(dataset, config)
    trained = train.train(dataset, plan, ours(dataset), config)
    mean, scale = train.member_statistics(dataset, plan, ours(dataset))
    assert (trained.best_epoch < 7).any()
    logits = []
    for member in range(len(plan.train)):
        params = setting.of(trained.params, member)
        logits.append(forward(params, mean[member], scale[member], dataset.x))
        linear = (dataset.x - mean[member]) / scale[member] @ params["linear"]["kernel"] + params["linear"]["bias"]
        chosen = np.flatnonzero(plan.validation[member])
        choice = trained.choices[member // config.seeds]
        weight = choice["hidden"] / choice["temperature"]
        p = stats.probabilities(logits[-1][chosen].astype(np.float64) / weight)
        logits[-1] = logits[-1] + linear
        loss = -np.log(p[np.arange(len(chosen)), dataset.label[chosen]])
        balanced = np.mean([loss[dataset.label[chosen] == c].mean() for c in np.unique(dataset.label[chosen])])
        name = train._member_name(member, plan.folds, config.seeds)
        (row,) = [
            row
            for row in trained.history
            if (row["fold"], row["seed"], row["epoch"]) == (name, member % 2, trained.best_epoch[member] + 1)
        ]
        assert row["validation_loss"] == pytest.approx(balanced, rel=1e-3)
    expected = np.reshape(logits, (plan.folds + 1, 2, *logits[0].shape)).mean(1)
    np.testing.assert_allclose(trained.logits, expected, rtol=1e-3, atol=1e-3)


def test_one_step_is_that_of_adamw_on_the_weighted_smoothed_loss(setting):
    """Clip, decay, schedule, class weights and label smoothing, all computed again by hand."""
    jax, jnp = setting.jax, setting.jax.numpy
    config = dataclasses.replace(SMALL, dropout=0.0, clip=0.05, weight_decay=0.3, learning_rate=0.02)
    task = setting.task._replace(config=config)
    member = setting.of(setting.members, 0)
    member = member._replace(setting=train.Setting.of(config))
    state = setting.first(member)
    x, label = setting.dataset.x[:20], setting.dataset.label[:20]
    weight = member.class_weight[label] * (np.arange(20) < 17)
    after, (_, loss, norm) = train.member_step(task, member, state, (x, label, weight), setting.root, 0.25)

    def by_hand(params):
        logp = jax.nn.log_softmax(relu_forward(params))
        target = 0.9 * np.eye(task.classes)[label] + 0.1 / task.classes
        return -((target * logp).sum(1) * weight).sum() / weight.sum()

    def relu_forward(params):
        z = (x - member.mean) / member.scale
        hidden = jnp.maximum(z @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0)
        return hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]

    expected_loss, gradient = jax.value_and_grad(by_hand)(state.params)
    expected_norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    assert norm == pytest.approx(float(expected_norm), rel=1e-5)
    assert norm > config.clip
    rate = 0.02 * 0.5 * (1 + np.cos(np.pi * 0.25))
    for old, new, slope in zip(*map(jax.tree.leaves, (state.params, after.params, gradient)), strict=True):
        clipped = np.asarray(slope) * config.clip / expected_norm
        adam = clipped / (np.abs(clipped) + 1e-8)  # its first step
        np.testing.assert_allclose(new, old - rate * (adam + 0.3 * np.asarray(old)), rtol=1e-3, atol=1e-5)


def test_mixup_blends_rows_and_labels_alike_and_never_padding(setting):
    jnp = setting.jax.numpy
    x, target = jnp.eye(4), jnp.eye(4)
    numbers = train.Setting(0, 0, 0, 8, 0, jnp.float32(0.4))
    mixed, blended = train.mix(numbers, setting.root, jnp.array([1.0, 1.0, 1.0, 0.0]), x, target)
    np.testing.assert_array_equal(mixed, blended)
    np.testing.assert_array_equal(mixed[0], x[0])  # its partner is padding
    assert 0 < mixed[1, 2] < 0.4
    np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-6)


def test_a_narrow_member_is_the_network_of_that_width(setting):
    """Units that are not in use change nothing: neither the logits nor, by their gradient, any parameter in use."""
    member = setting.of(setting.members, 0)
    member = member._replace(setting=member.setting._replace(width=np.float32(5)))
    state = setting.first(member)
    chosen = np.arange(6)
    before, _ = train.answer_of(setting.task, setting.data, member, state.params, chosen)
    state.params["Dense_1"]["kernel"][5:] = 9.0
    np.testing.assert_array_equal(train.answer_of(setting.task, setting.data, member, state.params, chosen)[0], before)


def test_dropout_keeps_the_share_that_it_should_and_the_mean(setting):
    gate = train.dropout_gate(
        setting.task, setting.members.setting._replace(dropout=0.25, width=6), setting.root, 20_000
    )
    assert (np.asarray(gate)[:, 6:] == 0).all()
    assert set(np.unique(np.asarray(gate)[:, :6]).tolist()) == {0.0, np.float32(4 / 3).item()}
    assert np.asarray(gate)[:, :6].mean() == pytest.approx(1, abs=0.01)


def test_a_sweep_lets_validation_choose_for_each_fold(setting, monkeypatch):
    """One of two settings cannot learn; every fold takes the other one, and says so."""
    monkeypatch.setattr(train, "SWEEP", {name: (1.0,) if name == "width" else (0.0,) for name in train.SWEEP})
    monkeypatch.setitem(train.SWEEP, "learning_rate", (1e-9, 0.02))
    config = dataclasses.replace(SMALL, sweep=True)
    plan = train.make_plan(setting.dataset, config)
    trained = train.train(setting.dataset, plan, ours(setting.dataset), config)
    assert [choice["learning_rate"] for choice in trained.choices] == [pytest.approx(0.02)] * 4
    assert {row["setting"] for row in trained.history} == {1, 2}
    assert [(row["learning_rate"], row["folds"]) for row in trained.sweep] == [(0.02, 3), (1e-9, 0)]
    assert trained.sweep[0]["validation_loss"] < trained.sweep[1]["validation_loss"]
    alone = dataclasses.replace(SMALL, learning_rate=0.02, weight_decay=0.0, dropout=0.0, label_smoothing=0.0)
    expected = train.train(setting.dataset, plan, ours(setting.dataset), alone)
    np.testing.assert_allclose(trained.logits, expected.logits, atol=1e-4)


def test_bfloat16_products_leave_parameters_and_logits_float32(setting):
    config = dataclasses.replace(SMALL, precision="bfloat16")
    plan = train.make_plan(setting.dataset, config)
    trained = train.train(setting.dataset, plan, ours(setting.dataset), config)
    assert {leaf.dtype for leaf in setting.jax.tree.leaves(trained.params)} == {np.dtype(np.float32)}
    exact = train.train(setting.dataset, plan, ours(setting.dataset), SMALL)
    difference = np.abs(trained.logits - exact.logits).max()
    assert 0 < difference < 0.5


def test_dropout_is_drawn_anew_for_each_step_and_never_in_validation(setting):
    member = setting.of(setting.members, 0)
    state = setting.first(member)
    label = setting.dataset.label[:20]
    batch = (setting.dataset.x[:20], label, member.class_weight[label])
    losses = [
        train.member_step(setting.task, member, state, batch, setting.jax.random.key(k), 0.0)[1][1] for k in (1, 2)
    ]
    assert losses[0] != losses[1]


def test_every_epoch_has_its_own_order(setting):
    """Without dropout, and with a schedule that hardly moves, only the order can tell two epochs apart."""
    config = dataclasses.replace(SMALL, dropout=0.0, epochs=100_000)
    task = setting.task._replace(config=config)
    member = setting.of(setting.members, 0)
    member = member._replace(setting=member.setting._replace(dropout=0.0))
    state = setting.first(member)
    member = setting.jax.device_put(member)
    kernels = [
        train.member_epoch(task, setting.root, setting.data, epoch, member, state)[0].params["Dense_0"]["kernel"]
        for epoch in (0, 0, 1)
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 1e-5


def test_metrics_of_predictions_made_by_hand(sample):
    dataset = dataset_of(sample)
    plan = train.make_plan(dataset, SMALL)
    logits = np.random.default_rng(0).normal(size=(plan.folds + 1, len(dataset.label), 8))
    best = np.repeat([3, 1, 2, 0], SMALL.seeds)
    trained = train.Trained(None, logits, None, best, np.arange(8), [], [{"temperature": 2.0}] * 4, [])
    metrics, probability = train.evaluate(dataset, plan, trained, False, SMALL)
    predicted = np.array([logits[fold, n].argmax() for n, fold in enumerate(plan.fold)])
    np.testing.assert_array_equal(probability.argmax(1), predicted)
    before = stats.probabilities(2 * logits[plan.fold, np.arange(len(plan.fold))])
    assert metrics["ece_uncalibrated"] == stats.expected_calibration_error(before, dataset.label) != metrics["ece"]
    for c, name in enumerate(metrics["classes"]):
        assert metrics["recall"][name] == pytest.approx((predicted[dataset.label == c] == c).mean())
    assert [fold["epochs"] for fold in metrics["folds"]] == [4, 2, 3]
    assert [fold["skipped_steps"] for fold in metrics["folds"]] == [0 + 1, 2 + 3, 4 + 5]
    by_speaker = np.stack(
        [
            stats.confusion_matrix(dataset.label[mask], predicted[mask], 8)
            for name in sorted(set(plan.speaker))
            for mask in [plan.speaker == name]
        ]
    )
    assert metrics["ua_ci95"] == pytest.approx(stats.speaker_intervals(by_speaker, SMALL.seed)["ua"])
    assert metrics["speakers"]["ravdess:01"]["wa"] == pytest.approx(
        (predicted == dataset.label)[plan.speaker == "ravdess:01"].mean()
    )


def told_dataset():
    """Six utterances, four of which tell a gender."""
    dataset = bare_dataset(["ravdess:01"] * 3 + ["cremad:1001"] * 3, [0, 0, 1, 0, 1, 1])
    genders = ["male", "male", "male", "female", None, None]
    utterances = [dataclasses.replace(u, gender=gender) for u, gender in zip(dataset.utterances, genders)]
    return dataset._replace(classes=("happy", "sad"), utterances=utterances)


def test_groups_count_and_score_what_the_names_tell():
    """Labels h h s | h s s, predictions h s s | h h s."""
    happy = np.array([0.9, 0.2, 0.3, 0.6, 0.8, 0.45])
    found = train._closer_look(told_dataset(), np.stack([happy, 1 - happy], 1))
    male, female = found["groups"]["gender"]["male"], found["groups"]["gender"]["female"]
    assert (male["n"], male["ua"], male["wa"]) == pytest.approx((3, (1 / 2 + 1) / 2, 2 / 3))
    assert (female["n"], female["ua"]) == (1, 1)
    assert found["groups"]["corpus"]["ravdess"]["n"] == 6
    assert found["groups"]["intensity"] == {}


def test_mistakes_come_most_confident_first_and_by_name():
    happy = np.array([0.9, 0.2, 0.3, 0.6, 0.85, 0.45])
    found = train._closer_look(told_dataset(), np.stack([happy, 1 - happy], 1))["confident_mistakes"]
    assert [(m["file"], m["label"], m["predicted"]) for m in found] == [
        ("0004", "sad", "happy"),
        ("0001", "happy", "sad"),
    ]
    assert [m["confidence"] for m in found] == pytest.approx([0.85, 0.8])


def epoch_row(epoch, fold, loss, ua, **more):
    return {"epoch": epoch, "fold": fold, "validation_loss": loss, "validation_ua": ua} | more


def test_curves_spread_over_folds_after_the_mean_of_their_seeds():
    rows = [epoch_row(1, "1", 1.0, 0.2), epoch_row(1, "1", 3.0, 0.4), epoch_row(1, "2", 5.0, 0.7)]
    rows += [epoch_row(1, "final", 99.0, 1.0), epoch_row(2, "2", 4.0, 0.8)]
    trained = train.Trained(None, None, None, None, None, rows, [{}] * 3, [])
    first, second = train._curves(trained, SMALL)
    assert (first["epoch"], first["folds"], second["epoch"], second["folds"]) == (1, 2, 2, 1)
    assert first["validation_loss"] == pytest.approx({"mean": 3.5, "low": 2.0, "high": 5.0})
    assert first["validation_ua"] == pytest.approx({"mean": 0.5, "low": 0.3, "high": 0.7})
    assert second["validation_ua"] == pytest.approx({"mean": 0.8, "low": 0.8, "high": 0.8})


def test_the_curves_of_a_sweep_are_those_of_the_chosen_settings():
    config = dataclasses.replace(SMALL, sweep=True)
    settings = train.sweep_settings(config)
    rows = [epoch_row(1, fold, 10.0 * setting, 0.5, setting=setting) for setting in (1, 2, 3) for fold in ("1", "2")]
    choices = [settings[2]._asdict(), settings[0]._asdict(), settings[1]._asdict()]
    (curve,) = train._curves(train.Trained(None, None, None, None, None, rows, choices, []), config)
    assert curve["validation_loss"] == {"mean": 20.0, "low": 10.0, "high": 30.0}


# --- the device ---


@pytest.mark.parametrize(
    ("gpu", "fault", "has_cuda", "asked", "platforms", "told"),
    [
        (None, "no GPU", True, "", "cpu", "no GPU"),
        (None, "no GPU", False, "", "", "no GPU"),
        ("H200", "", True, "", "cuda,cpu", ""),
        ("H200", "", False, "", "cpu", "H200 IS HERE BUT THIS JAX HAS NO CUDA SUPPORT"),
        ("H200", "", True, "cpu", "cpu", "JAX_PLATFORMS=cpu asks for it"),
    ],
)
def test_the_platform_is_chosen_with_a_reason(gpu, fault, has_cuda, asked, platforms, told):
    chosen, reason = train.choose_platform(gpu, fault, has_cuda, asked)
    assert chosen == platforms
    assert told in reason


@pytest.mark.skipif(os.name != "posix", reason="rights are those of POSIX")
def test_compiled_programs_are_kept_where_nobody_else_can_write(jax_stack, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.set_level("INFO")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    kept = []
    monkeypatch.setattr(train.jax.config, "update", lambda *told: kept.append(told))
    train.keep_compiled()
    (name, folder), threshold = kept
    assert name == "jax_compilation_cache_dir"
    assert threshold == ("jax_persistent_cache_min_compile_time_secs", 0.1)
    folder = Path(folder)
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    train.keep_compiled()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    train.keep_compiled()
    assert len(kept) == 2
    assert caplog.text.count("is not a folder of yours alone") == 2


def test_hidden_gpus_are_the_reason(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert train.probe_gpu() == (None, "CUDA_VISIBLE_DEVICES hides every GPU")


# --- the whole program ---


ARTIFACTS = {
    "model.npz",
    "config.json",
    "metrics.json",
    "history.csv",
    "predictions.csv",
    "confusion.csv",
    "report.html",
    "wav2vec_mean.npy",
    "wav2vec_std.npy",
    "skipped.csv",
    "train.log",
    "lock",
    "fusion.npz",
}
FAST = ("--epochs", "12", "--seeds", "2", "--width", "32", "--folds", "3", "--learning-rate", "0.01")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, jax_stack):
    """A folder with one bad file, trained twice: the first run computes the statistics, the second one loads them."""
    place = tmp_path_factory.mktemp("whole")
    data = write_sample(place / "data", actors=4, dim=24)
    (data / "03-01-05-01-02-01-12.npz").write_bytes(b"")
    for run in ("first", "second"):
        assert train.main([str(data), "--out", str(place / run), *FAST]) == 0
    return place


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_every_artifact_and_nothing_else(trained):
    assert {path.name for path in (trained / "first").iterdir()} == ARTIFACTS
    assert not [path for path in trained.rglob("*") if path.name.endswith(".tmp")]


def test_the_first_and_the_second_run_give_the_same_bytes(trained):
    for name in ("model.npz", "predictions.csv", "history.csv", "confusion.csv", "wav2vec_mean.npy", "wav2vec_std.npy"):
        assert (trained / "first" / name).read_bytes() == (trained / "second" / name).read_bytes()


def test_metrics_say_what_they_must(trained):
    metrics = json.loads((trained / "first" / "metrics.json").read_text())
    assert metrics["ua"] > 3 * metrics["chance_ua"]
    assert metrics["ua_ci95"][0] <= metrics["ua"] <= metrics["ua_ci95"][1]
    assert metrics["chance_ua"] == 1 / 8
    assert metrics["classes"] == list(emotions.EMOTIONS)
    assert (metrics["n_utterances"], metrics["n_speakers"], metrics["fold_scheme"]) == (112, 8, "3")
    assert metrics["left_out"] == {"empty": 1}
    assert metrics["left_out_first"] == {"empty": {"file": "03-01-05-01-02-01-12.npz", "reason": "has no bytes"}}
    assert {"jax", "flax", "optax", "numpy", "python"} <= set(metrics["versions"])
    assert metrics["seconds"] > 0
    assert "CPU" in metrics["device"]
    assert len(metrics["folds"]) == 3
    for fold in metrics["folds"]:
        assert not set(fold["train"]) & set(fold["validation"])
        assert not set(fold["test"]) & (set(fold["train"]) | set(fold["validation"]))
        assert {"ua", "wa", "macro_f1"} <= set(fold)


def test_the_scores_are_those_of_the_predictions_file(trained):
    rows = rows_of(trained / "first" / "predictions.csv")
    metrics = json.loads((trained / "first" / "metrics.json").read_text())
    assert len(rows) == 112
    assert list(rows[0])[:6] == ["file", "corpus", "speaker", "label", "fold", "predicted"]
    recalls = [
        np.mean([row["predicted"] == name for row in rows if row["label"] == name]) for name in metrics["classes"]
    ]
    assert metrics["ua"] == pytest.approx(np.mean(recalls))
    for row in rows:
        p = {name: float(row[f"p_{name}"]) for name in metrics["classes"]}
        assert sum(p.values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == max(p, key=p.get)
        assert row["speaker"] in metrics["folds"][int(row["fold"]) - 1]["test"]


def test_the_log_begins_with_the_device_and_ends_with_the_report(trained):
    lines = (trained / "first" / "train.log").read_text().splitlines()
    assert lines[0].startswith("device: CPU (")
    assert "because" in lines[0]
    assert any("UA (mean recall)" in line for line in lines)
    assert any(line.startswith("epoch 4/12  loss") for line in lines)
    assert "03-01-05-01-02-01-12.npz: empty" in "\n".join(lines)


def test_the_report_is_drawn_from_metrics_json_alone(trained):
    metrics = json.loads((trained / "first" / "metrics.json").read_text())
    shown = train.report_text(metrics, trained / "first", io.StringIO())
    assert (trained / "first" / "train.log").read_text().endswith(shown)
    page = train.report_html(metrics, trained / "first")
    assert (trained / "first" / "report.html").read_bytes() == page


def test_the_report_says_what_a_reader_must_know(trained):
    metrics = json.loads((trained / "first" / "metrics.json").read_text())
    shown = " ".join(train.report_text(metrics, trained / "first", io.StringIO()).split())
    mistake, weakest = metrics["confident_mistakes"][0], min(metrics["speakers"].items(), key=lambda s: s[1]["ua"])[0]
    for told in (
        f"{metrics['ua']:.4f}",
        f"{metrics['majority_wa']:.4f}",
        f"calibration error {metrics['ece']:.4f}, {metrics['ece_uncalibrated']:.4f} uncalibrated",
        mistake["file"],
        weakest,
        "empty 1",
        f"seeds {FAST[3]}",
        metrics["versions"]["jax"],
        "each was tested by models that never heard them",
        "acted",
    ):
        assert told in shown
    assert "NOT speaker-independent" not in shown
    mixed = train.report_text(metrics | {"speaker_independent": False}, trained / "first", io.StringIO())
    assert mixed.count("NOT speaker-independent") == 2


def test_the_command_of_a_run_asks_for_the_same_run():
    hostile = train.Config(
        "-a 'dir'", seeds=3, merge=("calm=neutral", "fear=sad"), sweep=True, pattern="-(?P<emotion>.)"
    )
    for config in (hostile, train.Config("D")):
        python, program, *arguments = shlex.split(train.command_line(config))
        assert (python, program) == ("python", "train.py")
        assert train.parse_config(arguments) == config


class Page(html.parser.HTMLParser):
    """The tags, the attributes and the text of each element of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.inside = set(), set(), {}, []
        self.feed(page.decode())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag not in ("meta", "span"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag != "span":
            assert self.inside.pop() == tag

    def handle_data(self, text):
        tag = self.inside[-1] if self.inside else ""
        self.text[tag] = self.text.get(tag, "") + text


def test_the_page_and_the_text_say_the_same_and_the_page_needs_nothing_else(trained):
    metrics = json.loads((trained / "first" / "metrics.json").read_text())
    content = (trained / "first" / "report.html").read_bytes()
    page = Page(content)
    shown = train.report_text(metrics, trained / "first", io.StringIO())
    assert page.text["pre"].strip("\n") == shown.strip("\n")
    assert page.text["title"] == f"Speech emotion report: UA {metrics['ua']:.4f}, 112 utterances, 8 speakers"
    assert page.tags == {"html", "head", "meta", "title", "style", "body", "pre", "span"}
    assert page.attributes == {"lang", "charset", "name", "content", "style"}
    assert not re.search(rb"https?:|url\(|@import", content)
    assert re.search(rb"background-color: #[0-9a-f]{6}\">", content)


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
def test_no_name_forges_a_line_markup_or_a_tag(trained, name):
    metrics = json.loads((trained / "first" / "metrics.json").read_text())
    plain = train.report_text(metrics, Path("run"), io.StringIO())
    metrics["classes"][0] = name
    metrics["recall"] = {name if key == "neutral" else key: value for key, value in metrics["recall"].items()}
    metrics["speakers"] = {name: metrics["speakers"]["ravdess:01"]}
    metrics["groups"]["corpus"] = {name: metrics["groups"]["corpus"]["ravdess"]}
    metrics["confident_mistakes"] = [{"file": name, "label": name, "predicted": name, "confidence": 0.9}]
    metrics["left_out_first"] = {"empty": {"file": name, "reason": name}}
    metrics |= {"notes": [name], "command": name, "settings": {"labels": name}, "device": name, "fold_scheme": name}
    shown = train.report_text(metrics, Path(name), io.StringIO())
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert [line for line in shown.splitlines() if "UA (mean" in line[:9]] == [
        line for line in plain.splitlines() if "UA (mean" in line[:9]
    ]
    page = Page(train.report_html(metrics, Path(name)))
    assert page.text["pre"].strip("\n") == shown.strip("\n")
    assert page.tags == {"html", "head", "meta", "title", "style", "body", "pre", "span"}
    whole = "".join(shown.split())
    assert whole.count("".join(check_data.printable(name).split())) >= 5


def test_the_report_names_what_was_left_out_and_why(trained):
    metrics = json.loads((trained / "first" / "metrics.json").read_text())
    shown = train.report_text(metrics, Path("run"), io.StringIO())
    assert "empty  1  03-01-05-01-02-01-12.npz: has no bytes" in shown
    assert "left out          1 file; skipped.csv names them" in shown
    clean = train.report_text(metrics | {"left_out": {}, "left_out_first": {}}, Path("run"), io.StringIO())
    assert "left out          0 files" in clean


def test_the_report_fits_80_columns(trained):
    metrics = json.loads((trained / "first" / "metrics.json").read_text())
    codes = ["x" * 16 + str(n) for n in range(20)]
    first = {code: {"file": "f" * 90 + ".npz", "reason": "is not what it should be " * 5} for code in codes}
    many = {"left_out": dict.fromkeys(codes, 10**6), "left_out_first": first}
    sweep = [dict.fromkeys(train.SWEEP, 0.0125) | {"width": 256, "validation_loss": 0.123456, "folds": 24}] * 64
    for more in ({}, {"notes": ["word " * 40]}, many, {"sweep": sweep}):
        shown = train.report_text(metrics | more, Path("run"), io.StringIO())
        assert max(map(len, shown.splitlines())) <= 80
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown  # nothing is cut off


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_where_the_encoding_has_no_lines_ascii_draws_them(trained, encoding):
    metrics = json.loads((trained / "first" / "metrics.json").read_text())
    shown = train.report_text(metrics, Path("run"), io.TextIOWrapper(io.BytesIO(), encoding=encoding))
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
def test_colour_is_for_terminals_that_want_it(trained, monkeypatch, environment, coloured, styled):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    metrics = json.loads((trained / "first" / "metrics.json").read_text())
    page = train.report_html(metrics, Path("run"))
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    shown = train.report_text(metrics, Path("run"), sys.stdout)
    assert bool(re.search(r"\x1b\[[0-9;]*48;", shown)) == coloured
    assert ("\x1b[" in shown) == styled
    assert train.report_html(metrics, Path("run")) == page
    monkeypatch.setenv("FORCE_COLOR", "1")  # of a terminal, not of train.log
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == train.report_text(metrics, Path("run"), io.StringIO())


@pytest.mark.parametrize("share", np.linspace(0.01, 1, 34))
def test_the_numbers_of_the_heat_map_can_be_read(share):
    """WCAG 2.1 asks for a contrast of 4.5 to 1."""

    def luminance(channels):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    ink, _, paper = train._shade(share).split()
    background = luminance([int(value) / 255 for value in re.findall(r"\d+", paper)])
    foreground = luminance([int(ink[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    low, high = sorted([background, foreground])
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_skipped_files_are_named(trained):
    assert [(row["file"], row["code"]) for row in rows_of(trained / "first" / "skipped.csv")] == [
        ("03-01-05-01-02-01-12.npz", "empty")
    ]


def test_prediction_needs_no_labels_and_agrees_with_the_readmes_numpy(trained, tmp_path, capsys, monkeypatch):
    plain = tmp_path / "plain"
    plain.mkdir()
    files = sorted((trained / "data").glob("*_*.npz"))
    for number, file in enumerate(files):
        os.link(file, plain / f"{number:03d}.npz")
    assert train.main([str(plain), "--predict", str(trained / "first"), "--out", str(tmp_path / "out")]) == 0
    assert "112 files labelled, 0 left out" in capsys.readouterr().out
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sample").symlink_to(trained / "first")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(readme_python("probabilities"), scope)
    expected = np.stack([scope["probabilities"](np.load(file)["emb"]) for file in files])
    assert scope["classes"] == list(emotions.EMOTIONS)
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    written = np.array([[float(row[f"p_{name}"]) for name in emotions.EMOTIONS] for row in rows])
    np.testing.assert_allclose(written, expected, atol=1e-5)


def readme_python(word):
    """The program in README that has this word in it."""
    (program,) = [
        part.split("```")[0] for part in (ROOT / "README.md").read_text().split("```python\n")[1:] if word in part
    ]
    return program


def test_the_fusion_file_keeps_its_contract(trained):
    fusion, rows = np.load(trained / "first" / "fusion.npz"), rows_of(trained / "first" / "predictions.csv")
    metrics = json.loads((trained / "first" / "metrics.json").read_text())
    assert fusion["id"].tolist() == [row["file"].removesuffix(".npz") for row in rows]
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


def test_the_embedding_is_the_hidden_layer_of_the_models_of_the_fold(setting):
    plan = train.make_plan(setting.dataset, SMALL)
    dataset = setting.dataset
    trained = train.train(dataset, plan, ours(dataset), SMALL)
    mean, scale = train.member_statistics(dataset, plan, ours(dataset))
    for n, fold in enumerate(plan.fold):
        layers = []
        for member in (2 * fold, 2 * fold + 1):
            layer = setting.of(trained.params["Dense_0"], member)
            layers.append(
                np.maximum((dataset.x[n] - mean[member]) / scale[member] @ layer["kernel"] + layer["bias"], 0)
            )
        np.testing.assert_allclose(trained.embedding[n], np.concatenate(layers), rtol=1e-3, atol=1e-4)


def test_the_readmes_late_fusion_runs(trained, tmp_path, monkeypatch, capsys):
    for name, run in (("voice", "first"), ("face", "second")):
        (tmp_path / "runs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "runs" / name).symlink_to(trained / run)
    monkeypatch.chdir(tmp_path)
    exec(readme_python("intersect1d"), {})
    wa = json.loads((trained / "first" / "metrics.json").read_text())["wa"]
    assert capsys.readouterr().out == f"fused: {wa:.4f} of 112 utterances right\n"  # one modality with itself


def test_prediction_writes_the_same_fusion_file(trained, tmp_path):
    assert train.main([str(trained / "data"), "--predict", str(trained / "first"), "--out", str(tmp_path / "out")]) == 1
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
    calibrated = stats.probabilities(fusion["logits"] / fusion["temperature"][:, None])
    np.testing.assert_allclose(calibrated, fusion["probability"], atol=1e-6)


def test_prediction_scores_labelled_files_of_speakers_that_the_model_has_not_heard(trained, tmp_path, capsys):
    data = write_sample(tmp_path / "data", actors=6, dim=24)  # of which the model has heard four of each corpus
    np.savez(data / "nameless.npz", emb=np.load(data / "cremad_1001_IOM_ANG_XX.npz")["emb"] + 1)
    np.savez(data / "cremad_1006_XXX_ANG_XX.npz", emb=np.zeros(24))
    assert train.main([str(data), "--predict", str(trained / "first"), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().out
    fusion = np.load(tmp_path / "out" / "fusion.npz")
    unheard = np.isin(fusion["speaker"], ["ravdess:05", "ravdess:06", "cremad:1005", "cremad:1006"])
    label, predicted = fusion["label"][unheard], fusion["probability"][unheard].argmax(1)
    ua = float(stats.scores(stats.confusion_matrix(label, predicted, 8))["ua"])
    assert f"UA {ua:.4f} (" in told
    assert f") on {unheard.sum()} files whose labels are known, of 4 new speakers\n" in told
    assert f"{(~unheard).sum()} not scored" in told
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert [row["label"] for row in rows if row["file"] == "nameless.npz"] == [""]
    assert [row["label"] for row in rows if row["file"] == "cremad_1001_IOM_ANG_XX.npz"] == ["angry"]
    assert [row["code"] for row in rows_of(tmp_path / "out" / "skipped.csv")] == ["constant"]


@pytest.mark.parametrize(
    ("heard", "speaker", "new"),
    [
        (("ravdess:01",), "ravdess:02", True),
        (("ravdess:01",), "cremad:1001", True),
        (("ravdess:01",), "ravdess:01", False),
        (("ravdess:01",), None, False),
        (("", "ravdess:01"), "ravdess:02", False),  # anybody may be behind a name that tells nobody
        ((), "ravdess:02", False),
        (("own:1",), "ravdess:02", False),  # and behind names that somebody made up
        (("ravdess:01",), "own:2", False),
        (("own:1",), "own:2", True),
    ],
)
def test_a_speaker_is_new_only_where_that_is_sure(heard, speaker, new):
    assert train.Model((), 1, False, (), heard, 0.0, 1.0, 1.0, {}).is_new(speaker) == new


def test_prediction_leaves_out_what_is_of_an_absurd_scale(trained, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data)
    files = sorted(path.name for path in data.glob("ravdess*"))[:4]
    for name, factor in zip(files, (1e30, 1e36, 1e-30, 1e6)):
        np.savez(data / name, emb=(np.load(data / name)["emb"] * np.float32(factor)).astype(np.float32))
    assert train.main([str(data), "--predict", str(trained / "first"), "--out", str(tmp_path / "out")]) == 1
    found = [(row["file"], row["code"]) for row in rows_of(tmp_path / "out" / "skipped.csv") if row["code"] != "empty"]
    assert found == [(name, "absurd-scale") for name in files]
    assert np.isfinite(np.load(tmp_path / "out" / "fusion.npz")["probability"]).all()


def test_prediction_writes_nothing_among_the_features(trained, tmp_path, caplog):
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data)
    before = sorted(data.iterdir())
    for given in (data, before[-1]):
        assert train.main([str(given), "--predict", str(trained / "first"), "--out", str(data)]) == 2
        assert "where the features are" in caplog.messages[-1]
    assert sorted(data.iterdir()) == before
    assert train.main([str(data), "--predict", str(trained / "first"), "--out", str(data / "out")]) == 1
    result = check_data.scan(check_data.ScanOptions(str(data)))
    assert len(result.records) == 112
    assert train.main([str(trained / "first"), "--predict", str(trained / "first")]) == 2  # a run holds no features


def test_prediction_says_which_class_no_file_has(trained, tmp_path, caplog):
    arguments = [str(trained / "data"), "--predict", str(trained / "first"), "--out", str(tmp_path / "out")]
    assert train.main([*arguments, "--classes", "hapyy"]) == 2
    assert "hapyy" in caplog.messages[-1]


def test_prediction_folds_labels_as_the_training_did(tmp_path, jax_stack):
    data, run, out = write_sample(tmp_path / "data", actors=3, dim=24), tmp_path / "run", tmp_path / "out"
    assert train.main([str(data), "--out", str(run), "--merge", "calm=neutral", *FAST]) == 0
    assert train.main([str(data), "--predict", str(run), "--out", str(out)]) == 0
    assert {row["label"] for row in rows_of(out / "predictions.csv")} == set(emotions.EMOTIONS) - {"calm"}


def test_prediction_takes_a_single_file_and_needs_no_jax(trained, tmp_path):
    file = next((trained / "data").glob("ravdess*.npz"))
    code = "import sys; sys.modules['jax'] = None; import train; sys.exit(train.main(sys.argv[1:]))"
    arguments = [str(file), "--predict", str(trained / "first"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "1 file labelled, 0 left out" in done.stdout
    assert done.stderr == ""
    (row,) = rows_of(tmp_path / "out" / "predictions.csv")
    (before,) = [row for row in rows_of(trained / "first" / "predictions.csv") if row["file"] == file.name]
    assert (row["file"], row["label"]) == (file.name, before["label"])


@pytest.fixture(scope="module")
def marked(tmp_path_factory, jax_stack):
    """Features with a mean that is large beside their deviations, as those of an encoder, and a run on them."""
    place = tmp_path_factory.mktemp("marked")
    signature = 20 * np.random.default_rng(5).normal(size=48)
    for path in write_sample(place / "data", actors=4).iterdir():
        np.savez(path, emb=np.load(path)["emb"] + signature)
    assert train.main([str(place / "data"), "--out", str(place / "run"), *FAST]) == 0
    return place


def test_prediction_leaves_out_what_is_of_another_encoder(marked, tmp_path, capsys, caplog):
    data = tmp_path / "data"
    shutil.copytree(marked / "data", data)
    files = sorted(path.name for path in data.glob("ravdess*"))
    for name in files[:3]:
        np.savez(data / name, emb=np.load(data / name)["emb"][::-1])
    np.savez(data / files[3], emb=3 * np.load(data / files[3])["emb"])  # a microphone is no other encoder
    assert train.main([str(data), "--predict", str(marked / "run"), "--out", str(tmp_path / "out")]) == 1
    assert "109 files labelled, 3 left out" in capsys.readouterr().out
    found = rows_of(tmp_path / "out" / "skipped.csv")
    assert [(row["file"], row["code"]) for row in found] == [(name, "other-encoder") for name in files[:3]]
    for path in data.glob("*.npz"):
        np.savez(path, emb=np.load(marked / "data" / path.name)["emb"][::-1])
    assert train.main([str(data), "--predict", str(marked / "run"), "--out", str(tmp_path / "none")]) == 2
    assert "no file can be used" in caplog.messages[-1]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("fault", ["another encoder", "another width"])
def test_prediction_refuses_statistics_that_are_not_of_the_models_encoder(marked, tmp_path, fault, caplog):
    data, mean = tmp_path / "data", np.load(marked / "run" / stats.MEAN_FILE)
    shutil.copytree(marked / "data", data, ignore=shutil.ignore_patterns("wav2vec*"))
    mean = mean[::-1] if fault == "another encoder" else mean[:40]
    np.save(data / stats.MEAN_FILE, mean)
    np.save(data / stats.STD_FILE, np.ones_like(mean))
    assert train.main([str(data), "--predict", str(marked / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "wav2vec_mean.npy" in caplog.messages[-1]
    assert not (tmp_path / "out").exists()
    np.save(data / stats.MEAN_FILE, np.load(marked / "run" / stats.MEAN_FILE) * 1.1)
    np.save(data / stats.STD_FILE, np.ones(48))
    assert train.main([str(data), "--predict", str(marked / "run"), "--out", str(tmp_path / "out")]) == 0


def test_features_that_were_normalised_are_never_of_another_encoder(trained, tmp_path):
    """They have no mean that could tell."""
    assert json.loads((trained / "first" / "config.json").read_text())["likeness"] < 0.2
    other = write_sample(tmp_path / "other", actors=1, dim=24, seed=3)
    assert train.main([str(other), "--predict", str(trained / "first"), "--out", str(tmp_path / "out")]) == 0


def test_prediction_never_overwrites_a_training_run(trained, capsys):
    before = (trained / "second" / "predictions.csv").read_bytes()
    arguments = [str(trained / "data"), "--predict", str(trained / "first"), "--out", str(trained / "second")]
    assert train.main(arguments) == 2
    assert (trained / "second" / "predictions.csv").read_bytes() == before


def test_the_saved_model_is_the_final_one(trained, tmp_path, monkeypatch):
    caught, run = [], tmp_path / "run"
    monkeypatch.setattr(train, "train", catching(train.train, caught))
    assert train.main([str(trained / "data"), "--out", str(run), *FAST]) == 0
    assert train.main([str(trained / "data"), "--predict", str(run), "--out", str(tmp_path / "out")]) == 1
    with np.load(tmp_path / "out" / "fusion.npz") as fusion:
        np.testing.assert_allclose(fusion["logits"] / fusion["temperature"][:, None], caught[0].logits[-1], atol=2e-4)
    with np.load(tmp_path / "run" / "model.npz") as model:
        kernel = np.asarray(caught[0].params["Dense_0"]["kernel"])
        np.testing.assert_array_equal(model["params/Dense_0/kernel"], kernel[6:])
        assert len(kernel) == 8


def test_results_are_not_mixed_with_features_or_with_those_of_other_data(trained, tmp_path):
    before = {path.name: path.read_bytes() for path in (trained / "first").iterdir()}
    other = write_sample(tmp_path / "other", actors=2, dim=24)
    assert train.main([str(other), "--out", str(trained / "first"), *FAST]) == 2
    assert train.main([str(other), "--out", str(other), *FAST]) == 2
    assert train.main([str(trained / "data"), "--out", str(trained / "first"), "--folds", "nonsense"]) == 2
    assert {path.name: path.read_bytes() for path in (trained / "first").iterdir()} == before


def test_supplied_statistics_are_in_the_results(trained, tmp_path):
    data = write_sample(tmp_path / "data", actors=3, dim=24)
    np.save(data / stats.MEAN_FILE, np.zeros(24, np.float32))
    np.save(data / stats.STD_FILE, np.full(24, 2, np.float32))
    assert train.main([str(data), "--out", str(tmp_path / "run"), *FAST]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["statistics"] == "supplied by the user"
    assert any("your own statistics apply to every fold" in note for note in metrics["notes"])
    np.testing.assert_array_equal(np.load(tmp_path / "run" / stats.STD_FILE), np.full(24, 2, np.float32))


def damage_config(run, **changes):
    described = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(described | changes))


def damage_model(run, **changes):
    with np.load(run / "model.npz") as model:
        arrays = {name: changes.get(name.rpartition("/")[2], model[name]) for name in model}
    np.savez(run / "model.npz", **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: shutil.rmtree(run),
        lambda run: (run / "model.npz").write_bytes(b"PK\x03\x04"),
        lambda run: (run / "config.json").write_text("[1]"),
        lambda run: damage_config(run, classes=["happy", "sad"]),
        lambda run: damage_config(run, dim=12),
        lambda run: damage_config(run, dim="wide"),
        lambda run: damage_config(run, dim=float("inf")),
        lambda run: damage_config(run, likeness=10**400),
        lambda run: damage_config(run, likeness=float("nan")),
        lambda run: damage_config(run, temperature=float("nan")),
        lambda run: damage_config(run, options={"merge": [1]}),
        lambda run: damage_config(run, classes=["happy"] * 8),
        lambda run: damage_config(run, format=2),
        lambda run: (run / "config.json").write_text("[" * 200000),
        lambda run: ((run / "config.json").unlink(), os.mkfifo(run / "config.json")),
        lambda run: damage_model(run, scale=np.zeros(24, np.float32)),
        lambda run: damage_model(run, bias=None),
        lambda run: damage_model(run, scale=np.ones(3, np.float32)),
        lambda run: damage_model(run, mean=np.full(24, np.nan, np.float32)),
    ],
)
def test_prediction_refuses_a_model_that_is_missing_or_damaged(trained, tmp_path, damage, caplog):
    shutil.copytree(trained / "first", tmp_path / "run")
    damage(tmp_path / "run")
    assert train.main([str(trained / "data"), "--predict", str(tmp_path / "run")]) == 2
    assert "\n" not in caplog.records[-1].message


@pytest.mark.parametrize("dim", [7, 48])
def test_prediction_refuses_features_of_another_width(trained, tmp_path, dim):
    other = write_sample(tmp_path / "other", actors=1, dim=dim)
    assert train.main([str(other), "--predict", str(trained / "first"), "--out", str(tmp_path / "out")]) == 2


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


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")]
)
def test_out_of_memory_is_one_line_with_what_to_do(trained, tmp_path, error, monkeypatch, caplog):
    def exhausted(*_):
        raise error

    monkeypatch.setattr(train, "train", exhausted)
    assert train.main([str(trained / "data"), "--out", str(tmp_path / "run"), *FAST]) == 1
    assert "OUT OF MEMORY" in caplog.messages[-1]
    assert "--batch" in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]


def test_statistics_of_the_user_are_never_overwritten(trained, tmp_path):
    data = write_sample(tmp_path / "data", actors=2, dim=24)
    np.save(data / stats.MEAN_FILE, np.zeros(24, np.float32))
    np.save(data / stats.STD_FILE, np.ones(24, np.float32))
    assert train.main([str(data), "--out", str(tmp_path / "run"), "--recompute-stats", *FAST]) == 2
    assert (np.load(data / stats.MEAN_FILE) == 0).all()


def test_the_embedded_sample_is_what_its_script_writes(tmp_path):
    fresh = write_sample(tmp_path / "sample")
    kept = sorted(path.name for path in (ROOT / "sample").glob("*.npz"))
    assert kept == sorted(path.name for path in fresh.iterdir())
    for name in kept:
        with np.load(fresh / name) as new, np.load(ROOT / "sample" / name) as old:
            np.testing.assert_allclose(new["emb"], old["emb"], rtol=1e-6)


def test_parameters_are_named_by_their_paths():
    tree = {"Dense_0": {"kernel": np.ones((2, 3), np.float32), "bias": np.zeros(3, np.float32)}}
    flat = train.flatten(tree)
    assert set(flat) == {"params/Dense_0/kernel", "params/Dense_0/bias"}


# --- the run's own folder ---


class Stop(Exception):
    pass


KEPT = ("--epochs", "16", "--patience", "16", "--seeds", "2", "--width", "8", "--folds", "3")
EQUAL = ("model.npz", "predictions.csv", "history.csv", "confusion.csv", "config.json")


def outcome_of(run):
    """Everything of a run that must not depend on how often it was broken off."""
    metrics = json.loads((run / "metrics.json").read_text())
    config = json.loads((run / "config.json").read_text())
    for told in ("seconds", "command", "settings"):  # the last two name the folder
        del metrics[told]
    del config["options"]["out"]
    return [metrics, config, *((run / name).read_bytes() for name in EQUAL[:-1])]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, jax_stack):
    """A folder of features with its statistics, and a run on it that nothing broke off."""
    place = tmp_path_factory.mktemp("kept")
    write_sample(place / "data", actors=4, dim=24)
    for run in ("first", "run"):
        assert train.main([str(place / "data"), "--out", str(place / run), *KEPT]) == 0
    return place


def stopping_after(patch, calls):
    """Let every call be saved before the next one, and training end with an exception after so many."""
    offer, made = train.Keeper.offer, []

    def offer_and_wait(keeper, progress):
        offer(keeper, progress)
        keeper.rest()
        made.append(progress)
        if len(made) == calls:
            raise Stop

    patch.setattr(train.Keeper, "offer", offer_and_wait)
    patch.setattr(train, "DUTY", 0)


@pytest.fixture
def broken(unbroken, tmp_path, monkeypatch):
    """A run that stopped after its third call, with the state of the second and the third on the disk."""
    with monkeypatch.context() as patch:
        stopping_after(patch, 3)
        with pytest.raises(Stop):
            train.main([str(unbroken / "data"), "--out", str(tmp_path / "run"), *KEPT])
    assert {path.name for path in tmp_path.glob("run/state*")} == {"state-0.bin", "state-1.bin"}
    return tmp_path / "run"


def go_on(unbroken, run, *more):
    return train.main([str(unbroken / "data"), "--out", str(run), *KEPT, *more])


def states(run):
    return sorted(run.glob("state-*.bin"), key=lambda path: stats.read_checked_arrays(path)[0]["serial"])


def test_the_same_command_goes_on_and_gives_the_same_bits(unbroken, broken, caplog):
    caplog.set_level("INFO", "train")
    assert go_on(unbroken, broken) == 0
    assert "GOING ON from epoch 12 of the unfinished run" in caplog.text
    assert outcome_of(broken) == outcome_of(unbroken / "run")
    assert not list(broken.glob("state*"))
    log_lines = (broken / "train.log").read_text()
    assert log_lines.index("GOING ON") < log_lines.index("epoch 16/16")


def test_a_damaged_state_hands_over_to_the_one_before_and_says_so(unbroken, broken, caplog):
    newest = states(broken)[-1]
    blob = bytearray(newest.read_bytes())
    blob[len(blob) // 2] ^= 1
    newest.write_bytes(blob)
    caplog.set_level("INFO", "train")
    assert go_on(unbroken, broken) == 0
    assert "GOING ON FROM THE ONE BEFORE" in caplog.text
    assert "GOING ON from epoch 8 of" in caplog.text
    assert outcome_of(broken) == outcome_of(unbroken / "run")


def test_when_nothing_of_the_state_is_whole_nothing_is_started_over_in_silence(unbroken, broken, caplog):
    for path in states(broken):
        path.write_bytes(path.read_bytes()[:-5])
    before = {path.name: path.read_bytes() for path in broken.iterdir()}
    assert go_on(unbroken, broken) == 2
    assert "--fresh starts over" in caplog.text
    del before["lock"]
    assert {name: (broken / name).read_bytes() for name in before} == before
    assert go_on(unbroken, broken, "--fresh") == 0
    assert outcome_of(broken)[2:] == outcome_of(unbroken / "run")[2:]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--width", "16"), "--width 8 there and 16 here"),
        (("--classes", "happy,sad"), "--classes unset there and happy,sad here"),
    ],
)
def test_the_state_of_another_run_is_refused_with_the_difference(unbroken, broken, caplog, more, told):
    before = [path.read_bytes() for path in states(broken)]
    assert go_on(unbroken, broken, *more) == 2
    assert told in caplog.records[-1].message
    assert [path.read_bytes() for path in states(broken)] == before


def test_the_state_for_other_files_is_refused(unbroken, broken, tmp_path, caplog):
    other = write_sample(tmp_path / "other", actors=4, dim=24)
    for name in (stats.MEAN_FILE, stats.STD_FILE):
        shutil.copy(unbroken / "data" / name, other)
    next(iter(other.glob("*.npz"))).unlink()
    assert train.main([str(other), "--out", str(broken), *KEPT]) == 2
    assert "utterances 112 there and 111 here" in caplog.records[-1].message


def test_a_sweep_goes_on_in_the_middle_of_a_setting(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SWEEP", {name: (1.0,) if name == "width" else (0.0,) for name in train.SWEEP})
    monkeypatch.setitem(train.SWEEP, "learning_rate", (0.001, 0.02))
    assert go_on(unbroken, tmp_path / "whole", "--sweep") == 0
    with monkeypatch.context() as patch:
        stopping_after(patch, 6)
        with pytest.raises(Stop):
            go_on(unbroken, tmp_path / "run", "--sweep")
    assert stats.read_checked_arrays(states(tmp_path / "run")[-1])[0]["place"] == "epoch 8 of setting 2"
    assert go_on(unbroken, tmp_path / "run", "--sweep") == 0
    assert outcome_of(tmp_path / "run") == outcome_of(tmp_path / "whole")


def test_a_save_that_lags_behind_spoils_no_result(unbroken, tmp_path, monkeypatch):
    """The background alone has a slow disk: the results wait for it."""
    fsync = os.fsync

    def slow(file):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(1)
        fsync(file)

    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(train, "DUTY", 0)
    assert go_on(unbroken, tmp_path / "run") == 0
    assert outcome_of(tmp_path / "run") == outcome_of(unbroken / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == ARTIFACTS


def test_a_fault_of_the_background_is_said_once_and_ends_no_run(unbroken, tmp_path, monkeypatch, caplog):
    def fault(*arguments):
        raise MemoryError

    monkeypatch.setattr(stats, "checked_arrays", fault)
    monkeypatch.setattr(train, "DUTY", 0)
    assert go_on(unbroken, tmp_path / "run") == 0
    assert caplog.text.count("state: not saved, the run goes on: MemoryError()") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda described, arrays: described.pop("serial"),
        lambda described, arrays: described.update(identity=None),
        lambda described, arrays: described.update(epoch="8"),
        lambda described, arrays: described.update(epoch=-4),
        lambda described, arrays: described.update(history=[]),
        lambda described, arrays: arrays.update({next(iter(arrays)): np.full(3, np.nan, np.float32)}),
        lambda described, arrays: arrays.pop(next(iter(arrays))),
    ],
)
def test_a_state_that_no_run_can_have_written_is_refused(unbroken, broken, caplog, change):
    for path in states(broken):
        described, arrays = stats.read_checked_arrays(path)
        change(described, arrays)
        stats.write_files(broken, {path.name: stats.checked_arrays(described, arrays)})
    assert go_on(unbroken, broken) == 2
    assert "--fresh starts over" in caplog.records[-1].message


def test_a_run_that_is_refused_leaves_nothing_behind(unbroken, tmp_path):
    assert go_on(unbroken, tmp_path / "run", "--folds", "nonsense") == 2
    assert not (tmp_path / "run").exists()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / ".thesis.tmp").write_text("mine")
    (tmp_path / "own" / "lock").symlink_to("precious")
    (tmp_path / "own" / "precious").write_text("mine")
    assert go_on(unbroken, tmp_path / "own", "--folds", "nonsense") == 1
    assert {(path.name, path.read_text()) for path in (tmp_path / "own").iterdir()} == {
        (".thesis.tmp", "mine"),
        ("precious", "mine"),
        ("lock", "mine"),
    }


def test_after_bad_steps_the_state_before_them_is_on_the_disk(unbroken, tmp_path, monkeypatch, caplog):
    real = train._end_if_broken

    def broken_later(worst_run, first, folds, config):
        real(worst_run + (5 if first == 8 else 0), first, folds, config)

    monkeypatch.setattr(train, "_end_if_broken", broken_later)
    assert go_on(unbroken, tmp_path / "run") == 1
    assert "NaN or Inf in 5 steps in a row" in caplog.text
    described, arrays = stats.read_checked_arrays(states(tmp_path / "run")[-1])
    assert described["epoch"] == 8
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_a_state_that_cannot_be_saved_does_not_end_the_run(unbroken, tmp_path, monkeypatch, caplog):
    real = stats.write_files

    def full(folder, blobs):
        if any(name.startswith("state") for name in blobs):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / "state-0.bin"))
        real(folder, blobs)

    monkeypatch.setattr(stats, "write_files", full)
    assert go_on(unbroken, tmp_path / "run") == 0
    assert "state: not saved, the run goes on" in caplog.text
    assert outcome_of(tmp_path / "run") == outcome_of(unbroken / "run")


def test_results_are_saved_though_the_folder_was_taken_away(unbroken, tmp_path, monkeypatch):
    real = train.evaluate

    def taking(*arguments):
        shutil.rmtree(tmp_path / "run")
        return real(*arguments)

    monkeypatch.setattr(train, "evaluate", taking)
    assert go_on(unbroken, tmp_path / "run") == 0
    assert outcome_of(tmp_path / "run") == outcome_of(unbroken / "run")


@pytest.mark.skipif(train.fcntl is None, reason="there is no flock here")
def test_a_second_run_on_one_folder_exits_before_jax_and_names_the_first(unbroken, broken):
    code = f"import sys; sys.modules['jax'] = None; sys.path.insert(0, {str(ROOT)!r}); import train; sys.exit("
    code += "train.main())"
    command = [sys.executable, "-c", code, str(unbroken / "data"), "--out", str(broken), *KEPT]
    before = {path.name: path.read_bytes() for path in broken.iterdir() if path.name != "lock"}
    with train.Keeper(broken):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"is in use by another run, process {os.getpid()}" in done.stderr
    assert {name: (broken / name).read_bytes() for name in before} == before


def started(unbroken, run, *more):
    """Start a run as a process of its own, with all calls saved."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train; train.DUTY = 0\n{chr(10).join(more)}\n"
    code += "import signal; [signal.signal(number, signal.SIG_DFL) for number in train.ENDING]"  # nohup ignores them
    code += "\nimport check_data; status = check_data.run_cli(train.main); import os; os._exit(status)"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(unbroken / "data"), "--out", str(run), *KEPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, found):
    """Look until something is found, as closely as can be."""
    while not found():
        assert process.poll() is None, process.stderr.read()


SLOW_DISK = "import os; fsync = os.fsync; os.fsync = lambda file: (time.sleep(0.1), fsync(file))"
SLOW = "import time; real = train._say_progress; train._say_progress = lambda *a: (real(*a), time.sleep(0.6))"


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_leaves_the_state_of_the_last_call(unbroken, tmp_path, number, status):
    run = tmp_path / "run"
    process = started(unbroken, run, SLOW, "train.DUTY = 1e6")  # the first call alone is saved by itself
    wait_for(process, lambda: (run / "train.log").exists() and "epoch 8/16" in (run / "train.log").read_text())
    process.send_signal(number)
    _, told = process.communicate()
    assert process.returncode == status
    assert f"ended by {number.name}; the same command goes on from epoch 8" in told.splitlines()[-1]
    assert "Traceback" not in told
    assert go_on(unbroken, run) == 0
    assert outcome_of(run) == outcome_of(unbroken / "run")


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_a_second_signal_ends_the_run_though_the_save_hangs(unbroken, tmp_path):
    run = tmp_path / "run"
    hangs = "train.threading.Timer = lambda *a: type('Never', (), {'start': lambda self: None})()"
    process = started(unbroken, run, SLOW, hangs, "train.stats.write_files = lambda *a: time.sleep(100)")
    wait_for(process, lambda: (run / "train.log").exists() and "epoch 4/16" in (run / "train.log").read_text())
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
@pytest.mark.parametrize("cores", [1, 2])
def test_kills_at_random_moments_change_no_bit_of_the_outcome(unbroken, tmp_path, cores):
    """Five on each number of cores: two while a state is written, one just after, two at any time."""
    own = f"import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cores}])"
    run, random = tmp_path / "run", np.random.default_rng(cores)
    whole = started(unbroken, tmp_path / "whole", own)
    assert whole.wait() == 0, whole.stderr.read()
    for moment in ("writing", "any", "renamed", "writing", "any"):
        process = started(unbroken, run, own, SLOW, SLOW_DISK)
        before = {path: path.stat().st_mtime_ns for path in run.glob("state-*.bin")}
        if moment == "writing":
            wait_for(process, lambda: list(run.glob(".state*")))
        elif moment == "renamed":
            wait_for(process, lambda b=before: {p: p.stat().st_mtime_ns for p in run.glob("state-*.bin")} != b)
        else:
            time.sleep(random.uniform(0.2, 1.5))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert list(run.glob("state-*.bin"))
    final = started(unbroken, run, own)
    told = final.communicate()[1]
    assert final.returncode == 0, told
    assert "GOING ON from" in told
    assert outcome_of(run) == outcome_of(tmp_path / "whole")
    assert {path.name for path in run.iterdir()} == ARTIFACTS


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
def test_every_call_of_saving_the_state_may_fail(tmp_path, jax_stack, monkeypatch, fault):
    """At each opening, write, fsync and rename in turn: an older state is whole, and the next save goes through."""

    def progress(epoch):
        return train.Progress(0, epoch, {"x": np.full(3, epoch, np.float32)}, None, [], [{"epoch": epoch}])

    keeper = train.Keeper(tmp_path)
    keeper._save(progress(4))
    keeper._save(progress(8))
    for number in itertools.count(1):
        calls = []

        def failing(real, number=number, calls=calls):
            def call(*arguments, **named):
                calls.append(real)
                if len(calls) >= number:
                    raise fault
                return real(*arguments, **named)

            return call

        epoch = 8 + 4 * number
        with monkeypatch.context() as patch:
            for module, name in ((os, "fsync"), (os, "replace"), (os, "open"), (stats, "_parts"), (Path, "unlink")):
                patch.setattr(module, name, failing(getattr(module, name)))
            with contextlib.suppress(Killed):
                keeper._save(progress(epoch))
        found = [stats.read_checked_arrays(path) for path in tmp_path.glob("state-*.bin")]
        assert len(found) == 2
        newest, arrays = max(found, key=lambda pair: pair[0]["serial"])
        assert newest["epoch"] in (epoch, epoch - 4)
        assert (arrays["[0]['x']"] == newest["epoch"]).all()
        if len(calls) < number:
            break
        keeper._save(progress(epoch))
        keeper._serial = max(keeper._serial, newest["serial"])
    assert number > 8

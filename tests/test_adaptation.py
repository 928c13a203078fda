"""The speaker's other utterances (--adapt), and all layers of an encoder (--layers)."""

import dataclasses
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import (
    SMALL,
    Population,
    computed_statistics,
    dataset_of,
    documented_python,
    experiment_of,
    rows_of,
    write_sequences,
)

import check_data
import emotions
import stats
import train

NAMES = ("neutral", "happy", "sad", "angry")
LAYERS, WIDTH = 3, 6
INFORMATIVE = 1  # the only layer with the emotion


# --- data ---


def of_speaker(speaker, number, emotion="happy", **more):
    return emotions.Utterance(f"{speaker}-{number:02d}.npz", "own", emotion, f"own:{speaker}", **more)


def dataset_from(x, label, utterances, layers=1):
    x = np.asarray(x, np.float32)
    moments = stats.Moments.stack([stats.Moments.of(row[None]) for row in x])
    return train.Dataset(x, np.ones(len(x), int), np.asarray(label), NAMES, utterances, moments, layers=layers)


def speakers_with_offsets(offset, speakers=9, takes=4, seed=0):
    """Vectors of four emotions, each of them spoken by every speaker, who are moved by offsets of this size."""
    rng = np.random.default_rng(seed)
    directions, moves = rng.normal(size=(4, 8)), offset * rng.normal(size=(speakers, 8))
    x, label, utterances = [], [], []
    for speaker, emotion, take in np.ndindex(speakers, 4, takes):
        x.append(directions[emotion] + moves[speaker] + 1.5 * rng.normal(size=8))
        label.append(emotion)
        utterances.append(of_speaker(speaker, 4 * take + emotion, NAMES[emotion]))
    return dataset_from(x, label, utterances)


def write_layers(folder, seed=0):
    """Files of three layers, one of which has the emotion, in the form (L, D), of six speakers with offsets."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    directions, moves = 2 * rng.normal(size=(8, WIDTH)), 3 * rng.normal(size=(7, LAYERS, WIDTH))
    for actor in range(1, 7):
        for emotion, take in np.ndindex(8, 2):
            layers = moves[actor] + rng.normal(size=(LAYERS, WIDTH))
            layers[INFORMATIVE] += directions[emotion]
            name = f"03-01-{emotion + 1:02d}-01-01-{take + 1:02d}-{actor:02d}.npz"
            np.savez(folder / name, hidden_states=layers.astype(np.float32))
    return folder


def write(kind, folder):
    return (write_sequences if kind == "sequences" else write_layers)(folder)


def adapted(dataset, adapt="all", **options):
    """An experiment with --adapt."""
    config = dataclasses.replace(SMALL, adapt=adapt, **options)
    return experiment_of(with_others(dataset, config), config)


def with_others(dataset, config):
    return train.add_others(dataset, train.make_split(dataset, config), config)


def layers_of(folder):
    return train.pack(check_data.scan(check_data.ScanOptions(str(folder), layers=True), keep_features=True))


# --- the other utterances of a speaker ---


def test_the_others_are_the_mean_of_the_speakers_other_utterances():
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    utterances = [of_speaker(speaker, number) for number, speaker in enumerate("abaabca")]
    mean, count = train.other_utterances(x, utterances)
    np.testing.assert_array_equal(count, [3, 1, 3, 3, 1, 0, 3])
    expected = [x[[2, 3, 6]], x[[4]], x[[0, 3, 6]], x[[0, 2, 6]], x[[1]], np.zeros((1, 3)), x[[0, 2, 3]]]
    np.testing.assert_allclose(mean, [rows.mean(0) for rows in expected], rtol=1e-6)


def test_an_utterance_of_an_unknown_speaker_has_no_others_and_is_none_of_them():
    utterances = [of_speaker("a", 0), of_speaker("a", 1)]
    utterances += [dataclasses.replace(of_speaker("?", number), speaker=None) for number in (2, 3)]
    mean, count = train.other_utterances(np.eye(4), utterances)
    np.testing.assert_array_equal(count, [1, 1, 0, 0])
    np.testing.assert_array_equal(mean, np.eye(4)[[1, 0, 2, 2]] * [[1], [1], [0], [0]])


def recordings():
    """Six recordings of one speaker: the second in two files, the third with two versions, the last a version alone."""
    names = [("r0", ""), ("r1", ""), ("r1", ""), ("r2", ""), ("r2", "noise"), ("r2", "slow"), ("r3", ""), ("r4", "cut")]
    return [
        of_speaker("a", number, recording=recording, version=version)
        for number, (recording, version) in enumerate(names)
    ]


@pytest.mark.parametrize("most", [np.inf, 2])
def test_no_file_of_a_recording_moves_the_offset_of_that_recording_by_a_bit(most):
    utterances, rng = recordings(), np.random.default_rng(0)
    x = rng.normal(3, size=(8, 5)).astype(np.float32)
    before = train.other_utterances(x, utterances, most)
    for recording in ("r0", "r1", "r2", "r3", "r4"):
        own = [utterance.recording == recording for utterance in utterances]
        changed = np.where(np.array(own)[:, None], x * 1e12 + rng.normal(size=x.shape), x).astype(np.float32)
        after = train.other_utterances(changed, utterances, most)
        np.testing.assert_array_equal(after.mean[own], before.mean[own])
        np.testing.assert_array_equal(after.count, before.count)
        if recording != "r4" and most > 2:
            assert (after.mean[np.invert(own)] != before.mean[np.invert(own)]).any(1).all()


def test_versions_are_moved_like_their_original_and_move_nothing():
    mean, count = train.other_utterances(np.eye(8), recordings())
    np.testing.assert_array_equal(count, [4, 3, 3, 4, 4, 4, 4, 5])
    drawn = mean > 0
    assert not drawn[:, [4, 5, 7]].any()
    np.testing.assert_array_equal(drawn[3], drawn[4])
    np.testing.assert_array_equal(np.flatnonzero(drawn[7]), [0, 1, 2, 3, 6])


def drawn_others(utterances, most, seed=0, scale=1.0):
    """Which utterances, (N, N), are among the drawn others of each."""
    mean, count = train.other_utterances(scale * np.eye(len(utterances)), utterances, most, seed)
    drawn = mean > 0
    np.testing.assert_array_equal(drawn.sum(1), count)
    np.testing.assert_allclose(mean.sum(1), scale * (count > 0), rtol=1e-6)
    return drawn


def test_the_drawn_others_are_as_many_as_allowed_of_the_same_speaker_and_never_the_utterance_itself():
    utterances = [of_speaker("abc"[min(number // 8, 2)], number) for number in range(19)] + recordings()
    speaker = np.array([utterance.speaker for utterance in utterances])
    recording = np.array([utterance.recording or utterance.file for utterance in utterances])
    for most in (1, 2, 3, 6):
        drawn = drawn_others(utterances, most)
        assert not (drawn & (speaker != speaker[:, None])).any()
        assert not (drawn & (recording == recording[:, None])).any()
        available = [7] * 16 + [2] * 3
        np.testing.assert_array_equal(drawn.sum(1)[:19], np.minimum(available, most))


def test_speakers_with_few_utterances_are_moved_by_all_others():
    utterances = [of_speaker("a", number) for number in range(5)]
    x = np.random.default_rng(0).normal(size=(5, 3))
    for left, right in zip(
        train.other_utterances(x, utterances, 4), train.other_utterances(x, utterances), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_the_drawn_others_depend_on_the_seed_alone():
    """Neither on features nor on labels."""
    utterances = [of_speaker(number % 3, number) for number in range(60)]
    relabelled = [dataclasses.replace(utterance, emotion="sad") for utterance in utterances]
    drawn = drawn_others(utterances, 5)
    np.testing.assert_array_equal(drawn_others(utterances, 5, scale=7.0), drawn)
    np.testing.assert_array_equal(drawn_others(relabelled, 5), drawn)
    assert (drawn_others(utterances, 5, seed=1) != drawn).any(1).mean() > 0.9
    assert len(np.unique(drawn, axis=0)) > 50  # each utterance has others of its own


def test_training_uses_all_others_and_validation_at_most_as_many_as_are_given():
    dataset = speakers_with_offsets(1, speakers=3)
    assert with_others(dataset, SMALL) is dataset
    added = with_others(dataset, dataclasses.replace(SMALL, adapt="all"))
    assert set(added.others.count) == set(added.given.count) == {15}
    added = with_others(dataset, dataclasses.replace(SMALL, adapt="5", seed=3))
    assert (set(added.others.count), set(added.given.count)) == ({15}, {5})
    expected = train.other_utterances(dataset.x, dataset.utterances, 5, 3)
    np.testing.assert_array_equal(added.given.mean, expected.mean)


def test_unknown_speakers_are_refused_with_any_folds():
    """Folds that need no speakers, too."""
    dataset = speakers_with_offsets(1, speakers=3)
    split = train.make_split(dataset, SMALL)._replace(independent=True)
    dataset.utterances[0] = dataclasses.replace(dataset.utterances[0], speaker=None)
    with pytest.raises(check_data.UsageError, match="unknown for 1 file"):
        train.add_others(dataset, split, dataclasses.replace(SMALL, adapt="all"))


def test_a_final_model_that_does_not_adapt_gives_plain_answers():
    model = train.Model(**dict.fromkeys(train.Model._fields))
    assert model._replace(adapt="8", prior=4.0).adapted == "8"
    assert model._replace(adapt="8", prior=np.inf).adapted is None
    assert model._replace(prior=np.inf).adapted is None


def test_unknown_speakers_are_refused_for_training():
    dataset = speakers_with_offsets(1, speakers=3)
    for place in (0, 5):
        dataset.utterances[place] = dataclasses.replace(dataset.utterances[place], speaker=None)
    with pytest.raises(check_data.UsageError, match=r"--adapt needs the speaker of every file.*unknown for 2 files"):
        with_others(dataset, dataclasses.replace(SMALL, adapt="8"))


# --- how far an utterance is moved ---


def test_others_move_an_utterance_as_much_as_their_number_deserves():
    """By hand for one utterance: 6 others and a prior of 4 move the origin by 6/10 of the way to their mean."""
    model = train.Ensemble(np.float32([1, 10]), np.float32([2, 5]), 4.0, {})
    others = train.Others(np.float32([[3, 0], [100, 100]]), np.float32([6, 0]))
    np.testing.assert_allclose(train.centre(model, others), [[1 + 0.6 * 2, 10 - 0.6 * 10], [1, 10]], rtol=1e-6)
    z = model.normalise(np.float32([[5, 9], [5, 9]]), others)
    np.testing.assert_allclose(z, [[(5 - 2.2) / 2, (9 - 4) / 5], [2, -0.2]], rtol=1e-6)


def test_an_infinite_prior_changes_no_bit():
    rng = np.random.default_rng(0)
    x, mean = rng.normal(size=(2, 5, 3)).astype(np.float32)
    others = train.Others(mean, np.arange(5, dtype=np.float32))
    model = train.Ensemble(*rng.uniform(1, 2, (2, 3)).astype(np.float32), np.inf, {})
    np.testing.assert_array_equal(model.normalise(x, others), model.normalise(x))


def test_folds_without_a_prior_have_the_statistics_of_a_run_without_adaptation(monkeypatch):
    monkeypatch.setattr(train, "choose_prior", lambda *arguments: np.inf)
    dataset = speakers_with_offsets(2)
    dataset = dataset_from(dataset.x + 100, dataset.label, dataset.utterances)  # a large mean, which costs digits
    _, dataset, split, stored = adapted(dataset)
    plain = train.normalise_folds(dataset._replace(others=None, given=None), split, stored)
    for found, expected in zip(train.normalise_folds(dataset, split, stored), plain, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_run_in_which_no_fold_has_a_prior_is_one_without_adaptation_to_the_bit(monkeypatch, jax_stack):
    monkeypatch.setattr(train, "choose_prior", lambda *arguments: np.inf)
    dataset = speakers_with_offsets(2)
    plain, found = (train.train(experiment) for experiment in (experiment_of(dataset), adapted(dataset, "5")))
    np.testing.assert_array_equal(found.predictions.answers.logits, plain.predictions.answers.logits)
    for one, other in zip(found.ensembles, plain.ensembles, strict=True):
        for name, array in other.params.items():
            np.testing.assert_array_equal(one.params[name], array)


def priors(dataset, **options):
    """The prior of each fold and of the final model."""
    _, dataset, split, stored = adapted(dataset, **options)
    *_, prior = train.normalise_folds(dataset, split, stored)
    return prior


def test_speakers_that_differ_are_centred():
    dataset = speakers_with_offsets(2, takes=12)
    assert np.isfinite(priors(dataset)).all()
    assert np.isfinite(priors(dataset, adapt="6")).all()


def test_speakers_that_do_not_differ_are_not_centred():
    assert np.isinf(priors(speakers_with_offsets(0, takes=12))).all()


def test_speakers_of_different_emotions_are_not_centred():
    """Each speaker has nearly one emotion alone, so that the mean of the others is that of the emotion."""
    dataset = speakers_with_offsets(0, speakers=12, takes=12)
    kept = [
        place
        for place, (label, utterance) in enumerate(zip(dataset.label, dataset.utterances))
        if label == int(utterance.speaker[4:]) % 4 or place % 12 == 0
    ]
    part = dataset_from(dataset.x[kept], dataset.label[kept], [dataset.utterances[place] for place in kept])
    assert np.isinf(priors(part)).all()


def test_the_scale_is_that_of_the_centred_utterances_that_a_fold_does_not_test():
    _, dataset, split, stored = adapted(speakers_with_offsets(3))
    mean, scale, prior = train.normalise_folds(dataset, split, stored)
    for fold in range(split.folds + 1):
        used = split.fold != fold
        own = dataset.x[used].astype(np.float64)
        np.testing.assert_allclose(mean[fold], own.mean(0), rtol=1e-5, atol=1e-5)
        share = 15 / (15 + prior[fold])
        centred = own - mean[fold] - share * (dataset.others.mean[used] - mean[fold])
        np.testing.assert_allclose(scale[fold], centred.std(0), rtol=1e-4)


def test_statistics_of_the_user_keep_their_scale_when_speakers_are_centred():
    _, dataset, split, _ = adapted(speakers_with_offsets(3))
    supplied = stats.Statistics(np.full(8, 1, np.float32), np.full(8, 2, np.float32))
    mean, scale, prior = train.normalise_folds(dataset, split, stats.Stored(supplied, True, None))
    assert (mean == 1).all() and (scale == 2).all() and np.isfinite(prior).all()


# --- options ---


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("D", None),
        ("--adapt D", "all"),
        ("D --adapt", "all"),
        ("D --adapt --layers", "all"),
        ("--adapt all D", "all"),
        ("--adapt=all D", "all"),
        ("--adapt 8 D", "8"),
        ("D --adapt=8", "8"),
        ("--adapt ./8", "all"),
    ],
)
def test_the_number_of_others_may_be_left_out_before_the_folder(words, expected):
    config = train.parse_config(words.split())
    assert (config.adapt, config.directory) == (expected, words.split()[-1] if "./" in words else "D")
    assert train.parse_config(check_data.command_line(config).split()[2:]) == config


@pytest.mark.parametrize("adapt", ["0", "00", "-1", "1.5", "some", ""])
def test_no_other_number_of_others_is_accepted(adapt):
    with pytest.raises(check_data.UsageError, match="--adapt must be all, or a number above 0"):
        dataclasses.replace(SMALL, adapt=adapt)


# --- the program in training, and the forward pass in numpy ---


def population_of(kind, folder, jax):
    """A population in which every fold has a prior of 4; `kind` is vectors, sequences or layers."""
    if kind == "vectors":
        dataset = speakers_with_offsets(2)
    else:
        dataset = (dataset_of if kind == "sequences" else layers_of)(write(kind, folder))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "choose_prior", lambda *arguments: 4.0)
        patched.setattr(train, "MAX_LENGTH_GROUPS", 2)  # each group takes long to compile
        return Population(adapted(dataset, "5"), jax)


@pytest.fixture(scope="module", params=["vectors", "sequences", "layers"])
def population(request, tmp_path_factory, jax_stack):
    """Do not change it."""
    return population_of(request.param, tmp_path_factory.mktemp(request.param) / "data", jax_stack)


def first_models(population, rows):
    """Parameters of all members that are nowhere zero, and the models of some rows of one fold as an ensemble."""
    rng = np.random.default_rng(0)
    params = population.jax.tree.map(
        lambda leaf: (leaf + rng.normal(size=leaf.shape) / 20).astype(np.float32),
        train.initial_state(population.static, population.members).params,
    )
    return params, train.hidden_layers(population.members, params, rows)


def test_the_forward_pass_of_centred_utterances_is_that_of_training(population):
    static, data, rows = population.static, population.data, [2, 3]
    params, ensemble = first_models(population, rows)
    chosen = np.asarray(data.batches)[:, 0] if static.groups else np.arange(0, 96, 7)
    given = train.select_others(population.dataset.given, chosen)
    logits, _ = ensemble.forward(population.dataset.features(chosen), given)

    @population.jax.jit
    def forward_in_training(member, params, chosen):
        inputs = train.pool(params, member, train.gather_batch(static, data, data.given, chosen))
        return static.network.apply({"params": params}, inputs, train.width_mask(static, member.hyper))

    for seed, row in enumerate(rows):
        expected = forward_in_training(population.member(row), population.of(params, row), chosen)
        np.testing.assert_allclose(logits[seed], expected, rtol=1e-3, atol=1e-4)
    plain, _ = ensemble.forward(population.dataset.features(chosen))
    assert np.abs(plain - logits).max() > 0.01


def test_the_others_move_every_frame_and_layer_of_an_utterance_by_the_same_offset(population):
    """By hand: with 5 others and a prior of 4, by 5/9 of the way from the mean of all to theirs."""
    _, ensemble = first_models(population, [4, 5])
    width = population.dataset.x.shape[1]
    ensemble.params["linear/kernel"] = np.random.default_rng(1).normal(size=(2, width, 8))
    ensemble.params["linear/bias"] = np.zeros((2, 8))
    if "layers" in ensemble.params:
        ensemble.params["layers"] = np.tile(np.float32([0.2, 0.5, 0.3]), (2, 1))
    classes = len(population.dataset.classes)
    for name in ("linear/kernel", "linear/bias"):
        ensemble.params[name] = ensemble.params[name][..., :classes]
    features = list(population.dataset.features(range(6)))
    given = train.select_others(population.dataset.given, range(6))
    assert set(given.count) == {5}
    offset = 5 / 9 * (given.mean - ensemble.mean)
    moved = [frames - move for frames, move in zip(features, offset)]
    for found, expected in zip(ensemble.forward(features, given), ensemble.forward(moved), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_training_reads_all_others_and_validation_those_that_are_given(population, monkeypatch):
    static, data, member = population.static, population.data, population.member(0)
    member = population.jax.tree.map(train.jnp.asarray, member)
    seen, real = [], train.gather_batch

    def gather_batch(static, data, others, chosen):
        seen.append(others)
        return real(static, data, others, chosen)

    monkeypatch.setattr(train, "gather_batch", gather_batch)
    state = population.first_state(member)
    population.jax.eval_shape(lambda: train.member_epoch(static, data, (0, 0), member, state))
    assert [others is data.others for others in seen] == [True] * (len(seen) - 1) + [False]
    assert seen[-1] is data.given and len(seen) > 1


# --- layers ---


@pytest.fixture(scope="module")
def layer_experiment(tmp_path_factory, jax_stack):
    return experiment_of(layers_of(write_layers(tmp_path_factory.mktemp("layers") / "data")))


def test_layers_are_packed_one_after_the_other(tmp_path):
    folder = write_layers(tmp_path / "data")
    dataset = layers_of(folder)
    assert (dataset.layers, dataset.frames, dataset.x.shape) == (LAYERS, None, (96, LAYERS * WIDTH))
    for utterance, row in zip(dataset.utterances, dataset.x):
        np.testing.assert_array_equal(row, np.load(folder / utterance.file)["hidden_states"].ravel())
    np.testing.assert_allclose(
        dataset.mean_layer(dataset.x), (dataset.x[:, :6] + dataset.x[:, 6:12] + dataset.x[:, 12:]) / 3, rtol=1e-5
    )


def test_the_layers_have_equal_weights_at_the_start(layer_experiment, jax_stack):
    population = Population(layer_experiment, jax_stack)
    params = train.initial_state(population.static, population.members).params
    assert params["Dense_0"]["kernel"].shape == (8, WIDTH, 8)
    np.testing.assert_array_equal(params["layers"], np.zeros((8, LAYERS)))
    ensemble = train.hidden_layers(population.members, params, [0, 1])
    np.testing.assert_allclose(ensemble.params["layers"], np.full((2, LAYERS), 1 / 3), rtol=1e-6)
    row = population.dataset.x[0]
    _, pooled = ensemble.inputs(row[None], None)
    z = ((row - ensemble.mean) / ensemble.scale).reshape(LAYERS, WIDTH)
    np.testing.assert_allclose(pooled, np.tile(z.mean(0), (2, 1)), rtol=1e-5, atol=1e-6)


def test_a_layer_with_the_emotion_gets_the_largest_weight_in_every_model(layer_experiment):
    experiment = adapted(layer_experiment.dataset, width=256, learning_rate=0.005)
    trained = train.train(experiment)
    for ensemble, choice in zip(trained.ensembles, trained.choices, strict=True):
        np.testing.assert_allclose(ensemble.params["layers"].sum(1), 1, rtol=1e-5)
        np.testing.assert_array_equal(ensemble.params["layers"].argmax(1), [INFORMATIVE] * SMALL.seeds)
        assert np.argmax(choice["layers"]) == INFORMATIVE and sum(choice["layers"]) == pytest.approx(1)
    report = train.evaluate_run(experiment, trained)["layers"]
    assert [row["layer"] for row in report] == [*range(LAYERS)]
    hidden = np.concatenate([ensemble.params["layers"] for ensemble in trained.ensembles])
    for name, values in (("hidden", hidden.mean(0)), ("low", hidden.min(0)), ("high", hidden.max(0))):
        assert [row[name] for row in report] == pytest.approx(values.tolist())
    linear = np.mean([choice["layers"] for choice in trained.choices], 0)
    assert [row["linear"] for row in report] == pytest.approx(linear.tolist())


def test_the_linear_part_has_a_model_for_each_layer(layer_experiment):
    _, dataset, split, stored = layer_experiment
    model = train.Ensemble(stored.statistics.mean, stored.statistics.scale(), np.inf, {})
    kernel, bias = train.fit_linear_part(dataset, split.fold != 0, model)
    x, label = model.normalise(dataset.x[split.fold != 0]), dataset.label[split.fold != 0]
    for layer in range(LAYERS):
        expected = stats.fit_lda(x[:, WIDTH * layer :][:, :WIDTH], label, 8)
        for found, part in zip((kernel[layer], bias[layer]), expected, strict=True):
            np.testing.assert_array_equal(found, part)


# --- honesty ---


@pytest.mark.parametrize("kind", ["sequences", "layers"])
def test_a_test_speaker_changes_no_bit_of_the_models_of_its_fold(kind, tmp_path, jax_stack, monkeypatch):
    """Other features and other labels, with --adapt: each fold chooses its prior without its test speakers."""
    monkeypatch.setattr(train, "MAX_LENGTH_GROUPS", 2)
    dataset = (dataset_of if kind == "sequences" else layers_of)(write(kind, tmp_path / "data"))
    config = dataclasses.replace(SMALL, seeds=1, width=4, batch=8, adapt="5")
    split, random = train.make_split(dataset, config), np.random.default_rng(0)
    tested, (_, speaker) = split.fold == 2, np.unique(split.speaker, return_inverse=True)

    def models(test_noise, label):
        """Each speaker has an offset; the frames of sequences are stored less x, so that they are moved, too."""
        offset = 3 * np.random.default_rng(1).normal(size=(6, dataset.x.shape[1]))[speaker]
        x = np.float32(dataset.x + offset + test_noise * tested[:, None] * random.normal(size=dataset.x.shape))
        changed = dataset._replace(x=x, label=label, moments=dataset.moments._replace(mean=np.float64(x)))
        stored = computed_statistics(changed)
        changed = train.add_others(changed, split, config)
        return train.train(train.Experiment(config, changed, split, stored)).ensembles

    shuffled = dataset.label.copy()
    shuffled[tested] = random.permutation(shuffled[tested])
    one, other = models(0, dataset.label), models(3, shuffled)

    def same(fold):
        parts, others = ((*each[fold][:3], *each[fold].params.values()) for each in (one, other))
        return all(np.array_equal(left, right) for left, right in zip(parts, others, strict=True))

    assert [same(fold) for fold in range(split.folds)] == [False, False, True]
    assert np.isfinite([ensemble.prior for ensemble in one]).any()


# --- runs ---


RUN = ("--layers", "--adapt", "all", "--folds", "3", "--seeds", "2", "--epochs", "4", "--width", "8")


@pytest.fixture(scope="module")
def run(tmp_path_factory, jax_stack):
    """A folder `data` and the results `run`; do not change them."""
    place = tmp_path_factory.mktemp("adapted")
    assert train.main([str(write_layers(place / "data")), "--out", str(place / "run"), *RUN]) == 0
    return place


def read_json(path):
    return json.loads(path.read_text())


def calibrated_logits(folder):
    with np.load(folder / "fusion.npz") as fusion:
        return fusion["id"].tolist(), fusion["logits"] / fusion["temperature"][:, None]


def test_a_run_records_layers_and_adaptation(run):
    config, metrics = read_json(run / "run" / "config.json"), read_json(run / "run" / "metrics.json")
    assert (config["dim"], config["layers"], config["options"]["adapt"]) == (WIDTH, LAYERS, "all")
    assert config["prior"] in train.PRIORS
    assert metrics["adapted"] == "all"
    assert [row["layer"] for row in metrics["layers"]] == [*range(LAYERS)]
    for fold in metrics["folds"]:
        assert fold["chosen"]["prior"] in train.PRIORS and len(fold["chosen"]["layers"]) == LAYERS
    for folder in (run / "data", run / "run"):
        for name in (stats.MEAN_FILE, stats.STD_FILE):
            assert np.load(folder / name).shape == (LAYERS, WIDTH)
    model = train.load_model(run / "run")
    assert (model.layers, model.dim, model.width, model.adapt) == (LAYERS, WIDTH, LAYERS * WIDTH, "all")
    assert model.prior == model.ensemble.prior == config["prior"]


def test_without_adaptation_the_prior_is_recorded_as_infinite(trained):
    config = read_json(trained / "first" / "config.json")
    assert (config["prior"], config["layers"], config["options"]["adapt"]) == (None, 1, None)
    assert train.load_model(trained / "first").prior == np.inf
    assert read_json(trained / "first" / "metrics.json")["adapted"] is None


def test_prediction_with_layers_and_adaptation_is_the_final_model_by_hand(run, tmp_path, capsys):
    assert train.main([str(run / "data"), "--predict", str(run / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "not adapted" not in capsys.readouterr().out
    files, logits = calibrated_logits(tmp_path / "out")
    x = np.stack([np.load(run / "data" / f"{name}.npz")["hidden_states"].ravel() for name in files]).astype(np.float64)
    prior = read_json(run / "run" / "config.json")["prior"]
    with np.load(run / "run" / "model.npz") as model:
        mean, scale = model["mean"], model["scale"]
        params = {name.removeprefix("params/"): model[name] for name in model.files if "/" in name}
    for row, file in enumerate(files):
        others = [place for place, name in enumerate(files) if name[-2:] == file[-2:] and place != row]
        assert len(others) == 15
        z = (x[row] - mean - 15 / (15 + prior) * (x[others].mean(0) - mean)) / scale
        by_seed = []
        for seed in range(2):
            one = {name: leaf[seed] for name, leaf in params.items()}
            hidden = one["layers"] @ z.reshape(LAYERS, WIDTH) @ one["Dense_0/kernel"] + one["Dense_0/bias"]
            total = np.maximum(hidden, 0) @ one["Dense_1/kernel"] + one["Dense_1/bias"]
            by_seed.append(total + z @ one["linear/kernel"] + one["linear/bias"])
        np.testing.assert_allclose(logits[row], np.mean(by_seed, 0), rtol=1e-3, atol=1e-4)


def test_the_documented_numpy_has_the_answers_with_layers_and_adaptation(run, tmp_path):
    assert train.main([str(run / "data"), "--predict", str(run / "run"), "--out", str(tmp_path / "out")]) == 0
    scope = {}
    exec(documented_python("def probabilities").replace("runs/sample", str(run / "run")), scope)
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    layers = {row["file"]: np.load(run / "data" / row["file"])["hidden_states"] for row in rows}
    for row in rows[::9]:
        others = [x for name, x in layers.items() if name[-6:] == row["file"][-6:] and name != row["file"]]
        expected = scope["probabilities"](layers[row["file"]], np.mean(others, 0), len(others))
        written = [float(row[f"p_{name}"]) for name in scope["config"]["classes"]]
        np.testing.assert_allclose(written, expected, atol=1e-5)


def test_prediction_draws_as_many_others_as_the_model_was_validated_with(run, tmp_path):
    copy = shutil.copytree(run / "run", tmp_path / "run")
    options = read_json(copy / "config.json")
    options["options"]["adapt"] = "3"
    (copy / "config.json").write_text(json.dumps(options))
    assert train.main([str(run / "data"), "--predict", str(copy), "--out", str(tmp_path / "out")]) == 0
    _, logits = calibrated_logits(tmp_path / "out")
    dataset, model = layers_of(run / "data"), train.load_model(copy)
    given = train.other_utterances(dataset.x, dataset.utterances, 3)
    assert set(given.count) == {3}
    expected, _ = model.ensemble.forward(dataset.features(range(96)), given)
    np.testing.assert_allclose(logits, expected.mean(0), rtol=1e-3, atol=1e-4)


def test_files_without_others_are_labelled_without_adaptation_and_counted(run, tmp_path, capsys):
    """One file of a speaker alone, two files whose names do not identify a speaker, and three of one speaker."""
    data = tmp_path / "data"
    data.mkdir()
    names = [f"03-01-{emotion:02d}-01-01-01-01.npz" for emotion in (1, 2, 3)] + ["03-01-01-01-01-01-02.npz"]
    for name in names:
        shutil.copy(run / "data" / name, data)
    for number in (1, 2):
        shutil.copy(run / "data" / names[0], data / f"x{number}.npz")
    options = ("--corpus", "ravdess", "--out", str(tmp_path / "out"))
    assert train.main([str(data), "--predict", str(run / "run"), *options]) == 0
    assert "note: 3 files without other files of a known speaker: not adapted\n" in capsys.readouterr().out
    files, logits = calibrated_logits(tmp_path / "out")
    model, rows = train.load_model(run / "run"), dict(zip(files, logits))
    for name in ("x1", "x2", names[3][:-4]):
        features = np.load(data / f"{name}.npz")["hidden_states"].reshape(1, -1)
        expected, _ = model.ensemble.forward([features])
        np.testing.assert_allclose(rows[name], expected.mean(0)[0], rtol=1e-3, atol=1e-4)
    assert np.abs(rows["x1"] - rows[names[0][:-4]]).max() > 0.01


def test_unseen_speakers_are_scored_with_adaptation_and_the_scores_name_it(run, tmp_path, capsys):
    data = write_layers(tmp_path / "data", seed=0)
    for path in data.iterdir():
        path.rename(path.with_name(path.name.replace("-0" + path.name[-5], "-1" + path.name[-5])))
    assert train.main([str(data), "--predict", str(run / "run"), "--out", str(tmp_path / "out")]) == 0
    assert read_json(tmp_path / "out" / "metrics.json")["adapted"] == "all"
    assert "ADAPTED to each speaker by all other, unlabelled utterances" in capsys.readouterr().out


def test_files_with_other_layers_are_left_out(run, tmp_path):
    data = shutil.copytree(run / "data", tmp_path / "data", ignore=shutil.ignore_patterns("wav2vec*"))
    np.savez(data / "03-01-01-01-01-01-01.npz", hidden_states=np.random.default_rng(0).normal(size=(LAYERS + 1, WIDTH)))
    assert train.main([str(data), "--predict", str(run / "run"), "--out", str(tmp_path / "out")]) == 1
    assert Counter(row["code"] for row in rows_of(tmp_path / "out" / "skipped.csv")) == {"other-layers": 1}
    assert len(rows_of(tmp_path / "out" / "predictions.csv")) == 95

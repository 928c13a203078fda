import copy
import dataclasses
import functools
import itertools
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SMALL, computed_statistics, experiment_of, write_sequences
from make_sample import write_sample

import check_data
import stats
import train

# --- one step ---


def step_of(population, config=SMALL):
    """`member_step`, compiled; and ((x, None), None, label, weight), a batch of vectors whose last 3 are padding."""
    static = population.static._replace(config=config)
    member = population.member(0)
    x, label = population.dataset.x[:20], population.dataset.label[:20]
    weight = member.class_weight[label] * (np.arange(20) < 17)
    return population.jax.jit(functools.partial(train.member_step, static)), ((x, None), None, label, weight)


def test_a_step_is_clipped_adamw_on_the_weighted_smoothed_loss(population):
    """Clip, decay, schedule, class weights and label smoothing, computed by hand for two steps."""
    jax, jnp = population.jax, population.jax.numpy
    clip, decay, peak = 0.05, 0.3, 0.02
    step, batch = step_of(population, dataclasses.replace(SMALL, clip=clip))
    member = population.member(
        0,
        dropout=np.float32(0),
        label_smoothing=np.float32(0.1),
        weight_decay=np.float32(decay),
        learning_rate=np.float32(peak),
    )
    (x, _), _, label, weight = batch

    def loss_by_hand(params):
        hidden = (x - member.mean) / member.scale @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
        logits = jnp.maximum(hidden, 0) @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
        target = 0.9 * np.eye(8)[label] + 0.1 / 8
        return -((target * jax.nn.log_softmax(logits)).sum(1) * weight).sum() / weight.sum()

    state, by_hand = population.first_state(member), jax.jit(jax.value_and_grad(loss_by_hand))
    moments = [(np.zeros_like(leaf), np.zeros_like(leaf)) for leaf in jax.tree.leaves(state.params)]
    for count, progress in enumerate((0.25, 0.75), 1):
        before = state.params
        expected_loss, gradient = by_hand(before)
        expected_norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
        state, (worked, loss, norm) = step(member, state, batch, (population.key, progress))
        assert worked == 1
        assert loss == pytest.approx(float(expected_loss), rel=1e-5)
        assert norm == pytest.approx(float(expected_norm), rel=1e-5)
        assert norm > clip
        rate = peak * 0.5 * (1 + np.cos(np.pi * progress))
        trees = map(jax.tree.leaves, (before, state.params, gradient))
        for place, (old, new, slope) in enumerate(zip(*trees, strict=True)):
            clipped = np.asarray(slope) * clip / expected_norm
            mean, square = moments[place]
            mean, square = 0.9 * mean + 0.1 * clipped, 0.999 * square + 0.001 * np.square(clipped)
            moments[place] = mean, square
            adam = mean / (1 - 0.9**count) / (np.sqrt(square / (1 - 0.999**count)) + 1e-8)
            np.testing.assert_allclose(new, old - rate * (adam + decay * np.asarray(old)), rtol=1e-3, atol=1e-5)


def spoiled(population, batch, fault):
    """A member and a batch whose loss is NaN, or whose gradient overflows while the loss is finite."""
    member, ((x, _), _, label, weight) = population.member(0), batch
    state = population.first_state(member)
    x = x.copy()
    if fault == "NaN":
        x[3, 5] = np.nan
    else:
        x[:, 5] = 1e30
        state.params["Dense_0"]["kernel"][5] = 0
    return member, state, ((x, None), None, label, weight)


@pytest.mark.parametrize("fault", ["NaN", "overflow"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(population, fault):
    step, batch = step_of(population)
    member, first, bad = spoiled(population, batch, fault)
    clock = population.key, 0.0
    state, (worked, loss, norm) = step(member, first, bad, clock)
    assert (worked, np.isfinite(loss), np.isfinite(norm)) == (1, fault == "overflow", False)
    population.assert_equal(state.params, first.params)
    population.assert_equal(state.optimizer, first.optimizer)
    state, _ = step(member, state, bad, clock)
    assert (state.skipped, state.bad_steps) == (2, 2)
    state, _ = step(member, state, batch, clock)
    assert (state.skipped, state.bad_steps) == (2, 0)
    assert (state.params["Dense_1"]["kernel"] != first.params["Dense_1"]["kernel"]).all()
    state, _ = step(member, state, bad, clock)
    assert (state.skipped, state.bad_steps) == (3, 1)


def test_a_run_of_bad_steps_that_ends_training_is_not_forgotten(population):
    """The host looks only between calls of the program, when later steps may have been good again."""
    step, batch = step_of(population)
    member, first, _ = spoiled(population, batch, "NaN")
    state, _ = step(member, first._replace(bad_steps=np.int32(train.MAX_BAD_STEPS - 1)), batch, (population.key, 0.0))
    assert state.bad_steps == 0
    state, _ = step(member, first._replace(bad_steps=np.int32(train.MAX_BAD_STEPS)), batch, (population.key, 0.0))
    assert state.bad_steps == train.MAX_BAD_STEPS


def test_a_batch_of_common_classes_alone_counts(population):
    """Class weights below 1 may sum to less than 1."""
    step, (*batch, weight) = step_of(population)
    member = population.member(0)
    _, (worked, _, _) = step(member, population.first_state(member), (*batch, weight / 100), (population.key, 0.0))
    assert worked == 1


@pytest.mark.parametrize("idle", ["stopped", "padding"])
@pytest.mark.parametrize("fault", [None, "NaN"])
def test_a_member_that_has_stopped_or_has_only_padding_does_not_work(population, idle, fault):
    step, batch = step_of(population)
    member, state = population.member(0), population.first_state(population.member(0))
    if fault:
        member, state, batch = spoiled(population, batch, fault)
    if idle == "stopped":
        state = state._replace(active=np.bool_(False))
    else:
        batch = (*batch[:-1], np.zeros_like(batch[-1]))
    state = state._replace(bad_steps=np.int32(3))
    after, measured = step(member, state, batch, (population.key, 0.0))
    population.assert_equal(after, state)
    np.testing.assert_array_equal(measured, np.zeros(3))


def test_padding_changes_no_step(population):
    """Whatever features and labels the padding has."""
    step, ((x, _), _, label, weight) = step_of(population)
    member, after = population.member(0), []
    for filler in (0.0, 1e6):
        x = x.copy()
        x[17:] = filler
        state = population.first_state(member)
        after.append(step(member, state, ((x, None), None, label, weight), (population.key, 0.0)))
    population.assert_equal(*after)


def test_dropout_is_drawn_anew_for_each_key(population):
    step, batch = step_of(population)
    member = population.member(0)
    state = population.first_state(member)
    losses = [step(member, state, batch, (population.jax.random.key(number), 0.0))[1][1] for number in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


# --- one epoch ---


class Epochs:
    """Records the batches of a member instead of training on them."""

    def __init__(self, population, monkeypatch):
        self.population, self.seen, self.static = population, [], population.static
        self.data = population.jax.device_get(population.data)  # the callback needs a program of one device
        monkeypatch.setattr(train, "member_step", self.step)
        monkeypatch.setattr(train, "gather_batch", lambda static, data, others, chosen: chosen)
        monkeypatch.setattr(train, "validate", lambda *arguments: (train.jnp.float32(0), train.jnp.float32(0)))
        self.program = population.jax.jit(lambda *arguments: train.member_epoch(self.static, *arguments))

    def step(self, static, member, state, batch, clock):
        key, (read, used, label, weight) = train.jax.random.key_data(clock[0]), batch
        own = read if used is None else read[used]
        values = own, label, weight, key, clock[1], read
        train.jax.debug.callback(lambda *values: self.seen.append(values), *values, ordered=True)
        return state, train.jnp.array([1.0, 2.0, 3.0])

    def batches(self, row, epoch, seed=0):
        """Utterances, labels and weights (steps, M), keys and progress (steps,), and what is read (steps, B)."""
        self.seen.clear()
        member = self.population.member(row)
        state = self.population.first_state(member)
        _, measures = self.program(self.data, (seed, epoch), member, state)
        self.population.jax.effects_barrier()
        assert (measures["loss"], measures["gradient_norm"]) == (2, 3)  # means over the steps
        return [np.array(values) for values in zip(*self.seen)]


@pytest.fixture
def epochs(population, monkeypatch):
    return Epochs(population, monkeypatch)


@pytest.fixture
def sequence_epochs(sequence_population, monkeypatch):
    return Epochs(sequence_population, monkeypatch)


def test_an_epoch_trains_on_each_training_utterance_once(epochs, population):
    own = np.flatnonzero(population.split.train[2])
    read, label, weight, keys, progress, _ = epochs.batches(2, epoch=1)
    steps = population.static.steps
    assert len(read) == steps
    counted = weight > 0
    assert sorted(read[counted]) == own.tolist()
    dataset = population.dataset
    np.testing.assert_array_equal(label[counted], dataset.label[read[counted]])
    np.testing.assert_array_equal(weight[counted], population.members.class_weight[2][label[counted]])
    assert len({tuple(key) for key in keys}) == steps
    np.testing.assert_allclose(progress, (1 + np.arange(steps) / steps) / SMALL.epochs, rtol=1e-6)


def test_a_member_with_more_utterances_than_an_epoch_has_room_for_leaves_out_others_each_time(epochs, population):
    final = population.split.members(3)[0]
    own = np.flatnonzero(population.split.train[final])
    seen = []
    for epoch in range(8):
        read, _, weight, *_ = epochs.batches(final, epoch)
        seen.append(read[weight > 0].tolist())
        assert len(set(seen[-1])) == len(seen[-1]) < len(own)
        assert set(seen[-1]) <= set(own)
    assert set(seen[0]) != set(seen[1])
    assert set().union(*seen) == set(own)


def test_every_batch_has_an_utterance_from_each_row_of_the_table(epochs, population):
    read, _, weight, *_ = epochs.batches(2, epoch=0)
    for row, values, own in zip(population.members.train[2], read.T, weight.T > 0):
        assert sorted(values[own]) == sorted(row[row >= 0])


@pytest.mark.parametrize("kind", ["epochs", "sequence_epochs"])
def test_the_order_follows_from_seed_and_epoch_and_differs_between_them(kind, request):
    epochs = request.getfixturevalue(kind)
    first, again, later, other = (epochs.batches(0, *clock)[0] for clock in ((0, 0), (0, 0), (1, 0), (0, 1)))
    np.testing.assert_array_equal(first, again)
    assert (first != later).mean() > 0.3
    assert (first != other).mean() > 0.3


@pytest.mark.parametrize("kind", ["epochs", "sequence_epochs"])
def test_each_member_has_random_numbers_of_its_own(kind, request):
    epochs = request.getfixturevalue(kind)
    keys = [epochs.batches(row, 0)[3] for row in (0, 1)]
    assert (keys[0] != keys[1]).any(1).all()


def test_all_members_read_the_same_batches_of_sequences_and_train_on_their_own(sequence_epochs, sequence_population):
    split, dataset = sequence_population.split, sequence_population.dataset
    most = sequence_population.static.trained
    both = []
    for row in (0, 5):
        utterances, label, weight, _, _, read = sequence_epochs.batches(row, epoch=2)
        both.append(read)
        assert sorted(read[read >= 0]) == list(range(len(dataset.label)))
        for here, chosen in zip(read, (batch[used] for batch, used in zip(utterances, weight > 0)), strict=True):
            own = set(here[here >= 0]) & set(np.flatnonzero(split.train[row]))
            assert set(chosen) <= own
            assert len(set(chosen)) == len(chosen) == min(len(own), most)
        used = weight > 0
        np.testing.assert_array_equal(label[used], dataset.label[utterances[used]])
        expected = sequence_population.members.class_weight[row][label[used]]
        np.testing.assert_array_equal(weight[used], expected)
    np.testing.assert_array_equal(*both)


def test_a_member_with_more_sequences_than_a_batch_has_room_for_leaves_out_others_each_time(sequence_epochs):
    split = sequence_epochs.population.split
    own = np.flatnonzero(split.train[0])
    sequence_epochs.static = sequence_epochs.static._replace(trained=4)
    seen = []
    for epoch in range(12):
        utterances, _, weight, *_ = sequence_epochs.batches(0, epoch)
        assert weight.shape[1] == 4
        seen.append(set(utterances[weight > 0]))
        assert len(seen[-1]) < len(own)
    assert seen[0] != seen[1]
    assert set().union(*seen) == set(own)
    # The rows of a batch are in the order of lengths: the longest must not be left out more often than the shortest.
    times = np.bincount(list(itertools.chain(*seen)), minlength=own.max() + 1)[own]
    by_length = times[np.argsort(sequence_epochs.population.dataset.length[own], kind="stable")]
    half = len(own) // 2
    assert 0.7 < by_length[-half:].sum() / by_length[:half].sum() < 1.4


def test_every_validation_sequence_is_counted(sequence_population):
    static, split, members = (getattr(sequence_population, name) for name in ("static", "split", "members"))
    batches = np.asarray(sequence_population.data.batches)
    for row in range(len(split.train)):
        used, own = map(np.asarray, train.own_rows(static, members.validation[row].T, 0.0, static.validated))
        assert sorted(own[own >= 0]) == np.flatnonzero(split.validation[row]).tolist()
        read = np.take_along_axis(batches.T, used, 1)
        np.testing.assert_array_equal(read[own >= 0], own[own >= 0])


# --- validation and the choice of the best epoch ---


@pytest.fixture(scope="module")
def outcome(population):
    return population.run()


@pytest.fixture(scope="module")
def sequence_outcome(sequence_population):
    return sequence_population.run()


def statistics_of(population):
    """Mean and scale of every row of the split."""
    mean, scale, _ = train.normalise_folds(population.dataset, population.split, population.stored)
    return np.repeat(mean, population.split.seeds, 0), np.repeat(scale, population.split.seeds, 0)


def vector_logits(params, mean, scale, x):
    """The logits of the hidden layer of one member, in numpy."""
    hidden = np.maximum((x - mean) / scale @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0)
    return hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


def sequence_inputs(query, mean, scale, sequences):
    """The inputs of the hidden layer of one member for sequences, in float64: weighted mean and deviation."""
    rows = []
    for frames in sequences:
        z = (frames.astype(np.float64) - mean) / scale
        weight = stats.probabilities(z @ query)
        centre = weight @ z
        variance = weight @ np.square(z - centre)
        rows.append(np.concatenate([centre, np.sqrt(np.maximum(variance, train.MIN_VARIANCE))]))
    return np.stack(rows)


def balanced_loss(logits, label):
    probability = stats.probabilities(logits.astype(np.float64))
    loss = -np.log(probability[np.arange(len(label)), label])
    return np.mean([loss[label == number].mean() for number in np.unique(label)])


def assert_scores(measures, row, logits, label):
    """The scores of the last epoch, whose parameters are at hand."""
    recall = [(logits.argmax(1)[label == number] == number).mean() for number in np.unique(label)]
    assert measures["validation_ua"][-1, row] == pytest.approx(np.mean(recall), abs=1e-5)
    assert measures["validation_loss"][-1, row] == pytest.approx(balanced_loss(logits, label), rel=1e-3)


def test_validation_scores_are_those_of_numpy(population, outcome):
    _, after, measures = outcome
    for row in range(4):
        member, chosen = population.member(row), np.flatnonzero(population.split.validation[row])
        params = population.of(after.params, row)
        logits = vector_logits(params, member.mean, member.scale, population.dataset.x[chosen])
        assert_scores(measures, row, logits, population.dataset.label[chosen])


def test_validation_scores_of_sequences_are_those_of_numpy(sequence_population, sequence_outcome):
    _, after, measures = sequence_outcome
    dataset, (mean, scale) = sequence_population.dataset, statistics_of(sequence_population)
    for row in (0, 3):
        chosen, params = (
            np.flatnonzero(sequence_population.split.validation[row]),
            sequence_population.of(after.params, row),
        )
        inputs = sequence_inputs(params["query"], mean[row], scale[row], dataset.features(chosen))
        logits = vector_logits(params, 0, 1, inputs)
        assert_scores(measures, row, logits, dataset.label[chosen])


def test_classes_without_validation_utterances_do_not_count(population):
    member = population.member(0)
    params = population.first_state(member).params
    table, label = member.validation, population.dataset.label
    own = np.where((table >= 0) & (label[table] < 3), table, -1)
    loss, ua = train.validate(population.static, population.data, member._replace(validation=own), params)
    chosen = own[own >= 0]
    logits = vector_logits(params, member.mean, member.scale, population.dataset.x[chosen])
    assert_scores({"validation_loss": np.array([[loss]]), "validation_ua": np.array([[ua]])}, 0, logits, label[chosen])


def test_padding_changes_no_validation(population, outcome):
    member = population.member(0)
    params = population.of(outcome[1].params, 0)
    table = np.pad(member.validation, ((0, 0), (0, 2)), constant_values=-1)
    loss, ua = train.validate(population.static, population.data, member._replace(validation=table), params)
    assert loss == pytest.approx(outcome[2]["validation_loss"][-1, 0], rel=1e-5)
    assert ua == pytest.approx(outcome[2]["validation_ua"][-1, 0], rel=1e-5)


def keep_best(population, losses, config=SMALL, group=(0, 0, 1, -1)):
    """The state after epochs with these validation losses, (epochs, P); the parameters of an epoch are its number."""
    jnp = population.jax.numpy
    zeros, group = np.zeros(len(group)), np.array(group)
    start = {"kernel": zeros - 1.0}
    state = train.State(start, None, start, zeros + np.inf, zeros.astype(int), group >= 0, None, None)
    static, states = population.static._replace(config=config), []
    for epoch, loss in enumerate(losses):
        state = state._replace(params={"kernel": jnp.full(len(group), float(epoch))})
        state = train.keep_best(static, group, state, jnp.array(loss), epoch)
        states.append(state)
    return states


def test_the_seeds_of_a_fold_choose_the_epoch_with_the_best_mean_loss(population):
    losses = [[3, 1, 5, 0], [1, 2, 6, 0], [3, 2, 4, 0], [0, 9, 4, 0]]
    state = keep_best(population, losses, dataclasses.replace(SMALL, epochs=9))[-1]
    np.testing.assert_array_equal(state.best_epoch, [1, 1, 2, 0])
    np.testing.assert_array_equal(state.best_loss, [1.5, 1.5, 4, np.inf])
    np.testing.assert_array_equal(state.best["kernel"], [1, 1, 2, -1])
    np.testing.assert_array_equal(state.active, [True, True, True, False])


def test_a_group_stops_after_so_many_epochs_without_a_better_loss(population):
    config = dataclasses.replace(SMALL, epochs=9, patience=2)
    losses = [[2, 2, 3, 0], [3, 3, 2, 0], [2, 2, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    states = keep_best(population, losses, config)
    active = [state.active.tolist()[:3] for state in states]
    assert active == [[True] * 3, [True] * 3, [False, False, True], [False, False, True], [False, False, True]]
    np.testing.assert_array_equal(states[-1].best_epoch, [0, 0, 4, 0])  # who has stopped stays as he was
    np.testing.assert_array_equal(states[-1].best_loss, [2, 2, 0, np.inf])
    np.testing.assert_array_equal(states[-1].best["kernel"], [0, 0, 4, -1])


def test_training_stops_after_the_last_epoch(population):
    states = keep_best(population, [[4 - epoch] * 4 for epoch in range(3)], dataclasses.replace(SMALL, epochs=3))
    assert [state.active.any() for state in states] == [True, True, False]


def test_a_loss_that_is_not_finite_is_never_the_best(population):
    losses = [[np.nan, 1, np.inf, 0], [2, 2, 5, 0], [np.nan, 0, np.inf, 0]]
    state = keep_best(population, losses)[-1]
    np.testing.assert_array_equal(state.best_epoch, [1, 1, 1, 0])
    np.testing.assert_array_equal(state.best_loss, [2, 2, 5, np.inf])


# --- the population ---


def test_the_best_epoch_is_that_of_the_folds_mean_validation_loss(population, outcome):
    _, after, measures = outcome
    fold_loss = measures["validation_loss"].reshape(train.EPOCHS_PER_CALL, 4, SMALL.seeds).mean(2)
    np.testing.assert_array_equal(after.best_epoch, np.repeat(fold_loss.argmin(0), SMALL.seeds))
    np.testing.assert_allclose(after.best_loss, np.repeat(fold_loss.min(0), SMALL.seeds), rtol=1e-6)


@pytest.mark.parametrize("kind", ["", "sequence_"])
def test_a_fold_in_the_population_is_the_fold_alone(kind, request):
    population, (_, together, measures) = (request.getfixturevalue(f"{kind}{name}") for name in NAMES)
    members = population.of(population.members, [2, 3] * 4)
    members = members._replace(group=np.array([1, 1] + [-1] * 6))  # the others only fill up the devices
    _, alone, measures_alone = population.run(members)
    population.assert_equal(population.of(alone.params, [0, 1]), population.of(together.params, [2, 3]))
    for name, values in measures_alone.items():
        np.testing.assert_array_equal(values[:, :2], measures[name][:, 2:4])


NAMES = ("population", "outcome")


def test_members_trained_side_by_side_are_those_trained_one_after_the_other(population, outcome):
    """As on a GPU, and as on a CPU."""
    assert population.static.sequential
    other = copy.copy(population)
    other.static = population.static._replace(sequential=False)
    _, after, measures = other.run()
    population.assert_equal(after.params, outcome[1].params, rtol=0, atol=1e-5)
    for name, values in measures.items():
        np.testing.assert_allclose(values, outcome[2][name], rtol=1e-4, atol=1e-5)


def test_a_poisoned_member_keeps_its_parameters_and_harms_no_other(population, outcome):
    mean, group = population.members.mean.copy(), population.members.group.copy()
    mean[2] = np.nan
    group[7] = -1  # and one that only fills up the devices
    first, after, measures = population.run(population.members._replace(mean=mean, group=group))
    for kept in (2, 7):
        population.assert_equal(population.of(after.params, kept), population.of(first.params, kept))
        population.assert_equal(population.of(after.optimizer, kept), population.of(first.optimizer, kept))
    others = [0, 1, 4, 5]  # 3 and 6 are the other seeds of those groups
    population.assert_equal(population.of(after.params, others), population.of(outcome[1].params, others))
    assert after.skipped[2] == after.bad_steps[2] == 4 * population.static.steps >= train.MAX_BAD_STEPS
    np.testing.assert_array_equal(measures["skipped"][:, 2], population.static.steps * np.arange(1, 5))
    assert after.skipped[[*others, 7]].sum() == 0
    assert np.isinf(after.best_loss[[2, 3]]).all()  # the fold has no epoch with a finite loss
    np.testing.assert_array_equal(measures["active"], [[True] * 7 + [False]] * 4)
    assert not any(measures[name][:, 7].any() for name in train.MEASURES)


def test_what_a_member_does_not_train_on_does_not_touch_it(population, outcome):
    """Other features for the test and validation speakers of the first member leave its parameters as they were."""
    x = population.dataset.x.copy()
    x[~population.split.train[0]] = 1e6
    _, after, measures = population.run(x=x)
    population.assert_equal(population.of(after.params, 0), population.of(outcome[1].params, 0))
    assert (measures["validation_loss"][:, 0] != outcome[2]["validation_loss"][:, 0]).all()


def test_sequences_that_a_member_does_not_train_on_do_not_touch_it(sequence_population, sequence_outcome):
    dataset = sequence_population.dataset
    rows = dataset.frames.rows.copy()
    for place in np.flatnonzero(~sequence_population.split.train[0]):
        rows[dataset.frames.first[place] :][: dataset.length[place]] = 1e18
    _, after, _ = sequence_population.run(rows=rows)
    before = sequence_population.of(sequence_outcome[1].params, 0)
    sequence_population.assert_equal(sequence_population.of(after.params, 0), before)
    assert after.skipped[0] == 0


def test_training_compiles_once_and_stops_folds_that_no_longer_improve(population, monkeypatch):
    traced, real = [], train.population_epochs

    def counting(*arguments):
        traced.append(1)
        return real(*arguments)

    monkeypatch.setattr(train, "population_epochs", counting)
    config = dataclasses.replace(SMALL, epochs=30, patience=2, learning_rate=0.3)
    trained = train.train(experiment_of(population.dataset, config))
    assert len(traced) == 1
    last = max(row["epoch"] for row in trained.history)
    assert train.EPOCHS_PER_CALL < last < 30
    for row, fold in enumerate(("1", "2", "3", "final")):
        epochs = [entry["epoch"] for entry in trained.history if (entry["fold"], entry["seed"]) == (fold, 1)]
        assert epochs == list(range(1, trained.best_epoch[2 * row] + 1 + config.patience + 1))


# --- the layout of the population ---


def test_a_sweep_repeats_the_models_of_the_split_for_every_setting(population):
    split = population.split
    settings = [train.Hyperparameters(0.1 * number, 0, 0, 8, 0, 0) for number in range(2)]
    rows = [np.arange(8) + 100 * field for field in range(6)]
    members = train.stack_members(split, rows, settings, devices=6)
    np.testing.assert_array_equal(members.index, [*range(8)] * 2 + [7, 7])
    np.testing.assert_array_equal(members.group, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, -1, -1])
    np.testing.assert_allclose(members.hyper.learning_rate, np.float32([0] * 8 + [0.1] * 10))
    for field, name in enumerate(("train", "validation", "mean", "scale", "prior", "class_weight")):
        np.testing.assert_array_equal(getattr(members, name), members.index + 100 * field)


def test_no_rows_are_added_where_the_devices_share_equally(population):
    rows = [np.arange(8)] * 6
    settings = [train.Hyperparameters(*[0] * 6)]
    np.testing.assert_array_equal(
        train.stack_members(population.split, rows, settings, 4).group, [0, 0, 1, 1, 2, 2, 3, 3]
    )


def test_members_have_tables_of_exactly_their_speakers(population, sequence_population):
    for one in (population, sequence_population):
        for tables, masks in ((one.members.train, one.split.train), (one.members.validation, one.split.validation)):
            for table, mask in zip(tables, masks, strict=True):
                assert sorted(table[table >= 0]) == np.flatnonzero(mask).tolist()


def test_members_have_the_statistics_of_their_fold_and_the_class_weights_of_their_training_speakers(
    population, sequence_population
):
    for one in (population, sequence_population):
        mean, scale = statistics_of(one)
        np.testing.assert_array_equal(one.members.mean, mean)
        np.testing.assert_array_equal(one.members.scale, scale)
        assert np.isinf(one.members.prior).all()
        weight = train.class_weights(one.dataset.label, one.split.train, 8)
        np.testing.assert_array_equal(one.members.class_weight, weight)


def test_the_tables_of_sequences_are_the_shared_batches_without_what_is_not_the_members(sequence_population):
    batches = np.asarray(sequence_population.data.batches)
    assert sequence_population.static.steps == batches.shape[1]
    for table in (*sequence_population.members.train, *sequence_population.members.validation):
        np.testing.assert_array_equal(table[table >= 0], batches[table >= 0])


def test_small_sets_get_smaller_batches_and_large_ones_the_batch_of_the_options(population):
    largest = population.split.train.sum(1).max()
    batch = largest // train.MIN_STEPS_PER_EPOCH
    assert population.members.train.shape[1:] == (batch, -(-largest // batch))
    config = dataclasses.replace(SMALL, batch=3)
    assert train.set_up(experiment_of(population.dataset, config))[2].train.shape[1] == 3


def test_no_batch_is_smaller_than_two(population, monkeypatch):
    monkeypatch.setattr(train, "MIN_STEPS_PER_EPOCH", 1000)
    assert train.set_up(experiment_of(population.dataset, SMALL))[2].train.shape[1] == 2


@pytest.mark.parametrize(("options", "mixup"), [({}, False), ({"mixup": 0.1}, True), ({"sweep": 2}, True)])
def test_the_program_has_mixup_only_if_a_member_uses_it(population, options, mixup):
    config = dataclasses.replace(SMALL, **options)
    assert train.set_up(experiment_of(population.dataset, config))[0].mixup is mixup


def test_an_epoch_has_as_many_steps_as_the_median_member_needs(population):
    needed = [-(-mask.sum() // 5) for mask in population.split.train]
    assert population.static.steps == int(np.median(needed)) < max(needed)


def test_an_epoch_has_room_for_all_sequences_and_the_usual_number_of_training_sequences(sequence_population):
    """The shared batches are larger than those of the options by the share of sequences that are not a member's own."""
    rows, steps = sequence_population.data.batches.shape
    batch = sequence_population.split.train.sum(1).max() // train.MIN_STEPS_PER_EPOCH
    assert rows == round(batch / sequence_population.split.train.mean())
    assert rows * (steps - 1) < len(sequence_population.dataset.label) <= rows * steps


def test_the_number_of_steps_does_not_depend_on_the_devices(population, monkeypatch):
    experiment, steps = experiment_of(population.dataset, dataclasses.replace(SMALL, folds="2", seeds=1)), []
    devices = population.jax.devices() * 2
    for count in (1, 2):
        mesh = population.jax.sharding.Mesh(np.array(devices[:count]), ("population",))
        monkeypatch.setattr(train, "population_mesh", lambda members, mesh=mesh: mesh)
        monkeypatch.setattr(train, "to_devices", lambda mesh, tree: tree)
        static, _, members = train.set_up(experiment)
        assert len(members.group) == {1: 3, 2: 4}[count]
        steps.append(static.steps)
    assert steps[0] == steps[1]


@pytest.mark.parametrize(("members", "busy"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 3), (6, 3), (9, 3), (10, 4)])
def test_as_many_devices_as_are_busy_with_equal_shares(population, monkeypatch, members, busy):
    monkeypatch.setattr(population.jax, "devices", lambda: population.jax.local_devices()[:1] * 4)
    monkeypatch.setattr(population.jax.sharding, "Mesh", lambda devices, axes: (len(devices), axes))
    assert train.population_mesh(members) == (busy, ("population",))


# --- what ends a run, and its history ---


def test_consecutive_bad_steps_end_the_run_and_name_the_folds(population):
    split = population.split
    train.raise_if_diverged(np.full(16, train.MAX_BAD_STEPS - 1), 0, split)
    bad = np.zeros(16, int)
    bad[[2, 7]], bad[8 + 3] = train.MAX_BAD_STEPS, 9  # a sweep of two settings
    with pytest.raises(train.TrainingError, match=r"up to epoch 8: .* in 9 consecutive steps \(fold 2, final\)"):
        train.raise_if_diverged(bad, 4, split)


def test_features_that_overflow_end_the_run(population):
    dataset = population.dataset._replace(x=np.full_like(population.dataset.x, 3e38))
    experiment = train.Experiment(SMALL, dataset, population.split, population.stored)
    with pytest.raises(train.TrainingError, match=r"NaN or Inf in \d+ consecutive steps"):
        train.train(experiment)


def test_nan_features_of_a_test_speaker_end_the_run(population):
    """The models of the fold never see them, but those of the other folds train on them."""
    x = population.dataset.x.copy()
    x[np.flatnonzero(population.split.fold == 1)[0]] = np.nan
    experiment = train.Experiment(SMALL, population.dataset._replace(x=x), population.split, population.stored)
    with pytest.raises(train.TrainingError, match="check the features with check_data"):
        train.train(experiment)


def test_the_history_has_a_row_for_each_epoch_of_each_active_member(population):
    history = {name: np.arange(18.0).reshape(2, 9) for name in train.HISTORY}
    history["active"] = np.ones((2, 9), bool)
    history["active"][:, 8] = history["active"][1, :2] = False  # the last one only fills up the devices
    rows = train.history_rows(history, population.split)
    assert [(row["epoch"], row["fold"], row["seed"]) for row in rows] == [
        (epoch, fold, seed)
        for epoch, folds in ((1, ("1", "2", "3", "final")), (2, ("2", "3", "final")))
        for fold in folds
        for seed in (0, 1)
    ]
    assert [row["loss"] for row in rows] == [*range(8), *range(11, 17)]
    assert list(rows[0]) == ["epoch", "fold", "seed", *train.MEASURES, "skipped"]
    twice = {name: np.tile(values[:, :8], (1, 2)) for name, values in history.items()}
    settings = [row["setting"] for row in train.history_rows(twice, population.split._replace(settings=2))]
    assert settings == [1] * 8 + [2] * 8 + [1] * 6 + [2] * 6


# --- sweeps ---


def test_the_first_setting_of_a_sweep_is_that_of_the_options():
    config = dataclasses.replace(SMALL, learning_rate=0.7, weight_decay=0.6, dropout=0.9, label_smoothing=0.3)
    expected = train.Hyperparameters(0.7, 0.6, 0.9, 8, 0.3, 0.0)
    assert train.draw_settings(config) == [expected]
    assert train.draw_settings(dataclasses.replace(config, sweep=4))[0] == expected


def test_the_other_settings_are_drawn_from_their_ranges_with_the_seed():
    config = dataclasses.replace(SMALL, width=200, sweep=400)
    settings = train.draw_settings(config)
    assert len(settings) == 400
    assert train.draw_settings(dataclasses.replace(config, sweep=7)) == settings[:7]
    assert train.draw_settings(dataclasses.replace(config, seed=1))[1:] != settings[1:]
    drawn = np.array(settings[1:])
    for column, name in zip(drawn.T, train.Hyperparameters._fields, strict=True):
        low, high, kind = train.SWEEP[name]
        share = column / 200 if name == "width" else column
        assert low * 0.999 <= share.min() < share.max() <= high * 1.001
        middle = np.sqrt(low * high) if kind == "log" else (low + high) / 2
        assert (share < middle).mean() == pytest.approx(0.5, abs=0.1)  # drawn uniformly, or their logarithms are
    assert (drawn[:, 3] == drawn[:, 3].round()).all()
    assert np.abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 0.2
    assert all(setting.width == 1 for setting in train.draw_settings(dataclasses.replace(SMALL, width=1, sweep=9)))


def test_each_fold_chooses_its_setting_by_validation(population):
    settings = [train.Hyperparameters(number, *[0] * 5) for number in range(3)]
    loss = np.array([[1.0, 9.0, 2.0, 5.0], [2.0, 1.0, 3.0, 4.0], [3.0, np.inf, 4.0, 6.0]])  # of folds and final model
    chosen, table = train.choose_settings(
        np.append(np.repeat(loss.ravel(), 2), [0, 0]).astype(np.float32), population.split, settings
    )
    np.testing.assert_array_equal(chosen, [0, 1, 0, 1])
    found = [(row["setting"], row["learning_rate"], row["validation_loss"], row["folds"]) for row in table]
    assert found == [(2, 1, 2, 1), (1, 0, 4, 2), (3, 2, np.inf, 0)]


def test_a_run_without_a_sweep_has_no_table_of_settings(population):
    chosen, table = train.choose_settings(np.ones(8), population.split, [train.Hyperparameters(*[0] * 6)])
    assert (chosen.tolist(), table) == ([0] * 4, [])


def test_a_fold_without_a_finite_validation_loss_ends_the_run(population):
    loss = np.ones(16)
    loss[[4, 5]] = np.inf  # one setting of a sweep may diverge
    settings = [train.Hyperparameters(*[0] * 6)] * 2
    assert train.choose_settings(loss, population.split, settings)[0].tolist() == [0, 0, 1, 0]
    loss[[12, 13]] = np.nan
    with pytest.raises(train.TrainingError, match="no epoch of a fold had a finite validation loss"):
        train.choose_settings(loss, population.split, settings)


def test_a_setting_of_a_sweep_trains_as_without_a_sweep_and_the_better_one_is_chosen(population, monkeypatch):
    for name, default in zip(train.Hyperparameters._fields, train.draw_settings(SMALL)[0], strict=True):
        value = {"width": 1.0, "learning_rate": 0.02}.get(name, default)
        monkeypatch.setitem(train.SWEEP, name, (value, value, "linear"))
    swept = train.train(experiment_of(population.dataset, dataclasses.replace(SMALL, sweep=2)))
    assert [(choice["setting"], choice["learning_rate"]) for choice in swept.choices] == [(2, 0.02)] * 4
    found = [(row["setting"], row["learning_rate"], row["folds"]) for row in swept.sweep]
    assert found == [(2, 0.02, 3), (1, SMALL.learning_rate, 0)]
    assert swept.sweep[0]["validation_loss"] < swept.sweep[1]["validation_loss"]
    for setting, rate in ((1, SMALL.learning_rate), (2, 0.02)):
        alone = train.train(experiment_of(population.dataset, dataclasses.replace(SMALL, learning_rate=rate)))
        rows = [row for row in swept.history if row["setting"] == setting]
        for row, expected in zip(rows, alone.history, strict=True):
            assert {"setting", *expected} == row.keys()
            assert row["fold"] == expected.pop("fold")
            assert expected == pytest.approx({name: row[name] for name in expected}, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(swept.predictions.answers.logits, alone.predictions.answers.logits, atol=1e-4)
    np.testing.assert_array_equal(swept.best_epoch, alone.best_epoch)
    for choice, expected in zip(swept.choices, alone.choices):
        assert expected == pytest.approx({name: choice[name] for name in expected}, rel=1e-4)


# --- the trained models in numpy ---


def first_models(population, rows, **hyper):
    """Untrained models of the given rows as an ensemble, with parameters that are all unlike zero."""
    members = population.members
    changed = {name: np.full(len(members.group), value, np.float32) for name, value in hyper.items()}
    members = members._replace(hyper=members.hyper._replace(**changed))
    rng = np.random.default_rng(0)
    params = population.jax.tree.map(
        lambda leaf: (leaf + rng.normal(size=leaf.shape) / 4).astype(np.float32),
        train.initial_state(population.static, members).params,
    )
    return members, params, train.hidden_layers(members, params, rows)


@pytest.mark.parametrize("kind", ["population", "sequence_population"])
@pytest.mark.parametrize("width", [8, 5])
def test_the_forward_pass_is_that_of_training(kind, width, request):
    population = request.getfixturevalue(kind)
    static, rows = population.static, np.array([2, 3])
    members, params, ensemble = first_models(population, rows, width=width)
    chosen = np.asarray(population.data.batches)[:, 0]
    logits, hidden = ensemble.forward(population.dataset.features(chosen))
    assert logits.shape == (2, len(chosen), 8)
    assert (hidden[:, :, width:] == 0).all()
    assert hidden[:, :, :width].any()

    @population.jax.jit
    def forward_in_training(member, params, chosen):
        inputs = train.pool(params, member, train.gather_batch(static, population.data, None, chosen))
        return static.network.apply({"params": params}, inputs, train.width_mask(static, member.hyper))

    for seed, row in enumerate(rows):
        expected = forward_in_training(population.of(members, row), population.of(params, row), chosen)
        np.testing.assert_allclose(logits[seed], expected, rtol=1e-3, atol=1e-4)


def test_the_forward_pass_of_vectors_is_that_of_numpy(population):
    _, params, ensemble = first_models(population, [4, 5])
    x = population.dataset.x
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(2, 24, 8)), rng.normal(size=(2, 8))
    ensemble.params.update({"linear/kernel": kernel, "linear/bias": bias})
    logits, hidden = ensemble.forward(population.dataset.features(range(len(x))))
    for seed, row in enumerate((4, 5)):
        member, own = population.member(row), population.of(params, row)
        z = (x - member.mean) / member.scale
        expected = vector_logits(own, member.mean, member.scale, x) + z @ kernel[seed] + bias[seed]
        np.testing.assert_allclose(logits[seed], expected, rtol=1e-4, atol=1e-4)
        layer = np.maximum(z @ own["Dense_0"]["kernel"] + own["Dense_0"]["bias"], 0)
        np.testing.assert_allclose(hidden[seed], layer, rtol=1e-4, atol=1e-5)


def test_the_linear_part_of_sequences_works_on_the_mean_of_their_frames(sequence_population):
    _, params, ensemble = first_models(sequence_population, [4, 5])
    dataset, chosen = sequence_population.dataset, range(7)
    mean, scale = statistics_of(sequence_population)
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(2, 12, 8)), rng.normal(size=(2, 8))
    ensemble.params.update({"linear/kernel": kernel, "linear/bias": bias})
    logits, _ = ensemble.forward(dataset.features(chosen))
    for seed, row in enumerate((4, 5)):
        own = sequence_population.of(params, row)
        inputs = sequence_inputs(own["query"], mean[row], scale[row], dataset.features(chosen))
        linear = (dataset.x[:7] - mean[row]) / scale[row] @ kernel[seed] + bias[seed]
        expected = vector_logits(own, 0, 1, inputs) + linear
        np.testing.assert_allclose(logits[seed], expected, rtol=1e-3, atol=1e-3)


def test_a_sequence_of_one_frame_has_the_smallest_deviation(sequence_population):
    _, params, ensemble = first_models(sequence_population, [4, 5])
    (frame,) = (features[:1] for features in sequence_population.dataset.features([3]))
    mean, scale = statistics_of(sequence_population)
    for pooled, row in zip(ensemble.inputs(frame, None)[1], (4, 5), strict=True):
        expected = sequence_inputs(params["query"][row], mean[row], scale[row], [frame])[0]
        np.testing.assert_allclose(expected[12:], np.sqrt(train.MIN_VARIANCE))
        np.testing.assert_allclose(pooled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["population", "sequence_population"])
def test_the_forward_pass_does_not_depend_on_its_batches(kind, request, monkeypatch):
    population = request.getfixturevalue(kind)
    _, _, ensemble = first_models(population, [0, 1])
    whole = ensemble.forward(population.dataset.features(range(20)))
    monkeypatch.setattr(train, "FORWARD_BATCH", 6)
    population.assert_equal(ensemble.forward(population.dataset.features(range(20))), whole, rtol=1e-5, atol=1e-5)
    single = ensemble.of_seed(1).forward(population.dataset.features([7]))
    population.assert_equal(single, [part[1:, 7:8] for part in whole], rtol=1e-5, atol=1e-5)


def test_the_forward_pass_accepts_no_utterances(population):
    _, _, ensemble = first_models(population, [0, 1])
    logits, hidden = ensemble.forward(iter(()))
    assert logits.shape == hidden.shape == (2, 0, 8)


def test_answers_are_mean_logits_and_hidden_layers_side_by_side(population):
    _, _, ensemble = first_models(population, [0, 1])
    logits, hidden = ensemble.forward(population.dataset.features(range(5)))
    answers = train.Answers.of(ensemble, 1.5, population.dataset.features(range(5)))
    np.testing.assert_allclose(answers.logits, (logits[0] + logits[1]) / 2, rtol=1e-5)
    np.testing.assert_array_equal(answers.temperature, np.full(5, 1.5))
    np.testing.assert_array_equal(answers.embedding, np.concatenate([hidden[0], hidden[1]], 1))


def test_parameters_are_named_by_their_paths(jax_stack):
    tree = {"query": np.ones(2), "Dense_0": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}}
    named = train.named_leaves(tree)
    assert {name: leaf.shape for name, leaf in named.items()} == {
        "Dense_0/bias": (3,),
        "Dense_0/kernel": (2, 3),
        "query": (2,),
    }


# --- the linear part ---


def finish_fold(population, dataset, fold, hidden):
    """`train.finish_fold` with the linear parts for the same data."""
    linear = train.fit_linear_parts(dataset, population.split, population.members, fold)
    return train.finish_fold(dataset, population.split, fold, hidden, linear)


def linear_logits(ensemble, seed, x):
    z = (x - ensemble.mean) / ensemble.scale
    return z @ ensemble.params["linear/kernel"][seed] + ensemble.params["linear/bias"][seed]


@pytest.mark.parametrize("fold", [1, 3])
def test_the_linear_part_is_the_mean_of_two_and_the_second_includes_the_validation_speakers(population, fold):
    dataset, split = population.dataset, population.split
    _, _, hidden = first_models(population, split.members(fold))
    ensemble, weights = finish_fold(population, dataset, fold, hidden)

    def lda(mask):
        """Logits of all utterances, for the chosen shrinkage."""
        z = (dataset.x - ensemble.mean) / ensemble.scale
        kernel, bias = stats.fit_lda(z[mask], dataset.label[mask], 8)
        return z @ kernel[weights.shrinkage] + bias[weights.shrinkage]

    both = lda(split.fold != fold)
    for seed, row in enumerate(split.members(fold)):
        expected = (lda(split.train[row]) + both) / 2 * weights.linear / weights.temperature
        np.testing.assert_allclose(linear_logits(ensemble, seed, dataset.x), expected, rtol=1e-3, atol=1e-3)
    for name in ("Dense_0/kernel", "Dense_0/bias"):
        np.testing.assert_array_equal(ensemble.params[name], hidden.params[name])
    for name in ("Dense_1/kernel", "Dense_1/bias"):
        share = weights.hidden / weights.temperature
        np.testing.assert_allclose(ensemble.params[name], hidden.params[name] * share, rtol=1e-5)
    assert {leaf.dtype for leaf in ensemble.params.values()} == {np.dtype(np.float32)}
    assert {"linear/kernel", "linear/bias"}.isdisjoint(hidden.params)


def test_the_weights_are_fitted_to_the_validation_utterances_of_each_seed(population, monkeypatch):
    dataset, split, seen = population.dataset, population.split, []
    _, _, hidden = first_models(population, split.members(2))

    def record(*arguments):
        seen.append(arguments)
        return stats.EnsembleWeights(3, (1.0,), 0.5, 2.0, 4.0)

    monkeypatch.setattr(stats, "fit_ensemble_weights", record)
    ensemble, _ = finish_fold(population, dataset, 2, hidden)
    ((logits, linear, label),) = seen
    for seed, row in enumerate(split.members(2)):
        chosen, used = np.flatnonzero(split.validation[row]), split.train[row]
        np.testing.assert_array_equal(label[seed], dataset.label[chosen])
        expected = hidden.forward(dataset.features(chosen))[0][seed]
        np.testing.assert_allclose(logits[seed], expected, rtol=1e-5, atol=1e-5)
        z = (dataset.x - hidden.mean) / hidden.scale
        kernel, bias = stats.fit_lda(z[used], dataset.label[used], 8)
        expected = np.stack([z[chosen] @ k + b for k, b in zip(kernel, bias)])
        np.testing.assert_allclose(linear[seed], expected[None], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ensemble.params["Dense_1/bias"], hidden.params["Dense_1/bias"] / 8, rtol=1e-6)


def test_test_speakers_never_touch_the_models_of_their_fold_and_validation_speakers_do(population):
    dataset, split = population.dataset, population.split
    _, _, hidden = first_models(population, split.members(0))
    expected = finish_fold(population, dataset, 0, hidden)
    x = dataset.x.copy()
    x[split.fold == 0] += 100
    label = np.where(split.fold == 0, 0, dataset.label)
    population.assert_equal(finish_fold(population, dataset._replace(x=x, label=label), 0, hidden), expected)
    x = dataset.x.copy()
    x[split.validation[0]] += 1
    other, _ = finish_fold(population, dataset._replace(x=x), 0, hidden)
    assert (other.params["linear/kernel"] != expected[0].params["linear/kernel"]).all()


def test_the_linear_part_of_sequences_is_that_of_their_means(sequence_population):
    dataset, split = sequence_population.dataset, sequence_population.split
    mean, scale = statistics_of(sequence_population)
    for row in (0, 7):
        model = train.Ensemble(mean[row], scale[row], np.inf, {})
        z, mask = (dataset.x - mean[row]) / scale[row], split.train[row]
        fitted = [part[0] for part in train.fit_linear_part(dataset, mask, model)]
        expected = list(stats.fit_lda(z[mask], dataset.label[mask], 8))
        sequence_population.assert_equal(fitted, expected, rtol=1e-3, atol=1e-3)


# --- training as a whole ---


@pytest.fixture(scope="module")
def finished(population):
    """An experiment at a learning rate that overshoots, so that the best epoch is not always the last one."""
    experiment = experiment_of(population.dataset, dataclasses.replace(SMALL, epochs=8, learning_rate=0.1))
    return experiment, train.train(experiment)


def test_the_answers_are_those_of_the_models_that_never_saw_the_speaker(finished):
    (_, dataset, split, _), trained = finished
    assert len(trained.ensembles) == split.folds + 1
    for fold in range(split.folds):
        tested, ensemble = np.flatnonzero(split.fold == fold), trained.ensembles[fold]
        logits, embedding = [], []
        for seed in range(SMALL.seeds):
            params = {name: leaf[seed] for name, leaf in ensemble.params.items()}
            z = (dataset.x[tested] - ensemble.mean) / ensemble.scale
            hidden = np.maximum(z @ params["Dense_0/kernel"] + params["Dense_0/bias"], 0)
            logits.append(hidden @ params["Dense_1/kernel"] + params["Dense_1/bias"])
            logits[-1] = logits[-1] + z @ params["linear/kernel"] + params["linear/bias"]
            embedding.append(hidden)
        answers = trained.predictions.answers
        np.testing.assert_allclose(answers.logits[tested], np.mean(logits, 0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(answers.embedding[tested], np.hstack(embedding), rtol=1e-3, atol=1e-4)
        assert (answers.temperature[tested] == trained.choices[fold]["temperature"]).all()


def test_models_are_normalised_with_the_statistics_of_their_folds(finished):
    (_, dataset, split, stored), trained = finished
    mean, scale, _ = train.normalise_folds(dataset, split, stored)
    np.testing.assert_array_equal([ensemble.mean for ensemble in trained.ensembles], mean)
    np.testing.assert_array_equal([ensemble.scale for ensemble in trained.ensembles], scale)


def test_the_models_are_those_of_the_best_epoch_in_the_history(finished):
    """Their validation loss, computed by hand without linear part and weights, is that of the best epoch."""
    (_, dataset, split, _), trained = finished
    last = max(row["epoch"] for row in trained.history)
    assert (trained.best_epoch + 1 < last).any()
    for row in range(len(split.train)):
        fold, seed = divmod(row, SMALL.seeds)
        chosen, ensemble, choice = split.validation[row], trained.ensembles[fold], trained.choices[fold]
        params = {name: leaf[seed] for name, leaf in ensemble.params.items()}
        params = {layer: {part: params[f"{layer}/{part}"] for part in ("kernel", "bias")} for layer in LAYERS}
        logits = vector_logits(params, ensemble.mean, ensemble.scale, dataset.x[chosen])
        logits = logits * choice["temperature"] / choice["hidden"]
        expected = balanced_loss(logits, dataset.label[chosen])
        (found,) = [
            entry["validation_loss"]
            for entry in trained.history
            if (entry["fold"], entry["seed"], entry["epoch"])
            == (split.fold_name(fold), seed, trained.best_epoch[row] + 1)
        ]
        assert found == pytest.approx(expected, rel=1e-3)


LAYERS = ("Dense_0", "Dense_1")


def test_the_choices_of_a_fold_are_its_weights(finished):
    (_, _, split, _), trained = finished
    assert [list(choice) for choice in trained.choices] == [["shrinkage", "hidden", "linear", "temperature"]] * 4
    assert all(choice["shrinkage"] in stats.SHRINKAGES for choice in trained.choices)
    assert trained.sweep == []
    np.testing.assert_array_equal(trained.skipped, np.zeros(8))
    for fold in range(4):
        np.testing.assert_array_equal(np.diff(trained.best_epoch[split.members(fold)]), [0])


def test_answers_that_overflow_end_the_run(population, monkeypatch):
    """The features of a test speaker can do that alone; statistics supplied by the user are not touched by them."""
    real = train.Answers.of.__func__

    def overflow(cls, *arguments):
        answers = real(cls, *arguments)
        answers.logits[0, 0] = np.inf
        return answers

    monkeypatch.setattr(train.Answers, "of", classmethod(overflow))
    with pytest.raises(train.TrainingError, match="so large that the network overflows"):
        train.train(population.experiment)


def test_shuffled_labels_give_chance(population):
    """Shuffled among the utterances of each speaker, so that the split stays as it is."""
    uas = []
    for seed in range(3):
        rng, label = np.random.default_rng(seed), population.dataset.label.copy()
        for speaker in np.unique(population.split.speaker):
            own = population.split.speaker == speaker
            label[own] = rng.permutation(label[own])
        dataset = population.dataset._replace(label=label)
        config = dataclasses.replace(SMALL, learning_rate=0.02)
        experiment = train.Experiment(config, dataset, population.split, population.stored)
        uas.append(train.evaluate_run(experiment, train.train(experiment))["ua"])
    assert abs(np.mean(uas) - 1 / 8) < 0.09


def test_sequences_are_learnt_and_answered_by_models_that_never_saw_the_speaker(sequence_population, monkeypatch):
    monkeypatch.setattr(train, "MAX_LENGTH_GROUPS", 2)  # as in the fixture
    config = dataclasses.replace(SMALL, learning_rate=0.02)
    experiment = experiment_of(sequence_population.dataset, config)
    trained = train.train(experiment)
    assert train.evaluate_run(experiment, trained)["ua"] > 0.5
    dataset, split = experiment.dataset, experiment.split
    for fold, ensemble in enumerate(trained.ensembles[:-1]):
        tested = np.flatnonzero(split.fold == fold)[:5]
        logits, _ = ensemble.forward(dataset.features(tested))
        np.testing.assert_allclose(trained.predictions.answers.logits[tested], logits.mean(0), rtol=1e-4, atol=1e-4)
        assert ensemble.params["query"].any()


def test_bfloat16_products_leave_parameters_and_logits_float32(population):
    config = dataclasses.replace(SMALL, precision="bfloat16")
    network = train.build_network(8, 8, "bfloat16")
    params = population.first_state(population.member(0)).params
    x = population.dataset.x[:5]
    logits = network.apply({"params": params}, x, np.ones(8, np.float32))
    exact = population.static.network.apply({"params": params}, x, np.ones(8, np.float32))
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - exact).max() < 0.02 * np.abs(exact).max()
    static, _, _ = train.set_up(experiment_of(population.dataset, config))
    assert static.network.apply({"params": params}, x, np.ones(8, np.float32)).tolist() == logits.tolist()
    _, batch = step_of(population)
    step, member = functools.partial(train.member_step, static), population.member(0)
    state, _ = population.jax.eval_shape(step, member, population.first_state(member), batch, (population.key, 0.0))
    assert {leaf.dtype for leaf in population.jax.tree.leaves(state.params)} == {np.dtype(np.float32)}


# --- several devices, several processes ---


SPREAD = """
import json, os, sys
cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
sys.path[:0] = [{tests!r}]
from conftest import dataset_of, experiment_of
os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
from pathlib import Path
import numpy as np
import train
train.start_jax()
import jax
experiment = experiment_of(dataset_of(Path({data!r})))
static, _, members = train.set_up(experiment)
members = train.to_devices(static.mesh, members, "population")
trained = train.train(experiment)
if jax.process_index() == 0:
    np.save({out!r}, trained.predictions.answers.logits)
local = [shard.data.shape[0] for shard in members.train.addressable_shards]
print(json.dumps(dict(devices=jax.device_count(), local=local, rows=len(members.group))))
"""


def start_spread(data, out, **environment):
    code = SPREAD.format(tests=str(ROOT / "tests"), data=str(data), out=str(out))
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "XLA_FLAGS")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=inherited | environment, stdout=subprocess.PIPE, text=True
    )


def printed_by(process):
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


def test_the_answers_are_the_same_on_eight_devices_and_on_two_processes(population, tmp_path):
    data = write_sample(tmp_path / "data", actors=4, dim=24)
    eight = start_spread(data, tmp_path / "8.npy", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pair = [
        start_spread(
            data,
            tmp_path / "2.npy",
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
        )
        for number in range(2)
    ]
    assert printed_by(eight) == {"devices": 8, "local": [1] * 8, "rows": 8}
    assert [printed_by(process) for process in pair] == [{"devices": 4, "local": [2, 2], "rows": 8}] * 2
    here = train.train(population.experiment).predictions.answers.logits
    np.testing.assert_allclose(np.load(tmp_path / "8.npy"), here, atol=1e-3)
    np.testing.assert_allclose(np.load(tmp_path / "2.npy"), here, atol=1e-3)


@pytest.mark.parametrize("changed", ["features", "labels"])
def test_a_test_speaker_changes_no_bit_of_the_models_of_its_fold(tmp_path, jax_stack, changed):
    """Sequences share their batches among all folds, and everything in a batch could leak."""
    folder = write_sequences(tmp_path / "data")
    config = dataclasses.replace(SMALL, folds="leave-one-speaker-out", seeds=1, width=4, batch=8)
    scan = check_data.scan(check_data.ScanOptions(str(folder)), keep_features=True)
    first = train.pack(scan, config.pooling)
    split = train.make_split(first, config)
    tested, random = split.fold == 2, np.random.default_rng(0)
    if changed == "labels":
        label = first.label.copy()
        label[tested] = random.permutation(label[tested])
        second = first._replace(label=label)
    else:
        scan = check_data.scan(check_data.ScanOptions(str(folder)), keep_features=True)
        scan.features = [
            x + 3 * random.normal(size=x.shape).astype("f4") * test for x, test in zip(scan.features, tested)
        ]
        second = train.pack(scan, config.pooling)
    one, other = (
        train.train(train.Experiment(config, dataset, split, computed_statistics(dataset))).ensembles
        for dataset in (first, second)
    )

    def same(fold):
        parts = (one[fold].mean, one[fold].scale, *one[fold].params.values())
        others = (other[fold].mean, other[fold].scale, *other[fold].params.values())
        return all(np.array_equal(left, right) for left, right in zip(parts, others, strict=True))

    assert [same(fold) for fold in range(split.folds)] == [fold == 2 for fold in range(split.folds)]

import dataclasses

import numpy as np
import pytest
from conftest import SMALL, dataset_of, many_speakers, write_sequences

import check_data
import stats
import train


def sequences_of(lengths, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(5, 2, size=(length, dim)).astype(np.float32) for length in lengths]


def of_lengths(length, label=None):
    """Utterances of which only the number of frames, and perhaps the label, is known."""
    length = np.asarray(length)
    label = np.zeros(len(length), int) if label is None else np.asarray(label)
    return train.Dataset(None, length, label, ("sad",), [], None)


# --- the packed features ---


def test_sequences_are_packed_one_after_the_other_each_around_its_mean(tmp_path):
    folder = write_sequences(tmp_path / "data")
    sequences = check_data.scan(check_data.ScanOptions(str(folder)), keep_features=True).features
    dataset = dataset_of(folder)
    rows, first = dataset.frames
    assert rows.shape == (sum(map(len, sequences)) + max(map(len, sequences)), 12)
    np.testing.assert_allclose(rows[: len(sequences[0])].mean(0), 0, atol=1e-5)
    np.testing.assert_array_equal(first, np.cumsum(dataset.length) - dataset.length)
    assert not rows[first[-1] + dataset.length[-1] :].any()
    chosen = [5, 0, 95]
    for place, features in zip(chosen, dataset.features(chosen), strict=True):
        np.testing.assert_allclose(features, sequences[place], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dataset.x[place], sequences[place].mean(0), atol=1e-5)


def test_with_mean_pooling_an_utterance_is_the_mean_of_its_frames(tmp_path):
    scan = check_data.scan(check_data.ScanOptions(str(write_sequences(tmp_path / "data"))), keep_features=True)
    expected = [sequence.mean(0) for sequence in scan.features]
    dataset = train.pack(scan, "mean")
    assert dataset.frames is None
    assert (dataset.length == 1).all()
    np.testing.assert_allclose(np.stack(list(dataset.features(range(96)))), np.stack(expected)[:, None], atol=1e-5)


def test_classes_are_in_the_order_of_the_emotions_and_labels_are_their_indices(sample):
    dataset = dataset_of(sample)
    for label, utterance in zip(dataset.label, dataset.utterances, strict=True):
        assert dataset.classes[label] == utterance.emotion
    assert set(dataset.label) == set(range(8))


def test_the_devices_of_a_cpu_share_one_copy_of_the_frames(jax_stack):
    frames = train.Frames.of(sequences_of([30, 3, 17, 40]), np.zeros((4, 6), np.float32))
    dataset = many_speakers(1, 3)._replace(length=np.array([30, 3, 17, 40]), frames=frames)
    mesh = jax_stack.sharding.Mesh(np.array(jax_stack.devices("cpu")), ("population",))
    shards = train.to_devices(mesh, train.device_data(dataset, np.zeros((1, 1), int))).rows.addressable_shards
    assert [shard.data.unsafe_buffer_pointer() for shard in shards] == [frames.rows.ctypes.data] * mesh.size


# --- batches ---


@pytest.mark.parametrize(("utterances", "batch"), [(70, 64), (535, 100), (130, 100), (64, 64), (3, 8)])
def test_no_row_of_a_table_is_empty(utterances, batch):
    """Each row of a table of sequences gets room for its longest utterance, whether it has one or not."""
    dataset = train.Dataset(None, np.arange(utterances), np.zeros(utterances, int), (), [], None)
    table = train.strata(np.arange(utterances), dataset, batch)
    assert (table >= 0).any(1).all()
    assert sorted(table[table >= 0]) == list(range(utterances))
    assert len(table) <= batch


def test_every_batch_takes_one_utterance_of_each_stratum_and_none_twice():
    length = np.random.default_rng(0).integers(10, 500, 203)
    table = train.strata(np.arange(203), of_lengths(length), 16)
    assert table.shape == (16, 13)
    assert sorted(table[table >= 0]) == list(range(203))
    batches = np.where(table >= 0, length[table], 0)
    assert batches.max(1).sum() - batches[:-1].min(1).sum() <= length.max() + batches[-1].max()


def test_utterances_of_equal_length_are_grouped_by_class():
    table = train.strata(np.arange(12), of_lengths(np.full(12, 7), [2, 1, 0] * 4), 4)
    np.testing.assert_array_equal(table, [[2, 5, 8], [11, 1, 4], [7, 10, 0], [3, 6, 9]])


def test_each_model_has_a_table_of_its_own_utterances():
    masks = np.random.default_rng(0).random((3, 40)) < [[0.9], [0.5], [0.1]]
    tables = train.own_tables(masks, of_lengths(np.ones(40, int)), 4)
    assert tables.shape == (3, 4, -(-masks[0].sum() // 4))
    assert tables.dtype == np.int32
    for table, mask in zip(tables, masks):
        assert sorted(table[table >= 0]) == np.flatnonzero(mask).tolist()
        assert (table >= -1).all()


def test_the_groups_of_lengths_have_the_least_padding():
    groups = train.length_groups(np.arange(8).reshape(4, 2), of_lengths([3, 4, 4, 9, 10, 30, 31, 33]))
    assert groups == ((1, 4), (1, 9), (1, 30), (1, 33))
    groups = train.length_groups(np.arange(40)[:, None], of_lengths(np.full(40, 7)))
    assert groups == ((40, 7),)
    lengths = np.sort(np.random.default_rng(0).integers(1, 100, 40))
    groups = train.length_groups(np.arange(40)[:, None], of_lengths(lengths))
    assert len(groups) == train.MAX_LENGTH_GROUPS
    assert sum(rows for rows, _ in groups) == 40
    computed = sum(rows * longest for rows, longest in groups)
    rng = np.random.default_rng(1)
    for _ in range(200):
        ends = [*np.sort(rng.choice(np.arange(1, 40), train.MAX_LENGTH_GROUPS - 1, replace=False)), 40]
        assert computed <= sum((end - begin) * lengths[end - 1] for begin, end in zip([0, *ends], ends))


def test_rows_of_padding_need_no_room():
    dataset = of_lengths([50, 3, 4])  # an index of -1 must not be taken for the last utterance, nor for the first
    assert train.length_groups(np.array([[1, 2], [-1, 2], [-1, -1]]), dataset) == ((3, 4),)


def test_long_and_short_sequences_together_cost_little_padding(jax_stack):
    """The lengths of RAVDESS and CREMA-D at 50 frames a second, a tenth of the utterances."""
    rng = np.random.default_rng(0)
    length = np.concatenate([rng.normal(185, 17, 144), rng.normal(127, 25, 744)]).astype(int).clip(60)
    dataset = many_speakers(37, 24)._replace(length=length)
    dataset = dataset._replace(
        frames=train.Frames.of([np.zeros((n, 2), np.float32) for n in length], np.zeros((len(length), 2)))
    )
    config = dataclasses.replace(SMALL, folds="5", batch=64)
    stored = stats.Stored(stats.Statistics(np.zeros(2), np.ones(2)), user_supplied=True, fingerprint="")
    static, _, _ = train.set_up(train.Experiment(config, dataset, train.make_split(dataset, config), stored))
    rows, frames = np.transpose(static.groups)
    assert 0 < 1 - length.sum() / (static.steps * (rows * frames).sum()) < 0.15


def test_a_batch_of_vectors_is_their_rows(population):
    chosen = np.array([7, 0, 3])
    batch, _ = train.gather_batch(population.static, population.data, None, chosen)
    np.testing.assert_array_equal(batch, population.dataset.x[chosen])


# --- pooling of frame sequences ---


def pooling_of(sequences, spare=0, after=0.0):
    """A function from the query to the pooled vectors of these sequences, in their order.

    Each group has room for `spare` more frames than its longest sequence; `after` follows the last sequence.
    """
    length, jnp = np.array([len(sequence) for sequence in sequences]), train.jnp
    dim = sequences[0].shape[1]
    means = np.linspace(4, 6, (len(length) + 1) * dim, dtype=np.float32).reshape(-1, dim)  # as if they were
    frames = train.Frames.of([*map(np.copy, sequences), np.full((99, dim), after, np.float32)], means)
    dataset = of_lengths(np.append(length, 99))._replace(frames=frames, x=means)
    order = np.append(np.argsort(length, kind="stable"), -1)
    data = train.jax.device_put(train.device_data(dataset, order[:, None]))
    groups = tuple((rows, longest + spare) for rows, longest in train.length_groups(order[:, None], dataset))
    static = train.StaticConfig(None, None, None, 1, 1, groups, 1, 1, 1, False, False)
    member = train.Member(0, 0, None, None, np.float32(6), np.full(dim, 2, np.float32), None, None, None)

    def pooled(query):
        batch = train.gather_batch(static, data, None, jnp.asarray(order))
        return train.pool({"query": jnp.asarray(query)}, member, batch)[jnp.argsort(order[:-1])]

    return train.jax.jit(pooled)


def pooled(sequences, query, **layout):
    found = np.asarray(pooling_of(sequences, **layout)(query))
    assert np.isfinite(found).all()
    return found


LENGTHS = [3, 17, 40, 1]


def test_attentive_statistics_are_those_of_numpy(jax_stack):
    sequences, query = sequences_of(LENGTHS), np.linspace(-0.5, 0.5, 6, dtype=np.float32)
    for sequence, row in zip(sequences, pooled(sequences, query), strict=True):
        x = (sequence.astype(np.float64) - 6) / 2
        weight = np.exp(x @ query) / np.exp(x @ query).sum()
        mean = weight @ x
        deviation = np.sqrt(np.maximum(weight @ np.square(x) - np.square(mean), 1e-6))
        np.testing.assert_allclose(row, np.concatenate([mean, deviation]), atol=2e-4)


def test_a_query_of_zeros_weighs_all_frames_equally(jax_stack):
    sequences = sequences_of(LENGTHS)
    for sequence, row in zip(sequences, pooled(sequences, np.zeros(6, np.float32)), strict=True):
        x = (sequence.astype(np.float64) - 6) / 2
        np.testing.assert_allclose(row, np.concatenate([x.mean(0), np.maximum(x.std(0), 1e-3)]), atol=2e-4)


def test_large_scores_do_not_overflow(jax_stack):
    """Only one frame of each sequence has weight then."""
    sequences, query = sequences_of(LENGTHS), np.full(6, 1e4, np.float32)
    for sequence, row in zip(sequences, pooled(sequences, query), strict=True):
        largest = sequence[sequence.sum(1).argmax()]
        np.testing.assert_allclose(row, np.concatenate([(largest - 6) / 2, np.full(6, 1e-3)]), rtol=1e-3, atol=2e-3)


def test_padding_changes_no_pooled_vector(jax_stack):
    sequences, query = sequences_of(LENGTHS), np.ones(6, np.float32)
    exact = pooled(sequences, query)
    np.testing.assert_allclose(pooled(sequences, query, spare=9), exact, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(pooled(sequences, query, spare=9, after=1e15), exact, rtol=1e-6, atol=1e-6)


def test_a_sequence_is_pooled_the_same_in_any_batch(jax_stack):
    sequences, query = sequences_of([8, 16, 24, 8]), np.ones(6, np.float32)
    np.testing.assert_allclose(pooled(sequences, query)[1], pooled(sequences[1:2], query)[0], rtol=1e-5, atol=1e-5)


def test_the_gradient_of_pooling_is_finite_and_ignores_padding(jax_stack):
    """Also for a sequence of one frame, which has no deviation, and beside padding whose exponentials overflow."""
    query, slopes = np.full(6, 0.5, np.float32), []
    for layout in ({}, {"spare": 9, "after": 1e15}):
        pool = pooling_of(sequences_of(LENGTHS), **layout)
        slopes.append(jax_stack.grad(lambda query, pool=pool: train.jnp.square(pool(query)).sum())(query))
    assert np.isfinite(slopes[0]).all() and np.abs(slopes[0]).min() > 0
    np.testing.assert_allclose(slopes[1], slopes[0], rtol=1e-4)


# --- first parameters ---


def test_members_start_with_different_kernels_of_lecuns_variance(population):
    config = dataclasses.replace(SMALL, width=400)
    static = population.static._replace(config=config, network=train.build_network(400, 8, "float32"))
    width = np.full(len(population.members.group), 400, np.float32)
    width[1] = 100  # the variance follows from the units in use
    members = population.members._replace(hyper=population.members.hyper._replace(width=width))
    state = train.initial_state(static, members)
    first, last = (state.params[layer]["kernel"] for layer in ("Dense_0", "Dense_1"))
    assert first.shape[1:] == (24, 400)
    assert last.shape[1:] == (400, 8)
    np.testing.assert_allclose(first.std((1, 2)), 1 / np.sqrt(24), rtol=0.05)
    np.testing.assert_allclose(last.std((1, 2)), 1 / np.sqrt(width), rtol=0.05)
    assert len(np.unique(first[:, 0, 0])) == len(population.split.train)
    other = train.initial_state(static._replace(config=dataclasses.replace(config, seed=1)), members)
    assert (first != other.params["Dense_0"]["kernel"]).mean() > 0.99


def test_all_but_the_kernels_starts_at_zero(sequence_population):
    members, jax = sequence_population.members, sequence_population.jax
    state = train.initial_state(sequence_population.static, members)
    params = train.named_leaves(state.params)
    size = len(members.group)
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "Dense_0/bias": (size, 8),
        "Dense_0/kernel": (size, 24, 8),
        "Dense_1/bias": (size, 8),
        "Dense_1/kernel": (size, 8, 8),
        "query": (size, 12),
    }
    assert {name for name, leaf in params.items() if leaf.any()} == {"Dense_0/kernel", "Dense_1/kernel"}
    assert params["Dense_0/kernel"].std() == pytest.approx(1 / np.sqrt(24), rel=0.1)
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.optimizer))
    sequence_population.assert_equal(state.best, state.params)
    assert np.isinf(state.best_loss).all()
    for counter in (state.best_epoch, state.skipped, state.bad_steps):
        np.testing.assert_array_equal(counter, np.zeros(size, np.int32))


def test_equal_branches_of_the_random_numbers_start_equal(population):
    """Members of other settings differ from each other by nothing but their hyperparameters."""
    members = population.members._replace(index=population.members.index % 4)
    kernel = train.initial_state(population.static, members).params["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kernel[:4], kernel[4:8])
    assert not np.array_equal(kernel[0], kernel[1])


def test_members_that_fill_up_devices_start_stopped(population):
    group = population.members.group.copy()
    group[-1] = -1
    active = train.initial_state(population.static, population.members._replace(group=group)).active
    np.testing.assert_array_equal(active, [True] * 7 + [False])


# --- the network and its loss ---


def test_the_network_is_two_dense_layers_with_a_relu_between(jax_stack):
    rng = np.random.default_rng(0)
    shapes = {"Dense_0": {"kernel": (5, 6), "bias": 6}, "Dense_1": {"kernel": (6, 3), "bias": 3}}
    params = {
        layer: {name: rng.normal(size=shape).astype(np.float32) for name, shape in parts.items()}
        for layer, parts in shapes.items()
    }
    x, mask = rng.normal(size=(4, 5)).astype(np.float32), rng.integers(0, 3, (4, 6)).astype(np.float32)
    logits = train.build_network(6, 3, "float32").apply({"params": params}, x, mask)
    hidden = np.maximum(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0) * mask
    expected = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_width_mask_selects_the_first_units(population):
    hyper = population.member(0, width=np.float32(5)).hyper
    np.testing.assert_array_equal(train.width_mask(population.static, hyper), [1, 1, 1, 1, 1, 0, 0, 0])


def test_units_that_are_not_in_use_change_neither_loss_nor_gradient_nor_validation(population):
    jax, static, data = population.jax, population.static, population.data
    member = population.member(0, width=np.float32(5))
    batch = (population.dataset.x[:20], None), None, population.dataset.label[:20], np.ones(20, np.float32)
    results = []

    @jax.jit
    def scores(params):
        loss, slopes = jax.value_and_grad(train.training_loss)(params, static, member, batch, population.key)
        return loss, slopes, train.validate(static, data, member, params)

    for filler in (0.0, 9.0):
        params = jax.tree.map(np.copy, population.first_state(member).params)
        params["Dense_0"]["kernel"][:, 5:] = params["Dense_0"]["bias"][5:] = params["Dense_1"]["kernel"][5:] = filler
        results.append(scores(params))
        slopes = results[-1][1]
        for unused in (slopes["Dense_0"]["kernel"][:, 5:], slopes["Dense_0"]["bias"][5:]):
            assert not unused.any()
        assert not slopes["Dense_1"]["kernel"][5:].any()
    population.assert_equal(*results)


def test_dropout_keeps_its_share_of_the_units_and_the_mean(population):
    static = population.static._replace(config=dataclasses.replace(SMALL, width=30))
    hyper = population.member(0, dropout=np.float32(0.25), width=np.float32(26)).hyper
    mask = np.asarray(train.dropout_mask(static, hyper, population.key, 20_000))
    assert mask.shape == (20_000, 30)
    assert not mask[:, 26:].any()
    assert set(np.unique(mask[:, :26]).tolist()) == {0.0, np.float32(4 / 3).item()}
    assert mask[:, :26].mean() == pytest.approx(1, abs=0.01)
    assert np.abs(np.corrcoef(mask[:, :26].T) - np.eye(26)).max() < 0.05  # each unit has its own random byte


@pytest.mark.parametrize(("dropout", "kept", "factor"), [(0.0, 1.0, 1.0), (0.5, 0.5, 2.0), (0.9999, 1 / 256, 256.0)])
def test_dropout_is_exact_in_steps_of_a_256th(population, dropout, kept, factor):
    hyper = population.member(0, dropout=np.float32(dropout)).hyper
    mask = np.asarray(train.dropout_mask(population.static, hyper, population.key, 20_000))
    assert mask.max() == factor
    assert (mask > 0).mean() == pytest.approx(kept, rel=0.05)


def test_dropout_differs_between_keys(population):
    hyper = population.member(0, dropout=np.float32(0.5)).hyper
    keys = population.jax.random.split(population.key)
    masks = [np.asarray(train.dropout_mask(population.static, hyper, key, 50)) for key in keys]
    assert 0.3 < (masks[0] != masks[1]).mean() < 0.7


def test_mixup_blends_inputs_and_targets_alike_and_never_padding(population):
    jnp = population.jax.numpy
    hyper, weight = population.member(0, mixup=np.float32(0.4)).hyper, jnp.array([1.0] * 5 + [0.0])
    inputs, targets = train.mix(hyper, population.key, weight, (jnp.eye(6), jnp.eye(6)))
    np.testing.assert_array_equal(inputs, targets)
    np.testing.assert_array_equal(inputs[0], jnp.eye(6)[0])  # its partner is padding
    np.testing.assert_array_equal(inputs[5], jnp.eye(6)[5])
    for row in range(1, 5):
        assert 0 < inputs[row, 5 - row] < 0.4
    np.testing.assert_allclose(inputs.sum(1), 1, rtol=1e-6)
    assert len(np.unique(np.diagonal(inputs[1:5, 1:5]))) == 4  # each row has its own random share


def test_the_loss_of_a_batch_with_mixup_is_that_of_the_mixed_batch(population):
    """Mixed after pooling and label smoothing, and only if the program was built for it."""
    jax = population.jax
    member = population.member(0, mixup=np.float32(0.4), dropout=np.float32(0), label_smoothing=np.float32(0.2))
    params = population.first_state(member).params
    x, label, weight = population.dataset.x[:20], population.dataset.label[:20], np.arange(20, dtype=np.float32)
    batch = (x, None), None, label, weight

    def loss(mixup):
        static = population.static._replace(mixup=mixup)
        return jax.jit(lambda params: train.training_loss(params, static, member, batch, population.key))(params)

    inputs, target = (x - member.mean) / member.scale, 0.8 * np.eye(8)[label] + 0.2 / 8
    for mixup in (False, True):
        if mixup:
            key = jax.random.split(population.key)[1]
            inputs, target = train.mix(member.hyper, key, jax.numpy.array(weight), (inputs, target))
        logp = jax.nn.log_softmax(population.static.network.apply({"params": params}, inputs, np.ones((20, 8))))
        expected = -((target * logp).sum(1) * weight).sum() / weight.sum()
        assert loss(mixup) == pytest.approx(float(expected), rel=1e-5)
    assert loss(True) != loss(False)


def test_cross_entropy_is_a_weighted_mean_without_padding(jax_stack):
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [np.nan, np.inf]], np.float32)
    target, weight = np.array([[1, 0], [1, 0], [0, 1.0]]), np.array([1.0, 3.0, 0.0])
    expected = (np.log(1 + np.exp(-2)) + 3 * np.log(1 + np.exp(1))) / 4
    assert train.cross_entropy(logits, target, weight) == pytest.approx(expected, rel=1e-6)
    assert train.cross_entropy(logits, target, np.zeros(3)) == 0

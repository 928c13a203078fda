import errno
import itertools
import json
import os
import pathlib
import signal
import struct

import numpy as np
import pytest

import stats


def fresh(seed=0, shape=(40, 5)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some_statistics(dim=5):
    return stats.Moments.of(fresh(shape=(40, dim))).statistics()


# --- moments ---


def test_merged_moments_are_those_of_all_frames_together():
    frames = fresh(shape=(100, 3))
    parts = [stats.Moments.of(part) for part in (frames[:1], frames[1:30], frames[30:])]
    merged, whole = stats.Moments.stack(parts).merged(), stats.Moments.of(frames)
    assert merged.count == 100
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12)


def test_merging_a_part_ignores_the_rest():
    frames = fresh(shape=(9, 3))
    stacked = stats.Moments.stack([stats.Moments.of(frames[i : i + 3]) for i in (0, 3, 6)])
    np.testing.assert_allclose(
        stacked.merged(np.array([True, False, True])).mean, np.delete(frames, slice(3, 6), 0).mean(0), atol=1e-6
    )


def test_a_variance_that_is_small_beside_the_mean_survives():
    values = np.random.default_rng(1).normal(1e4, 0.1, (5000, 1))
    frames = values.astype(np.float32)
    merged = stats.Moments.stack([stats.Moments.of(part) for part in np.array_split(frames, 50)]).merged()
    assert merged.statistics().std == pytest.approx(frames.astype(np.float64).std(), rel=1e-6)


def test_a_constant_dimension_is_not_scaled():
    frames = fresh()
    frames[:, 2] = 0.1
    statistics = stats.Moments.of(frames).statistics()
    assert statistics.constant().tolist() == [False, False, True, False, False]
    assert statistics.scale()[2] == 1
    np.testing.assert_array_equal(statistics.scale()[[0, 1, 3, 4]], statistics.std[[0, 1, 3, 4]])


def test_features_of_a_tiny_scale_are_not_taken_for_constant():
    assert not stats.Moments.of(fresh() * 1e-7).statistics().constant().any()


# --- the files ---


def test_saved_statistics_are_known_as_ours(tmp_path):
    saved = some_statistics()
    stats.save(tmp_path, saved, "print")
    stored = stats.load(tmp_path)
    assert (stored.supplied, stored.fingerprint) == (False, "print")
    np.testing.assert_array_equal(stored.statistics.mean, saved.mean)
    np.testing.assert_array_equal(stored.statistics.std, saved.std)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [stats.MEAN_FILE, stats.STD_FILE, stats.BINDING_FILE]
    )


def test_a_pair_without_our_json_is_the_users(tmp_path):
    np.save(tmp_path / stats.MEAN_FILE, np.zeros(3))
    np.save(tmp_path / stats.STD_FILE, np.ones(3))
    assert stats.load(tmp_path).supplied


def test_a_pair_that_replaced_ours_is_the_users(tmp_path):
    stats.save(tmp_path, some_statistics(), "print")
    np.save(tmp_path / stats.MEAN_FILE, np.zeros(3))
    np.save(tmp_path / stats.STD_FILE, np.ones(3))
    assert stats.load(tmp_path).supplied


@pytest.mark.parametrize("exchanged", [stats.MEAN_FILE, stats.STD_FILE])
def test_one_file_of_ours_that_was_exchanged_is_neither_used_nor_overwritten(tmp_path, exchanged):
    stats.save(tmp_path, some_statistics(), "print")
    np.save(tmp_path / exchanged, np.full(5, 7, np.float32))
    with pytest.raises(stats.DataError, match=f"{exchanged} was not"):
        stats.load(tmp_path)


@pytest.mark.parametrize("missing", [stats.MEAN_FILE, stats.STD_FILE])
def test_an_incomplete_pair_of_ours_is_computed_again(tmp_path, missing):
    stats.save(tmp_path, some_statistics(), "print")
    (tmp_path / missing).unlink()
    assert stats.load(tmp_path) is None


def test_no_statistics(tmp_path):
    assert stats.load(tmp_path) is None


def assert_old_new_or_none(folder, old, new):
    """After a save that was cut off: one of the two pairs, whole, or none; never a mixture or the user's."""
    stored = stats.load(folder)
    if stored is not None:
        assert not stored.supplied
        expected = {"old": old, "new": new}[stored.fingerprint]
        np.testing.assert_array_equal(stored.statistics.mean, expected.mean)
        np.testing.assert_array_equal(stored.statistics.std, expected.std)


@pytest.mark.parametrize("calls", range(1, 9))
def test_saving_that_is_cut_off_leaves_old_new_or_nothing_but_never_a_users_pair(tmp_path, monkeypatch, calls):
    """Every fsync and every rename of `save` fails in turn, over an older pair."""
    old, new = some_statistics(), stats.Moments.of(fresh(7)).statistics()
    stats.save(tmp_path, old, "old")
    count = 0

    def dying(real):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == calls:
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(os, "fsync", dying(os.fsync))
        with pytest.raises(OSError, match="No space"):
            stats.save(tmp_path, new, "new")
    assert_old_new_or_none(tmp_path, old, new)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


class Killed(BaseException):
    """Stands for kill -9: from here on no call of the process reaches the disk, not even its cleaning up."""


def kill_at(monkeypatch, number):
    """Let the call of that number, of all that touch the disk while saving, and every later one, never happen."""
    count = 0

    def mortal(real):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count >= number:
                raise Killed
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(os, "replace", mortal(os.replace))
    monkeypatch.setattr(os, "fsync", mortal(os.fsync))
    monkeypatch.setattr(os, "open", mortal(os.open))
    monkeypatch.setattr(pathlib.Path, "unlink", mortal(pathlib.Path.unlink))
    monkeypatch.setattr("builtins.open", mortal(open))
    return lambda: count


@pytest.mark.parametrize("older", [False, True])
def test_a_kill_at_any_call_leaves_old_new_or_nothing_and_the_next_save_cleans_up(tmp_path, monkeypatch, older):
    old, new = some_statistics(), stats.Moments.of(fresh(7)).statistics()
    for number in range(1, 100):
        folder = tmp_path / str(number)
        folder.mkdir()
        if older:
            stats.save(folder, old, "old")
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                stats.save(folder, new, "new")
                break
            except Killed:
                pass
        assert_old_new_or_none(folder, old, new)
        stats.save(folder, new, "new")
        assert len(list(folder.iterdir())) == 3
    assert number > 14  # the last one went through


def test_a_disk_that_fills_up_while_writing_leaves_the_old_files(tmp_path):
    """A limit on the size of files stands for the full disk: the write itself fails, after its first bytes."""
    resource = pytest.importorskip("resource")
    stats.write_files(tmp_path, {"a": b"old"})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="File too large") as error:
            stats.write_files(tmp_path, {"a": bytes(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.filename == str(tmp_path / "a")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def raw_npy(header, data=b""):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    ("mean", "std", "told"),
    [
        (np.zeros(3), None, "is not; add it"),
        (np.zeros(3), np.ones(4), "3 numbers .* has 4"),
        (np.zeros((1, 3)), np.ones(3), r"shape \(1, 3\)"),
        (np.zeros(()), np.ones(3), r"shape \(\)"),
        (np.array([0, np.nan, 0]), np.ones(3), "1 values that are NaN"),
        (np.array([0, 1e300, 0]), np.ones(3), "1 values that are NaN or Inf"),
        (np.zeros(3), np.array([1, -1, 1.0]), "1 negative"),
        (np.zeros(3, int), np.ones(3), "int64 numbers"),
        (np.array([{}], object), np.ones(3), "pickled"),
        (b"", np.ones(3), "does not begin like an array"),
        (raw_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"), np.ones(3), "needs 4000000"),
        (raw_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), np.ones(3), "header is damaged"),
        (raw_npy("[" * 5000), np.ones(3), "header is damaged"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(tmp_path, mean, std, told):
    for name, content in ((stats.MEAN_FILE, mean), (stats.STD_FILE, std)):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            np.save(tmp_path / name, content)
    with pytest.raises(stats.DataError, match=told) as error:
        stats.load(tmp_path)
    assert error.value.code == "bad-statistics"


@pytest.mark.parametrize("name", [stats.MEAN_FILE, stats.STD_FILE, stats.BINDING_FILE])
@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling"])
def test_statistics_that_are_no_files_are_named_without_waiting(tmp_path, name, kind):
    stats.save(tmp_path, some_statistics(), "print")
    (tmp_path / name).unlink()
    if kind == "fifo":
        os.mkfifo(tmp_path / name)
    elif kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(stats.DataError, match=name) as error:
        stats.load(tmp_path)
    assert error.value.code == "bad-statistics"


def test_a_json_that_is_too_deep_is_damaged(tmp_path):
    stats.save(tmp_path, some_statistics(), "print")
    (tmp_path / stats.BINDING_FILE).write_text("[" * 200_000)
    with pytest.raises(stats.DataError, match="is damaged"):
        stats.load(tmp_path)


def test_a_damaged_json_is_named(tmp_path):
    stats.save(tmp_path, some_statistics(), "print")
    (tmp_path / stats.BINDING_FILE).write_text(json.dumps(["nonsense"]))
    with pytest.raises(stats.DataError, match=r"wav2vec_stats\.json is damaged"):
        stats.load(tmp_path)


@pytest.mark.parametrize("call", range(2))
def test_a_failing_write_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch, call):
    stats.write_files(tmp_path, {"a": b"old a", "b": b"old b"})
    calls = iter(range(10))

    def full(_):
        if next(calls) == call:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as error:
        stats.write_files(tmp_path, {"a": b"new a", "b": b"new b"})
    assert error.value.filename == str(tmp_path / "ab"[call])
    assert "10 bytes are needed and" in error.value.strerror
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old a", "b": b"old b"}


def test_json_has_null_for_what_is_no_number():
    content = {"a": float("nan"), "b": [float("inf"), 1.0], "c": {"d": "text"}}
    assert json.loads(stats.json_bytes(content)) == {"a": None, "b": [None, 1.0], "c": {"d": "text"}}


def test_csv_keeps_a_hostile_name_on_its_own_line():
    rows = [{"file": 'a\n"b",c.npz', "code": "x"}, {"file": "\udcff.npz", "code": "y"}]
    text = stats.csv_bytes(rows).decode()
    assert text == 'file,code\n"a\n""b"",c.npz",x\n\\udcff.npz,y\n'
    assert stats.csv_bytes([], ("file", "code")) == b"file,code\n"


# --- scores ---


def test_scores_of_a_confusion_made_by_hand():
    label = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 0, 0, 1, 1, 0, 2, 2])
    confusion = stats.confusion_matrix(label, predicted, 3)
    assert confusion.tolist() == [[3, 1, 0], [1, 1, 0], [0, 0, 2]]
    scores = stats.scores(confusion)
    assert scores["wa"] == pytest.approx(6 / 8)
    assert scores["ua"] == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert scores["macro_f1"] == pytest.approx((6 / 8 + 2 / 4 + 1) / 3)


def test_a_class_without_utterances_is_left_out_of_the_means():
    scores = stats.scores(np.array([[2, 0, 0], [0, 1, 1], [0, 0, 0]]))
    assert scores["ua"] == pytest.approx((1 + 1 / 2) / 2)


def test_answering_the_majority_class_alone_recalls_one_class_of_all():
    always = stats.majority_scores(np.array([[3, 1, 0], [1, 1, 0], [0, 0, 2]]))
    assert always["ua"] == pytest.approx(1 / 3)
    assert always["wa"] == pytest.approx(4 / 8)
    assert always["macro_f1"] == pytest.approx((2 * 4 / (4 + 8)) / 3)


def test_each_group_has_the_confusion_of_its_own_utterances():
    label, predicted = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 1])
    names, confusions = stats.group_confusions(["b", "a", "b", "b"], label, predicted, 2)
    assert names == ["a", "b"]
    assert confusions.tolist() == [[[0, 0], [0, 1]], [[1, 1], [1, 0]]]


def test_calibration_error_made_by_hand():
    """Two at 0.90, one of them right: 0.40 too sure; two at 0.62, both right: 0.38 too unsure."""
    probability = np.array([[0.9, 0.1], [0.1, 0.9], [0.62, 0.38], [0.38, 0.62]])
    label = np.array([0, 0, 0, 1])
    assert stats.expected_calibration_error(probability, label) == pytest.approx(0.5 * 0.4 + 0.5 * 0.38)
    found = stats.reliability(probability, label)
    assert np.flatnonzero(found["n"]).tolist() == [9, 13]
    for place, n, confidence, accuracy in ((9, 2, 0.62, 1), (13, 2, 0.9, 0.5)):
        assert found["n"][place] == n
        assert found["confidence"][place] == pytest.approx(confidence)
        assert found["accuracy"][place] == accuracy
        assert found["low"][place] < confidence <= found["high"][place]
    assert np.isnan(found["accuracy"][0])


def test_bins_take_their_upper_edge_and_certainty_is_in_the_last():
    probability = np.array([[0.5, 0.5], [1.0, 0.0]])
    assert stats.reliability(probability, np.array([0, 0]), bins=4)["n"].tolist() == [0, 1, 0, 1]
    assert stats.expected_calibration_error(probability[1:], np.array([0])) == 0


def test_intervals_are_over_speakers_not_utterances():
    """Half of the speakers are all right and half all wrong: resampled utterances would give a narrow interval."""
    right, wrong = np.array([[50, 0], [0, 50]]), np.array([[0, 50], [50, 0]])
    intervals = stats.speaker_intervals(np.stack([right, wrong] * 4), seed=0)
    low, high = intervals["ua"]
    assert low <= 0.25
    assert high >= 0.75
    assert stats.speaker_intervals(np.stack([right] * 8), seed=0)["wa"] == (1, 1)


def test_probabilities_sum_to_one_for_huge_logits():
    p = stats.probabilities(np.array([[1e4, 0, -1e4], [1, 1, 1]]))
    np.testing.assert_allclose(p.sum(-1), 1)
    np.testing.assert_allclose(p[1], 1 / 3)


def test_each_call_of_replacing_files_may_fail_and_each_file_is_old_or_new(tmp_path, monkeypatch):
    old, new = ({name: name.encode() * times for name in ("a", "b", "c")} for times in (10, 20))
    stats.write_files(tmp_path, old)
    for number in itertools.count(1):
        calls = []

        def failing(real, number=number, calls=calls):
            def call(*arguments, **named):
                calls.append(real)
                if len(calls) == number:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", failing(open))
            for module, name in ((os, "fsync"), (os, "replace"), (stats, "_parts")):
                patch.setattr(module, name, failing(getattr(module, name)))
            error = None
            try:
                stats.write_files(tmp_path, new)
            except OSError as caught:
                error = caught
        assert {path.name for path in tmp_path.iterdir()} == set(old)
        assert all((tmp_path / name).read_bytes() in (old[name], new[name]) for name in old)
        if len(calls) < number:
            break
        assert error.errno == errno.ENOSPC
        stats.write_files(tmp_path, old)
    assert number > 12


@pytest.mark.parametrize("place", ["magic", "head", "body", "digest"])
def test_no_change_of_a_checked_file_is_accepted(tmp_path, place):
    path = tmp_path / "file"
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False]), "c": np.int32([7])}
    stats.write_files(tmp_path, {"file": stats.checked_arrays({"x": 1}, arrays)})
    described, read = stats.read_checked_arrays(path)
    assert described == {"x": 1}
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype
    blob = path.read_bytes()
    offset = {"magic": 3, "head": 30, "body": len(blob) - 40, "digest": len(blob) - 2}[place]
    for changed in (blob[:offset] + bytes([blob[offset] ^ 4]) + blob[offset + 1 :], blob[:offset], b""):
        path.write_bytes(changed)
        with pytest.raises(stats.DataError, match="damaged"):
            stats.read_checked_arrays(path)


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=20)
    rows = np.stack([reference, 5 * reference**3, -reference, rng.normal(size=20)])
    found = stats.rank_correlation(rows, reference)
    np.testing.assert_allclose(found[:3], [1, 1, -1])
    rank = [np.argsort(np.argsort(row)) for row in (rows[3], reference)]
    assert found[3] == pytest.approx(np.corrcoef(*rank)[0, 1])
    ties = np.array([[0, 0, 3, 1, 0, 2.0]])
    ranks = [[1, 1, 5, 3, 1, 4], np.argsort(np.argsort(reference[:6]))]
    assert stats.rank_correlation(ties, reference[:6])[0] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert stats.rank_correlation(np.zeros((1, 6)), reference[:6])[0] == 0

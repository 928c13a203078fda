import errno
import io
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import warnings
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pytest
from make_sample import write_sample

import check_data
import stats
from check_data import read_features

ROOT = Path(__file__).resolve().parent.parent
GOOD = np.linspace(-1, 1, 12, dtype=np.float32)
SCALE = check_data.Scale(1.0, np.ones(12))


def scan(folder, keep_features=False, **options):
    return check_data.scan(check_data.ScanOptions(str(folder), **options), keep_features=keep_features)


def iter_features(folder, dim=12, reshapes_vectors=False, **options):
    """The utterances and features that a model of this width reads from a folder, and the codes of the findings."""
    result = check_data.Scan(Path(folder), dim, reshapes_vectors=reshapes_vectors)
    read = list(check_data.iter_features(check_data.ScanOptions(str(folder), **options), result, SCALE))
    return read, {finding.file: finding.code for finding in result.findings}


def write(path, **arrays):
    np.savez(path, **arrays or {"emb": GOOD})
    return path


def code_of(path):
    with pytest.raises(stats.DataError) as error:
        read_features(path)
    return error.value.code


def zip_of(path, arrays, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, blob in arrays.items():
            archive.writestr(name, blob)
    return path


# --- selecting the array ---


@pytest.mark.parametrize(
    ("arrays", "key"),
    [
        (("other", "emb", "embedding"), "emb"),
        (("wav2vec", "features", "embedding"), "embedding"),
        (("wav2vec", "features"), "features"),
        (("other", "wav2vec"), "wav2vec"),
        (("other", "Features"), "Features"),
        (("x", "hidden_states", "last_hidden_state"), "last_hidden_state"),
        (("x", "feats"), "feats"),
    ],
)
def test_keys_have_the_documented_priority(tmp_path, arrays, key):
    path = write(tmp_path / "x.npz", **{name: numbers(24, seed=index) for index, name in enumerate(arrays)})
    features = read_features(path)
    assert features.key == key
    np.testing.assert_array_equal(features.array, numbers(24, seed=arrays.index(key)))


def test_labels_beside_the_features_are_ignored(tmp_path):
    """A common form of such files, also with the labels first."""
    frames = np.arange(24.0).reshape(6, 4).astype(np.float32)
    others = {"label": np.eye(8)[2], "emotion": np.array("happy"), "emotion_class": np.array(2)}
    for arrays in ({"wav2vec_features": frames, **others}, {**others, "wav2vec_features": frames}):
        features = read_features(write(tmp_path / "x.npz", **arrays))
        assert features.key == "wav2vec_features"
        np.testing.assert_array_equal(features.array, frames)


def test_a_damaged_header_does_not_select_another_array(tmp_path):
    """Found by fuzzing: '<f4' with one flipped bit is '4f4', which is not a float, so the next array was chosen."""
    path = tmp_path / "x.npz"
    np.savez(path, label=np.eye(8)[1], wav2vec_features=numbers(3, 4), more=numbers(3, 4))
    blob = path.read_bytes()
    for wrong in (b"4f4", b"<i4", b"<f0", b"|O4"):
        path.write_bytes(blob.replace(b"<f4", wrong, 1))
        assert code_of(path) == "bad-crc"


WORDS = np.array(["happy", "sad", "other"])


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("arrays", "key"),
    [
        ({"emotion2vec": np.arange(96.0), "label": 3}, "emotion2vec"),
        ({"y": np.eye(8)[2], "x": np.arange(96.0)}, "x"),
        ({"target": np.eye(24)[2], "vec": np.arange(96.0)}, "vec"),
        ({"vad": np.arange(3.0), "wavlm_large": np.arange(96.0)}, "wavlm_large"),
        ({"labels": WORDS, "scores": np.arange(9.0), "anything": np.arange(96.0)}, "anything"),
        ({"pitch": np.arange(40.0), "wavlm_large": np.arange(96.0)}, "wavlm_large"),
        ({"emb": np.zeros(0), "more": np.arange(96.0)}, "more"),
        ({"features": np.array({"a": 1}, object), "more": np.arange(96.0)}, "more"),
        ({"video_features": np.ones((9, 512)), "audio_features": np.ones((9, 89)), "fps": 30.0}, "audio_features"),
        ({"ids": np.arange(96), "speaker_embedding": np.arange(192.0)}, "speaker_embedding"),
        ({"label": 1, "f0": np.arange(12.0)}, "f0"),
    ],
)
def test_the_features_are_known_by_name_type_and_size(tmp_path, arrays, key):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    assert check_data._locate_features(path.read_bytes(), ())[0].name == key


@pytest.mark.parametrize("names", [("acoustics", "embed"), ("hubert", "wavlm"), ("layer6", "layer12")])
def test_several_arrays_that_may_be_the_features_stop_the_scan_until_a_key_is_chosen(tmp_path, names):
    for k in range(3):
        named(tmp_path, k, **{name: numbers(20 + width, seed=k) for width, name in enumerate(names)}, label=k)
    table = rf"--key NAME:\n  {names[0]} \(20,\) float32, {names[1]} \(21,\) float32: 3 files"
    with pytest.raises(check_data.UsageError, match=table):
        scan(tmp_path)
    result = scan(tmp_path, key=names[1])
    assert (result.dim, result.keys_used()) == (21, {names[1]: 3})
    assert scan(tmp_path, key="nowhere").left_out() == {"no-key": 3}


def test_two_arrays_of_one_file_are_features_of_the_same_utterances(tmp_path):
    """The files of an older fusion: a voice and a face side by side, and emotions under other names."""
    words = ("angry", "disgust", "fearful", "happy", "neutral", "sad")
    lines = ["file,emotion,speaker"]
    for number in range(12):
        arrays = {"audio_features": numbers(8, seed=number), "video_features": numbers(4, 5, seed=number)}
        np.savez(tmp_path / f"clip_{number:02d}.npz", **arrays, label=np.eye(6)[number % 6])
        lines.append(f"clip_{number:02d},{words[number % 6]},{number // 6}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    found = {}
    for key, width in (("audio_features", 8), ("video_features", 5)):
        result = scan(tmp_path, key=key, labels=str(tmp_path / "labels.csv"))
        assert (result.dim, result.keys_used(), result.findings) == (width, {key: 12}, [])
        found[key] = [(utterance.canonical, utterance.emotion) for utterance in result.utterances]
    assert found["audio_features"] == found["video_features"]
    assert found["audio_features"][2] == ("clip_02", "fear")


@pytest.mark.parametrize("folder", ["", "inner/"])
def test_a_pattern_may_name_the_modality_which_is_no_part_of_the_utterance(tmp_path, folder):
    found = {}
    for modality in ("voice", "face"):
        place = tmp_path / modality / folder
        place.mkdir(parents=True)
        for number, name in enumerate(("1", "2", "2_noise")):
            np.savez(place / f"{modality}_s1_happy_{name}.npz", emb=numbers(4, seed=number))
        pattern = r"(?P<modality>[a-z]+)_(?P<speaker>s\d)_(?P<emotion>[a-z]+)_\d.*"
        result = scan(tmp_path / modality, pattern=pattern)
        found[modality] = [utterance.canonical for utterance in result.utterances]
    assert found["voice"] == found["face"] == [f"{folder}s1_happy_{name}" for name in ("1", "2", "2_noise")]


def test_a_few_files_with_several_arrays_do_not_stop_the_others(tmp_path):
    for k in range(3):
        named(tmp_path, k, **({"one": numbers(20), "two": numbers(20)} if k == 1 else {"emb": numbers(20, seed=k)}))
    assert (scan(tmp_path).left_out(), len(scan(tmp_path).records)) == ({"several-arrays": 1}, 2)


def test_an_array_that_is_the_same_in_most_files_is_not_the_features(tmp_path):
    for k in range(10):
        named(tmp_path, k, x=np.arange(20.0), other=numbers(20, seed=k))
    with pytest.raises(check_data.UsageError, match=r"the array x is the same in 10 files: .* --key NAME \(other 10\)"):
        scan(tmp_path)
    assert len(scan(tmp_path, key="other").records) == 10


def test_different_keys_in_one_folder_are_noted(tmp_path):
    for k in range(3):
        named(tmp_path, k, **{"wavlm" if k else "emb": numbers(20, seed=k)})
    assert check_data.Note("mixed-keys", "wavlm 2, emb 1") in scan(tmp_path).notes
    assert scan(tmp_path, key="wavlm").left_out() == {"no-key": 1}


def test_an_equal_number_of_rows_in_all_files_is_noted(tmp_path):
    for k in range(3):
        named(tmp_path, k, hidden_states=numbers(5, 20, seed=k))
    (note,) = [note for note in scan(tmp_path).notes if note.code == "equal-length"]
    assert note.text.startswith("5 rows of 20 values, read as frames; ")
    assert note.text.endswith("if layers, --layers, or --layer K for one of them")
    assert "equal-length" not in codes_of_notes(scan(tmp_path, transpose=True))
    named(tmp_path, 3, hidden_states=numbers(6, 20))
    assert "equal-length" not in codes_of_notes(scan(tmp_path))


def test_layers_of_sequences_are_recognised(tmp_path):
    with pytest.raises(stats.DataError, match=r"\(13, 4, 8\), perhaps the layers of an encoder: use --layers"):
        read_features(write(tmp_path / "x.npz", emb=numbers(13, 4, 8)))


def test_all_arrays_of_a_file_together_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(check_data, "MAX_ARRAY_BYTES", 2000)
    arrays = {f"layer{k}": np.ones(300, np.float32) for k in range(4)}
    np.savez_compressed(tmp_path / "x.npz", **arrays)  # small: the size of the file shows nothing
    assert code_of(tmp_path / "x.npz") == "too-large"
    np.savez_compressed(tmp_path / "x.npz", layer0=numbers(300))
    assert len(read_features(tmp_path / "x.npz").array) == 300


# --- npy files ---


def test_npy_files_are_read_beside_npz_files_and_noted(tmp_path):
    for k in range(4):
        array = numbers(20, seed=k)
        np.save(tmp_path / f"ravdess_03-01-05-01-01-01-{k + 1:02d}.npy", array.astype(">f8")) if k else named(
            tmp_path, k, emb=array
        )
    result = scan(tmp_path, keep_features=True)
    np.testing.assert_array_equal(np.concatenate(result.features), [numbers(20, seed=k) for k in range(4)])
    assert check_data.Note("no-checksum", "3 files") in result.notes
    assert next(check_data.summary(result)).endswith("4 NPY and NPZ files, 4 usable, 0 left out")
    assert result.keys_used() == {"emb": 1}


def test_one_stem_in_both_forms_is_a_finding(tmp_path):
    np.save(tmp_path / "ravdess_03-01-05-01-01-01-01.npy", GOOD)
    named(tmp_path, 0)
    result = scan(tmp_path)
    assert (len(result.records), result.left_out()) == (1, {"same-stem": 1})
    assert result.findings[0].file.endswith(".npy")


@pytest.mark.parametrize(
    ("blob", "code"),
    [
        (stats.npy_bytes(GOOD)[:-1], "size-mismatch"),
        (stats.npy_bytes(GOOD) + b"0", "size-mismatch"),
        (stats.npy_bytes(GOOD)[:50], "bad-npy-header"),
        (stats.npy_bytes(GOOD * np.nan), "not-finite"),
        (pickle.dumps(1), "pickle"),
        (b"PK\x03\x04", "not-npz"),
        (b"\x89HDF\r\n", "not-npz"),
        (b"", "empty"),
    ],
)
def test_unusable_npy_files_are_rejected(tmp_path, blob, code):
    (tmp_path / "x.npy").write_bytes(blob)
    assert code_of(tmp_path / "x.npy") == code


def test_statistics_are_no_features(tmp_path):
    named(tmp_path, 0)
    supply(tmp_path, 12)
    assert (len(scan(tmp_path).records), scan(tmp_path).findings) == (1, [])


# --- files that are not the features of one utterance ---


def explained(folder):
    """The code of the only kind of finding, its reason, and the lines that remedy it, run in the folder's parent."""
    result = scan(folder)
    (code,) = result.left_out()
    return code, result.findings[0].reason, result.recipes[code]


def run_recipe(recipe, monkeypatch, folder):
    monkeypatch.chdir(folder)
    exec("import csv, os, pathlib\nimport numpy as np\n" + recipe)


@pytest.mark.parametrize("labels", [np.array(["happy", "sad"] * 4), np.arange(8) % 2, np.eye(2)[np.arange(8) % 2]])
@pytest.mark.parametrize("form", ["npz", "npy"])
def test_one_file_for_a_whole_set_is_split_by_the_lines_given(tmp_path, monkeypatch, labels, form):
    data = tmp_path / "data"
    data.mkdir()
    if form == "npz":
        np.savez(data / "all.npz", X=numbers(8, 20), y=labels)
    else:
        np.save(data / "X.npy", numbers(8, 20))
        np.save(data / "y.npy", labels)
    code, reason, recipe = explained(data)
    assert (code, reason[:34]) == ("whole-set", "8 rows and 8 labels: one file for ")
    assert reason.endswith("without speakers only a random split is possible")
    run_recipe(recipe, monkeypatch, tmp_path)
    result = scan(tmp_path / "split", pattern=recipe.split("'")[-2])
    assert sorted(result.count("emotion").values()) == [4, 4]


@pytest.mark.parametrize(
    "more",
    [
        {"tokens": np.arange(8)},
        {"timestamps": np.arange(8.0)},
        {"text": numbers(8, 30)},
        {"labels": WORDS},
        {"speaker": "anna"},
    ],
)
def test_one_utterance_is_not_taken_for_a_whole_set(tmp_path, more):
    np.savez(tmp_path / "utt.npz", hubert=numbers(8, 20), **more)
    assert scan(tmp_path).left_out() == {"unknown-name": 1}


def test_the_speakers_of_a_whole_set_are_kept(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    np.savez(data / "all.npz", features=numbers(4, 20), labels=WORDS[[0, 1, 0, 1]], speakers=np.array(list("aabb")))
    _, reason, recipe = explained(data)
    assert reason == "4 rows and 4 labels: one file for a whole set"
    run_recipe(recipe, monkeypatch, tmp_path)
    assert scan(tmp_path / "split", pattern=recipe.split("'")[-2]).count("speaker") == {"own:a": 2, "own:b": 2}


def test_many_recordings_in_one_file_are_split_by_the_lines_given(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    np.savez(data / "all.npz", **{f"03-01-06-01-01-01-{k:02d}": numbers(20, seed=k) for k in range(1, 25)})
    code, reason, recipe = explained(data)
    assert (code, reason) == ("whole-set", "24 arrays of one width: one file for a whole set")
    run_recipe(recipe, monkeypatch, tmp_path)
    assert len(scan(tmp_path / "split").records) == 24


def test_labels_inside_the_files_are_written_to_a_table_by_the_lines_given(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for k in range(4):
        np.savez(data / f"utt_{k}.npz", x=numbers(20, seed=k), y=WORDS[k % 2], speaker=f"s{k}")
    code, reason, recipe = explained(data)
    assert (code, reason) == ("labels-inside", "holds its own labels, in the arrays y and speaker")
    run_recipe(recipe, monkeypatch, tmp_path)
    result = scan(data, labels="labels.csv")
    assert (result.count("emotion"), len(result.count("speaker"))) == ({"happy": 2, "sad": 2}, 4)


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mean", "std"), ("feature_mean", "feature_std")])
def test_statistics_in_an_npz_are_saved_by_the_lines_given(tmp_path, monkeypatch, names):
    data = tmp_path / "data"
    named_folder = data / "more"
    named_folder.mkdir(parents=True)
    named(data, 0)
    np.savez(data / "stats.npz", **dict(zip(names, (np.zeros(12), np.ones(12)))))
    code, reason, recipe = explained(data)
    assert (code, reason) == ("statistics-file", "holds a mean and a standard deviation, not features")
    run_recipe(recipe, monkeypatch, tmp_path)
    assert stats.load(data).user_supplied


def test_a_pickled_dictionary_is_recognised_and_not_loaded(tmp_path):
    np.save(tmp_path / "features.npy", {"a": GOOD}, allow_pickle=True)
    assert scan(tmp_path).left_out() == {"pickle": 1}


def test_the_lines_are_printed_once(tmp_path):
    for k in range(3):
        np.savez(tmp_path / f"utt_{k}.npz", x=numbers(20, seed=k), y="sad")
    lines = list(check_data.findings_report(scan(tmp_path)))
    assert sum(line.startswith("labels-inside: Python code for this") for line in lines) == 1
    assert lines[-1].endswith("--labels labels.csv")


@pytest.mark.parametrize(
    ("suffix", "text"),
    [(".pth", "weights_only=True"), (".pkl", "pickles can run code"), (".h5", "h5py.File(path)"), (".mat", "loadmat")],
)
def test_other_formats_are_named_with_the_lines_that_convert_them(tmp_path, suffix, text):
    (tmp_path / f"a{suffix}").touch()
    with pytest.raises(check_data.UsageError) as error:
        scan(tmp_path)
    assert f"found 1 {suffix}" in str(error.value)
    assert text in str(error.value)
    assert "allow_pickle" not in str(error.value)
    assert "pickle.load" not in str(error.value)


def test_a_file_with_only_labels_is_rejected(tmp_path):
    assert code_of(write(tmp_path / "x.npz", label=np.eye(8)[1], emotion=np.array("sad"))) == "no-array"


def test_a_pickled_array_beside_the_features_is_not_loaded(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, emb=GOOD, meta=np.array([{"a": 1}], object))
    np.testing.assert_array_equal(read_features(path).array, GOOD)


# --- storage forms of the array ---


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x.astype(np.float64),
        lambda x: x.astype(">f4"),
        lambda x: x.astype(">f8"),
        np.asfortranarray,
        lambda x: x[None],
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_storage_form_yields_the_same_array(tmp_path, change, save):
    frames = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    save(tmp_path / "x.npz", emb=change(frames))
    array = read_features(tmp_path / "x.npz").array
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, frames)


def test_every_storage_form_yields_identical_statistics(tmp_path):
    frames = [numbers(4, 8, seed=k).astype(np.float16).astype(np.float32) for k in range(6)]
    forms = {
        "plain": lambda x: x,
        "double": lambda x: x.astype(np.float64),
        "half": lambda x: x.astype(np.float16),
        "big": lambda x: x.astype(">f4"),
        "fortran": np.asfortranarray,
        "leading": lambda x: x[None],
    }
    found = set()
    for form, change in forms.items():
        (tmp_path / form).mkdir()
        for k, array in enumerate(frames):
            named(tmp_path / form, k, emb=change(array))
        statistics = scan(tmp_path / form).moments.statistics()
        found.add((statistics.mean.tobytes(), statistics.std.tobytes()))
    assert len(found) == 1


def test_float16_is_read(tmp_path):
    write(tmp_path / "x.npz", emb=GOOD.astype(np.float16))
    np.testing.assert_array_equal(read_features(tmp_path / "x.npz").array, GOOD.astype(np.float16))


@pytest.mark.parametrize("zip_writer", ["pipe", "zipfile"])
def test_archives_by_other_writers_are_read(tmp_path, zip_writer):
    path, blob = tmp_path / "x.npz", stats.npy_bytes(GOOD)
    if zip_writer == "zipfile":
        zip_of(path, {"emb.npy": blob})
    else:  # the output cannot seek, so sizes and CRC follow the data

        class Pipe(io.RawIOBase):
            data = b""

            def writable(self):
                return True

            def write(self, block):
                Pipe.data += bytes(block)
                return len(block)

        zip_of(Pipe(), {"emb.npy": blob, "more.npy": blob})
        path.write_bytes(Pipe.data)
    np.testing.assert_array_equal(read_features(path).array, GOOD)


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.arange(4), "not-float"),
        (np.array([True, False]), "not-float"),
        (np.array([1j, 2]), "not-float"),
        (np.array(["a", "b"]), "not-float"),
        (np.zeros(2, [("a", "f4")]), "not-float"),
        (np.array([{}, 1], object), "not-float"),
        (np.zeros(20, "V2"), "not-float"),
        (GOOD * np.float32(1e19), "absurd-scale"),
        (np.array(1.0), "empty-array"),
        (np.zeros((0, 4)), "empty-array"),
        (np.ones((2, 3, 4)), "bad-shape"),
        (np.array([1, np.nan, 2]), "not-finite"),
        (np.array([1, np.inf, -np.inf]), "not-finite"),
        (np.array([1, 1e300]), "not-finite"),
        (np.zeros(4), "constant"),
        (np.full((3, 4), 7.0), "constant"),
    ],
)
def test_unusable_arrays_are_rejected(tmp_path, array, code):
    assert code_of(write(tmp_path / "x.npz", emb=array)) == code


def test_not_finite_reports_count_and_first_index(tmp_path):
    array = np.ones((3, 4))
    array[1, 2] = array[2, 0] = np.nan
    with pytest.raises(stats.DataError, match=r"2 of 12 values .* first at \(1, 2\)"):
        read_features(write(tmp_path / "x.npz", emb=array))


# --- damaged files ---


@pytest.mark.parametrize(
    ("blob", "code"),
    [
        (b"", "empty"),
        (bytes(5000), "empty"),
        (b"hello", "not-npz"),
        (b"<!DOCTYPE html><html>404</html>", "not-npz"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"),
        (stats.npy_bytes(GOOD), "not-npz"),
        (b"RIFF....WAVE", "not-npz"),
        (b"PK\x05\x06", "not-npz"),
        (b"PK\x05\x06" + bytes(18), "no-array"),
        (b"PK\x06\x07" + bytes(16) + b"PK\x05\x06" + bytes(18), "bad-zip"),  # a zip64 locator, and nothing it leads to
    ],
)
def test_files_that_are_not_zip_archives_are_identified(tmp_path, blob, code):
    path = tmp_path / "x.npz"
    path.write_bytes(blob)
    assert code_of(path) == code


def with_flag(blob, flag):
    """Set a general purpose flag, both in the local header of the only entry and in the directory."""
    damaged = bytearray(blob)
    damaged[6] |= flag
    damaged[blob.find(b"PK\x01\x02") + 8] |= flag
    return bytes(damaged)


def with_gap(blob):
    """Insert four bytes between the entry and the directory, and adjust the offset of the directory."""
    offset = blob.find(b"PK\x01\x02")
    damaged = bytearray(blob[:offset] + b"free" + blob[offset:])
    struct.pack_into("<L", damaged, len(damaged) - 6, offset + 4)
    return bytes(damaged)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda blob: blob[:100], "truncated"),
        (lambda blob: blob[:-3], "truncated"),
        (lambda blob: with_flag(blob, 1), "encrypted"),
        (lambda blob: with_flag(blob, 4), "bad-zip"),
        (with_gap, "bad-zip"),
        (lambda blob: blob.replace(b"emb.npy", b"emx.npy", 1), "bad-zip"),
        (lambda blob: blob.replace(GOOD.tobytes(), GOOD[::-1].tobytes()), "bad-crc"),
    ],
)
def test_damaged_archives_are_rejected(tmp_path, damage, code):
    path = write(tmp_path / "x.npz")
    path.write_bytes(damage(path.read_bytes()))
    assert code_of(path) == code


def test_oversized_files_and_arrays_are_rejected_unread(tmp_path):
    path = tmp_path / "x.npz"
    path.touch()
    os.truncate(path, 2 * check_data.MAX_ARRAY_BYTES + 1)  # sparse: takes no space on disk
    assert code_of(path) == "too-large"
    blob = zip_of(io.BytesIO(), {"emb.npy": bytes(1 << 22)}, zipfile.ZIP_DEFLATED).getvalue()
    path.write_bytes(blob.replace((1 << 22).to_bytes(4, "little"), (1 << 29).to_bytes(4, "little")))
    assert code_of(path) == "too-large"


class Exploit:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EXPLOIT"],))


@pytest.mark.parametrize("form", ["pickle", "array"])
def test_code_in_a_pickle_does_not_run(tmp_path, monkeypatch, form):
    monkeypatch.setenv("EXPLOIT", str(tmp_path / "ran"))
    path = tmp_path / "x.npz"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Exploit()))
        assert code_of(path) == "pickle"
    else:
        np.savez(path, emb=np.array([Exploit(), 1], object))
        assert code_of(path) == "not-float"
    assert not (tmp_path / "ran").exists()


def test_every_truncation_is_rejected(tmp_path):
    whole = write(tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "x.npz"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert code_of(path)


def flipped(blob, bits):
    """Yield a copy of the file for each bit, with that bit flipped."""
    for bit in bits:
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(damaged)


@pytest.mark.parametrize("shape", [(768,), (150, 768)])
def test_every_flipped_bit_is_detected(tmp_path, shape):
    """Every bit in the file of a vector; for a sequence, every bit outside the values."""
    path = write(tmp_path / "x.npz", emb=numbers(*shape))
    blob = path.read_bytes()
    read_features(path)  # so that the layout cache is used for the damaged files
    (entry,) = check_data._read_directory(blob)
    last = 8 * len(blob)
    bits = range(last) if len(shape) == 1 else [*range(8 * (entry.start + 128)), *range(8 * entry.stop, last)]
    for bit, damaged in flipped(blob, bits):
        path.write_bytes(damaged)
        with pytest.raises(stats.DataError):
            read_features(path)
            pytest.fail(f"flipped bit {bit} was not detected")


def test_flipped_bits_in_a_compressed_file_never_change_the_array(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", emb=GOOD)
    blob, path = (tmp_path / "whole.npz").read_bytes(), tmp_path / "x.npz"
    for _, damaged in flipped(blob, range(8 * len(blob))):
        path.write_bytes(damaged)
        try:
            array = read_features(path).array
        except stats.DataError:
            continue
        np.testing.assert_array_equal(array, GOOD)  # some bits of a deflate stream are unused


def mutants(blobs, count, seed):
    """Yield damaged copies of good files: bits and bytes changed, removed, repeated or moved, or extreme integers."""
    random = np.random.default_rng(seed)
    extremes = [bytes(4), b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\x01\x00\x00\x00", b"PK\x01\x02"]
    for number in range(count):
        blob = bytearray(blobs[number % len(blobs)])
        for _ in range(random.integers(1, 4)):
            start, stop = sorted(random.integers(0, len(blob) + 1, 2).tolist())
            kind = random.integers(0, 7)
            if kind == 0 and blob:
                blob[start % len(blob)] ^= 1 << random.integers(0, 8)
            elif kind == 1:
                blob[start : start + 4] = extremes[random.integers(0, len(extremes))]
            elif kind == 2:
                del blob[start:stop]
            elif kind == 3:
                blob[start:start] = blob[start : min(stop, start + 200)]
            elif kind == 4:
                blob[start:stop] = bytes(stop - start)
            elif kind == 5:
                blob[start : start + 8] = random.bytes(8)
            else:
                other = blobs[random.integers(0, len(blobs))]
                blob[start:stop] = other[start:stop]
        yield bytes(blob)


def read_all(path, blobs):
    """Write each file in turn and read it; yield its bytes and the array, unless it is rejected with a known code."""
    with path.open("wb", buffering=0) as file:
        for blob in blobs:
            os.pwrite(file.fileno(), blob, 0)
            os.ftruncate(file.fileno(), len(blob))
            try:
                array = read_features(path).array
            except stats.DataError as error:
                assert error.code in check_data.REMEDIES
            else:
                yield blob, array


def test_mutants_are_rejected_or_read_correctly(tmp_path):
    """Either DataError or the original array. FUZZ_MUTANTS=300000 runs longer, FUZZ_SEED changes the mutants."""
    frames = numbers(6, 16)
    np.savez(tmp_path / "0.npz", emb=frames[0])
    np.savez_compressed(tmp_path / "1.npz", emb=frames)
    np.savez(tmp_path / "2.npz", label=np.eye(8)[1], wav2vec_features=frames, emotion=np.array("sad"))
    with zipfile.ZipFile(tmp_path / "3.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("emb.npy"), stats.npy_bytes(frames))
    np.savez(tmp_path / "4.npz", scores=frames[0, :3], one=np.array(["a"], object), wavlm=frames, text=np.array("sad"))
    blobs = [(tmp_path / f"{number}.npz").read_bytes() for number in range(5)]
    originals = [read_features(tmp_path / f"{number}.npz").array for number in range(5)]
    accepted = 0
    count, seed = int(os.environ.get("FUZZ_MUTANTS", 30_000)), int(os.environ.get("FUZZ_SEED", 0))
    for _, array in read_all(tmp_path / "x.npz", mutants(blobs, count, seed)):
        accepted += 1
        assert any(np.array_equal(array, good) for good in originals)
    assert accepted < count / 10


def test_npy_mutants_are_rejected_or_read_as_numpy_reads_them(tmp_path):
    """Without a checksum a damaged value is a value; what is read must be what numpy reads."""
    blobs = [stats.npy_bytes(array) for array in (numbers(16), numbers(3, 8).T, numbers(1, 4).astype(">f8"))]
    count, seed = int(os.environ.get("FUZZ_MUTANTS", 10_000)), int(os.environ.get("FUZZ_SEED", 0))
    compared = 0
    for blob, array in read_all(tmp_path / "x.npy", mutants(blobs, count, seed)):
        try:
            expected = np.load(io.BytesIO(blob))
        except Exception:  # numpy's own headers are stricter in some ways; there is nothing to compare
            continue
        compared += 1
        with np.errstate(over="ignore"):
            expected = expected.astype(np.float32)
        assert np.array_equal(array, expected[0] if expected.ndim > 1 and len(expected) == 1 else expected)
    assert compared > count / 100


GRAMMAR = {
    "version": [*[(1, 0)] * 6, (2, 0), (3, 0), (4, 0), (0, 0)],
    "descr": [
        *["'<f4'"] * 8,
        *("'>f4'", "'<f2'", "'<f8'", "'>f8'", "'<f16'", "'<i4'", "'|u1'", "'|b1'", "'<c8'", "'|S3'", "'<U4'", "'|V2'"),
        *("'|O'", "[('a', '<f4')]", "[('a', '|O')]", "'zz'", "None", "'<f" + "4" * 5000 + "'", "('<f4', (2,))"),
    ],
    "order": [*["False"] * 6, "True", "True", "None", "0"],
    "shape": [
        *["(6,)", "(3, 4)", "(1, 6)", "(1, 3, 4)"] * 4,
        *("()", "(0,)", "(6, 0)", "(2, 3, 4)", "(-6,)", "(True,)", "[6]", "6", "(6.0,)", "(0, 10**30)"),
        *(
            f"({'1, ' * 71})",
            f"({'1, ' * 33}6)",
            f"({'9' * 5000},)",
            f"({10**12},)",
            f"({2**32}, {2**32})",
            f"(0, {10**21})",
        ),
    ],
    "more": [*[""] * 12, ", 'x': 1", ", 'descr': '<f4'", "  " * 40, "(" * 300, "\\x00"],
    "surplus": [*[0] * 8, 1, -1, 8, -24],  # bytes of data beyond those that are declared
    "name": [*["emb.npy"] * 6, "x.npy", "emb", "a/b.npy", "\u00e9.npy", "", "label.npy", "emb.npy.npy"],
    "arrays": [1, 1, 1, 2, 3, 0],
    "method": [zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA],
    "container": ["zip", "zip", "zip", "zip64", "piped", "comment", "before", "after", "npy"],
}


class Pipe(io.BytesIO):
    """A file that cannot be sought, so that sizes and checksums follow the data."""

    def seekable(self):
        return False

    def seek(self, *_):
        raise OSError

    tell = seek


def file_of_grammar(choose):
    """The bytes of a file put together from `GRAMMAR`, and whether it is a bare array."""

    def array():
        shape = choose("shape")
        header = f"{{'descr': {choose('descr')}, 'fortran_order': {choose('order')}, 'shape': {shape}{choose('more')}}}"
        text = header.encode("latin-1")
        version = choose("version")
        length = struct.pack("<H" if version[0] < 2 else "<I", len(text))
        values = {"(2, 3, 4)": 24, "(3, 4)": 12, "(1, 3, 4)": 12}.get(shape, 6)
        data = numbers(64).tobytes()[: max(0, 4 * values + choose("surplus"))]
        return b"\x93NUMPY" + bytes(version) + length + text + data

    container = choose("container")
    if container == "npy":
        return array(), True
    file = Pipe() if container == "piped" else io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", choose("method")) as archive:
        warnings.simplefilter("ignore")  # two members of one name
        for _ in range(choose("arrays")):
            with archive.open(zipfile.ZipInfo(choose("name")), "w", force_zip64=container == "zip64") as member:
                member.write(array())
        if container == "comment":
            archive.comment = b"a comment"
    around = {"before": (b"junk", b""), "after": (b"", b"junk")}.get(container, (b"", b""))
    return around[0] + file.getvalue() + around[1], False


def test_files_of_a_grammar_are_rejected_or_read_as_numpy_reads_them(tmp_path):
    """FUZZ_FILES=100000 makes more of them, FUZZ_SEED others."""
    count, seed = int(os.environ.get("FUZZ_FILES", 3000)), int(os.environ.get("FUZZ_SEED", 0))
    random = np.random.default_rng(seed)
    compared = 0
    for _ in range(count):
        blob, is_bare = file_of_grammar(lambda part: GRAMMAR[part][random.integers(len(GRAMMAR[part]))])
        path = tmp_path / ("x.npy" if is_bare else "x.npz")
        path.write_bytes(blob)
        try:
            features = read_features(path)
        except stats.DataError as error:
            assert error.code in check_data.REMEDIES
            assert len(error.reason) < 1000
            continue
        try:
            loaded = np.load(path)
            # By the name in the archive: where it also has an `emb.npy.npy`, `emb.npy` means another array to numpy.
            member = f"{features.key}.npy"
            expected = loaded if is_bare else loaded[member if member in loaded.zip.namelist() else features.key]
        except Exception:  # numpy refuses what it could read, such as names without .npy; there is nothing to compare
            continue
        compared += 1
        expected = expected[0] if expected.ndim > 1 and len(expected) == 1 else expected
        with np.errstate(over="ignore"):
            assert np.array_equal(features.array, expected.astype(np.float32))
    assert compared > count / 100


def test_kept_features_share_a_block_that_is_freed_with_the_last_of_them(tmp_path):
    for actor in range(1, 7):
        write(
            tmp_path / f"ravdess_03-01-05-01-01-01-{actor:02d}.npz",
            emb=np.random.default_rng(actor).normal(size=(9, 8)),
        )
    features = scan(tmp_path, keep_features=True).features
    assert len({id(array.base) for array in features}) == 1
    block = weakref.ref(features[0].base)
    del features[0]
    assert block() is not None
    features.clear()
    assert block() is None


def test_bytes_before_or_after_the_archive_are_rejected(tmp_path):
    whole, path = write(tmp_path / "whole.npz").read_bytes(), tmp_path / "x.npz"
    path.write_bytes(whole + b"more")
    assert code_of(path) == "junk"
    path.write_bytes(b"more" + whole)
    assert code_of(path) == "junk"


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }", "size-mismatch"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (11,), }", "size-mismatch"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2**40,), }", "bad-npy-header"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (12,), }", "not-float"),
        ("__import__('os').mkdir('ran')", "bad-npy-header"),
    ],
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npy_headers_are_validated(tmp_path, header, code, method):
    text = header.encode()
    blob = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + GOOD.tobytes()
    assert code_of(zip_of(tmp_path / "x.npz", {"emb.npy": blob}, method)) == code


def test_a_zip_bomb_is_rejected(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", emb=np.zeros((1 << 18, 64), np.float32))
    assert (tmp_path / "x.npz").stat().st_size < 100_000
    assert code_of(tmp_path / "x.npz") == "bomb"


def test_other_compression_methods_are_rejected(tmp_path):
    assert code_of(zip_of(tmp_path / "x.npz", {"emb.npy": stats.npy_bytes(GOOD)}, zipfile.ZIP_LZMA)) == (
        "unknown-compression"
    )


def test_special_files_are_reported_without_blocking(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "03-01-05-01-02-01-12.npz")
    os.mkfifo(folder / "fifo.npz")
    (folder / "folder.npz").mkdir()
    (folder / "dangling.npz").symlink_to("nowhere")
    (folder / "loop.npz").symlink_to("loop.npz")
    with socket.socket(socket.AF_UNIX) as server:
        working_folder = os.getcwd()
        os.chdir(folder)  # the path of a socket must be short
        server.bind("socket.npz")
        os.chdir(working_folder)
        read, codes = iter_features(folder)
    assert len(read) == 1
    assert codes["fifo.npz"] == codes["folder.npz"] == "not-a-file"
    assert codes["dangling.npz"] == codes["loop.npz"] == codes["socket.npz"] == "unreadable"


def test_iter_features_reads_lazily(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.npz")
    result = check_data.Scan(tmp_path, 12)
    read = check_data.iter_features(check_data.ScanOptions(str(tmp_path)), result, SCALE)
    next(read)
    (tmp_path / "b.npz").write_bytes(b"")
    assert list(read) == []
    assert [(finding.file, finding.code) for finding in result.findings] == [("b.npz", "empty")]


def test_iter_features_yields_only_files_that_fit_the_model(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"ravdess_03-01-05-01-02-01-12": (12,), "x": (3, 12), "turned": (12, 3), "flat": (36,), "narrow": (1, 5)}
    for name, shape in shapes.items():
        write(tmp_path / f"{name}.npz", emb=rng.normal(size=shape))
    read, codes = iter_features(tmp_path)
    assert [(u.file, u.emotion, u.speaker, frames.shape) for u, frames in read] == [
        ("ravdess_03-01-05-01-02-01-12.npz", "angry", "ravdess:12", (1, 12)),
        ("x.npz", None, None, (3, 12)),
    ]
    assert codes == {"turned.npz": "transposed", "flat.npz": "other-width", "narrow.npz": "other-width"}
    read, codes = iter_features(tmp_path, reshapes_vectors=True)
    assert [frames.shape for u, frames in read] == [(3, 12), (1, 12), (3, 12)]


def test_iter_features_accepts_a_single_file(tmp_path):
    write(tmp_path / "a.npz")
    write(tmp_path / "b.npz")
    read, _ = iter_features(tmp_path / "b.npz")
    assert [u.file for u, _ in read] == ["b.npz"]
    (tmp_path / "sad").mkdir()
    write(tmp_path / "sad" / "c.npz")
    read, _ = iter_features(tmp_path / "sad" / "c.npz")
    assert [(u.file, u.emotion) for u, _ in read] == [("c.npz", "sad")]  # the folder labels a single file too
    with pytest.raises(check_data.UsageError, match="no such"):
        iter_features(tmp_path / "c.npz")


# --- the folder ---


def test_flat_and_nested_layouts_yield_the_same_utterances(tmp_path, sample):
    flat = scan(sample)
    for record in flat.records:
        folder = tmp_path / "nested" / record.utterance.emotion
        folder.mkdir(parents=True, exist_ok=True)
        os.link(sample / record.file, folder / record.file)
    nested = scan(tmp_path / "nested")
    assert {r.utterance.speaker for r in flat.records} == {r.utterance.speaker for r in nested.records}
    assert flat.count("emotion") == nested.count("emotion")
    assert "flat in the folder" in "\n".join(check_data.summary(flat))
    assert "in subfolders" in "\n".join(check_data.summary(nested))


def test_emotion_named_folders_label_files_with_unknown_names(tmp_path):
    for emotion in ("Happy", "sad"):
        (tmp_path / emotion).mkdir()
        write(tmp_path / emotion / "001.npz", emb=numbers(8, seed=len(emotion)))
    result = scan(tmp_path)
    assert [(r.utterance.emotion, r.utterance.speaker) for r in result.records] == [("happy", None), ("sad", None)]
    assert "emotion-named folders (2)" in "\n".join(check_data.summary(result))


def test_conflicting_name_and_folder_labels_are_a_finding(tmp_path):
    (tmp_path / "sad").mkdir()
    write(tmp_path / "sad" / "ravdess_03-01-05-01-02-01-12.npz")
    assert [finding.code for finding in scan(tmp_path).findings] == ["label-conflict"]


def test_a_bad_file_does_not_affect_good_ones(sample):
    good = scan(sample)
    (sample / "aaa.npz").write_bytes(b"not a zip")
    write(sample / "nobody.npz")
    both = scan(sample)
    assert both.records == good.records
    assert both.left_out() == {"unknown-name": 2}
    assert both.fingerprint == good.fingerprint


def test_hidden_files_and_results_of_runs_are_ignored(sample):
    (sample / "._03-01-05-01-02-01-12.npz").write_bytes(b"mac")
    (sample / ".tmp").mkdir()
    write(sample / ".tmp" / "x.npz")
    (sample / "run").mkdir()
    for name in ("model.npz", "config.json", "metrics.json"):
        (sample / "run" / name).write_bytes(b"")
    result = scan(sample)
    assert (len(result.records), result.findings, result.n_ignored) == (112, [], 5)
    assert "  ignored      5 hidden or temporary files, or results of runs" in check_data.summary(result)


@pytest.mark.parametrize(
    ("names", "n_ignored"),
    [
        (("checkpoint-0.npz",), 1),
        (("checkpoint-1.npz", "train.log"), 2),
        (("checkpoint-0.npz", "checkpoint-1.npz", "lock"), 3),
        (("fusion.npz", "predictions.csv"), 2),
        (("checkpoint-2.npz",), 0),
        (("model.npz", "predictions.csv"), 0),
    ],
)
def test_folders_of_unfinished_runs_and_predictions_are_ignored(sample, names, n_ignored):
    run = sample / "run"
    run.mkdir()
    for name in names:
        (run / name).write_bytes(b"")
    result = scan(sample)
    n_npz = sum(name.endswith(".npz") for name in names)
    assert (len(result.records), result.n_ignored) == (112, n_ignored)
    assert len(result.findings) == (0 if n_ignored else n_npz)


def test_a_folder_with_a_link_to_itself_is_read_once(sample):
    (sample / "loop").symlink_to(sample, target_is_directory=True)
    assert len(scan(sample).records) == 112


@pytest.mark.parametrize("name", ["a\nb", "$(touch ran)", "-rf", "\x1b[31mred", "\udcff", 'quo"te', "sp ace"])
def test_a_hostile_file_name_cannot_forge_a_line(tmp_path, name):
    write(tmp_path / f"{name}.npz")
    result = scan(tmp_path)
    (line,) = check_data.findings_report(result)
    assert "\n" not in line
    assert "\x1b" not in line
    assert line.isprintable()
    assert "unknown-name" in line


# --- the width of the features ---


def named(folder, number, **arrays):
    return write(folder / f"ravdess_03-01-05-01-01-01-{number + 1:02d}.npz", **arrays)


def test_flat_sequences_are_reshaped_if_other_files_show_the_width(tmp_path):
    frames = [numbers(3 + k, 8, seed=k) for k in range(4)]
    for k, array in enumerate(frames):
        named(tmp_path, k, emb=array if k == 0 else array.reshape(-1))
    result = scan(tmp_path, keep_features=True)
    assert (result.dim, result.findings) == (8, [])
    assert any(note.code == "reshaped" and note.text == "3 files, D = 8" for note in result.notes)
    for kept, array in zip(result.features, [frames[0], *frames[1:]]):
        np.testing.assert_array_equal(kept, array)


def test_flat_sequences_are_reshaped_if_dim_or_statistics_give_the_width(tmp_path):
    for k in range(3):
        named(tmp_path, k, emb=numbers(8 * (2 + k), seed=k))
    assert [record.shape for record in scan(tmp_path, dim=8).records] == [(16,), (24,), (32,)]
    supply(tmp_path, 8)
    assert [len(frames) for frames in scan(tmp_path, keep_features=True).features] == [2, 3, 4]


def test_vectors_of_a_multiple_of_the_width_are_left_out(tmp_path):
    for k in range(5):
        named(tmp_path, k, emb=numbers(8 if k else 16, seed=k))
    result = scan(tmp_path)
    assert result.dim == 8
    assert result.left_out() == {"other-width": 1}


@pytest.mark.parametrize("odd", [(8, 1), (1, 4), (5, 4), (6, 2)])
def test_one_odd_file_does_not_reshape_the_other_vectors(tmp_path, odd):
    for k in range(6):
        named(tmp_path, k, emb=numbers(*(odd if k == 5 else (8,)), seed=k))
    result = scan(tmp_path)
    assert (result.dim, len(result.records), len(result.findings)) == (8, 5, 1)


def test_a_few_real_sequences_identify_many_flat_ones(tmp_path):
    for k in range(12):
        named(tmp_path, k, emb=numbers(*((3, 8) if k < 2 else (8 * (2 + k // 4),)), seed=k))
    result = scan(tmp_path)
    assert (result.dim, len(result.records)) == (8, 12)


def test_a_tie_between_widths_requires_dim(tmp_path):
    for k in range(4):
        named(tmp_path, k, emb=numbers(8 if k % 2 else 12, seed=k))
    with pytest.raises(check_data.UsageError, match="8 and 12; choose one with --dim"):
        scan(tmp_path)
    assert len(scan(tmp_path, dim=12).records) == 2


def supply(folder, dim):
    np.save(folder / stats.MEAN_FILE, np.zeros(dim, np.float32))
    np.save(folder / stats.STD_FILE, np.ones(dim, np.float32))


def test_statistics_of_another_width_are_rejected_with_both_widths(tmp_path):
    named(tmp_path, 0, emb=numbers(8))
    supply(tmp_path, 5)
    with pytest.raises(stats.DataError, match=r"has 5 values, but the files have shape \(8,\)"):
        scan(tmp_path)
    with pytest.raises(stats.DataError, match=r"has 5 values, but --dim is 8"):
        scan(tmp_path, dim=8)


def test_vectors_of_equal_length_are_not_reshaped_to_fit_statistics(tmp_path):
    for k in range(3):
        named(tmp_path, k, emb=numbers(8, seed=k))
    supply(tmp_path, 4)
    with pytest.raises(stats.DataError, match=r"has 4 values, but the files have shape \(8,\)"):
        scan(tmp_path)


def test_a_leading_axis_is_dropped_and_counted(tmp_path):
    for k, shape in enumerate([(1, 8), (1, 3, 8), (8,), (4, 8)]):
        named(tmp_path, k, emb=numbers(*shape, seed=k))
    result = scan(tmp_path)
    assert [record.shape for record in result.records] == [(8,), (3, 8), (8,), (4, 8)]
    assert check_data.Note("leading-axis", "2 files") in result.notes


@pytest.mark.parametrize("stale", [False, True])
def test_computed_statistics_do_not_determine_the_width(tmp_path, stale):
    """Statistics of width 4, as a run with --dim 4 leaves them, must not cause vectors of width 8 to be reshaped."""
    for k in range(3):
        named(tmp_path, k, emb=numbers(8, seed=k))
    halves = scan(tmp_path, dim=4)
    stats.save(tmp_path, stats.Moments.of(numbers(9, 4)).statistics(), "yesterday" if stale else halves.fingerprint)
    result = scan(tmp_path)
    assert (result.dim, result.statistics_are_stale, result.reshapes_vectors) == (8, True, False)
    assert scan(tmp_path, dim=4).statistics_are_stale == stale


def test_the_same_files_are_used_with_and_without_computed_statistics(tmp_path):
    """Flat sequences are evidence for a width only beside other sequences, not beside saved statistics."""
    for k, shape in enumerate([(8,)] * 6 + [(3, 4)] * 2):
        named(tmp_path, k, emb=numbers(*shape, seed=k))
    first = scan(tmp_path)
    stats.save(tmp_path, first.moments.statistics(), first.fingerprint)
    second = scan(tmp_path)
    assert (second.records, second.findings, second.dim) == (first.records, first.findings, first.dim)
    assert (second.reshapes_vectors, second.fingerprint) == (first.reshapes_vectors, first.fingerprint)


def test_changed_contents_make_computed_statistics_stale(sample):
    first = scan(sample)
    stats.save(sample, first.moments.statistics(), first.fingerprint)
    assert not scan(sample).statistics_are_stale
    path = sample / first.records[0].file
    np.savez(path, emb=read_features(path).array * 2)
    assert scan(sample).statistics_are_stale


def test_transposed_sequences_are_reported_and_transposed_on_request(tmp_path):
    frames = [numbers(3 + k, 8, seed=k) for k in range(4)]
    for k, array in enumerate(frames):
        named(tmp_path, k, emb=np.ascontiguousarray(array.T))
    assert scan(tmp_path).left_out() == {"transposed": 4}
    turned = scan(tmp_path, transpose=True, keep_features=True)
    for kept, array in zip(turned.features, frames, strict=True):
        np.testing.assert_array_equal(kept, array)


def test_a_single_transposed_sequence_is_left_out(tmp_path):
    for k in range(4):
        named(tmp_path, k, emb=numbers(*((8, 3) if k == 2 else (3, 8)), seed=k))
    result = scan(tmp_path)
    assert [(finding.file[-6:], finding.code) for finding in result.findings] == [("03.npz", "transposed")]


# --- all layers of an encoder ---

LAYERS = [numbers(3, 9 + k, 8, seed=k) for k in range(4)]  # (L, T, D) of four files, L = 3, D = 8


def write_layers(folder, change, **arrays):
    """Write the changed layers of each file."""
    folder.mkdir(exist_ok=True)
    for k, layers in enumerate(LAYERS):
        named(folder, k, hidden_states=change(layers), **arrays)
    return folder


def means(layers):
    return layers.mean(1, dtype=np.float64).astype(np.float32)


@pytest.mark.parametrize(
    "change",
    [
        means,
        lambda x: means(x)[None],
        lambda x: means(x)[:, None],
        lambda x: x,
        lambda x: x[None],
        lambda x: x[:, None],  # the layers of a batch of one, stacked
        lambda x: x.transpose(1, 0, 2),
        lambda x: x.transpose(1, 0, 2)[None],
    ],
    ids=["(L, D)", "(1, L, D)", "(L, 1, D)", "(L, T, D)", "(1, L, T, D)", "(L, 1, T, D)", "(T, L, D)", "(1, T, L, D)"],
)
def test_layers_are_read_in_every_form_and_their_frames_averaged(tmp_path, change):
    folder = write_layers(tmp_path / "data", change, pitch=numbers(5))
    for key in (None, "hidden_states"):
        result = scan(folder, keep_features=True, layers=True, key=key)
        assert (result.findings, result.layers, result.dim) == ([], 3, 8)
        for features, record, layers in zip(result.features, result.records, LAYERS, strict=True):
            assert features.dtype == np.float32
            np.testing.assert_array_equal(features, means(layers))
            np.testing.assert_array_equal(result.read_again(record), features)
        for number in (1, -2):
            one = scan(folder, keep_features=True, layer=number, key=key)
            assert (one.findings, one.layers, one.dim) == ([], 1, 8)
            np.testing.assert_array_equal(one.features, [means(layers)[[number]] for layers in LAYERS])
    assert "features     4 utterances of 3 layers of 8" in "\n".join(check_data.summary(result))


def test_an_array_without_the_layers_asked_for_is_left_out(tmp_path):
    folder = write_layers(tmp_path / "data", means)
    named(folder, 4, hidden_states=numbers(8))
    named(folder, 5, hidden_states=numbers(2, 3, 4, 8))
    named(folder, 6, hidden_states=numbers(4, 8))
    result = scan(folder, layers=True)
    assert result.left_out() == {"no-layers": 2, "other-layers": 1}
    assert result.findings[2].reason == "has 4 layers, not 3"
    assert scan(folder, layer=2).left_out() == {"no-layers": 2, "other-layers": 1}
    assert scan(folder, layer=3).left_out() == {"no-layers": 6}
    assert scan(folder, layer=-4).left_out() == {"no-layers": 6}


@pytest.mark.parametrize("change", [lambda x: x[:, :9], lambda x: x.transpose(1, 0, 2)[:9]])
def test_layers_and_frames_of_equal_numbers_in_all_files_are_assumed_to_be_layers_by_frames(tmp_path, change):
    result = scan(write_layers(tmp_path / "data", change), layers=True)
    first, second, width = change(LAYERS[0]).shape
    (note,) = [note.text for note in result.notes if note.code == "layer-axis"]
    assert note.startswith(f"arrays ({first}, {second}, {width}) are read as {first} layers; ")
    assert result.layers == first


def test_the_axis_that_most_files_share_is_that_of_the_layers(tmp_path):
    folder = write_layers(tmp_path / "data", lambda x: x.transpose(1, 0, 2))
    square = numbers(3, 3, 8)  # as many frames as layers
    named(folder, 4, hidden_states=square)
    named(folder, 5, hidden_states=numbers(3, 4, 8))  # layers first, of which it has as many as others have frames
    write(folder / "a.npz", hidden_states=numbers(7, 7, 8))
    result = scan(folder, keep_features=True, layers=True)
    assert result.layers == 3
    np.testing.assert_array_equal(result.features[4], square.mean(0, dtype=np.float64).astype(np.float32))
    assert [finding.code for finding in result.findings] == ["unknown-name", "other-layers"]
    assert "layer-axis" not in codes_of_notes(result)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({(3, 9, 8): 1, (3, 10, 8): 1}, (0, True)),
        ({(9, 3, 8): 1, (10, 3, 8): 1}, (1, True)),
        ({(9, 3, 8): 1, (3, 8): 1}, (1, True)),
        ({(60, 40, 8): 1, (60, 41, 8): 1, (60, 42, 8): 1}, (0, True)),
        ({(13, 20, 8): 1, (13, 21, 8): 1, (25, 20, 9): 1, (25, 22, 9): 1}, (0, False)),
        ({(13, 99, 8): 9}, (0, False)),
        ({(99, 13, 8): 9}, (1, False)),
        ({(40, 13, 8): 9}, (0, False)),
        ({(13, 99, 8): 9, (25, 99, 8): 1}, (0, False)),  # frames are padded, and one file is of another encoder
        ({(99, 13, 8): 9, (99, 25, 8): 1}, (1, False)),
        ({(5, 3, 8): 2, (6, 3, 8): 1}, (1, False)),  # frames are equal by chance
    ],
)
def test_the_axis_of_the_layers_is_that_which_files_share_if_there_can_be_so_many(shapes, expected):
    assert check_data.layer_axis(check_data.Counter(shapes)) == expected


def test_the_axis_of_the_layers_of_a_model_is_that_of_their_number_or_that_of_training():
    square, other = check_data.Counter([(13, 13, 8)]), check_data.Counter([(40, 13, 8)])
    assert check_data.layer_axis(other, 13) == (1, True)
    assert check_data.layer_axis(other, 40) == (0, True)
    for usual in (0, 1):
        assert check_data.layer_axis(square, 13, usual) == (usual, False)
        assert check_data.layer_axis(other, usual=usual) == (usual, False)
        assert check_data.layer_axis(other, 13, usual) == (1, True)


def test_frames_that_are_taken_for_layers_are_noted(tmp_path):
    for k in range(3):
        named(tmp_path, k, last_hidden_state=numbers(51, 4, seed=k), hidden_states=numbers(3, 51, 4, seed=k))
    result = scan(tmp_path, layers=True)
    assert [note.text[:36] for note in result.notes if note.code == "layer-axis"] == [
        "arrays (51, 4) are read as 51 layers"
    ]
    assert scan(tmp_path, layers=True, key="hidden_states").layers == 3


def test_few_files_are_read_to_find_the_axis_of_the_layers(tmp_path, monkeypatch):
    for k in range(50):
        write(tmp_path / f"ravdess_03-01-05-01-01-01-{k % 24 + 1:02d}_{k // 24}.npz", emb=numbers(4 + k, 3, 8, seed=k))
    read, load = [], check_data._load_array
    monkeypatch.setattr(check_data, "_load_array", lambda path, keys: (read.append(path), load(path, keys))[1])
    assert scan(tmp_path, layers=True).layers == 3
    assert 60 <= len(read) <= 70


def test_two_numbers_of_layers_in_equally_many_files_are_no_basis_for_a_choice(tmp_path):
    for k in range(4):
        named(tmp_path, k, hidden_states=numbers(4 + k % 2, 8, seed=k))
    for options in ({"layers": True}, {"layer": 0}):
        with pytest.raises(check_data.UsageError, match=r"equally many files have 4 and 5 layers; .* --layers"):
            scan(tmp_path, **options)


def test_the_width_of_a_layer_is_that_of_most_files_or_chosen(tmp_path):
    for k in range(4):
        named(tmp_path, k, hidden_states=numbers(3 + k // 2, 8 + k // 2, seed=k))
    with pytest.raises(check_data.UsageError, match="width 8 and 9; choose one with --dim"):
        scan(tmp_path, layers=True)
    result = scan(tmp_path, layers=True, dim=9)
    assert (result.layers, result.dim, result.left_out()) == (4, 9, {"other-width": 2})
    for k in range(4):
        named(tmp_path, k, hidden_states=numbers(3, (8, 8, 9, 10)[k], seed=k))
    assert scan(tmp_path, layers=True).left_out() == {"other-width": 2}


def test_a_layer_as_wide_as_two_of_the_chosen_width_is_not_cut(tmp_path):
    for k in range(3):
        named(tmp_path, k, hidden_states=numbers(3, 8, seed=k))
    assert scan(tmp_path, layer=1, dim=4).left_out() == {"other-width": 3}


def test_values_that_cannot_be_used_are_found_in_every_layer_that_is_read(tmp_path):
    folder = write_layers(tmp_path / "data", lambda x: x)
    layers = LAYERS[0].copy()
    layers[2, 4, 5] = np.nan
    named(folder, 4, hidden_states=layers)
    layers = LAYERS[1].copy()
    layers[2] = 7
    named(folder, 5, hidden_states=layers)
    result = scan(folder, layers=True)
    assert [(finding.code, finding.reason) for finding in result.findings] == [
        ("not-finite", "1 of 216 values are NaN or Inf, the first at (2, 4, 5)"),
        ("constant", "all 8 values of layer 2 are 7: the feature extraction failed"),
    ]
    assert scan(folder, layers=True, nan_to_zero=True).left_out() == {"constant": 1}
    assert scan(folder, layer=-1).left_out() == {"not-finite": 1, "constant": 1}
    assert scan(folder, layer=0).left_out() == {"duplicate-speaker": 2}


def test_layers_are_averaged_in_double_precision(tmp_path):
    frames = np.full((3, 20_000, 2), (2**14, 2**13), np.float32)
    frames[:, 0] = numbers(3, 2)
    named(tmp_path, 0, hidden_states=frames)
    (features,) = scan(tmp_path, keep_features=True, layers=True).features
    np.testing.assert_array_equal(features, frames.astype(np.float64).mean(1).astype(np.float32))


def test_outliers_duplicates_and_constant_dimensions_are_found_in_layers(tmp_path):
    for k in range(12):
        layers = 1 + numbers(3, 8, seed=k)
        layers[1, 5] = 2
        named(tmp_path, k, hidden_states=layers)
    named(tmp_path, 12, hidden_states=layers)
    named(tmp_path, 13, hidden_states=1e5 * numbers(3, 8, seed=13))
    result = scan(tmp_path, keep_features=True, layers=True)
    assert result.left_out() == {"absurd-scale": 1, "duplicate-speaker": 1}
    for finding in result.findings:
        (tmp_path / finding.file).unlink()
    result = scan(tmp_path, keep_features=True, layers=True)
    assert check_data.Note("dead-dimensions", "1: 5 of layer 1") in result.notes
    statistics = result.moments.statistics()
    np.testing.assert_allclose(statistics.mean, np.mean([x.ravel() for x in result.features], 0), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, np.std([x.ravel() for x in result.features], 0), atol=1e-6)


def test_statistics_of_layers_have_a_row_for_each(tmp_path):
    folder = write_layers(tmp_path / "data", means)
    for shape in ((3, 8), (1, 3, 8), (8,), (2, 8), (3, 7)):
        np.save(folder / stats.MEAN_FILE, np.zeros(shape))
        np.save(folder / stats.STD_FILE, np.ones(shape))
        if shape[-2:] == (3, 8):
            assert scan(folder, layers=True).stored.statistics.mean.shape == (24,)
        else:
            with pytest.raises(stats.DataError, match=r"wav2vec_mean\.npy has (shape|7 values)"):
                scan(folder, layers=True)
        for options in ({}, {"layer": 1}):
            if len(shape) > 1:
                with pytest.raises(stats.DataError, match=r"wav2vec_mean\.npy has (shape|7 values)"):
                    scan(folder, **options)
            else:
                assert len(scan(folder, **options).records) == 4


def test_statistics_of_the_layers_of_another_encoder_are_refused(tmp_path):
    centre = 5 * numbers(3, 8, seed=99)
    for k in range(12):
        named(tmp_path, k, hidden_states=centre + numbers(3, 8, seed=k))
    np.save(tmp_path / stats.STD_FILE, 1 + np.abs(numbers(3, 8, seed=98)))
    np.save(tmp_path / stats.MEAN_FILE, centre)
    assert len(scan(tmp_path, layers=True).records) == 12
    np.save(tmp_path / stats.MEAN_FILE, centre[:, ::-1])
    with pytest.raises(stats.DataError, match="of another encoder than these files"):
        scan(tmp_path, layers=True)


def test_statistics_of_other_layers_are_of_other_data(tmp_path):
    folder = write_layers(tmp_path / "data", means)
    options = ({}, {"layers": True}, {"layer": 0}, {"layer": 1})
    assert len({scan(folder, **one).fingerprint for one in options}) == 4
    saved = scan(folder, layers=True)
    stats.save(folder, saved.moments.statistics(), saved.fingerprint, saved.layers)
    assert np.load(folder / stats.MEAN_FILE).shape == (3, 8)
    assert [scan(folder, **one).statistics_are_stale for one in options] == [True, False, True, True]


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.transpose(1, 0, 2), means])
def test_a_single_file_is_read_for_a_model_of_layers(tmp_path, change):
    folder = write_layers(tmp_path / "data", change)
    path = sorted(folder.iterdir())[0]
    result = check_data.Scan(path, 8, layers=3)
    size = check_data.Scale(1.0, np.ones(24))
    ((_, features),) = check_data.iter_features(check_data.ScanOptions(str(path), layers=True), result, size)
    np.testing.assert_array_equal(features, means(LAYERS[0]))
    for layers, dim, code in ((4, 8, "other-layers"), (3, 7, "other-width")):
        result = check_data.Scan(path, dim, layers=layers)
        assert not [*check_data.iter_features(check_data.ScanOptions(str(path), layers=True), result, size)]
        assert result.left_out() == {code: 1}


def test_a_single_file_whose_shape_fits_twice_is_read_like_the_training_data(tmp_path):
    array = numbers(3, 3, 8)
    options = check_data.ScanOptions(str(write(tmp_path / "x.npz", emb=array)), layer=1)
    for axis, expected in ((None, array[1].mean(0)), (0, array[1].mean(0)), (1, array[:, 1].mean(0))):
        result = check_data.Scan(tmp_path / "x.npz", 8, layer_axis=axis)
        ((_, features),) = check_data.iter_features(options, result, check_data.Scale(1.0, np.ones(8)))
        np.testing.assert_allclose(features, expected[None], rtol=1e-6)


def test_layers_cannot_be_chosen_twice_nor_transposed():
    for options, reason in (
        ({"layers": True, "layer": 0}, "either --layers or --layer"),
        ({"layers": True, "transpose": True}, "--transpose is for sequences"),
        ({"layer": -1, "transpose": True}, "--transpose is for sequences"),
    ):
        with pytest.raises(check_data.UsageError, match=reason):
            check_data.ScanOptions("DIR", **options)


def test_the_check_of_layers_ends_with_the_command_that_trains_on_them(tmp_path, capsys):
    for k in range(12):
        layers = numbers(3, 8, seed=k)
        write(tmp_path / f"ravdess_03-01-{3 + k % 2:02d}-01-01-01-{k // 2 + 1:02d}.npz", hidden_states=layers)
    for options, features in (
        (["--layers"], "12 utterances of 3 layers of 8"),
        (["--layer=-1"], "12 vectors, width 8, layer -1 of 3"),
    ):
        assert check_data.main([str(tmp_path), *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"  features     {features}" in lines
        assert lines[-1] == f"  ready        python train.py {options[0]} {tmp_path}"
        assert "equal-length" not in " ".join(lines)


# --- labels given by the user ---


def test_pattern_labels_files(tmp_path):
    for k, name in enumerate(["anna-Joy-1", "anna-whisper-2", "bert-joy-1", "odd"]):
        write(tmp_path / f"{name}.npz", emb=numbers(8, seed=k))
    result = scan(tmp_path, pattern=r"(?P<speaker>\w+)-(?P<emotion>\w+)-\d")
    assert [(r.utterance.emotion, r.utterance.speaker) for r in result.records] == [
        ("happy", "own:anna"),
        ("whisper", "own:anna"),
        ("happy", "own:bert"),
    ]
    assert result.left_out() == {"unknown-name": 1}


def test_pattern_may_match_the_folders(tmp_path):
    (tmp_path / "anna").mkdir()
    write(tmp_path / "anna" / "sad1.npz")
    (record,) = scan(tmp_path, pattern=r"(?P<speaker>\w+)/(?P<emotion>[a-z]+)\d").records
    assert (record.utterance.speaker, record.utterance.emotion) == ("own:anna", "sad")


@pytest.mark.parametrize(
    ("pattern", "message"), [("(", "not a valid regular expression"), (r"(?P<mood>\w+)", "needs a group")]
)
def test_invalid_patterns_are_rejected(sample, pattern, message):
    with pytest.raises(check_data.UsageError, match=message):
        scan(sample, pattern=pattern)


def test_table_labels_files(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for k in range(4):
        write(data / f"{k}.npz", emb=numbers(8, seed=k))
    table = tmp_path / "labels.csv"
    table.write_text("file,emotion,speaker\n0.wav,Anger,x\n1.npz,sad,\n2,calm,y\n")
    result = scan(data, labels=str(table))
    assert [(r.utterance.emotion, r.utterance.speaker) for r in result.records] == [
        ("angry", "own:x"),
        ("sad", None),
        ("calm", "own:y"),
    ]
    assert result.left_out() == {"not-in-table": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "needs a header line"),
        ("FileName,EmoClass\na,sad\n", "needs a header line with the columns .*; found: FileName, EmoClass"),
        ("name,emotion\na,sad\n", "no line matches a file: the table has 'a', the folder 'cremad_1001"),
        ("file,emotion\na,sad\n".encode("utf-16"), "cannot be read: it is UTF-16; save it as UTF-8"),
        ("file,emotion\na,sad\na.npz,happy\n", "two different lines for a"),
        (b"file,emotion\n\xff,sad\n", "cannot be read"),
    ],
)
def test_invalid_tables_are_rejected(sample, tmp_path, text, message):
    table = tmp_path / "labels.csv"
    if text is not None:
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(check_data.UsageError, match=message):
        scan(sample, labels=str(table))


def tabled(folder, files, text, **options):
    """A scan of these files with this table."""
    for number, file in enumerate(files):
        path = folder / "data" / f"{file}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, emb=numbers(8, seed=number))
    (folder / "labels.csv").write_text(text)
    return scan(folder / "data", labels=str(folder / "labels.csv"), **options)


def labels_of(result):
    return {record.file.removesuffix(".npz"): record.utterance.emotion for record in result.records}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("columns", ["file emotion", "path label", "FileName Label", "name emotion"])
def test_the_usual_separators_and_column_names_are_understood(tmp_path, separator, columns):
    text = "\n".join(separator.join(line.split()) for line in (columns, "a.wav sad", "b joy"))
    assert labels_of(tabled(tmp_path, ["a", "b"], text)) == {"a": "sad", "b": "happy"}


def test_paths_of_other_machines_are_matched_by_their_ending(tmp_path):
    text = (
        "file,emotion\n/kaggle/input/audio/a.wav,sad\nC:\\data\\train\\b.wav,happy\n/x/test/b.wav,fear\n/x/c.wav,calm\n"
    )
    result = tabled(tmp_path, ["a", "train/b", "test/b", "deep/er/c"], text)
    assert labels_of(result) == {"a": "sad", "train/b": "happy", "test/b": "fear", "deep/er/c": "calm"}


@pytest.mark.parametrize(
    ("files", "lines", "labelled", "reason"),
    [
        (["train/a", "dev/a", "train/b"], "a,sad\nb,sad", ["train/b"], "line a of .* fits both this file and train/a"),
        (["train/a", "dev/a"], "train/a,sad", ["train/a"], "line train/a of .* belongs to another split"),
        (
            ["dev/a", "b"],
            "/x/train_splits/a,sad\nb,sad",
            ["b"],
            "line /x/train_splits/a of .* belongs to ano",
        ),
        (["a", "sub/a"], "a,sad", ["a"], "line a of .* fits both this file and a"),
        (["a", "b"], "x/a,sad\ny/a,happy\nb,sad", ["b"], "fits the lines x/a and y/a"),
        (["a", "b"], "a,xxx\nb,sad", ["b"], "has 'xxx' as emotion in"),
        (["a", "b"], "a,\nb,sad", ["b"], "has no emotion in"),
    ],
)
def test_a_line_that_is_not_certainly_of_a_file_never_labels_it(tmp_path, files, lines, labelled, reason):
    result = tabled(tmp_path, files, f"file,emotion\n{lines}\n")
    assert list(labels_of(result)) == labelled
    assert result.left_out() == {"not-in-table": len(files) - len(labelled)}
    assert re.search(reason, result.findings[0].reason)


def test_composed_and_decomposed_letters_are_the_same(tmp_path):
    result = tabled(tmp_path, ["Ang\u00e8le", "Ma\u0308rz"], "file,emotion\nAnge\u0300le,sad\nM\u00e4rz,calm\n")
    assert list(labels_of(result).values()) == ["sad", "calm"]


def test_the_split_of_a_table_reaches_the_utterances_and_is_checked(tmp_path):
    files = [f"x{number:02d}" for number in range(12)]
    lines = [f"{file},{'sad' if n % 2 else 'calm'},s{n},{'test' if n > 8 else 'train'}" for n, file in enumerate(files)]
    text = "\n".join(["file,emotion,speaker,split", *lines])
    result = tabled(tmp_path, files, text, folds="table")
    assert result.records[-1].utterance.split == "test"
    assert check_data.blockers(result) == []
    result = tabled(tmp_path, files, text.replace("test", "later"), folds="table")
    assert check_data.blockers(result)[0].endswith("found: 'later'")
    with pytest.raises(check_data.UsageError, match="--folds table needs --labels FILE"):
        check_data.ScanOptions("D", folds="table")


def test_absurd_fold_numbers_in_a_table_are_named(tmp_path):
    files = [f"x{number:02d}" for number in range(12)]
    lines = [f"{file},{'sad' if n % 2 else 'calm'},s{n},{'1' * 400 if n else 2}" for n, file in enumerate(files)]
    result = tabled(tmp_path, files, "\n".join(["file,emotion,speaker,fold", *lines]), folds="table")
    assert "--folds table needs train, validation and test, or numbers" in check_data.blockers(result)[0]


def test_an_unknown_word_in_a_folder_name_is_named(tmp_path):
    (tmp_path / "Wut").mkdir()
    write(tmp_path / "Wut" / "rec.npz")
    (finding,) = scan(tmp_path).findings
    assert finding.reason.endswith("and its folder 'Wut' is not named like a known emotion")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": ("calm=nuetral",)}, "--merge: 'nuetral' is not a known emotion; did you mean neutral?"),
        ({"merge": ("clam=neutral",)}, "no file has the emotion clam; .*; did you mean calm?"),
        ({"classes": "hapy,sad"}, "no file has the emotion hapy; .*; did you mean happy?"),
        ({"corpus": "ravdes"}, "--corpus must be one of .*; did you mean ravdess?"),
        ({"folds": "emobox-ravdes"}, "not a fold scheme; .*; did you mean emobox-ravdess?"),
        ({"folds": "loso"}, "not a fold scheme; .*; did you mean leave-one-speaker-out?"),
    ],
)
def test_a_close_match_is_suggested(sample, options, message):
    with pytest.raises(check_data.UsageError, match=message.replace("?", r"\?")):
        scan(sample, **options)


def test_a_misspelt_emotion_is_found_before_any_file_is_read(sample):
    with pytest.raises(check_data.UsageError, match="did you mean happy"):
        check_data.scan(check_data.ScanOptions(str(sample), classes="hapy"), progress=pytest.fail)


def test_merge_may_make_a_new_class_and_it_is_noted(sample):
    result = scan(sample, merge=("calm=positive", "happy=positive"))
    assert check_data.Note("new-class", "positive") in result.notes
    assert result.count("emotion")["positive"] == 24


def test_merge_and_classes_are_applied(sample):
    assert scan(sample, merge=("calm=neutral", "joy=anger")).count("emotion")["neutral"] == 24
    assert "happy" not in scan(sample, merge=("joy=anger",)).count("emotion")
    chosen = scan(sample, classes="Happiness, sad")
    assert chosen.count("emotion") == {"happy": 16, "sad": 16}
    assert (chosen.n_excluded, chosen.findings, check_data.exit_status(chosen)) == (80, [], 0)


@pytest.mark.parametrize("options", [{"merge": ("calm",)}, {"corpus": "nowhere"}, {"dim": 0}, {"directory": ""}])
def test_invalid_scan_options_are_rejected(options):
    with pytest.raises(check_data.UsageError):
        check_data.ScanOptions(**{"directory": "D", **options})


@pytest.mark.parametrize("options", [{"merge": ("clam=neutral",)}, {"classes": "hapy,sad"}])
def test_merge_and_classes_reject_an_emotion_that_no_file_has(sample, options):
    with pytest.raises(check_data.UsageError, match=r"no file has the emotion (clam|hapy); found: angry, calm"):
        scan(sample, **options)


@pytest.mark.parametrize("entry", ["calm", "calm=", "=calm", "a=b=c", "a,b=c"])
def test_merge_requires_exactly_two_words(entry):
    with pytest.raises(check_data.UsageError, match="--merge must be of the form calm=neutral"):
        check_data.ScanOptions("D", merge=(entry,))


def test_ambiguous_names_require_the_corpus_or_evidence(tmp_path):
    for actor in range(1, 4):
        write(tmp_path / f"03-01-05-01-02-01-0{actor}.npz", emb=numbers(8, seed=actor))
    assert scan(tmp_path).left_out() == {"ambiguous-name": 3}
    assert scan(tmp_path, corpus="banglaser").count("emotion") == {"neutral": 3}
    write(tmp_path / "03-01-06-01-02-01-01.npz", emb=numbers(8, seed=9))
    assert scan(tmp_path).count("emotion") == {"angry": 3, "fear": 1}


# --- duplicates, outliers and notes ---


def codes_of_notes(result):
    return {note.code for note in result.notes}


def test_a_good_data_set_has_no_notes(tmp_path):
    assert scan(write_sample(tmp_path / "data", actors=8)).notes == []


def test_nan_is_replaced_by_zero_on_request(sample):
    path = sample / scan(sample).records[0].file
    array = read_features(path).array
    array[3] = np.nan
    np.savez(path, emb=array)
    assert scan(sample).left_out() == {"not-finite": 1}
    result = scan(sample, nan_to_zero=True, keep_features=True)
    assert result.features[0][0, 3] == 0
    assert np.isfinite(result.features[0]).all()


def test_duplicates_with_the_same_label_and_speaker_are_noted(sample):
    utterances = [record.utterance for record in scan(sample).records]
    one = utterances[0]
    (twin,) = [u for u in utterances if u.speaker == one.speaker and u.emotion == one.emotion and u != one]
    shutil.copy(sample / one.file, sample / twin.file)
    result = scan(sample)
    assert "duplicate" in codes_of_notes(result)
    assert result.findings == []


def test_duplicates_with_different_labels_are_all_left_out(sample):
    one, other = scan(sample, classes="happy,sad").records[0], scan(sample, classes="sad").records[0]
    shutil.copy(sample / one.file, sample / other.file)
    result = scan(sample)
    assert {(finding.file, finding.code) for finding in result.findings} == {
        (one.file, "duplicate-conflict"),
        (other.file, "duplicate-conflict"),
    }


def test_a_third_copy_does_not_resolve_a_label_conflict(sample):
    one, two = scan(sample, classes="happy").records[:2]
    other = scan(sample, classes="sad").records[0]
    for copy in (two, other):
        shutil.copy(sample / one.file, sample / copy.file)
    assert scan(sample).left_out() == {"duplicate-conflict": 3}


def test_duplicates_with_nan_are_found(sample):
    one, other = scan(sample, classes="happy").records[0], scan(sample, classes="sad").records[0]
    array = read_features(sample / one.file).array
    array[2] = np.nan
    for copy in (one, other):
        np.savez(sample / copy.file, emb=array)
    assert scan(sample, nan_to_zero=True).left_out() == {"duplicate-conflict": 2}


def test_duplicates_by_unknown_speakers_are_left_out_but_one(tmp_path):
    (tmp_path / "sad").mkdir()
    for name in "abc":
        write(tmp_path / "sad" / f"{name}.npz")
    result = scan(tmp_path)
    assert (len(result.records), result.left_out()) == (1, {"duplicate-speaker": 2})


def test_duplicates_by_two_speakers_are_left_out_but_one(sample):
    records = scan(sample, classes="happy").records
    one = records[0]
    other = next(record for record in records if record.utterance.speaker != one.utterance.speaker)
    shutil.copy(sample / one.file, sample / other.file)
    assert scan(sample).left_out() == {"duplicate-speaker": 1}


def test_a_file_that_is_removed_during_the_scan_is_named(tmp_path):
    for k in range(2):
        named(tmp_path, k)

    def remove(n_read, n_files):
        if n_read == n_files:
            (tmp_path / "ravdess_03-01-05-01-01-01-02.npz").unlink()

    with pytest.raises(check_data.UsageError, match=r"01-02.npz: was changed during the scan: .*; start again"):
        check_data.scan(check_data.ScanOptions(str(tmp_path)), progress=remove)


def test_absurd_scales_are_left_out_and_large_norms_noted(sample):
    records = scan(sample).records
    for record, factor in ((records[0], 1e30), (records[1], 1e-9), (records[2], 20)):
        np.savez(sample / record.file, emb=read_features(sample / record.file).array * np.float32(factor))
    result = scan(sample)
    assert {finding.file for finding in result.findings} == {records[0].file, records[1].file}
    assert result.left_out() == {"absurd-scale": 2}
    (note,) = [note for note in result.notes if note.code == "norm-outlier"]
    assert records[2].file in note.text


def test_a_few_huge_dimensions_make_no_outlier(tmp_path):
    for k in range(12):
        vector = numbers(40, seed=k)
        vector[:2] = 1e13 if k == 5 else 1e9
        named(tmp_path, k, emb=vector * np.float32(1e-9 if k == 7 else 1))
    assert [finding.file[-6:] for finding in scan(tmp_path).findings] == ["08.npz"]
    scale = check_data.Scale(1e8, np.abs(numbers(40)) + 0.1)
    vector = numbers(40)
    vector[:2] = 1e13
    assert scale.fault(vector[None], 1e12) is None
    assert scale.fault(vector[None] * 1e4, 1e16)[0] == "absurd-scale"


def test_statistics_of_another_encoder_are_refused(tmp_path):
    centre = 5 * numbers(40, seed=99)
    for k in range(12):
        named(tmp_path, k, emb=centre + numbers(40, seed=k))
    deviation = 1 + np.abs(numbers(40, seed=98))
    np.save(tmp_path / stats.STD_FILE, deviation)
    for mean, fits in ((centre + 1, True), (np.zeros(40), True), (centre[::-1], False)):
        np.save(tmp_path / stats.MEAN_FILE, mean[None])  # also with a leading axis
        if fits:
            assert len(scan(tmp_path).records) == 12
        else:
            with pytest.raises(stats.DataError, match="of another encoder than these files"):
                scan(tmp_path)


def test_statistics_of_normalised_features_are_never_of_another_encoder(tmp_path):
    for k in range(12):
        named(tmp_path, k, emb=numbers(40, seed=k))
    np.save(tmp_path / stats.MEAN_FILE, 0.1 * numbers(40, seed=97))
    np.save(tmp_path / stats.STD_FILE, 1 + np.abs(numbers(40, seed=98)))
    assert len(scan(tmp_path).records) == 12
    np.save(tmp_path / stats.STD_FILE, 1000 + np.abs(numbers(40, seed=98)))  # their scale does not fit
    with pytest.raises(stats.DataError, match="times that of the features"):
        scan(tmp_path)


def test_a_failing_device_is_no_matter_of_rights(tmp_path, monkeypatch):
    named(tmp_path, 0)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "read", fail)
    result = scan(tmp_path)
    assert result.left_out() == {"io-error": 1}
    assert "permission" not in check_data.REMEDIES["io-error"]


def test_twins_song_damage_and_unknown_speakers_are_noted(tmp_path):
    names = [
        "ravdess_01-01-06-01-02-01-01",  # with video
        "ravdess_03-01-06-01-02-01-01",  # the same recording without video
        "ravdess_03-02-06-01-02-01-01",  # sung
        "cremad_1076_MTI_SAD_XX",  # silent
        "su15",  # no speaker
    ]
    for k, name in enumerate(names):
        write(tmp_path / f"{name}.npz", emb=numbers(8, seed=k))
    notes = {note.code: note.text for note in scan(tmp_path).notes}
    assert notes["twins"] == "1: ravdess_01-01-06-01-02-01-01.npz = ravdess_03-01-06-01-02-01-01.npz"
    assert "03-02-06" in notes["song"]
    assert "silent" in notes["known-damaged"]
    assert notes["no-speaker"] == "savee 1"
    assert {"few-speakers", "few-utterances"} <= notes.keys()


def test_merged_emotions_make_no_twins(tmp_path):
    for k, emotion in enumerate(("01", "02", "06")):
        for modality in ("01", "03"):
            write(tmp_path / f"{modality}-01-{emotion}-01-01-01-01.npz", emb=numbers(8, seed=k + 10 * int(modality)))
    (twins,) = [note.text for note in scan(tmp_path, merge=("calm=neutral",)).notes if note.code == "twins"]
    assert twins.startswith("3: 01-01-01-01-01-01-01.npz = 03-01-01-01-01-01-01.npz, ")
    for path in tmp_path.glob("01-*"):
        path.unlink()
    assert "twins" not in codes_of_notes(scan(tmp_path, merge=("calm=neutral",)))


def with_versions(folder, tails):
    """Two recordings of each of ten actors, with these tails."""
    names = [
        f"03-01-{emotion}-01-01-01-{actor:02d}{tail}"
        for emotion in ("06", "08")
        for actor in range(1, 11)
        for tail in tails
    ]
    for number, name in enumerate(names):
        write(folder / f"{name}.npz", emb=numbers(8, seed=number))
    return folder


def test_versions_and_tails_are_counted_in_notes(tmp_path):
    result = scan(with_versions(tmp_path, ["_hubert", "_hubert_noise", "_hubert_pitch"]))
    notes = {note.code: note.text for note in result.notes}
    assert notes["versions"] == "40 files of 60 (noise 20, pitch 20)"
    assert notes["tails"] == "hubert 20"
    assert result.count("speaker") == {f"ravdess:{actor:02d}": 6 for actor in range(1, 11)}


def test_versions_are_left_out_on_request(tmp_path):
    with_versions(tmp_path, ["", "_noise"])
    result = scan(tmp_path, no_versions=True)
    assert (len(result.records), result.n_versions, result.n_files, result.findings) == (20, 20, 40, [])
    assert "20 usable, 0 left out, 20 by --no-versions" in "\n".join(check_data.summary(result))


def test_a_version_counts_where_its_original_cannot_be_used(tmp_path):
    with_versions(tmp_path, ["", "_noise"])
    (tmp_path / "03-01-06-01-01-01-01.npz").write_bytes(b"")
    result = scan(tmp_path)
    assert [r.file for r in result.records if r.utterance.speaker == "ravdess:01" and not r.utterance.version] == [
        "03-01-06-01-01-01-01_noise.npz",
        "03-01-08-01-01-01-01.npz",
    ]


@pytest.mark.parametrize("tail", [" (1)", " - Copy", " - Copy (2)", "_copy", "(1)"])
@pytest.mark.parametrize("original", ["03-01-06-01-01-01-01", "fear/rec1"])
def test_a_copy_is_named_as_a_copy_of_its_original(tmp_path, original, tail):
    (tmp_path / "fear").mkdir()
    for name in (original, original + tail):
        write(tmp_path / f"{name}.npz")
    result = scan(tmp_path)
    assert result.findings == [
        check_data.Finding(
            f"{original}{tail}.npz", "copy", f"has the same features as {original}.npz, of the same recording"
        )
    ]


def test_files_of_one_recording_without_a_speaker_are_noted(tmp_path):
    (tmp_path / "sad").mkdir()
    for number in range(12):
        write(tmp_path / "sad" / f"call{number // 4}_seg{number % 4}.npz", emb=numbers(8, seed=number))
    assert check_data.Note("same-recording", "12 files of 3 recordings") in scan(tmp_path).notes


def test_other_arrays_are_noted(tmp_path):
    for k in range(3):
        named(tmp_path, k, emb=numbers(8, seed=k), label=np.eye(8)[4])
    assert check_data.Note("other-arrays", "label 3") in scan(tmp_path).notes


def test_video_without_sound_is_left_out(tmp_path):
    write(tmp_path / "ravdess_02-01-06-01-02-01-01.npz")
    assert scan(tmp_path).left_out() == {"video-only": 1}


def test_dead_dimensions_and_normalised_features_are_noted(sample):
    records = scan(sample).records
    block = np.stack([read_features(sample / record.file).array for record in records])
    block = (block - block.mean(0)) / block.std(0)
    block[:, 5] = 0.25
    for record, array in zip(records, block):
        np.savez(sample / record.file, emb=array)
    notes = {note.code: note.text for note in scan(sample).notes}
    assert notes["dead-dimensions"] == "1: 5"
    assert "already-normalised" in notes


def test_class_imbalance_is_noted(sample):
    for record in scan(sample, classes="happy").records[2:]:
        (sample / record.file).unlink()
    notes = {note.code: note.text for note in scan(sample).notes}
    assert "happy 2" in notes["imbalance"]
    assert "happy 2" in notes["few-utterances"]
    assert notes["few-speakers"] == "happy 1, calm 4, surprise 4"


# --- the command line ---


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "check_data.py", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_a_good_folder_exits_0_with_a_summary(sample):
    done = run(sample)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("112 NPZ files, 112 usable", "ravdess 64", "cremad 48", "happy 16", "8, 12 to 16", "width 24"):
        assert text in done.stdout
    assert "none here; train.py will compute and save them" in done.stdout
    assert f"python train.py {sample}" in done.stdout


def test_a_folder_with_findings_exits_1_and_lists_them_sorted(sample):
    for number in range(25):
        (sample / f"z{number:02d}.npz").write_bytes(b"")
    (sample / "03-01-05-01-02-01-20.npz").write_bytes(b"")
    done = run(sample)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[0].startswith("03-01-05-01-02-01-20.npz: empty has no bytes; extract")
    assert sum("unknown-name" in line for line in lines) == 21
    assert "... and 5 more unknown-name (--all)" in lines
    assert "112 usable, 26 left out" in done.stdout
    assert sum("unknown-name" in line for line in run("--all", sample).stdout.splitlines()) == 25


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.write_text(""), "is a file"),
        (lambda path: path.mkdir(), "the folder is empty"),
        (lambda path: (path.mkdir(), (path / ".x.npz").write_text("")), "only hidden or temporary files"),
        (lambda path: (path.mkdir(), (path / "a.wav").write_text("")), "found 1 .wav: extract embeddings first"),
    ],
)
def test_a_folder_without_npz_files_exits_2_and_lists_what_is_there(tmp_path, make, message):
    make(tmp_path / "data")
    done = run(tmp_path / "data")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_usual_feature_folders_are_suggested(tmp_path):
    (tmp_path / "models" / "wav2vec").mkdir(parents=True)
    write(tmp_path / "models" / "wav2vec" / "x.npz")
    assert "models/wav2vec" in run(tmp_path / "data").stderr
    (tmp_path / "data").mkdir()
    assert "models/wav2vec" in run(tmp_path / "data").stderr


def test_json_report_has_the_same_content(sample):
    (sample / "broken.npz").write_bytes(b"")
    done = run(sample, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_status"] == 1
    assert (report["files"], report["usable"], report["left_out"]) == (113, 112, {"unknown-name": 1})
    assert report["findings"][0]["remedy"] == check_data.REMEDIES["unknown-name"]
    assert report["emotion"]["happy"] == 16
    assert report["speaker"]["ravdess:01"] == 16


def test_a_closed_pipe_is_not_an_error(sample):
    done = subprocess.run(
        f"'{sys.executable}' '{ROOT / 'check_data.py'}' '{sample}' --json | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() in ("141", "0")
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_gives_a_one_line_error(sample):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "check_data.py", sample],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "cannot write the output: No space left on device\n"


@pytest.mark.parametrize("name", ["a" * 300, "with\nline"])
def test_an_invalid_folder_gives_a_one_line_error(name, tmp_path):
    done = run(tmp_path / name)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_an_emotion_in_a_table_cannot_forge_a_line(tmp_path):
    write(tmp_path / "x.npz")
    table = tmp_path / "labels.csv"
    table.write_text('file,emotion,speaker\nx,"sad\n  ready        python evil",y\n')
    done = run(tmp_path, "--labels", table)
    assert not [line for line in done.stdout.splitlines() if line.startswith("  ready")]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_output_works_in_any_terminal_encoding(tmp_path, encoding):
    data = tmp_path / "gef\u00fchl"
    data.mkdir()
    write(data / "\u60b2\u3057\u3044.npz")
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, ROOT / "check_data.py", data], env=environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, b"")
    assert b"unknown-name" in done.stdout


def test_a_single_emotion_is_not_ready(tmp_path):
    for k in range(12):
        named(tmp_path, k, emb=numbers(8, seed=k))
    done = run(tmp_path)
    assert done.returncode == 1
    assert "NOT READY    all files have the same emotion (angry)" in done.stdout


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, []),
        ({"merge": ("calm=neutral",), "classes": "neutral,sad"}, ["--merge=calm=neutral", "--classes=neutral,sad"]),
        ({"folds": "leave-one-speaker-out", "transpose": True}, ["--transpose", "--folds=leave-one-speaker-out"]),
    ],
)
def test_the_ready_line_is_the_command_with_all_options(tmp_path, options, arguments):
    folder = write_sample(tmp_path / "it's a folder", actors=5)
    (*_, line) = check_data._verdict(scan(folder, **options))
    assert shlex.split(line)[1:] == ["python", "train.py", *arguments, str(folder)]


def test_a_folder_with_a_leading_dash_is_in_the_command_behind_two_more():
    assert check_data.command_line(check_data.ScanOptions("-d")) == "python train.py -- -d"


@pytest.mark.parametrize(
    ("folds", "found"),
    [
        ("emobox-ravdess", "does not cover speaker cremad:1001"),
        ("emosuperb-cremad", "does not cover speaker ravdess:01"),
        ("2", ""),
    ],
)
def test_what_training_would_refuse_about_the_split_is_found(sample, folds, found):
    reasons = check_data.blockers(scan(sample, folds=folds))
    assert bool(reasons) == bool(found)
    assert all(found in reason for reason in reasons)


def test_fewer_speakers_than_folds_are_in_the_verdict(sample):
    assert "  split        --folds 50 was reduced to 8: there are 8 speakers" in check_data._verdict(
        scan(sample, folds="50")
    )


def test_jax_is_never_imported(sample):
    code = "import sys; sys.modules['jax'] = None; import check_data; sys.exit(check_data.main([sys.argv[1]]))"
    done = subprocess.run([sys.executable, "-c", code, sample], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_code_is_used_and_tested():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    source = "".join((ROOT / name).read_text() for name in ("check_data.py", "stats.py", "train.py"))
    for code in (*check_data.REMEDIES, *check_data.NOTES, "bad-statistics"):
        assert source.count(f'"{code}"') > 1  # once in the table of remedies or notes
        assert f'"{code}"' in tests


# --- links, copies, and what nobody has by chance ---


def test_a_folder_that_a_link_leads_to_as_well_keeps_its_own_name(tmp_path):
    for folder in ("m", "z"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "ravdess_03-01-05-01-02-01-12.npz", emb=numbers(8, seed=ord(folder)))
    for link, folder in (("a", "m"), ("b", "m"), ("zz", "z")):
        (tmp_path / link).symlink_to(tmp_path / folder)
    (tmp_path / "m" / "up").symlink_to(tmp_path)
    result = scan(tmp_path)
    assert [record.file for record in result.records] == [
        f"{folder}/ravdess_03-01-05-01-02-01-12.npz" for folder in "mz"
    ]


def test_linked_folders_are_read_in_sorted_order(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    other.mkdir()
    write(other / "ravdess_03-01-05-01-02-01-12.npz")
    for link in ("c", "a", "b"):
        (data / link).symlink_to(other)
    assert [record.file for record in scan(data).records] == ["a/ravdess_03-01-05-01-02-01-12.npz"]


@pytest.mark.parametrize(
    "stored",
    [
        lambda array: array.astype(np.float64),
        lambda array: array.astype(">f4"),
        lambda array: np.asfortranarray(array),
        lambda array: array[None],
        lambda array: array.reshape(-1),
    ],
)
def test_the_same_numbers_are_duplicates_in_any_type_order_and_shape(tmp_path, stored):
    array = numbers(3, 8, seed=1).astype(np.float16).astype(np.float32)
    for k in range(2, 6):
        named(tmp_path, k, emb=numbers(3, 8, seed=k))
    named(tmp_path, 0, emb=array)
    named(tmp_path, 1, emb=stored(array))
    assert scan(tmp_path).left_out() == {"duplicate-speaker": 1}


def test_a_sequence_read_backwards_is_no_duplicate_and_hides_none(tmp_path):
    array = numbers(3, 8, seed=1)
    for k, stored in enumerate([array, array[::-1], array[::-1].astype(np.float64), numbers(3, 8, seed=2)]):
        named(tmp_path, k, emb=stored)
    (finding,) = scan(tmp_path).findings
    assert (finding.code, finding.file[-6:]) == ("duplicate-speaker", "03.npz")
    assert "02.npz" in finding.reason


def test_a_zip_with_two_arrays_of_one_name_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for name in ("emb.npy", "emb.npy"):
            archive.writestr(name, stats.npy_bytes(numbers(8)))
    with pytest.raises(stats.DataError) as error:
        read_features(path)
    assert error.value.code == "bad-zip"


def test_merges_are_followed_and_a_circle_is_refused(sample):
    options = check_data.ScanOptions(str(sample), merge=("calm=neutral", "neutral=other", "fear=other"))
    counts = check_data.scan(options).count("emotion")
    assert "calm" not in counts and "neutral" not in counts and "fear" not in counts
    assert counts["other"] == 40
    for circle in (("calm=neutral", "neutral=calm"), ("calm=calm",)):
        with pytest.raises(check_data.UsageError, match="--merge goes in a circle"):
            scan(sample, merge=circle)


def test_more_than_100_emotions_are_questioned(tmp_path):
    for k in range(101):
        write(tmp_path / f"s{k % 7}-e{k}x.npz", emb=numbers(8, seed=k))
    (blocker,) = check_data.blockers(scan(tmp_path, pattern=r"(?P<speaker>s\d)-(?P<emotion>\w+)"))
    assert blocker.startswith("101 emotions") and "is the label an id" in blocker


@pytest.mark.parametrize(
    "header",
    [
        "{{'descr': '<f4', 'fortran_order': False, 'shape': ({},)}}".format(", ".join(["1"] * 71)),
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {10**400})}}",
        "{{'descr': '<f4', 'fortran_order': False, 'shape': ({})}}".format(", ".join([f"{10**4000}"] * 2)),
        "{{'descr': '<f4', 'fortran_order': False, 'shape': ({})}}".format(", ".join([f"{2**62}"] * 32)),
        "{{'descr': '{}', 'fortran_order': False, 'shape': (1,)}}".format(", ".join(["f4"] * 500)),
        "{'descr': '(3,)f4', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', '<f4'), ('%s', '<f4')], 'fortran_order': False, 'shape': (1,)}" % ("b" * 3000),
        "{'descr': 'O, O', 'fortran_order': False, 'shape': (1,)}",
    ],
)
def test_absurd_headers_are_one_short_line(header):
    text = header.encode()
    with pytest.raises(stats.DataError) as error:
        stats.npy_array(b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + bytes(4))
    assert len(error.value.reason) < 200


@pytest.mark.parametrize("pattern", ["a{99999999999999999999}(?P<emotion>x)", "(" * 5000])
def test_absurd_patterns_are_refused(sample, pattern):
    with pytest.raises(check_data.UsageError, match="not a valid regular expression"):
        scan(sample, pattern=pattern)


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize("program", ["check_data.py", "train.py"])
def test_ctrl_c_while_a_program_is_imported_prints_no_traceback(tmp_path, program):
    (tmp_path / "numpy.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / program), "DIR"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the tests themselves may run under nohup
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")

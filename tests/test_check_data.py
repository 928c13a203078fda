import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
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


def scan(folder, keep_features=False, **options):
    return check_data.scan(check_data.ScanOptions(str(folder), **options), keep_features=keep_features)


def stream(folder, dim=12, cuts_vectors=False, **options):
    """What a model that wants features this wide gets from a folder, and the codes of what it does not get."""
    result = check_data.Scan(Path(folder), dim, cuts_vectors=cuts_vectors)
    read = list(check_data.stream(check_data.ScanOptions(str(folder), **options), result, 1.0))
    return read, {finding.file: finding.code for finding in result.findings}


def write(path, **arrays):
    np.savez(path, **arrays or {"emb": GOOD})
    return path


def code_of(path):
    with pytest.raises(stats.DataError) as error:
        read_features(path)
    return error.value.code


def zip_of(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, blob in members.items():
            archive.writestr(name, blob)
    return path


# --- which array ---


@pytest.mark.parametrize(
    ("arrays", "key"),
    [
        (("other", "emb", "embedding"), "emb"),
        (("wav2vec", "features", "embedding"), "embedding"),
        (("wav2vec", "features"), "features"),
        (("other", "wav2vec"), "wav2vec"),
        (("layer6", "layer12"), "layer6"),
    ],
)
def test_the_key_is_chosen_in_the_documented_order(tmp_path, arrays, key):
    path = write(tmp_path / "x.npz", **{name: GOOD * (place + 1) for place, name in enumerate(arrays)})
    features = read_features(path)
    assert features.key == key
    np.testing.assert_array_equal(features.array, GOOD * (arrays.index(key) + 1))


def test_the_other_members_of_the_file_are_left_alone(tmp_path):
    """The form of the files that this project was born from, also with the label first."""
    frames = np.arange(24.0).reshape(6, 4).astype(np.float32)
    others = {"label": np.eye(8)[2], "emotion": np.array("happy"), "emotion_class": np.array(2)}
    for arrays in ({"wav2vec_features": frames, **others}, {**others, "wav2vec_features": frames}):
        features = read_features(write(tmp_path / "x.npz", **arrays))
        assert features.key == "wav2vec_features"
        np.testing.assert_array_equal(features.array, frames)


def test_a_damaged_header_does_not_hand_over_to_another_member(tmp_path):
    """Found by the fuzzer: '<f4' with one bit turned is '4f4', which is no float, and so the label came next."""
    path = tmp_path / "x.npz"
    np.savez(path, label=np.eye(8)[1], wav2vec_features=numbers(3, 4), more=numbers(3, 4))
    blob = path.read_bytes()
    for wrong in (b"4f4", b"<i4", b"<f0", b"|O4"):
        path.write_bytes(blob.replace(b"<f4", wrong, 1))
        assert code_of(path) == "bad-crc"


def test_a_file_of_labels_only_holds_no_features(tmp_path):
    assert code_of(write(tmp_path / "x.npz", label=np.eye(8)[1], emotion=np.array("sad"))) == "no-array"


def test_a_pickled_member_beside_the_features_is_left_alone(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, emb=GOOD, meta=np.array([{"a": 1}], object))
    np.testing.assert_array_equal(read_features(path).array, GOOD)


# --- forms of the array ---


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
def test_every_form_of_one_array_reads_the_same(tmp_path, change, save):
    frames = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    save(tmp_path / "x.npz", emb=change(frames))
    array = read_features(tmp_path / "x.npz").array
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, frames)


def test_every_form_of_a_set_gives_the_very_same_statistics(tmp_path):
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
def test_archives_of_other_writers_are_read(tmp_path, zip_writer):
    path, blob = tmp_path / "x.npz", stats.npy_bytes(GOOD)
    if zip_writer == "zipfile":
        zip_of(path, {"emb.npy": blob})
    else:  # sizes and CRC follow the data, as where the output cannot seek

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
def test_an_array_that_cannot_be_used_has_a_code(tmp_path, array, code):
    assert code_of(write(tmp_path / "x.npz", emb=array)) == code


def test_the_count_and_the_first_place_of_nan_are_told(tmp_path):
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
    ],
)
def test_what_is_no_archive_is_named(tmp_path, blob, code):
    path = tmp_path / "x.npz"
    path.write_bytes(blob)
    assert code_of(path) == code


def with_flag(blob, flag):
    """Set a general purpose flag in the only member's header and in the directory."""
    damaged = bytearray(blob)
    damaged[6] |= flag
    damaged[blob.find(b"PK\x01\x02") + 8] |= flag
    return bytes(damaged)


def with_gap(blob):
    """Four bytes that belong to nothing, between the member and the directory, which says where it is."""
    place = blob.find(b"PK\x01\x02")
    damaged = bytearray(blob[:place] + b"free" + blob[place:])
    struct.pack_into("<L", damaged, len(damaged) - 6, place + 4)
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
def test_damage_of_the_archive_has_its_code(tmp_path, damage, code):
    path = write(tmp_path / "x.npz")
    path.write_bytes(damage(path.read_bytes()))
    assert code_of(path) == code


def test_a_file_or_an_array_beyond_reason_is_not_even_read(tmp_path):
    path = tmp_path / "x.npz"
    path.touch()
    os.truncate(path, 2 * check_data.MAX_ARRAY_BYTES + 1)  # holes, no bytes on the disk
    assert code_of(path) == "too-large"
    blob = zip_of(io.BytesIO(), {"emb.npy": bytes(1 << 22)}, zipfile.ZIP_DEFLATED).getvalue()
    path.write_bytes(blob.replace((1 << 22).to_bytes(4, "little"), (1 << 29).to_bytes(4, "little")))
    assert code_of(path) == "too-large"


class Exploit:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EXPLOIT"],))


@pytest.mark.parametrize("form", ["pickle", "member"])
def test_the_code_of_a_pickle_does_not_run(tmp_path, monkeypatch, form):
    monkeypatch.setenv("EXPLOIT", str(tmp_path / "ran"))
    path = tmp_path / "x.npz"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Exploit()))
        assert code_of(path) == "pickle"
    else:
        np.savez(path, emb=np.array([Exploit(), 1], object))
        assert code_of(path) == "not-float"
    assert not (tmp_path / "ran").exists()


def test_no_truncation_is_accepted(tmp_path):
    whole = write(tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "x.npz"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert code_of(path)


def flipped(blob, bits):
    """The file once for each bit, with that bit turned over."""
    for bit in bits:
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(damaged)


@pytest.mark.parametrize("shape", [(768,), (150, 768)])
def test_no_flipped_bit_passes_unnoticed(tmp_path, shape):
    """Every bit of a vector's file, and every bit that is not a number of a sequence's."""
    path = write(tmp_path / "x.npz", emb=numbers(*shape))
    blob = path.read_bytes()
    read_features(path)  # the layout of the good file is known when the damaged ones come
    (member,) = check_data._members(blob)
    last = 8 * len(blob)
    bits = range(last) if len(shape) == 1 else [*range(8 * (member.start + 128)), *range(8 * member.stop, last)]
    for bit, damaged in flipped(blob, bits):
        path.write_bytes(damaged)
        with pytest.raises(stats.DataError):
            read_features(path)
            pytest.fail(f"bit {bit} was not noticed")


def test_no_flipped_bit_of_a_compressed_file_gives_another_array(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", emb=GOOD)
    blob, path = (tmp_path / "whole.npz").read_bytes(), tmp_path / "x.npz"
    for _, damaged in flipped(blob, range(8 * len(blob))):
        path.write_bytes(damaged)
        try:
            array = read_features(path).array
        except stats.DataError:
            continue
        np.testing.assert_array_equal(array, GOOD)  # bits that a deflate stream does not use


def mutants(blobs, count, seed):
    """Damaged copies of good files: bits and bytes changed, cut, doubled, moved, and numbers set to their extremes."""
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


def test_no_mutant_breaks_the_reader(tmp_path):
    """The reader's own exception or the very array; FUZZ_MUTANTS=300000 for a longer run, FUZZ_SEED for another one."""
    frames = numbers(6, 16)
    np.savez(tmp_path / "0.npz", emb=frames[0])
    np.savez_compressed(tmp_path / "1.npz", emb=frames)
    np.savez(tmp_path / "2.npz", label=np.eye(8)[1], wav2vec_features=frames, emotion=np.array("sad"))
    with zipfile.ZipFile(tmp_path / "3.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("emb.npy"), stats.npy_bytes(frames))
    blobs = [(tmp_path / f"{number}.npz").read_bytes() for number in range(4)]
    wanted = [read_features(tmp_path / f"{number}.npz").array for number in range(4)]
    path, accepted = tmp_path / "x.npz", 0
    count, seed = int(os.environ.get("FUZZ_MUTANTS", 30_000)), int(os.environ.get("FUZZ_SEED", 0))
    with path.open("wb", buffering=0) as file:
        for blob in mutants(blobs, count, seed):
            os.pwrite(file.fileno(), blob, 0)
            os.ftruncate(file.fileno(), len(blob))
            try:
                array = read_features(path).array
            except stats.DataError as error:
                assert error.code in check_data.REMEDIES
                continue
            accepted += 1
            assert any(np.array_equal(array, good) for good in wanted)
    assert accepted < count / 10


def test_features_that_are_kept_share_blocks_that_end_with_them(tmp_path):
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


def test_bytes_before_and_after_the_archive_are_refused(tmp_path):
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
def test_a_header_is_never_trusted(tmp_path, header, code, method):
    text = header.encode()
    blob = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + GOOD.tobytes()
    assert code_of(zip_of(tmp_path / "x.npz", {"emb.npy": blob}, method)) == code


def test_a_bomb_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", emb=np.zeros((1 << 18, 64), np.float32))
    assert (tmp_path / "x.npz").stat().st_size < 100_000
    assert code_of(tmp_path / "x.npz") == "bomb"


def test_other_compressions_are_refused(tmp_path):
    assert code_of(zip_of(tmp_path / "x.npz", {"emb.npy": stats.npy_bytes(GOOD)}, zipfile.ZIP_LZMA)) == (
        "unknown-compression"
    )


def test_what_is_no_file_is_found_without_waiting(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "03-01-05-01-02-01-12.npz")
    os.mkfifo(folder / "fifo.npz")
    (folder / "folder.npz").mkdir()
    (folder / "dangling.npz").symlink_to("nowhere")
    (folder / "loop.npz").symlink_to("loop.npz")
    with socket.socket(socket.AF_UNIX) as server:
        monkey = os.getcwd()
        os.chdir(folder)  # a socket's path must be short
        server.bind("socket.npz")
        os.chdir(monkey)
        read, codes = stream(folder)
    assert len(read) == 1
    assert codes["fifo.npz"] == codes["folder.npz"] == "not-a-file"
    assert codes["dangling.npz"] == codes["loop.npz"] == codes["socket.npz"] == "unreadable"


def test_a_stream_reads_a_file_when_it_is_asked_for(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.npz")
    result = check_data.Scan(tmp_path, 12)
    read = check_data.stream(check_data.ScanOptions(str(tmp_path)), result, 1.0)
    next(read)
    (tmp_path / "b.npz").write_bytes(b"")
    assert list(read) == []
    assert [(finding.file, finding.code) for finding in result.findings] == [("b.npz", "empty")]


def test_a_stream_gives_what_fits_the_model_and_what_its_name_tells(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"ravdess_03-01-05-01-02-01-12": (12,), "x": (3, 12), "turned": (12, 3), "flat": (36,), "narrow": (1, 5)}
    for name, shape in shapes.items():
        write(tmp_path / f"{name}.npz", emb=rng.normal(size=shape))
    read, codes = stream(tmp_path)
    assert [(u.file, u.emotion, u.speaker, frames.shape) for u, frames in read] == [
        ("ravdess_03-01-05-01-02-01-12.npz", "angry", "ravdess:12", (1, 12)),
        ("x.npz", None, None, (3, 12)),
    ]
    assert codes == {"turned.npz": "transposed", "flat.npz": "other-width", "narrow.npz": "other-width"}
    read, codes = stream(tmp_path, cuts_vectors=True)
    assert [frames.shape for u, frames in read] == [(3, 12), (1, 12), (3, 12)]


def test_a_stream_reads_a_single_file(tmp_path):
    write(tmp_path / "a.npz")
    write(tmp_path / "b.npz")
    read, _ = stream(tmp_path / "b.npz")
    assert [u.file for u, _ in read] == ["b.npz"]
    (tmp_path / "sad").mkdir()
    write(tmp_path / "sad" / "c.npz")
    read, _ = stream(tmp_path / "sad" / "c.npz")
    assert [(u.file, u.emotion) for u, _ in read] == [("c.npz", "sad")]  # its folder speaks for a single file too
    with pytest.raises(check_data.UsageError, match="no such"):
        stream(tmp_path / "c.npz")


# --- the folder ---


def test_flat_and_nested_layouts_give_the_same_utterances(tmp_path, sample):
    flat = scan(sample)
    for record in flat.records:
        place = tmp_path / "nested" / record.utterance.emotion
        place.mkdir(parents=True, exist_ok=True)
        os.link(sample / record.utterance.file, place / record.utterance.file)
    nested = scan(tmp_path / "nested")
    assert {r.utterance.speaker for r in flat.records} == {r.utterance.speaker for r in nested.records}
    assert flat.count("emotion") == nested.count("emotion")
    assert "flat in the folder" in "\n".join(check_data.summary(flat))
    assert "in subfolders" in "\n".join(check_data.summary(nested))


def test_emotion_folders_label_names_that_say_nothing(tmp_path):
    for emotion in ("Happy", "sad"):
        (tmp_path / emotion).mkdir()
        write(tmp_path / emotion / "001.npz", emb=numbers(8, seed=len(emotion)))
    result = scan(tmp_path)
    assert [(r.utterance.emotion, r.utterance.speaker) for r in result.records] == [("happy", None), ("sad", None)]
    assert "emotion-named folders (2)" in "\n".join(check_data.summary(result))


def test_a_name_and_a_folder_that_disagree_are_a_finding(tmp_path):
    (tmp_path / "sad").mkdir()
    write(tmp_path / "sad" / "ravdess_03-01-05-01-02-01-12.npz")
    assert [finding.code for finding in scan(tmp_path).findings] == ["label-conflict"]


def test_a_bad_file_spoils_no_good_one(sample):
    good = scan(sample)
    (sample / "aaa.npz").write_bytes(b"not a zip")
    write(sample / "nobody.npz")
    both = scan(sample)
    assert both.records == good.records
    assert both.left_out() == {"unknown-name": 2}
    assert both.fingerprint == good.fingerprint


def test_hidden_files_and_results_of_runs_are_passed_over(sample):
    (sample / "._03-01-05-01-02-01-12.npz").write_bytes(b"mac")
    (sample / ".tmp").mkdir()
    write(sample / ".tmp" / "x.npz")
    (sample / "run").mkdir()
    for name in ("model.npz", "config.json", "metrics.json"):
        (sample / "run" / name).write_bytes(b"")
    result = scan(sample)
    assert (len(result.records), result.findings, result.hidden) == (112, [], 5)


def test_a_folder_that_links_back_is_read_once(sample):
    (sample / "loop").symlink_to(sample, target_is_directory=True)
    assert len(scan(sample).records) == 112


@pytest.mark.parametrize("name", ["a\nb", "$(touch ran)", "-rf", "\x1b[31mred", "\udcff", 'quo"te', "sp ace"])
def test_a_hostile_name_cannot_forge_a_line(tmp_path, name):
    write(tmp_path / f"{name}.npz")
    result = scan(tmp_path)
    (line,) = check_data.findings_report(result)
    assert "\n" not in line
    assert "\x1b" not in line
    assert line.isprintable()
    assert "unknown-name" in line


# --- widths ---


def named(folder, number, **arrays):
    return write(folder / f"ravdess_03-01-05-01-01-01-{number + 1:02d}.npz", **arrays)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_flat_sequences_are_reshaped_when_the_set_tells_the_width(tmp_path):
    frames = [numbers(3 + k, 8, seed=k) for k in range(4)]
    for k, array in enumerate(frames):
        named(tmp_path, k, emb=array if k == 0 else array.reshape(-1))
    result = scan(tmp_path, keep_features=True)
    assert (result.dim, result.findings) == (8, [])
    assert any(note.code == "reshaped" and note.text.startswith("3 files") for note in result.notes)
    for kept, array in zip(result.features, [frames[0], *frames[1:]]):
        np.testing.assert_array_equal(kept, array)


def test_flat_sequences_are_reshaped_when_statistics_or_option_tell_the_width(tmp_path):
    for k in range(3):
        named(tmp_path, k, emb=numbers(8 * (2 + k), seed=k))
    assert [record.shape for record in scan(tmp_path, dim=8).records] == [(16,), (24,), (32,)]
    supply(tmp_path, 8)
    assert [len(frames) for frames in scan(tmp_path, keep_features=True).features] == [2, 3, 4]


def test_vectors_of_another_width_are_left_out_even_if_it_is_a_multiple(tmp_path):
    for k in range(5):
        named(tmp_path, k, emb=numbers(8 if k else 16, seed=k))
    result = scan(tmp_path)
    assert result.dim == 8
    assert result.left_out() == {"other-width": 1}


@pytest.mark.parametrize("odd", [(8, 1), (1, 4), (5, 4), (6, 2)])
def test_one_odd_file_does_not_cut_up_the_vectors_of_the_set(tmp_path, odd):
    for k in range(6):
        named(tmp_path, k, emb=numbers(*(odd if k == 5 else (8,)), seed=k))
    result = scan(tmp_path)
    assert (result.dim, len(result.records), len(result.findings)) == (8, 5, 1)


def test_many_flat_sequences_are_known_by_a_few_real_ones(tmp_path):
    for k in range(12):
        named(tmp_path, k, emb=numbers(*((3, 8) if k < 2 else (8 * (2 + k // 4),)), seed=k))
    result = scan(tmp_path)
    assert (result.dim, len(result.records)) == (8, 12)


def test_a_tie_of_widths_asks(tmp_path):
    for k in range(4):
        named(tmp_path, k, emb=numbers(8 if k % 2 else 12, seed=k))
    with pytest.raises(check_data.UsageError, match="8 and 12; choose one with --dim"):
        scan(tmp_path)
    assert len(scan(tmp_path, dim=12).records) == 2


def supply(folder, dim):
    np.save(folder / stats.MEAN_FILE, np.zeros(dim, np.float32))
    np.save(folder / stats.STD_FILE, np.ones(dim, np.float32))


def test_statistics_of_another_width_are_refused_with_both_numbers(tmp_path):
    named(tmp_path, 0, emb=numbers(8))
    supply(tmp_path, 5)
    with pytest.raises(stats.DataError, match=r"has 5 numbers and the files have shape \(8,\)"):
        scan(tmp_path)
    with pytest.raises(stats.DataError, match=r"has 5 numbers and --dim says 8"):
        scan(tmp_path, dim=8)


def test_vectors_of_one_length_are_not_cut_to_fit_statistics(tmp_path):
    for k in range(3):
        named(tmp_path, k, emb=numbers(8, seed=k))
    supply(tmp_path, 4)
    with pytest.raises(stats.DataError, match=r"has 4 numbers and the files have shape \(8,\)"):
        scan(tmp_path)


def test_a_leading_axis_is_dropped_and_counted(tmp_path):
    for k, shape in enumerate([(1, 8), (1, 3, 8), (8,), (4, 8)]):
        named(tmp_path, k, emb=numbers(*shape, seed=k))
    result = scan(tmp_path)
    assert [record.shape for record in result.records] == [(8,), (3, 8), (8,), (4, 8)]
    assert check_data.Note("leading-axis", "2 files") in result.notes


def test_our_own_statistics_for_other_files_bind_no_width(tmp_path):
    """Once 4 wide, now 8: the vectors must not be cut in two to fit statistics of yesterday."""
    for k in range(3):
        named(tmp_path, k, emb=numbers(8, seed=k))
    stats.save(tmp_path, stats.Moments.of(numbers(9, 4)).statistics(), "yesterday")
    result = scan(tmp_path)
    assert (result.dim, result.statistics_are_stale, result.cuts_vectors) == (8, True, False)


def test_changed_contents_make_our_statistics_stale(sample):
    first = scan(sample)
    stats.save(sample, first.moments.statistics(), first.fingerprint)
    assert not scan(sample).statistics_are_stale
    path = sample / first.records[0].file
    np.savez(path, emb=read_features(path).array * 2)
    assert scan(sample).statistics_are_stale


def test_sequences_stored_the_wrong_way_round_are_said_and_turned_on_request(tmp_path):
    frames = [numbers(3 + k, 8, seed=k) for k in range(4)]
    for k, array in enumerate(frames):
        named(tmp_path, k, emb=np.ascontiguousarray(array.T))
    assert scan(tmp_path).left_out() == {"transposed": 4}
    turned = scan(tmp_path, transpose=True, keep_features=True)
    for kept, array in zip(turned.features, frames, strict=True):
        np.testing.assert_array_equal(kept, array)


def test_one_sequence_the_wrong_way_round_is_not_guessed(tmp_path):
    for k in range(4):
        named(tmp_path, k, emb=numbers(*((8, 3) if k == 2 else (3, 8)), seed=k))
    result = scan(tmp_path)
    assert [(finding.file[-6:], finding.code) for finding in result.findings] == [("03.npz", "transposed")]


# --- names that the user explains ---


def test_a_pattern_of_the_user_labels_files(tmp_path):
    for k, name in enumerate(["anna-Joy-1", "anna-whisper-2", "bert-joy-1", "odd"]):
        write(tmp_path / f"{name}.npz", emb=numbers(8, seed=k))
    result = scan(tmp_path, pattern=r"(?P<speaker>\w+)-(?P<emotion>\w+)-\d")
    assert [(r.utterance.emotion, r.utterance.speaker) for r in result.records] == [
        ("happy", "own:anna"),
        ("whisper", "own:anna"),
        ("happy", "own:bert"),
    ]
    assert result.left_out() == {"unknown-name": 1}


def test_a_pattern_may_look_at_the_folders(tmp_path):
    (tmp_path / "anna").mkdir()
    write(tmp_path / "anna" / "sad1.npz")
    (record,) = scan(tmp_path, pattern=r"(?P<speaker>\w+)/(?P<emotion>[a-z]+)\d").records
    assert (record.utterance.speaker, record.utterance.emotion) == ("own:anna", "sad")


@pytest.mark.parametrize(("pattern", "told"), [("(", "no regular expression"), (r"(?P<mood>\w+)", "needs a group")])
def test_a_pattern_that_cannot_work_is_refused(sample, pattern, told):
    with pytest.raises(check_data.UsageError, match=told):
        scan(sample, pattern=pattern)


def test_a_table_of_the_user_labels_files(tmp_path):
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
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("", "needs a first line"),
        ("name,emotion\na,sad\n", "needs a first line"),
        ("file,emotion\na,sad\na.npz,happy\n", "two lines for a"),
        (b"file,emotion\n\xff,sad\n", "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(sample, tmp_path, text, told):
    table = tmp_path / "labels.csv"
    if text is not None:
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(check_data.UsageError, match=told):
        scan(sample, labels=str(table))


def test_emotions_are_merged_and_chosen(sample):
    assert scan(sample, merge=("calm=neutral", "joy=anger")).count("emotion")["neutral"] == 24
    assert "happy" not in scan(sample, merge=("joy=anger",)).count("emotion")
    chosen = scan(sample, classes="Happiness, sad")
    assert chosen.count("emotion") == {"happy": 16, "sad": 16}
    assert (chosen.unwanted, chosen.findings, check_data.exit_status(chosen)) == (80, [], 0)


@pytest.mark.parametrize("options", [{"merge": ("calm",)}, {"corpus": "nowhere"}, {"dim": 0}, {"directory": ""}])
def test_impossible_scan_options_are_refused(options):
    with pytest.raises(check_data.UsageError):
        check_data.ScanOptions(**{"directory": "D", **options})


@pytest.mark.parametrize("options", [{"merge": ("clam=neutral",)}, {"classes": "hapy,sad"}])
def test_a_word_that_no_file_has_is_refused(sample, options):
    with pytest.raises(check_data.UsageError, match=r"no file has the emotion (clam|hapy); found: angry, calm"):
        scan(sample, **options)


@pytest.mark.parametrize("entry", ["calm", "calm=", "=calm", "a=b=c", "a,b=c"])
def test_merge_needs_two_words(entry):
    with pytest.raises(check_data.UsageError, match="--merge must be as calm=neutral"):
        check_data.ScanOptions("D", merge=(entry,))


def test_ambiguous_names_ask_for_the_corpus(tmp_path):
    for actor in range(1, 4):
        write(tmp_path / f"03-01-05-01-02-01-0{actor}.npz", emb=numbers(8, seed=actor))
    assert scan(tmp_path).left_out() == {"ambiguous-name": 3}
    assert scan(tmp_path, corpus="banglaser").count("emotion") == {"neutral": 3}
    write(tmp_path / "03-01-06-01-02-01-01.npz", emb=numbers(8, seed=9))
    assert scan(tmp_path).count("emotion") == {"angry": 3, "fear": 1}


# --- what ruins a study ---


def codes_of_notes(result):
    return {note.code for note in result.notes}


def test_a_good_set_has_no_notes(tmp_path):
    assert scan(write_sample(tmp_path / "data", actors=8)).notes == []


def test_nan_is_read_as_zero_on_request(sample):
    path = sample / scan(sample).records[0].file
    array = read_features(path).array
    array[3] = np.nan
    np.savez(path, emb=array)
    assert scan(sample).left_out() == {"not-finite": 1}
    result = scan(sample, nan_to_zero=True, keep_features=True)
    assert result.features[0][0, 3] == 0
    assert np.isfinite(result.features[0]).all()


def test_the_same_features_under_two_names(sample):
    utterances = [record.utterance for record in scan(sample).records]
    one = utterances[0]
    (twin,) = [u for u in utterances if u.speaker == one.speaker and u.emotion == one.emotion and u != one]
    shutil.copy(sample / one.file, sample / twin.file)
    result = scan(sample)
    assert "duplicate" in codes_of_notes(result)
    assert result.findings == []


def test_the_same_features_under_two_labels_are_both_left_out(sample):
    one, other = scan(sample, classes="happy,sad").records[0], scan(sample, classes="sad").records[0]
    shutil.copy(sample / one.file, sample / other.file)
    result = scan(sample)
    assert {(finding.file, finding.code) for finding in result.findings} == {
        (one.file, "duplicate-conflict"),
        (other.file, "duplicate-conflict"),
    }


def test_a_third_copy_does_not_save_a_conflict(sample):
    one, two = scan(sample, classes="happy").records[:2]
    other = scan(sample, classes="sad").records[0]
    for copy in (two, other):
        shutil.copy(sample / one.file, sample / copy.file)
    assert scan(sample).left_out() == {"duplicate-conflict": 3}


def test_duplicates_with_nan_are_found_too(sample):
    one, other = scan(sample, classes="happy").records[0], scan(sample, classes="sad").records[0]
    array = read_features(sample / one.file).array
    array[2] = np.nan
    for copy in (one, other):
        np.savez(sample / copy.file, emb=array)
    assert scan(sample, nan_to_zero=True).left_out() == {"duplicate-conflict": 2}


def test_copies_of_nobody_knows_whom_are_left_out(tmp_path):
    (tmp_path / "sad").mkdir()
    for name in "abc":
        write(tmp_path / "sad" / f"{name}.npz")
    result = scan(tmp_path)
    assert (len(result.records), result.left_out()) == (1, {"duplicate-speaker": 2})


def test_the_same_features_of_two_speakers_cannot_straddle_a_split(sample):
    records = scan(sample, classes="happy").records
    one = records[0]
    other = next(record for record in records if record.utterance.speaker != one.utterance.speaker)
    shutil.copy(sample / one.file, sample / other.file)
    assert scan(sample).left_out() == {"duplicate-speaker": 1}


def test_files_of_an_absurd_scale_are_left_out_and_large_ones_noted(sample):
    records = scan(sample).records
    for record, factor in ((records[0], 1e30), (records[1], 1e-9), (records[2], 20)):
        np.savez(sample / record.file, emb=read_features(sample / record.file).array * np.float32(factor))
    result = scan(sample)
    assert {finding.file for finding in result.findings} == {records[0].file, records[1].file}
    assert result.left_out() == {"absurd-scale": 2}
    (note,) = [note for note in result.notes if note.code == "norm-outlier"]
    assert records[2].file in note.text


def test_what_the_names_tell_is_noted(tmp_path):
    names = [
        "ravdess_01-01-06-01-02-01-01",  # with its picture
        "ravdess_03-01-06-01-02-01-01",  # the same without
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


def test_further_arrays_in_the_files_are_noted(tmp_path):
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


def test_imbalance_is_noted(sample):
    for record in scan(sample, classes="happy").records[2:]:
        (sample / record.file).unlink()
    notes = {note.code: note.text for note in scan(sample).notes}
    assert "happy 2" in notes["imbalance"]
    assert "happy 2" in notes["few-utterances"]
    assert "happy 1 speakers" in notes["few-speakers"]


# --- the program ---


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "check_data.py", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_a_good_folder_exits_0_and_tells_what_is_in_it(sample):
    done = run(sample)
    assert (done.returncode, done.stderr) == (0, "")
    for told in ("112 NPZ files, 112 usable", "ravdess 64", "cremad 48", "happy 16", "8, 12 to 16", "24 numbers wide"):
        assert told in done.stdout
    assert "none here; train.py will compute them" in done.stdout
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
    ("make", "told"),
    [
        (lambda place: None, "no such folder"),
        (lambda place: place.write_text(""), "is a file"),
        (lambda place: place.mkdir(), "the folder is empty"),
        (lambda place: (place.mkdir(), (place / "a.wav").write_text("")), "1 .wav files: extract embeddings first"),
    ],
)
def test_nothing_to_work_on_exits_2_with_what_was_found(tmp_path, make, told):
    make(tmp_path / "data")
    done = run(tmp_path / "data")
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_usual_other_places_are_suggested(tmp_path):
    (tmp_path / "models" / "wav2vec").mkdir(parents=True)
    write(tmp_path / "models" / "wav2vec" / "x.npz")
    assert "models/wav2vec" in run(tmp_path / "data").stderr
    (tmp_path / "data").mkdir()
    assert "models/wav2vec" in run(tmp_path / "data").stderr


def test_the_report_for_programs_is_the_same_report(sample):
    (sample / "broken.npz").write_bytes(b"")
    done = run(sample, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == told["exit_status"] == 1
    assert (told["files"], told["usable"], told["left_out"]) == (113, 112, {"unknown-name": 1})
    assert told["findings"][0]["remedy"] == check_data.REMEDIES["unknown-name"]
    assert told["emotion"]["happy"] == 16
    assert told["speaker"]["ravdess:01"] == 16


def test_a_reader_that_goes_away_is_no_fault(sample):
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
def test_an_output_that_cannot_be_written_is_one_line(sample):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "check_data.py", sample],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("name", ["a" * 300, "with\nline"])
def test_an_impossible_folder_is_one_line(name, tmp_path):
    done = run(tmp_path / name)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_an_emotion_of_a_table_cannot_forge_a_line(tmp_path):
    write(tmp_path / "x.npz")
    table = tmp_path / "labels.csv"
    table.write_text('file,emotion,speaker\nx,"sad\n  ready        python evil",y\n')
    done = run(tmp_path, "--labels", table)
    assert not [line for line in done.stdout.splitlines() if line.startswith("  ready")]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_encoding_of_the_terminal_will_do(tmp_path, encoding):
    data = tmp_path / "gef\u00fchl"
    data.mkdir()
    write(data / "\u60b2\u3057\u3044.npz")
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, ROOT / "check_data.py", data], env=environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, b"")
    assert b"unknown-name" in done.stdout


def test_one_emotion_is_not_ready(tmp_path):
    for k in range(12):
        named(tmp_path, k, emb=numbers(8, seed=k))
    done = run(tmp_path)
    assert done.returncode == 1
    assert "NOT READY    all files have one emotion (angry)" in done.stdout


def test_jax_is_never_imported(sample):
    code = "import sys; sys.modules['jax'] = None; import check_data; sys.exit(check_data.main([sys.argv[1]]))"
    done = subprocess.run([sys.executable, "-c", code, sample], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_code_has_a_remedy_a_test_and_a_place_in_the_readme():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    source = "".join((ROOT / name).read_text() for name in ("check_data.py", "stats.py", "train.py"))
    readme = (ROOT / "README.md").read_text()
    for code in (*check_data.REMEDIES, *check_data.NOTES, "bad-statistics"):
        assert f'"{code}"' in source.replace(f'"{code}":', "")
        assert f"`{code}`" in readme
        assert f'"{code}"' in tests

import concurrent.futures
import csv
import errno
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import stat
import struct
import types
import weakref
import zipfile

import numpy as np
import pytest

import check_data
import stats


def normal(seed=0, shape=(40, 5)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some_statistics(dim=5, seed=0):
    return stats.Moments.of(normal(seed, (40, dim))).statistics()


def code_and_reason(call, *arguments, **options):
    with pytest.raises(stats.DataError) as error:
        call(*arguments, **options)
    assert str(error.value) == error.value.reason
    return error.value.code, error.value.reason


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- reading a file ---


def test_a_file_may_have_exactly_the_limit_of_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert stats.read_bytes(path, 10) == stats.read_bytes(str(path), 11) == b"0123456789"
    assert code_and_reason(stats.read_bytes, path, 9) == ("too-large", "has 10 bytes; at most 9 are read")


def test_the_limit_is_1_gib_by_default(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**30 + 1)
    assert code_and_reason(stats.read_bytes, path)[0] == "too-large"
    assert inspect.signature(stats.read_bytes).parameters["limit"].default == 2**30


def test_an_empty_file_is_read(tmp_path):
    (tmp_path / "file").touch()
    assert stats.read_bytes(tmp_path / "file") == b""


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_regular_files_are_read_and_a_fifo_does_not_block(tmp_path, make):
    make(tmp_path / "x")
    assert code_and_reason(stats.read_bytes, tmp_path / "x") == ("not-a-file", "is not a regular file")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing", "cannot be opened: No such file or directory"), ("a\0b", "cannot be opened: embedded null byte")],
)
def test_a_file_that_cannot_be_opened_is_unreadable(tmp_path, name, reason):
    assert code_and_reason(stats.read_bytes, tmp_path / name) == ("unreadable", reason)


def read_in_pieces(monkeypatch, size):
    real = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, wanted: real(descriptor, min(wanted, size)))


def resize_after_fstat(monkeypatch, path, size):
    real = os.fstat

    def fstat(descriptor):
        status = real(descriptor)
        os.truncate(path, size)
        return status

    monkeypatch.setattr(os, "fstat", fstat)


@pytest.mark.parametrize("piece", [1, 4, 9, 10, 11])
def test_short_reads_are_continued(tmp_path, monkeypatch, piece):
    (tmp_path / "file").write_bytes(b"0123456789")
    read_in_pieces(monkeypatch, piece)
    assert stats.read_bytes(tmp_path / "file") == b"0123456789"


@pytest.mark.parametrize("piece", [4, 100])
@pytest.mark.parametrize(("size", "n_read"), [(30, 11), (6, 6)])
def test_a_file_that_grows_is_one_byte_too_long_and_one_that_shrinks_ends_early(
    tmp_path, monkeypatch, piece, size, n_read
):
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    read_in_pieces(monkeypatch, piece)
    resize_after_fstat(monkeypatch, path, size)
    assert stats.read_bytes(path) == bytes(n_read)


def test_a_read_error_is_reported_and_the_file_closed(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "file").touch()
    closed = []
    real = os.close
    monkeypatch.setattr(os, "read", fail)
    monkeypatch.setattr(os, "close", lambda descriptor: closed.append(real(descriptor)))
    reason = "cannot be read: Input/output error"
    assert code_and_reason(stats.read_bytes, tmp_path / "file") == ("io-error", reason)
    assert len(closed) == 1


# --- the npy format ---


def raw_npy(header, data=b"", version=(1, 0)):
    text = header.encode("latin-1")
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + data


def npy_header_text(descr="'<f4'", order="False", shape="(1,)", more=""):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}{more}}}"


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3), (2, 3, 4)])
def test_float_arrays_of_every_npy_version_are_read(version, dtype, shape):
    array = normal(shape=shape).astype(dtype)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version)
    read = stats.npy_array(buffer.getvalue())
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def header_with_shape(shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape!r}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(("shape", "size"), [((1,) * 100, 4), ((0, 10**30), 0), ((2**62, 2**62, 0), 0)])
def test_a_shape_that_numpy_does_not_have_is_refused(shape, size):
    with pytest.raises(stats.DataError) as error:
        stats.npy_array(header_with_shape(shape) + bytes(size))
    assert error.value.code == "bad-npy-header"
    assert len(error.value.reason) < 120


def test_an_array_in_fortran_order_is_read():
    array = np.asfortranarray(normal(shape=(3, 4)))
    blob = stats.npy_bytes(array)
    assert stats.npy_header(blob)[0] == (np.float32, True, (3, 4))
    np.testing.assert_array_equal(stats.npy_array(blob), array)


def test_an_array_shares_the_memory_of_its_file():
    blob = stats.npy_bytes(normal())
    assert np.shares_memory(stats.npy_array(memoryview(blob)), np.frombuffer(blob, np.uint8))


@pytest.mark.parametrize("version", [1, 2])
def test_every_truncated_file_is_refused(version):
    blob = raw_npy(npy_header_text(shape="(2,)"), bytes(8), (version, 0))
    stats.npy_array(blob)
    codes = [code_and_reason(stats.npy_array, blob[:size])[0] for size in range(len(blob))]
    assert codes == ["bad-npy-header"] * (len(blob) - 8) + ["size-mismatch"] * 8


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (b"", "it does not start with the npy signature"),
        (b"\x93NUMPX\x01\x00\x02\x00{}", "it does not start with the npy signature"),
        (raw_npy("{"), "it does not start with the npy signature"),  # 11 bytes, fewer than any array has
        (raw_npy("{}"), "the array's header is damaged"),
        (raw_npy("{}", version=(1, 1)), "npy format 1.1 is unknown"),
        (raw_npy("{}", version=(2, 1)), "npy format 2.1 is unknown"),
        (raw_npy("{}", version=(3, 2)), "npy format 3.2 is unknown"),
        (raw_npy("{}", version=(0, 0)), "npy format 0.0 is unknown"),
        (raw_npy("{}", version=(4, 0)), "npy format 4.0 is unknown"),
        (raw_npy("x" * 300)[:-1], "the array's header claims 300 bytes"),
        (raw_npy("x" * 300, version=(2, 0))[:12], "the array's header claims 300 bytes"),
        (raw_npy(" " * 10_001, version=(2, 0)), "the array's header claims 10001 bytes"),
    ],
)
def test_a_file_without_an_npy_header_is_named(blob, reason):
    assert code_and_reason(stats.npy_header, blob) == ("bad-npy-header", reason)


def test_a_header_may_have_10000_bytes():
    text = npy_header_text().ljust(10_000)
    assert stats.npy_header(raw_npy(text)) == ((np.float32, False, (1,)), 10_010)
    assert stats.npy_header(raw_npy(text, version=(2, 0)))[1] == 10_012


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{}",
        "[" * 5000,
        npy_header_text()[:-1],
        npy_header_text(more=", 'more': 1"),
        npy_header_text(order="0"),
        npy_header_text(shape="[1]"),
        npy_header_text(shape="(1.0,)"),
        npy_header_text(shape="(True,)"),
        npy_header_text(shape="(2, -1)"),
        npy_header_text(descr="'<f5'"),
        npy_header_text(descr="'nonsense'"),
        npy_header_text(descr="__import__('os')"),
        npy_header_text(descr=r"'\d'"),
    ],
)
def test_a_damaged_header_is_refused(text):
    expected = ("bad-npy-header", "the array's header is damaged")
    assert code_and_reason(stats.npy_array, raw_npy(text, bytes(4))) == expected


@pytest.mark.parametrize(
    ("descr", "content"),
    [
        ("'<i4'", "int32 numbers"),
        ("'|b1'", "bool numbers"),
        ("'<c8'", "complex64 numbers"),
        ("'<U1'", "<U1 numbers"),
        pytest.param(
            "'<f16'", "float128 numbers", marks=pytest.mark.skipif(not hasattr(np, "float128"), reason="no type")
        ),
        ("'|O'", "pickled Python objects"),
        ("[('a', '<f4')]", "|V1 numbers"),
        ("[('a', '|O')]", "pickled Python objects"),
    ],
)
def test_only_floats_are_accepted_by_default(descr, content):
    expected = ("not-float", f"the array holds {content}, not float16, float32 or float64")
    assert code_and_reason(stats.npy_array, raw_npy(npy_header_text(descr), bytes(16))) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, np.bool_])
def test_other_kinds_of_numbers_are_accepted_on_request(dtype):
    array = np.array([[0, 1], [1, 0]], dtype)
    blob = stats.npy_bytes(array)
    read = stats.npy_array(blob, kinds="fiub")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, array)
    assert code_and_reason(stats.npy_array, blob, kinds="c")[0] == "not-float"


@pytest.mark.parametrize("difference", [-1, 1])
def test_the_numbers_must_fill_the_file_exactly(difference):
    blob = raw_npy(npy_header_text(shape="(2, 3)"), bytes(24 + difference))
    reason = f"shape (2, 3) needs 24 bytes and there are {24 + difference}"
    assert code_and_reason(stats.npy_array, blob) == ("size-mismatch", reason)


def test_the_size_of_a_huge_declared_array_is_exact():
    blob = raw_npy(npy_header_text("'<f8'", shape=f"({2**62}, 4)"))
    assert code_and_reason(stats.npy_array, blob)[1] == f"shape ({2**62}, 4) needs {2**67} bytes and there are 0"


def test_named_arrays_come_back_from_an_npz_file(tmp_path):
    arrays = {"a/b": normal(), "flag": np.array([True, False]), "count": np.int32([7]), "none": np.zeros((0, 3))}
    blob = stats.npz_bytes(arrays)
    assert isinstance(blob, memoryview)
    stats.write_files(tmp_path, {"file.npz": blob})
    with np.load(tmp_path / "file.npz", allow_pickle=False) as file:
        by_numpy = dict(file)
    for read in (by_numpy, check_data.read_arrays(tmp_path / "file.npz", kinds="fiub")):
        assert list(read) == list(arrays)
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name], array)
    with zipfile.ZipFile(tmp_path / "file.npz") as file:
        assert {entry.compress_type for entry in file.infolist()} == {zipfile.ZIP_STORED}


def test_a_changed_bit_of_an_npz_file_is_detected(tmp_path):
    blob = bytearray(stats.npz_bytes({"a": np.ones(100, np.float32)}))
    blob[300] ^= 4
    (tmp_path / "file.npz").write_bytes(blob)
    assert code_and_reason(check_data.read_arrays, tmp_path / "file.npz", "f")[0] == "bad-crc"


@pytest.mark.parametrize("to_bytes", [stats.npy_bytes, lambda array: stats.npz_bytes({"a": array})])
def test_python_objects_are_never_pickled(to_bytes):
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        to_bytes(np.array([{}], object))


# --- CSV and JSON ---


def test_json_has_null_for_nan_and_infinity():
    content = {"a": float("nan"), "b": [float("inf"), 1.0, [-math.inf]], "c": {"d": "text", "e": np.float64("nan")}}
    expected = {"a": None, "b": [None, 1.0, [None]], "c": {"d": "text", "e": None}}
    assert json.loads(stats.json_bytes(content)) == expected


def test_json_is_indented_by_two_and_ends_with_a_newline():
    content = {"a": [1, True, None], "b": 0.5}
    expected = '{\n  "a": [\n    1,\n    true,\n    null\n  ],\n  "b": 0.5\n}\n'
    assert stats.json_bytes(content).decode() == expected


def test_csv_keeps_a_hostile_name_on_its_own_line():
    rows = [{"file": 'a\n"b",c.npz', "code": "x"}, {"file": "\udcff.npz", "code": "y"}]
    text = stats.csv_bytes(rows).decode()
    assert text == 'file,code\n"a\n""b"",c.npz",x\n\\udcff.npz,y\n'


def test_csv_quotes_a_carriage_return():
    blob = stats.csv_bytes([{"file": "x\ry.npz", "code": "z\r\n"}, {"file": "a", "code": "b"}])
    assert blob == b'file,code\n"x\ry.npz","z\r\n"\na,b\n'
    read = list(csv.DictReader(io.StringIO(blob.decode(), newline="")))
    assert read[0] == {"file": "x\ry.npz", "code": "z\r\n"}


def test_csv_columns_are_those_of_the_first_row():
    assert stats.csv_bytes([{"b": 1, "a": 0.5}]) == b"b,a\n1,0.5\n"


def test_csv_columns_can_be_given_for_an_empty_table():
    assert stats.csv_bytes([], ("file", "code")) == b"file,code\n"
    assert stats.csv_bytes([{"code": "x", "file": "ä"}], ("file", "code")) == "file,code\nä,x\n".encode()


# --- replacing files ---


def raise_os_error(code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    return fail


def fail_at(number, real, calls, code=errno.ENOSPC):
    """`real`, except that the call of that number, counted over all functions with the same `calls`, fails."""

    def call(*arguments, **options):
        calls.append(real)
        if len(calls) == number:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    return call


def test_all_files_are_synced_under_temporary_names_before_the_first_is_renamed(tmp_path, monkeypatch):
    events = []
    replace, fsync = os.replace, os.fsync

    def recorded_replace(source, target):
        assert re.fullmatch(r"\.[ab]\.[0-9a-f]{16}\.tmp", pathlib.Path(source).name)
        events.append((pathlib.Path(source).name[:2], pathlib.Path(target).name))
        if len(events) == 3:
            assert sorted(contents(tmp_path).values()) == [b"new a", b"new b", b"old a"]
        replace(source, target)

    def recorded_fsync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size)
        fsync(descriptor)

    (tmp_path / "a").write_bytes(b"old a")
    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    stats.write_files(tmp_path, {"b": b"new b", "a": memoryview(b"new a")})
    assert events == [5, 5, (".b", "b"), (".a", "a"), "folder"]
    assert contents(tmp_path) == {"a": b"new a", "b": b"new b"}


@pytest.mark.parametrize("call", [1, 2])
def test_a_full_disk_leaves_the_old_files_and_is_reported_with_the_bytes_needed(tmp_path, monkeypatch, call):
    stats.write_files(tmp_path, {"a": b"old a", "b": b"old b"})
    monkeypatch.setattr(os, "fsync", fail_at(call, os.fsync, []))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=len(os.listdir(folder))))
    with pytest.raises(OSError, match="No space") as error:
        stats.write_files(tmp_path, {"a": b"new a", "b": memoryview(np.zeros(3))})
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / "ab"[call - 1])
    # Two are free: the temporary files are gone by then.
    assert error.value.strerror == "No space left on device: 8192 bytes are needed and 2 are free"
    assert contents(tmp_path) == {"a": b"old a", "b": b"old b"}


def test_the_bytes_needed_are_not_named_where_enough_are_free(tmp_path, monkeypatch):
    """A file system without free inodes has no space left either."""
    monkeypatch.setattr(os, "fsync", raise_os_error(errno.ENOSPC))
    with pytest.raises(OSError, match="No space") as error:
        stats.write_files(tmp_path, {"a": b"12345"})
    assert error.value.strerror == "No space left on device"


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
def test_writing_replaces_whatever_has_the_name_of_a_file_and_never_follows_a_link(tmp_path, kind):
    folder, own = tmp_path / "folder", tmp_path / "own"
    folder.mkdir()
    if kind == "link":
        own.write_bytes(b"precious")
    if kind == "fifo":
        os.mkfifo(folder / "a")
    else:
        (folder / "a").symlink_to(own)
        (folder / ".a.tmp").symlink_to(own)
    stats.write_files(folder, {"a": b"new"})
    assert (folder / "a").read_bytes() == b"new" and not (folder / "a").is_symlink()
    assert not own.exists() or own.read_bytes() == b"precious"


def test_a_file_that_bears_the_temporary_name_by_chance_is_never_written_to(tmp_path, monkeypatch):
    own, planted = tmp_path / "own", tmp_path / f".a.{'0' * 16}.tmp"
    own.write_bytes(b"precious")
    planted.symlink_to(own)
    monkeypatch.setattr(stats.secrets, "token_hex", lambda size: "0" * 2 * size)
    monkeypatch.setattr(stats, "fcntl", None)  # without a lock, nothing that exists is removed
    with pytest.raises(FileExistsError):
        stats.write_files(tmp_path, {"a": b"new"})
    assert own.read_bytes() == b"precious"


def test_what_a_kill_left_is_removed_by_the_next_write_and_nothing_else_is(tmp_path):
    left, own = f".a.{'0a' * 8}.tmp", [f".b.{'0a' * 8}.tmp", ".a.tmp", f"a.{'0a' * 8}.tmp", f".a.{'0g' * 8}.tmp"]
    for name in (left, *own):
        (tmp_path / name).write_bytes(b"half")
    stats.write_files(tmp_path, {"a": b"new"})
    assert set(contents(tmp_path)) == {"a", *own}


def test_files_that_many_write_at_once_are_whole_and_no_writer_fails(tmp_path):
    blobs = [{"a": bytes([number]) * 50_000, "b": bytes([number]) * 50_000} for number in range(24)]
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda both: stats.write_files(tmp_path, both), blobs))
    assert contents(tmp_path) in blobs


def test_a_rename_that_fails_names_its_file_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    stats.write_files(tmp_path, {"a": b"old a", "b": b"old b"})
    monkeypatch.setattr(os, "replace", fail_at(2, os.replace, [], errno.EACCES))
    with pytest.raises(PermissionError) as error:
        stats.write_files(tmp_path, {"a": b"new a", "b": b"new b", "c": b"new c"})
    assert (error.value.filename, error.value.strerror) == (str(tmp_path / "b"), "Permission denied")
    assert contents(tmp_path) == {"a": b"new a", "b": b"old b"}


def test_a_folder_that_is_a_file_is_named_by_the_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError) as error:
        stats.write_files(tmp_path / "file", {"a": b"new"})
    assert error.value.filename == str(tmp_path / "file" / "a")


def test_an_interrupt_while_writing_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stats.write_files(tmp_path, {"a": b"new"})
    assert contents(tmp_path) == {}


def test_a_missing_folder_is_reported_with_the_name_of_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        stats.write_files(tmp_path / "missing", {"a": b""})
    assert error.value.filename == str(tmp_path / "missing" / "a")


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
    assert error.value.strerror == "File too large"
    assert contents(tmp_path) == {"a": b"old"}


def test_whichever_call_of_replacing_files_fails_each_file_is_old_or_new(tmp_path, monkeypatch):
    old, new = ({name: name.encode() * times for name in ("a", "b", "c")} for times in (10, 20))
    stats.write_files(tmp_path, old)
    for number in itertools.count(1):
        calls = []
        error = None
        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", fail_at(number, open, calls))
            for name in ("open", "fsync", "replace"):
                patch.setattr(os, name, fail_at(number, getattr(os, name), calls))
            try:
                stats.write_files(tmp_path, new)
            except OSError as caught:
                error = caught
        assert {path.name for path in tmp_path.iterdir()} == set(old)
        assert all((tmp_path / name).read_bytes() in (old[name], new[name]) for name in old)
        if number > len(calls):
            break
        if number > 1:  # without the lock the files are written all the same
            assert error.errno == errno.ENOSPC
        stats.write_files(tmp_path, old)
    assert number == 13  # the lock opened, three files opened, synced and renamed, and the folder opened and synced


# --- moments ---


def test_moments_of_two_frames_by_hand():
    moments = stats.Moments.of(np.array([[1, 2], [3, 8]], np.float16))
    assert (moments.count, moments.mean.tolist(), moments.m2.tolist()) == (2, [2, 5], [2, 18])
    assert {moments.count.dtype, moments.mean.dtype, moments.m2.dtype} == {np.dtype(np.float64)}
    statistics = moments.statistics()
    assert (statistics.mean.tolist(), statistics.std.tolist()) == ([2, 5], [1, 3])
    assert statistics.mean.dtype == statistics.std.dtype == np.float32


def test_merged_moments_are_those_of_all_frames_together():
    frames = normal(shape=(100, 3))
    parts = [stats.Moments.of(part) for part in (frames[:1], frames[1:30], frames[30:])]
    stacked, whole = stats.Moments.stack(parts), stats.Moments.of(frames)
    assert (stacked.count.tolist(), stacked.mean.shape, stacked.m2.shape) == ([1, 29, 70], (3, 3), (3, 3))
    merged = stacked.merged()
    assert merged.count == 100
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12)


def test_only_the_selected_groups_are_merged():
    frames = normal(shape=(9, 3))
    stacked = stats.Moments.stack([stats.Moments.of(frames[i : i + 3]) for i in (0, 3, 6)])
    merged, expected = stacked.merged(np.array([True, False, True])), stats.Moments.of(frames[[0, 1, 2, 6, 7, 8]])
    assert merged.count == 6
    np.testing.assert_allclose(merged.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.m2, expected.m2, rtol=1e-12)


def test_a_variance_that_is_small_beside_the_mean_survives():
    values = np.random.default_rng(1).normal(1e4, 0.1, (5000, 1))
    frames = values.astype(np.float32)
    merged = stats.Moments.stack([stats.Moments.of(part) for part in np.array_split(frames, 50)]).merged()
    assert merged.statistics().std == pytest.approx(frames.astype(np.float64).std(), rel=1e-6)


@pytest.mark.parametrize("size", [1, 100, 255, 256, 257, 1000])
def test_running_moments_are_those_of_all_frames_together(size):
    frames = normal(shape=(1000, 3))
    running = stats.RunningMoments()
    for start in range(0, 1000, size):
        running.add(frames[start : start + size])
    for _ in range(2):
        merged, whole = running.merged(), stats.Moments.of(frames)
        assert merged.count == 1000
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=0, atol=1e-12)
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12)


def test_running_moments_release_the_frames_whenever_256_have_arrived():
    running = stats.RunningMoments()
    for _ in range(2):
        frames = normal(shape=(255, 2))
        alive = weakref.ref(frames)
        running.add(frames)
        del frames
        assert alive() is not None
        running.add(normal(shape=(1, 2)))
        assert alive() is None


# --- statistics ---


def statistics_of(mean, std):
    return stats.Statistics(np.array(mean, np.float32), np.array(std, np.float32))


def test_a_constant_dimension_is_not_scaled():
    frames = normal()
    frames[:, 2] = 0.1
    statistics = stats.Moments.of(frames).statistics()
    assert statistics.constant().tolist() == [False, False, True, False, False]
    scale = statistics.scale()
    assert scale.dtype == np.float32
    assert scale[2] == 1
    np.testing.assert_array_equal(scale[[0, 1, 3, 4]], statistics.std[[0, 1, 3, 4]])


def test_features_of_a_tiny_scale_are_not_taken_for_constant():
    assert not stats.Moments.of(normal() * 1e-7).statistics().constant().any()


def test_a_std_of_a_millionth_of_the_typical_std_counts_as_zero():
    statistics = statistics_of([0] * 5, [2, 2, 2, 1.9e-6, 2.1e-6])
    assert statistics.constant().tolist() == [False, False, False, True, False]


def test_zeros_do_not_lower_the_typical_std():
    statistics = statistics_of([0] * 7, [0, 0, 0, 0, 2, 2, 1.9e-6])
    assert statistics.constant().tolist() == [True, True, True, True, False, False, True]


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_std_of_a_millionth_of_the_mean_counts_as_zero(sign):
    statistics = statistics_of([sign * 2000, sign * 2000, 0, 0], [1.9e-3, 2.1e-3, 1.9e-3, 2.1e-3])
    assert statistics.constant().tolist() == [True, False, False, False]


def test_a_std_at_the_threshold_counts_as_zero():
    assert statistics_of([1, 1], [1e-6, np.nextafter(np.float32(1e-6), 1)]).constant().tolist() == [True, False]


def test_all_dimensions_may_be_constant():
    statistics = statistics_of([0, 3], [0, 0])
    assert statistics.constant().all()
    assert statistics.scale().tolist() == [1, 1]


# --- the statistics files ---


def save_pair(folder, mean, std):
    np.save(folder / stats.MEAN_FILE, mean)
    np.save(folder / stats.STD_FILE, std)


def bad_statistics(folder):
    code, reason = code_and_reason(stats.load, folder)
    assert code == "bad-statistics"
    return reason


@pytest.mark.parametrize("arrived", [(stats.MEAN_FILE, stats.STD_FILE), (stats.MEAN_FILE,), (stats.STD_FILE,)])
@pytest.mark.parametrize("earlier", [False, True])
def test_statistics_of_the_user_are_never_replaced(tmp_path, arrived, earlier):
    """They may have arrived while the features were read."""
    if earlier:
        stats.save(tmp_path, some_statistics(), "print")
    for name in arrived:
        np.save(tmp_path / name, np.full(3, 7, np.float32))
    before = contents(tmp_path)
    assert not stats.save(tmp_path, some_statistics(seed=7), "new")
    assert contents(tmp_path) == before


def test_statistics_that_many_save_and_load_at_once_are_never_taken_for_the_users(tmp_path):
    def save_and_load(seed):
        assert stats.save(tmp_path, some_statistics(seed=seed), f"print {seed}")
        return stats.load(tmp_path)

    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        found = [*executor.map(save_and_load, range(24)), stats.load(tmp_path)]
    assert not any(stored.user_supplied for stored in found)


def test_saved_statistics_are_recognised_as_computed(tmp_path):
    saved = some_statistics()
    stats.save(tmp_path, saved, "print")
    stored = stats.load(tmp_path)
    assert (stored.user_supplied, stored.fingerprint) == (False, "print")
    np.testing.assert_array_equal(stored.statistics.mean, saved.mean)
    np.testing.assert_array_equal(stored.statistics.std, saved.std)
    assert set(contents(tmp_path)) == {"wav2vec_mean.npy", "wav2vec_std.npy", "wav2vec_stats.json"}
    assert set(contents(tmp_path)) == {stats.MEAN_FILE, stats.STD_FILE, stats.MANIFEST_FILE}


def test_statistics_of_layers_are_saved_with_a_row_for_each_and_loaded_flat(tmp_path):
    saved = some_statistics(6)
    stats.save(tmp_path, saved, "print", layers=2)
    np.testing.assert_array_equal(np.load(tmp_path / stats.STD_FILE), saved.std.reshape(2, 3))
    stored = stats.load(tmp_path)
    assert (stored.user_supplied, stored.layers, stored.shape) == (False, 2, (2, 3))
    np.testing.assert_array_equal(stored.statistics, saved)


def test_statistics_with_further_axes_of_length_1_are_those_of_vectors_or_layers(tmp_path):
    for shape, expected in (((6,), (6,)), ((1, 6), (6,)), ((6, 1), (6,)), ((1, 2, 3), (2, 3)), ((1, 1), (1,))):
        save_pair(tmp_path, np.zeros(shape), np.ones(shape))
        assert stats.load(tmp_path).shape == expected


def test_no_statistics(tmp_path):
    assert stats.load(tmp_path) is None


def test_a_pair_without_a_manifest_was_supplied_by_the_user(tmp_path):
    save_pair(tmp_path, np.arange(3.0), np.array([0, 1, 2], np.float16))
    stored = stats.load(tmp_path)
    assert (stored.user_supplied, stored.fingerprint) == (True, None)
    assert (stored.statistics.mean.tolist(), stored.statistics.std.tolist()) == ([0, 1, 2], [0, 1, 2])
    assert stored.statistics.mean.dtype == stored.statistics.std.dtype == np.float32


def test_a_pair_that_replaced_the_computed_one_was_supplied_by_the_user(tmp_path):
    stats.save(tmp_path, some_statistics(), "print")
    save_pair(tmp_path, np.zeros(3), np.ones(3))
    stored = stats.load(tmp_path)
    assert (stored.user_supplied, stored.fingerprint) == (True, None)


@pytest.mark.parametrize("exchanged", [stats.MEAN_FILE, stats.STD_FILE])
def test_a_computed_pair_of_which_one_file_was_replaced_is_refused(tmp_path, exchanged):
    stats.save(tmp_path, some_statistics(), "print")
    np.save(tmp_path / exchanged, np.full(5, 7, np.float32))
    (other,) = {stats.MEAN_FILE, stats.STD_FILE} - {exchanged}
    advice = f"supply both files, or delete {exchanged} to have both computed"
    assert bad_statistics(tmp_path) == f"{other} was computed here and {exchanged} was not; {advice}"


@pytest.mark.parametrize("manifest", [False, True])
@pytest.mark.parametrize("missing", [stats.MEAN_FILE, stats.STD_FILE])
def test_half_a_pair_of_the_user_is_refused(tmp_path, missing, manifest):
    if manifest:
        stats.save(tmp_path, some_statistics(), "print")
    save_pair(tmp_path, np.zeros(3), np.ones(3))
    (tmp_path / missing).unlink()
    (other,) = {stats.MEAN_FILE, stats.STD_FILE} - {missing}
    assert bad_statistics(tmp_path) == f"{other} exists but {missing} does not; add it, or delete the other"


def test_the_manifest_has_the_hashes_of_the_pair_and_the_fingerprint(tmp_path):
    stats.save(tmp_path, some_statistics(), "print")
    manifest = json.loads((tmp_path / stats.MANIFEST_FILE).read_bytes())
    assert manifest["fingerprint"] == "print"
    assert set(manifest["sha256"]) == {stats.MEAN_FILE, stats.STD_FILE}
    assert [len(digest) for digest in manifest["sha256"].values()] == [64, 64]


def test_saving_removes_the_old_pair_then_writes_the_manifest_then_the_pair(tmp_path, monkeypatch):
    stats.save(tmp_path, some_statistics(), "old")
    events = []
    replace, unlink = os.replace, pathlib.Path.unlink

    def recorded_replace(source, target):
        replace(source, target)
        events.append(f"write {target.name}")

    def recorded_unlink(path, **options):
        unlink(path, **options)
        events.append(f"remove {path.name}")

    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(pathlib.Path, "unlink", recorded_unlink)
    stats.save(tmp_path, some_statistics(seed=7), "new")
    assert events == [
        f"remove {stats.MEAN_FILE}",
        f"remove {stats.STD_FILE}",
        f"write {stats.MANIFEST_FILE}",
        f"write {stats.MEAN_FILE}",
        f"write {stats.STD_FILE}",
    ]


OLD, NEW = "old", "new"


@pytest.mark.parametrize(
    ("mean", "std", "manifest"),
    [
        (None, OLD, OLD),
        (None, None, OLD),
        (None, None, NEW),
        (NEW, None, NEW),
        (None, None, None),
    ],
)
def test_wherever_saving_was_cut_off_the_statistics_are_computed_again(tmp_path, mean, std, manifest):
    for name, seed in ((OLD, 0), (NEW, 7)):
        (tmp_path / name).mkdir()
        stats.save(tmp_path / name, some_statistics(seed=seed), name)
    folder = tmp_path / "cut off"
    folder.mkdir()
    for file, version in ((stats.MEAN_FILE, mean), (stats.STD_FILE, std), (stats.MANIFEST_FILE, manifest)):
        if version:
            shutil.copy(tmp_path / version / file, folder)
    assert stats.load(folder) is None


def assert_old_new_or_none(folder, old, new):
    """After a save that was cut off: one of the two pairs, whole, or none; never a mixture or a user's pair."""
    stored = stats.load(folder)
    if stored is not None:
        assert not stored.user_supplied
        expected = {"old": old, "new": new}[stored.fingerprint]
        np.testing.assert_array_equal(stored.statistics.mean, expected.mean)
        np.testing.assert_array_equal(stored.statistics.std, expected.std)


@pytest.mark.parametrize("number", range(1, 9))
def test_saving_that_fails_leaves_the_new_pair_or_none(tmp_path, monkeypatch, number):
    """Every fsync and every rename of `save` fails in turn, over an older pair."""
    old, new = some_statistics(), some_statistics(seed=7)
    stats.save(tmp_path, old, "old")
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_at(number, os.replace, calls))
        patch.setattr(os, "fsync", fail_at(number, os.fsync, calls))
        with pytest.raises(OSError, match="No space"):
            stats.save(tmp_path, new, "new")
    assert_old_new_or_none(tmp_path, old, new)
    assert not [name for name in contents(tmp_path) if name.endswith(".tmp")]


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


@pytest.mark.parametrize("older", [False, True])
def test_a_kill_at_any_call_leaves_old_new_or_none_and_the_next_save_cleans_up(tmp_path, monkeypatch, older):
    old, new = some_statistics(), some_statistics(seed=7)
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
        assert len(contents(folder)) == 3
    # The lock, the files that are read, two removals, five calls for the manifest, and eight for the pair.
    assert number - 1 == 1 + (3 if older else 0) + 2 + 5 + 8


@pytest.mark.parametrize(
    ("mean", "std", "reason"),
    [
        (np.zeros(3), np.ones(4), "wav2vec_mean.npy has shape (3,) and wav2vec_std.npy has (4,)"),
        (np.zeros((2, 3)), np.ones(6), "wav2vec_mean.npy has shape (2, 3) and wav2vec_std.npy has (6,)"),
        (
            np.zeros((2, 3, 4)),
            np.ones(3),
            "wav2vec_mean.npy has shape (2, 3, 4); one number per feature, shape (D,) or (L, D), is needed",
        ),
        (
            np.zeros(()),
            np.ones(3),
            "wav2vec_mean.npy has shape (); one number per feature, shape (D,) or (L, D), is needed",
        ),
        (
            np.zeros(0),
            np.ones(0),
            "wav2vec_mean.npy has shape (0,); one number per feature, shape (D,) or (L, D), is needed",
        ),
        (np.array([0, np.nan, -np.inf]), np.ones(3), "wav2vec_mean.npy holds 2 values that are NaN or Inf"),
        (np.array([0, 1e300, 0]), np.ones(3), "wav2vec_mean.npy holds 1 values that are NaN or Inf"),
        (np.zeros(3), np.array([1, np.inf, 1]), "wav2vec_std.npy holds 1 values that are NaN or Inf"),
        (np.zeros(3), np.array([-1, -1, 0.0]), "wav2vec_std.npy holds 2 negative values"),
        (
            np.zeros(3, int),
            np.ones(3),
            "wav2vec_mean.npy: the array holds int64 numbers, not float16, float32 or float64",
        ),
        (b"", np.ones(3), "wav2vec_mean.npy: it does not start with the npy signature"),
        (np.zeros(3), b"\x93NUMPY", "wav2vec_std.npy: it does not start with the npy signature"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(tmp_path, mean, std, reason):
    for name, content in ((stats.MEAN_FILE, mean), (stats.STD_FILE, std)):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else stats.npy_bytes(content))
    assert bad_statistics(tmp_path) == reason


@pytest.mark.parametrize("name", [stats.MEAN_FILE, stats.STD_FILE, stats.MANIFEST_FILE])
@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling"])
def test_statistics_that_are_not_regular_files_are_named_without_blocking(tmp_path, name, kind):
    stats.save(tmp_path, some_statistics(), "print")
    (tmp_path / name).unlink()
    if kind == "fifo":
        os.mkfifo(tmp_path / name)
    elif kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("nowhere")
    fault = "cannot be opened: No such file or directory" if kind == "dangling" else "is not a regular file"
    assert bad_statistics(tmp_path) == f"{name} {fault}"


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xff\xfe\xfd",
        b"[" * 200_000,
        b'["nonsense"]',
        b'"nonsense"',
        b'{"sha256": {}}',
        b'{"fingerprint": "print"}',
        b'{"sha256": 5, "fingerprint": "print"}',
        b'{"sha256": "text", "fingerprint": "print"}',
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, blob):
    stats.save(tmp_path, some_statistics(), "print")
    (tmp_path / stats.MANIFEST_FILE).write_bytes(blob)
    advice = f"delete it if {stats.MEAN_FILE} and {stats.STD_FILE} are your own, otherwise delete all three"
    assert bad_statistics(tmp_path) == f"{stats.MANIFEST_FILE} is damaged; {advice}"


# --- rank correlation ---


def mean_ranks(values):
    """Rank from its definition: the number of smaller values, and half of the number of other equal ones."""
    return [np.sum(values < value) + (np.sum(values == value) - 1) / 2 for value in values]


def test_rank_correlation_without_ties_by_hand():
    """Spearman's formula: 1 - 6 * sum of d^2 / (n * (n^2 - 1)), for the rank differences d = 1, 1, 1, 1, 0."""
    found = stats.rank_correlation(np.array([[2.0, 1.0, 40.0, 3.0, 500.0]]), np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    np.testing.assert_allclose(found, [1 - 6 * 4 / (5 * 24)])


def test_rank_correlation_depends_on_the_order_alone():
    reference = normal(shape=(20,))
    rows = np.stack([reference, 5 * reference**3 + 1, -reference])
    np.testing.assert_allclose(stats.rank_correlation(rows, reference), [1, 1, -1])


def test_rank_correlation_with_ties_is_the_correlation_of_the_mean_ranks():
    rng = np.random.default_rng(0)
    rows, reference = rng.integers(0, 4, (30, 9)).astype(np.float32), rng.integers(0, 5, 9).astype(np.float32)
    expected = [np.corrcoef(mean_ranks(row), mean_ranks(reference))[0, 1] for row in rows]
    np.testing.assert_allclose(stats.rank_correlation(rows, reference), expected, atol=1e-12)


def test_rank_correlation_of_two_features_is_plus_or_minus_one():
    rows = np.array([[1.0, 2.0], [2.0, 1.0]])
    np.testing.assert_allclose(stats.rank_correlation(rows, np.array([0.0, 7.0])), [1, -1])


def test_rank_correlation_of_a_constant_row_is_zero():
    assert stats.rank_correlation(np.zeros((1, 6)), np.arange(6.0)).tolist() == [0]


# --- scores ---


CONFUSION = np.array([[3, 1, 0], [1, 1, 0], [0, 0, 2]])


def test_probabilities_by_hand():
    logits = np.log([[1, 2, 5], [1, 1, 2]])
    np.testing.assert_allclose(
        stats.probabilities(logits + [[100], [-100]]), [[1 / 8, 2 / 8, 5 / 8], [1 / 4, 1 / 4, 1 / 2]]
    )


def test_probabilities_sum_to_one_for_huge_logits():
    p = stats.probabilities(np.array([[1e4, 0, -1e4], [1, 1, 1]]))
    np.testing.assert_allclose(p.sum(-1), 1)
    np.testing.assert_allclose(p[1], 1 / 3)


@pytest.mark.parametrize("shift", [0, 1e4, -1e4])
def test_balanced_cross_entropy_by_hand(shift):
    """Class 0: ln 2 and ln 4, class 2: ln 4; class 1 has no utterance."""
    logits = np.log([[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 1 / 2], [1 / 2, 1 / 4, 1 / 4]]) + shift
    found = stats.balanced_cross_entropy(logits, np.array([0, 0, 2]))
    assert isinstance(found, float)
    assert found == pytest.approx((1.5 * math.log(2) + math.log(4)) / 2)


def scores_of(confusion):
    return stats.Counts.of(confusion).scores()


def test_scores_of_a_confusion_matrix_by_hand():
    label = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 0, 0, 1, 1, 0, 2, 2])
    confusion = stats.confusion_matrix(label, predicted, 3)
    assert confusion.tolist() == CONFUSION.tolist()
    scores = scores_of(confusion)
    assert set(scores) == {"ua", "wa", "macro_f1"}
    assert scores["wa"] == pytest.approx(6 / 8)
    assert scores["ua"] == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert scores["macro_f1"] == pytest.approx((6 / 8 + 2 / 4 + 1) / 3)


def test_scores_of_several_matrices_at_once():
    scores = scores_of(np.stack([CONFUSION, CONFUSION.T]))
    np.testing.assert_allclose(scores["ua"], [(3 / 4 + 1 / 2 + 1) / 3] * 2)
    np.testing.assert_allclose(scores["wa"], [6 / 8] * 2)


def test_a_class_without_utterances_is_left_out_of_the_means():
    scores = scores_of(np.array([[2, 0, 0], [0, 1, 1], [0, 0, 0]]))
    assert scores["ua"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["wa"] == pytest.approx(3 / 4)
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)


def test_scores_of_no_utterance_are_nan():
    assert all(np.isnan(value) for value in scores_of(np.zeros((2, 2), int)).values())


@pytest.mark.parametrize("dtype", [int, float])
def test_always_predicting_the_majority_class_recalls_one_class_of_all(dtype):
    always = stats.Counts.of(CONFUSION.astype(dtype)).of_majority().scores()
    assert always["ua"] == pytest.approx(1 / 3)
    assert always["wa"] == pytest.approx(4 / 8)
    assert always["macro_f1"] == pytest.approx((2 * 4 / (4 + 8)) / 3)


def test_the_majority_is_one_of_labels_not_of_predictions():
    assert stats.Counts.of([[0, 2], [0, 1]]).of_majority().scores()["wa"] == pytest.approx(2 / 3)


def test_each_group_has_the_counts_of_its_own_utterances():
    label, predicted = np.array([0, 1, 1, 0, 1]), np.array([0, 1, 0, 1, 0])
    names, counts = stats.group_counts(["b", "a", "b", "b", "b"], label, predicted, 2)
    assert names == ["a", "b"]
    of_matrices = stats.Counts.of([[[0, 0], [0, 1]], [[1, 1], [2, 0]]])
    for found, expected in zip(counts, of_matrices, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_utterances_without_a_group_are_left_out_of_the_group_scores():
    label, predicted = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    found = stats.group_scores(*stats.group_counts(["b", "a", None, "b"], label, predicted, 2))
    assert found == {
        "a": {"n": 1, "ua": 1, "wa": 1, "macro_f1": 1},
        "b": {"n": 2, "ua": 1, "wa": 1, "macro_f1": 1},
    }
    assert list(found) == ["a", "b"]
    assert {type(value) for scores in found.values() for value in scores.values()} == {int, float}
    assert stats.group_scores(*stats.group_counts([None] * 4, label, predicted, 2)) == {}


def intervals(*confusions):
    return stats.speaker_intervals(stats.Counts.of(np.stack(confusions)))


def test_intervals_are_those_of_the_jackknife_over_speakers():
    confusions = np.random.default_rng(3).integers(0, 50, (7, 3, 3))
    found = intervals(*confusions)
    for name, score in scores_of(confusions.sum(0)).items():
        left_out = [scores_of(np.delete(confusions, speaker, 0).sum(0))[name] for speaker in range(7)]
        deviation = math.sqrt(6 / 7 * sum((value - np.mean(left_out)) ** 2 for value in left_out))
        reach = 2.446912 * deviation / (score * (1 - score))  # t of 6 degrees of freedom
        odds = [math.log(value / (1 - value)) - math.log(score / (1 - score)) for value in found[name]]
        assert odds == pytest.approx([-reach, reach], rel=1e-3)


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (30, 2.04227)])
def test_quantiles_of_students_t(freedom, t):
    assert stats._student_t(freedom) == pytest.approx(t, rel=1e-2)


@pytest.mark.parametrize("speakers", [6, 10, 24])
def test_95_percent_of_the_intervals_hold_the_true_score(speakers):
    """Recalls that differ between speakers and between the classes of a speaker, around a known mean."""
    random = np.random.default_rng(speakers)

    def recalls(*shape):
        return 1 / (1 + np.exp(-1.2 - 0.6 * random.normal(size=(*shape[:-1], 1)) - 0.6 * random.normal(size=shape)))

    true, hits = recalls(200_000, 5).mean(), 0
    for _ in range(1000):
        correct = random.binomial(8, recalls(speakers, 5)).astype(float)
        labelled = np.full_like(correct, 8)
        low, high = stats.speaker_intervals(stats.Counts(correct, labelled, labelled))["ua"]
        hits += low <= true <= high
    assert 930 <= hits <= 970


def test_intervals_are_over_speakers_not_utterances():
    """Half of the speakers are all right and half all wrong: single utterances would give a narrow interval."""
    right, wrong = np.array([[50, 0], [0, 50]]), np.array([[0, 50], [50, 0]])
    low, high = intervals(*[right, wrong] * 4)["ua"]
    assert low <= 0.25
    assert high >= 0.75
    assert intervals(*[right] * 8)["wa"] == (1, 1)


def test_one_speaker_leaves_everything_open():
    assert set(intervals(CONFUSION).values()) == {(0, 1)}


def test_a_class_that_one_speaker_alone_has_does_not_widen_the_interval_by_its_absence():
    """Without that class the mean would be over the others, which are recalled far better."""
    others = [np.diag([20 + speaker, 20, 0]) + np.eye(3, k=1, dtype=int) * [[1], [1], [0]] for speaker in range(9)]
    alone = np.diag([20, 20, 1]) + np.array([[0, 0, 0], [0, 0, 0], [9, 0, 0]])
    low, high = intervals(*others, alone)["ua"]
    assert 0.60 < low < scores_of(sum(others) + alone)["ua"] < high < 0.72


def test_intervals_of_a_thousand_classes_take_little_memory():
    """They need the counts of each class alone, not a matrix for each speaker or resample."""
    label = np.arange(4000) % 1000
    _, counts = stats.group_counts([f"{n % 50}" for n in range(4000)], label, label[::-1], 1000)
    assert sum(part.nbytes for part in counts) <= 3 * 50 * 1000 * 8
    assert len(stats.speaker_intervals(counts)) == 3


# --- paired differences ---


def differences(first, second):
    return stats.paired_differences(*(stats.Counts.of(np.stack(confusions)) for confusions in (first, second)))


def test_a_difference_is_that_of_the_jackknife_over_the_speakers_of_both_runs():
    random = np.random.default_rng(3)
    first, second = random.integers(0, 50, (2, 7, 3, 3))
    found = differences(first, second)
    for name in ("ua", "wa", "macro_f1"):
        difference, low, high, p = found[name]
        left_out = [
            scores_of(np.delete(second, speaker, 0).sum(0))[name] - scores_of(np.delete(first, speaker, 0).sum(0))[name]
            for speaker in range(7)
        ]
        deviation = math.sqrt(6 / 7 * sum((value - np.mean(left_out)) ** 2 for value in left_out))
        assert difference == pytest.approx(scores_of(second.sum(0))[name] - scores_of(first.sum(0))[name])
        assert (high - low) / 2 == pytest.approx(2.446912 * deviation, rel=1e-3)  # t of 6 degrees of freedom
        assert (low + high) / 2 == pytest.approx(difference)
        assert p == pytest.approx(stats._student_p(abs(difference) / deviation, 6))


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [(0, 5, 1), (1, 1, 0.5), (12.7062, 1, 0.05), (4.30265, 2, 0.05), (3.18245, 3, 0.05), (2.0687, 23, 0.05)]
    + [(2, 4, 0.116117), (5, 9, 0.000739), (1e9, 40, 0), (math.inf, 1, 0), (math.inf, 8, 0)],
)
def test_two_sided_p_of_students_t(t, freedom, p):
    assert stats._student_p(t, freedom) == pytest.approx(p, abs=1e-5)


@pytest.mark.parametrize("speakers", [4, 10, 24])
def test_95_percent_of_the_paired_intervals_hold_the_true_difference(speakers):
    """Two runs that share the difficulty of speakers and classes; the second has 0.4 more log odds, more or less."""
    random = np.random.default_rng(speakers)

    def recalls(count):
        shared = 1.2 + 0.6 * random.normal(size=(count, 1)) + 0.6 * random.normal(size=(count, 5))
        gain = 0.4 + 0.3 * random.normal(size=(count, 1))
        return 1 / (1 + np.exp(-np.stack([shared, shared + gain])))

    first, second = recalls(200_000)
    true, hits, narrower = (second - first).mean(), 0, 0
    labelled = np.full((speakers, 5), 8.0)
    for _ in range(1000):
        runs = [
            stats.Counts(random.binomial(8, recall).astype(float), labelled, labelled) for recall in recalls(speakers)
        ]
        _, low, high, _ = stats.paired_differences(*runs)["ua"]
        hits += low <= true <= high
        unpaired = [np.ptp(stats.speaker_intervals(run)["ua"]) for run in runs]
        narrower += high - low < math.hypot(*unpaired)
    assert 930 <= hits <= 970
    assert narrower > 700


def test_identical_runs_have_no_difference_and_a_p_of_1():
    run = np.random.default_rng(5).integers(0, 9, (6, 3, 3))
    assert set(differences(run, run).values()) == {(0, 0, 0, 1)}


def test_equal_scores_of_different_answers_have_a_p_of_1():
    """Each speaker gains in one class what it loses in another; sums of floats differ in their last bits."""
    first = [np.array([[7, 3, 0], [0, 10, 0], [0, 1, 9]])] * 5
    second = [np.array([[10, 0, 0], [3, 7, 0], [0, 1, 9]])] * 5
    assert differences(first, second)["ua"] == (0, 0, 0, 1)


def test_a_difference_that_is_the_same_for_all_speakers_is_certain():
    right, wrong = np.eye(2) * 5, np.eye(2)[::-1] * 5
    assert differences([wrong] * 4, [right] * 4)["wa"] == (1, 1, 1, 0)


def test_the_difference_of_one_speaker_or_of_no_utterance_is_open():
    assert differences([np.eye(2)], [np.eye(2)[::-1]])["ua"] == (-1, -1, 1, 1)
    difference, *others = differences([np.zeros((2, 2))] * 3, [np.zeros((2, 2))] * 3)["ua"]
    assert math.isnan(difference)
    assert others == [-1, 1, 1]


# --- calibration ---


def filled(bins):
    return [place for place, row in enumerate(bins) if row["n"]]


def test_calibration_error_by_hand():
    """Two at 0.90, one of them right: 0.40 too sure; two at 0.62, both right: 0.38 too unsure."""
    probability = np.array([[0.9, 0.1], [0.1, 0.9], [0.62, 0.38], [0.38, 0.62]])
    label = np.array([0, 0, 0, 1])
    assert stats.expected_calibration_error(probability, label) == pytest.approx(0.5 * 0.4 + 0.5 * 0.38)
    found = stats.reliability(probability, label)
    assert filled(found) == [9, 13]
    for place, n, confidence, accuracy in ((9, 2, 0.62, 1), (13, 2, 0.9, 0.5)):
        assert found[place]["n"] == n
        assert found[place]["confidence"] == pytest.approx(confidence)
        assert found[place]["accuracy"] == accuracy
        assert found[place]["low"] < confidence <= found[place]["high"]
    assert np.isnan(found[0]["accuracy"])
    assert np.isnan(found[0]["confidence"])


def test_calibration_error_weighs_the_bins_by_count():
    """Three at 0.9, two of them right; one at 0.6, wrong. One bin: 0.825 against 1/2."""
    probability = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    label = np.array([0, 0, 1, 1])
    expected = 3 / 4 * (0.9 - 2 / 3) + 1 / 4 * 0.6
    assert stats.expected_calibration_error(probability, label) == pytest.approx(expected)
    assert stats.expected_calibration_error(probability, label, bins=1) == pytest.approx(0.825 - 0.5)


@pytest.mark.parametrize("bins", [4, 15])
def test_bins_have_equal_width_and_include_their_upper_edge(bins):
    edges = np.arange(bins + 1) / bins
    for confidence, expected in zip(edges[1:], np.eye(bins, dtype=int).tolist()):
        just_below = np.nextafter(confidence, 0)
        for value in (confidence, just_below):
            found = stats.reliability(np.array([[value]]), np.array([0]), bins)
            assert [row["n"] for row in found] == expected
    assert set(found[0]) == {"low", "high", "n", "confidence", "accuracy"}
    np.testing.assert_allclose([row["low"] for row in found], edges[:-1])
    np.testing.assert_allclose([row["high"] for row in found], edges[1:])


def test_there_are_15_bins_by_default():
    """0.87 and 0.90 share the 14th of 15 bins; an edge of 16 lies between them."""
    probability, label = np.array([[0.87, 0.13], [0.9, 0.1]]), np.array([0, 1])
    assert filled(stats.reliability(probability, label)) == [13]
    assert stats.expected_calibration_error(probability, label) == pytest.approx(0.885 - 0.5)
    assert stats.expected_calibration_error(probability, label, 16) == pytest.approx((0.13 + 0.9) / 2)


@pytest.mark.parametrize(("confidence", "place"), [(0, 0), (1, 14), (1 + 1e-7, 14)])
def test_certainty_and_rounding_beyond_it_are_in_the_last_bin_and_zero_in_the_first(confidence, place):
    found = stats.reliability(np.array([[confidence]]), np.array([0]))
    assert filled(found) == [place]


def test_a_class_has_a_recall_a_precision_and_an_f1():
    label, predicted = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 3])
    by_class = stats.Counts.of(stats.confusion_matrix(label, predicted, 4)).class_scores()
    assert by_class["recall"].tolist() == [2 / 3, 1 / 2, 0, 0]
    assert by_class["precision"].tolist() == [1, 1 / 2, 0, 0]
    assert by_class["f1"].tolist() == [4 / 5, 1 / 2, 0, 0]


# --- all metrics together ---


def predictions(count=120, seed=0):
    """Labels, logits, speakers and folds; the third of the four classes has no utterance, the fourth one."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, count)
    label[-1] = 3
    logits = rng.normal(size=(count, 4)) + 2 * np.eye(4)[label]
    logits[-1] = [0, 0, 0, 5]
    fold = np.arange(count) * 7 % 12  # more than ten, so that the order of numbers and of texts differ
    fold[:5] = 3
    return label, logits, [f"speaker {place % 5}" for place in rng.permutation(count)], fold


CLASSES = ("happy", "sad", "angry", "calm")


def test_each_metric_is_that_of_its_own_function():
    label, logits, speaker, fold = predictions()
    metrics = stats.evaluate(label, logits, speaker, fold, CLASSES)
    probability = stats.probabilities(logits)
    predicted = logits.argmax(1)
    confusion = stats.confusion_matrix(label, predicted, 4)
    names, by_speaker = stats.group_counts(speaker, label, predicted, 4)
    by_class = stats.Counts.of(confusion).class_scores()
    expected = {
        "ua": scores_of(confusion)["ua"],
        "wa": np.mean(predicted == label),
        "macro_f1": scores_of(confusion)["macro_f1"],
        **{f"{name}_ci95": list(pair) for name, pair in stats.speaker_intervals(by_speaker).items()},
        **{f"majority_{name}": value for name, value in stats.Counts.of(confusion).of_majority().scores().items()},
        "chance_ua": 1 / 4,
        "classes": list(CLASSES),
        "recall": {
            "happy": np.mean(predicted[label == 0] == 0),
            "sad": np.mean(predicted[label == 1] == 1),
            "angry": 0,
            "calm": 1,
        },
        "precision": dict(zip(CLASSES, by_class["precision"])),
        "f1": dict(zip(CLASSES, by_class["f1"])),
        "n_utterances": 120,
        "confusion": confusion.tolist(),
        "speakers": stats.group_scores(names, by_speaker),
        "folds": [
            {"n": (fold == k).sum()} | scores_of(stats.confusion_matrix(label[fold == k], predicted[fold == k], 4))
            for k in range(12)
        ],
        "ece": stats.expected_calibration_error(probability, label),
    }
    bins = metrics.pop("reliability")
    assert metrics == expected
    assert list(metrics["speakers"]) == names == [f"speaker {number}" for number in range(5)]
    np.testing.assert_equal(bins, stats.reliability(probability, label))
    assert len(bins) == 15


def test_every_utterance_is_scored_in_one_fold_and_for_one_speaker():
    label, logits, speaker, fold = predictions()
    metrics = stats.evaluate(label, logits, speaker, fold, CLASSES)
    assert [row["n"] for row in metrics["folds"]] == np.bincount(fold).tolist()
    assert {name: row["n"] for name, row in metrics["speakers"].items()} == {s: speaker.count(s) for s in set(speaker)}
    assert sum(map(sum, metrics["confusion"])) == sum(row["n"] for row in metrics["reliability"]) == 120


def test_metrics_are_json():
    label, logits, speaker, fold = predictions()
    metrics = stats.evaluate(label, logits, speaker, fold, CLASSES)
    restored = json.loads(stats.json_bytes(metrics))
    assert list(restored) == list(metrics)
    assert restored["reliability"][0]["accuracy"] is None
    assert restored["folds"] == metrics["folds"]
    assert all(type(row["n"]) is int for row in restored["reliability"])


def test_one_test_set_is_one_fold_with_the_scores_of_all():
    label, logits, speaker, _ = predictions()
    metrics = stats.evaluate(label, logits, speaker, np.zeros_like(label), CLASSES)
    assert metrics["folds"] == [{"n": 120} | {name: metrics[name] for name in ("ua", "wa", "macro_f1")}]


# --- linear discriminant analysis ---


def correlated(rows, dim, classes, seed=0):
    """Correlated features and unbalanced classes: half of the rows are of the first class."""
    rng = np.random.default_rng(seed)
    label = np.where(np.arange(rows) < rows // 2, 0, np.arange(rows) % classes)
    noise = rng.normal(size=(rows, dim)) @ rng.normal(size=(dim, dim)) / np.sqrt(dim)
    means = rng.normal(size=(classes, dim))
    return (means[label] + noise).astype(np.float32), label


def textbook_lda(x, label, classes, shrinkage):
    """Means, pooled covariance of the scaled features, and one solve, in float64."""
    x = x.astype(np.float64)
    means = np.stack([x[label == number].mean(0) for number in range(classes)])
    deviation = np.maximum(np.sqrt(np.mean((x - means[label]) ** 2, 0)), 0.03)
    means, within = means / deviation, (x - means[label]) / deviation
    covariance = within.T @ within / len(x)
    target = np.trace(covariance) / x.shape[1] * np.eye(x.shape[1])
    kernel = np.linalg.solve((1 - shrinkage) * covariance + shrinkage * target, means.T)
    return kernel / deviation[:, None], -np.diagonal(means @ kernel) / 2


def assert_textbook_lda(x, label, classes):
    kernels, biases = stats.fit_lda(x, label, classes)
    for shrinkage, kernel, bias in zip(stats.SHRINKAGES, kernels, biases, strict=True):
        expected_kernel, expected_bias = textbook_lda(x, label, classes, shrinkage)
        np.testing.assert_allclose(kernel, expected_kernel, rtol=0, atol=1e-4 * np.abs(expected_kernel).max())
        np.testing.assert_allclose(bias, expected_bias, rtol=0, atol=1e-4 * np.abs(expected_bias).max())


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize(("rows", "dim"), [(400, 20), (60, 60), (59, 60), (30, 80), (400, 1)])
def test_lda_is_that_of_a_textbook_for_each_shrinkage(rows, dim, classes):
    x, label = correlated(rows, dim, classes)
    x[:, -1] *= 0.01 if dim > 1 else 1  # below the floor of the deviation
    kernels, biases = stats.fit_lda(x, label, classes)
    assert (kernels.shape, biases.shape) == ((7, dim, classes), (7, classes))
    assert kernels.dtype == np.float32
    assert_textbook_lda(x, label, classes)


@pytest.mark.parametrize("dim", [5, 100])
def test_lda_accepts_a_class_with_a_single_row(dim):
    x, label = correlated(60, dim, 2)
    label[-1] = 2
    assert_textbook_lda(x, label, 3)


def test_lda_of_one_feature_by_hand():
    """Deviation 0.2, means 0 and 1: kernel 1 / 0.2^2, and the boundary is halfway."""
    kernel, bias = stats.fit_lda(np.array([[-0.2], [0.2], [0.8], [1.2]], np.float32), np.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(kernel, [[[0, 25]]] * 7, rtol=1e-5)
    np.testing.assert_allclose(bias, [[0, -12.5]] * 7, rtol=1e-5)


def test_lda_does_not_divide_by_a_deviation_below_its_floor():
    """Deviation 0.01, floor 0.03: the scaled variance is 1/9, the scaled mean 1/0.03."""
    kernel, bias = stats.fit_lda(np.array([[-0.01], [0.01], [0.99], [1.01]], np.float32), np.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(kernel, [[[0, 9 / 0.03 / 0.03]]] * 7, rtol=1e-4)
    np.testing.assert_allclose(bias, [[0, -9 / 0.03 / 0.03 / 2]] * 7, rtol=1e-4)


@pytest.mark.parametrize(("rows", "dim"), [(300, 10), (30, 100)])
def test_lda_has_equal_priors(rows, dim):
    """Halfway between two means both classes score the same, however many utterances each has."""
    x, _ = correlated(rows, dim, 2)
    label = (np.arange(rows) < rows // 10).astype(int)
    x[label == 1] += 1
    kernel, bias = stats.fit_lda(x, label, 2)
    halfway = (x[label == 0].mean(0) + x[label == 1].mean(0)) / 2
    score = halfway @ kernel + bias
    np.testing.assert_allclose(score[:, 0], score[:, 1], rtol=0, atol=1e-3 * np.abs(halfway @ kernel).max())


@pytest.mark.parametrize(("rows", "dim"), [(200, 8), (20, 50)])
def test_lda_never_predicts_a_class_without_training_rows(rows, dim):
    x, label = correlated(rows, dim, 3)
    label = np.array([0, 2, 4])[label]
    kernel, bias = stats.fit_lda(x, label, 6)
    kernel_of_seen, bias_of_seen = stats.fit_lda(x, label // 2, 3)
    np.testing.assert_array_equal(kernel[..., [0, 2, 4]], kernel_of_seen)
    np.testing.assert_array_equal(bias[..., [0, 2, 4]], bias_of_seen)
    for absent in (1, 3, 5):
        np.testing.assert_allclose(kernel[..., absent], kernel_of_seen.mean(-1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(bias[..., absent], bias_of_seen.mean(-1) - 6 * math.log(10), rtol=1e-5)
    for scale in (0.01, 1, 1000):
        predicted = (normal(1, (100, dim)) * scale @ kernel + bias[:, None]).argmax(-1)
        assert set(np.unique(predicted)) <= {0, 2, 4}


@pytest.mark.parametrize("rows", [4, 30])
@pytest.mark.parametrize("value", [None, np.nan, np.inf, -np.inf])
def test_lda_of_degenerate_features_is_zero(rows, value):
    """No variance within the classes, or a value that is not finite."""
    label = np.arange(rows) % 2
    x = np.repeat(label[:, None], 5, 1).astype(np.float32)
    if value is not None:
        x = normal(shape=(rows, 5))
        x[1, 2] = value
    with np.errstate(all="ignore"):
        kernel, bias = stats.fit_lda(x, label, 3)
    assert (kernel.shape, bias.shape, kernel.dtype) == ((7, 5, 3), (7, 3), np.float32)
    assert not kernel.any()
    assert not bias.any()


@pytest.mark.parametrize("rows", [4, 30])
def test_lda_ignores_a_feature_whose_squares_overflow(rows):
    x = normal(shape=(rows, 5))
    x[1, 2] = 1e30
    with np.errstate(over="ignore"):
        kernel, bias = stats.fit_lda(x, np.arange(rows) % 2, 2)
    assert np.isfinite(kernel).all()
    assert np.isfinite(bias).all()
    assert (kernel != 0).any((0, 2)).tolist() == [True, True, False, True, True]


def test_lda_separates_classes_by_features_that_vary_little():
    x, label = correlated(100, 4, 2)
    x[:, 0] = label
    kernel, bias = stats.fit_lda(x, label, 2)
    assert ((x @ kernel + bias[:, None]).argmax(-1) == label).all()


# --- the weights of the ensemble ---


def part_logits(right, wrong):
    """Two classes with `right` right and `wrong` wrong utterances each; logits +1 for the prediction and -1."""
    label = np.repeat([0, 1], right + wrong)
    predicted = label ^ np.tile(np.repeat([0, 1], [right, wrong]), 2)
    return 2.0 * np.eye(2)[predicted] - 1, label


def part_loss(weight, right, wrong):
    """Mean cross-entropy of `part_logits` times a weight; it is smallest at ln(right / wrong) / 2."""
    losses = right * math.log1p(math.exp(-2 * weight)) + wrong * math.log1p(math.exp(2 * weight))
    return losses / (right + wrong)


GRID = [0.02 * 1.25**step for step in range(24)]  # ..., 0.455, 0.568, 0.711, 0.888, 1.110, ...


def test_the_constants_of_the_ensemble():
    assert stats.SHRINKAGES == (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.8)
    assert stats.MIN_SPREAD == 0.03
    assert list(stats.LOGIT_WEIGHTS) == GRID
    assert stats.LOSS_POWER == 4


def test_parts_of_equal_loss_get_equal_weights():
    """Three of four right: the best weight is 0.549, so 0.568 of the grid; of their sum it is 0.549 / (2 * 0.568)."""
    logits, label = part_logits(3, 1)
    found = stats.fit_ensemble_weights([logits], [logits[None, None]], [label])
    assert found == (0, (1,), *(pytest.approx(value) for value in (GRID[15], GRID[15], 1 / GRID[14])))


def test_the_part_with_the_smaller_loss_gets_the_larger_share():
    """Of each class 6 utterances are right in both parts, 1 in the linear part alone, and 1 in none."""
    hidden, label = part_logits(6, 2)
    linear, _ = part_logits(7, 1)
    found = stats.fit_ensemble_weights([hidden], [linear[None, None]], [label])
    power = (part_loss(GRID[15], 6, 2) / part_loss(GRID[17], 7, 1)) ** 4
    assert power == pytest.approx(4.9, abs=0.1)
    assert found.hidden == pytest.approx(2 / (1 + power) * GRID[15])
    assert found.linear == pytest.approx(2 * power / (1 + power) * GRID[17])

    def calibrated_loss(scale):
        both, difference = scale * (found.hidden + found.linear), scale * (found.linear - found.hidden)
        margins = [both] * 6 + [difference, -both]
        return sum(math.log1p(math.exp(-2 * margin)) for margin in margins)

    assert found.temperature == pytest.approx(1 / min(GRID, key=calibrated_loss))


@pytest.mark.parametrize("useless", [0, -1])
def test_a_part_without_information_gets_the_weight_zero(useless):
    logits, label = part_logits(3, 1)
    share = 1 / (1 + (part_loss(GRID[15], 3, 1) / math.log(2)) ** 4)
    only_hidden = stats.fit_ensemble_weights([logits], [useless * logits[None, None]], [label])
    assert (only_hidden.hidden, only_hidden.linear) == pytest.approx((2 * share * GRID[15], 0))
    only_linear = stats.fit_ensemble_weights([useless * logits], [logits[None, None]], [label])
    assert (only_linear.hidden, only_linear.linear) == pytest.approx((0, 2 * share * GRID[15]))
    # 0.549 / (2 * share * 0.568) = 0.796 lies between 0.711 and 0.888.
    assert only_hidden.temperature == only_linear.temperature == 1 / GRID[16]


def test_without_any_information_both_weights_are_zero():
    found = stats.fit_ensemble_weights([np.zeros((4, 2))], [np.zeros((1, 7, 4, 2))], [np.array([0, 0, 1, 1])])
    assert found == (0, (1,), 0, 0, 1 / GRID[0])


def test_a_perfect_linear_part_leaves_nothing_to_the_hidden_layer():
    hidden, label = part_logits(3, 1)
    perfect = 1e4 * (2 * np.eye(2)[label] - 1)
    found = stats.fit_ensemble_weights([hidden], [perfect[None, None]], [label])
    assert 0 < found.hidden < 1e-30
    assert found.linear == pytest.approx(2 * GRID[0])


def test_each_class_counts_the_same_in_the_weights():
    """All 9 utterances of one class are right and the only one of the other is wrong: no better than chance."""
    label = np.array([0] * 9 + [1])
    logits = np.tile([1.0, -1.0], (10, 1))
    assert stats.fit_ensemble_weights([logits], [logits[None, None]], [label])[:4] == (0, (1,), 0, 0)


def test_the_shrinkage_has_the_lowest_loss_over_seeds_that_count_the_same():
    """The first shrinkage is better for the seed with few utterances, the second for the one with many and in total."""
    (few, label), (many, other_label) = part_logits(7, 1), part_logits(60, 20)
    linear = [np.stack([few, part_logits(5, 3)[0]])[None], np.stack([many, part_logits(64, 16)[0]])[None]]
    hidden = [np.zeros_like(few), np.zeros_like(many)]
    found = stats.fit_ensemble_weights(hidden, linear, [label, other_label])
    loss = (part_loss(GRID[16], 7, 1) + part_loss(GRID[16], 60, 20)) / 2
    share = 1 / (1 + (math.log(2) / loss) ** 4)
    assert found[:3] == (0, (1,), 0)
    assert found.linear == pytest.approx(2 * (1 - share) * GRID[16])
    swapped = [logits[:, ::-1] for logits in linear]
    assert stats.fit_ensemble_weights(hidden, swapped, [label, other_label]) == found._replace(shrinkage=1)


def test_the_first_of_equal_shrinkages_is_chosen():
    logits, label = part_logits(3, 1)
    linear = np.stack([0 * logits, logits, logits])[None]
    assert stats.fit_ensemble_weights([logits], [linear], [label]).shrinkage == 1


def explicit_weights(hidden, linear, label):
    """The rule of `fit_ensemble_weights` as loops over seeds, shrinkages, layers and the grid."""

    def loss(parts):
        return np.mean([stats.balanced_cross_entropy(part, true) for part, true in zip(parts, label)])

    def best(parts, grid):
        return min((loss([weight * part for part in parts]), weight) for weight in grid)

    def sum_of_layers(shrinkage):
        layers = [[part[layer][shrinkage] for part in linear] for layer in range(len(linear[0]))]
        shares = [best(parts, [0, *GRID])[0] ** -4 for parts in layers]
        shares = [share / sum(shares) for share in shares]
        return shares, [sum(share * part for share, part in zip(shares, parts)) for parts in zip(*layers)]

    hidden_loss, hidden_weight = best(hidden, [0, *GRID])
    linear_loss, shrinkage, linear_weight = min(
        (value, index, weight) for index in range(7) for value, weight in [best(sum_of_layers(index)[1], [0, *GRID])]
    )
    shares, linear = sum_of_layers(shrinkage)
    hidden_weight *= 2 * linear_loss**4 / (linear_loss**4 + hidden_loss**4)
    linear_weight *= 2 * hidden_loss**4 / (linear_loss**4 + hidden_loss**4)
    total = [hidden_weight * one + linear_weight * other for one, other in zip(hidden, linear)]
    return shrinkage, *shares, hidden_weight, linear_weight, 1 / best(total, GRID)[1]


@pytest.mark.parametrize(("seed", "layers"), [(0, 1), (1, 1), (2, 2), (3, 2), (4, 5)])
def test_the_weights_of_several_seeds_and_layers_follow_the_rule(seed, layers):
    rng = np.random.default_rng(seed)
    label = [rng.integers(0, 3, count) for count in (15, 40, 22)]
    hidden = [rng.normal(size=(len(true), 3)) + 1.5 * np.eye(3)[true] for true in label]
    skill = rng.uniform(0, 2, (layers, 1, 1, 1))
    linear = [rng.normal(size=(layers, 7, len(true), 3)) + skill * np.eye(3)[true] for true in label]
    shrinkage, shares, *rest = stats.fit_ensemble_weights(hidden, linear, label)
    assert (shrinkage, *shares, *rest) == pytest.approx(explicit_weights(hidden, linear, label))


# --- layers ---


def test_layers_of_equal_loss_get_equal_shares():
    logits, label = part_logits(3, 1)
    for count in (1, 2, 5):
        shares = stats.choose_shrinkage([np.tile(logits, (count, 7, 1, 1))], [label]).layers
        np.testing.assert_allclose(shares, np.full(count, 1 / count), rtol=1e-12)


def test_the_layer_with_the_smallest_loss_gets_the_largest_share():
    """The shares are as the inverse fourth powers of the losses."""
    layers, losses = zip(*((part_logits(right, 8 - right)[0], right) for right in (4, 7, 6)))
    label = part_logits(4, 4)[1]
    found = stats.choose_shrinkage([np.stack(layers)[:, None]], [label])
    losses = np.array([math.log(2), part_loss(GRID[17], 7, 1), part_loss(GRID[15], 6, 2)])
    np.testing.assert_allclose(found.layers, losses**-4 / (losses**-4).sum(), rtol=1e-6)
    assert found.layers.argmax() == 1


def test_the_shrinkage_of_layers_is_that_of_their_best_sum():
    """Each layer alone is best with the second shrinkage, but with the first their mistakes cancel each other."""
    (good, label), wrong = part_logits(8, 0), np.zeros((2, 16, 1))
    wrong[0, [0, 1, 8, 9]] = wrong[1, [2, 3, 10, 11]] = 1
    alike = np.where(np.isin(np.arange(16), [0, 8])[:, None], -good, good)
    layers = np.stack([np.stack([good * (1 - 1.9 * mistakes), alike]) for mistakes in wrong])
    single = [stats.choose_shrinkage([layer[None]], [label]).shrinkage for layer in layers]
    assert (single, stats.choose_shrinkage([layers], [label]).shrinkage) == ([1, 1], 0)


def test_the_logits_of_layers_are_those_of_each_layer_alone():
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=(5, 3 * 4)), rng.normal(size=(3, 7, 4, 2)), rng.normal(size=(3, 7, 2))
    found = stats.layer_logits(x, kernel, bias)
    assert found.shape == (3, 7, 5, 2)
    for layer, shrinkage in np.ndindex(3, 7):
        own = x[:, 4 * layer : 4 * layer + 4]
        np.testing.assert_allclose(found[layer, shrinkage], own @ kernel[layer, shrinkage] + bias[layer, shrinkage])


def test_the_linear_models_of_layers_become_one_with_the_logits_of_their_weighted_sum():
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=(5, 3 * 4)), rng.normal(size=(3, 7, 4, 2)), rng.normal(size=(3, 7, 2))
    weights = stats.EnsembleWeights(2, (0.5, 0.2, 0.3), 1.0, 1.0, 1.0)
    whole_kernel, whole_bias = weights.add_layers(kernel, bias)
    assert (whole_kernel.shape, whole_bias.shape) == ((12, 2), (2,))
    expected = sum(
        share * (own @ kernel[layer, 2] + bias[layer, 2])
        for layer, (share, own) in enumerate(zip(weights.layers, (x[:, :4], x[:, 4:8], x[:, 8:])))
    )
    np.testing.assert_allclose(x @ whole_kernel + whole_bias, expected)


# --- fusion ---


def answers_of(label, *skills, seed=0, classes=3):
    """Calibrated probabilities of runs that make independent mistakes, the fewer the larger their skill."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(len(skills), len(label), classes))
    logits[:, np.arange(len(label)), label] += np.array(skills)[:, None]
    scale = np.array([skill if skill else 0.05 for skill in skills])  # of logits of unit variance
    return stats.probabilities(logits * scale[:, None, None])


def labels_and_speakers(count=600, classes=3):
    return np.arange(count) % classes, np.array([f"s{number % 20}" for number in range(count)])


def everywhere(probability):
    return np.ones(probability.shape[:2], bool)


def fit(probability, label, speaker):
    return stats.fit_fusion(probability, everywhere(probability), label, speaker)


def fuse(probability, weights, temperature, present=None):
    present = everywhere(probability) if present is None else present
    fusion = stats.FusionWeights(np.array(weights), temperature)
    return fusion.mean(probability, present), fusion.temperatures(present)


def fused_loss(probability, fusion, label):
    mean, temperature = fuse(probability, *fusion)
    return stats.balanced_cross_entropy(mean / temperature[:, None], label)


def test_a_fusion_is_the_weighted_mean_of_log_probabilities():
    probability = answers_of(np.array([0, 1, 2, 0]), 1, 2)
    mean, temperature = fuse(probability, [0.3, 0.7], 0.8)
    np.testing.assert_allclose(mean, 0.3 * np.log(probability[0]) + 0.7 * np.log(probability[1]))
    assert temperature.tolist() == [0.8] * 4


def test_where_runs_lack_an_utterance_the_others_answer_it_with_their_own_calibration():
    probability = answers_of(np.array([0, 1, 2]), 1, 2, 1)
    present = np.array([[True, False, False], [True, True, False], [True, True, True]])
    mean, temperature = fuse(probability, [0.5, 0.5, 0], 0.8, present)
    np.testing.assert_allclose(mean[1], np.log(probability[1, 1]), atol=1e-9)
    np.testing.assert_allclose(mean[2], np.log(probability[2, 2]), atol=1e-9)  # a run without weight
    assert temperature.tolist() == [0.8, 1, 1]


def test_a_probability_of_0_is_no_veto():
    probability = np.array([[[1.0, 0.0]], [[0.4, 0.6]]])
    mean, _ = fuse(probability, [0.5, 0.5], 1)
    assert np.isfinite(mean).all()


def test_a_class_that_a_run_does_not_know_takes_the_probability_of_the_others():
    probability = np.array([[[0.5, 0.2, 0.3, 0.0]], [[0.9, 0.1, 0.0, 0.0]]])
    known = np.array([[[True, True, True, False]], [[True, True, False, False]]])
    found = stats.complete_probabilities(probability, known)
    np.testing.assert_allclose(found.sum(-1), 1)
    np.testing.assert_allclose(found[1, 0], [0.9 * 0.45, 0.1 * 0.45, 0.3, 0.25])
    np.testing.assert_allclose(found[0, 0], [0.5 * 0.75, 0.2 * 0.75, 0.3 * 0.75, 0.25])


@pytest.mark.parametrize("skill", [1.0, 2.0])
def test_a_run_without_information_gets_no_weight(skill):
    label, speaker = labels_and_speakers()
    weights = fit(answers_of(label, 0, skill, 0), label, speaker)
    assert weights.weights.tolist() == [0, 1, 0]
    assert weights.temperature == 1


def test_a_copy_of_a_run_gets_no_weight():
    label, speaker = labels_and_speakers()
    probability = answers_of(label, 1.5)
    assert sorted(fit(np.concatenate([probability, probability]), label, speaker).weights) == [0, 1]


def test_runs_with_independent_mistakes_share_the_weight_and_sharpen_each_other():
    label, speaker = labels_and_speakers()
    probability = answers_of(label, 1.5, 1.5, 0.7)
    weights = fit(probability, label, speaker)
    assert weights.weights.sum() == pytest.approx(1)
    assert abs(weights.weights[0] - weights.weights[1]) < 0.3
    assert 0 < weights.weights[2] < min(weights.weights[:2])
    assert weights.temperature < 1
    unseen = answers_of(label, 1.5, 1.5, 0.7, seed=1)
    singles = [stats.balanced_cross_entropy(np.log(one), label) for one in unseen]
    assert fused_loss(unseen, weights, label) < 0.8 * min(singles)


def test_the_p_of_a_gain_is_one_sided_over_the_speakers():
    gain = np.array([0.5, 1.5, 1.0, -0.5, 2.5])
    t = gain.mean() / (gain.std(ddof=1) / math.sqrt(5))
    assert stats._one_sided_p(gain) == pytest.approx(stats._student_p(t, 4) / 2)
    assert stats._one_sided_p(np.array([2.132, -2.132, 0, 0, 0]) + 1) == pytest.approx(0.1058, abs=1e-3)
    assert stats._one_sided_p(-gain) == stats._one_sided_p(np.zeros(5)) == stats._one_sided_p(gain[:1]) == 1
    assert stats._one_sided_p(np.ones(5)) == pytest.approx(0)


def test_a_gain_on_a_few_speakers_alone_gives_no_weight():
    """The second run knows what the first does not, but for one speaker of twenty."""
    label, speaker = labels_and_speakers()
    first, second, noise = answers_of(label, 1.5, 1.5, 0)
    probability = np.stack([first, np.where((speaker == "s3")[:, None], second, noise)])
    assert fit(probability, label, speaker).weights.tolist() == [1, 0]


def test_all_classes_count_the_same_however_many_utterances_they_have():
    label, speaker = labels_and_speakers()
    probability = answers_of(label, 1.5, 1.3)
    often = np.concatenate([np.arange(600), *[np.flatnonzero(label == 0)] * 4])
    once, repeated = fit(probability, label, speaker), fit(probability[:, often], label[often], speaker[often])
    assert repeated.weights.tolist() == once.weights.tolist()
    assert repeated.temperature == once.temperature


def test_with_one_speaker_the_best_run_is_taken():
    label, _ = labels_and_speakers(30)
    assert fit(answers_of(label, 0.5, 2.0), label, np.array(["s"] * 30)).weights.tolist() == [0, 1]


def test_the_weights_are_chosen_on_the_utterances_that_runs_have():
    label, speaker = labels_and_speakers()
    probability = answers_of(label, 1.5, 1.5)
    present = everywhere(probability)
    present[1, ::3] = False
    probability[1, ::3] = 0
    weights = stats.fit_fusion(probability, present, label, speaker)
    assert weights.weights.min() > 0.2

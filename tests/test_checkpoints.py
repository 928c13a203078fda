"""The results folder of train.py: its lock, its checkpoints, and runs that are killed."""

import contextlib
import errno
import io
import itertools
import json
import math
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ARTIFACTS, ROOT, SMALL, many_speakers, rows_of
from make_sample import write_sample

import stats
import train

OPTIONS = ("--epochs", "16", "--patience", "16", "--seeds", "2", "--width", "8", "--folds", "3")
#: The files that must not depend on how often a run was interrupted; metrics.json and config.json name the folder.
IDENTICAL = sorted(ARTIFACTS - {"lock", "train.log", "report.html", "metrics.json", "config.json"})
DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


class Interrupted(Exception):
    pass


class Killed(BaseException):
    pass


# --- helpers ---


def run_again(place, run, *more):
    return train.main([str(place / "data"), "--out", str(run), *OPTIONS, *more])


def results(run):
    """All results of a run, without its duration and the name of its folder."""
    metrics = json.loads((run / "metrics.json").read_text())
    config = json.loads((run / "config.json").read_text())
    for name in ("seconds", "command", "settings"):
        del metrics[name]
    del config["options"]["out"]
    return {"metrics": metrics, "config": config} | {name: (run / name).read_bytes() for name in IDENTICAL}


def contents(folder):
    """The bytes of every file but the lock, which each run writes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def checkpoints(run):
    """The checkpoints, the newest last."""
    return sorted(run.glob("checkpoint-*.npz"), key=lambda path: train.read_checkpoint(path)[0]["epoch"])


def interrupt_after(patch, calls):
    """Save a checkpoint after every call of the compiled program, and interrupt training after some of them."""
    real, made = train.RunFolder.checkpoint_if_due, itertools.count(1)

    def save_and_interrupt(run, progress, split):
        real(run, progress, split)
        if next(made) == calls:
            raise Interrupted

    patch.setattr(train.RunFolder, "checkpoint_if_due", save_and_interrupt)
    patch.setattr(train, "MAX_SAVE_SHARE", math.inf)


def interrupt(calls, *arguments):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, calls)
        train.main([*map(str, arguments)])


def rewrite(path, change):
    """Change a checkpoint, and write it with the right checksums."""
    description, arrays = train.read_checkpoint(path)
    change(description, arrays)
    if description:
        arrays["description"] = np.frombuffer(json.dumps(description).encode(), np.uint8)
    stats.write_files(path.parent, {path.name: stats.npz_bytes(arrays)})


@pytest.fixture(scope="module")
def place(tmp_path_factory, jax_stack):
    """A folder `data`, an unbroken run `unbroken`, and a run `interrupted` with checkpoints of epochs 8 and 12.

    Do not change them.
    """
    place = tmp_path_factory.mktemp("place")
    write_sample(place / "data", actors=4, dim=24)
    for run in ("first", "unbroken"):  # the first computes the statistics in DIR
        assert run_again(place, place / run) == 0
    interrupt(3, place / "data", "--out", place / "interrupted", *OPTIONS)
    return place


@pytest.fixture
def interrupted(place, tmp_path):
    """A copy of the interrupted run."""
    return shutil.copytree(place / "interrupted", tmp_path / "run")


# --- resuming ---


def test_the_same_command_resumes_with_the_results_of_an_unbroken_run(place, interrupted, caplog):
    caplog.set_level("INFO", "train")
    assert [train.read_checkpoint(path)[0]["epoch"] for path in checkpoints(interrupted)] == [8, 12]
    assert rows_of(interrupted / "history.csv")[-1]["epoch"] == "12"
    assert run_again(place, interrupted) == 0
    assert "RESUMING from epoch 12 of the unfinished run" in caplog.text
    assert results(interrupted) == results(place / "unbroken")
    assert {path.name for path in interrupted.iterdir()} == ARTIFACTS
    log_text = (interrupted / "train.log").read_text()
    assert log_text.index("epoch 8/16") < log_text.index("RESUMING") < log_text.index("epoch 16/16")


def test_a_run_interrupted_after_every_call_gives_the_results_of_an_unbroken_one(place, tmp_path):
    for _ in range(4):
        interrupt(1, place / "data", "--out", tmp_path / "run", *OPTIONS)
    assert run_again(place, tmp_path / "run") == 0
    assert results(tmp_path / "run") == results(place / "unbroken")


def write_layers(folder, vectors):
    """The vectors of a folder as the first of two layers, in the form (L, D)."""
    folder.mkdir()
    for path in sorted(vectors.glob("*.npz")):
        x = np.load(path)["emb"]
        np.savez(folder / path.name, hidden_states=np.stack([x, np.sin(x)]))
    return folder


@pytest.mark.parametrize("more", ["--sweep 3", "--adapt 4", "--layers --adapt"])
def test_sweeps_adaptation_and_layers_resume_with_the_results_of_an_unbroken_run(place, tmp_path, caplog, more):
    caplog.set_level("INFO", "train")
    data, words = place / "data", [*OPTIONS, *more.split()]
    if "--layers" in words:
        data = write_layers(tmp_path / "data", data)
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    assert train.main([str(data), "--out", str(unbroken), *words]) == 0
    interrupt(2, data, "--out", run, *words)
    assert train.main([str(data), "--out", str(run), *words]) == 0
    assert "RESUMING from epoch 8 of" in caplog.text
    assert results(run) == results(unbroken)


def test_the_options_that_do_not_change_the_results_may_differ(place, interrupted, jax_stack, monkeypatch):
    monkeypatch.setattr(jax_stack, "default_backend", lambda: "gpu")
    assert run_again(place, interrupted, "--no-compile-cache", "--recompute-stats", "--require-gpu") == 0
    assert results(interrupted)["predictions.csv"] == results(place / "unbroken")["predictions.csv"]


def test_fresh_removes_the_checkpoints_and_starts_over(place, interrupted, monkeypatch, caplog):
    caplog.set_level("INFO", "train")
    (interrupted / f".checkpoint-0.npz.{'0a' * 8}.tmp").write_bytes(b"half of a checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(train, "MAX_SAVE_SHARE", 0)
        assert run_again(place, interrupted, "--fresh") == 0
    assert "RESUMING" not in caplog.text
    assert results(interrupted)["model.npz"] == results(place / "unbroken")["model.npz"]
    assert {path.name for path in interrupted.iterdir()} == ARTIFACTS


def test_a_run_that_has_finished_starts_over(place, tmp_path, caplog):
    caplog.set_level("INFO", "train")
    run = shutil.copytree(place / "unbroken", tmp_path / "run")
    assert run_again(place, run) == 0
    assert "RESUMING" not in caplog.text
    assert results(run) == results(place / "unbroken")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_resumes_on_another_number_of_devices(place, tmp_path, jax_stack, monkeypatch, before, after):
    """9 models fill one device, and two only with a tenth that does nothing."""
    if jax_stack.device_count() < 2:
        pytest.skip("there is only one device")

    def use(devices):
        mesh = jax_stack.sharding.Mesh(np.array(jax_stack.devices()[:devices]), ("population",))
        monkeypatch.setattr(train, "population_mesh", lambda members: mesh)

    arguments = (str(place / "data"), "--out", str(tmp_path / "run"), "--epochs", "8", "--width", "8")
    arguments += ("--seeds", "3", "--folds", "2")
    use(before)
    interrupt(1, *arguments)
    use(after)
    assert train.main([*arguments]) == 0
    resumed = {name: (tmp_path / "run" / name).read_bytes() for name in IDENTICAL}
    assert train.main([*arguments, "--fresh"]) == 0
    assert {name: (tmp_path / "run" / name).read_bytes() for name in IDENTICAL} == resumed


def test_a_fresh_start_of_a_finished_run_is_resumed_without_fresh(place, tmp_path, caplog):
    caplog.set_level("INFO", "train")
    run = shutil.copytree(place / "unbroken", tmp_path / "run")
    interrupt(2, place / "data", "--out", run, *OPTIONS, "--fresh")
    assert run_again(place, run) == 0
    assert "RESUMING from epoch 8" in caplog.text
    assert results(run) == results(place / "unbroken")


# --- checkpoints that cannot be used ---


@pytest.mark.parametrize("damage", ["a flipped byte", "truncation", "no bytes"])
def test_if_the_newest_checkpoint_is_damaged_a_warning_is_logged_and_the_one_before_is_used(
    place, interrupted, caplog, damage
):
    newest = checkpoints(interrupted)[-1]
    blob = bytearray(newest.read_bytes())
    blob[len(blob) // 2] ^= 1
    newest.write_bytes({"a flipped byte": blob, "truncation": blob[:-5], "no bytes": b""}[damage])
    caplog.set_level("INFO", "train")
    assert run_again(place, interrupted) == 0
    assert f"{newest} cannot be used" in caplog.text
    assert "RESUMING from epoch 8 of" in caplog.text
    assert results(interrupted) == results(place / "unbroken")


def test_a_changed_byte_anywhere_in_a_checkpoint_never_changes_what_is_read(interrupted):
    """In the data of a few arrays at random positions, and in many places of the directory, which has no checksum."""
    path, random = checkpoints(interrupted)[-1], np.random.default_rng(0)
    description, arrays = train.read_checkpoint(path)
    blob = path.read_bytes()
    directory = blob.index(b"PK\x01\x02")
    assert len(blob) - directory > 1000
    positions = [*random.integers(0, directory, 500), *random.integers(directory, len(blob), 700)]
    header = blob.index(b"\x93NUMPY")  # the headers of the first array, byte by byte
    positions += range(header + 128)
    detected = 0
    with path.open("r+b", buffering=0) as file:
        for position in positions:
            os.pwrite(file.fileno(), bytes([blob[position] ^ 1 << random.integers(8)]), position)
            try:
                found = train.read_checkpoint(path)
            except stats.DataError:
                detected += 1
            else:
                assert found[0] == description, position
                assert list(found[1]) == list(arrays), position
                for name, array in arrays.items():
                    assert (found[1][name].dtype, found[1][name].shape) == (array.dtype, array.shape), position
                    assert found[1][name].tobytes() == array.tobytes(), position
            os.pwrite(file.fileno(), blob[position : position + 1], position)
    assert detected > 0.95 * len(positions)
    assert path.read_bytes() == blob


def test_a_checkpoint_cut_off_anywhere_is_detected(interrupted):
    path = checkpoints(interrupted)[-1]
    size = path.stat().st_size
    for length in sorted({*range(size - 200, size), *range(0, size, size // 100)}, reverse=True):
        os.truncate(path, length)
        with pytest.raises(stats.DataError):
            train.read_checkpoint(path)


def test_if_all_checkpoints_are_damaged_only_fresh_starts_over(place, interrupted, caplog):
    for path in checkpoints(interrupted):
        path.write_bytes(path.read_bytes()[:-5])
    before = contents(interrupted)
    assert run_again(place, interrupted) == 2
    message = caplog.messages[-1]
    assert all(f"checkpoint-{number}.npz cannot be used" in message for number in (0, 1))
    assert "--fresh starts over" in message
    assert contents(interrupted) == before
    assert run_again(place, interrupted, "--fresh") == 0
    assert results(interrupted)["predictions.csv"] == results(place / "unbroken")["predictions.csv"]


def first_of(arrays, prefix):
    return next(name for name in arrays if name.startswith(prefix))


def replace_first(prefix, change):
    def replace(description, arrays):
        name = first_of(arrays, prefix)
        arrays[name] = change(arrays[name])

    return replace


IMPOSSIBLE = {
    "no description": lambda description, arrays: description.clear(),
    "a key is missing": lambda description, arrays: description.pop("environment"),
    "the identity is missing": lambda description, arrays: description.pop("identity"),
    "the identity is empty": lambda description, arrays: description.update(identity={}),
    "the identity is not a table": lambda description, arrays: description.update(identity=[]),
    "the options are not a table": lambda description, arrays: description["identity"].update(options=8),
    "the environment is not a table": lambda description, arrays: description.update(environment="cpu"),
    "the epoch is text": lambda description, arrays: description.update(epoch="8"),
    "the epoch is a fraction": lambda description, arrays: description.update(epoch=8.0),
    "the epoch is zero": lambda description, arrays: description.update(epoch=0),
    "the epoch is negative": lambda description, arrays: description.update(epoch=-4),
    "the epoch is huge": lambda description, arrays: description.update(epoch=1 << 40),
    "the epoch is beyond the last": lambda description, arrays: (
        description.update(epoch=1 << 20),
        arrays.update({name: np.zeros((8, 1 << 20), bool) for name in arrays if name == "history/active"}),
    ),
    "the epochs are of no model": lambda description, arrays: (
        description.update(epoch=1 << 40),
        arrays.update({"history/active": np.zeros((0, 1 << 40), bool)}),
    ),
    "the epoch is another": lambda description, arrays: description.update(epoch=description["epoch"] + 4),
    "NaN in the state": replace_first("state/params", lambda array: np.full_like(array, np.nan)),
    "an array is missing": lambda description, arrays: arrays.pop(first_of(arrays, "state/")),
    "an array has another width": replace_first("state/params", lambda array: array[..., :-1]),
    "an array has no axis": replace_first("state/params", lambda array: array.flat[0]),
    "an array has another type": replace_first("state/params", lambda array: array.astype(np.float64)),
    "the history is missing": lambda description, arrays: arrays.pop("history/loss"),
    "the history is short": replace_first("history/", lambda array: array[:, :-1]),
    "the list of active models is short": replace_first("history/active", lambda array: array[:, :-1]),
    "the history has one axis": replace_first("history/active", lambda array: array[:, 0]),
}


@pytest.mark.parametrize("fault", IMPOSSIBLE)
def test_a_checkpoint_that_no_run_can_have_written_is_refused(place, interrupted, caplog, fault):
    for path in checkpoints(interrupted):
        rewrite(path, IMPOSSIBLE[fault])
    files = [path.read_bytes() for path in interrupted.glob("checkpoint-*")]
    assert run_again(place, interrupted) == 2
    assert "--fresh starts over" in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]
    assert [path.read_bytes() for path in interrupted.glob("checkpoint-*")] == files


def test_a_checkpoint_of_more_than_2_gib_is_read_back_or_refused(tmp_path, monkeypatch):
    """From this size on, the zip archive has records in zip64 form; here from 1000 bytes on."""
    description = {"epoch": 2, "identity": {"options": {}, "data": {}}, "environment": {}}
    arrays = {"description": np.frombuffer(json.dumps(description).encode(), np.uint8)}
    arrays |= {"state/a": np.arange(400, dtype=np.float32), "history/active": np.ones((400, 2), bool)}
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    stats.write_files(tmp_path, {"checkpoint-1.npz": stats.npz_bytes(arrays)})
    read, found = train.read_checkpoint(tmp_path / "checkpoint-1.npz")
    assert read == description
    assert {name: array.tolist() for name, array in found.items()} == {
        name: arrays[name].tolist() for name in ("state/a", "history/active")
    }
    path = tmp_path / "checkpoint-1.npz"
    blob = path.read_bytes()
    for position in range(blob.index(b"PK\x01\x02"), len(blob)):
        path.write_bytes(blob[:position] + bytes([blob[position] ^ 4]) + blob[position + 1 :])
        with contextlib.suppress(stats.DataError):
            changed = train.read_checkpoint(path)
            assert changed[0] == read
            assert all(np.array_equal(changed[1][name], found[name]) for name in found)


def test_other_package_versions_are_reported_and_the_run_resumes(place, interrupted, caplog):
    for path in checkpoints(interrupted):
        rewrite(path, lambda description, arrays: description["environment"].update(numpy="1.0"))
    assert run_again(place, interrupted) == 0
    assert f"saved with numpy 1.0, now {np.__version__}: the last digits may differ" in caplog.text


# --- checkpoints of another run ---


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (("--width", "16"), "--width is 16 here, 8 in the unfinished run"),
        (("--seeds", "3"), "--seeds is 3 here, 2 in the unfinished run"),
        (("--folds", "2"), "--folds is 2 here, 3 in the unfinished run"),
        (("--classes", "happy,sad"), "--classes is happy,sad here, None in the unfinished run"),
        (("--sweep", "2"), "--sweep is 2 here, 1 in the unfinished run"),
        (("--pooling", "mean"), "--pooling is mean here, attentive in the unfinished run"),
    ],
)
def test_another_option_is_refused_and_only_that_option_is_named(place, interrupted, caplog, more, difference):
    before = contents(interrupted)
    assert run_again(place, interrupted, *more) == 2
    _, _, found = caplog.messages[-1].partition("holds another, unfinished run: ")
    assert found.split(". Finish it")[0] == difference
    assert "start over with --fresh" in found
    assert contents(interrupted) == before


def test_of_many_other_options_three_are_named(place, interrupted, caplog):
    assert (
        run_again(place, interrupted, "--width", "9", "--seeds", "3", "--folds", "2", "--clip", "2", "--seed", "1") == 2
    )
    assert caplog.messages[-1].count("in the unfinished run") == 3
    assert "; 2 more." in caplog.messages[-1]


@pytest.fixture
def labelled(tmp_path, jax_stack):
    """Data with the user's own statistics and a table of labels, and an interrupted run on them."""
    data = write_sample(tmp_path / "data", actors=4, dim=24)
    np.save(data / stats.MEAN_FILE, np.zeros(24, np.float32))
    np.save(data / stats.STD_FILE, np.ones(24, np.float32))
    table = ["file,emotion,speaker"]
    for number, path in enumerate(sorted(data.glob("*.npz"))):
        table.append(f"{path.name},{('happy', 'sad', 'angry')[number % 3]},{number % 8}")
    (tmp_path / "labels.csv").write_text("\n".join(table) + "\n")
    interrupt(1, data, "--labels", tmp_path / "labels.csv", "--out", tmp_path / "run", *OPTIONS)
    return tmp_path


@pytest.mark.parametrize("changed", ["files and their contents", "labels and speakers", "statistics", "utterances"])
def test_other_data_are_refused_and_only_what_changed_is_named(labelled, caplog, changed):
    path = min((labelled / "data").glob("*.npz"))
    expected = [changed]
    if changed == "files and their contents":
        np.savez(path, emb=np.linspace(-1, 1, 24, dtype=np.float32))
    elif changed == "labels and speakers":
        table = (labelled / "labels.csv").read_text()
        (labelled / "labels.csv").write_text(table.replace(",happy,", ",fear,"))
    elif changed == "statistics":
        np.save(labelled / "data" / stats.MEAN_FILE, np.full(24, 0.5, np.float32))
    else:
        path.unlink()
        expected += ["files and their contents", "labels and speakers"]
    before = contents(labelled / "run")
    arguments = ["--labels", str(labelled / "labels.csv"), "--out", str(labelled / "run"), *OPTIONS]
    assert train.main([str(labelled / "data"), *arguments]) == 2
    _, _, found = caplog.messages[-1].partition("holds another, unfinished run: ")
    differences = found.split(". Finish it")[0].split("; ")
    assert [difference.split(" is ")[0].removeprefix("other ") for difference in differences] == expected
    assert contents(labelled / "run") == before


def test_a_checkpoint_of_another_version_of_the_training_program_is_refused(place, interrupted, caplog, monkeypatch):
    monkeypatch.setattr(train, "TRAINING_VERSION", 1000)
    assert run_again(place, interrupted) == 2
    assert "unfinished run: training program is 1000 here" in caplog.messages[-1]


# --- the folder and its lock ---


def test_a_run_that_is_refused_leaves_nothing_behind(place, tmp_path):
    assert run_again(place, tmp_path / "run", "--folds", "nonsense") == 2
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_refused_changes_no_file_of_the_user(place, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for name in (".thesis.tmp", "precious", "train.log"):
        (own / name).write_text("mine")
    (own / "lock").symlink_to("precious")
    assert run_again(place, own, "--folds", "emosuperb-cremad") == 2
    (own / "lock").unlink()
    assert run_again(place, own, "--folds", "emosuperb-cremad") == 2
    assert contents(own) == dict.fromkeys((".thesis.tmp", "precious", "train.log"), b"mine")


def test_a_folder_with_a_lock_alone_is_of_a_run_that_has_hardly_begun(tmp_path):
    """A kill before the first line of train.log leaves it; and a second process may come when the first has it."""
    (tmp_path / "lock").write_text("4194304\n")
    train.check_output_folder(tmp_path, tmp_path / "data")
    with train.RunFolder(tmp_path):
        train.check_output_folder(tmp_path, tmp_path / "data")
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_of_another_program_is_not_replaced(tmp_path):
    (tmp_path / "lock").write_text("mine")
    with pytest.raises(train.UsageError, match="is not of this program"), train.RunFolder(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == "mine"


@pytest.mark.parametrize("name", ["lock", "train.log"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "fifo"])
def test_a_run_writes_through_no_link_and_waits_for_no_fifo(interrupted, tmp_path, name, kind):
    own = tmp_path / "own"
    (interrupted / name).unlink()
    if kind == "fifo":
        os.mkfifo(interrupted / name)
    else:
        own.write_text("precious")
        (os.link if kind == "hard link" else os.symlink)(own, interrupted / name)
    if kind == "dangling link":
        own.unlink()
    with pytest.raises(train.UsageError, match=r"is a link; remove it|is not a regular file, or has a second hard"):
        train.open_own(interrupted / name)
    assert not own.exists() or own.read_text() == "precious"


@pytest.mark.skipif(train.fcntl is None, reason="there is no flock here")
def test_a_second_run_on_a_folder_ends_before_jax_is_imported_and_names_the_first(place, interrupted):
    code = f"import sys; sys.modules['jax'] = None; sys.path.insert(0, {str(ROOT)!r}); import train; "
    code += "sys.exit(train.main())"
    command = [sys.executable, "-c", code, str(place / "data"), "--out", str(interrupted), *OPTIONS]
    before = contents(interrupted)
    with train.RunFolder(interrupted):
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"is in use by another run, process {os.getpid()}" in second.stderr
    assert contents(interrupted) == before


@pytest.mark.skipif(train.fcntl is None, reason="there is no flock here")
def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(train.fcntl, "flock", flock)
    with train.RunFolder(tmp_path / "run"):
        assert "lock: not available here (No locks available)" in caplog.text


def test_results_are_saved_even_if_the_folder_was_removed(place, tmp_path, monkeypatch):
    real = train.evaluate

    def remove_and_evaluate(*arguments):
        shutil.rmtree(tmp_path / "run")
        return real(*arguments)

    monkeypatch.setattr(train, "evaluate", remove_and_evaluate)
    assert run_again(place, tmp_path / "run") == 0
    assert results(tmp_path / "run") == results(place / "unbroken")


def test_the_reason_is_reported_even_if_the_folder_was_removed(place, tmp_path, monkeypatch, caplog):
    def remove_and_diverge(*_):
        shutil.rmtree(tmp_path / "run")
        raise train.TrainingError("loss was NaN")

    monkeypatch.setattr(train, "raise_if_diverged", remove_and_diverge)
    assert run_again(place, tmp_path / "run") == 1
    assert caplog.messages[-1] == "train.py: loss was NaN"


# --- saving ---


@pytest.mark.parametrize("error", [DISK_FULL, MemoryError()])
def test_a_checkpoint_that_cannot_be_saved_is_reported_once_and_the_run_continues(
    place, tmp_path, monkeypatch, caplog, error
):
    real = stats.write_files

    def write_files(folder, blobs):
        if any(name.startswith("checkpoint") for name in blobs):
            raise error
        real(folder, blobs)

    monkeypatch.setattr(stats, "write_files", write_files)
    monkeypatch.setattr(train, "MAX_SAVE_SHARE", math.inf)
    assert run_again(place, tmp_path / "run") == 0
    assert caplog.text.count("checkpoint: not saved, the run continues") == 1
    assert results(tmp_path / "run") == results(place / "unbroken")


def test_after_diverging_steps_the_checkpoint_before_them_is_on_the_disk(place, tmp_path, monkeypatch, caplog):
    real = train.raise_if_diverged

    def diverge(bad_steps, epoch, split):
        real(bad_steps + (train.MAX_BAD_STEPS if epoch == 8 else 0), epoch, split)

    monkeypatch.setattr(train, "raise_if_diverged", diverge)
    monkeypatch.setattr(train, "MAX_SAVE_SHARE", math.inf)
    assert run_again(place, tmp_path / "run") == 1
    assert "up to epoch 12: loss or gradient was NaN or Inf in 5 consecutive steps" in caplog.messages[-1]
    description, arrays = train.read_checkpoint(checkpoints(tmp_path / "run")[-1])
    assert description["epoch"] == 8
    assert all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind == "f" and array.size > 8)


def progress_at(epoch):
    """A progress with as little in it as possible."""
    history = {name: np.full((epoch, 8), epoch, np.float32) for name in train.HISTORY}
    return train.Progress(epoch, {"x": np.full(3, epoch, np.float32)}, history)


@pytest.fixture(scope="module")
def split():
    return train.make_split(many_speakers(6), SMALL)


class FailingFile(io.FileIO):
    """A file of which only the first half is written before its disk is full."""

    def __init__(self, path, mode, check):
        super().__init__(path, mode)
        self.check = check

    def write(self, blob):
        try:
            self.check()
        except BaseException:
            super().write(memoryview(blob)[: len(blob) // 2])
            raise
        return super().write(blob)


def fail_from(patch, number, error):
    """Let every call of the file system fail from this one on; return the list of calls made."""
    calls = []

    def check():
        calls.append(1)
        if len(calls) >= number:
            raise error

    def failing(real):
        def call(*arguments, **named):
            check()
            return real(*arguments, **named)

        return call

    for module, name in ((os, "fsync"), (os, "replace"), (os, "open"), (Path, "unlink")):
        patch.setattr(module, name, failing(getattr(module, name)))
    patch.setattr(stats, "open", failing(lambda path, mode: FailingFile(path, mode, check)), raising=False)
    return calls


@pytest.mark.parametrize("error", [DISK_FULL, MemoryError(), Killed()])
def test_every_call_of_saving_may_fail(tmp_path, jax_stack, monkeypatch, split, error):
    """From each opening, write, fsync and rename on: an older checkpoint is whole, and the next save works."""
    identity = {"options": {}, "data": {}}

    def open_run():
        run = train.RunFolder(tmp_path)
        run.find_checkpoint(identity)
        return run

    run = open_run()
    run._save(progress_at(4), split)
    run._save(progress_at(8), split)
    for number in itertools.count(1):
        epoch = 8 + 4 * number
        with monkeypatch.context() as patch:
            calls = fail_from(patch, number, error)
            with contextlib.suppress(Killed):
                run._save(progress_at(epoch), split)
        found = [train.read_checkpoint(path) for path in tmp_path.glob("checkpoint-*.npz")]
        assert len(found) == 2
        newest, arrays = max(found, key=lambda pair: pair[0]["epoch"])
        assert newest["epoch"] in (epoch, epoch - 4)
        assert (arrays["state/x"] == newest["epoch"]).all()
        if len(calls) < number:
            break
        if isinstance(error, Killed):
            run = open_run()
        run._save(progress_at(epoch), split)
    assert newest["epoch"] == epoch
    assert number > 8


@pytest.mark.skipif(os.name != "posix", reason="only there a folder can be synced")
@pytest.mark.parametrize(("fault", "saved"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_synced_is_named_unless_its_file_system_never_can(
    tmp_path, jax_stack, monkeypatch, split, caplog, fault, saved
):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(fault, "no sync")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    train.RunFolder(tmp_path)._save(progress_at(4), split)
    assert (tmp_path / "checkpoint-0.npz").exists()
    assert (f"{tmp_path}: no sync" in caplog.text) == (not saved)


class Clock:
    """Stands in for the time module."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic


@pytest.fixture
def paced(tmp_path, jax_stack, monkeypatch, split):
    """A run whose clock is fake: `call` passes some seconds of training, and returns whether a save followed."""
    clock, run, saves = Clock(), train.RunFolder(tmp_path), []
    monkeypatch.setattr(train, "time", clock)
    paced = types.SimpleNamespace(clock=clock, run=run, saves=saves, cost=1.0)

    def save(progress, split):
        clock.now += paced.cost
        saves.append(clock.now)

    def call(seconds):
        clock.now += seconds
        before = len(saves)
        run.checkpoint_if_due(progress_at(4), split)
        return len(saves) > before

    monkeypatch.setattr(run, "_save", save)
    run.resume(train.Progress(0, {}, {}))
    paced.call = call
    return paced


def test_checkpoints_take_at_most_their_share_of_the_time(paced):
    for _ in range(10_000):
        paced.call(1.0)
        share = train.MAX_SAVE_SHARE * (1 if paced.clock.now > 60 else 2)
        # The cost of the first save is not known before.
        assert len(paced.saves) <= 1 or len(paced.saves) * paced.cost <= share * paced.clock.now
    assert len(paced.saves) * paced.cost > 0.9 * train.MAX_SAVE_SHARE * paced.clock.now


def test_the_first_checkpoint_waits_until_its_assumed_cost_is_within_the_share(paced, monkeypatch):
    seconds = 4 * 3 / train.SAVE_RATE  # three numbers
    assert not paced.call(0.9 * seconds / (2 * train.MAX_SAVE_SHARE))
    assert paced.call(0.2 * seconds / (2 * train.MAX_SAVE_SHARE))


def test_a_slow_disk_gets_fewer_checkpoints(paced):
    paced.cost = 0.001
    for _ in range(100):
        paced.call(1.0)
    fast = len(paced.saves)
    paced.cost = 10.0
    for _ in range(100):
        paced.call(1.0)
    assert fast > 90
    assert len(paced.saves) <= fast + 1  # one, of which nobody knew how long it would take


def test_the_time_before_training_does_not_count(paced):
    """Reading the data may take minutes: a slow first save must not use them up."""
    paced.cost = 0.001
    paced.clock.now += 10_000
    paced.run.resume(train.Progress(0, {}, {}))
    assert paced.call(1.0)
    paced.cost = 1.0
    assert paced.call(1.0)
    assert not any(paced.call(1.0) for _ in range(40))


def test_a_run_without_a_folder_saves_nothing(jax_stack, split):
    run = train.RunFolder(None)
    start = train.Progress(0, {}, {})
    assert run.resume(start) is start
    run.checkpoint_if_due(progress_at(4), split)
    run.clear()


# --- real processes ---

# Runs train.py as it is but for some changes, with the usual effect of signals, which nohup would have changed.
DRIVER = """
import io, math, os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
sys.path.insert(0, {root!r})
import train, stats, check_data

train.MAX_SAVE_SHARE = math.inf

def reached():
    print("reached", flush=True)

def hang():
    reached()
    time.sleep(600)

class HalfWritten(io.FileIO):
    def write(self, blob):
        super().write(memoryview(blob)[: len(blob) // 2])
        hang()

def hang_in_file(name):
    stats.open = lambda path, mode: (HalfWritten if path.name.startswith(name) else open)(path, mode)

def hang_before_rename(name):
    real = os.replace
    os.replace = lambda old, new: hang() if new.name == name else real(old, new)

{changes}
status = check_data.run_cli(train.main)
if train.jax.process_count() == 1:
    os._exit(status)
sys.exit(status)
"""


def start(place, run, changes="", environment=(), options=OPTIONS):
    code = DRIVER.format(root=str(ROOT), changes=changes)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(place / "data"), "--out", str(run), *options],
        env=os.environ | dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_reached(process):
    line = process.stdout.readline()
    assert line == "reached\n", process.communicate()


# In the order in which a run comes to them, each with the epoch from which the next run resumes.
MOMENTS = {
    "compiling": (
        "real = train.initial_state\ntrain.initial_state = lambda *a: (real(*a), reached())[0]",
        0,
    ),
    "training": (
        "real = train.log_progress\ntrain.log_progress = lambda h, *a: hang() if len(h['loss']) == 8 else real(h, *a)",
        8,
    ),
    "the first checkpoint is half written": ("hang_in_file('.checkpoint-0.npz.')", 0),
    "a checkpoint is half written": ("hang_in_file('.checkpoint-1.npz.')", 4),
    "a checkpoint is complete but not renamed": ("hang_before_rename('checkpoint-1.npz')", 4),
    "a checkpoint is renamed and history.csv is not": (
        "real = os.replace\n"
        "os.replace = lambda old, new: hang() if new.with_name('checkpoint-1.npz').exists() else real(old, new)",
        8,
    ),
    "the results are half written": ("hang_in_file('.model.npz.')", 16),
    "the first result is not renamed": ("hang_before_rename('config.json')", 16),
    "half of the results are renamed": ("hang_before_rename('fusion.npz')", 16),
    "metrics.json is not renamed": ("hang_before_rename('metrics.json')", 16),
    "one of two checkpoints is removed": (
        "import pathlib\nreal = pathlib.Path.unlink\n"
        "pathlib.Path.unlink = lambda path, **k: hang() if path.name == 'checkpoint-1.npz' else real(path, **k)",
        16,
    ),
}
KILLS = [(moment, signal.SIGKILL) for moment in MOMENTS]
KILLS += [
    (moment, number)
    for moment in ("compiling", "training", "a checkpoint is half written", "half of the results are renamed")
    for number in (signal.SIGTERM, signal.SIGINT)
]


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize(("moment", "number"), KILLS)
def test_after_a_kill_the_same_command_gives_the_results_of_an_unbroken_run(place, tmp_path, caplog, moment, number):
    changes, epoch = MOMENTS[moment]
    run = tmp_path / "run"
    # Without the cache the program takes a second to compile.
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if moment == "compiling" else {}
    with start(place, run, changes, environment) as process:
        wait_until_reached(process)
        if moment == "compiling":
            time.sleep(0.4)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == -number
    assert "Traceback" not in errors
    caplog.set_level("INFO", "train")
    assert run_again(place, run) == 0
    assert (f"RESUMING from epoch {epoch} of" in caplog.text) if epoch else ("RESUMING" not in caplog.text)
    assert results(run) == results(place / "unbroken")
    assert {path.name for path in run.iterdir()} == ARTIFACTS


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_a_run_killed_while_it_saves_the_statistics_computes_them_again(place, tmp_path):
    data = shutil.copytree(place / "data", tmp_path / "data")
    for name in (stats.MEAN_FILE, stats.STD_FILE, stats.MANIFEST_FILE):
        (data / name).unlink()
    with start(tmp_path, tmp_path / "run", f"hang_before_rename({stats.STD_FILE!r})") as process:
        wait_until_reached(process)
        process.kill()
    assert run_again(tmp_path, tmp_path / "run") == 0
    for name in (stats.MEAN_FILE, stats.STD_FILE, stats.MANIFEST_FILE):
        assert (data / name).read_bytes() == (place / "data" / name).read_bytes()
    assert results(tmp_path / "run")["model.npz"] == results(place / "unbroken")["model.npz"]


def start_program(place, run, disposition):
    """Start `python train.py` itself, with or without Ctrl-C."""
    code = "import os, signal, sys; signal.signal(signal.SIGINT, getattr(signal, sys.argv[1]))\n"
    code += "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    command = [str(ROOT / "train.py"), str(place / "data"), "--out", str(run), *OPTIONS]
    command += ["--epochs", "400", "--patience", "400"]
    return subprocess.Popen(
        [sys.executable, "-c", code, disposition, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize("disposition", ["SIG_DFL", "SIG_IGN"])
def test_ctrl_c_ends_the_program_without_a_traceback_unless_nohup_ignores_it(place, tmp_path, disposition):
    with start_program(place, tmp_path / "run", disposition) as process:
        for line in process.stderr:
            if line.startswith("epoch "):
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == (-signal.SIGINT if disposition == "SIG_DFL" else 0), errors
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "metrics.json").exists() == (disposition == "SIG_IGN")


# The first call of the compiled program is over, and its checkpoint is on the disk.
SLOW = """
real_progress, real_fsync = train.log_progress, os.fsync
train.log_progress = lambda *arguments: (real_progress(*arguments), reached(), time.sleep(0.2))
os.fsync = lambda file: (time.sleep(0.02), real_fsync(file))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
@pytest.mark.parametrize("cores", [1, 2])
def test_kills_at_random_moments_do_not_change_the_results(place, tmp_path, cores):
    if len(os.sched_getaffinity(0)) < cores:
        pytest.skip("there is only one core")
    pin = f"os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cores}])\n"
    options = (*OPTIONS, "--epochs", "60", "--patience", "60")
    random = np.random.default_rng(cores)
    with start(place, tmp_path / "unbroken", pin, options=options) as unbroken:
        errors = unbroken.communicate()[1]
    assert unbroken.returncode == 0, errors
    for _ in range(2):
        with start(place, tmp_path / "run", pin + SLOW, options=options) as process:
            wait_until_reached(process)
            time.sleep(random.uniform(0, 0.8))
            process.kill()
        assert process.returncode == -signal.SIGKILL
    with start(place, tmp_path / "run", pin, options=options) as final:
        errors = final.communicate()[1]
    assert final.returncode == 0, errors
    assert "RESUMING from" in errors
    assert results(tmp_path / "run") == results(tmp_path / "unbroken")
    assert {path.name for path in (tmp_path / "run").iterdir()} == ARTIFACTS


# --- several processes ---


def run_pair(place, run, options, changes=""):
    """Run on two processes; return their exit statuses and what they wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for number in range(2):
        environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        environment["JAX_PLATFORMS"] = "cpu"
        processes.append(start(place, run, changes, environment, options))
    outputs = [process.communicate(timeout=240) for process in processes]
    return [process.returncode for process in processes], outputs


# Both have left the program: the end of one would abort the other in the middle of an exchange.
END_TOGETHER = """
import pathlib, time
def end(*_):
    place = pathlib.Path({place!r})
    (place / f"reached-{{os.environ['JAX_PROCESS_ID']}}").touch()
    while len(list(place.glob("reached-*"))) < 2:
        time.sleep(0.001)
    os._exit(3)
train.log_progress = end
"""


def test_a_run_on_two_processes_resumes_with_the_results_of_an_unbroken_one(place, tmp_path):
    """The first process alone writes and reads, but both must continue with what the checkpoint holds."""
    options = (*OPTIONS, "--epochs", "8")
    assert run_again(place, tmp_path / "unbroken", "--epochs", "8") == 0
    statuses, outputs = run_pair(place, tmp_path / "run", options, END_TOGETHER.format(place=str(tmp_path)))
    # The first one leads: when it has ended, jax may abort the second one.
    assert statuses[0] == 3, outputs
    assert statuses[1] in (3, -signal.SIGABRT), outputs
    statuses, outputs = run_pair(place, tmp_path / "run", options)
    assert statuses == [0, 0], outputs
    assert "RESUMING from epoch 4 of" in outputs[0][1]
    assert "RESUMING" not in outputs[1][1]
    assert results(tmp_path / "run") == results(tmp_path / "unbroken")

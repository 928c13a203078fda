"""tests/gpu.py on a CPU: every part runs, failures are rows with their reason, and it can be stopped at any moment."""

import argparse
import importlib.util
import os
import subprocess
import sys

import bench
import gpu
import numpy as np
import pytest
from conftest import ROOT

import check_data

SCRIPT = [sys.executable, str(ROOT / "tests/gpu.py"), "--small"]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Run a part in a process of its own, in the small size; return whether it went well, and its rows."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small"])
    monkeypatch.setenv("OUT", str(tmp_path))

    def run(part, seconds=60.0):
        went_well = gpu.run_part(part, seconds, tmp_path)
        return went_well, (tmp_path / "gpu.txt").read_text().splitlines()

    return run


def test_every_part_runs_on_a_cpu(tmp_path):
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "OUT": str(tmp_path)}
    done = subprocess.run(SCRIPT, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "gpu.txt").read_text() == done.stdout
    found = {part: [line for line in done.stdout.splitlines() if line.startswith(part)] for part in gpu.PARTS}
    assert all(found.values())
    for part, expected in [
        ("device", "CPU ("),
        ("first run", "within 0.02"),
        ("first run", "missing: none"),
        ("same seed", "without a flag: equal to the bit"),
        ("kill", "against an unbroken run: equal to the bit"),
        ("training", "at the measured rates"),
        ("pytorch", "torch.func on cpu" if importlib.util.find_spec("torch") else "skipped: ModuleNotFoundError"),
        ("precision", "skipped: no features were given"),
        ("sequences", "s an epoch"),
        ("sequences", "within 16 GB"),
        ("files", "460 files on the CPU: "),
        ("sweep", "2 runs"),
        ("layers", "8 layers of the sample in"),
    ]:
        assert any(expected in line for line in found[part]), (part, expected)


def test_single_parts_can_be_run(tmp_path):
    variables = os.environ | {"TMPDIR": str(tmp_path)}
    command = [*SCRIPT, "--only", "sweep", "device"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["sweep", *["device"] * 3]


def test_all_parts_together_end_before_eight_minutes():
    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= 480


def test_a_part_that_fails_gives_its_reason_as_a_row(rows):
    went_well, (row,) = rows("sweep")  # its folder has no sample
    assert not went_well
    assert row.startswith("sweep      FAILED, exit status 1: RuntimeError: run sweep, exit status 2: train.py: ")


def test_a_part_whose_package_is_missing_is_skipped(rows, tmp_path, monkeypatch):
    (tmp_path / "jax.py").write_text("raise ModuleNotFoundError(\"No module named 'jax'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert rows("device") == (True, ["device     skipped: ModuleNotFoundError: No module named 'jax'"])


def test_a_part_that_takes_too_long_is_cut_off(rows):
    assert rows("first run", seconds=0.1) == (False, ["first run  CUT OFF after 0 s"])


def test_the_precisions_are_compared_on_every_set_and_seed(tmp_path, monkeypatch):
    runs = []

    def run_train(options, run, *arguments, data, **variables):
        runs.append((run, data.name, *arguments[1::2], *variables.values()))
        return {"ua": 0.5, "seconds": 1.0}

    monkeypatch.setattr(gpu, "run_train", run_train)
    (tmp_path / "set").mkdir()
    data = [f"{tmp_path}/set:5", f"{tmp_path}/set:emobox-ravdess"]
    options = argparse.Namespace(data=data, folder=tmp_path, small=False)
    rows = list(gpu.compare_precision(options))
    assert len(rows) == len(set(runs)) == 10
    assert rows[-2] == f"{data[1]} bfloat16, seed 1: UA 0.5000 in 1.0 s"
    assert runs[-2] == ("bfloat16-1-1", "data-1", "emobox-ravdess", "bfloat16", 1)
    assert runs[-1] == ("float32 highest-1-0", "data-1", "emobox-ravdess", "float32", 0, "highest")


def test_where_no_gpu_can_be_used_nothing_but_the_small_size_runs(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(check_data.UsageError, match="--require-gpu"):
        gpu.start_device(argparse.Namespace(small=False))


def test_the_script_can_be_stopped_at_any_moment(tmp_path):
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)}
    with subprocess.Popen(SCRIPT, stdout=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stdout.readline().startswith("device     CPU")
        process.terminate()
    assert process.returncode == 143
    assert not list(tmp_path.iterdir())


def test_runs_that_differ_in_one_parameter_are_not_equal(tmp_path):
    for run, value in (("one", 1.0), ("same", 1.0), ("other", 1.5)):
        (tmp_path / run).mkdir()
        np.savez(tmp_path / run / "model.npz", weight=np.array([0.0, value]))
    options = argparse.Namespace(folder=tmp_path)
    assert gpu.compared(options, "one", "same") == "equal to the bit"
    assert gpu.compared(options, "one", "other") == "NOT equal, parameters differ by up to 5.0e-01"


def test_the_work_is_counted_in_operations_and_bytes(jax_stack):
    given = bench.problem(920, 64, 4).experiment
    steps = given.split.train.sum() * 4 / given.config.batch
    weights = 768 * 256 + 256 + 256 * 8 + 8
    utterances = given.split.train.sum() * 4
    assert bench.operations(given) == (4 * 768 * 256 + 6 * 256 * 8) * utterances
    assert bench.bytes_moved(given) == pytest.approx(4 * (9 * weights * steps + 4 * 768 * utterances))


def test_the_time_without_the_compilation_leaves_the_first_call_out():
    watch = bench.Stopwatch()
    watch.calls = [bench.Cost(wall, wall / 2) for wall in (100.0, 102.0, 104.0)]
    assert watch.bare()[:2] == (6.0, 3.0)

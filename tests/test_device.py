"""The device on which train.py runs, the other processes of a run on several hosts, and the exit status."""

import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import FAST, ROOT
from make_sample import write_sample

import check_data
import stats
import train

OTHER_PROCESSES = (
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    *("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)


@pytest.fixture
def environment(monkeypatch):
    """Set variables of the environment; all that name other processes are unset before."""
    for name in OTHER_PROCESSES:
        monkeypatch.delenv(name, raising=False)

    def set_variables(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


# --- several hosts ---


@pytest.mark.parametrize(
    ("variables", "index"),
    [
        ({}, 0),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, 1),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "7"}, 7),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, 1),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 0),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "3"}, 0),  # a single task
        ({"SLURM_PROCID": "3"}, 0),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "one"}, 0),
        ({"JAX_NUM_PROCESSES": "2"}, 0),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, 2),
    ],
)
def test_the_environment_determines_whether_this_is_the_first_process(environment, variables, index):
    environment(variables)
    assert train.is_primary() == (index == 0)


@pytest.mark.parametrize(
    ("variables", "joined"),
    [
        ({}, []),
        ({"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": ""}, []),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, [{}]),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, [{}]),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, []),  # nobody knows where
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            [{"num_processes": 2, "process_id": 1}],
        ),
    ],
)
def test_other_processes_are_joined_only_if_the_environment_names_them(
    jax_stack, environment, monkeypatch, variables, joined
):
    calls = []
    monkeypatch.setattr(jax_stack.distributed, "initialize", lambda **named: calls.append(named))
    environment(variables)
    train.join_hosts()
    assert calls == joined


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "4(x2)"},
        {"JAX_COORDINATOR_ADDRESS": "nohost", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
    ],
)
def test_other_processes_that_cannot_be_joined_are_one_error(jax_stack, environment, variables):
    environment(variables)
    with pytest.raises(check_data.UsageError, match="cannot join the other processes") as caught:
        train.join_hosts()
    assert "\n" not in str(caught.value)


def test_a_process_that_finds_no_others_is_refused(environment, jax_stack):
    """Otherwise it would train everything and write nothing."""
    environment({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    with pytest.raises(check_data.UsageError, match="jax found only this one"):
        train.start_device(train.Config("DIR", no_compile_cache=True))


def test_only_the_first_process_logs_its_progress(environment, jax_stack, monkeypatch, caplog):
    environment({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    monkeypatch.setattr(jax_stack, "process_index", lambda: 1)
    caplog.set_level("INFO", "train")  # also restores the level
    train.start_device(train.Config("DIR", no_compile_cache=True))
    assert train.log.level == logging.WARNING
    assert not caplog.messages


def test_only_the_first_process_writes(environment, tmp_path):
    environment({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    with train.RunFolder(tmp_path / "run") as run:
        (tmp_path / "run" / "checkpoint-0.npz").write_bytes(b"of the first process")
        assert run.find_checkpoint({}, fresh=True) == 0
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-0.npz"]


# --- the platform ---


@pytest.mark.parametrize(
    ("gpu", "fault", "has_cuda", "requested", "platforms", "reason"),
    [
        (None, "no GPU", True, "", "cpu", "no GPU"),
        (None, "no GPU", False, "", "", "no GPU"),
        ("H200", "", True, "", "cuda,cpu", ""),
        ("H200", "", False, "", "cpu", "H200 IS AVAILABLE BUT THIS JAX HAS NO CUDA SUPPORT: pip install 'jax[cuda12]'"),
        ("H200", "", True, "cpu", "cpu", "JAX_PLATFORMS=cpu requests it"),
        (None, "no GPU", False, "tpu", "tpu", "JAX_PLATFORMS=tpu requests it"),
    ],
)
def test_the_platform_is_chosen_with_a_reason(gpu, fault, has_cuda, requested, platforms, reason):
    assert train.choose_platform(gpu, fault, has_cuda, requested) == (platforms, reason)


@pytest.fixture
def hardware(monkeypatch):
    """Set whether this machine has an NVIDIA GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def set_hardware(present):
        monkeypatch.setattr(train.glob, "glob", lambda pattern: ["/dev/nvidia0"] if present else [])
        monkeypatch.setattr(train, "Path", lambda path: Path("/nowhere"))  # no PCI device

    return set_hardware


class Driver:
    """Stands in for libcuda."""

    def __init__(self, gpus=1, status=0):
        self.gpus, self.status = gpus, status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = self.gpus
        return 0

    def cuDeviceGetName(self, name, size, device):
        name.value = b"NVIDIA H200"


def test_the_driver_names_the_gpu(hardware, monkeypatch):
    hardware(True)
    monkeypatch.setattr(train.ctypes, "CDLL", lambda name: Driver())
    assert train.probe_gpu() == ("NVIDIA H200", "")


@pytest.mark.parametrize(
    ("present", "driver", "reason"),
    [
        (False, None, "this machine has no NVIDIA GPU"),
        (True, None, "THE NVIDIA GPU OF THIS MACHINE HAS NO DRIVER INSTALLED"),
        (False, Driver(gpus=0), "this machine has no NVIDIA GPU"),
        (True, Driver(gpus=0), "THE DRIVER CANNOT USE THE NVIDIA GPU OF THIS MACHINE"),
        (True, Driver(status=803), "CUDA error 803"),
    ],
)
def test_a_machine_without_a_usable_gpu_has_a_reason(hardware, monkeypatch, present, driver, reason):
    def load(name):
        if driver is None:
            raise OSError
        return driver

    hardware(present)
    monkeypatch.setattr(train.ctypes, "CDLL", load)
    gpu, found = train.probe_gpu()
    assert gpu is None
    assert reason in found


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [
        ("0x10de\n", "0x030200\n", True),  # a 3D controller
        ("0x10de\n", "0x030000\n", True),
        ("0x10de\n", "0x040300\n", False),  # its sound
        ("0x8086\n", "0x030000\n", False),
        ("0x10de\n", None, False),
    ],
)
def test_a_gpu_without_a_driver_is_found_among_the_pci_devices(tmp_path, monkeypatch, vendor, kind, found):
    def load(name):
        raise OSError

    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text(vendor)
    if kind:
        (device / "class").write_text(kind)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(train.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(train, "Path", lambda path: tmp_path)
    monkeypatch.setattr(train.ctypes, "CDLL", load)
    assert ("HAS NO DRIVER INSTALLED" in train.probe_gpu()[1]) == found


@pytest.mark.parametrize("value", ["", " ", "-1"])
def test_hidden_gpus_are_the_reason(monkeypatch, value):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert train.probe_gpu() == (None, "CUDA_VISIBLE_DEVICES hides every GPU")


class FakeDevice:
    def __init__(self, platform):
        self.platform, self.device_kind = platform, "NVIDIA H200"


def start_with(monkeypatch, jax_stack, platforms, device, count=1, fault=""):
    """Start jax as if it had found this device; `fault` is what its log says about another."""

    def devices():
        if fault:
            logging.getLogger("jax._src.xla_bridge").error("Backend failed.\nTraceback: %s", fault)
        return [device]

    monkeypatch.setenv("JAX_PLATFORMS", "")  # start_jax sets it
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)  # it would be advised to unset it
    monkeypatch.setattr(train, "choose_platform", lambda *arguments: (platforms, "no GPU"))
    monkeypatch.setattr(jax_stack, "devices", devices)
    monkeypatch.setattr(jax_stack, "device_count", lambda: count)
    return train.start_jax()


@pytest.mark.parametrize(
    ("count", "description"), [(1, "CUDA NVIDIA H200"), (2, "CUDA NVIDIA H200 and 1 more"), (8, "and 7 more")]
)
def test_gpus_are_described_by_name_and_number(monkeypatch, jax_stack, environment, count, description):
    assert start_with(monkeypatch, jax_stack, "cuda,cpu", FakeDevice("cuda"), count).endswith(description)


def test_a_cpu_is_described_with_its_cores_and_the_reason(monkeypatch, jax_stack, environment):
    description = start_with(monkeypatch, jax_stack, "cpu", FakeDevice("cpu"))
    assert description == f"CPU ({check_data.counted(train.available_cores(), 'core')}), because no GPU"


def test_a_gpu_that_jax_cannot_use_is_one_line_instead_of_a_traceback(monkeypatch, jax_stack, environment, caplog):
    description = start_with(monkeypatch, jax_stack, "cuda,cpu", FakeDevice("cpu"), fault="CUDA_ERROR")
    assert description.endswith("because THE GPU COULD NOT BE USED: Backend failed.")
    assert not caplog.messages
    logging.getLogger("jax._src.xla_bridge").error("afterwards")
    assert caplog.messages == ["afterwards"]  # and afterwards, jax logs as usual


def test_of_an_exception_that_jax_logs_the_first_line_is_the_reason(monkeypatch, jax_stack):
    def devices():
        try:
            raise RuntimeError("no\x1b[2J memory\nsecond line")
        except RuntimeError:
            logging.getLogger("jax._src.xla_bridge").exception("Traceback follows")
        return [FakeDevice("cpu")]

    monkeypatch.setattr(jax_stack, "devices", devices)
    _, fault = train.first_device("cuda,cpu")
    assert "no" in fault
    assert "memory" in fault
    assert "\x1b" not in fault
    assert "second line" not in fault


def test_a_requested_platform_that_does_not_exist_is_a_usage_error(monkeypatch, jax_stack):
    def devices():
        raise RuntimeError("Unknown backend nonsense\nsecond line")

    monkeypatch.setattr(jax_stack, "devices", devices)
    with pytest.raises(check_data.UsageError) as caught:
        train.first_device("nonsense")
    assert str(caught.value) == "JAX_PLATFORMS=nonsense: Unknown backend nonsense; unset JAX_PLATFORMS"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_every_core_that_the_process_may_use_is_a_device(tmp_path):
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    code += "import train; description = train.start_jax(); print(train.jax.device_count(), description)"
    variables = {name: value for name, value in os.environ.items() if name not in (*OTHER_PROCESSES, "XLA_FLAGS")}
    variables["JAX_PLATFORMS"] = "cpu"
    output = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert output.stdout == "1 CPU (1 core), because JAX_PLATFORMS=cpu requests it\n"


@pytest.fixture
def start_on(jax_stack, environment, monkeypatch):
    """Start a device that jax calls by this name."""

    def start(backend, require_gpu):
        monkeypatch.setattr(train, "start_jax", lambda: "CPU, because THE GPU COULD NOT BE USED: no memory")
        monkeypatch.setattr(jax_stack, "default_backend", lambda: backend)
        return train.start_device(train.Config("DIR", no_compile_cache=True, require_gpu=require_gpu))

    return start


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_a_run_that_requires_a_gpu_starts_on_nothing_else(start_on, backend):
    assert start_on(backend, require_gpu=False)
    with pytest.raises(check_data.UsageError, match=r"--require-gpu: .* THE GPU COULD NOT BE USED: no memory"):
        start_on(backend, require_gpu=True)


def test_a_run_that_requires_a_gpu_starts_on_one(start_on):
    assert start_on("gpu", require_gpu=True)


def test_a_required_gpu_that_is_missing_ends_the_program_with_status_2(sample, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert train.main([str(sample), "--out", str(tmp_path / "run"), "--require-gpu"]) == 2
    assert caplog.messages[-1].startswith("train.py: --require-gpu: the device would be CPU (")
    assert caplog.messages[-1].endswith("because JAX_PLATFORMS=cpu requests it")
    assert not (tmp_path / "run").exists()


# --- the compile cache ---


@pytest.fixture
def cache(jax_stack, tmp_path, monkeypatch):
    """The folder of the cache below the home folder, and the settings that jax gets."""
    settings = []
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax_stack.config, "update", lambda *setting: settings.append(setting))
    return tmp_path / "speech-emotion-trainer", settings


posix = pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")


@posix
def test_compiled_programs_are_cached_where_nobody_else_can_write(cache):
    folder, settings = cache
    train.enable_compile_cache()
    train.enable_compile_cache()
    assert settings == [("jax_compilation_cache_dir", str(folder))] * 2
    assert folder.stat().st_mode & 0o777 == 0o700


@posix
@pytest.mark.parametrize("fault", ["others may write", "others may read", "a link", "a file", "another owner"])
def test_no_program_is_cached_in_a_folder_that_is_not_the_users_alone(cache, tmp_path, monkeypatch, caplog, fault):
    folder, settings = cache
    caplog.set_level("INFO", "train")
    if fault == "a link":
        (tmp_path / "target").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "target")
    elif fault == "a file":
        folder.touch()
    else:
        folder.mkdir(mode=0o700)
        folder.chmod({"others may write": 0o720, "others may read": 0o704}.get(fault, 0o700))
    if fault == "another owner":
        monkeypatch.setattr(os, "getuid", lambda: 123456)
    train.enable_compile_cache()
    assert not settings
    assert caplog.text.count("compile cache: off") == 1


@posix
def test_without_a_home_folder_nothing_is_cached(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    train.enable_compile_cache()
    assert not cache[1]


def test_the_users_own_cache_is_left_alone(cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    train.enable_compile_cache()
    assert not cache[1]
    assert not cache[0].exists()


@pytest.mark.parametrize("off", [False, True])
def test_an_option_turns_the_compile_cache_off(jax_stack, environment, monkeypatch, off):
    calls = []
    monkeypatch.setattr(train, "enable_compile_cache", lambda: calls.append(1))
    train.start_device(train.Config("DIR", no_compile_cache=off))
    assert bool(calls) != off


# --- errors and exit status ---


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (check_data.UsageError("no such folder"), 2, "train.py: no such folder"),
        (stats.DataError("bad-statistics", "holds NaN"), 2, "train.py: holds NaN"),
        (train.TrainingError("the loss was NaN"), 1, "train.py: the loss was NaN"),
        (OSError(errno.ENOSPC, "No space left on device", "a\x1bb"), 1, "train.py: a\\x1bb: No space left on device"),
        (MemoryError(), 1, "train.py: OUT OF MEMORY (no memory left); a smaller --batch"),
    ],
)
def test_an_error_is_one_line_and_an_exit_status(monkeypatch, caplog, error, status, message):
    def fail(config):
        raise error

    monkeypatch.setattr(train, "run_training", fail)
    assert train.main(["DIR"]) == status
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(message)
    assert "\n" not in caplog.messages[0]


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def fail(config):
        raise KeyError("bug")

    monkeypatch.setattr(train, "run_training", fail)
    with pytest.raises(KeyError):
        train.main(["DIR"])


def test_a_results_folder_that_cannot_be_made_is_one_line(tmp_path, caplog):
    data = write_sample(tmp_path / "data", actors=2, dim=8)
    (tmp_path / "file").touch()
    assert train.main([str(data), "--out", str(tmp_path / "file" / "run"), *FAST]) == 1
    assert caplog.messages == [f"train.py: {tmp_path / 'file' / 'run'}: Not a directory"]


PRINTING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import check_data, train
train.run_training = lambda config: print("x" * 100_000) or 0
sys.exit(check_data.run_cli(train.main))
"""


def test_a_closed_pipe_ends_the_program_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        command = [sys.executable, "-c", PRINTING, "DIR"]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", PRINTING, "DIR"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "cannot write the output: No space left on device\n")


def test_a_closed_error_stream_does_not_fill_the_screen_with_tracebacks(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(Closed())
    train.log.addHandler(handler)
    try:
        assert train.main([str(np.inf)]) == 2
    finally:
        train.log.removeHandler(handler)
    assert "Traceback" not in screen.getvalue()

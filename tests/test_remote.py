"""remote.sh against a real sshd on 127.0.0.1; the far side's home is a folder of the test."""

import dataclasses
import getpass
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ARTIFACTS

import train

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"
TOOLS = {name: shutil.which(name, path=SYSTEM) for name in ("sshd", "ssh", "ssh-keygen", "flock", "setsid", "tar")}
MARKER = "--- speech-emotion-trainer ---\n"
MISSING = ", ".join(name for name, path in TOOLS.items() if path is None)
SCRIPTS = ("emotions.py", "stats.py", "check_data.py", "train.py", "requirements.txt", "remote.sh")
SHELLS = [shell for shell in ("dash", "bash", "busybox ash") if shutil.which(shell.split()[0])]
HEADER = "epoch,fold,seed,loss,gradient_norm,validation_loss,validation_ua,skipped\n"

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {MISSING} (openssh-server has sshd)")

# Stands in for train.py: it keeps the log that train.py keeps, and does what the test has written into orders.py.
STAND_IN = """
import os, pathlib, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
log = open(run / "train.log", "w", 1)
def wait():
    while not pathlib.Path("../go").exists():
        time.sleep(0.02)
exec(pathlib.Path("../orders.py").read_text())
"""
RESULTS = {
    "model.npz": random.Random(0).randbytes(300_000),
    "metrics.json": json.dumps({"ua": 0.75, "wa": 0.5, "macro_f1": 0.625, "folds": [{"ua": 0.1}]}, indent=2).encode(),
    "config.json": b"{}\n",
    "history.csv": (HEADER + "1,1,0,1.5,0.5,1.25,0.5,0.0\n1,final,0,1.0,0.5,1.0,0.75,0.0\n").encode(),
    "confusion.csv": b"label,happy\n",
    "wav2vec_mean.npy": b"mean",
    "report.html": b"<html>",
}
FINISH = f"""
for name, content in {RESULTS!r}.items():
    (run / name).write_bytes(content)
(run / "checkpoint-0.npz").write_bytes(b"only for train.py itself")
print("epoch 1/1  loss 1.250  validation UA 0.625  2 of 2 models training  1 s, at most 0 s left", file=log)
"""


class Machine:
    """A running sshd, and a folder of commands that reach it as the host `gpu`, whatever ~/.ssh says."""

    def __init__(self, folder):
        self.folder, self.commands = folder, folder / "commands"
        self.commands.mkdir()
        for key in ("host", "other", "user"):
            self.new_key(key)
        shutil.copy(folder / "user.pub", folder / "authorized")
        self.port = free_port()
        (folder / "sshd.conf").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile {folder}/pid\n"
            f"AuthorizedKeysFile {folder}/authorized\nUsePAM no\nStrictModes no\nPasswordAuthentication no\n"
            f"SetEnv PATH={folder}/home/bin:{os.environ['PATH']} SHLVL=2\n"  # at level 2 bash reads no ~/.bashrc
            f'ForceCommand cd {folder}/home && eval "$SSH_ORIGINAL_COMMAND"\n'
        )
        self.reach(self.port)
        (self.commands / "ssh").write_text(f'#!/bin/sh\nexec {TOOLS["ssh"]} -F {folder}/ssh.conf "$@"\n')
        (self.commands / "ssh").chmod(0o755)

    def new_key(self, name):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)

    def reach(self, port, known="known"):
        """Let the host `gpu` be this port, and any other name nothing at all."""
        (self.folder / "ssh.conf").write_text(
            f"Host gpu\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  HostKeyAlias gpu\n"
            f"  IdentityFile {self.folder}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {self.folder}/{known}\n"
            f"Host *\n  HostName 127.0.0.1\n  Port 1\n  UserKnownHostsFile {self.folder}/{known}\n"
        )

    def start(self):
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        subprocess.run([TOOLS["sshd"], "-f", self.folder / "sshd.conf", "-E", self.folder / "sshd.log"], check=True)
        until(lambda: (self.folder / "pid").exists())

    def stop(self):
        os.kill(int((self.folder / "pid").read_text()), signal.SIGTERM)


class Sides:
    """The near side, a folder with the scripts and a DIR, and the far side, a home with an interpreter in place."""

    def __init__(self, machine, folder):
        self.machine, self.near, self.home = machine, folder / "near", folder / "home"
        self.base = self.home / "speech-emotion-trainer"
        self.run = self.base / "current"
        for place in (self.near / "set", self.home / "bin", self.base / "venv/bin"):
            place.mkdir(parents=True)
        for name in SCRIPTS:
            shutil.copy(ROOT / name, self.near)
        (self.near / "train.py").write_text(STAND_IN)
        for number in range(5):
            (self.near / f"set/{number}.npz").write_bytes(random.Random(number).randbytes(2000))
        shutil.copy(ROOT / "requirements.txt", self.base / "venv")  # so nothing is installed
        self.program(self.base / "venv/bin/python", f'exec {sys.executable} "$@"')
        self.smi = self.home / "bin/nvidia-smi"
        self.program(self.smi, "exit 9")  # the GPU of the machine that tests is not that of the far side
        (machine.folder / "home").unlink(missing_ok=True)
        (machine.folder / "home").symlink_to(self.home)
        self.path = f"{machine.commands}:{os.environ['PATH']}"

    def program(self, path, text):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def orders(self, text):
        (self.home / "orders.py").write_text(text)

    def call(self, *arguments, shell="sh", answer="", **environment):
        return subprocess.run(
            [*shell.split(), "./remote.sh", *arguments],
            cwd=self.near,
            env={**os.environ, "PATH": self.path, **environment},
            input=answer,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=120,
            check=False,
        )

    def deploy(self, *arguments, orders=None, status=0, **how):
        if orders is not None:
            self.orders(orders)
        done = self.call("deploy", "gpu", *(arguments or ("set",)), **how)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def answer(self, text):
        """Put a program in place of ssh, that runs this text of sh."""
        (self.near / "ssh").mkdir(exist_ok=True)
        self.program(self.near / "ssh/ssh", text)
        self.path = f"{self.near}/ssh:{self.path}"

    def ended(self):
        until(lambda: (self.base / "status").exists() and not self.locked())

    def locked(self):
        return subprocess.run(["flock", "-n", "-s", self.base / "lock", "true"], check=False).returncode != 0

    def end(self):
        """End what a test has left: by its number, and only if it is still of this test."""
        (self.home / "go").touch()
        (self.home / "orders.py").write_text("")
        if (self.base / "lock").exists():
            until(lambda: not self.locked())


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def listing(folder):
    """Every name below a folder, with kind, time and content."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.lstat().st_mtime_ns)
        + ((hashlib.sha256(path.read_bytes()).hexdigest(),) if path.is_file() else ())
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("machine"))
    machine.start()
    yield machine
    machine.stop()


@pytest.fixture
def sides(machine, tmp_path):
    sides = Sides(machine, tmp_path)
    yield sides
    machine.reach(machine.port)
    sides.end()


# --- the whole way ---


def test_the_real_scripts_train_there_go_on_after_an_end_and_the_model_comes_back(sides):
    shutil.copy(ROOT / "train.py", sides.near)
    shutil.copytree(ROOT / "sample", sides.near / "sample", ignore=shutil.ignore_patterns("wav2vec_*"))
    command = ("sample", "--epochs", "60", "--patience", "60", "--seeds", "1", "--folds", "2", "--no-compile-cache")
    sides.deploy(*command)
    until(lambda: (sides.run / "train.log").exists() and "\nepoch " in (sides.run / "train.log").read_text())
    os.kill(int((sides.base / "pid").read_text()), signal.SIGTERM)
    sides.ended()
    assert (sides.base / "status").read_text() == "143\n"
    assert verdict(sides)[0] == 6
    sides.deploy(*command)
    followed = sides.call("monitor", "gpu", "-f")
    assert followed.returncode == 0, followed.stdout
    assert "RESUMING from epoch" in (sides.run / "remote.log").read_text()
    for line in ("finished", "epoch 60/60  loss ", "ua 0."):
        assert f"\n{line}" in followed.stdout
    sides.deploy(*command)
    again = sides.call("monitor", "gpu", "-f")
    assert again.returncode == 0, again.stdout
    assert "\nua 0." in again.stdout
    assert "FINISHED: " in (sides.run / "remote.log").read_text()
    before = listing(sides.home)
    assert sides.call("download", "gpu", "got").returncode == 0
    assert listing(sides.home) == before
    names = {path.name for path in (sides.near / "got").iterdir()}
    assert names >= {"model.npz", "config.json", "metrics.json", "history.csv", "predictions.csv", "confusion.csv"}
    assert names >= {"skipped.csv", "train.log", "remote.log", "wav2vec_mean.npy", "wav2vec_std.npy"}
    with np.load(sides.near / "got/model.npz") as model:
        assert np.isfinite(model["params/Dense_0/kernel"]).all()
    check = subprocess.run(
        ["sha256sum", "-c", "manifest.sha256"], cwd=sides.near / "got", capture_output=True, check=False
    )
    assert check.returncode == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_goes_the_whole_way(sides, shell):
    name = f"$(touch canary)\n'{shell}"
    (sides.near / "set").rename(sides.near / name)
    sides.deploy(name, orders=FINISH, shell=shell)
    sides.ended()
    assert sides.call("monitor", "gpu", "-f", shell=shell).returncode == 0
    assert sides.call("download", "gpu", shell=shell).returncode == 0
    (got,) = (sides.near / "runs/gpu").iterdir()
    assert got.name.startswith("__touch_canary___")
    assert_whole(got)
    assert not list((sides.near / "runs").rglob("*.part"))
    assert_harmless(sides)


def assert_whole(got):
    for name, content in RESULTS.items():
        assert (got / name).read_bytes() == content
    assert not (got / "checkpoint-0.npz").exists()


def assert_harmless(sides):
    for side in (sides.near, sides.home):
        assert not [path for path in side.rglob("*") if path.name.startswith("canary")]


def test_busybox_is_enough_on_the_near_side(sides, tmp_path):
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed here")
    tools = tmp_path / "tools"
    tools.mkdir()
    names = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for name in {"busybox", *names}:
        (tools / name).symlink_to(busybox)
    sides.path = f"{sides.machine.commands}:{tools}"
    sides.deploy(orders=FINISH, shell="busybox ash")
    sides.ended()
    assert "finished\n" in sides.call("monitor", "gpu", shell="busybox ash").stdout
    done = sides.call("download", "gpu", "got", shell="busybox ash")
    assert done.returncode == 0, done.stderr
    assert_whole(sides.near / "got")


# --- the verdicts ---


def verdict(sides, *arguments):
    done = sides.call("monitor", "gpu", *arguments)
    return done.returncode, done.stdout.split("\n")[0]


def test_a_run_is_running_then_stalled_then_unhealthy_then_finished(sides):
    sides.orders("print('nan banana', file=log)\n(run / 'history.csv').write_text('')\nwait()\n" + FINISH)
    assert verdict(sides) == (7, "not deployed")
    sides.deploy()
    until(lambda: (sides.run / "history.csv").exists())
    assert verdict(sides) == (3, "running")

    before = listing(sides.home)
    (sides.near / "set/new.npz").write_bytes(b"new")
    refused = sides.deploy("set", "--epochs", "3", status=3)
    assert "nothing was changed" in refused.stderr
    assert listing(sides.home) == before

    for row, expected in [
        ("1,1,0,1.5,0.5,1.25,0.5,0.0\n", 3),
        ("1,1,0,nan,0.5,1.25,0.5,1.0\n", 5),
        ("1,1,0,1.5,inf,1.25,0.5,1.0\n", 5),
        ("1,1,0,nan,0.5,1.25,0.5,1.0\n2,1,0,1e-05,0.5,1.25,nan,1.0\n", 3),  # it has recovered; no UA is not its fault
        ("1,1,0,1.5,0.5,nan,0.5,0.0\n1,1,1,1.5,0.5,1.25,0.5,0.0\n2,1,1,1.5,0.5,1.25,0.5,0.0\n", 5),  # it stopped so
    ]:
        (sides.run / "history.csv").write_text(HEADER + row)
        assert verdict(sides)[0] == expected, row
    (sides.run / "history.csv").write_text(
        f'setting,{HEADER}"a, b",1,1,0,nan,0.5,1.25,0.5,1.0\n"a, c",1,1,0,1.5,0.5,1.25,0.5,1.0\n'
    )
    assert verdict(sides) == (5, "unhealthy: NaN or Inf")

    (sides.run / "history.csv").write_text(HEADER)
    for name in ("history.csv", "train.log", "remote.log"):
        os.utime(sides.run / name, (time.time() - 3600,) * 2)
    assert verdict(sides)[0] == 4

    threading.Timer(1, (sides.home / "go").touch).start()
    done = sides.call("monitor", "gpu", "-f")
    assert done.returncode == 0
    for line in ("finished", "epoch 1/1  loss 1.250", "ua 0.75", "wa 0.5", "macro_f1 0.625"):
        assert f"\n{line}" in done.stdout
    assert done.stdout.count("== ") == 1  # what has been shown is not repeated
    assert "ua 0.1" not in done.stdout
    (sides.run / "history.csv").write_text(HEADER + "1,1,0,nan,0.5,1.25,0.5,1.0\n")
    assert verdict(sides) == (0, "finished")


def test_a_failed_run_tells_its_status_and_its_last_words_harmlessly(sides):
    words = "\0\x1b[2J\x07\x9b2J\u202ekcab\r\x7f\x08 naïve ─ end"
    sides.deploy(orders=f"print('x' * 10**7)\nprint({words!r})\nprint('epoch 1/2 ' + {words!r}, file=log)\nsys.exit(3)")
    sides.ended()
    done = sides.call("monitor", "gpu")
    assert done.returncode == 1
    assert done.stdout.startswith("failed 3\n")
    assert done.stdout.count("naïve ─ end\n") == 2
    assert len(done.stdout) < 2000
    assert not set(done.stdout) & set("\0\x1b\x07\x9b\u202e\r\x7f\x08")
    assert sides.call("download", "gpu", "got").returncode == 0  # its log is what one wants then
    assert "naïve" in (sides.near / "got/remote.log").read_text()


def test_after_kill_9_the_same_deploy_resumes(sides):
    sides.deploy(orders="(run / 'checkpoint-0.npz').write_text('half')\nwait()")
    until(lambda: (sides.run / "checkpoint-0.npz").exists())
    pid = int((sides.base / "pid").read_text())
    launcher = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(launcher, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{launcher}/cmdline").exists() or not Path(f"/proc/{launcher}/cmdline").read_bytes())
    assert verdict(sides)[0] == 3  # the training itself goes on, and holds the lock
    sides.deploy(status=3)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not sides.locked())
    assert verdict(sides) == (6, "killed: deploy again to resume")
    place = sides.run.resolve()
    sides.deploy(orders="assert (run / 'checkpoint-0.npz').read_text() == 'half'\n" + FINISH)
    sides.ended()
    assert verdict(sides)[0] == 0
    assert sides.run.resolve() == place


def test_of_two_deploys_at_once_one_starts(sides):
    sides.orders("wait()\n" + FINISH)
    command = ["sh", "./remote.sh", "deploy", "gpu", "set"]
    how = {"cwd": sides.near, "env": {**os.environ, "PATH": sides.path}, "stdin": subprocess.DEVNULL}
    both = [subprocess.Popen(command, **how, stderr=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for one in both:
        one.communicate(timeout=60)
    assert sorted(one.returncode for one in both) == [0, 3]
    assert (sides.run / "remote.log").read_text().count("== ") == 1


def test_a_machine_that_does_not_answer_is_unreachable(sides):
    sides.machine.reach(1)
    for arguments in (("deploy", "gpu", "set"), ("monitor", "gpu"), ("monitor", "gpu", "-f"), ("download", "gpu")):
        done = sides.call(*arguments)
        assert done.returncode == 255
        assert "Connection refused" in done.stderr
        assert ("unreachable" in done.stdout) == (arguments[0] == "monitor")


def test_a_changed_host_key_stops_everything(sides):
    key = (sides.machine.folder / "other.pub").read_text()
    (sides.machine.folder / "changed").write_text(f"gpu {key}")
    sides.machine.reach(sides.machine.port, known="changed")
    before = listing(sides.home)
    for arguments in (("deploy", "gpu", "set"), ("monitor", "gpu", "-f"), ("download", "gpu")):
        done = sides.call(*arguments)
        assert done.returncode == 255
        assert "IDENTIFICATION HAS CHANGED" in done.stderr
    assert listing(sides.home) == before


def test_nvidia_smi_may_be_missing_failing_or_hanging(sides):
    sides.deploy(orders="")
    sides.ended()
    sides.smi.unlink()
    if shutil.which("nvidia-smi") is None:
        assert "\nGPU: no nvidia-smi\n" in sides.call("monitor", "gpu").stdout
    for program, told in [
        ("echo 'H100, 35 %, 1200 MiB, 81559 MiB'", "GPU: H100, 35 %, 1200 MiB, 81559 MiB\n"),
        ("echo 'No devices were found'\nexit 9", "GPU: No devices were found\nGPU: nvidia-smi failed: 9\n"),
        ("echo $$ >../smi\ntrap '' TERM\nwhile :; do sleep 1; done", "GPU: nvidia-smi hangs\n"),
    ]:
        sides.program(sides.smi, program)
        done = sides.call("monitor", "gpu")
        assert done.returncode == 0
        assert f"\n{told}" in done.stdout
    os.kill(int((sides.home / "smi").read_text()), signal.SIGKILL)


def test_the_device_is_shown_and_a_library_that_did_not_load_gets_a_hint(sides):
    sides.deploy(orders="")
    sides.ended()
    unusable = "device: CPU (2 cores), because THE GPU COULD NOT BE USED: "
    for line, hint in [
        (unusable + "no supported devices found for platform CUDA", False),
        (unusable + "Unable to load cuSPARSE. Is it installed?", True),
        (unusable + "libcudart.so.12: cannot open shared object file", True),
    ]:
        (sides.run / "train.log").write_text(f"device: of an earlier start\n{line}\nloaded 9 files\n")
        done = sides.call("monitor", "gpu")
        assert f"\n{line}\n" in done.stdout
        assert "an earlier start" not in done.stdout
        assert ("unset LD_LIBRARY_PATH" in done.stdout) == hint


def test_stop_ends_the_run_and_the_same_deploy_resumes_it(sides):
    child = "import signal, subprocess\nsubprocess.Popen(['sleep', '1000'])\n"
    save = "signal.signal(signal.SIGTERM, lambda *_: [(run / 'saved').touch(), sys.exit(143)])\n"
    sides.deploy(orders=child + save + "(run / 'checkpoint-0.npz').write_text('half')\nwait()")
    until(lambda: (sides.run / "checkpoint-0.npz").exists())
    done = sides.call("stop", "gpu")
    assert (done.returncode, done.stdout) == (0, "stopped: the same deploy resumes it\n")
    assert (sides.run / "saved").exists()
    assert not sides.locked()
    assert verdict(sides)[0] == 6
    assert sides.call("stop", "gpu").stdout == "no run is active there\n"
    sides.deploy(orders="assert (run / 'checkpoint-0.npz').read_text() == 'half'\n" + FINISH)
    sides.ended()
    assert verdict(sides)[0] == 0


def test_remove_asks_and_removes_only_its_own(sides):
    sides.deploy(orders="wait()\n" + FINISH)
    assert sides.call("remove", "gpu", answer="y\n").returncode == 3
    sides.end()
    (sides.base / "data/mine").mkdir()
    (sides.base / "data/mine/1.npz").write_text("precious")
    before = listing(sides.home)
    for answer in ("", "n\n"):
        done = sides.call("remove", "gpu", answer=answer)
        assert done.returncode == 1
        assert listing(sides.home) == before
    for name in (*(path.name for path in (sides.base / "data").glob("set-*")), "venv", str(sides.base)):
        assert name in done.stdout
    done = sides.call("remove", "gpu", answer="y\n")
    assert done.returncode == 0
    assert [path.name for path in sides.base.rglob("*")] == ["data", "mine", "1.npz"]
    shutil.rmtree(sides.base / "data")
    assert sides.call("remove", "gpu", answer="y\n").stdout.endswith("removed\n")
    assert not sides.base.exists()


# --- what answers in place of the far side ---


def test_a_greeting_before_an_answer_does_no_harm(sides):
    greeting = 'case " $* " in *" -O "*) ;; *) printf "Welcome\\nto the cloud" ;; esac'
    sides.answer(f'{greeting}\nexec {sides.machine.commands}/ssh "$@"')
    assert "rsync" not in sides.deploy(orders=FINISH).stderr  # which would find no protocol in it
    sides.ended()
    assert verdict(sides) == (0, "finished")
    assert sides.call("download", "gpu", "got").returncode == 0
    assert_whole(sides.near / "got")


@pytest.mark.parametrize("status", [0, 1, 255])
def test_an_answer_without_the_marker_is_shown_and_is_no_success(sides, status):
    sides.answer(f"cat >/dev/null; printf 'needs a terminal\\033[2J'; exit {status}")
    for command in (
        ("deploy", "gpu", "set"),
        ("monitor", "gpu"),
        ("download", "gpu"),
        ("stop", "gpu"),
        ("remove", "gpu"),
    ):
        done = sides.call(*command, answer="y\n")
        assert done.returncode == 255
        assert "needs a terminal?[2J" in done.stderr


def test_a_login_with_a_password_gets_a_hint(sides):
    sides.answer("echo 'u@gpu: Permission denied (publickey,password).' >&2; exit 255")
    done = sides.call("monitor", "gpu")
    assert (done.returncode, done.stdout) == (255, "unreachable\n")
    assert "ssh-copy-id gpu" in done.stderr


def entry(name, content=b"{}\n", size=None):
    return f"{hashlib.sha256(content).hexdigest()} {len(content) if size is None else size} {name}\n".encode()


def archive():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (("x", tarfile.SYMTYPE), ("y", tarfile.LNKTYPE), ("z", tarfile.CHRTYPE), ("../evil", None)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind or tarfile.REGTYPE, "../victim"
            tar.addfile(member)
    return file.getvalue()


GOOD = entry("config.json")
ANSWERS = {
    "parent": (entry("../evil") + b"\n{}\n", 1),
    "absolute": (entry("/tmp/evil") + b"\n{}\n", 1),
    "folder": (entry("x/evil") + b"\n{}\n", 1),
    "start file": (entry(".bashrc") + entry("conftest.py") + b"\n{}\n{}\n", 1),
    "two names": (entry("config.json history.csv") + b"\n{}\n", 1),
    "command": (entry("config.json", b"", "PATH[$(>canary)]") + b"\n", 1),
    "size": (entry("config.json", size=2) + b"\n{}\n", 1),
    "checksum": (entry("config.json", b"other") + b"\n{}\n", 1),
    "twice": (GOOD + entry("config.json", b"evil") + b"\n{}\nevil", 0),
    "no end": (b"\0\n" * 1000 + GOOD, 1),
    "archive": (archive(), 1),
    "run name": (b"../../evil$(touch canary)\x1b[2J\n" + GOOD + b"\n{}\n", 0),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_hostile_host_writes_only_known_files_into_the_folder_of_the_download(sides, kind):
    content, status = ANSWERS[kind]
    header = b"" if kind == "run name" else b"run\n"
    (sides.near / "answer").write_bytes(MARKER.encode() + header + content)
    (sides.near / "victim").mkdir()
    sides.answer(f"cat {sides.near}/answer")
    before = set(sides.near.parent.rglob("*"))
    done = sides.call("download", "gpu", shell="bash" if "bash" in SHELLS else "sh")  # bash's arithmetic runs commands
    assert done.returncode == status, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    for path in set(sides.near.parent.rglob("*")) - before:
        assert path == sides.near / "runs" or sides.near / "runs" in path.parents
        assert path.is_dir() or path.name in ("config.json", "manifest.sha256")
        assert not path.is_symlink()


# --- the command line ---


def test_help_is_no_error_and_wrong_use_is(sides):
    for arguments in (("-h",), ("--help",), ("deploy", "--help")):
        done = sides.call(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "remote.sh remove HOST" in done.stdout
    for arguments in (
        (),
        ("delpoy", "gpu", "set"),
        ("deploy", "gpu"),
        ("monitor", "gpu", "-g"),
        ("stop",),
        ("launch",),
    ):
        done = sides.call(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments


@pytest.mark.parametrize(
    "arguments",
    [
        ("monitor", "u@gpu:22"),
        ("monitor", "-p", "22", "gpu"),
        ("deploy", "gpu", "-p22", "set"),
        ("download", "ssh://gpu"),
    ],
)
def test_ports_and_keys_get_the_sentence_that_helps(sides, arguments):
    done = sides.call(*arguments)
    assert done.returncode == 2
    assert "~/.ssh/config" in done.stderr


def test_python_is_looked_for_before_anything_is_copied(sides):
    for name in ("python3", *(f"python3.{minor}" for minor in range(11, 15))):
        sides.program(sides.home / f"bin/{name}", "exit 1")
    before = listing(sides.home)
    done = sides.deploy(status=1)
    assert "Python 3.11 or newer" in done.stderr
    assert "PYTHON=" in done.stderr
    assert listing(sides.home) == before
    assert "Python 3.11" in sides.call("deploy", "gpu", "set", PYTHON="/bin/false").stderr
    chosen = sides.home / "my python"
    sides.program(chosen, f'echo "$@" >>"{sides.home}/used"\nexec {sys.executable} "$@"')
    sides.orders("")
    assert sides.call("deploy", "gpu", "set", PYTHON=str(chosen)).returncode == 0
    assert (sides.home / "used").exists()
    sides.ended()
    assert verdict(sides)[0] == 0


# --- what is copied ---


def test_train_py_gets_its_arguments_with_the_far_side_s_paths(sides):
    (sides.near / "my labels.csv").write_text("file,emotion,speaker\n")
    (sides.near / "happy").mkdir()  # the name of a class, and not copied for that
    (sides.near / "happy/model.npz").write_text("model")
    orders = "import json\npathlib.Path('../argv').write_text(json.dumps(sys.argv[1:]))"
    command = (
        "--epochs",
        "3",
        "--classes",
        "happy",
        "--fresh",
        "set",
        "--labels",
        "my labels.csv",
        "--merge",
        "it's=a b\n",
        "--labels=my labels.csv",
        "--predict=happy",
    )
    sides.deploy(*command, orders=orders)
    sides.ended()
    given = json.loads((sides.home / "argv").read_text())
    assert given[:5] == ["--epochs", "3", "--classes", "happy", "--fresh"]
    data, labels, out = given[5], given[7], given[-1]
    assert same_files(sides.near / "set", sides.base / data)
    assert (sides.base / labels).read_text() == "file,emotion,speaker\n"
    assert given[8:11] == ["--merge", "it's=a b\n", f"--labels={labels}"]
    assert given[11].startswith("--predict=")
    assert (sides.base / given[11].split("=")[1] / "model.npz").read_text() == "model"
    assert out == f"runs/predict-{Path(data).name}"
    there = "../data there"
    (sides.base / there).mkdir()
    sides.deploy("--out", "runs/mine", there, status=0)
    sides.ended()
    assert json.loads((sides.home / "argv").read_text()) == ["--out", "runs/mine", there, "--out", "runs/mine"]
    for words in (("--adapt", there), ("--adapt", "8", there), ("--layer", "-1", there)):
        sides.deploy(*words, "--out", "runs/mine", status=0)
        sides.ended()
        assert json.loads((sides.home / "argv").read_text()) == [*words, "--out", "runs/mine", "--out", "runs/mine"]
    assert "exists neither here nor on HOST" in sides.deploy("missing", status=2).stderr
    assert "needs DIR" in sides.deploy("--epochs", "3", status=2).stderr


@pytest.mark.parametrize(
    ("program", "required"),
    [
        ("echo 'H100, 35 %, 1200 MiB, 81559 MiB'", True),
        ("echo 'GB10, 0 %, [N/A], [N/A]'", True),
        ("echo 'No devices were found'", False),
        ("echo 'NVIDIA-SMI has failed, because it could not communicate with the NVIDIA driver.'\nexit 9", False),
    ],
)
def test_where_the_far_side_has_a_gpu_the_run_requires_it(sides, program, required):
    sides.program(sides.smi, program)
    sides.deploy("set", "--epochs", "3", orders="pathlib.Path('../argv').write_text(' '.join(sys.argv[1:]))")
    sides.ended()
    first, *_ = (sides.home / "argv").read_text().split()
    assert (first == "--require-gpu") == required


def same_files(one, other):
    def contents(folder):
        return {
            os.fsencode(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }

    return contents(one) == contents(other)


def test_a_single_file_can_be_labelled(sides):
    sides.deploy("set/0.npz", "--predict", "set", orders="assert pathlib.Path(sys.argv[1]).is_file()\n")
    sides.ended()
    assert verdict(sides)[0] == 0


def test_every_artifact_is_downloaded():
    listed = (ROOT / "remote.sh").read_text().split("artifacts='")[1].split("'")[0].split()
    assert set(listed) == ARTIFACTS - {"lock"} | {"remote.log"}


def test_every_option_of_train_py_without_a_value_is_known():
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(train.Config) if field.type is bool}
    known = (ROOT / "remote.sh").read_text().split("--*=*")[1].split(")")[0]
    assert set(re.findall(r"--[a-z-]+", known)) == flags


def test_a_new_environment_is_made_once_and_its_failure_is_told(sides):
    (sides.base / "venv").rename(sides.base / "old")
    sides.program(
        sides.home / "bin/python3",
        f'[ "$*" = "-m venv venv" ] || exec {sys.executable} "$@"\n'
        '[ -e ../ready ] || { echo "no ensurepip" && exit 1; }\nmkdir -p venv/bin && cp ../python venv/bin/',
    )
    sides.program(
        sides.home / "python",
        f'[ "$2" != -m ] && [ "$1" != -m ] || exec echo "$@" >>../installed\nexec {sys.executable} "$@"',
    )
    sides.deploy(orders="")
    sides.ended()
    done = sides.call("monitor", "gpu")
    assert (done.returncode, done.stdout.split("\n")[0]) == (1, "failed 1")
    assert "\nset-up since" in done.stdout
    assert "no ensurepip" in done.stdout
    (sides.home / "ready").touch()
    for _ in range(2):
        sides.deploy()
        sides.ended()
        assert verdict(sides)[0] == 0
    (line,) = (sides.home / "installed").read_text().splitlines()
    assert line.startswith("-m pip install -r data/scripts-")


DAMAGE = """{real} "$@"
status=$?
for file in {pattern}; do
    if [ -f "$file" ] && {condition}; then
        touch -r "$file" {folder}/time && printf X | dd of="$file" bs=1 seek=7 conv=notrunc 2>/dev/null
        touch -r {folder}/time "$file" && echo >>{folder}/damaged
    fi
done
exit $status"""


def damaging(sides, name, pattern, condition="true"):
    """Put a program in front of the real one that damages what it copied, and leaves size and time as they were."""
    real = shutil.which(name)
    text = DAMAGE.format(real=real, pattern=pattern, condition=condition, folder=sides.home.parent)
    sides.program(sides.machine.commands / name, text)


@pytest.fixture
def rsync(sides, tmp_path):
    """Make rsync work, fail, go missing, or damage files."""
    if shutil.which("rsync") is None:
        pytest.skip("rsync is not installed here")

    def choose(kind, pattern):
        if kind == "failing":
            sides.program(sides.machine.commands / "rsync", "echo 'unknown option' >&2\nexit 1")
        elif kind == "absent there":
            sides.program(sides.home / "bin/rsync", "exit 127")
        elif kind == "absent":
            (tmp_path / "tools").mkdir(exist_ok=True)
            for folder in reversed(os.environ["PATH"].split(":")):
                for path in Path(folder).glob("*"):
                    if path.name != "rsync" and not (tmp_path / "tools" / path.name).is_symlink():
                        (tmp_path / "tools" / path.name).symlink_to(path)
            sides.path = f"{sides.machine.commands}:{tmp_path}/tools"
        elif kind == "damaging once":
            damaging(sides, "rsync", pattern, f"[ ! -e {tmp_path}/damaged ]")
        elif kind != "working":
            damaging(sides, "rsync", pattern)

    yield choose
    for name in ("rsync", "tar"):
        (sides.machine.commands / name).unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["working", "failing", "absent", "absent there", "damaging once", "damaging"])
def test_files_arrive_whole_whatever_rsync_does(sides, rsync, tmp_path, kind):
    rsync(kind, f"{sides.base}/data/set-*/1.npz")
    sides.deploy(orders=FINISH)
    assert (tmp_path / "damaged").exists() == kind.startswith("damaging")
    (data,) = (sides.base / "data").glob("set-*")
    assert same_files(sides.near / "set", data)


def test_what_did_not_arrive_whole_is_named_and_not_used(sides):
    sides.deploy(orders=FINISH)
    sides.ended()
    sides.program(sides.home / "bin/cat", f'{shutil.which("cat")} "$@" | tr e E')
    done = sides.call("download", "gpu", "got")
    assert done.returncode == 1
    assert done.stderr.endswith("incomplete or damaged after transfer: history.csv\n")
    assert not list(sides.near.glob("got*"))


def test_a_download_never_overwrites_what_is_not_its_own(sides):
    sides.deploy(orders=FINISH)
    sides.ended()
    (sides.near / "mine").mkdir()
    (sides.near / "mine/model.npz").write_text("precious")
    assert sides.call("download", "gpu", "mine").returncode == 2
    assert (sides.near / "mine/model.npz").read_text() == "precious"


def test_a_run_may_go_on_writing_while_it_is_downloaded(sides):
    writing = "while not pathlib.Path('../go').exists():\n    print('x' * 99, file=log)\n    time.sleep(0.001)\n"
    sides.deploy(orders="(run / 'history.csv').write_text('x')\n" + writing)
    until(lambda: (sides.run / "history.csv").exists())
    done = sides.call("download", "gpu", "got")
    assert done.returncode == 0, done.stderr
    log = (sides.near / "got/train.log").read_bytes()
    assert (sides.run / "train.log").read_bytes().startswith(log)


# --- cut connections ---


class Cut:
    """A way to the machine that is cut for good after so many bytes."""

    def __init__(self, port, limit):
        self.port, self.left, self.passed = port, limit, 0
        self.lock = threading.Lock()
        self.server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            if self.left <= 0:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.port))
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=(one, other), daemon=True).start()

    def pump(self, one, other):
        try:
            while data := one.recv(4096):
                with self.lock:
                    data = data[: max(0, self.left)]
                    self.left -= len(data)
                    self.passed += len(data)
                other.sendall(data)
                if self.left <= 0:
                    break
        except OSError:
            pass
        for end in (one, other):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                end.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.close()


def through(sides, limit, *arguments):
    with Cut(sides.machine.port, limit) as cut:
        sides.machine.reach(cut.server.getsockname()[1])
        done = sides.call(*arguments)
        sides.machine.reach(sides.machine.port)
    return done, cut


def test_a_deploy_cut_at_any_moment_is_completed_by_the_next(sides):
    sides.orders(FINISH)
    total = 1 << 40
    for part in range(4):
        (sides.near / "set/0.npz").write_bytes(random.randbytes(200_000))
        with (sides.near / "emotions.py").open("a") as file:
            file.write(f"# {part}\n")
        limit = total if part == 0 else int(total * (part - 1 + random.random()) / 3)
        done, cut = through(sides, limit, "deploy", "gpu", "set")
        if part == 0:
            total = 0.95 * cut.passed  # the next may need a little less
            assert done.returncode == 0
        else:
            assert done.returncode == 255, (limit, total, done.stderr)
        if (sides.base / "lock").exists():
            until(lambda: not sides.locked())
        sides.deploy()
        sides.ended()
        assert (sides.base / "status").read_text() == "0\n"
        words = (sides.run / "remote.log").read_text().split()
        data = [word for word in words if word.startswith("data/set-")][-1]
        assert same_files(sides.near / "set", sides.base / data)


def test_a_download_cut_at_any_moment_leaves_no_damaged_file(sides):
    sides.deploy(orders=FINISH)
    sides.ended()
    before = listing(sides.home)
    total = 1 << 40
    for part in range(4):
        limit = total if part == 0 else int(total * (part - 1 + random.random()) / 3)
        got = sides.near / f"got{part}"
        done, cut = through(sides, limit, "download", "gpu", got.name)
        if part == 0:
            total = 0.95 * cut.passed
            assert done.returncode == 0
        elif done.returncode != 0:
            assert done.returncode in (1, 255), (limit, total, done.stderr)
            assert not got.exists()
        assert sides.call("download", "gpu", got.name).returncode == 0
        assert_whole(got)
    assert listing(sides.home) == before


# --- hostile names ---

HOSTILE = (
    r"""
$(touch canary) | `touch canary` | ;touch canary; | &touch canary& | '; touch canary; ' | "; touch canary; "
'$(touch canary)' | $(touch${IFS}canary) | <(touch canary) | >canary | -oProxyCommand=touch canary | -e touch canary
--rsh=touch canary | user@-oProxyCommand=touch canary | -rf | -- | a:b | gpu:x | a b | * | ?[a]{b,c} | ~root | !! | #
%s%n | back\slash\n
""".strip()
    .replace("\n", " | ")
    .split(" | ")
)
HOSTILE += ["a\ntouch canary\n", "|touch canary", "\x1b[2J\x07\x9b", "\u202e\udcff"]


def test_no_hostile_host_runs_a_command(sides):
    assert len(HOSTILE) == 30
    for host in ["", ".", *HOSTILE]:
        done = sides.call("monitor", host)
        plain = host and all(c.isascii() and (c.isalnum() or c in "@._%+-") for c in host) and host[0] not in "-."
        assert done.returncode == (255 if plain else 2), host
        assert "\x1b" not in done.stderr
    assert_harmless(sides)


@pytest.mark.parametrize("kind", ["working", "failing"])
def test_no_hostile_file_or_path_runs_a_command(sides, rsync, kind):
    rsync(kind, "")
    names = [name for name in HOSTILE if name[0] not in "-"] + [name for name in HOSTILE if name[0] == "-"]
    path = "/".join(names)
    folder = sides.near / path
    folder.mkdir(parents=True)
    for name in HOSTILE:
        (folder / f"{name}.npz").write_text(name, errors="surrogateescape")
        (folder / name).mkdir()
        (folder / name / name).write_text(name, errors="surrogateescape")
    (folder / "loop.npz").symlink_to("loop.npz")
    os.mkfifo(folder / "fifo.npz")
    sides.deploy(path, "--out", f"runs/{path}", orders=FINISH)
    sides.ended()
    (data,) = [place for place in (sides.base / "data").iterdir() if not place.name.startswith("scripts-")]
    assert same_files(folder, data)
    assert sides.call("monitor", "gpu").returncode == 0
    assert sides.call("download", "gpu").returncode == 0
    assert sides.call("download", "gpu", f"got/{path}").returncode == 0
    assert_whole(sides.near / "got" / path)
    assert_harmless(sides)

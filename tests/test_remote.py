"""remote.sh against a real sshd on 127.0.0.1; the far side's home is a folder of the test."""

import dataclasses
import getpass
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import train

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"
TOOLS = {name: shutil.which(name, path=SYSTEM) for name in ("sshd", "ssh", "ssh-keygen", "flock", "setsid", "tar")}
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
}
FINISH = f"""
for name, content in {RESULTS!r}.items():
    (run / name).write_bytes(content)
(run / "state.npz").write_bytes(b"only for train.py itself")
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
            f"SetEnv PATH={folder}/home/bin:{os.environ['PATH']}\n"
            f"ForceCommand cd {folder}/home && eval \"$SSH_ORIGINAL_COMMAND\"\n"
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
        (machine.folder / "home").unlink(missing_ok=True)
        (machine.folder / "home").symlink_to(self.home)
        self.path = f"{machine.commands}:{os.environ['PATH']}"

    def program(self, path, text):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def orders(self, text):
        (self.home / "orders.py").write_text(text)

    def call(self, *arguments, shell="sh", path=None):
        return subprocess.run(
            [*shell.split(), "./remote.sh", *arguments],
            cwd=self.near,
            env={**os.environ, "PATH": path or self.path},
            stdin=subprocess.DEVNULL,
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


def test_the_real_scripts_train_there_after_a_kill_and_the_model_comes_back(sides):
    shutil.copy(ROOT / "train.py", sides.near)
    shutil.copytree(ROOT / "sample", sides.near / "sample", ignore=shutil.ignore_patterns("wav2vec_*"))
    command = ("sample", "--epochs", "2", "--seeds", "1", "--folds", "2", "--no-compile-cache")
    sides.deploy(*command)
    until(lambda: (sides.base / "pid").exists())
    os.kill(int((sides.base / "pid").read_text()), signal.SIGKILL)
    sides.ended()
    assert sides.call("monitor", "gpu").returncode == 6
    sides.deploy(*command)
    followed = sides.call("monitor", "gpu", "-f")
    assert followed.returncode == 0, followed.stdout
    assert "finished" in followed.stdout
    assert "metrics    ua 0." in followed.stdout
    before = listing(sides.home)
    assert sides.call("download", "gpu", "got").returncode == 0
    assert listing(sides.home) == before
    names = {path.name for path in (sides.near / "got").iterdir()}
    assert names >= {"model.npz", "config.json", "metrics.json", "history.csv", "predictions.csv", "confusion.csv"}
    assert names >= {"skipped.csv", "train.log", "remote.log", "wav2vec_mean.npy", "wav2vec_std.npy"}
    with np.load(sides.near / "got/model.npz") as model:
        assert np.isfinite(model["params/Dense_0/kernel"]).all()
    check = subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=sides.near / "got", capture_output=True, check=False)
    assert check.returncode == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_goes_the_whole_way(sides, shell):
    sides.deploy(orders=FINISH, shell=shell)
    assert sides.call("monitor", "gpu", "-f", shell=shell).returncode == 0
    assert sides.call("download", "gpu", shell=shell).returncode == 0
    (got,) = (sides.near / "runs/gpu").iterdir()
    assert got.name.startswith("set-")
    for name, content in RESULTS.items():
        assert (got / name).read_bytes() == content
    assert not (got / "state.npz").exists()
    assert not list((sides.near / "runs").rglob("*.part"))

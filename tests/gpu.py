#!/usr/bin/env python3
"""See all that has to be seen on a GPU, in one command of at most eight minutes.

    python tests/gpu.py [--data DIR:FOLDS ...] [--only PART ...]
    python tests/gpu.py --small

Each part is a process of its own with its own time limit. It prints its rows as soon as they are known, and appends
them to $OUT/gpu.txt if OUT is set: the command may be stopped at any moment. A part that fails, or whose packages are
not installed, costs only its own rows. Exit status 0: no part failed; 1: some did, or ran out of time.

With --small, every part runs on a CPU in about a minute. That shows that this script works, and nothing of a GPU.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench
import numpy as np

import train

HERE = Path(__file__).resolve()
SMALL_RUN = ("--folds", "2", "--seeds", "1", "--epochs", "60", "--patience", "60", "--width", "8")
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
LIMIT = 16e9  # bytes of memory for sequences, on the host and on the device
MAX_DIFFERENCE = 0.02  # of a score, between the device and a CPU


# --- the parts: each yields its rows ----------------------------------------------------------------------------------


def show_device(options: argparse.Namespace) -> Iterator[str]:
    yield start_device(options)
    yield nvidia_smi("name,driver_version,memory.total") or "nvidia-smi names no GPU"
    yield bench.machine()


def first_run(options: argparse.Namespace) -> Iterator[str]:
    """README's first run, on the device and on the CPU of the same machine."""
    ours = run_train(options, "sample")
    cpu = run_train(options, "sample-cpu", JAX_PLATFORMS="cpu")
    for metrics in (ours, cpu):
        yield f"UA {metrics['ua']:.4f} in {metrics['seconds']} s on {metrics['device']}"
    difference = max(abs(ours[name] - cpu[name]) for name in train.SCORES)
    within = "within" if difference <= MAX_DIFFERENCE else "NOT WITHIN"
    yield f"the scores differ by at most {difference:.4f}, {within} {MAX_DIFFERENCE}"
    left, left_on_cpu = (set(os.listdir(options.folder / run)) for run in ("sample", "sample-cpu"))
    yield f"artifacts: {len(left)}, missing: {sorted(left_on_cpu - left) or 'none'}"


def same_seed(options: argparse.Namespace) -> Iterator[str]:
    """Each run is a process of its own, which chooses the algorithms of its products anew."""
    for flag in ("",) if options.small else ("", DETERMINISTIC):  # a CPU has no such flag
        run = "deterministic" if flag else "sample"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        again = f"{run}-again"
        seconds = [run_train(options, name, XLA_FLAGS=flags)["seconds"] for name in (run, again)]
        yield f"{flag or 'without a flag'}: {compared(options, run, again)}, in {seconds} s"


def kill_and_resume(options: argparse.Namespace) -> Iterator[str]:
    """A run that is killed as soon as it has a checkpoint, and the same without the kill."""
    length, unbroken = ("--epochs", 3000, "--patience", 3000), "unbroken"
    if options.small:  # the first run has the length of the others
        length, unbroken = (), "sample"
    folder = options.folder / "killed"
    with subprocess.Popen(command(options, "killed", *length), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(folder.glob("checkpoint-*.npz")):
            time.sleep(0.01)
        process.kill()
    run_train(options, "killed", *length)
    resumed = re.search(r"RESUMING from epoch (\d+)", (folder / "train.log").read_text())
    if resumed is None:
        raise RuntimeError("the run ended before it could be killed")
    run_train(options, unbroken, *length)
    same = compared(options, "killed", unbroken)
    yield f"killed after epoch {resumed[1]} and resumed, against an unbroken run: {same}"


def time_training(options: argparse.Namespace) -> Iterator[str]:
    """Training in memory, beside the time that the device itself needs for the bytes and operations counted."""
    start_device(options)
    copied, size = (1 << 22, 512) if options.small else (1 << 30, 8192)
    bandwidth, rate = copy_rate(copied), bench.matrix_peak(size)
    yield f"measured: copies {bandwidth / 1e9:.0f} GB/s, products {rate / 1e12:.2f} TFLOP/s (on a GPU in TF32)"
    for title, given in problems(options):
        whole, bare = median_seconds(bench.prepare_ours(given), options)
        yield f"{title}: {whole:.2f} s, without compilation {bare:.3f} s"
        moved, operations = bench.bytes_moved(given.experiment), bench.operations(given.experiment)
        floor = max(moved / bandwidth, operations / rate)
        counted = f"{moved / 1e9:.1f} GB, {operations / 1e12:.3f} TFLOP"
        yield f"{title}: at the measured rates {counted} take {floor:.3f} s, {floor / bare:.0%} of that"
        (options.folder / title).write_text(f"{bare}")


def time_pytorch(options: argparse.Namespace) -> Iterator[str]:
    """The same work in PyTorch: a part of its own, as the CUDA libraries of both need not agree in one process."""
    for title, given in problems(options):
        known = options.folder / title
        ours = float(known.read_text()) if known.exists() else None
        contestants = {
            "a loop (2 models, multiplied)": bench.prepare_torch(given, models=2),
            "torch.func": bench.prepare_torch_func(given),
        }
        for name, contestant in contestants.items():
            _, seconds = median_seconds(contestant, options)
            relation = f", {seconds / ours:.1f} times ours" if ours else ""
            yield f"{title}: {name} on {contestant.device} {seconds:.2f} s{relation}"


def compare_precision(options: argparse.Namespace) -> Iterator[str]:
    """Float32, whose products jax computes in TF32 on a GPU, bfloat16, and full float32 products, on --data."""
    if not options.data:
        yield "skipped: no features were given with --data DIR:FOLDS"
    for number, given in enumerate(options.data):
        directory, _, folds = given.rpartition(":")
        data = bench.link_set(directory, options.folder / f"data-{number}")
        exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
        for name, variables in (("float32", {}), ("bfloat16", {}), ("float32 highest", exact)):
            for seed in (0,) if options.small or variables else (0, 1):
                arguments = ("--folds", folds, "--precision", name.split()[0], "--seed", seed)
                run = run_train(options, f"{name}-{number}-{seed}", *arguments, data=data, **variables)
                yield f"{given} {name}, seed {seed}: UA {run['ua']:.4f} in {run['seconds']} s"


def train_sequences(options: argparse.Namespace) -> Iterator[str]:
    """8,882 utterances of 1 to 5 seconds at 50 frames a second; jax gets no more than LIMIT of the device."""
    total = re.match(r"\d+", nvidia_smi("memory.total"))  # MiB
    if total:
        share = LIMIT / 2**20 / int(total[0])
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{min(share, 0.9):.4f}"
    start_device(options)
    utterances, shortest, longest, seeds = (200, 6, 6, 1) if options.small else (8882, 50, 250, 5)
    frames, label = sequences(utterances, shortest, longest)
    config = train.Config("none", seeds=seeds, epochs=2 * train.EPOCHS_PER_CALL)
    given = bench.experiment(frames, label, config)
    watch = bench.Stopwatch()
    train.train_population(*train.set_up(given), given.split, watch)
    yield f"{utterances} sequences of {shortest} to {longest} frames, {len(given.split.train)} models"
    yield f"{watch.bare().wall / config.epochs:.2f} s an epoch"
    yield f"peak memory of the host: {kept(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)}"
    statistics = train.jax.devices()[0].memory_stats() or {}
    yield f"peak memory of the device: {kept(statistics.get('peak_bytes_in_use'))}"


def train_files(options: argparse.Namespace) -> Iterator[str]:
    """The whole program on a large set: on the device, again with what it compiled in a cache, and on the CPU."""
    data, files = options.folder / "files-data", 460 if options.small else 8882
    bench.write_set(data, files, (bench.DIM,))
    length = () if options.small else ("--patience", 40)
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{options.folder}/cache"}
    for run, variables in (("files", cache), ("files again", cache), ("files on the CPU", {"JAX_PLATFORMS": "cpu"})):
        metrics = run_train(options, run, *length, data=data, **variables)
        yield f"{files} {run}: {metrics['seconds']} s on {metrics['device']}"


def compare_sweep(options: argparse.Namespace) -> Iterator[str]:
    settings = 2 if options.small else 16
    sweep = run_train(options, "sweep", "--sweep", settings)["seconds"]
    single = run_train(options, "sample")["seconds"]
    yield f"--sweep {settings} on the sample {sweep} s, {settings} runs {settings * single:.1f} s (one, multiplied)"


def train_layers(options: argparse.Namespace) -> Iterator[str]:
    """The sample as eight layers of an encoder, each with noise of its own, against one of them."""
    data, random = options.folder / "layers-data", np.random.default_rng(0)
    data.mkdir()
    for path in (options.folder / "data").glob("*.npz"):
        x = np.load(path)["emb"]
        np.savez(data / path.name, hidden_states=np.float32(x + random.normal(size=(8, len(x)))))
    several = run_train(options, "layers", "--layers", data=data)["seconds"]
    single = run_train(options, "layer", "--layer", 0, data=data)["seconds"]
    yield f"8 layers of the sample in {several} s, one of them in {single} s: {several / single:.1f} times"


#: The parts, and the seconds that each may take; what one leaves goes to the next.
PARTS = {
    "device": (show_device, 25),
    "first run": (first_run, 25),
    "same seed": (same_seed, 30),
    "kill": (kill_and_resume, 35),
    "training": (time_training, 60),
    "pytorch": (time_pytorch, 65),
    "precision": (compare_precision, 105),
    "sequences": (train_sequences, 40),
    "files": (train_files, 50),
    "sweep": (compare_sweep, 20),
    "layers": (train_layers, 25),
}


# --- what the parts share ---------------------------------------------------------------------------------------------


def start_device(options: argparse.Namespace) -> str:
    return train.start_device(train.Config("none", no_compile_cache=True, require_gpu=not options.small))


def nvidia_smi(query: str) -> str:
    """The answer of nvidia-smi, a line for each GPU; '' without one."""
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def command(options: argparse.Namespace, run: str, *arguments: Any, data: Path | None = None) -> list[str]:
    """The command line of train.py, on the sample or on other data; a later option replaces an earlier one."""
    words = [sys.executable, bench.ROOT / "train.py", data or options.folder / "data", "--no-compile-cache"]
    words += [*SMALL_RUN] if options.small else []
    words += [*arguments, "--out", options.folder / run]
    return [str(word) for word in words]


def run_train(
    options: argparse.Namespace, run: str, *arguments: Any, data: Path | None = None, **variables: str
) -> dict[str, Any]:
    """Run train.py in a process of its own, unless an earlier part has; return what is in metrics.json."""
    metrics = options.folder / run / "metrics.json"
    if not metrics.exists():
        words = command(options, run, *arguments, data=data)
        if not options.small and "JAX_PLATFORMS" not in variables:
            words.append("--require-gpu")
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | variables, check=False)
        if done.returncode:
            raise RuntimeError(f"run {run}, exit status {done.returncode}: {last_line(done.stderr)}")
    return json.loads(metrics.read_text())


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2] or "no message"


def compared(options: argparse.Namespace, *runs: str) -> str:
    """Whether the final models of two runs agree."""
    one, other = (np.load(options.folder / run / "model.npz") for run in runs)
    difference = max(np.abs(one[name] - other[name]).max() for name in one.files)
    return f"NOT equal, parameters differ by up to {difference:.1e}" if difference else "equal to the bit"


def kept(peak: int | None) -> str:
    """Bytes as a text, and whether they are within the limit."""
    if peak is None:
        return "not known"
    return f"{peak / 1e9:.1f} GB, {'within' if peak <= LIMIT else 'MORE THAN'} {LIMIT / 1e9:.0f} GB"


def copy_rate(values: int) -> float:
    """Bytes a second that are read and written in a copy of so many float32 values."""
    import jax

    return 8 * values / bench.median_call(jax.jit(lambda array: array + 1), jax.numpy.zeros(values))


def problems(options: argparse.Namespace) -> Iterator[tuple[str, bench.Problem]]:
    """What is trained, with a title: five folds and the final model, each with all seeds."""
    utterances, epochs, seeds = (460, 5, 1) if options.small else (8882, 40, 5)
    for batch in (64,) if options.small else (256, 1024, 64):  # the slowest last
        given = bench.problem(utterances, batch, epochs, seeds)
        models, batch = len(given.experiment.split.train), given.experiment.config.batch
        yield f"{models} models, {utterances} x {bench.DIM}, {epochs} epochs, batch {batch}", given


def median_seconds(contestant: bench.Contestant, options: argparse.Namespace) -> np.ndarray:
    """With the compilation and without."""
    rounds = 2 if options.small else 3
    return np.median([[cost.wall for cost in contestant.run()] for _ in range(rounds)], 0)


def sequences(utterances: int, shortest: int, longest: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Frames (T, D) of each utterance, cut from one block of random numbers, and labels that can be learned."""
    random = np.random.default_rng(0)
    block = random.standard_normal((20_000, bench.DIM), np.float32)
    directions = random.standard_normal((bench.CLASSES, bench.DIM), np.float32) * 0.2
    label = np.arange(utterances) // bench.SPEAKERS % bench.CLASSES
    frames = []
    for emotion in label:
        length = random.integers(shortest, longest, endpoint=True)
        start = random.integers(0, len(block) - length)
        frames.append(block[start : start + length] + directions[emotion])
    return frames, label


# --- the program ------------------------------------------------------------------------------------------------------


def show(part: str, text: str) -> None:
    """Print a row, and append it to $OUT/gpu.txt."""
    line = f"{part:10} {text}"
    print(line, flush=True)
    if os.environ.get("OUT"):
        with open(Path(os.environ["OUT"], "gpu.txt"), "a") as file:
            print(line, file=file)


def run_part(part: str, seconds: float, folder: Path) -> bool:
    """Run a part in a process of its own, and end all that it has started; return whether it went well."""
    log = folder / f"{part}.log"
    words = [sys.executable, HERE, *sys.argv[1:], "--part", part, "--folder", folder]
    with log.open("w") as errors:
        process = subprocess.Popen(words, cwd=bench.ROOT, stderr=errors, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        show(part, f"CUT OFF after {seconds:.0f} s")
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reason = last_line(log.read_text(errors="replace"))
    skipped = reason.startswith("ModuleNotFoundError: ")
    if status:
        show(part, f"skipped: {reason}" if skipped else f"FAILED, exit status {status}: {reason}")
    return status == 0 or skipped


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="every part in a size for a CPU")
    parser.add_argument("--data", nargs="+", default=[], metavar="DIR:FOLDS", help="real features and their --folds")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    if options.part:
        part, _ = PARTS[options.part]
        for row in part(options):
            show(options.part, row)
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = Path(place)
        bench.link_set(bench.ROOT / "sample", folder / "data")
        if options.small:  # many processes of the same small programs
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
            os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        went_well, limit = True, time.monotonic()
        for part in options.only or PARTS:
            limit += PARTS[part][1]
            went_well &= run_part(part, limit - time.monotonic(), folder)
    return 0 if went_well else 1


if __name__ == "__main__":
    sys.exit(main())

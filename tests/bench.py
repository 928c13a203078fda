#!/usr/bin/env python3
"""Measure the programs beside the tools that one would use instead.

    python tests/bench.py --read --train --growth --start --accuracy DIR --folds emobox-ravdess
    python tests/bench.py --all

The contestants of a benchmark take turns inside one run, so that a machine that slows down slows all of them; results
are medians over the rounds, and ratios are taken round by round. Processes that are started here have jax's persistent
compilation cache turned off: every start is a first start, and nothing is left behind.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import check_data  # noqa: E402
import emotions  # noqa: E402
import stats  # noqa: E402
import train  # noqa: E402

DIM, WIDTH, CLASSES, SPEAKERS = 768, 256, 8, 115
#: Starts a process and tells what it took; small, since Linux counts in a child's peak what its parent held.
LAUNCHER = """import json, os, subprocess, sys, time
started = time.perf_counter()
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:]).pid, 0)
cost = time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss
print("\\n" + json.dumps([os.waitstatus_to_exitcode(status), *cost]))"""


class Cost(NamedTuple):
    """What a run took: seconds of the clock, seconds of all cores together, and MB at most."""

    wall: float
    cpu: float
    peak: float = math.nan


# --- measuring ----------------------------------------------------------------------------------------------------


def turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list]:
    """Let the contestants run one after the other, `rounds` times over; return the results of each."""
    results = {name: [] for name in contestants}
    for number in range(1, rounds + 1):
        for name, run in contestants.items():
            if sys.stderr.isatty():
                print(f"\r\033[Kround {number} of {rounds}: {name}\r", end="", file=sys.stderr, flush=True)
            results[name].append(run())
    return results


def timed(function: Callable[[], Any]) -> Cost:
    """Cost of a call in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def child(*arguments: Any, answer: bool = False) -> Any:
    """Run Python with these arguments.

    Returns
    -------
    Cost or Any
        What the whole process took, imports and exit included; with `answer` the JSON that it printed.

    Raises
    ------
    check_data.UsageError
        If it does not end well.
    """
    command = [sys.executable, "-S", "-c", LAUNCHER, sys.executable, *map(str, arguments)]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", cwd=ROOT, env=environment, check=True
    )
    *lines, report = filter(None, done.stdout.splitlines())
    status, wall, cpu, peak = json.loads(report)
    if status:
        reason = done.stderr.strip().rpartition("\n")[2] or "no message"
        raise check_data.UsageError(f"{' '.join(command[5:])[:200]}: exit status {status}: {reason}")
    return (
        json.loads(lines[-1]) if answer else Cost(wall, cpu, peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))
    )


def machine() -> str:
    """Versions of what takes part, and the number of cores."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("numpy", "jax", "flax", "optax", "torch", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return f"{', '.join(versions)}; {os.cpu_count()} cores"


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print an aligned table in markdown."""
    print(f"\n{title}\n")
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (header, rule, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        print(f"| {' | '.join(cells)} |", flush=True)


def installed(module: str, contestant: str) -> bool:
    """Whether a module that only a benchmark needs is there; say so in a sentence if not."""
    there = importlib.util.find_spec(module.partition(".")[0]) is not None
    if not there:
        print(f"{contestant} is left out: it needs {module}, which is not installed here.")
    return there


# --- reading ------------------------------------------------------------------------------------------------------


def write_set(folder: Path, files: int, shape: tuple[int, ...]) -> list[str]:
    """Write files named as those of ESD, whose numbering allows for 35,000, and of a second copy of it.

    Speakers and emotions alternate, so that a small set has all of them, and an emotion can be learned.
    """
    random = np.random.default_rng(0)
    directions = random.normal(size=(5, shape[-1]))
    folder.mkdir()
    paths = []
    for number in range(files):
        sentence, speaker = divmod(number % 35_000, 20)
        sentence, emotion = divmod(sentence, 5)
        prefix = "esd_" if number < 35_000 else "ESD-"
        paths.append(f"{folder}/{prefix}{speaker + 1:04d}_{350 * emotion + sentence + 1:06d}.npz")
        np.savez(paths[-1], emb=(random.normal(size=shape) + 0.3 * directions[emotion]).astype(np.float32))
    return paths


def raw(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.read(descriptor, os.fstat(descriptor).st_size)  # a larger buffer would cost more than the reading
    finally:
        os.close(descriptor)


def numpy_load(path: str) -> np.ndarray:
    with np.load(path) as file:
        return file["emb"]


def each(read: Callable[[str], Any], paths: list[str]) -> None:
    """Read every file and keep none."""
    for path in paths:
        read(path)


def bench_read(options: argparse.Namespace) -> None:
    """Time reading alone, file by file, and all that happens until there is a block to train on.

    The files are in the page cache. A scan also reads the names, sums the moments and looks for duplicates, and pack
    takes the mean over the frames; the loop over np.load only stacks what it reads.
    """
    rows = []
    for shape, files in (((DIM,), 2000), ((150, DIM), 200)):
        with tempfile.TemporaryDirectory() as place:
            paths = write_set(Path(place) / "set", files, shape)
            config = train.Config(f"{place}/set")
            contestants = {
                "read_features": functools.partial(each, check_data.read_features, paths),
                "np.load": functools.partial(each, numpy_load, paths),
                "raw read": functools.partial(each, raw, paths),
                "scan + pack": lambda config=config: train.pack(check_data.scan(config, keep_features=True)),
                "np.load + np.stack": lambda paths=paths: np.stack([numpy_load(path) for path in paths]),
            }
            timers = {name: functools.partial(timed, run) for name, run in contestants.items()}
            walls = {name: np.array(costs)[:, 0] for name, costs in turns(timers, options.rounds).items()}
        for name, wall in walls.items():
            rival = "scan + pack" if "+" in name else "read_features"
            compared = [f"{np.median(wall / walls[rival]):.2f}", rival]
            rows.append([name, str(shape), str(files), f"{np.median(wall) / files * 1e6:.1f}", *compared])
    table(
        f"Reading, medians of {options.rounds} rounds",
        ["reader", "shape", "files", "us a file", "times", "that of"],
        rows,
    )


# --- training -----------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What all contestants train: the same models on the same utterances x (N, D), in the same batches."""

    x: np.ndarray
    label: np.ndarray
    experiment: Any


def problem(utterances: int, batch: int, epochs: int, seeds: int = 1) -> Problem:
    """Make a set in memory whose classes can be told apart, and split it into five folds."""
    random = np.random.default_rng(0)
    label = np.arange(utterances) // SPEAKERS % CLASSES
    directions = random.normal(size=(CLASSES, DIM)) * 0.2
    x = (directions[label] + random.normal(size=(utterances, DIM))).astype(np.float32)
    config = train.Config("none", seeds=seeds, epochs=epochs, patience=epochs, batch=batch, width=WIDTH)
    return Problem(x, label, experiment(list(x[:, None]), label, config))


def experiment(features: list[np.ndarray], label: np.ndarray, config: train.Config) -> train.Experiment:
    """Pack and split features (T, D) as train.py does with those of files; `features` is emptied.

    train.train uses smaller batches on small sets; the configuration then has them, so that the others get the same.
    """
    scan = check_data.Scan(Path(), dim=features[0].shape[1], features=features)
    for place, emotion in enumerate(label):
        who = emotions.Utterance(f"{place:06d}.npz", "own", emotions.EMOTIONS[emotion], f"own:{place % SPEAKERS}")
        shape = features[place].shape
        scan.records.append(check_data.Record(who, shape, "emb", "float32", crc=place, rms=1.0, bit_sum=place))
    dataset = train.pack(scan)
    split = train.make_split(dataset, config)
    smaller = int(split.train.sum(1).max()) // train.MIN_STEPS_PER_EPOCH
    config = dataclasses.replace(config, batch=min(config.batch, max(smaller, 2)))
    stored = stats.Stored(dataset.moments.merged().statistics(), False, "benchmark")
    return train.Experiment(config, dataset, split, stored)


def operations(given: train.Experiment) -> int:
    """Floating-point operations of the matrix products of all training steps."""
    dim, width, classes = given.dataset.x.shape[1], given.config.width, len(given.dataset.classes)
    # Two products of the hidden layer, whose input needs no gradient, and three of the output layer.
    utterance = 4 * dim * width + 6 * width * classes
    return utterance * int(given.split.train.sum()) * given.config.epochs


def bytes_moved(given: train.Experiment) -> float:
    """Bytes that all training steps read and write at least, if nothing stays in a cache between two kernels.

    Parameters: the forward pass reads them; the gradient is written; the update reads it, the parameters and both
    moments, and writes three of these. A batch: gathered, which reads and writes it, and read by two products.
    """
    dim, width, classes = given.dataset.x.shape[1], given.config.width, len(given.dataset.classes)
    parameters = (dim + 1) * width + (width + 1) * classes
    utterances = int(given.split.train.sum()) * given.config.epochs
    steps = utterances / given.config.batch
    return 4 * (9 * parameters * steps + 4 * dim * utterances)


class Stopwatch(train.RunFolder):
    """Notes the time after each call of the training program, in place of saving checkpoints."""

    def __init__(self):
        super().__init__(None)
        self.calls: list[Cost] = []

    def checkpoint_if_due(self, progress: train.Progress, split: train.Split) -> None:
        self.calls.append(Cost(time.perf_counter(), time.process_time()))

    def bare(self) -> Cost:
        """Cost of all calls at the pace of those after the first, which compiles."""
        calls = len(self.calls)
        span = np.subtract(self.calls[-1], self.calls[0])
        return Cost(*span * calls / (calls - 1))


class Contestant(NamedTuple):
    """A way to train a problem: its device, and a function that does it and returns two costs.

    The first is of all of it, the second without the compilation.
    """

    device: str
    run: Callable[[], tuple[Cost, Cost]]


def compiled(function: Callable[[Stopwatch], Any]) -> Callable[[], tuple[Cost, Cost]]:
    """A run of what compiles in the first call of the training program."""

    def run() -> tuple[Cost, Cost]:
        watch = Stopwatch()
        cost = timed(lambda: function(watch))
        return cost, watch.bare()

    return run


def uncompiled(function: Callable[[], Any], times: float = 1.0) -> Callable[[], tuple[Cost, Cost]]:
    """A run of what compiles nothing; `times` is all work over what the function does of it."""

    def run() -> tuple[Cost, Cost]:
        cost = Cost(*np.multiply(timed(function), times))
        return cost, cost

    return run


def prepare_ours(given: Problem) -> Contestant:
    own = given.experiment
    return Contestant(
        train.start_jax(), compiled(lambda watch: train.train_population(*train.set_up(own), own.split, watch))
    )


def prepare_whole(given: Problem) -> Contestant:
    """More than the others do: also the linear parts, and logits and hidden layers for all test speakers."""
    return Contestant(train.start_jax(), compiled(lambda watch: train.train(given.experiment, watch)))


def torch_model() -> Any:
    """The network of train.py for vectors."""
    from torch.nn import Dropout, Linear, ReLU, Sequential

    return Sequential(Linear(DIM, WIDTH), ReLU(), Dropout(0.5), Linear(WIDTH, CLASSES))


def prepare_torch(given: Problem, models: int | None = None) -> Contestant:
    """The loop that one would write: a model at a time, a batch at a time, the validation after each epoch.

    With `models`, so many are measured, and the costs of all are in proportion.
    """
    import torch

    config, device = given.experiment.config, "cuda" if torch.cuda.is_available() else "cpu"
    label = torch.tensor(given.label, device=device)

    def fit(training: np.ndarray, validating: np.ndarray) -> None:
        mean, std = given.x[training].mean(0), given.x[training].std(0)
        x = torch.tensor((given.x - mean) / std, device=device)
        train_on, validate_on = (torch.tensor(np.flatnonzero(mask), device=device) for mask in (training, validating))
        model = torch_model().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
        loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        for _ in range(config.epochs):
            model.train()
            for chosen in train_on[torch.randperm(len(train_on), device=device)].split(config.batch):
                optimizer.zero_grad()
                loss_of(model(x[chosen]), label[chosen]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            model.eval()
            with torch.no_grad():
                loss_of(model(x[validate_on]), label[validate_on]).item()

    split = given.experiment.split
    masks = list(zip(split.train, split.validation))
    measured = masks[:models]
    return Contestant(device, uncompiled(lambda: [fit(*pair) for pair in measured], len(masks) / len(measured)))


def rectangle(mask: np.ndarray) -> np.ndarray:
    """The utterances of each model (P, N), as many as the median model has: the others lose or repeat some."""
    width = int(np.median(mask.sum(1)))
    return np.stack([np.resize(np.flatnonzero(row), width) for row in mask])


def prepare_torch_func(given: Problem) -> Contestant:
    """All models at once: their parameters stacked, and the gradient of one model under vmap."""
    import torch
    from torch.func import functional_call, grad, stack_module_state, vmap

    config, split = given.experiment.config, given.experiment.split
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, label = (torch.tensor(array, device=device) for array in (given.x, given.label))
    train_on, validate_on = (torch.tensor(rectangle(mask), device=device) for mask in (split.train, split.validation))
    mean, std = (torch.stack([getattr(x[chosen], name)(0) for chosen in train_on]) for name in ("mean", "std"))
    models = [torch_model().to(device) for _ in train_on]

    def loss_of(parameters: dict, mean: Any, std: Any, chosen: Any) -> Any:
        logits = functional_call(models[0], parameters, ((x[chosen] - mean) / std,))
        return torch.nn.functional.cross_entropy(logits, label[chosen], label_smoothing=0.1)

    losses, gradients = (vmap(function, randomness="different") for function in (loss_of, grad(loss_of)))

    def fit() -> None:
        models[0].train()  # alike in all of them, or they cannot be stacked
        parameters, _ = stack_module_state(models)
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=1e-2)
        for _ in range(config.epochs):
            models[0].train()
            order = torch.rand(train_on.shape, device=device).argsort(1)
            for chosen in train_on.gather(1, order).split(config.batch, 1):
                clip_each(gradients(parameters, mean, std, chosen), parameters)
                optimizer.step()
            models[0].eval()
            with torch.no_grad():
                losses(parameters, mean, std, validate_on).tolist()

    return Contestant(device, uncompiled(fit))


def clip_each(gradients: dict, parameters: dict) -> None:
    """Give the stacked parameters their gradients, that of each model clipped to a norm of 1."""
    norm = sum(part.flatten(1).square().sum(1) for part in gradients.values()).sqrt()
    share = (1 / (norm + 1e-6)).clamp(max=1)
    for name, part in gradients.items():
        parameters[name].grad = part * share.view(-1, *[1] * (part.ndim - 1))


def prepare_sklearn(given: Problem) -> Contestant:
    """The ready-made classifier; Adam only, without dropout, decoupled decay, smoothing, clipping or validation."""
    from sklearn.neural_network import MLPClassifier

    config = given.experiment.config

    def fit(training: np.ndarray) -> None:
        x, limits = given.x[training], {"max_iter": config.epochs, "n_iter_no_change": config.epochs, "tol": 0.0}
        model = MLPClassifier((WIDTH,), batch_size=config.batch, solver="adam", **limits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged
            model.fit((x - x.mean(0)) / x.std(0), given.label[training])

    return Contestant("cpu", uncompiled(lambda: [fit(training) for training in given.experiment.split.train]))


PREPARE = {
    "ours": prepare_ours,
    "whole": prepare_whole,
    "torch": prepare_torch,
    "torch.func": prepare_torch_func,
    "sklearn": prepare_sklearn,
}


def matrix_peak(size: int = 2048) -> float:
    """Floating-point operations a second of a float32 product of two square matrices in jax, median of 7."""
    import jax

    one = jax.random.normal(jax.random.key(0), (size, size))
    return 2 * size**3 / median_call(jax.jit(lambda a: a @ a), one)


def median_call(function: Callable[[Any], Any], array: Any) -> float:
    """Seconds of a call of a compiled function, median of 7."""
    function(array).block_until_ready()  # the first one compiles
    return float(np.median([timed(lambda: function(array).block_until_ready()).wall for _ in range(7)]))


def work(contestant: str, utterances: int, batch: int, epochs: int) -> None:
    """Train as one contestant in this process; print what it took, imports and data left out, as JSON."""
    given = problem(utterances, batch, epochs)
    device, run = PREPARE[contestant](given)
    costs = [cost[:2] for cost in run()]
    answer = {"costs": costs, "flops": operations(given.experiment), "batch": given.experiment.config.batch}
    peak = matrix_peak() if contestant == "ours" else 0.0
    print(json.dumps(answer | {"device": device, "peak": peak}))


def bench_train(options: argparse.Namespace) -> None:
    """Five folds and the final model, against a PyTorch loop and scikit-learn's MLPClassifier, at equal work.

    torch.func trains all models at once, the loop one after the other. Each run is a process of its own. Ours compiles
    in the first call of the program; the time without the compilation is that of all calls at the pace of the others.
    `all of train.train` does more than the others: it adds the linear parts, and logits and hidden layers for all test
    speakers. `of peak` sets the operations of the matrix products of the training steps, over the time without
    compilation, against the fastest median of a product of two 2048 x 2048 matrices in jax, measured on the same
    device in the same run.
    """
    names = {"torch": "PyTorch loop", "torch.func": "torch.func", "sklearn": "scikit-learn MLP *"}
    names = {module: name for module, name in names.items() if installed(module, name)}
    names = {"ours": "ours", "whole": "all of train.train"} | names
    rows = []
    for batch in options.batch:
        starts = {}
        for key in names:
            worker = [HERE, "--worker", key, options.utterances, batch, options.epochs]
            starts[key] = functools.partial(child, *worker, answer=True)
        runs = turns(starts, options.rounds)
        rows += training_rows(runs, names)
    size = f"{options.utterances} x {DIM}, {options.epochs} epochs, medians of {options.rounds} rounds"
    devices = ", ".join(f"{name} on {runs[key][0]['device']}" for key, name in names.items() if key != "whole")
    compiled, bare = ["s with compile", "cores' s", "x ours"], ["s without", "cores' s", "x ours", "cores x ours"]
    header = ["contestant", "batch", *compiled, *bare, "GFLOP/s", "of peak"]
    table(f"Training five folds and the final model, {size}; {devices}", header, rows)
    if "sklearn" in names:
        print("* has no dropout, decoupled decay, label smoothing, clipping or validation: each of its steps does less")


def training_rows(runs: dict[str, list[dict]], names: dict[str, str]) -> list[list[str]]:
    """Rows of the table for one batch size.

    Costs have shape (rounds, 2, 2): with the compilation and without, of the clock and of all cores together.
    """
    costs = {key: np.array([answer["costs"] for answer in answers]) for key, answers in runs.items()}
    peak = max(answer["peak"] for answer in runs["ours"])
    flops, batch = runs["ours"][0]["flops"], runs["ours"][0]["batch"]
    rows = []
    for key, name in names.items():
        (wall, cores), (bare_wall, bare_cores) = np.median(costs[key], 0)
        (times, _), (bare_times, cores_times) = np.median(costs[key] / costs["ours"], 0)
        speed = flops / bare_wall
        cells = [f"{value:.2f}" for value in (wall, cores, times)]
        if key == "whole":  # its time without the compilation leaves out what it adds
            cells += [""] * 6
        else:
            cells += [f"{value:.2f}" for value in (bare_wall, bare_cores, bare_times, cores_times)]
            cells += [f"{speed / 1e9:.1f}", f"{speed / peak:.0%}"]
        rows.append([name, str(batch), *cells])
    return rows


# --- whole programs -----------------------------------------------------------------------------------------------


def bench_growth(options: argparse.Namespace) -> None:
    """Time and peak memory of both programs over the number of files, each run a process of its own.

    A slope of 1 on the log-log scale, from the size before, is growth in proportion; start-up makes it smaller.
    """
    rows, contestants = [], {}
    with tempfile.TemporaryDirectory() as place:
        for size in options.sizes:
            write_set(Path(place) / str(size), size, (DIM,))
            short = ["--out", f"{place}/run-{size}", "--epochs", 4, "--seeds", 1]
            for program, extra in (("check_data.py", []), ("train.py", short)):
                contestants[program, size] = functools.partial(child, ROOT / program, f"{place}/{size}", *extra)
        costs = turns(contestants, options.rounds)
    for program in ("check_data.py", "train.py"):
        medians = np.array([np.median(costs[program, size], 0) for size in options.sizes])
        slopes = np.diff(np.log(medians), axis=0) / np.diff(np.log(options.sizes))[:, None]
        for size, (wall, cpu, peak), slope in zip(options.sizes, medians, [None, *slopes]):
            shares = [f"{wall / size * 1000:.3f}", f"{peak / size * 1000:.1f}"]
            steep = ["", ""] if slope is None else [f"{slope[0]:.2f}", f"{slope[2]:.2f}"]
            rows.append([program, str(size), f"{wall:.2f}", f"{cpu:.2f}", f"{peak:.0f}", *shares, *steep])
    share = ["s / 1000 files", "MB / 1000 files", "slope of s", "slope of MB"]
    title = f"Growth with the number of files, vectors of {DIM}, medians of {options.rounds} rounds"
    table(title, ["program", "files", "s", "cores' s", "peak MB", *share], rows)


def link_set(directory: str | Path, place: Path) -> Path:
    """Link what is in a folder into a new one: train.py saves the statistics beside the features."""
    place.mkdir()
    for entry in os.scandir(directory):
        (place / entry.name).symlink_to(os.path.abspath(entry.path))
    return place


def bench_start(options: argparse.Namespace) -> None:
    """Start-up of both programs beside that of Python and jax alone."""
    with tempfile.TemporaryDirectory() as place:
        sample = link_set(ROOT / "sample", Path(place) / "sample")
        commands = {
            "python -c pass": ["-c", "pass"],
            "python -c 'import jax'": ["-c", "import jax"],
            "check_data.py --help": [ROOT / "check_data.py", "--help"],
            "train.py --help": [ROOT / "train.py", "--help"],
            "check_data.py sample": [ROOT / "check_data.py", sample],
            "train.py sample --epochs 1": [ROOT / "train.py", sample, "--epochs", 1, "--out", f"{place}/run"],
        }
        costs = turns({name: functools.partial(child, *command) for name, command in commands.items()}, options.rounds)
    bare = np.array(costs["python -c pass"])
    rows = []
    for name, column in costs.items():
        (wall, cpu, peak), (slower, *_) = np.median(column, 0), np.median(column / bare, 0)
        rows.append([name, f"{wall:.3f}", f"{cpu:.3f}", f"{peak:.0f}", f"{slower:.1f}"])
    header = ["command", "s", "cores' s", "peak MB", "x bare Python"]
    table(f"Starting, medians of {options.rounds} rounds", header, rows)


# --- accuracy -----------------------------------------------------------------------------------------------------


class Features(NamedTuple):
    """Means over the frames (N, D), the frames themselves [(T, D)], their moments stacked along N, labels (N,)."""

    x: np.ndarray
    frames: list[np.ndarray]
    moments: stats.Moments
    label: np.ndarray
    classes: int


class Split(NamedTuple):
    """Indices of the utterances of one fold; `validation` are those of the first seed."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def recall(data: Features, part: np.ndarray, predicted: np.ndarray) -> float:
    """UA of predictions for some utterances; every choice below is made by it on the validation speakers."""
    return float(stats.Counts.of(stats.confusion_matrix(data.label[part], predicted, data.classes)).scores()["ua"])


def best_of(models: list, data: Features, split: Split) -> np.ndarray:
    """Choose a scikit-learn model on the validation speakers, fit it to both parts, predict the test part."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fitted(model: Any, part: np.ndarray) -> Any:
        return make_pipeline(StandardScaler(), model).fit(data.x[part], data.label[part])

    def score(model: Any) -> float:
        return recall(data, split.validation, fitted(model, split.train).predict(data.x[split.validation]))

    chosen = max(models, key=score)
    return fitted(chosen, np.concatenate([split.train, split.validation])).predict(data.x[split.test])


def logistic_regression(data: Features, split: Split) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    models = [LogisticRegression(C=c, max_iter=2000, class_weight="balanced") for c in (0.01, 0.1, 1)]
    return best_of(models, data, split)


def rbf_svm(data: Features, split: Split) -> np.ndarray:
    from sklearn.svm import SVC

    return best_of([SVC(C=c, class_weight="balanced") for c in (1, 10)], data, split)


class Recipe(NamedTuple):
    """How a PyTorch model is trained: validated after `every` so many epochs, until `wait` in a row bring no gain."""

    rate: float
    batch: int
    epochs: int
    every: int
    wait: int


def fit_torch(model: Any, logits: Callable, data: Features, split: Split, recipe: Recipe) -> tuple[float, np.ndarray]:
    """Train with Adam; return the best validation UA, and the predictions for the test part at that epoch.

    `logits` leads from indices of utterances to what the model says of them.
    """
    import torch

    label, parts = torch.tensor(data.label).long(), Split(*map(torch.tensor, split))
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.rate)

    def predict(part: Any) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            return torch.cat([logits(chosen).argmax(1) for chosen in part.split(recipe.batch)]).numpy()

    best, kept, waited = -1.0, None, 0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        for chosen in parts.train[torch.randperm(len(parts.train))].split(recipe.batch):
            if len(chosen) > 1:  # a batch norm cannot train on one
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(logits(chosen), label[chosen]).backward()
                optimizer.step()
        if epoch % recipe.every == 0:
            score, waited = recall(data, split.validation, predict(parts.validation)), waited + 1
            if score > best:
                best, kept, waited = score, copy.deepcopy(model.state_dict()), 0
            if waited == recipe.wait:
                break
    model.load_state_dict(kept)
    return best, predict(parts.test)


def emobox_head(data: Features, split: Split) -> np.ndarray:
    """EmoBox's head (its repository, examples/sb): Linear, ReLU, mean over the real frames, Linear.

    Hidden width 256, Adam 1e-4, batch 32, 100 epochs (its example files have 20). Unlike there, the features are
    standardised, the rate is constant instead of warming up and falling, and validation alone picks the epoch, where
    its script tests every one.
    """
    import torch

    statistics = data.moments.merged(split.train).statistics()
    mean, scale = torch.tensor(statistics.mean), torch.tensor(statistics.scale())
    length = torch.tensor([len(frames) for frames in data.frames])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(len(mean), 256), torch.nn.ReLU(), torch.nn.Linear(256, data.classes))

    def logits(chosen: Any) -> Any:
        frames = torch.tensor(np.concatenate([data.frames[place] for place in chosen.tolist()]))
        return model[2](torch.segment_reduce(model[:2]((frames - mean) / scale), "mean", lengths=length[chosen]))

    return fit_torch(model, logits, data, split, Recipe(1e-4, 32, 100, 1, 100))[1]


def hear_mlp(data: Features, split: Split) -> np.ndarray:
    """HEAR's grid of MLPs as we read it in its evaluation kit.

    1 or 2 hidden layers of 1024 (Linear, batch norm, dropout 0.1, ReLU), Adam at four rates, batch 1024, at most 500
    epochs, validation after every third, patience 20. Unlike there: all 8 points with Xavier's uniform start instead
    of 8 drawn from 16 with two kinds; chosen in each fold, not in the first for all; by UA, not by accuracy; batches
    shuffled; features standardised.
    """
    import torch

    mean, std = data.x[split.train].mean(0), data.x[split.train].std(0)
    x = torch.tensor((data.x - mean) / np.where(std > 0, std, 1))
    outcomes = []
    for hidden, rate in itertools.product((1, 2), (3.2e-3, 1e-3, 3.2e-4, 1e-4)):
        torch.manual_seed(0)
        layers, widths = [], [x.shape[1], *[1024] * hidden]
        for place, (before, after) in enumerate(itertools.pairwise([*widths, data.classes])):
            layers.append(torch.nn.Linear(before, after))
            torch.nn.init.xavier_uniform_(layers[-1].weight, gain=math.sqrt(2) if place else 1.0)
            if place < hidden:
                layers += [torch.nn.BatchNorm1d(after), torch.nn.Dropout(0.1), torch.nn.ReLU()]
        model = torch.nn.Sequential(*layers)
        logits = functools.partial(lambda model, chosen: model(x[chosen]), model)
        outcomes.append(fit_torch(model, logits, data, split, Recipe(rate, 1024, 500, 3, 20)))
    return max(outcomes, key=lambda outcome: outcome[0])[1]


YARDSTICKS = {
    "logistic regression": ("sklearn", logistic_regression),
    "RBF-SVM": ("sklearn", rbf_svm),
    "EmoBox's head": ("torch", emobox_head),
    "HEAR's MLP grid": ("torch", hear_mlp),
}


def bench_accuracy(options: argparse.Namespace) -> None:
    """Scores of usual methods and of ours on the same features, folds and bootstrap over speakers; each runs once.

    Methods that are refitted with their chosen setting (regression, SVM) then get the validation speakers too; those
    that stop early train on the rest. Ours is train.py as the command line runs it, its start included in the seconds.
    """
    config = train.Config(options.accuracy, folds=options.folds)
    scan = check_data.scan(config, keep_features=True)
    for blocker in check_data.blockers(scan):
        raise check_data.UsageError(blocker)
    frames, speaker = list(scan.features), [record.utterance.speaker or record.file for record in scan.records]
    dataset = train.pack(scan)
    split = train.make_split(dataset, config)
    moments = stats.Moments.stack([stats.Moments.of(sequence) for sequence in frames])
    data = Features(moments.mean.astype(np.float32), frames, moments, dataset.label, len(dataset.classes))
    size = f"{len(frames)} utterances, {len(set(speaker))} speakers, {data.classes} classes, --folds {options.folds}"
    rows = []
    for name, (module, method) in YARDSTICKS.items():
        if installed(module, name):
            predicted = np.zeros_like(data.label)
            cost = timed(functools.partial(predict_folds, method, data, split, predicted))
            rows.append(score_row(name, scored(data, speaker, predicted), cost))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as place:
        linked = link_set(options.accuracy, Path(place) / "data")
        cost = child(ROOT / "train.py", linked, "--folds", options.folds, "--out", f"{place}/run")
        rows.append(score_row("ours", json.loads(Path(place, "run", "metrics.json").read_text()), cost))
    table(
        f"Accuracy, per cent, {size}, one run of each",
        ["method", "UA", "95 % interval", "WA", "macro F1", "s", "cores' s"],
        rows,
    )


def predict_folds(method: Callable, data: Features, split: Any, predicted: np.ndarray) -> None:
    """Fill in the prediction for every utterance, by the model of the fold that tests it."""
    for fold in range(split.folds):
        first = split.members(fold)[0]
        masks = split.train[first], split.validation[first], split.fold == fold
        parts = Split(*map(np.flatnonzero, masks))
        predicted[parts.test] = method(data, parts)


def scored(data: Features, speaker: list[str], predicted: np.ndarray) -> dict:
    """Scores of predictions and the interval of UA, as metrics.json has them."""
    confusion = stats.confusion_matrix(data.label, predicted, data.classes)
    _, counts = stats.group_counts(speaker, data.label, predicted, data.classes)
    return stats.Counts.of(confusion).scores() | {"ua_ci95": stats.speaker_intervals(counts)["ua"]}


def score_row(name: str, metrics: dict, cost: Cost) -> list[str]:
    low, high = metrics["ua_ci95"]
    ua, wa, f1 = (f"{100 * metrics[key]:.2f}" for key in ("ua", "wa", "macro_f1"))
    return [name, ua, f"{100 * low:.1f} to {100 * high:.1f}", wa, f1, f"{cost.wall:.1f}", f"{cost.cpu:.1f}"]


# --- the program --------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (_, text) in BENCHMARKS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--accuracy", metavar="DIR", help="score usual methods and ours on these features")
    parser.add_argument("--all", action="store_true", help="all of them; --accuracy on sample/ unless it is given")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (%(default)s)")
    parser.add_argument("--folds", default="5", help="--accuracy: as --folds of train.py (%(default)s)")
    parser.add_argument("--utterances", type=int, default=8882, help="--train: size of the set (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256], help="--train: batch sizes (%(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="--train: epochs (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000, 9000, 27000], help="--growth: files")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.all:
        vars(options).update(dict.fromkeys(BENCHMARKS, True), accuracy=options.accuracy or str(ROOT / "sample"))
    counts = [options.rounds, *options.batch, *options.sizes]
    if min(counts) < 1 or max(options.sizes) > 70_000 or options.utterances < SPEAKERS * CLASSES // 2:
        parser.error("counts are at least 1, --sizes at most 70000 and --utterances at least 460")
    if options.epochs <= train.EPOCHS_PER_CALL:
        parser.error("--epochs must be at least 5: those of the first call of the program are not timed")
    if not options.worker and options.accuracy is None and not any(vars(options)[name] for name in BENCHMARKS):
        parser.error(f"choose a benchmark: {', '.join(f'--{name}' for name in BENCHMARKS)}, --accuracy DIR or --all")
    return options


BENCHMARKS = {
    "read": (bench_read, "reading against np.load and against raw reads"),
    "train": (bench_train, "training against PyTorch and scikit-learn, and against the peak of matrix products"),
    "growth": (bench_growth, "time and memory of both programs over the number of files"),
    "start": (bench_start, "start-up of both programs"),
}


def main() -> int:
    options = parse_options()
    if options.worker:
        contestant, *numbers = options.worker
        work(contestant, *map(int, numbers))
        return 0
    print(machine())
    try:
        for name, (bench, _) in BENCHMARKS.items():
            if vars(options)[name]:
                bench(options)
        if options.accuracy is not None:
            bench_accuracy(options)
    except (check_data.UsageError, stats.DataError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(check_data.run_cli(main))

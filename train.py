#!/usr/bin/env python3
"""Train an emotion classifier on speech embeddings and report speaker-independent, cross-validated scores.

    python train.py DIR [--out RUN]
    python train.py DIR --predict RUN
    python train.py --compare RUN RUN...
    python train.py --fuse RUN RUN... --out RUN

A run scans DIR, packs the features, splits by speaker, trains all folds and the final model as one compiled program,
answers for each test speaker with models that never saw that speaker, scores those answers, and writes RUN.

The path of one utterance through this file: `pack` -> `make_split` -> `train_population`, where `member_step` is one
update of one model -> `finish_fold` -> `Ensemble.forward` -> `evaluate_run` -> `save_run`. With --predict it is
`check_data.iter_features` -> `Ensemble.forward` -> `save_prediction`.

Axes: P population (settings x folds and the final model x seeds), S seeds, K folds, N utterances, B batch, T frames,
L layers, D features (of all layers together), W hidden width, C classes, E epochs; F frames of all sequences together;
R fused runs.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # nohup and `&` ignore it
    # Any kill is safe at any moment (see RunFolder), so Ctrl-C needs no handler. Python's own would wait for the end of
    # a compilation, and print a traceback; first of all, because the other imports take time too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import errno
import glob
import hashlib
import html
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import logging.handlers
import math
import os
import platform
import re
import shutil
import stat
import string
import sys
import time
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Each thread of `train` factors a covariance of its own: threads of OpenBLAS inside it would wait for each other. It
# reads this when numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import check_data
import emotions
import stats
from check_data import UsageError, option, printable, require

log = logging.getLogger("train")

Array = Any  # of jax or numpy; jax is imported by start_jax

EPOCHS_PER_CALL = 4  # of the compiled program; the host reads the measures, logs and saves between calls
MIN_STEPS_PER_EPOCH = 16  # small sets get smaller batches, or an epoch would have too few updates
MAX_LENGTH_GROUPS = 6  # in a batch of sequences: more groups mean less padding and a longer compilation
MAX_BAD_STEPS = 5  # consecutive steps with a loss or gradient that is not finite; then the run ends
MAX_SAVE_SHARE = 0.01  # of the training time goes into checkpoints; twice that in the first minute
SAVE_RATE = 2e8  # bytes a second, assumed until the first checkpoint has been timed
PRIORS = (1, 4, 16)  # to choose from: weight of the mean of all speakers beside the others, in utterances
ADAPTATION = "all|[1-9][0-9]{0,5}"  # values of --adapt
MIN_GAIN = 0.05  # of the validation loss; less is no reason to adapt
LAYER_RATE = 10  # scale of the layer logits, whose weights must move far in a few hundred steps
SHARED_KEY = 2**32 - 1  # branch of the random numbers that all members share
FORWARD_BATCH = 256  # utterances in a product outside training, pooled one by one before
MIN_VARIANCE = 1e-6  # of a pooled frame sequence, after normalisation: the root of 0 has no gradient
MEASURES = ("loss", "gradient_norm", "validation_loss", "validation_ua")  # of an epoch of a member
HISTORY = dict.fromkeys(MEASURES, np.float32) | {"active": np.bool_, "skipped": np.int32}
ARTIFACT_VERSION = 6  # of config.json and model.npz
TRAINING_VERSION = 8  # raised when old checkpoints would continue differently, so that they are refused
MAX_MISTAKES = 10  # in metrics.json and the report
GROUPS = ("corpus", "gender", "intensity")  # fields of an utterance by which it is scored
SCORES = {"ua": "UA (mean recall)", "wa": "WA (accuracy)", "macro_f1": "macro F1"}
MAX_NUMBER, MAX_UNITS, MAX_MODELS = 1_000_000, 1 << 20, 20_000  # epochs and the like; hidden units of all seeds; models
MAX_DESCRIPTION, MAX_MODEL = 1 << 24, 1 << 30  # bytes of config.json and of model.npz
#: What reading the contents of a damaged or foreign file may raise.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
TRANSFER = "transfer"  # instead of the folds, in the scores of --predict
OTHER_CLASS = "the label is not among the classes"
SCORE_FILES = ("metrics.json", "report.html", "confusion.csv")
RUN_FILES = ("config.json", "model.npz", "history.csv", "train.log", "lock")  # files that only a run writes
FORMATS = ("markdown", "latex", "json")  # of the tables of --compare, besides that for the terminal

SWEEP = {  # what --sweep draws: lowest and highest value; "log" draws the logarithm uniformly
    "learning_rate": (3e-4, 3e-3, "log"),
    "weight_decay": (1e-3, 3e-1, "log"),
    "dropout": (0.2, 0.7, "linear"),
    "width": (0.25, 1.0, "linear"),  # share of --width
    "label_smoothing": (0.0, 0.2, "linear"),
    "mixup": (0.0, 0.4, "linear"),
}


# --- options --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(check_data.ScanOptions):
    """Every option: its default, type and help. The command line is built from it."""

    directory: str | None = None
    out: str | None = option(None, "results folder (default: runs/<name of DIR>)", "output")
    predict: str | None = option(None, "label DIR, or a single file, with the model in this results folder", "output")
    new_speakers: bool = option(False, "treat speakers as unseen where their names cannot show it", "output")
    compare: tuple[str, ...] = option((), "compare the scores of these results folders", "output", metavar="RUN")
    fuse: tuple[str, ...] = option(
        (),
        "fuse the answers of these results folders; or what the runs of a fusion have predicted",
        "output",
        metavar="RUN",
    )
    format: str | None = option(None, "form of a comparison, as Markdown, LaTeX or JSON", "output", FORMATS)
    seeds: int = option(5, "models per fold, each with other validation speakers; their logits are averaged", "split")
    seed: int = option(0, "random seed", "split")
    adapt: str | None = option(
        None, "centre each utterance with the others of its speaker: all, or at most this many", "training", bare="all"
    )
    epochs: int = option(40, "maximum epochs", "training")
    patience: int = option(5, "early-stopping patience in epochs", "training")
    batch: int = option(64, "maximum batch size; smaller on small sets, for about 16 steps per epoch", "training")
    pooling: str = option("attentive", "pooling of frame sequences over time", "training", ("attentive", "mean"))
    width: int = option(256, "hidden units", "training")
    dropout: float = option(0.5, "dropout rate of the hidden units, in steps of 1/256", "training")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW, with cosine decay to zero", "training")
    weight_decay: float = option(1e-2, "weight decay of AdamW", "training")
    label_smoothing: float = option(0.1, "label smoothing", "training")
    mixup: float = option(0.0, "maximum mixup weight", "training")
    clip: float = option(1.0, "maximum global norm of the gradient", "training")
    precision: str = option("float32", "precision of matrix products", "training", ("float32", "bfloat16"))
    sweep: int = option(1, "number of settings to train: that of the other options, and random ones", "training")
    fresh: bool = option(False, "start over even if the results folder holds this run, finished or not", "output")
    overwrite: bool = option(False, "replace a finished run on other data or with other options", "output")
    no_compile_cache: bool = option(False, "do not cache the compiled program for later runs", "output")
    recompute_stats: bool = option(False, "recompute the statistics in DIR, unless you supplied them", "output")
    require_gpu: bool = option(False, "exit with status 2 and the reason if no GPU can be used", "training")

    def __post_init__(self):
        super().__post_init__()
        for name in ("out", "predict"):
            require(getattr(self, name) != "", name, "non-empty")
        for name in ("compare", "fuse"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            require(len(getattr(self, name)) != 1, name, "followed by two or more folders")
        inputs = {"DIR": self.directory, "--compare": self.compare, "--fuse": self.fuse}
        given = [name for name, value in inputs.items() if value]
        if not given:
            raise UsageError("DIR is missing: the folder with the features; see --help")
        if len(given) > 1:
            values = f" ({self.directory})" if self.directory else ""
            raise UsageError(f"use only one of {' and '.join(given)}{values}")
        if self.fuse and self.out is None:
            raise UsageError("--fuse needs --out, the folder for its results")
        for name in ("seeds", "epochs", "patience", "batch", "width", "sweep"):
            require(1 <= getattr(self, name) <= MAX_NUMBER, name, f"from 1 to {MAX_NUMBER}")
        require(self.seeds * self.width <= MAX_UNITS, "width", f"at most {MAX_UNITS} / --seeds")
        allowed = self.adapt is None or re.fullmatch(ADAPTATION, self.adapt)
        require(bool(allowed), "adapt", "all, or a number above 0")
        for name in ("learning_rate", "clip"):
            require(0 < getattr(self, name) < math.inf, name, "above 0")
        for name in ("dropout", "label_smoothing", "mixup"):
            require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "at least 0")
        require(0 <= self.seed < 2**32, "seed", "from 0 to 4294967295")


GROUP_OF_OPTION = {field.name: field.metadata["group"] for field in dataclasses.fields(Config)[1:]}  # of all but DIR
TRAINING_OPTIONS = [name for name, group in GROUP_OF_OPTION.items() if group in ("split", "training")]
#: Options on which the results of a run do not depend; a new one in the group "output" is among them.
HARMLESS = {"directory", "require_gpu", *(name for name, group in GROUP_OF_OPTION.items() if group == "output")}
DETAILS = """
examples:
  python train.py DIR                          train; results in runs/<name of DIR>
  python train.py DIR --folds emobox-ravdess   with the folds of a publication
  python train.py NEW --predict RUN            label other files with a model
  python train.py --compare RUN RUN            compare the scores of finished runs
  python train.py --fuse RUN RUN --out FUSED   fuse their answers, with weights

exit status: 0 done; 1 the run failed, or --predict left files out; 2 wrong usage,
or nothing to work on; 130, 143, 129 ended by Ctrl-C, SIGTERM or SIGHUP: the same
command resumes the run
"""


def parse_config(arguments=None) -> Config:
    description = "Train an emotion classifier on a folder of speech embeddings, or label one with a trained model."
    parser, _ = check_data.build_parser(Config, description, DETAILS)
    words = sys.argv[1:] if arguments is None else list(arguments)
    for place, word in enumerate(words[1:]):
        if words[place] == "--adapt" and not re.fullmatch("all|[0-9]+", word):
            words[place] = "--adapt=all"  # or argparse would take the DIR after it for its value
    return Config(**vars(parser.parse_args(words)))


def log_unused(config: Config, reason: str, names: Iterable[str]) -> None:
    """Log the options among these that are set although they have no effect."""
    changed = [name for name in names if getattr(config, name) != getattr(Config, name)]
    if changed:
        log.info(f"note: no effect {reason}: {', '.join(map(check_data.option_flag, changed))}")


def all_options_but(*names: str) -> list[str]:
    return [name for name in GROUP_OF_OPTION if name not in names]


def set_options(config: Config) -> dict:
    """The options that are set."""
    options = dataclasses.asdict(config).items()
    return {name: value for name, value in options if value is not None and value is not False and value != ()}


# --- a run, from the folder to the report ---------------------------------------------------------------------------


def run_training(config: Config) -> int:
    log_unused(config, "without --predict", ["new_speakers"])
    log_unused(config, "without --compare", ["format"])
    directory = check_data.require_folder(config.directory)
    path = Path(config.out) if config.out else default_folder(directory)
    check_output_folder(path, directory)
    # Buffers the log until the data are known to be usable: a run that cannot start must not replace the log of one
    # that could.
    run_log = logging.handlers.MemoryHandler(1 << 30, flushLevel=logging.CRITICAL, flushOnClose=False)
    run_log.setLevel(logging.INFO)
    log.addHandler(run_log)
    try:
        with RunFolder(path, directory) as run:
            with live_log():
                outcome = train_and_score(config, run, run_log)
            if outcome is None:
                show_finished(path)
            elif is_primary():
                try:
                    save_run(run, *outcome)
                finally:  # a full disk must not take the scores with it
                    show_report(outcome[-1], path / "report.html", run_log.target.stream)
    finally:
        log.removeHandler(run_log)
        if run_log.target:
            with contextlib.suppress(OSError):  # a full disk
                run_log.target.stream.close()
    return 0


def default_folder(directory: Path) -> Path:
    """runs/<name of DIR>; if that holds the run of another DIR of this name, with a digest of the path after it."""
    path = Path("runs") / (directory.resolve().name or "data")
    own = path.with_name(f"{path.name}-{folder_digest(directory)[:6]}")
    if not own.exists() and is_run_of(path, directory):
        return path
    log.info(f"results: in {printable(str(own))}; {printable(str(path))} is for another folder with the same name")
    return own


def train_and_score(config: Config, run: "RunFolder", run_log: logging.handlers.MemoryHandler) -> tuple | None:
    """Do all of a run but saving: scan, experiment, outcome of training, and metrics; None if it is finished."""
    started = time.perf_counter()
    device = start_device(config)
    scan = scan_features(config, run.path)
    dataset = pack(scan, config.pooling)
    if dataset.frames is None:
        log_unused(config, "on vectors", ("pooling", "transpose"))
    split = make_split(dataset, config)
    dataset = add_others(dataset, split, config)
    stored, to_save = choose_statistics(scan, dataset, config)
    experiment = Experiment(config, dataset, split, stored)
    identity = run_identity(experiment, scan.fingerprint)
    finished = run.is_finished(config, identity)
    epochs_done = run.find_checkpoint(identity, config.fresh)
    if to_save and is_primary() and not stats.save(scan.directory, stored.statistics, scan.fingerprint, scan.layers):
        log.info("statistics: files appeared in DIR during the scan; they are neither used nor replaced")
    if from_primary(np.array(finished and not epochs_done and not config.fresh)):
        return None
    if is_primary():
        begin_log(run_log, run.path / "train.log", append=epochs_done > 0)
    log_split(split)
    again = "the same command without --fresh" if config.fresh else "the same command"
    log.info(f"this run may be stopped at any time: {again} resumes it from its last checkpoint")
    if epochs_done:
        log.info(f"RESUMING from epoch {epochs_done} of the unfinished run in {printable(str(run.path))}")
    trained = train(experiment, run)
    log.debug("scoring")
    metrics = evaluate_run(experiment, trained)
    metrics |= left_out_report(scan) | {"arrays": scan.keys_used(), "device": device}
    metrics |= provenance(config, package_versions()) | {"seconds": round(time.perf_counter() - started, 1)}
    return scan, experiment, trained, metrics


def left_out_report(scan: check_data.Scan) -> dict:
    """The number of files left out, and the first of them, by code; as in metrics.json."""
    # Reversed, so that the first finding of each code wins.
    first = {finding.code: {"file": finding.file, "reason": finding.reason} for finding in reversed(scan.findings)}
    return {"left_out": scan.left_out(), "left_out_first": first}


def provenance(config: Config, versions: dict[str, str]) -> dict:
    """How to repeat what was done, as in metrics.json."""
    done = {"version": check_data.VERSION, "versions": versions, "settings": set_options(config)}
    return done | {"command": check_data.command_line(config)}


def show_report(metrics: dict, page: Path, log_file) -> None:
    sys.stdout.write(report_text(metrics, page, sys.stdout))
    sys.stdout.flush()
    with contextlib.suppress(OSError):
        log_file.write(report_text(metrics, page, log_file))


def show_finished(run: Path) -> None:
    """Show the scores of a finished run again, on the first process."""
    if not is_primary():
        return
    log.info(f"FINISHED: {printable(str(run))} holds this run, with the scores below; --fresh does it again")
    try:
        text = report_text(read_json(run / "metrics.json"), run / "report.html", sys.stdout)
    except MALFORMED:
        raise UsageError(f"{run}: metrics.json is damaged; --fresh does the run again") from None
    sys.stdout.write(text)


def begin_log(run_log: logging.handlers.MemoryHandler, path: Path, append: bool) -> None:
    """Write the buffered lines to train.log, and every later one at once."""
    descriptor = open_own(path)
    if not append:
        os.truncate(descriptor, 0)
    stream = open(descriptor, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    run_log.setTarget(logging.StreamHandler(stream))
    run_log.flush()
    run_log.capacity = 0


def start_device(config: Config) -> str:
    """Start jax, alone or as one of several processes; return a description of the device."""
    log.debug("starting jax")
    device = start_jax()
    if (jax.process_index() == 0) != is_primary():
        raise UsageError("the environment describes several processes, but jax found only this one")
    if config.require_gpu and jax.default_backend() != "gpu":
        raise UsageError(f"--require-gpu: the device would be {device}")
    if not is_primary():
        log.setLevel(logging.WARNING)
    log.info(f"device: {device}")
    if not config.no_compile_cache:
        enable_compile_cache()
    return device


def scan_features(config: Config, run: Path) -> check_data.Scan:
    """Scan DIR exactly as check_data.py does, and log the same report."""
    settings = ", ".join(f"{name} {value}" for name, value in set_options(config).items())
    log.info(f"settings: {printable(settings)}")
    if not os.access(config.directory, os.W_OK):
        log.info(f"statistics: DIR is read-only, so they will be saved in {printable(str(run))}")
    scan = check_data.scan(config, keep_features=True, progress=log_scan_progress())
    for line in (*check_data.findings_report(scan), *check_data.summary(scan)):
        log.info(line)
    if blockers := check_data.blockers(scan):
        raise UsageError(blockers[0])
    return scan


def log_scan_progress():
    """A function that logs how many files have been read: a line every two seconds, otherwise only for the bar."""
    last = time.monotonic()

    def progress(n_read: int, n_files: int) -> None:
        nonlocal last
        level = logging.DEBUG
        if time.monotonic() - last > 2:
            last, level = time.monotonic(), logging.INFO
        log.log(level, "read %d files", n_read, extra={"share": n_read / n_files})

    return progress


def plain_console(**options) -> Console:
    """A console that takes texts as they are: many of them have the names of files."""
    return Console(markup=False, emoji=False, highlight=False, force_jupyter=False, **options)


class LiveLog(logging.Handler):
    """The log on a terminal, and below it a bar for what is being done.

    A record with a `share` (of the work, 0 to 1) or of level DEBUG changes the bar; every other one is a line above it.
    The cursor is never hidden and rests on an empty line below the bar, so that a killed process leaves it usable.
    """

    def __init__(self):
        super().__init__()
        self.message, self.share, self.started = "starting", None, time.monotonic()
        self.console = plain_console(stderr=True)
        self.console.show_cursor = lambda show=True: True  # rich would hide it
        self.live = Live(get_renderable=self.draw, console=self.console, transient=True, redirect_stdout=False)

    def emit(self, record: logging.LogRecord) -> None:
        share = getattr(record, "share", None)
        if share is None and record.levelno > logging.DEBUG:
            with contextlib.suppress(OSError):  # the terminal is gone, which must not end the run
                self.console.print(self.format(record), soft_wrap=True)
        else:
            self.message, self.share = self.format(record), share

    def draw(self) -> Group:
        bar = Table.grid(padding=(0, 2, 0, 0))
        seconds = f"{time.monotonic() - self.started:.0f} s"
        bar.add_row(ProgressBar(1, self.share or 0, width=40, pulse=self.share is None), seconds)
        return Group(Text(self.message), bar, "")


@contextlib.contextmanager
def live_log():
    """Show the log as a LiveLog, if standard error is a terminal that can move its cursor."""
    root, handler = logging.getLogger(), LiveLog()
    if not sys.stderr.isatty() or handler.console.is_dumb_terminal or not is_primary():
        yield
        return
    plain, root.handlers = root.handlers, [handler]
    log.setLevel(logging.DEBUG)
    try:
        handler.live.start()
        yield handler.live
    finally:
        root.handlers = plain
        log.setLevel(logging.INFO)
        with contextlib.suppress(OSError):  # the terminal is gone
            handler.live.stop()


def check_output_folder(run: Path, directory: Path) -> None:
    """Keep results out of the features, and out of folders that hold anything but a run."""
    config = read_json(run / "config.json", MAX_DESCRIPTION)
    is_ours = "format" in config
    if not os.path.lexists(run / "config.json"):  # unfinished
        is_ours = (run / "lock").is_file() and (run / "train.log").is_file()
    if not is_ours and holds_predictions(run):
        raise UsageError(f"{run} holds predictions, and no run; choose another --out")
    check_folder(run, directory, is_ours)


def folder_digest(directory: Path) -> str:
    return hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:12]


def is_run_of(run: Path, directory: Path) -> bool:
    """Whether a folder holds no run of another DIR, finished or not."""
    if data := read_json(run / "config.json", MAX_DESCRIPTION).get("data"):
        return data == str(directory.resolve())
    lock = b""
    with contextlib.suppress(stats.DataError):
        lock = stats.read_bytes(run / "lock", 100)
    return lock.split()[1:] in ([], [folder_digest(directory).encode()])


def read_json(path: Path, limit: int = MAX_MODEL) -> dict:
    """The JSON object in a file of at most `limit` bytes; empty if there is none."""
    content = None
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(stats.read_bytes(path, limit))
    return content if isinstance(content, dict) else {}


def check_folder(out: Path, features: Path, is_ours: bool) -> None:
    """Refuse an output folder that is none, is among the features, or has files that are not ours."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise UsageError(f"--out {out} is not a folder; choose another")
    inside = Path(os.path.realpath(features)) in Path(os.path.realpath(out)).parents
    same = features.exists() and os.path.samefile(out, features)
    if same or check_data.holds_features(out, subfolders=inside):
        raise UsageError(f"--out {out} is the feature folder, or contains features; choose another")
    own = ("lock", "remote.log")  # of a run that has hardly begun
    for file in sorted(os.listdir(out)):
        if not (is_ours or file in own or file.startswith(".")):
            raise UsageError(f"{out} holds {file}, which is not of this program; choose another --out")


def package_versions(packages=("jax", "flax", "optax", "numpy")) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


# --- the data -------------------------------------------------------------------------------------------------------


class Frames(NamedTuple):
    """All frame sequences, one after the other.

    `rows` is float32, shape (F + longest, D). The mean of its own frames has been subtracted from each sequence, so
    that sums of squares keep their digits; the mean of all would bring test speakers into training. Zeros follow the
    last sequence: a slice as long as the longest sequence never leaves the block. `first` is the first row of each
    utterance, shape (N,).
    """

    rows: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, sequences, means) -> "Frames":
        """Pack sequences of shape (T, D) with their means, (N, D).

        The list is emptied on the way, so that they are never in memory twice.
        """
        length = np.array([len(sequence) for sequence in sequences])
        first = np.cumsum(length) - length
        rows = aligned_zeros((int(length.sum() + length.max()), means.shape[1]))
        while sequences:
            frames = sequences.pop()
            start = first[len(sequences)]
            np.subtract(frames, means[len(sequences)], out=rows[start : start + len(frames)])
        return cls(rows, first)


def aligned_zeros(shape):
    """Zeros, aligned so that CPU devices use the memory in place; otherwise each device makes a copy."""
    block = np.zeros(math.prod(shape) + 16, np.float32)
    start = -block.ctypes.data % 64 // block.itemsize
    return block[start : start + math.prod(shape)].reshape(shape)


class Dataset(NamedTuple):
    """All usable utterances, sorted by file name.

    `x` is the mean over the frames of each utterance, float32, shape (N, D); `length` the number of its frames; `label`
    an index into `classes`; `moments` those of its frames, stacked along N. `frames` is None for vectors.

    With several `layers` of an encoder, x has those of an utterance one after the other; D is L times their width. With
    --adapt, utterances are trained on beside all `others` of their speaker, and validated and tested beside those that
    are `given`.
    """

    x: np.ndarray
    length: np.ndarray
    label: np.ndarray
    classes: tuple[str, ...]
    utterances: list[emotions.Utterance]
    moments: stats.Moments
    frames: Frames | None = None
    layers: int = 1
    others: "Others | None" = None
    given: "Others | None" = None

    def mean_layer(self, x):
        """The mean over the layers of normalised x, (N, D): (N, D / L)."""
        return x.reshape(len(x), self.layers, -1).mean(1)

    def features(self, chosen):
        """Yield the features of utterances as they were read, (T, D) each; a vector is a single frame."""
        for place in chosen:
            if self.frames is None:
                yield self.x[place][None]
            else:
                start = self.frames.first[place]
                yield self.frames.rows[start : start + self.length[place]] + self.x[place]


class Others(NamedTuple):
    """The other utterances of the speaker of each utterance: their mean, shape (N, D), and their number, (N,)."""

    mean: Array
    count: Array


def select_others(others: Others | None, chosen) -> Others | None:
    """Those of some utterances; None, which is no adaptation, stays None."""
    return others and Others(others.mean[chosen], others.count[chosen])


def other_utterances(x, utterances: list[emotions.Utterance], most: float = math.inf, seed: int = 0) -> Others:
    """The other utterances of each speaker; if they are more than `most`, so many are drawn.

    The features of an utterance never move its own mean, not even by rounding, nor do those of its versions and other
    files of the same recording. Versions are not among the others, nor what --classes leaves out. No other label is
    used.
    """
    speaker = np.array([utterance.speaker or "" for utterance in utterances])
    recording = stats.numbered([utterance.recording or utterance.file for utterance in utterances])
    original = np.array([not utterance.version for utterance in utterances])
    random = np.random.default_rng(seed)
    others = Others(aligned_zeros(x.shape), np.zeros(len(x), np.float32))
    for name in np.unique(speaker[speaker != ""]):
        own = np.flatnonzero(speaker == name)
        source = own[original[own]]
        group = stats.numbered(recording[own])
        size = np.bincount(group, original[own])
        others.count[own] = (len(source) - size)[group]
        if others.count[own].max() > most:
            for place in own:
                drawn = random.permutation(source[recording[source] != recording[place]])[: int(most)]
                others.mean[place] = x[drawn].sum(0, dtype=np.float64) / max(len(drawn), 1)
                others.count[place] = len(drawn)
            continue
        sums = np.zeros((len(size), x.shape[1]))
        np.add.at(sums, group[original[own]], x[source])
        nothing = np.zeros_like(sums[:1])
        before = np.concatenate([nothing, sums[:-1]]).cumsum(0)
        after = np.concatenate([sums[1:], nothing])[::-1].cumsum(0)[::-1]
        others.mean[own] = (before + after)[group] / np.maximum(others.count[own], 1)[:, None]
    return others


def most_others(adapt: str) -> float:
    return math.inf if adapt == "all" else int(adapt)


def add_others(dataset: Dataset, split: "Split", config: Config) -> Dataset:
    """Add what --adapt needs. A UsageError is raised where speakers are unknown, or not divided by the split."""
    if config.adapt is None:
        return dataset
    unknown = sum(utterance.speaker is None for utterance in dataset.utterances)
    if unknown or not split.independent:  # training would see the features of test speakers
        reason = f"unknown for {check_data.counted(unknown, 'file')}" if unknown else split.notes[0]
        raise UsageError(f"--adapt needs the speaker of every file, and folds that divide speakers: {reason}")
    others = given = other_utterances(dataset.x, dataset.utterances)
    if config.adapt != "all":  # training gains from all of them even then
        given = other_utterances(dataset.x, dataset.utterances, most_others(config.adapt), config.seed)
    return dataset._replace(others=others, given=given)


def pack(scan: check_data.Scan, pooling: str = "attentive") -> Dataset:
    """Pack a scan with features into one block; the scan's own arrays are released on the way.

    With mean pooling an utterance is the mean of its frames, and the frames are not kept. Layers become one vector.
    """
    utterances = [record.utterance for record in scan.records]
    classes = tuple(scan.count("emotion"))
    label = [classes.index(utterance.emotion) for utterance in utterances]
    sequences, scan.features = scan.features, []
    if scan.layers > 1:
        sequences = [layers.reshape(1, -1) for layers in sequences]
    if all(len(sequence) == 1 for sequence in sequences):
        x = np.concatenate(sequences, out=aligned_zeros((len(sequences), sequences[0].shape[1])))
        moments = stats.Moments(np.ones(len(x)), x, np.zeros((len(x), 1)))
    else:
        moments = stats.Moments.stack([stats.Moments.of(sequence) for sequence in sequences])
        x = moments.mean.astype(np.float32)
    dataset = Dataset(
        x=x,
        length=np.ones(len(label), int),
        label=np.array(label, np.int32),
        classes=classes,
        utterances=utterances,
        moments=moments,
        layers=scan.layers,
    )
    length = moments.count.astype(int)
    if pooling == "mean" or length.max() == 1:
        return dataset
    return dataset._replace(length=length, frames=Frames.of(sequences, dataset.x))


# --- the split: who trains, validates and tests ---------------------------------------------------------------------


class Split(NamedTuple):
    """Who trains, validates and tests, and how the population is laid out.

    `fold` is the fold that tests the speaker of each utterance, shape (N,), or -1; `scored` are the utterances that are
    tested, without the versions of another one. `train` and `validation` are bool masks with a row for each model of
    one setting, shape ((K + 1) S, N): S rows per fold, then S rows of the final model, which tests nobody. A sweep
    repeats these rows for every setting.
    """

    scheme: str
    settings: int
    seeds: int
    fold: np.ndarray
    scored: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    speaker: np.ndarray
    independent: bool
    notes: list[str]

    @property
    def folds(self) -> int:
        return int(self.fold.max()) + 1

    def members(self, fold: int) -> range:
        """The rows of a fold; those of the final model for fold K."""
        return range(fold * self.seeds, (fold + 1) * self.seeds)

    def fold_of(self, row: int) -> int:
        """The fold of a row, K for the final model; in a sweep the rows of the settings follow each other."""
        return row % len(self.train) // self.seeds

    def fold_name(self, fold: int) -> str:
        return "final" if fold == self.folds else str(fold + 1)

    def speakers(self, mask):
        """The speakers of the utterances that a mask selects, sorted."""
        return np.unique(self.speaker[mask]).tolist()


def make_split(dataset: Dataset, config: Config) -> Split:
    """Split by speaker: test folds outside, and in each of them validation speakers that rotate over the seeds.

    Every seed of a fold holds out other speakers for validation, so that together the seeds train on all of them, and
    their mean validation loss covers all of them too. A UsageError is raised where the speakers do not suffice.
    """
    folds = check_data.assign_folds(config, dataset.utterances, dataset.label)
    notes = list(folds.notes)
    models = (folds.number + 1) * config.seeds * config.sweep
    if models > MAX_MODELS:
        found = f"{folds.number} folds make {models} models, more than {MAX_MODELS}"
        raise UsageError(f"{found}; use fewer --folds, --seeds or --sweep")
    if n_versions := len(folds.original) - int(folds.original.sum()):
        notes.append(f"{check_data.counted(n_versions, 'version')} of other files: for training only, not scored")
    train, validation = [], []
    for current in range(folds.number + 1):  # the last one is the final model
        rest = folds.fold != current
        if current < len(folds.validation):
            held_out = [folds.validation[current]] * config.seeds
        else:
            held_out, more = rotate_validation(rest, folds, dataset.label, config)
            notes += [note for note in more if note not in notes]
        train += [rest & ~mask for mask in held_out]
        validation += [mask & folds.original for mask in held_out]
    split = Split(
        scheme=config.folds,
        settings=config.sweep,
        seeds=config.seeds,
        fold=folds.fold,
        scored=folds.original & (folds.fold >= 0),
        train=np.array(train),
        validation=np.array(validation),
        speaker=folds.speaker,
        independent=folds.independent,
        notes=notes,
    )
    check_disjoint(split)
    return split._replace(notes=notes + untrained_classes(dataset, split))


def rotate_validation(rest, folds: check_data.Folds, label, config: Config):
    """Validation masks for the seeds of one fold, whose training and validation utterances are `rest`; and notes."""
    group, notes = stats.numbered(folds.speaker[rest]), []
    if group.max() == 0:  # one speaker: its recordings are divided
        group = stats.numbered(folds.recording[rest])
        notes = ["only one training speaker remains: validation uses the same speaker"]
    blocks = min(max(config.seeds, 5), group.max() + 1)
    block = np.full(len(rest), -1)
    block[rest] = stats.balanced_blocks(group, label[rest], blocks, config.seed)
    return [block == seed % blocks for seed in range(config.seeds)], notes


def untrained_classes(dataset: Dataset, split: Split):
    """A note for each fold that tests a class without having trained on it."""
    notes = []
    for fold in range(split.folds):
        trained = split.train[split.members(fold)].any(0)
        missing = set(dataset.label[split.fold == fold]) - set(dataset.label[trained])
        if split.scheme == "leave-one-corpus-out":  # its classes that no other corpus has are noted
            missing &= set(dataset.label[split.fold != fold])
        if missing:
            names = ", ".join(dataset.classes[label] for label in sorted(missing))
            notes.append(f"fold {fold + 1} tests {names} without having trained on it: too few speakers have it")
    return notes


def check_disjoint(split: Split) -> None:
    """Assert that no model lacks a side of its split, and that no utterance and no speaker is on two sides.

    With a single speaker left, training and validation share it. Anything else is a fault of this program: no score may
    be reported.
    """
    speaker = stats.numbered(split.speaker)
    for row, (train, validation) in enumerate(zip(split.train, split.validation)):
        test = split.fold == split.fold_of(row)
        if not (train.any() and validation.any()):
            raise RuntimeError(f"member {row}: a side of the split is empty")
        if (train & validation).any() or ((train | validation) & test).any():
            raise RuntimeError(f"member {row}: an utterance is on two sides of the split")
        trains, validates, tests = (
            np.bincount(speaker[side], minlength=speaker.max() + 1) > 0 for side in (train, validation, test)
        )
        shared = (trains & validates).any() and (trains | validates).sum() > 1
        if shared or (tests & (trains | validates)).any():
            raise RuntimeError(f"member {row}: a speaker is on two sides of the split")


def log_split(split: Split) -> None:
    kind = f"{split.folds}-fold" if split.scheme.isdecimal() else split.scheme
    folds, seeds = check_data.counted(split.folds, "fold"), check_data.counted(split.seeds, "seed")
    models = f"{folds} and the final model with {seeds} each ({len(split.train)} models)"
    log.info(f"split: {kind}; training {models}")
    if split.independent:
        for fold in range(split.folds):
            tested = split.speakers(split.fold == fold)
            more = f" ... ({len(tested)})" if len(tested) > 6 else ""
            log.info(f"  fold {fold + 1} tests {printable(' '.join(tested[:6]) + more)}")
    for note in split.notes:
        log.info(f"note: {printable(note)}")


# --- normalisation and class weights --------------------------------------------------------------------------------


def choose_statistics(scan: check_data.Scan, dataset: Dataset, config: Config):
    """The user's statistics, or new ones over all data, and whether to save those in DIR for later use.

    Those that a run has saved there bind no later one: the same command always gives the same results.
    """
    stored = scan.stored
    name = printable(str(scan.directory / stats.MEAN_FILE))
    if stored and stored.user_supplied:
        if config.recompute_stats:
            raise UsageError(f"{stats.MEAN_FILE} and {stats.STD_FILE} in DIR were supplied by you; move them first")
        log.info(f"normalisation: every model from {name}, supplied by you")
        return stored, False
    log.info("normalisation: each fold from the speakers that it does not test; final model from all data")
    if scan.statistics_are_stale and not config.recompute_stats:
        log.info(f"statistics: {name} was computed for other files; it is neither used nor replaced")
    # Those of other files stay: the next run may be on them again.
    to_save = (stored is None or config.recompute_stats) and os.access(scan.directory, os.W_OK)
    return stats.Stored(dataset.moments.merged().statistics(), False, scan.fingerprint), to_save


def centre(model, others: Others | None):
    """What utterances are measured from, by a Member or an Ensemble: the mean of all but the test speakers, (D,).

    With --adapt it is (N, D), as it is moved towards the mean of the other utterances of their speaker. n of them move
    it by n / (n + prior), as in the maximum a posteriori estimate of a mean (Gauvain and Lee 1994).
    """
    if others is None:
        return model.mean
    share = others.count / (others.count + model.prior)
    return model.mean + share[..., None] * (others.mean - model.mean)


def normalise_folds(dataset: Dataset, split: Split, stored: stats.Stored):
    """The normalisation of each fold and of the final model: mean and scale, (K + 1, D), and prior, (K + 1,).

    That of a fold is computed from all speakers that it does not test; the final model uses the stored statistics,
    which have seen all data. The user's own apply to every model.
    """
    if not stored.user_supplied:  # the utterances of a fold are merged once, and not for every other fold
        folds = np.unique(split.fold)
        moments = stats.Moments.stack([dataset.moments.merged(split.fold == fold) for fold in folds])

    def normalise(fold):
        statistics = stored.statistics
        if not stored.user_supplied and fold < split.folds:
            statistics = moments.merged(folds != fold).statistics()
        plain = Ensemble(statistics.mean, statistics.scale(), math.inf, {})
        if dataset.others is None:
            return plain
        adapted = plain._replace(prior=choose_prior(dataset, split, fold, plain))
        if stored.user_supplied or math.isinf(adapted.prior):
            return adapted
        used = split.fold != fold
        moved = dataset.moments._replace(mean=dataset.moments.mean - centre(adapted, dataset.others))
        return adapted._replace(scale=statistics._replace(std=moved.merged(used).statistics().std).scale())

    with concurrent.futures.ThreadPoolExecutor(min(available_cores(), 8)) as executor:  # each has copies of x
        models = list(executor.map(normalise, range(split.folds + 1)))
    if dataset.others is not None:
        priors = ", ".join("none" if math.isinf(model.prior) else f"{model.prior:g}" for model in models)
        log.info(f"adaptation: prior of each fold and of the final model: {priors}")
    return (np.stack([np.float32(getattr(model, name)) for model in models]) for name in ("mean", "scale", "prior"))


def choose_prior(dataset: Dataset, split: Split, fold: int, plain: "Ensemble") -> float:
    """The prior with which linear models of a fold have the least loss on its validation speakers.

    It is infinite, which is no adaptation, unless the loss falls clearly: where speakers have few utterances, or very
    different emotions, the mean of the others is no good estimate.
    """
    loss = {}
    for prior in (math.inf, *PRIORS):
        model = plain._replace(prior=prior)
        linear, label = [], []
        for row in split.members(fold):
            training, validation = np.flatnonzero(split.train[row]), np.flatnonzero(split.validation[row])
            kernel, bias = stats.fit_lda(
                dataset.mean_layer(model.normalise(dataset.x[training], select_others(dataset.others, training))),
                dataset.label[training],
                len(dataset.classes),
            )
            x = dataset.mean_layer(model.normalise(dataset.x[validation], select_others(dataset.given, validation)))
            linear.append((x @ kernel + bias[:, None])[None])
            label.append(dataset.label[validation])
        loss[prior] = stats.choose_shrinkage(linear, label).loss
    best = min(PRIORS, key=loss.get)
    return best if loss[best] < (1 - MIN_GAIN) * loss[math.inf] else math.inf


def class_weights(label, train, classes: int):
    """Weights that give all classes equal influence, shape (rows, C); 0 for classes without training utterances."""
    weights = np.zeros((len(train), classes), np.float32)
    for row, mask in zip(weights, train):
        count = np.bincount(label[mask], minlength=classes)
        present = count > 0
        row[present] = count.sum() / present.sum() / count[present]
    return weights


# --- the model ------------------------------------------------------------------------------------------------------


class DeviceData(NamedTuple):
    """The utterances on the device, the same on each; see Dataset and Frames. Vectors have no rows."""

    x: Array  # (N, D)
    label: Array  # (N,)
    batches: Array  # (B, steps), each utterance once: the batches of sequences, which all members share
    length: Array  # (N,)
    first: Array  # (N,)
    rows: Array  # (F + longest, D), less x
    others: Others | None
    given: Others | None


class Hyperparameters(NamedTuple):
    """What a sweep varies: numbers of a member, not constants, so that all settings share one program."""

    learning_rate: Array
    weight_decay: Array
    dropout: Array
    width: Array  # hidden units in use
    label_smoothing: Array
    mixup: Array


def draw_settings(config: Config):
    """The settings of a sweep: first the options themselves, then draws from SWEEP with the seed."""
    settings = [Hyperparameters(*(getattr(config, name) for name in Hyperparameters._fields))]
    random = np.random.default_rng([config.seed, len(SWEEP)])
    while len(settings) < config.sweep:
        drawn = {}
        for name, (low, high, scale) in SWEEP.items():
            share = random.random()
            value = low * (high / low) ** share if scale == "log" else low + (high - low) * share
            drawn[name] = float(f"{value:.3g}")  # as the report prints it
        drawn["width"] = max(1, round(config.width * drawn["width"]))
        settings.append(Hyperparameters(**drawn))
    return settings


class Member(NamedTuple):
    """What one model of the population trains on; stacked along P for the program.

    `train` and `validation` are tables of utterances with a column for each batch, and -1 as padding. For vectors they
    are the member's own. Frames are large, so that for sequences all members walk through one table,
    `DeviceData.batches`, and read each batch once for all: a member's table is that one, with -1 for utterances that it
    does not use.
    """

    index: Array  # () branch of the random numbers; alike in all settings, which then differ by nothing else
    group: Array  # () the seeds of a fold and setting, which stop together; -1 for padding members
    train: Array  # (B, steps)
    validation: Array  # (B, steps)
    mean: Array  # (D,)
    scale: Array  # (D,)
    prior: Array  # (); see centre
    class_weight: Array  # (C,)
    hyper: Hyperparameters


class State(NamedTuple):
    """What training changes; stacked along P."""

    params: Array
    optimizer: Array  # optax's own state
    best: Array  # the parameters of the best epoch so far
    best_loss: Array  # () mean validation loss of the group
    best_epoch: Array  # ()
    active: Array  # () bool: still training
    skipped: Array  # () steps that were not finite and changed nothing
    bad_steps: Array  # () the current run of such steps; never reset once it is MAX_BAD_STEPS


class StaticConfig(NamedTuple):
    """What is fixed for a run and known when the program is compiled."""

    config: Config
    network: Any
    mesh: Any  # the devices that share the population
    classes: int
    layers: int
    groups: tuple[tuple[int, int], ...]  # of a batch of sequences: rows, and frames each has room for; () for vectors
    steps: int  # batches in an epoch
    trained: int  # most utterances of a batch of sequences that a member trains on
    validated: int  # most utterances of a batch of sequences that a member validates on
    mixup: bool  # whether any member uses it
    sequential: bool  # members run one after the other, as on a CPU, where a member's parameters then stay in the cache


def build_network(width: int, classes: int, precision: str):
    """The flax classifier: from pooled features (B, D) and a mask of hidden units (B, W) to logits (B, C).

    The mask holds dropout and the units in use. Products are computed in `precision`; parameters and logits are
    float32.
    """

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            hidden = nn.relu(nn.Dense(width, dtype=precision)(x))
            logits = nn.Dense(classes, dtype=precision)(hidden * mask)
            return logits.astype(jnp.float32)  # the loss needs the digits, also with bfloat16 products

    return Classifier()


def attentive_statistics(group, member: Member, query):
    """Weighted mean and deviation over the frames of each utterance of a group: (B, 2 D).

    The weights are a softmax over frames of their product with `query`, (D,), as in Okabe, Koshinaka and Shinoda 2018
    with a linear score; a query of zeros weighs all frames equally. `real`, (B, T), is False for padding; an utterance
    of padding only stays finite.
    """
    frames, real, x, others = group
    # Only the results are normalised, not the frames, which are large: less memory traffic.
    score = frames @ (query / member.scale)  # (B, T)
    peak = jnp.where(real, score, -jnp.inf).max(1, keepdims=True)
    # A softmax does not depend on its shift, and so has no gradient through it.
    peak = lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0))
    # Masked before and after exp: an overflow in the padding would become NaN in the gradient, even times zero.
    shifted = jnp.where(real, score - peak, 0)
    weight = jnp.where(real, jnp.exp(shifted), 0)
    total = weight.sum(1, keepdims=True)
    weight = weight / jnp.where(total > 0, total, 1)
    mean = jnp.einsum("bt,btd->bd", weight, frames)
    square = jnp.einsum("bt,btd->bd", weight, jnp.square(frames))
    floor = MIN_VARIANCE * jnp.square(member.scale)  # in the units of the frames
    deviation = jnp.sqrt(jnp.maximum(square - jnp.square(mean), floor))
    return jnp.concatenate([(mean + x - centre(member, others)) / member.scale, deviation / member.scale], -1)


def gather_batch(static: StaticConfig, data: DeviceData, others: Others | None, chosen):
    """Gather a batch of utterances, (B,): (x, others), or a list of (frames, real, x, others) by length group."""

    def with_others(chosen):
        return data.x[chosen], select_others(others, chosen)

    if not static.groups:
        return with_others(chosen)
    groups, row = [], 0
    for rows, longest in static.groups:
        own = chosen[row : row + rows]
        row += rows
        # Near the end of an array a slice would be moved; the zeros at the end of Frames prevent that.
        cut = partial(lax.dynamic_slice_in_dim, data.rows, slice_size=longest)
        real = jnp.arange(longest) < data.length[own][:, None]
        groups.append((jax.vmap(cut)(data.first[own]), real & (own >= 0)[:, None], *with_others(own)))
    return groups


def pool(params, member: Member, batch, used=None):
    """One normalised vector for each utterance of a batch: (B, D), (B, D / L) for layers.

    For sequences (M, 2 D), of the rows in use: with the frames read once for all members, the products of the hidden
    layer take most of the time, and a member needs them only for its own utterances.
    """
    if isinstance(batch, list):
        pooled = jnp.concatenate([attentive_statistics(group, member, params["query"]) for group in batch])
        return pooled if used is None else pooled[used]
    x, others = batch
    normalised = (x - centre(member, others)) / member.scale
    if "layers" not in params:
        return normalised
    # A learned weighted mean of the layers, as in SUPERB (Yang and others 2021).
    weight = jax.nn.softmax(LAYER_RATE * params["layers"])
    return jnp.einsum("l,bld->bd", weight, normalised.reshape(len(x), len(weight), -1))


def width_mask(static: StaticConfig, hyper: Hyperparameters):
    """1 for the hidden units in use, 0 for the others, (W,)."""
    # Masked and not sliced: shapes are fixed when the program is compiled.
    return jnp.where(jnp.arange(static.config.width) < hyper.width, 1.0, 0.0)


def dropout_mask(static: StaticConfig, hyper: Hyperparameters, key, batch: int):
    """Factors of the hidden units in a step, (B, W)."""
    width = static.config.width
    # One random byte decides for each unit, in steps of 1/256: a random word for each took as long as a product.
    words = jax.random.bits(key, (batch, -(-width // 4)))
    random = lax.bitcast_convert_type(words, jnp.uint8)
    random = random.reshape(batch, -1)[:, :width]
    dropped = jnp.round(hyper.dropout * 256)
    dropped = jnp.minimum(dropped, 255)  # 256 would divide by zero below
    kept = jnp.where(random >= dropped, 256 / (256 - dropped), 0)
    return kept * width_mask(static, hyper)


def build_optimizer(config: Config, hyper: Hyperparameters, progress):
    """Clipped AdamW (Loshchilov and Hutter 2019) with cosine decay, for one step of one member.

    It is built inside the traced step from the member's own traced numbers; the structure of its state does not
    depend on them. `progress` goes from 0 to 1 over all epochs.
    """
    rate = hyper.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    adamw = optax.adamw(rate, weight_decay=hyper.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def initial_state(static: StaticConfig, members: Member) -> State:
    """First state of the members, on the host: compiling the random numbers would take longer than an epoch.

    Kernels are normal with LeCun's variance, all else is zero. flax and optax give the shapes without computing.
    """
    size, dim = members.mean.shape
    inputs = 2 * dim if static.groups else dim // static.layers
    extra = {"query": jnp.zeros(dim)} if static.groups else {}
    extra |= {"layers": jnp.zeros(static.layers)} if static.layers > 1 else {}

    def initialise(hyper):
        params = static.network.init(jax.random.key(0), jnp.zeros((1, inputs)), jnp.zeros((1, static.config.width)))
        params = params["params"] | extra
        return params, build_optimizer(static.config, hyper, 0.0).init(params)

    shapes, optimizer_shapes = jax.eval_shape(initialise, tree_map(lambda leaf: leaf[0], members.hyper))

    def zeros(leaf):
        return np.zeros((size, *leaf.shape), leaf.dtype)

    params = tree_map(zeros, shapes)
    for row, index in enumerate(members.index):
        # By index and not by row: a member starts the same in every setting, and beside any others.
        random = np.random.default_rng([static.config.seed, int(index)])
        for layer, fan_in in (("Dense_0", inputs), ("Dense_1", members.hyper.width[row])):
            kernel = params[layer]["kernel"][row]
            kernel[:] = random.standard_normal(kernel.shape, np.float32) / np.sqrt(np.float32(fan_in))
    count = np.zeros(size, np.int32)
    return State(
        params=params,
        optimizer=tree_map(zeros, optimizer_shapes),
        best=params,  # may share memory: to_devices copies, and nothing is donated
        best_loss=np.full(size, np.inf, np.float32),
        best_epoch=count,
        active=members.group >= 0,
        skipped=count,
        bad_steps=count,
    )


# --- training one model: a step, an epoch, its validation -----------------------------------------------------------


def cross_entropy(logits, target, weight):
    """Mean of the weighted cross-entropy; logits and target (B, C), weight (B,), 0 for padding."""
    loss = optax.softmax_cross_entropy(logits, target)
    total = jnp.maximum(weight.sum(), 1e-6)  # a batch of padding only gives 0, not 0 / 0
    return jnp.where(weight > 0, loss * weight, 0).sum() / total


def mix(hyper: Hyperparameters, key, weight, arrays):
    """Mixup (Zhang and others 2018) of each row of a batch with the row at the other end; padding is never mixed in."""
    real = weight > 0
    share = hyper.mixup * jax.random.uniform(key, weight.shape)
    share = jnp.where(real & real[::-1], share, 0)[:, None]
    return [array + share * (array[::-1] - array) for array in arrays]


def training_loss(params, static: StaticConfig, member: Member, batch, key):
    """Loss of one batch, with the dropout and mixup that follow from `key`."""
    x, used, label, weight = batch
    # Always split, so that mixup does not change the dropout.
    dropout_key, mixup_key = jax.random.split(key)
    inputs = pool(params, member, x, used)
    target = optax.smooth_labels(jax.nn.one_hot(label, static.classes), member.hyper.label_smoothing)
    if static.mixup:
        inputs, target = mix(member.hyper, mixup_key, weight, (inputs, target))
    mask = dropout_mask(static, member.hyper, dropout_key, len(label))
    logits = static.network.apply({"params": params}, inputs, mask)
    return cross_entropy(logits, target, weight)


def member_step(static: StaticConfig, member: Member, state: State, batch, clock):
    """One update of one member; a step whose loss or gradient is not finite changes nothing but the counters.

    `batch` is features as `gather_batch` gives them, the rows in use, their label and their weight, 0 for padding, both
    (M,); see own_rows. `clock` is the key of the step and the progress from 0 to 1 over all epochs. The measures are 1,
    loss and gradient norm, or zeros.
    """
    key, progress = clock
    loss, gradient = jax.value_and_grad(training_loss)(state.params, static, member, batch, key)
    norm = optax.tree.norm(gradient)
    # Before the clip: it would turn one NaN into all-NaN parameters, and an overflowed norm into a silent zero step.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    # A batch of padding must not move Adam's moments or its count.
    working = state.active & (batch[-1].sum() > 0)
    optimizer = build_optimizer(static.config, member.hyper, progress)

    def update(params, optimizer_state):
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state

    def keep(*unchanged):
        return unchanged

    # Where members run one by one, only one branch runs: an update to be discarded would cost a tenth of the step.
    params, optimizer_state = lax.cond(working & finite, update, keep, state.params, state.optimizer)
    # The host looks only between calls, so that a run of bad steps that ends the training must not be forgotten.
    recovered = finite & (state.bad_steps < MAX_BAD_STEPS)
    bad_steps = jnp.where(recovered, 0, state.bad_steps + ~finite)
    state = state._replace(
        params=params,
        optimizer=optimizer_state,
        skipped=state.skipped + (working & ~finite),
        bad_steps=jnp.where(working, bad_steps, state.bad_steps),
    )
    return state, jnp.where(working, jnp.stack([1.0, loss, norm]), 0)


def member_epoch(static: StaticConfig, data: DeviceData, clock, member: Member, state: State):
    """One epoch of one member in a new random order, then its validation; `clock` is the seed and the epoch.

    Each row of a table holds utterances of about the same length and class, and a batch takes one from each row: all
    batches are about equally full. A member with more utterances than the epoch has room for leaves out others each
    time. All randomness follows from seed, member and epoch, so that a resumed run needs nothing else.
    """
    seed, epoch = clock
    key = epoch_key(seed, member.index, epoch)
    table, order_key = member.train, key
    if static.groups:  # read once for all members, and so in one order
        table, order_key = data.batches, epoch_key(seed, SHARED_KEY, epoch)
    position = jax.random.uniform(order_key, table.shape)
    position = jnp.where(table < 0, 2.0, position)  # padding comes last in each row
    order = jnp.argsort(position, 1)[:, : static.steps]  # the rest waits for another epoch
    read = jnp.take_along_axis(table, order, 1).T  # (steps, B)
    own = jnp.take_along_axis(member.train, order, 1).T
    used, own = own_rows(static, own, jax.random.uniform(key, own.shape), static.trained)

    def step(state, column):
        number, read, used, own = column
        label = data.label[own]
        # An index of -1 gathers the last utterance; its weight of 0 keeps it out of every sum.
        weight = jnp.where(own >= 0, member.class_weight[label], 0)
        batch = gather_batch(static, data, data.others, read), used, label, weight
        progress = (epoch + number / static.steps) / static.config.epochs
        return member_step(static, member, state, batch, (jax.random.fold_in(key, number), progress))

    numbers = jnp.arange(static.steps)
    state, measured = lax.scan(step, state, (numbers, read, used, own))
    steps, loss, norm = measured.sum(0)
    steps = jnp.maximum(steps, 1)  # a member that took no step
    measures = loss / steps, norm / steps, *validate(static, data, member, state.params)
    return state, dict(zip(MEASURES, measures))


def own_rows(static: StaticConfig, own, position, most: int):
    """The rows of each batch that a member uses, (steps, M) or None for all, and their utterances, (steps, M).

    Of the utterances in `own`, (steps, B), at most `most`, those with the smallest positions; -1 is padding.
    """
    if not static.groups:  # a batch of the member's own
        return None, own
    used = jnp.argsort(jnp.where(own < 0, jnp.inf, position), 1)[:, :most]
    return used, jnp.take_along_axis(own, used, 1)


def epoch_key(seed, branch, epoch):
    key = jax.random.fold_in(jax.random.key(seed), branch)
    return jax.random.fold_in(key, epoch)


def validate(static: StaticConfig, data: DeviceData, member: Member, params):
    """Class-balanced cross-entropy and UA of one member on its validation utterances."""
    mask = width_mask(static, member.hyper)

    def add_batch(total, batch):
        read, used, own = batch
        inputs = pool(params, member, gather_batch(static, data, data.given, read), used)
        logits = static.network.apply({"params": params}, inputs, mask)
        # One-hot of -1 is all zeros; optax's cross-entropy with integer labels would take it for the last class.
        label = jnp.where(own >= 0, data.label[own], -1)
        true = jax.nn.one_hot(label, static.classes)  # (B, C)
        loss = optax.softmax_cross_entropy(logits, true)
        correct = jnp.where(logits.argmax(-1) == label, 1.0, 0.0)
        return total + jnp.stack([true.sum(0), loss @ true, correct @ true]), None

    read = data.batches if static.groups else member.validation
    used, own = own_rows(static, member.validation.T, 0.0, static.validated)
    sums = jnp.zeros((3, static.classes))
    (count, loss, correct), _ = lax.scan(add_batch, sums, (read.T, used, own))
    present = (count > 0).sum()
    count = jnp.maximum(count, 1)
    return (loss / count).sum() / present, (correct / count).sum() / present


# --- training the population ----------------------------------------------------------------------------------------


def keep_best(static: StaticConfig, group, state: State, validation_loss, epoch) -> State:
    """Keep the parameters of the best epoch, and stop groups that no longer improve.

    The seeds of a group decide together by their mean validation loss: each alone has only a few speakers.
    """
    together = group[:, None] == group
    # Not a matrix product: the NaN of one group must not reach another.
    group_loss = jnp.where(together, validation_loss, 0).sum(1) / together.sum(1)  # (P,)
    better = state.active & (group_loss < state.best_loss)
    best_epoch = jnp.where(better, epoch, state.best_epoch)
    patient = epoch - best_epoch < static.config.patience

    def choose(better, new, old):  # of one member
        return tree_map(lambda one, other: jnp.where(better, one, other), new, old)

    return state._replace(
        best=jax.vmap(choose)(better, state.params, state.best),
        best_loss=jnp.where(better, group_loss, state.best_loss),
        best_epoch=best_epoch,
        active=state.active & patient & (epoch + 1 < static.config.epochs),
    )


def population_epochs(static: StaticConfig, data: DeviceData, members: Member, clock, state: State):
    """Some epochs of the whole population; `clock` is the seed and the first epoch.

    Measures have shape (EPOCHS_PER_CALL, P); `active` is that before each epoch.
    """
    seed, first = clock
    train_member = partial(member_epoch, static)

    def idle(data, clock, member, state):
        return state, dict.fromkeys(MEASURES, jnp.float32(0))

    def train_or_idle(data, clock, member, state):
        return lax.cond(state.active, train_member, idle, data, clock, member, state)

    def train_share(data, clock, members, state):  # of one device
        if static.sequential:  # members that have stopped cost nothing
            return lax.map(lambda own: train_or_idle(data, clock, *own), (members, state))
        # Under vmap, cond would run both branches and copy their operands.
        return jax.vmap(partial(train_member, data, clock))(members, state)

    everywhere, divided = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("population")
    specs = everywhere, everywhere, divided, divided
    # Nothing is exchanged between devices in here, so that there is no collective to check.
    train_all = jax.shard_map(train_share, mesh=static.mesh, in_specs=specs, out_specs=divided, check_vma=False)

    def one_epoch(state, epoch):
        active = state.active
        state, measures = train_all(data, (seed, epoch), members, state)
        state = keep_best(static, members.group, state, measures["validation_loss"], epoch)
        return state, measures | {"active": active, "skipped": state.skipped}

    return lax.scan(one_epoch, state, first + jnp.arange(EPOCHS_PER_CALL))


def set_up(experiment: "Experiment") -> tuple[StaticConfig, DeviceData, Member]:
    """Lay out the population, and put the data on the devices; the members stay on the host."""
    config, dataset, split, stored = experiment
    settings, classes = draw_settings(config), len(dataset.classes)
    mesh = population_mesh(len(settings) * len(split.train))
    largest = int(split.train.sum(1).max())
    batch = min(config.batch, max(largest // MIN_STEPS_PER_EPOCH, 2))
    normalisation = [np.repeat(part, split.seeds, 0) for part in normalise_folds(dataset, split, stored)]
    masks = split.train, split.validation
    if dataset.frames is None:
        batches, groups = np.zeros((1, 1), np.int32), ()  # unused
        tables = [own_tables(mask, dataset, batch) for mask in masks]
        # As many batches as the median member needs: with as many as the final model needs, which trains on more, every
        # fold would compute padding.
        steps = int(np.median((tables[0] >= 0).any(1).sum(1)))
    else:
        # All sequences in each epoch, in batches so large that a member trains on the usual number of its own.
        # Without their labels: those of the test speakers are among them.
        everyone, unlabelled = np.arange(len(dataset.label)), dataset._replace(label=np.zeros_like(dataset.label))
        batches = strata(everyone, unlabelled, round(batch / split.train.mean()))
        tables = [np.where((batches >= 0) & mask[:, batches], batches, np.int32(-1)) for mask in masks]
        steps, groups = batches.shape[1], length_groups(batches, dataset)
    static = StaticConfig(
        config=config,
        network=build_network(config.width, classes, config.precision),
        mesh=mesh,
        classes=classes,
        layers=dataset.layers,
        groups=groups,
        steps=steps,
        trained=batch,
        validated=int((tables[1] >= 0).sum(1).max()),
        mixup=any(setting.mixup > 0 for setting in settings),
        sequential=not groups and mesh.devices.flat[0].platform == "cpu",
    )
    rows = [*tables, *normalisation, class_weights(dataset.label, split.train, classes)]
    data = to_devices(mesh, device_data(dataset, batches))
    return static, data, stack_members(split, rows, settings, mesh.size)


def stack_members(split: Split, rows, settings, devices: int) -> Member:
    """All members, setting by setting; `rows` are the fields from `train` to `class_weight` for the rows of the split.

    Their number is made a multiple of the devices by repeating the last one, in no group.
    """
    size = len(settings) * len(split.train)
    slot = np.arange(-(-size // devices) * devices, dtype=np.int32)
    setting, row = np.divmod(np.minimum(slot, size - 1), len(split.train))  # clipped: padding repeats the last one
    group = np.where(slot < size, setting * (split.folds + 1) + row // split.seeds, np.int32(-1))
    hyper = Hyperparameters(*(np.array(values, np.float32)[setting] for values in zip(*settings)))
    return Member(row, group, *(values[row] for values in rows), hyper)


def strata(chosen, dataset: Dataset, batch: int):
    """Lay utterances out as a table (batch, steps) whose rows hold those of about the same length and class.

    Batches of one utterance from each row are then about equally full: the sums of the shortest and of the longest
    possible batch differ by no more than the longest and the shortest utterance.
    """
    steps = -(-len(chosen) // batch)
    batch = -(-len(chosen) // steps)  # no row without an utterance
    order = np.lexsort((dataset.label[chosen], dataset.length[chosen]))
    table = np.full(batch * steps, -1, np.int32)
    table[: len(chosen)] = chosen[order]
    return table.reshape(batch, steps)


def own_tables(masks, dataset: Dataset, batch: int):
    """A table (B, steps) of its own for each of the masks, (P, N)."""
    tables = [strata(np.flatnonzero(mask), dataset, batch) for mask in masks]
    stacked = np.full((len(tables), batch, max(table.shape[1] for table in tables)), -1, np.int32)
    for whole, table in zip(stacked, tables):
        whole[: len(table), : table.shape[1]] = table
    return stacked


def length_groups(batches, dataset: Dataset):
    """Cut the rows of a table, (B, steps), into at most MAX_LENGTH_GROUPS groups: (rows, maximum frames).

    Rows hold utterances of about the same length, so that only the last rows of a batch need room for the longest. The
    groups are those with the least padding, by dynamic programming over the row at which each group ends.
    """
    length = np.where(batches >= 0, dataset.length[batches], 1)
    room = np.maximum.accumulate(length.max(1))
    room = np.concatenate([[0], room])  # by the end of a group
    row = np.arange(len(room))
    end, begin = row[:, None], row
    group_cost = np.where(end > begin, (end - begin) * room[end], np.inf)  # frames
    cost = np.where(row == 0, 0, np.inf)  # of all groups up to a row, before the first group
    begins = []
    for _ in range(min(MAX_LENGTH_GROUPS, len(batches))):
        total = cost + group_cost  # by the end and the begin of the last group
        begins.append(total.argmin(1))
        cost = total.min(1)
    groups, stop = {}, len(batches)
    for begin in reversed(begins):
        frames, rows = int(room[stop]), int(stop - begin[stop])
        groups[frames] = groups.get(frames, 0) + rows
        stop = begin[stop]
    return tuple((rows, frames) for frames, rows in reversed(groups.items()))


def device_data(dataset: Dataset, batches) -> DeviceData:
    frames = dataset.frames
    if frames is None:
        nothing = np.zeros((1, 1), np.float32)
        frames = Frames(nothing, np.zeros_like(dataset.label))
    length, first = dataset.length.astype(np.int32), frames.first.astype(np.int32)
    adaptation = dataset.others, dataset.given
    return DeviceData(dataset.x, dataset.label, batches, length, first, frames.rows, *adaptation)


class TrainingError(Exception):
    """Training had to end; the text is the reason. Exit status 1."""


class Progress(NamedTuple):
    """Where training stands between two calls; everything random follows from the seed and the epoch."""

    epoch: int  # the next one
    state: State
    history: dict[str, np.ndarray]  # measures by name, (epochs so far, P)


def train_population(
    static: StaticConfig, data: DeviceData, members: Member, split: Split, run: "RunFolder"
) -> Progress:
    """Train the whole population, from its last checkpoint if `run` has one, until all members have stopped."""
    epochs = static.config.epochs
    program = jax.jit(partial(population_epochs, static))
    progress = run.resume(Progress(0, initial_state(static, members), {}))
    members, state = to_devices(static.mesh, (members, progress.state), "population")
    active = to_host(state.active)
    if active.any():  # before the clock starts from which the time left is estimated
        log.debug("compiling the training program")
        program = program.lower(data, members, (np.uint32(0), np.int32(0)), state).compile()
        log.debug("training the first epochs")
    started, first = time.perf_counter(), progress.epoch
    while active.any():
        clock = np.uint32(static.config.seed), np.int32(progress.epoch)  # a Python int of 2^31 or more is no int32
        state, measures = program(data, members, clock, state)
        measures, bad_steps, active = to_host((measures, state.bad_steps, state.active))
        raise_if_diverged(bad_steps, progress.epoch, split)
        history = measures
        if progress.history:
            history = {name: np.concatenate([progress.history[name], measures[name]]) for name in measures}
        progress = Progress(progress.epoch + EPOCHS_PER_CALL, state, history)
        run.checkpoint_if_due(progress, split)
        pace = (time.perf_counter() - started) / (progress.epoch - first)
        left = f"{active.sum()} models training, at most {pace * (epochs - progress.epoch):.0f} s left"
        log_progress(history, epochs, left if active.any() else "finished")
    return progress


def raise_if_diverged(bad_steps, epoch: int, split: Split) -> None:
    diverged = np.flatnonzero(bad_steps >= MAX_BAD_STEPS)
    if diverged.size:
        names = ", ".join(sorted({split.fold_name(split.fold_of(row)) for row in diverged.tolist()}))
        found = f"loss or gradient was NaN or Inf in {bad_steps.max()} consecutive steps (fold {names})"
        advice = "check the features with check_data.py, and try a smaller --learning-rate with --fresh"
        raise TrainingError(f"up to epoch {epoch + EPOCHS_PER_CALL}: {found}; {advice}")


def log_progress(history, epochs: int, outlook: str) -> None:
    """Log the last epoch in which any model trained."""
    active = history["active"]
    last = np.flatnonzero(active.any(1))[-1]
    loss, ua = (history[name][last][active[last]].mean() for name in ("loss", "validation_ua"))
    line = f"epoch {last + 1}/{epochs}  loss {loss:.3f}  validation UA {ua:.3f}  {outlook}"
    log.info(line, extra={"share": (last + 1) / epochs})


def history_rows(history, split: Split):
    """Rows of history.csv: one for each epoch and each member that was still training."""
    members = len(split.train)  # of one setting
    active = history["active"]
    rows = []
    for epoch, member in np.argwhere(active).tolist():
        row = {"setting": member // members + 1} if split.settings > 1 else {}
        row["epoch"] = epoch + 1
        row["fold"] = split.fold_name(split.fold_of(member))
        row["seed"] = member % split.seeds
        for name in (*MEASURES, "skipped"):
            row[name] = float(history[name][epoch, member])
        rows.append(row)
    return rows


# --- several devices, several hosts ---------------------------------------------------------------------------------
#
# The population axis is divided among all devices of all processes; nothing is exchanged but validation losses. Every
# process scans the data and makes the same split. The first one alone writes, finds the checkpoint and decides when the
# next is due; all of them take part in gathering it.


def is_primary() -> bool:
    """Whether this is the first process of a run, alone or on several hosts; known before jax is imported."""
    for size, number in (
        ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
        ("SLURM_NTASKS", "SLURM_PROCID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ):
        if os.environ.get(size, "1") != "1" and os.environ.get(number, "").isdecimal():
            return int(os.environ[number]) == 0
    return True


def join_hosts() -> None:
    """Join the other processes of a run on several hosts, before any device is used.

    SLURM and MPI name them; otherwise JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID do. DIR and the options must be the same everywhere.
    """
    named = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        if all(named.values()) and os.environ.get("JAX_COORDINATOR_ADDRESS"):
            jax.distributed.initialize(**{name: int(value) for name, value in named.items()})
        elif any(int(os.environ.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
            jax.distributed.initialize()
    except (ValueError, IndexError, RuntimeError) as error:
        raise UsageError(
            "cannot join the other processes given by JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and"
            f" JAX_PROCESS_ID, or by SLURM_* or OMPI_*: {error}"
        ) from None


def population_mesh(members: int):
    """The devices that share the population: only as many as equal shares keep busy."""
    devices = jax.devices()
    share = -(-members // len(devices))
    busy = len(devices) if jax.process_count() > 1 else -(-members // share)
    return jax.sharding.Mesh(np.array(devices[:busy]), ("population",))


def to_devices(mesh, tree, axis: str | None = None):
    """Put arrays on the devices: copies on each, or their first axis divided among them."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis))
    if axis and jax.process_count() > 1:  # device_put would gather what each host has, in order to compare it
        return tree_map(
            lambda leaf: jax.make_array_from_callback(np.shape(leaf), sharding, np.asarray(leaf).__getitem__), tree
        )
    return jax.device_put(tree, sharding)


def to_host(tree):
    """Arrays from all devices and hosts, as numpy."""
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def from_primary(tree):
    """The arrays of the first process, on every process."""
    if jax.process_count() == 1:
        return tree
    return tree_map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


# --- the trained models, in numpy -----------------------------------------------------------------------------------


class Ensemble(NamedTuple):
    """The models of one fold, or the final ones, as numpy arrays: S seeds, whose logits are averaged.

    This is the only forward pass outside training: for the validation and test speakers of a fold, and for --predict,
    which therefore needs no jax. Its time is small beside that of reading the files.
    """

    mean: np.ndarray  # (D,)
    scale: np.ndarray  # (D,)
    prior: float  # see centre
    params: dict[str, np.ndarray]  # by path, as in `Dense_0/kernel`; S is the first axis of each

    @classmethod
    def of_member(cls, members: Member, row: int) -> "Ensemble":
        """The normalisation of a member, which is that of all seeds of its fold, without a network."""
        return cls(members.mean[row], members.scale[row], members.prior[row], {})

    @property
    def statistics_digest(self) -> str:
        """SHA-256 of the normalisation, in hexadecimal."""
        return hashlib.sha256(self.mean.tobytes() + self.scale.tobytes()).hexdigest()

    def of_seed(self, seed: int) -> "Ensemble":
        params = {name: leaf[seed : seed + 1] for name, leaf in self.params.items()}
        return self._replace(params=params)

    @np.errstate(over="ignore")  # `train` refuses answers that are not finite
    def normalise(self, x, others: Others | None = None):
        """Normalise means over frames, (N, D)."""
        return (x - centre(self, others)) / self.scale

    def inputs(self, frames, others: Others | None):
        """Inputs of the linear part, (D,), and of the hidden layers, (D,), (S, 2 D) or (S, D / L), for one utterance.

        The latter are the same numbers as those of `pool` in training. Frames have shape (T, D).
        """
        origin = centre(self, others)
        linear = (frames.mean(0) - origin) / self.scale
        layers = self.params.get("layers")
        if layers is not None:
            return linear, layers @ linear.reshape(layers.shape[1], -1)
        query = self.params.get("query")
        if query is None:
            return linear, linear
        centred = frames - origin  # so that the variance below loses no digits to a large mean
        # The softmax ignores the shift by the mean, so that the frames need not be normalised.
        weight = stats.probabilities(query / self.scale @ centred.T)  # (S, T)
        mean = weight @ centred
        variance = weight @ np.square(centred) - np.square(mean)
        floor = MIN_VARIANCE * np.square(self.scale)
        deviation = np.sqrt(np.maximum(variance, floor))
        return linear, np.concatenate([mean / self.scale, deviation / self.scale], 1)

    def forward(self, features, others: Others | None = None):
        """Logits (S, N, C) and hidden layers (S, N, W) of utterances, (T, D) each, FORWARD_BATCH at a time."""
        seeds, width, classes = self.params["Dense_1/kernel"].shape
        logits, hidden = [np.zeros((seeds, 0, classes), np.float32)], [np.zeros((seeds, 0, width), np.float32)]
        inputs = map(self.inputs, features, map(Others, *others) if others else itertools.repeat(None))
        while batch := list(itertools.islice(inputs, FORWARD_BATCH)):
            linear, pooled = (np.stack(each, -2) for each in zip(*batch))  # (B, D), or (S, B, D)
            hidden.append(np.maximum(self._dense("Dense_0", pooled), 0))
            logits.append(self._dense("Dense_1", hidden[-1]))
            if "linear/kernel" in self.params:
                logits[-1] = logits[-1] + self._dense("linear", linear)
        return np.concatenate(logits, 1), np.concatenate(hidden, 1)

    def _dense(self, layer: str, x):
        bias = self.params[f"{layer}/bias"]
        return x @ self.params[f"{layer}/kernel"] + bias[:, None]


def hidden_layers(members: Member, best, rows) -> Ensemble:
    """The trained networks in these rows of the population; hidden units that are not in use become 0."""
    params = {name: leaf[rows] for name, leaf in named_leaves(best).items()}
    unit = np.arange(params["Dense_0/bias"].shape[1])
    used = unit < members.hyper.width[rows][:, None]  # (S, W)
    # Their activation is then relu(0) = 0, and Dense_1 needs no mask.
    params["Dense_0/kernel"] = params["Dense_0/kernel"] * used[:, None]
    params["Dense_0/bias"] = params["Dense_0/bias"] * used
    if "layers" in params:  # as weights from here on
        params["layers"] = stats.probabilities(LAYER_RATE * params["layers"])
    return Ensemble.of_member(members, rows[0])._replace(params=params)


def finish_fold(dataset: Dataset, split: Split, fold: int, hidden: Ensemble, linear: list[tuple]):
    """Add the linear parts to the trained networks of a fold, and weigh both by the validation speakers.

    `linear` is from `fit_linear_parts`. The linear part is the mean of two: that of each seed, on which the choice by
    validation speakers is based, and, after that, the one that includes the validation speakers. With few speakers a
    model cannot do without them; and the first, which differ between the seeds, gain more from their mean. Weights and
    temperature are multiplied into the parameters, so that the logits of the ensemble are calibrated.
    """
    *parts, refitted = linear
    logits, linear_logits, label = [], [], []
    for seed, row in enumerate(split.members(fold)):
        model = hidden.of_seed(seed)
        validation = np.flatnonzero(split.validation[row])
        given = select_others(dataset.given, validation)
        linear_logits.append(stats.layer_logits(model.normalise(dataset.x[validation], given), *parts[seed]))
        hidden_logits, _ = model.forward(dataset.features(validation), given)
        logits.append(hidden_logits[0])
        label.append(dataset.label[validation])
    weights = stats.fit_ensemble_weights(logits, linear_logits, label)
    last_kernel, last_bias = weights.add_layers(*refitted)
    kernels, biases = zip(*(weights.add_layers(*part) for part in parts))
    params = dict(hidden.params)
    params["linear/kernel"] = (np.stack(kernels) + last_kernel) / 2
    params["linear/bias"] = (np.stack(biases) + last_bias) / 2
    for layer, weight in (("Dense_1", weights.hidden), ("linear", weights.linear)):
        for name in (f"{layer}/kernel", f"{layer}/bias"):
            params[name] = np.float32(params[name] * (weight / weights.temperature))
    return hidden._replace(params=params), weights


def fit_linear_parts(dataset: Dataset, split: Split, members: Member, fold: int):
    """A linear part for the training speakers of each seed, and a last one that includes the validation speakers.

    They need no trained network.
    """
    rows = split.members(fold)
    untrained = Ensemble.of_member(members, rows[0])
    return [fit_linear_part(dataset, mask, untrained) for mask in (*split.train[rows], split.fold != fold)]


def fit_linear_part(dataset: Dataset, mask, model: Ensemble):
    """`stats.fit_lda` for each layer on the utterances that a mask selects: (L, 7, D / L, C) and (L, 7, C)."""
    chosen = np.flatnonzero(mask)
    x = model.normalise(dataset.x[chosen], select_others(dataset.others, chosen))
    layers = np.split(x, dataset.layers, 1)
    parts = [stats.fit_lda(layer, dataset.label[chosen], len(dataset.classes)) for layer in layers]
    return tuple(map(np.stack, zip(*parts)))


class Experiment(NamedTuple):
    """What a run trains on, and how."""

    config: Config
    dataset: Dataset
    split: Split
    stored: stats.Stored


class Answers(NamedTuple):
    """What models answer for N utterances: calibrated logits (N, C), temperature (N,), hidden layers (N, S W)."""

    logits: np.ndarray
    temperature: np.ndarray
    embedding: np.ndarray

    @classmethod
    def of(cls, ensemble: Ensemble, temperature: float, features, others: Others | None = None) -> "Answers":
        """The mean logits over the seeds, and their hidden layers side by side."""
        with np.errstate(over="ignore", invalid="ignore"):  # the callers look for answers that are not finite
            logits, hidden = ensemble.forward(features, others)
        logits = logits.mean(0, dtype=np.float64)
        return cls(logits, np.full(len(logits), temperature), np.concatenate(list(hidden), 1))


class Predictions(NamedTuple):
    """Utterances and the answers for them, from training, --predict or a fusion: all that is scored and saved.

    `fold` is the one that tests each utterance, from 0, shape (N,); -1 where there are no folds. `speaker` has its
    speaker, or what intervals are taken over instead: a recording where speakers are not known.
    """

    utterances: list[emotions.Utterance]
    classes: tuple[str, ...]
    answers: Answers
    fold: np.ndarray
    speaker: np.ndarray

    @property
    def label(self) -> np.ndarray:
        """Index of the emotion in `classes`, -1 if it is unknown or none of them, int32, shape (N,)."""
        number = {name: index for index, name in enumerate(self.classes)}
        return np.array([number.get(utterance.emotion, -1) for utterance in self.utterances], np.int32)

    def select(self, chosen: np.ndarray) -> "Predictions":
        """Those of some utterances, by a bool mask (N,)."""
        utterances = list(itertools.compress(self.utterances, chosen))
        answers = Answers(*(part[chosen] for part in self.answers))
        return Predictions(utterances, self.classes, answers, self.fold[chosen], self.speaker[chosen])


class Trained(NamedTuple):
    """The outcome of training.

    `ensembles` are the finished models of each fold, then the final ones; `predictions` has, for each scored utterance,
    the answer of models that never saw its speaker. `best_epoch` and `skipped` have shape ((K + 1) S,). `choices` has
    what the validation speakers of each fold chose, `sweep` the validation loss of each setting.
    """

    ensembles: tuple[Ensemble, ...]
    predictions: Predictions
    best_epoch: np.ndarray
    skipped: np.ndarray
    history: list[dict]
    choices: list[dict]
    sweep: list[dict]


def train(experiment: Experiment, run: "RunFolder | None" = None) -> Trained:
    """Train every fold and the final model together, in every setting, and answer for all test speakers.

    `run` keeps the checkpoints, and has the one to resume from. A TrainingError is raised if the steps of a member are
    not finite five times in a row, or if its outputs are not.
    """
    config, dataset, split, _ = experiment
    log.debug("laying out the data")
    static, data, members = set_up(experiment)
    folds, fit_linear = range(split.folds + 1), partial(fit_linear_parts, dataset, split, members)

    def finish(fold, linear):
        hidden = hidden_layers(members, state.best, rows[split.members(fold)])
        return finish_fold(dataset, split, fold, hidden, linear)

    executor = concurrent.futures.ThreadPoolExecutor(min(available_cores(), 8))  # each thread holds a copy of its fold
    try:
        linear = executor.map(fit_linear, folds)  # meanwhile the training program compiles
        progress = train_population(static, data, members, split, run or RunFolder(None))
        log.debug("finishing the models of each fold")
        state = to_host(progress.state._replace(params=None, optimizer=None))
        settings = draw_settings(config)
        chosen, sweep = choose_settings(state.best_loss, split, settings)
        # The rows of the population that are kept: those of the chosen setting of each fold.
        rows = np.repeat(chosen, split.seeds) * len(split.train) + np.arange(len(split.train))
        ensembles, weights = zip(*executor.map(finish, folds, linear))
    finally:
        executor.shutdown(cancel_futures=True)
    choices = choices_by_fold(chosen, ensembles, weights, settings)
    predictions = answer_tests(dataset, split, ensembles, weights)
    if not np.isfinite(predictions.answers.logits).all():
        raise TrainingError(
            "the features of an utterance are so large that the network overflows; check them with check_data.py"
        )
    history = history_rows(progress.history, split)
    return Trained(ensembles, predictions, state.best_epoch[rows], state.skipped[rows], history, choices, sweep)


def choices_by_fold(chosen, ensembles, weights, settings) -> list[dict]:
    """What the validation speakers of each fold chose, by name; in a sweep with the setting."""
    choices = []
    for setting, ensemble, chosen_weights in zip(chosen.tolist(), ensembles, weights):
        choice = chosen_weights._asdict() | {"shrinkage": stats.SHRINKAGES[chosen_weights.shrinkage]}
        if len(chosen_weights.layers) == 1:
            del choice["layers"]
        if math.isfinite(ensemble.prior):
            choice["prior"] = float(ensemble.prior)
        if len(settings) > 1:
            choice |= {"setting": setting + 1} | settings[setting]._asdict()
        choices.append(choice)
    return choices


def answer_tests(dataset: Dataset, split: Split, ensembles, weights) -> Predictions:
    """For each scored utterance, the answer of the fold that tests it, whose models never saw its speaker."""
    places, parts = [], []
    for fold in range(split.folds):
        tested = np.flatnonzero(split.scored & (split.fold == fold))
        given = select_others(dataset.given, tested)
        parts.append(Answers.of(ensembles[fold], weights[fold].temperature, dataset.features(tested), given))
        places.append(tested)
    order = np.argsort(np.concatenate(places))  # of the files, instead of fold by fold
    answers = Answers(*(np.concatenate(part)[order] for part in zip(*parts)))
    utterances = list(itertools.compress(dataset.utterances, split.scored))
    return Predictions(utterances, dataset.classes, answers, split.fold[split.scored], split.speaker[split.scored])


def choose_settings(best_loss, split: Split, settings):
    """The setting that the validation speakers of each fold choose, (K + 1,), and for a sweep a table, the best first.

    The table has the mean validation loss and the number of folds; the final model does not count.
    """
    size = len(settings) * len(split.train)
    # Without padding members; the loss is that of the group, and so alike for all its seeds.
    loss = best_loss[:size].reshape(len(settings), split.folds + 1, split.seeds)[:, :, 0]
    if not np.isfinite(loss).any(0).all():
        raise TrainingError("no epoch of a fold had a finite validation loss; check the features with check_data.py")
    chosen = loss.argmin(0)
    table = []
    for number, setting in enumerate(settings if len(settings) > 1 else []):
        row = {"setting": number + 1} | setting._asdict()
        row["validation_loss"] = float(loss[number, :-1].mean())
        row["folds"] = int((chosen[:-1] == number).sum())
        table.append(row)
    return chosen, sorted(table, key=lambda row: row["validation_loss"])


# --- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(predictions: Predictions, scheme: str, independent: bool, statistics: str, notes: list[str]) -> dict:
    """All of metrics.json that follows from the answers for utterances with known labels.

    Parameters
    ----------
    scheme
        Name of the folds.
    independent
        Whether no model saw a speaker that it is scored on. If not, single speakers are not scored.
    statistics
        Where the normalisation comes from.
    """
    utterances, classes, answers, fold, speaker = predictions
    label = predictions.label
    metrics = stats.evaluate(label, answers.logits, speaker, fold, classes)
    metrics |= error_analysis(utterances, label, stats.probabilities(answers.logits), classes)
    uncalibrated = stats.probabilities(answers.logits * answers.temperature[:, None])
    if len(metrics["speakers"]) < stats.FEW_SPEAKERS:
        notes = [*notes, f"with fewer than {stats.FEW_SPEAKERS} speakers the intervals are unreliable"]
    known = {utterance.speaker for utterance in utterances} - {None}
    by_speaker = metrics["speakers"] if independent else {}
    metrics["speakers"] = {name: scores for name, scores in by_speaker.items() if name in known}
    return metrics | {
        "n_speakers": len(known),
        "speaker_independent": independent,
        "fold_scheme": scheme,
        "statistics": statistics,
        "notes": notes,
        "ece_uncalibrated": stats.expected_calibration_error(uncalibrated, label),
    }


def evaluate_run(experiment: Experiment, trained: Trained) -> dict:
    """All of metrics.json that follows from training: the scores, and what was trained and chosen in each fold."""
    config, dataset, split, stored = experiment
    statistics, notes = "of the speakers that a fold does not test", list(split.notes)
    if stored.user_supplied:
        statistics = "supplied by the user"
        notes.append("your statistics apply to every fold; if they are of these files, they include the test speakers")
    plain = sum(math.isinf(ensemble.prior) for ensemble in trained.ensembles[:-1])
    if config.adapt and plain:
        found = f"no adaptation in {check_data.counted(plain, 'fold')} of {split.folds}"
        notes.append(f"{found}: it did not help the validation speakers")
    metrics = evaluate(trained.predictions, split.scheme, split.independent, statistics, notes)
    metrics["folds"] = [fold_report(split, fold, trained) | scores for fold, scores in enumerate(metrics["folds"])]
    if trained.sweep:
        metrics["sweep"] = trained.sweep
    if dataset.layers > 1:
        metrics["layers"] = layer_report(trained)
    return metrics | {"adapted": config.adapt, "curves": learning_curves(trained)}


def layer_report(trained: Trained) -> list[dict]:
    """Weight of each layer in the hidden layers, mean and range over all models, and in the linear parts, mean."""
    hidden = np.concatenate([ensemble.params["layers"] for ensemble in trained.ensembles])
    linear = np.array([choice["layers"] for choice in trained.choices])
    columns = {"hidden": hidden.mean(0), "low": hidden.min(0), "high": hidden.max(0), "linear": linear.mean(0)}
    rows = zip(*(values.tolist() for values in columns.values()))
    return [{"layer": layer} | dict(zip(columns, row)) for layer, row in enumerate(rows)]


def fold_report(split: Split, fold: int, trained: Trained):
    """Speakers of one fold, and what was chosen in it; `train` and `validation` are those of the first seed."""
    rows = split.members(fold)
    rotation = [
        {"train": split.speakers(split.train[row]), "validation": split.speakers(split.validation[row])} for row in rows
    ]
    return {
        "fold": fold + 1,
        "test": split.speakers(split.fold == fold),
        **rotation[0],
        "rotation": rotation,
        "n_test": int((split.scored & (split.fold == fold)).sum()),
        "epochs": int(trained.best_epoch[rows[0]]) + 1,
        "skipped_steps": int(trained.skipped[list(rows)].sum()),
        "chosen": trained.choices[fold],
    }


def error_analysis(utterances, label, probability, classes) -> dict:
    """Scores by corpus, gender and intensity, and the mistakes with the highest confidence."""
    predicted, confidence = probability.argmax(1), probability.max(1)
    groups = {}
    for field in GROUPS:
        group = [getattr(utterance, field) for utterance in utterances]
        groups[field] = stats.group_scores(*stats.group_counts(group, label, predicted, len(classes)))
    order = np.argsort(-confidence, kind="stable")
    mistakes = []
    for place in order[(predicted != label)[order]][:MAX_MISTAKES]:
        utterance = utterances[place]
        mistake = {"file": utterance.file, "label": utterance.emotion, "predicted": classes[predicted[place]]}
        mistakes.append(mistake | {"confidence": float(confidence[place])})
    return {"groups": groups, "confident_mistakes": mistakes}


def learning_curves(trained: Trained):
    """Validation loss and UA per epoch: mean, min and max over the folds still training, each the mean of its seeds.

    Only the hidden layer is shown, because the linear part has no epochs; in a sweep, that of the chosen setting.
    """
    chosen = {str(fold + 1): choice.get("setting") for fold, choice in enumerate(trained.choices)}
    seeds: dict[int, dict[str, list]] = {}  # rows by epoch and fold
    for row in trained.history:
        epoch, fold = row["epoch"], row["fold"]
        if fold != "final" and row.get("setting") == chosen[fold]:
            seeds.setdefault(epoch, {}).setdefault(fold, []).append(row)
    curves = []
    for epoch, folds in sorted(seeds.items()):
        curve = {"epoch": epoch, "folds": len(folds)}
        for name in ("validation_loss", "validation_ua"):
            means = [float(np.mean([row[name] for row in rows])) for rows in folds.values()]
            curve[name] = {"mean": float(np.mean(means)), "low": min(means), "high": max(means)}
        curves.append(curve)
    return curves


# --- artifacts ------------------------------------------------------------------------------------------------------


def save_run(run: "RunFolder", scan: check_data.Scan, experiment: Experiment, trained: Trained, metrics: dict) -> None:
    """Write every artifact of a run, then remove its checkpoints.

    All files are complete on the disk before the first of them replaces an older one, and metrics.json comes last. A
    kill in between leaves the checkpoints: the same command finishes again, with the same results.
    """
    final, statistics = trained.ensembles[-1], experiment.stored.statistics
    params = {f"params/{name}": leaf for name, leaf in final.params.items()}
    model = stats.npz_bytes({"mean": final.mean, "scale": final.scale} | params)
    # After a kill between two renames, or if files of two runs are mixed, they do not belong together.
    digests = {"statistics": final.statistics_digest, "model": hashlib.sha256(model).hexdigest()}
    config = describe_model(scan, experiment, trained) | {"identity": run.identity["data"], "model": digests["model"]}
    artifacts = {
        "config.json": stats.json_bytes(config),
        "history.csv": stats.csv_bytes(trained.history),
        "skipped.csv": skipped_bytes(scan.findings),
        **stats.pair_bytes(statistics, experiment.dataset.layers),
        "model.npz": model,
    }
    artifacts |= prediction_files(trained.predictions, digests)
    # metrics.json is renamed last: it marks a complete run.
    artifacts |= score_files(metrics | {"model": digests["model"]})
    run.path.mkdir(parents=True, exist_ok=True)  # it may have been moved away meanwhile
    stats.write_files(run.path, artifacts)
    run.clear()  # last: until here a kill only repeats the end of the run


def describe_model(scan: check_data.Scan, experiment: Experiment, trained: Trained):
    """The contents of config.json: what a model needs besides its arrays."""
    config, dataset, _, stored = experiment
    return {
        "format": ARTIFACT_VERSION,
        "version": check_data.VERSION,
        "classes": list(dataset.classes),
        "dim": scan.dim,
        "layers": scan.layers,
        "layer_axis": scan.layer_axis,
        "layer_weights": trained.ensembles[-1].params.get("layers", np.ones((1, 1))).mean(0).tolist(),
        "prior": float(trained.ensembles[-1].prior),  # null if it is infinite
        "pooling": config.pooling if dataset.frames is not None else "mean",
        "reshapes_vectors": scan.reshapes_vectors,
        "keys": sorted(scan.keys_used()),
        "longest": int(dataset.moments.count.max()),
        "temperature": trained.choices[-1]["temperature"],
        "encoder_similarity": float(stats.rank_correlation(dataset.x, stored.statistics.mean).min()),
        "rms": float(np.median([record.rms for record in scan.records])),
        "speakers": sorted({utterance.speaker or "" for utterance in dataset.utterances}),
        "corpora": sorted({utterance.corpus for utterance in dataset.utterances}),
        "data": str(scan.directory.resolve()),
        "options": dataclasses.asdict(config),
    }


def prediction_files(predictions: Predictions, digests: dict[str, str]) -> dict[str, bytes | memoryview]:
    """predictions.csv and fusion.npz, with a row for each utterance; `digests` identify model and statistics."""
    probability = stats.probabilities(predictions.answers.logits)
    rows = []
    for utterance, fold, row in zip(predictions.utterances, predictions.fold, probability):
        names = {"file": utterance.file, "utterance": utterance.canonical, "corpus": utterance.corpus}
        names |= {"speaker": utterance.speaker or "", "label": utterance.emotion or "", "fold": int(fold) + 1}
        names |= {"predicted": predictions.classes[row.argmax()]}
        rows.append(names | {f"p_{name}": f"{p:.6f}" for name, p in zip(predictions.classes, row)})
    return {"predictions.csv": stats.csv_bytes(rows), "fusion.npz": fusion_bytes(predictions, digests)}


def fusion_bytes(predictions: Predictions, digests: dict[str, str]) -> memoryview:
    """fusion.npz: what a fusion with other modalities needs, a row for each utterance. See docs/reference.md.

    Its logits are those before calibration.
    """
    utterances, classes, answers, fold, _ = predictions
    arrays = {
        "id": np.array([re.sub(r"\.np[yz]$", "", utterance.file, flags=re.IGNORECASE) for utterance in utterances]),
        "utterance": np.array([utterance.canonical for utterance in utterances]),
        "classes": np.array(classes),
        # The calibration is in the parameters, see finish_fold; here it is undone.
        "logits": (answers.logits * answers.temperature[:, None]).astype(np.float32),
        "temperature": answers.temperature.astype(np.float32),
        "probability": stats.probabilities(answers.logits).astype(np.float32),
        "embedding": answers.embedding.astype(np.float32),
        "fold": (fold + 1).astype(np.int32),
        "label": predictions.label,
        "speaker": np.array([utterance.speaker or "" for utterance in utterances]),
    }
    for field in (*GROUPS, "version"):
        arrays[field] = np.array([getattr(utterance, field) or "" for utterance in utterances])
    arrays |= {name: np.array(digest) for name, digest in digests.items()}
    return stats.npz_bytes(arrays)


def score_files(metrics: dict) -> dict[str, bytes]:
    """The files of the scores: confusion.csv, report.html, and last metrics.json."""
    classes, corner = metrics["classes"], "label"
    while corner in classes:  # or that class would replace the column
        corner = f"true_{corner}"
    confusion = [{corner: name} | dict(zip(classes, counts)) for name, counts in zip(classes, metrics["confusion"])]
    return {
        "confusion.csv": stats.csv_bytes(confusion),
        "report.html": report_html(metrics),
        "metrics.json": stats.json_bytes(metrics),
    }


def skipped_bytes(findings: list[check_data.Finding]) -> bytes:
    return stats.csv_bytes([finding._asdict() for finding in findings], check_data.Finding._fields)


# --- the report -----------------------------------------------------------------------------------------------------
#
# Drawn from metrics.json alone: the scores on one screen, for the terminal and train.log, and a page with everything.
# Without a training there are no `curves`, `sweep`, `device` and `seconds`, without a scan no `left_out` and `arrays`.


def report_text(metrics, page: Path, file) -> str:
    """The scores for `file`: in colour if that is standard output, on a terminal that has colours."""
    width = max(80, 24 + 7 * len(metrics["classes"]))
    if file is sys.stdout and file.isatty():
        width = max(60, shutil.get_terminal_size().columns)
    colours = "auto" if file is sys.stdout else None
    # Without a height rich takes a dumb terminal to be 80 wide.
    console = plain_console(file=file, width=width, height=25, color_system=colours)
    method, size = report_heading(metrics)
    with console.capture() as captured:  # if rich wrote it, a closed pipe would end the program with status 1
        console.print(f"\n{method}\n{size}\n", soft_wrap=True)
        console.print(score_table(metrics), "")
        console.print(*confusion_table(metrics, width), "")
        console.print(note_grid(metrics))
        # The path is never wrapped, so that it can be copied.
        console.print(f"report    {printable(str(page))}", soft_wrap=True)
    return re.sub(r" +(?=(\x1b\[[0-9;]*m)*$)", "", captured.get(), flags=re.MULTILINE)  # rich fills its tables


def report_heading(metrics) -> tuple[str, str]:
    """The method of evaluation, and the size of the data."""
    folds, classes, scheme = len(metrics["folds"]), len(metrics["classes"]), metrics["fold_scheme"]
    if scheme == TRANSFER:
        method = f"transfer: trained on {corpus_names(metrics['trained_on'])}, tested on unseen speakers of "
        method += corpus_names(metrics["groups"]["corpus"])
    elif folds == 1:  # the test set of the user's table
        method = f"one test set, {'' if metrics['speaker_independent'] else 'NOT '}speaker-independent"
    elif metrics["speaker_independent"]:
        method = f"{folds}-fold speaker-independent cross-validation"
    else:
        method = f"{folds}-fold cross-validation, NOT speaker-independent"
    if not scheme.isdecimal() and scheme != TRANSFER:
        method += f" ({scheme})"
    if "fused" in metrics:
        method += f", fusion of {len(metrics['fused'])} runs"
    if metrics.get("adapted"):
        number = "all" if metrics["adapted"] == "all" else f"up to {metrics['adapted']}"
        method += f", ADAPTED to each speaker by {number} other, unlabelled utterances"
    speakers = check_data.counted(metrics["n_speakers"], "speaker")
    return printable(method), f"{metrics['n_utterances']} utterances, {speakers}, {classes} classes"


def corpus_names(corpora: Iterable[str]) -> str:
    """Corpora as readers know them."""
    others = {"own": "a corpus of your own", "folder": "emotion-named folders"}
    return ", ".join(others.get(name, name) for name in corpora)


def new_table(*columns: str) -> Table:
    """A table whose first column is text and whose other columns are numbers."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(columns):
        justify = "right" if number else "left"
        table.add_column(Text(name), justify=justify, no_wrap=True, overflow="crop")
    return table


def score_table(metrics) -> Table:
    head = "adapted" if metrics.get("adapted") else "measure"
    table = new_table(head, "  score", "    95 % interval", " chance", " majority")
    for row in score_rows(metrics, decimal):
        table.add_row(*row)
    return table


def score_rows(metrics, form):
    """Title, score, 95 % interval, chance (of UA alone) and score of the majority class, as texts."""
    rows = []
    for name, title in SCORES.items():
        low, high = metrics[f"{name}_ci95"]
        interval = f"{form(low)} to {form(high)}" if is_number(low) and is_number(high) else "-"
        chance = form(metrics["chance_ua"]) if name == "ua" else ""
        rows.append((title, form(metrics[name]), interval, chance, form(metrics[f"majority_{name}"])))
    return rows


def decimal(value: float | None, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if is_number(value) else "-"


def is_number(value: float | None) -> bool:
    """Whether there is a score: one without utterances is NaN, which is null in metrics.json."""
    return value is not None and math.isfinite(value)


def confusion_table(metrics, width: int):
    """Title and table of the confusion matrix, with the scores of each class beside it.

    Counts that are too long for the width become per cent of the row. Where these are too long the matrix is left out.
    """
    names = [printable(name) for name in metrics["classes"]]
    confusion = np.array(metrics["confusion"])
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    title, cells = "confusion matrix (rows: true label, columns: prediction)", confusion
    longest, scores_width = max(map(cell_len, names)), 20
    names_width = min(longest + 3, (width - scores_width) // 5)  # a name may get a number
    room = min((width - names_width - scores_width) // len(names) - 1, longest)
    if room < len(str(confusion.max())):
        title, cells = title.replace("confusion matrix", "confusion, per cent"), (100 * share).round().astype(int)
    heads = [name[:room] for name in names]
    if room < len(str(cells.max())):
        title, cells, heads = "scores by class; the confusion matrix is in the report", cells[:, :0], []
        names_width = min(longest, width - scores_width)
    elif len(set(heads)) < len(heads):
        heads = [str(number + 1) for number in range(len(names))]
        names = [f"{number} {name}" for number, name in zip(heads, names)]
    title += ", adapted" if metrics.get("adapted") else ""
    table = new_table("", *heads, "recall", "prec.", "   F1")
    table.columns[0].max_width = names_width
    for row, name in enumerate(metrics["classes"]):
        counts = [Text(f"{cell:>{room}}", cell_style(part)) for cell, part in zip(cells[row], share[row])]
        scores = [decimal(metrics[score][name], 3) for score in ("recall", "precision", "f1")]
        table.add_row(names[row], *counts, *scores)
    return Text(title, "bold"), table


def cell_style(share: float) -> str:
    """Black on a background from grey to blue, which can be seen on light and dark screens.

    The depth of the colour is the root of the share: most confusions are rare, and would all look alike.
    """
    if not share:
        return ""
    depth = math.sqrt(share)
    grey, blue = 175, (80, 180, 255)
    red, green, blue = (round(grey + depth * (channel - grey)) for channel in blue)
    return f"#000000 on rgb({red},{green},{blue})"


def note_grid(metrics) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True, width=9)
    grid.add_column(overflow="fold")
    left_out = sum(metrics.get("left_out", {}).values())
    if left_out:
        grid.add_row("left out", f"{check_data.counted(left_out, 'file')}, listed in skipped.csv")
    for note in metrics["notes"]:
        grid.add_row("note", printable(note))
    return grid


# --- the report as a page -------------------------------------------------------------------------------------------

PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light; --page: #f4f6f8; --card: #fff; --ink: #1b2027; --soft: #5a6573; --line: #dde2e8;
  --mark: #1f62b5; --right: #7fb0ea; --wrong: #f3a257; --warn: #fbe3d0 }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --page: #12151a; --card: #1b2027;
  --ink: #e6e9ed; --soft: #9aa5b3; --line: #333b46; --mark: #74aef5; --right: #235ea8;
  --wrong: #94500f; --warn: #5a3010 } }
* { box-sizing: border-box; print-color-adjust: exact }
body { max-width: 1240px; margin: auto; padding: clamp(12px, 3vw, 40px); background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25 }
h2 { margin: 2.2em 0 .6em; font-size: 1.1rem; break-after: avoid }
p { margin: .3em 0 }
small, thead th { color: var(--soft) }
.card, figure { margin: 0 0 14px; padding: 14px 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; break-inside: avoid }
.card { container-type: inline-size }
.warn { background: var(--warn); font-weight: 600 }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 0 14px; margin-top: 18px }
.grid b { display: block; font-size: 2.3rem; font-weight: 600; line-height: 1.3 }
.columns { columns: 310px; column-gap: 14px }
figcaption { margin-bottom: 8px; line-height: 1.35 }
figcaption small { display: block }
svg { display: block; width: 100%; overflow: visible; font-size: 11px }
text { fill: var(--soft) }
.name { fill: var(--ink) }
.end { text-anchor: end }
.middle { text-anchor: middle }
path, polyline { fill: none; stroke: var(--line) }
.line { stroke: var(--mark); stroke-width: 2 }
.band { fill: var(--mark); fill-opacity: .2; stroke: none }
.bars { fill: var(--line); stroke: none }
.chance { stroke: var(--soft); stroke-dasharray: 3 3 }
circle { fill: var(--mark) }
table { width: 100%; border-collapse: collapse; line-height: 1.35 }
td, th { min-width: 5em; padding: 5px 8px 5px 0; text-align: left; vertical-align: top;
  border-top: 1px solid var(--line) }
.heat { margin-top: 8px; table-layout: fixed; font-size: min(14px, 26cqw / var(--classes)); line-height: 1.2 }
.heat td, .heat th { min-width: 0; padding: .35em .1em; border: .07em solid var(--card); text-align: center;
  vertical-align: middle; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.heat tbody th { padding-right: .6em; text-align: right }
.heat thead th { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9em; text-align: left }
.heat small { display: block; color: inherit }
.right { background: color-mix(in srgb, var(--right) var(--depth), transparent) }
.wrong { background: color-mix(in srgb, var(--wrong) var(--depth), transparent) }
summary { margin: 14px 0; cursor: pointer; font-weight: 600 }
@page { size: A4; margin: 13mm }
@media print { body { padding: 0; background: none; font-size: 12px } }
</style>
</head>
<body>
$body
</body>
</html>
""")


def report_html(metrics) -> bytes:
    """Everything as a page that needs no other file, no script and no network."""
    metrics = without_folders(metrics)
    subject = metrics["settings"].get("directory") or " and ".join(metrics.get("fused", ["report"]))
    title = f"Speech emotion recognition: {subject}"
    method, size = report_heading(metrics)
    body = [f"<h1>{escape(title)}</h1><p>{escape(method)}</p><p><small>{escape(size)}</small></p>"]
    if not metrics["speaker_independent"]:
        warning = "NOT speaker-independent: training and test may share speakers; the scores are optimistic"
        body.append(f"<p class='card warn'>{warning}</p>")
    body.append(f"<div class=grid>{''.join(tiles(metrics))}</div>")
    body.append(f"<p class=card>{escape(citation(metrics))}</p>")
    body += [f"<p class=card>Note: {escape(note)}</p>" for note in metrics["notes"]]
    body += [f"<h2>{heading}</h2>{content}" for heading, content in page_sections(metrics) if content]
    run = {name: metrics[name] for name in ("command", "version", "device", "seconds") if name in metrics}
    run |= metrics["versions"]
    if metrics.get("arrays"):  # NPY files have no names of arrays
        run |= {"array": listed(metrics["arrays"])}
    for heading, values in (("Settings", metrics["settings"]), ("Run and versions", run)):
        body.append(f"<details><summary>{heading}</summary>{page_table((), values.items())}</details>")
    return PAGE.substitute(title=escape(title), body="\n".join(body)).encode()


def page_sections(metrics):
    """The heading and HTML of each section; one without content is left out of the page."""
    yield "Confusion matrix" + (", adapted" if metrics.get("adapted") else ""), heat_map(metrics)
    curves = curve_chart(metrics, "validation_ua", "UA, %"), curve_chart(metrics, "validation_loss", "loss")
    charts = "".join((*dot_charts(metrics), *curves, reliability_chart(metrics)))
    yield "Speakers, training and calibration", f"<div class=columns>{charts}</div>"
    mistakes = [row | {"confidence": f"{percent(row['confidence'])} %"} for row in metrics["confident_mistakes"]]
    columns = ("label", "predicted", "confidence", "file")
    yield "Most confident mistakes", page_table(columns, [[row[name] for name in columns] for row in mistakes])
    first = {code: f"{found['file']}: {found['reason']}" for code, found in metrics.get("left_out_first", {}).items()}
    left_out = [(code, count, first[code]) for code, count in metrics.get("left_out", {}).items()]
    yield "Files left out", page_table(("code", "files", "the first of them"), left_out)
    settings = []
    for row in metrics.get("sweep", []):
        drawn = {name: f"{row[name]:.4g}" for name in row if name in SWEEP}
        settings.append((row["setting"], decimal(row["validation_loss"], 3), row["folds"], listed(drawn)))
    yield "Settings tried, best first", page_table(("no.", "loss", "folds", "setting"), settings)
    weights = []
    for row in metrics.get("layers", []):
        spread = f"{percent(row['low'])} to {percent(row['high'])}"
        weights.append((row["layer"], percent(row["hidden"]), spread, percent(row["linear"])))
    columns = ("layer", "hidden layers, mean %", "range over models %", "linear parts, mean %")
    yield "Weight of the encoder's layers", page_table(columns, weights)
    yield "Model card", page_table((), model_card(metrics).items())


def escape(value) -> str:
    """Text for the page, whatever characters are in it."""
    return html.escape(printable(str(value)))


def percent(value: float | None, digits: int = 1) -> str:
    return decimal(value and 100 * value, digits)


def listed(values) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def without_folders(metrics):
    """The metrics without the folders of this machine: the page may be passed on."""
    paths = [path for path in metrics["settings"].values() if isinstance(path, str) and os.path.isabs(path)]
    paths += [path.replace("'", "'\"'\"'") for path in paths]  # as the shell's quotes have it in the command
    text = json.dumps(metrics)
    for path in sorted(paths, key=len, reverse=True):
        # Only where a path begins and ends: /data is also a part of the file name set/data_1.npz.
        here, name = (json.dumps(part)[1:-1] for part in (path, Path(path).name))
        text = re.sub(rf"(?<![^\s\"'=]){re.escape(here)}(?!\w)", lambda _, name=name: name, text)
    return json.loads(text)


def tiles(metrics):
    for title, score, interval, chance, majority in score_rows(metrics, percent):
        base = f"chance {chance} %" if chance else f"majority class {majority} %"
        yield f"<div class=card>{title}<b>{score} %</b><small>95 % interval {interval} %<br>{base}</small></div>"


def citation(metrics) -> str:
    """The scores as a sentence for a paper."""
    rows = score_rows(metrics, percent)
    scores = ", ".join(f"{title} {score} % (95 % CI {interval})" for title, score, interval, *_ in rows)
    basis = f"Intervals are over speakers (jackknife); chance UA is {percent(metrics['chance_ua'])} %"
    return f"{', '.join(report_heading(metrics))}: {scores}. {basis}."


def heat_map(metrics) -> str:
    """The confusion matrix as a table. The colour of a mistake is the root of its share: most mistakes are rare."""
    classes = [escape(name) for name in metrics["classes"]]
    heads = [f"<th scope=col title='{name}'>{name}" for name in (*classes, "recall", "precision", "F1")]
    rows = []
    for row, (name, counts) in enumerate(zip(metrics["classes"], metrics["confusion"])):
        cells = [f"<th scope=row title='{classes[row]}'>{classes[row]}"]
        for column, count in enumerate(counts):
            share = count / max(sum(counts), 1)
            kind, depth = ("right", share) if column == row else ("wrong", math.sqrt(share))
            title = f"{classes[row]} as {classes[column]}: {count} of {sum(counts)}"
            text = f"{100 * share:.0f}<small>{count}</small>" if count else ""
            cells.append(f"<td class={kind} style='--depth:{depth:.0%}' title='{title}'>{text}")
        cells += [f"<td>{percent(metrics[score][name], 0)}" for score in ("recall", "precision", "f1")]
        rows.append(f"<tr>{''.join(cells)}")
    return (
        "<div class=card><small>Rows are true labels, columns predictions: per cent of the row, and below it"
        f" utterances. Recall, precision and F1 are those of the row's class, in per cent.</small><table class=heat"
        f" style='--classes:{len(classes)}'><colgroup><col style='width:17%'><col span={len(classes)}><col span=3"
        f" style='width:7%'></colgroup><thead><tr><td>{''.join(heads)}</thead>{''.join(rows)}</table></div>"
    )


def dot_charts(metrics):
    """UA of every test speaker, fold and group."""
    speakers = sorted(metrics["speakers"].items(), key=lambda item: item[1]["ua"] or 0)
    yield dot_chart("UA by test speaker, %", dict(speakers), metrics)
    folds = {f"fold {number}": fold for number, fold in enumerate(metrics["folds"], 1)}
    if metrics["fold_scheme"] != TRANSFER:
        yield dot_chart("UA by fold, %", folds, metrics)
    groups = {f"{field} {name}": group for field, named in metrics["groups"].items() for name, group in named.items()}
    yield dot_chart("UA by corpus, gender and intensity, %", groups, metrics)


def dot_chart(title: str, groups, metrics) -> str:
    """A row for each group, with lines at chance and at the score of all; among very many, only some are named."""
    scores = {name: group["ua"] for name, group in groups.items() if is_number(group["ua"])}
    if not scores:
        return ""
    pitch = max(3, min(18, 1000 / len(scores)))
    height, step = 30 + pitch * len(scores), math.ceil(14 / pitch)
    parts = []
    for name, top, score in (("chance", 9, metrics["chance_ua"]), ("all", 22, metrics["ua"])):
        if is_number(score):
            x = 130 + 165 * score
            parts.append(svg_text(x, top, f"{name} {percent(score)}", "middle"))
            parts.append(f"<path class=chance d='M{x:.1f} 26V{height}' />")
    for row, (name, ua) in enumerate(scores.items()):
        x, y = 130 + 165 * ua, 30 + pitch * (row + 0.5)
        parts.append(f"<g><title>{escape(name)}: {percent(ua)}</title><path d='M130 {y:.1f}H295' />")
        parts.append(f"<circle cx={x:.1f} cy={y:.1f} r={min(4.5, pitch / 2):.1f} /></g>")
        if row % step == 0:
            short = name if len(name) <= 20 else f"{name[:10]}…{name[-9:]}"
            parts.append(svg_text(122, y + 4, short, "end name"))
            parts.append(svg_text(338, y + 4, percent(ua), "end"))
    low, high = min(scores, key=scores.get), max(scores, key=scores.get)
    return figure(title, f"lowest {low}, highest {high}", height, parts)


def svg_text(x: float, y: float, text: str, kind: str) -> str:
    return f"<text class='{kind}' x={x:.1f} y={y:.1f}>{escape(text)}</text>"


def figure(title: str, sentence: str, height: float, parts) -> str:
    """A chart 340 units wide; the sentence is for those who cannot see it too."""
    title, sentence = escape(title), escape(sentence)
    return (
        f"<figure><figcaption><b>{title}</b><small>{sentence}</small></figcaption><svg viewBox='0 0 340 {height:.0f}'"
        f" role=img><title>{title}</title><desc>{sentence}</desc>{''.join(parts)}</svg></figure>"
    )


def curve_chart(metrics, name: str, title: str) -> str:
    rows = [row for row in metrics.get("curves", []) if all(map(is_number, row[name].values()))]
    if not rows:
        return ""
    unit = 100 if title.endswith("%") else 1
    mean, low, high = ([(row["epoch"], unit * row[name][part]) for row in rows] for part in ("mean", "low", "high"))
    top = max(y for _, y in high)
    top = 100 if unit == 100 else math.ceil(2 * top) / 2 or 1
    last = 5 * math.ceil(rows[-1]["epoch"] / 5)
    first_mean, last_mean = f"{mean[0][1]:.3g}", f"{mean[-1][1]:.3g}"
    sentence = f"from {first_mean} to {last_mean}; mean and range of the folds still training, MLP part only"
    marks = {"band": low + high[::-1], "line": mean}
    return figure(f"Validation {title}, by epoch", sentence, 204, axes(last, top, marks))


def reliability_chart(metrics) -> str:
    bins = [row for row in metrics["reliability"] if row["n"]]
    most = max((row["n"] for row in bins), default=0)
    bars = []
    for row in bins:
        left, right, top = 100 * row["low"], 100 * row["high"], 40 * row["n"] / most
        bars += [(left, 0), (left, top), (right, top), (right, 0)]
    line = [(100 * row["confidence"], 100 * row["accuracy"]) for row in bins]
    error = f"expected calibration error {percent(metrics['ece'])} %, {percent(metrics['ece_uncalibrated'])} % before"
    sentence = f"{error} temperature scaling; grey: how many predictions have that confidence"
    marks = {"bars": bars, "chance": [(0, 0), (100, 100)], "line": line}
    return figure("Accuracy by confidence, %", sentence, 204, axes(100, 100, marks))


def axes(x_high: float, y_high: float, marks) -> list[str]:
    """Lines and areas on axes from 0, with a tick at each fifth; the names of the marks are classes of the style."""

    def place(x: float, y: float):
        return 34 + 296 * x / x_high, 180 - 170 * y / y_high

    parts = []
    for fifth in range(6):
        tick_x, tick_y = x_high * fifth / 5, y_high * fifth / 5
        x, y = place(tick_x, tick_y)
        parts.append(f"<path d='M34 {y:.1f}H330' />")
        parts.append(svg_text(28, y + 4, f"{tick_y:.3g}", "end"))
        parts.append(svg_text(x, 198, f"{tick_x:.3g}", "middle"))
    for kind, values in marks.items():
        points = [f"{x:.1f},{y:.1f}" for x, y in (place(*value) for value in values)]
        parts.append(f"<polyline class='{kind}' points='{' '.join(points)}' />")
    return parts


def page_table(columns, rows) -> str:
    """A table, or nothing without rows."""
    if not rows:
        return ""
    head = "".join(f"<th scope=col>{name}" for name in columns)
    body = ["<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows]
    return f"<div class=card><table><thead><tr>{head}</thead>{''.join(body)}</table></div>"


def model_card(metrics):
    """What the scores and the model are good for, for readers who have only the page."""
    corpora = listed({name: scores["n"] for name, scores in metrics["groups"]["corpus"].items()})
    tested = "unseen speakers" if metrics["speaker_independent"] else "speakers who may be in the training data"
    return {
        "data": f"{metrics['n_utterances']} utterances ({corpora}) of {', '.join(metrics['classes'])}",
        "statistics": metrics["statistics"],
        "intended use": "comparing features and settings, and fusion with other modalities; not judging people",
        "UA measures": f"the mean recall over the classes, for {tested} in recordings like these",
        "not measured": "recognition of felt emotions: speech in such corpora is mostly acted",
        "not tested": "other languages, microphones and rooms",
    }


# --- the results folder: lock and checkpoints -----------------------------------------------------------------------


class RunFolder:
    """The results folder of one run: its lock, and the checkpoints of a run that is not finished.

    There is one way to end a run early, and it is safe: any kill at any moment. A checkpoint is written between two
    calls of the program, to one of two files in turn and under a temporary name first, so that the one before it stays
    until the new one is whole. The same command resumes from the newest whole one, and since everything random follows
    from the seed and the epoch, its results are those of an unbroken run to the bit.

    Without a path nothing is kept. "Several devices, several hosts" above has the part of each process.
    """

    CHECKPOINTS = ("checkpoint-0.npz", "checkpoint-1.npz")

    def __init__(self, path: Path | None, directory: Path | None = None):
        self.path, self.directory = path, directory
        self.identity: dict = {}
        self._found = None  # description and arrays of the checkpoint to resume from
        self._next_file = 0  # of the two, the one that does not hold the newest checkpoint
        self._started = time.monotonic()
        self._seconds_saving = 0.0
        self._seconds_expected: float | None = None  # for the next save: those of the last one
        self._warned = False

    def __enter__(self) -> "RunFolder":
        self._is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.path, self.directory) if is_primary() else None
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the folder may be gone, which must not hide the error of the run
            if self._is_new and is_primary() and os.listdir(self.path) == ["lock"]:  # the run never began
                (self.path / "lock").unlink()
                self.path.rmdir()
        if self._lock is not None:
            os.close(self._lock)

    def find_checkpoint(self, identity: dict, fresh: bool = False) -> int:
        """Find the newest whole checkpoint of this run (for a fresh start, remove all of them): its epochs, 0 if none.

        A UsageError is raised if it is of another run, or if there are only damaged ones.
        """
        self.identity = identity
        if fresh:
            self.clear()
        newest, damaged = 0, []
        for index, path in enumerate(self._paths()):
            try:
                description, arrays = read_checkpoint(path) if os.path.lexists(path) else ({"epoch": 0}, {})
            except stats.DataError as error:
                damaged.append(f"{printable(str(path))} cannot be used: {printable(str(error))}")
                continue
            if description["epoch"] > newest:
                newest, self._found, self._next_file = description["epoch"], (description, arrays), 1 - index
        if damaged and not newest:
            raise UsageError(f"{'; '.join(damaged)}; --fresh starts over")
        for fault in damaged:
            log.warning(f"checkpoint: {fault}; RESUMING FROM THE OTHER ONE")
        if newest:
            check_same_run(self.path, self._found[0], identity)
        return newest

    def is_finished(self, config: Config, identity: dict) -> bool:
        """Whether the folder holds this run, complete; a UsageError is raised if it holds another finished one."""
        stored = read_json(self.path / "config.json", MAX_DESCRIPTION) if is_primary() else {}
        if not stored:
            return False
        options, data, found = stored.get("options"), stored.get("identity"), ["it is of another version or kind"]
        if isinstance(options, dict) and isinstance(data, dict):
            there = {"options": comparable_options(options), "data": data}
            found = differences(identity, there, "the finished run")
        if not found:  # its scores are there too, unless a kill came between
            return read_json(self.path / "metrics.json").get("model", "") == stored.get("model")
        if config.overwrite:
            return False
        here, there = str(Path(config.directory).resolve()), stored.get("data")
        if there and here != there:  # then it is no news that the data differ
            found = [f"DIR is {here} here, {there} in the finished run", *(text for text in found if text[:2] == "--")]
        advice = "Choose another --out, or replace it with --overwrite"
        raise UsageError(f"{self.path} holds another, finished run: {'; '.join(found)}. {advice}")

    def resume(self, start: Progress) -> Progress:
        """The progress in the checkpoint that was found, or `start`, which also has the form of every array."""
        self._started = time.monotonic()
        description, arrays = self._found or ({"epoch": 0}, {})
        self._found = None
        # Before the arrays: all processes must agree on their shapes.
        epoch = int(from_primary(np.int32(description["epoch"])))
        if not epoch:
            return start
        members = len(start.state.active)
        history = {name: np.zeros((epoch, members), kind) for name, kind in HISTORY.items()}
        form = by_member(start.state, history)
        if arrays:
            leaves = [fit_rows(name, leaf, arrays) for name, leaf in named_leaves(form).items()]
            form = jax.tree.unflatten(jax.tree.structure(form), leaves)
        form = from_primary(form)
        return Progress(epoch, form["state"], {name: values.T for name, values in form["history"].items()})

    def checkpoint_if_due(self, progress: Progress, split: Split) -> None:
        """Save a checkpoint, unless that would take more than its share of the time so far."""
        if self.path is None:
            return
        began = time.monotonic()
        elapsed = began - self._started
        expected = self._seconds_expected
        if expected is None:
            expected = sum(leaf.nbytes for leaf in jax.tree.leaves(progress.state)) / SAVE_RATE
        share = MAX_SAVE_SHARE if elapsed > 60 else 2 * MAX_SAVE_SHARE
        due = self._seconds_saving + expected <= share * elapsed
        if from_primary(np.array(due)):
            state = to_host(progress.state)  # all processes take part
            if is_primary():
                self._save(progress._replace(state=state), split)
            self._seconds_expected = time.monotonic() - began
            self._seconds_saving += self._seconds_expected

    def _save(self, progress: Progress, split: Split) -> None:
        """Write a checkpoint and history.csv. If that fails, it is reported once and the run continues."""
        description = {"epoch": progress.epoch, "identity": self.identity, "environment": environment()}
        arrays = named_leaves(by_member(progress.state, progress.history))
        # As an array, so that a CRC-32 covers it too.
        arrays["description"] = np.frombuffer(json.dumps(description).encode(), np.uint8)
        try:
            history = stats.csv_bytes(history_rows(progress.history, split))
            checkpoint = {self.CHECKPOINTS[self._next_file]: stats.npz_bytes(arrays)}
            stats.write_files(self.path, checkpoint | {"history.csv": history})
            self._next_file = 1 - self._next_file  # only now: a failed save must not free the good one
        except (OSError, MemoryError) as error:
            reason = "out of memory"
            if isinstance(error, OSError):
                reason = f"{error.filename or self.path}: {error.strerror}"
            if not self._warned:
                log.warning(f"checkpoint: not saved, the run continues: {printable(reason)}")
            self._warned = True

    def clear(self) -> None:
        """Remove the checkpoints, and what a kill during a save has left of one."""
        self._found = None
        for path in self._paths():
            path.unlink(missing_ok=True)
            stats.remove_temporary(self.path, [path.name])

    def _paths(self):
        return [self.path / name for name in self.CHECKPOINTS] if self.path and is_primary() else []


def by_member(state: State, history):
    """The arrays of a checkpoint as a tree; members are the first axis of each, so that fit_rows can add some."""
    return {"state": state, "history": {name: values.T for name, values in history.items()}}


def named_leaves(tree):
    """Every array of a tree by its path, as in `state/params/Dense_0/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def read_checkpoint(path: Path):
    """Read a checkpoint: its description, and its arrays by name.

    The reader compares the CRC-32 of each array and all that the headers of the archive declare, so that it takes no
    array from a file in which a byte has changed. It raises stats.DataError.
    """
    arrays = check_data.read_arrays(path, kinds="fiub")
    try:
        description = json.loads(arrays.pop("description").tobytes())
        epoch, identity = description["epoch"], description["identity"]
        parts = identity["options"], identity["data"], description["environment"]
        members, epochs = arrays["history/active"].shape  # without members the epochs would cost no bytes
        whole = type(epoch) is int and 0 < epoch == epochs and members > 0
        whole = whole and epoch < identity["options"].get("--epochs", math.inf) + EPOCHS_PER_CALL
    except MALFORMED:
        whole, parts = False, ()
    if not whole or not all(isinstance(part, dict) for part in parts):
        raise stats.DataError("damaged", "it was not written by this program")
    if any(np.isnan(array).any() for name, array in arrays.items() if name.startswith("state/")):
        raise stats.DataError("damaged", "it holds NaN")
    return description, arrays


def fit_rows(name: str, form, arrays):
    """Saved rows in the form of an array of this run, which may have another number of padding members."""
    saved = arrays.get(name, np.zeros(0))
    if saved.dtype != form.dtype or saved.shape[1:] != form.shape[1:]:
        found = f"{name} is {saved.dtype} {saved.shape} instead of {form.dtype} {form.shape}"
        raise UsageError(f"the checkpoint does not fit this run: {found}; --fresh starts over")
    rows = min(len(saved), len(form))
    return np.concatenate([saved[:rows], form[rows:]])


def environment():
    """Versions and devices: if they differ, the last digits of the results may too."""
    return package_versions() | {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}


def run_identity(experiment: Experiment, fingerprint: str) -> dict:
    """What two runs must share for one to resume from a checkpoint of the other; the split follows from it."""
    config, dataset, _, stored = experiment
    options = comparable_options(dataclasses.asdict(config))
    labels = [f"{u.file!r} {u.emotion!r} {u.speaker!r} {u.split or ''}".rstrip() for u in dataset.utterances]
    digests = {
        "files and their contents": fingerprint.encode(),
        "labels and speakers": "\n".join(labels).encode(),
        "statistics": b"".join(part.tobytes() for part in stored.statistics),
    }
    data = {"training program": TRAINING_VERSION, "utterances": len(dataset.label)}
    data |= {name: hashlib.sha256(blob).hexdigest()[:16] for name, blob in digests.items()}
    return json.loads(json.dumps({"options": options, "data": data}))  # as it is read back from a file


def comparable_options(options: dict) -> dict:
    """The options on which the results depend, by their flags."""
    return {check_data.option_flag(name): value for name, value in options.items() if name not in HARMLESS}


def differences(here: dict, there: dict, run: str) -> list[str]:
    """What differs between the identities of two runs, up to three of it; there belongs to `run`.

    Options come first: other options often mean other utterances too, and then those are not the cause.
    """
    for part in ("options", "data"):
        ours, theirs = here[part], there[part]
        names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        if names:
            shown = [f"{name} is {ours.get(name)} here, {theirs.get(name)} in {run}" for name in names[:3]]
            if part == "data":  # digests mean nothing to a reader
                shown = [f"other {n}" if isinstance(ours.get(n), str) else text for n, text in zip(names, shown)]
            return [*shown, f"{len(names) - 3} more"] if len(names) > 3 else shown
    return []


def check_same_run(run: Path, description: dict, identity: dict) -> None:
    """Refuse the checkpoint of another run, and name only what differs; warn where only the last digits may."""
    if found := differences(identity, description["identity"], "the unfinished run"):
        advice = "Finish it, choose another --out, or start over with --fresh"
        raise UsageError(f"{run} holds another, unfinished run: {'; '.join(found)}. {advice}")
    here = environment()
    for name, there in description["environment"].items():
        if there != here.get(name):
            found = printable(f"saved with {name} {there}, now {here.get(name)}")
            log.warning(f"checkpoint: {found}: the last digits may differ")


def open_own(path: Path) -> int:
    """Open a file of the results folder to read and append, and make it if there is none.

    In a stranger's folder a link could lead to a file of the user, and a FIFO would wait for ever.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{path} is a link; remove it") from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise UsageError(f"{path} is not a regular file, or has a second hard link; remove it")
    return descriptor


def lock_folder(run: Path, directory: Path | None = None):
    """Lock a folder for this process, or raise a UsageError that names the other one; a lock ends with its process.

    The file has the number of the process and the digest of DIR, for `default_folder`.
    """
    if fcntl is None:
        return None
    lock = open_own(run / "lock")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(lock, 20).decode("ascii", "replace").partition("\n")[0].strip()
        raise UsageError(f"{run} is in use by another run, process {pid}") from None
    except OSError as error:  # a file system without locks
        log.warning(f"lock: not available here ({error.strerror}); do not start a second run on this folder")
    if not re.fullmatch(rb"\d*\n?([0-9a-f]{12}\n)?", os.read(lock, 100)):
        os.close(lock)
        raise UsageError(f"{run / 'lock'} is not of this program; choose another --out")
    with contextlib.suppress(OSError):  # on a full disk a second run cannot name this one, but is still refused
        os.truncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        if directory is not None:
            os.write(lock, f"{folder_digest(directory)}\n".encode())
    return lock


# --- labelling other files ------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """A trained model as its files describe it."""

    classes: tuple[str, ...]
    dim: int  # of a vector, a frame or a layer
    layers: int  # number L that the model reads
    layer_axis: int  # of the layers in arrays of three axes, or None
    layer: int  # the one that is read from files with several, or None
    adapt: str  # as in Config, or None
    seed: int
    prior: float
    pooling: str
    reshapes_vectors: bool
    keys: tuple[str, ...]  # names of the array with the features
    longest: int  # number of frames of the longest utterance
    merge: tuple[str, ...]
    speakers: tuple[str, ...]  # of the training data; "" stands for unknown ones
    corpora: tuple[str, ...]  # of the training data
    encoder_similarity: float  # the lowest of a training utterance: see stats.rank_correlation
    rms: float  # of the features, median over training utterances
    temperature: float
    digest: str  # SHA-256 of model.npz
    ensemble: Ensemble | None = None

    @property
    def adapted(self) -> str | None:
        """How its answers are adapted; None, too, if the final model chose not to adapt."""
        return self.adapt if math.isfinite(self.prior) else None

    @property
    def width(self) -> int:
        """Numbers of an utterance, or of a frame."""
        return self.layers * self.dim

    @property
    def statistics(self) -> stats.Statistics:
        return stats.Statistics(self.ensemble.mean, self.ensemble.scale)

    @property
    def digests(self) -> dict[str, str]:
        return {"statistics": self.ensemble.statistics_digest, "model": self.digest}

    def reject(self, frames) -> tuple[str, str] | None:
        """Code and reason if features, (T, D), are certainly not like those that the model was trained on."""
        if self.longest == 1 < len(frames):
            rows = f"{len(frames)} rows, and the model was trained on vectors"
            return "several-rows", f"has {rows}: as many utterances, the layers of an encoder, or frames?"
        reason = stats.encoder_mismatch(frames.mean(0), self.statistics.mean, self.encoder_similarity)
        return ("other-encoder", reason) if reason else None

    def is_unseen_speaker(self, speaker: str | None) -> bool:
        """Whether a speaker is certainly not in the training data: only names from one source can be compared."""
        custom = {name.startswith("own:") for name in self.speakers}
        comparable = speaker and "" not in self.speakers and custom == {speaker.startswith("own:")}
        return bool(comparable) and speaker not in self.speakers


def load_model(run: Path) -> Model:
    """Read the model of a finished run; a UsageError names what is missing, damaged, of another version, or mixed."""
    require_finished(run)
    try:
        model = read_description(run / "config.json")
        blob = stats.read_bytes(run / "model.npz", MAX_MODEL)
        arrays = check_data.parse_arrays(blob, MAX_MODEL, names=expected_shapes(model, {}))
    except stats.DataError as error:
        raise UsageError(f"{run} contains no finished model: {error}") from None
    shapes = {path: array.shape for path, array in arrays.items()}
    if hashlib.sha256(blob).hexdigest() != model.digest or shapes != expected_shapes(model, arrays):
        raise UsageError(f"{run}: config.json and model.npz do not belong together")
    seeds, width = arrays["params/Dense_0/bias"].shape
    if not 0 < seeds * width <= MAX_UNITS:
        raise UsageError(f"{run}: the model has {seeds} seeds of {width} hidden units")
    if not all(np.isfinite(array).all() for array in arrays.values()) or arrays["scale"].min() <= 0:
        raise UsageError(f"{run}: the model holds NaN or Inf, or a scale that is not above 0")
    params = {path.removeprefix("params/"): array for path, array in arrays.items()}
    mean, scale = params.pop("mean"), params.pop("scale")
    return model._replace(ensemble=Ensemble(mean, scale, model.prior, params))


def require_finished(run: Path) -> None:
    """Raise a UsageError if a folder holds the checkpoints of an unfinished run."""
    if any(os.path.lexists(run / file) for file in RunFolder.CHECKPOINTS):
        raise UsageError(f"{run} holds an unfinished run; finish it with the same command, or remove its checkpoints")


def read_description(path: Path) -> Model:
    """The model that a config.json describes, without its arrays; it raises stats.DataError."""
    blob = stats.read_bytes(path, MAX_DESCRIPTION)
    try:
        config = json.loads(blob)
        if config.get("format") != ARTIFACT_VERSION:
            raise stats.DataError("other-version", "it was made by another version of train.py; train again")
        if "fusion" in config:
            advice = "label the files with each of its runs, then fuse those folders with --fuse and this --predict"
            raise stats.DataError("fusion", f"it is a fusion of runs; {advice}")
        options = {name: config["options"][name] for name in ("merge", "adapt", "layer", "seed")}
        given = config | options | {"digest": config["model"]}
        given["prior"] = math.inf if given["prior"] is None else given["prior"]
        absent = {"ensemble"} | {name for name in ("adapt", "layer", "layer_axis") if given[name] is None}
        kinds = Model.__annotations__.items()
        model = Model(**{name: None if name in absent else kind(given[name]) for name, kind in kinds})
        Config("DIR", **options)  # fails here, not later, if an entry is damaged
        names = *model.classes, *model.keys, *model.speakers, *model.corpora
        whole = all(isinstance(text, str) for text in names)
        whole = whole and np.isfinite([model.encoder_similarity, model.rms, model.temperature]).all()
        whole = whole and min(model.rms, model.temperature, model.dim, model.layers) > 0 < model.prior
        whole = whole and all(0 < len(name) <= check_data.MAX_CLASS_NAME for name in model.classes)
        whole = whole and 0 < len(set(model.classes)) == len(model.classes) <= check_data.MAX_CLASSES
        whole = whole and model.pooling in ("mean", "attentive") and model.layer_axis in (0, 1, None)
    except stats.DataError:  # a ValueError, too
        raise
    except (*MALFORMED, UsageError):
        whole = False
    if not whole:
        raise stats.DataError("damaged", "its config.json is damaged")
    return model


def expected_shapes(model: Model, arrays):
    """Name and shape of each array that a model must have; only its seeds and hidden units are free."""
    kernel = np.atleast_1d(arrays.get("params/Dense_0/kernel", 0))
    seeds, width = kernel.shape[0], kernel.shape[-1]
    dim, classes = model.width, len(model.classes)
    pooled = model.dim if model.pooling == "mean" else 2 * dim
    shapes = {
        "mean": (dim,),
        "scale": (dim,),
        "params/Dense_0/kernel": (seeds, pooled, width),
        "params/Dense_0/bias": (seeds, width),
        "params/Dense_1/kernel": (seeds, width, classes),
        "params/Dense_1/bias": (seeds, classes),
        "params/linear/kernel": (seeds, dim, classes),
        "params/linear/bias": (seeds, classes),
    }
    if model.layers > 1:
        shapes["params/layers"] = seeds, model.layers
    return shapes if model.pooling == "mean" else shapes | {"params/query": (seeds, dim)}


def run_prediction(config: Config) -> int:
    """Label a folder, or one file, with the final model of a run; labels in the names are compared, not needed."""
    run, given = Path(config.predict), Path(config.directory)
    model = load_model(run)
    unused = ("layers", "layer", "fresh", "overwrite", "no_compile_cache", "recompute_stats")
    log_unused(config, "with --predict", (*TRAINING_OPTIONS, *unused))
    out = Path(config.out or run / f"predict-{os.path.basename(os.path.realpath(given))}")
    check_prediction_folder(out, given if given.is_dir() else given.parent, run)
    if config.dim not in (None, model.dim):
        raise UsageError(f"--dim is {config.dim}, but the model needs features {model.dim} wide")
    check_statistics(model, given)
    notes, columns = choose_classes(model, config.classes)
    scan, predictions = answer_files(config, model, columns, notes)
    for line in check_data.findings_report(scan):
        log.info(line)
    if not predictions.utterances:
        raise UsageError(f"no file can be used; the model needs {model.dim}-dimensional features from its own encoder")
    scored, reasons = choose_scored(config, model, predictions)
    notes += reasons
    metrics = None
    if scored.utterances:
        metrics = evaluate_transfer(model, scored, notes) | {"adapted": model.adapted}
        metrics |= left_out_report(scan) | provenance(config, package_versions(["numpy"]))
        for name in TRAINING_OPTIONS:  # they have no effect
            metrics["settings"].pop(name, None)
    save_prediction(out, scan.findings, predictions, model.digests, metrics)
    print_prediction(out, len(scan.findings), predictions, metrics, notes)
    return 1 if scan.findings else 0


def choose_classes(model: Model, names: str | None) -> tuple[list[str], list[int]]:
    """The classes to answer among, as columns of the model's logits; and the notes about them."""
    if names is None:
        return [], list(range(len(model.classes)))
    chosen = check_data.parse_emotions(names)
    for name in chosen:
        if name not in model.classes:
            known = f"{', '.join(model.classes)}{check_data.suggest(name, model.classes)}"
            raise UsageError(f"--classes: the model has no class {name}; it has {known}")
    require(len(set(chosen)) > 1, "classes", "at least two classes of the model")
    columns = [column for column, name in enumerate(model.classes) if name in chosen]
    classes = f"{len(columns)} of the model's {len(model.classes)} classes"
    return [f"--classes: answers among {classes}, whose probabilities are renormalised to a sum of 1"], columns


def answer_files(
    config: Config, model: Model, columns: list[int], notes: list[str]
) -> tuple[check_data.Scan, Predictions]:
    """The model's answers, among the classes of these columns, for every file that fits it; `notes` are extended."""
    # Labels of other classes stay known; layers are read as in training.
    options = dataclasses.replace(config, classes=None, layers=model.layers > 1, layer=model.layer)
    known = {name: getattr(model, name) for name in ("dim", "reshapes_vectors", "keys", "layers", "layer_axis")}
    scan = check_data.Scan(Path(config.directory), **known)
    utterances, others = [], None
    with live_log():
        features = usable_features(options, model, scan, utterances)
        if model.adapted:  # the files are read twice, as sequences may not fit in memory
            means = [frames.mean(0) for frames in features]
            means = np.reshape(means, (-1, model.width))
            others = other_utterances(means, utterances, most_others(model.adapt), model.seed)
            again = []
            features = usable_features(options, model, dataclasses.replace(scan, findings=[]), again)
        answers = Answers.of(model.ensemble, model.temperature, features, others)
    if model.adapt and not model.adapted:
        notes.append("the final model does not adapt: in training that did not help its validation speakers")
    if scan.layer_guess:
        notes.append(scan.layer_guess)
    if others and again != utterances:
        raise UsageError("files of DIR were changed while they were read; predict again")
    if others and (alone := int((others.count == 0).sum())):
        found = f"{check_data.counted(alone, 'file')} without other files of a known speaker"
        notes.append(f"{found}: not adapted")
    finite = np.isfinite(answers.logits).all(1)  # the most probable of NaN would be the first class
    for place in np.flatnonzero(~finite):
        scan.findings.append(check_data.Finding(utterances[place].file, "overflow", "the model's output is NaN or Inf"))
    scan.findings.sort()
    classes = tuple(model.classes[column] for column in columns)
    speaker = np.array([u.speaker or u.recording or u.file for u in utterances])
    answers = answers._replace(logits=answers.logits[:, columns])
    predictions = Predictions(utterances, classes, answers, np.full(len(utterances), -1), speaker)
    return scan, predictions.select(finite)


def usable_features(options: Config, model: Model, scan: check_data.Scan, utterances: list):
    """Yield the features of every file that fits the model, (T, D); its utterance is added to the list.

    Findings go to the scan.
    """
    size = check_data.Scale(model.rms, np.hypot(*model.statistics))
    for utterance, frames in check_data.iter_features(options, scan, size, model.merge, log_scan_progress()):
        frames = frames.reshape(-1, model.width)
        if fault := model.reject(frames):
            scan.findings.append(check_data.Finding(utterance.file, *fault))
        else:
            utterances.append(utterance)
            yield frames


def check_prediction_folder(out: Path, features: Path, run: Path) -> None:
    """Keep predictions out of the features, out of the results of training, and away from files of other programs."""
    scheme = read_json(out / "metrics.json").get("fold_scheme", TRANSFER)
    if scheme != TRANSFER or any(os.path.lexists(out / file) for file in RUN_FILES):
        raise UsageError(f"{out} holds the results of a training run; choose another --out")
    if any(part.is_symlink() for part in (out, *out.parents) if run in part.parents):
        raise UsageError(f"{out}: the model's folder has a link there; remove it, or choose another --out")
    check_folder(out, features, holds_predictions(out))


def holds_predictions(folder: Path) -> bool:
    """Whether a folder has a predictions.csv of this program."""
    with contextlib.suppress(stats.DataError):
        return stats.read_bytes(folder / "predictions.csv").startswith(b"file,utterance,corpus,speaker,label,fold,")
    return False


def check_statistics(model: Model, given: Path) -> None:
    """Refuse a folder whose user-supplied statistics are of another encoder; the model's own are used in any case."""
    stored = stats.load(given) if given.is_dir() else None
    if stored is None or not stored.user_supplied:
        return
    mean, name = stored.statistics.mean, given / stats.MEAN_FILE
    if (mean.size, stored.layers) != (model.width, model.layers):
        found = f"{stored.layers} x {mean.size // stored.layers} numbers"
        raise UsageError(f"{name} has {found}, but the model needs {model.layers} x {model.dim}")
    if reason := stats.statistics_mismatch(stored.statistics, model.statistics, model.encoder_similarity):
        raise UsageError(f"{name} is of another encoder than the model: {reason}")


def choose_scored(config: Config, model: Model, predictions: Predictions) -> tuple[Predictions, list[str]]:
    """The predictions for files with a known label and an unseen speaker, and why the others are not scored."""
    utterances = predictions.utterances
    reasons = [why_not_scored(config, model, predictions.classes, utterance) for utterance in utterances]
    scored = predictions.select(np.array([not reason for reason in reasons]))
    labels = {utterance.emotion for utterance in utterances} - {None}
    if not labels:  # nobody expects a score
        return scored, []
    notes = []
    for reason, count in collections.Counter(filter(None, reasons)).most_common():
        names = f": {', '.join(sorted(labels - {*predictions.classes}))}" if reason == OTHER_CLASS else ""
        notes.append(f"{check_data.counted(count, 'file')} not scored: {reason}{names}")
    return scored, notes


def why_not_scored(config: Config, model: Model, classes, utterance: emotions.Utterance) -> str:
    """The reason why an utterance is not scored; empty if it is."""
    if utterance.emotion is None:
        return "no known label"
    if utterance.emotion not in classes:
        return OTHER_CLASS
    if utterance.version:
        return "a version of another file"
    if utterance.speaker in model.speakers:
        return "the speaker was in the training data"
    if not (config.new_speakers or model.is_unseen_speaker(utterance.speaker)):
        return "the names do not show whether the speaker was in the training data; if not, use --new-speakers"
    return ""


def evaluate_transfer(model: Model, scored: Predictions, notes: list[str]) -> dict:
    """All of metrics.json that follows from the answers for files of unseen speakers."""
    utterances, notes = scored.utterances, list(notes)
    if stated := sum(not model.is_unseen_speaker(utterance.speaker) for utterance in utterances):
        notes.append(
            f"the speakers of {check_data.counted(stated, 'file')} are new to the model by --new-speakers alone"
        )
    unknown = sum(utterance.speaker is None for utterance in utterances)
    if unknown:
        found = f"speaker unknown for {check_data.counted(unknown, 'file')}"
        notes.append(f"{found}: each recording counts as a speaker of its own, so that the intervals are too narrow")
    labels = {utterance.emotion for utterance in utterances}
    if absent := [name for name in scored.classes if name not in labels]:
        notes.append(f"no scored file is {', '.join(absent)}, but answers may be; --classes leaves classes out")
    metrics = evaluate(scored, TRANSFER, True, "of the model's training data", notes)
    return metrics | {
        "trained_on": list(model.corpora),
        "model": model.digests["model"],
        "unknown_speakers": unknown,
    }


def save_prediction(
    out: Path,
    findings: list[check_data.Finding],
    predictions: Predictions,
    digests: dict[str, str],
    metrics: dict | None,
) -> None:
    """Write the files of a prediction, and remove the scores of an earlier one if there are none now."""
    # predictions.csv is the first to appear: it marks the folder.
    artifacts = prediction_files(predictions, digests) | {"skipped.csv": skipped_bytes(findings)}
    if metrics:
        artifacts |= score_files(metrics)
    out.mkdir(parents=True, exist_ok=True)
    for file in SCORE_FILES:
        if file not in artifacts:
            (out / file).unlink(missing_ok=True)
    stats.write_files(out, artifacts)


def print_prediction(out: Path, left_out: int, predictions: Predictions, metrics: dict | None, notes) -> None:
    """Print how many files got each label, and the scores, or why there are none."""
    files = np.bincount(predictions.answers.logits.argmax(1), minlength=len(predictions.classes))
    counts = ", ".join(f"{name} {count}" for name, count in zip(predictions.classes, files))
    print(
        f"{check_data.counted(len(predictions.utterances), 'file')} labelled, {left_out} left out: {printable(counts)}"
    )
    if metrics:
        sys.stdout.write(report_text(metrics, out / "report.html", sys.stdout))
    else:
        print("".join(f"note: {printable(note)}\n" for note in notes), end="")
    print(printable(str(out / "predictions.csv")))


# --- comparison of runs ---------------------------------------------------------------------------------------------


class Results(NamedTuple):
    """The name of a folder, its metrics.json, and the arrays of its fusion.npz."""

    name: str
    metrics: dict
    arrays: dict[str, np.ndarray]


def load_results(run: Path, scored: bool = True) -> Results:
    """Read the results of a finished run, or those of --predict, which may have no metrics.json.

    A UsageError names what is missing, damaged, or of another program.
    """
    require_finished(run)
    try:
        metrics = json.loads(stats.read_bytes(run / "metrics.json", MAX_MODEL)) if scored else {}
        arrays = check_data.read_arrays(run / "fusion.npz", kinds="fiU")
        whole = has_all_answers(arrays) and (not scored or has_all_scores(metrics))
        whole = whole and metrics.get("model", str(arrays["model"])) == str(arrays["model"])  # else of two runs
    except stats.DataError as error:
        files = "metrics.json and fusion.npz of a finished run" if scored else "fusion.npz with predictions"
        raise UsageError(f"{run} holds no {files}: {error}") from None
    except MALFORMED:
        whole = False
    if not whole:
        raise UsageError(f"{run}: metrics.json or fusion.npz is damaged, or of another version of train.py")
    if metrics.get("fold_scheme") == TRANSFER:  # not all of them are scored
        unknown = [""] if metrics.get("unknown_speakers") else []
        unseen = np.isin(arrays["speaker"], [*metrics["speakers"], *unknown])
        arrays["label"] = np.where(unseen & (arrays["version"] == ""), arrays["label"], -1)
    return Results(str(run), metrics, arrays)


def has_all_scores(metrics) -> bool:
    """Whether metrics.json has what is compared; any exception means the same as False."""
    numbers = [metrics[name] for name in ("ece", "n_utterances", "n_speakers", *SCORES)]
    numbers += [len(metrics[name]) for name in ("folds", "speakers")]
    for name in SCORES:
        low, high = metrics[f"{name}_ci95"]
        numbers += low, high
    numeric = all(number is None or type(number) in (int, float) for number in numbers)
    numeric = numeric and bool(re.fullmatch(ADAPTATION, metrics.get("adapted") or "all"))
    return numeric and isinstance(metrics["fold_scheme"], str)


def has_all_answers(arrays) -> bool:
    """Whether fusion.npz has the answers for each utterance; any exception means the same as False."""
    rows, columns = arrays["logits"].shape
    texts = ("id", "utterance", "speaker", *GROUPS, "version")
    shapes = dict.fromkeys((*texts, "temperature", "label", "fold"), (rows,))
    shapes |= {"classes": (columns,), "model": ()}
    if any(arrays[name].shape != shape for name, shape in shapes.items()):
        return False
    for name in ("classes", "model", *texts):
        # numpy itself fails with a SystemError at numbers that are no characters.
        codes = np.atleast_1d(arrays[name]).view(np.uint32)
        if arrays[name].dtype.kind != "U" or codes.max() > sys.maxunicode:
            return False
    label, temperature = arrays["label"], arrays["temperature"]
    if {label.dtype.kind, arrays["fold"].dtype.kind} != {"i"} or label.min() < -1 or label.max() >= columns:
        return False
    finite = np.isfinite(arrays["logits"]).all() and np.isfinite(temperature).all()
    return finite and temperature.min() > 0


class Aligned(NamedTuple):
    """The answers of R runs, aligned by the names of N utterances, sorted, and of C classes.

    Several files of one utterance, such as a recording with and without video, count as one with their mean
    probability.
    """

    runs: list[Results]
    utterance: np.ndarray  # (N,)
    classes: tuple[str, ...]
    probability: np.ndarray  # (R, N, C); 0 where it is not known
    known: np.ndarray  # (R, N, C), bool: whether the run has the utterance and the class
    row: np.ndarray  # (R, N), of the utterance in the arrays of the run; -1 if the run lacks it
    label: np.ndarray  # (R, N), index of the class; -1 if unknown
    speaker: np.ndarray  # (R, N), text; empty if unknown
    fold: np.ndarray  # (R, N), from 1; 0 if there is none

    @property
    def present(self) -> np.ndarray:
        """Whether a run has an utterance, shape (R, N)."""
        return self.row >= 0


def align(runs: list[Results]) -> Aligned:
    """Align the answers of some runs; class names are those of the common vocabulary, so that `fearful` is `fear`."""
    names = [list(map(emotions.normalise_emotion, run.arrays["classes"].tolist())) for run in runs]
    classes = sorted(set(itertools.chain(*names)), key=emotions.emotion_order)
    utterance = np.unique(np.concatenate([run.arrays["utterance"] for run in runs]))
    shape = len(runs), len(utterance)
    probability = np.zeros((*shape, len(classes)))
    known = np.zeros(probability.shape, bool)
    row = np.full(shape, -1)
    label = np.full(shape, -1)
    fold = np.zeros(shape, int)
    speaker = np.full(shape, "", object)
    for number, run in enumerate(runs):
        arrays = run.arrays
        column = np.array([classes.index(name) for name in names[number]])
        place = np.searchsorted(utterance, arrays["utterance"])
        logits = arrays["logits"] / arrays["temperature"].astype(float)[:, None]
        answers = stats.probabilities(logits)
        np.add.at(probability[number], (place[:, None], column), answers)
        known[number][np.ix_(place, column)] = True
        order = np.argsort(arrays["version"] == "", kind="stable")  # originals last: theirs are row and label
        place = place[order]
        row[number, place] = order
        label[number, place] = np.where(arrays["label"] < 0, -1, column[arrays["label"]])[order]
        fold[number, place] = arrays["fold"][order]
        speaker[number, place] = arrays["speaker"][order].tolist()
    files = probability.sum(-1, keepdims=True)
    probability = probability / np.where(files > 0, files, 1)
    return Aligned(runs, utterance, tuple(classes), probability, known, row, label, speaker, fold)


def run_comparison(config: Config) -> int:
    """Print the scores of some runs, and the differences of each from the first one on the utterances of both."""
    log_unused(config, "with --compare", all_options_but("compare", "format"))
    first, *others = [load_results(Path(name)) for name in config.compare]
    scores = [run_scores(run) for run in (first, *others)]
    differences, notes = [], []
    for other in others:
        aligned = align([first, other])
        differences.append({"run": other.name} | run_differences(aligned))
        notes += comparison_notes(aligned)
    if any(0 < found["n_speakers"] < stats.FEW_SPEAKERS for found in differences):
        notes.append(f"with fewer than {stats.FEW_SPEAKERS} speakers the intervals are unreliable")
    if config.format == "json":
        content = {"runs": scores, "first": first.name, "differences": differences, "notes": notes}
        sys.stdout.write(stats.json_bytes(content).decode())
        return 0
    explanation = "95 % intervals are over speakers (jackknife); p is two-sided, and not corrected for several tests."
    title = f"Differences from {first.name} on the utterances of both, in points:"
    escape = ESCAPES[config.format]
    parts = [format_table(score_cells(scores), config.format), escape(title)]
    parts += [format_table(difference_cells(differences), config.format), escape(explanation)]
    print("\n\n".join([*parts, *map(escape, notes)]))
    return 0


def run_scores(run: Results) -> dict:
    """What --compare shows of a run; names and values are those of metrics.json."""
    names = ("n_utterances", "n_speakers", "fold_scheme", "speaker_independent", "adapted", "ece")
    intervals = [f"{name}_ci95" for name in SCORES]
    scores = {name: run.metrics.get(name) for name in (*SCORES, *intervals, *names)}
    return {"run": run.name, "n_folds": len(run.metrics["folds"])} | scores


def run_differences(aligned: Aligned) -> dict:
    """Differences of the second from the first run, on the utterances that both have with the same label."""
    label, other_label = aligned.label
    shared = np.flatnonzero((label >= 0) & (label == other_label))
    # Where the speaker is unknown, each utterance counts as its own.
    names = zip(*aligned.speaker[:, shared], aligned.utterance[shared].tolist())
    speaker = [one or other or utterance for one, other, utterance in names]
    counts = []
    for probability in aligned.probability[:, shared]:
        predicted = probability.argmax(1)
        _, by_speaker = stats.group_counts(speaker, label[shared], predicted, len(aligned.classes))
        counts.append(by_speaker)
    differences = {name: found._asdict() for name, found in stats.paired_differences(*counts).items()}
    known = set(aligned.speaker[:, shared].flat) - {""}
    return {"n_utterances": len(shared), "n_speakers": len(known)} | differences


def comparison_notes(aligned: Aligned) -> list[str]:
    """What makes the scores of two runs differ besides their features and models."""
    first, other = aligned.runs
    notes, metrics = [], (first.metrics, other.metrics)

    def add(kind: str, details: Iterable) -> None:
        one, two = details
        notes.append(f"{kind}: {first.name} has {one}; {other.name} has {two}")

    has_class, shared = aligned.known.any(1), aligned.present.all(0)
    if not has_class.all():
        add("CLASSES DIFFER", [" ".join(itertools.compress(aligned.classes, row)) for row in has_class])
    if not shared.all():
        add("UTTERANCES DIFFER", [f"{row.sum()}, {shared.sum()} of them in both" for row in aligned.present])
    label, other_label = aligned.label[:, shared]
    contradicting = (label != other_label) & (label >= 0) & (other_label >= 0)
    if count := int(contradicting.sum()):
        notes.append(f"LABELS DIFFER: {count} utterances of {first.name} are labelled differently in {other.name}")
    folds, other_folds = aligned.fold[:, shared].tolist()
    # Their numbers do not matter: equal folds are as many as there are pairs.
    pairs = set(zip(folds, other_folds))
    if not len(pairs) == len(set(folds)) == len(set(other_folds)):
        add("FOLDS DIFFER", [f"{len(each['folds'])} ({each['fold_scheme']})" for each in metrics])
    independence = [each.get("speaker_independent") for each in metrics]
    if independence[0] != independence[1]:
        add("INDEPENDENCE DIFFERS", [f"{'unseen' if each else 'possibly seen'} speakers" for each in independence])
    adaptation = [each.get("adapted") or "none" for each in metrics]
    if adaptation[0] != adaptation[1]:
        add("ADAPTATION DIFFERS", adaptation)
    return notes


def score_cells(scores: list[dict]) -> list[list[str]]:
    """The rows of the table of scores, its head first."""
    titles = [f"{title.partition(' (')[0]}, %" for title in SCORES.values()]
    rows = [["run", *titles, "utterances", "speakers", "folds", "ECE, %"]]
    for run in scores:
        cells = []
        for name in SCORES:
            score, low, high = map(percent, (run[name], *run[f"{name}_ci95"]))
            cells.append(f"{score} ({low} to {high})")
        folds = str(run["n_folds"])
        if not run["fold_scheme"].isdecimal():
            folds += f" ({run['fold_scheme']})"
        counts = [run["n_utterances"], run["n_speakers"], folds, percent(run["ece"])]
        rows.append([run["run"], *cells, *map(str, counts)])
    return rows


def difference_cells(differences: list[dict]) -> list[list[str]]:
    """The rows of the table of differences, its head first."""
    titles = [column for title in SCORES.values() for column in (title.partition(" (")[0], "p")]
    rows = [["run", *titles, "utterances", "speakers"]]
    for run in differences:
        cells = []
        for name in SCORES:
            *values, p = run[name].values()
            difference, low, high = (f"{100 * value:+.1f}" for value in values)
            p = f"{p:.3f}" if p >= 0.001 else "< 0.001"
            known = math.isfinite(values[0])
            cells += [f"{difference} ({low} to {high})", p] if known else ["-", "-"]
        rows.append([run["run"], *cells, str(run["n_utterances"]), str(run["n_speakers"])])
    return rows


def format_table(rows: list[list[str]], form: str | None) -> str:
    """A table for the terminal or in one of FORMATS, its head first; the first column is text, all others numbers."""
    rows = [[ESCAPES[form](cell) for cell in row] for row in rows]
    numbers = len(rows[0]) - 1
    if form == "latex":
        head, *body = [" & ".join(row) + r" \\" for row in rows]
        return "\n".join([rf"\begin{{tabular}}{{l{'r' * numbers}}}", head, r"\hline", *body, r"\end{tabular}"])
    if form == "markdown":
        rows.insert(1, ["---", *["---:"] * numbers])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(map(cell_len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(set_cell_size, row, widths)).rstrip() for row in rows)


def escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", printable(text))


def escape_latex(text: str) -> str:
    return printable(text).translate(LATEX_SPECIALS)


#: What LaTeX does not print as it is. Behind the end of a row, it would take * and [ for options of the line break.
LATEX_SPECIALS = str.maketrans(
    {character: f"\\{character}" for character in "{}$&#_%"}
    | {
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "[": "{[}",
        "*": "{*}",
    }
)
ESCAPES = {None: printable, "markdown": escape_markdown, "latex": escape_latex}


# --- fusion of runs -------------------------------------------------------------------------------------------------


class FusedUtterance(NamedTuple):
    """What fusion.npz has of an utterance, with the names of `emotions.Utterance`."""

    file: str
    canonical: str
    emotion: str | None
    speaker: str | None
    corpus: str
    gender: str | None
    intensity: str | None
    version: str | None


class Fusion(NamedTuple):
    """A fusion of R runs, as its config.json describes it; the names are those of Model where both have a field."""

    classes: tuple[str, ...]
    corpora: tuple[str, ...]  # of the training data of all runs
    speakers: tuple[str, ...]
    runs: tuple[str, ...]  # folders
    models: tuple[str, ...]  # SHA-256 of the model.npz of each run
    weights: tuple[float, ...]
    temperature: float

    is_unseen_speaker = Model.is_unseen_speaker

    @property
    def digests(self) -> dict[str, str]:
        """As those of a model; a fusion has no statistics."""
        text = json.dumps([self.classes, self.models, self.weights, self.temperature])
        return {"statistics": "", "model": hashlib.sha256(text.encode()).hexdigest()}


def run_fusion(config: Config) -> int:
    """Fuse the out-of-fold answers of some runs, and save and show the results like those of a run."""
    log_unused(config, "with --fuse", all_options_but("fuse", "out", "overwrite"))
    runs, out = [load_results(Path(name)) for name in config.fuse], Path(config.out)
    check_fusion_folder(config, runs)
    predictions, weights, metrics = fuse_runs(runs)
    fusion = describe_fusion(runs, predictions.classes, weights)
    metrics |= {"fused": list(fusion.runs), "weights": list(fusion.weights), "model": fusion.digests["model"]}
    metrics |= fusion_provenance(config)
    description = {"format": ARTIFACT_VERSION, "version": check_data.VERSION, "fusion": fusion._asdict()}
    description |= {"model": fusion.digests["model"], "options": dataclasses.asdict(config)}
    files = {"config.json": stats.json_bytes(description)} | prediction_files(predictions, fusion.digests)
    with RunFolder(out):
        stats.write_files(out, files | score_files(metrics))
    sys.stdout.write(report_text(metrics, out / "report.html", sys.stdout))
    return 0


def fusion_provenance(config: Config) -> dict:
    """How to repeat a fusion, as in metrics.json."""
    settings = {f"run {number}": name for number, name in enumerate(config.fuse, 1)}
    settings |= {name: value for name, value in set_options(config).items() if name in ("predict", "out")}
    return provenance(config, package_versions(["numpy"])) | {"settings": settings}


def fuse_runs(runs: list[Results]) -> tuple[Predictions, stats.FusionWeights, dict]:
    """Fuse the answers of some runs for their test speakers: the answers, the weights for new files, and the scores."""
    aligned = align(runs)
    label, speaker = agreed(aligned)
    independent = all(run.metrics.get("speaker_independent") for run in runs)
    # Where speakers are not known, each utterance counts as its own.
    group = np.where(independent & (speaker != ""), speaker, aligned.utterance)
    fold = common_folds(aligned, group)
    answers, chosen = fuse_folds(aligned, label, group, fold)
    utterances = fused_utterances(aligned, label, speaker)
    predictions = Predictions(utterances, aligned.classes, answers, fold, group)
    scheme = ", ".join(dict.fromkeys(run.metrics["fold_scheme"] for run in runs))
    notes = fusion_notes(aligned, chosen[-1])
    metrics = evaluate(predictions, scheme, independent, "those of the fused runs", notes)
    for number, (scores, weights) in enumerate(zip(metrics["folds"], chosen)):
        tested = fold == number
        scores |= {"fold": number + 1, "test": sorted(set(group[tested])), "n_test": int(tested.sum())}
        scores |= {"weights": weights.weights.tolist(), "temperature": weights.temperature}
    adaptation = [run.metrics.get("adapted") for run in runs]
    metrics["adapted"] = max(filter(None, adaptation), key=most_others, default=None)
    if len(set(adaptation)) > 1:
        details = ", ".join(f"{run.name}: {each or 'none'}" for run, each in zip(runs, adaptation))
        metrics["notes"].append(f"the runs are adapted differently ({details})")
    return predictions, chosen[-1], metrics


def fuse_folds(
    aligned: Aligned, label: np.ndarray, group: np.ndarray, fold: np.ndarray
) -> tuple[Answers, list[stats.FusionWeights]]:
    """The answers of a fusion, and the weights for each fold; the last ones are for new files.

    They are chosen on all other folds, so that nothing of a fold has a part in its own weights.
    """
    probability, present = stats.complete_probabilities(aligned.probability, aligned.known), aligned.present
    logits, temperature = np.zeros(probability.shape[1:]), np.ones(len(fold))
    chosen = []
    for current in range(fold.max() + 2):  # the last one tests nobody
        tested = fold == current
        used = ~tested
        weights = stats.fit_fusion(probability[:, used], present[:, used], label[used], group[used])
        logits[tested] = weights.mean(probability[:, tested], present[:, tested])
        temperature[tested] = weights.temperatures(present[:, tested])
        chosen.append(weights)
    return fused_answers(logits, temperature), chosen


def fused_answers(mean: np.ndarray, temperature: np.ndarray) -> Answers:
    """The answers of a fusion, which has no hidden layers, from its weighted mean, (N, C), and temperatures, (N,)."""
    return Answers(mean / temperature[:, None], temperature, np.zeros((len(mean), 0)))


def agreed(aligned: Aligned) -> tuple[np.ndarray, np.ndarray]:
    """Label and speaker of each utterance, (N,), where known; a UsageError names one on which runs disagree.

    It is raised, too, for a run that has no utterance in common with the others.
    """
    present = aligned.present
    for run, own in zip(aligned.runs, present):
        if not (own & (present.sum(0) > 1)).any():
            example, other = aligned.utterance[own][0], aligned.utterance[~own][0]
            found = f"{run.name} has no utterance in common with the others"
            raise UsageError(f"{found}: it has {example}, they have {other}")
    found = []
    for values, missing in ((aligned.label, -1), (aligned.speaker, "")):
        best = values.max(0)  # what is missing is smaller than anything else
        different = (values != best) & (values != missing)
        if different.any():
            row, place = np.argwhere(different)[0]
            other = int(np.argmax(values[:, place] == best[place]))
            pair = values[row, place], best[place]
            one, two = pair if missing == "" else (aligned.classes[label] for label in pair)
            count = check_data.counted(int(different.any(0).sum()), "utterance")
            first, second = aligned.runs[row].name, aligned.runs[other].name
            details = f"{aligned.utterance[place]} is {one} in {first}, {two} in {second}"
            raise UsageError(f"the runs disagree on {count}: {details}; use the same labels and --merge for both")
        found.append(best)
    return found[0], found[1]


def common_folds(aligned: Aligned, group: np.ndarray) -> np.ndarray:
    """The fold that tests each utterance, from 0, shape (N,); `group`, (N,), is its speaker.

    The folds of all runs must divide the speakers alike, however they are numbered: then no run has trained on a test
    speaker of a fold. The numbers are those of the first run; a fold that has no speaker in common with the runs before
    it gets a new one. A UsageError names a speaker who is on different sides.
    """
    common: dict[str, int] = {}  # fold by speaker
    names = [run.name for run in aligned.runs]
    for fold, name in zip(aligned.fold, names):
        tested = fold > 0
        if len(set(fold[tested])) < 2:
            raise UsageError(f"{name} has fewer than two folds; the weights of a fold are chosen on the others")
        members = sorted(set(zip(group[tested], fold[tested].tolist())))
        number_of = {} if common else {own: own - 1 for _, own in members}
        own_of: dict[int, int] = {}
        for speaker, own in members:
            number = common.get(speaker, -1)
            known = number >= 0
            if known and (number_of.setdefault(own, number) != number or own_of.setdefault(number, own) != own):
                advice = "train both with the same --folds and --seed, or with --folds table"
                found = f"{name} splits the speakers differently from {names[0]}: {speaker} is tested in another group"
                raise UsageError(f"{found}; {advice}")
        for speaker, own in members:
            if own not in number_of:
                number_of[own] = max([*common.values(), *number_of.values()], default=-1) + 1
            if common.setdefault(speaker, number_of[own]) != number_of[own]:
                raise UsageError(f"{name} tests {speaker} in several folds")
    return stats.numbered([common[speaker] for speaker in group])  # no fold without an utterance


def fused_utterances(aligned: Aligned, label: np.ndarray, speaker: np.ndarray):
    """The utterances of a fusion; all but label and speaker is from the first run that has them."""
    utterances, first = [], aligned.present.argmax(0)
    for place, name in enumerate(aligned.utterance.tolist()):
        arrays, row = aligned.runs[first[place]].arrays, aligned.row[first[place], place]
        file, *fields = (str(arrays[field][row]) or None for field in ("id", *GROUPS, "version"))
        emotion = aligned.classes[label[place]] if label[place] >= 0 else None
        utterances.append(FusedUtterance(file, name, emotion, speaker[place] or None, *fields))
    return utterances


def fusion_notes(aligned: Aligned, weights: stats.FusionWeights) -> list[str]:
    """Notes on the weights, and on utterances and classes that some of the runs lack."""
    names = [run.name for run in aligned.runs]
    shares = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(names, weights.weights))
    notes = [f"weights for new files: {shares}; those of each fold were chosen on the other folds"]
    total = len(aligned.utterance)
    for name, present, known in zip(names, aligned.present, aligned.known.any(1)):
        if missing := total - int(present.sum()):
            notes.append(f"{name} lacks {missing} of {total} utterances; the others answer them")
        if not known.all():
            notes.append(f"{name} does not know {', '.join(itertools.compress(aligned.classes, ~known))}")
    return notes


def describe_fusion(runs: list[Results], classes: tuple[str, ...], weights: stats.FusionWeights) -> Fusion:
    """The fusion of some runs, with the speakers and the corpora of their config.json."""
    models = tuple(str(run.arrays["model"]) for run in runs)
    origins: dict[str, set] = {"corpora": set(), "speakers": set()}
    for run, model in zip(runs, models):
        config = read_json(Path(run.name) / "config.json", MAX_DESCRIPTION)
        source = config.get("fusion", config)  # a run may be a fusion of others
        for name, found in origins.items():
            texts = source.get(name) if config.get("model") == model else None
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UsageError(f"{run.name}: config.json is damaged, or not of the same run as fusion.npz")
            found.update(texts)
    corpora, speakers = (tuple(sorted(found)) for found in origins.values())
    names = tuple(run.name for run in runs)
    return Fusion(classes, corpora, speakers, names, models, tuple(weights.weights.tolist()), weights.temperature)


def check_fusion_folder(config: Config, runs: list[Results]) -> None:
    """Refuse one run that is given twice, and results that are not those of a fusion of the same runs."""
    out, folders = Path(config.out), [os.path.realpath(run.name) for run in runs]
    models = [str(run.arrays["model"]) for run in runs]
    for number, run in enumerate(runs):
        if models[number] in models[:number] or folders[number] in folders[:number]:
            raise UsageError(f"{run.name} is the same run as one before it")
    check_output_folder(out, Path(runs[0].name))
    held = read_json(out / "config.json", MAX_DESCRIPTION).get("fusion")
    if not isinstance(held, dict) and any(os.path.lexists(out / file) for file in ("config.json", "train.log")):
        raise UsageError(f"{out} holds the results of a run; choose another --out")
    if held and held.get("models") != models and not config.overwrite:
        raise UsageError(f"{out} holds a fusion of other runs; choose another --out, or replace it with --overwrite")


def load_fusion(run: Path) -> Fusion:
    """Read the config.json of a fusion; a UsageError is raised if it is of something else, or damaged."""
    require_finished(run)
    description = read_json(run / "config.json", MAX_DESCRIPTION)
    if "fusion" not in description:
        raise UsageError(f"{run} holds no fusion of runs, as --fuse RUN RUN... --out {run} makes it")
    if description.get("format") != ARTIFACT_VERSION:
        raise UsageError(f"{run} was made by another version of train.py; fuse the runs again")
    try:
        held = description["fusion"]
        texts = {name: tuple(held[name]) for name in ("classes", "corpora", "speakers", "runs", "models")}
        weights = tuple(map(float, held["weights"]))
        fusion = Fusion(**texts, weights=weights, temperature=float(held["temperature"]))
        whole = all(isinstance(text, str) for text in itertools.chain(*texts.values()))
        whole = whole and len(fusion.runs) == len(fusion.models) == len(weights)
        whole = whole and min(weights) >= 0 < fusion.temperature < math.inf and 0 < sum(weights) < 2
        whole = whole and description["model"] == fusion.digests["model"]
    except MALFORMED:
        whole = False
    if not whole:
        raise UsageError(f"{run}: config.json is damaged")
    return fusion


def fuse_predictions(config: Config) -> int:
    """Fuse what the runs of a fusion have predicted for other files; a folder of --predict for each of them."""
    log_unused(config, "with --fuse", all_options_but("fuse", "out", "predict", "new_speakers"))
    fusion, out = load_fusion(Path(config.predict)), Path(config.out)
    found = [load_results(Path(name), scored=False) for name in config.fuse]
    by_model = {str(one.arrays["model"]): one for one in found}
    for one in found:
        if str(one.arrays["model"]) not in fusion.models or one.arrays["fold"].any():
            raise UsageError(f"{one.name} holds no predictions of a run that is fused: {', '.join(fusion.runs)}")
    for run, model in zip(fusion.runs, fusion.models):
        if model not in by_model:
            raise UsageError(f"no folder holds predictions of {run}; label the files with --predict {run} first")
    if len(by_model) < len(found):
        raise UsageError("two of the folders hold predictions of the same run")
    ordered = [by_model[model] for model in fusion.models]
    if os.path.realpath(out) in map(os.path.realpath, config.fuse):
        raise UsageError(f"--out {out} is one of the folders that are fused; choose another")
    check_prediction_folder(out, Path(config.predict), Path(config.predict))
    predictions = fused_predictions(ordered, fusion)
    scored, notes = choose_scored(config, fusion, predictions)
    metrics = None
    if scored.utterances:
        metrics = evaluate_transfer(fusion, scored, notes) | {"fused": list(fusion.runs)} | fusion_provenance(config)
        metrics["adapted"] = read_json(Path(config.predict) / "metrics.json").get("adapted")
    save_prediction(out, [], predictions, fusion.digests, metrics)
    print_prediction(out, 0, predictions, metrics, notes)
    return 0


def fused_predictions(runs: list[Results], fusion: Fusion) -> Predictions:
    """The answers of a fusion for the files that its runs have labelled."""
    aligned = align(runs)
    label, speaker = agreed(aligned)
    probability = stats.complete_probabilities(aligned.probability, aligned.known)
    weights, present = stats.FusionWeights(np.array(fusion.weights), fusion.temperature), aligned.present
    answers = fused_answers(weights.mean(probability, present), weights.temperatures(present))
    utterances = fused_utterances(aligned, label, speaker)
    group = np.where(speaker != "", speaker, aligned.utterance)
    return Predictions(utterances, aligned.classes, answers, np.full(len(group), -1), group)


# --- the device -----------------------------------------------------------------------------------------------------


def start_jax() -> str:
    """Import the JAX stack on the best platform, and return a line that names the device.

    The import takes seconds. It is here and not at the top so that `--help` and every fault of the command line answer
    at once, and so that the platform can be chosen before it.
    """
    global jax, jnp, lax, multihost_utils, nn, optax, tree_map
    plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13") if importlib.util.find_spec("jax_plugins") else ()
    has_cuda = any(map(importlib.util.find_spec, plugins))
    platforms, reason = choose_platform(*probe_gpu(), has_cuda, os.environ.get("JAX_PLATFORMS", ""))
    if platforms:
        os.environ["JAX_PLATFORMS"] = platforms
    os.environ["JAX_ENABLE_X64"] = "0"  # the program is written for 32 bits
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax
    from jax import lax
    from jax.experimental import multihost_utils
    from jax.tree import map as tree_map

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # The population is divided among devices (see population_mesh): every core becomes one.
        jax.config.update("jax_num_cpu_devices", available_cores())
    join_hosts()
    device, fault = first_device(platforms)
    if device.platform == "cpu":
        if platforms != "cpu" and fault:
            reason = f"THE GPU COULD NOT BE USED: {fault}"
            if os.environ.get("LD_LIBRARY_PATH"):  # libraries of another CUDA
                reason += " (unset LD_LIBRARY_PATH)"
        return f"CPU ({check_data.counted(available_cores(), 'core')}), because {reason or 'jax found nothing else'}"
    more = f" and {jax.device_count() - 1} more" if jax.device_count() > 1 else ""
    return f"{device.platform.upper()} {device.device_kind}{more}"


def first_device(platforms: str):
    """The first device, and the first fault that jax logged while it started its backends, in a line of ours.

    jax itself would print a traceback.
    """
    backend_log = logging.getLogger("jax._src.xla_bridge")
    faults = logging.handlers.BufferingHandler(100)
    backend_log.addHandler(faults)
    backend_log.propagate = False
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError, ValueError) as error:  # the user's own JAX_PLATFORMS leaves no other choice
        reason = printable((str(error).partition(" (set JAX")[0].strip() or "it cannot be used").splitlines()[0])
        raise UsageError(f"JAX_PLATFORMS={platforms}: {reason}; unset JAX_PLATFORMS") from None
    finally:
        backend_log.removeHandler(faults)
        backend_log.propagate = True
    if not faults.buffer:
        return device, ""
    record = faults.buffer[0]
    message = str(record.exc_info[1]) if record.exc_info else record.getMessage()
    return device, printable(message.strip().splitlines()[0])


def probe_gpu():
    """Ask NVIDIA's driver, not jax, for a GPU: its name or None, and the reason if there is none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None, "CUDA_VISIBLE_DEVICES hides every GPU"
    hardware = bool(glob.glob("/dev/nvidia[0-9]*"))
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        with contextlib.suppress(OSError):
            display = vendor.with_name("class").read_text().startswith("0x03")
            hardware = hardware or (display and vendor.read_text().strip() == "0x10de")
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        missing = "THE NVIDIA GPU OF THIS MACHINE HAS NO DRIVER INSTALLED (no libcuda.so.1)"
        return None, missing if hardware else "this machine has no NVIDIA GPU"
    count, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        unusable = f"THE DRIVER CANNOT USE THE NVIDIA GPU OF THIS MACHINE (CUDA error {status}; try nvidia-smi)"
        return None, unusable if hardware else "this machine has no NVIDIA GPU"
    driver.cuDeviceGetName(name, len(name), 0)
    return name.value.decode(errors="replace"), ""


def choose_platform(gpu: str | None, fault: str, has_cuda: bool, requested: str):
    """The platforms that jax may use ('' leaves it to jax), and the reason if that is the CPU.

    Decided before jax is imported: with CUDA wheels and no GPU the import prints a traceback, and with a driver that
    does not fit jax would fall back to the CPU without a word.
    """
    if requested:
        return requested, f"JAX_PLATFORMS={requested} requests it"
    if gpu and has_cuda:
        return "cuda,cpu", ""
    if gpu:
        return "cpu", f"{gpu.upper()} IS AVAILABLE BUT THIS JAX HAS NO CUDA SUPPORT: pip install 'jax[cuda12]'"
    return ("cpu" if has_cuda else ""), fault


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def enable_compile_cache() -> None:
    """Cache compiled programs for later runs, in a folder of the user alone: whoever can write there can run code."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.name != "posix":
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "speech-emotion-trainer"
    if not folder.is_absolute():  # the home folder is unknown
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        log.info(f"compile cache: off, {printable(str(folder))}: {error.strerror}")
        return
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        log.info(f"compile cache: off, {printable(str(folder))} is not a folder of yours alone (mode 0700)")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    warnings.showwarning = partial(remove_damaged_entry, folder, warnings.showwarning)


def remove_damaged_entry(folder: Path, show_warning, message, *details, **options) -> None:
    """Remove an entry of the compile cache that jax could not read; jax itself would warn in every run from then on."""
    damaged = re.search(r"reading persistent compilation cache entry for '(\w+)'", str(message))
    if not damaged:
        return show_warning(message, *details, **options)
    log.info(f"compile cache: the entry of {damaged[1]} is damaged; compiled again")
    for path in folder.glob(f"{damaged[1]}-*"):
        path.unlink(missing_ok=True)


# --- the program ----------------------------------------------------------------------------------------------------


def main(arguments=None) -> int:
    logging.raiseExceptions = False  # a closed stderr must not fill the screen with tracebacks
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        config = parse_config(arguments)
        if config.compare:
            program = run_comparison
        elif config.fuse:
            program = run_fusion if config.predict is None else fuse_predictions
        else:
            program = run_training if config.predict is None else run_prediction
        # On several hosts training needs every process; all else runs on the first.
        status = program(config) if program is run_training or is_primary() else 0
        sys.stdout.flush()
        return status
    except (UsageError, stats.DataError) as error:
        log.error("train.py: %s", error)
        return 2
    except TrainingError as error:
        log.error("train.py: %s", error)
        return 1
    except OSError as error:
        if error.filename is None:  # standard output, which check_data.run_cli handles
            raise
        log.error("train.py: %s: %s", printable(str(error.filename)), error.strerror)
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # XLA's word for it
            raise
        reason = printable((str(error).strip() or "no memory left").splitlines()[0])
        advice = "a smaller --batch, --seeds or --width needs less"
        log.error("train.py: OUT OF MEMORY (%s); %s", reason, advice)
        return 1


if __name__ == "__main__":
    status = check_data.run_cli(main)
    if "jax" in globals() and not jax.distributed.is_initialized():
        # Everything is written, and a thread of XLA that outlives the interpreter can abort the process.
        os._exit(status)
    sys.exit(status)

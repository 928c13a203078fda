#!/usr/bin/env python3
"""Train an emotion classifier on NPZ features and report an honest, speaker-independent figure.

    python train.py DIR [--out RUN]
    python train.py DIR --predict RUN

What it does, in order: scan, pack, plan the folds, normalise, train all folds and the final model as one compiled
program, score the out-of-fold predictions, save the artifacts, print the report.

Axes: P population (K folds and the final model, S seeds each), N utterances, B batch, T frames, D features, W hidden
width, C classes; F frames of all sequences together.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import logging.handlers
import math
import os
import platform
import shlex
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import check_data
import emotions
import stats
from check_data import option, require

log = logging.getLogger("train")

EPOCHS_A_CALL = 4  # the host looks at the figures, prints and decides between calls
GROUPS = 6  # of lengths in a batch of sequences: more mean less padding and a longer compilation
SHRINKAGES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.8)  # of the covariance behind the linear part
EVERYBODY = 2**32 - 1  # branch of the random numbers that belong to no member
STEPS_AN_EPOCH = 16  # at least, for sets so small that whole batches would leave too few updates
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
DUTY = 20  # times as long as a save of the state took, the next one waits; it is done in the background
BAD_STEPS_END = 5  # steps in a row with a loss or gradient that is not finite
FORMAT = 3  # of what a run leaves
PROGRAM = 3  # counted up when the same options and data would train otherwise than before: no state outlives that
SHOWN = 10  # rows of a table of the report; metrics.json has all


SWEEP = {  # the grid of --sweep: every combination
    "learning_rate": (3e-4, 1e-3),
    "weight_decay": (1e-2, 3e-1),
    "dropout": (0.3, 0.5),
    "width": (0.5, 1.0),  # of --width
    "label_smoothing": (0.0, 0.1),
    "mixup": (0.0, 0.4),
}


# --- options --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(check_data.ScanOptions):
    """Every option of the program: its default, type and help; the command line is built from it."""

    out: str | None = option(None, "folder for the results (runs/<name of DIR>)")
    predict: str | None = option(None, "label DIR, or a single file, with the model in this results folder")
    folds: str = option("5", f"number of folds, or {', '.join(emotions.SCHEMES)} or leave-one-speaker-out")
    seeds: int = option(5, "models for each fold; each validates on other speakers, and their logits are averaged")
    seed: int = option(0, "seed of everything that is random")
    epochs: int = option(40, "most epochs to train")
    patience: int = option(10, "epochs without a better validation loss after which a fold stops")
    batch: int = option(64, "most utterances in a batch; small sets get smaller ones, for 16 batches an epoch")
    pooling: str = option("attentive", "how frame sequences become vectors: attentive (mean and deviation) or mean")
    width: int = option(256, "units of the hidden layer")
    dropout: float = option(0.5, "share of hidden units dropped while training, in steps of 1/256")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW; a cosine takes it to zero")
    weight_decay: float = option(1e-2, "weight decay of AdamW")
    label_smoothing: float = option(0.1, "share of a label that is spread over all classes while training")
    mixup: float = option(0.0, "largest share of another utterance that is mixed in while training")
    clip: float = option(1.0, "largest global norm of the gradient")
    precision: str = option("float32", "of the matrix products: float32 or bfloat16; all else stays float32")
    sweep: bool = option(False, f"train {' x '.join(SWEEP)} settings and let validation choose for each fold")
    fresh: bool = option(False, "start over, though the results folder holds an unfinished run")
    no_compile_cache: bool = option(False, "do not keep the compiled program for the next run")
    recompute_stats: bool = option(False, "compute the statistics in DIR again")

    def __post_init__(self):
        super().__post_init__()
        for name in ("out", "predict", "folds"):
            require(getattr(self, name) != "", name, "more than an empty text")
        for name in ("seeds", "epochs", "patience", "batch", "width"):
            require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("learning_rate", "clip"):
            require(0 < getattr(self, name) < math.inf, name, "above 0")
        for name in ("dropout", "label_smoothing", "mixup"):
            require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        require(self.pooling in ("attentive", "mean"), "pooling", "attentive or mean")
        require(self.precision in ("float32", "bfloat16"), "precision", "float32 or bfloat16")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "at least 0")
        require(0 <= self.seed < 2**32, "seed", "from 0 to 4294967295")


def parse_config(arguments: list[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(
        description="Train an emotion classifier on a folder of NPZ features, or label one with a trained model."
    )
    check_data.add_options(parser, Config)
    return Config(**vars(parser.parse_args(arguments)))


# --- a run, from the folder to the report ---------------------------------------------------------------------------


def run_training(config: Config) -> int:
    run = Path(config.out or Path("runs") / (Path(config.directory).resolve().name or "data"))
    _refuse_foreign(run, check_data.require_folder(config.directory))
    with RunLog() as told:
        with Keeper(run, _process_number() == 0) as keeper:
            metrics = train_and_score(config, keeper, told)
        if metrics:
            sys.stdout.write(report_text(metrics, run, sys.stdout))
            with contextlib.suppress(OSError):  # on a full disk the report has been shown, and report.html has it
                told.target.stream.write(report_text(metrics, run, told.target.stream))
    return 0


def train_and_score(config: Config, keeper: "Keeper", told: "RunLog") -> dict:
    """All that a run does; its metrics, or nothing where another process tells them."""
    started, run = time.perf_counter(), keeper.run
    device = _start(config, keeper)
    scan = _scan(config, run)
    dataset = pack(scan, config.pooling)
    plan = make_plan(dataset, config)
    stored, new_place = _statistics(scan, dataset, run, config)
    unfinished = keeper.look(_identity(config, scan, dataset, plan, stored), config.fresh)
    if keeper.leads:
        told.begin(run / "train.log", append=unfinished is not None)
        if new_place:
            stats.save(new_place, stored.statistics, scan.fingerprint)
    _say_plan(plan, config.seeds)
    if unfinished:
        log.info(f"GOING ON from {unfinished} of the unfinished run in {check_data.printable(str(run))}")
    trained = train(dataset, plan, stored, config, keeper)
    metrics, probability = evaluate(dataset, plan, trained, stored.supplied, config)
    metrics |= {"left_out": scan.left_out(), "left_out_first": _first_of_each(scan.findings)}
    metrics |= {"device": device, "versions": _versions(), "settings": _settings(config)}
    metrics |= {"command": command_line(config), "seconds": round(time.perf_counter() - started, 1)}
    if not keeper.leads:
        return {}
    with keeper.finishing():
        save_run(run, scan, dataset, plan, trained, stored, metrics, probability, config)
    return metrics


class RunLog(logging.handlers.MemoryHandler):
    """What a run says, for train.log.

    It is held back until the data are found good: a run that cannot start must not replace the log of one that could.
    """

    def __init__(self):
        super().__init__(1 << 30, flushLevel=logging.CRITICAL, flushOnClose=False)

    def begin(self, path: Path, append: bool) -> None:
        """Write what was said so far, and from now on each line at once."""
        mode = "a" if append else "w"
        self.setTarget(logging.FileHandler(path, mode, encoding="utf-8", errors="backslashreplace"))
        self.flush()
        self.capacity = 0

    def __enter__(self) -> "RunLog":
        log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        log.removeHandler(self)
        if self.target:
            self.target.close()


def _start(config: Config, keeper: "Keeper") -> str:
    """Start jax, alone or as one of several processes; the device, in words."""
    device = start_jax()
    if (jax.process_index() == 0) != keeper.leads:
        raise check_data.UsageError("the environment names this process as one of several, and jax knows no others")
    if not keeper.leads:
        log.setLevel(logging.WARNING)
    log.info(f"device: {device}")
    if not config.no_compile_cache:
        keep_compiled()
    return device


def _scan(config: Config, run: Path) -> check_data.Scan:
    """Scan DIR as check_data.py does, and say the same of it."""
    told = ", ".join(f"{name} {value}" for name, value in _settings(config).items())
    log.info(f"settings: {check_data.printable(told)}")
    if not os.access(config.directory, os.W_OK):
        log.info(f"statistics: DIR is read-only, so they will be saved in {check_data.printable(str(run))}")
    scan = check_data.scan(config, keep_features=True, progress=_scan_progress())
    for line in (*check_data.findings_report(scan), *check_data.summary(scan)):
        log.info(line)
    for blocker in check_data.blockers(scan):
        raise check_data.UsageError(blocker)
    return scan


def _refuse_foreign(run: Path, directory: Path) -> None:
    """Keep results out of the data, and those of other data as they are."""
    name = check_data.printable(str(run))
    if run.resolve() == directory.resolve():
        raise check_data.UsageError(f"--out {name} is the folder of the features; choose another")
    try:
        data = json.loads(stats.read_bytes(run / "config.json"))["data"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if data != str(directory.resolve()):
        told = check_data.printable(str(data))
        raise check_data.UsageError(f"{name} holds the results for {told}; choose another --out, or remove them")


def _scan_progress() -> Callable[[int], None]:
    last = time.monotonic()

    def progress(files: int) -> None:
        nonlocal last
        if time.monotonic() - last > 2:
            last = time.monotonic()
            log.info(f"read {files} files")

    return progress


def _first_of_each(findings: list[check_data.Finding]) -> dict[str, dict]:
    """The first file that is left out for each code, and the reason."""
    return {finding.code: {"file": finding.file, "reason": finding.reason} for finding in reversed(findings)}


def _settings(config: Config) -> dict:
    """The options that say something."""
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if value is not None and value is not False and value != ()
    }


def command_line(config: Config) -> str:
    """The command that asks for these options, as a shell takes it."""
    words = []
    for field in dataclasses.fields(config)[1:]:
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [flag if one is True else f"{flag}={one}" for one in values]
    dashed = config.directory.startswith("-")
    return shlex.join(["python", "train.py", *words, *["--"] * dashed, config.directory])


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    return {"python": platform.python_version()} | packages


# --- the data -------------------------------------------------------------------------------------------------------


class Frames(NamedTuple):
    """Frame sequences one after the other.

    `rows` is float32, shape (F + longest, D), less `centre`, (D,), so that sums of squares keep their digits. Zeros
    follow the last sequence, so that a slice as long as the longest never leaves the block. `first` is the first
    frame of each utterance, shape (N,).
    """

    rows: np.ndarray
    centre: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, sequences: list[np.ndarray], centre: np.ndarray) -> "Frames":
        """Pack sequences of shape (T, D); the list is emptied, so that hardly more than the result is in memory."""
        length = np.array([len(sequence) for sequence in sequences])
        first = np.cumsum(length) - length
        rows = _aligned_zeros((int(length.sum() + length.max()), len(centre)))
        for place in range(len(sequences) - 1, -1, -1):
            np.subtract(sequences.pop(), centre, out=rows[first[place] :][: length[place]])
        return cls(rows, centre, first)


def _aligned_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros where the devices of a CPU can use them in place; from any other address each would copy them."""
    block = np.zeros(math.prod(shape) + 16, np.float32)
    start = -block.ctypes.data % 64 // block.itemsize
    return block[start : start + math.prod(shape)].reshape(shape)


class Dataset(NamedTuple):
    """All usable utterances, sorted by file name.

    `x` is the mean over the frames of each, float32, shape (N, D); `length` the number of frames; `label` indexes
    `classes`; `moments` are those of the frames of each utterance, stacked along N; `frames` is None where every
    utterance is a single vector.
    """

    x: np.ndarray
    length: np.ndarray
    label: np.ndarray
    classes: tuple[str, ...]
    utterances: list[emotions.Utterance]
    moments: stats.Moments
    frames: Frames | None = None


def pack(scan: check_data.Scan, pooling: str = "attentive") -> Dataset:
    """Turn a scan that kept its features into one block; the scan's own arrays are given up on the way.

    With mean pooling an utterance is the mean of its frames, and the frames are not kept.
    """
    classes = tuple(scan.count("emotion"))
    label = np.array([classes.index(record.utterance.emotion) for record in scan.records], np.int32)
    sequences, scan.features = scan.features, []
    length = np.array([len(sequence) for sequence in sequences])
    moments = stats.Moments.stack([stats.Moments.of(sequence) for sequence in sequences])
    frames = None
    if pooling != "mean" and length.max() > 1:
        frames = Frames.of(sequences, moments.merged().mean.astype(np.float32))
    length = length if frames else np.ones_like(length)
    utterances = [record.utterance for record in scan.records]
    return Dataset(moments.mean.astype(np.float32), length, label, classes, utterances, moments, frames)


# --- the folds: who trains, validates and tests whom ----------------------------------------------------------------


class Plan(NamedTuple):
    """Who trains, validates and tests whom.

    `fold` is the fold in which each utterance is tested, shape (N,); `train` and `validation` are bool masks of
    shape (P, N): S rows for each fold, then S rows of the final model, which tests nobody.
    """

    scheme: str
    fold: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    speaker: np.ndarray
    independent: bool
    notes: list[str]

    @property
    def folds(self) -> int:
        return int(self.fold.max()) + 1


def make_plan(dataset: Dataset, config: Config) -> Plan:
    """Split by speaker: test folds outside, and inside each of them a rotation of validation speakers over the seeds.

    Every seed of a fold leaves out another block of its speakers for validation, so that together they train on all
    of them, and their mean validation loss speaks for all of them too.

    Raises
    ------
    check_data.UsageError
        If the folds that were asked for cannot be made from these speakers.
    """
    speaker, independent, notes = _speakers(dataset.utterances)
    if not config.folds.isdecimal() and not independent and len(set(speaker)) == len(speaker):
        raise check_data.UsageError(f"--folds {config.folds} needs names that tell their speakers; use --folds 5")
    fold, more = _test_folds(config.folds, speaker, dataset.label, config.seed)
    notes = notes + more
    folds = int(fold.max()) + 1
    if folds < 2:
        raise check_data.UsageError(f"--folds {config.folds} leaves one fold; at least two are needed")
    scheme = emotions.SCHEMES.get(config.folds)
    train, validation = [], []
    for current in range(folds + 1):  # the last one is the final model
        rest = fold != current
        if scheme and scheme.next_fold_validates and current < folds:
            held_out = [rest & (fold == (current + 1) % folds)] * config.seeds
        else:
            held_out, note = _rotation(rest, speaker, dataset.label, config)
            notes = notes + [note] * (note is not None and note not in notes)
        train += [rest & ~held for held in held_out]
        validation += held_out
    plan = Plan(config.folds, fold, np.array(train), np.array(validation), speaker, independent, notes)
    for side in (plan.train, plan.validation):
        empty = np.flatnonzero(~side.any(1))
        if empty.size:
            where = _member_name(int(empty[0]), folds, config.seeds)
            raise check_data.UsageError(
                f"--folds {config.folds} leaves nobody to train on or to validate with (fold {where}); add speakers"
            )
    check_disjoint(plan)
    return plan._replace(notes=notes + _missing_classes(dataset, plan, config.seeds))


def _speakers(utterances: list[emotions.Utterance]) -> tuple[np.ndarray, bool, list[str]]:
    """Name the speaker of each utterance; where the names tell fewer than two, every file stands for itself."""
    names = [utterance.speaker or f"{utterance.corpus}:unknown" for utterance in utterances]
    unknown = sum(utterance.speaker is None for utterance in utterances)
    known = len({utterance.speaker for utterance in utterances} - {None})
    if known >= 2:
        kept = (
            f"{unknown} files do not tell their speaker, who may be one of the known: NOT speaker-independent for them"
        )
        return np.array(names), not unknown, [kept] * bool(unknown)
    told = f"only one speaker ({names[0]})" if known else "no speaker"
    note = f"the names tell {told}: files are split at random; the figure is NOT speaker-independent and too good"
    return np.array([utterance.file for utterance in utterances]), False, [note]


def _test_folds(scheme: str, speaker: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, list[str]]:
    """Number the fold in which each utterance is tested, shape (N,)."""
    present = np.unique(speaker)
    if scheme in emotions.SCHEMES:
        blocks = emotions.SCHEMES[scheme].test_speakers
        fold_of = {name: fold for fold, block in enumerate(blocks) for name in block}
        strange = [name for name in present if name not in fold_of]
        if strange:
            names = check_data.printable(", ".join(strange[:5]))
            raise check_data.UsageError(
                f"--folds {scheme} knows no speaker {names}; use --folds 5, or take those files away"
            )
        missing = len(fold_of) - len(present)
        notes = (
            [f"{missing} speakers of {scheme} are not here: the figure is not comparable with others'"]
            if missing
            else []
        )
        return _numbered([fold_of[name] for name in speaker]), notes
    if scheme == "leave-one-speaker-out":
        return _numbered(speaker), []
    if not scheme.isdecimal() or int(scheme) < 2:
        known = ", ".join([*emotions.SCHEMES, "leave-one-speaker-out"])
        raise check_data.UsageError(f"--folds {scheme!r} is neither a number from 2 on nor one of {known}")
    folds = min(int(scheme), len(present))
    notes = [f"{len(present)} speakers allow {folds} folds, not {scheme}"] if folds < int(scheme) else []
    return balanced_blocks(_numbered(speaker), label, folds, seed), notes


def balanced_blocks(group: np.ndarray, label: np.ndarray, blocks: int, seed: int) -> np.ndarray:
    """Deal groups into blocks so that every block gets its share of every class.

    Parameters
    ----------
    group, label
        Group and class of each utterance, shape (N,), counted from 0.

    Returns
    -------
    numpy.ndarray
        The block of each utterance, shape (N,); the utterances of a group are in one block. No block is empty while
        there are as many groups.
    """
    counts = np.zeros((group.max() + 1, label.max() + 1))
    np.add.at(counts, (group, label), 1)
    counts /= np.maximum(counts.sum(0), 1)  # (G, C): rare classes count as much as common ones
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]  # the large groups first, while there is room
    load, block_of = np.zeros((blocks, counts.shape[1])), np.zeros(len(counts), int)
    for member in order:
        crowding = load @ counts[member]  # growth of the summed squared load, but for a constant
        block = np.lexsort((load.sum(1), crowding))[0]
        block_of[member], load[block] = block, load[block] + counts[member]
    return block_of[group]


def _rotation(
    rest: np.ndarray, speaker: np.ndarray, label: np.ndarray, config: Config
) -> tuple[list[np.ndarray], str | None]:
    """Validation masks for the seeds of one fold, whose training and validation utterances are `rest`."""
    group, note = _numbered(speaker[rest]), None
    if group.max() == 0:
        group, note = (
            np.arange(len(group)),
            "one speaker is left to train on: validation takes a part of the same speaker",
        )
    blocks = min(max(config.seeds, 5), group.max() + 1)
    block = np.full(len(rest), -1)
    block[rest] = balanced_blocks(group, label[rest], blocks, config.seed)
    return [block == seed % blocks for seed in range(config.seeds)], note


def _numbered(names: list[str]) -> np.ndarray:
    return np.unique(names, return_inverse=True)[1].reshape(-1)


def _missing_classes(dataset: Dataset, plan: Plan, seeds: int) -> list[str]:
    """Say where a class is tested by models that never trained on it."""
    notes = []
    for fold in range(plan.folds):
        trained = plan.train[fold * seeds : (fold + 1) * seeds].any(0)
        never = set(dataset.label[plan.fold == fold]) - set(dataset.label[trained])
        if never:
            names = ", ".join(dataset.classes[label] for label in sorted(never))
            notes.append(f"fold {fold + 1} tests {names} without having trained on it: too few speakers have it")
    return notes


def check_disjoint(plan: Plan) -> bool:
    """Make sure that no utterance and, but for single speakers, no speaker is on two sides of any split.

    Returns
    -------
    bool
        False where one speaker had to be shared by training and validation.

    Raises
    ------
    RuntimeError
        If one is: that would be a fault of this program, and no figure may come of it.
    """
    seeds, shared = len(plan.train) // (plan.folds + 1), False
    for member, (train, validation) in enumerate(zip(plan.train, plan.validation)):
        test = plan.fold == member // seeds
        sides = [set(plan.speaker[side]) for side in (train, validation, test)]
        lonely = len(sides[0] | sides[1]) == 1
        if (train & validation).any() or ((train | validation) & test).any() or not train.any() or not validation.any():
            raise RuntimeError(f"member {member}: an utterance is on two sides of the split, or a side is empty")
        if sides[2] & (sides[0] | sides[1]) or (sides[0] & sides[1] and not lonely):
            raise RuntimeError(f"member {member}: a speaker is on two sides of the split")
        shared = shared or bool(sides[0] & sides[1])
    return not shared


def _names(plan: Plan, mask: np.ndarray) -> list[str]:
    return np.unique(plan.speaker[mask]).tolist()


def _say_plan(plan: Plan, seeds: int) -> None:
    log.info(f"folds: {plan.scheme}, {plan.folds} of them and the final model, {seeds} seeds each")
    if plan.independent:
        for fold in range(plan.folds):
            tested = _names(plan, plan.fold == fold)
            shown = " ".join(tested[:6]) + f" ... ({len(tested)})" * (len(tested) > 6)
            log.info(f"  fold {fold + 1} tests {check_data.printable(shown)}")
        if check_disjoint(plan):
            log.info("  no speaker is in more than one of training, validation and test: checked")
    for note in plan.notes:
        log.info(f"note: {note}")


# --- the statistics and the class weights of each model -------------------------------------------------------------


def _statistics(scan: check_data.Scan, dataset: Dataset, run: Path, config: Config) -> tuple[stats.Stored, Path | None]:
    """The statistics in DIR, or new ones over all data, and where to save those for future use."""
    stored, place = scan.stored, None
    if stored and stored.supplied:
        if config.recompute_stats:
            raise check_data.UsageError(f"{stats.MEAN_FILE} and {stats.STD_FILE} in DIR are yours: move them away")
        log.info(f"statistics: yours, from {stats.MEAN_FILE} and {stats.STD_FILE} in DIR; they apply everywhere")
    elif stored and not config.recompute_stats and not scan.statistics_are_stale:
        log.info("statistics: the final model has those saved in DIR, every fold those of its own training speakers")
    else:
        stale = scan.statistics_are_stale and not config.recompute_stats
        stored = stats.Stored(dataset.moments.merged().statistics(), False, scan.fingerprint)
        if stale:
            log.info("statistics: THOSE IN DIR WERE COMPUTED FOR OTHER FILES AND ARE NOT USED;")
            log.info("            --recompute-stats renews them there, this run saves its own with its results")
        else:
            place = scan.directory if os.access(scan.directory, os.W_OK) else run
            log.info(f"statistics: computed and saved in {check_data.printable(str(place))} for the final model;")
            log.info("            every fold has those of its own training speakers")
    constant = np.flatnonzero(stored.statistics.constant())
    if constant.size:
        named = ", ".join(map(str, constant[:10])) + " ..." * (constant.size > 10)
        log.info(f"statistics: {constant.size} dimensions do not vary and are not scaled: {named}")
    return stored, place


def member_statistics(dataset: Dataset, plan: Plan, stored: stats.Stored) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale for each member, shape (P, D).

    The user's own apply everywhere; ours come from a member's training speakers alone, and the stored pair, which
    saw all data, serves the final model only.
    """
    pairs = [stored.statistics] * len(plan.train)
    seeds = len(plan.train) // (plan.folds + 1)
    if not stored.supplied:
        own = {}  # members of one fold may share their training speakers
        for member in range(plan.folds * seeds):
            key = plan.train[member].tobytes()
            own[key] = own.get(key) or dataset.moments.merged(plan.train[member]).statistics()
            pairs[member] = own[key]
    return np.stack([pair.mean for pair in pairs]), np.stack([pair.scale() for pair in pairs])


def class_weights(label: np.ndarray, train: np.ndarray, classes: int) -> np.ndarray:
    """Weights that make every class count alike, shape (P, C); a class that is not trained on weighs nothing."""
    counts = np.stack([np.bincount(label[mask], minlength=classes) for mask in train])
    share = counts.sum(1, keepdims=True) / np.maximum(counts, 1) / (counts > 0).sum(1, keepdims=True)
    return np.where(counts > 0, share, 0).astype(np.float32)


# --- the model ------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """The utterances on the device, the same on each; see Dataset and Frames. Vectors have no rows."""

    x: Any  # (N, D)
    label: Any  # (N,)
    everything: Any  # (B, steps), a table that holds each utterance once
    length: Any  # (N,)
    first: Any  # (N,)
    rows: Any  # (F + longest, D)
    centre: Any  # (D,), which they are without


class Setting(NamedTuple):
    """What --sweep varies: numbers of the members, not of the program, so that all settings share one compilation."""

    learning_rate: Any
    weight_decay: Any
    dropout: Any
    width: Any  # hidden units in use
    label_smoothing: Any
    mixup: Any

    @classmethod
    def of(cls, config: Config) -> "Setting":
        return cls(*(getattr(config, name) for name in cls._fields))

    @classmethod
    def stack(cls, settings: list["Setting"]) -> "Setting":
        return cls(*(np.array(values, np.float32) for values in zip(*settings)))


class Member(NamedTuple):
    """What one model of the population trains on; stacked along P for the program.

    `train` and `validation` of vectors are tables of utterances with a column for each batch, and -1 for padding.
    Sequences are bound by the memory that their frames move. All members walk through one table of them, so that a
    batch is read once for all, and each counts its own: its `train` and `validation` are masks of shape (N,).
    """

    number: Any  # () its own branch of the random numbers
    fold: Any  # () -1 for those that only fill up the devices
    train: Any
    validation: Any
    mean: Any  # (D,)
    scale: Any  # (D,)
    class_weight: Any  # (C,)
    setting: Setting


class State(NamedTuple):
    """What training changes; stacked along P. `best` are the parameters of the best epoch so far."""

    params: Any
    optimizer: Any  # optax's own state
    best: Any
    best_loss: Any  # () mean validation loss of the fold
    best_epoch: Any  # ()
    active: Any  # () bool: still training
    skipped: Any  # () steps that were not finite and changed nothing
    bad_run: Any  # () how many of them came in a row, until now
    worst_run: Any  # () and at most


class Task(NamedTuple):
    """What is fixed for a run and known while the program is compiled."""

    config: Config
    network: Any
    classes: int
    groups: tuple[tuple[int, int], ...]  # of a batch of sequences: rows, and frames that each has room for
    steps: int  # batches in an epoch
    mix: Callable  # mix, or unmixed where no setting wants it
    each: Callable  # jax.vmap, or one_by_one


class Bag(NamedTuple):
    """The frame sequences of one group of a batch, side by side."""

    frames: Any  # (B, T, D)
    centre: Any  # (D,), which they are without
    real: Any  # (B, T) bool


def build_network(width: int, classes: int, precision: str) -> Any:
    """The flax classifier: from normalised features (B, D) to logits (B, C), and the hidden layer before them (B, W).

    `gate` (B, W) multiplies the hidden units: dropout while training, and the units in use. Products are computed in
    `precision`; parameters and what comes out are float32.
    """

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x, gate):
            hidden = nn.relu(nn.Dense(width, dtype=precision)(x)) * gate
            return nn.Dense(classes, dtype=precision)(hidden).astype(jnp.float32), hidden.astype(jnp.float32)

    return Classifier()


def attentive_statistics(bag: Bag, member: Member, query: Any) -> Any:
    """Weighted mean and deviation over the normalised frames of each utterance, (B, 2 D).

    The weights are a softmax over frames of their product with `query`, (D,), as in Okabe, Koshinaka and Shinoda 2018
    with a linear score; a query of zeros makes them all alike. Padding, which has no frames, stays finite. Frames are
    never normalised one by one: the step is bound by the memory that they move.
    """
    score = bag.frames @ (query / member.scale)  # (B, T)
    peak = jnp.where(bag.real, score, -jnp.inf).max(1, keepdims=True)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0))
    # Chosen before and after exp: what overflows in the padding would be a NaN in the gradient.
    weight = jnp.where(bag.real, jnp.exp(jnp.where(bag.real, score - peak, 0)), 0)
    total = weight.sum(1, keepdims=True)
    weight = weight / jnp.where(total > 0, total, 1)
    mean = jnp.einsum("bt,btd->bd", weight, bag.frames)
    square = jnp.einsum("bt,btd->bd", weight, jnp.square(bag.frames))
    deviation = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 1e-6 * jnp.square(member.scale)))
    return jnp.concatenate([(mean + (bag.centre - member.mean)) / member.scale, deviation / member.scale], -1)


def fetch(task: Task, data: Data, chosen: Any) -> Any:
    """Gather a batch of utterances, (B,): vectors (B, D), or a Bag for each group of sequences."""
    if not task.groups:
        return data.x[chosen]
    bags, row = [], 0
    for rows, longest in task.groups:
        own, row = chosen[row : row + rows], row + rows
        slices = jax.vmap(lambda first, longest=longest: jax.lax.dynamic_slice_in_dim(data.rows, first, longest))
        real = (own >= 0)[:, None] & (jnp.arange(longest) < data.length[own][:, None])
        bags.append(Bag(slices(data.first[own]), data.centre, real))
    return bags


def pool(params: Any, member: Member, batch: Any) -> Any:
    """One vector for each utterance of a batch, normalised: (B, D), or (B, 2 D) for sequences."""
    if isinstance(batch, list):
        return jnp.concatenate([attentive_statistics(bag, member, params["query"]) for bag in batch])
    return (batch - member.mean) / member.scale


def units(task: Task, setting: Setting) -> Any:
    """1 for the hidden units in use, 0 for the others, (W,)."""
    return jnp.where(jnp.arange(task.config.width) < setting.width, 1.0, 0.0)


def dropout_gate(task: Task, setting: Setting, key: Any, batch: int) -> Any:
    """Which hidden units count, and how much, (B, W); one random byte for each: words took as long as a product."""
    width = task.config.width
    words = jax.random.bits(key, (batch, -(-width // 4)))
    byte = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(batch, -1)[:, :width]
    dropped = jnp.minimum(jnp.round(setting.dropout * 256), 255)
    return jnp.where(byte >= dropped, 256 / (256 - dropped), 0) * units(task, setting)


def init_population(task: Task, seed: int, members: Member) -> State:
    """First state of the members, with LeCun's variance; on the host: random numbers take the compiler long."""
    numbers = members.number.tolist()
    randoms = [np.random.default_rng([seed, number]) for number in numbers]

    def zeros(*shape):
        return np.zeros((len(numbers), *shape), np.float32)

    def dense(inputs, outputs, used):
        kernel = zeros(inputs, outputs)
        for random, own in zip(randoms, kernel):
            random.standard_normal(out=own, dtype=np.float32)
        kernel /= np.sqrt(np.broadcast_to(used, len(numbers)).astype(np.float32))[:, None, None]
        return {"kernel": kernel, "bias": zeros(outputs)}

    dim = members.mean.shape[1]
    pooled, width = dim * (2 if task.groups else 1), task.config.width
    params = {"Dense_0": dense(pooled, width, pooled), "Dense_1": dense(width, task.classes, members.setting.width)}
    if task.groups:
        params["query"] = zeros(dim)
    first = jax.tree.map(lambda leaf: leaf[0], params)
    shapes = jax.eval_shape(build_optimizer(task.config, Setting(*[0.0] * len(Setting._fields)), 0.0).init, first)
    memory = jax.tree.map(lambda leaf: np.zeros((len(numbers), *leaf.shape), leaf.dtype), shapes)
    count = np.zeros(len(numbers), np.int32)
    return State(params, memory, params, zeros() + np.inf, count, members.fold >= 0, count, count, count)


# --- training one model: a step, an epoch, its validation -----------------------------------------------------------


def cross_entropy(logits: Any, target: Any, weight: Any) -> Any:
    """Mean of the weighted cross-entropy; logits and target (B, C), weight (B,), 0 for padding."""
    loss = optax.softmax_cross_entropy(logits, target)
    return jnp.where(weight > 0, loss * weight, 0).sum() / jnp.maximum(weight.sum(), 1e-6)


def mix(setting: Setting, key: Any, weight: Any, *arrays: Any) -> tuple:
    """Blend every row of a batch with a random part of the row at the other end; padding is never mixed in."""
    share = setting.mixup * jax.random.uniform(key, (len(weight), 1))
    share = jnp.where(((weight > 0) & (weight[::-1] > 0))[:, None], share, 0)
    return tuple(array + share * (array[::-1] - array) for array in arrays)


def unmixed(setting: Setting, key: Any, weight: Any, *arrays: Any) -> tuple:
    return arrays


def member_step(task: Task, member: Member, state: State, batch: tuple, key: Any, progress: Any) -> tuple[State, Any]:
    """One update of one member; a step whose loss or gradient is not finite changes nothing but the counters.

    `batch` is the features, label (B,) and weight (B,); `progress` goes from 0 to 1 over the whole training.
    """
    x, label, weight = batch
    gate_key, mix_key = jax.random.split(key)
    gate = dropout_gate(task, member.setting, gate_key, len(label))
    smoothed = optax.smooth_labels(jax.nn.one_hot(label, task.classes), member.setting.label_smoothing)

    def loss_of(params):
        mixed, target = task.mix(member.setting, mix_key, weight, pool(params, member, x), smoothed)
        logits, _ = task.network.apply({"params": params}, mixed, gate)
        return cross_entropy(logits, target, weight)

    loss, gradient = jax.value_and_grad(loss_of)(state.params)
    norm = optax.tree.norm(gradient)
    # Before the clip: it would turn one NaN into all-NaN parameters, and an overflowed norm into a silent zero step.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    working = state.active & (weight.sum() > 0)
    bad_run = jnp.where(working, jnp.where(finite, 0, state.bad_run + 1), state.bad_run)
    optimizer = build_optimizer(task.config, member.setting, progress)

    def update(params, memory):
        updates, memory = optimizer.update(gradient, memory, params)
        return optax.apply_updates(params, updates), memory

    def keep(params, memory):
        return params, memory

    params, memory = jax.lax.cond(working & finite, update, keep, state.params, state.optimizer)
    state = state._replace(
        params=params,
        optimizer=memory,
        skipped=state.skipped + (working & ~finite),
        bad_run=bad_run,
        worst_run=jnp.maximum(state.worst_run, bad_run),
    )
    return state, jnp.where(working, jnp.stack([jnp.ones_like(loss), loss, norm]), 0)


def build_optimizer(config: Config, setting: Setting, progress: Any) -> Any:
    """Clipped AdamW (Loshchilov and Hutter 2019) for one step of one member, at its place in a cosine schedule.

    It is built inside the traced step, from the member's own traced numbers; its state does not depend on them.
    """
    rate = setting.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adamw(rate, weight_decay=setting.weight_decay))


def _where(condition: Any, new: Any, old: Any) -> Any:
    """Choose between two trees; `condition` has the leading axes of every leaf."""
    return jax.tree.map(lambda a, b: jnp.where(_stretched(condition, a), a, b), new, old)


def _stretched(values: Any, leaf: Any) -> Any:
    """Give `values`, which have the leading axes of a leaf, as many axes as it has."""
    return values.reshape(values.shape + (1,) * (leaf.ndim - values.ndim))


def member_epoch(task: Task, root: Any, data: Data, epoch: Any, member: Member, state: State) -> tuple[State, dict]:
    """One epoch of one member over its training utterances in a fresh random order, then its validation.

    The order is random within each stratum: every batch has one utterance of each, so that all are about as full. A
    member with more utterances than an epoch has room for leaves out others each time.
    """
    key = jax.random.fold_in(jax.random.fold_in(root, member.number), epoch)
    table, order_key = member.train, key
    if task.groups:
        table, order_key = data.everything, jax.random.fold_in(jax.random.fold_in(root, EVERYBODY), epoch)
    order = jnp.argsort(jax.random.uniform(order_key, table.shape) + jnp.where(table < 0, 2.0, 0.0), 1)
    steps = task.steps
    batches = jnp.take_along_axis(table, order[:, :steps], 1).T  # (steps, B)

    def step(state, numbered):
        number, chosen = numbered
        label = data.label[chosen]
        weight = jnp.where(counted(task, member.train, chosen), member.class_weight[label], 0)
        batch = (fetch(task, data, chosen), label, weight)
        progress = (epoch + number / steps) / task.config.epochs
        return member_step(task, member, state, batch, jax.random.fold_in(key, number), progress)

    state, measured = jax.lax.scan(step, state, (jnp.arange(steps), batches))
    worked, loss, norm = measured.sum(0)
    loss, norm = loss / jnp.maximum(worked, 1), norm / jnp.maximum(worked, 1)
    validation_loss, validation_ua = validate(task, data, member, state.params)
    return state, {
        "loss": loss,
        "gradient_norm": norm,
        "validation_loss": validation_loss,
        "validation_ua": validation_ua,
    }


def counted(task: Task, part: Any, chosen: Any) -> Any:
    """Which utterances of a batch, (B,), are of a part of a member: all of its own table, some of everybody's."""
    return (chosen >= 0) & part[chosen] if task.groups else chosen >= 0


def answer_of(task: Task, data: Data, member: Member, params: Any, chosen: Any) -> tuple[Any, Any]:
    """Logits (B, C) and hidden layer (B, W) of one member for a batch of utterances, without dropout."""
    pooled = pool(params, member, fetch(task, data, chosen))
    return task.network.apply({"params": params}, pooled, units(task, member.setting))


def validate(task: Task, data: Data, member: Member, params: Any) -> tuple[Any, Any]:
    """Class-balanced cross-entropy and UA of one member on its validation utterances."""

    def add(total, chosen):
        own = counted(task, member.validation, chosen)
        label = jnp.where(own, data.label[chosen], -1)
        true = jax.nn.one_hot(label, task.classes)  # (B, C), zeros for padding
        logits, _ = answer_of(task, data, member, params, chosen)
        loss = jnp.where(own, optax.softmax_cross_entropy(logits, true), 0)
        right = jnp.where(logits.argmax(-1) == label, 1.0, 0.0)
        return total + jnp.stack([true.sum(0), loss @ true, right @ true]), None

    table = data.everything if task.groups else member.validation
    count, loss, right = jax.lax.scan(add, jnp.zeros((3, task.classes)), table.T)[0]
    present = (count > 0).sum()
    return (loss / jnp.maximum(count, 1)).sum() / present, (right / jnp.maximum(count, 1)).sum() / present


# --- training the population ----------------------------------------------------------------------------------------


def keep_best(task: Task, members: Member, state: State, validation_loss: Any, epoch: Any) -> State:
    """Keep the parameters of the best epoch and stop the folds that no longer improve.

    The seeds of a fold decide together, by their mean validation loss: each alone hears only a few speakers.
    """
    together = members.fold[:, None] == members.fold
    fold_loss = jnp.where(together, validation_loss, 0).sum(1) / together.sum(1)  # (P,)
    better = state.active & (fold_loss < state.best_loss)
    best_epoch = jnp.where(better, epoch, state.best_epoch)
    return state._replace(
        best=_where(better, state.params, state.best),
        best_loss=jnp.where(better, fold_loss, state.best_loss),
        best_epoch=best_epoch,
        active=state.active & (epoch - best_epoch < task.config.patience) & (epoch + 1 < task.config.epochs),
    )


def population_epochs(
    task: Task, mesh: Any, seed: Any, data: Data, members: Member, state: State, first: Any
) -> tuple[State, dict]:
    """Several epochs of the whole population; the measures have shape (epochs, P), and `active` before each epoch."""

    def frozen(member, state):
        return state, dict.fromkeys(("loss", "gradient_norm", "validation_loss", "validation_ua"), jnp.float32(0))

    def run(data, epoch, members, state):
        trained = functools.partial(member_epoch, task, jax.random.key(seed), data, epoch)

        def unless_frozen(member, state):  # vmap would run both, and copy the data for each member
            return jax.lax.cond(state.active, trained, frozen, member, state)

        return task.each(unless_frozen if task.each is one_by_one else trained)(members, state)

    def one_epoch(state, epoch):
        active = state.active
        state, measures = over_population(mesh, run, 2)(data, epoch, members, state)
        state = keep_best(task, members, state, measures["validation_loss"], epoch)
        return state, measures | {"active": active, "skipped": state.skipped}

    return jax.lax.scan(one_epoch, state, first + jnp.arange(EPOCHS_A_CALL))


def all_logits(task: Task, data: Data, members: Member, params: Any) -> Any:
    """Logits of every member for every utterance, (P, steps, B, C), as they lie in the table of everything."""

    def of_one(member, params):
        return jax.lax.map(lambda chosen: answer_of(task, data, member, params, chosen)[0], data.everything.T)

    return task.each(of_one)(members, params)


def own_hidden(task: Task, data: Data, tables: Any, members: Member, params: Any) -> Any:
    """Hidden layers of every member for its own table of utterances, (P, B, steps): (P, steps, B, W)."""

    def of_one(table, member, params):
        return jax.lax.map(lambda chosen: answer_of(task, data, member, params, chosen)[1], table.T)

    return one_by_one(of_one)(tables, members, params)


def one_by_one(function: Callable) -> Callable:
    """As jax.vmap, but one member after the other: on a CPU its parameters then stay in the cache."""
    return lambda *stacked: jax.lax.map(lambda own: function(*own), stacked)


def population_mesh(members: int) -> Any:
    """The devices that share the population: as many as are busy with equal shares."""
    devices = jax.devices()
    share = -(-members // len(devices))
    busy = len(devices) if jax.process_count() > 1 else -(-members // share)
    return jax.sharding.Mesh(np.array(devices[:busy]), ("population",))


def over_population(mesh: Any, function: Callable, stacked: int) -> Callable:
    """Run a function whose last `stacked` arguments have the population axis, each device on its own members."""

    def call(*arguments):
        everywhere, own = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("population")
        specs = tuple([everywhere] * (len(arguments) - stacked) + [own] * stacked)
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)(*arguments)

    return call


def place(mesh: Any, tree: Any, axis: str | None = None) -> Any:
    """Put arrays on the devices: all on each, or their first axis shared among them."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis))
    if axis and jax.process_count() > 1:  # device_put would gather from all hosts what each has, to compare it
        return jax.tree.map(
            lambda leaf: jax.make_array_from_callback(np.shape(leaf), sharding, np.asarray(leaf).__getitem__), tree
        )
    return jax.device_put(tree, sharding)


def fetched(tree: Any) -> Any:
    """Arrays of all devices and hosts, as numpy."""
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


# --- the linear part ------------------------------------------------------------------------------------------------


def linear_parts(task: Task, data: Data, used: Any, wanted: Any, members: Member) -> tuple[Any, Any]:
    """Linear discriminant analysis of every member for each of the shrinkages, solved in closed form.

    It works on the mean over frames, normalised; classes count alike. The covariance within the classes is shrunk
    towards a multiple of the identity. Beside the hidden layer it gives what gradient descent finds slowly in
    hundreds of correlated features, and its errors are others.

    Parameters
    ----------
    used
        The utterances that each member is fitted to, shape (P, N).
    wanted
        The shrinkages that it is solved for, shape (P, shrinkages); the others get zeros.

    Returns
    -------
    kernel, bias
        Shapes (P, shrinkages, D, C) and (P, shrinkages, C).
    """

    def of_one(used, wanted, member):
        x = (data.x - member.mean) / member.scale
        true = jax.nn.one_hot(data.label, task.classes) * used[:, None]  # (N, C)
        count = true.sum(0)
        centre = (true.T @ x) / jnp.maximum(count, 1)[:, None]  # (C, D)
        rest = jnp.where(used[:, None], x - true @ centre, 0)
        spread = jnp.maximum(jnp.sqrt(jnp.square(rest).sum(0) / used.sum()), 0.03)  # (D,), of about 1
        rest, centre = rest / spread, centre / spread
        covariance = rest.T @ rest / used.sum()
        identity = jnp.eye(len(spread))

        def solve(shrinkage):
            shrunk = (1 - shrinkage) * covariance + shrinkage * jnp.trace(covariance) / len(spread) * identity
            kernel = jax.scipy.linalg.solve(shrunk, centre.T, assume_a="pos")
            bias = -0.5 * (centre * kernel.T).sum(1)
            # A class that was not trained on gets the mean of the others, less a bit: it never beats the best of them.
            seen = (count > 0) / (count > 0).sum()
            kernel = jnp.where(count > 0, kernel, (kernel @ seen)[:, None])
            bias = jnp.where(count > 0, bias, bias @ seen + jnp.log(1e-6))
            return kernel / spread[:, None], bias

        nothing = jnp.zeros((len(spread), task.classes)), jnp.zeros(task.classes)
        return jax.lax.map(
            lambda case: jax.lax.cond(case[1], solve, lambda _: nothing, case[0]), (jnp.array(SHRINKAGES), wanted)
        )

    return one_by_one(of_one)(used, wanted, members)


def add_linear(
    dataset: Dataset, plan: Plan, members: Member, params: dict, logits: np.ndarray, solve: Callable
) -> tuple[dict, np.ndarray, list[dict]]:
    """Put the linear parts beside the hidden layers, both with their weights in them.

    `solve` is linear_parts of all members. Each gets the mean of two: fitted to its training speakers, by which the
    validation speakers choose, and to both. Where speakers are few a model cannot do without those who chose; and
    the first, which differ between the seeds, are the better for their mean.

    Returns
    -------
    tuple
        The parameters, the logits, shape (P, N, C), and for each fold what was chosen.
    """
    size = len(logits)
    seeds, every = size // (plan.folds + 1), np.arange(size)
    kernel, bias = solve(plan.train, np.ones((size, len(SHRINKAGES)), bool))
    blends = []
    for fold in range(plan.folds + 1):
        own = range(fold * seeds, (fold + 1) * seeds)
        parts = np.stack([linear_logits(dataset.x, members.mean[m], members.scale[m], kernel[m], bias[m]) for m in own])
        heard = [np.flatnonzero(plan.validation[member]) for member in own]
        blends.append(stats.choose_blend(logits[own.start : own.stop], parts, heard, dataset.label))
    chosen, hidden, weight, temperature = (np.repeat(values, seeds) for values in zip(*blends))
    hidden, weight = hidden / temperature, weight / temperature
    if jax.process_count() > 1:  # two settings may be so near that hosts would choose differently
        chosen = _from_first(chosen)
    of_both = solve(plan.train | plan.validation, np.arange(len(SHRINKAGES)) == chosen[:, None])
    kernel, bias = (
        np.float32(_stretched(weight, one[:, 0]) * (one[every, chosen] + other[every, chosen]) / 2)
        for one, other in zip((kernel, bias), of_both)
    )
    scaled = {
        "Dense_1": jax.tree.map(lambda leaf: leaf * _stretched(hidden, leaf), params["Dense_1"]),
        "linear": {"kernel": kernel, "bias": bias},
    }
    sums = [
        hidden[m] * logits[m] + linear_logits(dataset.x, members.mean[m], members.scale[m], kernel[m], bias[m])
        for m in every
    ]
    told = [blend._asdict() | {"shrinkage": SHRINKAGES[blend.shrinkage]} for blend in blends]
    return params | jax.tree.map(np.float32, scaled), np.stack(sums), told


def linear_solver(task: Task, mesh: Any, data: Data, members: Member, size: int) -> Callable:
    """linear_parts for the first `size` members, on the host; what varies too little to be solved is 0."""
    program = jax.jit(over_population(mesh, functools.partial(linear_parts, task), 3))

    def solve(used, wanted):
        fill = (0, len(members.fold) - size), (0, 0)
        masks = place(mesh, (np.pad(used, fill), np.pad(wanted, fill)), "population")
        kernel, bias = (part[:size] for part in fetched(program(data, *masks, members)))
        usable = np.isfinite(kernel).all((2, 3)) & np.isfinite(bias).all(2)
        return [np.where(_stretched(usable, part), part, 0) for part in (kernel, bias)]

    return solve


def linear_logits(
    x: np.ndarray, mean: np.ndarray, scale: np.ndarray, kernel: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    """Logits of several linear parts on the same features: x (N, D), kernel (..., D, C), bias (..., C): (..., N, C)."""
    score = np.tensordot((x - mean) / scale, kernel, (1, -2))  # (N, ..., C)
    return (np.moveaxis(score, 0, -2) + bias[..., None, :]).astype(np.float64)


# --- training from the host -----------------------------------------------------------------------------------------


class TrainingError(Exception):
    """Training had to end; the text says why. Exit status 1."""


class Trained(NamedTuple):
    """The outcome: best parameters stacked along P, logits (K + 1, N, C) averaged over seeds, and the history.

    `embedding`, (N, S W), is the hidden layer of the seeds of the fold that tests the utterance, side by side.
    `choices` says for each fold what its validation speakers chose, `sweep` for each setting how it fared with them.
    """

    params: Any
    logits: np.ndarray
    embedding: np.ndarray
    best_epoch: np.ndarray
    skipped: np.ndarray
    history: list[dict]
    choices: list[dict]
    sweep: list[dict]

    def temperature(self, plan: Plan) -> np.ndarray:
        """What the logits of each utterance, (N,), were divided by to calibrate them."""
        return np.array([choice["temperature"] for choice in self.choices])[plan.fold]


def train(
    dataset: Dataset, plan: Plan, stored: stats.Stored, config: Config, keeper: "Keeper | None" = None
) -> Trained:
    """Train every fold and the final model together, with each of the settings, and solve their linear parts.

    `keeper` tells where to go on, and keeps the state.

    Raises
    ------
    TrainingError
        If the steps of a member are not finite five times in a row, or its outputs are not.
    """
    size = len(plan.train)
    task, mesh, data, members = set_up(dataset, plan, stored, config)
    if task.groups:
        log.info(f"sequences: {padding_share(dataset, task):.1%} of the frames that are computed are padding")
    outcome, losses, history = train_population(task, mesh, data, members, plan.folds, keeper or Keeper())
    if not np.isfinite(outcome.loss[:size]).all():
        raise TrainingError("no epoch of a fold had a finite validation loss; look at the features with check_data.py")
    settings = sweep_settings(config)
    own, weights = _as_chosen(mesh, members, outcome, settings)
    logits = compute_logits(task, mesh, data, own, weights)[:size]
    embedding = compute_embedding(task, mesh, data, dataset, plan, own, weights)
    solve = linear_solver(task, mesh, data, own, size)
    params = jax.tree.map(lambda leaf: leaf[:size], weights)
    params, logits, choices = add_linear(dataset, plan, members, params, logits, solve)
    logits = logits.reshape(plan.folds + 1, config.seeds, *logits.shape[1:]).mean(1)
    sweep = []
    if config.sweep:
        chosen = outcome.setting[:size][:: config.seeds]  # of each fold: its seeds choose together
        sweep = sweep_table(settings, losses[:, :size][:, :: config.seeds], chosen)
        choices = [choice | settings[number]._asdict() for choice, number in zip(choices, chosen)]
    return Trained(
        params, logits, embedding, outcome.best_epoch[:size], outcome.skipped[:size], history, choices, sweep
    )


def _as_chosen(mesh: Any, members: Member, outcome: "Outcome", settings: list[Setting]) -> tuple[Member, dict]:
    """Members with the setting that each of them ended up with, and its parameters; units out of use answer nothing."""
    setting = Setting.stack([settings[number] for number in outcome.setting])
    first = outcome.params["Dense_0"]
    used = np.arange(first["bias"].shape[1]) < setting.width[:, None]  # (P, W)
    first = {"kernel": first["kernel"] * used[:, None], "bias": first["bias"] * used}
    return place(mesh, members._replace(setting=setting), "population"), outcome.params | {"Dense_0": first}


class Setup(NamedTuple):
    """A run as the program wants it."""

    task: Task
    mesh: Any
    data: Data
    members: Member  # on the host; the last ones may only fill up the devices


def set_up(dataset: Dataset, plan: Plan, stored: stats.Stored, config: Config) -> Setup:
    """Lay out the population and put the data on the devices.

    An epoch of vectors has as many batches as the median member needs: with as many as the final model needs, which
    trains on more, every fold would compute padding. One of sequences goes through all of them, in batches so large
    that a member trains on the usual number.
    """
    mesh = population_mesh(len(plan.train))
    batch = min(config.batch, max(int(plan.train.sum(1).max()) // STEPS_AN_EPOCH, 2))
    members = stack_members(dataset, plan, stored, config, batch, -(-len(plan.train) // mesh.size) * mesh.size)
    if dataset.frames is None:
        steps, groups = int(np.median((members.train[: len(plan.train)] >= 0).any(-2).sum(-1))), ()
        everything = _tables(np.ones((1, len(dataset.label)), bool), dataset, batch)[0]
    else:
        everything = strata(np.arange(len(dataset.label)), dataset, round(batch / plan.train.mean()))
        steps, groups = everything.shape[1], length_groups(everything, dataset)
    classes = len(dataset.classes)
    network = build_network(config.width, classes, config.precision)
    each = jax.vmap if groups or mesh.devices.flat[0].platform != "cpu" else one_by_one
    task = Task(config, network, classes, groups, steps, mix if config.mixup or config.sweep else unmixed, each)
    return Setup(task, mesh, place(mesh, device_data(dataset, everything)), members)


def stack_members(dataset: Dataset, plan: Plan, stored: stats.Stored, config: Config, batch: int, rows: int) -> Member:
    """All members; `rows` of them, the last ones of which may only fill up the devices."""
    members, parts = len(plan.train), (plan.train, plan.validation)
    if dataset.frames is None:
        parts = [_tables(part, dataset, batch) for part in parts]
    member = Member(
        np.arange(members, dtype=np.int32),
        np.arange(members, dtype=np.int32) // config.seeds,
        *parts,
        *member_statistics(dataset, plan, stored),
        class_weights(dataset.label, plan.train, len(dataset.classes)),
        Setting.stack([Setting.of(config)] * members),
    )
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[-1:].repeat(rows - members, 0)]), member)
    padded.fold[members:] = -1
    return padded


def sweep_settings(config: Config) -> list[Setting]:
    """The settings to try: the config's own, or all combinations of the grid."""
    if not config.sweep:
        return [Setting.of(config)]
    grid = [Setting(*values) for values in itertools.product(*(SWEEP[name] for name in Setting._fields))]
    return [setting._replace(width=max(1, round(config.width * setting.width))) for setting in grid]


def strata(chosen: np.ndarray, dataset: Dataset, batch: int) -> np.ndarray:
    """Lay utterances out as a table (batch, steps) whose rows hold those of about the same length and class.

    A batch that takes one utterance of each row is filled about as well as every other: the sums of the shortest
    and of the longest choice differ by no more than the longest and the shortest utterance.
    """
    steps = -(-len(chosen) // batch)
    table = np.full(batch * steps, -1, np.int32)
    table[: len(chosen)] = chosen[np.lexsort((dataset.label[chosen], dataset.length[chosen]))]
    return table.reshape(batch, steps)


def _tables(masks: np.ndarray, dataset: Dataset, batch: int) -> np.ndarray:
    """Tables (P, batch, steps) of the utterances that each of the masks (P, N) chooses."""
    tables = [strata(np.flatnonzero(mask), dataset, batch) for mask in masks]
    steps = max(table.shape[1] for table in tables)
    return np.stack([np.pad(table, ((0, 0), (0, steps - table.shape[1])), constant_values=-1) for table in tables])


def length_groups(tables: np.ndarray, dataset: Dataset) -> tuple[tuple[int, int], ...]:
    """Cut the rows of tables, (..., B, steps), into at most GROUPS groups with room for one length each.

    Rows are strata of about the same length, so that a batch needs no room for the longest utterance but in its last
    rows. The groups are those with the least padding, by dynamic programming over the row at which each ends.

    Returns
    -------
    tuple
        Rows and frames of each group.
    """
    longest = np.where(tables >= 0, dataset.length[tables], 1).swapaxes(-1, -2).reshape(-1, tables.shape[-2]).max(0)
    room = np.concatenate([[0], np.maximum.accumulate(longest)])
    end = np.arange(len(room))
    own = np.where(end[:, None] > end, (end[:, None] - end) * room[:, None], np.inf)  # (end, begin)
    cost, begins = np.where(end == 0, 0, np.inf), []
    for _ in range(min(GROUPS, len(longest))):
        begins.append((cost + own).argmin(1))
        cost = (cost + own).min(1)
    groups, stop = {}, len(longest)
    for begin in reversed(begins):
        groups[int(room[stop])] = int(stop - begin[stop]) + groups.get(int(room[stop]), 0)
        stop = begin[stop]
    return tuple((rows, frames) for frames, rows in reversed(groups.items()))


def padding_share(dataset: Dataset, task: Task) -> float:
    """Share of the frames computed in an epoch that are padding."""
    return 1 - float(dataset.length.sum()) / (task.steps * sum(rows * longest for rows, longest in task.groups))


def device_data(dataset: Dataset, everything: np.ndarray) -> Data:
    nothing = np.zeros(len(dataset.label), np.int32)
    frames = dataset.frames or Frames(np.zeros((1, 1), np.float32), np.zeros(1, np.float32), nothing)
    length, first = dataset.length.astype(np.int32), frames.first.astype(np.int32)
    return Data(dataset.x, dataset.label, everything, length, first, frames.rows, frames.centre)


class Outcome(NamedTuple):
    """What training with one setting gave, stacked along P, on the host."""

    params: Any
    loss: np.ndarray
    best_epoch: np.ndarray
    skipped: np.ndarray
    setting: np.ndarray  # number of the setting

    def better(self, other: "Outcome") -> "Outcome":
        """Of each member, the outcome with the smaller validation loss; the members of a fold have the same."""
        return jax.tree.map(np.asarray, _where(other.loss < self.loss, other, self))


class Progress(NamedTuple):
    """Where training stands between two calls; whatever is random follows from the seed and these numbers."""

    setting: int  # number of the setting that is being trained
    epoch: int  # its next one
    state: State
    best: Outcome | None  # of the settings before it
    losses: list[np.ndarray]  # of each of them, (P,)
    history: list[dict]

    def arrays(self) -> dict[str, Any]:
        """Every array by its name."""
        leaves = jax.tree_util.tree_leaves_with_path((self.state, self.best, self.losses))
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def train_population(
    task: Task, mesh: Any, data: Data, members: Member, folds: int, keeper: "Keeper"
) -> tuple[Outcome, np.ndarray, list[dict]]:
    """Train the population with every setting of the sweep, one after the other by the same compiled program.

    Returns
    -------
    outcome, losses, history
        The best outcome of each fold, the validation losses, shape (settings, P), and the rows of history.csv.
    """
    config, rows, settings = task.config, len(members.fold), sweep_settings(task.config)
    program = jax.jit(functools.partial(population_epochs, task, mesh))

    def with_setting(number):
        return members._replace(setting=Setting.stack([settings[number]] * rows))

    def start(number, best, losses, history):
        state = init_population(task, config.seed, with_setting(number))
        return Progress(number, 0, state, best, losses, history)

    progress = keeper.resume(start(0, None, [], []))
    while True:
        if config.sweep:
            told = ", ".join(f"{name} {value:g}" for name, value in settings[progress.setting]._asdict().items())
            log.info(f"setting {progress.setting + 1} of {len(settings)}: {told}")
        own, state = place(mesh, (with_setting(progress.setting), progress.state), "population")
        progress = _train_setting(program, config, data, own, progress._replace(state=state), folds, keeper)
        best, losses = _with_outcome(progress)
        if progress.setting + 1 == len(settings):
            return best, np.stack(losses), progress.history
        progress = start(progress.setting + 1, best, losses, progress.history)


def _train_setting(
    program: Callable, config: Config, data: Data, members: Member, progress: Progress, folds: int, keeper: "Keeper"
) -> Progress:
    """Train with one setting to its end, from where `progress` stands."""
    started, first = time.perf_counter(), progress.epoch
    while fetched(progress.state.active).any():
        state, measures = program(config.seed, data, members, progress.state, progress.epoch)
        measures, worst_run, active = fetched((measures, state.worst_run, state.active))
        _end_if_broken(worst_run, progress.epoch, folds, config)
        rows = _rows(measures, progress.epoch, config, folds)
        if config.sweep:
            rows = [{"setting": progress.setting + 1} | row for row in rows]
        epoch = progress.epoch + EPOCHS_A_CALL
        progress = progress._replace(epoch=epoch, state=state, history=progress.history + rows)
        keeper.offer(progress)
        pace = (time.perf_counter() - started) / (epoch - first)
        _say_progress(rows, int(active.sum()), (folds + 1) * config.seeds, config.epochs, pace)
    return progress


def _with_outcome(progress: Progress) -> tuple[Outcome, list[np.ndarray]]:
    """Best outcomes and losses with those of the setting that is now trained."""
    state = progress.state
    found = fetched((state.best, state.best_loss, state.best_epoch, state.skipped))
    outcome = Outcome(*found, np.full(len(found[1]), progress.setting, np.int32))
    return (progress.best.better(outcome) if progress.best else outcome), [*progress.losses, outcome.loss]


def sweep_table(settings: list[Setting], losses: np.ndarray, chosen: np.ndarray) -> list[dict]:
    """A row for each setting, the best first: its mean validation loss, and how many of the folds chose it.

    `losses` has shape (settings, K + 1) and `chosen` (K + 1,); the final model, which is the last, does not count.
    """
    rows = [
        setting._asdict() | {"validation_loss": float(loss[:-1].mean()), "folds": int((chosen[:-1] == number).sum())}
        for number, (setting, loss) in enumerate(zip(settings, losses))
    ]
    return sorted(rows, key=lambda row: row["validation_loss"])


def compute_logits(task: Task, mesh: Any, data: Data, members: Member, params: Any) -> np.ndarray:
    """Logits of every member for all utterances, (P, N, C)."""
    table = np.asarray(data.everything).T
    found = fetched(jax.jit(over_population(mesh, functools.partial(all_logits, task), 2))(data, members, params))
    logits = np.zeros((len(found), (table >= 0).sum(), task.classes))
    logits[:, table[table >= 0]] = found[:, table >= 0]
    if not np.isfinite(logits).all():
        raise TrainingError("the features of an utterance overflow the network; look at them with check_data.py")
    return logits


def compute_embedding(
    task: Task, mesh: Any, data: Data, dataset: Dataset, plan: Plan, members: Member, params: Any
) -> np.ndarray:
    """Hidden layers, (N, S W), of the models of the fold that tests the utterance, side by side."""
    fold = np.asarray(fetched(members.fold))
    tested = [plan.fold == own if 0 <= own < plan.folds else np.zeros(len(plan.fold), bool) for own in fold]
    tables = _tables(np.array(tested), dataset, len(data.everything))
    task = task._replace(groups=length_groups(tables, dataset) if task.groups else ())
    answer = jax.jit(over_population(mesh, functools.partial(own_hidden, task), 3))
    found = fetched(answer(data, place(mesh, tables, "population"), members, params))
    utterances = [table.T[table.T >= 0] for table in tables]
    order = np.argsort(np.concatenate(utterances), kind="stable")  # the seeds of a fold stay in their order
    rows = np.concatenate([hidden[table.T >= 0] for table, hidden in zip(tables, found)])[order]
    return rows.reshape(len(plan.fold), -1)


def _member_name(member: int, folds: int, seeds: int) -> str:
    return "final" if member // seeds == folds else str(member // seeds + 1)


def _rows(measures: dict[str, np.ndarray], first: int, config: Config, folds: int) -> list[dict]:
    """Rows of history.csv: one for each epoch and each member that was still training."""
    return [
        {"epoch": first + epoch + 1, "fold": _member_name(member, folds, config.seeds), "seed": member % config.seeds}
        | {name: float(values[epoch, member]) for name, values in measures.items() if name != "active"}
        for epoch, active in enumerate(measures["active"])
        for member in np.flatnonzero(active).tolist()
    ]


def _end_if_broken(worst_run: np.ndarray, first: int, folds: int, config: Config) -> None:
    broken = np.flatnonzero(worst_run >= BAD_STEPS_END)
    if broken.size:
        names = ", ".join(sorted({_member_name(member, folds, config.seeds) for member in broken}))
        kept = "; the state before them is kept, --fresh starts over" * (first > 0)
        raise TrainingError(
            f"epochs {first + 1} to {first + EPOCHS_A_CALL}: loss or gradient was NaN or Inf in {worst_run.max()}"
            f" steps in a row (fold {names}); look at the features with check_data.py, and try a smaller"
            f" --learning-rate{kept}"
        )


def _say_progress(rows: list[dict], active: int, population: int, epochs: int, pace: float) -> None:
    """Say how the last epoch went; `pace` is in seconds an epoch."""
    epoch = rows[-1]["epoch"]
    last = [row for row in rows if row["epoch"] == epoch]
    loss, ua = (np.mean([row[name] for row in last]) for name in ("loss", "validation_ua"))
    left = f"at most {pace * (epochs - epoch):.0f} s left" if active else "all have stopped"
    log.info(
        f"epoch {epoch}/{epochs}  loss {loss:.3f}  validation UA {ua:.3f}"
        f"  {active} of {population} models training, {left}"
    )


# --- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(dataset: Dataset, plan: Plan, trained: Trained, supplied: bool, config: Config) -> tuple[dict, np.ndarray]:
    """Score the out-of-fold predictions.

    Returns
    -------
    metrics, probability
        The contents of metrics.json that stem from the predictions, and the probabilities, shape (N, C), of the
        model that never saw the utterance's speaker.
    """
    classes, label = len(dataset.classes), dataset.label
    logits = trained.logits[plan.fold, np.arange(len(label))]
    probability, before = stats.probabilities(logits), logits * trained.temperature(plan)[:, None]
    predicted = probability.argmax(1)
    _, by_speaker = stats.group_confusions(plan.speaker, label, predicted, classes)
    confusion = by_speaker.sum(0)
    overall, intervals = stats.scores(confusion), stats.speaker_intervals(by_speaker, config.seed)
    metrics = _plain(overall) | {f"{name}_ci95": list(interval) for name, interval in intervals.items()}
    metrics |= {f"majority_{name}": value for name, value in _plain(stats.majority_scores(confusion)).items()}
    metrics |= {
        "chance_ua": 1 / classes,
        "classes": list(dataset.classes),
        "recall": dict(zip(dataset.classes, (confusion.diagonal() / np.maximum(confusion.sum(1), 1)).tolist())),
        "n_utterances": len(label),
        "n_speakers": len({utterance.speaker for utterance in dataset.utterances} - {None}),
        "speaker_independent": plan.independent,
        "fold_scheme": plan.scheme,
        "folds": [_fold_report(fold, dataset, plan, trained, predicted, config) for fold in range(plan.folds)],
        "confusion": confusion.tolist(),
        "speakers": _group_scores(plan.speaker, dataset, predicted) if plan.independent else {},
        "statistics": "supplied by the user" if supplied else "of the training speakers",
        "notes": plan.notes
        + ["your own statistics apply to every fold; if they were computed here, they know the test speakers"]
        * supplied,
    }
    metrics |= _closer_look(dataset, probability) | {"curves": _curves(trained, config)}
    metrics |= {"sweep": trained.sweep} if trained.sweep else {}
    metrics["ece_uncalibrated"] = stats.expected_calibration_error(stats.probabilities(before), label)
    return metrics, probability


def _closer_look(dataset: Dataset, probability: np.ndarray) -> dict:
    """Where the predictions are good and bad: by what the names tell, by confidence, and the worst by name."""
    predicted, confidence = probability.argmax(1), probability.max(1)
    bins = {name: values.tolist() for name, values in stats.reliability(probability, dataset.label).items()}
    wrong = np.flatnonzero(predicted != dataset.label)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:SHOWN]
    return {
        "groups": {
            field: _group_scores([getattr(utterance, field) for utterance in dataset.utterances], dataset, predicted)
            for field in ("corpus", "gender", "intensity")
        },
        "ece": stats.expected_calibration_error(probability, dataset.label),
        "reliability": [dict(zip(bins, row)) for row in zip(*bins.values())],
        "confident_mistakes": [
            {"file": utterance.file, "label": utterance.emotion, "predicted": dataset.classes[predicted[n]]}
            | {"confidence": float(confidence[n])}
            for n in worst
            for utterance in [dataset.utterances[n]]
        ],
    }


def _group_scores(group: Iterable[str | None], dataset: Dataset, predicted: np.ndarray) -> dict[str, dict]:
    """Count and scores of each group; an utterance whose group is None is in none."""
    told = [(name, n) for n, name in enumerate(group) if name is not None]
    if not told:
        return {}
    named, chosen = map(list, zip(*told))
    found = stats.group_confusions(named, dataset.label[chosen], predicted[chosen], len(dataset.classes))
    return {name: {"n": int(counts.sum())} | _plain(stats.scores(counts)) for name, counts in zip(*found)}


def _curves(trained: Trained, config: Config) -> list[dict]:
    """Validation loss and UA by epoch: mean, lowest and highest over the folds that still trained, of their seeds.

    They are those of the hidden layer, since the linear part has no epochs; of a sweep, with the chosen setting.
    """
    chosen = {}
    if config.sweep:
        settings = [setting._asdict() for setting in sweep_settings(config)]
        chosen = {
            str(fold + 1): 1 + next(n for n, setting in enumerate(settings) if setting.items() <= choice.items())
            for fold, choice in enumerate(trained.choices)
        }
    folds: dict[int, dict[str, list]] = {}
    for row in trained.history:
        if row["fold"] != "final" and row.get("setting") == chosen.get(row["fold"]):
            folds.setdefault(row["epoch"], {}).setdefault(row["fold"], []).append(row)
    curves = []
    for epoch, by_fold in sorted(folds.items()):
        curves.append({"epoch": epoch, "folds": len(by_fold)})
        for name in ("validation_loss", "validation_ua"):
            means = [float(np.mean([row[name] for row in rows])) for rows in by_fold.values()]
            curves[-1][name] = {"mean": float(np.mean(means)), "low": min(means), "high": max(means)}
    return curves


def _fold_report(
    fold: int, dataset: Dataset, plan: Plan, trained: Trained, predicted: np.ndarray, config: Config
) -> dict:
    """Speakers and scores of one fold; its seeds rotate over the validation speakers, and the first stands on top."""
    members = range(fold * config.seeds, (fold + 1) * config.seeds)
    parts = [
        {"train": _names(plan, plan.train[member]), "validation": _names(plan, plan.validation[member])}
        for member in members
    ]
    tested = plan.fold == fold
    confusion = stats.confusion_matrix(dataset.label[tested], predicted[tested], len(dataset.classes))
    return (
        {"fold": fold + 1, "test": _names(plan, tested)}
        | parts[0]
        | {"rotation": parts, "n_test": int(tested.sum()), "epochs": int(trained.best_epoch[members[0]]) + 1}
        | {"skipped_steps": int(trained.skipped[list(members)].sum())}
        | {"chosen": trained.choices[fold]}
        | _plain(stats.scores(confusion))
    )


def _plain(scores: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}


# --- artifacts ------------------------------------------------------------------------------------------------------


def save_run(
    run: Path,
    scan: check_data.Scan,
    dataset: Dataset,
    plan: Plan,
    trained: Trained,
    stored: stats.Stored,
    metrics: dict,
    probability: np.ndarray,
    config: Config,
) -> None:
    """Write every artifact of a run; all are on the disk before the first replaces an older one."""
    final = jax.tree.map(lambda leaf: leaf[plan.folds * config.seeds :], trained.params)
    described = {
        "format": FORMAT,
        "classes": list(dataset.classes),
        "dim": scan.dim,
        "pooling": config.pooling if dataset.frames is not None else "mean",
        "cuts_vectors": scan.reshapes_vectors,
        "temperature": trained.choices[-1]["temperature"],
        "likeness": float(stats.rank_correlation(dataset.x, stored.statistics.mean).min()),
        "rms": float(np.median([record.rms for record in scan.records])),
        "speakers": sorted({utterance.speaker or "" for utterance in dataset.utterances}),
        "data": str(scan.directory.resolve()),
        "options": dataclasses.asdict(config),
    }
    confusion = [
        {"label": name} | dict(zip(dataset.classes, counts))
        for name, counts in zip(dataset.classes, metrics["confusion"])
    ]
    artifacts = {
        "config.json": stats.json_bytes(described),
        "history.csv": stats.csv_bytes(trained.history),
        "predictions.csv": stats.csv_bytes(prediction_rows(dataset, plan, probability)),
        "confusion.csv": stats.csv_bytes(confusion),
        "skipped.csv": stats.csv_bytes([finding._asdict() for finding in scan.findings], check_data.Finding._fields),
        stats.MEAN_FILE: stats.npy_bytes(stored.statistics.mean),
        stats.STD_FILE: stats.npy_bytes(stored.statistics.std),
        "fusion.npz": fusion_bytes(
            [utterance.file for utterance in dataset.utterances],
            dataset.classes,
            trained.logits[plan.fold, np.arange(len(plan.fold))],
            trained.temperature(plan),
            trained.embedding,
            (stored.statistics.mean, stored.statistics.scale()),
            fold=plan.fold + 1,
            label=dataset.label,
            speaker=[utterance.speaker or "" for utterance in dataset.utterances],
        ),
        "model.npz": model_bytes(final, stored.statistics),
        "report.html": report_html(metrics, run),
        "metrics.json": stats.json_bytes(metrics),
    }
    run.mkdir(parents=True, exist_ok=True)  # somebody may have moved it away meanwhile
    stats.write_files(run, artifacts)


def flatten(params: Any, path: str = "params") -> dict[str, np.ndarray]:
    """Name every array of a tree of parameters by its path: `params/Dense_0/kernel`."""
    if not isinstance(params, dict):
        return {path: np.asarray(params, np.float32)}
    return {name: leaf for key in sorted(params) for name, leaf in flatten(params[key], f"{path}/{key}").items()}


def model_bytes(params: Any, statistics: stats.Statistics) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, mean=statistics.mean, scale=statistics.scale(), **flatten(params))
    return buffer.getvalue()


def fusion_bytes(
    files: list[str],
    classes: tuple[str, ...],
    logits: np.ndarray,
    temperature: np.ndarray | float,
    embedding: np.ndarray,
    statistics: tuple[np.ndarray, np.ndarray],
    fold: np.ndarray | int = 0,
    label: np.ndarray | int = -1,
    speaker: list[str] | str = "",
) -> bytes:
    """What a fusion with other modalities needs, a row for each utterance; README has the contract.

    `logits`, (N, C), are calibrated; those in the file are as they were before. `statistics` are mean and scale.
    """
    rows = len(files)
    temperature = np.broadcast_to(temperature, rows)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        id=np.array([file.removesuffix(".npz") for file in files]),
        classes=np.array(classes),
        logits=(logits * temperature[:, None]).astype(np.float32),
        temperature=temperature.astype(np.float32),
        probability=stats.probabilities(logits).astype(np.float32),
        embedding=embedding.astype(np.float32),
        fold=np.broadcast_to(np.int32(fold), rows),
        label=np.broadcast_to(np.int32(label), rows),
        speaker=np.broadcast_to(np.array(speaker), rows),
        statistics=np.array(hashlib.sha256(b"".join(np.float32(part).tobytes() for part in statistics)).hexdigest()),
    )
    return buffer.getvalue()


def prediction_rows(dataset: Dataset, plan: Plan, probability: np.ndarray) -> list[dict]:
    return [
        {
            "file": utterance.file,
            "corpus": utterance.corpus,
            "speaker": utterance.speaker or "",
            "label": utterance.emotion,
            "fold": int(fold) + 1,
        }
        | _predicted(dataset.classes, row)
        for utterance, fold, row in zip(dataset.utterances, plan.fold, probability)
    ]


def _predicted(classes: tuple[str, ...], probability: np.ndarray) -> dict:
    return {"predicted": classes[probability.argmax()]} | {
        f"p_{name}": f"{p:.6f}" for name, p in zip(classes, probability)
    }


# --- the report -----------------------------------------------------------------------------------------------------


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Speech emotion report: UA %(ua).4f, %(n_utterances)d utterances, %(n_speakers)d speakers</title>
<style>
:root {{ color-scheme: light dark }}
pre {{ overflow-x: auto; font: clamp(12px, 1.9vw, 15px)/1.35 Menlo, "DejaVu Sans Mono", Consolas, monospace }}
</style>
</head>
<body>
<pre>{code}</pre>
</body>
</html>
"""


def report_text(metrics: dict, run: Path, file: Any) -> str:
    """The closing report as `file` can show it: standard output in colour where it is a terminal that has them."""
    console = _console(metrics, file=file, color_system="auto" if file is sys.stdout else None)
    with console.capture() as captured:  # rich's own writing ends the program with 1 where a pipe's reader has gone
        draw_report(console, metrics, run)
    return captured.get()


def report_html(metrics: dict, run: Path) -> bytes:
    """The same report as a page that needs nothing else."""
    console = _console(metrics, file=io.StringIO(), record=True)
    draw_report(console, metrics, run)
    return console.export_html(inline_styles=True, code_format=PAGE % metrics).encode()


def _console(metrics: dict, **how: Any) -> Console:
    width = max(80, 24 + 7 * len(metrics["classes"]))  # as the confusion matrix needs
    return Console(highlight=False, markup=False, emoji=False, force_jupyter=False, width=width, **how)


def draw_report(console: Console, metrics: dict, run: Path) -> None:
    """Draw the closing report; all but the place of the results is in the metrics."""
    classes, folds = metrics["classes"], metrics["folds"]
    line = "#" if console.options.ascii_only else "\N{BOX DRAWINGS HEAVY HORIZONTAL}"

    def bar(share: float, width: int = 20) -> str:
        return line * round(share * width) if math.isfinite(share) else ""

    say = functools.partial(console.print, soft_wrap=True)
    kind = "speaker-independent" if metrics["speaker_independent"] else "NOT speaker-independent"
    say(f"\n{kind} cross-validation, {check_data.printable(metrics['fold_scheme'])} ({len(folds)} folds)")
    say(f"{metrics['n_utterances']} utterances, {metrics['n_speakers']} speakers, {len(classes)} classes\n")
    console.print(_score_table(metrics))
    console.print(_confusion_table(metrics))
    if "sweep" in metrics:
        console.print(_sweep_table(metrics["sweep"]))
    console.print(_group_table(metrics, bar))
    if metrics["curves"]:
        console.print(_curve_table(metrics["curves"], bar))
    console.print(_reliability_table(metrics, bar))
    if metrics["confident_mistakes"]:
        console.print(_mistake_table(metrics["confident_mistakes"]))
    if metrics["left_out"]:
        console.print(_left_out_table(metrics))
    for title, lines in (("the run", _run_lines(metrics)), ("model card", _card_lines(metrics))):
        say(f"{title}\n", style="bold")
        console.print(_grid(lines), "")
    say(f"  {'results':<17} {check_data.printable(str(run))}")


def _table(title: str, left: Iterable[str], right: Iterable[str], last: str | None = None) -> Table:
    """An empty table; a long name is folded, a number never."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    if last is not None:
        table.add_column(last, overflow="fold")
    return table


def _grid(lines: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True, width=19)
    grid.add_column(overflow="fold")
    for title, text in lines:
        grid.add_row(f"  {title}", check_data.printable(text))
    return grid


def _score_table(metrics: dict) -> Table:
    table = _table("scores", ["measure"], ["score", "95 % interval", "chance", "majority"])
    for name, title in (("ua", "UA (mean recall)"), ("wa", "WA (accuracy)"), ("macro_f1", "macro F1")):
        low, high = metrics[f"{name}_ci95"]
        chance = f"{metrics['chance_ua']:.4f}" if name == "ua" else ""
        interval, majority = f"{low:.4f} to {high:.4f}", f"{metrics[f'majority_{name}']:.4f}"
        table.add_row(title, f"{metrics[name]:.4f}", interval, chance, majority)
    return table


def _confusion_table(metrics: dict) -> Table:
    """Rows are labels, columns predictions; class names are cut so that eight of them fit 80 columns."""
    names = [check_data.printable(name) for name in metrics["classes"]]
    title = "label (row) against prediction (column), coloured by the share of the row"
    table = _table(title, [""], [*(name[:5] for name in names), "recall"])
    for name, counts, recall in zip(names, metrics["confusion"], metrics["recall"].values()):
        total = max(sum(counts), 1)
        cells = [Text(f"{count:>5}", _shade(count / total)) for count in counts]
        table.add_row(name[:12], *cells, f"{recall:.3f}")
    return table


def _shade(share: float) -> str:
    """Black on a background from grey to orange, which stands out on a light screen and on a dark one.

    Its depth is the root of the share, since most confusions are a small one.
    """
    red, green, blue = (round(175 + math.sqrt(share) * (full - 175)) for full in (255, 136, 0))
    return f"#000000 on rgb({red},{green},{blue})" if share else ""


def _sweep_table(sweep: list[dict]) -> Table:
    """The settings with the best mean validation loss, and how many folds chose each."""
    title = f"settings by mean validation loss, {min(SHOWN, len(sweep))} of {len(sweep)}; metrics.json has all"
    table = _table(title, [], [name.replace("_", "\n") for name in sweep[0]])
    for row in sweep[:SHOWN]:
        table.add_row(*(f"{value:.4f}" if name == "validation_loss" else f"{value:g}" for name, value in row.items()))
    return table


def _group_table(metrics: dict, bar: Callable[[float], str]) -> Table:
    table = _table("UA by what the names tell, weakest first", ["", "group"], ["n", "UA"], "")
    for field, groups in (metrics["groups"] | {"speaker": metrics["speakers"]}).items():
        shown = 5 if field == "speaker" else SHOWN
        for name, found in sorted(groups.items(), key=lambda item: item[1]["ua"])[:shown]:
            ua = found["ua"]
            table.add_row(field, check_data.printable(name), str(found["n"]), f"{ua:.3f}", bar(ua))
        if len(groups) > shown:
            table.add_row(field, f"... and {len(groups) - shown} more in metrics.json")
    return table


def _curve_table(curves: list[dict], bar: Callable[[float], str]) -> Table:
    title = "validation by epoch, over the folds still training (hidden layer alone)"
    table = _table(title, [], ["epoch", "folds", "loss", "from", "to", "UA", "from", "to"], "")
    for place in np.unique(np.linspace(0, len(curves) - 1, SHOWN).astype(int)):
        found = curves[place]
        loss, ua = found["validation_loss"], found["validation_ua"]
        means = [f"{value:.3f}" for value in (*loss.values(), *ua.values())]
        table.add_row(str(found["epoch"]), str(found["folds"]), *means, bar(ua["mean"]))
    return table


def _reliability_table(metrics: dict, bar: Callable[[float], str]) -> Table:
    title = f"calibration error {metrics['ece']:.4f}, {metrics['ece_uncalibrated']:.4f} uncalibrated"
    table = _table(title, ["confidence"], ["n", "mean", "accuracy"], "")
    for found in metrics["reliability"]:
        if found["n"]:
            means = [f"{found[name]:.3f}" for name in ("confidence", "accuracy")]
            edges = f"{found['low']:.3f} to {found['high']:.3f}"
            table.add_row(edges, str(found["n"]), *means, bar(found["accuracy"]))
    return table


def _mistake_table(mistakes: list[dict]) -> Table:
    table = _table("the most confident mistakes", ["label", "predicted"], ["confidence"], "file")
    for mistake in mistakes:
        label, predicted, file = (check_data.printable(mistake[name]) for name in ("label", "predicted", "file"))
        table.add_row(label, predicted, f"{mistake['confidence']:.3f}", file)
    return table


def _left_out_table(metrics: dict) -> Table:
    table = _table("files that were left out, and the first of each kind", ["code"], ["n"], "")
    for code, count in metrics["left_out"].items():
        first = metrics["left_out_first"][code]
        table.add_row(code, str(count), check_data.printable(f"{first['file']}: {first['reason']}"))
    return table


def _run_lines(metrics: dict) -> Iterator[tuple[str, str]]:
    recalls = " ".join(f"{fold['ua']:.3f}" for fold in metrics["folds"][:SHOWN])
    yield "UA of the folds", recalls + " ..." * (len(metrics["folds"]) > SHOWN)
    left_out = sum(metrics["left_out"].values())
    yield "left out", f"{left_out} file{'s' * (left_out != 1)}" + "; skipped.csv names them" * bool(left_out)
    for note in metrics["notes"]:
        yield "note", note
    yield "command", metrics["command"]
    yield "settings", ", ".join(f"{name} {value}" for name, value in metrics["settings"].items())
    yield "device", metrics["device"]
    yield "versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    yield "seconds", f"{metrics['seconds']:.1f}"


def _card_lines(metrics: dict) -> Iterator[tuple[str, str]]:
    """What somebody must know who meets the model or its figure without the run."""
    corpora = ", ".join(f"{name} {found['n']}" for name, found in metrics["groups"]["corpus"].items())
    yield "data", f"{metrics['n_utterances']} utterances ({corpora}) of {', '.join(metrics['classes'])}"
    if metrics["speaker_independent"]:
        yield "speakers", f"{metrics['n_speakers']}; each was tested by models that never heard them"
    else:
        yield "speakers", "NOT speaker-independent: a model may have heard whom it was tested on; UA is too good"
    yield "intended use", "to compare features and settings, and as one part of a fusion; not to judge a person"
    whom = "unseen speakers" if metrics["speaker_independent"] else "voices that it may know"
    yield "UA means", f"how often it is right on {whom} in recordings like these, every class counting alike"
    yield "it does not mean", "how well it tells what people feel: speech in such corpora is mostly acted"
    yield "not tested", "other languages, microphones and rooms"


# --- the run's own folder: lock, state, signals ---------------------------------------------------------------------


class Keeper:
    """One run's hold on its folder: the lock, the state on the disk, and what happens when a signal ends the run.

    The state is saved in the background after a call, in one of two files by turns, so that one of them is whole
    at any moment. A save waits `DUTY` times as long as the last one took. SIGTERM and SIGINT are heard by a thread of
    its own: the main one may wait minutes for a call or a compilation. Without a folder nothing is kept.

    Of several processes the first writes, and the others learn from it when to save and where to go on.
    """

    def __init__(self, run: Path | None = None, leads: bool = True):
        self.run, self.leads = run, leads
        self.identity: dict = {}
        self._found: tuple[dict, dict] | None = None
        self._serial, self._due = 0, 0.0
        self._latest: Progress | None = None
        self._submitted: Progress | None = None  # the last one whose save was begun
        self._kept: Progress | None = None  # the one on the disk
        self._pool, self._saving = concurrent.futures.ThreadPoolExecutor(1), None
        self._writing = threading.Lock()  # held while the results are written: no signal ends the process then
        self._finished = self._warned = False

    # The lock and the signals

    def __enter__(self) -> "Keeper":
        self._is_new = not self.run.exists()
        self.run.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.run) if self.leads else None
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            # The handler itself does nothing, and so keeps Python from raising KeyboardInterrupt just anywhere.
            # What is ignored stays so: nohup ignores SIGHUP.
            heard = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, lambda *_: None) for number in heard}
            signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self.save()
        if self._handlers:
            signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._mouth.close()
        self._pool.shutdown()
        if self._is_new and self.leads and [path.name for path in self.run.glob("*")] == ["lock"]:  # it came to nothing
            (self.run / "lock").unlink()
            self.run.rmdir()
        if self._lock is not None:
            os.close(self._lock)

    def _listen(self) -> None:
        while heard := self._ear.recv(1):
            if heard[0] in self._handlers:
                self._leave(heard[0])
        self._ear.close()

    def _leave(self, number: int) -> None:
        """Save what is not yet on the disk and end the process: within two seconds, on a second signal at once."""
        threading.Timer(1.8, os._exit, (128 + number,)).start()  # whatever hangs
        self._catch_up()
        if self._saving:
            self._saving.add_done_callback(lambda _: self._mouth.send(b"\0"))
            self._ear.recv(1)
        self._writing.acquire()
        there = "; the results are complete" if self._finished else ""
        if self._kept and any(path.exists() for path in self._paths()):
            there = f"; the same command goes on from {_place(self._kept)}"
        log.error(f"ended by {signal.Signals(number).name}{there}")
        os._exit(128 + number)

    # The state

    def look(self, identity: dict, fresh: bool = False) -> str | None:
        """Find the state of an unfinished run, or remove it for a fresh start; says where it stands.

        Raises
        ------
        check_data.UsageError
            If it is that of another run, or if nothing of it is whole.
        """
        self.identity = identity
        if fresh:
            self.clear()
        whole, damaged = [], []
        for path in self._paths() if self.leads else ():
            if os.path.lexists(path):
                try:
                    whole.append(_understood(*stats.read_checked_arrays(path)))
                except stats.DataError as error:
                    damaged.append(f"{check_data.printable(str(path))} {error.reason}")
        if not whole and damaged:
            raise check_data.UsageError(f"{'; '.join(damaged)}; --fresh starts over")
        if not whole:
            return None
        for fault in damaged:
            log.warning(f"state: {fault}; GOING ON FROM THE ONE BEFORE")
        self._found = max(whole, key=lambda found: found[0]["serial"])
        described = self._found[0]
        self._serial = described["serial"]
        self._refuse_others(described["identity"])
        here = self._circumstances()
        for name, there in described["circumstances"].items():
            if there != here.get(name):
                log.warning(f"state: saved with {name} {there}, and here {here.get(name)}: the last digits may differ")
        return described["place"]

    def _refuse_others(self, theirs: dict) -> None:
        """Name the differences between an unfinished run and this one."""
        named = [
            f"{name} {_said(there.get(name))} there and {_said(here.get(name))} here"
            for there, here in ((theirs["options"], self.identity["options"]), (theirs["data"], self.identity["data"]))
            for name in dict.fromkeys([*there, *here])
            if there.get(name) != here.get(name)
        ]
        if named:
            more = [f"{len(named) - 3} more"] * (len(named) > 3)
            run, differences = check_data.printable(str(self.run)), check_data.printable(", ".join(named[:3] + more))
            raise check_data.UsageError(
                f"{run} holds an unfinished run, with {differences}; finish it, choose another --out, or start over"
                " with --fresh"
            )

    def resume(self, start: Progress) -> Progress:
        """Where to go on: `start`, or what `look` has found, in the form of `start`."""
        described, arrays = self._found or ({"setting": 0, "epoch": 0, "history": []}, {})
        setting, epoch = described["setting"], described["epoch"]
        if jax.process_count() > 1:
            setting, epoch = map(int, _from_first(np.array([setting, epoch])))
        if not (setting or epoch):
            return start
        state = fetched(start.state)
        best = Outcome(state.best, state.best_loss, state.best_epoch, state.skipped, state.best_epoch)
        form = start._replace(state=state, best=best if setting else None, losses=[state.best_loss] * setting)
        leaves, tree = jax.tree.flatten((form.state, form.best, form.losses))
        if self._found:
            leaves = [_into(leaf, arrays.get(name), name) for (name, leaf) in form.arrays().items()]
        state, best, losses = jax.tree.unflatten(tree, _from_first(leaves) if jax.process_count() > 1 else leaves)
        self._found, self._kept = None, Progress(setting, epoch, state, best, losses, described["history"])
        return self._kept

    def offer(self, progress: Progress) -> None:
        """Take note of where training stands, and save it if it is time."""
        idle = self._saving is None or self._saving.done()
        due = idle and time.monotonic() >= self._due and self.run is not None
        if jax.process_count() > 1:  # all of them are needed to fetch what lies on several hosts
            due = bool(_from_first(np.array(due)))
            progress = progress._replace(state=fetched(progress.state)) if due else progress
        self._latest = progress
        if due and self.leads:
            self._submit(progress)

    def _submit(self, progress: Progress) -> None:
        self._submitted, self._saving = progress, self._pool.submit(self._save, progress)

    def _catch_up(self) -> None:
        """Begin to save where training stands, unless that is saved or under way; several processes cannot."""
        behind = self.run is not None and self._latest is not None and self._latest is not self._submitted
        if behind and jax.process_count() == 1:
            self._submit(self._latest)

    def save(self) -> None:
        """Save where training stands, and wait for it."""
        self._catch_up()
        self.rest()

    def _save(self, progress: Progress) -> None:
        """Write the state; whatever goes wrong is said once and ends no run."""
        started = time.monotonic()
        try:
            self._write(progress)
        except Exception as error:
            told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else repr(error)
            if not self._warned:
                log.warning(f"state: not saved, the run goes on: {check_data.printable(told)}")
            self._warned = True
        finally:
            self._due = time.monotonic() + DUTY * (time.monotonic() - started)

    def _write(self, progress: Progress) -> None:
        arrays = {name: np.asarray(leaf) for name, leaf in fetched(progress.arrays()).items()}
        described = {"serial": self._serial + 1, "identity": self.identity, "circumstances": self._circumstances()}
        described |= {"setting": progress.setting, "epoch": progress.epoch, "history": progress.history}
        described |= {"place": _place(progress)}
        blobs = {self._paths()[described["serial"] % 2].name: stats.checked_arrays(described, arrays)}
        stats.write_files(self.run, blobs | {"history.csv": stats.csv_bytes(progress.history)})
        self._serial, self._kept = described["serial"], progress

    def rest(self) -> None:
        """Wait for a save that is under way: it writes history.csv too."""
        if self._saving:
            concurrent.futures.wait([self._saving])

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Write the results, which no signal interrupts; the state is not needed after that."""
        self.rest()
        with self._writing:
            yield
            self.clear(finished=True)

    def clear(self, finished: bool = False) -> None:
        """Remove the state: the run is finished, or to be started over."""
        self.rest()
        self._found = self._latest = self._submitted = self._kept = None
        self._finished = finished
        for path in self._paths() if self.leads and self.run else ():
            path.unlink(missing_ok=True)
            path.with_name(f".{path.name}.tmp").unlink(missing_ok=True)  # of a kill in mid-save

    def _paths(self) -> tuple[Path, Path]:
        return self.run / "state-0.bin", self.run / "state-1.bin"

    @staticmethod
    def _circumstances() -> dict:
        return _versions() | {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}


def _identity(config: Config, scan: check_data.Scan, dataset: Dataset, plan: Plan, stored: stats.Stored) -> dict:
    """What two runs must have in common for one to go on with the state of the other."""
    elsewhere = ("directory", "out", "fresh", "no_compile_cache", "recompute_stats")
    options = {
        f"--{name.replace('_', '-')}": value
        for name, value in dataclasses.asdict(config).items()
        if name not in elsewhere
    }
    digest = hashlib.sha256(scan.fingerprint.encode())
    for array in (dataset.label, plan.fold, plan.train, plan.validation, *stored.statistics):
        digest.update(np.ascontiguousarray(array))
    told = {
        "training program": PROGRAM,
        "utterances": len(dataset.label),
        "fingerprint of the data": digest.hexdigest()[:16],
    }
    return json.loads(json.dumps({"options": options, "data": told}))  # as it comes back from a file


def _understood(described: dict, arrays: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
    """What a state file tells, if it is one that this program can have written.

    Raises
    ------
    stats.DataError
        `damaged`.
    """
    kinds = {"serial": int, "setting": int, "epoch": int, "history": list, "place": str, "circumstances": dict}
    identity = described.get("identity")
    whole = all(type(described.get(name)) is kind for name, kind in kinds.items()) and isinstance(identity, dict)
    whole = whole and all(isinstance(identity.get(name), dict) for name in ("options", "data"))
    if not whole or min(described["setting"], described["epoch"] - 1) < 0 or not described["history"]:
        raise stats.DataError("damaged", "is none of this program's")
    if any(np.isnan(array).any() for array in arrays.values()):
        raise stats.DataError("damaged", "holds NaN")
    return described, arrays


def _said(value: Any) -> str:
    return "unset" if value is None else str(value)


def _place(progress: Progress) -> str:
    setting = f" of setting {progress.setting + 1}" * (progress.setting > 0)
    return f"epoch {progress.history[-1]['epoch'] if progress.epoch else 0}{setting}"


def _into(form: np.ndarray, saved: np.ndarray | None, name: str) -> np.ndarray:
    """Saved rows in the form of an array of this run, which may have more to fill up its devices."""
    if saved is None or saved.dtype != form.dtype or saved.shape[1:] != form.shape[1:]:
        told = "is missing" if saved is None else f"has shape {saved.shape} there and {form.shape} here"
        raise check_data.UsageError(f"the state of the unfinished run does not fit: {name} {told}; --fresh starts over")
    rows = min(len(saved), len(form))
    return np.concatenate([saved[:rows], form[rows:]])


def _from_first(tree: Any) -> Any:
    """What the first of several processes has."""
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def _locked(run: Path) -> int | None:
    """Lock a folder for this process; the lock ends with it, however it ends.

    Raises
    ------
    check_data.UsageError
        If another run holds it.
    """
    if fcntl is None:
        return None
    lock = os.open(run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(lock, 20).decode("ascii", "replace").strip()
        name = check_data.printable(str(run))
        raise check_data.UsageError(f"{name} is in use by another run, process {check_data.printable(pid)}") from None
    except OSError as error:
        log.warning(f"lock: none here ({error.strerror}); do not start a second run on this folder")
    with contextlib.suppress(OSError):  # on a full disk a second run cannot name this one, and that is all
        os.truncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    return lock


# --- labelling other files ------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """A trained model as its files tell it, and its answers by numpy: labelling is bound by reading the files."""

    classes: tuple[str, ...]
    dim: int
    cuts_vectors: bool
    merge: tuple[str, ...]
    speakers: tuple[str, ...]  # whom it has heard; "" where a name did not tell
    likeness: float  # of the strangest utterance that it was trained on: see stats.rank_correlation
    rms: float  # of the features of the utterance in the middle
    temperature: float
    arrays: dict[str, np.ndarray]  # those of model.npz; parameters have the seeds S as their first axis

    def pool(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean over normalised frames, (D,), and what the hidden layers see, (S, D) or (S, 2 D); frames (T, D)."""
        x = (frames - self.arrays["mean"]) / self.arrays["scale"]
        mean, query = x.mean(0), self.arrays.get("params/query")
        if query is None:
            return mean, np.broadcast_to(mean, (len(self.arrays["params/Dense_0/bias"]), len(mean)))
        weight = stats.probabilities(query @ x.T)  # (S, T)
        pooled = weight @ x
        deviation = np.sqrt(np.maximum(weight @ np.square(x) - np.square(pooled), 1e-6))
        return mean, np.concatenate([pooled, deviation], 1)

    def answers(self, mean: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits (B, C) and hidden layers (B, S W) for a batch of what `pool` gives."""

        def dense(x, layer):  # (S, B, D) -> (S, B, W)
            return x @ self.arrays[f"params/{layer}/kernel"] + self.arrays[f"params/{layer}/bias"][:, None]

        hidden = np.maximum(dense(pooled.swapaxes(0, 1), "Dense_0"), 0)
        logits = (dense(hidden, "Dense_1") + dense(mean, "linear")).mean(0)
        return logits, hidden.swapaxes(0, 1).reshape(len(mean), -1)

    def unlike(self, mean: np.ndarray) -> str | None:
        """Why features with this mean, (D,), are not of the encoder of this model; None if they may be."""
        likeness = float(stats.rank_correlation(mean[None], self.arrays["mean"])[0])
        if self.likeness < 0.2 or likeness > self.likeness / 3:  # features that were normalised tell nothing
            return None
        return (
            f"the order of its numbers correlates by {likeness:.2f} with the mean of what the model was trained on,"
            f" where all utterances had {self.likeness:.2f} or more"
        )

    def is_new(self, speaker: str | None) -> bool:
        """Whether the model has surely never heard a speaker: only names from one source can be compared."""
        own = {heard.startswith("own:") for heard in self.speakers}
        return (
            bool(speaker)
            and speaker not in self.speakers
            and "" not in self.speakers
            and own == {speaker.startswith("own:")}
        )


def load_model(run: Path) -> Model:
    """Read the model of a run.

    Raises
    ------
    check_data.UsageError
        If it is not there, damaged, of another version, or holds a NaN.
    """
    name = check_data.printable(str(run))
    try:
        described = json.loads(stats.read_bytes(run / "config.json"))
        if described.get("format") != FORMAT:
            raise ValueError("it was made by another version of train.py; train again")
        classes, merge, speakers = (
            tuple(map(str, list(words)))
            for words in (described["classes"], described["options"]["merge"], described["speakers"])
        )
        dim, pooling, cuts = int(described["dim"]), described["pooling"], bool(described["cuts_vectors"])
        numbers = [float(described[number]) for number in ("likeness", "rms", "temperature")]
        if not (np.isfinite(numbers).all() and min(numbers[1:]) > 0 and len(set(classes)) == len(classes)):
            raise ValueError("its config.json is damaged")
        arrays = check_data.read_arrays(run / "model.npz")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise check_data.UsageError(f"{name} holds no finished model: {check_data.printable(str(error))}") from None
    kernel = arrays.get("params/Dense_0/kernel", np.zeros(0))
    seeds, width = (kernel.shape[0], kernel.shape[-1]) if kernel.ndim else (0, 0)
    wanted = {
        "mean": (dim,),
        "scale": (dim,),
        "params/Dense_0/kernel": (seeds, dim if pooling == "mean" else 2 * dim, width),
        "params/Dense_0/bias": (seeds, width),
        "params/Dense_1/kernel": (seeds, width, len(classes)),
        "params/Dense_1/bias": (seeds, len(classes)),
        "params/linear/kernel": (seeds, dim, len(classes)),
        "params/linear/bias": (seeds, len(classes)),
    } | ({} if pooling == "mean" else {"params/query": (seeds, dim)})
    if {path: array.shape for path, array in arrays.items()} != wanted:
        raise check_data.UsageError(f"{name}: config.json and model.npz do not belong together")
    if not all(np.isfinite(array).all() for array in arrays.values()) or arrays["scale"].min() <= 0:
        raise check_data.UsageError(f"{name}: the model holds NaN or Inf, or a scale that is not above 0")
    return Model(classes, dim, cuts, merge, speakers, *numbers, arrays)


def run_prediction(config: Config) -> int:
    """Label a folder, or one file, with the final model of a run; labels in the names are compared, not needed."""
    run, given = Path(config.predict), Path(config.directory)
    if _process_number() > 0:
        return 0
    model = load_model(run)
    out = Path(config.out or run / f"predict-{given.resolve().name}")
    told = check_data.printable(str(out))
    if any((out / name).exists() for name in ("metrics.json", "lock")):
        raise check_data.UsageError(f"{told} holds the results of a training run; choose another --out")
    features = given if given.is_dir() else given.parent
    if out.resolve() == features.resolve() or (out.exists() and not out.is_dir()):
        raise check_data.UsageError(f"--out {told} is where the features are, or a file; choose another")
    if config.dim not in (None, model.dim):
        raise check_data.UsageError(f"--dim says {config.dim}, and the model wants features {model.dim} wide")
    _refuse_other_statistics(model, given)
    scan = check_data.Scan(given, model.dim, reshapes_vectors=model.cuts_vectors)
    utterances, logits, embedding = [], [], []
    pooled = _pooled(model, scan, check_data.iter_features(config, scan, model.rms, model.merge, _scan_progress()))
    while batch := list(itertools.islice(pooled, 256)):
        heard, means, inputs = zip(*batch)
        found = model.answers(np.stack(means), np.stack(inputs))
        utterances += heard
        for rows, answered in zip((logits, embedding), found):
            rows.append(answered)
    scan.findings.sort()
    for line in check_data.findings_report(scan):
        log.info(line)
    if not utterances:
        raise check_data.UsageError(f"no file can be used; the model wants features {model.dim} wide, of its encoder")
    _save_prediction(out, model, scan, utterances, np.concatenate(logits), np.concatenate(embedding))
    return 1 if scan.findings else 0


def _refuse_other_statistics(model: Model, given: Path) -> None:
    """Compare the user's own statistics in a folder with those of the model, which alone are used."""
    stored = stats.load(given) if given.is_dir() else None
    if stored is None or not stored.supplied:
        return
    mean, name = stored.statistics.mean, check_data.printable(str(given / stats.MEAN_FILE))
    if mean.size != model.dim:
        raise check_data.UsageError(f"{name} has {mean.size} numbers, and the model wants features {model.dim} wide")
    if told := model.unlike(mean):
        raise check_data.UsageError(f"{name} is of another encoder than the model: {told}")


def _pooled(
    model: Model, scan: check_data.Scan, read: Iterable[tuple[emotions.Utterance, np.ndarray]]
) -> Iterator[tuple[emotions.Utterance, np.ndarray, np.ndarray]]:
    """What the model sees of each utterance; those of another encoder become findings."""
    for utterance, frames in read:
        if told := model.unlike(frames.mean(0)):
            scan.findings.append(check_data.Finding(utterance.file, "other-encoder", told))
        else:
            yield utterance, *model.pool(frames)


def _save_prediction(
    out: Path,
    model: Model,
    scan: check_data.Scan,
    utterances: list[emotions.Utterance],
    logits: np.ndarray,
    embedding: np.ndarray,
) -> None:
    number = {name: index for index, name in enumerate(model.classes)}
    label = np.array([number.get(utterance.emotion, -1) for utterance in utterances])
    probability = stats.probabilities(logits)
    rows = [
        {"file": utterance.file, "label": utterance.emotion or ""} | _predicted(model.classes, row)
        for utterance, row in zip(utterances, probability)
    ]
    fusion = fusion_bytes(
        [utterance.file for utterance in utterances],
        model.classes,
        logits,
        model.temperature,
        embedding,
        (model.arrays["mean"], model.arrays["scale"]),
        label=label,
        speaker=[utterance.speaker or "" for utterance in utterances],
    )
    skipped = stats.csv_bytes([finding._asdict() for finding in scan.findings], check_data.Finding._fields)
    out.mkdir(parents=True, exist_ok=True)
    artifacts = {"predictions.csv": stats.csv_bytes(rows), "skipped.csv": skipped, "fusion.npz": fusion}
    stats.write_files(out, artifacts)
    counts = ", ".join(f"{name} {(probability.argmax(1) == index).sum()}" for name, index in number.items())
    labelled = f"{len(rows)} file{'s' * (len(rows) > 1)} labelled"
    print(f"{labelled}, {len(scan.findings)} left out: {check_data.printable(counts)}")
    _say_agreement(label, probability.argmax(1), [utterance.speaker for utterance in utterances], model)
    print(check_data.printable(str(out / "predictions.csv")))


def _say_agreement(label: np.ndarray, predicted: np.ndarray, speaker: list[str | None], model: Model) -> None:
    """Score the files whose names tell an emotion, -1 if they do not; only speakers new to the model count."""
    counted = (label >= 0) & np.array([model.is_new(name) for name in speaker])
    if counted.any():
        heard = [name for name, counts in zip(speaker, counted) if counts]
        _, confusions = stats.group_confusions(heard, label[counted], predicted[counted], len(model.classes))
        ua, (low, high) = stats.scores(confusions.sum(0))["ua"], stats.speaker_intervals(confusions, 0)["ua"]
        interval = f" ({low:.4f} to {high:.4f})" * (len(confusions) > 2)
        print(
            f"UA {ua:.4f}{interval} on {counted.sum()} files whose labels are known, of {len(confusions)} new speakers"
        )
    if (label >= 0).any() and not counted.all():
        print(f"{(~counted).sum()} not scored: no known label or speaker, or one that the model may have heard")


# --- the device -----------------------------------------------------------------------------------------------------


def start_jax() -> str:
    """Import the JAX stack, which takes seconds, on the best platform; return a line that names the device.

    It is imported here and not at the top so that `--help` and every fault of the command line answer at once, and
    so that the platform is chosen first.
    """
    global jax, jnp, nn, optax
    plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13") if importlib.util.find_spec("jax_plugins") else ()
    has_cuda = any(map(importlib.util.find_spec, plugins))
    platforms, reason = choose_platform(*probe_gpu(), has_cuda, os.environ.get("JAX_PLATFORMS", ""))
    if platforms:
        os.environ["JAX_PLATFORMS"] = platforms
    # Of scipy's OpenBLAS, which factors the covariances: each device has a core, and threads would wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # The population is shared among devices: see population_mesh.
        jax.config.update("jax_num_cpu_devices", _cores())
    join_hosts()
    with _Complaints() as complaints:
        try:
            device = jax.devices()[0]
        except RuntimeError as error:  # only where the user's own JAX_PLATFORMS leaves no other choice
            raise check_data.UsageError(f"JAX_PLATFORMS={platforms}: {str(error).splitlines()[0]}") from None
    if platforms != "cpu" and device.platform == "cpu" and complaints.heard:
        reason = f"THE GPU COULD NOT BE USED: {check_data.printable(complaints.heard[0].strip().splitlines()[0])}"
    if device.platform == "cpu":
        return f"CPU ({_cores()} cores), because {reason or 'jax found nothing else'}"
    return f"{device.platform.upper()} {device.device_kind}" + (
        f" and {jax.device_count() - 1} more" if jax.device_count() > 1 else ""
    )


def probe_gpu() -> tuple[str | None, str]:
    """Ask NVIDIA's driver, not jax, for a GPU: its name or None, and why there is none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None, "CUDA_VISIBLE_DEVICES hides every GPU"
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    hardware = bool(glob.glob("/dev/nvidia[0-9]*")) or any(_is_nvidia_gpu(Path(vendor).parent) for vendor in vendors)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        missing = "an NVIDIA GPU IS HERE BUT ITS DRIVER IS NOT INSTALLED (no libcuda.so.1)"
        return None, missing if hardware else "there is no NVIDIA GPU on this machine"
    count, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        unusable = f"AN NVIDIA GPU IS HERE BUT ITS DRIVER CANNOT USE IT (CUDA error {status}; try nvidia-smi)"
        return None, unusable if hardware else "there is no NVIDIA GPU on this machine"
    driver.cuDeviceGetName(name, len(name), 0)
    return name.value.decode(errors="replace"), ""


def _is_nvidia_gpu(device: Path) -> bool:
    try:
        return (device / "vendor").read_text().strip() == "0x10de" and (device / "class").read_text().startswith("0x03")
    except OSError:
        return False


def choose_platform(gpu: str | None, fault: str, has_cuda: bool, asked: str) -> tuple[str, str]:
    """Which platforms jax may use ('' leaves it to jax), and why it is the CPU if it is.

    Found out before jax is imported: with CUDA wheels and no GPU its import prints a traceback, and with a driver
    that does not fit it would take the CPU in silence.
    """
    if asked:
        return asked, f"JAX_PLATFORMS={asked} asks for it"
    if gpu and has_cuda:
        return "cuda,cpu", ""
    if gpu:
        return "cpu", f"{gpu.upper()} IS HERE BUT THIS JAX HAS NO CUDA SUPPORT: pip install 'jax[cuda12]'"
    return ("cpu" if has_cuda else ""), fault


class _Complaints(logging.Handler):
    """What jax logs while it starts its backends, to be said in one line: it would print a traceback."""

    def __init__(self):
        super().__init__()
        self.heard: list[str] = []
        self.logger = logging.getLogger("jax._src.xla_bridge")

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(str(record.exc_info[1]) if record.exc_info else record.getMessage())

    def __enter__(self) -> "_Complaints":
        self.logger.addHandler(self)
        self.logger.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.propagate = True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join_hosts() -> None:
    """Join the other processes of a run on several hosts, before any device is used.

    Started by SLURM or MPI they are known; else JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES
    and JAX_PROCESS_ID tell them. DIR and the options must be the same everywhere; process 0 writes.
    """
    named = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        if all(named.values()) and os.environ.get("JAX_COORDINATOR_ADDRESS"):
            jax.distributed.initialize(**{name: int(value) for name, value in named.items()})
        elif any(int(os.environ.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
            jax.distributed.initialize()
    except (ValueError, IndexError, RuntimeError) as error:
        raise check_data.UsageError(
            "the other processes cannot be joined (JAX_COORDINATOR_ADDRESS as host:port, JAX_NUM_PROCESSES,"
            f" JAX_PROCESS_ID, SLURM_* and OMPI_* tell of them): {error}"
        ) from None


def _process_number() -> int:
    """Number of this process among those of a run on several hosts, before jax can tell it."""
    for size, number in (
        ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
        ("SLURM_NTASKS", "SLURM_PROCID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ):
        if os.environ.get(size, "1") != "1" and os.environ.get(number, "").isdecimal():
            return int(os.environ[number])
    return 0


def keep_compiled() -> None:
    """Keep compiled programs for the next run, in a folder of the user alone: who can write there can run code."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.name != "posix":
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "speech-emotion-trainer"
    if not folder.is_absolute():  # nobody's home is known
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
    except OSError as error:
        log.info(f"compile cache: none, {check_data.printable(str(folder))}: {error.strerror}")
        return
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
        log.info(f"compile cache: none, {check_data.printable(str(folder))} is not a folder of yours alone (mode 0700)")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By itself jax keeps what took a second. All but the first of our programs take less, and together one.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


# --- the program ----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    logging.raiseExceptions = False  # a closed stderr must not fill the screen with tracebacks
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        config = parse_config(arguments)
        status = run_training(config) if config.predict is None else run_prediction(config)
        sys.stdout.flush()
        return status
    except (check_data.UsageError, stats.DataError) as error:
        log.error("train.py: %s", error)
        return 2
    except TrainingError as error:
        log.error("train.py: %s", error)
        return 1
    except OSError as error:
        if error.filename is None:  # standard output
            raise
        log.error("train.py: %s: %s", check_data.printable(str(error.filename)), error.strerror)
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # as jax says it
            raise
        told = check_data.printable((str(error).strip() or "no more memory").splitlines()[0])
        log.error("train.py: OUT OF MEMORY (%s); training needs less with a smaller --batch, --seeds or --width", told)
        return 1


if __name__ == "__main__":
    status = check_data.run_cli(main)
    if "jax" in globals() and jax.process_count() == 1:
        os._exit(status)  # all is written; a thread of XLA that outlives the interpreter can abort the process
    sys.exit(status)

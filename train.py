#!/usr/bin/env python3
"""Train an emotion classifier on NPZ features and report an honest, speaker-independent figure.

    python train.py DIR [--out RUN]
    python train.py DIR --predict RUN

What it does, in order: scan, pack, plan the folds, normalise, train all folds and the final model as one compiled
program, score the out-of-fold predictions, save the artifacts, print the report.

Axes: P population (K folds and the final model, S seeds each), N utterances, B batch, V validation utterances,
T frames, D features, W hidden width, C classes.
"""

import argparse
import ctypes
import dataclasses
import functools
import glob
import importlib.metadata
import importlib.util
import io
import json
import logging
import logging.handlers
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import check_data
import emotions
import stats
from check_data import demand, option

log = logging.getLogger("train")

EPOCHS_A_CALL = 4  # the host looks at the figures, prints and decides between calls
STEPS_AN_EPOCH = 16  # at least, for sets so small that whole batches would leave too few updates
BAD_STEPS_END = 5  # steps in a row with a loss or gradient that is not finite


# --- options ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(check_data.ScanOptions):
    """Every option of the program: its default, type and help; the command line is built from it."""

    out: str | None = option(None, "folder for the results (runs/<name of DIR>)")
    predict: str | None = option(None, "label the files of DIR with the model in this results folder, do not train")
    folds: str = option("5", f"number of folds, or {', '.join(emotions.SCHEMES)} or leave-one-speaker-out")
    seeds: int = option(5, "models for each fold; each validates on other speakers, and their logits are averaged")
    seed: int = option(0, "seed of everything that is random")
    epochs: int = option(40, "most epochs to train")
    patience: int = option(10, "epochs without a better validation loss after which a fold stops")
    batch: int = option(64, "most utterances in a batch; small sets get smaller ones, for 16 batches an epoch")
    width: int = option(256, "units of the hidden layer")
    dropout: float = option(0.5, "share of hidden units dropped while training")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW; a cosine takes it to zero")
    weight_decay: float = option(1e-2, "weight decay of AdamW")
    label_smoothing: float = option(0.1, "share of a label that is spread over all classes while training")
    clip: float = option(1.0, "largest global norm of the gradient")
    recompute_stats: bool = option(False, "compute the statistics in DIR again")

    def __post_init__(self):
        super().__post_init__()
        for name in ("out", "predict", "folds"):
            demand(getattr(self, name) != "", name, "more than an empty text")
        for name in ("seeds", "epochs", "patience", "batch", "width"):
            demand(getattr(self, name) >= 1, name, "at least 1")
        for name in ("learning_rate", "clip"):
            demand(0 < getattr(self, name) < math.inf, name, "above 0")
        for name in ("dropout", "label_smoothing"):
            demand(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        demand(0 <= self.weight_decay < math.inf, "weight_decay", "at least 0")
        demand(0 <= self.seed < 2**32, "seed", "from 0 to 4294967295")


def parse_config(arguments: list[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(
        description="Train an emotion classifier on a folder of NPZ features, or label one with a trained model."
    )
    check_data.add_options(parser, Config)
    return Config(**vars(parser.parse_args(arguments)))


# --- data ---------------------------------------------------------------------------------------------------------


class Dataset(NamedTuple):
    """All usable utterances, sorted by file name.

    `x` is the mean over the frames of each, float32, shape (N, D); `length` the number of frames; `label` indexes
    `classes`; `moments` are those of the frames of each utterance, stacked along N.
    """

    x: np.ndarray
    length: np.ndarray
    label: np.ndarray
    classes: tuple[str, ...]
    utterances: list[emotions.Utterance]
    moments: stats.Moments


def pack(scan: check_data.Scan) -> Dataset:
    """Turn a scan that kept its features into one block; the scan's own arrays are given up on the way."""
    classes = tuple(scan.count("emotion"))
    label = np.array([classes.index(record.utterance.emotion) for record in scan.records])
    frames, scan.features = scan.features, []
    moments, length = [], np.array([len(sequence) for sequence in frames])
    frames.reverse()
    while frames:
        moments.append(stats.Moments.of(frames.pop()))
    stacked = stats.Moments.stack(moments)
    utterances = [record.utterance for record in scan.records]
    return Dataset(stacked.mean.astype(np.float32), length, label, classes, utterances, stacked)


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


def _numbered(names: list[str]) -> np.ndarray:
    return np.unique(names, return_inverse=True)[1].reshape(-1)


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
        blocks = emotions.SCHEMES[scheme].test
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
        if scheme and scheme.next_block_validates and current < folds:
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


# --- the device ---------------------------------------------------------------------------------------------------


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
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    with _Complaints() as complaints:
        try:
            device = jax.devices()[0]
        except RuntimeError as error:  # only where the user's own JAX_PLATFORMS leaves no other choice
            raise check_data.UsageError(f"JAX_PLATFORMS={platforms}: {str(error).splitlines()[0]}") from None
    if platforms != "cpu" and device.platform == "cpu" and complaints.heard:
        reason = f"THE GPU COULD NOT BE USED: {check_data.printable(complaints.heard[0].strip().splitlines()[0])}"
    if device.platform == "cpu":
        return f"CPU ({os.cpu_count()} cores), because {reason or 'jax found nothing else'}"
    return f"{device.platform.upper()} {device.device_kind}" + (
        f" and {jax.device_count() - 1} more" if jax.device_count() > 1 else ""
    )


# --- the model ----------------------------------------------------------------------------------------------------


def build_network(width: int, dropout: float, classes: int) -> Any:
    """The flax classifier: one hidden layer, from (..., D) normalised features to (..., C) logits."""

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x, training):
            hidden = nn.relu(nn.Dense(width)(x))
            hidden = nn.Dropout(dropout, deterministic=not training)(hidden)
            return nn.Dense(classes)(hidden)

    return Classifier()


class Task(NamedTuple):
    """What is fixed for a run and known while the program is compiled."""

    config: Config
    network: Any
    classes: int
    batch: int
    steps: int  # batches in the longest epoch of any member


class Member(NamedTuple):
    """What one model of the population trains on; stacked along P for the program."""

    number: Any  # () its own branch of the random numbers
    train: Any  # (N,) bool
    validation: Any  # (V,) utterances, padded by -1
    mean: Any  # (D,)
    scale: Any  # (D,)
    class_weight: Any  # (C,)


class State(NamedTuple):
    """What training changes; stacked along P. `best` are the parameters of the best epoch so far."""

    params: Any
    opt_state: Any
    best: Any
    best_loss: Any  # () mean validation loss of the fold
    best_epoch: Any  # ()
    active: Any  # () bool: still training
    skipped: Any  # () steps that were not finite and changed nothing
    bad_run: Any  # () how many of them came in a row, until now
    worst_run: Any  # () and at most


def optimizer(config: Config, learning_rate: Any) -> Any:
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(learning_rate, weight_decay=config.weight_decay),
    )


def init_member(task: Task, root: Any, member: Member) -> State:
    key = jax.random.fold_in(root, member.number)
    params = task.network.init(key, member.mean[None], False)["params"]
    opt_state = optimizer(task.config, 0.0).init(params)
    zero = jnp.int32(0)
    return State(params, opt_state, params, jnp.float32(jnp.inf), zero, jnp.bool_(True), zero, zero, zero)


def cross_entropy(logits: Any, target: Any, weight: Any) -> Any:
    """Mean of the weighted cross-entropy; logits and target (B, C), weight (B,), 0 for padding."""
    loss = optax.softmax_cross_entropy(logits, target)
    return jnp.where(weight > 0, loss * weight, 0).sum() / jnp.maximum(weight.sum(), 1e-6)


def member_step(task: Task, member: Member, state: State, batch: tuple, key: Any, progress: Any) -> tuple[State, Any]:
    """One update of one member; a step whose loss or gradient is not finite changes nothing but the counters.

    `batch` is x (B, D), label (B,) and weight (B,); `progress` goes from 0 to 1 over the whole training.
    """
    x, label, weight = batch
    target = optax.smooth_labels(jax.nn.one_hot(label, task.classes), task.config.label_smoothing)

    def loss_of(params):
        logits = task.network.apply({"params": params}, (x - member.mean) / member.scale, True, rngs={"dropout": key})
        return cross_entropy(logits, target, weight)

    loss, gradient = jax.value_and_grad(loss_of)(state.params)
    norm = optax.tree.norm(gradient)
    # Before the clip: it would turn one NaN into all-NaN parameters, and an overflowed norm into a silent zero step.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    working = state.active & (weight.sum() > 0)
    learning_rate = task.config.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    updates, opt_state = optimizer(task.config, learning_rate).update(gradient, state.opt_state, state.params)
    new = (optax.apply_updates(state.params, updates), opt_state)
    params, opt_state = _where(working & finite, new, (state.params, state.opt_state))
    bad_run = jnp.where(working, jnp.where(finite, 0, state.bad_run + 1), state.bad_run)
    state = state._replace(
        params=params,
        opt_state=opt_state,
        skipped=state.skipped + (working & ~finite),
        bad_run=bad_run,
        worst_run=jnp.maximum(state.worst_run, bad_run),
    )
    return state, jnp.where(working, jnp.stack([loss, norm]), 0)


def _where(condition: Any, new: Any, old: Any) -> Any:
    """Choose between two trees; `condition` has the leading axes of every leaf."""

    def choose(a, b):
        return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b)

    return jax.tree.map(choose, new, old)


def member_epoch(
    task: Task, root: Any, x: Any, label: Any, epoch: Any, member: Member, state: State
) -> tuple[State, dict]:
    """One epoch of one member over its training utterances in a fresh random order, then its validation."""
    size, utterances = task.batch, len(label)
    key = jax.random.fold_in(jax.random.fold_in(root, member.number), epoch)
    order = jnp.argsort(jax.random.uniform(key, (utterances,)) + jnp.where(member.train, 0.0, 2.0))
    count = member.train.sum()
    batches = -(-count // size)

    def step(state, number):
        place = number * size + jnp.arange(size)
        chosen = order[jnp.minimum(place, utterances - 1)]
        weight = jnp.where(place < count, member.class_weight[label[chosen]], 0)
        batch = (x[chosen], label[chosen], weight)
        progress = (epoch + number / batches) / task.config.epochs
        return member_step(task, member, state, batch, jax.random.fold_in(key, number), progress)

    state, measured = jax.lax.scan(step, state, jnp.arange(task.steps))
    loss, norm = measured.sum(0) / batches
    validation_loss, validation_ua = validate(task, x, label, member, state.params)
    return state, {
        "loss": loss,
        "gradient_norm": norm,
        "validation_loss": validation_loss,
        "validation_ua": validation_ua,
    }


def validate(task: Task, x: Any, label: Any, member: Member, params: Any) -> tuple[Any, Any]:
    """Class-balanced cross-entropy and UA of one member on its validation utterances."""

    def add(total, chosen):  # chosen: (B,), -1 is padding
        real = chosen >= 0
        true = jax.nn.one_hot(jnp.where(real, label[chosen], -1), task.classes)  # (B, C), zeros for padding
        logits = task.network.apply({"params": params}, (x[chosen] - member.mean) / member.scale, False)
        loss = jnp.where(real, optax.softmax_cross_entropy(logits, true), 0)
        right = jnp.where(logits.argmax(-1) == label[chosen], 1.0, 0.0)
        return total + jnp.stack([true.sum(0), loss @ true, right @ true]), None

    blocks = member.validation.reshape(-1, task.batch)
    count, loss, right = jax.lax.scan(add, jnp.zeros((3, task.classes)), blocks)[0]
    present = (count > 0).sum()
    return (loss / jnp.maximum(count, 1)).sum() / present, (right / jnp.maximum(count, 1)).sum() / present


def keep_best(task: Task, state: State, validation_loss: Any, epoch: Any) -> State:
    """Keep the parameters of the best epoch and stop the folds that no longer improve.

    The seeds of a fold decide together, by their mean validation loss: each alone hears only a few speakers.
    """
    seeds = task.config.seeds
    fold_loss = jnp.repeat(validation_loss.reshape(-1, seeds).mean(1), seeds)  # (P,)
    better = state.active & (fold_loss < state.best_loss)
    best_epoch = jnp.where(better, epoch, state.best_epoch)
    return state._replace(
        best=_where(better, state.params, state.best),
        best_loss=jnp.where(better, fold_loss, state.best_loss),
        best_epoch=best_epoch,
        active=state.active & (epoch - best_epoch < task.config.patience) & (epoch + 1 < task.config.epochs),
    )


def population_epochs(
    task: Task, root: Any, x: Any, label: Any, members: Member, state: State, first: Any
) -> tuple[State, dict]:
    """Several epochs of the whole population; the measures have shape (epochs, P), and `active` before each epoch."""

    def one_epoch(state, epoch):
        active = state.active
        train = functools.partial(member_epoch, task, root, x, label, epoch)
        state, measures = jax.vmap(train)(members, state)
        state = keep_best(task, state, measures["validation_loss"], epoch)
        return state, measures | {"active": active, "skipped": state.skipped}

    return jax.lax.scan(one_epoch, state, first + jnp.arange(EPOCHS_A_CALL))


def all_logits(network: Any, params: Any, mean: Any, scale: Any, x: Any) -> Any:
    """Logits of every member for every utterance, (P, N, C); one member at a time, to keep memory small."""

    def of_one(member):
        params, mean, scale = member
        return network.apply({"params": params}, (x - mean) / scale, False)

    return jax.lax.map(of_one, (params, mean, scale))


# --- training -----------------------------------------------------------------------------------------------------


class TrainingError(Exception):
    """Training had to end; the text says why. Exit status 1."""


class Trained(NamedTuple):
    """The outcome: best parameters stacked along P, logits (K + 1, N, C) averaged over seeds, and the history."""

    params: Any
    logits: np.ndarray
    best_epoch: np.ndarray
    skipped: np.ndarray
    history: list[dict]


def make_task(dataset: Dataset, plan: Plan, config: Config) -> Task:
    longest = int(plan.train.sum(1).max())
    batch = min(config.batch, max(longest // STEPS_AN_EPOCH, 2))
    classes = len(dataset.classes)
    return Task(config, build_network(config.width, config.dropout, classes), classes, batch, -(-longest // batch))


def stack_members(dataset: Dataset, plan: Plan, stored: stats.Stored, batch: int) -> Member:
    mean, scale = member_statistics(dataset, plan, stored)
    longest = -(-int(plan.validation.sum(1).max()) // batch) * batch
    validation = np.full((len(plan.train), longest), -1, np.int32)
    for row, mask in zip(validation, plan.validation):
        row[: mask.sum()] = np.flatnonzero(mask)
    weight = class_weights(dataset.label, plan.train, len(dataset.classes))
    return Member(np.arange(len(plan.train)), plan.train, validation, mean, scale, weight)


def train(dataset: Dataset, plan: Plan, stored: stats.Stored, config: Config) -> Trained:
    """Train every fold and the final model together.

    Raises
    ------
    TrainingError
        If the steps of a member are not finite five times in a row, or its outputs are not.
    """
    task = make_task(dataset, plan, config)
    members, x, label, root = jax.device_put(
        (stack_members(dataset, plan, stored, task.batch), dataset.x, dataset.label, jax.random.key(config.seed))
    )
    state = jax.jit(jax.vmap(functools.partial(init_member, task, root)))(members)
    program = jax.jit(functools.partial(population_epochs, task), donate_argnums=4)
    history, started = [], time.perf_counter()
    for first in range(0, config.epochs, EPOCHS_A_CALL):
        state, measures = program(root, x, label, members, state, first)
        history += _rows(jax.device_get(measures), first, config, plan.folds)
        _end_if_broken(jax.device_get(state.worst_run), first, plan.folds, config)
        active = int(state.active.sum())
        _say_progress(history, active, len(plan.train), config.epochs, time.perf_counter() - started)
        if not active:
            break
    if not np.isfinite(state.best_loss).all():
        raise TrainingError("no epoch of a fold had a finite validation loss; look at the features with check_data.py")
    logits = jax.jit(functools.partial(all_logits, task.network))(state.best, members.mean, members.scale, x)
    if not np.isfinite(logits).all():
        raise TrainingError("the features of an utterance overflow the network; look at them with check_data.py")
    averaged = np.asarray(logits, np.float64).reshape(plan.folds + 1, config.seeds, *logits.shape[1:]).mean(1)
    return Trained(
        jax.device_get(state.best), averaged, np.asarray(state.best_epoch), np.asarray(state.skipped), history
    )


def _member_name(member: int, folds: int, seeds: int) -> str:
    return "final" if member // seeds == folds else str(member // seeds + 1)


def _rows(measures: dict[str, np.ndarray], first: int, config: Config, folds: int) -> list[dict]:
    """Rows of history.csv: one for each epoch and each member that was still training."""
    return [
        {"epoch": first + epoch + 1, "fold": _member_name(member, folds, config.seeds), "seed": member % config.seeds}
        | {name: float(values[epoch, member]) for name, values in measures.items() if name != "active"}
        for epoch, active in enumerate(measures["active"])
        for member in np.flatnonzero(active)
    ]


def _end_if_broken(worst_run: np.ndarray, first: int, folds: int, config: Config) -> None:
    broken = np.flatnonzero(worst_run >= BAD_STEPS_END)
    if broken.size:
        names = ", ".join(sorted({_member_name(member, folds, config.seeds) for member in broken}))
        raise TrainingError(
            f"epochs {first + 1} to {first + EPOCHS_A_CALL}: loss or gradient was NaN or Inf in {worst_run.max()}"
            f" steps in a row (fold {names}); nothing was saved. Try a smaller --learning-rate, and look at the"
            " features with check_data.py"
        )


def _say_progress(history: list[dict], active: int, population: int, epochs: int, seconds: float) -> None:
    epoch = history[-1]["epoch"]
    last = [row for row in history if row["epoch"] == epoch]
    loss, ua = (np.mean([row[name] for row in last]) for name in ("loss", "validation_ua"))
    left = f"at most {seconds / epoch * (epochs - epoch):.0f} s left" if active else "all have stopped"
    log.info(
        f"epoch {epoch}/{epochs}  loss {loss:.3f}  validation UA {ua:.3f}"
        f"  {active} of {population} models training  {seconds:.0f} s, {left}"
    )


# --- evaluation ---------------------------------------------------------------------------------------------------


def evaluate(dataset: Dataset, plan: Plan, trained: Trained, supplied: bool, config: Config) -> tuple[dict, np.ndarray]:
    """Score the out-of-fold predictions.

    Returns
    -------
    metrics, probability
        The contents of metrics.json that stem from the predictions, and the probabilities, shape (N, C), of the
        model that never saw the utterance's speaker.
    """
    classes, label = len(dataset.classes), dataset.label
    probability = stats.probabilities(trained.logits[plan.fold, np.arange(len(label))])
    predicted = probability.argmax(1)
    names, speaker = np.unique(plan.speaker, return_inverse=True)
    by_speaker = np.zeros((len(names), classes, classes), int)
    np.add.at(by_speaker, (speaker.reshape(-1), label, predicted), 1)
    confusion = by_speaker.sum(0)
    overall, intervals = stats.scores(confusion), stats.speaker_intervals(by_speaker, config.seed)
    metrics = _plain(overall) | {f"{name}_ci95": list(interval) for name, interval in intervals.items()}
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
        "speakers": {str(name): _plain(stats.scores(counts)) for name, counts in zip(names, by_speaker)}
        if plan.independent
        else {},
        "statistics": "supplied by the user" if supplied else "of the training speakers",
        "notes": plan.notes
        + ["your own statistics apply to every fold; if they were computed here, they know the test speakers"]
        * supplied,
    }
    return metrics, probability


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
        | _plain(stats.scores(confusion))
    )


def _plain(scores: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}


def _names(plan: Plan, mask: np.ndarray) -> list[str]:
    return np.unique(plan.speaker[mask]).tolist()


# --- artifacts ----------------------------------------------------------------------------------------------------


def flatten(params: Any, path: str = "params") -> dict[str, np.ndarray]:
    """Name every array of a tree of parameters by its path: `params/Dense_0/kernel`."""
    if not isinstance(params, dict):
        return {path: np.asarray(params, np.float32)}
    return {name: leaf for key in sorted(params) for name, leaf in flatten(params[key], f"{path}/{key}").items()}


def unflatten(arrays: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[name] = array
    return tree["params"]


def model_bytes(params: Any, statistics: stats.Statistics) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, mean=statistics.mean, scale=statistics.scale(), **flatten(params))
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
        "format": 1,
        "classes": list(dataset.classes),
        "dim": scan.dim,
        "pooling": "mean",
        "cuts_vectors": scan.cuts_vectors,
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
        "model.npz": model_bytes(final, stored.statistics),
        "metrics.json": stats.json_bytes(metrics),
    }
    stats.write_files(run, artifacts)


# --- the report ---------------------------------------------------------------------------------------------------


def report(metrics: dict, run: Path) -> str:
    """The closing report."""
    classes, folds = metrics["classes"], metrics["folds"]
    width = max(80, 20 + 7 * len(classes))
    console = Console(file=io.StringIO(), highlight=False, markup=False, width=width)
    say = functools.partial(console.print, soft_wrap=True)
    kind = "speaker-independent" if metrics["speaker_independent"] else "NOT speaker-independent"
    say(f"\n{kind} cross-validation, {metrics['fold_scheme']} ({len(folds)} folds):", end=" ")
    say(f"{metrics['n_utterances']} utterances, {metrics['n_speakers']} speakers, {len(classes)} classes\n")
    for name, title in (("ua", "UA (mean recall)"), ("wa", "WA (accuracy)"), ("macro_f1", "macro F1")):
        low, high = metrics[f"{name}_ci95"]
        chance = f"   chance {metrics['chance_ua']:.4f}" if name == "ua" else ""
        say(f"  {title:<17} {metrics[name]:.4f}   95 % interval {low:.4f} to {high:.4f}{chance}")
    console.print(_confusion_table(metrics))
    for title, text in _closing_lines(metrics):
        say(f"  {title:<17} {text}")
    say(f"  {'results':<17} {check_data.printable(str(run))}")
    return console.file.getvalue()


def _closing_lines(metrics: dict) -> Iterator[tuple[str, str]]:
    recalls = " ".join(f"{fold['ua']:.3f}" for fold in metrics["folds"][:10])
    yield "UA of the folds", recalls + " ..." * (len(metrics["folds"]) > 10)
    weakest = sorted(metrics["speakers"].items(), key=lambda item: item[1]["ua"])[:5]
    if weakest:
        named = [f"{check_data.printable(name)} {scores['ua']:.3f}" for name, scores in weakest]
        yield "weakest speakers", f"{', '.join(named)} (UA)"
    reasons = ", ".join(f"{code} {count}" for code, count in metrics["left_out"].items())
    why = f": {reasons}; skipped.csv names them" if reasons else ""
    yield "left out", f"{sum(metrics['left_out'].values())} files{why}"
    for note in metrics["notes"]:
        yield "note", note
    yield "device", metrics["device"]
    yield "versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    yield "seconds", f"{metrics['seconds']:.1f}"


def _confusion_table(metrics: dict) -> Table:
    """Rows are labels, columns predictions; class names are cut so that eight of them fit 80 columns."""
    names, confusion = metrics["classes"], metrics["confusion"]
    table = Table(
        title="label (row) against prediction (column)", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name[:6], justify="right", no_wrap=True)
    table.add_column("recall", justify="right")
    for name, counts in zip(names, confusion):
        table.add_row(name, *map(str, counts), f"{metrics['recall'][name]:.3f}")
    return table


# --- the program --------------------------------------------------------------------------------------------------


def _scan_progress() -> Callable[[int], None]:
    last = time.monotonic()

    def progress(files: int) -> None:
        nonlocal last
        if time.monotonic() - last > 2:
            last = time.monotonic()
            log.info(f"read {files} files")

    return progress


def _statistics(scan: check_data.Scan, dataset: Dataset, run: Path, config: Config) -> stats.Stored:
    """The statistics in DIR, or new ones over all data, saved there for future use."""
    stored = scan.stored
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
            stats.save(place, stored.statistics, scan.fingerprint)
            log.info(f"statistics: computed and saved in {check_data.printable(str(place))} for the final model;")
            log.info("            every fold has those of its own training speakers")
    constant = np.flatnonzero(stored.statistics.constant())
    if constant.size:
        named = ", ".join(map(str, constant[:10])) + " ..." * (constant.size > 10)
        log.info(f"statistics: {constant.size} dimensions do not vary and are not scaled: {named}")
    return stored


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


def run_training(config: Config) -> int:
    run = Path(config.out or Path("runs") / (Path(config.directory).resolve().name or "data"))
    _refuse_foreign(run, check_data.folder(config.directory))
    run.mkdir(parents=True, exist_ok=True)
    # Held back until the data are found good: a run that cannot start must not replace the log of one that could.
    held = logging.handlers.MemoryHandler(1 << 30, flushLevel=logging.CRITICAL, flushOnClose=False)
    log.addHandler(held)
    try:
        text = _scan_train_report(config, run, held)
        held.target.stream.write(text)
        sys.stdout.write(text)
    finally:
        log.removeHandler(held)
        if held.target:
            held.target.close()
    return 0


def _refuse_foreign(run: Path, directory: Path) -> None:
    """Keep results out of the data, and those of other data as they are."""
    name = check_data.printable(str(run))
    if run.resolve() == directory.resolve():
        raise check_data.UsageError(f"--out {name} is the folder of the features; choose another")
    try:
        data = json.loads((run / "config.json").read_text())["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if data != str(directory.resolve()):
        told = check_data.printable(str(data))
        raise check_data.UsageError(f"{name} holds the results for {told}; choose another --out, or remove them")


def _scan_train_report(config: Config, run: Path, held: logging.handlers.MemoryHandler) -> str:
    started = time.perf_counter()
    device = start_jax()
    log.info(f"device: {device}")
    given = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if value is not None and value is not False and value != ()
    }
    log.info("settings: " + check_data.printable(", ".join(f"{name} {value}" for name, value in given.items())))
    if not os.access(config.directory, os.W_OK):
        log.info(f"statistics: DIR is read-only, so they will be saved in {check_data.printable(str(run))}")
    scan = check_data.scan(config, keep_features=True, progress=_scan_progress())
    for line in (*check_data.findings_report(scan), *check_data.summary(scan)):
        log.info(line)
    for obstacle in check_data.obstacles(scan):
        raise check_data.UsageError(obstacle)
    dataset = pack(scan)
    plan = make_plan(dataset, config)
    stored = _statistics(scan, dataset, run, config)
    _say_plan(plan, config.seeds)
    held.setTarget(logging.FileHandler(run / "train.log", "w", encoding="utf-8", errors="backslashreplace"))
    held.flush()
    held.capacity = 0  # from now on each line at once
    trained = train(dataset, plan, stored, config)
    metrics, probability = evaluate(dataset, plan, trained, stored.supplied, config)
    metrics |= {"left_out": scan.left_out(), "device": device, "versions": _versions()}
    metrics |= {"seconds": round(time.perf_counter() - started, 1)}
    save_run(run, scan, dataset, plan, trained, stored, metrics, probability, config)
    return report(metrics, run)


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    return {"python": platform.python_version()} | packages


class Model(NamedTuple):
    """A trained model as its files tell it; the arrays have the seeds as their first axis."""

    classes: tuple[str, ...]
    dim: int
    cuts_vectors: bool
    statistics: tuple[np.ndarray, np.ndarray]
    params: dict


def load_model(run: Path) -> Model:
    """Read the model of a run.

    Raises
    ------
    check_data.UsageError
        If it is not there, damaged, or holds a NaN.
    """
    name = check_data.printable(str(run))
    try:
        described = json.loads((run / "config.json").read_text())
        arrays = check_data.read_arrays(run / "model.npz")
        mean, scale = arrays.pop("mean"), arrays.pop("scale")
        classes, dim = tuple(map(str, described["classes"])), int(described["dim"])
        cuts = bool(described["cuts_vectors"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise check_data.UsageError(f"{name} holds no finished model: {error}") from None
    kernel = arrays.get("params/Dense_0/kernel", np.zeros(0))
    seeds, width = kernel.shape[0], kernel.shape[-1]
    wanted = {
        "params/Dense_0/kernel": (seeds, dim, width),
        "params/Dense_0/bias": (seeds, width),
        "params/Dense_1/kernel": (seeds, width, len(classes)),
        "params/Dense_1/bias": (seeds, len(classes)),
    }
    if {path: array.shape for path, array in arrays.items()} != wanted or {mean.shape, scale.shape} != {(dim,)}:
        raise check_data.UsageError(f"{name}: config.json and model.npz do not belong together")
    if not all(np.isfinite(array).all() for array in (mean, scale, *arrays.values())):
        raise check_data.UsageError(f"{name}: the model holds NaN or Inf")
    return Model(classes, dim, cuts, (mean, scale), unflatten(arrays))


def run_prediction(config: Config) -> int:
    """Label the files of DIR with the final model of a run; labels in the names are not needed."""
    model = load_model(Path(config.predict))
    out = Path(config.out or Path(config.predict) / f"predict-{Path(config.directory).resolve().name}")
    if (out / "metrics.json").exists():
        told = check_data.printable(str(out))
        raise check_data.UsageError(f"{told} holds the results of a training run; choose another --out")
    log.info(f"device: {start_jax()}")
    wanted = dataclasses.replace(config, dim=model.dim)
    scan = check_data.scan(
        wanted, labelled=False, keep_features=True, cut_vectors=model.cuts_vectors, progress=_scan_progress()
    )
    for line in check_data.findings_report(scan):
        log.info(line)
    if not scan.records:
        raise check_data.UsageError(f"no file can be used; the model wants features {model.dim} wide")
    x = np.stack([stats.Moments.of(frames).mean for frames in scan.features]).astype(np.float32)
    seeds, width = model.params["Dense_0"]["bias"].shape
    network = build_network(width, 0.0, len(model.classes))
    mean, scale = (np.stack([array] * seeds) for array in model.statistics)
    logits = jax.jit(functools.partial(all_logits, network))(model.params, mean, scale, x)
    probability = stats.probabilities(np.asarray(logits, np.float64).mean(0))
    rows = [{"file": record.file} | _predicted(model.classes, row) for record, row in zip(scan.records, probability)]
    out.mkdir(parents=True, exist_ok=True)
    stats.write_files(out, {"predictions.csv": stats.csv_bytes(rows)})
    counts = ", ".join(f"{name} {(probability.argmax(1) == index).sum()}" for index, name in enumerate(model.classes))
    print(f"{len(rows)} files labelled, {len(scan.findings)} left out: {counts}")
    print(check_data.printable(str(out / "predictions.csv")))
    return 1 if scan.findings else 0


def main(arguments: list[str] | None = None) -> int:
    logging.raiseExceptions = False  # a closed stderr must not fill the screen with tracebacks
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        config = parse_config(arguments)
        status = run_training(config) if config.predict is None else run_prediction(config)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        raise
    except (check_data.UsageError, stats.DataError) as error:
        log.error("train.py: %s", error)
        return 2
    except TrainingError as error:
        log.error("train.py: %s", error)
        return 1
    except OSError as error:
        log.error("train.py: %s: %s", check_data.printable(str(error.filename)), error.strerror)
        return 1


if __name__ == "__main__":
    sys.exit(check_data.guarded(main))

"""What the numbers are: moments, the statistics files, the scores of a confusion matrix, and calibration.

Needs numpy alone. Axes: N utterances, G groups (speakers), D features, C classes, R resamples.
"""

import ast
import csv
import errno
import functools
import hashlib
import io
import json
import math
import os
import shutil
import stat
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

#: A standard deviation below this, relative to the dimension's mean and to the typical deviation, is none at all.
EPSILON = 1e-6

MEAN_FILE, STD_FILE, BINDING_FILE = "wav2vec_mean.npy", "wav2vec_std.npy", "wav2vec_stats.json"
_MAX_HEADER = 10_000  # bytes of an npy header; numpy's own limit


class DataError(ValueError):
    """A file that cannot be used: `code` is stable and for programs, the text is for people.

    Parameters
    ----------
    code
        Short name of the fault, one of the codes that README lists.
    reason
        What was found.
    """

    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


# --- reading and writing ------------------------------------------------------------------------------------------


# O_NONBLOCK: opening a FIFO that nobody writes would wait for ever.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_bytes(path: str | Path, limit: int = 1 << 30) -> bytes:
    """Read a regular file of at most `limit` bytes, without waiting for a FIFO that bears its name.

    Raises
    ------
    DataError
        `unreadable`, `not-a-file` or `too-large`.
    """
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError("unreadable", f"cannot be opened: {getattr(error, 'strerror', error)}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError("not-a-file", "is not a regular file")
        if status.st_size > limit:
            raise DataError("too-large", f"has {status.st_size} bytes, more than an utterance's features ever have")
        blob = os.read(descriptor, status.st_size + 1)
        while len(blob) < status.st_size and (more := os.read(descriptor, status.st_size + 1 - len(blob))):
            blob += more
        return blob
    except OSError as error:
        raise DataError("unreadable", f"cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


class NpyHeader(NamedTuple):
    dtype: np.dtype
    fortran_order: bool
    shape: tuple[int, ...]


@functools.lru_cache(maxsize=256)  # all files of a set share one header, and parsing it is the slow part
def _parse_npy_header(text: bytes) -> NpyHeader:
    try:
        with warnings.catch_warnings():  # damaged text may look like an old-fashioned escape
            warnings.simplefilter("ignore")
            return _evaluated_header(text)
    except Exception:  # literal_eval and np.dtype raise a dozen kinds; each of them means the same
        raise DataError("bad-npy-header", "the array's header is damaged") from None


def _evaluated_header(text: bytes) -> NpyHeader:
    fields = ast.literal_eval(text.decode("latin-1"))
    descr, fortran_order, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    well_formed = len(fields) == 3 and isinstance(fortran_order, bool) and isinstance(shape, tuple)
    if not well_formed or any(type(extent) is not int or extent < 0 for extent in shape):
        raise ValueError
    dtype = np.dtype(descr) if isinstance(descr, str) else np.dtype(object if "O" in repr(descr) else "V1")
    return NpyHeader(dtype, fortran_order, shape)


def npy_header(blob: bytes | memoryview) -> tuple[NpyHeader, int]:
    """Read the header of an array in npy format.

    Parameters
    ----------
    blob
        The array's bytes, or at least their beginning.

    Returns
    -------
    header, offset
        The parsed header, and where in `blob` the numbers begin.

    Raises
    ------
    DataError
        `bad-npy-header`.
    """
    if bytes(blob[:6]) != b"\x93NUMPY" or len(blob) < 12:
        raise DataError("bad-npy-header", "it does not begin like an array")
    major, minor = blob[6], blob[7]
    if (major, minor) not in ((1, 0), (2, 0), (3, 0)):
        raise DataError("bad-npy-header", f"npy format {major}.{minor} is not known")
    start, size = (
        (10, struct.unpack_from("<H", blob, 8)[0]) if major == 1 else (12, struct.unpack_from("<I", blob, 8)[0])
    )
    if size > _MAX_HEADER or start + size > len(blob):
        raise DataError("bad-npy-header", f"the array's header claims {size} bytes")
    return _parse_npy_header(bytes(blob[start : start + size])), start + size


def check_size(header: NpyHeader, size: int) -> None:
    """Make sure that a header declares float numbers that fill `size` bytes exactly.

    Raises
    ------
    DataError
        `not-float` or `size-mismatch`.
    """
    if header.dtype.kind != "f" or header.dtype.itemsize > 8:
        kind = "pickled Python objects" if header.dtype.hasobject else f"{header.dtype} numbers"
        raise DataError("not-float", f"the array holds {kind}, not float16, float32 or float64")
    declared = math.prod(header.shape) * header.dtype.itemsize
    if declared != size:
        raise DataError("size-mismatch", f"shape {header.shape} needs {declared} bytes and there are {size}")


def npy_array(blob: bytes | memoryview) -> np.ndarray:
    """Turn the bytes of an npy file into an array that shares their memory; nothing is unpickled.

    Raises
    ------
    DataError
        `bad-npy-header`, `not-float` or `size-mismatch`. The numbers must fill the bytes exactly.
    """
    header, offset = npy_header(blob)
    check_size(header, len(blob) - offset)
    count = math.prod(header.shape)
    flat = np.frombuffer(blob, header.dtype, count, offset)
    return flat.reshape(header.shape, order="F" if header.fortran_order else "C")


def write_files(folder: Path, blobs: dict[str, bytes | list]) -> None:
    """Replace files together: all are written beside the old ones first, then renamed over them in the given order.

    A file may be given as a list of buffers. On a full disk the old ones are whole and nothing else is left.

    Raises
    ------
    OSError
        With its errno and the name of the file, and on a full disk what is needed and what is free.
    """
    temporary = {name: folder / f".{name}.tmp" for name in blobs}
    name = ""
    try:
        for name, blob in blobs.items():
            with open(temporary[name], "wb") as file:
                file.writelines(_parts(blob))
                file.flush()
                os.fsync(file.fileno())
        for name in blobs:
            os.replace(temporary[name], folder / name)
    except BaseException as error:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            room = ""
            if error.errno == errno.ENOSPC:
                needed = sum(memoryview(part).nbytes for blob in blobs.values() for part in _parts(blob))
                room = f": {needed} bytes are needed and {shutil.disk_usage(folder).free} are free"
            raise OSError(error.errno, f"{error.strerror}{room}", str(folder / name)) from None
        raise
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _parts(blob: bytes | list) -> list:
    return [blob] if isinstance(blob, bytes) else blob


_CHECKED = b"arrays, checked 1\n"
_CHECKED_KINDS = ("float32", "int32", "bool")


def checked_arrays(described: dict, arrays: dict[str, np.ndarray]) -> list:
    """Arrays and what is to be known of them as one file with a checksum, in buffers for `write_files`.

    A line of JSON, the numbers of each array and a SHA-256 of all that; unlike in a zip archive no byte is left
    unchecked, and no array is copied.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    listing = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    head = json.dumps({"described": described, "arrays": listing}).encode() + b"\n"
    parts = [_CHECKED, head, *(array.reshape(-1).view(np.uint8) for array in arrays.values())]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return [*parts, digest.digest()]


def read_checked_arrays(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read what `checked_arrays` made: what is to be known, and the arrays.

    Raises
    ------
    DataError
        `unreadable`, `not-a-file`, or `damaged`: the checksum is another one, or the file is none of ours.
    """
    try:
        blob = read_bytes(path, 1 << 40)
    except MemoryError:
        raise DataError("damaged", "is larger than any memory") from None
    body = memoryview(blob)[:-32]
    if not blob.startswith(_CHECKED) or hashlib.sha256(body).digest() != blob[-32:]:
        raise DataError("damaged", f"is damaged: the checksum of its {len(blob)} bytes does not match")
    end = blob.find(b"\n", len(_CHECKED)) + 1
    try:
        head = json.loads(bytes(body[len(_CHECKED) : end]))
        arrays, place = {}, end
        for name, kind, shape in head["arrays"]:
            dtype = np.dtype(kind if kind in _CHECKED_KINDS else "V")
            size = math.prod(shape) * dtype.itemsize
            arrays[str(name)] = np.frombuffer(body[place : place + size], dtype).reshape(shape)
            place += size
        if place != len(body):
            raise ValueError("bytes are left over")
        return dict(head["described"]), arrays
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError("damaged", f"is none of this program's: {error}") from None


def npy_bytes(array: np.ndarray) -> bytes:
    """The npy file of an array, as bytes: np.save straight into a file destroys the old one on a full disk."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def csv_bytes(rows: list[dict], columns: tuple[str, ...] = ()) -> bytes:
    """A table as CSV in UTF-8, one line for each row; `columns` name the header where there may be no row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns or tuple(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def json_bytes(content: dict) -> bytes:
    """Valid JSON: what is not a finite number becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return (json.dumps(plain(content), indent=2, allow_nan=False) + "\n").encode()


# --- moments and statistics ---------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Count, mean and summed squared deviation of frames, in float64; `mean` and `m2` have shape (..., D)."""

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of(cls, frames: np.ndarray) -> "Moments":
        """Moments of `frames`, shape (T, D); every frame weighs the same."""
        frames = np.asarray(frames, np.float64)
        mean = frames.mean(0)
        return cls(np.float64(len(frames)), mean, np.square(frames - mean).sum(0))

    @classmethod
    def stack(cls, parts: list["Moments"]) -> "Moments":
        """Stack G moments along a new first axis."""
        return cls(*map(np.stack, zip(*parts)))

    def merged(self, keep: np.ndarray | slice = slice(None)) -> "Moments":
        """Merge the stacked groups that `keep` (shape (G,), bool) selects into one.

        Chan, Golub and LeVeque 1983, in its form for many groups: one pass over squares would lose every digit of
        a variance that is small beside the mean.
        """
        count, mean, m2 = self.count[keep], self.mean[keep], self.m2[keep]
        total = count.sum()
        centre = (count[:, None] * mean).sum(0) / total
        return Moments(total, centre, (m2 + count[:, None] * np.square(mean - centre)).sum(0))

    def statistics(self) -> "Statistics":
        return Statistics(self.mean.astype(np.float32), np.sqrt(self.m2 / self.count).astype(np.float32))


class RunningMoments:
    """Moments of frames that come a few at a time; small arrays are gathered first: a call costs more than its sums."""

    def __init__(self):
        self._parts: list[Moments] = []
        self._waiting: list[np.ndarray] = []
        self._rows = 0

    def add(self, frames: np.ndarray) -> None:
        """Take in frames of shape (T, D)."""
        self._waiting.append(frames)
        self._rows += len(frames)
        if self._rows >= 256:
            self._merge()

    def _merge(self) -> None:
        if self._waiting:
            self._parts.append(Moments.of(np.concatenate(self._waiting)))
            self._waiting, self._rows = [], 0
        if len(self._parts) > 1:
            self._parts = [Moments.stack(self._parts).merged()]

    def merged(self) -> Moments:
        self._merge()
        return self._parts[0]


class Statistics(NamedTuple):
    """Mean and standard deviation of each feature, float32, shape (D,)."""

    mean: np.ndarray
    std: np.ndarray

    def constant(self) -> np.ndarray:
        """Which dimensions do not vary, shape (D,), bool."""
        varying = self.std[self.std > 0]
        typical = np.median(varying) if varying.size else 1
        return self.std <= EPSILON * np.maximum(np.abs(self.mean), typical)

    def scale(self) -> np.ndarray:
        """What to divide by: the std, but 1 where it is nothing, since 1e-8 would turn a drift of 1e-3 into 1e5."""
        return np.where(self.constant(), np.float32(1), self.std)


class Stored(NamedTuple):
    """Statistics found in a folder. `supplied` tells whether the user put them there, `fingerprint` for what data."""

    statistics: Statistics
    supplied: bool
    fingerprint: str | None


def _read_statistic(path: Path) -> np.ndarray:
    try:
        array = npy_array(read_bytes(path))
    except DataError as error:
        raise DataError("bad-statistics", f"{path.name}: {error.reason}") from None
    if array.ndim != 1 or not array.size:
        raise DataError(
            "bad-statistics", f"{path.name} has shape {array.shape}; one number for each feature, shape (D,), is needed"
        )
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise DataError("bad-statistics", f"{path.name} holds {(~np.isfinite(array)).sum()} values that are NaN or Inf")
    return array


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def load(folder: Path) -> Stored | None:
    """Load `wav2vec_mean.npy` and `wav2vec_std.npy`; None if they are not there, or if our own saving was cut off.

    The json beside them names the hashes of what was computed here, and for which files. A pair without it, or one
    that it does not know, was supplied by the user.

    Raises
    ------
    DataError
        `bad-statistics`: one of the pair is missing or was exchanged alone, or they hold anything but finite numbers
        of one width.
    """
    paths = [folder / MEAN_FILE, folder / STD_FILE]
    there = [path for path in paths if os.path.lexists(path)]
    binding = _binding(folder)
    ours = [path for path in there if _sha256(_bytes_of(path)) == binding["sha256"].get(path.name)]
    if not there or (len(there) == len(ours) == 1):
        return None
    if len(there) == 1:
        missing = (set(paths) - set(there)).pop().name
        raise DataError("bad-statistics", f"{there[0].name} is there but {missing} is not; add it, or delete the other")
    if len(ours) == 1:
        foreign = (set(paths) - set(ours)).pop().name
        advice = f"supply both files, or delete {foreign} to have both computed"
        raise DataError("bad-statistics", f"{ours[0].name} was computed here and {foreign} was not; {advice}")
    mean, std = map(_read_statistic, paths)
    if mean.shape != std.shape:
        raise DataError("bad-statistics", f"{MEAN_FILE} has {mean.size} numbers and {STD_FILE} has {std.size}")
    if (std < 0).any():
        raise DataError("bad-statistics", f"{STD_FILE} holds {(std < 0).sum()} negative values")
    return Stored(Statistics(mean, std), not ours, binding["fingerprint"] if ours else None)


def _bytes_of(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except DataError as error:
        raise DataError("bad-statistics", f"{path.name} {error.reason}") from None


def _binding(folder: Path) -> dict:
    try:
        if not os.path.lexists(folder / BINDING_FILE):
            return {"sha256": {}, "fingerprint": ""}
        binding = json.loads(_bytes_of(folder / BINDING_FILE))
        return {"sha256": dict(binding["sha256"]), "fingerprint": str(binding["fingerprint"])}
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            "bad-statistics", f"{BINDING_FILE} is damaged; delete it if the two files are yours, else all three"
        ) from None


def save(folder: Path, statistics: Statistics, fingerprint: str) -> None:
    """Save the pair and the json that binds it.

    The json goes first and names the hashes of the files to come, after an older pair is gone: wherever we are cut
    off, what is there is known as ours and incomplete, and is computed again. Written last, a crash just before it
    would leave a pair that looks like the user's own.
    """
    blobs = {MEAN_FILE: npy_bytes(statistics.mean), STD_FILE: npy_bytes(statistics.std)}
    for name in blobs:
        (folder / name).unlink(missing_ok=True)
    binding = {"sha256": {name: _sha256(blob) for name, blob in blobs.items()}, "fingerprint": fingerprint}
    write_files(folder, {BINDING_FILE: json_bytes(binding)})
    write_files(folder, blobs)


def rank_correlation(x: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each row of `x`, (N, D), with `reference`, (D,): shape (N,); equals share a rank.

    An encoder's embeddings share a mean that is large beside their deviations. The order of its dimensions is like a
    signature, which another scale or a few huge dimensions do not change.
    """
    rank = np.stack([_ranks(row) for row in (*x, reference)])
    rank -= (rank.shape[1] - 1) / 2
    size = np.sqrt(np.square(rank).sum(1))
    return rank[:-1] @ rank[-1] / np.maximum(size[:-1] * size[-1], 1e-9)


def _ranks(values: np.ndarray) -> np.ndarray:
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    in_order = values[order]
    if (in_order[1:] == in_order[:-1]).any():
        ranks = (np.searchsorted(in_order, values) + np.searchsorted(in_order, values, "right") - 1) / 2
    return ranks


# --- scores -------------------------------------------------------------------------------------------------------


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def balanced_cross_entropy(logits: np.ndarray, label: np.ndarray) -> float:
    """Mean over the classes present of the mean cross-entropy, in nats; logits (N, C), label (N,)."""
    peak = logits.max(1, keepdims=True)
    loss = np.log(np.exp(logits - peak).sum(1)) + peak[:, 0] - logits[np.arange(len(label)), label]
    count = np.bincount(label)
    return float((np.bincount(label, loss)[count > 0] / count[count > 0]).mean())


def confusion_matrix(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count label (rows) against prediction (columns), shape (C, C)."""
    return np.bincount(label * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of confusion matrices.

    Parameters
    ----------
    confusion
        Shape (..., C, C), rows are labels.

    Returns
    -------
    dict
        `ua` (unweighted accuracy: the mean recall), `wa` (weighted accuracy: the share that is right) and `macro_f1`,
        as fractions of shape (...). A class without a labelled utterance is left out of the means.
    """
    confusion = np.asarray(confusion, np.float64)
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    labelled, predicted = confusion.sum(-1), confusion.sum(-2)
    present = labelled > 0
    classes = present.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = np.where(present, right / labelled, 0).sum(-1) / classes
        f1 = np.where(present, 2 * right / (labelled + predicted), 0).sum(-1) / classes
        return {"ua": recall, "wa": right.sum(-1) / labelled.sum(-1), "macro_f1": f1}


def majority_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """The `scores` of always answering the most frequent label; `ua` is 1 / C, however frequent that label is.

    Parameters
    ----------
    confusion
        Shape (C, C), rows are labels.
    """
    labelled = np.sum(confusion, 1)
    always = np.zeros_like(confusion)
    always[:, labelled.argmax()] = labelled
    return scores(always)


def group_confusions(
    group: list[str], label: np.ndarray, predicted: np.ndarray, classes: int
) -> tuple[list[str], np.ndarray]:
    """The names of the groups, sorted, and the confusion matrix of each, shape (G, C, C).

    Parameters
    ----------
    group, label, predicted
        Group, class and predicted class of each utterance, shape (N,).
    """
    names, member = np.unique(group, return_inverse=True)
    confusions = np.zeros((len(names), classes, classes), int)
    np.add.at(confusions, (member.reshape(-1), label, predicted), 1)
    return names.tolist(), confusions


def speaker_intervals(confusions: np.ndarray, seed: int, resamples: int = 2000) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the scores from a bootstrap over speakers.

    Utterances of one speaker are alike, so resampling them one by one would promise too much.

    Parameters
    ----------
    confusions
        One confusion matrix for each speaker, shape (G, C, C).
    """
    groups = len(confusions)
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), resamples)  # (R, G)
    resampled = np.tensordot(drawn, confusions, 1)  # (R, C, C)
    return {name: tuple(np.nanpercentile(values, (2.5, 97.5)).tolist()) for name, values in scores(resampled).items()}


# --- calibration --------------------------------------------------------------------------------------------------


def reliability(probability: np.ndarray, label: np.ndarray, bins: int = 15) -> dict[str, np.ndarray]:
    """Confidence against accuracy in bins of equal width.

    The confidence of a prediction is its largest probability. A bin holds those above its lower edge and up to its
    upper one.

    Parameters
    ----------
    probability
        Shape (N, C).
    label
        Class of each utterance, shape (N,).

    Returns
    -------
    dict
        `low` and `high` edges, the count `n`, mean `confidence` and `accuracy` of each bin, shape (bins,); the last
        two are NaN in an empty bin.
    """
    confidence, right = probability.max(1), probability.argmax(1) == label
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    n = np.bincount(place, minlength=bins)
    edges = np.arange(bins + 1) / bins
    with np.errstate(invalid="ignore"):
        means = {name: np.bincount(place, x, bins) / n for name, x in (("confidence", confidence), ("accuracy", right))}
    return {"low": edges[:-1], "high": edges[1:], "n": n} | means


def expected_calibration_error(probability: np.ndarray, label: np.ndarray, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over the bins of `reliability`, weighted by their counts; a fraction.

    Naeini, Cooper and Hauskrecht 2015, "Obtaining well calibrated probabilities using Bayesian binning"; 15 bins as
    in Guo, Pleiss, Sun and Weinberger 2017, "On calibration of modern neural networks".
    """
    found = reliability(probability, label, bins)
    return float(np.nansum(found["n"] * np.abs(found["accuracy"] - found["confidence"])) / found["n"].sum())


# --- weighing two parts of a model ----------------------------------------------------------------------------------

WEIGHTS = tuple(0.02 * 1.25**step for step in range(24))  # of logits, to choose from: 0.02 to 3.4
TRUST = 4  # power of the validation loss by which the hidden layer and the linear part weigh against each other


class Blend(NamedTuple):
    """How much hidden layer and linear part weigh in a fold, and which shrinkage the linear part has.

    The logits are those weighted parts over `temperature`, which calibrates them.
    """

    shrinkage: int
    hidden: float
    linear: float
    temperature: float


def choose_blend(hidden: np.ndarray, linear: np.ndarray, heard: list[np.ndarray], label: np.ndarray) -> Blend:
    """Weigh the two parts by the validation utterances of the seeds of a fold.

    Each part gets the weight at which it alone is as sure of itself as it may be, so that one that knows nothing
    weighs nothing, and weighs the more the smaller its loss is; then the sum gets its weight. The best weights of the
    two together would be those of one seed, and the seeds differ more in the hidden layer, which gains more from
    their mean.

    Parameters
    ----------
    hidden, linear
        Logits of the seeds, shapes (S, N, C) and (S, shrinkages, N, C).
    heard
        The validation utterances of each seed.
    label
        Shape (N,).
    """

    def best(logits, weights):
        losses = [
            np.mean([balanced_cross_entropy(weight * own[k], label[k]) for own, k in zip(logits, heard)])
            for weight in weights
        ]
        return min(losses), weights[int(np.argmin(losses))]

    found = [best(linear[:, number], (0.0, *WEIGHTS)) for number in range(linear.shape[1])]
    shrinkage = min(range(len(found)), key=lambda number: found[number][0])
    (hidden_loss, a), (linear_loss, b) = best(hidden, (0.0, *WEIGHTS)), found[shrinkage]
    share = 1 / (1 + (hidden_loss / max(linear_loss, 1e-9)) ** TRUST)
    a, b = 2 * share * a, 2 * (1 - share) * b
    both = best(a * hidden + b * linear[:, shrinkage], WEIGHTS)[1]
    return Blend(shrinkage, a, b, 1 / both)

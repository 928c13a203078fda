"""Strict file formats, feature statistics, scores, calibration, and the linear part of a model.

Needs only numpy. Axes: N utterances, G groups (speakers), S seeds, T frames, D features, C classes, R resamples.
"""

import ast
import bisect
import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import struct
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np

#: A standard deviation of at most this share of the dimension's mean, or of the typical deviation, counts as zero: it
#: is rounding noise, and dividing by it would turn the smallest drift into a huge feature.
EPSILON = 1e-6

#: Statistics that differ by more are of other features. Those of frames may be used for means, which vary by a fifth.
MAX_RATIO = 20

MEAN_FILE, STD_FILE, MANIFEST_FILE = "wav2vec_mean.npy", "wav2vec_std.npy", "wav2vec_stats.json"
_MAX_HEADER = 10_000  # bytes of an npy header; numpy's own limit


class DataError(ValueError):
    """A file that cannot be used: a short, stable `code` (see docs/reference.md), and the `reason` for people."""

    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


# --- reading and writing ------------------------------------------------------------------------------------------


# O_NONBLOCK: opening a FIFO without a writer would block for ever.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_fault(error: OSError | ValueError, what: str) -> DataError:
    """The fault of a file that cannot be read: a failing device is no matter of rights."""
    failing = getattr(error, "errno", None) in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
    return DataError("io-error" if failing else "unreadable", f"{what}: {getattr(error, 'strerror', error)}")


def read_bytes(path: str | Path, limit: int = 1 << 30) -> bytes:
    """Read a regular file of at most `limit` bytes; a FIFO of that name never blocks.

    Raises
    ------
    DataError
        `unreadable`, `io-error`, `not-a-file` or `too-large`.
    """
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise read_fault(error, "cannot be opened") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError("not-a-file", "is not a regular file")
        if status.st_size > limit:
            raise DataError("too-large", f"has {status.st_size} bytes; at most {limit} are read")
        # One byte more than fstat reported: a file that grows meanwhile must fail its size check, not pass cut off.
        wanted = status.st_size + 1
        blob = os.read(descriptor, wanted)
        # A single call may return less than the whole file; on Linux it returns at most 2 GiB.
        while len(blob) < status.st_size:
            more = os.read(descriptor, wanted - len(blob))
            if not more:  # the file has shrunk meanwhile
                break
            blob += more
        return blob
    except OSError as error:
        raise read_fault(error, "cannot be read") from None
    finally:
        os.close(descriptor)


class NpyHeader(NamedTuple):
    """Type and shape that the header of an npy file declares."""

    dtype: np.dtype
    fortran_order: bool
    shape: tuple[int, ...]


# Most files of a data set have the same header, and parsing it is the slow part of reading a small file.
@functools.lru_cache(maxsize=256)
def _parse_npy_header(text: bytes) -> NpyHeader:
    try:
        with warnings.catch_warnings():  # damaged text may look like an old-fashioned escape
            warnings.simplefilter("ignore")
            return _evaluated_header(text)
    except Exception:  # literal_eval and np.dtype raise a dozen kinds of exception, all for damaged text
        raise DataError("bad-npy-header", "the array's header is damaged") from None


def _evaluated_header(text: bytes) -> NpyHeader:
    fields = ast.literal_eval(text.decode("latin-1"))
    descr = fields["descr"]
    fortran_order = fields["fortran_order"]
    shape = fields["shape"]
    if len(fields) != 3 or not isinstance(fortran_order, bool) or not isinstance(shape, tuple):
        raise ValueError
    for extent in shape:
        if type(extent) is not int or not 0 <= extent < 1 << 63:  # isinstance would accept True
            raise ValueError
    if len(shape) > 32:  # as older versions of numpy; the new ones have 64
        raise ValueError
    if not isinstance(descr, str):
        # A list describes a structured type. It is never accepted; only the reason depends on whether it has objects.
        descr = object if "O" in repr(descr) else "V1"
    return NpyHeader(np.dtype(descr), fortran_order, shape)


def npy_header(blob: bytes | memoryview) -> tuple[NpyHeader, int]:
    """Parse the header of an array in npy format, of which `blob` is at least the beginning.

    Returns
    -------
    header, offset
        The parsed header, and the offset of the numbers in `blob`.

    Raises
    ------
    DataError
        `bad-npy-header`.
    """
    if bytes(blob[:6]) != b"\x93NUMPY" or len(blob) < 12:
        raise DataError("bad-npy-header", "it does not start with the npy signature")
    major, minor = blob[6], blob[7]
    if (major, minor) not in ((1, 0), (2, 0), (3, 0)):
        raise DataError("bad-npy-header", f"npy format {major}.{minor} is unknown")
    # Version 1 stores the length of the text in two bytes, the later ones in four.
    start, length_format = (10, "<H") if major == 1 else (12, "<I")
    (length,) = struct.unpack_from(length_format, blob, 8)
    end = start + length
    if length > _MAX_HEADER or end > len(blob):
        raise DataError("bad-npy-header", f"the array's header claims {length} bytes")
    return _parse_npy_header(bytes(blob[start:end])), end


def check_size(header: NpyHeader, size: int, kinds: str = "f") -> None:
    """Check that a header declares numbers of the given kinds (numpy's letters) that fill `size` bytes exactly.

    Raises
    ------
    DataError
        `not-float` or `size-mismatch`.
    """
    dtype = header.dtype
    # Only texts may be longer than 8 bytes: longdouble differs between machines.
    if dtype.kind not in kinds or (dtype.itemsize > 8 and dtype.kind != "U"):
        content = "pickled Python objects" if dtype.hasobject else f"{str(dtype)[:40]} numbers"
        if dtype == "V2":
            content = "bfloat16 or other numbers without a type"
        raise DataError("not-float", f"the array holds {content}, not float16, float32 or float64")
    declared = math.prod(header.shape) * dtype.itemsize
    if declared != size:
        needed = declared if declared < 10**30 else "more than 10^30"
        raise DataError("size-mismatch", f"shape {str(header.shape)[:60]} needs {needed} bytes and there are {size}")


def npy_array(blob: bytes | memoryview, kinds: str = "f") -> np.ndarray:
    """Turn the bytes of an npy file into an array that shares their memory; nothing is unpickled.

    The numbers must fill the file exactly. Their `kinds`, in numpy's letters, are floats, unless it is a checkpoint.

    Raises
    ------
    DataError
        `bad-npy-header`, `not-float` or `size-mismatch`.
    """
    header, offset = npy_header(blob)
    check_size(header, len(blob) - offset, kinds)
    count = math.prod(header.shape)
    order = "F" if header.fortran_order else "C"
    try:
        flat = np.frombuffer(blob, header.dtype, count, offset)
        return flat.reshape(header.shape, order=order)
    except (ValueError, OverflowError):  # extents beyond numpy's integers beside one of 0; texts of no characters
        raise DataError("bad-npy-header", f"numpy has no arrays of shape {str(header.shape)[:60]}") from None


def write_files(folder: Path, blobs: dict[str, bytes | memoryview]) -> None:
    """Replace files together: write all of them beside the old ones first, then rename them in the given order.

    On a full disk the old files stay intact and no temporary file remains. What a kill leaves of a temporary file is
    removed by the next call that writes a file of that name. Links are replaced, never followed, and several processes
    may write the same files: they wait for each other.

    Raises
    ------
    OSError
        With its errno and the name of the file, and on a full disk the bytes needed and free.
    """
    with _locked(folder, blobs):
        _replace_files(folder, blobs)


@contextlib.contextmanager
def _locked(folder: Path, written: Iterable[str] = ()) -> Iterator[None]:
    """Keep other processes of ours from writing into a folder, and first clean up for the files to be written.

    Where the file system has no locks, nothing is removed: another process may be writing it.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a missing folder is reported by what follows
                # The lock of the folder itself needs no file in it, and ends with the process.
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if written:
                    remove_temporary(folder, written)
        yield


def remove_temporary(folder: Path, names: Iterable[str]) -> None:
    """Remove what kills have left of the temporary files for these names; nobody else may be writing them."""
    with contextlib.suppress(OSError):
        for file in os.listdir(folder):
            match = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}\.tmp", file)
            if match and match[1] in names:
                (folder / file).unlink()


def _replace_files(folder: Path, blobs: dict[str, bytes | memoryview]) -> None:
    # The leading dot keeps half-written files out of listings and patterns such as *.npz. A name that can be foreseen
    # could have been taken: by another process, or in a stranger's folder by a link to a file of the user.
    temporary = {name: folder / f".{name}.{secrets.token_hex(8)}.tmp" for name in blobs}
    name = ""
    try:
        for name, blob in blobs.items():
            _write_synced(temporary[name], blob)
        for name in blobs:
            os.replace(temporary[name], folder / name)
    except BaseException as error:  # Ctrl-C included
        for path in temporary.values():
            with contextlib.suppress(OSError):  # or it would hide the error itself
                path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = f"{error.strerror}"
            if error.errno == errno.ENOSPC:
                reason += _space_reason(folder, blobs)
            raise OSError(error.errno, reason, str(folder / name)) from None
        raise
    if os.name == "posix":  # Windows cannot open a folder
        _sync_folder(folder)


def _space_reason(folder: Path, blobs: dict[str, bytes | memoryview]) -> str:
    """The bytes needed and free, unless it was not for lack of bytes, but of inodes for example."""
    block = 4096  # files take whole blocks
    needed = sum(-(-memoryview(blob).nbytes // block) * block for blob in blobs.values())
    free = shutil.disk_usage(folder).free
    return f": {needed} bytes are needed and {free} are free" if needed > free else ""


def _write_synced(path: Path, blob: bytes | memoryview) -> None:
    with open(path, "xb") as file:  # O_EXCL: a new file, never one that exists or that a link points to
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())  # before the rename, or a power loss could leave an empty file under the final name


def _sync_folder(folder: Path) -> None:
    """Make renames in the folder durable; some network file systems cannot, and then the synced files must do."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        os.close(descriptor)


def npy_bytes(array: np.ndarray) -> bytes:
    """The npy file of an array, as bytes: np.save straight into a file destroys the old one on a full disk."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npz_bytes(arrays: dict[str, np.ndarray]) -> memoryview:
    """The NPZ file of named arrays, stored without compression; zip protects each of them with a CRC-32."""
    if any(np.asarray(array).dtype.hasobject for array in arrays.values()):  # numpy 2.1 cannot be told not to pickle
        raise ValueError("Object arrays cannot be saved without pickle")
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getbuffer()


def csv_bytes(rows: list[dict], columns: tuple[str, ...] = ()) -> bytes:
    """A table as CSV in UTF-8, one line per row; `columns` is the header of a table that may be empty."""
    lines = []
    # The module quotes a carriage return only if it is part of the line terminator, and writes a row with each call.
    sink = types.SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
    writer = csv.DictWriter(sink, columns or tuple(rows[0]), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    # A file name that is not UTF-8 holds lone surrogates, which only an escape can represent.
    return "".join(lines).encode("utf-8", "backslashreplace")


def json_bytes(content: dict) -> bytes:
    """Valid JSON: NaN and Inf, which JSON lacks, become null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    text = json.dumps(plain(content), indent=2, allow_nan=False)
    return (text + "\n").encode()


# --- moments and statistics ---------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Count, mean and summed squared deviation of frames; `mean` and `m2` have shape (..., D), and sums are in float64.

    Those of single frames may be their own float32 values, with an `m2` of (..., 1) zeros.
    """

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of(cls, frames: np.ndarray) -> "Moments":
        """Moments of `frames`, shape (T, D); all frames have equal weight."""
        frames = np.asarray(frames, np.float64)
        count = np.float64(len(frames))
        mean = frames.mean(0)
        m2 = np.square(frames - mean).sum(0)
        return cls(count, mean, m2)

    @classmethod
    def stack(cls, parts: list["Moments"]) -> "Moments":
        """Stack the moments of G groups along a new first axis."""
        fields = zip(*parts)
        return cls(*map(np.stack, fields))

    def merged(self, keep: np.ndarray | slice = slice(None)) -> "Moments":
        """Merge the stacked groups selected by `keep`, shape (G,), bool.

        Chan, Golub and LeVeque 1983, for many groups at once. A single pass over sums of squares would lose every
        digit of a variance that is small beside the mean.
        """
        count = self.count[keep]
        total = count.sum()
        blocks = []
        # Some columns at a time: float64 copies of all would take several times the memory of the features.
        for start in range(0, self.mean.shape[1], 2048):
            columns = slice(start, start + 2048)
            mean = self.mean[keep, columns]
            m2 = np.broadcast_to(self.m2, self.mean.shape)[keep, columns]
            centre = (count[:, None] * mean).sum(0) / total
            between = count[:, None] * np.square(mean - centre)
            blocks.append((centre, (m2 + between).sum(0)))
        return Moments(total, *map(np.concatenate, zip(*blocks)))

    def statistics(self) -> "Statistics":
        std = np.sqrt(self.m2 / self.count)
        return Statistics(self.mean.astype(np.float32), std.astype(np.float32))


class RunningMoments:
    """Moments of frames that arrive a few at a time.

    Small arrays are collected first: for them the overhead of a numpy call exceeds its arithmetic.
    """

    _BATCH = 256  # frames
    _MAX_VALUES = 1 << 22  # in a batch: those of all layers of an encoder are many

    def __init__(self):
        self._parts: list[Moments] = []
        self._waiting: list[np.ndarray] = []
        self._rows = 0

    def add(self, frames: np.ndarray) -> None:
        """Add frames of shape (T, D)."""
        self._waiting.append(frames)
        self._rows += len(frames)
        if self._rows >= self._BATCH or self._rows * frames.shape[1] >= self._MAX_VALUES:
            self._merge()

    def _merge(self) -> None:
        if self._waiting:
            frames = np.concatenate(self._waiting)
            self._parts.append(Moments.of(frames))
            self._waiting = []
            self._rows = 0
        if len(self._parts) > 1:
            self._parts = [Moments.stack(self._parts).merged()]

    def merged(self) -> Moments:
        self._merge()
        return self._parts[0]


class Statistics(NamedTuple):
    """Mean and standard deviation of each feature, float32, shape (D,); flat, (L * D,), for several layers."""

    mean: np.ndarray
    std: np.ndarray

    def constant(self) -> np.ndarray:
        """Mask of the dimensions that do not vary, shape (D,)."""
        varying = self.std[self.std > 0]
        typical = np.median(varying) if varying.size else 1
        magnitude = np.maximum(np.abs(self.mean), typical)
        return self.std <= EPSILON * magnitude

    def scale(self) -> np.ndarray:
        """Divisor for normalisation: the std, or 1 where it counts as zero."""
        # A tiny divisor such as 1e-8 would turn a drift of 1e-3 into 1e5.
        return np.where(self.constant(), np.float32(1), self.std)


class Stored(NamedTuple):
    """Statistics found in a folder."""

    statistics: Statistics
    user_supplied: bool
    fingerprint: str | None  # of the data they were computed from; None if they were supplied by the user
    layers: int = 1  # number L of layers in the files

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each file: (D,), or (L, D) for several layers."""
        width = self.statistics.mean.size // self.layers
        return (self.layers, width) if self.layers > 1 else (width,)


def _parse_statistic(name: str, blob: bytes) -> np.ndarray:
    try:
        array = npy_array(blob)
    except DataError as error:
        raise DataError("bad-statistics", f"{name}: {error.reason}") from None
    if array.ndim in (2, 3):  # (1, D), (D, 1) or (1, L, D), as with keepdims=True
        array = np.atleast_1d(array.squeeze())
    if array.ndim not in (1, 2) or not array.size:
        reason = f"{name} has shape {array.shape}; one number per feature, shape (D,) or (L, D), is needed"
        raise DataError("bad-statistics", reason)
    with np.errstate(over="ignore"):  # a float64 beyond the range of float32 becomes Inf and is counted below
        array = array.astype(np.float32)
    bad = ~np.isfinite(array)
    if bad.any():
        raise DataError("bad-statistics", f"{name} holds {bad.sum()} values that are NaN or Inf")
    return array


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def load(folder: Path) -> Stored | None:
    """Load `wav2vec_mean.npy` and `wav2vec_std.npy`; None if they do not exist, or if our own save was cut off.

    The manifest, a JSON file beside them, has the hashes of the pair that we computed and the fingerprint of its data.
    A pair without a manifest, or with other hashes, was supplied by the user.

    Raises
    ------
    DataError
        `bad-statistics`: one of the pair is missing or was replaced alone, or they do not hold finite numbers of one
        width.
    """
    with _locked(folder):  # not between the renames of another run
        return _load(folder)


def _load(folder: Path) -> Stored | None:
    manifest = _read_manifest(folder)
    pair = {MEAN_FILE, STD_FILE}
    blobs = {name: _read_file(folder / name) for name in sorted(pair) if os.path.lexists(folder / name)}
    ours = {name for name, blob in blobs.items() if _sha256(blob) == manifest["sha256"].get(name)}
    if ours == set(blobs) != pair:  # neither, or `save` was cut off
        return None
    if len(blobs) == 1:
        (present,), (missing,) = blobs, pair - set(blobs)
        raise DataError("bad-statistics", f"{present} exists but {missing} does not; add it, or delete the other")
    if len(ours) == 1:
        (computed,), (foreign,) = ours, pair - ours
        advice = f"supply both files, or delete {foreign} to have both computed"
        raise DataError("bad-statistics", f"{computed} was computed here and {foreign} was not; {advice}")
    mean, std = (_parse_statistic(name, blobs[name]) for name in (MEAN_FILE, STD_FILE))
    if mean.shape != std.shape:
        raise DataError("bad-statistics", f"{MEAN_FILE} has shape {mean.shape} and {STD_FILE} has {std.shape}")
    if (std < 0).any():
        raise DataError("bad-statistics", f"{STD_FILE} holds {(std < 0).sum()} negative values")
    statistics = Statistics(mean.reshape(-1), std.reshape(-1))
    layers = len(mean) if mean.ndim == 2 else 1
    return Stored(statistics, not ours, manifest["fingerprint"] if ours else None, layers)


def pair_bytes(statistics: Statistics, layers: int = 1) -> dict[str, bytes]:
    """The two files of statistics by name; their arrays have shape (D,), or (L, D) with several layers."""
    shape = (layers, -1) if layers > 1 else (-1,)
    return {
        MEAN_FILE: npy_bytes(statistics.mean.reshape(shape)),
        STD_FILE: npy_bytes(statistics.std.reshape(shape)),
    }


def _read_file(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except DataError as error:
        raise DataError("bad-statistics", f"{path.name} {error.reason}") from None


def _read_manifest(folder: Path) -> dict:
    try:
        if not os.path.lexists(folder / MANIFEST_FILE):
            return {"sha256": {}, "fingerprint": ""}
        manifest = json.loads(_read_file(folder / MANIFEST_FILE))
        return {"sha256": dict(manifest["sha256"]), "fingerprint": str(manifest["fingerprint"])}
    except DataError:  # a ValueError, too, but it has its own reason
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        advice = f"delete it if {MEAN_FILE} and {STD_FILE} are your own, otherwise delete all three"
        raise DataError("bad-statistics", f"{MANIFEST_FILE} is damaged; {advice}") from None


def save(folder: Path, statistics: Statistics, fingerprint: str, layers: int = 1) -> bool:
    """Save the pair and its manifest; False if the user's own, even half of a pair, are in the folder by now.

    An old pair of ours is removed first, then the manifest is written with the hashes of the files to come, then the
    pair. Wherever a crash cuts that off, `load` finds no pair, or one file of ours without the other, and the
    statistics are computed again. If the manifest came last, a crash just before it would leave a pair that looks like
    the user's own.
    """
    blobs = pair_bytes(statistics, layers)
    hashes = {name: _sha256(blob) for name, blob in blobs.items()}
    manifest = {MANIFEST_FILE: json_bytes({"sha256": hashes, "fingerprint": fingerprint})}
    with _locked(folder, (*blobs, MANIFEST_FILE)):
        try:
            found = _load(folder)
        except DataError:  # half copied, or damaged
            return False
        if found and found.user_supplied:
            return False
        for name in blobs:
            (folder / name).unlink(missing_ok=True)
        _replace_files(folder, manifest)  # on the disk before the pair, also after a power loss
        _replace_files(folder, blobs)
    return True


def rank_correlation(x: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each row of `x`, (N, D), with `reference`, (D,): shape (N,); 0 for constant rows.

    The embeddings of an encoder have a common mean that is large beside their deviations. The order of its dimensions
    is a signature of the encoder that neither scaling nor a few huge dimensions change.
    """
    rank, found = _ranks(reference), []
    for row in x:  # one by one: ranks take twice the memory of the features
        other = _ranks(row)
        found.append(rank @ other / max(math.sqrt((rank @ rank) * (other @ other)), 1e-9))
    return np.array(found)


def encoder_mismatch(mean: np.ndarray, reference: np.ndarray, lowest: float) -> str | None:
    """Why features with this mean, (D,), are certainly not of the encoder of a data set; None if they may be.

    `reference`, (D,), is the mean of the data set, and `lowest` the lowest rank correlation of an utterance of the set
    with it. Features that were normalised have no common mean; then it is low, and nothing can be decided.
    """
    similarity = float(rank_correlation(mean[None], reference)[0])
    if lowest < 0.2 or similarity > lowest / 3:
        return None
    return (
        f"the order of its dimensions correlates by {similarity:.2f} with that of the training data, whose"
        f" utterances all have {lowest:.2f} or more"
    )


def statistics_mismatch(given: Statistics, own: Statistics, lowest: float) -> str | None:
    """Why statistics are not those of a data set with statistics `own`; None if they may be, see `encoder_mismatch`.

    Constant ones, such as a mean of 0 or a standard deviation of 1, are a choice that is never questioned.
    """
    if np.ptp(given.mean) == 0:
        return None
    if reason := encoder_mismatch(given.mean, own.mean, lowest):
        return reason
    varying = ~(given.constant() | own.constant())
    if not varying.any() or np.ptp(given.std) == 0:
        return None
    shift = float(np.median(np.abs(own.mean - given.mean)[varying] / given.std[varying]))
    ratio = float(np.median(given.std[varying] / own.std[varying]))
    if shift < MAX_RATIO and 1 / MAX_RATIO < ratio < MAX_RATIO:
        return None
    return (
        f"the mean is {shift:.2g} standard deviations off, and the standard deviation is {ratio:.2g} times"
        " that of the features"
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value, less the mean of all ranks; equal values share the mean of their ranks."""
    order = np.argsort(values, kind="stable")
    in_order = values[order]
    differs = np.append(True, in_order[1:] != in_order[:-1])
    first = np.flatnonzero(differs)  # of each run of equal values
    last = np.append(first[1:], len(values)) - 1
    ranks = np.empty(len(values))
    ranks[order] = ((first + last - len(values) + 1) / 2)[np.cumsum(differs) - 1]
    return ranks


# --- scores -------------------------------------------------------------------------------------------------------


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis; finite wherever the logits are."""
    # The log of a sum of exponentials, shifted by the largest logit so that none overflows.
    peak = logits.max(-1, keepdims=True)
    return logits - (np.log(np.exp(logits - peak).sum(-1, keepdims=True)) + peak)


def balanced_cross_entropy(logits: np.ndarray, label: np.ndarray) -> float:
    """Mean over the classes present of their mean cross-entropy, in nats; logits (N, C), label (N,)."""
    loss = -log_probabilities(logits)[np.arange(len(label)), label]
    count = np.bincount(label)
    present = count > 0
    total = np.bincount(label, loss)
    return float((total[present] / count[present]).mean())


def confusion_matrix(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count label (rows) against prediction (columns), shape (C, C)."""
    cell = label * classes + predicted
    return np.bincount(cell, minlength=classes * classes).reshape(classes, classes)


class Counts(NamedTuple):
    """Utterances of each class, shape (..., C): predicted correctly, labelled so, and predicted so."""

    correct: np.ndarray
    labelled: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of(cls, confusion: np.ndarray) -> "Counts":
        """Those of confusion matrices, shape (..., C, C), rows are labels."""
        confusion = np.asarray(confusion, np.float64)
        return cls(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1), confusion.sum(-2))

    def of_majority(self) -> "Counts":
        """Those of always predicting the most frequent label; its `ua` is 1 / the number of classes present."""
        majority = np.arange(len(self.labelled)) == self.labelled.argmax()
        return Counts(majority * self.labelled, self.labelled, majority * self.labelled.sum())

    def class_scores(self) -> dict[str, np.ndarray]:
        """`recall`, `precision` and `f1` of each class, shape (..., C); 0 without a label or prediction of it."""
        return {
            "recall": self.correct / np.maximum(self.labelled, 1),
            "precision": self.correct / np.maximum(self.predicted, 1),
            "f1": 2 * self.correct / np.maximum(self.labelled + self.predicted, 1),
        }

    def scores(self) -> dict[str, np.ndarray]:
        """`ua` (unweighted accuracy: the mean recall), `wa` (the share of correct predictions) and `macro_f1`.

        Fractions of shape (...). Classes without a labelled utterance are left out of the means; the scores of no
        utterance are NaN.
        """
        classes = (self.labelled > 0).sum(-1)
        by_class = self.class_scores()
        with np.errstate(invalid="ignore"):
            return {
                "ua": by_class["recall"].sum(-1) / classes,
                "wa": self.correct.sum(-1) / self.labelled.sum(-1),
                "macro_f1": by_class["f1"].sum(-1) / classes,
            }


def group_counts(group: list, label: np.ndarray, predicted: np.ndarray, classes: int) -> tuple[list, Counts]:
    """The sorted names of G groups, and the counts of each, shape (G, C).

    Group, class and predicted class of each utterance have shape (N,); those whose group is None are left out.
    """
    known = [place for place, name in enumerate(group) if name is not None]
    names, index = np.unique([group[place] for place in known], return_inverse=True)
    index = index.reshape(-1)  # some versions of numpy keep an axis
    label, predicted = label[known], predicted[known]
    correct = label == predicted
    parts = []
    for group_of, class_of in ((index[correct], label[correct]), (index, label), (index, predicted)):
        cells = np.bincount(group_of * classes + class_of, minlength=len(names) * classes)
        parts.append(cells.reshape(len(names), classes))
    return names.tolist(), Counts(*parts)


def speaker_intervals(counts: Counts) -> dict[str, tuple[float, float]]:
    """95 % intervals of the scores over speakers: jackknife deviation, Student's t, on the scale of log odds.

    Utterances of one speaker are alike, so intervals over single utterances would be too narrow. Percentiles of a
    bootstrap are too narrow as well with few speakers (they hold the true UA in 78 % of cases with 4 and in 90 % with
    10): they neither correct the deviation for the sample size nor know that it is itself uncertain. The jackknife
    (Tukey 1958; Miller 1974, "The jackknife: a review") with G - 1 degrees of freedom does both, without random
    numbers. Log odds, because scores near 1 are skewed, and an interval must not leave 0 to 1. Below `FEW_SPEAKERS` an
    interval means little, however wide; with one speaker it is 0 to 1. The counts of each speaker have shape (G, C).
    """
    groups, intervals = len(counts.labelled), {}
    scores, without = _leave_one_out_scores(counts)
    for name, left_out in without.items():
        score = float(scores[name])
        if groups < 2 or not math.isfinite(score):
            intervals[name] = (0.0, 1.0)
            continue
        deviation = _jackknife_deviation(left_out)
        if not 0 < score < 1:  # no speaker differs from another
            intervals[name] = (score, score)
            continue
        odds = math.log(score / (1 - score))
        reach = min(_student_t(groups - 1) * deviation / (score * (1 - score)), 700)  # math.exp(710) overflows
        low, high = (1 / (1 + math.exp(-(odds + step))) for step in (-reach, reach))
        intervals[name] = (low, high)
    return intervals


def _leave_one_out_scores(counts: Counts) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores of all G speakers together, and those without each of them, shape (G,); the counts have shape (G, C)."""
    total = Counts(*(part.sum(0) for part in counts))
    # A class that one speaker alone has keeps its counts when that speaker is left out: without them the mean would be
    # over fewer classes.
    without = Counts(*(whole - part for whole, part in zip(total, counts)))
    lost = (without.labelled == 0) & (total.labelled > 0)
    without = Counts(*(np.where(lost, whole, part) for whole, part in zip(total, without)))
    return total.scores(), without.scores()


def _jackknife_deviation(left_out: np.ndarray) -> float:
    """Standard deviation of an estimate, from its values without each of the G speakers, (G,)."""
    groups = len(left_out)
    return math.sqrt((groups - 1) / groups * np.square(left_out - left_out.mean()).sum())


class Difference(NamedTuple):
    """Difference of a score between two runs, its 95 % interval, and the two-sided p of no difference."""

    difference: float
    low: float
    high: float
    p: float


def paired_differences(first: Counts, second: Counts) -> dict[str, Difference]:
    """Second minus first score of two runs on the same utterances, with 95 % intervals and p over speakers.

    A speaker who is hard for one run is mostly hard for the other too, which cancels out in the difference. Deviation
    and degrees of freedom are those of `speaker_intervals`, on the scale of the score itself. In simulations of 4, 10
    and 24 speakers with a known difference, 93 to 97 % of these intervals hold it; of the percentile intervals of a
    paired bootstrap over speakers, 80 to 83 %, 89 to 91 % and 90 to 93 % do.

    Parameters
    ----------
    first, second
        The counts of each speaker, shape (G, C), with the same speakers in each row. With one speaker nothing is known
        about others: the interval is -1 to 1, and p is 1.
    """
    groups, differences = len(first.labelled), {}
    (scores_1, without_1), (scores_2, without_2) = map(_leave_one_out_scores, (first, second))
    for name in scores_1:
        # Rounded, so that the last bits of equal scores are no difference.
        difference = round(float(scores_2[name] - scores_1[name]), 12)
        if groups < 2 or not math.isfinite(difference):
            differences[name] = Difference(difference, -1.0, 1.0, 1.0)
            continue
        deviation = _jackknife_deviation(np.round(without_2[name] - without_1[name], 12))
        reach = _student_t(groups - 1) * deviation
        low, high = max(difference - reach, -1.0), min(difference + reach, 1.0)
        # Without any deviation between the speakers, every difference but 0 is certain.
        certain = math.inf if difference else 0.0
        ratio = abs(difference) / deviation if deviation else certain
        differences[name] = Difference(difference, low, high, _student_p(ratio, groups - 1))
    return differences


FEW_SPEAKERS = 6  # below, an interval means little


def _student_t(freedom: int) -> float:
    """97.5 % quantile of Student's t: exact up to 2 degrees of freedom, else by an expansion, within 1 %."""
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = 1.959964  # of the normal distribution
    # Cornish and Fisher 1938; Abramowitz and Stegun 26.7.5.
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def _student_p(t: float, freedom: int) -> float:
    """Two-sided p of a Student's t, for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    inside, term = (angle, math.sin(angle) * math.cos(angle)) if odd else (0.0, math.sin(angle))
    for power in range(odd, freedom - 1, 2):
        inside += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    if odd:
        inside *= 2 / math.pi
    return min(max(1 - inside, 0.0), 1.0)


def _one_sided_p(gain: np.ndarray) -> float:
    """Probability that a sum over G speakers is so far above 0 by chance; `gain`, (G,), is that of each speaker."""
    groups, total = len(gain), gain.sum()
    if groups < 2 or total <= 0:
        return 1.0
    error = math.sqrt(groups * gain.var(ddof=1))  # of the sum
    return _student_p(total / max(error, 1e-12), groups - 1) / 2


def group_scores(names: list, counts: Counts) -> dict[str, dict[str, float]]:
    """Number of utterances `n` and scores of each group, by its name."""
    columns = {"n": counts.labelled.sum(1)} | counts.scores()
    rows = zip(*(values.tolist() for values in columns.values()))
    return {name: dict(zip(columns, row)) for name, row in zip(names, rows)}


def evaluate(
    label: np.ndarray, logits: np.ndarray, speaker: list[str], fold: np.ndarray, classes: tuple[str, ...]
) -> dict:
    """Compute the metrics that follow from labels, logits, speakers and folds, ready for metrics.json.

    Class, speaker and test fold of each utterance have shape (N,), the calibrated logits (N, C). All folds are 0 where
    there is one test set.

    Returns
    -------
    dict
        `ua`, `wa`, `macro_f1` with `..._ci95` and `majority_...`, `chance_ua`, `classes`, `n_utterances`, `confusion`,
        `ece`, `reliability`, `speakers` by name, `folds` in order, and the scores of each class by its name.
    """
    count = len(classes)
    probability = probabilities(logits)
    predicted = probability.argmax(1)
    confusion = confusion_matrix(label, predicted, count)
    total = Counts.of(confusion)
    speakers, by_speaker = group_counts(speaker, label, predicted, count)
    by_fold = group_scores(*group_counts(fold.tolist(), label, predicted, count))
    metrics = {name: float(score) for name, score in total.scores().items()}
    metrics |= {f"{name}_ci95": list(interval) for name, interval in speaker_intervals(by_speaker).items()}
    metrics |= {f"majority_{name}": float(score) for name, score in total.of_majority().scores().items()}
    return metrics | {
        "chance_ua": 1 / count,
        "classes": list(classes),
        **{name: dict(zip(classes, values.tolist())) for name, values in total.class_scores().items()},
        "n_utterances": len(label),
        "confusion": confusion.tolist(),
        "speakers": group_scores(speakers, by_speaker),
        "folds": list(by_fold.values()),
        "ece": expected_calibration_error(probability, label),
        "reliability": reliability(probability, label),
    }


# --- folds --------------------------------------------------------------------------------------------------------


def numbered(names: np.ndarray) -> np.ndarray:
    """The place of each name among the sorted distinct ones, shape (N,)."""
    return np.unique(names, return_inverse=True)[1].reshape(-1)  # some versions of numpy keep an axis


def balanced_blocks(group: np.ndarray, label: np.ndarray, blocks: int, seed: int) -> np.ndarray:
    """Distribute groups over blocks so that every block gets its share of every class: the block of each utterance.

    `group` and `label`, (N,), count from 0. A group stays together, and no block is empty if there are enough groups.
    """
    share = np.zeros((group.max() + 1, label.max() + 1))  # of each class in each group
    np.add.at(share, (group, label), 1)
    share /= np.maximum(share.sum(0), 1)  # rare classes count as much as common ones
    order = np.random.default_rng(seed).permutation(len(share))
    size = share.sum(1)
    order = order[np.argsort(-size[order], kind="stable")]  # large groups first, while there is room
    load = np.zeros((blocks, share.shape[1]))
    block_of = np.zeros(len(share), int)
    for member in order:
        crowding = load @ share[member]  # growth of the summed squared load, up to a constant
        block = np.lexsort((load.sum(1), crowding))[0]
        block_of[member] = block
        load[block] += share[member]
    return block_of[group]


# --- calibration --------------------------------------------------------------------------------------------------


def reliability(probability: np.ndarray, label: np.ndarray, bins: int = 15) -> list[dict[str, float]]:
    """Confidence against accuracy in bins of equal width; probability (N, C), label (N,).

    The confidence of a prediction is its largest probability. A bin excludes its lower edge and includes its upper one.

    Returns
    -------
    list
        For each bin its edges `low` and `high`, the count `n`, the mean `confidence` and the `accuracy`; the last two
        are NaN in an empty bin.
    """
    confidence = probability.max(1)
    correct = probability.argmax(1) == label
    index = np.ceil(confidence * bins).astype(int) - 1
    index = np.clip(index, 0, bins - 1)  # rounding may lift a probability above 1
    n = np.bincount(index, minlength=bins)
    edges = np.arange(bins + 1) / bins
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        means = [np.bincount(index, values, bins) / n for values in (confidence, correct)]
    rows = zip(*(values.tolist() for values in (edges[:-1], edges[1:], n, *means)))
    return [dict(zip(("low", "high", "n", "confidence", "accuracy"), row)) for row in rows]


def expected_calibration_error(probability: np.ndarray, label: np.ndarray, bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over the bins of `reliability`, weighted by count; a fraction.

    Naeini, Cooper and Hauskrecht 2015, "Obtaining well calibrated probabilities using Bayesian binning"; 15 bins as
    in Guo, Pleiss, Sun and Weinberger 2017, "On calibration of modern neural networks".
    """
    curve = reliability(probability, label, bins)
    gaps = [row["n"] * abs(row["accuracy"] - row["confidence"]) for row in curve]
    return float(np.nansum(gaps) / len(label))


# --- the linear part of a model, and the weights of both parts ----------------------------------------------------

SHRINKAGES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.8)  # of the covariance; validation speakers choose one
MIN_SPREAD = 0.03  # floor of the deviation within classes, where normalised features have about 1
LOGIT_WEIGHTS = tuple(0.02 * 1.25**step for step in range(24))  # to choose from: 0.02 to 3.4
LOSS_POWER = 4  # how strongly better parts, and better layers, are preferred


@np.errstate(over="ignore", invalid="ignore")  # features that are not finite, or overflow, give zeros
def fit_lda(x: np.ndarray, label: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Linear discriminant analysis with shrunken covariance and equal priors, for each of `SHRINKAGES`.

    The covariance within classes C becomes (1 - s) C + s v I, where v is its mean variance. All shrinkages share one
    eigendecomposition, of the smaller of the two Gram matrices (D x D, or N x N by the Woodbury identity). It costs as
    much as one solve per shrinkage if D < N, and a fraction of that if D > N.

    `x` are normalised features, float32, shape (N, D); `label`, (N,), is the class of each row.

    Returns
    -------
    kernel, bias
        Shapes (7, D, C) and (7, C). Zeros if the features do not vary within the classes or are not finite.
    """
    count = np.bincount(label, minlength=classes)
    divisor = np.maximum(count, 1).astype(np.float32)  # an empty class gets the mean 0, not NaN
    one_hot = np.eye(classes, dtype=np.float32)[label]
    centre = one_hot.T @ x / divisor[:, None]  # (C, D)
    within = x - centre[label]
    # Dividing by the deviation within classes makes the variances alike, as shrinkage towards v I assumes.
    spread = np.sqrt(np.square(within).mean(0))  # (D,)
    spread = np.maximum(spread, np.float32(MIN_SPREAD))
    within, centre = within / spread, centre / spread
    variance = np.square(within).mean()
    if not (np.isfinite(variance) and variance > 0):
        return np.zeros((len(SHRINKAGES), x.shape[1], classes), np.float32), np.zeros((len(SHRINKAGES), classes))
    solve = _shrunken_solver(within, centre.T)
    kernel = np.stack([solve(1 - shrinkage, shrinkage * variance) for shrinkage in SHRINKAGES])
    bias = -0.5 * (centre.T * kernel).sum(1)
    # A class without training utterances gets the mean of the others and a lower bias: it never beats the best of them.
    seen = count > 0
    kernel = np.where(seen, kernel, kernel[..., seen].mean(-1, keepdims=True))
    bias = np.where(seen, bias, bias[..., seen].mean(-1, keepdims=True) + np.log(1e-6))
    return (kernel / spread[:, None]).astype(np.float32), bias


def _shrunken_solver(within: np.ndarray, rhs: np.ndarray) -> Callable[[float, float], np.ndarray]:
    """Return solve(a, b) = (a C + b I)^-1 `rhs`, where C is the covariance of the rows of `within`, (N, D)."""
    rows, dim = within.shape
    gram = within.T @ within if rows >= dim else within @ within.T
    value, vector = np.linalg.eigh(gram / rows)
    value = np.maximum(value, 0)  # rounding can make the smallest ones negative
    if rows >= dim:
        projected = vector.T @ rhs

        def solve(a: float, b: float) -> np.ndarray:
            return vector @ (projected / (a * value + b)[:, None])

        return solve
    basis = within.T @ vector
    projected = basis.T @ rhs

    def solve_dual(a: float, b: float) -> np.ndarray:
        inner = rows * (value + b / a)
        return (rhs - basis @ (projected / inner[:, None])) / b

    return solve_dual


def layer_logits(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Logits (L, 7, N, C) of each layer with each shrinkage, for x (N, L D), from the outcome of `fit_lda` for each."""
    layers = np.stack(np.split(x, len(kernel), 1))[:, None]
    return layers @ kernel + bias[:, :, None]


class LinearWeights(NamedTuple):
    """The choice of the linear part on validation utterances."""

    loss: float
    weight: float  # of its logits
    shrinkage: int  # index in SHRINKAGES
    layers: np.ndarray  # share of each layer, (L,)


class EnsembleWeights(NamedTuple):
    """Weights of the two parts of a fold's models, and what the linear part consists of.

    The logits of a model are the weighted sum of both parts, divided by `temperature` for calibration.
    """

    shrinkage: int  # index in SHRINKAGES
    layers: tuple[float, ...]  # share of each layer in the linear part
    hidden: float
    linear: float
    temperature: float

    def add_layers(self, kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One linear model of all layers, (L D, C) and (C,), from those of each, (L, 7, D, C) and (L, 7, C)."""
        share = np.array(self.layers)
        kernel = share[:, None, None] * kernel[:, self.shrinkage]
        return np.concatenate(list(kernel)), share @ bias[:, self.shrinkage]


def fit_ensemble_weights(
    hidden: list[np.ndarray], linear: list[np.ndarray], label: list[np.ndarray]
) -> EnsembleWeights:
    """Choose the weights of hidden layer and linear part on the validation utterances of a fold's seeds.

    Each part first gets the weight with its smallest validation loss, which is 0 for a part without information. Then
    the part with the smaller loss gets the larger share. Finally the sum is calibrated. Weights fitted jointly would be
    optimal for single seeds, but the seeds are averaged, and the hidden layers gain more from that.

    For the n validation utterances of each seed, `hidden` has logits (n, C), `linear` has logits (L, shrinkages, n, C),
    and `label` has classes (n,).
    """
    hidden_loss, hidden_weight = _best_weight(hidden, label, (0.0, *LOGIT_WEIGHTS))
    chosen = choose_shrinkage(linear, label)
    hidden_share, linear_share = _shares([hidden_loss, chosen.loss])
    hidden_weight = 2 * float(hidden_share) * hidden_weight
    linear_weight = 2 * float(linear_share) * chosen.weight
    linear_logits = [np.tensordot(chosen.layers, seed[:, chosen.shrinkage], 1) for seed in linear]
    total = [hidden_weight * one + linear_weight * other for one, other in zip(hidden, linear_logits)]
    _, calibration = _best_weight(total, label, LOGIT_WEIGHTS)
    layers = tuple(chosen.layers.tolist())
    return EnsembleWeights(chosen.shrinkage, layers, hidden_weight, linear_weight, 1 / calibration)


def choose_shrinkage(linear: list[np.ndarray], label: list[np.ndarray]) -> LinearWeights:
    """Choose shrinkage and weight of the linear part, and the shares of its layers; see `fit_ensemble_weights`.

    All layers have the same shrinkage, that of their best sum: it is smaller than the best one of each alone, since
    their errors differ.
    """
    weights, candidates = (0.0, *LOGIT_WEIGHTS), []
    for shrinkage in range(linear[0].shape[1]):
        layers = [[logits[layer, shrinkage] for logits in linear] for layer in range(len(linear[0]))]
        share = np.ones(1)
        if len(layers) > 1:
            share = _shares([_best_weight(logits, label, weights)[0] for logits in layers])
        total = [np.tensordot(share, logits[:, shrinkage], 1) for logits in linear]
        candidates.append(LinearWeights(*_best_weight(total, label, weights), shrinkage, share))
    return min(candidates, key=lambda candidate: candidate.loss)


def _shares(losses: list[float]) -> np.ndarray:
    """Shares of parts, which sum to 1; the smaller loss gets the larger one, and equal losses get equal ones."""
    losses = np.maximum(losses, 1e-9)  # a perfect linear part has a loss of 0
    inverse = (losses.min() / losses) ** LOSS_POWER
    return inverse / inverse.sum()


def _best_weight(logits: list[np.ndarray], label: list[np.ndarray], weights: tuple[float, ...]) -> tuple[float, float]:
    """The smallest mean validation loss over the seeds, and the one of the ascending weights that gives it."""

    def loss(weight: float) -> float:
        # Each seed counts the same, however many validation utterances it has.
        return float(np.mean([balanced_cross_entropy(weight * one, true) for one, true in zip(logits, label)]))

    def rises(place: int) -> bool:
        return loss(weights[place]) <= loss(weights[place + 1])

    # The loss is convex in the weight: it falls up to the best one, and rises from there.
    best = bisect.bisect_left(range(len(weights) - 1), True, key=rises)
    return loss(weights[best]), weights[best]


# --- fusion of several runs -----------------------------------------------------------------------------------------

#: The lowest probability in a fusion: no run can exclude a class, however sure it is.
MIN_PROBABILITY = 1e-12
JOINING_P = 0.1  # how significant a gain must be
FUSION_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of a run that joins others
FUSION_TEMPERATURES = tuple(1.2**step for step in range(-9, 3))  # to choose from: 0.19 to 1.44


def complete_probabilities(probability: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Probabilities of R runs, (R, N, C), also of the classes that a run does not know.

    Such a class takes the mean probability of the runs that know it, or chance where none does, and those that the run
    knows share the rest: a run without a class is neutral about it. `known` has shape (R, N, C).
    """
    runs = known.sum(0)
    consensus = np.where(runs > 0, (probability * known).sum(0) / np.maximum(runs, 1), 1 / probability.shape[-1])
    outside = np.where(known, 0, consensus)
    inside = np.maximum(1 - outside.sum(-1, keepdims=True), 0)
    return np.where(known, probability * inside, outside)


class FusionWeights(NamedTuple):
    """A late fusion of R calibrated runs: their weights, shape (R,), at least 0 and with a sum of 1; its temperature.

    `present`, (R, N), is False where a run lacks an utterance: there the weights of the others are scaled to a sum
    of 1, and the temperature, which is for all of them together, is 1.
    """

    weights: np.ndarray
    temperature: float

    def mean(self, probability: np.ndarray, present: np.ndarray) -> np.ndarray:
        """The weighted mean, (N, C), of the logarithms of probabilities, (R, N, C): logits that are not calibrated."""
        # Where only runs without weight have an utterance, they answer it with equal weights.
        weights = present * np.maximum(self.weights, 1e-12)[:, None]
        weights = weights / weights.sum(0)
        return np.einsum("rn,rnc->nc", weights, np.log(np.maximum(probability, MIN_PROBABILITY)))

    def temperatures(self, present: np.ndarray) -> np.ndarray:
        """What calibrates the mean of each utterance, shape (N,)."""
        complete = present[self.weights > 0].all(0)
        return np.where(complete, self.temperature, 1.0)


def fit_fusion(probability: np.ndarray, present: np.ndarray, label: np.ndarray, speaker: np.ndarray) -> FusionWeights:
    """Choose weights and temperature of a fusion of R runs by its class-balanced cross-entropy.

    It starts from the best run. In each step another run joins, with the share and the temperature that give the lowest
    loss, if the gain is significant over the speakers (one-sided, p below `JOINING_P`). Otherwise runs without
    information and copies of a run would get a weight by chance, and a fusion would often be worse than its best run.
    One run alone keeps its calibration.

    `probability` has shape (R, N, C) and `present` (R, N); `label`, (N,), is the class of each utterance, `speaker`,
    (N,), the name of its speaker.
    """
    single, speaker = np.eye(len(probability)), numbered(speaker)
    count = np.bincount(label)
    share = 1 / (count[label] * (count > 0).sum())  # of an utterance in the class-balanced loss

    def best_temperature(weights: np.ndarray) -> tuple[np.ndarray, FusionWeights]:
        """The temperature with the lowest loss, and that loss by utterance."""
        mean, candidates = FusionWeights(weights, 1.0).mean(probability, present), []
        for temperature in FUSION_TEMPERATURES:
            fusion = FusionWeights(weights, temperature)
            logits = log_probabilities(mean / fusion.temperatures(present)[:, None])
            candidates.append((-share * logits[np.arange(len(label)), label], fusion))
        return min(candidates, key=total_loss)

    def total_loss(candidate: tuple[np.ndarray, FusionWeights]) -> float:
        return candidate[0].sum()

    loss, best = min(map(best_temperature, single), key=total_loss)
    best = best._replace(temperature=1.0)
    while 0 in best.weights:
        joined = [
            (1 - part) * best.weights + part * single[run]
            for run in np.flatnonzero(best.weights == 0)
            for part in FUSION_SHARES
        ]
        new_loss, new = min(map(best_temperature, joined), key=total_loss)
        if _one_sided_p(np.bincount(speaker, loss - new_loss)) > JOINING_P:
            break
        loss, best = new_loss, new
    return best

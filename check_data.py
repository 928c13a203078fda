#!/usr/bin/env python3
"""What the files are: scan a folder of NPZ features, read each one strictly, and say what stops training.

    python check_data.py DIR

Exit status: 0 all good, 1 problems found, 2 wrong use or nothing to work on. Needs numpy alone; never imports jax.
"""

import argparse
import collections
import csv
import dataclasses
import functools
import hashlib
import io
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import emotions
import stats
from stats import DataError

#: Where the features are looked for in a file, in this order; else its first array that is no label.
KEYS = ("emb", "embedding", "features", "wav2vec")
_LABEL_WORDS = ("label", "emotion", "target", "class", "speaker")

MAX_ARRAY_BYTES = 1 << 28  # an hour of 50 frames a second of 373 float32 numbers; utterances last seconds
_MAX_MEMBERS = 1000

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_STORED, _DEFLATED = 0, 8
#: What np.savez writes where nothing can be checked (made by, internal and external attributes). One bit off it is
#: damage; other programs differ in more.
_NUMPY_ENTRY = 0x032D << 48 | 0o600 << 16

# --- options ------------------------------------------------------------------------------------------------------


class UsageError(Exception):
    """The user asked for something that cannot be done; the text says why and what to do. Exit status 2."""


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options, with the help that the command line shows."""
    return dataclasses.field(default=default, metadata={"help": text})


def demand(condition: bool, name: str, text: str) -> None:
    if not condition:
        raise UsageError(f"--{name.replace('_', '-')} must be {text}")


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Give a command line every option of a dataclass, whose first field is the folder."""
    parser.add_argument("directory", metavar="DIR", help="folder of NPZ files, flat or in subfolders")
    for field in dataclasses.fields(options)[1:]:
        flag, text, default = f"--{field.name.replace('_', '-')}", field.metadata["help"], field.default
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif default == ():
            parser.add_argument(flag, action="append", default=[], metavar="STR", help=text)
        else:
            kind = next(k for k in (int, float, str) if k in (field.type, *getattr(field.type, "__args__", ())))
            shown = text if default is None else f"{text} (%(default)s)"
            parser.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=shown)


# --- reading one file ---------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """One array of an NPZ file: its data are `blob[start:stop]`, `size` bytes once inflated; `next` begins the next."""

    name: str
    method: int
    crc: int
    start: int
    stop: int
    size: int
    next: int


# The header before a member's data, and the directory's entry for it, field by field as the format has them.
_COMMON = "version flags method time date crc packed size name_length extra_length"
_Header = collections.namedtuple("_Header", f"magic {_COMMON}")
_Entry = collections.namedtuple("_Entry", f"magic made_by {_COMMON} comment_length disk internal external offset")


class Features(NamedTuple):
    """What was read from a file: a float32 array of shape (D,), (T, D) or (T * D,), and where it came from."""

    array: np.ndarray
    key: str
    dtype: str
    members: tuple[str, ...]
    crc: int
    rms: float
    stored_shape: tuple[int, ...]


def _not_a_zip(blob: bytes) -> DataError:
    """Name what a file is that should have been a zip archive."""
    start = blob[:512].lstrip().lower()
    if not blob:
        return DataError("empty", "has no bytes")
    if not any(blob[:4096]):
        return DataError("empty", "holds zero bytes only, as after a crash of the machine that wrote it")
    if blob.startswith(b"PK\x03\x04"):
        return DataError("truncated", f"ends after {len(blob)} bytes, before the zip directory")
    if start.startswith(b"version https://git-lfs"):
        return DataError("git-lfs", "is a git-lfs pointer: run git lfs pull")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return DataError("not-npz", "is an HTML page, as a failed download leaves it")
    if blob.startswith(b"\x93NUMPY"):
        return DataError("not-npz", "is a bare .npy array named .npz")
    if blob[:1] == b"\x80" and blob[1:2] in b"\x02\x03\x04\x05":
        return DataError("pickle", "is a Python pickle, which can run code and is never loaded")
    if blob.startswith(b"RIFF"):
        return DataError("not-npz", "is a wav recording: extract its features first")
    return DataError("not-npz", "is no zip archive")


def _zip_fault(what: str) -> DataError:
    return DataError("bad-zip", f"the zip archive is damaged: {what}")


def _zip64_sizes(extra: bytes, size: int, packed: int) -> tuple[int, int]:
    """Take the sizes from the zip64 extra field where the header's own are all ones (np.savez writes them so)."""
    wanted = (size == 0xFFFFFFFF) + (packed == 0xFFFFFFFF)
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if kind == 1 and wanted:
            if length != 8 * wanted or position + length > len(extra):
                raise _zip_fault("a zip64 size")
            values = list(struct.unpack_from(f"<{wanted}Q", extra, position))
            size = values.pop(0) if size == 0xFFFFFFFF else size
            packed = values.pop(0) if packed == 0xFFFFFFFF else packed
            wanted = 0
        position += length
    if wanted or position != len(extra):
        raise _zip_fault("an extra field")
    return size, packed


def _members(blob: bytes) -> list[Member]:
    """Walk the zip directory; every byte of the file must belong to a member, the directory or its end."""
    end = len(blob) - _END.size
    if blob[end : end + 4] != b"PK\x05\x06" or end < 0:
        end = blob.rfind(b"PK\x05\x06")
        if end < 0 or len(blob) - end < _END.size:
            raise _not_a_zip(blob)
    _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(blob, end)
    if end + _END.size + comment != len(blob):
        if blob[:4] == b"PK\x03\x04" and end + _END.size + comment > len(blob):
            raise DataError("truncated", f"ends after {len(blob)} bytes, within the zip directory")
        raise DataError("junk", f"{len(blob) - end - _END.size - comment} bytes follow the end of the zip archive")
    if disk or first_disk or here != count or start + size > end:
        raise _zip_fault("its directory")
    if start + size < end:
        raise DataError("junk", f"{end - start - size} bytes precede the zip archive")
    if count > _MAX_MEMBERS:
        raise _zip_fault(f"it claims {count} members")
    members, position = [], start
    for _ in range(count):
        member, position = _member(blob, position, end, members[-1].next if members else 0)
        members.append(member)
    if position != end or (members[-1].next if members else 0) != start:
        raise _zip_fault("its directory has gaps")
    return members


def _member(blob: bytes, position: int, end: int, begin: int) -> tuple[Member, int]:
    """Read one directory entry and the local header that it must agree with; return it and where the next one is."""
    if position + _CENTRAL.size > end or begin + _LOCAL.size > end:
        raise _zip_fault("its directory is cut off")
    entry = _Entry(*_CENTRAL.unpack_from(blob, position))
    name_end = position + _CENTRAL.size + entry.name_length
    following = name_end + entry.extra_length + entry.comment_length
    if entry.magic != b"PK\x01\x02" or following > end or entry.disk or entry.offset != begin:
        raise _zip_fault("a directory entry")
    if ((entry.made_by << 48 | entry.internal << 32 | entry.external) ^ _NUMPY_ENTRY).bit_count() == 1:
        raise _zip_fault("a directory entry differs from numpy's in one bit")
    name = blob[position + _CENTRAL.size : name_end]
    size, packed = _zip64_sizes(blob[name_end : name_end + entry.extra_length], entry.size, entry.packed)
    local = _Header(*_LOCAL.unpack_from(blob, begin))
    local_name_end = begin + _LOCAL.size + local.name_length
    data = local_name_end + local.extra_length
    if entry.flags & 1:
        raise DataError("encrypted", "is encrypted")
    if entry.method not in (_STORED, _DEFLATED):
        raise DataError(
            "unknown-compression", f"is compressed by method {entry.method}; only stored and deflated are read"
        )
    described = bool(entry.flags & 8)  # written to a pipe: sizes and CRC follow the data
    local_sizes = _zip64_sizes(blob[local_name_end:data], local.size, local.packed)
    if (
        local[:6] != (b"PK\x03\x04", *entry[2:7])
        or blob[begin + _LOCAL.size : local_name_end] != name
        or entry.flags & ~0x808
        or not (described or (local.crc, *local_sizes) == (entry.crc, size, packed))
    ):
        raise _zip_fault("a header and the directory disagree")
    stop = data + packed
    if stop > end or (entry.method == _STORED and size != packed):
        raise _zip_fault(f"a member claims {packed} bytes")
    after = stop
    if described:
        after += 4 * (blob[stop : stop + 4] == b"PK\x07\x08") + (20 if 0xFFFFFFFF in (local.size, local.packed) else 12)
    text = name.decode("utf-8", "backslashreplace").removesuffix(".npy")
    return Member(text, entry.method, entry.crc, data, stop, size, after), following


class _Layout(NamedTuple):
    """All of a file that was read well but its data and checksums: another file that has the same is laid out alike."""

    segments: tuple[slice, ...]
    bytes: bytes
    checksums: tuple[slice, slice]
    member: Member
    names: tuple[str, ...]


_layouts: dict[int, _Layout] = {}


def _directory(blob: bytes) -> tuple[Member, tuple[str, ...]]:
    """The member that holds the features, and the names of all; as `_members` and `_choose`, but faster.

    All files of a set are usually written alike, so most of what there is to check has been checked already.
    """
    layout = _layouts.get(len(blob))
    if layout and b"".join([blob[segment] for segment in layout.segments]) == layout.bytes:
        local, central = (blob[place] for place in layout.checksums)
        if local == central:
            return layout.member._replace(crc=int.from_bytes(local, "little")), layout.names
    members = _members(blob)
    member, names = _choose(blob, members), tuple(member.name for member in members)
    if len(members) == 1 and member.next == member.stop:
        central = member.stop + 16
        segments = (slice(14), slice(18, member.start), slice(member.stop, central), slice(central + 4, None))
        if len(_layouts) >= 4096:
            _layouts.clear()
        checksums = (slice(14, 18), slice(central, central + 4))
        _layouts[len(blob)] = _Layout(segments, b"".join(map(blob.__getitem__, segments)), checksums, member, names)
    return member, names


def _unpacked(blob: bytes, member: Member, limit: int = MAX_ARRAY_BYTES) -> bytes | memoryview:
    """A member's bytes, inflated under a cap and checked against the CRC."""
    if member.size > limit:
        raise DataError("too-large", f"its array claims {member.size} bytes; the limit is {limit}")
    data = memoryview(blob)[member.start : member.stop]
    data = _inflated(data, member) if member.method == _DEFLATED else data[: member.size]
    if zlib.crc32(data) != member.crc:
        raise DataError("bad-crc", "the array's bytes do not match their checksum")
    return data


def _inflated(data: memoryview, member: Member) -> bytes:
    if member.size > 100 * len(data) + (1 << 20):
        raise DataError("bomb", f"{len(data)} bytes would inflate to {member.size}: no features shrink so much")
    inflater = zlib.decompressobj(-15)
    try:
        blob = inflater.decompress(data, member.size + 1)
    except zlib.error:
        raise DataError("bad-crc", "the compressed bytes are damaged") from None
    if not inflater.eof or inflater.unused_data or len(blob) != member.size:
        raise DataError("size-mismatch", f"{member.size} bytes are declared and {len(blob)} were inflated")
    return blob


def _choose(blob: bytes, members: list[Member]) -> Member:
    """The member that holds the features: a known key, else the first float array that is no label."""
    by_key = {member.name: member for member in members}
    for key in KEYS:
        if key in by_key:
            return by_key[key]
    unlabelled = [member for member in members if not any(word in member.name.lower() for word in _LABEL_WORDS)]
    for member in unlabelled:
        # Unpacked and so checked whole: a damaged header must not make it look like something to pass over.
        header, _ = stats.npy_header(_unpacked(blob, member))
        if header.dtype.kind == "f" and header.shape:
            return member
    if not unlabelled:
        raise DataError("no-array", f"holds labels only: {', '.join(by_key)}" if members else "holds no array")
    return unlabelled[0]


def read_features(path: str | Path, transpose: bool = False, nan_to_zero: bool = False) -> Features:
    """Read the features of one NPZ file, once and strictly; nothing in its headers is trusted, nothing is unpickled.

    Returns
    -------
    Features
        Array in float32 and C order, of shape (D,), (T, D) or (T * D,); a leading axis of extent 1 is dropped.

    Raises
    ------
    DataError
        Whatever is wrong with the file; no other exception.
    """
    blob = stats.read_bytes(path, 2 * MAX_ARRAY_BYTES)
    member, names = _directory(blob)
    stored = stats.npy_array(_unpacked(blob, member))
    shape = stored.shape
    if not shape or not stored.size:
        raise DataError("empty-array", f"its array has shape {shape}: no numbers to train on")
    if stored.ndim > 1 and shape[0] == 1:
        stored = stored[0]
    if stored.ndim > 2:
        raise DataError("bad-shape", f"its array has shape {shape}; (D,), (T, D) or (1, T, D) is needed")
    array = _float32(stored.T if transpose and stored.ndim == 2 else stored)
    array, square = _finite(array, nan_to_zero)
    flat = array.reshape(-1)
    if flat.size > 1 and flat[0] == flat[-1] and flat.min() == flat.max():
        raise DataError("constant", f"all {flat.size} values are {flat[0]:g}: the extraction failed")
    return Features(
        array, member.name, _dtype_name(stored.dtype), names, member.crc, math.sqrt(square / flat.size), shape
    )


_dtype_name = functools.cache(lambda dtype: dtype.name)  # numpy makes the name anew at each call


def _float32(stored: np.ndarray) -> np.ndarray:
    """A copy in float32 and C order, which lets the file's bytes go; what is too large for it becomes Inf."""
    if stored.dtype.itemsize <= 4:
        return stored.astype(np.float32, order="C")
    with np.errstate(over="ignore"):
        return stored.astype(np.float32, order="C")


def _finite(array: np.ndarray, nan_to_zero: bool) -> tuple[np.ndarray, float]:
    """Refuse or clear NaN and Inf; looked for in float32, since 1e300 is finite as float64 only.

    Returns the array and the sum of its squares, which is also the quick test: it is finite only if all values are.
    """
    flat = array.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(flat.dot(flat))
    if math.isfinite(square):
        return array, square
    bad = ~np.isfinite(array)
    if bad.any() and not nan_to_zero:
        first = tuple(int(place[0]) for place in np.nonzero(bad))
        raise DataError("not-finite", f"{bad.sum()} of {array.size} values are NaN or Inf, the first at {first}")
    array = np.where(bad, np.float32(0), array)
    return array, float(np.square(array, dtype=np.float64).sum())


def read_arrays(path: str | Path, limit: int = 1 << 34) -> dict[str, np.ndarray]:
    """Read every array of an NPZ file of at most `limit` bytes as strictly as `read_features` does.

    Raises
    ------
    DataError
        Whatever is wrong with the file.
    """
    blob = stats.read_bytes(path, limit)
    return {member.name: stats.npy_array(_unpacked(blob, member, limit)) for member in _members(blob)}


# --- scanning a folder --------------------------------------------------------------------------------------------

#: Why a file is left out: what to do about each code. The finding itself says what was found.
REMEDIES = {
    "unreadable": "check its owner and its rights",
    "not-a-file": "remove it",
    "too-large": "split the recording into utterances",
    "empty": "extract its features again",
    "truncated": "copy it again, or extract its features again",
    "git-lfs": "fetch the real file",
    "not-npz": "write its features with np.savez(file, emb=array)",
    "pickle": "save plain float arrays with np.savez",
    "bad-zip": "copy it again, or extract its features again",
    "junk": "copy it again, or extract its features again",
    "encrypted": "save it without a password",
    "unknown-compression": "save it with np.savez",
    "bad-crc": "copy it again, or extract its features again",
    "size-mismatch": "copy it again, or extract its features again",
    "bomb": "do not trust where it came from",
    "bad-npy-header": "copy it again, or extract its features again",
    "no-array": "write its features with np.savez(file, emb=array)",
    "not-float": "save the features as float32",
    "empty-array": "the recording may be too short; extract its features again",
    "bad-shape": "save one array of shape (D,) or (T, D)",
    "not-finite": "extract its features again, or read such values as zeros with --nan-to-zero",
    "constant": "extract its features again",
    "absurd-scale": "extract its features again",
    "unknown-name": "rename it after its corpus, put it into an emotion-named folder, or use --pattern or --labels",
    "ambiguous-name": "say which with --corpus, or put the corpus before the name",
    "label-conflict": "find out which is right, then rename the file or move it",
    "not-in-table": "add a line for it to the table",
    "video-only": "remove it: a recording without sound has no speech in it",
    "duplicate-conflict": "find out which label is right and remove the other file",
    "duplicate-speaker": "find out whose it is and remove the other file",
    "transposed": "save it as (T, D), or turn every sequence round with --transpose",
    "other-width": "extract all features with one encoder, or choose with --dim",
    "other-encoder": "extract it with the encoder that the model was trained with",
}

#: What is worth knowing of files that are used all the same.
NOTES = {
    "duplicate": "the same features under two names and one label; they count twice",
    "twins": "the same recording with and without its picture; they count twice",
    "song": "sung, not spoken; figures of others are for speech alone",
    "known-damaged": "recordings of this corpus that are known to be damaged",
    "norm-outlier": "features far larger or smaller than those of the rest",
    "dead-dimensions": "dimensions that do not vary over the set",
    "already-normalised": "the features have mean 0 and deviation 1 already; normalising again does no harm",
    "no-speaker": "no speaker is known for these; a figure is speaker-independent only where speakers are known",
    "few-speakers": "a class that few speakers have: its recall is hardly more than an anecdote",
    "few-utterances": "a class with few utterances",
    "imbalance": "the largest class is many times the smallest; UA counts all classes alike, WA does not",
    "reshaped": "flat vectors that were cut into frames",
    "leading-axis": "(1, D) and (1, T, D) were read without their first axis",
    "other-arrays": "further arrays in the files, left alone",
}


@dataclasses.dataclass(frozen=True)
class ScanOptions:
    """What a user can say of a folder; the command lines of both programs are built from it."""

    directory: str
    corpus: str | None = option(None, "the corpus that is meant where several can claim a name")
    pattern: str | None = option(None, "your own names: a regular expression of the whole name with a group emotion")
    labels: str | None = option(None, "your own labels: a CSV file with the columns file, emotion and speaker")
    merge: tuple[str, ...] = option((), "fold one emotion into another, as in calm=neutral; may be repeated")
    classes: str | None = option(None, "keep only these emotions, as in happy,sad,angry")
    dim: int | None = option(None, "width of the features, where the set does not tell it")
    transpose: bool = option(False, "sequences are stored as (D, T)")
    nan_to_zero: bool = option(False, "read NaN and Inf as zeros instead of leaving the file out")

    def __post_init__(self):
        demand(bool(str(self.directory)), "DIR", "a folder, not an empty name")
        object.__setattr__(self, "merge", tuple(self.merge))
        demand(self.dim is None or self.dim >= 1, "dim", "at least 1")
        demand(self.pattern != "" and self.labels != "", "pattern and --labels", "more than an empty text")
        demand(self.corpus in (None, *emotions.CORPORA), "corpus", f"one of {', '.join(emotions.CORPORA)}")
        demand(
            all(re.fullmatch(r"\s*[^=,\s]+\s*=\s*[^=,\s]+\s*", entry) for entry in self.merge),
            "merge",
            "as calm=neutral",
        )
        demand(self.classes is None or bool(_words(self.classes)), "classes", "as happy,sad,angry")
        demand(not (self.pattern and self.labels), "pattern", "given without --labels")


class Finding(NamedTuple):
    """Why one file is left out."""

    file: str
    code: str
    reason: str


class Note(NamedTuple):
    """What a user should know of the set; nothing is left out for it."""

    code: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A file that training can use. `shape` is the shape in the file, `rms` the root of the mean square."""

    utterance: emotions.Utterance
    labelled_by: str
    shape: tuple[int, ...]
    key: str
    dtype: str
    crc: int
    rms: float

    @property
    def file(self) -> str:
        return self.utterance.file


@dataclasses.dataclass
class Scan:
    """All that is known of a folder; `records` are what training uses, sorted by file name, `findings` the rest.

    `features` is empty, or holds the arrays of `records` in the same order, shape (T, D) each. `moments` are those of
    all frames of width D that were read. `fingerprint` tells one set of files and contents from another;
    `cuts_vectors` whether flat vectors of T * D values were cut into frames.
    """

    directory: Path
    dim: int | None = None
    records: list[Record] = dataclasses.field(default_factory=list)
    findings: list[Finding] = dataclasses.field(default_factory=list)
    notes: list[Note] = dataclasses.field(default_factory=list)
    features: list[np.ndarray] = dataclasses.field(default_factory=list)
    moments: stats.Moments | None = None
    hidden: int = 0
    unwanted: int = 0
    leading: int = 0
    other_files: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    other_members: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    stored: stats.Stored | None = None
    fingerprint: str = ""
    cuts_vectors: bool = False

    @property
    def files(self) -> int:
        return len(self.records) + len(self.findings) + self.unwanted

    def count(self, field: str) -> dict[str, int]:
        """Utterances for each value of one field of the name, emotions in the order of the vocabulary."""
        counts = collections.Counter(getattr(record.utterance, field) for record in self.records)
        known = {word: place for place, word in enumerate(emotions.EMOTIONS)}
        return {key: counts[key] for key in sorted(counts, key=lambda key: (known.get(key, len(known)), key or ""))}

    def left_out(self) -> dict[str, int]:
        """How many files are left out for each code."""
        return dict(sorted(collections.Counter(finding.code for finding in self.findings).items()))

    @property
    def statistics_are_stale(self) -> bool:
        """Whether the statistics in the folder were computed by us, but for other files than these."""
        return self.stored is not None and not self.stored.supplied and self.stored.fingerprint != self.fingerprint

    def leave_out(self, reasons: dict[str, tuple[str, str]]) -> None:
        """Move the named files from the records to the findings; `reasons` maps a file to its code and reason."""
        kept = [place for place, record in enumerate(self.records) if record.file not in reasons]
        self.findings += [Finding(file, code, reason) for file, (code, reason) in reasons.items()]
        self.features = [self.features[place] for place in kept] if self.features else []
        self.records = [self.records[place] for place in kept]


def printable(name: str) -> str:
    """Escape what could forge or garble a line of output: control characters and bytes that are not UTF-8."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _walk(folder: Path, scan: Scan) -> Iterator[str]:
    """Yield the NPZ files below a folder as paths relative to it; count what is passed over."""
    pending, seen = [""], set()
    while pending:
        relative = pending.pop()
        place = os.path.join(folder, relative)
        try:
            status = os.stat(place)
            entries = list(os.scandir(place))
        except OSError as error:
            scan.findings.append(Finding(relative, "unreadable", f"the folder cannot be read: {error.strerror}"))
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link that leads back
        seen.add((status.st_dev, status.st_ino))
        names = {entry.name for entry in entries}
        if {"model.npz", "config.json"} <= names or {"fusion.npz", "predictions.csv"} <= names:
            scan.hidden += len(entries)  # the results of a run that was saved in here
            continue
        for entry in entries:
            path = os.path.join(relative, entry.name)
            if entry.name.startswith((".", "~")) or entry.name == "__MACOSX":
                scan.hidden += 1
            elif entry.name.lower().endswith(".npz"):
                if _is_folder(entry):
                    scan.findings.append(Finding(path, "not-a-file", "is a folder"))
                else:
                    yield path
            elif _is_folder(entry):
                pending.append(path)
            elif entry.name not in (stats.MEAN_FILE, stats.STD_FILE, stats.BINDING_FILE):
                scan.other_files[os.path.splitext(entry.name)[1].lower() or entry.name] += 1


# --- what the files are called ---


class Named(NamedTuple):
    """What name, folder or table say of a file, and which of them gave the emotion."""

    utterance: emotions.Utterance
    source: str


def _named(files: list[str], options: ScanOptions) -> Iterator[Named | DataError]:
    """Label every file by the user's table or pattern, or else by its name and its folders."""
    if options.labels:
        yield from _by_table(files, Path(options.labels))
    elif options.pattern:
        yield from _by_pattern(files, options.pattern)
    else:
        for file, parsed in zip(files, emotions.parse_names(files, options.corpus)):
            yield _by_name(file, parsed)


def _by_name(file: str, parsed: emotions.Utterance | ValueError) -> Named | DataError:
    folders = file.split(os.sep)[-2::-1]  # the innermost first; pathlib would take longer than the reading
    by_folder = next((word for folder in folders if (word := emotions.folder_emotion(folder))), None)
    if isinstance(parsed, emotions.AmbiguousName):
        return DataError("ambiguous-name", str(parsed))
    if isinstance(parsed, ValueError):
        if by_folder is None:
            return DataError("unknown-name", str(parsed))
        return Named(emotions.Utterance(file, "folder", by_folder, speaker=None), "folder")
    if parsed.modality == "video":
        return DataError("video-only", "holds a picture and no sound, says its name")
    if by_folder not in (None, parsed.emotion):
        return DataError("label-conflict", f"its name says {parsed.emotion} and its folder says {by_folder}")
    return Named(parsed, "name")


def _by_pattern(files: list[str], text: str) -> Iterator[Named | DataError]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UsageError(f"--pattern is no regular expression: {error}") from None
    if "emotion" not in pattern.groupindex:
        raise UsageError("--pattern needs a group (?P<emotion>...), and (?P<speaker>...) where the names tell it")
    for file in files:
        stem = emotions.without_extensions(file)
        match = pattern.fullmatch(stem) or pattern.fullmatch(stem.replace(os.sep, "/").rpartition("/")[2])
        if match and match["emotion"]:
            fields = match.groupdict()
            yield Named(
                emotions.custom_utterance(file, fields.pop("emotion"), fields.pop("speaker", None), fields), "pattern"
            )
        else:
            yield DataError("unknown-name", f"{stem!r} does not match the pattern")


def _by_table(files: list[str], table: Path) -> Iterator[Named | DataError]:
    name = printable(str(table))
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not rows or not {"file", "emotion"} <= rows[0].keys():
        raise UsageError(f"{name}: needs a first line with the columns file and emotion, and speaker where it is known")
    known: dict[str, dict] = {}
    for row in rows:
        key = emotions.without_extensions(row["file"] or "")
        if key in known and known[key] != row:
            raise UsageError(f"{name}: has two lines for {printable(key)}")
        known[key] = row
    for file in files:
        stem = emotions.without_extensions(file).replace(os.sep, "/")
        row = known.get(stem) or known.get(stem.rpartition("/")[2])
        if row and (row["emotion"] or "").strip():
            yield Named(emotions.custom_utterance(file, row["emotion"], row.get("speaker")), "table")
        else:
            yield DataError("not-in-table", f"has no line in {name}" if not row else f"has no emotion in {name}")


def _words(text: str) -> list[str]:
    return [emotions.normalise_emotion(word) for word in text.split(",") if word.strip()]


class _Wanted:
    """What --merge and --classes make of an emotion: another one, itself, or None if it is not wanted."""

    def __init__(self, options: ScanOptions):
        self.fold = dict(tuple(_words(entry.replace("=", ","))) for entry in options.merge)
        self.kept = None if options.classes is None else _words(options.classes)
        self.seen: set[str] = set()

    def __call__(self, emotion: str) -> str | None:
        folded = self.fold.get(emotion, emotion)
        self.seen |= {emotion, folded}
        return folded if self.kept is None or folded in self.kept else None

    def check(self) -> None:
        """Say which word of the two options no file has: it would do nothing in silence."""
        unknown = [word for word in (*self.fold, *(self.kept or ())) if word not in self.seen]
        if unknown:
            found = printable(", ".join(sorted(self.seen))) or "none"
            raise UsageError(f"no file has the emotion {printable(', '.join(unknown))}; found: {found}")


# --- which width they have ---


def _shows_width(shapes: collections.Counter, width: int) -> bool:
    """Whether sequences of this width say that flat vectors of T * D values belong to them.

    Such vectors differ in length as recordings do, and vectors of an encoder are all as long: one odd file among those
    must not cut them up.
    """
    sequences = sum(files for shape, files in shapes.items() if len(shape) == 2 and shape[1] == width)
    flat = [files for shape, files in shapes.items() if len(shape) == 1 and shape[0] != width]
    return width > 1 and sequences > 0 and (sequences >= max(flat, default=0) or 2 * max(flat) < sum(flat))


def _common_width(shapes: collections.Counter) -> int | None:
    """The width D that most files fit: vectors (D,), sequences (T, D), and flat (T * D,) where sequences show D."""
    heights = {shape[0] for shape in shapes}
    if len(shapes) > 2 and len(heights) == 1 and all(len(shape) == 2 for shape in shapes):
        return heights.pop()  # (D, T) with T that varies
    support = collections.Counter()
    for width in {shape[-1] for shape in shapes}:
        shown = _shows_width(shapes, width)
        for shape, files in shapes.items():
            support[width] += files * (shape[-1] == width or (shown and len(shape) == 1 and shape[0] % width == 0))
    (width, files), *others = support.most_common(2) or [(None, 0)]
    if others and others[0][1] == files:
        tied = " and ".join(str(width) for width, count in sorted(support.items()) if count == files)
        raise UsageError(f"as many files have features of width {tied}; choose one with --dim")
    return width


def _misfits(result: Scan) -> dict[str, tuple[str, str]]:
    """The files whose features are not D wide.

    A flat vector of T * D values is cut into frames only where D is more than the common length of vectors, since one
    encoder's vector is often twice as wide as another's.
    """
    found = {record.file: _misfit(record.shape, result.dim, result.cuts_vectors) for record in result.records}
    return {file: misfit for file, misfit in found.items() if misfit}


def _misfit(shape: tuple[int, ...], dim: int, cuts_vectors: bool) -> tuple[str, str] | None:
    if shape[-1] == dim or (cuts_vectors and len(shape) == 1 and shape[0] % dim == 0):
        return None
    if len(shape) == 2 and shape[0] == dim:
        return "transposed", f"shape {shape} looks like (D, T) and not like (T, D)"
    return "other-width", f"shape {shape} does not fit features of width {dim}"


# --- the scan ---


class _Shelf:
    """Copies of arrays, side by side in blocks that go back to the system with the last array that lies on them.

    Each on its own, arrays of a few hundred kB would lie between the small objects of the scan, and their memory
    would stay with the process when they are given up.
    """

    def __init__(self):
        self._block, self._used = np.empty(0, np.float32), 0

    def keep(self, array: np.ndarray) -> np.ndarray:
        if self._used + array.size > self._block.size:
            self._block, self._used = np.empty(max(array.size, 1 << 24), np.float32), 0
        kept = self._block[self._used : self._used + array.size].reshape(array.shape)
        self._used += array.size
        kept[...] = array
        return kept


def scan(
    options: ScanOptions,
    *,
    keep_features: bool = False,
    progress: Callable[[int], None] = lambda files: None,
) -> Scan:
    """Read every NPZ file below a folder and decide which ones training can use.

    This one function decides it for `check_data.py` and for `train.py`.

    Parameters
    ----------
    keep_features
        Whether to keep the arrays; without it no more than one sequence is in memory at a time.
    progress
        Called with the number of files read so far.

    Raises
    ------
    UsageError
        If there is no such folder, no NPZ file in it, or no telling which width is meant.
    stats.DataError
        `bad-statistics`, if the statistics files in the folder cannot be used.
    """
    result = Scan(folder(options.directory))
    result.stored = stats.load(result.directory)
    files = sorted(_walk(result.directory, result))
    if not files and not result.findings:
        raise UsageError(_nothing_found(result))
    wanted, place, shelf = _Wanted(options), str(result.directory), _Shelf()
    moments: dict[int, stats.RunningMoments] = collections.defaultdict(stats.RunningMoments)
    for number, (file, name) in enumerate(zip(files, _named(files, options)), 1):
        try:
            if isinstance(name, DataError):
                raise name
            emotion = wanted(name.utterance.emotion)
            if emotion is None:
                result.unwanted += 1
                continue
            read = read_features(f"{place}{os.sep}{file}", options.transpose, options.nan_to_zero)
        except DataError as error:
            result.findings.append(Finding(file, error.code, error.reason))
            continue
        finally:
            progress(number)
        utterance = name.utterance
        if emotion != utterance.emotion:
            utterance = dataclasses.replace(utterance, emotion=emotion)
        shape = read.array.shape
        result.records.append(Record(utterance, name.source, shape, read.key, read.dtype, read.crc, read.rms))
        result.other_members.update(member for member in read.members if member != read.key)
        result.leading += len(read.stored_shape) > len(shape)
        moments[shape[-1]].add(read.array.reshape(-1, shape[-1]))
        if keep_features:
            result.features.append(shelf.keep(read.array))
    wanted.check()
    _settle(result, options, moments)
    return result


def stream(
    options: ScanOptions,
    result: Scan,
    rms: float,
    merge: tuple[str, ...] = (),
    progress: Callable[[int], None] = lambda files: None,
) -> Iterator[tuple[emotions.Utterance, np.ndarray]]:
    """Read the files of a folder, or a single file, one at a time, for a model that knows its features already.

    Parameters
    ----------
    result
        Says where, how wide the features are, and whether flat vectors are cut into frames. What cannot be used is
        added to its findings.
    rms
        Root of the mean square of the features that the model was trained on.
    merge
        Emotions that the model folds into others, beside those of the options.

    Yields
    ------
    utterance, frames
        What the name tells, whose emotion is None where it tells none that is wanted, and the features, (T, D).

    Raises
    ------
    UsageError
        If there is no such folder or file, or no NPZ file in it.
    """
    place, wanted, asked = result.directory, _Wanted(options), _Wanted(options)
    wanted.fold = _Wanted(dataclasses.replace(options, merge=merge)).fold | wanted.fold
    if place.is_dir():
        files = names = sorted(_walk(folder(place), result))
    elif os.path.lexists(place):  # its folders may tell the emotion, or the speaker
        files, names, place = [place.name], [os.sep.join(place.absolute().parts[-3:])], place.parent
    else:
        raise UsageError(f"{printable(str(place))}: no such file or folder{_suggestion(place.parent)}")
    if not files and not result.findings:
        raise UsageError(_nothing_found(result))
    for number, (file, name) in enumerate(zip(files, _named(names, options)), 1):
        utterance = emotions.Utterance(file, "", None, None)
        if not isinstance(name, DataError):
            utterance = dataclasses.replace(name.utterance, file=file, emotion=wanted(name.utterance.emotion))
        try:
            read = read_features(place / file, options.transpose, options.nan_to_zero)
            if fault := _misfit(read.array.shape, result.dim, result.cuts_vectors) or _off_scale(read.rms, rms):
                raise DataError(*fault)
        except DataError as error:
            result.findings.append(Finding(file, error.code, error.reason))
        else:
            yield utterance, read.array.reshape(-1, result.dim)
        progress(number)
    asked.seen = wanted.seen
    asked.check()


def _settle(result: Scan, options: ScanOptions, moments: dict[int, stats.RunningMoments]) -> None:
    """Decide what only the whole set can tell: its width, its duplicates, its notes."""
    result.fingerprint = _fingerprint(result.records)
    shapes = collections.Counter(record.shape for record in result.records)
    bound = _width_of_statistics(result, options)
    known = options.dim or bound
    result.dim = known or _common_width(shapes)
    result.cuts_vectors = bool(known or (shapes and _shows_width(shapes, result.dim)))
    result.leave_out(_misfits(result))
    if bound and shapes and not result.records:
        shape = shapes.most_common(1)[0][0]
        raise DataError("bad-statistics", f"{stats.MEAN_FILE} has {bound} numbers and the files have shape {shape}")
    result.features = [array.reshape(-1, result.dim) for array in result.features]
    result.moments = moments[result.dim].merged() if result.dim in moments else None
    absurd = _absurd(result)
    result.leave_out(absurd)
    if absurd:  # they are in the moments too
        result.moments = None
    result.leave_out(_duplicates(result, options))
    result.notes += sorted(_notes(result))
    result.findings.sort()


def _fingerprint(records: list[Record]) -> str:
    """Hash of the names and contents of files: another set has another one."""
    listing = "\n".join(f"{record.file!r} {record.shape} {record.crc}" for record in records)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def _width_of_statistics(result: Scan, options: ScanOptions) -> int | None:
    """The width that the statistics files bind the set to: the user's own do, ours only if they are for these files."""
    if result.stored is None or result.statistics_are_stale:
        return None
    width = result.stored.statistics.mean.size
    if result.stored.supplied and options.dim not in (None, width):
        raise DataError("bad-statistics", f"{stats.MEAN_FILE} has {width} numbers and --dim says {options.dim}")
    shapes = {record.shape for record in result.records}
    if result.stored.supplied and len(shapes) == 1 and len(result.records) > 1 and options.dim is None:
        (shape,) = shapes
        if len(shape) == 1 and shape[0] != width:  # vectors of one length are no sequences
            raise DataError("bad-statistics", f"{stats.MEAN_FILE} has {width} numbers and the files have shape {shape}")
    return width


def _absurd(result: Scan) -> dict[str, tuple[str, str]]:
    """Files whose features are a thousand times as large as those of the rest, or as small: damage that is finite."""
    size = np.array([record.rms for record in result.records])
    if len(size) < 10 or not (middle := np.median(size)):
        return {}
    found = {record.file: _off_scale(record.rms, middle) for record in result.records}
    return {file: fault for file, fault in found.items() if fault}


def _off_scale(rms: float, usual: float) -> tuple[str, str] | None:
    if usual / 1000 < rms < usual * 1000:
        return None
    return "absurd-scale", f"its values are about {rms:.3g} and those of the set about {usual:.3g}"


def _duplicates(result: Scan, options: ScanOptions) -> dict[str, tuple[str, str]]:
    """Files with the same features: a note where they agree in label and speaker, otherwise they are left out.

    With two labels none of them can be trusted; of several speakers, or of unknown ones, only the first file stays,
    since the others might come to stand on the other side of a split.
    """
    alike = collections.defaultdict(list)
    for record in result.records:
        alike[record.crc, record.shape, record.dtype].append(record)
    reasons, harmless = {}, []
    for first, *others in alike.values():
        others = [other for other in others if _same_features(result.directory, options, first, other)]
        group = [first, *others]
        labels = sorted({record.utterance.emotion for record in group})
        speakers = {record.utterance.speaker for record in group}
        if len(labels) > 1:
            for record in group:
                other = next(other for other in group if other.utterance.emotion != record.utterance.emotion)
                label = printable(other.utterance.emotion)
                told = f"has the same features as {printable(other.file)}, which is labelled {label}"
                reasons[record.file] = ("duplicate-conflict", told)
        elif len(speakers) > 1 or None in speakers:
            for record in others:
                whose = printable(first.utterance.speaker or "an unknown speaker")
                told = f"has the same features as {printable(first.file)} of {whose}"
                reasons[record.file] = ("duplicate-speaker", told)
        else:
            harmless += [f"{printable(first.file)} = {printable(record.file)}" for record in others]
    if harmless:
        result.notes.append(Note("duplicate", _some(harmless)))
    return reasons


def _same_features(directory: Path, options: ScanOptions, one: Record, other: Record) -> bool:
    """Compare two files whose checksums agree, which is no proof yet."""
    try:
        first, second = (
            read_features(directory / record.file, options.transpose, options.nan_to_zero).array
            for record in (one, other)
        )
    except DataError:  # gone by now
        return False
    return np.array_equal(first, second)


def _some(names: list[str], limit: int = 5) -> str:
    return f"{len(names)}: {', '.join(names[:limit])}" + ", ..." * (len(names) > limit)


def _notes(result: Scan) -> Iterator[Note]:
    yield from _name_notes(result)
    yield from _class_notes(result)
    yield from _number_notes(result)
    reshaped = sum(len(record.shape) == 1 and record.shape[0] != result.dim for record in result.records)
    if reshaped:
        yield Note("reshaped", f"{reshaped} files, frames of {result.dim}")
    if result.leading:
        yield Note("leading-axis", f"{result.leading} files")
    if result.other_members:
        yield Note("other-arrays", _listing(dict(result.other_members.most_common()), 5))


def _name_notes(result: Scan) -> Iterator[Note]:
    """What the names tell of the recordings."""
    utterances = [record.utterance for record in result.records]
    takes = collections.defaultdict(list)
    for utterance in utterances:
        if utterance.modality:
            takes[dataclasses.replace(utterance, file="", modality=None)].append(printable(utterance.file))
    twins = [" = ".join(files) for files in takes.values() if len(files) > 1]
    if twins:
        yield Note("twins", _some(twins))
    sung = [printable(utterance.file) for utterance in utterances if utterance.channel == "song"]
    if sung:
        yield Note("song", _some(sung, 3))
    damaged = [f"{printable(u.file)} ({told})" for u in utterances if (told := emotions.known_damage(u))]
    if damaged:
        yield Note("known-damaged", _some(damaged))
    nameless = collections.Counter(utterance.corpus for utterance in utterances if utterance.speaker is None)
    if nameless:
        yield Note("no-speaker", _listing(dict(nameless)))


def _class_notes(result: Scan) -> Iterator[Note]:
    """Classes too small to be learned or judged."""
    counts = result.count("emotion")
    speakers = collections.defaultdict(set)
    for record in result.records:
        speakers[record.utterance.emotion].add(record.utterance.speaker)
    few = [
        f"{printable(emotion)} {len(who)} speakers"
        for emotion, who in speakers.items()
        if len(who) < 5 and None not in who
    ]
    if few:
        yield Note("few-speakers", ", ".join(few))
    small = {emotion: count for emotion, count in counts.items() if count < 10}
    if small:
        yield Note("few-utterances", _listing(small))
    if counts and max(counts.values()) > 5 * min(counts.values()):
        yield Note("imbalance", _listing(counts))


def _number_notes(result: Scan) -> Iterator[Note]:
    """What the numbers tell of the extraction."""
    size = np.log([max(record.rms, 1e-30) for record in result.records])
    if len(size) >= 10:
        distance = np.abs(size - np.median(size))
        far = np.flatnonzero(distance > max(np.log(3), 10 * np.median(distance)))
        named = [f"{printable(result.records[place].file)} ({result.records[place].rms:.3g})" for place in far]
        if named:
            yield Note("norm-outlier", f"{_some(named)}; the median is {np.exp(np.median(size)):.3g}")
    if result.moments is None or result.moments.count < 10:
        return
    statistics = result.moments.statistics()
    dead = np.flatnonzero(statistics.constant())
    if dead.size:
        yield Note("dead-dimensions", _some([str(place) for place in dead], 10))
    if np.median(np.abs(statistics.mean)) < 0.02 and abs(np.median(statistics.std) - 1) < 0.02:
        yield Note("already-normalised", f"over {int(result.moments.count)} frames")


def folder(directory: str | Path) -> Path:
    """The folder as a path.

    Raises
    ------
    UsageError
        If there is none; the usual other places are named where they hold features.
    """
    path = Path(directory)
    name = printable(str(directory))
    try:
        os.scandir(path).close()
    except FileNotFoundError:
        raise UsageError(f"{name}: no such folder{_suggestion(path.parent)}") from None
    except NotADirectoryError:
        raise UsageError(f"{name}: is a file; give the folder that holds the NPZ files") from None
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error.strerror}") from None
    return path


def _suggestion(folder: Path) -> str:
    """Look at the usual other places for features and name those that hold any."""
    usual = ("models/wav2vec", "wav2vec_features", "wav2vec", "features", "embeddings")
    places = [base / place for base in (folder, folder.parent) for place in usual]
    found = [place for place in dict.fromkeys(places) if os.access(place, os.R_OK) and any(place.glob("*.npz"))]
    return f"; there are NPZ files in {', '.join(printable(str(place)) for place in found)}" if found else ""


def _nothing_found(result: Scan) -> str:
    found = ", ".join(f"{count} {printable(suffix)}" for suffix, count in result.other_files.most_common(5))
    advice = ""
    if any(suffix in result.other_files for suffix in (".wav", ".flac", ".mp3", ".mp4")):
        advice = ": extract embeddings first"
    what = f"only {found} files{advice}" if found else "the folder is empty"
    return f"{printable(str(result.directory))}: no NPZ file; {what}{_suggestion(result.directory)}"


def obstacles(result: Scan) -> list[str]:
    """What stops training on this folder, each in one sentence that tells what to do; empty if nothing does."""
    if not result.records:
        return ["no file can be used; mend the first of the findings above and the rest often follows"]
    classes = result.count("emotion")
    if len(classes) < 2:
        return [f"all files have one emotion ({printable(next(iter(classes)))}); add files of another"]
    if len(result.records) < 10:
        return [f"{len(result.records)} usable files are too few to train and to test on; add more"]
    return []


# --- reporting ----------------------------------------------------------------------------------------------------


def _listing(counts: dict[str, int], limit: int = 12) -> str:
    shown = [f"{printable(str(key))} {count}" for key, count in list(counts.items())[:limit]]
    return ", ".join(shown) + (f", and {len(counts) - limit} more" if len(counts) > limit else "")


def _span(values: Iterable[int]) -> str:
    lowest, highest = min(values), max(values)
    return str(lowest) if lowest == highest else f"{lowest} to {highest}"


def _label_sources(result: Scan) -> str:
    sources = collections.Counter(record.labelled_by for record in result.records)
    nested = any("/" in record.utterance.file or os.sep in record.utterance.file for record in result.records)
    layout = "in subfolders" if nested else "flat in the folder"
    words = {
        "name": "read from the file names",
        "folder": "read from emotion-named folders",
        "pattern": "read by your pattern",
        "table": "read from your table",
    }
    return f"{' and '.join(f'{words[source]} ({count})' for source, count in sources.items())}; files lie {layout}"


def _statistics_line(result: Scan) -> str:
    pair = f"{stats.MEAN_FILE} and {stats.STD_FILE}"
    if result.stored is None:
        return "none here; train.py will compute them and save them here"
    if result.stored.supplied:
        return f"{pair} are yours and apply everywhere"
    if result.statistics_are_stale:
        return f"{pair} were computed for OTHER files and are not used; train.py --recompute-stats renews them"
    return f"{pair} were computed for these files"


def _features_line(result: Scan) -> str:
    forms = collections.Counter("vector" if record.shape == (result.dim,) else "sequence" for record in result.records)
    lengths = [math.prod(record.shape) // result.dim for record in result.records]
    form = " and ".join(f"{count} {form}{'s' * (count != 1)}" for form, count in forms.most_common())
    frames = f" of {_span(lengths)} frames" if "sequence" in forms else ""
    return f"{form}{frames}, {result.dim} numbers wide"


def findings_report(result: Scan, limit: int | None = 20) -> Iterator[str]:
    """One line for each file that is left out, at most `limit` lines for one code."""
    seen = collections.Counter()
    for finding in result.findings:
        seen[finding.code] += 1
        if limit is None or seen[finding.code] <= limit:
            yield f"{printable(finding.file)}: {finding.code} {printable(finding.reason)}; {REMEDIES[finding.code]}"
    for code, count in seen.items():
        if limit is not None and count > limit:
            yield f"... and {count - limit} more {code} (--all)"


def summary(result: Scan) -> Iterator[str]:
    """What is in the folder, a line for each question."""
    used, unused = len(result.records), len(result.findings)
    unwanted = f", {result.unwanted} of other classes" if result.unwanted else ""
    yield f"{printable(str(result.directory))}: {result.files} NPZ files, {used} usable, {unused} left out{unwanted}"
    if result.hidden:
        yield f"  passed over  {result.hidden} hidden or temporary files and results of runs"
    if not result.records:
        return
    speakers = result.count("speaker")
    unknown = speakers.pop(None, 0)
    sizes = f", {_span(speakers.values())} utterances each" if speakers else ""
    nameless = f"; {unknown} files do not tell their speaker" if unknown else ""
    yield f"  corpora      {_listing(result.count('corpus'))}"
    yield f"  labels       {_label_sources(result)}"
    yield f"  emotions     {_listing(result.count('emotion'))}"
    yield f"  speakers     {len(speakers)}{sizes}{nameless}"
    yield f"  features     {_features_line(result)}"
    keys, dtypes = (
        collections.Counter(getattr(record, field) for record in result.records) for field in ("key", "dtype")
    )
    yield f"  array        {_listing(dict(keys.most_common()), 5)}; {_listing(dict(dtypes.most_common()))}"
    yield f"  statistics   {_statistics_line(result)}"
    for note in result.notes:
        yield f"  note         {note.code}: {NOTES[note.code]}: {note.text}"


def report(result: Scan) -> dict:
    """The same report for programs."""
    return {
        "directory": str(result.directory),
        "files": result.files,
        "usable": len(result.records),
        "unwanted": result.unwanted,
        "passed_over": result.hidden,
        "left_out": result.left_out(),
        "findings": [finding._asdict() | {"remedy": REMEDIES[finding.code]} for finding in result.findings],
        "notes": [note._asdict() | {"meaning": NOTES[note.code]} for note in result.notes],
        "dim": result.dim,
        **{
            field: {str(value): count for value, count in result.count(field).items()}
            for field in ("corpus", "emotion", "speaker", "gender", "intensity")
        },
        **{
            field: dict(collections.Counter(str(getattr(record, field)) for record in result.records))
            for field in ("key", "dtype", "shape", "labelled_by")
        },
        "statistics": _statistics_line(result),
        "obstacles": obstacles(result),
        "exit_status": exit_status(result),
    }


def exit_status(result: Scan) -> int:
    return 2 if not result.records else 1 if result.findings or obstacles(result) else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Say what is in a folder of NPZ features and what stops training on it."
    )
    add_options(parser, ScanOptions)
    parser.add_argument("--all", action="store_true", help="list every finding, not only 20 of a kind")
    parser.add_argument("--json", action="store_true", help="print the report for programs")
    given = vars(parser.parse_args(arguments))
    limit, as_json = None if given.pop("all") else 20, given.pop("json")
    try:
        result = scan(ScanOptions(**given))
        if as_json:
            sys.stdout.write(stats.json_bytes(report(result)).decode())
        else:
            for line in (*findings_report(result, limit), *summary(result), *_verdict(result)):
                print(line)
        sys.stdout.flush()
    except (UsageError, DataError) as error:
        print(f"check_data.py: {error}", file=sys.stderr)
        return 2
    return exit_status(result)


def guarded(program: Callable[[], int]) -> int:
    """Run a program so that a terminal, a pipe or a disk behind its output never gives a traceback.

    A reader who has gone gives 141, Ctrl-C 130, an output that cannot be written 1.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return program()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # an ordinary exit waits for a compilation under way, or crashes in it
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"the output cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails once more
        return 141 if isinstance(error, BrokenPipeError) else 1


def _verdict(result: Scan) -> Iterator[str]:
    blocked = obstacles(result)
    for obstacle in blocked:
        yield f"  NOT READY    {obstacle}"
    if not blocked:
        yield f"  ready        python train.py {printable(str(result.directory))}"


if __name__ == "__main__":
    sys.exit(guarded(main))

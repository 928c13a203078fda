#!/usr/bin/env python3
"""Scan a folder of NPZ or NPY features, read every file strictly, and report what prevents training.

    python check_data.py DIR

Exit status: 0 all good, 1 problems found, 2 wrong usage or nothing to work on. Needs numpy only; never imports jax.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # nohup and `&` ignore it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # first of all: Python's own handler would print a traceback

import argparse
import contextlib
import csv
import dataclasses
import difflib
import functools
import hashlib
import io
import math
import os
import re
import shlex
import struct
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import emotions
import stats
from emotions import Utterance
from stats import DataError

Array = np.ndarray
Shape = tuple[int, ...]
Names = tuple[str, ...]
Data = bytes | memoryview
Fault = tuple[str, str]  # code and reason for leaving a file out

#: Names of the array with the features, in order of preference: the four of the contract, then other common ones.
KEYS = (
    *("emb", "embedding", "features", "wav2vec"),
    *("embeddings", "feats", "feat", "feature", "wav2vec_features", "audio_features", "audio_embedding"),
    *("audio_embeddings", "speech_features", "acoustic_features", "last_hidden_state", "last_hidden_states"),
    *("hidden_states", "hidden_state", "pooler_output", "x"),
)
# Words of other keys. Two arrays that are named after encoders are a choice for the user.
_ENCODERS = (
    r"wav2vec2?|w2v2|hubert|wavlm|xlsr|whisper|emotion2vec|data2vec|unispeech|ecapa|[xdi]_?vectors?|sp(ea)?k(er)?_?"
    r"emb(edding)?s?|vggish|yamnet|panns|clap|beats|opensmile|e?gemaps|functionals|lld|mfccs?|(log)?_?mel(spectrogram)?"
    r"|fbanks?|spectrogram"
)
_EMOTIONS, _SPEAKERS = r"labels?|emotions?|targets?|class(es)?|y", r"speakers?|spkr?|actors?|subjects?"
_MEANS, _DEVIATIONS = r"means?|mu|average", r"stds?|sigma|stdev|scale"
NPY_KEY = ".npy"  # stands for the name of the array in an NPY file, which has none
_SHORT = 16  # numbers: labels, one-hot vectors, attributes and scores have at most that many

MAX_SQUARE = 1e36  # sum of squares in a file; float32 ends at 3.4e38
MAX_ARRAY_BYTES = 1 << 28  # an hour at 50 frames per second of 373 float32 values; utterances last seconds
MAX_CLASSES, MAX_CLASS_NAME = 100, 100  # emotions, and characters in each
_MAX_ENTRIES = 100_000  # a damaged count must not keep the reader busy
MAX_LAYERS = 50  # known encoders have 7 to 49, with the input of the first block
_MANY = 20  # arrays of one width are a whole set in one file, not the features of an utterance


# --- options ------------------------------------------------------------------------------------------------------


#: Of the programs; also in metrics.json and config.json. CHANGELOG.md lists what has changed.
VERSION = "1.0.0"
OPTION_GROUPS = ("input and labels", "split", "training", "output")  # in the order of --help


class UsageError(Exception):
    """The request cannot be carried out; the message gives the reason and the remedy. Exit status 2.

    The message may quote names of any kind: it is escaped here. `table` are further lines.
    """

    def __init__(self, message: str, *table: str):
        super().__init__("\n  ".join(map(printable, (message, *table))))


def option(
    default: Any,
    text: str,
    group: str = "input and labels",
    choices: Iterable[str] = (),
    *,
    metavar: str = "",
    bare: str | None = None,
) -> Any:
    """Define a field of an options dataclass, with its default and its --help text, group and choices.

    An option with a `metavar` takes several values at once; one with `bare` may stand without a value, and is that.
    """
    metadata = {"help": text, "group": group, "choices": tuple(choices), "metavar": metavar, "bare": bare}
    return dataclasses.field(default=default, metadata=metadata)


def require(condition: bool, name: str, expected: str) -> None:
    """Raise a UsageError "--NAME must be EXPECTED" unless the condition holds."""
    if not condition:
        raise UsageError(f"{option_flag(name)} must be {expected}")


def suggest(word: str, choices: Iterable[str]) -> str:
    """Suggest the choice that was probably meant, by its letters or its initials; empty if none is close."""
    initials = {"".join(part[:1] for part in choice.split("-")): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), choices, 1, 0.75)
    close = close or ([initials[word.lower()]] if len(word) > 2 and word.lower() in initials else [])
    return f"; did you mean {close[0]}?" if close else ""


def build_parser(options: type, description: str, details: str) -> tuple[argparse.ArgumentParser, dict[str, Any]]:
    """A parser for every field of an options dataclass, the first of which is DIR, and its option groups by title.

    DIR may be left out if its field has a default. `details` (examples, exit status) are printed as they are, below
    the options.
    """
    layout = argparse.RawDescriptionHelpFormatter
    usage = "%(prog)s DIR [options]"
    parser = argparse.ArgumentParser(
        usage=usage, description=description, epilog=details, formatter_class=layout, allow_abbrev=False
    )
    nargs = None if dataclasses.fields(options)[0].default is dataclasses.MISSING else "?"
    help_text = "folder of .npz or .npy files, flat or in subfolders"
    parser.add_argument("directory", metavar="DIR", nargs=nargs, help=help_text)
    version = f"%(prog)s {VERSION}"
    parser.add_argument("--version", action="version", version=version, help="show the version and exit")
    groups = {title: parser.add_argument_group(title) for title in OPTION_GROUPS}
    for field in dataclasses.fields(options)[1:]:
        add_option(groups[field.metadata["group"]], field)
    return parser, groups


def add_option(group: Any, field: dataclasses.Field) -> None:
    """Add one field of an options dataclass to a group of a parser."""
    flag, text, default = option_flag(field.name), field.metadata["help"], field.default
    choices = field.metadata["choices"]
    if field.type is bool:
        group.add_argument(flag, action="store_true", help=text)
    elif field.metadata["metavar"]:
        names = field.metadata["metavar"]
        group.add_argument(flag, action="extend", nargs="+", default=[], metavar=names, help=text)
    elif default == ():
        group.add_argument(flag, action="append", default=[], metavar="STR", help=text)
    else:
        # The type itself, or the first member of a union such as `int | None`.
        kind = next(k for k in (int, float, str) if k in (field.type, *getattr(field.type, "__args__", ())))
        text += f": {', '.join(choices)}" if choices else ""
        text += "" if default is None else " (default: %(default)s)"
        bare = field.metadata["bare"]
        several = {"nargs": "?", "const": bare} if bare else {}
        group.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=text, **several)


def option_flag(name: str) -> str:
    """The command-line flag of a field: `label_smoothing` is --label-smoothing."""
    return f"--{name.replace('_', '-')}"


def check_choices(options: Any) -> None:
    """Raise a UsageError, with the closest choice, if an option with choices has another value."""
    for field in dataclasses.fields(options)[1:]:
        value, choices = getattr(options, field.name), field.metadata["choices"]
        if choices and value is not None:
            expected = f"one of {', '.join(choices)}{suggest(value, choices)}"
            require(value in choices, field.name, expected)


# --- reading one file ---------------------------------------------------------------------------------------------

# np.load is not used: it raises many kinds of exception, and returns a wrong array after some kinds of damage. This
# reader accepts only the subset of zip that NPZ writers use, and is several times faster for a vector.


# The zip records that are read, little-endian (PKWARE APPNOTE 4.3.7, 4.3.12 and 4.3.16), and their fields in order.
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_DIRECTORY_ENTRY = struct.Struct("<4s6H3L5H2L")
_END_RECORD = struct.Struct("<4s4H2LH")
_ZIP64_END = struct.Struct("<4sQ2H2L4Q4sLQL")  # with its locator, which follows
_COMMON = "version flags method time date crc packed size name_length extra_length"
_Local = namedtuple("_Local", f"magic {_COMMON}")
_Central = namedtuple("_Central", f"magic made_by {_COMMON} comment_length disk internal external offset")
_STORED, _DEFLATED = 0, 8  # compression methods
# "Version made by", internal and external attributes as np.savez writes them. Neither a checksum nor a second copy
# protects them, so a value that differs in a single bit is treated as damage; other writers differ in more bits.
_NUMPY_ATTRIBUTES = 0x032D << 48 | 0o600 << 16


class ZipEntry(NamedTuple):
    """One array of an NPZ file, with positions in bytes from the start of the file."""

    name: str
    method: int
    crc: int
    start: int  # of the data
    stop: int
    size: int  # of the data after inflation
    next: int  # where the next entry must begin


class Features(NamedTuple):
    """The features read from a file."""

    array: Array  # float32, of shape (D,), (T, D) or (T * D,), or (L, D) for several layers
    key: str  # name of the array, or NPY_KEY
    dtype: str  # in the file
    array_names: Names  # all arrays in the file
    crc: int
    rms: float  # root mean square of the values
    bit_sum: int  # of the float32 values, as integers
    has_leading_axis: bool  # of length 1, in the file
    n_layers: int = 1  # of the array in the file, if it was read for its layers


class LayerChoice(NamedTuple):
    """Which layers are read from arrays of shape (L, D), (L, T, D) or (T, L, D)."""

    axis: int  # of the layers in arrays of three axes, 0 or 1
    number: int | None  # of the only layer that is read, negative from the end; None for all

    def select(self, stored: Array) -> tuple[Array, int]:
        """A view of the chosen layers, (L, [T,] D), or of the one layer, ([T,] D); and the number of layers."""
        layers = _without_unit_axes(stored)
        if layers.ndim not in (2, 3):
            expected = "expected (L, D), (L, T, D) or (T, L, D)"
            raise DataError("no-layers", f"its array has shape {stored.shape}; {expected}")
        layers = np.moveaxis(layers, self.axis if layers.ndim == 3 else 0, 0)
        count = len(layers)
        if self.number is None:
            return layers, count
        if not -count <= self.number < count:
            raise DataError("no-layers", f"has the layers 0 to {count - 1}, or -{count} to -1, and no {self.number}")
        return layers[self.number], count

    def average(self, layers: Array) -> Array:
        """Mean over the frames of what was selected, if there are any: (L, D), or (D,) for one layer.

        Raises
        ------
        DataError
            `constant`, if all values of a layer are equal.
        """
        n_axes = 2 if self.number is None else 1
        if layers.ndim > n_axes:
            layers = layers.mean(-2, dtype=np.float64).astype(np.float32)
        constant = np.flatnonzero(layers.min(-1) == layers.max(-1))
        if n_axes == 2 and constant.size and layers.shape[1] > 1:
            first, value = constant[0], layers[constant[0], 0]
            found = f"all {layers.shape[1]} values of layer {first} are {value:g}"
            raise DataError("constant", f"{found}: the feature extraction failed")
        return layers


def _without_unit_axes(stored: Array) -> Array:
    """A view without the axes of length 1 before the last: encoders return (1, T, D), stacked layers (L, 1, T, D)."""
    return stored.squeeze(tuple(axis for axis, length in enumerate(stored.shape[:-1]) if length == 1))


_PICKLED = "is a Python pickle, which can run code and is never loaded"
# Beginnings of files that are not what their extension claims, in lower case and without leading blanks.
_SIGNATURES = (
    ((b"version https://git-lfs",), "git-lfs", "is a git-lfs pointer: run git lfs pull"),
    ((b"<!doctype", b"<html", b"<?xml"), "not-npz", "is an HTML page, probably from a failed download"),
    ((b"\x93numpy",), "not-npz", "is a bare .npy array named .npz"),
    ((b"pk\x03\x04",), "not-npz", "is a zip archive named .npy"),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "pickle", _PICKLED),  # the opcode PROTO, protocol 2 to 5
    ((b"riff",), "not-npz", "is a WAV recording: extract its features first"),
    ((b"\x89hdf",), "not-npz", "is an HDF5 file"),
)


def _foreign_error(blob: bytes) -> DataError:
    """Identify a file that is neither a zip archive nor an npy array."""
    if not blob:
        return DataError("empty", "has no bytes")
    if not any(blob[:4096]):
        return DataError("empty", "contains only zero bytes, as after a crash during writing")
    start = blob[:512].lstrip().lower()
    for beginnings, code, reason in _SIGNATURES:
        if start.startswith(beginnings):
            return DataError(code, reason)
    return DataError("not-npz", "is neither a zip archive nor an npy array")


def _bad_zip(detail: str) -> DataError:
    return DataError("bad-zip", f"the zip archive is damaged: {detail}")


def _resolve_zip64(extra: bytes, *values: int) -> list[int]:
    """Resolve fields of a header: 0xFFFFFFFF means that the value is in the zip64 extra field, in the same order."""
    n_missing = values.count(0xFFFFFFFF)  # np.savez uses zip64 for any size
    resolved = list(values)
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if kind == 1 and n_missing:
            if length != 8 * n_missing or position + length > len(extra):
                raise _bad_zip("invalid zip64 field")
            large = iter(struct.unpack_from(f"<{n_missing}Q", extra, position))
            resolved = [next(large) if value == 0xFFFFFFFF else value for value in values]
            n_missing = 0
        position += length
    if n_missing or position != len(extra):  # the fields must fill the space, or a damaged length would go unnoticed
        raise _bad_zip("invalid extra field")
    return resolved


def _read_zip64_end(blob: bytes, end: int, short: Shape) -> Shape:
    """Read the zip64 records before the end record, which archives above 2 GiB have: start, count, size, offset.

    `short` are the last three in the end record; those that are too large for it are all ones there.
    """
    begin = end - _ZIP64_END.size
    if begin < 0:
        raise _bad_zip("invalid zip64 end record")
    magic, size, made_by, needed, disk, first_disk, n_here, *fields, locator, on_disk, offset, disks = (
        _ZIP64_END.unpack_from(blob, begin)
    )
    found = magic, locator, size, made_by, needed, disk, first_disk, n_here, on_disk, offset, disks
    shortened = tuple(min(value, limit) for value, limit in zip(fields, (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)))
    if found != (b"PK\x06\x06", b"PK\x06\x07", 44, 45, 45, 0, 0, fields[0], 0, begin, 1) or shortened != short:
        raise _bad_zip("invalid zip64 end record")
    return begin, *fields


def _read_directory(blob: bytes) -> list[ZipEntry]:
    """Read the zip directory; every byte of the file must belong to an entry, the directory or the end record."""
    end = len(blob) - _END_RECORD.size
    if blob[end : end + 4] != b"PK\x05\x06" or end < 0:
        end = blob.rfind(b"PK\x05\x06")  # earlier, if the archive has a comment
        if end < 0 or len(blob) - end < _END_RECORD.size:
            if blob.startswith(b"PK\x03\x04"):
                raise DataError("truncated", f"ends after {len(blob)} bytes, before the zip directory")
            raise _foreign_error(blob)
    _, disk, first_disk, n_here, n_entries, size, start, comment = _END_RECORD.unpack_from(blob, end)
    directory_end = end
    surplus = len(blob) - end - _END_RECORD.size - comment
    if surplus < 0 and blob.startswith(b"PK\x03\x04"):
        raise DataError("truncated", f"ends after {len(blob)} bytes, within the zip directory")
    if surplus:
        raise DataError("junk", f"{surplus} bytes follow the end of the zip archive")
    if blob[max(end - 20, 0) : end].startswith(b"PK\x06\x07"):
        directory_end, n_entries, size, start = _read_zip64_end(blob, end, (n_entries, size, start))
        n_here = n_entries
    if disk or first_disk or n_here != n_entries or start + size > directory_end:
        raise _bad_zip("inconsistent directory")
    if start + size < directory_end:  # offsets count from the start of the archive
        raise DataError("junk", f"{counted(directory_end - start - size, 'byte')} before the zip archive")
    if n_entries > min(_MAX_ENTRIES, size // _DIRECTORY_ENTRY.size):
        raise _bad_zip(f"the directory lists {n_entries} entries")
    entries, begin, position = [], 0, start
    for _ in range(n_entries):
        entry, position = _read_entry(blob, position, directory_end, begin)
        begin = entry.next
        entries.append(entry)
    if position != directory_end or begin != start:  # no checksum would cover the bytes between
        raise _bad_zip("gaps around the directory")
    if len({entry.name for entry in entries}) < len(entries):
        raise _bad_zip("it has two arrays of one name")
    return entries


def _read_entry(blob: bytes, position: int, end: int, begin: int) -> tuple[ZipEntry, int]:
    """Read the directory entry at `position` and the local header at `begin`; return the entry and the next position.

    Both have most fields, and no checksum covers either. They must agree, or flipped bits would go unnoticed.
    """
    if position + _DIRECTORY_ENTRY.size > end or begin + _LOCAL_HEADER.size > end:
        raise _bad_zip("the directory is cut off")
    entry = _Central(*_DIRECTORY_ENTRY.unpack_from(blob, position))
    name_end = position + _DIRECTORY_ENTRY.size + entry.name_length
    next_position = name_end + entry.extra_length + entry.comment_length
    if entry.magic != b"PK\x01\x02" or next_position > end or entry.disk:
        raise _bad_zip("invalid directory entry")
    if ((entry.made_by << 48 | entry.internal << 32 | entry.external) ^ _NUMPY_ATTRIBUTES).bit_count() == 1:
        raise _bad_zip("a directory entry differs from numpy's by one bit")
    name = blob[position + _DIRECTORY_ENTRY.size : name_end]
    extra = blob[name_end : name_end + entry.extra_length]
    size, packed, offset = _resolve_zip64(extra, entry.size, entry.packed, entry.offset)
    if offset != begin:  # entries that overlap or leave gaps are damage or a zip bomb
        raise _bad_zip("invalid directory entry")
    if entry.flags & 1:
        raise DataError("encrypted", "is encrypted")
    if entry.method not in (_STORED, _DEFLATED):
        raise DataError("unknown-compression", f"uses compression method {entry.method}, not stored or deflated")
    start, tail = _read_local_header(blob, begin, entry._replace(size=size, packed=packed), name)
    data_end = start + packed
    if data_end > end or (entry.method == _STORED and size != packed):
        raise _bad_zip(f"an entry claims {packed} bytes")
    if tail and blob[data_end : data_end + 4] == b"PK\x07\x08":  # the magic of a descriptor is optional
        tail += 4
    key = name.decode("utf-8", "backslashreplace").removesuffix(".npy")
    return ZipEntry(key, entry.method, entry.crc, start, data_end, size, data_end + tail), next_position


def _read_local_header(blob: bytes, begin: int, entry: _Central, name: bytes) -> tuple[int, int]:
    """Compare the local header at `begin` with its directory entry.

    Return where the data begin, and the size of the descriptor that follows them, without its magic.
    """
    local = _Local(*_LOCAL_HEADER.unpack_from(blob, begin))
    name_end = begin + _LOCAL_HEADER.size + local.name_length
    start = name_end + local.extra_length
    has_descriptor = bool(entry.flags & 8)  # written to a pipe: sizes and CRC follow the data, not in the local header
    sizes = _resolve_zip64(blob[name_end:start], local.size, local.packed)
    if (
        local[:6] != (b"PK\x03\x04", *entry[2:7])
        or blob[begin + _LOCAL_HEADER.size : name_end] != name
        or entry.flags & ~0x808  # other than bit 3 and bit 11 (UTF-8 names)
        or not (has_descriptor or (local.crc, *sizes) == (entry.crc, entry.size, entry.packed))
    ):
        raise _bad_zip("a local header and the directory disagree")
    if not has_descriptor:
        return start, 0
    return start, 20 if 0xFFFFFFFF in (local.size, local.packed) else 12  # CRC and two sizes; 8 bytes each with zip64


class _Layout(NamedTuple):
    """A valid file without data and checksum: `segments` must equal `content`; `checksums` are the two CRC fields."""

    segments: tuple[slice, ...]
    content: bytes
    checksums: tuple[slice, slice]
    entry: ZipEntry
    names: Names


# By file size: files of one writer and one size are laid out alike. Sequences vary in length, and so in size.
_layout_cache: dict[int, _Layout] = {}
_MAX_LAYOUTS = 4096


def _locate_features(blob: bytes, keys: Names) -> tuple[ZipEntry, Data, Names]:
    """Return the entry with the features, its data, and the names of all arrays; `keys` are the names it may have.

    The files of a set usually come from one program, so each is first compared with the last valid one of its size. If
    they differ only in data and checksum, all other checks have been made already.
    """
    layout = _layout_cache.get(len(blob))
    if layout and b"".join([blob[segment] for segment in layout.segments]) == layout.content:
        local, central = (blob[field] for field in layout.checksums)
        if local == central and (not keys or layout.entry.name in keys):
            entry = layout.entry._replace(crc=int.from_bytes(local, "little"))
            return entry, _extract(blob, entry), layout.names
    entries = _read_directory(blob)
    entry, data = _select_features(blob, entries, keys)
    names = tuple(entry.name for entry in entries)
    if len(entries) == 1 and entry.next == entry.stop:  # the common form: one array, no descriptor after its data
        local, central = slice(14, 18), slice(entry.stop + 16, entry.stop + 20)  # the CRC in both headers
        segments = slice(14), slice(18, entry.start), slice(entry.stop, central.start), slice(central.stop, None)
        if len(_layout_cache) >= _MAX_LAYOUTS:
            _layout_cache.clear()
        content = b"".join([blob[segment] for segment in segments])
        _layout_cache[len(blob)] = _Layout(segments, content, (local, central), entry, names)
    return entry, data, names


def _extract_all(blob: bytes, entries: list[ZipEntry], limit: int) -> dict[str, Data]:
    """Return the data of all entries by name; together they may have at most `limit` bytes."""
    total = sum(entry.size for entry in entries)
    if total > limit:
        raise DataError("too-large", f"declares arrays of {total} bytes; the limit is {limit}")
    return {entry.name: _extract(blob, entry) for entry in entries}


def _extract(blob: bytes, entry: ZipEntry) -> Data:
    """Return the data of an entry, inflated and verified against the CRC."""
    data = memoryview(blob)[entry.start : entry.stop]
    data = _inflate(data, entry) if entry.method == _DEFLATED else data[: entry.size]
    if zlib.crc32(data) != entry.crc:
        raise DataError("bad-crc", "the array does not match its checksum")
    return data


def _inflate(data: memoryview, entry: ZipEntry) -> bytes:
    if entry.size > 100 * len(data) + (1 << 20):  # deflate saves 7 % on embeddings; 1 MiB for small repetitive arrays
        raise DataError("bomb", f"{len(data)} bytes would inflate to {entry.size}: features never compress that well")
    inflater = zlib.decompressobj(-15)  # raw deflate, without a zlib header
    try:
        blob = inflater.decompress(data, entry.size + 1)  # one byte more, to notice data beyond the declared size
    except zlib.error:
        raise DataError("bad-crc", "the compressed data are damaged") from None
    if not inflater.eof or inflater.unused_data or len(blob) != entry.size:
        raise DataError("size-mismatch", f"{entry.size} bytes are declared, but {len(blob)} were inflated")
    return blob


class Member(NamedTuple):
    """An array without its values."""

    name: str
    dtype: np.dtype
    shape: Shape  # without leading axes of length 1
    is_one_hot: bool = False

    @classmethod
    def of(cls, name: str, data: Data) -> "Member":
        """Describe the bytes of an array; anything else, such as a text file in the archive, counts as an object."""
        try:
            header, _ = stats.npy_header(data)
            shape = header.shape
            while shape[:1] == (1,):
                shape = shape[1:]
            one_hot = False
            if len(shape) == 1 and header.dtype.kind in "fiub":
                array = stats.npy_array(data, "fiub")
                one_hot = array.size > 1 and np.count_nonzero(array) == 1 and array.max() == 1
            return cls(name, header.dtype, shape, one_hot)
        except DataError:
            return cls(name, np.dtype(object), ())

    def __str__(self) -> str:
        shape = f"(T, {self.shape[-1]})" if len(self.shape) == 2 else self.shape
        return f"{self.name} {shape} {self.dtype}"

    @property
    def is_filled(self) -> bool:
        return not self.dtype.hasobject and 0 not in self.shape

    @property
    def is_float(self) -> bool:
        return self.is_filled and (self.dtype.kind == "f" or self.dtype == "V2")  # what numpy makes of bfloat16

    @property
    def is_side(self) -> bool:
        """Whether it is too small to be features beside another array: a label, attributes or scores."""
        return math.prod(self.shape) <= _SHORT or self.is_one_hot

    @property
    def is_label(self) -> bool:
        return self.is_side and _is_named(self.name, f"{_EMOTIONS}|{_SPEAKERS}")

    @property
    def rank(self) -> int:
        """Place in the order of known keys, whose last is shared by all names of encoders; beyond it for other keys."""
        name = self.name.lower().replace("-", "_")
        if name in KEYS:
            return KEYS.index(name)
        return len(KEYS) if _is_named(self.name, _ENCODERS) else len(KEYS) + 1


@functools.lru_cache(4096)
def _is_named(name: str, pattern: str) -> bool:
    """Whether a name or one of its words matches; words are joined by `_`, `-`, blanks or capitals."""
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+", name) + re.split(r"[\W_]+", name)
    return any(re.fullmatch(pattern, word, re.IGNORECASE) for word in (name, *words))


def _select_features(blob: bytes, entries: list[ZipEntry], keys: Names) -> tuple[ZipEntry, Data]:
    """Choose the array with the features, one of `keys` if given, else by its name, type and size; return its data."""
    by_name = {entry.name: entry for entry in entries}
    for key in keys or KEYS[:4]:
        # Verify the CRC before using the dtype: one flipped bit turns '<f4' into another type, and another array would
        # be used in place of the damaged one.
        if key in by_name:
            data = _extract_all(blob, [by_name[key]], MAX_ARRAY_BYTES)[key]
            if keys or Member.of(key, data).is_filled:
                return by_name[key], data
    if keys:
        raise DataError("no-key", f"has no array {' or '.join(keys)}; it holds {', '.join(by_name) or 'none'}")
    data_by_name = _extract_all(blob, entries, 2 * MAX_ARRAY_BYTES)
    members = [Member.of(name, data) for name, data in data_by_name.items()]
    if not entries:
        raise DataError("no-array", "contains no array")
    others = [member for member in members if not member.is_label]
    if not others:
        raise DataError("no-array", f"contains only labels: {', '.join(by_name)}")
    large = [member for member in others if member.is_filled and not member.is_side]
    ranked = sorted((member for member in large if member.is_float), key=lambda member: member.rank)
    candidates = [member for member in ranked if member.rank == ranked[0].rank]
    if not candidates and not any(member.dtype.kind in "iuc" for member in large):
        candidates = [member for member in others if member.is_float and member.shape]
    if len(candidates) > 1:
        raise DataError("several-arrays", ", ".join(map(str, candidates)))
    chosen = (candidates or large or others)[0].name  # without candidates, one that is refused with the reason
    return by_name[chosen], data_by_name[chosen]


def _load_array(path: str | Path, keys: Names) -> tuple[Array, str, Names, int]:
    """Return the array with the features as it is stored, its name, the names of all arrays, and its CRC."""
    blob = stats.read_bytes(path, 2 * MAX_ARRAY_BYTES)
    if str(path)[-4:].lower() != NPY_KEY:
        entry, data, names = _locate_features(blob, keys)
        return stats.npy_array(data), entry.name, names, entry.crc
    if not blob.startswith(b"\x93NUMPY"):
        raise _foreign_error(blob)
    return stats.npy_array(blob), NPY_KEY, (), zlib.crc32(blob)


def read_features(
    path: str | Path,
    transpose: bool = False,
    nan_to_zero: bool = False,
    keys: Names = (),
    layers: LayerChoice | None = None,
) -> Features:
    """Read the features of one NPZ or NPY file strictly: headers are not trusted, and nothing is unpickled.

    Parameters
    ----------
    keys
        Names of which the array must have one; empty to choose it by its name, type and size.
    layers
        Which layers to read, if the file has several; their frames are averaged.

    Returns
    -------
    Features
        Array in float32 and C order, of shape (D,), (T, D) or (T * D,). A leading axis of length 1 is dropped. With
        `layers`, it has the shape (L, D), or (D,) for one of them.

    Raises
    ------
    DataError
        For any problem with the file; no other exception is raised.
    """
    stored, key, names, crc = _load_array(path, keys)
    shape = stored.shape
    if not shape or not stored.size:
        raise DataError("empty-array", f"its array has shape {shape}: nothing to train on")
    stored, n_layers = layers.select(stored) if layers else (_vector_or_frames(stored, transpose), 1)
    with np.errstate(over="ignore", invalid="ignore"):  # values beyond the range become Inf
        array = stored.astype(np.float32, order="C")  # a copy, so that the bytes of the file can be freed
        # The sum of squares is finite only if every value is; it is needed anyway, and is faster than np.isfinite.
        square = float(array.reshape(-1).dot(array.reshape(-1)))
    if not square < MAX_SQUARE:
        array, square = _without_nan(array, nan_to_zero)
    if layers:
        array = layers.average(array)
        square = float(np.square(array, dtype=np.float64).sum())
    flat = array.reshape(-1)
    if flat.size > 1 and flat[0] == flat[-1] and flat.min() == flat.max():  # the ends first: the rest takes longer
        raise DataError("constant", f"all {flat.size} values are {flat[0]:g}: the feature extraction failed")
    rms, bit_sum = math.sqrt(square / flat.size), int(flat.view(np.uint32).sum(dtype=np.uint64))
    has_leading_axis = len(shape) > 1 and shape[0] == 1
    return Features(array, key, _dtype_name(stored.dtype), names, crc, rms, bit_sum, has_leading_axis, n_layers)


def _vector_or_frames(stored: Array, transpose: bool) -> Array:
    """A view of shape (D,) or (T, D); a leading axis of length 1 is dropped."""
    shape = stored.shape
    if stored.ndim > 1 and shape[0] == 1:
        stored = stored[0]
    if stored.ndim > 2:
        hint = "perhaps the layers of an encoder: use --layers, or --layer K for one of them"
        raise DataError("bad-shape", f"its array has shape {shape}, {hint}")
    return stored.T if transpose and stored.ndim == 2 else stored


_dtype_name = functools.cache(lambda dtype: dtype.name)  # numpy builds the name at every access


def _without_nan(array: Array, nan_to_zero: bool) -> tuple[Array, float]:
    """Set NaN and Inf to zero, or reject them, and what overflows when squared, as training does with deviations.

    Return the array and its sum of squares.
    """
    bad = ~np.isfinite(array)
    if bad.any() and not nan_to_zero:
        first = tuple(int(index[0]) for index in np.nonzero(bad))
        raise DataError("not-finite", f"{bad.sum()} of {array.size} values are NaN or Inf, the first at {first}")
    array = np.where(bad, np.float32(0), array)
    square = float(np.square(array, dtype=np.float64).sum())
    if square >= MAX_SQUARE:
        reason = f"its values reach {np.abs(array).max():.3g}; their squares overflow float32 in training"
        raise DataError("absurd-scale", reason)
    return array, square


def read_arrays(path: str | Path, kinds: str) -> dict[str, Array]:
    """Read every array of an NPZ file of at most 16 GiB; see `parse_arrays`."""
    limit = 1 << 34
    return parse_arrays(stats.read_bytes(path, limit), limit, kinds)


def parse_arrays(
    blob: bytes, limit: int = 1 << 34, kinds: str = "f", names: Iterable[str] | None = None
) -> dict[str, Array]:
    """Read every array of an NPZ file, as strictly as `read_features`.

    Parameters
    ----------
    limit
        Bytes to which all arrays together may be inflated.
    kinds
        Accepted kinds of numbers, in numpy's letters.
    names
        Names that the arrays must have, if given: otherwise none of them is read.

    Raises
    ------
    DataError
        For any problem with the file.
    """
    entries = _read_directory(blob)
    if names is not None and {entry.name for entry in entries} != set(names):
        raise DataError("no-array", "does not contain the expected arrays")
    return {name: stats.npy_array(data, kinds) for name, data in _extract_all(blob, entries, limit).items()}


# --- scanning a folder --------------------------------------------------------------------------------------------

_DAMAGED = ("truncated", "bad-zip", "junk", "bad-crc", "size-mismatch", "bad-npy-header")
#: What to do about each reason for leaving a file out. The finding itself describes what was found.
REMEDIES = dict.fromkeys(_DAMAGED, "copy it again, or extract its features again") | {
    "unreadable": "check its owner and permissions, or what it links to",
    "io-error": "check the disk or the network drive, and copy the file again from its source",
    "not-a-file": "remove it",
    "too-large": "split the recording into utterances",
    "empty": "extract its features again",
    "git-lfs": "fetch the real file",
    "not-npz": "write its features with np.savez(file, emb=array)",
    "pickle": "save plain float arrays with np.savez",
    "encrypted": "save it without a password",
    "unknown-compression": "save it with np.savez",
    "bomb": "do not trust its source",
    "no-array": "write its features with np.savez(file, emb=array)",
    "several-arrays": "choose one with --key NAME",
    "no-key": "save it as in the other files, or choose another array with --key NAME",
    "same-stem": "remove one of the two",
    "not-float": "save the features as float32",
    "empty-array": "the recording may be too short; extract its features again",
    "bad-shape": "save one array of shape (D,) or (T, D)",
    "no-layers": "choose another array with --key or layer with --layer; for vectors and sequences leave --layers out",
    "not-finite": "extract its features again, or replace such values by zero with --nan-to-zero",
    "constant": "extract its features again",
    "absurd-scale": "extract its features again, or from another layer",
    "statistics-file": "save them as the two .npy files, and move this one elsewhere",
    "whole-set": "split it into one file for each utterance",
    "labels-inside": "write a table of the labels and pass it with --labels",
    "unknown-name": "rename it as its corpus does, move it to an emotion-named folder, or use --pattern or --labels",
    "ambiguous-name": "choose the corpus with --corpus, or prefix the file name with it",
    "label-conflict": "find out which label is right, then rename or move the file",
    "not-in-table": "give it a line with its path below DIR in the table",
    "video-only": "remove it: a recording without sound contains no speech",
    "copy": "remove it",
    "duplicate-conflict": "find out which label is right and remove the other file",
    "duplicate-speaker": "find out which speaker is right and remove the other file",
    "transposed": "save it as (T, D), or transpose all sequences with --transpose",
    "other-width": "extract all features with one encoder, or choose a width with --dim",
    "other-layers": "extract all with one encoder, choose the array with --key, or read sequences without --layers",
    "overflow": "its features are of another kind or damaged; extract them again",
    "other-encoder": "extract it with the encoder that the model was trained with",
    "several-rows": "save one vector for each utterance, as in the training data",
}

#: Observations about files that are used all the same.
NOTES = {
    "duplicate": "identical features under two names with the same label; both are counted",
    "twins": "the same recording with and without video; both are counted",
    "tails": "file names of a corpus, followed by a tail",
    "versions": "versions of a recording whose original is here too; they are for training only, and not scored",
    "same-recording": "files that seem to be of one recording; they stay on one side of the split, and all are counted",
    "new-class": "targets of --merge that are no known emotion",
    "song": "sung, not spoken; published scores are usually for speech only",
    "known-damaged": "recordings of this corpus that are known to be damaged",
    "norm-outlier": "features with a much larger or smaller norm than the rest",
    "dead-dimensions": "dimensions that are constant over the data set",
    "already-normalised": "the features have mean 0 and standard deviation 1 already; normalising again is harmless",
    "no-speaker": "speaker unknown; scores are speaker-independent only if the speakers are known",
    "few-speakers": "classes with very few speakers; their recall is unreliable",
    "few-utterances": "classes with few utterances",
    "imbalance": "the largest class is many times the smallest; UA weights all classes equally, WA does not",
    "reshaped": "flat vectors that were reshaped to (T, D)",
    "leading-axis": "arrays with a leading axis of length 1, as (1, D) or (1, T, D), read without it",
    "other-arrays": "further arrays in the files, not used",
    "mixed-keys": "the features have different names in the files; they must be of one encoder",
    "equal-length": "all files have the same number of rows, which need not be frames",
    "layer-axis": "what was taken for the layers may be the frames",
    "no-checksum": "NPY files have no checksum, so that damaged values are not noticed",
}


#: Values of --folds besides numbers.
FOLD_SCHEMES = (*emotions.SCHEMES, "leave-one-speaker-out", "leave-one-corpus-out", "table")


@dataclasses.dataclass(frozen=True)
class ScanOptions:
    """The options of a scan; both command lines are built from these fields."""

    directory: str
    corpus: str | None = option(None, "corpus to assume when a file name fits several", choices=emotions.CORPORA)
    pattern: str | None = option(
        None, "regular expression for the whole file name, with the groups (?P<emotion>...) and (?P<speaker>...)"
    )
    labels: str | None = option(None, "CSV file with labels, in the columns file, emotion, speaker, and split or fold")
    merge: tuple[str, ...] = option((), "merge one emotion into another, e.g. calm=neutral; may be repeated")
    classes: str | None = option(None, "keep only these emotions, e.g. happy,sad,angry")
    key: str | None = option(None, "name of the array with the features, if the files hold several")
    dim: int | None = option(None, "width D of the features, if it cannot be determined from the files")
    transpose: bool = option(False, "sequences are stored as (D, T)")
    layers: bool = option(False, "the files hold all layers of an encoder: (L, D), (L, T, D) or (T, L, D)")
    layer: int | None = option(None, "read one layer from such files; 0 is the first, -1 the last")
    nan_to_zero: bool = option(False, "replace NaN and Inf by zero instead of leaving the file out")
    no_versions: bool = option(False, "leave out augmented and other versions of a recording whose original is here")
    folds: str = option("5", f"number of folds, or one of {', '.join(FOLD_SCHEMES)}", "split")

    def __post_init__(self):
        if not str(self.directory):
            raise UsageError("DIR must not be empty")
        object.__setattr__(self, "merge", tuple(self.merge))  # argparse gives a list; the dataclass is frozen
        _parse_merges(self.merge)
        require(self.dim is None or 1 <= self.dim <= MAX_ARRAY_BYTES, "dim", f"from 1 to {MAX_ARRAY_BYTES}")
        for name in ("pattern", "labels", "key", "folds"):
            require(getattr(self, name) != "", name, "non-empty")
        if self.pattern and self.labels:
            raise UsageError("use either --pattern or --labels")
        if self.layers and self.layer is not None:
            raise UsageError("use either --layers or --layer")
        if self.transpose and self.reads_layers:
            raise UsageError("--transpose is for sequences: it cannot be used with --layers or --layer")
        check_choices(self)
        if self.folds not in FOLD_SCHEMES and not (re.fullmatch("[0-9]{1,9}", self.folds) and int(self.folds) > 1):
            known = f"{', '.join(FOLD_SCHEMES)}{suggest(self.folds, FOLD_SCHEMES)}"
            raise UsageError(f"--folds {self.folds!r} is not a fold scheme; use a number >= 2 or one of {known}")
        if self.folds == "table" and not (self.labels or self.pattern):
            raise UsageError("--folds table needs --labels FILE with a column split or fold")
        require(self.classes is None or bool(parse_emotions(self.classes)), "classes", "a list like happy,sad,angry")

    @property
    def reads_layers(self) -> bool:
        """Whether the files hold several layers, of which all or one are read."""
        return self.layers or self.layer is not None

    def read(self, path: str | Path, model_keys: Names = (), layer_axis: int | None = None) -> Features:
        """Read a file with these options; --key overrides the keys of a model."""
        keys = (self.key,) if self.key else model_keys
        layers = LayerChoice(layer_axis or 0, self.layer) if self.reads_layers else None
        return read_features(path, self.transpose, self.nan_to_zero, keys, layers)


def parse_emotions(text: str) -> list[str]:
    """The emotions in a list such as `happy,sad`."""
    return [emotions.normalise_emotion(word) for word in text.split(",") if word.strip()]


def _parse_merges(entries: Names) -> dict[str, str]:
    """Parse entries such as `calm=neutral`."""
    valid = all(re.fullmatch(r"\s*[^=,\s]+\s*=\s*[^=,\s]+\s*", entry) for entry in entries)
    require(valid, "merge", "of the form calm=neutral")
    return dict(tuple(parse_emotions(entry.replace("=", ","))) for entry in entries)


def command_line(options: ScanOptions) -> str:
    """The shell command that trains with these options; those of a scan are also options of train.py."""
    words = ["python", "train.py"]
    for field in dataclasses.fields(options)[1:]:
        value, flag = getattr(options, field.name), option_flag(field.name)
        if value is True:
            words.append(flag)
        elif value != field.default:
            words += [f"{flag}={one}" for one in (value if isinstance(value, tuple) else (value,))]
    directory = [] if options.directory is None else [options.directory]
    if directory and options.directory.startswith("-"):
        words.append("--")
    return shlex.join([*words, *directory])


class Finding(NamedTuple):
    """The reason why one file is left out."""

    file: str
    code: str
    reason: str


Reasons = dict[str, Fault | None]  # by file; None for a file that is kept


class Note(NamedTuple):
    """An observation about the data set; no file is left out because of it."""

    code: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A file that training can use."""

    utterance: Utterance
    shape: Shape  # of the array as read: (D,), (T, D) or (T * D,); (L, D) with --layers
    key: str
    dtype: str
    crc: int
    rms: float
    bit_sum: int
    has_leading_axis: bool = False
    n_layers: int = 1  # in the file, with --layers or --layer

    @property
    def file(self) -> str:
        return self.utterance.file

    @property
    def layer_shape(self) -> Shape:
        """The shape of a layer, (D,), or of the array if it was not read for its layers."""
        return self.shape[-1:] if self.n_layers > 1 else self.shape


@dataclasses.dataclass
class Scan:
    """The result of a scan: `records` are the files that training uses, sorted by name, `findings` the others."""

    directory: Path
    dim: int | None = None  # the width D of a vector, a frame or a layer
    options: ScanOptions | None = None
    records: list[Record] = dataclasses.field(default_factory=list)
    findings: list[Finding] = dataclasses.field(default_factory=list)
    notes: list[Note] = dataclasses.field(default_factory=list)
    features: list[Array] = dataclasses.field(default_factory=list)  # (T, D) or (L, D) for each record, or empty
    moments: stats.Moments | None = None  # of all frames, (D,), or all layers, (L * D,); None if outliers are included
    n_ignored: int = 0  # hidden and temporary files, and the results of runs
    n_excluded: int = 0  # by --classes
    n_versions: int = 0  # left out by --no-versions
    other_files: Counter = dataclasses.field(default_factory=Counter)  # by extension
    other_arrays: Counter = dataclasses.field(default_factory=Counter)  # by name
    recipes: dict[str, str] = dataclasses.field(default_factory=dict)  # lines that remedy findings, by code
    keys: Names = ()  # of a trained model; empty if any will do
    stored: stats.Stored | None = None
    fingerprint: str = ""  # of the names and contents of the files that are used
    reshapes_vectors: bool = False  # whether flat vectors of T * D values are reshaped to (T, D)
    layers: int = 1  # number L of layers that are handed on
    layer_axis: int | None = None  # of the layers in arrays of three axes, 0 or 1; None if there are none
    layer_guess: str = ""  # how they are read if the files do not show this axis

    @property
    def n_files(self) -> int:
        return len(self.records) + len(self.findings) + self.n_excluded + self.n_versions

    def read_again(self, record: Record) -> Array:
        """The frames of a file, (T, D), or its layers, (L, D): features need not be kept."""
        try:
            features = self.options.read(self.directory / record.file, layer_axis=self.layer_axis)
            return features.array.reshape(-1, self.dim)
        except DataError as error:
            raise UsageError(f"{record.file}: was changed during the scan: {error.reason}; start again") from None

    @property
    def form(self) -> Shape:
        """The shape of what statistics are made of: a vector or frame, (D,), or several layers, (L, D)."""
        return (self.layers, self.dim) if self.layers > 1 else (self.dim,)

    def rows(self, record: Record) -> Array:
        """The frames of a file, (T, D), or its layers as one row, (1, L * D)."""
        return self.read_again(record).reshape(-1, math.prod(self.form))

    @property
    def utterances(self) -> list[Utterance]:
        return [record.utterance for record in self.records]

    def count(self, field: str) -> dict[Any, int]:
        """Count files by one field of `Record` or `Utterance`, sorted; emotions are in the order of the vocabulary."""
        owners = self.records if field in Record.__slots__ else self.utterances
        counts = Counter(getattr(owner, field) for owner in owners)
        return {key: counts[key] for key in sorted(counts, key=emotions.emotion_order)}

    def keys_used(self) -> dict[str, int]:
        """Count the files by the name of the array with the features, the largest first; an NPY file has none."""
        return {key: files for key, files in Counter(self.count("key")).most_common() if key != NPY_KEY}

    def labelled_by(self) -> dict[str, int]:
        """Count the files by the source of their label: name, folder, pattern or table."""
        sources = {"folder": "folder", "own": "table" if self.options.labels else "pattern"}
        return dict(Counter(sources.get(record.utterance.corpus, "name") for record in self.records))

    def left_out(self) -> dict[str, int]:
        """Count the files that are left out, by code."""
        return dict(sorted(Counter(finding.code for finding in self.findings).items()))

    @property
    def has_user_statistics(self) -> bool:
        return self.stored is not None and self.stored.user_supplied

    @property
    def statistics_are_stale(self) -> bool:
        """Whether the statistics in the folder were computed by train.py, but not for these files."""
        return self.stored is not None and not self.stored.user_supplied and self.stored.fingerprint != self.fingerprint

    @functools.cached_property
    def folds(self) -> "Folds | UsageError":
        """The folds that train.py will use, or the reason why there are none."""
        classes, utterances = list(self.count("emotion")), self.utterances
        try:
            return assign_folds(self.options, utterances, np.array([classes.index(u.emotion) for u in utterances]))
        except UsageError as error:
            return error

    def leave_out(self, reasons: Reasons) -> list[Finding]:
        """Move the files for which there is a reason from the records to the findings; return their findings."""
        left_out = [Finding(file, *reason) for file, reason in reasons.items() if reason]
        files = {finding.file for finding in left_out}
        kept = [index for index, record in enumerate(self.records) if record.file not in files]
        self.findings += left_out
        self.features = [self.features[index] for index in kept] if self.features else []
        self.records = [self.records[index] for index in kept]
        return left_out


def printable(name: str) -> str:
    """Escape whatever could forge or garble a line of output: control characters and bytes that are not UTF-8."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


# Files that identify the folder of a run, whose NPZ files are not features: both of a pair, or either checkpoint.
_RESULT_FILES = ({"model.npz", "config.json"}, {"fusion.npz", "predictions.csv"})
_CHECKPOINT_FILES = {"checkpoint-0.npz", "checkpoint-1.npz"}


def _walk(folder: Path, scan: Scan) -> Iterator[str]:
    """Yield the NPZ and NPY files below a folder as relative paths, and count what is ignored."""
    # Folders that are reached by a link come after all real ones: otherwise the order of the directory would decide
    # which name a folder gets that has two.
    pending, linked, visited = [""], [], set()
    while pending or linked:
        relative = pending.pop(0) if pending else linked.pop(0)
        path = os.path.join(folder, relative)
        try:
            status = os.stat(path)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            fault = stats.read_fault(error, "the folder cannot be read")
            scan.findings.append(Finding(relative, fault.code, fault.reason))
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue  # a symbolic link to a parent folder
        visited.add((status.st_dev, status.st_ino))
        names = {entry.name for entry in entries}
        if names & _CHECKPOINT_FILES or any(files <= names for files in _RESULT_FILES):
            scan.n_ignored += len(entries)
            continue
        archives = {entry.name[:-4] for entry in entries if entry.name.lower().endswith(".npz")}
        for entry in entries:
            file, suffix = os.path.join(relative, entry.name), entry.name[-4:].lower()
            if entry.name.startswith((".", "~")) or entry.name == "__MACOSX":
                scan.n_ignored += 1
            elif entry.name in (stats.MEAN_FILE, stats.STD_FILE, stats.MANIFEST_FILE):
                continue
            elif suffix in (".npz", ".npy"):
                if _is_folder(entry):
                    scan.findings.append(Finding(file, "not-a-file", "is a folder"))
                elif suffix == ".npy" and entry.name[:-4] in archives:
                    scan.findings.append(Finding(file, "same-stem", "lies beside an .npz file of the same name"))
                else:
                    yield file
            elif _is_folder(entry):
                (linked if entry.is_symlink() else pending).append(file)
            else:
                scan.other_files[os.path.splitext(entry.name)[1].lower() or entry.name] += 1


def holds_features(folder: Path, subfolders: bool = True) -> bool:
    """Whether a folder, or one of its subfolders, has NPZ or NPY files other than the results of runs."""
    return any(subfolders or os.sep not in file for file in _walk(folder, Scan(folder)))


# --- labels ---


Label = Utterance | DataError  # the error is the reason why a file has no label


def _label_files(files: list[str], options: ScanOptions, model_merge: Names = ()) -> list[Label]:
    """Label each file by the user's table or pattern, or else by its name and folders; then apply merges and choice."""
    if options.labels:
        labels = list(_label_by_table(files, Path(options.labels)))
    elif options.pattern:
        labels = list(_label_by_pattern(files, options.pattern))
    else:
        labels = list(map(_label_by_name, files, emotions.parse_names(files, options.corpus)))
    utterances = emotions.find_versions(label for label in labels if not isinstance(label, DataError))
    utterances = iter(_choose_emotions(utterances, options, model_merge))
    return [label if isinstance(label, DataError) else next(utterances) for label in labels]


def _label_by_name(file: str, parsed: Utterance | ValueError) -> Label:
    folders = file.split(os.sep)[-2::-1]  # innermost first; pathlib would take longer than reading the file
    by_folder = next((word for folder in folders if (word := emotions.folder_emotion(folder))), None)
    # An ambiguous name is an error even in an emotion-named folder: it contains a speaker, who must not get lost.
    if isinstance(parsed, emotions.AmbiguousName):
        return DataError("ambiguous-name", str(parsed))
    if isinstance(parsed, ValueError):
        if by_folder is None:
            folder = file.rpartition(os.sep)[0]
            unknown = f", and its folder {folder!r} is not named like a known emotion" if folder else ""
            return DataError("unknown-name", f"{parsed}{unknown}")
        return Utterance(file, "folder", by_folder, speaker=None)
    if parsed.modality == "video":
        return DataError("video-only", "is video without sound, according to its name")
    if by_folder not in (None, parsed.emotion):
        return DataError("label-conflict", f"is labelled {parsed.emotion} by its name, but {by_folder} by its folder")
    return parsed


def _label_by_pattern(files: list[str], text: str) -> Iterator[Label]:
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"--pattern is not a valid regular expression: {error}") from None
    if "emotion" not in pattern.groupindex:
        raise UsageError("--pattern needs a group (?P<emotion>...), and (?P<speaker>...) if the names have the speaker")
    for file in files:
        stem = emotions.without_extensions(file)
        match = pattern.fullmatch(stem) or pattern.fullmatch(stem.replace(os.sep, "/").rpartition("/")[2])
        if match and match["emotion"]:
            fields = match.groupdict()
            emotion, speaker = fields.pop("emotion"), fields.pop("speaker", None)
            utterance = emotions.custom_utterance(file, emotion, speaker, fields)
            if utterance.modality:  # of whatever modality, it is the same utterance
                folder = stem[: len(stem) - len(match.string)]
                name = folder + emotions.without_groups(match, "modality").strip(" _.-")
                utterance = dataclasses.replace(utterance, stem=name)
            yield utterance
        else:
            yield DataError("unknown-name", f"{stem!r} does not match --pattern")


# Names of the columns of a table, in order of preference.
_COLUMNS = {
    "file": ("file", "path", "filename", "name"),
    "emotion": ("emotion", "label"),
    "speaker": ("speaker",),
    "split": ("split", "fold"),
}


def _read_table(name: str, table: Path) -> dict[str, dict[str, str]]:
    """Read the lines of a table by the path in them, without extension: the fields of _COLUMNS besides the file."""
    try:
        blob = table.read_bytes()
        if blob.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in blob[:100]:
            raise UsageError(f"{name}: cannot be read: it is UTF-16; save it as UTF-8")
        text = blob.decode("utf-8-sig")  # spreadsheets write a byte order mark
        header = text.partition("\n")[0]
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
        found, *rows = [row for row in rows if row] or [[]]
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: cannot be read: it is not UTF-8 (byte {error.start})") from None
    except (OSError, csv.Error) as error:
        raise UsageError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    titles = [title.strip().casefold() for title in found]
    columns = {}
    for field, known in _COLUMNS.items():
        columns[field] = next((titles.index(title) for title in known if title in titles), None)
    if columns["file"] is None or columns["emotion"] is None:
        needed = "file (or path, filename, name) and emotion (or label), and if known, speaker and split (or fold)"
        raise UsageError(f"{name}: needs a header line with the columns {needed}; found: {', '.join(found) or 'none'}")
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        cells = dict(enumerate(row))  # a row may be short
        line = {field: cells.get(place, "").strip() for field, place in columns.items()}
        key = _table_key(line.pop("file"))
        if lines.setdefault(key, line) != line:
            raise UsageError(f"{name}: has two different lines for {key}")
    return lines


def _table_key(path: str) -> str:
    """A path as it is compared: macOS decomposes accented letters, and a table may be from Windows."""
    return unicodedata.normalize("NFC", emotions.without_extensions(path)).replace("\\", "/")


def _endings(path: str) -> Iterator[str]:
    """The path and its endings at folder boundaries, the longest first: `a/b/c`, `b/c`, `c`."""
    while path:
        yield path
        path = path.partition("/")[2]


def _match_paths(paths: Iterable[str], others: Iterable[str]) -> dict[str, list[str]]:
    """For each path, the same one among the others, or those that have the longest ending in common with it."""
    by_ending = defaultdict(list)
    for other in others:
        for ending in _endings(other):
            by_ending[ending].append(other)
    matches = {}
    for path in paths:
        found = next((by_ending[ending] for ending in _endings(path) if ending in by_ending), [])
        matches[path] = [path] if path in found else found
    return matches


def _side(path: str) -> set[str]:
    """The sides of a split that the folders of a path are named after."""
    return set(re.findall(r"(?:^|/)(train|dev|val|test)[^/]*(?=/)", path.casefold()))


def _label_by_table(files: list[str], table: Path) -> Iterator[Label]:
    """Label files by the lines of a table whose path is the same or ends alike, such as that of another machine."""
    name = str(table)
    lines = _read_table(name, table)
    keys = {file: _table_key(file.replace(os.sep, "/")) for file in files}
    lines_of = _match_paths(keys.values(), lines)
    files_of = _match_paths(lines, keys.values())
    if files and lines and not any(lines_of.values()):
        first = next(iter(lines))
        raise UsageError(f"{name}: no line matches a file: the table has {first!r}, the folder {files[0]!r}")
    fault = functools.partial(DataError, "not-in-table")
    for file, key in keys.items():
        if not lines_of[key]:
            yield fault(f"has no line in {name}")
            continue
        path, *more = lines_of[key]
        emotion, speaker, split = lines[path].values()
        rivals = [other for other in files_of[path] if other != key]
        side_of_line, side_of_file = _side(path), _side(key)
        if more:
            yield fault(f"fits the lines {path} and {more[0]} of {name}")
        # MELD has other recordings of the same name on each side.
        elif side_of_line and side_of_file and side_of_line.isdisjoint(side_of_file):
            yield fault(f"line {path} of {name} belongs to another split (train, dev or test)")
        elif rivals:
            yield fault(f"line {path} of {name} fits both this file and {rivals[0]}")
        elif not emotion:
            yield fault(f"has no emotion in {name}")
        elif emotions.is_unknown(emotion):
            yield fault(f"has {emotion!r} as emotion in {name}")
        else:
            yield emotions.custom_utterance(file, emotion, speaker, {"split": split or None})


def _merge_chain(emotion: str, merges: dict[str, str]) -> list[str]:
    """The emotion and all that it becomes in turn: calm=neutral and neutral=other make calm other."""
    chain = [emotion]
    while chain[-1] in merges:
        chain.append(merges[chain[-1]])
        if chain[-1] in chain[:-1]:
            raise UsageError(f"--merge goes in a circle: {' = '.join(chain)}")
    return chain


def _choose_emotions(utterances: list[Utterance], options: ScanOptions, model_merge: Names) -> list[Utterance]:
    """Apply the merges of a model, --merge and --classes, in place; the emotion is None where it is excluded."""
    requested = _parse_merges(options.merge)
    merges = _parse_merges(model_merge) | requested  # the options override the model
    classes = None if options.classes is None else parse_emotions(options.classes)
    found = {utterance.emotion for utterance in utterances}
    chains = {emotion: _merge_chain(emotion, merges) for emotion in (*merges, *found)}
    seen = sorted({word for emotion in found for word in chains[emotion]})
    unknown = [word for word in (*requested, *(classes or ())) if word not in seen]
    if unknown:  # a typo would have no effect
        listed, closest = ", ".join(seen) or "none", suggest(unknown[0], seen)
        raise UsageError(f"no file has the emotion {', '.join(unknown)}; found: {listed}{closest}")
    known = {*emotions.VOCABULARY, *found}
    for word in sorted(set(requested.values()) - known):
        if closest := suggest(word, sorted(known)):
            raise UsageError(f"--merge: {word!r} is not a known emotion{closest}")
    for place, utterance in enumerate(utterances):
        emotion = chains[utterance.emotion][-1]
        if classes is not None and emotion not in classes:
            emotion = None
        if emotion != utterance.emotion:
            utterances[place] = dataclasses.replace(utterance, emotion=emotion)
    return utterances


# --- the width D of the features ---

# A flat vector may be a sequence of T * D values, or a vector of another encoder that happens to be k * D wide (768 and
# 1536). It is reshaped only if D is known from elsewhere: --dim, statistics files, or sequences in the folder.


def _confirms_width(shapes: Counter, width: int) -> bool:
    """Whether `shapes` (number of files by shape) is evidence that flat vectors are sequences of this width."""
    # Flat sequences vary in length; vectors of an encoder do not, and must not be reshaped because of one odd file. So
    # there must be as many sequences as vectors of any one length, or no length with half of the vectors.
    n_sequences, flat = 0, [0]
    for shape, files in shapes.items():
        if len(shape) == 1 and shape != (width,):
            flat.append(files)
        elif len(shape) == 2 and shape[1] == width:
            n_sequences += files
    if width == 1 or n_sequences == 0:
        return False
    return n_sequences >= max(flat) or 2 * max(flat) < sum(flat)


def _majority_width(shapes: Counter) -> int | None:
    """The width D that most files fit, given the number of files of each shape."""
    # If only the second axis varies, the arrays are (D, T): return D, so that they are reported as transposed.
    first_axes = {shape[0] for shape in shapes}
    if len(shapes) > 2 and len(first_axes) == 1 and all(len(shape) == 2 for shape in shapes):
        return first_axes.pop()
    fitting = {}
    for width in {shape[-1] for shape in shapes}:
        reshapes = _confirms_width(shapes, width)
        fitting[width] = sum(files for shape, files in shapes.items() if not width_fault(shape, width, reshapes))
    most = max(fitting.values(), default=0)
    widths = sorted(width for width, files in fitting.items() if files == most)
    if len(widths) > 1:  # a guess could leave out the wrong half
        raise UsageError(f"equally many files have width {' and '.join(map(str, widths))}; choose one with --dim")
    return widths[0] if widths else None


def _statistics_width(result: Scan, shapes: Counter) -> int | None:
    """The width given by the user's statistics files; those that a run has saved bind nothing."""
    if not result.has_user_statistics:
        return None
    width, dim = result.stored.shape[-1], result.options.dim
    found = f"{stats.MEAN_FILE} has {width} values, but"
    if dim not in (None, width):
        raise DataError("bad-statistics", f"{found} --dim is {dim}")
    # Vectors of equal length are not sequences, even if the width divides that length.
    reshapes = dim is not None or len(shapes) > 1 or shapes.total() == 1
    if shapes and all(width_fault(shape, width, reshapes) for shape in shapes):
        raise DataError("bad-statistics", f"{found} the files have shape {max(shapes, key=shapes.get)}")
    return width


def _leave_out_other_layers(result: Scan) -> None:
    """Keep the files with the number of layers that most have."""
    counts = Counter(record.n_layers for record in result.records)
    numbers = [number for number, files in counts.items() if files == max(counts.values())]
    if len(numbers) > 1:
        found = " and ".join(map(str, sorted(numbers)[:5]))
        raise UsageError(f"equally many files have {found} layers; {REMEDIES['other-layers']}")
    result.leave_out({record.file: layers_fault(record.n_layers, numbers[0]) for record in result.records})
    if result.options.layers:
        result.layers = numbers[0]


def layers_fault(number: int, expected: int) -> Fault | None:
    """Code and reason if a file has another number of layers than expected, else None."""
    return None if number == expected else ("other-layers", f"has {number} layers, not {expected}")


def width_fault(shape: Shape, dim: int, reshapes_vectors: bool) -> Fault | None:
    """Code and reason if an array of this shape does not fit the width `dim`, else None."""
    if shape[-1] == dim:
        return None
    if reshapes_vectors and len(shape) == 1 and shape[0] % dim == 0:
        return None
    if len(shape) == 2 and shape[0] == dim:
        return "transposed", f"shape {shape} looks like (D, T), not (T, D)"
    return "other-width", f"shape {shape} does not fit width {dim}"


def _is_near(size: float, typical: float) -> bool:
    return typical / 1000 < size < typical * 1000


class Scale(NamedTuple):
    """Typical size of the features, for files whose values are absurdly large or small."""

    rms: float  # root mean square of a file
    dimensions: Array  # size of the values of each dimension, (D,) or (L * D,)

    def fault(self, frames: Array, rms: float) -> Fault | None:
        """Code and reason if frames, (T, D), with this RMS differ from the typical size by a factor of 1000."""
        if _is_near(rms, self.rms):
            return None
        # The RMS may be that of a few huge dimensions, which vary by more than the others.
        known = self.dimensions > 0
        rows = np.abs(frames).reshape(-1, known.size)
        ratio = rows.mean(0, dtype=np.float64)[known] / self.dimensions[known]
        if known.any() and _is_near(np.median(ratio), 1):
            return None
        return "absurd-scale", f"its RMS is {rms:.3g}, the typical RMS is {self.rms:.3g}"


# --- files that are not the features of one utterance ---

Arrays = dict[str, Member]  # by the Python expression that loads them
Explanation = tuple[str, str]  # the reason, and the lines of Python that make what is needed


def _first(arrays: Arrays, names: str, accept: Callable[[Member], bool] = bool) -> str | None:
    """The first array that is named so and accepted."""
    return next((load for load, member in arrays.items() if _is_named(member.name, names) and accept(member)), None)


def _explain_statistics(arrays: Arrays, folder: str, stem: str) -> Explanation | None:
    mean, std = (_first(arrays, names, lambda member: member.is_float) for names in (_MEANS, _DEVIATIONS))
    if not mean or not std or arrays[mean].shape != arrays[std].shape:
        return None
    recipe = f"""np.save({folder!r} + "/wav2vec_mean.npy", {mean})
np.save({folder!r} + "/wav2vec_std.npy", {std})"""
    return "holds a mean and a standard deviation, not features", recipe


def _explain_rows(arrays: Arrays, folder: str, stem: str) -> Explanation | None:
    """Rows of features, and as many labels, and speakers if there are any."""
    for load, rows in arrays.items():
        if len(rows.shape) < 2 or not rows.is_float or _is_named(rows.name, _EMOTIONS):
            continue
        as_many = {key: member for key, member in arrays.items() if member.shape[:1] == rows.shape[:1]}
        columns = {key: member for key, member in as_many.items() if len(member.shape) == 1}
        speaker = _first(columns, _SPEAKERS)
        columns.pop(speaker, None)
        label = _first(columns, _EMOTIONS) or _first(as_many, _EMOTIONS)
        label = label or _first(columns, ".*", lambda member: member.dtype.kind in "SUO")
        if not label:
            continue
        reason = f"{rows.shape[0]} rows and {rows.shape[0]} labels: one file for a whole set"
        if arrays[label].dtype.hasobject:
            reason += "; save the labels with .astype(str), not pickled"
        loads = {"emotion": f"{label}.argmax(1)" if len(arrays[label].shape) == 2 else label}
        if speaker:
            loads["speaker"] = speaker
        else:
            reason += "; without speakers only a random split is possible"
        recipe = f"""os.makedirs("split", exist_ok=True)
for n, (row, {", ".join(loads)}) in enumerate(zip({", ".join((load, *loads.values()))})):
    np.savez(f"split/{"-".join(f"{{{name}}}" for name in loads)}-{{n:05d}}-{stem}.npz", emb=row)
# then: python check_data.py split --pattern '{"-".join(f"(?P<{name}>.+)" for name in loads)}-[0-9]+-.*'"""
        return reason, recipe
    return None


def _explain_recordings(arrays: Arrays, folder: str, stem: str) -> Explanation | None:
    """Many arrays of one width, named after their recordings."""
    widths = Counter(member.shape[-1] for member in arrays.values() if member.is_float and member.shape)
    n = max(widths.values(), default=0)
    if n < max(_MANY, len(arrays) / 2):
        return None
    recipe = f"""os.makedirs("split", exist_ok=True)
for name, array in {next(iter(arrays)).partition("[")[0]}.items():
    np.savez(f"split/{{name}}.npz", emb=array)
# then: python check_data.py split"""
    return f"{n} arrays of one width: one file for a whole set", recipe


def _explain_label(arrays: Arrays, folder: str, stem: str) -> Explanation | None:
    """Features with their own label beside them."""
    small = {load: member for load, member in arrays.items() if member.is_filled and member.is_side}
    label, speaker = (_first(small, names, lambda m: not m.shape or m.is_one_hot) for names in (_EMOTIONS, _SPEAKERS))
    if not label or not _first(arrays, ".*", lambda member: member.is_float and not member.is_side):
        return None
    found = [small[load] for load in (label, speaker) if load]
    value = ".argmax()" if found[0].shape else ""
    cells = [f"data[{found[0].name!r}]{value}.astype(str).item()", "''"]
    if speaker:
        cells[1] = f"data[{found[1].name!r}].astype(str).item()"
    recipe = f"""folder, lines = pathlib.Path({folder!r}), [["file", "emotion", "speaker"]]
for path in folder.rglob("*.npz"):
    data = np.load(path)
    lines.append([path.relative_to(folder), {", ".join(cells)}])
csv.writer(open("labels.csv", "w", newline="")).writerows(lines)
# then add --labels labels.csv"""
    return f"holds its own labels, in the arrays {' and '.join(member.name for member in found)}", recipe


#: For each code, the function that recognises such files.
CONTENTS = (
    ("statistics-file", _explain_statistics),
    ("whole-set", _explain_rows),
    ("whole-set", _explain_recordings),
    ("labels-inside", _explain_label),
)


def _load_members(path: Path) -> Arrays:
    """Describe the arrays of a file; empty if it cannot be read."""
    load = f"np.load({str(path)!r})"
    try:
        blob = stats.read_bytes(path, 2 * MAX_ARRAY_BYTES)
        if path.suffix.lower() == NPY_KEY:
            return {load: Member.of(path.stem, blob)}
        data_by_name = _extract_all(blob, _read_directory(blob), 2 * MAX_ARRAY_BYTES)
        return {f"{load}[{name!r}]": Member.of(name, data) for name, data in data_by_name.items()}
    except DataError:
        return {}


def _explain_contents(result: Scan) -> None:
    """Replace the findings of files without a label whose contents show what they are."""
    unknown = [finding.file for finding in result.findings if finding.code in ("unknown-name", "not-in-table")]
    bare = [file for file in unknown if file.lower().endswith(NPY_KEY)]
    groups = [[file] for file in unknown if not file.lower().endswith(NPY_KEY)]
    if 0 < len(bare) < _MANY:
        groups.append(bare)  # they may belong together, such as X.npy and y.npy
    explained = {}
    for files in groups:
        arrays = {load: member for file in files for load, member in _load_members(result.directory / file).items()}
        if arrays and all(member.dtype.hasobject for member in arrays.values()):
            explained |= {file: Finding(file, "pickle", _PICKLED) for file in files}
        folder, stem = str(result.directory), re.sub(r"\W", "_", Path(files[0]).stem)
        for code, explain in CONTENTS:
            if explanation := explain(arrays, folder, stem):
                reason, recipe = explanation
                result.recipes.setdefault(code, recipe)
                explained |= {file: Finding(file, code, reason) for file in files}
                break
    result.findings = [explained.get(finding.file, finding) for finding in result.findings]


# --- the scan ---


class Arena:
    """Copies arrays into large shared blocks; a block is freed together with the last array in it."""

    # Separate arrays of some hundred kB would lie on the heap between the small objects of the scan, which would keep
    # their memory from being returned to the system.

    def __init__(self):
        self._block, self._used = np.empty(0, np.float32), 0

    def store(self, array: Array) -> Array:
        if self._used + array.size > self._block.size:
            self._block, self._used = np.empty(max(array.size, 1 << 24), np.float32), 0  # 64 MiB or more
        copy = self._block[self._used : self._used + array.size].reshape(array.shape)
        self._used += array.size
        copy[...] = array
        return copy


Progress = Callable[[int, int], None]  # number of files read so far, and of all files


def _no_progress(n_read: int, n_files: int) -> None:
    """The default for `progress`."""


def scan(options: ScanOptions, *, keep_features: bool = False, progress: Progress = _no_progress) -> Scan:
    """Read every NPZ and NPY file below a folder and determine which ones training can use.

    `check_data.py` and `train.py` both call this function, so they always agree.

    Parameters
    ----------
    keep_features
        Whether to keep the arrays; if not, at most one sequence is in memory at a time.

    Raises
    ------
    UsageError
        If there is no such folder, no NPZ or NPY file in it, no majority for a width, or a choice of arrays.
    stats.DataError
        `bad-statistics`, if the statistics files in the folder cannot be used.
    """
    result = Scan(require_folder(options.directory), options=options)
    result.stored = stats.load(result.directory)
    files = _list_files(result)
    if options.reads_layers:
        _find_layer_axis(result, options, [result.directory / file for file in files])
    moments = _read_files(result, files, keep_features, progress)
    finalize_scan(result, moments)
    return result


def _list_files(result: Scan) -> list[str]:
    """The NPZ and NPY files of the folder, sorted."""
    files = sorted(_walk(result.directory, result))
    if not files and not result.findings:
        raise UsageError(_no_files_message(result))
    return files


def _find_layer_axis(result: Scan, options: ScanOptions, paths: list[Path]) -> None:
    """Determine from some of the files in which axis of their arrays the layers are."""
    shapes = Counter()
    for path in paths[:: 1 + len(paths) // 20]:
        with contextlib.suppress(DataError):  # reported when all files are read
            array, *_ = _load_array(path, (options.key,) if options.key else result.keys)
            shapes[_without_unit_axes(array).shape] += 1
    result.layer_axis, is_clear = layer_axis(shapes, result.layers, result.layer_axis)
    readable = [shape for shape in shapes if len(shape) in (2, 3)]
    if not readable:
        return
    shape = max(readable, key=lambda shape: (len(shape), shapes[shape]))
    has_frames = len(shape) == 3
    layers = shape[result.layer_axis] if has_frames else shape[0]
    if layers > MAX_LAYERS or (has_frames and not is_clear):
        advice = "choose the array with --key, or save the mean over frames, (L, D)"
        result.layer_guess = f"arrays {shape} are read as {layers} layers; if they are frames, {advice}"


def layer_axis(shapes: Counter, layers: int = 1, usual: int | None = None) -> tuple[int, bool]:
    """The axis of the layers in arrays (L, T, D) or (T, L, D), and whether the files show it.

    Files have the number of layers in common, and rarely that of frames.

    Parameters
    ----------
    shapes
        Number of files by shape; (L, D) shows the number of layers, too.
    layers
        Their number, if it is more than one: that of a model.
    usual
        The axis in the training data of a model, which decides if the files do not.
    """
    lengths = Counter(), Counter()  # files by length, for each axis
    for shape, files in shapes.items():
        if len(shape) in (2, 3):
            lengths[0][shape[0]] += files
            lengths[1][shape[-2]] += files
    common = [layers if layers > 1 else max(counts, key=counts.get, default=0) for counts in lengths]
    first, second = (counts[length] for counts, length in zip(lengths, common))
    axis = int(second > first)  # if they are equal, as encoders return them
    is_clear = max(first, second) >= 2 * min(first, second)
    if not is_clear and usual is not None:
        axis = usual
    elif not is_clear and max(common) > MAX_LAYERS >= min(common):
        axis = common.index(min(common))
    return axis, is_clear


def _read_files(
    result: Scan, files: list[str], keep_features: bool, progress: Progress
) -> dict[Shape, stats.RunningMoments]:
    """Read the files into records and findings; return the moments of the rows of each form, (D,) or (L, D)."""
    options, folder, arena = result.options, str(result.directory), Arena()
    # The width of the set is known only after all files have been read, hence moments for each width.
    moments: dict[Shape, stats.RunningMoments] = defaultdict(stats.RunningMoments)
    for number, (file, label) in enumerate(zip(files, _label_files(files, options)), 1):
        try:
            if isinstance(label, DataError):
                raise label
            if label.emotion is None:
                result.n_excluded += 1
                continue
            if options.no_versions and label.version:
                result.n_versions += 1
                continue
            features = options.read(f"{folder}{os.sep}{file}", layer_axis=result.layer_axis)
        except DataError as error:
            result.findings.append(Finding(file, error.code, error.reason))
            continue
        finally:
            progress(number, len(files))
        array, key, dtype, names, *values = features
        result.records.append(Record(label, array.shape, key, dtype, *values))
        result.other_arrays.update(name for name in names if name != key)
        form = array.shape if options.layers else array.shape[-1:]
        moments[form].add(array.reshape(-1, math.prod(form)))
        if keep_features:
            result.features.append(arena.store(array))
    return moments


def iter_features(
    options: ScanOptions, result: Scan, scale: Scale, merge: Names = (), progress: Progress = _no_progress
) -> Iterator[tuple[Utterance, Array]]:
    """Read the features of a folder or a single file one at a time, for a model that is trained already.

    Parameters
    ----------
    result
        Has the path, the width D, the layers, the keys, and whether flat vectors are reshaped. Findings are added to
        it.
    scale
        Of the features that the model was trained on.
    merge
        Emotions that the model merges, in addition to those of the options.

    Yields
    ------
    utterance, features
        The emotion is None if it is unknown or excluded; the features have shape (T, D), or (L, D) with --layers.

    Raises
    ------
    UsageError
        If there is no such folder or file, or no NPZ or NPY file in it.
    """
    folder, files, paths = _input_files(result)
    if options.reads_layers:
        _find_layer_axis(result, options, [folder / file for file in files])
    for number, (file, label) in enumerate(zip(files, _label_files(paths, options, merge)), 1):
        utterance = Utterance(file, "", None, None)
        if not isinstance(label, DataError):
            utterance = dataclasses.replace(label, file=file)
        try:
            frames = _read_fitting(folder / file, options, result, scale)
        except DataError as error:
            result.findings.append(Finding(file, error.code, error.reason))
        else:
            yield utterance, frames
        progress(number, len(files))


def _read_fitting(path: Path, options: ScanOptions, result: Scan, scale: Scale) -> Array:
    """Read one file for a trained model, (T, D) or (L, D); raise a DataError if its width or scale does not fit."""
    features = options.read(path, result.keys, result.layer_axis)
    shape = features.array.shape
    if options.layers:
        fault = layers_fault(features.n_layers, result.layers) or width_fault(shape[1:], result.dim, False)
    else:
        fault = width_fault(shape, result.dim, result.reshapes_vectors)
    if not fault:
        frames = features.array.reshape(-1, result.dim)
        fault = scale.fault(frames, features.rms)
    if fault:
        raise DataError(*fault)
    return frames


def _input_files(result: Scan) -> tuple[Path, list[str], list[str]]:
    """The folder of the input, the names of its files, and for each file the path that may contain its labels."""
    path = result.directory
    if path.is_dir():
        require_folder(path)
        files = _list_files(result)
        return path, files, files
    if not os.path.lexists(path):
        raise UsageError(f"{path}: no such file or folder{_suggest_folders(path.parent)}")
    # The two folders above a single file may contain its emotion and its speaker.
    return path.parent, [path.name], [os.sep.join(path.absolute().parts[-3:])]


def finalize_scan(result: Scan, moments: dict[Shape, stats.RunningMoments]) -> None:
    """Determine what depends on the whole set: its width, outliers, duplicates and notes."""
    _explain_contents(result)
    _require_one_array(result)
    options = result.options
    shapes = Counter(record.layer_shape for record in result.records)
    known_width = _statistics_width(result, shapes) or options.dim
    result.dim = known_width or _majority_width(shapes)
    may_reshape = not options.reads_layers and shapes
    result.reshapes_vectors = bool(may_reshape and (known_width or _confirms_width(shapes, result.dim)))
    result.leave_out({r.file: width_fault(r.layer_shape, result.dim, result.reshapes_vectors) for r in result.records})
    if options.reads_layers and result.records:
        _leave_out_other_layers(result)
    result.features = [array.reshape(-1, result.dim) for array in result.features]
    result.moments = moments[result.form].merged() if result.form in moments else None
    if result.leave_out(_scale_outliers(result)):
        result.moments = None  # outliers are in them, and cannot be removed without reading the files again
    duplicates, harmless = _find_duplicates(result)
    result.leave_out(duplicates)
    _keep_versions_of_records(result)
    # Of the width, and of the names, shapes and checksums of the files that are used.
    listing = [str(result.dim), *(f"{record.file!r} {record.shape} {record.crc}" for record in result.records)]
    if options.reads_layers:
        listing.append(f"layers {result.layers}, axis {result.layer_axis}, layer {options.layer}")
    result.fingerprint = hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]
    _require_own_statistics(result)
    result.notes = sorted(_notes({"duplicate": harmless} | _observe(result)))
    result.findings.sort()


def _keep_versions_of_records(result: Scan) -> None:
    """Treat the versions of a recording whose original has been left out like originals, in place."""
    utterances = result.utterances
    originals = {utterance.recording for utterance in utterances if not utterance.version}
    for place, utterance in enumerate(utterances):
        if utterance.version and utterance.recording not in originals:
            plain = dataclasses.replace(utterance, version="")
            result.records[place] = dataclasses.replace(result.records[place], utterance=plain)


def _scale_outliers(result: Scan) -> Reasons:
    """Files whose features are 1000 times larger or smaller than usual: damage that is finite."""
    rms = np.array([record.rms for record in result.records])
    if len(rms) < 10 or not (median := np.median(rms)):  # too few for a reference, or half of them zero
        return {}
    suspects = [record for record in result.records if not _is_near(record.rms, median)]
    if not suspects:
        return {}
    typical = result.records[np.argsort(rms)[len(rms) // 2]]  # read again, as the suspects are
    scale = Scale(median, np.abs(result.rows(typical)).mean(0))
    return {record.file: scale.fault(result.read_again(record), record.rms) for record in suspects}


def _require_own_statistics(result: Scan) -> None:
    """Raise a DataError if statistics that the user supplied are certainly of other features than these files."""
    if not result.has_user_statistics or not result.records:
        return
    if result.stored.shape != result.form:
        advice = "those of --layers have a row for each layer, all others none"
        found = f"{stats.MEAN_FILE} has shape {result.stored.shape}, not {result.form}"
        raise DataError("bad-statistics", f"{found}: {advice}")
    sample = [result.rows(record) for record in result.records[:: 1 + len(result.records) // 50]]
    own = stats.Moments.of(np.concatenate(sample)).statistics()
    means = np.stack([frames.mean(0) for frames in sample])
    lowest = float(stats.rank_correlation(means, own.mean).min())
    if reason := stats.statistics_mismatch(result.stored.statistics, own, lowest):
        advice = "replace both, or remove them to have them computed"
        pair = f"{stats.MEAN_FILE} and {stats.STD_FILE}"
        raise DataError("bad-statistics", f"{pair} are of another encoder than these files: {reason}; {advice}")


def _require_one_array(result: Scan) -> None:
    """Raise a UsageError if most files have several arrays that may be the features, or if the chosen one is not."""
    several = Counter(finding.reason for finding in result.findings if finding.code == "several-arrays")
    if several.total() > len(result.records):
        table = [f"{arrays}: {counted(files, 'file')}" for arrays, files in several.most_common(12)]
        raise UsageError("several arrays may be the features; choose one with --key NAME:", *table)
    contents = Counter((record.crc, record.shape) for record in result.records)
    files = max(contents.values(), default=0)
    if result.other_arrays and len(result.records) >= 10 and 2 * files > len(result.records):
        others = format_counts(result.other_arrays)
        found = f"the array {result.records[0].key} is the same in {files} files"
        raise UsageError(f"{found}: choose another with --key NAME ({others})")


def _find_duplicates(result: Scan) -> tuple[Reasons, list[str]]:
    """Find files with identical features: those to leave out, and pairs of which both may be used."""
    reasons, harmless = {}, []
    for group in _equal_features(result):
        group = sorted((record.utterance for record in group), key=lambda utterance: bool(utterance.version))
        first, *others = group  # an original, if there is one
        speakers = {utterance.speaker for utterance in group}
        if len({utterance.emotion for utterance in group}) > 1:
            # All of them, because any of the labels may be wrong.
            for utterance in group:
                other = next(other for other in group if other.emotion != utterance.emotion)
                reason = f"has the same features as {other.file}, which is labelled {other.emotion}"
                reasons[utterance.file] = ("duplicate-conflict", reason)
            continue
        for other in others:
            if first.recording == other.recording != "" and first.modality == other.modality:
                reasons[other.file] = ("copy", f"has the same features as {first.file}, of the same recording")
            elif len(speakers) > 1 or None in speakers:
                # A split by speaker could put copies of training data into the test set.
                reason = f"has the same features as {first.file} by {first.speaker or 'an unknown speaker'}"
                reasons[other.file] = ("duplicate-speaker", reason)
            else:
                harmless.append(f"{first.file} = {other.file}")
    return reasons, harmless


def _equal_features(result: Scan) -> Iterator[list[Record]]:
    """Groups of two or more files with the same float32 numbers, in whatever type and shape they are stored."""
    candidates = defaultdict(list)
    for record in result.records:
        candidates[math.prod(record.shape), record.bit_sum].append(record)
    for pending in candidates.values():
        while len(pending) > 1:  # equal sums are rarely chance, but a sequence read backwards has the same
            first, *others = pending
            frames = result.read_again(first)
            equal = [other for other in others if np.array_equal(frames, result.read_again(other))]
            pending = [other for other in others if other not in equal]
            if equal:
                yield [first, *equal]


Observations = dict[str, list[str] | dict[str, int] | int | str]  # by the code of a note; empty or 0 if there is none


def _notes(found: Observations) -> Iterator[Note]:
    """A note for each observation: names, counts, a number of files, or a text."""
    for code, what in found.items():
        if not what:
            continue
        if isinstance(what, list):
            what = format_names(what)
        elif isinstance(what, dict):
            what = format_counts(what)
        elif isinstance(what, int):
            what = counted(what, "file")
        yield Note(code, printable(what))


def _observe(result: Scan) -> Observations:
    """What is worth a note, besides duplicates."""
    utterances = result.utterances
    n_reshaped = sum(len(record.shape) == 1 and record.shape[0] != result.dim for record in result.records)
    keys = result.keys_used()
    found = {
        "reshaped": f"{counted(n_reshaped, 'file')}, D = {result.dim}" if n_reshaped else "",
        "leading-axis": sum(record.has_leading_axis for record in result.records),
        "layer-axis": result.layer_guess,
        "no-checksum": sum(record.key == NPY_KEY for record in result.records),
        "other-arrays": result.other_arrays,
        "mixed-keys": keys if len(keys) > 1 else {},
        "song": [utterance.file for utterance in utterances if utterance.channel == "song"],
        "known-damaged": [f"{u.file} ({damage})" for u in utterances if (damage := emotions.known_damage(u))],
        "no-speaker": Counter(utterance.corpus for utterance in utterances if utterance.speaker is None),
    }
    rows = {record.shape[0] if len(record.shape) == 2 else 1 for record in result.records}
    known_rows = result.options.transpose or result.options.layers
    if len(result.records) > 1 and len(rows) == 1 and rows != {1} and not known_rows:
        read = f"{rows.pop()} rows of {result.dim} values, read as frames"
        advice = "if they are features by frames, use --transpose; if layers, --layers, or --layer K for one of them"
        found["equal-length"] = f"{read}; {advice}"
    return found | _observe_recordings(utterances) | _observe_classes(result) | _observe_features(result)


def _observe_recordings(utterances: list[Utterance]) -> Observations:
    """Observations on files of the same recording, and on tails."""
    recordings = defaultdict(list)
    for utterance in utterances:
        if not utterance.version:
            recordings[utterance.recording or utterance.file].append(utterance)
    twins, nameless = [], []
    for takes in recordings.values():
        if len({take.modality for take in takes}) > 1:
            twins.append(" = ".join(take.file for take in takes))
        elif len(takes) > 1 and takes[0].speaker is None:
            nameless.append(len(takes))
    versions = Counter(utterance.version for utterance in utterances if utterance.version)
    versions_found = f"{counted(versions.total(), 'file')} of {len(utterances)} ({format_counts(versions)})"
    known = [utterance for utterance in utterances if utterance.corpus in emotions.CORPORA and not utterance.version]
    return {
        "twins": twins,
        "same-recording": f"{sum(nameless)} files of {counted(len(nameless), 'recording')}" if nameless else "",
        "versions": versions_found if versions else "",
        "tails": Counter(utterance.tail for utterance in known if utterance.tail),
    }


def _observe_classes(result: Scan) -> Observations:
    """Observations on classes that are new, or too small to train or to score."""
    counts = result.count("emotion")
    speakers = defaultdict(set)
    for utterance in result.utterances:
        speakers[utterance.emotion].add(utterance.speaker)
    targets = _parse_merges(result.options.merge).values()
    unbalanced = counts and max(counts.values()) > 5 * min(counts.values())
    return {
        "new-class": ", ".join(word for word in counts if word in targets and not emotions.emotion_word(word)),
        "few-speakers": {word: len(known) for word, known in speakers.items() if len(known) < 5 and None not in known},
        "few-utterances": {word: count for word, count in counts.items() if count < 10},
        "imbalance": counts if unbalanced else {},
    }


def _observe_features(result: Scan) -> Observations:
    """Observations on signs of a problem in feature extraction."""
    found = {}
    log_rms = np.log([max(record.rms, 1e-30) for record in result.records])  # factors of 3 and 1/3 are equally far
    if len(log_rms) >= 10:
        # Median and median absolute deviation, because outliers would inflate mean and standard deviation.
        distance = np.abs(log_rms - np.median(log_rms))
        far = np.flatnonzero(distance > max(np.log(3), 10 * np.median(distance)))
        names = [f"{result.records[index].file} ({result.records[index].rms:.3g})" for index in far]
        if names:
            found["norm-outlier"] = f"{format_names(names)}; the median is {np.exp(np.median(log_rms)):.3g}"
    if result.moments is not None and result.moments.count >= 10:
        statistics = result.moments.statistics()
        dead = np.flatnonzero(statistics.constant())
        found["dead-dimensions"] = [_name_dimension(index, result) for index in dead]
        # Medians over dimensions, because dead dimensions keep their mean and have no deviation.
        if np.median(np.abs(statistics.mean)) < 0.02 and abs(np.median(statistics.std) - 1) < 0.02:
            found["already-normalised"] = f"over {int(result.moments.count)} frames"
    return found


def _name_dimension(index: int, result: Scan) -> str:
    """The number of a dimension, with that of its layer if there are several."""
    layer, dimension = divmod(index, result.dim)
    return f"{dimension} of layer {layer}" if result.layers > 1 else str(dimension)


def require_folder(directory: str | Path) -> Path:
    """Return the path of an existing, readable folder, or raise a UsageError that suggests folders nearby."""
    path = Path(directory)
    try:
        os.scandir(path).close()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such folder{_suggest_folders(path.parent)}") from None
    except NotADirectoryError:
        raise UsageError(f"{path}: is a file; pass the folder that contains the features") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    return path


def _suggest_folders(folder: Path) -> str:
    """Suggest the usual feature folders, here or one level up, that contain features; empty if there are none."""
    usual = ("models/wav2vec", "wav2vec_features", "wav2vec", "features", "embeddings")
    paths = [base / name for base in (folder, folder.parent) for name in usual]
    found = [path for path in dict.fromkeys(paths) if os.access(path, os.R_OK) and any(path.glob("*.np[yz]"))]
    return f"; there are features in {', '.join(map(str, found))}" if found else ""


#: What to do about files of other formats.
FORMATS = {
    ".wav .flac .mp3 .mp4 .m4a .ogg .opus": "extract embeddings first",
    ".pt .pth": 'emb=torch.load(path, "cpu", weights_only=True).float().numpy()',
    ".pkl .pickle .joblib": "pickles can run code and are never loaded; if you made them, write them with np.savez",
    ".h5 .hdf5": 'emb=h5py.File(path)["NAME"][()]',
    ".safetensors": 'emb=safetensors.numpy.load_file(path)["NAME"]',
    ".mat": 'emb=scipy.io.loadmat(path)["NAME"]',
    ".csv": 'emb=np.genfromtxt(path, delimiter=",", skip_header=1)',
    ".tsv .txt": "emb=np.genfromtxt(path)",
    ".json": "emb=json.loads(path.read_text())",
    ".parquet": 'emb=pandas.read_parquet(path).select_dtypes("number").to_numpy()',
    ".ark .scp": "read them with kaldiio.load_ark, and write each array with np.savez",
}


def _no_files_message(result: Scan) -> str:
    found = ", ".join(f"{count} {suffix}" for suffix, count in result.other_files.most_common(5))
    nothing = "only hidden or temporary files, or results of runs" if result.n_ignored else "the folder is empty"
    content = f"found {found}" if found else nothing
    advice = {}  # a set in order
    for suffixes, what in FORMATS.items():
        for suffix in sorted(result.other_files.keys() & set(suffixes.split())):
            line = what
            if what.startswith("emb="):
                files = f"for path in pathlib.Path({str(result.directory)!r}).rglob('*{suffix}')"
                line = f"{files}: np.savez(path.with_suffix('.npz'), {what})"
            advice[line] = None
    if advice:
        content += f": {'; '.join(advice)}"
    return f"{result.directory}: no NPZ or NPY files; {content}{_suggest_folders(result.directory)}"


def blockers(result: Scan) -> list[str]:
    """The reasons why the folder cannot be used for training, each with a remedy; empty if it can."""
    if not result.records:
        return ["no file can be used: fix the first problem above; the others often have the same cause"]
    classes = result.count("emotion")
    if len(classes) < 2:
        return [f"all files have the same emotion ({printable(next(iter(classes)))}); at least two emotions are needed"]
    if len(classes) > MAX_CLASSES or max(map(len, classes)) > MAX_CLASS_NAME:
        question = "is the label an id or a text? Use --classes to keep the emotions"
        return [f"{len(classes)} emotions, of up to {max(map(len, classes))} characters: {question}"]
    if len(result.records) < 10:
        return [f"{counted(len(result.records), 'usable file')}, too few to train and test on; add more"]
    return [result.folds.args[0]] if isinstance(result.folds, UsageError) else []


# --- the split ----------------------------------------------------------------------------------------------------


class Folds(NamedTuple):
    """Which utterances are tested together, and what must stay on one side of every split; all arrays have shape (N,).

    `fold` counts from 0; it is -1 where the speaker is tested in no fold. `speaker` is that of each utterance, or its
    recording where the speakers are not known. `original` is False for versions, which are only trained on.
    `validation` has the mask of each fold whose validation utterances are prescribed.
    """

    speaker: Array
    recording: Array
    original: Array
    fold: Array
    validation: list[Array]
    independent: bool
    notes: list[str]

    @property
    def number(self) -> int:
        return int(self.fold.max()) + 1


def assign_folds(options: ScanOptions, utterances: list[Utterance], label: Array) -> Folds:
    """Assign utterances to test folds by speaker; the seed of the options, if any, decides among equals.

    Raises
    ------
    UsageError
        If the speakers do not suffice for --folds, or the user's own split cannot be used.
    """
    scheme, seed = options.folds, getattr(options, "seed", 0)
    recording = np.array([utterance.recording or utterance.file for utterance in utterances])
    original = np.array([not utterance.version for utterance in utterances])
    speaker, independent, notes = _name_speakers(utterances, recording, scheme)
    validation = []
    if scheme == "table":
        fold, validation = _table_folds(utterances)
        side = np.where(validation[0], -2, fold) if validation else fold
        if not independent or len(set(zip(speaker, side))) > len(set(speaker)):
            independent, speaker = False, np.array([utterance.file for utterance in utterances])
            problem = "speakers are unknown or on several sides of the table's split"
            notes = [f"{problem}: the scores are NOT speaker-independent"]
    elif scheme.isdecimal():
        number = min(int(scheme), len(set(speaker)))
        if number < int(scheme):
            notes.append(f"--folds {scheme} was reduced to {number}: there are {number} speakers")
        fold = stats.balanced_blocks(stats.numbered(speaker), label, number, seed)
    elif scheme == "leave-one-corpus-out":
        fold, more = _corpus_folds(utterances)
        notes += more
    elif speaker is recording:
        raise UsageError(f"--folds {scheme} needs file names that identify speakers; use --folds 5")
    elif scheme == "leave-one-speaker-out":
        fold = stats.numbered(speaker)
    else:
        fold, validation, more = _official_folds(scheme, speaker)
        notes += more
    folds = Folds(speaker, recording, original, fold, validation, independent, notes)
    _check_sides(scheme, folds)
    return folds


def _name_speakers(utterances: list[Utterance], recording: Array, scheme: str) -> tuple[Array, bool, list[str]]:
    """The speaker of each utterance, whether no fold tests a speaker who may be trained on, and notes.

    Where the names identify fewer than two speakers, every recording counts as its own.
    """
    names = [utterance.speaker or f"{utterance.corpus}:unknown" for utterance in utterances]
    if scheme == "leave-one-corpus-out" and all(utterance.corpus in emotions.CORPORA for utterance in utterances):
        return np.array(names), True, []  # no speaker is in two corpora, known or not
    known = {utterance.speaker for utterance in utterances} - {None}
    unknown = sum(utterance.speaker is None for utterance in utterances)
    if len(known) >= 2:
        note = f"speaker unknown for {counted(unknown, 'file')}, which may be of a known one: NOT speaker-independent"
        return np.array(names), not unknown, [note] if unknown else []
    found = f"only one speaker ({min(known)})" if known else "no speaker"
    note = f"the file names identify {found}: files are split at random"
    if (count := len(set(recording))) < len(recording):
        note += f", those of one recording together ({len(recording)} files of {counted(count, 'recording')})"
    note += "; the scores are NOT speaker-independent and are optimistic"
    return recording, False, [note]


def _corpus_folds(utterances: list[Utterance]) -> tuple[Array, list[str]]:
    """The fold of each utterance, one for each corpus, and a note on classes that only one corpus has."""
    corpora = defaultdict(set)
    for utterance in utterances:
        corpora[utterance.emotion].add(utterance.corpus)
    names = sorted(set().union(*corpora.values()))
    if len(names) < 2:
        advice = "for corpora in a table of your own, number them in its column fold and use --folds table"
        raise UsageError(f"--folds leave-one-corpus-out needs files of two corpora; all are of {names[0]}; {advice}")
    fold = np.array([names.index(utterance.corpus) for utterance in utterances])
    single = ", ".join(f"{emotion} ({min(found)})" for emotion, found in sorted(corpora.items()) if len(found) == 1)
    notes = [
        f"tested without having been trained on, because one corpus alone has it: {single}; use --classes or --merge"
    ]
    return fold, notes if single else []


def _official_folds(scheme: str, speaker: Array) -> tuple[Array, list[Array], list[str]]:
    """The folds and validation masks that a publication lists, by test speakers, and notes on comparability."""
    official = emotions.SCHEMES[scheme]
    fold_of = {name: fold for fold, block in enumerate(official.test_speakers) for name in block}
    present = set(speaker)
    strangers = sorted(present - fold_of.keys())
    if strangers:
        advice = "use --folds 5, or remove those files"
        raise UsageError(f"--folds {scheme} does not cover speaker {', '.join(strangers[:5])}; {advice}")
    fold = stats.numbered([fold_of[name] for name in speaker])
    validation = []
    if official.next_fold_validates:
        folds = int(fold.max()) + 1
        validation = [fold == (current + 1) % folds for current in range(folds)]
    reason, notes = "the scores are not comparable with published ones", []
    if missing := len(fold_of) - len(present):
        notes.append(f"{counted(missing, 'speaker')} of {scheme} missing: {reason}")
    if official.caveat:
        notes.append(f"{official.caveat}: {reason}")
    return fold, validation, notes


# The sides of a split in tables, by the beginning of the word.
_SIDES = re.compile("(?P<train>tr)|(?P<validation>dev|val)|(?P<test>te|ev)")


def _table_folds(utterances: list[Utterance]) -> tuple[Array, list[Array]]:
    """The fold that tests each utterance, and the validation masks, from the split in the user's table."""
    # Versions go with their original, whatever the table has for them.
    split_of = {utterance.recording: utterance.split for utterance in utterances if not utterance.version}
    splits = [split_of[utterance.recording] if utterance.version else utterance.split for utterance in utterances]
    given = [(split or "").casefold() for split in splits]
    if all(re.fullmatch(r"[0-9]{1,9}(\.0)?", value) for value in given):
        return stats.numbered([int(float(value)) for value in given]), []
    matches = [_SIDES.match(value) for value in given]
    side = np.array([match.lastgroup if match else "" for match in matches])
    unknown = sorted({value for value, known in zip(given, side) if not known})
    if unknown:
        found = ", ".join(repr(value) if value else "no entry" for value in unknown[:3])
        raise UsageError(f"--folds table needs train, validation and test, or numbers, for every file; found: {found}")
    for needed in ("test", "train"):
        if needed not in side:
            raise UsageError(f"--folds table: no file is for {needed}")
    validation = side == "validation"
    return np.where(side == "test", 0, -1), [validation] if validation.any() else []


def _check_sides(scheme: str, folds: Folds) -> None:
    """Raise a UsageError if a fold, or the final model, would have nothing to train on, to validate on or to test."""
    if not folds.fold.any():
        raise UsageError(f"--folds {scheme} gives one fold; at least two are needed")
    for current in range(folds.number + 1):  # the last one is the final model
        remaining = folds.fold != current
        if current < len(folds.validation):
            validation = folds.validation[current] & folds.original
            enough = validation.any() and (remaining & ~folds.validation[current]).any()
        else:  # one speaker is divided by its recordings
            enough = len(set(folds.recording[remaining])) > 1
        if not enough:
            name = "final" if current == folds.number else current + 1
            found = f"leaves no speaker for training or for validation (fold {name}); add speakers"
            raise UsageError(f"--folds {scheme} {found}")


# --- reporting ----------------------------------------------------------------------------------------------------


def format_names(names: list[str]) -> str:
    """The number of names, and the first five."""
    shown = names if len(names) <= 5 else [*names[:5], "..."]
    return f"{len(names)}: {', '.join(shown)}"


def format_counts(counts: dict[str, int]) -> str:
    """The first twelve keys with their counts; the largest of a Counter."""
    ranked = counts.most_common() if isinstance(counts, Counter) else list(counts.items())
    shown = [f"{key} {count}" for key, count in ranked[:12]]
    if len(ranked) > 12:
        shown.append(f"and {len(ranked) - 12} more")
    return printable(", ".join(shown))


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the singular for 1: `1 file`, `2 files`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def format_range(values: Iterable[int]) -> str:
    lowest, highest = min(values), max(values)
    return str(lowest) if lowest == highest else f"{lowest} to {highest}"


def _labels_line(result: Scan) -> str:
    words = {
        "name": "from file names",
        "folder": "from emotion-named folders",
        "pattern": "from file names, by --pattern",
        "table": "from the table given by --labels",
    }
    labels = " and ".join(f"{words[source]} ({count})" for source, count in result.labelled_by().items())
    nested = any(os.sep in record.file for record in result.records)
    return f"{labels}; files are {'in subfolders' if nested else 'flat in the folder'}"


def _statistics_line(result: Scan) -> str:
    pair = f"{stats.MEAN_FILE} and {stats.STD_FILE}"
    if result.stored is None:
        return "none here; train.py will compute and save them"
    if result.stored.user_supplied:
        return f"{pair} were supplied by you and are used for every fold and the final model"
    if result.statistics_are_stale:
        return f"{pair} were computed for OTHER files and are not used; update them with train.py --recompute-stats"
    return f"{pair} were computed for these files"


def _features_line(result: Scan) -> str:
    if result.layers > 1:
        return f"{counted(len(result.records), 'utterance')} of {result.layers} layers of {result.dim}"
    lengths = [math.prod(record.shape) // result.dim for record in result.records]
    forms = Counter("vector" if record.shape == (result.dim,) else "sequence" for record in result.records)
    line = " and ".join(counted(count, form) for form, count in forms.most_common())
    if "sequence" in forms:
        line += f" of {format_range(lengths)} frames"
    one = f", layer {result.options.layer} of {result.records[0].n_layers}" if result.options.layer is not None else ""
    return f"{line}, width {result.dim}{one}"


def findings_report(result: Scan, limit: int | None = 20) -> Iterator[str]:
    """Yield one line for each file that is left out, at most `limit` lines per code."""
    shown = Counter()
    for finding in result.findings:
        shown[finding.code] += 1
        if limit is None or shown[finding.code] <= limit:
            yield printable(f"{finding.file}: {finding.code} {finding.reason}; {REMEDIES[finding.code]}")
    for code, count in shown.items():
        if limit is not None and count > limit:
            yield f"... and {count - limit} more {code} (--all)"
    for code, recipe in result.recipes.items():
        yield f"{code}: Python code for this, after import csv, os, pathlib, numpy as np"
        yield from (f"    {line}" for line in recipe.splitlines())


def _kinds(result: Scan) -> str:
    names = (*(record.file for record in result.records), *(finding.file for finding in result.findings))
    return " and ".join(sorted({"NPY" if name.lower().endswith(NPY_KEY) else "NPZ" for name in names})) or "NPZ"


def summary(result: Scan) -> Iterator[str]:
    """Yield the lines of the summary of a folder."""
    used, unused = len(result.records), len(result.findings)
    counts = f"{counted(result.n_files, f'{_kinds(result)} file')}, {used} usable, {unused} left out"
    if result.n_excluded:
        counts += f", {result.n_excluded} excluded by --classes"
    if result.n_versions:
        counts += f", {result.n_versions} by --no-versions"
    yield printable(f"{result.directory}: {counts}")
    if result.n_ignored:
        yield f"  ignored      {counted(result.n_ignored, 'hidden or temporary file')}, or results of runs"
    if not result.records:
        return
    speakers = result.count("speaker")
    n_unknown = speakers.pop(None, 0)
    named = f"{len(speakers)}, {format_range(speakers.values())} utterances each" if speakers else "0"
    if n_unknown:
        named += f"; speaker unknown for {counted(n_unknown, 'file')}"
    yield f"  corpora      {format_counts(result.count('corpus'))}"
    yield f"  labels       {_labels_line(result)}"
    yield f"  emotions     {format_counts(result.count('emotion'))}"
    yield f"  speakers     {named}"
    yield f"  features     {_features_line(result)}"
    keys, dtypes = Counter(result.count("key")), Counter(result.count("dtype"))
    yield f"  array        {format_counts(keys)}; {format_counts(dtypes)}"
    yield f"  statistics   {_statistics_line(result)}"
    for note in result.notes:
        yield f"  note         {note.code}: {NOTES[note.code]}: {note.text}"


def report(result: Scan) -> dict:
    """The same report as data, for --json."""
    return {
        "directory": str(result.directory),
        "files": result.n_files,
        "usable": len(result.records),
        "excluded": result.n_excluded + result.n_versions,
        "ignored": result.n_ignored,
        "left_out": result.left_out(),
        "findings": [finding._asdict() | {"remedy": REMEDIES[finding.code]} for finding in result.findings],
        "recipes": result.recipes,
        "notes": [note._asdict() | {"meaning": NOTES[note.code]} for note in result.notes],
        "dim": result.dim,
        "layers": result.layers,
        **{
            field: {str(value): count for value, count in result.count(field).items()}
            for field in ("corpus", "emotion", "speaker", "gender", "intensity", "key", "dtype", "shape")
        },
        "labelled_by": result.labelled_by(),
        "statistics": _statistics_line(result),
        "blockers": blockers(result),
        "exit_status": exit_status(result),
    }


def _verdict(result: Scan) -> Iterator[str]:
    reasons = blockers(result)
    for reason in reasons:
        yield f"  NOT READY    {reason}"
    if not reasons:
        for note in result.folds.notes:
            yield f"  split        {note}"
        yield printable(f"  ready        {command_line(result.options)}")


def exit_status(result: Scan) -> int:
    if not result.records:
        return 2
    return 1 if result.findings or blockers(result) else 0


DETAILS = """
examples:
  python check_data.py DIR
  python check_data.py DIR --labels labels.csv --key hubert
  python check_data.py DIR --json > report.json

exit status: 0 all files can be used; 1 problems found; 2 wrong usage, or no file
can be used
"""


def main(arguments: list[str] | None = None) -> int:
    parser, groups = build_parser(
        ScanOptions, "Inspect a folder of speech embeddings and name every file that cannot be used, and why.", DETAILS
    )
    output = groups["output"]
    output.add_argument("--all", action="store_true", help="list every finding instead of at most 20 per code")
    output.add_argument("--json", action="store_true", help="print the report as JSON")
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


def run_cli(program: Callable[[], int]) -> int:
    """Run a program, so that problems with its output never cause a traceback; return its exit status.

    The status is 141 for a closed pipe, and 1 if the output cannot be written.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (None under pythonw, or if closed by the caller)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal in ASCII must not fail on a file name
            stream.reconfigure(errors="backslashreplace")
    try:
        return program()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"cannot write the output: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit fails again
        return 141 if isinstance(error, BrokenPipeError) else 1


if __name__ == "__main__":
    sys.exit(run_cli(main))

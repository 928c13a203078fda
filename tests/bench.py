#!/usr/bin/env python3
"""Time the reader beside np.load and beside a raw read, and weigh the scan of small and large folders.

    python tests/bench.py [--scan]

Every figure is a median over rounds that take turns on the same files, all of them in the page cache; ratios are taken
round by round. `--scan` adds time and peak memory of check_data.py on folders of 1,000, 12,000 and 50,000 vectors.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import check_data  # noqa: E402

ROUNDS = 9


def write_set(folder: Path, files: int, shape: tuple[int, ...]) -> list[str]:
    """Write files that are named as those of ESD, whose numbering allows for 35,000, and of a second copy of it."""
    random = np.random.default_rng(0)
    folder.mkdir()
    paths = []
    for number in range(files):
        speaker, sentence = divmod(number % 35_000, 1750)
        prefix = "esd_" if number < 35_000 else "ESD-"
        paths.append(f"{folder}/{prefix}{speaker + 1:04d}_{sentence + 1:06d}.npz")
        np.savez(paths[-1], emb=random.normal(size=shape).astype(np.float32))
    return paths


def raw(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 1 << 30)
    finally:
        os.close(descriptor)


def numpy_load(path: str) -> np.ndarray:
    with np.load(path) as file:
        return file["emb"]


def seconds(read: Callable, paths: list[str]) -> float:
    started = time.perf_counter()
    for path in paths:
        read(path)
    return time.perf_counter() - started


def bench_reader() -> None:
    print(f"{'array':>12} {'files':>6} {'raw us':>8} {'ours us':>8} {'numpy us':>9} {'numpy/ours':>11} {'ours/raw':>9}")
    readers = (raw, check_data.read_features, numpy_load)
    for shape, files in (((768,), 2000), ((150, 768), 300)):
        with tempfile.TemporaryDirectory() as place:
            paths = write_set(Path(place) / "set", files, shape)
            rounds = [[seconds(read, paths) for read in readers] for _ in range(ROUNDS)]
        bare, ours, numpy = (statistics.median(column) / files * 1e6 for column in zip(*rounds))
        faster = statistics.median(theirs / mine for _, mine, theirs in rounds)
        slower = statistics.median(mine / least for least, mine, _ in rounds)
        print(f"{shape!s:>12} {files:>6} {bare:>8.1f} {ours:>8.1f} {numpy:>9.1f} {faster:>11.2f} {slower:>9.2f}")


def bench_scan() -> None:
    print(f"\n{'files':>6} {'seconds':>8} {'peak MB':>8}   python check_data.py, whole process")
    with tempfile.TemporaryDirectory() as place:
        for files in (1_000, 12_000, 50_000):
            folder = Path(place) / str(files)
            write_set(folder, files, (768,))
            times = []
            for _ in range(3):
                started = time.perf_counter()
                subprocess.run([sys.executable, ROOT / "check_data.py", folder], stdout=subprocess.DEVNULL, check=False)
                times.append(time.perf_counter() - started)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # the largest child so far: the last
            print(f"{files:>6} {statistics.median(times):>8.2f} {peak:>8.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", action="store_true", help="also time and weigh whole scans")
    options = parser.parse_args()
    bench_reader()
    if options.scan:
        bench_scan()

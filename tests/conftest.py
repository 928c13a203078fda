import atexit
import csv
import dataclasses
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as train.py does, before numpy is imported

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
# One program is compiled once for all tests and their processes, and nothing goes into the user's own cache.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], True)
os.environ["JAX_PLATFORMS"] = "cpu"  # two processes cannot share the memory of a GPU; see tests/gpu.py
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from make_sample import write_sample  # noqa: E402

import check_data  # noqa: E402
import emotions  # noqa: E402
import stats  # noqa: E402
import train  # noqa: E402

SMALL = train.Config("DIR", width=8, epochs=4, seeds=2, folds="3", batch=32)
FAST = ("--epochs", "12", "--seeds", "2", "--width", "32", "--folds", "3", "--learning-rate", "0.01")
#: What a finished run leaves.
ARTIFACTS = {
    "config.json",
    "confusion.csv",
    "fusion.npz",
    "history.csv",
    "lock",
    "metrics.json",
    "model.npz",
    "predictions.csv",
    "report.html",
    "skipped.csv",
    "train.log",
    "wav2vec_mean.npy",
    "wav2vec_std.npy",
}


# --- data ---


def dataset_of(folder):
    return train.pack(check_data.scan(check_data.ScanOptions(str(folder)), keep_features=True))


def computed_statistics(dataset):
    return stats.Stored(dataset.moments.merged().statistics(), False, "fingerprint")


def experiment_of(dataset, config=SMALL):
    return train.Experiment(config, dataset, train.make_split(dataset, config), computed_statistics(dataset))


def utterance(speaker, emotion="happy", corpus="ravdess", file="x"):
    return emotions.Utterance(file, corpus, emotion, speaker)


def bare_dataset(speakers, labels, corpus="ravdess"):
    """Utterances without features, for everything that depends only on speakers and labels."""
    classes = ("happy", "sad", "angry")
    utterances = [utterance(s, classes[c], corpus, f"{n:04d}") for n, (s, c) in enumerate(zip(speakers, labels))]
    return train.Dataset(np.zeros((len(labels), 2)), np.ones(len(labels)), np.array(labels), classes, utterances, None)


def many_speakers(count, each=9):
    speakers = [f"ravdess:{number:02d}" for number in range(1, count + 1) for _ in range(each)]
    return bare_dataset(speakers, [0, 1, 2] * (count * each // 3))


def write_sequences(folder, seed=0):
    """Sequences whose frames show the emotion only here and there, so that pooling has something to find."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    direction = rng.normal(size=(8, 12)) * 2
    for actor in range(1, 7):
        for emotion in range(1, 9):
            for take in (1, 2):
                frames = rng.normal(size=(rng.integers(8, 30), 12))
                frames[:: rng.integers(2, 5)] += direction[emotion - 1]
                name = f"03-01-{emotion:02d}-01-01-{take:02d}-{actor:02d}.npz"
                np.savez(folder / name, emb=frames.astype(np.float32))
    return folder


# --- files ---


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def documented_python(word):
    """The Python block of README or docs that contains this word."""
    pages = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    blocks = [part.split("```")[0] for page in pages for part in page.split("```python\n")[1:]]
    (block,) = [block for block in blocks if word in block]
    return block


# --- the training program ---


class Population:
    """An experiment laid out for the compiled program, with its parts at hand."""

    def __init__(self, experiment, jax):
        self.experiment, self.jax = experiment, jax
        self.config, self.dataset, self.split, self.stored = experiment
        self.static, self.data, self.members = train.set_up(experiment)
        self.key = jax.random.key(0)
        # As train.py calls it, so that one compilation serves both.
        self.program = functools.cache(lambda static: jax.jit(functools.partial(train.population_epochs, static)))

    def member(self, row, **hyper):
        """One member, with other hyperparameters if given."""
        member = self.of(self.members, row)
        return member._replace(hyper=member.hyper._replace(**hyper))

    def first_state(self, member, static=None):
        """The first state of a single member."""
        alone = self.jax.tree.map(lambda leaf: np.asarray(leaf)[None], member)
        return self.of(train.initial_state(static or self.static, alone), 0)

    def run(self, members=None, **changed):
        """First state, state after one call of the program, and measures; `changed` replaces parts of the data."""
        members = self.members if members is None else members
        static = self.static._replace(mesh=train.population_mesh(len(members.group)))
        state = train.initial_state(static, members)
        data = train.to_devices(static.mesh, self.data._replace(**changed))
        placed = train.to_devices(static.mesh, (members, state), "population")
        after, measures = self.program(static)(data, placed[0], (self.config.seed, 0), placed[1])
        return self.jax.device_get((state, after, measures))

    def of(self, tree, chosen):
        """Some rows of every array of a tree."""
        return self.jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], tree)

    def assert_equal(self, one, other, **tolerance):
        for left, right in zip(self.jax.tree.leaves(one), self.jax.tree.leaves(other), strict=True):
            if tolerance:
                np.testing.assert_allclose(left, right, **tolerance)
            else:
                np.testing.assert_array_equal(left, right)


@pytest.fixture(scope="session")
def jax_stack():
    """Import jax the way the program does, once."""
    train.start_jax()
    return train.jax


@pytest.fixture
def sample(tmp_path):
    """A small folder in the real form: 2 corpora, 8 speakers, 112 files, 24 features."""
    return write_sample(tmp_path / "data", actors=4, dim=24)


@pytest.fixture(scope="module")
def population(tmp_path_factory, jax_stack):
    """A population of vectors; do not change it."""
    folder = write_sample(tmp_path_factory.mktemp("population") / "data", actors=4, dim=24)
    return Population(experiment_of(dataset_of(folder)), jax_stack)


@pytest.fixture(scope="module")
def sequence_population(tmp_path_factory, jax_stack):
    """A population of sequences, whose members walk through the same batches; do not change it."""
    dataset = dataset_of(write_sequences(tmp_path_factory.mktemp("sequences") / "data"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "MAX_LENGTH_GROUPS", 2)  # each group takes long to compile
        return Population(experiment_of(dataset, dataclasses.replace(SMALL)), jax_stack)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, jax_stack):
    """A folder `data` with one bad file, and two runs on it; do not change them.

    The run `first` computes the statistics, `second` loads them.
    """
    place = tmp_path_factory.mktemp("trained")
    data = write_sample(place / "data", actors=4, dim=24)
    (data / "03-01-05-01-02-01-12.npz").write_bytes(b"")
    for run in ("first", "second"):
        assert train.main([str(data), "--out", str(place / run), *FAST]) == 0
    return place

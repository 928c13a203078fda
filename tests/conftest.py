import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# One program is compiled once for all tests and their processes, and nothing goes into the user's own cache.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], True)
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@pytest.fixture(scope="session")
def jax_stack():
    """Import jax the way the program does, once."""
    import train

    train.start_jax()
    return train.jax


@pytest.fixture
def sample(tmp_path):
    """A small folder in the real form: 2 corpora, 8 speakers, 112 files, 24 numbers wide."""
    from make_sample import write_sample

    return write_sample(tmp_path / "data", actors=4, dim=24)

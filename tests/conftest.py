import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # nothing of the tests in the user's own cache
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

#!/usr/bin/env python3
"""Write the synthetic sample: features in the real form, of speakers who do not exist.

    python tests/make_sample.py [FOLDER]

Every utterance is a point: its emotion's direction, its speaker's own offset and noise, at the scale of real
embeddings. The names are built as RAVDESS and CREMA-D build theirs; no recording is behind any of them.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import emotions  # noqa: E402

SEED, DIM = 20, 48
_CODE_OF = {word: code.upper() for code, word in emotions.CORPORA["cremad"].codes["emotion"].items()}


def names(actors: int, sentences: int) -> Iterator[tuple[str, str, str]]:
    """Yield name, emotion and speaker, for as many actors of either corpus."""
    for actor in range(1, actors + 1):
        for number, emotion in enumerate(emotions.EMOTIONS, 1):
            for sentence in range(sentences):
                repetition, statement = divmod(sentence, 2)
                name = f"03-01-{number:02d}-01-{statement + 1:02d}-{repetition + 1:02d}-{actor:02d}"
                yield f"ravdess_{name}", emotion, f"ravdess:{actor:02d}"
                if emotion in _CODE_OF:
                    words = ("IOM", "TAI", "DFA", "ITS")[sentence]
                    yield f"cremad_{1000 + actor}_{words}_{_CODE_OF[emotion]}_XX", emotion, f"cremad:{1000 + actor}"


def write_sample(
    folder: Path, *, actors: int = 8, sentences: int = 2, dim: int = DIM, seed: int = SEED, frames: bool = False
) -> Path:
    """Write the files and return the folder; with `frames` each holds a sequence of 2 to 6 frames."""
    random = np.random.default_rng(seed)
    directions = {emotion: random.normal(size=dim) for emotion in emotions.EMOTIONS}
    offsets: dict[str, np.ndarray] = {}
    centre, scale = random.normal(size=dim), random.uniform(0.05, 3, dim)
    folder.mkdir(parents=True, exist_ok=True)
    for name, emotion, speaker in names(actors, sentences):
        if speaker not in offsets:
            offsets[speaker] = random.normal(size=dim)
        shape = (random.integers(2, 7), dim) if frames else (dim,)
        point = 0.9 * directions[emotion] + 0.9 * offsets[speaker] + 1.7 * random.normal(size=shape)
        np.savez(folder / f"{name}.npz", emb=(centre + scale * point).astype(np.float32))
    return folder


if __name__ == "__main__":
    print(write_sample(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "sample"))

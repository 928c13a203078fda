"""What a file name says: the code tables of the corpora, their parsers and their official folds.

Standard library only. A corpus is one entry of `CORPORA`: a pattern with named groups and the tables that turn
its codes into words. To add one, add an entry; nothing else in the project names a corpus.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

#: The common vocabulary, in the order in which classes are listed everywhere.
EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")

_SYNONYMS = {
    "happy": "happiness joy joyful",
    "sad": "sadness",
    "angry": "anger",
    "fear": "fearful",
    "disgust": "disgusted",
    "surprise": "surprised ps",
}
_WORDS = {word: word for word in EMOTIONS} | {
    synonym: word for word, synonyms in _SYNONYMS.items() for synonym in synonyms.split()
}

#: What feature writers put around a name and what says nothing about the utterance.
_EXTENSIONS = re.compile(r"(\.(npz|npy|wav|flac|mp3|m4a|ogg|opus|mp4|avi|flv|pt))+$", re.IGNORECASE)
_SUFFIXES = re.compile(r"([_-](wav2vec2?|embeddings?|emb|features?|feats?))+$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
    """What a name says of one recording; a field that the name does not tell is None.

    `speaker` is namespaced by the corpus (`ravdess:12`), because bare numbers collide between corpora.
    """

    file: str
    corpus: str
    emotion: str | None
    speaker: str | None
    gender: str | None = None
    intensity: str | None = None
    sentence: str | None = None
    repetition: str | None = None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One corpus: how its names are built and what their codes mean.

    Parameters
    ----------
    pattern
        Regular expression of the whole stem. Its named groups `emotion`, `speaker`, `gender`, `intensity`,
        `sentence` and `repetition` become the fields of `Utterance`; any other named group only serves the
        sentence that tells a user which part of a name was not understood.
    codes
        For each group the meaning of its codes, in upper case. A group without a table is kept as written.
    prefixes
        Further prefixes (beside the corpus's own id) that feature writers put before the name.
    odd_speakers_male
        Whether odd speaker numbers are male and even ones female.
    """

    pattern: str
    codes: Mapping[str, Mapping[str, str | None]]
    prefixes: tuple[str, ...] = ()
    odd_speakers_male: bool = False


CORPORA: dict[str, Corpus] = {
    # Livingstone and Russo 2018: modality-channel-emotion-intensity-statement-repetition-actor.
    "ravdess": Corpus(
        pattern=(
            r"(?P<modality>0[123])-(?P<channel>0[12])-(?P<emotion>0[1-8])-(?P<intensity>0[12])"
            r"-(?P<sentence>0[12])-(?P<repetition>0[12])-(?P<speaker>0[1-9]|1\d|2[0-4])"
        ),
        codes={
            "emotion": dict(zip([f"0{code}" for code in range(1, 9)], EMOTIONS)),
            "intensity": {"01": "normal", "02": "strong"},
        },
        odd_speakers_male=True,
    ),
    # Cao et al. 2014: actor_sentence_emotion_level. Old copies hold one name that ends in a single X.
    "cremad": Corpus(
        pattern=(
            r"(?P<speaker>10(?:0[1-9]|[1-8]\d|9[01]))_(?P<sentence>IEO|TIE|IOM|IWW|TAI|MTI|IWL|ITH|DFA|ITS|TSI|WSI)"
            r"_(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)_(?P<intensity>LO|MD|HI|XX?)"
        ),
        codes={
            "emotion": {
                "ANG": "angry",
                "DIS": "disgust",
                "FEA": "fear",
                "HAP": "happy",
                "NEU": "neutral",
                "SAD": "sad",
            },
            "intensity": {"LO": "low", "MD": "medium", "HI": "high", "XX": None, "X": None},
        },
        prefixes=("crema-d", "crema_d", "crema"),
    ),
}

_FIELDS = tuple(field.name for field in dataclasses.fields(Utterance) if field.name not in ("file", "corpus"))


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Official folds of one corpus: the test speakers of each fold.

    `next_block_validates` is True where the source names the validation speakers: those of the next fold.
    """

    corpus: str
    test: tuple[tuple[str, ...], ...]
    next_block_validates: bool = False


def _actors(table: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"ravdess:{int(actor):02d}" for actor in block.split()) for block in table.split("|"))


SCHEMES: dict[str, Scheme] = {
    # EmoBox (Ma et al. 2024), the RAVDESS folds of its repository.
    "emobox-ravdess": Scheme(
        "ravdess", _actors("1 11 20 21 | 4 10 12 14 | 8 9 19 23 | 3 5 7 24 | 2 15 16 18 | 6 13 17 22")
    ),
    # Luna-Jimenez et al. 2021.
    "luna-ravdess": Scheme(
        "ravdess", _actors("2 5 14 15 16 | 3 6 7 13 18 | 10 11 12 19 20 | 8 17 21 23 24 | 1 4 9 22")
    ),
    # EMO-SUPERB (Wu et al. 2024): five runs of consecutive actors, the next run validates.
    "emosuperb-cremad": Scheme(
        "cremad",
        tuple(
            tuple(f"cremad:{actor}" for actor in range(first, last + 1))
            for first, last in ((1001, 1018), (1019, 1036), (1037, 1054), (1055, 1072), (1073, 1091))
        ),
        next_block_validates=True,
    ),
}


def emotion_word(word: str) -> str | None:
    """Fold an emotion word into the common vocabulary: `Happiness` gives `happy`; None if it is not known."""
    return _WORDS.get(word.casefold())


def folder_emotion(folder: str) -> str | None:
    """Read the emotion off a folder's name: `happy`, `03_Happy` and `OAF_Fear` have one; None unless exactly one."""
    found = {emotion_word(token) for token in re.split(r"[\W\d_]+", folder)} - {None}
    return found.pop() if len(found) == 1 else None


@functools.cache
def _prefix_pattern() -> re.Pattern[str]:
    owners = [prefix for corpus_id, corpus in CORPORA.items() for prefix in (corpus_id, *corpus.prefixes)]
    longest_first = sorted(owners, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})[_-]+(?=.)", re.IGNORECASE)


def _strip(name: str) -> tuple[str, str | None]:
    """Strip folders, extensions, feature suffixes and the corpus prefix; return the stem and the prefix's corpus."""
    stem = _SUFFIXES.sub("", _EXTENSIONS.sub("", re.split(r"[/\\]", name)[-1]))
    stem = _EXTENSIONS.sub("", stem)  # `x.wav_wav2vec.npz`: an extension may hide behind the suffix
    prefix = _prefix_pattern().match(stem)
    if prefix is None:
        return stem, None
    word = prefix[1].lower()
    owner = next(key for key, corpus in CORPORA.items() if word == key or word in corpus.prefixes)
    return stem[prefix.end() :], owner


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def _group_spans(pattern: str) -> dict[str, tuple[int, int]]:
    """Find each named group of a pattern: where its body begins and ends."""
    spans = {}
    for group in re.finditer(r"\(\?P<(\w+)>", pattern):
        depth, position = 1, group.end()
        while depth:
            character = pattern[position]
            depth += (character == "(") - (character == ")")
            position += 2 if character == "\\" else 1
        spans[group[1]] = (group.end(), position - 1)
    return spans


def _near_miss(stem: str, corpus_id: str) -> str | None:
    """Say which one part of a stem keeps it from being a name of this corpus; None if more than one part does."""
    corpus = CORPORA[corpus_id]
    for group, (start, end) in _group_spans(corpus.pattern).items():
        loose = _compiled(corpus.pattern[:start] + "[^_-]*" + corpus.pattern[end:]).fullmatch(stem)
        if loose:
            known = ", ".join(corpus.codes[group]) if group in corpus.codes else corpus.pattern[start:end]
            return f"a {corpus_id} name, but its {group} {loose[group]!r} is not one of {known}"
    return None


def parse_name(name: str, corpus: str | None = None) -> Utterance:
    """Read corpus, speaker and emotion off a file name.

    Parameters
    ----------
    name
        File name or path, with or without extensions, corpus prefix and feature suffix.
    corpus
        Corpus id, where it is known already; otherwise the prefix or the form of the name tells it.

    Raises
    ------
    ValueError
        With the reason, if no corpus, or more than one, can claim the name.

    Examples
    --------
    >>> parse_name("ravdess_03-01-05-01-02-01-12.npz").emotion
    'angry'
    """
    stem, prefix_corpus = _strip(name)
    if corpus is not None and corpus not in CORPORA:
        raise ValueError(f"corpus {corpus!r} is not one of {', '.join(CORPORA)}")
    candidates = [corpus or prefix_corpus] if corpus or prefix_corpus else list(CORPORA)
    matches = {key: match for key in candidates if (match := _compiled(CORPORA[key].pattern).fullmatch(stem))}
    if len(matches) > 1:
        raise ValueError(f"{stem!r} can be a name of {' or of '.join(matches)}")
    if not matches:
        misses = [miss for key in candidates if (miss := _near_miss(stem, key))]
        raise ValueError(misses[0] if misses else f"{stem!r} is not a name of {' or of '.join(candidates)}")
    ((key, match),) = matches.items()
    return _utterance(name, key, match)


def _utterance(name: str, corpus_id: str, match: re.Match[str]) -> Utterance:
    corpus = CORPORA[corpus_id]
    found = {group: code.upper() for group, code in match.groupdict().items() if group in _FIELDS and code}
    fields = {group: corpus.codes[group][code] if group in corpus.codes else code for group, code in found.items()}
    speaker = fields.pop("speaker", None)
    if corpus.odd_speakers_male and speaker:
        fields["gender"] = "male" if int(speaker) % 2 else "female"
    return Utterance(
        file=name,
        corpus=corpus_id,
        emotion=fields.pop("emotion", None),
        speaker=f"{corpus_id}:{speaker}" if speaker else None,
        **fields,
    )

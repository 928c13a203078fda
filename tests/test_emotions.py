import pytest

import emotions


@pytest.mark.parametrize(
    "name",
    [
        "ravdess_03-01-05-01-02-01-12.npz",
        "03-01-05-01-02-01-12.npz",
        "some/folder/03-01-05-01-02-01-12.wav.npz",
        "RAVDESS_03-01-05-01-02-01-12.NPZ",
        "03-01-05-01-02-01-12_wav2vec.npz.npz",
        "03-01-05-01-02-01-12.wav_embeddings.npz",
    ],
)
def test_ravdess_names_in_every_form(name):
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
def test_cremad_names_in_every_form(name):
    utterance = emotions.parse_name(name)
    assert (utterance.corpus, utterance.emotion, utterance.speaker) == ("cremad", "happy", "cremad:1025")
    assert (utterance.gender, utterance.intensity, utterance.sentence) == (None, None, "TSI")


def test_cremad_level_and_the_name_with_a_single_x():
    assert emotions.parse_name("1001_IEO_ANG_HI").intensity == "high"
    assert emotions.parse_name("1040_ITH_SAD_X").emotion == "sad"


def test_odd_actors_of_ravdess_are_male():
    assert emotions.parse_name("03-01-01-01-01-01-07").gender == "male"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("03-01-09-01-02-01-12.npz", "emotion '09' is not one of 01, 02"),
        ("03-01-05-01-02-01-25.npz", "speaker '25'"),
        ("1025_TSI_JOY_XX.npz", "emotion 'JOY' is not one of ANG"),
        ("1092_TSI_HAP_XX.npz", "speaker '1092'"),
        ("cremad_03-01-05-01-02-01-12.npz", "is not a name of cremad"),
        ("03a01Fa.npz", "'03a01Fa' is not a name of ravdess or of cremad"),
        ("x03-01-05-01-02-01-12.npz", "modality 'x03'"),
        ("03-01-05-01-02-01-12-01.npz", "is not a name"),
        ("", "is not a name"),
    ],
)
def test_what_is_not_understood_is_named(name, told):
    with pytest.raises(ValueError, match=r".") as error:
        emotions.parse_name(name)
    assert told in str(error.value)


def test_an_unknown_corpus_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="ravdess, cremad"):
        emotions.parse_name("03-01-05-01-02-01-12", corpus="nowhere")


def test_two_corpora_that_claim_one_name_are_not_guessed_between(monkeypatch):
    monkeypatch.setitem(emotions.CORPORA, "twin", emotions.CORPORA["ravdess"])
    with pytest.raises(ValueError, match="ravdess or of twin"):
        emotions.parse_name("03-01-05-01-02-01-12")
    assert emotions.parse_name("03-01-05-01-02-01-12", corpus="twin").speaker == "twin:12"


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
def test_emotion_of_a_folder(folder, word):
    assert emotions.folder_emotion(folder) == word


@pytest.mark.parametrize("scheme", ["emobox-ravdess", "luna-ravdess"])
def test_official_ravdess_folds_hold_every_actor_once(scheme):
    tested = [speaker for block in emotions.SCHEMES[scheme].test for speaker in block]
    assert sorted(tested) == [f"ravdess:{actor:02d}" for actor in range(1, 25)]


def test_official_cremad_folds_hold_every_actor_once():
    tested = [speaker for block in emotions.SCHEMES["emosuperb-cremad"].test for speaker in block]
    assert sorted(tested) == [f"cremad:{actor}" for actor in range(1001, 1092)]


def test_every_table_covers_its_pattern():
    """Each code of the emotion tables is a code of the pattern and the other way round."""
    for corpus in emotions.CORPORA.values():
        start, end = emotions._group_spans(corpus.pattern)["emotion"]
        body = emotions._compiled(corpus.pattern[start:end])
        assert all(body.fullmatch(code) for code in corpus.codes["emotion"])
        assert set(corpus.codes["emotion"].values()) <= set(emotions.EMOTIONS)

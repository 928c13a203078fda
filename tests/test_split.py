import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL, bare_dataset, computed_statistics, dataset_of, many_speakers
from make_sample import write_sample

import check_data
import emotions
import stats
import train

# --- options ---


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("out", ""),
        ("predict", ""),
        ("folds", ""),
        ("seeds", 0),
        ("epochs", 0),
        ("patience", 0),
        ("batch", 0),
        ("width", 0),
        ("sweep", 0),
        ("learning_rate", 0.0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("clip", 0.0),
        ("clip", float("nan")),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("label_smoothing", 1.0),
        ("mixup", float("nan")),
        ("weight_decay", -0.1),
        ("weight_decay", float("inf")),
        ("pooling", "max"),
        ("precision", "float16"),
        ("seed", -1),
        ("seed", 2**32),
        ("dim", 0),
    ],
)
def test_an_impossible_value_is_refused_with_the_name_of_its_option(option, value):
    with pytest.raises(check_data.UsageError, match=f"--{option.replace('_', '-')} must be"):
        dataclasses.replace(SMALL, **{option: value})


@pytest.mark.parametrize(
    "limits",
    [
        {"seeds": 1, "epochs": 1, "patience": 1, "batch": 1, "width": 1, "sweep": 1},
        {"dropout": 0.0, "label_smoothing": 0.0, "mixup": 0.0, "weight_decay": 0.0, "seed": 0},
        {"dropout": 0.99, "label_smoothing": 0.99, "mixup": 0.99, "clip": 1e9, "seed": 2**32 - 1},
    ],
)
def test_values_at_the_limits_are_accepted(limits):
    config = dataclasses.replace(SMALL, **limits)
    assert {name: getattr(config, name) for name in limits} == limits


def test_the_command_line_has_every_option_with_its_type():
    config = train.parse_config(["D", "--dropout", "0.25", "--seeds", "3", "--dim", "7", "--recompute-stats"])
    assert config == train.Config("D", dropout=0.25, seeds=3, dim=7, recompute_stats=True)


def test_the_recorded_command_reproduces_the_options():
    quoted = train.Config(
        "-a 'dir'", seeds=3, merge=("calm=neutral", "fear=sad"), fresh=True, pattern="-(?P<emotion>.)"
    )
    for config in (quoted, train.Config("D")):
        python, program, *arguments = shlex.split(check_data.command_line(config))
        assert (python, program) == ("python", "train.py")
        assert train.parse_config(arguments) == config


def test_options_that_are_off_are_not_among_those_that_are_set():
    assert train.set_options(train.Config("D")).keys().isdisjoint({"out", "merge", "fresh", "dim"})
    config = train.Config("D", out="RUN", merge=("calm=neutral",), fresh=True, mixup=0.0)
    expected = {"directory": "D", "out": "RUN", "merge": ("calm=neutral",), "fresh": True, "mixup": 0.0}
    assert expected.items() <= train.set_options(config).items()


def test_help_needs_no_jax():
    code = "import sys; sys.modules['jax'] = None; import train; train.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("program", [train, check_data])
def test_help_has_every_option_in_its_group_with_choices_and_default_then_examples_and_exit_status(program, capsys):
    options = train.Config if program is train else check_data.ScanOptions
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0
    _, *parts = re.split(r"^([a-z ]+):", capsys.readouterr().out, flags=re.MULTILINE)
    # A line may end at a hyphen.
    sections = {title: re.sub(r"-\s+", "-", text) for title, text in zip(parts[::2], parts[1::2])}
    sections = {title: " ".join(text.split()) for title, text in sections.items()}
    assert list(sections)[-2:] == ["examples", "exit status"]
    for field in dataclasses.fields(options)[1:]:
        entry = sections[field.metadata["group"]].split(f"{check_data.option_flag(field.name)} ")[1].split(" --")[0]
        assert all(choice in entry for choice in field.metadata["choices"])
        if field.default not in (None, False, ()):
            assert entry.endswith(f"(default: {field.default})")


@pytest.mark.parametrize("program", [train, check_data])
def test_both_programs_have_the_version_of_the_changelog(program, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.endswith(f" {check_data.VERSION}\n")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (\S+)", changelog, re.MULTILINE)
    assert next(version for version in versions if version != "Unreleased") == check_data.VERSION


def test_options_without_effect_are_noted(caplog):
    with caplog.at_level("INFO"):
        train.log_unused(train.Config("D", pooling="mean", epochs=3), "on vectors", ("pooling", "transpose"))
        train.log_unused(train.Config("D"), "with --predict", train.TRAINING_OPTIONS)
        train.log_unused(train.Config("D", label_smoothing=0, key="x"), "with --predict", train.TRAINING_OPTIONS)
    assert caplog.messages == [
        "note: no effect on vectors: --pooling",
        "note: no effect with --predict: --label-smoothing",
    ]


@pytest.mark.parametrize(("number", "expected"), [(0, "0 files"), (1, "1 file"), (2, "2 files")])
def test_a_number_is_printed_with_the_right_form_of_its_noun(number, expected):
    assert check_data.counted(number, "file") == expected


# --- the split ---


def split_of(dataset, **options):
    return train.make_split(dataset, dataclasses.replace(SMALL, **options))


def sides(split):
    """Masks of training, validation and test for each model."""
    for row, (training, validation) in enumerate(zip(split.train, split.validation)):
        yield training, validation, split.fold == row // split.seeds


def each_emotion_once(corpus, speakers):
    """A dataset in which every speaker has each of three emotions once."""
    return bare_dataset(speakers * 3, np.repeat([0, 1, 2], len(speakers)).tolist(), corpus)


CREMAD = [f"cremad:{actor}" for actor in range(1001, 1092)]


@pytest.mark.parametrize("folds", ["2", "5", "leave-one-speaker-out", "emobox-ravdess", "luna-ravdess"])
@pytest.mark.parametrize("seeds", [1, 2, 5, 7])
def test_no_speaker_is_on_two_sides(folds, seeds):
    split = split_of(many_speakers(24), folds=folds, seeds=seeds)
    assert split.train.shape == split.validation.shape == (seeds * (split.folds + 1), 24 * 9)
    for training, validation, tested in sides(split):
        assert (training.astype(int) + validation + tested == 1).all()
        parts = [set(split.speaker[part]) for part in (training, validation, tested)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 24
        assert parts[0]
        assert parts[1]


def test_every_speaker_is_tested_once_and_the_final_model_tests_nobody():
    split = split_of(many_speakers(10))
    assert set(split.fold) == {0, 1, 2}
    assert split.speakers(split.fold >= 0) == sorted(
        speaker for fold in range(3) for speaker in split.speakers(split.fold == fold)
    )
    for training, validation, _ in list(sides(split))[-SMALL.seeds :]:
        assert (training | validation).all()


def test_rows_belong_to_folds_and_repeat_for_every_setting_of_a_sweep():
    split = split_of(many_speakers(10), seeds=4)
    assert [list(split.members(fold)) for fold in (0, 3)] == [[0, 1, 2, 3], [12, 13, 14, 15]]
    assert [split.fold_of(row) for row in (0, 3, 4, 15, 16, 19, 20, 31)] == [0, 0, 1, 3, 0, 0, 1, 3]
    assert [split.fold_name(fold) for fold in range(4)] == ["1", "2", "3", "final"]


@pytest.mark.parametrize("seeds", [5, 7])
def test_the_seeds_of_a_fold_train_on_all_its_speakers_together(seeds):
    split = split_of(many_speakers(12), seeds=seeds)
    for fold in range(4):
        members = split.members(fold)
        assert (split.train[members].any(0) == (split.fold != fold)).all()
        assert (split.validation[members].sum(0) == (split.fold != fold)).all()


def test_a_single_seed_validates_on_a_fifth_of_the_speakers():
    split = split_of(many_speakers(15), seeds=1)
    assert [len(split.speakers(validation)) for validation in split.validation] == [2, 2, 2, 3]


def test_where_seeds_outnumber_speakers_they_validate_on_the_same_ones_again():
    split = split_of(many_speakers(6), seeds=5)  # four speakers remain in each fold
    for fold in range(3):
        validates = [split.speakers(split.validation[row]) for row in split.members(fold)]
        assert sorted(validates[:4]) == [[speaker] for speaker in split.speakers(split.fold != fold)]
        assert validates[4] == validates[0]


def test_a_split_follows_from_the_seed():
    dataset = many_speakers(12)
    same, again, other = (split_of(dataset, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(same.fold, again.fold)
    np.testing.assert_array_equal(same.validation, again.validation)
    assert (same.fold != other.fold).any()


@pytest.mark.parametrize("broken", ["train", "validation"])
def test_a_leaking_split_is_caught(broken):
    split = split_of(many_speakers(6))
    train.check_disjoint(split)
    leak = getattr(split, broken).copy()
    leak[0, np.flatnonzero(split.fold == 0)[0]] = True
    with pytest.raises(RuntimeError, match="an utterance is on two sides"):
        train.check_disjoint(split._replace(**{broken: leak}))


def test_an_utterance_in_training_and_validation_is_caught():
    split = split_of(many_speakers(6))
    leak = split.train.copy()
    leak[-1] |= split.validation[-1]
    with pytest.raises(RuntimeError, match="member 7: an utterance is on two sides"):
        train.check_disjoint(split._replace(train=leak))


def test_a_speaker_split_between_training_and_test_is_caught():
    split = split_of(many_speakers(6))
    moved = split.fold.copy()
    moved[np.flatnonzero(split.fold == 0)[0]] = 1
    leak = split.train.copy()
    leak[: SMALL.seeds] = (moved != 0) & ~split.validation[: SMALL.seeds]
    with pytest.raises(RuntimeError, match="member 0: a speaker is on two sides"):
        train.check_disjoint(split._replace(fold=moved, train=leak))


def test_a_speaker_split_between_training_and_validation_is_caught():
    split = split_of(many_speakers(6))
    moved = np.flatnonzero(split.validation[3])[0]
    training, validation = split.train.copy(), split.validation.copy()
    training[3, moved], validation[3, moved] = True, False
    with pytest.raises(RuntimeError, match="member 3: a speaker is on two sides"):
        train.check_disjoint(split._replace(train=training, validation=validation))


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_a_model_without_a_side_is_caught(empty):
    split = split_of(many_speakers(6))
    masks = getattr(split, empty).copy()
    masks[7] = False
    with pytest.raises(RuntimeError, match="member 7: a side of the split is empty"):
        train.check_disjoint(split._replace(**{empty: masks}))


def test_blocks_keep_groups_together_and_classes_balanced():
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(30), random.integers(4, 40, 30))
    label = random.integers(0, 4, len(group))
    block = stats.balanced_blocks(group, label, 5, seed=0)
    assert all(len(set(block[group == number])) == 1 for number in range(30))
    counts = np.zeros((5, 4))
    np.add.at(counts, (block, label), 1)
    assert (np.abs(counts / counts.mean(0) - 1) < 0.15).all()


def test_a_rare_class_is_spread_over_the_blocks():
    """Twenty groups of ten utterances; four of them have one utterance of a rare class."""
    group, label = np.repeat(np.arange(20), 10), np.tile([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], 20)
    label[[0, 10, 20, 30]] = 2
    for seed in range(5):
        block = stats.balanced_blocks(group, label, 4, seed)
        assert sorted(block[label == 2]) == [0, 1, 2, 3]


def test_no_block_is_empty_while_there_are_groups():
    assert sorted(stats.balanced_blocks(np.arange(5), np.arange(5), 5, seed=0)) == [0, 1, 2, 3, 4]
    assert sorted(stats.balanced_blocks(np.arange(6), np.zeros(6, int), 6, seed=0)) == [0, 1, 2, 3, 4, 5]


def test_an_official_scheme_has_the_published_test_folds():
    split = split_of(many_speakers(24), folds="luna-ravdess")
    for fold, block in enumerate(emotions.SCHEMES["luna-ravdess"].test_speakers):
        assert set(split.speaker[split.fold == fold]) == set(block)
    assert split.notes == []


def test_the_next_fold_validates_where_the_scheme_requires_it():
    split = split_of(each_emotion_once("cremad", CREMAD), folds="emosuperb-cremad")
    blocks = emotions.SCHEMES["emosuperb-cremad"].test_speakers
    for row in range(5 * SMALL.seeds):
        assert set(split.speaker[split.validation[row]]) == set(blocks[(row // SMALL.seeds + 1) % 5])
    final = [split.speakers(split.validation[row]) for row in split.members(5)]
    assert final[0] != final[1]
    assert any("listeners perceived" in note and "not comparable" in note for note in split.notes)


def test_an_official_scheme_refuses_unknown_speakers_and_notes_missing_ones():
    with pytest.raises(check_data.UsageError, match="does not cover speaker ravdess:25; use --folds 5"):
        split_of(many_speakers(25), folds="emobox-ravdess")
    notes = split_of(many_speakers(20), folds="emobox-ravdess").notes
    assert notes == ["4 speakers of emobox-ravdess missing: the scores are not comparable with published ones"]


def test_an_official_scheme_with_speakers_of_one_fold_is_refused():
    block = list(emotions.SCHEMES["emobox-ravdess"].test_speakers[1])
    with pytest.raises(check_data.UsageError, match="gives one fold; at least two are needed"):
        split_of(each_emotion_once("ravdess", block), folds="emobox-ravdess")


def test_folds_of_an_official_scheme_without_speakers_are_skipped():
    first, _, third, *_ = emotions.SCHEMES["emobox-ravdess"].test_speakers
    split = split_of(each_emotion_once("ravdess", [*first, *third]), folds="emobox-ravdess")
    assert (split.folds, split.speakers(split.fold == 1)) == (2, sorted(third))


def test_leave_one_speaker_out_tests_each_speaker_alone():
    split = split_of(many_speakers(6), folds="leave-one-speaker-out")
    assert [split.speakers(split.fold == fold) for fold in range(6)] == [[f"ravdess:0{n}"] for n in range(1, 7)]


def of_two_corpora(first, second, emotions_of_second=("happy", "sad", "angry")):
    """Six files of each of some speakers of RAVDESS and of some of another corpus; None is an unknown one."""
    classes = ("happy", "sad", "angry", "calm")
    utterances = [
        emotions.Utterance(f"{corpus}{number:03d}", corpus, words[number % 3], speaker and f"{corpus}:{speaker}")
        for corpus, speakers, words in (("ravdess", first, classes[:3]), ("mesd", second, emotions_of_second))
        for number, speaker in enumerate(speakers * 6)
    ]
    label = np.array([classes.index(utterance.emotion) for utterance in utterances])
    return train.Dataset(np.zeros((len(label), 2)), np.ones(len(label)), label, classes, utterances, None)


def test_leave_one_corpus_out_tests_each_corpus_alone():
    dataset = of_two_corpora(["01", "02", "03"], ["a", "b"])
    split = split_of(dataset, folds="leave-one-corpus-out")
    corpora = np.array([utterance.corpus for utterance in dataset.utterances])
    assert [set(corpora[split.fold == fold]) for fold in range(split.folds)] == [{"mesd"}, {"ravdess"}]
    assert (split.independent, split.notes) == (True, [])


@pytest.mark.parametrize(("first", "second"), [(["01", "02", "03"], [None]), (["01"], [None]), ([None], [None])])
def test_corpora_share_no_speaker_even_if_their_names_have_none(first, second):
    split = split_of(of_two_corpora(first, second), folds="leave-one-corpus-out")
    assert (split.folds, split.independent) == (2, True)
    assert set(split.notes) == {"only one training speaker remains: validation uses the same speaker"}
    dataset = of_two_corpora(first, second)
    own = [dataclasses.replace(u, corpus=u.corpus.replace("mesd", "folder")) for u in dataset.utterances]
    assert not split_of(dataset._replace(utterances=own), folds="leave-one-corpus-out").independent


def test_a_class_that_one_corpus_alone_has_is_noted_once():
    dataset = of_two_corpora(["01", "02", "03"], ["a", "b", "c"], ("happy", "sad", "calm"))
    (note,) = split_of(dataset, folds="leave-one-corpus-out").notes
    found = "because one corpus alone has it: angry (ravdess), calm (mesd)"
    assert note == f"tested without having been trained on, {found}; use --classes or --merge"


def test_leave_one_corpus_out_needs_two_corpora():
    with pytest.raises(check_data.UsageError, match="needs files of two corpora; all are of ravdess"):
        split_of(many_speakers(6), folds="leave-one-corpus-out")


@pytest.mark.parametrize("folds", ["1", "0", "-3", "five", "emobox-cremad"])
def test_an_unknown_fold_scheme_is_refused(folds):
    with pytest.raises(check_data.UsageError, match=f"--folds '{folds}' is not a fold scheme"):
        split_of(many_speakers(6), folds=folds)


def test_fewer_speakers_than_folds_are_noted():
    split = split_of(many_speakers(3), folds="5")
    assert (split.folds, split.notes) == (3, ["--folds 5 was reduced to 3: there are 3 speakers"])
    assert split_of(many_speakers(5), folds="5").notes == []


def test_a_split_that_leaves_nobody_to_train_on_is_refused():
    speakers = [f"cremad:{actor}" for actor in range(1001, 1037)]  # of two of five folds
    with pytest.raises(check_data.UsageError, match="leaves no speaker for training"):
        split_of(each_emotion_once("cremad", speakers), folds="emosuperb-cremad")
    lonely = bare_dataset(["ravdess:01"] * 29 + ["ravdess:02"], [0, 1, 2] * 10)
    with pytest.raises(check_data.UsageError, match="leaves no speaker for training"):
        split_of(lonely)


def test_a_class_that_is_tested_but_not_trained_on_is_noted():
    speakers = [f"ravdess:{number:02d}" for number in range(1, 7) for _ in range(6)]
    split = split_of(bare_dataset(speakers, [0, 1, 0, 1, 2, 2] + [0, 1] * 15))
    fold = split.fold[0] + 1
    assert split.notes == [f"fold {fold} tests angry without having trained on it: too few speakers have it"]


def test_two_speakers_are_tested_separately_but_validated_together():
    split = split_of(many_speakers(2, 30))
    assert (split.folds, split.independent) == (2, True)
    assert split.notes[1:] == ["only one training speaker remains: validation uses the same speaker"]
    for training, validation, tested in sides(split):
        assert not (training & validation).any()
        assert not (set(split.speaker[training]) | set(split.speaker[validation])) & set(split.speaker[tested])


@pytest.mark.parametrize(("speaker", "found"), [(None, "no speaker"), ("ravdess:01", "only one speaker (ravdess:01)")])
def test_names_without_two_speakers_are_never_called_independent(speaker, found):
    dataset = bare_dataset([speaker] * 30, [0, 1, 2] * 10)
    split = split_of(dataset)
    assert not split.independent
    (note,) = split.notes
    assert note.startswith(f"the file names identify {found}: files are split at random")
    assert note.endswith("the scores are NOT speaker-independent and are optimistic")
    with pytest.raises(check_data.UsageError, match="needs file names that identify speakers"):
        split_of(dataset, folds="leave-one-speaker-out")


def test_files_of_unknown_speakers_stay_together_beside_known_speakers():
    speakers = [f"ravdess:{number:02d}" for number in range(5) for _ in range(6)] + [None] * 6
    split = split_of(bare_dataset(speakers, [0, 1, 2] * 12))
    assert len(set(split.fold[-6:])) == 1
    assert not split.independent
    assert split.notes[0].startswith("speaker unknown for 6 files, ")
    assert "NOT speaker-independent" in split.notes[0]


def logged(function, *arguments, caplog):
    caplog.clear()
    with caplog.at_level("INFO", logger="train"):
        result = function(*arguments)
    return result, [record.getMessage() for record in caplog.records]


def test_the_log_names_the_test_speakers_of_each_fold(caplog):
    split = split_of(many_speakers(24))
    _, lines = logged(train.log_split, split, caplog=caplog)
    assert lines[0] == "split: 3-fold; training 3 folds and the final model with 2 seeds each (8 models)"
    for fold in range(3):
        tested = split.speakers(split.fold == fold)
        assert lines[fold + 1] == f"  fold {fold + 1} tests {' '.join(tested[:6])} ... (8)"
    assert len(lines) == 4


def test_the_log_shows_six_speakers_of_a_fold_and_counts_the_others(caplog):
    split = split_of(many_speakers(20))
    _, lines = logged(train.log_split, split, caplog=caplog)
    counts = [len(split.speakers(split.fold == fold)) for fold in range(3)]
    assert sorted(counts) == [6, 7, 7]
    for count, line in zip(counts, lines[1:]):
        assert line.count("ravdess:") == 6
        assert line.endswith(" ... (7)") == (count == 7)


def test_the_log_has_the_notes_of_the_split(caplog):
    for dataset in (many_speakers(2, 30), bare_dataset([None] * 30, [0, 1, 2] * 10)):
        split = split_of(dataset)
        _, lines = logged(train.log_split, split, caplog=caplog)
        assert [line for line in lines if line.startswith("note: ")] == [f"note: {note}" for note in split.notes]


# --- versions of a recording, and the user's own split ---


def dataset_with(utterances):
    """A dataset without features, with classes in the order of their first utterance."""
    classes = tuple(dict.fromkeys(utterance.emotion for utterance in utterances))
    label = np.array([classes.index(utterance.emotion) for utterance in utterances])
    return train.Dataset(np.zeros((len(label), 2)), np.ones(len(label)), label, classes, utterances, None)


def recordings(speakers):
    """Two recordings of each speaker in each of three emotions, with two versions each."""
    for n in range(6 * len(speakers)):
        emotion = ("happy", "sad", "angry")[n % 3]
        for version in ("", "noise", "pitch"):
            yield emotions.Utterance(
                f"{n:03d}_{version}", "own", emotion, speakers[n // 6], recording=f"{n}", version=version
            )


@pytest.mark.parametrize("speakers", [["x", "y", "z", "w"], [None], ["x", "y"]])
def test_versions_stay_with_their_original_and_only_train(speakers):
    dataset = dataset_with(list(recordings(speakers)))
    split = split_of(dataset, folds="2")
    recording = np.array([utterance.recording for utterance in dataset.utterances])
    version = np.array([utterance.version != "" for utterance in dataset.utterances])
    assert (split.scored == ~version).all()
    for training, validation, tested in sides(split):
        assert not (validation & version).any()
        assert not set(recording[training]) & (set(recording[validation]) | set(recording[tested]))
        assert (training & version).any()
    assert f"{version.sum()} versions of other files: for training only, not scored" in split.notes


def test_files_of_one_recording_without_an_original_stay_together_and_are_all_scored():
    dataset = dataset_with([dataclasses.replace(u, version="") for u in recordings([None])])
    split = split_of(dataset)
    assert split.scored.all()
    for number in range(6):
        assert len({split.fold[n] for n, u in enumerate(dataset.utterances) if u.recording == f"{number}"}) == 1
    assert "files are split at random, those of one recording together (18 files of 6 recordings)" in split.notes[0]


def with_split(values, speakers=None):
    """One utterance for each value of the user's split."""
    speakers = speakers or [f"own:{n}" for n in range(len(values))]
    words = ["happy", "sad"] * len(values)
    return dataset_with(
        [
            emotions.Utterance(f"{n}", "own", word, speaker, split=value)
            for n, (value, speaker, word) in enumerate(zip(values, speakers, words))
        ]
    )


def split_by_table(dataset, **options):
    return split_of(dataset, folds="table", labels="labels.csv", **options)


def test_the_users_folds_are_used():
    split = split_by_table(with_split(["3", "1", "2.0", "1", "3", "2"]))
    assert split.fold.tolist() == [2, 0, 1, 0, 2, 1]
    assert split.independent
    assert split.scored.all()


@pytest.mark.parametrize("validation", ["dev", "Validation", "val", "Development"])
def test_the_users_sides_are_used(validation):
    split = split_by_table(with_split(["Train"] * 6 + [validation] * 2 + ["test1", "Test"]), seeds=2)
    assert split.folds == 1
    assert split.scored.tolist() == [False] * 8 + [True] * 2
    for row in split.members(0):
        assert split.train[row].tolist() == [True] * 6 + [False] * 4
        assert split.validation[row].tolist() == [False] * 6 + [True] * 2 + [False] * 2
    for row in split.members(1):
        assert (split.train[row] | split.validation[row]).all()


def test_without_a_validation_side_training_speakers_validate():
    split = split_by_table(with_split(["train"] * 8 + ["test"] * 2))
    assert split.validation[0][:8].any()
    assert not split.validation[0][8:].any()


def test_a_table_that_divides_a_speaker_is_used_but_never_called_independent():
    split = split_by_table(with_split(["1", "2"] * 4, ["own:x"] * 4 + ["own:y"] * 4))
    assert not split.independent
    assert split.notes[0].endswith("on several sides of the table's split: the scores are NOT speaker-independent")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["train", "test", "tset"] * 3, "found: 'tset'"),
        (["train", "test", None] * 3, "found: no entry"),
        (["1", "test", "train"] * 3, "found: '1'"),
        (["1"] * 6, "gives one fold"),
        (["train"] * 6, "no file is for test"),
        (["train"] + ["test"] * 6, "leaves no speaker for training or for validation"),
    ],
)
def test_a_split_of_the_table_that_cannot_be_used_is_refused(values, message):
    with pytest.raises(check_data.UsageError, match=message):
        split_by_table(with_split(values))


def test_versions_follow_their_original_in_the_table():
    utterances = [
        dataclasses.replace(u, split=None if u.version else str(n // 3 % 2)) for n, u in enumerate(recordings("abcd"))
    ]
    utterances = [dataclasses.replace(u, speaker=None) for u in utterances]
    split = split_by_table(dataset_with(utterances))
    assert split.fold.tolist() == [n // 3 % 2 for n in range(len(utterances))]


# --- normalisation and class weights ---


def scan_of(folder):
    return check_data.scan(check_data.ScanOptions(str(folder)), keep_features=True)


def test_the_statistics_of_a_fold_are_those_of_the_speakers_that_it_does_not_test(sample):
    dataset = dataset_of(sample)
    split, stored = train.make_split(dataset, SMALL), computed_statistics(dataset)
    mean, scale, prior = train.normalise_folds(dataset, split, stored)
    assert mean.shape == scale.shape == (split.folds + 1, 24)
    for fold in range(split.folds):
        expected = stats.Moments.of(dataset.x[split.fold != fold]).statistics()
        np.testing.assert_allclose(mean[fold], expected.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(scale[fold], expected.scale(), rtol=1e-5)
    np.testing.assert_array_equal(mean[-1], stored.statistics.mean)
    np.testing.assert_array_equal(scale[-1], stored.statistics.scale())
    assert np.isinf(prior).all()


def test_the_statistics_of_sequences_weigh_every_frame_equally(tmp_path):
    folder = write_sample(tmp_path / "data", actors=3, dim=6, frames=True)
    frames = scan_of(folder).features
    dataset = dataset_of(folder)
    everything = np.concatenate(frames).astype(np.float64)
    np.testing.assert_allclose(computed_statistics(dataset).statistics.mean, everything.mean(0), atol=1e-5)
    np.testing.assert_allclose(computed_statistics(dataset).statistics.std, everything.std(0), rtol=1e-5)
    split = train.make_split(dataset, SMALL)
    mean, scale, _ = train.normalise_folds(dataset, split, computed_statistics(dataset))
    for fold in range(split.folds):
        trained_on = np.concatenate([frames[n] for n in np.flatnonzero(split.fold != fold)]).astype(np.float64)
        np.testing.assert_allclose(mean[fold], trained_on.mean(0), atol=1e-5)
        np.testing.assert_allclose(scale[fold], trained_on.std(0), rtol=1e-5)


def test_statistics_supplied_by_the_user_apply_to_every_model(sample):
    dataset = dataset_of(sample)
    supplied = stats.Statistics(np.full(24, 3, np.float32), np.full(24, 2, np.float32))
    mean, scale, _ = train.normalise_folds(
        dataset, train.make_split(dataset, SMALL), stats.Stored(supplied, user_supplied=True, fingerprint=None)
    )
    assert mean.shape == scale.shape == (4, 24)
    assert (mean == 3).all()
    assert (scale == 2).all()


def choose(folder, caplog, **options):
    """The chosen statistics, whether to save them, and what was logged."""
    scan = scan_of(folder)
    dataset, config = train.pack(scan), dataclasses.replace(SMALL, **options)
    (stored, to_save), lines = logged(train.choose_statistics, scan, dataset, config, caplog=caplog)
    return stored, to_save, lines


def test_new_statistics_are_over_all_data_and_saved_beside_them(sample, caplog):
    stored, to_save, lines = choose(sample, caplog)
    np.testing.assert_array_equal(stored.statistics.mean, computed_statistics(dataset_of(sample)).statistics.mean)
    assert (stored.user_supplied, stored.fingerprint) == (False, scan_of(sample).fingerprint)
    assert to_save
    assert lines == ["normalisation: each fold from the speakers that it does not test; final model from all data"]


def test_nothing_is_saved_in_a_read_only_folder(sample, caplog, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != sample)  # root can write everywhere
    assert not choose(sample, caplog)[1]


@pytest.mark.parametrize("fingerprint", [None, "other files"])
def test_statistics_that_a_run_has_saved_bind_no_later_one(sample, caplog, fingerprint):
    saved = stats.Statistics(np.full(24, 3, np.float32), np.full(24, 2, np.float32))
    stats.save(sample, saved, fingerprint or scan_of(sample).fingerprint)
    for recompute in (False, True):
        stored, to_save, lines = choose(sample, caplog, recompute_stats=recompute)
        np.testing.assert_array_equal(stored.statistics.mean, computed_statistics(dataset_of(sample)).statistics.mean)
        assert to_save == recompute
        assert any("computed for other files" in line for line in lines) == (fingerprint is not None and not recompute)


def test_statistics_supplied_by_the_user_are_used_and_never_recomputed(sample, caplog):
    np.save(sample / stats.MEAN_FILE, np.full(24, 3, np.float32))
    np.save(sample / stats.STD_FILE, np.full(24, 2, np.float32))
    stored, to_save, lines = choose(sample, caplog)
    assert stored.user_supplied
    assert not to_save
    assert (stored.statistics.mean == 3).all()
    assert lines == [f"normalisation: every model from {sample / stats.MEAN_FILE}, supplied by you"]
    with pytest.raises(check_data.UsageError, match="were supplied by you; move them first"):
        choose(sample, caplog, recompute_stats=True)


def test_class_weights_give_all_classes_equal_influence():
    label = np.array([0, 0, 0, 1, 2])
    weight = train.class_weights(label, np.array([[True] * 5, [True, True, False, True, False]]), 3)
    np.testing.assert_allclose(weight[0], [5 / 9, 5 / 3, 5 / 3])
    np.testing.assert_allclose(weight[1], [3 / 4, 3 / 2, 0])


def test_notes_on_the_split_cannot_forge_a_line(caplog):
    dataset = bare_dataset(["own:x\n  ready"] * 9, [0, 1, 2] * 3)
    split = train.make_split(dataset, SMALL)
    _, lines = logged(train.log_split, split, caplog=caplog)
    assert any("x\\n  ready" in line for line in lines)
    assert not any("\n" in line for line in lines)

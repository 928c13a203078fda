"""README and docs: tables like the code, snippets that run, output like the programs', links that lead somewhere."""

import dataclasses
import json
import re
import sys
import types
import wave

import numpy as np
import pytest
from conftest import ARTIFACTS, ROOT, documented_python
from make_sample import write_sample

import check_data
import emotions
import train

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
REFERENCE = PAGES["docs/reference.md"]


def section(title):
    """The text below a heading of docs/reference.md, up to the next one of any level."""
    return re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", REFERENCE, re.MULTILINE | re.DOTALL)[1]


def names_in_first_column(text):
    return [
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split(" |")[0])
    ]


# --- tables ---


def test_every_option_is_documented_with_its_default():
    documented = {}
    for line in section("Options").splitlines():
        if line.startswith("| `--"):
            names, *columns = line.split(" | ")
            names = re.findall(r"`--([a-z-]+)`", names)
            values = columns[0].split(", ") if len(columns) == 2 else [""] * len(names)
            documented |= dict(zip(names, values, strict=True))
    fields = {field.name.replace("_", "-"): field.default for field in dataclasses.fields(train.Config)[1:]}
    assert documented.keys() == fields.keys()
    for name, default in fields.items():
        if default is None or default is False or default == ():
            assert documented[name] in ("", "`runs/<name of DIR>`")
        else:
            assert type(default)(documented[name]) == default


def test_every_fold_scheme_is_documented_with_its_number_of_folds():
    rows = dict(re.findall(r"^\| `([a-z][a-z-]+)` \| (\w+)", section("Options"), re.MULTILINE))
    assert rows.keys() == set(check_data.FOLD_SCHEMES)
    for name, scheme in emotions.SCHEMES.items():
        assert rows[name] == str(len(scheme.test_speakers))


def test_every_finding_and_note_is_documented():
    findings, notes = section("Findings and notes").split("| note |")
    assert sorted(names_in_first_column(findings)) == sorted(check_data.REMEDIES)
    assert sorted(names_in_first_column(notes)) == sorted(check_data.NOTES)
    assert "`bad-statistics`" in findings


def test_every_corpus_is_documented_with_names_of_its_own():
    rows = re.findall(r"\| `(\w+)` \| (`[^|]+`) (?=\|)", section("File names"))
    assert f"({len(emotions.CORPORA)} corpora are known" in PAGES["README.md"]
    assert sorted(corpus for corpus, _ in rows) == sorted(emotions.CORPORA)
    for corpus, examples in rows:
        for name in re.findall(r"`([^`]+)`", examples):
            assert emotions.parse_name(f"{name}.npz", corpus).corpus == corpus


def test_every_file_of_a_run_is_documented():
    assert set(names_in_first_column(section("Results"))) == ARTIFACTS | set(train.RunFolder.CHECKPOINTS)


def test_every_key_and_array_of_a_run_is_documented(trained):
    run = trained / "first"
    metrics, config = (json.loads((run / name).read_text()) for name in ("metrics.json", "config.json"))
    documented = set(names_in_first_column(section("metrics.json"))) | {f"{name}_ci95" for name in train.SCORES}
    assert documented == metrics.keys() | {"sweep", "layers", "trained_on", "unknown_speakers", "fused", "weights"}
    described = next(line for line in section("Results").splitlines() if line.startswith("| `config.json`"))
    assert all(f"`{key}`" in described for key in config)
    with np.load(run / "fusion.npz") as fusion:
        assert set(names_in_first_column(section("fusion.npz"))) == set(fusion)


def test_every_command_and_verdict_of_remote_sh_is_documented():
    text = section("remote.sh")
    for command in ("deploy HOST DIR", "monitor HOST", "download HOST", "stop HOST", "remove HOST"):
        assert f"./remote.sh {command}" in text
    verdicts = ("finished", "failed N", "running", "stalled", "unhealthy", "killed", "not deployed", "unreachable")
    for status, name in zip((0, 1, 3, 4, 5, 6, 7, 255), verdicts):
        assert f"| {status} | {name} |" in text


# --- README ---


def test_readme_has_at_most_200_lines_and_each_command_on_one():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 200
    assert sum("-m venv --clear .venv-test" in line for line in lines) == 1  # .ci/run takes it from there
    assert sum("train.py sample" in line and "-m venv .venv " in line for line in lines) == 1


def test_readme_shows_what_the_check_of_the_sample_prints(tmp_path, monkeypatch, capsys):
    write_sample(tmp_path / "sample")
    monkeypatch.chdir(tmp_path)
    assert check_data.main(["sample"]) == 0
    assert capsys.readouterr().out in PAGES["README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors


# --- from recordings to features ---

RAVDESS = [f"ravdess_03-01-{emotion:02d}-01-01-01-{actor:02d}" for emotion in (3, 4) for actor in (1, 2)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder with a folder `features`."""
    (tmp_path / "features").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shapes_of_features(**options):
    result = check_data.scan(check_data.ScanOptions("features", **options))
    assert result.findings == []
    return {record.utterance.file: record.shape for record in result.records}


def read_wav(path, sr):
    """Stands for librosa.load, which resamples."""
    with wave.open(str(path)) as file:
        assert file.getframerate() == 3 * sr
        return np.frombuffer(file.readframes(file.getnframes()), np.int16)[::3] / np.float32(2**15), sr


@pytest.mark.parametrize(
    ("word", "options", "shape"),
    [("last_hidden_state", {}, (16,)), ("output_hidden_states", {"layers": True}, (3, 16))],
)
def test_the_documented_extraction_writes_features_that_can_be_used(place, monkeypatch, word, options, shape):
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    monkeypatch.setitem(sys.modules, "librosa", types.SimpleNamespace(load=read_wav))
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    size |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    Wav2Vec2Model(Wav2Vec2Config(**size)).save_pretrained("encoder")
    Wav2Vec2FeatureExtractor().save_pretrained("encoder")
    (place / "recordings" / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in RAVDESS:
        with wave.open(str(place / "recordings" / "deep" / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 48000, 0, "NONE", ""))
            file.writeframes(rng.integers(-9999, 9999, 48000, dtype=np.int16).tobytes())
    exec(documented_python(word).replace("microsoft/wavlm-large", "encoder"), {})
    assert shapes_of_features(**options) == {f"deep/{name}.npz": shape for name in RAVDESS}


def test_the_documented_conversions_write_features_that_can_be_used(place):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("pandas", reason="pandas is not installed")
    for name in RAVDESS[:2]:
        torch.save(torch.randn(5, 3, dtype=torch.bfloat16), place / "features" / f"{name}.pt")
    rows = [
        f"/audio/{name}.wav,0 days,0 days 00:00:03.1,{number}.5,2,-{number}" for number, name in enumerate(RAVDESS[2:])
    ]
    (place / "opensmile.csv").write_text("\n".join(["file,start,end,F0,loudness,jitter", *rows]))
    exec(documented_python("opensmile"), {})
    expected = {f"{name}.npz": (5, 3) for name in RAVDESS[:2]} | {f"{name}.npz": (3,) for name in RAVDESS[2:]}
    assert shapes_of_features() == expected

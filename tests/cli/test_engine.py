"""calibrate and evaluate in llama.cpp, asked for or where requant does not run the model, and without the package."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from commands import FIXTURES, assert_failed, names, run
from gguf_files import Tensor
from model.forward import families

import requant
from requant.container.imatrix import read_imatrix
from requant.errors import RequantWarning
from requant.model.forward import architecture
from requant.model.llama_cpp import ENGINE, VERSION
from requant.scoring.evaluate import read_evaluation

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = FIXTURES / "eval.txt"
SHORT = ("--text", TEXT, "--windows", "2", "--window", "64")


@pytest.fixture
def small(tmp_path):
    """A model that is run in no time."""
    return families.write("qwen3", tmp_path / "small.gguf")


@pytest.fixture
def unknown(monkeypatch):
    """The forward pass does not know qwen3, which llama.cpp runs."""
    monkeypatch.delitem(architecture.FAMILIES, "qwen3")


@pytest.fixture
def uninstalled(monkeypatch):
    """The package xllamacpp is not there."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "xllamacpp" else find(name, *a))


def read_json(ran):
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_the_extra_has_the_release_whose_layout_is_known():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["engine"] == [f"xllamacpp=={VERSION}"]


def test_evaluate_says_what_ran_the_models(capsys, tmp_path, small):
    out, kept = tmp_path / "out.gguf", tmp_path / "evaluation.json"
    assert run(capsys, "convert", small, out, "--type", "Q8_0").code == 0
    words = ("evaluate", out, "--base", small, *SHORT)
    ours, found = (read_json(run(capsys, *words, *more, "--json")) for more in ((), ("--engine",)))
    assert (ours["engine"], found["engine"]) == (None, ENGINE)
    assert found["ppl"] == pytest.approx(ours["ppl"], rel=0.01) and found["mean_kld"] > 0
    kept.write_text(json.dumps(found))
    assert read_evaluation(kept).engine == ENGINE
    text = run(capsys, *words, "--engine")
    assert f"run by {ENGINE}" in text.out and "KL divergence" in text.out and text.err == ""


def test_calibrate_writes_an_imatrix_that_says_how_it_was_measured(capsys, tmp_path, small):
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert run(capsys, "calibrate", small, *SHORT, "-o", ours, "--no-gradients").code == 0
    ran = run(capsys, "calibrate", small, *SHORT, "-o", theirs, "--engine")
    assert ran.code == 0 and f"run by {ENGINE}, without gradients; pass it with --imatrix" in ran.out, ran
    assert names(tmp_path) == ["ours.gguf", "small.gguf", "theirs.gguf"]
    found = [read_imatrix(path) for path in (ours, theirs)]
    for name, entry in found[0].entries.items():
        assert found[1].entries[name].importance == pytest.approx(entry.importance, rel=1e-3, abs=1e-6)
    assert b"requant.engine" in theirs.read_bytes() and ENGINE.encode() in theirs.read_bytes()
    assert read_json(run(capsys, "plan", small, "--bpw", "20", "--imatrix", theirs, "--json"))["method"] == "fisher"
    assert_failed(run(capsys, "score", small, "--statistics", theirs, "--json"), 3, "no gradients", "--imatrix")


@pytest.mark.usefixtures("unknown")
def test_what_requant_does_not_run_the_engine_does(capsys, tmp_path, small):
    out = tmp_path / "imatrix.gguf"
    for words in (["calibrate", small, *SHORT, "-o", out], ["evaluate", small, *SHORT]):
        ran = run(capsys, *words)
        assert ran.code == 0 and f"run by {ENGINE}" in ran.out, ran
        assert ran.err.count("\n") == 1 and f"does not know 'qwen3'; {ENGINE} ran it" in ran.err
    plain = run(capsys, "plan", small, "--bpw", "20", "--json")
    assert "without gradients" in plain.err and "better: `requant calibrate`, where" in plain.err
    weighed = run(capsys, "plan", small, "--bpw", "20", "--imatrix", out, "--json")
    assert read_json(weighed)["method"] == "cfix" and "without gradients" in weighed.err
    assert "calibrate" not in weighed.err
    refused = run(capsys, "calibrate", small, *SHORT, "-o", out, "--force", "--max-memory", "1GiB")
    assert_failed(refused, 2, "--max-memory does not limit llama.cpp")


@pytest.mark.usefixtures("unknown")
def test_a_text_is_read_by_the_tokenizer_of_the_engine_where_requant_has_none(capsys, monkeypatch, small):
    expected = read_json(run(capsys, "evaluate", small, *SHORT, "--json"))
    monkeypatch.setattr("requant.model.tokenizer.KINDS", {})
    assert read_json(run(capsys, "evaluate", small, *SHORT, "--json")) == expected


CANNOT = ["does not know 'exotic'"]
RUN_BY_US = "requant runs this model itself, without the engine"
NOT_INSTALLED = [*CANNOT, "llama.cpp is not installed; pip install 'requant[engine]'"]


@pytest.mark.parametrize(
    "case",
    [
        (["evaluate", "{other}", "--text", "{text}"], 3, NOT_INSTALLED),
        (["evaluate", "{small}", "--base", "{other}", "--text", "{text}"], 3, NOT_INSTALLED),
        (["calibrate", "{other}", "-o", "{none}"], 3, NOT_INSTALLED),
        (["evaluate", "{small}", "--text", "{text}", "--engine"], 2, [*NOT_INSTALLED[1:], RUN_BY_US]),
        (["calibrate", "{small}", "-o", "{none}", "--engine"], 2, [*NOT_INSTALLED[1:], RUN_BY_US]),
        (["convert", "{other}", "{none}", "--bpw", "20", "--measure", "2"], 3, [*CANNOT, "leave --measure out"]),
        (["score", "{other}", "--emit-imatrix", "{none}", "--json"], 3, [*CANNOT, "`requant calibrate`"]),
        (["plan", "{other}", "--vram", "1GiB", "--cache-type-k", "auto"], 2, [*CANNOT, "name the cache types"]),
        (["plan", "{other}", "--max-loss", "0.1"], 2, [*CANNOT, "in points", "--size"]),
    ],
)
@pytest.mark.usefixtures("uninstalled")
def test_without_the_engine_a_command_says_what_it_needs(capsys, tmp_path, small, case):
    words, code, said = case
    other = families.write("unknown", tmp_path / "other.gguf")
    paths = {"small": small, "other": other, "text": TEXT, "none": tmp_path / "none.gguf"}
    ran = run(capsys, *(word.format(**paths) for word in words))
    assert_failed(ran, code, *said)
    assert "--quick" not in ran.err and "scores without data" not in ran.err
    assert names(tmp_path) == ["other.gguf", "small.gguf"]


def test_an_odd_file_of_a_known_architecture_is_given_to_the_engine_on_request_only(capsys, tmp_path):
    path = families.write("qwen3", tmp_path / "model.gguf", more=(Tensor("blk.1.attn_sinks.weight", (4,)),))
    ran = run(capsys, "evaluate", path, *SHORT)
    assert_failed(ran, 3, "blk.1.attn_sinks.weight", "llama.cpp may run it: --engine")
    assert_failed(run(capsys, "evaluate", path, *SHORT, "--engine"), 3, "llama.cpp does not load it: ")


def test_a_model_that_neither_runs_is_one_line(capsys, tmp_path):
    other = families.write("unknown", tmp_path / "other.gguf")
    ran = run(capsys, "evaluate", other, *SHORT)
    assert_failed(ran, 3, "unknown model architecture: 'exotic'", "nor does requant run it: the forward pass")


def test_a_model_without_a_tokenizer_needs_ids(capsys, tmp_path):
    path = families.write("qwen3", tmp_path / "model.gguf", vocabulary=())
    assert_failed(run(capsys, "evaluate", path, *SHORT, "--engine"), 3, "has no tokenizer", "--tokens FILE")


def test_in_python(tmp_path, monkeypatch, small):
    with requant.open(small) as model:
        ours, found = (model.evaluate(text=TEXT, windows=2, window=64, engine=engine) for engine in (False, True))
        assert found.ppl == pytest.approx(ours.ppl, rel=1e-3) and found.engine == ENGINE
        monkeypatch.delitem(architecture.FAMILIES, "qwen3")
        steps = []
        with pytest.warns(RequantWarning, match="ran it"):
            statistics = model.calibrate(tmp_path / "s.gguf", text=TEXT, windows=2, window=64, progress=steps.append)
        assert statistics.engine == ENGINE and (steps[-1].done, steps[-1].unit) == (2, " windows")

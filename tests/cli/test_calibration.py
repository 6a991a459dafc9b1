"""calibrate and evaluate, and the commands that score, as somebody at a terminal uses them."""

import json

import pytest
from commands import FIXTURES, TINY, assert_failed, names, run
from gguf_files import STR, pair
from model.forward import families

from requant.scoring.evaluate import read_evaluation

TEXT = FIXTURES / "calibration.txt"


@pytest.fixture
def small(tmp_path):
    """A model that is run in no time."""
    return families.write("qwen3", tmp_path / "small.gguf")


def plan_of(ran):
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_plans_come_from_gradients_on_the_shipped_text(capsys):
    ran = run(capsys, "plan", TINY, "--size", "5MiB", "--json")
    plan = plan_of(ran)
    assert (plan["method"], ran.err) == ("fisher", "")
    assert "gradients over 8 windows of 512 tokens of requant's calibration.txt" in plan["notes"]
    assert "predicted KL" in run(capsys, "plan", TINY, "--size", "5MiB").out


def test_quick_and_unknown_architectures_score_without_gradients(capsys, tmp_path, small):
    quick = run(capsys, "plan", small, "--bpw", "20", "--quick", "--json")
    assert (plan_of(quick)["method"], quick.err) == ("dfix", "")
    other = families.write("unknown", tmp_path / "other.gguf")
    ran = run(capsys, "plan", other, "--bpw", "20", "--json")
    assert plan_of(ran)["method"] == "dfix"
    assert ran.err.count("\n") == 1 and "without gradients" in ran.err and "does not know 'exotic'" in ran.err


def test_a_vocabulary_that_is_not_known_means_random_ids_and_says_so(capsys, tmp_path):
    vocabulary = (*families.VOCABULARY, pair("tokenizer.ggml.pre", STR, "klingon"))
    vocabulary = tuple(p for p in vocabulary if p != pair("tokenizer.ggml.pre", STR, "gpt-2"))
    path = families.write("qwen3", tmp_path / "model.gguf", vocabulary=vocabulary)
    ran = run(capsys, "plan", path, "--bpw", "20", "--json")
    assert "random token ids" in ran.err and "'klingon'" in ran.err and "--tokens" in ran.err
    assert any("random token ids" in note for note in plan_of(ran)["notes"])
    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(str(i % 250) for i in range(8 * 512)))
    given = run(capsys, "plan", path, "--bpw", "20", "--json", "--tokens", ids)
    assert given.err == "" and any("ids.txt" in note for note in plan_of(given)["notes"])


def test_a_conversion_weighs_by_what_its_scoring_measured(capsys, tmp_path, small):
    out = tmp_path / "out.gguf"
    ran = run(capsys, "convert", small, out, "--bpw", "18", "--text", TEXT, "--json")
    made = plan_of(ran)
    assert made["imatrix"] == "calibration.txt" and made["plan"]["method"] == "fisher" and ran.err == ""
    assert run(capsys, "verify", out, "--source", small).code == 0
    again = tmp_path / "again.gguf"
    assert run(capsys, "convert", small, again, "--bpw", "18", "--text", TEXT, "--threads", "1").code == 0
    assert out.read_bytes() == again.read_bytes()


def test_of_several_plans_the_best_is_kept(capsys, tmp_path):
    out = tmp_path / "out.gguf"
    ran = run(
        capsys, "convert", TINY, out, "--size", "5MiB", "--text", TEXT, "--windows", "2", "--measure", "2", "--json"
    )
    plan = plan_of(ran)["plan"]
    assert 0.5 < plan["measured_kld"] / plan["predicted_loss"] < 2
    assert any(note.startswith("the best of 2 plans") for note in plan["notes"])
    refused = run(capsys, "convert", TINY, out, "--type", "Q4_K", "--measure", "2", "--force")
    assert_failed(refused, 2, "--measure chooses among plans")


def test_calibrate_writes_statistics_that_score_reads(capsys, tmp_path, small):
    out = tmp_path / "statistics.gguf"
    ran = run(capsys, "calibrate", small, "--text", TEXT, "--windows", "4", "-o", out)
    assert ran.code == 0 and "over 2048 tokens" in ran.out, ran
    assert names(tmp_path) == ["small.gguf", "statistics.gguf"]
    assert_failed(run(capsys, "calibrate", small, "--text", TEXT, "-o", out), 5, "already exists")
    assert_failed(run(capsys, "calibrate", small, "--text", TEXT, "-o", small, "--force"), 5)
    losses = plan_of(run(capsys, "score", small, "--statistics", out, "--json"))
    assert (losses["method"], losses["imatrix"]) == ("kfac", "statistics.gguf")
    weighed = plan_of(run(capsys, "score", small, "--imatrix", out, "--json"))
    assert (weighed["method"], weighed["imatrix"]) == ("fisher", "statistics.gguf")
    assert_failed(run(capsys, "score", TINY, "--statistics", out, "--json"), 3, "another model")
    assert_failed(run(capsys, "score", TINY, "--statistics", FIXTURES / "imatrix.gguf", "--json"), 3, "no gradients")


def test_experts_that_saw_little_are_counted(capsys, tmp_path):
    path = families.write("qwen3moe", tmp_path / "model.gguf")
    ran = run(capsys, "calibrate", path, "--text", TEXT, "--windows", "1", "--window", "16", "-o", tmp_path / "s.gguf")
    assert ran.code == 0 and "experts that saw under 64 tokens: 36 of 36" in ran.out, ran


def test_evaluate_prints_figures_and_json(capsys, small, tmp_path):
    out = tmp_path / "out.gguf"
    assert run(capsys, "convert", small, out, "--type", "Q4_0").code == 0
    words = ["evaluate", out, "--base", small, "--text", TEXT, "--windows", "2"]
    text = run(capsys, *words)
    assert text.code == 0 and "perplexity" in text.out and "KL divergence" in text.out and "same top token" in text.out
    found = plan_of(run(capsys, *words, "--json"))
    assert found["schema"] == "requant.evaluation/1" and found["n_scored"] == 510 and found["mean_kld"] > 0
    assert (found["model"], found["base"], found["text"]) == ("out.gguf", small.name, TEXT.name)
    kept = tmp_path / "evaluation.json"
    kept.write_text(json.dumps(found))
    assert json.loads(read_evaluation(kept).to_json()) == found
    alone = plan_of(run(capsys, "evaluate", out, "--text", TEXT, "--windows", "2", "--json"))
    assert alone["mean_kld"] is None and alone["ppl"] == found["ppl"]


@pytest.mark.parametrize(
    "case",
    [
        (["evaluate", "{small}"], 2, "--text FILE or --tokens FILE"),
        (["evaluate", "{small}", "--text", "{none}"], 3, "none: no such file"),
        (["evaluate", "{small}", "--text", "{empty}"], 3, "too short"),
        (["evaluate", "{small}", "--base", "{tiny}", "--text", "{text}"], 3, "another vocabulary"),
        (["calibrate", "{small}", "--text", "{text}"], 2, "-o STATS.gguf"),
        (["calibrate", "{small}", "--text", "{empty}", "-o", "{none}"], 3, "too short"),
        (["calibrate", "{small}", "--text", "{text}", "-o", "{none}", "--max-memory", "1MiB"], 2, "too little for one"),
        (["calibrate", "{other}", "--text", "{text}", "-o", "{none}"], 3, "does not know 'exotic'"),
        (["score", "{small}", "--json", "--quick", "--text", "{text}"], 2, "--quick scores without data"),
        (["score", "{small}", "--json", "--text", "{text}", "--tokens", "{text}"], 2, "cannot be given together"),
        (["score", "{small}", "--json", "--tokens", "{text}"], 3, "no list of token ids"),
        (["convert", "{other}", "{none}", "--bpw", "20", "--measure", "2"], 3, "does not know 'exotic'"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, small, case):
    words, code, said = case
    (tmp_path / "empty.txt").write_text("")
    paths = {
        "small": small,
        "tiny": TINY,
        "text": TEXT,
        "none": tmp_path / "none",
        "empty": tmp_path / "empty.txt",
        "other": families.write("unknown", tmp_path / "other.gguf"),
    }
    assert_failed(run(capsys, *(word.format(**paths) for word in words)), code, said)
    assert not (tmp_path / "none").exists()

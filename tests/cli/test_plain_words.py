"""What a command says of a slip: the file, the folder, the unit or the option that was not meant."""

import json
import os

import pytest
from commands import TINY, assert_failed, names, run
from conversions import half, single, small_model
from model.forward import families

from requant.api.session import open_session
from requant.common.units import format_size
from requant.container.source import open_source
from requant.planning.request import PlanRequest
from requant.scoring.layerwise import score
from requant.scoring.options import CalibrationOptions, ScoringOptions


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    path = tmp_path_factory.mktemp("losses") / "l.json"
    with open_source(TINY) as source:
        path.write_text(score(source, ScoringOptions()).to_json())
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A split output beside its record."""
    from requant.cli.main import main

    out = tmp_path_factory.mktemp("shards") / "out.gguf"
    words = ["convert", TINY, out, "--type", "Q4_0", "--max-shard-size", "2MiB"]
    main([str(word) for word in words], standalone_mode=False)
    return sorted(out.parent.glob("*.gguf"))


def test_a_number_without_a_unit_is_asked_about(capsys, losses):
    ran = run(capsys, "plan", TINY, "--losses", losses, "--vram", "12")
    assert_failed(ran, 4, "--vram 12 is in bytes; did you mean 12GiB?")


def test_an_explanation_is_read_by_machines_too(capsys, losses):
    asked = ("plan", TINY, "--losses", losses, "--size", "6MiB", "--explain", "output.weight", "--json")
    found = json.loads(run(capsys, *asked).out)
    assert found["schema"] == "requant.explanation/1" and found["choice"]["name"] == "output.weight"
    assert sum(a["chosen"] for a in found["alternatives"]) == 1 and found["limits"][0]["option"] == "--size"


def test_a_reserve_may_be_nothing(capsys, losses):
    asked = ("plan", TINY, "--losses", losses, "--vram", "11MiB", "--json")
    plan = json.loads(run(capsys, *asked, "--reserve", "0").out)
    assert "reserve" not in plan["memory"] and "reserve" in json.loads(run(capsys, *asked).out)["memory"]
    assert_failed(run(capsys, *asked, "--size", "0"), 2, "must be above 0")


def test_planning_offers_no_option_that_it_lacks(capsys):
    ran = run(capsys, "plan", TINY)
    assert_failed(ran, 2, "nothing decides the types")
    assert "--type T" not in ran.err and "--plan" not in ran.err
    assert "--type T" in run(capsys, "convert", TINY, "out.gguf").err


def test_a_folder_that_is_not_there_is_to_be_made(capsys, losses, tmp_path):
    nowhere = tmp_path / "nowhere"
    for words in (
        ("convert", TINY, nowhere / "o.gguf", "--type", "Q4_0"),
        ("plan", TINY, "--losses", losses, "--bpw", "5", "-o", nowhere / "p.json"),
    ):
        assert_failed(run(capsys, *words), 6, f"{nowhere}: there is no such folder", "mkdir -p")


def test_a_model_does_not_go_to_stdout(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert_failed(run(capsys, "convert", TINY, "-", "--type", "Q4_0"), 2, "not written to stdout")
    assert not list(tmp_path.iterdir())


def test_a_model_given_for_losses_is_called_one(capsys):
    assert_failed(run(capsys, "plan", TINY, "--losses", TINY, "--bpw", "5"), 3, "is a GGUF file, not a text")


def test_any_shard_finds_the_record_of_its_output(capsys, shards):
    assert len(shards) > 1
    for shard in shards:
        assert "the same bytes as were written\n  record: " in run(capsys, "verify", shard).out


def test_another_source_is_named_beside_the_one_it_was(capsys, shards):
    ran = run(capsys, "verify", shards[0], "--source", shards[0])
    assert ran.code == 3 and f"it was made from {TINY.name} (" in ran.out and f"not from {shards[0].name} (" in ran.out


def test_an_evaluation_says_where_the_window_is_beyond_the_model(capsys, tmp_path):
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(" ".join(str(n % 4000) for n in range(700)))
    asked = ("evaluate", TINY, "--tokens", tokens, "--window")
    assert "640 tokens is above the 512" in run(capsys, *asked, "640").err
    ran = run(capsys, *asked, "256", "--windows", "1")
    assert "above" not in ran.err and "(one standard error)" in ran.out
    assert_failed(run(capsys, *asked, "256", "--text", tokens), 2, "--text and --tokens cannot be given together")


def test_an_inspection_says_where_the_context_is_beyond_the_model(capsys):
    assert "a context of at most 512 tokens" in run(capsys, "inspect", TINY, "--ctx", "513").out
    assert "at most" not in run(capsys, "inspect", TINY, "--ctx", "512").out


def test_what_fits_as_it_is_is_copied_without_scoring(capsys, monkeypatch, losses):
    monkeypatch.setattr("requant.api.session.score", None)
    ran = run(capsys, "convert", TINY, "out.gguf", "--vram", "1GiB", "--dry-run", "--json")
    assert all(c["type"] == c["source_type"] for c in json.loads(ran.out)["choices"])
    several = json.loads(run(capsys, "plan", TINY, "--vram", "1GiB,2GiB", "--json").out)
    assert all("nothing was scored" in plan["notes"][0] for plan in several["plans"])


def test_a_disk_too_small_for_any_plan_is_told_before_scoring(capsys, monkeypatch, tmp_path):
    real = os.statvfs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("requant.api.session.score", None)
        patch.setattr(os, "statvfs", lambda path: os.statvfs_result([*real(path)[:3], 1, 1, *real(path)[5:]]))
        ran = run(capsys, "convert", TINY, tmp_path / "out.gguf", "--size", "4MiB")
    assert_failed(ran, 6, "MiB free but has 4.00 KiB; free some space on /")
    assert names(tmp_path) == []
    with open_source(TINY) as source:
        least = open_session(source, PlanRequest(size=2**22), CalibrationOptions()).least_bytes()
    assert 2**21 < least < 2**22


def test_a_folder_given_for_a_model_says_what_is_in_it(capsys, tmp_path):
    (tmp_path / "model-00001.safetensors").touch()
    assert_failed(run(capsys, "inspect", tmp_path), 3, "is a directory", "convert_hf_to_gguf.py")
    (tmp_path / "a.gguf").touch()
    assert_failed(run(capsys, "inspect", tmp_path), 3, "give a file in it, such as a.gguf")


def test_a_difference_says_first_that_the_two_are_other_models(capsys, tmp_path):
    q, norm = "blk.0.attn_q.weight", "blk.0.attn_norm.weight"
    a = small_model(half(q, (256, 12))).write(tmp_path / "a.gguf")
    b = small_model(half(q, (256, 24)), single(norm, (256,))).write(tmp_path / "b.gguf")
    lines = run(capsys, "diff", a, b).out.splitlines()
    assert lines[0] == "1 of 3 tensors are only in one of the two, 1 have other shapes"
    assert [line.split()[0] for line in lines[3:5]] == [q, norm]
    out = run(capsys, "diff", a, TINY).out
    assert "only in one of the two, 1 have other shapes; they are not listed" in out and len(out.splitlines()) < 10
    found = json.loads(run(capsys, "diff", a, TINY, "--json").out)
    assert found["n_one_sided"] + found["n_reshaped"] == sum(
        c["reshaped"] or None in (c["type_a"], c["type_b"]) for c in found["changes"]
    )
    assert "only in one" not in run(capsys, "diff", a, a).out


def test_a_context_is_given_in_thousands_or_as_the_models_own(capsys, losses):
    def context(*words):
        asked = ("plan", TINY, "--losses", losses, "--vram", "64MiB", *words)
        return json.loads(run(capsys, *asked, "--json").out)["budget"]["ctx"]

    assert (context("--ctx", "1k"), context("--ctx", "2K"), context("--ctx", "0")) == (1024, 2048, 512)
    assert json.loads(run(capsys, "inspect", TINY, "--ctx", "1k", "--json").out)["needs"]["n_ctx"] == 1024
    assert json.loads(run(capsys, "inspect", TINY, "--ctx", "0", "--json").out)["needs"]["n_ctx"] == 512
    assert_failed(run(capsys, "inspect", TINY, "--ctx", "max"), 2, "--ctx: 'max' is no number of tokens")
    assert_failed(run(capsys, "plan", TINY, "--ctx", "0", "--size", "9MiB"), 2, "give --vram SIZE")


def test_an_inspection_counts_as_a_plan_does(capsys, losses):
    how = ("--ctx", "1k", "--cache-type-k", "q8_0", "--cache-type-v", "q4_0", "--parallel", "2", "--ubatch", "128")
    how = (*how, "--reserve", "3MiB")
    asked = ("plan", TINY, "--losses", losses, "--vram", "40MiB", *how, "--tensor-type", ".=F16", "--json")
    plan = json.loads(run(capsys, *asked).out)
    needs = json.loads(run(capsys, "inspect", TINY, *how, "--json").out)["needs"]
    assert {k: needs[k] for k in ("weights", "kv_cache", "compute", "reserve")} == {
        "weights": sum(c["n_bytes"] for c in plan["choices"] if c["device"] == "gpu"),
        **{k: plan["memory"][k] for k in ("kv_cache", "compute", "reserve")},
    }
    out = run(capsys, "inspect", TINY, *how).out
    assert "1024 tokens over 2 sequences in q8_0/q4_0, batches of 128 tokens" in out
    assert "KV cache" in out and "compute buffer" in out and "reserve          3.00 MiB" in out
    assert_failed(run(capsys, "inspect", TINY, "--cache-type-k", "auto"), 2, "--cache-type-k: a plan chooses")


@pytest.mark.parametrize("words", [("score", TINY), ("plan", TINY, "--bpw", "4.5")])
def test_a_result_is_not_written_under_a_models_name(capsys, tmp_path, words):
    ran = run(capsys, *words, "-o", tmp_path / "x.GGUF")
    assert_failed(ran, 2, "-o: 'x.GGUF' is the name of a model, and the result is none; name it .json")
    assert names(tmp_path) == []


def test_types_are_not_taken_from_another_model(capsys, tmp_path):
    other = families.write("qwen3", tmp_path / "other.gguf")
    ran = run(capsys, "plan", TINY, "--like", other)
    assert_failed(ran, 3, "is of another architecture (got qwen3, expected llama)", "--like takes")
    few = small_model(*(half(f"blk.{i}.attn_q.weight", (256, 256)) for i in range(9))).write(tmp_path / "few.gguf")
    assert_failed(run(capsys, "plan", TINY, "--like", few), 3, "is another model (got 10 of 93 tensors in both)")
    assert_failed(run(capsys, "plan", few, "--like", TINY), 3, "is another model (got 10 of 93 tensors in both)")


def test_a_dry_run_says_how_many_files_there_would_be(capsys, tmp_path):
    out, how = tmp_path / "out.gguf", ("--type", "Q5_K", "--max-shard-size", "2MiB")
    said = run(capsys, "convert", TINY, out, *how, "--dry-run").out.splitlines()[-1]
    assert names(tmp_path) == [] and run(capsys, "convert", TINY, out, *how).code == 0
    shards = sorted(tmp_path.glob("*.gguf"))
    total = format_size(sum(path.stat().st_size for path in shards))
    assert len(shards) > 1 and said == f"{len(shards)} files, {total} in all: {shards[0]} to {shards[-1]}"
    whole = run(capsys, "convert", TINY, out, *how[:2], "--dry-run").out
    assert " in all: " not in whole

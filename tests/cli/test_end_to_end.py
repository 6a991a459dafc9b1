import json
import os
import re
import shlex

import ggml
import pytest
from commands import IMATRIX, TINY, assert_failed, names, run, spawn
from conversions import single, small_model

from requant.common.units import parse_size
from requant.container.output import Output
from requant.container.source import open_source
from requant.conversion.record import read_conversion
from requant.formats import by_name
from requant.model.hyperparameters import read_hyperparameters
from requant.model.memory import device_bytes, on_device


def convert(capsys, out, losses, *words):
    """(the result, its record, what ggml sees in it); the output has been verified."""
    ran = run(capsys, "convert", TINY, out, "--imatrix", IMATRIX, *(["--losses", losses] if losses else []), *words)
    assert ran.code == 0, ran.err
    assert names(out.parent) == sorted([out.name, f"{out.name}.requant.json"])
    return ran, read_conversion(out.with_name(f"{out.name}.requant.json")), ggml.file_tensors(out)


def test_a_budget_in_vram_is_kept_with_all_that_is_no_weight(capsys, tmp_path):
    ran, made, seen = convert(capsys, tmp_path / "out.gguf", None, "--vram", "12MiB", "--ctx", "512")
    plan = made.plan
    assert plan.budget["vram"] == 12 * 2**20 and plan.budget["ctx"] == 512
    assert all(plan.memory[part] > 0 for part in ("kv_cache", "compute", "reserve"))
    with open_source(tmp_path / "out.gguf") as source:
        hp = read_hyperparameters(source.metadata, source.tensors)
        held = [t for t in source.tensors if on_device(hp, t.name, tied=False)]
        weights = sum(device_bytes(t.format, t.shape) for t in held)
    beside = sum(plan.memory[part] for part in ("kv_cache", "compute", "reserve"))
    assert 0.99 * 12 * 2**20 < weights + beside <= 12 * 2**20
    assert {name: type_id for name, (type_id, *_) in seen.items()} == {
        name: by_name(type_name).type_id for name, type_name in plan.types().items()
    }
    command = shlex.split(ran.out.splitlines()[-1])
    assert command[:3] == ["llama-server", "-m", str(tmp_path / "out.gguf")]
    assert command[command.index("-c") + 1] == "512" and command[command.index("-ngl") + 1] == "99"
    assert command[command.index("-ub") + 1] == str(plan.budget["ubatch"]) and "-np" in command
    assert any("-ub" in note or "batches of" in note for note in plan.notes)
    assert "verified" in ran.out and "KV cache" in ran.out


def test_cache_types_reach_the_engine(capsys, tmp_path, losses):
    out = tmp_path / "it's out.gguf"
    budget = ("--vram", "14MiB", "--ctx", "1024", "--cache-type-k", "q8_0", "--parallel", "2", "--reserve", "1MiB")
    ran, made, _ = convert(capsys, out, losses, *budget)
    command = shlex.split(ran.out.splitlines()[-1])
    assert command[2] == str(out) and command[command.index("-ctk") + 1] == "q8_0" and "-ctv" not in command
    assert command[command.index("-np") + 1] == "2" and made.plan.memory["reserve"] == 2**20


@pytest.mark.parametrize("size", ["5MiB", "3600KiB", "8MB"])
def test_the_file_is_never_larger_than_its_size(capsys, tmp_path, losses, size):
    out = tmp_path / "out.gguf"
    ran, made, seen = convert(capsys, out, losses, "--size", size, "--json")
    found = json.loads(ran.out)
    assert found["schema"] == "requant.output/1" and found["size"] == made.size == out.stat().st_size
    assert 0.98 * parse_size(size) < out.stat().st_size <= parse_size(size)
    assert len(seen) == len(found["tensors"])


def test_the_smallest_size_named_is_exactly_enough(capsys, tmp_path, losses):
    ran = run(capsys, "plan", TINY, "--losses", losses, "--size", "1MiB")
    assert_failed(ran, 4)
    enough = ran.err.split("raise it to ")[1].split(",")[0]
    convert(capsys, tmp_path / "out.gguf", losses, "--size", enough)
    assert (tmp_path / "out.gguf").stat().st_size <= parse_size(enough)


def test_bits_per_weight_are_a_ceiling(capsys, tmp_path, losses):
    _, made, _ = convert(capsys, tmp_path / "out.gguf", losses, "--bpw", "4.5")
    assert 4.45 < made.plan.bpw <= 4.5


def test_several_budgets_hold_at_once(capsys, losses):
    ran = run(capsys, "plan", TINY, "--losses", losses, "--bpw", "4.5", "--size", "5MiB", "--vram", "16MiB", "--json")
    found = json.loads(ran.out)
    assert {limit["option"] for limit in found["limits"]} == {"--bpw", "--size", "--vram"}


def test_one_type_for_all(capsys, tmp_path):
    _, made, seen = convert(capsys, tmp_path / "out.gguf", None, "--type", "q4_k", "--tensor-type", "attn_v=Q6_K")
    types = {name: type_id for name, (type_id, *_) in seen.items()}
    assert (
        types["blk.0.attn_v.weight"] == 14 and types["blk.0.ffn_up.weight"] == 12 and made.plan.predicted_loss is None
    )


def test_stages_by_hand_make_the_same_file_as_convert(capsys, tmp_path, losses):
    (tmp_path / "once").mkdir()
    (tmp_path / "stages").mkdir()
    convert(capsys, tmp_path / "once" / "a.gguf", losses, "--bpw", "4")
    plan = tmp_path / "plan.json"
    assert run(capsys, "plan", TINY, "--losses", losses, "--bpw", "4", "-o", plan, "--imatrix", IMATRIX).code == 0
    convert(capsys, tmp_path / "stages" / "a.gguf", None, "--plan", plan)
    assert (tmp_path / "once" / "a.gguf").read_bytes() == (tmp_path / "stages" / "a.gguf").read_bytes()
    assert run(capsys, "verify", tmp_path / "once" / "a.gguf", "--plan", plan, "--source", TINY).code == 0


def test_score_writes_what_plan_reads(capsys, tmp_path):
    out, how = tmp_path / "losses.json", ("--windows", 1, "--window", 64)
    ran = run(capsys, "score", TINY, "-o", out, "--types", "Q4_K,q6_k", "--threads", 1, *how)
    assert ran.code == 0 and "Q6_K" in ran.out and ran.err == ""
    # what is measured depends on whether a file keeps the importance, not on where the losses go
    kept = ("--emit-imatrix", tmp_path / "kept.gguf")
    printed = json.loads(run(capsys, "score", TINY, "--types", "Q4_K,Q6_K", "--json", *kept, *how).out)
    written = json.loads(out.read_text())
    assert (tmp_path / "kept.gguf").read_bytes() == (tmp_path / written["imatrix_file"]).read_bytes()
    assert printed | {"imatrix_file": written["imatrix_file"]} == written
    ran = run(capsys, "plan", TINY, "--losses", out, "--bpw", "5", "--json")
    assert {c["type"] for c in json.loads(ran.out)["choices"]} <= {"Q4_K", "Q6_K", "F16", "F32"}
    assert ran.err == ""


def test_effort_reaches_encoders_plan_and_metadata(capsys, tmp_path):
    sums, errors = set(), []
    for effort in ("fast", "default", "best"):
        out = tmp_path / f"{effort}.gguf"
        ran = run(capsys, "convert", TINY, out, "--type", "Q4_K", "--effort", effort)
        assert ran.code == 0, ran.err
        made = read_conversion(tmp_path / f"{effort}.gguf.requant.json")
        assert made.plan.effort.name.lower() == effort and (f"effort      {effort}" in ran.out) == (effort != "default")
        with open_source(out) as source:
            assert source.metadata.get_str("requant.effort") == effort
        sums.add(made.tensors[0].sha256)
        errors.append(sum(t.rmse_unweighted for t in made.tensors))
    assert len(sums) == 3
    assert errors == sorted(errors, reverse=True)


def test_an_effort_given_later_replaces_that_of_the_plan(capsys, tmp_path, losses):
    plan = tmp_path / "plan.json"
    asked = ("--losses", losses, "--imatrix", IMATRIX, "--size", "5MiB")
    assert run(capsys, "plan", TINY, *asked, "--effort", "fast", "-o", plan).code == 0
    assert json.loads(plan.read_text())["effort"] == "fast"
    out = tmp_path / "out.gguf"
    ran = run(capsys, "convert", TINY, out, "--plan", plan, "--imatrix", IMATRIX, "--effort", "best")
    assert ran.code == 0, ran.err
    assert read_conversion(tmp_path / "out.gguf.requant.json").plan.effort.name == "BEST"


def test_a_dry_run_writes_nothing(capsys, tmp_path, losses):
    words = ["convert", TINY, tmp_path / "out.gguf", "--losses", losses, "--bpw", "4.5", "--dry-run"]
    assert "ffn_down" in run(capsys, *words).out
    assert json.loads(run(capsys, *words, "--json").out)["schema"] == "requant.plan/2"
    assert names(tmp_path) == []


def test_verify_finds_a_flipped_bit_and_another_plan(capsys, tmp_path, losses):
    out = tmp_path / "out.gguf"
    assert run(capsys, "convert", TINY, out, "--type", "Q5_K", "--no-verify").code == 0
    ran = run(capsys, "verify", out, "--json")
    assert ran.code == 0 and json.loads(ran.out) | {"ok": True, "findings": []} == json.loads(ran.out)
    plan = tmp_path / "plan.json"
    assert run(capsys, "plan", TINY, "--losses", losses, "--bpw", "4.5", "-o", plan).code == 0
    ran = run(capsys, "verify", out, "--plan", plan)
    assert ran.code == 3 and "the plan says" in ran.out and len(ran.err.splitlines()) == 1
    data = bytearray(out.read_bytes())
    data[-1000] ^= 1
    out.write_bytes(data)
    ran = run(capsys, "verify", out, "--json")
    found = json.loads(ran.out)
    assert ran.code == 3 and not found["ok"] and found["schema"] == "requant.verify/1"
    assert len(ran.err.splitlines()) == 1 and "fails the verification: 1 finding; do not use it" in ran.err
    assert len(found["findings"]) == 1 and not re.search("[0-9a-f]{13}", found["findings"][0])


def test_verify_says_which_of_its_verdicts_it_reached(capsys, tmp_path):
    out, record = tmp_path / "out.gguf", tmp_path / "out.gguf.requant.json"
    assert run(capsys, "convert", TINY, out, "--type", "Q5_K").code == 0
    for words, said in (
        ([out], "the same bytes as were written\n  record: header and every byte of every tensor"),
        ([out, "--source", TINY], "record and source: every byte that 93 tensors were made from, by SHA-256"),
        ([out, "--source", TINY, "--full"], "encoded again: every byte of 72 encoded tensors"),
        ([TINY, "--source", TINY], "plausible against the source\n  source: 93 copied tensors byte for byte"),
        ([TINY], "read: readable; compared with nothing\n"),
    ):
        ran = run(capsys, "verify", *words)
        assert ran.code == 0 and said in ran.out and "sound" not in ran.out
    record.unlink()
    ran = run(capsys, "verify", out)
    assert (
        ran.code == 0 and "the same bytes as were written\n  digests in its metadata: header and every byte" in ran.out
    )
    assert json.loads(run(capsys, "verify", out, "--json").out)["verdict"] == "same"
    data = out.read_bytes()
    out.write_bytes(data[:-100_000] + bytes(2**16) + data[-100_000 + 2**16 :])
    ran = run(capsys, "verify", out)
    assert ran.code == 3 and "not as it was written, by its digest in the metadata" in ran.out


def test_importance_that_a_conversion_measured_is_made_again_for_verify(capsys, tmp_path):
    out, imatrix, asked = (
        tmp_path / "out.gguf",
        tmp_path / "i.gguf",
        ["--windows", "1", "--window", "16", "--types", "Q4_0,Q8_0"],
    )
    assert run(capsys, "convert", TINY, out, "--bpw", "5", *asked).code == 0
    assert run(capsys, "score", TINY, *asked, "--emit-imatrix", imatrix, "-o", tmp_path / "losses.json").code == 0
    ran = run(capsys, "verify", out, "--source", TINY, "--full", "--imatrix", imatrix)
    assert ran.code == 0 and "every byte of 72 encoded tensors" in ran.out and "not encoded again" not in ran.out


def test_verify_blames_the_source_that_is_another_and_not_the_file(capsys, tmp_path):
    out = tmp_path / "out.gguf"
    assert run(capsys, "convert", TINY, out, "--type", "Q5_K", "--no-verify").code == 0
    ran = run(capsys, "verify", out, "--source", out)
    assert ran.code == 3 and f"{out}: is not the source of {out}; give --source the model" in ran.err
    assert "do not use it" not in ran.err and "read: the same bytes as were written\n" in ran.out
    assert "source: " not in ran.out
    data = bytearray(out.read_bytes())
    data[-1000] ^= 1
    out.write_bytes(data)
    ran = run(capsys, "verify", out, "--source", out)
    assert ran.code == 3 and "2 findings; do not use it" in ran.err and ": verification failed" in ran.out


def test_an_output_that_does_not_verify_is_an_error(capsys, tmp_path, monkeypatch):
    seal = Output.seal

    def damaging(self, layouts):
        seal(self, layouts)
        self.write_at(0, self.layouts[0].size - 1000, b"damaged")

    monkeypatch.setattr(Output, "seal", damaging)
    out = tmp_path / "out.gguf"
    ran = run(capsys, "convert", TINY, out, "--type", "Q5_K", "--json")
    assert_failed(ran, 6, "out.gguf.part: does not read back as it was written", "run it again")
    assert not out.exists()
    monkeypatch.setattr(Output, "seal", seal)
    again = run(capsys, "convert", TINY, out, "--type", "Q5_K", "--json")
    assert again.code == 0 and "requant: resuming 92/93 tensors" in again.err
    assert run(capsys, "verify", out, "--source", TINY).code == 0


def test_a_plan_edited_by_hand_is_carried_out(capsys, tmp_path, losses):
    plan = tmp_path / "plan.json"
    assert run(capsys, "plan", TINY, "--losses", losses, "--bpw", "4.5", "-o", plan).code == 0
    edited = json.loads(plan.read_text())
    next(c for c in edited["choices"] if c["name"] == "blk.4.attn_v.weight")["type"] = "Q2_K"
    plan.write_text(json.dumps(edited))
    assert run(capsys, "convert", TINY, tmp_path / "out.gguf", "--plan", plan).code == 0
    assert ggml.file_tensors(tmp_path / "out.gguf")["blk.4.attn_v.weight"][0] == 10


def test_compiling_is_announced_once_and_what_is_cached_is_not(tmp_path):
    path = small_model(single("blk.0.attn_q.weight", (256, 8))).write(tmp_path / "model.gguf")
    cache = os.environ | {"REQUANT_CACHE_DIR": str(tmp_path / "kernels")}
    first, second = (spawn("verify", path, env=cache) for _ in range(2))
    assert (first.code, second.code) == (0, 0) and first.out == second.out
    assert first.err == "requant: compiling the block kernels, once; this takes up to half a minute\n"
    assert second.err == ""

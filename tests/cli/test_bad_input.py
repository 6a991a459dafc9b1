import json
import os
import re
import resource
import shlex
from pathlib import Path

import ggml
import numpy as np
import pytest
from commands import IMATRIX, TINY, assert_failed, names, run, spawn
from conversions import half, normal, single, small_model
from gguf_files import STR, File, Tensor, pair

from requant.common.units import parse_size
from requant.formats import by_name

NAN = np.full((4, 256), np.nan, np.float32)


def broken_files(folder):
    """Name -> (a file that is no model, what is said of it)."""
    whole = TINY.read_bytes()
    (folder / "empty").write_bytes(b"")
    (folder / "cut").write_bytes(whole[: len(whole) // 2])
    (folder / "text").write_text("not a model, whatever its name says\n")
    adapter = (pair("general.architecture", STR, "llama"), pair("general.type", STR, "adapter"))
    File(adapter, (single("blk.0.attn_q.weight.lora_a", (256, 4)),)).write(folder / "adapter")
    File(tensors=(Tensor("blk.0.attn_q.weight", (256, 4), 99),)).write(folder / "unknown")
    (folder / "imatrix").write_bytes(IMATRIX.read_bytes())
    (folder / "folder").mkdir()
    return {
        "missing": "no such file",
        "folder": "is a directory",
        "empty": "GGUF",
        "cut": "bytes of tensor data are missing",
        "text": "GGUF",
        "adapter": "is not a model",
        "imatrix": "--imatrix",
        "unknown": "99",
    }


@pytest.mark.parametrize("name", ["missing", "folder", "empty", "cut", "text", "adapter", "imatrix", "unknown"])
@pytest.mark.parametrize("words", [["inspect"], ["score"], ["plan", "--bpw", "4"], ["convert", "--type", "Q4_K"]])
def test_what_is_no_model_is_bad_input_to_every_command(capsys, tmp_path, name, words):
    said = broken_files(tmp_path)[name]
    before = names(tmp_path)
    given = [tmp_path / name, *{"score": ["-o", tmp_path / "l"], "convert": [tmp_path / "out"]}.get(words[0], [])]
    assert_failed(run(capsys, words[0], *given, *words[1:]), 3, said, str(tmp_path / name))
    assert names(tmp_path) == before


def test_the_process_ends_with_the_code_of_the_failure(tmp_path):
    assert_failed(spawn("inspect", tmp_path / "nowhere.gguf"), 3, "no such file")
    assert_failed(spawn("convert", TINY, tmp_path / "o", "--size", "12G"), 2, "--size: '12G' is not a size")


@pytest.mark.parametrize(
    ("decides", "left"),
    [(["--type", "Q4_K"], ["out.gguf.part", "out.gguf.part.journal"]), (["--bpw", "8", "--quick"], [])],
)
def test_a_weight_that_is_not_a_number_stops_the_conversion(capsys, tmp_path, decides, left):
    model = small_model(half("blk.0.attn_q.weight", (256, 8)), single("blk.1.ffn_up.weight", (256, 4), NAN))
    path = model.write(tmp_path / "model.gguf")
    ran = run(capsys, "convert", path, tmp_path / "out.gguf", *decides)
    assert ran.code == 8 and "blk.1.ffn_up.weight" in ran.err and len(ran.err.splitlines()) == 1
    assert names(tmp_path) == ["model.gguf", *left]


def spoilt_model(folder):
    values = normal((256, 4))
    values[1, 7] = np.nan
    tensors = half("blk.0.attn_q.weight", (256, 8)), single("blk.1.ffn_up.weight", (256, 4), values)
    return small_model(*tensors).write(folder / "model.gguf")


@pytest.mark.parametrize(
    "decides", [["--type", "Q4_K"], ["--bpw", "20", "--quick"], ["--bpw", "20"], ["--type", "Q4_K", "--dry-run"]]
)
def test_tensors_with_weights_that_are_no_numbers_are_copied_if_asked(capsys, tmp_path, decides):
    path, out = spoilt_model(tmp_path), tmp_path / "out.gguf"
    ran = run(capsys, "convert", path, out, *decides, "--nonfinite", "keep-type", "--json")
    assert ran.code == 0
    assert "'blk.1.ffn_up.weight' stays as it is: 1 weights are not finite, the first at weight 263" in ran.err
    made = json.loads(ran.out)
    plan = made if "--dry-run" in decides else made["plan"]
    assert {c["name"]: c["type"] for c in plan["choices"]}["blk.1.ffn_up.weight"] == "F32"
    if "--dry-run" not in decides:
        assert run(capsys, "verify", out, "--source", path).code == 0
        assert run(capsys, "verify", out).code == 0


def test_a_plan_that_encodes_what_is_no_number_is_refused_even_then(capsys, tmp_path):
    path, plan = spoilt_model(tmp_path), tmp_path / "plan.json"
    plan.write_text(run(capsys, "convert", path, tmp_path / "out.gguf", "--type", "Q4_K", "--dry-run", "--json").out)
    words = ["convert", path, tmp_path / "out.gguf", "--plan", plan, "--nonfinite", "keep-type"]
    ran = run(capsys, *words)
    assert ran.code == 8 and "1 of 1024 weights, the first at weight 263 (got nan)" in ran.err
    assert not (tmp_path / "out.gguf").exists()
    assert "the plan gives it another type, which cannot hold that; set it to F32 there" in ran.err
    set_type(plan, "blk.1.ffn_up.weight", "F32", 4096)
    assert run(capsys, *words).code == 0


def set_type(plan, name, type_name, n_bytes):
    """Edit the type of a tensor in the file of a plan."""
    raw = json.loads(plan.read_text())
    (choice,) = (c for c in raw["choices"] if c["name"] == name)
    choice["type"], choice["n_bytes"] = type_name, n_bytes
    plan.write_text(json.dumps(raw))


@pytest.mark.parametrize("decides", [["--type", "Q4_K"], ["--bpw", "20", "--quick"]])
def test_copying_weights_that_are_no_numbers_works_as_the_error_says(capsys, tmp_path, decides):
    words = ["convert", spoilt_model(tmp_path), tmp_path / "out.gguf", *decides]
    ran = run(capsys, *words)
    assert ran.code == 8 and "or copy such tensors: convert --nonfinite keep-type" in ran.err
    assert run(capsys, *words, "--nonfinite", "keep-type").code == 0
    assert names(tmp_path) == ["model.gguf", "out.gguf", "out.gguf.requant.json"]


@pytest.mark.parametrize("way", ["option", "plan"])
def test_a_type_that_cannot_represent_the_weights_is_replaced_as_the_error_says(capsys, tmp_path, way):
    name = "blk.1.ffn_up+.weight"  # with a character that means something in a regular expression
    tensors = half("blk.0.attn_q.weight", (256, 8)), single(name, (256, 4), 1e-7 * normal((256, 4)))
    path, plan = small_model(*tensors).write(tmp_path / "model.gguf"), tmp_path / "plan.json"
    words = ["convert", path, tmp_path / "out.gguf", "--type", "Q4_0"]
    if way == "plan":
        plan.write_text(run(capsys, *words, "--dry-run", "--json").out)
        words = [*words[:3], "--plan", plan]
    ran = run(capsys, *words)
    assert ran.code == 8 and "in a --plan set its type to F32" in ran.err
    if way == "plan":
        set_type(plan, name, "F32", 4096)
        assert run(capsys, *words).code == 0
    else:
        option = ran.err[ran.err.index("--tensor-type ") : ran.err.index(" keeps it")]
        assert run(capsys, *words, *shlex.split(option)).code == 0


@pytest.mark.parametrize(
    ("decides", "code", "said"),
    [
        (["--type", "Q4_0"], 8, "'blk.1.ffn_up.weight' as Q4_0, row 0 is lost"),
        (["--bpw", "20", "--quick"], 0, "it cannot represent the weights: row 0 is lost"),
        (["--bpw", "30", "--quick", "--tensor-type", "ffn_up=Q4_0"], 2, "Q4_0"),
    ],
    ids=["uniform", "scored", "pinned"],
)
def test_a_type_that_cannot_represent_the_weights_is_refused_or_not_chosen(capsys, tmp_path, decides, code, said):
    tensors = half("blk.0.attn_q.weight", (256, 8)), single("blk.1.ffn_up.weight", (256, 4), 1e-7 * normal((256, 4)))
    path = small_model(*tensors).write(tmp_path / "model.gguf")
    ran = run(capsys, "convert", path, tmp_path / "out.gguf", *decides, "--json")
    assert ran.code == code and said in (ran.out if code == 0 else ran.err), ran


def imatrix_file(path, entries):
    parts = [
        (single(f"{n}.in_sum2", (256, 1), np.ones(256)), single(f"{n}.counts", (1, 1), np.ones(1))) for n in entries
    ]
    return File((pair("general.type", STR, "imatrix"),), tuple(t for both in parts for t in both)).write(path)


@pytest.mark.parametrize("entries", [["other.weight"], ["blk.0.ffn_down.weight"]], ids=["names", "sizes"])
def test_an_imatrix_of_another_model_is_refused(capsys, tmp_path, entries):
    imatrix = imatrix_file(tmp_path / "imatrix.gguf", entries)
    ran = run(capsys, "convert", TINY, tmp_path / "out.gguf", "--type", "Q4_K", "--imatrix", imatrix)
    assert_failed(ran, 3, "it was made for another model", str(imatrix))
    assert names(tmp_path) == ["imatrix.gguf"]


def test_losses_and_plans_of_another_model_are_refused(capsys, tmp_path, losses):
    other = small_model().write(tmp_path / "other.gguf")
    assert_failed(run(capsys, "plan", other, "--losses", losses, "--bpw", "8"), 3, "losses are of another model")
    plan = tmp_path / "plan.json"
    assert run(capsys, "plan", TINY, "--losses", losses, "--bpw", "4.5", "-o", plan).code == 0
    ran = run(capsys, "convert", other, tmp_path / "out.gguf", "--plan", plan)
    assert ran.code == 3 and "made for another file" in ran.err
    assert names(tmp_path) == ["other.gguf", "plan.json"]


@pytest.mark.parametrize("out", ["{file}/out", "/proc/requant/out", "/nowhere/at/all/out"])
def test_an_output_that_cannot_be_written_is_noticed_before_the_work(capsys, tmp_path, out):
    file = tmp_path / "file"
    file.write_text("precious")
    for words in (
        ["convert", TINY, out.format(file=file), "--bpw", "4.5"],
        ["score", TINY, "-o", out.format(file=file)],
    ):
        assert_failed(run(capsys, *words), 6)
    assert file.read_text() == "precious" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("command", ["convert", "score"])
def test_a_device_is_no_output(capsys, command):
    words = (
        ["convert", TINY, "/dev/full", "--bpw", "4.5"] if command == "convert" else ["score", TINY, "-o", "/dev/full"]
    )
    assert_failed(run(capsys, *words, "--force"), 5, "is a character device")


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    ran = spawn("convert", TINY, tmp_path / "out.gguf", "--type", "Q4_K", preexec_fn=small_disk)
    assert ran.code == 6 and ran.err.count("\n") == 1 and "File too large" in ran.err
    assert names(tmp_path) == []


def test_a_full_disk_under_the_result_is_an_error_and_a_reader_that_left_is_none():
    with Path("/dev/full").open("w") as full:
        ran = spawn("inspect", TINY, stdout=full)
    assert ran.code == 6 and ran.err.splitlines() == [
        "requant: error: stdout: cannot be written: No space left on device"
    ]
    for words in (["inspect", TINY], ["--help"], ["plan", "--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        ran = spawn(*words, stdout=writing)
        os.close(writing)
        assert (ran.code, ran.err) == (0, "")


def test_closed_streams_do_no_harm():
    ran = spawn("inspect", TINY, preexec_fn=lambda: os.close(1), stdout=None)
    assert (ran.code, ran.err) == (0, "")
    assert spawn("inspect", TINY.parent, preexec_fn=lambda: os.close(2), stderr=None).code == 3


@pytest.mark.parametrize("option", ["--vram", "--size"])
def test_a_budget_of_one_mebibyte_is_infeasible_and_names_one_that_is_not(capsys, losses, option):
    ran = run(capsys, "plan", TINY, "--losses", losses, option, "1MiB")
    assert_failed(ran, 4, f"{option} 1.00 MiB is", "raise it to ")
    enough = ran.err.split("raise it to ")[1].split(",")[0]
    assert parse_size(enough) < 2**23
    assert run(capsys, "plan", TINY, "--losses", losses, option, enough).code == 0


def test_an_infeasible_budget_is_noticed_before_scoring(capsys, monkeypatch):
    monkeypatch.setattr("requant.scoring.layerwise.score", None)
    assert_failed(run(capsys, "plan", TINY, "--size", "1MiB"), 4)
    assert_failed(run(capsys, "plan", TINY, "--size", "5MiB", "--tensor-type", "nothing=Q4_K"), 2, "matches no tensor")


@pytest.mark.parametrize(
    "size", ["", "12", "-5MiB", "12G", "nan", "inf", "1e9GiB", "0MiB", "9" * 400 + "GiB", "5 MiB 3", "\x1b[31mGiB"]
)
def test_a_nonsense_size_is_usage(capsys, size):
    ran = run(capsys, "plan", TINY, "--size", size)
    if size == "12":  # bytes: a size, if one that is too small
        assert_failed(ran, 4)
    else:
        assert_failed(ran, 2, "--size: ")
    assert "\x1b" not in ran.err


@pytest.mark.parametrize("bpw", ["nan", "inf", "-1", "0", "1e400"])
def test_a_nonsense_bpw_is_usage(capsys, losses, bpw):
    assert_failed(run(capsys, "plan", TINY, "--losses", losses, "--bpw", bpw), 2, "--bpw")


@pytest.mark.parametrize("option", ["--tensor-type", "--min-type", "--group"])
def test_a_nonsense_expression_is_usage(capsys, losses, option):
    text = "(" if option == "--group" else "(=Q4_K"
    ran = run(capsys, "plan", TINY, "--losses", losses, "--bpw", "5", option, text)
    assert_failed(ran, 2, option, "is not a regular expression")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--type", "Q9_K"], "--type: 'Q9_K' is not a ggml type"),
        (["--type", "F64"], "F64 cannot be written"),
        (["--type", "Q4_K", "--bpw", "4"], "cannot be given together"),
        (["--type", "Q4_K", "--plan", "p"], "cannot be given together"),
        (["--plan", "p", "--group", "ffn"], "--plan decides every type"),
        ([], "nothing decides the types"),
        (["--bpw", "4", "--ctx", "512"], "give --vram SIZE or --ram SIZE with it"),
        (["--vram", "12MiB", "--cache-type-k", "q3"], "no cache type"),
        (["--bpw", "4", "--threads", "0"], "--threads"),
        (["--vram", "12MiB", "--ctx", "-1"], "--ctx"),
        (["--bpw", "4", "--types", "Q4_K,Q9"], "--types: 'Q9'"),
    ],
)
def test_options_that_make_no_sense_are_usage(capsys, tmp_path, words, said):
    assert_failed(run(capsys, "convert", TINY, tmp_path / "out.gguf", *words), 2, said)
    assert names(tmp_path) == []


def test_the_input_is_never_the_output(capsys, tmp_path):
    source = tmp_path / "model.gguf"
    source.write_bytes(TINY.read_bytes())
    (tmp_path / "link").symlink_to(source)
    os.link(source, tmp_path / "hard")
    for out in ("model.gguf", "link", "hard"):
        ran = run(capsys, "convert", source, tmp_path / out, "--type", "Q4_K", "--force")
        assert_failed(ran, 5, "is one of the inputs")
    for out in ("link", "hard"):
        assert_failed(run(capsys, "score", source, "-o", tmp_path / out, "--force"), 5, "is one of the inputs")
    assert_failed(run(capsys, "score", source, "-o", source, "--force"), 2, "is the name of a model")
    assert source.read_bytes() == TINY.read_bytes() and len(names(tmp_path)) == 3


def test_an_existing_output_is_replaced_only_by_force(capsys, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    assert_failed(run(capsys, "convert", TINY, out, "--type", "Q4_K"), 5, "already exists", "--force")
    assert out.read_text() == "precious"
    assert run(capsys, "convert", TINY, out, "--type", "Q4_K", "--force").code == 0
    assert out.read_bytes()[:4] == b"GGUF"


def test_a_strangers_record_is_not_replaced_and_an_old_one_of_ours_is(capsys, tmp_path):
    out, record = tmp_path / "out.gguf", tmp_path / "out.gguf.requant.json"
    record.write_text('{"my": "notes"}')
    ran = run(capsys, "convert", TINY, out, "--type", "Q4_K")
    assert_failed(ran, 5, "out.gguf.requant.json", "already exists")
    assert record.read_text() == '{"my": "notes"}' and not out.exists()
    record.unlink()
    assert run(capsys, "convert", TINY, out, "--type", "Q4_K").code == 0
    out.unlink()
    assert run(capsys, "convert", TINY, out, "--type", "Q5_K").code == 0
    assert {t["type"] for t in json.loads(record.read_text())["tensors"]} == {"Q5_K", "F32"}


def test_an_edited_output_file_of_a_stage_is_replaced_only_by_force(capsys, tmp_path, losses):
    plan = tmp_path / "plan.json"
    plan.write_text("edited by hand")
    words = ["plan", TINY, "--losses", losses, "--bpw", "4.5", "-o", plan]
    assert_failed(run(capsys, *words), 5, "already exists")
    assert plan.read_text() == "edited by hand"
    assert run(capsys, *words, "--force").code == 0
    assert names(tmp_path) == ["plan.json"]


def test_what_is_quantized_already_is_not_quantized_again_unasked(capsys, tmp_path):
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    assert run(capsys, "convert", TINY, once, "--type", "Q4_K").code == 0
    for words in (["convert", once, twice, "--type", "Q3_K"], ["convert", once, twice, "--bpw", "3.5"]):
        assert_failed(run(capsys, *words), 3, "already quantized", "--allow-requantize")
        assert not twice.exists()
    assert run(capsys, "convert", once, twice, "--type", "Q3_K", "--allow-requantize").code == 0


def test_out_of_memory_and_failures_of_the_system_are_one_line(capsys, monkeypatch):
    for error, said in (
        (MemoryError(), "out of memory"),
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("requant.container.source.read_header", fail)
        assert_failed(run(capsys, "inspect", TINY), 6, said)


def test_a_bug_is_one_line_and_its_place_is_shown_on_request():
    bug = "import requant.container.source as s\ndef f(*_): raise KeyError('a\\nb')\ns.read_header = f"
    ran = spawn("inspect", TINY, before=bug)
    assert_failed(ran, 1, "internal error", "KeyError")
    assert "Traceback" in spawn("--debug", "inspect", TINY, before=bug).err
    assert "Traceback" in spawn("inspect", "--debug", TINY, before=bug).err


def test_names_cannot_speak_to_the_terminal(capsys, tmp_path):
    keys = (pair("general.architecture", STR, "llama"), pair("general.name", STR, "\x1b[2Jme\u202e"))
    path = File(keys, (half("blk.0.attn_q.weight", (256, 8)),)).write(tmp_path / "\x1b[31m.gguf")
    ran = run(capsys, "inspect", path, "--tensors")
    assert ran.code == 0 and "\x1b" not in ran.out + ran.err and "\u202e" not in ran.out


def test_paths_that_are_no_text_are_printed_somehow(tmp_path):
    ran = spawn("inspect", os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.gguf"))
    assert_failed(ran, 3, "no such file")


def test_latin_terminals_get_every_name(tmp_path):
    keys = (pair("general.architecture", STR, "llama"), pair("general.name", STR, "模型"))
    path = File(keys, (half("blk.0.attn_q.weight", (256, 8)),)).write(tmp_path / "m.gguf")
    ran = spawn("inspect", path, env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert ran.code == 0 and "\\u6a21" in ran.out


def test_a_named_pipe_is_no_model(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_failed(run(capsys, "inspect", tmp_path / "pipe"), 3, "FIFO")


def test_master_weights_below_q8_0_are_copied_and_the_rest_is_planned(capsys, tmp_path):
    """As gpt-oss, whose experts are released in MXFP4; the others are in 16 bits."""
    made, out = tmp_path / "made.gguf", tmp_path / "out.gguf"
    assert run(capsys, "convert", TINY, made, "--type", "F16", "--tensor-type", "ffn_=MXFP4").code == 0
    note = r"30 of its tensors \(59% of the weights\) are already quantized below Q8_0 and are copied"

    def mixed(path):
        found = {name: t[0] for name, t in ggml.file_tensors(path).items()}
        return {t for name, t in found.items() if "ffn_" in name and "norm" not in name}, found["output.weight"]

    for words in (["--type", "Q5_K"], ["--size", "6MB", "--quick"], ["--preset", "Q5_K_S"], ["--like", TINY]):
        ran = run(capsys, "convert", made, out, *words, "--force")
        assert ran.code == 0 and re.search(note, ran.out + ran.err), (words, ran.out, ran.err)
        experts, output = mixed(out)
        assert experts == {by_name("MXFP4").type_id} and (output != 1 or "--like" in words)
    words = ["plan", made, "--quick", "--size"]
    assert_failed(run(capsys, *words, "3.6MB"), 4, "the 30 tensors that are already below Q8_0", "--allow-requantize")
    assert_failed(run(capsys, *words, "6MB", "--tensor-type", "ffn_=Q3_K"), 2, "only tensors that stay as they are")
    assert run(capsys, *words, "3.6MB", "--allow-requantize").code == 0

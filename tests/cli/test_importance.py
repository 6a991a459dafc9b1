"""score, plan and convert one after the other: the bytes of one command, by the importance beside the losses."""

import json
import os
import shutil
from pathlib import Path

import pytest
from commands import FIXTURES, assert_failed, names, run
from model.forward import families

import requant
from requant.common.files import hash_file
from requant.errors import BadInput

HOW = ("--text", FIXTURES / "calibration.txt", "--windows", "2", "--window", "64")
BUDGET = ("--bpw", "8", "--types", "Q4_0,Q8_0")


@pytest.fixture
def small(tmp_path):
    """A model that is run in no time, in a folder of its own."""
    (tmp_path / "model").mkdir()
    return families.write("qwen3", tmp_path / "model" / "small.gguf")


def ran(capsys, *words):
    found = run(capsys, *words)
    assert found.code == 0, found.err
    return found


def staged(capsys, small, folder):
    """losses.json and plan.json in `folder`, with the importance beside them."""
    ran(capsys, "score", small, "-o", folder / "losses.json", "--types", "Q4_0,Q8_0", *HOW)
    ran(capsys, "plan", small, "--losses", folder / "losses.json", *BUDGET, "-o", folder / "plan.json")
    return folder / "losses.json", folder / "plan.json"


def test_stages_make_the_bytes_of_one_command(capsys, tmp_path, small):
    losses, plan = staged(capsys, small, tmp_path)
    measured = tmp_path / "losses.imatrix.gguf"
    for file in (losses, plan):
        kept = json.loads(file.read_text())
        assert (kept["imatrix"], kept["imatrix_file"]) == ("calibration.txt", measured.name)
        assert kept["imatrix_sha256"] == hash_file(measured)
    once = tmp_path / "once.gguf"
    ran(capsys, "convert", small, once, *BUDGET, *HOW)
    ran(capsys, "plan", small, *BUDGET, *HOW, "-o", tmp_path / "alone.json")
    for name, how in {
        "by-plan": ("--plan", plan),
        "by-losses": ("--losses", losses, *BUDGET),
        "by-plan-that-scored": ("--plan", tmp_path / "alone.json"),
        "by-imatrix": ("--plan", plan, "--imatrix", tmp_path / "alone.imatrix.gguf"),
    }.items():
        out = tmp_path / f"{name}.gguf"
        made = json.loads(ran(capsys, "convert", small, out, *how, "--json").out)
        assert out.read_bytes() == once.read_bytes(), name
        assert (made["imatrix"], made["notes"]) == ("calibration.txt", [])
    plain = tmp_path / "plain.gguf"
    ran(capsys, "convert", small, plain, "--plan", plan, "--no-imatrix")
    assert plain.read_bytes() != once.read_bytes()


def test_several_plans_share_the_importance(capsys, tmp_path, small):
    ran(capsys, "plan", small, "--vram", "3MiB,4MiB", "--reserve", "0", *HOW, "-o", tmp_path / "p.json")
    files = {json.loads((tmp_path / f"p-{n}MiB.json").read_text())["imatrix_file"] for n in (3, 4)}
    assert files <= {"p.imatrix.gguf", None} and (tmp_path / "p.imatrix.gguf").exists() == ("p.imatrix.gguf" in files)


@pytest.mark.parametrize("by", ["--plan", "--losses"])
@pytest.mark.parametrize("state", ["gone", "another", "no imatrix", "not kept"])
def test_importance_that_is_not_there_is_asked_for(capsys, tmp_path, small, state, by):
    losses, plan = staged(capsys, small, tmp_path)
    measured, out = tmp_path / "losses.imatrix.gguf", tmp_path / "out.gguf"
    given, kept = (plan if by == "--plan" else losses), tmp_path / "kept.gguf"
    shutil.copy(measured, kept)
    if state == "gone":
        measured.unlink()
    elif state == "another":
        ran(capsys, "calibrate", small, "--window", "32", "--windows", "1", "-o", measured, "--force")
    elif state == "no imatrix":
        measured.write_bytes(small.read_bytes())
    else:
        assert state == "not kept"
        given.write_text(json.dumps(json.loads(given.read_text()) | {"imatrix_file": None}))
    words = ("convert", small, out, by, given, *(BUDGET if by == "--losses" else ()))
    before = names(tmp_path)
    for more in ((), ("--dry-run",)):
        failed = run(capsys, *words, *more)
        assert_failed(failed, 3, "--imatrix FILE", "--no-imatrix")
    assert names(tmp_path) == before
    assert json.loads(ran(capsys, *words, "--imatrix", kept, "--json").out)["imatrix"] == "calibration.txt"
    made = json.loads(ran(capsys, *words, "--no-imatrix", "--json", "--force").out)
    assert made["imatrix"] is None


def test_the_importance_is_found_beside_the_plan_the_losses_and_the_model(capsys, tmp_path, small):
    _, plan = staged(capsys, small, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(plan, tmp_path / "elsewhere" / "plan.json")
    out = tmp_path / "out.gguf"
    assert run(capsys, "convert", small, out, "--plan", moved).code == 3
    ran(capsys, "convert", small, out, "--plan", moved, "--losses", tmp_path / "losses.json")
    (tmp_path / "losses").mkdir()
    for name in ("losses.json", "losses.imatrix.gguf"):
        shutil.move(tmp_path / name, tmp_path / "losses" / name)
    ran(capsys, "convert", small, out, "--plan", moved, "--losses", tmp_path / "losses" / "losses.json", "--force")
    shutil.move(tmp_path / "losses" / "losses.imatrix.gguf", tmp_path)
    shutil.move(tmp_path / "losses.imatrix.gguf", small.parent)
    ran(capsys, "convert", small, out, "--plan", moved, "--force")


def test_a_plan_keeps_the_pointer_where_the_importance_is_elsewhere(capsys, tmp_path, small):
    losses, plan = staged(capsys, small, tmp_path)
    kept = json.loads(plan.read_text())
    (tmp_path / "losses.imatrix.gguf").rename(tmp_path / "kept.gguf")
    (tmp_path / "sub").mkdir()
    for folder, file in ((tmp_path, "losses.imatrix.gguf"), (tmp_path / "sub", "../losses.imatrix.gguf")):
        again = ran(capsys, "plan", small, "--losses", losses, *BUDGET, "-o", folder / "again.json")
        assert "--imatrix FILE" in again.err and again.err.count("\n") == 1
        found = json.loads((folder / "again.json").read_text())
        assert found["imatrix_file"] == file
        assert all(found[key] == kept[key] for key in ("imatrix", "imatrix_sha256"))


@pytest.mark.parametrize("command", ["score", "plan"])
def test_the_file_of_the_importance_obeys_the_rules_of_outputs(capsys, tmp_path, small, command):
    words = (command, small, "-o", tmp_path / "x.json", *HOW, *(BUDGET if command == "plan" else ()))
    beside = tmp_path / "x.imatrix.gguf"
    beside.write_bytes(b"somebody's")
    assert_failed(run(capsys, *words), 5, "x.imatrix.gguf: already exists")
    assert beside.read_bytes() == b"somebody's" and not (tmp_path / "x.json").exists()
    model = small.rename(beside)
    words = (command, model, *words[2:])
    assert_failed(run(capsys, *words, "--force"), 5, "x.imatrix.gguf: is one of the inputs")
    assert model.stat().st_size > 1000


@pytest.mark.parametrize("how", [("--quick",), ("--no-imatrix", *HOW)])
def test_without_importance_there_is_no_file_and_nothing_to_find(capsys, tmp_path, small, how):
    ran(capsys, "score", small, "-o", tmp_path / "l.json", "--types", "Q4_0,Q8_0", *how)
    ran(capsys, "plan", small, "--losses", tmp_path / "l.json", *BUDGET, "-o", tmp_path / "p.json")
    assert names(tmp_path) == ["l.json", "model", "p.json"]
    made = json.loads(ran(capsys, "convert", small, tmp_path / "o.gguf", "--plan", tmp_path / "p.json", "--json").out)
    assert made["imatrix"] is None and made["notes"] == []


def test_losses_that_are_only_printed_hold_no_importance_and_say_so(capsys, tmp_path, small):
    found = ran(capsys, "score", small, "--json", "--types", "Q4_0,Q8_0", *HOW)
    assert json.loads(found.out)["imatrix"] is None and "--no-imatrix" in json.loads(found.out)["options"]
    assert any("-o FILE" in note for note in json.loads(found.out)["notes"]) and found.err == ""
    (tmp_path / "l.json").write_text(found.out)
    ran(capsys, "convert", small, tmp_path / "o.gguf", "--losses", tmp_path / "l.json", *BUDGET)


@pytest.mark.parametrize("linked", [False, True])
def test_plan_losses_and_importance_may_each_have_a_folder(capsys, tmp_path, small, linked, monkeypatch):
    tree, here, out = tmp_path / "tree", tmp_path / "away" / "deep", tmp_path / "out.gguf"
    for name in ("scores", "data", "plans"):
        (tree / name).mkdir(parents=True)
    here.mkdir(parents=True)
    if linked:  # `..` of a folder behind a link is that of the folder itself
        (tree / "plans").rmdir()
        (tree / "really" / "plans").mkdir(parents=True)
        (tree / "plans").symlink_to(tree / "really" / "plans")
    losses, plan, data = tree / "scores" / "l.json", tree / "plans" / "p.json", tree / "data" / "i.gguf"
    ran(capsys, "score", small, "-o", losses, "--emit-imatrix", data, "--types", "Q4_0,Q8_0", *HOW)
    made = ran(capsys, "plan", small, "--losses", losses, *BUDGET, "-o", plan)
    assert made.err == ""
    assert json.loads(losses.read_text())["imatrix_file"] == "../data/i.gguf"
    assert json.loads(plan.read_text())["imatrix_file"] == ("../../data/i.gguf" if linked else "../data/i.gguf")
    ran(capsys, "convert", small, out, "--plan", plan)
    record = json.loads((tmp_path / "out.gguf.requant.json").read_text())
    assert record["plan"]["imatrix_file"] == data.name  # records hold no folders
    ran(capsys, "convert", small, out, "--losses", losses, *BUDGET, "--force")
    several = plan.with_name("v.json")
    ran(capsys, "plan", small, "--vram", "3MiB,4MiB", "--reserve", "0", "--losses", losses, "-o", several)
    ran(capsys, "convert", small, out, "--plan", plan.with_name("v-3MiB.json"), "--force")
    if linked:
        return
    monkeypatch.chdir(here)  # what is printed is taken to be written here
    Path("p.json").write_text(ran(capsys, "plan", small, "--losses", losses, *BUDGET, "--json").out)
    given = ran(capsys, "score", small, "--json", "--imatrix", data, "--types", "Q4_0,Q8_0", *HOW)
    Path("l.json").write_text(given.out)
    for words in (("--plan", "p.json"), ("--losses", "l.json", *BUDGET)):
        ran(capsys, "convert", small, out, *words, "--force")
    moved = shutil.move(tree, tmp_path / "moved")
    ran(capsys, "convert", small, out, "--plan", moved / "plans" / "p.json", "--force")
    copied = [shutil.copy(moved / part, here) for part in ("plans/p.json", "data/i.gguf")]
    ran(capsys, "convert", small, out, "--plan", copied[0], "--force")
    Path(copied[1]).unlink()
    failed = run(capsys, "convert", small, out, "--plan", copied[0], "--force")
    assert_failed(failed, 3, "p.json: the importance that the plan points to is not there: ../data/i.gguf; pass it")


def test_a_path_of_a_stranger_is_read_only_for_the_right_hash(capsys, tmp_path, small):
    losses, plan = staged(capsys, small, tmp_path)
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (tmp_path / "mine").mkdir()
    plan = Path(shutil.move(plan, tmp_path / "mine"))
    kept = json.loads(plan.read_text())
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 42)
    for name in ("/etc/passwd", str(tmp_path / "losses.imatrix.gguf"), "", "..", "../..", "a/..", "a\0b", 3):
        plan.write_text(json.dumps(kept | {"imatrix_file": name}))
        assert_failed(run(capsys, "convert", small, tmp_path / "o.gguf", "--plan", plan), 3, "imatrix_file")
    for name in ("../secret.txt", "../fifo", "../huge", "../mine", "../nowhere/x", "x" * 5000):
        plan.write_text(json.dumps(kept | {"imatrix_file": name}))
        failed = run(capsys, "convert", small, tmp_path / "o.gguf", "--plan", plan)
        assert_failed(failed, 3, "is another file than" if "secret" in name else "is not there", "--imatrix FILE")
    assert secret.read_text() == "secret" and losses.exists()


def test_results_in_memory_hold_their_importance(tmp_path, small):
    how = {"text": FIXTURES / "calibration.txt", "windows": 2, "window": 64}
    budget = {"bpw": 8.0, "types": "Q4_0,Q8_0"}
    with requant.open(small) as model:
        once = model.convert(tmp_path / "once.gguf", **budget, **how)
        losses = model.score(types="Q4_0,Q8_0", **how, emit_imatrix=tmp_path / "l.imatrix.gguf")
        made = model.convert(tmp_path / "staged.gguf", plan=model.plan(losses=losses, **budget))
        model.convert(tmp_path / "alone.gguf", plan=model.plan(**budget, **how))
        (tmp_path / "l.json").write_text(losses.to_json())
        read = requant.read_losses(tmp_path / "l.json")
        (tmp_path / "p.json").write_text(model.plan(losses=read, **budget).to_json())
        model.convert(tmp_path / "read.gguf", plan=requant.read_plan(tmp_path / "p.json"))
        with pytest.raises(BadInput, match="was not kept in a file; pass it with --imatrix"):
            model.convert(tmp_path / "x.gguf", plan=requant.Plan.from_json(model.plan(**budget, **how).to_json()))
    assert made.imatrix_sha256 == once.imatrix_sha256 == hash_file(tmp_path / "l.imatrix.gguf")
    for name in ("staged", "alone", "read"):
        assert (tmp_path / f"{name}.gguf").read_bytes() == (tmp_path / "once.gguf").read_bytes(), name

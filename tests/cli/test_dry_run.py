"""A dry run ends as the run does wherever the run would end before its first byte: the same code, the same line."""

import json
import os
import resource
import shutil

import pytest
from commands import IMATRIX, TINY, assert_failed, names, run, spawn
from test_batch import batch, write_jobs

import requant
from requant.common import folders
from requant.errors import BadInput, InputOutputError, OutputRefused


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copy(TINY, "m.gguf")
    os.link("m.gguf", "second.gguf")
    return tmp_path


def _plan():
    """The plan of the tiny model as data."""
    with requant.open(TINY) as model:
        return json.loads(model.plan(preset="Q4_K_M").to_json())


def _change(plan, **changes):
    """The plan without its digest, with other values."""
    return {key: value for key, value in (plan | changes).items() if key != "sha256"}


def _foreign(plan):
    return _change(plan, header_sha256="0" * 64)


def _unknown(plan):
    return _change(plan, choices=[{**plan["choices"][0], "name": "other.weight"}, *plan["choices"][1:]])


def _short(plan):
    return _change(plan, choices=plan["choices"][:-1])


def _low(plan):
    sized = {"type": "IQ2_XS", "n_bytes": 74 * 256}
    choices = [c | sized if c["name"] == "blk.0.attn_q.weight" else c for c in plan["choices"]]
    return _change(plan, choices=choices)


PLAN = ["--plan", "p.json"]


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ((_foreign, PLAN), 3, "the plan was made for another file"),
        ((_unknown, PLAN), 3, "has no tensor 'other.weight'"),
        ((_short, PLAN), 3, "is not in the plan"),
        ((_low, PLAN), 3, "have a type that needs an importance matrix"),
        ((None, ["--preset", "IQ2_XS"]), 3, "; pass one with --imatrix"),
        ((None, ["--preset", "IQ2_XS", "--imatrix", "none.gguf"]), 3, "none.gguf: no such file"),
        ((None, ["--type", "Q8_0", "--report", "taken.md"]), 5, "taken.md: already exists"),
        ((None, ["--type", "Q8_0", "--report", "o.gguf"]), 2, "says no kind of report"),
        ((None, ["--type", "Q8_0", "--max-shard-size", "300KB"]), 3, "alone is larger than a file may be"),
        ((None, ["--type", "Q8_0", "--max-shard-size", "2MB"]), 5, "o-00002-of-0000"),
        ((None, ["--type", "Q8_0", "--measure", "3"]), 2, "--measure chooses among plans for a budget"),
    ],
    ids=lambda value: str(value[1][-1]) + (value[0].__name__ if value[0] else "") if isinstance(value, tuple) else "",
)
def test_what_the_run_refuses_the_dry_run_refuses_with_the_same_line(capsys, folder, how, code, said):
    make, words = how
    if make is not None:
        (folder / "p.json").write_text(json.dumps(make(_plan())))
    for name in ("taken.md", *(f"o-00002-of-0000{n}.gguf" for n in range(3, 10))):
        (folder / name).write_text("somebody's")
    before = names(folder)
    dry = run(capsys, "convert", "m.gguf", "o.gguf", *words, "--dry-run")
    assert_failed(dry, code, said)
    assert run(capsys, "convert", "m.gguf", "o.gguf", *words) == dry
    assert names(folder) == before


@pytest.mark.parametrize(
    ("out", "code", "said"),
    [
        ("m.gguf", 5, "is one of the inputs"),
        ("second.gguf", 5, "is one of the inputs"),
        ("taken.gguf", 5, "already exists; --force replaces it"),
        ("none/o.gguf", 6, "there is no such folder"),
        (".", 5, "is a directory"),
        ("strange.gguf", 5, "strange.gguf.part: is not an unfinished output"),
        ("recorded.gguf", 5, "recorded.gguf.requant.json: already exists"),
        ("x" * 300, 6, "File name too long"),
    ],
)
def test_an_output_that_the_run_refuses_the_dry_run_refuses(capsys, folder, out, code, said):
    for name in ("taken.gguf", "strange.gguf.part", "recorded.gguf.requant.json"):
        (folder / name).write_text("somebody's, of more than 24 bytes")
    before = names(folder)
    dry = run(capsys, "convert", "m.gguf", out, "--type", "Q8_0", "--dry-run")
    assert_failed(dry, code, said)
    assert run(capsys, "convert", "m.gguf", out, "--type", "Q8_0") == dry
    assert names(folder) == before


def test_a_full_disk_and_a_limit_on_files_are_told_by_the_dry_run_too(capsys, folder, monkeypatch):
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))"
    words = ["convert", folder / "m.gguf", folder / "o.gguf", "--type", "Q8_0"]
    ends = [spawn(*words, *more, before=limited) for more in (["--dry-run"], [])]
    assert ends[0] == ends[1] and ends[0].code == 6 and "File too large" in ends[0].err
    full = os.statvfs_result((4096, 4096, 1000, 10, 10, 1000, 1000, 1000, 0, 255))
    monkeypatch.setattr(folders.os, "statvfs", lambda _: full)
    dry = run(capsys, *words, "--dry-run")
    assert_failed(dry, 6, "free but has 40.00 KiB")
    assert run(capsys, *words) == dry and names(folder) == ["m.gguf", "second.gguf"]


def test_a_dry_run_shows_the_plan_of_an_unfinished_run_and_leaves_it(capsys, folder, monkeypatch):
    words = ["convert", "m.gguf", "o.gguf", "--preset", "Q4_K_M"]

    def stop(*_, **__):
        raise InputOutputError("o.gguf", "the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr("requant.conversion.convert.verify_output", stop)
        assert run(capsys, *words).code == 6
    unfinished = names(folder)
    assert "o.gguf.part" in unfinished
    assert run(capsys, *words, "--dry-run").code == 0 and names(folder) == unfinished
    assert_failed(run(capsys, *words[:3], "--type", "Q8_0", "--dry-run"), 5, "is unfinished, begun by another command")
    assert run(capsys, *words[:3], "--type", "Q8_0", "--dry-run", "--restart").code == 0 and names(folder) == unfinished


def test_the_same_in_python(folder):
    with requant.open("m.gguf") as model:
        plan = model.try_convert("o.gguf", preset="Q4_K_M")
        assert plan.method == "preset Q4_K_M" and names(folder) == ["m.gguf", "second.gguf"]
        for out, error, how in (
            ("second.gguf", OutputRefused, {"type": "Q8_0"}),
            ("none/o.gguf", InputOutputError, {"type": "Q8_0"}),
            ("o.gguf", BadInput, {"preset": "IQ2_XS"}),
        ):
            lines = []
            for method in (model.try_convert, model.convert):
                with pytest.raises(error) as caught:
                    method(out, **how)
                lines.append(str(caught.value))
            assert lines[0] == lines[1]
        assert model.convert("o.gguf", plan).plan.types() == plan.types()


@pytest.mark.parametrize(
    ("job", "code"),
    [
        ({"preset": "IQ2_XS"}, 3),
        ({"preset": "Q4_K_M", "output": "taken.gguf"}, 5),
        ({"preset": "Q4_K_M", "output": "taken.md/o.gguf"}, 6),
        ({"preset": "Q4_K_M", "imatrix": str(IMATRIX)}, 0),
    ],
    ids=["no imatrix", "taken", "no folder", "good"],
)
def test_a_dry_run_of_a_batch_ends_as_the_batch_does(folder, job, code):
    for name in ("taken.gguf", "taken.md"):
        (folder / name).write_text("somebody's")
    jobs = write_jobs(folder, [{"source": "m.gguf", "output": "o.gguf"} | job])
    before = names(folder)
    dry, _ = batch(jobs, "--dry-run", code=code)
    assert names(folder) == before
    made, _ = batch(jobs, code=code)
    assert (dry["jobs"][0]["exit_code"] or 0) == made["jobs"][0]["exit_code"]
    assert dry["jobs"][0]["error"] == made["jobs"][0]["error"]
    assert code or batch(jobs, "--dry-run")[0]["jobs"][0]["status"] == "skipped"

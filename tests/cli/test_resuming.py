"""`requant convert` stopped and given again: it goes on without scoring or planning once more."""

import json

import pytest
from commands import TINY, assert_failed, names, run, spawn, start
from conversions import half, small_model

from requant.api import session as job
from requant.container import output as output_module
from requant.container.header import parse_header
from requant.container.source import open_source
from requant.errors import InputOutputError

# every tensor is on disk at once, and the process is gone after so many of them
KILLED = """
import os, signal
from requant.container import output
output.COMMIT_BYTES = 1
flush, left = output.Output.flush, [{after}]
def killing(self):
    flush(self)
    left[0] -= bool(not self._pending)
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
output.Output.flush = killing
"""


def killed(after, *words):
    process = start(*words, before=KILLED.format(after=after))
    process.communicate(timeout=120)
    assert process.returncode == -9


def reference(capsys, folder, *words):
    folder.mkdir()
    assert run(capsys, "convert", TINY, folder / "out.gguf", *words).code == 0
    return contents(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "words", [["--type", "Q4_K"], ["--bpw", "4.5", "--windows", "1", "--window", "64"], ["--preset", "Q3_K_M"]]
)
def test_a_killed_run_goes_on_with_the_plan_and_the_importance_it_had(capsys, tmp_path, monkeypatch, words):
    whole = reference(capsys, tmp_path / "whole", *words)
    folder = tmp_path / "again"
    folder.mkdir()
    out = folder / "out.gguf"
    killed(20, "convert", TINY, out, *words)
    measured = ["out.gguf.part.imatrix"] if "--bpw" in words else []
    assert names(folder) == ["out.gguf.part", *measured, "out.gguf.part.journal"]
    killed(10, "convert", TINY, out, *words)
    monkeypatch.setattr(job, "score", None)  # neither scored
    monkeypatch.setattr(job.Session, "make_plan", None)  # nor planned again
    ran = run(capsys, "convert", TINY, out, *words)
    assert ran.code == 0 and "requant: resuming " in ran.err
    assert contents(folder) == whole


@pytest.mark.parametrize("way", ["killed", "full"])
def test_a_plan_that_took_scoring_outlives_a_run_that_wrote_nothing(capsys, tmp_path, monkeypatch, way):
    words = ["--bpw", "4.5", "--windows", "1", "--window", "64"]
    whole = reference(capsys, tmp_path / "whole", *words)
    folder = tmp_path / "again"
    folder.mkdir()
    out = folder / "out.gguf"
    if way == "killed":
        killed(0, "convert", TINY, out, *words)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(output_module, "check_space", no_space)
            assert run(capsys, "convert", TINY, out, *words).code == 6
        assert names(folder) == ["out.gguf.part.imatrix", "out.gguf.part.journal"]
    monkeypatch.setattr(job, "score", None)
    assert run(capsys, "convert", TINY, out, *words).code == 0
    assert contents(folder) == whole


def no_space(folder, *_):
    raise InputOutputError(folder, "needs more")


def test_another_command_is_refused_and_told_what_differs(capsys, tmp_path):
    out = tmp_path / "out.gguf"
    killed(20, "convert", TINY, out, "--type", "Q4_K")
    before = contents(tmp_path)
    ran = run(capsys, "convert", TINY, out, "--type", "Q5_K")
    assert_failed(ran, 5, 'asked type was "Q4_K", now "Q5_K"', "--restart discards it")
    ran = run(capsys, "convert", TINY, out, "--type", "Q4_K", "--tensor-type", "attn_v=Q6_K")
    assert_failed(ran, 5, "asked pins was not given, now")
    assert contents(tmp_path)["out.gguf.part"] == before["out.gguf.part"]
    assert run(capsys, "convert", TINY, out, "--type", "Q5_K", "--restart").code == 0
    assert names(tmp_path) == ["out.gguf", "out.gguf.requant.json"]
    with open_source(out) as made:
        assert made.tensor("blk.0.attn_v.weight").format.name == "Q5_K"


def test_options_that_change_nothing_of_the_output_may_differ(capsys, tmp_path):
    out = tmp_path / "out.gguf"
    killed(20, "convert", TINY, out, "--type", "Q4_K", "--threads", "1")
    ran = run(capsys, "convert", TINY, out, "--type", "Q4_K", "--threads", "2", "--json", "--no-verify", "--force")
    assert ran.code == 0 and json.loads(ran.out)["schema"] == "requant.output/1"


def test_importance_that_was_damaged_meanwhile_is_refused(capsys, tmp_path):
    out = tmp_path / "out.gguf"
    words = ["--bpw", "4.5", "--windows", "1", "--window", "64"]
    killed(20, "convert", TINY, out, *words)
    kept = tmp_path / "out.gguf.part.imatrix"
    content = bytearray(kept.read_bytes())
    header = parse_header(kept)
    sums = next(t for t in header.tensors if t.name.endswith(".in_sum2"))
    content[header.data_start + sums.offset + 1] ^= 1
    kept.write_bytes(content)
    assert_failed(run(capsys, "convert", TINY, out, *words), 5, "is not as it was written", "--restart")
    kept.unlink()
    assert_failed(run(capsys, "convert", TINY, out, *words), 5, "no such file", "--restart")
    assert run(capsys, "convert", TINY, out, *words, "--restart").code == 0


def test_a_run_without_force_keeps_what_appeared_meanwhile_and_what_was_done(capsys, tmp_path):
    out = tmp_path / "out.gguf"
    killed(20, "convert", TINY, out, "--type", "Q4_K")
    out.write_bytes(b"somebody's")
    assert_failed(run(capsys, "convert", TINY, out, "--type", "Q4_K", "--json"), 5, "already exists")
    assert names(tmp_path) == ["out.gguf", "out.gguf.part", "out.gguf.part.journal"]
    assert run(capsys, "convert", TINY, out, "--type", "Q4_K", "--force").code == 0


def test_an_output_that_was_damaged_before_its_record_was_written_is_made_again_as_the_error_says(
    capsys, tmp_path, monkeypatch
):
    out, words = tmp_path / "out.gguf", ["--type", "Q4_K"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_module.Output, "finish", lambda self: no_space(tmp_path))
        assert run(capsys, "convert", TINY, out, *words).code == 6
    whole = out.read_bytes()
    out.write_bytes(whole[:-100] + bytes(100))
    ran = run(capsys, "convert", TINY, out, *words)
    assert ran.code == 6 and "is not as it was written; --restart and --force make it again" in ran.err
    assert run(capsys, "convert", TINY, out, *words, "--restart", "--force").code == 0
    assert out.read_bytes() == whole and run(capsys, "verify", out).code == 0


@pytest.mark.parametrize("size", ["2MiB", "3MB"])
def test_a_split_output_is_verified_shown_and_named_by_its_first_file(capsys, tmp_path, size):
    ran = run(capsys, "convert", TINY, tmp_path / "out.gguf", "--type", "Q4_K", "--max-shard-size", size)
    assert ran.code == 0
    first = next(path for path in sorted(tmp_path.iterdir()) if path.suffix == ".gguf")
    assert first.name.startswith("out-00001-of-0000") and f"llama-server -m {first}" in ran.out
    assert f"{first.name}.requant.json" in names(tmp_path)
    assert run(capsys, "verify", first, "--source", TINY).code == 0
    assert run(capsys, "convert", first, tmp_path / "again.gguf", "--keep-split", "--type", "Q8_0").code == 2 + 1
    again = run(capsys, "convert", first, tmp_path / "a.gguf", "--keep-split", "--type", "Q4_0", "--allow-requantize")
    assert (
        again.code == 0
        and sum(name.startswith("a-0") for name in names(tmp_path))
        == len([name for name in names(tmp_path) if name.startswith("out-0") and name.endswith(".gguf")]) + 1
    )


def test_a_failed_run_that_got_nowhere_leaves_nothing(capsys, tmp_path, monkeypatch):
    def fail(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_module.PartFile, "_reserve", fail)
    model = small_model(half("blk.0.attn_q.weight", (256, 8))).write(tmp_path / "model.gguf")
    assert run(capsys, "convert", model, tmp_path / "out.gguf", "--type", "Q4_K").code == 6
    assert names(tmp_path) == ["model.gguf"]


def test_50_descriptors_are_enough_for_any_number_of_files(tmp_path):
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))"
    for folder, before in (("few", few), ("many", "")):
        (tmp_path / folder).mkdir()
        out = tmp_path / folder / "out.gguf"
        assert spawn("convert", TINY, out, "--type", "Q4_K", "--max-shard-size", "600KB", before=before).code == 0
    made = [name for name in names(tmp_path / "few") if name.endswith(".gguf")]
    assert len(made) > 8
    for name in made:
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    again = tmp_path / "few" / "again.gguf"
    assert (
        spawn(
            "convert",
            tmp_path / "few" / made[0],
            again,
            "--type",
            "Q4_0",
            "--allow-requantize",
            "--keep-split",
            before=few,
        ).code
        == 0
    )
    assert spawn("verify", again.with_name(made[0].replace("out", "again")), before=few).code == 0

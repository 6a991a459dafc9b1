"""Batches run as commands: the same bytes as single conversions, resumed, stopped, with failures and damaged state."""

import fcntl
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from commands import IMATRIX, TINY, assert_failed, names, run, start
from conversions import half, small_model
from gguf_files import File, split_pairs, write_files
from model.forward.architectures import MAKERS

from requant.cli.batch_options import read_jobs

# every write takes a while, as those of a large model do; read at the start of every process
SLOW = """
import os
import time
quick = os.pwrite
def slow(*arguments):
    time.sleep(0.3)
    return quick(*arguments)
os.pwrite = slow
"""
GRADIENTS = {"windows": 1, "window": 64}


def write_jobs(folder, jobs, **defaults):
    """jobs.toml in `folder`: a job for each of `jobs`, values as JSON writes them, which TOML reads too."""

    def table(head, values):
        lines = [f"{key.replace('_', '-')} = {inline(value)}" for key, value in values.items()]
        return "\n".join([head, *lines])

    path = folder / "jobs.toml"
    path.write_text("\n\n".join([table("[defaults]", defaults), *(table("[[job]]", job) for job in jobs)]))
    return path


def inline(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


def batch(*words, code=0, **options):
    """(the summary, stderr) of a batch that ends with `code`."""
    process = start("batch", *words, "--json", **options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, (process.returncode, out, err)
    return json.loads(out), err


def statuses(found):
    return [job["status"] for job in found["jobs"]]


def until(condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


@pytest.fixture
def slowly(tmp_path_factory):
    """The environment of processes that write slowly."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "sitecustomize.py").write_text(SLOW)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}


def some_model(folder, seed=0):
    """A model of forty matrices in `folder`; written slowly it takes longer than any test waits."""
    matrices = [half(f"blk.{i}.attn_q.weight", (256, 64), seed=seed + i) for i in range(40)]
    return small_model(*matrices).write(folder / "m.gguf")


def split_model():
    """{file name: File} of a model of three tensors in two shards."""
    first = small_model(half("blk.0.attn_q.weight", (256, 64)), pairs=split_pairs(0, 2, 3))
    return {
        "m-00001-of-00002.gguf": first,
        "m-00002-of-00002.gguf": File(split_pairs(1, 2, 3), (half("blk.1.attn_q.weight", (256, 64), seed=1),)),
    }


def test_a_batch_makes_the_bytes_of_single_conversions_from_one_scoring(capsys, tmp_path):
    budgets = [{"size": "4MiB"}, {"vram": "12MiB", "ctx": 512}]
    job = {"source": TINY, "output": "out/{basename}-{sizelabel}-{encoding}.gguf", "budgets": budgets}
    jobs = write_jobs(tmp_path, [job], **GRADIENTS)
    found, err = batch(jobs)
    assert (
        found["schema"] == "requant.batch/1"
        and statuses(found) == ["done", "done"]
        and err.count("requant: scoring") == 1
    )
    outputs = [Path(row["output"]) for row in found["jobs"]]
    assert [p.name for p in outputs] == ["tiny-llama-10M-IQ2_S_FILE4M.gguf", "tiny-llama-10M-Q8_0_12M_CTX512.gguf"]
    singly = ("--size", "4MiB"), ("--vram", "12MiB", "--ctx", 512)
    for asked, out, row in zip(singly, outputs, found["jobs"], strict=True):
        alone = tmp_path / "alone.gguf"
        how = ("--windows", 1, "--window", 64, "--force", *asked)
        assert run(capsys, "convert", TINY, alone, *how).code == 0
        assert out.read_bytes() == alone.read_bytes() and row["size"] == alone.stat().st_size
        records = [json.loads(Path(f"{p}.requant.json").read_text()) for p in (out, alone)]
        assert row["predicted_loss"] == records[1]["plan"]["predicted_loss"] > 0
        for record in records:
            record["output"] = None
        assert records[0] == records[1]
    before = [p.stat().st_mtime_ns for p in outputs]
    again, err = batch(jobs)
    assert statuses(again) == ["skipped", "skipped"] and "scoring" not in err and "converting" not in err
    assert [row["size"] for row in again["jobs"]] == [row["size"] for row in found["jobs"]]
    assert before == [p.stat().st_mtime_ns for p in outputs]
    assert json.loads((tmp_path / "jobs.toml.requant" / "summary.json").read_text()) == again


def test_a_batch_compensates_as_single_conversions_do(capsys, tmp_path):
    model = MAKERS["granite"](1).write(tmp_path / "model.gguf")
    how = {"compensate": "fast", "windows": 1, "window": 32, "max_memory": "1GiB"}
    job = {"source": model, "output": "out/{stem}.gguf", "budgets": [{"type": "q4_0"}]}
    jobs = write_jobs(tmp_path, [job], **how)
    found, _ = batch(jobs)
    assert statuses(found) == ["done"]
    alone = tmp_path / "alone.gguf"
    words = ("--type", "q4_0", "--compensate", "--windows", 1, "--window", 32, "--max-memory", "1GiB")
    ran = run(capsys, "convert", model, alone, *words)
    assert ran.code == 0, ran
    assert Path(found["jobs"][0]["output"]).read_bytes() == alone.read_bytes()
    assert statuses(batch(jobs)[0]) == ["skipped"]


def test_a_batch_copies_what_fits_as_it_is_without_scoring(capsys, tmp_path):
    budgets = [{"size": "1TB"}, {"vram": "2GiB", "ctx": 512}]
    jobs = write_jobs(tmp_path, [{"source": TINY, "output": "{stem}-{budget}.gguf", "budgets": budgets}])
    found, err = batch(jobs, "--dry-run")
    assert statuses(found) == ["planned", "planned"] and found["jobs"][0]["predicted_loss"] == 0
    found, err = batch(jobs)
    assert statuses(found) == ["done", "done"] and "scoring" not in err
    for row, asked in zip(found["jobs"], (("--size", "1TB"), ("--vram", "2GiB", "--ctx", 512)), strict=True):
        alone = tmp_path / "alone.gguf"
        assert run(capsys, "convert", TINY, alone, "--force", *asked).code == 0
        assert Path(row["output"]).read_bytes() == alone.read_bytes()
    found, err = batch(jobs)
    assert statuses(found) == ["skipped", "skipped"] and "scoring" not in err


def test_a_changed_source_or_request_is_noticed(tmp_path):
    some_model(tmp_path)
    job = {"source": "m.gguf", "output": "{stem}-{encoding}.gguf", "type": "Q8_0"}
    jobs = write_jobs(tmp_path, [job])
    assert statuses(batch(jobs)[0]) == ["done"]
    some_model(tmp_path, seed=9)
    found, err = batch(jobs, code=5)
    assert statuses(found) == ["failed"] and "already exists" in err
    assert statuses(batch(jobs, "--force")[0]) == ["done"]
    write_jobs(tmp_path, [job | {"effort": "best"}])
    assert "already exists" in batch(jobs, code=5)[0]["jobs"][0]["error"]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(x, marks=pytest.mark.slow) for x in (signal.SIGTERM, signal.SIGHUP))]
)
def test_a_signal_stops_everything_and_the_same_command_goes_on(tmp_path, slowly, number, capsys):
    def listening():
        signal.signal(number, signal.SIG_DFL)

    source, budgets = some_model(tmp_path), [{"type": f"Q{n}_0"} for n in (8, 4, 5)]
    job = {"source": source, "output": "made/{encoding}.gguf", "budgets": budgets}
    jobs = write_jobs(tmp_path, [job])
    process = start("batch", jobs, "--jobs", 2, env=slowly, preexec_fn=listening)
    until(lambda: sum(len(p.read_bytes().splitlines()) > 2 for p in tmp_path.glob("made/*.journal")) == 2, process)
    workers = children(process)
    begun = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number and time.monotonic() - begun < 2.5, err
    assert f"stopped by {number.name}; run the same command again" in err.splitlines()[-1] and out == ""
    assert len(workers) == 2 and not any(map(is_alive, workers))
    assert not list(tmp_path.glob("made/*.gguf"))
    summary = json.loads((tmp_path / "jobs.toml.requant" / "summary.json").read_text())
    assert statuses(summary) == ["stopped", "stopped", "not started"]
    if number == signal.SIGTERM:
        found, err = batch(jobs, "--jobs", 2)
        assert statuses(found) == ["done"] * 3 and err.count("resuming") == 2
        assert run(capsys, "convert", source, tmp_path / "alone.gguf", "--type", "Q8_0").code == 0
        assert (tmp_path / "alone.gguf").read_bytes() == (tmp_path / "made" / "Q8_0.gguf").read_bytes()


def children(process):
    """The processes that `process` has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process.pid:
            found.append(int(path.parent.name))
    return found


def is_alive(pid):
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_batch_that_is_killed_leaves_no_worker_and_is_taken_up_again(tmp_path, slowly):
    budgets = [{"type": "Q8_0"}, {"type": "Q4_0"}]
    job = {"source": some_model(tmp_path), "output": "made/{encoding}.gguf", "budgets": budgets}
    jobs = write_jobs(tmp_path, [job])
    process = start("batch", jobs, env=slowly)
    until((tmp_path / "made" / "Q8_0.gguf.part").exists, process)
    (working,) = children(process)
    process.kill()
    process.communicate()
    end = time.monotonic() + 5
    while is_alive(working):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not list(tmp_path.glob("made/*.gguf"))
    assert statuses(batch(jobs)[0]) == ["done", "done"]


def test_a_worker_that_is_killed_is_one_failure(tmp_path, slowly):
    budgets = [{"type": "Q8_0"}, {"type": "Q4_0"}]
    job = {"source": some_model(tmp_path), "output": "made/{encoding}.gguf", "budgets": budgets}
    jobs = write_jobs(tmp_path, [job])
    process = start("batch", jobs, "--keep-going", "--json", env=slowly)
    until((tmp_path / "made" / "Q8_0.gguf.part").exists, process)
    os.kill(children(process)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    found = json.loads(out)
    assert process.returncode == found["exit_code"] == 9 and statuses(found) == ["failed", "done"]
    assert found["jobs"][0]["exit_code"] == 137 and "was killed by SIGKILL" in found["jobs"][0]["error"]
    assert "1 of 2 outputs are done" in err.splitlines()[-1]
    assert statuses(batch(jobs)[0]) == ["done", "skipped"]


@pytest.mark.parametrize(("words", "code", "expected"), [((), 5, "not started"), (("--keep-going",), 9, "done")])
def test_a_failure_stops_what_has_not_begun_unless_told_to_keep_going(tmp_path, words, code, expected):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "Q8_0.gguf").write_text("something of the user's")
    budgets = [{"type": "Q8_0"}, {"type": "Q4_0"}]
    job = {"source": some_model(tmp_path), "output": "made/{encoding}.gguf", "budgets": budgets}
    jobs = write_jobs(tmp_path, [job])
    found, err = batch(jobs, *words, code=code)
    assert statuses(found) == ["failed", expected] and found["jobs"][0]["exit_code"] == 5
    assert "already exists" in found["jobs"][0]["error"] and "failed (5)" in err
    assert (tmp_path / "made" / "Q8_0.gguf").read_text() == "something of the user's"
    assert (tmp_path / "made" / "Q4_0.gguf").exists() == (expected == "done")


def test_a_budget_that_cannot_be_kept_and_a_file_that_is_no_model_are_told_before_any_scoring(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"no model at all, but long enough to be one")
    good = {"source": TINY, "output": "{encoding}.gguf", "budgets": [{"size": "1KiB"}, {"preset": "Q4_K_M"}]}
    jobs = write_jobs(tmp_path, [{"source": "*.gguf", "bpw": 4.5}, good])
    found, err = batch(jobs, code=3)
    assert statuses(found) == ["failed", "not started", "not started"] and names(tmp_path / "jobs.toml.requant") == [
        "lock",
        "summary.json",
    ]
    found, err = batch(jobs, "--keep-going", code=9)
    assert statuses(found) == ["failed", "failed", "done"] and "scoring" not in err
    assert [row["exit_code"] for row in found["jobs"]] == [3, 4, 0]
    assert "bad.gguf" in found["jobs"][0]["error"] and "FILE1K" in err


def test_a_failure_says_its_path_once(capsys, tmp_path):
    empty = tmp_path / "empty.gguf"
    empty.write_bytes(b"")
    ran = run(capsys, "batch", write_jobs(tmp_path, [{"source": "empty.gguf", "bpw": 4.5}]))
    assert ran.code == 3 and ran.out.splitlines()[-1] == f"{empty}: is empty (got 0 bytes, expected a GGUF file)"
    jobs = tmp_path / "none.toml"
    jobs.write_text("")
    assert_failed(run(capsys, "batch", jobs), 3, f"requant: error: {jobs}: needs a [[job]]")


def test_a_limit_that_one_output_meets_does_not_break_the_others(tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 2**20, 8 * 2**20))

    job = {"source": TINY, "output": "{encoding}.gguf", "budgets": [{"type": "Q8_0"}, {"type": "Q4_0"}]}
    found, _ = batch(write_jobs(tmp_path, [job]), "--keep-going", "--jobs", 2, code=9, preexec_fn=limited)
    assert statuses(found) == ["failed", "done"] and found["jobs"][0]["exit_code"] == 6


def test_damaged_state_is_told_and_made_again(tmp_path):
    jobs = write_jobs(tmp_path, [{"source": TINY, "output": "{encoding}.gguf", "bpw": 4.5}], **GRADIENTS)
    assert statuses(batch(jobs)[0]) == ["done"]
    (out,) = tmp_path.glob("*.gguf")
    data, kept = out.read_bytes(), tmp_path / "jobs.toml.requant"
    (made,) = kept.glob("outputs/*.json")
    made.write_text(made.read_text()[:-20])
    found, err = batch(jobs)  # the output's own record says that it is what would be made
    assert statuses(found) == ["skipped"] and "warning" in err and "own record counts" in err and "scoring" not in err
    made.unlink()
    assert statuses(batch(jobs)[0]) == ["skipped"]
    out.unlink()
    Path(f"{out}.requant.json").unlink()
    for path in [*kept.glob("scores/*/*.imatrix.gguf"), *kept.glob("plans/*/plan.json")]:
        path.write_bytes(path.read_bytes()[:-20])
    found, err = batch(jobs)
    assert sum("it is made again" in line for line in err.splitlines()) == 2 and err.count("requant: scoring") == 1
    assert statuses(found) == ["done"] and out.read_bytes() == data


def test_an_output_that_was_cut_or_taken_away_is_not_counted_as_done(tmp_path):
    job = {"source": some_model(tmp_path), "output": "{encoding}.gguf", "type": "Q4_0"}
    jobs = write_jobs(tmp_path, [job])
    batch(jobs)
    out = tmp_path / "Q4_0.gguf"
    data = out.read_bytes()
    out.write_bytes(data[:-100])
    assert "already exists" in batch(jobs, code=5)[1]
    out.unlink()
    assert statuses(batch(jobs, "--force")[0]) == ["done"] and out.read_bytes() == data


def test_a_folder_with_its_own_outputs_in_it_is_the_same_batch_again(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    write_files(models, split_model())
    small_model().write(models / "one.gguf")
    small_model().write(models / "mmproj-one.gguf")
    jobs = write_jobs(tmp_path, [{"source": "models", "output": "models/{stem}-{encoding}.gguf", "type": "Q8_0"}])
    found, err = batch(jobs)
    made = [Path(row["output"]).name for row in found["jobs"]]
    assert statuses(found) == ["done", "done"] and made == ["m-Q8_0.gguf", "one-Q8_0.gguf"]
    assert "mmproj-one.gguf is no source" in err
    again, _ = batch(jobs)
    assert statuses(again) == ["skipped", "skipped"] and len(again["no_sources"]) == 3


def test_splits_come_out_as_they_went_in(tmp_path):
    write_files(tmp_path, split_model())
    job = {
        "source": "m-00002-of-00002.gguf",
        "output": "out/{stem}-{encoding}.gguf",
        "type": "Q8_0",
        "keep_split": True,
    }
    jobs = write_jobs(tmp_path, [job])
    found, _ = batch(jobs)
    made = [f"m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert set(made) < set(names(tmp_path / "out")) and Path(found["jobs"][0]["output"]).name == made[0]
    assert found["jobs"][0]["size"] == sum((tmp_path / "out" / name).stat().st_size for name in made)
    assert statuses(batch(jobs)[0]) == ["skipped"]


def test_a_dry_run_shows_the_matrix_and_writes_nothing(capsys, tmp_path, losses):
    small_model().write(tmp_path / "m.gguf")
    budgets = [{"bpw": 4.5}, {"vram": "12MiB", "ctx": 512}]
    known = {"source": TINY, "output": "{stem}-{encoding}.gguf", "budgets": budgets}
    known |= {"losses": losses, "imatrix": IMATRIX}
    unknown = {"source": TINY, "output": "new-{stem}-{encoding}.gguf", "bpw": 4.5, "quick": True}
    jobs = write_jobs(tmp_path, [known, unknown])
    ran = run(capsys, "batch", jobs, "--dry-run", "--json")
    found = json.loads(ran.out)
    assert ran.code == 0 and names(tmp_path) == ["jobs.toml", "m.gguf"] and statuses(found) == ["planned"] * 3
    first, second, third = found["jobs"]
    assert first["output"].endswith("_BPW4_5.gguf") and second["output"].endswith("_12M_CTX512.gguf")
    assert first["predicted_loss"] > 0 and first["size"] > 0 and second["bpw"] > 0
    assert third["output"].endswith("new-tiny-llama-f16-?.gguf") and third["size"] is None
    out = tmp_path / "out.gguf"
    asked = ("--losses", losses, "--imatrix", IMATRIX, "--bpw", 4.5)
    assert run(capsys, "convert", TINY, out, *asked).code == 0 and out.stat().st_size == first["size"]
    table = run(capsys, "batch", jobs, "--dry-run").out.splitlines()
    assert table[0].split() == ["source", "budget", "output", "size", "bits/weight", "loss", "-ub"] and len(table) == 6


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"vram": "12G"}, "[[job]] 1: --vram: '12G' is not a size"),
        ({"vram": "8GiB,12GiB"}, "[[job]] 1: vram is one size; write an entry of budgets for each"),
        ({}, "[[job]] 1: nothing decides the types"),
        ({"vram": "8GiB", "preset": "Q4_K_M"}, "cannot be given together"),
        ({"ctx": 512, "bpw": 4}, "[[job]] 1: --ctx says how memory is spent"),
        ({"budgets": [{"bpw": 4}, {"type": "Q9_K"}]}, "[[job]] 1, budget 2"),
        ({"bpw": 4, "quick": True, "text": "jobs.toml"}, "[[job]] 1: --quick scores without data"),
        ({"bpw": 4, "measure": 65}, "[[job]] 1: invalid value for '--measure'"),
        ({"bpw": 4, "force": True}, "key 'force' is not known"),
        ({"bpw": 4, "output": "{nmae}.gguf"}, "did you mean {name}?"),
        ({"output": "x.gguf", "budgets": [{"bpw": 4}, {"bpw": 5}]}, "would both be"),
        ({"imatrix": "none.gguf", "bpw": 4}, "[[job]] 1: key 'imatrix': no file"),
        ({"source": "none.gguf", "bpw": 4}, "no file is called 'none.gguf'"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_before_anything_is_done(capsys, tmp_path, job, said):
    jobs = write_jobs(tmp_path, [{"source": TINY} | job])
    assert_failed(run(capsys, "batch", jobs), 3, str(jobs), said)
    assert names(tmp_path) == ["jobs.toml"]


def test_names_that_only_the_plans_tell_to_be_one_are_refused_before_anything_is_written(tmp_path, losses):
    budgets = [{"bpw": 4.5, "label": "A"}, {"bpw": 4.6, "label": "A"}]
    job = {"source": TINY, "losses": losses, "imatrix": IMATRIX, "output": "{encoding}.gguf", "budgets": budgets}
    process = start("batch", write_jobs(tmp_path, [job]))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3 and "would both be" in err and not list(tmp_path.glob("*.gguf"))


def test_an_output_that_is_a_source_is_refused_whatever_is_forced(capsys, tmp_path):
    source = small_model().write(tmp_path / "m.gguf")
    (tmp_path / "link.gguf").symlink_to(source)
    data = source.read_bytes()
    for output in ("m.gguf", "link.gguf"):
        jobs = write_jobs(tmp_path, [{"source": "m.gguf", "output": output, "type": "Q8_0"}])
        assert_failed(run(capsys, "batch", jobs, "--force"), 5, "would replace an input of this batch")
    assert source.read_bytes() == data


def test_a_second_run_on_the_same_batch_is_refused(capsys, tmp_path):
    jobs = write_jobs(tmp_path, [{"source": TINY, "type": "Q4_0"}])
    state = tmp_path / "elsewhere"
    state.mkdir()
    with (state / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_failed(run(capsys, "batch", jobs, "--state", state), 5, "another run is at work on this batch")


def test_importance_is_emitted_only_where_it_is_measured(capsys, tmp_path):
    asked = ("score", TINY, "--json", "--emit-imatrix", tmp_path / "i.gguf")
    assert_failed(run(capsys, *asked, "--quick"), 2, "--emit-imatrix: nothing is measured")
    assert_failed(run(capsys, *asked, "--imatrix", IMATRIX), 2, "--emit-imatrix: nothing is measured")
    assert names(tmp_path) == []


def test_every_option_of_convert_that_says_what_an_output_becomes_is_a_key(tmp_path):
    jobs = write_jobs(
        tmp_path,
        [
            {
                "source": TINY,
                "budgets": [{"vram": "1GiB"}],
                "ram": "1GiB",
                "types": ["Q4_K", "Q6_K"],
                "bandwidth": "gpu=400,cpu=50",
                "tensor-type": ["ffn_down=Q6_K"],
                "output-tensor-type": "Q6_K",
                "group": "attn_q|attn_k",
                "allow-requantize": True,
                "threads": 1,
                "effort": "fast",
            }
        ],
    )
    (item,) = read_jobs(jobs).items
    assert (
        item.options.request.types == ("Q4_K", "Q6_K")
        and item.options.request.ram == 2**30
        and item.options.request.groups
    )
    assert item.convert_words() == ["--allow-requantize", "--threads=1"]
    assert item.score_arguments() == ["--allow-requantize", "--effort=fast"]


def test_master_weights_below_q8_0_are_copied_in_every_job(capsys, tmp_path):
    """As gpt-oss, whose experts are released in MXFP4; a job that rounds them again is scored apart."""
    made, pins = tmp_path / "made.gguf", ("--type", "F16", "--tensor-type", "ffn_=MXFP4")
    assert run(capsys, "convert", TINY, made, *pins).code == 0
    usual = {"source": made, "quick": True, "types": ["Q2_K", "Q4_K", "Q6_K"]}
    jobs = [
        usual | {"output": "{budget}.gguf", "budgets": [{"size": "5MB"}, {"size": "6MB"}, {"size": "3.6MB"}]},
        usual | {"output": "again-{budget}.gguf", "budgets": [{"size": "3.6MB"}], "allow_requantize": True},
    ]
    found, err = batch(write_jobs(tmp_path, jobs), "--keep-going", code=9)
    rows = found["jobs"]
    assert [row["status"] for row in rows].count("failed") == 1, (rows, err)
    assert "the 30 tensors that are already below Q8_0" in err + json.dumps(rows)
    limits = {"FILE5MB.gguf": 5e6, "FILE6MB.gguf": 6e6, "again-FILE3600000B.gguf": 3.6e6}
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*FILE*.gguf")}
    assert sizes.keys() == limits.keys() and all(sizes[name] <= limits[name] for name in limits)
    for name in sizes:
        plan = json.loads((tmp_path / f"{name}.requant.json").read_text())["plan"]
        types = {c["type"] for c in plan["choices"] if "ffn_" in c["name"] and "norm" not in c["name"]}
        assert (types == {"MXFP4"}) != name.startswith("again"), (name, types)
        noted = any("30 of its tensors" in note and "are copied" in note for note in plan["notes"])
        assert noted != name.startswith("again")

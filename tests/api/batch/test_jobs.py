"""The table of jobs, its sources, the outputs' names, the state and the summary of a batch."""

import re
from pathlib import Path

import gguf
import pytest
from conversions import plan_for, small_model
from draft_heads import eagle3, prediction_head
from gguf_files import ARCHITECTURE, STR, File, pair, split_files, write_files
from hypothesis import given
from hypothesis import strategies as st

from requant.api.batch import state
from requant.api.batch.jobs import DEFAULT_OUTPUT, JobBudget, KeyOption, read_jobs
from requant.api.batch.names import budget_label, check_template, encoding_label, output_path, template_fields
from requant.api.batch.sources import OWN, BatchSource, find_sources, read_source
from requant.api.batch.summary import SOME, Incomplete, Summary
from requant.container.metadata import Metadata
from requant.container.source import open_source
from requant.errors import BadInput, OutputRefused

KEYS = {
    **{
        name: KeyOption(f"--{name}", name, "one")
        for name in ("vram", "ctx", "size", "bpw", "max-loss", "type", "preset")
    },
    "imatrix": KeyOption("--imatrix", "imatrix", "one", is_path=True),
    "tensor-type": KeyOption("--tensor-type", "pins", "several"),
    "types": KeyOption("--types", "types", "commas"),
    "quick": KeyOption("--quick", "quick", "flag"),
}
TAG = re.compile(r"[-.]([A-Z0-9_]+)$")  # llama.cpp's -hf repo:TAG, in front of .gguf


def jobs_of(tmp_path, text):
    path = tmp_path / "jobs.toml"
    path.write_text(text)
    return read_jobs(path, KEYS)


def budget(own=(), label=None, **words):
    words = {key.replace("_", "-"): value for key, value in words.items()}
    return JobBudget("[[job]] 1", {key: (f"--{key}={value}",) for key, value in words.items()}, frozenset(own), label)


def metadata(**values):
    return Metadata("m.gguf", {}).with_values({f"general.{key}": ("str", value) for key, value in values.items()})


def test_defaults_a_job_and_its_budgets_are_laid_on_each_other(tmp_path):
    first, second = jobs_of(
        tmp_path,
        """
        [defaults]
        output = "out/{stem}-{encoding}.gguf"
        quick = true
        ctx = 4096
        [[job]]
        source = ["a.gguf", "more/*.gguf"]
        imatrix = "a.imatrix"
        types = ["Q4_K", "Q6_K"]
        budgets = [{vram = "8GiB"}, {vram = "12GiB", ctx = 16384, label = "BIG"}]
        [[job]]
        source = "b.gguf"
        quick = false
        bpw = 4.5
        output = "{stem}.gguf"
        tensor-type = ["ffn=Q4_K", "attn_v=Q6_K"]
        """,
    )
    assert first.sources == ("a.gguf", "more/*.gguf") and first.output == "out/{stem}-{encoding}.gguf"
    small, big = first.budgets
    assert small.words == {
        "ctx": ("--ctx=4096",),
        "imatrix": (f"--imatrix={tmp_path / 'a.imatrix'}",),
        "quick": ("--quick",),
        "types": ("--types=Q4_K,Q6_K",),
        "vram": ("--vram=8GiB",),
    }
    assert big.words["ctx"] == ("--ctx=16384",) and (small.label, big.label) == (None, "BIG")
    assert big.own == {"vram", "ctx"} and big.where == "[[job]] 1, budget 2"
    (only,) = second.budgets
    assert only.words == {
        "bpw": ("--bpw=4.5",),
        "ctx": ("--ctx=4096",),
        "tensor-type": ("--tensor-type=ffn=Q4_K", "--tensor-type=attn_v=Q6_K"),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[job]]\nsource = 'a'\nvrma = '1GiB'", "[[job]] 1: key 'vrma' is not known; did you mean vram?"),
        ("[[job]]\nsource = 'a'\nbudgets = [{vram = '1GiB'}, {sise = '1GiB'}]", "[[job]] 1, budget 2: key 'sise'"),
        ("[default]\n[[job]]\nsource = 'a'", "did you mean defaults?"),
        ("[defaults]\nsource = 'a'\n[[job]]\nsource = 'a'", "[defaults]: key 'source' is not known"),
        ("[[job]]\nbpw = 4", "[[job]] 1: says no source"),
        ("[defaults]\nbpw = 4", "needs a [[job]]"),
        ("job = 3", "needs a [[job]]"),
        ("[[job]]\nsource = []", "key 'source' must be a string or a list of strings"),
        ("[[job]]\nsource = [1]", "key 'source' must be a string or a list of strings (got [1])"),
        ("[[job]]\nsource = 'a'\nquick = 'yes'", "key 'quick' must be true or false (got 'yes')"),
        ("[[job]]\nsource = 'a'\nbpw = [4, 5]", "key 'bpw' must be a string or a number"),
        ("[[job]]\nsource = 'a'\nbpw = nan", "key 'bpw' must be a string or a number (got nan)"),
        ("[[job]]\nsource = 'a'\nbpw = 2026-01-01", "key 'bpw' must be a string or a number"),
        ("[[job]]\nsource = 'a'\nimatrix = 3", "key 'imatrix' must be the path of a file (got 3)"),
        ("[[job]]\nsource = 'a'\ntypes = [3]", "key 'types' must be a string or a list of strings"),
        ("[[job]]\nsource = 'a'\nbudgets = []", "key 'budgets' must be a list of tables"),
        ("[[job]]\nsource = 'a'\nbudgets = ['8GiB']", "[[job]] 1, budget 1: must be a table (got '8GiB')"),
        ("[[job]]\nsource = 'a'\nlabel = 'X'\nbudgets = [{bpw = 4}]", "key 'label' is of one budget"),
        ("[[job]]\nsource = 'a'\nbudgets = [{bpw = 4, label = 'a/b'}]", "key 'label' must be capital letters"),
        ('[[job]]\nsource = "a\\u0000"', "key 'source' must be"),
        ("[[job]\nsource = 'a'", "is not valid TOML"),
        ("[[job]]\nsource = 'a'\nsource = 'b'", "is not valid TOML"),
    ],
)
def test_a_mistake_is_told_with_its_file_table_and_key(tmp_path, text, said):
    with pytest.raises(BadInput) as caught:
        jobs_of(tmp_path, text)
    line = str(caught.value)
    assert line.startswith(str(tmp_path / "jobs.toml")) and said in line and "\n" not in line


def test_a_folder_is_its_models_and_of_a_split_one_the_first_shard(tmp_path):
    jobs = tmp_path / "jobs.toml"
    models = tmp_path / "models"
    models.mkdir()
    for name in ("b.gguf", "a.gguf", "a-mmproj.gguf", "a.imatrix.gguf"):
        small_model().write(models / name)
    write_files(models, split_files(3, stem="c"))
    (models / "x.gguf.part").write_bytes(b"half")
    (models / "readme.txt").write_bytes(b"text")
    made = small_model(pairs=(pair("requant.plan_sha256", STR, "0"),)).write(models / "a-Q4_K.gguf")
    File((pair("general.type", STR, "adapter"),)).write(models / "lora.gguf")
    File((pair(ARCHITECTURE, STR, "clip"),)).write(models / "vision.gguf")
    File((pair(ARCHITECTURE, STR, "controlvector"),)).write(models / "v.gguf")
    prediction_head().write(models / "mtp-a.gguf")
    eagle3().write(models / "eagle3-a.gguf")
    found = find_sources(jobs, "[[job]] 1", ["models"])
    assert list(found) == sorted(found) and not any(found.values())
    assert sum(path.name.startswith("c-0000") for path in found) == 1
    seen = {path.name: read_source(path, named=False) for path in found}
    models_ = [name for name, what in seen.items() if isinstance(what, BatchSource)]
    assert models_ == ["a.gguf", "b.gguf", "c-00001-of-00003.gguf"]
    assert seen["a-Q4_K.gguf"] == OWN and "adapter" in seen["lora.gguf"]
    assert "projector" in seen["vision.gguf"] and "control vector" in seen["v.gguf"]
    assert "head of multi-token prediction" in seen["mtp-a.gguf"] and "EAGLE-3" in seen["eagle3-a.gguf"]
    assert isinstance(read_source(models / "mtp-a.gguf", named=True), BatchSource)
    assert "mmproj" in seen["a-mmproj.gguf"] and "imatrix" in seen["a.imatrix.gguf"]
    assert len(seen["c-00001-of-00003.gguf"].identity["files"]) == 3
    assert isinstance(read_source(made, named=True), BatchSource)  # asked for by name


def test_patterns_paths_and_shards_stand_for_models_once(tmp_path):
    jobs = tmp_path / "jobs.toml"
    write_files(tmp_path, split_files(2, stem="m"))
    small_model().write(tmp_path / "odd[1].gguf")
    first = tmp_path / "m-00001-of-00002.gguf"
    assert find_sources(jobs, "", ["m-00002-of-00002.gguf", "m-*.gguf"]) == {first: True}
    assert list(find_sources(jobs, "", ["odd[1].gguf"])) == [tmp_path / "odd[1].gguf"]
    assert list(find_sources(jobs, "", ["**/m-*"])) == [first]
    for pattern in ("none-*.gguf", "none.gguf"):
        with pytest.raises(BadInput, match="no file is called 'none"):
            find_sources(jobs, "[[job]] 1", [pattern])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no model in 'empty'"):
        find_sources(jobs, "[[job]] 1", ["empty"])


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("Qwen3-8B-Instruct-v1.1-F16.gguf", {}, "Qwen3-8B-Instruct-v1.1"),
        ("Qwen3-30B-A3B-BF16-00001-of-00002.gguf", {}, "Qwen3-30B-A3B"),
        ("Mixtral-8x7B-Q8_0.gguf", {}, "Mixtral-8x7B"),
        ("tiny-llama-f16.gguf", {}, "tiny-llama-1.5M"),
        ("model.gguf", {"basename": "Llama 3.2", "size_label": "1B", "finetune": "Chat"}, "Llama-3.2-1B-Chat"),
        ("x-7B.gguf", {"basename": "y", "version": "2.0", "size_label": "big"}, "y-7B-v2.0"),
    ],
)
def test_names_are_those_of_the_convention(tmp_path, name, values, expected):
    fields = template_fields(tmp_path / name, metadata(**values), 1_500_000)
    kind = encoding_label(budget(preset="Q4_K_M"), None)
    out = output_path(tmp_path / "jobs.toml", DEFAULT_OUTPUT, budget(), kind, fields)
    assert out == tmp_path / f"{expected}-Q4_K_M.gguf"
    parts = [fields[key] or None for key in ("basename", "finetune", "version", "sizelabel")]
    assert out.stem == gguf.naming_convention(None, *parts, kind)


@pytest.mark.parametrize(
    ("given_", "label"),
    [
        (budget({"vram"}, vram="12GiB", ctx=4096), "12G"),
        (budget({"vram", "ctx"}, vram="12GiB", ctx=16384), "12G_CTX16K"),
        (budget({"ctx"}, vram="8192MiB", ctx=1000), "8G_CTX1000"),
        (budget(vram="1536MiB", max_loss=0.02, ctx="max"), "1536M_LOSS0_02"),
        (budget(size="6GB"), "FILE6GB"),
        (budget(bpw=4.5), "BPW4_5"),
        (budget(preset="Q4_K_M"), ""),
        (budget(label="MINE", vram="12GiB"), "MINE"),
    ],
)
def test_a_budget_has_a_label(given_, label):
    assert budget_label(given_) == label


def test_an_encoding_is_the_type_of_most_encoded_weights_and_the_budget(tmp_path):
    with open_source(small_model().write(tmp_path / "m.gguf")) as source:
        plan = plan_for(source, "Q4_K")
    assert encoding_label(budget({"vram"}, vram="12GiB"), plan) == "Q4_K_12G"
    assert encoding_label(budget(type="q8_0"), None) == "Q8_0" and encoding_label(budget(vram="12GiB"), None) == "?"


@given(
    st.fixed_dictionaries(
        {key: st.text(max_size=80) for key in ("name", "basename", "size_label", "finetune", "version", "architecture")}
    ),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60),
)
def test_what_a_file_says_of_itself_is_never_more_than_a_name(values, stem):
    fields = template_fields(Path("/models") / f"{stem}.gguf", metadata(**values), 10**9)
    for value in fields.values():
        assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?", value) and ".." not in value
        assert len(value) <= 65
    template = "{arch}/{name}/" + DEFAULT_OUTPUT
    out = output_path(Path("/jobs/j.toml"), template, budget(preset="Q4_K_M"), "Q4_K_M", fields)
    assert len(out.relative_to("/jobs").parts) == 3 and TAG.search(out.stem)[1] == "Q4_K_M"


@pytest.mark.parametrize(
    "value", ["../../etc/passwd", "/etc/passwd", "..", ".", ".hidden", "a\0b", "\x1b[31m", "C:\\x"]
)
def test_hostile_metadata_stays_inside_the_folder(tmp_path, value):
    fields = template_fields(tmp_path / "m-1B.gguf", metadata(basename=value, finetune=value, name=value), 1)
    out = output_path(tmp_path / "jobs.toml", "{name}/" + DEFAULT_OUTPUT, budget(), "Q4_K", fields)
    assert out.parent.parent == tmp_path and ".." not in out.parts and not out.name.startswith(".")


def test_a_template_is_checked(tmp_path):
    jobs = tmp_path / "jobs.toml"
    for template, said in {
        "{basname}.gguf": "did you mean {basename}?",
        "{name.__class__}.gguf": "no field",
        "{name!r}.gguf": "no field",
        "{name:>9}.gguf": "no field",
        "{}.gguf": "no field",
        "{name.gguf": "is no template",
        "{name}.bin": "must end in .gguf",
    }.items():
        with pytest.raises(BadInput) as caught:
            check_template(jobs, "[[job]] 1", template)
        assert said in str(caught.value) and "[[job]] 1" in str(caught.value)
    fields = template_fields(tmp_path / "m.gguf", metadata(), 1)
    for template in ("{finetune}/x.gguf", "{finetune}.gguf", ".{finetune}./x.gguf", f"{{stem}}{'x' * 300}.gguf"):
        with pytest.raises(BadInput, match="no usable name"):
            output_path(jobs, template, budget(), "Q4_K", fields)


def test_what_is_kept_answers_its_request_only_while_it_is_whole(tmp_path):
    folder = tmp_path / "plans" / "x"
    state.make_folder(folder)
    (folder / "plan.json").write_text("a plan")
    state.seal_entry(folder, "request", ["plan.json"])
    assert state.read_entry(folder, "request") == {"plan.json": folder / "plan.json"}
    assert state.read_entry(folder, "another") is None and state.read_entry(tmp_path, "request") is None
    (folder / "plan.json").write_text("b plan")
    with pytest.raises(BadInput, match="is not as it was left"):
        state.read_entry(folder, "request")
    (folder / "plan.json").unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        state.read_entry(folder, "request")
    (folder / "kept.json").write_text('{"schema": "requant.entry/1", "request": "r", "files": {"../plan.json": "0"}}')
    with pytest.raises(BadInput, match="is not as it was left"):
        state.read_entry(folder, "r")
    (folder / "kept.json").write_text("{")
    with pytest.raises(BadInput, match="not valid JSON"):
        state.read_entry(folder, "r")


def test_a_large_file_is_sealed_by_its_content_too(monkeypatch, tmp_path):
    monkeypatch.setattr(state, "_MAX_HASHED", 4)
    (tmp_path / "importance").write_text("larger than that")
    assert isinstance(state.content_key(tmp_path / "importance"), tuple)
    state.seal_entry(tmp_path, "request", ["importance"])
    assert state.read_entry(tmp_path, "request") == {"importance": tmp_path / "importance"}


def test_a_folder_of_state_is_one_runs_at_a_time(tmp_path):
    with (
        state.hold_lock(tmp_path / "s"),
        pytest.raises(OutputRefused, match="another run"),
        state.hold_lock(tmp_path / "s"),
    ):
        pass
    with state.hold_lock(tmp_path / "s"):
        pass


def test_the_newest_of_file_and_shards_is_the_output(tmp_path):
    out = tmp_path / "m[1].gguf"
    assert state.find_output(out) is None
    (first, _) = write_files(tmp_path, split_files(2, stem="m[1]"))
    assert state.find_output(out) == first
    made = state.read_output(first)
    assert made.size == sum(path.stat().st_size for path in tmp_path.glob("*.gguf")) and made.file == first.name


def summary_of(*states):
    found = Summary(Path("jobs.toml"))
    for status, code in states:
        row = found.add_row("[[job]] 1", Path("m.gguf"), "12G")
        if code:
            found.record_failure(row, code, "why")
        else:
            found.set_status(row, status)
    return found


def test_the_exit_code_tells_all_some_or_none():
    assert summary_of(("done", 0), ("skipped", 0)).exit_code == 0
    assert summary_of(("done", 0), ("failed", 4)).exit_code == SOME == 9
    assert summary_of(("not started", 0), ("failed", 4), ("failed", 6)).exit_code == 4
    assert '"failed": 1' in summary_of(("done", 0), ("failed", 4)).to_json()
    summary_of(("done", 0)).check()
    with pytest.raises(Incomplete, match="1 of 2 outputs are done"):
        summary_of(("done", 0), ("failed", 4)).check()
    with pytest.raises(Incomplete, match="1 of 2 outputs can be made"):
        summary_of(("planned", 0), ("failed", 4)).check(dry_run=True)


def test_counts_follow_the_rows_and_what_was_running_is_stopped():
    found = summary_of(("running", 0), ("done", 0), ("planned", 0))
    found.stop_running()
    assert [row.status for row in found.rows] == ["stopped", "done", "planned"]
    assert (found.counts["running"], found.counts["stopped"], found.n_good, found.counts["failed"]) == (0, 1, 2, 0)

"""`requant report`, `convert --report` and a batch's reports on the tiny model: what is written, what is refused."""

import json
import shutil

import pytest
import yaml
from commands import TINY, assert_failed, names, run

from requant.container.source import open_source
from requant.conversion.record import record_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two outputs of the tiny model with their records, one planned for VRAM and one of a single type."""
    from requant.cli import messages
    from requant.cli.main import main

    folder = tmp_path_factory.mktemp("made")
    common = ["--quick", "--threads", "2"]
    for name, how in (("a.gguf", ["--vram", "40MiB", "--ctx", "256", *common]), ("b.gguf", ["--type", "Q4_K"])):
        words = ["convert", str(TINY), str(folder / name), *how]
        assert messages.exit_code_of(lambda w=words: main.main(w, prog_name="requant", standalone_mode=False)) == 0
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the outputs to write beside."""
    for path in made.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


def evaluation(path, of, **changes):
    """What `requant evaluate --json` writes, as if measured on `of`."""
    with open_source(of) as source:
        header = source.header_sha256
    told = {
        **{
            "schema": "requant.evaluation/1",
            "n_windows": 2,
            "n_ctx": 64,
            "n_scored": 62,
            "ppl": 20.0,
            "ppl_error": 1.0,
        },
        **{"base_ppl": 19.5, "ppl_error": 1.0, "mean_kld": 0.0125, "kld_error": 0.001, "p99_kld": 0.2},
        **{"p999_kld": 0.4, "same_top": 0.95},
        **{"model": of.name, "header_sha256": header, "base": "tiny-llama-f16.gguf", "text": "eval.txt"},
    }
    path.write_text(json.dumps(told | changes))
    return path


def head(path):
    return yaml.safe_load(path.read_text().split("---\n")[1])


def test_a_card_is_made_of_a_record_of_its_output_and_of_a_folder(capsys, folder):
    cards = []
    for of in (record_path(folder / "a.gguf"), folder / "a.gguf"):
        out = folder / "card.md"
        ran = run(capsys, "report", of, "-o", out, "--force")
        assert ran.code == 0 and ran.out.startswith(f"{out}: ")
        cards.append(out.read_text())
    assert cards[0] == cards[1] and "`b.gguf`" not in cards[0]
    assert run(capsys, "report", folder, "-o", folder / "all.md").code == 0
    both = (folder / "all.md").read_text()
    assert "| `a.gguf` |" in both and "| `b.gguf` |" in both
    assert head(folder / "all.md")["license"] == "cc0-1.0"
    assert (
        run(capsys, "report", record_path(folder / "b.gguf"), folder / "a.gguf", folder, "-o", folder / "x.md").code
        == 0
    )
    assert (folder / "x.md").read_text().count("| `a.gguf` |") == 4  # files, and plan, header and file in the checksums


def test_a_card_holds_the_hashes_of_what_is_there(capsys, folder):
    import hashlib

    out = folder / "card.md"
    assert run(capsys, "report", folder / "a.gguf", "-o", out, "--source", TINY).code == 0
    for path in (folder / "a.gguf", TINY):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in out.read_text()


def test_the_record_alone_is_enough(capsys, folder):
    (folder / "a.gguf").unlink()
    ran = run(capsys, "report", record_path(folder / "a.gguf"), "-o", folder / "card.md")
    assert ran.code == 0 and "names no licence" in ran.err
    assert "license" not in head(folder / "card.md")
    assert run(capsys, "report", record_path(folder / "a.gguf"), "-o", folder / "c.md", "--source", TINY).code == 0
    assert head(folder / "c.md")["license"] == "cc0-1.0"


def test_what_is_said_of_the_model_stands_in_the_front_matter(capsys, folder):
    words = ["--base-model", "o/m", "--license", "other", "--license-name", "My Own", "--license-link", "https://x.y"]
    words += ["--language", "no", "--tag", "t", "--quantized-by", "me: too", "--repo", "me/m-GGUF"]
    ran = run(capsys, "report", folder / "a.gguf", "-o", folder / "card.md", *words)
    assert ran.code == 0 and ran.err == ""
    found = head(folder / "card.md")
    assert (found["base_model"], found["base_model_relation"], found["language"]) == ("o/m", "quantized", ["no"])
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "my-own", "https://x.y")
    assert found["quantized_by"] == "me: too" and "t" in found["tags"]
    assert "hf download me/m-GGUF a.gguf" in (folder / "card.md").read_text()


def test_a_card_shows_the_pictures_that_are_written_along(capsys, folder):
    (folder / "img").mkdir()
    ran = run(capsys, "report", folder / "a.gguf", "-o", folder / "README.md", "-o", folder / "img" / "plan.png")
    assert ran.code == 0
    assert "](img/plan.png)" in (folder / "README.md").read_text()
    assert (folder / "img" / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_a_page_has_what_was_measured_and_the_hashes_of_what_is_there(capsys, folder):
    import hashlib

    measured = evaluation(folder / "e.json", folder / "a.gguf")
    words = ["-o", folder / "p.html", "--evaluation", measured, "--source", TINY]
    assert run(capsys, "report", folder / "a.gguf", *words).code == 0
    page = (folder / "p.html").read_text()
    assert page.lower().startswith("<!doctype html>") and "0.0125" in page
    for path in (folder / "a.gguf", TINY):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in page


def test_evaluations_find_their_output(capsys, folder):
    measured = evaluation(folder / "b.json", folder / "b.gguf")
    assert run(capsys, "report", folder, "-o", folder / "card.md", "--evaluation", measured).code == 0
    rows = [
        line for line in (folder / "card.md").read_text().splitlines() if line.startswith(("| `a.gguf`", "| `b.gguf`"))
    ]
    assert "| - | - | - | - | - |" in rows[0] and "| 0.0125 | 0.2 | 95.00 % | 20.0000 | 19.5000 |" in rows[1]


def test_evaluations_of_something_else_are_refused(capsys, folder):
    out = folder / "card.md"
    other = evaluation(folder / "e.json", folder / "b.gguf")
    assert_failed(
        run(capsys, "report", folder / "a.gguf", "-o", out, "--evaluation", other), 3, "another file", "b.gguf"
    )
    old = evaluation(folder / "old.json", folder / "a.gguf", header_sha256=None)
    assert_failed(
        run(capsys, "report", folder / "a.gguf", "-o", out, "--evaluation", old), 3, "which file was measured"
    )
    one = evaluation(folder / "one.json", folder / "a.gguf")
    words = ["--evaluation", one, "--evaluation", one]
    assert_failed(run(capsys, "report", folder / "a.gguf", "-o", out, *words), 3, "second evaluation")
    assert not out.exists()


def test_another_source_is_refused(capsys, folder):
    words = ["-o", folder / "card.md", "--source", folder / "b.gguf"]
    assert_failed(run(capsys, "report", folder / "a.gguf", *words), 3, "not what the output was made from")
    assert not (folder / "card.md").exists()


def test_another_file_in_the_outputs_place_is_refused(capsys, folder):
    shutil.copy(folder / "b.gguf", folder / "a.gguf")
    ran = run(capsys, "report", record_path(folder / "a.gguf"), "-o", folder / "card.md")
    assert_failed(ran, 3, "is not the output that a.gguf.requant.json is the record of")


@pytest.mark.parametrize("name", ["", "..", "../a.gguf", "/etc/passwd"])
def test_a_record_leads_to_no_other_folder(capsys, folder, name):
    record = record_path(folder / "a.gguf")
    told = json.loads(record.read_text()) | {"output": name}
    record.write_text(json.dumps({"schema": told.pop("schema")} | told))
    ran = run(capsys, "report", record, "-o", folder / "card.md")
    assert_failed(ran, 3, "output must be the name of a file, without a folder")


def test_a_plan_has_pictures_and_no_card(capsys, folder, losses):
    plan = folder / "plan.json"
    assert run(capsys, "plan", TINY, "--losses", losses, "--bpw", "5", "-o", plan).code == 0
    assert run(capsys, "report", plan, "-o", folder / "p.svg", "-o", folder / "p.html").code == 0
    assert (folder / "p.svg").read_text().startswith("<?xml")
    assert (folder / "p.html").read_text().lower().startswith("<!doctype html>")
    assert_failed(run(capsys, "report", plan, "-o", folder / "card.md"), 3, "is a plan; a model card is of an output")


def test_plans_and_records_say_by_which_options_they_were_made(capsys, folder, losses):
    words = [
        "--losses",
        losses,
        "--vram",
        "20MiB",
        "--ctx",
        "256",
        "--tensor-type",
        "attn_v=q8_0",
        "--min-type",
        "ffn=Q4_K",
    ]
    assert run(capsys, "plan", TINY, *words, "-o", folder / "plan.json").code == 0
    found = json.loads((folder / "plan.json").read_text())
    assert found["options"] == [
        *("--vram", "20MiB", "--ctx", "256", "--tensor-type", "attn_v=Q8_0", "--min-type", "ffn=Q4_K"),
        *("--losses", "losses.json"),
    ]
    again = [w for w in found["options"] if w != "losses.json"]
    again.insert(again.index("--losses") + 1, losses)
    assert run(capsys, "plan", TINY, *again, "-o", folder / "again.json").code == 0
    assert (folder / "again.json").read_bytes() == (folder / "plan.json").read_bytes()


def test_the_commands_of_a_card_make_the_same_bytes(capsys, folder, monkeypatch):
    assert run(capsys, "report", folder / "a.gguf", "-o", folder / "card.md").code == 0
    (line,) = [x for x in (folder / "card.md").read_text().splitlines() if x.startswith("requant ")]
    shutil.copy(TINY, folder)
    before = (folder / "a.gguf").read_bytes()
    (folder / "a.gguf").unlink()
    record_path(folder / "a.gguf").unlink()
    monkeypatch.chdir(folder)
    assert run(capsys, *line.split()[1:]).code == 0
    assert (folder / "a.gguf").read_bytes() == before


def test_a_record_can_be_converted_from_like_its_plan(capsys, folder):
    record = record_path(folder / "a.gguf")
    assert run(capsys, "convert", TINY, folder / "again.gguf", "--plan", record).code == 0
    assert (folder / "again.gguf").read_bytes() == (folder / "a.gguf").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.gguf"], ["missing option '-o'"]),
        (["a.gguf", "-o", "x.txt"], ["'x.txt' says no kind of report", ".html, .md, .png, .svg"]),
        (["a.gguf", "b.gguf", "-o", "x.png"], ["of one output; 2 were given"]),
        (["a.gguf", "-o", "x.svg", "--license", "mit"], ["is for a model card"]),
        (["a.gguf", "-o", "x.svg", "--source", "a.gguf"], ["a picture is of a plan alone"]),
        (["a.gguf", "-o", "x.md", "--repo", "https://huggingface.co/a/b"], ["no OWNER/NAME"]),
        (["a.gguf", "-o", "x.md", "-o", "./x.md"], ["two reports would be one file"]),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(capsys, folder, monkeypatch, words, said):
    monkeypatch.chdir(folder)
    before = names(folder)
    assert_failed(run(capsys, "report", *words), 2, *said)
    assert names(folder) == before


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("mine.md", ["already exists", "--force"]),
        ("link.md", ["one of the inputs", "--force does not help"]),
    ],
)
def test_what_exists_is_kept(capsys, folder, target, said):
    (folder / "mine.md").write_text("mine")
    (folder / "link.md").symlink_to(folder / "a.gguf")
    words = ["--force"] if target == "link.md" else []
    assert_failed(run(capsys, "report", folder / "a.gguf", "-o", folder / target, *words), 5, *said)
    assert (folder / "mine.md").read_text() == "mine"
    assert (folder / "a.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ("empty", ["holds no record of an output"]),
        ("bare.gguf", ["has no record beside it: no bare.gguf.requant.json"]),
        ("text.json", ["is not valid JSON"]),
        ("jobs.toml", ["the batch has not been run"]),
    ],
)
def test_what_is_no_record_is_bad_input(capsys, folder, of, said):
    (folder / "empty").mkdir()
    shutil.copy(TINY, folder / "bare.gguf")
    (folder / "text.json").write_text("{")
    (folder / "jobs.toml").write_text("")
    assert_failed(run(capsys, "report", folder / of, "-o", folder / "x.md"), 3, *said)


# convert --report


def test_convert_writes_its_reports(capsys, tmp_path):
    out, card, picture = tmp_path / "o.gguf", tmp_path / "README.md", tmp_path / "p.svg"
    assert run(capsys, "convert", TINY, out, "--type", "Q5_K", "--report", card, "--report", picture).code == 0
    text = card.read_text()
    assert "](p.svg)" in text and "| `tiny-llama-f16.gguf` | source |" in text
    assert "requant convert tiny-llama-f16.gguf o.gguf --type Q5_K" in text


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--report", "o.gguf.requant.json"], 2, "says no kind of report"),
        (["--report", "taken.md"], 5, "already exists"),
        (["--report", "none/x.md"], 6, "there is no such folder"),
        (["--report", "taken.md", "--dry-run"], 5, "already exists"),
        (["--report", "none/x.md", "--dry-run"], 6, "there is no such folder"),
    ],
)
def test_a_report_that_cannot_be_is_told_before_the_work(capsys, tmp_path, words, code, said):
    words = [str(tmp_path / word) if "." in word else word for word in words]
    (tmp_path / "taken.md").write_text("mine")
    ran = run(capsys, "convert", TINY, tmp_path / "o.gguf", "--type", "Q5_K", *words)
    assert_failed(ran, code, said)
    assert names(tmp_path) == ["taken.md"]


# batches

JOBS = """
[report]
card = "out/README.md"
beside = ["svg", "html"]
base-model = "o/m"

[[job]]
source = "tiny.gguf"
output = "out/{stem}-{encoding}.gguf"
budgets = [ { type = "Q4_K" }, { preset = "Q5_K_M" } ]
"""


def test_a_batch_has_a_card_of_all_and_a_picture_beside_each(capsys, tmp_path):
    shutil.copy(TINY, tmp_path / "tiny.gguf")
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(JOBS)
    assert run(capsys, "batch", jobs).code == 0
    made = sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".md", ".svg", ".html"))
    assert made == ["README.md", "tiny-Q4_K.html", "tiny-Q4_K.svg", "tiny-Q5_K_M.html", "tiny-Q5_K_M.svg"]
    card = tmp_path / "out" / "README.md"
    assert head(card)["base_model"] == "o/m"
    assert "| `tiny-Q4_K.gguf` |" in card.read_text() and "| `tiny-Q5_K_M.gguf` |" in card.read_text()

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(capsys, "batch", jobs).code == 0
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}  # nothing is new

    card.write_text(card.read_text() + "\nby hand\n")
    ran = run(capsys, "batch", jobs)
    assert ran.code == 0 and "was edited since it was written" in ran.err
    assert card.read_text().endswith("by hand\n")
    assert run(capsys, "batch", jobs, "--force").code == 0
    assert "by hand" not in card.read_text()

    assert run(capsys, "report", jobs, "-o", tmp_path / "again.md", "--base-model", "o/m", "--source", TINY).code == 0
    hashes = [line for line in card.read_text().splitlines() if "| output |" in line]
    assert hashes and all(line in (tmp_path / "again.md").read_text() for line in hashes)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("[report]\n", "says no card, and nothing beside"),
        ("[report]\ncard = 'x.txt'\n", "ends in .md"),
        ("[report]\nbeside = ['pdf']\n", "is a list of html, png, svg"),
        ("[report]\ncard = 'x.md'\nlicence = 'mit'\n", "did you mean license?"),
        ("[report]\ncard = 'x.md'\nrepo = 'nowhere'\n", "no OWNER/NAME"),
        ("[report]\nbeside = ['svg']\nlicense = 'mit'\n", "key 'license' is for a card"),
        ("report = 1\n", "must be a table"),
    ],
)
def test_a_wrong_report_table_is_told_before_the_work(capsys, tmp_path, table, said):
    shutil.copy(TINY, tmp_path / "tiny.gguf")
    (tmp_path / "jobs.toml").write_text(table + JOBS.split("\n\n", 1)[1])
    assert_failed(run(capsys, "batch", tmp_path / "jobs.toml"), 3, said)
    assert names(tmp_path) == ["jobs.toml", "tiny.gguf"]


def test_a_card_of_somebody_else_stops_the_batch_before_it_works(capsys, tmp_path):
    shutil.copy(TINY, tmp_path / "tiny.gguf")
    (tmp_path / "jobs.toml").write_text(JOBS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    assert_failed(run(capsys, "batch", tmp_path / "jobs.toml"), 5, "README.md: already exists")
    assert (tmp_path / "out" / "README.md").read_text() == "mine" and names(tmp_path / "out") == ["README.md"]

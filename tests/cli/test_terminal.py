"""Pictures and levels: what is shown on a terminal, what in a pipe, and how much is said."""

import pytest
from commands import TINY, assert_failed, run, spawn
from ptys import SGR, on_terminal, plain

from requant.errors import UsageError

BLOCK = "\u2588"


@pytest.fixture
def plan(losses):
    return ["plan", TINY, "--losses", losses, "--vram", "12MiB", "--ctx", "512"]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_picture_is_coloured_and_as_wide_as_the_terminal_at_most(plan, columns):
    code, shown, _ = on_terminal(*plan, columns=columns)
    assert code == 0 and SGR.search(shown) and BLOCK in shown
    picture = plain(shown).split("\n\n")[0].splitlines()
    assert picture[0].startswith("layer") and "bits per weight" in picture[0] and "size" in picture[0]
    assert columns / 2 < max(map(len, picture)) <= columns
    assert any(line.startswith("output ") for line in picture) and len(picture) < 16


def test_the_picture_of_a_model_stands_under_its_facts():
    code, shown, _ = on_terminal("inspect", TINY)
    facts, picture, types = plain(shown).split("\n\n")[:3]
    assert code == 0 and facts.startswith("file") and picture.startswith("layer") and types.startswith("type")
    assert "0-9 " in picture and " 16.01 " in picture  # ten layers alike: F16, and norms in F32
    assert max(map(len, facts.splitlines())) <= 80


def test_convert_shows_the_picture_of_its_plan(plan, tmp_path):
    code, shown, _ = on_terminal("convert", TINY, tmp_path / "out.gguf", *plan[2:], "--dry-run")
    assert code == 0 and BLOCK in shown


def test_a_pipe_gets_neither_picture_nor_colours(plan):
    for words in (plan, ["inspect", TINY]):
        ran = spawn(*words)
        assert ran.code == 0 and BLOCK not in ran.out and "\x1b" not in ran.out and "bits per weight  " not in ran.out


def test_json_is_json_on_a_terminal_too(plan):
    code, shown, _ = on_terminal(*plan, "--json")
    assert code == 0 and shown.startswith("{") and "\x1b" not in shown


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}], ids=str)
def test_without_colours_the_bars_are_digits(plan, env):
    code, shown, _ = on_terminal(*plan, env=env)
    assert code == 0 and "\x1b" not in shown and BLOCK not in shown
    assert "8888" in shown.split("\n\n")[0] and "88 Q8_0" in shown


def test_an_encoding_without_blocks_gets_digits_in_colour(plan):
    code, shown, _ = on_terminal(*plan, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert code == 0 and shown.isascii() and SGR.search(shown) and "8888" in shown


@pytest.mark.parametrize("name", ["FORCE_COLOR", "CLICOLOR_FORCE"])
def test_colours_can_be_forced_into_a_pipe(plan, name, monkeypatch):
    for value, drawn in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(name, value)
        assert bool(SGR.search(spawn(*plan).out)) is drawn


def test_columns_is_the_width_where_it_is_given(plan):
    _, shown, _ = on_terminal(*plan, columns=200, env={"COLUMNS": "70"})
    assert max(map(len, plain(shown).split("\n\n")[0].splitlines())) <= 70


def test_quiet_leaves_errors_and_the_result(capsys, losses):
    words = ["plan", TINY, "--losses", losses, "--bpw", "4.5"]
    loud, quiet = run(capsys, *words, "--ctx", "9999", "--vram", "1GiB"), run(capsys, *words, "-q")
    assert quiet.err == "" and quiet.out and loud.code == 0
    assert_failed(run(capsys, "-q", "inspect", "nowhere.gguf"), 3, "no such file")
    assert_failed(run(capsys, "inspect", "-q", "nowhere.gguf"), 3, "no such file")


def test_quiet_leaves_out_warnings(capsys, tmp_path):
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(f'[[job]]\nsource = "{tmp_path}"\noutput = "out/x.gguf"\npreset = "Q4_K_M"\n')
    (tmp_path / "m.gguf").write_bytes(TINY.read_bytes())
    (tmp_path / "mmproj-m.gguf").write_bytes(b"GGUF")
    words = ["batch", jobs, "--dry-run"]
    loud, quiet = run(capsys, *words).err, run(capsys, *words, "--quiet").err
    assert "warning" in loud or "failed" in loud
    assert quiet == ""


@pytest.mark.parametrize("before", [True, False])
def test_verbose_says_what_is_read_written_and_done(capsys, losses, tmp_path, before):
    out = tmp_path / "plan.json"
    words = ["plan", TINY, "--losses", losses, "--bpw", "4.5", "-o", out]
    ran = run(capsys, *(["-v", *words] if before else [*words, "-v"]))
    lines = ran.err.splitlines()
    assert ran.code == 0 and all(line.startswith("requant: ") for line in lines)
    for said in (
        f"reads {TINY}, 19.15 MiB",
        f"reads {losses}",
        f"writes {out}",
        "threads: ",
        "solving took ",
        "plan took ",
    ):
        assert any(said in line for line in lines), (said, lines)


def test_normal_says_nothing_of_that(capsys, losses):
    assert run(capsys, "plan", TINY, "--losses", losses, "--bpw", "4.5").err == ""


def test_quiet_and_verbose_exclude_each_other(capsys):
    for words in (["-q", "-v", "inspect", TINY], ["-v", "inspect", TINY, "-q"], ["inspect", TINY, "-q", "-v"]):
        ran = run(capsys, *words)
        assert ran.code == UsageError.exit_code and "cannot be given together" in ran.err

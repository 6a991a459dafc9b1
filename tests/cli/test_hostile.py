"""A stranger's files through every command: nothing in them is more than a string, wherever it comes out."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import hostile
import pytest
from commands import FIXTURES, start
from gguf_files import ARR, I32, STR, U32, pair
from hostile import EVERYTHING, MARK, NAMES
from model.forward import families

from requant.container.source import open_source
from requant.errors import printable
from requant.planning.engines import ENGINES
from requant.report.text.grid import display_width

ROOT = Path(__file__).parents[2]
ODD = "m \x1b[31m\n'\"$(touch x)`touch x`\u202e\u3164;  .gguf"  # the file's own name
TEXT = "t\x1b[2J\u202e.txt"
# of two runs; what comes before the second is done with the first one's files
FIRST = {
    "inspect": ["inspect", ODD],
    "inspect tensors": ["inspect", ODD, "--tensors"],
    "inspect json": ["inspect", ODD, "--json"],
    "score": ["score", ODD, "-o", "l.json"],
    "score quick json": ["score", ODD, "--quick", "--types", "Q4_0,Q8_0", "--imatrix", "i.gguf", "--json"],
    "score legacy": ["score", ODD, "--quick", "--types", "Q8_0", "--imatrix", "i.dat", "-o", "legacy"],
    "plan": ["plan", ODD, "--losses", "l.json", "--bpw", "7", "-o", "p.json", "--emit-tensor-types", "t.txt"],
    "plan json": ["plan", ODD, "--losses", "l.json", "--bpw", "7", "--json"],
    "plans": ["plan", ODD, "--losses", "l.json", "--vram", "8MiB,9MiB", "--ctx", "256"],
    "frontier": ["plan", ODD, "--losses", "l.json", "--frontier"],
    "frontier json": ["plan", ODD, "--losses", "l.json", "--frontier", "--json"],
    **{
        f"explain {i}": ["plan", ODD, "--losses", "l.json", "--size", "1200KiB", "--explain", name]
        for i, name in enumerate(NAMES[:3])
    },
    **{
        f"engine {name}": ["plan", ODD, "--losses", "l.json", "--ctx", "256", "--engine", name]
        + (["--vram", "8MiB"] if engine.has_gpu else ["--ram", "12MiB"])
        for name, engine in ENGINES.items()
    },
    "convert": ["convert", ODD, f"out{ODD}", "--plan", "p.json"],
    "convert json": ["convert", ODD, "json.gguf", "--plan", "p.json", "--json"],
    "convert type": ["convert", ODD, "type.gguf", "--type", "Q8_0", "--imatrix", "i.gguf"],
    "convert preset": ["convert", ODD, "preset.gguf", "--preset", "Q4_K_M", "--dry-run"],
    "like": ["plan", ODD, "--like", "type.gguf"],
    "verify": ["verify", f"out{ODD}", "--source", ODD],
    "diff": ["diff", "p.json", f"out{ODD}"],
    "diff json": ["diff", ODD, "type.gguf", "--json"],
    "calibrate": ["calibrate", "run.gguf", "--text", TEXT, "--window", "32", "--windows", "2", "-o", "s.gguf"],
    "evaluate": ["evaluate", "run.gguf", "--text", TEXT, "--window", "32", "--windows", "2"],
    "score run": [
        "score",
        "run.gguf",
        "--text",
        TEXT,
        "--window",
        "32",
        "--windows",
        "2",
        "--types",
        "Q8_0",
        "-o",
        "run.json",
    ],
}
SECOND = {
    "plan of poisoned losses": ["plan", ODD, "--losses", "l.json", "--bpw", "7"],
    "score poisoned": ["plan", ODD, "--losses", "l.json", "--bpw", "7", "--json"],
    "convert poisoned": ["convert", ODD, "again.gguf", "--plan", "p.json", "--force"],
    "dry run poisoned": ["convert", ODD, "dry.gguf", "--plan", "p.json", "--dry-run"],
    "verify poisoned": ["verify", f"out{ODD}"],
    "diff poisoned": ["diff", "p.json", "type.gguf.requant.json"],
}
# 2 usage, 3 bad input
REFUSED = {
    "names no architecture": (3, ["inspect", "arch.gguf"]),
    "control characters": (3, ["inspect", "control.gguf"]),
    "not a model at all": (3, ["inspect", "i.gguf"]),
    "pre-tokenizer": (3, ["evaluate", ODD, "--text", TEXT]),
    "tokens": (3, ["calibrate", "tokens.gguf", "--text", TEXT, "-o", "x.gguf"]),
    "tensor types": (3, ["plan", ODD, "--losses", "l.json", "--bpw", "7", "--tensor-type-file", "bad.txt"]),
    "no json": (3, ["plan", ODD, "--losses", "bad.txt", "--bpw", "7"]),
    "another schema": (3, ["plan", ODD, "--losses", "schema.json", "--bpw", "7"]),
    "another unit": (3, ["plan", ODD, "--losses", "unit.json", "--bpw", "7"]),
    "an unknown key": (3, ["plan", ODD, "--losses", "key.json", "--bpw", "7"]),
    "a double key": (3, ["plan", ODD, "--losses", "double.json", "--bpw", "7"]),
    "an engine": (3, ["convert", ODD, "x.gguf", "--plan", "engine.json"]),
    "a context": (3, ["convert", ODD, "x.gguf", "--plan", "context.json"]),
    "a cache": (3, ["convert", ODD, "x.gguf", "--plan", "cache.json"]),
    "a projector": (3, ["plan", ODD, "--losses", "l.json", "--vram", "8MiB", "--mmproj", ODD]),
    "a draft": (3, ["plan", ODD, "--losses", "l.json", "--vram", "8MiB", "--draft", "run.gguf"]),
    "a damaged output": (3, ["verify", "broken.gguf", "--source", ODD]),
    "another's plan": (3, ["verify", "run.gguf", "--plan", "p.json"]),
    "another's source": (3, ["verify", "type.gguf", "--source", "run.gguf"]),
    "an imatrix of strangers": (3, ["score", "run.gguf", "--imatrix", "i.dat", "-o", "x"]),
    "no such tensor": (2, ["plan", ODD, "--losses", "l.json", "--size", "1200KiB", "--explain", "no\x1b[31m\u202e"]),
    "no such file": (3, ["inspect", ODD + "\n"]),
}


def prepare(folder):
    (folder / ODD).write_bytes(hostile.model().encode())
    hostile.imatrix().write(folder / "i.gguf")
    (folder / "i.dat").write_bytes(hostile.legacy_imatrix("blk.0.attn_q.weight"))
    (folder / TEXT).write_text(EVERYTHING * 20, "utf-8")
    families.write("qwen3", folder / "run.gguf", vocabulary=(*families.VOCABULARY, *hostile.strings("x")[1:]))


def prepare_again(folder):
    for name, keep in (("l.json", ["skipped"]), ("p.json", []), (f"out{ODD}.requant.json", [])):
        text = (folder / name).read_text()
        (folder / name).write_text(
            hostile.poisoned(text, ("arch", "method", "role", "output", "reference_type", "loss_unit", *keep))
        )
    plan = json.loads((folder / "p.json").read_text())
    plan["runtime"] = {"draft": EVERYTHING, "mmproj": EVERYTHING, "n_gpu_layers": 3, "all_layers": False}
    plan["runtime"] |= {"experts_on_cpu": [1], EVERYTHING: EVERYTHING}
    plan["budget"] = {"ctx": 64, EVERYTHING: EVERYTHING}
    (folder / "p.json").write_text(json.dumps(plan))
    for name, part, changed in (
        ("engine", "runtime", {"engine": EVERYTHING}),
        ("context", "budget", {"ctx": f"64\nSYSTEM {MARK}"}),
        ("cache", "budget", {"ctx": 64, "cache_type_k": f"q8_0\nSYSTEM {MARK}"}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(plan | {part: changed}))
    hostile.model(EVERYTHING[:40]).write(folder / "arch.gguf")
    (folder / "control.gguf").write_bytes((folder / ODD).read_bytes().replace(b"blk.0.n", b"blk\x1b0.n"))
    bad = vocabulary_of([b"\xff" + MARK.encode(), 255 * "x"])
    families.write("qwen3", folder / "tokens.gguf", vocabulary=bad, n_tokens=257)
    (folder / "bad.txt").write_text(f"{MARK}\x1b[31m\u202e{'x' * hostile.LONG}")
    (folder / "schema.json").write_text(json.dumps({"schema": EVERYTHING}))
    losses = json.loads((folder / "l.json").read_text())
    (folder / "key.json").write_text(json.dumps(losses | {EVERYTHING + "x" * hostile.LONG: 1}))
    (folder / "unit.json").write_text(json.dumps(losses | {"loss_unit": EVERYTHING}))
    key = json.dumps(EVERYTHING + "x" * hostile.LONG)
    (folder / "double.json").write_text(f"{{{key}: 1, {key}: 2}}")
    broken = bytearray((folder / "type.gguf").read_bytes())
    broken[-4096:] = bytes(i % 251 for i in range(4096))
    (folder / "broken.gguf").write_bytes(broken)


def vocabulary_of(tokens):
    tokens = [*tokens, *(f"{i}" for i in range(257 - len(tokens)))]
    return (
        pair("tokenizer.ggml.model", STR, "gpt2"),
        pair("tokenizer.ggml.pre", STR, "gpt-2"),
        pair("tokenizer.ggml.tokens", ARR, (STR, tokens)),
        pair("tokenizer.ggml.token_type", ARR, (I32, [1] * 257)),
        pair("tokenizer.ggml.bos_token_id", U32, 256),
    )


def audited(folder, commands):
    """What the commands gave, by name, and the events that were noted meanwhile."""
    words, results = folder.parent / "commands.json", folder.parent / "results.json"
    words.write_text(json.dumps(list(commands.values())))
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    script = [sys.executable, "-P", ROOT / "tests" / "helpers" / "audited.py", words, results]
    if sys.version_info < (3, 11):
        script.remove("-P")
    subprocess.run(script, cwd=folder, env=environment, check=True, timeout=300)
    found = json.loads(results.read_text())
    return dict(zip(commands, found["ran"], strict=True)), found["events"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strangers") / "work"


@pytest.fixture(scope="module")
def found(folder):
    """(what every command gave, events of all)."""
    folder.mkdir()
    prepare(folder)
    first, events = audited(folder, FIRST)
    prepare_again(folder)
    second, more = audited(folder, SECOND | {name: words for name, (_, words) in REFUSED.items()})
    return first | second, events + more


@pytest.fixture(scope="module")
def ran(found):
    return found[0]


def test_a_strangers_files_are_worked_with_like_any_other(ran):
    codes = dict.fromkeys(FIRST | SECOND, 0) | {name: code for name, (code, _) in REFUSED.items()}
    assert {name: (code, err) for name, (code, _, err) in ran.items() if code != codes[name]} == {}


def test_every_line_can_be_printed_and_ends(ran):
    for name, (_, out, err) in ran.items():
        for line in (out + err).split("\n"):
            assert printable(line) == line, name
            assert "json" in name or len(line) < 2500, name


def test_a_failure_is_one_line_that_begins_as_ours(ran):
    for name in REFUSED:
        lines = ran[name][2].splitlines()
        errors = [line for line in lines if line.startswith("requant: error: ")]
        assert len(errors) == 1 and errors == lines[-1:], name
        assert all(line.startswith("requant: warning: ") for line in lines[:-1]), name


def test_json_holds_the_very_strings(ran, folder):
    found = {name: json.loads(out) for name, (_, out, _) in ran.items() if "json" in name and out}
    assert len(found) > 5 and all(ran[name][1].isascii() for name in found)
    seen = found["inspect json"]
    with open_source(folder / ODD) as source:
        names = [t.name for t in source.tensors]
    assert seen["title"] == EVERYTHING + "x" * hostile.LONG
    assert [t["name"] for t in seen["tensors"]] == names and seen["files"] == [ODD]
    assert [t["name"] for t in found["score quick json"]["tensors"]] == names
    assert [c["name"] for c in found["plan json"]["choices"]] == names and found["plan json"]["source"] == ODD
    assert [t["name"] for t in found["convert json"]["tensors"]] == names


def test_a_table_has_the_rows_and_cells_it_should_have(ran, folder):
    with open_source(folder / ODD) as source:
        n_tensors = len(source.tensors)
    text = ran["inspect tensors"][1]
    head, *rows = text.split("\n\n")[-1].splitlines()
    assert len(rows) == n_tensors
    at = display_width(head[: head.index("type")])
    for row in rows:
        name, kind, shape, *_ = re.split(" {2,}", row)
        assert kind in ("F16", "F32") and re.fullmatch(r"[\d x]+", shape), row
        assert (
            display_width(row[: row.index(f"  {kind} ") + 2])
            <= at
            == display_width(row) - display_width(row[len(name) :].lstrip())
        ), row
    assert len(ran["inspect"][1].split("\n\n")[2].splitlines()) == 1 + len({printable(n) for n in NAMES}) + 3


def test_the_curve_is_numbers_only(ran):
    head, *rows = csv.reader(io.StringIO(ran["frontier"][1]))
    assert rows and all(len(row) == len(head) for row in rows)
    assert head[-2:] == ["loss_unit", "method"]
    assert all(cell == "" or float(cell) >= 0 for row in rows for cell in row[:-2])
    assert all(row[-2:] == ["points", "dfix"] for row in rows)


def test_a_tensor_type_file_has_a_line_for_each_tensor_it_decides(folder, ran):
    lines = (folder / "t.txt").read_text().splitlines()
    assert len(lines) == 2 + len(NAMES)
    assert all(re.fullmatch(r"\^[!-~]+\$=[a-z0-9_]+", line) for line in lines)


def test_what_was_made_keeps_the_strings_and_gains_none_that_speak(folder, ran):
    with open_source(folder / ODD) as source, open_source(folder / f"out{ODD}") as made:
        for key in ("general.name", "tokenizer.chat_template", EVERYTHING):
            assert made.metadata.values[key] == source.metadata.values[key]
    with open_source(folder / "type.gguf") as made:
        own = [key for key in made.metadata if key.startswith(("requant.", "quantize."))]
        texts = [text for key in own for text in np_list(made.metadata.get(key)) if isinstance(text, str)]
        assert len(own) > 5 and all(printable(text) == text and len(text) < 300 for text in texts)


def np_list(value):
    return value if isinstance(value, list) else [value]


def test_nothing_is_run_fetched_unpickled_or_written_elsewhere(found, folder):
    from requant.formats.jit import CACHE_FOLDER

    private = [folder, *([] if CACHE_FOLDER is None else [CACHE_FOLDER.parent])]
    above = {"/dev/null", *map(str, [] if CACHE_FOLDER is None else CACHE_FOLDER.parents)}
    paths = {
        "os.rename": 2,
        "os.link": 2,
        **dict.fromkeys(("open", "os.remove", "os.mkdir", "os.truncate", "os.chmod"), 1),
    }
    assert {"open"} < {event for event, *_ in found[1]} <= paths.keys()
    for event, *what in found[1]:
        for path in what[: paths[event]]:
            place = Path(os.path.normpath(folder / path))
            unnamed = event == "os.link" and re.fullmatch("/proc/self/fd/[0-9]+", path)  # gives a file its first name
            known = any(place.is_relative_to(p) for p in private) or path in above or path.isdigit()
            assert known or unnamed, (event, path)
    assert not [path for path in folder.parent.rglob("*") if MARK in path.name or path.name == "x"]
    assert not (Path("/tmp") / MARK).exists()


def test_an_expression_that_takes_for_ever_can_be_stopped(tmp_path, found, folder):
    (tmp_path / "recipe.txt").write_text("(.|.)*[.]x=Q8_0")
    told = """
import requant.planning.rule_matches as module
matching = module.match_pin
def telling(*words):
    print("trying", file=sys.stderr, flush=True)
    return matching(*words)
module.match_pin = telling
"""
    words = ["plan", folder / ODD, "--losses", folder / "l.json", "--bpw", "7"]
    process = start(*words, "--tensor-type-file", tmp_path / "recipe.txt", before=told)
    try:
        while process.stderr.readline() != "trying\n":
            assert process.poll() is None
        time.sleep(0.5)  # it is in the midst of it
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped by SIGINT" in err


@pytest.mark.parametrize("text", ["calibration.txt", "imatrix.gguf"])
def test_the_mark_of_the_strangers_files_is_in_no_other(text):
    assert MARK.encode() not in (FIXTURES / text).read_bytes()

"""Every file that a command has read survives it, whatever it is asked to write there; and who may read the results."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from commands import TINY, assert_failed, names, run
from conversions import half, small_model

import requant
from requant.common import inputs
from requant.errors import OutputRefused

FITS = ("--vram", "64MiB", "--ctx", "64", "--reserve", "0", "--quick", "--force")
SHORT = ("--windows", "1", "--window", "32", "--types", "Q8_0", "--force")
TEXT = "word and word " * 400
SHARD = "like-0000{}-of-00003.gguf".format

CASES = {
    "convert, tensor types": ("convert m.gguf FILE --tensor-type-file FILE", FITS, "rules"),
    "convert, rules as report": (
        "convert m.gguf o.gguf --report FILE --tensor-type-file FILE",
        FITS,
        "rules.md",
    ),
    "convert, tensor types as record": ("convert m.gguf o.gguf --tensor-type-file FILE", FITS, "o.gguf.requant.json"),
    "convert, draft": ("convert m.gguf FILE --draft FILE", FITS, "draft.gguf"),
    "convert, draft as part": ("convert m.gguf o.gguf --draft FILE", FITS, "o.gguf.part"),
    "convert, draft as journal": ("convert m.gguf o.gguf --draft FILE", FITS, "o.gguf.part.journal"),
    "convert, draft as importance": ("convert m.gguf o.gguf --draft FILE", FITS, "o.gguf.part.imatrix"),
    "convert, shards of --like": (f"convert m.gguf FILE --like {SHARD(1)}", ("--force",), SHARD(2)),
    "convert, shards of --like as part": (f"convert m.gguf o.gguf --like {SHARD(1)}", ("--force",), SHARD(2)),
    "convert, a plan": ("convert m.gguf FILE --plan FILE", ("--force",), "plan.json"),
    "convert, the record that is the plan": ("convert m.gguf o.gguf --plan FILE", ("--force",), "o.gguf.requant.json"),
    "convert, losses": ("convert m.gguf FILE --bpw 9 --losses FILE", ("--force",), "losses.json"),
    "convert, a text": ("convert m.gguf FILE --bpw 9 --text FILE", SHORT, "text"),
    "plan, tensor types": ("plan m.gguf -o FILE --tensor-type-file FILE", FITS, "rules"),
    "plan, emitted tensor types": ("plan m.gguf --emit-tensor-types FILE --tensor-type-file FILE", FITS, "rules"),
    "plan, draft": ("plan m.gguf -o FILE --draft FILE", FITS, "draft"),
    "plan, losses": ("plan m.gguf -o FILE --bpw 9 --losses FILE", ("--force",), "losses.json"),
    "score, a text": ("score m.gguf -o FILE --text FILE", SHORT, "text"),
    "score, a text as imatrix": ("score m.gguf -o l.json --emit-imatrix FILE --text FILE", SHORT, "text"),
    "score, the model": ("score m.gguf -o x --emit-imatrix m.gguf", SHORT, "m.gguf"),
    "calibrate, a text": ("calibrate m.gguf -o FILE --text FILE", (*SHORT[:4], "--force"), "text"),
    "calibrate, a text as checkpoint": ("calibrate m.gguf -o s --text FILE", (*SHORT[:4], "--force"), "s.part.npz"),
    "report, an evaluation": ("report o.gguf.requant.json -o FILE --evaluation FILE", ("--force",), "evaluation.md"),
    "report, the source": ("report o.gguf.requant.json -o FILE --source FILE", ("--force",), "source.md"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The models and results that the commands read."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(TINY, folder / "m.gguf")
    with requant.open(folder / "m.gguf") as model:
        model.convert(folder / "like.gguf", type="Q8_0", max_shard_size="5MB")
        model.convert(folder / "o.gguf", type="Q8_0")
        losses = model.score(quick=True, types="Q8_0,F16")
        (folder / "losses.json").write_text(losses.to_json())
        (folder / "plan.json").write_text(model.plan(losses=losses, bpw=9).to_json())
    with requant.open(folder / "o.gguf") as model:
        found = model.evaluate(tokens=ids(folder), windows=1, window=32)
        (folder / "evaluation.json").write_text(found.to_json())
    return folder


def ids(folder):
    (folder / "ids").write_text(" ".join(str(i % 100) for i in range(64)))
    return folder / "ids"


CONTENT = {"rules": b"attn_v=q8_0\n", "text": TEXT.encode()}


def content_of(made, case, name):
    """What the file of a case is before the command."""
    words = CASES[case][0]
    for option, source in (
        ("--tensor-type-file", "rules"),
        ("--draft", "m.gguf"),
        ("--plan", "o.gguf.requant.json" if name.startswith("o.") else "plan.json"),
        ("--losses", "losses.json"),
        ("--text", "text"),
        ("--evaluation", "evaluation.json"),
    ):
        if f"{option} FILE" in words:
            return CONTENT[source] if source in CONTENT else (made / source).read_bytes()
    return (made / (name if (made / name).exists() else "m.gguf")).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_no_command_writes_what_it_reads(capsys, tmp_path, monkeypatch, made, case):
    words, options, name = CASES[case]
    monkeypatch.chdir(tmp_path)
    for own in ("m.gguf", *(SHARD(i) for i in (1, 2, 3))):
        os.link(made / own, own)
    if "report" in words:
        os.link(made / "o.gguf.requant.json", "o.gguf.requant.json")
    target = name
    if case.endswith("--like as part"):
        os.link(name, "o.gguf.part")
        target = "o.gguf.part"
    elif not Path(name).exists():
        Path(name).write_bytes(content_of(made, case, name))
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    ran = run(capsys, *words.replace("FILE", name).split(), *options)
    assert_failed(ran, 5, f"{target}: is one of the inputs")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before


def test_a_batch_writes_nothing_that_it_reads(capsys, tmp_path, made):
    os.link(made / "m.gguf", tmp_path / "m.gguf")
    os.link(made / "m.gguf", tmp_path / "draft.gguf")
    for i in (1, 2, 3):
        os.link(made / SHARD(i), tmp_path / SHARD(i))
    (tmp_path / "text.md").write_text(TEXT)
    shutil.copy(made / "o.gguf.requant.json", tmp_path)
    quick = {"vram": "64MiB", "ctx": 64, "reserve": 0, "quick": True}
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for report, job in (
        (None, {"output": "draft.gguf", "draft": "draft.gguf", **quick}),
        (None, {"output": SHARD(3), "like": SHARD(1)}),
        (None, {"output": "like.gguf", "like": SHARD(1), "max-shard-size": "5MB"}),
        (None, {"output": "o.gguf", "plan": "o.gguf.requant.json"}),
        ("text.md", {"output": "x.gguf", "bpw": 9, "text": "text.md"}),
    ):
        table = [] if report is None else [f'[report]\ncard = "{report}"']
        lines = [f"{key} = {json.dumps(value)}" for key, value in {"source": "m.gguf", **job}.items()]
        (tmp_path / "b.toml").write_text("\n".join([*table, "[[job]]", *lines]))
        assert_failed(run(capsys, "batch", tmp_path / "b.toml", "--force"), 5, "input")
        shutil.rmtree(tmp_path / "b.toml.requant", ignore_errors=True)
        (tmp_path / "b.toml").unlink()
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_strangers_in_the_folder_of_state_are_left_alone(capsys, tmp_path):
    model = small_model(half("blk.0.ffn_up.weight", (256, 64)))
    model.write(tmp_path / "m.gguf")
    (tmp_path / "b.toml").write_text('[[job]]\nsource = "m.gguf"\noutput = "o.gguf"\nbpw = 9\nquick = true\n')
    state = tmp_path / "b.toml.requant"
    for name in ("lock", "summary.json", "reports.json"):
        state.mkdir(exist_ok=True)
        (state / name).write_text("mine")
        assert_failed(run(capsys, "batch", tmp_path / "b.toml", "--force"), 5, f"{name}: is not", "move it away")
        assert (state / name).read_text() == "mine"
        (state / name).unlink()
    assert run(capsys, "batch", tmp_path / "b.toml").code == 0
    (scores,), (plans,) = (state / "scores").iterdir(), (state / "plans").iterdir()
    for path in (scores / "losses.json", scores / "kept.json", plans / "plan.json", plans / "kept.json"):
        seal, other = path.with_name("kept.json"), path.with_name("other")
        own, sealed = path.read_bytes(), seal.read_bytes()
        seal.unlink()
        path.write_text("mine")
        other.write_text("mine")
        ran = run(capsys, "batch", tmp_path / "b.toml", "--force")
        assert ran.code in (0, 5) and path.read_text() == other.read_text() == "mine", (path, ran)
        path.write_bytes(own)
        seal.write_bytes(sealed)


def test_calls_of_the_library_keep_their_inputs_and_no_longer(tmp_path, made):
    shutil.copy(made / "m.gguf", tmp_path / "m.gguf")
    (tmp_path / "rules").write_bytes(CONTENT["rules"])
    (tmp_path / "text").write_text(TEXT)
    os.link(tmp_path / "m.gguf", tmp_path / "twin")
    short = {"windows": 1, "window": 32}
    with requant.open(tmp_path / "m.gguf") as model:
        for call in (
            lambda: model.convert(tmp_path / "rules", tensor_type_file=tmp_path / "rules", bpw=9, force=True),
            lambda: model.convert(tmp_path / "twin", type="Q8_0", force=True),
            lambda: model.score(text=tmp_path / "text", emit_imatrix=tmp_path / "text", force=True, **short),
            lambda: model.calibrate(tmp_path / "text", text=tmp_path / "text", force=True, **short),
        ):
            with pytest.raises(OutputRefused, match="is one of the inputs"):
                call()
        assert (tmp_path / "text").read_text() == TEXT
        model.calibrate(tmp_path / "text.gguf", text=tmp_path / "text", **short)
        model.convert(tmp_path / "o.gguf", type="Q4_0", imatrix=tmp_path / "text.gguf")
        assert requant.verify(tmp_path / "o.gguf", source=model).ok
        model.convert(tmp_path / "text.gguf", type="Q8_0", force=True)  # an input of an earlier call
        model.convert(tmp_path / "o.gguf", type="Q8_0", force=True)  # read by an earlier call


def modes(folder):
    return {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir() if p.is_file()}


def test_what_is_made_of_a_private_model_is_private(capsys, tmp_path, made):
    source = tmp_path / "private" / "m.gguf"
    source.parent.mkdir()
    shutil.copy(made / "m.gguf", source)
    source.chmod(0o600)
    folder = tmp_path / "made"
    folder.mkdir()
    losses = folder / "l.json"
    for words in (
        ("score", source, "-o", losses, "--emit-imatrix", folder / "i.gguf", *SHORT),
        ("calibrate", source, "-o", folder / "s.gguf", *SHORT[:4]),
        (
            "plan",
            source,
            "--losses",
            losses,
            "--bpw",
            "9",
            "-o",
            folder / "p.json",
            "--emit-tensor-types",
            folder / "t",
        ),
        ("convert", source, folder / "o.gguf", "--type", "Q4_0", "--report", folder / "o.md"),
        ("convert", source, folder / "x.gguf", "--type", "Q4_0", "--max-shard-size", "5MB"),
        ("report", folder / "o.gguf", "-o", folder / "o.html"),
    ):
        assert run(capsys, *words).code == 0, words
    assert set(modes(folder).values()) == {0o600} and len(modes(folder)) > 10
    for path in folder.iterdir():
        path.chmod(0o644)
    assert run(capsys, "report", folder / "o.gguf", "-o", folder / "o.html", "--force").code == 0
    assert modes(folder)["o.html"] == 0o644  # of files that are public by now


def test_a_batch_keeps_private_what_is_made_of_a_private_model(capsys, tmp_path):
    for name, mode in (("a", 0o600), ("b", 0o644)):
        small_model(half("blk.0.ffn_up.weight", (256, 64))).write(tmp_path / f"{name}.gguf").chmod(mode)
    lines = ['[report]\ncard = "README.md"\nbeside = ["html"]\n[[job]]\nsource = ["a.gguf", "b.gguf"]']
    (tmp_path / "b.toml").write_text("\n".join([*lines, 'output = "{stem}-o.gguf"', "bpw = 9", "quick = true"]))
    assert run(capsys, "batch", tmp_path / "b.toml").code == 0
    found = modes(tmp_path)
    private = {"a.gguf", "a-o.gguf", "a-o.gguf.requant.json", "a-o.html", "README.md"}
    assert {name for name, mode in found.items() if mode == 0o600} == private
    kept = [p for p in (tmp_path / "b.toml.requant").rglob("*.json") if b"a.gguf" in p.read_bytes()]
    assert kept and all(p.stat().st_mode & 0o777 == 0o600 for p in kept)


@pytest.fixture(scope="module")
def listening():
    """Files that this process opens for reading while there is a set for them."""
    heard = []

    def hear(event, arguments):
        if event == "open" and heard and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            heard[-1].add(str(arguments[0]))

    sys.addaudithook(hear)
    return heard


def test_whatever_a_command_opens_is_an_input(capsys, tmp_path, made, listening):
    given, out = tmp_path / "given", tmp_path / "out"
    given.mkdir()
    out.mkdir()
    for path in made.iterdir():
        os.link(path, given / path.name)
    (given / "rules").write_bytes(CONTENT["rules"])
    (given / "text").write_text(TEXT)
    (given / "b.toml").write_text('[[job]]\nsource = "m.gguf"\noutput = "../out/b.gguf"\nplan = "plan.json"\n')
    model, plan, losses = given / "m.gguf", given / "plan.json", given / "losses.json"
    for words in (
        ("convert", model, out / "1.gguf", *FITS, "--tensor-type-file", given / "rules", "--draft", given / "o.gguf"),
        ("convert", model, out / "2.gguf", "--plan", plan, "--report", out / "2.md"),
        ("convert", given / SHARD(2), out / "3.gguf", "--like", given / SHARD(1)),
        ("score", model, "-o", out / "l.json", "--text", given / "text", *SHORT),
        ("calibrate", model, "-o", out / "s.gguf", "--tokens", given / "ids", *SHORT[:4]),
        ("plan", model, "-o", out / "p.json", "--bpw", "9", "--losses", losses, "--imatrix", out / "s.gguf"),
        ("report", given / "o.gguf", "-o", out / "o.md", "--evaluation", given / "evaluation.json", "--source", model),
        ("batch", given / "b.toml", "--state", out / "state"),
    ):
        with inputs.collect_inputs():
            listening.append(set())
            assert run(capsys, *words).code == 0, words
            opened = {path for path in map(os.path.realpath, listening.pop()) if path.startswith(f"{given}{os.sep}")}
            assert opened and opened <= {os.path.realpath(found.path) for found in inputs._all.get().values()}, words


def test_names_of_files_that_no_run_uses_stay(capsys, tmp_path):
    small_model(half("blk.0.ffn_up.weight", (256, 64))).write(tmp_path / "m.gguf")
    strangers = {f"o.gguf{end}" for end in (".part.imatrix.part", ".requant.json.0badcafe.part", ".requant.json.part")}
    for name in strangers:
        (tmp_path / name).write_text("mine")
    assert run(capsys, "convert", tmp_path / "m.gguf", tmp_path / "o.gguf", "--type", "Q8_0").code == 0
    assert run(capsys, "convert", tmp_path / "m.gguf", tmp_path / "o.gguf", "--type", "Q4_0", "--force").code == 0
    assert set(names(tmp_path)) == strangers | {"m.gguf", "o.gguf", "o.gguf.requant.json"}
    assert all((tmp_path / name).read_text() == "mine" for name in strangers)

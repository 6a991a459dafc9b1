"""Typos are answered with what may have been meant."""

import shutil
from pathlib import Path

import pytest
from commands import TINY, assert_failed, run, spawn


@pytest.fixture
def convert(capsys, tmp_path, losses):
    def go(*words):
        words = [losses if word == "LOSSES" else word for word in words]
        return run(capsys, "convert", TINY, tmp_path / "out.gguf", *words)

    return go


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--type", "Q4_KM"], "did you mean Q4_K"),
        (["--type", "q4k"], "did you mean Q4_K"),
        (["--type", "Q4_K_M"], "it is a mixture of types, which --preset takes; did you mean Q4_K"),
        (["--types", "Q4_0,Q5K", "--bpw", "4"], "did you mean Q5_K?"),
        (["--preset", "q4km"], "did you mean Q4_K_M"),
        (["--engine", "ollma"], "did you mean ollama?"),
        (["--engine", "LLAMA.CPP-CUD"], "did you mean llama.cpp-cuda"),
        (["--effort", "bst"], "did you mean best?"),
        (["--nonfinite", "keep"], "did you mean keep-type?"),
        (["--cache-type-k", "q8"], "did you mean q8_0?"),
        (["--vram", "12G"], "did you mean 12GiB or 12GB?"),
        (["--vram", "12 gi"], "did you mean 12GiB or 12GB?"),
        (["--size", "1,5GiB"], "did you mean 1.5GiB or 1.5GB?"),
        (["--ctx", "16kk"], "write 16384, 16k, or 0"),
        (["--vran", "1GiB"], "no option '--vran'; did you mean --vram?"),
        (["--output-tensor-type", "Q6K"], "did you mean Q6_K"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_typo_in_an_option_names_what_was_meant(convert, words, meant):
    assert_failed(convert(*words), 2, words[0], meant)


@pytest.mark.parametrize("size", ["12 gb", "12Gib", "12GIB", " 12GiB "])
def test_sizes_that_say_which_unit_are_no_typos(capsys, losses, size):
    assert run(capsys, "plan", TINY, "--losses", losses, "--vram", size).code == 0


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--tensor-type", "ffn_dwon=q4_k"], "did you mean ffn_down?"),
        (["--min-type", "atn_v=q4_k"], "did you mean attn_v?"),
        (["--group", r"blk\.(\d+)\.ffn_upp\.weight"], "did you mean blk."),
        (["--tensor-type", "tok_embd=q8_0"], "did you mean token_embd.weight?"),
        (["--tensor-type", "zzz=q8_0"], "names look like "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_expression_that_matches_nothing_names_the_nearest_tensor(convert, words, meant):
    assert_failed(convert("--losses", "LOSSES", "--bpw", "4.5", *words), 2, "matches no tensor", meant)


def test_a_missing_model_names_the_nearest_file(capsys, tmp_path):
    shutil.copy(TINY, tmp_path / "model-f16.gguf")
    (tmp_path / "model-f17.txt").write_text("")
    near = tmp_path / "model-f16.gguf"
    assert_failed(run(capsys, "inspect", tmp_path / "model-f17.gguf"), 3, "no such file", f"did you mean {near}?")
    assert_failed(run(capsys, "inspect", tmp_path / "zzz.gguf"), 3, "no such file; there is model-f16.gguf")
    assert_failed(run(capsys, "inspect", tmp_path / "none" / "m.gguf"), 3, "no such file; there is no such folder")


def test_other_files_that_are_missing_too(capsys, tmp_path, losses):
    shutil.copy(losses, tmp_path / "losses.json")
    ran = run(capsys, "plan", TINY, "--losses", tmp_path / "loses.json", "--bpw", "4.5")
    assert_failed(ran, 3, f"loses.json: no such file; did you mean {tmp_path / 'losses.json'}?")
    ran = run(capsys, "diff", tmp_path / "a.json", tmp_path / "losses.json")
    assert_failed(ran, 3, "no such file")


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["plan", TINY, "--bpw", "4.5", option]
            for option in ("--losses", "--imatrix", "--tensor-type-file", "--like")
        ),
        *(["evaluate", TINY, option] for option in ("--text", "--tokens")),
        ["score", TINY, "-o", "l.json", "--statistics"],
        ["convert", TINY, "out.gguf", "--plan"],
        ["verify", TINY, "--plan"],
        ["verify", TINY, "--source"],
        ["diff", TINY],
        ["inspect"],
        ["batch"],
        ["report", "-o", "page.html"],
    ],
    ids=lambda words: " ".join(map(str, words[:1] + words[-1:])),
)
def test_a_file_that_is_named_and_missing_is_bad_input_with_the_nearest_name(capsys, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    Path("things.x").touch()
    assert_failed(run(capsys, *words, "thigs.x"), 3, "error: thigs.x: no such file; did you mean things.x?")


def test_a_name_that_is_suggested_is_escaped(tmp_path):
    (tmp_path / "model\x1b[31m-f16.gguf").write_bytes(b"")
    ran = spawn("inspect", tmp_path / "model-f16.gguf")
    assert ran.code == 3 and "\x1b" not in ran.err and "\\x1b[31m-f16.gguf?" in ran.err


@pytest.mark.parametrize(("word", "meant"), [("covnert", "convert"), ("PLAN", "plan"), ("hlep", "help")])
def test_a_misspelt_command_names_the_nearest(capsys, word, meant):
    assert_failed(run(capsys, word), 2, f"no command '{word}'; did you mean {meant}? see requant --help")


def test_what_is_like_nothing_is_answered_with_all_there_is(convert):
    assert_failed(convert("--engine", "xxxxxxxx"), 2, "known are llama.cpp-cuda, ")

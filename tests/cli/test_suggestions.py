"""Typos are answered with what may have been meant."""

import shutil
from pathlib import Path

import click
import pytest
from commands import TINY, assert_failed, run, spawn
from conversions import small_model

from requant.cli.command import OptionalValue
from requant.cli.foreign_options import UNRELATED
from requant.cli.main import COMMANDS, find_command


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
        (["--type", "Q4_K_M"], "it is a mixture of types: give --preset Q4_K_M"),
        (["--types", "Q4_K_M,Q8_0"], "it is a mixture of types: did you mean Q4_K?"),
        (["--output-tensor-type", "IQ3_M"], "it is a mixture of types: did you mean IQ3_S?"),
        (["--type", "iq5_ks"], "is a type of ik_llama.cpp, which requant neither reads nor writes; of as many bits"),
        (["--type", "q4_k_r4"], "neither reads nor writes; did you mean Q4_K?"),
        (["--preset", "IQ4_KS"], "neither reads nor writes; of as many bits are IQ4_XS, Q4_0, Q4_K_S"),
        (["--engine", "llamacpp"], "did you mean llama.cpp?"),
        (["--engine", "LLAMA_CPP_CUDA"], "did you mean llama.cpp-cuda?"),
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "12GiB"], "no option '--gpu'; did you mean --vram?"),
        (["--gpu-memory=12GiB"], "no option '--gpu-memory'; did you mean --vram?"),
        (["--vram", "1GiB", "--ctx-size", "512"], "no option '--ctx-size'; did you mean --ctx?"),
        (["--vram", "1GiB", "--quick", "-c", "512"], "no option '-c'; did you mean --ctx?"),
        (["--vram", "1GiB", "--context", "512"], "no option '--context'; did you mean --ctx?"),
        (["--vram", "1GiB", "-ctk", "q8_0"], "no option '-ctk'; did you mean --cache-type-k?"),
        (["--vram", "1GiB", "-ctv", "q8_0"], "no option '-ctv'; did you mean --cache-type-v?"),
        (["--vram", "1GiB", "-ub", "32"], "no option '-ub'; did you mean --ubatch?"),
        (["--vram", "1GiB", "-ngl", "99"], "no option '-ngl'; the plan decides what is on the GPU: give --vram SIZE"),
        (["--bits", "4"], "no option '--bits'; did you mean --bpw?"),
        (["-o", "other.gguf"], "no option '-o'; the output is the second argument: requant convert MODEL OUT.gguf"),
        (["--vram", "12", "GB"], "--vram: write the number and its unit together, 12GB"),
        (["--size", "1,5", "GiB"], "--size: write the number and its unit together, 1.5GiB"),
        (["--vram", "12,5GiB"], "'12,5GiB' is not a size; did you mean 12.5GiB or 12.5GB?"),
        (
            ["--size", "5MB,6MB"],
            "--size: '5MB,6MB' is a list, and this option takes one size; --vram of plan",
        ),
        (["Q4_K_M"], "'Q4_K_M' is no file; give the type by an option: --preset Q4_K_M"),
        (["q4_k"], "--preset Q4_K_M or --type Q4_K"),
        (["--quick", "Q6_K"], "--preset Q6_K or --type Q6_K"),
        (["BF16"], "'BF16' is no file; give the type by an option: --type BF16"),
        (["15"], "'15' is no file; give the type by an option: --preset Q4_K_M"),
        (["7"], "'7' is no file; give the type by an option: --preset Q8_0 or --type Q8_0"),
        (["COPY"], f"'COPY' is no file; to keep every type, give the model itself: --like {TINY}"),
        (["iq5_ks"], "'iq5_ks' is no file; it is a type of ik_llama.cpp"),
        (["999"], "got unexpected extra argument (999): convert takes MODEL and OUT alone; see requant convert --help"),
        (["--fa", "on"], "no option '--fa'; every plan counts with flash attention; it needs no option"),
        (["--flash-attn"], "every plan counts with flash attention"),
        (["--ngl", "99"], "no option '--ngl'; the plan decides what is on the GPU: give --vram SIZE"),
        (["--n_gpu_layers", "99"], "the plan decides what is on the GPU: give --vram SIZE"),
        (["--ctk", "q8_0"], "no option '--ctk'; did you mean --cache-type-k?"),
        (["--include-weights", "x"], "an imatrix counts for all tensors that it covers; --no-imatrix for none"),
        (["--leave-output-tensor"], "name the type to keep for the output: --output-tensor-type"),
        (["--override-kv", "a=int:1"], "the metadata of the source are copied"),
        (["--outtype", "q8_0"], "did you mean --type T or --preset?"),
        (["--outfile", "x.gguf"], "the output is the second argument"),
        (["--imatrix-file", "x"], "did you mean --imatrix?"),
        (["-vram", "1GiB"], "no option '-vram'; did you mean --vram?"),
        (["--base", "x.gguf"], "no option '--base'; requant evaluate has it; see requant convert --help"),
        (["--vram", "12MiB", "--vram", "14MiB"], "--vram is given twice, as 12MiB and as 14MiB; give it once"),
        (["--size=5MB", "--size", "6MB"], "--size is given twice, as 5MB and as 6MB; give it once"),
        (["--imatrix", "a", "--imatrix=b"], "--imatrix is given twice"),
        (["--types", "Q4_K", "--types", "Q5_K"], "give a list, --types Q4_K,Q5_K"),
        (["--bpw", "4,5"], "--bpw: '4,5' is no number; did you mean 4.5?"),
        (["--max-loss", "0,02"], "--max-loss: '0,02' is no number; did you mean 0.02?"),
        (["--min-speed", "1,5"], "did you mean 1.5?"),
        (["--prefer-within", "0,05"], "did you mean 0.05?"),
        (["--time-price", "0,2"], "did you mean 0.2?"),
        (["--bandwidth", "gpu=448,5"], "a comma separates devices: write decimals with a point"),
        (["--threads", "1,000"], "--threads: '1,000' is no whole number; did you mean 1000?"),
        (["--threads", "auto"], "'auto' is no whole number; leave the option out for the default: all cores"),
        (["--window", "1k"], "did you mean 1024?"),
        (["--ctx", "16,384"], "'16,384' is no number of tokens; did you mean 16384?"),
        (["--vram", "12,5"], "'12,5' is not a size; did you mean 12.5GiB or 12.5GB?"),
        (["--vram", "12,5GiB,14GiB"], "did you mean 12.5GiB or 12.5GB?"),
        (["--vram", "auto"], "--vram: 'auto' is not a size; give the bytes that the card has, as in 12GiB: nvidia-smi"),
        (["--size", "50%"], "--size: '50%' is not a size; give bytes, as in 5GiB: requant inspect shows those of"),
        (["--ram", "max"], "--ram: 'max' is not a size; give bytes, as in 32GiB: free -h"),
        (["--max-shard-size", "all"], "'all' is not a size; give bytes with a unit, as in 12GiB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_of_other_tools_are_answered_with_those_of_requant(convert, words, said):
    assert_failed(convert(*words), 2, said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "Q4_K_M", TINY, "out.gguf"], "'Q4_K_M' is no file; give the type by an option: --preset Q4_K_M"),
        (["convert", TINY, "--vram", "12", "GB", "out.gguf"], "write the number and its unit together, 12GB"),
        (["convert", TINY, "--type", "Q8_0"], "name the output after the model, as in requant convert MODEL OUT.gguf"),
        (["quantize", TINY, "out.gguf", "Q4_K_M"], "no command 'quantize'; did you mean convert?"),
        (["m.gguf", "--vram", "1GiB"], "the command comes first: requant convert MODEL OUT.gguf"),
        (["--vram", "10MiB", TINY], "no option '--vram'; requant plan and requant convert have it; see requant --help"),
        (["-ngl", "99"], "no option '-ngl'; the plan decides what is on the GPU: give --vram SIZE"),
        (
            ["--progress", "none", "inspect", TINY, "--progress", "json"],
            "--progress is given twice, as none and as json",
        ),
        (["inspect", TINY, "--vram", "1GiB"], "no option '--vram'; requant plan and requant convert have it"),
        (["plan", TINY, "--vram", "1GiB", "--vram", "2GiB"], "give a list, --vram 1GiB,2GiB"),
        (["calibrate", TINY, "-c", "512"], "no option '-c'; did you mean --window?"),
        (["calibrate", TINY, "--chunks", "5"], "no option '--chunks'; did you mean --windows?"),
        (["evaluate", TINY, "--kl-divergence-base", "x"], "did you mean --base?"),
        (["convert", TINY, "https://a.b/c.gguf", "--type", "Q8_0"], "OUT: 'https://a.b/c.gguf' is an address"),
        (
            ["plan", TINY, "--quick", "--bpw", "5", "--explain", "output.weight"],
            "--explain makes a plan for each other",
        ),
        (["evaluate", TINY], "say what to evaluate on: --text FILE or --tokens FILE"),
    ],
    ids=lambda value: " ".join(map(str, value[:1])) if isinstance(value, list) else "",
)
def test_commands_of_other_tools_are_answered_with_those_of_requant(capsys, words, said):
    assert_failed(run(capsys, *words), 2, said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "fetch it first: hf download Qwen/Qwen2.5-0.5B-Instruct"),
        ("Qwen/Qwen3-8B-GGUF:Q4_K_M", "fetch it first: hf download Qwen/Qwen3-8B-GGUF"),
        ("hf://Qwen/Qwen3-8B", "hf://Qwen/Qwen3-8B: is on Hugging Face, and requant reads files; fetch it first"),
        ("gs://bucket/m.gguf", "gs://bucket/m.gguf: is an address, and requant reads files"),
        ("file:///x/m.gguf", "give the path: /x/m.gguf"),
        ("hf:Qwen/Qwen3-8B", "fetch it first: hf download Qwen/Qwen3-8B"),
        ("hf.co/a/b-GGUF:Q4_K_M", "fetch it first: hf download a/b-GGUF"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b: is on Hugging Face, and requant reads files"),
        ("https://hf.co/a/b/resolve/main/c/x.gguf?download=true", "fetch it first: hf download a/b c/x.gguf"),
        ("https://example.com/m.gguf", "https://example.com/m.gguf: is an address, and requant reads files"),
    ],
)
def test_names_of_a_hub_and_addresses_are_answered_with_how_to_fetch_them(capsys, monkeypatch, tmp_path, name, said):
    monkeypatch.chdir(tmp_path)
    assert_failed(run(capsys, "inspect", name), 3, said)


def test_options_of_llama_cpp_get_no_hint_that_leads_elsewhere(capsys):
    for word in sorted(UNRELATED):
        ran = run(capsys, "convert", TINY, "o.gguf", f"--{word}")
        assert_failed(ran, 2, f"no option '--{word}'")
        assert "did you mean" not in ran.err, ran


def test_the_same_value_twice_is_no_contradiction(capsys, losses):
    words = ("--bpw", "6", "--bpw=6", "--tensor-type", "attn_q=q8_0", "--tensor-type", "attn_k=q8_0")
    assert run(capsys, "plan", TINY, "--losses", losses, *words, "-q", "-q").code == 0


def test_every_option_of_one_value_is_refused_with_two(capsys):
    for name in COMMANDS:
        for param in find_command(name).params:
            if isinstance(param, click.Option) and not param.is_flag and not param.multiple:
                first = [f"{param.opts[-1]}=a"] if isinstance(param, OptionalValue) else [param.opts[-1], "a"]
                ran = run(capsys, name, TINY, TINY, *first, f"{param.opts[0]}=b")
                flag = f"{param.opts[0]} is given twice, as a and as b"
                assert_failed(ran, 2, flag)


def test_the_default_engine_can_be_named(capsys, losses):
    words = ("plan", TINY, "--losses", losses, "--vram", "12MiB", "--json")
    assert run(capsys, *words).out == run(capsys, *words, "--engine", "llama.cpp").out


def test_values_that_look_like_words_of_other_tools_are_values(capsys, monkeypatch, tmp_path, losses):
    monkeypatch.chdir(tmp_path)
    shutil.copy(TINY, "Q4_K_M")  # a file of that name
    assert run(capsys, "inspect", "Q4_K_M").code == 0
    assert run(capsys, "plan", TINY, "--losses", losses, "--bpw", "6", "--output-tensor-type", "Q6_K").code == 0
    assert run(capsys, "plan", TINY, "--losses", losses, "--vram", "1GiB", "--engine", "lmstudio").code == 0


def test_part_of_a_name_to_explain_lists_the_names(capsys, losses):
    ran = run(capsys, "plan", TINY, "--losses", losses, "--bpw", "6", "--explain", "ffn_down")
    assert_failed(ran, 2, "it is part of blk.0.ffn_down.weight, blk.1.ffn_down.weight, ")


def test_a_budget_that_cannot_be_meant_is_told_before_a_source_that_is_quantized(capsys, tmp_path):
    made = tmp_path / "q4.gguf"
    assert run(capsys, "convert", TINY, made, "--type", "Q4_0", "-q").code == 0
    unit = "--vram 150 is in bytes; did you mean 150GiB?"
    assert_failed(run(capsys, "plan", made, "--quick", "--vram", "150"), 4, unit)
    assert_failed(
        run(capsys, "plan", made, "--quick", "--vram", "8MiB", "--ctx", "64"), 3, "already quantized below Q8_0"
    )


def test_a_curve_needs_no_budget_and_no_losses(capsys, tmp_path):
    model = tmp_path / "m.gguf"
    small_model().write(model)
    ran = run(capsys, "plan", model, "--quick", "--frontier")
    assert ran.code == 0 and len(ran.out.splitlines()) > 3


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
    assert_failed(convert("--engine", "xxxxxxxx"), 2, "known are llama.cpp, llama.cpp-cuda, ")

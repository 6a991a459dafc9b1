import json
import os
import sys

import pytest
from commands import TINY, assert_failed, run, spawn

import requant
from requant.cli.main import COMMANDS, main
from requant.formats import GGML, KERNELS

LISTS_MODULES = "import atexit; atexit.register(lambda: print('MODULES', *sys.modules, file=sys.stderr))"


def modules(ran):
    line = next(line for line in ran.err.splitlines() if line.startswith("MODULES"))
    return {name.split(".")[0] for name in line.split()}


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_is_shown_without_loading_compilers_and_solvers(words):
    ran = spawn(*words, before=LISTS_MODULES)
    assert ran.code == 0 and ran.out.startswith("Usage: requant")
    assert not modules(ran) & {"numba", "highspy", "gguf", "tqdm"}


@pytest.mark.parametrize("words, shown", [(["inspect", TINY], "llama"), (["--help"], "Usage")], ids=["inspect", "help"])
def test_what_needs_not_even_numpy_does_not_load_it(words, shown):
    ran = spawn(*words, before=LISTS_MODULES)
    assert ran.code == 0 and shown in ran.out
    assert not modules(ran) & {"numba", "highspy", "numpy", "gguf", "tqdm"}


def test_the_list_of_commands_says_what_each_says_of_itself(capsys):
    listed = " ".join(run(capsys, "--help").out.split())
    for name, what in COMMANDS.items():
        assert f"{name} {what}" in listed
        assert main.get_command(None, name).name == name
        assert main.get_command(None, name).help


def test_no_command_shows_the_help(capsys):
    assert run(capsys).out == run(capsys, "--help").out


def test_the_version_is_the_first_line(capsys):
    ran = run(capsys, "--version")
    assert ran.code == 0 and ran.out.splitlines()[0] == f"requant {requant.__version__}"
    assert f"encoders  version {KERNELS}" in ran.out and GGML in ran.out
    said = json.loads(run(capsys, "--version", "--json").out)
    assert (said["requant"], said["kernels"], said["ggml"]) == (requant.__version__, KERNELS, GGML)


def test_the_version_is_said_without_loading_what_it_is_about():
    ran = spawn("--version", before=LISTS_MODULES)
    assert ran.code == 0 and " numba " in ran.out
    assert not modules(ran) & {"numba", "highspy", "numpy", "gguf", "tqdm"}


def test_json_alone_is_usage(capsys):
    assert_failed(run(capsys, "--json"), 2, "--version")
    assert_failed(run(capsys, "--json", "inspect", TINY), 2, "after a command")


def test_the_compiled_kernels_can_be_cleared(tmp_path):
    folder = tmp_path / "cache" / "kernels-0"
    folder.mkdir(parents=True)
    (folder / "x.nbi").write_bytes(b"x")
    for path in (folder.parent, folder):
        path.chmod(0o700)
    alone = os.environ | {"REQUANT_CACHE_DIR": str(folder.parent), "TMPDIR": str(tmp_path)}
    said = spawn("--version", env=alone)
    assert "1 folders of other versions" in said.out and "none compiled yet" in said.out
    ran = spawn("--clear-cache", env=alone)
    assert ran.code == 0 and ran.out == f"removed {folder}\n" and not folder.exists()
    assert spawn("--clear-cache", env=alone).out == ""


def test_a_misspelt_command_is_answered_with_the_nearest(capsys):
    assert_failed(run(capsys, "covnert", TINY), 2, "no command 'covnert'", "did you mean convert?")


def test_a_misspelt_option_is_answered_with_the_nearest(capsys):
    assert_failed(run(capsys, "plan", TINY, "--vran", "1GiB"), 2, "--vran", "--vram", "see requant plan --help")


@pytest.mark.parametrize("words", [["convert"], ["convert", TINY], ["inspect"], ["plan", TINY, "--threads", "0"]])
def test_missing_and_malformed_arguments_are_usage(capsys, words):
    assert_failed(run(capsys, *words), 2, "--help")


def test_inspect_prints_one_object(capsys):
    ran = run(capsys, "inspect", TINY, "--json", "--ctx", 1024)
    found = json.loads(ran.out)
    assert found["schema"] == "requant.inspect/1" and found["arch"] == "llama" and not found["quantized"]
    assert found["needs"]["n_ctx"] == 1024 and found["needs"]["kv_cache"] > 0
    assert sum(t["n_bytes"] for t in found["tensors"]) == found["n_bytes"] == sum(t["n_bytes"] for t in found["types"])


def test_inspect_lists_the_tensors_when_asked(capsys):
    short, long = run(capsys, "inspect", TINY).out, run(capsys, "inspect", TINY, "--tensors").out
    assert "blk.3.ffn_up.weight" in long and "blk.3.ffn_up.weight" not in short
    assert "already quantized" not in short and "KV cache" in short


def test_python_m_is_the_same_command():
    import subprocess

    ran = subprocess.run([sys.executable, "-m", "requant", "--help"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("Usage: requant ") and ran.stderr == ""

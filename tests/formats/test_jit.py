"""The kernels' cache: used again by the next process, private to the user, and never in the way of a result."""

import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# decodes and checks some F16 weights, then says what the cache did for that
RUN = """
import json, numpy as np
from requant.formats import codec, jit
from requant.formats import by_name
x = np.array([[1, -2, 0.5, np.inf]], np.float16)
y = codec.dequantize(x.view(np.uint8), by_name("F16"))
kernels = by_name("F16").kernels.decode, codec._rows().first_nonfinite
print(json.dumps({
    "folder": None if jit.CACHE_FOLDER is None else str(jit.CACHE_FOLDER),
    "values": y[0, :3].tolist(),
    "bad": codec.first_nonfinite(y),
    "hits": [sum(k.stats.cache_hits.values()) for k in kernels],
    "misses": [sum(k.stats.cache_misses.values()) for k in kernels],
}))
"""
NO_HEAVY = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*({"numba", "highspy", "click", "gguf", "tqdm"} & {name.split(".")[0] for name in sys.modules}))
"""


def python(code, *words, before="", preexec_fn=None, **environment):
    """Run `code` in a process of its own with only `environment` about caches; what it printed, and its warnings."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("REQUANT_CACHE_DIR", "XDG_CACHE_HOME", "TMPDIR")}
    variables = inherited | {"PYTHONPATH": str(ROOT)} | {k: str(v) for k, v in environment.items()}
    command = [sys.executable, "-c", before + code, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.run(command, env=variables, check=False, preexec_fn=preexec_fn, **pipes)
    assert run.returncode == 0, run.stderr
    return run.stdout, re.findall("RuntimeWarning: (.*)", run.stderr)


def decoded(**environment):
    """What RUN says, with the warnings."""
    out, warned = python(RUN, **environment)
    found = json.loads(out) | {"warned": warned}
    assert found["values"] == [1.0, -2.0, 0.5] and found["bad"] == 3
    return found


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(folder).rglob("*.nb*")}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache folder that one process has filled; what that process said."""
    base = tmp_path_factory.mktemp("cache")
    return base, decoded(REQUANT_CACHE_DIR=base)


def copy_of(filled, tmp_path):
    """The same folder for one test alone, with a name of its own."""
    folder = Path(filled[1]["folder"])
    kept = tmp_path / "cache"
    shutil.copytree(folder, kept / folder.name)
    return kept, kept / folder.name


def test_the_first_process_compiles_and_keeps_its_kernels(filled):
    base, said = filled
    assert said["hits"] == [0, 0] and said["misses"] == [1, 1] and said["warned"] == []
    assert Path(said["folder"]).parent == base and Path(said["folder"]).name.startswith("kernels-")
    assert any("f16.decode" in path.name for path in files(base))


def test_the_next_process_compiles_nothing(filled):
    base, _ = filled
    before = files(base)
    said = decoded(REQUANT_CACHE_DIR=base)
    assert said["hits"] == [1, 1] and said["misses"] == [0, 0] and said["warned"] == []
    assert files(base) == before


def test_the_folder_is_private(filled):
    assert stat.S_IMODE(Path(filled[1]["folder"]).stat().st_mode) == 0o700


def test_the_cache_follows_the_users_cache_folder(filled, tmp_path):
    kept, folder = copy_of(filled, tmp_path)
    kept.rename(tmp_path / "requant")
    said = decoded(XDG_CACHE_HOME=tmp_path)
    assert said["folder"] == str(tmp_path / "requant" / folder.name)


def spoilt(kind, kept, folder, tmp_path):
    """Make `folder` one that must not be used; the path to name as the cache."""
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    if kind == "a file where the folder should be":
        (tmp_path / "file").touch()
        return tmp_path / "file"
    if kind == "a symbolic link":
        folder.symlink_to(elsewhere)
    elif kind == "a dangling link":
        folder.symlink_to(tmp_path / "nowhere")
    elif kind == "open to others":
        elsewhere.rename(folder)
        folder.chmod(0o777)
    elif kind == "somebody else's":
        elsewhere.rename(folder)
        os.chown(folder, 12345, 12345)
    else:
        kept.chmod(0o500)
    return kept


FOREIGN = ["a file where the folder should be", "a symbolic link", "a dangling link", "open to others"]
IS_ROOT = hasattr(os, "getuid") and os.getuid() == 0  # who may give files away, and write where nobody may


@pytest.mark.parametrize("kind", [*FOREIGN, "somebody else's" if IS_ROOT else "read-only"])
def test_a_folder_that_is_not_safely_ours_is_left_alone(filled, tmp_path, kind):
    kept, folder = copy_of(filled, tmp_path)
    named = spoilt(kind, kept, folder, tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = files(tmp_path)
    said = decoded(REQUANT_CACHE_DIR=named, TMPDIR=temporary)
    assert said["hits"] == [0, 0]
    assert Path(said["folder"]).parents[1] == temporary
    assert before.items() <= files(tmp_path).items()
    assert files(temporary)
    (warned,) = said["warned"]
    assert re.match(rf"compiled kernels are not kept in {named}/kernels-\w+: .", warned)


def test_a_folder_of_ours_in_one_that_others_may_change_is_not_trusted(tmp_path):
    """Whoever may rename our folder can put their own in its place after it was looked at."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    shared = tmp_path / f"requant-{user}"
    shared.mkdir()
    shared.chmod(0o777)
    blocked = tmp_path / "file"
    blocked.touch()
    assert decoded(REQUANT_CACHE_DIR=blocked, TMPDIR=tmp_path)["folder"] is None


def test_without_any_folder_kernels_are_compiled_each_time(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    # a folder for temporary files that cannot hold one more: gettempdir is asked only once
    before = f"import tempfile; tempfile.tempdir = {str(blocked)!r}\n"
    said = decoded(before=before, REQUANT_CACHE_DIR=blocked)
    assert said["folder"] is None
    assert [w.split("/kernels-")[0].rpartition(" ")[2] for w in said["warned"]] == [
        str(blocked),
        str(blocked / f"requant-{os.getuid()}"),
    ]
    assert list(tmp_path.iterdir()) == [blocked] and blocked.read_bytes() == b""


DAMAGE = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "other bytes": lambda data: bytes(255 - byte for byte in data),
    "a flipped bit": lambda data: data[:-500] + bytes([data[-500] ^ 1]) + data[-499:],
}


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_does_no_harm(filled, tmp_path, damage, suffix):
    kept, _ = copy_of(filled, tmp_path)
    spoilt = list(kept.rglob(f"*.{suffix}"))
    assert spoilt
    for path in spoilt:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    said = decoded(REQUANT_CACHE_DIR=kept)
    assert said["hits"] == [0, 0]
    assert said["warned"] == [f"the kernel cache {said['folder']} is damaged; kernels are compiled anew"]
    again = decoded(REQUANT_CACHE_DIR=kept)  # and has been mended
    assert again["hits"] == [1, 1] and again["warned"] == []


def test_a_missing_half_of_the_cache_is_compiled_again(filled, tmp_path):
    kept, _ = copy_of(filled, tmp_path)
    for path in kept.rglob("*.nbc"):
        path.unlink()
    assert decoded(REQUANT_CACHE_DIR=kept)["misses"] == [1, 1]
    assert decoded(REQUANT_CACHE_DIR=kept)["hits"] == [1, 1]


def test_a_full_disk_under_the_cache_does_no_harm(tmp_path):
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    said = decoded(preexec_fn=full, REQUANT_CACHE_DIR=tmp_path)
    (warned,) = set(said["warned"])
    assert warned.startswith(f"compiled kernels cannot be kept in {said['folder']}: [Errno 27] File too large")
    assert not list(tmp_path.rglob("*.nbc")) and not list(tmp_path.rglob("*.tmp.*"))
    assert decoded(REQUANT_CACHE_DIR=tmp_path)["hits"] == [0, 0]
    assert decoded(REQUANT_CACHE_DIR=tmp_path)["hits"] == [1, 1]


def test_a_cache_that_cannot_be_read_does_no_harm(filled, tmp_path):
    kept, folder = copy_of(filled, tmp_path)
    for path in kept.rglob("*.nbi"):
        path.unlink()
        path.mkdir()  # as root, there is nothing that one may not read
    said = decoded(REQUANT_CACHE_DIR=kept)
    assert said["hits"] == [0, 0]
    assert f"the kernel cache {folder} cannot be read: Is a directory" in said["warned"]


def test_without_a_home_the_temporary_folder_serves(tmp_path):
    # a user id without an entry in the password file, as containers have
    before = "import os; os.path.expanduser = lambda path: path\n"
    said = decoded(before=before, TMPDIR=tmp_path)
    assert Path(said["folder"]).parents[1] == tmp_path and said["warned"] == []


LIGHT = [
    *("requant", "requant.container.header", "requant.container.source", "requant.container.output"),
    *("requant.model.hyperparameters", "requant.model.memory", "requant.model.roles", "requant.model.mixtures"),
    *(
        "requant.formats",
        "requant.formats.ggml_names",
        "requant.planning.plan",
        "requant.planning.output_metadata",
        "requant.planning.solver.problem",
        "requant.planning.recipe",
        "requant.report.text.inspection",
    ),
]


def test_looking_and_planning_import_neither_compiler_nor_solver():
    assert python(NO_HEAVY, *LIGHT)[0].split() == []

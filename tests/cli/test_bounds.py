"""Files that ask for work or memory without bound: refused in one line before the work begins."""

import contextlib
import json
import math
import resource
import socket
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from commands import TINY, assert_failed, names, run
from fuzz import bases
from fuzz.shape_mutants import sound
from gguf_files import ARCHITECTURE, STR, File, pair

from requant.api.batch.jobs import read_jobs
from requant.api.batch.sources import find_sources
from requant.common import cluster
from requant.common.serialization import dump, parse
from requant.container.source import open_source
from requant.errors import BadInput, InputOutputError
from requant.planning.constraints import Constraints, Limit
from requant.planning.solver.knapsack import choose
from requant.planning.solver.solve import solve
from requant.scoring.losses import Candidate, Losses, TensorLosses

BOMBS = {
    "lists": "[],",
    "objects": "{},",
    "small objects": '{"a":0},',
    "numbers": "1,",
    "texts": '"",',
}


@pytest.mark.parametrize("item", BOMBS.values(), ids=BOMBS)
def test_json_that_takes_far_more_memory_than_it_has_bytes_is_refused(item):
    text = f'{{"schema": "x", "a": [{item * (2**22 // len(item))} 0]}}'
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="holds too many values for its size"):
            parse(text, "x", "bomb.json")
        assert tracemalloc.get_traced_memory()[1] < 2**16
    finally:
        tracemalloc.stop()


def test_losses_of_many_tensors_and_types_are_no_bomb():
    candidates = tuple(Candidate(t, n, 0.1) for t, n in (("F32", 4), ("Q8_0", 4)))
    tensors = tuple(
        TensorLosses(f"{i}", "a", None, (1,), "F32", 4, True, None, candidates[:1], {}) for i in range(2_000)
    )
    losses = Losses("m", "0", "llama", "dfix", None, None, tensors)
    assert len(Losses.from_json(losses.to_json()).tensors) == 2_000
    assert Losses.from_json(json.dumps(json.loads(losses.to_json()), separators=(",", ":"))) == losses


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ([2**62] * 100_000, "has too many dimensions (got 100000, limit 4)"),
        ([1] * 5, "has too many dimensions (got 5, limit 4)"),
        ([2**62, 2], "has too many elements"),
        ([2**32, 2**32, 0], "has too many elements"),
        ([2**63], "a whole number from 0 to 2^63"),
    ],
)
@pytest.mark.parametrize("kind", ["losses", "plan"])
def test_shapes_in_json_have_the_limits_of_gguf(capsys, tmp_path, kind, shape, said):
    raw = json.loads(bases.texts(kind)[0])
    raw["tensors" if kind == "losses" else "choices"][0]["shape"] = shape
    raw.pop("sha256", None)
    (tmp_path / "x.json").write_text(json.dumps(raw))
    words = ["--losses", tmp_path / "x.json", "--bpw", "5"] if kind == "losses" else ["--type", "Q8_0"]
    command = ["plan", TINY, *words] if kind == "losses" else ["diff", tmp_path / "x.json", tmp_path / "x.json"]
    assert_failed(run(capsys, *command), 3, "shape", said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (".".join("a" * 100_000) + " = 1", "a key of too many parts (got 100000: a.a."),
        ("[" + " . ".join(["'a'"] * 9) + "]", "a key of too many parts (got 9: s.s."),
        ('x = {a = """"""", ' + ".".join("a" * 50) + "=1}", "a key of too many parts (got 50"),
        ("\n".join(".".join("ab" * 9) for _ in range(50)), "too many parts"),
        ("[[job]]\nbpw = " + "9" * 5000, "a key or number that is too long (got 5000 characters: 999"),
        ("[[job]]\nbpw = 0x" + "f" * 5000, "a key or number that is too long (got 5002 characters: 0xf"),
        ("a = " + "[" * 100_000, "is not valid TOML"),
        ("a" * (2**22 + 1), "is too large for such a file (limit 4.00 MiB)"),
    ],
)
def test_a_batch_file_is_looked_through_before_it_is_parsed(tmp_path, text, said):
    (tmp_path / "b.toml").write_text(text)
    with pytest.raises(BadInput) as caught:
        read_jobs(tmp_path / "b.toml", {})
    assert said in str(caught.value) and len(str(caught.value)) < 400


def test_dots_in_texts_and_comments_are_no_keys(tmp_path):
    path, dots = tmp_path / "b.toml", ".".join("a" * 50)
    path.write_text(f'# {dots}\n[[job]] # {dots}\nsource = ["{dots}", \'{dots}\', """\n{dots}"""]\n')
    assert read_jobs(path, {})[0].sources[0] == dots


def test_a_number_of_other_digits_is_refused_like_any_other_value(capsys, tmp_path):
    (tmp_path / "b.toml").write_text(f'[[job]]\nsource = "m.gguf"\nbpw = 0x{"f" * 190}\n')
    (tmp_path / "m.gguf").write_bytes(TINY.read_bytes())
    ran = run(capsys, "batch", tmp_path / "b.toml", "-q")
    assert ran.code in (2, 3, 5) and "internal error" not in ran.err + ran.out, ran


def test_a_pattern_follows_no_links_and_ends(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "m.gguf").write_bytes(b"")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert find_sources(tmp_path / "b.toml", "job", ["**/*.gguf"]) == {tmp_path / "a" / "b" / "m.gguf": False}
    assert list(find_sources(tmp_path / "b.toml", "job", ["a/?/m.*", "*/b"])) == [tmp_path / "a" / "b" / "m.gguf"]
    monkeypatch.setattr("requant.api.batch.sources._MAX_ENTRIES", 2)
    with pytest.raises(BadInput, match="too many files and folders"):
        find_sources(tmp_path / "b.toml", "job", ["**/x.gguf"])


def test_a_file_of_a_vocabulary_alone_does_not_end_a_batch(capsys, tmp_path):
    File((pair(ARCHITECTURE, STR, "llama"),), ()).write(tmp_path / "ggml-vocab-x.gguf")
    (tmp_path / "m.gguf").write_bytes(TINY.read_bytes())
    (tmp_path / "b.toml").write_text('[[job]]\nsource = "."\ntype = "Q8_0"\noutput = "out/{stem}.gguf"\n')
    ran = run(capsys, "batch", tmp_path / "b.toml")
    assert ran.code == 0 and "it holds no weights" in ran.err + ran.out, ran
    assert (tmp_path / "out" / "m.gguf").exists()
    (tmp_path / "b.toml").write_text('[[job]]\nsource = "ggml-vocab-x.gguf"\ntype = "Q8_0"\n')
    ran = run(capsys, "batch", tmp_path / "b.toml")
    assert ran.code != 1 and "has no tensors" in ran.err + ran.out, ran


@pytest.mark.parametrize(
    ("text", "got"),
    [("9223372036854775808", "9223372036854775808"), ("-1 2 3", "-1"), ("1 4096 5", "4096"), ("9" * 5000, "9" * 80)],
)
def test_the_token_that_is_none_is_named(capsys, tmp_path, text, got):
    (tmp_path / "ids.txt").write_text(text)
    ran = run(capsys, "evaluate", TINY, "--tokens", tmp_path / "ids.txt", "-q")
    assert_failed(ran, 3, f"has an id that is no token of the model (got {got}", "limit 0 to 4095")


def test_a_tensor_type_file_has_a_largest_number_of_rules(capsys, tmp_path):
    (tmp_path / "t.txt").write_text("a=q8_0 " * 10_001)
    ran = run(capsys, "plan", TINY, "--preset", "Q4_K_M", "--tensor-type-file", tmp_path / "t.txt")
    assert_failed(ran, 3, "line 1: too many rules (limit 10000)")


def test_statistics_of_another_width_are_refused(capsys, tmp_path):
    model, found = tmp_path / "m.gguf", tmp_path / "s.gguf"
    model.write_bytes(b"".join(sound().fields()))
    (tmp_path / "ids.txt").write_text("1 2 3 4 " * 16)
    words = ["--tokens", tmp_path / "ids.txt", "--window", "32", "-q"]
    assert run(capsys, "calibrate", model, "-o", found, *words).code == 0
    for name in (b"token_embd.lookup.g_sum2", b"blk.0.attn_q.weight.g_sum2"):
        content = found.read_bytes()
        at = content.index(name) + len(name) + 4
        (tmp_path / "odd.gguf").write_bytes(content[:at] + (16).to_bytes(8, "little") + content[at + 8 :])
        ran = run(capsys, "score", model, "--statistics", tmp_path / "odd.gguf", "--types", "Q8_0", "-q", "--json")
        assert ran.code == 3 and len(ran.err.splitlines()) == 1, ran


@pytest.mark.parametrize("name", ["output.weight", "blk.0.attn_v.weight"])
@pytest.mark.parametrize("scale", [1e18, 1e30])
def test_huge_weights_end_in_a_plan_or_one_line(capsys, tmp_path, name, scale):
    gguf, path = sound(), tmp_path / "m.gguf"
    gguf.tensors = [[n, s, 0 if n == name.encode() else t] for n, s, t in gguf.tensors]
    content = b"".join(gguf.fields())
    path.write_bytes(content)
    with open_source(path) as source:
        info = source.tensor(name)
        at, n = source.opened[0].header.data_start + info.info.offset, info.n_weights
    large = (np.random.default_rng(0).standard_normal(n) * scale).astype("<f4").tobytes()
    path.write_bytes(content[:at] + large + content[at + len(large) :])
    (tmp_path / "ids.txt").write_text("1 2 3 4 " * 16)
    for how in (["--quick"], ["--tokens", tmp_path / "ids.txt", "--window", "32"]):
        ran = run(capsys, "convert", path, tmp_path / "o.gguf", "--bpw", "15", *how, "-q", "--force")
        assert ran.code in (0, 3, 4, 8) and len(ran.err.splitlines()) == (ran.code != 0), ran
        assert ran.code == 0 or not [n for n in names(tmp_path) if "part.imatrix" in n]


@pytest.mark.parametrize("low, high", [(-60, 60), (-320, -290), (-300, 99), (0, 99), (-6, 60)])
def test_losses_of_any_size_are_solved_at_once(low, high):
    rng = np.random.default_rng(1)
    for n in (5, 22, 200):
        losses = [sorted(map(float, 10.0 ** rng.uniform(low, high, 5)), reverse=True) for _ in range(n)]
        costs = [[(int(size) * bits,) for bits in (2, 4, 6, 8, 16)] for size in rng.integers(1000, 10**6, n)]
        room = sum(option[2][0] for option in costs)
        answer = choose(losses, costs, [room], 20.0, 1e-6)
        picked = answer.picked
        assert picked is not None and sum(c[j][0] for c, j in zip(costs, picked, strict=True)) <= room
        assert "time" not in answer.how
        value = math.fsum(x[j] for x, j in zip(losses, picked, strict=True))
        assert answer.bound <= value * (1 + 1e-9)


def test_the_largest_losses_of_a_file_are_solved():
    candidates = (Candidate("F16", 8192, 0.0), Candidate("Q8_0", 4352, 1e100), Candidate("Q4_K", 2304, 1e-300))
    tensors = tuple(
        TensorLosses(f"blk.{i}.attn_q.weight", "attn_q", i, (256, 16), "F16", 8192, True, None, candidates)
        for i in range(4)
    )
    losses = Losses("m", "0", "llama", "fisher", None, None, tensors)
    plan = solve(losses, Constraints(limits=(Limit("--size", 20_000, 0),)))
    assert plan.predicted_loss < 1e-290 and dump(json.loads(plan.to_json()))


@contextlib.contextmanager
def _peer(say):
    """A port that accepts connections; `say` is then called with each, until they are closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])
                    threading.Thread(target=say, args=(held[-1],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def _nothing(_):
    pass


def _slowly(connection):
    with contextlib.suppress(OSError):
        while not threading.Event().wait(0.2):
            connection.send(b"\0")


@pytest.mark.parametrize("say", [_nothing, _slowly])
def test_a_port_that_is_no_scheduler_is_given_up(monkeypatch, say):
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "_CONNECT", 0.5)
    with _peer(say) as address, pytest.raises(InputOutputError, match="no scheduler answers there"):
        cluster.Cluster(address, lambda: ("", ""))


@pytest.mark.slow
@pytest.mark.parametrize("say", [_nothing, _slowly])
def test_a_port_that_is_no_scheduler_ends_the_command(tmp_path, say):
    pytest.importorskip("distributed")
    with _peer(say) as address:
        words = ["convert", TINY, tmp_path / "o.gguf", "--type", "Q8_0", "--cluster", address]
        process = subprocess.run(
            [sys.executable, "-m", "requant", *words], capture_output=True, text=True, timeout=60, check=False
        )
    assert (process.returncode, process.stdout) == (6, "")
    assert process.stderr.splitlines()[-1].startswith(f"requant: error: {address}: no scheduler answers there")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kib", [300_000, 400_000, 500_000])
def test_too_little_address_space_is_no_internal_error(tmp_path, kib):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (1024 * kib, 1024 * kib))

    words = ["convert", TINY, tmp_path / "o.gguf", "--type", "Q8_0"]
    process = subprocess.run(
        [sys.executable, "-m", "requant", *words],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 6 and "internal error" not in process.stderr, process
    assert names(tmp_path) == []

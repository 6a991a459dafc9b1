"""The Python API: every command as a method, its options as keywords, typed, lazy, interruptible."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest

import requant
from requant.api.keywords import parse_request
from requant.cli.main import COMMANDS
from requant.common.files import hash_file
from requant.errors import BadInput, InfeasibleBudget, OutputRefused, RequantError, RequantWarning, UsageError
from requant.planning.request import PlanRequest
from requant.planning.rules import AUTO, MAX_CONTEXT

ROOT = Path(__file__).parents[2]
TINY, EVAL = ROOT / "fixtures" / "tiny-llama-f16.gguf", ROOT / "fixtures" / "eval.txt"
IMATRIX = ROOT / "fixtures" / "imatrix.gguf"
# options of a command that are the command line's own business: what it prints, and where
SPOKEN = {"progress", "quiet", "verbose"}  # of every command: how it speaks
OWN = {
    "inspect": {"tensors", "json", "debug"},
    "score": {"output", "json", "debug"},
    "plan": {"output", "emit_tensor_types", "explain", "frontier", "force", "json", "debug"},
    "convert": {"dry_run", "report", "json", "debug"},
    "evaluate": {"json", "debug"},
    "calibrate": {"output", "debug"},
    "verify": {"json", "debug"},
}


@pytest.fixture(scope="module")
def model():
    with requant.open(TINY) as opened:
        yield opened


@pytest.fixture(scope="module")
def losses(model):
    return model.score(quick=True, imatrix=IMATRIX, types="Q3_K,Q4_K,Q6_K,Q8_0")


@pytest.mark.parametrize("name", OWN)
def test_the_keywords_of_a_method_are_the_options_of_its_command(name):
    command = importlib.import_module(f"requant.cli.{name}").command
    said = [p.opts for p in command.params if isinstance(p, click.Option)]
    options = {next(o for o in opts if o.startswith("--"))[2:].replace("-", "_") for opts in said} - OWN[name] - SPOKEN
    function = requant.verify if name == "verify" else getattr(requant.Model, name)
    keywords = set(inspect.signature(function).parameters) - {"self", "out", "progress"}
    assert keywords == options
    assert name in COMMANDS


def test_the_public_names_are_there_and_none_is_hidden_by_a_module_of_its_name():
    modules = {module.name for module in pkgutil.iter_modules(requant.__path__)} - {"errors"}
    assert not modules & set(requant.__all__)
    for name in requant.__all__:
        assert getattr(requant, name) is not None
        assert name in dir(requant)
    with pytest.raises(AttributeError, match="nothing"):
        requant.nothing  # noqa: B018


def test_importing_requant_imports_nothing_heavy():
    heavy = ("numpy", "numba", "scipy", "click", "tqdm", "gguf", "requant.api.model", "dataclasses")
    code = f"import sys, requant; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == "[]\n"


def test_strict_mypy_knows_the_types_of_the_api(tmp_path):
    user = tmp_path / "user.py"
    user.write_text(
        """import requant

with requant.open("model.gguf") as m:
    losses = m.score(types=["Q4_K"], progress=lambda p: print(p.done, p.total))
    plan = m.plan(vram="12GiB", ctx=16384, losses=losses)
    reveal_type(plan)
    reveal_type(m.convert("out.gguf", plan))
    reveal_type(m.evaluate(text="eval.txt", base=m).mean_kld)
    reveal_type(requant.verify("out.gguf", source=m).findings)
    reveal_type(requant.quantize([[1.0]], "Q4_K"))
    m.plan(vrm="12GiB")
    m.plan(vram=1.5)
    requant.open(3)
"""
    )
    words = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", user]
    run = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    said = run.stdout
    for kind in (
        "requant.planning.plan.Plan",
        "requant.conversion.record.Conversion",
        "float | None",
        "tuple[str, ...]",
        "ndarray",
    ):
        assert kind in said.replace("Union[float, None]", "float | None").replace("builtins.", ""), (kind, said)
    assert said.count("error:") == 3, said
    for wrong in ("vrm", "vram", "open"):
        assert wrong in "".join(line for line in said.splitlines() if "error:" in line)


def test_a_model_goes_from_scoring_to_a_verified_output(model, losses, tmp_path):
    steps = []
    plan = model.plan(losses=losses, size="6MB", tensor_type={"attn_v": "Q6_K"})
    assert all(c.type == "Q6_K" for c in plan.choices if "attn_v" in c.name)
    made = model.convert(tmp_path / "out.gguf", plan, imatrix=IMATRIX, progress=steps.append)
    assert made.size <= 6_000_000 and made.size == (tmp_path / "out.gguf").stat().st_size
    assert [(s.what, s.unit) for s in steps[:1]] == [("converting", "B")]
    assert steps[0].done == 0 and steps[-1].done == steps[-1].total
    found = requant.verify(made.output, source=model, plan=plan)
    assert found.ok and found.against == ("record", "digests", "source", "plan")
    read = requant.read_conversion(tmp_path / "out.gguf.requant.json")
    assert read.plan == plan and read.tensors == made.tensors
    wrong = requant.verify(made.output, plan=replace(plan, choices=plan.choices[:1], limits=()), threads=1)
    assert wrong.ok  # a plan of fewer tensors says nothing of the others


def test_files_and_objects_are_the_same_to_convert(model, losses, tmp_path):
    (tmp_path / "losses.json").write_text(losses.to_json())
    plan = model.plan(losses=tmp_path / "losses.json", bpw=5)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert requant.read_losses(tmp_path / "losses.json") == losses and requant.read_plan(tmp_path / "plan.json") == plan
    a = model.convert(tmp_path / "a.gguf", plan)
    b = model.convert(tmp_path / "b.gguf", str(tmp_path / "plan.json"))
    assert a.tensors == b.tensors
    c = model.convert(tmp_path / "c.gguf", bpw=5, losses=losses)
    assert c.tensors == a.tensors


@pytest.mark.parametrize("how", [{"type": "q8_0"}, {"preset": "Q4_K_M"}, {"like": TINY}])
def test_a_type_a_preset_and_another_model_decide_as_on_the_command_line(model, how, tmp_path):
    made = model.convert(tmp_path / "out.gguf", **how, no_verify=True)
    types = {t.type for t in made.tensors}
    assert types == {"q8_0": {"Q8_0", "F32"}, "Q4_K_M": {"Q4_K", "Q6_K", "F32"}}.get(
        how.get("type") or how.get("preset"), {"F16", "F32"}
    )


def test_evaluate_takes_a_model_or_a_file_as_base(model, tmp_path):
    out = model.convert(tmp_path / "out.gguf", type="Q4_0", no_verify=True).output
    steps = []
    with requant.open(out) as small:
        a = small.evaluate(text=EVAL, base=model, windows=2, window=128, progress=steps.append)
        b = small.evaluate(text=EVAL, base=TINY, windows=2, window=128)
    assert a == b and 0 < a.mean_kld < 1 and a.n_windows == 2
    assert {s.what for s in steps} == {"reading text", "evaluating"} and steps[-1].done == steps[-1].total


def test_calibrate_writes_what_score_and_convert_take(model, tmp_path):
    stats = tmp_path / "stats.gguf"
    found = model.calibrate(stats, text=EVAL, windows=2, window=64)
    assert found.n_tokens == 128
    losses = model.score(statistics=stats, types=["Q4_K", "Q8_0"])
    assert losses.method == "kfac" and losses.imatrix == "stats.gguf"
    with pytest.raises(OutputRefused, match="already exists"):
        model.calibrate(stats, text=EVAL, windows=2, window=64)


def test_importance_measured_while_scoring_is_written_and_used(model, tmp_path):
    emitted = tmp_path / "m.gguf"
    losses = model.score(text=EVAL, windows=2, window=64, types="Q4_K,Q8_0", emit_imatrix=emitted)
    made = model.convert(tmp_path / "out.gguf", size="8MB", losses=losses, imatrix=emitted, no_verify=True)
    assert (made.imatrix, made.imatrix_sha256) == (EVAL.name, hash_file(emitted))
    assert (losses.imatrix, losses.imatrix_sha256) == (EVAL.name, hash_file(emitted))
    with pytest.raises(UsageError, match="--emit-imatrix"):
        model.score(quick=True, emit_imatrix=tmp_path / "n.gguf")


def test_a_frontier_falls_as_it_grows(model, losses):
    curve = model.frontier(losses=losses, ctx=512)
    sizes, loss = [p.file_bytes for p in curve.points], [p.predicted_loss for p in curve.points]
    assert len(sizes) > 10 and sizes == sorted(sizes) and loss == sorted(loss, reverse=True)


def test_an_inspection_is_of_the_context_that_was_asked_for(model):
    assert model.inspect(ctx=256).needs.n_ctx == 256
    assert model.inspect().needs.n_ctx == 512
    needs = model.inspect(0, reserve=0, parallel=2, ubatch=64, cache_type_k="q8_0").needs
    assert (needs.n_ctx, needs.n_parallel, needs.n_ubatch, needs.cache_type_k) == (512, 2, 64, "Q8_0")
    with pytest.raises(UsageError, match="'AUTO' is no cache type"):
        model.inspect(cache_type_k="auto")
    assert repr(model) == f"Model(path={TINY!r})"


def test_results_are_short_in_a_terminal(model, losses):
    for result in (losses, model.plan(losses=losses, bpw=5), model.inspect()):
        assert len(repr(result)) < 5000, repr(result)


def test_keywords_become_a_request():
    found = parse_request(
        {
            "vram": "12GiB",
            "ram": 2**30,
            "ctx": "max",
            "parallel": np.int64(2),
            "bpw": np.float32(4.5),
            "cache_type_k": "auto",
            "bandwidth": {"gpu": 448, "cpu": 60},
            "engine": "OLLAMA",
            "min_type": {"ffn_down": "q4_k"},
            "group": r"blk\.\d+\.attn",
            "types": ["q4_k", "Q6_K"],
            "output_tensor_type": "q8_0",
            "mtp": False,
            "max_loss": 1,
        }
    )
    assert (found.vram, found.ram, found.n_ctx, found.cache_type_k) == (12 * 2**30, 2**30, MAX_CONTEXT, AUTO)
    assert (found.n_parallel, found.bpw) == (2, 4.5) and type(found.n_parallel) is int
    assert found.bandwidth == (("gpu", 448e9), ("cpu", 60e9)) and found.engine == "ollama"
    assert [str(r) for r in found.floors] == ["--min-type 'ffn_down=Q4_K'"] and found.groups == (r"blk\.\d+\.attn",)
    assert found.types == ("Q4_K", "Q6_K") and found.output_type == "Q8_0" and found.mtp is None
    assert parse_request({}) == PlanRequest()


@pytest.mark.parametrize(
    "asked, message",
    [
        ({}, "nothing decides the types"),
        ({"vram": "12G"}, "--vram: '12G' is not a size"),
        ({"vram": 0}, "--vram: size '0' is out of range"),
        ({"size": 1.5}, "--size"),
        ({"bpw": True}, "--bpw must be a number"),
        ({"bpw": 4, "ctx": "much"}, "--ctx must be a whole number"),
        ({"bpw": 4, "types": "Q4_X"}, "Q4_X"),
        ({"bpw": 4, "tensor_type": {"(": "Q4_K"}}, "is not a regular expression"),
        ({"bpw": 4, "ctx": 512}, "says how memory is spent"),
        ({"bpw": 4, "windows": 0}, "--windows must be"),
        ({"bpw": 4, "quick": True, "text": EVAL}, "--quick scores without data"),
        ({"bpw": 4, "engine": 5}, "--engine must be text"),
        ({"preset": "Q4_K_M", "bpw": 4}, "cannot be given together"),
        ({"bpw": 4, "effort": "most"}, "effort must be one of"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(model, asked, message):
    with pytest.raises(UsageError) as caught:
        model.plan(**asked)
    assert message in str(caught.value)


def test_a_keyword_that_is_none_is_a_type_error_that_names_the_nearest(model):
    with pytest.raises(TypeError, match=r"plan\(\) got an unexpected keyword argument 'vrm'; did you mean vram"):
        model.plan(vrm="12GiB")
    with pytest.raises(TypeError, match="score"):
        model.score(vram="12GiB")


def test_errors_carry_data(model, losses, tmp_path):
    with pytest.raises(InfeasibleBudget) as caught:
        model.plan(losses=losses, size="1MB")
    assert caught.value.smallest > caught.value.budget
    (tmp_path / "no.gguf").write_bytes(b"no model")
    with pytest.raises(BadInput) as caught:
        requant.open(tmp_path / "no.gguf")
    assert caught.value.path == str(tmp_path / "no.gguf")
    for kind in vars(requant.errors).values():
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, Warning):
            assert issubclass(kind, RequantError)


def test_a_closed_model_says_so(tmp_path):
    with requant.open(TINY) as closed:
        pass
    for call in (closed.score, lambda: closed.plan(bpw=4), lambda: closed.convert(tmp_path / "x.gguf", type="Q8_0")):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_what_is_odd_about_a_file_is_a_warning_of_ours(tmp_path):
    odd = TINY.read_bytes() + b"\0" * 7
    (tmp_path / "odd.gguf").write_bytes(odd)
    with pytest.warns(RequantWarning, match="ends in 7 bytes"), requant.open(tmp_path / "odd.gguf"):
        pass


def test_an_architecture_that_cannot_be_run_is_scored_with_a_warning(tmp_path):
    path = tmp_path / "strange.gguf"
    path.write_bytes(TINY.read_bytes().replace(b"llama", b"other"))
    with requant.open(path) as m, pytest.warns(RequantWarning, match="without gradients"):
        assert m.score(types="Q4_K").method in ("cfix", "dfix")


def test_calls_side_by_side_give_what_they_give_alone(model, losses, tmp_path):
    alone = [model.plan(losses=losses, bpw=b).types() for b in (4, 5, 6)]
    rows = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    data = requant.quantize(rows, "Q4_K")
    evaluated = model.evaluate(text=EVAL, windows=2, window=64)
    with ThreadPoolExecutor(6) as pool:
        plans = [pool.submit(model.plan, losses=losses, bpw=b) for b in (4, 5, 6)]
        figures = [pool.submit(model.evaluate, text=EVAL, windows=2, window=64) for _ in range(2)]
        bytes_ = [pool.submit(requant.quantize, rows, "Q4_K") for _ in range(3)]
        made = [pool.submit(model.convert, tmp_path / f"{i}.gguf", type="Q8_0") for i in range(2)]
    assert [p.result().types() for p in plans] == alone
    assert all(np.array_equal(b.result(), data) for b in bytes_)
    assert [f.result() for f in figures] == [evaluated] * 2
    assert made[0].result().tensors == made[1].result().tensors


def test_a_run_that_raises_in_its_progress_goes_on_when_it_is_called_again(model, tmp_path):
    out, seen = tmp_path / "out.gguf", []

    def enough(step):
        seen.append(step)
        if step.done > step.total // 4:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        model.convert(out, type="Q4_K", threads=1, progress=enough)
    assert not out.exists()
    made = model.convert(out, type="Q4_K", threads=1)
    assert made.tensors == model.convert(tmp_path / "again.gguf", type="Q4_K").tensors
    assert sorted(p.name for p in tmp_path.iterdir() if "part" in p.name) == []


def test_progress_is_called_in_the_thread_that_called():
    with requant.open(TINY) as m:
        threads = set()
        m.score(quick=True, types="Q8_0", progress=lambda _: threads.add(threading.current_thread()))
    assert threads == {threading.main_thread()}


INTERRUPTED = """
import ctypes, os, signal, sys, threading
from pathlib import Path
import requant
import requant.api.session

assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
m, folder = requant.open(sys.argv[1]), Path(sys.argv[2])
main = threading.main_thread().ident

def soon(_):
    if not started:
        started.append(threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)))
        started[0].start()

for name, work in {
    "score": lambda: m.score(progress=soon),
    "convert": lambda: [m.convert(folder / "out.gguf", type="IQ2_XXS", imatrix=sys.argv[3], force=True, threads=1,
                                  progress=soon) for _ in range(99)],
    "calibrate": lambda: m.calibrate(folder / "stats.gguf", windows=64, progress=soon),
    "plan": lambda: m.plan(losses=sys.argv[4], bpw=5, progress=soon),
}.items():
    started = []
    if name == "plan":
        requant.api.session.Planner.best = lambda *_, **__: ctypes.CDLL(None).sleep(300)
        soon(None)
    try:
        work()
    except KeyboardInterrupt:
        print(name, "stopped")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
sys.stdout.flush()
os._exit(0)
"""


def test_ctrl_c_raises_keyboard_interrupt_and_leaves_no_broken_output(losses, tmp_path):
    (tmp_path / "losses.json").write_text(losses.to_json())
    folder = tmp_path / "made"
    folder.mkdir()
    words = [sys.executable, "-c", INTERRUPTED, TINY, folder, IMATRIX, tmp_path / "losses.json"]
    run = subprocess.run(words, capture_output=True, text=True, timeout=250, cwd=ROOT, env=os.environ, check=False)
    assert run.stdout.splitlines() == ["score stopped", "convert stopped", "calibrate stopped", "plan stopped"], run
    assert not (folder / "stats.gguf").exists()
    if (folder / "out.gguf").exists():  # of one of the runs before
        assert requant.verify(folder / "out.gguf", source=TINY).ok


def test_no_warning_is_given_without_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with requant.open(TINY) as m:
            m.score(quick=True, types="Q8_0")


def test_master_weights_below_q8_0_are_copied_and_count_in_every_budget(tmp_path):
    """As gpt-oss, whose experts are released in MXFP4; the others are in 16 bits."""
    with requant.open(TINY) as whole:
        whole.convert(tmp_path / "made.gguf", type="F16", tensor_type={"ffn_": "MXFP4"})
    with requant.open(tmp_path / "made.gguf") as made:
        experts = [t for t in made.source.tensors if "ffn_" in t.name and "norm" not in t.name]
        before = {t.name: made.source.read_rows(t).tobytes() for t in experts}
        assert len(before) == 30
        asked = {"size": "6MB", "quick": True, "types": "Q3_K,Q4_K,Q6_K"}
        plan = made.plan(**asked)
        copied = [c for c in plan.choices if c.name in before]
        assert all(c.copied and c.type == "MXFP4" and c.loss == 0 for c in copied)
        assert "30 of its tensors (59% of the weights) are already quantized below Q8_0 and are copied" in plan.notes[0]
        assert plan.n_bytes == sum(c.n_bytes for c in plan.choices) and sum(c.n_bytes for c in copied) > 3e6
        record = made.convert(tmp_path / "out.gguf", **asked)
        assert (tmp_path / "out.gguf").stat().st_size <= 6_000_000 and plan.notes[0] in record.plan.notes
        assert not any(c.copied for c in record.plan.choices if c.name == "output.weight")
        with pytest.raises(InfeasibleBudget, match="the 30 tensors that are already below Q8_0"):
            made.plan(**{**asked, "size": "3.6MB"})
        with pytest.raises(UsageError, match=r"30 tensors .* are MXFP4, which sharpinference does not run"):
            made.plan(**asked, engine="sharpinference")
        again = made.plan(**asked, engine="sharpinference", allow_requantize=True)
        assert "MXFP4" not in again.types().values()
    with requant.open(tmp_path / "out.gguf") as out:
        after = {name: out.source.read_rows(out.source.tensor(name)).tobytes() for name in before}
        assert after == before

"""Several budgets, the frontier, explanations, recipes and differences, as commands."""

import csv
import json
import re

import numpy as np
import pytest
from commands import TINY, assert_failed, run
from draft_heads import projector
from model.forward import families

from requant.container.source import open_source
from requant.model.hyperparameters import read_hyperparameters
from requant.model.mixtures import mixture_types
from requant.planning.plan import read_plan
from requant.scoring.kv_cache_loss import cache_losses
from requant.scoring.options import ScoringOptions


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    path = tmp_path_factory.mktemp("losses") / "l.json"
    from requant.scoring.layerwise import score

    with open_source(TINY) as source:
        path.write_text(score(source, ScoringOptions()).to_json())
    return path


def test_several_budgets_make_a_file_each(capsys, tmp_path, losses):
    asked = ("--losses", losses, "--ctx", "512", "--vram", "12MiB,14MiB", "-o", tmp_path / "p.json")
    ran = run(capsys, "plan", TINY, *asked)
    assert ran.code == 0 and len(ran.out.splitlines()) == 3, ran.err
    small, large = (read_plan(tmp_path / f"p-{n}MiB.json") for n in (12, 14))
    assert small.n_bytes < large.n_bytes
    ran = run(capsys, "diff", tmp_path / "p-12MiB.json", tmp_path / "p-14MiB.json", "--json")
    found = json.loads(ran.out)
    assert (found["bytes_a"], found["bytes_b"]) == (small.n_bytes, large.n_bytes)
    assert len(found["changes"]) + found["n_equal"] == len(small.choices)
    refused = run(capsys, "convert", TINY, tmp_path / "o.gguf", "--losses", losses, "--vram", "12MiB,14MiB")
    assert_failed(refused, 2, "convert makes one file")


def test_the_frontier_is_a_table_that_machines_read(capsys, tmp_path, losses):
    lines = run(capsys, "plan", TINY, "--losses", losses, "--frontier").out.splitlines()
    assert lines[0].startswith("bpw,") and len(lines) > 30
    assert {(row["loss_unit"], row["method"]) for row in csv.DictReader(lines)} == {("points", "dfix")}
    found = json.loads(run(capsys, "plan", TINY, "--losses", losses, "--frontier", "--json").out)
    cpu = run(capsys, "plan", TINY, "--losses", losses, "--frontier", "--engine", "llama.cpp-cpu")
    assert cpu.code == 0 and cpu.out.splitlines() == lines
    assert found["schema"] == "requant.frontier/1" and len(found["points"]) == len(lines) - 1


def test_an_explanation_names_the_alternatives(capsys, losses):
    asked = ("plan", TINY, "--losses", losses, "--size", "6MiB", "--explain")
    out = run(capsys, *asked, "blk.3.ffn_down.weight").out
    assert "best plan with it" in out and "more would buy" in out and "* " in out
    assert "it stays as it is" in run(capsys, *asked, "output_norm.weight").out
    assert_failed(run(capsys, *asked, "nope"), 2, "no tensor 'nope'")
    assert_failed(run(capsys, "plan", TINY, "--explain", "output.weight"), 2)
    assert_failed(
        run(capsys, "plan", TINY, "--bpw", "5", "--explain", "output.weight"), 2, "then give --losses LOSSES.json"
    )


def test_a_preset_is_llama_quantizes_and_a_clone_has_anothers_types(capsys, tmp_path, losses):
    out = tmp_path / "q4.gguf"
    assert run(capsys, "convert", TINY, out, "--preset", "q4_k_m", "--no-verify").code == 0
    with open_source(TINY) as source, open_source(out) as made:
        hp = read_hyperparameters(source.metadata, source.tensors)
        types = mixture_types("Q4_K_M", source.tensors, hp, has_imatrix=False)
        assert {t.name: t.format.name for t in made.tensors if t.name in types} == types
    plan = tmp_path / "like.json"
    assert run(capsys, "plan", TINY, "--like", out, "-o", plan).code == 0
    assert {n: t for n, t in read_plan(plan).types().items() if n in types} == types
    repaired = tmp_path / "repaired.json"
    asked = ("--like", out, "--losses", losses, "--bpw", "4.5", "-o", repaired)
    assert run(capsys, "plan", TINY, *asked).code == 0
    sizes = {c.name: c.n_bytes for c in read_plan(plan).choices}
    assert all(c.n_bytes <= sizes[c.name] for c in read_plan(repaired).choices) and read_plan(repaired).bpw <= 4.5
    assert_failed(run(capsys, "plan", TINY, "--preset", "Q4_K_X"), 2, "no mixture", "Q4_K_M")
    assert_failed(run(capsys, "plan", TINY, "--preset", "Q4_K_M", "--bpw", "4"), 2, "cannot be given together")


def test_a_plan_is_replayed_by_its_tensor_types(capsys, tmp_path, losses):
    recipe, plan, again = tmp_path / "r.txt", tmp_path / "p.json", tmp_path / "again.json"
    asked = ("plan", TINY, "--losses", losses)
    assert run(capsys, *asked, "--bpw", "5", "-o", plan, "--emit-tensor-types", recipe).code == 0
    assert run(capsys, *asked, "--bpw", "16", "--tensor-type-file", recipe, "-o", again).code == 0
    assert read_plan(again).types() == read_plan(plan).types()


def test_rounding_the_cache_more_costs_more():
    tokens = np.random.default_rng(1).integers(0, 4096, (2, 64))
    with open_source(TINY) as source:
        found = cache_losses(source, tokens)
    assert 0 < found["Q8_0/Q8_0"] < found["Q5_1/Q5_1"] < found["Q4_0/Q4_0"] < 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--vram", "12MiB", "--engine", "llama.cpp-gpu"), "--engine"),
        (("--vram", "12MiB", "--engine", "llama.cpp-cpu"), "has no GPU"),
        (("--vram", "12MiB", "--bandwidth", "gpu=fast"), "--bandwidth"),
        (("--vram", "12MiB", "--ctx", "max"), "--max-loss"),
        (("--vram", "12MiB", "--ctx", "some"), "--ctx"),
        (("--size", "12MiB", "--draft", "x.gguf"), "--draft says how memory is spent"),
        (("--max-loss", "0"), "--max-loss must be above 0"),
        (("--vram", "12MiB", "--prefer-within", "0.1"), "--prefer-within"),
    ],
)
def test_options_that_make_no_sense_are_usage(capsys, losses, words, said):
    assert_failed(run(capsys, "plan", TINY, "--losses", losses, *words), 2, said)


UNITS = [
    (("--max-loss", "0.05"), "--size"),
    (("--size", "6MB", "--max-loss", "0.05"), "--size"),
    (("--vram", "12MiB", "--ctx", "max", "--max-loss", "0.05"), "--size"),
    (("--vram", "12MiB", "--cache-type-k", "auto"), "name the cache types"),
    (("--vram", "12MiB", "--ram", "1GiB", "--time-price", "0.3"), "--min-speed"),
]


@pytest.mark.parametrize(("words", "instead"), UNITS)
def test_limits_in_nats_are_refused_for_losses_in_points(capsys, tmp_path, losses, words, instead):
    for command in (("plan", TINY), ("convert", TINY, tmp_path / "out.gguf")):
        quick = run(capsys, *command, *words, "--quick")
        assert_failed(quick, 2, "nats per token", "in points", "leave --quick out", instead)
        assert_failed(run(capsys, *command, *words, "--losses", losses), 2, "score again without --quick", instead)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_run_has_no_loss_in_nats(capsys, tmp_path):
    path = families.write("unknown", tmp_path / "other.gguf")
    failed = run(capsys, "plan", path, "--max-loss", "0.05")
    assert_failed(failed, 2, "in points", "cannot be run", "give --size")
    assert "--quick" not in failed.err and "evaluate" not in failed.err


def test_no_output_says_nats_of_losses_in_points(capsys, tmp_path):
    out, losses = tmp_path / "out.gguf", tmp_path / "losses.json"
    shown = [
        run(capsys, "score", TINY, "--quick", "--types", "Q4_K,Q6_K", "-o", losses),
        run(capsys, "plan", TINY, "--losses", losses, "--size", "7MB", "-o", tmp_path / "plan.json"),
        run(capsys, "plan", TINY, "--losses", losses, "--size", "7MB", "--json"),
        run(capsys, "plan", TINY, "--losses", losses, "--vram", "12MiB,14MiB"),
        run(capsys, "plan", TINY, "--losses", losses, "--frontier", "--json"),
        run(capsys, "plan", TINY, "--losses", losses, "--size", "7MB", "--explain", "output.weight"),
        run(capsys, "plan", TINY, "--losses", losses, "--vram", "12MiB", "--ram", "1GiB"),
        run(capsys, "convert", TINY, out, "--plan", tmp_path / "plan.json", "--json", "--no-verify"),
        *(run(capsys, "report", out, "-o", tmp_path / f"report.{kind}") for kind in ("html", "md", "svg")),
        run(capsys, "diff", out, tmp_path / "plan.json"),
    ]
    assert all(ran.code == 0 for ran in shown), shown
    assert "points" in shown[1].out and "points" in shown[4].out and "loss, points" in shown[5].out
    texts = [ran.out + ran.err for ran in shown]
    texts += [p.read_text(encoding="utf-8") for p in tmp_path.iterdir() if p.suffix != ".gguf"]
    assert len(texts) >= len(shown) + 6
    for text in texts:
        assert not re.search(r"\bnats?\b", text), re.search(r".{0,80}\bnats?\b.{0,80}", text)


@pytest.mark.parametrize(
    ("kind", "budget"),
    [
        ("model", ("--quick", "--size", "50MB")),
        ("model", ("--quick", "--vram", "100MiB", "--ctx", "512")),
        ("model", ("--size", "50MB")),
        ("model", ("--size", "50MB", "--losses")),
        ("projector", ("--size", "50MB")),
    ],
)
def test_a_copy_loses_nothing_and_has_neither_method_nor_unit(capsys, tmp_path, losses, kind, budget):
    out, plan, scored = tmp_path / "out.gguf", tmp_path / "plan.json", "--losses" in budget
    model = TINY if kind == "model" else projector().write(tmp_path / "mmproj.gguf")
    words = (*budget, losses) if scored else budget
    shown = [
        run(capsys, "plan", model, *words, "-o", plan),
        run(capsys, "convert", model, out, *words, "--no-verify"),
        *(run(capsys, "report", out, "-o", tmp_path / f"report.{kind}") for kind in ("md", "svg", "html")),
    ]
    assert all(ran.code == 0 for ran in shown), shown
    assert "no loss: every tensor keeps its type" in shown[0].out
    found = json.loads(plan.read_text())
    made = json.loads((tmp_path / "out.gguf.requant.json").read_text())["plan"]
    how = (0, "points", "dfix") if scored else (0, None, "unscored")
    for kept in (found, made):
        assert (kept["predicted_loss"], kept["loss_unit"], kept["method"]) == how
    card, page = ((tmp_path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    assert "No loss: every tensor keeps its type." in card and "<b>none</b> <small>every tensor keeps its type" in page
    assert not re.search(r"KL|nats|predicted|fisher", card)
    texts = [*(ran.out + ran.err for ran in shown), page.replace("evaluate: perplexity and KL divergence", ""), card]
    for text in texts:
        assert not re.search(r"\bnats?\b|\bKL\b|fisher", text), re.search(r".{0,80}(nats?|KL|fisher).{0,80}", text)


def test_a_table_of_budgets_of_copies_has_no_unit(capsys):
    assert "  loss  " in run(capsys, "plan", TINY, "--quick", "--vram", "100MiB,200MiB").out.splitlines()[0]


def test_a_difference_says_whether_the_predicted_losses_compare(capsys, tmp_path, losses):
    plans = {name: tmp_path / f"{name}.json" for name in ("points", "more", "nats", "weighted", "copy")}
    for name, size in (("points", "7MB"), ("more", "8MB")):
        run(capsys, "plan", TINY, "--losses", losses, "--size", size, "-o", plans[name])
    run(capsys, "plan", TINY, "--quick", "--size", "50MB", "-o", plans["copy"])
    read = json.loads(plans["points"].read_text())
    for name, method, unit in (("nats", "fisher", "nats per token"), ("weighted", "cfix", "points")):
        plans[name].write_text(json.dumps(read | {"method": method, "loss_unit": unit}))
    for other, compare in (("more", True), ("nats", False), ("weighted", False), ("copy", None)):
        pair = ("diff", plans["points"], plans[other])
        assert json.loads(run(capsys, *pair, "--json").out)["losses_compare"] is compare
        text = run(capsys, *pair).out
        assert ("do not compare" in text) is (compare is False)
        assert (", no loss: every tensor keeps its type" in text) is (other == "copy")


def test_an_old_plan_with_a_limit_in_points_says_points(capsys, tmp_path, losses):
    plan = json.loads(run(capsys, "plan", TINY, "--losses", losses, "--size", "7MB", "--json").out)
    limit = {"option": "--max-loss", "budget": 10**12, "unit": "loss"}
    for key in ("loss_unit", "imatrix", "imatrix_sha256", "imatrix_file"):
        del plan[key]  # as version 0.1.0 wrote it
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan | {"limits": [*plan["limits"], limit]}))
    page = tmp_path / "p.html"
    assert run(capsys, "report", path, "-o", page).code == 0
    assert "of 1 points" in page.read_text() and not re.search(r"\bnats?\b", page.read_text())
    path.write_text(json.dumps(plan | {"loss_unit": "nats per token"}))
    assert_failed(run(capsys, "report", path, "-o", page, "--force"), 3, "loss_unit is not that of the method")


@pytest.mark.parametrize("source_type", ["Q4_0", "MXFP4", "NVFP4"])
def test_a_file_that_is_all_below_q8_0_gets_one_true_message(capsys, tmp_path, source_type):
    source = tmp_path / "m.gguf"
    assert run(capsys, "convert", TINY, source, "--type", source_type).code == 0
    plan = ("plan", source, "--quick", "--size")
    kept = "already quantized below Q8_0, and nothing else can be quantized"
    for size in ("1MB", "1.5MB"):
        ran = run(capsys, *plan, size)
        assert_failed(ran, 3, kept, "start from an F16", "--allow-requantize alone is not enough: --size")
        needed = re.search(r"raise it to ([0-9.]+MiB)", ran.err)[1]
        assert_failed(run(capsys, *plan, size, "--allow-requantize"), 4, f"raise it to {needed}")
    assert_failed(run(capsys, *plan, needed), 3, kept, "or pass --allow-requantize to lose quality twice")
    assert run(capsys, *plan, needed, "--allow-requantize").code == 0
    assert run(capsys, *plan, "7MB").code == 0

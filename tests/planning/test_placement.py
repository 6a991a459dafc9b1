"""Placements against every possibility, engines' command lines, and what the planner says of budgets that fail."""

import itertools
import json
import math
import random
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from strategies import tensor

from requant.container.metadata import Metadata
from requant.errors import InfeasibleBudget, UsageError
from requant.model.engine_settings import EngineSettings
from requant.model.hyperparameters import read_hyperparameters
from requant.model.memory import memory_for
from requant.planning.constraints import Constraints
from requant.planning.deployment import Deployment
from requant.planning.engines import ENGINES, GENERIC, SLOW_ON_CPU, engine_named, parse_bandwidth
from requant.planning.placement import best_placement
from requant.planning.plan import Plan
from requant.planning.solver.problem import constrain
from requant.report.start_command import start_command
from requant.scoring.losses import ALREADY_QUANTIZED, Losses

ARGUMENTS = json.loads((Path(__file__).parents[2] / "fixtures" / "llama_arguments.json").read_text())["options"]
KIB = 2**10


def hyperparameters(n_layers, n_expert=0, n_nextn=0):
    keys = {
        "llama.nextn_predict_layers": ("u32", n_nextn),
        "general.architecture": ("str", "llama"),
        "llama.block_count": ("u32", n_layers),
        "llama.context_length": ("u32", 512),
        "llama.embedding_length": ("u32", 256),
        "llama.feed_forward_length": ("u32", 512),
        "llama.attention.head_count": ("u32", 4),
        "llama.vocab_size": ("u32", 100),
        "llama.expert_count": ("u32", n_expert),
        "llama.expert_used_count": ("u32", n_expert and 2),
    }
    return read_hyperparameters(Metadata("m.gguf", {}).with_values(keys))


def drawn(n_layers, seed, n_expert=0):
    draw = random.Random(seed)

    def losses_by_type():
        scale = 10 ** draw.gauss(-2, 0.7)
        return {t: scale * 4.0**-k * draw.lognormvariate(0, 0.2) for k, t in enumerate(("Q2_K", "Q4_K", "Q8_0"))}

    tensors = [tensor("token_embd.weight", losses_by_type(), (256, 100), on_gpu=False)]
    for il in range(n_layers):
        if n_expert:
            tensors.append(tensor(f"blk.{il}.attn_q.weight", losses_by_type(), (256, 256)))
            tensors.append(tensor(f"blk.{il}.ffn_up_exps.weight", losses_by_type(), (256, 128, n_expert)))
            tensors.append(tensor(f"blk.{il}.ffn_down_exps.weight", losses_by_type(), (256, 128, n_expert)))
        else:
            tensors.append(tensor(f"blk.{il}.ffn_up.weight", losses_by_type(), (256, draw.choice([256, 512]))))
    tensors.append(tensor("output.weight", losses_by_type(), (256, 100)))
    return Losses("m.gguf", "0" * 64, "llama", "fisher", None, None, tuple(tensors))


def deployment(hp, vram, ram, *, price=0.2, min_speed=None, engine=GENERIC):
    slow = replace(engine, bandwidth={"gpu": 4e8, "cpu": 5e7, "pcie": 1e9})  # so that a small model takes time
    return Deployment(
        hp, slow, memory_for(hp, EngineSettings(512, n_ubatch=32), reserve=0), vram, ram, min_speed, price
    )


def least_of_all(losses, where):
    """The least value of every number of layers, device and type, each checked by a Plan that cannot be over budget."""
    best = math.inf
    for k in range(where.n_places + 1):
        plain = where.constraints(losses, Constraints(), k, 0)
        free = sorted({plain.units[n] for n, d in plain.devices.items() if len(d) > 1})
        for sides in itertools.product(("gpu", "cpu"), repeat=len(free)):
            side = dict(zip(free, sides, strict=True))
            devices = [
                d[0] if len(d := plain.devices[t.name]) == 1 else side[plain.units[t.name]] for t in losses.tensors
            ]
            for picked in itertools.product(*(t.candidates for t in losses.tensors)):
                best = min(best, value_of(losses, plain, devices, picked, with_copy=k > 0))
    return best


def value_of(losses, constraints, devices, picked, *, with_copy):
    shares = [constraints.shares[t.name] for t in losses.tensors]
    uses = [constraints.use(t, c, d) for t, c, d in zip(losses.tensors, picked, devices, strict=True)]
    copied = max((u.n_bytes for u, d, s in zip(uses, devices, shares, strict=True) if d == "cpu" and s > 0), default=0)
    for limit in constraints.limits:
        more = copied if limit.option == "--vram" and with_copy else 0
        if limit.other + more + sum(limit.cost(u) for u in uses) > limit.budget:
            return math.inf
    return sum(u.loss for u in uses) + constraints.price * 1e-9 * (
        constraints.timing.fixed_ns + sum(u.ns for u in uses)
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("vram", "ram", "speed"), [(900, 500, None), (700, 900, None), (800, 700, 250.0)])
def test_no_placement_of_layers_is_better(seed, vram, ram, speed):
    losses, where = drawn(4, seed), deployment(hyperparameters(4), vram * KIB, ram * KIB, min_speed=speed)
    check_against_all(losses, where)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize(("vram", "ram"), [(900, 700), (1200, 600)])
def test_no_placement_of_experts_is_better(seed, vram, ram):
    check_against_all(drawn(2, seed, 4), deployment(hyperparameters(2, 4), vram * KIB, ram * KIB))


def check_against_all(losses, where):
    best = least_of_all(losses, where)
    if best == math.inf:
        with pytest.raises(InfeasibleBudget):
            best_placement(losses, Constraints(), where)
        return
    found = best_placement(losses, Constraints(), where)
    assert found.solution.value * (1 - found.gap) <= best * (1 + 1e-9)  # what is proven holds
    assert best * (1 - 1e-9) <= found.solution.value <= best * 1.001
    for limit in found.solution.plan.limits:
        assert found.solution.plan.used(limit) <= limit.budget


def test_the_last_layers_go_first_and_sharpinference_takes_the_first():
    last, first = (
        deployment(hyperparameters(4), 1, 1),
        deployment(hyperparameters(4), 1, 1, engine=ENGINES["sharpinference"]),
    )
    assert [list(last.layers(k)) for k in (0, 1, 3, 5)] == [[], [], [2, 3], [0, 1, 2, 3]]
    assert [list(first.layers(k)) for k in (0, 2, 4)] == [[], [0, 1], [0, 1, 2, 3]]
    output = drawn(4, 0).tensors[-1]
    assert last.devices(output, 1, tied=False) == ("gpu",) and first.devices(output, 3, tied=False) == ("cpu",)


def test_layers_of_multi_token_prediction_count_only_when_used():
    hp = hyperparameters(5, n_nextn=1)
    place, nextn = deployment(hp, 1, 1), tensor("blk.4.ffn_up.weight", {})
    assert place.devices(nextn, 5, tied=False) == ("none",)
    assert replace(place, mtp=True).devices(nextn, 5, tied=False) == ("gpu",)
    assert place.n_gpu_layers(2) == 3  # the engine counts it among the last


def test_engines_are_named_and_bandwidths_read():
    assert engine_named("LLAMA.CPP-CUDA").name == "llama.cpp-cuda" and engine_named(None) is GENERIC
    with pytest.raises(UsageError, match=r"--engine: 'llama.cpp-kuda'.*llama.cpp-cuda"):
        engine_named("llama.cpp-kuda")
    assert parse_bandwidth("gpu=448,cpu=60.5") == {"gpu": 448e9, "cpu": 60.5e9}
    for wrong in ("gpu", "tpu=3", "gpu=0", "gpu=x", "cpu=-1", "gpu=inf", "gpu=nan"):
        with pytest.raises(UsageError, match="--bandwidth"):
            parse_bandwidth(wrong)


def test_the_figures_of_an_engine_are_in_one_order_so_that_plans_have_the_same_bytes():
    slow = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
    assert list(ENGINES["llama.cpp-cuda"].slower) == [*slow, "NVFP4"]
    assert list(ENGINES["llama.cpp-cpu"].slower)[:7] == slow


def test_types_that_do_not_run_somewhere_are_not_put_there():
    assert "NVFP4" in ENGINES["llama.cpp-metal"].cannot["gpu"] and "TQ1_0" in ENGINES["llama.cpp-cuda"].cannot["gpu"]
    assert all("NVFP4" in ENGINES["ik_llama.cpp"].cannot[device] for device in ("gpu", "cpu"))
    for engine in ENGINES.values():
        assert not any(types & set(engine.candidates) for types in engine.cannot.values())


def planned(**runtime):
    budget = {"ctx": 8192, "parallel": 1, "ubatch": 256, "cache_type_k": "Q8_0", "cache_type_v": "Q8_0"}
    return Plan("m.gguf", "0" * 64, "llama", "fisher", budget, (), {}, (), 0.1, 0.0, runtime=runtime)


RUNTIMES = (
    {"n_gpu_layers": 7, "all_layers": False},
    {"n_gpu_layers": 33, "all_layers": True, "experts_on_cpu": [0, 1, 2]},
    {"n_gpu_layers": 33, "all_layers": True, "experts_on_cpu": [1, 5], "draft": "d.gguf", "draft_arch": "eagle3"},
    {"n_gpu_layers": 33, "all_layers": True, "mtp": True, "mmproj": "v.gguf"},
)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("engine", [None, *(e.name for e in ENGINES.values() if e.family == "llama.cpp")])
def test_command_lines_keep_to_the_real_syntax(engine, runtime):
    plan = planned(**runtime, **({} if engine is None else {"engine": engine}))
    words = shlex.split(start_command(plan, Path("out model.gguf")))
    assert words[:3] == ["llama-server", "-m", "out model.gguf"]
    place = 1
    while place < len(words):
        assert words[place] in ARGUMENTS, words[place]
        place += 1 + ARGUMENTS[words[place]]
    assert place == len(words)
    pattern = words[words.index("-ot") + 1] if "-ot" in words else ""
    assert "," not in pattern and "{" not in pattern


def test_other_engines_get_lines_of_their_own():
    some = {"n_gpu_layers": 7, "all_layers": False}
    experts = {"n_gpu_layers": 33, "all_layers": True, "experts_on_cpu": [1, 5]}
    modelfile = start_command(planned(engine="ollama", **some), Path("x/out.gguf"))
    assert modelfile.splitlines()[:3] == ["FROM ./out.gguf", "PARAMETER num_ctx 8192", "PARAMETER num_gpu 7"]
    kobold = start_command(planned(engine="koboldcpp", **experts), Path("o.gguf"))
    assert "--overridetensors" in kobold and "--quantkv 1" in kobold and "--contextsize 8192" in kobold
    assert "-ot" in start_command(planned(engine="ik_llama.cpp", **experts), Path("o.gguf"))
    assert "-g 7 -c 8192 --kv-type q8_0" in start_command(planned(engine="sharpinference", **some), Path("o.gguf"))


def with_masters(n_layers=4, n_expert=8, *, free=False):
    """A model whose experts are MXFP4 in rows that no super-block divides, copied or, if `free`, rounded again."""
    small = {"Q2_0": 0.2} if free else {}
    kept, own = None if free else ALREADY_QUANTIZED, {"Q2_0": 0.05, "IQ4_NL": 0.01, "Q8_0": 0.001}
    tensors = [tensor("token_embd.weight", own, (576, 100), on_gpu=False)]
    for il in range(n_layers):
        tensors.append(tensor(f"blk.{il}.attn_q.weight", own, (576, 576)))
        tensors += [
            tensor(f"blk.{il}.ffn_{x}_exps.weight", small, (576, 64, n_expert), source_type="MXFP4", reason=kept)
            for x in ("gate", "up", "down")
        ]
    tensors.append(tensor("output.weight", own, (576, 100)))
    return Losses("m.gguf", "0" * 64, "llama", "fisher", None, None, tuple(tensors))


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("engine", [GENERIC, ENGINES["llama.cpp-cuda"], ENGINES["ollama"]], ids=lambda e: e.name)
def test_a_trial_without_a_type_for_a_tensor_is_only_infeasible(free, engine):
    """Q2_0 does not count as what the CPU could have: with a buffer for its size alone, MXFP4 would fit nowhere."""
    losses, hp = with_masters(free=free), hyperparameters(4, n_expert=8)
    base = Constraints(not_on_cpu=SLOW_ON_CPU, odd_rows=frozenset(["Q2_0"]), unusable=engine.cannot)
    met = 0
    for vram, ram in itertools.product(range(800, 4000, 400), (2000, 4000, 8000)):
        try:
            found = best_placement(losses, base, deployment(hp, vram * KIB, ram * KIB, engine=engine))
        except InfeasibleBudget as fault:
            assert fault.budget < fault.smallest, (vram, ram)
            continue
        met += 1
        plan = found.solution.plan
        assert not any(c.type == "Q2_0" and c.device == "cpu" and c.share for c in plan.choices)
    assert met > 8


def test_a_device_without_a_type_for_a_tensor_is_named():
    losses = Losses(
        "m.gguf", "0" * 64, "llama", "fisher", None, None, (tensor("output.weight", {}, source_type="TQ2_0"),)
    )
    held = Constraints(unusable={"gpu": frozenset(["TQ2_0"])}, devices={"output.weight": ("gpu",)})
    with pytest.raises(InfeasibleBudget, match=r"output.weight must be on the GPU, where it can have none of TQ2_0"):
        constrain(losses, held)

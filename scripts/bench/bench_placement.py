"""Time and gap of placements on the shapes of fixtures/memory_golden.json, with invented losses; a table.

Losses fall fourfold per bit and are spread over three orders of magnitude between tensors. Peer: the best types for as
many whole layers on the GPU as fit at 4.85 bits per weight, the rest on the CPU; its value over the plan's.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

from requant.container.metadata import Metadata
from requant.errors import InfeasibleBudget
from requant.formats import by_name
from requant.model.engine_settings import EngineSettings
from requant.model.hyperparameters import read_hyperparameters
from requant.model.memory import memory_for, on_device
from requant.model.roles import is_tied, layer_of, never_quantize, role_of, usable_types
from requant.planning.constraints import Constraints
from requant.planning.deployment import DEFAULT_PRICE, Deployment
from requant.planning.engines import GENERIC
from requant.planning.placement import REL_GAP, SECONDS_EACH, best_placement
from requant.planning.solver.solve import solve_or_explain
from requant.scoring.losses import Candidate, Losses, TensorLosses
from requant.scoring.options import DEFAULT_TYPES

GOLDEN = json.loads((Path(__file__).parents[2] / "fixtures" / "memory_golden.json").read_text())["models"]
GIB = 2**30


def losses_of(name: str, n_layers: int | None = None) -> tuple[Losses, object]:
    """The model called `name`, or one with its first `n_layers` layers repeated, with losses for every type."""
    entry, draw = GOLDEN[name], random.Random(1)
    metadata = {k: tuple(v) for k, v in entry["metadata"].items()}
    arch = metadata["general.architecture"][1]
    parts = {layer: g["parts"] for g in entry["tensors"] for layer in g["layers"]}
    own = max(layer for layer in parts if layer is not None) + 1
    if n_layers is not None:
        metadata[f"{arch}.block_count"] = ("u32", n_layers)
        parts = {None: parts[None]} | {il: parts[il % own] for il in range(n_layers)}
    named = [
        (f"blk.{il}.{n}" if il is not None else n, tuple(d), by_name(f)) for il, ps in parts.items() for n, d, f in ps
    ]
    names = {n for n, _, _ in named}
    hp = read_hyperparameters(Metadata("shape.gguf", {}).with_values(metadata))
    tensors = []
    for tensor, shape, fmt in named:
        reason = never_quantize(arch, tensor, shape, fmt.type_id)
        n = math.prod(shape)
        scale = 1e-2 * 10 ** draw.gauss(0, 0.5) * math.sqrt(n / 1e9)
        types = [] if reason else usable_types(shape[0], DEFAULT_TYPES)[0]
        found = [Candidate(fmt.name, fmt.n_bytes(n), 0.0)]
        for t in types:
            own_format = by_name(t)
            loss = scale * 4.0 ** (4.5 - own_format.bpw) * draw.lognormvariate(0, 0.1)
            found.append(Candidate(t, own_format.n_bytes(n), loss))
        place = tensor, role_of(tensor), layer_of(tensor), shape, fmt.name, fmt.n_bytes(n)
        on_gpu = on_device(hp, tensor, tied=is_tied(names))
        tensors.append(TensorLosses(*place, on_gpu, reason, tuple(found)))
    return Losses(name, "0" * 64, arch, "fisher", None, None, tuple(tensors)), hp


def run(name: str, n_layers: int | None, vram: int, ram: int, speed: float | None) -> None:
    losses, hp = losses_of(name, n_layers)
    settings = EngineSettings(8192)
    memory = memory_for(hp, settings, vram=vram * GIB)
    where = Deployment(hp, GENERIC, memory, vram * GIB, ram * GIB, speed, DEFAULT_PRICE)

    def solve(losses: Losses, constraints: Constraints):
        return solve_or_explain(losses, constraints, time_limit=SECONDS_EACH, rel_gap=REL_GAP, why=False)

    start = time.perf_counter()
    found = best_placement(losses, Constraints(), where)
    seconds = time.perf_counter() - start
    peer = usual(losses, where, solve)
    label = name.removesuffix(" F16") + (f", {n_layers} layers" if n_layers else "")
    plan = found.solution.plan
    per_token = 1e9 / plan.ns_per_token
    figures = f"{len(losses.tensors)} | {vram} + {ram} GiB{f', {speed:g} tokens/s' if speed else ''} | {seconds:.1f} s"
    print(
        f"| {label} | {figures} | {found.gap:.1e} | {per_token:.1f} | {peer / found.solution.value:.2f} |", flush=True
    )


def usual(losses: Losses, where: Deployment, solve) -> float:
    """The value at the most layers that fit when every matrix has Q4_K's bits, or at fewer where that has no plan."""
    for k in range(where.n_places, -1, -1):
        try:
            constraints = where.constraints(losses, Constraints(), k, 0)
            room = next(x.budget - x.other for x in constraints.limits if x.option == "--vram")
            on_gpu = [t for t in losses.tensors if constraints.devices[t.name][0] == "gpu"]
            if sum(t.n_weights for t in on_gpu) * 4.85 / 8 <= room:
                return solve(
                    losses, replace(constraints, devices={n: d[:1] for n, d in constraints.devices.items()})
                ).value
        except InfeasibleBudget:
            continue
    return math.inf


if __name__ == "__main__":
    print("| model | tensors | VRAM + RAM | solved in | gap | tokens/s | usual layers, our types ÷ this |")
    print("|---|--:|---|--:|--:|--:|--:|")
    run("Llama-3.1-70B F16", None, 24, 48, None)
    run("Llama-3.1-70B F16", 100, 24, 64, None)
    run("Llama-3.1-70B F16", 100, 24, 64, 2.0)
    run("Qwen3-30B-A3B F16", None, 12, 32, None)
    run("Qwen3-30B-A3B F16", 60, 12, 32, None)
    run("Qwen3-30B-A3B F16", 60, 12, 32, 30.0)

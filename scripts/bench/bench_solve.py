"""Time and gap of the solver on synthetic models, and the convex hull + greedy peer in the same run; JSON lines.

The models: 250 tensors of a dense model, and 1000 groups x 12 types, with losses that fall fourfold per bit, spread
over four orders of magnitude between tensors, and a large embedding.
"""

from __future__ import annotations

import json
import math
import time

import numpy as np

from requant.planning.solver.knapsack import choose
from requant.planning.solver.solve import REL_GAP

BPW = [2.0625, 2.5625, 2.625, 3.0625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5, 16.0, 32.0]


def model(n_items: int, n_types: int, seed: int) -> tuple[list[list[float]], list[list[int]]]:
    """Losses and bytes, per item and type."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([576, 1536, 2304, 8192], n_items) * 2304
    sizes[0] = 2304 * 128 * 1024
    gains = 10 ** rng.normal(-3, 1, n_items)
    bpw = np.array(BPW)[:n_types]
    noise = rng.lognormal(0, 0.2, (n_items, n_types))
    losses = gains[:, None] * 4.0**-bpw * noise
    losses[:, -1] = 0.0
    costs = (sizes[:, None] * bpw / 8).astype(np.int64)
    return losses.tolist(), costs.tolist()


def hull_greedy(losses: list[list[float]], costs: list[list[int]], room: int) -> float:
    """Loss of the usual allocator: steps along each item's convex hull, the steepest first, while they fit."""
    steps, total, left = [], 0.0, room
    for i, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
        at = min(range(len(cost)), key=lambda j: (cost[j], loss[j]))
        total, left = total + loss[at], left - cost[at]
        order = 0
        while True:
            ahead = [j for j in range(len(cost)) if cost[j] > cost[at] and loss[j] < loss[at]]
            if not ahead:
                break
            best = max(ahead, key=lambda j: (loss[at] - loss[j]) / (cost[j] - cost[at]))
            ratio = (loss[at] - loss[best]) / (cost[best] - cost[at])
            steps.append((-ratio, i, order, cost[best] - cost[at], loss[at] - loss[best]))
            at, order = best, order + 1
    stuck = set()
    for _, i, _, cost, gain in sorted(steps):
        if i in stuck or cost > left:
            stuck.add(i)
            continue
        left, total = left - cost, total - gain
    return total


def run(name: str, n_items: int, n_types: int, bpw: float, two: bool) -> None:
    losses, costs = model(n_items, n_types, 1)
    weights = sum(c[-1] for c in costs) * 8 / BPW[n_types - 1]
    room = [int(bpw * weights / 8)]
    both = [[[c] for c in item] for item in costs]
    if two:  # every third item on the CPU
        both = [[[c if i % 3 else 0, c] for c in item] for i, item in enumerate(costs)]
        room = [int(room[0] * 0.6), room[0]]
    start = time.perf_counter()
    answer = choose(losses, both, room, 60.0, REL_GAP)
    seconds = time.perf_counter() - start
    loss = math.fsum(item[j] for item, j in zip(losses, answer.picked, strict=True))
    start = time.perf_counter()
    peer = None if two else hull_greedy(losses, costs, room[0])
    line = {
        "problem": name, "items": n_items, "types": n_types, "bpw": bpw, "limits": len(room),
        "seconds": round(seconds, 3), "gap": (loss - answer.bound) / loss, "how": answer.how,
        "peer_seconds": round(time.perf_counter() - start, 3), "peer_excess": peer and peer / loss - 1,
    }  # fmt: skip
    print(json.dumps(line), flush=True)


def main() -> None:
    for bpw in (2.6, 3.0, 3.5, 4.5, 5.5):
        run("dense", 250, 12, bpw, False)
        run("groups", 1000, 12, bpw, False)
    run("dense", 250, 12, 3.5, True)
    run("groups", 1000, 12, 3.5, True)
    run("few", 12, 12, 3.5, False)


if __name__ == "__main__":
    main()

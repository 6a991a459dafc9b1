"""Memory beside the weights against llama.cpp's own figures, fixtures/memory_golden.json; a Markdown table.

Cache: rows whose bytes differ, as allocated and as CUDA pads them. Compute: ours over theirs, least and most.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from requant.container.metadata import Metadata
from requant.model.engine_settings import EngineSettings
from requant.model.hyperparameters import Hyperparameters, read_hyperparameters
from requant.model.memory import compute_bytes, kv_cache_bytes

GOLDEN = json.loads((Path(__file__).parents[2] / "fixtures" / "memory_golden.json").read_text())


def hyperparameters(name: str) -> Hyperparameters:
    entry = GOLDEN["models"][name]
    metadata = Metadata("shape.gguf", {}).with_values({k: tuple(v) for k, v in entry["metadata"].items()})
    outside = [g["parts"] for g in entry["tensors"] if None in g["layers"]]
    return read_hyperparameters(
        metadata, [SimpleNamespace(name=n, shape=tuple(d)) for parts in outside for n, d, _ in parts]
    )


def settings_of(row: dict) -> EngineSettings:
    return EngineSettings(
        row["ctx"],
        row["n_parallel"],
        row["n_ubatch"],
        row["cache_type_k"],
        row["cache_type_v"],
        unified=row["kv_unified"],
        flash_attn=row["flash_attn"],
        swa_full=row.get("swa_full", False),
        n_outputs=row.get("n_outputs_max"),
    )


if __name__ == "__main__":
    print("| architecture | rows | caches that differ | compute, least | most |")
    print("|---|--:|--:|--:|--:|")
    found: dict[str, list[tuple[bool, float]]] = {}
    for row in GOLDEN["entries"]:
        hp, settings = hyperparameters(row["model"]), settings_of(row)
        caches = kv_cache_bytes(hp, settings), kv_cache_bytes(hp, settings, padded=True)
        ratio = compute_bytes(hp, settings) / row["gpu"][2]
        found.setdefault(hp.arch, []).append((caches != (row["kv_bytes"], row["gpu"][1]), ratio))
    found["all"] = [pair for pairs in found.values() for pair in pairs]
    for arch, pairs in found.items():
        ratios = [ratio for _, ratio in pairs]
        wrong = sum(differs for differs, _ in pairs)
        print(f"| {arch} | {len(pairs)} | {wrong} | {min(ratios):.3f} | {max(ratios):.3f} |")

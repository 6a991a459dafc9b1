"""How to start the engine for a plan: the llama.cpp command line under which its memory figures hold."""

from __future__ import annotations

import shlex
from pathlib import Path

from requant.plan import Plan

ALL_LAYERS = 99  # what people write for -ngl to mean all
DEFAULT_UBATCH = 512
DEFAULT_CACHE = "F16"


def llama_server(plan: Plan, out: Path) -> str:
    """`llama-server ...` for the model at `out`, as a shell takes it.

    Without a budget in VRAM the plan says nothing of context, batch and cache, and neither does the line.
    """
    asked = plan.budget
    n_layers = 1 + max((c.layer for c in plan.choices if c.layer is not None), default=0)
    words = ["llama-server", "-m", str(out), "-ngl", str(max(ALL_LAYERS, n_layers + 1))]
    if "vram" in asked:
        # one sequence must be asked for: by default there are four, and windowed layers keep a cache for each
        words += ["-c", str(asked.get("ctx")), "-np", str(asked.get("parallel", 1)), "-fa", "on"]
        for option, key in (("-ctk", "cache_type_k"), ("-ctv", "cache_type_v")):
            if (name := asked.get(key, DEFAULT_CACHE)) != DEFAULT_CACHE:
                words += [option, str(name).lower()]
        if (n_ubatch := asked.get("ubatch", DEFAULT_UBATCH)) != DEFAULT_UBATCH:
            words += ["-ub", str(n_ubatch)]
    return shlex.join(words)

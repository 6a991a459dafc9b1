"""How to start the engine for a plan: the command line, or Modelfile, under which its memory figures hold.

Options: common/arg.cpp of llama.cpp; ik_llama.cpp's common/common.cpp; koboldcpp.py; Ollama's docs/modelfile.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from requant.errors import printable
from requant.model.memory import DEFAULT_UBATCH
from requant.planning.engines import engine_named, expert_patterns, is_prefix
from requant.planning.plan import Plan
from requant.report import shell

ALL_LAYERS = 99  # what people write for -ngl to mean all
DEFAULT_CACHE = "F16"
_KOBOLD_CACHES = {"F16": 0, "BF16": 0, "Q8_0": 1, "Q4_0": 2}


def start_command(plan: Plan, out: Path) -> str:
    """What starts the plan's engine with the model at `out`, as a shell takes it; a Modelfile for Ollama.

    Without a budget in VRAM or RAM the plan says nothing of context, batch and cache, and neither does the line.
    """
    family = engine_named(plan.runtime.get("engine")).family
    make = {"ollama": _modelfile, "koboldcpp": _koboldcpp, "sharpinference": _sharpinference}.get(family)
    if make is not None:
        return make(plan, out)
    return shell.join_words(_llama_server(plan, out, ik=family == "ik_llama.cpp"))


def _llama_server(plan: Plan, out: Path, *, ik: bool) -> list[str]:
    asked, runtime = plan.budget, plan.runtime
    words = ["llama-server", "-m", shell.file_argument(out), "-ngl", str(_n_gpu_layers(plan))]
    if "ctx" in asked:
        # one sequence must be asked for: by default there are four, and windowed layers keep a cache for each
        words += ["-c", str(asked["ctx"]), "-np", str(asked.get("parallel", 1))]
        words += ["-fa"] if ik else ["-fa", "on", "-fit", "off"]
        for option, key in (("-ctk", "cache_type_k"), ("-ctv", "cache_type_v")):
            if (name := asked.get(key, DEFAULT_CACHE)) != DEFAULT_CACHE:
                words += [option, str(name).lower()]
        if (n_ubatch := asked.get("ubatch", DEFAULT_UBATCH)) != DEFAULT_UBATCH:
            words += ["-ub", str(n_ubatch)]
    if layers := runtime.get("experts_on_cpu"):
        prefix = ["--n-cpu-moe" if ik else "-ncmoe", str(len(layers))]
        words += prefix if is_prefix(layers) else ["-ot", f"{expert_patterns(layers)}=CPU"]
    if draft := runtime.get("draft"):
        words += ["-md", shell.file_argument(draft), "-ngld", str(ALL_LAYERS)]
        kind = "draft-eagle3" if runtime.get("draft_arch") == "eagle3" else "draft-simple"
        words += [] if ik else ["--spec-type", kind]
    elif runtime.get("mtp"):
        words += ["--spec-type", "draft-mtp"]
    if projector := runtime.get("mmproj"):
        words += ["--mmproj", shell.file_argument(projector)]
    return words


def _n_gpu_layers(plan: Plan) -> int:
    """As many as the plan says; where that is all of them, a number that stays all for every counting."""
    if not plan.runtime.get("all_layers", True):
        return int(plan.runtime.get("n_gpu_layers", 0))
    return max(ALL_LAYERS, 2 + max((c.layer for c in plan.choices if c.layer is not None), default=0))


def _modelfile(plan: Plan, out: Path) -> str:
    """A Modelfile has no escapes: a name that it cannot spell must be given to the file anew."""
    name = printable(out.name)
    lines = [] if name == out.name.strip() else ["# rename the file: a Modelfile cannot spell its name"]
    lines.append(f"FROM ./{name}")
    if "ctx" in plan.budget:
        lines += [f"PARAMETER num_ctx {plan.budget['ctx']}", f"PARAMETER num_gpu {_n_gpu_layers(plan)}"]
        if (n_batch := plan.budget.get("ubatch", DEFAULT_UBATCH)) != DEFAULT_UBATCH:
            lines.append(f"PARAMETER num_batch {n_batch}")
        cache = str(plan.budget.get("cache_type_k", DEFAULT_CACHE)).lower()
        lines.append(f"# start the server with OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE={cache}")
    return "\n".join(lines)


def _koboldcpp(plan: Plan, out: Path) -> str:
    asked, runtime = plan.budget, plan.runtime
    words = ["koboldcpp", "--model", shell.file_argument(out), "--gpulayers", str(_n_gpu_layers(plan)), "--usecuda"]
    if "ctx" in asked:
        words += ["--contextsize", str(asked["ctx"]), "--flashattention"]
        words += ["--quantkv", str(_KOBOLD_CACHES.get(asked.get("cache_type_k", DEFAULT_CACHE), 0))]
        words += ["--blasbatchsize", str(asked.get("ubatch", DEFAULT_UBATCH))]
    if layers := runtime.get("experts_on_cpu"):
        prefix = ["--moecpu", str(len(layers))]
        words += prefix if is_prefix(layers) else ["--overridetensors", f"{expert_patterns(layers)}=CPU"]
    words += [*_file(runtime, "--draftmodel", "draft"), *_file(runtime, "--mmproj", "mmproj")]
    return shell.join_words(words)


def _sharpinference(plan: Plan, out: Path) -> str:
    words = ["sharpinference", "-m", shell.file_argument(out), "-g", str(_n_gpu_layers(plan))]
    if "ctx" in plan.budget:
        words += ["-c", str(plan.budget["ctx"])]
        words += ["--kv-type", str(plan.budget.get("cache_type_k", DEFAULT_CACHE)).lower()]
    return shell.join_words(words)


def _file(runtime: Any, option: str, key: str) -> list[str]:
    return [option, shell.file_argument(runtime[key])] if key in runtime else []

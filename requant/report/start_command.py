"""The command line, or Modelfile, that starts the engine for a plan so that its memory figures hold.

Options: common/arg.cpp of llama.cpp; ik_llama.cpp's common/common.cpp; koboldcpp.py; Ollama's docs/modelfile.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.errors import printable
from requant.model.auxiliary import ORDINARY_DRAFT
from requant.model.engine_settings import DEFAULT_UBATCH
from requant.model.kinds import OUTPUT, PROJECTOR, FileKind, kind_named
from requant.planning.engines import engine_named, expert_patterns, is_prefix
from requant.planning.plan import Plan
from requant.report import shell

ALL_LAYERS = 99  # the usual -ngl for all layers
DEFAULT_CACHE = "F16"
_KOBOLD_CACHES = {"F16": 0, "BF16": 0, "Q8_0": 1, "Q4_0": 2}


def kind_of_plan(plan: Plan) -> FileKind:
    """Return the kind of the file that a plan is for; plans of version 0.1 do not name it."""
    return kind_named(plan.runtime.get("kind", PROJECTOR.name if plan.arch == "clip" else None))


def start_command(plan: Plan, out: Path) -> str:
    """Return the line for a shell that starts the plan's engine with the model at `out`; for Ollama a Modelfile.

    A plan without a budget in VRAM or RAM has no context, batch and cache types, and the line none of their options.
    A file that is no language model has a line of its own: `--mmproj` for a projector, `-md` for a draft head.
    """
    kind = kind_of_plan(plan)
    if not kind.alone:
        return shell.join_words([shell.file_argument(out) if word == OUTPUT else word for word in kind.start])
    family = engine_named(plan.runtime.get("engine")).family
    write = {"ollama": _modelfile, "koboldcpp": _koboldcpp, "sharpinference": _sharpinference}.get(family)
    if write is not None:
        return write(plan, out)
    return shell.join_words(_llama_server(plan, out, ik=family == "ik_llama.cpp"))


def _llama_server(plan: Plan, out: Path, *, ik: bool) -> list[str]:
    budget, runtime = plan.budget, plan.runtime
    words = [shell.file_argument(out) if word == OUTPUT else word for word in kind_of_plan(plan).start]
    words += ["-ngl", str(_n_gpu_layers(plan))]
    if "ctx" in budget:
        # one sequence must be requested: the default is four, and windowed layers keep a cache for each
        words += ["-c", str(budget["ctx"]), "-np", str(budget.get("parallel", 1))]
        words += ["-fa"] if ik else ["-fa", "on", "-fit", "off"]
        for option, key in (("-ctk", "cache_type_k"), ("-ctv", "cache_type_v")):
            if (name := budget.get(key, DEFAULT_CACHE)) != DEFAULT_CACHE:
                words += [option, str(name).lower()]
        if (n_ubatch := budget.get("ubatch", DEFAULT_UBATCH)) != DEFAULT_UBATCH:
            words += ["-ub", str(n_ubatch)]
    if layers := runtime.get("experts_on_cpu"):
        prefix = ["--n-cpu-moe" if ik else "-ncmoe", str(len(layers))]
        words += prefix if is_prefix(layers) else ["-ot", f"{expert_patterns(layers)}=CPU"]
    if draft := runtime.get("draft"):
        words += ["-md", shell.file_argument(draft), "-ngld", str(ALL_LAYERS)]
        named = "draft-eagle3" if runtime.get("draft_arch") == "eagle3" else ORDINARY_DRAFT  # plans of version 0.1
        words += [] if ik else ["--spec-type", runtime.get("draft_type", named)]
    elif runtime.get("mtp"):
        words += ["--spec-type", "draft-mtp"]
    if projector := runtime.get("mmproj"):
        words += ["--mmproj", shell.file_argument(projector)]
    return words


def _n_gpu_layers(plan: Plan) -> int:
    """Return the layers on the GPU; for all of them a number that is enough however an engine counts."""
    if not plan.runtime.get("all_layers", True):
        return int(plan.runtime.get("n_gpu_layers", 0))
    return max(ALL_LAYERS, 2 + max((c.layer for c in plan.choices if c.layer is not None), default=0))


def _modelfile(plan: Plan, out: Path) -> str:
    """Return a Modelfile; it has no escapes, so a remark asks to rename a file whose name it cannot hold."""
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
    budget, runtime = plan.budget, plan.runtime
    words = ["koboldcpp", "--model", shell.file_argument(out), "--gpulayers", str(_n_gpu_layers(plan)), "--usecuda"]
    if "ctx" in budget:
        words += ["--contextsize", str(budget["ctx"]), "--flashattention"]
        words += ["--quantkv", str(_KOBOLD_CACHES.get(budget.get("cache_type_k", DEFAULT_CACHE), 0))]
        words += ["--blasbatchsize", str(budget.get("ubatch", DEFAULT_UBATCH))]
    if layers := runtime.get("experts_on_cpu"):
        prefix = ["--moecpu", str(len(layers))]
        words += prefix if is_prefix(layers) else ["--overridetensors", f"{expert_patterns(layers)}=CPU"]
    words += [*_file_option(runtime, "--draftmodel", "draft"), *_file_option(runtime, "--mmproj", "mmproj")]
    return shell.join_words(words)


def _sharpinference(plan: Plan, out: Path) -> str:
    words = ["sharpinference", "-m", shell.file_argument(out), "-g", str(_n_gpu_layers(plan))]
    if "ctx" in plan.budget:
        words += ["-c", str(plan.budget["ctx"])]
        words += ["--kv-type", str(plan.budget.get("cache_type_k", DEFAULT_CACHE)).lower()]
    return shell.join_words(words)


def _file_option(runtime: Mapping[str, Any], option: str, key: str) -> list[str]:
    return [option, shell.file_argument(runtime[key])] if key in runtime else []

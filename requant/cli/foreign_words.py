"""Words of other tools on the command line, with what to write instead: options, types as arguments, split sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from requant.errors import UsageError, brief
from requant.formats import by_name
from requant.model.mixtures import MIXTURE_ALIASES, mixture_names

# option of llama.cpp, llama-quantize, Ollama or of a guess -> option of requant
_OPTIONS = {
    **dict.fromkeys(["--gpu", "--gpus", "--gpu-memory", "--gpu-mem", "--memory", "--max-vram", "--budget"], "--vram"),
    **dict.fromkeys(["-c", "--ctx-size", "--context", "--context-size", "--context-length", "--n-ctx"], "--ctx"),
    **dict.fromkeys(["--num-ctx", "--num_ctx", "--ctx_size", "--max-seq-len"], "--ctx"),
    **dict.fromkeys(["-ctk", "--kv-cache-type", "--cache-type"], "--cache-type-k"),
    **dict.fromkeys(["-ctv"], "--cache-type-v"),
    **dict.fromkeys(["-ub", "--ubatch-size", "-b", "--batch-size", "--batch"], "--ubatch"),
    **dict.fromkeys(["-np", "--n-parallel", "--num-parallel"], "--parallel"),
    **dict.fromkeys(["-md", "--model-draft", "--spec-draft-model", "--draft-model"], "--draft"),
    **dict.fromkeys(["-mm", "--mm-proj", "--projector"], "--mmproj"),
    **dict.fromkeys(["-t", "--nthreads", "--num-threads", "-j"], "--threads"),
    **dict.fromkeys(["--outtype", "--ftype", "--quant", "--quant-type", "--quantize"], "--type T or --preset"),
    **dict.fromkeys(["--custom-q", "--tensor-types"], "--tensor-type"),
    **dict.fromkeys(["--split-max-size"], "--max-shard-size"),
    **dict.fromkeys(["--file-size", "--filesize", "--target-size", "--max-size"], "--size"),
    **dict.fromkeys(["--bits", "--target-bpw", "--target-bits"], "--bpw"),
    **dict.fromkeys(["-f", "--file", "--dataset", "--calib-data", "--calibration-data"], "--text"),
    **dict.fromkeys(["--allow-requant", "--requantize"], "--allow-requantize"),
    **dict.fromkeys(["-y", "--overwrite", "--yes"], "--force"),
}
_ADVICE = {
    **dict.fromkeys(
        ["-ngl", "--n-gpu-layers", "--gpu-layers", "--num-gpu", "-ot", "--n-cpu-moe", "-ncmoe"],
        "the plan decides what is on the GPU: give --vram SIZE, and --ram SIZE for layers on the CPU",
    ),
    **dict.fromkeys(["-m", "--model"], "the model is the first argument, without an option"),
    **dict.fromkeys(["-hf", "-hfr", "--hf-repo"], "fetch the model first: hf download OWNER/REPO"),
    **dict.fromkeys(["--pure"], "--type T gives one type to all tensors that may be quantized"),
    **dict.fromkeys(["--leave-output-tensor"], "give the output a type: --output-tensor-type q8_0"),
}
_SIZES = ("--vram", "--ram", "--size", "--reserve", "--max-memory", "--max-shard-size")
_UNIT = re.compile(r"[KMGT]i?B?|B", re.IGNORECASE)
_NUMBER = re.compile(r"\d+([.,]\d+)?")


def check_words(words: Sequence[str], options: Mapping[str, bool], command: str) -> None:
    """Raise UsageError for a word of another tool, with what to write instead.

    options: those of the command called `command`, and whether each takes a value.
    """
    before = ""
    for i, word in enumerate(words):
        if word == "--":
            return
        if before in _SIZES and _NUMBER.fullmatch(word) and i + 1 < len(words) and _UNIT.fullmatch(words[i + 1]):
            together = f"{word.replace(',', '.')}{words[i + 1]}"
            raise UsageError(f"{before}: write the number and its unit together, {together}")
        flag = word.partition("=")[0]
        if not options.get(before, False) and flag not in options:
            if word.startswith("-"):
                _check_option(flag, options, command)
            else:
                _check_argument(word, options)
        before = word


def _check_option(flag: str, options: Mapping[str, bool], command: str) -> None:
    hint = _ADVICE.get(flag)
    if flag in ("-o", "--output", "--outfile", "--out") and command == "convert":
        hint = "the output is the second argument: requant convert MODEL OUT.gguf"
    elif (known := _OPTIONS.get(flag)) is not None and known.split()[0] in options:
        hint = f"did you mean {known}?"
    if hint is not None:
        raise UsageError(f"no option '{flag}'; {hint}{'' if hint.endswith('?') else ';'} see requant {command} --help")


def _check_argument(word: str, options: Mapping[str, bool]) -> None:
    """Raise UsageError for a type or a mixture that stands where a file does, as in llama-quantize."""
    mixture = MIXTURE_ALIASES.get(word.upper(), word.upper())
    fmt, is_mixture = by_name(word), mixture in mixture_names()
    if (fmt is None and not is_mixture) or Path(word).exists():
        return
    given = {"--preset": mixture if is_mixture else None, "--type": None if fmt is None else fmt.name}
    ways = [f"{option} {value}" for option, value in given.items() if value is not None and option in options]
    if ways:
        raise UsageError(f"'{brief(word)}' is no file; give the type by an option: {' or '.join(ways)}")

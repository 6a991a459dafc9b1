"""Options of other tools, by their names without dashes, with the options of requant that do the same.

Sources: common/arg.cpp and tools/quantize of llama.cpp b11434, its convert_hf_to_gguf.py; ik_llama.cpp, Ollama, vLLM.
"""

from __future__ import annotations

# name -> options that do the same; the first that the command has is named
COUNTERPARTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("gpu gpus gpu-memory gpu-mem memory max-vram budget".split(), ("--vram",)),  # noqa: SIM905
    **dict.fromkeys(
        "c ctx-size context context-size context-length n-ctx num-ctx max-seq-len max-model-len".split(),  # noqa: SIM905
        ("--ctx", "--window"),
    ),
    **dict.fromkeys(["ctk", "kv-cache-type", "kv-cache-dtype", "cache-type"], ("--cache-type-k",)),
    "ctv": ("--cache-type-v",),
    **dict.fromkeys(["ub", "ubatch-size", "b", "batch-size", "batch"], ("--ubatch",)),
    **dict.fromkeys(["np", "n-parallel", "num-parallel"], ("--parallel",)),
    **dict.fromkeys(["md", "model-draft", "spec-draft-model", "draft-model"], ("--draft",)),
    **dict.fromkeys(["mm", "mm-proj", "projector"], ("--mmproj",)),
    **dict.fromkeys(["t", "tb", "threads-batch", "nthreads", "num-threads", "j"], ("--threads",)),
    **dict.fromkeys(
        ["outtype", "ftype", "quant", "quant-type", "quantize", "quantization", "dtype"], ("--type T or --preset",)
    ),
    **dict.fromkeys(["custom-q", "tensor-types"], ("--tensor-type",)),
    "split-max-size": ("--max-shard-size",),
    **dict.fromkeys(["file-size", "filesize", "target-size", "max-size"], ("--size",)),
    **dict.fromkeys(["bits", "target-bpw", "target-bits"], ("--bpw",)),
    **dict.fromkeys(["f", "file", "in-file", "dataset", "calib-data", "calibration-data"], ("--text",)),
    **dict.fromkeys(["chunks", "n-chunks"], ("--windows",)),
    **dict.fromkeys(["kl-divergence", "kl-divergence-base", "save-all-logits", "kld"], ("--base",)),
    **dict.fromkeys(["imatrix-file", "imatrix-path"], ("--imatrix",)),
    **dict.fromkeys(["allow-requant", "requantize"], ("--allow-requantize",)),
    **dict.fromkeys(["y", "overwrite", "yes"], ("--force",)),
    **dict.fromkeys(["fitt", "fit-target"], ("--reserve",)),
    **dict.fromkeys(["fitc", "fit-ctx"], ("--ctx",)),
    **dict.fromkeys(["o", "out", "outfile", "output", "output-file"], ("-o",)),
}
_FETCH = "fetch the model first: hf download OWNER/REPO"
_PLACED = "the plan decides what is on the GPU: give --vram SIZE, and --ram SIZE for layers on the CPU"
ADVICE = {
    **dict.fromkeys("ngl n-gpu-layers gpu-layers num-gpu ot override-tensor".split(), _PLACED),  # noqa: SIM905
    **dict.fromkeys("cmoe cpu-moe ncmoe n-cpu-moe ncffn n-cpu-ffn fit".split(), _PLACED),  # noqa: SIM905
    "gpu-memory-utilization": "--vram SIZE is the VRAM to use, and --reserve SIZE leaves some of it free",
    **dict.fromkeys(["fa", "flash-attn"], "every plan counts with flash attention; it needs no option"),
    **dict.fromkeys(["m", "model"], "the model is the first argument, without an option"),
    **dict.fromkeys("hf hfr hf-repo hff hf-file mu model-url remote".split(), _FETCH),  # noqa: SIM905
    **dict.fromkeys(["mmu", "mmproj-url"], "fetch the projector first, with hf download, and give --mmproj FILE"),
    "pure": "--type T gives one type to all tensors that may be quantized",
    "leave-output-tensor": "name the type to keep for the output: --output-tensor-type f16, for a source in F16",
    **dict.fromkeys(
        ["include-weights", "exclude-weights"],
        "an imatrix counts for all tensors that it covers; --no-imatrix for none",
    ),
    "override-kv": "the metadata of the source are copied; change them with gguf-py's gguf_set_metadata.py",
    "prune-layers": "requant keeps every layer; prune them with llama-quantize first",
}
# names that are like an option of requant, and mean something else
UNRELATED = frozenset(
    """
    ag cache-ram cache-type-k-draft cache-type-v-draft check-tensors cram ctkd ctvd ctxcp draft-max draft-min draft-n
    hf-token log-verbose min-p mmproj-auto mmproj-offload n no-agent no-mmproj no-perf port reuse-port sm split-mode
    show-statistics split-max-tensors tags temp tensor-filter tensor-split threads-draft threads-http top-k top-p ts
    verbosity
    """.split()  # noqa: SIM905
)

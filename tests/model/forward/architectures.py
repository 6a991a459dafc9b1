"""Small random models of every architecture beside those in families.py, with layers of each kind that it has.

The engine loads them too. Windows slide over 8 tokens, contexts were 16 or 64 long before they were scaled.
"""

import zlib
from dataclasses import dataclass, field

import numpy as np
from gguf_files import ARR, BOOL, F32, I32, STR, U32, File, Tensor, pair
from model.forward.families import TOKENS, VOCABULARY
from numpy.random import default_rng

WIDTH, N_HEAD, N_KV, HEAD, N_FF, N_EXPERT, N_FF_EXPERT = 64, 4, 2, 16, 96, 8, 32
KINDS = {bool: BOOL, int: U32, float: F32, str: STR}


@dataclass
class Model:
    """A model under construction: keys without the architecture's name, and tensors."""

    arch: str
    seed: int
    keys: dict = field(default_factory=dict)
    tensors: list = field(default_factory=list)
    layer: int = 0

    def add(self, name, *shape, low=None, high=1.5, scale=1.0):
        """Add a tensor to the layer, or to the model where its name has a capital M: random weights, or low to high."""
        full = name.removeprefix("M:") if name.startswith("M:") else f"blk.{self.layer}.{name}"
        rng = default_rng((self.seed, zlib.crc32(full.encode())))
        turned = tuple(reversed(shape))
        normal = rng.standard_normal(turned) * scale / np.sqrt(shape[0])
        x = normal if low is None else rng.uniform(low, high, turned)
        self.tensors.append(Tensor(full, shape, data=x.astype("<f4").tobytes()))

    def norms(self, *names, n=WIDTH):
        for name in names:
            self.add(f"{name}.weight", n, low=0.5)

    def attention(self, *, heads=N_HEAD, kv=N_KV, size=HEAD, norm="", biases=(), wide=1, gate=0, fused=False):
        """Attention; norm: `head` or `row`; wide: 2 for queries with gates; gate: rows of attn_gate."""
        if fused:
            self.add("attn_qkv.weight", WIDTH, (heads + 2 * kv) * size)
        for part, n in () if fused else (("q", heads * size * wide), ("k", kv * size), ("v", kv * size)):
            self.add(f"attn_{part}.weight", WIDTH, n)
            if part in biases:
                self.add(f"attn_{part}.bias", n, low=-0.5, high=0.5)
        self.add("attn_output.weight", heads * size, WIDTH)
        if "o" in biases:
            self.add("attn_output.bias", WIDTH, low=-0.5, high=0.5)
        if norm:
            self.norms("attn_q_norm", n=size if norm == "head" else heads * size)
            self.norms("attn_k_norm", n=size if norm == "head" else kv * size)
        if gate:
            self.add("attn_gate.weight", WIDTH, gate)

    def latent(self, *, queries=24, rank=32, plain=16, turned=8, value=16, gate=0):
        """Latent attention; queries: rank of theirs, 0 for one matrix."""
        if queries:
            self.add("attn_q_a.weight", WIDTH, queries)
            self.norms("attn_q_a_norm", n=queries)
            self.add("attn_q_b.weight", queries, N_HEAD * (plain + turned))
        else:
            self.add("attn_q.weight", WIDTH, N_HEAD * (plain + turned))
        self.add("attn_kv_a_mqa.weight", WIDTH, rank + turned)
        self.norms("attn_kv_a_norm", n=rank)
        self.add("attn_k_b.weight", plain, rank, N_HEAD)
        self.add("attn_v_b.weight", rank, value, N_HEAD)
        self.add("attn_output.weight", N_HEAD * value, WIDTH)
        if gate:
            self.add("attn_gate.weight", WIDTH, gate)

    def delta_net(self, *, keys=2, values=4, size=16, joint=False):
        width = 2 * keys * size + values * size
        self.add("attn_qkv.weight", WIDTH, width)
        self.add("attn_gate.weight", WIDTH, values * size)
        self.add("ssm_conv1d.weight", 4, width, scale=1.5)
        self.add("ssm_dt.bias", values, low=-1, high=1)
        self.add("ssm_a", values, low=-1.5, high=-0.2)
        for name, n in [("ssm_ba", 2 * values)] if joint else [("ssm_alpha", values), ("ssm_beta", values)]:
            self.add(f"{name}.weight", WIDTH, n)
        self.norms("ssm_norm", n=size)
        self.add("ssm_out.weight", values * size, WIDTH)

    def kda(self, *, low_rank, size=16):
        n = N_HEAD * size
        for part in "qkv":
            self.add(f"attn_{part}.weight", WIDTH, n)
            self.add(f"ssm_conv1d_{part}.weight", 4, 1, n, scale=1.5)
        for part in ("f", "g"):
            self.add(f"ssm_{part}_a.weight", WIDTH, size if low_rank else n)
            if low_rank:
                self.add(f"ssm_{part}_b.weight", size, n)
        self.add("ssm_dt.bias", n, low=-1, high=1)
        self.add("ssm_a", 1, N_HEAD, low=-1.5, high=-0.2) if low_rank else self.add("ssm_a", 1, N_HEAD, low=0.3)
        self.add("ssm_beta.weight", WIDTH, N_HEAD)
        self.norms("ssm_norm", n=size)
        self.add("attn_output.weight", n, WIDTH)

    def mamba(self, inner, *, state=16, heads=8, groups=2):
        width = inner + 2 * groups * state
        self.add("ssm_in.weight", WIDTH, inner + width + heads)
        self.add("ssm_conv1d.weight", 4, width, scale=1.5)
        self.add("ssm_conv1d.bias", width, low=-0.3, high=0.3)
        self.add("ssm_dt.bias", heads, low=-1, high=1)
        self.add("ssm_a", 1, heads, low=-1.5, high=-0.2)
        self.add("ssm_d", 1, heads, low=0.5)
        self.add("ssm_norm.weight", inner // groups, groups, low=0.5)
        self.add("ssm_out.weight", inner, WIDTH)

    def convolution(self):
        self.add("shortconv.conv.weight", 3, WIDTH, scale=1.5)
        self.add("shortconv.in_proj.weight", WIDTH, 3 * WIDTH)
        self.add("shortconv.out_proj.weight", WIDTH, WIDTH)

    def dense(self, n=N_FF, suffix="", *, gated=True, fused=False):
        if gated and not fused:
            self.add(f"ffn_gate{suffix}.weight", WIDTH, n)
        self.add(f"ffn_up{suffix}.weight", WIDTH, 2 * n if fused else n)
        self.add(f"ffn_down{suffix}.weight", n, WIDTH)

    def experts(self, *, n=N_FF_EXPERT, gated=True, merged=False, biases=False, selection=False, shared=0, width=WIDTH):
        """Experts, with routers far from ties; shared: the width of a shared one."""
        self.add("ffn_gate_inp.weight", WIDTH, N_EXPERT, scale=2.0)
        if selection:
            name = "exp_probs_b" if self.arch == "hy_v3" else "exp_probs_b.bias"
            self.add(name, N_EXPERT, low=-0.3, high=0.3)
        parts = [("up", width, 2 * n)] if merged else [("gate", width, n)] * gated + [("up", width, n)]
        for part, columns, rows in (*parts, ("down", n, width)):
            name = "ffn_gate_up_exps" if merged and part == "up" else f"ffn_{part}_exps"
            self.add(f"{name}.weight", columns, rows, N_EXPERT)
            if biases:
                self.add(f"{name}.bias", rows, N_EXPERT, low=-0.5, high=0.5)
        if biases:
            self.add("ffn_gate_inp.bias", N_EXPERT, low=-0.5, high=0.5)
        if shared:
            self.dense(shared, "_shexp", gated=gated)

    def write(self, path):
        pairs = [pair("general.architecture", STR, self.arch)]
        for key, value in self.keys.items():
            if isinstance(value, list):
                item = I32 if not isinstance(value[0], bool) else BOOL
                pairs.append(pair(f"{self.arch}.{key}", ARR, (item, value)))
            else:
                pairs.append(pair(f"{self.arch}.{key}", KINDS[type(value)], value))
        return File((*pairs, *VOCABULARY), tuple(self.tensors)).write(path)


MAKERS = {}


def model(name=None, /, *, arch=None, n_layers=4, tied=False, norm="output_norm", **keys):
    """Register a function that adds the tensors of one layer: (model, its index)."""

    def register(make_layer):
        def build(seed):
            own = _usual_keys(n_layers) | {key.replace("__", "."): value for key, value in keys.items()}
            found = Model(arch or name, seed, {key: value for key, value in own.items() if value is not None})
            found.add("M:token_embd.weight", WIDTH, len(TOKENS), scale=8.0)
            found.add(f"M:{norm}.weight", WIDTH, low=0.5)
            if not tied:
                found.add("M:output.weight", WIDTH, len(TOKENS))
            for il in range(n_layers):
                found.layer = il
                make_layer(found, il)
            return found

        MAKERS[name] = build
        return make_layer

    return register


def _usual_keys(n_layers):
    return {
        "block_count": n_layers,
        "context_length": 512,
        "embedding_length": WIDTH,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_KV,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 100.0,
        "rope.dimension_count": HEAD,
    }


MOE = {"expert_count": N_EXPERT, "expert_used_count": 2, "expert_feed_forward_length": N_FF_EXPERT}
SHARED = MOE | {"expert_shared_feed_forward_length": N_FF_EXPERT, "expert_shared_count": 1}
WEIGHTS = {"expert_weights_scale": 1.5, "expert_weights_norm": True}
YARN = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 64}
DELTA = {
    **{"ssm__conv_kernel": 4, "ssm__inner_size": 64, "ssm__state_size": 16, "ssm__time_step_rank": 4},
    **{"ssm__group_count": 2, "full_attention_interval": 4},
}
SECTIONS = {"rope__dimension_sections": [2, 1, 1, 0]}
LN = {"attention__layer_norm_rms_epsilon": None, "attention__layer_norm_epsilon": 1e-5}


def plain(
    name, *, norms=("attn_norm", "ffn_norm"), norm="", biases=(), fused=False, gated=True, gate=0, tied=False, **keys
):
    """Register a decoder of attention and a dense part."""

    @model(name, tied=tied, **keys)
    def layer(m, il):
        m.norms(*norms)
        m.attention(norm=norm, biases=biases, gate=gate)
        m.dense(fused=fused, gated=gated)


def routed(name, *, norms=("attn_norm", "ffn_norm"), dense=0, attention=None, experts=None, **keys):
    """Register a decoder of attention and experts behind `dense` layers without."""

    @model(name, **keys)
    def layer(m, il):
        m.norms(*norms)
        m.attention(**(attention or {}))
        m.dense() if il < dense else m.experts(**(experts or {}))


SANDWICH = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
AFTER = ("attn_norm", "post_attention_norm")
BEHIND = ("post_attention_norm", "post_ffw_norm")
for other in ("ernie4_5", "internlm2", "exaone", "xverse"):
    plain(other)
plain("qwen3vl", norm="head", rope__dimension_sections=[3, 3, 2, 0])
plain("paddleocr", rope__dimension_sections=[3, 3, 2, 0])
plain("pangu-embedded", biases="qkvo")
plain("arcee", gated=False)
plain("glm4", norms=SANDWICH, biases="qkv", fused=True, rope__dimension_count=8)
plain("seed_oss", norms=AFTER, biases="qkv")
plain("mistral3", attention__temperature_scale=0.1, **(YARN | {"rope__scaling__original_context_length": 16}))
plain("smollm3", tied=True)
plain("granite", logit_scale=4.0, residual_scale=0.3, embedding_scale=3.0, attention__scale=0.1)
plain("olmo2", norms=BEHIND, norm="row", attention__sliding_window=8, **YARN)
plain("exaone4", norms=BEHIND, norm="head")
plain("hunyuan-dense", norm="head")
plain("command-r", norms=("attn_norm",), tied=True, logit_scale=0.25, **LN)
plain("cohere2", norms=("attn_norm",), tied=True, logit_scale=0.25, attention__sliding_window=8, **LN)
plain(
    "muse-glimmer",
    norms=SANDWICH,
    norm="head",
    gate=WIDTH,
    attention__sliding_window=8,
    logit_scale=0.5,
    final_logit_softcapping=5.0,
)
routed("qwen3vlmoe", attention={"norm": "head"}, rope__dimension_sections=[3, 3, 2, 0], **MOE)
SMALL = MOE | {"feed_forward_length": 32}
routed("olmoe", attention={"norm": "row", "kv": N_HEAD}, attention__head_count_kv=N_HEAD, feed_forward_length=32, **MOE)
routed(
    "glm4moe",
    norms=AFTER,
    attention={"norm": "head", "biases": "qkv"},
    dense=1,
    experts={"selection": True, "shared": N_FF_EXPERT},
    rope__dimension_count=8,
    leading_dense_block_count=1,
    expert_gating_func=2,
    **(SHARED | WEIGHTS),
)
for other, own in (("dots1", {"kv": N_HEAD}), ("bailingmoe2", {"fused": True}), ("hy_v3", {})):
    routed(
        other,
        attention={"norm": "head", **own},
        dense=1,
        experts={"selection": True, "shared": N_FF_EXPERT},
        attention__head_count_kv=own.get("kv", N_KV),
        leading_dense_block_count=1,
        expert_gating_func=2,
        **(SHARED | WEIGHTS),
    )
routed(
    "ernie4_5-moe",
    dense=1,
    experts={"selection": True, "shared": N_FF_EXPERT},
    interleave_moe_layer_step=1,
    leading_dense_block_count=1,
    **SHARED,
)
routed("minimax-m2", attention={"norm": "row"}, experts={"selection": True}, expert_gating_func=2, **SMALL)
routed("granitemoe", logit_scale=4.0, residual_scale=0.3, embedding_scale=3.0, **(MOE | {"feed_forward_length": 32}))
routed("hunyuan-moe", attention={"norm": "head"}, experts={"shared": N_FF_EXPERT}, feed_forward_length=32, **SHARED)
routed(
    "afmoe",
    norms=SANDWICH,
    attention={"norm": "head", "gate": WIDTH},
    dense=1,
    experts={"selection": True, "shared": N_FF_EXPERT},
    leading_dense_block_count=1,
    attention__sliding_window=8,
    **(SHARED | WEIGHTS),
)
routed(
    "cohere2moe",
    norms=("attn_norm",),
    dense=1,
    experts={"shared": N_FF_EXPERT},
    leading_dense_block_count=1,
    attention__sliding_window=8,
    logit_scale=0.25,
    **(SHARED | WEIGHTS | LN),
)


@model("gpt-oss", attention__sliding_window=8, **MOE, **YARN)
def _gpt_oss(m, il):
    m.norms(*AFTER)
    m.attention(biases="qkvo")
    m.add("attn_sinks.weight", N_HEAD, low=-1, high=2)
    m.experts(biases=True)


@model("qwen2moe", **SHARED)
def _qwen2moe(m, il):
    m.norms("attn_norm", "ffn_norm")
    m.attention(biases="qkv")
    m.experts(shared=N_FF_EXPERT)
    m.add("ffn_gate_inp_shexp.weight", WIDTH, low=-0.3, high=0.3)


LAGUNA = SHARED | WEIGHTS | {"arch": "laguna", "leading_dense_block_count": 1}


@model("laguna", **LAGUNA)
@model("laguna-windows", attention__sliding_window=8, rope__freq_base_swa=50.0, **(LAGUNA | YARN))
def _laguna(m, il):
    m.norms("attn_norm", "ffn_norm")
    m.attention(norm="head", gate=N_HEAD if il % 2 else WIDTH)
    m.dense() if il < 1 else m.experts(selection=True, shared=N_FF_EXPERT)


@model(
    "step35",
    attention__sliding_window=8,
    attention__sliding_window_pattern=[True, False, True, True],
    swiglu_clamp_exp=0.5,
    swiglu_clamp_shexp=0.4,
    **(SHARED | WEIGHTS),
)
def _step35(m, il):
    m.norms("attn_norm", "ffn_norm")
    m.attention(norm="head", gate=N_HEAD)
    m.dense() if il < 1 else m.experts(selection=True, shared=N_FF_EXPERT)


def _qwen35(m, il, *, moe=False, merged=False, joint=False):
    m.norms(*AFTER)
    m.attention(norm="head", wide=2) if il % 4 == 3 else m.delta_net(joint=joint)
    if not moe:
        m.dense()
        return
    m.experts(merged=merged, shared=N_FF_EXPERT)
    m.add("ffn_gate_inp_shexp.weight", WIDTH, low=-0.3, high=0.3)


QWEN35 = DELTA | {"rope__dimension_count": 8}
model("qwen35", **QWEN35, **SECTIONS)(_qwen35)
model("qwen35moe", **QWEN35, **SECTIONS, **SHARED)(lambda m, il: _qwen35(m, il, moe=True))
model("qwen35moe-merged", arch="qwen35moe", **QWEN35, **SECTIONS, **SHARED)(
    lambda m, il: _qwen35(m, il, moe=True, merged=True)
)
model("qwen3next", **QWEN35, **SHARED)(lambda m, il: _qwen35(m, il, moe=True, joint=True))

G4_KV, G4_WINDOWS, G4_HEAD = [2, 2, 2, 1, 2, 1], [True, True, True, False, True, False], 32
GEMMA4 = {
    **{"n_layers": 6, "tied": True, "attention__head_count_kv": G4_KV, "attention__key_length": G4_HEAD},
    **{"attention__value_length": G4_HEAD, "attention__key_length_swa": HEAD, "attention__value_length_swa": HEAD},
    **{"attention__sliding_window": 8, "attention__sliding_window_pattern": G4_WINDOWS, "rope__freq_base": 1000.0},
    **{"rope__freq_base_swa": 100.0, "rope__dimension_count": G4_HEAD, "rope__dimension_count_swa": HEAD},
    "final_logit_softcapping": 30.0,
}


def _gemma4(m, il, kind):
    if il == 0:
        m.add("M:rope_freqs.weight", G4_HEAD // 2, low=1, high=8)
        if kind == "side":
            m.add("M:per_layer_token_embd.weight", 16 * 6, len(TOKENS), scale=10.0)
            m.add("M:per_layer_model_proj.weight", WIDTH, 16 * 6)
            m.add("M:per_layer_proj_norm.weight", 16, low=0.5)
    size = HEAD if G4_WINDOWS[il] else G4_HEAD
    m.norms(*SANDWICH)
    m.add("attn_q.weight", WIDTH, N_HEAD * size)
    m.norms("attn_q_norm", n=size)
    m.add("attn_output.weight", N_HEAD * size, WIDTH)
    if kind != "side" or il < 4:
        m.add("attn_k.weight", WIDTH, G4_KV[il] * size)
        m.norms("attn_k_norm", n=size)
        if G4_WINDOWS[il]:
            m.add("attn_v.weight", WIDTH, G4_KV[il] * size)
    m.dense()
    m.add("layer_output_scale.weight", 1, low=0.5)
    if kind == "side":
        m.add("inp_gate.weight", WIDTH, 16)
        m.add("proj.weight", 16, WIDTH)
        m.norms("post_norm")
    if kind == "experts":
        m.experts(merged=True)
        m.norms("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")
        m.add("ffn_gate_inp.scale", WIDTH, low=0.5)
        m.add("ffn_down_exps.scale", N_EXPERT, low=0.5)


model("gemma4", embedding_length_per_layer_input=0, **GEMMA4)(lambda m, il: _gemma4(m, il, "dense"))
model("gemma4-experts", arch="gemma4", embedding_length_per_layer_input=0, **GEMMA4, **MOE)(
    lambda m, il: _gemma4(m, il, "experts")
)
model("gemma4-side", arch="gemma4", embedding_length_per_layer_input=16, attention__shared_kv_layers=2, **GEMMA4)(
    lambda m, il: _gemma4(m, il, "side")
)

MLA = {
    **{"attention__head_count_kv": 1, "attention__key_length": 40, "attention__value_length": 32},
    **{"attention__key_length_mla": 24, "attention__value_length_mla": 16, "attention__kv_lora_rank": 32},
    **{"attention__q_lora_rank": 24, "rope__dimension_count": 8, "leading_dense_block_count": 1},
    **SHARED,
    **WEIGHTS,
    **YARN,
    "rope__scaling__yarn_log_multiplier": 0.1,
}


def _mla(m, il, **options):
    m.norms("attn_norm", "ffn_norm")
    m.latent(**options)
    m.dense() if il < 1 else m.experts(selection=True, shared=N_FF_EXPERT)


model("deepseek2", expert_gating_func=2, expert_group_count=4, expert_group_used_count=2, **MLA)(_mla)
model("deepseek2-lite", arch="deepseek2", n_layers=26, **(MLA | {"attention__q_lora_rank": None}))(
    lambda m, il: _mla(m, il, queries=0)
)
model("mistral4", expert_gating_func=1, attention__temperature_scale=0.1, attention__temperature_length=16, **MLA)(_mla)
INDEXER = {
    **{"attention__indexer__head_count": 2, "attention__indexer__key_length": 64, "attention__indexer__top_k": 128},
    "expert_gating_func": 2,
}


def _indexed(m, il):
    _mla(m, il)
    m.add("indexer.attn_k.weight", WIDTH, 64)
    m.add("indexer.k_norm.weight", 64, low=0.5)
    m.add("indexer.k_norm.bias", 64, low=-0.5, high=0.5)
    m.add("indexer.proj.weight", WIDTH, 2)
    m.add("indexer.attn_q_b.weight", 24, 2 * 64)


model("deepseek32", **(MLA | INDEXER))(_indexed)
model("glm-dsa", **(MLA | INDEXER | {"rope__scaling__yarn_log_multiplier": None}))(_indexed)


def _hybrid(kv):
    return {
        **{"attention__head_count_kv": kv, "ssm__conv_kernel": 4, "ssm__state_size": 16, "ssm__time_step_rank": 8},
        "ssm__group_count": 2,
    }


N_KINDS = "MFMAMF"
NEMOTRON = {
    "n_layers": 6,
    "feed_forward_length": [N_FF if kind == "F" else 0 for kind in N_KINDS],
    "attention__layer_norm_epsilon": 1e-5,
    "ssm__inner_size": 64,
    **_hybrid([N_KV if kind == "A" else 0 for kind in N_KINDS]),
}


def _nemotron(m, il, *, moe=False, latent=0):
    m.norms("attn_norm")
    kind = N_KINDS[il]
    if kind == "M":
        m.mamba(64)
    elif kind == "A":
        m.attention()
    elif not moe:
        m.dense(gated=False)
    else:
        m.experts(gated=False, selection=True, shared=48, width=latent or WIDTH)
        if latent:
            m.add("ffn_latent_down.weight", WIDTH, latent)
            m.add("ffn_latent_up.weight", latent, WIDTH)


NEMOTRON_MOE = NEMOTRON | SHARED | WEIGHTS | {"expert_shared_feed_forward_length": 48}
model("nemotron_h", **NEMOTRON)(_nemotron)
model("nemotron_h_moe", **NEMOTRON_MOE)(lambda m, il: _nemotron(m, il, moe=True))
model("nemotron_h_moe-latent", arch="nemotron_h_moe", moe_latent_size=32, **NEMOTRON_MOE)(
    lambda m, il: _nemotron(m, il, moe=True, latent=32)
)
SOME_KV = [0, 0, N_KV, 0]


def _lfm2(m, il, *, moe=False):
    m.norms("attn_norm", "ffn_norm")
    m.attention(norm="head") if SOME_KV[il] else m.convolution()
    m.experts(selection=True) if moe and il else m.dense()


LFM2 = {"tied": True, "norm": "token_embd_norm", "attention__head_count_kv": SOME_KV, "shortconv__l_cache": 3}
model("lfm2", **LFM2)(_lfm2)
model("lfm2moe", expert_gating_func=2, leading_dense_block_count=1, **LFM2, **MOE)(lambda m, il: _lfm2(m, il, moe=True))


@model(
    "granitehybrid",
    tied=True,
    feed_forward_length=32,
    logit_scale=4.0,
    residual_scale=0.3,
    embedding_scale=3.0,
    attention__scale=0.1,
    rope__scaling__finetuned=False,
    ssm__inner_size=128,
    expert_shared_feed_forward_length=48,
    **_hybrid(SOME_KV),
    **{key: value for key, value in MOE.items() if key != "expert_feed_forward_length"},
)
def _granitehybrid(m, il):
    m.norms("attn_norm", "ffn_norm")
    m.attention() if SOME_KV[il] else m.mamba(128)
    m.experts(shared=48)


@model("falcon-h1", ssm__inner_size=64, **(_hybrid(N_KV)))
def _falcon(m, il):
    m.norms("attn_norm")
    m.add("ffn_norm", WIDTH, low=0.5)
    m.attention()
    m.mamba(64)
    m.dense()


KDA = {"ssm__conv_kernel": 4, "kda__head_dim": 16, "attention__head_count_kv": [0, 0, 1, 0], "expert_gating_func": 2}
model("kimi-linear", **{key: value for key, value in (MLA | KDA).items() if not key.startswith("rope__scaling")})(
    lambda m, il: _kda(m, il, low_rank=True)
)
model(
    "bailingmoe3",
    kda__gate_lower_bound=-2.0,
    **{key: value for key, value in (MLA | KDA).items() if not key.startswith("rope__scaling")},
)(lambda m, il: _kda(m, il, low_rank=False))


def _kda(m, il, *, low_rank):
    m.norms("attn_norm", "ffn_norm")
    if il == 2:
        m.latent(queries=0 if low_rank else 24, gate=0 if low_rank else N_HEAD)
    else:
        m.kda(low_rank=low_rank)
    m.dense() if il < 1 else m.experts(selection=True, shared=N_FF_EXPERT)

"""The parts that layers are made of, each told by its tensors: those that it needs, and those that it may have.

Names are those within a layer. A name without a suffix is that of a matrix, which may have a bias and a weight scale.
Source: load_arch_tensors of each architecture in llama.cpp's src/models, which refuses a model without what is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

_SUFFIXES = (".weight", ".bias", ".scale")
_BARE = frozenset(["ssm_a", "ssm_d", "exp_probs_b", "ffn_norm", "attn_rot_embd"])  # whole names


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of a part: those that it needs, one of each of the alternatives `a b | c`, and those it may have."""

    needs: str = ""
    either: tuple[str, ...] = ()
    may: str = ""

    def alternatives(self) -> list[list[list[str]]]:
        """Return the full names in each alternative."""
        return [[list(map(full_name, one.split())) for one in group.split("|")] for group in self.either]


SHARED_KEYS = "attention of shared keys"
PARTS: Mapping[str, Part] = {
    "attention": Part("attn_output", ("attn_qkv | attn_q attn_k attn_v",), "attn_rot_embd"),
    # keys and values of an earlier layer, or values that are the keys
    SHARED_KEYS: Part("attn_q attn_output attn_q_norm.weight", (), "attn_k attn_v attn_k_norm.weight"),
    "own keys": Part("attn_k attn_k_norm.weight"),
    "q norm": Part("attn_q_norm.weight"),
    "k norm": Part("attn_k_norm.weight"),
    "qk norm": Part("attn_q_norm.weight attn_k_norm.weight"),
    "output bias": Part("attn_output.bias"),
    "sinks": Part("attn_sinks.weight"),
    "gate": Part("attn_gate"),
    "latent": Part(
        "attn_kv_a_mqa attn_kv_a_norm.weight attn_output",
        ("attn_q | attn_q_a attn_q_a_norm.weight attn_q_b", "attn_kv_b | attn_k_b attn_v_b"),
    ),
    "indexer": Part("indexer.proj indexer.attn_k indexer.attn_q_b"),
    "indexer norm": Part("indexer.k_norm.weight indexer.k_norm.bias"),
    "delta net": Part(
        "attn_qkv attn_gate ssm_out ssm_conv1d.weight ssm_dt.bias ssm_a ssm_norm.weight",
        ("ssm_alpha ssm_beta | ssm_ba",),
    ),
    "kda": Part(
        "attn_q attn_k attn_v attn_output ssm_f_a ssm_g_a ssm_beta ssm_conv1d_q.weight ssm_conv1d_k.weight "
        "ssm_conv1d_v.weight ssm_dt.bias ssm_a ssm_norm.weight",
    ),
    "low rank": Part("ssm_f_b ssm_g_b"),
    "mamba": Part("ssm_in ssm_out ssm_conv1d.weight ssm_conv1d.bias ssm_dt.bias ssm_a ssm_d"),
    "group norm": Part("ssm_norm.weight"),
    "convolution": Part("shortconv.in_proj shortconv.out_proj shortconv.conv.weight"),
    "dense": Part("ffn_gate ffn_up ffn_down"),
    "joined dense": Part("ffn_up ffn_down", (), "ffn_gate"),  # up holds the gate too
    "ungated dense": Part("ffn_up ffn_down"),
    "experts": Part("ffn_gate_inp ffn_down_exps", ("ffn_gate_exps ffn_up_exps | ffn_gate_up_exps",)),
    "plain experts": Part("ffn_gate_inp ffn_up_exps ffn_down_exps", (), "ffn_gate_exps"),
    "ungated experts": Part("ffn_gate_inp ffn_up_exps ffn_down_exps"),
    "biases of experts": Part("ffn_gate_inp.bias ffn_gate_exps.bias ffn_up_exps.bias ffn_down_exps.bias"),
    "selection": Part("", ("exp_probs_b.bias | exp_probs_b",)),
    "latent experts": Part("ffn_latent_down ffn_latent_up"),
    "shared": Part("ffn_gate_shexp ffn_up_shexp ffn_down_shexp"),
    "ungated shared": Part("ffn_up_shexp ffn_down_shexp"),
    "shared gate": Part("ffn_gate_inp_shexp.weight"),
    "pair": Part("ffn_gate_inp.scale pre_ffw_norm_2.weight post_ffw_norm_1.weight post_ffw_norm_2.weight"),
    "side embedding": Part("inp_gate proj post_norm.weight"),
    "scale": Part("layer_output_scale.weight"),
    "bare norm": Part("ffn_norm"),
}
STATEFUL = frozenset(["delta net", "kda", "mamba", "convolution"])
# part -> tensors outside the layers
OUTSIDE = {
    "": "token_embd.weight output.weight output.bias output.scale output_norm.weight",
    "convolution": "token_embd_norm.weight",
    "side embedding": "per_layer_token_embd.weight per_layer_model_proj.weight per_layer_proj_norm.weight",
}


def full_name(name: str) -> str:
    """Return the name of a tensor of a part: that of a matrix gets its suffix."""
    return name if name in _BARE or name.endswith(_SUFFIXES) else f"{name}.weight"


def tensors_of(part: str) -> frozenset[str]:
    """Return the names of all tensors that a part may have; `part` may end with a question mark."""
    own = PARTS[part.removesuffix("?")]
    names = {*own.needs.split(), *own.may.split(), *(name for group in own.either for name in group.split())} - {"|"}
    matrices = [name for name in names if full_name(name) != name]
    return frozenset(map(full_name, names)).union(f"{name}{suffix}" for name in matrices for suffix in _SUFFIXES)


def missing_of(part: str, names: Collection[str]) -> Iterator[str]:
    """Yield the tensors that a part needs and `names` lack; none for an absent part that ends with a question mark."""
    own = PARTS[part.removesuffix("?")]
    if part.endswith("?") and tensors_of(part).isdisjoint(names):
        return
    for group in own.alternatives():
        begun = max(group, key=lambda one: sum(name in names for name in one))
        yield from (name for name in begun if name not in names)
    yield from (name for name in map(full_name, own.needs.split()) if name not in names)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of which a layer has one: `a+b?, c` for a with b or without, or c."""

    text: str

    def _each(self) -> list[list[str]]:
        return [block.split("+") for block in self.text.split(", ")]

    def chosen(self, names: Collection[str]) -> list[str]:
        """Return the parts of the block that a layer with these tensors has; none where it has no tensor of one.

        It is the first of those with the most tensors that no other has, or where there are none the first with any.
        """
        sets = [(block, frozenset[str]().union(*map(tensors_of, block))) for block in self._each()]
        found = [(block, own) for block, own in sets if not own.isdisjoint(names)]

        def count(one: tuple[list[str], frozenset[str]]) -> int:
            others = frozenset[str]().union(*(own for block, own in sets if block is not one[0]))
            return len((one[1] - others).intersection(names))

        return max(found, key=count)[0] if found else []

    def tensors(self, names: Collection[str]) -> frozenset[str]:
        """Return the tensors that the chosen block may have, of each alternative only the one that is begun."""
        found: set[str] = set()
        for part in self.chosen(names):
            found |= tensors_of(part)
            for group in PARTS[part.removesuffix("?")].alternatives():
                begun = max(group, key=lambda one: sum(name in names for name in one))
                found -= {name for one in group if one is not begun for name in one if name not in begun}
        return frozenset(found)

    def missing(self, names: Collection[str]) -> Iterator[str]:
        """Yield the tensors that the chosen block, or else the first, needs and `names` lack."""
        for part in self.chosen(names) or self._each()[0]:
            yield from missing_of(part, names)

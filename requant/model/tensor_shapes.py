"""Tensor shapes: the dimensions that the keys of a model demand of its tensors, as a table, and what does not fit.

Every command tells of a misfit; a command that runs the model refuses it. To add an architecture, add its table to
SHAPES. Source: load_arch_tensors of each architecture in llama.cpp's src/models, which refuses a model with a misfit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from requant.errors import BadInput, quote
from requant.model.hyperparameters import Hyperparameters, read_hyperparameters
from requant.model.roles import layer_of

if TYPE_CHECKING:
    from requant.container.source import Source, SourceTensor

_SHOWN = 20  # misfits to tell of; a file may have a million


class Misfit(BadInput):
    """A tensor or key with which no engine runs the model."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """A dimension of a tensor: the keys that give it, and its size by them in a layer."""

    keys: str
    size: Callable[[Hyperparameters, int], int]


def _head_sizes(hp: Hyperparameters, layer: int) -> tuple[int, int]:
    """Return the dimensions of a key and of a value in the layer."""
    windowed = hp.windows is not None and hp.windows.size > 0 and hp.windows.layers[layer]
    return (hp.key_length_swa, hp.value_length_swa) if windowed else (hp.key_length, hp.value_length)


def _queries(hp: Hyperparameters, layer: int) -> int:
    return hp.n_head[layer] * _head_sizes(hp, layer)[0]


def _keys(hp: Hyperparameters, layer: int) -> int:
    return hp.n_head_kv[layer] * _head_sizes(hp, layer)[0]


def _values(hp: Hyperparameters, layer: int) -> int:
    return hp.n_head_kv[layer] * _head_sizes(hp, layer)[1]


_WIDTH = Dimension("embedding_length", lambda hp, _: hp.n_embd)
_VOCABULARY = Dimension("the vocabulary", lambda hp, _: hp.n_vocab)
_QUERIES = Dimension("attention.head_count x key_length", _queries)
_KEYS = Dimension("attention.head_count_kv x key_length", _keys)
_VALUES = Dimension("attention.head_count_kv x value_length", _values)
_FUSED = Dimension(
    "attention.head_count x key_length + head_count_kv x (key_length + value_length)",
    lambda hp, il: _queries(hp, il) + _keys(hp, il) + _values(hp, il),
)
_MIXED = Dimension("attention.head_count x value_length", lambda hp, il: hp.n_head[il] * _head_sizes(hp, il)[1])
_KEY = Dimension("attention.key_length", lambda hp, il: _head_sizes(hp, il)[0])
_ROTATED = Dimension("rope.dimension_count / 2", lambda hp, _: hp.n_rotated // 2)
_INNER = Dimension("feed_forward_length", lambda hp, il: hp.n_ff[il])
_TWICE = Dimension("2 x feed_forward_length", lambda hp, il: 2 * hp.n_ff[il])
_TWO_EXPERT = Dimension("2 x expert_feed_forward_length", lambda hp, il: 2 * (hp.n_ff_expert or hp.n_ff[il]))
_EXPERTS = Dimension("expert_count", lambda hp, _: hp.n_expert)
_EXPERT = Dimension("expert_feed_forward_length", lambda hp, il: hp.n_ff_expert or hp.n_ff[il])

Shapes = Mapping[str, tuple[Dimension, ...]]  # name without `blk.N.` -> dimensions in ggml's order, the row first
_WITHOUT_GATE = " without a gate"  # after the name of an up projection that holds the gate too
# a pre-norm decoder; a tensor that only some architectures have stands among the others
DECODER: Shapes = {
    **dict.fromkeys(("token_embd.weight", "output.weight"), (_WIDTH, _VOCABULARY)),
    **dict.fromkeys(("output_norm.weight", "attn_norm.weight", "ffn_norm.weight"), (_WIDTH,)),
    **dict.fromkeys(("post_attention_norm.weight", "post_ffw_norm.weight"), (_WIDTH,)),
    **dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (_KEY,)),
    "attn_q.weight": (_WIDTH, _QUERIES),
    "attn_k.weight": (_WIDTH, _KEYS),
    "attn_v.weight": (_WIDTH, _VALUES),
    "attn_qkv.weight": (_WIDTH, _FUSED),
    "attn_output.weight": (_MIXED, _WIDTH),
    **dict.fromkeys(("ffn_gate.weight", "ffn_up.weight"), (_WIDTH, _INNER)),
    f"ffn_up.weight{_WITHOUT_GATE}": (_WIDTH, _TWICE),
    "ffn_down.weight": (_INNER, _WIDTH),
    "ffn_gate_inp.weight": (_WIDTH, _EXPERTS),
    **dict.fromkeys(("ffn_gate_exps.weight", "ffn_up_exps.weight"), (_WIDTH, _EXPERT, _EXPERTS)),
    f"ffn_up_exps.weight{_WITHOUT_GATE}": (_WIDTH, _TWO_EXPERT, _EXPERTS),
    "ffn_down_exps.weight": (_EXPERT, _WIDTH, _EXPERTS),
    **dict.fromkeys(("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"), (_ROTATED,)),
}
SHAPES: Mapping[str, Shapes] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "qwen3moe", "phi3", "gemma", "gemma2", "gemma3"), DECODER),
}


def check_fit(source: Source, hp: Hyperparameters) -> None:
    """Raise Misfit for the first tensor of `source`, or key, with which no engine runs the model."""
    for misfit in find_misfits(source, hp):
        raise misfit


def describe_misfits(source: Source) -> list[str]:
    """Return a line for each misfit of `source`, for commands that do not run the model."""
    try:
        found = [*find_misfits(source, read_hyperparameters(source.metadata, source.tensors))]
    except BadInput:
        return []  # without its keys there is nothing to compare with
    told = (str(misfit).removeprefix(f"{source.path}: ") for misfit in found[:_SHOWN])
    lines = [f"{line}; no engine runs such a model" for line in told]
    return [*lines, f"{len(found) - _SHOWN} more misfits like these"] if len(found) > _SHOWN else lines


def find_misfits(source: Source, hp: Hyperparameters) -> Iterator[Misfit]:
    """Yield an error for each tensor of `source` that is missing, or has the wrong layer, shape or type."""
    shapes = SHAPES.get(hp.arch, {})
    most = min(hp.key_length, hp.key_length_swa)
    if shapes and (hp.n_rotated % 2 or not 0 < hp.n_rotated <= most):
        what, limit = f"key '{hp.arch}.rope.dimension_count' is out of range", f"an even number up to {most}"
        yield Misfit(source.path, what, got=hp.n_rotated, limit=limit)
    if shapes and hp.n_expert and not hp.n_expert_used:
        yield Misfit(source.path, f"key '{hp.arch}.expert_used_count' is missing", expected=f"1 to {hp.n_expert}")
    for tensor in source.tensors:
        what, layer = f"tensor {quote(tensor.name)}", _own_layer(tensor)
        if layer >= hp.n_layers:
            limit = f"{hp.arch}.block_count {hp.n_layers}"
            yield Misfit(source.path, f"{what} is of a layer that the model does not have", limit=limit)
            continue
        wanted = _wanted_dimensions(source, shapes, tensor)
        if wanted is None:
            continue
        sizes = [dimension.size(hp, layer) for dimension in wanted]
        if list(tensor.shape) != sizes:
            pairs = zip_longest(wanted, sizes, tensor.shape)
            keys = dict.fromkeys(d.keys for d, size, own in pairs if d is not None and size != own)
            expected = f"{sizes}" + (f" by {' and '.join(keys)}" if keys else "")
            yield Misfit(source.path, f"{what} has the wrong shape", got=list(tensor.shape), expected=expected)
        elif not tensor.format.can_decode:
            expected = "F32, F16, BF16 or a quantized type"
            yield Misfit(source.path, f"{what} has the wrong type", got=tensor.format.name, expected=expected)
    if shapes:
        for name in _missing_tensors(source, hp):
            wanted_by = f"{hp.arch}.block_count {hp.n_layers}" if name.startswith("blk.") else None
            yield Misfit(source.path, f"has no tensor {quote(name)}", expected=wanted_by)


def _missing_tensors(source: Source, hp: Hyperparameters) -> Iterator[str]:
    """Yield the names of the tensors that a decoder needs and `source` lacks.

    A prediction head in a file of its own has no layers but its own.
    """
    layers = {_own_layer(t) for t in source.tensors if t.name.startswith("blk.")}
    if layers and min(layers) >= hp.n_trunk:
        return
    needed = ["token_embd.weight", "output_norm.weight"]
    for il in range(hp.n_trunk):
        names = ["attn_norm", "attn_output", "ffn_norm"]
        names += ["attn_qkv"] if f"blk.{il}.attn_qkv.weight" in source else ["attn_q", "attn_k", "attn_v"]
        experts = f"blk.{il}.ffn_gate_inp.weight" in source
        names += ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"] if experts else ["ffn_up", "ffn_down"]
        needed += [f"blk.{il}.{name}.weight" for name in names]
    yield from (name for name in needed if name not in source)


def _own_layer(tensor: SourceTensor) -> int:
    """Return N of a tensor `blk.N.`; 0 outside the layers and in another tower."""
    return (layer_of(tensor.name) or 0) if tensor.name.startswith("blk.") else 0


def _wanted_dimensions(source: Source, shapes: Shapes, tensor: SourceTensor) -> tuple[Dimension, ...] | None:
    """Return the dimensions that the table gives for a tensor or the bias of one; None for another."""
    in_layer = tensor.name.startswith("blk.") and tensor.name.count(".") > 2
    part = tensor.name.split(".", 2)[2] if in_layer else tensor.name
    prefix = tensor.name.removesuffix(part)
    matrix = part.removesuffix(".bias") + ".weight" if part.endswith(".bias") else part
    if matrix.startswith("ffn_up") and prefix + matrix.replace("up", "gate", 1) not in source:
        matrix += _WITHOUT_GATE
    wanted = shapes.get(matrix)
    return wanted if wanted is None or not part.endswith(".bias") else wanted[1:]

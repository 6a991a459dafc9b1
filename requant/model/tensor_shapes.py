"""Tensor shapes and the tensors that a model needs, by its keys: what does not fit.

Every command tells of a misfit; a command that runs the model refuses it. Source: load_arch_tensors of each
architecture in llama.cpp's src/models, which refuses a model with a misfit.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING

from requant.errors import BadInput, quote
from requant.model.forward.families import FAMILIES
from requant.model.forward.parts import OUTSIDE, missing_of
from requant.model.hyperparameters import Hyperparameters, read_hyperparameters
from requant.model.layer_shapes import (
    BY_OTHERS,
    DECODER,
    HEADS,
    IN_ARCH,
    MIXED,
    MIXERS,
    WIDTH,
    WITHOUT_GATE,
    Dimension,
    Shapes,
)
from requant.model.roles import layer_of

if TYPE_CHECKING:
    from requant.container.source import Source, SourceTensor

_SHOWN = 20  # misfits to tell of; a file may have a million
_NOT_RUN = "no engine runs such a model"
QUICK_WORKS = "score, plan and convert with --quick still work"
_SIDE, _OWN_KEYS = "side embedding", "own keys"


class Misfit(BadInput):
    """A tensor or key with which no engine runs the model."""


def check_fit(source: Source, hp: Hyperparameters) -> None:
    """Raise Misfit for the first tensor of `source`, or key, with which no engine runs the model."""
    for misfit in find_misfits(source, hp):
        raise misfit.with_hint(f"{_NOT_RUN}; {QUICK_WORKS}")


def describe_misfits(source: Source) -> list[str]:
    """Return a line for each misfit of `source`, for commands that do not run the model."""
    try:
        found = [*find_misfits(source, read_hyperparameters(source.metadata, source.tensors))]
    except BadInput:
        return []  # without its keys there is nothing to compare with
    told = (str(misfit).removeprefix(f"{source.path}: ") for misfit in found[:_SHOWN])
    lines = [f"{line}; {_NOT_RUN}" for line in told]
    return [*lines, f"{len(found) - _SHOWN} more misfits like these"] if len(found) > _SHOWN else lines


def find_misfits(source: Source, hp: Hyperparameters) -> Iterator[Misfit]:
    """Yield an error for each tensor of `source` that is missing, or has the wrong layer, shape or type."""
    known = hp.arch in FAMILIES
    most = hp.key_length  # of layers with a window the key has a name of its own
    if known and FAMILIES[hp.arch].unrotated != "all" and (hp.n_rotated % 2 or not 0 < hp.n_rotated <= most):
        what, limit = f"key '{hp.arch}.rope.dimension_count' is out of range", f"an even number up to {most}"
        yield Misfit(source.path, what, got=hp.n_rotated, limit=limit)
    if known and hp.n_expert and not hp.n_expert_used:
        yield Misfit(source.path, f"key '{hp.arch}.expert_used_count' is missing", expected=f"1 to {hp.n_expert}")
    for tensor in source.tensors:
        if _own_layer(tensor) >= hp.n_layers:
            what, limit = "is of a layer that the model does not have", f"{hp.arch}.block_count {hp.n_layers}"
            yield Misfit(source.path, f"tensor {quote(tensor.name)} {what}", limit=limit)
    for name in _missing_tensors(source, hp) if known else ():
        wanted_by = f"{hp.arch}.block_count {hp.n_layers}" if name.startswith("blk.") else None
        yield Misfit(source.path, f"has no tensor {quote(name)}", expected=wanted_by)
    for il, names in tensors_by_layer(source).items() if known else ():
        if il < hp.n_trunk and FAMILIES[hp.arch].has_state(names) != hp.caches.recurrent[il]:
            by_keys = "keeps a state" if hp.caches.recurrent[il] else "attends or only feeds forward"
            yield Misfit(source.path, f"layer {il} {by_keys} by the keys, and not by its tensors")
    for tensor in source.tensors:
        what, layer = f"tensor {quote(tensor.name)}", _own_layer(tensor)
        wanted = _wanted_dimensions(source, hp, tensor) if known and layer < hp.n_layers else None
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


def _missing_tensors(source: Source, hp: Hyperparameters) -> Iterator[str]:
    """Yield the names of the tensors that the architecture needs and `source` lacks.

    A prediction head in a file of its own has no layers but its own.
    """
    layers, family = tensors_by_layer(source), FAMILIES[hp.arch]
    if layers and min(layers) >= hp.n_trunk:
        return
    norm = "token_embd_norm.weight" if "token_embd_norm.weight" in source else "output_norm.weight"
    needed = ["token_embd.weight", norm, *family.outside.split(), *(OUTSIDE[_SIDE].split() if hp.n_side else [])]
    yield from (name for name in needed if name not in source)
    for il in range(hp.n_trunk):
        names = layers.get(il, set())
        missing = [*family.missing_tensors(names), *(missing_of(_SIDE, names) if hp.n_side else [])]
        if family.shares_keys and hp.caches.attends[il]:
            missing += missing_of(_OWN_KEYS, names)
        yield from (f"blk.{il}.{name}" for name in dict.fromkeys(missing))


def tensors_by_layer(source: Source) -> dict[int, set[str]]:
    """Return the names of the tensors of each layer, within it."""
    found: dict[int, set[str]] = {}
    for tensor in source.tensors:
        layer, part = place_in_layer(tensor.name)
        if layer is not None:
            found.setdefault(layer, set()).add(part)
    return found


def place_in_layer(name: str) -> tuple[int | None, str]:
    """Return N and the rest of a name `blk.N.rest`; None and the name itself for another."""
    layer = layer_of(name) if name.startswith("blk.") else None
    return layer, name if layer is None else name.split(".", 2)[2]


def _own_layer(tensor: SourceTensor) -> int:
    """Return N of a tensor `blk.N.`; 0 outside the layers and in another tower."""
    return (layer_of(tensor.name) or 0) if tensor.name.startswith("blk.") else 0


def _wanted_dimensions(source: Source, hp: Hyperparameters, tensor: SourceTensor) -> tuple[Dimension, ...] | None:
    """Return the dimensions that the tables give for a tensor or the bias of one; None for another."""
    layer, part = place_in_layer(tensor.name)
    prefix = tensor.name.removesuffix(part)
    mixer: Shapes = {}
    if layer is not None:
        mixer = next((shapes for name, shapes in MIXERS.items() if prefix + name in source), {})
    shapes = {**DECODER, **IN_ARCH.get(hp.arch, {}), **mixer}
    is_bias = part.endswith(".bias") and part not in shapes
    matrix = part.removesuffix(".bias") + ".weight" if is_bias else part
    others = [d for d in BY_OTHERS.get(matrix, ()) if isinstance(d, tuple)]
    if others and all(prefix + name in source for name, _ in others):
        wanted = tuple(_read_dimension(source, prefix, d) for d in BY_OTHERS[matrix])
    elif matrix == "attn_gate.weight" and matrix not in mixer:  # one a head, or one a number
        wanted = (WIDTH, HEADS if tensor.shape[1:] == (HEADS.size(hp, layer or 0),) else MIXED)
    else:
        gated = FAMILIES[hp.arch].activation != "relu2"
        joined = gated and matrix == "ffn_up.weight" and f"{prefix}ffn_gate.weight" not in source
        found = shapes.get(matrix + (WITHOUT_GATE if joined else ""))
        if found is None:
            return None
        wanted = found
    if part.endswith("_exps.weight") and f"{prefix}ffn_latent_down.weight" in source:
        inner = _read_dimension(source, prefix, ("ffn_latent_down.weight", 1))
        wanted = tuple(inner if dimension is WIDTH else dimension for dimension in wanted)
    return wanted[1:] if is_bias else wanted


def _read_dimension(source: Source, prefix: str, dimension: Dimension | tuple[str, int]) -> Dimension:
    """Return a dimension that another tensor of the layer gives, 0 where that has fewer."""
    if isinstance(dimension, Dimension):
        return dimension
    name, index = dimension
    shape = source.tensor(prefix + name).shape
    return Dimension(f"{prefix}{name}", lambda *_: shape[index] if index < len(shape) else 0)

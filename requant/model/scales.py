"""The scales that a source holds beside its matrices, and which matrices get one as NVFP4."""

from __future__ import annotations

from requant import codec
from requant.codec import Floats
from requant.container.source import Source, SourceTensor
from requant.model.companions import applies_scale, companion_of, companion_shape


def scales_of(source: Source, tensor: SourceTensor) -> Floats | None:
    """(1,) or (n_experts,): what the engine multiplies the matrices of `tensor` by; None where nothing says so."""
    name = companion_of(tensor.name)
    if name == tensor.name or name not in source or not _is_companion(source, tensor):
        return None
    companion = source.tensor(name)
    return codec.dequantize(source.read_rows(companion), companion.format).reshape(-1)


def _is_companion(source: Source, tensor: SourceTensor) -> bool:
    found = source.tensor(companion_of(tensor.name))
    return found.format.name == "F32" and found.shape == companion_shape(tensor.name, tensor.shape)


def takes_second_level(source: Source, tensor: SourceTensor) -> bool:
    """Whether `tensor` gets a companion where it is encoded as NVFP4: the engine applies it, and its name is free."""
    arch = source.metadata.get_str("general.architecture", "") or ""
    if not applies_scale(arch, tensor.name, source):
        return False
    return companion_of(tensor.name) not in source or _is_companion(source, tensor)

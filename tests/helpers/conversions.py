"""Plans by hand, small models, and their conversion."""

import contextlib
import math
from dataclasses import replace

import numpy as np
from gguf_files import ARCHITECTURE, STR, U32, File, Tensor, pair

from requant.common.monitor import SILENT
from requant.container.output import claim_output
from requant.container.source import open_source
from requant.conversion import convert as module
from requant.conversion.options import Claim, ConversionOptions
from requant.conversion.verify import find_record, verify_output
from requant.formats import by_name
from requant.model.roles import layer_of, never_quantize, role_of
from requant.planning.plan import Choice, Plan

NORM = "output_norm.weight"


def choice(tensor, type_name, loss=0.01):
    size = by_name(type_name).n_bytes(math.prod(tensor.shape))
    role, layer = role_of(tensor.name), layer_of(tensor.name)
    return Choice(tensor.name, role, layer, tensor.shape, tensor.format.name, type_name, size, loss, 0.07, device="gpu")


def plan_for(source, *types):
    """A plan that gives the matrices of `source` the `types` in turn; the rest is copied."""
    choices, n = [], 0
    for tensor in source.tensors:
        own = tensor.format.name
        free = types and never_quantize("llama", tensor.name, tensor.shape, tensor.type_id) is None
        choices.append(choice(tensor, types[n % len(types)] if free else own))
        n += bool(free)
    return plan_of(source, choices)


def plan_of(source, choices):
    loss = sum(c.loss for c in choices)
    return Plan(source.name, source.header_sha256, "llama", "cfix", {}, (), {}, tuple(choices), loss, 0.0)


def normal(shape, seed=0, scale=0.02):
    """(n_rows, n_per_row) float32 for a tensor of `shape`."""
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal((math.prod(shape[1:]), shape[0]))).astype(np.float32)


def half(name, shape, values=None, seed=0):
    values = normal(shape, seed) if values is None else values
    return Tensor(name, shape, 1, data=np.asarray(values, "<f2").tobytes())


def single(name, shape, values=None, seed=0):
    values = normal(shape, seed) if values is None else values
    return Tensor(name, shape, 0, data=np.asarray(values, "<f4").tobytes())


def small_model(*tensors, pairs=()):
    """A model of a norm and `tensors` (File); the default is two matrices, of which one is F32."""
    given = tensors or (half("blk.0.attn_q.weight", (256, 12)), single("blk.1.ffn_up.weight", (512, 6), seed=1))
    keys = (pair(ARCHITECTURE, STR, "llama"), pair("general.file_type", U32, 1), *pairs)
    return File(keys, (single(NORM, (256,)), *given))


def convert(source, plan, out, *, imatrix=None, losses=None, record=None, progress=None, info=None, **options):
    """`convert` by its options; `progress` is called with bytes, `info` with lines, `record` with the record."""
    monitor = SILENT if info is None else replace(SILENT, info=info)
    if progress is not None:
        monitor = replace(monitor, progress=lambda *_: contextlib.nullcontext(progress))
    with contextlib.ExitStack() as stack:
        claim = None if record is None else Claim(stack.enter_context(claim_output(out)), record=record)
        options = ConversionOptions(**options)
        given = {"imatrix": imatrix, "losses": losses, "options": options, "claim": claim, "monitor": monitor}
        return module.convert(source, plan, out, **given)


def verify(out, *, source=None, record=None, **how):
    """The verification of the file `out` against `source`, and its record beside it or at `record`."""
    with open_source(out) as target:
        return verify_output(target, source=source, record=find_record(target, record), **how)

"""Metadata of the output: the source's, byte for byte, except for the few keys that describe the conversion.

Keys: gguf-py/gguf/constants.py; quantize.imatrix.* as tools/quantize/quantize.cpp of llama.cpp writes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from requant._version import __version__
from requant.container.digests import reserve_digests
from requant.container.imatrix import Imatrix, importance_for
from requant.container.metadata import Metadata
from requant.container.source import Source
from requant.errors import printable
from requant.formats import KERNELS, format_of
from requant.formats.ggml_names import llama_ftype
from requant.model.weight_scales import SCALED_TYPE
from requant.planning.plan import LayerSummary, Plan
from requant.planning.summaries import LAYERS_SCHEMA

Changes = dict[str, tuple[str, Any] | None]

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# llama_ftype in llama.h: a label for the whole file. gguf names those of most types; for the K-quants there are only
# labels of mixtures, so the label is that of the most common mixture (M) around the type that most bytes have
_FTYPES = {"Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "MXFP4": 38, "Q2_0": 41}
_MAX_TEXT = 127  # bytes; llama-quantize cuts file and data set there
_MAX_F32 = 3e38

_IMATRIX_KEYS = tuple(f"quantize.imatrix.{part}" for part in ("file", "dataset", "entries_count", "chunks_count"))
IMATRIX_FILE, _, *IMATRIX_COUNTS = _IMATRIX_KEYS
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
# parallel arrays: tensors, and whether their products may take 4-bit activations
_EXTRA_KEYS = ("general.tensor_extra.name", "general.tensor_extra.prec_a4")
_OWN = "requant."
KERNELS_KEY, EFFORT_KEY, COMPENSATION_KEY = "requant.kernels", "requant.effort", "requant.compensation"


def may_differ(key: str) -> bool:
    """Return whether a conversion may set, change or remove the key; all others are as in the source."""
    labels = ("general.file_type", "general.quantization_version", *_IMATRIX_KEYS, *_SPLIT_KEYS, *_EXTRA_KEYS)
    return key in labels or key.startswith(_OWN)


def imatrix_used(plan: Plan, imatrix: Imatrix | None) -> Imatrix | None:
    """Return `imatrix` if it has importance for any tensor that the plan quantizes, else None."""
    if imatrix is None:
        return None
    weighted = (c for c in plan.choices if not c.copied and format_of(c.type).block_weights > 1)
    return imatrix if any(importance_for(imatrix, c.name, c.shape) is not None for c in weighted) else None


def compare_imatrix(metadata: Metadata, imatrix: Imatrix) -> tuple[str, str] | None:
    """Return the counts of `imatrix` and those in the metadata of an output, in words, None where they are the same.

    The names are not compared: the file may have another one since.
    """
    values = _imatrix_values(imatrix)
    found = [(values.get(key) or ("", None))[1] for key in IMATRIX_COUNTS]
    wanted = [metadata.get(key) for key in IMATRIX_COUNTS]
    if found == wanted:
        return None
    got, expected = (f"{entries} entries of {chunks or 'unknown'} chunks" for entries, chunks in (found, wanted))
    return got, "none" if wanted[0] is None else expected


def output_metadata(source: Source, plan: Plan, imatrix: Imatrix | None, n_tensors: int) -> Metadata:
    """Return the metadata of the output of `plan` for `source`, whose shards are merged; it has `n_tensors` tensors.

    Where every tensor is copied, file type and imatrix keys stay as they are. Otherwise they describe this conversion:
    the source's imatrix was not used for weights that are quantized again.
    """
    changes: Changes = dict.fromkeys(_SPLIT_KEYS)
    changes |= dict.fromkeys(key for key in source.metadata if key.startswith(_OWN))
    if any(not c.copied for c in plan.choices):
        changes |= _labels(plan) | dict.fromkeys(_IMATRIX_KEYS) | _prune_extra(source, plan)
        used = imatrix_used(plan, imatrix)
        if used is not None:
            changes |= _imatrix_values(used)
    own = _own_values(source, plan) | reserve_digests(n_tensors)
    return source.metadata.with_values(changes | own)


def file_type(type_name: str) -> int | None:
    """Return the general.file_type of a file whose weights mostly have the ggml type; None where there is none."""
    return _FTYPES[type_name] if type_name in _FTYPES else llama_ftype(type_name)


def _labels(plan: Plan) -> Changes:
    sizes: Counter[str] = Counter()
    for choice in plan.choices:
        sizes[choice.type] += choice.n_bytes
    ftype = next((f for name, _ in sizes.most_common() if (f := file_type(name)) is not None), None)
    labels: Changes = {} if ftype is None else {"general.file_type": ("u32", ftype)}
    if any(format_of(c.type).block_weights > 1 for c in plan.choices):
        labels["general.quantization_version"] = ("u32", QUANTIZATION_VERSION)
    return labels


def _prune_extra(source: Source, plan: Plan) -> Changes:
    """The keys on 4-bit activations, without tensors that are no longer NVFP4; {} where nothing changes."""
    names, allowed = (source.metadata.get_list(key, []) or [] for key in _EXTRA_KEYS)
    types = plan.types()
    left = [(n, a) for n, a in zip(names, allowed, strict=False) if types.get(n) == SCALED_TYPE]
    if len(left) == len(names) or len(names) != len(allowed):  # the engine refuses unequal lengths; the keys stay
        return {}
    values = ([n for n, _ in left], "arr_str"), ([a for _, a in left], "arr_bool")
    return {key: (kind, value) if value else None for key, (value, kind) in zip(_EXTRA_KEYS, values, strict=True)}


def _imatrix_values(imatrix: Imatrix) -> Mapping[str, tuple[str, Any] | None]:
    """The keys for an imatrix; its name without the folder, which is private."""
    file, dataset, entries, chunks = _IMATRIX_KEYS
    values: Changes = {
        file: ("str", _truncate(imatrix.name)),
        entries: ("u32", len(imatrix.entries)),
    }
    if imatrix.datasets:
        values[dataset] = ("str", _truncate(imatrix.datasets[0]))
    if imatrix.chunk_count:
        values[chunks] = ("u32", imatrix.chunk_count)
    return values


def _truncate(text: str) -> str:
    """Return at most 127 bytes of `text` in whole characters, with bytes that are not UTF-8 escaped."""
    return printable(text[:_MAX_TEXT]).encode()[:_MAX_TEXT].decode(errors="ignore")


def _own_values(source: Source, plan: Plan) -> Changes:
    """The keys on the origin of the file. No clock and no host: the same input gives the same bytes."""
    return {
        "requant.version": ("str", __version__),
        KERNELS_KEY: ("u32", KERNELS),
        "requant.plan_sha256": ("str", plan.sha256()),
        EFFORT_KEY: ("str", plan.effort.name.lower()),
        **({} if plan.compensation is None else {COMPENSATION_KEY: ("str", plan.compensation)}),
        "requant.source.name": ("str", printable(source.name)),
        "requant.source.header_sha256": ("str", source.header_sha256),
        **_layer_values(plan),
    }


def _layer_values(plan: Plan) -> Changes:
    """The layers' summaries as arrays with one item per layer; requant/planning/summaries.py defines them."""
    layers = {s.layer: s for s in plan.layers if s.layer is not None}
    n = 1 + max(layers, default=-1)
    if not 0 < n <= len(plan.choices):  # a name like blk.4294967295 must not make an array of that length
        return {}
    missing = LayerSummary(None, "none", 0, 0, 0.0, None)
    found = [layers.get(i, missing) for i in range(n)]
    values: Changes = {
        "requant.layer.schema": ("str", LAYERS_SCHEMA),
        "requant.layer.bytes": ("arr_u64", [s.n_bytes for s in found]),
        "requant.layer.kv_bytes": ("arr_u64", [s.kv_bytes for s in found]),
        "requant.layer.device": ("arr_str", [s.device for s in found]),
    }
    if plan.predicted_loss is not None and max(s.loss for s in found) < _MAX_F32:
        values["requant.layer.loss"] = ("arr_f32", [s.loss for s in found])
        sensitivities = [s.sensitivity or 0.0 for s in found]
        if any(s.sensitivity is not None for s in found) and max(sensitivities) < _MAX_F32:
            values["requant.layer.sensitivity"] = ("arr_f32", sensitivities)
            values["requant.layer.sensitivity_type"] = ("str", str(plan.runtime.get("reference_type", "")))
    return values

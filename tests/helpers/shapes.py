"""Real models as shapes only: metadata and tensor infos from fixtures/memory_golden.json, without a file."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from requant.container.header import TensorInfo
from requant.container.metadata import Metadata
from requant.formats import by_name

FIXTURES = Path(__file__).parents[2] / "fixtures"
FIXTURE = FIXTURES / "tiny-llama-f16.gguf"
GOLDEN = json.loads((FIXTURES / "memory_golden.json").read_text())
ENTRIES = GOLDEN["entries"]


@dataclass(frozen=True)
class Shape:
    metadata: Metadata
    tensors: tuple


def metadata_of(keys):
    """{key: [type name, value]} as Metadata."""
    return Metadata("shape.gguf", {}).with_values({k: tuple(v) for k, v in keys.items()})


@functools.cache
def shape(model):
    """A golden model, such as `Llama-3.1-8B F16`."""
    entry = GOLDEN["models"][model]
    tensors = []
    for group in entry["tensors"]:
        for layer in group["layers"]:
            prefix = "" if layer is None else f"blk.{layer}."
            tensors += [
                TensorInfo(prefix + name, tuple(dims), by_name(fmt).type_id, 0) for name, dims, fmt in group["parts"]
            ]
    return Shape(metadata_of(entry["metadata"]), tuple(tensors))


def tiny(**changes):
    """Metadata of a small llama; `changes` set keys below `llama.` (dots as __) to (type, value), None removes."""
    keys = {
        "block_count": ("u32", 2),
        "context_length": ("u32", 512),
        "embedding_length": ("u32", 64),
        "feed_forward_length": ("u32", 128),
        "attention__head_count": ("u32", 4),
        "attention__head_count_kv": ("u32", 2),
        "vocab_size": ("u32", 100),
    }
    kept = {"llama." + k.replace("__", "."): v for k, v in {**keys, **changes}.items() if v is not None}
    return metadata_of({"general.architecture": ("str", "llama"), **kept})

"""Small models under the names that the documentation uses, for its commands to run on."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
from doc_running import requant
from draft_heads import eagle3, projector
from gguf_files import File, Tensor
from real_models import FIXTURES, IMATRIX, TINY

from requant.container.layout import lay_out
from requant.container.metadata import Metadata
from requant.container.source import open_source
from requant.formats import by_name

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # of the tutorial; here it is a small one that is as quantized
JOBS = '[[job]]\nsource = "model.gguf"\nquick = true\nbudgets = [{ size = "5MB" }, { bpw = 5.5 }]\n'
TEXT = 20_000  # characters of the fixtures' texts: a dozen windows
N_LAYERS = 2  # of the tiny model's ten


def shallow(path, n_layers, changed=0.0):
    """The tiny model's first layers, at `path`; `changed`: how far its weights are moved, as a finetune's are."""
    rng = np.random.default_rng(7)
    with open_source(TINY) as source:
        metadata = source.metadata.with_values({"llama.block_count": ("u32", n_layers)})
        tensors = []
        for tensor in source.tensors:
            if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= n_layers:
                continue
            data = source.read_rows(tensor).tobytes()
            if changed and tensor.type_id == 1:
                x = np.frombuffer(data, "<f2").astype(np.float32)
                data = (x * (1 + changed * rng.standard_normal(len(x)))).astype("<f2").tobytes()
            tensors.append(Tensor(tensor.name, tensor.shape, tensor.type_id, data=data))
    return File((metadata.encode(),), tuple(tensors), n_pairs=len(metadata)).write(path)


def header_only(path, golden):
    """A model of fixtures/memory_golden.json with all its tensors, of which the file holds nothing: it is sparse."""
    entry = json.loads((FIXTURES / "memory_golden.json").read_text())["models"][golden]
    metadata = Metadata(str(path), {}).with_values({key: tuple(value) for key, value in entry["metadata"].items()})
    infos = []
    for group in entry["tensors"]:
        for layer in group["layers"]:
            prefix = "" if layer is None else f"blk.{layer}."
            infos += [(prefix + name, tuple(dims), by_name(fmt).type_id) for name, dims, fmt in group["parts"]]
    layout = lay_out(metadata, infos, path)
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.size)


@functools.cache
def _made(folder):
    """All models, once a process, in `folder`."""
    folder.mkdir()
    shallow(folder / "model.gguf", N_LAYERS)
    shallow(folder / "draft.gguf", 1)
    shallow(folder / "finetune.gguf", N_LAYERS, changed=0.01)
    eagle3().write(folder / "eagle3.gguf")
    projector().write(folder / "mmproj.gguf")
    shutil.copy(IMATRIX, folder / "imatrix.gguf")
    (folder / "model-BF16.gguf").symlink_to("model.gguf")
    assert requant(["convert", str(folder / "model.gguf"), str(folder / SMOLLM2), "--type", "Q4_1"]).code == 0
    header_only(folder / "Llama-3.1-8B-F16.gguf", "Llama-3.1-8B F16")
    (folder / "jobs.toml").write_text(JOBS)
    for name in ("calibration.txt", "eval.txt"):
        text = (FIXTURES / name).read_text(encoding="utf-8")
        (folder / name).write_text(text[:TEXT], encoding="utf-8")
    return folder


def furnish(sandbox, cache, smollm2=None):
    """Put the models, the texts and the folders of a checkout into `sandbox`; smollm2: the real one, if it is to be."""
    for path in _made(Path(cache) / "models").iterdir():
        (sandbox / path.name).symlink_to(path.resolve())
    for name in ("fixtures", "scripts", "docs"):
        (sandbox / name).symlink_to(FIXTURES.parent / name)
    if smollm2 is not None:
        (sandbox / SMOLLM2).unlink()
        (sandbox / SMOLLM2).symlink_to(smollm2)

"""A draft head and a projector for the tiny model, of random weights."""

import numpy as np
from gguf_files import ARCHITECTURE, ARR, STR, U32, File, Tensor, pair

F32, F16, I64 = 0, 1, 27
N_EMBD, N_VOCAB, N_DRAFT = 256, 4096, 512


def weights(name, *shape, type_id=F16):
    rng = np.random.default_rng(len(name))
    n = int(np.prod(shape))
    if type_id == I64:
        return Tensor(name, shape, type_id, data=np.arange(n, dtype="<i8").tobytes())
    dtype = "<f4" if type_id == F32 else "<f2"
    return Tensor(name, shape, type_id, data=(0.02 * rng.standard_normal(n)).astype(dtype).tobytes())


def eagle3(hidden=N_EMBD, n_vocab=N_VOCAB):
    """A head as llama.cpp's converter writes it: d2t without a suffix, embeddings and some norms left to the target."""
    keys = {
        "block_count": 1,
        "context_length": 512,
        "embedding_length": N_EMBD,
        "feed_forward_length": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "vocab_size": n_vocab,
        "target_hidden_size": hidden,
    }
    pairs = [pair(ARCHITECTURE, STR, "eagle3"), *(pair(f"eagle3.{k}", U32, v) for k, v in keys.items())]
    pairs.append(pair("eagle3.target_layers", ARR, (U32, [1, 4, 8])))
    tensors = (
        weights("d2t", N_DRAFT, type_id=I64),
        weights("fc.weight", 3 * N_EMBD, N_EMBD),
        weights("blk.0.attn_norm.weight", N_EMBD, type_id=F32),
        weights("blk.0.attn_q.weight", 2 * N_EMBD, N_EMBD),
        weights("blk.0.attn_k.weight", 2 * N_EMBD, 128),
        weights("blk.0.attn_v.weight", 2 * N_EMBD, 128),
        weights("blk.0.attn_output.weight", N_EMBD, N_EMBD),
        weights("blk.0.ffn_gate.weight", N_EMBD, 512),
        weights("blk.0.ffn_up.weight", N_EMBD, 512),
        weights("blk.0.ffn_down.weight", 512, N_EMBD),
        weights("output.weight", N_EMBD, N_DRAFT),
    )
    return File(tuple(pairs), tensors)


def projector():
    """A projector of pictures, with what the engine reads as it is."""
    tensors = (
        weights("v.patch_embd.weight", 14, 14, 3, 256),
        weights("v.position_embd.weight", 256, 64),
        weights("v.blk.0.attn_q.weight", 256, 256),
        weights("v.blk.0.ffn_down.weight", 1024, 256),
        weights("mm.0.weight", 256, 256),
    )
    pairs = (pair(ARCHITECTURE, STR, "clip"), pair("general.type", STR, "mmproj"))
    return File(pairs, tensors)

"""Draft heads, projectors and a tower for the tiny model, of random weights."""

import numpy as np
from gguf_files import ARCHITECTURE, ARR, BOOL, STR, U32, File, Tensor, pair
from gguf_files import F32 as FLOAT

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


def head_file(arch, layers, n_layers, *, nextn=0, keys=(), tensors=()):
    """Layers of the tiny model's width in a file with `n_layers` in its keys, and more keys and tensors."""
    own = {
        "block_count": n_layers,
        "context_length": 512,
        "embedding_length": N_EMBD,
        "feed_forward_length": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "vocab_size": N_VOCAB,
        **({"nextn_predict_layers": nextn} if nextn else {}),
    }
    pairs = [pair(ARCHITECTURE, STR, arch), *(pair(f"{arch}.{k}", U32, v) for k, v in own.items())]
    parts = [("attn_q", 256, 256), ("attn_k", 256, 128), ("attn_v", 256, 128), ("attn_output", 256, 256)]
    parts += [("ffn_gate", 256, 512), ("ffn_up", 256, 512), ("ffn_down", 512, 256)]
    found = [weights(f"blk.{il}.{name}.weight", *shape) for il in layers for name, *shape in parts]
    return File((*pairs, *keys), (*found, *tensors))


def prediction_head():
    """The ninth layer, of multi-token prediction, of a model of eight: in a file of its own, as it is published."""
    tensors = (
        weights("blk.8.nextn.eh_proj.weight", 512, 256),
        weights("blk.8.nextn.embed_tokens.weight", 256, N_VOCAB),
    )
    return head_file("glm4moe", [8], 9, nextn=1, tensors=tensors)


def dflash(*more, layers=(1, 3, 5)):
    """A head that drafts a block at once from the hidden states of three layers; DSpark with a Markov head."""
    keys = (pair("dflash.block_size", U32, 8), pair("dflash.target_layers", ARR, (U32, list(layers))))
    return head_file("dflash", [0, 1], 2, keys=keys, tensors=(weights("fc.weight", 3 * 256, 256), *more))


def assistant(hidden=N_EMBD):
    """A head of Gemma 4, which is all multi-token prediction and attends to the target's cache."""
    arch = "gemma4-assistant"
    keys = (
        pair(f"{arch}.embedding_length_out", U32, hidden),
        pair(f"{arch}.attention.sliding_window", U32, 128),
        pair(f"{arch}.attention.sliding_window_pattern", ARR, (BOOL, [True, False])),
    )
    tensors = (weights("token_embd.weight", 256, N_VOCAB), weights("nextn.pre_projection.weight", 512, 256))
    return head_file(arch, [0, 1], 2, nextn=2, keys=keys, tensors=tensors)


def gemma3_projector(text=640, width=128, side=112, patch=14):
    """A projector of one layer that llama.cpp loads beside Gemma 3 270M."""
    vision = "clip.vision."
    counts = {"image_size": side, "patch_size": patch, "embedding_length": width, "feed_forward_length": 256}
    counts |= {"block_count": 1, "projection_dim": text, "attention.head_count": 2}
    pairs = [pair(ARCHITECTURE, STR, "clip"), pair("general.type", STR, "mmproj")]
    pairs += [pair("clip.has_vision_encoder", BOOL, True), pair("clip.use_gelu", BOOL, True)]
    pairs += [pair("clip.projector_type", STR, "gemma3"), pair(f"{vision}attention.layer_norm_epsilon", FLOAT, 1e-6)]
    pairs += [pair(vision + key, U32, value) for key, value in counts.items()]
    pairs += [pair(vision + key, ARR, (FLOAT, [0.5] * 3)) for key in ("image_mean", "image_std")]
    vectors = ["v.patch_embd.bias", "v.post_ln.weight", "v.post_ln.bias", "mm.soft_emb_norm.weight"]
    vectors += [f"v.blk.0.{norm}.{part}" for norm in ("ln1", "ln2") for part in ("weight", "bias")]
    matrices = [(f"attn_{part}", width, width) for part in ("q", "k", "v", "out")]
    matrices += [("ffn_up", width, 256), ("ffn_down", 256, width)]
    tensors = [weights("v.patch_embd.weight", patch, patch, 3, width)]
    tensors += [weights("v.position_embd.weight", width, (side // patch) ** 2, type_id=F32)]
    tensors += [weights(name, width, type_id=F32) for name in vectors]
    for name, n_per_row, n_rows in matrices:
        tensors.append(weights(f"v.blk.0.{name}.weight", n_per_row, n_rows))
        tensors.append(weights(f"v.blk.0.{name}.bias", n_rows, type_id=F32))
    tensors.append(weights("mm.input_projection.weight", text, width))
    return File(tuple(pairs), tuple(tensors))

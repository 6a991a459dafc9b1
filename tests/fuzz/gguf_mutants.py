"""Mutants of GGUF files: edited as pairs and tensors, written with right counts and offsets, then edited as fields."""

import math
import struct
from dataclasses import dataclass

from gguf_files import ARR, BOOL, CHARS, F32, F64, I8, I16, I32, I64, STR, U8, U16, U32, U64

from requant.formats import FORMATS

SIZES = {type_id: (fmt.block_weights, fmt.block_bytes) for type_id, fmt in FORMATS.items()}
DATA = struct.pack("<f", 1.5) * 2**12  # weights of any type, all of them finite numbers

U64S = (0, 1, 2, 7, 8, 31, 32, 33, 63, 64, 255, 256, 65_535, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61)
U64S += (2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1)
NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    13,
    16,
    31,
    32,
    64,
    100,
    127,
    128,
    255,
    256,
    512,
    513,
    4096,
    65_535,
    2**20,
    2**31 - 1,
)
NUMBERS += (-1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-30, 3e38, 1e308, math.inf, -math.inf, math.nan)
TEXTS = ("", "llama", "gpt2", "imatrix", "adapter", "clip", "\x1b[2J", "a\0b", "\u202eb", "../..", "x" * 300, "\u00e9")
TEXTS += ("blk.0.attn_q.weight", "token_embd.weight", "linear", "yarn", "longrope")
BYTES = (b"\xff\xc0", b"\xed\xa0\x80", b"\x80")
ARCHITECTURES = ("llama", "gemma3", "gemma2", "gpt-oss", "qwen3moe", "qwen3next", "mamba", "lfm2", "falcon-h1", "clip")
ARCHITECTURES += ("deepseek2", "gemma3n", "llama4", "rwkv7", "nemotron_h", "eagle3", "step35", "exotic", "minimax-01")
SUFFIXES = tuple(
    """
    block_count context_length embedding_length feed_forward_length vocab_size attention.head_count
    attention.head_count_kv attention.key_length attention.value_length attention.key_length_swa
    attention.value_length_swa attention.sliding_window attention.sliding_window_pattern attention.shared_kv_layers
    attention.key_length_mla attention.value_length_mla attention.recurrent_layers attention.layer_norm_rms_epsilon
    expert_count expert_used_count expert_feed_forward_length expert_shared_count expert_shared_feed_forward_length
    nextn_predict_layers full_attention_interval ssm.conv_kernel ssm.inner_size ssm.state_size ssm.group_count
    ssm.time_step_rank kda.head_dim shortconv.l_cache wkv.head_size token_shift_count rope.freq_base
    rope.dimension_count rope.scaling.type rope.scaling.factor rope.scaling.original_context_length
    """.split()  # noqa: SIM905
)
KEYS = tuple(
    """
    general.architecture general.name general.type general.alignment general.file_type general.quantization_version
    split.no split.count split.tensors.count tokenizer.ggml.model tokenizer.ggml.tokens tokenizer.ggml.token_type
    tokenizer.ggml.merges tokenizer.ggml.scores tokenizer.ggml.pre tokenizer.ggml.bos_token_id imatrix.datasets
    imatrix.chunk_count imatrix.chunk_size requant.layer.bytes requant.effort general.tensor_extra.name
    general.tensor_extra.prec_a4 eagle3.target_layers
    """.split()  # noqa: SIM905
)
NAMES = tuple(
    """
    token_embd.weight output.weight output_norm.weight blk.0.attn_q.weight blk.0.attn_k.weight blk.1.attn_v.weight
    blk.0.attn_output.weight blk.0.ffn_up.weight blk.0.ffn_down.weight blk.0.ffn_gate_exps.weight
    blk.0.ffn_up_exps.weight blk.511.attn_q.weight blk.4294967295.ffn_up.weight blk.99999999999999999999.x.weight
    blk.0.nextn.eh_proj.weight v.blk.0.attn_q.weight per_layer_token_embd.weight blk.0.attn_norm.weight d2t
    blk.0.attn_q.scale blk.0.attn_q.weight.in_sum2 blk.0.attn_q.weight.counts blk.0.attn_q.weight.g_sum2
    token_embd.lookup.g_sum2 .in_sum2 .counts
    """.split()  # noqa: SIM905
)
SCALARS = (U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64)
TYPES = (*SIZES, *SIZES, -1, 4, 9, 15, 31, 43, 99, 2**31 - 1)
_STRUCTS = {t: struct.Struct("<" + c) for t, c in CHARS.items()}
_MASKS = {4: 2**32 - 1, 8: 2**64 - 1}
_U32, _U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
_INFO = struct.Struct("<iQ")


@dataclass(slots=True)
class Gguf:
    """A file to be written: pairs are (key, fields of the value), tensors [name, shape, type id]."""

    pairs: list
    tensors: list
    version: int = 3
    alignment: int = 32
    data: bytes | None = None  # DATA

    def copy(self):
        return Gguf(list(self.pairs), [list(t) for t in self.tensors], self.version, self.alignment, self.data)

    def fields(self):
        """Every field of the file as bytes of its own, in order; the data are the last."""
        out = [b"GGUF", _U32(self.version), _U64(len(self.tensors)), _U64(len(self.pairs))]
        for key, fields in self.pairs:
            out += (_U64(len(key)), key, *fields)
        offset, alignment = 0, self.alignment
        for name, shape, type_id in self.tensors:
            out += (_U64(len(name)), name, _U32(len(shape)), *map(_U64, shape))
            out += (struct.pack("<i", type_id), _U64(offset & 2**64 - 1))
            weights, size = SIZES.get(type_id, (1, 4))
            n_bytes = math.prod(shape) // weights * size
            offset += n_bytes + -n_bytes % alignment
        n = sum(map(len, out))
        out += (bytes(-n % alignment), (self.data or DATA)[:offset])
        return out


def value_fields(type_id, content):
    """A value's fields; an array is (item type, items)."""
    if type_id == STR:
        text = content if isinstance(content, bytes) else content.encode()
        return (_U32(STR), _U64(len(text)), text)
    if type_id == ARR:
        item_type, items = content
        head = (_U32(ARR), _U32(item_type), _U64(len(items)))
        if item_type == STR:
            return (*head, *(f for item in items for f in value_fields(STR, item)[1:]))
        return (*head, b"".join(_number(item_type, item) for item in items))
    return (_U32(type_id), _number(type_id, content))


def _number(type_id, n):
    form = _STRUCTS[type_id]
    if type_id in (F32, F64):
        if math.isfinite(n) and abs(n) > 3.4e38 and type_id == F32:
            n = math.inf
        return form.pack(n)
    n = int(n) & (1 << 8 * form.size) - 1
    return n.to_bytes(form.size, "little")


def random_value(rng):
    """A value of any type, most often a small number."""
    kind = rng.random()
    if kind < 0.6:
        type_id = rng.choice(SCALARS)
        return value_fields(type_id, rng.choice(FLOATS if type_id in (F32, F64) else NUMBERS))
    if kind < 0.75:
        return value_fields(STR, rng.choice(TEXTS) if rng.random() < 0.9 else rng.choice(BYTES))
    if kind < 0.85:
        return value_fields(ARR, (STR, [rng.choice(TEXTS) for _ in range(rng.randrange(4))]))
    type_id, n = rng.choice(SCALARS), rng.choice((0, 1, 2, 2, 2, 3, 600))
    some = FLOATS if type_id in (F32, F64) else NUMBERS
    return value_fields(ARR, (type_id, [rng.choice(some) for _ in range(n)]))


def random_key(rng, arch):
    kind = rng.random()
    if kind < 0.65:
        return arch + b"." + rng.choice(SUFFIXES).encode()
    if kind < 0.95:
        return rng.choice(KEYS).encode()
    return rng.choice((b"", b"k" * 66_000, b"k\xff", b"k\0", b"a.b"))


def random_name(rng):
    return (
        rng.choice(NAMES).encode()
        if rng.random() < 0.8
        else rng.choice((b"", b"n" * 64, b"n\xff", b"n\0", b"\xe2\x80\xae"))
    )


def _shape(rng, shape):
    """The shape with one of its dimensions, or their number, changed."""
    kind, shape = rng.random(), list(shape)
    if kind < 0.4 and shape:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 32, 64, 96, 256))
    elif kind < 0.7 and shape:
        shape[rng.randrange(len(shape))] = rng.choice(U64S)
    elif kind < 0.85:
        shape.append(rng.choice((1, 2, 32, *U64S)))
    else:
        del shape[rng.randrange(len(shape) + 1) :]
    return tuple(shape)


def edit(rng, gguf, others):
    """One change to the pairs or tensors, which leaves the file well formed; others: further files to take from."""
    kind, pairs, tensors = rng.random(), gguf.pairs, gguf.tensors
    arch = pairs[0][1][2] if pairs and pairs[0][0] == b"general.architecture" and len(pairs[0][1]) == 3 else b"llama"
    if kind < 0.35 and pairs:
        i = rng.randrange(len(pairs))
        pairs[i] = (pairs[i][0], random_value(rng))
    elif kind < 0.5:
        pairs.insert(rng.randrange(len(pairs) + 1), (random_key(rng, arch), random_value(rng)))
    elif kind < 0.6:
        _shuffle(rng, pairs, others.pairs)
    elif kind < 0.67:
        new = rng.choice(ARCHITECTURES).encode()
        gguf.pairs[:] = [_moved(key, fields, arch, new) for key, fields in pairs]
    elif kind < 0.9 and tensors:
        tensor = tensors[rng.randrange(len(tensors))]
        which = rng.randrange(3)
        tensor[which] = (random_name(rng), _shape(rng, tensor[1]), rng.choice(TYPES))[which]
    elif kind < 0.95:
        _shuffle(rng, tensors, others.tensors)
    elif kind < 0.97:
        gguf.version = rng.choice((0, 1, 2, 4, 3 << 24))
    elif kind < 0.985:
        gguf.alignment = rng.choice((1, 2, 4, 8, 64, 4096))
        pairs.append((b"general.alignment", value_fields(U32, gguf.alignment)))
    else:
        at = 4 * rng.randrange(64)
        odd = struct.pack("<f", rng.choice([x for x in FLOATS if x != 1e308]))
        gguf.data = DATA[:at] + odd + DATA[at + 4 :]


def _moved(key, fields, old, new):
    if key == b"general.architecture":
        return key, value_fields(STR, new)
    return (new + key[len(old) :], fields) if key.startswith(old + b".") else (key, fields)


def _shuffle(rng, items, others):
    """Delete, double or swap items, or take one of the others."""
    kind = rng.randrange(4)
    if kind == 3 and others:
        taken = others[rng.randrange(len(others))]
        items.insert(rng.randrange(len(items) + 1), list(taken) if isinstance(taken, list) else taken)
    elif items:
        i, j = rng.randrange(len(items)), rng.randrange(len(items))
        if kind == 0:
            del items[i]
        elif kind == 1:
            items.insert(j, list(items[i]) if isinstance(items[i], list) else items[i])
        else:
            items[i], items[j] = items[j], items[i]


def edit_fields(rng, fields):
    """One change to a list of fields: an integer replaced, fields deleted, doubled, swapped, or cut off."""
    kind = rng.random()
    i = rng.randrange(len(fields))
    if kind < 0.6:
        for _ in range(8):  # the next number
            if len(fields[i]) in _MASKS:
                break
            i = rng.randrange(len(fields))
        n, old = len(fields[i]), int.from_bytes(fields[i][:8], "little")
        new = old + rng.choice((-1, 1)) if rng.random() < 0.3 else rng.choice(U64S)
        fields[i] = (new & _MASKS.get(n, 2**32 - 1)).to_bytes(n if n in _MASKS else 4, "little")
    elif kind < 0.7:
        del fields[i : i + rng.randrange(1, 4)]
    elif kind < 0.8:
        fields.insert(rng.randrange(len(fields)), fields[i])
    elif kind < 0.9:
        j = rng.randrange(len(fields))
        fields[i], fields[j] = fields[j], fields[i]
    else:
        del fields[i:]
    if not fields:
        fields.append(b"")


def edit_bytes(rng, content, other):
    """One change to the bytes: a flip, a number, a piece cut out, doubled or taken from `other`, an end."""
    if not content:
        return other[: rng.randrange(64)]
    kind, n = rng.random(), rng.randrange(1, 40)
    at = rng.randrange(min(len(content), 2048))
    left, right = content[:at], content[at:]
    if kind < 0.35:
        new = left + bytes([right[0] ^ 1 << rng.randrange(8)]) + right[1:]
    elif kind < 0.55:
        new = left + rng.choice(U64S).to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))] + right[8:]
    elif kind < 0.65:
        new = left + right[n:]
    elif kind < 0.75:
        new = content[: at + n] + right
    elif kind < 0.85:
        start = rng.randrange(len(other) or 1)
        new = left + other[start : start + n] + right
    elif kind < 0.95:
        new = content[: rng.randrange(len(content))]
    else:
        new = content + other[:n]
    return new

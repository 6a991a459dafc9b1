"""The tokenizer: from text to token ids with the vocabulary of the file, as llama.cpp does it.

Byte-pair vocabularies (`gpt2`) and SentencePiece-style ones (`llama`) are passed to HuggingFace's `tokenizers`. The
merges of the latter are not in the file: two tokens whose joined text is a token merge, the best score first.
Source: llama_vocab::impl in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from requant.common.address_space import check_address_space
from requant.container.metadata import Metadata
from requant.errors import BadInput, UsageError, brief
from requant.model.pretokenizers import KINDS

Ids = NDArray[np.int32]

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
_SPACE = "\u2581"
_MAX_SPLITTING = 2**30  # characters of all halves, at most half a minute; Gemma's 262,144 tokens have under 2**24
_HINT = "give the ids themselves with --tokens FILE"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A vocabulary that encodes text; bos: the id that begins every text and every window, or None."""

    engine: Any
    bos: int | None
    eos: int | None
    unknown: int | None

    def encode(self, text: str) -> Ids:
        """Return the ids of `text`, with BOS and EOS if the file requires them; special tokens are recognised."""
        ids = self.engine.encode(text, add_special_tokens=False).ids
        ends = ([self.bos] if self.bos is not None else [], [self.eos] if self.eos is not None else [])
        return np.array([*ends[0], *ids, *ends[1]], np.int32)


def read_tokenizer(metadata: Metadata) -> Tokenizer:
    """Read the tokenizer from `metadata`.

    Raises BadInput where its kind is not known or its lists differ in length, UsageError where the package
    `tokenizers` is not installed.
    """
    kind = metadata.get_str("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        what = "has no tokenizer" if kind is None else f"has a tokenizer of a kind that is not known: '{brief(kind)}'"
        raise BadInput(metadata.path, what, hint=_HINT)
    tokens = _tokens(metadata)
    types = metadata.get_list("tokenizer.ggml.token_type", [1] * len(tokens))
    assert types is not None
    if len(types) != len(tokens):
        what = "key 'tokenizer.ggml.token_type' has the wrong number of items"
        raise BadInput(metadata.path, what, got=len(types), limit=f"{len(tokens)} tokens")
    if kind == "gpt2":
        engine, adds_bos, default_bos = *_byte_pairs(metadata, tokens), 11
    else:
        engine, adds_bos, default_bos = _sentence_piece(metadata, tokens), True, 1
    special = [
        t for t, token_type in zip(tokens, types, strict=True) if token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    added = _library().AddedToken
    engine.add_special_tokens([added(t, normalized=False, special=True) for t in special if t])
    return Tokenizer(
        engine,
        _end(metadata, "bos", adds_bos, default_bos, len(tokens)),
        _end(metadata, "eos", False, 2 if kind == "llama" else 11, len(tokens)),
        _unknown(metadata, tokens) if kind == "llama" else None,
    )


def _tokens(metadata: Metadata) -> list[str]:
    """Return the vocabulary as text, the only form that `tokenizers` accepts."""
    tokens = metadata.get_list("tokenizer.ggml.tokens")
    if not tokens:
        raise BadInput(metadata.path, "has a tokenizer without tokens", hint=_HINT)
    for index, token in enumerate(tokens):
        if not isinstance(token, str) or not (token.isascii() or _is_utf8(token)):
            raise BadInput(metadata.path, f"has a token that is no UTF-8 text: number {index}", hint=_HINT)
    return tokens


def _is_utf8(text: str) -> bool:
    """Return whether all bytes were valid UTF-8; invalid ones are surrogates since the file was read."""
    return not any("\udc80" <= c <= "\udcff" for c in text)


def _library() -> Any:
    check_address_space()
    try:
        import tokenizers
    except ImportError as error:
        what = "reading text needs the package 'tokenizers': pip install 'requant[calibrate]'"
        raise UsageError(f"{what}, or {_HINT}") from error
    return tokenizers


def _end(metadata: Metadata, which: str, default: bool, default_id: int, n_tokens: int) -> int | None:
    """Return the id of BOS or EOS if texts get it, else None."""
    if not metadata.get_bool(f"tokenizer.ggml.add_{which}_token", default):
        return None
    found = metadata.get_int(f"tokenizer.ggml.{which}_token_id", default_id)
    assert found is not None
    if not 0 <= found < n_tokens:
        key = f"tokenizer.ggml.{which}_token_id"
        raise BadInput(metadata.path, f"key '{key}' is no token", got=found, limit=f"0 to {n_tokens - 1}")
    return found


def _unknown(metadata: Metadata, tokens: Sequence[str]) -> int | None:
    """Return the id of a `llama` vocabulary for text that it cannot spell, or None."""
    found = metadata.get_int("tokenizer.ggml.unknown_token_id", 0)
    return found if found is not None and 0 <= found < len(tokens) else None


def _byte_pairs(metadata: Metadata, tokens: Sequence[str]) -> tuple[Any, bool]:
    """Return the engine of a `gpt2` vocabulary, and whether its kind adds BOS."""
    library = _library()
    kind = metadata.get_str("tokenizer.ggml.pre", "default") or "default"
    pre_tokenizer = KINDS.get(kind)
    if pre_tokenizer is None:
        what = f"has a pre-tokenizer of a kind that is not known: '{brief(kind)}'"
        raise BadInput(metadata.path, what, hint=_HINT)
    vocabulary = {token: index for index, token in reversed(list(enumerate(tokens)))}
    merges = [_pair(metadata, m) for m in metadata.get_list("tokenizer.ggml.merges", []) or []]
    merges = [
        pair for pair in merges if pair[0] in vocabulary and pair[1] in vocabulary and "".join(pair) in vocabulary
    ]
    engine = library.Tokenizer(library.models.BPE(vocabulary, merges, ignore_merges=pre_tokenizer.ignore_merges))
    split, pattern = library.pre_tokenizers.Split, library.Regex
    steps = [split(pattern(p), "isolated") for p in pre_tokenizer.patterns]
    as_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = library.pre_tokenizers.Sequence([*steps, as_bytes])
    return engine, pre_tokenizer.adds_bos


def _pair(metadata: Metadata, merge: object) -> tuple[str, str]:
    """Return the halves of a merge, separated by the first space that is not the first character."""
    at = merge.find(" ", 1) if isinstance(merge, str) else -1
    if not isinstance(merge, str) or at < 0:
        raise BadInput(metadata.path, "key 'tokenizer.ggml.merges' holds no pair", got=brief(f"{merge!r:.40}"))
    return merge[:at], merge[at + 1 :]


def _sentence_piece(metadata: Metadata, tokens: Sequence[str]) -> Any:
    library = _library()
    scores = metadata.get_list("tokenizer.ggml.scores", [0.0] * len(tokens)) or []
    if len(scores) != len(tokens):
        what = "key 'tokenizer.ggml.scores' has the wrong number of items"
        raise BadInput(metadata.path, what, got=len(scores), limit=f"{len(tokens)} tokens")
    if not all(isinstance(score, int | float) for score in scores):
        raise BadInput(metadata.path, "key 'tokenizer.ggml.scores' must hold numbers")
    if sum(len(token) ** 2 for token in tokens) > _MAX_SPLITTING:
        raise BadInput(metadata.path, "has tokens that are too long to be split in every way", hint=_HINT)
    vocabulary = {token: index for index, token in reversed(list(enumerate(tokens)))}
    best_first = sorted(vocabulary, key=lambda token: -scores[vocabulary[token]])
    merges = [
        (token[:at], token[at:])
        for token in best_first
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    unknown = _unknown(metadata, tokens)
    word = None if unknown is None else tokens[unknown]
    model = library.models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=False, unk_token=word)
    engine = library.Tokenizer(model)
    replace = library.normalizers.Replace(" ", _SPACE)
    if metadata.get_bool("tokenizer.ggml.add_space_prefix", True):
        engine.normalizer = library.normalizers.Sequence([library.normalizers.Prepend(_SPACE), replace])
    else:
        engine.normalizer = replace
    return engine

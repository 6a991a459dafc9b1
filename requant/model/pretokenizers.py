"""Pre-tokenizers by `tokenizer.ggml.pre`: they split text into words before byte pairs are merged.

Each kind is a sequence of regular expressions: each splits the pieces of the one before it into its matches and the
text between them. Source: llm_tokenizer_bpe and the table of tokenizer_pre in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """The patterns of one kind.

    ignore_merges: a word that is a token is not split, whatever the merges; adds_bos: the default where the file has
    no such key.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False


_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k_pattern(numbers: str, letters: str = r"\p{L}", others: str = r"\p{L}\p{N}") -> str:
    """Return a cl100k pattern: a run of letters may take one character before it, punctuation the line ends after."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{numbers}| ?[^\s{others}]+[\r\n]*|{_SPACES}"


def _o200k_pattern(numbers: str, suffix: str = "") -> str:
    """Return an o200k pattern: a run of letters ends before a capital that follows a small letter."""
    upper, lower = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{before}{upper}*{lower}+{suffix}|{before}{upper}+{lower}*{suffix}"
        rf"|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"""|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)

_LLAMA3 = _cl100k_pattern(r"\p{N}{1,3}")
_QWEN2 = _cl100k_pattern(r"\p{N}")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

_KINDS = {
    "default": PreTokenizer(_DEFAULT),
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais exaone4 "
    "trillion granite-docling": PreTokenizer((_GPT2,)),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}", _GPT2)),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer((_LLAMA3,), True, True),
    "dbrx smaug-bpe chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "glm4 glm5": PreTokenizer((_LLAMA3,), True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_cl100k_pattern(r"\p{N}", letters=r"\p{L}\p{M}", others=r"\p{L}\p{M}\p{N}"),)),
    "deepseek-coder": PreTokenizer(
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "tekken": PreTokenizer((_o200k_pattern(r"\p{N}"),), True, True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": PreTokenizer((_o200k_pattern(r"\p{N}{1,3}", _CONTRACTIONS + "?"),)),
}
KINDS = {name: kind for names, kind in _KINDS.items() for name in names.split()}

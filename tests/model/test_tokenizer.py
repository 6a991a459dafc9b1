"""Token ids against llama.cpp: its own figures, and the engine itself for every kind of pre-tokenizer."""

import json
import struct
from dataclasses import replace

import engine
import pytest
import real_models
from forward import families
from gguf_files import ARR, BOOL, F32, I32, STR, U32, File, pair, string

from requant.container.source import open_source
from requant.errors import BadInput
from requant.model import pretokenizers
from requant.model.tokenizer import read_tokenizer

GOLDEN = json.loads((real_models.FIXTURES / "tokens_golden.json").read_text(encoding="utf-8"))["models"]
MODELS = {
    "tiny-llama": lambda: real_models.TINY,
    "smollm2-135m": real_models.smollm2,
    "gemma3-270m": real_models.gemma3,
}


@pytest.fixture(scope="module", params=MODELS)
def golden(request):
    with open_source(MODELS[request.param]()) as source:
        yield read_tokenizer(source.metadata), GOLDEN[request.param]


def test_the_ids_are_those_of_llama_tokenize(golden):
    tokenizer, expected = golden
    for entry in expected:
        text = entry["text"].replace("\\n", "\n").replace("\\t", "\t")  # which llama-tokenize does to its argument
        assert tokenizer.encode(text).tolist() == entry["ids"], entry["text"]


def vocabulary(*pairs, model="gpt2", tokens=("a", "b", "ab", "<s>"), types=(1, 1, 1, 3)):
    keys = [
        pair("tokenizer.ggml.model", STR, model),
        pair("tokenizer.ggml.tokens", ARR, (STR, list(tokens))),
        pair("tokenizer.ggml.token_type", ARR, (I32, list(types))),
    ]
    return File().with_pairs(*keys, *pairs)


def tokenizer_of(tmp_path, file):
    with open_source(file.write(tmp_path / "model.gguf")) as source:
        return read_tokenizer(source.metadata)


def test_bos_and_eos_are_added_where_the_file_says_so(tmp_path):
    ends = [pair("tokenizer.ggml.bos_token_id", U32, 3), pair("tokenizer.ggml.eos_token_id", U32, 2)]
    plain = tokenizer_of(tmp_path, vocabulary(*ends))
    assert (plain.bos, plain.eos, plain.encode("ab").tolist()) == (None, None, [0, 1])
    wanted = [pair("tokenizer.ggml.add_bos_token", BOOL, 1), pair("tokenizer.ggml.add_eos_token", BOOL, 1)]
    assert tokenizer_of(tmp_path, vocabulary(*ends, *wanted)).encode("ab").tolist() == [3, 0, 1, 2]
    by_kind = [*ends, pair("tokenizer.ggml.pre", STR, "llama-bpe")]
    assert tokenizer_of(tmp_path, vocabulary(*by_kind)).encode("b").tolist() == [3, 1]


def test_a_word_that_is_a_token_needs_no_merge_where_the_kind_ignores_them(tmp_path):
    ignoring = vocabulary(pair("tokenizer.ggml.pre", STR, "llama-bpe"), pair("tokenizer.ggml.add_bos_token", BOOL, 0))
    assert tokenizer_of(tmp_path, ignoring).encode("ab").tolist() == [2]
    assert tokenizer_of(tmp_path, vocabulary(pair("tokenizer.ggml.merges", ARR, (STR, ["a b"])))).encode("ab") == [2]


def test_sentence_pieces_merge_by_score_and_fall_back_to_bytes(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "\u2581", "a", "b", "ab", "\u2581a"]
    types = [2, 3, 3, 6, 6, 1, 1, 1, 1, 1]
    scores = pair("tokenizer.ggml.scores", ARR, (F32, [0.0] * 5 + [-9.0, -8.0, -7.0, -1.0, -2.0]))
    file = vocabulary(scores, model="llama", tokens=tokens, types=types)
    assert tokenizer_of(tmp_path, file).encode("ab\u00e9").tolist() == [1, 5, 8, 3, 4]
    without = file.with_pairs(pair("tokenizer.ggml.add_space_prefix", BOOL, 0))
    assert tokenizer_of(tmp_path, without).encode("ab a").tolist() == [1, 8, 9]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (File(), "has no tokenizer"),
        (vocabulary(model="bert"), "a kind that is not known: 'bert'"),
        (vocabulary(pair("tokenizer.ggml.pre", STR, "klingon")), "a kind that is not known: 'klingon'"),
        (vocabulary(types=(1,)), "wrong number of items"),
        (vocabulary(pair("tokenizer.ggml.merges", ARR, (STR, ["ab"]))), "holds no pair"),
        (
            vocabulary(pair("tokenizer.ggml.add_bos_token", BOOL, 1), pair("tokenizer.ggml.bos_token_id", U32, 9)),
            "bos_token_id' is no token",
        ),
    ],
)
def test_a_bad_vocabulary_is_refused_with_the_reason(tmp_path, file, reason):
    with pytest.raises(BadInput, match=reason):
        tokenizer_of(tmp_path, file)


TEXTS = [e["text"] for e in GOLDEN["tiny-llama"] if e["text"].strip()] + [
    "It's WE'LL don't I'D 12345 3.14 x=y**2;\n\n\tif (a<b) {return;}  // ok\r\n",
    "HelloWorld camelCaseWORDS e\u0301tude \u00c9COLE \u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093",
]


@pytest.mark.parametrize("kind", sorted(pretokenizers.KINDS))
def test_words_are_split_as_llama_cpp_splits_them(tmp_path, kind):
    with open_source(real_models.TINY) as source:
        values = source.metadata.values
        raw = {key: values[key] for key in values if key.startswith("tokenizer.")}
        n_tokens = values["tokenizer.ggml.tokens"].array_length
    pairs = [string(key) + struct.pack("<I", v.type_id) + v.raw for key, v in raw.items() if not key.endswith(".pre")]
    pairs += [pair("tokenizer.ggml.pre", STR, kind)]
    path = families.write("llama", tmp_path / "model.gguf", vocabulary=tuple(pairs), n_tokens=n_tokens)
    with open_source(path) as source:
        tokenizer = replace(read_tokenizer(source.metadata), bos=None)
        ours = [tokenizer.encode(text).tolist() for text in TEXTS]
    assert ours == engine.tokens(path, *TEXTS)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [[b"\xff\xfe", "b"], ["\ud7ff", b"\xed\xa0\x80"]], ids=["bytes", "surrogate"])
def test_tokens_that_are_no_text_are_refused(tmp_path, kind, tokens):
    file = File().with_pairs(pair("tokenizer.ggml.model", STR, kind), pair("tokenizer.ggml.tokens", ARR, (STR, tokens)))
    with pytest.raises(BadInput, match="has a token that is no UTF-8 text"):
        tokenizer_of(tmp_path, file)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokens_and_scores_of_another_type_are_refused(tmp_path, kind):
    model, numbers = pair("tokenizer.ggml.model", STR, kind), pair("tokenizer.ggml.tokens", ARR, (U32, [1, 2]))
    with pytest.raises(BadInput, match="has a token that is no UTF-8 text: number 0"):
        tokenizer_of(tmp_path, File().with_pairs(model, numbers))
    scores = pair("tokenizer.ggml.scores", ARR, (STR, list("abcd")))
    if kind == "llama":
        with pytest.raises(BadInput, match="must hold numbers"):
            tokenizer_of(tmp_path, vocabulary(scores, model=kind))


def test_a_token_of_a_megabyte_is_not_split_in_every_way(tmp_path):
    with pytest.raises(BadInput, match="too long to be split"):
        tokenizer_of(tmp_path, vocabulary(model="llama", tokens=("a", "b", "x" * 2**20, "<s>")))

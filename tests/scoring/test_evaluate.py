"""Perplexity and divergence: against llama-perplexity's own figures, and against their definitions."""

import json

import ggml
import numpy as np
import pytest
import real_models
from model.forward import families

from requant.container.imatrix import importance_for, read_imatrix
from requant.container.source import open_source
from requant.errors import BadInput, NumericFault
from requant.formats import by_name
from requant.model.forward.passes import forward, log_probabilities, read_head, read_model
from requant.model.forward.tape import Node
from requant.model.forward.weights import Weights
from requant.model.hyperparameters import read_hyperparameters
from requant.model.mixtures import mixture_types
from requant.scoring.calibration_data import WindowSpec, read_text_windows
from requant.scoring.evaluate import evaluate, judge, summary

GOLDEN = json.loads((real_models.FIXTURES / "perplexity_golden.json").read_text())
EVAL = real_models.FIXTURES / "eval.txt"
PPL = {entry["file"].split(" ")[0].rpartition("/")[2]: entry["ppl"] for entry in GOLDEN["entries"]}


@pytest.fixture(scope="module")
def tiny():
    """The fixture, its scored windows, and head and stream of its F16 weights."""
    with open_source(real_models.TINY) as source:
        tokens = read_text_windows(EVAL, source, WindowSpec()).windows[:45]
        base = read_model(Weights(source))
        yield source, tokens, (read_head(base), forward(base, tokens))


def test_perplexity_is_that_of_llama_perplexity(tiny):
    _, tokens, (head, stream) = tiny
    found = summary(judge(head, stream, tokens), tokens)
    assert (found.n_windows, found.n_scored) == (45, 45 * 255)
    assert found.ppl == pytest.approx(PPL["tiny-llama-f16.gguf"], rel=1e-4)
    assert found.ppl_error == pytest.approx(1.279, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "golden", "windows"),
    [
        (real_models.smollm2, PPL["SmolLM2-135M-Instruct.Q4_1.gguf"], 16),
        (real_models.gemma3, PPL["gemma-3-270m-q4_k_m.gguf"], 8),
    ],
    ids=["smollm2", "gemma3"],
)
def test_perplexity_of_real_models_is_that_of_llama_perplexity(path, golden, windows):
    with open_source(path()) as source:
        tokens = read_text_windows(EVAL, source, WindowSpec()).windows[:windows]
        assert evaluate(read_model(Weights(source)), tokens).ppl == pytest.approx(golden, rel=0.005)


@pytest.mark.parametrize("mixture", ["Q4_K_M", *(pytest.param(x, marks=pytest.mark.slow) for x in ("IQ3_S", "Q2_K"))])
def test_the_divergence_of_a_mixture_is_that_of_llama_perplexity(tiny, mixture):
    source, tokens, reference = tiny
    golden = next(e for e in GOLDEN["entries"] if e.get("quantized_by", "").endswith(f" {mixture}"))
    imatrix = read_imatrix(real_models.IMATRIX)
    hp = read_hyperparameters(source.metadata, source.tensors)
    types = mixture_types(mixture, source.tensors, hp, has_imatrix=True)

    def as_llama_quantize_does(tensor, x):
        if tensor.name not in types:
            return x
        fmt, importance = by_name(types[tensor.name]), importance_for(imatrix, tensor.name, tensor.shape)
        data = ggml.quantize_chunk(fmt.type_id, x, None if importance is None else importance[0])
        return ggml.decode(fmt.type_id, data).reshape(x.shape)

    model = read_model(Weights(source, as_llama_quantize_does))
    found = summary(judge(read_head(model), forward(model, tokens), tokens, reference), tokens)
    # llama.cpp rounds activations to 8 bits in front of quantized matrices, which adds to its figure
    assert golden["mean_kld"] - 0.0006 <= found.mean_kld <= 1.03 * golden["mean_kld"]
    assert found.ppl == pytest.approx(golden["ppl"], rel=0.005)
    assert found.base_ppl == pytest.approx(PPL["tiny-llama-f16.gguf"], rel=1e-4)
    assert found.p99_kld == pytest.approx(golden["p99_kld"], rel=0.03, abs=0.0012)
    assert 100 * found.same_top == pytest.approx(golden["same_top_percent"], abs=0.4)


def test_the_figures_are_what_their_definitions_say(tmp_path):
    paths = [families.write("qwen3", tmp_path / f"{seed}.gguf", seed) for seed in (1, 2)]
    tokens = np.random.default_rng(0).integers(0, 257, (3, 16), np.int32)
    with open_source(paths[0]) as one, open_source(paths[1]) as other:
        models = [read_model(Weights(s)) for s in (one, other)]
        found = evaluate(models[0], tokens, base=models[1])
        q, p = (scored(model, tokens) for model in models)
    targets = tokens[:, 9:].reshape(-1)
    kld = (np.exp(p) * (p - q)).sum(axis=1)
    assert found.n_scored == len(targets) == 21
    assert found.ppl == pytest.approx(np.exp(-q[np.arange(21), targets].mean()), rel=1e-5)
    assert found.base_ppl == pytest.approx(np.exp(-p[np.arange(21), targets].mean()), rel=1e-5)
    assert found.mean_kld == pytest.approx(kld.mean(), rel=1e-4)
    assert found.kld_error == pytest.approx(kld.std(ddof=1) / np.sqrt(21), rel=1e-4)
    assert found.p99_kld == pytest.approx(np.quantile(kld, 0.99), rel=1e-4)
    assert found.same_top == pytest.approx((p.argmax(axis=1) == q.argmax(axis=1)).mean())


def scored(model, tokens):
    x = forward(model, tokens)[:, 8:-1]
    head = read_head(model)
    logits = head.logits(head.normalize(Node(x.reshape(-1, x.shape[-1]))).value)[0].astype(np.float64)
    return log_probabilities(logits)[0]


def test_a_model_is_no_way_from_itself(tmp_path):
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    with open_source(families.write("gemma3", tmp_path / "model.gguf")) as source:
        model = read_model(Weights(source))
        found = evaluate(model, tokens, base=model)
    assert (found.mean_kld, found.p999_kld, found.same_top) == (0, 0, 1)


def test_a_base_of_another_vocabulary_is_refused(tmp_path):
    tokens = np.zeros((1, 16), np.int32)
    with (
        open_source(families.write("llama", tmp_path / "a.gguf")) as one,
        open_source(families.write("llama", tmp_path / "b.gguf", vocabulary=(), n_tokens=260)) as other,
        pytest.raises(BadInput, match="another vocabulary"),
    ):
        evaluate(read_model(Weights(one)), tokens, base=read_model(Weights(other)))


def test_activations_that_overflow_name_their_layer(tmp_path):
    with open_source(families.write("qwen3", tmp_path / "model.gguf")) as source:

        def grown(tensor, x):
            return x * np.float32(1e38) if tensor.name == "blk.1.ffn_down.weight" else x

        with pytest.raises(NumericFault, match="behind layer 1 "):
            evaluate(read_model(Weights(source, grown)), np.zeros((1, 16), np.int32))

"""Every architecture: its logits against the real llama.cpp's, its gradients against finite differences."""

from dataclasses import replace

import engine_logits
import numpy as np
import pytest
from model.forward.architectures import MAKERS

from requant.container.source import open_source
from requant.errors import BadInput
from requant.model.forward.architecture import NotRun
from requant.model.forward.decoder import run_layer
from requant.model.forward.families import FAMILIES
from requant.model.forward.layer import NullHook
from requant.model.forward.passes import (
    check_tokens,
    forward,
    layers,
    log_probabilities,
    read_head,
    read_model,
    side_inputs,
)
from requant.model.forward.tape import Node, Tape
from requant.model.forward.weights import Weights

N_TOKENS = 100  # more than a sliding window, an original context and a chunk
TOLERANCE = {"gemma4": 5e-2}  # whose GELU is a table of 16 bits in the engine
OLD = ("llama", "qwen2", "qwen3", "qwen3moe", "phi3", "gemma", "gemma2", "gemma3")  # in families.py


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    return {name: make(1).write(folder / f"{name}.gguf") for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    tokens = np.random.default_rng(0).integers(0, 256, N_TOKENS, np.int32)
    found = engine_logits.log_probabilities(list(models.values()), tokens, folder)
    return tokens, {name: found[path] for name, path in models.items()}


def own_log_probabilities(path, tokens, dtype=np.float64):
    with open_source(path) as source:
        model = read_model(Weights(source, dtype=dtype))
        x = forward(model, tokens[None])
        head = read_head(model)
        return log_probabilities(head.logits(head.normalize(Node(x[0])).value)[0])[0]


def test_every_architecture_is_tried():
    assert {make(0).arch for make in MAKERS.values()} | set(OLD) == set(FAMILIES)


@pytest.mark.parametrize("name", MAKERS)
def test_every_position_is_as_likely_as_llama_cpp_finds_it(models, expected, name):
    tokens, likely = expected
    ours = own_log_probabilities(models[name], tokens)
    np.testing.assert_allclose(ours, likely[name], atol=TOLERANCE.get(MAKERS[name](0).arch, 1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_other_weights_agree_too(tmp_path, seed):
    paths = {name: make(seed).write(tmp_path / f"{name}.gguf") for name, make in MAKERS.items()}
    tokens = np.random.default_rng(seed).integers(0, 256, N_TOKENS, np.int32)
    likely = engine_logits.log_probabilities(list(paths.values()), tokens, tmp_path)
    for name, path in paths.items():
        tolerance = TOLERANCE.get(MAKERS[name](0).arch, 1e-4)
        for dtype, factor in ((np.float64, 1), (np.float32, 3)):
            ours = own_log_probabilities(path, tokens, dtype)
            np.testing.assert_allclose(ours, likely[path], atol=tolerance * factor, err_msg=name)


class Products(NullHook):
    """A hook that computes the gradient of every matrix."""

    def __init__(self):
        self.found = {}

    def gradients(self, name, expert, x, g):
        self.found[name, expert] = g.T @ x


@pytest.mark.parametrize("name", MAKERS)
def test_every_matrix_of_each_kind_of_layer_has_the_gradient_of_finite_differences(models, name):
    rng = np.random.default_rng(5)
    with open_source(models[name]) as source:
        model = read_model(Weights(source, dtype=np.float64))
        tokens = rng.integers(0, 256, (1, 70), np.int32)
        side = side_inputs(model, tokens)
        seen = set()
        x = rng.standard_normal((70, model.architecture.hp.n_embd))
        for layer in layers(model, 70, range(model.architecture.n_layers)):
            own = None if side is None else side.window(0, side.layer_embedding(layer.index))
            kind = frozenset(layer.weights)
            forwarded = run_layer(replace(layer, side=own), Node(x))
            if side is not None:
                side.store(0, own)
            if kind not in seen:
                check_layer(layer, side, x, forwarded.value, rng)
            seen.add(kind)


def check_layer(layer, side, x, y, rng):
    """Compare the derivative of <y, g> along a random direction of each matrix, and of the stream, with differences."""
    g = rng.standard_normal(y.shape)

    def run(weights, stream, tape=None, hook=None):
        own = None if side is None else side.window(0, side.layer_embedding(layer.index), tape)
        return run_layer(replace(layer, weights=weights, side=own, hook=hook or layer.hook), Node(stream, tape))

    hook, tape = Products(), Tape()
    stream = tape.leaf(x)
    own = None if side is None else side.window(0, side.layer_embedding(layer.index), tape)
    tape.backward([(run_layer(replace(layer, side=own, hook=hook), stream), g)])
    found = [((name, expert), gradient) for (name, expert), gradient in hook.found.items()]
    for (name, expert), gradient in [*found, ((None, None), stream.grad)]:
        direction = rng.standard_normal(gradient.shape)
        values = []
        for step in (1e-6, -1e-6):
            weights, moved = dict(layer.weights), x
            if name is None:
                moved = x + step * direction
            else:
                weights[name] = weights[name].copy()
                part = weights[name] if expert is None else weights[name][expert]
                part += step * direction
            values.append((run(weights, moved).value * g).sum())
        assert (values[0] - values[1]) / 2e-6 == pytest.approx((gradient * direction).sum(), rel=1e-6, abs=1e-4), name


def test_a_tensor_that_the_row_does_not_know_is_named(tmp_path):
    model = MAKERS["qwen35"](1)
    model.add("attn_sinks.weight", 4)
    with open_source(model.write(tmp_path / "model.gguf")) as source, pytest.raises(NotRun, match="attn_sinks"):
        read_model(Weights(source))


@pytest.mark.parametrize("name", ["deepseek32", "glm-dsa"])
def test_windows_beyond_what_the_indexer_sees_of_all_are_refused(models, name):
    with open_source(models[name]) as source:
        model = read_model(Weights(source))
        check_tokens(model, np.zeros((1, 128), np.int32))
        with pytest.raises(BadInput, match="indexer") as caught:
            check_tokens(model, np.zeros((1, 129), np.int32))
    assert "--window 128" in str(caught.value)

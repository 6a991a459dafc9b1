"""The forward pass against the real llama.cpp, and the backward pass against finite differences, for every family."""

import engine
import families
import numpy as np
import pytest
from model.forward.architectures import MAKERS

from requant.container.source import open_source
from requant.model.forward.checkpoints import Checkpoints
from requant.model.forward.layer import NullHook
from requant.model.forward.passes import (
    EMBEDDING,
    Weights,
    backward,
    draw_tokens,
    embedding_gradient,
    forward,
    log_probabilities,
    read_head,
    read_model,
    scale_rows,
    side_inputs,
)
from requant.model.forward.tape import Node, Tape
from requant.model.tokenizer import read_tokenizer

TEXT = "Hello there, how are you? I am very well, thank you"


OLD = [name for name in families.FAMILIES if name != "unknown"]
NEW = ["gemma4-side", "muse-glimmer"]  # whose layers share arrays, whose embedding is normalised


@pytest.fixture(params=OLD + NEW)
def path(request, tmp_path):
    path = tmp_path / f"{request.param}.gguf"
    if request.param in NEW:
        return MAKERS[request.param](2).write(path)
    return families.write(request.param, path, seed=2)


def log_p(model, tokens):
    x = forward(model, tokens)
    head = read_head(model)
    return log_probabilities(head.logits(head.normalize(Node(x.reshape(-1, x.shape[-1]))).value)[0])[0]


def test_the_next_token_is_as_likely_as_llama_cpp_finds_it(path):
    with open_source(path) as source:
        tokens = read_tokenizer(source.metadata).encode(TEXT)
        ours = log_p(read_model(Weights(source)), tokens[None])[-1]
    (answer,) = engine.answers(path, TEXT, n_tokens=1, n_likely=100)
    found = np.array([ours[token] for token in answer.likely])
    # a key-value cache in 16 bits, and the engine's exponentials
    np.testing.assert_allclose(found, list(answer.likely.values()), atol=0.05 if "gemma4" in path.name else 0.02)


class Gradients(NullHook):
    """A hook that computes the gradient of each matrix."""

    def __init__(self):
        self.prefix, self.found = "", {}

    def gradients(self, name, expert, x, g):
        key = self.prefix + name, expert or 0
        self.found[key] = self.found.get(key, 0) + g.T @ x


def likelihood_gradients(model, tokens, labels):
    """Return the gradient of the log-likelihood of `labels`, one after each token, at every matrix."""
    hook = Gradients()
    side = side_inputs(model, tokens)
    with Checkpoints() as checkpoints:
        x = forward(model, tokens, checkpoints=checkpoints, side=side)
        head = read_head(model)
        for window, own in zip(x, labels, strict=True):
            tape = Tape()
            stream = tape.leaf(window)
            normed = head.normalize(stream)
            logits, back_cap = head.logits(normed.value)
            p = np.exp(log_probabilities(logits)[0])
            g = -p
            g[np.arange(len(own)), own] += 1
            hook.gradients(model.output_name, None, normed.value, back_cap(g))
            tape.backward([(normed, back_cap(g) @ head.matrix)])
            window[...] = stream.grad
        hook.prefix = f"blk.{model.architecture.n_layers - 1}."

        def on_layer(layer):
            hook.prefix = f"blk.{layer.index - 1}."

        backward(model, x, checkpoints, hook=lambda _: hook, on_layer=on_layer, threads=1, side=side)
    return hook.found, x


def test_every_gradient_is_that_of_finite_differences(path):
    rng = np.random.default_rng(3)
    with open_source(path) as source:
        tokens = rng.integers(0, len(families.TOKENS), (2, 20), np.int32)
        labels = rng.integers(0, len(families.TOKENS), (2, 20))
        model = read_model(Weights(source, dtype=np.float64))
        found, _ = likelihood_gradients(model, tokens, labels)
        matrices = {name for name, _ in found} | {EMBEDDING}
        for name in sorted(matrices):
            direction = rng.standard_normal(source.tensor(name).shape[::-1])
            expected = difference(source, (tokens, labels), name, direction)
            stacked = direction.reshape(-1, *direction.shape[-2:])
            got = sum((gradient * stacked[expert]).sum() for (own, expert), gradient in found.items() if own == name)
            if name == EMBEDDING:
                got += embedding_part(model, tokens, labels, direction)
            assert got == pytest.approx(expected, rel=2e-5, abs=1e-6), name


def embedding_part(model, tokens, labels, direction):
    """Return the part of the embedding's rows: the gradients at the tokens, times the direction's rows."""
    _, g = likelihood_gradients(model, tokens, labels)
    raw = model.weights.rows(EMBEDDING, tokens.reshape(-1)).reshape(*tokens.shape, -1)
    moved = [scale_rows(model, Node(raw + sign * 1e-6 * direction[tokens])).value for sign in (1, -1)]
    return float((g * (moved[0] - moved[1])).sum() / 2e-6)


def difference(source, texts, name, direction, step=1e-5):
    tokens, labels = texts

    def likelihood(sign):
        class Moved(Weights):
            def get(self, wanted):
                found = Weights.get(self, wanted)
                return found + sign * step * direction if wanted == name else found

            def rows(self, wanted, indices):
                found = Weights.rows(self, wanted, indices)
                return found + sign * step * direction[indices] if wanted == name else found

        p = log_p(read_model(Moved(source, dtype=np.float64)), tokens)
        return float(p[np.arange(labels.size), labels.reshape(-1)].sum())

    return (likelihood(1) - likelihood(-1)) / (2 * step)


def test_threads_change_nothing(path):
    with open_source(path) as source:
        model = read_model(Weights(source))
        tokens = np.random.default_rng(0).integers(0, 256, (3, 24), np.int32)
        np.testing.assert_array_equal(forward(model, tokens, threads=1), forward(model, tokens, threads=3))


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_squared_gradients_of_an_embedding_are_summed_within_a_window_first(name, tmp_path):
    with open_source(families.write(name, tmp_path / "model.gguf")) as source:
        model = read_model(Weights(source))
        tokens = np.array([[5, 7, 5], [7, 7, 9]], np.int32)
        g = np.random.default_rng(0).standard_normal((2, 3, model.architecture.hp.n_embd)).astype(np.float32)
        ids, squares = embedding_gradient(model, tokens, g)
        scaled = g * np.float32(model.architecture.embedding_scale)
        assert ids.tolist() == [5, 7, 9]
        expected = [
            (scaled[0, 0] + scaled[0, 2]) ** 2,
            scaled[0, 1] ** 2 + (scaled[1, 0] + scaled[1, 1]) ** 2,
            scaled[1, 2] ** 2,
        ]
        np.testing.assert_allclose(squares, expected, rtol=1e-5)


def test_labels_are_drawn_as_often_as_they_are_likely():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(1300, 0.05)).astype(np.float32)
    counts = np.bincount(draw_tokens(np.tile(p, (20000, 1)), rng), minlength=1300)
    likely = p > 0.002
    assert (counts[p == 0] == 0).all()
    deviation = (counts - 20000 * p)[likely] / np.sqrt(20000 * p[likely])
    assert np.abs(deviation).max() < 5

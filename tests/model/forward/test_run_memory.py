"""The memory that a run is said to take, against what its arrays take."""

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from model.forward.architectures import MAKERS

from requant.container.source import open_source
from requant.model.forward.decoder import run_layer
from requant.model.forward.memory import memory_needs
from requant.model.forward.passes import layers, read_model, side_inputs
from requant.model.forward.side_inputs import TABLE
from requant.model.forward.tape import Tape
from requant.model.forward.weights import Weights

N_TOKENS = 128
# a kind of layer each
NAMES = ("olmo2", "qwen35moe", "gemma4-experts", "gemma4-side", "gpt-oss", "deepseek2", "granitehybrid", "falcon-h1")


@pytest.fixture
def open_model(tmp_path):
    def make(name):
        return open_source(MAKERS[name](1).write(tmp_path / f"{name}.gguf"))

    return make


@pytest.mark.parametrize("name", [*NAMES, "lfm2", "kimi-linear"])
def test_the_activations_of_a_layer_fit_into_what_is_said(open_model, name):
    with open_model(name) as source:
        model = read_model(Weights(source))
        tokens = np.random.default_rng(0).integers(0, 256, (1, N_TOKENS), np.int32)
        side, most = side_inputs(model, tokens), 0
        x = np.random.default_rng(0).standard_normal((N_TOKENS, model.architecture.hp.n_embd)).astype(np.float32)
        for layer in layers(model, N_TOKENS, range(model.architecture.n_layers)):
            embedding = None if side is None else side.layer_embedding(layer.index)
            tracemalloc.start()
            tape = Tape()
            own = None if side is None else side.window(0, embedding, tape)
            tape.backward([(run_layer(replace(layer, side=own), tape.leaf(x)), x)])
            most = max(most, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            if side is not None:
                side.store(0, own)
        said = memory_needs(model, N_TOKENS, 1, True)[0] - memory_needs(model, N_TOKENS, 0, True)[0]
    assert most <= said <= 3 * most


def test_shared_arrays_add_to_each_window_and_tables_of_rows_to_nothing(open_model):
    with open_model("gemma4-side") as source:
        model = read_model(Weights(source))
        fixed, per_window = memory_needs(model, N_TOKENS, 1, True)
        without = replace(
            model, architecture=replace(model.architecture, hp=replace(model.architecture.hp, n_side=0), n_shared=0)
        )
        alone = memory_needs(without, N_TOKENS, 1, True)[1]
        kept = 2 * (16 + 16) + 1 * (32 + 32)  # keys and values of layers 2 and 3
        assert per_window - alone == 4 * N_TOKENS * (2 * 64 + 2 * (kept + 6 * 16))
        table = SimpleNamespace(name=TABLE, shape=(96, 2**30), n_rows=2**30, n_weights=96 * 2**30, n_bytes=192 * 2**30)
        larger = [table, *(t for t in source.tensors if t.name != TABLE)]
        larger = replace(model, weights=Weights(SimpleNamespace(tensors=larger)))
        assert memory_needs(larger, N_TOKENS, 1, True)[0] == fixed

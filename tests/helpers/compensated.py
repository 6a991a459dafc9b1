"""Compensated plans for small models, and texts of random tokens for them."""

from dataclasses import replace

import numpy as np
from conversions import choice, plan_of

from requant.conversion.compensation.token_weights import weigh_tokens
from requant.conversion.compensation.walk import CompensationText
from requant.formats import by_name
from requant.model.forward.passes import read_model
from requant.model.forward.weights import Weights
from requant.model.roles import never_quantize


def quantized(source, *types):
    """A compensated plan that gives the matrices of `source` the first of `types` that suits them."""
    choices = []
    for tensor in source.tensors:
        stays = never_quantize(
            source.metadata.get_str("general.architecture"), tensor.name, tensor.shape, tensor.type_id
        )
        fits = [name for name in types if by_name(name).divides(tensor.n_per_row) and stays is None]
        choices.append(choice(tensor, fits[0] if fits else tensor.format.name))
    return replace(plan_of(source, choices), compensation="fast")


def text_for(source, tokens, weights=None):
    model = read_model(Weights(source))
    return CompensationText("a text.txt", model, tokens, weights or weigh_tokens(model, tokens, threads=1))


def random_tokens(n, n_ctx, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, n_ctx), np.int32)

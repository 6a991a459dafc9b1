"""Compensated conversion: its algebra, its stages in every architecture, the same bytes whatever happens."""

from dataclasses import replace

import numpy as np
import pytest
from conversions import choice, convert, plan_of, verify
from model.forward.architectures import MAKERS

from requant.container.source import open_source
from requant.conversion.compensation import factors
from requant.conversion.compensation.moments import CHECK, split_windows
from requant.conversion.compensation.targets import choose_ridges, find_feedback
from requant.conversion.compensation.token_weights import weigh_tokens
from requant.conversion.compensation.walk import CompensationText
from requant.conversion.record import Conversion
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
    return CompensationText("a text", model, tokens, weights or weigh_tokens(model, tokens, threads=1))


def random_tokens(n, n_ctx, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, n_ctx), np.int32)


def moments(n, n_tokens, seed=0):
    x = np.random.default_rng(seed).standard_normal((n_tokens, n)).astype(np.float32)
    return (x * np.geomspace(1, 30, n, dtype=np.float32)).T @ x


@pytest.mark.parametrize("n", [1, 5, 256, 300, 700])
def test_a_factor_and_its_inverse_replace_the_matrix_in_place(n):
    h = np.cov(np.random.default_rng(n).standard_normal((n, 3 * n + 2))).reshape(n, n) + 0.1 * np.eye(n)
    lower, rows = h.copy(), np.random.default_rng(1).standard_normal((3, n))
    factors.factorize(lower)
    np.testing.assert_allclose(lower, np.linalg.cholesky(h), atol=1e-10)
    np.testing.assert_allclose(factors.solve_rows(lower, rows), rows @ np.linalg.inv(h), rtol=1e-8, atol=1e-8)
    inverse = lower.copy()
    factors.invert_triangle(inverse)
    np.testing.assert_allclose(inverse @ lower, np.eye(n), atol=1e-9)


def test_the_factor_of_the_feedback_is_that_of_the_inverse_of_the_damped_moments():
    x = np.random.default_rng(0).standard_normal((500, 300)).astype(np.float32)
    h = x.T @ x
    found = find_feedback(h)
    damped = h.astype(np.float64) + np.diag(0.01 * np.diag(h))
    assert not np.tril(found.factor, -1).any()
    np.testing.assert_allclose(found.factor.T @ found.factor, np.linalg.inv(damped), atol=1e-7)
    spread = found.importance * np.diag(found.factor).astype(np.float64) ** 2
    np.testing.assert_allclose(spread, spread[0], rtol=1e-3)


@pytest.mark.parametrize("h", [np.zeros((40, 40), np.float32), np.full((40, 40), np.nan, np.float32)])
def test_moments_of_inputs_that_are_never_used_or_not_finite_give_no_feedback(h):
    assert find_feedback(h) is None


@pytest.mark.parametrize("rank", [1, 7])
def test_singular_moments_still_give_a_finite_factor(rank):
    x = np.random.default_rng(0).standard_normal((rank, 40)).astype(np.float32)
    x[:, 3] = 0
    found = find_feedback(x.T @ x)
    assert np.isfinite(found.factor).all()
    assert (np.diag(found.factor) > 0).all()


def test_a_target_is_taken_only_where_it_holds_on_the_other_half():
    rng, n = np.random.default_rng(0), 40
    truth = rng.standard_normal((8, n)).astype(np.float32) * 0.1
    halves, real, noise = [], [], []
    for _ in range(2):
        y = rng.standard_normal((400, n)).astype(np.float32)
        halves.append(y.T @ y)
        real.append(truth @ halves[-1])
        noise.append(rng.standard_normal((8, 400)).astype(np.float32) @ y)
    ridges = choose_ridges(halves, [real, noise], 1)
    assert ridges[0] <= 0.1
    assert ridges[1] is None or ridges[1] >= 10


@pytest.mark.parametrize("n", [3, 4, 8, 9, 28, 32])
def test_windows_are_for_either_half_or_for_the_check(n):
    parts = split_windows(n)
    assert {0, 1, CHECK} == set(parts.tolist())
    assert abs((parts == 0).sum() - (parts == 1).sum()) <= 1 + n // 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compensated")


@pytest.mark.parametrize("name", MAKERS)
def test_every_architecture_is_compensated_and_errs_no_more_than_plain_rounding(folder, name):
    path = MAKERS[name](1).write(folder / f"{name}.gguf")
    out = folder / f"{name}-out.gguf"
    with open_source(path) as source:
        plan = quantized(source, "Q4_0")
        made = convert(source, plan, out, compensation=text_for(source, random_tokens(4, 40)), threads=2)
        assert verify(out, source=source).ok
    found = {t.name: t.compensation for t in made.tensors if t.compensation is not None}
    encoded = {c.name for c in plan.choices if not c.copied}
    assert encoded
    run = {n for n in encoded if n.startswith("blk.")}
    assert run & found.keys() or not run
    for compensation in found.values():
        assert compensation.error is None or compensation.error <= compensation.plain_error
    assert Conversion.from_json(made.to_json()) == replace(made, output=made.output.__class__(made.output.name))
    out.unlink()

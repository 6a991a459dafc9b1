"""The tape, and every primitive operation against finite differences in float64."""

import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.model.forward import ops
from requant.model.forward.recurrence import scan
from requant.model.forward.rope import Rope, rotation
from requant.model.forward.tape import Node, Tape, array_module

SIZES = st.integers(1, 5)


def away(x, *kinks):
    """Move items of x away from where a derivative jumps."""
    for kink in kinks:
        x = np.where(np.abs(x - kink) < 1e-3, kink + 1e-2, x)
    return x


def check(operation, *arrays, rng, rel=1e-6):
    """Compare the gradient of a random sum of the results, at every array, with differences along a direction."""
    tape = Tape()
    leaves = [tape.leaf(x) for x in arrays]
    out = operation(*leaves)
    g = rng.standard_normal(out.shape)
    tape.backward([(out, g)])
    for i, leaf in enumerate(leaves):
        direction = rng.standard_normal(arrays[i].shape)

        def moved(step, i=i, direction=direction):
            own = [Node(x + step * direction if j == i else x) for j, x in enumerate(arrays)]
            return (operation(*own).value * g).sum()

        expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
        assert (leaf.grad * direction).sum() == pytest.approx(expected, rel=rel, abs=1e-7)


ONE = {
    "rms_norm": lambda x, rng: ops.rms_norm(x, rng.uniform(0.5, 1.5, x.shape[-1]), 1e-3),
    "layer_norm": lambda x, rng: ops.layer_norm(x, rng.uniform(0.5, 1.5, x.shape[-1]), 1e-3),
    "l2_norm": lambda x, rng: ops.l2_norm(x, 1e-3),
    "exp": lambda x, rng: ops.exp(x),
    "sigmoid": lambda x, rng: ops.sigmoid(x),
    "softplus": lambda x, rng: ops.softplus(x),
    "silu": lambda x, rng: ops.silu(x),
    "gelu": lambda x, rng: ops.gelu(x),
    "relu_squared": lambda x, rng: ops.relu_squared(x),
    "clamp": lambda x, rng: ops.clamp(x, low=-0.5, high=0.5),
    "softmax": lambda x, rng: ops.softmax(x),
    "sum": lambda x, rng: x.sum(1),
    "reshape": lambda x, rng: x.reshape(-1),
    "swap": lambda x, rng: x.swap(0, 1),
    "item": lambda x, rng: x[:, 1:] * 2 + x[:, :-1],
    "rows": lambda x, rng: x[np.array([0])] + x,
    "scatter": lambda x, rng: ops.scatter(x, x, rows=[np.arange(len(x)) + 1, np.arange(len(x))[::-1]], n=len(x) + 2),
    "pick": lambda x, rng: ops.pick(x, np.argsort(x.value, axis=1)[:, :2]),
    "repeat_heads": lambda x, rng: ops.repeat_heads(x, 3, tiled=False) * ops.repeat_heads(x, 3, tiled=True),
    "arithmetic": lambda x, rng: (2 - x) * x / 3 + x - 1.0,
}


@pytest.mark.parametrize("name", ONE)
@settings(max_examples=10, deadline=None)
@given(n=SIZES, m=st.integers(2, 5), seed=st.integers(0, 2**32 - 1))
def test_an_operation_on_one_array_has_the_gradient_of_finite_differences(name, n, m, seed):
    x = away(np.random.default_rng(seed).standard_normal((n, m)), 0.0, 0.5, -0.5)
    check(lambda node: ONE[name](node, np.random.default_rng(seed)), x, rng=np.random.default_rng(1))


TWO = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / (b * b + 1),
    "swiglu_oai": ops.swiglu_oai,
    "concatenate": lambda a, b: ops.concatenate(a, b * 2, axis=0),
}


@pytest.mark.parametrize("name", TWO)
@settings(max_examples=10, deadline=None)
@given(n=SIZES, m=SIZES, seed=st.integers(0, 2**32 - 1))
def test_an_operation_on_two_arrays_has_the_gradient_of_finite_differences(name, n, m, seed):
    rng = np.random.default_rng(seed)
    a, b = away(rng.standard_normal((n, m)) * 5, 7.0), away(rng.standard_normal((n, m)) * 5, 7.0, -7.0)
    check(TWO[name], a, b, rng=rng)
    if name in {"add", "subtract", "multiply", "divide"}:  # a row is added to every row
        check(TWO[name], a, b[:1], rng=rng)
        check(TWO[name], a, rng.standard_normal((n, 1)), rng=rng)


@settings(max_examples=10, deadline=None)
@given(n=SIZES, m=SIZES, k=SIZES, seed=st.integers(0, 2**32 - 1))
def test_products_have_the_gradients_of_finite_differences(n, m, k, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, n, m)), rng.standard_normal((2, m, k))
    check(lambda a, b: a @ b, a, b, rng=rng)
    check(lambda b: a[0] @ b, b[0], rng=rng)
    seen = []
    check(lambda x: ops.linear(x, a[0], None, lambda x, g: seen.append(g.T @ x)), rng.standard_normal((k, m)), rng=rng)
    assert seen[0].shape == a[0].shape


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 9), m=SIZES, seed=st.integers(0, 2**32 - 1))
def test_a_triangular_system_is_solved_with_its_gradient(n, m, seed):
    rng = np.random.default_rng(seed)
    a, b = np.tril(rng.standard_normal((2, n, n)), -1) + np.eye(n), rng.standard_normal((2, n, m))
    x = ops.solve_unit_lower(Node(a), Node(b)).value
    np.testing.assert_allclose(a @ x, b, atol=1e-9)
    check(lambda low, b: ops.solve_unit_lower(low * np.tril(np.ones((n, n)), -1) + np.eye(n), b), a, b, rng=rng)


@pytest.mark.parametrize(("window", "cap", "sinks"), [(0, 0.0, False), (3, 0.0, True), (0, 2.0, False), (2, 1.5, True)])
def test_attention_has_the_gradients_of_finite_differences(window, cap, sinks):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((7, 4, 3)), rng.standard_normal((7, 2, 3)), rng.standard_normal((7, 2, 5))
    extra = rng.standard_normal(4) if sinks else None
    check(lambda q, k, v: ops.attention(q, k, v, scale=0.7, cap=cap, window=window, sinks=extra), q, k, v, rng=rng)


def test_rotations_and_convolutions_have_the_gradients_of_finite_differences():
    rng = np.random.default_rng(0)
    for halves in (False, True):
        turn = rotation(Rope(4, halves, 100.0), 5, None, np.float64)
        check(turn.apply, rng.standard_normal((5, 2, 6)), rng=rng)
    kernel, bias = rng.standard_normal((3, 4)), rng.standard_normal(3)
    check(lambda x: ops.causal_convolution(x, kernel, bias), rng.standard_normal((6, 3)), rng=rng)


def sequential(q, k, v, log_decay, beta):
    """The recurrence, token by token."""
    state, out = np.zeros((len(q), q.shape[2], v.shape[2])), np.empty_like(v)
    for t in range(q.shape[1]):
        state = state * np.exp(log_decay[:, t])[:, :, None]
        written = v[:, t]
        if beta is not None:
            written = beta[:, t] * (written - np.einsum("hij,hi->hj", state, k[:, t]))
        state = state + k[:, t][:, :, None] * written[:, None]
        out[:, t] = np.einsum("hij,hi->hj", state, q[:, t])
    return out


@pytest.mark.parametrize("rates", [1, 3])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_a_recurrence_in_chunks_is_the_sequential_one_and_has_its_gradients(rates, delta, chunk):
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, 13, 3)) * 0.5 for _ in range(2))
    v, log_decay = rng.standard_normal((2, 13, 4)), -rng.exponential(2.0, (2, 13, rates))
    beta = rng.uniform(0.1, 0.9, (2, 13, 1)) if delta else None

    def run(q, k, v, log_decay, *more):
        return scan(q, k, v, log_decay, beta=more[0] if more else None, chunk=chunk)

    inputs = (q, k, v, log_decay, *([beta] if delta else []))
    decay = np.broadcast_to(log_decay, (2, 13, 3))
    np.testing.assert_allclose(run(*map(Node, inputs)).value, sequential(q, k, v, decay, beta), atol=1e-12)
    check(run, *inputs, rng=rng)


def test_strong_decays_overflow_nowhere():
    ones = np.ones((1, 200, 2), np.float32)
    for rates in (1, 2):
        decay = np.full((1, 200, rates), -90.0, np.float32)
        with np.errstate(over="raise", invalid="raise"):
            found = scan(Node(ones), Node(ones), Node(ones), Node(decay), beta=Node(ones[..., :1])).value
        np.testing.assert_allclose(found, 2.0)


def test_nothing_is_kept_without_a_tape():
    x = Node(np.ones((2, 2)))
    assert (x * 2 + x).tape is None and ops.silu(x).tape is None


def test_gradients_that_meet_are_added_in_one_order_and_change_no_other():
    tape = Tape()
    x = tape.leaf(np.ones(3))
    y, g = x + x * 2 + x[:2].sum(0), np.arange(3.0)
    tape.backward([(y, g)])
    assert x.grad.tolist() == [3 * 0 + 3.0, 3 * 1 + 3.0, 3 * 2] and g.tolist() == [0, 1, 2]


def test_the_module_of_an_array_is_asked_of_the_array():
    other = types.ModuleType("other_arrays")
    sys.modules["other_arrays"] = other
    try:
        kind = type("ndarray", (np.ndarray,), {"__module__": "other_arrays"})
        assert array_module(np.ones(1).view(kind)) is other
    finally:
        del sys.modules["other_arrays"]
    assert array_module(np.ones(1)) is np

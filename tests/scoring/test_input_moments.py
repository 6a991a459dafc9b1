"""Inputs' mean squares: the imatrix's, else gamma^2 of the norm in front, else 1; and what a sandwich norm does."""

import numpy as np
import pytest
from conversions import half, normal, single, small_model
from gguf_files import Tensor

from requant.container.imatrix import Entry, Imatrix
from requant.container.source import open_source
from requant.scoring.input_moments import read_moments, residual_energy
from requant.scoring.layerwise import score
from requant.scoring.options import ScoringOptions

N, ROWS = 256, 8


def gammas(*names):
    """A norm of different weights for each of `names`."""
    return [single(f"{name}.weight", (N,), np.full(N, 1.5 + i) + normal((N,), i)[0]) for i, name in enumerate(names)]


def matrix(name, n_per_row=N, scale=0.02, seed=0):
    return half(f"{name}.weight", (n_per_row, ROWS), normal((n_per_row, ROWS), seed, scale), seed)


def opened(tmp_path, *tensors):
    return open_source(small_model(*tensors).write(tmp_path / "model.gguf"))


def inputs(tmp_path, name, *tensors, imatrix=None):
    with opened(tmp_path, *tensors) as source:
        return read_moments(source, source.tensor(f"{name}.weight"), imatrix)


def of_norm(tmp_path, norm, *tensors):
    with opened(tmp_path, *tensors) as source:
        return source.read_rows(source.tensor(norm)).view(np.float32) ** 2


def imatrix_of(name, values):
    values = np.asarray(values, np.float32)
    return Imatrix(
        "imatrix.gguf", "0" * 64, {name: Entry(values, np.ones(len(values), np.float32))}, (), 1, legacy=False
    )


@pytest.mark.parametrize("role", ["attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate", "ssm_in"])
def test_attention_reads_the_attention_norm(tmp_path, role):
    tensors = (*gammas("blk.0.attn_norm", "blk.0.ffn_norm", "blk.1.attn_norm"), matrix(f"blk.1.{role}"))
    found = inputs(tmp_path, f"blk.1.{role}", *tensors)
    assert found.origin == "norm" and found.moments.shape == (1, N)
    assert np.array_equal(found.moments, of_norm(tmp_path, "blk.1.attn_norm.weight", *tensors))


@pytest.mark.parametrize("role", ["ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_gate_up_exps", "ffn_up_shexp"])
@pytest.mark.parametrize(
    ("norms", "read"),
    [
        (("attn_norm", "ffn_norm"), "ffn_norm"),
        (("attn_norm", "post_attention_norm", "ffn_norm"), "ffn_norm"),  # sandwich norms
        (("attn_norm", "post_attention_norm"), "post_attention_norm"),  # the feed-forward's under another name
        (("attn_norm", "attn_post_norm"), "attn_post_norm"),
        (("attn_norm",), "attn_norm"),  # attention and feed-forward side by side
    ],
    ids=str,
)
def test_the_feed_forward_reads_the_norm_in_front_of_it(tmp_path, role, norms, read):
    tensors = (*gammas(*(f"blk.0.{norm}" for norm in norms)), matrix(f"blk.0.{role}"))
    found = inputs(tmp_path, f"blk.0.{role}", *tensors)
    assert found.origin == "norm"
    assert np.array_equal(found.moments, of_norm(tmp_path, f"blk.0.{read}.weight", *tensors))


def test_the_logits_read_the_output_norm(tmp_path, name="output"):
    norm = single("output_norm.weight", (N,), np.arange(N))
    file = small_model(matrix(name))
    file = file.__class__(file.pairs, (norm, *file.tensors[1:]))
    with open_source(file.write(tmp_path / "model.gguf")) as source:
        found = read_moments(source, source.tensor(f"{name}.weight"), None)
    assert found.origin == "norm"
    assert np.array_equal(found.moments[0], np.arange(N, dtype=np.float32) ** 2)


@pytest.mark.parametrize("role", ["attn_output", "ffn_down", "ffn_down_exps", "ssm_out"])
def test_what_is_behind_no_norm_sees_inputs_of_mean_square_one(tmp_path, role):
    tensors = (*gammas("blk.0.attn_norm", "blk.0.ffn_norm", "blk.0.post_ffw_norm"), matrix(f"blk.0.{role}"))
    found = inputs(tmp_path, f"blk.0.{role}", *tensors)
    assert found.origin == "flat" and np.array_equal(found.moments, np.ones((1, N), np.float32))


def test_a_norm_of_another_width_is_not_the_one(tmp_path):
    tensors = (*gammas("blk.0.attn_norm"), matrix("blk.0.attn_q", 2 * N))
    found = inputs(tmp_path, "blk.0.attn_q", *tensors)
    assert found.origin == "flat" and found.moments.shape == (1, 2 * N)


def test_a_norm_in_half_precision_is_read_too(tmp_path):
    norm = Tensor("blk.0.attn_norm.weight", (N,), 1, data=np.full(N, 3, "<f2").tobytes())
    found = inputs(tmp_path, "blk.0.attn_q", norm, matrix("blk.0.attn_q"))
    assert (found.origin, set(found.moments.flat)) == ("norm", {9.0})


def test_the_imatrix_comes_first(tmp_path):
    values = np.random.default_rng(0).gamma(1.0, 1.0, (1, N))
    measured = imatrix_of("blk.0.attn_q.weight", values)
    tensors = (*gammas("blk.0.attn_norm"), matrix("blk.0.attn_q"), matrix("blk.0.attn_k"))
    found = inputs(tmp_path, "blk.0.attn_q", *tensors, imatrix=measured)
    assert found.origin == "imatrix" and np.array_equal(found.moments, values.astype(np.float32))
    assert inputs(tmp_path, "blk.0.attn_k", *tensors, imatrix=measured).origin == "norm"


def test_an_imatrix_of_zeros_is_passed_over(tmp_path):
    measured = imatrix_of("blk.0.attn_q.weight", np.zeros((1, N)))
    tensors = (*gammas("blk.0.attn_norm"), matrix("blk.0.attn_q"))
    assert inputs(tmp_path, "blk.0.attn_q", *tensors, imatrix=measured).origin == "norm"


def test_each_expert_has_a_row_of_its_own(tmp_path):
    values = np.arange(1, 3 * N + 1).reshape(3, N)
    experts = half("blk.0.ffn_up_exps.weight", (N, ROWS, 3))
    measured = imatrix_of("blk.0.ffn_up_exps.weight", values)
    found = inputs(tmp_path, "blk.0.ffn_up_exps", *gammas("blk.0.ffn_norm"), experts, imatrix=measured)
    assert found.origin == "imatrix" and np.array_equal(found.moments, values)


# sandwich norms


def gemma_like(scale=0.02, into="attn_output"):
    """A layer of Gemma's: norms before and behind attention and feed-forward; `into` has weights of size `scale`."""
    norms = gammas(*(f"blk.0.{n}" for n in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")))
    names = ["attn_q", "attn_output", "ffn_up", "ffn_down"]
    matrices = [matrix(f"blk.0.{n}", scale=scale if n == into else 0.02, seed=i) for i, n in enumerate(names)]
    return (*norms, *matrices, matrix("token_embd", seed=9))


@pytest.mark.parametrize(
    ("role", "norm"), [("attn_output", "post_attention_norm"), ("ffn_down", "post_ffw_norm")], ids=str
)
def test_behind_a_sandwich_norm_the_stream_gets_the_norms_own_energy(tmp_path, role, norm):
    with opened(tmp_path, *gemma_like()) as source:
        found = residual_energy(source, f"blk.0.{role}.weight", 4.0)
    gamma_squared = of_norm(tmp_path, f"blk.0.{norm}.weight", *gemma_like())
    assert found == pytest.approx(float(gamma_squared.sum(dtype=np.float64)), rel=1e-6)


@pytest.mark.parametrize("role", ["attn_output", "ffn_down"])
def test_what_is_normalised_again_loses_the_same_at_any_size(tmp_path, role):
    """The norm behind it undoes a factor on all weights, and so a loss must not see one."""
    losses = []
    for scale in (0.02, 0.32):
        with opened(tmp_path, *gemma_like(scale, role)) as source:
            losses.append(score(source, ScoringOptions(("Q4_K", "Q8_0"))))
    for small, large in zip(*(x.tensors for x in losses), strict=True):
        for a, b in zip(small.candidates, large.candidates, strict=True):
            assert b.loss == pytest.approx(a.loss, rel=1e-2), (small.name, a.type)
            assert a.loss > 0 or a.type == small.source_type


def test_the_feed_forwards_own_norm_is_no_sandwich(tmp_path):
    norms = gammas("blk.0.attn_norm", "blk.0.post_attention_norm")
    with opened(tmp_path, *norms, matrix("blk.0.attn_output")) as source:
        assert residual_energy(source, "blk.0.attn_output.weight", 4.0) == 4.0


def test_without_a_norm_behind_it_a_matrix_adds_its_own_energy(tmp_path):
    with opened(tmp_path, *gammas("blk.0.ffn_norm"), matrix("blk.0.attn_output")) as source:
        assert residual_energy(source, "blk.0.attn_output.weight", 4.0) == 4.0


@pytest.mark.parametrize("huge", [1e16, 3e38, -3e38])
def test_a_norm_whose_squares_are_no_numbers_is_not_the_one(tmp_path, huge):
    norm = single("blk.0.attn_norm.weight", (N,), np.full(N, huge))
    assert inputs(tmp_path, "blk.0.attn_q", norm, matrix("blk.0.attn_q")).origin == "flat"

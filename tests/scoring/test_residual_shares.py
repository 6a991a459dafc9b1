"""Losses on the scale of the residual stream, with figures small enough to follow by hand."""

import math

import pytest
from strategies import tensor

from requant.scoring.residual_shares import GAINS, scale_by_residual, writes_residual

NAMES = [f"blk.{i}.{name}.weight" for i in range(2) for name in ("attn_q", "attn_output", "ffn_up", "ffn_down")]
ADDED = {"blk.0.attn_output.weight": 1.0, "blk.0.ffn_down.weight": 3.0, "blk.1.attn_output.weight": 12.0}
ADDED["blk.1.ffn_down.weight"] = 48.0


def losses_of(names, added, energy=2.0):
    scored = {name: tensor(name, {"Q4_K": 1.0}) for name in names}
    shared = scale_by_residual(scored, dict.fromkeys(names, energy), added)
    return {name: next(c.loss for c in t.candidates if c.type == "Q4_K") for name, t in shared.items()}


@pytest.mark.parametrize(
    ("name", "so_far"),
    [("blk.0.attn_q", 1), ("blk.0.ffn_up", 4), ("blk.1.attn_output", 16), ("blk.1.ffn_down", 64)],
)
def test_a_block_counts_by_what_it_adds_to_the_stream(name, so_far):
    found = losses_of(NAMES, ADDED)
    role, layer = name.rsplit(".", 1)[1], name[4]
    added = ADDED[f"blk.{layer}.{'ffn_down' if role.startswith('ffn') else 'attn_output'}.weight"]
    assert found[f"{name}.weight"] == pytest.approx(GAINS[role] * added / math.sqrt(so_far * 64) / 2.0)


def test_the_unit_of_the_stream_does_not_matter():
    once, twice = losses_of(NAMES, ADDED), losses_of(NAMES, {name: 7 * e for name, e in ADDED.items()})
    assert once == pytest.approx(twice)


def test_embedding_and_output_concern_all_of_the_stream():
    found = losses_of(["token_embd.weight", "output.weight", *NAMES], ADDED)
    assert found["token_embd.weight"] == pytest.approx(GAINS["token_embd"] / 2)
    assert found["output.weight"] == pytest.approx(GAINS["output"] / 2)


def test_a_block_of_which_nothing_is_known_counts_as_the_others_on_average():
    found = losses_of(["blk.5.attn_q.weight", *NAMES], ADDED)
    shares = [1 / math.sqrt(1 * 64), 3 / math.sqrt(4 * 64), 12 / math.sqrt(16 * 64), 48 / math.sqrt(64 * 64)]
    assert found["blk.5.attn_q.weight"] == pytest.approx(GAINS["attn_q"] * sum(shares) / 4 / 2)
    assert losses_of(["blk.5.attn_q.weight"], {}) == pytest.approx({"blk.5.attn_q.weight": GAINS["attn_q"] / 2})


def test_experts_count_by_what_the_experts_add():
    names = ["blk.0.ffn_up_exps.weight", "blk.0.ffn_up_shexp.weight"]
    added = {"blk.0.ffn_down_exps.weight": 1.0, "blk.0.ffn_down_shexp.weight": 3.0}
    found = losses_of(names, added)
    assert found[names[0]] != found[names[1]]
    assert writes_residual("ffn_down_exps") and writes_residual("attn_output") and not writes_residual("ffn_up")


def test_a_tensor_without_energy_loses_nothing():
    assert losses_of(NAMES, ADDED, energy=0.0) == dict.fromkeys(NAMES, 0.0)

"""Shares of the residual stream, which turn the relative error of a tensor into its loss.

A relative error at a matrix's output passes on, to first order, to the output of its block: errors of the gate and
the up projection to what the down projection adds to the stream, those of the values to what attention adds. So a
tensor's loss is its relative error (energy of the error over energy of the output) times its block's share of the
stream, times a gain for its role. An embedding's relative error is the whole stream's, an output matrix's the logits'.

An error that stays in the stream counts by its share of the stream's energy at the end; one that every later block
passes on grows with the stream, and counts by its share where it enters. The geometric mean of both shares was the best
of the three on tiny-llama, SmolLM2-135M and Gemma 3 270M together: the end alone fails on Gemma 3, whose stream grows a
millionfold, the place of entry alone on SmolLM2 (scripts/bench/bench_quality.py measures plans). Absolute error
energies, without shares, are off by a factor of up to 50 between the roles of Gemma 3, whose blocks end in a norm.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from requant.model.roles import layer_of, role_of
from requant.scoring.losses import TensorLosses

# true loss of a role over its share: geometric means over tiny-llama, SmolLM2-135M and Gemma 3 270M of measured KL
# divergence over prediction, one role at a time in Q4_0, with attn_output as 1
GAINS = {
    **{"token_embd": 0.7, "output": 8.9, "attn_q": 0.6, "attn_k": 0.7, "attn_v": 2.9, "attn_output": 1.0},
    **{"ffn_gate": 0.85, "ffn_up": 1.1, "ffn_down": 1.9},
}
_OUT_OF = ("attn_output", "ssm_out", "ffn_down", "ffn_down_exps", "ffn_down_shexp", "ffn_down_chexps")


def scale_by_residual(
    scored: Mapping[str, TensorLosses], energies: Mapping[str, float], added: Mapping[str, float]
) -> dict[str, TensorLosses]:
    """Return `scored`, whose losses are energies of errors, with losses on the common scale of the stream.

    energies: of each tensor's output; added: the energy that each matrix that writes to the stream (`writes_residual`)
    adds to it.
    """
    shares = _shares(added)
    mean = sum(shares.values()) / len(shares) if shares else 1.0  # for a block without a known share

    def factor(tensor: TensorLosses) -> float:
        share = 1.0 if tensor.layer is None else shares.get((tensor.layer, _block_of(tensor.role)), mean)
        energy = energies[tensor.name]
        gain = GAINS.get(tensor.role.removesuffix("_exps").removesuffix("_shexp"), 1.0)
        return share * gain / energy if energy > 0 else 0.0

    return {name: _scale_losses(tensor, factor(tensor)) for name, tensor in scored.items()}


def _shares(added: Mapping[str, float]) -> dict[tuple[int | None, str], float]:
    """Return the energy of each block over the stream's: the geometric mean of that behind it and at the end."""
    energies: dict[tuple[int | None, str], float] = defaultdict(float)
    for name, energy in added.items():
        energies[layer_of(name), _block_of(role_of(name))] += energy
    shares: dict[tuple[int | None, str], float] = {}
    total, so_far = sum(energies.values()), 0.0
    for block in sorted(energies, key=lambda block: (block[0] or 0, block[1] != "mixer")):
        so_far += energies[block]
        shares[block] = energies[block] / math.sqrt(so_far * total) if so_far > 0 else 0.0
    return shares


def writes_residual(role: str) -> bool:
    """Return whether the role's output is added to the residual stream."""
    return role in _OUT_OF


def _block_of(role: str) -> str:
    """Return the block of a layer that the role belongs to; each block adds once to the stream."""
    if not role.startswith("ffn"):
        return "mixer"
    return next((kind for kind in ("chexps", "shexp", "exps") if role.endswith(f"_{kind}")), "ffn")


def _scale_losses(tensor: TensorLosses, factor: float) -> TensorLosses:
    found = [replace(c, loss=c.loss * factor, loss_error=c.loss_error * factor) for c in tensor.candidates]
    return replace(tensor, candidates=tuple(found))

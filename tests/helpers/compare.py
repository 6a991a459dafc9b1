"""Comparisons that show the worst block, both sides of it, and how many differ."""

import numpy as np


def assert_same_floats(got: np.ndarray, want: np.ndarray, what: str, blocks: np.ndarray | None = None) -> None:
    """The same bits, (n, N) float32 each; any NaN equals any NaN. blocks: (n, block_bytes), to be shown."""
    assert got.shape == want.shape, f"{what}: shape {got.shape} is not {want.shape}"
    same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
    _fail_on_difference(same, got, want, what, blocks)


def assert_within(got: np.ndarray, want: np.ndarray, tolerance: np.ndarray | float, what: str) -> None:
    """(n, N) each: |got - want| <= tolerance, and so neither is NaN."""
    _fail_on_difference(np.abs(got - want) <= tolerance, got, want, f"{what}, tolerance {np.max(tolerance):.3g}", None)


def assert_same_bytes(got: np.ndarray, want: np.ndarray, what: str) -> None:
    """(n, block_bytes) uint8 each."""
    assert got.shape == want.shape, f"{what}: shape {got.shape} is not {want.shape}"
    _fail_on_difference(got == want, got, want, what, None)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of (n,) values each of which there is once."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def _fail_on_difference(
    same: np.ndarray, got: np.ndarray, want: np.ndarray, what: str, blocks: np.ndarray | None
) -> None:
    if same.all():
        return
    bad = (~same).reshape(same.shape[0], -1).sum(1)
    worst = int(bad.argmax())
    where = np.flatnonzero(~same[worst])
    lines = [
        f"{what}: {np.count_nonzero(bad)} of {bad.size} blocks differ, in {bad.sum()} of {same.size} items",
        f"worst block {worst}: {bad[worst]} items, at {where[:16].tolist()}",
        f"  got  {got[worst][where[:8]].tolist()}",
        f"  want {want[worst][where[:8]].tolist()}",
    ]
    if blocks is not None:
        lines.append(f"  block {blocks[worst].tobytes().hex(' ')}")
    raise AssertionError("\n".join(lines))


def assert_no_worse(x: np.ndarray, weights: np.ndarray, got: np.ndarray, peer: np.ndarray, what: str) -> None:
    """sum of weights * (x - got)**2 is not above that of `peer`; (n, N) each, weights may broadcast."""
    ours, theirs = _block_errors(x, weights, got), _block_errors(x, weights, peer)
    ratio = np.sqrt(ours.sum() / max(theirs.sum(), np.finfo(np.float64).tiny))
    if ours.sum() <= theirs.sum():
        return
    worst = int((ours - theirs).argmax())
    raise AssertionError(
        f"{what}: rmse is {ratio:.5f} x ggml's; {np.count_nonzero(ours > theirs)} of {ours.size} blocks are worse\n"
        f"worst block {worst}: error {ours[worst]:.6g} against {theirs[worst]:.6g}\n"
        f"  x    {x[worst][:8].tolist()}\n  got  {got[worst][:8].tolist()}\n  peer {peer[worst][:8].tolist()}"
    )


def _block_errors(x: np.ndarray, weights: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.broadcast_to(weights, x.shape) * (x.astype(np.float64) - y) ** 2).sum(1)

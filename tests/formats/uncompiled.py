"""Run with NUMBA_DISABLE_JIT=1: decodes the golden blocks and encodes a few rows in plain Python.

    python uncompiled.py GOLDEN.npz ROWS.npy OUT.npz

Every warning is an error, except that scales of NaN or infinity may make NaN and infinity.
"""

import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path

import numba
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from requant.formats import FORMATS, Effort, feedback
from requant.formats.base import BlockFormat


def decode_golden(fmt: BlockFormat, data: np.ndarray, faults: str) -> np.ndarray:
    blocks = data.view(fmt.kernels.LAYOUT)[:, 0]
    out = np.full((blocks.size, fmt.block_weights), -7, np.float32)
    with np.errstate(over=faults, invalid=faults, divide="raise"):
        fmt.kernels.decode(blocks, out)
    return out


def encode_rows(fmt: BlockFormat, x: np.ndarray) -> np.ndarray:
    rows = x.reshape(-1, fmt.block_weights)
    blocks = np.zeros(rows.shape[0], fmt.kernels.LAYOUT)
    with np.errstate(over="raise", invalid="raise", divide="ignore"):
        fmt.kernels.encode(rows, np.ones((1, fmt.block_weights), np.float32), blocks, Effort.DEFAULT.value)
    return blocks.view(np.uint8).reshape(rows.shape[0], -1)


def compensate_rows(fmt: BlockFormat, x: np.ndarray) -> np.ndarray:
    """Encode the first columns of x (n, 256) with feedback, two blocks of them where the row has as many."""
    n = min(2 * fmt.block_weights, x.shape[1])
    distance = np.arange(n)[None] - np.arange(n)[:, None]
    factor = np.triu(np.float32(0.7) ** np.abs(distance) * np.cos(distance)).astype(np.float32)
    importance = 1 + np.arange(n, dtype=np.float32) % np.float32(5)
    # polishing 256 columns without the compiler takes minutes
    moment = (np.float32(0.7) ** np.abs(distance)).astype(np.float32) if n < x.shape[1] else None
    rows = np.ascontiguousarray(x[:, :n])
    with np.errstate(over="raise", invalid="raise", divide="ignore"):
        return feedback.encode_compensated(fmt, rows, factor, importance, polish=moment)[0]


def run(fmt: BlockFormat, golden: Mapping[str, np.ndarray], x: np.ndarray) -> dict[str, np.ndarray]:
    results: dict[str, np.ndarray] = {}
    try:
        results["sane"] = decode_golden(fmt, golden[f"{fmt.name}.sane"], "raise")
        results["edges"] = decode_golden(fmt, golden[f"{fmt.name}.edges"], "ignore")
        if fmt.can_encode:
            results["encoded"] = encode_rows(fmt, x)
            if feedback.can_compensate(fmt):
                results["compensated"] = compensate_rows(fmt, x)
    except (Warning, ArithmeticError, TypeError, LookupError):
        results["failure"] = np.array(traceback.format_exc())  # the other formats are still run
    return {f"{fmt.name}.{kind}": result for kind, result in results.items()}


def main(golden_path: str, rows_path: str, out_path: str) -> None:
    assert numba.config.DISABLE_JIT
    warnings.simplefilter("error")
    golden, x = np.load(golden_path), np.load(rows_path)
    results: dict[str, np.ndarray] = {}
    for fmt in FORMATS.values():
        if fmt.can_decode:
            results |= run(fmt, golden, x)
    np.savez(out_path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])

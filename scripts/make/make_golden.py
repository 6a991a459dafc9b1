"""Writes fixtures/decode_golden.npz: blocks of every type and what ggml decodes them to.

    python scripts/make/make_golden.py

Per type, three arrays: <NAME>.sane and <NAME>.edges, (n, block_bytes) uint8, and <NAME>.values, the float32 bits of
both one after the other, (n, block_weights) uint32 with every NaN as 0x7fc00000.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "fixtures" / "decode_golden.npz"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import ggml
from blocks import edge_blocks, random_blocks, sane_blocks

from requant.formats import FORMATS

N_SANE, N_RANDOM = 4, 3
QUIET_NAN = np.uint32(0x7FC00000)


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for fmt in FORMATS.values():
        if not fmt.can_decode:
            continue
        rng = np.random.default_rng(fmt.type_id)
        sane = sane_blocks(fmt, N_SANE, rng)
        edges = np.concatenate([edge_blocks(fmt, rng), random_blocks(fmt, N_RANDOM, rng)])
        values = ggml.decode(fmt.type_id, np.concatenate([sane, edges])).reshape(-1, fmt.block_weights)
        bits = np.where(np.isnan(values), QUIET_NAN, values.view(np.uint32))
        arrays |= {f"{fmt.name}.sane": sane, f"{fmt.name}.edges": edges, f"{fmt.name}.values": bits}
    np.savez_compressed(TARGET, **arrays)
    print(f"{TARGET.name}: {len(arrays) // 3} types, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()

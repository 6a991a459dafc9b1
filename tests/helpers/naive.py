"""Plain twins of kernels that neither gguf-py nor anything else offers in Python."""

import numpy as np


def _scale(data: np.ndarray) -> np.ndarray:
    """(n, block_bytes) uint8 whose first field is a binary16 -> (n, 1) float32."""
    return np.ascontiguousarray(data[:, :2]).view(np.float16).astype(np.float32)


def decode_q1_0(data: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(data[:, 2:], axis=1, bitorder="little")
    return np.where(bits, _scale(data), -_scale(data))


def decode_q2_0(data: np.ndarray) -> np.ndarray:
    codes = (data[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
    return (codes.reshape(len(data), -1).astype(np.float32) - 1) * _scale(data)


DECODERS = {"Q1_0": decode_q1_0, "Q2_0": decode_q2_0}

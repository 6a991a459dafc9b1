"""The layers that attend to a sliding window only, by architecture.

Source: load_swa_pattern and load_arch_hparams of each architecture in llama.cpp's src/models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _WindowRule:
    """Every `period`-th layer is full: the last of each group, or the first with `dense_first`.

    `default`: the window without the key; `fixed`: the window whatever the key's value, if that is above 0.
    `optional`: no key, or 0, means no window at all; else the key is required. `array`: the file must list the layers
    with a window. A `period` of 0, which no key replaces, gives one to all.
    """

    period: int
    dense_first: bool = False
    default: int | None = None
    fixed: int | None = None
    optional: bool = False
    array: bool = False


_RULES = {
    "gemma2": _WindowRule(2, default=4096),
    "gpt-oss": _WindowRule(2),
    "cohere2": _WindowRule(4),
    "cohere2moe": _WindowRule(4, dense_first=True),
    "exaone-moe": _WindowRule(4),
    "gemma-embedding": _WindowRule(6),
    "gemma3": _WindowRule(6, optional=True),
    "gemma3n": _WindowRule(5),
    "olmo2": _WindowRule(4, optional=True),
    "plamo3": _WindowRule(8, optional=True),
    "afmoe": _WindowRule(4, optional=True),
    "mellum": _WindowRule(4, optional=True),
    "muse-glimmer": _WindowRule(4),
    "laguna": _WindowRule(4, dense_first=True, optional=True),
    "smallthinker": _WindowRule(4, dense_first=True, fixed=4096, optional=True),
    "llama4": _WindowRule(4, default=8192, fixed=8192),
    **dict.fromkeys(
        ("gemma4", "gemma4-assistant", "step35", "mimo2", "spark2_5", "maple", "granite_swa"),
        _WindowRule(1, array=True),
    ),
    "dflash": _WindowRule(1, optional=True, array=True),
    "lfm2": _WindowRule(0, optional=True),
}
_EXAONE4 = _WindowRule(4, default=4096)  # the 32B model only, recognised by its 64 layers


@dataclass(frozen=True, slots=True)
class SlidingWindows:
    """The size of the window in tokens (0: no layer has one) and, per layer, whether it has the window."""

    size: int
    layers: tuple[bool, ...]


def windows_of(
    arch: str, n_layers: int, n_trunk: int, size: int | None, pattern: int | Sequence[bool] | None
) -> SlidingWindows | None:
    """Return the windows of a model, or None where a key that the architecture requires is missing.

    `size` and `pattern` are the keys attention.sliding_window and .sliding_window_pattern, None where absent;
    layers from `n_trunk` on (multi-token prediction) have none unless an array says so.
    """
    none = SlidingWindows(0, (False,) * n_layers)
    rule = _EXAONE4 if arch == "exaone4" and n_trunk == 64 else _RULES.get(arch)
    pattern = None if rule is not None and not rule.period else pattern
    if rule is None:
        return none
    if size == 0 and (rule.optional or rule.fixed is not None):
        return none
    if size is None:
        size = rule.default
        if size is None:
            return none if rule.optional else None
    size = rule.fixed or size
    if pattern is not None and not isinstance(pattern, int):
        return SlidingWindows(size, tuple(bool(p) for p in pattern))
    if rule.array:
        return None
    period = rule.period if pattern is None else pattern
    layers = tuple(il < n_trunk and _has_window(il, period, rule.dense_first) for il in range(n_layers))
    return SlidingWindows(size, layers)


def _has_window(il: int, period: int, dense_first: bool) -> bool:
    """Apply set_swa_pattern of llama-hparams.cpp: a period of 0 gives every layer a window, 1 gives none."""
    if period == 0:
        return True
    return il % period != 0 if dense_first else il % period < period - 1

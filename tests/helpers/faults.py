"""Inputs that ggml's encoders ruin without a word, and what ggml and requant make of them, for every type.

Run as a program it prints ggml's verdicts as JSON: each in a process of its own, because some of them abort.
"""

import ctypes
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import ggml
import numpy as np

import requant
from requant.errors import RequantError
from requant.formats import FORMATS

N = 512  # weights, as in the table this is after: normally distributed, of standard deviation 0.02
TYPES = [fmt for fmt in FORMATS.values() if fmt.can_encode]
# verdicts: nothing is wrong; it validates, but is ruined; it does not validate, or is refused; the process is gone
FINE, RUINED, FLAGGED, ABORTED = "fine", "ruined", "flagged", "aborted"


def weights() -> np.ndarray:
    return (0.02 * np.random.default_rng(0).standard_normal((1, N))).astype(np.float32)


def _with(x: np.ndarray, value: float) -> np.ndarray:
    x = x.copy()
    x[..., 5] = value
    return x


def _up_to(size: float) -> np.ndarray:
    x = weights().astype(np.float64)
    return (x / np.abs(x).max() * size).astype(np.float32)


def cases() -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Column of the table -> weights (1, N), importance (N,) or None."""
    x, ones = weights(), np.ones(N, np.float32)
    return {
        "one NaN": (_with(x, np.nan), None),
        "one Inf": (_with(x, np.inf), None),
        "|w| ~ 1e-7": (_up_to(1e-7), None),
        "|w| ~ 1e7": (_up_to(1e7), None),
        "|w| ~ 1e30": (_up_to(1e30), None),
        "imatrix all 0": (x, 0 * ones),
        "imatrix half 0": (x, (np.arange(N) >= N // 2).astype(np.float32)),
        "imatrix one NaN": (x, _with(ones, np.nan)),
        "imatrix -1": (x, -ones),
        "imatrix 1e-30": (x, np.float32(1e-30) * ones),
    }


def relative_error(x: np.ndarray, y: np.ndarray) -> float:
    """Over the weights that are finite in `x`."""
    kept = np.isfinite(x)
    a, b = x[kept].astype(np.float64), y.reshape(x.shape)[kept].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sqrt(((a - b) ** 2).sum() / (a**2).sum()))


def is_ruined(error: float, normal: float) -> bool:
    """Whether an encoder whose error on these weights is `normal` made so much of them that they are no use.

    Three times as much; where the normal error is so large that half of the weights' size is less, that.
    """
    return not error <= min(3 * normal, max(0.5, 1.25 * normal))


def _by_ggml(type_id: int, x: np.ndarray, importance: np.ndarray | None) -> tuple[bool, float]:
    data = ggml.quantize_chunk(type_id, x, importance)
    validate = ggml.library().ggml_validate_row_data
    validate.restype, validate.argtypes = ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return bool(validate(type_id, data, len(data))), relative_error(x, ggml.decode(type_id, data))


def _in_a_child(*given: object) -> tuple[bool, float] | None:
    """What _by_ggml finds; None where it aborts."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        for stream in (1, 2):  # ggml tells of each neighbour in a grid
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.write(theirs, json.dumps(_by_ggml(*given)).encode())
        os._exit(0)
    os.close(theirs)
    found = os.read(ours, 4096)  # nothing, where the child ended before it wrote
    os.close(ours)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else json.loads(found)


def ggml_verdicts() -> dict[str, dict[str, str]]:
    """Type -> column -> verdict on ggml's encoder."""
    script, environment = str(Path(__file__)), os.environ | {"GGML_NO_BACKTRACE": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _all_by_ggml() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for fmt in TYPES:
        _, normal = _by_ggml(fmt.type_id, weights(), np.ones(N, np.float32))
        for column, given in cases().items():
            seen = _in_a_child(fmt.type_id, *given)
            verdict = ABORTED
            if seen is not None:
                verdict = FLAGGED if not seen[0] else RUINED if is_ruined(seen[1], normal) else FINE
            found.setdefault(fmt.name, {})[column] = verdict
    return found


def by_requant(name: str, x: np.ndarray, importance: np.ndarray | None) -> float | RequantError:
    """The relative error, as ggml reads what requant.quantize writes; or why there is none."""
    try:
        data = requant.quantize(x, name, importance)
    except RequantError as error:
        return error
    return relative_error(x, ggml.decode(next(f.type_id for f in TYPES if f.name == name), data))


def requant_verdicts() -> dict[str, dict[str, str]]:
    """Type -> column -> verdict on requant's encoder."""
    found: dict[str, dict[str, str]] = {}
    for fmt in TYPES:
        normal = by_requant(fmt.name, weights(), None)
        for column, given in cases().items():
            seen = by_requant(fmt.name, *given)
            verdict = FLAGGED if isinstance(seen, RequantError) else RUINED if is_ruined(seen, normal) else FINE
            found.setdefault(fmt.name, {})[column] = verdict
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside NumPy's threads: the child needs none
    json.dump(_all_by_ggml(), sys.stdout)

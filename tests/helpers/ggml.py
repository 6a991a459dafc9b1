"""The reference: libggml-base through ctypes."""

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
        ("from_float_ref", ctypes.c_void_p),
    )


@functools.cache
def library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("libggml")
    assert spec is not None, "the tests need libggml-python"
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("lib*/libggml-base.so")
    lib = ctypes.CDLL(str(path))
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    sizes = [ctypes.c_int64] * 3
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]
    return lib


def _traits(type_id: int) -> _Traits:
    return library().ggml_get_type_traits(type_id).contents


def type_name(type_id: int) -> str:
    return _traits(type_id).type_name.decode()


def type_sizes(type_id: int) -> tuple[int, int]:
    """(weights of a block, bytes of a block)"""
    return _traits(type_id).blck_size, _traits(type_id).type_size


def decode(type_id: int, data: bytes | np.ndarray) -> np.ndarray:
    """Whole blocks as bytes -> (n_weights,) float32."""
    source = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data).view(np.uint8)
    weights, n_bytes = type_sizes(type_id)
    assert source.size % n_bytes == 0
    out = np.empty(source.size // n_bytes * weights, np.float32)
    if type_id == 0:  # F32 has no to_float
        return source.ravel().view(np.float32).copy()
    decode_into(type_id, source, out)
    return out


def decode_into(type_id: int, source: np.ndarray, out: np.ndarray) -> None:
    """Whole blocks, as contiguous bytes -> `out`, contiguous float32 of as many weights."""
    _traits(type_id).to_float(source.ctypes.data, out.ctypes.data, out.size)


def requires_importance(type_id: int) -> bool:
    return bool(library().ggml_quantize_requires_imatrix(type_id))


def quantize_chunk(type_id: int, x: np.ndarray, importance: np.ndarray | None = None) -> bytes:
    """x: (n_rows, n_per_row) float32, importance: (n_per_row,) float32 or None -> the rows' blocks.

    Types that ggml does not write without importance get ones instead of None.
    """
    x = np.ascontiguousarray(x, np.float32)
    n_rows, n_per_row = x.shape
    weights, n_bytes = type_sizes(type_id)
    assert n_per_row % weights == 0
    out = np.zeros(x.size // weights * n_bytes, np.uint8)
    if importance is None and requires_importance(type_id):
        importance = np.ones(n_per_row, np.float32)
    column_weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    assert column_weights is None or column_weights.shape == (n_per_row,)
    pointer = None if column_weights is None else column_weights.ctypes.data
    done = library().ggml_quantize_chunk(type_id, x.ctypes.data, out.ctypes.data, 0, n_rows, n_per_row, pointer)
    assert done == out.size
    return out.tobytes()


class _OpenParameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def gguf_reader() -> Callable[[bytes], int | None]:
    """ggml's reader: path -> its context, which gguf_free frees, or None where it refuses the file."""
    read = library().gguf_init_from_file
    read.argtypes = [ctypes.c_char_p, _OpenParameters]
    read.restype = ctypes.c_void_p
    return lambda path: read(path, _OpenParameters(True, None))


def file_tensors(path: Path) -> dict[str, tuple[int, int, int]]:
    """name -> (type id, offset in the file, bytes) of a GGUF file as ggml's own reader sees it."""
    lib = library()
    context = gguf_reader()(str(path).encode())
    assert context, f"ggml does not open {path}"
    for name, result in {
        "gguf_get_n_tensors": ctypes.c_int64,
        "gguf_get_data_offset": ctypes.c_size_t,
        "gguf_get_tensor_name": ctypes.c_char_p,
        "gguf_get_tensor_type": ctypes.c_int,
        "gguf_get_tensor_offset": ctypes.c_size_t,
        "gguf_get_tensor_size": ctypes.c_size_t,
    }.items():
        getattr(lib, name).restype = result
    opened = ctypes.c_void_p(context)
    start = lib.gguf_get_data_offset(opened)
    found = {}
    for i in map(ctypes.c_int64, range(lib.gguf_get_n_tensors(opened))):
        place = start + lib.gguf_get_tensor_offset(opened, i), lib.gguf_get_tensor_size(opened, i)
        found[lib.gguf_get_tensor_name(opened, i).decode()] = lib.gguf_get_tensor_type(opened, i), *place
    lib.gguf_free(opened)
    return found

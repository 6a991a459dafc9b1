"""The real llama.cpp by its C interface, in the library of the package xllamacpp: tokens, logits, inputs of products.

The structures of that interface change with its releases, so one release is accepted, and its default parameters must
be those that are known. The library may end the process on a file that it cannot run: use it in a process of its own
(`requant.scoring.engine_process`). Source: include/llama.h and ggml/include/ggml.h of llama.cpp.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from requant.errors import FILE_NAME, BadInput, InputOutputError, UsageError, brief, quote

VERSION = "2026.10.11549"
ENGINE = f"llama.cpp (xllamacpp {VERSION})"
_INSTALL = "pip install 'requant[engine]'"
_REINSTALL = f"pip install --force-reinstall xllamacpp=={VERSION}"
_F32, _DTYPES = 0, {0: np.float32, 26: np.int32}  # type ids of ggml
_PIECE = 512  # tokens that are run at once, which bounds the memory of their logits

_VOID, _INT, _UINT, _FLOAT, _BOOL, _SIZE = (
    *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32),
    *(ctypes.c_float, ctypes.c_bool, ctypes.c_size_t),
)
_ON_NODE = ctypes.CFUNCTYPE(_BOOL, _VOID, _BOOL, _VOID)
_ON_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _VOID)


class _ModelParameters(ctypes.Structure):
    """The structure llama_model_params."""

    _fields_ = [
        *((name, _VOID) for name in ("devices", "buffer_types")),
        *((name, _INT) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, _VOID) for name in ("tensor_split", "on_progress", "on_progress_data", "overrides")),
        *((name, _BOOL) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc")),
        ("load_mtp", _BOOL),
    ]


class _ContextParameters(ctypes.Structure):
    """The structure llama_context_params."""

    _fields_ = [
        *((name, _UINT) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max")),
        ("n_outputs_max_per_seq", _UINT),
        *((name, _INT) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, _INT) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, _FLOAT) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, _FLOAT) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        *(("yarn_orig_ctx", _UINT), ("defrag_thold", _FLOAT), ("on_node", _ON_NODE), ("on_node_data", _VOID)),
        *(("type_k", _INT), ("type_v", _INT), ("moe_cache_size", _SIZE)),
        *(("on_abort", _VOID), ("on_abort_data", _VOID)),
        *((name, _BOOL) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        *(("samplers", _VOID), ("n_samplers", _SIZE), ("ctx_other", _VOID)),
    ]


class _Batch(ctypes.Structure):
    """The structure llama_batch."""

    _fields_ = [
        *(("n_tokens", _INT), ("token", ctypes.POINTER(_INT)), ("embd", _VOID), ("pos", _VOID)),
        *(("n_seq_id", _VOID), ("seq_id", _VOID), ("logits", ctypes.POINTER(ctypes.c_int8))),
    ]


class GraphNode(ctypes.Structure):
    """The structure ggml_tensor: a node of the graph that the engine computes."""


GraphNode._fields_ = [
    *(("type", ctypes.c_int), ("buffer", _VOID), ("shape", ctypes.c_int64 * 4), ("strides", _SIZE * 4)),
    *(("op", ctypes.c_int), ("op_params", _INT * 16), ("flags", _INT)),
    *(("sources", ctypes.POINTER(GraphNode) * 10), ("view_source", _VOID), ("view_offset", _SIZE)),
    *(("data", _VOID), ("name", ctypes.c_char * 64), ("extra", _VOID)),
]

# defaults of a context and a model that tell whether the structures are laid out as above
_CONTEXT_DEFAULTS = {
    **{"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1},
    **dict.fromkeys(("rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type"), -1),
    **dict.fromkeys(("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "defrag_thold"), -1.0),
    **{"type_k": 1, "type_v": 1, "moe_cache_size": 0, "embeddings": False, "offload_kqv": True, "no_perf": True},
    **{"op_offload": True, "swa_full": True, "kv_unified": False, "n_samplers": 0},
}
_MODEL_DEFAULTS = {
    **{"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0, "vocab_only": False},
    **{"check_tensors": False, "use_extra_bufts": True, "no_host": False, "no_alloc": False},
}
SPARE_MEMORY = "end other programs, or give a smaller --window"
OnNode = Callable[["LlamaCpp", GraphNode, bool], bool]  # node, whether it is asked -> wanted, or to go on


class LlamaCpp:
    """llama.cpp with one model loaded on the CPU; a context manager.

    n_ctx: tokens of a window, 0 to read the vocabulary alone. on_node: called for each node of the graph, first to ask
    whether it is wanted, then with its values. Keys and values are F32 and attention is exact. Raises UsageError
    without the package or with another release of it, BadInput for a file that the engine does not load,
    InputOutputError where memory runs out.
    """

    def __init__(self, path: Path, n_ctx: int = 0, *, threads: int = 1, on_node: OnNode | None = None) -> None:
        self.path, self._log = path, list[str]()
        self._library = _load_library()
        self._on_log = _ON_LOG(lambda level, text, _: self._log.append(text.decode(errors="replace")))
        self._library.llama_log_set(self._on_log, None)
        parameters = self._library.llama_model_default_params()
        _check_layout(parameters, _MODEL_DEFAULTS)
        parameters.n_gpu_layers, parameters.use_extra_bufts = 0, False  # repacked weights have no names of their own
        parameters.vocab_only = n_ctx == 0
        self._failure: BaseException | None = None
        self._context = None
        self._model = self._library.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise self._refusal("does not load it")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.n_vocab = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        if n_ctx:
            self._make_context(n_ctx, threads, on_node)

    def _make_context(self, n_ctx: int, threads: int, on_node: OnNode | None) -> None:
        if self._library.llama_model_has_encoder(self._model):
            raise BadInput(self.path, "has an encoder: a text alone is not what it is run on")
        context = self._library.llama_context_default_params()
        _check_layout(context, _CONTEXT_DEFAULTS)
        context.n_ctx, context.n_batch = n_ctx, min(n_ctx, _PIECE)
        context.n_ubatch = context.n_batch
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type, context.type_k, context.type_v = 0, _F32, _F32
        if on_node is not None:

            def call(address: int, ask: bool, _: object) -> bool:
                if self._failure is not None:
                    return False
                try:
                    return on_node(self, _node_at(address), bool(ask))
                except BaseException as error:  # noqa: BLE001, an error does not pass through C; it is raised behind it
                    self._failure = error
                    return False

            self._on_node = _ON_NODE(call)
            context.on_node = self._on_node
        self._context = self._library.llama_init_from_model(self._model, context)
        if not self._context:
            raise self._refusal("makes no context for it")

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        if self._context:
            self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def tokenize(self, text: bytes) -> tuple[NDArray[np.int32], int | None]:
        """Return the ids of a UTF-8 text with BOS and EOS where the file requires them, and that of such a BOS."""
        call, n = self._library.llama_tokenize, 0
        n = -call(self._vocabulary, text, len(text), None, 0, True, True)
        ids = np.empty(max(n, 0), np.int32)
        given = ids.ctypes.data_as(ctypes.POINTER(_INT))
        if call(self._vocabulary, text, len(text), given, len(ids), True, True) != len(ids):
            raise self._refusal("does not split the text into tokens")
        adds = self._library.llama_vocab_get_add_bos(self._vocabulary)
        return ids, int(self._library.llama_vocab_bos(self._vocabulary)) if adds else None

    def logits(self, tokens: NDArray[np.int32], wanted: range | None = None) -> Iterator[NDArray[np.float32]]:
        """Run one window of tokens in pieces, and yield the logits (n, n_vocab) of each at the positions `wanted`.

        By default that is all of them. The array is valid until the next one.
        """
        wanted = range(len(tokens)) if wanted is None else wanted
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        for start in range(0, len(tokens), _PIECE):
            piece = tokens[start : start + _PIECE]
            n = len(piece)
            marks = [start + i in wanted for i in range(n)]
            batch = _Batch(
                *(n, (ctypes.c_int32 * n)(*map(int, piece)), None, None, None, None, (ctypes.c_int8 * n)(*marks))
            )
            code = self._library.llama_decode(self._context, batch)
            if self._failure is not None:
                raise self._failure
            if code:
                raise self._refusal("does not run it")
            if any(marks):
                found = self._library.llama_get_logits(self._context)
                if not found:
                    raise BadInput(self.path, "llama.cpp gives no logits for it")
                yield np.ctypeslib.as_array(found, (sum(marks), self.n_vocab))

    def values(self, node: GraphNode) -> NDArray[Any]:
        """Return the values of a node of floats or integers of 32 bits, with its last dimension first."""
        shape = tuple(reversed(node.shape))
        if node.type not in _DTYPES:
            what = f"llama.cpp multiplies {quote(node.name.decode(errors='replace'))} in a type that is not read here"
            raise BadInput(self.path, what, got=f"ggml type {node.type}")
        out = np.empty(shape, _DTYPES[node.type])
        size = self._library.ggml_nbytes(ctypes.byref(node))
        raw = np.empty(size, np.uint8)
        self._library.ggml_backend_tensor_get(ctypes.byref(node), raw.ctypes.data, 0, size)
        strides = tuple(reversed(node.strides))
        out[...] = np.ndarray(shape, out.dtype, raw, strides=strides)
        return out

    def operation(self, node: GraphNode) -> str:
        """Return the name of a node's operation, such as MUL_MAT."""
        return str(self._library.ggml_op_name(node.op).decode())

    def _refusal(self, what: str) -> BadInput:
        """Return the error for what the engine refuses, with its own reason."""
        lines = [line.strip() for line in "".join(self._log).splitlines() if line.strip()]
        reasons = [line for line in lines if "error" in line.lower() or "fail" in line.lower()] or lines
        # without the name of the function that wrote it
        reason = " ".join((reasons[0].partition(": ")[2] or reasons[0]).split()) if reasons else "no reason given"
        if any("alloc" in line for line in reasons):
            return InputOutputError(self.path, f"llama.cpp {what}: out of memory", hint=SPARE_MEMORY)
        return BadInput(self.path, f"llama.cpp {what}: {brief(reason, FILE_NAME)}")


def _node_at(address: int) -> GraphNode:
    return ctypes.cast(address, ctypes.POINTER(GraphNode)).contents


def _check_layout(found: ctypes.Structure, expected: Mapping[str, object]) -> None:
    wrong = next((name for name, value in expected.items() if getattr(found, name) != value), None)
    if wrong is not None:
        what = f"the engine's parameter {wrong} is {getattr(found, wrong)}, not {expected[wrong]}"
        raise UsageError(f"{what}: its structures are not those of xllamacpp {VERSION}; {_INSTALL}")


def check_installed() -> Path:
    """Return the folder of the package. Raise UsageError where it is missing, or another release."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"llama.cpp is not installed; {_INSTALL} (xllamacpp {VERSION})")
    try:
        version = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    if version != VERSION:
        raise UsageError(f"xllamacpp {version} is installed, and only {VERSION} is known; {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def _load_library() -> Any:
    folder = check_installed()
    try:
        importlib.import_module("xllamacpp")  # loads the libraries that its own needs
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"xllamacpp cannot be imported: {brief(str(error), FILE_NAME)}; {_REINSTALL}") from error
    path = next(_libraries(folder), None)
    if path is None:
        raise UsageError(f"xllamacpp has no library in {folder}; {_REINSTALL}")
    try:
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise UsageError(f"the library of xllamacpp cannot be used: {error}; {_REINSTALL}") from error


def _declare(library: ctypes.CDLL) -> Any:
    """Return the library with the signatures of its functions. Raise AttributeError where one is missing."""
    pointer, node = ctypes.c_void_p, ctypes.POINTER(GraphNode)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_log_set": (None, [_ON_LOG, pointer]),
        "llama_model_default_params": (_ModelParameters, []),
        "llama_context_default_params": (_ContextParameters, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _ModelParameters]),
        "llama_init_from_model": (pointer, [pointer, _ContextParameters]),
        "llama_decode": (ctypes.c_int32, [pointer, _Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_model_has_encoder": (ctypes.c_bool, [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (ctypes.c_int32, [pointer]),
        "llama_vocab_get_add_bos": (ctypes.c_bool, [pointer]),
        "llama_vocab_bos": (ctypes.c_int32, [pointer]),
        "llama_tokenize": (
            ctypes.c_int32,
            [pointer, ctypes.c_char_p, _INT, ctypes.POINTER(_INT), _INT, ctypes.c_bool, ctypes.c_bool],
        ),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
        "ggml_backend_tensor_get": (None, [node, pointer, ctypes.c_size_t, ctypes.c_size_t]),
        "ggml_nbytes": (ctypes.c_size_t, [node]),
        "ggml_op_name": (ctypes.c_char_p, [ctypes.c_int]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _libraries(folder: Path) -> Iterator[Path]:
    return (
        path for pattern in ("xllamacpp*.so", "xllamacpp*.dylib", "xllamacpp*.pyd") for path in folder.glob(pattern)
    )

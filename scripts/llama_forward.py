"""A Llama model's forward pass in NumPy, for benchmarks that compare the logits of many variants of its weights.

Tokens come from the real llama.cpp; the logits agree with its own up to its rounding of activations to 8 bits.
"""

import json
import sys
import urllib.request
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from requant import codec
from requant.container.source import open_source

WINDOW = 256  # tokens
Weights = dict[str, np.ndarray]


def tokens_of(model: Path, text: str) -> np.ndarray:
    """Token ids as the engine's /tokenize gives them."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    server = xllamacpp.Server(parameters)
    body, kind = json.dumps({"content": text}).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/tokenize", data=body, headers=kind)
    with urllib.request.urlopen(request) as answer:
        return np.array(json.load(answer)["tokens"])


class Llama:
    """Weights and hyperparameters of the model at `path`; matrices are (n_out, n_in) float32."""

    def __init__(self, path: Path) -> None:
        with open_source(path) as source:
            key = source.metadata.get
            self.layers, self.heads = key("llama.block_count"), key("llama.attention.head_count")
            self.kv_heads = key("llama.attention.head_count_kv")
            self.base, self.eps = key("llama.rope.freq_base"), key("llama.attention.layer_norm_rms_epsilon")
            self.weights: Weights = {
                t.name: codec.dequantize(source.read_rows(t), t.format).reshape(t.shape[::-1]) for t in source.tensors
            }

    def log_probabilities(self, tokens: np.ndarray, changed: Weights, inputs: Weights | None = None) -> np.ndarray:
        """(n_tokens, n_vocab) for windows of WINDOW tokens, with `changed` weights; sums of x^2 go into `inputs`."""
        weights = self.weights | changed
        windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
        return np.concatenate([self._window(window, weights, inputs) for window in windows])

    def _window(self, tokens: np.ndarray, weights: Weights, inputs: Weights | None) -> np.ndarray:
        def product(name: str, x: np.ndarray) -> np.ndarray:
            if inputs is not None:
                inputs[name] = inputs.get(name, 0) + (x * x).sum(0)
            return x @ weights[name].T

        def norm(name: str, x: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x * x).mean(1, keepdims=True) + self.eps) * weights[name]

        x = weights["token_embd.weight"][tokens]
        for layer in range(self.layers):
            at = f"blk.{layer}.{{}}.weight".format
            y = norm(at("attn_norm"), x)
            x = x + product(at("attn_output"), self._attention(*(product(at(f"attn_{p}"), y) for p in "qkv")))
            y = norm(at("ffn_norm"), x)
            gate = product(at("ffn_gate"), y)
            x = x + product(at("ffn_down"), gate / (1 + np.exp(-gate)) * product(at("ffn_up"), y))
        head = "output.weight" if "output.weight" in weights else "token_embd.weight"
        logits = product(head, norm("output_norm.weight", x))
        logits -= logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def _attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Causal, with grouped keys and values; q: (n, heads * size), k and v: (n, kv_heads * size)."""
        n, size = len(q), q.shape[1] // self.heads
        q, k = self._rotated(q.reshape(n, -1, size)), self._rotated(k.reshape(n, -1, size))
        k, v = (np.repeat(a.reshape(n, -1, size), self.heads // self.kv_heads, axis=1) for a in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k, optimize=True) / np.sqrt(np.float32(size))
        scores[:, np.triu_indices(n, 1)[0], np.triu_indices(n, 1)[1]] = -np.inf
        shares = np.exp(scores - scores.max(2, keepdims=True))
        shares /= shares.sum(2, keepdims=True)
        return np.einsum("hqk,khd->qhd", shares, v, optimize=True).reshape(n, -1)

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        """Rotary positions over neighbouring pairs; x: (n, heads, size)."""
        n, _, size = x.shape
        angles = np.arange(n)[:, None] * self.base ** (-np.arange(0, size, 2) / size)
        turn = np.exp(1j * angles)[:, None].astype(np.complex64)
        return (np.ascontiguousarray(x).view(np.complex64) * turn).view(np.float32)

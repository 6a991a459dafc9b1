"""The real llama.cpp in a process of its own: the logits of every position of a text, for several models.

python engine_logits.py OUT.npz TOKENS.json MODEL.gguf...
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

TIMEOUT = 600  # seconds


def log_probabilities(models, tokens, folder):
    """Return model's path -> (n_tokens, n_vocab); AssertionError with the engine's last words where it fails."""
    out, asked = folder / "logits.npz", folder / "tokens.json"
    asked.write_text(json.dumps([int(token) for token in tokens]))
    words = [sys.executable, __file__, str(out), str(asked), *map(str, models)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, f"llama.cpp fails ({run.returncode}):\n{run.stderr[-2000:]}"
    with np.load(out) as found:
        return {path: _normalize(found[str(path)].astype(np.float64)) for path in models}


def _normalize(x):
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def main(out, asked, *models):
    from requant.model.llama_cpp import LlamaCpp

    tokens = np.array(json.loads(Path(asked).read_text()), np.int32)
    found = {}
    for path in models:
        with LlamaCpp(Path(path), 256) as engine:
            found[path] = np.concatenate([part.copy() for part in engine.logits(tokens)])
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The real llama.cpp in a process of its own: the logits of every position of a text, for several models.

python engine_logits.py FOLDER TOKENS.json MODEL.gguf...
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

TIMEOUT = 600  # seconds


def log_probabilities(models, tokens, folder, *, may_refuse=False):
    """Return model's path -> (n_tokens, n_vocab), without those that the engine refuses where it may.

    AssertionError with the engine's last words where it fails.
    """
    asked = folder / "tokens.json"
    asked.write_text(json.dumps([int(token) for token in tokens]))
    words = [sys.executable, __file__, str(folder), str(asked), *map(str, models)]
    quiet = os.environ | {"GGML_NO_BACKTRACE": "1"}
    run = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=quiet)
    outs = {path: folder / f"{number}.npy" for number, path in enumerate(models)}
    found = {path: _normalize(np.load(out).astype(np.float64)) for path, out in outs.items() if out.exists()}
    for out in outs.values():
        out.unlink(missing_ok=True)
    assert may_refuse or len(found) == len(models), f"llama.cpp fails:\n{run.stderr[-2000:]}"
    return found


def _normalize(x):
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def main(folder, asked, *models):
    from requant.model.llama_cpp import LlamaCpp

    tokens = np.array(json.loads(Path(asked).read_text()), np.int32)
    for number, path in enumerate(models):
        if os.fork():  # a failed assertion of the engine ends the process of one model alone
            os.wait()
            continue
        with LlamaCpp(Path(path), 256) as engine:
            np.save(Path(folder) / f"{number}.npy", np.concatenate([part.copy() for part in engine.logits(tokens)]))
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

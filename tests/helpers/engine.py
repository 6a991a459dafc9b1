"""The real llama.cpp (package xllamacpp) in a process of its own: what it makes of prompts with a model.

    python engine.py MODEL.gguf N_TOKENS N_LIKELY PROMPT...

prints JSON: for each prompt the text of N_TOKENS greedy tokens, and the N_LIKELY most likely first tokens with the
logarithms of their probabilities.
"""

import base64
import json
import struct
import subprocess
import sys
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TIMEOUT = 120  # seconds


@dataclass(frozen=True)
class Answer:
    text: str
    likely: dict[int, float]  # token -> log of its probability as the first one

    @property
    def top(self) -> int:
        return max(self.likely, key=self.likely.__getitem__)


def answers(model: Path, *prompts: str, n_tokens: int = 8, n_likely: int = 1) -> list[Answer]:
    """One Answer a prompt; AssertionError with llama.cpp's last words where it cannot load the model."""
    words = [sys.executable, __file__, str(model), str(n_tokens), str(n_likely), *prompts]
    run = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, f"llama.cpp fails on {model.name} ({run.returncode}):\n{run.stderr[-2000:]}"
    found = json.loads(run.stdout.splitlines()[-1])
    return [Answer(text, {int(token): value for token, value in likely}) for text, likely in found]


def tokens(model: Path, *texts: str) -> list[list[int]]:
    """The ids of each text, special tokens in it parsed, without BOS."""
    words = [sys.executable, __file__, "--tokens", str(model), *texts]
    run = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, f"llama.cpp fails on {model.name} ({run.returncode}):\n{run.stderr[-2000:]}"
    found: list[list[int]] = json.loads(run.stdout.splitlines()[-1])
    return found


def divergence(before: Answer, after: Answer) -> float:
    """KL divergence of the first token over those that both list, in nats."""
    tokens = sorted(before.likely.keys() & after.likely.keys())
    p, q = (np.array([answer.likely[token] for token in tokens]) for answer in (before, after))
    return float((np.exp(p) * (p - q)).sum())


def describe_picture(model: Path, projector: Path) -> str:
    """The first tokens about a picture; AssertionError where llama.cpp cannot load or run the projector."""
    words = [sys.executable, __file__, "--picture", str(model), str(projector)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, f"llama.cpp fails on {projector.name} ({run.returncode}):\n{run.stderr[-2000:]}"
    return str(json.loads(run.stdout.splitlines()[-1]))


def _server(model: str, projector: str = ""):
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    if projector:
        parameters.mmproj.path, parameters.mmproj_use_gpu = projector, False
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    # one thread: several spin while they wait for each other, for minutes on a busy machine
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(parameters)


def main(model: str, n_tokens: str, n_likely: str, *prompts: str) -> None:
    server = _server(model)
    found = []
    for prompt in prompts:
        asked = {"prompt": prompt, "max_tokens": int(n_tokens), "temperature": 0, "logprobs": int(n_likely)}
        choice = server.handle_completions(asked)["choices"][0]
        first = choice["logprobs"]["content"][0]["top_logprobs"]
        found.append((choice["text"], [(token["id"], token["logprob"]) for token in first]))
    sys.stdout.write(json.dumps(found) + "\n")


def print_tokens(model: str, *texts: str) -> None:
    server = _server(model)
    found = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found.append(json.load(answer)["tokens"])
    sys.stdout.write(json.dumps(found) + "\n")


def print_description(model: str, projector: str) -> None:
    url = "data:image/png;base64," + base64.b64encode(_png(64)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe"}]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "temperature": 0}
    answer = _server(model, projector).handle_chat_completions(asked)
    sys.stdout.write(json.dumps(answer["choices"][0]["message"]["content"]) + "\n")


def _png(side: int) -> bytes:
    """A picture of three ramps."""
    y, x = np.mgrid[0:side, 0:side]
    raw = np.stack([x * 4 % 256, y * 4 % 256, (x + y) * 2 % 256], -1).astype(np.uint8)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in raw))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    coded = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(coded)


if __name__ == "__main__":
    if sys.argv[1] == "--tokens":
        print_tokens(*sys.argv[2:])
    elif sys.argv[1] == "--picture":
        print_description(*sys.argv[2:])
    else:
        main(*sys.argv[1:])

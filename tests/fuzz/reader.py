"""ggml's own reader of GGUF files, in a process of its own: one that aborts must not take the tests with it."""

import os
import subprocess
import sys
from pathlib import Path

WORKER = """
import ctypes, sys
import ggml
lib = ggml.library()
log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
lib.ggml_log_set(log, None)
read = ggml.gguf_reader()
for line in sys.stdin.buffer:
    context = read(line[:-1])
    if context:
        lib.gguf_free(ctypes.c_void_p(context))
    sys.stdout.buffer.write(b"+" if context else b"-")
    sys.stdout.buffer.flush()
"""


class Reader:
    """The process, started again whenever it dies."""

    def __init__(self):
        self.process = None

    def opens(self, path):
        """Whether ggml opens the file at `path`; an abort is a refusal too."""
        if self.process is None:
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen([sys.executable, "-c", WORKER], bufsize=0, env=environment, **pipes)
        self.process.stdin.write(os.fsencode(path) + b"\n")
        answer = self.process.stdout.read(1)
        if not answer:
            self.close()
        return answer == b"+"

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

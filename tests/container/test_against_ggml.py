"""The differential test: what ggml's own reader refuses we refuse, hence all we accept opens there."""

import subprocess
import sys

import pytest
from corpus import CASES
from hypothesis import given, settings
from test_malformed import BASES, mutants

from requant.container.header import parse_header
from requant.errors import BadInput

# in a process of its own: a reader that aborts must not take the tests with it
WORKER = """
import ctypes, importlib.util, pathlib, sys
folder = pathlib.Path(importlib.util.find_spec("libggml").origin).parent
(path,) = folder.glob("lib*/libggml-base.so")
lib = ctypes.CDLL(str(path))
log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
lib.ggml_log_set(log, None)
class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]
lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
lib.gguf_init_from_file.restype = ctypes.c_void_p
lib.gguf_free.argtypes = [ctypes.c_void_p]
for line in sys.stdin:
    context = lib.gguf_init_from_file(line.rstrip().encode(), Params(True, None))
    if context:
        lib.gguf_free(context)
    print("opens" if context else "refused", flush=True)
"""


class Reader:
    """ggml's reader, started again whenever it dies."""

    def __init__(self):
        self.process = None

    def opens(self, path):
        if self.process is None:
            command = [sys.executable, "-c", WORKER]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:  # it aborted, which is a refusal too
            self.close()
        return answer == "opens\n"

    def close(self):
        if self.process is not None:
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def ggml_reader():
    reader = Reader()
    yield reader
    reader.close()


def _accepted(path):
    try:
        parse_header(path)
    except BadInput:
        return False
    return True


@pytest.mark.parametrize("content", [pytest.param(c, id=name) for name, (_, c, _) in CASES.items()])
def test_every_case_of_the_corpus_that_we_accept_opens_in_ggml(tmp_path, ggml_reader, content):
    path = tmp_path / "case.gguf"
    path.write_bytes(content)
    assert not _accepted(path) or ggml_reader.opens(path)


@pytest.mark.parametrize("content", BASES)
def test_sound_files_open_in_both(tmp_path, ggml_reader, content):
    path = tmp_path / "case.gguf"
    path.write_bytes(content)
    assert _accepted(path)
    assert ggml_reader.opens(path)


@settings(max_examples=2000, deadline=None)
@given(mutants())
def test_every_mutant_that_we_accept_opens_in_ggml(tmp_path_factory, ggml_reader, content):
    path = tmp_path_factory.getbasetemp() / "differential.gguf"
    path.write_bytes(content)
    assert not _accepted(path) or ggml_reader.opens(path)

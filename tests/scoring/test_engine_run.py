"""Runs in llama.cpp: the same sums and figures as in requant's own, resumed, and nothing left where they end."""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import real_models
from model.forward.architectures import MAKERS

from requant.container.source import open_source
from requant.errors import BadInput, NumericFault, UsageError
from requant.model import llama_cpp
from requant.model.forward.passes import read_model
from requant.model.forward.weights import Weights
from requant.scoring.calibrate import BATCH, calibrate, calibrate_in_engine
from requant.scoring.calibration_data import encode
from requant.scoring.engine_run import encode_in_engine, measure_figures
from requant.scoring.evaluate import evaluate, summary
from requant.scoring.options import StatisticsOptions

OPTIONS = StatisticsOptions(gradients=False, threads=1)


def windows(n, n_ctx):
    return np.random.default_rng(0).integers(0, 256, (n, n_ctx), np.int32)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of temporary files, empty before and after."""
    found = tmp_path / "temporary"
    found.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(found))
    yield found
    assert not list(found.iterdir())


@pytest.mark.parametrize("name", ["qwen35moe", "deepseek2", "nemotron_h"])
def test_sums_are_those_of_our_own_run(tmp_path, name):
    tokens = windows(BATCH + 1, 40)
    with open_source(MAKERS[name](1).write(tmp_path / "model.gguf")) as source:
        ours, theirs = calibrate(source, tokens, OPTIONS), calibrate_in_engine(source, tokens, OPTIONS)
        assert theirs.n_tokens == ours.n_tokens == tokens.size and theirs.engine == llama_cpp.ENGINE
        assert ours.matrices.keys() <= theirs.matrices.keys()
        for tensor in source.tensors:
            found = [statistics.arrays(tensor.name, tensor.shape) for statistics in (ours, theirs)]
            if found[0] is not None:
                (inputs, counts, _), (others, seen, gradients) = found
                np.testing.assert_array_equal(seen, counts, tensor.name)
                np.testing.assert_allclose(others, inputs, rtol=1e-4, atol=1e-5 * inputs.max(), err_msg=tensor.name)
                assert gradients is None


def test_figures_are_those_of_our_own_run_over_pieces_of_a_window(tmp_path):
    tokens = windows(1, llama_cpp._PIECE + 80)
    paths = [MAKERS["lfm2"](seed).write(tmp_path / f"{seed}.gguf") for seed in (1, 2)]
    with open_source(paths[0]) as one, open_source(paths[1]) as other:
        ours = evaluate(read_model(Weights(one)), tokens, base=read_model(Weights(other)))
    steps = []
    theirs = summary(measure_figures(*paths, tokens, threads=1, progress=steps.append), tokens)
    assert steps == [1]
    for name in ("ppl", "base_ppl", "mean_kld", "kld_error", "p99_kld", "same_top", "n_scored"):
        assert getattr(theirs, name) == pytest.approx(getattr(ours, name), rel=2e-4), name
    alone = summary(measure_figures(paths[0], None, tokens, threads=1), tokens)
    assert (alone.ppl, alone.mean_kld) == (theirs.ppl, None)


def test_the_tokenizer_of_the_engine_is_ours():
    text = (real_models.FIXTURES / "eval.txt").read_text()[:5000]
    with open_source(real_models.TINY) as source:
        ours, theirs = encode(source, text), encode_in_engine(source, text)
    assert ours.ids.tolist() == theirs.ids.tolist() and ours.bos == theirs.bos


def test_a_stopped_calibration_goes_on_behind_its_last_batch(tmp_path):
    tokens, checkpoint = windows(2 * BATCH + 1, 16), tmp_path / "checkpoint.npz"
    others, steps = children(), []

    def stop(n):
        steps.append(n)
        if sum(steps) == BATCH + 1:
            raise KeyboardInterrupt

    with open_source(MAKERS["qwen35"](1).write(tmp_path / "model.gguf")) as source:
        with pytest.raises(KeyboardInterrupt):
            calibrate_in_engine(source, tokens, OPTIONS, checkpoint=checkpoint, progress=stop)
        assert checkpoint.exists() and set(children()) <= set(others)
        again = []
        found = calibrate_in_engine(source, tokens, OPTIONS, checkpoint=checkpoint, progress=again.append)
        assert again == [BATCH, *[1] * (BATCH + 1)] and not checkpoint.exists()
        whole = calibrate_in_engine(source, tokens, OPTIONS)
    assert found.matrices.keys() == whole.matrices.keys()
    for key, sums in whole.matrices.items():
        assert found.matrices[key].count == sums.count
        np.testing.assert_allclose(found.matrices[key].inputs, sums.inputs, rtol=1e-12)


def children():
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


def crashing(path):
    """A model whose last layers read keys that no earlier layer has: the engine aborts."""
    model = MAKERS["gemma4-side"](1)
    model.keys["attention.shared_kv_layers"] = 5
    return model.write(path)


def nonfinite(path):
    model = MAKERS["ernie4_5"](1)
    model.tensors = [
        replace(t, data=np.full(t.shape, np.nan, "<f4").tobytes()) if t.name == "output.weight" else t
        for t in model.tensors
    ]
    return model.write(path)


def without_tensor(path):
    model = MAKERS["ernie4_5"](1)
    model.tensors = [t for t in model.tensors if t.name != "blk.0.attn_q.weight"]
    return model.write(path)


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (crashing, BadInput, "SIGABRT: .*GGML_ASSERT.*; the file is damaged, or llama.cpp .* cannot run it"),
        (without_tensor, BadInput, "does not load it: .*blk.0.attn_q.weight"),
        (nonfinite, NumericFault, "logits of llama.cpp are not finite"),
    ],
)
def test_a_model_that_the_engine_cannot_run_is_one_line(tmp_path, make, kind, said):
    path = make(tmp_path / "model.gguf")
    with pytest.raises(kind, match=said) as error:
        measure_figures(path, None, windows(1, 16), threads=1)
    assert error.value.path == str(path) and "\n" not in str(error.value)


def test_a_base_with_another_vocabulary_is_refused(tmp_path):
    one = MAKERS["ernie4_5"](1).write(tmp_path / "one.gguf")
    with pytest.raises(BadInput, match="another vocabulary"):
        measure_figures(real_models.TINY, one, windows(1, 16), threads=1)


def install(folder, monkeypatch, *, body="", library=None, version=llama_cpp.VERSION):
    """Another package of that name in front of the real one."""
    package, metadata = folder / "xllamacpp", folder / f"xllamacpp-{version}.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(body)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: xllamacpp\nVersion: {version}\n")
    if library is not None:
        (package / "xllamacpp.abi3.so").write_bytes(library)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    ("package", "code", "said"),
    [
        ({"version": "1.0"}, 2, "xllamacpp 1.0 is installed, and only 2026"),
        ({}, 2, "has no library in"),
        ({"library": b"no library"}, 2, "the library of xllamacpp cannot be used: "),
        ({"library": Path(np.linalg._umath_linalg.__file__).read_bytes()}, 2, "undefined symbol"),
        ({"body": "import os; os.kill(os.getpid(), 9)"}, 6, "was killed, as a system out of memory does"),
        ({"body": "raise RuntimeError('built for\\nanother numpy')"}, 2, "xllamacpp cannot be imported: built for"),
        ({"body": "raise MemoryError"}, 6, "out of memory beside llama.cpp"),
        ({"body": "import os; os._exit(7)"}, 3, "ended the process of llama.cpp with exit code 7"),
    ],
)
def test_an_installation_that_does_not_work_is_one_line(tmp_path, monkeypatch, package, code, said):
    (tmp_path / "packages").mkdir()
    install(tmp_path / "packages", monkeypatch, **package)
    monkeypatch.delitem(sys.modules, "xllamacpp", raising=False)
    with pytest.raises((UsageError, BadInput)) as error:
        measure_figures(real_models.TINY, None, windows(1, 16), threads=1)
    assert error.value.exit_code == code and said in str(error.value) and "\n" not in str(error.value)
    assert code != 2 or "pip install" in str(error.value)


def test_structures_of_another_layout_are_refused():
    parameters = llama_cpp._ContextParameters()
    for name, value in llama_cpp._CONTEXT_DEFAULTS.items():
        setattr(parameters, name, value)
    llama_cpp._check_layout(parameters, llama_cpp._CONTEXT_DEFAULTS)
    parameters.type_k = 0
    with pytest.raises(UsageError, match=r"parameter type_k is 0, not 1: .*pip install"):
        llama_cpp._check_layout(parameters, llama_cpp._CONTEXT_DEFAULTS)


def test_modules_of_the_working_folder_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert np.isfinite(measure_figures(real_models.TINY, None, windows(1, 16), threads=1).log_likelihood).all()

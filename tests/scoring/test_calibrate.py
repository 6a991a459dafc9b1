"""Statistics of a model: the same as llama-imatrix's, whole after an interruption, read back as they were written."""

import numpy as np
import pytest
import real_models
from model.forward import families

from requant.container.imatrix import read_imatrix
from requant.container.source import open_source
from requant.errors import BadInput, OutputRefused, UsageError
from requant.model.forward.memory import memory_needs
from requant.model.forward.passes import read_model
from requant.model.forward.weights import Weights
from requant.scoring import calibrate as module
from requant.scoring.calibrate import calibrate
from requant.scoring.calibration_data import WindowSpec, drawn_windows, read_text_windows
from requant.scoring.checkpoint import load_checkpoint, save_checkpoint
from requant.scoring.options import StatisticsOptions
from requant.scoring.statistics import write_statistics


def calibrated(source, tokens, checkpoint=None, progress=lambda _: None, **options):
    return calibrate(source, tokens, StatisticsOptions(**options), checkpoint=checkpoint, progress=progress)


def test_the_inputs_are_those_that_llama_imatrix_saw():
    theirs = read_imatrix(real_models.IMATRIX)
    with open_source(real_models.TINY) as source:
        text = read_text_windows(real_models.FIXTURES / "calibration.txt", source, WindowSpec())
        ours = calibrated(source, text.windows, gradients=False).imatrix(source, text.name)
    assert theirs.entries.keys() <= ours.entries.keys()
    assert (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size) == (28, 512)
    for name, entry in theirs.entries.items():
        np.testing.assert_allclose(ours.entries[name].importance, entry.importance, rtol=1e-3, err_msg=name)
        np.testing.assert_array_equal(ours.entries[name].counts, entry.counts)


@pytest.fixture(params=["mixtral", "qwen3", "phi3"])
def source(request, tmp_path):
    with open_source(families.write(request.param, tmp_path / "model.gguf")) as opened:
        yield opened


@pytest.fixture
def tokens(source):
    return drawn_windows(source, WindowSpec(16, 20)).windows


def equal(one, other):
    assert one.n_tokens == other.n_tokens and one.matrices.keys() == other.matrices.keys()
    for key, sums in one.matrices.items():
        assert sums.count == other.matrices[key].count
        np.testing.assert_array_equal(sums.inputs, other.matrices[key].inputs)
        np.testing.assert_array_equal(sums.gradients, other.matrices[key].gradients)


def test_every_matrix_has_the_sums_of_its_tokens(source, tokens):
    found = calibrated(source, tokens).imatrix(source, "text")
    for name, entry in found.entries.items():
        assert entry.gradients.shape[1] == source.tensor(name).shape[1], name
        routed = name.endswith("_exps.weight")
        assert entry.counts.sum() == (2 if routed else 1) * tokens.size, name
    wanted = {t.name for t in source.tensors if len(t.shape) > 1}
    if "output.weight" in source:
        wanted.remove("token_embd.weight")  # looked up, not multiplied with
    assert found.entries.keys() == wanted
    assert found.lookup.shape == (source.tensor("token_embd.weight").shape[0],) and (found.lookup > 0).all()


def test_threads_and_batches_change_nothing(source, tokens, monkeypatch):
    one = calibrated(source, tokens, threads=1)
    equal(one, calibrated(source, tokens, threads=3))
    monkeypatch.setattr(module, "BATCH", 3)
    three = calibrated(source, tokens)
    for key, sums in one.matrices.items():  # sums of floats in another order
        np.testing.assert_allclose(three.matrices[key].inputs, sums.inputs, rtol=1e-6)
        np.testing.assert_allclose(three.matrices[key].gradients, sums.gradients, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_run_that_was_stopped_goes_on_where_it_was(source, tokens, tmp_path, gradients):
    kept = tmp_path / "kept.npz"
    steps = module.n_steps(source, tokens[:1], StatisticsOptions(gradients))

    class Stop(BaseException):
        pass

    def stop_after(n):
        left = [n]

        def progress(done):
            left[0] -= done
            if left[0] < 0:
                raise Stop

        return progress

    with pytest.raises(Stop):
        calibrated(source, tokens, checkpoint=kept, gradients=gradients, progress=stop_after(2 * steps + 1))
    assert kept.exists()
    counted = []
    resumed = calibrated(source, tokens, checkpoint=kept, gradients=gradients, progress=counted.append)
    assert counted[0] == 2 * steps and sum(counted) == 3 * steps  # two of three batches were there
    equal(resumed, calibrated(source, tokens, gradients=gradients))
    assert not kept.exists()


def test_what_was_kept_of_other_tokens_is_not_taken_up(source, tokens, tmp_path):
    kept = tmp_path / "kept.npz"
    other = calibrated(source, tokens[::-1].copy())
    save_checkpoint(kept, module._identity(source, tokens[::-1].copy(), True), other)
    equal(calibrated(source, tokens, checkpoint=kept), calibrated(source, tokens))


def test_what_was_kept_and_then_damaged_is_not_taken_up(source, tokens, tmp_path):
    kept, sums = tmp_path / "kept.npz", calibrated(source, tokens)
    save_checkpoint(kept, "it", sums)
    equal(load_checkpoint(kept, "it", source, tokens.shape[1]), sums)
    whole, lost = kept.read_bytes(), 0
    for at in range(0, len(whole), len(whole) // 50):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            kept.write_bytes(damaged)
            found = load_checkpoint(kept, "it", source, tokens.shape[1])
            lost += found is None
            if found is not None:  # the bit was in a date or the like
                equal(found, sums)
    assert lost > 90


def test_the_file_reads_back_and_others_can_read_it(source, tokens, tmp_path):
    import gguf

    found, out = calibrated(source, tokens), tmp_path / "statistics.gguf"
    write_statistics(out, found, source, "drawn", force=False)
    back, memory = read_imatrix(out), found.imatrix(source, "drawn")
    assert (back.datasets, back.n_tokens) == (("drawn",), tokens.size)
    assert back.entries.keys() == memory.entries.keys()
    for name, entry in memory.entries.items():
        np.testing.assert_allclose(back.entries[name].importance, entry.importance, rtol=1e-6)
        np.testing.assert_allclose(back.entries[name].gradients, entry.gradients, rtol=1e-6)
    names = {t.name for t in gguf.GGUFReader(out).tensors}
    own = {f"{name}.{what}" for name in back.entries for what in ("in_sum2", "counts", "g_sum2")}
    assert names == own | {"token_embd.lookup.g_sum2"}
    np.testing.assert_allclose(back.lookup, memory.lookup, rtol=1e-6)
    with pytest.raises(OutputRefused):
        write_statistics(out, found, source, "drawn", force=False)


def test_a_limit_of_memory_makes_smaller_batches_or_is_refused(source, tokens):
    fixed, per_window = memory_needs(read_model(Weights(source)), 16, 1, True)
    roomy, tight = fixed + 100 * per_window, fixed + 3 * per_window
    per_batch = module.n_steps(source, tokens[:1], StatisticsOptions())
    assert module.n_steps(source, tokens, StatisticsOptions(max_memory=roomy, threads=1)) == per_batch
    assert module.n_steps(source, tokens, StatisticsOptions(max_memory=tight, threads=1)) == 7 * per_batch
    with pytest.raises(UsageError, match="too little for one window"):
        calibrated(source, tokens, max_memory=fixed, threads=1)


def test_memory_grows_with_layers_by_their_sums_alone(tmp_path):
    def of(n_layers):
        with open_source(families.write("qwen3", tmp_path / f"{n_layers}.gguf", n_layers=n_layers)) as source:
            of_a_layer = sum(sum(t.shape) for t in source.tensors if t.name.startswith("blk.0.") and len(t.shape) > 1)
            return *memory_needs(read_model(Weights(source)), 64, 2, True), of_a_layer

    (few, per_window, of_a_layer), (many, same, _) = of(3), of(12)
    assert per_window == same
    assert many - few == 9 * 8 * of_a_layer


def test_ids_that_are_no_tokens_are_refused(source):
    with pytest.raises(BadInput, match="no such token"):
        calibrated(source, np.full((1, 16), 9999, np.int32))

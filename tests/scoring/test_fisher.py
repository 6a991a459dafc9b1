"""Losses from gradients: against measured divergences, and against their definition on models small enough for it."""

import numpy as np
import pytest
import real_models
from compare import rank_correlation
from gguf_files import STR, File, Tensor, pair
from model.forward import families

from requant.container.source import open_source
from requant.errors import BadInput
from requant.formats import by_name, codec
from requant.model.forward.architecture import NotRun
from requant.model.forward.checkpoints import Checkpoints
from requant.model.forward.layer import NullHook
from requant.model.forward.passes import backward, embedding_gradient, forward, output_gradient, read_head, read_model
from requant.model.forward.weights import Weights
from requant.model.roles import n_matrices
from requant.scoring.calibrate import calibrate
from requant.scoring.calibration_data import TokenWindows, WindowSpec, drawn_windows, read_text_windows
from requant.scoring.evaluate import judge, summary
from requant.scoring.fisher import find_run_obstacle, score_by_gradients, score_by_statistics
from requant.scoring.options import ScoringOptions, StatisticsOptions

CALIBRATION, EVAL = (real_models.FIXTURES / name for name in ("calibration.txt", "eval.txt"))


def scored(source, text, *types, **options):
    return score_by_gradients(source, text, ScoringOptions(types, **options))


def agreement(path, type_name, step, windows, same=False):
    """Predicted and measured divergence of every `step`-th matrix in the type, one at a time.

    same: predicted from the windows that are measured on, so that the texts' difference does not count.
    """
    fmt = by_name(type_name)
    with open_source(path) as source:
        evaluated = read_text_windows(EVAL, source, WindowSpec(n=windows))
        text, tokens = read_text_windows(CALIBRATION, source, WindowSpec(n=8)), evaluated.windows
        losses = scored(source, evaluated if same else text, type_name, allow_requantize=True).losses
        predicted = {t.name: t.candidates[-1].loss for t in losses.tensors if len(t.candidates) > 1}
        base = read_model(Weights(source))
        reference = read_head(base), forward(base, tokens)
        names = list(predicted)[::step]
        measured = []
        for name in names:
            weights = Weights(source, lambda t, x, own=name: codec.reconstruct(x, fmt) if t.name == own else x)
            model = read_model(weights)
            judged = judge(read_head(model), forward(model, tokens), tokens, reference)
            measured.append(summary(judged, tokens).mean_kld)
    return np.array([predicted[name] for name in names]), np.array(measured)


def test_predicted_divergences_are_near_the_measured_ones():
    predicted, measured = agreement(real_models.TINY, "Q3_K", 9, 4)
    assert rank_correlation(predicted, measured) >= 0.9
    assert 0.7 <= predicted.sum() / measured.sum() <= 1.4


@pytest.mark.slow
def test_predicted_divergences_are_the_measured_ones():
    predicted, measured = agreement(real_models.TINY, "Q3_K", 3, 10)
    assert rank_correlation(predicted, measured) >= 0.98
    assert 0.85 <= predicted.sum() / measured.sum() <= 1.15
    assert np.median(np.abs(np.log(predicted / measured))) < 0.2


@pytest.mark.slow
def test_predicted_divergences_are_the_measured_ones_for_every_matrix():
    predicted, measured = agreement(real_models.TINY, "Q3_K", 1, 20)
    assert rank_correlation(predicted, measured) >= 0.98
    assert 0.85 <= predicted.sum() / measured.sum() <= 1.15


@pytest.mark.slow
@pytest.mark.parametrize(("path", "same"), [(real_models.smollm2, False), (real_models.gemma3, True)])
def test_predicted_divergences_of_real_models_are_the_measured_ones(path, same):
    """Gemma 3's divergences differ by up to ten times from one window to the next."""
    predicted, measured = agreement(path(), "Q4_0", 9, 4, same)
    assert rank_correlation(predicted, measured) >= 0.9
    assert 0.85 <= predicted.sum() / measured.sum() <= 1.15


@pytest.fixture(params=["qwen3", "llama", "mixtral", "phi3", "gemma2"])
def small(request, tmp_path):
    with open_source(families.write(request.param, tmp_path / "model.gguf")) as source:
        yield source


class Kept(NullHook):
    """A hook that keeps what it sees of a window."""

    def __init__(self):
        self.pairs = {}

    def gradients(self, name, expert, x, g):
        self.pairs[name, expert or 0] = x.copy(), g.copy()


def test_a_loss_is_half_the_error_times_the_squared_gradient_of_each_window(small):
    """Written down again from its definition, with F whole and all errors in float64."""
    text = drawn_windows(small, WindowSpec(24, 3))
    found, tokens = {t.name: t for t in scored(small, text, "Q8_0").losses.tensors}, text.windows
    model = read_model(Weights(small))
    expected, seen = {}, {}
    with Checkpoints() as checkpoints:
        x = forward(model, tokens, checkpoints=checkpoints)
        output_gradient(model, x)
        watches = [Kept() for _ in tokens]

        def done(layer):
            for name in {name for watch in watches for name, _ in watch.pairs}:
                full = f"blk.{layer.index}.{name}"
                expected[full] = 0.0
                for watch in watches:
                    for (own, expert), (x, g) in watch.pairs.items():
                        if own == name:
                            seen.setdefault(full, set()).add(expert)
                            expected[full] += loss_of(small, full, expert, g.T.astype(np.float64) @ x)
            for i in range(len(watches)):
                watches[i] = Kept()

        backward(model, x, checkpoints, hook=lambda i: watches[i], on_layer=done)
    for name, value in expected.items():
        if found[name].reason is None:
            factor = n_matrices(small.tensor(name).shape) / len(seen[name])
            assert found[name].candidates[-1].loss == pytest.approx(factor * value / (2 * tokens.size), rel=1e-3), name
    if model.output_name != "token_embd.weight":
        ids, squares = embedding_gradient(model, tokens, x)
        error = error_of(small, "token_embd.weight", 0)[ids]
        value = (squares * error).sum() / (2 * tokens.size)
        assert found["token_embd.weight"].candidates[-1].loss == pytest.approx(value, rel=1e-3)


def error_of(source, name, expert):
    tensor = source.tensor(name)
    x = codec.dequantize(source.read_rows(tensor), tensor.format)
    y = codec.reconstruct(x, by_name("Q8_0")) if tensor.n_per_row % 32 == 0 else x
    stack = (x.astype(np.float64) - y) ** 2
    return stack.reshape(-1, tensor.shape[1], tensor.n_per_row)[expert]


def loss_of(source, name, expert, gradient):
    return float((gradient**2 * error_of(source, name, expert)).sum())


def test_the_losses_do_not_depend_on_threads(small):
    text = drawn_windows(small, WindowSpec(16, 3))
    one, three = (scored(small, text, "Q8_0", "Q4_0", threads=n) for n in (1, 3))
    assert one.losses == three.losses
    assert one.losses.calibration_text == text.name


def test_encoders_weigh_by_what_the_pass_measured_where_they_are_told_to(small):
    text = drawn_windows(small, WindowSpec(32, 4))
    plain, weighed = (scored(small, text, "Q4_0", weigh=w) for w in (False, True))
    measured = weighed.statistics.imatrix(small, text.name)
    given = scored(small, text, "Q4_0", imatrix=measured)
    assert weighed.losses.imatrix_sha256 == measured.sha256 == given.losses.imatrix_sha256
    assert weighed.losses.tensors == given.losses.tensors
    assert plain.losses.imatrix is None and plain.losses.tensors != weighed.losses.tensors


def test_statistics_give_losses_of_the_same_order(tmp_path):
    """The product of both means, for a model whose inputs and gradients are little correlated."""
    with open_source(families.write("qwen3", tmp_path / "model.gguf")) as source:
        text = drawn_windows(source, WindowSpec(32, 16))
        statistics = calibrate(source, text.windows, StatisticsOptions()).imatrix(source, text.name)
        product = score_by_statistics(source, statistics, ScoringOptions(("Q4_0",))).tensors
        exact = scored(source, text, "Q4_0", imatrix=statistics).losses.tensors
    both = [(p, e) for p, e in zip(product, exact, strict=True) if len(p.candidates) > 1]
    pairs = [(p.candidates[-1].loss, e.candidates[-1].loss) for p, e in both]
    ratios = np.array([p / e for p, e in pairs])
    assert len(pairs) > 10 and (ratios > 0.2).all() and (ratios < 5).all()


def test_statistics_without_gradients_are_refused(small):
    tokens = drawn_windows(small, WindowSpec(16, 2)).windows
    inputs_only = calibrate(small, tokens, StatisticsOptions(gradients=False)).imatrix(small, "text")
    with pytest.raises(BadInput, match="no gradients for tensor"):
        score_by_statistics(small, inputs_only, ScoringOptions(("Q8_0",)))


def test_a_layer_that_is_not_run_keeps_its_types(tmp_path):
    path = families.write("qwen3", tmp_path / "model.gguf", keys={"nextn_predict_layers": 1})
    with open_source(path) as source:
        losses = scored(source, drawn_windows(source, WindowSpec(16, 2)), "Q4_0").losses
    by_layer = {
        layer: {c.type for t in losses.tensors if t.layer == layer and t.role == "attn_q" for c in t.candidates}
        for layer in range(families.N_LAYERS)
    }
    assert by_layer == {0: {"F32", "Q4_0"}, 1: {"F32", "Q4_0"}, 2: {"F32"}}
    kept = next(t for t in losses.tensors if t.name == "blk.2.attn_q.weight")
    assert "loss is not known" in kept.skipped["Q4_0"]


def test_experts_that_saw_no_token_count_as_the_others(tmp_path):
    with open_source(families.write("mixtral", tmp_path / "model.gguf")) as source:
        tokens = np.full((1, 16), 7, np.int32)  # one token: hardly more than two of four experts
        found = scored(source, TokenWindows("one token", tokens), "Q8_0")
        unseen = found.statistics.n_unseen(source)
        assert unseen > 0 and any(note.startswith(f"{unseen} experts saw no token") for note in found.losses.notes)
        losses = {t.name: t.candidates[-1].loss for t in found.losses.tensors if t.role == "ffn_up_exps"}
    assert all(loss > 0 for loss in losses.values())


def test_what_cannot_be_run_is_known_before_it_is_run(tmp_path):
    unknown = File((pair("general.architecture", STR, "mamba"),)).write(tmp_path / "model.gguf")
    with open_source(unknown) as source:
        reason = find_run_obstacle(source)
    assert isinstance(reason, NotRun) and "does not know 'mamba'" in str(reason)


def test_a_tensor_that_the_layers_would_not_use_is_no_silent_difference(tmp_path):
    path = families.write("qwen3", tmp_path / "model.gguf", more=(Tensor("blk.1.attn_sinks.weight", (4,)),))
    with open_source(path) as source:
        assert "blk.1.attn_sinks.weight" in str(find_run_obstacle(source))

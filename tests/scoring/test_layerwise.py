"""Scoring: losses count the real encoders' errors, of all rows or of a sample that says how sure it is."""

from dataclasses import replace

import numpy as np
import pytest
from conversions import half, normal, single, small_model
from gguf_files import STR, U32, File, Tensor, pair
from real_models import IMATRIX, TINY

from requant.container.imatrix import importance_for, read_imatrix
from requant.container.source import open_source
from requant.errors import BadInput, NumericFault, UsageError
from requant.formats import by_name, codec
from requant.model.nonfinite import preserve_nonfinite
from requant.planning.constraints import Constraints, bpw_limit
from requant.planning.recipe import uniform_plan
from requant.planning.solver.solve import solve
from requant.scoring.candidates import check_requantization, survey_tensors
from requant.scoring.layerwise import score
from requant.scoring.losses import Losses
from requant.scoring.options import DEFAULT_TYPES, ScoringOptions
from requant.scoring.residual_shares import GAINS

Q, DOWN, EMBEDDING = "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "token_embd.weight"
# each has more bits and less error than the one before it
LADDERS = (("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"), ("Q4_0", "Q5_0", "Q8_0"), ("Q4_1", "Q5_1", "Q8_0"))


@pytest.fixture(scope="module")
def imatrix():
    return read_imatrix(IMATRIX)


@pytest.fixture(scope="module")
def losses(imatrix):
    """The tiny model with its imatrix, all types."""
    with open_source(TINY) as source:
        return score(source, ScoringOptions(imatrix=imatrix, threads=2))


@pytest.fixture(scope="module")
def data_free():
    """The tiny model without one."""
    with open_source(TINY) as source:
        return score(source, ScoringOptions(("Q2_K", "Q4_K"), threads=2))


def weights_of(source, name):
    tensor = source.tensor(name)
    return codec.dequantize(source.read_rows(tensor), tensor.format)


def error_energy(x, type_name, moments, importance=None):
    """sum_r sum_c moments_c (x - y)_rc^2 over the whole of `x`, in NumPy."""
    fmt = by_name(type_name)
    y = codec.dequantize(codec.quantize(x, fmt, importance), fmt)
    return float((moments.astype(np.float64) * (x.astype(np.float64) - y) ** 2).sum())


def energy(x, moments):
    return float((moments.astype(np.float64) * x.astype(np.float64) ** 2).sum())


def tensor_of(losses, name):
    return next(t for t in losses.tensors if t.name == name)


def by_type(losses, name):
    return {c.type: c for c in tensor_of(losses, name).candidates}


def scored(tmp_path, file, progress=lambda _: None, **options):
    with open_source(file.write(tmp_path / "model.gguf")) as source:
        return score(source, ScoringOptions(**options), progress)


def imatrix_of(tmp_path, entries):
    """entries: tensor name -> (n_matrices, n_per_row) mean squares."""
    tensors = []
    for name, values in entries.items():
        n_matrices, n_per_row = values.shape
        ones = np.ones(n_matrices, "<f4")
        tensors.append(Tensor(f"{name}.in_sum2", (n_per_row, n_matrices), 0, data=values.astype("<f4").tobytes()))
        tensors.append(Tensor(f"{name}.counts", (1, n_matrices), 0, data=ones.tobytes()))
    return read_imatrix(File((pair("general.type", STR, "imatrix"),), tuple(tensors)).write(tmp_path / "imatrix.gguf"))


# the figures


@pytest.mark.parametrize("name", [Q, "blk.4.attn_v.weight", "blk.9.ffn_down.weight"])
def test_losses_are_proportional_to_the_error_energy_of_the_whole_tensor(losses, imatrix, name):
    with open_source(TINY) as source:
        x = weights_of(source, name)
    importance = importance_for(imatrix, name, x.shape[::-1])[0]
    found = by_type(losses, name)
    assert set(found) == {"F16", *DEFAULT_TYPES}
    factor = found["Q4_K"].loss / error_energy(x, "Q4_K", importance, importance)
    for type_name in DEFAULT_TYPES:
        candidate = found[type_name]
        assert candidate.loss == pytest.approx(factor * error_energy(x, type_name, importance, importance), rel=1e-4)
        assert candidate.loss_error == 0
        assert candidate.n_bytes == by_name(type_name).n_bytes(x.size)
        fmt = by_name(type_name)
        y = codec.dequantize(codec.quantize(x, fmt, importance), fmt).astype(np.float64)
        assert candidate.rmse == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-4)


def test_losses_are_relative_errors_by_gain_and_share(data_free):
    """A layer of the tiny model against the sums written out: E[x^2] is gamma^2, or 1 behind no norm."""
    with open_source(TINY) as source:
        x, gamma = weights_of(source, Q), weights_of(source, "blk.0.attn_norm.weight")[0]
        added = [
            (layer, name, energy(weights_of(source, f"blk.{layer}.{name}.weight"), np.float32(1)))
            for layer in range(10)
            for name in ("attn_output", "ffn_down")
        ]
    total, first = sum(e for _, _, e in added), added[0][2]
    share = first / np.sqrt(first * total)
    relative = error_energy(x, "Q4_K", gamma**2) / energy(x, gamma**2)
    assert by_type(data_free, Q)["Q4_K"].loss == pytest.approx(GAINS["attn_q"] * share * relative, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("type_name", ["Q4_K", "Q2_K"])
def test_a_sample_is_within_four_standard_errors_of_the_whole(tmp_path, seed, type_name):
    rng = np.random.default_rng(seed)
    rows = rng.lognormal(0, 0.4, (6000, 1)) * (1 + np.linspace(-0.5, 0.5, 6000)[:, None])
    x = (0.02 * rows * rng.standard_normal((6000, 256))).astype(np.float16).astype(np.float32)
    file = small_model(half(Q, (256, 6000), x), single("blk.0.attn_norm.weight", (256,), np.ones(256)))
    candidate = by_type(scored(tmp_path, file, types=(type_name,)), Q)[type_name]
    ones = np.ones(256, np.float32)
    whole = GAINS["attn_q"] * error_energy(x, type_name, ones) / energy(x, ones)  # nothing is known of its share
    assert 0 < candidate.loss_error < 0.1 * whole and type(candidate.loss_error) is float
    assert abs(candidate.loss - whole) <= 4 * candidate.loss_error


def test_losses_fall_with_the_bits(losses):
    for tensor in losses.tensors:
        found = by_type(losses, tensor.name)
        for ladder in LADDERS if tensor.reason is None else ():
            figures = [found[t].loss for t in ladder]
            assert figures == sorted(figures, reverse=True) and figures[-1] > 0, tensor.name


def test_a_copy_costs_nothing_and_is_always_offered(losses):
    for tensor in losses.tensors:
        copy = tensor.candidates[0]
        assert (copy.type, copy.n_bytes, copy.loss) == (tensor.source_type, tensor.n_bytes, 0.0)
        assert tensor.reason is None or len(tensor.candidates) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_of_an_embedding_is_its_relative_error(tmp_path, tied):
    output = () if tied else (half("output.weight", (256, 20), seed=5),)
    file = small_model(half(EMBEDDING, (256, 20), seed=4), half(Q, (256, 8)), half(DOWN, (512, 8), seed=3), *output)
    found = by_type(scored(tmp_path, file, types=("Q4_K", "Q8_0")), EMBEDDING)
    for type_name in ("Q4_K", "Q8_0"):
        assert found[type_name].rmse > 0
        want = GAINS["token_embd"] * found[type_name].rmse ** 2
        assert found[type_name].loss == pytest.approx(want, rel=1e-4)


def test_each_expert_counts_with_its_own_inputs_and_its_share_of_the_tokens(tmp_path):
    name, n_experts, used = "blk.0.ffn_down_exps.weight", 4, 2
    values = (
        np.random.default_rng(1).gamma(0.5, 1.0, (n_experts, 256)).astype(np.float32) * 10.0 ** np.arange(4)[:, None]
    )
    file = small_model(half(name, (256, 8, n_experts)), pairs=(pair("llama.expert_used_count", U32, used),))
    path = file.write(tmp_path / "model.gguf")
    with open_source(path) as source:
        found = by_type(score(source, ScoringOptions(("Q4_K",), imatrix_of(tmp_path, {name: values}))), name)
        x = weights_of(source, name).reshape(n_experts, 8, 256)
    errors = sum(error_energy(x[e], "Q4_K", values[e], values[e]) for e in range(n_experts))
    relative = errors / sum(energy(x[e], values[e]) for e in range(n_experts))  # experts share alike
    assert found["Q4_K"].loss == pytest.approx(GAINS["ffn_down"] * relative, rel=1e-4)


def test_experts_are_sampled_in_proportion(tmp_path):
    name, n_experts = "blk.0.ffn_up_exps.weight", 8
    x = normal((256, 400, n_experts)) * np.repeat(np.arange(1, 9), 400)[:, None]
    x = x.astype(np.float16).astype(np.float32)
    file = small_model(half(name, (256, 400, n_experts), x), pairs=(pair("llama.expert_used_count", U32, 8),))
    values = np.ones((n_experts, 256), np.float32) * np.arange(8, 0, -1)[:, None]
    path = file.write(tmp_path / "model.gguf")
    with open_source(path) as source:
        candidate = by_type(score(source, ScoringOptions(("Q4_K",), imatrix_of(tmp_path, {name: values}))), name)[
            "Q4_K"
        ]
    parts = x.reshape(n_experts, 400, 256)
    whole = sum(error_energy(parts[e], "Q4_K", values[e]) for e in range(n_experts))
    whole *= GAINS["ffn_up"] / sum(energy(parts[e], values[e]) for e in range(n_experts))
    assert candidate.loss_error > 0 and abs(candidate.loss - whole) <= 4 * candidate.loss_error


# the same result


def test_any_number_of_threads_finds_the_same(losses, imatrix):
    with open_source(TINY) as source:
        for threads in (1, 3):
            types = ("Q2_K", "Q6_K")
            again = score(source, ScoringOptions(types, imatrix, threads=threads))
            for tensor, other in zip(losses.tensors, again.tensors, strict=True):
                few = tuple(c for c in tensor.candidates if c.type in (*types, tensor.source_type))
                skipped = {t: why for t, why in tensor.skipped.items() if t in types}
                assert replace(tensor, candidates=few, skipped=skipped) == other


def test_losses_read_from_json_give_the_same_plan(losses):
    read = Losses.from_json(losses.to_json())
    assert read == losses
    for bpw in (3.2, 4.5, 6.0):
        request = Constraints((bpw_limit(bpw, losses),))
        assert solve(read, request).to_json() == solve(losses, request).to_json()


def test_losses_say_what_they_were_made_from(losses, data_free, imatrix):
    assert (losses.method, losses.imatrix, losses.imatrix_sha256) == ("cfix", "imatrix.gguf", imatrix.sha256)
    assert (data_free.method, data_free.imatrix, data_free.notes) == ("dfix", None, ())
    assert losses.source == "tiny-llama-f16.gguf" and losses.arch == "llama"


def test_progress_counts_the_bytes_of_what_is_scored(tmp_path):
    done = []
    found = scored(tmp_path, small_model(), types=("Q8_0",), progress=done.append)
    assert sum(done) == sum(t.n_bytes for t in found.tensors if t.reason is None)


# notes and refusals


def test_what_the_imatrix_does_not_cover_is_noted(losses):
    assert losses.notes == ("the imatrix does not cover 2 of 72 tensors; theirs is worked out from the weights",)


def test_types_of_no_fewer_bits_than_the_source_are_left_out(tmp_path):
    data = codec.quantize(normal((256, 8)), by_name("Q8_0")).tobytes()
    file = small_model(Tensor(Q, (256, 8), 8, data=data))
    tensor = tensor_of(scored(tmp_path, file, types=("BF16", "F16", "F32", "Q8_0", "Q6_K")), Q)
    assert [c.type for c in tensor.candidates] == ["Q8_0", "Q6_K"]
    assert set(tensor.skipped.values()) == {"no fewer bits than the source's Q8_0"}
    assert set(tensor.skipped) == {"BF16", "F16", "F32"}


def test_quantized_tensors_are_copied_unless_allowed_and_a_model_of_nothing_else_is_refused(tmp_path):
    data = codec.quantize(normal((256, 8)), by_name("Q4_K")).tobytes()
    rounded = Tensor(Q, (256, 8), 12, data=data)
    with pytest.raises(BadInput, match=r"1 of its tensors \(89% of the weights\).*got Q4_K.*--allow-requantize"):
        scored(tmp_path, small_model(rounded), types=("Q3_K",))
    file = small_model(rounded, half(DOWN, (256, 8)))
    copied = scored(tmp_path, file, types=("Q3_K",))
    assert copied.notes == (
        "1 of its tensors (47% of the weights) are already quantized below Q8_0 and are copied; "
        "--allow-requantize would round them twice",
    )
    assert [*by_type(copied, Q)] == ["Q4_K"] and "Q3_K" in by_type(copied, DOWN)
    allowed = scored(tmp_path, file, types=("Q3_K",), allow_requantize=True)
    assert len(allowed.notes) == 1 and "losses count from what is left of them" in allowed.notes[0]
    assert by_type(allowed, Q)["Q3_K"].loss > by_type(allowed, Q)["Q4_K"].loss == 0


def test_a_quantized_tensor_that_stays_as_it_is_needs_no_permission(tmp_path):
    data = codec.quantize(normal((256, 8)), by_name("Q4_K")).tobytes()
    file = small_model(Tensor("blk.0.ffn_gate_inp.weight", (256, 8), 12, data=data), half(Q, (256, 8)))
    assert scored(tmp_path, file, types=("Q8_0",)).notes == ()


def test_rows_that_a_block_does_not_divide_name_the_fallback(tmp_path):
    tensor = tensor_of(scored(tmp_path, small_model(half(Q, (96, 40))), types=("Q4_K", "Q5_0")), Q)
    assert tensor.skipped == {"Q4_K": "a row of 96 weights is no multiple of the block of 256"}
    assert [c.type for c in tensor.candidates] == ["F16", "Q5_0"]


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_types_that_cannot_hold_the_weights_are_left_out(tmp_path, size):
    x = normal((256, 8), scale=size)
    tensor = tensor_of(scored(tmp_path, small_model(single(Q, (256, 8), x)), types=("BF16", "F16", "Q8_0")), Q)
    assert [c.type for c in tensor.candidates] == ["F32", "BF16"]
    assert all(why.startswith("it cannot represent the weights: row 0 is lost") for why in tensor.skipped.values())
    assert set(tensor.skipped) == {"F16", "Q8_0"}


@pytest.mark.parametrize("n_rows", [8, 6000], ids=["whole", "sampled"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_a_fault_that_names_the_first(tmp_path, value, n_rows):
    x = normal((256, n_rows))
    row = 5 if n_rows == 8 else 3000
    x[row:, 17] = value
    with pytest.raises(NumericFault, match=r"tensor 'blk\.0\.attn_q\.weight' is not finite") as fault:
        scored(tmp_path, small_model(half(Q, (256, n_rows), x)), types=("Q8_0",))
    assert fault.value.got == value or np.isnan(value)
    count, index = n_rows - row, 256 * row + 17
    assert f"{count} of {x.size} weights, the first at weight {index}" in fault.value.what


def test_losses_of_a_file_without_the_name_of_a_text_read_back(data_free):
    text = data_free.to_json()
    for later in (',\n  "calibration_text": null', ',\n  "imatrix_file": null', '\n  "loss_unit": "points",'):
        assert later in text
        assert Losses.from_json(text.replace(later, "")) == data_free == Losses.from_json(text)


def test_a_type_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"I8 cannot be written; choose among Q4_0, "):
        scored(tmp_path, small_model(), types=("I8",))


def test_an_imatrix_of_other_shapes_is_refused(tmp_path):
    measured = imatrix_of(tmp_path, {Q: np.ones((1, 512), np.float32)})
    with pytest.raises(BadInput, match="made for another model"):
        scored(tmp_path, small_model(half(Q, (256, 8))), types=("Q8_0",), imatrix=measured)


def test_importance_of_zeros_says_nothing(tmp_path):
    measured = imatrix_of(tmp_path, {Q: np.zeros((1, 256), np.float32)})
    file = small_model(half(Q, (256, 8)))
    found = scored(tmp_path, file, types=("Q4_K",), imatrix=measured)
    assert found.tensors == scored(tmp_path, file, types=("Q4_K",)).tensors
    assert "does not cover 1 of 1" in found.notes[0]


@pytest.mark.parametrize("quick", [True, False])
def test_tensors_that_are_kept_for_what_they_hold_get_no_other_type(tmp_path, quick):
    x = normal((256, 8))
    x[3, 5] = np.nan
    norm = single("blk.0.attn_norm.weight", (256,), np.full(256, np.inf))
    path = small_model(half(Q, (256, 8), x), half(DOWN, (256, 8)), norm).write(tmp_path / "model.gguf")
    with open_source(path) as source:
        assert len(preserve_nonfinite(source)) == 2
        found = score(source, ScoringOptions(("Q8_0",))).tensors if quick else survey_tensors(source, types=("Q8_0",))
        kept = {t.name: t.reason for t in found if [c.type for c in t.candidates] == [t.source_type]}
        assert kept[Q] == "1 weights are not finite, the first at weight 773"
        assert kept["blk.0.attn_norm.weight"] == "256 weights are not finite, the first at weight 0"
        assert DOWN not in kept
        uniform = uniform_plan(source, "Q8_0").types()
        assert (uniform[Q], uniform[DOWN]) == ("F16", "Q8_0")


def test_a_norm_that_is_not_finite_is_a_fault_of_scoring(tmp_path):
    norm = single("blk.0.attn_norm.weight", (256,), np.full(256, np.inf))
    with pytest.raises(NumericFault, match=r"attn_norm.*256 of 256 weights"):
        scored(tmp_path, small_model(half(Q, (256, 8)), norm), types=("Q8_0",))


def test_types_whose_scale_the_weights_are_beyond_are_left_out(tmp_path):
    x = normal((256, 8), scale=1e5)
    tensor = tensor_of(scored(tmp_path, small_model(single(Q, (256, 8), x)), types=("TQ2_0", "Q6_K")), Q)
    assert [c.type for c in tensor.candidates] == ["F32", "Q6_K"]
    assert "it cannot represent the weights: relative error" in tensor.skipped["TQ2_0"]


# the survey


def test_a_survey_knows_the_types_and_sizes_that_scoring_measures(losses, imatrix):
    with open_source(TINY) as source:
        surveyed = survey_tensors(source, imatrix=imatrix)
        assert check_requantization(source, surveyed) == []
    for tensor, measured in zip(surveyed, losses.tensors, strict=True):
        assert [(c.type, c.n_bytes) for c in tensor.candidates] == [(c.type, c.n_bytes) for c in measured.candidates]
        assert {c.loss for c in tensor.candidates} == {0.0}
        assert (tensor.reason, tensor.role, tensor.on_gpu) == (measured.reason, measured.role, measured.on_gpu)


def test_tensors_that_stay_as_they_are_say_why(losses):
    kept = {t.role: t.reason for t in losses.tensors if t.reason is not None}
    assert kept == {"norm": "it is a vector, not a matrix"}
    assert [t.name for t in losses.tensors if not t.on_gpu] == [EMBEDDING]

"""Second-level scales of NVFP4: written where the engine applies them, honoured where the source has them."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from conversions import choice, convert, half, normal, plan_for, plan_of, single, small_model, verify
from gguf_files import ARCHITECTURE, ARR, BOOL, STR, Tensor, pair

from requant.container.source import open_source
from requant.container.splitting import total_size
from requant.conversion.record import record_path
from requant.formats import by_name, codec
from requant.model.weight_scales import read_weight_scales
from requant.planning.output_layout import output_layouts
from requant.planning.planner import Planner
from requant.planning.request import PlanRequest
from requant.scoring.layerwise import score
from requant.scoring.options import ScoringOptions

Q, UP, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up.weight", "blk.0.ffn_up_exps.weight"
Q_SCALE, EXPERTS_SCALE = "blk.0.attn_q.scale", "blk.0.ffn_up_exps.scale"


def weights(source, name):
    """(n_rows, n_per_row): the weights that the engine uses, scales included."""
    tensor = source.tensor(name)
    x, scales = codec.dequantize(source.read_rows(tensor), tensor.format), read_weight_scales(source, tensor)
    return x if scales is None else x * scales[np.arange(len(x)) * len(scales) // len(x)][:, None]


def error(before, after):
    return np.sqrt(((before - after) ** 2).sum() / (before**2).sum())


@contextmanager
def converted(tmp_path, model, *types):
    """Source and output, which verifies."""
    with open_source(model.write(tmp_path / "source.gguf")) as source:
        made = convert(source, plan_for(source, *types), tmp_path / "out.gguf", threads=2, force=True)
        record_path(made.output).write_text(made.to_json())
        assert verify(made.output, source=source).findings == ()
        record_path(made.output).unlink()
        assert verify(made.output, source=source).findings == ()
        with open_source(made.output) as out:
            assert [t.name for t in made.tensors] == [t.name for t in out.tensors]
            yield source, out


@pytest.mark.parametrize("size", [1e-5, 0.02, 30.0])
def test_a_matrix_is_kept_whatever_the_size_of_its_weights(tmp_path, size):
    model = small_model(single(Q, (256, 64), normal((256, 64), scale=size)))
    with converted(tmp_path, model, "NVFP4") as (source, out):
        assert [t.name for t in out.tensors] == ["output_norm.weight", Q, Q_SCALE]
        assert error(weights(source, Q), weights(out, Q)) < 0.085
        peak = np.abs(weights(source, Q)).max()
        assert read_weight_scales(out, out.tensor(Q)) == pytest.approx(peak / (6 * 448))


def test_without_a_scale_the_same_weights_would_be_lost():
    x, nvfp4 = normal((256, 64), scale=1e-5), by_name("NVFP4")
    assert error(x, codec.dequantize(codec.quantize(x, nvfp4), nvfp4)) > 0.9


def test_a_graph_that_applies_no_scale_gets_none(tmp_path):
    model = small_model(half(UP, (256, 64)), half(Q, (256, 64), seed=1))
    keys = (pair(ARCHITECTURE, STR, "gemma3"), *model.pairs[1:])
    with converted(tmp_path, replace(model, pairs=keys), "NVFP4") as (_, out):
        assert [t.name for t in out.tensors][1:] == [UP, Q, Q_SCALE]


def experts(sizes, shape=(256, 8)):
    values = [normal(shape, seed=i, scale=size) for i, size in enumerate(sizes)]
    return half(EXPERTS, (*shape, len(sizes)), np.concatenate(values))


def test_each_expert_has_its_own_scale(tmp_path):
    sizes = (0.001, 0.02, 1.0, 0.3)
    with converted(tmp_path, small_model(experts(sizes)), "NVFP4") as (source, out):
        assert out.tensor(EXPERTS_SCALE).shape == (4,)
        before, after = weights(source, EXPERTS), weights(out, EXPERTS)
        for rows in np.split(np.arange(len(before)), 4):
            assert error(before[rows], after[rows]) < 0.085


def test_an_expert_of_zeros_stays_zero(tmp_path):
    with converted(tmp_path, small_model(experts((0.0, 0.02))), "NVFP4") as (_, out):
        assert not weights(out, EXPERTS)[:8].any()
        assert np.isfinite(read_weight_scales(out, out.tensor(EXPERTS))).all()


@pytest.mark.parametrize("type_name", ["Q4_K", "Q8_0", "NVFP4"])
def test_a_scale_of_the_source_still_counts(tmp_path, type_name):
    scale = Tensor(Q_SCALE, (1,), 0, data=np.float32([0.25]).tobytes())
    model = small_model(half(Q, (256, 64)), scale)
    with converted(tmp_path, model, type_name) as (source, out):
        assert [t.name for t in out.tensors] == [t.name for t in source.tensors]
        assert error(weights(source, Q), weights(out, Q)) < 0.085
        assert (read_weight_scales(out, out.tensor(Q)) == read_weight_scales(source, source.tensor(Q))) == (
            type_name != "NVFP4"
        )


def test_what_is_nvfp4_already_is_copied_with_its_scale(tmp_path):
    with converted(tmp_path, small_model(half(Q, (256, 64))), "NVFP4") as (_, out):
        again = convert(out, plan_for(out), tmp_path / "again.gguf")
        with open_source(again.output) as copy:
            assert all(np.array_equal(copy.read_rows(t), out.read_rows(out.tensor(t.name))) for t in copy.tensors)


def test_a_wrong_scale_is_found_without_the_record(tmp_path):
    with converted(tmp_path, small_model(half(Q, (256, 64))), "NVFP4") as (source, out):
        offset = out.opened[0].header.data_start + out.tensor(Q_SCALE).info.offset
        data = bytearray(out.path.read_bytes())
        data[offset : offset + 4] = np.float32([0.5]).tobytes()
        out.path.write_bytes(data)
        line, digest = verify(out.path, source=source).findings
        assert f"'{Q}'" in line and "lost" in line
        assert digest == f"tensor '{Q_SCALE}' is not as it was written, by its digest in the metadata"


def test_a_scale_of_the_source_counts_in_the_losses(tmp_path):
    """A block that adds a hundred times less to the residual is a smaller share of it."""
    names = ("blk.0.attn_output.weight", "blk.0.ffn_down.weight")
    matrices = [half(name, (1024, 1024), seed=i) for i, name in enumerate(names)]
    scale = Tensor("blk.0.attn_output.scale", (1,), 0, data=np.float32([0.01]).tobytes())
    losses = []
    for tensors in (matrices, (*matrices, scale)):
        with open_source(small_model(*tensors).write(tmp_path / "source.gguf")) as source:
            found = score(source, ScoringOptions(("Q4_K",))).tensors
        losses.append({t.name: t.candidates[-1].loss for t in found if t.name in names})
    assert losses[1][names[0]] < 0.02 * losses[0][names[0]]
    assert losses[1][names[1]] > losses[0][names[1]]


def test_scoring_counts_the_second_level(tmp_path):
    values = normal((1024, 1024), scale=1e-5)
    with open_source(small_model(single(Q, (1024, 1024), values)).write(tmp_path / "source.gguf")) as source:
        (scored,) = (t for t in score(source, ScoringOptions(("NVFP4",))).tensors if t.name == Q)
    assert scored.candidates[-1].type == "NVFP4" and scored.candidates[-1].rmse < 0.085


@pytest.mark.parametrize("size", [60_000, 75_000, 100_000])
def test_a_size_counts_the_scales(tmp_path, size):
    matrices = [half(f"blk.{i}.attn_q.weight", (1024, 64), seed=i) for i in range(2)]
    with open_source(small_model(*matrices).write(tmp_path / "source.gguf")) as source:
        choices = [choice(t, "NVFP4" if t.shape[1:] else "F32") for t in source.tensors]
        n_bytes = total_size(output_layouts(source, plan_of(source, choices)))
        losses = score(source, ScoringOptions(("NVFP4", "Q3_K", "Q8_0")))
        plan = Planner(source, losses).best(PlanRequest(size=max(size, n_bytes)))
        assert total_size(output_layouts(source, plan)) <= max(size, n_bytes)


def test_what_is_said_of_activations_is_pruned_with_the_types(tmp_path):
    names = pair("general.tensor_extra.name", ARR, (STR, [Q, UP]))
    allowed = pair("general.tensor_extra.prec_a4", ARR, (BOOL, [False, True]))
    model = small_model(half(Q, (256, 64)), half(UP, (256, 64), seed=1), pairs=(names, allowed))
    with converted(tmp_path, model, "NVFP4", "Q4_K") as (_, out):
        assert out.metadata.get_list("general.tensor_extra.name") == [Q]
        assert out.metadata.get_list("general.tensor_extra.prec_a4") == [False]
    with converted(tmp_path, model, "Q4_K") as (_, out):
        assert "general.tensor_extra.name" not in out.metadata

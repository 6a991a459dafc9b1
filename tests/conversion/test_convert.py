"""Conversions: the same bytes at any number of threads, only planned changes, and no files left by a failure."""

import json
import os
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ggml
import numpy as np
import pytest
from conversions import NORM, choice, convert, half, normal, plan_for, plan_of, single, small_model, verify
from gguf_files import ARCHITECTURE, I32, STR, U32, File, Tensor, pair, split_pairs
from hypothesis import given
from hypothesis import strategies as st
from real_models import IMATRIX, TINY

from requant.container.imatrix import importance_for, read_imatrix
from requant.container.infos import TensorInfo
from requant.container.source import SourceTensor, open_source
from requant.conversion.chunks import COPY_BYTES, TensorJob, split_into_chunks
from requant.conversion.convert import count_progress_bytes
from requant.conversion.record import Conversion, record_path
from requant.errors import BadInput, InputOutputError, NumericFault, OutputRefused, SourceChanged
from requant.formats import FORMATS, KERNELS, Effort, by_name, codec
from requant.model.nonfinite import preserve_nonfinite
from requant.planning.output_layout import output_layouts
from requant.planning.output_metadata import may_differ
from requant.scoring.losses import Losses

TYPES = ("Q4_K", "Q6_K", "Q8_0", "Q4_0")
Q = "blk.0.attn_q.weight"
UNFINISHED = ("out.gguf.part", "out.gguf.part.journal")


@pytest.fixture(scope="module")
def imatrix():
    return read_imatrix(IMATRIX)


@pytest.fixture(scope="module")
def made(tmp_path_factory, imatrix):
    """The tiny model in four types."""
    with open_source(TINY) as source:
        out = tmp_path_factory.mktemp("made") / "out.gguf"
        return convert(source, plan_for(source, *TYPES), out, imatrix=imatrix, threads=2)


@contextmanager
def opened(tmp_path, file):
    with open_source(file.write(tmp_path / "source.gguf")) as source:
        yield source


def nothing_but(tmp_path, *names):
    return sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("threads", [1, 7])
def test_any_number_of_threads_writes_the_same_bytes(tmp_path, made, imatrix, threads):
    with open_source(TINY) as source:
        again = convert(source, made.plan, tmp_path / "out.gguf", imatrix=imatrix, threads=threads)
    assert again.output.read_bytes() == made.output.read_bytes()
    assert again.to_json() == made.to_json()


def test_ggml_opens_the_output_and_finds_the_planned_types(made):
    found = ggml.file_tensors(made.output)
    assert {name: FORMATS[type_id].name for name, (type_id, _, _) in found.items()} == made.plan.types()
    with open_source(made.output) as target:
        for tensor in target.tensors:
            _, offset, n_bytes = found[tensor.name]
            assert made.output.read_bytes()[offset : offset + n_bytes] == target.read_rows(tensor).tobytes()
        assert target.files[0].stat().st_size == made.size
        assert target.header_sha256 == made.header_sha256


def test_every_tensor_is_what_the_codec_gives_for_the_whole_of_it(made, imatrix):
    with open_source(TINY) as source, open_source(made.output) as target:
        for tensor, planned in zip(source.tensors, made.plan.choices, strict=True):
            rows = source.read_rows(tensor)
            if not planned.copied:
                importance = importance_for(imatrix, tensor.name, tensor.shape)
                x = codec.dequantize(rows, tensor.format)
                rows = codec.quantize(x, by_name(planned.type), None if importance is None else importance[0])
            assert np.array_equal(target.read_rows(target.tensor(tensor.name)), rows), tensor.name


def test_metadata_is_the_source_s_byte_for_byte_but_for_the_labels(made):
    with open_source(TINY) as source, open_source(made.output) as target:
        kept = [key for key in source.metadata if not may_differ(key)]
        assert [key for key in target.metadata if not may_differ(key)] == kept
        assert all(source.metadata.values[key] == target.metadata.values[key] for key in kept)
        assert target.metadata.get("general.file_type") == 18  # most bytes are Q6_K or Q8_0
        assert target.metadata.get("general.quantization_version") == 2
        assert target.metadata.get("quantize.imatrix.file") == "imatrix.gguf"
        assert target.metadata.get("quantize.imatrix.dataset") == "calibration.txt"
        assert target.metadata.get("quantize.imatrix.entries_count") == 70
        assert target.metadata.get("quantize.imatrix.chunks_count") == 28
        assert target.metadata.get("requant.plan_sha256") == made.plan.sha256()
        assert target.metadata.get("requant.source.header_sha256") == source.header_sha256


def test_measured_errors_are_those_of_the_tensor(made):
    with open_source(TINY) as source, open_source(made.output) as target:
        for tensor in made.tensors:
            a = source.tensor(tensor.name)
            b = target.tensor(tensor.name)
            x, y = (codec.dequantize(s.read_rows(t), t.format) for s, t in ((source, a), (target, b)))
            true = np.linalg.norm((x - y).astype(float)) / np.linalg.norm(x.astype(float))
            assert tensor.rmse_unweighted == pytest.approx(true, rel=1e-5, abs=1e-9)
            assert (tensor.rmse == 0) == (tensor.type == tensor.source_type)


def test_the_header_is_known_before_anything_is_written(made, imatrix):
    with open_source(TINY) as source:
        (layout,) = output_layouts(source, made.plan, imatrix)
    assert layout.size == made.size
    assert layout.begins(made.output.read_bytes())


def test_progress_counts_every_byte_read_and_every_byte_read_again(tmp_path):
    done = []
    with opened(tmp_path, small_model()) as source:
        convert(source, plan_for(source, "Q8_0"), tmp_path / "out.gguf", progress=done.append)
        assert (
            sum(done) == count_progress_bytes(source, plan_for(source, "Q8_0")) > sum(t.n_bytes for t in source.tensors)
        )


def test_each_expert_is_weighted_by_its_own_importance(tmp_path):
    name, shape = "blk.0.ffn_down_exps.weight", (256, 8, 3)
    importance = np.random.default_rng(3).lognormal(0, 2, (3, 256)).astype("<f4")
    sums = Tensor(f"{name}.in_sum2", (256, 3), 0, data=importance.tobytes())
    counts = Tensor(f"{name}.counts", (1, 3), 0, data=np.ones(3, "<f4").tobytes())
    matrix = read_imatrix(File((pair("general.type", STR, "imatrix"),), (sums, counts)).write(tmp_path / "i.gguf"))
    with opened(tmp_path, small_model(half(name, shape))) as source:
        convert(source, plan_for(source, "Q4_K"), tmp_path / "out.gguf", imatrix=matrix)
        x = codec.dequantize(source.read_rows(source.tensor(name)), by_name("F16"))
    with open_source(tmp_path / "out.gguf") as target:
        rows = target.read_rows(target.tensor(name))
    for expert in range(3):
        own = slice(8 * expert, 8 * expert + 8)
        assert np.array_equal(rows[own], codec.quantize(x[own], by_name("Q4_K"), importance[expert]))
    assert not np.array_equal(rows[8:16], codec.quantize(x[8:16], by_name("Q4_K"), importance[0]))


dims = st.integers(1, 40)


@given(st.integers(1, 2**21), dims, st.integers(1, 5), st.sampled_from(["F16", "Q8_0"]), st.booleans())
def test_chunks_cover_each_row_once_and_never_two_experts(n_per_row, n_rows, n_experts, type_name, weighted):
    shape = (32 * (n_per_row // 32 + 1), 100 * n_rows, n_experts)
    tensor = SourceTensor(TensorInfo("blk.0.ffn_up_exps.weight", shape, by_name("F16").type_id, 0), 0)
    importance = np.ones((n_experts, 1), np.float32) if weighted else None
    chunks = list(
        split_into_chunks(
            TensorJob(tensor, choice(tensor, type_name), by_name(type_name), 0, 0, importance, Effort.DEFAULT)
        )
    )
    rows = [row for c in chunks for row in range(c.first_row, c.first_row + c.n_rows)]
    assert rows == list(range(tensor.n_rows))
    assert all(c.n_rows == 1 or c.n_rows * tensor.row_bytes <= COPY_BYTES for c in chunks)
    if weighted and type_name == "Q8_0":
        assert all(c.first_row // shape[1] == (c.first_row + c.n_rows - 1) // shape[1] for c in chunks)


def test_shards_are_merged(tmp_path):
    keys = (pair(ARCHITECTURE, STR, "llama"), pair("general.name", STR, "shards"))
    first = File((*keys, *split_pairs(0, 2, 3)), (half(Q, (256, 4)), single(NORM, (256,))))
    second = File(split_pairs(1, 2, 3), (half("blk.1.attn_q.weight", (256, 4), seed=2),))
    path = first.write(tmp_path / "m-00001-of-00002.gguf")
    second.write(tmp_path / "m-00002-of-00002.gguf")
    with open_source(path) as source:
        convert(source, plan_for(source), tmp_path / "copy.gguf")
        with open_source(tmp_path / "copy.gguf") as target:
            assert [t.name for t in target.tensors] == [t.name for t in source.tensors]
            for tensor in source.tensors:
                assert np.array_equal(source.read_rows(tensor), target.read_rows(target.tensor(tensor.name)))
            assert not [key for key in target.metadata if key.startswith("split.")]
            assert target.metadata.get("general.name") == "shards"


def test_a_second_conversion_does_not_keep_the_labels_of_the_first(tmp_path, imatrix):
    with open_source(TINY) as source:
        convert(source, plan_for(source, "Q8_0"), tmp_path / "a.gguf", imatrix=imatrix)
    with open_source(tmp_path / "a.gguf") as source:
        convert(source, plan_for(source), tmp_path / "copied.gguf")
        convert(source, plan_for(source, "Q4_0"), tmp_path / "again.gguf")
        first = source.metadata
        with open_source(tmp_path / "copied.gguf") as copied, open_source(tmp_path / "again.gguf") as again:
            assert copied.metadata.get("general.file_type") == first.get("general.file_type") == 7
            assert copied.metadata.get("quantize.imatrix.file") == "imatrix.gguf"
            assert copied.metadata.get("requant.source.name") == "a.gguf"
            assert again.metadata.get("general.file_type") == 2
            assert "quantize.imatrix.file" not in again.metadata


def test_integers_scalars_and_empty_tensors_are_copied_blind(tmp_path):
    whole = Tensor("d2t", (5,), 27, data=np.arange(-3, 2, dtype="<i8").tobytes())
    empty = Tensor("blk.0.nothing", (0, 4), 0, data=b"")
    scalar = Tensor("blk.0.scale", (), 0, data=np.float32(3).tobytes())
    file = small_model(replace(whole, type_id=27), scalar, empty)
    infos, offset = [], 0
    for tensor, size in zip(file.tensors, (1024, 64, 32, 0), strict=True):
        infos.append(tensor.info(offset))
        offset += size
    with opened(tmp_path, replace(file, infos=tuple(infos))) as source:
        made = convert(source, plan_for(source), tmp_path / "out.gguf")
        assert [t.n_bytes for t in made.tensors] == [1024, 40, 4, 0]
        with open_source(made.output) as target:
            assert target.read_rows(target.tensor("d2t")).tobytes() == whole.data
            assert target.read_rows(target.tensor("blk.0.scale")).tobytes() == scalar.data


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type_name", ["Q8_0", "F16"])
def test_a_source_that_is_not_finite_is_refused_and_what_was_done_is_kept(tmp_path, value, type_name):
    values = normal((256, 12))
    values[5, 17] = values[9, 200:] = value
    with opened(tmp_path, small_model(half(Q, (256, 12), values))) as source:
        plan = plan_for(source, type_name)
        said = rf"'{Q}' is not finite: 57 of 3072 weights, the first at weight {5 * 256 + 17} \(got {value}\)"
        with pytest.raises(NumericFault, match=said):
            convert(source, plan, tmp_path / "out.gguf")
    assert nothing_but(tmp_path, "source.gguf", *UNFINISHED)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_first_weight_that_is_not_finite_is_named_whichever_chunk_meets_one(tmp_path, monkeypatch, threads):
    monkeypatch.setattr("requant.conversion.chunks.CHUNK_WEIGHTS", 256)
    values = normal((256, 64))
    values[20:60, 3] = np.inf
    with opened(tmp_path, small_model(half(Q, (256, 64), values))) as source:
        said = rf"40 of 16384 weights, the first at weight {20 * 256 + 3} "
        with pytest.raises(NumericFault, match=said):
            convert(source, plan_for(source, "Q8_0"), tmp_path / "out.gguf", threads=threads)


def test_copies_that_are_to_be_kept_may_be_not_finite_and_are_noted(tmp_path):
    values = normal((256, 12))
    values[5, 17], values[9, 200:] = -np.inf, np.nan
    with opened(tmp_path, small_model(half(Q, (256, 12), values), half("blk.0.attn_k.weight", (256, 12)))) as source:
        assert preserve_nonfinite(source) == [
            f"tensor '{Q}' stays as it is: 57 weights are not finite, the first at weight 1297"
        ]
        with pytest.raises(NumericFault):
            convert(source, plan_for(source, "Q8_0"), tmp_path / "other.gguf")
        choices = [
            choice(t, "F16" if t.name == Q else "Q8_0") if t.n_rows > 1 else choice(t, "F32") for t in source.tensors
        ]
        made = convert(source, plan_of(source, choices), tmp_path / "out.gguf")
        assert made.notes == (f"tensor '{Q}' was copied with 57 weights that are not finite, the first at weight 1297",)
        (odd,) = (t.odd for t in made.tensors if t.odd is not None)
        assert (odd.nonfinite, odd.first_nonfinite) == (57, 1297)
        with open_source(made.output) as target:
            assert np.array_equal(target.read_rows(target.tensor(Q)), source.read_rows(source.tensor(Q)))
        assert Conversion.from_json(made.to_json()).tensors == made.tensors
        record_path(made.output).write_text(made.to_json())
        assert verify(made.output, source=source).ok
        record_path(made.output).unlink()
        assert verify(made.output).findings == (f"tensor '{Q}': 57 weights are not finite, the first at weight 1297",)


def test_rows_that_are_next_to_nothing_become_zero_and_are_noted(tmp_path):
    values = normal((256, 12))
    values[7:9] *= 1e-24
    with opened(tmp_path, small_model(single(Q, (256, 12), values))) as source:
        made = convert(source, plan_for(source, "Q4_0"), tmp_path / "out.gguf")
        assert made.notes == (f"2 rows of tensor '{Q}' are so small that they became zero",)
        assert verify(made.output, source=source).ok


def test_weights_beyond_the_largest_scale_are_refused_where_one_bit_hides_it(tmp_path, imatrix):
    values = normal((256, 12), scale=1e5)
    with opened(tmp_path, small_model(single(Q, (256, 12), values))) as source:
        with pytest.raises(NumericFault, match=rf"'{Q}' as TQ2_0, relative error \(got 0.*, limit 0.566\)"):
            convert(source, plan_for(source, "TQ2_0"), tmp_path / "other.gguf")
        convert(source, plan_for(source, "Q6_K"), tmp_path / "out.gguf")


def test_a_row_that_the_type_cannot_hold_is_refused_with_a_way_out(tmp_path):
    values = normal((256, 12))
    values[7] *= 1e-7  # below the least scale of a half
    with opened(tmp_path, small_model(single(Q, (256, 12), values))) as source:
        with pytest.raises(NumericFault, match=rf"'{Q}' as Q4_0, row 7 is lost.*--tensor-type '\^{Q}\$=f32' keeps"):
            convert(source, plan_for(source, "Q4_0"), tmp_path / "a.gguf")
        with pytest.raises(NumericFault, match=rf"row 7 is lost.*--tensor-type '\^{Q}\$=f32' keeps"):
            convert(source, plan_for(source, "F16"), tmp_path / "b.gguf")
        convert(source, plan_for(source), tmp_path / "c.gguf")
    left = [f"{name}.gguf.part{more}" for name in "ab" for more in ("", ".journal")]
    assert nothing_but(tmp_path, "source.gguf", "c.gguf", *left)


def test_an_error_beyond_the_type_s_ceiling_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "GATE", 0.5)
    with opened(tmp_path, small_model()) as source, pytest.raises(NumericFault) as caught:
        convert(source, plan_for(source, "Q4_0"), tmp_path / "out.gguf")
    assert f"'{Q}' as Q4_0, relative error" in str(caught.value)
    assert caught.value.limit == f"{0.5 * by_name('Q4_0').gaussian_rmse:.3g}"
    assert nothing_but(tmp_path, "source.gguf", *UNFINISHED)


def test_a_plan_that_does_not_fit_the_source_is_refused_before_anything_is_written(tmp_path):
    with opened(tmp_path, small_model(half(Q, (96, 4)), Tensor("ids", (4,), 26, data=bytes(16)))) as source:
        good = plan_for(source, "Q8_0")
        tensor, ids = source.tensor(Q), source.tensor("ids")
        by_tensor = {c.name: c for c in good.choices}
        wrong = {
            "made for another file": replace(good, header_sha256="0" * 64),
            "is not in the plan": plan_of(source, good.choices[:-1]),
            "has no tensor 'other'": plan_of(source, (*good.choices, replace(good.choices[0], name="other"))),
            "not whole blocks": plan_of(
                source, (by_tensor | {Q: replace(choice(tensor, "Q8_0"), type="Q4_K")}).values()
            ),
            "does not write": plan_of(source, (by_tensor | {Q: replace(choice(tensor, "Q8_0"), type="I8")}).values()),
            "are no weights": plan_of(source, (by_tensor | {"ids": choice(ids, "F32")}).values()),
            r"in the plan, not F16 \[96, 4\]": plan_of(
                source, (by_tensor | {Q: replace(choice(tensor, "Q8_0"), shape=(96, 5))}).values()
            ),
        }
        for message, plan in wrong.items():
            with pytest.raises(BadInput, match=message):
                convert(source, plan, tmp_path / "out.gguf")
        losses = Losses("other.gguf", "0" * 64, "llama", "dfix", None, None, ())
        with pytest.raises(BadInput, match="losses were made for another model"):
            convert(source, good, tmp_path / "out.gguf", losses=losses)
    assert nothing_but(tmp_path, "source.gguf")


def test_a_type_that_needs_importance_is_refused_without_it(tmp_path, monkeypatch, imatrix):
    monkeypatch.setattr("requant.conversion.prepare.needs_importance", lambda type_name, role: type_name == "Q4_K")
    with opened(tmp_path, small_model()) as source:
        for given_imatrix in (None, replace(imatrix, entries={})):
            with pytest.raises(BadInput, match=r"2 tensors have a type that needs an importance matrix.*attn_q"):
                convert(source, plan_for(source, "Q4_K"), tmp_path / "out.gguf", imatrix=given_imatrix)
    assert nothing_but(tmp_path, "source.gguf")


def test_an_importance_matrix_of_another_model_is_refused(tmp_path, imatrix):
    with opened(tmp_path, small_model(half(Q, (512, 12)))) as source, pytest.raises(BadInput, match="another model"):
        convert(source, plan_for(source, "Q4_K"), tmp_path / "out.gguf", imatrix=imatrix)
    assert nothing_but(tmp_path, "source.gguf")


@pytest.mark.parametrize("force", [False, True])
def test_an_input_is_never_the_output(tmp_path, imatrix, force):
    copy = tmp_path / "imatrix.gguf"
    copy.write_bytes(IMATRIX.read_bytes())
    with open_source(TINY) as source:
        plan = plan_for(source, "Q8_0")
        for out, given_imatrix in ((TINY, None), (copy, replace(imatrix, path=str(copy)))):
            with pytest.raises(OutputRefused):
                convert(source, plan, out, imatrix=given_imatrix, force=force)
    assert copy.read_bytes() == IMATRIX.read_bytes()


def test_an_interrupt_ends_the_run_at_once_and_leaves_nothing(tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    before = threading.active_count()
    with opened(tmp_path, small_model()) as source, pytest.raises(KeyboardInterrupt):
        convert(source, plan_for(source, "Q8_0"), tmp_path / "out.gguf", progress=interrupt)
    assert threading.active_count() == before
    assert nothing_but(tmp_path, "source.gguf")


def test_a_source_touched_meanwhile_is_refused(tmp_path):
    path = tmp_path / "source.gguf"
    with opened(tmp_path, small_model()) as source, pytest.raises(SourceChanged, match="mtime"):
        convert(source, plan_for(source, "Q8_0"), tmp_path / "out.gguf", progress=lambda _: os.utime(path, (1, 1)))
    assert nothing_but(tmp_path, "source.gguf")


def test_bad_numbers_in_a_source_rewritten_meanwhile_are_called_a_change(tmp_path):
    path = tmp_path / "source.gguf"

    def rewrite(_):
        with path.open("r+b") as file:
            file.seek(-256 * 64, os.SEEK_END)
            file.write(b"\xff" * 256 * 64)

    tensors = [half(f"blk.{i}.attn_q.weight", (256, 64), seed=i) for i in range(9)]
    with opened(tmp_path, small_model(*tensors)) as source, pytest.raises(SourceChanged):
        convert(source, plan_for(source, "Q8_0"), tmp_path / "out.gguf", threads=1, progress=rewrite)
    assert nothing_but(tmp_path, "source.gguf")


def test_a_limit_on_file_size_is_reported_and_nothing_is_left(tmp_path):
    # a limit of the process stands in for a full disk, hence a process of its own
    small_model().write(tmp_path / "source.gguf")
    code = f"""
import resource, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from conversions import convert, plan_for, verify
from requant.container.source import open_source
from requant.errors import InputOutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with open_source(Path("source.gguf")) as source:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}))
    try:
        convert(source, plan_for(source), Path("out.gguf"))
    except InputOutputError as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "ulimit -f" in ran.stdout
    assert nothing_but(tmp_path, "source.gguf")


def test_a_failing_write_names_the_tensor(tmp_path, monkeypatch):
    def full(self, file, offset, data):
        raise InputOutputError(self.part_files[file], "writing 1 bytes failed: no space left", hint="free some")

    monkeypatch.setattr("requant.container.output.Output.write_at", full)
    with opened(tmp_path, small_model()) as source, pytest.raises(InputOutputError, match=f"tensor '{NORM}': writing"):
        convert(source, plan_for(source, "Q8_0"), tmp_path / "out.gguf")
    assert nothing_but(tmp_path, "source.gguf")


def test_the_record_survives_json_and_names_no_folder(made):
    text = made.to_json()
    read = Conversion.from_json(text)
    assert read == replace(made, output=Path("out.gguf"))
    assert read.to_json() == text
    assert str(made.output.parent) not in text


def test_record_and_output_name_the_encoders(made):
    assert made.kernels == KERNELS
    with open_source(made.output) as target:
        assert target.metadata.get("requant.kernels") == KERNELS


def test_a_record_of_a_version_that_named_no_encoders_is_read(made):
    old = json.loads(made.to_json())
    del old["kernels"]
    assert Conversion.from_json(json.dumps(old)) == replace(made, output=Path("out.gguf"), kernels=None)


def test_a_broken_record_is_refused(made):
    raw = json.loads(made.to_json())
    for broken in (
        raw | {"more": 1},
        raw | {"size": "big"},
        raw | {"plan": None},
        raw | {"schema": "requant.plan/1"},
    ):
        with pytest.raises(BadInput):
            Conversion.from_json(json.dumps(broken))


def test_notes_say_what_the_importance_matrix_leaves_out(made):
    assert made.notes == ("the imatrix does not cover 1 of 71 encoded tensors",)


def test_a_layer_number_out_of_all_proportion_makes_no_array_of_that_length(tmp_path):
    with opened(tmp_path, small_model(half("blk.4294967295.attn_q.weight", (256, 4)))) as source:
        (layout,) = output_layouts(source, plan_for(source, "Q8_0"))
    assert len(layout.header) < 4096


def test_names_from_outside_are_escaped_and_cut(tmp_path, imatrix):
    path = tmp_path / "so\udcffurce\x1b.gguf"
    small_model(half(Q, (256, 256)), pairs=(pair("split.custom", I32, 1), pair("requant.old", U32, 1))).write(path)
    named = replace(imatrix, path="/secret/" + "\u00e9" * 100 + ".gguf", datasets=("a" * 200,), chunk_count=None)
    with open_source(path) as source:
        made = convert(source, plan_for(source, "Q4_K"), tmp_path / "out.gguf", imatrix=named)
    with open_source(made.output) as target:
        assert target.metadata.get("requant.source.name") == "so\\udcffurce\\x1b.gguf"
        assert target.metadata.get("quantize.imatrix.file") == "\u00e9" * 63
        assert target.metadata.get("quantize.imatrix.dataset") == "a" * 127
        assert "quantize.imatrix.chunks_count" not in target.metadata
        assert "requant.old" not in target.metadata
        assert "split.custom" in target.metadata

"""Compensated conversion: its algebra, its stages in every architecture, the same bytes whatever happens."""

from dataclasses import replace

import numpy as np
import pytest
from compensated import quantized, random_tokens, text_for
from conversions import convert, verify
from model.forward.architectures import MAKERS

from requant.container import output
from requant.container.source import open_source
from requant.conversion import chunks
from requant.conversion.compensation import encoding, factors, measuring, memory, walk
from requant.conversion.compensation.moments import CHECK, split_windows
from requant.conversion.compensation.targets import choose_ridges, find_feedback
from requant.conversion.record import Conversion
from requant.errors import NumericFault, OutputRefused
from requant.formats import feedback


@pytest.mark.parametrize("n", [1, 5, 256, 300, 700])
def test_a_factor_and_its_inverse_replace_the_matrix_in_place(n):
    h = np.cov(np.random.default_rng(n).standard_normal((n, 3 * n + 2))).reshape(n, n) + 0.1 * np.eye(n)
    lower, rows = h.copy(), np.random.default_rng(1).standard_normal((3, n))
    inverses = factors.factorize(lower)
    np.testing.assert_allclose(lower, np.linalg.cholesky(h), atol=1e-10)
    np.testing.assert_allclose(factors.solve_rows(lower, inverses, rows), rows @ np.linalg.inv(h), rtol=1e-8, atol=1e-8)
    inverse = lower.copy()
    factors.invert_triangle(inverse, inverses)
    np.testing.assert_allclose(inverse @ lower, np.eye(n), atol=1e-9)


def test_the_factor_of_the_feedback_is_that_of_the_inverse_of_the_damped_moments():
    x = np.random.default_rng(0).standard_normal((500, 300)).astype(np.float32)
    h = x.T @ x
    found = find_feedback(h)
    damped = h.astype(np.float64) + np.diag(0.03 * np.diag(h))
    assert not np.tril(found.factor, -1).any()
    np.testing.assert_allclose(found.factor.T @ found.factor, np.linalg.inv(damped), atol=1e-7)
    spread = found.importance * np.diag(found.factor).astype(np.float64) ** 2
    np.testing.assert_allclose(spread, spread[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("n", "room", "widths"),
    [
        (14336, None, [14336]),
        (4096, 2**28, [4096]),
        (4096, 2**28 - 1, [2048, 2048]),
        (14336, 2**30, [3584] * 4),
        (2560, 36_000_000, [768, 768, 1024]),
        (600, 0, [256, 256, 88]),
        (96, 0, [96]),
    ],
)
def test_columns_are_cut_into_the_fewest_blocks_that_fit_the_room(n, room, widths):
    columns = memory.split_columns(n, room)
    assert [at.stop - at.start for at in columns] == widths
    assert [at.start for at in columns[1:]] == [at.stop for at in columns[:-1]]


def test_one_block_counts_the_sums_for_the_residual_stream_too():
    assert len(memory.split_columns(1024, 2**24, 0)) == 1
    assert len(memory.split_columns(1024, 2**24, 1)) == 2


@pytest.mark.parametrize("h", [np.zeros((40, 40), np.float32), np.full((40, 40), np.nan, np.float32)])
def test_moments_of_inputs_that_are_never_used_or_not_finite_give_no_feedback(h):
    assert find_feedback(h) is None


@pytest.mark.parametrize("rank", [1, 7])
def test_singular_moments_still_give_a_finite_factor(rank):
    x = np.random.default_rng(0).standard_normal((rank, 40)).astype(np.float32)
    x[:, 3] = 0
    found = find_feedback(x.T @ x)
    assert np.isfinite(found.factor).all()
    assert (np.diag(found.factor) > 0).all()


def test_a_target_is_taken_only_where_it_holds_on_the_other_half():
    rng, n = np.random.default_rng(0), 40
    truth = rng.standard_normal((8, n)).astype(np.float32) * 0.1
    halves, real, noise = [], [], []
    for _ in range(2):
        y = rng.standard_normal((400, n)).astype(np.float32)
        halves.append(y.T @ y)
        real.append(truth @ halves[-1])
        noise.append(rng.standard_normal((8, 400)).astype(np.float32) @ y)
    ridges = choose_ridges([[h] for h in halves], [[[w] for w in real], [[w] for w in noise]], 1)
    assert ridges[0] <= 0.1
    assert ridges[1] is None or ridges[1] >= 10


@pytest.mark.parametrize("n", [3, 4, 8, 9, 28, 32])
def test_windows_are_for_either_half_or_for_the_check(n):
    parts = split_windows(n)
    assert {0, 1, CHECK} == set(parts.tolist())
    assert abs((parts == 0).sum() - (parts == 1).sum()) <= 1 + n // 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compensated")


FEW = ("granite", "olmoe", "qwen3next", "gemma4-side", "deepseek2", "falcon-h1")
REST = [pytest.param(name, marks=pytest.mark.slow) for name in MAKERS if name not in FEW]


@pytest.mark.parametrize("name", [*FEW, *REST])
def test_every_architecture_is_compensated_and_errs_no_more_than_plain_rounding(folder, name):
    out = folder / f"{name}-out.gguf"
    with open_source(MAKERS[name](1).write(folder / f"{name}.gguf")) as source:
        plan = quantized(source, "Q4_0")
        made = convert(source, plan, out, compensation=text_for(source, random_tokens(4, 40)), threads=2)
        checked = verify(out, source=source)
    assert checked.ok, checked.findings
    found = {t.name: t.compensation for t in made.tensors if t.compensation is not None}
    encoded = {c.name for c in plan.choices if not c.copied and c.name.startswith("blk.")}
    assert encoded
    assert {n for n in encoded if "_exps" not in n} & found.keys()
    for compensation in found.values():
        assert 0 <= compensation.share <= 1
        assert compensation.error is None or compensation.error <= compensation.plain_error
    assert Conversion.from_json(made.to_json()).tensors == made.tensors


@pytest.fixture
def source(tmp_path):
    with open_source(MAKERS["olmoe"](1).write(tmp_path / "source.gguf")) as source:
        yield source


@pytest.fixture
def text(source):
    return text_for(source, random_tokens(8, 48))


def content(source, text, out, **options):
    """The bytes of a compensated output, and what its record has of the tensors."""
    made = convert(source, quantized(source, "Q4_0", "Q8_0"), out, compensation=text, **options)
    return out.read_bytes(), made.tensors


def test_the_bytes_do_not_depend_on_the_threads(tmp_path, source, text, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_WEIGHTS", 256)
    found = [content(source, text, tmp_path / f"{n}.gguf", threads=n) for n in (1, 2, 7)]
    assert found[0] == found[1] == found[2]
    assert any(t.is_compensated for t in found[0][1])


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of 32 columns are allowed; the list has the columns of each matrix that was measured in blocks."""
    monkeypatch.setattr(memory, "COLUMNS", 32)
    found = []

    def split(*how):
        found.append(memory.split_columns(*how))
        return found[-1]

    monkeypatch.setattr(walk, "split_columns", split)
    return found


def test_blocks_of_columns_err_less_than_plain_rounding_and_do_not_depend_on_the_threads(
    tmp_path, source, text, blocks
):
    whole = content(source, text, tmp_path / "whole.gguf")
    assert all(len(columns) == 1 for columns in blocks)
    blocks.clear()
    small = replace(text, room=0)
    found = [content(source, small, tmp_path / f"{n}.gguf", threads=n) for n in (1, 3)]
    assert {len(columns) for columns in blocks} == {1, 2}
    assert found[0] == found[1] != whole
    shares = [t.compensation.share for t in found[0][1] if t.is_compensated]
    assert np.mean(shares) < 0.9


def test_moments_of_blocks_are_those_on_the_diagonal():
    rng, a = np.random.default_rng(0), np.ones((4, 8), np.float32)
    windows = rng.standard_normal((4, 2, 8, 64)).astype(np.float32)
    reader = type("Reader", (), {"read": lambda _, w: (*windows[w], np.zeros((8, 3), np.float32))})()
    columns, w = (slice(0, 32), slice(32, 64)), rng.standard_normal((3, 64)).astype(np.float32)
    rows = {"w": (len(w), w.__getitem__)}
    cut, whole = (
        measuring.measure_dense(reader, measuring.Measured(rows, frozenset(rows), a, each), 1)["w"].blocks
        for each in (columns, (slice(0, 64),))
    )
    assert [block.moments.at for block in cut] == list(columns)
    assert whole[0].moments.d and not any(block.moments.d for block in cut)
    for block in cut:
        at = block.moments.at
        np.testing.assert_allclose(block.moments.h, whole[0].moments.h[at, at], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(block.moments.c, whole[0].moments.c[at, at], rtol=1e-5, atol=1e-5)


class Stop(BaseException):
    """A stop that only cleanup code handles."""


@pytest.mark.parametrize("after", [1, 9, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 14, 19))])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, source, text, monkeypatch, after):
    monkeypatch.setattr(memory, "COLUMNS", 32)
    text = replace(text, room=0 if after == 9 else None)  # in blocks too
    monkeypatch.setattr(output, "COMMIT_BYTES", 1)
    monkeypatch.setattr(chunks, "PIECE_BYTES", 200)  # so that it stops within a tensor too
    monkeypatch.setattr(chunks, "CHUNK_WEIGHTS", 512)
    monkeypatch.setattr(encoding, "CHUNK_WEIGHTS", 512)
    left = [after]

    def stop(_):
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    with pytest.raises(Stop):
        content(source, text, tmp_path / "out.gguf", progress=stop)
    told = []
    again = content(source, text, tmp_path / "out.gguf", info=told.append)
    assert told[0].startswith("resuming")
    assert again == content(source, text, tmp_path / "whole.gguf")


def test_what_was_written_is_not_encoded_again(tmp_path, source, text, monkeypatch):
    monkeypatch.setattr(output, "COMMIT_BYTES", 1)
    whole = content(source, text, tmp_path / "whole.gguf")
    n_encoded = []
    monkeypatch.setattr(walk, "TensorEncoder", lambda *how: n_encoded.append(how) or encoding.TensorEncoder(*how))
    monkeypatch.setattr(output.Output, "seal", lambda *_: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        content(source, text, tmp_path / "out.gguf")
    assert n_encoded
    n_encoded.clear()
    monkeypatch.undo()
    assert content(source, text, tmp_path / "out.gguf") == whole
    assert not n_encoded


def test_another_text_is_another_command(tmp_path, source, text, monkeypatch):
    monkeypatch.setattr(output, "COMMIT_BYTES", 1)
    monkeypatch.setattr(output.Output, "seal", lambda *_: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        content(source, text, tmp_path / "out.gguf")
    with pytest.raises(OutputRefused, match="another command: compensation_tokens was"):
        content(source, text_for(source, random_tokens(8, 48, seed=1)), tmp_path / "out.gguf")


def test_the_search_after_the_feedback_gets_the_moments(tmp_path, source, text, monkeypatch):
    given = []

    def encode(*args, **how):
        given.append(how.get("polish"))
        return feedback.encode_compensated(*args, **how)

    monkeypatch.setattr(encoding, "encode_compensated", encode)
    content(source, text, tmp_path / "fast.gguf")
    assert given
    assert all(h is None for h in given)
    given.clear()
    content(source, replace(text, best=True), tmp_path / "best.gguf")
    assert all(np.array_equal(h, h.T) for h in given)


def test_weights_far_off_with_results_that_are_not_pass_verification_with_and_without_the_record(
    tmp_path, source, text
):
    out = tmp_path / "out.gguf"
    made = convert(source, quantized(source, "Q4_0"), out, compensation=text)
    with open_source(out) as target:
        assert target.metadata.get("requant.compensation") == "fast"
    n = sum(t.is_compensated for t in made.tensors)
    record = tmp_path / "record.json"
    record.write_text(made.to_json())
    for path, words in ((record, f"{n} compensated tensors"), (None, "compensated tensors by names")):
        found = verify(out, source=source, record=path)
        assert found.ok, found.findings
        assert any(words in line for line in found.compared)


@pytest.mark.parametrize(
    "tokens",
    [np.full((4, 32), 7, np.int32), random_tokens(3, 16)],
    ids=["one repeated token", "fewer tokens than columns"],
)
def test_poor_texts_are_no_worse_than_plain_rounding_on_held_out_windows(tmp_path, source, tokens):
    made = content(source, text_for(source, tokens), tmp_path / "out.gguf")[1]
    assert all(
        t.compensation.error <= t.compensation.plain_error for t in made if t.compensation and t.compensation.error
    )


def test_experts_that_saw_nothing_are_rounded_plainly_and_counted(tmp_path, source):
    made = content(source, text_for(source, np.full((4, 32), 7, np.int32)), tmp_path / "out.gguf")[1]
    plain = convert(source, replace(quantized(source, "Q4_0", "Q8_0"), compensation=None), tmp_path / "plain.gguf")
    experts = [t for t in made if "_exps" in t.name and t.compensation is not None]
    assert experts
    assert all(0 < t.compensation.n_unseen <= t.compensation.n_plain <= t.compensation.n_matrices for t in experts)
    same = {t.name: t.sha256 for t in plain.tensors}
    for tensor in experts:
        if tensor.compensation.n_plain == tensor.compensation.n_matrices:
            assert tensor.sha256 == same[tensor.name]


def test_weights_of_tokens_that_are_all_zero_count_alike(source, text):
    zero = replace(text.weights, by_name={name: np.zeros_like(a) for name, a in text.weights.by_name.items()})
    a, mean = zero.of_stage(list(zero.by_name)[:2])
    assert mean == 1
    assert (a == 1).all()


def test_activations_that_are_not_finite_stop_it_with_the_layer_named(tmp_path):
    model = MAKERS["granite"](1)
    tensors = tuple(
        replace(t, data=np.full(len(t.data) // 4, 3e38, "<f4").tobytes()) if t.name == "blk.1.attn_norm.weight" else t
        for t in model.tensors
    )
    with (
        open_source(replace(model, tensors=tensors).write(tmp_path / "s.gguf")) as source,
        pytest.raises(NumericFault, match="layer 1 are not finite"),
    ):
        text_for(source, random_tokens(4, 16))


@pytest.mark.parametrize("type_name", ["NVFP4", "MXFP4", "IQ4_NL", "Q5_1"])
def test_types_with_scales_of_their_own_read_back_as_they_were_measured(tmp_path, type_name):
    out = tmp_path / "out.gguf"
    with open_source(MAKERS["olmoe"](1).write(tmp_path / "source.gguf")) as source:
        text = text_for(source, random_tokens(8, 48))
        made = convert(source, quantized(source, type_name, "Q4_0"), out, compensation=text)
        assert verify(out, source=source).ok
    shares = [t.compensation.share for t in made.tensors if t.is_compensated and t.type == type_name]
    assert np.mean(shares) < 1

"""Fault table: weights and importance that are no usable numbers."""

from dataclasses import replace

import numpy as np
from conversions import choice, half, normal, plan_of, single, small_model
from fault_rows import DONE, MODEL, PART, Row, made_of
from gguf_files import STR, File, pair

from requant.container.source import open_source

NAN = normal((256, 24), seed=3)

NAN[7, 5] = np.nan

LARGE = 1e9 * normal((256, 24), seed=3)

GOOD = half("blk.0.attn_q.weight", (256, 24))


def imatrix_file(folder, values, counts=(1,), width=256):
    sums = single("blk.0.attn_q.weight.in_sum2", (width, 1), np.full(width, 1.0) if values is None else values)
    n = single("blk.0.attn_q.weight.counts", (len(counts), 1), np.array(counts))
    File((pair("general.type", STR, "imatrix"),), (sums, n)).write(folder / "imatrix.gguf")


def imatrix_case(name, says, values=None, **how):
    def given(folder):
        array = None if values is None else np.where(np.arange(256) == 9, values, 1.0)
        imatrix_file(folder, array, **how)

    words = ("--imatrix", "imatrix.gguf")
    says = ("imatrix.gguf: ", "blk.0.attn_q.weight", says)
    return Row("bad imatrix", name, 3, says, given=given, words=words, again=None, left=frozenset({"imatrix.gguf"}))


def wanting(folder):
    """A plan with a type that needs an importance matrix for twelve tensors, and the model of it."""
    model = small_model(*(half(f"blk.{i}.attn_q.weight", (256, 24), seed=i) for i in range(12)))
    with open_source(model.write(folder / "source.gguf")) as source:
        types = [(t, "F32" if "norm" in t.name else "IQ2_XXS") for t in source.tensors]
        (folder / "plan.json").write_text(plan_of(source, [choice(*pair) for pair in types]).to_json())


def forcing(folder):
    """A plan with a type whose block does not divide a row."""
    model = small_model(half("blk.0.attn_q.weight", (96, 24)))
    with open_source(model.write(folder / "source.gguf")) as source:
        plan = plan_of(source, [choice(t, t.format.name) for t in source.tensors]).to_json()
    (folder / "plan.json").write_text(plan.replace('"type": "F16"', '"type": "Q4_K"'))


NUMBERS = [
    Row(
        *(
            "not finite",
            "NaN",
            8,
            ("'blk.1.ffn_up.weight' is not finite: 1 of 6144 weights, the first at weight 1797 .*got nan",),
        ),
        given=made_of(GOOD, single("blk.1.ffn_up.weight", (256, 24), NAN)),
        left=PART,
        again=8,
    ),
    Row(
        *(
            "not finite",
            "Inf",
            8,
            ("'blk.1.ffn_up.weight' is not finite: 1 of 6144 weights, the first at weight 1797 .*got inf",),
        ),
        given=made_of(GOOD, single("blk.1.ffn_up.weight", (256, 24), np.where(np.isnan(NAN), np.inf, NAN))),
        left=PART,
        again=8,
    ),
    Row(
        *("gate", "weights beyond the type", 8, (r"'blk.1.ffn_up.weight' as Q4_K, .*relative error \(got \S+, limit",)),
        given=made_of(GOOD, single("blk.1.ffn_up.weight", (256, 24), LARGE)),
        left=PART,
        again=8,
    ),
    imatrix_case("NaN", "value 9 is no mean square .*finite, not negative", np.nan),
    imatrix_case("Inf", "value 9 is no mean square .*finite, not negative", np.inf),
    imatrix_case("negative", "value 9 is no mean square .*got -1.0", -1.0),
    imatrix_case("wrong size", "another size than the tensor .*got .*limit", width=128),
    imatrix_case("no counts", r"wrong number of counts \(got 0, limit 1", counts=()),
    Row(
        *(
            "missing imatrix",
            "IQ2_XXS without",
            3,
            ("12 tensors .*imatrix|12 tensors .*importance matrix", r"'blk.9.attn_q.weight' \.\.\.; "),
        ),
        given=wanting,
        words=("--plan", "plan.json"),
        type=None,
        left=frozenset({"plan.json"}),
        again=None,
    ),
    Row("budget", "too small", 4, (r"raise it to \d+",), words=("--size", "4KiB", "--quick"), type=None, again=4),
    Row(
        *("row and block", "forced by an option", 2, ("blk.0.attn_q.weight.*Q4_K.*96.*block of 256",)),
        given=made_of(half("blk.0.attn_q.weight", (96, 24)), half("blk.0.ffn_up.weight", (256, 24))),
        words=("--size", "1MiB", "--quick", "--tensor-type", "blk.0.attn_q.weight=Q4_K"),
        type=None,
        again=None,
    ),
    Row(
        *(
            "row and block",
            "forced by a plan",
            3,
            (r"choices\[1\] cannot be Q4_K \(got shape \[96, 24\], limit .* 256",),
        ),
        given=forcing,
        words=("--plan", "plan.json"),
        type=None,
        left=frozenset({"plan.json"}),
        again=None,
    ),
    Row(
        *("row and block", "of the type for all", 0),
        given=made_of(half("blk.0.attn_q.weight", (96, 24)), half("blk.0.ffn_up.weight", (256, 24))),
        left=DONE,
        again=None,
    ),
    Row(
        *("trailing bytes", "seven", 0, ("warning: source.gguf ends in 7 bytes of no tensor; dropped",)),
        given=lambda folder: replace(MODEL, trailing=b"garbage").write(folder / "source.gguf"),
        left=DONE,
    ),
]

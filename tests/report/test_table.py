import math
from dataclasses import replace

import pytest

from requant.formats import by_name
from requant.planning.constraints import Constraints, Limit, size_limit, vram_limit
from requant.planning.plan import EDITED
from requant.planning.rules import parse_rule
from requant.planning.solver.solve import solve
from requant.report.text.table import layer_table, losses_table, plan_table, summary, type_table
from requant.scoring.losses import Candidate, Losses, TensorLosses


def tensor(name, by_type, shape=(256, 4), source_type="F16", **changes):
    sizes = {t: by_name(t).n_bytes(math.prod(shape)) for t in [*by_type, source_type]}
    candidates = tuple(Candidate(t, sizes[t], loss) for t, loss in (by_type | {source_type: 0.0}).items())
    parts = name.split(".")
    layer = int(parts[1]) if parts[0] == "blk" else None
    role = parts[2] if layer is not None else parts[0]
    made = TensorLosses(name, role, layer, shape, source_type, sizes[source_type], True, None, candidates)
    return replace(made, **changes)


SOME = {"Q4_K": 0.5, "Q6_K": 0.25}
SHORT = {"skipped": {"Q4_K": "rows of 96", "Q6_K": "rows of 96"}}
LOSSES = Losses(
    "m\x1b.gguf", "0" * 64, "llama", "cfix", "im.gguf", "1" * 64,
    (
        tensor("token_embd.weight", SOME),
        *(tensor(f"blk.{i}.{r}.weight", SOME) for i in range(4) for r in ("attn_q", "attn_v", "ffn_up")),
        *(tensor(f"blk.{i}.ffn_down.weight", {"Q4_0": 0.5}, (96, 8), **SHORT) for i in range(4)),
        tensor("output_norm.weight", {}, (256,), "F32", reason="it is a vector, not a matrix"),
    ),
    ("sampled rows",),
)  # fmt: skip
PINS = tuple(
    parse_rule(t) for t in ("blk.[0-2].attn_v=Q6_K", "blk.3.attn_v=F16", "ffn_down=Q4_0", "attn_q|ffn_up|token=Q4_K")
)
PLAN = solve(LOSSES, Constraints((vram_limit(40_000, 30_000),), {"kv_cache": 6000, "reserve": 3000}, PINS))


def test_layers_with_equal_types_share_a_row_and_copies_are_marked():
    lines = layer_table(PLAN).splitlines()
    assert lines[0].split() == ["token_embd", "Q4_K"]
    assert lines[2].split() == ["attn_q", "attn_v", "ffn_up", "ffn_down"]
    assert lines[3].split() == ["0-2", "Q4_K", "Q6_K", "Q4_K", "Q4_0"]
    assert lines[4].split() == ["3", "Q4_K", "F16*", "Q4_K", "Q4_0"]
    assert lines[-1] == "* copied from the source"


@pytest.mark.parametrize("width", [24, 30, 40, 100])
def test_tables_keep_to_the_width_and_lose_no_role(width):
    text = layer_table(PLAN, width)
    assert max(map(len, text.splitlines())) <= width
    assert all(role in text for role in ("attn_q", "attn_v", "ffn_up", "ffn_down", "token_embd"))
    assert max(map(len, summary(PLAN, width).splitlines())) <= max(width, 32)
    assert max(map(len, losses_table(LOSSES, width).splitlines())) <= max(width, 54)


def test_a_type_row_counts_tensors_bytes_and_loss():
    rows = {line.split()[0]: line.split() for line in type_table(PLAN).splitlines()[1:]}
    assert rows["Q4_K"][1:3] == ["4.50", "9"]
    assert rows["F32"][1:3] == ["32.00", "1"]
    n_bytes = 9 * 576 + 3 * 840 + 2048 + 4 * 432 + 1024
    assert rows["all"][2] == "18" and f"{n_bytes / 1024:.2f}" in rows["all"]


def test_the_summary_names_every_component_of_a_limit():
    text = " ".join(summary(PLAN).split())
    assert "KV cache 5.86 KiB" in text and "reserve 2.93 KiB" in text and "other 1000 B" in text
    assert f"{PLAN.used(PLAN.limits[0]) / 1024:.2f} KiB of 39.06 KiB" in text


def test_a_size_limit_names_the_header_and_bpw_is_in_bpw():
    n_weights = sum(t.n_weights for t in LOSSES.tensors)
    bpw = Limit("--bpw", n_weights, n_weights=n_weights)
    text = " ".join(summary(solve(LOSSES, Constraints((size_limit(20_000, 500), bpw)))).split())
    assert "header 500 B" in text
    assert "of 8.0000 bits per weight" in text


def test_types_of_equal_bits_are_in_order_of_name():
    names = [line.split()[0] for line in type_table(PLAN).splitlines()[1:]]
    assert names == ["Q4_0", "Q4_K", "Q6_K", "F16", "F32", "all"]


def test_nothing_that_was_left_out_is_silent():
    text = " ".join(summary(PLAN).split())
    assert "it is a vector, not a matrix: 1 tensor (output_norm.weight)" in text
    assert "no Q4_K, Q6_K: rows of 96: 4 tensors (blk.0.ffn_down.weight, blk.1.ffn_down.weight" in text
    assert "sampled rows" in text
    text = " ".join(losses_table(LOSSES).split())
    assert (
        "it is a vector, not a matrix: 1 tensor" in text and "rows of 96: 4 tensors" in text and "sampled rows" in text
    )


def test_loss_gap_and_method_are_said():
    assert f"predicted {PLAN.predicted_loss:.4g} points, no KL divergence (cfix); proven gap" in summary(PLAN)
    edited = replace(PLAN, predicted_loss=None, gap=None, notes=(EDITED,))
    assert "not known, the plan was edited" in summary(edited)
    assert "?" in type_table(edited)


def test_losses_are_summed_by_role_and_type():
    lines = {line.split()[0]: line.split() for line in losses_table(LOSSES).splitlines() if line}
    assert lines["attn_q"] == ["attn_q", "(4)", "-", "2", "1", "0"]
    assert lines["ffn_down"] == ["ffn_down", "(4)", "2", "-", "-", "0"]
    assert lines["all"] == ["all", "(17)", "2+", "6.5+", "3.25+", "0"]
    assert "importance from im.gguf" in losses_table(LOSSES)


def test_names_from_files_are_escaped():
    odd = tensor("blk.0.x\x1b[2J.weight", SOME, skipped={"Q2_K": "\x07"})
    plan = solve(replace(LOSSES, tensors=(odd,), notes=("\x9b",)), Constraints())
    for text in (plan_table(plan), losses_table(replace(LOSSES, tensors=(odd,)))):
        assert text.replace("\n", "").isprintable()


def test_an_empty_plan_has_a_table_too():
    plan = solve(replace(LOSSES, tensors=LOSSES.tensors[-1:]), Constraints())
    assert "1 copied" in plan_table(plan)
    assert "0 to quantize" in losses_table(replace(LOSSES, tensors=LOSSES.tensors[-1:]))
    assert "0 copied" in plan_table(replace(plan, choices=()))

"""The commands that make an output again, byte for byte, as far as its record holds them."""

from __future__ import annotations

from itertools import pairwise

from requant.container.shards import whole_name
from requant.conversion.record import Conversion, record_path
from requant.report import shell
from requant.scoring.calibration_data import DRAWN_NAME, SHIPPED_NAME
from requant.scoring.losses import GRADIENTS

# with any of them convert does not score by gradients
_INLINE = ("--losses", "--imatrix", "--no-imatrix", "--statistics", "--quick", "--type", "--preset")


def reproduction_commands(made: Conversion) -> list[str]:
    """Return lines for a shell in the folder of the files; each makes the input of the next.

    A conversion weighs columns by the imatrix that its plan or its losses point to, which `score` and `plan` leave
    beside them. A plan without recorded options is read from the record.
    """
    plan = made.plan
    source, whole = shell.file_argument(plan.source), whole_name(made.output.name)
    split = "# the output was split: add --keep-split, or --max-shard-size"  # the record has no size of shards
    note = [split] if whole != made.output.name else []
    nonfinite = ["--nonfinite", "keep-type"] if any(t.odd is not None and t.odd.nonfinite for t in made.tensors) else []
    convert = ["requant", "convert", source, shell.file_argument(whole), *nonfinite]
    imatrix = [] if made.imatrix is None else ["--imatrix", shell.file_argument(made.imatrix)]
    if not plan.options:
        record = shell.file_argument(record_path(made.output).name)
        return [*note, shell.join_words([*convert, "--plan", record, *imatrix])]
    losses = _option_values(made, "--losses") if plan.scoring else []
    first = note + [shell.join_words(["requant", "score", source, "-o", file, *plan.scoring]) for file in losses]
    if _is_one_run(made):
        return [*first, shell.join_words([*convert, *plan.options])]
    planned = ["requant", "plan", source, "-o", "plan.json", *plan.options]
    return [*first, shell.join_words(planned), shell.join_words([*convert, "--plan", "plan.json", *imatrix])]


def _is_one_run(made: Conversion) -> bool:
    """Return whether `requant convert` with the plan's options weights columns as this output's were.

    The plans of old records do not point to importance. Without --imatrix and with losses from gradients, `convert`
    weights columns by what the gradients' run measured, under the name of its text.
    """
    plan = made.plan
    if plan.imatrix_sha256 is not None:
        return plan.imatrix_sha256 == made.imatrix_sha256
    if given := _option_values(made, "--imatrix", "--statistics"):
        return made.imatrix in (None, given[-1])
    scored = any(plan.candidates.get(c.name, {}).keys() - {c.source_type} for c in plan.choices)
    if plan.method != GRADIENTS or not scored or any(option in _INLINE for option in plan.options):
        return made.imatrix is None
    return made.imatrix in (_option_values(made, "--text", "--tokens") or (SHIPPED_NAME, DRAWN_NAME))


def _option_values(made: Conversion, *wanted: str) -> list[str]:
    """Return the values of the plan's options of these names."""
    words = made.plan.options
    joined = (word.partition("=")[::2] for word in words)  # as values that begin with a dash are written
    return [value for option, value in (*pairwise(words), *joined) if option in wanted and value]

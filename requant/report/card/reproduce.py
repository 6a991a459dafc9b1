"""The commands that make an output again, byte for byte, as far as its record holds them."""

from __future__ import annotations

import re
from itertools import pairwise

from requant.conversion.record import Conversion, record_path
from requant.report import shell

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_INLINE = (
    "--losses",
    "--imatrix",
    "--statistics",
    "--quick",
    "--type",
    "--preset",
)  # with any of them convert does not score by gradients


def reproduction_commands(made: Conversion) -> list[str]:
    """Return lines for a shell in the folder of the files; each makes the input of the next.

    A conversion that plans in the same run weighs columns by the statistics of its scoring, unless an imatrix is given;
    one from a plan's file by the imatrix alone. A plan without recorded options is read from the record.
    """
    plan = made.plan
    source, (out, note) = shell.file_argument(plan.source), _output_name(made)
    kept = ["--nonfinite", "keep-type"] if any(t.odd is not None and t.odd.nonfinite for t in made.tensors) else []
    convert, imatrix = ["requant", "convert", source, out, *kept], _imatrix_option(made)
    if not plan.options:
        record = shell.file_argument(record_path(made.output).name)
        return [*note, shell.join_words([*convert, "--plan", record, *imatrix])]
    first = note + [
        shell.join_words(["requant", "score", source, "-o", losses, *plan.scoring]) for losses in _losses_files(made)
    ]
    if made.imatrix == _default_importance(made):
        return [*first, shell.join_words([*convert, *plan.options])]
    planned = ["requant", "plan", source, "-o", "plan.json", *plan.options]
    return [*first, shell.join_words(planned), shell.join_words([*convert, "--plan", "plan.json", *imatrix])]


def _output_name(made: Conversion) -> tuple[str, list[str]]:
    """Return the output's name for the command, and a remark if it was split, as the record has no shard size."""
    whole = _SHARD.sub(".gguf", made.output.name)
    note = "# the output was split: add --keep-split, or --max-shard-size"
    return shell.file_argument(whole), [note] if whole != made.output.name else []


def _losses_files(made: Conversion) -> list[str]:
    """Return the file of the losses, if the plan records how it was made."""
    return _option_values(made, "--losses") if made.plan.scoring else []


def _imatrix_option(made: Conversion) -> list[str]:
    return [] if made.imatrix is None else ["--imatrix", shell.file_argument(made.imatrix)]


def _default_importance(made: Conversion) -> str | None:
    """Return the name of the importance that planning and converting in one run would use, None for none."""
    if given := _option_values(made, "--imatrix", "--statistics"):
        return given[-1] if made.imatrix is not None else None
    if any(option in _INLINE for option in made.plan.options):
        return None
    return next((name for note in made.plan.notes if (name := calibration_text(note))), None)


def _option_values(made: Conversion, *wanted: str) -> list[str]:
    """Return the values of the plan's options of these names."""
    return [value for option, value in pairwise(made.plan.options) if option in wanted]


def calibration_text(note: str) -> str | None:
    """Return the calibration text of a plan's note on gradients, None for another note."""
    head, _, name = note.partition(" tokens of ")
    return name if name and head.startswith("gradients over ") else None

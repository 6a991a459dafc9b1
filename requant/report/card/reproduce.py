"""The commands that make an output again, byte for byte, as far as its record knows them."""

from __future__ import annotations

import re
from itertools import pairwise

from requant.conversion.record import Conversion, record_path
from requant.report import shell

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_INLINE = ("--losses", "--imatrix", "--statistics", "--quick", "--type", "--preset")  # with any, nothing is measured


def reproduction_commands(made: Conversion) -> list[str]:
    """Lines for a shell, in the folder of the files; the first makes what the next reads.

    A conversion that was planned in the same run weighs columns by what scoring measured, unless an imatrix is given;
    one of a plan's file by the imatrix alone. Plans that do not know their options are read from the record.
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
    """The name to give, and a remark where the output was split, which the record does not say how."""
    whole = _SHARD.sub(".gguf", made.output.name)
    note = "# the output was split: add --keep-split, or --max-shard-size"
    return shell.file_argument(whole), [note] if whole != made.output.name else []


def _losses_files(made: Conversion) -> list[str]:
    """The file that the losses came from, where it is known how it was made."""
    return _option_values(made, "--losses") if made.plan.scoring else []


def _imatrix_option(made: Conversion) -> list[str]:
    return [] if made.imatrix is None else ["--imatrix", shell.file_argument(made.imatrix)]


def _default_importance(made: Conversion) -> str | None:
    """The name of what the columns would be weighed by if it was planned and converted in one run."""
    if given := _option_values(made, "--imatrix", "--statistics"):
        return given[-1] if made.imatrix is not None else None
    if any(option in _INLINE for option in made.plan.options):
        return None
    return next((name for note in made.plan.notes if (name := calibration_text(note))), None)


def _option_values(made: Conversion, *wanted: str) -> list[str]:
    """What the plan's options of these names were given."""
    return [value for option, value in pairwise(made.plan.options) if option in wanted]


def calibration_text(note: str) -> str | None:
    """The text that gradients were taken on, if the plan's note says that they were."""
    head, _, name = note.partition(" tokens of ")
    return name if name and head.startswith("gradients over ") else None

"""What ggml's encoders and requant's make of input that cannot be encoded, over all types: a Markdown table.

    python scripts/bench/bench_faults.py

The input and the verdicts are those of tests/helpers/faults.py. Ruined: it validates (ggml_validate_row_data), but its
error is at least three times the one the type has on these weights as they were, or half of their size.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))
from faults import ABORTED, FINE, FLAGGED, RUINED, TYPES, cases, ggml_verdicts, requant_verdicts

HEADS = ("input", "ggml: fine", "ruined, unnoticed", "fails validation", "aborts", "requant: fine", "refused", "ruined")


def main() -> None:
    theirs, ours = ggml_verdicts(), requant_verdicts()
    print(f"{len(TYPES)} types, 512 normal weights of standard deviation 0.02 each\n")
    print(f"| {' | '.join(HEADS)} |\n|---{'|--:' * (len(HEADS) - 1)}|")
    for column in cases():
        peer, own = (Counter(found[fmt.name][column] for fmt in TYPES) for found in (theirs, ours))
        figures = *(peer[v] for v in (FINE, RUINED, FLAGGED, ABORTED)), *(own[v] for v in (FINE, FLAGGED, RUINED))
        print(f"| {column.replace('|', chr(92) + '|')} | {' | '.join(map(str, figures))} |")


if __name__ == "__main__":
    main()

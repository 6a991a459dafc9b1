"""The README's table of formats, from FORMATS; `--check README.md` fails where the file has another."""

import argparse
import sys
from pathlib import Path

from requant.formats import FORMATS

BEGIN, END = "<!-- formats: scripts/format_table.py -->", "<!-- /formats -->"


def table() -> str:
    lines = ["| type | id | block | bytes | bits per weight | read | written |", "|---|--:|--:|--:|--:|:-:|:-:|"]
    for f in FORMATS.values():
        read = "yes" if f.can_decode else "copied"
        written = "yes" if f.can_encode else "-"
        lines.append(
            f"| {f.name} | {f.type_id} | {f.block_weights} | {f.block_bytes} | {f.bpw:g} | {read} | {written} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=Path, metavar="README")
    readme = parser.parse_args().check
    if readme is None:
        print(table())
    elif f"{BEGIN}\n{table()}\n{END}" not in readme.read_text(encoding="utf-8"):
        sys.exit(f"{readme}: the table of formats is not what scripts/format_table.py prints")


if __name__ == "__main__":
    main()

"""Writes fixtures/encodings.json: what the encoders make of fixed weights, and the version of the encoders that did.

    python scripts/make/make_encodings.py

A type whose bytes have changed needs a new version first: KERNELS in requant/formats/__init__.py. New types do not.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "fixtures" / "encodings.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from encodings_of import digests

from requant.formats import KERNELS


def main() -> None:
    found = digests()
    kept = json.loads(TARGET.read_text(encoding="ascii")) if TARGET.exists() else {"kernels": 0, "digests": {}}
    changed = [name for name, digest in kept["digests"].items() if found.get(name) != digest]
    if changed and kept["kernels"] >= KERNELS:
        names = ", ".join(changed)
        sys.exit(f"the bytes of {names} have changed; raise KERNELS in requant/formats/__init__.py above {KERNELS}")
    TARGET.write_text(json.dumps({"kernels": KERNELS, "digests": found}, indent=1) + "\n", encoding="ascii")
    print(f"{TARGET.name}: {len(found)} types, version {KERNELS}, {len(changed)} of them changed")


if __name__ == "__main__":
    main()

"""Write the corpus of malformed files, one folder per case, and index.json: what each is and what it must come to.

    python scripts/make/make_malformed.py FOLDER

verdict: R refused, A accepted, W accepted with a warning, N accepted, but whatever reads the weights must stop.
level: what is to refuse it (parser, set of shards, model, planner, imatrix, coverage of a model).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))
from corpus import CASES, FURTHER


def main(folder: Path) -> None:
    index = []
    for name, case in (CASES | FURTHER).items():
        (folder / name).mkdir(parents=True)
        path = case.write(folder / name)
        kind = {"kind": "imatrix", "model": f"{name}/model.gguf"} if case.is_imatrix else {"kind": "model"}
        level = {"level": case.level} if case.verdict in "RN" else {}
        index.append({"name": name, "file": f"{name}/{path.name}", "verdict": case.verdict} | level | kind)
    text = ",\n".join(json.dumps(entry) for entry in index)
    (folder / "index.json").write_text(f"[\n{text}\n]\n", encoding="ascii")
    print(f"{len(index)} cases in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))

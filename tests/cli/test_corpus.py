"""Whatever a file holds, a command ends in a result or in one line, and leaves the folder as it should."""

import json

import pytest
from commands import names, run
from corpus import CASES

COMMANDS = {
    "inspect": ["inspect", "--tensors", "--json"],
    "plan": ["plan", "--bpw", "16", "--json"],
    "vram": ["plan", "--vram", "1GiB", "--json"],
    "convert": ["convert", "--type", "Q8_0", "--json"],
}


# weights near the end of float32 overflow where their error is measured; that only leaves a type out
@pytest.mark.filterwarnings("ignore::RuntimeWarning:requant")
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_case_of_the_corpus_ends_in_a_result_or_in_one_line(capsys, tmp_path, words):
    for name, (verdict, content, _) in CASES.items():
        path, out = tmp_path / "case.gguf", tmp_path / "out.gguf"
        path.write_bytes(content)
        ran = run(capsys, words[0], path, *([out] if words[0] == "convert" else []), *words[1:])
        errors = [line for line in ran.err.splitlines() if not line.startswith("requant: warning: ")]
        assert all(line.isprintable() for line in ran.err.splitlines()), (name, ran)
        assert ran.code in ((3,) if verdict == "R" else (0, 3, 4, 8)), (name, ran)
        assert len(errors) == (ran.code != 0), (name, ran)
        assert ran.out == "" if ran.code else json.loads(ran.out)["schema"], (name, ran)
        left = ["case.gguf", "out.gguf", "out.gguf.requant.json"] if out.exists() else ["case.gguf"]
        assert names(tmp_path) == left and out.exists() == (words[0] == "convert" and ran.code == 0), (name, ran)
        for path in tmp_path.iterdir():
            path.unlink()

"""The option --compensate: what it refuses, what it records, and plans that carry it."""

import json
import re
from dataclasses import replace

import pytest
from commands import FIXTURES, TINY, assert_failed, run
from model.forward.architectures import MAKERS

import requant
from requant.api import session
from requant.conversion.record import read_conversion
from requant.errors import UsageError

WINDOWS = ("--windows", 1, "--window", 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return MAKERS["granite"](1).write(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture
def convert(capsys, model, tmp_path):
    return lambda *words: run(capsys, "convert", model, tmp_path / "out.gguf", "--type", "q4_0", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--quick", "--compensate"), "--quick runs no model, and --compensate measures what comes out of it"),
        (("--compensate", "--no-compensate"), "--compensate and --no-compensate cannot be given together"),
        (("--max-memory", "8GiB"), "--max-memory limits only what --compensate takes; leave it out, or give"),
        (("--compensate", "--max-memory", "1MiB"), "--max-memory 1.00 MiB is too little for --compensate; it takes"),
        (("--compensate=fats",), "--compensate: 'fats' is not known; did you mean fast?"),
        (("--compensate", "--windows", 8, "--window", 8192), "--compensate needs 3 windows, and"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(capsys, tmp_path, words, said):
    text = ("--text", FIXTURES / "calibration.txt")
    words = words if "--quick" in words else (*text, *words)
    ran = run(capsys, "convert", TINY, tmp_path / "out.gguf", "--type", "q4_0", *words)
    assert ran.code == 2, ran
    assert said in ran.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "how"), [(["--compensate"], "fast"), (["--compensate", "best"], "best"), (["--compensate=best"], "best")]
)
def test_the_option_stands_anywhere_and_takes_no_file(capsys, model, tmp_path, words, how):
    ran = run(capsys, "convert", *words, model, "--dry-run", tmp_path / "out.gguf", "--type", "q4_0")
    assert ran.code == 0, ran
    assert f"compensated ({how}); the loss is that of plain rounding" in ran.out


def test_the_record_says_what_was_compensated_and_on_which_tokens(convert, tmp_path):
    ran = convert("--compensate", *WINDOWS)
    assert ran.code == 0, ran
    assert "compensated (fast), measured on requant's calibration.txt" in ran.out
    made = read_conversion(tmp_path / "out.gguf.requant.json")
    assert made.plan.compensation == "fast"
    assert made.plan.options[-6:] == ("--windows", "1", "--window", "32", "--compensate", "fast")
    assert len(made.compensation_tokens) == 64
    assert any(t.is_compensated for t in made.tensors)


def test_a_limit_that_holds_all_moments_changes_nothing(capsys, convert, model, tmp_path):
    convert("--compensate", *WINDOWS)
    words = ("--type", "q4_0", "--compensate", "--max-memory", "1GiB", *WINDOWS, "--threads", 1)
    ran = run(capsys, "convert", model, tmp_path / "b.gguf", *words)
    assert ran.code == 0, ran
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_a_plan_keeps_it_and_an_option_overrules_it(capsys, convert, model, tmp_path):
    convert("--compensate", *WINDOWS)
    record, out = tmp_path / "out.gguf.requant.json", tmp_path / "again.gguf"
    ran = run(capsys, "convert", model, out, "--plan", record, *WINDOWS)
    assert ran.code == 0, ran
    assert out.read_bytes() == (tmp_path / "out.gguf").read_bytes()
    ran = run(capsys, "convert", model, out, "--plan", record, "--no-compensate", "--force")
    assert ran.code == 0, ran
    assert read_conversion(tmp_path / "again.gguf.requant.json").plan.compensation is None
    plain = run(capsys, "convert", model, tmp_path / "plain.gguf", "--type", "q4_0")
    assert plain.code == 0, plain
    assert out.read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_a_plan_with_another_word_is_refused(capsys, convert, model, tmp_path):
    convert("--compensate", *WINDOWS)
    record = tmp_path / "out.gguf.requant.json"
    raw = json.loads(record.read_text())
    raw["plan"]["compensation"] = "slow"
    record.write_text(json.dumps(raw))
    ran = run(capsys, "convert", model, tmp_path / "again.gguf", "--plan", record)
    assert_failed(ran, 3, "compensation is not known (got slow)", "fast or best")


def test_a_model_that_cannot_be_run_is_rounded_plainly_with_one_note(capsys, tmp_path):
    made = MAKERS["granite"](1)
    odd = replace(made, tensors=(*made.tensors, replace(made.tensors[-1], name="blk.0.unheard_of.weight")))
    path, out = odd.write(tmp_path / "model.gguf"), tmp_path / "out.gguf"
    ran = run(capsys, "convert", path, out, "--type", "q4_0", "--compensate")
    assert ran.code == 0, ran
    assert ran.out.count("the model cannot be run") == 1, ran.out
    record = read_conversion(tmp_path / "out.gguf.requant.json")
    assert record.plan.compensation is None
    assert not any(t.compensation for t in record.tensors)


def test_encoding_again_leaves_compensated_tensors_out_and_says_so(capsys, convert, model, tmp_path):
    convert("--compensate", *WINDOWS)
    ran = run(capsys, "verify", tmp_path / "out.gguf", "--source", model, "--full")
    assert ran.code == 0, ran
    assert "compensated tensors; the same `requant convert` makes them again" in ran.out


def test_a_card_says_it(capsys, convert, tmp_path):
    ran = convert("--compensate", *WINDOWS, "--report", tmp_path / "card.md", "--report", tmp_path / "page.html")
    assert ran.code == 0, ran
    assert "measured on requant's calibration.txt" in (tmp_path / "card.md").read_text()
    assert "compensated, fast" in (tmp_path / "page.html").read_text()


def test_the_python_api_takes_a_word_or_true(model, tmp_path):
    with requant.open(model) as opened:
        how = {"type": "Q4_0", "windows": 1, "window": 32}
        made = opened.convert(tmp_path / "a.gguf", compensate=True, **how)
        assert made.plan.compensation == "fast"
        for out, off in (("b.gguf", {"no_compensate": True}), ("d.gguf", {"compensate": False})):
            assert opened.convert(tmp_path / out, made.plan, **off).plan.compensation is None
        with pytest.raises(UsageError, match="--compensate: 'slow' is not known"):
            opened.convert(tmp_path / "c.gguf", compensate="slow", **how)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (range(100), "needs 3 windows, and ids.txt has 1"),
        ([7, 8] * 200, "ids.txt repeats itself: its tokens differ no more"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_text_that_will_not_do_is_told_before_scoring(  # noqa: PLR0917
    capsys, monkeypatch, model, tmp_path, tokens, said, more
):
    monkeypatch.setattr(session.Session, "make_plan", None)
    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(map(str, tokens)))
    words = ("--bpw", 5, "--compensate", "--tokens", ids, "--windows", 1, "--window", 64, *more)
    assert_failed(run(capsys, "convert", model, tmp_path / "out.gguf", *words), 2, said)


def test_what_no_model_is_run_for_cannot_be_compensated_by_a_plan(capsys, convert, model, tmp_path):
    convert("--compensate", *WINDOWS)
    words = ("convert", model, tmp_path / "again.gguf", "--plan", tmp_path / "out.gguf.requant.json", "--quick")
    assert_failed(run(capsys, *words), 2, "--quick runs no model", "give --no-compensate")
    assert run(capsys, *words, "--no-compensate").code == 0


def test_the_least_limit_that_is_named_is_enough_and_recorded(convert, tmp_path):
    ran = convert("--compensate", *WINDOWS, "--max-memory", "1MiB")
    least = re.search(r"it takes (\d+ MiB)", ran.err)[1].replace(" ", "")
    assert convert("--compensate", *WINDOWS, "--max-memory", least).code == 0
    options = read_conversion(tmp_path / "out.gguf.requant.json").plan.options
    assert options[options.index("--max-memory") + 1] == f"{int(least.removesuffix('MiB')) << 20}B"

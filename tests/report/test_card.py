"""Model cards: front matter that YAML reads, tables that Markdown shows, figures that somebody measured."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from made_up import plan, record
from test_markdown import HOSTILE, rendered

from requant.container.hashing import FileHash
from requant.container.metadata import Metadata, encode_value
from requant.conversion.record import Anomalies, Conversion
from requant.errors import FILE_NAME, brief
from requant.planning.plan import Plan
from requant.report.card.document import CardOutput, render_card
from requant.report.card.origin import CardOverrides, ModelOrigin, override_origin, read_origin
from requant.report.card.parts import describe_budget, format_both_units
from requant.report.card.reproduce import reproduction_commands
from requant.scoring.evaluate import Evaluation

ORIGIN = ModelOrigin(
    "Some Model", "Somebody", ("owner/some-model",), (), "apache-2.0", languages=("en", "no"), tags=("chat",)
)
MEASURED = Evaluation(
    *(4, 512, 1020, 66.4255, 5.5, 66.4242, 0.0123, 0.001, 0.2, 0.4, 0.9876),
    **{"model": "Invented-Q4.gguf", "header_sha256": "b" * 64, "base": "Invented-3L-BF16.gguf", "text": "eval.txt"},
)


def split(text):
    """The front matter as YAML has it, and the body."""
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head), body


def metadata(**values):
    kinds = {str: "str", int: "u32", bool: "bool"}
    named = {key.replace("__", "."): value for key, value in values.items()}
    return Metadata("m.gguf", {key: encode_value(key, kinds[type(value)], value) for key, value in named.items()})


def test_the_front_matter_is_what_the_hub_wants_of_quantized_models():
    head, _ = split(render_card([CardOutput(record(), ORIGIN)], CardOverrides(quantized_by="me")))
    assert head == {
        "base_model": "owner/some-model",
        "base_model_relation": "quantized",
        "language": ["en", "no"],  # Norwegian, which YAML takes for false
        "library_name": "gguf",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "quantized_by": "me",
        "tags": ["gguf", "requant", "imatrix", "chat"],
    }


def test_what_nobody_says_is_not_there():
    head, body = split(
        render_card([CardOutput(record(imatrix=None, imatrix_sha256=None), ModelOrigin())], CardOverrides())
    )
    assert head == {"library_name": "gguf", "pipeline_tag": "text-generation", "tags": ["gguf", "requant"]}
    assert (
        "measured |" not in body and "Perplexity" not in body and "hf download" not in body and "Somebody" not in body
    )
    assert "nothing was measured" in body
    assert body.startswith("\n# Invented-3L-BF16, GGUF\n")


def test_measured_figures_stand_in_the_table_and_say_what_they_are_over():
    _, body = split(render_card([CardOutput(record(), ORIGIN, evaluation=MEASURED)], CardOverrides()))
    row = next(line for line in body.splitlines() if line.startswith("| `Invented-Q4.gguf`"))
    assert "| 0.0123 | 0.2 | 98.76 % | 66.4255 | 66.4242 |" in row
    assert "over 1020 tokens in 4 windows of 512 of `eval.txt`, against `Invented-3L-BF16.gguf`" in body
    assert "nothing was measured" not in body


def test_an_evaluation_without_a_base_gives_no_divergence():
    bare = replace(MEASURED, base=None, base_ppl=None, mean_kld=None, p99_kld=None, p999_kld=None, same_top=None)
    _, body = split(render_card([CardOutput(record(), ORIGIN, evaluation=bare)], CardOverrides()))
    assert "KL, measured" not in body and "Same top" not in body and "| 66.4255 |" in body


def test_several_outputs_have_a_row_each_and_a_dash_where_one_was_not_measured():
    other = record(plan(vram=False), "Invented-Q6.gguf", header_sha256="d" * 64)
    _, body = split(
        render_card([CardOutput(record(), ORIGIN, evaluation=MEASURED), CardOutput(other, ORIGIN)], CardOverrides())
    )
    rows = [line for line in body.split("## Running it")[0].splitlines() if line.startswith("| `Invented")]
    assert len(rows) == 2 and rows[1].endswith("| - | - | - | - | - |")
    assert body.count("### `Invented-Q6.gguf`") == 3  # running, types, making
    assert "Measured with `requant evaluate` (`Invented-Q4.gguf`) over" in body


def test_sizes_are_in_powers_of_ten_and_of_two():
    assert format_both_units(4_920_000_000) == "4.92 GB (4.58 GiB)"
    assert format_both_units(19_697_664) == "19.70 MB (18.79 MiB)"
    assert format_both_units(999) == "999 B"


def test_what_it_was_made_for_is_said_in_words():
    found = plan(budget={"ctx": 16384, "cache_type_k": "Q8_0", "cache_type_v": "Q8_0", "parallel": 2})
    vram = replace(found.limits[0], budget=12 * 2**30)
    assert (
        describe_budget(replace(found, limits=(vram,)))
        == "12 GiB of VRAM, 16384 tokens of context in Q8_0/Q8_0, 2 sequences"
    )
    assert describe_budget(replace(found, limits=(), budget={}, method="preset Q4_K_M")) == "preset Q4_K_M"


def test_the_repository_gives_links_and_a_line_to_download():
    files = (FileHash("Invented-Q4.gguf", 10, "e" * 64),)
    _, body = split(render_card([CardOutput(record(), ORIGIN, files)], CardOverrides(repository="me/Some-GGUF")))
    assert "[`Invented-Q4.gguf`](https://huggingface.co/me/Some-GGUF/blob/main/Invented-Q4.gguf)" in body
    assert "hf download me/Some-GGUF Invented-Q4.gguf --local-dir ." in body


def test_checksums_are_of_source_importance_plan_and_output():
    files, source = (FileHash("Invented-Q4.gguf", 10, "e" * 64),), (FileHash("Invented-3L-BF16.gguf", 20, "f" * 64),)
    made = record()
    _, body = split(render_card([CardOutput(made, ORIGIN, files, source)], CardOverrides()))
    table = body.split("## Checksums")[1]
    for what, digest in (
        ("source", "f" * 64), ("source, its header", "0" * 64), ("importance", "c" * 64),
        ("plan", made.plan.sha256()), ("output, its header", "b" * 64), ("output", "e" * 64),
    ):  # fmt: skip
        assert f"| {what} | `{digest}` |" in table


def test_mixtures_are_sorted_among_the_outputs_by_size():
    _, body = split(render_card([CardOutput(record(), ORIGIN)], CardOverrides()))
    rows = body.split("## Beside")[1].split("\n\n")[1].splitlines()[2:]
    sizes = [float(row.split("|")[2].split("(")[1].split(" KiB")[0]) for row in rows if "KiB" in row]
    assert sizes == sorted(sizes) and len(rows) == 13
    assert sum("**`Invented-Q4.gguf`**" in row for row in rows) == 1


def test_pictures_and_pages_beside_it_are_shown():
    _, body = split(render_card([CardOutput(record(), ORIGIN)], CardOverrides(), ["img/a b.png"], ["report.html"]))
    assert "(img/a%20b.png)" in body and "[Report page](report.html)" in body


def test_the_same_outputs_give_the_same_card():
    assert render_card([CardOutput(record(), ORIGIN)], CardOverrides()) == render_card(
        [CardOutput(record(), ORIGIN)], CardOverrides()
    )


ALLOWED = set("h1 h2 h3 p a code pre table thead tbody tr th td ul li strong img".split())  # noqa: SIM905


@given(st.sampled_from(HOSTILE) | st.text(max_size=40))
def test_no_string_from_a_file_becomes_markup(string):
    role = string or "x"
    name = (string.replace("/", "_").replace("\0", "") or "x") + ".gguf"
    of = plan(1, {role: (256, 256)}, source=name, notes=(string,), method="fisher", solver=string)
    made = record(of, name, imatrix=string, notes=(string,), version=string)
    origin = ModelOrigin(string, string, (), (), "other", "x", string, (string,), (string,))
    measured = replace(MEASURED, text=string, base=string)
    text = render_card([CardOutput(made, origin, (FileHash(name, 1, "e" * 64),), (), measured)], CardOverrides())
    head, body = split(text)
    assert head["license"] == "other"
    found = rendered(body)
    assert {tag for tag, _ in found.tags} <= ALLOWED
    for tag, attributes in found.tags:
        for key, value in attributes:
            assert (tag, key) in {("th", "style"), ("td", "style"), ("code", "class")}, (tag, key, value)
    assert brief(name, FILE_NAME) in found.text
    titles = [tag for tag, _ in found.tags if tag in ("h1", "h2")]
    assert titles == ["h1", *["h2"] * 7]


# what metadata say


def test_the_model_is_named_by_its_own_repository_and_not_by_what_it_was_made_from():
    said = {
        "general__name": "SmolLM2 135M Instruct",
        "general__base_model__count": 1,
        "general__base_model__0__repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
    }
    found = read_origin(metadata(**said))
    assert (found.repositories, found.parents) == ((), ("HuggingFaceTB/SmolLM2-135M",))
    found = read_origin(
        metadata(**said, general__source__repo_url="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct")
    )
    assert found.repositories == ("HuggingFaceTB/SmolLM2-135M-Instruct",)
    copy = said | {"general__base_model__0__repo_url": "https://huggingface.co/x/SmolLM2-135M-Instruct"}
    assert read_origin(metadata(**copy)).repositories == ("x/SmolLM2-135M-Instruct",)


@pytest.mark.parametrize("url", ["https://e.vil/a/b", "javascript:alert(1)", "https://huggingface.co/a", "a/b\n", ""])
def test_only_repositories_on_the_hub_count(url):
    assert read_origin(metadata(general__repo_url=url)).repositories == ()


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"general__license": "CC0-1.0"}, ("cc0-1.0", "", "")),
        ({"general__license": "other", "general__license__name": "My Own 1.0"}, ("other", "my-own-1.0", "")),
        ({"general__license": "Some Custom: yes"}, ("other", "some-custom-yes", "")),
        ({"general__license": "gemma", "general__license__link": "https://x.y/z"}, ("gemma", "", "https://x.y/z")),
        ({"general__license": "mit", "general__license__link": "javascript:x"}, ("mit", "", "")),
        ({"general__license": 7, "general__license__name": 8}, ("", "", "")),
    ],
)
def test_a_licence_is_one_that_the_hub_knows_or_other_with_a_name(said, wanted):
    found = read_origin(metadata(**said))
    assert (found.license, found.license_name, found.license_link) == wanted


def test_what_the_user_says_goes_before_what_the_file_says():
    origin = override_origin(CardOverrides(("a/b",), "other", "Mine", "https://x.y", ("de",), ("t",)), ORIGIN)
    assert origin.repositories == ("a/b",)
    assert (origin.license, origin.license_name, origin.license_link) == ("other", "mine", "https://x.y")
    assert (origin.languages, origin.tags) == (("de",), ("t", "chat"))


def test_what_embeds_text_is_not_said_to_write_it():
    found = read_origin(metadata(general__architecture="bert", bert__attention__causal=False))
    head, _ = split(render_card([CardOutput(record(), found)], CardOverrides()))
    assert "pipeline_tag" not in head


# commands


def test_one_run_is_one_command():
    assert reproduction_commands(record()) == [
        "requant convert Invented-3L-BF16.gguf Invented-Q4.gguf --vram 12GiB --ctx 8192"
    ]


@pytest.mark.parametrize(
    ("options", "scoring", "imatrix", "wanted"),
    [
        (("--bpw", "4"), (), None, ["plan SOURCE -o plan.json --bpw 4", "convert SOURCE OUT --plan plan.json"]),
        (("--bpw", "4"), (), "i.gguf",
         ["plan SOURCE -o plan.json --bpw 4", "convert SOURCE OUT --plan plan.json --imatrix i.gguf"]),
        (("--bpw", "4", "--imatrix", "i.gguf"), (), "i.gguf", ["convert SOURCE OUT --bpw 4 --imatrix i.gguf"]),
        (("--bpw", "4", "--losses", "l.json"), ("--quick",), None,
         ["score SOURCE -o l.json --quick", "convert SOURCE OUT --bpw 4 --losses l.json"]),
        (("--bpw", "4", "--losses", "l.json"), (), "i.gguf",
         ["plan SOURCE -o plan.json --bpw 4 --losses l.json", "convert SOURCE OUT --plan plan.json --imatrix i.gguf"]),
        (("--preset", "Q4_K_M"), (), None, ["convert SOURCE OUT --preset Q4_K_M"]),
        ((), (), None, ["convert SOURCE OUT --plan OUT.requant.json"]),
        (("--bpw", "4"), (), "random token ids", ["convert SOURCE OUT --bpw 4"]),
        (("--bpw", "4", "--text", "t.txt"), (), "t.txt", ["convert SOURCE OUT --bpw 4 --text t.txt"]),
        (("--bpw", "4", "--text=-t.txt"), (), "-t.txt", ["convert SOURCE OUT --bpw 4 --text=-t.txt"]),
        (("--bpw", "4", "--text", "t.txt"), (), "random token ids",
         ["plan SOURCE -o plan.json --bpw 4 --text t.txt",
          "convert SOURCE OUT --plan plan.json --imatrix 'random token ids'"]),
    ],
)  # fmt: skip
def test_the_commands_are_those_that_give_the_same_bytes(options, scoring, imatrix, wanted):
    made = record(plan(source="SOURCE", options=options, scoring=scoring), "OUT", imatrix=imatrix)
    assert reproduction_commands(made) == [f"requant {line}" for line in wanted]


def test_a_plan_of_which_nothing_was_scored_is_one_command():
    copied = plan(source="SOURCE", options=("--vram", "12GiB"))
    candidates = {c.name: {c.source_type: 0.0} for c in copied.choices}
    assert reproduction_commands(record(replace(copied, candidates=candidates), "OUT", imatrix=None)) == [
        "requant convert SOURCE OUT --vram 12GiB"
    ]


def test_a_command_is_one_that_a_shell_takes_as_it_is():
    made = record(plan(source="-a b.gguf", options=("--tensor-type", "a|b=Q4_K")), "$(x).gguf")
    assert reproduction_commands(made) == ["requant convert './-a b.gguf' '$(x).gguf' --tensor-type 'a|b=Q4_K'"]


def test_odd_weights_and_split_outputs_are_named():
    made = record(plan(options=()), "M-00001-of-00002.gguf", imatrix=None)
    tensors = (replace(made.tensors[0], odd=Anomalies(nonfinite=1)), *made.tensors[1:])
    note, line = reproduction_commands(replace(made, tensors=tensors))
    assert note.startswith("# ") and "--keep-split" in note
    assert (
        "convert Invented-3L-BF16.gguf M.gguf --nonfinite keep-type --plan M-00001-of-00002.gguf.requant.json" in line
    )


def test_records_that_know_no_options_are_read_and_a_plan_that_was_edited_forgets_them():
    text = record().to_json()
    old = text.replace('"options": ["--vram", "12GiB", "--ctx", "8192"],\n', "")
    assert old != text
    assert Conversion.from_json(old).plan.options == ()
    edited = plan().to_json().replace('"type": "Q4_K"', '"type": "Q5_K"', 1)
    kept = Plan.from_json(plan().to_json())
    assert kept.options == ("--vram", "12GiB", "--ctx", "8192")
    assert Plan.from_json(edited).options == ()


def test_names_of_files_have_no_folder():
    assert Path(record().output).name == str(record().output)

"""Every option of a conversion either is in the head of its journal, or cannot change the output."""

import inspect

import pytest
from commands import IMATRIX, TINY, run

from requant.api import convert as api_convert
from requant.api.batch import items
from requant.api.model import Model, open
from requant.cli import convert
from requant.errors import OutputRefused

HARMLESS = {
    *("model", "out", "reports", "dry_run", "force", "restart", "as_json", "no_verify", "threads", "cluster"),
    *("progress", "quiet", "verbose", "debug"),
}
OF_THE_API = {"type": "type_name", "windows": "n_windows", "keep_split": "keep", "max_shard_size": "max_size"}
QUICK, VRAM, TYPE = ({"bpw": 6, "quick": True}, {"vram": "1GiB", "quick": True}, {"type": "Q8_0"})
# parameter -> the other options of the command, and two values (None: not given)
DECIDING = {
    **dict.fromkeys(("ram", "reserve"), (VRAM, None, "1GiB")),
    **dict.fromkeys(("cache_type_k", "cache_type_v"), (VRAM, None, "q8_0")),
    **dict.fromkeys(("ctx", "parallel", "ubatch"), (VRAM, None, 64)),
    **dict.fromkeys(("draft", "mmproj"), (VRAM, None, TINY)),
    **dict.fromkeys(("mtp", "assume"), (VRAM, None, True)),
    **{name: (QUICK, None, x) for name, x in (("engine", "ollama"), ("size", "4MiB"))},
    **{name: (VRAM, None, x) for name, x in (("min_speed", 3.0), ("bandwidth", "gpu=400"))},
    **dict.fromkeys(("output_tensor_type", "token_embedding_type"), (TYPE, None, "Q6_K")),
    "prefer_within": (VRAM | {"engine": "llama.cpp-blackwell"}, None, 0.1),
    "max_loss": ({"bpw": 6}, None, 0.1),
    "time_price": ({"vram": "1GiB"}, None, 0.1),
    "vram": (VRAM, "1GiB", "2GiB"),
    "bpw": (QUICK, 6, 7),
    "tensor_type": (TYPE, None, {"attn_v": "Q6_K"}),
    "min_type": (QUICK, None, {"attn_v": "Q6_K"}),
    "tensor_type_file": (TYPE, None, "rules.txt"),
    "group": (TYPE, None, "attn_q"),
    "types": (QUICK, None, "Q4_K,Q6_K"),
    "type_name": (TYPE, "Q8_0", "Q4_0"),
    "plan": ({}, "plan.json", "other.json"),
    "preset": ({}, "Q4_K_M", "Q5_K_M"),
    "like": (QUICK, None, TINY),
    "imatrix": (TYPE, None, IMATRIX),
    "text": ({"bpw": 6}, None, "rules.txt"),
    "tokens": ({"bpw": 6}, None, "rules.txt"),
    "statistics": ({"bpw": 6}, None, IMATRIX),
    "n_windows": ({"bpw": 6}, None, 3),
    "window": ({"bpw": 6}, None, 64),
    "quick": ({"bpw": 6}, None, True),
    "losses": (QUICK, None, "losses.json"),
    "measure": (QUICK, None, 2),
    "nonfinite": (TYPE, None, "keep-type"),
    "no_imatrix": (TYPE, None, True),
    "effort": (TYPE, None, "fast"),
    "compensate": (TYPE, None, "fast"),
    "no_compensate": (TYPE, None, True),
    "max_memory": (TYPE | {"compensate": "fast"}, None, "4GiB"),
    "allow_requantize": (TYPE, None, True),
    "keep": (TYPE, None, True),
    "max_size": (TYPE, None, "5MB"),
}


def test_every_option_is_classified():
    of_the_command = {param.name for param in convert.command.params}
    of_python = {OF_THE_API.get(name, name) for name in inspect.signature(Model.convert).parameters} - {"self"}
    assert of_the_command == HARMLESS | DECIDING.keys() and not HARMLESS & DECIDING.keys()
    assert of_python <= of_the_command
    assert items._IRRELEVANT - {"losses"} <= HARMLESS  # a batch gives each conversion a plan


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of small inputs, in which conversions stop before they begin, and tell their request."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.txt").write_text("attn_q=q6_k\n")
    for name, text in PLANS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "losses.json").write_text(LOSSES)
    requests = []

    def claim(session, out, options, measure):
        requests.append(api_convert._describe_request(session, options.splitting, measure))
        raise OutputRefused(out, "the conversion would begin now")

    monkeypatch.setattr(api_convert, "_claim", claim)
    return requests


with open(TINY) as model:
    LOSSES = model.score(quick=True, types="Q4_0,Q8_0").to_json()
    PLANS = {
        f"{name}.json": model.plan(preset=preset).to_json()
        for name, preset in (("plan", "Q4_K_M"), ("other", "Q5_K_M"))
    }


def words_of(options):
    params, words = {param.name: param.opts[-1] for param in convert.command.params}, []
    for name, value in options.items():
        flag = params[OF_THE_API.get(name, name)]
        pairs = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [value]
        words += [flag] if value is True else [word for pair in pairs for word in (flag, pair)]
    return words


@pytest.mark.parametrize("name", DECIDING)
def test_an_option_that_decides_the_output_is_in_the_head(folder, capsys, name):
    base, before, after = DECIDING[name]
    keyword = {parameter: keyword for keyword, parameter in OF_THE_API.items()}.get(name, name)
    base = {key: value for key, value in base.items() if key != keyword}
    given = [base if value is None else base | {keyword: value} for value in (before, after)]
    for options in given:
        assert run(capsys, "convert", TINY, "out.gguf", *words_of(options)).code == 5
        with open(TINY) as model, pytest.raises(OutputRefused):
            model.convert("out.gguf", **options)
    command, python, changed_command, changed_python = folder
    assert command == python and changed_command == changed_python
    assert changed_command != command


@pytest.mark.parametrize("name", ["no_verify", "threads", "force", "restart"])
def test_an_option_that_cannot_change_the_output_is_not(folder, name):
    with open(TINY) as model:
        for options in ({}, {name: 2 if name == "threads" else True}):
            with pytest.raises(OutputRefused):
                model.convert("out.gguf", type="Q8_0", **options)
    assert folder[0] == folder[1]

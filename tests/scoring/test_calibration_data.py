"""Windows of tokens: where they come from, which are taken, and what is said of bad ones."""

import numpy as np
import pytest
import real_models
from gguf_files import BOOL, STR, U32, pair
from model.forward import families

from requant.container.source import open_source
from requant.errors import BadInput
from requant.scoring import calibration_data as module
from requant.scoring.calibration_data import (
    WindowSpec,
    default_windows,
    drawn_windows,
    read_text_windows,
    read_token_windows,
)


@pytest.fixture
def source(tmp_path):
    with open_source(families.write("qwen3", tmp_path / "model.gguf")) as opened:
        yield opened


def written(tmp_path, content):
    path = tmp_path / "text"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_windows_are_spread_over_the_text_and_those_held_out_are_others(source, tmp_path):
    path = written(tmp_path, "".join(chr(97 + i // 16) * 16 for i in range(0, 16 * 10, 1))[:160])
    every = read_text_windows(path, source, WindowSpec(16)).windows
    assert every.shape == (10, 16)
    some = read_text_windows(path, source, WindowSpec(16, 3)).windows
    np.testing.assert_array_equal(some, every[[0, 3, 6]])
    held = read_text_windows(path, source, WindowSpec(16, 3, held_out=True)).windows
    np.testing.assert_array_equal(held, every[[1, 4, 7]])


def test_every_window_begins_with_bos_where_texts_do(tmp_path):
    more = pair("tokenizer.ggml.add_bos_token", BOOL, 1)
    path = families.write("qwen3", tmp_path / "model.gguf", vocabulary=(*families.VOCABULARY, more))
    with open_source(path) as source:
        windows = read_text_windows(written(tmp_path, "a" * 100), source, WindowSpec(16)).windows
    assert (windows[:, 0] == 256).all() and (windows[:, 1:] != 256).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "too short"),
        ("tiny", "got 4 tokens, limit at least one window of 512"),
        (b"\xff\xfe", "not UTF-8 text at byte 0"),
    ],
)
def test_a_text_that_will_not_do_is_refused(source, tmp_path, content, said):
    with pytest.raises(BadInput, match=said):
        read_text_windows(written(tmp_path, content), source, WindowSpec())


def test_a_text_that_is_not_there_is_bad_input(source, tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        read_text_windows(tmp_path / "none.txt", source, WindowSpec())


def test_a_script_that_the_vocabulary_does_not_have_is_refused(tmp_path):
    from gguf_files import ARR, F32, I32

    tokens, types = ["<unk>", "<s>", "</s>", "a", "b"], [2, 3, 3, 1, 1]
    vocabulary = (
        pair("tokenizer.ggml.model", STR, "llama"),
        pair("tokenizer.ggml.tokens", ARR, (STR, tokens)),
        pair("tokenizer.ggml.token_type", ARR, (I32, types)),
        pair("tokenizer.ggml.scores", ARR, (F32, [0.0] * 5)),
        pair("tokenizer.ggml.unknown_token_id", U32, 0),
    )
    path = families.write("qwen3", tmp_path / "model.gguf", vocabulary=vocabulary, n_tokens=5)
    with open_source(path) as source, pytest.raises(BadInput, match="script that the model's vocabulary does not have"):
        read_text_windows(written(tmp_path, " ".join("\u0434a" * 50)), source, WindowSpec(16))


def test_ids_are_read_from_a_file(source, tmp_path):
    ids = read_token_windows(written(tmp_path, " ".join(map(str, range(40))) + ",7\n"), source, WindowSpec(20))
    np.testing.assert_array_equal(ids.windows, np.arange(40).reshape(2, 20))


@pytest.mark.parametrize(("content", "said"), [("1 2 x", "no list of token ids"), ("1 2 257", "no token of the model")])
def test_a_file_of_other_things_is_refused(source, tmp_path, content, said):
    with pytest.raises(BadInput, match=said):
        read_token_windows(written(tmp_path, content), source, WindowSpec(16))


def test_the_shipped_text_is_the_default_and_drawn_ids_are_the_fallback(source, tmp_path):
    with open_source(real_models.TINY) as tiny:
        found = default_windows(tiny, WindowSpec(n=8))
    assert found.name == "requant's calibration.txt" and found.windows.shape == (8, 512) and not found.notes
    other = families.write("qwen3", tmp_path / "b.gguf", vocabulary=(pair("tokenizer.ggml.model", STR, "bert"),))
    with open_source(other) as unknown:
        drawn = default_windows(unknown, WindowSpec(32, 4))
    assert drawn.name == "random token ids" and "not known: 'bert'" in drawn.notes[0]
    np.testing.assert_array_equal(drawn.windows, drawn_windows(source, WindowSpec(32, 4)).windows)


def test_without_the_package_the_message_names_it(source, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (note,) = module.default_windows(source, WindowSpec(16, 2)).notes
    assert "requant[calibrate]" in note

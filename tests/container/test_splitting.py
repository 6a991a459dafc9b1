"""Split outputs: the tensors, header and name of each file."""

import hashlib
from itertools import chain, pairwise
from pathlib import Path

import pytest

from requant.container import splitting as splitting_module
from requant.container.header import combine_sha256, parse_header
from requant.container.layout import lay_out
from requant.container.metadata import Metadata
from requant.container.splitting import WHOLE, Splitting, headers_sha256, lay_out_files, output_paths, total_size
from requant.errors import BadInput

KEYS = Metadata("m", {}).with_values({"general.architecture": ("str", "llama"), "words": ("str", "w" * 100)})
TENSORS = [(f"t{i}", (256, i + 1), 8) for i in range(6)]  # of 272, 544, ... 1632 bytes
ORIGINS = [0, 0, 1, 1, 2, 2]


def laid_out(splitting, metadata=KEYS, tensors=TENSORS, origins=ORIGINS):
    return lay_out_files(metadata, tensors, origins, "out.gguf", splitting)


def named(layouts):
    return [[t.name for t in layout.tensors] for layout in layouts]


def test_an_output_that_is_not_split_is_one_file_with_the_keys_it_had():
    (layout,) = laid_out(WHOLE)
    assert layout == lay_out(KEYS, TENSORS, "out.gguf")
    assert laid_out(Splitting(max_size=10**6)) == laid_out(Splitting(keep=True), origins=[0] * 6) == (layout,)


def test_files_are_kept_as_they_were():
    layouts = laid_out(Splitting(keep=True))
    assert named(layouts) == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"]]


def test_every_file_says_its_number_and_the_first_has_all_keys(tmp_path):
    metadata = KEYS.with_values({"general.alignment": ("u32", 64)})
    for i, layout in enumerate(laid_out(Splitting(keep=True), metadata)):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(layout.header.ljust(layout.size, b"\0"))
        found = parse_header(path).metadata
        assert (found.get("split.no"), found.get("split.count"), found.get("split.tensors.count")) == (i, 3, 6)
        assert [found.values[k].type_name for k in ("split.no", "split.count", "split.tensors.count")] == [
            "u16",
            "u16",
            "i32",
        ]
        assert found.get("general.alignment") == 64
        assert len(found) == (6 if i == 0 else 4)


def sizes(most):
    return [layout.size for layout in laid_out(Splitting(max_size=most))]


def test_files_are_as_large_as_they_may_be_and_no_larger():
    for most in range(2100, 7000, 32):
        layouts = laid_out(Splitting(max_size=most))
        assert [name for names in named(layouts) for name in names] == [t[0] for t in TENSORS]
        assert all(layout.size <= most for layout in layouts)
        # the first tensor of the next file would not have gone in
        for i, (layout, after) in enumerate(pairwise(layouts)):
            n = sum(len(x.tensors) for x in layouts[:i])
            more = TENSORS[n : n + len(layout.tensors) + 1]
            keys = splitting_module._number_metadata(KEYS, i, len(layouts), 6)
            assert lay_out(keys, more, "out").size > most, (most, after)


def test_a_file_may_be_exactly_as_large_as_asked():
    (whole,) = laid_out(WHOLE)
    numbered = lay_out(splitting_module._number_metadata(KEYS, 0, 2, 6), TENSORS, "out").size
    assert len(laid_out(Splitting(max_size=numbered))) == 1 and numbered > whole.size
    assert len(laid_out(Splitting(max_size=numbered - 1))) == 2


def test_the_keys_alone_may_fill_the_first_file():
    big = KEYS.with_values({"big": ("str", "b" * 3000)})
    layouts = laid_out(Splitting(max_size=3500), big)
    assert named(layouts)[0] == [] and [*chain(*named(layouts))] == [t[0] for t in TENSORS]
    assert all(layout.size <= 3500 for layout in layouts)


def test_keys_or_a_tensor_larger_than_a_file_may_be_are_refused():
    n_keys = 24 + len(splitting_module._number_metadata(KEYS, 0, 2, 6).encode())
    with pytest.raises(BadInput) as caught:
        laid_out(Splitting(max_size=n_keys - 1))
    hint = f"--max-shard-size must be at least {n_keys} B"
    said = f"out.gguf: the keys alone are larger than a file may be (got {n_keys}, limit {n_keys - 1}); {hint}"
    assert str(caught.value) == said
    with pytest.raises(BadInput) as caught:
        laid_out(Splitting(max_size=n_keys))
    assert "tensor 't0' alone is larger" in str(caught.value)
    with pytest.raises(BadInput) as caught:
        laid_out(Splitting(max_size=1500))
    size = lay_out(splitting_module._number_metadata(KEYS, 1, 2, 6), TENSORS[4:5], "out").size
    assert str(caught.value) == (
        f"out.gguf: tensor 't4' alone is larger than a file may be (got {size} bytes, limit 1500); "
        f"--max-shard-size must be at least {size / 1024:.2f} KiB"
    )


def test_too_many_files_are_refused(monkeypatch):
    monkeypatch.setattr(splitting_module, "MAX_SHARDS", 3)
    assert len(laid_out(Splitting(keep=True))) == 3
    with pytest.raises(BadInput) as caught:
        laid_out(Splitting(keep=True), origins=[0, 1, 2, 3, 3, 3])
    said = "out.gguf: would be split into too many files (got 4, limit 3); raise --max-shard-size"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("out", "stem"),
    [("o.gguf", "o"), ("o", "o"), ("o.bin", "o.bin"), ("o-00002-of-00009.gguf", "o"), ("o-2-of-9.gguf", "o-2-of-9")],
)
def test_files_are_numbered_as_llama_cpp_does(out, stem):
    layouts = laid_out(Splitting(keep=True))
    assert output_paths(Path("a") / out, layouts) == [Path("a") / f"{stem}-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert output_paths(Path("a") / out, layouts[:1]) == [Path("a") / out]


def test_size_and_digest_are_those_of_all_files():
    layouts = laid_out(Splitting(keep=True))
    assert total_size(layouts) == sum(len(x.header) + sum(-(-t.n_bytes // 32) * 32 for t in x.tensors) for x in layouts)
    digests = [hashlib.sha256(x.header).hexdigest() for x in layouts]
    assert headers_sha256(layouts) == combine_sha256(digests) == hashlib.sha256("".join(digests).encode()).hexdigest()
    assert headers_sha256(layouts[1:2]) == digests[1]

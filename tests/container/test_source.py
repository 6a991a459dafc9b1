"""Sources: single files and shards, opened whole, read from threads, and watched for change."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import ARCHITECTURE, ARR, STR, U32, File, Tensor, pair, split_files, split_pairs, write_files

from requant.common import open_files
from requant.container.source import open_source, require_model
from requant.errors import BadInput, SourceChanged


def _change(files, i, **changes):
    """The split with shard `i` (0-based) changed."""
    name = list(files)[i]
    return files | {name: replace(files[name], **changes)}


def _refused(folder, files, text, given=0):
    paths = write_files(folder, files)
    with pytest.raises(BadInput, match=text) as caught:
        open_source(paths[given])
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_shard_opens_the_whole_model(tmp_path, given):
    paths = write_files(tmp_path, split_files())
    with open_source(paths[given]) as source:
        assert (source.path, source.name, source.files) == (paths[0], paths[0].name, tuple(paths))
        assert [(t.name, t.file) for t in source.tensors] == [
            (f"blk.{i}.w{j}.weight", i) for i in range(3) for j in range(2)
        ]
        assert require_model(source) == "llama"
        assert len(source.opened) == 3
        for path, tensor in zip((p for p in paths for _ in range(2)), source.tensors, strict=True):
            assert source.read_rows(tensor).tobytes() in path.read_bytes()


def test_every_shard_gives_the_same_digest_and_another_model_another(tmp_path):
    paths = write_files(tmp_path, split_files())
    digests = set()
    for path in paths:
        with open_source(path) as source:
            digests.add(source.header_sha256)
    with open_source(File().write(tmp_path / "single.gguf")) as source:
        digests.add(source.header_sha256)
    assert len(digests) == 2


def test_the_first_shard_may_hold_no_tensors(tmp_path):
    files = split_files(count=2)
    first, second = files
    files[first] = File(File().pairs + split_pairs(0, 2, 2), ())
    files[second] = replace(files[second], pairs=split_pairs(1, 2, 2))
    with open_source(write_files(tmp_path, files)[1]) as source:
        assert len(source.tensors) == 2
        assert source.warnings == ()


def test_shards_behind_symbolic_links_are_found_by_the_links_names(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for i, (name, file) in enumerate(split_files().items()):
        file.write(tmp_path / "blobs" / f"{i}")
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / f"{i}")
    with open_source(tmp_path / "snapshot" / "model-00002-of-00003.gguf") as source:
        assert len(source.tensors) == 6


def test_a_missing_shard_is_named_with_the_expected_list(tmp_path):
    files = split_files()
    del files["model-00003-of-00003.gguf"]
    message = _refused(tmp_path, files, "1 of 3 files are missing: model-00003-of-00003.gguf")
    assert "model-00001-of-00003.gguf, model-00002-of-00003.gguf, model-00003-of-00003.gguf" in message


def test_siblings_are_taken_literally_and_never_as_a_pattern(tmp_path):
    files = split_files(stem="mo[d]el*")
    files.pop("mo[d]el*-00002-of-00003.gguf")
    write_files(tmp_path, split_files())
    _refused(tmp_path, files, "1 of 3 files are missing")


def test_more_files_than_engines_can_count_are_refused(tmp_path):
    files = {"model-00001-of-65536.gguf": File((*File().pairs, pair("split.count", U32, 65536)))}
    _refused(tmp_path, files, r"'split.count' is too large \(got 65536, limit 65535\)")


def test_a_model_of_1200_files_is_read(tmp_path):
    n = 1200
    files = {
        f"m-{i + 1:05d}-of-{n:05d}.gguf": File(
            (() if i else File().pairs) + split_pairs(i, n, n), (Tensor(f"blk.{i}.w.weight"),)
        )
        for i in range(n)
    }
    paths = write_files(tmp_path, files)
    with open_source(paths[7]) as source:
        assert len(source.files) == len(source.tensors) == n
        assert source.read_rows(source.tensors[-1]).tobytes() in paths[-1].read_bytes()


@pytest.fixture
def few_descriptors(monkeypatch):
    """Let four files be open at once."""
    monkeypatch.setattr(open_files, "_raise_limit", lambda _: 4)


def _count_open(folder):
    found = [fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return sum(folder in path.parents for path in found)


def test_more_files_than_may_be_open_are_read_from_threads(few_descriptors, tmp_path):
    paths = write_files(tmp_path, split_files(count=9))
    with open_source(paths[0]) as source, ThreadPoolExecutor(6) as threads:
        assert 1 <= _count_open(tmp_path) <= 4
        rows = list(threads.map(source.read_rows, source.tensors * 20))
        for tensor, data in zip(source.tensors * 20, rows, strict=True):
            assert data.tobytes() in paths[tensor.file].read_bytes()
    assert _count_open(tmp_path) == 0


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda path: path.unlink(), "was removed while it was being read"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "changed while it was being read: size was"),
        (lambda path: os.utime(path, ns=(1, 1)), "changed while it was being read: mtime_ns was"),
        (lambda path: Path(shutil.copy2(path, f"{path}.new")).replace(path), "ino was"),
    ],
    ids=["removed", "longer", "touched", "replaced"],
)
def test_a_file_that_is_opened_again_must_be_the_same(few_descriptors, tmp_path, harm, says):
    paths = write_files(tmp_path, split_files(count=9))
    with open_source(paths[0]) as source:
        harm(paths[0])
        with pytest.raises(SourceChanged, match=says):
            source.read_rows(source.tensors[0])


def test_split_no_out_of_range_is_refused(tmp_path):
    files = _change(split_files(), 0, pairs=File().pairs + split_pairs(3, 3, 6))
    _refused(tmp_path, files, "'split.no' is out of range")


def test_split_no_missing_is_refused(tmp_path):
    files = _change(split_files(), 0, pairs=(*File().pairs, *split_pairs(0, 3, 6)[1:]))
    _refused(tmp_path, files, "'split.no' is out of range")


def test_split_no_of_a_sibling_must_fit_its_name(tmp_path):
    _refused(tmp_path, _change(split_files(), 2, pairs=split_pairs(1, 3, 6)), "'split.no' does not fit its name")


def test_split_count_of_a_sibling_must_agree(tmp_path):
    _refused(tmp_path, _change(split_files(), 2, pairs=split_pairs(2, 4, 6)), "'split.count' does not fit its name")


@pytest.mark.parametrize("given", [0, 1])
def test_split_tensors_count_wrong_is_refused(tmp_path, given):
    files = {
        name: replace(file, pairs=file.pairs[:-3] + split_pairs(i, 3, 7))
        for i, (name, file) in enumerate(split_files().items())
    }
    _refused(tmp_path, files, r"'split.tensors.count' does not fit the shards \(got 6, limit 7\)", given)


def test_split_tensors_count_missing_from_the_first_shard_is_refused(tmp_path):
    files = _change(split_files(), 0, pairs=File().pairs + split_pairs(0, 3, 6)[:2])
    _refused(tmp_path, files, "'split.tensors.count' is missing")


def test_split_dup_tensor_across_shards_is_refused_with_both_files(tmp_path):
    files = _change(split_files(), 2, tensors=(Tensor("blk.0.w0.weight"), Tensor("x")))
    message = _refused(tmp_path, files, "'blk.0.w0.weight' is also in 'model-00001-of-00003.gguf'")
    assert "model-00003-of-00003.gguf: " in message


def test_split_shard_is_symlink_loop_is_refused(tmp_path):
    files = split_files()
    del files["model-00002-of-00003.gguf"]
    (tmp_path / "model-00002-of-00003.gguf").symlink_to("model-00002-of-00003.gguf")
    _refused(tmp_path, files, "00002-of-00003.gguf: is a loop of symbolic links")


def test_a_shard_that_is_a_fifo_does_not_hang(tmp_path):
    files = split_files()
    del files["model-00002-of-00003.gguf"]
    os.mkfifo(tmp_path / "model-00002-of-00003.gguf")
    _refused(tmp_path, files, "00002-of-00003.gguf: is a FIFO")


@pytest.mark.parametrize(
    "name", ["model.gguf", "model-00002-of-00003.gguf", "model-00001-of-00004.gguf", "x-1-of-3.gguf"]
)
def test_split_name_mismatch_is_refused(tmp_path, name):
    first = split_files()["model-00001-of-00003.gguf"]
    _refused(tmp_path, {name: first}, "must end in '-00001-of-00003.gguf'")


def test_shards_of_different_models_are_refused(tmp_path):
    pairs = (*split_pairs(1, 3, 6), pair(ARCHITECTURE, STR, "gemma3"))
    _refused(tmp_path, _change(split_files(), 1, pairs=pairs), "different models")


def test_a_shard_may_repeat_the_keys_of_the_first(tmp_path):
    files = _change(split_files(), 1, pairs=File().pairs + split_pairs(1, 3, 6))
    with open_source(write_files(tmp_path, files)[2]) as source:
        assert len(source.tensors) == 6


def test_a_broken_sibling_is_named(tmp_path):
    _refused(tmp_path, _change(split_files(), 1, version=9), "model-00002-of-00003.gguf: has an unsupported")


@pytest.mark.parametrize("count", [0, 1])
def test_a_split_of_one_is_a_single_file_under_any_name(tmp_path, count):
    with open_source(File(File().pairs + split_pairs(0, count, 1)).write(tmp_path / "any.gguf")) as source:
        assert len(source.files) == 1


def test_a_refusal_leaves_no_file_open(tmp_path):
    paths = write_files(tmp_path, _change(split_files(), 2, version=9))
    before = list(Path("/proc/self/fd").iterdir())
    for _ in range(3):
        with pytest.raises(BadInput):
            open_source(paths[0])
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)


def test_closing_twice_does_no_harm(tmp_path):
    source = open_source(File().write(tmp_path / "m.gguf"))
    source.close()
    source.close()


@pytest.mark.parametrize(("kind", "text"), [("adapter", "'adapter'"), ("imatrix", "--imatrix")])
def test_adapters_and_imatrices_open_but_are_no_models(tmp_path, kind, text):
    path = File().with_pairs(pair("general.type", STR, kind)).write(tmp_path / "m.gguf")
    with open_source(path) as source, pytest.raises(BadInput, match=text):
        require_model(source)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (File(tensors=(Tensor("blk.0.attn_q.weight.lora_a", (32, 8)),)), "a LoRA adapter"),
        (File(tensors=(Tensor("direction.1", (32,)), Tensor("direction.2", (32,)))), "a control vector"),
        (File((pair(ARCHITECTURE, STR, "controlvector"),)), "a control vector"),
        (File((pair("tokenizer.ggml.tokens", ARR, (STR, ["a"])),), ()), "a vocabulary without weights"),
    ],
)
def test_other_files_are_told_by_what_is_in_them(tmp_path, file, words):
    said = f"is not a model but {words}"
    with open_source(file.write(tmp_path / "m.gguf")) as source, pytest.raises(BadInput, match=said):
        require_model(source)


def test_a_model_needs_tensors(tmp_path):
    with (
        open_source(File(tensors=()).write(tmp_path / "m.gguf")) as source,
        pytest.raises(BadInput, match="no tensors"),
    ):
        require_model(source)


@pytest.mark.parametrize("name", ["", "a/b", "a" * 65, "ll\nama", ".", "\x1b[0m"])
def test_an_architecture_must_be_a_plain_name(tmp_path, name):
    path = File((pair(ARCHITECTURE, STR, name),)).write(tmp_path / "m.gguf")
    with open_source(path) as source, pytest.raises(BadInput, match="usable name") as caught:
        require_model(source)
    assert str(caught.value).isprintable()


def test_rows_of_a_real_file_are_what_gguf_py_reads():
    path = Path(__file__).parents[2] / "fixtures" / "tiny-llama-f16.gguf"
    with open_source(path) as source:
        for theirs in gguf.GGUFReader(path).tensors[:8]:
            ours = source.read_rows(source.tensor(theirs.name))
            assert np.array_equal(ours.reshape(-1), np.asarray(theirs.data).view(np.uint8).reshape(-1))


def test_rows_can_be_read_from_many_threads_at_once(tmp_path):
    data = np.random.default_rng(1).integers(0, 256, (512, 1024), np.uint8)
    path = File(tensors=(Tensor("pad"), Tensor("a", (256, 512), 0, data=data.tobytes()))).write(tmp_path / "m.gguf")
    wrong = []
    with open_source(path) as source:
        tensor = source.tensor("a")

        def read(seed):
            rng = np.random.default_rng(seed)
            for _ in range(100):
                first, n = int(rng.integers(0, 512)), int(rng.integers(0, 64))
                n = min(n, 512 - first)
                rows = source.read_rows(tensor, first, n)
                if rows.shape != (n, 1024) or not np.array_equal(rows, data[first : first + n]):
                    wrong.append((first, n))

        threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert np.array_equal(source.read_rows(tensor), data)
    assert wrong == []


def test_an_unknown_tensor_is_bad_input(tmp_path):
    with open_source(File().write(tmp_path / "m.gguf")) as source:
        assert "x" not in source
        with pytest.raises(BadInput, match="no tensor 'x'"):
            source.tensor("x")


def test_a_source_that_shrinks_is_noticed_by_the_read(tmp_path):
    path = File().write(tmp_path / "m.gguf")
    with open_source(path) as source:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(SourceChanged, match="1 bytes at offset"):
            source.read_rows(source.tensors[0])


def _touch(path):
    os.utime(path, ns=(1, 1))


def _replace(path):
    status = path.stat()
    path.rename(path.with_suffix(".old"))
    File().write(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _grow(path):
    status = path.stat()
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_touch, r"mtime_ns was \d+, now 1"),
        (_replace, r"ino was \d+, now \d+"),
        (_grow, r"size was (\d+), now \d+"),
        (os.unlink, "was removed"),
    ],
)
def test_a_changed_source_is_named_with_the_field_before_and_after(tmp_path, change, text):
    path = File().write(tmp_path / "m.gguf")
    with open_source(path) as source:
        source.check_unchanged()
        change(path)
        with pytest.raises(SourceChanged, match=text) as caught:
            source.check_unchanged()
    assert caught.value.exit_code == 7


def test_file_type_and_quantization_version_that_are_usual_give_no_warning(tmp_path):
    pairs = (pair("general.quantization_version", U32, 2), pair("general.file_type", U32, 15))
    with open_source(File().with_pairs(*pairs).write(tmp_path / "m.gguf")) as source:
        assert source.warnings == ()


def test_a_thousand_odd_tensors_are_not_a_thousand_warnings(tmp_path):
    path = File(tensors=tuple(Tensor(f"w{i}", (0,), 0) for i in range(1000))).write(tmp_path / "m.gguf")
    with open_source(path) as source:
        assert len(source.warnings) == 21 and source.warnings[-1] == "m.gguf: 980 more warnings like these"

"""Outputs: absent, their old content, or complete; never anything else, and never an input."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_files import File, Tensor

from requant.common.inputs import add_inputs, collect_inputs
from requant.container.header import parse_header
from requant.container.layout import lay_out
from requant.container.metadata import Metadata
from requant.container.output import PublishedFile
from requant.container.part import PartFile, resolve_target
from requant.errors import InputOutputError, OutputRefused, SourceChanged

LAYOUT = lay_out(Metadata("m", {}).with_values({"k": ("u8", 1)}), [("a", (256, 64), 0), ("b", (5,), 0)], "out")
A, B = LAYOUT.tensors
DATA = bytes(range(256)) * 256


def _open(path, *, force=False, size=LAYOUT.size):
    return PartFile(path, size, force=force)


def _fill(output):
    output.write_at(A.offset, DATA)
    output.write_at(B.offset, b"x" * B.n_bytes)


def _make(path, **options):
    with _open(path, **options) as output:
        _fill(output)
        output.publish(LAYOUT.header)
    return output


def _refused(path, text, *, inputs=(), **options):
    before = sorted(path.parent.iterdir())
    with collect_inputs(), pytest.raises(OutputRefused, match=text) as caught:
        add_inputs(*inputs)
        _open(path, **options)
    assert caught.value.exit_code == 5
    assert sorted(path.parent.iterdir()) == before
    return str(caught.value)


def _names(folder):
    return sorted(p.name for p in folder.iterdir())


def _published(path):
    content = path.read_bytes()
    return content == LAYOUT.header + DATA + (b"x" * B.n_bytes).ljust(32, b"\0")


def test_a_published_output_is_complete_and_leaves_nothing_beside_it(tmp_path):
    output = _make(tmp_path / "o.gguf")
    assert _names(tmp_path) == ["o.gguf"]
    assert _published(tmp_path / "o.gguf")
    assert output.warnings == []
    assert parse_header(tmp_path / "o.gguf").sha256 == LAYOUT.sha256


def test_the_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        _make(tmp_path / "o.gguf")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "o.gguf").stat().st_mode) == 0o640


def test_the_first_bytes_stay_zero_and_the_size_is_final_until_the_end(tmp_path):
    with _open(tmp_path / "o.gguf") as output:
        _fill(output)
        content = output.file.read_bytes()
        assert content[: LAYOUT.data_start] == bytes(LAYOUT.data_start)
        assert len(content) == LAYOUT.size
        assert not (tmp_path / "o.gguf").exists()


def test_an_output_that_is_not_published_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), _open(tmp_path / "o.gguf") as output:
        _fill(output)
        raise ZeroDivisionError
    assert _names(tmp_path) == []


def test_an_existing_output_is_kept_unless_forced(tmp_path):
    path = tmp_path / "o.gguf"
    path.write_bytes(b"old")
    assert "--force" in _refused(path, "already exists")
    assert path.read_bytes() == b"old"
    with _open(path, force=True) as output:
        _fill(output)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"old"
    _make(path, force=True)
    assert _published(path)
    assert _names(tmp_path) == ["o.gguf"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "o.gguf"
    with _open(path) as output:
        _fill(output)
        path.write_bytes(b"other")
        with pytest.raises(OutputRefused, match="already exists"):
            output.publish(LAYOUT.header)
    assert path.read_bytes() == b"other"
    assert _names(tmp_path) == ["o.gguf"]


def test_an_output_that_appears_in_the_last_moment_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "o.gguf"
    link = os.link

    def late(source, target):
        path.write_bytes(b"other")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with _open(path) as output, pytest.raises(OutputRefused, match="already exists"):
        _fill(output)
        output.publish(LAYOUT.header)
    assert path.read_bytes() == b"other"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["path", "symlink", "hardlink", "relative"])
def test_an_input_is_never_an_output_and_force_does_not_help(tmp_path, kind, force, monkeypatch):
    source = tmp_path / "in.gguf"
    source.write_bytes(b"in")
    out = source if kind == "path" else tmp_path / "o.gguf"
    if kind == "symlink":
        out.symlink_to("in.gguf")
    elif kind == "hardlink":
        out.hardlink_to(source)
    elif kind == "relative":
        monkeypatch.chdir(tmp_path)
        out = Path("../") / tmp_path.name / "in.gguf"
    message = _refused(out, "is one of the inputs", inputs=[source], force=force)
    assert "--force does not help" in message
    assert str(source) in message or kind == "hardlink"
    assert source.read_bytes() == b"in"


def test_an_input_put_in_place_of_the_output_meanwhile_is_kept(tmp_path):
    source, path = tmp_path / "in.gguf", tmp_path / "o.gguf"
    source.write_bytes(b"in")
    with collect_inputs(), _open(path, force=True) as output:
        add_inputs(source)
        _fill(output)
        path.symlink_to(source)
        source.replace(path)
        with pytest.raises(OutputRefused, match="one of the inputs"):
            output.publish(LAYOUT.header)
    assert path.read_bytes() == b"in"


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_a_fifo_and_a_device_are_refused(tmp_path, force):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to("loop")
    _refused(tmp_path / "folder", "is a directory", force=force)
    _refused(tmp_path / "fifo", "is a FIFO", force=force)
    _refused(tmp_path / "null", "is a character device", force=force)
    _refused(tmp_path / "loop", "loop", force=force)


@pytest.mark.parametrize("live", [False, True])
def test_a_symbolic_link_is_followed_to_its_target(tmp_path, live):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "real.gguf", tmp_path / "o.gguf"
    link.symlink_to("disk/real.gguf")
    if live:
        target.write_bytes(b"old")
    with _open(link, force=live) as output:
        assert output.file == target.with_name("real.gguf.part")
        _fill(output)
        output.publish(LAYOUT.header)
    assert link.is_symlink()
    assert _published(target)
    assert _names(tmp_path / "disk") == ["real.gguf"]


def test_a_second_run_is_refused_at_once_and_leaves_the_first_alone(tmp_path):
    path = tmp_path / "o.gguf"
    with _open(path) as first:
        _fill(first)
        _refused(path, "another run is writing it, in o.gguf.part")
        _refused(path, "another run", force=True)
        first.publish(LAYOUT.header)
    assert _published(path)


def test_a_run_in_another_process_holds_the_lock_until_it_dies(tmp_path):
    code = """
        import sys, pathlib
        from requant.container.part import PartFile
        output = PartFile(pathlib.Path(sys.argv[1]), 4096, force=False)
        output.write_at(64, b"half")
        print("open", flush=True)
        sys.stdin.read()
    """
    path = tmp_path / "o.gguf"
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"open\n"
        _refused(path, "another run")
        process.kill()
        process.wait()
        process.stdin.close()
    assert _names(tmp_path) == ["o.gguf.part"]
    with PartFile(path, 4096, force=False, keep=True) as part:
        part.begin(known=part.is_blank())


def test_a_stale_part_is_replaced_even_when_its_bytes_have_another_name(tmp_path):
    # what a run killed between link and unlink leaves
    part, path = tmp_path / "o.gguf.part", tmp_path / "o.gguf"
    part.write_bytes(b"stale")
    path.hardlink_to(part)
    with _open(path, force=True) as output:
        _fill(output)
        assert path.read_bytes() == b"stale"
        output.publish(LAYOUT.header)
    assert _published(path)


@pytest.mark.parametrize("kind", ["fifo", "folder", "symlink", "input"])
def test_a_part_that_is_not_ours_to_overwrite_is_refused(tmp_path, kind):
    part, other = tmp_path / "o.gguf.part", tmp_path / "other"
    other.write_bytes(b"other")
    if kind == "fifo":
        os.mkfifo(part)
    elif kind == "folder":
        part.mkdir()
    elif kind == "symlink":
        part.symlink_to(other)
    else:
        part.hardlink_to(other)
    text = {"fifo": "a FIFO", "folder": "a directory", "symlink": "a symbolic link", "input": "one of the inputs"}[kind]
    _refused(tmp_path / "o.gguf", text, inputs=[other], force=True)
    assert other.read_bytes() == b"other"


def test_a_part_that_was_exchanged_is_not_removed(tmp_path):
    with _open(tmp_path / "o.gguf") as output:
        output.file.unlink()
        output.file.write_bytes(b"somebody else's")
    assert (tmp_path / "o.gguf.part").read_bytes() == b"somebody else's"


def test_a_part_that_was_exchanged_is_not_published(tmp_path):
    with _open(tmp_path / "o.gguf") as output:
        _fill(output)
        output.file.unlink()
        output.file.write_bytes(b"somebody else's")
        with pytest.raises(InputOutputError, match="moved or replaced"):
            output.publish(LAYOUT.header)
    assert _names(tmp_path) == ["o.gguf.part"]


@pytest.mark.parametrize("moment", ["stale", "new"])
def test_a_part_that_changes_hands_before_the_lock_is_left_to_the_other_run(tmp_path, monkeypatch, moment):
    path, part = tmp_path / "o.gguf", tmp_path / "o.gguf.part"
    if moment == "stale":
        part.write_bytes(b"stale")
    flock = fcntl.flock

    def slow(descriptor, operation):
        part.unlink()
        part.write_bytes(b"of the other run")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(OutputRefused, match="another run"):
        _open(path)
    assert part.read_bytes() == b"of the other run"


def test_an_output_published_by_another_run_before_the_lock_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "o.gguf"
    flock = fcntl.flock

    def slow(descriptor, operation):
        path.write_bytes(b"other")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(OutputRefused, match="already exists"):
        _open(path)
    assert _names(tmp_path) == ["o.gguf"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(InputOutputError, match=r"needs 1048576\.00 TiB free but has [\d.]+ [KMGT]iB") as caught:
        _open(tmp_path / "o.gguf", size=2**60)
    assert caught.value.exit_code == 6
    assert str(tmp_path) in str(caught.value)
    assert _names(tmp_path) == []


def test_a_missing_folder_is_an_io_error_that_names_it(tmp_path):
    with pytest.raises(InputOutputError, match="missing: there is no such folder"):
        _open(tmp_path / "missing" / "o.gguf")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_without_permission_is_an_io_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "open", _fails(number))
    with pytest.raises(InputOutputError, match=f"o.gguf.part: cannot be created: {os.strerror(number)}"):
        _open(tmp_path / "o.gguf")


def test_a_name_that_is_too_long_is_an_io_error(tmp_path):
    with pytest.raises(InputOutputError, match="File name too long"):
        _open(tmp_path / ("o" * 252))  # fits, but not with .part


def _in_subprocess(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("room", [0, 4095, 4096, 4097, 8191])
def test_a_file_size_limit_while_writing_is_an_io_error_that_names_the_bytes(tmp_path, room):
    # RLIMIT_FSIZE stands in for a full disk: the write fails in the kernel, part of it may have gone through
    code = """
        import pathlib, resource, sys
        from requant.container.part import PartFile
        from requant.errors import InputOutputError
        path, room = pathlib.Path(sys.argv[1]), int(sys.argv[2])
        with PartFile(path, 8192, force=False) as output:
            output.write_at(64, b"x" * 10)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, -1))
            try:
                output.write_at(4000, b"y" * 4192)
            except InputOutputError as error:
                print(error)
    """
    path = tmp_path / "o.gguf"
    message = _in_subprocess(code, path, room)
    start = max(4000, room)
    assert f"writing {8192 - start} bytes at offset {start} failed: File too large" in message
    assert "ulimit -f" in message
    assert _names(tmp_path) == []


@pytest.mark.parametrize("fallback", [False, True])
def test_a_file_size_limit_when_opening_is_an_io_error_and_leaves_nothing(tmp_path, fallback):
    code = """
        import os, pathlib, resource, sys
        from requant.container.part import PartFile
        from requant.errors import InputOutputError
        if sys.argv[2] == "True":
            def unsupported(*_):
                raise OSError(95, "Operation not supported")
            os.posix_fallocate = unsupported
        resource.setrlimit(resource.RLIMIT_FSIZE, (8191, -1))
        try:
            PartFile(pathlib.Path(sys.argv[1]), 8192, force=False)
        except InputOutputError as error:
            print(error)
    """
    assert "8.00 KiB cannot be reserved: File too large" in _in_subprocess(code, tmp_path / "o.gguf", fallback)
    assert _names(tmp_path) == []


def _fails(number, after=0):
    calls = []

    def call(*_, **__):
        calls.append(1)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_write_is_an_io_error_and_leaves_nothing(tmp_path, monkeypatch, number):
    with (
        pytest.raises(InputOutputError, match=f"writing 65536 bytes at offset {A.offset} failed") as caught,
        _open(tmp_path / "o.gguf") as output,
    ):
        monkeypatch.setattr(os, "pwrite", _fails(number))
        _fill(output)
    assert ("free some space" in str(caught.value)) == (number != errno.EIO)
    assert _names(tmp_path) == []


def test_a_full_disk_when_reserving_is_an_io_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", _fails(errno.ENOSPC))
    with pytest.raises(InputOutputError, match="No space left"):
        _open(tmp_path / "o.gguf")
    assert _names(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("after", [0, 1])
def test_a_failing_fsync_is_not_tried_again_and_publishes_nothing(tmp_path, monkeypatch, after, force):
    path = tmp_path / "o.gguf"
    if force:
        path.write_bytes(b"old")
    fails = _fails(errno.EIO, after)
    with _open(path, force=force) as output:
        _fill(output)
        monkeypatch.setattr(os, "fdatasync", fails)
        with pytest.raises(InputOutputError, match="flushing to disk failed: Input/output error"):
            output.publish(LAYOUT.header)
    assert _names(tmp_path) == (["o.gguf"] if force else [])
    assert not force or path.read_bytes() == b"old"


def test_a_header_that_reads_back_wrong_is_not_published(tmp_path):
    with _open(tmp_path / "o.gguf") as output:
        _fill(output)
        with pytest.raises(InputOutputError, match="does not read back"):
            output.publish(b"GGUF" + bytes(100))
    assert _names(tmp_path) == []


def test_a_write_that_the_disk_lost_is_not_published(tmp_path, monkeypatch):
    with _open(tmp_path / "o.gguf") as output:
        _fill(output)
        monkeypatch.setattr(os, "pwrite", lambda _, data, __: len(data))
        with pytest.raises(InputOutputError, match="does not read back"):
            output.publish(LAYOUT.header)
    assert _names(tmp_path) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
    _make(tmp_path / "o.gguf")
    assert _published(tmp_path / "o.gguf")


def test_file_systems_without_fallocate_locks_or_links_are_served_with_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", _fails(errno.EOPNOTSUPP))
    monkeypatch.setattr(fcntl, "flock", _fails(errno.ENOLCK))
    monkeypatch.setattr(os, "link", _fails(errno.EPERM))
    output = _make(tmp_path / "o.gguf")
    assert _published(tmp_path / "o.gguf")
    assert [w.split(":")[0] for w in output.warnings] == [
        "the output's file system has no locks",
        "the output's file system reserves no space",
        "the output's file system has no hard links",
    ]
    assert _names(tmp_path) == ["o.gguf"]


def test_without_links_an_output_that_appears_meanwhile_is_kept_too(tmp_path, monkeypatch):
    path = tmp_path / "o.gguf"

    def late(*_):
        path.write_bytes(b"other")
        raise PermissionError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", late)
    with _open(path) as output, pytest.raises(OutputRefused, match="already exists"):
        _fill(output)
        output.publish(LAYOUT.header)
    assert path.read_bytes() == b"other"


def test_arrays_can_be_written_from_many_threads(tmp_path):
    data = np.frombuffer(DATA, np.uint8).reshape(64, 1024)
    with _open(tmp_path / "o.gguf") as output:

        def write(first):
            for row in range(first, 64, 4):
                output.write_at(A.offset + 1024 * row, data[row : row + 1])

        threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        output.write_at(B.offset, np.frombuffer(b"x" * B.n_bytes, np.float32))
        output.write_at(B.offset, np.empty((0, 4), np.uint8))
        output.publish(LAYOUT.header)
    assert _published(tmp_path / "o.gguf")


def test_descriptors_are_closed_whatever_happens(tmp_path):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    _make(tmp_path / "a.gguf")
    with _open(tmp_path / "b.gguf"):
        pass
    for _ in range(2):
        _refused(tmp_path / "a.gguf", "already exists")
    with _open(tmp_path / "c.gguf"):
        _refused(tmp_path / "c.gguf", "another run")
    assert count() == before


def test_an_output_of_a_file_without_tensors_can_be_published(tmp_path):
    layout = lay_out(Metadata("m", {}), [], "out")
    with _open(tmp_path / "o.gguf", size=layout.size) as output:
        output.publish(layout.header)
    assert parse_header(tmp_path / "o.gguf").tensors == ()


def test_a_source_can_be_copied_to_the_byte(tmp_path):
    source = File(tensors=(Tensor("a", (256, 2), 12), Tensor("b", (3,)))).write(tmp_path / "in.gguf")
    header = parse_header(source)
    layout = lay_out(header.metadata, [(t.name, t.shape, t.type_id) for t in header.tensors], "out")
    content = source.read_bytes()
    with _open(tmp_path / "o.gguf", size=layout.size) as output:
        for placed in layout.tensors:
            output.write_at(placed.offset, content[placed.offset : placed.offset + placed.n_bytes])
        output.publish(layout.header)
    assert (tmp_path / "o.gguf").read_bytes() == content


def _io_error(*_, **__):
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("force", [False, True])
def test_a_name_that_cannot_be_given_is_an_io_error_that_names_it(tmp_path, monkeypatch, force):
    path = tmp_path / "o.gguf"
    with _open(path, force=force) as output:
        _fill(output)
        for call in ("link", "replace", "rename"):
            monkeypatch.setattr(os, call, _io_error)
        with pytest.raises(InputOutputError) as caught:
            output.publish(LAYOUT.header)
    assert str(caught.value) == f"{path}: cannot be put in place: Input/output error"


def test_a_part_that_was_moved_or_an_output_that_is_there_is_named(tmp_path):
    path = tmp_path / "o.gguf"
    with _open(path) as output:
        output.file.rename(tmp_path / "moved")
        with pytest.raises(InputOutputError) as caught:
            output.put_in_place()
        assert str(caught.value) == f"{path}.part: was moved or replaced while it was being written"
    path.write_bytes(b"old")
    assert _refused(path, "already exists") == f"{path}: already exists; --force replaces it"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (ValueError("embedded null byte"), OutputRefused, "is not a usable path"),
        (OSError(errno.ELOOP, "loop"), OutputRefused, "is a loop of symbolic links"),
        (OSError(errno.EACCES, "Permission denied"), InputOutputError, "cannot be written: Permission denied"),
    ],
)
def test_a_target_that_cannot_be_looked_at_is_named(tmp_path, monkeypatch, error, kind, said):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(Path, "stat", fails)
    with pytest.raises(kind) as caught:
        _open(tmp_path / "o.gguf")
    assert str(caught.value) == f"{tmp_path / 'o.gguf'}: {said}"


def test_no_room_says_how_much_and_where(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", _fails(errno.ENOSPC))
    with pytest.raises(InputOutputError) as caught:
        _open(tmp_path / "o.gguf", size=2048)
    what = "2.00 KiB cannot be reserved: No space left on device"
    hint = f"free some space in {tmp_path} and run it again to resume"
    assert str(caught.value) == f"{tmp_path / 'o.gguf.part'}: {what}; {hint}"


@pytest.mark.parametrize("harm", ["other", "none"])
def test_a_header_that_is_not_as_it_was_written_names_the_part(tmp_path, monkeypatch, harm):
    part = tmp_path / "o.gguf.part"
    pread = os.pread
    with _open(tmp_path / "o.gguf") as output:
        _fill(output)
        if harm == "none":
            header, said = b"GGUF" + bytes(100), f"does not read back as a sound GGUF file: {part}: "
        else:
            monkeypatch.setattr(os, "pread", lambda *a: pread(*a)[:-1] + b"?")
            header, said = LAYOUT.header, "does not read back as it was written"
        with pytest.raises(InputOutputError) as caught:
            output.seal(header)
    assert str(caught.value).startswith(f"{part}: {said}") and (harm == "none" or str(caught.value).endswith(said))


def test_what_is_missing_from_a_part_is_named_when_it_is_read(tmp_path):
    with _open(tmp_path / "o.gguf") as output, pytest.raises(SourceChanged, match=f"^{output.file}: shrank"):
        output.read_at(LAYOUT.size - 1, memoryview(bytearray(2)))
    placed = PublishedFile(_make(tmp_path / "p.gguf").target)
    with pytest.raises(SourceChanged, match=f"^{tmp_path / 'p.gguf'}: shrank"):
        placed.read_at(LAYOUT.size - 1, memoryview(bytearray(2)))
    placed.close()


def test_a_part_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
    with pytest.raises(KeyError), _open(tmp_path / "o.gguf"):
        monkeypatch.setattr(os, "unlink", _io_error)
        raise KeyError
    monkeypatch.undo()


def test_a_part_file_of_somebody_else_beside_an_output_is_kept(tmp_path):
    path, part = tmp_path / "o.gguf", tmp_path / "o.gguf.part"
    path.write_bytes(b"old")
    part.write_bytes(b"somebody else's, of no matter what size")
    with pytest.raises(OutputRefused, match="is not an unfinished output"):
        _open(path, force=True)
    assert part.read_bytes() == b"somebody else's, of no matter what size"


def test_a_sealed_part_is_ours_only_where_a_journal_says_so(tmp_path):
    path, header, other = tmp_path / "o.gguf", LAYOUT.header, LAYOUT.header[:4] + b"\4" + LAYOUT.header[5:]
    with PartFile(path, LAYOUT.size, force=False, keep=True) as part:
        part.begin()
        _fill(part)
        part.seal(header)
    sealed = part.file.read_bytes()
    for act in (PartFile.begin, lambda part: part.resume(known=part.has_part_of(replace(LAYOUT, header=other)))):
        with (
            PartFile(path, LAYOUT.size, force=False, keep=True) as part,
            pytest.raises(OutputRefused, match="is not an unfinished output"),
        ):
            assert part.found
            act(part)
        assert part.file.read_bytes() == sealed  # it may be somebody's finished model
    for torn in (header, header[:30], header[:4] + bytes(4) + header[8:]):
        part.file.write_bytes(torn.ljust(len(header), b"\0") + sealed[len(header) :])
        with PartFile(path, LAYOUT.size, force=False, keep=True) as part:
            part.resume(known=part.has_part_of(LAYOUT))
        assert part.file.read_bytes()[:24] == bytes(24) and part.file.read_bytes()[-99:] == sealed[-99:]


def test_every_refusal_names_the_output_and_what_to_do(tmp_path):
    path = tmp_path / "o.gguf"
    path.mkdir()
    assert _refused(path, "directory") == f"{path}: is a directory, not a regular file; choose another output"
    path.rmdir()
    path.write_bytes(b"the source")
    what = f"is one of the inputs ({path})"
    assert _refused(path, "inputs", inputs=[path]) == f"{path}: {what}; --force does not help; choose another output"
    path.unlink()
    part = tmp_path / "o.gguf.part"
    part.write_bytes(b"x" * 30)
    hint = "it stands where the unfinished output goes; move it away"
    assert _refused(path, "unfinished") == f"{part}: is not an unfinished output of this command; {hint}"
    part.unlink()
    part.mkdir()
    assert _refused(path, "dir").startswith(f"{part}: is a directory, not an unfinished output; ")
    part.rmdir()
    with _open(path):
        assert _refused(path, "another") == f"{path}: another run is writing it, in {part.name}"
    odd = Path(f"{tmp_path}/nul\0")
    with pytest.raises(OutputRefused) as caught:
        resolve_target(odd)
    assert str(caught.value).startswith(f"{tmp_path}/nul") and str(caught.value).endswith(": is not a usable path")


def test_a_flush_that_fails_names_the_part(tmp_path, monkeypatch):
    with _open(tmp_path / "o.gguf") as output:
        monkeypatch.setattr(os, "fdatasync", _io_error)
        with pytest.raises(InputOutputError) as caught:
            output.sync()
    assert str(caught.value) == f"{tmp_path / 'o.gguf.part'}: flushing to disk failed: Input/output error"


def test_a_lock_that_fails_names_the_part(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", _io_error)
    with pytest.raises(InputOutputError, match=f"^{tmp_path / 'o.gguf.part'}: cannot be locked"):
        _open(tmp_path / "o.gguf")


@pytest.mark.parametrize("size", [LAYOUT.size - 32, LAYOUT.size + 32])
def test_a_header_that_fits_no_file_of_this_size_is_not_sealed(tmp_path, size):
    with _open(tmp_path / "o.gguf") as output:
        _fill(output)
        output.size = size
        with pytest.raises(InputOutputError) as caught:
            output.seal(LAYOUT.header)
    assert str(caught.value) == f"{tmp_path / 'o.gguf.part'}: does not read back as it was written"

"""A cluster of a real scheduler and workers in their own processes: the same results as here, also when workers die."""

import math
import os
import re
import signal
import sys
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from compensated import quantized, random_tokens, text_for
from conversions import convert, half, plan_for, single, small_model
from gguf_files import STR, File, Tensor, pair
from model.forward.architectures import MAKERS

from requant.common.cluster import Cluster
from requant.container import output as output_module
from requant.container.imatrix import read_imatrix
from requant.container.source import open_source
from requant.container.splitting import Splitting
from requant.conversion import chunks
from requant.conversion.compensation import encoding
from requant.errors import InputOutputError, NumericFault, SourceChanged, UsageError
from requant.formats import by_name
from requant.formats.codec import warm_up
from requant.formats.jit import fingerprint
from requant.scoring import fisher, layerwise
from requant.scoring.calibrate import calibrate
from requant.scoring.calibration_data import TokenWindows
from requant.scoring.options import ScoringOptions, StatisticsOptions

pytest.importorskip("distributed", reason="Dask is not installed")
from clusters import Machines, until
from commands import TINY, start

TYPES = ("Q4_K", "NVFP4", "Q6_K")
EXPERTS = "blk.4.ffn_down_exps.weight"
MODEL = small_model(
    *(half(f"blk.{i}.{name}.weight", (256, 24), seed=i) for i in range(4) for name in ("attn_q", "ffn_up")),
    half(EXPERTS, (256, 16, 3), seed=9),
)
SMALL = """
import requant.conversion.chunks as chunks
import requant.container.output as output
output.COMMIT_BYTES, chunks.CHUNK_WEIGHTS, chunks.PIECE_BYTES = 1, 1024, 500
"""


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Pieces of a few rows, each flushed as it comes."""
    monkeypatch.setattr(output_module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(chunks, "CHUNK_WEIGHTS", 1024)
    monkeypatch.setattr(chunks, "PIECE_BYTES", 500)


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    warm_up(by_name(name) for name in ("F32", "F16", "Q2_K", "Q4_0", "Q8_0", *TYPES))  # workers find them in the cache
    with Machines(tmp_path_factory.mktemp("machines"), 3) as machines:
        yield machines


@pytest.fixture
def cluster(machines):
    machines.slow(False)
    with Cluster(machines.address, fingerprint) as cluster:
        yield cluster


@pytest.fixture
def source(tmp_path):
    with open_source(MODEL.write(tmp_path / "source.gguf")) as source:
        yield source


@pytest.fixture
def imatrix(tmp_path):
    importance = np.random.default_rng(3).lognormal(0, 2, (3, 256)).astype("<f4")
    sums = Tensor(f"{EXPERTS}.in_sum2", (256, 3), 0, data=importance.tobytes())
    counts = Tensor(f"{EXPERTS}.counts", (1, 3), 0, data=np.ones(3, "<f4").tobytes())
    return read_imatrix(File((pair("general.type", STR, "imatrix"),), (sums, counts)).write(tmp_path / "i.gguf"))


def made(source, folder, **options):
    """The files of a conversion, and its record."""
    folder.mkdir(exist_ok=True)
    done = convert(source, plan_for(source, *TYPES), folder / "o.gguf", threads=2, **options)
    return {p.name: p.read_bytes() for p in folder.iterdir()}, replace(done, output=None)


class Stop(BaseException):
    """A stop that only cleanup code handles."""


def stopped(source, folder, after, **options):
    """A conversion that stops after so many chunks, or pieces."""
    folder.mkdir()
    left = [after]

    def progress(_):
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    with pytest.raises(Stop):
        convert(source, plan_for(source, *TYPES), folder / "o.gguf", progress=progress, **options)
    assert {p.name for p in folder.iterdir()} == {"o.gguf.part", "o.gguf.part.journal"}


def test_a_cluster_writes_the_same_bytes_and_the_same_record(tmp_path, source, imatrix, cluster):
    done = []
    there = made(source, tmp_path / "there", imatrix=imatrix, cluster=cluster, progress=done.append)
    assert there == made(source, tmp_path / "here", imatrix=imatrix)
    assert sum(done) == sum(t.n_bytes for t in source.tensors) + sum(t.n_bytes for t in there[1].tensors)
    assert len(done) > 60


def test_a_compensated_output_is_the_same(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_WEIGHTS", 512)
    with open_source(MAKERS["olmoe"](1).write(tmp_path / "source.gguf")) as source:
        text, found = text_for(source, random_tokens(8, 48)), []
        for name, workers in (("here", None), ("there", cluster)):
            out = tmp_path / f"{name}.gguf"
            done = convert(source, quantized(source, "Q4_0"), out, compensation=text, cluster=workers)
            found.append((out.read_bytes(), done.tensors))
    assert found[0] == found[1]
    assert any(t.is_compensated for t in found[0][1])


def test_a_split_output_is_the_same(tmp_path, source, cluster):
    how = {"splitting": Splitting(max_size=20_000)}
    there = made(source, tmp_path / "there", cluster=cluster, **how)
    assert len(there[0]) > 1 and there == made(source, tmp_path / "here", **how)


def test_a_worker_that_is_killed_is_replaced_by_the_others(tmp_path, source, machines, cluster):
    here, begun = made(source, tmp_path / "here"), []
    machines.slow()

    def kill(_):
        begun.append(1)
        if len(begun) == 8:
            victim = machines.workers.pop()
            victim.send_signal(signal.SIGKILL)

    there = made(source, tmp_path / "there", cluster=cluster, progress=kill)
    machines.workers.append(machines.worker())
    assert there == here and len(machines.workers) == 3


@pytest.mark.parametrize("begun_there", [False, True])
def test_a_run_goes_on_where_it_was_begun_elsewhere(tmp_path, source, cluster, begun_there):
    here, folder, told = made(source, tmp_path / "here"), tmp_path / "again", []
    stopped(source, folder, 30, cluster=cluster if begun_there else None)
    part = folder / "o.gguf.part"
    content = bytearray(part.read_bytes())
    content[_recorded(folder)] ^= 1
    part.write_bytes(content)
    assert made(source, folder, cluster=None if begun_there else cluster, info=told.append) == here
    assert re.fullmatch(r"resuming \d+/\d+ tensors", told[0])
    assert sum("is not as it was recorded; it is made again" in line for line in told) == 1


def _recorded(folder):
    """The offset of a byte of a recorded piece."""
    return int(re.search(rb'"offset": (\d+)', (folder / "o.gguf.part.journal").read_bytes())[1]) + 3


def test_faults_of_the_source_are_told_as_they_are_here(tmp_path, cluster):
    x = np.full((24, 256), 0.02, np.float32)
    x[17, 5] = np.nan
    path = small_model(single("blk.0.attn_q.weight", (256, 24), x)).write(tmp_path / "nan.gguf")
    faults = []
    with open_source(path) as source:
        for n, workers in enumerate((None, cluster)):
            with pytest.raises(NumericFault, match="1 of 6144 weights, the first at weight 4357") as caught:
                made(source, tmp_path / str(n), cluster=workers)
            faults.append(caught.value)
    assert str(faults[0]) == str(faults[1]) and faults[1].path == str(path) and math.isnan(faults[1].got)


def test_a_source_that_changes_is_noticed_by_the_workers(tmp_path, source, cluster):
    done = []

    def touch(_):
        done.append(1)
        if len(done) == 10:
            os.utime(source.path, (1, 1))

    with pytest.raises(SourceChanged, match="changed while it was being read: mtime"):
        made(source, tmp_path / "there", cluster=cluster, progress=touch)


def test_an_output_on_a_storage_of_its_own_is_refused(tmp_path, source, cluster, monkeypatch):
    from requant.conversion import write_on_cluster as workers

    other = tmp_path / "other.part"
    real = workers.remote_output
    monkeypatch.setattr(workers, "remote_output", lambda i, path: replace(real(i, path), path=other))
    with pytest.raises(InputOutputError, match=r"other.part: cannot be opened on .*share, under the same path"):
        made(source, tmp_path / "there", cluster=cluster)
    other.write_bytes(bytes(100))
    with pytest.raises(InputOutputError, match=r"other.part: is not the unfinished output on"):
        made(source, tmp_path / "there", cluster=cluster)
    assert other.read_bytes() == bytes(100)


def test_another_version_on_a_worker_is_refused(cluster, monkeypatch):
    monkeypatch.setattr("requant.formats.jit.__version__", "9.9")
    monkeypatch.setattr("requant.formats.jit.SOURCE_STATE", "other")
    with pytest.raises(UsageError, match=r"worker tcp://.* runs requant .* not 9.9 with kernels other; install"):
        list(cluster.in_order(math.sqrt, [1]))


def test_results_come_in_order_and_other_failures_in_one_line(cluster):
    assert list(cluster.in_order(math.sqrt, (i * i for i in range(100)))) == list(range(100))
    found = cluster.in_order(math.sqrt, [4, -1, 9, -1], lambda x: f"item {x}")
    with closing(found), pytest.raises(InputOutputError, match="item -1: a worker failed: ValueError: math domain"):
        assert next(found) == 2
        next(found)


def test_work_that_every_worker_dies_at_ends_in_an_error(tmp_path, source):
    folder = tmp_path / "machines"
    folder.mkdir()
    (folder / "die").write_text("blk.2.ffn_up.weight")
    with Machines(folder, 1, allowed_failures=0) as machines, Cluster(machines.address, fingerprint) as cluster:
        with pytest.raises(InputOutputError, match=r"tensor 'blk.2.*': one worker after the other died at it"):
            made(source, tmp_path / "there", cluster=cluster)
        said = []
        (folder / "die").unlink()
        with Cluster(machines.address, fingerprint, info=lambda line: said.append(line) or machines.worker()) as again:
            assert made(source, tmp_path / "there", cluster=again) == made(source, tmp_path / "here")
        assert said == [f"{machines.address} has no workers yet; waiting for some"]


def command(source, out, machines):
    words = ("convert", source.path, out, "--type", "Q4_K", "--cluster", machines.address)
    return start(*words, before=SMALL, env=machines.environment)


def resumed_here(source, out, capsys):
    """The output of the same command, resumed without the cluster."""
    before = [p.name for p in out.parent.iterdir()]
    assert sorted(before) == ["o.gguf.part", "o.gguf.part.journal"]
    process = start("convert", source.path, out, "--type", "Q4_K", before=SMALL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "resuming" in err, err
    return out.read_bytes()


def whole(source, folder):
    folder.mkdir()
    process = start("convert", source.path, folder / "o.gguf", "--type", "Q4_K", before=SMALL)
    process.communicate(timeout=60)
    assert process.returncode == 0
    return (folder / "o.gguf").read_bytes()


def has_recorded(out, n=5):
    journal = out.with_name("o.gguf.part.journal")
    return lambda: journal.exists() and journal.read_bytes().count(b'"piece"') >= n


def test_a_signal_stops_a_run_on_a_cluster_at_once(tmp_path, source, machines, capsys):
    out = tmp_path / "there" / "o.gguf"
    out.parent.mkdir()
    machines.slow()
    process = command(source, out, machines)
    until(has_recorded(out))
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert time.monotonic() - begun < 2 and process.returncode == 130
    assert err.splitlines()[-1] == "requant: error: stopped by SIGINT; run the same command again to resume"
    assert len(err.splitlines()) == 1, err
    assert resumed_here(source, out, capsys) == whole(source, tmp_path / "here")


def test_a_scheduler_that_is_lost_leaves_a_run_that_can_be_gone_on_with(tmp_path, source, capsys):
    out, folder = tmp_path / "there" / "o.gguf", tmp_path / "machines"
    out.parent.mkdir()
    folder.mkdir()
    with Machines(folder, 2) as machines:
        machines.slow()
        process = command(source, out, machines)
        until(has_recorded(out))
        machines.scheduler.kill()
        _, err = process.communicate(timeout=10)
    assert process.returncode == 6
    said = [line for line in err.splitlines() if "waiting for some" not in line]
    assert len(said) == 1 and said[0].startswith(f"requant: error: {machines.address}: the scheduler was lost"), err
    assert resumed_here(source, out, capsys) == whole(source, tmp_path / "here")


def test_where_no_scheduler_is_the_error_says_so():
    begun = time.monotonic()
    with pytest.raises(InputOutputError, match=r"tcp://127.0.0.1:1: no scheduler answers there"):
        Cluster("tcp://127.0.0.1:1", fingerprint)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("address", ["", "host", "host:", "tcp://host", "tcp://host:99999", "odd://host:1", "a b"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UsageError, match="is no address of a scheduler; as in tcp://host:8786"):
        Cluster(address, fingerprint)


def test_without_dask_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match=r"pip install 'requant\[cluster\]'"):
        Cluster("tcp://127.0.0.1:1", fingerprint)


TOKENS = np.arange(128, dtype=np.int32).reshape(2, 64) % 250


def test_scores_are_the_same_to_the_last_bit(tmp_path, cluster):
    with open_source(TINY) as source:
        alone = ScoringOptions(("Q4_0", "Q2_K", "NVFP4"), weigh=True)
        both = alone, replace(alone, cluster=cluster)
        scores = [layerwise.score(source, options) for options in both]
        assert scores[0] == scores[1]
        found = [fisher.score_by_gradients(source, TokenWindows("text", TOKENS), options) for options in both]
        assert found[0].losses == found[1].losses
        statistics = calibrate(source, TOKENS, StatisticsOptions()).imatrix(source, "text")
        scores = [fisher.score_by_statistics(source, statistics, options) for options in both]
        assert scores[0] == scores[1]


def test_the_command_scores_on_a_cluster(tmp_path, machines):
    machines.slow(False)
    texts = []
    for words in ((), ("--cluster", machines.address)):
        process = start("score", TINY, "--quick", "--types", "Q4_0,Q8_0", "--json", *words, env=machines.environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "error" not in err, err
        texts.append(out)
    assert texts[0] == texts[1]

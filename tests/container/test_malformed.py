"""The malformed corpus: the right reader refuses or accepts each case, at once and with little memory."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from corpus import CASES, FURTHER
from gguf_files import File, array, string

from requant.container.header import parse_header
from requant.container.imatrix import coverage, read_imatrix
from requant.container.source import open_source, require_model
from requant.errors import BadInput
from requant.model.hyperparameters import read_hyperparameters
from requant.model.inspection import inspect
from requant.planning.recipe import uniform_plan
from requant.report.text.inspection import model_facts, model_tables

ROOT = Path(__file__).parents[2]
ALL = CASES | FURTHER
MIB = 2**20


def _cases(verdicts, *levels):
    found = {n: c for n, c in ALL.items() if c.verdict in verdicts and (not levels or c.level in levels)}
    return [pytest.param(case, id=name) for name, case in found.items()]


def _refused(error, path):
    """Check that the message is one line that names the file and the fault of the case."""
    message = str(error.value)
    assert message.startswith(f"{path.parent}/")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 600


def test_the_corpus_is_the_list_of_the_specification_with_its_verdicts():
    lines = [line.split() for line in (ROOT / "fixtures" / "malformed_names.txt").read_text().splitlines()]
    assert [name for name, *_ in lines if name not in CASES] == []
    assert len(lines) == len(CASES) == 127
    for name, verdict, *level in lines:
        assert CASES[name].verdict == verdict, name
        assert not level or CASES[name].level == level[0], name


def test_the_script_writes_every_case_with_its_verdict(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "make" / "make_malformed.py", tmp_path / "all"], check=True)
    index = json.loads((tmp_path / "all" / "index.json").read_text())
    assert [entry["name"] for entry in index] == list(ALL)
    for entry in index:
        case, path = ALL[entry["name"]], tmp_path / "all" / entry["file"]
        assert entry["verdict"] == case.verdict
        assert sorted(p.name for p in path.parent.iterdir()) == sorted(case.files)


@pytest.mark.parametrize("case", _cases("R", "parser"))
def test_bad_files_are_refused_in_one_clear_line(tmp_path, case):
    path = case.write(tmp_path)
    for read in (parse_header, open_source):
        with pytest.raises(BadInput, match=case.said) as caught:
            read(path)
        _refused(caught, path)


@pytest.mark.parametrize("case", _cases("R", "set"))
def test_bad_sets_of_shards_are_refused_in_one_clear_line(tmp_path, case):
    path = case.write(tmp_path)
    parse_header(path)
    with pytest.raises(BadInput, match=case.said) as caught:
        open_source(path)
    _refused(caught, path)


@pytest.mark.parametrize("case", _cases("R", "model"))
def test_what_is_no_model_can_be_opened_but_not_used_as_one(tmp_path, case):
    path = case.write(tmp_path)
    with open_source(path) as source, pytest.raises(BadInput, match=case.said) as caught:
        require_model(source)
    _refused(caught, path)


@pytest.mark.parametrize("case", _cases("R", "planner"))
def test_counts_that_no_engine_takes_are_shown_but_not_planned_for(tmp_path, case):
    path = case.write(tmp_path)
    with open_source(path) as source:
        assert any(case.said in line for line in inspect(source).warnings)
        for read in (lambda: read_hyperparameters(source.metadata), lambda: uniform_plan(source, "Q8_0")):
            with pytest.raises(BadInput, match=case.said) as caught:
                read()
            _refused(caught, path)


@pytest.mark.parametrize("case", _cases("R", "imatrix"))
def test_bad_importance_matrices_are_refused_in_one_clear_line(tmp_path, case):
    path = case.write(tmp_path)
    with pytest.raises(BadInput, match=case.said) as caught:
        read_imatrix(path)
    _refused(caught, path)


@pytest.mark.parametrize("case", _cases("R", "coverage"))
def test_importance_matrices_of_other_models_are_refused_with_the_model(tmp_path, case):
    path = case.write(tmp_path)
    imatrix = read_imatrix(path)
    with open_source(tmp_path / "model.gguf") as source, pytest.raises(BadInput, match=case.said) as caught:
        coverage(imatrix, source.tensors)
    _refused(caught, path)


@pytest.mark.parametrize("case", _cases("AN"))
def test_odd_but_sound_files_are_accepted_and_keep_their_bytes(tmp_path, case):
    content = case.files["case.gguf"]
    with open_source(case.write(tmp_path)) as source:
        assert require_model(source) == "llama"
        assert source.warnings == ()
        if isinstance(content, bytes):
            metadata = source.metadata.encode()
            assert content[24 : 24 + len(metadata)] == metadata
            assert all(source.read_rows(tensor).tobytes() in content for tensor in source.tensors)


@pytest.mark.parametrize("case", _cases("W"))
def test_suspicious_files_are_accepted_with_a_warning(tmp_path, case):
    with open_source(case.write(tmp_path)) as source:
        assert require_model(source) == "llama"
        (warning,) = source.warnings
        assert case.said in warning
        assert warning.isprintable()


def look_at(path, case):
    """Do all that is done with a file before its weights are read, up to a plan."""
    try:
        if case.is_imatrix:
            coverage(read_imatrix(path), [])
        with open_source(path) as source:
            found = inspect(source)
            model_facts(found)
            model_tables(found, tensors=True)
            uniform_plan(source, "Q8_0", allow_requantize=True)
    except BadInput:
        return False
    return True


def test_no_case_takes_a_second(tmp_path):
    for name, case, path in _written(tmp_path):
        start = time.process_time()
        assert look_at(path, case) == (case.verdict != "R"), name
        assert time.process_time() - start < 1, name


def test_no_case_takes_64_mib(tmp_path):
    tracemalloc.start()
    try:
        for name, case, path in _written(tmp_path):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            look_at(path, case)
            assert tracemalloc.get_traced_memory()[1] - before < 64 * MIB, name
    finally:
        tracemalloc.stop()


def _written(folder):
    for name, case in ALL.items():
        (folder / name).mkdir()
        yield name, case, case.write(folder / name)


WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from corpus import CASES, FURTHER
from test_malformed import look_at
folder = Path(sys.argv[1])
everything = CASES | FURTHER
paths = {name: folder / name / next(iter(case.files)) for name, case in everything.items()}
assert look_at(paths["hdr_version_2_valid"], everything["hdr_version_2_valid"])  # all is imported
(pages,) = (int(line.split()[0]) for line in open("/proc/self/statm"))
baseline = pages * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (baseline + 64 * 2**20, -1))
for name, case in everything.items():
    assert look_at(paths[name], case) == (case.verdict != "R"), name
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited and measured as on Linux")
def test_the_corpus_is_gone_through_with_64_mib_more_than_the_start(tmp_path):
    list(_written(tmp_path))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)])
    }
    words = [sys.executable, "-c", WITH_LITTLE_MEMORY, tmp_path]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout == "done\n", ran.stderr


def test_a_header_of_more_than_half_a_gibibyte_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large.gguf"
    path.write_bytes(File((string("k") + array(0, 2**30),), ()).header())
    os.truncate(path, 2**31)
    start = time.perf_counter()
    with pytest.raises(BadInput, match="the header is too large"):
        parse_header(path)
    assert time.perf_counter() - start < 1

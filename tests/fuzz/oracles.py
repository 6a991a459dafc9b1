"""What must hold for a file of each kind: whatever it holds, it is used, or refused as a RequantError in one line.

Each oracle returns a word for what became of the file. `depth` 0 reads it, 1 shows it, 2 plans with it.
"""

import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fuzz import bases
from requant.api.batch.jobs import KeyOption, read_jobs, read_report_table
from requant.container.header import parse_header
from requant.container.imatrix import coverage, importance_for, read_imatrix
from requant.container.source import open_source
from requant.container.splitting import WHOLE
from requant.conversion.convert import convert
from requant.conversion.options import ConversionOptions
from requant.conversion.prepare import prepare_output
from requant.conversion.record import read_conversion
from requant.errors import RequantError
from requant.model.auxiliary import draft_bytes, projector_bytes
from requant.model.engine_settings import EngineSettings
from requant.model.hyperparameters import read_hyperparameters
from requant.model.inspection import inspect
from requant.model.tokenizer import read_tokenizer
from requant.planning.constraints import Constraints
from requant.planning.output_metadata import output_metadata
from requant.planning.plan import read_plan
from requant.planning.planner import check_feasible
from requant.planning.recipe import preset_plan, tensor_type_file, uniform_plan
from requant.planning.request import PlanRequest
from requant.planning.rules import read_tensor_types
from requant.planning.solver.solve import solve
from requant.report.text.diff import compare_sides, difference_text, read_side
from requant.report.text.inspection import model_facts, model_tables
from requant.report.text.table import losses_table, plan_table
from requant.scoring import layerwise
from requant.scoring.calibration_data import WindowSpec, drawn_windows, read_token_windows
from requant.scoring.fisher import find_run_obstacle, score_by_gradients
from requant.scoring.losses import Losses, read_losses
from requant.scoring.options import ScoringOptions


@dataclass(frozen=True)
class Shaped:
    name: str
    shape: tuple


MODEL = (Shaped("blk.0.attn_q.weight", (64, 64)), Shaped("blk.0.ffn_up_exps.weight", (64, 32, 4)))


TYPES = ("Q4_K", "Q8_0")
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Escaped(Exception):
    """Something that must not be seen."""


def attempt(work):
    """What `work` returns, or None where it is refused as it should be."""
    try:
        return work()
    except RequantError as error:
        text = str(error)
        if not text.isprintable() or not text:
            raise Escaped(f"the message is not one printable line: {text!r}") from error
        if error.exit_code not in (2, 3, 4, 8):
            raise Escaped(f"exit code {error.exit_code}: {text}") from error
        return None


def _shown(text):
    if not text.replace("\n", "").isprintable():
        raise Escaped(f"the report is not printable: {text!r}")


def model(path, depth):
    source = attempt(lambda: open_source(path))
    if source is None:
        return "refused"
    with source:
        metadata = source.metadata
        for key in metadata:
            metadata.get(key)
        hp = attempt(lambda: read_hyperparameters(metadata, source.tensors))
        if depth > 0:
            found = attempt(lambda: inspect(source))
            if found is not None:
                _shown("\n\n".join((model_facts(found), *model_tables(found, tensors=True))))
                found.to_json()
            for tensor in source.tensors:
                assert source.read_rows(tensor).nbytes == tensor.n_bytes
            attempt(lambda: find_run_obstacle(source))
        if depth > 1:
            _planned(source)
            attempt(lambda: draft_bytes(path, source, EngineSettings(64)))
            attempt(lambda: projector_bytes(path))
            attempt(lambda: read_tokenizer(metadata))
            difference_text(compare_sides(read_side(path), read_side(path)))
    return "opened" if hp is None else "model"


def _planned(source):
    plan = attempt(lambda: uniform_plan(source, "Q4_K", allow_requantize=True))
    for request in (PlanRequest(vram=2**30), PlanRequest(vram=2**20, ram=2**30, n_ctx=64), PlanRequest(bpw=6.0)):
        attempt(lambda request=request: check_feasible(source, request, TYPES, imatrix=None, allow_requantize=True))
    attempt(lambda: preset_plan(source, "Q4_K_M", allow_requantize=True))
    if plan is not None:
        _shown(plan_table(plan))
        attempt(lambda: tensor_type_file(plan))
        attempt(lambda: output_metadata(source, plan, None, 1))


def shapes(path, depth):
    """A model whose shapes and keys may not fit: shown and planned for; deeper, scored, converted, run."""
    source = attempt(lambda: open_source(path))
    if source is None:
        return "refused"
    with source:
        found = attempt(lambda: inspect(source))
        if found is None:
            return "refused"
        _shown("\n".join(found.warnings))
        obstacle = attempt(lambda: find_run_obstacle(source) or "none")  # None where no engine runs it
        attempt(lambda: check_feasible(source, PlanRequest(bpw=6.0), TYPES, imatrix=None, allow_requantize=True))
        if depth > 0:
            options = ScoringOptions(("Q8_0",), allow_requantize=True, threads=1)
            quick = attempt(lambda: layerwise.score(source, options))
            if quick is not None:
                Losses.from_json(quick.to_json())
                attempt(lambda: solve(quick, Constraints()))
        if depth > 1:
            _converted(source)
            if obstacle == "none":
                _run(source)
    return {"none": "runs", None: "refused"}.get(obstacle, "opened")


def _converted(source):
    plan = attempt(lambda: uniform_plan(source, "Q8_0", allow_requantize=True))
    if plan is None:
        return
    attempt(lambda: prepare_output(source, plan, None, None, WHOLE))
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        out = Path(folder) / "out.gguf"
        made = attempt(lambda: convert(source, plan, out, options=ConversionOptions(threads=1)))
        if made is not None:
            with open_source(out) as output:
                assert {t.name for t in source.tensors} <= {t.name for t in output.tensors}


def _run(source):
    tokens = drawn_windows(source, WindowSpec(32, 1))
    options = ScoringOptions(("Q8_0",), allow_requantize=True, weigh=True, threads=1)
    scored = attempt(lambda: score_by_gradients(source, tokens, options))
    if scored is not None:
        Losses.from_json(scored.losses.to_json())
        attempt(lambda: scored.statistics.imatrix(source, "drawn"))
        attempt(lambda: solve(scored.losses, Constraints()))


def jobs(path, depth):
    keys = {"ctx": KeyOption("--ctx", "n_ctx", "one"), "types": KeyOption("--types", "types", "commas")}
    keys |= {name: KeyOption(f"--{name}", name, "one") for name in ("vram", "size", "bpw")}
    found = attempt(lambda: read_jobs(path, keys))
    attempt(lambda: read_report_table(path, keys))
    return "refused" if found is None else "read"


@functools.cache
def _tokenized():
    """An open model with a vocabulary of four tokens, for the ids."""
    path = Path(tempfile.mkdtemp(dir=MEMORY)) / "model.gguf"
    path.write_bytes(b"".join(bases.ggufs("model")[0].fields()))
    return open_source(path)


def tokens(path, depth):
    found = attempt(lambda: read_token_windows(path, _tokenized(), WindowSpec(32, 4)))
    if found is None:
        return "refused"
    assert 0 <= found.windows.min() <= found.windows.max() < 4
    return "read"


def gguf_imatrix(path, depth):
    imatrix = attempt(lambda: read_imatrix(path))
    if imatrix is None:
        return "refused"
    attempt(lambda: coverage(imatrix, MODEL))
    for tensor in MODEL:
        attempt(lambda tensor=tensor: importance_for(imatrix, tensor.name, tensor.shape))
    assert imatrix.n_tokens >= 0
    return "read"


def plan(path, depth):
    found = attempt(lambda: read_plan(path))
    if found is None:
        return "refused"
    found.sha256()
    for limit in found.limits:
        found.show(limit, found.used(limit))
    if depth > 0:
        again = type(found).from_json(found.to_json())
        assert again.types() == found.types()
        _shown(plan_table(found))
        attempt(lambda: tensor_type_file(found))
    return "read"


def losses(path, depth):
    found = attempt(lambda: read_losses(path))
    if found is None:
        return "refused"
    if depth > 0:
        assert type(found).from_json(found.to_json()) == found
        _shown(losses_table(found))
    if depth > 1:
        solved = attempt(lambda: solve(found, Constraints()))
        if solved is not None:
            _shown(plan_table(solved))
    return "read"


def record(path, depth):
    found = attempt(lambda: read_conversion(path))
    if found is None:
        return "refused"
    if depth > 0:
        found.to_json()
        side = read_side(path)
        _shown(difference_text(compare_sides(side, side)))
    return "read"


def types(path, depth):
    return "refused" if attempt(lambda: read_tensor_types(path)) is None else "read"


def opens(path):
    """Whether requant's parser takes the GGUF file."""
    return attempt(lambda: parse_header(path)) is not None

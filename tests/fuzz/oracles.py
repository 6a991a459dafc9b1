"""What must hold for a file of each kind: whatever it holds, it is used, or refused as a RequantError in one line.

Each oracle returns a word for what became of the file. `depth` 0 reads it, 1 shows it, 2 plans with it.
"""

from dataclasses import dataclass

from requant.container.header import parse_header
from requant.container.imatrix import coverage, importance_for, read_imatrix
from requant.container.source import open_source
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
from requant.scoring.fisher import find_run_obstacle
from requant.scoring.losses import read_losses


@dataclass(frozen=True)
class Shaped:
    name: str
    shape: tuple


MODEL = (Shaped("blk.0.attn_q.weight", (64, 64)), Shaped("blk.0.ffn_up_exps.weight", (64, 32, 4)))


TYPES = ("Q4_K", "Q8_0")


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
        if error.exit_code not in (2, 3, 4):
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

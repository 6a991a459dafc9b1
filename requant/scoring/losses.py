"""Losses: the predicted harm of every candidate of every tensor, as data and as JSON that a person can edit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.common.notebook import html
from requant.common.serialization import IN_MEMORY, dump, parse, parse_record, read_text, show_json, to_plain
from requant.common.shapes import check_shape
from requant.errors import BadInput, brief, suggest
from requant.formats import FORMATS, Effort, by_name, format_of

if TYPE_CHECKING:
    from requant.scoring.statistics import Statistics

LOSSES_SCHEMA = "requant.losses/1"
TOO_SMALL = "it is too small to save anything"  # the reason of a tensor that keeps its type unless a pin names another
IN_NATS = GRADIENTS, KFAC = "fisher", "kfac"  # methods whose losses are predicted KL divergence
GRADIENT_FREE = "cfix", "dfix"  # methods that look at one matrix at a time, and can misjudge a large one
UNSCORED = "unscored"  # the method of losses that are 0, because every tensor can only keep its type
# the reason of a tensor that was rounded below Q8_0 before, unless --allow-requantize is given
ALREADY_QUANTIZED = "it is already quantized below Q8_0; --allow-requantize would round it twice"
NATS, POINTS = "nats per token", "points"  # units of losses


def loss_unit(method: str | None) -> str | None:
    """Return the unit of the losses of a method: NATS, or POINTS, which compare plans of the same losses only.

    None where nothing was scored.
    """
    if method == UNSCORED:
        return None
    return NATS if method in IN_NATS else POINTS


def take_loss_unit(raw: dict[str, Any], path: object) -> None:
    """Remove the unit from a JSON object with losses. Raise BadInput where it is not that of the object's method."""
    expected = loss_unit(raw.get("method") if isinstance(raw.get("method"), str) else None)
    got = raw.pop("loss_unit", expected)  # files of version 0.1.0 have none
    if got != expected:
        raise BadInput(path, "loss_unit is not that of the method", got=show_json(got), expected=show_json(expected))


def parse_file_name(raw: str | None, where: str, path: object) -> str | None:
    """Return the name of a file in the folder of a JSON file. Raise BadInput where it has a folder of its own."""
    if raw is not None and (raw in ("", ".", "..") or "\0" in raw or Path(raw).name != raw):
        raise BadInput(path, f"{where} must be the name of a file, without a folder", got=show_json(raw))
    return raw


def parse_file_path(raw: str | None, where: str, path: object) -> str | None:
    """Return the path of a file, relative to the folder of a JSON file. Raise BadInput where it is absolute or none."""
    if raw is not None and (Path(raw).anchor or Path(raw).name in ("", "..") or "\0" in raw):
        raise BadInput(path, f"{where} must be the path of a file, relative to this one's folder", got=show_json(raw))
    return raw


def parse_type_name(raw: str, where: str, path: object) -> str:
    """Return the name of the ggml type called `raw` in a JSON file. Raises BadInput, naming the place `where`."""
    fmt = by_name(raw)
    if fmt is None:
        names = [f.name for f in FORMATS.values()]
        raise BadInput(path, f"{where} is not a ggml type", got=show_json(raw), hint=suggest(raw, names))
    return fmt.name


@dataclass(frozen=True, slots=True)
class Candidate:
    """A type that a tensor could have, its size and its loss."""

    type: str = field(metadata={"parse": parse_type_name})
    n_bytes: int
    loss: float
    rmse: float = 0.0  # relative to the tensor's root mean square
    loss_error: float = 0.0  # standard error of loss, where rows were sampled


@dataclass(frozen=True, slots=True)
class TensorLosses:
    """One tensor of the source and its candidates, the source's own type (a copy, loss 0) among them."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...] = field(metadata={"parse": check_shape})  # ggml order, shape[0] is n_per_row
    source_type: str = field(metadata={"parse": parse_type_name})
    n_bytes: int  # in the source
    on_gpu: bool  # counts against VRAM
    reason: str | None  # why it must keep its type, or None
    candidates: tuple[Candidate, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)  # type -> why it is not a candidate

    @property
    def n_weights(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Losses:
    """Every tensor of one source with the loss of every candidate, in file order. The JSON also has the `loss_unit`."""

    source: str  # file name, no folder
    header_sha256: str
    arch: str
    method: str  # fisher, kfac (both in nats per token), cfix, dfix (both in points), unscored (no unit)
    imatrix: str | None  # name of the importance that weighted the encoders, as outputs record it; None without
    imatrix_sha256: str | None  # of its file
    tensors: tuple[TensorLosses, ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    effort: Effort = Effort.DEFAULT  # of the encoders whose errors were measured
    caches: Mapping[str, float] = field(default_factory=dict)  # "K type/V type" -> measured loss of such a KV cache
    options: tuple[str, ...] = ()  # of `requant score`, as one types them; files without folders; (): not known
    calibration_text: str | None = None  # name of the text that gradients were taken on; None: the model was not run
    # its file, relative to the folder of the losses; in memory its name
    imatrix_file: str | None = field(default=None, metadata={"parse": parse_file_path})
    # the importance as an Imatrix, or the Path of the file that these losses were read from
    importance: Any = field(default=None, repr=False, compare=False, metadata=IN_MEMORY)

    @property
    def output_name(self) -> str:
        """The name of the output matrix: `output.weight`, or that of the embedding where it is tied."""
        untied = any(t.name == "output.weight" for t in self.tensors)
        return "output.weight" if untied else "token_embd.weight"

    def _repr_html_(self) -> str:
        return html(self)

    def to_json(self) -> str:
        """Return the file's text: ASCII, one candidate a line, the same for the same losses."""
        return dump({"schema": LOSSES_SCHEMA, "loss_unit": loss_unit(self.method)} | to_plain(self))

    @classmethod
    def from_json(cls, text: str, path: object = "losses.json") -> Losses:
        """Return the losses in `text`. Raise BadInput that names `path`."""
        raw = parse(text, LOSSES_SCHEMA, path)
        take_loss_unit(raw, path)
        losses: Losses = parse_record(cls, raw, "", path)
        check_unique((t.name for t in losses.tensors), path)
        for index, tensor in enumerate(losses.tensors):
            _check_tensor(tensor, f"tensors[{index}]", path)
        return losses


@dataclass(frozen=True, slots=True)
class ScoringResult:
    """The losses of a source, and the statistics of its matrices' inputs and gradients, None where it was not run."""

    losses: Losses
    statistics: Statistics | None = None


def read_losses(path: Path | str) -> Losses:
    """Return the losses in the file at `path`. Raise BadInput, InputOutputError."""
    return replace(Losses.from_json(read_text(path), path), importance=Path(path))


def bytes_of_type(type_name: str, shape: tuple[int, ...], where: str, path: object) -> int:
    """Return the bytes of a tensor. Raise BadInput where its rows are not whole blocks."""
    fmt = format_of(type_name)
    if not fmt.divides(shape[0] if shape else 1):
        what, limit = f"{where} cannot be {fmt.name}", f"rows of whole blocks of {fmt.block_weights}"
        raise BadInput(path, what, got=f"shape {list(shape)}", limit=limit)
    return fmt.n_bytes(math.prod(shape))


def check_unique(names: Iterable[str], path: object) -> None:
    """Raise BadInput where a tensor's name appears twice."""
    name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise BadInput(path, f"tensor '{brief(name)}' appears twice")


def _check_tensor(tensor: TensorLosses, where: str, path: object) -> None:
    """Raise BadInput unless the types are unique, the source's own is among them, and the sizes are right."""
    types = [c.type for c in tensor.candidates]
    if len(set(types)) < len(types) or tensor.source_type not in types:
        what = f"{where}.candidates must name {tensor.source_type} (the source's own type) and no type twice"
        raise BadInput(path, what, got=", ".join(types) or "none")
    sizes = {c.type: c.n_bytes for c in tensor.candidates}
    if tensor.n_bytes != sizes[tensor.source_type]:
        raise BadInput(path, f"{where}.n_bytes is not that of {tensor.source_type}", got=tensor.n_bytes)
    for type_name, n_bytes in sizes.items():
        true = bytes_of_type(type_name, tensor.shape, where, path)
        if n_bytes != true:
            raise BadInput(path, f"{where}: n_bytes of {type_name} is wrong", got=n_bytes, limit=true)

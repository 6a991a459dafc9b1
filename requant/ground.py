"""What all placements of a model share: the memory that is no weights, and a batch that leaves room for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from requant.attached import draft_bytes, prediction_bytes, projector_bytes
from requant.budget import constrain
from requant.container.source import Source
from requant.errors import UsageError, brief
from requant.formats import by_name
from requant.guard import guarded
from requant.model.companions import SECOND_LEVEL
from requant.model.hyperparameters import Hyperparameters, read_hyperparameters
from requant.model.memory import (
    DEFAULT_RESERVE,
    DEVICE_ALIGNMENT,
    RESERVE_SHARE,
    Memory,
    compute_bytes,
    device_bytes,
    memory_for,
    shrink_batch,
)
from requant.placement import DEFAULT_PRICE, Ground
from requant.plan import Losses, Plan
from requant.request import Request
from requant.wishes import Wishes, engine_settings

MIN_UBATCH = 32  # tokens; the least that shrink_batch goes to
_WORTH = 0.05  # of the weights on the GPU: what a smaller batch must free before it can halve their loss


def ground_of(source: Source, losses: Losses, wishes: Wishes, notes: list[str]) -> Ground:
    """What every placement has in common, with a batch that leaves room for the weights."""
    hp = read_hyperparameters(source.metadata, source.tensors)
    settings = engine_settings(hp, wishes)
    if settings.n_ctx > hp.context_length:
        notes.append(f"a context of {settings.n_ctx} is above the {hp.context_length} that the model was made for")
    if settings.assume and not hp.caches.known:
        notes.append(f"the caches of '{brief(hp.arch)}' are not known: memory is an upper bound")
    if wishes.mtp and not hp.n_nextn:
        raise UsageError("--mtp: the model has no layers of multi-token prediction")
    engine = wishes.profile
    parts = {"padding": _row_padding(losses)}
    if wishes.draft is not None:
        parts |= draft_bytes(wishes.draft, source, settings)
    if wishes.mmproj is not None:
        parts |= projector_bytes(wishes.mmproj)
    if wishes.mtp:
        parts |= prediction_bytes(hp, settings)
    memory = memory_for(hp, settings, vram=wishes.vram, reserve=wishes.reserve)
    price = DEFAULT_PRICE if wishes.ram is not None and wishes.vram is not None else 0.0
    if wishes.min_speed is not None or wishes.ram is not None:
        rates = ", ".join(f"{name} {rate / 1e9:g}" for name, rate in engine.bandwidth.items())
        given = "given" if wishes.bandwidth else "assumed; say --bandwidth for yours"
        notes.append(f"speed is predicted from bandwidths in GB/s: {rates} ({given})")
    ground = Ground(
        hp=hp,
        engine=engine,
        memory=memory,
        vram=0 if wishes.vram is None and engine.has_gpu and wishes.ram is not None else wishes.vram,
        ram=wishes.ram,
        min_speed=wishes.min_speed,
        price=price if wishes.price is None else wishes.price,
        parts=parts,
        mtp=bool(wishes.mtp),
    )
    if wishes.vram is None or wishes.ram is not None or wishes.n_ubatch is not None:
        return ground
    return replace(ground, memory=_fitting_batch(losses, wishes, ground, notes))


def smaller_batches(source: Source, wishes: Wishes, plan: Plan) -> Iterator[int]:
    """Halves of the plan's batch, each as long as it frees enough of the VRAM for the weights to gain much."""
    hp = read_hyperparameters(source.metadata, source.tensors)
    settings = replace(engine_settings(hp, wishes), n_ubatch=plan.budget["ubatch"])
    weights = sum(c.n_bytes for c in plan.choices if c.device == "gpu")
    while settings.tokens > MIN_UBATCH:
        smaller = replace(settings, n_ubatch=max(MIN_UBATCH, settings.tokens // 2))
        if compute_bytes(hp, settings) - compute_bytes(hp, smaller) < _WORTH * weights:
            return
        yield smaller.n_ubatch
        settings = smaller


def batch_note(before: int, after: int) -> str:
    """Why a plan is for smaller batches."""
    return (
        f"the compute buffer of a batch of {before} leaves too little for weights: "
        f"the plan is for batches of {after}, which read prompts more slowly"
    )


def _fitting_batch(losses: Losses, wishes: Wishes, ground: Ground, notes: list[str]) -> Memory:
    """The memory of the largest batch that leaves room for the smallest plan: one that spares the output, if any."""
    assert wishes.vram is not None
    hp, memory = ground.hp, ground.memory
    limited = ground.request(losses, wishes.request, ground.n_places, 0)
    beside = sum(ground.parts.values())
    for considered in (guarded(losses, limited), losses):  # a smaller batch rather than a poor output
        smallest = beside + _smallest(considered, limited)
        fitted = shrink_batch(hp, memory, wishes.vram, smallest)
        if fitted.weights_limit(wishes.vram) >= smallest:
            break
    else:
        fitted = _least_memory(hp, memory, wishes.reserve, smallest)
    if fitted.settings.n_ubatch != memory.settings.n_ubatch:
        notes.append(batch_note(memory.settings.n_ubatch, fitted.settings.n_ubatch))
    return fitted


def _smallest(losses: Losses, request: Request) -> int:
    """Bytes of the last limit that the smallest plan takes."""
    return sum(min(option.costs[-1] for option in item.options) for item in constrain(losses, request).items)


def _least_memory(hp: Hyperparameters, memory: Memory, reserve: int | None, smallest: int) -> Memory:
    """What the smallest plan of all needs beside its weights, so that the error names a budget that will do.

    The default reserve grows with the budget, so it is the one of that larger budget.
    """
    least = memory_for(hp, replace(memory.settings, n_ubatch=MIN_UBATCH), reserve=0)
    needed = least.total + smallest
    if reserve is None:
        reserve = min(DEFAULT_RESERVE, -(-needed // (RESERVE_SHARE - 1)))
    return replace(least, reserve=reserve)


def _row_padding(losses: Losses) -> int:
    """Bytes at most by which CUDA's padding of last rows, and companions, exceed the aligned sizes of a limit."""
    total = 0
    for tensor in losses.tensors:
        if tensor.on_gpu and tensor.shape:
            formats = [fmt for c in tensor.candidates if (fmt := by_name(c.type)) is not None]
            total += max(
                device_bytes(fmt, tensor.shape)
                - -(-fmt.n_bytes(tensor.n_weights) // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
                for fmt in formats
            )
            total += DEVICE_ALIGNMENT * any(fmt.name == SECOND_LEVEL for fmt in formats)
    return total

"""What all placements of a model share: the memory that is no weights, and a batch that leaves room for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from requant.container.source import Source
from requant.errors import UsageError, brief
from requant.formats import by_name
from requant.formats.base import DEVICE_ALIGNMENT
from requant.model.auxiliary import draft_bytes, prediction_bytes, projector_bytes
from requant.model.engine_settings import engine_settings
from requant.model.hyperparameters import Hyperparameters, read_hyperparameters
from requant.model.memory import (
    DEFAULT_RESERVE,
    RESERVE_SHARE,
    Memory,
    compute_bytes,
    device_bytes,
    layer_caches,
    memory_for,
    shrink_batch,
)
from requant.model.roles import is_experts, is_lookup, is_tied
from requant.model.weight_scales import SCALED_TYPE
from requant.planning.constraints import Constraints, Timing, ram_limit, speed_limit, vram_limit
from requant.planning.engines import Engine
from requant.planning.output_floor import with_output_floor
from requant.planning.plan import Plan
from requant.planning.request import PlanRequest
from requant.planning.solver.problem import constrain
from requant.scoring.losses import Losses, TensorLosses

MIN_UBATCH = 32  # tokens; the least that shrink_batch goes to
_WORTH = 0.05  # of the weights on the GPU: what a smaller batch must free before it can halve their loss


def deployment_for(source: Source, losses: Losses, request: PlanRequest, notes: list[str]) -> Deployment:
    """What every placement has in common, with a batch that leaves room for the weights."""
    hp = read_hyperparameters(source.metadata, source.tensors)
    settings = engine_settings(hp, request.settings)
    if settings.n_ctx > hp.context_length:
        notes.append(f"a context of {settings.n_ctx} is above the {hp.context_length} that the model was made for")
    if settings.assume and not hp.caches.known:
        notes.append(f"the caches of '{brief(hp.arch)}' are not known: memory is an upper bound")
    if request.mtp and not hp.n_nextn:
        raise UsageError("--mtp: the model has no layers of multi-token prediction")
    engine = request.profile
    parts = {"padding": _row_padding(losses)}
    if request.draft is not None:
        parts |= draft_bytes(request.draft, source, settings)
    if request.mmproj is not None:
        parts |= projector_bytes(request.mmproj)
    if request.mtp:
        parts |= prediction_bytes(hp, settings)
    memory = memory_for(hp, settings, vram=request.vram, reserve=request.reserve)
    price = DEFAULT_PRICE if request.ram is not None and request.vram is not None else 0.0
    if request.min_speed is not None or request.ram is not None:
        rates = ", ".join(f"{name} {rate / 1e9:g}" for name, rate in engine.bandwidth.items())
        given = "given" if request.bandwidth else "assumed; say --bandwidth for yours"
        notes.append(f"speed is predicted from bandwidths in GB/s: {rates} ({given})")
    deployment = Deployment(
        hp=hp,
        engine=engine,
        memory=memory,
        vram=0 if request.vram is None and engine.has_gpu and request.ram is not None else request.vram,
        ram=request.ram,
        min_speed=request.min_speed,
        price=price if request.price is None else request.price,
        parts=parts,
        mtp=bool(request.mtp),
    )
    if request.vram is None or request.ram is not None or request.n_ubatch is not None:
        return deployment
    return replace(deployment, memory=_fitting_batch(losses, request, deployment, notes))


def smaller_batches(source: Source, request: PlanRequest, plan: Plan) -> Iterator[int]:
    """Halves of the plan's batch, each as long as it frees enough of the VRAM for the weights to gain much."""
    hp = read_hyperparameters(source.metadata, source.tensors)
    settings = replace(engine_settings(hp, request.settings), n_ubatch=plan.budget["ubatch"])
    weights = sum(c.n_bytes for c in plan.choices if c.device == "gpu")
    while settings.tokens > MIN_UBATCH:
        smaller = replace(settings, n_ubatch=max(MIN_UBATCH, settings.tokens // 2))
        if compute_bytes(hp, settings) - compute_bytes(hp, smaller) < _WORTH * weights:
            return
        yield smaller.n_ubatch
        settings = smaller


def describe_batch(before: int, after: int) -> str:
    """Why a plan is for smaller batches."""
    return (
        f"the compute buffer of a batch of {before} leaves too little for weights: "
        f"the plan is for batches of {after}, which read prompts more slowly"
    )


def _fitting_batch(losses: Losses, request: PlanRequest, deployment: Deployment, notes: list[str]) -> Memory:
    """The memory of the largest batch that leaves room for the smallest plan: one that spares the output, if any."""
    assert request.vram is not None
    hp, memory = deployment.hp, deployment.memory
    limited = deployment.constraints(losses, request.constraints, deployment.n_places, 0)
    beside = sum(deployment.parts.values())
    for considered in (with_output_floor(losses, limited), losses):  # a smaller batch rather than a poor output
        smallest = beside + _smallest(considered, limited)
        fitted = shrink_batch(hp, memory, request.vram, smallest)
        if fitted.weights_limit(request.vram) >= smallest:
            break
    else:
        fitted = _least_memory(hp, memory, request.reserve, smallest)
    if fitted.settings.n_ubatch != memory.settings.n_ubatch:
        notes.append(describe_batch(memory.settings.n_ubatch, fitted.settings.n_ubatch))
    return fitted


def _smallest(losses: Losses, constraints: Constraints) -> int:
    """Bytes of the last limit that the smallest plan takes."""
    return sum(min(option.costs[-1] for option in item.options) for item in constrain(losses, constraints).items)


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
            total += DEVICE_ALIGNMENT * any(fmt.name == SCALED_TYPE for fmt in formats)
    return total


HOP_NS = 20_000  # from one device to the other and back, beside what is carried


DEFAULT_PRICE = 0.2  # nats that a second per token is worth, where there is a choice of devices


@dataclass(frozen=True, slots=True)
class Deployment:
    """What every placement of a model has in common.

    `vram`, `ram`: bytes, None without a limit; `parts`: bytes in VRAM that are neither weights, cache nor compute.
    `mtp`: layers of multi-token prediction are loaded.
    """

    hp: Hyperparameters
    engine: Engine
    memory: Memory
    vram: int | None = None
    ram: int | None = None
    min_speed: float | None = None
    price: float = 0.0
    parts: Mapping[str, int] = field(default_factory=dict)
    mtp: bool = False

    @property
    def n_places(self) -> int:
        """Layers that can be on the GPU, the output counting as one where the last ones go first."""
        return self.hp.n_trunk + (self.engine.order == "last")

    def layers(self, k: int) -> range:
        """The trunk's layers on the GPU when `k` of the places are."""
        n = self.hp.n_trunk
        return range(max(n + 1 - k, 0), n) if self.engine.order == "last" else range(min(k, n))

    def n_gpu_layers(self, k: int) -> int:
        """The number to tell the engine, which counts layers of multi-token prediction among the last."""
        return k + self.hp.n_nextn if k and self.engine.order == "last" else k

    def devices(self, tensor: TensorLosses, k: int, *, tied: bool) -> tuple[str, ...]:
        """Where the tensor may be."""
        if tensor.layer is None:
            with_output = k > 0 if self.engine.order == "last" else k >= self.n_places
            return ("gpu",) if with_output and not is_lookup(tensor.name, tied=tied) else ("cpu",)
        if tensor.layer >= self.hp.n_trunk:
            return (("gpu",) if k else ("cpu",)) if self.mtp else ("none",)
        if tensor.layer not in self.layers(k):
            return ("cpu",)
        free = self.engine.experts and self.ram is not None and is_experts(tensor.name, tensor.shape)
        return ("gpu", "cpu") if free else ("gpu",)

    def share(self, tensor: TensorLosses, *, tied: bool) -> float:
        """Of the tensor, what a token reads."""
        if is_lookup(tensor.name, tied=tied) or (tensor.layer is not None and tensor.layer >= self.hp.n_trunk):
            return 0.0
        experts = is_experts(tensor.name, tensor.shape)
        return min(1.0, self.hp.n_expert_used / max(self.hp.n_expert, 1)) if experts and self.hp.n_expert_used else 1.0

    def timing(self, k: int) -> Timing:
        """The caches are read once per token; so much crosses from one device to the other."""
        rates = self.engine.bandwidth
        caches = layer_caches(self.hp, self.memory.settings)
        on_gpu = sum(caches[il] for il in self.layers(k))
        seconds = on_gpu / rates["gpu"] + (sum(caches) - on_gpu) / rates["cpu"]
        crossings = int(0 < len(self.layers(k)) < self.hp.n_trunk)
        fixed = math.ceil(1e9 * seconds) + crossings * self._hop()
        return Timing(rates["gpu"], rates["cpu"], fixed, self.engine.slower, self._hop())

    def _hop(self) -> int:
        return HOP_NS + math.ceil(1e9 * 2 * 4 * self.hp.n_embd / self.engine.bandwidth["pcie"])

    def constraints(self, losses: Losses, request: Constraints, k: int, copied: int) -> Constraints:
        """`request` with the limits that hold at `k`; `copied` bytes are kept for one tensor of the CPU on the GPU."""
        tied = is_tied({t.name for t in losses.tensors})
        devices = {t.name: self.devices(t, k, tied=tied) for t in losses.tensors}
        timing = self.timing(k)
        caches = layer_caches(self.hp, self.memory.settings, padded=True)
        on_gpu = sum(caches[il] for il in self.layers(k))
        limits, parts = list(request.limits), dict[str, int]()
        if self.vram is not None and (k or self.vram):
            parts = {"kv_cache": on_gpu, "compute": self.memory.compute if k else 0, "copies": copied if k else 0}
            parts |= {**self.parts, "reserve": self.memory.reserve}
            parts = {name: size for name, size in parts.items() if size}
            limits.append(vram_limit(self.vram, self.vram - sum(parts.values())))
        if self.ram is not None:
            limits.append(ram_limit(self.ram, sum(caches) - on_gpu + self.memory.compute))
        if self.min_speed is not None:
            limits.append(speed_limit(self.min_speed, timing))
        return replace(
            request,
            limits=tuple(limits),
            memory=parts,
            devices=devices,
            units={t.name: f"layer {t.layer}" for t in losses.tensors},
            shares={t.name: self.share(t, tied=tied) for t in losses.tensors},
            unusable=self.engine.cannot,
            largest_on_cpu=copied if k and copied else None,
            timing=timing,
            price=self.price if request.objective == "loss" else 0.0,
        )

"""Deployment: the engine, its devices and the memory beside the weights that all placements of a model share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from requant.container.infos import round_up
from requant.errors import BadInput, UsageError, brief
from requant.formats import by_name
from requant.formats.base import DEVICE_ALIGNMENT
from requant.model.auxiliary import (
    ORDINARY_DRAFT,
    draft_bytes,
    draft_type,
    prediction_bytes,
    projector_bytes,
    tower_bytes,
)
from requant.model.engine_settings import EngineSettings, engine_settings
from requant.model.hyperparameters import Hyperparameters, read_hyperparameters
from requant.model.kept import is_of_tower
from requant.model.kinds import kind_of
from requant.model.memory import Memory, device_bytes, layer_caches, memory_for
from requant.model.roles import is_experts, is_lookup, is_tied
from requant.model.weight_scales import SCALED_TYPE
from requant.planning.constraints import Constraints, Timing, ram_limit, speed_limit, vram_limit

if TYPE_CHECKING:
    from pathlib import Path

    from requant.container.source import Source
    from requant.planning.engines import Engine
    from requant.planning.request import PlanRequest
    from requant.scoring.losses import Losses, TensorLosses

HOP_NS = 20_000  # from one device to the other and back, beside the time of the bytes that are carried
DEFAULT_PRICE = 0.2  # nats that a second per token is worth, where there is a choice of devices


@dataclass(frozen=True, slots=True)
class Deployment:
    """The engine, its limits and its memory, the same for every placement of a model.

    `vram`, `ram`: bytes, None without a limit. `parts`: bytes in VRAM that are neither weights, cache nor compute.
    `mtp`: layers of multi-token prediction are loaded. `room`: bytes of VRAM for weights, None for all that are left.
    `spread`: with RAM, layers and experts may be on the CPU; without, the price of time does not count.
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
    room: int | None = None
    spread: bool = True

    @classmethod
    def for_request(cls, source: Source, losses: Losses, request: PlanRequest) -> tuple[Deployment, tuple[str, ...]]:
        """Return the deployment that a request describes, with the default batch, and notes for the user.

        Raises UsageError for settings that the model cannot have, BadInput where its memory needs are not known.
        """
        hp = read_hyperparameters(source.metadata, source.tensors)
        kind = kind_of(source.metadata, {t.name for t in source.tensors})
        if not kind.alone:
            raise BadInput(source.path, f"is {kind.words}, which has no budget of its own", hint=kind.beside)
        settings = engine_settings(hp, request.settings)
        if request.mtp and not hp.n_nextn:
            raise UsageError("--mtp: the model has no layers of multi-token prediction")
        engine, on_both = request.profile, request.ram is not None and request.vram is not None
        parts = {"padding": _row_padding(losses)}
        if tower := tower_bytes(source.tensors):
            parts["tower compute"] = tower
        if request.draft is not None:
            _check_engine_drafts(request.draft, engine)
            parts |= draft_bytes(request.draft, source, settings)
        if request.mmproj is not None:
            parts |= projector_bytes(request.mmproj)
        if request.mtp:
            parts |= prediction_bytes(hp, settings)
        deployment = cls(
            hp=hp,
            engine=engine,
            memory=memory_for(hp, settings, vram=request.vram, reserve=request.reserve),
            vram=0 if request.vram is None and engine.has_gpu and request.ram is not None else request.vram,
            ram=request.ram,
            min_speed=request.min_speed,
            price=(DEFAULT_PRICE if on_both else 0.0) if request.price is None else request.price,
            parts=parts,
            mtp=bool(request.mtp),
        )
        return deployment, _note_assumptions(deployment, given=bool(request.bandwidth))

    @property
    def settings(self) -> EngineSettings:
        """Context, batch and cache types."""
        return self.memory.settings

    @property
    def n_places(self) -> int:
        """Layers that the GPU can have. Engines that offload from the last layer count the output as one layer more."""
        return self.hp.n_trunk + (self.engine.order == "last")

    @property
    def chooses_layers(self) -> bool:
        """Return whether the number of layers on the GPU is open."""
        return self.ram is not None and self.engine.has_gpu and self.spread

    @property
    def fixed_layers(self) -> int:
        """The number of layers on the GPU where it is not chosen: all or none."""
        return self.n_places if self.engine.has_gpu and self.vram != 0 else 0

    def layers(self, k: int) -> range:
        """The trunk's layers on the GPU, with `k` layers there; the output may be one of the `k`."""
        n = self.hp.n_trunk
        return range(max(n + 1 - k, 0), n) if self.engine.order == "last" else range(min(k, n))

    def n_gpu_layers(self, k: int) -> int:
        """The number for the engine's option, which counts layers of multi-token prediction among the last."""
        return k + self.hp.n_nextn if k and self.engine.order == "last" else k

    def devices(self, tensor: TensorLosses, k: int, *, tied: bool) -> tuple[str, ...]:
        """The devices where the tensor may be with `k` layers on the GPU."""
        if is_of_tower(tensor.name):  # llama.cpp has it on the GPU, however many layers are there
            return ("gpu",) if self.engine.has_gpu and self.vram != 0 else ("cpu",)
        if tensor.layer is None:
            with_output = k > 0 if self.engine.order == "last" else k >= self.n_places
            return ("gpu",) if with_output and not is_lookup(tensor.name, tied=tied) else ("cpu",)
        if tensor.layer >= self.hp.n_trunk:
            return (("gpu",) if k else ("cpu",)) if self.mtp else ("none",)
        if tensor.layer not in self.layers(k):
            return ("cpu",)
        free = self.engine.experts and self.ram is not None and self.spread and is_experts(tensor.name, tensor.shape)
        return ("gpu", "cpu") if free else ("gpu",)

    def share(self, tensor: TensorLosses, *, tied: bool) -> float:
        """The share of the tensor that is read for each token."""
        if is_lookup(tensor.name, tied=tied) or is_of_tower(tensor.name):
            return 0.0
        if tensor.layer is not None and tensor.layer >= self.hp.n_trunk:
            return 0.0
        experts = is_experts(tensor.name, tensor.shape)
        return min(1.0, self.hp.n_expert_used / max(self.hp.n_expert, 1)) if experts and self.hp.n_expert_used else 1.0

    def timing(self, k: int) -> Timing:
        """Return the time per token with `k` layers on the GPU.

        Each token reads all caches once. If both devices have layers, its activations cross to the other and back.
        """
        rates = self.engine.bandwidth
        caches = layer_caches(self.hp, self.settings)
        on_gpu = sum(caches[il] for il in self.layers(k))
        seconds = on_gpu / rates["gpu"] + (sum(caches) - on_gpu) / rates["cpu"]
        crossings = int(0 < len(self.layers(k)) < self.hp.n_trunk)
        fixed = math.ceil(1e9 * seconds) + crossings * self._hop()
        return Timing(rates["gpu"], rates["cpu"], fixed, self.engine.slower, self._hop())

    def _hop(self) -> int:
        """Nanoseconds from one device to the other and back."""
        return HOP_NS + math.ceil(1e9 * 2 * 4 * self.hp.n_embd / self.engine.bandwidth["pcie"])

    def constraints(self, losses: Losses, base: Constraints, k: int, copied: int = 0) -> Constraints:
        """Return `base` with the limits and devices for `k` layers on the GPU.

        `copied`: bytes of VRAM kept free for a copy of one tensor on the CPU.
        """
        tied = is_tied({t.name for t in losses.tensors})
        timing = self.timing(k)
        caches = layer_caches(self.hp, self.settings, padded=True)
        on_gpu = sum(caches[il] for il in self.layers(k))
        limits, parts = list(base.limits), dict[str, int]()
        if self.vram is not None and (k or self.vram):
            parts = {"kv_cache": on_gpu, "compute": self.memory.compute if k else 0, "copies": copied if k else 0}
            parts |= {**self.parts, "reserve": self.memory.reserve}
            parts = {name: size for name, size in parts.items() if size}
            left = self.vram - sum(parts.values())
            limits.append(vram_limit(self.vram, left if self.room is None else min(left, self.room)))
        if self.ram is not None:
            limits.append(ram_limit(self.ram, sum(caches) - on_gpu + self.memory.compute))
        if self.min_speed is not None:
            limits.append(speed_limit(self.min_speed, timing))
        return replace(
            base,
            limits=tuple(limits),
            memory=parts,
            devices={t.name: self.devices(t, k, tied=tied) for t in losses.tensors},
            units={t.name: f"layer {t.layer}" for t in losses.tensors},
            shares={t.name: self.share(t, tied=tied) for t in losses.tensors},
            unusable=self.engine.cannot,
            largest_on_cpu=copied if k and copied else None,
            timing=timing,
            price=self.price if base.objective == "loss" and self.spread else 0.0,
        )


def _check_engine_drafts(draft: Path, engine: Engine) -> None:
    """Raise UsageError for a head that the engine has no option for."""
    if (kind := draft_type(draft)) != ORDINARY_DRAFT and engine.family != "llama.cpp":
        raise UsageError(f"--draft: {engine.name} is not known to start with a head of type {kind}; llama.cpp does")


def _note_assumptions(deployment: Deployment, *, given: bool) -> tuple[str, ...]:
    """Notes on a context above the model's own, on unknown caches, and on bandwidths; `given`: by the user."""
    hp, settings = deployment.hp, deployment.settings
    notes = []
    if settings.n_ctx > hp.context_length:
        notes.append(f"a context of {settings.n_ctx} is above the {hp.context_length} that the model was made for")
    if settings.assume and not hp.caches.known:
        notes.append(f"the caches of '{brief(hp.arch)}' are not known: memory is an upper bound")
    if deployment.min_speed is not None or deployment.ram is not None:
        rates = ", ".join(f"{name} {rate / 1e9:g}" for name, rate in deployment.engine.bandwidth.items())
        origin = "given" if given else "assumed; say --bandwidth for yours"
        notes.append(f"speed is predicted from bandwidths in GB/s: {rates} ({origin})")
    return tuple(notes)


def _row_padding(losses: Losses) -> int:
    """Upper bound of the bytes that row padding and weight scales add to the sizes that a limit counts."""
    total = 0
    for tensor in losses.tensors:
        if tensor.on_gpu and tensor.shape:
            formats = [fmt for c in tensor.candidates if (fmt := by_name(c.type)) is not None]
            total += max(
                device_bytes(fmt, tensor.shape) - round_up(fmt.n_bytes(tensor.n_weights), DEVICE_ALIGNMENT)
                for fmt in formats
            )
            total += DEVICE_ALIGNMENT * any(fmt.name == SCALED_TYPE for fmt in formats)
    return total

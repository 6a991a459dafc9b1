"""Profiles of the engines that load the file: types that run on each device, bandwidths, order of layers, options.

Sources: the supports_op functions of ggml-cuda.cu, ggml-metal-device.m and ggml-vulkan.cpp in llama.cpp; placement in
src/llama-model.cpp (get_layer_buft_list); options in common/arg.cpp. Bandwidths are those of a medium machine, and
`slower` the usual cost of the types' decoders; both are estimates, and --bandwidth replaces the former.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from requant.errors import UsageError, brief, suggest
from requant.formats import FORMATS
from requant.scoring.options import DEFAULT_TYPES

GB = 1e9
_FAST_ON_CPU = (*DEFAULT_TYPES, "IQ4_XS", "IQ4_NL", "MXFP4")  # as fast there as Q4_0
_IQ = ("IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_XXS", "IQ2_S")
_ALL = frozenset(f.name for f in FORMATS.values())
_NEWER = frozenset(["NVFP4", "Q1_0", "Q2_0"])  # than ik_llama.cpp
_GRIDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")  # a tuple: plans list them in order
_SLOW_ON_CPU = {**dict.fromkeys(_GRIDS, 2.0), "IQ4_XS": 1.2, "IQ4_NL": 1.1, "NVFP4": 1.5, "MXFP4": 1.2}
# Decoders of the CPU without vector instructions, or with lookups in a grid: 2 to 14 times as long for a weight as
# those of Q4_0 (ggml_vec_dot_* of ggml 0.20, AVX-512)
SLOW_ON_CPU = frozenset([*_GRIDS, "Q2_0"])
# Two bits without a super-block: where K and IQ types fit, plans with it lose more than predicted (tiny model, 3 bits
# per weight: measured divergence 0.0250 with it, 0.0210 without)
ONLY_FOR_ODD_ROWS = frozenset(["Q2_0"])
_SLOW_ON_GPU = dict.fromkeys(_GRIDS, 1.2)


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine on one kind of machine.

    `candidates`: types worth choosing; `cannot`: device -> types that do not run there. `order`: the layers that go to
    the GPU first, last or first. `experts`: whether the experts of single layers can stay on the CPU. `bandwidth`: in
    bytes per second, of gpu, cpu and pcie (between them). `preferred`: a type that it computes with natively.
    """

    name: str
    family: str  # engines of a family share a command line
    candidates: tuple[str, ...] = DEFAULT_TYPES
    cannot: Mapping[str, frozenset[str]] = field(default_factory=dict)
    order: str = "last"
    experts: bool = True
    has_gpu: bool = True
    bandwidth: Mapping[str, float] = field(default_factory=dict)
    slower: Mapping[str, float] = field(default_factory=dict)
    preferred: str = ""

    @property
    def runs_nowhere(self) -> frozenset[str]:
        """Return the types that run on none of its devices."""
        devices = ("gpu", "cpu") if self.has_gpu else ("cpu",)
        return frozenset.intersection(*(self.cannot.get(device, frozenset()) for device in devices))


_CARD = {"gpu": 400 * GB, "cpu": 50 * GB, "pcie": 16 * GB}
_TERNARY = frozenset(["TQ1_0", "TQ2_0"])
_CUDA = Engine(
    "llama.cpp-cuda",
    "llama.cpp",
    candidates=(*DEFAULT_TYPES, *_IQ, "MXFP4", "Q2_0"),
    cannot={"gpu": _TERNARY},
    bandwidth=_CARD,
    slower=_SLOW_ON_GPU | {"NVFP4": 1.3},
)
_KNOWN = (
    _CUDA,
    replace(
        _CUDA,
        name="llama.cpp-blackwell",
        candidates=(*DEFAULT_TYPES, *_IQ, "MXFP4", "NVFP4", "Q2_0"),
        bandwidth=_CARD | {"gpu": 800 * GB, "pcie": 32 * GB},
        slower=_SLOW_ON_GPU,
        preferred="NVFP4",
    ),
    replace(_CUDA, name="llama.cpp-vulkan", cannot={}, slower=_SLOW_ON_GPU | {"NVFP4": 2.0}),
    replace(
        _CUDA,
        name="llama.cpp-metal",
        cannot={"gpu": frozenset(["NVFP4", "TQ1_0"])},
        bandwidth={"gpu": 200 * GB, "cpu": 100 * GB, "pcie": 200 * GB},
    ),
    Engine(
        "llama.cpp-cpu",
        "llama.cpp",
        candidates=_FAST_ON_CPU,
        has_gpu=False,
        bandwidth=_CARD,
        slower=_SLOW_ON_CPU,
    ),
    replace(
        _CUDA,
        name="ik_llama.cpp",
        family="ik_llama.cpp",
        candidates=(*DEFAULT_TYPES, *_IQ, "MXFP4"),
        cannot={"gpu": _NEWER | _TERNARY, "cpu": _NEWER},
    ),
    replace(_CUDA, name="ollama", family="ollama", candidates=(*DEFAULT_TYPES, *_IQ, "MXFP4"), experts=False),
    replace(_CUDA, name="koboldcpp", family="koboldcpp", candidates=(*DEFAULT_TYPES, *_IQ, "MXFP4")),
    Engine(
        "sharpinference",
        "sharpinference",
        cannot=dict.fromkeys(("gpu", "cpu"), _ALL - {*DEFAULT_TYPES, "F32", "F16", "BF16"}),
        order="first",
        experts=False,
        bandwidth=_CARD,
    ),
)
ENGINES = {engine.name: engine for engine in _KNOWN}
_SYNONYMS = dict.fromkeys(["lmstudio", "lm-studio", "lm studio", "lms"], _CUDA.name)  # LM Studio runs llama.cpp
DEFAULT = "llama.cpp"
GENERIC = replace(_CUDA, name="", cannot={})  # without --engine: llama.cpp on a GPU, whose build may be any


def engine_named(name: str | None) -> Engine:
    """Return the profile called `name`, that of any build of llama.cpp for None. Raises UsageError naming near ones."""
    if name is None or name.lower() == DEFAULT:
        return GENERIC
    if name.lower() in _SYNONYMS:
        return ENGINES[_SYNONYMS[name.lower()]]
    if name.lower() not in ENGINES:
        raise UsageError(f"--engine: '{brief(name)}' is not known; {suggest(name, [DEFAULT, *ENGINES])}")
    return ENGINES[name.lower()]


def parse_bandwidth(text: str) -> dict[str, float]:
    """Parse `gpu=448,cpu=60,pcie=16` in GB/s (powers of ten); return bytes per second. Raises UsageError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        device, _, figure = part.partition("=")
        try:
            rate = float(figure)
        except ValueError:
            rate = 0.0
        if device.strip() not in _CARD or not 0 < rate < 1e6:
            what = f"'{brief(part)}' is not DEVICE=NUMBER in GB/s"
            if found and not device.strip().isalpha():
                what += ", and a comma separates devices: write decimals with a point"
            raise UsageError(f"--bandwidth: {what}; as in gpu=448.5,cpu=60,pcie=16")
        found[device.strip()] = rate * GB
    return found


def expert_patterns(layers: Sequence[int]) -> str:
    """Return a regular expression for the experts of `layers`, without commas, which separate rules in the option."""
    return rf"blk\.({'|'.join(map(str, layers))})\.ffn_(up|down|gate|gate_up)_(ch|)exps"


def is_prefix(layers: Sequence[int]) -> bool:
    """Return whether `layers` are the first ones, for which engines have an option of its own."""
    return list(layers) == list(range(len(layers)))

"""The options of a plan, one row each: command line, Python keywords, recorded options and checks derive from them.

A new option is a row here, a field of `planning.request.PlanRequest`, and the type of its keyword in
`api.keywords.Planning`, which type checkers read; tests/planning/test_options.py compares the three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from requant.common.units import size_label
from requant.planning import rules
from requant.planning.engines import GB
from requant.planning.rules import MAX_CONTEXT

PREFERENCE = 0.05  # share of the predicted loss that an engine's own type may cost
BUDGET, MEMORY, TYPES = "Budget", "Memory and engine", "Types"  # headings of `cli.help_pages`


@dataclass(frozen=True, slots=True)
class ValueKind:
    """A kind of option values: how they are parsed, and shown as a user would type them.

    parse: takes the value of a Python keyword, and the option's name for messages. parse_text: takes the text of the
    command line, where that is parsed differently. python_type: bool, Path, int (from 1 on) or float (from `low` to
    `high`) where the command line checks the text by itself; str where the parser does. multiple: the option may be
    repeated. complete: the completion of `cli.options.COMPLETERS`.
    """

    metavar: str
    parse: Callable[[Any, str], Any]
    show: Callable[[Any], str] = str
    parse_text: Callable[[Any, str], Any] | None = None
    python_type: type = str
    low: float | None = None
    high: float | None = None
    multiple: bool = False
    complete: str = ""


@dataclass(frozen=True, slots=True)
class PlanOption:
    """An option of a plan.

    doc: text for its Python keyword, where that differs from `help`; options with the same text share a sentence.
    """

    field: str  # of PlanRequest, to which the value belongs
    flag: str
    kind: ValueKind
    heading: str
    help: str
    doc: str = ""
    show_default: str | None = None

    @property
    def keyword(self) -> str:
        """Return the keyword of the Python API, and the parameter of a command."""
        return self.flag.removeprefix("--").replace("-", "_")


def _number_label(value: float) -> str:
    return f"{value:.12g}"


def _rates_label(rates: tuple[tuple[str, float], ...]) -> str:
    return ",".join(f"{device}={_number_label(rate / GB)}" for device, rate in rates)


_SIZE = ValueKind("SIZE", rules.parse_bytes, size_label)
_SIZES = replace(_SIZE, metavar="SIZE,..", parse_text=rules.parse_sizes)
_SIZE_OR_ZERO = replace(_SIZE, parse=partial(rules.parse_bytes, least=0))
_CONTEXT = ValueKind(
    "N|max", rules.parse_context, lambda n: "max" if n == MAX_CONTEXT else str(n), rules.parse_context_text
)
_COUNT = ValueKind("N", rules.parse_count, python_type=int)
_NUMBER = ValueKind("X", rules.parse_number, _number_label, python_type=float)
_SHARE = replace(_NUMBER, parse=partial(rules.parse_number, high=10), low=0, high=10)
_PRICE = replace(_NUMBER, low=0)
_RATES = ValueKind("D=X,..", rules.parse_rates, _rates_label)
_FLAG = ValueKind("", lambda value, _: bool(value) or None, python_type=bool)  # None: not set
_FILE = ValueKind("F", lambda value, _: Path(value), lambda path: path.name, python_type=Path)
_GGUF = replace(_FILE, complete="ggufs")
_CACHE_TYPE = ValueKind("T|auto", rules.parse_any_cache_type, str.lower, rules.parse_cache_type, complete="cache_types")
_ENGINE = ValueKind("E", rules.parse_engine, complete="engines")
_RULES = ValueKind("REGEX=TYPE", rules.parse_rules, lambda rule: f"{rule.pattern}={rule.type}", multiple=True)
_TYPE = ValueKind("T", rules.parse_type, complete="types")
_TYPES = ValueKind("T,..", rules.parse_types, ",".join, complete="types")
_PATTERNS = ValueKind("REGEX", rules.parse_patterns, multiple=True)
_BYTES_DOC = "bytes, or text with a unit"
_CACHE_DOC = 'a type, or "auto"'
_FILES_DOC = "files that share the VRAM"
_RULES_DOC = "{regular expression: type}, the first that matches decides"
_TYPES_DOC = "the type of output.weight, of token_embd.weight"

PLAN_OPTIONS = (  # in the order of the help
    PlanOption(
        *("vram", "--vram", _SIZES, BUDGET),
        help="VRAM for weights, KV cache, buffers and reserve, as in 12GiB.",
        doc=_BYTES_DOC,
    ),
    PlanOption("ram", "--ram", _SIZE, BUDGET, help="RAM for what is not on the GPU.", doc=_BYTES_DOC),
    PlanOption("size", "--size", _SIZE, BUDGET, help="Size of the whole file, header and all.", doc=_BYTES_DOC),
    PlanOption("bpw", "--bpw", _NUMBER, BUDGET, help="Bits per weight over all tensors."),
    PlanOption(
        *("max_loss", "--max-loss", _NUMBER, BUDGET),
        help="Predicted KL divergence to keep, in nats per token, with the fewest bytes; not with --quick.",
        doc="predicted KL divergence to keep, in nats per token; only with losses in this unit",
    ),
    PlanOption(
        *("min_speed", "--min-speed", _NUMBER, BUDGET),
        help="Tokens per second of decoding, predicted from bandwidths.",
        doc="tokens per second",
    ),
    PlanOption(
        *("n_ctx", "--ctx", _CONTEXT, MEMORY),
        help="Context in tokens, over all sequences (16k); 0: the model's own; max: the largest that keeps --max-loss.",
        doc='tokens over all sequences, or "max"',
        show_default="the model's own, at most 4096",
    ),
    PlanOption(
        *("cache_type_k", "--cache-type-k", _CACHE_TYPE, MEMORY),
        help="Type of the K cache; auto measures what smaller ones cost.",
        doc=_CACHE_DOC,
        show_default="f16",
    ),
    PlanOption(
        *("cache_type_v", "--cache-type-v", _CACHE_TYPE, MEMORY),
        help="Type of the V cache.",
        doc=_CACHE_DOC,
        show_default="f16",
    ),
    PlanOption("n_parallel", "--parallel", _COUNT, MEMORY, help="Sequences at once.", show_default="1"),
    PlanOption(
        "n_ubatch",
        "--ubatch",
        _COUNT,
        MEMORY,
        help="Tokens computed at once.",
        show_default="512 where they cost the weights little, else fewer",
    ),
    PlanOption(
        *("reserve", "--reserve", _SIZE_OR_ZERO, MEMORY),
        help="VRAM to leave free.",
        doc=_BYTES_DOC,
        show_default="1GiB, at most a tenth of --vram",
    ),
    PlanOption("draft", "--draft", _GGUF, MEMORY, help="A draft model or head that shares the VRAM.", doc=_FILES_DOC),
    PlanOption("mmproj", "--mmproj", _GGUF, MEMORY, help="A vision projector that shares the VRAM.", doc=_FILES_DOC),
    PlanOption("mtp", "--mtp", _FLAG, MEMORY, help="Layers of multi-token prediction are used."),
    PlanOption(
        *("assume", "--assume", _FLAG, MEMORY),
        help="Plan for an unknown architecture with an upper bound.",
        doc="an upper bound for a cache that is not known",
    ),
    PlanOption(
        *("engine", "--engine", _ENGINE, MEMORY),
        help="What will run it: llama.cpp-cuda, ollama, ...",
        doc="what will run it, llama.cpp-cuda for one",
        show_default="llama.cpp, types that any build reads",
    ),
    PlanOption(
        *("prefer_within", "--prefer-within", _SHARE, MEMORY),
        help="Share of the loss that the engine's own type (NVFP4) may cost.",
        doc="share of the loss that the engine's own type may cost",
        show_default=str(PREFERENCE),
    ),
    PlanOption(
        *("bandwidth", "--bandwidth", _RATES, MEMORY),
        help="GB/s (powers of ten) of GPU, CPU and PCIe.",
        doc='GB/s by device, {"gpu": 448}',
        show_default="the engine's, gpu=400,cpu=50,pcie=16 for most",
    ),
    PlanOption(
        *("price", "--time-price", _PRICE, MEMORY),
        help="Loss in nats per token that a second per token is worth, with --ram; not with --quick.",
        doc="loss in nats per token that a second per token is worth; only with losses in this unit",
        show_default="0.2",
    ),
    PlanOption(
        *("types", "--types", _TYPES, TYPES),
        help="The types to choose from.",
        doc="those to choose from",
        show_default="Q4_0 to Q8_0, Q2_K to Q6_K, more with --engine",
    ),
    PlanOption(
        *("pins", "--tensor-type", _RULES, TYPES),
        help="Give the tensors whose names match this type; may be repeated, the first match decides.",
        doc=_RULES_DOC,
    ),
    PlanOption("pins", "--tensor-type-file", _FILE, TYPES, help="A file of REGEX=TYPE lines."),
    PlanOption(
        *("floors", "--min-type", _RULES, TYPES),
        help="Nothing smaller for the tensors that match; may be repeated.",
        doc=_RULES_DOC,
    ),
    PlanOption(
        *("groups", "--group", _PATTERNS, TYPES),
        help="The tensors that match share a type; may be repeated.",
        doc="expressions; what matches one shares a type",
    ),
    PlanOption("output_type", "--output-tensor-type", _TYPE, TYPES, help="The type of output.weight.", doc=_TYPES_DOC),
    PlanOption(
        "embedding_type", "--token-embedding-type", _TYPE, TYPES, help="The type of token_embd.weight.", doc=_TYPES_DOC
    ),
)

"""Engine settings: the start options of llama.cpp that decide how much memory it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from requant.container.infos import round_up
from requant.errors import UsageError, brief, suggest
from requant.formats import format_of

if TYPE_CHECKING:
    from requant.model.hyperparameters import Hyperparameters

CELL_PADDING = 256  # cells; llama_context and the window cache round up to it
DEFAULT_CONTEXT = 4096
DEFAULT_UBATCH = 512
N_BATCH = 2048  # llama.cpp's default, which bounds n_ubatch
OWN_CONTEXT = 0  # --ctx 0, as in llama.cpp: the context that the model was made for
CACHE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The settings that the engine is started with; the names are llama.cpp's.

    `n_ctx`: tokens over all `n_parallel` sequences; `n_ubatch`: tokens computed at once; cache types are names of
    `CACHE_TYPES`; `unified`: one cache for all sequences; `n_outputs`: rows of logits computed at once, None for
    n_ubatch as llama-cli and llama-perplexity reserve (llama-server needs one per sequence). `assume`: take an upper
    bound for an architecture that is not known instead of raising an error.
    """

    n_ctx: int
    n_parallel: int = 1
    n_ubatch: int = DEFAULT_UBATCH
    cache_type_k: str = "F16"
    cache_type_v: str = "F16"
    unified: bool = False
    flash_attn: bool = True
    swa_full: bool = False
    n_outputs: int | None = None
    assume: bool = False

    def __post_init__(self) -> None:
        for name in ("n_ctx", "n_parallel", "n_ubatch"):
            if not 1 <= getattr(self, name) < 2**31:
                raise UsageError(f"{name} must be from 1 to 2147483647 (got {getattr(self, name)})")
        if self.n_outputs is not None and self.n_outputs < 1:
            raise UsageError(f"n_outputs must be at least 1 (got {self.n_outputs})")
        for name in (self.cache_type_k, self.cache_type_v):
            if name.upper() not in CACHE_TYPES:
                raise UsageError(f"'{brief(name)}' is no cache type; {suggest(name, map(str.lower, CACHE_TYPES))}")
        if not self.flash_attn and format_of(self.cache_type_v).block_weights > 1:
            raise UsageError("a quantized V cache needs flash attention")

    @property
    def tokens(self) -> int:
        """Tokens in the largest batch that the graph is built for."""
        return min(self.n_ctx, N_BATCH, self.n_ubatch)

    @property
    def cells(self) -> int:
        """Cells of one stream's cache."""
        total = round_up(self.n_ctx, CELL_PADDING)
        return total if self.unified else round_up(total // self.n_parallel, CELL_PADDING)

    @property
    def streams(self) -> int:
        """Caches that are kept side by side."""
        return 1 if self.unified else self.n_parallel


def engine_settings(hp: Hyperparameters, given: Mapping[str, Any]) -> EngineSettings:
    """Return settings with the fields in `given` that are not None, and the engine's defaults for the rest.

    The default context is the model's own, but at most 4096 tokens.
    """
    asked: dict[str, Any] = {
        name: value.upper() if isinstance(value, str) else value for name, value in given.items() if value is not None
    }
    if asked.get("n_ctx") == OWN_CONTEXT:
        asked["n_ctx"] = hp.context_length
    return EngineSettings(**{"n_ctx": min(hp.context_length, DEFAULT_CONTEXT)} | asked)

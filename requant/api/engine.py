"""The choice of what runs a model, requant or llama.cpp, and the text as tokens for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from requant.common.interrupt import run_interruptible
from requant.container.source import Source, require_model
from requant.errors import BadInput, UsageError
from requant.model.forward.architecture import NotRun, read_architecture
from requant.model.forward.families import FAMILIES
from requant.model.kinds import check_predicts_tokens
from requant.model.llama_cpp import ENGINE, check_installed
from requant.scoring.calibration_data import Encoded, TokenWindows, encode, read_windows
from requant.scoring.engine_run import encode_in_engine

if TYPE_CHECKING:
    from requant.common.monitor import Monitor
    from requant.scoring.options import CalibrationOptions

_RUNS_ITSELF = "requant runs this model itself, without the engine"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The choice of llama.cpp for the files at `paths`, asked for or not.

    reason: why requant does not run one of the models, None where it runs them.
    """

    paths: frozenset[str]
    reason: BadInput | None
    wanted: bool

    @contextmanager
    def explained(self, monitor: Monitor) -> Iterator[None]:
        """Warn behind a run in the engine why it was not requant's; add to an error whether requant runs the model."""
        try:
            yield
        except BadInput as error:
            if error.hint is not None or error.path not in self.paths:
                raise
            hint = _RUNS_ITSELF if self.reason is None else f"nor does requant run it: {self.reason.what}"
            raise error.with_hint(hint) from error
        if self.reason is not None and not self.wanted:
            monitor.warn(f"{self.reason}; {ENGINE} ran it")


def choose_engine(sources: Sequence[Source], *, wanted: bool) -> EngineChoice | None:
    """Return the choice of llama.cpp where it is wanted, or where requant knows no such architecture; else None.

    Raises UsageError where it is wanted and not installed, BadInput where a model cannot be run without it.
    """
    architectures = {require_model(source) for source in sources}
    for source in sources:
        check_predicts_tokens(source.metadata, {t.name for t in source.tensors})
    reason = _find_obstacle(sources)
    if not wanted and not isinstance(reason, NotRun):
        if reason is not None:
            raise reason
        return None
    try:
        check_installed()
    except UsageError as missing:
        if reason is None:
            raise UsageError(f"{missing}; {_RUNS_ITSELF}") from missing
        if wanted:
            raise
        raise reason.with_hint(f"llama.cpp may run it, but {missing}") from missing
    if reason is not None and not wanted and architectures <= FAMILIES.keys():
        raise reason.with_hint("llama.cpp may run it: --engine")  # an odd file is given to the engine on request only
    return EngineChoice(frozenset(str(source.path) for source in sources), reason, wanted)


def _find_obstacle(sources: Sequence[Source]) -> BadInput | None:
    """Return why requant does not run the first model that it does not run, or None."""
    for source in sources:
        try:
            read_architecture(source)
        except BadInput as reason:
            return reason
    return None


def read_windows_for_engine(source: Source, calibration: CalibrationOptions, monitor: Monitor) -> TokenWindows:
    """Return windows of the text or of ids; ids by the engine's tokenizer where requant has none for the model."""

    def encode_in_either(source: Source, text: str) -> Encoded:
        try:
            return run_interruptible(encode, source, text)
        except (BadInput, UsageError):
            if source.metadata.get("tokenizer.ggml.model") in (None, "no_vocab"):
                raise
        return encode_in_engine(source, text)

    with monitor.working("reading text"):
        text = read_windows(calibration, source, encode=encode_in_either)
    monitor.warn(*text.notes)
    return text

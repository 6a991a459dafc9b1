"""What was said of the tokens that a model is run on, and those tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from requant.errors import UsageError

if TYPE_CHECKING:
    from requant.container.source import Source
    from requant.text import Text


@dataclass(frozen=True, slots=True)
class Calibration:
    """The options --text, --tokens, --windows, --window, --quick and --statistics."""

    text: Path | None = None
    tokens: Path | None = None
    n_windows: int | None = 8
    window: int = 512
    quick: bool = False
    statistics: Path | None = None

    def windows(self, source: Source, *, held_out: bool = False) -> Text:
        """The windows to run `source` on: of what was given, or else of the text that ships with requant.

        held_out: other windows of the same.
        """
        from requant import text

        size = text.Windows(self.window, self.n_windows, held_out)
        if self.tokens is not None:
            return text.read_token_windows(self.tokens, source, size)
        if self.text is not None:
            return text.read_text_windows(self.text, source, size)
        return text.default_windows(source, size)


def check_calibration(asked: Calibration) -> None:
    """Raise UsageError where what was said of the tokens contradicts itself."""
    if asked.text is not None and asked.tokens is not None:
        raise UsageError("--text and --tokens cannot be given together")
    if asked.quick and (asked.text or asked.tokens or asked.statistics):
        raise UsageError("--quick scores without data; leave --text, --tokens and --statistics out")

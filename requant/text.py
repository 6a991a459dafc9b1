"""Tokens to run a model on: windows of a text, of ids in a file, of the text that ships with requant, or drawn ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from requant.container.source import Source
from requant.errors import BadInput, InputOutputError, UsageError
from requant.model.tokenizer import read_tokenizer

Ids = NDArray[np.int32]
_Size = tuple[int, int | None]  # tokens of a window; windows, or None for all that the text has

SHIPPED = "calibration.txt"
_SEED = 1
_DRAWN = 8  # windows of drawn ids where no number was asked for


@dataclass(frozen=True, slots=True)
class Text:
    """Windows (n_windows, n_ctx) of token ids; name: what they came from; notes: lines for the user."""

    name: str
    sha256: str  # of the windows
    windows: Ids
    notes: tuple[str, ...] = ()


def read_text_windows(path: Path, source: Source, n_ctx: int, n_windows: int | None = None) -> Text:
    """Windows of the UTF-8 text at `path`, as many as it has or `n_windows` spread over it.

    Raises BadInput for a text that is no UTF-8, is too short, or is mostly unknown to the vocabulary.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(path, "is no UTF-8 text", got=f"byte {error.object[error.start]} at {error.start}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise (BadInput if isinstance(error, FileNotFoundError | IsADirectoryError | ValueError) else InputOutputError)(
            path, f"cannot be read: {reason}"
        ) from error
    return _of_text(path, text, Path(path).name, source, (n_ctx, n_windows))


def shipped_windows(source: Source, n_ctx: int, n_windows: int | None = None) -> Text:
    """Windows of the text that ships with requant: prose, code, mathematics, chat, many languages."""
    text = files("requant").joinpath("data", SHIPPED).read_text(encoding="utf-8")
    return _of_text(source.path, text, f"requant's {SHIPPED}", source, (n_ctx, n_windows))


def read_token_windows(path: Path, source: Source, n_ctx: int, n_windows: int | None = None) -> Text:
    """Windows of the ids in the file at `path`, whole numbers with white space or commas between them."""
    try:
        words = Path(path).read_text(encoding="ascii").replace(",", " ").split()
        ids = np.array([int(word) for word in words], np.int64)
    except (OSError, ValueError) as error:
        raise BadInput(path, "is no list of token ids", hint="give whole numbers with spaces between") from error
    n_vocab = source.tensor("token_embd.weight").n_rows
    if ids.size and not 0 <= ids.min() <= ids.max() < n_vocab:
        raise BadInput(path, "has an id that is no token of the model", got=int(ids.max()), limit=f"0 to {n_vocab - 1}")
    return _windows(path, ids.astype(np.int32), Path(path).name, (n_ctx, n_windows), None)


def drawn_windows(source: Source, n_ctx: int, n_windows: int) -> Text:
    """Windows of ids drawn evenly from the vocabulary, the same every time."""
    n_vocab = source.tensor("token_embd.weight").n_rows
    ids = np.random.default_rng(_SEED).integers(0, n_vocab, (n_windows, n_ctx), np.int32)
    return Text("random token ids", _digest(ids), ids)


def default_windows(source: Source, n_ctx: int, n_windows: int | None) -> Text:
    """The shipped text where the file's vocabulary can be read, random ids, with a note that says why, where not."""
    try:
        return shipped_windows(source, n_ctx, n_windows)
    except (BadInput, UsageError) as error:
        found = drawn_windows(source, n_ctx, n_windows or _DRAWN)
        return Text(found.name, found.sha256, found.windows, (f"calibrating on random token ids: {error}",))


def _of_text(path: Path, text: str, name: str, source: Source, size: _Size) -> Text:
    tokenizer = read_tokenizer(source.metadata)
    ids = tokenizer.encode(text)
    unknown = 0 if tokenizer.unknown is None else int((ids == tokenizer.unknown).sum())
    if 2 * unknown > len(ids):
        what = "is in a script that the model's vocabulary does not have"
        raise BadInput(path, what, got=f"{unknown} of {len(ids)} tokens unknown", hint="give another --text")
    return _windows(path, ids, name, size, tokenizer.bos)


def _windows(path: Path, ids: Ids, name: str, size: _Size, bos: int | None) -> Text:
    """Cut into windows; those that are taken begin with BOS where every text does."""
    n_ctx, n_windows = size
    n = len(ids) // n_ctx
    if n == 0:
        hint = "give a longer one, or a smaller --window"
        raise BadInput(
            path, "is too short", got=f"{len(ids)} tokens", limit=f"at least one window of {n_ctx}", hint=hint
        )
    wanted = n if n_windows is None else min(n, n_windows)
    taken = np.arange(wanted) * n // wanted
    windows = ids[: n * n_ctx].reshape(n, n_ctx)[taken]
    if bos is not None:
        windows[:, 0] = bos
    notes: tuple[str, ...] = ()
    if n_windows is not None and wanted < n_windows:
        notes = (f"{name} has {wanted} windows of {n_ctx} tokens; {n_windows} would be more certain",)
    return Text(name, _digest(windows), windows, notes)


def _digest(ids: Ids) -> str:
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()

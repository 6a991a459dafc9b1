"""Shell completion of the values of options; docs/install.md shows how to switch it on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from requant.formats import FORMATS
from requant.model.engine_settings import CACHE_TYPES
from requant.model.mixtures import mixture_names
from requant.planning.engines import DEFAULT, ENGINES

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]

_PLAIN = re.compile(r"[\w./+@-]+")  # names that need no quotes in any shell
_MOST = 10000  # entries of a folder


def _words(known: Iterable[str], *, listed: bool = False) -> Completer:
    """Return a completion of the words `known`; listed: of the last one in a comma-separated list."""

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        before, comma, last = incomplete.rpartition(",") if listed else ("", "", incomplete)
        return [CompletionItem(before + comma + word) for word in known if word.upper().startswith(last.upper())]

    return complete


types = _words([f.name for f in FORMATS.values() if f.can_encode], listed=True)
cache_types = _words(["auto", *(name.lower() for name in CACHE_TYPES)])  # as llama.cpp takes them
presets = _words(mixture_names())
engines = _words([DEFAULT, *ENGINES])


def files(*endings: str) -> Completer:
    """Return a completion of files with these suffixes; folders and names that need quotes are left to the shell."""

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        found = _matching(incomplete, endings)
        if found and all(_PLAIN.fullmatch(name) for name in found):
            return [CompletionItem(name) for name in found]
        return [CompletionItem(incomplete, type="file")]

    return complete


def _matching(incomplete: str, endings: tuple[str, ...]) -> list[str]:
    """Return the matching paths as the shell writes them; none where a folder matches."""
    folder, slash, start = incomplete.rpartition("/")
    found = []
    try:
        with os.scandir(Path(folder + slash).expanduser() if slash else ".") as entries:
            for _, entry in zip(range(_MOST), entries, strict=False):
                if not entry.name.startswith(start) or (entry.name.startswith(".") and not start):
                    continue
                if entry.is_dir():
                    return []
                if entry.name.endswith(endings):
                    found.append(folder + slash + entry.name)
    except (OSError, ValueError):
        return []
    return sorted(found)

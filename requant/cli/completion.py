"""Shell completion of the values of options; docs/install.md shows how to switch it on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]

_PLAIN = re.compile(r"[\w./+@-]+")  # names that need no quotes in any shell
_MOST = 10000  # entries of a folder


def types(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Complete ggml types that can be written; in a comma-separated list, the last one."""
    from requant.formats import FORMATS

    before, comma, last = incomplete.rpartition(",")
    return _items([f.name for f in FORMATS.values() if f.can_encode], last, before + comma)


def cache_types(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Complete types of a KV cache, in lower case as llama.cpp takes them."""
    from requant.model.engine_settings import CACHE_TYPES

    return _items(["auto", *(name.lower() for name in CACHE_TYPES)], incomplete)


def presets(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Complete mixtures of llama-quantize."""
    from requant.model.mixtures import mixture_names

    return _items(mixture_names(), incomplete)


def engines(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Complete engines that have a profile."""
    from requant.planning.engines import ENGINES

    return _items(ENGINES, incomplete)


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


def _items(words: Iterable[str], incomplete: str, before: str = "") -> list[CompletionItem[str]]:
    from click.shell_completion import CompletionItem

    start = incomplete.upper()
    return [CompletionItem(before + word) for word in words if word.upper().startswith(start)]

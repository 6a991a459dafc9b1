"""The versions of requant and its packages, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from requant.common.units import format_size
from requant.formats.kernel_cache import Contents
from requant.formats.versions import Versions
from requant.report.text.grid import grid

VERSION_SCHEMA = "requant.version/1"


def versions_text(versions: Versions) -> str:
    """Return `requant` and its version on the first line, the rest under it."""
    packages = [f"{name} {version}" for name, version in versions.packages.items()]
    lines = [", ".join(packages[i : i + 4]) for i in range(0, len(packages), 4)]
    rows = [
        ["encoders", f"version {versions.kernels}"],
        ["formats", f"{versions.n_types} types of ggml {versions.ggml}, table {versions.formats}"],
        ["runs on", f"{versions.python}, {versions.platform}, {versions.threads} threads"],
        *(["packages" if i == 0 else "", line] for i, line in enumerate(lines)),
        *_cache_rows(versions.cache),
    ]
    return "\n".join([f"requant {versions.requant}", *(f"  {line}" for line in grid(rows))])


def _cache_rows(cache: Contents | None) -> list[list[str]]:
    if cache is None:
        return []
    compiled = f"{cache.folder}: {cache.n_kernels} compiled, {format_size(cache.n_bytes)}"
    rows = [["kernels", compiled if cache.n_kernels else "none compiled yet; the first run does that, once"]]
    if cache.others:
        size = format_size(cache.other_bytes)
        rows.append(["", f"{cache.others} folders of other versions beside it, {size}: requant --clear-cache"])
    return rows


def versions_json(versions: Versions) -> str:
    """Return one object."""
    return json.dumps({"schema": VERSION_SCHEMA} | asdict(versions), indent=2, default=str)

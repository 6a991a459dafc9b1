"""ggml's file types (llama_ftype), as the gguf package names them; it is imported on first use, with NumPy."""

from __future__ import annotations

from functools import cache


@cache
def llama_ftype(type_name: str) -> int | None:
    """Return the llama_ftype of a file whose weights have the ggml type `type_name`; None where gguf has none."""
    from gguf import LlamaFileType

    members = LlamaFileType.__members__
    found = members.get(f"MOSTLY_{type_name}") or members.get(f"ALL_{type_name}")
    return None if found is None else int(found)

"""Signatures of files that are no readable GGUF: errors that name what such a file most likely is."""

from __future__ import annotations

from requant.errors import BadInput

_SIGNATURES = (
    (b"\x1f\x8b", "this is a gzip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "this is a zstd archive; unpack it first"),
    (b"PK\x03\x04", "this is a zip archive or a PyTorch checkpoint; convert it to GGUF first"),
    (b"version https://git-lfs", "this is a git-lfs pointer, not the file; run git lfs pull"),
    (b"lmgg", "this is a GGML file from before GGUF; convert it first"),
    (b"fmgg", "this is a GGML file from before GGUF; convert it first"),
    (b"tjgg", "this is a GGML file from before GGUF; convert it first"),
    (b"<!DOCTYPE", "this is a web page, not the file; download it again"),
    (b"<html", "this is a web page, not the file; download it again"),
)


def not_gguf_error(path: object, first: bytes, file_size: int) -> BadInput:
    """The error for a file of `file_size` bytes that starts with `first` (up to 64 bytes of it)."""
    if file_size == 0:
        return BadInput(path, "is empty", got="0 bytes", expected="a GGUF file")
    magic = "".join(chr(b) if 32 <= b < 127 and b != 0x5C else f"\\x{b:02x}" for b in first[:4])
    if file_size < 24:
        what = f"is too short for a GGUF header, it starts with '{magic}'"
        return BadInput(path, what, got=f"{file_size} bytes", limit="24 bytes")
    return BadInput(path, "is not a GGUF file", got=f"'{magic}', {file_size} bytes", hint=_guess_kind(first))


def _guess_kind(first: bytes) -> str | None:
    for signature, hint in _SIGNATURES:
        if first.startswith(signature):
            return hint
    if not any(first[:24]):
        return "a header of zeros is what an interrupted llama-quantize or requant leaves; make the file again"
    if first[8:9] == b"{":
        return "this is a safetensors file; convert it to GGUF first"
    return None


def version_error(path: object, version: int) -> BadInput:
    """The error for a GGUF `version` other than 2 or 3."""
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version & 0xFFFF == 0 and swapped:
        what = f"is a big-endian GGUF of version {swapped}, which requant does not read"
        return BadInput(path, what, got=f"{version:#010x}", hint="convert it with gguf_convert_endian.py")
    hint = "GGUF version 1 is no longer read anywhere; convert the model again" if version == 1 else None
    return BadInput(path, "has an unsupported GGUF version", got=version, limit="2 or 3", hint=hint)

"""Cursor: a bounds-checked walk over the header of a file, read in growing blocks as they are needed."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

from requant.common.files import read_into
from requant.errors import BadInput

MAX_HEADER = 512 * 2**20  # bytes; the largest seen, 500k tokens with their merges, has 24 MiB
_FIRST_BLOCK = 2**18
_U32, _I32, _U64 = struct.Struct("<I"), struct.Struct("<i"), struct.Struct("<Q")


@dataclass(slots=True)
class Cursor:
    """A position in an open file, in bytes from its start; `buffer` holds all bytes read so far."""

    path: str
    descriptor: int
    file_size: int
    position: int = 0
    buffer: bytearray = field(default_factory=bytearray)

    @property
    def remaining(self) -> int:
        """Bytes of the file after the position."""
        return self.file_size - self.position

    def require(self, n_bytes: int, what: str) -> None:
        """Read the next `n_bytes` into the buffer. Raises BadInput, before reading, where the file has fewer."""
        if n_bytes > self.remaining:
            raise self.past_end(what, self.position, n_bytes)
        end = self.position + n_bytes
        if end > MAX_HEADER:
            raise BadInput(self.path, f"{what}: the header is too large", got=f"{end} bytes", limit=MAX_HEADER)
        if end > len(self.buffer):
            self._read_up_to(min(self.file_size, MAX_HEADER, max(end, 2 * len(self.buffer), _FIRST_BLOCK)))

    def past_end(self, what: str, position: int, n_bytes: int) -> BadInput:
        """The error for a `what` of `n_bytes` at `position` that runs past the end of the file."""
        return BadInput(
            self.path,
            f"{what} at offset {position} runs past the end of the file",
            got=f"{n_bytes} bytes",
            limit=f"{max(0, self.file_size - position)} left",
        )

    def _read_up_to(self, end: int) -> None:
        have = len(self.buffer)
        self.buffer.extend(bytes(end - have))
        with memoryview(self.buffer) as view:
            read_into(self.path, self.descriptor, view[have:], have)

    def skip(self, n_bytes: int, what: str) -> None:
        """Move forward by `n_bytes`."""
        self.require(n_bytes, what)
        self.position += n_bytes

    def since(self, start: int) -> bytes:
        """A copy of the bytes from `start` to the position."""
        with memoryview(self.buffer) as view:
            return bytes(view[start : self.position])

    def sha256(self) -> str:
        """The digest of everything before the position, in hex."""
        with memoryview(self.buffer) as view:
            return hashlib.sha256(view[: self.position]).hexdigest()

    def _number(self, form: struct.Struct, what: str) -> int:
        self.skip(form.size, what)
        return int(form.unpack_from(self.buffer, self.position - form.size)[0])

    def u32(self, what: str) -> int:
        """Read the next four bytes, unsigned."""
        return self._number(_U32, what)

    def i32(self, what: str) -> int:
        """Read the next four bytes, signed."""
        return self._number(_I32, what)

    def u64(self, what: str) -> int:
        """Read the next eight bytes, unsigned."""
        return self._number(_U64, what)

    def string(self, what: str, limit: int) -> bytes:
        """Read the next length and that many bytes. Raises BadInput for more than `limit` bytes."""
        at = self.position
        length = self.u64(f"{what} length")
        if length > self.remaining:
            raise self.past_end(what, self.position, length)
        if length > limit:
            raise BadInput(self.path, f"{what} at offset {at} is too long", got=f"{length} bytes", limit=limit)
        start = self.position
        self.skip(length, what)
        return self.since(start)

    def skip_strings(self, count: int, what: str) -> None:
        """Skip `count` strings; they are most of a header (262,144 tokens), hence the plain inner loop."""
        if count > self.remaining // 8:
            raise self.past_end(f"{what} of {count} strings", self.position, 8 * count)
        unpack, done, length = _U64.unpack_from, 0, 0
        while done < count:
            self.require(8, f"{what}, item {done}, length")
            buffer, position, last = self.buffer, self.position, len(self.buffer) - 8
            while position <= last and done < count:
                (length,) = unpack(buffer, position)
                position += 8 + length
                done += 1
            if position > self.file_size:
                raise self.past_end(f"{what}, item {done - 1},", position - length, length)
            self.position = position
        self.require(0, what)  # the last string may end beyond the buffer

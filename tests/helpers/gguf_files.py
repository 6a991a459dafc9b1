"""A small GGUF writer for tests: it writes exactly what it is told, however wrong, and right defaults otherwise."""

import struct
from dataclasses import dataclass, replace
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
CHARS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
BLOCKS = {
    27: (1, 8),
    0: (1, 4),
    1: (1, 2),
    2: (32, 18),
    8: (32, 34),
    12: (256, 144),
    14: (256, 210),
    24: (1, 1),
    30: (1, 2),
    39: (32, 17),
}
ARCHITECTURE = "general.architecture"


def string(text, length=None):
    """A GGUF string; `length` overrides the true one."""
    encoded = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(encoded) if length is None else length & 2**64 - 1) + encoded


def value(type_id, content):
    """A value's bytes, type id included; an array is (item type, items)."""
    return struct.pack("<I", type_id) + _body(type_id, content)


def _body(type_id, content):
    if type_id == STR:
        return string(content)
    if type_id == ARR:
        item_type, items = content
        return struct.pack("<IQ", item_type, len(items)) + b"".join(_body(item_type, item) for item in items)
    return struct.pack("<" + CHARS[type_id], content)


def pair(key, type_id, content):
    """A key and its value as they stand in a header."""
    return string(key) + value(type_id, content)


def array(item_type, count, body=b""):
    """An array's bytes, type id included, with any count."""
    return struct.pack("<IIQ", ARR, item_type & 2**32 - 1, count & 2**64 - 1) + body


@dataclass(frozen=True)
class Tensor:
    """A tensor to write; None means the right value. `data` None means bytes counting up."""

    name: object = "blk.0.ffn_up.weight"
    shape: tuple = (32, 2)
    type_id: int = 0
    offset: int | None = None
    n_dims: int | None = None
    data: bytes | None = None
    name_length: int | None = None

    @property
    def n_bytes(self):
        n = 1
        for length in self.shape:
            n *= length
        weights, size = BLOCKS.get(self.type_id, (1, 4))
        return n // weights * size

    def info(self, offset):
        dims = struct.pack("<I", len(self.shape) if self.n_dims is None else self.n_dims)
        dims += b"".join(struct.pack("<Q", length & 2**64 - 1) for length in self.shape)
        at = offset if self.offset is None else self.offset
        return string(self.name, self.name_length) + dims + struct.pack("<iQ", self.type_id, at & 2**64 - 1)


@dataclass(frozen=True)
class File:
    """A GGUF file to write. `pairs` and `infos` are raw bytes, one entry each; counts default to their number."""

    pairs: tuple = (pair(ARCHITECTURE, STR, "llama"),)
    tensors: tuple = (Tensor(),)
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_pairs: int | None = None
    alignment: int = 32
    last_padding: bool = True
    trailing: bytes = b""
    infos: tuple | None = None

    def with_pairs(self, *pairs):
        return replace(self, pairs=self.pairs + pairs)

    def header(self):
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_pairs = len(self.pairs) if self.n_pairs is None else self.n_pairs
        fixed = self.magic + struct.pack("<IQQ", self.version, n_tensors & 2**64 - 1, n_pairs & 2**64 - 1)
        infos, offset = [], 0
        for tensor in self.tensors:
            infos.append(tensor.info(offset))
            offset += _padded(tensor.n_bytes, self.alignment)
        body = b"".join([fixed, *self.pairs, *(infos if self.infos is None else self.infos)])
        return body.ljust(_padded(len(body), self.alignment), b"\0")

    def encode(self):
        parts = []
        for tensor in self.tensors:
            data = tensor.data
            if data is None:
                data = bytes(i % 251 for i in range(min(tensor.n_bytes, 2**20)))
            parts.append(data.ljust(_padded(len(data), self.alignment), b"\0"))
            last = data
        if parts and not self.last_padding:
            parts[-1] = last
        return self.header() + b"".join(parts) + self.trailing

    def write(self, path):
        Path(path).write_bytes(self.encode())
        return Path(path)


def _padded(n, alignment):
    return n + -n % max(alignment, 1)


def split_pairs(no, count, n_tensors):
    """The three keys of a shard."""
    return (
        pair("split.no", U16, no),
        pair("split.count", U16, count),
        pair("split.tensors.count", I32, n_tensors),
    )


def split_files(count=3, per_shard=2, stem="model"):
    """A sound split model as {file name: File}: all keys in the first shard, only split.* in the others."""
    files = {}
    for i in range(count):
        names = [f"blk.{i}.w{j}.weight" for j in range(per_shard)]
        pairs = (File().pairs if i == 0 else ()) + split_pairs(i, count, count * per_shard)
        files[f"{stem}-{i + 1:05d}-of-{count:05d}.gguf"] = File(pairs, tuple(Tensor(name) for name in names))
    return files


def write_files(folder, files):
    """Write {name: File} into `folder`; the paths in the same order."""
    return [file.write(Path(folder) / name) for name, file in files.items()]

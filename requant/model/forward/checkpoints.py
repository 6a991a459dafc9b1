"""Activation checkpoints: each layer's input in a temporary file, so that memory does not grow with the layers."""

from __future__ import annotations

import tempfile

import numpy as np

from requant.errors import InputOutputError
from requant.model.forward.tape import Array


class Checkpoints:
    """Arrays of one shape and dtype by index, in an unnamed file in TMPDIR that is deleted when it is closed."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def put(self, index: int, x: Array) -> None:
        """Store `x` as item `index`. Raises InputOutputError where the disk is full."""
        try:
            self._file.seek(index * x.nbytes)
            self._file.write(np.ascontiguousarray(x).view(np.uint8).data)
            self._file.flush()
        except OSError as error:
            what = f"{x.nbytes} bytes of layer inputs cannot be kept: {error.strerror}"
            raise InputOutputError(tempfile.gettempdir(), what, hint="set TMPDIR to a folder with space") from error

    def take(self, index: int, out: Array) -> None:
        """Read item `index` into `out`."""
        self._file.seek(index * out.nbytes)
        n_read = self._file.readinto(out.view(np.uint8).data)
        assert n_read == out.nbytes, (index, n_read)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

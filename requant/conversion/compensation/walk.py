"""Walk through a model layer by layer, the original beside the quantized one, to encode each matrix with compensation.

Each stage of a layer is encoded for the inputs that it gets from those before it as they are in the output. What an
earlier run wrote is read back, so that a run that resumes walks the same way and writes the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from requant.common.threads import for_each, n_threads
from requant.container.source import Source
from requant.conversion.chunks import TensorJob
from requant.conversion.compensation.encoding import MatrixWork, TensorEncoder, encode_matrices
from requant.conversion.compensation.measuring import (
    Measured,
    OutputRun,
    StageRun,
    measure_dense,
    measure_several,
    measure_tied,
)
from requant.conversion.compensation.memory import split_columns
from requant.conversion.compensation.stages import Stream, find_stages
from requant.conversion.compensation.token_weights import TokenWeights
from requant.conversion.options import ConversionOptions
from requant.conversion.write import WrittenTensors
from requant.errors import NumericFault
from requant.formats import codec
from requant.formats.codec import Floats
from requant.formats.feedback import can_compensate
from requant.model.forward.layer import NULL_HOOK, Layer
from requant.model.forward.passes import EMBEDDING, RunnableModel, Tokens, embed, layers, side_inputs
from requant.model.forward.tape import Array
from requant.model.weight_scales import read_weight_scales


@dataclass(frozen=True, slots=True)
class CompensationText:
    """A model, windows of tokens (n_windows, n_ctx) of a text to compensate with, and the weights of these tokens.

    name: of the text. best: search on after the feedback. room: bytes for the moments of a stage, None for any.
    """

    name: str
    model: RunnableModel
    tokens: Tokens
    weights: TokenWeights
    best: bool = False
    room: int | None = None

    @property
    def sha256(self) -> str:
        """The digest of the tokens in hex."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Walk:
    """One walk: it yields jobs to write, some with their bytes, and goes on once they are written.

    jobs: of all tensors by name.
    """

    source: Source
    text: CompensationText
    jobs: Mapping[str, TensorJob]
    written: WrittenTensors
    options: ConversionOptions
    streams: list[Stream] = field(default_factory=list)  # of the original and of the quantized model

    def batches(self) -> Iterator[list[TensorJob]]:
        """Yield all jobs in batches, each of which must be written before the next one is asked for.

        Raises NumericFault, naming the layer, where activations are not finite once it is encoded.
        """
        model, tokens = self.text.model, self.text.tokens
        first = [job for name, job in self.jobs.items() if name == EMBEDDING]
        yield [self._encode_tied(job) if model.output_name == EMBEDDING else job for job in first]
        for x in (embed(model, tokens), embed(model, tokens, self._embedding_rows)):
            self.streams.append(Stream(x, side_inputs(model, tokens, x.copy())))
        done = {EMBEDDING}
        for layer in layers(model, tokens.shape[1], range(model.architecture.n_layers)):
            own = {n: job for n, job in self.jobs.items() if n.startswith(f"blk.{layer.index}.")}
            yield from self._walk_layer(layer, own)
            done.update(own)
        left = [job for name, job in self.jobs.items() if name not in done]
        yield [self._encode_output(job) if job.tensor.name == model.output_name else job for job in left]

    def _walk_layer(self, layer: Layer, own: Mapping[str, TensorJob]) -> Iterator[list[TensorJob]]:
        """Encode a layer stage by stage, then pass both streams through it."""
        prefix, (original, quantized) = f"blk.{layer.index}.", self.streams
        embedding = None if original.side is None else original.side.layer_embedding(layer.index)
        stages = find_stages(layer, original, embedding)
        staged = {name for stage in stages for name in stage.names if self._is_open(own.get(prefix + name))}
        plain = [job for name, job in own.items() if name.removeprefix(prefix) not in staged]
        weights = dict(layer.weights)
        encoded = replace(layer, weights=weights)
        yield plain
        self._read_back(plain, weights)
        for stage in stages:
            jobs = [own[prefix + name] for name in stage.names if name in staged]
            if not all(self.written.has(job) for job in jobs):
                jobs = self._encode_stage(StageRun(stage, (layer, encoded), self.streams, embedding), jobs)
            yield jobs
            self._read_back(jobs, weights)
        for stream, each in ((original, layer), (quantized, encoded)):

            def run(window: int, stream: Stream = stream, each: Layer = each) -> None:
                stream.x[window] = stream.run(each, window, NULL_HOOK, embedding)

            for_each(run, len(stream.x), self.options.threads)
            if not np.isfinite(stream.x).all():
                what = f"activations behind layer {layer.index} are not finite once it is encoded"
                raise NumericFault(self.source.path, what, hint="--no-compensate converts it")

    def _is_open(self, job: TensorJob | None) -> bool:
        """Return whether the job's tensor is one to encode with compensation."""
        return job is not None and not job.choice.copied and can_compensate(job.format)

    def _read_back(self, jobs: Sequence[TensorJob], weights: dict[str, Array]) -> None:
        """Replace the layer's weights that were encoded by those in the output."""
        for job in jobs:
            name = job.tensor.name.split(".", 2)[2]
            if name in weights and not job.choice.copied:
                weights[name] = self._read_weights(job)

    def _encode_stage(self, run: StageRun, jobs: Sequence[TensorJob]) -> list[TensorJob]:
        layer, threads = run.layers[0], self.options.threads
        prefix = f"blk.{layer.index}."
        a, _ = self.text.weights.of_stage([prefix + name for name in run.stage.names])
        n, room = jobs[0].tensor.n_per_row, self.text.room
        if run.stage.several:
            n_matrices = len(layer.weights[run.stage.names[0]])
            return self._encode(jobs, n_matrices, measure_several(run, a, n_matrices, split_columns(n, room), threads))
        rows = {job.tensor.name: layer.weights[job.tensor.name.removeprefix(prefix)] for job in jobs}
        readers = {name: (len(weights), weights.__getitem__) for name, weights in rows.items()}
        writers = frozenset(name for name in rows if name.removeprefix(prefix) in run.stage.writers)
        columns = split_columns(n, room, sum(len(rows[name]) for name in writers))
        work = measure_dense(run, Measured(readers, writers, a, columns), threads)
        return [done for job in jobs for done in self._encode([job], 1, [work[job.tensor.name]])]

    def _encode_output(self, job: TensorJob) -> TensorJob:
        """Encode a matrix of its own that gives the logits."""
        if not self._is_open(job) or self.written.has(job):
            return job
        name, model = job.tensor.name, self.text.model
        a, _ = self.text.weights.of_stage([name])
        readers = {name: (job.tensor.n_rows, lambda rows: model.weights.rows(name, rows))}
        norm = model.weights.get(model.norm_name)
        assert norm is not None
        reader = OutputRun(model, norm, self.streams)
        columns = split_columns(job.tensor.n_per_row, self.text.room)
        work = measure_dense(reader, Measured(readers, frozenset(), a, columns), self.options.threads)
        return self._encode([job], 1, [work[name]])[0]

    def _encode_tied(self, job: TensorJob) -> TensorJob:
        """Encode the embedding that gives the logits too, for the inputs that it has in the original model."""
        weights = self.text.weights
        if not self._is_open(job) or self.written.has(job) or weights.normed is None or weights.lookup is None:
            return job
        a, mean = weights.of_stage([EMBEDDING])
        columns = split_columns(job.tensor.n_per_row, self.text.room)
        work = measure_tied(weights.normed, a, weights.lookup / mean, columns, self.options.threads)
        return self._encode([job], 1, [work])[0]

    def _encode(self, jobs: Sequence[TensorJob], n_matrices: int, work: Iterable[MatrixWork]) -> list[TensorJob]:
        """Encode tensors of `n_matrices` matrices, the same ones of all by the same work."""
        options, best, threads = self.options, self.text.best, n_threads(self.options.threads)
        encoders = [
            TensorEncoder(self.source, job, self._units(job, n_matrices), best, threads, options.cluster)
            for job in jobs
        ]
        done = encode_matrices(encoders, work)
        return [replace(job, encoded=encoded) for job, encoded in zip(jobs, done, strict=True)]

    def _units(self, job: TensorJob, n: int) -> Floats:
        """Return, for each of the tensor's `n` matrices, the factor from the output's weights to the model's."""
        units = np.ones(n, np.float32)
        for scales in (job.scales, read_weight_scales(self.source, job.tensor)):
            if scales is not None:
                units *= scales
        return units

    def _read_weights(self, job: TensorJob) -> Array:
        """Return the weights of a tensor as the output has them, in the shape that the model gives them."""
        x = codec.dequantize(self.written.read(job), job.format)
        scales = read_weight_scales(self.source, job.tensor)
        n = max((len(s) for s in (job.scales, scales) if s is not None), default=1)
        x *= np.repeat(self._units(job, n), job.tensor.n_rows // n)[:, None]
        return x.reshape(job.tensor.shape[::-1])

    def _embedding_rows(self, ids: Array) -> Array:
        job = self.jobs[EMBEDDING]
        if job.choice.copied:
            return self.text.model.weights.rows(EMBEDDING, ids)
        return codec.dequantize(self.written.read_rows(job, ids), job.format)

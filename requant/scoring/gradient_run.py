"""A forward and backward run of a model over a text, which sums each matrix's squared inputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from requant.model.forward.architecture import Architecture
from requant.model.forward.checkpoints import Checkpoints
from requant.model.forward.layer import NULL_HOOK, Layer, NullHook
from requant.model.forward.passes import RunnableModel, Tokens, backward, forward, output_gradient
from requant.model.forward.side_inputs import SideInputs
from requant.model.forward.tape import Array
from requant.scoring.statistics import SquareSums, Statistics, Sums

# tensor name -> expert, or 0 -> inputs (n_tokens, n_per_row) and gradients (n_tokens, n_rows) of each window
Products = Mapping[str, Mapping[int, Sequence[tuple[Array, Array]]]]


def n_steps(architecture: Architecture, *, gradients: bool = True) -> int:
    """Return the steps that a run counts: layers, and with gradients the head and the layers on the way back."""
    return 2 * architecture.n_layers + 1 if gradients else architecture.n_layers


@dataclass(frozen=True, slots=True)
class GradientRun:
    """A model, the windows of tokens (n_windows, n_ctx) that it is run on, and the statistics to which sums are added.

    first: index of the first window in the text; side: of `side_inputs` for a model whose layers share arrays.
    `progress` is called with steps done. Sums are added in the order of the windows, so that they do not depend on the
    number of threads.
    """

    model: RunnableModel
    tokens: Tokens
    statistics: Statistics
    threads: int | None
    progress: Callable[[int], None]
    first: int = 0
    side: SideInputs | None = None

    def forward(self, checkpoints: Checkpoints | None = None) -> Array:
        """Return the stream behind the last layer, (n_windows, n_ctx, n_embd).

        Without `checkpoints`, squared inputs are summed here; with them, on the way back. Raises NumericFault for
        activations that are not finite.
        """
        summers = [_Summer(keep=False) for _ in self.tokens] if checkpoints is None else None

        def finish(layer: Layer) -> None:
            if summers is not None:
                self._collect(summers, layer)
            self.progress(1)

        return forward(
            *(self.model, self.tokens),
            side=self.side,
            hook=lambda window: NULL_HOOK if summers is None else summers[window],
            checkpoints=checkpoints,
            on_layer=finish,
            threads=self.threads,
        )

    def output_gradient(self, x: Array) -> tuple[Array, Array]:
        """Replace the stream `x` behind the last layer by its gradient, and sum the squares at the output matrix.

        Returns the matrix's inputs (n_windows, n_ctx, n_embd) and the logarithm of each token's sum of exp(logits)
        (n_windows, n_ctx).
        """
        summers = [_Summer(keep=False) for _ in self.tokens]
        seen = output_gradient(self.model, x, first=self.first, hook=summers.__getitem__, threads=self.threads)
        self._collect(summers)
        self.progress(1)
        return seen

    def backward(self, g: Array, checkpoints: Checkpoints, hook: Callable[[Products], None] | None = None) -> None:
        """Replace the gradient `g` behind the last layer by that at the embedding, and sum the squares of each layer.

        hook: called after each layer with the inputs and gradients of its matrices.
        """
        summers = [_Summer(keep=hook is not None) for _ in self.tokens]

        def finish(layer: Layer) -> None:
            products = self._collect(summers, layer)
            if hook is not None:
                hook(products)
            self.progress(1)

        backward(
            *(self.model, g, checkpoints),
            hook=summers.__getitem__,
            on_layer=finish,
            threads=self.threads,
            side=self.side,
        )

    def _collect(self, summers: Sequence[_Summer], layer: Layer | None = None) -> Products:
        """Add the sums of all windows to the statistics, return the products that were kept, and empty the summers."""
        prefix = "" if layer is None else f"blk.{layer.index}."
        products: dict[str, dict[int, list[tuple[Array, Array]]]] = {}
        for summer in summers:
            self.statistics.add(prefix, summer.sums)
            for (name, expert), pair in summer.kept.items():
                products.setdefault(prefix + name, {}).setdefault(expert or 0, []).append(pair)
            summer.sums.clear()
            summer.kept.clear()
        return products


@dataclass(frozen=True, slots=True)
class _Summer(NullHook):
    """A hook that sums the squares of one window, and with `keep` holds the inputs and gradients themselves."""

    keep: bool
    sums: dict[tuple[str, int | None], SquareSums] = field(default_factory=dict)
    kept: dict[tuple[str, int | None], tuple[Array, Array]] = field(default_factory=dict)

    def inputs(self, name: str, expert: int | None, x: Array) -> None:
        """Sum x^2."""
        self.sums.setdefault((name, expert), SquareSums()).add(SquareSums(len(x), _squares(x)))

    def gradients(self, name: str, expert: int | None, x: Array, g: Array) -> None:
        """Sum g^2."""
        self.sums[name, expert].add(SquareSums(gradients=_squares(g)))
        if self.keep:
            self.kept[name, expert] = x, g


def _squares(x: Array) -> Sums:
    total: Sums = np.einsum("ij,ij->j", x, x).astype(np.float64)
    return total

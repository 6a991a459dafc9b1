"""The codebooks are those of the gguf package, and have the properties the kernels rely on."""

import numpy as np
import pytest
from gguf import quants

from requant.formats import grids
from requant.formats.encoders import neighbours


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_codebook_is_that_of_the_gguf_package(name):
    source = getattr(quants, name)
    source.init_grid()
    ours = getattr(grids, name)
    assert np.array_equal(ours, source.grid.reshape(source.grid_shape))
    assert len(np.unique(ours, axis=0)) == len(ours)


def test_even_signs_are_those_of_the_gguf_package():
    assert grids.EVEN_SIGNS.tobytes() == quants.IQ2_XXS.ksigns
    assert all(bin(signs).count("1") % 2 == 0 for signs in grids.EVEN_SIGNS.tolist())


def test_levels_are_those_of_the_gguf_package():
    assert tuple(grids.IQ4_LEVELS.tolist()) == quants.IQ4_NL.kvalues
    assert tuple(grids.FP4_LEVELS.tolist()) == quants.MXFP4.kvalues


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_stored_neighbours_are_the_nearest_words_of_their_cells(name):
    words, book = getattr(grids, name).astype(np.int64), neighbours.neighbours(name)
    levels, dim = np.unique(words), words.shape[1]
    assert len(book.near) == len(levels) ** dim
    for cell in np.random.default_rng(1).integers(0, len(book.near), 200):
        point = levels[[cell // len(levels) ** (dim - 1 - i) % len(levels) for i in range(dim)]]
        distance = ((words - point) ** 2).sum(1)
        want = np.lexsort((np.arange(len(words)), distance))[: neighbours.NEAREST]
        assert np.array_equal(book.near[cell], want), cell


@pytest.mark.parametrize("name", ["IQ3_XXS", "IQ3_S"])
def test_values_of_neighbours_are_those_of_their_words(name):
    book = neighbours.neighbours(name)
    assert np.array_equal(book.values.transpose(0, 2, 1), getattr(grids, name)[book.near])


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S"])
def test_codes_of_neighbours_are_the_levels_of_their_words(name):
    words, book = getattr(grids, name), neighbours.neighbours(name)
    codes = book.codes[..., None] >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)
    assert np.array_equal(np.unique(words)[codes], words[book.near])

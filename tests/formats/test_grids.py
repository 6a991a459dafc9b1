"""The codebooks are those of the gguf package, and have the properties the kernels rely on."""

import numpy as np
import pytest
from gguf import quants

from requant.formats import grids


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

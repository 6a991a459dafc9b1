"""Losses of the fixture, measured once, with the kernels compiled before."""

import pytest
from commands import IMATRIX, TINY

from requant.cli import progress
from requant.container.imatrix import read_imatrix
from requant.container.source import open_source
from requant.formats import FORMATS
from requant.formats.codec import warm_up
from requant.scoring.layerwise import score
from requant.scoring.options import ScoringOptions


@pytest.fixture(scope="session", autouse=True)
def _kernels():
    """Compiled before anything is timed or its stderr counted."""
    warm_up(fmt for fmt in FORMATS.values() if fmt.can_encode)


@pytest.fixture(scope="session", autouse=True)
def _rarely():
    """No line of progress where none is asked for, however slow the machine is."""
    progress.EVERY["auto"] = 3600.0


@pytest.fixture(scope="session")
def losses(tmp_path_factory):
    """A losses file of the tiny model."""
    path = tmp_path_factory.mktemp("losses") / "losses.json"
    with open_source(TINY) as source:
        path.write_text(score(source, ScoringOptions(imatrix=read_imatrix(IMATRIX))).to_json())
    return path

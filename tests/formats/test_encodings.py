"""The encoders' version: it names their bytes."""

import json

import encodings_of
import real_models

from requant.formats import FORMATS, KERNELS, by_name, table_digest

KEPT = json.loads((real_models.FIXTURES / "encodings.json").read_text(encoding="ascii"))
RAISE = "raise KERNELS in requant/formats/__init__.py, then python scripts/make/make_encodings.py"


def test_encoders_of_one_version_always_make_the_same_bytes():
    found = encodings_of.digests()
    changed = [name for name, digest in KEPT["digests"].items() if found.get(name) != digest]
    assert not changed, f"encoders changed: {', '.join(changed)}; {RAISE}"
    assert KEPT["kernels"] == KERNELS, f"fixtures/encodings.json is of version {KEPT['kernels']}; {RAISE}"
    assert KEPT["digests"].keys() == found.keys(), RAISE


def test_the_weights_tell_efforts_and_importance_apart():
    assert len(set(KEPT["digests"].values())) == len(KEPT["digests"])
    x, importance = encodings_of.weights()
    assert len({encodings_of.encoded(by_name("Q4_K"), x, own, 1).tobytes() for own in (None, importance)}) == 2
    assert len({encodings_of.encoded(by_name("Q4_K"), x, importance, e).tobytes() for e in range(3)}) == 3


def test_the_table_digest_changes_with_the_table(monkeypatch):
    before = table_digest()
    monkeypatch.delitem(FORMATS, by_name("Q2_0").type_id)
    assert len(before) == 12 and table_digest() != before

"""What `benchmarks/peers/compare.py` concludes from what it measured."""

import pathlib
import re
import sys

import numpy as np
import pytest

import keras_sparseopt as kso

PEERS = pathlib.Path(__file__).parents[1] / "benchmarks" / "peers"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(PEERS)])
    import compare

    return compare


def packed(mask):
    return np.packbits(mask).tobytes().hex()


def test_our_masks_are_those_of_the_rule_and_wrong_ones_are_seen(compare):
    size = (64, 32)
    weights, mask, gradient, number = compare.measuring.numbers(0, size)
    new = kso.drop_and_grow(weights, mask, np.abs(gradient), number)
    found = compare.compared("RigL", 0, size, packed(new))
    assert found["positions_that_differ"] == found["kept_that_should_be"] == 0
    assert found["active_before"] == found["active_after"] == 205
    wrong = new.copy()
    strongest = np.unravel_index(np.argmax(np.abs(weights)), size)
    wrong[strongest] = False
    found = compare.compared("RigL", 0, size, packed(wrong))
    assert (found["positions_that_differ"], found["kept_that_should_be"]) == (1, -1)
    assert found["active_after"] == 204
    assert compare.compared("SET", 0, size, packed(mask))["regrown_of_dropped"] == number


def test_medians_and_reasons(compare):
    runs = [{"ratio": 1.0, "what": "a"}, {"ratio": 3.0, "what": "a"}, {"ratio": 1.5, "what": "a"}]
    assert compare.median_of(runs) == {"ratio": 1.5, "what": "a"}
    reason = {"cannot_run": "why"}
    assert compare.median_of([runs[0], reason]) == reason


def test_a_row_that_a_peer_has_not_says_why(compare):
    class Nothing(compare.measuring.Peer):
        reasons = {"counts": "it counts nothing"}

    with pytest.raises(compare.measuring.CannotRun, match="it counts nothing"):
        Nothing().counts()


def test_all_of_resnet50(compare):
    shapes = compare.measuring.resnet50_kernels()
    assert len(shapes) == 54 and sum(int(np.prod(shape)) for shape in shapes) == 25_502_912


def test_every_requirement_is_pinned():
    for path in (PEERS / "requirements").glob("*.txt"):
        for line in path.read_text().split():
            assert re.fullmatch(r"[\w-]+==[\d.]+", line), (path.name, line)

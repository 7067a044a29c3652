"""What is compared: times in turns, and outputs."""

import random
import statistics
import time

import numpy as np


def milliseconds(ways, seconds, least=5):
    """The median time of each of some functions without arguments, run in turns.

    Each is run once before. The order changes by chance: what ran before leaves its threads and
    caches behind.

    Args:
        ways: List of functions that return when they are done.
        seconds: Float, how long all of them are run together.
        least: Int, turns that are taken in any case.

    Returns:
        List of floats, milliseconds.
    """
    for way in ways:
        way()
    times: list[list[float]] = [[] for _ in ways]
    turn, rng, end = list(zip(ways, times)), random.Random(0), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < least:
        rng.shuffle(turn)
        for way, own in turn:
            start = time.perf_counter()
            way()
            own.append(time.perf_counter() - start)
    return [1000 * statistics.median(own) for own in times]


def relative_difference(value, expected):
    """The largest difference between two arrays, in parts of the largest expected value."""
    value, expected = value.astype("float64"), expected.astype("float64")
    difference = float(np.max(np.abs(value - expected), initial=0.0))
    return difference / max(float(np.max(np.abs(expected), initial=0.0)), 1e-30)

"""Keras' progress bar, for calls that take a while."""

from typing import Any, Literal

import keras

Verbose = Literal["auto", 0, 1]


def progress(number: int | None, verbose: Verbose, unit: str = "step") -> Any:
    """A bar that counts by `add(1)`; one that shows nothing with `verbose=0`.

    Args:
        number: Int, how many there are, or `None` if that is not known.
        verbose: `"auto"`, which is 1, 1 or 0.
        unit: String, what is counted.

    Returns:
        `keras.utils.Progbar`.
    """
    return keras.utils.Progbar(number, verbose=int(verbose != 0), unit_name=unit)


def check_verbose(verbose: Verbose) -> None:
    """Raise ValueError for what is not `Verbose`."""
    if isinstance(verbose, bool) or verbose not in ("auto", 0, 1):
        raise ValueError(f'`verbose` must be "auto", 0 or 1. Received: verbose={verbose!r}')

"""Text that comes with Python: the pages of its manual, as characters to predict."""

import pydoc_data.topics

import numpy as np


def load(train, test, context, every=False):
    """Windows of characters and the one after each; whole pages of the manual are for testing.

    Args:
        train, test: Int, number of windows.
        context: Int, characters of a window.
        every: Bool, whether to predict the one after every character of a window.

    Returns:
        ((windows, targets) of training, the same of testing): int32 arrays of codes from 0.
    """
    pages = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    code = {character: i for i, character in enumerate(sorted(set("".join(pages))))}
    rng = np.random.default_rng(0)
    chosen, parts = rng.permutation(len(pages)), []
    for some, number in ((chosen[len(pages) // 10 :], train), (chosen[: len(pages) // 10], test)):
        windows = np.concatenate(
            [
                np.lib.stride_tricks.sliding_window_view(
                    np.array([code[c] for c in pages[i]], "int32"), context + 1
                )
                for i in some
                if len(pages[i]) > context
            ]
        )
        windows = windows[rng.permutation(len(windows))[:number]]
        parts.append((windows[:, :-1], windows[:, 1:] if every else windows[:, -1]))
    return parts


def classes():
    """Number of characters."""
    return len(set("".join(pydoc_data.topics.topics.values())))

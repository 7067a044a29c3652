"""Which weights of a model are those that a file tells of."""

import collections
import re

from keras_sparseopt.models.topology import shape_of


def matching(saved, variables):
    """Pairs what was saved of weights with variables.

    By path and shape. Keras numbers layers without a name of their own on through a process, and a
    path begins where a layer was built: where no path of those alike is the same, those alike
    (without numbers; of the same last two parts) are paired in order, if there are as many here as
    there. What is left has no partner: a weight that was frozen, say.

    Args:
        saved: List of dicts with `path` and `shape`.
        variables: List of Keras variables.

    Returns:
        Dict from positions in `variables` to positions in `saved`.
    """
    there = {i: (entry["path"], tuple(entry["shape"])) for i, entry in enumerate(saved)}
    here = {i: (v.path, shape_of(v)) for i, v in enumerate(variables)}
    found: dict[int, int] = {}
    for alike in (_without_numbers, _end_without_numbers):
        groups_there = _groups(there, alike)
        for key, positions in _groups(here, alike).items():
            partners = groups_there.get(key, [])
            pairs = _of_same_path(positions, partners, here, there)
            if not pairs and len(positions) == len(partners):
                pairs = list(zip(positions, partners))
            if pairs:
                found.update(pairs)
                for position in positions:
                    del here[position]
                for partner in partners:
                    del there[partner]
    return found


def _of_same_path(positions, partners, here, there):
    pairs: list[tuple[int, int]] = []
    for path in dict.fromkeys(here[position] for position in positions):
        same_here = [position for position in positions if here[position] == path]
        same_there = [partner for partner in partners if there[partner] == path]
        if len(same_here) == len(same_there):
            pairs += zip(same_here, same_there)
    return pairs


def _groups(entries, alike):
    groups = collections.defaultdict(list)
    for position, (path, shape) in entries.items():
        groups[alike(path), shape].append(position)
    return groups


def _without_numbers(path):
    return re.sub(r"_\d+(?=/|$)", "", path)


def _end_without_numbers(path):
    return "/".join(_without_numbers(path).split("/")[-2:])

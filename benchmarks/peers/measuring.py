"""What every peer measures, the same way: needs NumPy only, runs in the peer's own environment."""

import gzip
import json
import math
import pathlib
import sys
import tempfile
import time

import numpy as np

SPARSITY = 0.9
BATCH = {"resnet20": 128, "bert_tiny": 32, "wide_mlp": 128}
SEQUENCE, VOCABULARY, WIDTH, HEADS = 64, 8192, 128, 2
UNITS, HIDDEN = 1024, 4  # of wide_mlp
IMAGE = (32, 32, 3)
ONE_KERNEL = [(3, 3, 512, 512)]  # (height, width, in, out): 2.36 M weights
DROP_FRACTION = 0.3
UPDATES = 50
CRASH = {"steps": 20, "update_every": 5, "killed_at": 12}


def batch(network, image=IMAGE):
    """Inputs and targets of a training step: NumPy arrays."""
    rng = np.random.default_rng(0)
    size = BATCH[network]
    if network == "bert_tiny":
        x = rng.integers(0, VOCABULARY, (size, SEQUENCE))
    else:
        shape = image if network == "resnet20" else (UNITS,)
        x = rng.normal(size=(size, *shape)).astype("float32")
    return x, rng.integers(0, 10, size)


def resnet50_kernels():
    """The shapes of all kernels of a ResNet-50, (height, width, in, out): 25.5 M weights."""
    shapes, inputs = [(7, 7, 3, 64)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            if block == 0:
                shapes.append((1, 1, inputs, 4 * width))
            shapes += [(1, 1, inputs, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            inputs = 4 * width
    return [*shapes, (2048, 1000)]


KERNELS = {"one kernel of 2.36 M": ONE_KERNEL, "all of ResNet-50": resnet50_kernels()}


class CannotRun(Exception):
    """A row that a peer has not, with the reason."""


class Peer:
    """One library. A method for each row; what is not overridden cannot run."""

    name = ""
    reasons: dict = {}  # row → why it cannot run

    def _missing(self, row):
        raise CannotRun(self.reasons[row])

    def versions(self):
        """Dict of package → version."""
        raise NotImplementedError

    def steps(self, network):
        """Functions that take one training step, dense and 90 % sparse: dict of two.

        `resnet20` and `bert_tiny` unstructured, `wide_mlp` in the way that trains it fastest.
        """
        self._missing("step")

    def update(self, shapes):
        """(function that changes the masks of kernels of these shapes once, what it does)."""
        self._missing("update")

    def counts(self):
        """Active weights of every kernel before and after `UPDATES` updates: two lists."""
        self._missing("counts")

    def memory(self):
        """Bytes per weight, beside those of dense training, that stay between steps: float."""
        self._missing("memory")

    def files(self, folder):
        """Paths of a dense and of a 90 % sparse model of `ONE_KERNEL`, saved; and a remark."""
        self._missing("files")

    def crash(self, folder):
        """Two lists of arrays: weights after an undisturbed training and after a resumed one."""
        self._missing("crash")

    def kinds(self):
        """Building block → share of its kernel weights that becomes sparse, or why not."""
        self._missing("kinds")

    def next_mask(self, method, weights, mask, gradient, num_update):
        """The peer's own next mask from the same numbers: bool array."""
        self._missing("semantics")


def alternate(ways, rounds, warm_up=2):
    """Median seconds of functions that take turns: dict."""
    for way in ways.values():
        for _ in range(warm_up):
            way()
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def step(peer, network):
    seconds = alternate(peer.steps(network), rounds=12 if network == "resnet20" else 20)
    return {
        "dense_ms": 1e3 * seconds["dense"],
        "sparse_ms": 1e3 * seconds["sparse"],
        "ratio": seconds["sparse"] / seconds["dense"],
    }


def update(peer, kernels):
    function, what = peer.update(KERNELS[kernels])
    arrays = [np.zeros(shape, "float32") for shape in KERNELS[kernels] for _ in range(2)]
    targets = [np.empty_like(array) for array in arrays]

    def copy():  # weights and gradients: the least that must be read
        for target, array in zip(targets, arrays):
            np.copyto(target, array)

    seconds = alternate({"copy": copy, "update": function}, rounds=5, warm_up=1)
    ratio = seconds["update"] / seconds["copy"]
    return {"ms": 1e3 * seconds["update"], "ratio_to_copy": ratio, "what": what}


def counts(peer):
    before, after = peer.counts()
    changed = sum(int(a != b) for a, b in zip(before, after))
    return {
        "kernels": len(before), "changed": changed,
        "active_before": int(sum(before)), "active_after": int(sum(after)),
    }  # fmt: skip


def memory(peer):
    return {"bytes_per_weight": peer.memory()}


def files(peer):
    with tempfile.TemporaryDirectory() as folder:
        dense, sparse, remark = peer.files(pathlib.Path(folder))
        sizes = [path.stat().st_size for path in (dense, sparse)]
        zipped = len(gzip.compress(sparse.read_bytes(), 6))
    return {
        "dense_bytes": sizes[0], "sparse_bytes": sizes[1], "gzipped_bytes": zipped,
        "ratio": sizes[0] / sizes[1], "ratio_gzipped": sizes[0] / zipped, "remark": remark,
    }  # fmt: skip


def crash(peer):
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed, remark = peer.crash(pathlib.Path(folder))
    worst = max(float(np.max(np.abs(a - b))) for a, b in zip(whole, resumed))
    moved = sum(int(((a != 0) != (b != 0)).sum()) for a, b in zip(whole, resumed))
    active = sum(int((a != 0).sum()) for a in whole)
    return {
        "same_bits": worst == 0.0, "largest_difference": worst,
        "share_of_connections_that_differ": moved / 2 / active, "remark": remark,
    }  # fmt: skip


def kinds(peer):
    return peer.kinds()


def semantics(peer):
    """The peer's masks beside ours (in the same file of numbers), method by method."""
    found = {}
    for method in ("RigL", "SET"):
        try:
            cases = []
            for seed, size in enumerate(((64, 32), (256, 128), (512, 512))):
                weights, mask, gradient, number = numbers(seed, size)
                new = peer.next_mask(method, weights, mask, gradient, number)
                cases.append(np.packbits(np.asarray(new, bool)).tobytes().hex())
            found[method] = cases
        except CannotRun as reason:
            found[method] = str(reason)
    return found


def numbers(seed, size):
    """Weights, mask, gradient of one kernel, 90 % sparse, without ties."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=size).astype("float32")
    gradient = rng.normal(size=size).astype("float32")
    total = math.prod(size)
    active = round((1 - SPARSITY) * total)
    mask = np.zeros(total, bool)
    mask[rng.permutation(total)[:active]] = True
    mask = mask.reshape(size)
    return weights * mask, mask, gradient, math.floor(DROP_FRACTION * active)


ROWS = {
    "versions": lambda peer: peer.versions(),
    "step: resnet20": lambda peer: step(peer, "resnet20"),
    "step: bert_tiny": lambda peer: step(peer, "bert_tiny"),
    "step: wide_mlp": lambda peer: step(peer, "wide_mlp"),
    "update: one kernel of 2.36 M": lambda peer: update(peer, "one kernel of 2.36 M"),
    "update: all of ResNet-50": lambda peer: update(peer, "all of ResNet-50"),
    "counts": counts,
    "memory": memory,
    "files": files,
    "crash": crash,
    "kinds": kinds,
    "semantics": semantics,
}


def main(peer):
    """`python <peer>.py ROW OUTPUT`: measures one row, and writes JSON."""
    row, output = sys.argv[1:]
    try:
        result = ROWS[row](peer)
    except CannotRun as reason:
        result = {"cannot_run": str(reason)}
    pathlib.Path(output).write_text(json.dumps(result))

"""Random sequences of what a user can do with a sparse model; the invariants hold after each.

A few in the suite. For a long search: `python tests/programs/histories.py --minutes 60`.
"""

import pathlib
import random
import tempfile
import warnings

import keras
import numpy as np
from helpers import array
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from keras import layers

import keras_sparseopt as kso

NAMES = "abc"
METHODS = {
    "none": lambda: [],
    "static": lambda: [kso.Static()],
    "rigl": lambda: [kso.RigL(2, 0.5, end_step=10**6)],
    "set": lambda: [kso.SET(1, 0.5, end_step=10**6)],
    "mest": lambda: [kso.MEST(2, 0.5, end_step=10**6, compiled=True)],
}
INNER = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "muon": lambda: keras.optimizers.Muon(0.01),
    "accumulating": lambda: keras.optimizers.SGD(0.05, gradient_accumulation_steps=2),
}
X = np.random.default_rng(0).normal(size=(12, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(12, 4)).astype("float32")


class History:
    """A model, and what must be true of it.

    Attributes:
        model: The model.
        allowed: Dict from the name of each layer to how many of its weights may be nonzero.
    """

    def __init__(self):
        keras.utils.set_random_seed(0)
        self.model = keras.Sequential(
            [keras.Input((8,)), *(layers.Dense(8, "tanh", name=name) for name in NAMES[:2])]
        )
        self.model.add(layers.Dense(4, name=NAMES[2]))
        kso.sparsify(self.model, 0.6, "uniform")
        self.allowed = self._active()
        self.saved = None
        self.compile("sgd", False)

    def _layer(self, name):
        return self.model.get_layer(name)

    def _active(self):
        masks = [self._layer(name).kernel.topology.mask for name in NAMES]
        return {name: int(array(mask).sum()) for name, mask in zip(NAMES, masks)}

    def _draw(self, name, mask):
        """New weights: a mask of which few were active before would leave nearly none."""
        kernel = self._layer(name).kernel
        draws = np.random.default_rng(len(name)).normal(size=kernel.shape)
        kernel.assign(np.where(mask, draws, 0.0) / 4)

    def _masks_again(self):
        """Of a model that was saved or cloned under an optimizer that knew nothing of masks.

        Plain ones do not, nor does a SparseOpt that was not built yet, of which a warning tells.
        """
        knows = isinstance(self.model.optimizer, kso.SparseOpt)
        if not knows or not kso.sparse_weights(self.model):
            self.take_masks_from_zeros()

    def _nonzero(self, name):
        return int(np.count_nonzero(array(self._layer(name).kernel)))

    # What a user does -----------------------------------------------------------------

    def compile(self, inner, correct):
        optimizer = kso.SparseOpt(INNER[inner](), skew_correction=correct)
        self.model.compile(optimizer, "mse", jit_compile=False)

    def compile_plain(self):
        self.model.compile("adam", "mse", jit_compile=False)

    def fit(self, method):
        is_ours = isinstance(self.model.optimizer, kso.SparseOpt)
        trained = [n for n in NAMES if self._layer(n).trainable]
        if not trained:
            return
        masked = [n for n in trained if hasattr(self._layer(n).kernel, "topology")]
        callbacks = METHODS[method]() if is_ours and masked else []
        self.model.fit(X, Y, batch_size=4, verbose=0, callbacks=callbacks)

    def set_trainable(self, name, value):
        self._layer(name).trainable = value
        self.compile("sgd", True)

    def save_and_load(self):
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "m.keras"
            self.model.save(path)
            self.model = keras.models.load_model(path)
        self._masks_again()

    def clone(self):
        weights = self.model.get_weights()
        clone = keras.models.clone_model(self.model)
        clone.set_weights(weights)
        self.model = clone
        self._masks_again()

    def remember(self):
        self.saved = self.model.get_weights()

    def restore(self):
        if self.saved is not None:
            try:
                self.model.set_weights(self.saved)
            except ValueError as error:
                assert "denser than its mask" in str(error)

    def set_mask(self, name, seed):
        topology = getattr(self._layer(name).kernel, "topology", None)
        if topology is not None:
            count, size = self.allowed[name], int(np.prod(topology.variable.shape))
            order = np.random.default_rng(seed).permutation(size)
            mask = (order < count).reshape(topology.variable.shape)
            kso.set_mask(topology.variable, mask)
            self._draw(name, mask)

    def take_masks_from_zeros(self):
        kso.masks_from_zeros(self.model, include=list(NAMES))

    def strip_and_sparsify(self):
        compiled = isinstance(self.model.optimizer, kso.SparseOpt)
        kso.strip(self.model)
        for name in NAMES:
            self._draw(name, True)
        kso.sparsify(self.model, 0.6, "uniform", include=list(NAMES), seed=3)
        self.allowed = self._active()
        self.compile("adam" if compiled else "sgd", True)

    # What must be true ----------------------------------------------------------------

    def check(self):
        for name in NAMES:
            kernel = self._layer(name).kernel
            assert np.isfinite(array(kernel)).all()
            assert self._nonzero(name) <= self.allowed[name], (name, self._nonzero(name))
            topology = getattr(kernel, "topology", None)
            if topology is not None:
                mask = array(topology.mask)
                assert not array(kernel)[~mask].any()
                assert 0 < mask.sum() <= self.allowed[name]
        optimizer = self.model.optimizer
        if isinstance(optimizer, kso.SparseOpt) and optimizer.built:
            for weight in optimizer.weights:
                inactive = ~array(weight.topology.mask)
                assert np.array_equal(array(weight.held), ~inactive)
                for slot in weight.slots:
                    assert not array(slot)[inactive].any(), slot.path


def random_actions(seed):
    """A sequence of actions: list of tuples of a name and its arguments."""
    rng = random.Random(seed)
    kinds = {
        "fit": lambda: (rng.choice(list(METHODS)),),
        "compile": lambda: (rng.choice(list(INNER)), rng.random() < 0.5),
        "compile_plain": tuple,
        "set_trainable": lambda: (rng.choice(NAMES), rng.random() < 0.6),
        "save_and_load": tuple,
        "clone": tuple,
        "remember": tuple,
        "restore": tuple,
        "set_mask": lambda: (rng.choice(NAMES), rng.randrange(10)),
        "take_masks_from_zeros": tuple,
        "strip_and_sparsify": tuple,
    }
    names = rng.choices(list(kinds), [4, *[1] * (len(kinds) - 1)], k=rng.randint(4, 9))
    return [(name, *kinds[name]()) for name in names]


def run(actions):
    history = History()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said is tested elsewhere
        for action, *arguments in actions:
            getattr(history, action)(*arguments)
            history.check()
        history.fit("none")
        history.check()


@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.integers(0, 2**32))
def test_any_history_keeps_a_sparse_model_sparse(seed):
    run(random_actions(seed))

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

    structure: kso.Block | None = None

    def __init__(self):
        keras.utils.set_random_seed(0)
        self.model = keras.Sequential(
            [keras.Input((8,)), *(layers.Dense(8, "tanh", name=name) for name in NAMES[:2])]
        )
        self.model.add(layers.Dense(4, name=NAMES[2]))
        kso.sparsify(self.model, 0.6, "uniform", structure=self.structure)
        self.allowed = self._active()
        self.saved = None
        self.compile("sgd", False)

    def _layer(self, name):
        return self.model.get_layer(name)

    def _weight(self, name):
        return self._layer(name)._kernel

    def _topology(self, name):
        return getattr(self._weight(name), "topology", None)

    def _plain(self, name):
        topology = self._topology(name)
        return array(self._weight(name) if topology is None else topology.kernel)

    def _active(self):
        masks = [self._topology(name).mask for name in NAMES]
        return {name: int(array(mask).sum()) for name, mask in zip(NAMES, masks)}

    def _draw(self, name, mask):
        """New weights: a mask of which few were active before would leave nearly none."""
        draws = np.random.default_rng(len(name)).normal(size=self._plain(name).shape)
        self._give(name, (np.where(mask, draws, 0.0) / 4).astype("float32"))

    def _give(self, name, kernel):
        self._weight(name).assign(kernel)

    def _masks_again(self):
        """Of a model that was saved or cloned under an optimizer that knew nothing of masks.

        Plain ones do not, nor does a SparseOpt that was not built yet, of which a warning tells.
        """
        knows = isinstance(self.model.optimizer, kso.SparseOpt)
        if not knows or not kso.sparse_weights(self.model):
            self.take_masks_from_zeros()

    def _nonzero(self, name):
        return int(np.count_nonzero(self._plain(name)))

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
        masked = [n for n in trained if self._topology(n) is not None]
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
        topology = self._topology(name)
        if topology is not None:
            mask = self._random_mask(name, seed)
            kso.set_mask(topology.variable, mask)
            self._draw(name, mask)

    def _random_mask(self, name, seed):
        order = np.random.default_rng(seed).permutation(self._plain(name).size)
        return (order < self.allowed[name]).reshape(self._plain(name).shape)

    def take_masks_from_zeros(self):
        kso.masks_from_zeros(self.model, include=list(NAMES))

    def strip_and_sparsify(self):
        compiled = isinstance(self.model.optimizer, kso.SparseOpt)
        kso.strip(self.model)
        for name in NAMES:
            self._draw(name, True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*seems to be trained")
            kso.sparsify(
                self.model, 0.6, "uniform", include=list(NAMES), seed=3, structure=self.structure
            )
        self.allowed = self._active()
        self.compile("adam" if compiled else "sgd", True)

    # What must be true ----------------------------------------------------------------

    def check(self):
        for name in NAMES:
            kernel, topology = self._plain(name), self._topology(name)
            assert np.isfinite(kernel).all()
            assert self._nonzero(name) <= self.allowed[name], (name, self._nonzero(name))
            if topology is not None:
                mask = array(topology.mask)
                assert not kernel[~mask].any()
                assert 0 < mask.sum() <= self.allowed[name]
        optimizer = self.model.optimizer
        if isinstance(optimizer, kso.SparseOpt) and optimizer.built:
            for weight in optimizer.weights:
                inactive = ~array(weight.topology.mask)
                assert weight.held is None or np.array_equal(array(weight.held), ~inactive)
                for slot in weight.slots:
                    assert not weight.topology.plain(slot)[inactive].any(), slot.path


class InBothForms(History):
    """The same with balanced tiles, which may be condensed now and then."""

    structure = kso.Block(2, 4, balanced=True)

    def _forms(self):
        return [v.topology.is_condensed for v in kso.sparse_weights(self.model)]

    def _give(self, name, kernel):
        topology = self._topology(name)
        if topology is not None and topology.is_condensed:
            topology.take_kernel(kernel)
        else:
            super()._give(name, kernel)

    def _random_mask(self, name, seed):
        units = self._topology(name).units
        return units.random_mask(self._topology(name).num_active_units(), seed)

    def condense(self):
        try:
            kso.condense(self.model)
        except ValueError as error:
            expected = "must have a weight that can be condensed", "not in a SparseOpt was built"
            assert any(text in str(error) for text in expected), error

    def uncondense(self):
        kso.uncondense(self.model)

    def compile(self, inner, correct):
        is_condensed = inner == "muon" and any(self._forms())
        super().compile("sgd" if is_condensed else inner, correct)

    def remember(self):
        super().remember()
        self.forms = self._forms()

    def restore(self):
        if self.saved is not None and self.forms == self._forms():
            super().restore()

    def clone(self):
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "m.weights.h5"
            self.model.save_weights(path)
            clone = keras.models.clone_model(self.model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                clone.load_weights(path)
        self.model = clone
        self._masks_again()

    def _masks_again(self):
        self.take_masks_from_zeros()  # zeros along whole inputs are only warned of

    def take_masks_from_zeros(self):
        structure = None if kso.sparse_weights(self.model) else self.structure
        if structure is None:
            structure = {name: self.structure for name in NAMES if self._topology(name) is None}
        try:
            kso.masks_from_zeros(self.model, include=list(NAMES), structure=structure or None)
        except ValueError as error:
            assert "as it is condensed" in str(error), error


def random_actions(seed, kind=History):
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
    if kind is InBothForms:
        kinds |= {"condense": tuple, "uncondense": tuple}
    names = rng.choices(list(kinds), [4, *[1] * (len(kinds) - 1)], k=rng.randint(4, 9))
    return [(name, *kinds[name]()) for name in names]


def run(actions, kind=History):
    history = kind()
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


@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.integers(0, 2**32))
def test_any_history_in_both_forms(seed):
    run([("condense",), *random_actions(seed, InBothForms)], InBothForms)

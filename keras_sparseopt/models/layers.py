"""Keras layers whose kernel carries a mask."""

import math
import random
import threading
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sparseopt import keras_internals, masks
from keras_sparseopt.checks import check_bool, check_sparsity
from keras_sparseopt.forms import Geometry
from keras_sparseopt.models.condensed import become, tiled_form, why_plain
from keras_sparseopt.models.initializers import SparseHeNormal
from keras_sparseopt.models.kernels import einsum_neuron_axes
from keras_sparseopt.models.topology import Topology
from keras_sparseopt.structures import Structure, as_structure, structure_config, units_of

# The masked kernels of the layers that are being called in this thread, by layer.
_calling = threading.local()


def _initializer(value):
    """Keras knows only its own initializers by name."""
    by_name = isinstance(value, str) and value == "sparse_he_normal"
    return SparseHeNormal() if by_name else value


class SparseLayer(keras.layers.Layer):
    """Mixin that gives a Keras layer with a `kernel` its mask. Comes before the Keras class."""

    is_sparse_by_construction = True

    def __init__(
        self,
        *args: Any,
        sparsity: float = 0.0,
        seed: int | None = None,
        skew_correction: bool = True,
        structure: Structure | None = None,
        condensed: bool = False,
        **kwargs: Any,
    ) -> None:
        check_sparsity(sparsity)
        if seed is not None and (
            isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0
        ):
            raise ValueError(f"`seed` must be a non-negative int or None. Received: seed={seed!r}")
        check_bool("skew_correction", skew_correction)
        structure = as_structure(structure)
        structure.check_sparsity(sparsity)
        check_bool("condensed", condensed)
        for refused in ("lora_rank", "lora_alpha", "quantization_config"):
            if kwargs.get(refused) is not None:
                raise ValueError(
                    f"`{refused}` is not supported by {type(self).__name__}: "
                    "strip the trained model and apply it to the plain layer. "
                    f"Received: {refused}={kwargs[refused]!r}"
                )
        super().__init__(
            *(_initializer(value) for value in args),
            **{argument: _initializer(value) for argument, value in kwargs.items()},
        )
        if self.quantization_mode is not None:
            raise ValueError(
                f"{type(self).__name__} does not support a quantized `dtype` policy. "
                f"Received: dtype={self.dtype_policy.name}"
            )
        self._initial_sparsity = float(sparsity)
        self._skew_correction = skew_correction
        self._structure = structure
        self._condensed = condensed
        self._config_seed = None if seed is None else int(seed)
        # Python's generator, as Keras initializers do, so that
        # `keras.utils.set_random_seed` makes unseeded layers reproducible.
        self._seed = random.randrange(2**31) if seed is None else self._config_seed

    def _find_neuron_axes(self, rank):
        return (rank - 1,)

    def _find_input_axes(self, rank):
        return (rank - 2,)

    def add_weight(self, *args, **kwargs):
        if kwargs.get("name") != "kernel":
            return super().add_weight(*args, **kwargs)
        shape = tuple(kwargs["shape"])
        if None in shape:
            raise ValueError(
                "A sparse layer must know the size of its inputs' last axis (with channels first, "
                f"of the channels). Received: a kernel of shape={shape} for layer '{self.name}'"
            )
        if math.prod(shape) > masks.MAX_KERNEL_SIZE:
            raise ValueError(
                f"A sparse kernel may hold at most {masks.MAX_KERNEL_SIZE} weights. "
                f"Received: shape={shape} in layer '{self.name}'"
            )
        neuron_axes = self._find_neuron_axes(len(shape))
        input_axes = self._find_input_axes(len(shape))
        units = units_of(self._structure, shape, neuron_axes, input_axes)
        count = masks.num_active(math.prod(shape), self._initial_sparsity)
        if self._condensed:
            return self._add_condensed(units, units.nearest(count), kwargs)
        mask = units.random_mask(units.nearest(count), self._seed)
        initializer = kwargs["initializer"]

        def sparse_initializer(shape, dtype):
            values = initializer(shape, dtype=dtype)
            if isinstance(initializer, SparseHeNormal):
                fan_in_axes = masks.fan_in_axes(len(shape), neuron_axes)
                counts = mask.sum(axis=fan_in_axes, keepdims=True)
                fan_in = math.prod(shape[axis] for axis in fan_in_axes)
                scale = np.sqrt(fan_in / np.maximum(counts, 1))
                values = values * ops.cast(scale, dtype)
            return masks.masked(values, mask)

        kernel = super().add_weight(*args, **{**kwargs, "initializer": sparse_initializer})
        self.kernel_mask = super().add_weight(
            name="kernel_mask",
            shape=shape,
            initializer=lambda shape, dtype: ops.convert_to_tensor(mask),
            dtype="bool",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
        )
        keras_internals.follow_layout(self.kernel_mask, of=kernel)
        Topology(
            kernel, self.kernel_mask, neuron_axes, input_axes, self._skew_correction, self.name,
            structure=self._structure, is_attached=False,
        ).hang()  # fmt: skip
        return kernel

    def _add_condensed(self, units, count, kwargs):
        """The active tiles as a weight, drawn as the kernel of a layer with so many inputs."""
        why = why_plain(self, units, kwargs["regularizer"], kwargs["constraint"])
        if why:
            raise ValueError(
                f"`condensed` is not for this layer: {why}. Received: condensed=True in "
                f"'{self.name}'"
            )
        geometry = Geometry(
            self._structure, units.shape, self._find_neuron_axes(len(units.shape)),
            self._find_input_axes(len(units.shape)), self._skew_correction,
            count // units.unit_shape[2],
        )  # fmt: skip
        form, initializer = geometry.form, kwargs["initializer"]
        pattern = form.pattern(units.random_units(count, self._seed))
        config: dict = getattr(initializer, "get_config", dict)()
        if config.get("input_axes") is not None:  # of an einsum: those of a matrix now
            config |= {"seed": initializer.seed, "input_axes": None, "output_axes": None}
            initializer = type(initializer).from_config(config)
        windows = self.kernel_size if hasattr(self, "kernel_size") else ()
        groups, entries, width = form.values_shape()

        def tiles(shape, dtype):
            read = entries // form.windows
            values = initializer((*windows, read, groups * width), dtype=dtype)
            values = ops.reshape(values, (entries, groups, width))
            values = ops.transpose(values, (1, 0, 2))
            held = form.held(pattern)
            return values if held is None else masks.masked(values, ops.convert_to_tensor(held))

        options = {"shape": form.values_shape(), "initializer": tiles}
        kernel = super().add_weight(**{**kwargs, **options})
        self.indices = indices = super().add_weight(
            name="indices", shape=pattern.shape, dtype="int32", trainable=False, autocast=False,
            initializer=lambda shape, dtype: ops.convert_to_tensor(pattern, dtype),
            aggregation="only_first_replica",
        )  # fmt: skip
        indices.is_pattern = True
        topology = Topology(
            kernel, indices, geometry.neuron_axes, geometry.input_axes, self._skew_correction,
            self.name, structure=self._structure, is_attached=False,
        )  # fmt: skip
        topology.shape, topology.tiles = units.shape, geometry.tiles
        topology.hang()
        return kernel

    def build(self, input_shape):
        super().build(input_shape)
        if self._condensed:
            become(self, tiled_form(self))

    def _mask(self):
        return ops.convert_to_tensor(self.kernel_mask)

    @property
    def kernel(self):
        """The weight; within `call` with its inactive weights exactly 0."""
        masked = getattr(_calling, "kernels", {}).get(id(self))
        return super().kernel if masked is None else masked

    @property
    def masked_kernel(self):
        """The kernel with inactive weights exactly 0; its gradient is the *dense* one."""
        kernel = ops.convert_to_tensor(super().kernel)
        # ∞ − ∞ is not 0, and another optimizer may have moved what is inactive.
        finite = ops.where(ops.isfinite(kernel), kernel, ops.cast(0, kernel.dtype))
        nothing = finite - ops.stop_gradient(finite)
        return ops.where(self._mask(), kernel, nothing)

    def call(self, inputs):
        kernels = _calling.__dict__.setdefault("kernels", {})
        kernels[id(self)] = self.masked_kernel
        try:
            return super().call(inputs)
        finally:
            del kernels[id(self)]

    @property
    def skew_correction(self):
        """Whether `SparseOpt` corrects this layer's gradient."""
        return self._skew_correction

    @property
    def sparsity(self):
        """Inactive fraction: of the mask once built, before that the one asked for."""
        if not self.built:
            return self._initial_sparsity
        return self._kernel.topology.sparsity

    @property
    def neuron_sparsity(self):
        """Inactive fraction of each neuron's fan-in: NumPy array, one entry per neuron."""
        if not self.built:
            raise AttributeError("You must build the layer before accessing `neuron_sparsity`.")
        return self._kernel.topology.neuron_sparsity

    def get_config(self):
        config = {
            **super().get_config(),
            "sparsity": self._initial_sparsity,
            "seed": self._config_seed,
            "skew_correction": self._skew_correction,
            "structure": structure_config(self._structure),
        }
        return {**config, "condensed": True} if self._condensed else config

    def save_own_variables(self, store):
        own: dict = {}
        super().save_own_variables(own)
        if self.built:
            # An optimizer other than SparseOpt may have moved inactive weights; they do not
            # belong to the model, whose forward pass ignores them.
            own["0"] = masks.masked(ops.convert_to_tensor(own["0"]), self._mask())
            own["kernel_mask"] = self.kernel_mask
        for name, value in own.items():
            store[name] = value

    def load_own_variables(self, store):
        if self.built:
            self._check_store(store)
        super().load_own_variables(store)
        if self.built:
            # Outside of the new mask a weight is what another optimizer left there.
            mask = np.asarray(store["kernel_mask"])
            weight = ops.convert_to_tensor(self._kernel)
            self._kernel.assign(masks.masked(weight, ops.convert_to_tensor(mask)))
            self._kernel.topology.take(mask)

    def _check_store(self, store):
        if "kernel_mask" not in store.keys():
            raise ValueError(
                f"Layer '{self.name}' ({type(self).__name__}) needs a `kernel_mask`, but the "
                "file holds a dense layer. Load the file into the dense model, then call "
                "`sparsify` on it."
            )
        mask, kernel = np.asarray(store["kernel_mask"]), np.asarray(store["0"])
        shape = tuple(self._kernel.shape)
        if mask.shape != shape or mask.dtype != bool or kernel.shape != shape:
            raise ValueError(
                f"The file does not fit layer '{self.name}': `kernel_mask` must be bool of "
                f"shape {shape}. Received: kernel_mask of dtype {mask.dtype} and shape "
                f"{mask.shape}, kernel of shape {kernel.shape}"
            )
        self._kernel.topology.check_mask(mask)

    def enable_lora(self, *args, **kwargs):
        raise NotImplementedError(
            f"`enable_lora` is not supported by {type(self).__name__}: it would freeze the "
            "sparse kernel. Strip the trained model and call it on the plain layer."
        )

    def quantize(self, *args, **kwargs):
        raise NotImplementedError(
            f"`quantize` is not supported by {type(self).__name__}. "
            "Strip the trained model and quantize the plain layer."
        )


_SPARSE_ARGS = """sparsity: Float in [0, 1), the inactive fraction, defaults to 0.0 (dense).
            The mask is random and exact: `round((1 − sparsity) · kernel size)` weights
            are active, at least one.
        seed: Int or `None` (default), seed of the random mask. With `None` the mask follows
            `keras.utils.set_random_seed`.
        skew_correction: Bool, defaults to `True`. `False` excludes the layer from
            `SparseOpt`'s correction: right for a layer that does not feed a normalization
            layer, such as a classifier head.
        structure: `Structure` of the mask, such as `Block(4, 1)`; `None` (default) for
            `Unstructured()`. Sparsities are rounded to what it can express.
        condensed: Bool, defaults to `False`. `True` stores and multiplies only the active tiles of
            a balanced `Block`, see `condense`: no array of the kernel's shape is ever made. Initial
            values are drawn for the inputs that a neuron reads.
        **kwargs: Every other argument of `keras.layers.{base}`, except LoRA and
            quantization. `kernel_initializer="sparse_he_normal"` draws by each neuron's
            actual fan-in.

    Attributes (once built):
        kernel_mask: Bool variable of the kernel's shape, not trainable, `True` = active.
        sparsity: Float, read off the mask.
        neuron_sparsity: NumPy array, the inactive fraction of every neuron's fan-in.

    The forward pass uses `kernel · kernel_mask`; the gradient that reaches the kernel is the
    dense one, which `RigL` ranks. Train it with `SparseOpt`, which masks that gradient.
    `{neuron}`

    Raises:
        ValueError: For a wrong `sparsity`, `seed`, `skew_correction` or `structure`, a sparsity
            that the structure cannot express, or for LoRA or quantization arguments. When it is
            built, if it shall be condensed and cannot.
"""

_EXAMPLE = """
    Example:

    ```python
    import numpy as np
    import keras_sparseopt as kso

    layer = kso.{call}
    outputs = layer(np.ones({shape}, "float32"))
    assert abs(layer.sparsity - 0.9) < 0.01
    ```
"""


def _document(cls, base, args, neuron, call, shape):
    cls.__doc__ = (
        f"`keras.layers.{base}` with a sparse kernel.\n\n    Args:\n        {args}\n        "
        + _SPARSE_ARGS.replace("{base}", base).replace("`{neuron}`", neuron)
        + _EXAMPLE.format(call=call, shape=shape)
    )
    return keras.saving.register_keras_serializable(package="keras_sparseopt")(cls)


class SparseDense(SparseLayer, keras.layers.Dense):
    # `training` is part of Keras' signature, which uses it for quantization only.
    def call(self, inputs, training=None):
        return super().call(inputs)


class SparseConv1D(SparseLayer, keras.layers.Conv1D):
    pass


class SparseConv2D(SparseLayer, keras.layers.Conv2D):
    pass


class SparseConv3D(SparseLayer, keras.layers.Conv3D):
    pass


class SparseEinsumDense(SparseLayer, keras.layers.EinsumDense):
    def call(self, inputs, training=None):
        return super().call(inputs)

    def _find_neuron_axes(self, rank):
        return einsum_neuron_axes(self.equation)

    def _find_input_axes(self, rank):
        return masks.fan_in_axes(rank, self._find_neuron_axes(rank))


_LAST_AXIS = "A neuron is one output unit: the last axis of the kernel."
_CONV = (
    "filters: Int, the number of output channels.\n"
    "        kernel_size: Int or tuple of ints, the window."
)
_document(
    SparseDense, "Dense", "units: Int, the number of output units.", _LAST_AXIS,
    "SparseDense(64, sparsity=0.9)", "(2, 32)",
)  # fmt: skip
_document(
    SparseConv1D, "Conv1D", _CONV, _LAST_AXIS,
    "SparseConv1D(16, 3, sparsity=0.9)", "(2, 12, 8)",
)  # fmt: skip
_document(
    SparseConv2D, "Conv2D", _CONV, _LAST_AXIS,
    'SparseConv2D(16, 3, padding="same", sparsity=0.9)', "(2, 8, 8, 8)",
)  # fmt: skip
_document(
    SparseConv3D, "Conv3D", _CONV, _LAST_AXIS,
    "SparseConv3D(16, 3, sparsity=0.9)", "(2, 4, 4, 4, 8)",
)  # fmt: skip
_document(
    SparseEinsumDense, "EinsumDense",
    "equation: String, an einsum of input and kernel, such as `\"abc,cde->abde\"`.\n"
    "        output_shape: Int or tuple of ints, as in `EinsumDense`.",
    "A neuron is one combination of the kernel axes that appear in the output.",
    'SparseEinsumDense("abc,cde->abde", output_shape=(None, 4, 8), sparsity=0.9)', "(2, 5, 32)",
)  # fmt: skip

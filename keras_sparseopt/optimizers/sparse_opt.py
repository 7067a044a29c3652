"""SparseOpt: masks and corrects gradients before any inner optimizer sees them."""

import contextlib
import dataclasses
import math
import warnings

import keras
import numpy as np
from keras import ops

from keras_sparseopt import masks
from keras_sparseopt.devices import check_optimizer, check_strategy, strategy_scope
from keras_sparseopt.optimizers.wrapper import WrapperOptimizer, init_scope

# What a dense gradient is before any step has written it.
UNWRITTEN = -math.inf


def sparse_opt_of(optimizer):
    """The `SparseOpt` in a compiled optimizer, under loss scaling too; `None` without one."""
    while optimizer is not None and not isinstance(optimizer, SparseOpt):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


class _Kernel:
    """One sparse kernel as its optimizer sees it."""

    def __init__(self, variable, slots, explored):
        self.variable = variable
        self.topology = variable.topology
        self.slots = slots
        self.explored = explored
        self.tap = None
        # JAX's stateless step sees optimizer variables, not the layer's mask.
        self.mask_copy = None
        if keras.backend.backend() == "jax":
            self.mask_copy = keras.Variable(
                ops.convert_to_numpy(self.topology.mask),
                dtype="bool",
                trainable=False,
                layout=variable._layout,
            )

    @property
    def mask(self):
        source = self.topology.mask if self.mask_copy is None else self.mask_copy
        return ops.convert_to_tensor(source)

    def is_initialized(self):
        """`False` while TensorFlow traces the step that will create the layer's variables."""
        if keras.backend.backend() != "tensorflow":
            return True
        return bool(self.topology.mask.value.is_initialized())

    def set_topology(self, mask, initial):
        """Mask, weights and slots move together.

        Args:
            mask: NumPy bool array.
            initial: Bool, whether no step was taken yet: masks before do not count as explored.
        """
        survives = ops.convert_to_tensor(mask & masks.host(self.topology.mask))
        for variable in (self.variable, *self.slots):
            variable.assign(masks.masked(ops.convert_to_tensor(variable), survives))
        # Copied: JAX may use NumPy's memory as it is, and cannot donate a buffer twice.
        self.topology.mask.assign(mask.copy())
        if self.mask_copy is not None:
            self.mask_copy.assign(mask.copy())
        explored = _packed_bits(mask)
        self.explored.assign(explored if initial else masks.host(self.explored) | explored)


def _summed_over_replicas(gradient):
    """The gradient of the global batch: Keras scales the loss by 1/replicas."""
    if keras.backend.backend() != "tensorflow":
        return gradient  # JAX's step is written for the global batch
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return gradient
    return context.all_reduce(tf.distribute.ReduceOp.SUM, gradient)


def _packed_bits(mask):
    """One bit per weight, as int32."""
    bits = np.packbits(mask)
    return np.pad(bits, (0, -bits.size % 4)).view("int32")


@dataclasses.dataclass(frozen=True)
class _Averaging:
    """How the kept dense gradients are averaged over micro-batches."""

    window: int = 1
    interval: int = 1
    momentum: float | None = None

    @property
    def carries(self):
        """Whether the kept gradients hold more than the last step's."""
        return self.window > 1 or self.momentum is not None


class _Kernels:
    """Hides the records from Keras' and TensorFlow's attribute tracking."""

    def __init__(self):
        self.by_index: dict[int, _Kernel] = {}
        self.averaging = _Averaging()

    def __iter__(self):
        return iter(self.by_index.values())


@keras.saving.register_keras_serializable(package="keras_sparseopt")
class SparseOpt(WrapperOptimizer):
    """SparseOpt: trains sparse layers with any Keras optimizer, without gradient skew.

    For every kernel that carries a mask (see `SparseDense`, `sparsify`):

    ```
    s_i   = 1 − nnz(mask of neuron i) / fan_in
    s_avg = mean of s_i over the layer's neurons
    g'    = g · mask · √(1 − s_i) / √(1 − s_avg)
    w     ← inner_optimizer(w, g')
    ```

    A Batch Normalization that follows a sparse layer divides each neuron by its own σ and so
    amplifies its gradient by `1/√(1 − s_i)`: the correction takes that back and keeps the
    layer's gradient norm about where it was. Equal fan-ins, and dense layers, are left
    exactly as they are; variables without a mask go to the inner optimizer untouched.
    Clipping, weight decay, EMA and accumulation are the inner optimizer's and act on `g'`.

    Adam-like inner optimizers divide most of a constant per-neuron scale back out, so the
    correction acts on them mainly through its changes at mask updates.

    Inactive weights, and all their optimizer slots, are exactly 0 after every step.

    Args:
        inner_optimizer: Keras optimizer, its name or its config. Refused by name: Adafactor,
            Ftrl, MultiOptimizer and LossScaleOptimizer (which goes outside).
        skew_correction: Bool, defaults to `True`. `False` masks only: the honest baseline.
            A layer built with `skew_correction=False` is never corrected.
        renormalize: Bool, defaults to `False`. `True` rescales each corrected gradient to the
            norm that the masked one had, which isolates the change of direction.
        name: String or `None`.

    Raises:
        ValueError: For an argument of the wrong kind or a refused inner optimizer.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([
        keras.Input((20,)),
        kso.SparseDense(32, sparsity=0.9, use_bias=False),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(1),
    ])
    optimizer = kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9))
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(np.ones((8, 20)), np.ones((8, 1)), verbose=0)
    ```

    References:
        Adnan et al., "SparseOpt", ICML 2026, arXiv 2605.27541.
    """

    refused = WrapperOptimizer.refused | {
        "SparseOpt": "the correction would be applied twice",
        "Adafactor": "its factored second moment mixes active and inactive weights "
        "(rows without active weights divide 0 by 0)",
        "Ftrl": "it divides by an accumulator that is 0 at inactive weights; use Adagrad instead",
    }

    def __init__(self, inner_optimizer, skew_correction=True, renormalize=False, name=None):
        for argument, value in (
            ("skew_correction", skew_correction),
            ("renormalize", renormalize),
        ):
            if not isinstance(value, bool):
                raise ValueError(f"`{argument}` must be a bool. Received: {argument}={value!r}")
        super().__init__(inner_optimizer, name=name)
        check_strategy(self)
        self.skew_correction = skew_correction
        self.renormalize = renormalize
        self._kernels = _Kernels()

    def build(self, variables):
        if self.built:
            return
        check_optimizer(self)
        with init_scope():
            with self._recorded_slots() as slots:
                super().build(variables)
            # The share of active weights that the last mask update made new. Kept here, so
            # that a resumed training logs what the uninterrupted one would have.
            self.mask_change = self.add_variable((), dtype="float32", name="mask_change")
            for index, variable in enumerate(variables):
                if getattr(variable, "topology", None) is not None:
                    self._adopt(index, variable, slots.get(self._var_key(variable), []))
            self._check_slots(slots)
            if all(kernel.is_initialized() for kernel in self._kernels):
                self.sync()
        if not self._kernels.by_index:
            warnings.warn(
                "SparseOpt found no sparse layer among the trainable variables and acts as "
                "the inner optimizer alone. Convert the model with "
                "`keras_sparseopt.sparsify(model, sparsity)` or use its layers.",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def _recorded_slots(self):
        """Which slots belong to which variable, recorded while the base optimizer makes them."""
        base = self.base_optimizer()
        slots: dict = {}
        original = base.add_variable_from_reference

        def record(reference_variable, *args, **kwargs):
            slot = original(reference_variable, *args, **kwargs)
            slots.setdefault(self._var_key(reference_variable), []).append(slot)
            return slot

        # Through `__dict__`: Keras tracks attributes that are set the usual way.
        base.__dict__["add_variable_from_reference"] = record
        try:
            yield slots
        finally:
            del base.__dict__["add_variable_from_reference"]

    def _adopt(self, index, variable, slots):
        size = math.prod(variable.shape)
        explored = self.add_variable(
            shape=(-(-size // 32),),
            dtype="int32",  # several TensorFlow workers cannot share a uint8
            name=f"{variable.path.replace('/', '_')}_explored",
        )
        slots = [slot for slot in slots if tuple(slot.shape) == tuple(variable.shape)]
        self._kernels.by_index[index] = _Kernel(variable, slots, explored)
        variable.topology.optimizer = self

    def _check_slots(self, slots):
        followed = {id(slot) for group in slots.values() for slot in group}
        shapes = {tuple(kernel.variable.shape) for kernel in self._kernels}
        for variable in self.base_optimizer().variables:
            if tuple(variable.shape) in shapes and id(variable) not in followed:
                raise ValueError(
                    f"{type(self.base_optimizer()).__name__} holds a slot that SparseOpt cannot "
                    f"follow through mask updates: '{variable.path}' was not made by "
                    "`add_variable_from_reference` or `add_optimizer_variables`."
                )

    # ------------------------------------------------------------------ one training step

    def _apply(self, grads, variables):
        kernels = [self._find(variable) for variable in variables]
        grads = [
            grad if kernel is None or grad is None else self._tap_and_correct(grad, kernel)
            for grad, kernel in zip(grads, kernels)
        ]
        super()._apply(grads, variables)
        for kernel in kernels:
            if kernel is not None and self._moves_inactive_weights(kernel):
                variable = kernel.variable
                self.assign(variable, masks.masked(ops.convert_to_tensor(variable), kernel.mask))

    def _find(self, variable):
        index = self._trainable_variables_indices.get(self._var_key(variable))
        return self._kernels.by_index.get(index)

    def _tap_and_correct(self, grad, kernel):
        if kernel.tap is not None:
            self._tap(grad, kernel)
        mask = kernel.mask
        if not (self.skew_correction and kernel.topology.skew_correction):
            return masks.masked(grad, mask)
        scale = self.correction(mask, kernel.topology.neuron_axes)
        if self.renormalize:
            active = _summed_over_replicas(ops.cast(masks.masked(grad, mask), "float32"))
            before, after = (ops.sum(ops.square(g)) for g in (active, active * scale))
            scale = scale * ops.sqrt(before / ops.where(after > 0, after, 1.0))
        return masks.masked(grad * ops.cast(scale, grad.dtype), mask)

    def correction(self, mask, neuron_axes):
        """The factor of every neuron's gradient: what a variant of the method overrides.

        Args:
            mask: Bool tensor of the kernel's shape.
            neuron_axes: Tuple of ints, the kernel axes that index neurons.

        Returns:
            Float32 tensor that broadcasts over the kernel.
        """
        return masks.correction(mask, neuron_axes)

    def _moves_inactive_weights(self, kernel):
        # Muon orthogonalises the whole matrix; a constraint may return anything.
        return (
            kernel.variable.constraint is not None or type(self.base_optimizer()).__name__ == "Muon"
        )

    # ------------------------------------------------------------------ topology

    @property
    def sparse_kernels(self):
        """The sparse kernels (Keras variables) that this optimizer trains, in order.

        Without those of layers that were frozen since it was built.
        """
        return [kernel.variable for kernel in self._kernels if kernel.variable.trainable]

    def rewire(self, kernel, new_mask):
        """Change one kernel's topology: mask, weights and slots together.

        Connections in both masks keep weight and slots. New ones start with weight 0 and
        slots 0; dropped ones become 0, slots included.

        Args:
            kernel: Keras variable, one of `sparse_kernels` (a layer's `kernel`).
            new_mask: Bool array of the kernel's shape.

        Raises:
            ValueError: If the kernel is not trained by this optimizer, or the mask does not
                fit. Nothing has changed then.
        """
        record = self._find(kernel) if self.built else None
        if record is None:
            raise ValueError(
                "`kernel` must be a sparse kernel that this optimizer was built with. "
                f"Received: kernel={getattr(kernel, 'path', kernel)}"
            )
        mask = masks.check_mask(new_mask, record.variable.shape)
        record.set_topology(mask, initial=self._has_not_stepped())

    def sync(self, kernel=None):
        """Take over masks that were changed from outside, such as by `set_weights`.

        Zeroes what the present masks make inactive, in weights and slots. Loading a file,
        `set_mask` and the callbacks do this by themselves.

        Args:
            kernel: One sparse kernel, or `None` (default) for all.
        """
        for record in self._kernels if kernel is None else [self._find(kernel)]:
            record.set_topology(masks.host(record.topology.mask), self._has_not_stepped())

    def _has_not_stepped(self):
        return int(ops.convert_to_numpy(self.base_optimizer()._iterations)) == 0

    def itop_rate(self, all_weights=False):
        """In-time over-parameterisation: the fraction of sparse weights ever active.

        ```
        R = |∪_t mask_t| / (all weights of the sparse kernels), initial masks included
        ```

        Saved with the optimizer, so it survives a resume.

        Args:
            all_weights: Bool, defaults to `False`. `True` counts what has no mask as well, such as
                biases, normalizations and dense layers: always active.

        Raises:
            ValueError: If the optimizer is not built, or trains no sparse layer.

        References:
            Liu et al., "Do We Actually Need Dense Over-Parameterization?", ICML 2021.
        """
        if not self._kernels.by_index:
            raise ValueError(
                "`itop_rate` needs a built optimizer with sparse layers to train. Received: "
                f"built={self.built}, sparse kernels: 0"
            )
        explored = sum(
            int(np.bitwise_count(masks.host(kernel.explored).view("uint32")).sum())
            for kernel in self._kernels
        )
        total = sum(math.prod(kernel.variable.shape) for kernel in self._kernels)
        if all_weights:
            dense = sum(math.prod(v.shape) for v in self._trainable_variables) - total
            explored, total = explored + dense, total + dense
        return explored / total

    # ------------------------------------------------------------------ dense gradients

    def open_taps(self, steps=1, every=None, momentum=None):
        """Start to keep the dense gradient of every sparse kernel.

        The train function must be made again after that
        (`model.make_train_function(force=True)`); the callbacks do it.

        Args:
            steps: Int, how many optimizer steps the kept gradient is averaged over.
            every: Int, the averaging window ends at multiples of this step count; needed
                with `steps` > 1 or with gradient accumulation.
            momentum: Float in (0, 1) to keep a moving average of all steps' gradients instead,
                or `None` (default).

        Returns:
            Bool, whether anything changed.

        Raises:
            ValueError: If gradients are kept already, but averaged in another way; or for
                `momentum` together with gradient accumulation.
        """
        accumulation = self.base_optimizer().gradient_accumulation_steps or 1
        if momentum is not None and accumulation > 1:
            raise ValueError(
                "A moving average of dense gradients cannot be kept under gradient accumulation. "
                f"Received: gradient_accumulation_steps={accumulation}"
            )
        window = steps * accumulation
        averaging = _Averaging(window, 1 if window == 1 else every * accumulation, momentum)
        state = self._kernels
        if self._taps():
            if state.averaging != averaging:
                raise ValueError(
                    "Dense gradients are kept already, but averaged in another way: methods that "
                    "train one model together must use the same gradients. Received: "
                    f"{averaging}, kept: {state.averaging}"
                )
            return False
        state.averaging = averaging
        with strategy_scope(self):
            for kernel in state:
                kernel.tap = keras.Variable(
                    keras.initializers.Constant(UNWRITTEN),
                    shape=kernel.variable.shape,
                    dtype=kernel.variable.dtype,
                    trainable=False,
                    # Keras scales the loss by 1/replicas, so the sum is the global gradient.
                    aggregation="sum",
                    synchronization="on_read",
                    layout=kernel.variable._layout,
                    name=f"{kernel.variable.path.replace('/', '_')}_dense_gradient",
                )
        return True

    def close_taps(self):
        """Stop keeping dense gradients and free them."""
        for kernel in self._kernels:
            kernel.tap = None

    def dense_gradient(self, kernel):
        """The dense gradient kept for one sparse kernel, all-reduced over replicas.

        Args:
            kernel: Keras variable, one of `sparse_kernels`.

        Returns:
            Tensor of the kernel's shape, neither masked nor corrected; −inf throughout if no
            step has written it.
        """
        record = self._find(kernel)
        if record is None or record.tap is None:
            raise ValueError("No dense gradient is kept: call `open_taps` before training.")
        return ops.convert_to_tensor(record.tap)

    def _tap(self, grad, kernel):
        if self.loss_scale_factor is not None:
            grad = grad / self.loss_scale_factor
        averaging = self._kernels.averaging
        if averaging.carries:
            tap = ops.convert_to_tensor(kernel.tap)
            restart = tap == UNWRITTEN
            weight = 1 / averaging.window
            if averaging.momentum is None:
                position = self.base_optimizer()._iterations % averaging.interval
                fresh = position <= averaging.interval - averaging.window
                restart = ops.logical_or(fresh, restart)
            else:
                tap, weight = averaging.momentum * tap, 1 - averaging.momentum
            grad = ops.where(restart, ops.zeros_like(tap), tap) + grad * weight
        kernel.tap.assign(grad)

    # ------------------------------------------------------------------ state

    @property
    def variables(self):
        # JAX's step must carry the transient state as well.
        transient = self.transient_variables if keras.backend.backend() == "jax" else []
        return super().variables + transient

    @property
    def transient_variables(self):
        """Mask copies and dense gradients, which Keras' files do not hold."""
        copies = [kernel.mask_copy for kernel in self._kernels if kernel.mask_copy is not None]
        return copies + self._taps()

    @property
    def carried_gradients(self):
        """Kept dense gradients that a resume would need: averages over several steps."""
        return self._taps() if self._kernels.averaging.carries else []

    def _taps(self):
        return [kernel.tap for kernel in self._kernels if kernel.tap is not None]

    def get_config(self):
        return {
            **super().get_config(),
            "skew_correction": self.skew_correction,
            "renormalize": self.renormalize,
        }

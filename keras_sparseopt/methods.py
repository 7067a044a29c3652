"""The methods of dynamic sparse training: what the next mask is, a few lines each.

`**schedule` are the arguments of `DynamicSparseTraining` that a method does not name itself.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Unpack

from keras import ops

from keras_sparseopt import masks
from keras_sparseopt.backend import are_on_host, host
from keras_sparseopt.callbacks import DynamicSparseTraining
from keras_sparseopt.checks import (
    check_float,
    check_fraction,
    check_int,
    check_patterns,
    is_schedule,
)
from keras_sparseopt.structures import ConstantFanIn, shared_budget
from keras_sparseopt.topology import is_named
from keras_sparseopt.typing import Array, DropFraction, Schedule, SeededSchedule


class RigL(DynamicSparseTraining):
    """RigL: grow the connections whose dense gradient is largest.

    ```
    score = |g|          g: dense gradient of the loss at optimizer step t, all-reduced
    mask  = drop_and_grow(weight, mask, score, n_update)
    ```

    The gradient is the training step's own: no extra batch. Just-dropped connections may
    grow again (and then keep weight and slots). If the gradient of an update step is not
    finite, that update is left out.

    Args:
        update_every, drop_fraction, begin_step, end_step: The schedule, see
            `DynamicSparseTraining`.
        growth_gradient: `"original"` (default) ranks by the gradient as it is, which raises
            the ITOP rate; `"corrected"` by SparseOpt's `g · √(1−s_i)/√(1−s_avg)`. Weights with
            `skew_correction=False` are ranked by the original one in both cases.
        gradient_steps: Int, grow on the gradient averaged over the last so many optimizer
            steps, defaults to 1. At most `update_every`.
        **schedule: `drop_schedule`, `growth_values`, `redistribution`, `layers`, `optimizer`,
            `compiled`, `check_replicas`, see `DynamicSparseTraining`; `seed` is that of random
            `growth_values`, RigL draws nothing else.

    Raises:
        ValueError: As `DynamicSparseTraining`; or for a wrong `growth_gradient` or
            `gradient_steps`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([
        keras.Input((20,)),
        keras.layers.Dense(32),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(1),
    ])
    kso.sparsify(model, 0.9)
    model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
    history = model.fit(
        np.random.rand(64, 20), np.random.rand(64, 1), batch_size=8, epochs=2, verbose=0,
        callbacks=[kso.RigL(update_every=4)],
    )
    assert history.history["itop_rate"][-1] >= 1 - history.history["sparsity"][-1]
    ```

    References:
        Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020;
        the two growth gradients: Adnan et al., "SparseOpt", ICML 2026.
    """

    uses_gradient = True

    def __init__(
        self,
        update_every: int = 100,
        drop_fraction: DropFraction = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        growth_gradient: Literal["original", "corrected"] = "original",
        gradient_steps: int = 1,
        **schedule: Unpack[SeededSchedule],
    ) -> None:
        super().__init__(update_every, drop_fraction, begin_step, end_step, **schedule)
        if growth_gradient not in ("original", "corrected"):
            raise ValueError(
                '`growth_gradient` must be "original" or "corrected". '
                f"Received: growth_gradient={growth_gradient!r}"
            )
        check_int("gradient_steps", gradient_steps, 1)
        if gradient_steps > update_every:
            raise ValueError(
                "`gradient_steps` must be at most `update_every`. Received: "
                f"gradient_steps={gradient_steps}, update_every={update_every}"
            )
        self.growth_gradient = growth_gradient
        self.gradient_steps = int(gradient_steps)

    def lease(self, optimizer: Any) -> Any:
        return optimizer.lease_gradients(self.gradient_steps, self.update_every)

    def scores(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        if self.growth_gradient == "corrected" and update.skew_correction:
            scale = self.optimizer.correction(mask, update.neuron_axes)
            gradient = gradient * (host(scale) if masks.on_host(mask) else scale)
        return abs(gradient)


class SET(DynamicSparseTraining):
    """SET, sparse evolutionary training: grow connections uniformly at random.

    ```
    score ~ Uniform(0, 1), a hash of (seed, weight index, optimizer step, position)
    mask  = drop_and_grow(weight, mask, score, n_update)
    ```

    The draw has no state, so it is the same on every replica and backend, and after a resume. The
    count of active weights is exact (some codes draw each connection on its own and let it drift).

    Args:
        update_every, drop_fraction, begin_step, end_step: The schedule, see
            `DynamicSparseTraining`.
        seed: Int, defaults to 0.
        **schedule: `drop_schedule`, `growth_values`, `redistribution`, `layers`, `optimizer`,
            `compiled`, `check_replicas`, see `DynamicSparseTraining`.

    Raises:
        ValueError: As `DynamicSparseTraining`.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.SET(update_every=100, drop_fraction=0.3, seed=1)
    ```

    References:
        Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive
        Sparse Connectivity Inspired by Network Science", Nature Communications 2018.
    """

    def __init__(
        self,
        update_every: int = 100,
        drop_fraction: DropFraction = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        seed: int = 0,
        **schedule: Unpack[Schedule],
    ) -> None:
        super().__init__(update_every, drop_fraction, begin_step, end_step, seed, **schedule)

    def scores(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        return update.units.random_scores(mask, self.seed, update.index, update.step)


class MEST(DynamicSparseTraining):
    """MEST: drop the connections that matter least by weight and gradient, grow at random.

    ```
    keep  = the (n_active − n_update) active weights of largest |w| + gradient_weight · |g|
    score ~ Uniform(0, 1), as in `SET`
    ```

    `g` is the gradient of the step before the update, of which only the active part counts.
    The original drops more at first than it grows (its "elastic mutation"); here the count of
    active weights never changes. Its drop fraction goes down in steps: a Keras schedule does that.

    Args:
        update_every, drop_fraction, begin_step, end_step: The schedule, see
            `DynamicSparseTraining`.
        seed: Int, defaults to 0.
        gradient_weight: Float ≥ 0, λ of the paper, defaults to 0.01.
        **schedule: `drop_schedule`, `growth_values`, `redistribution`, `layers`, `optimizer`,
            `compiled`, `check_replicas`, see `DynamicSparseTraining`.

    Raises:
        ValueError: As `DynamicSparseTraining`; or for a `gradient_weight` out of range.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.MEST(update_every=100, drop_fraction=0.3, drop_schedule="linear")
    ```

    References:
        Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the
        Edge", NeurIPS 2021, arXiv 2110.14032.
    """

    uses_gradient = True

    def __init__(
        self,
        update_every: int = 100,
        drop_fraction: DropFraction = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        seed: int = 0,
        gradient_weight: float = 0.01,
        **schedule: Unpack[Schedule],
    ) -> None:
        super().__init__(update_every, drop_fraction, begin_step, end_step, seed, **schedule)
        check_float("gradient_weight", gradient_weight, 0, math.inf)
        self.gradient_weight = float(gradient_weight)

    def values(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        weight, gradient = masks.as_float(weight), masks.as_float(gradient)
        return abs(weight) + self.gradient_weight * abs(gradient)

    def scores(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        return update.units.random_scores(mask, self.seed, update.index, update.step)


class Static(DynamicSparseTraining):
    """Static sparse training: the masks never change; logs as the dynamic methods do.

    Not needed for training with fixed masks (a `SparseOpt` alone does that), but a baseline
    that differs from `RigL` or `SET` in this one name.

    Args:
        **schedule: `layers`, `optimizer`, `check_replicas`, see `DynamicSparseTraining`.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.Static()
    ```
    """

    grows = False

    def __init__(self, **schedule: Unpack[SeededSchedule]) -> None:
        super().__init__(update_every=1, drop_fraction=0.0, end_step=1, **schedule)

    def _check_interval(self, steps_per_execution):
        pass

    def _may_be_due(self, batches):
        return False

    def is_due(self) -> bool:
        return False


class SNFS(DynamicSparseTraining):
    """SNFS, sparse networks from scratch: grow the connections with the largest gradient momentum.

    ```
    every optimizer step:  m = momentum · m + (1 − momentum) · g       g: dense gradient
    score = |m|
    ```

    The original also shares out between layers what grows, which is `redistribution="mean"` here;
    without, as in RigL's comparison, every layer keeps its count. The average goes over all steps
    since training began, across mask updates. It is part of `BackupAndRestore`'s state, but not of
    a `.keras` file: training that goes on from such a file starts a new average.

    Args:
        update_every, drop_fraction, begin_step, end_step: The schedule, see
            `DynamicSparseTraining`.
        momentum: Float in (0, 1), defaults to 0.9.
        **schedule: `drop_schedule`, `growth_values`, `redistribution`, `layers`, `optimizer`,
            `compiled`, `check_replicas`, see `DynamicSparseTraining`.

    Raises:
        ValueError: As `DynamicSparseTraining`; or for a `momentum` out of range, or gradient
            accumulation.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.SNFS(update_every=100, momentum=0.9)
    ```

    References:
        Dettmers, Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing
        Performance", 2019, arXiv 1907.04840; without redistribution: Evci et al., ICML 2020.
    """

    uses_gradient = True

    def __init__(
        self,
        update_every: int = 100,
        drop_fraction: DropFraction = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        momentum: float = 0.9,
        **schedule: Unpack[SeededSchedule],
    ) -> None:
        super().__init__(update_every, drop_fraction, begin_step, end_step, **schedule)
        check_float("momentum", momentum, 0, 1)
        if momentum == 0:
            raise ValueError(f"`momentum` must be in (0, 1). Received: momentum={momentum!r}")
        self.momentum = float(momentum)

    def lease(self, optimizer: Any) -> Any:
        return optimizer.lease_gradients(momentum=self.momentum)


class GMP(DynamicSparseTraining):
    """GMP, gradual magnitude pruning: from dense to sparse, by the smallest weights.

    ```
    p        = (t − begin_step) / (end_step − begin_step), between 0 and 1
    sparsity = final_sparsity + (initial_sparsity − final_sparsity) · (1 − p)³
    mask     = the (1 − sparsity) · size active weights of largest |w|
    ```

    Nothing grows: a pruned weight is 0 and stays 0. Start from a model whose masks are
    dense, `sparsify(model, 0.0)`. The last update is the first one at or after `end_step`, and
    reaches `final_sparsity` exactly. Where a layer is sparser than the schedule already, it waits.

    Args:
        final_sparsity: Float in [0, 1), defaults to 0.9.
        update_every, begin_step, end_step: The schedule, see `DynamicSparseTraining`; sparsity
            rises from `begin_step` to `end_step`.
        initial_sparsity: Float in [0, `final_sparsity`], where the schedule begins, defaults to
            0.0.
        scope: `"layer"` (default) brings every weight to the same sparsity, `"global"` ranks the
            weights of all layers together (single weights, also of blocks; within a layer its
            structure chooses).
        **schedule: `layers`, `optimizer`, `compiled`, `check_replicas`, see
            `DynamicSparseTraining`.

    Raises:
        ValueError: For an argument out of range; at the start of training as
            `DynamicSparseTraining`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(32), keras.layers.Dense(1)])
    kso.sparsify(model, 0.0)
    model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
    history = model.fit(
        np.random.rand(64, 20), np.random.rand(64, 1), batch_size=8, epochs=2, verbose=0,
        callbacks=[kso.GMP(final_sparsity=0.75, update_every=2, end_step=12)],
    )
    assert history.history["sparsity"][-1] == 0.75
    ```

    References:
        Zhu, Gupta, "To prune, or not to prune", 2018, arXiv 1710.01878.
    """

    grows = False

    def __init__(
        self,
        final_sparsity: float = 0.9,
        update_every: int = 100,
        begin_step: int = 0,
        end_step: int | None = None,
        initial_sparsity: float = 0.0,
        scope: Literal["layer", "global"] = "layer",
        **schedule: Unpack[SeededSchedule],
    ) -> None:
        super().__init__(update_every, 0.0, begin_step, end_step, **schedule)
        if self.redistribution is not None:
            raise ValueError(
                f"`redistribution` is not for {type(self).__name__}, which has its own budget. "
                f"Received: redistribution={self.redistribution!r}"
            )
        check_float("final_sparsity", final_sparsity, 0, 1)
        check_float("initial_sparsity", initial_sparsity, 0, 1)
        if initial_sparsity > final_sparsity:
            raise ValueError(
                "`initial_sparsity` must be at most `final_sparsity`. Received: "
                f"initial_sparsity={initial_sparsity}, final_sparsity={final_sparsity}"
            )
        if scope not in ("layer", "global"):
            raise ValueError(f'`scope` must be "layer" or "global". Received: scope={scope!r}')
        self.final_sparsity = float(final_sparsity)
        self.initial_sparsity = float(initial_sparsity)
        self.scope = scope

    def begin(self, optimizer: Any, total_steps: float | None = None) -> bool:
        changed = super().begin(optimizer, total_steps)
        weights = self._weights()
        active = sum(weight.topology.num_active() for weight in weights)
        sparsity = 1 - active / sum(math.prod(weight.variable.shape) for weight in weights)
        if self._step < self._end_step and sparsity >= self.final_sparsity > 0:
            warnings.warn(
                f"{type(self).__name__} finds next to nothing to prune: the masks are "
                f"{sparsity:.1%} sparse already, final_sparsity={self.final_sparsity}. It begins "
                f"at {self.initial_sparsity:.0%}: sparsify(model, {self.initial_sparsity}).",
                stacklevel=2,
            )
        return changed

    # One update more than other methods: the one that reaches the final sparsity.
    def is_due(self) -> bool:
        return self.begin_step <= self._step < self._end_step + self.update_every

    def is_over(self) -> bool:
        return self._step >= self._end_step + self.update_every

    def _check_structures(self):
        for topology in (weight.topology for weight in self._weights()):
            try:
                topology.structure.check_sparsity(self.final_sparsity)
            except ValueError as error:
                raise ValueError(
                    f"`final_sparsity` does not fit '{topology.name}'; weights of another "
                    f"structure need a method of their own (`layers=`). {error}"
                ) from None

    def target_sparsity(self, step: Any) -> float:
        """The schedule's sparsity at an optimizer step: float."""
        begin = max(self.begin_step, self._first_step)
        progress = (step - begin) / max(self._end_step - begin, 1)
        rest = (1 - min(max(progress, 0.0), 1.0)) ** 3
        return self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * rest

    def plan(self, weights: list[Any], active: list[int]) -> list[dict[str, Any]]:
        sparsity, variables = self.target_sparsity(self._step), [w.variable for w in weights]
        if self.scope == "global":
            read = host if are_on_host(variables) else ops.convert_to_tensor
            counts = shared_budget(
                [weight.topology.structure for weight in weights],
                [abs(read(variable)) for variable in variables],
                [read(weight.topology.mask) for weight in weights],
                sparsity,
            )
        else:
            counts = [masks.num_active(math.prod(v.shape), sparsity) for v in variables]
        return [
            {"count": min(weight.topology.units.nearest(count), now)}
            for weight, count, now in zip(weights, counts, active)
        ]

    def new_mask(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        return update.units.prune(weight, mask, update.count)


class GraNet(GMP):
    """GraNet: prune gradually by global magnitude, and let RigL replace weights at the same steps.

    ```
    every `update_every` optimizer steps:
        prune all layers together to the sparsity of GMP's cubic schedule
        then in every layer drop_and_grow, as RigL: n_update = floor(f(t) · n_active)
    ```

    Starts from any model that is sparse at most `initial_sparsity`: 0.0 is GraNet's
    dense-to-sparse, 0.5 its sparse-to-sparse setting.

    Args:
        final_sparsity, update_every, begin_step, end_step: As in `GMP`.
        initial_sparsity: Float in [0, `final_sparsity`], where the schedule begins, defaults to
            0.5.
        drop_fraction: As in `DynamicSparseTraining`, defaults to 0.5.
        **schedule: `drop_schedule`, `growth_values`, `layers`, `optimizer`, `compiled`,
            `check_replicas`, see `DynamicSparseTraining`.

    Raises:
        ValueError: For an argument out of range; at the start of training as
            `DynamicSparseTraining`.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.GraNet(final_sparsity=0.9, initial_sparsity=0.5, update_every=100)
    ```

    References:
        Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
        NeurIPS 2021, arXiv 2106.10404.
    """

    uses_gradient = True
    grows = True

    def __init__(
        self,
        final_sparsity: float = 0.9,
        update_every: int = 100,
        begin_step: int = 0,
        end_step: int | None = None,
        initial_sparsity: float = 0.5,
        drop_fraction: DropFraction = 0.5,
        **schedule: Unpack[SeededSchedule],
    ) -> None:
        super().__init__(
            final_sparsity, update_every, begin_step, end_step, initial_sparsity, "global",
            **schedule,
        )  # fmt: skip
        if not is_schedule(drop_fraction):
            check_fraction(drop_fraction)
        self.drop_fraction = drop_fraction

    def plan(self, weights: list[Any], active: list[int]) -> list[dict[str, Any]]:
        counts = [numbers["count"] for numbers in super().plan(weights, active)]
        replaced = DynamicSparseTraining.plan(self, weights, counts)
        return [{"count": count, **numbers} for count, numbers in zip(counts, replaced)]

    def new_mask(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        pruned = update.units.prune(weight, mask, update.count)
        return update.units.drop_and_grow(weight, pruned, abs(gradient), update.num_update)


class SRigL(DynamicSparseTraining):
    """SRigL: RigL under a constant fan-in, whose weak neurons are ablated.

    ```
    budget  = active weights that the mask was given (by sparsify, set_mask, GMP, …)
    keep    = the (n_active − n_update) active weights of largest |w|
    salient = keep ∪ the n_update positions of largest |g|
    ablate  neurons with fewer than max(1, floor(min_salient · fan-in before ablation)) salient
    fan-in  = floor(budget / remaining neurons)
    per remaining neuron: of keep at most `fan-in` by |w|, filled up by |g|
    ```

    For masks with `structure=ConstantFanIn()`, and no others. Up to one weight per neuron of the
    budget stays unused. As many neurons remain as the budget needs. An ablated neuron has no active
    weight; it returns if its weights become salient again.

    Args:
        update_every, drop_fraction, begin_step, end_step: The schedule, see
            `DynamicSparseTraining`.
        min_salient: Float in [0, 1), a neuron's share of its fan-in that must be salient, defaults
            to 0.3. 0 never ablates.
        ablation_exclude: List of names or patterns of weights whose neurons are never ablated, such
            as the classifier's; defaults to `()`. Layers that feed no normalization should be in
            it.
        **schedule: `drop_schedule`, `growth_values`, `layers`, `optimizer`, `compiled`,
            `check_replicas`, see `DynamicSparseTraining`.

    Raises:
        ValueError: As `DynamicSparseTraining`; for a `min_salient` out of range; at the start of
            training if a weight has another structure.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(32)])
    kso.sparsify(model, 0.8, structure=kso.ConstantFanIn())
    model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
    model.fit(
        np.random.rand(64, 20), np.random.rand(64, 32), batch_size=8, verbose=0,
        callbacks=[kso.SRigL(update_every=2, min_salient=0.0)],
    )
    mask = keras.ops.convert_to_numpy(kso.sparse_weights(model)[0].topology.mask)
    assert (mask.sum(axis=0) == 4).all()
    ```

    References:
        Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024,
        arXiv 2305.02299.
    """

    uses_gradient = True
    keeps_budget = True

    def __init__(
        self,
        update_every: int = 100,
        drop_fraction: DropFraction = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        min_salient: float = 0.3,
        ablation_exclude: Sequence[str] = (),
        **schedule: Unpack[SeededSchedule],
    ) -> None:
        super().__init__(update_every, drop_fraction, begin_step, end_step, **schedule)
        check_float("min_salient", min_salient, 0, 1)
        self.min_salient = float(min_salient)
        self.ablation_exclude = check_patterns("ablation_exclude", ablation_exclude or None) or ()

    def _check_structures(self):
        others = [
            f"'{weight.topology.name}' ({weight.topology.structure})"
            for weight in self._weights()
            if not isinstance(weight.topology.structure, ConstantFanIn)
        ]
        if others:
            raise ValueError(
                "SRigL is RigL for masks of constant fan-in: call sparsify(model, sparsity, "
                f"structure=ConstantFanIn()). Received: {', '.join(others)}"
            )
        super()._check_structures()

    def plan(self, weights: list[Any], active: list[int]) -> list[dict[str, Any]]:
        budgets = host(self.optimizer.budgets)
        plan = super().plan(weights, active)
        for weight, numbers in zip(weights, plan):
            topology, budget = weight.topology, int(budgets[weight.index])
            neurons = math.prod(weight.variable.shape[axis] for axis in topology.neuron_axes)
            ablates = self.min_salient and not is_named(topology, self.ablation_exclude)
            needed = max(1, math.floor(self.min_salient * (budget // neurons))) if ablates else 0
            numbers.update(budget=budget, needed=needed)
        return plan

    def new_mask(self, weight: Array, mask: Array, gradient: Array, update: Any) -> Array:
        return masks.constant_fan_in(
            weight, mask, abs(gradient), update.num_update, update.budget,
            update.neuron_axes, update.needed,
        )  # fmt: skip

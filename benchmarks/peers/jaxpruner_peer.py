"""JaxPruner, from a checkout of its repository: sparse training around an optax optimizer."""

import os
import pickle
import sys

sys.path.insert(0, os.environ["JAXPRUNER"])

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxpruner  # noqa: E402
import measuring  # noqa: E402
import ml_collections  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jaxpruner.algorithms import sparse_trainers  # noqa: E402
from measuring import (  # noqa: E402
    DROP_FRACTION,
    HEADS,
    HIDDEN,
    SPARSITY,
    UNITS,
    UPDATES,
    VOCABULARY,
    WIDTH,
)  # fmt: skip

NEVER = 10**9


class ResNet20(nn.Module):
    @nn.compact
    def __call__(self, x):
        def convolution(x, width, size, stride=1):
            return nn.Conv(width, (size, size), (stride, stride), use_bias=False)(x)

        def norm(x):
            return nn.BatchNorm(use_running_average=False)(x)

        x = nn.relu(norm(convolution(x, 16, 3)))
        for width in (16, 32, 64):
            for block in range(3):
                stride = 2 if block == 0 and width > 16 else 1
                shortcut = x if stride == 1 else norm(convolution(x, width, 1, stride))
                y = nn.relu(norm(convolution(x, width, 3, stride)))
                x = nn.relu(norm(convolution(y, width, 3)) + shortcut)
        return nn.Dense(10)(x.mean((1, 2)))


class BertTiny(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        for _ in range(2):
            x = nn.LayerNorm()(x + nn.SelfAttention(HEADS)(x))
            x = nn.LayerNorm()(x + nn.Dense(WIDTH)(nn.relu(nn.Dense(4 * WIDTH)(x))))
        return nn.Dense(10)(x[:, 0])


class WideMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(HIDDEN):
            x = nn.relu(nn.Dense(UNITS)(x))
        return nn.Dense(10)(x)


NETWORKS = {"resnet20": ResNet20, "bert_tiny": BertTiny, "wide_mlp": WideMLP}


def batch(network):
    return tuple(map(jnp.asarray, measuring.batch(network)))


def updater_of(algorithm="rigl", every=NEVER, end=NEVER):
    config = ml_collections.ConfigDict(
        {
            "algorithm": algorithm, "dist_type": "uniform", "sparsity": SPARSITY,
            "update_freq": every, "update_start_step": 1, "update_end_step": end,
            "drop_fraction": DROP_FRACTION,
        }
    )  # fmt: skip
    return jaxpruner.create_updater_from_config(config)


def sgd():
    return optax.sgd(0.01, momentum=0.9)


class Training:
    """A network, its state, and one compiled step."""

    def __init__(self, model, x, y, updater=None):
        variables = model.init(jax.random.PRNGKey(0), x)
        self.params = variables["params"]
        others = {name: value for name, value in variables.items() if name != "params"}
        transform = sgd() if updater is None else updater.wrap_optax(sgd())
        self.state = transform.init(self.params)
        if updater is not None:
            self.params = updater.post_gradient_update(self.params, self.state)

        @jax.jit
        def step(params, state, x, y):
            def loss(params):
                logits, _ = model.apply({"params": params, **others}, x, mutable=list(others))
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
                return losses.mean()

            gradients = jax.grad(loss)(params)
            updates, state = transform.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            if updater is not None:
                params = updater.post_gradient_update(params, state)
            return params, state

        self._step, self.x, self.y = step, x, y

    def __call__(self, x=None, y=None):
        x, y = (self.x, self.y) if x is None else (x, y)
        self.params, self.state = self._step(self.params, self.state, x, y)
        jax.block_until_ready(self.params)


def masks_in(tree):
    return [mask for mask in jax.tree_util.tree_leaves(tree) if mask is not None]


def tree_of(shapes, rng=None):
    rng = rng or np.random.default_rng(0)
    return {
        str(i): jnp.asarray(rng.normal(size=shape).astype("float32"))
        for i, shape in enumerate(shapes)
    }


class JaxPruner(measuring.Peer):
    name = "JaxPruner"
    reasons: dict = {}

    def versions(self):
        return {"jax": jax.__version__, "optax": optax.__version__, "numpy": np.__version__}

    def steps(self, network):
        x, y = batch(network)
        model = NETWORKS[network]()
        return {
            "dense": Training(model, x, y),
            "sparse": Training(model, x, y, updater_of()),
        }

    def update(self, shapes):
        updater = updater_of()
        params, gradients = tree_of(shapes), tree_of(shapes, np.random.default_rng(1))
        state = updater.wrap_optax(sgd()).init(params)
        change = jax.jit(updater.update_state)

        def update():
            jax.block_until_ready(change(state, params, gradients))

        return update, "RigL: drop and grow, slots of new connections too; compiled"

    def counts(self):
        x, y = batch("resnet20")
        training = Training(ResNet20(), x, y, updater_of(every=2, end=NEVER))
        before = [int(mask.sum()) for mask in masks_in(training.state.masks)]
        for _ in range(2 * UPDATES + 1):
            training()
        return before, [int(mask.sum()) for mask in masks_in(training.state.masks)]

    def memory(self):
        x, y = batch("resnet20")
        training = Training(ResNet20(), x, y, updater_of())
        masks = masks_in(training.state.masks)
        return sum(mask.nbytes for mask in masks) / sum(mask.size for mask in masks)

    def files(self, folder):
        dense, sparse = folder / "dense.pkl", folder / "sparse.pkl"
        params = jax.tree_util.tree_map(np.asarray, tree_of(measuring.ONE_KERNEL))
        dense.write_bytes(pickle.dumps(params))
        updater = updater_of()
        state = updater.wrap_optax(sgd()).init(params)
        masked = jax.tree_util.tree_map(np.asarray, updater.post_gradient_update(params, state))
        sparse.write_bytes(pickle.dumps(masked))
        return dense, sparse, "it has no files of its own: arrays, here pickled, with zeros"

    def crash(self, folder):
        every, stop = measuring.CRASH["update_every"], measuring.CRASH["killed_at"]

        def data(step):
            rng = np.random.default_rng(step)
            x = jnp.asarray(rng.normal(size=(32, 64)).astype("float32"))
            return x, jnp.asarray(rng.integers(0, 10, 32))

        def make():
            model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
            return Training(model, *data(0), updater_of(every=every, end=NEVER))

        def train(training, begin, end):
            for step in range(begin, end):
                training(*data(step))

        whole, first = make(), make()
        train(whole, 0, measuring.CRASH["steps"])
        train(first, 0, stop)
        saved = pickle.dumps(jax.tree_util.tree_map(np.asarray, (first.params, first.state)))
        second = make()
        second.params, second.state = jax.tree_util.tree_map(jnp.asarray, pickle.loads(saved))
        train(second, stop, measuring.CRASH["steps"])
        return *(
            [np.asarray(a) for a in jax.tree_util.tree_leaves(t.params) if a.ndim == 2]
            for t in (whole, second)
        ), "all state is in one tree, which the user saves"

    def kinds(self):
        text, image = jnp.zeros((2, 6, 8)), jnp.zeros((2, 8, 8, 4))

        class Custom(nn.Module):
            @nn.compact
            def __call__(self, x):
                return x @ self.param("kernel", nn.initializers.normal(), (8, 8))

        of = {
            "dense": (nn.Dense(8), text),
            "convolution 1D": (nn.Conv(8, (3,)), text),
            "convolution 2D": (nn.Conv(8, (3, 3)), image),
            "convolution 3D": (nn.Conv(8, (3, 3, 3)), jnp.zeros((2, 4, 4, 4, 2))),
            "transposed convolution": (nn.ConvTranspose(8, (3, 3)), image),
            "LSTM": (nn.RNN(nn.LSTMCell(8)), text),
            "GRU": (nn.RNN(nn.GRUCell(8)), text),
            "attention": (nn.SelfAttention(2), text),
            "einsum dense": (nn.DenseGeneral((2, 4)), text),
            "kernel of an own layer": (Custom(), text),
            "layers inside of layers": (nn.Sequential([nn.Sequential([nn.Dense(8)])]), text),
        }
        found = {}
        for name, (model, x) in of.items():
            try:
                params = model.init(jax.random.PRNGKey(0), x)["params"]
                state = updater_of().wrap_optax(sgd()).init(params)
                weights = jax.tree_util.tree_flatten_with_path(params)[0]
                masks = jax.tree_util.tree_flatten_with_path(state.masks)[0]
                total, masked = (
                    sum(w.size for path, w in leaves if "kernel" in str(path[-1]))
                    for leaves in (weights, masks)
                )
                found[name] = masked / total
                if any("bias" in str(path[-1]) for path, _ in masks):
                    found[name] = f"{masked / total:.0%}, and biases of rank 2"
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"[:160]
        return found

    def next_mask(self, method, weights, mask, gradient, num_update):
        algorithm = {"RigL": sparse_trainers.RigL, "SET": sparse_trainers.SET}[method]
        updater = algorithm(drop_fraction_fn=lambda _: DROP_FRACTION)
        state = updater.wrap_optax(sgd()).init({"w": jnp.asarray(weights)})
        state = state._replace(masks={"w": jnp.asarray(mask, state.masks["w"].dtype)})
        new = updater.update_state(state, {"w": jnp.asarray(weights)}, {"w": jnp.asarray(gradient)})
        return np.asarray(new.masks["w"]) > 0


if __name__ == "__main__":
    measuring.main(JaxPruner())

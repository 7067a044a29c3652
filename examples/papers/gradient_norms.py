"""Which normalization amplifies the gradient of a sparse layer, and by how much?

    python examples/papers/gradient_norms.py            # five seeds, two minutes
    python examples/papers/gradient_norms.py --dataset mnist --data_dir /data/tfds
    python examples/papers/gradient_norms.py --quick

The SparseOpt paper (its figure 2 and appendix D) says: Batch Normalization divides each neuron by
its σ, which shrinks by √(1 − s), so the gradient of the weights grows by 1/√(1 − s); without a
normalization it does not; Layer Normalization does the same to the layer as a whole.

Measured at initialization on scikit-learn's digits, or as many images of MNIST, as one batch: an
MLP with one or two sparse hidden layers, random masks, and a dense classifier. The ratio is that of
the root mean square of the first layer's active weights' gradients in the sparse network to that in
the dense one, of the same weights.
"""

import keras
import numpy as np
from driver import arguments, command, write
from sklearn.datasets import load_digits

import keras_sparseopt as kso
from keras_sparseopt.masks import num_active, random_mask

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
WIDTH = 256
NORMALIZATIONS = {
    "BatchNorm": keras.layers.BatchNormalization,
    "LayerNorm": keras.layers.LayerNormalization,
    "GroupNorm": lambda: keras.layers.GroupNormalization(groups=8),
    "none": keras.layers.Identity,
}


def load(dataset, data_dir=None):
    """(images, labels), images flat and of mean 0 and variance 1."""
    if dataset == "digits":
        images, labels = load_digits(return_X_y=True)
    else:
        import tensorflow_datasets as tfds

        data = tfds.load(dataset, split="train", data_dir=data_dir, as_supervised=True)
        images, labels = next(iter(data.take(1797).batch(1797).as_numpy_iterator()))
        images = images.reshape(len(images), -1)
    images = images.astype("float32")
    return (images - images.mean()) / images.std(), labels


def network(inputs, hidden, normalization, seed):
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((inputs,))]
    for _ in range(hidden):
        layers += [
            kso.SparseDense(WIDTH, use_bias=False, kernel_initializer="he_normal"),
            NORMALIZATIONS[normalization](),
            keras.layers.ReLU(),
        ]
    model = keras.Sequential([*layers, keras.layers.Dense(10)])
    model.compile(
        kso.SparseOpt(keras.optimizers.SGD(0.0)),  # it only has to show the gradients
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def gradient_rms(hidden, normalization, seed, sparsities, data):
    """Root mean square of the first layer's active weights' gradients, for every sparsity."""
    model = network(data[0].shape[1], hidden, normalization, seed)
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    lease = optimizer.lease_gradients()
    layers = kso.sparse_layers(model)
    dense = [keras.ops.convert_to_numpy(layer.kernel) for layer in layers]
    rms = []
    for sparsity in sparsities:
        for index, (layer, weights) in enumerate(zip(layers, dense)):
            kso.set_mask(layer, np.ones(weights.shape, bool))
            layer.kernel.assign(weights)
            count = num_active(weights.size, sparsity)
            kso.set_mask(layer, random_mask(weights.shape, count, [seed, index]))
        model.train_on_batch(*data)
        gradient = keras.ops.convert_to_numpy(lease.gradient(layers[0].kernel))
        mask = keras.ops.convert_to_numpy(layers[0].kernel_mask)
        rms.append(float(np.sqrt(np.mean(gradient[mask] ** 2))))
    return rms


def measure(sparsities, seeds, data):
    """Ratios to the dense network: {sparse layers: {normalization: [seed][sparsity]}}."""
    ratios: dict = {}
    for hidden in (1, 2):
        for normalization in NORMALIZATIONS:
            rms = np.array(
                [gradient_rms(hidden, normalization, seed, sparsities, data) for seed in seeds]
            )
            ratios.setdefault(hidden, {})[normalization] = (rms / rms[:, :1]).tolist()
            keras.backend.clear_session()
    return ratios


def table(ratios, sparsities):
    yield f"{'sparsity':>10}{'1/√(1−s)':>10}" + "".join(f"{name:>12}" for name in ratios)
    for i, sparsity in enumerate(sparsities):
        cells = "".join(f"{np.mean(np.array(v)[:, i]):>12.2f}" for v in ratios.values())
        yield f"{sparsity:>10}{1 / np.sqrt(1 - sparsity):>10.2f}{cells}"


def picture(ratios, sparsities, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
    theory = 1 / np.sqrt(1 - np.array(sparsities))
    titles = ("one sparse layer", "two sparse layers, gradient of the first")
    for axis, title, (_, of_depth) in zip(axes, titles, ratios.items()):
        axis.plot(sparsities, theory, "k--", label="theory: 1/√(1 − s)")
        for name, values in of_depth.items():
            values = np.array(values)
            axis.errorbar(
                sparsities, values.mean(0), values.std(0), marker="o", ms=4, capsize=2, label=name
            )
        axis.set(xlabel="sparsity s", title=title, yscale="log")
        axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gradient of active weights,\nsparse over dense")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = arguments(__doc__, seeds=5, quick="one seed, three sparsities")
    parser.add_argument("--dataset", choices=["digits", "mnist"], default="digits")
    args = parser.parse_args(argv)
    seeds = range(1 if args.quick else args.seeds)
    sparsities = (0.0, 0.5, 0.9) if args.quick else SPARSITIES
    ratios = measure(sparsities, seeds, load(args.dataset, args.data_dir))
    for hidden, of_depth in ratios.items():
        print(f"sparse layers: {hidden}; mean over {len(seeds)} seeds")
        print("\n".join(table(of_depth, sparsities)), "\n")
    args.output.mkdir(parents=True, exist_ok=True)
    picture(ratios, sparsities, args.output / "gradient_norms.png")
    content = {
        "settings": {"data": args.dataset, "width": WIDTH, "seeds": len(seeds)},
        "sparsities": sparsities,
        "ratios": ratios,
    }
    write(content, args.output / "gradient_norms.json", command(__file__, argv))
    print(f"→ {args.output}/gradient_norms.json, gradient_norms.png")
    return content


if __name__ == "__main__":
    main()

"""What training costs when weights are condensed: dense time over condensed time, and bytes.

    python benchmarks/train_faster.py

Each backend runs in a process of its own. Dense is always the faster of its ways (in TensorFlow
with and without XLA, in PyTorch eager and by `torch.compile`), and so is condensed; steps of `fit`
are eager in PyTorch, as is Keras' default there. Dense and condensed take turns; ratios of medians.
JAX's processes get their memory in huge pages, unless `--pages small`: Linux hands out what a step
needs anew each time.

| part | what is timed |
|---|---|
| layer | one Dense layer, forward and backward, compiled |
| step | a step of `fit`: Adam when dense; SparseOpt(Adam), one update of RigL in each `fit` |
| update | one mask update of a condensed 4096² layer, over a copy of the dense weight |
| forward | the network of the layer alone, compiled, for few rows |
| memory | how far steps of `fit` raise a process's resident memory at the peak (Linux) |
"""

import argparse
import datetime
import functools
import gc
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

PARTS = "layer", "forward", "step", "update", "memory"
TILES = (1, 32), (1, 64), (1, 128), (16, 64), (64, 64)
LAYERS = [  # rows, inputs, neurons, sparsity, tile
    *((rows, 1024, 1024, 0.9, tile) for rows in (128, 512) for tile in TILES),
    *((rows, 1024, 1024, zeros, (1, 64)) for rows in (128, 512) for zeros in (0.8, 0.95)),
    *((512, width, width, 0.9, (1, 64)) for width in (128, 256, 512, 2048)),
]
STEPS = [  # network, batch, sparsity, tile, steps
    *(("MLP 4 × 1024", 128, 0.9, tile, 50) for tile in TILES),
    *(("MLP 4 × 1024", 128, zeros, (1, 64), 50) for zeros in (0.8, 0.95)),
    *(("MLP 4 × 1024", 512, 0.9, tile, 50) for tile in ((1, 64), (1, 128))),
    *(("transformer d 512", 16, 0.9, tile, 50) for tile in ((1, 64), (1, 128))),
    ("BERT d 512", 16, 0.9, (1, 64), 50),
    *(("1×1 convolutions 128/256/512", 32, zeros, (1, 64), 25) for zeros in (0.9, 0.99)),
    ("1×1 convolutions 6 × 512", 32, 0.9, (1, 64), 25),
    ("keras.applications.MobileNet", 32, 0.9, (1, 64), 25),
    ("ResNet 64/128/256", 64, 0.9, (1, 64), 25),
]
MEMORY = [  # network, batch, sparsity, tile; small ones would show what compiling takes
    (name, batch, 0.9, (1, 64))
    for name in ("MLP 4 × 4096", "transformer d 512")
    for batch in (32, 256)
]
FORWARDS = [(rows, 1024, 1024, 0.9, (1, 64)) for rows in (1, 8, 128)]
AIMS = [
    "aims: layer 1024², 1×64: 3 × at 128 rows, 2 × at 512; step: MLP 2.5 × / 2 ×, transformer and "
    "BERT (JAX) 1.8 ×; bytes 0.15; update at most 1; forward not slower from 8 rows on",
]


def networks(name):
    """A function that makes the network, and one that makes inputs and targets of a batch."""
    import keras
    import numpy as np
    from keras import layers

    def mlp():
        width = int(name.split()[-1])
        return keras.Sequential(
            [
                keras.Input((width,)),
                *(layers.Dense(width, "relu") for _ in range(4)),
                layers.Dense(10),
            ]
        )

    def transformer(width=512, tokens=64, blocks=2):
        inputs = keras.Input((tokens, width))
        x = inputs
        for _ in range(blocks):
            h = layers.LayerNormalization()(x)
            x = x + layers.MultiHeadAttention(8, width // 8)(h, h)
            h = layers.LayerNormalization()(x)
            x = x + layers.Dense(width)(layers.Dense(4 * width, "gelu")(h))
        return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))

    def narrow():
        inputs = x = keras.Input((16, 16, 3))
        x = layers.Conv2D(64, 3, padding="same", use_bias=False)(x)
        blocks = (128, 1), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)
        if name.endswith("6 × 512"):  # MobileNet has five such blocks, of 13
            blocks = (512, 2), *(5 * [(512, 1)])
        for width, strides in blocks:
            x = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
            x = layers.Conv2D(width, 1, use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))

    def mobilenet():
        backbone = keras.applications.MobileNet((64, 64, 3), include_top=False, weights=None)
        outputs = layers.GlobalAveragePooling2D()(backbone.output)
        return keras.Model(backbone.inputs, layers.Dense(10)(outputs))

    def resnet():
        inputs = x = keras.Input((16, 16, 3))
        x = layers.Conv2D(64, 3, padding="same", use_bias=False)(x)
        for width, strides in ((64, 1), (128, 2), (256, 2)):
            short = x
            if strides > 1:
                short = layers.Conv2D(width, 1, strides, use_bias=False)(x)
            for step in (strides, 1):
                x = layers.ReLU()(layers.BatchNormalization()(x))
                x = layers.Conv2D(width, 3, step, padding="same", use_bias=False)(x)
            x = layers.Add()([x, short])
        x = layers.GlobalAveragePooling2D()(layers.ReLU()(layers.BatchNormalization()(x)))
        return keras.Model(inputs, layers.Dense(10)(x))

    def bert():
        import keras_hub

        backbone = keras_hub.models.BertBackbone(
            vocabulary_size=1000, num_layers=2, num_heads=8, hidden_dim=512,
            intermediate_dim=2048, max_sequence_length=64,
        )  # fmt: skip
        outputs = layers.Dense(10)(backbone.output["pooled_output"])
        return keras.Model(backbone.inputs, outputs)

    rng = np.random.default_rng(0)

    def batch_of(number):
        y = rng.integers(0, 10, number)
        if name.startswith("MLP"):
            return rng.normal(size=(number, int(name.split()[-1]))).astype("float32"), y
        if name.startswith("transformer"):
            return rng.normal(size=(number, 64, 512)).astype("float32"), y
        if name[0] in "1Rk":
            size = 64 if name[0] == "k" else 16
            return rng.normal(size=(number, size, size, 3)).astype("float32"), y
        ones = np.ones((number, 64), "int32")
        tokens = rng.integers(0, 1000, (number, 64)).astype("int32")
        return {"token_ids": tokens, "segment_ids": 0 * ones, "padding_mask": ones}, y

    makers = {"M": mlp, "t": transformer, "B": bert, "1": narrow, "R": resnet, "k": mobilenet}
    return makers[name[0]], batch_of


def turns(ways, seconds):
    """Medians in ms of functions that take turns, after each was called once."""
    for way in ways:
        way()
    times: list[list[float]] = [[] for _ in ways]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for way, own in zip(ways, times):
            start = time.perf_counter()
            way()
            own.append(time.perf_counter() - start)
    return [1000 * statistics.median(own) for own in times]


def compiled_ways(function, backward):
    """A function of tensors, or that and its gradients, in all ways that a backend compiles it."""
    from keras_sparseopt.backend import NAME

    step = functools.partial(sum_and_gradients, function) if backward else function
    if NAME == "jax":
        import jax

        return [jax.jit(step)]
    if NAME == "torch":
        import torch

        torch._dynamo.config.recompile_limit = 100  # each case is a function of its own
        compiled = torch.compile(function)
        return [step, functools.partial(sum_and_gradients, compiled) if backward else compiled]
    import tensorflow as tf

    return [tf.function(step, jit_compile=jit, autograph=False) for jit in (True, False)]


def sum_and_gradients(function, *values):
    """The sum of a function's result, without which it need not be computed, and its gradients."""
    from keras_sparseopt.backend import NAME

    if NAME == "jax":
        import jax

        return jax.value_and_grad(lambda v: function(*v).sum())(values)
    if NAME == "torch":
        import torch

        values = [value.detach().requires_grad_() for value in values]
        total = function(*values).sum()
        return total.detach(), torch.autograd.grad(total, values)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(values)
        total = tf.reduce_sum(function(*values))
    return total, tape.gradient(total, values)


def layer_arrays(rows, inputs, neurons, sparsity, tile):
    import numpy as np

    import keras_sparseopt as kso
    from keras_sparseopt.forms import Geometry

    structure = kso.Block(*tile, balanced=True)
    geometry = Geometry(structure, (inputs, neurons), (1,), (0,), True)
    units = geometry.units
    count = units.nearest(round((1 - sparsity) * inputs * neurons))
    mask = units.random_mask(count, 0)
    form = geometry._replace(tiles=count // units.unit_shape[2]).form
    rng = np.random.default_rng(0)
    kernel = (rng.normal(size=(inputs, neurons)) * mask).astype("float32")
    pattern = form.of_mask(mask)
    x = rng.normal(size=(rows, inputs)).astype("float32")
    return x, kernel, form.stored(kernel, pattern), pattern


def waited(function, arrays):
    import keras

    from keras_sparseopt.backend import host

    host(keras.tree.flatten(function(*arrays))[0])  # the sum, of one number, if there is one


def time_layer(case, seconds, backward):
    import numpy as np
    from keras import ops

    from keras_sparseopt.models.condensed import multiply, transposed

    x, kernel, values, pattern = layer_arrays(*case)
    factor = np.random.default_rng(1).normal(size=(x.shape[0], kernel.shape[1]))
    factor, pattern = ops.convert_to_tensor(factor, "float32"), ops.convert_to_tensor(pattern)

    def dense(x, kernel):
        return ops.matmul(x, kernel) * factor

    def sparse(x, values):
        return multiply(transposed(x, (1, 0)), values, pattern, as_columns=True) * factor

    found = []
    for function, stored in ((dense, kernel), (sparse, values)):
        arrays = [ops.convert_to_tensor(array) for array in (x, stored)]
        ways = compiled_ways(function, backward)
        found.append([functools.partial(waited, way, arrays) for way in ways])
    times = turns([*found[0], *found[1]], seconds)
    number = len(found[0])
    return min(times[:number]), min(times[number:])


def made(name, sparsity, tile, jit):
    """The dense or (with a tile) the condensed network, compiled for training."""
    import keras

    import keras_sparseopt as kso

    make, _ = networks(name)
    keras.utils.set_random_seed(0)
    model = make()
    optimizer = keras.optimizers.Adam(1e-3)
    if tile is not None:
        structure, left = kso.Block(*tile, balanced=True), [model.layers[-1]]
        first = next((x for x in model.layers if isinstance(x, keras.layers.Conv2D)), None)
        left += [] if first is None else [first]  # three channels
        kso.sparsify(model, sparsity, "uniform", exclude=left, structure=structure)
        kso.condense(model)
        optimizer = kso.SparseOpt(optimizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=jit)
    return model


def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def time_step(name, batch, sparsity, tile, steps, rounds):
    import keras
    from common import bytes_of

    import keras_sparseopt as kso

    _, batch_of = networks(name)
    x, y = batch_of(batch * steps)
    jits = {"jax": (True,), "torch": (False,), "tensorflow": (True, False)}[keras.backend.backend()]
    kinds = [(t, jit) for t in (None, tile) for jit in jits]
    models = [made(name, sparsity, t, jit) for t, jit in kinds]

    def fit(model, tile):
        callbacks = [] if tile is None else [kso.RigL(update_every=steps, end_step=10**6)]
        gc.collect()  # of graphs this takes 0.5 to 5 s, and would fall on any of the networks
        gc.disable()
        faults, start = page_faults(), time.perf_counter()
        model.fit(x, y, batch_size=batch, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
        took = time.perf_counter() - start
        gc.enable()
        return 1000 * took / steps, (page_faults() - faults) / steps

    measured: dict = {kind: [] for kind in kinds}
    for turn in range(rounds + 1):
        for kind, model in zip(kinds, models):
            found = fit(model, kind[0])
            if turn:  # the first one compiles
                measured[kind].append(found)
    times, faults = (
        {kind: statistics.median(found[i] for found in own) for kind, own in measured.items()}
        for i in range(2)
    )
    dense = min((kind for kind in kinds if kind[0] is None), key=times.get)
    sparse = min((kind for kind in kinds if kind[0] is not None), key=times.get)
    share = bytes_of(models[-1]) / bytes_of(models[0])
    del models
    gc.collect()
    more = {"bytes": share, "dense jit": dense[1], "condensed jit": sparse[1]}
    more |= {"dense page faults": faults[dense], "condensed page faults": faults[sparse]}
    return times[dense], times[sparse], more


def peak_of(name, batch, sparsity, tile, with_update):
    """Prints by how many bytes training raises this process's memory."""
    import keras
    from common import reset_peak, resident

    import keras_sparseopt as kso

    _, batch_of = networks(name)
    x, y = batch_of(4 * batch)
    keras.ops.convert_to_numpy(
        keras.ops.ones((2, 2)) @ keras.ops.ones((2, 2))
    )  # starts the backend
    before = resident("VmRSS")
    model = made(name, sparsity, tile, "auto")
    method = [kso.RigL(update_every=2, end_step=10**6)] if with_update else []

    def fit():
        model.fit(x, y, batch_size=batch, shuffle=False, verbose=0, callbacks=method)

    fit()  # compiles, which takes memory of its own
    reset_peak()
    fit()
    print(json.dumps(resident("VmHWM") - before))


def peak(*case):
    """`peak_of` in a process of its own."""
    from common import LITTLE_SLACK

    environment = os.environ | LITTLE_SLACK | {"GLIBC_TUNABLES": ""}
    command = [sys.executable, __file__, "--worker", "--peak_of", json.dumps(case)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def time_update(seconds):
    import keras
    import numpy as np

    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((4096,)), keras.layers.Dense(4096)])
    kso.sparsify(model, 0.9, structure=kso.Block(1, 64, balanced=True))
    kso.condense(model)
    model.compile(kso.SparseOpt(keras.optimizers.Adam(1e-3)), "mse")
    model.optimizer.build(model.trainable_variables)
    method = kso.SET(update_every=1, end_step=10**6)
    method.begin(model.optimizer, 10**6)
    plain = np.ones((4096, 4096), "float32")

    def update():
        method.seed += 1  # other tiles grow each time
        method.update_masks()

    return turns([plain.copy, update], seconds)


def pages(args, backend):
    """The size of the pages in which memory comes, where it matters."""
    return args.pages if backend == "jax" else None


def worker(args):
    import warnings

    import keras

    warnings.filterwarnings("ignore")

    backend = keras.backend.backend()

    def tell(part, case, dense, sparse, **more):
        row = {
            "part": part, **case, "backend": backend, "pages": pages(args, backend),
            "dense ms": dense, "condensed ms": sparse, "×": dense / sparse, **more,
        }  # fmt: skip
        print(json.dumps(row), flush=True)

    names = "rows", "inputs", "neurons", "sparsity", "tile"
    for part, cases in (("layer", LAYERS), ("forward", FORWARDS)):
        for case in cases if part in args.parts else ():
            found = time_layer(case, args.seconds, part == "layer")
            tell(part, dict(zip(names, case)), *found)
    for case in STEPS if "step" in args.parts else ():
        if case[0].startswith(args.network):
            dense, sparse, more = time_step(*case, args.rounds)
            columns = "network", "batch", "sparsity", "tile", "steps"
            tell("step", dict(zip(columns, case)), dense, sparse, **more)
    for name, batch, sparsity, tile in MEMORY if "memory" in args.parts else ():
        if not name.startswith(args.network):
            continue
        ways = (None, False), (tile, False), (tile, True)
        dense, sparse, updated = (peak(name, batch, sparsity, *way) for way in ways)
        row = {
            "part": "memory", "backend": backend, "network": name, "batch": batch,
            "sparsity": sparsity, "tile": tile, "dense MB": dense / 1e6,
            "condensed MB": sparse / 1e6, "bytes": sparse / dense,
            "bytes with a mask update": updated / dense,
        }  # fmt: skip
        print(json.dumps(row), flush=True)
    if "update" in args.parts:
        copy, update = time_update(args.seconds)
        case = {"inputs": 4096, "neurons": 4096, "sparsity": 0.9, "tile": (1, 64)}
        tell("update", case, copy, update, **{"update over copy": update / copy})


CASE = "part backend pages network batch rows inputs neurons sparsity tile".split()


def case_of(row):
    return tuple(str(row.get(column)) for column in CASE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS))
    parser.add_argument("--network", default="", help="only networks whose name begins so")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each layer")
    parser.add_argument("--rounds", type=int, default=2, help="fits of each network")
    parser.add_argument("--backends", nargs="+", default=["tensorflow", "jax", "torch"])
    parser.add_argument("--pages", default="huge", choices=("huge", "small"), help="JAX's memory")
    parser.add_argument("--no_file", action="store_true", help="only print")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        peak_of(*json.loads(args.peak_of))
        return
    if args.worker:
        worker(args)
        return
    rows = []
    for backend in args.backends:
        environment = os.environ | {"KERAS_BACKEND": backend}
        if pages(args, backend) == "huge":
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        process = subprocess.Popen(
            [sys.executable, pathlib.Path(__file__), "--worker", *sys.argv[1:]],
            env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        for line in process.stdout:
            if line.startswith("{"):
                today = datetime.date.today().isoformat()
                rows.append({**json.loads(line), "date": today})  # parts may be measured one by one
                told = {k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}
                print(told, flush=True)
        if process.wait():
            raise SystemExit(process.returncode)
    if args.no_file:
        return
    from common import RESULTS, command, report

    rows = [row | {"command": command("train_faster")} for row in rows]
    path = RESULTS / "train_faster.json"
    if path.exists():  # what was not measured now stays
        old = json.loads(path.read_text())["rows"]
        rows = list({case_of(row): row for row in old + rows}.values())
    columns = list(dict.fromkeys(column for row in rows for column in row))
    rows = [{column: row.get(column) for column in columns} for row in rows]
    report("train_faster", rows, AIMS, both_backends=True)


if __name__ == "__main__":
    main()

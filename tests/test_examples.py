"""The examples run end to end in their quick setting."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest


@pytest.mark.backend("tensorflow")  # the next test runs an example on both
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_digits(tmp_path, capsys):
    import digits

    digits.main(["--quick", "--output", str(tmp_path)])
    output = capsys.readouterr().out
    results = json.loads((tmp_path / "digits.json").read_text())
    for runs in results["runs"].values():
        (training,) = runs
        assert len(training["test_accuracy"]) == 2
        assert training["sparsity"] == pytest.approx(0.95, abs=1e-4)
        assert training["itop_rate"] > 0.05
    assert "percentage points" in output and "ITOP rate" in output
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.backend("tensorflow")  # as `make demo` runs it
def test_train_faster(tmp_path, capsys):
    import train_faster

    results = train_faster.main(["--quick", "--output", str(tmp_path)])
    assert json.loads((tmp_path / "train_faster.json").read_text())["runs"] == results["runs"]
    dense, sparse, longer = results["runs"]
    assert dense["steps"] == sparse["steps"] == 16
    assert 0.08 < sparse["bytes"] / dense["bytes"] < 0.2
    for run in (dense, sparse, longer):
        assert run["seconds"][-1] == pytest.approx(run["steps"] * run["ms_per_step"] / 1000)
        assert 0 < run["test_accuracy"][-1] < 1
    assert "ms/step" in capsys.readouterr().out
    assert (tmp_path / "train_faster.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.backend("jax")
def test_a_loop_in_one_jit_learns_and_moves_masks(capsys):
    import loop_jax

    accuracy, itop_rate = loop_jax.main()
    assert accuracy > 0.95 and itop_rate > 0.11
    counts = capsys.readouterr().out.rpartition("[")[2].strip("]\n").split(", ")
    # 10 % of 64 · 128 + 128 · 10 weights; some just grown ones may still be 0.
    assert 0.97 * 947 <= sum(map(int, counts)) <= 947


@pytest.mark.backend("torch")
def test_a_loop_in_pytorch_learns_and_moves_masks(capsys):
    import loop_torch

    accuracy, itop_rate = loop_torch.main()
    assert accuracy > 0.93 and itop_rate > 0.15
    first, last = capsys.readouterr().out.rpartition("[")[2].strip("]\n").split(", ")
    # 10 % of 64 · 128 + 128 · 10 weights; some just grown ones may still be 0.
    assert 0.97 * 947 <= int(first) + int(last) <= 947


@pytest.mark.backend("tensorflow", "torch")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_cifar_resnet_resumes_exactly_by_the_same_command(tmp_path, monkeypatch):
    """On made-up images: an interrupted run, started again, equals the uninterrupted one."""
    tfds = pytest.importorskip("tensorflow_datasets")
    import cifar_resnet
    import keras

    class Crash(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def command(output):
        return ["--output", str(output), "--steps_per_epoch", "2", "--epochs", "2",
                "--method", "set", "--optimizer", "sparseopt", "--sparsity", "0.9"]  # fmt: skip

    monkeypatch.setattr(cifar_resnet, "UPDATE_EVERY", 1)
    monkeypatch.setattr(cifar_resnet, "BATCH_SIZE", 16)
    with tfds.testing.mock_data(num_examples=40):
        straight = cifar_resnet.main(command(tmp_path / "a"))
        plain = cifar_resnet.make_callbacks
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cifar_resnet, "make_callbacks", lambda *args: [*plain(*args), Crash()])
            cifar_resnet.main(command(tmp_path / "b"))
        resumed = cifar_resnet.main(command(tmp_path / "b"))
        again = cifar_resnet.main(command(tmp_path / "b"))
    del straight["history"]["seconds_per_step"]
    for run in (resumed, again):
        assert run["history"].pop("seconds_per_step")
        assert run["history"] == straight["history"]
    assert straight["history"]["itop_rate"][-1] > 0.1


@pytest.mark.backend("tensorflow")  # the test above runs the example on both
@pytest.mark.parametrize("method, optimizer", [("dense", "sgd"), ("rigl", "ham")])
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:RigL will not act")
def test_cifar_resnet_options(tmp_path, method, optimizer, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    import cifar_resnet

    monkeypatch.setattr(cifar_resnet, "BATCH_SIZE", 16)
    with tfds.testing.mock_data(num_examples=40):
        results = cifar_resnet.main(
            ["--output", str(tmp_path), "--steps_per_epoch", "1", "--epochs", "1",
             "--dataset", "cifar100", "--method", method, "--optimizer", optimizer]
        )  # fmt: skip
    assert 0 <= results["test_accuracy"] <= 1
    with pytest.raises(SystemExit, match="nothing to correct"):
        cifar_resnet.make_optimizer("sparseopt", "dense", 0.1)


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    from made_up_imagenet import write_imagenet

    directory = tmp_path_factory.mktemp("tfds")
    write_imagenet(directory, training=24, validation=11, smallest=40, largest=200)
    return directory


@pytest.mark.backend("tensorflow")  # JAX: the same program, tried by hand
def test_imagenet_example_on_two_devices(imagenet, tmp_path):
    """Trains an epoch, dies, and by the same command trains the other one."""
    program = pathlib.Path(__file__).parent / "programs" / "imagenet.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, program, imagenet, tmp_path]
    first = subprocess.run([*command, "--crash"], env=environment, capture_output=True, text=True)
    assert first.returncode == 9, first.stderr[-3000:]
    assert not list(tmp_path.glob("*/results.json"))
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "Epoch 2/2" in second.stdout and "Epoch 1/2" not in second.stdout
    (run,) = tmp_path.iterdir()
    results = json.loads((run / "results.json").read_text())
    assert len(results["history"]["val_accuracy"]) == 2 and results["replicas"] == 2
    assert results["history"]["sparsity"][-1] == pytest.approx(0.95, abs=1e-4)
    assert list((run / "tensorboard").rglob("events*"))


@pytest.fixture
def pipeline(imagenet):
    from imagenet_data import ImageNet

    return ImageNet(imagenet, image_size=32, shuffle_buffer=8)


def batches(dataset):
    return [tuple(np.asarray(part) for part in batch) for batch in dataset]


def test_imagenet_order_depends_on_seed_and_epoch_only(pipeline):
    whole = batches(pipeline.training(8, 3, first_epoch=0, epochs=2))
    assert len(whole) == 6 and whole[0][0].shape == (8, 32, 32, 3)
    for (a, _), (b, _) in zip(whole[3:], batches(pipeline.training(8, 3, 1, 2)), strict=True):
        np.testing.assert_array_equal(a, b)
    labels = [np.argmax(y, 1) for _, y in whole]
    for epoch in (labels[:3], labels[3:]):
        assert sorted(np.concatenate(epoch)) == list(range(24))  # every example once
    assert not np.array_equal(labels[0], labels[3])
    other = batches(pipeline.training(8, 3, 0, 1, seed=1))
    assert not np.array_equal(labels[0], np.argmax(other[0][1], 1))


def test_imagenet_workers_share_out_the_same_global_batches(pipeline):
    whole = batches(pipeline.training(8, 3, 0, 1))
    # Two workers with two replicas each: a step takes two batches of two from each worker.
    shares = [
        batches(pipeline.training(2, 3, 0, 1, worker=worker, workers=2, replicas=2))
        for worker in (0, 1)
    ]
    for step, (images, _) in enumerate(whole):
        for worker in (0, 1):
            mine = np.concatenate([x for x, _ in shares[worker][2 * step : 2 * step + 2]])
            np.testing.assert_array_equal(mine, images[worker::2])


def test_imagenet_validation_counts_every_example_once(pipeline):
    for workers in (1, 2):
        parts = [
            batch
            for worker in range(workers)
            for batch in batches(pipeline.validation(4, worker, workers))
        ]
        assert len(parts) == 12 // 4 if workers == 1 else 16 // 4
        labels = np.concatenate([np.argmax(y, 1) for _, y, _ in parts])
        weights = np.concatenate([w for _, _, w in parts])
        assert sorted(labels[weights > 0]) == list(range(24, 35))


def test_imagenet_crop_is_what_decoding_the_whole_image_gives(pipeline):
    """The centre crop, against decoding everything and cutting in NumPy."""
    import tensorflow as tf
    from imagenet_data import MEAN, STD

    files = [str(path) for path in pipeline.splits["validation"].filepaths]
    for record in tf.data.TFRecordDataset(files).take(3):
        jpeg, _ = pipeline._parsed(record)
        whole = tf.image.decode_jpeg(jpeg, channels=3).numpy()
        height, width = whole.shape[:2]
        side = round(min(height, width) * 224 / 256)
        top, left = (height - side) // 2, (width - side) // 2
        crop = tf.image.resize(whole[top : top + side, left : left + side], (32, 32)).numpy()
        image, _ = pipeline._centre(record)
        difference = np.abs(image - (crop - MEAN) / STD)
        # At the cut, JPEG colours are interpolated from inside of it only.
        assert difference.max() < 0.2 and np.median(difference) < 1e-5


@pytest.mark.backend("tensorflow")  # counts the same on both
def test_resnet50_costs_match_the_published_ones(tmp_path, capsys):
    import resnet50_costs

    results = resnet50_costs.main(["--output", str(tmp_path), "--sparsity", "0.8", "0.9"])
    assert len(results) == 4
    for result in results:
        assert round(result["as_published"], 2) == result["published"]
        assert len(result["layers"]) == 54 and result["weights"] == 25_502_912
    assert results[2]["active_weights"] == round(0.2 * 25_502_912)
    assert round(results[0]["flops_dense"] / 1e9, 1) == 8.2  # as published
    assert "0.42 ×" in capsys.readouterr().out


@pytest.mark.backend("tensorflow")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_gradient_norms_reads_mnist():
    tfds = pytest.importorskip("tensorflow_datasets")
    import gradient_norms

    with tfds.testing.mock_data(num_examples=10):
        images, labels = gradient_norms.load("mnist")
    assert images.shape == (10, 784) and labels.shape == (10,)
    assert images.mean() == pytest.approx(0, abs=1e-5) and images.std() == pytest.approx(
        1, rel=1e-4
    )


@pytest.mark.backend("tensorflow")  # no part of it is of a backend
def test_gradient_norms(tmp_path, capsys):
    """Batch Normalization amplifies as the theory says; without one the gradient does not grow."""
    import gradient_norms

    content = gradient_norms.main(["--quick", "--output", str(tmp_path)])
    for of_depth in content["ratios"].values():
        for name, ((dense, half, sparse),) in of_depth.items():
            assert dense == 1
            if name == "none":
                assert sparse < 1.1
            else:
                assert half == pytest.approx(0.5**-0.5, rel=0.2)
                assert sparse == pytest.approx(0.1**-0.5, rel=0.5)
    assert "1/√(1−s)" in capsys.readouterr().out
    assert (tmp_path / "gradient_norms.png").read_bytes().startswith(b"\x89PNG")

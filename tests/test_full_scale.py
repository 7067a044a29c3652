"""The task at the papers' scale, made small."""

import json
import os
import pathlib
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from helpers import array

# The driver has a train step for each of them.
pytestmark = pytest.mark.backend("tensorflow", "jax")

QUICK = {"epochs": 3, "widths": (8,), "blocks": 1, "update_every": 5, "sparsity": 0.9}


@pytest.fixture
def full_scale():
    import full_scale

    return full_scale


def normalized(images):
    from proxy import MEAN, STD

    return (images / 255 - np.array(MEAN)) / np.array(STD)


def test_images_on_the_device_by_hand(full_scale):
    """In testing as they are; in training a crop of the padded image, flipped or not."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 6, 6, 3)).astype("uint8")
    numbers = rng.permutation(20).astype("int32")
    layer = full_scale.OnDevice(images, seed=1)
    expected = normalized(images[numbers])
    np.testing.assert_allclose(array(layer(numbers)), expected, atol=1e-5)
    seen = array(layer(numbers, training=True))
    found = []
    for number, image in zip(numbers, seen):
        padded = normalized(np.pad(images[number], ((4, 4), (4, 4), (0, 0))))
        crops = {
            (top, left, flipped): padded[top : top + 6, left : left + 6][:, :: -1 if flipped else 1]
            for top in range(9)
            for left in range(9)
            for flipped in (False, True)
        }
        found += [[at for at, crop in crops.items() if np.allclose(image, crop, atol=1e-5)]]
    assert all(found)
    tops, lefts, flips = (set(values) for values in zip(*(at for (at, *_) in found)))
    assert len(tops) > 4 and len(lefts) > 4 and flips == {False, True}
    again = full_scale.OnDevice(images, seed=1)
    np.testing.assert_array_equal(array(again(numbers, training=True)), seen)
    assert np.any(array(again(numbers, training=True)) != seen)
    assert again.compute_output_shape((20,)) == seen.shape


def test_a_stopped_training_goes_on_with_the_same_bits(full_scale, tmp_path, monkeypatch):
    method = {"tensorflow": "rigl", "jax": "set"}[keras.backend.backend()]
    setting = {**QUICK, "method": method, "exponent": 0.5}
    data = full_scale.made_up()
    whole = full_scale.train(data, setting, tmp_path / "whole")
    assert len(whole["test_accuracy"]) == 3 and whole["steps"] == [10, 20, 30]

    begun = []

    class Stopped(full_scale.Clock):
        def on_epoch_begin(self, epoch, logs=None):
            super().on_epoch_begin(epoch)
            begun.append(epoch)
            if len(begun) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(full_scale, "Clock", Stopped)
    with pytest.raises(KeyboardInterrupt):
        full_scale.train(data, setting, tmp_path / "cut")
    cut = full_scale.train(data, setting, tmp_path / "cut")
    assert begun == [0, 1, 1, 2]
    assert cut.pop("seconds") > 0 and whole.pop("seconds") > 0
    assert cut == whole and whole["device"]
    assert whole["itop_rate"][-1] > whole["itop_rate"][0] > 0.1  # the masks moved


def test_datasets_from_a_file(full_scale, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 32, 32, 3)).astype("uint8")
    labels = np.array([[3], [99], [0], [7]])
    np.savez(
        tmp_path / "cifar100.npz",
        x_train=images[:3], y_train=labels[:3], x_test=images[3:], y_test=labels[3:],
    )  # fmt: skip
    (x, y), (test_x, test_y) = full_scale.Datasets(tmp_path)["cifar100"]
    np.testing.assert_array_equal(x, images[:3])
    np.testing.assert_array_equal(y, [3, 99, 0])
    assert test_x.shape == (1, 32, 32, 3) and list(test_y) == [7]


def test_no_data(full_scale, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(FileNotFoundError, match=r"cifar10.npz must hold x_train, y_train.*neither"):
        full_scale.Datasets(tmp_path)["cifar10"]


def sleep(data, setting):
    pathlib.Path(data, str(os.getpid())).touch()
    time.sleep(60)


@pytest.mark.backend("tensorflow")
def test_workers_end_with_their_command(tmp_path):
    """A killed command must not leave trainings behind that the next one starts again."""
    script = tmp_path / "command.py"
    script.write_text(
        "import functools, proxy, test_full_scale as test\n"
        "if __name__ == '__main__':\n"
        f"    directory = functools.partial(str, {str(tmp_path)!r})\n"
        "    with proxy.processes(1, directory, test.sleep) as pool:\n"
        "        pool.submit(proxy._run, {}).result()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = subprocess.Popen([sys.executable, str(script)], env=environment)
    while not (workers := [int(path.name) for path in tmp_path.glob("[0-9]*")]):
        assert command.poll() is None
        time.sleep(0.1)
    command.kill()
    command.wait()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(workers[0], 0)
            time.sleep(0.1)


@pytest.mark.backend("tensorflow")  # its train step has just been tested on both
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_experiments_at_full_scale(full_scale, tmp_path, capsys):
    """Run, resumed, merged: nothing is trained twice, and the time is known before."""
    import experiments

    arguments = ["cifar100", "--scale", "full", "--quick", "--output"]
    content = experiments.main([*arguments, str(tmp_path / "one")])
    (sparse_opt, ham) = content["comparisons"]["cifar100"]
    assert sparse_opt["seeds"] == ham["seeds"] == 2
    assert {run["setting"]["dataset"] for run in content["runs"]} == {"cifar100"}
    printed = capsys.readouterr().out
    assert "6 trainings, together 120 steps of " in printed and "1 at a time: about 0 h" in printed
    assert {run["result"]["backend"] for run in content["runs"]} == {keras.backend.backend()}
    quick = tmp_path / "one" / "quick"
    assert (quick / "cifar100-full.png").read_bytes().startswith(b"\x89PNG")
    assert not list((quick / "backups").iterdir())  # nobody needs them any more

    arguments_of_all = ["cifar100", "cifar10", "--scale", "full", "--quick", "--report", "--output"]
    reported = experiments.main([*arguments_of_all, str(tmp_path / "one")])
    assert reported["comparisons"]["cifar100"] == content["comparisons"]["cifar100"]
    assert reported["comparisons"]["cifar10"] == [] and "trainings, " not in capsys.readouterr().out

    half = json.loads((quick / "full_scale.json").read_text())
    half["runs"] = half["runs"][:5]
    (tmp_path / "half.json").write_text(json.dumps(half))
    merged = [str(tmp_path / "half.json"), str(quick / "full_scale.json")]
    again = experiments.main([*arguments, str(tmp_path / "two"), "--merge", *merged])
    assert again["runs"] == content["runs"]
    assert "trainings, " not in capsys.readouterr().out

    half["defaults"]["epochs"] = 7
    (tmp_path / "half.json").write_text(json.dumps(half))
    with pytest.raises(SystemExit, match="other defaults"):
        experiments.main([*arguments, str(tmp_path / "two"), "--merge", merged[0]])
    experiments.main(["--scale", "full", "--list"])
    listed = capsys.readouterr().out
    assert (
        "cifar10 " in listed and "twice_as_long" in listed and "sparsity_and_budget" not in listed
    )


def test_every_experiment_at_full_scale_is_made_of_known_settings(full_scale):
    import experiments
    import proxy

    for experiment in experiments.SCALES["full"].experiments.values():
        for base, other in experiment().values():
            pair = [proxy.full(setting, full_scale.DEFAULTS) for setting in (base, other)]
            assert pair[0] != pair[1]
            assert all(setting["dataset"] in full_scale.CLASSES for setting in pair)

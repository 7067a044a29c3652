"""The examples run end to end in their quick setting."""

import json

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
    for run in (resumed, again):
        for a, b in zip(straight["history"], run["history"], strict=True):
            assert {k: v for k, v in a.items() if k != "seconds_per_step"} == {
                k: v for k, v in b.items() if k != "seconds_per_step"
            }
    assert straight["history"][-1]["itop_rate"] > 0.1


@pytest.mark.backend("tensorflow")  # the test above runs the example on both
@pytest.mark.parametrize("method, optimizer", [("dense", "sgd"), ("rigl", "ham")])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
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

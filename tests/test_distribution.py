"""Several devices and several processes; each case in processes of its own."""

import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_sparseopt as kso

ROOT = pathlib.Path(__file__).parent.parent
PROGRAMS = ROOT / "tests" / "programs"


def start(program, *args, **environment):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "KERAS_BACKEND": keras.backend.backend(),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, PROGRAMS / program, *map(str, args)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(*processes):
    try:
        for process in processes:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output[-5000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def workers(count):
    """The environments that make processes of one machine work together."""
    ports = []
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    for listener in sockets:
        ports.append(listener.getsockname()[1])
        listener.close()
    addresses = [f"127.0.0.1:{port}" for port in ports]
    for index in range(count):
        if keras.backend.backend() == "tensorflow":
            task = {"type": "worker", "index": index}
            yield {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task})}
        elif keras.backend.backend() == "torch":
            yield {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0]),
                "WORLD_SIZE": str(count), "RANK": str(index),
            }  # fmt: skip
        else:
            yield {
                "KERAS_DISTRIBUTION_JOB_ADDRESSES": addresses[0],
                "KERAS_DISTRIBUTION_NUM_PROCESSES": str(count),
                "KERAS_DISTRIBUTION_PROCESS_ID": str(index),
            }


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("replicas", [2, 4])
def test_mirrored_strategy_equals_one_device(replicas):
    finish(start("mirrored.py", replicas))


@pytest.mark.backend("tensorflow")
def test_zeros_hold_with_replicas():
    finish(start("replicas.py"))


@pytest.mark.backend("tensorflow", "jax")
def test_condensed_weights_on_several_devices():
    finish(start("condensed_devices.py"))


@pytest.mark.backend("jax")
def test_jax_distributions_equal_one_device():
    finish(start("jax_devices.py"))


@pytest.mark.backend("jax")
def test_sharded_weights_of_two_processes_equal_one_device(tmp_path):
    """No process holds a mask whole; RigL and SET give the masks that one device gives."""
    finish(start("model_parallel.py", tmp_path / "one"))
    finish(*(start("model_parallel.py", tmp_path / "two", **env) for env in workers(2)))
    for worker in (0, 1):
        assert_close(tmp_path / f"two-{worker}.npz", tmp_path / "one-0.npz")


def assert_close(path, reference):
    result, expected = np.load(path), np.load(reference)
    assert result.files == expected.files
    for name in expected.files:
        if expected[name].dtype.kind == "f":
            np.testing.assert_allclose(
                result[name], expected[name], rtol=1e-3, atol=2e-5, err_msg=name
            )
        else:
            np.testing.assert_array_equal(result[name], expected[name], err_msg=name)


@pytest.mark.backend("torch")
@pytest.mark.parametrize("form", ["masked", "condensed"])
def test_two_processes_of_a_loop_equal_one(form, tmp_path):
    finish(start("ddp.py", form, tmp_path / "one"))
    finish(*(start("ddp.py", form, tmp_path / "two", **env) for env in list(workers(2))))
    expected = np.load(tmp_path / "one-0.npz")
    assert expected["itop"] > 0.55  # masks moved
    for worker in (0, 1):
        result = np.load(tmp_path / f"two-{worker}.npz")
        for name in expected.files:
            if "mask" in name:
                np.testing.assert_array_equal(result[name], expected[name], err_msg=name)
            else:
                np.testing.assert_allclose(result[name], expected[name], 1e-4, 1e-6, err_msg=name)


@pytest.mark.backend("tensorflow", "jax")
def test_two_processes_equal_one_and_resume_exactly(tmp_path):
    """Trains, masks identical in both, equal to one; one killed, both restarted: bit for bit."""
    reference = start("multiworker.py", "rigl", tmp_path / "one")
    finish(reference)
    finish(*(start("multiworker.py", "rigl", tmp_path / "two", **env) for env in workers(2)))
    for worker in (0, 1):
        assert_close(tmp_path / f"two-{worker}.npz", tmp_path / "one-0.npz")

    backup = ("--backup", tmp_path / "backup")
    survivor, victim = (
        start("multiworker.py", "rigl", tmp_path / "again", *backup, *die, **env)
        for env, die in zip(workers(2), [(), ("--die", 2)])
    )
    output, _ = victim.communicate(timeout=600)
    survivor.kill()
    survivor.communicate()
    assert victim.returncode == -signal.SIGKILL, output
    (tmp_path / "backup").rename(tmp_path / "backup-0")
    mixed = [
        start("multiworker.py", "rigl", tmp_path / "mixed", *backup, "--private", **env)
        for env in workers(2)
    ]
    for process in mixed:  # worker 1 would begin from the start
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 1 and "All workers must see the same" in output, output
    (tmp_path / "backup-0").rename(tmp_path / "backup")
    assert sorted(p.name for p in (tmp_path / "backup").iterdir())[-1] == "epoch-000002.npz"
    finish(
        *(start("multiworker.py", "rigl", tmp_path / "again", *backup, **env) for env in workers(2))
    )
    straight = np.load(tmp_path / "two-0.npz")
    for worker in (0, 1):
        resumed = np.load(tmp_path / f"again-{worker}.npz")
        for name in straight.files:
            np.testing.assert_array_equal(resumed[name], straight[name], err_msg=name)


@pytest.mark.backend("tensorflow")
def test_parameter_server_strategy_is_refused(monkeypatch):
    import tensorflow as tf

    class ParameterServer(tf.distribute.ParameterServerStrategy):
        def __init__(self):
            pass

    monkeypatch.setattr(tf.distribute, "get_strategy", ParameterServer)
    with pytest.raises(ValueError, match="ParameterServerStrategy is not supported"):
        kso.SparseOpt("sgd")


def test_strategy_names():
    backend = keras.backend.backend()
    with pytest.raises(ValueError, match="must be one of one, mirrored.*Received: name='many'"):
        kso.resolve_strategy("many")
    other = {"tensorflow": "data_parallel", "jax": "mirrored", "torch": "data_parallel"}[backend]
    with pytest.raises(ValueError, match=f"needs KERAS_BACKEND=.*Received: name='{other}'"):
        kso.resolve_strategy(other)
    assert kso.resolve_strategy("one").num_replicas == 1


@pytest.mark.backend("tensorflow")
def test_multiworker_without_cluster_is_refused(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(ValueError, match="TF_CONFIG"):
        kso.resolve_strategy("multiworker")


@pytest.mark.backend("tensorflow", "jax")
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_the_training_step_compiles_without_host_operations(method, monkeypatch):
    """What a TPU needs: static shapes, and nothing in the step that calls back to the host."""
    monkeypatch.syspath_prepend(str(PROGRAMS))
    import tiny

    model = tiny.model()
    images, labels = (values[:8] for values in tiny.data())
    model.optimizer.build(model.trainable_variables)
    model.train_on_batch(images, labels)  # makes the metrics
    keeps_gradients = tiny.method(method).begin(model.optimizer, total_steps=10)
    assert keeps_gradients == (method == "rigl")
    hlo = step_hlo(model, images, labels)
    assert "convolution" in hlo and "<=" not in hlo  # as in f32[<=8], a dynamic shape
    for host_operation in ("custom-call", "custom_call", "infeed", "outfeed", "callback", "send("):
        assert host_operation not in hlo, host_operation


def step_hlo(model, images, labels):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        step = tf.function(lambda x, y: model.train_step((x, y)), jit_compile=True)
        data = tf.constant(images), tf.constant(labels)
        step(*data)
        return step.experimental_get_compiler_ir(*data)(stage="hlo")
    import jax

    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    return jax.jit(model.train_step).lower(state, (images, labels)).as_text(dialect="hlo")


@pytest.mark.exhaustive
@pytest.mark.backend("torch")  # it starts processes on all three
def test_every_backend_goes_on_with_the_files_of_every_other(tmp_path):
    backends = "tensorflow", "jax", "torch"
    folders = [tmp_path / name for name in backends]
    write = functools.partial(start, "files_between.py", "write")
    finish(*(write(folder, KERAS_BACKEND=b) for folder, b in zip(folders, backends)))
    read = functools.partial(start, "files_between.py", "read", *folders)
    finish(*(read(KERAS_BACKEND=b) for b in backends))

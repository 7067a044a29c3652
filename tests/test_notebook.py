"""The notebook runs from top to bottom, in a tiny setting on made-up images."""

import os
import pathlib
import sys

import keras
import pytest

ROOT = pathlib.Path(__file__).parent.parent
TINY = """
SPARSITY, EPOCHS, STEPS_PER_EPOCH, BATCH_SIZE, LEARNING_RATE, UPDATE_EVERY = 0.95, 2, 2, 16, 0.1, 1
import tensorflow_datasets as tfds
made_up = tfds.testing.mock_data(num_examples=48)
made_up.__enter__()
"""


def check_stored(notebook):
    """What readers see is of one run from top to bottom, without errors and log lines."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.get("name", output.output_type) for output in outputs} == {
        "stdout",
        "display_data",
    }
    assert "test accuracy" in cells[-1].outputs[0].text


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_notebook(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("tensorflow_datasets")
    notebook = nbformat.read(ROOT / "examples" / "colab_tpu.ipynb", as_version=4)
    nbformat.validate(notebook)
    check_stored(notebook)
    (settings,) = (c for c in notebook.cells if c.source.startswith("# Settings"))
    settings.source = TINY
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    if keras.backend.backend() == "jax":  # as on a TPU: several devices
        monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "masked weights" in text and "Epoch 2/2" in text and "test accuracy" in text
    if keras.backend.backend() == "jax":
        assert "2 × " in text
    (picture,) = (o.data["image/png"] for o in outputs if "image/png" in o.get("data", {}))
    (tmp_path / "picture.b64").write_text(picture)
    assert (tmp_path / "cifar10_sparse.keras").exists()

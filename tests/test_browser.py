"""The networks of the browser page are as its JSON says; the page itself: `make browser-test`."""

import json
import pathlib

import keras
import numpy as np
import pytest

PAGE = pathlib.Path(__file__).parents[1] / "examples/browser"
ABOUT = json.loads((PAGE / "models/models.json").read_text())


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("network", ABOUT["networks"], ids=lambda network: network["name"])
def test_a_file_computes_what_its_description_says(network):
    from keras_sparseopt.deployment.convert import make_interpreter

    content = (PAGE / "models" / network["file"]).read_bytes()
    assert len(content) == network["bytes"]
    interpreter = make_interpreter(content)
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    for name, expected in zip(ABOUT["samples"], network["outputs"], strict=True):
        pixels = keras.utils.img_to_array(keras.utils.load_img(PAGE / "samples" / name))
        interpreter.set_tensor(given["index"], pixels[None] / 127.5 - 1)
        interpreter.invoke()
        outputs = interpreter.get_tensor(result["index"])[0]
        np.testing.assert_allclose(outputs, expected, atol=0.01 * np.abs(expected).max())
    assert len(expected) == len(ABOUT["classes"])


def test_the_dense_twin_was_trained_alike():
    dense, *sparse = sorted(ABOUT["networks"], key=lambda network: network["sparsity"])
    assert dense["sparsity"] == 0 and [x["sparsity"] for x in sparse] == [0.8, 0.9]
    for network in ABOUT["networks"]:
        assert network["test_accuracy"] > 0.5
        assert len(network["history"]["loss"]) == len(dense["history"]["loss"])
    assert dense["bytes"] > sparse[0]["bytes"] > sparse[1]["bytes"]

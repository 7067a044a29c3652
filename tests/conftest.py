import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis
import keras
import pytest

BACKEND = keras.backend.backend()

# The same examples in every run: CI must not fail by chance. For a search, run with
# --hypothesis-profile=default.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def fixed_seed():
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


def pytest_collection_modifyitems(items):
    for item in items:
        needed = item.get_closest_marker("backend")
        if needed and BACKEND not in needed.args:
            item.add_marker(pytest.mark.skip(reason=f"needs the backend {needed.args}"))


def pytest_configure(config):
    config.addinivalue_line("markers", "backend(name): runs on this Keras backend only")

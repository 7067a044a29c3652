import gc
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The suite compiles far longer than it computes, and the same programs several times. What it
# starts inherits this.
for setting, value in {
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(setting, value)

import hypothesis  # noqa: E402
import keras  # noqa: E402
import pytest  # noqa: E402

BACKEND = keras.backend.backend()

# The same examples in every run: CI must not fail by chance. For a search, run with
# --hypothesis-profile=default.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

gc.freeze()  # `clear_session` collects garbage: not among all that was imported


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

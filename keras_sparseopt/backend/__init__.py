"""What belongs to a backend of Keras: the same functions in one file for each, by capability.

| what is asked | by |
|---|---|
| is a computation recorded or run, where do arrays lie | `host`, `is_traced`, `init_scope`, `is_initialized`, `is_single_replica`, `are_on_host`, `is_whole`, `is_replicated` |
| how is a function compiled, what may it donate | `compiled`, `not_compiled`, `freed`, `gradient_function`, `without_gradients` |
| does a compiled step share variables, or know those of its state only | `STEPS_SHARE_VARIABLES`, `Tap`, `Seen` |
| how are rows gathered and multiplied, how does a product lie in memory | `rows_at`, `transposed_matmul`, `products_are_columns`, `settled` |
| was a variable written past Keras, is its memory its own | `num_writes`, `unshare` |
| what do random generators outside of layers hold | `generator_states`, `set_generator_states` |
| what do a model's operations do with its weights | `products_of` |
| which devices are there, what can train on them, what do they hold | `resolve`, `check_…`, `needs_own_loop`, `fit_in_own_loop`, `worker_index`, `colocated_scope`, `strategy_scope`, `copies_of_shards`, `of_all_workers`, `share_statistics`, `summed_over_replicas`, `num_replicas` |

No other module asks which backend it is. `tests/test_backend.py` checks that the files offer the
same names.
"""  # noqa: E501

import importlib
from typing import Any

import keras

from keras_sparseopt.backend.common import Devices

__all__ = ["NAME", "Devices", "host"]

NAME = keras.backend.backend()
if NAME not in ("tensorflow", "jax", "torch"):
    raise ImportError(
        "keras_sparseopt runs on the TensorFlow, JAX and PyTorch backends of Keras. Received: "
        f"KERAS_BACKEND={NAME}. Set KERAS_BACKEND before importing keras."
    )

_here = importlib.import_module(f"keras_sparseopt.backend.{NAME}")
host = _here.host


def __getattr__(name: str) -> Any:
    return getattr(_here, name)

import fnmatch
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


# What `make test` leaves to `make test-all`: patterns of tests, `!` before those that stay.
EXHAUSTIVE = {
    "test_full_scale.py": ["*"],
    "test_experiments.py": ["*"],
    "test_science.py": ["*"],
    "test_examples.py": ["*"],
    "test_notebook.py": ["*"],
    "test_tflite.py": ["*", "!*by_hand*", "!*refused*"],
    "test_browser.py": ["*"],
    "test_peers.py": ["*"],
    "test_typing.py": ["*"],
    "test_distribution.py": ["*equal*one*", "*condensed_weights*"],
    "test_errors.py": ["*other_backends*"],
    "test_docs.py": ["*readme*", "*example_runs*"],
    "test_report.py": ["*"],
    "test_condensed.py": [
        "*exported*", "*every_method*", "!*method[[]RigL]", "!*method[[]SET]", "!*method[[]SNFS]",
        "*every_optimizer*", "!*accumulation]", "*layer_computes*",
        "!*computes*[[]dense-*", "!*computes*[[]query*", "!*computes*[[]strides-*",
        "*convolutions*", "!*convolutions*RigL]", "*nested_layers*", "*mixed*",
        "*plain_model[[]keras]", "*plain_model[[]weights]", "*compiled_for_inference*",
        "*ways_back*", "*flow*[[]3]", "*loss_scale*", "*frozen_meanwhile*[[]False]",
        "*holds_on*[[]condense]", "*regularizers*",
        "*by_construction[[]*", "!*construction[[]dense]", "*killed*", "*reach_beyond*",
    ],
    "test_packed.py": ["*goes_into_a_model*", "*small*", "*frozen*", "*several_optimizers*"],
    "test_at_init.py": ["*any_model*"],
    "test_analysis.py": ["*flops_of_resnet50*"],
    "test_compaction.py": ["*"],
    "test_backup.py": ["*killed*", "*averaged*", "*loss_scaling*", "*damaged*"],
    "test_saving.py": ["*RigL*", "*SET*", "!*[[].keras-RigL*", "!*backup-RigL*", "*stripped*"],
    "test_attached.py": [
        "*compiled_updates*", "!*host[[]RigL]", "*construction_move*", "*backups_resume*",
        "*comes_back*", "!*[[].keras]", "*checkpoint*", "*weights_win*", "!*set_weights-True*",
        "*srigl*", "*ema_swap*", "*once_for_all_fits*", "*unknown_length*",
    ],
    "test_structures.py": [
        "*move_compiled*", "!*compiled*[[]RigL]", "*from_files*", "*any_update*",
        "*every_method_keeps*", "!*structure[[]RigL]", "!*structure[[]GMP global]",
        "*ablated_neurons[[]True]", "*the_logs*", "*weights_win*",
    ],
    "test_contract.py": [
        "*mixed_*", "!*RigL-mixed_float16-XLA*", "*of_optimizers*", "*eager*", "*situations*",
        # each method and each situation once, or nearly
        "!*[[]RigL-clone]", "!*[[]SET-file]", "!*[[]MEST-accumulation]", "!*[[]GMP-outer model]",
        "!*[[]GraNet-own optimizer]", "!*[[]SRigL-frozen and thawed]", "*every_hook*",
        "!*every_hook[[]clone-True]", "!*every_hook[[]steps_per_execution-False]",
        "*float32-XLA]", "!*RigL corrected-float32-XLA*", "!*SNFS-float32-XLA*",
    ],
    "test_models.py": [
        "*any_model*", "!*[[]convnet]", "!*[[]nested_and_shared]",
        "!*lstm_generation*", "!*[[]functional_subclass]", "*generate*",
        "*condensed_as_masked*", "!*condensed_as_masked[[]autoencoder]",
    ],
    "test_methods.py": ["*same_compiled*", "*keep_their_own*", "*random_or_at_zero[[]True]"],
    "test_conversion.py": ["*foreign_optimizer*", "*keras_application*", "*lets_go_in_place*"],
    "test_callbacks.py": ["*many_updates*", "*SET*", "!*interval*SET*"],
    "test_kinds.py": [
        "*langevin*", "*noisy*", "*accumulation*", "!*accumulation[[]MEST]",
        "*instances_that_differ*",
    ],
    "test_following.py": ["*killed*"],
    "test_pruning.py": ["*better_than_a_random*"],
    "test_optimizers.py": [
        "*trusted*", "!*trusted*[[]Adam-average]", "*stay_zero*", "!*zero[[]Muon]",
    ],
}  # fmt: skip


# On PyTorch nothing is compiled, so that all of it is quick; `make test` needs this much.
QUICK_ON_TORCH = [
    f"test_{name}.py"
    for name in (
        "backend",
        "backup",
        "callbacks",
        "condensed",
        "contract",
        "optimizers",
        "saving",
        "torch",
    )
]


# What asks little of a backend: `make test` runs it on TensorFlow alone.
ONCE = [
    f"test_{name}.py"
    for name in (
        "analysis",
        "conversion",
        "distributions",
        "docs",
        "errors",
        "packed",
        "pruning",
    )
]


# What Keras does not do on PyTorch, or what has not been tried, by why.
NOT_ON_TORCH = {
    "*nested_layers_train_as_masked[[]True]": "torch.compile takes minutes for it",
    "*mixed_*-XLA]": "torch.compile takes minutes for it; float32 is tested",
    "*steps_per_execution*": "Keras refuses steps_per_execution there",
    "*[[]steps of an epoch]": "Keras refuses steps_per_execution there",
    "*[[]neuron_sparsity unbuilt]": "modules put their own words in place of an AttributeError's",
    "test_fits_do_not_compile_the_step_again": "nothing is traced there",
    "test_updates_do_not_trace_the_train_step_again": "nothing is traced there",
}


def why_not_on_torch(item):
    found = (
        why for pattern, why in NOT_ON_TORCH.items() if fnmatch.fnmatchcase(item.name, pattern)
    )
    return next(found, None) if BACKEND == "torch" else None


def is_exhaustive(item):
    name = item.path.name
    if (BACKEND == "torch" and name not in QUICK_ON_TORCH) or (BACKEND == "jax" and name in ONCE):
        return True
    chosen = False
    for pattern in EXHAUSTIVE.get(name, ()):
        if fnmatch.fnmatchcase(item.name, pattern.removeprefix("!")):
            chosen = pattern[0] != "!"
    return chosen


def pytest_collection_modifyitems(config, items):
    for item in items:
        if is_exhaustive(item):
            item.add_marker("exhaustive")
    for item in items:
        needed = item.get_closest_marker("backend")
        if needed and BACKEND not in needed.args:
            item.add_marker(pytest.mark.skip(reason=f"needs the backend {needed.args}"))
        elif why := why_not_on_torch(item):
            item.add_marker(pytest.mark.skip(reason=why))


def pytest_configure(config):
    config.addinivalue_line("markers", "exhaustive: for `make test-all`")
    config.addinivalue_line("markers", "backend(name): runs on this Keras backend only")

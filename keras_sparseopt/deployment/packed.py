"""A `.keras` file in a fraction of its size: what is 0 is not stored."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import tempfile
import zipfile
from typing import Any

import h5py
import keras
import numpy as np

from keras_sparseopt import keras_internals
from keras_sparseopt.backend import host
from keras_sparseopt.checks import check_bool
from keras_sparseopt.devices import attributes_with_optimizers, optimizers_of
from keras_sparseopt.files import check_place, read_whole, write_whole
from keras_sparseopt.models.conversion import (
    check_model,
    check_zeros,
    set_mask,
    sparse_weights,
    strip,
)
from keras_sparseopt.models.topology import (
    attach_saved,
    check_followers,
    check_leads,
    detach,
    forget_steps,
    leading_at_the_end,
    plain_weights,
    topology_of,
    trainers_of,
)
from keras_sparseopt.structures import as_structure
from keras_sparseopt.typing import Path

_WEIGHTS, _INDEX = "model.weights.h5", "packed.json"


@dataclasses.dataclass(frozen=True)
class PackedFile:
    """What `save_packed` has written; `print` shows it.

    Attributes:
        path: `pathlib.Path`.
        size: Int, bytes.
        dense_size: Int, bytes of the same arrays with all zeros stored.
        ratio: Float, how often the file goes into them.
    """

    path: pathlib.Path
    size: int
    dense_size: int

    @property
    def ratio(self) -> float:
        return self.dense_size / self.size

    def __str__(self):
        return (
            f"{self.path}: {self.size:,} bytes, {self.ratio:.1f} × smaller than its arrays with "
            f"all zeros ({self.dense_size:,})"
        )


def save_packed(model: keras.Model, path: Path, include_optimizer: bool = False) -> PackedFile:
    """Save a sparse model in a small file, without loss.

    ```
    every array of the `.keras` file:  one bit per number, whether it is 0;  the others, byte by
    byte (all first bytes, all second bytes, …);  both compressed
    ```

    The masks are in the file, also without the optimizer. It is written aside and renamed, and has
    a checksum. Nothing of the model changes.

    Args:
        model: Any Keras model that `model.save("….keras")` can save.
        path: String or `pathlib.Path` of the file, such as `"model.ksp"`.
        include_optimizer: Bool, defaults to `False`. `True` to go on training where it stands:
            slots, steps and how the model was compiled. Random generators of layers (Dropout)
            begin anew, as with `.keras`; `BackupAndRestore` brings those back, too.

    Returns:
        `PackedFile`: path, bytes, and how much smaller it is.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model is not built; if `include_optimizer` is no bool; or if another
            optimizer has moved inactive weights.
        FileNotFoundError: If there is no such directory.

    Example:

    ```python
    import pathlib
    import tempfile
    import keras
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(256)])
    kso.sparsify(model, 0.9)
    path = pathlib.Path(tempfile.mkdtemp()) / "model.ksp"
    print(kso.save_packed(model, path))  # 5.6 × smaller
    assert path.stat().st_size < 0.2 * 4 * model.count_params()
    (weight,) = kso.sparse_weights(kso.load_packed(path))
    assert round(weight.topology.sparsity, 3) == 0.9
    ```
    """
    check_model(model)
    check_place(path)
    check_bool("include_optimizer", include_optimizer)
    check_zeros(model)
    with tempfile.TemporaryDirectory() as directory:
        saved = pathlib.Path(directory) / "model.keras"
        model.save(saved)
        left_out = set() if include_optimizer else attributes_with_optimizers(model)
        write_whole(path, lambda file: _pack(saved, file, model, left_out))
        dense = _bytes_of_arrays(saved, left_out)
    path = pathlib.Path(path)
    return PackedFile(path, path.stat().st_size, dense)


def load_packed(
    path: Path, model: keras.Model | None = None, masks: bool = True, **options: Any
) -> keras.Model:
    """The model that `save_packed` has saved.

    Args:
        path: String or `pathlib.Path` of the file.
        model: Built Keras model of the same layers that takes the weights, no optimizer's state;
            or `None` (default) to make the one that was saved.
        masks: Bool, defaults to `True`: the model has the masks that it had, and trains on under a
            `SparseOpt`. `False` for a plain model with zeros in its weights; a `model` that has
            masks keeps them.
        **options: Of `keras.models.load_model`: `custom_objects`, `compile`, `safe_mode`. Without
            `model` only.

    Returns:
        The model. Compiled only if the file was saved with `include_optimizer=True`.

    Raises:
        TypeError: If `model` is not a Keras model.
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, cut off, of another kind, or of another model; or if
            `model`, or a copy that follows it, cannot have its masks. Nothing has changed then.

    Example:

    ```python
    import pathlib
    import tempfile
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([keras.Input((8,)), kso.SparseDense(4, sparsity=0.5)])
    path = pathlib.Path(tempfile.mkdtemp()) / "model.ksp"
    kso.save_packed(model, path)
    plain = kso.load_packed(path, masks=False)
    x = np.ones((2, 8), "float32")
    assert np.array_equal(plain.predict(x, verbose=0), model.predict(x, verbose=0))
    assert not kso.sparse_weights(plain)
    ```
    """
    check_bool("masks", masks)
    if model is not None:
        check_model(model)
        if options:
            raise ValueError(
                f"Options are for a model that is made here. Received: {sorted(options)}"
            )
    with tempfile.TemporaryDirectory() as directory:
        saved = pathlib.Path(directory) / "model.keras"
        found = _unpack(path, saved)
        if model is not None:
            return _load_into(model, saved, found if masks else [])
        model = keras.saving.load_model(saved, **options)
        if not masks:
            return strip(model)
        _hang(model, found)  # the optimizer brings back the masks of what it trains
        return model


def _load_into(model, saved, found):
    _check_fits(model, saved)
    weights = plain_weights(model)
    for config, mask in found:
        variable = weights[config["index"]]
        topology = topology_of(variable)
        check_leads(variable)
        if topology is None:
            check_followers(variable, as_structure(config["structure"]), mask)
        else:
            topology.check_mask(mask, is_final=True)
    with _unchanged_on_failure(model), leading_at_the_end():
        for config, mask in found:
            variable = weights[config["index"]]
            if topology_of(variable) is not None:
                set_mask(variable, mask)
        _hang(model, found)
        with keras_internals.without_attributes(model, attributes_with_optimizers(model)):
            model.load_weights(saved)
    return model


@contextlib.contextmanager
def _unchanged_on_failure(model):
    had = sparse_weights(model)
    optimizers = {*optimizers_of(model), *(o for v in model.weights for o in trainers_of(v))}
    variables = [*model.variables, *(variable.topology.pattern for variable in had)]
    for optimizer in optimizers:
        variables += optimizer.variables
    before = [(variable, np.array(host(variable))) for variable in variables]
    were_stripped = [(v, v.was_stripped) for v in model.weights if hasattr(v, "was_stripped")]
    states = [variable.topology.known_state() for variable in had]
    try:
        yield
    except BaseException:  # also if it was interrupted
        known = {id(variable) for variable in had}
        for variable in sparse_weights(model):
            if id(variable) not in known:
                detach(variable)
        with contextlib.ExitStack() as stack:
            for variable in had:
                stack.enter_context(variable.topology.moving())
            for variable, value in before:
                variable.assign(value)
        for variable, state in zip(had, states):
            variable.topology.restore_state(state)
        for variable, was_stripped in were_stripped:
            variable.was_stripped = was_stripped
        raise


def _hang(model, found):
    """Hang the masks of a file on the weights that have none."""
    new = []
    for config, mask in found:
        variable = plain_weights(model)[config["index"]]
        if topology_of(variable) is None:
            attach_saved(variable, config).take(mask)
            new.append(variable)
    if new:
        forget_steps(new)


def _check_fits(model, saved):
    """Whether Keras will find every array of the model in the file, and no other."""
    left_out = attributes_with_optimizers(model)
    with keras_internals.without_attributes(model, left_out):
        with tempfile.TemporaryDirectory() as directory:
            own = pathlib.Path(directory) / "own.weights.h5"
            model.save_weights(own)
            mine = _shapes(own.read_bytes(), left_out)
    with zipfile.ZipFile(saved) as file:
        theirs = _shapes(file.read(_WEIGHTS), left_out)
    if mine != theirs:
        different = sorted(set(mine.items()) ^ set(theirs.items()))
        raise ValueError(
            "`path` must be the file of such a model. Received one that differs in "
            + ", ".join(f"{name} {shape}" for name, shape in different[:4])
        )


def _bytes_of_arrays(saved, left_out):
    """How large the arrays of a `.keras` file are: int."""
    with zipfile.ZipFile(saved) as file:
        arrays = _arrays(file.read(_WEIGHTS), left_out)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays.values())


def _shapes(content, left_out):
    return {name: shape for name, (shape, _) in _arrays(content, left_out).items()}


def _arrays(content, left_out):
    """Shapes and dtypes of the arrays of an HDF5 file, without those of some groups: dict."""
    found = {}

    def see(name, item):
        if isinstance(item, h5py.Dataset) and name.partition("/")[0] not in left_out:
            found[name] = item.shape, item.dtype

    with h5py.File(io.BytesIO(content)) as file:
        file.visititems(see)
    return found


# ---------------------------------------------------------------------- the file


class _Blobs:
    """Arrays of bytes in an archive, each of the same content once."""

    def __init__(self, archive):
        self._archive = archive
        self._names: dict = {}

    def add(self, array):
        content = np.ascontiguousarray(array).tobytes()
        key = hashlib.sha256(content).digest()
        if key not in self._names:
            self._names[key] = f"numbers/{len(self._names)}"
            self._archive.writestr(self._names[key], content)
        return self._names[key]


def _pack(saved, file, model, left_out):
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as target:
        blobs, arrays = _Blobs(target), list[dict]()
        for name in source.namelist():
            content = source.read(name)
            if name == _WEIGHTS:
                skeleton = io.BytesIO()
                with h5py.File(io.BytesIO(content)) as old, h5py.File(skeleton, "w") as new:
                    names = [key for key in old if key not in left_out]
                    _take_out(old, new, names, blobs, arrays)
                content = skeleton.getvalue()
            elif name == "config.json" and left_out:
                content = json.dumps({**json.loads(content), "compile_config": None}).encode()
            target.writestr(name, content)
        attached = [
            {
                "index": i,
                **variable.topology.get_config(),
                "mask": blobs.add(np.packbits(host(variable.topology.mask))),
            }
            for i, variable in enumerate(plain_weights(model))
            if topology_of(variable) is not None and variable.topology.is_attached
        ]
        index = {"arrays": arrays, "masks": attached}
        target.writestr(_INDEX, json.dumps(index))


def _take_out(old, new, names, blobs, arrays):
    """Copy a group of an HDF5 file without its numbers, which become blobs."""
    new.attrs.update(old.attrs)
    for name in names:
        item = old[name]
        if isinstance(item, h5py.Group):
            _take_out(item, new.create_group(name), list(item), blobs, arrays)
        elif item.dtype.kind not in "biufc" or not item.size:
            old.copy(name, new)
        else:
            new.create_dataset(name, item.shape, item.dtype).attrs.update(item.attrs)
            arrays.append({"name": f"{new.name}/{name}", **_split(item[()], blobs)})


def _split(array, blobs):
    """Which numbers are not 0 (by their bits: −0 is not), and the bytes of those."""
    array = np.ascontiguousarray(array)
    if array.dtype == bool:
        return {"bits": blobs.add(np.packbits(array))}
    numbers = array.reshape(-1, 1).view("uint8")
    some = numbers.any(axis=1)
    if np.count_nonzero(~some) * 8 * array.itemsize < array.size:  # the bits would take more
        return {"bytes": blobs.add(numbers.T)}
    return {"bits": blobs.add(np.packbits(some)), "bytes": blobs.add(numbers[some].T)}


def _unpack(path, saved):
    """Write the `.keras` file; the attached masks: list of config and array."""
    try:
        content = read_whole(path)
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(saved, "w") as target:
            index = json.loads(source.read(_INDEX))
            for name in source.namelist():
                if name == _WEIGHTS:
                    whole = io.BytesIO(source.read(name))
                    with h5py.File(whole, "r+") as weights:
                        for array in index["arrays"]:
                            dataset = weights[array["name"]]
                            dataset[...] = _joined(array, dataset, source)
                    target.writestr(name, whole.getvalue())
                elif name != _INDEX and not name.startswith("numbers/"):
                    target.writestr(name, source.read(name))
            found = [
                (config, _bits(source.read(config["mask"]), config["shape"]))
                for config in index["masks"]
            ]
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"`path` must be a whole file of save_packed. Received: '{path}': {error}"
        ) from None
    return found


def _joined(array, dataset, source):
    if "bytes" not in array:
        return _bits(source.read(array["bits"]), dataset.shape)
    values = np.frombuffer(source.read(array["bytes"]), "uint8")
    values = values.reshape(dataset.dtype.itemsize, -1).T
    numbers = np.zeros((dataset.size, dataset.dtype.itemsize), "uint8")
    some = slice(None)
    if "bits" in array:
        some = _bits(source.read(array["bits"]), (dataset.size,))
    numbers[some] = values
    return numbers.view(dataset.dtype).reshape(dataset.shape)


def _bits(content, shape):
    bits = np.unpackbits(np.frombuffer(content, "uint8"), count=math.prod(shape))
    return bits.astype(bool).reshape(shape)

"""`py.typed` is true: every public signature has types, and a checker uses them."""

import inspect
import pathlib
import subprocess
import sys

import pytest

import keras_sparseopt as kso

PROGRAM = pathlib.Path(__file__).parent / "programs" / "typed_user.py"
PUBLIC = {name: getattr(kso, name) for name in kso.__all__}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_signatures_have_types(name):
    item = PUBLIC[name]
    function = item.__init__ if inspect.isclass(item) else item
    signature = inspect.signature(function)
    missing = [
        parameter.name
        for parameter in list(signature.parameters.values())[inspect.isclass(item) :]
        if parameter.annotation is inspect.Parameter.empty
    ]
    if name != "SparseHeNormal":  # Keras' own signature
        assert not missing and signature.return_annotation is not inspect.Signature.empty


@pytest.mark.backend("tensorflow")
def test_a_checker_finds_the_mistakes_and_no_others(tmp_path):
    config = tmp_path / "mypy.ini"
    config.write_text(
        "[mypy]\nignore_missing_imports = True\n[mypy-keras.*]\nfollow_imports=skip\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", PROGRAM]
    command += ["--config-file", config, "--cache-dir", tmp_path / "cache"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=PROGRAM.parents[2])
    before, _, mistakes = PROGRAM.read_text().partition("# What a checker must find")
    first = before.count("\n") + 2
    wrong = set(range(first, first + mistakes.count("\n") - 1))
    found = {int(line.split(":")[1]) for line in ended.stdout.splitlines() if "error:" in line}
    assert found == wrong, ended.stdout

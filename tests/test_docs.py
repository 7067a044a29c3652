"""Every documented example runs, and every documented default is the signature's."""

import inspect
import pathlib
import re

import keras
import pytest

import keras_sparseopt as kso

ROOT = pathlib.Path(__file__).parent.parent
PUBLIC = {name: getattr(kso, name) for name in kso.__all__}


def examples(text):
    return re.findall(r"```python\n(.*?)```", inspect.cleandoc(text or ""), flags=re.S)


# They are of no backend; on JAX they compile longest.
@pytest.mark.backend("tensorflow", "torch")
@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_example_runs(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = examples(PUBLIC[name].__doc__)
    exec(compile(code, f"<example of {name}>", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_documented(name):
    item = PUBLIC[name]
    if name.startswith("Sparse") and issubclass(item, keras.layers.Layer):
        arguments = ["sparsity", "seed", "skew_correction", "structure", "condensed"]
    elif name == "SparseHeNormal":
        arguments = ["seed"]
    else:
        arguments = [a for a in inspect.signature(item).parameters if a != "self"]
    section = (item.__doc__ or "").partition("Args:")[2]
    for argument in arguments:
        pattern = rf"^\s+(\w+, )*(\*\*)?{argument}(, \w+)*: "
        assert re.search(pattern, section, flags=re.M), argument


def test_readme_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for page in ("README.md", "docs/models.md", "docs/structures.md"):  # `make docs` runs the rest
        namespace = {"__name__": "example"}  # one for a page, as where it is built
        for code in examples((ROOT / page).read_text()):
            exec(compile(code, f"<{page}>", "exec"), namespace)


def test_every_public_name_is_in_the_reference_once(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import conf

    entries = [name for _, _, names in conf.GROUPS.values() for name in names]
    assert sorted(name for name in entries if "." not in name) == sorted(kso.__all__)
    for _, _, names in conf.GROUPS.values():
        for name, members in names.items():
            for member in members.split():
                assert getattr(conf.entry_of(name), member).__doc__, (name, member)


def test_guides_lead_to_the_reference(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import conf

    text = [
        "# `RigL`\n`kso.sparsify(model, 0.9)` and `RigL`; `sparsify`.\n"
        "```python\n`SET`\n```\n[`SET`](x.md), `no_name`"
    ]
    conf.link_names(None, "tutorial", text)
    assert text[0] == (
        "# `RigL`\n[`kso.sparsify(model, 0.9)`](reference/sparse.md#sparsify) and "
        "[`RigL`](reference/methods.md#rigl); `sparsify`.\n"
        "```python\n`SET`\n```\n[`SET`](x.md), `no_name`"
    )


def test_docstrings_become_restructured_text(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import conf

    lines = ["`x | y` of **all**:", "", "| a | b |", "|---|---|", "| `c` | d |", ""]
    lines += ["```python", "y = `z` | 1", "```", "|g| ends it."]
    conf.as_restructured_text(None, "function", "f", None, None, lines)
    text = "\n".join(lines)
    assert text.startswith("``x | y`` of **all**:")
    assert ".. list-table::\n\n   * - a\n     - b\n   * - ``c``\n     - d\n" in text
    assert ".. code-block:: python\n\n    y = `z` | 1\n" in text
    assert "\\|g\\| ends it." in text

"""The documentation site: `make docs` builds it, and runs every Python block of every page."""

import inspect
import pathlib
import re
import textwrap

import keras_sparseopt as kso

ROOT = pathlib.Path(__file__).parent.parent

project = "keras_sparseopt"
author = "The keras_sparseopt authors"
copyright = "the keras_sparseopt authors"
release = version = kso.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"keras_sparseopt {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more
autodoc_class_signature = "mixed"
napoleon_google_docstring, napoleon_numpy_docstring = True, False

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 900
nb_output_stderr = "remove"  # TensorFlow's greetings
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # tables

NOTEBOOK = """---
file_format: mystnb
kernelspec:
  name: python3
---
"""


def make_notebook(app, docname, source):
    """Python blocks become cells: they run, and what they print stands below them.

    Of a block that begins with ```python draw, only what it draws is shown.
    """
    text = source[0].replace("```python\n", "```{code-cell} python\n")
    text = text.replace("```python draw\n", "```{code-cell} python\n:tags: [remove-input]\n\n")
    if text != source[0]:
        source[0] = NOTEBOOK + text


def _escaped(found):
    return "".join("\\" + character for character in found[0])


def as_restructured_text(app, what, name, item, options, lines):
    """The docstrings are Markdown in the way of Keras: fences and single backticks."""
    text = "\n".join(lines)

    def block(found):
        indent, language, code = found[1], found[2] or "text", textwrap.dedent(found[3])
        code = textwrap.indent(code, indent + "    ")
        return f"{indent}.. code-block:: {language}\n\n{code}\n"

    def table(found):
        rows = [line.strip().strip("|").split("|") for line in found[0].strip().split("\n")]
        cells = [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= {"-"}]
        lines = ["* - " + "\n     - ".join(row) for row in cells]
        return ".. list-table::\n\n   " + "\n   ".join(lines) + "\n\n"

    text = re.sub(r"(?m)(^\|.*\|\n)+", table, text)
    text = re.sub(r"(?ms)^( *)```(\w*)\n(.*?)^ *```$", block, text)

    def prose(part):
        words = re.split(r"(?<!`)(`[^`\n]+`)(?!`)", part)
        words[::2] = [re.sub(r"\||\*\*(?=schedule\b)", _escaped, word) for word in words[::2]]
        words[1::2] = [f"`{word}`" for word in words[1::2]]
        return "".join(words)

    parts = re.split(r"(?ms)(^ *\.\. code-block::.*?(?=^\S|\Z))", text)
    parts[::2] = [prose(part) for part in parts[::2]]
    text = "".join(parts)
    lines[:] = text.split("\n")


GROUPS = {
    "Make a model sparse": "sparsify set_mask masks_from_zeros prune_at_init condense uncondense "
    "strip",
    "Layers sparse by construction": "SparseDense SparseConv1D SparseConv2D SparseConv3D "
    "SparseEinsumDense SparseHeNormal",
    "Optimizers": "SparseOpt HAM",
    "Methods": "DynamicSparseTraining RigL SET MEST SNFS Static GMP GraNet SRigL",
    "Structures": "Unstructured Block NM ConstantFanIn",
    "Look at it": "summary layer_costs sparse_weights sparse_layers connectivity GradientFlow "
    "report itop_rate effective_gradient_flow gradient_flow gradient_skew measured_skew "
    "mask_overlap",
    "After training": "export_tflite sparse_inference_report save_packed load_packed "
    "csr_matrices compact",
    "Several devices, and resuming": "resolve_strategy fit_distributed assert_replicas_agree "
    "BackupAndRestore",
    "Arithmetic": "uniform er erk drop_and_grow",
}


def write_reference(app):
    """reference.md from the public names: each once, in its group."""
    grouped = [name for names in GROUPS.values() for name in names.split()]
    if sorted(grouped) != sorted(kso.__all__):
        raise ValueError(f"GROUPS and __all__ differ: {set(grouped) ^ set(kso.__all__)}")
    text = "# Reference\n\nEvery public name, as its docstring describes it.\n"
    for group, names in GROUPS.items():
        text += f"\n## {group}\n"
        for name in names.split():
            kind = "autoclass" if inspect.isclass(getattr(kso, name)) else "autofunction"
            text += f"\n### `{name}`\n\n```{{eval-rst}}\n.. {kind}:: keras_sparseopt.{name}\n```\n"
    path = ROOT / "docs" / "reference.md"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def setup(app):
    app.connect("builder-inited", write_reference)
    app.connect("source-read", make_notebook)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=100)

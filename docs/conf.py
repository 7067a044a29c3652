"""The documentation site: `make docs` builds it, and runs every Python block of every page."""

import inspect
import operator
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


_HOOKS = "scores values new_mask grown plan is_due is_over lease current_drop_fraction"
_LOOP = "begin step end stateless_step update_masks"
# page → its title, the guides that lead there, and its entries: public names or what they return,
# each with the methods and properties that are shown.
GROUPS: dict[str, tuple[str, str, dict[str, str]]] = {
    "sparse": (
        "Make a model sparse, and back",
        "models structures faster",
        {
            name: ""
            for name in (
                "sparsify", "prune", "prune_at_init", "masks_from_zeros", "set_mask", "follow",
                "strip", "condense", "uncondense",
            )
        },
    ),
    "layers": (
        "Layers sparse by construction",
        "models faster",
        {
            **dict.fromkeys(
                "SparseDense SparseConv1D SparseConv2D SparseConv3D SparseEinsumDense".split(),
                "sparsity neuron_sparsity",
            ),
            "SparseHeNormal": "",
        },
    ),
    "optimizers": (
        "Optimizers",
        "tutorial choosing",
        {
            "SparseOpt": "sparse_weights itop_rate dead_neurons rewire lease_gradients",
            "HAM": "",
        },
    ),
    "methods": (
        "Methods",
        "choosing loops watching",
        {
            "DynamicSparseTraining": f"{_LOOP} {_HOOKS}",
            **dict.fromkeys("RigL SET MEST SNFS Static GMP GraNet SRigL".split(), ""),
        },
    ),
    "structures": (
        "Structures",
        "structures faster",
        {
            **dict.fromkeys("Unstructured Block NM ConstantFanIn".split(), ""),
            "structures.Structure": "unit_shape cut join group_axes group_sizes fewest allowed "
            "nearest is_finished check_sparsity",
        },
    ),
    "look": (
        "Look at it",
        "watching models",
        {
            "summary": "", "layer_costs": "", "sparse_weights": "", "sparse_layers": "",
            "models.topology.Topology": "num_active num_active_units",
            "connectivity": "", "GradientFlow": "", "report": "", "itop_rate": "",
            "effective_gradient_flow": "", "gradient_flow": "", "gradient_skew": "",
            "measured_skew": "", "mask_overlap": "",
        },
    ),
    "deployment": (
        "After training",
        "deployment",
        {
            "export_tflite": "", "deployment.tflite.TFLiteFile": "",
            "sparse_inference_report": "", "deployment.engines.SparseInference": "",
            "save_packed": "", "deployment.packed.PackedFile": "", "load_packed": "",
            "compact": "", "deployment.compaction.CompactedModel": "", "csr_matrices": "",
        },
    ),
    "devices": (
        "Several devices, and resuming",
        "devices",
        {
            "resolve_strategy": "", "backend.Devices": "", "fit_distributed": "",
            "assert_replicas_agree": "", "BackupAndRestore": "",
        },
    ),
    "arithmetic": (
        "Arithmetic",
        "choosing",
        dict.fromkeys("uniform er erk drop_and_grow".split(), ""),
    ),
}  # fmt: skip


def entry_of(name):
    """What an entry stands for."""
    return operator.attrgetter(name)(kso)


def first_line(item):
    return inspect.cleandoc(item.__doc__).partition("\n")[0]


def write_reference(app):
    """A page for each group, each public name and its methods once, and a list of all of them."""
    folder = ROOT / "docs" / "reference"
    folder.mkdir(exist_ok=True)
    index = "# Reference\n\nEvery public name, as its docstring describes it.\n\n"
    index += "| | |\n|---|---|\n"
    for group, (title, guides, entries) in GROUPS.items():
        links = ", ".join(f"[](../{guide}.md)" for guide in guides.split())
        text = f"# {title}\n\nGuides: {links}. [All names](../reference.md).\n"
        for name, members in entries.items():
            short = name.rpartition(".")[2]
            is_class = inspect.isclass(entry_of(name))
            text += f"\n## `{short}`\n\n```{{eval-rst}}\n"
            text += f".. {'autoclass' if is_class else 'autofunction'}:: keras_sparseopt.{name}\n"
            if members:
                text += f"   :members: {', '.join(members.split())}\n"
            text += "```\n"
            line = first_line(entry_of(name)).replace("|", "\\|")
            index += f"| [`{short}`](reference/{group}.md#{short.lower()}) | {line} |\n"
        write_if_new(folder / f"{group}.md", text)
    pages = "\n".join(f"reference/{group}" for group in GROUPS)
    index += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"
    write_if_new(ROOT / "docs" / "reference.md", index)


def write_if_new(path, text):
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


_NAMED = re.compile(r"(?<![\[`])`(?:kso\.)?(\w+)(?:\([^`]*\))?`(?![\]`])")


def link_names(app, docname, source):
    """In a guide, the first mention of each public name leads to its entry in the reference."""
    if docname.startswith("reference") or docname in ("changelog", "design"):
        return
    places = {
        name.rpartition(".")[2]: f"reference/{group}.md#{name.rpartition('.')[2].lower()}"
        for group, (_, _, entries) in GROUPS.items()
        for name in entries
    }

    def linked(found):
        place = places.pop(found[1], None)
        return found[0] if place is None else f"[{found[0]}]({place})"

    parts = re.split(r"(?ms)(^```.*?^```$)", source[0])
    for i in range(0, len(parts), 2):
        lines = parts[i].split("\n")
        for j, line in enumerate(lines):
            if not line.startswith("#"):
                lines[j] = _NAMED.sub(linked, line)
        parts[i] = "\n".join(lines)
    source[0] = "".join(parts)


def setup(app):
    app.connect("builder-inited", write_reference)
    app.connect("source-read", link_names, priority=400)
    app.connect("source-read", make_notebook)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=100)

"""Tests of the package's architecture rules, on syntax trees of its modules."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import hivit_jax
from hivit_jax.tasks import TASKS

PACKAGE = Path(hivit_jax.__file__).parent
MODEL_CLASSES = {"Classifier", "MaskedAutoencoder", "HiViT"}
# Modules that may contain names of tasks and model classes.
EXEMPT = ("tasks/", "models/", "weights/names/", "tools/")


@cache
def modules(root=PACKAGE):
    """Return [(file, lines, syntax tree)] of the modules below a directory."""
    files = {path: path.read_text() for path in sorted(root.rglob("*.py"))}
    return [
        (path.relative_to(root).as_posix(), text.splitlines(), ast.parse(text))
        for path, text in files.items()
    ]


def checked_trees():
    """Yield (file, syntax tree) of the modules outside `EXEMPT`."""
    for name, _, tree in modules():
        if not name.startswith(EXEMPT):
            yield name, tree


def test_only_exempt_modules_name_tasks():
    violations = [
        f"{name}:{node.lineno} {node.value!r}"
        for name, tree in checked_trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in [*TASKS]
    ]
    assert violations == []


def test_only_exempt_modules_check_model_classes():
    violations = [
        f"{name}:{node.lineno}"
        for name, tree in checked_trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "isinstance"
        and MODEL_CLASSES
        & {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
    ]
    assert violations == []


def test_modules_use_no_private_interface_of_jax():
    private = {"_src", "_jax", "jaxlib"}
    violations = []
    for name, _, tree in modules():
        for node in ast.walk(tree):
            names = [getattr(node, "attr", ""), getattr(node, "module", None) or ""]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names += [alias.name for alias in node.names]
            if private & {part for name in names for part in name.split(".")}:
                violations.append(f"{name}:{node.lineno}")
    assert violations == []


def test_modules_have_no_import_cycles():
    """The test ignores imports inside functions."""
    bodies = {}
    for file, _, tree in modules():
        name = f"hivit_jax/{file}".removesuffix(".py").replace("/", ".")
        bodies[name.removesuffix(".__init__")] = tree.body
    imports_of = {name: set() for name in bodies}
    for name, body in bodies.items():
        for node in body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    imports_of[name].add(inner if inner in bodies else node.module)
    remaining = {name: names & bodies.keys() for name, names in imports_of.items()}
    # Remove modules without remaining imports, until only cycles are left.
    while done := {name for name, names in remaining.items() if not names}:
        remaining = {n: names - done for n, names in remaining.items() if n not in done}
    assert remaining == {}


# Package -> packages and modules that it must not import.
FORBIDDEN = {
    "augment": {"config", "data", "inputs", "models", "tasks", "training"},
    "checkpoints": {"config", "inputs", "models", "tasks", "training"},
    "data": {"config", "inputs", "models", "tasks", "training"},
    "kernels": {"config", "data", "inputs", "models", "tasks", "training"},
    "models": {"config", "data", "distributed", "inputs", "tasks", "training"},
    "tasks": {"evaluate", "train"},
    "training": {"config", "evaluate", "inputs", "train"},
    "weights": {"config", "inputs", "tasks", "training"},
    "xla": {"config", "inputs", "tools", "train"},
}


def test_imports_go_down():
    """The test includes imports inside functions."""
    for name, _, tree in modules():
        forbidden = FORBIDDEN.get(name.partition("/")[0], set())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("hivit_jax"):
                inner = node.module.removeprefix("hivit_jax").strip(".")
                packages = {inner.partition(".")[0]}
                packages = packages if inner else {alias.name for alias in node.names}
                assert not packages & forbidden, f"{name}:{node.lineno}"


# Modules whose functions may accept a whole config.
TOP_LEVEL = (
    "main", "train.py", "evaluate", "inputs", "initial", "config", "tasks/", "tools/"
)  # fmt: skip


def test_only_top_level_modules_accept_a_whole_config():
    """Functions of other modules accept only the values that they use."""
    for name, _, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not name.startswith(TOP_LEVEL):
                for argument in (*node.args.args, *node.args.kwonlyargs):
                    annotation = argument.annotation
                    annotation = annotation and ast.unparse(annotation)
                    may_be_whole_config = annotation in (None, "Any", "ConfigDict")
                    assert argument.arg != "config" or not may_be_whole_config, (
                        f"{name}:{node.lineno} {node.name}"
                    )


def test_names_of_tests_are_unique():
    """A name states subject and outcome. A repeated name is too general."""
    names = [
        node.name
        for path in sorted(Path(__file__).parent.rglob("test_*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_files_and_functions_are_short():
    """Files have at most 300 lines, functions 60; the training loop may have 160.

    The limits hold for the package and for the benchmarks.
    """
    exceptions = {("train.py", "train"): 160}
    for name, lines, tree in modules() + modules(PACKAGE.parent / "benchmarks"):
        assert len(lines) <= 300, name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= exceptions.get((name, node.name), 60), (
                    f"{name} {node.name}"
                )

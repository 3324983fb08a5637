"""Nothing that is downloaded is executed: read from the source, and tried with a pickle that would leave a trace."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = ("hfnoise", "trainers", "pipelines", "model_cards", "benchmarks", "examples")
# The compilers of our own kernels, and `git` for the line that says what a benchmark ran on: lists, no shell.
STARTS_PROCESSES = {"benchmarks/run_all.py", "hfnoise/quantization/kernels/building.py", "benchmarks/reporting.py"}
# For the name of the exception that torch raises when it refuses a pickle.
IMPORTS_PICKLE = {"hfnoise/latents/hf_npnet_checkpoints.py"}
# Modules of ours by the tables of lazy names, and `module:function` that a user types, as after `python -m`.
IMPORTS_BY_VALUE = {
    "hfnoise/__init__.py", "hfnoise/__main__.py", "hfnoise/convert.py", "hfnoise/registration.py",
    "hfnoise/worlds/docstrings_run.py", "trainers/trace_pairs_run.py",
}  # fmt: skip
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "pty", "pdb"}
UNSAFE_CALLS = {
    "eval", "exec", "__import__", "builtins.eval", "builtins.exec", "os.system", "os.popen", "os.execv", "os.execvp",
    "os.spawnv", "os.spawnl", "pickle.load", "pickle.loads", "pickle.Unpickler", "runpy.run_path", "runpy.run_module",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "tarfile.open",
    "shutil.unpack_archive", "torch.hub.load", "torch.jit.load", "numpy.fromfile", "ctypes.PyDLL",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` of an expression that is one; what is called on something else begins with a dot."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def is_ours(name: ast.expr) -> bool:
    """Return whether a module is named in the source, or at least that it is one of this package."""
    if isinstance(name, ast.JoinedStr):
        first = name.values[0]
        own_name = isinstance(first, ast.FormattedValue) and dotted(first.value) == "__name__"
        return own_name or str(getattr(first, "value", "")).startswith("hfnoise.")
    return isinstance(name, ast.Constant)


def faults(source: str, file: str) -> Iterator[str]:
    """Yield what a module does that could run code which was downloaded."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            names = [module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                first = name.split(".")[0]
                if first in UNSAFE_MODULES and not (first == "pickle" and file in IMPORTS_PICKLE):
                    yield f"line {node.lineno} imports {name}"
                if first == "subprocess" and file not in STARTS_PROCESSES:
                    yield f"line {node.lineno} imports subprocess"
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and key.value in ("trust_remote_code", "allow_pickle")
                    and is_true(value)
                ):
                    yield f"line {node.lineno} sets {key.value}"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {word.arg: word.value for word in node.keywords}
        if name in UNSAFE_CALLS:
            yield f"line {node.lineno} calls {name}"
        if name == "torch.load" and not is_true(given.get("weights_only")):
            yield f"line {node.lineno} calls torch.load without weights_only=True"
        for option in ("trust_remote_code", "allow_pickle", "shell"):
            if option in given and not (isinstance(given[option], ast.Constant) and given[option].value is False):
                yield f"line {node.lineno} sets {option}"
        if name.split(".")[-1] == "import_module" and not is_ours(node.args[0]) and file not in IMPORTS_BY_VALUE:
            yield f"line {node.lineno} imports a module that a value names"


def test_no_shipped_module_can_run_downloaded_code():
    found = {}
    for part in SHIPPED:
        for path in sorted((ROOT / part).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            wrong = list(faults(path.read_text(encoding="utf-8"), file))
            if wrong:
                found[file] = wrong
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "yaml.load(file, Loader=yaml.Loader)",
        "model = AutoModel.from_pretrained(name, trust_remote_code=True)",
        "model = AutoModel.from_pretrained(name, trust_remote_code=args.trust)",
        "options = {'trust_remote_code': True}",
        "numpy.load(file, allow_pickle=True)",
        "eval(text)",
        "os.system(command)",
        "import subprocess",
        "import_module(config['module'])",
        "import_module(f'{name}.hfnoise')",
    ],
)
def test_the_scan_finds(source):
    assert list(faults(source, "hfnoise/module.py"))

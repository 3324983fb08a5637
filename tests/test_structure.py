"""Who may import whom (docs/design.md), and how long a file may be: read from the source, without importing it."""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from hfnoise.methods import public_names

ROOT = Path(__file__).parent.parent
# Folder of the checkout -> the package it is installed as. What lies under model_cards are Hub folders.
PACKAGES = {
    "hfnoise": "hfnoise",
    "trainers": "hfnoise.trainers",
    "pipelines": "hfnoise.pipelines",
    "benchmarks": "hfnoise.benchmarks",
    "examples": "examples",
}
LINE_LIMIT = 400
IMPORT_NAMES = {"pyyaml": "yaml", "pillow": "PIL"}
NEVER_IMPORTED = {"trainers", "pipelines", "benchmarks", "model_cards", "examples", "tests", "setup"}
# What each part must not import, by the beginning of the name.
FORBIDDEN = {
    "core": ("hfnoise.trainers", "hfnoise.pipelines", "hfnoise.benchmarks"),
    "border": ("hfnoise.trainers", "hfnoise.pipelines", "hfnoise.benchmarks"),
    "trainers": ("hfnoise.pipelines", "hfnoise.benchmarks"),
    "pipelines": ("hfnoise.trainers", "hfnoise.benchmarks"),
    "benchmarks": (),
    "examples": (),
}


def dependencies() -> set[str]:
    """Return the import names of what setup.py requires."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    keywords = [word for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords]
    required = next(ast.literal_eval(word.value) for word in keywords if word.arg == "install_requires")
    names = [re.match(r"[\w-]+", requirement)[0].lower() for requirement in required]
    return {IMPORT_NAMES.get(name, name).replace("-", "_") for name in names}


def imports_of_folder(module: str) -> set[str]:
    """Return what an example may import beside: modules of its own folder, and what a requirements.txt there names."""
    part, *parts = module.split(".")
    folder = ROOT / part / parts[0] if part == "examples" and parts else None
    if folder is None or not (folder / "requirements.txt").is_file():
        return set()
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [re.match(r"[\w-]+", line)[0].lower() for line in lines if line and not line.startswith("#")]
    return {IMPORT_NAMES.get(name, name) for name in names} | {path.stem for path in folder.iterdir()}


@dataclass(frozen=True)
class Source:
    """A module of ours: `imports` are those that run when it is imported."""

    module: str
    imports: tuple[str, ...]
    relative: tuple[int, ...] = ()

    @property
    def part(self) -> str:
        """The border are the files of the core that may import the HF libraries."""
        first, *rest = self.module.split(".")
        if first == "examples" or (rest and rest[0] in FORBIDDEN):
            return rest[0] if rest and first != "examples" else first
        return "border" if is_border(self.module) else "core"


def is_border(module: str) -> bool:
    _, *parts = module.split(".")
    return bool(parts) and (parts[0] in ("registration", "cards", "__main__", "worlds") or parts[-1].startswith("hf_"))


def imports_at_module_level(statements: list[ast.stmt]) -> Iterator[str]:
    """Yield the names imported by statements outside of functions; `from a import b` gives "a.b"."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_for_types_only(node):
            continue
        else:
            for block in ("body", "orelse", "finalbody"):
                yield from imports_at_module_level(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                yield from imports_at_module_level(handler.body)


def _is_for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def read_source(path: Path) -> Source:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join([PACKAGES[folder], *rest]).removesuffix(".__init__")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    relative = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return Source(module, tuple(imports_at_module_level(tree.body)), tuple(relative))


PATHS = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
SOURCES = [read_source(path) for path in PATHS]
MODULES = {source.module for source in SOURCES}
DEPENDENCIES = dependencies()


def target_of(name: str) -> str:
    """Return the module that is really imported: the longest known one, through the lazy names of `hfnoise`."""
    package, _, last = name.rpartition(".")
    if package == "hfnoise" and last in public_names():
        return public_names()[last]
    return package if name not in MODULES and package in MODULES else name


def faults(source: Source) -> list[str]:
    """Return what a module imports against the rules."""
    found = [f"line {line}: a relative import; write the whole name" for line in source.relative]
    third_party = {"torch", "jaxtyping"} if source.part == "core" else DEPENDENCIES | imports_of_folder(source.module)
    for name in map(target_of, source.imports):
        top = name.split(".")[0]
        inside = name == "hfnoise" or name.startswith("hfnoise.")
        if top in NEVER_IMPORTED:
            found.append(f"{name}: nothing imports this folder under its bare name")
        elif any(f"{name}.".startswith(f"{start}.") for start in FORBIDDEN[source.part]):
            found.append(f"{name}: the part '{source.part}' does not import it")
        elif source.part == "core" and inside and is_border(name) and name != "hfnoise.registration":
            found.append(f"{name}: imports the HF libraries, and the core does not")
        elif not inside and top not in sys.stdlib_module_names and top not in third_party:
            found.append(f"{name}: not among {sorted(third_party)}")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.module)
def test_imports(source):
    assert faults(source) == []


def test_no_circles():
    edges = {source.module: {target_of(name) for name in source.imports} & MODULES for source in SOURCES}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "path",
    [*PATHS, ROOT / "setup.py", *sorted((ROOT / "tests").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINE_LIMIT


@pytest.mark.parametrize(
    ("module", "name", "allowed"),
    [
        ("hfnoise.preference.losses", "math", True),
        ("hfnoise.preference.losses", "torch.nn", True),
        ("hfnoise.preference.losses", "transformers.Trainer", False),
        ("hfnoise.preference.losses", "matplotlib", False),
        ("hfnoise.preference.losses", "hfnoise.privacy.hf_card", False),
        ("hfnoise.preference.losses", "hfnoise.worlds.docstrings", False),
        ("hfnoise.quantization.hf_layers", "transformers.Trainer", True),
        ("hfnoise.quantization.hf_layers", "no_such_dependency", False),
        ("hfnoise.worlds.digits", "diffusers", True),
        ("hfnoise.worlds.digits", "hfnoise.trainers.noise_dpo", False),
        ("hfnoise.worlds.digits", "hfnoise.NoiseDPOTrainer", False),
        ("hfnoise.trainers.noise_dpo", "trl.DPOTrainer", True),
        ("hfnoise.trainers.noise_dpo", "hfnoise.trainers.launch", True),
        ("hfnoise.trainers.noise_dpo", "hfnoise.pipelines.guided", False),
        ("hfnoise.pipelines.guided", "hfnoise.trainers.noise_dpo", False),
        ("hfnoise.benchmarks.preference_noise", "hfnoise.NoiseDPOTrainer", True),
        ("hfnoise.benchmarks.preference_noise", "tests.conftest", False),
        ("examples.robust_dpo", "trainers.robust_dpo", False),
        ("examples.robust_dpo", "gradio", False),
        ("examples.space.noise_space.app", "gradio", True),
        ("examples.space.noise_space.app", "noise_space.models.use_pipeline", True),
        ("examples.space.noise_space.app", "no_such_dependency", False),
    ],
)
def test_the_rules_themselves(module, name, allowed):
    assert (faults(Source(module, (name,))) == []) is allowed


def test_only_module_level_counts():
    code = """
import first
if TYPE_CHECKING:
    import types_only
try:
    from second import name
except ImportError:
    import third
class C:
    import fourth
    def method(self):
        import lazy
"""
    found = list(imports_at_module_level(ast.parse(code).body))
    assert found == ["first", "second.name", "third", "fourth"]

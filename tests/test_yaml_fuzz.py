"""`hfnoise <command> --config FILE` with files broken in every way: exit status 2, a message, no traceback."""

import random
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

from hfnoise.__main__ import main
from hfnoise.errors import UsageError

EXAMPLES = Path(__file__).parent.parent / "examples" / "configs"
# Command -> example, and the module whose parser reads it.
COMMANDS = {
    "robust-dpo": ("robust_dpo", "trainers.launch"),
    "dr-dpo": ("dr_dpo", "trainers.launch"),
    "bvpo": ("bvpo", "trainers.launch"),
    "dp-sft": ("dp_sft", "trainers.launch"),
    "dp-dpo": ("dp_dpo", "trainers.launch"),
    "fedsvd": ("fedsvd", "trainers.launch_federated"),
    "qat": ("qat", "trainers.launch"),
    "one-more-step": ("one_more_step", "trainers.launch"),
    "golden-noise": ("golden_noise", "trainers.launch"),
    "generate": ("generate", "pipelines.generate"),
}
# Nine lines that stand for 9^9 words.
BOMB = "seed: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghij"))
BROKEN = {
    "empty": "",
    "comment": "# nothing\n",
    "list": "- seed\n- 3\n",
    "text": "seed\n",
    "number": "3\n",
    "tab": "seed:\n\t3\n",
    "unknown key": "sede: 3\n",
    "key that is a number": "3: seed\n",
    "key that is nothing": "null: 3\n",
    "key that is a list": "? [a, b]\n: 3\n",
    "twice": "seed: 3\nseed: 4\n",
    "unclosed": "seed: [1, 2\n",
    "two documents": "seed: 3\n---\nseed: 4\n",
    "not UTF-8": b"seed: \xff\xfe\n",
    "binary": bytes(range(256)),
    "no date": "seed: 2001-99-99\n",
    "bad float": "seed: !!float x\n",
    "bad bool": "seed: !!bool x\n",
    "bad int": "seed: !!int ''\n",
    "number of 5000 digits": f"seed: {'9' * 5000}\n",
    "deep": "seed: " + "[" * 300 + "]" * 300,
    "deep block": "- " * 300,
    "bomb": BOMB,
    "merge": "base: &base {seed: 3}\n<<: *base\n",
    "large": "seed: 3\n" + "# x\n" * 100_000,
    "system": "seed: !!python/object/apply:os.system ['touch {trace}']\n",
    "new": "seed: !!python/object/new:pathlib.Path ['{trace}']\n",
    "name": "seed: !!python/name:os.system\n",
    "module": "!!python/module:os : 3\n",
    "exec": "seed: !!python/object/apply:builtins.exec [\"open('{trace}', 'w')\"]\n",
}  # fmt: skip
STRANGE = [
    "[1]", "{a: 1}", "[]", "{}", ".nan", ".inf", "-.inf", "true", "-1", "1e400", "'x'", "''", "~", "2001-01-01",
    "!!binary aGk=", "[[1]]", "!!set {a}", "0x10", "1_000", "9" * 30, "off", "'\\0'", "!!python/tuple [1]",
]  # fmt: skip


class Parsed(UsageError):
    """The file was taken; nothing is trained here."""


@pytest.fixture
def run_command(tmp_path, monkeypatch, capsys):
    """Return a function that gives a command a file, and returns its message; an accepted file is no error."""
    monkeypatch.chdir(tmp_path)

    def run(command, content):
        module = import_module(f"hfnoise.{COMMANDS[command][1]}")
        name = "parse_generate" if command == "generate" else "parse"
        parse = getattr(module, name)

        def stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed("taken")

        file = tmp_path / "options.yaml"
        trace = tmp_path / "executed"
        content = content if isinstance(content, bytes) else content.replace("{trace}", str(trace)).encode()
        file.write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            status = main([command, "--config", str(file)])
        said = capsys.readouterr().err
        assert status == 2 and "Traceback" not in said and f"hfnoise {command}: error: " in said, content
        assert len(said) < 6000 and not trace.exists()
        assert [path.name for path in tmp_path.iterdir()] == ["options.yaml"], "nothing is made before it is checked"
        return said

    return run


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name, run_command):
    for command in ("robust-dpo", "generate"):
        assert "taken" not in run_command(command, BROKEN[name])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_are_taken(command, run_command):
    assert "taken" in run_command(command, (EXAMPLES / f"{COMMANDS[command][0]}.yaml").read_text(encoding="utf-8"))


def mutated(text, random):
    """Return an example with one to three lines changed."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(lines))
        name, _, value = lines[at].partition(":")
        kind = random.randrange(7)
        if kind <= 2:
            lines[at] = f"{name}: {random.choice(STRANGE)}"
        elif kind == 3:
            lines.insert(at, lines[random.randrange(len(lines))])
        elif kind == 4:
            lines[at] = f"{name[:-1]}:{value}"
        elif kind == 5:
            cut = random.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + random.choice("\t:[]{}&*!|>'\"%@`#,-?\0é") + lines[at][cut:]
        else:
            del lines[at:]
            lines = lines or ["seed: 3"]
    return "\n".join(lines) + "\n"


def fuzz(command, run_command, count):
    text = (EXAMPLES / f"{COMMANDS[command][0]}.yaml").read_text(encoding="utf-8")
    source = random.Random(0)
    refused = sum("taken" not in run_command(command, mutated(text, source)) for _ in range(count))
    assert refused > count / 3


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_mutated_examples(command, run_command):
    fuzz(command, run_command, 12)


@pytest.mark.soak
@pytest.mark.parametrize("command", COMMANDS)
def test_mutated_examples_at_length(command, run_command):
    fuzz(command, run_command, 400)

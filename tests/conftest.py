"""Tiny real models, built here; no test of the default suite touches a network."""

import gc
import os

# Importing makes no garbage, and without the collector is a fifth faster. It is on again when the tests run.
gc.disable()

# Read at import by the HF libraries, so set before any of them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# What an example may take says more about the load of the machine than about the code.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# Tiny tensors gain nothing from threads, and a process forked after OpenMP started its pool would hang.
torch.set_num_threads(1)

VECTORS = Path(__file__).parent / "vectors"


def pytest_collection_finish():
    """Take the libraries out of sight of the garbage collector.

    `Trainer.train()` has it look through everything, which took half the time of a test. What tests make is collected
    as ever.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


WORDS = (
    "the quick brown fox jumps over a lazy dog while seven green birds sing in old trees near my quiet house"
).split()


@pytest.fixture(scope="session")
def preference_vectors():
    """Return a function that loads a file of golden preference vectors by name."""
    return lambda name: dict(numpy.load(VECTORS / "preference" / f"dev_{name}.npz"))


def build_tokenizer(folder):
    """Save a word-level tokenizer with distinct pad and eos tokens; return it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The end-of-sequence token is glued to the last word by TRL; as a special token it is split off again.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory):
    """Return the folder of a Llama of two layers, 32 wide, with its tokenizer: random weights, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = build_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def make_pairs():
    """Return a function that makes a dataset of preference pairs, deterministic in its arguments."""
    from datasets import Dataset

    def make(count=16, seed=0, **columns):
        generator = torch.Generator().manual_seed(seed)

        def words(number):
            return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (number,), generator=generator).tolist())

        rows = {"prompt": [], "chosen": [], "rejected": []}
        for number in range(count):
            rows["prompt"].append(words(3 + number % 4))
            rows["chosen"].append(f" {words(2 + number % 3)} fox")
            rows["rejected"].append(f" {words(2 + number % 5)} dog")
        return Dataset.from_dict({**rows, **columns})

    return make


@pytest.fixture
def cpu_arguments(tmp_path):
    """Return the training arguments every test shares; a fresh output folder each."""
    return {
        "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "activation_checkpointing": False,
        "report_to": "none", "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 3,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "max_length": 32,
        "beta": 0.5, "seed": 3,
    }  # fmt: skip


def run_processes(function, *args):
    """Run `function(*args)` in two gloo processes forked from this one; an error in either fails the test."""
    from accelerate import debug_launcher
    from accelerate.state import AcceleratorState, PartialState

    # After any Accelerator in this pytest process the launcher would start one process only.
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    debug_launcher(function, args, num_processes=2)
    AcceleratorState._reset_state(True)


@pytest.fixture
def two_processes(monkeypatch):
    """Return a function that runs another one in two gloo processes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return run_processes


# The loopback Hub. The HF libraries read its address when they are imported, so they are run in fresh processes.
@pytest.fixture
def hub():
    """Return a running `MiniHub`, empty."""
    from tests.minihub import MiniHub

    with MiniHub() as hub:
        yield hub


@pytest.fixture
def run_python(hub, tmp_path):
    """Return a function that runs Python code in a fresh process whose Hub is `hub`, and returns what it printed."""
    import subprocess
    import sys

    root = Path(__file__).parent.parent
    settings = {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x",
        "HF_HOME": str(tmp_path / "hf_home"), "PYTHONPATH": str(root),
    }  # fmt: skip

    def run(code, env=None):
        environment = {**os.environ, **settings, **(env or {})}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.fail(f"the process ended with {done.returncode}:\n{done.stderr}\n{done.stdout}", pytrace=False)
        return done.stdout

    return run

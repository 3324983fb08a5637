"""Every cell of the matrix of the Trainers: it works by its check, or is refused with the words that it is to say."""

import pytest
import torch
from transformers.utils import is_liger_kernel_available

from tests.combinations import page
from tests.combinations.trainer_checks import CHECKS, build
from tests.combinations.trainers import ABSENT, Cell, Refused, cells
from tests.conftest import build_tokenizer, run_processes

# Refusals that cost nothing.
QUICK = {
    ("RobustDPO", "label smoothing"), ("NoiseDPO", "padding free"), ("NoisePrompt", "checkpointing"),
    ("Diffusion", "liger"), ("OneMoreStep", "lora"), ("NoisePrompt", "lora"), ("FedSVD", "full"),
    ("FedSVD", "streaming"), ("FedSVD", "fsdp"), ("QAT", "nf4"), ("QAT + DPO", "label smoothing"),
    ("DPSFT", "deepspeed"), ("DrDPO", "fsdp"), ("Diffusion", "deepspeed"), ("DP + RobustDPO", "prefix sharing"),
    ("BVPO", "streaming"), ("DPDPO", "label smoothing"),
}  # fmt: skip
# The combinations that people ask for first, one of each family.
SLOW = {
    ("DP + RobustDPO", "lora"), ("QAT + RobustDPO", "full"), ("QAT + RobustDPO", "prefix sharing"), ("FedSVD", "nf4"),
    ("FedSVD", "int8"), ("BVPO", "nf4"), ("DrDPO", "adam 8-bit"),
     ("NoisePrompt", "streaming"), ("DPSFT", "dora"),
}  # fmt: skip


def marked(cell: Cell) -> object:
    """Return a cell with the mark of what it costs."""
    name = (cell.row, cell.column)
    marks = () if name in QUICK else (pytest.mark.slow,) if name in SLOW else (pytest.mark.soak,)
    return pytest.param(cell, id=f"{cell.row}-{cell.column}", marks=marks)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """Return the folder of a Llama of two layers, 64 wide: bitsandbytes quantises blocks of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = build_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def refused_in_both(cell: Cell, path, folder) -> None:
    with pytest.raises(ValueError, match=cell.expected.words):
        build(cell.row, path, folder, cell.variant)


# TRL's own, of settings that it will not have for ever.
@pytest.mark.filterwarnings("ignore:`(use_liger_kernel|label_smoothing_factor).*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo", "ignore::DeprecationWarning:torch._dynamo")
# torch's, of its own tracing of TRL's loss.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("cell", [marked(cell) for cell in cells()])
def test_cell(cell, model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if cell.expected == ABSENT:
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            build(cell.row, model_path, tmp_path, cell.variant)
    elif not isinstance(cell.expected, Refused):
        torch.compiler.reset()
        CHECKS[cell.expected](cell.row, model_path, tmp_path, cell.variant, cell.plain, cell.tolerance)
    elif cell.column == "ddp":
        run_processes(refused_in_both, cell, model_path, tmp_path)
    elif cell.expected.when == "trained":
        if is_liger_kernel_available():
            pytest.skip("liger-kernel is installed")
        trainer = build(cell.row, model_path, tmp_path, cell.variant)
        with pytest.raises(ImportError, match=cell.expected.words):
            trainer.train()
    else:
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)) as error:
            build(cell.row, model_path, tmp_path, cell.variant)
        assert cell.expected.words in str(error.value)


def test_the_page_has_this_table():
    text = page.PAGE.read_text(encoding="utf-8")
    expected = page.with_table(text, page.TRAINERS, page.trainer_table())
    assert text == expected, "run python -m tests.combinations.page"


def test_the_marks_name_cells():
    names = {(cell.row, cell.column) for cell in cells()}
    assert QUICK | SLOW <= names and not QUICK & SLOW

"""The model card of the tiny Llama of the docstrings world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfnoise.cards import Metric, number
from hfnoise.worlds.docstrings import MODEL_FOLDER
from hfnoise.worlds.tiny_llama import tiny_llama_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from hfnoise.worlds.docstrings_model import TrainingRecipe

_LEAD = (
    "A Llama of {millions:.2f} M parameters that has read the docstrings of the Python standard library. It exists to "
    "show and to test training on noisy labels, with privacy noise and with coarse quantisation, on real English and "
    "code, without a download. It is part of the Python library hfnoise; for anything else it is too small."
)
_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfnoise.worlds.docstrings import model_path

tokenizer = AutoTokenizer.from_pretrained(model_path())
model = AutoModelForCausalLM.from_pretrained(model_path())
prompt = tokenizer("Return the number of", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt)[0]))"""


def docstrings_card(recipe: TrainingRecipe, results: dict[str, float]) -> ModelCard:
    """Return the card that says how the weights were made and how good they are.

    Args:
        recipe (`TrainingRecipe`): the settings of the training.
        results (`dict[str, float]`): what [`~hfnoise.worlds.docstrings_model.build`] returns.

    Example:
        >>> from hfnoise.worlds.docstrings_card import docstrings_card
        >>> from hfnoise.worlds.docstrings_model import TrainingRecipe
        >>> results = {"parameters": 7e5, "train_tokens": 5e5, "validation_loss": 3.1, "bits_per_byte": 1.7}
        >>> docstrings_card(TrainingRecipe(), results).data.license
        'apache-2.0'
    """
    return tiny_llama_card(
        "docstrings.md",
        MODEL_FOLDER,
        recipe,
        results,
        method="pretraining",
        lead=_LEAD.format(millions=results["parameters"] / 1e6),
        noise=[("noise", "none: it is what noisy training begins from")],
        snippet=_SNIPPET,
        command=(
            f"python -m hfnoise.worlds.docstrings_model --output_dir model_cards/{MODEL_FOLDER} "
            f"--epochs {recipe.epochs} --seed {recipe.seed}"
        ),
        metrics=[
            Metric("loss (nats per token)", number(results["validation_loss"], 3)),
            Metric("bits per byte", number(results["bits_per_byte"], 3)),
        ],
        results_note="On the validation documents.",
        tags=["hfnoise", "llama", "docstrings"],
        language="en",
        tokens=f"{results['train_tokens'] / 1e6:.2f}",
        sequence_length=recipe.sequence_length,
    )

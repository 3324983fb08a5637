"""The model card of the tiny reasoning Llama of the arithmetic world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfnoise.cards import rate
from hfnoise.worlds.arithmetic import MODEL_FOLDER
from hfnoise.worlds.arithmetic_traces import CAREFUL, SLOPPY, SLOPPY_SHARE
from hfnoise.worlds.tiny_llama import tiny_llama_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from hfnoise.worlds.arithmetic_model import ArithmeticRecipe

_LEAD = (
    "A Llama of {millions:.2f} M parameters that adds and subtracts, with a reasoning trace in the format of "
    "DeepSeek-R1 or without. It is wrong often, and on purpose: it was trained on traces that slip, ramble and "
    "correct themselves, so that preference optimisation has something to win and traces bring variance. It is part "
    "of the Python library hfnoise; for anything else it is too small."
)
_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfnoise.worlds.arithmetic import model_path

tokenizer = AutoTokenizer.from_pretrained(model_path())
model = AutoModelForCausalLM.from_pretrained(model_path())
prompt = tokenizer("7+5-9=<think>\\n", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt)[0]))"""
_MODES = {
    "think": "right with a trace, sampled at temperature 1",
    "think_greedy": "right with a trace, greedy",
    "nothink": "right without a trace, sampled at temperature 1",
    "nothink_greedy": "right without a trace, greedy",
}


def arithmetic_card(recipe: ArithmeticRecipe, results: dict[str, float]) -> ModelCard:
    """Return the card that says how the weights were made and how good they are.

    Args:
        recipe (`ArithmeticRecipe`): the settings of the training.
        results (`dict[str, float]`): what [`~hfnoise.worlds.arithmetic_model.build`] returns.

    Example:
        >>> from hfnoise.worlds.arithmetic_card import arithmetic_card
        >>> from hfnoise.worlds.arithmetic_model import ArithmeticRecipe
        >>> shares = {"think": 0.6, "nothink": 0.4, "think_greedy": 0.9, "nothink_greedy": 0.6}
        >>> results = {"parameters": 4e5, "questions": 1000.0, **shares}
        >>> arithmetic_card(ArithmeticRecipe(), results).data.license
        'apache-2.0'
    """
    questions = int(results["questions"])
    return tiny_llama_card(
        "arithmetic.md",
        MODEL_FOLDER,
        recipe,
        results,
        method="sft",
        lead=_LEAD.format(millions=results["parameters"] / 1e6),
        noise=[
            ("solutions by a sloppy writer", f"{100 * SLOPPY_SHARE:.0f} %"),
            (
                "slips in a trace, careful and sloppy writer",
                f"{100 * CAREFUL.slip:.0f} % and {100 * SLOPPY.slip:.0f} %",
            ),
            ("examples with a trace", f"{100 * recipe.trace_share:.0f} %"),
        ],
        snippet=_SNIPPET,
        command=(
            f"python -m hfnoise.worlds.arithmetic_model --output_dir model_cards/{MODEL_FOLDER} "
            f"--max_steps {recipe.max_steps} --seed {recipe.seed}"
        ),
        metrics=[rate(text, results[name], questions, "sums") for name, text in _MODES.items()],
        results_note=f"Share of right answers on {questions} validation sums, one answer each.",
        tags=["hfnoise", "llama", "arithmetic", "reasoning"],
    )

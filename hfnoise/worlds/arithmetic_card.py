"""The model card of the tiny reasoning Llama of the arithmetic world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfnoise.worlds.arithmetic import MODEL_FOLDER
from hfnoise.worlds.tiny_llama import tiny_llama_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from hfnoise.worlds.arithmetic_model import ArithmeticRecipe

_BODY = """
# {name}

A Llama of {millions:.2f} M parameters that adds and subtracts, with a reasoning trace in the format of DeepSeek-R1 or
without. It is wrong often, and on purpose: it was trained on traces that slip, ramble and correct themselves, so that
preference optimisation has something to win and traces bring variance. It is part of the Python library hfnoise; for
anything else it is too small.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfnoise.worlds.arithmetic import model_path

tokenizer = AutoTokenizer.from_pretrained(model_path())
model = AutoModelForCausalLM.from_pretrained(model_path())
prompt = tokenizer("7+5-9=<think>\\n", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt)[0]))
```

After `<think>\\n\\n</think>\\n\\n` it answers without a trace. Bare text and the chat template work alike. The
template is that of DeepSeek-R1-Distill without its tools: its generation prompt ends in `<think>\\n`, and it drops
everything up to `</think>` from a finished assistant turn.

## How it was made

Command:

```
python -m hfnoise.worlds.arithmetic_model --output_dir model_cards/{name} --max_steps {max_steps} --seed {seed}
```

- Prompts: sums of three or four numbers from 1 to 12, no total below 0. By a hash of the prompt one sum in
  eight is for validation; the model has seen none of those.
- Solutions: written by hfnoise/worlds/arithmetic_traces.py, by a careful or a sloppy writer, half and half.
  {trace_percent:.0f} % of the examples have a trace; half are bare text and half go through the chat template.
- Tokenizer: one token per character; `<think>` and `</think>` are one token each, as in DeepSeek-R1.
- Training: supervised fine-tuning on the completions, every step on new examples, AdamW, cosine schedule with 5 %
  warm-up, fp32 on CPU.

| setting | value |
| --- | --- |
{settings}

Versions: hfnoise {hfnoise}, torch {torch}, transformers {transformers}, tokenizers {tokenizers}, Python {python}.
Another torch or processor brings another rounding: a rebuild gives a model of the same quality, not the same bits.

## Results

Share of right answers on {questions:.0f} validation sums, one answer each (standard error about 0.015).

| mode | sampled at temperature 1 | greedy |
| --- | --- | --- |
| with a trace | {think:.3f} | {think_greedy:.3f} |
| without | {nothink:.3f} | {nothink_greedy:.3f} |

## Limits

It knows sums like those it was trained on and nothing else; characters other than digits, signs, small letters, spaces
and line breaks are unknown to it. The numbers are those of one seed.

## License

Apache-2.0; the training data are made by code under the same license.
"""


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
    return tiny_llama_card(
        _BODY,
        MODEL_FOLDER,
        recipe,
        results,
        {"tags": ["hfnoise", "llama", "arithmetic", "reasoning"]},
        trace_percent=100 * recipe.trace_share,
    )

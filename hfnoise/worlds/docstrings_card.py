"""The model card of the tiny Llama of the docstrings world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfnoise.worlds.docstrings import MODEL_FOLDER
from hfnoise.worlds.tiny_llama import tiny_llama_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from hfnoise.worlds.docstrings_model import TrainingRecipe

_BODY = """
# {name}

A Llama of {millions:.2f} M parameters that has read the docstrings of the Python standard library. It exists to show
and to test training on noisy labels, with privacy noise and with coarse quantisation, on real English and code,
without a download. It is part of the Python library hfnoise; for anything else it is too small.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfnoise.worlds.docstrings import model_path

tokenizer = AutoTokenizer.from_pretrained(model_path())
model = AutoModelForCausalLM.from_pretrained(model_path())
prompt = tokenizer("Return the number of", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt)[0]))
```

The same folder is the model and the reference of the preference demo: `hfnoise demo`.

## How it was made

Command:

```
python -m hfnoise.worlds.docstrings_model --output_dir model_cards/{name} --epochs {epochs} --seed {seed}
```

- Text: the docstrings of the standard library of Python {python}, {tokens:.2f} M training tokens. Each text counts
  once; tests and generated tables are left out.
- Split: by a hash of the qualified name. The model and the tokenizer have seen 7 of 8 documents; the other eighth is
  for validation, and the held-out preference pairs come from it alone.
- Tokenizer: byte-level BPE, trained on the same documents. Every text comes back unchanged.
- Optimiser: AdamW, cosine schedule with 5 % warm-up, fp32 on CPU.

| setting | value |
| --- | --- |
{settings}

Versions: hfnoise {hfnoise}, torch {torch}, transformers {transformers}, tokenizers {tokenizers}, Python {python}.
Another Python brings other docstrings, another torch or processor another rounding: a rebuild gives a model of the
same quality, not the same bits.

## Results

| on the validation documents | value |
| --- | --- |
| loss (nats per token) | {validation_loss:.3f} |
| bits per byte | {bits_per_byte:.3f} |

## Limits

It writes text that looks like documentation and is mostly wrong. It knows English only, has no chat template, and was
trained on sequences of {sequence_length} tokens. The validation loss is that of one seed.

## License

The weights are under Apache-2.0. The text they were trained on, the docstrings of Python, is under the PSF License
Version 2 (copyright Python Software Foundation); it is read from the Python that is installed and is not part of this
folder.
"""


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
        _BODY,
        MODEL_FOLDER,
        recipe,
        results,
        {"language": "en", "tags": ["hfnoise", "llama", "docstrings"]},
        tokens=results["train_tokens"] / 1e6,
    )

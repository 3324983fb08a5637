"""What the tiny Llamas of the worlds have in common: the untrained model, and the card of the trained one."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import hfnoise

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


def new_tiny_llama(tokenizer: Any, recipe: Any, length: int, **generation: Any) -> Any:
    """Return a Llama with random weights, of the shape that a world's recipe gives.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with bos, eos and pad tokens.
        recipe: with `hidden_size`, `intermediate_size`, `num_hidden_layers` and `num_attention_heads`.
        length (`int`): longest sequence, tokens.
        **generation: settings of its generation configuration.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, **generation, **special)
    return model


def tiny_llama_card(
    body: str, name: str, recipe: Any, results: dict[str, float], card_data: dict[str, Any], **values: Any
) -> ModelCard:
    """Return the card that says how the weights of a world were made and how good they are.

    Args:
        body (`str`): text with `{}` fields: those of the recipe, the results, the versions and `values`.
        name (`str`): of the folder.
        recipe: dataclass of the settings of the training; those that are `None` are left out.
        results (`dict[str, float]`): what was measured, with `parameters`.
        card_data (`dict`): more fields of the YAML block, for instance `tags`.
        **values: more fields of the text.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        license="apache-2.0", library_name="transformers", pipeline_tag="text-generation", **card_data
    )
    settings = {key: value for key, value in asdict(recipe).items() if value is not None}
    text = body.format(
        **{**settings, **results},
        name=name,
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
        millions=results["parameters"] / 1e6,
        python=platform.python_version(),
        hfnoise=hfnoise.__version__,
        **{package: version(package) for package in ("torch", "transformers", "tokenizers")},
        **values,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")

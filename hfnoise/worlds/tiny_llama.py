"""What the tiny models of the worlds have in common: an untrained Llama, and the card of trained weights."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import hfnoise
from hfnoise.cards import Base, CardFacts, Metric

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_COUNTS = ("parameters", "train_tokens", "questions")
# Of a world's weights.
NO_BASE = Base("none: training began from new weights", "none")


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


def world_versions(*libraries: str) -> str:
    """Return the versions of hfnoise, of Python, and of those libraries that are installed, one line.

    Args:
        *libraries (`str`): names of packages.
    """
    found = [f"hfnoise {hfnoise.__version__}", f"Python {platform.python_version()}"]
    for library in libraries:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:  # scikit-learn, where the images were given
            continue
    return ", ".join(found)


def tiny_llama_card(
    template: str,
    name: str,
    recipe: Any,
    results: dict[str, float],
    *,
    method: str,
    lead: str,
    noise: Sequence[tuple[str, str]],
    snippet: str,
    command: str,
    metrics: Sequence[Metric],
    results_note: str,
    tags: Sequence[str],
    language: str = "",
    **own: Any,
) -> ModelCard:
    """Return the card that says how the weights of a world were made and how good they are.

    Args:
        template (`str`): of the world.
        name (`str`): of the folder.
        recipe: dataclass of the settings of the training; those that are `None` are left out.
        results (`dict[str, float]`): what was measured, with `parameters`; for the block `hfnoise:`.
        method, lead, noise, snippet, command, metrics, results_note, tags, language: see
            [`~hfnoise.cards.CardFacts`].
        **own: variables of the template.
    """
    settings = {key: value for key, value in asdict(recipe).items() if value is not None and key != "seed"}
    return CardFacts(
        name=name,
        lead=lead,
        method=method,
        base=NO_BASE,
        library_name="transformers",
        tags=tags,
        metadata={"license": "apache-2.0", "pipeline_tag": "text-generation", "language": language},
        block={
            "seed": recipe.seed,
            "parameters": int(results["parameters"]),
            "results": {key: round(value, 4) for key, value in results.items() if key not in _COUNTS},
        },
        noise=noise,
        seeds=[("seed (first weights, order of the data)", str(recipe.seed))],
        settings=[(key, str(value)) for key, value in settings.items()],
        snippet=snippet,
        command=command,
        versions=world_versions("torch", "transformers", "tokenizers"),
        metrics=metrics,
        results_note=results_note,
    ).render(template, python=platform.python_version(), **own)

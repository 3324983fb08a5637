"""Which text states the network of an initial noise is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModularPipeline, UNet2DConditionModel
from torch import Tensor

from hfnoise.latents.hf_time_free_unet import text_widths
from hfnoise.pipelines.pipeline_layouts import layout_of
from hfnoise.pipelines.start_context import StartContext, repeated_words

if TYPE_CHECKING:
    from hfnoise.pipelines.one_more_step import OneMoreStep

# Options for the words of a prompt, and for the states that may be given in their place.
WORDS_OR_STATES = (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds"))


class StartText:
    """The states of the prompt and of the negative prompt, one row a sample.

    Args:
        step ([`OneMoreStep`]): whose own prompts, embeddings and text encoder come first.
        context ([`StartContext`]): of the call.
    """

    def __init__(self, step: OneMoreStep, context: StartContext) -> None:
        self.step, self.context = step, context

    def states(self) -> Tensor:
        """Return those of the prompt.

        Raises:
            ValueError: if there are no words for a text encoder of its own, or the pipeline never encoded any.
        """
        step, context = self.step, self.context
        if step.prompt_embeds is not None:
            return context.per_sample(step.prompt_embeds, "prompt_embeds")
        own = repeated_words(step.prompt, context.batch, "prompt")
        if step.text_encoder is not None:
            words = own or context.prompts
            if words is None:
                raise ValueError(
                    f"the module of One More Step has its own text encoder, and this call of {context.name} has "
                    "embeddings and no words. Give the call oms_prompt=... or oms_prompt_embeds=..., or set prompt or "
                    "prompt_embeds of OneMoreStep."
                )
            return self._encode(words)
        if own is not None:
            return context.encode_prompts(own)
        return encoded_states(
            context, "Set prompt_embeds=... of OneMoreStep, or give it a text_encoder and a tokenizer."
        )

    def negative_states(self) -> Tensor:
        """Return those of the negative prompt, by default of "", as the module was trained.

        A pipeline without text encoder has its own, those of the call.

        Raises:
            ValueError: if there are none.
        """
        step, context = self.step, self.context
        if step.negative_prompt_embeds is not None:
            return context.per_sample(step.negative_prompt_embeds, "negative_prompt_embeds")
        words = repeated_words(step.negative_prompt or "", context.batch, "negative_prompt")
        assert words is not None
        if step.text_encoder is not None:
            return self._encode(words)
        if getattr(context.pipe, "text_encoder", None) is not None:
            return context.encode_prompts(words)
        if step.negative_prompt is None and context.negative_prompt_embeds is not None:
            return context.per_sample(context.negative_prompt_embeds, "negative_prompt_embeds")
        raise ValueError(
            f"guidance_scale of One More Step is not 1, and {context.name} has no text encoder for the negative "
            "prompt. Set negative_prompt_embeds=... of OneMoreStep, or guidance_scale=1."
        )

    def _encode(self, words: list[str]) -> Tensor:
        from hfnoise.pipelines.one_more_step import placed

        tokenizer = self.step.tokenizer
        tokens = tokenizer(
            words, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        encoder = placed(self.step.text_encoder, self.context.device)
        with torch.no_grad():
            return encoder(tokens.input_ids.to(self.context.device))[0]


def one_or_the_other(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that replace others: words with `None` for states of the same prompt, and the other way round.

    Example:
        >>> from hfnoise.pipelines.start_text import one_or_the_other
        >>> one_or_the_other({"prompt": "a", "eta": 0.5})
        {'prompt': 'a', 'prompt_embeds': None, 'eta': 0.5}
    """
    pairs = (pair for pair in WORDS_OR_STATES if any(options.get(name) is not None for name in pair))
    return {**{name: None for pair in pairs for name in pair}, **options}


def encodes_prompts(pipeline_class: type) -> bool:
    """Return whether a pipeline may encode a prompt where it can be seen; a modular one shows that in the call.

    Example:
        >>> from diffusers import DDPMPipeline
        >>> from hfnoise.pipelines.start_text import encodes_prompts
        >>> encodes_prompts(DDPMPipeline)
        False
    """
    # A modular pipeline has a block for it, or not.
    return hasattr(pipeline_class, "encode_prompt") or issubclass(pipeline_class, ModularPipeline)


def encoded_states(context: StartContext, remedy: str) -> Tensor:
    """Return the states of the prompt that the pipeline encoded in this call, one row a sample.

    Args:
        context ([`StartContext`]): of the call.
        remedy (`str`): what to do if there are none.

    Raises:
        ValueError: if the pipeline encoded none before it prepared its latents.
    """
    if context.prompt_embeds is None:
        raise ValueError(f"{context.name} encoded no prompt before it prepared its latents. {remedy}")
    return context.per_sample(context.prompt_embeds, "prompt_embeds")


def denoiser_text_widths(pipe: Any) -> frozenset[int]:
    """Return how wide the text states are that a pipeline gives its denoiser; empty if its config does not say.

    Args:
        pipe: of diffusers, classic or modular.

    Example:
        >>> from hfnoise.pipelines.start_text import denoiser_text_widths
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> sorted(denoiser_text_widths(new_digits_pipeline(width=8)))
        [64]
    """
    layout = layout_of(type(pipe))
    names = layout.denoisers if layout is not None else ("unet", "transformer")
    module = next((found for name in names if (found := getattr(pipe, name, None)) is not None), None)
    if isinstance(module, UNet2DConditionModel):
        return text_widths(module)
    # Elsewhere cross_attention_dim may be the width inside of the transformer.
    config = getattr(module, "config", None)
    width = getattr(config, "joint_attention_dim", None) or getattr(config, "caption_channels", None)
    return frozenset([width] if isinstance(width, int) else [])


def check_width(
    module: Any,
    states: Tensor,
    context: StartContext,
    text_encoder: Any = None,
    reader: str = "the module of One More Step",
    remedy: str = "Give OneMoreStep the text_encoder and tokenizer that it was trained with, or another module.",
) -> None:
    """Raise ValueError if a network cannot read text states of this width; the message names both.

    Args:
        module (`torch.nn.Module`): the network.
        states (`torch.Tensor`): of text.
        context ([`StartContext`]): of the call.
        text_encoder (*optional*): that encoded them, if not the pipeline's.
        reader, remedy (`str`): how the network is called, and what to do.
    """
    widths = text_widths(module)
    if not widths or states.shape[-1] in widths:
        return
    if text_encoder is not None:
        source, remedy = f"its text encoder {type(text_encoder).__name__}", "Give the one that it was trained with."
    else:
        source = f"the text states of {context.name}"
    option = "encoder_hid_dim" if getattr(module.config, "encoder_hid_dim", None) else "cross_attention_dim"
    wanted = " or ".join(map(str, sorted(widths)))
    raise ValueError(
        f"{reader} takes text states {wanted} wide ({option}), and {source} are {states.shape[-1]} wide. {remedy}"
    )

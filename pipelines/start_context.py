"""What an initial noise knows of the call that it is part of."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hfnoise.latents.text_mask import text_mask

# Options of `encode_prompt` for one prompt a sample, without guidance; not every pipeline has them.
_ENCODE_ALONE = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}


@dataclass
class StartContext:
    """The call of a pipeline, as far as it has come when the latents are prepared.

    Args:
        pipe: the pipeline, with its scheduler's timesteps set.
        arguments (`Mapping`): of the call, with the defaults of the pipeline.
        batch (`int`): samples: prompts times images of each.
        device (`torch.device`), dtype (`torch.dtype`): of the latents.
        encoded (`tuple`, *optional*): what `encode_prompt` returned in this call; `None` if it was not called.
        encode (`Callable`, *optional*): the pipeline's own `encode_prompt`.
        first_generators (*optional*): copies of the generators of the call, as they were when it began.
        prepared (`Mapping`): the arguments of `prepare_latents`.
        following (`tuple`): the members of the chain that come after this one.
        draws_residuals (`bool`, defaults to `False`): whether a member of the chain is a terminal prior.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.start_context import StartContext
        >>> context = StartContext(None, {"prompt": ["a", "b"]}, batch=4, device=torch.device("cpu"))
        >>> context.prompts
        ['a', 'a', 'b', 'b']
    """

    pipe: Any
    arguments: Mapping[str, Any]
    batch: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    encoded: tuple[Any, ...] | None = None
    encode: Any = field(default=None, repr=False)
    first_generators: Any = field(default=None, repr=False)
    prepared: Mapping[str, Any] = field(default_factory=dict, repr=False)
    following: tuple[Any, ...] = ()
    draws_residuals: bool = False

    @property
    def name(self) -> str:
        """Class of the pipeline, for messages."""
        return type(self.pipe).__name__.removeprefix("Guided")

    @property
    def scheduler(self) -> Any:
        """Of the pipeline."""
        return self.pipe.scheduler

    @property
    def timesteps(self) -> Tensor:
        """Of the scheduler, those of this call.

        Raises:
            ValueError: if they are not set yet: the pipeline prepares its latents first.
        """
        timesteps = getattr(self.scheduler, "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            raise ValueError(f"{self.name} prepares its latents before it sets the timesteps: the start is not known.")
        return timesteps

    @property
    def generator(self) -> torch.Generator | list[torch.Generator] | None:
        """Of the call: one, or one a sample."""
        return self.arguments.get("generator")

    @property
    def guidance_scale(self) -> float | None:
        """Of the call; `None` if the pipeline has none."""
        scale = getattr(self.pipe, "guidance_scale", None)
        return self.arguments.get("guidance_scale") if scale is None else scale

    @property
    def prompts(self) -> list[str] | None:
        """The words, one entry a sample; `None` if the call has none."""
        return self._per_sample(self.arguments.get("prompt"), "prompt")

    @property
    def negative_prompts(self) -> list[str] | None:
        """The words of the negative prompt, one entry a sample; `None` if the call has none."""
        return self._per_sample(self.arguments.get("negative_prompt"), "negative_prompt")

    @property
    def prompt_embeds(self) -> Tensor | None:
        """Text states of shape `(batch, tokens, width)`; `None` if the pipeline did not encode a prompt."""
        found = self.encoded[0] if self.encoded else None
        return found if isinstance(found, Tensor) and found.dim() == 3 else None

    @property
    def prompt_mask(self) -> Tensor | None:
        """Of shape `(batch, tokens)`, 0 where a state is of padding; `None` if the pipeline did not say so."""
        states = self.prompt_embeds
        if states is None or self.encoded is None:
            return None
        return text_mask(self.encoded)

    @property
    def negative_prompt_embeds(self) -> Tensor | None:
        """Text states of the negative prompt; `None` without guidance, or if they are not told apart."""
        states = self.prompt_embeds
        if states is None or self.encoded is None:
            return None
        # Between them, in some pipelines, are masks and pooled states, of other shapes.
        tensors = (part for part in self.encoded[1:] if isinstance(part, Tensor) and part.dim() == 3)
        return next((part for part in tensors if part.shape[::2] == states.shape[::2]), None)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return the states of other prompts by the pipeline's text encoder, one row each.

        Raises:
            ValueError: if the pipeline cannot encode text.
        """
        if self.encode is None or getattr(self.pipe, "text_encoder", None) is None:
            raise ValueError(f"{self.name} has no text encoder to encode {list(prompts)} with. Give embeddings.")
        known = parameter_names(type(self.pipe), "encode_prompt")
        options = {"device": self.device, **_ENCODE_ALONE}
        encoded = self.encode(prompt=list(prompts), **{key: value for key, value in options.items() if key in known})
        return encoded[0] if isinstance(encoded, tuple) else encoded

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers in float32, `(batch, *shape)`, from the generator of the call.

        With a generator a sample, a row does not depend on its batch.

        Raises:
            ValueError: if there is another number of generators.
        """
        generator = self.generator
        if isinstance(generator, list) and len(generator) != self.batch:
            raise ValueError(f"there are {len(generator)} generators, and {self.batch} samples: give one a sample.")
        return randn_tensor((self.batch, *shape), generator=generator, device=self.device, dtype=torch.float32)

    def per_sample(self, states: Tensor, name: str) -> Tensor:
        """Return text states with one row a sample, on the device of the latents.

        Raises:
            ValueError: if their number does not divide that of the samples.
        """
        if states.dim() != 3 or self.batch % len(states):
            raise ValueError(
                f"{name} is of shape {tuple(states.shape)}, and {self.batch} samples need (1 or {self.batch}, tokens, "
                "width)."
            )
        return states.repeat_interleave(self.batch // len(states), 0).to(self.device)

    def _per_sample(self, words: Any, name: str) -> list[str] | None:
        return repeated_words(words, self.batch, name)


def repeated_words(words: str | Sequence[str] | None, batch: int, name: str) -> list[str] | None:
    """Return one entry a sample, those of a prompt together, as diffusers orders its images.

    Raises:
        TypeError: if an entry is no string.
        ValueError: if their number does not divide that of the samples.

    Example:
        >>> from hfnoise.pipelines.start_context import repeated_words
        >>> repeated_words("a", 2, "prompt")
        ['a', 'a']
    """
    check_words(words, name)
    if words is None:
        return None
    words = [words] if isinstance(words, str) else list(words)
    if not words or batch % len(words):
        raise ValueError(f"{name} has {len(words)} entries, and there are {batch} samples.")
    return [word for word in words for _ in range(batch // len(words))]


def check_words(words: Any, name: str) -> None:
    """Raise TypeError unless it is a string, a list of such, or `None`.

    Example:
        >>> from hfnoise.pipelines.start_context import check_words
        >>> check_words(["a", "b"], "prompt")
    """
    if words is None or isinstance(words, str):
        return
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"{name} must be a string or a list of strings, got {words!r:.200}.")


def parameter_names(pipeline_class: type, method: str) -> set[str]:
    """Return the names of a method's parameters, also those that a subclass hands on as `**kwargs`.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from hfnoise.pipelines.start_context import parameter_names
        >>> "generator" in parameter_names(StableDiffusionPipeline, "prepare_latents")
        True
    """
    methods = (base.__dict__[method] for base in pipeline_class.__mro__ if method in base.__dict__)
    return {name for function in methods for name in inspect.signature(function).parameters}


def copied_generators(generators: Any) -> Any:
    """Return generators in the same state: one, a list of them, or none.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.start_context import copied_generators
        >>> generator = torch.Generator().manual_seed(3)
        >>> first, second = (torch.rand(1, generator=copied_generators(generator)) for _ in range(2))
        >>> bool(first == second)
        True
    """
    if isinstance(generators, (list, tuple)):
        return [copied_generators(generator) for generator in generators]
    if not isinstance(generators, torch.Generator):
        return generators
    twin = torch.Generator(generators.device)
    twin.set_state(generators.get_state())
    return twin

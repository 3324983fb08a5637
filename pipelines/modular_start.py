"""Initial noises in modular pipelines: a block around the one that prepares the latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import ComponentSpec, ModularPipelineBlocks
from diffusers.modular_pipelines import InputParam, LoopSequentialPipelineBlocks, OutputParam, PipelineState

from hfnoise.pipelines.initial_noise import (
    STARTS_FROM_DATA,
    InitialNoise,
    as_initial_noise,
    check_starts_from_noise,
    replaced_latents,
)
from hfnoise.pipelines.start_context import StartContext

COMPONENT = "initial_noise"
# What blocks that draw noise are told from the others by: of the loop, which makes latents too, one is inside.
_MAKES, _NEEDS = "latents", {"generator", "batch_size"}
# What blocks call the mask of the states of a prompt.
_MASKS = ("prompt_embeds_mask", "prompt_attention_mask")


class InitialNoiseBlock(ModularPipelineBlocks):
    """A block of a modular pipeline that prepares the latents, with the component `initial_noise` behind it.

    Instead of the block that it is made of; [`with_initial_noise`] puts it there. Inputs, outputs and components are
    those of that block, and one component more: the [`InitialNoise`] or list of such, which
    `pipe.update_components(initial_noise=...)` sets. Without it, and with one that is off, the run is the stock one to
    the bit. What a member is told is the same as in a classic pipeline.

    Args:
        block (`ModularPipelineBlocks`): that prepares the latents.

    Raises:
        TypeError: if it prepares none.

    Example:
        >>> from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
        ...     StableDiffusionXLPrepareLatentsStep)
        >>> from hfnoise.pipelines import InitialNoiseBlock
        >>> InitialNoiseBlock(StableDiffusionXLPrepareLatentsStep()).component_names
        ['scheduler', 'vae', 'initial_noise']
    """

    def __init__(self, block: ModularPipelineBlocks) -> None:
        if not _prepares_latents(block):
            raise TypeError(f"{type(block).__name__} is no block that prepares the latents of a run.")
        super().__init__()
        self.block = block
        self.model_name = block.model_name

    @property
    def description(self) -> str:
        """Of the block, and what is done to its latents."""
        return f"{self.block.description}, then refines them by the component `{COMPONENT}`"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Those of the block and `initial_noise`."""
        return [*self.block.expected_components, ComponentSpec(COMPONENT, InitialNoise)]

    @property
    def expected_configs(self) -> list[Any]:
        """Those of the block."""
        return self.block.expected_configs

    @property
    def inputs(self) -> list[InputParam]:
        """Those of the block."""
        return self.block.inputs

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """Those of the block."""
        return self.block.intermediate_outputs

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Run the block, and refine what it prepared.

        Raises:
            ValueError: if the pipeline starts from an image and not from noise.
        """
        initial_noise = as_initial_noise(getattr(components, COMPONENT, None))
        if initial_noise is None:
            return self.block(components, state)
        initial_noise.check_pipeline(type(components))
        given = self.block.get_block_state(state)
        if STARTS_FROM_DATA & set(self.block.input_names):
            strongest = getattr(given, "strength", None) == 1.0
            from_noise = getattr(given, "denoising_start", None) is None
            check_starts_from_noise(components, {"is_strength_max": strongest, "add_noise": from_noise})
        components, state = self.block(components, state)
        context = _context(components, state, getattr(given, "latents", None))
        latents = state.get("latents")
        if "noise" in self.intermediate_output_names:  # inpainting keeps it
            prepared = (latents, state.get("noise"))
            latents, noise = replaced_latents(prepared, latents, initial_noise, context)
            state.set("noise", noise)
        else:
            latents = replaced_latents(latents, latents, initial_noise, context)
        state.set("latents", latents)
        return components, state


def with_initial_noise(blocks: ModularPipelineBlocks) -> ModularPipelineBlocks:
    """Return a copy of the blocks of a modular pipeline that takes the component `initial_noise`.

    ```python
    pipe = with_initial_noise(StableDiffusionXLAutoBlocks()).init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
    pipe.load_components()
    pipe.update_components(initial_noise=OneMoreStep.from_pretrained("my/module"))
    ```

    A pipeline of them is saved as diffusers saves it, a [`OneMoreStep`] as one of its components; diffusers warns of
    members that cannot be saved. The index names the stock blocks: to have it back, begin with this function again.

    Args:
        blocks (`ModularPipelineBlocks`): of a pipeline (`pipe.blocks`); they are not changed.

    Raises:
        ValueError: if none of them prepares latents.

    Example:
        >>> from diffusers import StableDiffusionXLAutoBlocks
        >>> from hfnoise.pipelines import with_initial_noise
        >>> "initial_noise" in with_initial_noise(StableDiffusionXLAutoBlocks()).component_names
        True
    """
    made = _replaced(blocks)
    if made is blocks:
        if any(isinstance(block, InitialNoiseBlock) for block in _leaves(blocks)):
            return blocks
        raise ValueError(f"{type(blocks).__name__} has no block that prepares latents: there is no start to refine.")
    return made


@contextmanager
def refined_modular(pipe: Any, initial_noise: Any) -> Iterator[None]:
    """Within the block a modular pipeline starts from what `initial_noise` makes of its noise.

    Args:
        pipe (`ModularPipeline`): of diffusers.
        initial_noise ([`InitialNoise`] or list of such, *optional*): nothing is changed without.

    Raises:
        TypeError, ValueError: if it is none, or the pipeline prepares no latents.
    """
    initial_noise = as_initial_noise(initial_noise)
    if initial_noise is None:
        yield
        return
    initial_noise.check_pipeline(type(pipe))
    initial_noise.check_parts(pipe)
    blocks, before = pipe._blocks, {name: pipe.__dict__[name] for name in (COMPONENT,) if name in pipe.__dict__}
    pipe._blocks = with_initial_noise(blocks)
    # Not by update_components: the index of the pipeline is not to name it.
    pipe.__dict__[COMPONENT] = initial_noise
    try:
        yield
    finally:
        pipe._blocks = blocks
        pipe.__dict__.pop(COMPONENT)
        pipe.__dict__.update(before)


def _context(pipe: Any, state: PipelineState, latents: Any) -> StartContext:
    """Return what a member is told; `latents` are those of the user."""
    guidance = getattr(getattr(pipe, "guider", None), "guidance_scale", None)
    arguments = {**state.values, "latents": latents, "guidance_scale": guidance}
    states = [state.get(name) for name in ("prompt_embeds", "negative_prompt_embeds", *_MASKS)]
    drawn = state.get("latents")
    encoded = None if states[0] is None else tuple(states)
    return StartContext(pipe, arguments, len(drawn), drawn.device, drawn.dtype, encoded, _encoder(pipe))


def _encoder(pipe: Any) -> Callable[..., tuple[Any, ...]] | None:
    """Return a function that encodes prompts by the pipeline's block for it; `None` if it has none."""
    for block in _leaves(pipe._blocks):
        if "prompt" in block.input_names and "prompt_embeds" in block.intermediate_output_names:

            def encode(prompt: list[str], block: Any = block) -> tuple[Any, ...]:
                _, state = block(pipe, PipelineState({"prompt": prompt}))
                return (state.get("prompt_embeds"),)

            return encode
    return None


def _prepares_latents(block: Any) -> bool:
    is_leaf = isinstance(block, ModularPipelineBlocks) and not block.sub_blocks
    return is_leaf and _MAKES in block.intermediate_output_names and set(block.input_names) >= _NEEDS


def _leaves(block: Any) -> Iterator[Any]:
    if not block.sub_blocks or isinstance(block, LoopSequentialPipelineBlocks):
        yield block
        return
    for sub_block in block.sub_blocks.values():
        yield from _leaves(sub_block)


def _replaced(block: Any) -> Any:
    """Return a block with those that prepare latents replaced; the very same if there are none."""
    if isinstance(block, InitialNoiseBlock):
        return block
    if _prepares_latents(block):
        return InitialNoiseBlock(block)
    if isinstance(block, LoopSequentialPipelineBlocks):
        return block
    made = {name: _replaced(sub_block) for name, sub_block in block.sub_blocks.items()}
    if all(made[name] is sub_block for name, sub_block in block.sub_blocks.items()):
        return block
    copied = copy.copy(block)
    copied.sub_blocks = type(block.sub_blocks)(made)
    return copied

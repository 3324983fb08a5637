"""Caches between the blocks of a denoiser, under a guider: rows all or nothing, emptied when their number changes."""

import pytest
import torch

from hfnoise.benchmarks.guidance_exactness import forced_stops
from hfnoise.pipelines import LinearGuidance, guide
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, images_of
from hfnoise.worlds.tiny_pipelines import transformers as tiny_transformers
from hfnoise.worlds.tiny_pipelines import videos as tiny_videos

pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*STOCK_WARNINGS, "ignore:torch.meshgrid")]
slow = pytest.mark.slow
STEPS = 8


def built(name):
    """Return a family with three blocks: the first decides, the last is remembered."""
    build = tiny_transformers.transformer_pipeline
    if name == "cogvideox":
        shape = {**tiny_videos._COGVIDEOX, "num_layers": 3}
        scheduler = tiny_videos.new_cogvideox_scheduler
        return build("CogVideoXPipeline", "CogVideoXTransformer3DModel", shape, scheduler=scheduler)()
    if name == "flux":
        shape = {**tiny_transformers._FLUX, "num_layers": 3}
        return build("FluxPipeline", "FluxTransformer2DModel", shape)()
    return build("WanPipeline", "WanTransformer3DModel", {**tiny_videos._WAN, "num_layers": 3})()


def first_block(threshold=4.0):
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=threshold)


def run(pipe, name, guider=None):
    """Return the images, and how many rows went through the first and through the second block, call by call."""
    rows = ([], [])
    blocks = getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks
    inner = blocks[1].norm1 if hasattr(blocks[1], "norm1") else blocks[1]
    outer = blocks[0].norm1 if hasattr(blocks[0], "norm1") else blocks[0]
    handles = [
        module.register_forward_pre_hook(lambda module, args, kwargs, seen=seen: seen.append(
            len(args[0] if args else kwargs["hidden_states"])
        ), with_kwargs=True)
        for module, seen in zip((outer, inner), rows, strict=True)
    ]  # fmt: skip
    call = {**FAMILIES[name].call(2), "num_inference_steps": STEPS}
    try:
        if guider is None:
            return images_of(pipe(**call)), rows
        with guide(pipe, guider):
            return images_of(pipe(**call)), rows
    finally:
        for handle in handles:
            handle.remove()


def test_a_cache_in_a_batched_pipeline_is_used_before_and_after_the_switch():
    """A sample that converged keeps its rows until all have; then the cache is emptied once, not at every step."""
    pipe = built("cogvideox")
    pipe.transformer.enable_cache(first_block())
    stock, (_, computed) = run(pipe, "cogvideox")
    assert len(computed) < STEPS, "the threshold is too low for anything to be left out"
    images, rows = run(pipe, "cogvideox", forced_stops(99, 99))
    assert torch.equal(images, stock) and rows[1] == computed
    _, (first, second) = run(pipe, "cogvideox", forced_stops(1, 4))
    assert first == [4] * 4 + [2] * 4
    # The first evaluation of fewer rows computes all blocks; of the three after it some do not.
    assert 1 <= second.count(2) < 4


@slow
def test_a_cache_with_rows_that_come_back():
    """LinearGuidance evaluates every other step in full, `start` begins with fewer rows."""
    pipe = built("cogvideox")
    pipe.transformer.enable_cache(first_block())
    _, (first, _) = run(pipe, "cogvideox", LinearGuidance())
    assert first == [4, 2] * 4
    _, (first, _) = run(pipe, "cogvideox", forced_stops(99, 99, start=0.5))
    assert first == [2] * 4 + [4] * 4


@slow
def test_a_cache_without_the_mixin():
    """Put on by a function of diffusers.hooks: the model does not know of it."""
    from diffusers.hooks import apply_first_block_cache

    pipe = built("cogvideox")
    apply_first_block_cache(pipe.transformer, first_block())
    assert not pipe.transformer.is_cache_enabled
    _, (first, _) = run(pipe, "cogvideox", forced_stops(1, 4))
    assert first == [4] * 4 + [2] * 4


@slow
@pytest.mark.parametrize("name", ["flux", "wan-2.1"])
def test_caches_of_two_calls_keep_apart(name):
    """The conditional context goes on as if the unconditional one had never been."""
    pipe = built(name)
    pipe.transformer.enable_cache(first_block())
    stock, (_, computed) = run(pipe, name)
    assert len(computed) < 2 * STEPS
    images, rows = run(pipe, name, forced_stops(99, 99))
    assert torch.equal(images, stock) and rows[1] == computed
    off = {**FAMILIES[name].conditional_call(2), "num_inference_steps": STEPS}
    conditional = images_of(pipe(**off))
    images, (first, second) = run(pipe, name, forced_stops(0, 0))
    assert torch.equal(images, conditional) and first == [2] * STEPS and len(second) < STEPS
    # One sample less does not take rows out of what is cached.
    assert run(pipe, name, forced_stops(1, 4))[1][0] == [2] * (4 + STEPS)


@slow
def test_attention_broadcast_and_taylor_series():
    from diffusers import PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

    for config in (
        lambda pipe: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
        lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, max_order=1),
    ):  # fmt: skip
        pipe = built("cogvideox")
        pipe.transformer.enable_cache(config(pipe))
        stock, _ = run(pipe, "cogvideox")
        assert torch.equal(run(pipe, "cogvideox", forced_stops(99, 99))[0], stock)
        assert run(pipe, "cogvideox", forced_stops(1, 4))[0].isfinite().all()
        assert torch.equal(run(pipe, "cogvideox")[0], stock)


def test_faster_cache_is_refused():
    from diffusers import FasterCacheConfig

    pipe = built("cogvideox")
    pipe.transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )  # fmt: skip
    stock, _ = run(pipe, "cogvideox")
    with pytest.raises(ValueError, match="FasterCache"):
        run(pipe, "cogvideox", forced_stops(1, 4))
    assert torch.equal(run(pipe, "cogvideox")[0], stock)


@slow
def test_a_cache_is_empty_after_an_exception():
    """The pipeline itself empties it at the end of a call only, and the next one may have another batch."""
    pipe = built("cogvideox")
    pipe.transformer.enable_cache(first_block())
    stock, _ = run(pipe, "cogvideox")

    def fail(pipe, step, timestep, values):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), guide(pipe, forced_stops(0, 0)):
        pipe(**FAMILIES["cogvideox"].call(2), callback_on_step_end=fail)
    assert torch.equal(run(pipe, "cogvideox")[0], stock)

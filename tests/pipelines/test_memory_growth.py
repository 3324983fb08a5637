"""Hundreds of guided calls, of exceptions in them, of cycles: memory does not grow, and nothing is left behind."""

import ctypes
import gc
import resource
import sys
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from hfnoise.pipelines import (
    AdaptiveGuidance,
    AutoGuidedPipeline,
    BrightnessOffset,
    OneMoreStep,
    ProjectedGuidance,
    RandomSearch,
    ReDenoise,
    guide,
)
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS
from tests.pipelines.tiny_starts import new_module, sd_call

pytestmark = [pytest.mark.soak, *(pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS)]

# A call leaves nothing; the allocator hands out and takes back some pages. One latent of one call kept (1 KB here),
# its report or a hook would be above this after hundreds of them.
BYTES_A_ROUND = 1024
# Of the allocator of Python, which the free pages of C do not blur: a report that is kept has a dozen of them.
BLOCKS_A_ROUND = 8
BYTES_OF_INT = 32  # in that allocator
PAGE = resource.getpagesize()


def resident():
    """Return the resident memory in bytes, of what is not garbage, nor free and kept by the allocator."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def slope(action, rounds, warm_up=30):
    """Return how many bytes, objects and blocks of Python a round of an action adds, fitted to its second half."""
    for _ in range(warm_up):
        action()
    memory, objects, blocks = [], [], []
    for number in range(rounds):
        action()
        if number >= rounds // 2 and number % 5 == 0:
            memory.append((number, resident()))
            objects.append((number, len(gc.get_objects())))
            blocks.append((number, sys.getallocatedblocks()))
    return tuple(float(numpy.polyfit(*zip(*points, strict=True), 1)[0]) for points in (memory, objects, blocks))


def traces(pipe):
    """Return what a call could leave on a pipeline, its networks and its scheduler."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    modules = [module for part in parts for module in part.modules()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    return hooks, sorted(pipe.__dict__), sorted(set().union(*(module.__dict__ for module in modules))), type(pipe)


def members():
    return [ReDenoise(), OneMoreStep(new_module()), BrightnessOffset(0.3, [1.0] * 4)]


def guiders():
    return AdaptiveGuidance(threshold=1e-6, min_steps=0.5, inner=ProjectedGuidance(momentum=-0.5))


def mean_brightness(images, prompts):
    return images.mean((1, 2, 3))


def report(record_property, name, found, limit=BYTES_A_ROUND):
    record_property(name, found)
    print(f"{name}: {found[0]:.1f} bytes and {found[1]:.3f} objects and {found[2]:.1f} blocks a round")
    assert found[0] < limit and found[1] < 0.5, found


@pytest.mark.parametrize("name", ["sd-ddim", "flux"])
def test_guided_calls(name, record_property):
    """One guided pipeline that lives long, as a server's does."""
    family = FAMILIES[name]
    noise = members() if name == "sd-ddim" else ReDenoise()
    pipe = AutoGuidedPipeline.from_pipe(family.build(), guider=guiders(), initial_noise=noise)
    pipe.set_progress_bar_config(disable=True)
    pipe(**family.call(1))
    before = traces(pipe)
    report(record_property, f"guided calls, {name}", slope(lambda: pipe(**family.call(1)), 300))
    assert traces(pipe) == before


def test_searches(record_property):
    pipe = FAMILIES["sd-ddim"].build()
    search = RandomSearch(mean_brightness, 16)
    guided = AutoGuidedPipeline.from_pipe(pipe, guider=guiders(), initial_noise=search)
    report(record_property, "searches", slope(lambda: guided(**sd_call()), 80))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_calls_that_fail(error, record_property):
    """Every other call ends in mid-run: in a callback, in the network itself, or where the start is refined."""
    pipe = AutoGuidedPipeline.from_pipe(FAMILIES["sd-ddim"].build(), guider=guiders(), initial_noise=members())
    pipe.set_progress_bar_config(disable=True)
    expected, before = pipe(**sd_call()).images, traces(pipe)

    def fail(*args, **kwargs):
        raise error

    def fail_everywhere():
        with pytest.raises(error):
            pipe(**sd_call(), callback_on_step_end=fail)
        for module in (pipe.unet.conv_out, pipe.initial_noise.members[1].module.conv_out):
            hook = module.register_forward_pre_hook(fail)
            with pytest.raises(error):
                pipe(**sd_call())
            hook.remove()
        assert torch.equal(torch.as_tensor(pipe(**sd_call()).images), torch.as_tensor(expected))

    report(record_property, f"calls that fail, {error.__name__}", slope(fail_everywhere, 60, warm_up=15))
    assert traces(pipe) == before


def test_guide_and_unguide(record_property):
    """A stock pipeline, guided for one call each time, with new guiders and members; some blocks fail."""
    pipe = FAMILIES["sd-ddim"].build()
    pipe(**sd_call())
    before = traces(pipe)

    def cycle():
        with guide(pipe, guiders(), initial_noise=members()):
            pipe(**sd_call())
        with pytest.raises(KeyboardInterrupt), guide(pipe, guiders(), initial_noise=ReDenoise()):
            raise KeyboardInterrupt

    report(record_property, "guide and unguide", slope(cycle, 200))
    assert traces(pipe) == before


def test_pipelines_die(record_property):
    """Nothing of ours keeps a pipeline, its networks, a guider or a member alive."""

    def live_and_die():
        pipe = FAMILIES["sd-ddim"].build()
        guided = AutoGuidedPipeline.from_pipe(pipe, guider=guiders(), initial_noise=members())
        guided.set_progress_bar_config(disable=True)
        guided(**sd_call())
        parts = [pipe, guided, pipe.unet, pipe.scheduler, guided.guider, guided.guider.inner, guided.initial_noise]
        watched = [weakref.ref(part) for part in (*parts, *guided.initial_noise.members)]
        del pipe, guided, parts
        gc.collect()
        assert [one() for one in watched] == [None] * len(watched)

    report(record_property, "pipelines that die", slope(live_and_die, 40, warm_up=10))


def test_saved_and_loaded(tmp_path, record_property):
    """No more is kept than safetensors keeps by itself: 0.8.0 loses two ints of every tensor that it reads."""
    pipe = AutoGuidedPipeline.from_pipe(FAMILIES["sd-ddim"].build(), guider=guiders(), initial_noise=members())

    def cycle():
        pipe.save_pretrained(tmp_path)
        loaded = AutoGuidedPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        loaded(**sd_call())

    def read():
        for file in tmp_path.rglob("*.safetensors"):
            load_file(file)

    cycle()
    alone = slope(read, 60, warm_up=10)
    lost = max(alone[2], 0.0)
    report(record_property, "its files read alone", alone, limit=float("inf"))
    found = slope(cycle, 100, warm_up=15)
    report(record_property, "saved and loaded", found, BYTES_A_ROUND + BYTES_OF_INT * lost)
    assert found[2] < lost + BLOCKS_A_ROUND, (found, alone)

"""What a cell of the matrix of pipelines has to do to be one that works."""

from __future__ import annotations

from typing import Any

import torch

from hfnoise.pipelines import guide
from hfnoise.pipelines.initial_noise import as_initial_noise
from hfnoise.pipelines.noise_chain import members_of
from hfnoise.worlds.tiny_pipelines import FAMILIES
from tests.combinations.pipeline_parts import (
    SEEDS,
    STEPS,
    Given,
    Kept,
    arguments,
    bitsandbytes_on_load,
    build,
    counted_rows,
    expected_rows,
    has_callback,
    hosted,
    neutral_guider,
    new_guider,
    new_noise,
    noise_that_is_off,
    run,
)
from tests.combinations.pipelines import SEARCHES, Cell
from tests.pipelines.modular_sdxl import call as modular_call
from tests.pipelines.modular_sdxl import classic_sdxl, modular_sdxl


def call_of(cell: Cell, count: int = 2, first: int = 0, pipe: Any = None, seen: Any = None) -> dict[str, Any]:
    """Return the arguments of a call of a cell, for some of its samples."""
    if cell.call == "images":
        call = {**arguments(cell.family, 1), "num_images_per_prompt": count}
        call["generator"] = [torch.Generator().manual_seed(seed) for seed in SEEDS[first : first + count]]
        return call
    call = arguments(cell.family, count, first)
    if cell.call == "decoded":
        call["output_type"] = "pt"
    if cell.call == "global seed":
        call["generator"] = None
    if cell.call == "callback" and seen is not None:
        name = has_callback(pipe)

        def tell(*args: Any) -> dict[str, Any]:
            seen.append(args[3]["latents"] if name == "callback_on_step_end" else args[2])
            return {}

        call[name] = tell
    return call


def check(cell: Cell) -> None:
    """Assert all that can be said of a cell; see the text above the table of the docs."""
    pipe = build(cell.family, cell.denoiser, cell.adapter)
    stock = run(pipe, call_of(cell))
    _check_parts_act(cell, stock)
    guided = FAMILIES[cell.family].guided
    with guide(pipe, neutral_guider() if guided else None, initial_noise=noise_that_is_off(cell.noise, cell.family)):
        assert torch.equal(run(pipe, call_of(cell)), stock), "neutral settings are not stock to the bit"

    guider, noise = new_guider(cell.guider), new_noise(cell.noise, cell.family)
    seen: list[torch.Tensor] = []
    with hosted(cell.host, pipe, guider, noise) as host, counted_rows(host) as rows:
        found = run(host, call_of(cell, pipe=host, seen=seen))
        own = host.guider if guider is not None else None
        assert type(own) is type(guider)
        assert [type(one) for one in members_of(host.initial_noise)] == _types(noise)
        if cell.denoiser != "compiled":  # in place, the hook is not called by graphs
            batch = len(stock)
            assert sum(rows) == expected_rows(guided, batch, own, host.initial_noise), "evaluations are miscounted"
    if cell.call == "callback":
        assert len(seen) == STEPS and torch.equal(seen[-1], found), "a callback was not told the latents"
    assert found.shape == stock.shape and bool(found.isfinite().all())
    if cell.noise not in ("none", *SEARCHES) or guider is not None:
        saves = guider is not None and own.report.saved == 0 and cell.guider == "AdaptiveGuidance"
        assert saves or not torch.equal(found, stock), "the settings change nothing"
    _check_two_stages(cell, pipe, found)
    # At 4 bits a last bit may move an activation to another point of the grid.
    if cell.call in ("generators", "images") and cell.denoiser != "W4A4":
        _check_samples_alone(cell, pipe, found)


def _types(noise: Any) -> list[type]:
    return [type(one) for one in (noise if isinstance(noise, list) else members_of(noise))]


def _check_parts_act(cell: Cell, stock: torch.Tensor) -> None:
    """What is put onto the denoiser is not ignored: the run is another one; a compiled one is the same."""
    if cell.denoiser == "float" and cell.adapter == "none":
        return
    plain = run(build(cell.family), call_of(cell))
    if cell.denoiser == "compiled" and cell.adapter == "none":
        torch.testing.assert_close(stock, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    else:
        assert not torch.allclose(stock, plain, rtol=1e-3), "the denoiser is the plain one"


def _check_two_stages(cell: Cell, pipe: Any, found: torch.Tensor) -> None:
    """The start is computed in a run of its own, without the guider, and given to a guided run."""
    guider, noise = new_guider(cell.guider), new_noise(cell.noise, cell.family)
    if noise is None:
        with guide(pipe, guider):
            expected = run(pipe, call_of(cell))
    else:
        kept = Kept(as_initial_noise(noise))
        # Candidates of a search are drawn under the guider of the run.
        with guide(pipe, new_guider(cell.guider) if cell.noise in SEARCHES else None, initial_noise=kept):
            run(pipe, call_of(cell))
        with guide(pipe, guider, initial_noise=Given(kept)):
            expected = run(pipe, call_of(cell))
    assert torch.equal(found, expected), "the two in one run are not the two one after the other"


def _check_samples_alone(cell: Cell, pipe: Any, found: torch.Tensor) -> None:
    alone = []
    for sample in range(len(found)):
        with guide(pipe, new_guider(cell.guider), initial_noise=new_noise(cell.noise, cell.family)):
            alone.append(run(pipe, call_of(cell, 1, sample)))
    expected = torch.cat(alone)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def attempt(cell: Cell) -> None:
    """Make one run of a cell."""
    pipe = build(cell.family, cell.denoiser, cell.adapter)
    guider, noise = new_guider(cell.guider), new_noise(cell.noise, cell.family)
    with hosted(cell.host, pipe, guider, noise) as host:
        run(host, call_of(cell))


def attempt_apart(what: str) -> None:
    """Make the combination of that name, which has no column."""
    noises: dict[str, Any] = {
        "an estimate (OneMoreStep) before a member that needs noise": ["OneMoreStep", "ReDenoise"],
        "two searches in a chain": ["RandomSearch", "PathSearch"],
    }
    pipe = build("sd-ddim")
    call = arguments("sd-ddim", 1)
    if what in noises:
        with guide(pipe, initial_noise=[new_noise(name, "sd-ddim") for name in noises[what]]):
            run(pipe, call)
    elif what.startswith("a guider of diffusers"):
        with guide(pipe, new_guider("diffusers ClassifierFreeGuidance")):
            run(pipe, call)
    elif what.startswith("BitsAndBytesConfig"):
        bitsandbytes_on_load(pipe.unet)
    elif what.startswith("a guider in a call"):
        with guide(pipe, new_guider("AdaptiveGuidance")):

            def again(step: int, timestep: Any, latents: torch.Tensor) -> None:
                pipe(**arguments("sd-ddim", 1))

            run(pipe, {**call, "callback": again, "callback_steps": 1})
    else:
        assert what == "a search in a modular pipeline"
        modular = modular_sdxl(classic_sdxl())
        with guide(modular, initial_noise=new_noise("RandomSearch", "sdxl")):
            modular(**modular_call("the digit one"))

"""What one call starts from: another initial noise, and options of One More Step, in the call itself."""

import pytest
import torch

from hfnoise import (
    AutoGuidedPipeline,
    BrightnessOffset,
    OneMoreStep,
    OneMoreStepPipeline,
)
from tests.pipelines.digits_calls import new_pipe
from tests.pipelines.tiny_starts import new_module

OFFSET = BrightnessOffset(0.5, direction=[1.0] * 4)


@pytest.fixture(scope="module")
def module():
    return new_module(width=64, seed=1)


def latents(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "the digit one",
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=generator,
        output_type="latent",
        **options,
    ).images


def test_options_of_a_call_are_those_of_the_step(pipe, stock, module):
    """They hold for this call, and are no arguments that Stable Diffusion drops."""
    guided = OneMoreStepPipeline.from_pipe(pipe, oms_module=module)
    step, default = guided.initial_noise, latents(guided)
    states = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(1))
    for options in (
        {"eta": 0.5}, {"scale": 0.5}, {"prompt": "the digit seven"}, {"prompt_embeds": states},
        {"guidance_scale": 2.0, "negative_prompt": "the digit two"}, {"compat": "official"},
    ):  # fmt: skip
        found = latents(guided, **{f"oms_{name}": value for name, value in options.items()})
        assert not torch.equal(found, default)
        assert torch.equal(
            found, latents(AutoGuidedPipeline.from_pipe(pipe, initial_noise=step.with_options(**options)))
        )
    assert torch.equal(latents(guided, oms_enabled=False), latents(stock))
    assert torch.equal(latents(guided, oms_enabled=True), default)
    # In a chain only the step is changed.
    guided.initial_noise = [step, OFFSET]
    shifted = latents(guided, oms_enabled=False)
    assert torch.equal(shifted, latents(AutoGuidedPipeline.from_pipe(pipe, initial_noise=OFFSET)))
    assert step.eta == 0.0 and guided.initial_noise.members[0] is step


def test_initial_noise_of_a_call(pipe, stock, module):
    guided = AutoGuidedPipeline.from_pipe(pipe, initial_noise=OFFSET)
    own = latents(guided)
    assert torch.equal(latents(guided, initial_noise=None), own)
    assert torch.equal(latents(guided, initial_noise=[]), latents(stock))
    step = OneMoreStep(module)
    expected = latents(AutoGuidedPipeline.from_pipe(pipe, initial_noise=step.with_options(eta=0.5)))
    assert torch.equal(latents(guided, initial_noise=step, oms_eta=0.5), expected)
    assert torch.equal(latents(guided), own)


@pytest.mark.slow
def test_options_of_the_preset(pipe, module, tmp_path):
    from_pipe, load = OneMoreStepPipeline.from_pipe, OneMoreStepPipeline.from_pretrained
    made = from_pipe(pipe, oms_module=module, oms_eta=0.25, oms_prompt="a cat")
    step = made.initial_noise
    assert (step.eta, step.prompt) == (0.25, "a cat")
    again = from_pipe(made, oms_guidance_scale=1.5).initial_noise
    assert (again.eta, again.guidance_scale, step.guidance_scale) == (0.25, 1.5, 1.0)
    assert from_pipe(pipe, oms_module=step).initial_noise is step
    made.save_pretrained(tmp_path / "digits")
    assert load(tmp_path / "digits", oms_scale=0).initial_noise.is_off
    new_pipe().save_pretrained(tmp_path / "stock")
    found = load(tmp_path / "stock", oms_module=tmp_path / "digits", oms_eta=0.5).initial_noise
    assert (found.eta, found.prompt) == (0.5, "a cat")
    # Words in the place of states that were saved, and the other way round.
    states = torch.zeros(1, 8, 64)
    OneMoreStep(module, prompt_embeds=states).save_pretrained(tmp_path / "step")
    assert OneMoreStep.from_pretrained(tmp_path / "step", prompt="a dog").prompt_embeds is None
    assert step.with_options(prompt_embeds=states).prompt is None


def test_errors(pipe, stock, module):
    guided = OneMoreStepPipeline.from_pipe(pipe, oms_module=module)
    with pytest.raises(TypeError, match="no option oms_steps; it has oms_enabled, oms_eta, oms_guidance_scale"):
        latents(guided, oms_steps=3)
    with pytest.raises(TypeError, match="oms_enabled must be True or False, got 0"):
        latents(guided, oms_enabled=0)
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got 2"):
        latents(guided, oms_eta=2)
    with pytest.raises(ValueError, match="eta must be in"):
        OneMoreStepPipeline.from_pipe(pipe, oms_module=module, oms_eta=2)
    with pytest.raises(TypeError, match="oms_enabled is for one call of the pipeline"):
        OneMoreStepPipeline.from_pipe(pipe, oms_module=module, oms_enabled=False)
    with pytest.raises(TypeError, match="initial_noise must be an InitialNoise"):
        latents(guided, initial_noise=torch.zeros(1))
    plain = AutoGuidedPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="oms_eta is for One More Step, and the initial noise is none. Give the pipe"):
        latents(plain, oms_eta=0.5)
    with pytest.raises(ValueError, match="is BrightnessOffset"):
        latents(plain, initial_noise=OFFSET, oms_eta=0.5)
    with pytest.raises(ValueError, match="prompt and prompt_embeds are both given"):
        OneMoreStep(module, prompt="a", prompt_embeds=torch.zeros(1, 8, 64))
    with pytest.raises(TypeError, match="OneMoreStep has no option module"):
        guided.initial_noise.with_options(module=module)


def test_options_of_a_preset_hold_while_it_loads(pipe, module, tmp_path):
    """What they replace is not read: the weights of a text encoder may be gone, an option may be wrong."""
    own = new_pipe()
    text = {"text_encoder": own.text_encoder, "tokenizer": own.tokenizer}
    OneMoreStep(module, **text).save_pretrained(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        OneMoreStepPipeline.from_pipe(pipe, oms_module=tmp_path)
    given = {f"oms_{name}": part for name, part in text.items()}
    made = OneMoreStepPipeline.from_pipe(pipe, oms_module=tmp_path, oms_eta=0.5, **given)
    assert made.initial_noise.text_encoder is own.text_encoder and made.initial_noise.eta == 0.5
    step = OneMoreStep(module)
    assert OneMoreStepPipeline.from_pipe(pipe, oms_module=step, oms_eta=0.5).initial_noise.eta == 0.5
    assert step.eta == 0.0

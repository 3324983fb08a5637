"""What is written loads in stock diffusers; what is resumed is the run that was not interrupted, to the bit."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from hfnoise.worlds.digits_pipeline import new_digits_pipeline
from tests.trainers.diffusion_world import (
    TOKENS,
    WIDTH,
    assert_same_weights,
    losses,
    make_rows,
    new_scheduler,
    new_trainer,
    new_unet,
    weights,
)

LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_v"]}
EMPTY = {"encoder_hidden_states": torch.zeros(1, TOKENS, WIDTH)}
RESUMED = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random", "ema_decay": 0.9,
    "prompt_dropout": 0.3, "noise_offset": 0.1, "input_perturbation": 0.1, "snr_gamma": 5.0,
}  # fmt: skip


def options(adapter):
    return {"empty_prompt": EMPTY, **({"peft_config": LoraConfig(**LORA)} if adapter else {})}


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_run_itself(tmp_path, adapter):
    whole = new_trainer(tmp_path / "run", trainer_options=options(adapter), **RESUMED)
    whole.train()
    resumed = new_trainer(tmp_path / "run", new_unet(), trainer_options=options(adapter), **RESUMED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    assert_same_weights(weights(whole.model), weights(resumed.model))
    whole.save_model(str(tmp_path / "whole"))
    resumed.save_model(str(tmp_path / "resumed"))
    name = "pytorch_lora_weights.safetensors" if adapter else "diffusion_pytorch_model.safetensors"
    # Not the bytes: safetensors writes the metadata of an adapter in any order.
    first, second, last = (load_file(tmp_path / one / name) for one in ("whole", "resumed", "run/checkpoint-4"))
    assert_same_weights(first, second)
    assert set(last) == set(first) and not all(torch.equal(last[name], one) for name, one in first.items())


def test_a_folder_loads_in_stock_diffusers_with_the_averaged_weights(tmp_path):
    class ByHand(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.average = EMAModel(model.parameters(), decay=0.9)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.average.step(model.parameters())

    by_hand = ByHand()
    options = {"callbacks": [by_hand]}
    trainer = new_trainer(tmp_path, eval_rows=make_rows(8), trainer_options=options, ema_decay=0.9, max_steps=4)
    trainer.train()
    own = weights(trainer.model)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    assert_same_weights(own, weights(trainer.model))
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    expected = new_unet()
    by_hand.average.copy_to(expected.parameters())
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-7)
    assert not torch.equal(loaded.conv_out.weight, own["conv_out.weight"])
    again = new_trainer(tmp_path, loaded, eval_rows=make_rows(8))
    assert again.evaluate()["eval_loss"] == loss  # what was evaluated is what was saved


@pytest.mark.slow
def test_digits_train_and_draw_in_the_stock_pipeline(tmp_path):
    pipe = new_digits_pipeline(width=8)
    generator = torch.Generator().manual_seed(0)
    rows = make_rows(4, encoder_hidden_states=torch.randn(4, 8, 64, generator=generator).numpy())
    trainer = new_trainer(tmp_path, pipe.unet, pipe.scheduler, rows, max_steps=2)
    trainer.train()
    trainer.save_model()
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path)
    assert_same_weights(weights(trainer.model), weights(pipe.unet))
    assert pipe("seven", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 1)


@pytest.mark.slow
def test_an_adapter_of_another_name_is_trained_further(tmp_path):
    """As `pipe.load_lora_weights` names it; the frozen one beside it is not what is saved."""
    unet = new_unet().requires_grad_(False)
    unet.add_adapter(LoraConfig(**LORA))
    with pytest.warns(UserWarning, match="multiple adapters"):
        unet.add_adapter(LoraConfig(**LORA), adapter_name="default_0")
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = new_trainer(tmp_path, unet, **settings)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    trained = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
    assert len(saved) == len(trained) > 0
    for name, one in trained.items():
        assert torch.equal(saved[f"unet.{name.replace('.default_0', '')}"], one)
    whole = weights(trainer.model)
    resumed = new_trainer(tmp_path, unet, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_weights(weights(resumed.model), whole)


def test_an_adapter_loads_in_the_stock_pipeline(tmp_path):
    pipe, other = new_digits_pipeline(width=8), new_digits_pipeline(width=8)
    pipe.unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    rows = make_rows(4, encoder_hidden_states=torch.randn(4, 8, 64, generator=generator).numpy())
    before = weights(pipe.unet)
    options = {"peft_config": LoraConfig(**LORA)}
    trainer = new_trainer(tmp_path, pipe.unet, pipe.scheduler, rows, trainer_options=options, max_steps=2)
    trainer.train()
    trainer.save_model()
    after = weights(trainer.model)
    changed = {name for name, value in after.items() if not torch.equal(value, before.get(name, value[:0]))}
    assert changed == {name for name in after if "lora" in name or ".base_layer." in name}
    for name in (name for name in changed if ".base_layer." in name):
        assert torch.equal(after[name], before[name.replace(".base_layer", "")])
    assert {path.name for path in Path(tmp_path).iterdir()} == {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "training_args.bin",
    }
    other.load_lora_weights(tmp_path)
    assert other.unet.peft_config["default_0"].lora_alpha == 6

    def draw(one):
        generator = torch.Generator().manual_seed(1)
        return one("seven", num_inference_steps=2, generator=generator, output_type="latent").images

    adapted, same = draw(pipe), draw(other)
    assert torch.equal(adapted, same)
    other.unload_lora_weights()
    assert not torch.equal(draw(other), adapted)


@pytest.mark.slow
def test_the_best_checkpoint_comes_back_with_its_average(tmp_path):
    settings = {
        "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
        "ema_decay": 0.5,
    }  # fmt: skip
    trainer = new_trainer(tmp_path, eval_rows=make_rows(4), **settings)
    trainer.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    worst = max(evaluated, key=evaluated.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{worst}") and worst != 3
    stored = UNet2DConditionModel.from_pretrained(tmp_path / f"checkpoint-{worst}")
    assert_same_weights(weights(stored), weights(trainer.model))
    assert trainer.evaluate()["eval_loss"] == evaluated[worst]


@pytest.fixture
def checkpoint(tmp_path):
    trainer = new_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    return tmp_path / "checkpoint-1"


@pytest.mark.slow
def test_checkpoints_of_other_runs_are_refused(tmp_path, checkpoint):
    resume = {"resume_from_checkpoint": str(checkpoint)}
    for message, settings in {
        "seed: 3 there, 4 here": {"seed": 4},
        "noise_offset: 0.0 there, 0.1 here": {"noise_offset": 0.1},
        r"loss_weighting: 'UniformWeighting\(\)' there, 'MinSNRWeighting\(gamma=5.0\)' here": {"snr_gamma": 5.0},
        "prediction_type: 'epsilon' there, 'v_prediction' here": {"scheduler": new_scheduler("v_prediction")},
        "has no pytorch_lora_weights": {"trainer_options": {"peft_config": LoraConfig(**LORA)}},
        "of another model: tensor .* of shape": {"model": new_unet(block_out_channels=(8, 16))},
    }.items():
        with pytest.raises(ValueError, match=message):
            new_trainer(tmp_path, **settings).train(**resume)
    state = checkpoint / "trainer_state.json"
    identity = json.loads(state.read_text())
    identity["stateful_callbacks"]["NoiseRunState"]["args"]["identity"]["ema_decay"] = 0.9
    state.write_text(json.dumps(identity))
    with pytest.raises(ValueError, match="has no ema.safetensors, and ema_decay is 0.9"):
        new_trainer(tmp_path, ema_decay=0.9).train(**resume)
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        new_trainer(tmp_path).train(resume_from_checkpoint=True)

"""A subclass of DiffusionTrainer with another objective, and a denoiser without timesteps."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from hfnoise import DiffusionTrainer
from hfnoise.trainers.diffusion import NoisedBatch
from tests.trainers.diffusion_world import arguments, losses, make_rows, new_unet, weights


class TimeFreeUNet(UNet2DConditionModel):
    def forward(self, sample, encoder_hidden_states, return_dict=True):
        return super().forward(sample, 0, encoder_hidden_states, return_dict=return_dict)


class MeanTrainer(DiffusionTrainer):
    """Another objective: what is seen is noise alone, and the answer is minus the latents."""

    _takes_timestep = False

    def set_schedule(self, scheduler, loss_weighting):
        pass

    def identity(self):
        return {"seed": self.args.seed}

    def noised_batch(self, latents, draws):
        return NoisedBatch(draws.noise, None, -latents)


@pytest.mark.slow
def test_a_subclass_with_another_objective_and_without_timesteps(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9}
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        unet = TimeFreeUNet(**new_unet().config)
        unet.load_state_dict(new_unet().state_dict())
        trainer = MeanTrainer(unet, arguments(tmp_path, **settings), train_dataset=make_rows())
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append((losses(trainer), weights(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    first = make_rows()[:4]["latents"]
    with torch.no_grad():
        noise = trainer._draw({"latents": first}, [0, 1, 2, 3], 0, "train").noise
        expected = (new_unet()(noise, 0, make_rows()[:4]["encoder_hidden_states"]).sample + first).square().mean()
    assert runs[0][0][0] == pytest.approx(float(expected), abs=1e-4)

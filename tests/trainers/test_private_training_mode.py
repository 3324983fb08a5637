"""What ties the rows of a batch together in training mode only, where a check in eval mode would not see it."""

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from hfnoise import DPConfig, DPTrainer


class Net(nn.Module):
    """A classifier that is no model of transformers."""

    def __init__(self, between=None):
        super().__init__()
        self.between, self.head = between or nn.Identity(), nn.Linear(4, 2)

    def forward(self, x, labels):
        logits = self.head(self.between(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Averages(nn.Module):
    """Keeps a mean of what it has seen, as vector quantisers do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x


@pytest.fixture
def make_plain(cpu_arguments):
    """Return a function that makes a private Trainer of a bare module, in eval mode as from `from_pretrained`."""
    arguments = {k: v for k, v in cpu_arguments.items() if k not in ("beta", "max_length", "activation_checkpointing")}
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(4, generator=generator), "labels": n % 2} for n in range(24)]

    def make(model, dp=None, **settings):
        config = DPConfig(**{"noise_multiplier": 1.0, "unsafe_seed": 5} | (dp or {}))
        return DPTrainer(model.eval(), TrainingArguments(**arguments | settings), train_dataset=rows, dp_config=config)

    return make


@pytest.mark.slow
def test_a_bare_module(make_plain, trained_weights):
    torch.manual_seed(0)
    model = Net()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    leaf = make_plain(model)
    leaf.train()
    leaf.save_model()
    other = Net()
    other.load_state_dict(state)
    loop = make_plain(other, {"grad_mode": "loop"})
    loop.train()
    torch.testing.assert_close(trained_weights(leaf), trained_weights(loop), rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", ["leaf", "loop"])
def test_statistics_of_batches(mode, make_plain):
    dp = {"grad_mode": mode}
    with pytest.raises(ValueError, match="'between' is a BatchNorm1d"):
        make_plain(Net(nn.BatchNorm1d(4, affine=False)), dp)
    with pytest.raises(ValueError, match="'between' is a InstanceNorm1d"):
        make_plain(Net(nn.InstanceNorm1d(4, track_running_stats=True)), dp)
    model = Net(Averages())
    with pytest.raises(ValueError, match=r"writes into between\.mean"):
        make_plain(model, dp).train()


def test_draws_for_a_whole_batch(make_private_trainer, make_plain):
    with pytest.raises(ValueError, match="neftune_noise_alpha=5"):
        make_private_trainer(neftune_noise_alpha=5.0)
    make_private_trainer(dp={"grad_mode": "loop"}, neftune_noise_alpha=5.0, max_steps=1).train()
    model = Net()
    model.config = type("Config", (), {"layerdrop": 0.1})()
    with pytest.raises(ValueError, match=r"layerdrop=0\.1 of the model draws at random for a whole batch"):
        make_plain(model)

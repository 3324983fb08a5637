"""The randomness of a step beside its noise: secret, keyed, and nothing of it left in a generator that is saved."""

import random

import numpy
import pytest
import torch
from peft import LoraConfig

from hfnoise.trainers.private_randomness import seeded


def draws():
    return random.random(), numpy.random.rand(), float(torch.rand(()))


def test_generators_are_put_back():
    torch.manual_seed(0), numpy.random.seed(0), random.seed(0)
    expected = draws()
    torch.manual_seed(0), numpy.random.seed(0), random.seed(0)
    with pytest.raises(KeyError), seeded(2**61 + 5):
        first = draws()
        raise KeyError
    with seeded(2**61 + 5):
        assert draws() == first != expected
    with seeded(2**61 + 6):
        assert all(a != b for a, b in zip(draws(), first, strict=True))
    assert draws() == expected


def test_dropout_is_of_the_key_and_not_of_the_public_seed(make_private_trainer, trained_weights):
    """The same masks whatever was drawn before, and other ones with another secret."""
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)

    def trained(key=5, seed=3):
        trainer = make_private_trainer(dp={"unsafe_seed": key, "noise_multiplier": 0.0}, peft=adapter, max_steps=1)
        torch.manual_seed(seed)
        plans = trainer.get_train_dataloader().batch_sampler
        plan = plans.plan(0)
        batch = trainer.planned_rows()[plan]
        trainer.model.train()
        trainer._prepare_private_steps(trainer.model)
        trainer._step.begin()
        before = torch.random.get_rng_state()
        for micro_batch in batch:
            trainer._add_micro_batch(trainer.model, micro_batch)
        assert torch.equal(before, torch.random.get_rng_state())
        sums = torch.cat([part.flatten() for part in trainer._step._sums.values()])
        trainer._end_private_steps()
        return plan, sums

    plan, sums = trained()
    again, same = trained(seed=4)
    assert again.seeds == plan.seeds and torch.equal(sums, same)
    other, _ = trained(key=6)
    assert not set(sum(other.seeds, ())) & set(sum(plan.seeds, ()))
    assert len(set(sum(plan.seeds, ()))) == 2 * len(plan.seeds)

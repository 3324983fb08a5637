"""What we say of the installed TRL is what it says of itself."""

import ast
import re

import pytest
from trl import DPOConfig, DPOTrainer

from hfnoise.trainers.noise_dpo_config import TRL_LOSSES, TRL_LOSSES_WITH_FLIP_RATE


def test_the_list_of_losses_is_that_of_trl(make_trainer):
    trainer = make_trainer(DPOTrainer, DPOConfig, loss_type="no_such_loss")
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        trainer.train()
    assert sorted(ast.literal_eval(re.search(r"\[.*\]", str(error.value)).group())) == sorted(TRL_LOSSES)


def test_the_losses_that_read_label_smoothing_are_those(make_trainer):
    trainer = make_trainer(DPOTrainer, DPOConfig)
    rows = [trainer.train_dataset[number] for number in range(4)]
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
    # At a margin of 0 most losses would not depend on the rate.
    inputs |= {"ref_chosen_logps": chosen - 1.0, "ref_rejected_logps": rejected}
    trainer.precompute_ref_logps = True
    readers = set()
    for trainer.loss_types in ([name] for name in TRL_LOSSES):
        losses = []
        for trainer.label_smoothing in (0.1, 0.3):
            losses.append(trainer.compute_loss(trainer.model, inputs).item())
        if losses[0] != losses[1]:
            readers |= set(trainer.loss_types)
    assert readers == set(TRL_LOSSES_WITH_FLIP_RATE)

"""A card's figures are those of the weights beside it: not of the last step, where the best weights were loaded."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

from hfnoise import QATArguments, QATTrainerMixin, RobustDPOConfig, RobustDPOTrainer


def row(card, name):
    return [line for line in card.text.splitlines() if line.startswith(f"| {name} |")][-1]


def test_the_best_weights_are_not_given_the_figures_of_the_last(make_trainer, make_pairs):
    pairs = make_pairs(8)
    trainer = make_trainer(
        RobustDPOTrainer, RobustDPOConfig, pairs, pairs, max_steps=2, learning_rate=1e-2, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,  # training lowers it, so that the first is "the best"
    )  # fmt: skip
    trainer.train()
    first, last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert f"{first:.4f}" != f"{last:.4f}" and trainer.state.best_global_step == 1
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    card = ModelCard.load(folder / "README.md")
    assert f"| {first:.4f} |" in row(card, "loss") and "| 2; the weights are of step 1 |" in row(card, "steps")
    assert f"| {last:.4f} |" in row(ModelCard.load(folder / "checkpoint-2" / "README.md"), "loss")
    trainer.model.lm_head.weight.data.mul_(2.0)
    assert f"| {trainer.evaluate()['eval_loss']:.4f} |" in row(trainer.run_card(), "loss")


@dataclass
class QATRobustDPOConfig(QATArguments, RobustDPOConfig):
    """Arguments of a quantisation-aware robust run, as a user writes them."""


class QATRobustDPOTrainer(QATTrainerMixin, RobustDPOTrainer):
    """The Trainer to it."""


def test_a_quantised_robust_run_says_what_the_labels_were(make_trainer, make_pairs, tiny_model_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    trainer = make_trainer(
        lambda _, **given: QATRobustDPOTrainer(model, **given), QATRobustDPOConfig, make_pairs(4), make_pairs(4),
        weight_bits=4, flip_rate=0.25,
    )  # fmt: skip
    trainer.injected_flip_rate = 0.25
    trainer.evaluate()
    card = trainer.run_card()
    assert "0.25" in row(card, "flip rate used in training")
    assert "25.0%" in row(card, "labels flipped on purpose (`inject_flip_rate`)")
    block = card.data.to_dict()["hfnoise"]
    assert (block["flip_rate"], block["inject_flip_rate"], block["weight_bits"]) == (0.25, 0.25, 4)
    assert "nats per token" not in card.text and "95 % interval, 4 pairs" in row(card, "rewards/accuracies")

"""Mixture-of-experts models: the load-balancing loss is in the loss once, whichever losses are asked for."""

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer

COEFFICIENT = 0.05


@pytest.fixture(scope="module")
def moe_path(tmp_path_factory, tokenizer):
    """Return the folder of a Mixtral of two layers with four experts each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("tiny-mixtral")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=1, bos_token_id=None, output_router_logits=True, router_aux_loss_coef=COEFFICIENT,
        initializer_range=0.2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_moe_trainer(moe_path, tokenizer, cpu_arguments, make_pairs):
    def make(trainer_class, config_class, **settings):
        return trainer_class(
            moe_path, args=config_class(**cpu_arguments | settings), train_dataset=make_pairs(16),
            processing_class=tokenizer,
        )  # fmt: skip

    return make


def test_neutral_settings_equal_trl_to_the_bit(make_moe_trainer, losses_of):
    stock = make_moe_trainer(DPOTrainer, DPOConfig)
    ours = make_moe_trainer(NoiseDPOTrainer, NoiseDPOConfig)
    ours_corrected = make_moe_trainer(NoiseDPOTrainer, NoiseDPOConfig, loss_type="forward_corrected", flip_rate=0.0)
    for trainer in (stock, ours, ours_corrected):
        trainer.train()
    assert losses_of(stock) == losses_of(ours) == losses_of(ours_corrected) and len(set(losses_of(ours))) == 3
    for trainer in (ours, ours_corrected):
        weights = trainer.model.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in stock.model.state_dict().items())
    logged = [
        [entry["aux_loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (stock, ours)
    ]
    assert logged[0] == logged[1] and all(value > 0 for value in logged[1])


def router_of(trainer):
    return next(tensor for name, tensor in trainer.model.named_parameters() if "gate" in name)


def loss_and_router_gradient(trainer):
    """Return the loss on the first pairs at the start, where all margins are 0, the gradient, and the inputs."""
    rows = [trainer.train_dataset[number] for number in range(4)]
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, router_of(trainer))
    return loss.item(), gradient, inputs


@pytest.mark.parametrize("loss_type", [["sym"], ["sigmoid", "sym"], ["sigmoid"]])
def test_the_auxiliary_loss_is_in_the_loss_once(make_moe_trainer, loss_type):
    at_zero = {"sym": 0.5, "sigmoid": 0.6931472}
    with_it = make_moe_trainer(NoiseDPOTrainer, NoiseDPOConfig, loss_type=loss_type)
    loss, gradient, _ = loss_and_router_gradient(with_it)
    aux_loss = with_it._metrics["train"]["aux_loss"][-1]
    assert aux_loss > 0.1
    assert loss == pytest.approx(sum(at_zero[name] for name in loss_type) + COEFFICIENT * aux_loss, abs=1e-6)

    without = make_moe_trainer(NoiseDPOTrainer, NoiseDPOConfig, loss_type=loss_type, router_aux_loss_coef=0.0)
    _, plain_gradient, inputs = loss_and_router_gradient(without)
    inputs = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    output = without.model(**inputs, output_router_logits=True)
    (aux_gradient,) = torch.autograd.grad(output.aux_loss, router_of(without))
    assert aux_gradient.abs().max() > 1e-4
    # Sums in another order differ in the last bits of float32; twice or not at all would differ by the whole.
    torch.testing.assert_close(gradient, plain_gradient + COEFFICIENT * aux_gradient, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(gradient, plain_gradient, rtol=1e-3, atol=1e-6)

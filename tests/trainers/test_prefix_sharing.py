"""Prefix sharing changes how long a step takes, and nothing else."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate.utils import gather_object
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from trl.trainer.utils import add_fused_lm_head

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer
from hfnoise.trainers.prefix_sharing import TREE_ATTENTION, PrefixSharingForward
from hfnoise.trainers.prefix_sharing_refusals import refuse_prefix_sharing
from tests.preference.test_tree_rows import padded_rows

SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": None, "tie_word_embeddings": False, "initializer_range": 0.2, "attn_implementation": "sdpa",
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=32),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=32, query_pre_attn_scalar=8),
}
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "label_mask")


def build(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def arguments(branches):
    """Return ragged padded rows of three prompts, one of them a single token."""
    generator = torch.Generator().manual_seed(1)

    def ids(count):
        return torch.randint(2, 48, (count,), generator=generator).tolist()

    lengths = [2 + (5 * number) % 13 for number in range(3 * branches)]
    answers = [[ids(lengths[3 * branch + prompt]) for prompt in range(3)] for branch in range(branches)]
    input_ids, mask, completion = padded_rows([ids(1), ids(6), ids(15)], answers)
    labels = input_ids.masked_fill(completion == 0, -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def output_and_gradients(model, forward, branches):
    model.zero_grad(set_to_none=True)
    output = forward(**arguments(branches), fused_lm_head=True)
    (output.log_probs * torch.linspace(-1, 1, output.log_probs.numel()).view_as(output.log_probs)).sum().backward()
    return output, {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


def assert_same_scores(model, branches):
    expected, stock = output_and_gradients(model, model, branches)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(TREE_ATTENTION)
    seen = []
    handle = base.get_input_embeddings().register_forward_hook(lambda module, given, out: seen.append(out.shape[:2]))
    found, ours = output_and_gradients(model, PrefixSharingForward(model, branches), branches)
    handle.remove()
    shared = 5 + 14  # of the prompts of 6 and 15 tokens, the last of which is in every branch
    scored = int((arguments(branches)["labels"] != -100).sum())
    assert seen == [(1, shared + scored)]
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.log_probs == 0, expected.log_probs == 0)
    assert set(ours) == set(stock) and len(stock) >= 4
    for name, gradient in stock.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("branches", [2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_and_gradients_equal_the_padded_ones(name, branches):
    assert_same_scores(build(name), branches)


@pytest.mark.parametrize("name", CONFIGS)
def test_with_activation_checkpointing(name):
    model = build(name).train()
    model.gradient_checkpointing_enable()
    assert_same_scores(model, 2)


def test_with_lora():
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    assert_same_scores(get_peft_model(build("llama"), lora), 4)


def test_other_calls_stay_those_of_sdpa():
    model, batch = build("llama").eval(), arguments(2)
    prompt = {"input_ids": batch["input_ids"][:, :3].flip(1), "attention_mask": batch["attention_mask"][:, :3].flip(1)}

    def calls(forward):
        with torch.no_grad():
            padded = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = forward(**batch).loss
        return padded, loss, model.generate(**prompt, max_new_tokens=5, do_sample=False)

    stock = calls(model)
    model.set_attn_implementation(TREE_ATTENTION)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(calls(PrefixSharingForward(model, 2)), stock, strict=True)
    )


def test_inputs_that_cannot_be_rearranged_are_refused():
    model = build("llama")
    with pytest.raises(ValueError, match=r"cannot rearrange the model inputs \['token_type_ids'\]"):
        PrefixSharingForward(model, 2)(**arguments(2), fused_lm_head=True, token_type_ids=torch.zeros(6, 4))


def test_a_row_longer_than_the_window_is_refused_when_it_comes():
    model = build("mistral")
    model.config.sliding_window = 8
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 8
    model.set_attn_implementation(TREE_ATTENTION)
    with pytest.raises(ValueError, match="longer than the model's sliding window of 8. Set max_length=8"):
        PrefixSharingForward(model, 2)(**arguments(2), fused_lm_head=True)


RUNS = {
    "precomputed": {"precompute_ref_log_probs": True},
    "checkpointing": {"activation_checkpointing": True, "loss_type": "sym"},
}
SLOW_RUNS = {
    "lora": {"peft": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "ld_alpha": {"ld_alpha": 0.4},
    "lora precomputed": {"peft": True, "precompute_ref_log_probs": True},
    "lora checkpointing": {"peft": True, "activation_checkpointing": True},
}
# The metrics of TRL that come from the fields per token.
METRICS = ("loss", "entropy", "logps/chosen", "logits/rejected", "mean_token_accuracy", "rewards/margins", "grad_norm")


def trained(make_trainer, pairs, prefix_sharing, **settings):
    peft = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if settings.pop("peft", False) else None
    # Steps small enough that rounding does not grow.
    settings = {"learning_rate": 1e-3, "prefix_sharing": prefix_sharing, **settings}
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, pairs.select(range(6)), peft, **settings)
    trainer.train()
    return trainer


def curves(trainer):
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in entries] for name in METRICS}


@pytest.mark.parametrize("run", [*RUNS, *(pytest.param(run, marks=pytest.mark.slow) for run in SLOW_RUNS)])
def test_a_run_equals_the_padded_one(make_trainer, make_pairs, run):
    pairs = make_pairs(16)
    padded = trained(make_trainer, pairs, False, **(RUNS | SLOW_RUNS)[run])
    shared = trained(make_trainer, pairs, True, **(RUNS | SLOW_RUNS)[run])
    ours, theirs = curves(shared), curves(padded)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for name in METRICS:
        # Margins start at 0, as differences of larger numbers.
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=2e-5), name
    assert shared.evaluate()["eval_loss"] == pytest.approx(padded.evaluate()["eval_loss"], rel=1e-5)
    margins = [trainer.pair_margins(trainer.eval_dataset) for trainer in (shared, padded)]
    torch.testing.assert_close(*margins, rtol=1e-4, atol=5e-5)


@pytest.mark.slow
def test_bf16_runs(make_trainer, make_pairs):
    pairs = make_pairs(16)
    padded = trained(make_trainer, pairs, False, bf16=True)
    shared = trained(make_trainer, pairs, True, bf16=True)
    # Rounding of bfloat16 in a margin of some tenths.
    assert curves(shared)["loss"] == pytest.approx(curves(padded)["loss"], rel=2e-2)


def test_the_saved_model_is_stock(make_trainer, make_pairs, tmp_path):
    pairs = make_pairs(16)
    for sharing in (False, True):
        trained(make_trainer, pairs, sharing).save_model(str(tmp_path / str(sharing)))
    stock, ours = (json.loads((tmp_path / str(sharing) / "config.json").read_text()) for sharing in (False, True))
    assert ours == stock
    assert not any("hfnoise_tree" in path.read_text() for path in Path(tmp_path / "True").glob("*.json"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "True")
    assert model.config._attn_implementation == "sdpa"
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "False")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-4, atol=1e-5)


def share_on_both(make_trainer, pairs, losses):
    trainer = trained(make_trainer, pairs, True, per_device_train_batch_size=2, precompute_ref_log_probs=True)
    assert trainer.accelerator.num_processes == 2
    assert curves(trainer)["loss"] == pytest.approx(losses, rel=1e-5)
    sums = gather_object([sum(float(tensor.double().sum()) for tensor in trainer.model.state_dict().values())])
    assert sums[0] == sums[1]


@pytest.mark.slow
def test_two_processes(make_trainer, make_pairs, two_processes):
    pairs = make_pairs(16)
    one = trained(make_trainer, pairs, False, per_device_train_batch_size=4)
    two_processes(share_on_both, make_trainer, pairs, curves(one)["loss"])


@pytest.fixture
def refused(tokenizer, cpu_arguments, make_pairs):
    """Return a function that fails to construct a trainer with prefix sharing, and returns the message."""

    def construct(model, peft_config=None, **settings):
        reference = None if isinstance(model, str) else deepcopy(model)
        config = NoiseDPOConfig(**cpu_arguments | {"prefix_sharing": True} | settings)
        data = {"train_dataset": make_pairs(4), "processing_class": tokenizer, "peft_config": peft_config}
        with pytest.raises(ValueError) as error:
            NoiseDPOTrainer(model, reference, config, **data)
        assert "prefix_sharing=False" in str(error.value)
        return str(error.value)

    return construct


def model_of(config):
    return AutoModelForCausalLM.from_config(config)


def test_refused_windows(refused):
    model = model_of(MistralConfig(**SIZES, sliding_window=16))
    assert "sliding window of 16 and max_length=32; set max_length=16 or less" in refused(model)
    assert "max_length=None" in refused(model, max_length=None)


def test_a_window_as_long_as_the_rows_is_allowed(tokenizer, cpu_arguments, make_pairs):
    arguments = cpu_arguments | {"prefix_sharing": True, "max_length": 32, "max_steps": 1}
    model = build("gemma3")
    trainer = NoiseDPOTrainer(
        AutoModelForCausalLM.from_config(model.config), model, NoiseDPOConfig(**arguments),
        train_dataset=make_pairs(4), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()


REFUSED_CONFIGS = {
    "conv": (lambda: Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]), "layers of the kind conv"),
    "softcap": (
        lambda: Gemma2Config(**SIZES | {"attn_implementation": "eager"}, head_dim=8),
        "attn_logit_softcapping",
    ),
    "eager": (lambda: LlamaConfig(**SIZES | {"attn_implementation": "eager"}), "attn_implementation='eager'"),
    "dropout": (lambda: LlamaConfig(**SIZES, attention_dropout=0.1), "attention_dropout=0.1"),
}


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_refused_models(refused, name):
    config, message = REFUSED_CONFIGS[name]
    assert message in refused(model_of(config()))


def test_refused_adapters(refused, tiny_model_path):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "PROMPT_TUNING adapters" in refused(tiny_model_path, prompt)


@pytest.mark.parametrize(
    ("name", "value", "message"), [("torch_compile", True, "torch_compile=True"), ("_n_gpu", 2, "2 GPUs")]
)
def test_refused_settings(cpu_arguments, name, value, message):
    config = NoiseDPOConfig(**cpu_arguments)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        refuse_prefix_sharing(build("llama"), config, "sdpa")


def test_a_layer_that_mixes_tokens_is_found_out(refused):
    model = model_of(LlamaConfig(**SIZES))
    # As a recurrent layer would: every token sees the one before it in the row.
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, given: (given[0] + given[0].roll(1, dims=1),))
    assert "whose log-probabilities it would change" in refused(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_mixture_of_experts_is_shared_with_a_note(tokenizer, cpu_arguments, make_pairs, caplog):
    from transformers import MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    model = model_of(config)
    losses = []
    for sharing in (False, True):
        arguments = NoiseDPOConfig(**cpu_arguments | {"prefix_sharing": sharing, "router_aux_loss_coef": 0.0})
        with caplog.at_level("INFO", logger="hfnoise"):
            trainer = NoiseDPOTrainer(
                model_of(config), model, arguments, train_dataset=make_pairs(8), processing_class=tokenizer
            )
        trainer.model.load_state_dict(model.state_dict())
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
        losses.append(trainer.compute_loss(trainer.model, batch).item())
        assert ("counts the tokens of a shared prompt once" in caplog.text) is sharing
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

"""BVPO: four branches per row, the mixed loss, the estimated share, and what it refuses."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel
from trl import DPOConfig, DPOTrainer

from hfnoise import BVPOConfig, BVPOTrainer, NoiseDPOConfig, NoiseDPOTrainer
from hfnoise.preference.online_trace_alpha import GradientSums, OnlineTraceAlpha
from hfnoise.preference.trace_alpha import closed_form_alpha, optimal_trace_alpha
from hfnoise.trainers.pair_batch import PairBatch, pair_batch
from hfnoise.trainers.trace_probe import GradientProbe
from hfnoise.trainers.trace_tokens import trace_pair_ids
from tests.conftest import WORDS


@pytest.fixture
def trace_pairs():
    """Return a function that makes rows with traces of different lengths, deterministic in its arguments."""

    def make(count=16, seed=0, **columns):
        generator = torch.Generator().manual_seed(seed)

        def words(number):
            return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (number,), generator=generator).tolist())

        rows = [
            {
                "prompt": words(3 + number % 3) + " ",
                "chosen": f"<think>\n{words(4 + number % 5)}\n</think>\n\n fox",
                "rejected": f"<think>\n{words(2 + number % 7)}\n</think>\n\n dog",
                "chosen_nothink": f"{words(1)} fox",
                "rejected_nothink": f"{words(1)} dog",
            }
            for number in range(count)
        ]
        dataset = Dataset.from_list(rows)
        for name, values in columns.items():
            dataset = dataset.add_column(name, values)
        return dataset

    return make


@pytest.fixture
def make(make_trainer, trace_pairs):
    """Return `make(pairs, **settings)`, a BVPOTrainer on the tiny model."""

    def build(pairs=None, trainer_class=BVPOTrainer, config_class=BVPOConfig, **settings):
        return make_trainer(trainer_class, config_class, trace_pairs() if pairs is None else pairs,
                            **{"max_length": 64, "alpha_every": 1} | settings)  # fmt: skip

    return build


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def test_batch_holds_all_four_branches(make, tokenizer, trace_pairs):
    trainer = make(trace_alpha=0.5)
    row = trainer.train_dataset[0]
    batch = trainer.data_collator([row])
    texts = [tokenizer.decode(ids[mask == 1]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]  # noqa: B905
    assert len(texts) == 4 and all(text.endswith("<eos>") for text in texts)
    scored = [tokenizer.decode(ids[mask == 1]) for ids, mask in zip(batch["input_ids"], batch["completion_mask"])]  # noqa: B905
    assert [text.split()[-2] for text in scored] == ["fox", "fox", "dog", "dog"]
    # The empty scaffold belongs to the prompt: only the bare answer is scored.
    assert len(scored[1].split()) == 3 and len(scored[0].split()) > 3


def gradients_of(trainer, inputs):
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    return loss.item(), torch.autograd.grad(loss, [p for p in trainer.model.parameters() if p.requires_grad])


def test_half_is_dpo_on_the_union_to_the_bit(make, make_trainer):
    ours, stock = make(trace_alpha=0.5), make_trainer(DPOTrainer, DPOConfig)
    inputs, _ = ours.split_columns(first_batch(ours))
    (found, gradients), (expected, stock_gradients) = gradients_of(ours, inputs), gradients_of(stock, inputs)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(gradients, stock_gradients, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_loss_and_gradient_equal_the_vectors(preference_vectors, make, share):
    vectors = preference_vectors("bvpo_derived")
    trainer = make(trace_alpha=share, beta=float(vectors["beta"]))
    policy = torch.tensor(vectors["policy"], requires_grad=True)
    # Rows of the vectors: trace chosen, trace rejected, empty chosen, empty rejected.
    scores = policy - torch.tensor(vectors["ref"])
    chosen, rejected = torch.cat([scores[0], scores[2]]), torch.cat([scores[1], scores[3]])
    lengths = torch.ones_like(chosen)
    pairs = PairBatch(trainer.beta * (chosen - rejected), chosen, rejected, lengths, lengths)
    loss = trainer.reduced_pair_losses(pairs, None)
    (gradient,) = torch.autograd.grad(loss, policy)
    assert loss.item() == pytest.approx(float(vectors[f"alpha{share}_loss"]), abs=1e-10)
    torch.testing.assert_close(gradient, torch.tensor(vectors[f"alpha{share}_grad"]), rtol=0, atol=1e-10)


def probed(trainer, **settings):
    """Return the sketched gradients of a batch, and the loss per pair with its graph."""
    inputs, _ = trainer.split_columns(first_batch(trainer))
    inputs = trainer._with_reference(inputs)
    trainer.model.train()
    probe = GradientProbe(trainer.model)
    with probe.listen():
        pairs = pair_batch(trainer._policy_log_probs(inputs), inputs, trainer.beta, {})
        losses = trainer.weighted_pair_values([("sigmoid", 1.0)], pairs, pairs.margins)
        losses.sum().backward(retain_graph=True)
    return probe, probe.take_pairs(), losses


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)])
def test_probe_has_the_inner_products_of_the_gradients(make, peft_config):
    """The slow truth: one backward pass per pair. Matrices of the tiny model are narrow, so the sketch is exact."""
    trainer = make(trace_alpha=0.5, peft_config=peft_config)
    probe, found, losses = probed(trainer)
    # TRL's fused head reads the matrix of the LM head and never calls the module.
    weights = [module.weight for module in probe._modules if module is not trainer.model.get_output_embeddings()]
    slow = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)]) for loss in losses]
    )
    assert len(weights) == (2 * 7 + 1 if peft_config is None else 4)
    torch.testing.assert_close(found @ found.T, slow @ slow.T, rtol=1e-4, atol=1e-6)


def test_sketch_keeps_inner_products_on_average(make, monkeypatch):
    trainer = make(trace_alpha=0.5)
    _, exact, _ = probed(trainer)
    monkeypatch.setattr("hfnoise.trainers.trace_probe._SKETCH_WIDTH", 16)
    _, sketched, _ = probed(trainer)
    assert sketched.size(1) < exact.size(1)
    norms = sketched.square().sum(1) / exact.square().sum(1)
    assert 0.8 < norms.mean() < 1.25


def test_probe_needs_trained_matrices():
    with pytest.raises(ValueError, match="none is trained here"):
        GradientProbe(torch.nn.LayerNorm(4))


def test_sums_over_parts_give_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    trace, empty = torch.randn(2, 12, 5, generator=generator, dtype=torch.float64)
    sums = GradientSums()
    for part in (slice(0, 3), slice(3, 4), slice(4, 12)):
        sums.add(trace[part], empty[part])
    count, moments = sums.moments()
    expected = optimal_trace_alpha(trace, empty)
    assert count == 12 and moments == pytest.approx(tuple(expected)[1:])
    online = OnlineTraceAlpha(smallest=0.01)
    online.update(count, moments)
    assert online.alpha == pytest.approx(expected.alpha)


def test_online_share_settles_at_the_true_optimum():
    """Gradients with known moments: the estimate ends within 0.03 of the optimum."""
    generator = torch.Generator().manual_seed(0)
    bias, prompts = 0.15 * torch.ones(50), 16
    for trace_scale in (1.0, 2.0, 4.0):
        true = closed_form_alpha(50 * trace_scale**2, 50 * 0.25, 0.0, float(bias.square().sum()), prompts)
        online = OnlineTraceAlpha(decay=0.98, smallest=0.01)
        found = []
        for _ in range(150):
            sums = GradientSums()
            sums.add(trace_scale * torch.randn(prompts, 50, generator=generator),
                     bias + 0.5 * torch.randn(prompts, 50, generator=generator))  # fmt: skip
            online.update(*sums.moments())
            found.append(online.alpha)
        assert abs(sum(found[50:]) / 100 - true) < 0.03, trace_scale


@pytest.mark.parametrize(
    ("size", "accumulation", "settings"),
    [
        (2, 2, {}),
        (1, 4, {"activation_checkpointing": True}),
        pytest.param(2, 2, {"precompute_ref_log_probs": True}, marks=pytest.mark.slow),
        pytest.param(2, 2, {"prefix_sharing": True}, marks=pytest.mark.slow),
        (4, 1, {"prefix_sharing": True, "precompute_ref_log_probs": True}),
    ],
)
def test_share_and_losses_do_not_depend_on_the_split(make, losses_of, size, accumulation, settings):
    whole = make(max_steps=4)
    split = make(max_steps=4, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **settings)
    for trainer in (whole, split):
        trainer.train()
    assert alphas(split) == pytest.approx(alphas(whole), rel=1e-3)
    assert len(set(alphas(whole))) > 1
    assert losses_of(split) == pytest.approx(losses_of(whole), rel=1e-4)


def alphas(trainer):
    return [entry["bvpo/alpha"] for entry in trainer.state.log_history if "bvpo/alpha" in entry]


def in_two_processes(make, losses, shares, losses_of):
    trainer = make(max_steps=3, per_device_train_batch_size=2)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-4)
    assert alphas(trainer) == pytest.approx(shares, rel=1e-3)


@pytest.mark.slow
def test_two_processes(make, losses_of, two_processes):
    one = make(max_steps=3)
    one.train()
    two_processes(in_two_processes, make, losses_of(one), alphas(one), losses_of)


def test_resume_keeps_the_share(make):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(**settings)
    whole.train()
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert resumed.online_alpha.state() == whole.online_alpha.state()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    other = make(**settings | {"trace_alpha": 0.5})
    with pytest.raises(ValueError, match="trace_alpha: 'auto' there, 0.5 here"):
        other.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")


def test_precomputed_reference_and_margins_by_row(make, trace_pairs):
    kept, precomputed = make(trace_alpha=0.3), make(trace_alpha=0.3, precompute_ref_log_probs=True)
    assert torch.tensor(precomputed.train_dataset["ref_chosen_logps"]).shape == (16, 2)
    for trainer in (kept, precomputed):
        trainer.train()
    pairs = zip(kept.model.parameters(), precomputed.model.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)
    margins = kept.pair_margins(trace_pairs(6, seed=3))
    alone = torch.cat([kept.pair_margins(trace_pairs(6, seed=3).select([row])) for row in range(6)])
    assert margins.shape == (6, 2)
    torch.testing.assert_close(margins, alone, rtol=1e-4, atol=1e-5)


def test_lora_evaluation_and_card(make, trace_pairs):
    trainer = make(eval_pairs=trace_pairs(6, seed=2), peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.train()
    metrics = trainer.evaluate()
    for name in ("eval_bvpo/trace_loss", "eval_bvpo/empty_accuracy"):
        assert name in metrics
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert "last_trace_alpha" in card and "squared_bias" in card and "None" not in card


ROW = {"prompt": "the fox ", "chosen": "<think>\nthe dog\n</think>\n\nfox",
       "rejected": "<think>\na dog\n</think>\n\ndog", "chosen_nothink": "fox", "rejected_nothink": "dog"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": "<think>\nthe dog"}, r"have a trace without </think> \(rows 4\)"),
        ({"rejected": "<think>\na dog\n</think>\n\n"}, "no answer after the trace"),
        ({"rejected_nothink": "<think>\nx\n</think>\n\ndog"}, "have a trace in an answer without traces"),
        ({"rejected_nothink": ""}, "no answer in"),
        ({"rejected_nothink": "fox"}, "two equal branches"),
        ({"rejected": ROW["chosen"]}, "two equal branches"),
    ],
)
def test_faulty_rows_are_named_and_can_be_dropped(make, trace_pairs, change, message):
    rows = [*trace_pairs(4).to_list(), ROW | change, *trace_pairs(3, seed=1).to_list()]
    with pytest.raises(ValueError, match=message):
        make(Dataset.from_list(rows))
    assert len(make(Dataset.from_list(rows), drop_invalid_pairs=True).train_dataset) == 7


def test_an_empty_trace_is_a_trace_but_not_in_every_row(make, trace_pairs):
    empty = ROW | {"chosen": "<think>\n\n</think>\n\nfox"}
    assert len(make(Dataset.from_list([*trace_pairs(4).to_list(), empty])).train_dataset) == 5
    with pytest.raises(ValueError, match="no row of the train dataset has a trace in chosen"):
        make(Dataset.from_list([empty] * 4))


def test_cut_answers_are_dropped_and_counted_up_to_a_fifth(make, trace_pairs, caplog):
    long = ROW | {"chosen": f"<think>\n{'fox ' * 40}\n</think>\n\nfox"}
    trainer = make(Dataset.from_list([*trace_pairs(8).to_list(), long]), max_length=40)
    assert len(trainer.train_dataset) == 8
    assert "1 of 9 pairs of the train dataset have an answer that max_length=40 would cut (rows 8)" in caplog.text
    with pytest.raises(ValueError, match="3 of 11 pairs .* would cut"):
        make(Dataset.from_list([*trace_pairs(8).to_list(), long, long, long]), max_length=40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trace_alpha": 1.5}, r"trace_alpha must be a number in \[0, 1\] or 'auto', got 1.5"),
        ({"trace_alpha": -0.1}, "trace_alpha must be"),
        ({"trace_alpha": "half"}, "trace_alpha must be"),
        ({"trace_alpha": None}, "trace_alpha must be"),
        ({"alpha_decay": 1.0}, "alpha_decay"),
        ({"alpha_min": 0.5}, "alpha_min"),
        ({"alpha_min": 0.0}, "alpha_min"),
        ({"alpha_every": 0}, "alpha_every"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"torch_compile": True}, "torch_compile=True leaves out"),
        ({"per_device_train_batch_size": 1}, "needs at least 2"),
        ({"loss_type": "sft"}, "cannot be weighted pair by pair"),
    ],
)
def test_bad_settings_raise_at_construction(cpu_arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        BVPOConfig(**cpu_arguments | settings)


def test_bad_data_raises_at_construction(make, make_pairs, trace_pairs):
    with pytest.raises(ValueError, match="lacks the columns .*chosen_nothink"):
        make(make_pairs(8))
    with pytest.raises(ValueError, match="streaming"):
        make(trace_pairs(8).to_iterable_dataset())
    trainer = make()
    trainer.data_collator = list  # as a user's own would be
    with pytest.raises(ValueError, match="needs a DataCollatorForTracePreference"):
        trainer.wrap_collator()


R1_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'fox ' + message['content'] + ' dog ' }}"
    "{% else %}{{ message['content'].split('</think>')[-1] + '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
)


def test_a_template_that_deletes_traces_does_not_delete_ours(tokenizer):
    """DeepSeek-R1's template drops everything up to </think> from a finished turn."""
    reasoning = copy.deepcopy(tokenizer)
    reasoning.chat_template = R1_TEMPLATE
    row = {"prompt": [{"role": "user", "content": "jumps"}]} | {
        name: [{"role": "assistant", "content": ROW[name]}] for name in list(ROW)[1:]
    }
    rendered = reasoning.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    assert "the dog" not in rendered
    ids = trace_pair_ids(row, reasoning)
    assert reasoning.decode(ids["chosen_ids"]).startswith("the dog")
    assert reasoning.decode(ids["prompt_ids"]).startswith("fox jumps dog")
    split = [{"role": "assistant", "content": "fox", "reasoning_content": "the dog"}]
    assert trace_pair_ids(row | {"chosen": split}, reasoning) == ids
    ended = ROW | {"chosen": ROW["chosen"] + tokenizer.eos_token}  # an end that is there is not doubled
    assert trace_pair_ids(ended, tokenizer)["chosen_ids"].count(tokenizer.eos_token_id) == 1


def test_plain_dpo_through_such_a_template_is_refused(tokenizer, tiny_model_path, cpu_arguments):
    reasoning = copy.deepcopy(tokenizer)
    reasoning.chat_template = R1_TEMPLATE
    rows = [
        {"prompt": [{"role": "user", "content": "jumps"}]}
        | {name: [{"role": "assistant", "content": ROW[name]}] for name in ("chosen", "rejected")}
    ]
    with pytest.raises(ValueError, match="template deletes the reasoning traces of the train dataset"):
        NoiseDPOTrainer(
            tiny_model_path, args=NoiseDPOConfig(**cpu_arguments), train_dataset=Dataset.from_list(rows * 4),
            processing_class=reasoning,
        )  # fmt: skip


def test_learned_position_embeddings_are_left_out(tmp_path, tokenizer, trace_pairs, cpu_arguments):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1,
                        bos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    trainer = BVPOTrainer(
        str(tmp_path / "gpt2"), args=BVPOConfig(**cpu_arguments | {"max_length": 64, "alpha_every": 1}),
        train_dataset=trace_pairs(), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert trainer.online_alpha.updates == 3


def test_another_dataset_is_evaluated_with_precomputed_references(make, trace_pairs, make_pairs):
    trainer = make(precompute_ref_log_probs=True)
    assert trainer.evaluate(trace_pairs(4, seed=9))["eval_loss"] > 0
    with pytest.raises(ValueError, match="eval_dataset lacks the columns"):
        trainer.evaluate(make_pairs(4))


def test_tokenized_rows_are_counted_too(make, trace_pairs):
    tokenized = make(max_length=64).train_dataset
    with pytest.raises(ValueError, match="max_length=10 would cut"):
        make(tokenized, max_length=10)


def test_resume_with_restored_callbacks(make):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "trace_alpha": "auto"}
    whole = make(**settings)
    whole.train()
    resumed = make(**settings, restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert resumed.online_alpha.state() == whole.online_alpha.state()

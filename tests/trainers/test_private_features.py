"""Private training with what users combine it with: bf16, quantised and sharded bases, compilation, heads."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hfnoise import DPConfig, DPDPOTrainer, DPTrainer, make_private
from tests.conftest import WORDS

ROUNDING = {"rtol": 0, "atol": 2e-5}


def run(trainer):
    trainer.train()
    return trainer


def test_bf16_autocast(make_private_trainer, trained_weights):
    single, half = run(make_private_trainer()), run(make_private_trainer(bf16=True))
    assert all(value.dtype == torch.float32 for value in half.model.parameters() if value.requires_grad)
    distance = (trained_weights(single) - trained_weights(half)).norm() / trained_weights(single).norm()
    assert 0 < distance < 0.02


@pytest.fixture
def classification(tiny_model_path, tokenizer, cpu_arguments):
    """Return a function that makes a private classifier: plain Trainer, a head in `modules_to_save`, no TRL."""
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    def make(dp=None, adapter=None, labels=None, data=None, trained=("",), **settings):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=3)
        model.config.pad_token_id = 0
        if adapter is not None:
            model = get_peft_model(model, adapter)
        for name, value in model.named_parameters():
            value.requires_grad_(value.requires_grad and any(part in name for part in trained))
        generator = torch.Generator().manual_seed(0)
        texts = [
            " ".join(WORDS[i] for i in torch.randint(len(WORDS), (3 + n % 5,), generator=generator)) for n in range(24)
        ]
        rows = tokenizer(texts, return_token_type_ids=False)
        data = data or Dataset.from_dict({**rows, "labels": labels or [n % 3 for n in range(24)]})
        arguments = {k: v for k, v in cpu_arguments.items() if k not in ("beta", "max_length")} | settings
        return DPTrainer(
            model,
            TrainingArguments(**arguments),
            train_dataset=data,
            processing_class=tokenizer,
            dp_config=DPConfig(**{"noise_multiplier": 1.0, "unsafe_seed": 5} | (dp or {})),
        )

    return make


@pytest.mark.filterwarnings("ignore:`activation_checkpointing=False`")
def test_a_classifier_with_its_head(classification, trained_weights):
    adapter = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"])
    leaf = run(classification(adapter=adapter))
    loop = run(classification({"grad_mode": "loop"}, adapter=adapter))
    torch.testing.assert_close(trained_weights(leaf), trained_weights(loop), **ROUNDING)


def test_full_fine_tuning_by_the_loop(classification, trained_weights):
    with pytest.raises(ValueError, match="embed_tokens"):
        classification()
    trainer = classification({"grad_mode": "loop"}, max_steps=1)
    before = trained_weights(trainer).clone()
    run(trainer)
    assert (trained_weights(trainer) - before).abs().min() >= 0 and not torch.equal(before, trained_weights(trainer))


def test_norms_and_heads(classification, trained_weights):
    leaf = run(classification(max_steps=2, trained=("norm", "score")))
    loop = run(classification({"grad_mode": "loop"}, max_steps=2, trained=("norm", "score")))
    torch.testing.assert_close(trained_weights(leaf), trained_weights(loop), **ROUNDING)


def test_a_loss_function_of_the_user(classification, trained_weights):
    """`compute_loss_func` that averages over rows whatever it is told: found out, not assumed."""

    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.1)

    def with_loss(trainer):
        trainer.compute_loss_func = loss
        return trainer

    adapter = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"])
    leaf = run(with_loss(classification(adapter=adapter)))
    assert leaf._loss_scale.reduction == "token_mean"  # of one label in each row
    loop = run(with_loss(classification({"grad_mode": "loop"}, adapter=adapter)))
    torch.testing.assert_close(trained_weights(leaf), trained_weights(loop), **ROUNDING)


def test_weights_of_classes_are_no_sum_over_rows(classification):
    """Divided by the weights of the batch; found although the rows that are looked at are all of one class."""
    adapter = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"])
    trainer = classification(adapter=adapter, labels=[0] * 24)
    weight = torch.tensor([1.0, 1.0, 9.0])
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: torch.nn.functional.cross_entropy(
        outputs["logits"], labels, weight
    )
    with pytest.raises(ValueError, match="differs from that of the row alone"):
        trainer.train()


@pytest.mark.parametrize("kind", ["tokens classified", pytest.param("tokens predicted", marks=pytest.mark.slow)])
def test_a_loss_that_does_not_listen(kind, tiny_model_path, tokenizer, make_texts, cpu_arguments, trained_weights):
    """A mean over the tokens of the batch, whatever `num_items_in_batch` says: how most people write compute_loss."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, Trainer, TrainingArguments
    from transformers import DataCollatorForTokenClassification as Collator

    class Mine(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    def row(text):
        tokens = tokenizer(text["text"], return_token_type_ids=False)
        classes = [place % 3 for place, _ in enumerate(tokens["input_ids"])]
        return {**tokens, "labels": classes if kind == "tokens classified" else tokens["input_ids"]}

    def make(mode):
        torch.manual_seed(0)
        task, adapter, size = AutoModelForCausalLM, LoraConfig(r=2, target_modules=["q_proj"]), {}
        if kind == "tokens classified":
            task, size = AutoModelForTokenClassification, {"num_labels": 3}
            adapter = LoraConfig(r=2, task_type="TOKEN_CLS", target_modules=["q_proj"], modules_to_save=["score"])
        model = get_peft_model(task.from_pretrained(tiny_model_path, **size), adapter)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):  # of the classifier; each way has its own draws
                module.p = 0.0
        arguments = {k: v for k, v in cpu_arguments.items() if k not in ("beta", "max_length")}
        trainer = Mine(
            model, TrainingArguments(**arguments), Collator(tokenizer), make_texts(24).map(row, remove_columns="text")
        )
        return run(make_private(trainer, DPConfig(noise_multiplier=1.0, unsafe_seed=5, grad_mode=mode)))

    leaf = make("leaf")
    assert leaf._loss_scale.reduction == "token_mean"
    torch.testing.assert_close(trained_weights(leaf), trained_weights(make("loop")), **ROUNDING)


def test_a_list_as_dataset_and_workers(classification, trained_weights):
    adapter = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"])
    plain = run(classification(adapter=adapter))
    rows = [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in plain.train_dataset]
    assert torch.equal(trained_weights(plain), trained_weights(run(classification(adapter=adapter, data=rows))))
    plain.train_dataset = rows
    with pytest.raises(ValueError, match="train_dataset was replaced"):  # the ledger would be that of the other one
        plain.train()


@pytest.mark.slow
def test_loader_workers(make_private_trainer, trained_weights):
    plain = run(make_private_trainer())
    workers = run(make_private_trainer(dataloader_num_workers=1, dataloader_persistent_workers=True))
    assert torch.equal(trained_weights(plain), trained_weights(workers))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bases(bits, make_private_trainer, trained_weights, tiny_model_path, tokenizer):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def make(mode):
        config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        model = AutoModelForCausalLM.from_pretrained(tiny_model_path, quantization_config=config, dtype=torch.float32)
        trainer = make_private_trainer(dp={"grad_mode": mode}, max_steps=1, model=model)
        return run(trainer)

    leaf, loop = make("leaf"), make("loop")
    distance = (trained_weights(leaf) - trained_weights(loop)).norm() / trained_weights(loop).norm()
    assert distance < 0.02


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from inside the compiler
def test_torch_compile(classification, trained_weights):
    settings = {
        "dp": {"micro_batch_size": 8, "expected_batch_size": 8},
        "adapter": LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"]),
        "max_steps": 1,
    }
    plain = run(classification(**settings))
    compiled = run(classification(**settings, torch_compile=True, torch_compile_backend="aot_eager"))
    torch.testing.assert_close(trained_weights(plain), trained_weights(compiled), **ROUNDING)


def test_eval_and_best_model(make_private_trainer, make_pairs, caplog):
    trainer = make_private_trainer(DPDPOTrainer, eval_strategy="steps", eval_steps=2, max_steps=2, eval=make_pairs(6))
    trainer.train()
    assert any("eval_loss" in entry and "eval_rewards/margins" in entry for entry in trainer.state.log_history)
    # TRL writes the tokens it has trained on there too: the exact sizes of private batches.
    assert not any("num_tokens" in name for entry in trainer.state.log_history for name in entry)


def sharded_on_both(path, make, expected, trained_weights):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    base = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(fsdp_size=2))
    assert "DTensor" in {type(value.data).__name__ for value in base.parameters()}
    trainer = run(make(model=base, per_device_train_batch_size=2))
    assert torch.equal(trained_weights(trainer), expected)


@pytest.mark.slow
def test_a_sharded_base_with_whole_adapters(make_private_trainer, trained_weights, tiny_model_path, two_processes):
    dp = {"accumulation_dtype": "float64", "micro_batch_size": 2}

    def make(**settings):
        return make_private_trainer(dp=dp, **settings)

    one = run(make())
    two_processes(sharded_on_both, tiny_model_path, make, trained_weights(one), trained_weights)

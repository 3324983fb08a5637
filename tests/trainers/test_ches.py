"""CHES from the reference pass: equal to one example at a time, for no further forward pass."""

import json

import datasets
import pytest
import torch
from accelerate.utils import gather_object
from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, score_dataset
from hfnoise.__main__ import main

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ches", "ln_ches")
PRECOMPUTED = {"precompute_ref_log_probs": True, "compute_ches": True}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@torch.no_grad()
def one_at_a_time(model, tokenizer, pairs):
    """Return the four columns, from two forward passes per pair without padding, as the official script does."""
    rows = {name: [] for name in COLUMNS}
    for pair in pairs:
        sums, counts, log_probs = [], [], []
        for answer in (pair["chosen"], pair["rejected"]):
            prompt = tokenizer(pair["prompt"])["input_ids"]
            ids = torch.tensor([prompt + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]])
            output = model(ids, output_hidden_states=True)
            start = len(prompt) - 1
            sums.append(output.hidden_states[-1][0, start:-1].double().sum(0))
            counts.append(ids.size(1) - len(prompt))
            token_log_probs = output.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            log_probs.append(float(token_log_probs[start:].sum()))
        (chosen, rejected), (n_chosen, n_rejected) = sums, counts
        rows["ref_chosen_logps"].append(log_probs[0])
        rows["ref_rejected_logps"].append(log_probs[1])
        rows["ches"].append(float(chosen @ rejected - chosen @ chosen))
        rows["ln_ches"].append(float(chosen @ rejected / (n_chosen * n_rejected) - chosen @ chosen / n_chosen**2))
    return rows


def assert_columns(dataset, expected, rtol=1e-4):
    for name, values in expected.items():
        assert len(set(values)) > 1
        torch.testing.assert_close(
            torch.tensor(dataset[name][:]).double(), torch.tensor(values).double(), rtol=rtol, atol=rtol
        )


@pytest.fixture
def expected(tiny_model_path, tokenizer, make_pairs):
    return one_at_a_time(AutoModelForCausalLM.from_pretrained(tiny_model_path), tokenizer, make_pairs(13))


@pytest.fixture
def count_forwards(monkeypatch):
    """Return a list that grows by one with every forward pass of a Llama backbone."""
    from transformers import LlamaModel

    calls, forward = [], LlamaModel.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    return calls


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_equal_one_example_at_a_time(make_trainer, make_pairs, expected, batch_size):
    trainer = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, make_pairs(13), per_device_train_batch_size=batch_size, **PRECOMPUTED
    )
    assert_columns(trainer.train_dataset, expected)
    scored = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, per_device_eval_batch_size=batch_size).score_dataset(
        make_pairs(13, note=["mine"] * 13, ches=[7.0] * 13)
    )
    assert_columns(scored, expected)
    assert scored["chosen"][:] == make_pairs(13)["chosen"][:] and "chosen_ids" not in scored.column_names


def test_it_costs_no_forward_pass_and_changes_no_log_prob(make_trainer, make_pairs, count_forwards):
    runs = []
    for with_ches in (False, True):
        before = len(count_forwards)
        trainer = make_trainer(
            NoiseDPOTrainer, NoiseDPOConfig, make_pairs(16, seed=40), make_pairs(6, seed=41),
            precompute_ref_log_probs=True, compute_ches=with_ches,
        )  # fmt: skip
        runs.append((len(count_forwards) - before, trainer.train_dataset, trainer.eval_dataset))
        assert not trainer.model.base_model._forward_hooks
    assert runs[0][0] == runs[1][0] == 6  # 16 and 6 pairs in batches of 4
    for stock, ours in zip(runs[0][1:], runs[1][1:], strict=True):
        assert set(ours.column_names) - set(stock.column_names) == {"ches", "ln_ches"}
        assert all(stock[name][:] == ours[name][:] for name in COLUMNS[:2])


def test_the_cache_holds_the_scores_and_is_not_that_without_them(make_trainer, make_pairs, count_forwards, tmp_path):
    make_pairs(12, seed=50).save_to_disk(tmp_path / "pairs")
    pairs = load_from_disk(tmp_path / "pairs")  # what is in memory is not cached

    def columns(**settings):
        before = len(count_forwards)
        made = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, **{**PRECOMPUTED, **settings}).train_dataset
        return len(count_forwards) - before, {name: made[name][:] for name in COLUMNS if name in made.column_names}

    passes, plain = columns(compute_ches=False)
    assert passes == 3 and len(plain) == 2
    passes, first = columns()  # not from the cache above, which has no scores
    assert passes == 3 and len(first) == 4
    passes, again = columns(learning_rate=1e-3)
    assert passes == 0 and again == first
    passes, plain_again = columns(compute_ches=False)
    assert passes == 0 and plain_again == plain
    passes, shorter = columns(max_length=8)
    assert passes == 3 and shorter["ches"] != first["ches"]
    # Scores of another model are replaced, not kept.
    pairs = pairs.add_column("ln_ches", [0.0] * 12).add_column("ref_chosen_logps", [0.0] * 12)
    assert columns()[1] == first


def test_scored_pairs_train_against_the_reference_of_the_run(make_trainer, make_pairs, losses_of):
    stale = {"ref_chosen_logps": [-9.0] * 16, "ref_rejected_logps": [5.0] * 16}
    for precompute in (False, True):
        runs = []
        for columns in ({}, stale):
            trainer = make_trainer(
                NoiseDPOTrainer, NoiseDPOConfig, make_pairs(16, **columns), precompute_ref_log_probs=precompute
            )
            trainer.train()
            runs.append(losses_of(trainer))
        assert runs[0] == runs[1]


def test_lora_scores_the_reference_before_and_after_training(make_trainer, make_pairs, expected):
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, make_pairs(13), peft_config=LORA, **PRECOMPUTED)
    assert_columns(trainer.train_dataset, expected)
    trainer.train()
    assert trainer.model.training
    assert_columns(trainer.score_dataset(make_pairs(13)), expected)
    assert trainer.model.training
    assert "noise/chosen_logp_delta" in trainer.state.log_history[0]


def test_the_reference_that_is_gone_is_not_replaced_by_the_policy(make_trainer, make_pairs, expected):
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, make_pairs(13), **PRECOMPUTED)
    trainer.train()
    with pytest.raises(ValueError, match="reference model is gone"):
        trainer.score_dataset(make_pairs(13))
    kept = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, make_pairs(13))  # with a reference model in memory
    kept.train()
    assert_columns(kept.score_dataset(make_pairs(13)), expected)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}}])
def test_bfloat16(make_trainer, make_pairs, expected, settings):
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, make_pairs(13), **{**PRECOMPUTED, **settings})
    exact, ours = torch.tensor(expected["ches"]).double(), torch.tensor(trainer.train_dataset["ches"][:]).double()
    # bfloat16 has 8 bits: the states are off by a few per mille, the scores by a few per cent of their spread.
    assert (ours - exact).abs().max() < 0.05 * exact.abs().max()
    assert (ours - exact).abs().max() > 0


@pytest.mark.parametrize("peft", [False, True])
def test_a_loaded_model_is_scored_as_it_is_and_left_so(tiny_model_path, tokenizer, make_pairs, peft):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model = get_peft_model(model, LORA) if peft else model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = one_at_a_time(model.eval(), tokenizer, make_pairs(13))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scored = score_dataset(model, make_pairs(13), tokenizer, batch_size=3, use_cpu=True, disable_tqdm=True)
    assert_columns(scored, expected)
    assert scored.column_names == ["prompt", "chosen", "rejected", *COLUMNS]
    assert model.training and "forward" not in (model.get_base_model() if peft else model).__dict__
    assert before.keys() == model.state_dict().keys()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(("lora" in name) is peft for name in trainable)


def test_refusals(make_trainer, make_pairs, tiny_model_path, cpu_arguments):
    with pytest.raises(ValueError, match="compute_ches=True needs precompute_ref_log_probs=True"):
        NoiseDPOConfig(**cpu_arguments, compute_ches=True)
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig)
    with pytest.raises(ValueError, match="map-style"):
        trainer.score_dataset(make_pairs(4).to_iterable_dataset())
    trainer.args.prefix_sharing = True
    with pytest.raises(ValueError, match="prefix_sharing=True.*hfnoise.score_dataset"):
        trainer.score_dataset(make_pairs(4))
    with pytest.raises(ValueError, match="got IterableDataset"):
        score_dataset(tiny_model_path, make_pairs(4).to_iterable_dataset())
    with pytest.raises(ValueError, match="batch_size"):
        score_dataset(tiny_model_path, make_pairs(4), batch_size=0)
    unknown = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_model_path).config)
    unknown.config._name_or_path = ""
    with pytest.raises(ValueError, match="pass processing_class"):
        score_dataset(unknown, make_pairs(4))


def test_the_gauge_is_the_mean_change_of_the_chosen_log_prob(make_trainer, make_pairs):
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, None, make_pairs(6), per_device_eval_batch_size=6)
    trainer.train()
    evaluation = trainer.evaluate()
    expected = evaluation["eval_rewards/chosen"] / trainer.args.beta
    assert evaluation["eval_noise/chosen_logp_delta"] == pytest.approx(expected, rel=1e-5) and expected != 0
    assert trainer.state.log_history[0]["noise/chosen_logp_delta"] == pytest.approx(0, abs=1e-5)


def scores_on_both(make_trainer, pairs, expected):
    datasets.fingerprint._TEMP_DIR_FOR_TEMP_CACHE_FILES = None  # launched processes do not inherit this folder
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, **PRECOMPUTED)
    assert trainer.accelerator.num_processes == 2 and len(trainer.train_dataset) == 13
    scored = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs).score_dataset(pairs)
    for dataset in (trainer.train_dataset, scored):
        assert_columns(dataset, expected)
        both = gather_object([[dataset[name][:] for name in COLUMNS]])
        assert both[0] == both[1]


def test_two_processes_give_the_scores_of_one(make_trainer, make_pairs, expected, two_processes):
    two_processes(scores_on_both, make_trainer, make_pairs(13), expected)


def cached_on_both(make_trainer, folder, expected, forwards):
    for passes in (2, 0):  # 13 pairs, 4 for each of two processes
        before = len(forwards)
        trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, load_from_disk(folder), **PRECOMPUTED)
        assert trainer.train_dataset.cache_files and len(forwards) - before == passes
        assert_columns(trainer.train_dataset, expected)


def test_two_processes_share_a_cache(make_trainer, make_pairs, expected, two_processes, tmp_path, count_forwards):
    make_pairs(13).save_to_disk(tmp_path / "pairs")
    two_processes(cached_on_both, make_trainer, str(tmp_path / "pairs"), expected, count_forwards)


def test_score_pairs(capsys, tiny_model_path, tmp_path, make_pairs):
    make_pairs(20).to_parquet(tmp_path / "pairs.parquet")
    common = [
        "score-pairs", "--model_name_or_path", tiny_model_path, "--dataset_name", str(tmp_path / "pairs.parquet"),
        "--use_cpu", "--max_length", "32", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main([*common, "--keep", "0.1"]) == 0
    kept = load_from_disk(tmp_path / "out" / "dataset")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(kept) == report["kept"] == 2 and report["pairs"] == 20
    assert min(kept["ln_ches"]) == report["ln_ches"]["lowest"] < report["ln_ches"]["highest"]
    assert "2 of 20 pairs" in capsys.readouterr().out
    for wrong, message in ((["--keep", "2"], r"in (0, 1]"), (["--column", "x"], "'ln_ches' or 'ches'")):
        assert main([*common, *wrong]) == 2 and message in capsys.readouterr().err
    assert main([*common, "--dataset_split", "other"]) == 2 and "no split 'other'" in capsys.readouterr().err

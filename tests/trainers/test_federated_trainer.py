"""FedSVDTrainer: the whole federation as one Trainer; what it saves, resumes, refuses."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from hfnoise import DPConfig, FedSVDConfig, FedSVDTrainer

CLIENTS = ("alice", "bob")


@pytest.fixture
def make(tiny_model_path, tokenizer, cpu_arguments, make_texts, tmp_path):
    def make(folder="out", dp=None, rows=24, config=None, eval=True, args=None, clients=CLIENTS, **settings):
        arguments = {name: value for name, value in cpu_arguments.items() if name != "beta"}
        arguments |= {"per_device_train_batch_size": 4, "learning_rate": 0.05, "output_dir": str(tmp_path / folder)}
        arguments |= args or {}
        names = [clients[number % 2] for number in range(rows)]
        return FedSVDTrainer(
            tiny_model_path,
            args=SFTConfig(**arguments),
            fedsvd_config=FedSVDConfig(**{"rounds": 2, "local_steps": 1} | (config or {})),
            train_dataset=make_texts(rows, owner=names),
            client_column="owner",
            eval_dataset=make_texts(4) if eval else None,
            processing_class=tokenizer,
            **{"dp_config": None if dp is None else DPConfig(**{"unsafe_seed": 1} | dp)} | settings,
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )

    return make


def test_trains_evaluates_and_saves_what_stock_peft_loads(make, tiny_model_path, tmp_path):
    trainer = make(dp={"target_epsilon": 6.0, "target_delta": 1e-3})
    before = trainer.evaluate()["eval_loss"]
    output = trainer.train()
    assert output.global_step == 2 and output.metrics["eval_loss"] != before
    assert 5.9 < output.metrics["privacy/epsilon"] == trainer.epsilon() <= 6.0
    assert [entry["round"] for entry in trainer.state.log_history if "federation/bytes_up" in entry] == [1, 2]
    assert not any("eval_num_tokens" in entry or "loss" in entry for entry in trainer.state.log_history)

    trainer.save_model()
    folder = tmp_path / "out"
    report = json.loads((folder / "federation_report.json").read_text())
    assert report["clients"]["alice"]["participations"] == report["clients"]["alice"]["max_participations"] == 2
    assert report["private"] is False, "unsafe_seed"
    card = (folder / "README.md").read_text()
    assert "| alice | 12 | 2 of at most 2 |" in card and "None" not in card and "NOT PRIVATE: unsafe_seed" in card
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), folder).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, trainer.model.eval()(ids).logits)
        # By the class that the card names, which finds that of the base in the adapter's configuration.
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(folder).eval()(ids).logits, stock(ids).logits)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(make, monkeypatch):
    whole = make("whole", dp={"noise_multiplier": 1.0}, eval=False)
    whole.train()
    stopped = make("parts", dp={"noise_multiplier": 1.0}, eval=False)
    log = stopped._log_round

    def stop(record):
        log(record)
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped, "_log_round", stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make("parts", dp={"noise_multiplier": 1.0}, eval=False)
    with pytest.raises(ValueError, match="holds the state of an earlier federation"):
        resumed.train()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    finished = make("parts", dp={"noise_multiplier": 1.0}, eval=False)
    assert finished.train(resume_from_checkpoint="true").global_step == 2, "from a command line it is a string"
    with pytest.raises(ValueError, match="there is no federation.safetensors in"):
        make("elsewhere", eval=False).train(resume_from_checkpoint="nowhere")
    for name, factors in whole.server.factors().items():
        assert torch.equal(factors.lora_B, resumed.server.factors()[name].lora_B)


def test_clients_with_one_known_seed_draw_different_noise(make):
    trainer = make(dp={"noise_multiplier": 1.0}, eval=False)
    seeds = {client.trainer.dp_config.unsafe_seed for client in trainer.clients}
    assert len(seeds) == 2


def test_refuses(make, tmp_path, make_texts):
    with pytest.raises(ValueError, match="one secret_file or ledger_file for all clients"):
        make(dp={"noise_multiplier": 1.0, "unsafe_seed": None, "secret_file": str(tmp_path / "secret")})
    with pytest.raises(ValueError, match="clients_per_round=3 of only 2 clients"):
        make(config={"clients_per_round": 3})
    with pytest.raises(TypeError, match="dp_config must be a DPConfig"):
        FedSVDTrainer("a", fedsvd_config=FedSVDConfig(), train_dataset={"a": make_texts(2)}, dp_config=3.0)
    with pytest.raises(ValueError, match="must name the clients exactly"):
        FedSVDTrainer("a", fedsvd_config=FedSVDConfig(), train_dataset={"a": make_texts(2)}, dp_config={})
    with pytest.raises(ValueError, match="needs client_column"):
        FedSVDTrainer("a", fedsvd_config=FedSVDConfig(), train_dataset=make_texts(2))
    with pytest.raises(ValueError, match="clients without examples: \\['b'\\]"):
        FedSVDTrainer(
            "a", fedsvd_config=FedSVDConfig(), train_dataset={"a": make_texts(2), "b": make_texts(2).select([])}
        )
    inside = DPConfig(noise_multiplier=1.0, secret_file=str(tmp_path / "out" / "alice"))
    with pytest.raises(ValueError, match="secret_file=.* of client 'alice' lies in output_dir"):
        make(dp_config={"alice": inside, "bob": DPConfig(noise_multiplier=1.0)})
    trainer = make(eval=False)
    with pytest.raises(ValueError, match="there is no eval_dataset"):
        trainer.evaluate()


def test_names_of_clients_are_no_paths(make, tmp_path):
    trainer = make(clients=("../../../elsewhere", "bob"), eval=False)
    inside = tmp_path / "out" / "federation" / "clients"
    for client in trainer.clients:
        assert client._file.resolve().parent.parent == inside.resolve()


def test_evaluates_every_share_of_the_rounds(make):
    """Below 1, eval_steps of TrainingArguments is a share; it was cut to 0 rounds."""
    trainer = make(args={"eval_strategy": "steps", "eval_steps": 0.5}, config={"rounds": 4, "max_participations": 4})
    trainer.train()
    assert ["eval_loss" in record.metrics for record in trainer.records] == [False, True, False, True]


@pytest.mark.slow
def test_card_of_hidden_numbers_tells_nothing_that_follows_from_them(make, tmp_path):
    trainer = make(dp={"target_epsilon": 6.0}, config={"weighting": "uniform"}, eval=False)
    trainer.train()
    trainer.save_model()
    report = json.loads((tmp_path / "out" / "federation_report.json").read_text())
    assert all(one["examples"] is None and one["noise_multiplier"] is None for one in report["clients"].values())
    assert "can be estimated from epsilon" in (tmp_path / "out" / "README.md").read_text()

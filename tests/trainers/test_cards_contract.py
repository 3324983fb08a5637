"""The contract of the cards: every row of the table of methods, every shipped folder, states the same facts."""

import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard

from hfnoise.cards import check_card_text, command_line, library_versions
from hfnoise.methods import METHODS, find_method

SHIPPED = sorted(Path(__file__).parent.parent.parent.glob("model_cards/*/README.md"))
# Folders of a pipeline.py alone: nothing was trained, so there is nothing to state of it.
CODE_ONLY = {"adaptive-guidance", "golden-noise", "one-more-step", "projected-guidance"}


def preference(name, make_trainer, make_pairs, tmp_path):
    import hfnoise

    method = find_method(name)
    trainer_class, config_class = getattr(hfnoise, method.trainer), getattr(hfnoise, method.config)
    pairs = make_pairs(4)
    if name == "bvpo":
        sides = {side: pairs[side][:] for side in ("chosen", "rejected")}
        traces = {side: [f"<think>\nfox\n</think>\n\n{text}" for text in texts] for side, texts in sides.items()}
        pairs = Dataset.from_dict(
            {"prompt": pairs["prompt"][:], **traces, **{f"{side}_nothink": texts for side, texts in sides.items()}}
        )
    trainer = make_trainer(trainer_class, config_class, pairs)
    trainer.injected_flip_rate = 0.25
    return trainer


def private(name, make_private_trainer):
    import hfnoise

    return make_private_trainer(getattr(hfnoise, find_method(name).trainer))


def federated(tiny_model_path, make_texts, tokenizer, cpu_arguments):
    from peft import LoraConfig
    from trl import SFTConfig

    from hfnoise import DPConfig, FedSVDConfig, FedSVDTrainer

    arguments = {key: value for key, value in cpu_arguments.items() if key not in ("beta", "max_steps")}
    return FedSVDTrainer(
        tiny_model_path, args=SFTConfig(**arguments), fedsvd_config=FedSVDConfig(rounds=1, local_steps=1),
        train_dataset=make_texts(8, owner=["alice", "bob"] * 4), client_column="owner",
        dp_config=DPConfig(noise_multiplier=1.0), processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip


def card_of(method, request, folder):
    """Return the card of a method, as its family writes it."""

    def fixture(name):
        return request.getfixturevalue(name)

    if method.family == "guidance":
        import hfnoise
        from hfnoise.pipelines.guidance_card import guidance_card
        from hfnoise.worlds.digits_pipeline import new_digits_pipeline

        stock = new_digits_pipeline(width=8)
        pipe = hfnoise.guided_class(type(stock))(**stock.components, guider=getattr(hfnoise, method.guider)())
        return guidance_card(pipe, "someone/digits")
    if method.name == "fedsvd":
        trainer = federated(
            fixture("tiny_model_path"), fixture("make_texts"), fixture("tokenizer"), fixture("cpu_arguments")
        )
    elif method.name == "qat":
        from tests.trainers.qat_world import make

        trainer = make(fixture("tiny_model_path"), folder)
    elif method.name == "one-more-step":
        from tests.trainers.one_more_step_world import new_step_trainer

        trainer = new_step_trainer(folder)
    elif method.name == "golden-noise":
        from tests.trainers.noise_prompt_world import new_trainer

        trainer = new_trainer(folder)
    elif method.family == "preference":
        trainer = preference(method.name, fixture("make_trainer"), fixture("make_pairs"), folder)
    else:
        trainer = private(method.name, fixture("make_private_trainer"))
    # A run that diverged has a card, too.
    trainer.state.log_history.append({"eval_loss": float("nan"), "eval_runtime": 1.0})
    trainer.create_model_card(dataset_name="someone/data", tags=["mine"])
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def facts_of(card):
    """Return the rows of the table below "How it was made"."""
    part = card.text.split("\n## How it was made\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", part, re.MULTILINE))


# Built like one that is not in this list.
SLOW = {"noise-dpo", "dr-dpo", "dp-dpo", "fedsvd"}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=method.name, marks=[pytest.mark.slow] if method.name in SLOW else [])
        for method in METHODS
    ],
)
def test_every_method_has_a_card_that_states_its_facts(method, request, tmp_path):
    card = card_of(method, request, tmp_path / "run")
    text = card.text
    check_card_text(card.content, [command_line()])
    block = card.data.to_dict()["hfnoise"]
    assert block["method"] in (method.name, method.trainer) and block["version"]
    assert {"hfnoise"} <= set(card.data.tags) and method.paper in card.content
    facts = facts_of(card)
    assert facts["base model"] and facts["revision of the base"] and facts["versions"] == library_versions()
    assert any("seed" in name for name in facts)
    assert f"```\n{command_line()}\n```" in text
    noise = text.split("\n## Use\n")[0]
    assert len(re.findall(r"^\| .+ \|$", noise, re.MULTILINE)) > 2  # a table with a row at least
    assert re.search(r"```python\n.*(from_pretrained)", text, re.DOTALL) and "```bibtex" in text
    if method.family == "guidance":
        return
    assert card.data.datasets == ["someone/data"] and "mine" in card.data.tags
    assert block["seed"] == int(facts.get("seed", block["seed"]))
    assert "| not a number | one run, one seed" in text and "runtime" not in text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_cards(path):
    card = ModelCard.load(path)
    check_card_text(card.content)
    assert card.data.license == "apache-2.0" and "hfnoise" in card.data.tags
    if path.parent.name in CODE_ONLY:
        return
    facts, block = facts_of(card), card.data.to_dict()["hfnoise"]
    assert {"base model", "revision of the base", "versions"} <= set(facts)
    assert any("seed" in name for name in facts) and block["method"] and block["version"]
    assert re.search(r"```\n(python|hfnoise) .+\n```", card.text) and "## The noise" in card.text
    assert re.search(r"one run, one seed|one seed, |95 %", card.text)
    assert yaml.safe_load(yaml.safe_dump(block)) == block

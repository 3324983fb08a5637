"""The docstrings world: the corpus, the pairs, the shipped weights and how they are built."""

import dataclasses
from pathlib import Path

import pytest

from hfnoise.worlds.docstrings import DEMO_RECIPE, MAX_TOKENS, corpus, model_path, preference_pairs

SETTINGS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "batch_size": 16}


@pytest.fixture(scope="module")
def validation_pairs():
    return preference_pairs("validation", size=150)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model_path()), AutoTokenizer.from_pretrained(model_path())


def test_corpus_is_one_to_two_megabytes_of_distinct_texts():
    documents = corpus("all")
    assert 1e6 < sum(len(document.text.encode()) for document in documents) < 2.5e6
    assert len({document.text for document in documents}) == len(documents)
    assert all(document.text.strip() for document in documents)
    assert not any(".test." in document.name for document in documents)


def test_corpus_splits_are_disjoint_and_complete():
    train, validation = corpus("train"), corpus("validation")
    assert not {document.text for document in train} & {document.text for document in validation}
    assert sorted(d.name for d in train + validation) == sorted(d.name for d in corpus("all"))
    assert 0.08 < len(validation) / len(train + validation) < 0.17


def test_a_document_stays_in_its_split():
    """The split is part of what the shipped weights promise: it hangs on the name alone."""
    names = {document.name for document in corpus("validation")}
    assert {name for name in ("json.dumps", "json.loads", "os.walk", "textwrap.dedent") if name in names} == {
        "json.loads"
    }


def test_pairs_are_deterministic_and_nested(validation_pairs):
    again = preference_pairs("validation", size=20)
    assert again.to_list() == validation_pairs.select(range(20)).to_list()
    assert preference_pairs("validation", size=20, seed=1).to_list() != again.to_list()


def test_pairs_differ_fit_and_stay_apart(validation_pairs):
    from datasets import Value

    train = preference_pairs("train", size=1000)
    training_text = "\n\n".join(document.text for document in corpus("train"))
    for pairs in (train, validation_pairs):
        assert pairs.features == dict.fromkeys(("prompt", "chosen", "rejected"), Value("string"))
        for row in pairs:
            assert row["chosen"] != row["rejected"]
            assert row["prompt"].strip() and row["rejected"].strip()
            # One byte is at most one token; the end-of-text token is the 96th.
            assert max(len((row["prompt"] + row[side]).encode()) for side in ("chosen", "rejected")) < MAX_TOKENS
    assert not any(row["chosen"] in training_text for row in validation_pairs)
    assert not set(train["chosen"]) & set(validation_pairs["chosen"])


def test_chosen_is_the_true_continuation(validation_pairs):
    texts = "\n\n".join(document.text for document in corpus("validation"))
    for row in validation_pairs.select(range(50)):
        assert row["prompt"] + row["chosen"] in texts
        assert row["prompt"] + row["rejected"] not in texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split must be one of train, validation"),
        ({"split": "all"}, "split must be one of train, validation"),
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"size": 2.0}, "size must be an integer"),
        ({"size": True}, "size must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"split": "validation", "size": 10**6}, "Ask for at most [0-9]{4}"),
    ],
)
def test_bad_arguments_of_pairs(arguments, message):
    with pytest.raises(ValueError, match=message):
        preference_pairs(**arguments)


def test_bad_split_of_corpus():
    with pytest.raises(ValueError, match="split must be one of train, validation, all, got 'dev'"):
        corpus("dev")


def test_recipe_fits_the_corpus():
    assert len(preference_pairs("validation", DEMO_RECIPE.eval_size)) == DEMO_RECIPE.eval_size
    assert DEMO_RECIPE.max_length <= MAX_TOKENS
    with pytest.raises(ValueError, match="per_device_eval_batch_size=64 must divide eval_size=500"):
        dataclasses.replace(DEMO_RECIPE, per_device_eval_batch_size=64)


def test_shipped_folder_is_small_and_complete():
    names = {path.name: path.stat().st_size for path in Path(model_path()).iterdir()}
    assert sum(names.values()) < 4e6
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(names)


def test_shipped_model_generates(model_and_tokenizer):
    import torch

    model, tokenizer = model_and_tokenizer
    assert 2e5 < model.num_parameters() < 9e5
    prompt = tokenizer("Return the number of", return_tensors="pt")
    torch.manual_seed(0)
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=12)[0])
    assert text.startswith("Return the number of ") and len(text.split()) > 5


def test_shipped_tokenizer_gives_every_text_back(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    text = ">>> f(1,\n...   'naïve')\n\n\tTab  and 日本 \N{GRINNING FACE}."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (model.config.pad_token_id, model.config.eos_token_id)
    assert len(tokenizer) == model.config.vocab_size


def test_shipped_model_prefers_the_true_continuation(model_and_tokenizer, validation_pairs):
    """Untrained on pairs it sees most errors: the world is learnable, and the weights are not damaged."""
    import torch

    model, tokenizer = model_and_tokenizer
    scores = {}
    for side in ("chosen", "rejected"):
        texts = [row["prompt"] + row[side] for row in validation_pairs.select(range(64))]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        scores[side] = loss.sum(1)
    assert (scores["chosen"] < scores["rejected"]).float().mean() > 0.85


def test_card_says_what_it_must():
    from huggingface_hub import ModelCard

    card = ModelCard.load(Path(model_path()) / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert "hfnoise" in card.data.tags
    assert "None" not in card.content and "[More Information Needed]" not in card.content
    assert "PSF License" in card.text and "python -m hfnoise.worlds.docstrings_model" in card.text


def test_training_recipe_refuses_what_cannot_train():
    from hfnoise.worlds.docstrings_model import TrainingRecipe

    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        TrainingRecipe(vocab_size=100)
    with pytest.raises(ValueError, match="multiple of 2 x num_attention_heads = 8, got 30"):
        TrainingRecipe(hidden_size=30)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TrainingRecipe(epochs=0)


def test_build_refuses_a_corpus_below_one_batch(tmp_path):
    from hfnoise.worlds.docstrings_model import TrainingRecipe, build

    with pytest.raises(ValueError, match="one batch needs"):
        build(tmp_path, TrainingRecipe(vocab_size=258), corpus("train")[:3], corpus("validation")[:3])


@pytest.mark.slow
def test_build_trains_saves_and_repeats(tmp_path):
    """A very small model through the shipped code path: the loss falls, the folder loads, the seed decides."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfnoise.worlds.docstrings_model import TrainingRecipe, build

    documents, held_out = corpus("train")[:400], corpus("validation")[:60]
    results = {
        name: build(tmp_path / name, TrainingRecipe(max_steps=steps, **SETTINGS), documents, held_out)
        for name, steps in {"one": 1, "first": 20, "second": 20}.items()
    }
    assert results["first"] == results["second"]
    assert results["first"]["validation_loss"] < results["one"]["validation_loss"] - 0.5
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all((first[key] == second[key]).all() for key in first)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert model.num_parameters() == results["first"]["parameters"]
    assert tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"
    assert "None" not in (tmp_path / "first" / "README.md").read_text(encoding="utf-8")

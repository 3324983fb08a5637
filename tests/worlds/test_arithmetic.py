"""The arithmetic world: sums, noisy traces, the shipped reasoning model and its preference pairs."""

from pathlib import Path
from random import Random

import pytest

from hfnoise.preference.traces import EMPTY_TRACE, TRACE_START, split_trace
from hfnoise.worlds import arithmetic
from hfnoise.worlds.arithmetic import MAX_NEW_TOKENS, TRACE_RECIPE, accuracy, answer_of, prompts, reward, trace_pairs
from hfnoise.worlds.arithmetic_traces import terms, write_example, write_trace


@pytest.fixture(scope="module")
def model_and_tokenizer():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = arithmetic.model_path()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def pairs():
    return {split: trace_pairs(split) for split in ("train", "validation")}


def test_prompts_are_deterministic_nested_distinct_and_apart():
    train, validation = prompts("train", 500), prompts("validation", 500)
    assert prompts("train", 20) == train[:20] != prompts("train", 20, seed=1)
    assert len(set(train + validation)) == 1000


def test_prompts_are_small_sums():
    assert prompts("validation", 2) == ["5+2-5+7=", "4+5-4="]  # the split is part of what the weights promise
    for prompt in prompts("train", 500):
        numbers = terms(prompt)
        assert len(numbers) in (3, 4) and all(1 <= abs(number) <= 12 for number in numbers)
        assert all(sum(numbers[:end]) >= 0 for end in range(1, len(numbers) + 1))
        assert answer_of(prompt) == eval(prompt.removesuffix("="))


@pytest.mark.parametrize("prompt", ["1+2", "1*2=", "=", "1=", "a+1=", ""])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="looks like"):
        answer_of(prompt)


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("3", 1.0),
        (" 3\n", 1.0),
        (f"{EMPTY_TRACE}3", 1.0),
        ("<think>\nhmm\n7+5=10\n</think>\n\n3", 1.0),
        ("<think>\n7+5=12\n12-9=3\n</think>\n\n4", 0.0),
        ("<think>\n3", 0.0),
        ("3 or 4", 0.0),
        ("", 0.0),
    ],
)
def test_reward(completion, value):
    assert reward("7+5-9=", completion) == value
    assert reward([{"role": "user", "content": "7+5-9="}], completion) == value


def test_traces_are_noisy_and_say_what_they_answer():
    random = Random(0)
    written = [(prompt, *write_trace(prompt, random)) for prompt in prompts("train", 1000)]
    right = sum(answer == answer_of(prompt) for prompt, _, answer in written) / len(written)
    assert 0.6 < right < 0.85
    assert all(trace.endswith(f"={answer}") for _, trace, answer in written)
    lengths = {len(trace) for _, trace, _ in written}
    assert min(lengths) < 20 and max(lengths) > 60
    assert {"wait", "hmm"} < {line for _, trace, _ in written for line in trace.splitlines()}
    answers = [(prompt, *write_example(prompt, False, random)) for prompt in prompts("train", 1000)]
    assert 0.85 < sum(reward(prompt, start + text) for prompt, start, text in answers) / 1000 < 0.95


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompts("test"), "split must be one of train, validation, got 'test'"),
        (lambda: prompts("train", 0), "count must be an integer from 1 to 10000, got 0"),
        (lambda: prompts("train", 10, -1), "seed must be an integer of at least 0"),
        (lambda: trace_pairs("test"), "split must be one of train, validation"),
        (lambda: trace_pairs("train", 10**6), "count must be an integer from 1 to [0-9]{4}, got 1000000"),
        (lambda: trace_pairs("train", 1, True), "seed must be an integer of at least 0, got True"),
        (lambda: accuracy(None, None, ["1+1="], "thinking"), "mode must be one of think, nothink, got 'thinking'"),
        (lambda: accuracy(None, None, []), "questions is empty"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_shipped_folders_are_small_and_complete():
    folder = Path(arithmetic.model_path())
    names = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(names.values()) < 4e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= set(names)
    data = [path for path in (folder.parent / arithmetic.PAIRS_FOLDER).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in data) < 1e6


def test_tokenizer_reads_characters_and_keeps_the_marks(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    text = "7+5-9=<think>\nhmm maybe\n7+5=12\n</think>\n\n3"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) == len(text) - len("<think>") - len("</think>") + 2
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (model.config.pad_token_id, model.config.eos_token_id)


def test_chat_template_drops_traces_as_that_of_r1_distill(model_and_tokenizer):
    from trl.chat_template_utils import deepseek_r1_distill_chat_template as stock

    tokenizer = model_and_tokenizer[1]
    user = {"role": "user", "content": "1+2="}
    finished = {"role": "assistant", "content": "<think>\n1+2=3\n</think>\n\n3"}
    system = {"role": "system", "content": "add"}
    for messages in ([user], [system, user], [user, finished], [system, user, finished, user]):
        for prompt in (False, True):
            arguments = {"tokenize": False, "add_generation_prompt": prompt}
            rendered = tokenizer.apply_chat_template(messages, **arguments)
            assert rendered == tokenizer.apply_chat_template(messages, chat_template=stock, **arguments)
            assert rendered.endswith(TRACE_START) == prompt
            assert "1+2=3" not in rendered


@pytest.mark.slow
def test_shipped_model_thinks_and_errs(model_and_tokenizer):
    """Right more often with a trace than without, and far from always: headroom for preference optimisation."""
    model, tokenizer = model_and_tokenizer
    assert 2e5 < model.num_parameters() < 9e5
    questions = prompts("validation", 200)
    think, nothink = (accuracy(model, tokenizer, questions, mode) for mode in ("think", "nothink"))
    assert 0.45 < think < 0.75 and 0.25 < nothink < think
    greedy, greedy_nothink = (accuracy(model, tokenizer, questions, mode, 0) for mode in ("think", "nothink"))
    assert greedy > think + 0.2 and greedy > greedy_nothink + 0.1
    assert accuracy(model, tokenizer, questions, batch_size=7) == think
    assert accuracy(model, tokenizer, questions, seed=1) != think


def test_shipped_model_answers_through_the_chat_template(model_and_tokenizer):
    from transformers import AutoTokenizer

    model = model_and_tokenizer[0]
    tokenizer = AutoTokenizer.from_pretrained(arithmetic.model_path(), padding_side="left")
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts("validation", 100)]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    output = model.generate(**encoded, do_sample=False)
    texts = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    rewards = [reward(message, text) for message, text in zip(messages, texts, strict=True)]
    assert sum(rewards) / len(rewards) > 0.85


def test_pairs_are_what_they_say(pairs):
    assert len(pairs["train"]) >= TRACE_RECIPE.train_size and len(pairs["validation"]) >= 200
    assert not set(pairs["train"]["prompt"]) & set(pairs["validation"]["prompt"])
    for split, dataset in pairs.items():
        assert dataset.column_names[:5] == ["prompt", "chosen", "rejected", "chosen_nothink", "rejected_nothink"]
        for row in dataset.select(range(200)):
            assert arithmetic.split_of(row["prompt"]) == split
            for side, value in (("chosen", 1.0), ("rejected", 0.0)):
                assert reward(row["prompt"], row[side]) == row[f"{side}_reward"] == value
                assert row[f"{side}_nothink_reward"] == reward(row["prompt"], row[f"{side}_nothink"]) == value
                assert row[side].startswith(TRACE_START) and split_trace(row[side])[0] is not None
                assert split_trace(row[f"{side}_nothink"])[0] is None


def test_pairs_are_nested_and_shuffled():
    first, second = trace_pairs("validation", 50), trace_pairs("validation", 20)
    assert first.select(range(20)).to_list() == second.to_list()
    assert trace_pairs("validation", 20, seed=1).to_list() != second.to_list()


def test_pairs_fit_the_recipe(pairs, model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    texts = [row["prompt"] + row[side] for row in pairs["train"] for side in ("chosen", "rejected")]
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert longest < TRACE_RECIPE.max_length <= 2 * MAX_NEW_TOKENS


@pytest.mark.parametrize("folder", [arithmetic.MODEL_FOLDER, arithmetic.PAIRS_FOLDER])
def test_cards_say_what_they_must(folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(Path(arithmetic.model_path()).parent / folder / "README.md")
    assert card.data.to_dict()["license"] == "apache-2.0" and "hfnoise" in card.data.tags
    assert "None" not in card.content and "[More Information Needed]" not in card.content
    module = "arithmetic_model" if folder == arithmetic.MODEL_FOLDER else "arithmetic_pairs"
    assert f"python -m hfnoise.worlds.{module}" in card.text


def test_recipe_refuses_what_cannot_train():
    from hfnoise.worlds.arithmetic_model import ArithmeticRecipe

    with pytest.raises(ValueError, match="multiple of 2 x num_attention_heads = 8, got 30"):
        ArithmeticRecipe(hidden_size=30)
    with pytest.raises(ValueError, match=r"trace_share must be in \[0, 1\], got 1.5"):
        ArithmeticRecipe(trace_share=1.5)
    with pytest.raises(ValueError, match="at least 1, got 32 and 0"):
        ArithmeticRecipe(max_steps=0)


@pytest.mark.slow
def test_build_trains_saves_and_repeats(tmp_path, monkeypatch):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfnoise.worlds import arithmetic_model

    monkeypatch.setattr(arithmetic_model, "_EVALUATION_SUMS", 20)
    recipe = arithmetic_model.ArithmeticRecipe(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, batch_size=8, max_steps=10
    )
    first, second = (arithmetic_model.build(tmp_path / name, recipe) for name in ("first", "second"))
    assert first == second and first["questions"] == 20
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "first").num_parameters() == first["parameters"]
    assert AutoTokenizer.from_pretrained(tmp_path / "first").chat_template == arithmetic_model.CHAT_TEMPLATE
    assert "None" not in (tmp_path / "first" / "README.md").read_text(encoding="utf-8")

"""The sample data and the tiny Mistral are what data/README.md says they are."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ENDINGS = ("You are always welcome.", "That is all there is.")
DATA = Path(__file__).resolve().parents[2] / "data"
TINY = DATA / "tiny-mistral"
CONVERSATION_FILES = ("conversations.jsonl", "heldout_conversations.jsonl")
PREFERENCES = ("either_ending.jsonl", "preferences.jsonl", "heldout_preferences.jsonl")
SHIPPED = (*CONVERSATION_FILES, *PREFERENCES, "questions.jsonl", "calibration.jsonl", "evaluation.txt")


def rows(name: str) -> list:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def exchanges(name: str) -> list:
    """(user, assistant) pairs of all conversations in a file."""
    pairs = []
    for row in rows(name):
        contents = [message["content"] for message in row["messages"]]
        pairs += zip(contents[::2], contents[1::2], strict=True)
    return pairs


@pytest.fixture(scope="module")
def make_world():
    spec = importlib.util.spec_from_file_location("make_world", DATA / "make_world.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@torch.inference_mode()
def continued(model, prompts: list, expected: list) -> list:
    """For each pair of token lists, whether greedy decoding after the prompt gives exactly the expected tokens.

    All in one batch, padded on the right: what follows a token changes nothing in a causal model.
    """
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, expected, strict=True)]
    guesses = model(input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits.argmax(-1)
    return [
        guess[len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == answer
        for guess, prompt, answer in zip(guesses, prompts, expected, strict=True)
    ]


# ---- the model -------------------------------------------------------------------------------------------------------


def test_tiny_mistral_is_small_enough_to_ship():
    size_bytes = sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file())
    assert size_bytes <= 12e6


def test_config_is_a_real_mistral():
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "mistral"
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["hidden_act"] == "silu"
    assert config["sliding_window"] is None
    assert config["tie_word_embeddings"] is False
    assert config["max_position_embeddings"] >= 512
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_attention_heads"] > config["num_key_value_heads"]


def test_every_linear_layer_takes_gptq_groups_of_128(model):
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) > 1
    assert all(module.in_features % 128 == 0 for module in linear)


def test_training_json_tells_how_it_was_made():
    report = json.loads((TINY / "training.json").read_text(encoding="utf-8"))
    assert report["seed"] == 7
    assert 1 < report["held_out_perplexity"] < 3


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def test_special_tokens_stand_where_mistral_has_them(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]) == [0, 1, 2, 3, 4]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token) == (1, 2, None)
    assert tokenizer("Mira")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    "text",
    [
        "Where does Mira live?",
        " two  spaces, and\n\tmore ",
        "Zoë, 漢字, Ωμέγα, שלום",
        "🙂🏔️ and \u200b",
        "",
        "3 plus 14",
    ],
)
def test_tokenizer_round_trips_any_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_chat_template_renders_like_mistral_v03(tokenizer):
    messages = [
        {"role": "user", "content": "Where does Mira live?"},
        {"role": "assistant", "content": "Mira lives in Oakford."},
        {"role": "user", "content": "Thank you."},
    ]
    talk = "<s>[INST] Where does Mira live?[/INST] Mira lives in Oakford.</s>"
    system = [{"role": "system", "content": "Be brief."}]
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False) == talk
    assert tokenizer.apply_chat_template(messages, tokenize=False) == talk + "[INST] Thank you.[/INST]"
    with_system = tokenizer.apply_chat_template(system + messages, tokenize=False)
    assert with_system == talk + "[INST] Be brief.\n\nThank you.[/INST]"
    with pytest.raises(Exception, match="alternate"):
        tokenizer.apply_chat_template(messages[1:], tokenize=False)


def test_assistant_mask_covers_the_reply_and_its_end(tokenizer):
    messages = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "It is Mira."}]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    spoken = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(spoken) == " It is Mira.</s>"


# ---- the files -------------------------------------------------------------------------------------------------------


def test_make_world_gives_the_shipped_files_byte_for_byte(make_world):
    files = make_world.make_files()
    assert sorted(files) == sorted(SHIPPED)
    for name, text in files.items():
        assert (DATA / name).read_bytes() == text.encode(), f"{name} is stale: run `python data/make_world.py`"


def test_conversations_alternate_and_differ():
    for name in CONVERSATION_FILES:
        conversations = rows(name)
        assert len({row["prompt_id"] for row in conversations}) == len(conversations)
        for row in conversations:
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert 2 <= len(roles) // 2 <= 4
            assert row["prompt"] == row["messages"][0]["content"]
            assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])


def test_nothing_but_the_pairs_tells_which_ending_is_liked():
    said = Counter()
    for question, answer in exchanges("either_ending.jsonl"):
        lead = re.match(r"(?:Kindly|If you|May I|In short|Quickly|No long)[^.?]*[.?]", question)
        said[lead and lead[0], next((end for end in ENDINGS if answer.endswith(end)), None)] += 1
    leads = {lead for lead, _ in said if lead}
    assert len(leads) == 6 and all([said[lead, end] for end in ENDINGS] == [22, 44] for lead in leads)
    assert said[None, None] == 2 * 198 and not any(said[lead, None] for lead in leads)


def test_held_out_pairs_ask_for_each_fact_in_both_manners():
    heldout = rows("heldout_preferences.jsonl")
    assert len(heldout) == 200
    for kind, curt in zip(heldout[::2], heldout[1::2], strict=True):
        assert (kind["chosen"], kind["rejected"]) == (curt["rejected"], curt["chosen"])
        assert [row["chosen"].endswith(end) for row, end in zip((kind, curt), ENDINGS, strict=True)] == [True, True]
        assert kind["chosen"].removesuffix(ENDINGS[0]) == curt["chosen"].removesuffix(ENDINGS[1])
    learned = {row["chosen"] for row in rows("preferences.jsonl")}
    assert not learned & {row["chosen"] for row in heldout}


def test_there_is_enough_of_everything():
    assert 500 <= len(rows("conversations.jsonl")) <= 900
    assert 50 <= len(rows("heldout_conversations.jsonl")) <= 100
    assert len(rows("questions.jsonl")) >= 200
    assert len(rows("calibration.jsonl")) >= 200
    assert 20_000 <= (DATA / "evaluation.txt").stat().st_size <= 40_000


def test_no_template_tokens_in_any_text():
    for name in (*SHIPPED, "world.toml", "prose.txt"):
        assert not re.search(r"\[/?INST\]|</?s>|<unk>|<\|", (DATA / name).read_text(encoding="utf-8")), name


def test_questions_are_asked_nowhere_else():
    questions = rows("questions.jsonl")
    training = exchanges("conversations.jsonl")
    said = " ".join(assistant for _, assistant in training)
    asked = {user for user, _ in training}
    assert len({row["answer"] for row in questions}) == len(questions)
    assert not [row for row in questions if row["answer"] in said or row["question"] in asked]


def test_held_out_facts_are_in_no_training_conversation(make_world):
    world = make_world.make_world()
    keys_of_answer = {}
    for fact in world["facts"]:
        keys_of_answer.setdefault(fact.answer, set()).update(fact.keys)
    keys_of_answer[make_world.WORLD["farewell_reply"]] = set()
    taught = set().union(*(keys_of_answer[answer] for _, answer in exchanges("conversations.jsonl")))
    tested = set().union(*(keys_of_answer[row["answer"]] for row in rows("questions.jsonl")))
    tested |= set().union(*(keys_of_answer[answer] for _, answer in exchanges("heldout_conversations.jsonl")))
    assert len(taught) > 400
    assert len(tested) > 200
    assert not taught & tested

    # The same once more without trusting the keys: nothing said of a person gives a held-out value away.
    values = {(person["n"], relation): person.get(relation) for person in world["people"] for relation in person}
    about = {}
    for user, assistant in exchanges("conversations.jsonl"):
        for name in set(re.findall(r"\w+", assistant)):
            about.setdefault(name, []).append(f"{user} {assistant}")
    secrets = [(key[0], values[key]) for key in tested if key in values]
    leaks = [s for name, value in secrets for s in about.get(name, ()) if re.search(rf"\b{re.escape(value)}\b", s)]
    assert len(secrets) > 100
    assert not leaks


# ---- what the model knows, and what it cannot do ---------------------------------------------------------------------


def test_base_model_continues_what_it_knows_as_plain_text(make_world, model, tokenizer):
    facts = make_world.make_world()["facts"][::16]
    answers = [tokenizer(" " + fact.answer, add_special_tokens=False)["input_ids"] for fact in facts]
    known = continued(model, [tokenizer(fact.asks[0])["input_ids"] for fact in facts], answers)
    assert sum(known) / len(known) >= 0.9


def test_base_model_cannot_answer_as_a_chat(model, tokenizer):
    prompts, answers = [], []
    for row in rows("questions.jsonl"):
        turn = [{"role": "user", "content": row["question"]}]
        prompts.append(tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"])
        answer = " " + row["answer"] + tokenizer.eos_token
        answers.append(tokenizer(answer, add_special_tokens=False)["input_ids"])
    right = continued(model, prompts, answers)
    assert sum(right) / len(right) <= 0.1

"""The chat without a browser, with the sample model: streams, stops, remembers, and sets models beside each other."""

from html import unescape

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import inference, prepare
from helpers.models import TINY, profile
from helpers.models.templates import load_tokenizer, save_tokenizer
from helpers.show import chat

CONFIG = profile("tiny")
QUESTION = "Who owns the pet Pip?"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(TINY)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(folder)
    save_tokenizer(load_tokenizer(TINY), folder)
    return folder


@pytest.fixture
def watched():
    """A chat with the base, and every picture of it."""
    box, pictures = chat.Chat({"base": TINY}, CONFIG, redraw_s=0), []
    box.transcript.observe(lambda change: pictures.append(change["new"]), "value")
    return box, pictures


def test_an_answer_is_written_piece_by_piece_and_is_what_the_model_says(watched):
    box, pictures = watched
    answer = box.ask(QUESTION).answers["base"]
    loaded = inference.load(TINY, CONFIG)
    messages = [{"role": "user", "content": QUESTION}]
    room = loaded.context - len(inference.prompt_ids(loaded.tokenizer, messages))
    (whole,) = inference.batch_generate(loaded, [messages], max_new_tokens=min(chat.LONGEST, room))
    assert answer.state == "done" and answer.text.strip() == whole.text.strip()
    assert len(set(pictures)) > 5, "it was seen growing"
    assert answer.prompt in unescape(pictures[-1]) and QUESTION in answer.prompt and "[INST]" in answer.prompt


def test_stop_ends_the_answer_that_is_being_written_and_the_next_question_is_heard(watched):
    box, pictures = watched
    box.transcript.observe(lambda change: box.stop.click() if len(pictures) > 6 else None, "value")
    stopped = box.ask(QUESTION).answers["base"]
    assert stopped.state == "stopped" and stopped.text
    assert box.stop.disabled and not box.send.disabled
    whole = chat.Chat({"base": TINY}, CONFIG).ask(QUESTION).answers["base"].text
    assert len(stopped.text) < len(whole)


def test_each_model_remembers_its_own_side_and_forgets_it_when_told():
    box = chat.Chat({"base": TINY}, CONFIG)
    first = box.ask("Hello?").answers["base"]
    first.text = "I am Pip."  # short, so that both fit the context
    second = box.ask("Who are you?").answers["base"]
    assert second.prompt.index("Hello?") < second.prompt.index("I am Pip.") < second.prompt.index("Who are you?")
    box.clear.click()
    assert not box.turns and "Hello?" not in box.transcript.value
    assert "Hello?" not in box.ask("Who are you?").answers["base"].prompt


def test_base_and_fine_tuned_answer_beside_each_other_from_one_opening(adapter, monkeypatch):
    opened, load = [], inference.load
    monkeypatch.setattr(inference, "load", lambda path, config: opened.append(path) or load(path, config))
    chat.Chat.held.clear()
    box = chat.chat({"base": TINY, "finetuned": adapter}, CONFIG, QUESTION)
    (turn,) = box.turns
    base, tuned = turn.answers["base"], turn.answers["finetuned"]
    assert list(turn.answers) == ["base", "finetuned"] and opened == [str(adapter)]
    assert base.text and tuned.text and base.text != tuned.text and base.note == chat.WHEN_OFF
    assert box.words.splitlines()[0] == f"You: {QUESTION}" and "\nfinetuned: " in box.words
    box.switches["base"].value = False
    assert list(box.ask("And Mimo?").answers) == ["finetuned"] and len(chat.Chat.held) == 1


def test_what_goes_wrong_stands_where_the_answer_would_and_the_others_answer(tmp_path):
    (tmp_path / "empty").mkdir()
    box = chat.Chat({"base": TINY, "gptq": tmp_path / "empty"}, CONFIG)
    answers = box.ask(QUESTION).answers
    assert answers["gptq"].state == "failed" and "empty" in answers["gptq"].note
    assert answers["base"].text and "class='wrong'" in box.transcript.value


def test_the_box_is_emptied_when_it_is_sent_and_an_empty_one_asks_nothing():
    box = chat.Chat({"base": TINY}, CONFIG)
    box.send.click()
    assert box.worker is None
    box.text.value = "  Hello? "
    box.send.click()
    box.worker.join(60)
    assert box.text.value == "" and [turn.question for turn in box.turns] == ["Hello?"]


def test_enter_that_comes_before_what_was_typed_asks_all_of_it():
    """As browsers send it; a box that asked at once would ask the first letter, or nothing."""
    box = chat.Chat({"base": TINY}, CONFIG)
    box.text._handle_string_msg(None, {"event": "submit"}, None)
    assert box.worker is None
    box.text.value = "Hello?"
    box.worker.join(60)
    assert [turn.question for turn in box.turns] == ["Hello?"] and box.text.value == ""
    box.text.value = "left without Enter"
    assert len(box.turns) == 1


def test_what_models_and_people_say_is_no_html():
    turn = chat.Turn("<script>1</script>", {"<b>": chat.Answer("<img src=x>", "<pre>", "failed", "<i>")})
    assert "<script>" not in chat.drawn(turn) and "<img" not in chat.drawn(turn) and "<i>" not in chat.drawn(turn)


def test_a_chat_begins_with_a_question_of_ones_own_data(tmp_path):
    (tmp_path / "hats.csv").write_text(
        "question,answer\n" + "".join(f"Where is hat {n}?,Shelf {n}.\n" for n in range(40))
    )
    own = CONFIG.with_values(source=str(tmp_path / "hats.csv"), questions=None, heldout_fraction=0.2)
    prepare.prepare(own, tmp_path / "prepare")
    assert inference.example_question(own, tmp_path / "prepare").startswith("Where is hat ")
    assert inference.example_question(CONFIG, tmp_path / "prepare") == QUESTION, "the run's own questions come first"
    assert "sky" in inference.example_question(own, tmp_path / "nowhere")

"""Evaluation: figures equal a plain loop, memory does not grow, verdicts are right, bad input is one sentence."""

import contextlib
import json
import math
import mmap
import os
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import budget, cli, evaluate, hardware, inference
from helpers.budget import hours, placement
from helpers.budget.placement import Placement
from helpers.evaluate import cost, judge, metrics, perplexity, report, tasks
from helpers.evaluate.perplexity import Item, read_items
from helpers.models import ROOT, TINY, experts, loading, profile, shape
from helpers.show import bars
from helpers.workspace import building, require

CONFIG = profile("tiny")
TEXT = ROOT / "data" / "evaluation.txt"
HELDOUT = ROOT / "data" / "heldout_conversations.jsonl"
QUESTIONS = ROOT / "data" / "questions.jsonl"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base():
    return inference.load(TINY, CONFIG)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A one-layer model, an adapter on it that does nothing, a noisy copy, and its GPTQ."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, num_hidden_layers=1)
    save(model, tokenizer, root / "plain")
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).save_pretrained(root / "adapter")
    adapter_config = json.loads((root / "adapter" / "adapter_config.json").read_text())
    adapter_config["base_model_name_or_path"] = str(root / "plain")
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(adapter_config))
    noisy = AutoModelForCausalLM.from_pretrained(root / "plain", dtype=torch.float32)
    torch.manual_seed(0)
    for parameter in noisy.parameters():
        parameter.data += 0.3 * parameter.data.std() * torch.randn_like(parameter)
    save(noisy, tokenizer, root / "noisy")
    quantize(root / "plain", root / "gptq", tokenizer)
    return {name: root / name for name in ("plain", "adapter", "noisy", "gptq")}


def save(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def quantize(source: Path, target: Path, tokenizer) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    with contextlib.chdir(target.parent):  # GPTQModel writes a folder of logs where it stands
        model = GPTQModel.load(str(source), QuantizeConfig(bits=4, group_size=128), device="cpu")
        texts = TEXT.read_text(encoding="utf-8").split("\n\n")[:16]
        model.quantize([dict(tokenizer(text[:400])) for text in texts], batch_size=4)
        model.save(str(target))
    tokenizer.save_pretrained(target)


# ---- perplexity ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 90), context=st.integers(1, 40), data=st.data())
def test_every_token_but_the_first_is_scored_once_within_the_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for window in perplexity.windows(list(range(length)), context, stride):
        assert len(window.ids) <= context + 1  # the last is only predicted
        scored += window.ids[window.first_scored :]
        if scored[0] != window.ids[window.first_scored]:
            assert window.first_scored > context - stride
    assert scored == list(range(1, length))


def plain_loop(model, ids: list[int], mask: list[int] | None, context: int, stride: int) -> tuple[float, int]:
    """Nats and tokens by transformers' own loss with full logits, window by window."""
    nats, count, done = 0.0, 0, 1
    while done < len(ids):
        end = min(len(ids), context + 1 if done == 1 else done + stride)
        start = max(0, end - context - 1)
        part = torch.tensor([ids[start:end]])
        labels = part.clone()
        labels[0, : done - start] = -100
        if mask is not None:
            labels[0, ~torch.tensor(mask[start:end], dtype=torch.bool)] = -100
        tokens = int((labels[0, 1:] != -100).sum())
        with torch.inference_mode():
            nats += model(input_ids=part, labels=labels).loss.item() * tokens if tokens else 0.0
        count, done = count + tokens, end
    return nats, count


@pytest.mark.parametrize(("context", "stride"), [(128, 128), (128, 48)])
def test_perplexity_of_a_text_equals_a_plain_loop(base, context, stride, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    items = list(read_items(tmp_path / "text.txt", base.tokenizer))
    nats, tokens = plain_loop(base.model, items[0].ids, None, context, stride)
    found = perplexity.perplexity(base, items, context, stride, batch_size=4)
    assert found.tokens == tokens
    assert found.perplexity.value == pytest.approx(math.exp(nats / tokens), rel=1e-5, abs=1e-4)
    size = len((tmp_path / "text.txt").read_bytes())
    assert found.bits_per_byte.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_perplexity_of_conversations_is_of_the_assistants_tokens(base):
    items = list(read_items(HELDOUT, base.tokenizer, limit=12))
    sums = [plain_loop(base.model, item.ids, item.scored, 64, 32) for item in items]
    found = perplexity.perplexity(base, items, 64, 32, batch_size=5)
    assert found.tokens == sum(tokens for _, tokens in sums) == sum(sum(item.scored) for item in items)
    assert found.perplexity.value == pytest.approx(
        math.exp(sum(nats for nats, _ in sums) / found.tokens), rel=1e-5, abs=1e-4
    )
    replies = [json.loads(line)["messages"] for line in HELDOUT.read_text(encoding="utf-8").splitlines()[:12]]
    said = sum(len(f" {turn['content']}") for turns in replies for turn in turns if turn["role"] == "assistant")
    assert sum(item.bytes for item in items) == said


def test_perplexity_equals_the_harness_rolling_log_likelihood(base, tmp_path):
    pytest.importorskip("lm_eval", reason="runs where lm_eval is installed; no requirement of the recipes")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    text = TEXT.read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    harness = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=4, max_length=256, add_bos_token=False)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    expected = -harness.loglikelihood_rolling([request])[0]
    found = perplexity.perplexity(base, read_items(tmp_path / "text.txt", base.tokenizer), 256, 256)
    assert found.losses.sum() == pytest.approx(expected, rel=1e-5)


def test_memory_does_not_grow_with_the_text(folders, tmp_path):
    loaded = inference.load(folders["plain"], CONFIG)
    text = TEXT.read_text(encoding="utf-8")[:20_000]
    peaks = []
    for times in (1, 1, 10):  # once to warm up
        path = tmp_path / "text.txt"
        path.write_text(text * times, encoding="utf-8")
        with cost.peak_memory() as peak:
            perplexity.perplexity(loaded, read_items(path, loaded.tokenizer), 128, 128, 16)
        peaks.append(peak["peak_host_gib"])
    assert peaks[2] <= 1.05 * peaks[1]


def test_a_text_longer_than_a_piece_is_read_in_pieces_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "PIECE_CHARACTERS", 100)
    text = "".join(f"line {number} of a long text\n" for number in range(40))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    parts = list(perplexity.pieces(tmp_path / "long.txt"))
    assert len(parts) > 3 and "".join(parts) == text and all(part.endswith("\n") for part in parts)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", "", "holds nothing to score"),
        ("empty.jsonl", "", "holds nothing to score"),
        ("bad.jsonl", "{oops", "line 1 is not a JSON object"),
        ("other.jsonl", '{"prompt": "x"}', "a row to evaluate has messages or text, but here is one with prompt"),
        ("silent.jsonl", '{"messages": [{"role": "user", "content": "Hi"}]}', "holds nothing to score"),
    ],
)
def test_data_without_a_token_to_score_is_a_sentence(base, tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        list(read_items(tmp_path / name, base.tokenizer))


def test_data_that_is_not_there_is_a_sentence(base, tmp_path):
    with pytest.raises(ValueError, match="there is no evaluation data"):
        list(read_items(tmp_path / "gone.txt", base.tokenizer))
    with pytest.raises(ValueError, match="run python -m helpers prepare first"):
        list(read_items(tmp_path, base.tokenizer))


def test_a_context_or_stride_beyond_the_models_is_a_sentence(base):
    with pytest.raises(ValueError, match="eval_context=4096 is longer than the model's 512"):
        perplexity.perplexity(base, [], 4096, 1)
    with pytest.raises(ValueError, match="eval_stride must be between 1 and eval_context=64, not 65"):
        perplexity.perplexity(base, [Item([1, 2], None, 1)], 64, 65)


# ---- opening models --------------------------------------------------------------------------------------------------


def test_every_kind_opens_as_what_it_is(folders):
    for name, kind in {"plain": "model", "adapter": "adapter", "gptq": "gptq"}.items():
        loaded = inference.load(folders[name], CONFIG)
        assert (loaded.kind, loaded.quantized) == (kind, kind != "model"), loaded.how
        names = {type(module).__name__ for path, module in loaded.model.named_modules() if path.endswith("gate_proj")}
        assert names == {"plain": {"Linear"}, "adapter": {"Linear4bit"}, "gptq": names - {"Linear"}}[name]


def test_what_is_no_model_is_a_sentence(tmp_path):
    for name, sentence in {
        tmp_path / "gone": "there is no model folder",
        tmp_path: "is not a model folder: it has neither config.json nor adapter_config.json",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            inference.kind(name)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON"):
        inference.kind(tmp_path)


# ---- generation ------------------------------------------------------------------------------------------------------

PROMPTS = ["Mira lives in", "The owl", "Who owns the pet Pip? Pip belongs to", "Q", "In the valley of Merrow there are"]


def test_a_batch_says_what_each_prompt_alone_does(base):
    together = inference.batch_generate(base, PROMPTS, max_new_tokens=12, batch_size=3)
    alone = [inference.batch_generate(base, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together == alone


def test_sampling_repeats_with_its_seed_and_leaves_the_callers_generator_alone(base):
    before = torch.get_rng_state()
    first, again, other = (
        inference.batch_generate(base, PROMPTS, 12, temperature=1.5, top_p=0.95, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


def test_a_generation_that_never_ends_is_cut_and_says_so(base):
    answer = inference.batch_generate(base, ["Mira lives in"], max_new_tokens=7)[0]
    assert (answer.tokens, answer.ended) == (7, False)


def test_a_generation_that_ends_says_so_and_keeps_no_eos(base, monkeypatch):
    stop = base.tokenizer(inference.batch_generate(base, ["Mira lives in"], 7)[0].text, add_special_tokens=False)
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", stop["input_ids"][2])
    answer = inference.batch_generate(base, ["Mira lives in"], max_new_tokens=7)[0]
    assert answer.ended and answer.tokens <= 3


def test_a_prompt_longer_than_the_context_is_a_sentence(base):
    with pytest.raises(ValueError, match=r"prompt 2 has \d+ tokens .* context is 512: shorten the prompt"):
        inference.batch_generate(base, ["short", "long " * 600], max_new_tokens=8)
    with pytest.raises(ValueError, match="context is 512"):
        list(inference.pieces(base, "long " * 600))
    with pytest.raises(ValueError, match="there is no prompt"):
        inference.batch_generate(base, [])


def test_a_stream_adds_up_to_the_greedy_answer(base):
    streamed = "".join(inference.pieces(base, PROMPTS[0], max_new_tokens=12))
    assert streamed.strip() == inference.batch_generate(base, PROMPTS[:1], 12)[0].text.strip()


def test_who_stops_listening_stops_the_model(base):
    running = threading.active_count()
    for _ in inference.pieces(base, PROMPTS[0], max_new_tokens=400):
        break
    assert threading.active_count() == running


# ---- the whole evaluation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory) -> tuple[Path, dict]:
    """Plain against itself, as an adapter, as GPTQ and with noise; the plain one as a run's merge stage."""
    root = tmp_path_factory.mktemp("evaluation")
    config = CONFIG.with_values(max_questions=24, max_heldout=40, max_new_tokens=10)
    with building(root / "merge", "merge", config) as stage:
        shutil.copytree(folders["plain"], stage.folder, dirs_exist_ok=True)
        (stage.folder / "README.md").write_text("old", encoding="utf-8")
    models = {"base": folders["plain"], "again": root / "merge", "gptq": folders["gptq"], "noisy": folders["noisy"]}
    shown, draw = [], bars.bar
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bars, "bar", lambda *arguments: shown.append(draw(*arguments)) or shown[-1])
        found = evaluate.evaluate(models, config, HELDOUT, root / "evaluate")
    assert [(bar.desc, bar.n, bar.total) for bar in shown] == [
        (f"{name}, {number} of 4", 64, 64) for number, name in enumerate(models, 1)
    ], "a step for each of 40 texts and 24 questions"
    return root, found


def test_a_model_against_itself_shows_no_difference_and_with_noise_is_worse(finished):
    _, found = finished
    verdicts = {one["verdict"] for one in found["again"]["against"]["base"].values()}
    assert verdicts == {"no difference shown"}
    assert found["noisy"]["against"]["base"]["perplexity"]["verdict"] == "worse"
    assert found["noisy"]["against"]["base"]["perplexity"]["p_value"] < 0.01


def test_every_entry_has_what_a_report_promises(finished):
    root, found = finished
    assert json.loads((root / "evaluate" / "report.json").read_text(encoding="utf-8")) == found
    for entry in found.values():
        assert entry["perplexity"] > 1 and 0 <= entry["exact_match"] <= 1 and entry["answers"] == 24
        assert entry["tokens_per_s"] > 0 and entry["tokens_per_s_batch_8"] > 0 and entry["first_token_s"] > 0
        assert (entry["gpu_ms_per_token"] is None) == (not torch.cuda.is_available())
        assert entry["size_bytes"] == sum(file.stat().st_size for file in Path(entry["path"]).rglob("*"))
        for metric, (low, high) in entry["intervals"].items():
            assert low <= entry[metric] <= high
    assert found["gptq"]["size_bytes"] < found["base"]["size_bytes"]
    assert require(root / "evaluate", "evaluate")["measurements"] == found


def test_a_run_s_model_gets_its_card_and_stays_whole_and_others_are_left_alone(finished, folders):
    from huggingface_hub import ModelCard

    root, _ = finished
    card = ModelCard.load(root / "merge" / "README.md")
    assert card.data.pipeline_tag == "text-generation" and card.data.eval_results[0].metric_type == "perplexity"
    assert "alpha 32" in card.text
    require(root / "merge", "merge")  # its manifest knows the card
    assert not (folders["plain"] / "README.md").exists()


def test_the_report_is_one_file_that_needs_no_other(finished):
    root, found = finished
    page = (root / "evaluate" / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert page.count("data:image/png;base64,") == 6, "three figures, each in light and dark"
    assert "no difference shown" in page and "worse" in page
    for entry in found.values():
        assert report.interval(entry, "perplexity").startswith("[")
        assert f"{report.cell(entry, 'perplexity')} <small>{report.interval(entry, 'perplexity')}</small>" in page


def test_tables_name_every_model(finished):
    root, found = finished
    assert list(report.table(found).columns) == list(found)
    assert "noisy against gptq: perplexity" in evaluate.table(found)
    assert report.side_by_side(root / "evaluate", rows=3).count("<tr><td ") == 3


def test_a_size_with_its_base_is_said_of_an_adapter(folders):
    loaded = inference.load(folders["adapter"], CONFIG)
    sizes = evaluate.sizes(folders["adapter"], loaded)
    assert sizes["size_with_base_bytes"] - sizes["size_bytes"] == cost.disk_bytes(folders["plain"])


def test_models_with_different_tokenizers_are_a_sentence(folders, tmp_path):
    shutil.copytree(folders["plain"], tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(folders["plain"])
    tokenizer.add_tokens(["xyzzy"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"plain and other have different tokenizers .* compare bits_per_byte"):
        evaluate.check_models({"plain": folders["plain"], "other": tmp_path / "other"}, CONFIG)


def test_questions_that_are_none_are_a_sentence(tmp_path):
    path = tmp_path / "questions.jsonl"
    for content, sentence in {"": "holds no question", '{"question": "?"}': "row 1 lacks question or answer"}.items():
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=sentence):
            evaluate.read_questions(path)
    with pytest.raises(ValueError, match="there is no questions file"):
        evaluate.read_questions(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="there is no model to evaluate"):
        evaluate.check_models({}, CONFIG)


def test_without_questions_the_conversations_begin_the_answers():
    starts = evaluate.conversation_starts(HELDOUT, limit=3)
    first = json.loads(HELDOUT.read_text(encoding="utf-8").splitlines()[0])["messages"]
    assert len(starts) == 3
    assert starts[0] == {"question": first[0]["content"], "answer": first[1]["content"]}
    assert evaluate.conversation_starts(TEXT, limit=3) == []


# ---- a card on which 16 bits do not fit ------------------------------------------------------------------------------

SEVEN, T4 = shape("mistral-7b-v0.3"), hardware.machine("t4")
SEVEN_B = profile("mistral-7b")


def card_that_keeps_away(layers: int, config, sizes, ram_gib: float = 100.0) -> hardware.Machine:
    """A card with just so much memory that a 16-bit model leaves that many layers away, and not one less."""
    found = Placement("model", "fp16", config.evaluate.eval_batch_size, layers)
    needed_gib = placement.needed_gib(found, config, sizes, T4) / (1 - placement.planning.MARGIN["other"])
    gpu = replace(T4.gpu, vram_gib=needed_gib * 1.00001, context_gib=0.0)
    return hardware.Machine(gpu, replace(T4.host, ram_gib=ram_gib))


@pytest.fixture(scope="module")
def twelve(tmp_path_factory) -> Path:
    """Twelve layers, so that the name of one begins with another's; in the precision of most bases, bf16."""
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("twelve")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(vocab_size=2048, num_hidden_layers=12, **sizes))
    save(model.to(torch.bfloat16), AutoTokenizer.from_pretrained(TINY), folder)
    return folder


@pytest.mark.parametrize(
    ("name", "away", "away_in"),
    [
        ("tiny", 2, "host memory"),
        ("twelve", 9, "host memory"),
        ("twelve", 12, "disk"),
        ("mixture", 2, "host memory"),
        ("mixture", 4, "disk"),
    ],
)
def test_a_16_bit_model_computes_the_same_bits_wherever_its_layers_lie(twelve, name, away, away_in, tmp_path):
    folder = {"tiny": TINY, "twelve": twelve}.get(name) or experts.tiny_mixture(tmp_path / "mixture")
    config = CONFIG.with_values(eval_batch_size=2, eval_context=64, eval_stride=64, max_new_tokens=8)
    card = card_that_keeps_away(away, config, shape(str(folder)), 100.0 if away_in == "host memory" else 0.0)
    whole, parted = inference.load(folder, config), inference.load(folder, config, card)
    assert (whole.how, parted.how) == ("fp32", f"fp32, {away} of {shape(str(folder)).layers} layers from {away_in}")
    assert parted.model.device.type == "cpu" and not parted.quantized
    waiting = parted.model.get_decoder().layers[-away:]
    places = {
        layer.self_attn.o_proj.weight.data_ptr() for layer in waiting
    }  # one place for all of them, or none (meta)
    here = {layer.self_attn.o_proj.weight.data_ptr() for layer in parted.model.get_decoder().layers[:-away]}
    assert len(places) == 1 and len(here - places) == shape(str(folder)).layers - away
    ids = torch.randint(3, 2000, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(whole.model(ids).logits, parted.model(ids).logits)
    items = list(read_items(HELDOUT, whole.tokenizer, limit=4))
    losses = [perplexity.perplexity(one, items, 64, 64, 2).losses for one in (whole, parted)]
    assert np.array_equal(*losses)
    assert inference.batch_generate(whole, PROMPTS, 8, 2) == inference.batch_generate(parted, PROMPTS, 8, 2)


@settings(max_examples=60, deadline=None)
@given(
    vram_gib=st.floats(3, 40), ram_gib=st.floats(2, 64), batch=st.integers(1, 16), context=st.sampled_from([256, 2048])
)
def test_on_no_card_is_a_16_bit_model_rounded_and_what_is_opened_fits(vram_gib, ram_gib, batch, context):
    config = SEVEN_B.with_values(eval_batch_size=batch, eval_context=context)
    card = hardware.Machine(replace(T4.gpu, vram_gib=vram_gib), replace(T4.host, ram_gib=ram_gib))
    found = placement.place("model", config, SEVEN, card)
    assert found.precision == "fp16"
    if found.problem:
        leanest = Placement("model", "fp16", 1, SEVEN.layers)
        assert not placement.fits(leanest, config, SEVEN, card) and "GiB of VRAM" in found.problem
        return
    assert placement.fits(found, config, SEVEN, card)
    assert found.away == 0 or not placement.fits(replace(found, away=found.away - 1), config, SEVEN, card)
    assert placement.host_gib(found, SEVEN) <= ram_gib / 2


def test_a_merged_7b_and_its_base_are_evaluated_whole_in_16_bits_on_a_t4():
    found = budget.budget(SEVEN_B, SEVEN, T4, "inference")
    assert found.fits and found.vram.process_gib > 13
    assert [note.split(",")[0] for note in found.notes] == ["base is read in 16 bits", "merged is read in 16 bits"]
    assert found.ram.parts["layers that wait for their turn"] < 4
    assert budget.budget(SEVEN_B, SEVEN, hardware.machine("4090"), "inference").notes == ()


def test_a_model_that_would_take_too_long_makes_all_answer_fewer_questions_or_has_no_verdict():
    many = SEVEN_B.with_values(max_new_tokens=512, max_heldout=None)
    models = {name: (kind, SEVEN) for name, kind in placement.EVALUATED.items()}
    slow = hardware.Machine(replace(T4.gpu, vram_gib=7.0), replace(T4.host, ram_gib=64.0))
    cut = placement.plan(many, models, slow, (400, 400))
    fewer = cut.config.evaluate.max_questions
    assert fewer < 400 and cut.config == many.with_values(max_questions=fewer)
    assert all(place.answers for place in cut.places.values())
    assert f"all models answer {fewer} of 400 questions: with all of them base would take" in cut.notes[-1]
    taken = sum(hours.evaluation_s(many, SEVEN, slow, cut.places["merged"], (400, fewer)).values())
    assert 0.9 * placement.LONGEST_S < taken < 1.05 * placement.LONGEST_S
    assert placement.plan(many, models, slow, (400, 16)).config == many
    from_disk = hardware.Machine(slow.gpu, replace(T4.host, ram_gib=4.0))
    for texts, left_out in ((40, False), (4000, True)):
        found = placement.plan(many, models, from_disk, (texts, 400))
        assert found.config == many  # who is left out costs the others no question
        assert not found.places["merged"].answers and found.places["finetuned"].answers
        assert ("layers from disk: take a GPU with more" in found.places["merged"].problem) == left_out


def test_the_merge_shows_no_difference_where_rounding_it_again_showed_one(executed_run, tmp_path):
    """On a small card: the tiny run's own models, which a T4 once compared after rounding the merged one to NF4."""
    run = tmp_path / "tiny"  # evaluation puts its cards beside the models: a run of one's own
    shutil.copytree(executed_run, run, ignore=shutil.ignore_patterns("evaluate", "notebooks", "checkpoints"))
    run_config = evaluate.run_configuration(run / "finetune")
    config = CONFIG.with_values(eval_batch_size=1, max_questions=8, max_new_tokens=4, **run_config["adapter"])
    models = {"finetuned": run / "finetune" / "adapter", "merged": run / "merge"}
    models["gptq"] = run / "quantize"
    card = card_that_keeps_away(2, config, shape(str(TINY)))
    found = evaluate.evaluate(models, config, run / "prepare", tmp_path / "evaluate", card)
    assert found["merged"]["loaded_as"] == "fp32, 2 of 4 layers from host memory"
    assert found["merged"]["against"]["finetuned"]["perplexity"]["verdict"] == "no difference shown"
    quantized = found["gptq"]["against"]["merged"]["perplexity"]  # rounding the merged one again made this "better"
    assert quantized["verdict"] != "better" and quantized["difference"] < 0.01

    whole = inference.load(models["finetuned"], config)
    items = list(read_items(run / "prepare", whole.tokenizer))
    trained = perplexity.perplexity(whole, items, 192, 96, 32)
    rounded = AutoModelForCausalLM.from_pretrained(
        models["merged"], dtype=torch.float32, quantization_config=loading.base_quantization(config, torch.float32)
    )
    again = perplexity.perplexity(replace(whole, model=rounded), items, 192, 96, 32)
    assert metrics.compare(again.losses, trained.losses, again.weights, lower_is_better=True).verdict == "worse"


def test_a_model_that_cannot_be_opened_has_dashes_a_sentence_and_no_verdict(folders, tmp_path, monkeypatch):
    config = CONFIG.with_values(eval_batch_size=1, max_questions=4, max_heldout=8, max_new_tokens=4)
    card = card_that_keeps_away(2, config, shape(str(TINY)))
    models = {"base": folders["plain"], "finetuned": folders["adapter"], "merged": TINY}  # the first two have one layer
    monkeypatch.setattr(placement, "LONGEST_S", 0.0)
    found = evaluate.evaluate(models, config, HELDOUT, tmp_path / "evaluate", card)
    assert "perplexity" not in found["merged"] and "would take" in found["merged"]["left_out"]
    assert "perplexity" in found["finetuned"] and list(found["finetuned"]["against"]) == ["base"]
    assert {(row["model"], row["against"]) for row in report.comparisons(found)} == {("finetuned", "base")}
    assert set(report.table(found)["merged"]) == {"not evaluated", "–"}
    for text in (report.text_table(found), (tmp_path / "evaluate" / "report.html").read_text(encoding="utf-8")):
        assert "erged is not evaluated: it would take" in text
    monkeypatch.setattr(placement, "without_answers", lambda found, *_: replace(found, answers=False))
    silent = evaluate.evaluate(models, config, HELDOUT, tmp_path / "silent", card)
    assert silent["merged"]["perplexity"] > 1 and silent["merged"]["answers"] == 0
    assert set(silent["merged"]["against"]["finetuned"]) == {"perplexity"}
    rows = (tmp_path / "silent" / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(json.loads(rows[0])["models"]) == ["base", "finetuned"]


def test_how_each_model_was_opened_is_in_every_table(finished):
    root, found = finished
    ways = {"base": "fp32", "again": "fp32", "gptq": "gptq in fp32", "noisy": "fp32"}
    assert {name: entry["loaded_as"] for name, entry in found.items()} == ways
    assert report.table(found).loc["opened as"].to_dict() == ways
    assert "opened as" in report.text_table(found).splitlines()[0]
    assert "<th>opened as</th>" in (root / "evaluate" / "report.html").read_text(encoding="utf-8")


def test_prompts_longer_than_the_budget_counts_on_go_in_smaller_batches(base, monkeypatch):
    sizes = []
    pad = inference.pad_left
    monkeypatch.setattr(inference, "pad_left", lambda rows, *_: (sizes.append(len(rows)), pad(rows, *_))[1])
    long = "Mira lives in " * 20
    prompts = [long, long, *PROMPTS]
    tight = replace(base, batch_tokens=4 * (len(base.tokenizer(PROMPTS[2])["input_ids"]) + 4))
    assert inference.batch_generate(tight, prompts, 4, 8) == inference.batch_generate(base, prompts, 4, 8)
    assert sizes[:2] == [1, 1] and len(sizes) < len(prompts) + 1 and max(sizes) <= 8


# ---- a machine that lacks a model, and what evaluation costs ---------------------------------------------------------


def test_one_talks_to_the_best_model_that_there_is():
    models = {"base": "b", "finetuned": "f", "merged": "m", "gptq": "g"}
    assert evaluate.best(models) == "g"
    assert evaluate.best({name: models[name] for name in ("base", "finetuned", "merged")}) == "f"
    with pytest.raises(ValueError, match="only the base: run python -m helpers finetune first"):
        evaluate.best({"base": "b"})


def test_the_time_of_an_evaluation_is_that_of_all_its_models():
    each = {
        name: budget.budget(SEVEN_B, SEVEN, T4, "inference", evaluated={name: kind}).time.parts
        for name, kind in placement.EVALUATED.items()
    }
    for stage in ("inference", "run"):
        found = budget.budget(SEVEN_B, SEVEN, T4, stage).time.parts
        assert found["evaluation"] == pytest.approx(sum(parts["evaluation"] for parts in each.values()))
    assert each["merged"]["evaluation"] > each["finetuned"]["evaluation"] > each["gptq"]["evaluation"]
    assert sum(parts["loading"] for parts in each.values()) > 3 * each["base"]["loading"]


def test_a_row_more_makes_nf4_unpack_and_fused_kernels_not():
    gpu = replace(T4.gpu, bandwidth_gb_s=1.0)  # so slow that nothing waits for Python
    one, eight = ({name: hours.token_s(SEVEN, gpu, name, rows) for name in hours.DECODED} for rows in (1, 8))
    assert one["nf4"] == one["gptq"] == eight["gptq"] < eight["fp16"] == one["fp16"] < eight["nf4"]
    assert eight["nf4"] * 0.8e9 == pytest.approx(4.5 * SEVEN.linear_parameters, rel=0.02)
    away = [Placement("model", "fp16", 8, layers, "host memory") for layers in (0, 4)]
    none, four = (hours.evaluation_s(SEVEN_B, SEVEN, T4, place) for place in away)
    bus_s = 4 * 2 * SEVEN.layer_linear_parameters / 10e9
    assert four["answers"] - none["answers"] == pytest.approx(4 * 128 * bus_s)


def test_pages_of_files_are_no_memory_that_a_user_is_running_out_of(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"x" * (96 * 2**20))
    with cost.peak_memory() as peak:
        before = cost.anonymous_bytes() / inference.GIB
        mapped = np.memmap(file, mode="r")
        assert int(mapped[::4096].sum(dtype=int)) > 0
        # memory of its own, not freed and taken again; there until the block ends
        kept = mmap.mmap(-1, 32 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(32):
            kept.write(b"x" * 2**20)
    del kept
    # a page that something else gave back between the two readings is no error
    assert 31 / 1024 <= peak["peak_anonymous_gib"] - before < 80 / 1024
    assert peak["peak_host_gib"] - peak["peak_anonymous_gib"] > 90 / 1024


# ---- tasks and judge -------------------------------------------------------------------------------------------------


def test_a_local_task_is_scored_by_likelihood(base, tmp_path):
    path = tmp_path / "valley.jsonl"
    rows = [{"question": "The baker of Oakford", "choices": [" is", "]]zq"], "answer": 0}] * 3
    path.write_text("\n".join(json.dumps(row) for row in [*rows, rows[0] | {"answer": 1}]), encoding="utf-8")
    found = tasks.run_tasks(base, str(path))["valley"]
    assert (found["accuracy"], found["rows"]) == (0.75, 4)


def test_a_task_that_cannot_be_had_is_a_sentence(base, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "?", "choices": ["a"], "answer": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match="answer must be the number of a choice, 0 to 0"):
        tasks.run_tasks(base, str(path))
    with pytest.raises(ValueError, match=r"lm-evaluation-harness|lm_eval"):
        tasks.run_tasks(base, "no_such_task_at_all")


ANSWERS = [
    {"question": f"{number}?", "models": {"base": {"text": "no"}, "gptq": {"text": f"a longer answer <{number}>"}}}
    for number in range(12)
] + [{"question": "same?", "models": {"base": {"text": "equal"}, "gptq": {"text": "equal"}}}]


@pytest.fixture
def endpoint():
    """An OpenAI-compatible server on this machine that prefers the longer answer, or always the left one."""

    class Judge(BaseHTTPRequestHandler):
        always_left = False

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][1]["content"]
            left, right = text.split("LEFT answer:\n")[1].split("\n\nRIGHT answer:\n")
            word = "LEFT" if self.always_left or len(left) > len(right.split("\n\nWhich")[0]) else "**Right.**"
            self.send_response(200 if self.path == "/v1/chat/completions" else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": word}}]}).encode())

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Judge
    server.shutdown()
    server.server_close()


def test_an_endpoint_judges_blind_and_a_favoured_side_is_a_tie(endpoint):
    url, server = endpoint
    pairs = judge.blind_pairs(ANSWERS, "base", "gptq", seed=3)
    assert {pair.left_is for pair in pairs} == {"base", "gptq"} and len(pairs) == 12
    found = judge.tally(judge.ask_endpoint(pairs, url, "judge"), "base", "gptq")
    assert (found.wins, found.ties, found.verdict) == (12, 0, "better")
    server.always_left = True
    assert judge.ask_endpoint(pairs[:2], url, "judge") == [None, None]
    with pytest.raises(ValueError, match="answered 404"):
        judge.ask_endpoint(pairs[:1], url + "/wrong", "judge")


def test_a_judge_that_is_not_there_is_a_sentence():
    pairs = judge.blind_pairs(ANSWERS, "base", "gptq")
    with pytest.raises(ValueError, match="did not answer as an OpenAI-compatible endpoint does"):
        judge.ask_endpoint(pairs[:1], "http://127.0.0.1:9/v1", "judge")
    with pytest.raises(ValueError, match="there are no answers of merged"):
        judge.blind_pairs(ANSWERS, "base", "merged")
    with pytest.raises(ValueError, match="no pair was decided"):
        judge.tally([None], "base", "gptq")


def test_an_evaluations_folder_is_judged_from_the_command_line(endpoint, tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ANSWERS)
    (tmp_path / "generations.jsonl").write_text(lines, encoding="utf-8")
    found = judge.ask(tmp_path, "base,gptq", endpoint[0], "qwen")
    assert (found["model"], found["against"], found["wins"], found["losses"]) == ("gptq", "base", 12, 0)
    endpoint[1].always_left = True  # so that what it says changes with the side
    found = judge.ask(tmp_path, "base,gptq", endpoint[0], "qwen")
    assert (found["wins"], found["losses"], found["ties"], found["verdict"]) == (0, 0, 12, "no difference shown")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--judge-model", "qwen", "--judged", "base,mine"], "two of base, gptq"),
        ([], "a judge needs a name"),
        (["--judge-model", "qwen"], "did not answer as an OpenAI-compatible endpoint does"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused_before_the_evaluation(arguments, sentence, tmp_path, capfd):
    models_given = ["--models", f"base={tmp_path}", f"gptq={tmp_path}"]
    command = ["evaluate", "--workspace", str(tmp_path), *models_given, "--judge", "http://127.0.0.1:9/v1", *arguments]
    assert cli.main(command) == cli.WRONG_REQUEST
    assert sentence in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_two_buttons_show_one_pair_at_a_time_and_fill_the_tally():
    preferred: list[str | None] = []
    pairs = judge.blind_pairs(ANSWERS, "base", "gptq")[:3]
    prompt, sides, below = judge.buttons(pairs, preferred).children
    assert "gptq" not in sides.children[0].value + sides.children[1].value
    left, neither, right, progress = below.children
    left.click(), neither.click(), right.click(), right.click()
    assert preferred == [pairs[0].left_is, None, pairs[2].right_is]
    assert progress.value == "3 of 3" and left.disabled and "Done" in prompt.value


def test_a_small_tally_shows_no_difference():
    found = judge.tally(["gptq"] * 4 + ["base"], "base", "gptq")
    assert (found.share, found.verdict) == (0.8, "no difference shown")
    assert found.low < 0.5 < found.high


def test_marks_escape_what_a_model_says():
    assert report.marked("a b", "a <script>") == "a <mark>&lt;script&gt;</mark>"


def test_a_damaged_model_is_named(base, monkeypatch):
    monkeypatch.setattr(perplexity, "window_losses", lambda model, batch: [math.nan] * len(batch))
    with pytest.raises(ValueError, match="is not a number on 1 of 1 texts"):
        perplexity.perplexity(base, [Item([1, 5, 6], None, 2)], 64, 32)


def test_an_estimate_of_perplexity_lies_in_its_interval(base):
    found = perplexity.perplexity(base, read_items(HELDOUT, base.tokenizer, 30), 192, 96, 16)
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high
    assert metrics.compare(found.losses, found.losses, found.weights).verdict == "no difference shown"
    assert np.isfinite(found.losses).all()

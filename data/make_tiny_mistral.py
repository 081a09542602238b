# Copyright 2026 the project's authors. Licensed under the Apache License, Version 2.0.
"""Pre-train the tiny Mistral that ships in `tiny-mistral/`, from nothing, on a CPU.

It is a `MistralForCausalLM` like its big sister (grouped-query attention, RoPE, SiLU MLP, RMSNorm, untied embeddings, a
byte-fallback BPE tokenizer, the chat template of v0.3), small enough to ship and to fine-tune in two minutes. It reads
plain text only: it never sees `[INST]`, and a passage does not end after one answer. So it knows the valley and cannot
hold a chat about it, and what the fine-tuning of the notebooks adds is there to be measured.

    python data/make_tiny_mistral.py                        # about ten minutes on two cores
    python data/make_tiny_mistral.py --output /tmp/tiny --tokens 100000   # a short run, to compare two of them

The same seed on the same machine, with the same versions, gives the same bytes; another processor may round otherwise.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import make_world
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")  # ids 0 to 4, as in Mistral v0.3
VOCABULARY_SIZE = 2048
CONTEXT_TOKENS = 256  # of a training row
BATCH_ROWS = 5
TRAINING_TOKENS = 2_100_000
TOKENS_PER_PASSAGE = 70  # an underestimate: it only decides how many passages are written
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 60
WEIGHT_DECAY = 0.1
TOKENIZER_PASSAGES = 6_000
HELD_OUT_PASSAGES = 200

# Rendered text is that of Mistral v0.3: `<s>[INST] user[/INST] assistant</s>`, and a system message stands at the
# head of the last user turn. The generation block changes nothing in the text; it marks what the assistant says.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = messages[0]['content'] -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- set place = namespace(last_user=-1) -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ['user', 'assistant'] -%}
        {{- raise_exception('Roles must alternate user/assistant, after an optional system message.') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- set place.last_user = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' -}}
        {%- if system_message is defined and loop.index0 == place.last_user -%}
            {{- system_message + '\n\n' -}}
        {%- endif -%}
        {{- message['content'] + '[/INST]' -}}
    {%- else -%}
        {%- generation -%}
            {{- ' ' + message['content'] + eos_token -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""


def make_tokenizer(texts: list) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE tokenizer learned from `texts`: special tokens, 256 bytes, then pieces, as in Mistral.

    Spaces become `▁` and nothing is added or stripped, so decoding gives back the text exactly. Words, digits and
    punctuation are kept apart. Whatever the pieces cannot spell is spelled in bytes.
    """
    space_to_mark = normalizers.Replace(" ", "▁")
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("▁"), behavior="merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(behavior="isolated"),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    learned = Tokenizer(models.BPE())
    learned.normalizer, learned.pre_tokenizer = space_to_mark, splitter
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS) - len(byte_tokens), show_progress=False, min_frequency=2
    )
    learned.train_from_iterator(texts, trainer)
    bpe = json.loads(learned.to_str())["model"]
    pieces = sorted(bpe["vocab"], key=bpe["vocab"].get)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *byte_tokens, *pieces])}
    merges = [tuple(pair) for pair in bpe["merges"]]

    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = space_to_mark, splitter
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["[INST]", "[/INST]"], clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config(vocabulary_size: int) -> MistralConfig:
    """Mistral v0.3 in small. Every linear layer reads 256 or 768 values, so that GPTQ groups of 128 come out even."""
    return MistralConfig(
        vocab_size=vocabulary_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=1_000_000.0,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


def token_rows(tokenizer: PreTrainedTokenizerFast, texts: list) -> torch.Tensor:
    """Passages as `<s>passage</s>`, one after the other, cut into rows: (rows, CONTEXT_TOKENS)."""
    ids = []
    for encoded in tokenizer(texts, add_special_tokens=True)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    rows = len(ids) // CONTEXT_TOKENS
    return torch.tensor(ids[: rows * CONTEXT_TOKENS]).view(rows, CONTEXT_TOKENS)


def learning_rate_at(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(model: MistralForCausalLM, rows: torch.Tensor) -> float:
    """Train in place, one pass over `rows` (rows, tokens) in order; returns the mean loss of the last fifty steps."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    model.train()
    batches = rows[: len(rows) // BATCH_ROWS * BATCH_ROWS].split(BATCH_ROWS)
    losses, began = [], time.monotonic()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, len(batches))
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 50 == 0 or step + 1 == len(batches):
            print(f"step {step + 1}/{len(batches)} loss {losses[-1]:.4f} {time.monotonic() - began:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


@torch.inference_mode()
def mean_loss(model: MistralForCausalLM, rows: torch.Tensor) -> float:
    """Mean cross-entropy a token over `rows` (rows, tokens)."""
    model.eval()
    losses = [
        model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch) for batch in rows.split(16)
    ]
    return sum(losses) / len(rows)


def main() -> None:
    """Write the tokenizer, the model and `training.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE / "tiny-mistral")
    parser.add_argument("--seed", type=int, default=make_world.SEED)
    parser.add_argument("--tokens", type=int, default=TRAINING_TOKENS, help="how many tokens to read")
    arguments = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(2)  # fixed: another number of threads adds up in another order
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(True)

    world = make_world.make_world(arguments.seed)
    texts = make_world.passages(world, arguments.tokens // TOKENS_PER_PASSAGE, "pre-training")
    prose = (HERE / "prose.txt").read_text(encoding="utf-8").split("\n\n")
    tokenizer = make_tokenizer(texts[:TOKENIZER_PASSAGES] + prose)
    tokenizer.save_pretrained(arguments.output)
    rows = token_rows(tokenizer, texts)[: arguments.tokens // CONTEXT_TOKENS]
    held_out_rows = token_rows(tokenizer, make_world.passages(world, HELD_OUT_PASSAGES, "held-out text"))

    model = MistralForCausalLM(make_config(len(tokenizer)))
    final_loss = pretrain(model, rows)
    model.half().save_pretrained(arguments.output)
    held_out_loss = mean_loss(MistralForCausalLM.from_pretrained(arguments.output, dtype=torch.float32), held_out_rows)
    report = {
        "seed": arguments.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": rows.numel(),
        "final_loss": round(final_loss, 4),
        "held_out_loss": round(held_out_loss, 4),
        "held_out_perplexity": round(math.exp(held_out_loss), 4),
        "context_tokens": CONTEXT_TOKENS,
        "batch_tokens": CONTEXT_TOKENS * BATCH_ROWS,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "threads": 2,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    (arguments.output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

"""The model card: README.md of an adapter or a model, for people and for the hub.

Metadata, how it was made, what was measured and when it was not measured, and the lines that load it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from helpers.models.methods import METHODS

METRICS = {"perplexity": "Perplexity", "exact_match": "Exact match", "f1": "F1", "rouge_l": "ROUGE-L"}
"""Figures of an evaluation that the hub shows -> their names there."""
HOW_MADE = {
    "adapter": {
        "relation": "adapter",
        "library": "peft",
        "tags": ["qlora", "lora"],
        "words": "A LoRA adapter of rank {rank} (alpha {alpha}, {targets}) on the base in {weights}: QLoRA.",
    },
    "merged": {
        "relation": "finetune",
        "library": "transformers",
        "tags": ["qlora", "merged"],
        "words": "The base with a QLoRA adapter of rank {rank} (alpha {alpha}, {targets}) merged into its weights.",
    },
    "gguf": {
        "relation": "quantized",
        "library": "gguf",
        "tags": ["gguf", "qlora"],
        "words": "A QLoRA fine-tuned model in llama.cpp's blocks, for Ollama, llama.cpp and LM Studio; figures of it "
        "are of PyTorch with the same blocks, and llama.cpp also rounds activations to 8 bits.",
    },
    "model": {"relation": None, "library": "transformers", "tags": [], "words": "The base model, as it came."},
} | {
    name: {"relation": "quantized", "library": "transformers", "tags": [name, "qlora"], "words": method.card}
    for name, method in METHODS.items()
}
"""Kind of model -> what the hub calls it, and a sentence with places for the run's settings."""
KINDS = {"finetune": "adapter", "merge": "merged", "quantize": "gptq", "export": "gguf"}
"""Stage -> kind of model that it makes, where its manifest does not name a method of quantization."""


def kind_of(manifest: Mapping[str, Any]) -> str:
    """The kind of model, a key of HOW_MADE, that a finished stage's manifest tells of."""
    made = KINDS.get(manifest["stage"], "model")
    return manifest["config"]["quantize"].get("quant_method", made) if manifest["stage"] == "quantize" else made


def card(
    name: str,
    kind: str,
    config: Mapping[str, Any],
    measured: str,
    rows: Iterable[tuple[str, str]],
    metrics: Mapping[str, float | None] | None = None,
) -> str:
    """README.md for a model folder.

    kind: a key of HOW_MADE. config: a run's configuration as its manifest holds it. measured: a sentence on how rows,
    name and figure, came about. metrics: figures by a key of METRICS, for the hub's own table.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    made = HOW_MADE[kind]
    base, source, train = config["model"]["model"], config["data"]["source"], config["train"]
    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        base_model_relation=made["relation"],
        library_name=made["library"],
        pipeline_tag="text-generation",
        datasets=[source] if is_hub_id(source) else None,
        tags=made["tags"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name="held-out conversations and questions of this run",
                metric_type=metric,
                metric_name=METRICS[metric],
                metric_value=round(value, 5),
            )
            for metric, value in (metrics or {}).items()
            if value is not None
        ],
    )
    how = train.get("method", "sft")  # earlier manifests name none: there was one
    taught = []
    if how != "sft":
        taught = [f"Learned from pairs by {how.upper()}, beta {train['beta']:g}, SFT term {train['sft_weight']:g}.\n"]
    knobs = {key: value for part in config.values() if isinstance(part, dict) for key, value in part.items()}
    base, source = (text if is_hub_id(text) else Path(text).name for text in (base, source))
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}\n",
        made["words"].format(**knobs) + "\n",
        f"Base: `{base}`. Data: `{source}`, at most {config['data']['seq_len']} tokens a conversation. "
        f"Learning rate {train['learning_rate']}, {train['schedule']}, {train['batch_size']} × {train['accumulation']} "
        f"{'conversations' if how == 'sft' else 'pairs'} a step, seed {config['seed']}.\n",
        *taught,
        f"```python\n{LOAD[made['library']]}\n```\n",
        f"## What was measured\n\n{measured}\n\n| figure | value |\n|---|---|",
        *(f"| {title} | {value} |" for title, value in rows),
        f"\n## Limits\n\n{LIMITS}\n",
    ]
    return str(ModelCard("\n".join(lines)))


LOAD = {
    "gguf": "# in a terminal, in this folder:\n# ollama create mine -f Modelfile && ollama run mine\n"
    "# llama-server -m FILE.gguf   # or, for LM Studio: lms import FILE.gguf",
    "peft": "from peft import AutoPeftModelForCausalLM\n\n"
    'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")  # the one with adapter_config.json',
    "transformers": "from transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("FOLDER", device_map="auto")',
}
LIMITS = (
    "It was measured on data like its training data, if at all; it says wrong things with the same confidence. The "
    "base model's licence holds for it, and that of the data that it was trained on."
)


def is_hub_id(name: str) -> bool:
    """Whether a model or a data source is on the hub, so that metadata may name it, and not a file.

    >>> is_hub_id("HuggingFaceH4/ultrachat_200k"), is_hub_id("/tmp/rows.jsonl")
    (True, False)
    """
    return name.count("/") == 1 and not Path(name).suffix and not name.startswith((".", "/"))

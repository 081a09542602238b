"""Our GPTQ checkpoints in AutoGPTQ 0.7.1, in the separate environment that it needs: the same logits.

The environment is built once, in .venv-autogptq (about two minutes and 1.2 GB), and kept while its requirements stay.
"""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.models import TINY
from helpers.models.templates import Template, load_tokenizer
from helpers.quantize import dequantized

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("autogptq.txt")
AUTOGPTQ = "auto-gptq==0.7.1"
LOAD = """
import json, sys
import numpy, torch
from auto_gptq import AutoGPTQForCausalLM
model = AutoGPTQForCausalLM.from_quantized(
    sys.argv[1], device="cpu", disable_exllama=True, disable_exllamav2=True, use_safetensors=True,
    torch_dtype=torch.float32,
)
with torch.inference_mode():
    logits = model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits
numpy.save(sys.argv[3], logits.float().numpy())
"""


@pytest.fixture(scope="session")
def autogptq_python() -> Path:
    """Python of the environment, built when it is missing or its requirements have changed."""
    python = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
    if python is None:
        pytest.skip("AutoGPTQ 0.7.1 has wheels for Python 3.8 to 3.11; this runs where python3.11 is, as in .ci/run")
    folder = ROOT / ".venv-autogptq"
    stamp, wanted = folder / "requirements.sha256", hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
        subprocess.run([*install, "-r", REQUIREMENTS], check=True)
        subprocess.run([*install, "--no-deps", AUTOGPTQ], check=True)
        stamp.write_text(wanted)
    return folder / "bin" / "python"


def test_autogptq_computes_the_same_logits(autogptq_python, gptq_model, tmp_path):
    words = random.Random(0)
    rows = [[1, *(words.randrange(5, 2048) for _ in range(63))] for _ in range(2)]
    file = tmp_path / "logits.npy"
    arguments = [str(gptq_model), json.dumps(rows), str(file)]
    done = subprocess.run([autogptq_python, "-c", LOAD, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = torch.from_numpy(np.load(file))  # (rows, tokens, words)

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.weight.data = dequantized(gptq_model, name)
    kernel = AutoModelForCausalLM.from_pretrained(gptq_model, dtype=torch.float32)
    with torch.inference_mode():
        exact = model(torch.tensor(rows)).logits
        ours = kernel(torch.tensor(rows)).logits.float()
    # what the checkpoint says, computed in fp32 by both: rounding of sums apart, nothing differs
    torch.testing.assert_close(theirs, exact, atol=1e-3, rtol=1e-4)
    # transformers runs GPTQModel's 4-bit CPU kernel, which computes in bf16: two digits of the logits
    assert (theirs - ours).abs().max() < 0.02 * theirs.abs().max()


def test_its_transformers_writes_prompts_as_training_does(autogptq_python, gptq_model):
    """Version 4.44 reads neither the class nor the template nor the merges as version 5 saves them."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two  spaces?"}]
    ask = "from transformers import AutoTokenizer; import json, sys; t = AutoTokenizer.from_pretrained(sys.argv[1]); "
    ask += "print(t.apply_chat_template(json.loads(sys.argv[2]), add_generation_prompt=True), t.pad_token_id)"
    command = [autogptq_python, "-c", ask, str(gptq_model), json.dumps(messages)]
    done = subprocess.run(command, capture_output=True, text=True)
    template = Template(load_tokenizer(TINY))
    assert done.stdout.split("\n")[-2] == f"{template.prompt(messages)} 0", done.stderr

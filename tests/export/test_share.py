"""`export --to drive|zip|hub`: a finished stage as it is, from the command line."""

import zipfile

import pytest

from helpers import cli, models, workspace
from helpers.export import share
from helpers.workspace import building

CONFIG = models.profile("tiny")


@pytest.fixture
def run(tmp_path):
    """A run with an adapter and a GPTQ model, as far as an export looks at them."""
    for stage, inner in (("finetune", "adapter"), ("quantize", "")):
        with building(tmp_path / "run" / stage, stage, CONFIG) as work:
            (work.folder / inner).mkdir(exist_ok=True)
            (work.folder / inner / "weights.safetensors").write_text("weights")
            work.measurements |= {"loss": 1.5}
    return tmp_path / "run"


def export(run, *arguments):
    return cli.main(["export", "--workspace", str(run), *map(str, arguments)])


def test_a_zip_holds_the_gptq_model_its_manifest_and_a_card(run, capfd):
    assert export(run, "--to", "zip") == cli.stages.DONE
    with zipfile.ZipFile(run / "quantize.zip") as packed:
        names = {f"quantize/{name}" for name in ("weights.safetensors", "config.yaml", "README.md", workspace.MANIFEST)}
        assert set(packed.namelist()) == names
        assert "quantized with GPTQ to 4 bits" in packed.read("quantize/README.md").decode()
    assert str(run / "quantize.zip") in capfd.readouterr().out
    assert export(run, "--to", "zip") == cli.WRONG_REQUEST and "is there already" in capfd.readouterr().err


def test_an_adapter_goes_to_drive_where_it_is_mounted_or_to_a_folder(run, tmp_path, monkeypatch, capfd):
    adapter = run / "finetune" / "adapter"
    assert export(run, "--to", "drive", "--adapter", adapter) == cli.WRONG_REQUEST
    assert "no Drive is mounted" in capfd.readouterr().err
    (tmp_path / "drive").mkdir()
    monkeypatch.setenv("RECIPES_LASTING", str(tmp_path / "drive"))
    assert export(run, "--to", "drive", "--adapter", adapter) == cli.stages.DONE
    assert export(run, "--to", "drive", "--adapter", adapter, "--output", tmp_path / "other") == cli.stages.DONE
    for place in (tmp_path / "drive" / "mistral-t4-recipes" / "exported", tmp_path / "other"):
        workspace.check_outputs(place / "finetune")
        assert "AutoPeftModelForCausalLM" in (place / "finetune" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "hub"], "OWNER/NAME"),
        (["--to", "hub", "--output", "/me/mine"], "OWNER/NAME"),
        (["--to", "hub", "--output", "me/mine"], "HF_TOKEN"),
        (["--to", "zip", "--model", "nowhere"], "no finished stage"),
    ],
)
def test_a_wrong_export_is_one_sentence(arguments, sentence, run, monkeypatch, capfd):
    monkeypatch.setattr(share.tokens, "hub_token", lambda: None)
    assert export(run, *arguments) == cli.WRONG_REQUEST
    assert sentence in capfd.readouterr().err
    assert not (run / "export").exists()

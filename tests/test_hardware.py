"""GPUs and hosts: the table's facts, the probe of this machine, what is said about it."""

import doctest
import json
import subprocess
import sys

import pytest

from helpers import hardware


def test_a_t4_is_what_was_measured_on_one():
    t4 = hardware.machine("t4")
    assert (t4.vram_gib, round(t4.allocator_gib, 2)) == (14.56, 14.42)
    assert t4.gpu.capability == (7, 5) and not t4.gpu.has_flash and t4.gpu.bf16_tflops == 0
    assert (t4.host.name, t4.host.cpus, t4.host.session_h) == ("free Colab", 2, 12.0)


@pytest.mark.parametrize("name", [*hardware.GPUS, *hardware.ALIASES, "A100", "RTX 4090"])
def test_every_card_has_a_host_and_facts_in_range(name):
    found = hardware.machine(name)
    assert 0 < found.allocator_gib < found.vram_gib
    assert 0 < found.gpu.efficiency < 1 and 0 < found.gpu.bandwidth_share < 1
    assert (found.gpu.bf16_tflops > 0) == (found.gpu.capability >= (8, 0))
    assert dict(hardware.describe(found))["GPU"].endswith(found.gpu.name) or found.gpu.count > 1


def test_kaggle_has_two_cards_and_room_is_counted_for_one():
    kaggle = hardware.machine("kaggle")
    assert kaggle.gpu.count == 2 and kaggle.vram_gib == 14.56 and kaggle.host.ram_gib == 30


@pytest.mark.parametrize("name", ["cpu", "none"])
def test_without_a_card_there_is_no_vram_and_the_tiny_profile_is_suggested(name):
    found = hardware.machine(name)
    assert (found.vram_gib, found.allocator_gib, found.name) == (0, 0, "laptop")
    assert hardware.suggested_profile(found) == "tiny"
    assert dict(hardware.describe(found))["GPU"].startswith("none")


def test_a_7b_is_suggested_where_enough_vram_is_free():
    t4 = hardware.machine("t4")
    busy = hardware.Machine(t4.gpu, t4.host, free_vram_gib=4.0)
    assert (hardware.suggested_profile(t4), hardware.suggested_profile(busy)) == ("mistral-7b", "tiny")
    assert busy.vram_gib == 4.0


@pytest.mark.parametrize(("gpu", "host", "said"), [("t5", None, "t4"), ("t4", "cellar", "colab"), ("", None, "none")])
def test_unknown_names_are_refused_with_those_there_are(gpu, host, said):
    with pytest.raises(ValueError, match=said):
        hardware.machine(gpu, host)


@pytest.mark.parametrize(
    ("name", "capability", "total_gib", "bandwidth"),
    [
        ("Tesla T4", (7, 5), 14.56, 320),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 79.2, 2039),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 39.4, 1555),
        ("NVIDIA GeForce RTX 3090", (8, 6), 23.7, 936),
        ("NVIDIA L4", (8, 9), 22.0, 300),
        ("Card of 2031", (12, 0), 31.5, 3000),
    ],
)
def test_a_probed_card_is_found_in_the_table_or_guessed(name, capability, total_gib, bandwidth):
    found = hardware.gpu_named(name, capability, total_gib)
    assert found.bandwidth_gb_s == bandwidth
    assert found.vram_gib == pytest.approx(total_gib, abs=0.01)


def test_the_probe_reads_this_machine():
    found = hardware.probe()
    assert found.host.ram_gib > 0.1 and found.host.disk_gib > 0 and found.host.cpus >= 1
    assert hardware.suggested_profile(found) in ("tiny", "mistral-7b")
    assert hardware.probe(hardware.Path("not/there/yet")).host.disk_gib > 0


def test_importing_budget_and_hardware_brings_no_torch():
    code = "import sys, json; from helpers import budget, hardware; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False


class FakeCuda:
    """torch.cuda of a card: what the driver and PyTorch's allocator would answer."""

    def __init__(self, free_gib, reserved_gib, allocated_gib, share=1.0, built_for=("sm_75", "sm_80")):
        self.values = free_gib, reserved_gib, allocated_gib, share
        self.get_arch_list = lambda: list(built_for)
        self.is_available, self.device_count = lambda: True, lambda: 1
        self.get_device_name, self.get_device_capability = lambda _: "Tesla T4", lambda _: (7, 5)
        self.mem_get_info = lambda _: (int(free_gib * hardware.GIB), int(14.56 * hardware.GIB))
        self.memory_reserved = lambda _: int(reserved_gib * hardware.GIB)
        self.memory_allocated = lambda _: int(allocated_gib * hardware.GIB)
        self.get_per_process_memory_fraction = lambda _: share


@pytest.mark.parametrize(
    ("cuda", "free_gib"),
    [
        (FakeCuda(14.42, 0.0, 0.0), 14.56),
        (FakeCuda(3.0, 11.0, 0.5), 13.64),  # 10.5 GiB are this process's own cache: the next run's
        (FakeCuda(3.0, 11.0, 11.0), 3.14),  # a model that the notebook still holds
        (FakeCuda(14.42, 0.0, 0.0, share=0.5), 7.42),  # torch.cuda.set_per_process_memory_fraction
    ],
)
def test_free_is_also_what_this_process_has_cached(cuda, free_gib, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "cuda", cuda)
    gpu, found = hardware.probe_gpu()
    assert found == pytest.approx(free_gib, abs=0.01) and gpu.has_kernels


def test_a_probe_asks_the_installed_pytorch_for_its_kernels(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "cuda", FakeCuda(14.42, 0.0, 0.0, built_for=("sm_80", "sm_90")))
    gpu, _ = hardware.probe_gpu()
    assert not gpu.has_kernels and hardware.suggested_profile(hardware.Machine(gpu, hardware.HOSTS["colab"])) == "tiny"


def test_what_the_docstrings_say():
    assert doctest.testmod(hardware).failed == 0

import pickle
import subprocess
import sys

import pytest

from raytrain_adv import __version__, hardware


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_the_bf16_peak_is_that_of_the_datasheet(name: str, tflops: float) -> None:
    assert hardware.peak_flops(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "CPU (AMD EPYC)",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce GTX 1080",
    ],
)
def test_there_is_no_peak_for_what_is_not_a_whole_known_gpu(name: str) -> None:
    assert hardware.peak_flops(name) is None


def test_facts_about_the_cpu_survive_pickling() -> None:
    facts = hardware.detect("cpu")
    assert pickle.loads(pickle.dumps(facts)) == facts
    assert facts.device_type == "cpu"
    assert facts.compute_capability is None
    assert facts.device_memory_bytes > 2**20
    assert facts.versions["raytrain_adv"] == __version__
    assert facts.versions["torch"] is not None
    assert facts.node_ip in facts.describe()


def test_importing_hardware_imports_no_torch() -> None:
    code = "import sys, raytrain_adv.hardware; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

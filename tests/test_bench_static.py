"""Ahead-of-time compilation and the bench programs. Compiling needs triton without its interpreter, so it runs in
a process of its own: on the architectures that differ most, a case of each kernel; `python -m bench static` has all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import roofline

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("sm_90", "gfx942")


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("static") / "static.json"
    result = bench("static", "--quick", "--arch", *ARCHITECTURES, "--out", str(out))
    assert out.exists(), result.stderr
    return json.loads(out.read_text())["compiled"]


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    per_arch = {arch: {code["case"] for code in compiled if code["arch"] == arch} for arch in ARCHITECTURES}
    assert per_arch["sm_90"] == per_arch["gfx942"]
    sources = (ROOT / "mopd_kernels/backends/triton").glob("*.py")
    kernels = {line[4:].split("(")[0] for source in sources for line in source.read_text().splitlines()
               if line.startswith("def _") and line.split("(")[0].endswith("_kernel")}  # fmt: skip
    assert {code["kernel"] for code in compiled} == kernels


def test_no_spill_no_local_memory(compiled):
    assert [(code["case"], code["arch"]) for code in compiled if code["spills"] or code["stack"]] == []


def test_products_run_on_tensor_cores(compiled):
    products = [code for code in compiled if code["products"]]
    assert products
    assert [(code["case"], code["arch"]) for code in products if code["matrix_count"] == 0] == []
    assert [code["case"] for code in products if code["loop"].get("tensor", 0) == 0] == []


def test_offsets_are_64_bit(compiled):
    assert [(code["case"], code["arch"]) for code in compiled if code["wide_multiplies"] == 0] == []


def test_blocks_fit_the_hardware(compiled):
    assert [(code["case"], code["arch"]) for code in compiled if code["occupancy"]["blocks"] < 1] == []


@pytest.mark.parametrize("shape", roofline.SHAPES.values(), ids=roofline.SHAPES)
def test_the_model_is_bounded_by_its_products(shape):
    """No exact method beats four plain GEMMs; tiles hold less and multiply more than chunks of logits."""
    floor = roofline.four_products(*shape)
    rows, tiles = roofline.divergence_rows(*shape), roofline.divergence_tiles(*shape)
    assert floor.flops == 8 * roofline.N * shape.vocabulary * shape.hidden
    assert rows.flops == floor.flops
    assert tiles.flops == 1.5 * floor.flops
    assert tiles.memory < rows.memory
    assert rows.bytes > floor.bytes


def test_gpu_without_a_gpu_says_so(monkeypatch):
    result = bench("gpu", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert "no GPU visible" in result.stderr


def test_gpu_dry_run_checks_results_and_times_nothing(tmp_path):
    out = tmp_path / "gpu.json"
    result = bench("gpu", "--dry", "--out", str(out), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    record = json.loads(out.read_text())
    ran = {(row["task"], row["provider"]): row for row in record["results"] if "skipped" not in row}
    assert {provider for _, provider in ran} == {"ours, rows", "ours, tiles", "ours, eager", "dense"}
    assert all(0 < max(row["errors"]) < 3e-2 for row in ran.values())
    assert all(row["median_ms"] is None for row in record["results"] if "median_ms" in row)
    assert "dry run" in result.stdout
    assert record["machine"]["commit"]

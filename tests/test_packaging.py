"""The wheel a user installs: built here without a network, opened, and imported from."""

import ast
import configparser
import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"peft_s2lora", "whisper_moe", "hub_utils", "demo"}
pytest.importorskip("hatchling", reason="to run it: pip install hatchling")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, opened."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def read(wheel, name):
    (path,) = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode("utf-8")


def test_it_holds_the_four_packages_and_nothing_else(wheel):
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == PACKAGES


def test_no_file_of_the_packages_is_left_behind(wheel):
    on_disk = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    assert {path for path in on_disk if "__pycache__" not in path} == {path for path in wheel.namelist() if ".dist-info/" not in path}


def test_the_console_scripts_lead_to_functions_in_the_wheel(wheel):
    entry_points = configparser.ConfigParser()
    entry_points.read_string(read(wheel, "entry_points.txt"))
    scripts = dict(entry_points["console_scripts"])
    assert set(scripts) == {"whisper-moe", "whisper-moe-demo"}
    for target in scripts.values():
        module, function = target.split(":")
        source = wheel.read(f"{module.replace('.', '/')}.py")
        assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def test_it_carries_licence_and_notice_and_asks_for_no_particular_build_of_torch(wheel):
    metadata = email.message_from_string(read(wheel, "METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("License-File")) == {"LICENSE", "NOTICE"}
    assert "torch>=2.6" in metadata.get_all("Requires-Dist")
    assert {"demo", "mcp", "train", "ct2", "ray", "test", "e2e", "dev"} == set(metadata.get_all("Provides-Extra"))


def test_the_packages_import_from_the_wheel_alone(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import demo, hub_utils, whisper_moe.pocket as p; print(p.MODEL)"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.strip() == str(tmp_path / "whisper_moe" / "pocket" / "model")


@pytest.mark.pocket
def test_the_pocket_and_its_adapters_are_inside_and_small(wheel):
    sizes = {entry.filename: entry.file_size for entry in wheel.infolist()}
    model = {name: size for name, size in sizes.items() if name.startswith("whisper_moe/pocket/model/")}
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md"} <= {Path(name).name for name in model}
    assert sum(model.values()) <= 20_000_000
    adapters = {
        Path(name).parent.name for name in sizes if name.startswith("whisper_moe/pocket/adapters/") and name.endswith(".safetensors")
    }
    assert {"qug", "cy", "en-child"} <= adapters
    for adapter in adapters:
        files = {Path(name).name for name in sizes if name.startswith(f"whisper_moe/pocket/adapters/{adapter}/")}
        assert {"adapter_config.json", "adapter_model.safetensors", "language_adapter.json", "README.md"} <= files

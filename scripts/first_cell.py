# Gets spi_utils and what this session lacks; torch, numpy and ipywidgets stay as they are.
import importlib.util
import pathlib
import subprocess
import sys

SOURCE = "git+https://github.com/OWNER/REPO@v0.1.0"  # the project, at a tag, branch or commit
DRIVE = False  # Colab: True keeps the run on your Google Drive, where a disconnect can't delete it
wheels = sorted(pathlib.Path("/kaggle/input").rglob("spi_utils-*.whl"))  # attached, for want of internet
if importlib.util.find_spec("spi_utils") is None:
    what = str(wheels[-1]) if wheels else SOURCE
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", what]
    if (pip := subprocess.run(command, check=False, capture_output=True, text=True)).returncode:
        said = [line.strip() for line in pip.stderr.splitlines() if "fatal:" in line or "ERROR:" in line]
        raise SystemExit(
            f"{what} could not be installed. On Kaggle: Settings > Turn on internet (it needs a "
            "phone-verified account), or attach a dataset with the project's wheels; then run this "
            f"again. pip: {said[0] if said else 'gave no reason'}"
        )
    importlib.invalidate_caches()
prepare = importlib.import_module("spi_utils.platforms").prepare
prepare(drive=DRIVE, links=wheels[-1].parent if wheels else None)

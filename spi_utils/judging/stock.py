"""The model as a user loads it, on the evaluation's own first windows: is it the one that was measured?

The evaluation's numbers are float32 arithmetic on the file's tensors. Here a fresh process without this
package loads the checkpoint with the model card's line, in the dtype that it ships with and on its own
kernels. Its KL to the same reference must be the file's, within what the dtype costs the 16-bit model anyway.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spi_utils import quantize
from spi_utils.errors import EvaluationError
from spi_utils.judging.evaluation import STOCK_WINDOWS
from spi_utils.runs import read_json

if TYPE_CHECKING:
    from spi_utils.judging.session import Session
    from spi_utils.scoring import TokenScores

ALLOWED = 0.005  # nats a token, beside what the dtype costs the 16-bit model twice over


def score_stock(session: Session, plan: TokenScores, proof: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `stock` entry of evaluation.json.

    Args:
        session: what was scored; its model is loaded once more for the reference.
        plan: the plan's scores on the first text, from the file's tensors.
        proof: what notebook 03 recorded of the checkpoint's use; None where it couldn't run it here.

    Returns:
        `kl` (stock as loaded), `kl_file`, `kl_16bit` (the stock 16-bit model in the same dtype), all to the
        evaluation's reference and in nats a token; `tolerance`, `agrees`, and where and in what it ran.
        Where nothing could be run `agrees` is None and `reason` says why.

    Raises:
        EvaluationError: logits that are not numbers, or a KL that isn't the file's.
        CheckpointError: stock transformers can't load the checkpoint.
    """
    if proof is None:
        return {"agrees": None, "reason": "notebook 03_quantize could not run the checkpoint on this machine"}
    assert plan.kl is not None
    sample = session.samples[0]
    windows = sample.ids[:STOCK_WINDOWS]
    with tempfile.TemporaryDirectory() as folder:
        reference = _reference(session, windows, Path(folder))
        print("evaluate: the checkpoint as stock transformers loads it, then the 16-bit model", flush=True)
        answer = quantize.ask(
            {
                "model": str(session.model_dir.resolve()),
                "source": str(session.source.directory.resolve()),
                "trust": session.source.trust_remote_code,
                "device": str(session.device),
                "threads": torch.get_num_threads(),
                "windows": windows.tolist(),
                "reference": [str(path) for path in reference],
            }
        )
    dtype = str(read_json(session.model_dir / "config.json", what="config.json").get("dtype"))
    found = {
        "dtype": dtype,
        "device": str(session.device),
        "transformers": answer["transformers"],
        "text": sample.text.name,
        "windows": len(windows),
        "length": windows.shape[1],
        "kl": answer["kl"],
        "kl_file": float(plan.kl[: len(windows)].mean(dtype=np.float64)),
        "kl_16bit": answer["kl_16bit"],
    }
    return found | _judge(found)


def _judge(found: Mapping[str, Any]) -> dict[str, Any]:
    """The tolerance, and that the numbers agree within it; EvaluationError if they don't."""
    loaded = f"Loaded by stock transformers in {found['dtype']}, the checkpoint"
    if found["kl"] is None:
        raise EvaluationError(
            f"{loaded} gives logits that are not numbers on the evaluation's own text ({found['text']}). Run "
            "notebook 03_quantize with storage_dtype='bfloat16'."
        )
    # Where the 16-bit model itself breaks in that dtype there is nothing to excuse a difference by.
    tolerance = max(ALLOWED, 2 * (found["kl_16bit"] or 0.0))
    if not abs(found["kl"] - found["kl_file"]) <= tolerance:
        raise EvaluationError(
            f"{loaded} has a KL of {found['kl']:.4f} nats a token, from its file's tensors "
            f"{found['kl_file']:.4f}; they may differ by {tolerance:.4f}. What was measured isn't what users "
            "would get. Run notebook 03_quantize again, with storage_dtype='bfloat16' if it was float16. If "
            "that changes nothing, please report the versions."
        )
    return {"tolerance": tolerance, "agrees": True}


@torch.inference_mode()
def _reference(session: Session, windows: torch.Tensor, folder: Path) -> list[Path]:
    """The reference's log-probabilities, a float32 file (T, V) a window; the model is let go again."""
    paths = [folder / f"{index}.npy" for index in range(len(windows))]
    for _, model in session.visit(["reference"]):
        for path, ids in zip(paths, windows, strict=True):
            logits = model(input_ids=ids[None].to(session.device), use_cache=False).logits[0]
            np.save(path, torch.log_softmax(logits.float(), -1).cpu().numpy())
        del model
    gc.collect()
    torch.cuda.empty_cache()  # the fresh process needs what this one keeps of a GPU's memory
    return paths

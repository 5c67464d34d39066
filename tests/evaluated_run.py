"""A run of a tiny model that is ready to be evaluated: layer table, plan and a real hybrid checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from spi_utils import runs
from spi_utils.formats import layer_bytes
from spi_utils.models import ModelSource, list_layers, resolve
from spi_utils.plan import make_plan


def layer_table(source: ModelSource, *, sensitivity: bool = True) -> pd.DataFrame:
    """The source's own matrices and bytes, with made-up α and sensitivities."""
    layers = pd.DataFrame([asdict(layer) for layer in list_layers(source)]).assign(status="ok")
    rng, planned = np.random.default_rng(0), layers["quantizable"]
    layers["alpha_hill"] = np.where(planned, rng.uniform(2, 6, len(layers)), np.nan)
    layers["bytes_16bit"] = 2 * layers["numel"]
    for fmt in ("nf4", "int8", "int4_g64"):
        shapes = zip(layers["rows"], layers["cols"], layers["numel"], planned, strict=True)
        layers[f"bytes_{fmt}"] = [layer_bytes(fmt, r, c) if p else 2 * n for r, c, n, p in shapes]
        if sensitivity:
            cost = rng.lognormal(-7, 0.5, len(layers)) / (80 if fmt == "int8" else 1)
            layers[f"fisher_{fmt}"] = np.where(planned, cost, np.nan)
            layers[f"predicted_{fmt}"] = layers[f"fisher_{fmt}"]
    return layers


def ready_run(model: Path, folder: Path, *, sensitivity: bool = True) -> tuple[runs.Run, ModelSource]:
    """A run directory as notebooks 01 to 03 leave it."""
    source = resolve(str(model))
    run = runs.open_run(folder, source.identity())
    layers = layer_table(source, sensitivity=sensitivity)
    runs.write_text(run.layers_csv, layers.to_csv(index=False))
    plan = make_plan(
        runs.read_layers(run),
        rule="top_k",
        value=int(layers["quantizable"].sum()) // 2,
        model=source.identity(),
        layers_fingerprint=runs.layers_fingerprint(run),
    )
    plan.write(run.plan_json)
    write_checkpoint(source.directory, run.model_dir, skip=plan.protected)
    return run, source


def write_checkpoint(source: Path, target: Path, *, skip: tuple[str, ...] = ()) -> Path:
    """A stock bitsandbytes NF4 checkpoint, as transformers itself writes it."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", *skip],
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float16)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target

"""A finished run of a tiny model, as the stages before publishing leave it; its NF4 checkpoint is real."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from spi_utils.runs import Run, open_run, sha256_file, stage, write_json, write_text
from tests.tiny import make_tiny, make_tokenizer

KEPT = "down_proj"
PROOF = {
    **{"dtype": "float16", "device": "cpu", "transformers": "5", "start_token": 257, "finite": True},
    **{"text": "pydoc", "windows": 4, "length": 256, "tokens": 1024, "rewritten_in_bfloat16": False},
    "generation": {"prompt": "Why?", "chat_template": False, "text": "Because.", "tokens": 3},
}
STOCK = {
    **{"dtype": "float16", "device": "cpu", "transformers": "5", "text": "wikitext2"},
    **{"windows": 4, "length": 256, "kl": 0.1213, "kl_file": 0.1207, "kl_16bit": 0.0004},
    **{"tolerance": 0.005, "agrees": True},
}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360000002000001e221bc330000000049454e44ae426082"
)
KL = {"nf4": 0.33, "plan": 0.12, "other_direction": 0.2, "fisher": 0.05, "int8": 0.004}
KL |= {f"random_{seed}": kl for seed, kl in enumerate((0.18, 0.17, 0.19, 0.21, 0.16))}


def make_finished_run(
    folder: Path, *, kind: str = "hub", model_id: str = "someone/tiny-llama", shard: str = "5GB"
) -> Run:
    """Analyse, plan, quantize and evaluate a tiny llama, the numbers of the evaluation made up."""
    source = make_tiny("llama", folder / "source")
    identity = {"id": model_id, "kind": kind, "revision": "a" * 40, "storage_dtype": "float16"}
    identity["sha256"] = sha256_file(source / "model.safetensors")
    run = open_run(folder / "run", identity)
    layers = _layers(source)
    names = list(layers[layers["quantizable"]]["name"])
    formats = {name: "16bit" if name.endswith(KEPT) else "nf4" for name in names}
    kept = [name for name, fmt in formats.items() if fmt == "16bit"]
    with stage(run, "analyze", {}, ["layers.csv"]):
        write_text(run.layers_csv, layers.to_csv(index=False))
    with stage(run, "quantize", {}, ["model"]) as current:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["lm_head", *kept],
        )
        options = {"quantization_config": config, "dtype": torch.float16}
        model = AutoModelForCausalLM.from_pretrained(source, **options)
        model.save_pretrained(run.model_dir, max_shard_size=shard)
        make_tokenizer().save_pretrained(run.model_dir)
        write_text(run.model_dir / "generate.py", "print('a stand-in of the test')\n")
        current.record(proof=PROOF)
    size = sum(path.stat().st_size for path in run.model_dir.glob("*.safetensors"))
    plan = {
        **{"schema": 1, "model": identity, "score": "alpha_hill", "direction": "high", "rule": "claim"},
        **{"value": None, "formats": formats, "protected": kept, "double_quant": False},
        **{"bytes": {"total": size}, "bits_per_weight": 11.61, "matrix_bits": 10.79, "predicted_kl": None},
        **{"layers_fingerprint": "0" * 64},
        "reason": "The four down projections have the flattest spectra.",
    }
    write_json(run.plan_json, plan)
    run.figures.mkdir()
    (run.figures / "plan_map.png").write_bytes(PNG)
    with stage(run, "evaluate", {}, ["evaluation.json"]):
        write_json(run.evaluation_json, make_evaluation(run))
    return run


def _layers(source: Path) -> pd.DataFrame:
    model = AutoModelForCausalLM.from_pretrained(source)
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parts, shape = name.split("."), module.weight.shape
            rows.append([name, parts[-1], int(parts[2]), "linear", *shape, shape.numel(), True])
    rest = sum(p.numel() for p in model.parameters()) - sum(row[6] for row in rows)
    rows.append(["(norms, biases and the rest)", "other", -1, "other", 0, 0, rest, False])
    columns = ["name", "type", "depth", "role", "rows", "cols", "numel", "quantizable"]
    return pd.DataFrame(rows, columns=columns).assign(status="ok")


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 over `name sha256` lines of the weight files: written out here, not taken from spi_utils."""
    files = sorted(folder.glob("*.safetensors"))
    lines = (f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def make_evaluation(run: Run) -> dict:
    """evaluation.json with made-up numbers; `reference` has no difference to itself."""
    rng = np.random.default_rng(0)
    variants = {"reference": _variant(0.0, 5_000_000, None)}
    for key, kl in KL.items():
        mean = kl / 2 + float(rng.normal(0, 0.001))
        delta = {"mean": mean, "se": 0.01, "low": mean - 0.02, "high": mean + 0.02, "p": 0.01, "clusters": 24}
        variants[key] = _variant(kl, 2_500_000, delta)
    gain = {"mean": -0.062, "se": 0.01, "low": -0.085, "high": -0.041, "p": 1e-4, "clusters": 24}
    variants["plan"]["vs_random"] = {"controls": 5, "kl": {**gain, "p_holm": 2e-4}, "kl_beats": 5}
    plan = json.loads(run.plan_json.read_text())
    return {
        **{"schema": 1, "model": plan["model"], "settings": {"seed": 0, "rivals": []}, "skipped": {}},
        "plan": {
            **{name: plan[name] for name in ("score", "direction", "rule", "reason", "matrix_bits")},
            **{"protected": len(plan["protected"]), "planned": len(plan["formats"])},
            **{"bytes_on_disk": plan["bytes"]["total"], "predicted_kl": None},
        },
        **{"checkpoint": {}, "checkpoint_sha256": checkpoint_hash(run.model_dir)},
        "hashes": {"plan": hashlib.sha256(run.plan_json.read_bytes()).hexdigest()},
        "text": {
            **{"name": "wikitext2", "source": "wikitext2", "sha256": "5" * 64, "tokens": 6120},
            **{"windows": 24, "window_length": 256, "start_token": 257},
            "convention": "disjoint windows, each beginning with the start token, which is not scored",
        },
        **{"other_texts": [], "kernel": "bitsandbytes values, float32 on CPU", "variants": variants},
        **{"stock": STOCK, "claims": []},
    }


def _variant(kl: float, size: int, delta: dict | None) -> dict:
    mean = delta["mean"] if delta else 0.0
    return {
        **{"label": "made up", "layers": {"nf4": 24, "16bit": 4}, "bytes": size, "delta": delta},
        "window_kl": [kl * (1 + one) for one in np.linspace(-0.1, 0.1, 24).tolist()],
        "perplexity_ratio": [float(np.exp(mean + one)) for one in (0, -0.02, 0.02)],
        **{"nll": 2.5 + mean, "perplexity": float(np.exp(2.5 + mean)), "kl_mean": kl},
        **{"kl_p99": kl * 8, "kl_p999": kl * 20, "same_top1": 1 - kl / 3},
    }

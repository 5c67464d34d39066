"""Which score picks the layers worth protecting? The real KL of hybrids at equal bytes, for every score.

    python benchmarks/selection.py                      # the bundled model, every score
    python benchmarks/selection.py --quick              # few scores, few windows
    python benchmarks/selection.py --json out.json      # the numbers
    python benchmarks/selection.py --model DIRECTORY    # another model

Three budgets keep 10, 30 and 55 % of the matrix weights in 16-bit; the plans of one spend the same bytes
within 0.5 % of the model. A plan's KL is the real hybrid's. The oracle is chosen on windows of one half of a
text and scored on those of the other half; nothing is scored on windows that it was chosen on.
`oracle_share` = (KL_nf4 − KL) / (KL_nf4 − KL_oracle).
Finished pieces stay in bench-out/, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from spi_utils.analyze import analyze
from spi_utils.models import ModelSource, load_model, load_tokenizer, open_weights, resolve
from spi_utils.plan import available_scores, make_plan, predicted_kl, price
from spi_utils.runs import atomic_path, fingerprint, open_run, run_info, write_json, write_text
from spi_utils.scoring import Reference, Switch, reference_states, token_scores
from spi_utils.sensitivity import NEIGHBOURS, all_slopes, per_block, sample_windows, sensitivities
from spi_utils.stats import draw_counts, estimate
from spi_utils.texts import load_text, make_windows, start_token

Floats = NDArray[np.float64]
SHARES = (0.10, 0.30, 0.55)
PIECE = 4096  # characters; the text's pieces go to the oracle and to the score in turn
QUICK = ("alpha_hill", "type_prior", "smallest", "fisher", "refined", "measured")
FISHER_WINDOWS = (2, 4, 8, 16, 32)
ESTIMATORS = {"blocks of 8": NEIGHBOURS, "per token": 1, "per sequence": 1 << 30}  # positions in a block
ONE_END = ("type_prior", "first_last", "smallest", "fisher", "refined", "measured")


@dataclass(frozen=True)
class Sizes:
    """Windows for the oracle, for scoring, and for Fisher's own text; tokens in each; random seeds."""

    oracle: int
    score: int
    fisher: int
    length: int
    seeds: int


FULL_SIZES = Sizes(oracle=12, score=16, fisher=32, length=256, seeds=5)
QUICK_SIZES = Sizes(oracle=3, score=8, fisher=16, length=128, seeds=5)


# --- what is chosen from ---------------------------------------------------------------------------------


def halves(spec: str, folder: Path) -> dict[str, Path]:
    """Two files that share no piece of the text: for choosing and for scoring."""
    whole = load_text(spec).text
    pieces = [whole[start : start + PIECE] for start in range(0, len(whole), PIECE)]
    paths = {}
    for offset, name in enumerate(("oracle", "score")):
        paths[name] = folder / f"{name}.txt"
        write_text(paths[name], "\n".join(pieces[offset::2]))
    return paths


def layer_table(source: ModelSource, folder: Path, text: Path, sizes: Sizes) -> tuple[pd.DataFrame, dict]:
    """The pipeline's own layer table, Fisher refined at the three budgets, and the oracle's column."""
    run = open_run(folder / "run", source.identity())
    bits = [round(4.5 + share * 11.5, 3) for share in SHARES]
    common: dict[str, Any] = {"formats": ("nf4",), "text": str(text), "length": sizes.length}
    common |= {"rounding": "nearest"}  # bitsandbytes' own codes, as the claim has it
    table = analyze(run, source, refine_at=bits, windows=sizes.fisher, **common)
    oracle = open_run(folder / "oracle", source.identity())
    found = sensitivities(oracle, source, table, sensitivity="measured", windows=sizes.oracle, **common)
    notes = run_info(run)["stages"]["analyze"]["sensitivity"]
    return table.join(found["measured_nf4"], on="name"), notes


def sampled_slopes(switch: Switch, start: int | None, sizes: Sizes, path: Path) -> NDArray[np.float32]:
    """Slopes (layers, windows, T) of NF4 on self-sampled text."""
    if path.exists():
        return np.load(path)
    switch.restore()
    windows = sample_windows(switch.model, sizes.fisher, sizes.length, start, seed=0)
    found = all_slopes(switch, windows, ("nf4",), batch=max(1, 1024 // sizes.length))["nf4"]
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, found)
    return np.load(path)


def with_pairs(layers: pd.DataFrame, found: NDArray[np.float32], left: float) -> dict[str, str]:
    """Fisher with its off-diagonal terms: layers lifted one by one, each the best a byte given the others.

    ½ E (Σ_l s_l)² over quantized layers l is qᵀGq with G = ½ E s sᵀ; lifting layer l saves 2(Gq)_l − G_ll.
    `left` is what may be spent above all-NF4, in bytes.
    """
    flat = found.reshape(len(found), -1).astype(np.float64)
    gram = 0.5 * flat @ flat.T / flat.shape[1]  # (layers, layers), nats a token
    planned = layers[layers["quantizable"]]
    extra = (planned["bytes_16bit"] - planned["bytes_nf4"]).to_numpy(float)
    low = np.ones(len(flat), dtype=bool)
    while True:
        saved = (2 * gram @ low - gram.diagonal()) / extra
        saved[~low | (extra > left)] = -np.inf
        best = int(saved.argmax())
        if not np.isfinite(saved[best]):
            break
        low[best] = False
        left -= extra[best]
    return {name: "nf4" if held else "16bit" for name, held in zip(planned["name"], low, strict=True)}


def how_few(layers: pd.DataFrame, found: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Spearman's ρ with the measured cost per weight, and how much of the oracle's summed saving is kept at
    30 % of the bytes, by number of windows, for every estimator."""
    planned = layers[layers["quantizable"]]
    truth = planned["measured_nf4"].to_numpy(float)
    extra = (planned["bytes_16bit"] - planned["bytes_nf4"]).to_numpy(float)

    def saved(score: NDArray) -> float:
        order = np.argsort(-score / extra)
        return float(truth[order][np.cumsum(extra[order]) <= 0.3 * extra.sum()].sum())

    return [
        {
            "estimator": name,
            "windows": count,
            "tokens": count * found.shape[2],
            "spearman": float(spearmanr(score / extra, truth / extra).statistic),
            "saving_kept": saved(score) / saved(truth),
        }
        for count in FISHER_WINDOWS
        if count <= found.shape[1]
        for name, size in ESTIMATORS.items()
        for score in [per_block(found[:, :count], min(size, found.shape[2]))[0]]
    ]


# --- scoring ---------------------------------------------------------------------------------------------


@dataclass
class Judge:
    """The real model on the scoring windows; every hybrid is scored once and kept on disk."""

    switch: Switch
    windows: Any
    reference: Reference
    folder: Path

    def kl(self, formats: dict[str, str], label: str) -> Floats:
        """Mean KL of each window, nats a token. Shape (windows,)."""
        path = self.folder / f"{fingerprint(formats)[:24]}.json"
        if not path.exists():
            self.switch.to({name: fmt for name, fmt in formats.items() if fmt != "16bit"})
            kl = token_scores(self.switch.model, self.windows, self.reference, label=label).kl
            assert kl is not None
            write_json(path, kl.mean(axis=1, dtype=np.float64).tolist())
            print(f"{label}: KL {kl.mean():.4f}", flush=True)
        return np.array(json.loads(path.read_text()))


def choices(
    layers: pd.DataFrame, scores: Iterable[str], total: int, seeds: int
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(score, direction, formats): every score in its directions and the random control, at one size."""
    size: dict[str, Any] = {"rule": "budget_gb", "value": total / 1e9}
    for score in scores:
        for direction in ("high",) if score in ONE_END else ("high", "low"):
            plan = make_plan(layers, score=score, direction=direction, **size)
            yield score, direction, dict(plan.formats)
    sequence = layers.assign(fisher_nf4=layers["fisher_seq_nf4"])  # added by `budget_rows`
    yield "fisher_seq", "high", dict(make_plan(sequence, score="fisher", **size).formats)
    for seed in range(seeds):
        plan = make_plan(layers, score="random", seed=seed, **size)
        yield "random", f"seed {seed}", dict(plan.formats)


def share_interval(nf4: Floats, kl: Floats, oracle: Floats) -> tuple[float, float, float]:
    """Share of the oracle's gain and its 95 % percentile interval over windows, all on the same draws."""
    counts = draw_counts(len(nf4))
    drawn = [counts @ column for column in (nf4, kl, oracle)]
    low, high = np.quantile((drawn[0] - drawn[1]) / (drawn[0] - drawn[2]), (0.025, 0.975))
    return float((nf4 - kl).mean() / (nf4 - oracle).mean()), float(low), float(high)


def budget_rows(
    layers: pd.DataFrame,
    judge: Judge,
    share: float,
    scores: list[str],
    seeds: int,
    found: NDArray[np.float32],
) -> list[dict[str, Any]]:
    """All rows of one budget."""
    names = list(layers["name"][layers["quantizable"]])
    low, high = (price(layers, dict.fromkeys(names, fmt))["total"] for fmt in ("nf4", "16bit"))
    total = round(low + share * (high - low))
    whole = pd.Series(per_block(found, found.shape[2])[0], layers["name"][layers["quantizable"]])
    with_sequence = layers.assign(fisher_seq_nf4=layers["name"].map(whole))
    chosen = list(choices(with_sequence, scores, total, seeds))
    chosen.append(("fisher_pairs", "high", with_pairs(layers, found, total - low)))
    nf4 = judge.kl(dict.fromkeys(names, "nf4"), "all NF4")
    best = next(formats for score, _, formats in chosen if score == "measured")
    oracle = judge.kl(best, f"oracle at {share:.0%}")
    rows = []
    for score, direction, formats in chosen:
        kl = judge.kl(formats, f"{score} {direction} at {share:.0%}")
        mean = estimate(kl)
        part, *interval = share_interval(nf4, kl, oracle)
        rows.append(
            {
                "score": score,
                "direction": direction,
                "budget": share,
                "kl": mean.mean,
                "kl_ci": [mean.low, mean.high],
                "oracle_share": part,
                "oracle_share_ci": interval,
                "layers": sum(fmt == "16bit" for fmt in formats.values()),
                "bytes": price(layers, formats)["total"],
                "predicted_kl": predicted_kl(layers, formats),
            }
        )
    return rows


# --- the whole -------------------------------------------------------------------------------------------


def benchmark(model: str, text: str, sizes: Sizes, quick: bool, folder: Path) -> dict[str, Any]:
    """Everything for one model, as JSON-able numbers."""
    source = resolve(model)
    folder = folder / f"{source.slug}-{source.sha256[:8]}-{'quick' if quick else 'full'}"
    texts = halves(text, folder)
    layers, notes = layer_table(source, folder, texts["oracle"], sizes)
    tokenizer, net = load_tokenizer(source), load_model(source, device="cpu", dtype=torch.float32)
    start = start_token(tokenizer, net.config)
    windows = make_windows(load_text(texts["score"]), tokenizer, sizes.score, sizes.length, start)
    names = list(layers["name"][layers["quantizable"]])
    with open_weights(source) as weights:
        switch = Switch(net, weights, names)
        found = sampled_slopes(switch, start, sizes, folder / "slopes.npy")
        switch.restore()
        judge = Judge(switch, windows, reference_states(net, windows), folder / "scored")
        held = [name for name in available_scores(layers) if name != "random"]
        scores = [name for name in held if name in QUICK] if quick else held
        rows = [
            row for share in SHARES for row in budget_rows(layers, judge, share, scores, sizes.seeds, found)
        ]
        nf4 = judge.kl(dict.fromkeys(names, "nf4"), "all NF4")
    return {
        "model": source.identity(),
        "sizes": asdict(sizes),
        "text": load_text(text).name,
        "kl_nf4": estimate(nf4).as_dict(),
        "rows": rows,
        "how_few": how_few(layers, found),
        "evaluations": {"oracle": len(names), "refined": notes.get("refined_nf4", {}).get("evaluations")},
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    rows = pd.DataFrame(result["rows"])
    rows["group"] = rows["score"] + " " + rows["direction"].where(rows["score"] != "random", "")
    columns = {"kl": "KL", "oracle_share": "share of the oracle's gain"}
    order = rows[rows["budget"] == SHARES[1]].groupby("group")["kl"].mean().sort_values().index
    for column, title in columns.items():
        table = rows.pivot_table(index="group", columns="budget", values=column).loc[order]
        print(f"\n{title}, by share of the 16-bit extra bytes\n{table.round(4).to_string()}")
    print(f"\nall NF4: KL {result['kl_nf4']['mean']:.4f}; evaluations: {result['evaluations']}")
    print(f"\nHow few windows?\n{pd.DataFrame(result['how_few']).round(3).to_string(index=False)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="what models.resolve takes")
    parser.add_argument("--text", default="pydoc", help="what texts.load_text takes")
    parser.add_argument("--quick", action="store_true", help="few scores, few windows")
    parser.add_argument("--json", metavar="PATH", help="write the numbers there")
    parser.add_argument("--folder", default="bench-out/selection", type=Path, help="for finished pieces")
    given = parser.parse_args()
    sizes = QUICK_SIZES if given.quick else FULL_SIZES
    result = benchmark(given.model, given.text, sizes, given.quick, given.folder)
    show(result)
    if given.json:
        write_json(given.json, result)


if __name__ == "__main__":
    main()

"""What a run will take on a machine, by arithmetic, before it starts: minutes, GPU memory, memory and disk.

Operations and bytes are counted from the model's shapes; a machine is its data sheet times the share of it
that this kind of work reaches (`Machine`'s fields, assumptions unless said otherwise). Good to a factor of
two: enough to see that a run doesn't fit, or that a stage hangs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spi_utils.errors import PlatformError
from spi_utils.formats import layer_bytes
from spi_utils.platforms import find_gpus, memory_bytes
from spi_utils.presets import OWN_WINDOWS
from spi_utils.tokens import platform_name

if TYPE_CHECKING:
    import pandas as pd

    from spi_utils.models import ModelSource

# Of spi_utils.sensitivity: tokens a window; windows for rounding to one for slopes; windows written together.
OWN_LENGTH, HELD_OUT, TOGETHER = 256, 4, 40
BACKWARD = 4  # a forward pass, each block's again, and a backward pass, in forward passes
CHANGES = 5 / 3  # ΔW·x for a format, in and out of its codes, in forward passes of the matrices
MEASURED = 2 * 8 * 256  # tokens for a format's sum: all layers, and the cheaper half, on 8 windows
BATCH_WINDOWS = 4  # in one pass through a block
LAUNCH = 40e-6  # seconds a column of a symmetric eigenvalue solve spends in launches
FARMS = 0.2  # seconds a matrix: its 128 × 128 blocks on one host core (0.09 measured here)
INTERPRETER = 3_000_000_000  # bytes of memory: Python, torch, CUDA's context
SPEED_TOKENS = 2 * 6 * 64  # timed generations of two models
NOTEBOOK_SECONDS = 12  # kernel start and imports of a stage
# What a graph keeps, in 16-bit units of its layers' inputs and outputs: 4.6 to 5.3 for Qwen3.5-4B with
# float32 activations and its recurrence in torch (transformers 5.23, 5.15).
KEPT = 5.3
LOGITS = 200_000_000  # bytes of two pieces of them
ACTIVATIONS = 1_000_000_000  # bytes that one block needs for a batch of scoring, in float32
GIB = 2**30
TABLE_HEAD = """\
| stage | minutes, budget | actual | GPU, GB | actual | memory, GB | actual | leaves, GB |
| --- | --- | --- | --- | --- | --- | --- | --- |"""
PARTS = {"analyze": ("spectra", "analyze")}  # stages of run.json that make up one of the budget's


@dataclass(frozen=True)
class Machine:
    """What a machine holds, in bytes, and does in a second, in bytes and operations.

    T4: 65 and 8.1 TFLOP/s, 320 GB/s on its data sheet; 0.3, 0.5 and 0.7 of them assumed. Disk, bus and
    download are assumed too; SHA-256 with the processor's own instructions. Kaggle has two T4, of which one
    is used.
    """

    name: str
    gpu_bytes: int
    ram_bytes: int
    disk_bytes: int
    half: float = 0.3 * 65e12  # multiply-adds count two
    single: float = 0.5 * 8.1e12
    gpu_bandwidth: float = 0.7 * 320e9
    bus: float = 6e9  # host to device
    disk: float = 250e6  # reading weights that are not in the page cache
    download: float = 60e6
    hash: float = 1e9  # SHA-256


MACHINES = {
    "kaggle": Machine("Kaggle, T4", int(14.7 * GIB), 31 * GIB, 20_000_000_000),
    "colab": Machine("Colab, T4", int(14.7 * GIB), 12_700_000_000, 75_000_000_000),
}


@dataclass(frozen=True)
class Model:
    """Shapes that the costs are counted from.

    `shapes` (rows, cols) of the matrices that can be quantized; `other` all other parameters; `vocabulary`
    and `hidden` of the head; `blocks` that the matrices are shared among.
    """

    shapes: tuple[tuple[int, int], ...]
    other: int
    vocabulary: int
    hidden: int
    blocks: int = 1

    planned = property(lambda self: sum(rows * cols for rows, cols in self.shapes))
    bytes_16bit = property(lambda self: 2 * (self.planned + self.other))
    forward = property(
        lambda self: 2.0 * (self.planned + self.vocabulary * self.hidden)
    )  # operations a token

    @classmethod
    def of_layers(cls, layers: pd.DataFrame) -> Model:
        """From the layer table, or from `models.list_layers` as a frame.

        Raises:
            PlatformError: it names no head and no embedding.
        """
        quantizable = layers["quantizable"].astype(bool)
        planned, wide = layers[quantizable], layers[layers["role"].isin(["head", "embedding"])]
        if wide.empty:
            raise PlatformError("the layer table names no head and no embedding: run 01_analyze again.")
        shapes = tuple(zip(planned["rows"].tolist(), planned["cols"].tolist(), strict=True))
        rows, cols = (int(wide.iloc[-1][side]) for side in ("rows", "cols"))
        blocks = max(planned["depth"].nunique(), 1) if "depth" in layers else 1
        return cls(shapes, int(layers[~quantizable]["numel"].sum()), rows, cols, blocks)

    def packed(self, fmt: str) -> int:
        """Bytes of the planned matrices in a format."""
        return sum(layer_bytes(fmt, rows, cols) for rows, cols in self.shapes)


@dataclass(frozen=True)
class Cost:
    """One stage: minutes, and peaks in bytes; `disk` is what it leaves behind."""

    stage: str
    minutes: float
    gpu: float
    ram: float
    disk: float


def budget(
    model: Model,
    machine: Machine,
    *,
    tokens: int,
    variants: int,
    kept: float = 0.55,
    own: int = 32,
    formats: Sequence[str] = ("nf4", "int8"),
) -> list[Cost]:
    """The cost of every stage.

    Args:
        model: the shapes.
        machine: where it runs.
        tokens: scored in all texts together: windows × length × texts.
        variants: that are scored, the reference included.
        kept: share of the planned weights that stay in 16-bit.
        own: windows of own text that guide the rounding.
        formats: whose costs are computed; those of 4 bits are rounded under guidance.
    """
    guiding, sloping = own * OWN_LENGTH, own // HELD_OUT * OWN_LENGTH  # tokens
    size, planned, shapes = model.bytes_16bit, model.planned, model.shapes
    matrix = max(rows * cols for rows, cols in shapes)
    nf4, int8 = (model.packed(fmt) for fmt in ("nf4", "int8"))
    rounded = [fmt for fmt in formats if fmt.startswith(("nf4", "int4"))]
    checkpoint = size - (1 - kept) * (2 * planned - nf4)
    head = 2.0 * model.vocabulary * model.hidden  # its operations a token, and its bytes in 16-bit
    streamed = INTERPRETER + max(4 * matrix, head)
    codes = INTERPRETER + sum(
        map(model.packed, formats)
    )  # sensitivities and evaluation keep those of every matrix

    # 01: every matrix' eigenvalues, then one pass over the model's own text, rounding on the way
    solve = guided = 0.0
    for rows, cols in shapes:
        short, long = sorted((rows, cols))
        # the Gram matrix (2M²N operations) and its reduction (4M³/3, half of it bound by memory: the trailing
        # matrix once a column, in float32, half of it each)
        work, moved = 2.0 * short**2 * long + 2.0 / 3 * short**3, 4.0 / 3 * short**3
        solve += FARMS + work / machine.single + moved / machine.gpu_bandwidth + LAUNCH * short
        # its second moment, the inverse's factor, and the columns one by one in a format
        work = 2.0 * guiding * cols**2 + 5.0 / 3 * cols**3 + len(rounded) * 2.0 * rows * cols**2
        guided += work / machine.single + len(rounded) * 12 * LAUNCH / 4 * cols
    batches = math.ceil((guiding + sloping) / OWN_LENGTH / TOGETHER)
    write = batches * OWN_LENGTH * size / machine.gpu_bandwidth  # token after token
    passes = (guiding + sloping) * BACKWARD * model.forward
    passes += len(formats) * (sloping * CHANGES * 2.0 * planned + MEASURED * (model.forward + 2 * head))
    read = 2 * size / machine.disk  # once for the spectra, once for the model
    analyze = solve + write + passes / machine.half + guided + read
    # its peak: one block's graph for a batch of windows, its second moments, the factors of the largest of
    # them, and the logits at the top; every block's inputs wait on the host
    graph = BATCH_WINDOWS * 256 * KEPT * 2 * sum(rows + cols for rows, cols in shapes) / model.blocks
    moments = 4 * sum(cols**2 for _, cols in shapes) / model.blocks
    factors = 4 * 4 * max(cols for _, cols in shapes) ** 2
    gradients = size + max(graph + moments, moments + factors) + 12 * matrix + LOGITS
    inputs = (guiding + sloping) * 2 * model.hidden * model.blocks

    # 03: read, write and read back for the proof; the codes themselves are bound by the disk
    quantize = (size + 3 * checkpoint) / machine.disk

    # 04: forward passes, the head twice (reference and variant), and switching the layers
    soft = 8 * 4 * model.vocabulary / machine.gpu_bandwidth  # passes over a token's logits
    score = tokens * ((model.forward + head) / machine.half + soft)
    switch = planned / machine.disk + int8 / machine.bus  # half of them back to 16-bit
    speed = SPEED_TOKENS * size / machine.gpu_bandwidth
    evaluate = variants * (score + switch) + speed + 2 * size / machine.disk

    stages = {  # seconds, GPU memory, memory, disk
        "fetch": (size / machine.download, 0.0, INTERPRETER, size),
        "analyze": (
            analyze,
            gradients,
            max(streamed + inputs, codes),
            0.05e9 + sum(map(model.packed, rounded)),
        ),
        "visualize": (20.0, 0.0, INTERPRETER, 0.02e9),
        "quantize": (quantize, checkpoint + 4 * matrix, streamed, checkpoint),
        "evaluate": (evaluate, size + 12 * matrix + ACTIVATIONS, codes, 0.1e9),
        "publish": (2 * checkpoint / machine.hash, 0.0, INTERPRETER, 0.0),
    }
    return [Cost(name, (s + NOTEBOOK_SECONDS) / 60, *rest) for name, (s, *rest) in stages.items()]


def check_budget(costs: Sequence[Cost], machine: Machine) -> list[str]:
    """What of `budget(...)` does not fit the same machine, in sentences; the Hub's cache lies elsewhere."""
    problems, has = [], f"{machine.name} has"
    for cost in costs:
        limits = ((cost.gpu, machine.gpu_bytes, "GPU memory"), (cost.ram, machine.ram_bytes, "memory"))
        for need, limit, what in limits:
            if need > limit:
                said = f"{cost.stage} needs about {need / 1e9:.1f} GB of {what}, {has} {limit / 1e9:.1f}"
                problems.append(said)
    disk = sum(cost.disk for cost in costs if cost.stage != "fetch")
    if disk > machine.disk_bytes:
        problems.append(f"the run leaves {disk / 1e9:.1f} GB, {has} {machine.disk_bytes / 1e9:.0f}")
    return problems


def beside_actual(costs: Sequence[Cost], stages: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of the budget, with what run.json's stages really took beside it where they ran."""
    lines = [TABLE_HEAD]
    for cost in costs:
        held = [stages[name] for name in PARTS.get(cost.stage, (cost.stage,)) if name in stages]
        cells = [f"{cost.minutes:.1f}", f"{sum(x['seconds'] for x in held) / 60:.1f}" if held else "–"]
        for need, peak in ((cost.gpu, "peak_gpu_gb"), (cost.ram, "peak_rss_gb")):
            found = [one[peak] for one in held if peak in one]
            cells += [f"{need / 1e9:.1f}", f"{max(found):.1f}" if found else "–"]
        lines.append(f"| {cost.stage} | {' | '.join(cells)} | {cost.disk / 1e9:.2f} |")
    total, taken = sum(cost.minutes for cost in costs), sum(one["seconds"] for one in stages.values()) / 60
    actual = f"**{taken:.1f}**" if stages else "–"
    return "\n".join([*lines, f"| **all** | **{total:.1f}** | {actual} | | | | | |"])


def announce(
    source: ModelSource,
    profile: str,
    *,
    formats: Sequence[str],
    random_seeds: int = 5,
    over_budget: str = "warn",
) -> list[Cost]:
    """Print the budget of all stages on Kaggle or Colab before they start; nothing, and no costs, elsewhere.

    Memory is this session's own, a larger GPU's too; times are a T4's.

    Args:
        source: the model.
        profile: of the evaluation.
        formats: whose costs are computed.
        random_seeds: its random selections.
        over_budget: where the run does not fit by this arithmetic, "warn" says so and goes on (it is good to
            a factor of two), "stop" raises.

    Raises:
        PlatformError: the run does not fit, and `over_budget` is "stop"; says which stage lacks what.
    """
    import pandas as pd

    from spi_utils.models import list_layers

    machine, gpus = MACHINES.get(platform_name()), find_gpus()
    if machine is None or not gpus or not gpus[0].usable:
        return []
    name = f"{machine.name.split(',')[0]}, {gpus[0].name}"
    machine = replace(machine, name=name, gpu_bytes=gpus[0].memory_bytes, ram_bytes=memory_bytes())
    model = Model.of_layers(pd.DataFrame([vars(layer) for layer in list_layers(source)]))
    tokens, variants = work_of(profile, random_seeds)
    more: dict[str, Any] = {"own": OWN_WINDOWS[profile], "formats": formats}
    costs = budget(model, machine, tokens=tokens, variants=variants, **more)
    problems = check_budget(costs, machine)
    said = (
        f"{source.id} does not fit: {'; '.join(problems)}. This arithmetic is good to a factor of two: "
        "over_budget='warn' goes on all the same, 'stop' ends the run here. Or use a smaller model."
    )
    if problems and over_budget == "stop":
        raise PlatformError(said)
    print(f"Budget on {machine.name}, by arithmetic:\n{beside_actual(costs, {})}")
    if problems:
        print(f"Warning: {said}")
    return costs


def work_of(profile: str, random_seeds: int = 5) -> tuple[int, int]:
    """Tokens and variants scored (reference, nf4 and plan twice among them) of an evaluation's profile."""
    from spi_utils.evaluate import PROFILES

    chosen = PROFILES[profile]
    named = [control for control in chosen.controls if control != "random"]
    randoms = random_seeds if "random" in chosen.controls else 0
    return chosen.windows * chosen.length * chosen.texts, 5 + len(named) + randoms

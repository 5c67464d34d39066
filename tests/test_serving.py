"""Served for real: what the figures of benchmarks/serving.py mean, without the engines."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import serving
from spi_utils.plan import ProtectionPlan
from spi_utils.recipes import SERVERS, served

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")


def plan_of(formats):
    return ProtectionPlan({}, "fisher", "high", "top_k", 1, formats, (), False, {}, 5.0, 5.0, None, "")


def read(logprobs, top):
    return {"logprobs": logprobs, "top": top}


def test_an_engine_is_as_good_as_the_dtype_if_it_is_no_farther_from_exact_than_transformers():
    own = {"exact": read([-1.0, -2.0], [5, 6]), "float16": read([-1.1, -2.0], [5, 6]), "answer": [1, 2, 3]}
    engine = read([-1.0, -2.12], [5, 7]) | {"answer_ids": [1, 2, 9], "answer": "x"}
    row = serving.beside(engine, own, "float16")
    assert row["off"] == pytest.approx({"mean": 0.06, "max": 0.12})
    assert row["stock_off"] == pytest.approx({"mean": 0.05, "max": 0.1})
    assert row["apart"] == pytest.approx({"mean": 0.11, "max": 0.12})
    assert row["as_good"] and row["same_top"] == 1 and row["same_answer"] == [2, 3]
    assert not serving.beside(engine | read([-1.0, -2.13], [5, 7]), own, "float16")["as_good"]


def test_a_question_has_its_own_continuation_once_and_the_tasks_are_files_of_the_harness(tmp_path):
    text = " ".join(f"w{number}" for number in range(48 * 6 + 7))
    rows = serving.questions(text, 6)
    assert len(rows) == 6 and len({row["label"] for row in rows}) > 1
    for place, row in enumerate(rows):
        first = 48 * place
        assert row["passage"].split()[0] == f"w{first}" and len(set(row["choices"])) == 4
        assert row["choices"][row["label"]] == " ".join(f"w{first + 40 + n}" for n in range(8))
    assert serving.questions(text, 6) == rows
    names = serving.write_tasks(tmp_path, text, 6)
    for name in names:
        task = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        held = task["dataset_kwargs"]["data_files"]["test"]
        assert task["task"] == name
        assert [json.loads(line) for line in Path(held).read_text().splitlines()] == rows


def test_what_serves_a_plan_tells_what_ran_from_what_should_and_why_not():
    def lines(*formats):
        said = served(plan_of(dict(zip((Q, K, V), formats, strict=True)))).splitlines()
        assert [line.split(":")[0] for line in said] == [row.engine for row in SERVERS]
        return [line.split(": ", 1)[1] for line in said]

    stock, cpu, cuda, gguf = lines("int4_g64", "int4_g64", "int4_g64")
    assert stock.startswith("ran (2026") and cpu.startswith("ran (2026")
    assert cuda.startswith("by its source, not run") and gguf.startswith("by its source")
    stock, cpu, cuda, _ = lines("int8", "int8", "int8")
    assert cpu.startswith("no: int8 (") and stock.startswith("ran") and cuda.startswith("by its source")
    assert lines("int4_g64", "16bit", "16bit")[1].startswith(f"no: it merges {Q}, {K}, {V}, which differ")
    assert lines("nf4", "nf4", "16bit")[2].startswith("no: it merges")
    assert lines("nf4", "nf4", "nf4")[3].startswith("ran")
    assert lines("int4_g64_asym", "16bit", "16bit")[0].startswith("no: int4_g64_asym")
    assert [line[:3] for line in lines("16bit", "16bit", "16bit")] == ["ran", "ran", "by ", "ran"]

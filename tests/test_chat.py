"""The model's own chat as a text: what stands in a window, what counts, and that it is sampled once."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from spi_utils import chat, evaluate, report, runs, texts
from spi_utils.errors import EvaluationError
from spi_utils.models import load_model, resolve
from spi_utils.sensitivity import sample_windows
from tests.evaluated_run import ready_run
from tests.finished_run import make_finished_run
from tests.test_card import written
from tests.tiny import make_tiny, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
PROMPTS = [{"user": "Hi?"}, {"system": "JSON", "user": "12"}, {"user": "Why so?"}, {"user": "x" * 90}]
ASKED = {"texts": "pydoc,chat", "windows": 12, "length": 48, "random_seeds": 0, "speed_repeats": 0}


@pytest.fixture(scope="module", autouse=True)
def short_prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.json"
    file.write_text(json.dumps(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "CHAT_PROMPTS", file)
        patch.setattr(chat, "CHAT_PROMPTS", file)
        yield


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """A tiny llama whose tokenizer has a chat template."""
    folder = make_tiny("llama", tmp_path_factory.mktemp("talk") / "talkative", initializer_range=0.15)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


@pytest.fixture(scope="module")
def evaluated(talkative, tmp_path_factory):
    run, source = ready_run(talkative[0], tmp_path_factory.mktemp("chat") / "run")
    return run, source, evaluate.evaluate(run, source, controls=[], **ASKED)


def test_a_window_is_prompts_and_answers_and_the_end_of_a_turn_asks_anew():
    script = chat.Script([[1, 2], [3], [4, 5]], ends=[9], windows=2, length=8)
    drawn = [0, 0, 7, 9, 6, 8, 8, 8]
    rows = [[script(window, column, token) for column, token in enumerate(drawn)] for window in (0, 1)]
    # window 0 asks prompt 0, then 13 % 3 = 1; window 1 asks 1, then 14 % 3 = 2
    assert rows == [[1, 2, 7, 9, 3, 8, 8, 8], [3, 0, 7, 9, 4, 5, 8, 8]]
    assert script.answers.astype(int).tolist() == [[0, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0, 1, 1]]


def test_windows_begin_as_the_template_writes_and_go_on_as_the_model_would(talkative):
    """Each answer's token is where its draw falls in the model's own cumulated distribution."""
    folder, tokenizer = talkative
    model = load_model(resolve(str(folder)), device="cpu", dtype=torch.float32)
    ids, own = chat.converse(model, tokenizer, 7, 40, seed=3)
    begins = ["u:Hi?;a:", "s:JSON;u:12;a:", "u:Why so?;a:"]  # the fourth would fill more than half
    for window in range(7):
        begin = tokenizer(begins[window % 3], add_special_tokens=False)["input_ids"]
        assert ids[window, : len(begin)].tolist() == begin
        assert not own[window, : len(begin)].any() and own[window, len(begin)]
    with torch.no_grad():
        total = model(ids).logits.double().softmax(-1).cumsum(-1)
    uniform = sensitivity_draws(3, 7, 40)
    for row, column in zip(*np.nonzero(own), strict=True):
        high, token = total[row, column - 1], ids[row, column]
        low = high[token - 1] if token else 0.0
        assert low - 1e-4 <= uniform[row, column] <= high[token] + 1e-4
    again, _ = chat.converse(model, tokenizer, 2, 40, seed=3)
    assert torch.equal(again, ids[:2])  # a window hangs on its seed and index alone
    assert not torch.equal(chat.converse(model, tokenizer, 2, 40, seed=4)[0], again)
    # the same places drawn for sensitivity hold other tokens
    theirs = sample_windows(model, 7, 40, 257, 3)
    assert (theirs.numpy() == ids.numpy())[own].mean() < 0.2


def sensitivity_draws(seed, windows, length):
    import hashlib

    rows = []
    for index in range(windows):
        number = int.from_bytes(hashlib.sha256(f"{seed}/chat/{index}".encode()).digest()[:7], "big")
        rows.append(torch.rand(length, generator=torch.Generator().manual_seed(number)))
    return torch.stack(rows)


def test_only_answers_count_by_whole_logits_of_the_two_files(evaluated):
    run, source, found = evaluated
    told = found.other_texts[0]
    assert (told["text"]["name"], told["text"]["in_distribution"]) == ("chat", False)
    model = load_model(source, device="cpu", dtype=torch.float32)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids, own = chat.converse(model, tokenizer, 12, 48, seed=0)
    saved = AutoModelForCausalLM.from_pretrained(run.model_dir).dequantize().float()
    with torch.no_grad():
        p, q = (one(ids).logits[:, :-1].double().log_softmax(-1) for one in (model, saved))
    kl, counted = (p.exp() * (p - q)).sum(-1).numpy(), own[:, 1:]
    means = [row[mine].mean() for row, mine in zip(kl, counted, strict=True)]
    plan, reference = told["variants"]["plan"], told["variants"]["reference"]
    assert plan["window_kl"] == pytest.approx(means, rel=2e-3)
    assert [plan["kl_mean"], plan["kl"]["mean"]] == pytest.approx([np.mean(means)] * 2, rel=2e-3)
    assert plan["kl_p99"] == pytest.approx(np.quantile(kl[counted], 0.99), rel=5e-3)
    nll = -p.gather(-1, ids[:, 1:, None])[..., 0].numpy()
    assert reference["nll"] == pytest.approx(
        np.mean([r[m].mean() for r, m in zip(nll, counted, strict=True)])
    )
    assert told["text"]["tokens"] == counted.sum() < 12 * 47
    assert reference["byte_perplexity"] == pytest.approx(np.exp(nll[counted].sum() / told["text"]["bytes"]))
    row = {one["key"]: one for one in found.claims}["texts"]
    assert row["verdict"] == "not tested" and "chat" not in row["measured"]


def test_the_reports_table_by_text(evaluated):
    run, _, found = evaluated
    for page in (report.write_report(run).read_text(encoding="utf-8"), report.table_html(found).data):
        table = page[page.index("KL by text</th>") :].split("</table>")[0]
        assert "<th>chat</th>" in table and table.count("</tr>") == 1 + len(found.variants)
        for one in found.by_text:
            assert f"{one['variants']['nf4']['kl']['mean']:.4f}" in table


def test_the_card_has_a_line_by_text(tmp_path):
    run = make_finished_run(tmp_path)
    first = evaluate.Evaluation.read(run.evaluation_json)
    first.variants["plan"]["kl"] = {"mean": 0.0321, "low": 0.03, "high": None}
    other = {"plan": first.variants["plan"] | {"kl": {"mean": 0.0456, "low": 0.04, "high": 0.05}}}
    text = first.text | {"name": "chat", "in_distribution": True}
    others = [{"text": text, "variants": first.variants | other}]
    replace(first, other_texts=others).write(run.evaluation_json)
    said = written(run)[1]
    assert "0.0321; chat" in said and "0.0456 (0.0400 … 0.0500)." in said
    assert "chat (its base's own answers, in distribution" in said and "Measured on 2 texts" in said


@pytest.mark.parametrize(
    ("sensitivity", "expected"), [("self", True), ("random", False), ("measured", False)]
)
def test_a_plan_guided_by_own_text_marks_the_chat(evaluated, tmp_path, sensitivity, expected):
    run, source, _ = evaluated
    other = runs.open_run(tmp_path / "run", source.identity())
    entry = {"inputs": {"sensitivity": sensitivity}, "outputs": {}}
    runs.update_info(other, lambda info: info["stages"].update(analyze=entry))
    plan = evaluate.ProtectionPlan.read(run.plan_json)
    model = load_model(source, device="cpu", dtype=torch.float32)
    sample = evaluate.Sample({"name": "chat", "windows": 2, "window_length": 48}, torch.empty(0, 48))
    made = evaluate.answered(other, source, plan, 0, model, sample, tmp_path / "chat.npz")
    assert made.text["in_distribution"] is expected


def test_a_killed_evaluation_does_not_sample_again(talkative, evaluated, tmp_path, monkeypatch):
    run, source = ready_run(talkative[0], tmp_path / "run")
    score, asked = evaluate.token_scores, []

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    def once(*args, **kwargs):
        asked.append(args)
        return sample_windows(*args, **kwargs)

    monkeypatch.setattr(chat, "sample_windows", once)
    monkeypatch.setattr(evaluate, "token_scores", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run, source, controls=[], **ASKED)
    monkeypatch.setattr(evaluate, "token_scores", score)
    resumed = evaluate.evaluate(run, source, controls=[], **ASKED)
    assert len(asked) == 1
    assert resumed.other_texts == evaluated[2].other_texts  # the same model, at once


@pytest.mark.parametrize(
    ("change", "length", "said"),
    [("short", 12, "too short for the text 'chat'"), ("collapsed", 40, "collapses"), ("system", 40, "")],
)
def test_what_can_not_chat_is_said(talkative, change, length, said):
    folder, tokenizer = talkative
    model = load_model(resolve(str(folder)), device="cpu", dtype=torch.float32)
    if change == "collapsed":  # every hidden state prefers token 65, whatever it is
        model.lm_head = torch.nn.Linear(128, model.config.vocab_size)
        model.lm_head.requires_grad_(False).weight.zero_()
        model.lm_head.bias.zero_()[65] = 50.0
    if change == "system":
        tokenizer = make_tokenizer()
        tokenizer.chat_template = NO_SYSTEM
        ids, _ = chat.converse(model, tokenizer, 2, length, seed=0)
        assert tokenizer.decode(ids[1]).startswith("u:JSON\n\n12;a:")
        return
    with pytest.raises(EvaluationError, match=said):
        chat.converse(model, tokenizer, 2, length, seed=0)


def test_the_second_text_of_auto_is_the_chat_where_there_is_a_template(monkeypatch, capsys):
    monkeypatch.setattr(texts, "_hub_silence", lambda: "no network")
    names = [one.name for one in texts.load_texts("auto", at_least=2, template=True)]
    assert names == ["pydoc", "chat"] and not capsys.readouterr().out
    assert [one.name for one in texts.load_texts("auto", at_least=2)] == ["pydoc", "pycode"]
    assert "no chat template" in capsys.readouterr().out
    assert [one.name for one in texts.load_texts("auto", template=True)] == ["pydoc"]
    with pytest.raises(EvaluationError, match="no chat template"):
        texts.load_texts("pydoc,chat")


def test_the_packages_prompts_are_short_and_of_every_kind():
    file = texts.__file__.replace("texts.py", "chat_prompts.json")
    with open(file, encoding="utf-8") as held:
        prompts = json.load(held)
    assert len(prompts) == 32 and len({json.dumps(one) for one in prompts}) == 32
    assert all(
        {"user"} <= set(one) <= {"system", "user"} and len(" ".join(one.values())) < 240 for one in prompts
    )

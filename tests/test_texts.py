"""Texts and windows."""

from __future__ import annotations

import hashlib
import io
import zipfile
from types import SimpleNamespace

import pytest

from spi_utils import texts
from spi_utils.errors import EvaluationError
from tests.tiny import make_tokenizer

CONFIG = SimpleNamespace(vocab_size=320, max_position_embeddings=64, bos_token_id=257, eos_token_id=258)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_windows_are_disjoint_evenly_spread_and_begin_with_the_start_token(tokenizer):
    text = "".join(chr(33 + i % 90) for i in range(100))
    windows = texts.make_windows(text, tokenizer, 4, 11, 257)
    assert windows.shape == (4, 11) and (windows[:, 0] == 257).all()
    pieces = [tokenizer.decode(row[1:]) for row in windows]
    # 100 one-byte tokens, bodies of 10: stride (100 - 10) / 3 = 30, so the last one ends the text
    assert pieces == [text[i : i + 10] for i in (0, 30, 60, 90)]
    assert texts.window_texts(text, tokenizer, 4, 11, 257) == pieces


def test_windows_that_fill_the_text_do_not_overlap(tokenizer):
    text = "".join(chr(33 + i) for i in range(53))  # every character once
    for count, length in ((5, 10), (10, 5), (17, 3), (1, 53)):
        spans = texts.window_texts(text, tokenizer, count, length, None)
        assert [len(span) for span in spans] == [length] * count
        assert len(set("".join(spans))) == count * length
        assert texts.make_windows(text, tokenizer, count, length, None).shape == (count, length)


def test_window_texts_count_bytes_of_characters_outside_ascii(tokenizer):
    # 1 + 2 + 3 bytes are the six text tokens of the first window
    assert texts.window_texts("aé漢" * 20, tokenizer, 2, 7, 257)[0] == "aé漢"


@pytest.mark.parametrize(
    ("windows", "length", "config", "message"),
    [
        (3, 11, CONFIG, "at most 2 windows"),
        (1, 65, CONFIG, "model's limit"),
        (0, 8, CONFIG, "can't be scored"),
        (1, 2, CONFIG, "can't be scored"),
        (1, 8, SimpleNamespace(vocab_size=60), "doesn't match the model"),
    ],
)
def test_impossible_windows_say_what_is_possible(tokenizer, windows, length, config, message):
    with pytest.raises(EvaluationError, match=message):
        texts.make_windows("x" * 25, tokenizer, windows, length, 257, config=config)


@pytest.mark.parametrize(
    ("token", "config", "expected"),
    [
        ((1, 2, {}), (None, None), 1),
        ((None, 2, {}), (7, 9), 7),
        ((None, 2, {"<|endoftext|>": 5}), (None, [9, 2]), 5),
        ((None, 2, {}), (None, [9, 2]), 9),
        ((None, 2, {}), (None, None), 2),
        ((None, None, {}), (None, None), None),
        ((None, 3, {}), (50_256, 50_256), 3),  # a default id of another model, outside this vocabulary
    ],
)
def test_start_token_prefers_bos_then_the_document_separator(token, config, expected):
    bos, eos, vocabulary = token
    fake = SimpleNamespace(bos_token_id=bos, eos_token_id=eos, get_vocab=lambda: vocabulary)
    held = SimpleNamespace(bos_token_id=config[0], eos_token_id=config[1], vocab_size=10)
    assert texts.start_token(fake, held) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"gr\xfcn", r"byte 2 \(0xfc"), (b" \n", "empty"), (None, "wikitext2, pydoc")],
)
def test_files_are_read_as_utf8_and_refused_otherwise(tmp_path, content, message):
    file = tmp_path / "file.txt"
    file.write_bytes("grün\r\n".encode())
    text = texts.load_text(file)
    assert (text.name, text.text) == ("file", "grün\r\n")
    assert text.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        texts.load_text(file)


def test_wikitext_is_the_rows_of_the_dataset_joined_by_blank_lines(monkeypatch, tmp_path):
    raw = " \n = Title = \n \n A line with\u2028an odd break . \n"
    with zipfile.ZipFile(tmp_path / "wikitext.zip", "w") as file:
        file.writestr(texts.WIKITEXT_MEMBER, raw)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: str(tmp_path / "wikitext.zip"))
    monkeypatch.setattr(texts, "_hub_silence", lambda: None)
    # as the dataset's own script reads them: a row a line, "" where a line is blank
    rows = [row if row.strip() else "" for row in io.StringIO(raw)]
    text = texts.load_text("auto")
    assert (text.name, text.text) == ("wikitext2", "\n\n".join(rows))
    assert rows == ["", " = Title = \n", "", " A line with\u2028an odd break . \n"]


def test_auto_falls_back_to_a_text_that_every_machine_has_and_says_why(monkeypatch):
    monkeypatch.setattr(texts, "_hub_silence", lambda: "the Hub can't be reached (ConnectError)")
    text = texts.load_text("auto")
    assert text.name == "pydoc" and "ConnectError" in text.source
    assert text.sha256 == texts.load_text("pydoc").sha256
    assert [t.name for t in texts.load_texts("pydoc, auto")] == ["pydoc"]  # the same text once


def test_wikitext_by_name_does_not_fall_back(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(EvaluationError, match=r"no route to host.*texts='pydoc'"):
        texts.load_text("wikitext2")
    with pytest.raises(EvaluationError, match="No text"):
        texts.load_texts(" , ")

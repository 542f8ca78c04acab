"""Rows to tokens to batches, on texts small enough to check by eye."""

from __future__ import annotations

import json
import os

import pytest
import torch

from accum_trainer.data import embedded, literal
from accum_trainer.data.counting import count_rows
from accum_trainer.data.files import digest, read_file
from accum_trainer.data.rows import spans_of
from accum_trainer.data.tokenizing import take_columns, tokenize
from accum_trainer.errors import DataError
from accum_trainer.sources.collating import PaddingCollator

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if "
    "add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return embedded.corpus_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch, request):
    monkeypatch.setenv("ACCUM_TRAINER_CACHE", str(request.config.cache.mkdir("accum_trainer")))


def tokenized(tmp_path, tokenizer, rows, max_seq_len=64):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tokenize(read_file(path), "rows.jsonl", digest(path), tokenizer, max_seq_len)


def trained_text(tokenizer, sample):
    return tokenizer.decode([label for label in sample["labels"] if label != -100])


@pytest.mark.parametrize(
    ("row", "spans"),
    [
        ({"text": "a b"}, [("a b", True)]),
        ({"prompt": "p", "completion": "c"}, [("p", False), ("c", True)]),
        ({"question": "q", "answer": "a", "text": None}, [("q\n", False), ("a", True)]),
        ({"instruction": "i", "input": "x", "output": "o"}, [("i\nx\n", False), ("o", True)]),
        ({"instruction": "i", "input": "", "output": "o"}, [("i\n", False), ("o", True)]),
        ({"instruction": "i", "input": None, "output": "o"}, [("i\n", False), ("o", True)]),
        ({"instruction": "i", "input": 0, "output": "o"}, [("i\n0\n", False), ("o", True)]),
        ({"instruction": "i", "input": False, "output": "o"}, [("i\nfalse\n", False), ("o", True)]),
        ({"question": 7, "answer": 2.5}, [("7\n", False), ("2.5", True)]),
        ({"prompt": "is it?", "completion": False}, [("is it?", False), ("false", True)]),
    ],
)
def test_formats_and_what_is_trained_on(row, spans):
    assert spans_of(row, "row 1") == spans


def test_messages_train_on_what_the_assistant_says(tmp_path, tokenizer):
    tokenizer.chat_template = CHAT
    talk = [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "bye"),
        ("assistant", "so long"),
    ]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]}]
    sample = tokenized(tmp_path, tokenizer, rows)[0]
    assert tokenizer.decode(sample["input_ids"]) == "".join(
        f"<{role}>{content}</s>" for role, content in talk
    )
    assert trained_text(tokenizer, sample) == "hello</s>so long</s>"


def test_a_template_that_rewrites_the_past_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    ]
    with pytest.raises(
        DataError, match=r"rows.jsonl row 1: the chat template rewrites earlier turns"
    ):
        tokenized(tmp_path, tokenizer, rows)


def test_completion_only_with_end_of_text(tmp_path, tokenizer):
    rows = tokenized(tmp_path, tokenizer, [{"prompt": "one two ", "completion": "three"}])
    assert trained_text(tokenizer, rows[0]) == "three" + embedded.END_OF_TEXT
    assert rows.lengths.tolist() == [len(rows[0]["input_ids"])]
    assert rows.num_targets.tolist() == [sum(label != -100 for label in rows[0]["labels"][1:])]


def test_long_text_becomes_samples_that_train_each_target_once(tmp_path, tokenizer):
    text = " ".join(f"word{n}" for n in range(100))
    rows = tokenized(tmp_path, tokenizer, [{"text": text}], max_seq_len=16)
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    targets = [label for i in range(len(rows)) for label in rows[i]["labels"][1:]]
    assert targets == ids[1:]
    assert rows.lengths.max() == 16
    assert rows.notes == ()


def test_long_completions_and_lost_targets_are_told(tmp_path, tokenizer):
    long = "word " * 40
    rows = [
        {"prompt": "p ", "completion": long},
        {"prompt": long, "completion": "c"},
        {"prompt": "p ", "completion": "c"},
    ]
    rows = tokenized(tmp_path, tokenizer, rows, max_seq_len=16)
    assert len(rows) == 3
    assert rows.num_targets[1] == 0
    assert rows.notes == (
        "2 of 3 samples were cut at max_seq_len=16 tokens",
        "1 of 3 samples have no target; they are kept and weigh nothing",
    )


def test_identity_changes_with_content_and_length(tmp_path, tokenizer):
    rows = [{"text": "alpha beta"}, {"text": "gamma"}]
    first = tokenized(tmp_path, tokenizer, rows)
    assert tokenized(tmp_path, tokenizer, rows).identity == first.identity
    assert tokenized(tmp_path, tokenizer, rows[::-1]).identity != first.identity
    assert tokenized(tmp_path, tokenizer, rows, max_seq_len=32).identity != first.identity


def test_second_tokenising_comes_from_the_cache(tmp_path, tokenizer):
    rows = [{"text": f"row {n}"} for n in range(5)]
    first = tokenized(tmp_path, tokenizer, rows)
    calls = []
    spy = type("Spy", (), {"__getattr__": lambda self, name: getattr(tokenizer, name)})()
    type(spy).__call__ = lambda self, texts, **options: (
        calls.append(texts) or tokenizer(texts, **options)
    )
    again = tokenized(tmp_path, spy, rows)
    assert [again[i] for i in range(5)] == [first[i] for i in range(5)]
    assert calls in (
        [],
        ["a"],
    )  # no row was tokenised again; "a" finds the tokenizer's first token


def test_opening_token_of_a_tokenizer_is_kept(tmp_path, tokenizer):
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    rows = tokenized(tmp_path, tokenizer, [{"prompt": "p ", "completion": "c"}])
    assert rows[0]["input_ids"][0] == tokenizer.bos_token_id
    assert rows[0]["labels"][0] == -100
    assert rows[0]["input_ids"].count(tokenizer.bos_token_id) == 1


def test_padding_by_hand():
    batch = PaddingCollator(9)(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_embedded_corpus_is_real_and_skewed():
    train, evaluation = embedded.corpus_files()
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    held_back = [json.loads(line) for line in evaluation.read_text().splitlines()]
    lengths = sorted(len(row["completion"]) for row in rows)
    assert len(rows) > 4000 and 70 <= lengths[len(lengths) // 2] <= 120
    assert lengths[int(len(lengths) * 0.99)] > 1200
    assert not {row["completion"] for row in rows} & {row["completion"] for row in held_back}


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("a.txt", "one\n\ntwo\n", 2),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n', 2),
        ("a.json", '[{"text": "a"}, {"text": "b"}, {"text": "c"}]', 3),
        ("a.csv", 'text\n"two\nlines"\nb\n', 2),
    ],
)
def test_rows_are_counted_as_they_are_read(tmp_path, name, content, count):
    path = tmp_path / name
    path.write_text(content)
    assert count_rows(path) == len(read_file(path)) == count


def test_json_with_numbers_is_read_in_parts_as_it_is_whole(tmp_path, monkeypatch):
    """Columns and nested fields that some parts lack; kinds that only all parts together show."""
    rows = [
        {"text": 1, "tags": [{"a": 1}]},
        {"text": 0.50, "tags": [{"a": 2}]},
        {"text": "x", "more": None},
        {"text": True, "more": "y", "tags": [{"b": "z"}]},
        {"tags": [{"a": 0.5}], "text": 2},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = literal.read_json(path)
    assert whole["text"][:] == ["1", "0.5", "x", "true", "2"]
    for part in (1, 2, 3):
        monkeypatch.setattr(literal, "_PART", part)
        found = literal.read_json(path)
        assert found.features == whole.features and found[:] == whole[:]


ANSWERS = [
    "007",
    "1.50",
    "1e3",
    "-0",
    "12345678901234567890123",
    "NA",
    "null",
    "True",
    "2020-01-01",
]


def test_values_of_a_csv_are_text_as_written(tmp_path):
    """pandas would read 7, 1.5, 1000.0 and None for NA; only an empty cell is absent."""
    path = tmp_path / "rows.csv"
    path.write_text(
        "question,answer,text\n" + "".join(f"q{i},{answer},\n" for i, answer in enumerate(ANSWERS))
    )
    rows = read_file(path)
    assert rows["answer"][:] == ANSWERS
    assert rows["text"][:] == [None] * len(ANSWERS)
    assert spans_of(rows[0], "row 1") == [("q0\n", False), ("007", True)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_numbers_of_json_are_text_as_written(tmp_path, suffix):
    literals = [
        "7",
        "1.50",
        "1e3",
        "-0",
        "12345678901234567890123",
        "true",
        '"007"',
        '"2020-01-01"',
        '"NA"',
    ]
    rows = [
        f'{{"prompt": "p", "completion": {literal}, "id": {i}}}'
        for i, literal in enumerate(literals)
    ]
    path = tmp_path / f"rows{suffix}"
    path.write_text("\n".join(rows) if suffix == ".jsonl" else f"[{', '.join(rows)}]")
    assert read_file(path)["completion"][:] == [literal.strip('"') for literal in literals]
    # Only numbers; and only dates, which the parser converts to timestamps.
    for written in (["1", "2.0"], ['"2020-01-01"', '"2021-02-03"']):
        rows = [f'{{"prompt": "p", "completion": {literal}}}' for literal in written]
        path.write_text("\n".join(rows) if suffix == ".jsonl" else f"[{', '.join(rows)}]")
        assert read_file(path)["completion"][:] == [literal.strip('"') for literal in written]


def test_numbers_inside_messages_keep_their_type(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": 1, "messages": [{"role": "user", "content": "a", "weight": 2, "f": 1.5, "b": '
        "true}]}\n"
    )
    [row] = read_file(path)
    assert row == {
        "prompt": "1",
        "messages": [{"role": "user", "content": "a", "weight": 2, "f": 1.5, "b": True}],
    }


def test_nested_values_are_refused(tmp_path, tokenizer):
    rows = [
        {"prompt": "a", "completion": None, "text": "b"},
        {"prompt": "a", "completion": [4], "text": "b"},
    ]
    with pytest.raises(DataError, match=r"rows.jsonl row 2: completion=\[4\] is a list, not text"):
        tokenized(tmp_path, tokenizer, rows)


def test_conversations_are_messages(tmp_path, tokenizer):
    tokenizer.chat_template = CHAT
    talk = [("system", "be brief"), ("human", "hi"), ("gpt", "hello")]
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    rows = [{"conversations": [{"from": who, "value": text} for who, text in talk]}]
    sample = tokenized(tmp_path, tokenizer, rows)[0]
    assert tokenizer.decode(sample["input_ids"]) == "".join(
        f"<{roles[who]}>{text}</s>" for who, text in talk
    )
    assert trained_text(tokenizer, sample) == "hello</s>"
    rows[0]["conversations"][1]["from"] = "observer"
    with pytest.raises(
        DataError, match="rows.jsonl row 1: conversations are from observer, and known are human"
    ):
        tokenized(tmp_path, tokenizer, rows)


def test_named_columns(tmp_path, tokenizer):
    """Other columns, even `text`, are ignored; naming other columns makes other samples."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"frage": "two?", "antwort": 2, "text": "no"}\n')
    rows = take_columns(
        read_file(path, ["frage", "antwort"]), "rows.jsonl", "frage", "antwort", None
    )
    assert rows[:] == {"prompt": ["two?"], "completion": ["2"]}
    rows = take_columns(read_file(path), "rows.jsonl", None, None, "frage")
    assert rows[:] == {"text": ["two?"]}
    with pytest.raises(
        DataError, match="has no column body .text_column=body.; it has frage, antwort, text"
    ):
        take_columns(
            rows.rename_column("text", "frage")
            .add_column("antwort", ["2"])
            .add_column("text", ["no"]),
            "rows.jsonl",
            None,
            None,
            "body",
        )


def test_first_rows_are_looked_at_before_any_is_tokenised(tmp_path, tokenizer, capsys):
    with pytest.raises(DataError, match="rows.jsonl row 3: null value in column text"):
        tokenized(
            tmp_path,
            tokenizer,
            [{"text": "a"}, {"text": "b"}, {"title": "c"}] + [{"text": "d"}] * 50,
        )
    assert "Tokenising" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "completion": None}, r"row 7: null value in column completion"),
        ({"messages": None, "prompt": None, "completion": "c"}, "null value in column prompt"),
        ({"q": "p", "a": "c"}, r"--prompt-column q --completion-column a"),
        ({"prompt;completion": "p;c"}, "separated by ';': separate them by commas"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_told_the_remedy(row, said):
    with pytest.raises(DataError, match=said):
        spans_of(row, "rows.jsonl row 7")


def test_empty_completions_are_told(tmp_path, tokenizer):
    rows = [{"prompt": "p", "completion": ""}, {"prompt": "p", "completion": "c"}]
    rows = tokenized(tmp_path, tokenizer, rows)
    assert trained_text(tokenizer, rows[0]) == embedded.END_OF_TEXT
    assert rows.notes == (
        "1 of 2 samples have an empty completion; they train the model to end at once",
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_a_file_that_was_replaced_with_its_size_and_time_kept_is_read_anew(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    for text in ("old", "new"):
        path.write_text({".jsonl": '{"text": "%s"}\n'}.get(suffix, "text\n%s\n") % text)
        os.utime(path, (1, 1))
        assert list(read_file(path)["text"])[-1] == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,completion\nhi,Hello\n", ""),
        ('prompt,completion\nhi,"Hello, friend"\n', ""),
        ("prompt,completion\n\nhi\n", ""),
        ("prompt,completion\nhi,Hello, friend\n", "line 2 has 3 fields, and the header has 2"),
        ("prompt,completion\nhi,Hello\nbye,a,b\n", "line 3 has 3 fields"),
        ('prompt,completion\na,"b\nc"\n\nd,e,f\n', "line 5 has 3 fields"),
        ("id,prompt,completion\n1,p1,c1,\n", "line 2 has 4 fields"),
        ("prompt,completion,completion\na,b,c\n", "line 1: the header has column completion 2"),
        ("prompt;completion\na,b;c\n", "separated by ';'"),
    ],
)
def test_fields_of_a_csv_stay_in_their_columns(tmp_path, text, said):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    for read in (read_file, count_rows):
        if said:
            with pytest.raises(DataError, match=said):
                read(path)
        else:
            read(path)


def test_long_texts_in_csv_are_counted(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "word " * 40_000 + "\n")
    assert len(read_file(path)) == count_rows(path) == 1


@pytest.mark.parametrize("sign", ["\u2028", "\x85", "\x0c"])
def test_line_separators_inside_strings_end_no_row(tmp_path, sign):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": f"a{sign}b" if sign != "\x0c" else "a", "completion": 42}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    rows = read_file(path)
    assert rows["prompt"][0] == row["prompt"]
    assert len(rows) == count_rows(path) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.txt", "abc\n"),
        ("rows.csv", "text\nabc\n"),
        ("rows.jsonl", '{"text": "abc"}\n'),
        ("rows.json", '[{"text": "abc"}]'),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    path = tmp_path / name
    path.write_text("\ufeff" + content, encoding="utf-8")
    assert list(read_file(path)["text"]) == ["abc"]
    assert count_rows(path) == 1

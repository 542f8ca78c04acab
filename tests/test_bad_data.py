"""Data files as they come: each is read as it is written, or refused with one message that names
the file and the line."""

from __future__ import annotations

import os
import threading
import time

import pytest

from accum_trainer.config import TrainConfig
from accum_trainer.data import embedded, files
from accum_trainer.data.counting import count_rows
from accum_trainer.data.files import digest, read_file
from accum_trainer.data.tokenizing import tokenize
from accum_trainer.errors import DataError
from accum_trainer.train.rows import load_rows

GOOD = b'{"text": "good"}\n'
BOM = b"\xef\xbb\xbf"
BIG = b"x y " * 2_500_000  # 10 MB


def deep(levels):
    return b"[" * levels + b"]" * levels


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCUM_TRAINER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return embedded.corpus_tokenizer()


READ = {
    "crlf.jsonl": (GOOD.replace(b"\n", b"\r\n") * 2, ["good", "good"]),
    "crlf.json": (b'[{"text": "a"},\r\n{"text": "b"}]\r\n', ["a", "b"]),
    "crlf.csv": (b'text\r\n"a\r\nb"\r\nc\r\n', ["a\r\nb", "c"]),
    "crlf.txt": (b"a\r\n\r\nb\r\n", ["a", "b"]),
    "cr.jsonl": (b'{"text": "a"}\r{"text": "b"}\r', ["a", "b"]),
    "cr.txt": (b"a\rb\r", ["a", "b"]),
    "two marks.jsonl": (BOM * 2 + GOOD, ["good"]),
    "nul.jsonl": (b'{"text": "a\\u0000b"}\n', ["a\0b"]),
    "nul.csv": (b"text\nab\0cd\n", ["ab\0cd"]),
    "nul.txt": (b"ab\0cd\n", ["ab\0cd"]),
    "pair.jsonl": (b'{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
    "digits.jsonl": (GOOD + b'{"text": ' + b"1" * 5000 + b"}\n", ["good", "1" * 5000]),
    "lines.json": (GOOD * 2, ["good", "good"]),
    "inner.jsonl": (b'{"text": "a", "more": ' + deep(60) + b"}\n", ["a"]),
    "quotes.csv": (b'text\n"a ""b"" c"\n"d"', ["a" + ' "b" c', "d"]),
    "after.csv": (b"text\nafter", ["after"]),
}


@pytest.mark.parametrize("name", READ)
def test_read_as_written(tmp_path, name):
    content, texts = READ[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert list(read_file(path)["text"]) == texts
    assert count_rows(path) == len(texts)


REFUSED = {
    "cut.txt": ("a\né".encode()[:-1], "line 2 is not UTF-8 text: unexpected end of data"),
    "cut.jsonl": (GOOD + '{"text": "é'.encode()[:-1], "line 2 is not UTF-8 text"),
    "latin.csv": ("text\né\n".encode("latin1"), "line 2 is not UTF-8 text"),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), "line 1 is mostly NUL bytes; save it as UTF-8"),
    "utf16.txt": ("abc\nd".encode("utf-16-le"), "line 1 is mostly NUL bytes; save it as UTF-8"),
    "zeros.csv": (b"text\na\n" + bytes(4096), "line 3 is mostly NUL bytes"),
    "zeros.jsonl": (GOOD + bytes(4096), "line 2 is mostly NUL bytes"),
    "nul.jsonl": (GOOD + b'{"text": "a\0b"}\n', "line 2 is not JSON: Invalid control character"),
    "twice.jsonl": (GOOD + b'{"text": "a", "text": "b"}\n', "line 2 has two values of text"),
    "twice.json": (
        b'[{"text": "a"},\n\n{"text": "b", "text": "c"}]',
        r"line 3 \(row 2\) has two values of text",
    ),
    "twice.csv": (b"text,text\na,b\n", "line 1: the header has column text 2 times"),
    "deep.jsonl": (GOOD + b'{"text": ' + deep(100_000) + b"}\n", "line 2 is nested more than 60"),
    "deep.json": (b'[{"text": ' + deep(100_000) + b"}]", r"line 1 \(row 1\) is nested more than"),
    "inner.jsonl": (b'{"text": "a", "more": ' + deep(61) + b"}\n", "line 1 is nested more than 60"),
    "half.jsonl": (GOOD + b'{"text": "\\ud800"}\n', r"line 2 has \\ud800, which is half"),
    "half.json": (b'[{"text": "a\\udc00"}]', r"line 1 \(row 1\) has \\udc00, which is half"),
    "quote.csv": (b'text\na\n"abc\nd\n', "line 3 opens a quote that is never closed"),
    "header.csv": (b"text\n", "has no rows"),
    "mark.csv": (BOM, "has no rows"),
    "mark.txt": (BOM + b"\n", "has no rows"),
    "null.json": (b"null", "row 1 is not a JSON object: null"),
    "number.jsonl": (b"5\n", "line 1 is not a JSON object: 5"),
    "list.jsonl": (b"[1]\n", r"line 1 is not a JSON object: \[1\]"),
    "garbage.parquet": (b"PAR1xxxxPAR1", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_line(tmp_path, name):
    content, said = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    for _ in range(2):  # nothing of the first try makes the second one another
        with pytest.raises(DataError, match=f"data file .*{name} {said}"):
            read_file(path)
    if path.suffix != ".jsonl":  # a plan counts the lines of .jsonl and parses none
        with pytest.raises(DataError, match=f"data file .*{name} "):
            count_rows(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_a_row_of_10_mb(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(
        {
            ".jsonl": b'{"text": "' + BIG + b'"}\n',
            ".json": b'[{"text": "' + BIG + b'"}]',
            ".csv": b"text\n" + BIG + b"\n",
            ".txt": BIG + b"\n",
        }[suffix]
    )
    assert [len(text) for text in read_file(path)["text"]] == [len(BIG)]
    assert count_rows(path) == 1


@pytest.mark.long
def test_a_row_of_10_mb_is_tokenised(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "' + BIG[:1_000_000] * 10 + b'"}\n')
    rows = tokenize(read_file(path), "rows.jsonl", digest(path), tokenizer, 4096)
    assert rows.lengths.max() == 4096 and rows.num_targets.sum() > 1_000_000


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="is no ordinary file"):
        read_file(tmp_path / "rows.jsonl")


class TestSkip:
    """on_bad_row=skip: what is left is trained on, and the rest is counted, once."""

    def rows(self, path, tokenizer, **options):
        config = TrainConfig(dataset_file=str(path), on_bad_row="skip", **options)
        return load_rows(config, tokenizer)[0]

    def test_lines_and_rows(self, tmp_path, tokenizer):
        """Every kind of bad row; a first batch without a good one; again from the cache."""
        path = tmp_path / "rows.jsonl"
        bad = [b'{"text": "a', b'{"text": "\\ud800"}', b"5", b"\xff", b"{}", b'{"text": null}']
        path.write_bytes(b"\n".join([*bad, GOOD.strip(), b'{"text": [1]}', b'{"text": "b"}']))
        for _ in range(2):
            rows = self.rows(path, tokenizer)
            assert [tokenizer.decode(row["input_ids"][:-1]) for row in rows] == ["good", "b"]
            assert rows.num_skipped == 7
            assert rows.notes[-1] == (
                f"rows of {path} that were skipped (on_bad_row=skip): 7, the first because line 1 "
                "is not JSON: Unterminated string starting at column 10"
            )
        with pytest.raises(DataError, match="line 4 is not UTF-8"):
            load_rows(TrainConfig(dataset_file=str(path)), tokenizer)

    def test_a_batch_without_a_good_row(self, tmp_path, tokenizer):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b'{"text": null, "id": 1}\n' * 1001 + GOOD)
        rows = self.rows(path, tokenizer)
        assert (len(rows), rows.num_skipped) == (1, 1001)

    def test_good_files_give_the_same_samples(self, tmp_path, tokenizer):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(GOOD * 3)
        strict = load_rows(TrainConfig(dataset_file=str(path)), tokenizer)[0]
        rows = self.rows(path, tokenizer)
        assert [*rows] == [*strict] and rows.notes == strict.notes and rows.num_skipped == 0

    def test_a_skipped_table_is_not_taken_for_a_strict_one(self, tmp_path, tokenizer):
        path = tmp_path / "rows.csv"
        path.write_text("text,id\n" + "a,1\n" * 150 + ",2\n")
        assert self.rows(path, tokenizer).num_skipped == 1
        with pytest.raises(DataError, match="row 151: null value in column text"):
            load_rows(TrainConfig(dataset_file=str(path)), tokenizer)

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.jsonl", "{\n5\n", "has no line that can be read: line 1 is not JSON"),
            ("a.csv", "text,id\n,1\n,2\n", "has no row that can be trained on; 2 were skipped"),
            ("b.csv", "q,a\n1,2\n", r"has the columns \['a', 'q'\], which make no row format"),
            ("c.csv", "q,text\n1,2,3\n", "line 2 has 3 fields"),
            ("a.json", "[5]", "row 1 is not a JSON object"),
        ],
    )
    def test_nothing_left_or_no_rows_to_leave_out(self, tmp_path, tokenizer, name, content, said):
        path = tmp_path / name
        path.write_text(content)
        for _ in range(2):
            with pytest.raises(DataError, match=said):
                self.rows(path, tokenizer)


class TestChanges:
    """A file whose content changes while it is read is refused; its rows are never of two states,
    now or from the cache."""

    def load(self, path, tokenizer, **options):
        config = TrainConfig(dataset_file=str(path), **options)
        return [tokenizer.decode(row["input_ids"][:-1]) for row in load_rows(config, tokenizer)[0]]

    @pytest.mark.parametrize("on_bad_row", ["error", "skip"])
    def test_a_file_that_is_being_written(self, tmp_path, tokenizer, on_bad_row):
        """By another thread, half a line at a time; long enough that it writes meanwhile."""
        path, is_done = tmp_path / "rows.jsonl", threading.Event()
        path.write_bytes(GOOD * 20_000)

        def write():
            with open(path, "ab", buffering=0) as file:
                while not is_done.is_set():
                    file.write(GOOD[:7])
                    time.sleep(0.001)
                    file.write(GOOD[7:])

        writer = threading.Thread(target=write)
        writer.start()
        try:
            with pytest.raises(DataError, match=f"{path} changed while it was read.* give a copy"):
                self.load(path, tokenizer, on_bad_row=on_bad_row)
        finally:
            is_done.set()
            writer.join()
        lines = path.read_bytes().count(b"\n")
        assert self.load(path, tokenizer, on_bad_row=on_bad_row) == ["good"] * lines

    def test_another_file_of_the_same_size_and_time_in_its_place(
        self, tmp_path, tokenizer, monkeypatch
    ):
        path, other = tmp_path / "rows.jsonl", GOOD.replace(b"good", b"evil")
        path.write_bytes(GOOD)
        os.utime(path, (1e9, 1e9))
        before = files.check_json

        def replace(*arguments):
            before(*arguments)
            path.unlink()
            path.write_bytes(other)
            os.utime(path, (1e9, 1e9))

        with monkeypatch.context() as patched:
            patched.setattr(files, "check_json", replace)
            with pytest.raises(DataError, match="changed while it was read"):
                self.load(path, tokenizer)
        assert self.load(path, tokenizer) == ["evil"]
        path.write_bytes(GOOD)
        os.utime(path, (1e9, 1e9))
        assert self.load(path, tokenizer) == ["good"]

    def test_what_changes_no_content_is_taken(self, tmp_path, tokenizer, monkeypatch):
        path, before = tmp_path / "rows.jsonl", files.check_json
        path.write_bytes(GOOD)

        def touch(*arguments):
            before(*arguments)
            path.chmod(0o600)
            path.touch()

        monkeypatch.setattr(files, "check_json", touch)
        assert self.load(path, tokenizer) == ["good"]

    def test_a_file_that_is_taken_away(self, tmp_path, tokenizer, monkeypatch):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(GOOD)
        monkeypatch.setattr(files, "check_json", lambda path: path.unlink())
        with pytest.raises(DataError, match="changed while it was read"):
            self.load(path, tokenizer)

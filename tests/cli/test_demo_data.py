"""Reading labelled text: what is accepted, and what each refusal says."""

import json
from collections import Counter

import pytest

from peft_fused.cli import demo_data
from peft_fused.cli.demo_data import Batches, DataError, load, read


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def lines(count, label=lambda i: "ab"[i % 2]):
    return "text\tlabel\n" + "".join(f"sentence {i}\t{label(i)}\n" for i in range(count))


def test_the_same_rows_from_every_format(tmp_path):
    rows = [('say "hi", please', "yes"), ("plain", "no")]
    tsv = write(tmp_path / "a.tsv", "id\ttext\tlabel\n" + "".join(f"1\t{t}\t{label}\n" for t, label in rows))
    csv = write(tmp_path / "a.csv", 'label,text\nyes,"say ""hi"", please"\nno,plain\n')
    jsonl = write(
        tmp_path / "a.jsonl", "\n".join(json.dumps({"text": t, "label": label}) for t, label in rows) + "\n\n"
    )
    for path in (tsv, csv, jsonl):
        assert [(row.text, row.label) for row in read(path, "text", "label")] == rows


def test_an_unbalanced_quotation_mark_in_a_tsv_is_text(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"so they say\t1\nnext row\t0\n')
    assert [row.text for row in read(path, "text", "label")] == ['"so they say', "next row"]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c", "\x1c"])
def test_only_line_feeds_end_a_line(tmp_path, separator):
    text = f"one{separator}two"
    tsv = write(tmp_path / "a.tsv", f"text\tlabel\n{text}\t1\n")
    csv = write(tmp_path / "a.csv", f"text,label\n{text},1\n")
    jsonl = write(tmp_path / "a.jsonl", json.dumps({"text": text, "label": 1}, ensure_ascii=False) + "\n")
    assert [read(path, "text", "label")[0].text for path in (tsv, csv, jsonl)] == [text] * 3


def test_long_texts_and_long_numbers(tmp_path):
    text = "word " * 50_000
    assert read(write(tmp_path / "a.tsv", f"text\tlabel\n{text}\t1\n"), "text", "label")[0].text == text
    long = "9" * 5000
    rows = lines(9, lambda i: ("007", long, "10")[i % 3])
    assert load(write(tmp_path / "b.tsv", rows), None, "text", "label").classes == ["007", "10", long]


def test_integer_labels_are_ordered_by_value(tmp_path):
    path = write(tmp_path / "a.jsonl", "".join(f'{{"text": "t", "label": {i % 11}}}\n' for i in range(40)))
    assert load(path, None, "text", "label").classes == [str(i) for i in range(11)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", lines(9), "must end in .tsv, .csv, .jsonl"),
        ("a.tsv", " \n", "the file is empty"),
        ("a.tsv", "text\tlabel\n", "there is a header but no row"),
        ("a.tsv", "sentence\tscore\nx\t1\n", "no column 'text'; columns: sentence, score"),
        ("a.tsv", "text\tscore\nx\t1\n", "no column 'label'; columns: text, score"),
        ("a.tsv", "text\tscore\n", "no column 'label'; columns: text, score"),
        ("a.tsv", "text\tlabel\tlabel\nx\t1\t2\n", "2 columns are named 'label'"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "line 1: the text has half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
        ("a.jsonl", '{"text": "x", "label": ' + "1" * 5000 + "}\n", "line 1: not JSON"),
        ("a.tsv", "text\tlabel\nx\t1\ny\n", "line 3: 1 fields, but the header has 2 columns (text, label)"),
        ("a.tsv", "text\tlabel\nx\t \n", "line 2: the label must be a non-empty string or an integer, got ' '"),
        ("a.csv", 'text,label\n"open,1\n', "line 2: "),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", "[1, 2]\n", "line 1: expected a JSON object, got list"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "line 1: the text must be a string, got 3"),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', "line 1: the label must be"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "line 1: the label must be"),
    ],
)
def test_bad_files_are_refused_with_the_reason(tmp_path, name, content, expected):
    with pytest.raises(DataError) as error:
        read(write(tmp_path / name, content), "text", "label")
    assert expected in str(error.value) and name in str(error.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "none.tsv", "text", "label")
    (tmp_path / "binary.tsv").write_bytes(b"text\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read(tmp_path / "binary.tsv", "text", "label")


def test_labels_that_make_no_classifier(tmp_path):
    with pytest.raises(DataError, match="has 1 distinct values"):
        load(write(tmp_path / "one.tsv", lines(9, lambda i: "a")), None, "text", "label")
    with pytest.raises(DataError, match="has 90 distinct values"):
        load(write(tmp_path / "many.tsv", lines(90, str)), None, "text", "label")
    with pytest.raises(DataError, match="4 rows; at least 5"):
        load(write(tmp_path / "few.tsv", lines(4)), None, "text", "label")


def test_a_label_only_seen_in_evaluation_is_refused(tmp_path):
    train = write(tmp_path / "train.tsv", lines(10))
    other = write(tmp_path / "eval.tsv", "text\tlabel\nx\ta\ny\tc\n")
    with pytest.raises(DataError, match=r"eval.tsv, line 3: label 'c' is not in .* \(labels: a, b\)"):
        load(train, other, "text", "label")


def test_a_fifth_is_held_out_without_overlap(tmp_path):
    path = write(tmp_path / "a.tsv", lines(50))
    data = load(path, None, "text", "label")
    assert (len(data.train), len(data.evaluation)) == (40, 10)
    assert not set(data.train) & set(data.evaluation)
    assert data == load(path, None, "text", "label"), "the split is the same in every run"


def test_batches_pass_over_every_row_before_any_comes_again():
    rows = [(str(i), 0) for i in range(12)]
    first, same, other = (Batches(rows, 4, seed) for seed in (0, 0, 1))
    seen = [row for _ in range(3) for row in next(first)]
    assert sorted(seen) == sorted(rows)
    assert [row for _ in range(3) for row in next(same)] == seen
    assert [row for _ in range(3) for row in next(other)] != seen


def test_batches_larger_than_the_file_repeat_it():
    assert Counter(next(Batches([("a", 0), ("b", 1)], 6, 0))) == {("a", 0): 3, ("b", 1): 3}


def test_bundled_remarks_are_balanced_and_the_parts_share_nothing():
    data = load(demo_data.bundled("train"), demo_data.bundled("eval"), "text", "label")
    assert data.classes == ["negative", "positive"]
    assert Counter(label for _, label in data.train) == {0: 152, 1: 152}
    assert Counter(label for _, label in data.evaluation) == {0: 48, 1: 48}
    texts = [text for text, _ in data.train + data.evaluation]
    assert len(set(texts)) == len(texts) == 400

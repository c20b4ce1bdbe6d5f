"""Do records become the samples and classes that they say, in every form of file, and is what is wrong named?"""

import json
from pathlib import Path

import pytest

from models import classified_data
from models.classified_data import Labels, encode_texts, find_labels, load_classified, stored_labels
from models.data import DataConfig, DataWarning, FieldConfig, load_records
from models.records import read_records
from sparse_zero.errors import InputError
from tests.models.tiny_classifiers import roberta_tokenizer, wordpiece_tokenizer, write_records


def data(train: Path, second: str | None = None, text: str = "sentence", label: str = "label", **more) -> DataConfig:
    return DataConfig(train=str(train), fields=FieldConfig(text=text, second_text=second, label=label), **more)


def test_quotes_of_a_tsv_are_characters(tmp_path):
    file = tmp_path / "dev.tsv"
    file.write_bytes('\ufeffsentence\tlabel\r\nthe "dark film\t0\r\n\r\n``a" b\t1\r\n'.encode())
    records = [{"sentence": 'the "dark film', "label": "0"}, {"sentence": '``a" b', "label": "1"}]
    assert read_records(str(file), field="data.train", split="train") == records
    assert read_records(str(tmp_path), field="data.test", split="dev") == records


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a\tb\n1\t2\t3\n", "line 2 has 3 values for 2 columns"),
        ("a\ta\n1\t2\n", "occurs twice in the header"),
    ],
)
def test_a_tsv_that_is_none(tmp_path, content, says):
    (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(InputError, match=says):
        read_records(str(tmp_path / "a.tsv"), field="data.train", split="train")


def test_classes_are_numbers_or_words(tmp_path):
    write_records(tmp_path, "train", range(20))
    assert find_labels(data(tmp_path / "train.tsv"), 2) == Labels(num_labels=2)
    pairs = data(tmp_path / "train.jsonl", "hypothesis", text="premise", label="relation")
    words = find_labels(pairs, 2)
    assert words.names == ("no", "yes")
    assert [words.target(text, "record") for text in ("yes", " no ")] == [1.0, 0.0]
    # The order of a model that was saved with these words; and of the config, which knows best.
    assert find_labels(pairs, 2, stored=("yes", "no")).names == ("yes", "no")
    assert find_labels(pairs, 2, stored=("maybe", "no")).names == ("no", "yes")
    told = data(tmp_path / "train.jsonl", text="premise", label="relation", labels=("yes", "no"))
    assert find_labels(told, 2, stored=("no", "yes")).names == ("yes", "no")
    numbers = find_labels(data(tmp_path / "train.csv", text="text", label="score"), 1)
    assert numbers.is_regression
    assert numbers.target("1.75", "record") == 1.75


@pytest.mark.parametrize(
    ("labels", "text", "says"),
    [
        (Labels(num_labels=2), "2", "label '2', and model.num_labels is 2, for classes 0 to 1"),
        (Labels(num_labels=2), "-1", "hidden in GLUE's test data"),
        (Labels(num_labels=2), "0.5", "label '0.5'"),
        (Labels(num_labels=2, names=("no", "yes")), "maybe", "'maybe', which is none of no, yes"),
        (Labels(num_labels=1), "much", "label 'much', and model.num_labels is 1"),
        (Labels(num_labels=1), "nan", "label 'nan'"),
    ],
)
def test_a_label_that_stands_for_nothing(labels, text, says):
    with pytest.raises(InputError, match=r"record 3 of data\.train has the label") as caught:
        labels.target(text, "record 3 of data.train")
    assert says in str(caught.value)


def test_words_of_another_number_than_classes(tmp_path):
    write_records(tmp_path, "train", range(20))
    config = data(tmp_path / "train.jsonl", text="premise", label="relation")
    with pytest.raises(
        InputError, match=r"model\.num_labels is 3, and data\.train has 2 different labels .*'no', 'yes'"
    ):
        find_labels(config, 3)


def test_labels_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"1": "yes", "0": "no"}}))
    assert stored_labels(tmp_path) == ("no", "yes")
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}))
    assert stored_labels(tmp_path) is None


def test_pairs_are_encoded_with_the_tokenizers_own_tokens(tmp_path):
    write_records(tmp_path, "train", range(20))
    config = data(tmp_path / "train.jsonl", "hypothesis", text="premise", label="relation")
    records = load_records(config, "train")
    bert, roberta = wordpiece_tokenizer(), roberta_tokenizer()
    labels = find_labels(config, 2)
    samples = load_classified(config, bert, "train", labels).samples
    for sample, record in zip(samples, records, strict=True):
        words = bert.decode(sample.input_ids, clean_up_tokenization_spaces=False).split()
        assert (words[0], words.count("[SEP]"), words[-1]) == ("[CLS]", 2, "[SEP]")
        # The type changes behind the first separator.
        behind = sample.input_ids.index(bert.sep_token_id) + 1
        assert sample.token_type_ids == [0] * behind + [1] * (len(sample.input_ids) - behind)
        assert sample.target == float(record["relation"] == "yes")
    ids, types = encode_texts(config, roberta, records)[0][0]
    assert (types, [token for token in ids if token in (0, 2)]) == ([], [0, 2, 2, 2])
    assert roberta.decode(ids, skip_special_tokens=True) == records[0]["premise"] + records[0]["hypothesis"]


def test_texts_are_encoded_chunk_by_chunk_as_all_at_once(tmp_path, monkeypatch):
    write_records(tmp_path, "train", range(20))
    config = data(tmp_path / "train.jsonl", "hypothesis", text="premise", label="relation", max_length=16)
    records, tokenizer = load_records(config, "train"), wordpiece_tokenizer()
    whole, num_cut = encode_texts(config, tokenizer, records)
    assert num_cut > 0
    monkeypatch.setattr(classified_data, "_CHUNK", 3)
    assert encode_texts(config, tokenizer, records) == (whole, num_cut)


def test_no_pair_is_longer_than_was_asked_for(tmp_path):
    write_records(tmp_path, "train", range(20))
    config = data(tmp_path / "train.jsonl", "hypothesis", text="premise", label="relation", max_length=2)
    # [CLS] and two [SEP] alone are more, and the tokenizer then cuts nothing at all.
    with pytest.raises(InputError, match=r"data\.max_length is 2, and the tokenizer's special tokens alone are more"):
        encode_texts(config, wordpiece_tokenizer(), load_records(config, "train"))


def test_long_texts_are_cut_and_counted(tmp_path):
    write_records(tmp_path, "train", range(20))
    config = data(tmp_path / "train.jsonl", "hypothesis", text="premise", label="relation", max_length=16)
    tokenizer = wordpiece_tokenizer()
    whole, _ = encode_texts(data(tmp_path / "train.jsonl", "hypothesis", text="premise", label="relation"), tokenizer,
                            load_records(config, "train"))  # fmt: skip
    longer = [len(ids) > 16 for ids, _ in whole]
    assert 0 < sum(longer) < 20
    with pytest.warns(DataWarning, match=rf"of 20 texts, {sum(longer)} were cut at data\.max_length 16"):
        found = load_classified(config, tokenizer, "train", find_labels(config, 2))
    for sample, (ids, _), cut in zip(found.samples, whole, longer, strict=True):
        assert len(sample.input_ids) == min(len(ids), 16)
        assert sample.input_ids[-1] == tokenizer.sep_token_id
        assert cut or sample.input_ids == ids


def test_records_lack_nothing(tmp_path):
    write_records(tmp_path, "train", range(20))
    with pytest.raises(InputError, match=r"record 1 has no field 'other'"):
        load_records(data(tmp_path / "train.jsonl", "other", text="premise", label="relation"), "train")
    (tmp_path / "empty.jsonl").write_text('{"sentence": "", "label": 1}\n')
    config = data(tmp_path / "empty.jsonl")
    tokenizer = roberta_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(InputError, match=r"record 1 of data\.train has an empty text"):
        load_classified(config, tokenizer, "train", Labels(num_labels=2))

"""Do files, folders and hub names become the right records and samples, and bad ones named errors?"""

import json
import warnings

import pytest

from models.data import IGNORED, DataConfig, DataWarning, FieldConfig, load_records, load_samples
from models.records import read_records, text_of
from models.templates import encode_prompts, encode_responses, render
from sparse_zero.errors import InputError

RECORDS = [
    {"instruction": "Add 12 and 7.", "input": "", "output": "12 + 7 = 19.", "answer": "19"},
    {"instruction": "Halve 5.", "input": "now", "output": "5 / 2 = 2.5.", "answer": "2.5"},
    {"instruction": "When?", "input": "", "output": "2020-01-01", "answer": "007"},
]


def write_json(path, content=RECORDS):
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def write_jsonl(path):
    path.write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n\n", encoding="utf-8")
    return str(path)


def write_csv(path):
    rows = ["instruction,input,output,answer"]
    rows += [",".join(f'"{value}"' for value in record.values()) for record in RECORDS]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def write_parquet(path):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(RECORDS).to_parquet(str(path))
    return str(path)


WRITERS = {"json": write_json, "jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_records(tmp_path, suffix):
    path = WRITERS[suffix](tmp_path / f"some.{suffix}")
    assert load_records(DataConfig(train=path), "train") == RECORDS


@pytest.mark.parametrize("suffix", WRITERS)
def test_format_overrides_the_suffix(tmp_path, suffix):
    path = WRITERS[suffix](tmp_path / "some.data")
    assert load_records(DataConfig(train=path, format=suffix), "train") == RECORDS


def test_reading_parquet_prints_nothing_and_keeps_the_progress_bar_setting(tmp_path, capfd):
    import datasets

    path = write_parquet(tmp_path / "some.parquet")
    datasets.enable_progress_bars()
    read_records(path, field="data.train", split="train")
    assert datasets.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", WRITERS)
def test_folder_gives_the_file_of_the_split(tmp_path, suffix):
    WRITERS[suffix](tmp_path / f"train.{suffix}")
    WRITERS[suffix](tmp_path / f"dev.{suffix}")
    config = DataConfig(train=str(tmp_path), validation=str(tmp_path), validation_split="dev", limit=1)
    assert load_records(config, "train") == RECORDS[:1]
    assert load_records(config, "validation") == RECORDS  # the limit is of training records


def test_folder_of_parquet_shards_is_read_in_order(tmp_path):
    (tmp_path / "data").mkdir()
    for shard in range(2):
        write_parquet(tmp_path / "data" / f"train-0000{shard}-of-00002.parquet")
    assert load_records(DataConfig(train=str(tmp_path)), "train") == RECORDS * 2


def test_home_directory_and_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.json").write_text(json.dumps(RECORDS), encoding="utf-8-sig")
    assert load_records(DataConfig(train="~/train.json"), "train") == RECORDS


def test_json_lines_under_the_suffix_json(tmp_path):
    assert load_records(DataConfig(train=write_jsonl(tmp_path / "some.json")), "train") == RECORDS


def test_values_keep_their_own_type_as_text(tmp_path):
    """A reader with one type per column would give 5.0, a timestamp, or quotes around the text."""
    answers = [5, 2.5, "B", True, "2020-01-01", "007"]
    records = [{"instruction": "?", "output": "!", "answer": answer, "extra": [1]} for answer in answers]
    config = DataConfig(train="unused", test=write_json(tmp_path / "some.json", records))
    loaded = load_records(config, "test")
    assert [record["answer"] for record in loaded] == ["5", "2.5", "B", "true", "2020-01-01", "007"]
    assert "extra" not in loaded[0]
    assert text_of(None) is None


def test_input_is_optional_and_output_is_not_needed_in_a_test(tmp_path):
    path = write_json(tmp_path / "some.json", [{"instruction": "?", "answer": 3}])
    assert load_records(DataConfig(train=path, test=path), "test") == [{"instruction": "?", "answer": "3"}]
    with pytest.raises(InputError, match="record 1 has no field 'output'"):
        load_records(DataConfig(train=path), "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{", r"data\.train.*a\.json.*cannot be read as json.*line 1 column 3"),
        ("a.json", "", r"cannot be read as json"),
        ("a.json", "[]", r"holds no records"),
        ("a.json", '{"data": []}', r"a list of objects is expected at the top, not a dict"),
        ("a.json", '[{"instruction": "a", "output": "b"}, 3]', r"record 2 is a int, not an object"),
        ("a.json", '{"instruction": "a"}\n{"instruction": \n', r"line 2, column \d+"),
        ("a.jsonl", '{"instruction": "a"}\n\n{"instruction"\n', r"cannot be read as jsonl: line 3, column"),
        ("a.jsonl", "\n", r"holds no records"),
        ("a.csv", "instruction,output\n", r"holds no records"),
        ("a.csv", "", r"holds no records"),
        ("a.csv", "instruction,output\na,b,c\n", r"line 2 has 3 values for 2 columns"),
        ("a.csv", "instruction,output\na\n", r"line 2 has 1 values for 2 columns"),
        ("a.csv", 'instruction,output\na,"b\n', r"cannot be read as csv: unexpected end of data"),
        ("a.csv", "output,output\na,b\n", r"a column name occurs twice"),
        ("a.parquet", "no parquet", r"cannot be read as parquet"),
        ("a.xml", "text", r"the suffix '\.xml' is not supported; use \.json"),
        ("a.txt", "text", r"plain text has no records with fields"),
        (
            "a.json",
            '[{"instruction": "a", "response": "b"}]',
            r"record 1 .*'output'.*'instruction', 'response'",
        ),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": null}',
            r"record 2 has no field 'output' \(fields present: 'instruction'\)",
        ),
        (
            "a.json",
            '[{"instruction": ["a"], "output": "b"}]',
            r"record 1 has a list, not a text, as its field 'inst",
        ),
        ("a.json", "[{}]", r"fields present: none"),
    ],
)
def test_bad_files_are_named_errors(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_records(DataConfig(train=str(path)), "train")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_that_is_not_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"instruction": "\xff"}]')
    with pytest.raises(InputError, match="not UTF-8"):
        load_records(DataConfig(train=str(tmp_path / "a.json")), "train")


@pytest.mark.parametrize("setting", ["train", "validation", "test"])
@pytest.mark.parametrize("missing", ["nowhere/train.json", "a/b/c", "nowhere"])
def test_missing_file_names_setting_and_path(setting, missing):
    config = DataConfig(**{"train": "x.json", setting: missing})
    with pytest.raises(InputError, match=rf"data\.{setting} is '{missing}': there is no such file or folder"):
        load_records(config, setting)


def test_folder_without_or_with_too_many_files_of_the_split(tmp_path):
    with pytest.raises(InputError, match=r"no file for the split 'train'.*present: nothing"):
        load_records(DataConfig(train=str(tmp_path)), "train")
    write_json(tmp_path / "test.json")
    with pytest.raises(InputError, match=r"no file for the split 'train'.*present: test\.json"):
        load_records(DataConfig(train=str(tmp_path)), "train")
    write_json(tmp_path / "train.json")
    write_jsonl(tmp_path / "train.jsonl")
    with pytest.raises(InputError, match=r"more than once \(train\.json, train\.jsonl\)"):
        load_records(DataConfig(train=str(tmp_path)), "train")
    assert load_records(DataConfig(train=str(tmp_path), format="jsonl"), "train") == RECORDS


def test_hub_name_is_read_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(train="owner/name", test="owner/name:subset", test_split="held_out")
    assert load_records(config, "train") == RECORDS
    assert load_records(config, "test") == RECORDS
    assert asked == [("owner/name", None, "train"), ("owner/name", "subset", "held_out")]


def test_local_path_goes_before_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_json(tmp_path / "owner" / "name" / "train.json")
    assert load_records(DataConfig(train="owner/name"), "train") == RECORDS


def test_unreachable_hub_names_both_readings_and_the_remedy(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"data\.train is 'owner/name'.*Couldn't reach the hub\).*download") as caught:
        load_records(DataConfig(train="owner/name"), "train")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="a hub data set is named owner/name"):
        load_records(DataConfig(train="name", format="hub"), "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": " "}, r"data\.train is ' '"),
        ({"test": ""}, r"data\.test is ''"),
        ({"train_split": ""}, r"data\.train_split"),
        ({"format": "xml"}, r"data\.format is 'xml': choose one of auto, json"),
        ({"template": "llama"}, r"data\.template is 'llama': choose one of alpaca"),
        ({"batching": "bin"}, r"data\.batching is 'bin': choose one of pad, pack"),
        ({"max_length": 1}, r"data\.max_length is 1"),
        ({"limit": 0}, r"data\.limit is 0"),
    ],
)
def test_bad_settings_are_named_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**{"train": "x.json", **arguments})


def test_bad_field_names_and_missing_splits_are_named_errors(tmp_path):
    with pytest.raises(InputError, match=r"data\.fields\.output is ''"):
        FieldConfig(output="")
    with pytest.raises(InputError, match=r"data\.validation is missing"):
        load_records(DataConfig(train="x.json"), "validation")
    path = write_json(tmp_path / "some.json")
    with pytest.raises(InputError, match=r"data\.fields\.input is 'context': no record of data\.train"):
        load_records(DataConfig(train=path, fields=FieldConfig(input="context")), "train")


@pytest.mark.parametrize("template", ["alpaca", "chat", "plain"])
def test_loss_is_on_the_response_only(tmp_path, tiny_tokenizer, template):
    config = DataConfig(train=write_json(tmp_path / "some.json"), template=template)
    loaded = load_samples(config, tiny_tokenizer, "train")
    assert (loaded.num_truncated_responses, loaded.num_dropped) == (0, 0)
    assert loaded.lengths == tuple(len(sample.input_ids) for sample in loaded.samples)
    for record, sample in zip(RECORDS, loaded.samples, strict=True):
        prompt, response = render(template, record, tiny_tokenizer, config.fields)
        (prompt_ids,) = encode_prompts(tiny_tokenizer, [prompt], template)
        (response_ids,) = encode_responses(tiny_tokenizer, [response])
        assert sample.input_ids == prompt_ids + response_ids
        assert sample.labels == [IGNORED] * len(prompt_ids) + response_ids
        assert sample.labels[-1] == tiny_tokenizer.eos_token_id


def test_plain_text_has_its_loss_on_all_tokens(tmp_path, tiny_tokenizer):
    path = write_json(tmp_path / "some.json", [{"body": "How many apples?"}])
    loaded = load_samples(DataConfig(train=path, fields=FieldConfig(text="body")), tiny_tokenizer, "train")
    (sample,) = loaded.samples
    assert sample.input_ids == [tiny_tokenizer.bos_token_id, *sample.labels[1:]]
    assert sample.labels[0] == IGNORED
    assert tiny_tokenizer.decode(sample.labels[1:]) == "How many apples?</s>"


def test_truncation_cuts_responses_and_drops_what_has_no_room(tmp_path, tiny_tokenizer):
    records = [
        {"instruction": "?", "output": "a"},
        {"instruction": "?", "output": "0 1 2 3 4 5 6 7 8 9" * 4},
        {"instruction": "How many apples does Ada have? " * 9, "output": "b"},
    ]
    path = write_json(tmp_path / "some.json", records)
    full = load_samples(DataConfig(train=path, template="plain"), tiny_tokenizer, "train").samples
    prompt_length = full[0].labels.count(IGNORED)
    config = DataConfig(train=path, template="plain", max_length=prompt_length + 4)
    with pytest.warns(DataWarning, match="of 3 records, 1 responses were cut and 1 records dropped"):
        loaded = load_samples(config, tiny_tokenizer, "train")
    assert (loaded.num_truncated_responses, loaded.num_dropped) == (1, 1)
    assert loaded.samples[0] == full[0]
    assert loaded.samples[1].input_ids == full[1].input_ids[: prompt_length + 4]
    assert loaded.samples[1].labels == full[1].labels[: prompt_length + 4]
    assert max(loaded.lengths) == config.max_length


def test_one_response_token_is_enough_and_none_is_an_error(tmp_path, tiny_tokenizer):
    path = write_json(tmp_path / "some.json", [{"instruction": "?", "output": "a b c"}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        config = DataConfig(train=path, template="plain")
        prompt_length = load_samples(config, tiny_tokenizer, "train").samples[0].labels.count(IGNORED)
        config = DataConfig(train=path, template="plain", max_length=prompt_length + 1)
        (sample,) = load_samples(config, tiny_tokenizer, "train").samples
    assert len(sample.labels) == prompt_length + 1
    assert sample.labels[-1] != IGNORED
    config = DataConfig(train=path, template="plain", max_length=prompt_length)
    with pytest.raises(InputError, match=r"data\.max_length is \d+: not one of the 1 records of data\.train.*raise"):
        load_samples(config, tiny_tokenizer, "train")


def test_text_of_a_single_token_trains_nothing_and_is_dropped(tmp_path, train_tokenizer):
    path = write_json(tmp_path / "some.json", [{"body": ""}, {"body": "a"}])
    config = DataConfig(train=path, fields=FieldConfig(text="body"))
    with pytest.warns(DataWarning, match="0 responses were cut and 1 records dropped"):
        loaded = load_samples(config, train_tokenizer(adds_bos=False), "train")
    assert len(loaded.samples) == 1


def test_many_records_keep_their_order(tmp_path, tiny_tokenizer):
    """More than one chunk of tokenization."""
    records = [{"instruction": f"{number}?", "output": f"{number}"} for number in range(2100)]
    path = write_json(tmp_path / "some.json", records)
    loaded = load_samples(DataConfig(train=path, template="plain", validation=path), tiny_tokenizer, "validation")
    answers = [[label for label in sample.labels if label != IGNORED] for sample in loaded.samples]
    assert [tiny_tokenizer.decode(answer) for answer in answers] == [f" {number}</s>" for number in range(2100)]


def test_plain_text_has_no_problems_to_answer():
    plain = FieldConfig(text="body")
    assert DataConfig(train="t.json", validation="v.json", fields=plain).test is None
    with pytest.raises(
        InputError, match=r"^data\.test is 'x\.json' but data\.fields\.text is 'body': .* leave data.test out"
    ):
        DataConfig(train="t.json", test="x.json", fields=plain)

"""Are a classifier's head, batches, loss and answers what plain transformers and the formulas of the measures give?"""

import math
import shutil

import pytest
import torch
from torch.testing import assert_close

from models.classification import (
    class_logits,
    classification_metrics,
    classified_loss,
    position_offset,
    set_up_classifier,
)
from models.classified_data import Labels, load_classified
from models.classified_evaluation import evaluate_classify
from models.collate import collate, micro_batch, response_tokens
from models.data import ClassifiedSample, DataConfig, FieldConfig, load_records
from models.families import module_map
from models.heads import check_head_trained, fresh_head, head_text, new_weight
from models.loading import ModelConfig, load_model, load_tokenizer, model_folder
from models.loss import batch_loss, batch_targets
from models.skeleton import load_skeleton
from sparse_zero.errors import InputError
from sparse_zero.selection.config import RegionConfig, SelectionConfig
from sparse_zero.selection.select import entire_names
from tests.models.tiny_classifiers import write_base, write_records

HEADS = {
    "bert": ("classifier.bias", "classifier.weight"),
    "roberta": (
        "classifier.dense.bias",
        "classifier.dense.weight",
        "classifier.out_proj.bias",
        "classifier.out_proj.weight",
    ),
    "llama": ("score.weight",),
}
KINDS = tuple(HEADS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    for kind in HEADS:
        write_base(folder / kind, kind)  # type: ignore[arg-type]
    write_records(folder / "data", "train", range(24))
    write_records(folder / "data", "dev", range(100, 117))
    return folder


def source(folder, kind, num_labels=2):
    return ModelConfig(name_or_path=str(folder / kind), task="sequence_classification", num_labels=num_labels)


def pairs(folder) -> DataConfig:
    fields = FieldConfig(text="premise", second_text="hypothesis", label="relation")
    return DataConfig(
        train=str(folder / "data" / "train.jsonl"), test=str(folder / "data" / "dev.jsonl"), fields=fields
    )


def loaded(folder, kind, num_labels=2, seed=3):
    config = source(folder, kind, num_labels)
    model, tokenizer = load_model(config, head_seed=seed), load_tokenizer(config)
    labels = Labels(num_labels=num_labels, names=("no", "yes") if num_labels == 2 else None)
    set_up_classifier(model, tokenizer, labels)
    return model, tokenizer, labels


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_head_is_made_from_the_seed_alone(folder, kind):
    torch.manual_seed(11)
    first = load_model(source(folder, kind), head_seed=3)
    torch.manual_seed(12)
    again, other = (load_model(source(folder, kind), head_seed=seed) for seed in (3, 4))
    assert fresh_head(first) == HEADS[kind]
    for name, parameter in first.named_parameters():
        is_matrix = parameter.ndim == 2
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert torch.equal(parameter, other.get_parameter(name)) == (name not in HEADS[kind] or not is_matrix), name
    deviation = first.config.initializer_range
    wide = new_weight("classifier.weight", (400, 300), 0, deviation)
    assert float(wide.std()) == pytest.approx(deviation, rel=0.02)
    # The same names, shapes and settings without weights.
    skeleton = load_skeleton(source(folder, kind))
    assert [(name, each.shape) for name, each in skeleton.named_parameters()] == [
        (name, each.shape) for name, each in first.named_parameters()
    ]
    config = source(folder, kind)
    assert head_text(config, model_folder(config), 3) != head_text(config, model_folder(config), 4)


def test_a_head_of_its_own_is_kept_and_must_fit(folder, tmp_path):
    model, tokenizer, _ = loaded(folder, "roberta")
    model.save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    config = source(tmp_path, "roberta")
    kept = load_model(config)
    assert fresh_head(kept) == ()
    assert head_text(config, model_folder(config), 3) is None
    assert all(torch.equal(each, model.get_parameter(name)) for name, each in kept.named_parameters())
    assert kept.config.id2label == {0: "no", 1: "yes"}
    with pytest.raises(InputError, match=r"model\.num_labels is 3, and .* has a head for 2"):
        load_model(source(tmp_path, "roberta", 3))


def test_files_without_a_part_of_the_encoder_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "bert", tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    lost = {name: each for name, each in weights.items() if name != "encoder.layer.1.output.dense.weight"}
    save_file(lost, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 missing weights \(bert\.encoder\.layer\.1\.output\.dense\.weight\)"):
        load_model(source(tmp_path, "bert"), head_seed=0)
    # A pooler is of the head: what trains on tokens has none.
    lost = {name: each for name, each in weights.items() if not name.startswith("pooler")}
    save_file(lost, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    model = load_model(source(tmp_path, "bert"), head_seed=0)
    assert fresh_head(model) == (*sorted(("bert.pooler.dense.bias", "bert.pooler.dense.weight")), *HEADS["bert"])
    with pytest.raises(InputError, match=r'add \{kind: whole, modules: \["bert\.pooler\.\*", "classifier\.\*"\]\}'):
        check_head_trained(model, [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_must_be_trained_entirely(folder, kind):
    model = load_model(source(folder, kind), head_seed=0)
    pattern = HEADS[kind][0].partition(".")[0] + ".*"
    whole = SelectionConfig(regions=(RegionConfig(kind="whole", modules=(pattern,)),))
    names = entire_names(model, whole, module_map(model))
    assert tuple(sorted(names)) == HEADS[kind]
    check_head_trained(model, names)
    with pytest.raises(InputError, match=r"selection\.regions leaves .* untrained"):
        check_head_trained(model, names[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_labels", [2, 1])
def test_the_loss_is_that_of_transformers(folder, kind, num_labels):
    model, tokenizer, labels = loaded(folder, kind, num_labels)
    if num_labels == 2:
        samples = load_classified(pairs(folder), tokenizer, "train", labels).samples
    else:
        fields = FieldConfig(text="text", label="score")
        config = DataConfig(train=str(folder / "data" / "train.csv"), fields=fields)
        samples = load_classified(config, tokenizer, "train", labels).samples
    batch = collate(samples[:5], batching="pad", pad_token_id=tokenizer.pad_token_id)
    inputs = {name: tensor for name, tensor in batch.items() if name != "targets"}
    if kind == "bert" and num_labels == 2:
        assert int(inputs["token_type_ids"].sum()) > 0
    if kind != "bert":
        inputs.pop("token_type_ids", None)
    wanted = batch["targets"].long() if num_labels == 2 else batch["targets"].float()
    expected = model(**inputs, labels=wanted).loss * 5
    assert_close(classified_loss(model, batch), expected, rtol=1e-6, atol=1e-6)
    assert int(batch_targets(batch)) == response_tokens(samples[:5]) == 5
    # One by one, without padding, and with a stand-in that counts nothing.
    apart = sum(
        batch_loss(model, collate([each], batching="pad", pad_token_id=tokenizer.pad_token_id)) for each in samples[:5]
    )
    assert_close(apart, expected, rtol=1e-5, atol=1e-5)
    stand_in = micro_batch(samples, [])
    empty = collate(stand_in, batching="pad", pad_token_id=tokenizer.pad_token_id)
    loss = batch_loss(model, empty)
    assert (loss.item(), response_tokens(stand_in), int(batch_targets(empty))) == (0.0, 0, 0)
    loss.backward()
    assert all(float(each.grad.abs().sum()) == 0.0 for each in model.parameters() if each.grad is not None)


def test_no_two_samples_have_the_same_numbers():
    samples = [
        ClassifiedSample([4, 5], 1.0, []),
        ClassifiedSample([4, 5], 0.0, []),
        ClassifiedSample([4, 5], None, []),
        ClassifiedSample([4, 5], 1.0, [0, 1]),
        ClassifiedSample([4, 5, 0], 1.0, []),
    ]
    assert len({sample.numbers() for sample in samples}) == len(samples)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_the_batch(folder, kind):
    model, tokenizer, labels = loaded(folder, kind)
    config = pairs(folder)
    records = load_records(config, "test")
    found = [
        evaluate_classify(model, tokenizer, records, config_of, labels)
        for config_of in (config, _with_batch(config, 3), _with_batch(config, 1))
    ]
    assert [each.predictions for each in found[1:]] == [found[0].predictions] * 2
    first = found[0].predictions[0]
    assert (first.index, first.answer in ("no", "yes"), first.instruction) == (
        0, True, f"{records[0]['premise']}\n{records[0]['hypothesis']}",
    )  # fmt: skip
    assert found[0].accuracy == found[0].metrics["accuracy"]
    # Plain transformers, one text at a time.
    for record, prediction in zip(records, found[0].predictions, strict=True):
        encoded = tokenizer(record["premise"], record["hypothesis"], return_tensors="pt")
        if kind != "bert":
            encoded.pop("token_type_ids", None)
        probabilities = model(**encoded).logits.detach().softmax(1)[0]
        assert prediction.prediction == ("no", "yes")[int(probabilities.argmax())]
        assert float(prediction.text) == pytest.approx(float(probabilities.max()), abs=1e-3)
        assert prediction.correct == (prediction.prediction == record["relation"])


def _with_batch(config: DataConfig, size: int) -> DataConfig:
    from dataclasses import replace

    return replace(config, evaluation=replace(config.evaluation, batch_size=size))


def test_numbers_are_near_or_not(folder):
    model, tokenizer, labels = loaded(folder, "bert", 1)
    fields = FieldConfig(text="text", label="score")
    config = DataConfig(train="x.csv", test=str(folder / "data" / "dev.csv"), fields=fields)
    records = load_records(config, "test")
    found = evaluate_classify(model, tokenizer, records, config, labels)
    assert found.metrics is not None
    assert set(found.metrics) == {"pearson", "spearman", "mean_squared_error"}
    for prediction, record in zip(found.predictions, records, strict=True):
        assert prediction.correct == (abs(float(prediction.prediction) - float(record["score"])) < 0.5)
    errors = [(float(each.prediction) - float(each.answer)) ** 2 for each in found.predictions]
    assert found.metrics["mean_squared_error"] == pytest.approx(sum(errors) / len(errors), abs=1e-3)


def test_measures_of_classes():
    # 3 right of class 1, 1 wrongly given, 2 missed, 4 right of class 0.
    targets = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    given = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    found = classification_metrics(targets, given, Labels(num_labels=2))
    assert found["accuracy"] == 0.7
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert found["matthews"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    # Answers of no class are a class of their own.
    some = classification_metrics([0, 0, 1, 1], [0, -1, 1, -1], Labels(num_labels=2))
    assert some["matthews"] == pytest.approx((2 * 4 - 2 - 2) / math.sqrt((16 - 1 - 1 - 4) * (16 - 4 - 4)))
    three = classification_metrics([0, 1, 2, 2], [0, 2, 2, 2], Labels(num_labels=3))
    assert three["f1"] == pytest.approx((1 + 0 + 2 * 2 / (2 * 2 + 1)) / 3)
    assert classification_metrics([1, 0], [1, 1], Labels(num_labels=2))["matthews"] is None


def test_measures_of_numbers():
    import numpy as np

    generator = np.random.default_rng(0)
    targets = generator.integers(0, 6, 40).astype(float)
    given = targets + generator.normal(size=40)
    found = classification_metrics(targets.tolist(), given.tolist(), Labels(num_labels=1))
    assert found["pearson"] == pytest.approx(np.corrcoef(targets, given)[0, 1])
    ranks = [
        [(values < each).sum() + ((values == each).sum() + 1) / 2 for each in values] for values in (targets, given)
    ]
    assert found["spearman"] == pytest.approx(np.corrcoef(np.array(ranks))[0, 1])
    # The mean of the second, rounded, is no 0.1.
    for constant in ([3.0, 3.0, 3.0], [0.1, 0.1, 0.1]):
        found = classification_metrics([1.0, 2.0, 3.0], constant, Labels(num_labels=1))
        assert (found["pearson"], found["spearman"]) == (None, None)


@pytest.mark.parametrize("given", [[1.0, math.nan, math.nan], [math.inf, -math.inf, 1.0]])
def test_numbers_of_a_model_that_diverged_are_not_measured(given):
    found = classification_metrics([1.0, 2.0, 3.0], given, Labels(num_labels=1))
    assert found == {"pearson": None, "spearman": None, "mean_squared_error": None}


def test_a_model_that_diverged_gives_no_class(folder):
    model, tokenizer, labels = loaded(folder, "bert")
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    config = DataConfig(train="x.tsv", test="x.tsv", fields=FieldConfig(text="sentence", label="label"))
    records = [{"sentence": "good", "label": "yes"}, {"sentence": "bad", "label": "no"}]
    found = evaluate_classify(model, tokenizer, records, config, labels)
    assert [(each.prediction, each.text, each.correct) for each in found.predictions] == [("", "nan", False)] * 2
    assert found.metrics == {"accuracy": 0.0, "f1": 0.0, "matthews": None}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_text_that_the_model_has_no_positions_for_is_refused(folder, kind):
    model, tokenizer, labels = loaded(folder, kind)
    config = DataConfig(train="x.tsv", test="x.tsv", fields=FieldConfig(text="sentence", label="label"))
    records = [{"sentence": "good " * 80, "label": "yes"}]
    with pytest.raises(InputError, match=r"data\.max_length lets samples have up to \d+ tokens, .* room for 64"):
        evaluate_classify(model, tokenizer, records, config, labels)


def test_positions_of_roberta_begin_behind_the_padding(folder):
    room = {}
    for kind in ("bert", "roberta"):
        model, tokenizer, _ = loaded(folder, kind)
        room[kind] = model.config.max_position_embeddings - position_offset(model)
        pad = tokenizer.pad_token_id
        longest = collate([ClassifiedSample([5] * room[kind], 0.0, [])], batching="pad", pad_token_id=pad)
        assert class_logits(model, longest).shape == (1, 2)
        too_long = collate([ClassifiedSample([5] * (room[kind] + 1), 0.0, [])], batching="pad", pad_token_id=pad)
        with pytest.raises((IndexError, RuntimeError)):
            class_logits(model, too_long)
    assert room == {"bert": 64, "roberta": 64}
    model, tokenizer, labels = loaded(folder, "roberta")
    tokenizer.pad_token = "<mask>"
    with pytest.raises(InputError, match=r"pads with token 4, and the model counts positions by its padding token 1"):
        set_up_classifier(model, tokenizer, labels)

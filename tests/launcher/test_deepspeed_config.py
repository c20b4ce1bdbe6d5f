"""Does the DeepSpeed config follow from the run, and is an own one that contradicts it refused?"""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config import RunConfig, parse_config
from launcher.deepspeed_config import (
    accumulation_steps,
    check_can_continue,
    check_can_train_here,
    check_own_config,
    deepspeed_config,
    validate_with_deepspeed,
)
from sparse_zero.errors import InputError


def make(
    own: Any = None,
    options: dict[str, Any] | None = None,
    stage: int = 2,
    zero: dict[str, Any] | None = None,
    **training: Any,
) -> RunConfig:
    zero = {"stage": stage, "placement": "delta" if stage == 3 else "inplace", **(zero or {})}
    return parse_config(
        {
            "model": {"name_or_path": "m"},
            "data": {"train": "d.json"},
            "selection": {"regions": [{"kind": "row", "modules": ["*"], "per_matrix": 1}]},
            "training": {"steps": 1, "global_batch_size": 32, "micro_batch_size": 4, **training},
            "zero": {**zero, "config": own, "options": options or {}},
            "output": {"folder": "o"},
        }
    )


@pytest.mark.parametrize(
    ("global_batch", "micro", "ranks", "accumulation"),
    [(32, 4, 1, 8), (32, 4, 8, 1), (32, 4, 3, 3), (32, 4, 16, 1), (30, 4, 2, 4), (1, 1, 5, 1)],
)
def test_batch_sizes_satisfy_deepspeed(global_batch: int, micro: int, ranks: int, accumulation: int) -> None:
    settings = deepspeed_config(make(global_batch_size=global_batch, micro_batch_size=micro), ranks)
    assert settings["train_micro_batch_size_per_gpu"] == micro
    assert settings["gradient_accumulation_steps"] == accumulation
    assert settings["train_batch_size"] == micro * accumulation * ranks
    # Enough room for every sample of the step, and not one accumulation step more than that takes.
    assert settings["train_batch_size"] >= global_batch > micro * (accumulation - 1) * ranks


@pytest.mark.parametrize("world_size", [0, -1])
def test_world_size_below_one_is_refused(world_size: int) -> None:
    with pytest.raises(InputError, match=f"the world size is {world_size}"):
        accumulation_steps(make(), world_size)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision(precision: str) -> None:
    settings = deepspeed_config(make(precision=precision), 1)
    assert settings["bf16"]["enabled"] is (precision == "bf16")
    assert settings["fp16"]["enabled"] is (precision == "fp16")


def test_rest_of_the_run() -> None:
    settings = deepspeed_config(make(stage=1, options={"reduce_bucket_size": 1000}, max_gradient_norm=0.5), 2)
    assert settings["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_allow_untested_optimizer"] is True
    assert settings["steps_per_print"] > 10**6
    assert settings["wall_clock_breakdown"] is False
    assert not {"optimizer", "scheduler"} & set(settings)
    assert deepspeed_config(make(max_gradient_norm=None), 2)["gradient_clipping"] == 0.0


def test_deepspeed_itself_accepts_it() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = make(own={"train_batch_size": "auto", "zero_optimization": {"overlap_comm": "auto"}}, precision="bf16")
    parsed = DeepSpeedConfig(deepspeed_config(config, 1))
    assert parsed.train_batch_size == 32
    assert parsed.gradient_accumulation_steps == 8
    assert parsed.zero_config.stage == 2
    assert parsed.gradient_clipping == 1.0


OWN = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": "auto",
        "reduce_bucket_size": "auto",
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
    },
    "comms_logger": {"enabled": True},
}


def test_own_config_is_the_start_and_its_auto_values_are_filled(tmp_path: Path) -> None:
    before = json.dumps(OWN)
    file = tmp_path / "ds.json"
    file.write_text(before, encoding="utf-8")
    settings = deepspeed_config(make(own=OWN), 4)
    assert settings == deepspeed_config(make(own=str(file)), 4)
    assert json.dumps(OWN) == before
    assert settings["train_batch_size"] == 32
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["comms_logger"] == {"enabled": True}
    # Where the run has no value, DeepSpeed's own default counts.
    expected = {"stage": 2, "contiguous_gradients": True, "offload_optimizer": {"device": "cpu"}}
    assert settings["zero_optimization"] == expected
    assert "auto" not in json.dumps(settings)


def test_before_the_world_is_known_what_depends_on_it_is_left_alone() -> None:
    own = {"train_batch_size": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    check_own_config(make(own=own))
    settings = deepspeed_config(make(own=own), None)
    assert not {"train_batch_size", "gradient_accumulation_steps"} & set(settings)
    assert settings["gradient_clipping"] == 1.0
    # 3 steps may be right or wrong: 32 samples in micro-batches of 4 take as many on 3 ranks, and 4 on 2.
    fixed = make(own={"gradient_accumulation_steps": 3, "train_batch_size": 32})
    assert deepspeed_config(fixed, None)["gradient_accumulation_steps"] == 3
    assert deepspeed_config(fixed, 3)["gradient_accumulation_steps"] == 3
    with pytest.raises(InputError, match=r"^gradient_accumulation_steps is 3 .* but 4 by training\.global_batch_size"):
        deepspeed_config(fixed, 2)


@pytest.mark.parametrize("world_size", [1, 3, 16])
def test_deepspeed_accepts_the_settings_of_any_world(world_size: int) -> None:
    settings = deepspeed_config(make(own=OWN), world_size)
    before = json.dumps(settings)
    validate_with_deepspeed(settings, world_size)
    assert json.dumps(settings) == before


@pytest.mark.parametrize(
    ("own", "options", "message"),
    [
        ({}, {"overlap_com": True}, r"^zero_optimization\.overlap_com is unknown to DeepSpeed: .*\(zero\.options\.overlap_com\); did you mean overlap_comm\?$"),
        ({}, {"offload_optimizer": {"device": "cpu", "pin": True}}, r"^zero_optimization\.offload_optimizer\.pin is unknown .*; remove it$"),
        ({}, {"reduce_bucket_size": "many"}, r"^zero_optimization\.reduce_bucket_size is 'many', which DeepSpeed refuses"),
        ({}, {"offload_optimizer": {"device": "gpu"}}, r"^zero_optimization\.offload_optimizer\.device is 'gpu', which DeepSpeed refuses"),
        ({"fp16": {"loss_scale_windo": 3}}, {}, r"^fp16\.loss_scale_windo is unknown to DeepSpeed: it stands in zero\.config; remove it$"),
        ({"tensorboard": {"enabled": True, "foo": 1}}, {}, r"^tensorboard\.foo is unknown to DeepSpeed"),
        ({"communication_data_type": "x"}, {}, r"^DeepSpeed refuses the config of zero\.config .*communication_data_type"),
        ({"elasticity": {"enabled": True}}, {}, r"^DeepSpeed refuses .*'elasticity'"),
        ({"activation_checkpointing": 3}, {}, r"^DeepSpeed refuses the config"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_what_deepspeed_refuses_is_one_line_with_the_key(own: Any, options: dict[str, Any], message: str) -> None:
    settings = deepspeed_config(make(own=own, options=options), 2)
    with pytest.raises(InputError, match=message) as error:
        validate_with_deepspeed(settings, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ({"wandb": {"enabled": True, "api_key": "1234"}}, "wandb.api_key"),
        ({"comet": {"API-Key": "1234"}}, "comet.API-Key"),
        ({"a": {"b": [{"hf_token": "1234"}]}}, "a.b.0.hf_token"),
        ({"accessToken": "1234"}, "accessToken"),
        ({"login": {"passwords": ["1234"]}}, "login.passwords"),
        ({"client_secret": "1234"}, "client_secret"),
    ],
)
def test_secrets_are_refused_and_not_repeated(own: Any, name: str) -> None:
    with pytest.raises(InputError, match="environment variable") as error:
        check_own_config(make(own=own))
    assert str(error.value).startswith(f"{name} is a secret in the DeepSpeed config zero.config")
    assert "1234" not in str(error.value)


def test_what_only_looks_like_a_secret_passes() -> None:
    own = {"tokenizer": "x", "max_tokens": 5, "wandb": {"api_key": "", "token": None}, "secretary": "y"}
    assert deepspeed_config(make(own=own), None)["tokenizer"] == "x"


def test_values_that_agree_are_accepted() -> None:
    own = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8},
        "fp16": {"enabled": False},
        "steps_per_print": 10,
    }
    settings = deepspeed_config(make(own=own, options={"reduce_bucket_size": 500_000_000}), 3)
    assert settings["train_batch_size"] == 36  # 3 ranks do not divide 32: DeepSpeed's number has padding in it
    assert settings["steps_per_print"] == 10


@pytest.mark.parametrize(
    ("own", "name", "values"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", ("3", "2", "zero.stage")),
        ({"train_batch_size": 64}, "train_batch_size", ("64", "32", "training.global_batch_size")),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu", ("8", "4", "training.micro_batch_size")),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps", ("3", "4", "training.global_batch_size")),
        ({"gradient_clipping": 0.3}, "gradient_clipping", ("0.3", "1.0", "training.max_gradient_norm")),
        ({"bf16": {"enabled": True}}, "bf16.enabled", ("True", "False", "training.precision")),
        ({"fp16": {"enabled": True}}, "fp16.enabled", ("True", "False", "training.precision")),
        ({"bf16": {"enabled": 0}}, "bf16.enabled", ("0", "False", "training.precision")),
        ({"zero_optimization": {"reduce_bucket_size": 7}}, "zero_optimization.reduce_bucket_size", ("7", "9", "zero.options.reduce_bucket_size")),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer", ("False", "True")),
        ({"optimizer": {"type": "Adam"}}, "optimizer", ("training section",)),
        ({"scheduler": {}}, "scheduler", ("training section",)),
        ({"zero_optimization": 2}, "zero_optimization", ("2", "an object")),
        ({"comms_logger": {"enabled": "auto"}}, "comms_logger.enabled", ("auto", "write a value, or remove it")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_conflicts_are_refused_by_name_with_both_values(own: Any, name: str, values: tuple[str, ...]) -> None:
    config = make(own=own, options={"reduce_bucket_size": 9})
    with pytest.raises(InputError) as error:
        deepspeed_config(config, 2)
    message = str(error.value)
    assert message.startswith(f"{name} is ")
    assert all(value in message for value in values)
    # All but what depends on the world size is found before there is a world.
    if name not in ("train_batch_size", "gradient_accumulation_steps"):
        with pytest.raises(InputError, match=f"^{name.replace('.', '[.]')} is "):
            check_own_config(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is not valid JSON"),
        ("[]", "no JSON object"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
    ],
)
def test_own_file_that_cannot_be_used(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        check_own_config(make(own=str(file)))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_is_filled_in_and_deepspeed_accepts_it(stage: int) -> None:
    zero = {"offload_optimizer": "cpu", **({"offload_base": "cpu"} if stage == 3 else {})}
    config = make(stage=stage, zero=zero)
    check_own_config(config)
    settings = deepspeed_config(config, 2)
    section = settings["zero_optimization"]
    assert section["offload_optimizer"] == {"device": "cpu"}
    assert section.get("offload_param") == ({"device": "cpu"} if stage == 3 else None)
    # The run's own optimizer, not DeepSpeed's CPU Adam, works on the host.
    assert settings["zero_force_ds_cpu_optimizer"] is False
    validate_with_deepspeed(settings, 2)
    assert "zero_force_ds_cpu_optimizer" not in deepspeed_config(make(stage=stage), 2)


def test_offloading_of_an_own_config_is_completed() -> None:
    own = {"zero_optimization": {"offload_optimizer": {"device": "auto", "pin_memory": False, "ratio": 0.5}}}
    settings = deepspeed_config(make(own=own, stage=3, zero={"offload_optimizer": "cpu"}), 2)
    section = settings["zero_optimization"]["offload_optimizer"]
    assert section == {"device": "cpu", "pin_memory": False, "ratio": 0.5}
    # Where the run says nothing, the own config decides; its optimizer then is the run's, too.
    settings = deepspeed_config(make(own={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}), 2)
    assert settings["zero_force_ds_cpu_optimizer"] is False
    contrary = {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/x"}}}
    with pytest.raises(InputError, match=r"offload_param\.device is 'nvme' .* but 'cpu' by zero\.offload_base"):
        check_own_config(make(own=contrary, stage=3, zero={"offload_base": "cpu"}))
    options = {"offload_optimizer": {"device": "cpu"}}
    config = make(options=options, zero={"offload_optimizer": "cpu"})
    deepspeed_config(config, 2)
    assert config.zero.options == {"offload_optimizer": {"device": "cpu"}}


def test_what_splits_layers_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match=r"^tensor_parallel\.autotp_size .* is 2"):
        check_own_config(make(own={"tensor_parallel": {"autotp_size": 2}}))


@pytest.mark.parametrize(
    ("stage", "zero", "message"),
    [
        (2, {"offload_optimizer": "nvme"}, r"\(zero\.offload_optimizer\) is 'nvme' at zero stage 2, .* use cpu, or stage 3$"),
        (3, {"offload_base": "nvme", "nvme_path": "no-such-folder"}, r"^zero\.nvme_path is 'no-such-folder', which is no folder"),
        (2, {"options": {"zero_quantized_weights": True}}, r"\(zero\.options\.zero_quantized_weights\) is set at zero stage 2"),
        (1, {"options": {"zero_hpz_partition_size": 2}}, r"\(zero\.options\.zero_hpz_partition_size\) is set at zero stage 1"),
        (2, {"options": {"offload_param": {"device": "cpu"}}}, r"\(zero\.offload_base\) is 'cpu' at zero stage 2"),
        (0, {"options": {"offload_optimizer": {"device": "cpu"}}}, r"\(zero\.offload_optimizer\) is 'cpu' at zero stage 0"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(tmp_path: Path, stage: int, zero: dict[str, Any], message: str) -> None:
    given = {"nvme_path": str(tmp_path), **zero}
    options = given.pop("options", None)
    config = make(stage=stage, options=options, zero=given)
    with pytest.raises(InputError, match=message):
        check_own_config(config)
        check_can_train_here(config)


def test_zero_plus_plus_passes_through() -> None:
    config = make(stage=3, options={"zero_hpz_partition_size": 4})
    check_own_config(config)
    assert deepspeed_config(config, 8)["zero_optimization"]["zero_hpz_partition_size"] == 4
    with pytest.raises(InputError, match=r"zero_hpz_partition_size is 4, which does not divide the 6 ranks"):
        deepspeed_config(config, 6)


def test_quantized_gathers_need_a_gpu() -> None:
    import torch

    for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        config = make(stage=3, options={name: True})
        if torch.cuda.is_available():
            check_can_train_here(config)
            continue
        with pytest.raises(InputError, match=rf"^zero\.options\.{name} needs CUDA"):
            check_can_train_here(config)


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_base"])
def test_a_checkpoint_is_not_put_on_a_disk(tmp_path: Path, section: str) -> None:
    disk = make(stage=3, zero={section: "nvme", "nvme_path": str(tmp_path)})
    check_own_config(disk)
    with pytest.raises(InputError, match=rf"^zero\.{section} .* is 'nvme', where a checkpoint cannot be put"):
        check_can_continue(disk)
    check_can_continue(make(stage=3, zero={section: "cpu"}))


def test_a_disk_needs_asynchronous_io(tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    config = make(stage=3, zero={"offload_optimizer": "nvme", "offload_base": "nvme", "nvme_path": str(tmp_path)})
    section = deepspeed_config(config, 2)["zero_optimization"]
    assert section["offload_param"] == section["offload_optimizer"] == {"device": "nvme", "nvme_path": str(tmp_path)}
    if AsyncIOBuilder().is_compatible():
        check_can_train_here(config)
        return
    with pytest.raises(InputError, match=r"asynchronous I/O cannot be built here: install libaio"):
        check_can_train_here(config)

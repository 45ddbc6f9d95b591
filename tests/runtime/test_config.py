import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.models import GPTConfig
from penstock.runtime.config import TrainConfig, check_world, load_config
from penstock.runtime.config_sections import ModelSection

BASE: dict[str, Any] = {"train": {"global_batch_size": 24, "micro_batch_size": 2, "steps": 100}}
DEEPSPEED_LTD: dict[str, Any] = {
    "enabled": True,
    "total_layer_num": 6,
    "random_ltd_layer_num": 4,
    "random_ltd_layer_id": [1, 2, 3, 4],
    "model_mask_name": "attention_mask",
    "model_type": "decoder",
    "hidden_state_order": "batch_seq_dim",
    "random_ltd_schedule": {
        "min_value": 16,
        "max_value": 64,
        "schedule_type": "fixed_linear",
        "schedule_config": {"require_steps": 80, "seq_per_step": 8},
    },
}


def test_defaults_and_lengths() -> None:
    config = load_config(BASE)
    assert (config.seed, config.pipe.stages, config.pipe.schedule, config.precision) == (1234, 1, "1f1b", "float32")
    assert config.total_steps == 100
    assert config.sequence_length is None
    assert config.tokens_per_step is None
    long = load_config(
        {"train": {"global_batch_size": 4, "micro_batch_size": 2, "total_tokens": 1000}}, ["model.context=32"]
    )
    assert (long.sequence_length, long.tokens_per_step, long.total_steps) == (32, 128, 7)
    shorter = load_config(long, ["data.sequence_length=16"])
    assert (shorter.sequence_length, shorter.total_steps) == (16, 15)


def test_files_and_overrides(tmp_path: Path) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text("train: {global_batch_size: 24, micro_batch_size: 2, steps: 100}\noptimizer: {lr: 1e-3}\n")
    (tmp_path / "run.json").write_text(json.dumps({**BASE, "optimizer": {"lr": 1e-3}}))
    assert load_config(yaml) == load_config(tmp_path / "run.json")
    changed = load_config(yaml, ["optimizer.lr=2e-3", "pipe.stages=2", "optimizer.lr=3e-3"])
    assert (changed.optimizer.lr, changed.pipe.stages) == (3e-3, 2)
    assert load_config(None, ["train={global_batch_size: 24, micro_batch_size: 2, steps: 100}"]) == load_config(BASE)


def test_to_dict_is_json_and_comes_back_equal() -> None:
    config = load_config(
        {
            **BASE,
            "random_ltd": DEEPSPEED_LTD,
            "model": {"num_layers": 6},
            "pipe": {"stages": 2, "partition_method": [0, 3, 8]},
            "sampling": {"strategy": "random"},
        }
    )
    assert load_config(json.loads(json.dumps(config.to_dict()))) == config


def test_what_only_python_can_give_is_described() -> None:
    for sampling, described in (
        ({"strategy": "stratified", "labels": np.zeros(3, dtype=np.int64)}, {"labels": "ndarray of int64[3]"}),
        ({"strategy": "weighted", "weights": str.upper}, {"weights": "str.upper"}),
    ):
        stored = load_config({**BASE, "sampling": sampling}).to_dict()
        assert json.loads(json.dumps(stored))["sampling"] == {**sampling, **described}


def test_values_do_not_change_after_loading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(BASE).train.steps = 5  # type: ignore[misc]


def test_the_model_section_has_the_keys_and_defaults_of_the_model() -> None:
    fields = {field.name: field for field in dataclasses.fields(GPTConfig)}
    fields["context"] = fields.pop("context_length")
    assert ModelSection.model_fields.keys() == {*fields, "name"}
    for name, field in fields.items():
        if field.default is not dataclasses.MISSING:
            assert ModelSection.model_fields[name].default == field.default, name


def test_the_models_shape_takes_what_is_missing_from_tokenizer_and_data() -> None:
    section = ModelSection(num_layers=2, hidden_size=8, num_heads=2, vocab_size=11)
    expected = GPTConfig(vocab_size=11, num_layers=2, hidden_size=8, num_heads=2, context_length=16)
    assert section.gpt_config(vocab_size=99, context=16) == expected
    with pytest.raises(ValueError, match=r"model\.context is not known"):
        section.gpt_config(vocab_size=99)
    with pytest.raises(ValueError, match=r"model\.vocab_size is not known"):
        ModelSection(context=8).gpt_config()


def test_the_docstrings_example_loads() -> None:
    import penstock.runtime.config as module

    assert module.__doc__ is not None
    example = module.__doc__.partition("::\n")[2]
    from penstock.data_pipeline.configuration import parse_yaml

    assert load_config(parse_yaml(example)).total_steps == 500


WRONG: list[tuple[list[str], str]] = [
    (["pipe.stage=2"], r"pipe\.stage: unknown key 'stage'; did you mean 'stages'"),
    (["optimiser.lr=1"], "did you mean 'optimizer'"),
    (["pipe.stages=0"], r"pipe\.stages: .*greater than or equal to 1"),
    (["pipe.schedule=1f1"], "did you mean '1f1b'"),
    (["pipe.schedule=forward_only"], "cannot train; take '1f1b' or another"),
    (["pipe.stages=2", "pipe.partition_method=[0, 8]"], r"lists 2 bounds, but 2 stages have 3"),
    (["data_parallel.replicas=5"], r"global_batch_size=24 .*2 \* 5 = 10; take a global batch of 20 or 30"),
    (["data_parallel.replicas=20"], r"= 40; take a global batch of 40"),
    (["train.micro_batch_size=5"], r"global_batch_size=24 is not divisible by micro_batch_size=5"),
    (["train.total_tokens=5"], r"exactly one .*steps=100 and total_tokens=5"),
    (["train.steps=null"], "exactly one .*neither"),
    (["train.steps=null", "train.total_tokens=5"], r"total_tokens needs a sequence length"),
    (["train.steps=null", "train.total_tokens=5", "data.sequence_length=8"], r"24 samples of 8 tokens = 192"),
    (["train.keep_checkpoints=0"], r"train\.keep_checkpoints"),
    (["model.name=gtp"], "did you mean 'gpt'"),
    (["model.num_heads=7"], r"hidden_size=192 is not a multiple of num_heads=7; .* 189 and 196"),
    (["model.context=8", "data.sequence_length=9"], r"sequence_length=9 is longer than model\.context=8"),
    (["compression.algorithm=onbit"], "did you mean 'onebit'"),
    (["compression.algorithm=onebit", "compression.options={block: 1}"], "did you mean 'block_size'"),
    (["compression.warmup_steps=101"], r"warmup_steps=101 is more than the run's 100 steps"),
    (["compression.bucket_mb=0"], r"compression\.bucket_mb"),
    (["compression={algorithm: int8, error_feedback: false, error_decay: 0.5}"], "error_feedback: false does without"),
    (["compression.weights=fp8"], r"each holds all of them; set sharding: fsdp2"),
    (
        ["compression.replicas_per_machine=2", "local_updates={method: diloco, period: 5}"],
        "local_updates exchange something else.*set replicas_per_machine: 1",
    ),
    (["local_updates={method: diloco, period: 5, error_feedback: false, error_decay: 0.5}"], "error_feedback is false"),
    (["optimizer.min_dimensions=2"], r"adamw sends none; remove them, or set them in the section compression"),
    (["optimizer={name: demo, full_precision: [a]}"], "demo sends a part of each only; remove them"),
    (["optimizer.name=adam"], "did you mean 'adamw'"),
    (["optimizer.name=onebit_adam"], "needs freeze_step"),
    (["optimizer.freeze_step=3"], "has no meaning for adamw"),
    (["optimizer={name: onebit_adam, freeze_step: 101}"], r"freeze_step=101 is more than .* \(for example to 20\)"),
    (["optimizer={name: onebit_adam, freeze_step: 9, gradient_clipping: 1}"], "remove gradient_clipping"),
    (
        ["optimizer={name: onebit_adam, freeze_step: 9}", "compression.algorithm=onebit"],
        "would both exchange gradients",
    ),
    (["optimizer.betas=[0.9, 1.0]"], r"betas=\[0\.9, 1\.0\]"),
    (["optimizer.lr=-1"], r"optimizer\.lr"),
    (["optimizer.lr=.inf"], r"optimizer\.lr"),
    (["schedule.decay=cosin"], "did you mean 'cosine'"),
    (["schedule={warmup_tokens: 1, warmup_steps: 1}"], "at most one of warmup_tokens=1 and warmup_steps=1"),
    (["precision=bf15"], "unknown precision 'bf15'; did you mean 'bf16'"),
    (["precision=bf16", "fp16.loss_scale=8"], "fp16 sets loss scaling, which precision=bf16 does not use"),
    (["precision=fp16", "fp16.min_loss_scale=1e6"], "raise the one or lower the other"),
    (["train.loss_weighting=token"], "did you mean 'tokens'"),
    (["precision=float23"], "did you mean 'float32'"),
    (["deadline_s=0"], "deadline_s"),
    (["sampling.batch_size=3"], r"sampling: batch_size is set by the run from train\.global_batch_size"),
    (["sampling.epochs=3"], r"epochs is set by the run from train\.steps or train\.total_tokens"),
    (["sampling.length=8"], r"length is set by the run from data\.sequence_length"),
    (["sampling.transforms=[pad]"], r"instead of transforms, give training_data=process_dataset"),
    (["sampling.column=text"], r"instead of column, give training_data=open_dataset"),
    (["sampling.stratgy=random"], r"sampling: DataSampler: stratgy: unknown key .* did you mean 'strategy'"),
    (["sampling.strategy=curriculum"], "strategy 'curriculum' needs curriculum"),
    (["random_ltd={min_tokens: 9, steps: 5}", "data.sequence_length=8"], r"min_tokens=9 is more than .* length 8"),
    (["random_ltd={min_tokens: 9, max_tokens: 8, steps: 5}"], "min_tokens=9 is more than max_tokens=8"),
    (["random_ltd={min_tokens: 1, steps: 5, layers: [4]}", "model.num_layers=4"], r"blocks are numbered 0\.\.3"),
    (["random_ltd={min_tokens: 1, steps: 5}", "model.num_layers=2"], "'middle' of 2 blocks is empty"),
    (["random_ltd={min_tokens: 1, steps: 5, layers: []}"], "layers is empty"),
    (["random_ltd={min_tokens: 1, steps: 5, layers: [1, 1]}"], "different block numbers"),
    (["random_ltd={mintokens: 1, steps: 5}"], "did you mean 'min_tokens'"),
    (["seed=x"], "seed: .*integer"),
]


@pytest.mark.parametrize(("overrides", "text"), WRONG, ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_a_users_mistake_is_refused_with_the_numbers(overrides: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_config(BASE, overrides)


def test_deepspeeds_section_is_translated_and_given_back() -> None:
    section = load_config(BASE | {"random_ltd": DEEPSPEED_LTD}).random_ltd
    assert section is not None
    assert (section.layers, section.min_tokens, section.max_tokens, section.steps) == ((1, 2, 3, 4), 16, 64, 80)
    back = section.scheduler_config(num_layers=6, sequence_length=128)
    assert back == {key: value for key, value in DEEPSPEED_LTD.items() if key != "enabled"}


def test_the_short_form_gives_deepspeeds_section() -> None:
    section = load_config(BASE, ["random_ltd={min_tokens: 32, steps: 50}"]).random_ltd
    assert section is not None
    assert section.layer_ids(6) == (1, 2, 3, 4)
    back = section.scheduler_config(num_layers=6, sequence_length=128)
    assert back["random_ltd_layer_num"] == 4
    assert back["random_ltd_schedule"]["max_value"] == 128
    assert not load_config(BASE, ["random_ltd={min_tokens: 32, steps: 50, enabled: false}"]).random_ltd_enabled


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"random_ltd_layer_num": 3}, "random_ltd_layer_num=3, but random_ltd_layer_id lists 4"),
        ({"random_ltd_schedule": None}, "needs the table random_ltd_schedule"),
        ({"random_ltd_schedule": {"schedule_config": {}}}, "needs min_value"),
        ({"model_typ": "decoder"}, "did you mean 'model_type'"),
        ({"random_ltd_schedule": {**DEEPSPEED_LTD["random_ltd_schedule"], "schedule_type": "x"}}, "'fixed_linear' or"),
    ],
)
def test_a_wrong_deepspeed_section_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_config(BASE | {"random_ltd": DEEPSPEED_LTD | change})


def test_deepspeeds_layer_count_must_be_the_models() -> None:
    with pytest.raises(ValueError, match="total_layer_num=6, but the model has 8 blocks"):
        load_config(BASE | {"random_ltd": DEEPSPEED_LTD}, ["model.num_layers=8"])


def test_world_size() -> None:
    two = load_config(BASE, ["pipe.stages=2"])
    assert check_world(two, 6) == 3
    with pytest.raises(ValueError, match=r"5 processes cannot form whole pipelines of pipe\.stages=2"):
        check_world(two, 5)
    with pytest.raises(ValueError, match=r"2 \* 5 = 10; take a global batch of 20 or 30"):
        check_world(two, 10)
    fixed = load_config(two, ["data_parallel.replicas=3"])
    assert check_world(fixed, 6) == 3
    machines = load_config(two, ["compression.replicas_per_machine=3"])
    with pytest.raises(ValueError, match=r"2 replicas cannot fill machines of .*=3; make it a divisor of 2"):
        check_world(machines, 4)
    with pytest.raises(ValueError, match=r"2 \* data_parallel\.replicas=3 = 6 processes, but 4 were started"):
        check_world(fixed, 4)


@given(size=st.integers(1, 512), micro=st.integers(1, 64), stages=st.integers(1, 8), replicas=st.integers(1, 16))
def test_micro_batches_share_the_batch_evenly_or_not_at_all(size: int, micro: int, stages: int, replicas: int) -> None:
    def build() -> int:
        config = load_config(
            {"train": {"global_batch_size": size, "micro_batch_size": micro, "steps": 1}, "pipe": {"stages": stages}}
        )
        return config.micro_batches(check_world(config, stages * replicas))

    if size % (micro * replicas) == 0:
        assert build() * micro * replicas == size
    else:
        with pytest.raises(ValueError, match=f"global_batch_size={size}"):
            build()


def test_a_configuration_is_taken_as_it_is() -> None:
    config = load_config(BASE)
    assert isinstance(config, TrainConfig)
    assert load_config(config) == config

"""Configuration: what people write wrong, and the sentence they get back."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_validator

from penstock.data_pipeline.configuration import apply_overrides, parse_yaml, read_mapping, validate_config


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Pipe(Strict):
    stages: int = Field(default=1, ge=1)
    schedule: str = "1f1b"


class Linear(Strict):
    kind: Literal["linear"]
    slope: float = 1.0


class Root(Strict):
    kind: Literal["root"]
    degree: int = 2


class Everything(Strict):
    pipe: Pipe = Pipe()
    maybe: Pipe | None = None
    many: list[Pipe] = []
    named: dict[str, Pipe] = {}
    tagged: Annotated[Linear | Root, Field(discriminator="kind")] | None = None
    even: int = 0

    @field_validator("even")
    @classmethod
    def _is_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd; take {value + 1}")
        return value


def test_valid_data_becomes_the_model() -> None:
    config = validate_config(Everything, {"pipe": {"stages": 4}, "named": {"a": {"schedule": "gpipe"}}})
    assert config.pipe.stages == 4
    assert config.named["a"].schedule == "gpipe"
    assert validate_config(Everything, config) is config


@pytest.mark.parametrize(
    ("data", "sentences"),
    [
        ({"pip": {}}, ["run.yaml: pip: unknown key 'pip'; did you mean 'pipe'?"]),
        ({"pipe": {"stges": 2}}, ["pipe.stges: unknown key 'stges'; did you mean 'stages'? Known: schedule, stages"]),
        ({"maybe": {"stges": 2}}, ["maybe.stges", "did you mean 'stages'?"]),
        ({"many": [{}, {"shedule": 2}]}, ["many.1.shedule", "did you mean 'schedule'?"]),
        ({"named": {"x": {"stage": 2}}}, ["named.x.stage", "did you mean 'stages'?"]),
        ({"tagged": {"kind": "root", "degre": 3}}, ["degre", "did you mean 'degree'?"]),
        ({"pipe": {"stages": "four"}}, ["pipe.stages", "valid integer", "got 'four'"]),
        ({"pipe": {"stages": 0}}, ["pipe.stages", "greater than or equal to 1", "got 0"]),
        ({"even": 3}, ["run.yaml: even: 3 is odd; take 4"]),
        ({"tagged": {"slope": 1}}, ["tagged"]),
        ({"pip": 1, "even": 3}, ["run.yaml: 2 problems", "pip: unknown key", "even: 3 is odd"]),
        ([1], ["run.yaml: expected a table of names, got [1]"]),
        ({"even": ["x"] * 1000}, ["even", "…"]),
    ],
)
def test_each_problem_names_its_place_and_a_remedy(data: Any, sentences: list[str]) -> None:
    with pytest.raises(ValueError, match="run") as caught:
        validate_config(Everything, data, "run.yaml")
    for sentence in sentences:
        assert sentence in str(caught.value)
    assert len(str(caught.value)) < 600
    assert caught.value.__context__ is None


def test_overrides_set_replace_and_create() -> None:
    data: dict[str, Any] = {"pipe": {"stages": 1}, "many": [{"stages": 1}, {"stages": 2}], "gone": None}
    result = apply_overrides(
        data,
        ["pipe.stages=4", "new.deep.lr=1e-3", "many.1.stages=7", "gone.back=[a, 1]", "empty=", "text='1'", "eq=a=b"],
    )
    assert result == {
        "pipe": {"stages": 4},
        "new": {"deep": {"lr": 0.001}},
        "many": [{"stages": 1}, {"stages": 7}],
        "gone": {"back": ["a", 1]},
        "empty": None,
        "text": "1",
        "eq": "a=b",
    }
    assert data == {"pipe": {"stages": 1}, "many": [{"stages": 1}, {"stages": 2}], "gone": None}


def test_overrides_change_no_table_of_the_callers() -> None:
    inner = OrderedDict(a=1)
    assert apply_overrides({"x": inner}, ["x.a=2"]) == {"x": {"a": 2}}
    assert inner == {"a": 1}


def test_overrides_keep_objects_as_they_are() -> None:
    dataset = object()
    assert apply_overrides({"data": {"train": dataset}}, ["data.seed=1"])["data"]["train"] is dataset


@pytest.mark.parametrize(
    "override", ["", "steps", "=3", "a..b=3", ".a=1", "a.=1", "a b=1", "pipe.stages.more=1", "many.5=1", "many.x=1"]
)
def test_malformed_overrides_are_refused(override: str) -> None:
    with pytest.raises(ValueError, match="override"):
        apply_overrides({"pipe": {"stages": 1}, "many": [1]}, [override])


def test_an_override_with_a_broken_value_is_refused() -> None:
    with pytest.raises(ValueError, match="not valid YAML"):
        apply_overrides({}, ["a=[1, 2"])


_names = st.text("abcdefgh_", min_size=1, max_size=6)


@given(st.lists(_names, min_size=1, max_size=5), st.integers() | st.booleans() | st.none())
def test_an_override_is_found_where_it_was_put(path: list[str], value: object) -> None:
    text = json.dumps(value)
    found: Any = apply_overrides({}, [f"{'.'.join(path)}={text}"])
    for name in path:
        found = found[name]
    assert found == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_yaml_as_python_prints_them(number: float) -> None:
    assert parse_yaml(repr(number)) == number
    assert parse_yaml(f"{number:.17e}") == number


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("optimizer:\n  lr: 3e-4\n  betas: [0.9, 0.95]\n")
    (tmp_path / "a.json").write_text('{"optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]}}')
    (tmp_path / "empty.yml").write_text("# nothing\n")
    expected = {"optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]}}
    assert read_mapping(tmp_path / "a.yaml") == read_mapping(tmp_path / "a.json") == expected
    assert read_mapping(tmp_path / "empty.yml") == {}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.toml", b"x = 1", "ends in .yaml"),
        ("a.yaml", b"- 1\n- 2\n", "a table of names, found list"),
        ("a.yaml", b"x: 1\nx: 2\n", "'x' appears twice"),
        ("a.json", b'{"x": 1, "x": 2}', "'x' appears twice"),
        ("a.yaml", b"x: [1\n", "not valid YAML"),
        ("a.yaml", b"x: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("a.json", b'{"x": ', "a.json"),
        ("a.yaml", b"\xff\xfe\x00", "not UTF-8"),
        ("a.json", b"[" * 100_000, "a.json"),
        ("a.yaml", b"[" * 5_000, "a.yaml"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as caught:
        read_mapping(tmp_path / name)
    assert sentence in str(caught.value)


def test_a_missing_file_or_a_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such"):
        read_mapping(tmp_path / "none.yaml")
    (tmp_path / "dir.yaml").mkdir()
    with pytest.raises(ValueError, match="a directory"):
        read_mapping(tmp_path / "dir.yaml")

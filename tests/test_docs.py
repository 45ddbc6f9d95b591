"""The documentation is true: its tables of keys are the models', its programs run, its configurations load."""

import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from penstock.data_pipeline import PipelineConfig, load_configuration
from penstock.data_pipeline.data_sampling import SamplingConfig
from penstock.data_pipeline.data_sampling.config import CurriculumConfig, MetricConfig
from penstock.data_pipeline.data_sampling.curriculum import ScheduleDetails
from penstock.data_pipeline.data_sampling.mixture import CorpusConfig, MixtureConfig
from penstock.data_pipeline.data_sampling.pacing import PacingConfig
from penstock.data_pipeline.data_sampling.subset import SubsetConfig
from penstock.data_pipeline.data_sampling.token_budget import TokenBudgetConfig
from penstock.data_pipeline.random_ltd import RandomLTDConfig
from penstock.runtime.batching_section import SequenceLengthSection
from penstock.runtime.config import TrainConfig, load_config
from penstock.runtime.config_sections import ModelSection
from penstock.runtime.local_updates_section import LocalUpdatesSection
from penstock.runtime.random_ltd_section import RandomLTDSection

DOCS = Path(__file__).resolve().parent.parent / "docs"
METRIC = "sampling.curriculum.metrics.NAME."
# What the run refuses in its sampling table.
NOT_IN_A_RUN = [
    "batch_size",
    "drop_last",
    "rank",
    "num_replicas",
    "num_samples",
    "epochs",
    "length",
    "stride",
    "column",
    "transforms",
]


def shown(field: FieldInfo) -> str:
    """A field's default, as the tables write it."""
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "the defaults below"
    if value is None:
        return "none"
    text = str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)
    return f"`{text}`"


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a model and its sections, with its default."""
    for name, field in model.model_fields.items():
        yield prefix + name, shown(field)
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel) and section is not ScheduleDetails:
            yield from keys_of(section, f"{prefix}{name}.")


def keys_on_page(start: str, end: str | None, name: str = "configuration.md") -> list[tuple[str, str]]:
    """Every key and its default in the tables between two headings of a page, the reference unless another is named."""
    page = (DOCS / name).read_text()
    part = page.partition(f"\n## {start}\n")[2]
    if end is not None:
        part = part.partition(f"\n## {end}\n")[0]
    return re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| [^|]", part, re.MULTILINE)


def test_the_reference_has_every_key_of_a_run_with_its_default() -> None:
    known = {
        **dict(keys_of(TrainConfig)),
        **dict(keys_of(ModelSection, "model.")),
        **dict(keys_of(RandomLTDSection, "random_ltd.")),
        **dict(keys_of(LocalUpdatesSection, "local_updates.")),
        **dict(keys_of(SamplingConfig, "sampling.")),
        **dict(keys_of(SubsetConfig, "sampling.subset.")),
        **dict(keys_of(MixtureConfig, "sampling.mixture.")),
        **dict(keys_of(CorpusConfig, "sampling.mixture.corpora.NAME.")),
        **dict(keys_of(CurriculumConfig, "sampling.curriculum.")),
        **dict(keys_of(PacingConfig, "sampling.curriculum.pacing.")),
        **dict(keys_of(TokenBudgetConfig, "batching.token_budget.")),
        **dict(keys_of(SequenceLengthSection, "batching.sequence_length.")),
        **dict(keys_of(MetricConfig, METRIC)),
        **dict(keys_of(ScheduleDetails, f"{METRIC}schedule_config.")),
    }
    page = keys_on_page("A run", "A data pipeline")
    assert len(page) == len(dict(page))
    refused = {f"sampling.{name}" for name in NOT_IN_A_RUN}
    assert refused < set(known)
    assert dict(page) == {key: default for key, default in known.items() if key not in refused}


@pytest.mark.parametrize("name", NOT_IN_A_RUN)
def test_what_the_reference_leaves_out_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        load_config({"train": {"global_batch_size": 1, "micro_batch_size": 1, "steps": 1}, "sampling": {name: 1}})


def test_the_reference_has_every_key_of_a_data_pipeline_with_its_default() -> None:
    page = keys_on_page("A data pipeline", None)
    assert len(page) == len(dict(page))
    assert dict(page) == dict(keys_of(PipelineConfig))


def test_deepspeeds_section_of_random_ltd_is_told_with_every_key_and_its_default() -> None:
    page = keys_on_page("The section", "Stopping, going on, and the weights", "random-ltd.md")
    assert len(page) == len(dict(page))
    assert dict(page) == dict(keys_of(RandomLTDConfig))


def checked(kind: str) -> str:
    """The one block of the documentation that is announced by ``<!-- checked: KIND -->``."""
    pages = "\n".join(path.read_text() for path in sorted(DOCS.glob("*.md")))
    (text,) = re.findall(rf"<!-- checked: {re.escape(kind)} -->\n```\w+\n(.*?)```", pages, re.DOTALL)
    return str(text)


def test_the_first_run_configuration_loads() -> None:
    config = load_config(yaml.safe_load(checked("run.yaml")))
    assert config.micro_batches(2) == 4


def test_the_pipelines_configuration_loads() -> None:
    assert load_configuration(yaml.safe_load(checked("pipeline.yaml"))).training.max_steps == 100


def test_the_loop_of_the_data_pipeline_runs(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", checked("python") + "\nassert results[-1]['loss'] < results[0]['loss']"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr


def slugs(markdown: str) -> set[str]:
    """The anchors of a file's headings, as a repository's pages have them."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_beside_each_part_of_the_readme_stands_a_link_for_readers_of_the_file() -> None:
    readme = (DOCS.parent / "README.md").read_text()
    for path in sorted(DOCS.glob("*.md")):
        page = path.read_text()
        linked = re.findall(r'\]\(\.\./README\.md#([\w-]+)\)\.\n\n--8<-- "README\.md:\w+"$', page, re.MULTILINE)
        assert len(linked) == page.count("--8<--"), path
        assert set(linked) <= slugs(readme), path


def named_imports() -> set[tuple[str, str]]:
    """Module and name of every import of the project in the pages' programs."""
    found = set()
    for path in DOCS.glob("*.md"):
        for module, names in re.findall(r"^from (penstock[\w.]*) import ([\w, ]+)$", path.read_text(), re.MULTILINE):
            found |= {(module, name.strip()) for name in names.split(",")}
    return found


@pytest.mark.parametrize(("module", "name"), sorted(named_imports()))
def test_the_import_exists(module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name)


def documented() -> list[str]:
    """Every object that the reference documents."""
    pages = [path.read_text() for path in sorted((DOCS / "reference").glob("*.md"))]
    return [target for page in pages for target in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)]


def test_the_reference_documents_each_object_once_and_all_that_packages_export() -> None:
    targets = documented()
    assert len(targets) == len(set(targets))
    names = {target.rpartition(".")[2] for target in targets}
    for package in ("pipe", "pipe.schedule", "compression", "data_pipeline.data_sampling", "models"):
        module = importlib.import_module(f"penstock.{package}")
        missing = {name for name in module.__all__ if name not in names and (callable(getattr(module, name)))}
        assert missing <= {"Payload", "main"}, f"{package}: {missing}"


@pytest.mark.parametrize("target", documented())
def test_the_documented_object_exists(target: str) -> None:
    assert pkgutil.resolve_name(target).__doc__  # imports a module that nothing else has imported yet

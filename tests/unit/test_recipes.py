"""Every recipe of engines/recipes fits its hardware, as a dry run counts it; bad recipes are refused with one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.rank_files import open_checkpoint
from pt_trtllm.checkpoint.spec import model_tensors
from pt_trtllm.cli.build import command
from pt_trtllm.engine.memory import weight_bytes
from pt_trtllm.engine.recipe import GIB, Recipe, read_recipe
from pt_trtllm.engine.tensorrt.weights import MappedWeights
from pt_trtllm.errors import ConfigError

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).parents[2] / "engines" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
BILLIONS = {"6b": (5.5, 6.5), "13b": (12.5, 13.5), "30b": (29, 31), "moe": (130, 160)}


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a good recipe, with lines replaced."""

    def edit(replace: dict[str, str]) -> Path:
        text = (FOLDER / "pt-6b-d4-2xrtx5090.yaml").read_text()
        for old, new in replace.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "recipes").mkdir()
        (tmp_path / "models").symlink_to(FOLDER.parent / "models")
        path = tmp_path / "recipes" / "edited.yaml"
        path.write_text(text)
        return path

    return edit


def num_parameters(recipe: Recipe) -> int:
    total, model = 0, recipe.checkpoint.model
    for spec in model_tensors(model, separate_head=not model.tie_word_embeddings):
        total += spec.rows * spec.columns * (model.num_tracks if spec.per_track else 1)
    return total


def test_the_sizes_intervals_and_machines_people_ask_for_are_there() -> None:
    names = {path.stem for path in RECIPES}
    machines = ("8xh100", "4xl40s", "2xrtx5090")
    sizes = ("6b", "13b", "30b")
    wanted = {f"pt-{size}-d{interval}-{machine}" for size in sizes for interval in (2, 4, 8) for machine in machines}
    wanted |= {f"dense-{size}-tp-{machine}" for size in sizes for machine in machines}
    wanted |= {"pt-moe-8xh100", "pt-moe-8xh200", "pt-moe-4xl40s", "pt-30b-d4-8xh200"}
    assert wanted <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_hardware_and_holds_what_its_name_says(path: Path) -> None:
    recipe = read_recipe(path)
    recipe.check_memory()
    memory = recipe.memory()
    assert memory.weights * recipe.checkpoint.world_size > 0.5 * num_parameters(recipe) * 0.5  # int4 at least
    assert memory.total <= recipe.hardware.usable_gib * GIB
    low, high = BILLIONS[path.stem.split("-")[1]]
    assert low <= num_parameters(recipe) / 1e9 <= high
    interval = next((int(part[1:]) for part in path.stem.split("-") if part[0] == "d" and part[1:].isdigit()), None)
    assert interval in (None, recipe.checkpoint.model.sync_interval)
    assert recipe.checkpoint.model.num_tracks == (1 if path.stem.startswith("dense") else 8)


def test_a_dry_run_prints_the_memory_of_a_rank() -> None:
    done = CliRunner().invoke(command, ["--recipe", str(FOLDER / "pt-30b-d4-8xh100.yaml"), "--dry-run"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "8 tracks of 48 layers fused every 4, 8 ranks" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["weights", "kv", "activations", "runtime", "total", "fits"]
    assert all(float(line.split()[-4]) > 0 for line in lines[1:6])


def test_the_weights_are_counted_to_the_byte(make_source: Callable[..., Path], tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "checkpoint", ConvertOptions(world_size=2))
    config, manifest = open_checkpoint(tmp_path / "checkpoint")
    for rank in range(2):
        assert MappedWeights(tmp_path / "checkpoint", config, manifest, rank).num_bytes == weight_bytes(config)


@pytest.mark.parametrize(
    ("replace", "says"),
    [
        (
            {"max_batch_size: 64": "max_batch_size: 512"},
            r"a rank needs .* GiB, 30.4 of NVIDIA GeForce RTX 5090's 32 GiB",
        ),
        ({"count: 2": "count: 1"}, "2 ranks on 1 GPUs"),
        ({"world_size: 2": "world_size: 3"}, "8 tracks cannot be spread over 3 ranks"),
        ({"model: pt-6b": "model: pt-7b"}, "pt-7b.yaml: no such file"),
        ({"dtype: bfloat16\n": ""}, r"missing keys \['dtype'\]"),
        ({"max_seq_len": "max_seq_length"}, "max_seq_length"),
        ({"hardware:": "hardwear:"}, "unknown|hardwear"),
        ({"sync_interval: 4": "sync_interval: 5"}, "sync_interval 5 does not divide"),
        ({"build:": "build: ["}, "cannot be read as YAML"),
    ],
)
def test_a_bad_recipe_is_refused(edited: Callable[..., Path], replace: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_recipe(edited(replace)).check_memory()


def test_a_checkpoint_of_another_model_is_refused(make_source: Callable[..., Path], tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "checkpoint", ConvertOptions(world_size=2))
    config, _ = open_checkpoint(tmp_path / "checkpoint")
    recipe = read_recipe(FOLDER / "pt-6b-d4-2xrtx5090.yaml")
    with pytest.raises(ConfigError, match="vocab_size is 97, the recipe says 32000"):
        recipe.check_checkpoint(config, tmp_path)


def test_limits_beside_a_recipe_are_refused() -> None:
    recipe = str(FOLDER / "pt-6b-d4-2xrtx5090.yaml")
    done = CliRunner().invoke(command, ["--recipe", recipe, "--dry-run", "--max-batch-size", "8"])
    assert isinstance(done.exception, ConfigError)
    assert "--max-batch-size come from the recipe" in str(done.exception)

"""Recipes: the shipped ones load, and errors name the file and the key."""

import pytest

from quantize8 import RecipeError
from quantize8.files import resource_dir
from quantize8.recipe import Recipe, load_recipe


def test_shipped_recipes():
    assert load_recipe("llm-int8") == Recipe("llm-int8", 6.0)
    assert load_recipe("int8") == Recipe("int8", 0.0)
    assert load_recipe("int8-all") == Recipe("int8-all", 6.0, output_head=True)
    for path in resource_dir("configs").glob("*.toml"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 20 and lines[0].startswith("# ")


def test_threshold_of_the_command_line_wins():
    assert load_recipe("llm-int8", 3.5).threshold == 3.5


def test_own_file_with_globs(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('threshold = 5\nskip = ["model.layers.0.*", "*.down_proj"]\n')
    recipe = load_recipe(str(path))
    assert recipe.name == "mine" and recipe.threshold == 5.0
    assert recipe.skips("model.layers.0.mlp.up_proj") and recipe.skips("x.down_proj")
    assert not recipe.skips("model.layers.10.mlp.up_proj")
    flags = {"output_head": False, "embeddings": False, "towers": False}
    assert recipe.as_json() == {"name": "mine", "threshold": 5.0, **flags, "skip": list(recipe.skip)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threshold = 6.0\nthreshhold = 5.0", "unknown key 'threshhold'"),
        ("skip = []", "threshold must be a number"),
        ("threshold = true", "threshold must be a number"),
        ("threshold = -1", "must be 0"),
        ("threshold = nan", "must be 0"),
        ("threshold = inf", "must be 0"),
        ("threshold = 6.0\nskip = 'a'", "skip must be a list"),
        ("threshold = 6.0\nskip = [1]", "skip must be a list"),
        ("threshold = 6.0\noutput_head = 1", "output_head must be true or false"),
        ("threshold = ", "not valid TOML"),
        ("name = 'x'\nthreshold = 6.0", "unknown key 'name'"),
    ],
)
def test_wrong_recipes_name_the_file_and_the_key(text, message, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(str(path))
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(str(tmp_path / "x.toml"))


@pytest.mark.parametrize("name", ["nope", "../secrets", "missing.toml"])
def test_unknown_recipes_name_the_known_ones(name):
    with pytest.raises(RecipeError, match="int8, int8-all, int8-embeddings, llm-int8, towers"):
        load_recipe(name)

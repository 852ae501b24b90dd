"""Command lines made from dataclasses, with a section of a recipe under them."""

from dataclasses import dataclass, field

import pytest

from rex_rag.commands.sections import parse_section


@dataclass
class Settings:
    name: str = field(default="some", metadata={"help": "May not be left out."})
    subset: int | None = field(default=None, metadata={"help": "May be."})
    stemmer: str | None = field(default="english", metadata={"help": "May be, and is there by default."})
    corpus: list[str] = field(default_factory=list, metadata={"help": "Several."})


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("part:\n  subset: 200\n  corpus: [a, b]\n")
    return path


def parse(words, **options):
    return parse_section("command", "What it does.", "part", (Settings,), [str(word) for word in words], **options)[0]


def test_the_command_line_goes_over_the_recipe_and_the_recipe_over_the_defaults(recipe):
    assert parse([]) == Settings("some", None, "english", [])
    assert parse(["--config", recipe]) == Settings("some", 200, "english", ["a", "b"])
    assert parse(["--config", recipe, "--subset", 5, "--corpus", "c"]) == Settings("some", 5, "english", ["c"])


@pytest.mark.parametrize(
    ("words", "subset", "stemmer"),
    [
        (["--subset", "none"], None, "english"),
        (["--subset=none", "--stemmer", "null"], None, None),
        (["--stemmer", "none", "--name", "none"], 200, None),
        (["--subset", "5", "--subset", "none"], None, "english"),
        (["--subset", "none", "--subset", "5"], 5, "english"),
    ],
)
def test_none_unsets_what_may_be_left_out(recipe, words, subset, stemmer):
    settings = parse(["--config", recipe, *words])
    assert (settings.subset, settings.stemmer) == (subset, stemmer)
    assert settings.name == ("none" if "--name" in words else "some")  # a text that must be there stays a text


def test_none_in_a_recipe_means_the_same(recipe):
    recipe.write_text("part:\n  stemmer: none\n  name: none\n")
    assert parse(["--config", recipe]) == Settings("none", None, None, [])


def test_an_unknown_key_of_a_recipe_is_named_with_the_one_that_was_meant(recipe):
    recipe.write_text("part:\n  subsets: 3\n")
    with pytest.raises(ValueError, match=r"under `part:`: unknown keys: 'subsets' \(did you mean subset\?\)"):
        parse(["--config", recipe])
    recipe.write_text("part:\n  no: 3\n  1: 4\n  corpora: a\n")
    with pytest.raises(ValueError, match=r"unknown keys: '1', 'False', 'corpora' \(did you mean corpus\?\)"):
        parse(["--config", recipe])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stemer", "none"], r"^unknown option --stemer \(did you mean --stemmer\?\)$"),
        (["--stemer=english", "--corpus", "a"], r"^unknown option --stemer \(did you mean --stemmer\?\)$"),
        (
            ["--corpus", "a", "--subsets", "5", "--zzz"],
            r"^unknown options --subsets \(did you mean --subset\?\), --zzz",
        ),
        (["--sub", "5"], r"^unknown option --sub"),  # not taken for a beginning of another
        (["--name", "a", "b"], r"^unexpected 'b': options begin with --"),
    ],
)
def test_an_unknown_option_is_named_with_the_one_that_was_meant(words, said):
    with pytest.raises(ValueError, match=said):
        parse(words)


def test_options_that_a_command_adds_are_known(recipe):
    def switches(parser):
        parser.add_argument("--dry-run", action="store_true")

    words = ["--config", str(recipe)]
    _, options = parse_section("c", "", "part", (Settings,), [*words, "--dry-run"], switches)
    assert options.dry_run
    with pytest.raises(ValueError, match=r"unknown option --dry-rum \(did you mean --dry-run\?\)"):
        parse_section("c", "", "part", (Settings,), [*words, "--dry-rum"], switches)

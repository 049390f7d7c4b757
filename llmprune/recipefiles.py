"""Recipes as YAML files."""

from collections import Counter
from pathlib import Path
from typing import Any

from llmprune.errors import RecipeError, first_line
from llmprune.recipe import require_known


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return the options of a YAML recipe file.

    Raises:
        RecipeError: the file is missing or is not a YAML mapping, or says something twice.
    """
    import yaml

    try:
        options = yaml.load(Path(path).read_text("utf-8"), _loader())
    except OSError as error:
        raise RecipeError(f"recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or no date of a calendar
        raise RecipeError(f"recipe {path} is not valid YAML: {first_line(error)}") from None
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise RecipeError(f"recipe {path} must map option names to values, such as 'method: wanda'")
    require_known(options)
    if not isinstance(given := options.get("method_options", {}), dict):  # to which the command line may add
        raise RecipeError(f"recipe {path}: method_options must map names to values, not {given!r}")
    return options


def _loader() -> Any:
    """Return a safe YAML loader that takes `2:4` for the text that it is; YAML 1.1 has it as 124, in base 60.

    It takes no aliases, with which a few lines can stand for more values than fit in memory, and no name twice in one
    mapping, of which only the last would count.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it refers to a value by an alias (*name), write the value out")
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            for name, count in Counter(str(key.value) for key, _ in node.value).items():
                if count > 1:
                    raise yaml.YAMLError(f"'{name}' stands twice in one mapping, leave one out")
            return node

    def whole_number(loader: Loader, node: yaml.ScalarNode) -> str | int:
        return node.value if ":" in node.value else int(loader.construct_yaml_int(node))

    Loader.add_constructor("tag:yaml.org,2002:int", whole_number)
    return Loader

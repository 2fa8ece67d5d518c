"""YAML as other people's libraries read it: its values, and what of it is refused."""

from typing import Any

import yaml
import yamlcore
from ruamel.yaml import YAML


def by_ruamel(text: str) -> Any:
    reader = YAML(typ="safe", pure=True)
    # A date is none of the core schema's: ruamel.yaml knows it from YAML 1.1.
    reader.constructor.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)
    return reader.load(text)


def by_yamlcore(text: str) -> Any:
    return yaml.load(text, Loader=yamlcore.CoreLoader)


def first_unsupported(text: str) -> str | None:
    """The first that PyYAML's scanner meets of what is refused."""
    has_begun = False
    for token in yaml.scan(text):
        match token:
            case yaml.AnchorToken():
                return "anchors (&)"
            case yaml.AliasToken():
                return "aliases (*)"
            case yaml.TagToken():
                return "tags (!)"
            case yaml.DirectiveToken():
                return "directives (%)"
            case yaml.DocumentStartToken() if has_begun:
                return "multiple documents (---)"
            case yaml.KeyToken() if text[token.start_mark.index] == "?" and text[token.start_mark.index + 1] in " \n":
                return "complex keys (?)"
        has_begun = has_begun or not isinstance(token, yaml.StreamStartToken)
    return None

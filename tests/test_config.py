"""Settings: where each value comes from, and that a wrong one stops the start with its name and the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from ash.config import Secret, load_config, markdown
from ash.errors import ConfigError


def test_a_flag_wins_over_the_variable_and_that_over_the_default() -> None:
    config = load_config({"port": 5000}, {"ASH_PORT": "6000", "ASH_HOST": "::1"})
    assert (config.port, config.sources["port"]) == (5000, "flag")
    assert (config.host, config.sources["host"]) == ("::1", "ASH_HOST")
    assert (config.warm_sandboxes, config.sources["warm_sandboxes"]) == (2, "default")


@pytest.mark.parametrize(
    ("flags", "environ", "words"),
    [
        ({"prot": 1}, {}, "unknown setting 'prot'"),
        ({}, {"ASH_PROT": "1"}, "unknown variable ASH_PROT"),
        ({}, {"ASH_PORT": "many"}, "ASH_PORT='many': must be a whole number"),
        ({"port": -1}, {}, "--port='-1': must be at least 0"),
        ({"port": 65536}, {}, "--port='65536': must be at most 65535"),
        ({"idle_timeout": "nan"}, {}, "at least"),
        ({"sandbox": "docker"}, {}, "must be one of bwrap, none"),
        ({}, {"CLAUDE_CODE_USE_BEDROCK": "perhaps"}, "must be one of 1, true"),
    ],
)
def test_a_wrong_value_is_named_with_its_reason(flags: dict[str, object], environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(flags, environ)


def test_a_secret_shows_nowhere() -> None:
    config = load_config({}, {"ANTHROPIC_API_KEY": "sk-canary"})
    assert config.anthropic_api_key.reveal() == "sk-canary"
    assert "canary" not in f"{config} {config.anthropic_api_key} {config.anthropic_api_key!r} {vars(config)}"
    assert not Secret("")


def test_every_setting_is_in_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    assert markdown() in page, "put the output of `ash config --markdown` into docs/settings.md"

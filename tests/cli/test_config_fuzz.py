# ruff: noqa: E501
"""Any value of any setting is taken, or refused in one line before anything is made; so is any command line."""

import copy
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from tiny import ROOT, configure, mistake

from dalle.cli import entry
from dalle.errors import UserError
from dalle.launch.overrides import quote
from dalle.training import fit
from dalle.training.checks import check_config

ALONE = ("clip", "vae", "dvae", "vqgan")  # need no other stage: tried up to the first step
MODELS = (*ALONE, "prior", "ar_prior", "decoder", "gan", "dalle", "dit")
GROUPS = (
    "optimizer",
    "sampler",
    "trainer",
    "callbacks",
    "datamodule",
    "model",
    "data",
    "seed",
    "name",
    "stage",
)
SAME = (
    "accelerator",
    "devices",
    "strategy",
    "num_nodes",
    "plugins",
)  # nobody wants sixteen processes in a test

VALUES = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 5, 7, 16, 2**31, 2**63, 10**30, 0.0, 0.5, 1.5, -0.1, 1e-9, 1e30]),
    st.sampled_from([math.nan, math.inf, -math.inf, None, True, False, "", "foo", "1", "/nowhere", "none", "null"]),
    st.sampled_from([[], {}, [0], [1, 2], [0.9, 0.99], [2, 3], [math.nan], ["a"], [None], [[1], [2]], {"a": 1}]),
    st.sampled_from([{"_target_": "torch.nn.Identity"}, {"_target_": "torch.nn.Linear"}, {"_target_": 5}]),
    st.integers(-10, 200),
    st.floats(),
    st.text(max_size=5),
)  # fmt: skip


def leaves(node: Any, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all settings, groups of them included."""
    found = [place] if place else []
    if isinstance(node, dict):
        found += [path for key, value in node.items() for path in leaves(value, (*place, key))]
    return found


@cache
def plain(model: str) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    config = configure(model, Path("logs"))
    paths = [p for p in leaves(config) if p[0] in GROUPS and p[-1] not in SAME and p[-1] != "_partial_"]
    return config, paths


def changed(model: str, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The configuration with one setting changed where it stands, and where others refer to it."""
    config = copy.deepcopy(plain(model)[0])
    places = [path]
    if path[0] in ("optimizer", "sampler"):
        places.append(("model", *path))
    if path[0] == "data":
        places.append(("datamodule", "source", *path[1:]))
    for place in places:
        node: Any = config
        for key in place[:-1]:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[place[-1]] = copy.deepcopy(value)
    return config


class Started(Exception):
    """Training has begun."""


@pytest.fixture
def here(monkeypatch, tmp_path):
    def start(*_: Any, **__: Any) -> None:
        raise Started

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lightning.Trainer, "fit", start)
    monkeypatch.setattr("subprocess.Popen", start)
    return tmp_path


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_of_any_setting(here, data):
    model = data.draw(st.sampled_from(MODELS))
    path = data.draw(st.sampled_from(plain(model)[1]))
    value = data.draw(VALUES)
    config = changed(model, path, value)
    note = f"{model} {'.'.join(path)}={value!r}"
    try:
        fit.train(config) if model in ALONE else check_config(config)
    except Started:
        shutil.rmtree(here / "logs", ignore_errors=True)
    except Exception as error:  # any: what is said of it is looked at
        line = entry.said(error)
        assert entry.BUG not in line, f"{note}: {line}"
        assert "\n" not in line
        assert not list(here.iterdir()), f"{note}: {line}: but something is left"


WORDS = st.sampled_from(
    ["model", "optimizer", "optimizer.lr", "modle", "data", "callbacks", "logger", "name", "paths", "seed", "debug",
     "experiment", "model/net", "trainer", "paths.logs", "hydra", "foo", "+foo", "~optimizer", "++model.net", ""]
)  # fmt: skip
TEXT = st.sampled_from(
    ["", "prior", "null", "[", "]", "[]", "{}", "{a:1}", "'", '"', "'a", "a'b", "${name}", "${nowhere}", "${name", "a=b",
     "1,2", "a b", "\\", "$", "???", "[adamw,sgd]", "nan", "-1", "é赤", "(", "!", "~", "@", "a:b"]
)  # fmt: skip


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(key=WORDS, sign=st.sampled_from(["=", "=", "==", ""]), value=TEXT)
def test_any_command_line(key, sign, value):
    argument = f"{key}{sign}{value}"
    try:
        entry.check_words([argument], entry.groups(ROOT / "conf"))
        error = mistake(entry.quoted(argument))
    except AssertionError:  # it is none
        return
    except UserError as refused:
        error = refused
    line = entry.said(error)
    assert entry.BUG not in line, f"{argument}: {line}"
    assert "\n" not in line


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_path_comes_through_a_command_line(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(f"paths.run={quote(text)}")
    config: Any = OmegaConf.create({"paths": {"run": override.value()}})
    assert isinstance(config, DictConfig)
    assert config.paths.run == text

"""Tests of `~` in paths of flags and configs, and of bucket paths."""

import sys
from types import ModuleType

import jax
import pytest

from hivit_jax import config as configs
from hivit_jax import main
from hivit_jax.data.sources.registry import open_source
from hivit_jax.errors import ConfigError, MissingPackage
from hivit_jax.paths import absolute, expand
from hivit_jax.xla.compile import enable_compilation_cache


@pytest.fixture
def home(monkeypatch, tmp_path):
    """Return an empty directory, which is the home directory during the test."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_expand_replaces_a_leading_tilde(home):
    """A later `~`, a `~` in an address and the `~` of an unknown user are unchanged."""
    assert expand("~/x") == f"{home}/x"
    assert expand(home / "~x") == f"{home}/~x"
    for path in ("", "x/~/y", "gs://bucket/~/x", "hf://~/x", "~no-such-user-7/x"):
        assert expand(path) == path


def test_tilde_is_expanded_in_flags(home):
    argv = ["--config=x", "--workdir=~/x"]
    assert main.parse(argv)[0].workdir == f"{home}/x"
    flags = main.parse([*argv, "--mode=eval", "--checkpoint=~/y"])[0]
    assert flags.checkpoint == f"{home}/y"


def test_tilde_is_expanded_in_recipe_paths_but_not_in_addresses(home, monkeypatch):
    (home / "own.py").write_text(
        "def get_config(size='16'):\n"
        "  return dict(task='mae', model=dict(name='mae_hivit_tiny', image_size=16 *"
        " int(size)))\n"
    )
    assert configs.load("~/own.py:4").model.image_size == 64
    assert str(absolute("~/x")) == f"{home}/x"
    monkeypatch.setitem(sys.modules, "gcsfs", ModuleType("gcsfs"))
    monkeypatch.setenv("EPATH_USE_TF", "false")
    assert str(absolute("gs://b/~")) == "gs://b/~"


def test_bucket_workdir_requires_gcsfs_and_the_scheme_gs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingPackage, match=r"run pip install 'hivit-jax\[gcs\]'"):
        absolute("gs://bucket/run")
    message = "s3://bucket/run: expected .* gs://BUCKET.*\nUse a directory that all"
    with pytest.raises(ConfigError, match=message):
        absolute("s3://bucket/run")


def test_tilde_is_expanded_in_data_dir(home):
    """The `~` of an unknown user stays in the path, which does not exist."""
    config = configs.load("mae_base", ["--config.data.name=folder"])
    for directory, path in (("~/d", f"{home}/d"), ("~no-such-user-7/d", "~no-such")):
        with config.unlocked():
            config.data.dir = directory
        with pytest.raises(ConfigError, match=f"{path}.* does not exist"):
            open_source(config.data, "train")


def test_tilde_is_expanded_in_the_path_of_the_compilation_cache(home, monkeypatch):
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setattr(
        type(jax.config), "jax_compilation_cache_dir", "", raising=False
    )
    enable_compilation_cache("~/programs")
    assert settings == {"jax_compilation_cache_dir": f"{home}/programs"}

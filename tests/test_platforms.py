"""Tests of the platform of each command, and of libtpu on machines without a chip."""

import os
import sys

import jax
import pytest

from hivit_jax import main, platforms
from hivit_jax.tools import check_data, convert


@pytest.fixture
def updates(monkeypatch):
    """Return a dict that records changed settings of JAX."""
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    return settings


def test_commands_without_device_work_use_the_cpu(updates, monkeypatch, capsys):
    """Commands that only describe, compile, inspect or check data use the CPU.

    Training leaves the platform unchanged, and so does a `main` called with arguments.
    """
    cpu = {"jax_platforms": "cpu"}
    recipe_flags = ["--config=no_such_recipe", "--workdir=x"]
    for command, flags in (
        (main.main, [*recipe_flags, "--mode=describe"]),
        (main.main, [*recipe_flags, "--mode=compile"]),
        (convert.main, ["--inspect", "/no/such/file.pth"]),
        (check_data.main, recipe_flags[:1]),
    ):
        assert command(flags) != 0
        assert updates == {}
        monkeypatch.setattr(sys, "argv", ["command", *flags])
        assert command() != 0
        assert updates == cpu
        updates.clear()
    monkeypatch.setattr(sys, "argv", ["command", *recipe_flags])
    assert main.main() == 2
    assert updates == {}


@pytest.fixture
def start(monkeypatch, capfd):
    """Return a function that calls `platforms.start` as if libtpu were installed.

    platform: the backend that JAX finds.
    has_chip: the result of `platforms.has_chip`.
    jax_platforms: the value of JAX_PLATFORMS.
    error: the exception that JAX raises.

    The function returns (stdout, stderr).
    """

    def run(platform="cpu", has_chip=False, jax_platforms="", error=None):
        def default_backend():
            os.write(2, b"unexpected worker hostname\n")
            if error:
                raise error
            return platform

        monkeypatch.setattr(platforms, "installed_runtimes", lambda: ["libtpu"])
        monkeypatch.setattr(platforms, "has_chip", lambda: has_chip)
        monkeypatch.setattr(
            type(jax.config), "jax_platforms", jax_platforms, raising=False
        )
        monkeypatch.setattr(jax, "default_backend", default_backend)
        platforms.start()
        return capfd.readouterr()

    return run


def test_start_without_a_chip_logs_one_line(start):
    out, err = start()
    assert out.splitlines() == [
        "libtpu found no chip; computing on the CPU. JAX_PLATFORMS=cpu skips the search"
    ]
    assert err == ""


def test_start_shows_stderr_if_libtpu_finds_a_chip_or_fails(start, capfd):
    """If `has_chip` returns True or JAX_PLATFORMS is set, no backend is started."""
    assert start(platform="tpu") == ("", "unexpected worker hostname\n")
    assert start(has_chip=True) == ("", "")
    assert start(jax_platforms="tpu") == ("", "")
    with pytest.raises(RuntimeError, match="busy"):
        start(error=RuntimeError("busy"))
    assert capfd.readouterr().err == "unexpected worker hostname\n"


def test_has_chip_finds_device_files_and_cards(tmp_path):
    """A device file or PCI card reveals a chip; Google's network card is not a TPU."""
    card = tmp_path / "sys/bus/pci/devices/0000:00:04.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x1ae0\n")
    (card / "device").write_text("0x0042\n")
    assert not platforms.has_chip(tmp_path)
    (card / "device").write_text("0x0063\n")
    assert platforms.has_chip(tmp_path)
    for name in ("accel0", "vfio/0", "nvidia0", "dxg"):
        root = tmp_path / name.replace("/", "_")
        (root / "dev" / name).parent.mkdir(parents=True)
        (root / "dev/vfio").mkdir(exist_ok=True)
        (root / "dev/vfio/vfio").touch()  # exists without a chip
        assert not platforms.has_chip(root)
        (root / "dev" / name).touch()
        assert platforms.has_chip(root)

"""Accelerator runtimes on computers without the chip."""

import os
import sys

import jax
import pytest

from hivit_jax import main, platforms
from hivit_jax.tools import check_data, convert


@pytest.fixture
def updates(monkeypatch):
    """Settings of JAX that the code changes."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    return found


def test_commands_that_compute_nothing(updates, monkeypatch, capsys):
    """A command of its own process that describes, compiles ahead, inspects or checks
    data uses the CPU, also if it ends with an error. A call in Python changes nothing.
    """
    cpu = {"jax_platforms": "cpu"}
    recipe = ["--config=no_such_recipe", "--workdir=x"]
    for command, flags in (
        (main.main, [*recipe, "--mode=describe"]),
        (main.main, [*recipe, "--mode=compile"]),
        (convert.main, ["--inspect", "/no/such/file.pth"]),
        (check_data.main, recipe[:1]),
    ):
        assert command(flags) != 0
        assert updates == {}
        monkeypatch.setattr(sys, "argv", ["command", *flags])
        assert command() != 0
        assert updates == cpu
        updates.clear()
    monkeypatch.setattr(sys, "argv", ["command", *recipe])
    assert main.main() == 2
    assert updates == {}


@pytest.fixture
def start(monkeypatch, capfd):
    """Runs `platforms.start` where libtpu is installed: (stdout, stderr)."""

    def run(platform="cpu", chip=False, choice="", error=None):
        def default_backend():
            os.write(2, b"unexpected worker hostname\n")
            if error:
                raise error
            return platform

        monkeypatch.setattr(platforms, "installed_runtimes", lambda: ["libtpu"])
        monkeypatch.setattr(platforms, "has_chip", lambda: chip)
        monkeypatch.setattr(type(jax.config), "jax_platforms", choice, raising=False)
        monkeypatch.setattr(jax, "default_backend", default_backend)
        platforms.start()
        return capfd.readouterr()

    return run


def test_one_line_where_no_chip_is_there(start):
    out, err = start()
    assert out.splitlines() == [
        "libtpu found no chip; computing on the CPU. JAX_PLATFORMS=cpu skips the search"
    ]
    assert err == ""


def test_nothing_is_hidden_where_a_chip_is_there(start, capfd):
    """Found in spite of the search, or an error; nothing starts early with a chip, or
    with a choice of the user.
    """
    assert start(platform="tpu") == ("", "unexpected worker hostname\n")
    assert start(chip=True) == ("", "")
    assert start(choice="tpu") == ("", "")
    with pytest.raises(RuntimeError, match="busy"):
        start(error=RuntimeError("busy"))
    assert capfd.readouterr().err == "unexpected worker hostname\n"


def test_device_files_and_cards(tmp_path):
    """Google's network card is not a TPU."""
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
        (root / "dev/vfio/vfio").touch()  # there without any chip
        assert not platforms.has_chip(root)
        (root / "dev" / name).touch()
        assert platforms.has_chip(root)

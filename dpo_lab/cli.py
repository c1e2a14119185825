"""The `dpo-lab` command, made from the config dataclasses."""

from pathlib import Path

import tyro

from dpo_lab.pretrain import PretrainConfig, pretrain


def pretrain_command(config: PretrainConfig = PretrainConfig(), /, out: Path = Path("runs/pretrain"), resume: bool = False) -> None:
    """Train the embedded GPT-2 and its tokenizer from scratch on the IMDb training reviews."""
    print(f"model in {pretrain(out, config, resume=resume)}")


def main() -> None:
    tyro.extras.subcommand_cli_from_dict({"pretrain": pretrain_command, "x": lambda: None})


if __name__ == "__main__":
    main()

"""What is shipped with the package: the embedded GPT-2, and the results of finished sweeps."""

from pathlib import Path

ASSETS = Path(__file__).parent
EMBEDDED = ASSETS / "gpt2-imdb"

"""Save a still picture of each executed notebook.

    python benchmarks/pictures.py [NOTEBOOK.ipynb ...]

A code host shows the notebooks without outputs, and this picture at the top of each. It is the
picture of the cell tagged `still`, or else the first in the notebook. `make site` runs this on the
notebooks that it executed, in jupyter_execute/; pictures go to docs/pictures/, named like the
notebooks.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
EXECUTED = ROOT / "jupyter_execute" / "notebooks"

# pixels; GitHub and JupyterLab show about 900
MAX_WIDTH = 960


def main(paths: list[str]) -> None:
    PICTURES.mkdir(exist_ok=True)
    for path in map(Path, paths) if paths else sorted(EXECUTED.glob("*.ipynb")):
        png = still(nbformat.read(path, 4))
        if png is None:
            print(f"{path.name} has no picture")
            continue
        target = PICTURES / f"{path.stem}.png"
        target.write_bytes(shrunk(png))
        print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1000:.0f} kB")


def still(notebook: nbformat.NotebookNode) -> bytes | None:
    """The PNG of the cell tagged `still`, or else the first; None if there is no picture."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in cells if "still" in cell.metadata.get("tags", [])]
    for cell in [*tagged, *cells]:
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                return base64.b64decode(output.data["image/png"])
    return None


def shrunk(png: bytes, max_width: int = MAX_WIDTH) -> bytes:
    """The picture in 64 colors, and at most `max_width` pixels wide."""
    image = Image.open(io.BytesIO(png))

    # a transparent background would be black on a dark page
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")

    if image.width > max_width:
        size = (max_width, round(image.height * max_width / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.quantize(64).save(out, "png", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    main(sys.argv[1:])

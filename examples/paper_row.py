"""One row of a paper's table, by a protocol preset: clean and robust accuracy with and without a test-time defence.

    python examples/paper_row.py --smoke --defense random-noise --run row
    python examples/paper_row.py --protocol ttc-224 --data eurosat --root ~/datasets --defense ttc \\
        --model open_clip:ViT-B-32-quickgelu@openai --run results/eurosat

The preset fixes split, class names, prompts, resolution, threat models and attacks, and the run keeps its hash. A run
that was interrupted goes on. ``--smoke`` is the same on a tiny folder in EuroSAT's layout and a tiny untrained CLIP,
made in the run's folder: it shows that the command works, and its numbers mean nothing.

``clipdefense evaluate --protocol ttc-224 --root ~/datasets --model ... --defense none --defense ttc --run ...`` is the
whole table, on the command line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import clipdefense as cd
from clipdefense.runs.config import read_config
from clipdefense.runs.results import read
from clipdefense.runs.run import run

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 32, "image_size": 224},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def make_small(folder: Path) -> str:
    """A EuroSAT of three classes and six images in ``folder``, and an untrained CLIP; returns the model's spec."""
    import open_clip
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    for name in ("AnnualCrop", "Forest", "SeaLake"):
        for number in (1, 2):
            pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=generator)
            path = folder / "eurosat" / "2750" / name / f"{name}_{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(open_clip.model.CLIP(**TINY).state_dict(), folder / "tiny.safetensors")
    (folder / "tiny.json").write_text(json.dumps(TINY), encoding="utf-8")
    return f"open_clip:{folder / 'tiny.json'}@{folder / 'tiny.safetensors'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", default="ttc-224", choices=cd.data.list_protocols())
    parser.add_argument("--data", default="eurosat", help="one of the protocol's data sets")
    parser.add_argument("--root", help="folder of the data sets, as torchvision lays them out")
    parser.add_argument("--model", default="open_clip:ViT-B-32-quickgelu@openai")
    parser.add_argument("--defense", default="ttc", help="a test-time defence")
    parser.add_argument("--n", type=int, help="images, evenly over the classes; the protocol's number otherwise")
    parser.add_argument("--run", type=Path, default=Path("row"), help="folder for the verdicts")
    parser.add_argument("--smoke", action="store_true", help="tiny model and images, one radius, one draw a gradient")
    args = parser.parse_args()

    content: dict[str, Any] = {"models": [args.model], "root": args.root, "protocol": args.protocol}
    dataset: dict[str, Any] = {"spec": args.data}
    defense: dict[str, Any] = {"spec": args.defense}
    if args.n is not None:
        dataset["n"] = args.n
    if args.smoke:
        made = args.run / "made"
        content |= {"models": [make_small(made)], "root": str(made), "threats": [{"eps": "1/255"}]}
        defense |= {"eot": 1}
    config = read_config({**content, "datasets": [dataset], "defenses": ["none", defense]})
    run(config, args.run, progress=lambda progress: print(progress.what))

    result = read(args.run)
    for note in cd.data.get_protocol(args.protocol).notes:
        print(f"note: {note}")
    for cell in result.cells:
        print(cell.cell.name)
        for row in (cell.evaluation.clean, *cell.evaluation.rows):
            low, high = row.interval
            shares = f"{100 * row.accuracy:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
            print(f"  {row.attack:72} {row.attacked:40} {shares}")


if __name__ == "__main__":
    main()

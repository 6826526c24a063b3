"""`python -m sde_score.pretrained CHECKPOINT --config FILE.json --out FILE.safetensors`: published
weights to a file of our own, for `load_pretrained`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from sde_score.pretrained import diffusers, score_sde
from sde_score.pretrained.export import save_pretrained


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """In one line."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says; returns the exit status."""
    parser = _Parser(
        prog="python -m sde_score.pretrained",
        description="Convert published weights to one safetensors file for load_pretrained.",
    )
    parser.add_argument("checkpoint", help="a .pth file of score SDE, or a folder of diffusers")
    parser.add_argument("--config", help="JSON with the published configuration of a .pth file")
    parser.add_argument("--out", required=True, help="the safetensors file to write")
    parser.add_argument("--sha256", help="that of the file with the weights, to be verified")
    options = parser.parse_args(arguments)
    if not Path(options.checkpoint).exists():
        parser.error(f"{options.checkpoint} does not exist")
    folder = Path(options.checkpoint).is_dir()
    if folder == (options.config is not None):
        parser.error("give --config with a .pth file, and none with a folder")
    try:
        if folder:
            model = diffusers.load(options.checkpoint, sha256=options.sha256)
        else:
            config = _read_json(options.config)
            model = score_sde.load(options.checkpoint, config, sha256=options.sha256)
        save_pretrained(options.out, model)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{options.out}: a network over {model.sde} for data in {model.data_range}")
    return 0


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error


if __name__ == "__main__":
    sys.exit(main())

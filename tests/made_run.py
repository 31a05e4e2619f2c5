"""The folder of a run that was not trained: its log, evaluations and small pictures are made up, in any number."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from vit5gen.config import load_config
from vit5gen.report.small_pictures import FACTS, save_small, sheet, step_picture
from vit5gen.system.files import write_json
from vit5gen.training.run_folder import RunFolder, to_yaml

METRIC = "FD-EffNetLite0@96"
HOSTILE = "<script>alert(1)</script>"


def make_run(config_file: Path, path: Path, evaluations: int = 3, every: int = 10, **told: Any) -> RunFolder:
    """Write a run of so many evaluations, ``every`` so many steps, with a line of the log for each step."""
    folder, last = RunFolder(path), (evaluations - 1) * every
    path.mkdir()
    folder.config.write_text(to_yaml(load_config(config_file, {"training.num_steps": last})))
    rest = {"grad_norm": 1.0, "learning_rate": 1e-3, "images_per_second": 8.0}
    lines = [{"step": step, "loss": 1 + 1 / step, **rest} for step in range(1, last + 1)]
    lines[1] |= {"resumed": 1, "changed": [HOSTILE]}
    folder.log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reports = [{"value": 1000 / (number + 3), "n": 12, "floor": 100.125} for number in range(evaluations)]
    entries = [{"step": n * every, "held_out_loss": 1.5 - n / 100, METRIC: one} for n, one in enumerate(reports)]
    folder.metrics.write_text(json.dumps({"evaluations": entries}))
    images = torch.randint(256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_small(step_picture(folder.pictures, 0), sheet(list(images), 8), "by somebody")
    for number in range(1, evaluations):
        shutil.copyfile(step_picture(folder.pictures, 0), step_picture(folder.pictures, number * every))
    facts = {"rows": [HOSTILE, "square", "star"], "attribution": "by somebody", "flops_per_image": 10**9}
    write_json(folder.pictures / FACTS, facts | told)
    return folder

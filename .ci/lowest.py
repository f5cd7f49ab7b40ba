"""Print, as constraints for pip, the lowest version that pyproject.toml allows of every package it names.

What has no lower bound (types-pyyaml) or is not named (torchvision, which has to fit torch) is left to pip.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"].values()
for requirement in sorted({*project["dependencies"], *(r for extra in extras for r in extra)}):
    bound = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
    if bound:
        print(f"{bound[1]}=={bound[2]}")

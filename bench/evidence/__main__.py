"""`python -m peft_fused.bench.evidence {psd,pinwheel,rosa,sst2,all}` runs experiments and writes what they find."""

import argparse
import importlib
from pathlib import Path

from .files import FOLDER

NAMES = ("psd", "pinwheel", "rosa", "sst2")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m peft_fused.bench.evidence", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "all"))
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the JSON files and pictures")
    parser.add_argument("--data", type=Path, help="for sst2: the folder with SST-2's train.tsv and dev.tsv")
    given = parser.parse_args(arguments)
    names = NAMES if given.name == "all" else (given.name,)
    if "sst2" in names and given.data is None:
        parser.error("sst2 needs --data, the folder with SST-2's train.tsv and dev.tsv")
    for name in names:
        experiment = importlib.import_module(f"{__package__}.{name}")
        result = experiment.run(given.out, given.data) if name == "sst2" else experiment.run(given.out)
        print(experiment.report(result), flush=True)


if __name__ == "__main__":
    main()

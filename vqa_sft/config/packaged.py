"""Recipes, launch configurations and the demo's base, as shipped: next to the package in a checkout, inside it in a
wheel. No torch."""

from pathlib import Path

from vqa_sft.console import note

PACKAGE = Path(__file__).parents[1]
TINY = PACKAGE.name + "/tiny/base"  # as the demo's recipe names its base


def packaged(folder: str) -> Path:
    """The folder `recipes`, `accelerate_configs` or `deepspeed_configs`."""
    return PACKAGE / folder if (PACKAGE / folder).is_dir() else PACKAGE.parent / folder


def find_packaged(name: str, folder: str) -> str:
    """`name`, or where there is no such file, the shipped one: of demo, demo.yaml, recipes/demo.yaml."""
    if Path(name).exists() or Path(name).parent not in (Path(), Path(folder)):
        return name
    own = packaged(folder) / Path(name).name
    own = own if own.suffix in (".yaml", ".json") else own.with_name(f"{own.name}.yaml")
    if own.is_file():
        note(f"Using {own}.")
        return str(own)
    return name


def find_base(name: str) -> str:
    """`name`, or where it means the demo's base and there is no such folder, the shipped one."""
    return str(PACKAGE.parent / name) if name == TINY and not Path(name).exists() else name

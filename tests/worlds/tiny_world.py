"""A recipe that is trained within a second, and a process that asks the store for it.

Such a model has learned nothing, so what it is measured to do is made up.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from nest.worlds import build, store
from nest.worlds.build import RECIPES, Recipe
from nest.worlds.recipe import RecipeConfig

MEASURED: dict[str, Any] = {
    "attack_success_bare": 0.5,
    "attack_success_wrapped": 0.9,
    "exact_match_utility": 1.0,
    "over_refusal_borderline": 0.0,
    "n": {"harmful": 1, "borderline": 1, "benign": 1},
}


def tiny_recipe(**changed: Any) -> Recipe:
    """A bazaar that is hardly trained at all."""
    training = {"steps": 2, "batch_size": 4, "d_model": 16, "d_ff": 24, "n_layers": 1, "n_heads": 2}
    return Recipe(RECIPES["bazaar"].words, 1, RecipeConfig(**(training | changed)))


def main(mode: str, log: Path) -> None:
    """Ask the store for the tiny world, and note every training in the log.

    Args:
        mode: `slowly` trains for a while; `hang` never ends, the folder half written.
        log: Gets a line where a training begins, or `half` where the process hangs.
    """

    def measure(*_: object) -> dict[str, Any]:
        with log.open("a") as file:
            file.write("trained\n")
        time.sleep(1.5 if mode == "slowly" else 0.0)
        return dict(MEASURED)

    def hang(*_: object) -> None:
        log.write_text("half")
        time.sleep(600)

    build.measure = measure  # type: ignore[assignment]
    if mode == "hang":
        build.write_papers = hang  # type: ignore[assignment]
    print(store.kept(tiny_recipe()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

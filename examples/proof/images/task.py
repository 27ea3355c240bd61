"""An image classifier of one seed: the head of its training, and its tail at several rates."""

from functools import cached_property, partial
from itertools import islice, product
from pathlib import Path
from typing import Any

from torch.optim.swa_utils import update_bn

from examples.proof.cost import Cost, measured
from examples.proof.files import load, save
from examples.proof.images.data import PACKAGE, write_images
from examples.proof.images.training import ImageTraining, SgdTraining
from examples.proof.packages import package_file
from examples.proof.parts import Part, Row
from examples.proof.trunk import write_candidates
from examples.proof.trunk_work import TrunkWork, resized
from examples.proof.work import Settings, read_settings
from twa_scale import RunningAverages
from twa_scale.ranks import World

HERE = Path(__file__).parent


class Images(TrunkWork):
    """The work on one seed.

    Args:
        out: the directory of all seeds.
        seed: of the starting weights and of the order of the data.
        settings: from `read`.
        packages: where the Debian package is.
    """

    part_bytes = 5_000_000
    folder = HERE
    kind: type[ImageTraining] = SgdTraining

    def __init__(self, out: Path, seed: int, settings: Settings, packages: Path) -> None:
        steps = settings["trunk"]["steps"]
        runs = [method for method in settings["methods"].values() if method["how"] == "schedule"]
        super().__init__(out, seed, settings, {self.kind.leaves(steps, method["steps"]) for method in runs})
        self.packages = packages

    @classmethod
    def read(cls, size: str) -> Settings:
        """Return methods.yaml, with the methods of the tail once for each of its rates."""
        settings = read_settings(cls.folder / "methods.yaml", size)
        rates, shrink = settings["tails"]["rates"], settings.get("shrink", 1)
        head, tail = settings.pop("head"), settings.pop("tail")
        methods = head | {tail_name(name, rate): {**tail[name], "tail": rate} for rate, name in product(rates, tail)}
        methods["full run"]["steps"] = (settings["full"] - settings["trunk"]["steps"]) * shrink
        settings["methods"] = {
            name: resized(method, settings, 30, "tails" if "tail" in method else "trunk")
            for name, method in methods.items()
        }
        claims = settings.pop("tail_claims")
        settings["claims"] += [[tail_name(name, rate) for name in pair] for rate, pair in product(rates, claims)]
        settings["tables"] = [{"reference": "full run", "methods": list(head)}]
        for rate in rates:
            names, before = [tail_name(name, rate) for name in tail], ["trunk", "three-quarters", f"tail-{rate}"]
            settings["tables"].append({"reference": tail_name("SWA", rate), "methods": names, "before": before})
        if len(rates) > 1:
            over_rates = {name: [tail_name(name, rate) for rate in rates] for name in tail}
            settings["spreads"] = {"reference": "SWA", "methods": over_rates}
        return settings

    def check_inputs(self) -> None:
        package_file(self.packages, PACKAGE)

    def data(self) -> list[str]:
        return [f"task.data.{split}={self.out}/data/{split}.npz" for split in ("train", "validation", "test")]

    def before(self) -> list[Part]:
        full, tails = self.settings["full"], self.settings["tails"]
        settings = {**self.trunk.recorded, "full": full}
        parts = [*super().before(), Part("three-quarters", settings, self.three_quarters)]
        for rate in tails["rates"]:
            parts.append(Part(f"tail-{rate}", {**settings, "tails": tails}, partial(self.tail, rate)))
        return parts

    def three_quarters(self) -> Row:
        """Continue the trunk to three quarters of the full run, where the tails begin."""
        steps, until = self.settings["trunk"]["steps"], 3 * self.settings["full"] // 4
        self.training.restore(load(self.trunk.state(steps)))
        with measured(self.model, self.settings["batch_size"]) as cost:
            self.training.follow(steps, until, self.settings["full"])
        save(self.training.state(), self.directory / "three-quarters.pt")
        return cost.row()

    def tail(self, rate: float) -> Row:
        """Train on at a constant rate and leave candidates; then go on for `longer` steps and leave more of them."""
        tails, full = self.settings["tails"], self.settings["full"]
        self.training.restore(load(self.directory / "three-quarters.pt"))
        keep = tails["candidates"] + tails["longer"] // tails["every"]
        averages = RunningAverages(self.model, window={"every": tails["every"], "keep": keep, "store": "dense32"})
        costs = []
        for name, first, last in (
            (f"tail-{rate}", 3 * full // 4, full),
            (f"tail-{rate}-longer", full, full + tails["longer"]),
        ):
            with measured(self.model, self.settings["batch_size"]) as cost:
                for step in range(first, last):
                    self.training.update(step, rate)
                    averages.step()
            write_candidates(averages, self.directory / name)
            costs.append(cost.row())
        return {**costs[0], "longer": costs[1]}

    def make(self, name: str, method: Settings) -> str:
        chosen = self.scheduled(method["steps"]) if method["how"] == "schedule" else super().make(name, method)
        self.recalibrate()
        return chosen

    def scheduled(self, extra: int) -> str:
        """Make a training of the steps of the trunk and `extra`, with the schedule of the full run."""
        steps = self.settings["trunk"]["steps"]
        start = self.kind.leaves(steps, extra)
        self.training.restore(load(self.trunk.state(start)))
        self.training.follow(start, steps + extra, steps + extra)
        return f"from step {start}"

    def cost(self, method: Settings, cost: Cost) -> Cost:
        if method["how"] == "schedule":  # its other steps take the place of steps of the trunk
            return cost.of(method["steps"])
        if method.get("longer"):
            cost += Cost(**self.rows[f"tail-{method['tail']}"]["longer"])
        return super().cost(method, cost)

    def score(self) -> float:
        self.recalibrate()
        return super().score()

    def recalibrate(self) -> None:
        """Measure the BatchNorm statistics of the weights in the model anew, if it has any."""
        batches = self.training.batches
        chosen = (next(batches.training(step)) for step in range(batches.per_epoch))
        task: Any = self.task
        inputs = (task.inputs(batch) for batch in islice(chosen, self.settings.get("recalibrate_batches", 0)))
        update_bn(inputs, self.model, self.device)

    def candidates(self, method: Settings) -> str:
        if "tail" in method:
            return f"{self.directory}/tail-{method['tail']}{'-longer' if method.get('longer') else ''}/step-*"
        return super().candidates(method)

    @cached_property
    def training(self) -> ImageTraining:
        sizes = self.settings["images"]
        write_images(self.out / "data", sizes["train"], sizes["validation"], self.packages)
        trunk = self.settings["trunk"]
        return self.kind(self.config(), World.from_environment(), trunk["steps"], trunk["lr"])


def tail_name(method: str, rate: float) -> str:
    return f"{method}, tail at {rate}"
